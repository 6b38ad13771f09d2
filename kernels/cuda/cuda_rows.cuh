// The arithmetic of a row, shared by the kernels of cuda_rows.cu and by products that make their activations
// themselves: a row gets the same bits from either.
//
// The sum of squares has one order: the 256 elements of a K block by the butterfly of a warp (eight elements
// a lane, ascending), then the blocks ascending.
#ifndef STRATA_CUDA_ROWS_CUH
#define STRATA_CUDA_ROWS_CUH

#include "kernels/cuda/cuda_kernel.cuh"

// Eight values that are all there, at a multiple of 16 bytes.
__device__ __forceinline__ void row_read8(const float *x, float *out)
{
    float4 low = *(const float4 *)x, high = *(const float4 *)(x + 4);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// Eight values from k on; zero from `width` on.
__device__ __forceinline__ void row_load8(const float *x, uint32_t k, uint32_t width, float *out)
{
    if (k + 8 <= width && ((uintptr_t)(x + k) & 15) == 0) {
        row_read8(x + k, out);
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 8; i++)
        out[i] = k + i < width ? x[k + i] : 0;
}

// The sum over a warp, in all lanes.
__device__ __forceinline__ float row_warp_sum(float value)
{
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
        value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

// The sum of squares of a K block of which each lane has eight elements.
__device__ __forceinline__ float row_chunk_squares(const float *values)
{
    float squares = 0;
#pragma unroll
    for (int e = 0; e < 8; e++)
        squares = fmaf(values[e], values[e], squares);
    return row_warp_sum(squares);
}

// The sum of `count` sums at a multiple of 16 bytes, ascending. Read by fours, which do not wait for the sum.
__device__ __forceinline__ float row_chunks_sum(const float *chunks, uint32_t count)
{
    float sum = 0;
    uint32_t i = 0;
#pragma unroll 4
    for (; i + 4 <= count; i += 4) {
        float4 four = *(const float4 *)(chunks + i);
        sum = (((sum + four.x) + four.y) + four.z) + four.w;
    }
    for (; i < count; i++)
        sum += chunks[i];
    return sum;
}

// 1 / the root mean square, from the squares' sums by K block. per_width: 1 / width.
__device__ __forceinline__ float row_scale(const float *chunks, uint32_t count, float per_width,
                                           float epsilon)
{
    return rsqrtf(fmaf(row_chunks_sum(chunks, count), per_width, epsilon));
}

__device__ __forceinline__ void row_apply(float *values, const float *factors, float scale)
{
#pragma unroll
    for (int e = 0; e < 8; e++)
        values[e] = values[e] * scale * factors[e];
}

__device__ __forceinline__ float row_silu(float x)
{
    return __fdividef(x, 1.0f + __expf(-x));
}

__device__ __forceinline__ float row_gated(float gate, float up)
{
    return row_silu(gate) * up;
}

// The op ffn_activate for rows [first, rows).
void cuda_ffn_activate_rows(struct cuda_device *device, struct activation *out, const float *gate,
                            const float *up, uint32_t stride, uint32_t first, uint32_t rows);

#endif
