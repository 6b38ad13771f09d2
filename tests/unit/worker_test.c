// Workers against a coordinator that the test plays: joining, loading, linking, steps, and every way for an
// epoch, a stream or a worker to end. Whole workers with their threads, in this process, over loopback.
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/gguf.h"
#include "common/log.h"
#include "common/rpc_server.h"
#include "kernels/device.h"
#include "proto/wire.h"
#include "tests/ops/engine_driver.h"
#include "tests/suite.h"
#include "worker/executor.h"
#include "worker/worker.h"

enum { SECOND = 1000000, MAX_JOINS = 16, VOCAB = 300, CONTEXT = 256, LAYERS = 3 };

// One Join call, as the coordinator sees it.
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
static int n_joins;
static struct rpc_server *server;
static int port;
static char address[64], model[1024];
static struct arena arena;
static struct step_result result;
static struct error error;

// --- a slow device ---

// The linker puts this in front of executor_finish: a step is found unfinished so many times before it is
// over, as on a device that computes by itself.
static atomic_uint patience;
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

// --- a broken device ---

static atomic_bool broken;
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

static atomic_bool deaf; // to a worker that leaves

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

static void start_coordinator(void)
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

static void stop_coordinator(void)
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

static struct join *next_join(int index)
{
    int64_t deadline = clock_now_us() + 30 * SECOND;
    pthread_mutex_lock(&mutex);
    while (n_joins <= index && clock_now_us() < deadline)
        wait_a_little();
    ck_assert_int_gt(n_joins, index);
    pthread_mutex_unlock(&mutex);
    return &joins[index];
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

// The next message of this kind; heartbeats and progress are skipped, anything else is wrong.
static struct wire_worker_message expect(struct join *join, enum wire_worker_kind kind)
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

static void tell(struct join *join, const struct wire_coordinator_message *message)
{
    struct wire_bytes bytes = {0};
    ck_assert_int_eq(wire_encode_coordinator_message(&bytes, message), 0);
    rpc_call_send(join->call, bytes.data, bytes.length);
    wire_bytes_free(&bytes);
}

static struct wire_coordinator_message assignment(uint64_t epoch, uint32_t stage, uint32_t n_stages)
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

static struct wire_worker_message load(struct join *join, uint64_t epoch, uint32_t stage, uint32_t n_stages)
{
    struct wire_coordinator_message assign = assignment(epoch, stage, n_stages);
    tell(join, &assign);
    struct wire_worker_message loaded = expect(join, WIRE_LOADED);
    ck_assert_uint_eq(loaded.epoch, epoch);
    return loaded;
}

static void connect_to(struct join *join, uint64_t epoch, const char *next)
{
    tell(join,
         &(struct wire_coordinator_message){.kind = WIRE_CONNECT, .epoch = epoch, .next_address = next});
}

static void link_alone(struct join *join, uint64_t epoch)
{
    connect_to(join, epoch, "");
    ck_assert_uint_eq(expect(join, WIRE_LINKED).epoch, epoch);
}

static void abort_epoch(struct join *join, uint64_t epoch)
{
    tell(join, &(struct wire_coordinator_message){
                   .kind = WIRE_ABORT, .epoch = epoch, .status = STATUS_UNAVAILABLE, .text = "a test"});
}

// Step 0 opens slot 0 and runs a prompt; later steps decode.
static void send_step(struct join *const *stages, int n, uint64_t epoch, uint64_t number)
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

static int32_t expect_token(struct join *last, uint64_t epoch, uint64_t number)
{
    expect(last, WIRE_RESULT);
    ck_assert_uint_eq(result.epoch, epoch);
    ck_assert_uint_eq(result.number, number);
    ck_assert_uint_eq(result.n_samples, 1);
    return result.samples[0].token;
}

// --- workers ---

struct running {
    struct worker *worker;
    pthread_t thread;
    int status;
    struct error error;
};

static void *run_worker(void *argument)
{
    struct running *running = argument;
    running->status = worker_run(running->worker, &running->error);
    return NULL;
}

static struct worker_options defaults(void)
{
    return (struct worker_options){.model = model,
                                   .coordinator = address,
                                   .listen_link = "127.0.0.1:0",
                                   .device = {.threads = 1},
                                   .link_timeout_us = 20 * SECOND};
}

static struct running start_worker(const struct worker_options *options, const char *name)
{
    struct running running = {0};
    struct worker_options named = *options;
    named.name = name;
    ck_assert_msg(worker_new(&running.worker, &named, &error) == 0, "%s", error.text);
    return running;
}

static void run_in_thread(struct running *running)
{
    pthread_create(&running->thread, NULL, run_worker, running);
}

static int wait_worker(struct running *running)
{
    pthread_join(running->thread, NULL);
    worker_free(running->worker);
    return running->status;
}

static void end_worker(struct running *running)
{
    int64_t start = clock_now_us();
    worker_stop(running->worker);
    ck_assert_int_eq(wait_worker(running), 0);
    ck_assert_int_lt(clock_now_us() - start, 10 * SECOND);
}

static void setup(void)
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

static void teardown(void)
{
    stop_coordinator();
    step_result_free(&result);
    arena_free(&arena);
}

#define START_ONE(running)                                                                                   \
    struct worker_options options = defaults();                                                              \
    struct running running = start_worker(&options, "one");                                                  \
    run_in_thread(&running);                                                                                 \
    struct join *join = next_join(0)

START_TEST(test_hello_says_who_is_there)
{
    START_ONE(running);
    struct wire_worker_message hello = expect(join, WIRE_HELLO);
    ck_assert_str_eq(hello.worker, "one");
    ck_assert_uint_eq(hello.protocol, WIRE_POOL_PROTOCOL);
    ck_assert_str_eq(hello.backend, "cpu");
    ck_assert_uint_eq(hello.level, device_best_level("cpu", 0));
    ck_assert_ptr_nonnull(strstr(hello.device, "1 thread"));
    ck_assert_ptr_nonnull(strstr(hello.link_address, "127.0.0.1:"));
    ck_assert_uint_gt(hello.memory_free, 1000000);
    ck_assert_uint_gt(strlen(hello.host), 0);
    struct gguf *gguf;
    ck_assert_int_eq(gguf_open(&gguf, model, &error), 0);
    ck_assert_uint_eq(hello.fingerprint, gguf_fingerprint(gguf));
    gguf_close(gguf);
    expect(join, WIRE_HEARTBEAT);
    end_worker(&running);
}
END_TEST

START_TEST(test_epochs_of_one_worker)
{
    atomic_store(&patience, _i * 50);
    START_ONE(running);
    expect(join, WIRE_HELLO);
    int32_t tokens[3];
    uint64_t weight_bytes = 0;
    for (uint64_t epoch = 5; epoch < 8; epoch++) {
        struct wire_worker_message loaded = load(join, epoch, 0, 1);
        ck_assert_uint_gt(loaded.weight_bytes, 100000);
        ck_assert_uint_gt(loaded.kv_bytes, 0);
        ck_assert_uint_eq(loaded.n_weights, 3 + 9 * LAYERS);
        ck_assert(epoch == 5 || loaded.weight_bytes == weight_bytes);
        weight_bytes = loaded.weight_bytes;
        link_alone(join, epoch);
        for (uint64_t number = 0; number < 3; number++) {
            send_step(&join, 1, epoch, number);
            send_step(&join, 1, epoch - 1, number); // nobody runs this
        }
        for (uint64_t number = 0; number < 3; number++) {
            int32_t token = expect_token(join, epoch, number);
            ck_assert(epoch == 5 || token == tokens[number]);
            tokens[number] = token;
        }
        if (epoch == 5)
            abort_epoch(join, epoch); // otherwise the next assignment does it
    }
    end_worker(&running);
}
END_TEST

// The other side's mistake: this worker computes on a CPU.
START_TEST(test_a_link_that_cannot_be_ends_the_epoch_only)
{
    START_ONE(running);
    ck_assert_uint_eq(expect(join, WIRE_HELLO).nccl, 0);
    struct wire_coordinator_message assign = assignment(4, 0, 2);
    assign.next_link = WIRE_LINK_NCCL;
    tell(join, &assign);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 4);
    ck_assert_msg(strstr(failed.text, "NCCL, which is not here"), "%s", failed.text);
    ck_assert_uint_eq(load(join, 5, 0, 1).link_id.length, 0);
    link_alone(join, 5);
    end_worker(&running);
}
END_TEST

