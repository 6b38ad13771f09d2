// Norm, ffn_activate and the making of activations at the AVX2 level. Sums of a row run in eight f64 lanes,
// in an order that the width alone fixes. Called from the executor's thread; rows and spans go to the compute
// threads.
#include "kernels/cpu/cpu_avx2.h"
#include "kernels/cpu/cpu_rows.h"

static inline __m256 load_first(const float *values, uint32_t count)
{
    return count >= 8 ? _mm256_loadu_ps(values) : _mm256_maskload_ps(values, cpu_lanes_avx2(count));
}

static inline void store_first(float *values, uint32_t count, __m256 v)
{
    if (count >= 8)
        _mm256_storeu_ps(values, v);
    else
        _mm256_maskstore_ps(values, cpu_lanes_avx2(count), v);
}

static inline __m256 absolute(__m256 v)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
}

static inline float greatest(__m256 v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

// Quantizes 16 values, rounding to nearest even; returns the sum of the codes.
static inline int store_16(int8_t *q, __m256 low, __m256 high, float inverse)
{
    __m256 factor = _mm256_set1_ps(inverse);
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(low, factor)),
            b = _mm256_cvtps_epi32(_mm256_mul_ps(high, factor));
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)q, bytes);
    __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 1)));
}

static inline void store_half(struct cpu_q8_block *block, int half, __m256 low, __m256 high)
{
    float most = greatest(_mm256_max_ps(absolute(low), absolute(high)));
    // Below this the quotient would overflow: such values are zero for all purposes.
    float inverse = most > 1e-30f ? 127 / most : 0;
    int sum = store_16(block->q + 16 * half, low, high, inverse);
    block->scale[half] = most > 1e-30f ? most / 127 : 0;
    block->scaled_sum[half] = block->scale[half] * (float)sum;
    block->minus_sum[half] = -sum;
}

// One block of `count` <= 32 values; those behind the count are zero.
static inline void store_block(struct cpu_q8_block *block, const float *values, uint32_t count)
{
    __m256 v[4];
    for (uint32_t i = 0; i < 4; i++)
        v[i] = count > 8 * i ? load_first(values + 8 * i, count - 8 * i) : _mm256_setzero_ps();
    store_half(block, 0, v[0], v[1]);
    store_half(block, 1, v[2], v[3]);
    block->scaled_total = block->scaled_sum[0] + block->scaled_sum[1];
}

void cpu_store_span_avx2(const struct activation *activation, uint32_t row, uint32_t first, uint32_t count,
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

static double sum_lanes(__m256d a, __m256d b)
{
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(a, b));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

static double mean_of(const float *x, uint32_t width)
{
    __m256d low = _mm256_setzero_pd(), high = low;
    for (uint32_t i = 0; i < width; i += 8) {
        __m256 v = load_first(x + i, width - i);
        low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
        high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    }
    return sum_lanes(low, high) / width;
}

// Mean of (x - mean)^2; the differences in f32, as they are scaled.
static double mean_square(const float *x, uint32_t width, float mean)
{
    __m256d low = _mm256_setzero_pd(), high = low;
    for (uint32_t i = 0; i < width; i += 8) {
        __m256 v = _mm256_sub_ps(load_first(x + i, width - i), _mm256_set1_ps(mean));
        if (width - i < 8)
            v = _mm256_and_ps(v, _mm256_castsi256_ps(cpu_lanes_avx2(width - i)));
        __m256d v0 = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
        __m256d v1 = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
        low = _mm256_fmadd_pd(v0, v0, low);
        high = _mm256_fmadd_pd(v1, v1, high);
    }
    return sum_lanes(low, high) / width;
}

static void norm_row(const struct norm_args *args, const float *x, float *values)
{
    uint32_t width = args->out->width;
    float mean = args->kind == NORM_LAYER ? (float)mean_of(x, width) : 0;
    float scale = (float)(1 / sqrt(mean_square(x, width, mean) + args->epsilon));
    for (uint32_t i = 0; i < width; i += 8) {
        __m256 v = _mm256_sub_ps(load_first(x + i, width - i), _mm256_set1_ps(mean));
        v = _mm256_mul_ps(_mm256_mul_ps(v, _mm256_set1_ps(scale)), load_first(args->weight + i, width - i));
        if (args->bias)
            v = _mm256_add_ps(v, load_first(args->bias + i, width - i));
        store_first(values + i, width - i, v);
    }
}

void cpu_norm_avx2(struct device *device, struct activation *out, const float *x, const uint32_t *index,
                   uint32_t rows, enum norm_kind kind, const float *weight, const float *bias, float epsilon)
{
    struct norm_args args = {cpu_device_of(device), out, x, weight, bias, index, kind, epsilon, norm_row};
    cpu_norm_rows(&args, rows);
}

// --- activation functions ---

// x / (1 + e^-y): silu for y = x, and GELU's tanh form for y = 2 sqrt(2 / pi) (x + 0.044715 x^3).
static inline __m256 gate(__m256 x, __m256 y)
{
    __m256 minus = _mm256_sub_ps(_mm256_setzero_ps(), y);
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1), cpu_exp_avx2(minus)));
}

static void ffn_span(const float *gates, const float *up, float *values, uint32_t count)
{
    for (uint32_t i = 0; i < count; i += 8) {
        __m256 u = load_first(up + i, count - i), v;
        if (gates) {
            __m256 g = load_first(gates + i, count - i);
            v = _mm256_mul_ps(gate(g, g), u);
        } else {
            __m256 cube = _mm256_mul_ps(_mm256_mul_ps(u, u), u);
            __m256 inner = _mm256_fmadd_ps(_mm256_set1_ps(0.044715f), cube, u);
            v = gate(u, _mm256_mul_ps(_mm256_set1_ps(1.5957691216057308f), inner));
        }
        store_first(values + i, count - i, v);
    }
}

void cpu_ffn_activate_avx2(struct device *device, struct activation *out, const float *gate_rows,
                           const float *up, uint32_t stride, uint32_t rows)
{
    struct ffn_args args = {cpu_device_of(device), out, gate_rows, up, stride, ffn_span};
    cpu_ffn_rows(&args, rows);
}
