// The layout of a KV page on the CPU, the same at every level, and what attention_LEVEL.c gives
// cpu_attention.c.
//
// A page holds, head after head, K as [head_size][64] and V as [64][padded head_size], in half precision. So
// the lanes of a vector are positions while scores are computed and dimensions while values are mixed, and
// both are the same product: rows of floats times a matrix of halves. V's rows are padded to 16 dimensions;
// what lies in the padding is never stored anywhere.
#ifndef STRATA_ATTENTION_INTERNAL_H
#define STRATA_ATTENTION_INTERNAL_H

#include "kernels/cpu/cpu_internal.h"

enum { KV_LANES = 16 };

static inline uint32_t kv_padded_size(uint32_t head_size)
{
    return (head_size + KV_LANES - 1) / KV_LANES * KV_LANES;
}

// Halves from one head of a page to the next; K comes first.
static inline size_t kv_head_stride(uint32_t head_size)
{
    return (size_t)KV_PAGE_POSITIONS * (head_size + kv_padded_size(head_size));
}

static inline uint16_t *kv_page_head(const struct kv_layer *kv, uint32_t page, uint32_t head,
                                     uint32_t head_size)
{
    return (uint16_t *)((uint8_t *)kv->data + page * kv->page_bytes) + head * kv_head_stride(head_size);
}

static inline uint16_t *kv_head_values(uint16_t *head, uint32_t head_size)
{
    return head + (size_t)KV_PAGE_POSITIONS * head_size;
}

// A running softmax of one query: [padded head_size] sums of weighted values, then the largest score and the
// sum of weights.
enum { STATE_MAX = 0, STATE_SUM = 1, STATE_EXTRA = 16 /* floats behind the values */ };

struct attention_kernels {
    uint32_t most_rows; // of one call of multiply
    bool widens;        // wants a page of many queries as floats
    // out[i][c] (+)= sum over k in [first, end), ascending, of a[i][k] * b[k][c]; c < columns, a multiple of
    // 16, is also the stride of b. b is of floats if wide, else of halves.
    void (*multiply)(float *const *out, const float *const *a, uint32_t rows, const void *b, bool wide,
                     uint32_t columns, uint32_t first, uint32_t end, bool accumulate);
    void (*widen)(float *to, const uint16_t *from, size_t count); // count a multiple of 16
    // Takes the scores of a page's positions [first, end) into the state: scales them, turns them into
    // weights in place, and fits the sums of values to the new maximum. Other positions' scores are not
    // looked at.
    void (*soften)(float *scores, float *state, uint32_t padded, float scale, uint32_t first, uint32_t end);
    void (*merge)(float *total, const float *part, uint32_t padded); // total, part: states
    void (*finish)(float *out, const float *state, uint32_t padded); // out [padded]
};

extern const struct attention_kernels attention_portable, attention_avx2, attention_avx512;

#endif