// Two workers as a pipeline; leaves them linked under `epoch`.
static void link_pair(struct running pair[2], struct join *stages[2], uint64_t epoch)
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
    connect_to(stages[0], epoch, links[1]);
    connect_to(stages[1], epoch, links[0]);
    expect(stages[0], WIRE_LINKED);
    expect(stages[1], WIRE_LINKED);
}

START_TEST(test_a_pipeline_gives_the_same_tokens_as_one_worker)
{
    atomic_store(&patience, _i * 50);
    struct running pair[2], single;
    struct join *stages[2], *alone;
    link_pair(pair, stages, 3);
    struct worker_options options = defaults();
    single = start_worker(&options, "single");
    run_in_thread(&single);
    alone = next_join(2);
    expect(alone, WIRE_HELLO);
    load(alone, 3, 0, 1);
    link_alone(alone, 3);
    for (uint64_t number = 0; number < 6; number++) { // ahead of their results
        send_step(stages, 2, 3, number);
        send_step(&alone, 1, 3, number);
    }
    for (uint64_t number = 0; number < 6; number++)
        ck_assert_int_eq(expect_token(stages[1], 3, number), expect_token(alone, 3, number));
    for (int i = 0; i < 2; i++)
        end_worker(&pair[i]);
    end_worker(&single);
}
END_TEST

