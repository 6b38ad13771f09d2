// One request on its way through the coordinator: what was asked, its tokens so far, and the state machine of
// each of its choices. Owned by the scheduler from submission to its last event; never touched by gRPC
// threads.
//
//        submit          admit_next       plan_chunk (last)     last choice ends
//   (new) ----> WAITING ----------> PREFILL --------------> RUNNING ---------> DONE
//                  |   slots, pages    |   choices decode, or  |                 ^
//                  |   set aside       |   scores are awaited  |                 |
//                  +-------------------+-----------------------+-----------------+
//                    scheduler_end_entry: cancel, deadline, pool lost
#ifndef STRATA_REQUEST_H
#define STRATA_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "common/limits.h"
#include "common/sampling.h"
#include "common/status.h"
#include "common/step_plan.h"

// What was asked, checked and tokenized: the service fills it, the scheduler keeps it. All memory behind it
// belongs to the struct; request_free releases it.
struct request {
    uint64_t id;         // unique in this process; names the request in every event
    char *name;          // the client's or our request id, for log lines
    int32_t *prompt;     // [n_prompt]
    uint32_t n_prompt;   // 1 .. context - 1 (context when max_tokens is 0)
    uint32_t max_tokens; // per choice; 0 is allowed (score only)
    uint32_t n_choices;
    struct sampling_params sampling; // seed drawn already
    struct logit_bias *biases;
    uint32_t n_biases;
    int32_t *end_ids; // ids that end a choice: the model's (unless ignored) and the stop ids; sorted
    uint32_t n_end_ids;
    bool logprobs;
    uint32_t top_logprobs;
    bool prompt_logprobs;
    uint32_t credit; // tokens (of all choices) the stream has room for at the start
    int64_t arrived_us;
    int64_t deadline_us; // INT64_MAX = none
};

enum request_state { REQUEST_WAITING, REQUEST_PREFILL, REQUEST_RUNNING, REQUEST_DONE };

struct request *
request_new(void); // zeroed, with SAMPLING_DEFAULTS, one choice, no deadline; NULL when memory is out
void request_free(struct request *request);

// Whether the scheduler can take it: every count and id in range. STATUS_INVALID with a sentence.
int request_check(const struct request *request, uint32_t context, uint32_t vocab_size, struct error *error);
// Tokens that one choice can get: max_tokens, or what is left of the context.
uint32_t request_max_outputs(const struct request *request, uint32_t context);
// Positions whose keys and values one choice needs at most (the last token drawn needs none).
uint32_t request_positions(const struct request *request, uint32_t context);
// KV pages that all its choices need at most, those that hold nothing but prompt counted once.
uint64_t request_pages(const struct request *request, uint32_t context);

#endif
