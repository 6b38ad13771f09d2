// Products with few columns (one to eight sequences): the kernel that decides how fast a single stream is.
//
// A warp takes one run of K of one tile of 16 rows and streams its records through a ring of its own in
// shared memory, filled by bulk copies that run ahead, the first of them started before the kernel's
// predecessor has finished (weights depend on nobody). Activations of all columns lie in shared memory whole:
// copied there, or made there from the residual, with the same arithmetic as the op norm, which saves a
// kernel and its wait. Where a tile has several runs their sums meet in shared memory. Gated products
// (silu(gate) up) take a tile of both matrices in turn and leave the activation for the next product. The
// number of warps is chosen so that the last round is as full as the others.
#include "kernels/cuda/cuda_product.cuh"
#include "kernels/cuda/cuda_rows.cuh"

enum { SMALL_COLUMNS = 8, NORMED_COLUMNS = 1, MAX_WARPS = 28, MAX_SLOTS_A_WARP = 8 };

struct small_shape {
    uint32_t slots, slot_bytes; // of a warp's ring
    uint32_t tiles_a_pass, tiles_a_block,
        more_tiles; // a block has tiles_a_block, the first more_tiles one more
    uint32_t legs;  // parts whose tiles a warp takes in turn: 2 for gated products, else 1
};

// The records of a warp, in order: passes of tiles, in each one run of K of one tile (of each leg).
struct record_walk {
    uint32_t pass, leg, k_block, k_end; // k_block == k_end: nothing left
    uint32_t layout;                    // 0 or 1
    const unsigned char *at;            // the record, and
    size_t step;                        // bytes from a K block's record to the next one's
};

template <int A, int B> __device__ __forceinline__ uint32_t layout_bytes(uint32_t layout)
{
    return A == B || layout == 0 ? record_form_of(A).bytes : record_form_of(B).bytes;
}

template <int A, int B>
__device__ __forceinline__ void walk_enter(struct record_walk &walk, const struct product_args &args,
                                           const struct small_shape &shape, uint32_t warp)
{
    uint32_t in_pass = warp >> args.chunk_shift, chunk = warp & (args.chunks - 1);
    uint32_t tile = blockIdx.x + (walk.pass * shape.tiles_a_pass + in_pass) * gridDim.x;
    walk.k_block = walk.k_end = 0;
    if (in_pass >= shape.tiles_a_pass || tile >= args.tiles)
        return;
    const struct product_part &part = shape.legs == 2 ? args.parts[walk.leg] : product_part_of(args, tile);
    uint32_t in_part = shape.legs == 2 ? tile : tile - part.first_tile;
    uint32_t panel = in_part / PANEL_TILES, left = part.tiles - panel * PANEL_TILES;
    uint32_t bytes = layout_bytes<A, B>(part.layout);
    walk.layout = part.layout;
    walk.k_block = product_chunk_begin(args, chunk);
    walk.k_end = product_chunk_begin(args, chunk + 1);
    walk.step = (size_t)(left < PANEL_TILES ? left : PANEL_TILES) * bytes;
    walk.at = part.records + record_index(in_part, walk.k_block, part.tiles, args.k_blocks) * bytes;
}

template <int A, int B>
__device__ __forceinline__ void walk_next(struct record_walk &walk, const struct product_args &args,
                                          const struct small_shape &shape, uint32_t warp)
{
    walk.k_block++;
    walk.at += walk.step;
    if (walk.k_block < walk.k_end)
        return;
    if (++walk.leg == shape.legs) {
        walk.leg = 0;
        walk.pass++;
    }
    walk_enter<A, B>(walk, args, shape, warp);
}

template <int A, int B>
__device__ __forceinline__ void copy_record(const struct record_walk &walk, unsigned char *to,
                                            barrier_t *filled)
{
    uint32_t bytes = layout_bytes<A, B>(walk.layout);
    barrier_expect(filled, bytes);
    copy_bulk(to, walk.at, bytes, filled, CACHE_FIRST_OUT);
}

