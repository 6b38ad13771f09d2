// Attention's inner loops for vectors of any width: attention_avx2.c and attention_avx512.c define the vector
// operations below and compile this text.
//
//   V_WIDTH, V_COUNT          floats a vector; vectors of one row that multiply keeps in registers
//   v_float                   the type; v_set, v_load, v_store, v_load_halves, v_add, v_sub, v_mul, v_max and
//   v_fma (a * b + c) do as their names say, v_first gives lane 0
//   v_exp(x)                  e^x for x <= 0 within 2 ulp, 0 below e^-87, NaN for NaN
//   v_keep(x, lane, first, end, other)  lanes numbered from `lane`: x where first <= number < end, else other
//   v_sum(x), v_largest(x)    over the lanes, in one fixed order
//
// Every output element is one chain of fused multiply-adds in ascending order, whatever the shape of the
// call.
#ifndef STRATA_ATTENTION_SIMD_INTERNAL_H
#define STRATA_ATTENTION_SIMD_INTERNAL_H

#include "kernels/cpu/attention_internal.h"

enum { MOST_ROWS = 6, AHEAD_BYTES = 2048 /* how far ahead memory is asked for */ };

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE v_float load_b(const void *b, size_t at, bool wide)
{
    return wide ? v_load((const float *)b + at) : v_load_halves((const uint16_t *)b + at);
}

// `rows` x `count` vectors of the product, kept in registers: all but the ranges are constants where it is
// called.
ALWAYS_INLINE void multiply_tile(float *const *out, const float *const *a, const uint32_t rows, const void *b,
                                 const bool wide, uint32_t column, const uint32_t count, uint32_t stride,
                                 uint32_t first, uint32_t end, bool accumulate)
{
    v_float sum[MOST_ROWS][V_COUNT], factor[V_COUNT];
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t v = 0; v < count; v++)
            sum[i][v] = accumulate ? v_load(out[i] + column + v * V_WIDTH) : v_set(0);
    for (uint32_t k = first; k < end; k++) {
        if (!wide) { // a page is read once or twice, and the next 4 KB are nobody's guess
            const char *ahead =
                (const char *)b + ((size_t)k * stride + column) * sizeof(uint16_t) + AHEAD_BYTES;
            __builtin_prefetch(ahead);
            if (count * V_WIDTH > 32)
                __builtin_prefetch(ahead + 64);
        }
        for (uint32_t v = 0; v < count; v++)
            factor[v] = load_b(b, (size_t)k * stride + column + v * V_WIDTH, wide);
        for (uint32_t i = 0; i < rows; i++) {
            v_float x = v_set(a[i][k]);
            for (uint32_t v = 0; v < count; v++)
                sum[i][v] = v_fma(x, factor[v], sum[i][v]);
        }
    }
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t v = 0; v < count; v++)
            v_store(out[i] + column + v * V_WIDTH, sum[i][v]);
}

ALWAYS_INLINE void multiply_rows(float *const *out, const float *const *a, const uint32_t rows, const void *b,
                                 const bool wide, uint32_t columns, uint32_t first, uint32_t end,
                                 bool accumulate)
{
    uint32_t column = 0;
    for (; column + V_COUNT * V_WIDTH <= columns; column += V_COUNT * V_WIDTH)
        multiply_tile(out, a, rows, b, wide, column, V_COUNT, columns, first, end, accumulate);
    for (; column < columns; column += KV_LANES)
        multiply_tile(out, a, rows, b, wide, column, KV_LANES / V_WIDTH, columns, first, end, accumulate);
}

static void multiply(float *const *out, const float *const *a, uint32_t rows, const void *b, bool wide,
                     uint32_t columns, uint32_t first, uint32_t end, bool accumulate)
{
#define ROWS(n)                                                                                              \
    case n:                                                                                                  \
        if (wide)                                                                                            \
            multiply_rows(out, a, n, b, true, columns, first, end, accumulate);                              \
        else                                                                                                 \
            multiply_rows(out, a, n, b, false, columns, first, end, accumulate);                             \
        break
    switch (rows) {
        ROWS(1);
        ROWS(2);
        ROWS(3);
        ROWS(4);
        ROWS(5);
        ROWS(6);
    }
#undef ROWS
}

static void widen(float *to, const uint16_t *from, size_t count)
{
    for (size_t i = 0; i < count; i += V_WIDTH)
        v_store(to + i, v_load_halves(from + i));
}

enum { PAGE_VECTORS = KV_PAGE_POSITIONS / V_WIDTH };

static void soften(float *scores, float *state, uint32_t padded, float scale, uint32_t first, uint32_t end)
{
    float *extra = state + padded;
    v_float score[PAGE_VECTORS], least = v_set(-INFINITY), factor = v_set(scale), largest = least;
    for (uint32_t v = 0; v < PAGE_VECTORS; v++) {
        score[v] = v_mul(v_load(scores + v * V_WIDTH), factor);
        score[v] = v_keep(score[v], v * V_WIDTH, first, end, least);
        largest = v_max(largest, score[v]);
    }
    v_float old_max = v_set(extra[STATE_MAX]), max = v_max(v_set(v_largest(largest)), old_max);
    v_float fit = v_exp(v_sub(old_max, max)), sum = v_set(0), zero = v_set(0);
    for (uint32_t v = 0; v < PAGE_VECTORS; v++) {
        v_float weight = v_keep(v_exp(v_sub(score[v], max)), v * V_WIDTH, first, end, zero);
        v_store(scores + v * V_WIDTH, weight);
        sum = v_add(sum, weight);
    }
    for (uint32_t i = 0; i < padded; i += V_WIDTH)
        v_store(state + i, v_mul(v_load(state + i), fit));
    extra[STATE_SUM] = extra[STATE_SUM] * v_first(fit) + v_sum(sum);
    extra[STATE_MAX] = v_first(max);
}

static void merge(float *total, const float *part, uint32_t padded)
{
    float *total_extra = total + padded;
    const float *part_extra = part + padded;
    v_float total_max = v_set(total_extra[STATE_MAX]), part_max = v_set(part_extra[STATE_MAX]);
    v_float max = v_max(total_max, part_max);
    v_float fit = v_exp(v_sub(total_max, max)), part_fit = v_exp(v_sub(part_max, max));
    for (uint32_t i = 0; i < padded; i += V_WIDTH)
        v_store(total + i, v_fma(v_load(part + i), part_fit, v_mul(v_load(total + i), fit)));
    total_extra[STATE_SUM] =
        total_extra[STATE_SUM] * v_first(fit) + part_extra[STATE_SUM] * v_first(part_fit);
    total_extra[STATE_MAX] = v_first(max);
}

// Adding zero makes one zero of the two.
static void finish(float *out, const float *state, uint32_t padded)
{
    v_float factor = v_set(1.0f / state[padded + STATE_SUM]);
    for (uint32_t i = 0; i < padded; i += V_WIDTH)
        v_store(out + i, v_add(v_mul(v_load(state + i), factor), v_set(0)));
}

#define ATTENTION_KERNELS                                                                                    \
    {                                                                                                        \
        .most_rows = MOST_ROWS, .widens = true, .multiply = multiply, .widen = widen, .soften = soften,      \
        .merge = merge, .finish = finish                                                                     \
    }

#endif
