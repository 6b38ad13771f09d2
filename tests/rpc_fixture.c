// The recording service: methods that echo, count, keep, fail and answer early, with a guard in each call's
// context that notices overlapping callbacks and callbacks after on_done. Callbacks run on the server's
// threads; what they see is counted under one mutex.
#include "tests/rpc_fixture.h"

#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"

struct seen seen;
struct rpc_server *server;
struct rpc_channel *channel;
int port;
char address[128];

static void note(int *counter)
{
    pthread_mutex_lock(&seen.mutex);
    (*counter)++;
    pthread_cond_broadcast(&seen.changed);
    pthread_mutex_unlock(&seen.mutex);
}

int read_counter(const int *counter)
{
    pthread_mutex_lock(&seen.mutex);
    int value = *counter;
    pthread_mutex_unlock(&seen.mutex);
    return value;
}

// True when the counter reaches `value` within ten seconds.
bool wait_counter(const int *counter, int value)
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

void start_server(const char *listen, const struct rpc_server_options *options)
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

void connect_to(const char *to, const struct rpc_channel_options *options)
{
    struct error error = {0};
    ck_assert_msg(rpc_channel_new(&channel, to, options, &error) == 0, "%s", error.text);
}

void rpc_fixture_set_up(void)
{
    memset(&seen, 0, sizeof(seen));
    pthread_mutex_init(&seen.mutex, NULL);
    pthread_cond_init(&seen.changed, NULL);
    rpc_library_init();
    server = NULL;
    channel = NULL;
}

void rpc_fixture_tear_down(void)
{
    rpc_channel_free(channel);
    rpc_server_free(server);
    rpc_library_shutdown();
    ck_assert_int_eq(seen.after_done, 0);
    ck_assert_int_eq(seen.overlaps, 0);
    ck_assert_int_eq(seen.started, seen.done);
}

void rpc_fixture_set_up_loopback(void)
{
    rpc_fixture_set_up();
    start_server("127.0.0.1:0", NULL);
    connect_to(address, NULL);
}

struct rpc_stream *open_stream(const char *path, int64_t timeout_us)
{
    struct error error = {0};
    struct rpc_stream *stream = NULL;
    ck_assert_msg(rpc_stream_open(&stream, channel, path, timeout_us, NULL, false, &error) == 0, "%s",
                  error.text);
    return stream;
}

struct rpc_stream *ask(const char *path, const char *request, int64_t timeout_us)
{
    struct rpc_stream *stream = open_stream(path, timeout_us);
    ck_assert_int_eq(rpc_stream_send(stream, request, strlen(request)), 0);
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    return stream;
}

// The kept call, once the service has it. The reference is the caller's.
struct rpc_call *take_kept(void)
{
    ck_assert(wait_counter(&seen.messages, 1));
    pthread_mutex_lock(&seen.mutex);
    struct rpc_call *call = seen.kept;
    pthread_mutex_unlock(&seen.mutex);
    ck_assert_ptr_nonnull(call);
    return call;
}

int receive_status(struct rpc_stream *stream, struct error *error)
{
    uint8_t *bytes = NULL;
    size_t length = 0;
    *error = (struct error){0};
    int status;
    while ((status = rpc_stream_receive(stream, &bytes, &length, error)) == 1)
        free(bytes);
    return status;
}

void expect_message(struct rpc_stream *stream, const char *text)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    ck_assert_msg(rpc_stream_receive(stream, &bytes, &length, &error) == 1, "%s", error.text);
    ck_assert_uint_eq(length, strlen(text));
    ck_assert_mem_eq(bytes, text, length);
    free(bytes);
}

void echo_once(const char *text)
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

void *cancel_soon(void *argument)
{
    clock_sleep_us(50000);
    rpc_stream_cancel(argument);
    return NULL;
}
