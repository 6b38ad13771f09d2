// One request on its way through the coordinator: what was asked, its tokens so far, and the state machine of
// each of its choices. Owned by the scheduler from submission to its last event; never touched by gRPC
// threads.
//
//            submit            first chunk planned         last prompt chunk planned
//   (new) ----------> WAITING -------------------> PREFILL -------------------------> RUNNING ----> DONE
//                        \___________________ cancel, deadline, pool lost ______________________/
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

struct request *
request_new(void); // zeroed, with SAMPLING_DEFAULTS, one choice, no deadline; NULL when memory is out
void request_free(struct request *request);

#endif
