// Products with up to 64 columns: continuous batching's decode steps.
//
// A block takes up to 16 tiles, one a warp, and one run of K. A ring of stages in shared memory holds the
// tiles' records of a K block and the activations of all columns of that block, used by all warps; the first
// warp fills a stage again when all have left it, one stage late, so that it rarely waits. (A warp of its own
// for that would cost the others a quarter of their registers.) The runs of a tile belong to blocks of one
// cluster, whose sums meet in distributed shared memory, each block adding up an equal share of the rows. The
// columns are padded to 8, 16, 32 or
// 64. What was tried besides: kernels/lab/cuda_decode.md.
#include <cooperative_groups.h>

#include "kernels/cuda/cuda_product.cuh"

namespace cg = cooperative_groups;

enum { WIDE_TILES = 16, WIDE_STAGES = 4 };

struct wide_shape {
    uint32_t tiles, stages;           // of a block, of its ring
    uint32_t stage_bytes, columns_at; // of a stage: records first
};

// The part and the first tile (in it) of a block's share; tiles of one block are of one part.
struct wide_place {
    uint32_t part, tile, n_tiles, chunk;
};

__device__ __forceinline__ struct wide_place place_of(const struct product_args &args,
                                                      const struct wide_shape &shape)
{
    struct wide_place place = {0, 0, 0, blockIdx.x % args.chunks};
    uint32_t share = blockIdx.x / args.chunks;
    for (; place.part + 1 < args.n_parts; place.part++) {
        uint32_t shares = (args.parts[place.part].tiles + shape.tiles - 1) / shape.tiles;
        if (share < shares)
            break;
        share -= shares;
    }
    uint32_t tiles = args.parts[place.part].tiles;
    place.tile = share * shape.tiles;
    place.n_tiles = min(shape.tiles, tiles - place.tile);
    return place;
}

// Copies the records of K block k into a stage, one lane a tile; lane 0 has told the barrier to expect them.
template <int L>
__device__ __forceinline__ void copy_records(const struct product_args &args, const struct wide_place &place,
                                             uint32_t k, unsigned char *to, barrier_t *filled, uint32_t lane)
{
    constexpr uint32_t BYTES = record_form_of(L).bytes;
    const struct product_part &part = args.parts[place.part];
    if (lane < place.n_tiles)
        copy_bulk(to + lane * BYTES,
                  part.records + record_index(place.tile + lane, k, part.tiles, args.k_blocks) * BYTES, BYTES,
                  filled, CACHE_FIRST_OUT);
}

template <int L>
__device__ __forceinline__ uint32_t stage_bytes(const struct product_args &args,
                                                const struct wide_place &place)
{
    return place.n_tiles * record_form_of(L).bytes + args.columns * CUDA_BLOCK_BYTES;
}

__device__ __forceinline__ void copy_columns(const struct product_args &args, const struct wide_shape &shape,
                                             uint32_t k, unsigned char *to, barrier_t *filled)
{
    copy_bulk(to + shape.columns_at, args.x + (size_t)k * CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES,
              args.columns * CUDA_BLOCK_BYTES, filled, CACHE_LAST_OUT);
}

// Begins the first stages: weights do not wait for the predecessor, activations do.
template <int L>
__device__ __forceinline__ void fill_ring(const struct product_args &args, const struct wide_shape &shape,
                                          const struct wide_place &place, uint32_t begin, uint32_t count,
                                          barrier_t *filled, barrier_t *drained)
{
    extern __shared__ __align__(128) unsigned char shared[];
    uint32_t lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < shape.stages; i++) {
            barrier_init(filled + i, 1);
            barrier_init(drained + i, blockDim.x / 32);
        }
        barrier_publish();
        for (uint32_t i = 0; i < count; i++)
            barrier_expect(filled + i, stage_bytes<L>(args, place));
    }
    __syncwarp();
    for (uint32_t i = 0; threadIdx.x < 32 && i < count; i++)
        copy_records<L>(args, place, begin + i, shared + i * shape.stage_bytes, filled + i, lane);
    cuda_release();
    cuda_wait();
    for (uint32_t i = 0; threadIdx.x == 0 && i < count; i++)
        copy_columns(args, shape, begin + i, shared + i * shape.stage_bytes, filled + i);
    __syncthreads();
}

// The first warp: fills `stage` with K block k once all warps have left it.
template <int L>
__device__ __forceinline__ void refill(const struct product_args &args, const struct wide_shape &shape,
                                       const struct wide_place &place, uint32_t k, uint32_t stage,
                                       uint32_t parity, barrier_t *filled, barrier_t *drained)
{
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned char *to = shared + stage * shape.stage_bytes;
    if (threadIdx.x == 0) {
        barrier_await(drained + stage, parity);
        barrier_expect(filled + stage, stage_bytes<L>(args, place));
        copy_columns(args, shape, k, to, filled + stage);
    }
    __syncwarp();
    copy_records<L>(args, place, k, to, filled + stage, threadIdx.x);
}

