// Attention's inner loops on 16 lanes: attention_simd_internal.h, compiled for AVX-512. Pure functions; any
// thread.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

enum { V_WIDTH = 16, V_COUNT = 4 };
typedef __m512 v_float;
#define v_set(x) _mm512_set1_ps(x)
#define v_load(p) _mm512_loadu_ps(p)
#define v_store(p, x) _mm512_storeu_ps(p, x)
#define v_load_halves(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define v_add(a, b) _mm512_add_ps(a, b)
#define v_sub(a, b) _mm512_sub_ps(a, b)
#define v_mul(a, b) _mm512_mul_ps(a, b)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define v_max(a, b) _mm512_max_ps(a, b)
#define v_first(x) _mm512_cvtss_f32(x)

// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r fitted for the least relative error.
static inline v_float v_exp(v_float x)
{
    __mmask16 gone = _mm512_cmp_ps_mask(x, v_set(-87.0f), _CMP_LT_OQ);
    v_float n =
        _mm512_roundscale_ps(v_mul(x, v_set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    v_float r = _mm512_fnmadd_ps(n, v_set(0x1.62e4p-1f), x);
    r = _mm512_fnmadd_ps(n, v_set(0x1.7f7d1cp-20f), r);
    v_float p = v_fma(v_set(0.00138145395f), r, v_set(0.00836874545f));
    p = v_fma(p, r, v_set(0.0416683890f));
    p = v_fma(p, r, v_set(0.166665211f));
    p = v_fma(p, r, v_set(0.49999994f));
    p = v_fma(p, v_mul(r, r), r);
    p = v_add(p, v_set(1.0f));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), gone, v_set(0));
}

static inline v_float v_keep(v_float x, uint32_t lane, uint32_t first, uint32_t end, v_float other)
{
    __m512i numbers =
        _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32((int)lane));
    __mmask16 kept = _mm512_cmpge_epi32_mask(numbers, _mm512_set1_epi32((int)first)) &
                     _mm512_cmplt_epi32_mask(numbers, _mm512_set1_epi32((int)end));
    return _mm512_mask_mov_ps(other, kept, x);
}

static inline float v_sum(v_float x)
{
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

static inline float v_largest(v_float x)
{
    __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 max = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    return _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
}

#include "kernels/cpu/attention_simd_internal.h"

const struct attention_kernels attention_avx512 = ATTENTION_KERNELS;
