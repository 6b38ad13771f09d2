// The end of a step on the last stage: logits of the rows somebody wants, their scores and samples, gathered
// into the step's result. Rows of logits exist only a group at a time. Everything is queued when the step is
// submitted and fetched into memory of that step; the result is put together once the device got there. Part
// of the executor.
#ifndef STRATA_STEP_HEAD_H
#define STRATA_STEP_HEAD_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/kernels.h"
#include "worker/decoder.h"
#include "worker/executor.h"
#include "worker/sample_ring.h"
#include "worker/workspace.h"

struct step_head;

int step_head_new(struct step_head **out, struct device *device, const struct workspace *ws,
                  const struct step_bounds *bounds);
void step_head_free(struct step_head *head);
void step_head_set_tap(struct step_head *head, executor_tap *tap, void *context);

// A step stays in its place, number % EXECUTOR_DEPTH, from its listing to its report.

// Lists the rows of the plan's batch whose logits are wanted (the tokens are valid until the next call).
struct head_rows step_head_list(struct step_head *head, const struct step_plan *plan,
                                const struct step_draws *draws);
// Queues their logits (unless they are there already: `computed`), scores, samples and fetches: the residual
// holds the rows in that order. The draws go to `drawn` [device].
void step_head_queue(struct step_head *head, uint64_t number, const struct decoder *decoder,
                     struct workspace *ws, struct sampler *sampler, int32_t *drawn, bool computed);

// When the device got there:
const int32_t *step_head_drawn(const struct step_head *head, uint64_t number); // on the host
int step_head_report(const struct step_head *head, uint64_t number, struct step_result *result);

#endif
