// The scheduler: decides what each step computes. A pure state machine, (state, events, now) -> (state, step
// plans, events out): no I/O, no clock of its own, no threads. One thread owns it. It keeps every request
// from submission to its end, gives out slots and (through kv_ledger) pages, deals the running sequences to
// micro-batches, plans prompt chunks under a budget beside the decodes, and plans a sequence's next step
// before the last one's tokens are known.
//
// The caller's loop: feed events (submit, cancel, credit, result, pool changes); drain scheduler_next_event;
// call scheduler_plan until it gives nothing; wait for the next event or scheduler_wake_us.
#ifndef STRATA_SCHEDULER_H
#define STRATA_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "common/step_plan.h"
#include "coordinator/request.h"

struct scheduler;

struct scheduler_options {
    uint32_t n_slots; // sequences at once
    uint32_t context; // positions of one sequence
    uint32_t vocab_size;
    uint32_t max_waiting; // requests not yet admitted; over it submit says STATUS_EXHAUSTED
    uint32_t step_budget; // positions in one step: decodes first, prompt chunks in what is left
    uint32_t chunk;       // positions of one prompt chunk at most
};

enum scheduler_event_kind {
    SCHEDULER_TOKEN,  // a choice has one more token (never an end id)
    SCHEDULER_PROMPT, // prompt logprobs of some positions, in ascending order
    SCHEDULER_CHOICE_END,
    SCHEDULER_REQUEST_END // last event of a request: its `struct request` is freed when the next event is
                          // taken
};

enum finish_reason { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_CANCELLED };

struct scheduler_event { // pointers are valid until the next call on the scheduler
    enum scheduler_event_kind kind;
    uint64_t request;
    const struct request *spec;
    uint32_t choice;
    // TOKEN
    int32_t token;
    float logprob;
    const struct token_logprob *tops;
    uint32_t n_tops;
    // PROMPT: positions [position, position + n_scores); scores[i].tops as indices into `tops`
    uint32_t position;
    uint32_t n_scores;
    const struct step_prompt_logprob *scores;
    // CHOICE_END
    enum finish_reason finish;
    int32_t matched_id; // the end id that was drawn, -1 when something else ended it
    // CHOICE_END and REQUEST_END
    uint32_t cached_tokens;
    int64_t started_us; // first planned, 0 = never
    // REQUEST_END
    int status;     // STATUS_OK: every choice ended by itself
    char text[256]; // the sentence when not OK
};

int scheduler_new(struct scheduler **out, const struct scheduler_options *options);
void scheduler_free(struct scheduler *scheduler);

// The pool: ready with these stages and pages under a new epoch, or lost. While lost, nothing is planned. On
// loss every admitted request ends with UNAVAILABLE and `text`; waiting ones keep waiting.
// Ready: a waiting request that could never fit these pages ends with EXHAUSTED. STATUS_INVALID or NO_MEMORY:
// the pool counts as lost.
int scheduler_pool_ready(struct scheduler *scheduler, uint64_t epoch, uint32_t n_stages, uint32_t n_pages,
                         int64_t now_us);
void scheduler_pool_lost(struct scheduler *scheduler, const char *text, int64_t now_us);

// Takes the request (also frees it later) when it returns 0. STATUS_EXHAUSTED: too many wait, or it could
// never fit.
int scheduler_submit(struct scheduler *scheduler, struct request *request, int64_t now_us,
                     struct error *error);
// The client is gone, or its deadline passed, or the server drains: ends what is left of the request. Unknown
// ids are ignored (it may just have ended). `status` and `text` appear in REQUEST_END.
void scheduler_cancel(struct scheduler *scheduler, uint64_t request, int status, const char *text,
                      int64_t now_us);
// The token stream matched a stop string: the choice ends with FINISH_STOP, whatever would have ended it
// next; its tokens still in flight or not yet taken as events are dropped and their credit returns.
void scheduler_stop_choice(struct scheduler *scheduler, uint64_t request, uint32_t choice, int64_t now_us);
// The client's stream took `tokens` tokens.
void scheduler_credit(struct scheduler *scheduler, uint64_t request, uint32_t tokens);
// A step's result, in the order of the steps. One of another epoch is ignored. STATUS_CORRUPT when it is not
// the one expected (the pool is then at fault), STATUS_NO_MEMORY; either way nothing has changed.
int scheduler_result(struct scheduler *scheduler, const struct step_result *result, int64_t now_us,
                     struct error *error);

// Fills `plan` with the next step. False: nothing to do until an event arrives.
bool scheduler_plan(struct scheduler *scheduler, int64_t now_us, struct step_plan *plan);
bool scheduler_next_event(struct scheduler *scheduler, struct scheduler_event *event);
int64_t scheduler_wake_us(const struct scheduler *scheduler); // earliest deadline, INT64_MAX = none

struct scheduler_stats {
    uint32_t waiting, running, slots_used, pages_total, pages_free, steps_in_flight;
    uint64_t steps, prompt_tokens, output_tokens, requests_done;
};
void scheduler_stats(const struct scheduler *scheduler, struct scheduler_stats *out);
// Checks every invariant between requests, slots, ledger and plans in flight; aborts with a message. For
// tests.
void scheduler_check(const struct scheduler *scheduler);

#endif
