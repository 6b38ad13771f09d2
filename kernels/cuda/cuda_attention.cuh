// What the two attention kernels share: their arguments, and how a page's images in shared memory are read.
#ifndef STRATA_CUDA_ATTENTION_CUH
#define STRATA_CUDA_ATTENTION_CUH

#include "kernels/cuda/cuda_kernel.cuh"
#include "kernels/cuda/cuda_kv.cuh"
#include "kernels/cuda/cuda_mma.cuh"

// Two floats as halves in one word, the first in the low half.
__device__ __forceinline__ uint32_t halves_of(float low, float high)
{
    __half2 pair = __floats2half2_rn(low, high);
    return *(uint32_t *)&pair;
}

// The same, for numbers that may lie beyond a half's range.
__device__ __forceinline__ uint32_t bounded_halves_of(float low, float high)
{
    return halves_of(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f));
}

struct attention_args {
    const float *q; // [T][q_stride]
    uint32_t q_stride;
    float q_scale; // the shape's, times log2(e): weights are powers of 2
    uint32_t n_heads, n_kv_heads, head_size, window;
    const unsigned char *pages;
    size_t page_bytes;
    const uint32_t *positions, *slots, *page_tables;
    const struct batch_span *spans;
    uint32_t table_stride, n_spans, n_generated, n_tokens;
    struct activation_view out;
};

// cuda_attention_decode.cu: the generated tokens of the batch.
void cuda_attention_decode(struct cuda_device *device, const attention_args &args);
size_t cuda_attention_decode_scratch(uint32_t n_heads, uint32_t head_size, uint32_t rows, uint32_t pages);
// cuda_attention_prompt.cu: the others.
void cuda_attention_prompt(struct cuda_device *device, const attention_args &args);

// The first position that the query at `position` sees.
__device__ __forceinline__ uint32_t first_seen(const attention_args &args, uint32_t position)
{
    return args.window && position >= args.window ? position - args.window + 1 : 0;
}

// K of a KV head in a page; V is kv_value_offset() bytes behind it.
__device__ __forceinline__ const unsigned char *page_keys(const attention_args &args, uint32_t page,
                                                          uint32_t kv_head, uint32_t width)
{
    return args.pages + page * args.page_bytes + (size_t)kv_head * kv_head_halves(width) * sizeof(__half);
}

__device__ __forceinline__ size_t kv_value_offset(const attention_args &args, uint32_t width)
{
    return (size_t)args.n_kv_heads * kv_head_halves(width) * sizeof(__half);
}

// Eight dimensions of a query, scaled, as halves; zeros where it has none. Aligned to 16 bytes.
__device__ __forceinline__ uint4 query_chunk(const attention_args &args, const float *query, uint32_t first,
                                             bool live)
{
    if (!live || first >= args.head_size)
        return make_uint4(0, 0, 0, 0);
    float4 a = *(const float4 *)(query + first), b = *(const float4 *)(query + first + 4);
    float scale = args.q_scale;
    return make_uint4(
        bounded_halves_of(a.x * scale, a.y * scale), bounded_halves_of(a.z * scale, a.w * scale),
        bounded_halves_of(b.x * scale, b.y * scale), bounded_halves_of(b.z * scale, b.w * scale));
}

#endif
