// The tokens that recent steps drew, so that a row can name one as its input before the coordinator knows it.
// Kept by the first stage (which reads them) and the last (which fills them and sends them on). Holds the
// current step and MAX_STEP_HISTORY before it. Belongs to the device's thread.
#ifndef STRATA_SAMPLE_RING_H
#define STRATA_SAMPLE_RING_H

#include <stdint.h>

#include "common/status.h"
#include "common/step_plan.h"

struct sample_ring;

struct step_draws {  // of one step, in the order of its rows and their draws
    uint32_t count;  // tokens drawn
    int32_t *tokens; // [count]
    uint32_t n_rows;
    uint32_t *row_first; // [n_rows + 1]: into tokens
};

int sample_ring_new(struct sample_ring **out);
void sample_ring_free(struct sample_ring *ring);

// Makes room for the draws of the plan's step, forgetting the oldest one. NULL when memory is out.
struct step_draws *sample_ring_begin(struct sample_ring *ring, const struct step_plan *plan);
// The draws of an earlier step that is still held; NULL otherwise.
struct step_draws *sample_ring_step(struct sample_ring *ring, uint64_t number);
// The token that a from_sample row names.
int sample_ring_token(struct sample_ring *ring, const struct step_row *row, int32_t *token,
                      struct error *error);

#endif
