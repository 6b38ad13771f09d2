// Products with few columns (one to eight sequences): the kernel that decides how fast a single stream is.
//
// A warp takes one run of K of one tile of 16 rows and streams its records through a ring of its own in
// shared memory, filled by bulk copies that run ahead, the first of them started before the kernel's
// predecessor has finished (weights depend on nobody). Activations of all columns lie in shared memory whole.
// Where a tile has several runs their sums meet in shared memory. The number of warps is chosen so that the
// last round is as full as the others; and where a block gets along with half of an SM's shared memory and
// registers, its successor's blocks can already stand beside it and fill their rings.
#include <stdlib.h>
#include "kernels/cuda/cuda_product.cuh"

enum { SMALL_COLUMNS = 8, MAX_WARPS = 28, PAIRED_WARPS = 16, MAX_SLOTS_A_WARP = 8 };

struct small_shape {
    uint32_t slots; // of a warp's ring
    uint32_t tiles_a_pass;
};

// The records of a warp, in order: passes of tiles, in each one run of K of one tile.
struct record_walk {
    uint32_t pass, k_block, k_end; // k_block == k_end: nothing left
    const unsigned char *at;       // the record, or
    size_t step;                   // bytes from a K block's record to the next one's
};

template <int L>
__device__ __forceinline__ void walk_enter(struct record_walk &walk, const struct product_args &args,
                                           const struct small_shape &shape, uint32_t warp)
{
    uint32_t ordinal = walk.pass * shape.tiles_a_pass + warp / args.chunks;
    uint32_t tile = blockIdx.x + ordinal * gridDim.x, chunk = warp % args.chunks;
    walk.k_block = walk.k_end = 0;
    if (warp >= shape.tiles_a_pass * args.chunks || tile >= args.tiles)
        return;
    const struct product_part &part = product_part_of(args, tile);
    uint32_t in_part = tile - part.first_tile, panel = in_part / PANEL_TILES,
             left = part.tiles - panel * PANEL_TILES;
    walk.k_block = product_chunk_begin(args, chunk);
    walk.k_end = product_chunk_begin(args, chunk + 1);
    walk.step = (size_t)(left < PANEL_TILES ? left : PANEL_TILES) * record_form_of(L).bytes;
    walk.at = part.records +
              record_index(in_part, walk.k_block, part.tiles, args.k_blocks) * record_form_of(L).bytes;
}

template <int L>
__device__ __forceinline__ void walk_next(struct record_walk &walk, const struct product_args &args,
                                          const struct small_shape &shape, uint32_t warp)
{
    walk.k_block++;
    walk.at += walk.step;
    if (walk.k_block < walk.k_end)
        return;
    walk.pass++;
    walk_enter<L>(walk, args, shape, warp);
}

// Brings the activations of all columns to shared memory: [k_blocks][columns][576]. By the first warp.
__device__ __forceinline__ void load_columns(const struct product_args &args, unsigned char *to,
                                             barrier_t *barrier, int lane)
{
    uint32_t bytes = args.columns * CUDA_BLOCK_BYTES;
    if (lane == 0)
        barrier_expect(barrier, args.k_blocks * bytes);
    __syncwarp();
    for (uint32_t k = lane; k < args.k_blocks; k += 32)
        copy_bulk(to + (size_t)k * bytes, args.x + (size_t)k * CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES, bytes,
                  barrier, CACHE_LAST_OUT);
}

// Adds up the runs of the pass's tiles and stores them. By the whole block.
__device__ __forceinline__ void reduce_pass(const struct product_args &args, const struct small_shape &shape,
                                            const float *sums, uint32_t pass)
{
    uint32_t n = shape.tiles_a_pass * 16 * args.columns;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
        uint32_t row = i % 16, column = i / 16 % args.columns, slot = i / 16 / args.columns;
        uint32_t tile = blockIdx.x + (pass * shape.tiles_a_pass + slot) * gridDim.x;
        if (tile >= args.tiles)
            continue;
        const float *from = sums + ((size_t)slot * args.chunks * args.columns + column) * 16 + row;
        float sum = from[0];
        for (uint32_t c = 1; c < args.chunks; c++)
            sum += from[c * args.columns * 16];
        const struct product_part &part = product_part_of(args, tile);
        product_store(args, part, (tile - part.first_tile) * CUDA_TILE_ROWS + row, column, sum);
    }
}

