// Products with few columns (one to eight sequences): the kernel that decides how fast a single stream is.
//
// A warp takes one run of K of one tile of 16 rows and streams its records through a ring of its own in
// shared memory, filled by bulk copies that run ahead, the first of them started before the kernel's
// predecessor has finished (weights depend on nobody). It multiplies the records of two K blocks at a time,
// so that products need not wait for one another. Of a gated product (two legs: silu(gate) up) neighbouring
// warps take the same tile of both matrices, and what comes of it is the next product's activation.
//
// Activations of all columns lie in shared memory whole: copied there, or made there from the residual, with
// the same arithmetic as the op norm, which saves a kernel and its wait. Where a tile has several runs their
// sums meet in shared memory. A block's tiles are taken in as few passes as 16 warps allow.
#include "kernels/cuda/cuda_kv.cuh"
#include "kernels/cuda/cuda_product.cuh"
#include "kernels/cuda/cuda_rows.cuh"

enum {
    SMALL_COLUMNS = 8,
    NORMED_COLUMNS = 1,
    MAX_WARPS = 16,
    RING_SLOTS = 8,
    NORM_KEPT = 2,           // K blocks a warp
    ENOUGH_BYTES = 64 << 10, // in the rings of a block: twice what is on its way at the memory's rate
};

struct small_shape {
    uint32_t slots, record_bytes; // of a warp's ring: slots of two records
    uint32_t tiles_a_pass, tiles_a_block;
    uint32_t more_tiles;   // a block has tiles_a_block, the first more_tiles one more
    uint32_t column_shift; // columns <= 1 << column_shift
    uint32_t leg_shift;    // 1: a gated product, tiles are of both matrices; else 0
};

template <int A, int B> __device__ __forceinline__ uint32_t layout_bytes(uint32_t layout)
{
    return A == B || layout == 0 ? record_form_of(A).bytes : record_form_of(B).bytes;
}

__device__ __forceinline__ uint32_t tile_of_pass(const struct product_args &args,
                                                 const struct small_shape &shape, uint32_t pass,
                                                 uint32_t in_pass)
{
    return blockIdx.x + (pass * shape.tiles_a_pass + in_pass) * gridDim.x;
}

// What a warp works on: a run of K of a tile of one leg.
struct warp_task {
    uint32_t chunk, leg, in_pass; // the tile, of those of a pass
};

__device__ __forceinline__ struct warp_task task_of(const struct product_args &args,
                                                    const struct small_shape &shape, uint32_t warp)
{
    uint32_t unit = warp >> args.chunk_shift;
    return {warp & (args.chunks - 1), unit & shape.leg_shift, unit >> shape.leg_shift};
}

__device__ __forceinline__ const struct product_part &
part_of_leg(const struct product_args &args, const struct small_shape &shape, uint32_t tile, uint32_t leg)
{
    return shape.leg_shift ? args.parts[leg] : product_part_of(args, tile);
}

// The records of a warp, in order: its run of K of one tile a pass.
struct record_walk {
    uint32_t pass, left; // K blocks left of the pass's tile; none: there is nothing more
    const unsigned char *at;
    uint32_t step, bytes; // to the next K block's record; of a record
};

template <int A, int B>
__device__ __forceinline__ void walk_enter(struct record_walk &walk, const struct product_args &args,
                                           const struct small_shape &shape, const struct warp_task &task)
{
    uint32_t begin = product_chunk_begin(args, task.chunk);
    uint32_t tile = tile_of_pass(args, shape, walk.pass, task.in_pass);
    walk.left = 0;
    if (tile >= args.tiles)
        return;
    walk.left = product_chunk_begin(args, task.chunk + 1) - begin;
    const struct product_part &part = part_of_leg(args, shape, tile, task.leg);
    uint32_t in_part = shape.leg_shift ? tile : tile - part.first_tile;
    uint32_t panel = in_part / PANEL_TILES, others = part.tiles - panel * PANEL_TILES;
    walk.bytes = layout_bytes<A, B>(part.layout);
    walk.step = (others < PANEL_TILES ? others : PANEL_TILES) * walk.bytes;
    walk.at = part.records + record_index(in_part, begin, part.tiles, args.k_blocks) * walk.bytes;
}

