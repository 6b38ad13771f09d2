// The state and the hands behind scheduler_fixture.h.
#include "tests/scheduler_fixture.h"

#include <stdlib.h>

#include "tests/suite.h"

enum { STEPS = 64 };

struct scheduler *scheduler;
struct step_plan plan;
struct scheduler_event event;
int64_t now;
uint64_t answered;
static struct {
    uint32_t n_rows, draws[64];
} steps[STEPS]; // what each step of the epoch asked for

const struct scheduler_options OPTIONS = {.n_slots = 4,
                                          .context = 256,
                                          .vocab_size = VOCABULARY,
                                          .max_waiting = 3,
                                          .step_budget = 128,
                                          .chunk = 64};

void start_with(const struct scheduler_options *options, uint32_t n_stages, uint32_t n_pages)
{
    now = 1000;
    answered = 0;
    step_plan_init(&plan);
    ck_assert_int_eq(scheduler_new(&scheduler, options), STATUS_OK);
    if (n_stages > 0)
        ck_assert_int_eq(scheduler_pool_ready(scheduler, 1, n_stages, n_pages, now), STATUS_OK);
}

void start(uint32_t n_stages, uint32_t n_pages)
{
    start_with(&OPTIONS, n_stages, n_pages);
}

void finish(void)
{
    scheduler_check(scheduler);
    scheduler_free(scheduler);
    step_plan_free(&plan);
}

struct request *request_of(uint64_t id, uint32_t n_prompt, uint32_t max_tokens)
{
    struct request *request = request_new();
    ck_assert_ptr_nonnull(request);
    request->id = id;
    request->n_prompt = n_prompt;
    request->prompt = calloc(n_prompt + 1, sizeof(*request->prompt));
    for (uint32_t i = 0; i < n_prompt; i++)
        request->prompt[i] = (int32_t)(i % 50);
    request->max_tokens = max_tokens;
    request->credit = 1000;
    request->end_ids = calloc(1, sizeof(*request->end_ids));
    request->end_ids[0] = END_ID;
    request->n_end_ids = 1;
    return request;
}

void submit(struct request *request)
{
    struct error error = {0};
    ck_assert_msg(scheduler_submit(scheduler, request, now, &error) == STATUS_OK, "%s", error.text);
}

bool plan_next(void)
{
    scheduler_check(scheduler);
    if (!scheduler_plan(scheduler, now, &plan))
        return false;
    scheduler_check(scheduler);
    steps[plan.number % STEPS].n_rows = plan.n_rows;
    for (uint32_t r = 0; r < plan.n_rows; r++)
        steps[plan.number % STEPS].draws[r] = plan.rows[r].draws;
    return true;
}

void make_result(struct step_result *result, uint64_t epoch, int32_t token)
{
    step_result_init(result);
    result->epoch = epoch;
    result->number = answered;
    for (uint32_t r = 0; r < steps[answered % STEPS].n_rows; r++) {
        for (uint32_t d = 0; d < steps[answered % STEPS].draws[r]; d++) {
            struct step_sample *sample = step_result_add_sample(result);
            sample->row = r;
            sample->draw = d;
            sample->token = token++;
        }
    }
}

void answer(int32_t token)
{
    struct error error = {0};
    struct step_result result;
    make_result(&result, 1, token);
    ck_assert_msg(scheduler_result(scheduler, &result, now, &error) == STATUS_OK, "%s", error.text);
    answered++;
    step_result_free(&result);
    scheduler_check(scheduler);
}

void expect_token(uint64_t request, uint32_t choice, int32_t token)
{
    ck_assert(scheduler_next_event(scheduler, &event));
    ck_assert_int_eq(event.kind, SCHEDULER_TOKEN);
    ck_assert_uint_eq(event.request, request);
    ck_assert_uint_eq(event.choice, choice);
    ck_assert_int_eq(event.token, token);
}

void expect_choice_end(uint64_t request, uint32_t choice, enum finish_reason reason, int32_t matched)
{
    ck_assert(scheduler_next_event(scheduler, &event));
    ck_assert_int_eq(event.kind, SCHEDULER_CHOICE_END);
    ck_assert_uint_eq(event.request, request);
    ck_assert_uint_eq(event.choice, choice);
    ck_assert_int_eq(event.finish, reason);
    ck_assert_int_eq(event.matched_id, matched);
}

void expect_request_end(uint64_t request, int status)
{
    ck_assert(scheduler_next_event(scheduler, &event));
    ck_assert_int_eq(event.kind, SCHEDULER_REQUEST_END);
    ck_assert_uint_eq(event.request, request);
    ck_assert_int_eq(event.status, status);
}

void expect_no_event(void)
{
    ck_assert(!scheduler_next_event(scheduler, &event));
}

const struct step_command *find_command(enum step_command_kind kind, uint32_t nth)
{
    for (uint32_t i = 0; i < plan.n_commands; i++) {
        if (plan.commands[i].kind == kind && nth-- == 0)
            return &plan.commands[i];
    }
    return NULL;
}

struct scheduler_stats stats(void)
{
    struct scheduler_stats out;
    scheduler_stats(scheduler, &out);
    return out;
}
