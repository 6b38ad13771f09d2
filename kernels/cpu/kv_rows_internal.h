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

enum { ROUND_AT_ONCE = 16 };

// Up to 16 halves. Values beyond their range become the largest of them: an infinity would make NaNs of the
// weights that are 0.
static inline void rows_round(uint16_t *out, const float *x, uint32_t count)
{
#ifdef __F16C__
    if (count == ROUND_AT_ONCE) {
        __m256 most = _mm256_set1_ps(65504.0f), least = _mm256_set1_ps(-65504.0f);
        for (uint32_t i = 0; i < ROUND_AT_ONCE; i += 8) { // min and max give their second operand for a NaN
            __m256 bounded = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(x + i)));
            _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(bounded, _MM_FROUND_TO_NEAREST_INT));
        }
        return;
    }
#endif
    for (uint32_t i = 0; i < count; i++)
        out[i] = cpu_f32_to_f16(x[i] > 65504.0f ? 65504.0f : x[i] < -65504.0f ? -65504.0f : x[i]);
}

static void rows_store_key(uint16_t *keys, const float *x, uint32_t size)
{
    uint16_t halves[ROUND_AT_ONCE];
    for (uint32_t first = 0; first < size; first += ROUND_AT_ONCE) {
        uint32_t count = size - first < ROUND_AT_ONCE ? size - first : ROUND_AT_ONCE;
        rows_round(halves, x + first, count);
        for (uint32_t i = 0; i < count; i++)
            keys[(size_t)(first + i) * KV_PAGE_POSITIONS] = halves[i];
    }
}

static void rows_store_value(uint16_t *values, const float *x, uint32_t size)
{
    for (uint32_t first = 0; first < size; first += ROUND_AT_ONCE)
        rows_round(values + first, x + first, size - first < ROUND_AT_ONCE ? size - first : ROUND_AT_ONCE);
}

const struct kv_rows KV_ROWS_LEVEL = {.normalize = rows_normalize,
                                      .rotate = rows_rotate,
                                      .store_key = rows_store_key,
                                      .store_value = rows_store_value};

#endif
#endif
