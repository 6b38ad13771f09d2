// Products with up to 64 columns: continuous batching's decode steps.
//
// A block takes up to 16 tiles and one run of K. A ring of stages in shared memory holds the activations of
// all columns of a K block and the tiles' records of that block, used by all warps; the first thread fills a
// stage again when all warps have left it, one stage late, so that it rarely waits. (A warp of its own for
// that would cost the others a quarter of their registers.) The runs of a tile belong to blocks of one
// cluster, whose sums meet in distributed shared memory, each block adding up an equal share of the rows.
//
// MANY: the activations lie for more than CUDA_FEW_ROWS columns and are multiplied by `wgmma`, which takes
// the four tiles of four warps at once and the columns, padded to 8, 16, 32 or 64, from shared memory. A warp
// has one or two tiles: while the tensor cores multiply one, it unpacks the other. Else they lie for few
// columns and are multiplied by `mma`, a tile a warp, which is the faster for up to 16: those that the kernel
// for few columns (cuda_product_small.cu) does not take. Both give a column the same bits. What was tried
// besides: kernels/lab/cuda_decode.md.
//
// A gated product (two legs: silu(gate) up) is one kernel with what becomes of it: a warp's two tiles are the
// same rows of both matrices, and their sums become the next product's activation. K is one run there.
#include <cooperative_groups.h>

#include "kernels/cuda/cuda_product.cuh"
#include "kernels/cuda/cuda_rows.cuh"
#include "kernels/cuda/cuda_wgmma.cuh"

namespace cg = cooperative_groups;

enum { WIDE_TILES = 16, WIDE_STAGES = 4 };

// Tiles a warp has at most; the second is as many behind the first as there are warps.
template <bool MANY> struct wide_block {
    static constexpr int TILES_A_WARP = MANY ? 2 : 1, MOST_WARPS = WIDE_TILES / TILES_A_WARP;
};

struct wide_shape {
    uint32_t tiles, stages;           // of a block (and leg), of its ring
    uint32_t stage_bytes, records_at; // of a stage: columns first
};

// The part and the first tile (in it) of a block's share; tiles of one block are of one part, or of both
// legs.
struct wide_place {
    uint32_t part, tile, n_tiles, chunk;
};

template <int LEGS>
__device__ __forceinline__ struct wide_place place_of(const struct product_args &args,
                                                      const struct wide_shape &shape)
{
    struct wide_place place = {0, 0, 0, blockIdx.x % args.chunks};
    uint32_t share = blockIdx.x / args.chunks;
    for (; LEGS == 1 && place.part + 1 < args.n_parts; place.part++) {
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

// Copies the records of K block k into a stage, leg after leg: tiles of one panel lie together, so one copy a
// leg, or two. By one thread, which has told the barrier to expect them. (Copies of several lanes go out one
// after the other.)
template <int L, int LEGS>
__device__ __forceinline__ void copy_records(const struct product_args &args, const struct wide_place &place,
                                             uint32_t k, unsigned char *to, barrier_t *filled)
{
    constexpr uint32_t BYTES = record_form_of(L).bytes;
#pragma unroll
    for (int leg = 0; leg < LEGS; leg++) {
        const struct product_part &part = args.parts[place.part + leg];
        for (uint32_t first = 0; first < place.n_tiles;) {
            uint32_t tile = place.tile + first,
                     count = min(place.n_tiles - first, PANEL_TILES - tile % PANEL_TILES);
            copy_bulk(to + first * BYTES,
                      part.records + record_index(tile, k, part.tiles, args.k_blocks) * BYTES, count * BYTES,
                      filled, CACHE_FIRST_OUT);
            first += count;
        }
        to += place.n_tiles * BYTES;
    }
}

template <int L, bool MANY, int LEGS>
__device__ __forceinline__ uint32_t stage_bytes(const struct product_args &args,
                                                const struct wide_place &place)
{
    return LEGS * place.n_tiles * record_form_of(L).bytes +
           (MANY ? (args.columns + 7) / 8 * 8 : args.columns) * CUDA_BLOCK_BYTES;
}

template <int NT, bool MANY>
__device__ __forceinline__ void copy_columns(const struct product_args &args, uint32_t k, unsigned char *to,
                                             barrier_t *filled)
{
    constexpr uint32_t HALVES = 8 * 2 * CUDA_K_BLOCK, SUMS = 8 * 64; // bytes of eight rows
    const unsigned char *from = args.x + (size_t)k * CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES;
    if (MANY) {
        uint32_t eights = (args.columns + 7) / 8;
        copy_bulk(to, from, eights * HALVES, filled, CACHE_LAST_OUT);
        copy_bulk(to + NT * HALVES, from + CUDA_GROUP_ROWS / 8 * HALVES, eights * SUMS, filled,
                  CACHE_LAST_OUT);
    } else {
        copy_bulk(to, from, args.columns * CUDA_BLOCK_BYTES, filled, CACHE_LAST_OUT);
    }
}

// The ring: wgmma wants its operands at multiples of 1024.
__device__ __forceinline__ unsigned char *ring_of(void)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    return shared + (-shared_address(shared) & 1023);
}

// Begins the first stages: weights do not wait for the predecessor, activations do.
template <int L, int NT, bool MANY, int LEGS>
__device__ __forceinline__ void fill_ring(const struct product_args &args, const struct wide_shape &shape,
                                          const struct wide_place &place, uint32_t begin, uint32_t count,
                                          barrier_t *filled, barrier_t *drained)
{
    unsigned char *ring = ring_of();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < shape.stages; i++) {
            barrier_init(filled + i, 1);
            barrier_init(drained + i, blockDim.x / 32);
        }
        barrier_publish();
        for (uint32_t i = 0; i < count; i++) {
            barrier_expect(filled + i, stage_bytes<L, MANY, LEGS>(args, place));
            copy_records<L, LEGS>(args, place, begin + i, ring + i * shape.stage_bytes + shape.records_at,
                                  filled + i);
        }
    }
    cuda_release();
    cuda_wait();
    for (uint32_t i = 0; threadIdx.x == 0 && i < count; i++)
        copy_columns<NT, MANY>(args, begin + i, ring + i * shape.stage_bytes, filled + i);
    __syncthreads();
}

