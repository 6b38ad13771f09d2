// A ring of drawn tokens by step number. Its arrays grow in the first steps and then stay. Runs on the
// device's thread; the executor owns it.
#include "worker/sample_ring.h"

#include <stdbool.h>
#include <stdlib.h>

enum { RING = MAX_STEP_HISTORY + 1 };

struct sample_ring {
    struct {
        bool used;
        uint64_t number;
        uint32_t capacity;
        struct step_draws draws;
    } steps[RING];
    uint32_t row_first[RING][MAX_STEP_ROWS + 1];
};

int sample_ring_new(struct sample_ring **out)
{
    *out = calloc(1, sizeof(**out));
    return *out ? STATUS_OK : STATUS_NO_MEMORY;
}

void sample_ring_free(struct sample_ring *ring)
{
    for (int i = 0; ring && i < RING; i++)
        free(ring->steps[i].draws.tokens);
    free(ring);
}

struct step_draws *sample_ring_begin(struct sample_ring *ring, const struct step_plan *plan)
{
    uint32_t at = plan->number % RING, count = 0;
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        ring->row_first[at][i] = count;
        count += plan->rows[i].draws;
    }
    ring->row_first[at][plan->n_rows] = count;
    struct step_draws *draws = &ring->steps[at].draws;
    if (count > ring->steps[at].capacity) {
        int32_t *tokens = realloc(draws->tokens, count * sizeof(*tokens));
        if (!tokens)
            return NULL;
        draws->tokens = tokens;
        ring->steps[at].capacity = count;
    }
    draws->count = count;
    draws->n_rows = plan->n_rows;
    draws->row_first = ring->row_first[at];
    ring->steps[at].number = plan->number;
    ring->steps[at].used = true;
    return draws;
}

struct step_draws *sample_ring_step(struct sample_ring *ring, uint64_t number)
{
    uint32_t at = number % RING;
    return ring->steps[at].used && ring->steps[at].number == number ? &ring->steps[at].draws : NULL;
}

int sample_ring_token(struct sample_ring *ring, const struct step_row *row, int32_t *token,
                      struct error *error)
{
    const struct step_draws *draws = sample_ring_step(ring, row->source_step);
    bool there = draws && row->source_row < draws->n_rows &&
                 row->source_draw < draws->row_first[row->source_row + 1] - draws->row_first[row->source_row];
    if (!there)
        return error_set(error, STATUS_CORRUPT,
                         "a row of slot %u takes draw %u of row %u of step %llu, which drew no such token",
                         row->slot, row->source_draw, row->source_row, (unsigned long long)row->source_step);
    *token = draws->tokens[draws->row_first[row->source_row] + row->source_draw];
    return STATUS_OK;
}
