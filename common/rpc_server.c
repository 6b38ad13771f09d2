// The server: ports, methods, lanes. A lane is a completion queue with one thread; gRPC spreads connections
// over the lanes and a call stays on its lane. rpc_call.c has what happens on a lane. Owned by the thread
// that made it.
#include <errno.h>
#include <limits.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/log.h"
#include "common/rpc_internal.h"

enum {
    DEFAULT_THREADS = 2,
    MAX_THREADS = 64,
    DEFAULT_QUEUED = 1024,
    DEFAULT_CALLS = 4096,
    EXPECTED_CALLS = 8,            // waited for on each lane, so that a burst is not taken one by one
    LEAST_PING_INTERVAL_MS = 1000, // of clients
};

static int server_credentials(grpc_server_credentials **out, const struct rpc_server_options *options,
                              struct error *error)
{
    if (!options->tls_cert && !options->tls_key && !options->tls_ca) {
        *out = grpc_insecure_server_credentials_create();
        return STATUS_OK;
    }
    if (!options->tls_cert || !options->tls_key)
        return error_set(error, STATUS_INVALID, "TLS asks for both a certificate and its key");
    char *cert = NULL, *key = NULL, *ca = NULL;
    int status = rpc_read_pem(options->tls_cert, &cert, error);
    if (!status)
        status = rpc_read_pem(options->tls_key, &key, error);
    if (!status && options->tls_ca)
        status = rpc_read_pem(options->tls_ca, &ca, error);
    if (!status) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};
        *out = grpc_ssl_server_credentials_create_ex(
            ca, &pair, 1,
            ca ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
               : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
            NULL);
        if (!*out)
            status =
                error_set(error, STATUS_INVALID, "the TLS certificate %s cannot be used", options->tls_cert);
    }
    free(cert);
    free(key);
    free(ca);
    return status;
}

static grpc_server *create(const struct rpc_server_options *options)
{
    uint32_t largest = options->max_message_bytes ? options->max_message_bytes : RPC_DEFAULT_MESSAGE_BYTES;
    uint32_t age_ms = options->max_connection_age_ms;
    grpc_arg arguments[] = {
        rpc_arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, largest > INT_MAX ? INT_MAX : (int)largest),
        rpc_arg_int(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        // A second server on the port is an error of the operator, not a second lane.
        rpc_arg_int(GRPC_ARG_ALLOW_REUSEPORT, 0),
        // Clients vanish without a word: ping them. And let them ping us, also between calls.
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, RPC_KEEPALIVE_MS),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, RPC_KEEPALIVE_TIMEOUT_MS),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        rpc_arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        rpc_arg_int(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, LEAST_PING_INTERVAL_MS),
        rpc_arg_int(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0), // 0: never answered with GOAWAY
        rpc_arg_int(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                    age_ms ? (int)(age_ms > INT_MAX ? INT_MAX : age_ms) : INT_MAX),
    };
    grpc_channel_args all = {.num_args = sizeof(arguments) / sizeof(arguments[0]), .args = arguments};
    return grpc_server_create(&all, NULL);
}

static int add_lanes(struct rpc_server *server, uint32_t count)
{
    server->lanes = calloc(count, sizeof(*server->lanes));
    if (!server->lanes)
        return STATUS_NO_MEMORY;
    for (; server->n_lanes < count; server->n_lanes++) {
        struct rpc_lane *lane = &server->lanes[server->n_lanes];
        lane->server = server;
        lane->queue = grpc_completion_queue_create_for_next(NULL);
        pthread_mutex_init(&lane->mutex, NULL);
        grpc_server_register_completion_queue(server->server, lane->queue, NULL);
    }
    return STATUS_OK;
}

int rpc_server_new(struct rpc_server **out, const struct rpc_server_options *options, struct error *error)
{
    static const struct rpc_server_options defaults;
    options = options ? options : &defaults;
    if (options->threads > MAX_THREADS)
        return error_set(error, STATUS_INVALID, "a server runs on at most %d threads, not %u", MAX_THREADS,
                         options->threads);
    struct rpc_server *server = calloc(1, sizeof(*server));
    if (!server)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a server");
    rpc_library_init();
    int status = server_credentials(&server->credentials, options, error);
    if (status) {
        rpc_library_shutdown();
        free(server);
        return status;
    }
    server->tls = options->tls_cert != NULL;
    server->max_queued = options->max_queued ? options->max_queued : DEFAULT_QUEUED;
    server->max_calls = options->max_calls ? options->max_calls : DEFAULT_CALLS;
    server->stop_tag = (struct rpc_tag){RPC_STOPPED, NULL};
    server->server = create(options);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&server->mutex, NULL);
    pthread_cond_init(&server->ended, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (add_lanes(server, options->threads ? options->threads : DEFAULT_THREADS)) {
        rpc_server_free(server);
        return error_set(error, STATUS_NO_MEMORY, "no memory for a server");
    }
    *out = server;
    return STATUS_OK;
}

