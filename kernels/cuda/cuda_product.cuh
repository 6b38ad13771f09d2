// What the two product kernels share: their arguments, and copies that complete on a barrier in shared
// memory.
//
// The order of sums. K's blocks are dealt into `chunks` runs of neighbouring blocks; inside a run a column's
// sum goes through the blocks ascending, and the runs' sums are added ascending. The number of runs depends
// on the shapes of the matrices alone, so that both kernels, at any number of columns, give a column the same
// bits.
#ifndef STRATA_CUDA_PRODUCT_CUH
#define STRATA_CUDA_PRODUCT_CUH

#include "kernels/cuda/cuda_record.cuh"

enum { PRODUCT_PARTS = 4, PRODUCT_CHUNKS = 4 };

struct product_part {
    const unsigned char *records;
    const float *factors; // NULL: none
    const float *bias;    // NULL: none
    float *out;
    uint32_t out_stride, rows, tiles;
    uint32_t first_tile; // of the parts' tiles in a row
    uint32_t layout;     // 0, or 1 where parts have two layouts
    bool accumulate;
};

// What the activations are made from, where a product makes them itself: the RMS norm of rows of f32.
struct product_norm {
    const float *x; // [columns][width]; NULL: they are there
    const float *weight;
    uint32_t width;
    float epsilon;
};

struct product_args { // up to 64 columns; all parts have the same width
    struct product_part parts[PRODUCT_PARTS];
    uint32_t n_parts, tiles, k_blocks, chunks;
    uint32_t chunk_shift; // chunks = 1 << chunk_shift: kernels that last microseconds divide by nothing else
    uint32_t columns;
    const unsigned char *x; // group of an activation: [k_blocks][64][576]
    float unit;
    struct product_norm norm;
    struct activation_view
        gated; // groups NULL: none; else silu(parts[0]) x parts[1] goes there, `tiles` are of one
};

__device__ __forceinline__ const struct product_part &product_part_of(const struct product_args &args,
                                                                      uint32_t tile)
{
    uint32_t p = 0;
#pragma unroll
    for (uint32_t i = 1; i < PRODUCT_PARTS; i++)
        p += i < args.n_parts && tile >= args.parts[i].first_tile;
    return args.parts[p];
}

__device__ __forceinline__ uint32_t product_chunk_begin(const struct product_args &args, uint32_t chunk)
{
    return chunk * args.k_blocks >> args.chunk_shift;
}

// What a sum over K makes of row `row` of the part.
__device__ __forceinline__ float product_finish(const struct product_args &args,
                                                const struct product_part &part, uint32_t row, float sum)
{
    float value = sum * (part.factors ? part.factors[row] * args.unit : args.unit);
    return part.bias ? value + part.bias[row] : value;
}

// Finishes one element: `sum` over K of row `row` of the part, column `column`.
__device__ __forceinline__ void product_store(const struct product_args &args,
                                              const struct product_part &part, uint32_t row, uint32_t column,
                                              float sum)
{
    if (row >= part.rows || column >= args.columns)
        return;
    float value = product_finish(args, part, row, sum);
    float *out = part.out + (size_t)column * part.out_stride + row;
    *out = part.accumulate ? *out + value : value;
}

// --- barriers and bulk copies ---

typedef unsigned long long barrier_t;

__device__ __forceinline__ unsigned shared_address(const void *pointer)
{
    return (unsigned)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void barrier_init(barrier_t *barrier, unsigned arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialized barriers known to the copy engine; then the block synchronizes before others use them.
__device__ __forceinline__ void barrier_publish()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(barrier_t *barrier, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(barrier_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_await(barrier_t *barrier, unsigned parity)
{
    asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\nbra again;\nover:\n}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// Weights are read once a step: first to leave the L2. Activations are read by every block: last to leave.
constexpr unsigned long long CACHE_FIRST_OUT = 0x12F0000000000000ull, CACHE_LAST_OUT = 0x14F0000000000000ull;

// `bytes` (a multiple of 16) to shared memory, counted by `barrier`, which must expect them.
__device__ __forceinline__ void copy_bulk(void *to, const void *from, unsigned bytes, barrier_t *barrier,
                                          unsigned long long policy)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
        "%2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

// --- the kernels' launchers ---

// The parts' layouts, `layout` for 0 and `other` for 1. False: these columns, shapes or layouts are not for
// it.
bool product_small(struct cuda_device *device, const struct product_args &args, int layout, int other);
// One layout; neither norm nor gated.
void product_wide(struct cuda_device *device, const struct product_args &args, int layout);

#endif
