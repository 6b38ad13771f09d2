// The fake workers and the pump behind pool_fixture.h.
#include "tests/pool_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "tests/model_writer.h"
#include "tests/suite.h"

struct worker_pool *pool;
static struct rpc_server *server;
static struct queue *bell;
static unsigned char *file;
struct gguf *gguf;
struct model_spec spec;
static char address[64];
struct worker_pool_event seen[MAX_SEEN];
char seen_text[MAX_SEEN][512];
uint32_t n_seen;
void (*on_event)(const struct worker_pool_event *event);

static void *read_all(void *context)
{
    struct fake *fake = context;
    struct error error;
    uint8_t *bytes;
    size_t length;
    struct arena arena = {0};
    struct step_plan plan;
    step_plan_init(&plan);
    while (rpc_stream_receive(fake->stream, &bytes, &length, &error) == 1) {
        struct wire_coordinator_message message = {.plan = &plan};
        arena_reset(&arena);
        step_plan_clear(&plan);
        ck_assert_int_eq(wire_decode_coordinator_message(&message, bytes, length, &arena, &error), 0);
        free(bytes);
        pthread_mutex_lock(&fake->mutex);
        if (message.kind != WIRE_COORDINATOR_HEARTBEAT && fake->n_heard < MAX_HEARD) {
            struct heard *heard = &fake->heard[fake->n_heard++];
            const char *text = message.kind == WIRE_CONNECT ? message.next_address : message.text;
            snprintf(heard->text, sizeof(heard->text), "%s", text ? text : "");
            snprintf(heard->id, sizeof(heard->id), "%.*s", (int)message.previous_id.length,
                     message.previous_id.length ? message.previous_id.data : "");
            heard->message = message;
            heard->step = message.kind == WIRE_STEP ? plan.number : 0;
            heard->rows = message.kind == WIRE_STEP ? plan.n_rows : 0;
        }
        pthread_mutex_unlock(&fake->mutex);
    }
    pthread_mutex_lock(&fake->mutex);
    fake->over = true;
    pthread_mutex_unlock(&fake->mutex);
    step_plan_free(&plan);
    arena_free(&arena);
    return NULL;
}

struct fake *fake_dial(const char *name)
{
    struct fake *fake = calloc(1, sizeof(*fake));
    struct error error = {0};
    snprintf(fake->name, sizeof(fake->name), "%s", name);
    pthread_mutex_init(&fake->mutex, NULL);
    ck_assert_int_eq(rpc_channel_new(&fake->channel, address, NULL, &error), 0);
    ck_assert_int_eq(
        rpc_stream_open(&fake->stream, fake->channel, "/strata.v1.Pool/Join", 0, NULL, true, &error), 0);
    ck_assert_int_eq(pthread_create(&fake->reader, NULL, read_all, fake), 0);
    fake->reading = true;
    return fake;
}

void fake_say(struct fake *fake, const struct wire_worker_message *message)
{
    struct wire_bytes bytes = {0};
    ck_assert_int_eq(wire_encode_worker_message(&bytes, message), 0);
    rpc_stream_send(fake->stream, bytes.data, bytes.length); // the coordinator may have hung up
    wire_bytes_free(&bytes);
}

struct wire_worker_message hello_of(struct fake *fake)
{
    static char link[64];
    snprintf(link, sizeof(link), "unix:/%s", fake->name);
    return (struct wire_worker_message){.kind = WIRE_HELLO,
                                        .worker = fake->name,
                                        .protocol = WIRE_POOL_PROTOCOL,
                                        .fingerprint = gguf_fingerprint(gguf),
                                        .backend = "cpu",
                                        .device = "a fake device",
                                        .level = 2,
                                        .memory_free = 1 << 30,
                                        .link_address = link,
                                        .threads = 1,
                                        .pid = 1,
                                        .host = fake->name};
}

struct fake *fake_join(const char *name)
{
    struct fake *fake = fake_dial(name);
    struct wire_worker_message hello = hello_of(fake);
    fake_say(fake, &hello);
    return fake;
}

void fake_leave(struct fake *fake)
{
    if (!fake)
        return;
    rpc_stream_cancel(fake->stream);
    pthread_join(fake->reader, NULL);
    rpc_stream_free(fake->stream);
    rpc_channel_free(fake->channel);
    pthread_mutex_destroy(&fake->mutex);
    free(fake);
}

// --- driving the pool ---

void pump_once(void)
{
    struct worker_pool_event event;
    char stroke;
    while (worker_pool_next_event(pool, clock_now_us(), &event)) {
        if (on_event)
            on_event(&event);
        ck_assert_uint_lt(n_seen, MAX_SEEN);
        seen[n_seen] = event;
        snprintf(seen_text[n_seen], sizeof(seen_text[0]), "%s", event.text ? event.text : "");
        n_seen++;
    }
    queue_pop(bell, &stroke, 2000);
}

