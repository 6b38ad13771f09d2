// Runs the steps of one epoch on one stage: commands, the batch's inputs, the stage's layers, and on the last
// stage sampling and scoring. A step is submitted, which queues it on the device, and finished when the
// device got there: meanwhile the next ones may be submitted, so that the device never waits for the host.
// Made for an epoch once its weights are cached, thrown away with it. Everything is called by the thread that
// owns the device.
#ifndef STRATA_EXECUTOR_H
#define STRATA_EXECUTOR_H

#include <stdbool.h>
#include <stdint.h>

#include "common/model_spec.h"
#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/kernels.h"
#include "worker/link.h"
#include "worker/step_times.h"
#include "worker/weight_cache.h"
#include "worker/weight_file.h"

struct executor;

struct executor_options {
    struct device *device;
    const struct model_spec *spec;
    const struct weight_list *list; // of this stage; used by executor_new and the planning only
    const struct weight_cache *weights;
    uint64_t epoch;
    uint32_t stage, n_stages, first_layer, n_layers;
    struct step_bounds bounds;
};

// Bytes of the device's memory that an executor takes, known before the weights are loaded: of executor_new,
// and `programs` of the warm-up and the steps.
struct executor_memory {
    uint64_t kv; // n_pages and the padding's
    uint64_t workspace, sampler;
    uint64_t scratch;  // the ops' own: see kernels.h
    uint64_t programs; // recorded steps, and the kernels' code
};
// STATUS_UNSUPPORTED when the device cannot run a model of this shape.
int executor_plan_memory(const struct executor_options *options, struct executor_memory *out,
                         struct error *error);

// One executor a device at a time: programs are the device's, by the number of rows, and executor_free
// forgets all of them.
int executor_new(struct executor **out, const struct executor_options *options, struct error *error);
void executor_free(struct executor *executor);
// Runs what steps will run, once, on the padding's page, so that the first client does not wait for it: a
// long prompt, and every size that a backend which keeps programs records (elsewhere it does nothing). Before
// the first step; leaves no trace in sequences, draws and results.
int executor_warm_up(struct executor *executor, struct error *error);
// What a stage's device takes, in nanoseconds; 0: not measured.
struct stage_speed {
    uint64_t layer_ns; // for one layer, the mean of the stage's, in a step of some generated rows
    uint64_t head_ns;  // last stage: for the norm, the logits and the draws of such a step
};
// Measures, after the warm-up and before the first step, in a fraction of a second; on a device where one
// layer takes very long nothing is measured. All workers of a pool measure with the same number of rows.
// Leaves no trace, as the warm-up.
int executor_measure(struct executor *executor, struct stage_speed *out, struct error *error);
// With more than one stage, before the first step. The executor borrows the links.
void executor_set_links(struct executor *executor, struct link *to_next, struct link *from_previous);

enum {
    EXECUTOR_DROPPED = 1, // the plan was of another epoch: nothing was done
    EXECUTOR_PENDING = 2, // the device is not there yet
    EXECUTOR_DEPTH = 4,   // steps that may be submitted and not yet finished
};

// Queues one step, from its commands to its results. Plans come in order of number, from 0; at most
// EXECUTOR_DEPTH are unfinished. The plan may be reused when the call returns. After a failure the epoch is
// over for this executor: every later step fails too. A link on the host makes the call wait for its
// neighbour and for the device.
int executor_submit(struct executor *executor, const struct step_plan *plan, struct error *error);
// The result of the oldest unfinished step (last stage; elsewhere `result` only gets timings).
// EXECUTOR_PENDING while the device has not got there, unless told to wait.
int executor_finish(struct executor *executor, struct step_result *result, bool wait, struct error *error);
// When the device was where with the step that was finished last.
const struct step_times *executor_times(const struct executor *executor);
uint32_t executor_unfinished(const struct executor *executor);
// Submits a step and waits for it; no other may be unfinished.
int executor_run(struct executor *executor, const struct step_plan *plan, struct step_result *result,
                 struct error *error);

// Shows every row of logits that a step computes (last stage): of the token at `position` of row `row`. For
// accuracy work and tests; NULL turns it off.
typedef void executor_tap(void *context, uint32_t row, uint32_t position, const float *logits,
                          uint32_t vocab);
void executor_set_tap(struct executor *executor, executor_tap *tap, void *context);

#endif