// Blocks of up to W warps, B of them on an SM.
template <int L, int W, int B>
__global__ void __launch_bounds__(W * 32, B)
    product_small_kernel(const __grid_constant__ struct product_args args, struct small_shape shape)
{
    constexpr uint32_t BYTES = record_form_of(L).bytes;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) barrier_t filled[W * MAX_SLOTS_A_WARP], columns_here;
    uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, slots = shape.slots;
    unsigned char *ring = shared + (size_t)warp * slots * BYTES, *x = shared + (size_t)warps * slots * BYTES;
    float *sums =
        (float *)(x + (size_t)args.k_blocks * args.columns * CUDA_BLOCK_BYTES); // [2][warps][columns][16]
    barrier_t *ready = filled + warp * MAX_SLOTS_A_WARP;

    struct record_walk ahead = {}, here = {};
    walk_enter<L>(ahead, args, shape, warp);
    here = ahead;
    if (lane == 0) {
        for (uint32_t i = 0; i < slots; i++)
            barrier_init(ready + i, 1);
        if (warp == 0)
            barrier_init(&columns_here, 1);
        barrier_publish();
    }
    __syncwarp();
    for (uint32_t i = 0; i < slots && ahead.k_block < ahead.k_end; i++) {
        if (lane == 0) {
            barrier_expect(ready + i, BYTES);
            copy_bulk(ring + i * BYTES, ahead.at, BYTES, ready + i, CACHE_FIRST_OUT);
        }
        walk_next<L>(ahead, args, shape, warp);
    }
    cuda_release();
    cuda_wait();
    if (warp == 0)
        load_columns(args, x, &columns_here, lane);
    __syncthreads();
    barrier_await(&columns_here, 0);

    uint32_t slot = 0, parity = 0, tiles_here = (args.tiles + gridDim.x - 1 - blockIdx.x) / gridDim.x;
    uint32_t passes = (tiles_here + shape.tiles_a_pass - 1) / shape.tiles_a_pass;
    for (uint32_t pass = 0; pass < passes; pass++) {
        float acc[1][1][4] = {};
        bool mine = here.k_block < here.k_end && here.pass == pass;
        while (here.k_block < here.k_end && here.pass == pass) {
            barrier_await(ready + slot, parity);
            record_multiply<L, 1, 1>(ring + slot * BYTES,
                                     x + (size_t)here.k_block * args.columns * CUDA_BLOCK_BYTES, args.columns,
                                     lane, acc);
            __syncwarp();
            if (ahead.k_block < ahead.k_end) {
                if (lane == 0) {
                    barrier_expect(ready + slot, BYTES);
                    copy_bulk(ring + slot * BYTES, ahead.at, BYTES, ready + slot, CACHE_FIRST_OUT);
                }
                walk_next<L>(ahead, args, shape, warp);
            }
            walk_next<L>(here, args, shape, warp);
            if (++slot == slots)
                slot = 0, parity ^= 1;
        }
        uint32_t g = lane / 4, t = lane % 4;
        if (args.chunks == 1) {
            uint32_t tile = blockIdx.x + (pass * shape.tiles_a_pass + warp) * gridDim.x;
            if (mine) {
                const struct product_part &part = product_part_of(args, tile);
                for (uint32_t i = 0; i < 4; i++)
                    product_store(args, part, (tile - part.first_tile) * CUDA_TILE_ROWS + g + i / 2 * 8,
                                  2 * t + i % 2, acc[0][0][i]);
            }
            continue;
        }
        float *turn = sums + (size_t)(pass % 2) * warps * args.columns * 16,
              *to = turn + warp * args.columns * 16;
        for (uint32_t i = 0; i < 4; i++) {
            if (2 * t + i % 2 < args.columns)
                to[(2 * t + i % 2) * 16 + g + i / 2 * 8] = acc[0][0][i];
        }
        __syncthreads();
        reduce_pass(args, shape, turn, pass);
    }
}

