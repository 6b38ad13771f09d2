// The end of a step on the last stage: logits of the rows somebody wants, their scores and samples, gathered
// into the step's result. Rows of logits exist only a group at a time. Part of the executor.
#ifndef STRATA_STEP_HEAD_H
#define STRATA_STEP_HEAD_H

#include <stdint.h>

#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/kernels.h"
#include "worker/decoder.h"
#include "worker/executor.h"
#include "worker/sample_ring.h"
#include "worker/workspace.h"

struct step_head;

int step_head_new(struct step_head **out, struct device *device, uint32_t max_positions);
void step_head_free(struct step_head *head);
void step_head_set_tap(struct step_head *head, executor_tap *tap, void *context);

// Lists the token positions of the plan's batch whose logits are wanted, ascending: *tokens (valid until the
// next call), and how many.
uint32_t step_head_list(struct step_head *head, const struct step_plan *plan, const uint32_t **tokens);
// Computes, scores and samples them: the residual holds their rows in that order. Fills `draws` and `result`.
int step_head_run(struct step_head *head, const struct step_plan *plan, const struct decoder *decoder,
                  struct workspace *ws, struct sampler *sampler, struct step_draws *draws,
                  struct step_result *result, struct error *error);

#endif
