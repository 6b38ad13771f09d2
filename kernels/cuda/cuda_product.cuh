// What the product kernels share: their arguments, and how an element is finished.
//
// The order of sums. K's blocks are dealt into `chunks` runs of neighbouring blocks; inside a run a column's
// sum goes through the blocks ascending, and the runs' sums are added ascending. The number of runs depends
// on the shapes of the matrices alone, so that all kernels, at any number of columns, give a column the same
// bits.
#ifndef STRATA_CUDA_PRODUCT_CUH
#define STRATA_CUDA_PRODUCT_CUH

#include "kernels/cuda/cuda_barrier.cuh"
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

// What the activation is made from, where a product of one column makes it itself: the RMS norm of a row of
// f32 whose width is a multiple of 256.
struct product_norm {
    const float *x; // NULL: it is there
    const float *weight;
    uint32_t width;
    float per_width, epsilon; // 1 / width
};

// What becomes of the rows of q, k and v, in this order, where a product makes those of tokens, one a column:
// neighbours of q and k turn by position, k and v are rounded into the tokens' pages and not stored.
struct product_heads {
    unsigned char *pages; // NULL: they are rows like others
    size_t page_bytes;
    const float *frequency;
    const uint32_t *positions, *slots, *page_tables;
    uint32_t table_stride, q_rows, k_rows, head_size;
    uint32_t width; // of a head in a page
    uint32_t half;  // pairs of a head that turn
};

struct product_args { // up to 64 columns; all parts have the same width
    struct product_part parts[PRODUCT_PARTS];
    uint32_t n_parts, tiles, k_blocks, chunks;
    uint32_t chunk_shift; // chunks = 1 << chunk_shift: kernels that last microseconds divide by nothing else
    uint32_t columns;
    const unsigned char *x; // group of an activation: [k_blocks][64][576], laid out for
    bool many;              // more than CUDA_FEW_ROWS rows, or for few
    float unit;
    struct product_norm norm;
    struct product_heads heads;
    // groups NULL: none; else silu(parts[0]) x parts[1] goes there, `tiles` are of one, column 0 is row
    // `gated_row`.
    struct activation_view gated;
    uint32_t gated_row;
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

// What an element of the result is made with, beside its sum: read early, where the latency would count.
struct product_end {
    float factor, bias, old;
};

// Of row `row` < part.rows; `old` only where parts accumulate.
__device__ __forceinline__ struct product_end product_end_of(const struct product_part &part, uint32_t row)
{
    return {part.factors ? part.factors[row] : 1, part.bias ? part.bias[row] : 0, 0};
}

__device__ __forceinline__ float *product_place(const struct product_part &part, uint32_t row,
                                                uint32_t column)
{
    return part.out + (size_t)column * part.out_stride + row;
}

// What a sum over K makes of a row of the part. Rounded step by step (nothing is contracted), so that all
// kernels give the same bits.
__device__ __forceinline__ float product_finish(const struct product_args &args,
                                                const struct product_part &part, struct product_end end,
                                                float sum)
{
    float value = __fmul_rn(sum, part.factors ? end.factor * args.unit : args.unit);
    return part.bias ? __fadd_rn(value, end.bias) : value;
}

__device__ __forceinline__ float product_onto(const struct product_part &part, float old, float value)
{
    return part.accumulate ? __fadd_rn(old, value) : value;
}

// Finishes one element: `sum` over K of row `row` of the part, column `column`.
__device__ __forceinline__ void product_store(const struct product_args &args,
                                              const struct product_part &part, uint32_t row, uint32_t column,
                                              float sum)
{
    if (row >= part.rows || column >= args.columns)
        return;
    float value = product_finish(args, part, product_end_of(part, row), sum);
    float *out = product_place(part, row, column);
    *out = product_onto(part, part.accumulate ? *out : 0, value);
}

// --- the kernels' launchers ---

// The parts' layouts, `layout` for 0 and `other` for 1. False: these columns, shapes or layouts are not for
// it.
bool product_small(struct cuda_device *device, const struct product_args &args, int layout, int other);
// One layout; no norm; gated only where the activations lie for many rows and K is one run.
void product_wide(struct cuda_device *device, const struct product_args &args, int layout);
// In place of both on the general path. One layout; neither norm nor gated.
void product_general(struct cuda_device *device, const struct product_args &args, int layout);

#endif
