// The played coordinator and the two wrapped functions behind worker_fixture.h.
#include "tests/worker_fixture.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/rpc_server.h"
#include "kernels/device.h"
#include "tests/ops/engine_driver.h"
#include "tests/suite.h"
#include "worker/executor.h"

enum { MAX_JOINS = 16, CONTEXT = 256 };

struct join {
    struct rpc_call *call;
    struct parcel {
        struct parcel *next;
        size_t length;
        uint8_t bytes[];
    } * first, *last;
    bool done;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct join joins[MAX_JOINS];
int n_joins;
static struct rpc_server *server;
static int port;
static char address[64];
char model[1024];
static struct arena arena;
static struct step_result result;
struct error error;

// --- the wrapped functions ---

atomic_uint patience;
int __real_executor_finish(struct executor *executor, struct step_result *to, bool wait, struct error *why);
int __wrap_executor_finish(struct executor *executor, struct step_result *to, bool wait, struct error *why);

int __wrap_executor_finish(struct executor *executor, struct step_result *to, bool wait, struct error *why)
{
    static _Thread_local unsigned asked;
    if (!wait && asked++ < atomic_load(&patience))
        return EXECUTOR_PENDING;
    asked = 0;
    return __real_executor_finish(executor, to, wait, why);
}

atomic_bool broken;
bool __wrap_device_broken(const struct device *device);

bool __wrap_device_broken(const struct device *device)
{
    return atomic_load(&broken);
}

// --- the coordinator's side ---

static void on_start(struct rpc_call *call, void *service)
{
    pthread_mutex_lock(&mutex);
    ck_assert_int_lt(n_joins, MAX_JOINS);
    joins[n_joins] = (struct join){.call = call};
    rpc_call_ref(call);
    rpc_call_set_context(call, &joins[n_joins++]);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

static void on_message(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    struct join *join = rpc_call_context(call);
    struct parcel *parcel = malloc(sizeof(*parcel) + length);
    parcel->next = NULL;
    parcel->length = length;
    memcpy(parcel->bytes, bytes, length);
    pthread_mutex_lock(&mutex);
    *(join->last ? &join->last->next : &join->first) = parcel;
    join->last = parcel;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

atomic_bool deaf;

static void on_half_close(struct rpc_call *call, void *service)
{
    if (!atomic_load(&deaf))
        rpc_call_finish(call, STATUS_OK, "");
}

static void on_done(struct rpc_call *call, void *service, bool cancelled)
{
    pthread_mutex_lock(&mutex);
    ((struct join *)rpc_call_context(call))->done = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

static void wait_a_little(void)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 50000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&changed, &mutex, &until);
}

void start_coordinator(void)
{
    static const struct rpc_method method = {.path = "/strata.v1.Pool/Join",
                                             .client_streaming = true,
                                             .on_start = on_start,
                                             .on_message = on_message,
                                             .on_half_close = on_half_close,
                                             .on_done = on_done};
    struct rpc_server_options options = {.max_message_bytes = MAX_POOL_MESSAGE_BYTES};
    char listen[64];
    snprintf(listen, sizeof(listen), "127.0.0.1:%d", port);
    ck_assert_int_eq(rpc_server_new(&server, &options, &error), 0);
    ck_assert_msg(rpc_server_listen(server, listen, &port, &error) == 0, "%s", error.text);
    ck_assert_int_eq(rpc_server_add(server, &method, NULL), 0);
    ck_assert_int_eq(rpc_server_start(server, &error), 0);
    if (address[0] == '\0') // workers read it
        snprintf(address, sizeof(address), "127.0.0.1:%d", port);
}

void stop_coordinator(void)
{
    rpc_server_stop(server, 0);
    for (int i = 0; i < n_joins; i++) {
        for (struct parcel *p = joins[i].first, *next; p; p = next) {
            next = p->next;
            free(p);
        }
        rpc_call_unref(joins[i].call);
    }
    memset(joins, 0, sizeof(joins));
    n_joins = 0;
    rpc_server_free(server);
    server = NULL;
}

struct join *next_join(int index)
{
    int64_t deadline = clock_now_us() + 30 * SECOND;
    pthread_mutex_lock(&mutex);
    while (n_joins <= index && clock_now_us() < deadline)
        wait_a_little();
    ck_assert_int_gt(n_joins, index);
    pthread_mutex_unlock(&mutex);
    return &joins[index];
}

void hang_up(struct join *join)
{
    rpc_call_abort(join->call, STATUS_UNAVAILABLE, "the test hangs up");
}

static struct parcel *take(struct join *join, int64_t deadline)
{
    pthread_mutex_lock(&mutex);
    while (!join->first && !join->done && clock_now_us() < deadline)
        wait_a_little();
    struct parcel *parcel = join->first;
    if (parcel) {
        join->first = parcel->next;
        join->last = join->first ? join->last : NULL;
    }
    pthread_mutex_unlock(&mutex);
    return parcel;
}

struct wire_worker_message expect(struct join *join, enum wire_worker_kind kind)
{
    int64_t deadline = clock_now_us() + 30 * SECOND;
    for (;;) {
        struct parcel *parcel = take(join, deadline);
        ck_assert_msg(parcel != NULL, "no message of kind %d came", kind);
        struct wire_worker_message message = {.result = &result};
        int status = wire_decode_worker_message(&message, parcel->bytes, parcel->length, &arena, &error);
        free(parcel);
        ck_assert_msg(status == 0, "%s", error.text);
        if (message.kind == kind)
            return message;
        ck_assert_msg(message.kind == WIRE_HEARTBEAT || message.kind == WIRE_PROGRESS,
                      "kind %d came, expected %d: %s", message.kind, kind, message.text ? message.text : "");
    }
}

void tell(struct join *join, const struct wire_coordinator_message *message)
{
    struct wire_bytes bytes = {0};
    ck_assert_int_eq(wire_encode_coordinator_message(&bytes, message), 0);
    rpc_call_send(join->call, bytes.data, bytes.length);
    wire_bytes_free(&bytes);
}

void tell_nonsense(struct join *join)
{
    rpc_call_send(join->call, "\xff\xff\xff\xff\xff", 5);
}

struct wire_coordinator_message assignment(uint64_t epoch, uint32_t stage, uint32_t n_stages)
{
    uint32_t first = stage == 0 ? 0 : 2; // two layers and one
    return (struct wire_coordinator_message){.kind = WIRE_ASSIGN,
                                             .epoch = epoch,
                                             .stage = stage,
                                             .n_stages = n_stages,
                                             .first_layer = first,
                                             .n_layers = n_stages == 1 ? LAYERS
                                                         : stage == 0  ? 2
                                                                       : 1,
                                             .n_slots = 4,
                                             .n_pages = 16,
                                             .context = CONTEXT,
                                             .max_positions = 64,
                                             .level = device_best_level("cpu", 0)};
}

struct wire_worker_message load(struct join *join, uint64_t epoch, uint32_t stage, uint32_t n_stages)
{
    struct wire_coordinator_message assign = assignment(epoch, stage, n_stages);
    tell(join, &assign);
    struct wire_worker_message loaded = expect(join, WIRE_LOADED);
    ck_assert_uint_eq(loaded.epoch, epoch);
    return loaded;
}

void link_to(struct join *join, uint64_t epoch, const char *next)
{
    tell(join,
         &(struct wire_coordinator_message){.kind = WIRE_CONNECT, .epoch = epoch, .next_address = next});
}

void link_alone(struct join *join, uint64_t epoch)
{
    link_to(join, epoch, "");
    ck_assert_uint_eq(expect(join, WIRE_LINKED).epoch, epoch);
}

void abort_epoch(struct join *join, uint64_t epoch)
{
    tell(join, &(struct wire_coordinator_message){
                   .kind = WIRE_ABORT, .epoch = epoch, .status = STATUS_UNAVAILABLE, .text = "a test"});
}

void send_step(struct join *const *stages, int n, uint64_t epoch, uint64_t number)
{
    struct step_plan plan;
    step_plan_init(&plan);
    plan.epoch = epoch;
    plan.number = number;
    uint32_t page = 3;
    if (number == 0) {
        struct step_command *open = step_plan_add_command(&plan, STEP_OPEN, 0);
        open->sampling = SAMPLING_DEFAULTS;
        open->sampling.temperature = 0;
        struct step_command *pages = step_plan_add_command(&plan, STEP_PAGES, 0);
        pages->pages_first = (uint32_t)step_plan_add_pages(&plan, &page, 1);
        pages->pages_count = 1;
    }
    struct step_row *row = step_plan_add_row(&plan);
    row->count = number == 0 ? 10 : 1;
    row->position = number == 0 ? 0 : 9 + (uint32_t)number;
    row->draws = 1;
    row->logits = STEP_LOGITS_LAST;
    row->generated = row->from_sample = number > 0;
    row->source_step = number - (number > 0);
    for (int32_t token = 20; number == 0 && token < 30; token++)
        step_plan_add_tokens(&plan, &token, 1);
    for (int i = 0; i < n; i++)
        tell(stages[i], &(struct wire_coordinator_message){.kind = WIRE_STEP, .epoch = epoch, .plan = &plan});
    step_plan_free(&plan);
}

int32_t expect_token(struct join *last, uint64_t epoch, uint64_t number)
{
    expect(last, WIRE_RESULT);
    ck_assert_uint_eq(result.epoch, epoch);
    ck_assert_uint_eq(result.number, number);
    ck_assert_uint_eq(result.n_samples, 1);
    return result.samples[0].token;
}

// --- workers ---

static void *run_worker(void *argument)
{
    struct running *running = argument;
    running->status = worker_run(running->worker, &running->error);
    return NULL;
}

struct worker_options defaults(void)
{
    return (struct worker_options){.model = model,
                                   .coordinator = address,
                                   .listen_link = "127.0.0.1:0",
                                   .device = {.threads = 1},
                                   .link_timeout_us = 20 * SECOND};
}

struct running start_worker(const struct worker_options *options, const char *name)
{
    struct running running = {0};
    struct worker_options named = *options;
    named.name = name;
    ck_assert_msg(worker_new(&running.worker, &named, &error) == 0, "%s", error.text);
    return running;
}

void run_in_thread(struct running *running)
{
    pthread_create(&running->thread, NULL, run_worker, running);
}

int wait_worker(struct running *running)
{
    pthread_join(running->thread, NULL);
    worker_free(running->worker);
    return running->status;
}

void end_worker(struct running *running)
{
    int64_t start = clock_now_us();
    worker_stop(running->worker);
    ck_assert_int_eq(wait_worker(running), 0);
    ck_assert_int_lt(clock_now_us() - start, 10 * SECOND);
}

void link_pair(struct running pair[2], struct join *stages[2], uint64_t epoch)
{
    struct worker_options options = defaults();
    char links[2][128];
    const char *names[2] = {"first", "second"};
    for (int i = 0; i < 2; i++) {
        pair[i] = start_worker(&options, names[i]);
        run_in_thread(&pair[i]);
        stages[i] = next_join(i);
        snprintf(links[i], sizeof(links[i]), "%s", expect(stages[i], WIRE_HELLO).link_address);
        load(stages[i], epoch, (uint32_t)i, 2);
    }
    link_to(stages[0], epoch, links[1]);
    link_to(stages[1], epoch, links[0]);
    expect(stages[0], WIRE_LINKED);
    expect(stages[1], WIRE_LINKED);
}

void worker_fixture_set_up(void)
{
    const int32_t token = 1;
    double *logits;
    size_t count;
    ck_assert_msg(
        engine_oracle(
            "arch=llama mix=q8_0 layers=3 vocab_size=300 embd=256 heads=4 kv_heads=2 ffn=256 context=512",
            &token, 1, model, sizeof(model), &logits, &count),
        "the generator needs a python3 with numpy");
    free(logits);
    port = 0;
    address[0] = '\0';
    step_result_init(&result);
    start_coordinator();
}

void worker_fixture_tear_down(void)
{
    stop_coordinator();
    step_result_free(&result);
    arena_free(&arena);
}
