// Memory: a steady load allocates nothing in the scheduler, and when any one allocation fails (each in turn),
// only the requests concerned end, with NO_MEMORY, and nothing is lost or held. Replaces the C library's
// allocator to count and to fail, which sanitizers do not allow: there, this suite is empty.
#include "coordinator/scheduler.h"
#include "tests/sim/pool_model.h"
#include "tests/suite.h"

#include <errno.h>

enum { STAGES = 2, PAGES = 60, CONTEXT = 400, VOCABULARY = 90, BUDGET = 128, CLIENTS = 12 };

static bool counting; // only inside calls on the scheduler
static uint64_t allocations, failures, fail_first, fail_count;
static int64_t live; // blocks of all callers

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CAN_REPLACE_MALLOC false
#else
#define CAN_REPLACE_MALLOC true
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void __libc_free(void *);

static bool fails(void)
{
    if (!counting)
        return false;
    uint64_t index = allocations++;
    if (index < fail_first || index - fail_first >= fail_count)
        return false;
    failures++;
    errno = ENOMEM;
    return true;
}

static void *counted_block(void *memory)
{
    live += memory != NULL;
    return memory;
}

__attribute__((visibility("default"))) void *malloc(size_t bytes)
{
    return fails() ? NULL : counted_block(__libc_malloc(bytes));
}

__attribute__((visibility("default"))) void *calloc(size_t count, size_t bytes)
{
    return fails() ? NULL : counted_block(__libc_calloc(count, bytes));
}

__attribute__((visibility("default"))) void *realloc(void *memory, size_t bytes)
{
    if (fails())
        return NULL;
    live -= memory != NULL;
    return counted_block(__libc_realloc(memory, bytes));
}

__attribute__((visibility("default"))) void free(void *memory)
{
    live -= memory != NULL;
    __libc_free(memory);
}
#endif

#define COUNTED(call)                                                                                        \
    ({                                                                                                       \
        counting = true;                                                                                     \
        __typeof__(call) counted = (call);                                                                   \
        counting = false;                                                                                    \
        counted;                                                                                             \
    })

static struct scheduler *scheduler;
static struct pool_model *pool;
static struct step_plan plan;
static const struct step_result *held; // refused for want of memory: offered again
static uint32_t n_ended, n_without_memory;
static uint64_t n_tokens;

static struct request *make_request(uint64_t id, uint32_t max_tokens)
{
    struct request *request = request_new();
    request->id = id;
    request->n_prompt = 20 + (uint32_t)id * 7;
    request->prompt = calloc(request->n_prompt, sizeof(*request->prompt));
    for (uint32_t i = 0; i < request->n_prompt; i++)
        request->prompt[i] = (int32_t)(mix(id, i) % VOCABULARY);
    request->max_tokens = max_tokens;
    request->n_choices = id % 3 == 0 ? 3 : 1;
    request->credit = 10000;
    request->sampling.repetition_penalty = 1.2f;
    request->sampling.min_tokens = 2;
    request->end_ids = calloc(1, sizeof(*request->end_ids));
    request->n_end_ids = id % 2;
    request->biases = calloc(1, sizeof(*request->biases));
    request->n_biases = 1;
    request->prompt_logprobs = id % 4 == 0;
    request->logprobs = id % 4 < 2;
    request->top_logprobs = 3;
    return request;
}

static bool start(void)
{
    struct scheduler_options options = {.n_slots = 8,
                                        .context = CONTEXT,
                                        .vocab_size = VOCABULARY,
                                        .max_waiting = CLIENTS,
                                        .step_budget = BUDGET,
                                        .chunk = 64};
    struct step_bounds bounds = {.n_slots = 8,
                                 .n_pages = PAGES,
                                 .context = CONTEXT,
                                 .vocab_size = VOCABULARY,
                                 .max_positions = BUDGET};
    allocations = failures = 0;
    n_ended = n_without_memory = 0;
    n_tokens = 0;
    held = NULL;
    step_plan_init(&plan);
    if (COUNTED(scheduler_new(&scheduler, &options)) != STATUS_OK)
        return false;
    if (COUNTED(scheduler_pool_ready(scheduler, 1, STAGES, PAGES, 1)) != STATUS_OK) {
        struct request *request = make_request(1, 5); // as good as lost: it waits
        ck_assert_int_eq(scheduler_submit(scheduler, request, 1, NULL), STATUS_OK);
        ck_assert(!scheduler_plan(scheduler, 1, &plan));
        scheduler_free(scheduler);
        return false;
    }
    pool = pool_model_new(1, STAGES, &bounds);
    return true;
}