START_TEST(test_a_lost_neighbour_is_reported_and_survived)
{
    atomic_store(&patience, _i * 50);
    struct running pair[2];
    struct join *stages[2];
    link_pair(pair, stages, 3);
    send_step(stages, 2, 3, 0);
    expect_token(stages[1], 3, 0);
    end_worker(&pair[1]);
    for (uint64_t number = 1; number < 3; number++)
        send_step(stages, 1, 3, number);
    struct wire_worker_message failed = expect(stages[0], WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 3);
    ck_assert(failed.peer_lost);
    ck_assert(failed.has_step);
    ck_assert_ptr_nonnull(strstr(failed.text, "stage 1"));
    load(stages[0], 4, 0, 1); // goes on alone
    link_alone(stages[0], 4);
    send_step(stages, 1, 4, 0);
    expect_token(stages[0], 4, 0);
    end_worker(&pair[0]);
}
END_TEST

START_TEST(test_abort_wakes_a_worker_that_waits_for_its_neighbour)
{
    struct running pair[2];
    struct join *stages[2];
    link_pair(pair, stages, 3);
    send_step(stages + 1, 1, 3, 0); // the first stage never sends
    clock_sleep_us(SECOND / 10);
    abort_epoch(stages[1], 3);
    load(stages[1], 4, 0, 1);
    for (int i = 0; i < 2; i++)
        end_worker(&pair[i]);
}
END_TEST

START_TEST(test_abort_wakes_a_worker_that_links)
{
    START_ONE(running);
    char self[128];
    snprintf(self, sizeof(self), "%s", expect(join, WIRE_HELLO).link_address);
    load(join, 3, 0, 2);
    connect_to(join, 3, "127.0.0.1:1"); // nobody is there
    clock_sleep_us(SECOND / 10);
    abort_epoch(join, 3);
    int64_t start = clock_now_us();
    load(join, 4, 0, 2);
    ck_assert_int_lt(clock_now_us() - start, 10 * SECOND);
    end_worker(&running);
}
END_TEST

START_TEST(test_what_cannot_be_loaded_is_said_and_survived)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    struct wire_coordinator_message wrong = assignment(2, 0, 1);
    wrong.n_layers = LAYERS + 1;
    tell(join, &wrong);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 2);
    ck_assert_int_eq(failed.status, STATUS_CORRUPT);
    wrong = assignment(3, 0, 1);
    wrong.n_pages = 1u << 31;
    tell(join, &wrong);
    failed = expect(join, WIRE_FAILED);
    ck_assert_int_eq(failed.status, STATUS_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(failed.text, "do not fit"));
    load(join, 4, 0, 1);
    end_worker(&running);
}
END_TEST

START_TEST(test_the_memory_budget_holds)
{
    struct worker_options options = defaults();
    options.memory = 300000;
    struct running running = start_worker(&options, "small");
    run_in_thread(&running);
    struct join *join = next_join(0);
    ck_assert_uint_eq(expect(join, WIRE_HELLO).memory_free, 300000);
    struct wire_coordinator_message assign = assignment(3, 0, 1);
    tell(join, &assign);
    ck_assert_int_eq(expect(join, WIRE_FAILED).status, STATUS_NO_MEMORY);
    end_worker(&running);
}
END_TEST

