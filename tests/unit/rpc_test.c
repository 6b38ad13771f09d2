// The gRPC wrapper, server and client against each other over loopback and Unix sockets: every shape of call,
// every way for a call to end, and what may not happen (a callback after on_done, a second server on a port,
// a queue past its bound).
#include <arpa/inet.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/rpc_client.h"
#include "common/rpc_server.h"
#include "tests/suite.h"

enum { SECOND = 1000000 };

// What the service saw. One record for all calls of a test.
struct seen {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int started, messages, half_closes, sents, done, cancelled, after_done, overlaps;
    size_t last_queued;
    int refusal; // what rpc_call_send said when it refused
    struct rpc_call *kept;
    int64_t deadline_us;
    char peer[128], header[128];
};

static struct seen seen;
static struct rpc_server *server;
static struct rpc_channel *channel;
static int port;
static char address[128];

static void note(int *counter)
{
    pthread_mutex_lock(&seen.mutex);
    (*counter)++;
    pthread_cond_broadcast(&seen.changed);
    pthread_mutex_unlock(&seen.mutex);
}

static int read_counter(const int *counter)
{
    pthread_mutex_lock(&seen.mutex);
    int value = *counter;
    pthread_mutex_unlock(&seen.mutex);
    return value;
}

// True when the counter reaches `value` within ten seconds.
static bool wait_counter(const int *counter, int value)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 10;
    int late = 0;
    pthread_mutex_lock(&seen.mutex);
    while (*counter < value && !late)
        late = pthread_cond_timedwait(&seen.changed, &seen.mutex, &until);
    bool reached = *counter >= value;
    pthread_mutex_unlock(&seen.mutex);
    return reached;
}

// The call's context counts callbacks that are inside, to notice overlaps and callbacks after on_done.
struct guard {
    atomic_int inside;
    atomic_bool done;
};

static void enter(struct rpc_call *call)
{
    struct guard *guard = rpc_call_context(call);
    if (atomic_fetch_add(&guard->inside, 1) != 0)
        note(&seen.overlaps);
    if (atomic_load(&guard->done))
        note(&seen.after_done);
}

static void leave(struct rpc_call *call)
{
    struct guard *guard = rpc_call_context(call);
    atomic_fetch_sub(&guard->inside, 1);
}

static void any_start(struct rpc_call *call, void *service)
{
    ck_assert_ptr_eq(service, &seen);
    rpc_call_set_context(call, calloc(1, sizeof(struct guard)));
    enter(call);
    note(&seen.started);
    leave(call);
}

static void any_sent(struct rpc_call *call, void *service, size_t queued)
{
    enter(call);
    pthread_mutex_lock(&seen.mutex);
    seen.last_queued = queued;
    seen.sents++;
    pthread_cond_broadcast(&seen.changed);
    pthread_mutex_unlock(&seen.mutex);
    leave(call);
}

static void any_done(struct rpc_call *call, void *service, bool cancelled)
{
    struct guard *guard = rpc_call_context(call);
    enter(call);
    atomic_store(&guard->done, true);
    if (cancelled)
        note(&seen.cancelled);
    leave(call);
    free(guard);
    rpc_call_set_context(call, NULL);
    note(&seen.done);
}

static void echo_message(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    enter(call);
    note(&seen.messages);
    ck_assert_int_eq(rpc_call_send(call, bytes, length), STATUS_OK);
    leave(call);
}

static void unary_message(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    echo_message(call, service, bytes, length);
    rpc_call_finish(call, STATUS_OK, NULL);
}

static void bidi_half_close(struct rpc_call *call, void *service)
{
    enter(call);
    note(&seen.half_closes);
    rpc_call_finish(call, STATUS_OK, NULL);
    leave(call);
}

// "COUNT SIZE": so many messages of that size, then the end.
static void count_message(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    char text[64];
    unsigned count = 0, size = 0;
    enter(call);
    snprintf(text, sizeof(text), "%.*s", (int)length, (const char *)bytes);
    ck_assert_int_eq(sscanf(text, "%u %u", &count, &size), 2);
    char *filler = malloc(size + 1);
    for (unsigned i = 0; i < count; i++) {
        memset(filler, 'a' + (int)(i % 26), size);
        int status = rpc_call_send(call, filler, size);
        if (status) {
            pthread_mutex_lock(&seen.mutex);
            seen.refusal = status;
            pthread_mutex_unlock(&seen.mutex);
            rpc_call_abort(call, STATUS_EXHAUSTED, "the reader is too slow");
            break;
        }
    }
    free(filler);
    rpc_call_finish(call, STATUS_OK, NULL);
    leave(call);
}

// Keeps the first call for the test's thread.
static void keep_message(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    enter(call);
    pthread_mutex_lock(&seen.mutex);
    if (!seen.kept) {
        rpc_call_ref(call);
        seen.kept = call;
    }
    seen.deadline_us = rpc_call_deadline_us(call);
    snprintf(seen.peer, sizeof(seen.peer), "%s", rpc_call_peer(call));
    const char *header = rpc_call_metadata(call, "x-request-id");
    snprintf(seen.header, sizeof(seen.header), "%s", header ? header : "(none)");
    pthread_mutex_unlock(&seen.mutex);
    note(&seen.messages);
    leave(call);
}

