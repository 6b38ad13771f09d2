// Whether the scheduler keeps a pipeline busy: a pool whose every stage takes the same time for a step
// whatever is in it (as decoding does, where reading the weights is the cost), a host that hears of each
// result late, a fake clock, and the time that whole loads take against the least that any scheduler could
// need.
#include "coordinator/scheduler.h"
#include "tests/sim/pool_model.h"
#include "tests/suite.h"

enum { STAGE_US = 1000, HOST_US = 600, TICK_US = 50, VOCABULARY = 211, CONTEXT = 4096, CHUNK = 64 };

struct line {
    struct scheduler *scheduler;
    struct pool_model *pool;
    struct step_plan plan;
    uint32_t n_stages;
    int64_t now;
    int64_t finishes[MAX_STAGES];    // 0 = idle
    int64_t busy_us;                 // of all stages
    int64_t known_us[MODEL_HISTORY]; // when the host has the step's result
    uint32_t n_ended, tokens;
    int64_t ended_us[64]; // by request id
};

static void line_start(struct line *line, uint32_t n_stages, uint32_t budget)
{
    struct scheduler_options options = {.n_slots = 64,
                                        .context = CONTEXT,
                                        .vocab_size = VOCABULARY,
                                        .max_waiting = 64,
                                        .step_budget = budget,
                                        .chunk = CHUNK};
    struct step_bounds bounds = {.n_slots = 64,
                                 .n_pages = 1000,
                                 .context = CONTEXT,
                                 .vocab_size = VOCABULARY,
                                 .max_positions = budget};
    memset(line, 0, sizeof(*line));
    ck_assert_int_eq(scheduler_new(&line->scheduler, &options), STATUS_OK);
    line->pool = pool_model_new(1, n_stages, &bounds);
    line->n_stages = n_stages;
    line->now = TICK_US;
    step_plan_init(&line->plan);
    ck_assert_int_eq(scheduler_pool_ready(line->scheduler, 1, n_stages, 1000, line->now), STATUS_OK);
}

static void line_end(struct line *line)
{
    scheduler_check(line->scheduler);
    scheduler_free(line->scheduler);
    pool_model_free(line->pool);
    step_plan_free(&line->plan);
}

static void line_submit(struct line *line, uint64_t id, uint32_t n_prompt, uint32_t max_tokens)
{
    struct request *request = request_new();
    ck_assert_ptr_nonnull(request);
    request->id = id;
    request->n_prompt = n_prompt;
    request->prompt = calloc(n_prompt, sizeof(*request->prompt));
    for (uint32_t i = 0; i < n_prompt; i++)
        request->prompt[i] = (int32_t)(mix(id, i) % VOCABULARY);
    request->max_tokens = max_tokens;
    request->credit = max_tokens + 1;
    ck_assert_int_eq(scheduler_submit(line->scheduler, request, line->now, NULL), STATUS_OK);
}

static void line_host(struct line *line)
{
    struct scheduler_event event;
    struct pool_model *pool = line->pool;
    while (pool->resulted < pool->stages[line->n_stages - 1].done &&
           line->known_us[pool->resulted % MODEL_HISTORY] <= line->now) {
        const struct step_result *result = pool_model_result(pool);
        ck_assert_int_eq(scheduler_result(line->scheduler, result, line->now, NULL), STATUS_OK);
    }
    while (scheduler_next_event(line->scheduler, &event)) {
        line->tokens += event.kind == SCHEDULER_TOKEN;
        if (event.kind == SCHEDULER_REQUEST_END) {
            ck_assert_int_eq(event.status, STATUS_OK);
            line->ended_us[event.request] = line->now;
            line->n_ended++;
        }
    }
    while (scheduler_plan(line->scheduler, line->now, &line->plan))
        pool_model_push(line->pool, &line->plan);
}

static void line_tick(struct line *line)
{
    line_host(line);
    for (uint32_t i = 0; i < line->n_stages; i++) {
        if (line->finishes[i] == 0 && pool_model_can_run(line->pool, i))
            line->finishes[i] = line->now + STAGE_US;
    }
    line->now += TICK_US;
    for (uint32_t i = line->n_stages;
         i-- > 0;) { // backwards: a stage sees what its neighbour finished a tick ago
        if (line->finishes[i] == line->now) {
            if (i == line->n_stages - 1)
                line->known_us[line->pool->stages[i].done % MODEL_HISTORY] = line->now + HOST_US;
            pool_model_run(line->pool, i);
            line->finishes[i] = 0;
            line->busy_us += STAGE_US;
        }
    }
}

