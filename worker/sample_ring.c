// A ring of drawn tokens by step number: n_slots places a step on the device, and on the host which of them
// are whose. Runs on the device's thread; the executor owns it.
#include "worker/sample_ring.h"

#include <stdbool.h>
#include <stdlib.h>

enum { RING = MAX_STEP_HISTORY + 1 };

struct sample_ring {
    struct device *device;
    const struct kernel_ops *ops;
    uint32_t n_slots;
    int32_t *tokens; // [device] [RING][n_slots]
    struct {
        bool used;
        uint64_t number;
        struct step_draws draws;
    } steps[RING];
    uint32_t row_first[RING][MAX_STEP_ROWS + 1];
};

uint64_t sample_ring_plan_bytes(uint32_t n_slots)
{
    return (uint64_t)RING * n_slots * sizeof(int32_t);
}

int sample_ring_new(struct sample_ring **out, struct device *device, uint32_t n_slots)
{
    struct sample_ring *ring = calloc(1, sizeof(*ring));
    if (!ring)
        return STATUS_NO_MEMORY;
    ring->device = device;
    ring->ops = device_ops(device);
    ring->n_slots = n_slots;
    ring->tokens = ring->ops->alloc(device, sample_ring_plan_bytes(n_slots));
    if (!ring->tokens) {
        sample_ring_free(ring);
        return STATUS_NO_MEMORY;
    }
    *out = ring;
    return STATUS_OK;
}

void sample_ring_free(struct sample_ring *ring)
{
    if (ring && ring->tokens)
        ring->ops->free(ring->device, ring->tokens);
    free(ring);
}

int32_t *sample_ring_tokens(const struct sample_ring *ring)
{
    return ring->tokens;
}

struct step_draws *sample_ring_begin(struct sample_ring *ring, const struct step_plan *plan)
{
    uint32_t at = plan->number % RING, count = 0;
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        ring->row_first[at][i] = count;
        count += plan->rows[i].draws;
    }
    ring->row_first[at][plan->n_rows] = count;
    ring->steps[at].draws = (struct step_draws){.count = count,
                                                .first = at * ring->n_slots,
                                                .n_rows = plan->n_rows,
                                                .row_first = ring->row_first[at]};
    ring->steps[at].number = plan->number;
    ring->steps[at].used = true;
    return &ring->steps[at].draws;
}

struct step_draws *sample_ring_step(struct sample_ring *ring, uint64_t number)
{
    uint32_t at = number % RING;
    return ring->steps[at].used && ring->steps[at].number == number ? &ring->steps[at].draws : NULL;
}

int sample_ring_source(struct sample_ring *ring, const struct step_row *row, int32_t *source,
                       struct error *error)
{
    const struct step_draws *draws = sample_ring_step(ring, row->source_step);
    bool there = draws && row->source_row < draws->n_rows &&
                 row->source_draw < draws->row_first[row->source_row + 1] - draws->row_first[row->source_row];
    if (!there)
        return error_set(error, STATUS_CORRUPT,
                         "a row of slot %u takes draw %u of row %u of step %llu, which drew no such token",
                         row->slot, row->source_draw, row->source_row, (unsigned long long)row->source_step);
    *source = (int32_t)(draws->first + draws->row_first[row->source_row] + row->source_draw);
    return STATUS_OK;
}
