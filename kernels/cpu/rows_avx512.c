// Norm, ffn_activate and the making of activations at the AVX-512 level. Sums of a row run in eight f64
// lanes, in an order that the width alone fixes. Called from the executor's thread; rows and spans go to the
// compute threads.
#include "kernels/cpu/cpu_avx512.h"
#include "kernels/cpu/cpu_rows.h"

static inline __mmask16 first_lanes(uint32_t count)
{
    return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
}

static inline void store_half(struct cpu_q8_block *block, int half, __m512 values)
{
    float most = _mm512_reduce_max_ps(_mm512_abs_ps(values));
    // Below this the quotient would overflow: such values are zero for all purposes.
    float inverse = most > 1e-30f ? 127 / most : 0;
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(inverse))); // rounds to nearest even
    _mm_storeu_si128((__m128i *)(block->q + 16 * half), _mm512_cvtsepi32_epi8(q));
    int sum = _mm512_reduce_add_epi32(q);
    block->scale[half] = most > 1e-30f ? most / 127 : 0;
    block->scaled_sum[half] = block->scale[half] * (float)sum;
    block->minus_sum[half] = -sum;
}

// One block of `count` <= 32 values; those behind the count are zero.
static inline void store_block(struct cpu_q8_block *block, const float *values, uint32_t count)
{
    store_half(block, 0, _mm512_maskz_loadu_ps(first_lanes(count), values));
    store_half(block, 1, _mm512_maskz_loadu_ps(count > 16 ? first_lanes(count - 16) : 0, values + 16));
    block->scaled_total = block->scaled_sum[0] + block->scaled_sum[1];
}

void cpu_store_span_avx512(const struct activation *activation, uint32_t row, uint32_t first, uint32_t count,
                           const float *values)
{
    struct cpu_activation_rows rows = cpu_activation_rows(activation);
    if (rows.floats)
        memcpy(rows.floats + row * rows.float_stride + first, values, (size_t)count * 4);
    if (!rows.q8)
        return;
    struct cpu_q8_block *block = (struct cpu_q8_block *)(rows.q8 + row * rows.q8_stride) + first / 32;
    for (uint32_t i = 0; i < count; i += 32, block++)
        store_block(block, values + i, count - i < 32 ? count - i : 32);
}

// --- norm ---

static double sum_lanes(__m512d a, __m512d b)
{
    double lanes[8], sum = 0;
    _mm512_storeu_pd(lanes, _mm512_add_pd(a, b));
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    return sum;
}

static double mean_of(const float *x, uint32_t width)
{
    __m512d low = _mm512_setzero_pd(), high = low;
    for (uint32_t i = 0; i < width; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(first_lanes(width - i), x + i);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    }
    return sum_lanes(low, high) / width;
}

// Mean of (x - mean)^2; the differences in f32, as they are scaled.
static double mean_square(const float *x, uint32_t width, float mean)
{
    __m512d low = _mm512_setzero_pd(), high = low;
    for (uint32_t i = 0; i < width; i += 16) {
        __mmask16 lanes = first_lanes(width - i);
        __m512 v = _mm512_maskz_sub_ps(lanes, _mm512_maskz_loadu_ps(lanes, x + i), _mm512_set1_ps(mean));
        __m512d v0 = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        __m512d v1 = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
        low = _mm512_fmadd_pd(v0, v0, low);
        high = _mm512_fmadd_pd(v1, v1, high);
    }
    return sum_lanes(low, high) / width;
}

static void norm_row(const struct norm_args *args, const float *x, float *values)
{
    uint32_t width = args->out->width;
    float mean = args->kind == NORM_LAYER ? (float)mean_of(x, width) : 0;
    float scale = (float)(1 / sqrt(mean_square(x, width, mean) + args->epsilon));
    for (uint32_t i = 0; i < width; i += 16) {
        __mmask16 lanes = first_lanes(width - i);
        __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, x + i), _mm512_set1_ps(mean));
        v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(scale)),
                          _mm512_maskz_loadu_ps(lanes, args->weight + i));
        if (args->bias)
            v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, args->bias + i));
        _mm512_mask_storeu_ps(values + i, lanes, v);
    }
}

void cpu_norm_avx512(struct device *device, struct activation *out, const float *x, const uint32_t *index,
                     uint32_t rows, enum norm_kind kind, const float *weight, const float *bias,
                     float epsilon)
{
    struct norm_args args = {cpu_device_of(device), out, x, weight, bias, index, kind, epsilon, norm_row};
    cpu_norm_rows(&args, rows);
}

// --- activation functions ---

// x / (1 + e^-y): silu for y = x, and GELU's tanh form for y = 2 sqrt(2 / pi) (x + 0.044715 x^3).
static inline __m512 gate(__m512 x, __m512 y)
{
    __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), y);
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), cpu_exp_avx512(minus)));
}

static void ffn_span(const float *gates, const float *up, float *values, uint32_t count)
{
    for (uint32_t i = 0; i < count; i += 16) {
        __mmask16 lanes = first_lanes(count - i);
        __m512 u = _mm512_maskz_loadu_ps(lanes, up + i), v;
        if (gates) {
            __m512 g = _mm512_maskz_loadu_ps(lanes, gates + i);
            v = _mm512_mul_ps(gate(g, g), u);
        } else {
            __m512 cube = _mm512_mul_ps(_mm512_mul_ps(u, u), u);
            __m512 inner = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, u);
            v = gate(u, _mm512_mul_ps(_mm512_set1_ps(1.5957691216057308f), inner));
        }
        _mm512_mask_storeu_ps(values + i, lanes, v);
    }
}

void cpu_ffn_activate_avx512(struct device *device, struct activation *out, const float *gate_rows,
                             const float *up, uint32_t stride, uint32_t rows)
{
    struct ffn_args args = {cpu_device_of(device), out, gate_rows, up, stride, ffn_span};
    cpu_ffn_rows(&args, rows);
}