// The first thread: fills `stage` with K block k once all warps have left it.
template <int L, int NT, bool MANY, int LEGS>
__device__ __forceinline__ void refill(const struct product_args &args, const struct wide_shape &shape,
                                       const struct wide_place &place, uint32_t k, uint32_t stage,
                                       uint32_t parity, barrier_t *filled, barrier_t *drained)
{
    unsigned char *to = ring_of() + stage * shape.stage_bytes;
    if (threadIdx.x == 0) {
        barrier_await(drained + stage, parity);
        barrier_expect(filled + stage, stage_bytes<L, MANY, LEGS>(args, place));
        copy_records<L, LEGS>(args, place, k, to + shape.records_at, filled + stage);
        copy_columns<NT, MANY>(args, k, to, filled + stage);
    }
}

// --- finishing ---

// Sums pass through shared memory, where the ring was: by then each thread has four rows that lie together,
// and few instructions do, which the straight code for every register would not be.

// A block's sums: [column][row], `stride` floats a column; tile j of a warp at rows 16 (warp + j x warps).
template <int NT, int TILES>
__device__ __forceinline__ float *put_sums(uint32_t warp, uint32_t lane, uint32_t *stride,
                                           const float (*acc)[NT][4])
{
    uint32_t warps = blockDim.x / 32;
    float *sums = (float *)ring_of();
    *stride = TILES * warps * CUDA_TILE_ROWS + 4;
    __syncthreads(); // the ring is not read any more
#pragma unroll
    for (int i = 0; i < TILES * 4 * NT; i++)
        sums[(i / 4 % NT * 8 + 2 * (lane % 4) + i % 2) * *stride +
             (warp + i / 4 / NT * warps) * CUDA_TILE_ROWS + lane / 4 + i % 4 / 2 * 8] =
            acc[i / 4 / NT][i / 4 % NT][i % 4];
    return sums;
}

// Finishes rows [row, row + 4) of a column.
__device__ __forceinline__ void store4(const struct product_args &args, const struct product_part &part,
                                       uint32_t row, uint32_t column, float4 sum)
{
    float sums[4] = {sum.x, sum.y, sum.z, sum.w}, values[4];
    float *out = product_place(part, row, column);
    if (row + 4 > part.rows || ((uintptr_t)out & 15) != 0) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            product_store(args, part, row + i, column, sums[i]);
        return;
    }
    float4 old = part.accumulate ? *(const float4 *)out : make_float4(0, 0, 0, 0);
    float olds[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
        values[i] =
            product_onto(part, olds[i], product_finish(args, part, product_end_of(part, row + i), sums[i]));
    *(float4 *)out = make_float4(values[0], values[1], values[2], values[3]);
}