// The text of the message is the sentence of the failure.
static void fail_message(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    char text[4096];
    snprintf(text, sizeof(text), "%.*s", (int)length, (const char *)bytes);
    rpc_call_finish(call, STATUS_INVALID, text);
}

// Answers from on_start, before a message is read.
static void early_start(struct rpc_call *call, void *service)
{
    any_start(call, service);
    rpc_call_set_initial_metadata(call, "x-early", "yes");
    rpc_call_finish(call, STATUS_UNAVAILABLE, "not now");
}

static const struct rpc_method methods[] = {
    {.path = "/t/Echo",
     .on_start = any_start,
     .on_message = unary_message,
     .on_sent = any_sent,
     .on_done = any_done},
    {.path = "/t/Count",
     .on_start = any_start,
     .on_message = count_message,
     .on_sent = any_sent,
     .on_done = any_done},
    {.path = "/t/Chat",
     .client_streaming = true,
     .on_start = any_start,
     .on_message = echo_message,
     .on_half_close = bidi_half_close,
     .on_sent = any_sent,
     .on_done = any_done},
    {.path = "/t/Keep",
     .on_start = any_start,
     .on_message = keep_message,
     .on_sent = any_sent,
     .on_done = any_done},
    {.path = "/t/KeepChat",
     .client_streaming = true,
     .on_start = any_start,
     .on_message = keep_message,
     .on_half_close = bidi_half_close,
     .on_sent = any_sent,
     .on_done = any_done},
    {.path = "/t/Fail", .on_start = any_start, .on_message = fail_message, .on_done = any_done},
    {.path = "/t/Early", .on_start = early_start, .on_message = unary_message, .on_done = any_done},
};

static void start_server(const char *listen, const struct rpc_server_options *options)
{
    struct error error = {0};
    ck_assert_msg(rpc_server_new(&server, options, &error) == 0, "%s", error.text);
    ck_assert_msg(rpc_server_listen(server, listen, &port, &error) == 0, "%s", error.text);
    for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
        ck_assert_int_eq(rpc_server_add(server, &methods[i], &seen), 0);
    ck_assert_msg(rpc_server_start(server, &error) == 0, "%s", error.text);
    const char *colon = strrchr(listen, ':');
    if (strncmp(listen, "unix:", 5) == 0)
        snprintf(address, sizeof(address), "%s", listen);
    else
        snprintf(address, sizeof(address), "%.*s:%d", (int)(colon - listen), listen, port);
}

static void connect_to(const char *to, const struct rpc_channel_options *options)
{
    struct error error = {0};
    ck_assert_msg(rpc_channel_new(&channel, to, options, &error) == 0, "%s", error.text);
}

static void setup(void)
{
    memset(&seen, 0, sizeof(seen));
    pthread_mutex_init(&seen.mutex, NULL);
    pthread_cond_init(&seen.changed, NULL);
    rpc_library_init();
    server = NULL;
    channel = NULL;
}

static void teardown(void)
{
    rpc_channel_free(channel);
    rpc_server_free(server);
    rpc_library_shutdown();
    ck_assert_int_eq(seen.after_done, 0);
    ck_assert_int_eq(seen.overlaps, 0);
    ck_assert_int_eq(seen.started, seen.done);
}

static void setup_loopback(void)
{
    setup();
    start_server("127.0.0.1:0", NULL);
    connect_to(address, NULL);
}

static struct rpc_stream *open_stream(const char *path, int64_t timeout_us)
{
    struct error error = {0};
    struct rpc_stream *stream = NULL;
    ck_assert_msg(rpc_stream_open(&stream, channel, path, timeout_us, NULL, false, &error) == 0, "%s",
                  error.text);
    return stream;
}

static struct rpc_stream *ask(const char *path, const char *request, int64_t timeout_us)
{
    struct rpc_stream *stream = open_stream(path, timeout_us);
    ck_assert_int_eq(rpc_stream_send(stream, request, strlen(request)), 0);
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    return stream;
}

// The kept call, once the service has it. The reference is the caller's.
static struct rpc_call *take_kept(void)
{
    ck_assert(wait_counter(&seen.messages, 1));
    pthread_mutex_lock(&seen.mutex);
    struct rpc_call *call = seen.kept;
    pthread_mutex_unlock(&seen.mutex);
    ck_assert_ptr_nonnull(call);
    return call;
}

static int receive_status(struct rpc_stream *stream, struct error *error)
{
    uint8_t *bytes = NULL;
    size_t length = 0;
    *error = (struct error){0};
    int status;
    while ((status = rpc_stream_receive(stream, &bytes, &length, error)) == 1)
        free(bytes);
    return status;
}

static void expect_message(struct rpc_stream *stream, const char *text)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    ck_assert_msg(rpc_stream_receive(stream, &bytes, &length, &error) == 1, "%s", error.text);
    ck_assert_uint_eq(length, strlen(text));
    ck_assert_mem_eq(bytes, text, length);
    free(bytes);
}

static void echo_once(const char *text)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    int status =
        rpc_call_unary(channel, "/t/Echo", text, strlen(text), 10 * SECOND, false, &bytes, &length, &error);
    ck_assert_msg(status == 0, "%s", error.text);
    ck_assert_uint_eq(length, strlen(text));
    ck_assert_mem_eq(bytes, text, length);
    free(bytes);
}

