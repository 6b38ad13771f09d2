// Attention's inner loops on 8 lanes: attention_simd_internal.h, compiled for AVX2, FMA and F16C. Pure
// functions; any thread.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

enum { V_WIDTH = 8, V_COUNT = 2 };
typedef __m256 v_float;
#define v_set(x) _mm256_set1_ps(x)
#define v_load(p) _mm256_loadu_ps(p)
#define v_store(p, x) _mm256_storeu_ps(p, x)
#define v_load_halves(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define v_add(a, b) _mm256_add_ps(a, b)
#define v_sub(a, b) _mm256_sub_ps(a, b)
#define v_mul(a, b) _mm256_mul_ps(a, b)
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define v_max(a, b) _mm256_max_ps(a, b)
#define v_first(x) _mm256_cvtss_f32(x)

// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r fitted for the least relative error.
static inline v_float v_exp(v_float x)
{
    v_float gone = _mm256_cmp_ps(x, v_set(-87.0f), _CMP_LT_OQ);
    v_float bounded = v_max(v_set(-87.0f), x); // a NaN passes: max returns its second operand
    v_float n =
        _mm256_round_ps(v_mul(bounded, v_set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    v_float r = _mm256_fnmadd_ps(n, v_set(0x1.62e4p-1f), bounded);
    r = _mm256_fnmadd_ps(n, v_set(0x1.7f7d1cp-20f), r);
    v_float p = v_fma(v_set(0.00138145395f), r, v_set(0.00836874545f));
    p = v_fma(p, r, v_set(0.0416683890f));
    p = v_fma(p, r, v_set(0.166665211f));
    p = v_fma(p, r, v_set(0.49999994f));
    p = v_fma(p, v_mul(r, r), r);
    p = v_add(p, v_set(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(gone, v_mul(p, _mm256_castsi256_ps(power)));
}

static inline v_float v_keep(v_float x, uint32_t lane, uint32_t first, uint32_t end, v_float other)
{
    __m256i numbers =
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)lane));
    __m256i kept = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)first), numbers),
                                       _mm256_cmpgt_epi32(_mm256_set1_epi32((int)end), numbers));
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(kept));
}

static inline float v_sum(v_float x)
{
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

static inline float v_largest(v_float x)
{
    __m128 max = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    return _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
}

#include "kernels/cpu/attention_simd_internal.h"

const struct attention_kernels attention_avx2 = ATTENTION_KERNELS;
