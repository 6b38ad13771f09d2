// What happens to q, k and v before attention: normalization of heads, rotation by position, and the rounding
// of k and v into the pages of their positions (cuda_kv.cuh has their layout).
//
// One kernel. A warp takes one or more heads of one token; its lanes take pairs of dimensions that turn
// together, so that a lane needs a pair's sine and cosine once for all of its heads.
//
// Where pairs are neighbours and heads are not normalized, the product that makes q, k and v of few tokens
// does all this itself (cuda_product_small.cu), with the same bits.
//
// Queued by the executor's thread; owns no memory.
#include "kernels/cuda/cuda_kernel.cuh"
#include "kernels/cuda/cuda_kv.cuh"

enum { PREPARE_THREADS = 128, PREPARE_WARPS = PREPARE_THREADS / 32 };

struct prepare_args {
    struct qkv_args qkv;
    uint32_t n_heads, n_kv_heads, head_size, width;
    uint32_t half; // pairs that turn
    bool apart;    // pairs are (i, i + half), else (2i, 2i + 1)
    unsigned char *pages;
    size_t page_bytes;
    const uint32_t *positions, *slots, *page_tables;
    uint32_t table_stride;
};

size_t cuda_kv_page_bytes(const struct device *device, uint32_t n_kv_heads, uint32_t head_size)
{
    if (head_size == 0 || head_size % 16 || head_size > KV_MOST_WIDTH)
        return 0;
    return (size_t)2 * n_kv_heads * kv_head_halves(kv_width(head_size)) * sizeof(__half);
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// A lane's pairs of one head. Pair p is of dimensions first(p) and first(p) + distance(p).
template <int PAIRS> struct head_pairs {
    float2 x[PAIRS];

    static __device__ __forceinline__ uint32_t first(const prepare_args &args, uint32_t p)
    {
        return args.apart && p < args.half ? p : 2 * p;
    }

    static __device__ __forceinline__ uint32_t distance(const prepare_args &args, uint32_t p)
    {
        return args.apart && p < args.half ? args.half : 1;
    }

    __device__ __forceinline__ void load(const prepare_args &args, const float *row, uint32_t lane)
    {
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            uint32_t p = lane + 32 * j, at = first(args, p);
            x[j] = make_float2(0, 0);
            if (p < args.head_size / 2)
                x[j] = make_float2(row[at], row[at + distance(args, p)]);
        }
    }

    __device__ __forceinline__ void normalize(const prepare_args &args, const float *weight, uint32_t lane)
    {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
            sum += x[j].x * x[j].x + x[j].y * x[j].y;
        float factor = 1.0f / sqrtf(warp_sum(sum) / args.head_size + args.qkv.norm_epsilon);
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            uint32_t p = lane + 32 * j, at = first(args, p);
            if (p < args.head_size / 2) {
                x[j].x *= factor * weight[at];
                x[j].y *= factor * weight[at + distance(args, p)];
            }
        }
    }

    // Pairs that do not turn have the sine 0 and the cosine 1.
    __device__ __forceinline__ void rotate(const float2 *turns)
    {
#pragma unroll
        for (int j = 0; j < PAIRS; j++)
            x[j] =
                make_float2(turned_first(x[j].x, x[j].y, turns[j]), turned_second(x[j].x, x[j].y, turns[j]));
    }
};