// Starts the copies of the next one or two records to a slot, whose barrier `filled` is, and goes on.
template <int A, int B>
__device__ __forceinline__ void walk_copy(struct record_walk &walk, const struct product_args &args,
                                          const struct small_shape &shape, const struct warp_task &task,
                                          uint32_t lane, unsigned char *slot, barrier_t *filled)
{
    uint32_t blocks = walk.left >= 2 ? 2 : 1;
    if (lane == 0) {
        barrier_expect(filled, blocks * walk.bytes);
        copy_bulk(slot, walk.at, walk.bytes, filled, CACHE_FIRST_OUT);
        if (blocks == 2)
            copy_bulk(slot + shape.record_bytes, walk.at + walk.step, walk.bytes, filled, CACHE_FIRST_OUT);
    }
    walk.at += blocks * walk.step;
    walk.left -= blocks;
    if (walk.left == 0) {
        walk.pass++;
        walk_enter<A, B>(walk, args, shape, task);
    }
}

// --- activations to shared memory: [k_blocks][columns][576] ---

// By all warps. The copies of a lane go out one after the other: so every warp's first lane has some.
__device__ __forceinline__ void load_columns(const struct product_args &args, unsigned char *to,
                                             barrier_t *barrier, uint32_t warp, uint32_t lane)
{
    uint32_t bytes = args.columns * CUDA_BLOCK_BYTES, warps = blockDim.x / 32;
    if (lane > 0)
        return;
    if (warp == 0)
        barrier_expect(barrier, args.k_blocks * bytes);
    for (uint32_t k = warp; k < args.k_blocks; k += warps)
        copy_bulk(to + (size_t)k * bytes, args.x + (size_t)k * CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES, bytes,
                  barrier, CACHE_LAST_OUT);
}

// The rows' norm, as norm_kernel computes it: a warp a K block of a column. squares: [columns][k_blocks].
struct norm_piece { // eight elements of a lane
    uint32_t column, k_block;
    float values[8], factors[8];
};

__device__ __forceinline__ void norm_factors(const struct product_args &args, struct norm_piece &piece,
                                             uint32_t i)
{
    piece.column = args.columns == 1 ? 0 : i / args.k_blocks;
    piece.k_block = i - piece.column * args.k_blocks;
    row_load8(args.norm.weight, piece.k_block * CUDA_K_BLOCK + threadIdx.x % 32 * 8, args.norm.width,
              piece.factors);
}

__device__ __forceinline__ void norm_values(const struct product_args &args, struct norm_piece &piece)
{
    row_load8(args.norm.x + (size_t)piece.column * args.norm.width,
              piece.k_block * CUDA_K_BLOCK + threadIdx.x % 32 * 8, args.norm.width, piece.values);
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

// The first pieces of a warp are kept in registers from the sums to the end, so that most rows are read once.
__device__ __forceinline__ void norm_begin(const struct product_args &args, struct norm_piece *kept)
{
    uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, n = args.k_blocks * args.columns;
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        if (warp + j * warps < n)
            norm_factors(args, kept[j], warp + j * warps);
    }
}

