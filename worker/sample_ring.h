// The tokens that recent steps drew, in device memory, so that a row can name one as its input before the
// host knows it. Where a step's tokens lie is known to the host: which rows draw how many stands in the plan.
// Kept by the first stage (which reads them) and the last (which draws them). Holds the current step and
// MAX_STEP_HISTORY before it. Belongs to the device's thread.
#ifndef STRATA_SAMPLE_RING_H
#define STRATA_SAMPLE_RING_H

#include <stdint.h>

#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/kernels.h"

struct sample_ring;

struct step_draws { // of one step, in the order of its rows and their draws
    uint32_t count; // tokens drawn, at most n_slots
    uint32_t first; // their place in the ring
    uint32_t n_rows;
    uint32_t *row_first; // [n_rows + 1]: of each row's draws, from `first` on
};

uint64_t sample_ring_plan_bytes(uint32_t n_slots); // of device memory
int sample_ring_new(struct sample_ring **out, struct device *device, uint32_t n_slots);
void sample_ring_free(struct sample_ring *ring);
int32_t *sample_ring_tokens(const struct sample_ring *ring); // [device]

// Finds the place for the draws of the (validated) plan's step, forgetting the oldest one.
struct step_draws *sample_ring_begin(struct sample_ring *ring, const struct step_plan *plan);
// The draws of an earlier step that is still held; NULL otherwise.
struct step_draws *sample_ring_step(struct sample_ring *ring, uint64_t number);
// The place in the ring of the token that a from_sample row names.
int sample_ring_source(struct sample_ring *ring, const struct step_row *row, int32_t *source,
                       struct error *error);

#endif
