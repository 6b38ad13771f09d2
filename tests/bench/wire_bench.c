// What the codec of the pool costs: the plan and the result of a decode step of 64 rows, encoded and decoded,
// as they cross at every token. In time of this thread, the best of many rounds.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "proto/wire.h"

enum { ROWS = 64, ROUNDS = 200, STEPS = 20 };

static double own_time_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static void check(int status, const struct error *error)
{
    if (status == 0)
        return;
    fprintf(stderr, "wire_bench: %s\n", error->text);
    exit(EXIT_FAILURE);
}

static void plan_there_and_back(struct step_plan *plan, struct step_plan *back, struct wire_bytes *bytes,
                                struct arena *arena)
{
    struct error error = {0};
    struct wire_coordinator_message message = {.kind = WIRE_STEP, .plan = plan};
    check(wire_encode_coordinator_message(bytes, &message),
          &(struct error){.text = "the plan cannot be encoded"});
    message.plan = back;
    check(wire_decode_coordinator_message(&message, bytes->data, bytes->length, arena, &error), &error);
}

static void result_there_and_back(struct step_result *result, struct step_result *back,
                                  struct wire_bytes *bytes, struct arena *arena)
{
    struct error error = {0};
    struct wire_worker_message message = {.kind = WIRE_RESULT, .result = result};
    wire_encode_worker_message(bytes, &message);
    message.result = back;
    check(wire_decode_worker_message(&message, bytes->data, bytes->length, arena, &error), &error);
}

int main(void)
{
    struct step_plan plan, plan_back;
    struct step_result result, result_back;
    struct wire_bytes plan_bytes = {0}, result_bytes = {0};
    struct arena arena = {0};
    step_plan_init(&plan);
    step_plan_init(&plan_back);
    step_result_init(&result);
    step_result_init(&result_back);
    for (uint32_t i = 0; i < ROWS; i++) {
        *step_plan_add_row(&plan) = (struct step_row){.slot = i,
                                                      .position = 1000 + i,
                                                      .count = 1,
                                                      .generated = true,
                                                      .from_sample = true,
                                                      .source_step = 99999,
                                                      .source_row = i,
                                                      .draws = 1,
                                                      .logits = STEP_LOGITS_LAST,
                                                      .next_token = -1};
        *step_result_add_sample(&result) = (struct step_sample){.row = i, .token = (int32_t)(1000 * i)};
    }
    double best_plan = 1e9, best_result = 1e9;
    for (int round = 0; round < ROUNDS; round++) {
        double start = own_time_us();
        for (int i = 0; i < STEPS; i++)
            plan_there_and_back(&plan, &plan_back, &plan_bytes, &arena);
        double middle = own_time_us();
        for (int i = 0; i < STEPS; i++)
            result_there_and_back(&result, &result_back, &result_bytes, &arena);
        double end = own_time_us();
        best_plan = middle - start < best_plan ? middle - start : best_plan;
        best_result = end - middle < best_result ? end - middle : best_result;
    }
    printf("%-40s %8s %8s\n", "64 rows, encoded and decoded", "bytes", "us");
    printf("%-40s %8zu %8.1f\n", "plan", plan_bytes.length, best_plan / STEPS);
    printf("%-40s %8zu %8.1f\n", "result", result_bytes.length, best_result / STEPS);
    arena_free(&arena);
    step_plan_free(&plan);
    step_plan_free(&plan_back);
    step_result_free(&result);
    step_result_free(&result_back);
    wire_bytes_free(&plan_bytes);
    wire_bytes_free(&result_bytes);
    return 0;
}