// --- listening

// gRPC removes a Unix socket that is in its way, a live one too. Look first whether somebody answers there.
static int check_unix_path(const char *address, struct error *error)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    snprintf(to.sun_path, sizeof(to.sun_path), "%s", address + 5);
    struct stat info;
    if (lstat(to.sun_path, &info))
        return STATUS_OK;
    if (!S_ISSOCK(info.st_mode))
        return error_set(error, STATUS_INVALID, "cannot listen on %s: there is a file that is not a socket",
                         address);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool alive = probe >= 0 && connect(probe, (struct sockaddr *)&to, sizeof(to)) == 0;
    if (probe >= 0)
        close(probe);
    if (alive)
        return error_set(error, STATUS_UNAVAILABLE, "cannot listen on %s: another process listens there",
                         address);
    return STATUS_OK;
}

// gRPC says only that it could not listen. Tries the same with plain sockets and returns errno, 0 when that
// works.
static int try_listen(int family, const struct sockaddr *address, socklen_t length)
{
    int one = 1, reason = 0;
    int probe = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0)
        return errno;
    setsockopt(probe, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(probe, address, length) || listen(probe, 1))
        reason = errno;
    close(probe);
    return reason;
}

static int explain_unix(const char *address, struct error *error)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    snprintf(to.sun_path, sizeof(to.sun_path), "%s", address + 5);
    int reason = try_listen(AF_UNIX, (struct sockaddr *)&to, sizeof(to));
    if (reason == 0)
        unlink(to.sun_path);
    return error_set(error, STATUS_UNAVAILABLE, "cannot listen on %s: %s", address,
                     reason ? strerror(reason) : "gRPC refused");
}

static int explain_tcp(const struct rpc_server *server, const char *address, struct error *error)
{
    char host[256];
    const char *colon = strrchr(address, ':');
    bool brackets = address[0] == '[';
    snprintf(host, sizeof(host), "%.*s", (int)(colon - address) - (brackets ? 2 : 0),
             address + (brackets ? 1 : 0));
    struct addrinfo wanted = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *found;
    int failure = getaddrinfo(host, colon + 1, &wanted, &found);
    if (failure)
        return error_set(error, STATUS_INVALID, "cannot listen on %s: %s", address, gai_strerror(failure));
    int reason = 0;
    for (struct addrinfo *at = found; at && !reason; at = at->ai_next)
        reason = try_listen(at->ai_family, at->ai_addr, at->ai_addrlen);
    freeaddrinfo(found);
    if (reason)
        return error_set(error, STATUS_UNAVAILABLE, "cannot listen on %s: %s", address, strerror(reason));
    if (server->tls)
        return error_set(error, STATUS_INVALID,
                         "cannot listen on %s: the TLS certificate and key cannot be used together", address);
    return error_set(error, STATUS_UNAVAILABLE, "cannot listen on %s: gRPC refused", address);
}

int rpc_server_listen(struct rpc_server *server, const char *address, int *port, struct error *error)
{
    if (server->started)
        return error_set(error, STATUS_INVALID, "cannot listen on %s: the server runs already", address);
    bool is_unix = strncmp(address, "unix:", 5) == 0;
    int status = rpc_address_check(address, false, error);
    if (!status && is_unix)
        status = check_unix_path(address, error);
    if (status)
        return status;
    int bound = grpc_server_add_http2_port(server->server, address, server->credentials);
    if (bound <= 0)
        return is_unix ? explain_unix(address, error) : explain_tcp(server, address, error);
    if (port)
        *port = is_unix ? 0 : bound;
    return STATUS_OK;
}

int rpc_server_add(struct rpc_server *server, const struct rpc_method *method, void *service)
{
    if (server->started)
        return STATUS_INVALID;
    struct rpc_method_entry *entries = realloc(server->methods, (server->n_methods + 1) * sizeof(*entries));
    if (!entries)
        return STATUS_NO_MEMORY;
    server->methods = entries;
    entries[server->n_methods++] = (struct rpc_method_entry){.method = *method, .service = service};
    return STATUS_OK;
}