// --- shapes of calls

START_TEST(unary)
{
    echo_once("hello");
    echo_once("");
    ck_assert(wait_counter(&seen.done, 2));
    ck_assert_int_eq(seen.cancelled, 0);
    ck_assert_int_eq(seen.sents, 2);
}
END_TEST

START_TEST(unary_over_unix_and_v6)
{
    char path[] = "/tmp/strata_rpc_XXXXXX", listen[128];
    ck_assert_ptr_nonnull(mkdtemp(path));
    snprintf(listen, sizeof(listen), "unix:%s/socket", path);
    start_server(listen, NULL);
    ck_assert_int_eq(port, 0);
    connect_to(address, NULL);
    echo_once("through a file");
    rpc_channel_free(channel);
    rpc_server_free(server);
    struct stat info;
    ck_assert_int_ne(stat(listen + 5, &info), 0); // the socket went with the server
    rmdir(path);
    server = NULL;
    channel = NULL;
    int probe = socket(AF_INET6, SOCK_STREAM, 0);
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    bool v6 = probe >= 0 && bind(probe, (struct sockaddr *)&any, sizeof(any)) == 0;
    if (probe >= 0)
        close(probe);
    if (!v6)
        return; // a machine without IPv6
    start_server("[::1]:0", NULL);
    connect_to(address, NULL);
    echo_once("and version six");
}
END_TEST

START_TEST(server_stream)
{
    struct rpc_stream *stream = ask("/t/Count", "500 100", 0);
    struct error error = {0};
    for (int i = 0; i < 500; i++) {
        char text[101];
        memset(text, 'a' + i % 26, 100);
        text[100] = '\0';
        expect_message(stream, text);
    }
    ck_assert_int_eq(receive_status(stream, &error), 0);
    ck_assert_int_eq(receive_status(stream, &error), 0); // and again
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.sents, 500);
    ck_assert_uint_eq(seen.last_queued, 0);
    ck_assert_int_eq(seen.cancelled, 0);
}
END_TEST

START_TEST(bidi)
{
    struct rpc_stream *stream = open_stream("/t/Chat", 0);
    struct error error = {0};
    for (int i = 0; i < 50; i++) {
        char text[32];
        snprintf(text, sizeof(text), "message %d", i);
        ck_assert_int_eq(rpc_stream_send(stream, text, strlen(text)), 0);
        expect_message(stream, text);
    }
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    ck_assert_int_eq(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.half_closes, 1);
    ck_assert_int_eq(seen.cancelled, 0);
}
END_TEST

static void *send_many(void *argument)
{
    struct rpc_stream *stream = argument;
    for (int i = 0; i < 300; i++)
        ck_assert_int_eq(rpc_stream_send(stream, &i, sizeof(i)), 0);
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    return NULL;
}

START_TEST(bidi_with_a_sender_beside_a_receiver)
{
    struct rpc_stream *stream = open_stream("/t/Chat", 0);
    struct error error = {0};
    pthread_t sender;
    pthread_create(&sender, NULL, send_many, stream);
    for (int i = 0; i < 300; i++) {
        uint8_t *bytes = NULL;
        size_t length = 0;
        int got;
        ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 1);
        ck_assert_uint_eq(length, sizeof(got));
        memcpy(&got, bytes, sizeof(got));
        ck_assert_int_eq(got, i);
        free(bytes);
    }
    ck_assert_int_eq(receive_status(stream, &error), 0);
    pthread_join(sender, NULL);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(metadata_both_ways)
{
    const char *const ours[] = {"x-request-id", "abc-1", "x-other", "2", NULL};
    struct rpc_stream *stream = NULL;
    struct error error = {0};
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Keep", 0, ours, false, &error), 0);
    ck_assert_int_eq(rpc_stream_send(stream, "x", 1), 0);
    struct rpc_call *call = take_kept();
    ck_assert_str_eq(seen.header, "abc-1");
    ck_assert_msg(strncmp(seen.peer, "ipv4:127.0.0.1:", 15) == 0, "%s", seen.peer);
    ck_assert(seen.deadline_us == INT64_MAX);
    ck_assert_ptr_null(rpc_call_metadata(call, "x-absent"));
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "x-answer", "42"), 0);
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "Bad Key", "42"), STATUS_INVALID);
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "x-bad", "line\nbreak"), STATUS_INVALID);
    ck_assert_int_eq(rpc_call_send(call, "y", 1), 0);
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "x-late", "1"), STATUS_CANCELLED);
    expect_message(stream, "y");
    ck_assert_str_eq(rpc_stream_metadata(stream, "x-answer"), "42");
    ck_assert_ptr_null(rpc_stream_metadata(stream, "x-late"));
    rpc_call_finish(call, STATUS_OK, NULL);
    ck_assert_int_eq(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    // The record outlives the call for those who hold it.
    ck_assert_str_eq(rpc_call_metadata(call, "x-request-id"), "abc-1");
    ck_assert_int_eq(rpc_call_send(call, "z", 1), STATUS_CANCELLED);
    rpc_call_finish(call, STATUS_OK, NULL);
    rpc_call_abort(call, STATUS_OK, NULL);
    rpc_call_unref(call);
}
END_TEST