static void stop(void)
{
    struct scheduler_stats stats;
    scheduler_check(scheduler);
    scheduler_stats(scheduler, &stats);
    ck_assert_uint_eq(stats.slots_used + stats.running + stats.waiting, 0);
    ck_assert_uint_eq(stats.pages_free, PAGES);
    scheduler_free(scheduler);
    pool_model_free(pool);
    step_plan_free(&plan);
}

static void take_events(void)
{
    struct scheduler_event event;
    while (COUNTED(scheduler_next_event(scheduler, &event))) {
        n_tokens += event.kind == SCHEDULER_TOKEN;
        if (event.kind != SCHEDULER_REQUEST_END)
            continue;
        ck_assert(event.status == STATUS_OK || event.status == STATUS_NO_MEMORY);
        n_ended++;
        n_without_memory += event.status == STATUS_NO_MEMORY;
    }
}

static void turn(void)
{
    while (COUNTED(scheduler_plan(scheduler, 1, &plan)))
        pool_model_push(pool, &plan);
    for (uint32_t i = 0; i < STAGES; i++) {
        if (pool_model_can_run(pool, i))
            pool_model_run(pool, i);
    }
    held = held ? held : pool_model_result(pool);
    if (held) {
        int status = COUNTED(scheduler_result(scheduler, held, 1, NULL));
        ck_assert(status == STATUS_OK || status == STATUS_NO_MEMORY);
        held = status == STATUS_OK ? NULL : held;
    }
    take_events();
}

static void submit_all(void)
{
    for (uint64_t id = 1; id <= CLIENTS; id++) {
        struct request *request = make_request(id, 12);
        int status = COUNTED(scheduler_submit(scheduler, request, 1, NULL));
        if (status == STATUS_OK)
            continue;
        ck_assert_int_eq(status, STATUS_NO_MEMORY);
        request_free(request);
        n_ended++;
        n_without_memory++;
    }
}

START_TEST(each_allocation_may_fail)
{
    bool failed = true;
    uint32_t ended_by_it = 0;
    for (fail_first = 0; failed; fail_first++) {
        fail_count = 1 + fail_first % 3;
        int64_t in_use = live;
        if (start()) {
            submit_all();
            for (uint32_t turns = 0; n_ended < CLIENTS; turns++) {
                turn();
                scheduler_check(scheduler);
                ck_assert_msg(turns < 5000, "allocation %llu failed, and somebody waits for ever",
                              (unsigned long long)fail_first);
            }
            while (pool->resulted < pool->queued || held)
                turn();
            stop();
        } else {
            step_plan_free(&plan);
        }
        ck_assert_int_eq(live, in_use); // nothing leaked
        failed = failures > 0;
        ck_assert_uint_le(n_without_memory, failures);
        ended_by_it += n_without_memory;
    }
    ck_assert_uint_gt(fail_first, 30); // it did allocate, and
    ck_assert_uint_gt(ended_by_it, 20);
}
END_TEST

START_TEST(a_steady_load_allocates_nothing)
{
    fail_count = 0;
    ck_assert(start());
    for (uint64_t id = 1; id <= 6; id++) {
        struct request *request = make_request(id, CONTEXT);
        request->n_end_ids = 0;
        ck_assert_int_eq(scheduler_submit(scheduler, request, 1, NULL), STATUS_OK);
    }
    while (n_tokens < 300)
        turn();
    uint64_t before = allocations, tokens = n_tokens;
    while (n_tokens < tokens + 600)
        turn();
    ck_assert_uint_eq(n_ended, 0);
    ck_assert_uint_eq(allocations, before);
    while (n_ended < 6)
        turn();
    while (pool->resulted < pool->queued)
        turn();
    stop();
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("scheduler_memory");
    TCase *memory = tcase_create("memory");
    tcase_set_timeout(memory, 60);
    if (CAN_REPLACE_MALLOC) {
        tcase_add_test(memory, each_allocation_may_fail);
        tcase_add_test(memory, a_steady_load_allocates_nothing);
    }
    suite_add_tcase(suite, memory);
    return suite;
}
