// Shared by the files of the executor: executor.c (steps), executor_warm_up.c and executor_measure.c (what
// runs before the first one).
#ifndef STRATA_EXECUTOR_INTERNAL_H
#define STRATA_EXECUTOR_INTERNAL_H

#include "worker/decoder.h"
#include "worker/executor.h"
#include "worker/kv_cache.h"
#include "worker/sample_ring.h"
#include "worker/slot_table.h"
#include "worker/step_head.h"
#include "worker/step_times.h"
#include "worker/workspace.h"

struct unfinished { // a step that was submitted
    uint64_t mark;  // reached when it is over
    struct step_stamps stamps;
    bool reports; // last stage: rows were computed
};

struct executor {
    struct device *device;
    const struct kernel_ops *ops;
    uint64_t epoch;
    uint32_t stage, n_stages, width;
    bool first, last;
    struct step_bounds bounds;
    struct kv_cache *kv;
    struct workspace *ws;
    struct decoder *decoder;
    struct sampler *sampler;  // last stage
    struct step_head *head;   // last stage
    struct sample_ring *ring; // first and last stage
    struct slot_state *slots;
    uint32_t n_layers;
    struct link *to_next, *from_previous;
    uint64_t next_number;                    // to submit
    uint64_t next_finished;                  // to finish
    struct unfinished steps[EXECUTOR_DEPTH]; // by number
    struct step_times times;                 // of the last one that was finished
    struct step_stamps stamps;               // of the submit at hand
    uint64_t next_feedback; // first step whose draws have not come back (first of several stages)
    bool failed;
};

// The step at hand.
struct work {
    const struct step_plan *plan;
    struct unfinished *step;
    const struct step_draws *draws; // first and last stage
    struct step_inputs inputs;      // [device]
    struct batch batch;             // padded
    uint32_t n_tokens;              // of the plan
    bool program;                   // the batch is one that can be recorded
    bool feeds;                     // some tokens come from the ring
    struct head_rows head;          // last stage
};

// --- executor.c ---
uint32_t executor_most_generated(const struct step_bounds *bounds); // rows of generated tokens in a step
uint32_t executor_padded_size(const struct executor *executor, uint32_t n);
// `count` positions of the padding's slot, from token `first` and position 0 on.
void executor_spell_padding(const struct executor *executor, const struct step_inputs *inputs, uint32_t first,
                            uint32_t count);
// Brings what was spelled out in the host's inputs to the device.
void executor_upload_batch(struct executor *executor, struct work *work, uint32_t n_tokens, uint32_t n_spans,
                           uint32_t n_generated);
// Spells the rows of a plan out position by position, and the padding.
int executor_make_batch(struct executor *executor, struct work *work, struct error *error);
// The stage's layers, and what comes before and after them.
void executor_compute(struct executor *executor, const struct work *work);
void executor_compute_or_replay(struct executor *executor, const struct work *work);

#endif