// --- running

static void *serve(void *argument)
{
    struct rpc_lane *lane = argument;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(lane->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (event.type != GRPC_OP_COMPLETE)
            continue;
        struct rpc_tag *tag = event.tag;
        RPC_TAKE_OVER(tag);
        if (tag->event != RPC_STOPPED) {
            rpc_call_handle(lane, tag, event.success);
            continue;
        }
        pthread_mutex_lock(&lane->server->mutex);
        lane->server->drained = true;
        pthread_cond_broadcast(&lane->server->ended);
        pthread_mutex_unlock(&lane->server->mutex);
    }
}

int rpc_server_start(struct rpc_server *server, struct error *error)
{
    if (server->started || server->stopped)
        return error_set(error, STATUS_INVALID, "a server starts once");
    server->started = true;
    grpc_server_start(server->server);
    for (uint32_t i = 0; i < server->n_lanes; i++) {
        for (int expected = 0; expected < EXPECTED_CALLS; expected++)
            rpc_call_expect(&server->lanes[i]);
    }
    for (uint32_t i = 0; i < server->n_lanes; i++) {
        int failure = pthread_create(&server->lanes[i].thread, NULL, serve, &server->lanes[i]);
        if (failure == 0) {
            server->n_threads++;
            continue;
        }
        rpc_server_stop(server, 0);
        return error_set(error, STATUS_IO, "cannot start a server thread: %s", strerror(failure));
    }
    return STATUS_OK;
}

// Waits until no call is left, at most until `until` (NULL: for ever).
static bool wait_drained(struct rpc_server *server, const struct timespec *until)
{
    pthread_mutex_lock(&server->mutex);
    int timed_out = 0;
    while (!server->drained && !timed_out) {
        if (until)
            timed_out = pthread_cond_timedwait(&server->ended, &server->mutex, until);
        else
            pthread_cond_wait(&server->ended, &server->mutex);
    }
    bool drained = server->drained;
    pthread_mutex_unlock(&server->mutex);
    return drained;
}

void rpc_server_stop(struct rpc_server *server, int64_t grace_us)
{
    if (server->stopped)
        return;
    server->stopped = true;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    int64_t nanoseconds = until.tv_nsec + (grace_us > 0 ? grace_us % 1000000 : 0) * 1000;
    until.tv_sec += (grace_us > 0 ? grace_us / 1000000 : 0) + nanoseconds / 1000000000;
    until.tv_nsec = nanoseconds % 1000000000;
    RPC_HAND_OVER(&server->stop_tag);
    grpc_server_shutdown_and_notify(server->server, server->lanes[0].queue, &server->stop_tag);
    rpc_call_end_standing(server);
    bool all_run = server->n_threads == server->n_lanes;
    if (!all_run || !wait_drained(server, &until)) {
        grpc_server_cancel_all_calls(server->server);
        if (all_run)
            wait_drained(server, NULL);
    }
    for (uint32_t i = 0; i < server->n_lanes; i++) {
        // Other lanes may still be handling the last events of calls that gRPC counts as over.
        pthread_mutex_lock(&server->lanes[i].mutex);
        server->lanes[i].closed = true;
        grpc_completion_queue_shutdown(server->lanes[i].queue);
        pthread_mutex_unlock(&server->lanes[i].mutex);
    }
    for (uint32_t i = 0; i < server->n_lanes; i++) {
        if (i < server->n_threads)
            pthread_join(server->lanes[i].thread, NULL);
        else
            serve(&server->lanes[i]); // never started: its events are drained here
    }
}

void rpc_server_free(struct rpc_server *server)
{
    if (!server)
        return;
    if (server->n_lanes > 0)
        rpc_server_stop(server, 0);
    grpc_server_destroy(server->server);
    for (uint32_t i = 0; i < server->n_lanes; i++) {
        grpc_completion_queue_destroy(server->lanes[i].queue);
        pthread_mutex_destroy(&server->lanes[i].mutex);
    }
    grpc_server_credentials_release(server->credentials);
    pthread_cond_destroy(&server->ended);
    pthread_mutex_destroy(&server->mutex);
    free(server->methods);
    free(server->lanes);
    rpc_library_shutdown();
    free(server);
}