// The fake's next message, which must be of this kind.
struct heard fake_expect(struct fake *fake, enum wire_coordinator_kind kind)
{
    struct heard heard = {0};
    for (int64_t until = clock_now_us() + PATIENCE_US;;) {
        pump_once();
        pthread_mutex_lock(&fake->mutex);
        bool there = fake->n_taken < fake->n_heard;
        if (there)
            heard = fake->heard[fake->n_taken++];
        bool over = fake->over;
        pthread_mutex_unlock(&fake->mutex);
        if (there)
            break;
        ck_assert_msg(!over, "%s was hung up on before message %d", fake->name, (int)kind);
        ck_assert_msg(clock_now_us() < until, "%s never got message %d", fake->name, (int)kind);
    }
    ck_assert_msg(heard.message.kind == kind, "%s got message %d (%s), not %d", fake->name,
                  (int)heard.message.kind, heard.text, (int)kind);
    return heard;
}

void fake_expect_end(struct fake *fake)
{
    bool over = false;
    for (int64_t until = clock_now_us() + PATIENCE_US; !over;) {
        pump_once();
        pthread_mutex_lock(&fake->mutex);
        over = fake->over;
        pthread_mutex_unlock(&fake->mutex);
        ck_assert_msg(clock_now_us() < until, "%s was never hung up on", fake->name);
    }
}

uint32_t expect_event(enum worker_pool_event_kind kind)
{
    for (int64_t until = clock_now_us() + PATIENCE_US;;) {
        for (uint32_t i = 0; i < n_seen; i++) {
            if (seen[i].kind == kind)
                return i;
        }
        ck_assert_msg(clock_now_us() < until, "event %d never came", (int)kind);
        pump_once();
    }
}

struct wire_pool expect_state(enum wire_pool_state state)
{
    struct wire_pool picture = {0};
    for (int64_t until = clock_now_us() + PATIENCE_US;;) {
        pump_once();
        worker_pool_describe(pool, &picture);
        if (picture.state == state)
            return picture;
        ck_assert_msg(clock_now_us() < until, "the pool is in state %d (%s), not %d", (int)picture.state,
                      picture.problem, (int)state);
    }
}

void pump_for(int64_t us)
{
    for (int64_t until = clock_now_us() + us; clock_now_us() < until;)
        pump_once();
}

void open_pool(struct worker_pool_options options)
{
    open_pool_of(model_shape_small("llama").layers, options);
}

void open_pool_of(uint32_t layers, struct worker_pool_options options)
{
    struct gguf_writer writer = {0};
    struct model_shape shape = model_shape_small("llama");
    struct error error = {0};
    size_t length;
    int port;
    shape.layers = layers;
    model_writer_add(&writer, &shape);
    file = gguf_writer_finish(&writer, &length);
    ck_assert_int_eq(gguf_open_memory(&gguf, file, length, &error), 0);
    ck_assert_msg(model_spec_read(&spec, gguf, &error) == 0, "%s", error.text);
    queue_new(&bell, 1, 1);
    options.spec = &spec;
    options.gguf = gguf;
    options.bell = bell;
    options.n_slots = 4;
    options.context = 128;
    options.max_positions = 64;
    log_init("test", LOG_ERROR, 0);
    rpc_library_init();
    ck_assert_msg(worker_pool_new(&pool, &options, &error) == 0, "%s", error.text);
    ck_assert_int_eq(rpc_server_new(&server, &(struct rpc_server_options){0}, &error), 0);
    ck_assert_msg(rpc_server_listen(server, "127.0.0.1:0", &port, &error) == 0, "%s", error.text);
    ck_assert_int_eq(worker_pool_attach(pool, server), 0);
    ck_assert_int_eq(rpc_server_start(server, &error), 0);
    snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    n_seen = 0;
    on_event = NULL;
}

void close_pool(void)
{
    rpc_server_stop(server, 0);
    rpc_server_free(server);
    worker_pool_free(pool);
    queue_free(bell);
    gguf_close(gguf);
    free(file);
    rpc_library_shutdown();
}

// Brings fakes[s] through stage s. Returns the epoch.
uint64_t serve(struct fake *const fakes[], uint32_t n)
{
    uint64_t epoch = 0;
    n_seen = 0;
    for (uint32_t s = 0; s < n; s++) {
        struct heard assign = fake_expect(fakes[s], WIRE_ASSIGN);
        ck_assert_uint_eq(assign.message.stage, s);
        epoch = assign.message.epoch;
        fake_say(fakes[s], &(struct wire_worker_message){.kind = WIRE_LOADED,
                                                         .epoch = epoch,
                                                         .weight_bytes = 1000,
                                                         .kv_bytes = 500,
                                                         .source_bytes = 900,
                                                         .n_weights = 9});
    }
    for (uint32_t s = 0; s < n; s++) {
        fake_expect(fakes[s], WIRE_CONNECT);
        fake_say(fakes[s], &(struct wire_worker_message){.kind = WIRE_LINKED, .epoch = epoch});
    }
    ck_assert_uint_eq(seen[expect_event(WORKER_POOL_READY)].epoch, epoch);
    return epoch;
}