__device__ __forceinline__ void norm_columns(const struct product_args &args, struct norm_piece *kept,
                                             unsigned char *to, float *squares)
{
    uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t n = args.k_blocks * args.columns;
    struct norm_piece more;
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        if (warp + j * warps < n)
            norm_values(args, kept[j]);
    }
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        float sum = warp + j * warps < n ? row_chunk_squares(kept[j].values) : 0;
        if (lane == 0 && warp + j * warps < n)
            squares[warp + j * warps] = sum;
    }
    for (uint32_t i = warp + NORM_KEPT * warps; i < n; i += warps) {
        norm_factors(args, more, i);
        norm_values(args, more);
        float sum = row_chunk_squares(more.values);
        if (lane == 0)
            squares[i] = sum;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        if (warp + j * warps < n)
            norm_store(args, kept[j], squares, to);
    }
    for (uint32_t i = warp + NORM_KEPT * warps; i < n; i += warps) {
        norm_factors(args, more, i);
        norm_values(args, more);
        norm_store(args, more, squares, to);
    }
}

// --- sums of a pass, and what becomes of them ---

// [tile of the pass][leg][chunk][column][row]
__device__ __forceinline__ float sum_runs(const struct product_args &args, const struct small_shape &shape,
                                          const float *sums, uint32_t slot, uint32_t leg, uint32_t column,
                                          uint32_t row)
{
    uint32_t step = args.columns * 16;
    const float *from =
        sums + (((slot << shape.leg_shift) + leg) << args.chunk_shift) * step + column * 16 + row;
    float sum = from[0];
    for (uint32_t c = 1; c < args.chunks; c++)
        sum += from[c * step];
    return sum;
}

// An element of a pass: row `row` of a tile. Not live: there is no such thing.
struct pass_element {
    uint32_t slot, column, tile, row;
    bool live;
};

__device__ __forceinline__ struct pass_element
pass_element_of(const struct product_args &args, const struct small_shape &shape, uint32_t pass, uint32_t i)
{
    struct pass_element e;
    e.slot = i / 16 >> shape.column_shift;
    e.column = i / 16 - (e.slot << shape.column_shift);
    e.tile = tile_of_pass(args, shape, pass, e.slot);
    e.row = 0;
    e.live = e.slot < shape.tiles_a_pass && e.tile < args.tiles && e.column < args.columns;
    if (e.live) {
        const struct product_part &part = part_of_leg(args, shape, e.tile, 0);
        e.row = (shape.leg_shift ? e.tile : e.tile - part.first_tile) * CUDA_TILE_ROWS + i % 16;
        e.live = e.row < part.rows;
    }
    return e;
}

// Where an element of q, k or v goes, and how it turns.
struct head_end {
    __half *place; // NULL: an element of q, stored like others
    float2 turn;
    bool turns;

    // Of row `row` of q, k and v together.
    __device__ __forceinline__ void begin(const struct product_heads &heads, uint32_t row, uint32_t column)
    {
        uint32_t position = heads.positions[column], in_page = position % KV_PAGE_POSITIONS;
        bool is_q = row < heads.q_rows, is_k = !is_q && row < heads.q_rows + heads.k_rows;
        uint32_t head = row / heads.head_size, at = row - head * heads.head_size;
        place = NULL;
        turns = is_q || is_k;
        turn = make_float2(0, 1);
        if (turns && at / 2 < heads.half)
            turn = sine_cosine(position, heads.frequency[at / 2]);
        if (is_q)
            return;
        uint32_t page =
            heads
                .page_tables[(size_t)heads.slots[column] * heads.table_stride + position / KV_PAGE_POSITIONS];
        // V lies behind the K of all heads; heads are numbered so that this is one count.
        place = (__half *)(heads.pages + page * heads.page_bytes) +
                (size_t)(head - heads.q_rows / heads.head_size) * kv_head_halves(heads.width) +
                (is_k ? kv_key_at(heads.width, in_page, at) : kv_value_at(heads.width, in_page, at));
    }
};

// What the thread's first element of a pass will be finished with, read while the products are made. In two
// parts: what is known before the predecessor has ended, and what it may have written.
struct pass_end {
    struct pass_element element;
    struct product_end of_leg[2];
    struct head_end head;