// The sums of a cluster's blocks, added in the order of their runs: every block does a share of the rows.
template <int NT>
__device__ void reduce_cluster(const struct product_args &args, const struct wide_shape &shape,
                               const struct wide_place &place, const float (*acc)[4])
{
    extern __shared__ __align__(128) unsigned char shared[];
    cg::cluster_group cluster = cg::this_cluster();
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t rows = shape.tiles * CUDA_TILE_ROWS, stride = rows + 4;
    float *sums = (float *)shared;
    __syncthreads(); // the ring is not read any more
#pragma unroll
    for (int i = 0; i < 4 * NT; i++)
        sums[(i / 4 * 8 + 2 * (lane % 4) + i % 2) * stride + warp * CUDA_TILE_ROWS + lane / 4 +
             i % 4 / 2 * 8] = acc[i / 4][i % 4];
    cluster.sync();
    uint32_t share = rows / args.chunks, first = cluster.block_rank() * share;
    const float *others[PRODUCT_CHUNKS];
#pragma unroll
    for (uint32_t c = 0; c < PRODUCT_CHUNKS; c++)
        others[c] = cluster.map_shared_rank(sums, c < args.chunks ? c : 0);
    for (uint32_t i = threadIdx.x; i < share * args.columns; i += blockDim.x) {
        uint32_t row = first + i % share, column = i / share;
        if (row >= place.n_tiles * CUDA_TILE_ROWS)
            continue;
        float parts[PRODUCT_CHUNKS];
#pragma unroll
        for (uint32_t c = 0; c < PRODUCT_CHUNKS; c++) // all on their way before the first is added
            parts[c] = c < args.chunks ? others[c][column * stride + row] : 0;
        float sum = parts[0];
#pragma unroll
        for (uint32_t c = 1; c < PRODUCT_CHUNKS; c++)
            sum = c < args.chunks ? sum + parts[c] : sum;
        product_store(args, args.parts[place.part], place.tile * CUDA_TILE_ROWS + row, column, sum);
    }
    cluster.sync(); // nobody leaves while others read
}

template <int L, int NT>
__global__ void __launch_bounds__(WIDE_TILES * 32, 1)
    product_wide_kernel(const __grid_constant__ struct product_args args, struct wide_shape shape)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) barrier_t filled[WIDE_STAGES], drained[WIDE_STAGES];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    struct wide_place place = place_of(args, shape);
    uint32_t begin = product_chunk_begin(args, place.chunk);
    uint32_t blocks = product_chunk_begin(args, place.chunk + 1) - begin;
    uint32_t ahead = min(blocks, shape.stages); // K blocks whose copies have begun
    fill_ring<L>(args, shape, place, begin, ahead, filled, drained);
    float acc[NT][4] = {};
    for (uint32_t k = 0, stage = 0, parity = 0; k < blocks; k++) {
        const unsigned char *from = shared + stage * shape.stage_bytes;
        if (warp == 0 && k > 0 && ahead < blocks) { // the stage before is free, or soon
            uint32_t before = stage == 0 ? shape.stages - 1 : stage - 1;
            refill<L>(args, shape, place, begin + ahead++, before, stage == 0 ? parity ^ 1 : parity, filled,
                      drained);
        }
        __syncwarp();
        barrier_await(filled + stage, parity);
        if (warp < place.n_tiles)
            record_multiply<L, NT>(from + warp * record_form_of(L).bytes, from + shape.columns_at,
                                   args.columns, lane, acc);
        __syncwarp();
        if (lane == 0)
            barrier_arrive(drained + stage);
        if (++stage == shape.stages)
            stage = 0, parity ^= 1;
    }
    if (args.chunks > 1) {
        reduce_cluster<NT>(args, shape, place, acc);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4 * NT; i++) {
        if (warp < place.n_tiles)
            product_store(args, args.parts[place.part],
                          (place.tile + warp) * CUDA_TILE_ROWS + lane / 4 + i % 4 / 2 * 8,
                          i / 4 * 8 + 2 * (lane % 4) + i % 2, acc[i / 4][i % 4]);
    }
}

// --- launching ---

// attributes[2], zero: of the launch, then of its clusters.
static cudaLaunchConfig_t cluster_config(const struct cuda_device *device, const struct product_args &args,
                                         uint32_t blocks, uint32_t threads, size_t shared,
                                         cudaLaunchAttribute *attributes)
{
    cudaLaunchConfig_t config = cuda_launch_config(device, blocks, threads, shared, attributes);
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = args.chunks;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.numAttrs = 2;
    return config;
}