template <int PAIRS>
__global__ void __launch_bounds__(PREPARE_THREADS) attn_prepare_kernel(const prepare_args args)
{
    uint32_t lane = threadIdx.x % 32, warp = blockIdx.x * PREPARE_WARPS + threadIdx.x / 32;
    uint32_t t = blockIdx.y, size = args.head_size, width = args.width;
    float2 turns[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
        turns[j].x = lane + 32 * j < args.half ? args.qkv.rope_frequency[lane + 32 * j] : 0;
    cuda_release();
    uint32_t position = args.positions[t], in_page = position % KV_PAGE_POSITIONS;
    uint32_t page =
        args.page_tables[(size_t)args.slots[t] * args.table_stride + position / KV_PAGE_POSITIONS];
    __half *pages = (__half *)(args.pages + page * args.page_bytes);
#pragma unroll
    for (int j = 0; j < PAIRS; j++)
        turns[j] = sine_cosine(position, turns[j].x);
    cuda_wait();
    uint32_t n_heads = args.n_heads + 2 * args.n_kv_heads;
    for (uint32_t head = warp; head < n_heads; head += gridDim.x * PREPARE_WARPS) {
        bool is_q = head < args.n_heads, is_k = !is_q && head < args.n_heads + args.n_kv_heads;
        uint32_t of_kind = is_q ? head : is_k ? head - args.n_heads : head - args.n_heads - args.n_kv_heads;
        float *row = (is_q   ? args.qkv.q + (size_t)t * args.qkv.q_stride
                      : is_k ? args.qkv.k + (size_t)t * args.qkv.k_stride
                             : args.qkv.v + (size_t)t * args.qkv.v_stride) +
                     of_kind * size;
        const float *norm = is_q ? args.qkv.q_norm : is_k ? args.qkv.k_norm : NULL;
        head_pairs<PAIRS> pairs;
        pairs.load(args, row, lane);
        if (norm)
            pairs.normalize(args, norm, lane);
        if (is_q || is_k)
            pairs.rotate(turns);
        // V lies behind the K of all heads; heads are numbered so that this is one count.
        __half *stored = pages + (is_q ? 0 : (size_t)(head - args.n_heads) * kv_head_halves(width));
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            uint32_t p = lane + 32 * j, at = head_pairs<PAIRS>::first(args, p);
            uint32_t other = at + head_pairs<PAIRS>::distance(args, p);
            if (p >= size / 2) {
                at = 2 * p; // the padding: zeros
                other = at + 1;
            }
            if (is_q && p < size / 2) {
                row[at] = pairs.x[j].x;
                row[other] = pairs.x[j].y;
            } else if (!is_q && at < width) {
                stored[is_k ? kv_key_at(width, in_page, at) : kv_value_at(width, in_page, at)] =
                    bounded_half(pairs.x[j].x);
                stored[is_k ? kv_key_at(width, in_page, other) : kv_value_at(width, in_page, other)] =
                    bounded_half(pairs.x[j].y);
            }
        }
    }
}

// A head a warp while there are few tokens: latency counts. Later eight heads share the angles.
static uint32_t heads_a_warp(uint32_t n_tokens)
{
    return n_tokens <= 32 ? 1 : n_tokens <= 256 ? 2 : 8;
}

void cuda_attn_prepare(struct device *device, const struct qkv_args *qkv, const struct attention_shape *shape,
                       const struct kv_layer *kv, const struct batch *batch)
{
    if (!batch->n_tokens)
        return;
    struct prepare_args args = {};
    args.qkv = *qkv;
    args.n_heads = shape->n_heads;
    args.n_kv_heads = shape->n_kv_heads;
    args.head_size = shape->head_size;
    args.width = kv_width(shape->head_size);
    args.half = qkv->position == POSITION_LEARNED ? 0 : qkv->rope_dims / 2;
    args.apart = qkv->position == POSITION_ROPE_HALVES;
    args.pages = (unsigned char *)kv->data;
    args.page_bytes = kv->page_bytes;
    args.positions = batch->positions;
    args.slots = batch->slots;
    args.page_tables = batch->page_tables;
    args.table_stride = batch->table_stride;
    uint32_t per_block = PREPARE_WARPS * heads_a_warp(batch->n_tokens);
    dim3 grid((shape->n_heads + 2 * shape->n_kv_heads + per_block - 1) / per_block, batch->n_tokens);
    void (*const kernels[])(const prepare_args) = {attn_prepare_kernel<1>, attn_prepare_kernel<2>,
                                                   attn_prepare_kernel<3>, attn_prepare_kernel<4>};
    cuda_launch(cuda_device_of(device), "attn_prepare", kernels[(args.width - 1) / 64], grid,
                dim3(PREPARE_THREADS), 0, args);
}