START_TEST(test_a_wrong_step_ends_its_epoch_only)
{
    atomic_store(&patience, _i * 50);
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    link_alone(join, 3);
    send_step(&join, 1, 3, 1); // step 0 is missing
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert(failed.has_step);
    ck_assert_uint_eq(failed.step, 1);
    ck_assert(!failed.peer_lost);
    send_step(&join, 1, 3, 0); // over: dropped
    load(join, 4, 0, 1);
    link_alone(join, 4);
    send_step(&join, 1, 4, 0);
    expect_token(join, 4, 0);
    end_worker(&running);
}
END_TEST

// The coordinator learns what happened, and the worker ends, whether the coordinator lets it go or not.
START_TEST(test_a_broken_device_ends_the_worker)
{
    atomic_store(&deaf, _i == 1);
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    link_alone(join, 3);
    send_step(&join, 1, 3, 0);
    expect_token(join, 3, 0);
    atomic_store(&broken, true);
    send_step(&join, 1, 3, 5);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 3);
    ck_assert_uint_eq(failed.step, 5);
    ck_assert_int_eq(wait_worker(&running), STATUS_INTERNAL);
    ck_assert_ptr_nonnull(strstr(running.error.text, "is broken"));
    ck_assert_int_eq(n_joins, 1);
}
END_TEST

// The fault shows elsewhere first: a neighbour's word ends the epoch, or its stream.
START_TEST(test_a_broken_device_is_found_at_the_end_of_an_epoch)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    atomic_store(&broken, true);
    if (_i == 0)
        abort_epoch(join, 3);
    else
        rpc_call_abort(join->call, STATUS_UNAVAILABLE, "the test hangs up");
    ck_assert_int_eq(wait_worker(&running), STATUS_INTERNAL);
}
END_TEST

START_TEST(test_unfinished_steps_end_with_their_epoch)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    for (uint64_t epoch = 3; epoch < 6; epoch++) {
        load(join, epoch, 0, 1);
        link_alone(join, epoch);
        atomic_store(&patience, 0);
        send_step(&join, 1, epoch, 0);
        expect_token(join, epoch, 0);
        atomic_store(&patience, UINT32_MAX);
        for (uint64_t number = 1; number < 4 + EXECUTOR_DEPTH; number++) // some have to wait
            send_step(&join, 1, epoch, number);
        clock_sleep_us(SECOND / 20);
        if (epoch == 3)
            abort_epoch(join, epoch); // otherwise the next assignment does it, or the worker's end
    }
    end_worker(&running);
}
END_TEST

// The steps before the one that fails give their results.
START_TEST(test_a_wrong_step_behind_unfinished_ones)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    link_alone(join, 3);
    atomic_store(&patience, 50);
    send_step(&join, 1, 3, 0);
    send_step(&join, 1, 3, 1);
    send_step(&join, 1, 3, 5);
    expect_token(join, 3, 0);
    expect_token(join, 3, 1);
    ck_assert_uint_eq(expect(join, WIRE_FAILED).step, 5);
    end_worker(&running);
}
END_TEST

START_TEST(test_a_lost_stream_keeps_the_weights)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    struct wire_worker_message before = load(join, 3, 0, 1);
    rpc_call_abort(join->call, STATUS_UNAVAILABLE, "the test hangs up");
    join = next_join(1);
    ck_assert_uint_gt(expect(join, WIRE_HELLO).memory_free, before.weight_bytes);
    ck_assert_uint_eq(load(join, 4, 0, 1).weight_bytes, before.weight_bytes);
    stop_coordinator(); // and the whole coordinator goes and comes back on its port
    start_coordinator();
    join = next_join(0);
    expect(join, WIRE_HELLO);
    load(join, 5, 0, 1);
    link_alone(join, 5);
    send_step(&join, 1, 5, 0);
    expect_token(join, 5, 0);
    end_worker(&running);
}
END_TEST

START_TEST(test_goodbyes)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    tell(join, &(struct wire_coordinator_message){
                   .kind = WIRE_GOODBYE, .status = STATUS_UNAVAILABLE, .text = "come back", .retry = true});
    join = next_join(1);
    expect(join, WIRE_HELLO);
    tell(join, &(struct wire_coordinator_message){
                   .kind = WIRE_GOODBYE, .status = STATUS_INVALID, .text = "another model is served here"});
    ck_assert_int_eq(wait_worker(&running), STATUS_CANCELLED);
    ck_assert_ptr_nonnull(strstr(running.error.text, "another model is served here"));
}
END_TEST

START_TEST(test_nonsense_ends_the_epoch_only)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    rpc_call_send(join->call, "\xff\xff\xff\xff\xff", 5);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_int_eq(failed.status, STATUS_CORRUPT);
    ck_assert_uint_eq(failed.epoch, 3);
    load(join, 4, 0, 1);
    end_worker(&running);
}
END_TEST

