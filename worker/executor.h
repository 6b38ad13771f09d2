// Runs the steps of one epoch on one stage: commands, the batch's inputs, the stage's layers, and on the last
// stage sampling and scoring. Made for an epoch once its weights are cached, thrown away with it. Everything
// is called by the thread that owns the device.
#ifndef STRATA_EXECUTOR_H
#define STRATA_EXECUTOR_H

#include <stdint.h>

#include "common/model_spec.h"
#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/kernels.h"
#include "worker/link.h"
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

// Bytes that executor_new will allocate, known before the weights are loaded.
void executor_plan_bytes(const struct executor_options *options, uint64_t *kv_bytes,
                         uint64_t *workspace_bytes);

int executor_new(struct executor **out, const struct executor_options *options, struct error *error);
void executor_free(struct executor *executor);
// With more than one stage, before the first step. The executor borrows the links.
void executor_set_links(struct executor *executor, struct link *to_next, struct link *from_previous);

enum { EXECUTOR_DROPPED = 1 }; // the plan was of another epoch: nothing was done

// One step, from its commands to its results (last stage; elsewhere `result` only gets timings). Plans come
// in order of number, from 0. After a failure the epoch is over for this executor: every later step fails
// too.
int executor_run(struct executor *executor, const struct step_plan *plan, struct step_result *result,
                 struct error *error);

// Shows every row of logits that a step computes (last stage): of the token at `position` of row `row`. For
// accuracy work and tests; NULL turns it off.
typedef void executor_tap(void *context, uint32_t row, uint32_t position, const float *logits,
                          uint32_t vocab);
void executor_set_tap(struct executor *executor, executor_tap *tap, void *context);

#endif