__device__ __forceinline__ float4 add4(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

#if CUDA_FOR_90
// The sums of a cluster's blocks, added in the order of their runs: every block does a share of the rows.
// Without a cluster, the block's own.
template <int NT, int TILES>
__device__ __forceinline__ void finish_runs(const struct product_args &args, const struct wide_place &place,
                                            uint32_t warp, uint32_t lane, const float (*acc)[NT][4])
{
    cg::cluster_group cluster = cg::this_cluster();
    uint32_t stride, fours = TILES * (blockDim.x / 32) * CUDA_TILE_ROWS / 4 >> args.chunk_shift;
    float *sums = put_sums<NT, TILES>(warp, lane, &stride, acc);
    const float *others[PRODUCT_CHUNKS];
    if (args.chunks > 1)
        cluster.sync();
    else
        __syncthreads();
#pragma unroll
    for (uint32_t c = 0; c < PRODUCT_CHUNKS; c++)
        others[c] = args.chunks > 1 ? cluster.map_shared_rank(sums, c < args.chunks ? c : 0) : sums;
    uint32_t first = place.chunk * fours * 4;
    for (uint32_t i = threadIdx.x; i < fours * args.columns; i += blockDim.x) {
        uint32_t column = i / fours, row = first + (i - column * fours) * 4;
        if (row >= place.n_tiles * CUDA_TILE_ROWS)
            continue;
        float4 runs[PRODUCT_CHUNKS];
#pragma unroll
        for (uint32_t c = 0; c < PRODUCT_CHUNKS; c++) // all on their way before the first is added
            runs[c] = c < args.chunks ? *(const float4 *)(others[c] + column * stride + row)
                                      : make_float4(0, 0, 0, 0);
        float4 sum = runs[0];
#pragma unroll
        for (uint32_t c = 1; c < PRODUCT_CHUNKS; c++)
            sum = c < args.chunks ? add4(sum, runs[c]) : sum;
        store4(args, args.parts[place.part], place.tile * CUDA_TILE_ROWS + row, column, sum);
    }
    if (args.chunks > 1)
        cluster.sync(); // nobody leaves while others read
}
#endif

// --- stages ---

// acc += factor (of the upper and the lower eight rows) x sums.
template <int NT>
__device__ __forceinline__ void add_sums(float (*acc)[4], float (*sums)[4], float upper, float lower)
{
#pragma unroll
    for (int i = 0; i < 4 * NT; i++)
        acc[i / 4][i % 4] = fmaf(i % 4 / 2 ? lower : upper, sums[i / 4][i % 4], acc[i / 4][i % 4]);
}

// --- four warps and their tiles ---

// The weights of half a record, before the factors, as the A operands of eight wgmma.
template <int L>
__device__ __forceinline__ void unpack_half(const unsigned char *record, int half, int lane, unsigned *a)
{
    struct record_row rows[2] = {record_read_row<L>(record, lane >> 2),
                                 record_read_row<L>(record, (lane >> 2) + 8)};
#pragma unroll
    for (int i = 0; i < 4; i++)
        record_group<L>(record, rows, 4 * half + i, lane, a + 8 * i);
}

// Starts the products of half a K block: sums = A B with integer scales, else sums += A B.
template <int L, int NT>
__device__ __forceinline__ void start_half(float (*sums)[4], const unsigned *a, uint64_t halves, int half)
{
    constexpr bool FRESH = record_form_of(L).integer_scales;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int j = 4 * half + i;
        uint64_t b = halves + (j / 2 * 1024 + j % 2 * 64) / 16;
        if (FRESH && i == 0)
            wgmma_halves<NT, true>(sums, a + 8 * i, b);
        else
            wgmma_halves<NT, false>(sums, a + 8 * i, b);
        wgmma_halves<NT, false>(sums, a + 8 * i + 4, b + 2);
    }
    wgmma_commit();
}

// Starts the products of a record's minimums with the sums of 16 activations.
template <int L, int NT>
__device__ __forceinline__ void start_mins(float (*sums)[4], const unsigned char *record, unsigned *a,
                                           uint64_t sums_of_16, int lane)
{
    int g = lane >> 2, t = lane & 3;
    struct record_row rows[2] = {record_read_row<L>(record, g), record_read_row<L>(record, g + 8)};
    uint2 upper = record_mins<L>(record, rows[0], g, t), lower = record_mins<L>(record, rows[1], g + 8, t);
    a[0] = upper.x, a[1] = lower.x, a[2] = upper.y, a[3] = lower.y;
    wgmma_fence();
    wgmma_halves<NT, record_form_of(L).integer_scales>(sums, a, sums_of_16);
    wgmma_halves<NT, false>(sums, a, sums_of_16 + 2);
    wgmma_commit();
}