START_TEST(bad_metadata_is_refused_by_the_client)
{
    const char *const upper[] = {"X-Upper", "1", NULL}, *const lines[] = {"x-lines", "a\nb", NULL};
    const char *many[80];
    for (int i = 0; i < 78; i++)
        many[i] = "x-many";
    many[78] = NULL;
    struct rpc_stream *stream = NULL;
    struct error error = {0};
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Echo", 0, upper, false, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "X-Upper"));
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Echo", 0, lines, false, &error), STATUS_INVALID);
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Echo", 0, many, false, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "32"));
}
END_TEST

// --- ends

START_TEST(failures_carry_their_sentence)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    static const char text[] = "100% wrong: \xC3\xA4\nsecond line";
    int status =
        rpc_call_unary(channel, "/t/Fail", text, strlen(text), 10 * SECOND, false, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_INVALID);
    ck_assert_str_eq(error.text, text);
    // A sentence too long for a header is cut, at a character.
    char longer[3001];
    for (int i = 0; i < 3000; i += 2)
        memcpy(longer + i, "\xC3\xA4", 3);
    struct rpc_stream *stream = ask("/t/Fail", longer, 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_INVALID);
    ck_assert_uint_eq(strlen(error.text) % 2, 0);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(unknown_methods_are_unimplemented)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    int status = rpc_call_unary(channel, "/no/Such", "", 0, 10 * SECOND, false, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_UNSUPPORTED);
    ck_assert_str_eq(error.text, "this server has no method /no/Such");
}
END_TEST

START_TEST(an_answer_before_the_message)
{
    struct error error = {0};
    struct rpc_stream *stream = open_stream("/t/Early", 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_UNAVAILABLE);
    ck_assert_str_eq(error.text, "not now");
    rpc_stream_send(stream, "late", 4); // either outcome is fine; it must return
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.messages, 0);
}
END_TEST

START_TEST(a_call_without_a_message)
{
    struct error error = {0};
    struct rpc_stream *stream = open_stream("/t/Echo", 0);
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "no request message"));
    rpc_stream_free(stream);
}
END_TEST

START_TEST(the_client_cancels_mid_stream)
{
    struct error error = {0};
    struct rpc_stream *stream = open_stream("/t/KeepChat", 0);
    ck_assert_int_eq(rpc_stream_send(stream, "x", 1), 0);
    struct rpc_call *call = take_kept();
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(rpc_call_send(call, "tick", 4), 0);
        expect_message(stream, "tick");
    }
    rpc_stream_cancel(stream);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_CANCELLED);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    ck_assert_int_eq(seen.half_closes, 0); // a cancel is not a half-close
    ck_assert_int_eq(rpc_call_send(call, "tick", 4), STATUS_CANCELLED);
    ck_assert_int_lt(rpc_stream_send(stream, "y", 1), 0);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

static void *cancel_soon(void *argument)
{
    clock_sleep_us(50000);
    rpc_stream_cancel(argument);
    return NULL;
}

START_TEST(another_thread_cancels_a_receive)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    pthread_t canceller;
    pthread_create(&canceller, NULL, cancel_soon, stream);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_CANCELLED);
    pthread_join(canceller, NULL);
    rpc_stream_free(stream);
    rpc_call_unref(take_kept());
    ck_assert(wait_counter(&seen.cancelled, 1));
}
END_TEST

START_TEST(a_stream_freed_open_is_cancelled)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    rpc_call_unref(call);
}
END_TEST

START_TEST(the_client_vanishes)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    rpc_stream_free(stream);
    rpc_channel_free(channel);
    channel = NULL;
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    rpc_call_unref(call);
}
END_TEST

START_TEST(deadlines_end_calls_on_both_sides)
{
    struct error error = {0};
    int64_t before = clock_now_us();
    struct rpc_stream *stream = ask("/t/Keep", "x", SECOND / 2);
    struct rpc_call *call = take_kept();
    ck_assert_int_gt(seen.deadline_us, before);
    ck_assert_int_lt(seen.deadline_us, clock_now_us() + SECOND);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_DEADLINE);
    ck_assert_int_ge(clock_now_us() - before, SECOND / 2 - 10000);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

START_TEST(the_server_aborts)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    rpc_call_abort(call, STATUS_UNAVAILABLE, "the pool is gone");
    rpc_call_abort(call, STATUS_INTERNAL, "the first word counts");
    ck_assert_int_eq(receive_status(stream, &error), STATUS_UNAVAILABLE);
    ck_assert_str_eq(error.text, "the pool is gone");
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 0);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

START_TEST(finish_comes_after_what_is_queued)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    for (int i = 0; i < 100; i++)
        ck_assert_int_eq(rpc_call_send(call, &(char){(char)i}, 1), 0);
    rpc_call_finish(call, STATUS_EXHAUSTED, "enough");
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    for (int i = 0; i < 100; i++) {
        uint8_t *bytes = NULL;
        size_t length = 0;
        ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 1);
        ck_assert_uint_eq(length, 1);
        ck_assert_int_eq(bytes[0], i);
        free(bytes);
    }
    ck_assert_int_eq(receive_status(stream, &error), STATUS_EXHAUSTED);
    ck_assert_str_eq(error.text, "enough");
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

// --- bounds

