// What the scheduler costs for each step: planning it, taking its result, and draining its events, with many
// sequences decoding in a steady state. Prints microseconds a step (the least of several rounds, and their
// median).
#include "coordinator/scheduler.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { VOCABULARY = 32000, ROUNDS = 15, STEPS = 200, AHEAD = 16 };

struct costs {
    double plan, result, events;
};

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void submit(struct scheduler *scheduler, uint64_t id, uint32_t context)
{
    struct request *request = request_new();
    request->id = id;
    request->n_prompt = 1 + id % 60;
    request->prompt = calloc(request->n_prompt, sizeof(*request->prompt));
    request->end_ids = calloc(2, sizeof(*request->end_ids));
    request->end_ids[1] = 2;
    request->n_end_ids = 2;
    request->max_tokens = context;
    request->credit = UINT32_MAX;
    struct error error = {0};
    if (scheduler_submit(scheduler, request, 1, &error) != STATUS_OK) {
        fprintf(stderr, "%s\n", error.text);
        exit(EXIT_FAILURE);
    }
}

static void answer(const struct step_plan *plan, struct step_result *result)
{
    step_result_clear(result);
    result->epoch = plan->epoch;
    result->number = plan->number;
    for (uint32_t r = 0; r < plan->n_rows; r++) {
        for (uint32_t d = 0; d < plan->rows[r].draws; d++) {
            struct step_sample *sample = step_result_add_sample(result);
            sample->row = r;
            sample->draw = d;
            sample->token = 5;
        }
    }
}

// One step goes out and one result comes back, as in a running pool.
static void step(struct scheduler *scheduler, struct step_plan *plan, struct step_result results[AHEAD],
                 uint64_t *taken, struct costs *costs)
{
    struct scheduler_event event;
    double start = now_us(), planned = start;
    while (scheduler_plan(scheduler, 1, plan)) {
        planned = now_us();
        costs->plan += planned - start;
        answer(plan, &results[plan->number % AHEAD]);
        start = now_us();
    }
    start = now_us();
    if (scheduler_result(scheduler, &results[(*taken)++ % AHEAD], 1, NULL) != STATUS_OK)
        exit(EXIT_FAILURE);
    double resulted = now_us();
    while (scheduler_next_event(scheduler, &event))
        ;
    costs->result += resulted - start;
    costs->events += now_us() - resulted;
}

static int compare(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void measure(uint32_t running, uint32_t n_stages)
{
    struct scheduler_options options = {.n_slots = running,
                                        .context = 64 + (ROUNDS + 1) * STEPS * 2,
                                        .vocab_size = VOCABULARY,
                                        .max_waiting = running,
                                        .step_budget = 2048,
                                        .chunk = 512};
    struct scheduler *scheduler;
    struct step_plan plan;
    struct step_result results[AHEAD];
    uint64_t taken = 0;
    if (scheduler_new(&scheduler, &options) != STATUS_OK ||
        scheduler_pool_ready(scheduler, 1, n_stages, running * (options.context / 64 + 1), 1) != STATUS_OK)
        exit(EXIT_FAILURE);
    step_plan_init(&plan);
    for (uint32_t i = 0; i < AHEAD; i++)
        step_result_init(&results[i]);
    for (uint32_t i = 0; i < running; i++)
        submit(scheduler, i + 1, options.context);
    double totals[ROUNDS];
    struct costs best = {0};
    for (uint32_t round = 0; round <= ROUNDS; round++) { // the first warms up
        struct costs costs = {0};
        for (uint32_t i = 0; i < STEPS; i++)
            step(scheduler, &plan, results, &taken, &costs);
        double total = (costs.plan + costs.result + costs.events) / STEPS;
        if (round == 0)
            continue;
        totals[round - 1] = total;
        if (round == 1 || total < (best.plan + best.result + best.events) / STEPS)
            best = costs;
    }
    qsort(totals, ROUNDS, sizeof(totals[0]), compare);
    printf("%8u %7u %9.1f %9.1f %9.1f %9.1f %9.1f\n", running, n_stages, best.plan / STEPS,
           best.result / STEPS, best.events / STEPS, totals[0], totals[ROUNDS / 2]);
    scheduler_free(scheduler);
    step_plan_free(&plan);
    for (uint32_t i = 0; i < AHEAD; i++)
        step_result_free(&results[i]);
}

int main(void)
{
    static const uint32_t running[] = {1, 64, 256, 1024};
    static const uint32_t stages[] = {1, 4};
    printf(" running  stages   plan us  result us events us  total us    median\n");
    for (uint32_t s = 0; s < 2; s++) {
        for (uint32_t r = 0; r < 4; r++)
            measure(running[r], stages[s]);
    }
    return 0;
}
