// Work on one head's row on its way into a KV page: normalization, rotation, rounding. Plain C;
// kv_rows_portable.c, _avx2.c and _avx512.c each compile this text for their level. Nothing is contracted and
// the sums have one order, so all levels give the same bits. Pure functions; any thread.
#ifndef STRATA_KV_ROWS_INTERNAL_H
#define STRATA_KV_ROWS_INTERNAL_H

#include "kernels/cpu/attention_internal.h"

struct kv_rows {
    // x = x / rms(x) * weight
    void (*normalize)(float *x, const float *weight, uint32_t size, float epsilon);
    // Pairs (2i, 2i+1), or (i, i + half) when `halves`, turn by the angle whose cosine and sine are given.
    void (*rotate)(float *x, const float *cosines, const float *sines, uint32_t half, bool halves);
    void (*store_key)(uint16_t *keys, const float *x, uint32_t size); // a column: one value every 64
    void (*store_value)(uint16_t *values, const float *x, uint32_t size);
};

extern const struct kv_rows kv_rows_portable, kv_rows_avx2, kv_rows_avx512;

#ifdef KV_ROWS_LEVEL // the rest is for the three files that define it

static void rows_normalize(float *x, const float *weight, uint32_t size, float epsilon)
{
    double lane[8] = {0}, sum = 0;
    uint32_t i = 0;
    for (; i + 8 <= size; i += 8)
        for (uint32_t j = 0; j < 8; j++)
            lane[j] += (double)x[i + j] * x[i + j];
    for (uint32_t j = 0; i + j < size; j++)
        lane[j] += (double)x[i + j] * x[i + j];
    for (uint32_t j = 0; j < 8; j++)
        sum += lane[j];
    float factor = (float)(1 / sqrt(sum / size + epsilon));
    for (i = 0; i < size; i++)
        x[i] = x[i] * factor * weight[i];
}

static void rows_rotate(float *x, const float *restrict cosines, const float *restrict sines, uint32_t half,
                        bool halves)
{
    if (halves) {
        for (uint32_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + half] = a * sines[i] + b * cosines[i];
        }
        return;
    }
    for (uint32_t i = 0; i < half; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cosines[i] - b * sines[i];
        x[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
}

// Values beyond the range of halves become its largest: an infinity would make NaNs of the weights that are
// 0.
static inline uint16_t rows_round(float x)
{
    x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    return cpu_f32_to_f16(x);
}

static void rows_store_key(uint16_t *keys, const float *x, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++)
        keys[(size_t)i * KV_PAGE_POSITIONS] = rows_round(x[i]);
}

static void rows_store_value(uint16_t *values, const float *x, uint32_t size)
{
    for (uint32_t i = 0; i < size; i++)
        values[i] = rows_round(x[i]);
}

const struct kv_rows KV_ROWS_LEVEL = {.normalize = rows_normalize,
                                      .rotate = rows_rotate,
                                      .store_key = rows_store_key,
                                      .store_value = rows_store_value};

#endif
#endif