static void line_run(struct line *line, uint32_t n_requests)
{
    while (line->n_ended < n_requests) {
        line_tick(line);
        ck_assert_int_lt(line->now, 60000000);
    }
}

// However many decode, a token of each takes one passage through all stages, and no more.
START_TEST(decodes_keep_the_stages_busy)
{
    for (uint32_t n_stages = 1; n_stages <= 4; n_stages++) {
        for (uint32_t running = 1; running <= 11; running++) {
            struct line line;
            line_start(&line, n_stages, 256);
            for (uint32_t i = 0; i < running; i++)
                line_submit(&line, i, 3 + i, 100);
            line_run(&line, running);
            int64_t least = (int64_t)100 * n_stages * STAGE_US;
            ck_assert_msg(line.now * 100 < least * 115,
                          "%u stages, %u running: %lld us, at least %lld are needed", n_stages, running,
                          (long long)line.now, (long long)least);
            line_end(&line);
        }
    }
}
END_TEST

// Requests of all lengths come and go; the stages stay busy all the same.
START_TEST(coming_and_going_leaves_no_gaps)
{
    for (uint32_t n_stages = 1; n_stages <= 4; n_stages++) {
        struct line line;
        line_start(&line, n_stages, 256);
        uint32_t submitted = 0;
        while (line.n_ended < 60) {
            while (submitted < 60 && submitted - line.n_ended < 9) {
                line_submit(&line, submitted, 1 + mix(1, submitted) % 150, 1 + mix(2, submitted) % 80);
                submitted++;
            }
            line_tick(&line);
        }
        double busy = (double)line.busy_us / (double)(line.now * n_stages);
        ck_assert_msg(busy > 0.87, "%u stages were busy %.2f of the time", n_stages, busy);
        line_end(&line);
    }
}
END_TEST

// A long prompt streams through the stages though one sequence decodes beside it, and that one keeps its
// pace.
START_TEST(prompts_flow_beside_few_decodes)
{
    struct line line;
    line_start(&line, 4, CHUNK);
    line_submit(&line, 0, 5, 60);
    while (line.tokens < 10)
        line_tick(&line);
    int64_t began = line.now;
    line_submit(&line, 1, 30 * (CHUNK - 1), 1);
    line_run(&line, 1);
    while (line.n_ended < 2)
        line_tick(&line);
    int64_t prompt_us = line.ended_us[1] - began, decode_us = line.ended_us[0] - began;
    ck_assert_msg(prompt_us < 40 * STAGE_US, "30 chunks took %lld us", (long long)prompt_us);
    ck_assert_msg(decode_us < 50 * 4 * STAGE_US * 12 / 10, "50 tokens took %lld us", (long long)decode_us);
    line_end(&line);
}
END_TEST

// A burst that finishes its prompts in one step is spread over the turns: every sequence gets its token in
// each round.
START_TEST(a_burst_is_dealt_evenly)
{
    struct line line;
    uint32_t rows[64] = {0}, biggest = 0, decode_steps = 0;
    line_start(&line, 4, 256);
    for (uint32_t i = 0; i < 16; i++)
        line_submit(&line, i, 4, 41);
    line_host(&line);
    ck_assert_uint_eq(line.pool->plans[0].n_rows, 16); // all prompts in one step
    for (uint64_t seen = 1; line.n_ended < 16;) {
        line_tick(&line);
        for (; seen < line.pool->queued; seen++) {
            const struct step_plan *plan = &line.pool->plans[seen % MODEL_HISTORY];
            decode_steps++;
            biggest = plan->n_rows > biggest ? plan->n_rows : biggest;
            for (uint32_t r = 0; r < plan->n_rows; r++)
                rows[plan->rows[r].slot]++;
            for (uint32_t slot = 0; slot < 16; slot++)
                ck_assert(rows[slot] == 40 || decode_steps / 4 <= rows[slot] + (rows[slot] < 39 ? 1 : 2));
        }
    }
    ck_assert_uint_eq(biggest, 4);
    line_end(&line);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("scheduler_pipeline");
    TCase *lines = tcase_create("lines");
    tcase_set_timeout(lines, 60);
    tcase_add_test(lines, decodes_keep_the_stages_busy);
    tcase_add_test(lines, coming_and_going_leaves_no_gaps);
    tcase_add_test(lines, prompts_flow_beside_few_decodes);
    tcase_add_test(lines, a_burst_is_dealt_evenly);
    suite_add_tcase(suite, lines);
    return suite;
}