static uint32_t blocks_of(const struct product_args &args, uint32_t tiles)
{
    uint32_t blocks = 0;
    for (uint32_t p = 0; p < args.n_parts; p++)
        blocks += (args.parts[p].tiles + tiles - 1) / tiles * args.chunks;
    return blocks;
}

// Tiles a block: what makes the rounds over all places cost least, a block costing its tiles and about two
// more.
static uint32_t choose_tiles(const struct product_args &args, uint32_t places, uint32_t most)
{
    uint32_t best = 4, best_cost = ~0u;
    for (uint32_t tiles = 4; tiles <= most; tiles += 4) { // whole turns of the four schedulers
        uint32_t cost = (blocks_of(args, tiles) + places - 1) / places * (tiles + 2);
        if (cost <= best_cost) {
            best = tiles;
            best_cost = cost;
        }
    }
    return best;
}

// How many blocks of this kernel the GPU holds at once: whole clusters, so fewer than SMs. Asked once for
// each device and number of runs; 0 after a fault.
template <int L, int NT>
static uint32_t places_of(struct cuda_device *device, const struct product_args &args, size_t room)
{
    static uint32_t known[64][PRODUCT_CHUNKS + 1];
    static uint64_t allowed;
    uint32_t *places = &known[device->index % 64][args.chunks];
    void (*const kernel)(const struct product_args, struct wide_shape) = product_wide_kernel<L, NT>;
    if (*places > 0)
        return *places;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = cluster_config(device, args, args.chunks, WIDE_TILES * 32, room, attributes);
    int clusters = 0;
    config.attrs = attributes + 1; // the clusters; overlap is nothing to ask about
    config.numAttrs = 1;
    if (!cuda_allow_shared(device, "wide product", kernel, room, &allowed) ||
        cuda_failed(device, cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "wide product"))
        return 0;
    *places = clusters > 0 ? (uint32_t)clusters * args.chunks : args.chunks;
    return *places;
}

template <int L, int NT> static void launch(struct cuda_device *device, const struct product_args &args)
{
    constexpr uint32_t BYTES = record_form_of(L).bytes;
    size_t room = device->shared_limit - 1024, columns = (size_t)args.columns * CUDA_BLOCK_BYTES;
    uint32_t most = (uint32_t)((room / 2 - columns - 128) / BYTES); // two stages at least
    uint32_t places = places_of<L, NT>(device, args, room);
    struct wide_shape shape = {};
    if (places == 0)
        return;
    shape.tiles = choose_tiles(args, places, most < WIDE_TILES ? most : (uint32_t)WIDE_TILES);
    shape.columns_at = shape.tiles * BYTES;
    shape.stage_bytes = (uint32_t)((shape.columns_at + columns + 127) / 128 * 128);
    shape.stages = (uint32_t)(room / shape.stage_bytes);
    shape.stages = shape.stages < WIDE_STAGES ? shape.stages : (uint32_t)WIDE_STAGES;
    size_t sums = args.chunks > 1 ? (size_t)8 * NT * (shape.tiles * CUDA_TILE_ROWS + 4) * sizeof(float) : 0;
    size_t shared = (size_t)shape.stages * shape.stage_bytes;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = cluster_config(device, args, blocks_of(args, shape.tiles), shape.tiles * 32,
                                               sums > shared ? sums : shared, attributes);
    cuda_failed(device, cudaLaunchKernelEx(&config, product_wide_kernel<L, NT>, args, shape), "wide product");
}

template <int L> static void launch_columns(struct cuda_device *device, const struct product_args &args)
{
    if (args.columns <= 8)
        launch<L, 1>(device, args);
    else if (args.columns <= 16)
        launch<L, 2>(device, args);
    else if (args.columns <= 32)
        launch<L, 4>(device, args);
    else
        launch<L, 8>(device, args);
}

void product_wide(struct cuda_device *device, const struct product_args &args, int layout)
{
    static void (*const LAUNCH[RECORD_LAYOUTS])(struct cuda_device *, const struct product_args &) = {
        launch_columns<RECORD_NIBBLES>,  launch_columns<RECORD_NIBBLES_16>, launch_columns<RECORD_FIVES>,
        launch_columns<RECORD_SIXES>,    launch_columns<RECORD_SCALED_4>,   launch_columns<RECORD_SCALED_5>,
        launch_columns<RECORD_SCALED_8>, launch_columns<RECORD_HALVES>,
    };
    LAUNCH[layout](device, args);
}