// Waits for the products started before the last PENDING, which made `sums`. With integer scales acc += sums
// times their factors, d of the record or (`mins`) dmin.
template <int L, int NT, int PENDING>
__device__ __forceinline__ void take_sums(float (*acc)[4], float (*sums)[4], const unsigned char *record,
                                          int lane, bool mins)
{
    constexpr struct record_form form = record_form_of(L);
    wgmma_wait<PENDING>();
    wgmma_settled<NT>(sums);
    if constexpr (form.integer_scales) {
        const unsigned char *at = record + form.factors + (lane >> 2) * 4;
        float2 upper = __half22float2(*(const __half2 *)at),
               lower = __half22float2(*(const __half2 *)(at + 32));
        if (mins)
            add_sums<NT>(acc, sums, upper.y * -64.0f, lower.y * -64.0f);
        else
            add_sums<NT>(acc, sums, upper.x * 524288.0f, lower.x * 524288.0f);
    }
}

// record_multiply, by four warps for their four tiles, or TILES times four. `columns`: the address in shared
// memory of the halves of 8 NT columns, behind which their sums of 16 lie. Each turn finishes what was
// started a tile's turn ago and starts the next.
template <int L, int NT, int TILES>
__device__ __forceinline__ void multiply_many(const unsigned char *const *records, uint32_t columns, int lane,
                                              float (*acc)[NT][4])
{
    constexpr struct record_form form = record_form_of(L);
    uint64_t halves = wgmma_descriptor(columns, 8 * 2 * CUDA_K_BLOCK, WGMMA_SWIZZLE_128);
    uint64_t sums_of_16 = wgmma_descriptor(columns + NT * 8 * 2 * CUDA_K_BLOCK, 8 * 64, WGMMA_SWIZZLE_64);
    float fresh[TILES][NT][4];
    unsigned a[TILES][32];
    float(*sums[TILES])[4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        sums[tile] = form.integer_scales ? fresh[tile] : acc[tile];
#pragma unroll
    for (int half = 0; half < 2; half++) { // 128 products each, then the factor in f32
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (half > 0)
                take_sums<L, NT, TILES - 1>(acc[tile], sums[tile], records[tile], lane, false);
            unpack_half<L>(records[tile], half, lane, a[tile]);
            start_half<L, NT>(sums[tile], a[tile], halves, half);
        }
    }
    if constexpr (form.has_min) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            take_sums<L, NT, TILES - 1>(acc[tile], sums[tile], records[tile], lane, false);
            start_mins<L, NT>(sums[tile], records[tile], a[tile], sums_of_16, lane);
        }
    }
    take_sums<L, NT, TILES - 1>(acc[0], sums[0], records[0], lane, form.has_min);
    if constexpr (TILES == 2)
        take_sums<L, NT, 0>(acc[1], sums[1], records[1], lane, form.has_min);
}

// A stage's products of the warp's tiles. A warp beyond the tiles is needed all the same, when its four have
// any: it repeats the last.
template <int L, int NT, bool MANY, int LEGS>
__device__ __forceinline__ void
multiply_stage(const struct product_args &args, const struct wide_place &place, const unsigned char *columns,
               const unsigned char *records, uint32_t warp, uint32_t lane, float (*acc)[NT][4])
{
    constexpr uint32_t BYTES = record_form_of(L).bytes;
    if constexpr (!MANY) {
        if (warp < place.n_tiles)
            record_multiply<L, NT>(records + warp * BYTES, columns, args.columns, lane, acc[0]);
    } else {
        uint32_t last = place.n_tiles - 1;
        uint32_t second = LEGS == 2 ? place.n_tiles + min(warp, last) : warp + blockDim.x / 32;
        const unsigned char *both[2] = {records + min(warp, last) * BYTES,
                                        records + (LEGS == 2 ? second : min(second, last)) * BYTES};
        if (LEGS == 2 || second / 4 * 4 < place.n_tiles)
            multiply_many<L, NT, 2>(both, shared_address(columns), lane, acc);
        else
            multiply_many<L, NT, 1>(both, shared_address(columns), lane, acc);
    }
}

// --- gated products ---

