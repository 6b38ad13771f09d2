// Products with up to 64 columns on any GPU from compute capability 8.0 on: the general path, where
// device->general says so. The smallest kernel that keeps the order of sums of cuda_product.cuh, so that its
// bits are those of the kernels for 9.0.
//
// A warp takes one run of K of one tile and multiplies with `mma` what it reads from device memory: a record
// is read once, by one warp, as whole lines; the columns are read by every warp and stay in the L1. So there
// are neither rings nor barriers, and waiting is hidden by how many warps a multiprocessor holds. The runs of
// a tile belong to one block, where their sums meet in shared memory.
#include "kernels/cuda/cuda_product.cuh"

enum { GENERAL_WARPS = PRODUCT_CHUNKS }; // of a block: the runs of one tile, or fewer of more tiles

// A K block of columns that lie for more than CUDA_FEW_ROWS rows (cuda_kernel.cuh), read as record_columns
// reads the others; columns beyond `count` are there, whatever they hold.
template <int NT> struct many_columns {
    const unsigned char *halves, *sums_of_16;
    uint32_t row; // of each eight

    __device__ __forceinline__ void begin(const unsigned char *x, uint32_t count, int lane)
    {
        row = lane >> 2;
        halves = x + row * 128 + (lane & 3) * 4;
        sums_of_16 = x + CUDA_GROUP_ROWS * 2 * CUDA_K_BLOCK + row * 64 + (lane & 3) * 4;
    }

    // The words of units `first` to `first` + 3, which are swapped by `by`.
    static __device__ __forceinline__ uint4 words(const unsigned char *from, uint32_t first, uint32_t by)
    {
        return make_uint4(*(const unsigned *)(from + (first ^ by) * 16),
                          *(const unsigned *)(from + ((first + 1) ^ by) * 16),
                          *(const unsigned *)(from + ((first + 2) ^ by) * 16),
                          *(const unsigned *)(from + ((first + 3) ^ by) * 16));
    }

    __device__ __forceinline__ uint4 group(int n, int j) const
    {
        return words(halves + n * (8 * 2 * CUDA_K_BLOCK) + j / 2 * 1024, j % 2 * 4, row);
    }

    __device__ __forceinline__ uint4 sums(int n) const
    {
        return words(sums_of_16 + n * 8 * 64, 0, row / 2);
    }
};

// acc += the products of a run of a tile, block by block.
template <int L, int NT, class Columns>
__device__ __forceinline__ void multiply_run(const struct product_args &args, uint32_t tile, uint32_t chunk,
                                             int lane, float (*acc)[4])
{
    const struct product_part &part = product_part_of(args, tile);
    for (uint32_t k = product_chunk_begin(args, chunk); k < product_chunk_begin(args, chunk + 1); k++) {
        size_t index = record_index(tile - part.first_tile, k, part.tiles, args.k_blocks);
        Columns columns;
        columns.begin(args.x + (size_t)k * CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES, args.columns, lane);
        record_multiply_columns<L, NT>(part.records + index * record_form_of(L).bytes, columns, lane, acc);
    }
}

// Adds up the runs of the block's tiles, ascending, and stores the results. sums: [warp][column][row].
template <int NT>
__device__ __forceinline__ void finish_tiles(const struct product_args &args, uint32_t first_tile,
                                             uint32_t n_tiles, const float *sums)
{
    constexpr uint32_t OF_WARP = NT * 8 * CUDA_TILE_ROWS;
    for (uint32_t i = threadIdx.x; i < n_tiles * OF_WARP; i += blockDim.x) {
        uint32_t tile = first_tile + i / OF_WARP, at = i % OF_WARP;
        if (tile >= args.tiles)
            continue;
        const struct product_part &part = product_part_of(args, tile);
        const float *from = sums + (i / OF_WARP << args.chunk_shift) * OF_WARP + at;
        float sum = from[0];
        for (uint32_t c = 1; c < args.chunks; c++)
            sum += from[c * OF_WARP];
        product_store(args, part, (tile - part.first_tile) * CUDA_TILE_ROWS + at % CUDA_TILE_ROWS,
                      at / CUDA_TILE_ROWS, sum);
    }
}

// Blocks a multiprocessor holds at least: few enough for a record's loads to be on their way together.
template <int L, int NT, class Columns>
__global__ void __launch_bounds__(GENERAL_WARPS * 32, NT < 4   ? 3
                                                      : NT < 8 ? 2
                                                               : 1)
    product_general_kernel(const __grid_constant__ struct product_args args)
{
    __shared__ float sums[GENERAL_WARPS * NT * 8 * CUDA_TILE_ROWS];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t n_tiles = GENERAL_WARPS >> args.chunk_shift, first_tile = blockIdx.x * n_tiles;
    uint32_t tile = first_tile + (warp >> args.chunk_shift);
    float acc[NT][4] = {};
    cuda_wait();
    if (tile < args.tiles)
        multiply_run<L, NT, Columns>(args, tile, warp & (args.chunks - 1), lane, acc);
#pragma unroll
    for (int i = 0; i < 4 * NT; i++)
        sums[(warp * NT * 8 + i / 4 * 8 + 2 * (lane % 4) + i % 2) * CUDA_TILE_ROWS + lane / 4 +
             i % 4 / 2 * 8] = acc[i / 4][i % 4];
    __syncthreads();
    finish_tiles<NT>(args, first_tile, n_tiles, sums);
}

// --- launching ---

template <int L, int NT, class Columns>
static void launch(struct cuda_device *device, const struct product_args &args)
{
    uint32_t n_tiles = GENERAL_WARPS >> args.chunk_shift;
    cuda_launch(device, "general product", product_general_kernel<L, NT, Columns>,
                (args.tiles + n_tiles - 1) / n_tiles, GENERAL_WARPS * 32, 0, args);
}

template <int L> static void launch_columns(struct cuda_device *device, const struct product_args &args)
{
    if (!args.many && args.columns <= 8)
        launch<L, 1, struct record_columns<1>>(device, args);
    else if (!args.many)
        launch<L, 2, struct record_columns<2>>(device, args);
    else if (args.columns <= 32)
        launch<L, 4, struct many_columns<4>>(device, args);
    else
        launch<L, 8, struct many_columns<8>>(device, args);
}

void product_general(struct cuda_device *device, const struct product_args &args, int layout)
{
    static void (*const LAUNCH[RECORD_LAYOUTS])(struct cuda_device *, const struct product_args &) = {
        launch_columns<RECORD_NIBBLES>,  launch_columns<RECORD_NIBBLES_16>, launch_columns<RECORD_FIVES>,
        launch_columns<RECORD_SIXES>,    launch_columns<RECORD_SCALED_4>,   launch_columns<RECORD_SCALED_5>,
        launch_columns<RECORD_SCALED_8>, launch_columns<RECORD_HALVES>,
    };
    LAUNCH[layout](device, args);
}

extern "C" int cuda_kernel_architecture(void)
{
    cudaFuncAttributes attributes;
    const void *any = (const void *)product_general_kernel<RECORD_HALVES, 1, struct record_columns<1>>;
    cudaError_t code = cudaFuncGetAttributes(&attributes, any);
    cudaGetLastError(); // an answer like another
    return code == cudaSuccess ? attributes.ptxVersion : 0;
}
