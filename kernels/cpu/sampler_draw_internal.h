// Truncation and draw over one row of adjusted logits: sampler_draw.c.
#ifndef STRATA_SAMPLER_DRAW_INTERNAL_H
#define STRATA_SAMPLER_DRAW_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "common/sampling.h"
#include "kernels/cpu/vocab_scan_internal.h"

struct draw_bin;

// Arrays over one row, cut from one worker's scratch.
struct draw_space {
    float *adjusted;          // a copy of the logits to put biases and penalties on
    float *offsets, *weights; // of every token, as vocab_scan's weigh leaves them
    double *block_sums;       // of weights
    float *block_tops;        // of offsets
    int32_t *kept_ids;        // the tokens that may be drawn, ascending
    uint32_t *kept_keys;      // ascending = less likely
    float *kept_weights;
    struct draw_bin *bins;
};

size_t draw_space_bytes(uint32_t vocab);
void draw_space_cut(struct draw_space *out, void *memory, uint32_t vocab); // aligned to 64

// Tokens that can be drawn after temperature, top-k, top-p and min-p; then draws from them.
struct draw_set {
    const struct draw_space *space;
    uint32_t vocab;
    bool truncated; // kept_*[0, n_kept); otherwise all of the vocabulary
    uint32_t n_kept;
    int32_t only; // >= 0: no choice: greedy, or nothing is finite
};

void draw_set_make(struct draw_set *out, const struct vocab_scan *scan, const struct draw_space *space,
                   const float *logits, uint32_t vocab, const struct sampling_params *params);
// The token at `uniform` in [0, 1) of the cumulative distribution, tokens in order of id.
int32_t draw_set_draw(const struct draw_set *set, double uniform);

#endif
