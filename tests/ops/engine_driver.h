// A whole engine in one process, without coordinator and scheduler: one to four stages, each with its own
// device, weights and executor in its own thread, joined by socket links as worker processes are. The caller
// feeds step plans, or lets engine_play make them from jobs.
#ifndef STRATA_TESTS_ENGINE_DRIVER_H
#define STRATA_TESTS_ENGINE_DRIVER_H

#include <stdbool.h>
#include <stdint.h>

#include "common/model_spec.h"
#include "common/sampling.h"
#include "common/status.h"
#include "common/step_plan.h"

enum { ENGINE_WINDOW = 8 }; // plans in flight

typedef void engine_tap(void *context, uint32_t slot, uint32_t position, const float *logits, uint32_t vocab);

struct engine_options { // zeros mean: 1 stage, 1 thread, best level, 32 slots, 256 pages, 1024 context, 512
                        // positions
    const char *model;
    uint32_t n_stages, threads, level, n_slots, n_pages, context, max_positions;
    engine_tap *tap; // called in the last stage's thread for every row of logits
    void *tap_context;
};

struct engine;

int engine_open(struct engine **out, const struct engine_options *options, struct error *error);
void engine_close(struct engine *engine);
const struct model_spec *engine_spec(const struct engine *engine);

// The next plan, empty, with epoch and number set; engine_submit gives it to every stage. Waits while
// ENGINE_WINDOW plans are on their way.
struct step_plan *engine_plan(struct engine *engine);
void engine_submit(struct engine *engine);
// The next step's result, in order. Valid until ENGINE_WINDOW more plans were submitted.
int engine_wait(struct engine *engine, const struct step_result **result, struct error *error);

// A sequence to generate.
struct engine_job {
    const int32_t *prompt;
    uint32_t n_prompt, n_new;
    uint32_t chunk; // positions of a prompt chunk; 0 = all at once
    uint32_t delay; // steps before it starts
    bool score;     // ask for prompt logprobs (and so for logits at every position)
    bool ahead;     // decode rows name the last step's sample instead of carrying its token
    uint32_t top;   // alternatives
    struct sampling_params sampling;
    int32_t *out;        // [n_new]
    float *out_logprobs; // [n_new], may be NULL
    float *scores;       // [n_prompt]: of each prompt token, the first 0; may be NULL
};
// Plays the jobs together, job i in slot i, one row a job in each step. Pages are given out in the order of
// `page_order` (NULL: ascending). Jobs that are not `ahead` are waited for at every step.
int engine_play(struct engine *engine, const struct engine_job *jobs, uint32_t n_jobs,
                const uint32_t *page_order, struct error *error);

// Makes a model (options of tests/tools/models.py, blank separated: "arch=qwen2 mix=q8_0 tied") and the
// oracle's logits for `tokens`. False when there is no python3 with numpy to do it.
bool engine_oracle(const char *options, const int32_t *tokens, uint32_t n_tokens, char *model,
                   size_t capacity, double **logits, size_t *count);

#endif