    __device__ __forceinline__ void begin(const struct product_args &args, const struct small_shape &shape,
                                          uint32_t pass, uint32_t i)
    {
        element = pass_element_of(args, shape, pass, i);
        of_leg[0] = of_leg[1] = {};
        if (element.live)
            of_leg[0] = product_end_of(part_of_leg(args, shape, element.tile, 0), element.row);
        if (element.live && shape.leg_shift)
            of_leg[1] = product_end_of(args.parts[1], element.row);
        if (args.heads.pages && element.live)
            head.begin(args.heads, element.tile * CUDA_TILE_ROWS + i % 16, element.column);
    }

    __device__ __forceinline__ void read_old(const struct product_args &args, const struct small_shape &shape)
    {
        if (shape.leg_shift || !element.live)
            return;
        const struct product_part &part = product_part_of(args, element.tile);
        if (part.accumulate)
            of_leg[0].old = *product_place(part, element.row, element.column);
    }
};

// Adds up the runs of one element and stores it. By whole warps: the sum of 16 rows is part of what is left
// for the next product.
__device__ __forceinline__ void finish_element(const struct product_args &args,
                                               const struct small_shape &shape, const float *sums,
                                               const struct pass_end &end)
{
    const struct pass_element &e = end.element;
    uint32_t in_tile = e.row % CUDA_TILE_ROWS;
    float value = 0;
    if (e.live)
        value = product_finish(args, part_of_leg(args, shape, e.tile, 0), end.of_leg[0],
                               sum_runs(args, shape, sums, e.slot, 0, e.column, in_tile));
    if (shape.leg_shift) {
        if (e.live)
            value =
                row_gated(value, product_finish(args, args.parts[1], end.of_leg[1],
                                                sum_runs(args, shape, sums, e.slot, 1, e.column, in_tile)));
        activation_store1(args.gated, e.column, e.tile * CUDA_TILE_ROWS + threadIdx.x % CUDA_TILE_ROWS, value,
                          e.live);
        return;
    }
    if (args.heads.pages) { // rows 2 i and 2 i + 1 are in neighbouring lanes
        float other = __shfl_xor_sync(~0u, value, 1);
        if (e.live && end.head.turns)
            value = threadIdx.x % 2 ? turned_second(other, value, end.head.turn)
                                    : turned_first(value, other, end.head.turn);
        if (e.live && end.head.place) {
            *end.head.place = bounded_half(value);
            return;
        }
    }
    if (e.live) {
        const struct product_part &part = product_part_of(args, e.tile);
        float *out = product_place(part, e.row, e.column);
        *out = product_onto(part, end.of_leg[0].old, value);
    }
}

// All elements of a pass, the thread's first with what was read for it. By the whole block.
__device__ __forceinline__ void finish_pass(const struct product_args &args, const struct small_shape &shape,
                                            const float *sums, uint32_t pass, struct pass_end end)
{
    uint32_t n = shape.tiles_a_pass * 16 << shape.column_shift;
    finish_element(args, shape, sums, end);
    for (uint32_t first = blockDim.x; first < n; first += blockDim.x) {
        end.begin(args, shape, pass, first + threadIdx.x);
        end.read_old(args, shape);
        finish_element(args, shape, sums, end);
    }
}

// --- the products of a slot ---

// acc += the products of one or two records of layout L (the second `apart` bytes behind the first) with
// their K blocks, from `x` on.
template <int L>
__device__ __forceinline__ void multiply_slot(const unsigned char *records, uint32_t apart, bool two,
                                              const unsigned char *x, uint32_t columns, uint32_t lane,
                                              float (*acc)[4])
{
    const unsigned char *both[2] = {records, records + apart}, *xs[2] = {x, x + columns * CUDA_BLOCK_BYTES};
    if constexpr (record_form_of(L).integer_scales) {
        if (two) {
            record_multiply_two<L>(both, xs, columns, lane, acc);
            return;
        }
    }
    record_multiply<L, 1>(both[0], xs[0], columns, lane, acc);
    if (two)
        record_multiply<L, 1>(both[1], xs[1], columns, lane, acc);
}