// Rows [row, row + 8) of a leg, from their sums; 0 beyond its rows.
__device__ __forceinline__ void finish_leg(const struct product_args &args, const struct product_part &part,
                                           uint32_t row, const float *sums, float *values)
{
    row_load8(sums, 0, 8, values);
#pragma unroll
    for (uint32_t e = 0; e < 8; e++)
        values[e] =
            row + e < part.rows ? product_finish(args, part, product_end_of(part, row + e), values[e]) : 0;
}

// The block's tiles of both legs become elements of the next product's activation, eight a lane.
template <int NT>
__device__ __forceinline__ void store_gated(const struct product_args &args, const struct wide_place &place,
                                            uint32_t warp, uint32_t lane, const float (*acc)[NT][4])
{
    uint32_t stride, eights = 2 * place.n_tiles, second = blockDim.x / 32 * CUDA_TILE_ROWS;
    const float *sums = put_sums<NT, 2>(warp, lane, &stride, acc);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i / 32 * 32 < eights * args.columns; i += blockDim.x) {
        uint32_t column = i / eights, at = (i - column * eights) * 8;
        uint32_t row = place.tile * CUDA_TILE_ROWS + at;
        const float *from = sums + column * stride + at;
        bool live = column < args.columns && row < args.parts[0].rows;
        float values[8] = {}, ups[8];
        if (live) {
            finish_leg(args, args.parts[0], row, from, values);
            finish_leg(args, args.parts[1], row, from + second, ups);
#pragma unroll
            for (int e = 0; e < 8; e++)
                values[e] = row_gated(values[e], ups[e]);
        }
        activation_store8(args.gated, args.gated_row + column, row, values, live);
    }
}

// --- the kernel ---

template <int L, int NT, bool MANY, int LEGS>
__global__ void __launch_bounds__(wide_block<MANY>::MOST_WARPS * 32, 1)
    product_wide_kernel(const __grid_constant__ struct product_args args, struct wide_shape shape)
{
#if CUDA_FOR_90
    constexpr int TILES = wide_block<MANY>::TILES_A_WARP;
    __shared__ __align__(8) barrier_t filled[WIDE_STAGES], drained[WIDE_STAGES];
    unsigned char *ring = ring_of();
    uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    struct wide_place place = place_of<LEGS>(args, shape);
    uint32_t begin = product_chunk_begin(args, place.chunk);
    uint32_t blocks = product_chunk_begin(args, place.chunk + 1) - begin;
    uint32_t ahead = min(blocks, shape.stages); // K blocks whose copies have begun
    fill_ring<L, NT, MANY, LEGS>(args, shape, place, begin, ahead, filled, drained);
    float acc[TILES][NT][4] = {};
    for (uint32_t k = 0, stage = 0, parity = 0; k < blocks; k++) {
        const unsigned char *columns = ring + stage * shape.stage_bytes;
        if (warp == 0 && k > 0 && ahead < blocks) { // the stage before is free, or soon
            uint32_t before = stage == 0 ? shape.stages - 1 : stage - 1;
            refill<L, NT, MANY, LEGS>(args, shape, place, begin + ahead++, before,
                                      stage == 0 ? parity ^ 1 : parity, filled, drained);
        }
        __syncwarp();
        barrier_await(filled + stage, parity);
        multiply_stage<L, NT, MANY, LEGS>(args, place, columns, columns + shape.records_at, warp, lane, acc);
        __syncwarp();
        if (lane == 0)
            barrier_arrive(drained + stage);
        if (++stage == shape.stages)
            stage = 0, parity ^= 1;
    }
    if constexpr (LEGS == 2)
        store_gated<NT>(args, place, warp, lane, acc);
    else
        finish_runs<NT, TILES>(args, place, warp, lane, acc);
#endif
}

// --- launching ---

// `legs`: matrices of which a block takes the same tiles.
static uint32_t blocks_of(const struct product_args &args, uint32_t tiles, uint32_t legs)
{
    uint32_t blocks = 0;
    for (uint32_t p = 0; p < args.n_parts; p += legs)
        blocks += (args.parts[p].tiles + tiles - 1) / tiles * args.chunks;
    return blocks;
}