// --- activations to shared memory: [k_blocks][columns][576] ---

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

// The rows' norm, as norm_kernel computes it: a warp a K block of a column. squares: [columns][k_blocks].
struct norm_piece { // eight elements of a lane
    uint32_t column, k_block;
    float values[8], factors[8];
};

__device__ __forceinline__ void norm_load(const struct product_args &args, struct norm_piece &piece,
                                          uint32_t i)
{
    uint32_t width = args.norm.width;
    piece.column = args.columns == 1 ? 0 : i / args.k_blocks;
    piece.k_block = i - piece.column * args.k_blocks;
    uint32_t k = piece.k_block * CUDA_K_BLOCK + threadIdx.x % 32 * 8;
    row_load8(args.norm.x + (size_t)piece.column * width, k, width, piece.values);
    row_load8(args.norm.weight, k, width, piece.factors);
}

__device__ __forceinline__ void norm_store(const struct product_args &args, struct norm_piece &piece,
                                           const float *squares, unsigned char *to)
{
    uint32_t lane = threadIdx.x % 32;
    struct activation_view unscaled = {};
    float sum, scale = row_scale(squares + piece.column * args.k_blocks, args.k_blocks, args.norm.width,
                                 args.norm.epsilon);
    unsigned char *record = to + ((size_t)piece.k_block * args.columns + piece.column) * CUDA_BLOCK_BYTES;
    unscaled.per_unit = 1;
    row_apply(piece.values, piece.factors, scale);
    *(uint4 *)(record + lane * 16) = activation_round8(unscaled, piece.values, &sum);
    if (lane % 2 == 0)
        activation_store_sum(record, lane / 2, sum);
}

// Two pieces a warp are kept in registers from the sums to the end, so that most rows are read once.
__device__ void norm_columns(const struct product_args &args, unsigned char *to, float *squares)
{
    uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t n = args.k_blocks * args.columns;
    struct norm_piece kept[2], more;
#pragma unroll
    for (uint32_t j = 0; j < 2; j++) {
        if (warp + j * warps < n)
            norm_load(args, kept[j], warp + j * warps);
    }
#pragma unroll
    for (uint32_t j = 0; j < 2; j++) {
        float sum = warp + j * warps < n ? row_chunk_squares(kept[j].values) : 0;
        if (lane == 0 && warp + j * warps < n)
            squares[warp + j * warps] = sum;
    }
    for (uint32_t i = warp + 2 * warps; i < n; i += warps) {
        norm_load(args, more, i);
        float sum = row_chunk_squares(more.values);
        if (lane == 0)
            squares[i] = sum;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t j = 0; j < 2; j++) {
        if (warp + j * warps < n)
            norm_store(args, kept[j], squares, to);
    }
    for (uint32_t i = warp + 2 * warps; i < n; i += warps) {
        norm_load(args, more, i);
        norm_store(args, more, squares, to);
    }
}

// --- sums of a pass, and what becomes of them ---

// [slot of the pass][chunk][leg][column][row]
__device__ __forceinline__ float sum_runs(const struct product_args &args, const struct small_shape &shape,
                                          const float *sums, uint32_t slot, uint32_t leg, uint32_t column,
                                          uint32_t row)
{
    uint32_t step = shape.legs * args.columns * 16;
    const float *from = sums + (slot << args.chunk_shift) * step + (leg * args.columns + column) * 16 + row;
    float sum = from[0];
    for (uint32_t c = 1; c < args.chunks; c++)
        sum += from[c * step];
    return sum;
}