START_TEST(a_slow_reader_meets_the_queue_bound)
{
    setup();
    start_server("127.0.0.1:0", &(struct rpc_server_options){.max_queued = 64});
    connect_to(address, NULL);
    struct error error = {0};
    // Far more than the windows and buffers between the two hold, and nobody reads.
    struct rpc_stream *stream = ask("/t/Count", "100000 65536", 0);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.refusal, STATUS_EXHAUSTED);
    ck_assert_int_eq(seen.cancelled, 0);
    ck_assert_int_lt(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    echo_once("the connection still works");
    teardown();
}
END_TEST

START_TEST(the_queue_of_a_reader_that_catches_up)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    char block[1 << 14] = {0};
    size_t sent = 0;
    int status;
    while ((status = rpc_call_send(call, block, sizeof(block))) == STATUS_OK)
        sent++;
    ck_assert_int_eq(status, STATUS_EXHAUSTED);
    ck_assert_uint_ge(sent, 1024);
    for (size_t i = 0; i < sent; i++) {
        uint8_t *bytes = NULL;
        size_t length = 0;
        ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 1);
        ck_assert_uint_eq(length, sizeof(block));
        free(bytes);
    }
    ck_assert(wait_counter(&seen.sents, (int)sent));
    ck_assert_int_eq(rpc_call_send(call, "again", 5), STATUS_OK);
    expect_message(stream, "again");
    rpc_call_finish(call, STATUS_OK, NULL);
    ck_assert_int_eq(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

static int echo_bytes(size_t length, struct error *error)
{
    uint8_t *bytes = malloc(length), *back = NULL;
    size_t got = 0;
    for (size_t i = 0; i < length; i++)
        bytes[i] = (uint8_t)(i * 131 >> 3);
    *error = (struct error){0};
    int status = rpc_call_unary(channel, "/t/Echo", bytes, length, 30 * SECOND, false, &back, &got, error);
    if (status == 0) {
        ck_assert_uint_eq(got, length);
        ck_assert_mem_eq(bytes, back, length);
    }
    free(bytes);
    free(back);
    return status;
}

START_TEST(messages_at_the_limit_and_over)
{
    setup();
    start_server("127.0.0.1:0", &(struct rpc_server_options){.max_message_bytes = 1 << 20});
    connect_to(address, NULL);
    struct error error;
    ck_assert_int_eq(echo_bytes(1 << 20, &error), 0);
    ck_assert_int_eq(echo_bytes((1 << 20) + 1, &error), STATUS_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(error.text, "1048577"));
    rpc_channel_free(channel);
    connect_to(address, &(struct rpc_channel_options){.max_message_bytes = 1000});
    ck_assert_int_eq(echo_bytes(1000, &error), 0);
    ck_assert_int_eq(echo_bytes(1001, &error), STATUS_EXHAUSTED);
    ck_assert(wait_counter(&seen.done, 4));
    teardown();
}
END_TEST

START_TEST(calls_over_the_limit_are_refused)
{
    setup();
    start_server("127.0.0.1:0", &(struct rpc_server_options){.max_calls = 2});
    connect_to(address, NULL);
    struct rpc_stream *one = ask("/t/Keep", "1", 0), *two = ask("/t/Keep", "2", 0);
    ck_assert(wait_counter(&seen.messages, 2));
    struct error error;
    struct rpc_stream *three = open_stream("/t/Keep", 0);
    ck_assert_int_eq(receive_status(three, &error), STATUS_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(error.text, "limit of 2 calls"));
    rpc_stream_free(one);
    rpc_stream_free(two);
    rpc_stream_free(three);
    rpc_call_unref(take_kept());
    ck_assert(wait_counter(&seen.done, 2));
    echo_once("room again");
    teardown();
}
END_TEST

enum { CALLERS = 8, CALLS = 40 };

static void *call_many(void *argument)
{
    struct error error;
    for (int i = 0; i < CALLS; i++) {
        char text[64];
        snprintf(text, sizeof(text), "caller %p call %d", argument, i);
        switch (i % 4) {
        case 0:
            echo_once(text);
            break;
        case 1: {
            struct rpc_stream *stream = ask("/t/Count", "20 50", 0);
            ck_assert_int_eq(receive_status(stream, &error), 0);
            rpc_stream_free(stream);
            break;
        }
        case 2: {
            struct rpc_stream *stream = open_stream("/t/Chat", 0);
            ck_assert_int_eq(rpc_stream_send(stream, text, strlen(text)), 0);
            expect_message(stream, text);
            rpc_stream_free(stream); // cancels
            break;
        }
        default: {
            struct rpc_stream *stream = open_stream("/t/Count", 2000);
            if (rpc_stream_send(stream, "2000 50", 7) == 0)
                rpc_stream_half_close(stream);
            receive_status(stream, &error); // the deadline hits wherever it does
            rpc_stream_free(stream);
        }
        }
    }
    return NULL;
}

START_TEST(hundreds_of_calls_at_once)
{
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_many, (void *)(intptr_t)(i + 1)), 0);
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    struct rpc_stream *streams[300];
    for (int i = 0; i < 300; i++)
        streams[i] = ask("/t/Count", "10 10", 0);
    for (int i = 0; i < 300; i++) {
        struct error error;
        ck_assert_int_eq(receive_status(streams[i], &error), 0);
        rpc_stream_free(streams[i]);
    }
}
END_TEST

// --- starting and stopping