// Tiles a block: what makes the rounds over all places cost least, a block costing its tiles and about two
// more. A block has whole turns of the four warps of a wgmma, which it need not fill. (With `mma`, 9 to 16
// columns were seen to be the faster for whole fours of tiles, fewer columns for fuller rounds.)
static uint32_t choose_tiles(const struct product_args &args, uint32_t places, uint32_t most, uint32_t legs)
{
    uint32_t best = 4, best_cost = ~0u;
    for (uint32_t tiles = 4; tiles <= most; tiles += args.many || args.columns <= 8 ? 1 : 4) {
        uint32_t cost = (blocks_of(args, tiles, legs) + places - 1) / places * (legs * tiles + 2);
        if (cost <= best_cost) {
            best = tiles;
            best_cost = cost;
        }
    }
    return best;
}

// How many blocks of this kernel the GPU holds at once: whole clusters, so fewer than SMs. Asked once for
// each device and number of runs; 0 after a fault.
template <int L, int NT, bool MANY, int LEGS>
static uint32_t places_of(struct cuda_device *device, uint32_t cluster, size_t room)
{
    static uint32_t known[64][PRODUCT_CHUNKS + 1];
    static uint64_t allowed;
    uint32_t *places = &known[device->index % 64][cluster];
    void (*const kernel)(const struct product_args, struct wide_shape) =
        product_wide_kernel<L, NT, MANY, LEGS>;
    if (*places > 0)
        return *places;
    cudaLaunchAttribute attributes[CUDA_LAUNCH_ATTRIBUTES] = {};
    cudaLaunchConfig_t config =
        cuda_launch_config(device, cluster, wide_block<MANY>::MOST_WARPS * 32, room, cluster, attributes);
    int clusters = 0;
    config.attrs = attributes + 1; // the clusters; overlap is nothing to ask about
    config.numAttrs = 1;
    if (!cuda_allow_shared(device, "wide product", kernel, room, &allowed) ||
        cuda_failed(device, cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "wide product"))
        return 0;
    *places = clusters > 0 ? (uint32_t)clusters * cluster : cluster;
    return *places;
}

template <int L, int NT, bool MANY, int LEGS>
static void launch(struct cuda_device *device, const struct product_args &args)
{
    constexpr uint32_t BYTES = LEGS * record_form_of(L).bytes, MOST_TILES = WIDE_TILES / LEGS;
    size_t room = device->shared_limit - 1024, aligned = room - 1024;
    uint32_t columns = ((MANY ? 8 * NT : args.columns) * CUDA_BLOCK_BYTES + 127) / 128 * 128;
    uint32_t most = (uint32_t)((aligned / 2 - columns - 1024) / BYTES); // two stages at least
    uint32_t places = places_of<L, NT, MANY, LEGS>(device, args.chunks, room);
    struct wide_shape shape = {};
    if (places == 0)
        return;
    shape.tiles = choose_tiles(args, places, most < MOST_TILES ? most : MOST_TILES, LEGS);
    shape.records_at = columns;
    shape.stage_bytes = (columns + shape.tiles * BYTES + 1023) / 1024 * 1024;
    shape.stages = (uint32_t)(aligned / shape.stage_bytes);
    shape.stages = shape.stages < WIDE_STAGES ? shape.stages : (uint32_t)WIDE_STAGES;
    constexpr uint32_t TILES = wide_block<MANY>::TILES_A_WARP, MOST = wide_block<MANY>::MOST_WARPS;
    uint32_t warps = shape.tiles < MOST ? (shape.tiles + 3) / 4 * 4 : MOST;
    size_t rows = TILES * warps * CUDA_TILE_ROWS;
    size_t sums = 8 * NT * (rows + 4) * sizeof(float);
    size_t shared = (size_t)shape.stages * shape.stage_bytes;
    cuda_launch_clusters(device, "wide product", product_wide_kernel<L, NT, MANY, LEGS>,
                         blocks_of(args, shape.tiles, LEGS), warps * 32,
                         (sums > shared ? sums : shared) + 1024, args.chunks, args, shape);
}

template <int L> static void launch_columns(struct cuda_device *device, const struct product_args &args)
{
    if (args.gated.groups && args.columns <= 32)
        launch<L, 4, true, 2>(device, args);
    else if (args.gated.groups)
        launch<L, 8, true, 2>(device, args);
    else if (!args.many && args.columns <= 8)
        launch<L, 1, false, 1>(device, args);
    else if (!args.many)
        launch<L, 2, false, 1>(device, args);
    else if (args.columns <= 8)
        launch<L, 1, true, 1>(device, args);
    else if (args.columns <= 16)
        launch<L, 2, true, 1>(device, args);
    else if (args.columns <= 32)
        launch<L, 4, true, 1>(device, args);
    else
        launch<L, 8, true, 1>(device, args);
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