// --- shapes ---

// How full `warps` warps are kept by `tiles` tiles of `chunks` runs; less than about 14 have too little in
// flight.
static double share_of(uint32_t tiles, uint32_t chunks, uint32_t warps)
{
    uint32_t tiles_a_pass = warps / chunks, passes;
    if (tiles_a_pass == 0 || warps % chunks)
        return 0;
    passes = (tiles + tiles_a_pass - 1) / tiles_a_pass;
    return (double)tiles / (passes * tiles_a_pass) * (warps < 14 ? warps / 14.0 : 1);
}

static uint32_t choose_warps(const struct product_args &args, uint32_t blocks, uint32_t most, double *share)
{
    uint32_t tiles = (args.tiles + blocks - 1) / blocks, best = 8;
    *share = share_of(tiles, args.chunks, best);
    for (uint32_t warps = 12; warps <= most; warps += 4) {
        double one = share_of(tiles, args.chunks, warps);
        if (one > *share + 0.02 || (one > *share - 0.02 && warps <= 20)) {
            best = warps;
            *share = one > *share ? one : *share;
        }
    }
    return best;
}

// Launches with what fits `room` bytes of shared memory; false when that is not two records a warp.
template <int L, int W, int B>
static bool launch(struct cuda_device *device, const struct product_args &args, uint32_t blocks,
                   uint32_t warps, size_t room)
{
    constexpr uint32_t BYTES = record_form_of(L).bytes;
    size_t x = (size_t)args.k_blocks * args.columns * CUDA_BLOCK_BYTES;
    size_t sums = args.chunks > 1 ? (size_t)2 * warps * args.columns * 16 * sizeof(float) : 0;
    room -= W * MAX_SLOTS_A_WARP * sizeof(barrier_t) + 1024 + 128; // the barriers, and what the system takes
    if (x + sums + (size_t)warps * 2 * BYTES > room)
        return false;
    uint32_t slots = (uint32_t)((room - x - sums) / (warps * BYTES));
    struct small_shape shape = {slots < MAX_SLOTS_A_WARP ? slots : (uint32_t)MAX_SLOTS_A_WARP,
                                warps / args.chunks};
    static bool prepared;
    if (!prepared)
        prepared = !cuda_failed(device,
                                cudaFuncSetAttribute(product_small_kernel<L, W, B>,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, (int)room),
                                "preparing a product");
    cuda_launch(device, "product", product_small_kernel<L, W, B>, blocks, warps * 32,
                (size_t)warps * shape.slots * BYTES + x + sums, args, shape);
    return true;
}

template <int L> static bool choose(struct cuda_device *device, const struct product_args &args)
{
    uint32_t blocks = args.tiles < (uint32_t)device->sms ? args.tiles : (uint32_t)device->sms;
    double paired_share, alone_share;
    uint32_t paired = choose_warps(args, blocks, PAIRED_WARPS, &paired_share);
    uint32_t alone = choose_warps(args, blocks, MAX_WARPS, &alone_share);
    static int mode = -1;
    if (mode < 0)
        mode = getenv("STRATA_X") ? atoi(getenv("STRATA_X")) : 0;
    if (mode == 0 && paired_share > alone_share - 0.2 &&
        launch<L, PAIRED_WARPS, 2>(device, args, blocks, paired, (device->shared_limit + 1024) / 2))
        return true;
    return launch<L, MAX_WARPS, 1>(device, args, blocks, alone, device->shared_limit + 1024);
}

bool product_small(struct cuda_device *device, const struct product_args &args, int layout)
{
    static bool (*const LAUNCH[RECORD_LAYOUTS])(struct cuda_device *, const struct product_args &) = {
        choose<RECORD_NIBBLES>,  choose<RECORD_NIBBLES_16>, choose<RECORD_FIVES>,    choose<RECORD_SIXES>,
        choose<RECORD_SCALED_4>, choose<RECORD_SCALED_5>,   choose<RECORD_SCALED_8>, choose<RECORD_HALVES>,
    };
    return args.columns <= SMALL_COLUMNS && LAUNCH[layout](device, args);
}