// A call that ends well while the server stops; the server's thread waits in rpc_server_stop.
static void *read_to_the_end(void *argument)
{
    struct error error = {0};
    expect_message(argument, "bye");
    ck_assert_msg(receive_status(argument, &error) == 0, "%s", error.text);
    return NULL;
}

static void *finish_soon(void *argument)
{
    struct rpc_call *call = argument;
    clock_sleep_us(100000);
    rpc_call_send(call, "bye", 3);
    rpc_call_finish(call, STATUS_OK, NULL);
    rpc_call_unref(call);
    return NULL;
}

START_TEST(stop_lets_calls_end_within_the_grace)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    pthread_t finisher, reader;
    int64_t before = clock_now_us();
    pthread_create(&reader, NULL, read_to_the_end, stream);
    pthread_create(&finisher, NULL, finish_soon, call);
    rpc_server_stop(server, 20 * SECOND);
    ck_assert_int_lt(clock_now_us() - before, 10 * SECOND);
    ck_assert_int_eq(seen.done, 1);
    ck_assert_int_eq(seen.cancelled, 0);
    pthread_join(reader, NULL);
    pthread_join(finisher, NULL);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(stop_cancels_what_outlasts_the_grace)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    int64_t before = clock_now_us();
    rpc_server_stop(server, SECOND / 5);
    ck_assert_int_ge(clock_now_us() - before, SECOND / 5 - 1000);
    ck_assert_int_eq(seen.done, 1);
    ck_assert_int_eq(seen.cancelled, 1);
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    struct error error;
    ck_assert_int_lt(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    // The record is still the holder's after the server is gone.
    rpc_server_free(server);
    server = NULL;
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    rpc_call_unref(call);
}
END_TEST

static atomic_bool quit;

static void *call_until_told(void *argument)
{
    while (!atomic_load(&quit)) {
        struct error error = {0};
        struct rpc_stream *stream = NULL;
        ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Count", SECOND, NULL, false, &error), 0);
        if (rpc_stream_send(stream, "200 100", 7) == 0)
            rpc_stream_half_close(stream);
        receive_status(stream, &error);
        rpc_stream_free(stream);
    }
    return NULL;
}

START_TEST(stop_in_the_middle_of_traffic)
{
    pthread_t threads[4];
    atomic_store(&quit, false);
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, call_until_told, NULL);
    ck_assert(wait_counter(&seen.done, 20));
    rpc_server_stop(server, 1000);
    ck_assert_int_eq(read_counter(&seen.started), read_counter(&seen.done));
    atomic_store(&quit, true);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}
END_TEST

START_TEST(servers_that_never_start)
{
    struct error error = {0};
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    rpc_server_free(server);
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    ck_assert_int_eq(rpc_server_listen(server, "127.0.0.1:0", &port, &error), 0);
    rpc_server_free(server);
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    rpc_server_stop(server, 0);
    ck_assert_int_eq(rpc_server_start(server, &error), STATUS_INVALID);
    rpc_server_free(server);
    ck_assert_int_eq(rpc_server_new(&server, &(struct rpc_server_options){.threads = 1000}, &error),
                     STATUS_INVALID);
    server = NULL;
    rpc_server_free(NULL);
    rpc_channel_free(NULL);
    rpc_stream_free(NULL);
}
END_TEST

START_TEST(a_port_in_use_is_refused)
{
    struct error error = {0};
    struct rpc_server *second = NULL;
    ck_assert_int_eq(rpc_server_new(&second, NULL, &error), 0);
    ck_assert_int_eq(rpc_server_listen(second, address, NULL, &error), STATUS_UNAVAILABLE);
    char expected[200];
    snprintf(expected, sizeof(expected), "cannot listen on %s: Address already in use", address);
    ck_assert_str_eq(error.text, expected);
    ck_assert_int_eq(rpc_server_listen(server, "127.0.0.1:0", NULL, &error), STATUS_INVALID); // it runs
    rpc_server_free(second);
    echo_once("the first one is unharmed");
}
END_TEST

START_TEST(a_unix_socket_in_use_is_refused)
{
    char path[] = "/tmp/strata_rpc_XXXXXX", listen[128], file[128];
    ck_assert_ptr_nonnull(mkdtemp(path));
    snprintf(listen, sizeof(listen), "unix:%s/socket", path);
    snprintf(file, sizeof(file), "unix:%s/file", path);
    start_server(listen, NULL);
    connect_to(address, NULL);
    struct error error = {0};
    struct rpc_server *second = NULL;
    ck_assert_int_eq(rpc_server_new(&second, NULL, &error), 0);
    ck_assert_int_eq(rpc_server_listen(second, listen, NULL, &error), STATUS_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(error.text, "another process listens there"));
    FILE *plain = fopen(file + 5, "w");
    fclose(plain);
    ck_assert_int_eq(rpc_server_listen(second, file, NULL, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "not a socket"));
    unlink(file + 5);
    ck_assert_int_eq(rpc_server_listen(second, "unix:/no/such/folder/socket", NULL, &error),
                     STATUS_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(error.text, "No such file or directory"));
    rpc_server_free(second);
    echo_once("still there");
    rpc_server_free(server);
    // A socket nobody answers on any more is in nobody's way.
    int stale = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    snprintf(at.sun_path, sizeof(at.sun_path), "%.100s", listen + 5);
    ck_assert_int_eq(bind(stale, (struct sockaddr *)&at, sizeof(at)), 0);
    close(stale);
    start_server(listen, NULL);
    rpc_server_free(server);
    server = NULL;
    rmdir(path);
}
END_TEST