// Adds up the runs of the pass's tiles and stores them. By the whole block.
__device__ __forceinline__ void finish_pass(const struct product_args &args, const struct small_shape &shape,
                                            const float *sums, uint32_t pass)
{
    uint32_t n = shape.tiles_a_pass * 16 * args.columns;
    for (uint32_t first = 0; first < n; first += blockDim.x) {
        uint32_t i = first + threadIdx.x, row = i % 16;
        uint32_t slot = args.columns == 1 ? i / 16 : i / 16 / args.columns,
                 column = i / 16 - slot * args.columns;
        uint32_t tile = blockIdx.x + (pass * shape.tiles_a_pass + slot) * gridDim.x;
        bool live = i < n && tile < args.tiles;
        if (shape.legs == 1 && live) {
            const struct product_part &part = product_part_of(args, tile);
            product_store(args, part, (tile - part.first_tile) * CUDA_TILE_ROWS + row, column,
                          sum_runs(args, shape, sums, slot, 0, column, row));
        } else if (shape.legs == 2) { // whole warps: the sum of 16 rows is part of what is left
            float gate = live ? sum_runs(args, shape, sums, slot, 0, column, row) : 0;
            float up = live ? sum_runs(args, shape, sums, slot, 1, column, row) : 0;
            uint32_t k = tile * CUDA_TILE_ROWS + row;
            live = live && k < args.parts[0].rows;
            float value = live ? row_gated(product_finish(args, args.parts[0], k, gate),
                                           product_finish(args, args.parts[1], k, up))
                               : 0;
            activation_store1(args.gated, column, k, value, live);
        }
    }
}

template <int A, int B>
__global__ void __launch_bounds__(MAX_WARPS * 32, 1)
    product_small_kernel(const __grid_constant__ struct product_args args, struct small_shape shape)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) barrier_t filled[MAX_WARPS * MAX_SLOTS_A_WARP], columns_here;
    uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, slots = shape.slots;
    unsigned char *ring = shared + (size_t)warp * slots * shape.slot_bytes;
    unsigned char *x = shared + (size_t)warps * slots * shape.slot_bytes;
    float *sums = (float *)(x + (size_t)args.k_blocks * args.columns * CUDA_BLOCK_BYTES); // two passes' worth
    uint32_t pass_sums = warps * shape.legs * args.columns * 16;
    barrier_t *ready = filled + warp * MAX_SLOTS_A_WARP;

    struct record_walk ahead = {}, here;
    walk_enter<A, B>(ahead, args, shape, warp);
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
        if (lane == 0)
            copy_record<A, B>(ahead, ring + i * shape.slot_bytes, ready + i);
        walk_next<A, B>(ahead, args, shape, warp);
    }
    cuda_release();
    cuda_wait();
    if (args.norm.x)
        norm_columns(args, x, sums);
    else if (warp == 0)
        load_columns(args, x, &columns_here, lane);
    __syncthreads();
    if (!args.norm.x)
        barrier_await(&columns_here, 0);

    uint32_t slot = 0, parity = 0, tiles_here = shape.tiles_a_block + (blockIdx.x < shape.more_tiles);
    for (uint32_t pass = 0; pass * shape.tiles_a_pass < tiles_here; pass++) {
        float *turn = sums + (pass % 2) * pass_sums, *to = turn + warp * shape.legs * args.columns * 16;
        for (uint32_t leg = 0; leg < shape.legs; leg++, to += args.columns * 16) {
            float acc[1][4] = {};
            while (here.k_block < here.k_end && here.pass == pass && here.leg == leg) {
                const unsigned char *columns = x + (size_t)here.k_block * args.columns * CUDA_BLOCK_BYTES;
                barrier_await(ready + slot, parity);
                if (A == B || here.layout == 0)
                    record_multiply<A, 1>(ring + slot * shape.slot_bytes, columns, args.columns, lane, acc);
                else
                    record_multiply<B, 1>(ring + slot * shape.slot_bytes, columns, args.columns, lane, acc);
                __syncwarp();
                if (ahead.k_block < ahead.k_end) {
                    if (lane == 0)
                        copy_record<A, B>(ahead, ring + slot * shape.slot_bytes, ready + slot);
                    walk_next<A, B>(ahead, args, shape, warp);
                }
                walk_next<A, B>(here, args, shape, warp);
                if (++slot == slots)
                    slot = 0, parity ^= 1;
            }
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                uint32_t column = 2 * (lane % 4) + i % 2;
                if (column < args.columns)
                    to[column * 16 + lane / 4 + i / 2 * 8] = acc[0][i];
            }
        }
        __syncthreads();
        finish_pass(args, shape, turn, pass);
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

