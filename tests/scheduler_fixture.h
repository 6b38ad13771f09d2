// A scheduler that is driven step by step: requests go in, plans come out, the test answers them as workers
// would, and looks at every event. Its clock is the test's. One scheduler at a time, in epoch 1.
#ifndef STRATA_TESTS_SCHEDULER_FIXTURE_H
#define STRATA_TESTS_SCHEDULER_FIXTURE_H

#include <stdbool.h>
#include <stdint.h>

#include "coordinator/scheduler.h"

enum { VOCABULARY = 100, END_ID = 99 };

extern struct scheduler *scheduler;
extern struct step_plan plan;        // the latest
extern struct scheduler_event event; // the latest
extern int64_t now;
extern uint64_t answered; // steps

extern const struct scheduler_options OPTIONS;

void start_with(const struct scheduler_options *options, uint32_t n_stages, uint32_t n_pages);
void start(uint32_t n_stages, uint32_t n_pages); // with OPTIONS
void finish(void);
struct request *request_of(uint64_t id, uint32_t n_prompt, uint32_t max_tokens);
void submit(struct request *request);
bool plan_next(void);
// A result for the oldest step in flight; every draw gives `token`, the next draw token + 1, and so on.
void make_result(struct step_result *result, uint64_t epoch, int32_t token);
void answer(int32_t token); // with that result
void expect_token(uint64_t request, uint32_t choice, int32_t token);
void expect_choice_end(uint64_t request, uint32_t choice, enum finish_reason reason, int32_t matched);
void expect_request_end(uint64_t request, int status);
void expect_no_event(void);
const struct step_command *find_command(enum step_command_kind kind, uint32_t nth);
struct scheduler_stats stats(void);

#endif