START_TEST(bad_addresses_are_refused)
{
    static const char *const bad[] = {"",
                                      "127.0.0.1",
                                      "127.0.0.1:",
                                      "127.0.0.1:http",
                                      "127.0.0.1:65536",
                                      "127.0.0.1:-1",
                                      ":50051",
                                      "::1:50051",
                                      "[::1]",
                                      "[]:1",
                                      "[::1]50051",
                                      "unix:",
                                      "127.0.0.1:1 2",
                                      "http://127.0.0.1:1"};
    struct error error;
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        error = (struct error){0};
        ck_assert_msg(rpc_server_listen(server, bad[i], &port, &error) == STATUS_INVALID, "%s", bad[i]);
        ck_assert_int_gt(strlen(error.text), 10);
        ck_assert_msg(rpc_channel_new(&channel, bad[i], NULL, &error) == STATUS_INVALID, "%s", bad[i]);
    }
    char deep[300] = "unix:/";
    memset(deep + 6, 'x', 200);
    ck_assert_int_eq(rpc_server_listen(server, deep, &port, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "201"));
    ck_assert_int_lt(rpc_server_listen(server, "no-such-host.invalid:1", &port, &error), 0);
    ck_assert_int_lt(rpc_server_listen(server, "192.0.2.1:0", &port, &error), 0); // nobody's
    ck_assert_ptr_nonnull(strstr(error.text, "192.0.2.1:0"));
    channel = NULL;
}
END_TEST

// A port that was free a moment ago.
static int free_port(void)
{
    int probe = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof(at);
    ck_assert_int_eq(bind(probe, (struct sockaddr *)&at, sizeof(at)), 0);
    ck_assert_int_eq(getsockname(probe, (struct sockaddr *)&at, &length), 0);
    close(probe);
    return ntohs(at.sin_port);
}