static uint32_t choose_warps(const struct product_args &args, uint32_t blocks)
{
    uint32_t tiles = (args.tiles + blocks - 1) / blocks, best = 8;
    double share = share_of(tiles, args.chunks, best);
    for (uint32_t warps = 12; warps <= MAX_WARPS; warps += 4) {
        double one = share_of(tiles, args.chunks, warps);
        if (one > share + 0.02 || (one > share - 0.02 && warps <= 20)) {
            best = warps;
            share = one > share ? one : share;
        }
    }
    return best;
}

// False when the columns and two records a warp do not fit shared memory.
template <int A, int B> static bool launch(struct cuda_device *device, const struct product_args &args)
{
    uint32_t blocks = args.tiles < (uint32_t)device->sms ? args.tiles : (uint32_t)device->sms;
    uint32_t warps = choose_warps(args, blocks);
    struct small_shape shape = {};
    shape.legs = args.gated.groups ? 2 : 1;
    shape.tiles_a_pass = warps / args.chunks;
    shape.tiles_a_block = args.tiles / blocks;
    shape.more_tiles = args.tiles % blocks;
    shape.slot_bytes =
        record_form_of(A).bytes > record_form_of(B).bytes ? record_form_of(A).bytes : record_form_of(B).bytes;
    size_t x = (size_t)args.k_blocks * args.columns * CUDA_BLOCK_BYTES;
    size_t sums = (size_t)2 * warps * shape.legs * args.columns * 16 * sizeof(float);
    size_t squares = args.norm.x ? args.k_blocks * args.columns * sizeof(float) : 0;
    sums = sums > squares ? sums : squares;
    size_t room =
        device->shared_limit - MAX_WARPS * MAX_SLOTS_A_WARP * sizeof(barrier_t) - 128; // for barriers
    if (x + sums + (size_t)warps * 2 * shape.slot_bytes > room)
        return false;
    uint32_t slots = (uint32_t)((room - x - sums) / (warps * shape.slot_bytes));
    shape.slots = slots < MAX_SLOTS_A_WARP ? slots : (uint32_t)MAX_SLOTS_A_WARP;
    static uint64_t allowed;
    if (!cuda_allow_shared(device, "product", product_small_kernel<A, B>, room, &allowed))
        return true; // the fault is noted: another kernel would not mend it
    cuda_launch(device, "product", product_small_kernel<A, B>, blocks, warps * 32,
                (size_t)warps * shape.slots * shape.slot_bytes + x + sums, args, shape);
    return true;
}

template <int L> static bool launch_one(struct cuda_device *device, const struct product_args &args)
{
    return launch<L, L>(device, args);
}

bool product_small(struct cuda_device *device, const struct product_args &args, int layout, int other)
{
    static bool (*const LAUNCH[RECORD_LAYOUTS])(struct cuda_device *, const struct product_args &) = {
        launch_one<RECORD_NIBBLES>,  launch_one<RECORD_NIBBLES_16>, launch_one<RECORD_FIVES>,
        launch_one<RECORD_SIXES>,    launch_one<RECORD_SCALED_4>,   launch_one<RECORD_SCALED_5>,
        launch_one<RECORD_SCALED_8>, launch_one<RECORD_HALVES>,
    };
    if (args.columns > (args.norm.x ? NORMED_COLUMNS : SMALL_COLUMNS))
        return false;
    if (other == layout)
        return LAUNCH[layout](device, args);
    if (layout == RECORD_NIBBLES && other == RECORD_SIXES) // the mixes of Q4_K_M and Q5_K_M
        return launch<RECORD_NIBBLES, RECORD_SIXES>(device, args);
    if (layout == RECORD_FIVES && other == RECORD_SIXES)
        return launch<RECORD_FIVES, RECORD_SIXES>(device, args);
    return false;
}