START_TEST(test_a_lower_level_is_taken_over)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    struct wire_coordinator_message assign = assignment(4, 0, 1);
    assign.level = LEVEL_PORTABLE;
    tell(join, &assign);
    expect(join, WIRE_LOADED);
    link_alone(join, 4);
    send_step(&join, 1, 4, 0);
    expect_token(join, 4, 0);
    assign = assignment(5, 0, 1);
    assign.level = LEVEL_CUDA; // never on a CPU
    tell(join, &assign);
    expect(join, WIRE_FAILED);
    load(join, 6, 0, 1);
    end_worker(&running);
}

START_TEST(test_more_steps_than_a_worker_keeps)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 2);
    connect_to(join, 3, "127.0.0.1:1"); // keeps the device's thread busy
    for (uint64_t number = 0; number < 300; number++)
        send_step(&join, 1, 3, number);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 3);
    ck_assert_int_eq(failed.status, STATUS_EXHAUSTED);
    load(join, 4, 0, 1);
    end_worker(&running);
}
END_TEST

START_TEST(test_no_coordinator)
{
    struct worker_options options = defaults();
    options.coordinator = "127.0.0.1:1";
    options.connect_timeout_us = SECOND / 2;
    struct running running = start_worker(&options, "lonely");
    run_in_thread(&running);
    ck_assert_int_eq(wait_worker(&running), STATUS_DEADLINE);
    ck_assert_ptr_nonnull(strstr(running.error.text, "127.0.0.1:1"));
    options.connect_timeout_us = 0;
    running = start_worker(&options, "patient");
    run_in_thread(&running);
    clock_sleep_us(SECOND / 2);
    end_worker(&running);
}
END_TEST

START_TEST(test_what_is_wrong_at_the_start)
{
    struct worker *worker;
    struct worker_options options = defaults();
    options.model = "/no/such/model.gguf";
    ck_assert_int_eq(worker_new(&worker, &options, &error), STATUS_NOT_FOUND);
    options = defaults();
    options.listen_link = "nowhere";
    ck_assert_int_eq(worker_new(&worker, &options, &error), STATUS_INVALID);
    options = defaults();
    options.device.backend = "abacus";
    ck_assert_int_eq(worker_new(&worker, &options, &error), STATUS_UNSUPPORTED);
}
END_TEST

Suite *make_suite(void)
{
    log_init("worker_test", LOG_ERROR, 0);
    Suite *suite = suite_create("worker");
    TCase *tests = tcase_create("worker");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 90);
    tcase_add_test(tests, test_hello_says_who_is_there);
    tcase_add_loop_test(tests, test_epochs_of_one_worker, 0, 2);
    tcase_add_test(tests, test_a_link_that_cannot_be_ends_the_epoch_only);
    tcase_add_loop_test(tests, test_a_pipeline_gives_the_same_tokens_as_one_worker, 0, 2);
    tcase_add_loop_test(tests, test_a_lost_neighbour_is_reported_and_survived, 0, 2);
    tcase_add_test(tests, test_abort_wakes_a_worker_that_waits_for_its_neighbour);
    tcase_add_test(tests, test_abort_wakes_a_worker_that_links);
    tcase_add_test(tests, test_what_cannot_be_loaded_is_said_and_survived);
    tcase_add_test(tests, test_the_memory_budget_holds);
    tcase_add_loop_test(tests, test_a_wrong_step_ends_its_epoch_only, 0, 2);
    tcase_add_loop_test(tests, test_a_broken_device_ends_the_worker, 0, 2);
    tcase_add_loop_test(tests, test_a_broken_device_is_found_at_the_end_of_an_epoch, 0, 2);
    tcase_add_test(tests, test_unfinished_steps_end_with_their_epoch);
    tcase_add_test(tests, test_a_wrong_step_behind_unfinished_ones);
    tcase_add_test(tests, test_a_lost_stream_keeps_the_weights);
    tcase_add_test(tests, test_goodbyes);
    tcase_add_test(tests, test_nonsense_ends_the_epoch_only);
    tcase_add_test(tests, test_a_lower_level_is_taken_over);
    tcase_add_test(tests, test_more_steps_than_a_worker_keeps);
    tcase_add_test(tests, test_no_coordinator);
    tcase_add_test(tests, test_what_is_wrong_at_the_start);
    suite_add_tcase(suite, tests);
    return suite;
}