START_TEST(a_client_to_nowhere)
{
    char nowhere[64];
    snprintf(nowhere, sizeof(nowhere), "127.0.0.1:%d", free_port());
    connect_to(nowhere, NULL);
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    int64_t before = clock_now_us();
    int status = rpc_call_unary(channel, "/t/Echo", "x", 1, 20 * SECOND, false, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(error.text, "Connection refused"));
    ck_assert_int_lt(clock_now_us() - before, 10 * SECOND);
    // wait_for_ready keeps trying until the deadline,
    status = rpc_call_unary(channel, "/t/Echo", "x", 1, SECOND / 2, true, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_DEADLINE);
    // and a stream that waits so can be given up.
    struct rpc_stream *stream = NULL;
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Chat", 0, NULL, true, &error), 0);
    pthread_t canceller;
    pthread_create(&canceller, NULL, cancel_soon, stream);
    ck_assert_int_lt(rpc_stream_send(stream, "x", 1), 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_CANCELLED);
    pthread_join(canceller, NULL);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(a_server_that_comes_later)
{
    char later[64];
    snprintf(later, sizeof(later), "127.0.0.1:%d", free_port());
    connect_to(later, NULL);
    struct error error = {0};
    struct rpc_stream *stream = NULL;
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Chat", 20 * SECOND, NULL, true, &error), 0);
    clock_sleep_us(SECOND / 4);
    start_server(later, NULL);
    ck_assert_int_eq(rpc_stream_send(stream, "patience", 8), 0);
    expect_message(stream, "patience");
    // The server goes while the stream is open: the client learns it.
    rpc_server_stop(server, 0);
    ck_assert_int_lt(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(tls_files_are_checked)
{
    struct error error = {0};
    struct rpc_server_options half = {.tls_cert = "/no/such.pem"};
    ck_assert_int_eq(rpc_server_new(&server, &half, &error), STATUS_INVALID);
    struct rpc_server_options missing = {.tls_cert = "/no/such.pem", .tls_key = "/no/such.key"};
    ck_assert_int_eq(rpc_server_new(&server, &missing, &error), STATUS_IO);
    ck_assert_ptr_nonnull(strstr(error.text, "/no/such.pem"));
    struct rpc_server_options wrong = {.tls_cert = "/proc/self/cmdline", .tls_key = "/proc/self/cmdline"};
    ck_assert_int_eq(rpc_server_new(&server, &wrong, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "not a PEM file"));
    struct rpc_channel_options lonely = {.tls_key = "/no/such.key"};
    ck_assert_int_eq(rpc_channel_new(&channel, "127.0.0.1:1", &lonely, &error), STATUS_INVALID);
    struct rpc_channel_options gone = {.tls_ca = "/no/such.pem"};
    ck_assert_int_eq(rpc_channel_new(&channel, "127.0.0.1:1", &gone, &error), STATUS_IO);
    server = NULL;
    channel = NULL;
}
END_TEST

START_TEST(tls_calls)
{
    char folder[] = "/tmp/strata_tls_XXXXXX", command[600], cert[64], key[64];
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(cert, sizeof(cert), "%s/cert.pem", folder);
    snprintf(key, sizeof(key), "%s/key.pem", folder);
    snprintf(command, sizeof(command),
             "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext "
             "subjectAltName=IP:127.0.0.1 "
             "-keyout %s -out %s 2>/dev/null",
             key, cert);
    bool made = system(command) == 0;
    if (made) {
        start_server("127.0.0.1:0",
                     &(struct rpc_server_options){.tls_cert = cert, .tls_key = key, .tls_ca = cert});
        connect_to(address, &(struct rpc_channel_options){.tls_ca = cert, .tls_cert = cert, .tls_key = key});
        echo_once("secret");
        rpc_channel_free(channel);
        struct error error = {0};
        uint8_t *bytes = NULL;
        size_t length = 0;
        connect_to(address, &(struct rpc_channel_options){.tls_ca = cert}); // no certificate of its own
        ck_assert_int_lt(
            rpc_call_unary(channel, "/t/Echo", "x", 1, 5 * SECOND, false, &bytes, &length, &error), 0);
        rpc_channel_free(channel);
        connect_to(address, NULL); // plaintext
        ck_assert_int_lt(
            rpc_call_unary(channel, "/t/Echo", "x", 1, 5 * SECOND, false, &bytes, &length, &error), 0);
    }
    unlink(cert);
    unlink(key);
    rmdir(folder);
}
END_TEST

START_TEST(status_codes_go_there_and_back)
{
    static const int same[] = {STATUS_OK,          STATUS_INVALID,  STATUS_NOT_FOUND,      STATUS_EXHAUSTED,
                               STATUS_UNAVAILABLE, STATUS_CORRUPT,  STATUS_UNSUPPORTED,    STATUS_CANCELLED,
                               STATUS_DEADLINE,    STATUS_INTERNAL, STATUS_UNAUTHENTICATED};
    for (size_t i = 0; i < sizeof(same) / sizeof(same[0]); i++)
        ck_assert_int_eq(rpc_status_from_grpc(rpc_status_to_grpc(same[i])), same[i]);
    ck_assert_int_eq(rpc_status_to_grpc(STATUS_INVALID), 3);
    ck_assert_int_eq(rpc_status_to_grpc(STATUS_NO_MEMORY), 8);
    ck_assert_int_eq(rpc_status_to_grpc(STATUS_IO), 13);
    ck_assert_int_eq(rpc_status_to_grpc(-999), 13);
    for (int code = 0; code <= 20; code++)
        ck_assert_int_le(rpc_status_from_grpc(code), 0);
    ck_assert_int_eq(rpc_status_from_grpc(2), STATUS_INTERNAL);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("rpc");
    TCase *calls = tcase_create("calls");
    tcase_add_checked_fixture(calls, setup_loopback, teardown);
    tcase_set_timeout(calls, 60);
    tcase_add_test(calls, unary);
    tcase_add_test(calls, server_stream);
    tcase_add_test(calls, bidi);
    tcase_add_test(calls, bidi_with_a_sender_beside_a_receiver);
    tcase_add_test(calls, metadata_both_ways);
    tcase_add_test(calls, bad_metadata_is_refused_by_the_client);
    tcase_add_test(calls, failures_carry_their_sentence);
    tcase_add_test(calls, unknown_methods_are_unimplemented);
    tcase_add_test(calls, an_answer_before_the_message);
    tcase_add_test(calls, a_call_without_a_message);
    tcase_add_test(calls, the_client_cancels_mid_stream);
    tcase_add_test(calls, another_thread_cancels_a_receive);
    tcase_add_test(calls, a_stream_freed_open_is_cancelled);
    tcase_add_test(calls, the_client_vanishes);
    tcase_add_test(calls, deadlines_end_calls_on_both_sides);
    tcase_add_test(calls, the_server_aborts);
    tcase_add_test(calls, finish_comes_after_what_is_queued);
    tcase_add_test(calls, the_queue_of_a_reader_that_catches_up);
    tcase_add_test(calls, hundreds_of_calls_at_once);
    tcase_add_test(calls, stop_lets_calls_end_within_the_grace);
    tcase_add_test(calls, stop_cancels_what_outlasts_the_grace);
    tcase_add_test(calls, stop_in_the_middle_of_traffic);
    tcase_add_test(calls, a_port_in_use_is_refused);
    suite_add_tcase(suite, calls);
    TCase *ends = tcase_create("ends");
    tcase_add_checked_fixture(ends, setup, teardown);
    tcase_set_timeout(ends, 60);
    tcase_add_test(ends, unary_over_unix_and_v6);
    tcase_add_test(ends, servers_that_never_start);
    tcase_add_test(ends, a_unix_socket_in_use_is_refused);
    tcase_add_test(ends, bad_addresses_are_refused);
    tcase_add_test(ends, a_client_to_nowhere);
    tcase_add_test(ends, a_server_that_comes_later);
    tcase_add_test(ends, tls_files_are_checked);
    tcase_add_test(ends, tls_calls);
    suite_add_tcase(suite, ends);
    TCase *bounds = tcase_create("bounds");
    tcase_set_timeout(bounds, 60);
    tcase_add_test(bounds, a_slow_reader_meets_the_queue_bound);
    tcase_add_test(bounds, messages_at_the_limit_and_over);
    tcase_add_test(bounds, calls_over_the_limit_are_refused);
    tcase_add_test(bounds, status_codes_go_there_and_back);
    suite_add_tcase(suite, bounds);
    return suite;
}