// A warp's sums, one for each of its lanes' elements, to [column][row].
__device__ __forceinline__ void leave_sums(const struct product_args &args, const float *acc, float *to,
                                           uint32_t lane)
{
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t column = 2 * (lane % 4) + i % 2;
        if (column < args.columns)
            to[column * 16 + lane / 4 + i / 2 * 8] = acc[i];
    }
}

// --- the kernel ---

// Makes a warp's barriers and begins with its copies.
template <int A, int B>
__device__ __forceinline__ void start_ring(struct record_walk &ahead, const struct product_args &args,
                                           const struct small_shape &shape, const struct warp_task &task,
                                           uint32_t lane, unsigned char *ring, barrier_t *ready)
{
    ahead.pass = 0;
    walk_enter<A, B>(ahead, args, shape, task);
    if (lane == 0) {
        for (uint32_t i = 0; i < shape.slots; i++)
            barrier_init(ready + i, 1);
        barrier_publish();
    }
    __syncwarp();
    for (uint32_t i = 0; i < shape.slots && ahead.left > 0; i++)
        walk_copy<A, B>(ahead, args, shape, task, lane, ring + i * 2 * shape.record_bytes, ready + i);
}

template <int A, int B>
__global__ void __launch_bounds__(MAX_WARPS * 32, 1)
    product_small_kernel(const __grid_constant__ struct product_args args, struct small_shape shape)
{
#if CUDA_FOR_90
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) barrier_t filled[MAX_WARPS * RING_SLOTS], columns_here;
    uint32_t warps = blockDim.x / 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    uint32_t slots = shape.slots, slot_bytes = 2 * shape.record_bytes;
    unsigned char *ring = shared + (size_t)warp * slots * slot_bytes;
    unsigned char *x = shared + (size_t)warps * slots * slot_bytes;
    float *sums = (float *)(x + (size_t)args.k_blocks * args.columns * CUDA_BLOCK_BYTES);
    uint32_t pass_sums = warps * args.columns * 16, column_bytes = args.columns * CUDA_BLOCK_BYTES;
    barrier_t *ready = filled + warp * RING_SLOTS;
    struct warp_task task = task_of(args, shape, warp);
    struct record_walk ahead;
    struct norm_piece kept[NORM_KEPT];
    struct pass_end end;
    if (threadIdx.x == 0)
        barrier_init(&columns_here, 1);
    start_ring<A, B>(ahead, args, shape, task, lane, ring, ready);
    end.begin(args, shape, 0, threadIdx.x);
    if (args.norm.x)
        norm_begin(args, kept);
    cuda_release();
    __syncthreads(); // columns_here is there for all
    cuda_wait();
    end.read_old(args, shape);
    if (args.norm.x) {
        norm_columns(args, kept, x, sums);
        __syncthreads();
    } else {
        load_columns(args, x, &columns_here, warp, lane);
        barrier_await(&columns_here, 0);
    }
    uint32_t begin = product_chunk_begin(args, task.chunk), slot = 0, parity = 0;
    uint32_t run = product_chunk_begin(args, task.chunk + 1) - begin;
    uint32_t tiles_here = shape.tiles_a_block + (blockIdx.x < shape.more_tiles);
    for (uint32_t pass = 0; pass * shape.tiles_a_pass < tiles_here; pass++) {
        float acc[1][4] = {}, *turn = sums + (pass % 2) * pass_sums;
        uint32_t tile = tile_of_pass(args, shape, pass, task.in_pass), n = tile < args.tiles ? run : 0;
        uint32_t layout = A != B && n > 0 ? part_of_leg(args, shape, tile, task.leg).layout : 0;
        const unsigned char *columns = x + begin * column_bytes;
        for (uint32_t k = 0; k < n; k += 2, columns += 2 * column_bytes) {
            unsigned char *records = ring + slot * slot_bytes;
            barrier_await(ready + slot, parity);
            if (A == B || layout == 0)
                multiply_slot<A>(records, shape.record_bytes, k + 1 < n, columns, args.columns, lane, acc);
            else
                multiply_slot<B>(records, shape.record_bytes, k + 1 < n, columns, args.columns, lane, acc);
            __syncwarp();
            if (ahead.left > 0)
                walk_copy<A, B>(ahead, args, shape, task, lane, records, ready + slot);
            if (++slot == slots)
                slot = 0, parity ^= 1;
        }
        leave_sums(args, acc[0], turn + warp * args.columns * 16, lane);
        __syncthreads();
        finish_pass(args, shape, turn, pass, end);
        if ((pass + 1) * shape.tiles_a_pass < tiles_here) {
            end.begin(args, shape, pass + 1, threadIdx.x);
            end.read_old(args, shape);
        }
    }
