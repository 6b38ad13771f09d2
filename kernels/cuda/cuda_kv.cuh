// The layout of a KV page on CUDA. A page holds K of every KV head, then V of every KV head, each head's 64
// positions contiguous, as halves (to nearest, at most +-65504). Head sizes are padded to a multiple of 32
// with zeros, "width" below.
//
// K: [64 positions][width]. V: [32 pairs of positions][width][2], so that a word is what the tensor cores
// want of V: two positions of one dimension. In both, the 16-byte chunks of a row change places by the row's
// number, so that the image of a page in shared memory is read without bank conflicts by lanes 4 g + t that
// take K's (position g, chunk t) or V's (pair t, chunk g): copies into shared memory are plain.
#ifndef STRATA_CUDA_KV_CUH
#define STRATA_CUDA_KV_CUH

#include <cuda_fp16.h>

#include "kernels/cuda/cuda_internal.h"

enum { KV_MOST_WIDTH = 256 };

__host__ __device__ __forceinline__ uint32_t kv_width(uint32_t head_size)
{
    return (head_size + 31) / 32 * 32;
}

// Halves of K, or of V, of one head in a page.
__host__ __device__ __forceinline__ uint32_t kv_head_halves(uint32_t width)
{
    return KV_PAGE_POSITIONS * width;
}

// Where chunk `chunk` (8 dimensions) of K's row `position` lies, in chunks from the row's begin. Rows of an
// odd number of 64 bytes are free of conflicts as they are.
__host__ __device__ __forceinline__ uint32_t kv_key_chunk(uint32_t width, uint32_t position, uint32_t chunk)
{
    return width % 64 == 0 ? chunk ^ (position % 2 * 4) : chunk;
}

// Where chunk `chunk` (4 dimensions of two positions) of V's row `pair` lies.
__host__ __device__ __forceinline__ uint32_t kv_value_chunk(uint32_t pair, uint32_t chunk)
{
    return chunk ^ (pair % 4 * 2);
}

// The place of one number, in halves from its head's begin.
__host__ __device__ __forceinline__ uint32_t kv_key_at(uint32_t width, uint32_t position, uint32_t dimension)
{
    return position * width + kv_key_chunk(width, position, dimension / 8) * 8 + dimension % 8;
}

__host__ __device__ __forceinline__ uint32_t kv_value_at(uint32_t width, uint32_t position,
                                                         uint32_t dimension)
{
    uint32_t pair = position / 2;
    return pair * 2 * width + kv_value_chunk(pair, dimension / 4) * 8 + dimension % 4 * 2 + position % 2;
}

// --- what is kept there: rotated by position, and rounded. The same bits from whichever kernel ---

// Sine and cosine of position * frequency: what is left of whole quarter turns, in f64 (in f32 the product
// alone would be wrong by 0.06 at position 2^20), then the series of Cephes' sinf and cosf (S. Moshier) for
// at most pi / 4.
__device__ __forceinline__ float2 sine_cosine(uint32_t position, float frequency)
{
    double angle = (double)position * frequency;
    double quarters = rint(angle * 0.63661977236758134308);
    float r = (float)fma(-quarters, 1.57079632679489661923, angle), r2 = __fmul_rn(r, r);
    float sine = fmaf(fmaf(-1.9515295891e-4f, r2, 8.3321608736e-3f), r2, -1.6666654611e-1f);
    float cosine = fmaf(fmaf(2.443315711809948e-5f, r2, -1.388731625493765e-3f), r2, 4.166664568298827e-2f);
    sine = fmaf(__fmul_rn(sine, r2), r, r);
    cosine = fmaf(__fmul_rn(cosine, r2), r2, fmaf(-0.5f, r2, 1.0f));
    int turn = (int)quarters & 3;
    float2 both = turn & 1 ? make_float2(cosine, sine) : make_float2(sine, cosine);
    if (turn & 2)
        both.x = -both.x;
    if ((turn + 1) & 2)
        both.y = -both.y;
    return both;
}

// The first and the second of a pair, turned by an angle of this sine (x) and cosine (y).
__device__ __forceinline__ float turned_first(float first, float second, float2 turn)
{
    return fmaf(first, turn.y, -__fmul_rn(second, turn.x));
}

__device__ __forceinline__ float turned_second(float first, float second, float2 turn)
{
    return fmaf(first, turn.x, __fmul_rn(second, turn.y));
}

__device__ __forceinline__ __half bounded_half(float x)
{
    return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
}

#endif