#endif
}

// --- shapes ---

// Shared memory beside the rings: the columns, the sums of a pass and the next, and the squares of a norm in
// their place.
static size_t beside_rings(const struct product_args &args, uint32_t warps, uint32_t passes)
{
    size_t x = (size_t)args.k_blocks * args.columns * CUDA_BLOCK_BYTES;
    size_t sums = (size_t)(passes > 1 ? 2 : 1) * warps * args.columns * 16 * sizeof(float);
    size_t squares = args.norm.x ? args.k_blocks * args.columns * sizeof(float) : 0;
    return x + (sums > squares ? sums : squares);
}

// The fewest passes whose rings hold enough to be copied while the rest is multiplied: two slots each, or as
// much as the memory's latency asks for. Fills in the shape and the shared memory; false when there are none.
static bool choose_shape(struct small_shape *shape, const struct product_args &args, uint32_t blocks,
                         size_t room, size_t *shared)
{
    uint32_t tiles = (args.tiles + blocks - 1) / blocks, slot_bytes = 2 * shape->record_bytes;
    for (uint32_t passes = 1; passes <= tiles; passes++) {
        shape->tiles_a_pass = (tiles + passes - 1) / passes;
        uint32_t warps = shape->tiles_a_pass * args.chunks << shape->leg_shift;
        size_t beside = beside_rings(args, warps, passes);
        size_t slots = beside < room ? (room - beside) / (warps * slot_bytes) : 0;
        if (warps > MAX_WARPS || slots == 0 || (slots == 1 && warps * slot_bytes < ENOUGH_BYTES))
            continue;
        shape->slots = slots < RING_SLOTS ? (uint32_t)slots : (uint32_t)RING_SLOTS;
        *shared = beside + (size_t)warps * shape->slots * slot_bytes;
        return true;
    }
    return false;
}

// False when the columns and the rings do not fit shared memory.
template <int A, int B> static bool launch(struct cuda_device *device, const struct product_args &args)
{
    uint32_t blocks = args.tiles < (uint32_t)device->sms ? args.tiles : (uint32_t)device->sms;
    struct small_shape shape = {};
    shape.leg_shift = args.gated.groups ? 1 : 0;
    shape.tiles_a_block = args.tiles / blocks;
    shape.more_tiles = args.tiles % blocks;
    shape.record_bytes =
        record_form_of(A).bytes > record_form_of(B).bytes ? record_form_of(A).bytes : record_form_of(B).bytes;
    while (1u << shape.column_shift < args.columns)
        shape.column_shift++;
    size_t room = device->shared_limit - MAX_WARPS * RING_SLOTS * sizeof(barrier_t) - 128; // for barriers
    size_t shared;
    if (!choose_shape(&shape, args, blocks, room, &shared))
        return false;
    static uint64_t allowed;
    if (!cuda_allow_shared(device, "product", product_small_kernel<A, B>, room, &allowed))
        return true; // the fault is noted: another kernel would not mend it
    cuda_launch(device, "product", product_small_kernel<A, B>, blocks,
                (shape.tiles_a_pass * args.chunks << shape.leg_shift) * 32, shared, args, shape);
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
