// Products with few columns (one to eight sequences): the kernel that decides how fast a single stream is.
//
// A warp takes one run of K of one tile of 16 rows and streams its records through a ring of its own in
// shared memory, filled by bulk copies that run ahead, the first of them started before the kernel's
// predecessor has finished (weights depend on nobody). It multiplies the records of two K blocks at a time,
// so that products need not wait for one another. Of a gated product (two legs: silu(gate) up) neighbouring
// warps take the same tile of both matrices, and what comes of it is the next product's activation.
//
// Activations of all columns lie in shared memory whole: copied there, or, of one column, made there from the
// residual, with the same arithmetic as the op norm, which saves a kernel and its wait. Where a tile has
// several runs their sums meet in shared memory. A block's tiles are taken in as few passes as 16 warps
// allow.
//
// What a kernel does once counts as much as its loop: it is straight code, most of which comes from the L2
// every time, between two waits. So there is an instance for each thing to do, and little is asked twice.
#include "kernels/cuda/cuda_kv.cuh"
#include "kernels/cuda/cuda_product.cuh"
#include "kernels/cuda/cuda_rows.cuh"

enum {
    SMALL_COLUMNS = 8,
    MAX_WARPS = 16,
    RING_SLOTS = 8,
    NORM_KEPT = 4,           // K blocks a warp
    ENOUGH_BYTES = 64 << 10, // in the rings of a block: twice what is on its way at the memory's rate
    EARLY_BYTES = 80 << 10,  // asked for before the columns: what is queued for longer delays these
};

// One column made from a norm, one that is there, or up to eight.
enum small_begin { COLUMN_NORMED, COLUMN_ALONE, COLUMNS };
// What becomes of sums: rows like others, the next product's activation, or q, k and v.
enum small_end { END_ROWS, END_GATED, END_HEADS };

// What an instance is for: matrices of layouts A and B (the parts' layouts 0 and 1).
template <int A, int B, int BEGIN, int END> struct small_kind {
    static constexpr int FIRST = A, SECOND = B;
    static constexpr bool NORMED = BEGIN == COLUMN_NORMED, GATED = END == END_GATED, HEADS = END == END_HEADS;
    static constexpr uint32_t LEGS = GATED ? 2 : 1,
                              RECORD_BYTES = record_form_of(A).bytes > record_form_of(B).bytes
                                                 ? record_form_of(A).bytes
                                                 : record_form_of(B).bytes;

    __device__ static __forceinline__ uint32_t columns(const struct product_args &args)
    {
        return BEGIN == COLUMNS ? args.columns : 1;
    }

    __device__ static __forceinline__ uint32_t record_bytes(uint32_t layout)
    {
        return A == B || layout == 0 ? record_form_of(A).bytes : record_form_of(B).bytes;
    }
};

struct small_shape {
    uint32_t slots; // of a warp's ring, of two records each
    uint32_t early; // of them filled before the predecessor has finished
    uint32_t tiles_a_pass, tiles_a_block;
    uint32_t more_tiles;   // a block has tiles_a_block, the first more_tiles one more
    uint32_t column_shift; // columns <= 1 << column_shift
};

__device__ __forceinline__ uint32_t tile_of_pass(const struct small_shape &shape, uint32_t pass,
                                                 uint32_t in_pass)
{
    return blockIdx.x + (pass * shape.tiles_a_pass + in_pass) * gridDim.x;
}

// What a warp works on: a run of K of a tile of one leg.
struct warp_task {
    uint32_t chunk, leg, in_pass; // the tile, of those of a pass
};

template <class Kind>
__device__ __forceinline__ struct warp_task task_of(const struct product_args &args, uint32_t warp)
{
    uint32_t unit = warp >> args.chunk_shift;
    return {warp & (args.chunks - 1), unit % Kind::LEGS, unit / Kind::LEGS};
}

// A gated product's tiles are of both its parts.
template <class Kind>
__device__ __forceinline__ const struct product_part &part_of_leg(const struct product_args &args,
                                                                  uint32_t tile, uint32_t leg)
{
    return Kind::GATED ? args.parts[leg] : product_part_of(args, tile);
}

template <class Kind>
__device__ __forceinline__ uint32_t tile_in_part(const struct product_part &part, uint32_t tile)
{
    return Kind::GATED ? tile : tile - part.first_tile;
}

// The records of a warp, in order: its run of K of one tile a pass.
struct record_walk {
    uint32_t pass, left; // K blocks left of the pass's tile; none: there is nothing more
    const unsigned char *at;
    uint32_t step, bytes; // to the next K block's record; of a record
};

template <class Kind>
__device__ __forceinline__ void walk_enter(struct record_walk &walk, const struct product_args &args,
                                           const struct small_shape &shape, const struct warp_task &task)
{
    uint32_t begin = product_chunk_begin(args, task.chunk);
    uint32_t tile = tile_of_pass(shape, walk.pass, task.in_pass);
    walk.left = 0;
    if (tile >= args.tiles)
        return;
    walk.left = product_chunk_begin(args, task.chunk + 1) - begin;
    const struct product_part &part = part_of_leg<Kind>(args, tile, task.leg);
    uint32_t in_part = tile_in_part<Kind>(part, tile), panel = in_part / PANEL_TILES;
    walk.bytes = Kind::record_bytes(part.layout);
    walk.step = min(part.tiles - panel * PANEL_TILES, (uint32_t)PANEL_TILES) * walk.bytes;
    walk.at = part.records + record_index(in_part, begin, part.tiles, args.k_blocks) * walk.bytes;
}

// Starts the copies of the next one or two records to a slot, whose barrier `filled` is, and goes on.
template <class Kind>
__device__ __forceinline__ void walk_copy(struct record_walk &walk, const struct product_args &args,
                                          const struct small_shape &shape, const struct warp_task &task,
                                          uint32_t lane, unsigned char *slot, barrier_t *filled)
{
    uint32_t blocks = walk.left >= 2 ? 2 : 1;
    if (lane == 0) {
        barrier_expect(filled, blocks * walk.bytes);
        copy_bulk(slot, walk.at, walk.bytes, filled, CACHE_FIRST_OUT);
        if (blocks == 2)
            copy_bulk(slot + Kind::RECORD_BYTES, walk.at + walk.step, walk.bytes, filled, CACHE_FIRST_OUT);
    }
    walk.at += blocks * walk.step;
    walk.left -= blocks;
    if (walk.left == 0) {
        walk.pass++;
        walk_enter<Kind>(walk, args, shape, task);
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

// The column's norm, as norm_kernel computes it: a warp a K block.
struct norm_piece { // eight elements of a lane
    float values[8], factors[8];
};

__device__ __forceinline__ void norm_factors(const struct product_args &args, struct norm_piece &piece,
                                             uint32_t k_block)
{
    row_read8(args.norm.weight + k_block * CUDA_K_BLOCK + threadIdx.x % 32 * 8, piece.factors);
}

__device__ __forceinline__ void norm_values(const struct product_args &args, struct norm_piece &piece,
                                            uint32_t k_block)
{
    row_read8(args.norm.x + k_block * CUDA_K_BLOCK + threadIdx.x % 32 * 8, piece.values);
}

__device__ __forceinline__ void norm_store(struct norm_piece &piece, float scale, unsigned char *record)
{
    uint32_t lane = threadIdx.x % 32;
    struct activation_view unscaled = {};
    float sum;
    unscaled.per_unit = 1;
    row_apply(piece.values, piece.factors, scale);
    *(uint4 *)(record + lane * 16) = activation_round8(unscaled, piece.values, &sum);
    if (lane % 2 == 0)
        activation_store_sum(record, lane / 2, sum);
}

// The first pieces of a warp are kept in registers from the sums to the end, so that most rows are read once.
__device__ __forceinline__ void norm_begin(const struct product_args &args, struct norm_piece *kept)
{
    uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        if (warp + j * warps < args.k_blocks)
            norm_factors(args, kept[j], warp + j * warps);
    }
}

// squares: [k_blocks].
__device__ __forceinline__ void norm_column(const struct product_args &args, struct norm_piece *kept,
                                            unsigned char *to, float *squares)
{
    uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = args.k_blocks;
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        if (warp + j * warps < n)
            norm_values(args, kept[j], warp + j * warps);
    }
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        if (warp + j * warps < n) {
            float sum = row_chunk_squares(kept[j].values);
            if (lane == 0)
                squares[warp + j * warps] = sum;
        }
    }
    for (uint32_t i = warp + NORM_KEPT * warps; i < n; i += warps) {
        struct norm_piece more;
        norm_values(args, more, i);
        float sum = row_chunk_squares(more.values);
        if (lane == 0)
            squares[i] = sum;
    }
    __syncthreads();
    float scale = row_scale(squares, n, args.norm.per_width, args.norm.epsilon);
#pragma unroll
    for (uint32_t j = 0; j < NORM_KEPT; j++) {
        if (warp + j * warps < n)
            norm_store(kept[j], scale, to + (warp + j * warps) * CUDA_BLOCK_BYTES);
    }
    for (uint32_t i = warp + NORM_KEPT * warps; i < n; i += warps) {
        struct norm_piece more;
        norm_factors(args, more, i);
        norm_values(args, more, i);
        norm_store(more, scale, to + i * CUDA_BLOCK_BYTES);
    }
}

// --- sums of a pass, and what becomes of them ---

// sums: [tile of the pass][leg][chunk][column][row]. Read before the first is needed.
template <class Kind>
__device__ __forceinline__ float sum_runs(const struct product_args &args, const float *sums, uint32_t slot,
                                          uint32_t leg, uint32_t column, uint32_t row)
{
    uint32_t step = Kind::columns(args) * 16;
    const float *from = sums + ((slot * Kind::LEGS + leg) << args.chunk_shift) * step + column * 16 + row;
    float runs[PRODUCT_CHUNKS], sum;
#pragma unroll
    for (uint32_t c = 0; c < PRODUCT_CHUNKS; c++)
        runs[c] = c < args.chunks ? from[c * step] : 0;
    sum = runs[0];
#pragma unroll
    for (uint32_t c = 1; c < PRODUCT_CHUNKS; c++)
        sum = c < args.chunks ? sum + runs[c] : sum;
    return sum;
}

// An element of a pass: row `row` of a tile. Not live: there is no such thing.
struct pass_element {
    uint32_t slot, column, tile, row;
    bool live;
};

template <class Kind>
__device__ __forceinline__ struct pass_element
pass_element_of(const struct product_args &args, const struct small_shape &shape, uint32_t pass, uint32_t i)
{
    struct pass_element e;
    uint32_t columns = Kind::columns(args), column_shift = columns == 1 ? 0 : shape.column_shift;
    e.slot = i / 16 >> column_shift;
    e.column = i / 16 - (e.slot << column_shift);
    e.tile = tile_of_pass(shape, pass, e.slot);
    e.row = 0;
    e.live = e.slot < shape.tiles_a_pass && e.tile < args.tiles && e.column < columns;
    if (e.live) {
        const struct product_part &part = part_of_leg<Kind>(args, e.tile, 0);
        e.row = tile_in_part<Kind>(part, e.tile) * CUDA_TILE_ROWS + i % 16;
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
template <class Kind> struct pass_end {
    struct pass_element element;
    struct product_end of_leg[Kind::LEGS];
    struct head_end head;

    __device__ __forceinline__ void begin(const struct product_args &args, const struct small_shape &shape,
                                          uint32_t pass, uint32_t i)
    {
        element = pass_element_of<Kind>(args, shape, pass, i);
#pragma unroll
        for (uint32_t leg = 0; leg < Kind::LEGS; leg++) {
            of_leg[leg] = {};
            if (element.live)
                of_leg[leg] = product_end_of(part_of_leg<Kind>(args, element.tile, leg), element.row);
        }
        if (Kind::HEADS && element.live)
            head.begin(args.heads, element.tile * CUDA_TILE_ROWS + i % 16, element.column);
    }

    __device__ __forceinline__ void read_old(const struct product_args &args)
    {
        if (Kind::GATED || Kind::HEADS || !element.live)
            return;
        const struct product_part &part = product_part_of(args, element.tile);
        if (part.accumulate)
            of_leg[0].old = *product_place(part, element.row, element.column);
    }
};

// Adds up the runs of one element and stores it. By whole warps: the sum of 16 rows is part of what is left
// for the next product.
template <class Kind>
__device__ __forceinline__ void finish_element(const struct product_args &args, const float *sums,
                                               const struct pass_end<Kind> &end)
{
    const struct pass_element &e = end.element;
    float of_leg[Kind::LEGS] = {};
#pragma unroll
    for (uint32_t leg = 0; leg < Kind::LEGS; leg++) {
        if (e.live)
            of_leg[leg] =
                product_finish(args, part_of_leg<Kind>(args, e.tile, leg), end.of_leg[leg],
                               sum_runs<Kind>(args, sums, e.slot, leg, e.column, e.row % CUDA_TILE_ROWS));
    }
    float value = of_leg[0];
    if constexpr (Kind::GATED) {
        activation_store1(args.gated, e.column, e.tile * CUDA_TILE_ROWS + threadIdx.x % CUDA_TILE_ROWS,
                          row_gated(value, of_leg[1]), e.live);
        return;
    }
    if constexpr (Kind::HEADS) { // rows 2 i and 2 i + 1 are in neighbouring lanes
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
        *product_place(part, e.row, e.column) =
            Kind::HEADS ? value : product_onto(part, end.of_leg[0].old, value);
    }
}

// All elements of a pass, the thread's first with what was read for it. By the whole block. One column has no
// more than one for a thread.
template <class Kind>
__device__ __forceinline__ void finish_pass(const struct product_args &args, const struct small_shape &shape,
                                            const float *sums, uint32_t pass, struct pass_end<Kind> end)
{
    uint32_t n = shape.tiles_a_pass * 16 << shape.column_shift;
    finish_element<Kind>(args, sums, end);
    for (uint32_t first = blockDim.x; Kind::columns(args) > 1 && first < n; first += blockDim.x) {
        end.begin(args, shape, pass, first + threadIdx.x);
        end.read_old(args);
        finish_element<Kind>(args, sums, end);
    }
}

// --- the products of a slot ---

// acc += the products of one or two records of layout L (the second `apart` bytes behind the first) with
// their K blocks, from `x` on. Without a second record the first stands for it, times `zeros`, which adds
// nothing: a branch would be as much code again.
template <int L>
__device__ __forceinline__ void multiply_slot(const unsigned char *records, uint32_t apart, bool two,
                                              const unsigned char *x, const unsigned char *zeros,
                                              uint32_t columns, uint32_t lane, float (*acc)[4])
{
    if constexpr (record_form_of(L).integer_scales) {
        const unsigned char *both[2] = {records, records + (two ? apart : 0)};
        const unsigned char *xs[2] = {x, two ? x + columns * CUDA_BLOCK_BYTES : zeros};
        const uint32_t counts[2] = {columns, two ? columns : 1};
        record_multiply_two<L>(both, xs, counts, lane, acc);
        return;
    }
    record_multiply<L, 1>(records, x, columns, lane, acc);
    if (two)
        record_multiply<L, 1>(records + apart, x + columns * CUDA_BLOCK_BYTES, columns, lane, acc);
}

// A warp's sums, one for each of its lanes' elements, to [column][row].
__device__ __forceinline__ void leave_sums(uint32_t columns, const float *acc, float *to, uint32_t lane)
{
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t column = 2 * (lane % 4) + i % 2;
        if (column < columns)
            to[column * 16 + lane / 4 + i / 2 * 8] = acc[i];
    }
}

// --- the kernel ---

// A warp's ring: slots of two records, each with a barrier that its copies complete.
template <class Kind> struct warp_ring {
    unsigned char *slots;
    barrier_t *filled;
    struct warp_task task;
    struct record_walk ahead; // what is copied next
    uint32_t slot, parity;    // what is multiplied next

    __device__ __forceinline__ void begin(const struct product_args &args, const struct small_shape &shape,
                                          uint32_t lane)
    {
        if (lane == 0) {
#pragma unroll
            for (uint32_t i = 0; i < RING_SLOTS; i++)
                barrier_init(filled + i, 1);
            barrier_publish();
        }
        __syncwarp();
        ahead.pass = slot = parity = 0;
        walk_enter<Kind>(ahead, args, shape, task);
        fill(args, shape, lane, 0, shape.early);
    }

    // Slots [first, end), which nothing was copied to.
    __device__ __forceinline__ void fill(const struct product_args &args, const struct small_shape &shape,
                                         uint32_t lane, uint32_t first, uint32_t end)
    {
#pragma unroll 1
        for (uint32_t i = first; i < end && ahead.left > 0; i++)
            walk_copy<Kind>(ahead, args, shape, task, lane, slots + i * 2 * Kind::RECORD_BYTES, filled + i);
    }

    // acc += the products of the warp's run of a pass with `x`, its columns.
    __device__ __forceinline__ void multiply(const struct product_args &args, const struct small_shape &shape,
                                             uint32_t pass, uint32_t run, const unsigned char *x,
                                             const unsigned char *zeros, uint32_t lane, float (*acc)[4])
    {
        uint32_t columns = Kind::columns(args), tile = tile_of_pass(shape, pass, task.in_pass);
        uint32_t n = tile < args.tiles ? run : 0;
        bool second = Kind::FIRST != Kind::SECOND && n > 0 && part_of_leg<Kind>(args, tile, task.leg).layout;
        for (uint32_t k = 0; k < n; k += 2, x += 2 * columns * CUDA_BLOCK_BYTES) {
            unsigned char *records = slots + slot * 2 * Kind::RECORD_BYTES;
            bool two = k + 1 < n;
            barrier_await(filled + slot, parity);
            if (second)
                multiply_slot<Kind::SECOND>(records, Kind::RECORD_BYTES, two, x, zeros, columns, lane, acc);
            else
                multiply_slot<Kind::FIRST>(records, Kind::RECORD_BYTES, two, x, zeros, columns, lane, acc);
            __syncwarp();
            if (ahead.left > 0)
                walk_copy<Kind>(ahead, args, shape, task, lane, records, filled + slot);
            if (++slot == shape.slots)
                slot = 0, parity ^= 1;
        }
    }
};

template <class Kind>
__global__ void __launch_bounds__(MAX_WARPS * 32, 1)
    product_small_kernel(const __grid_constant__ struct product_args args, struct small_shape shape)
{
#if CUDA_FOR_90
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) barrier_t filled[MAX_WARPS * RING_SLOTS], columns_here;
    uint32_t warps = blockDim.x / 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    uint32_t n_columns = Kind::columns(args), ring_bytes = shape.slots * 2 * Kind::RECORD_BYTES;
    unsigned char *x = shared + (size_t)warps * ring_bytes;
    unsigned char *zeros = x + (size_t)args.k_blocks * n_columns * CUDA_BLOCK_BYTES;
    float *sums = (float *)(zeros + CUDA_BLOCK_BYTES);
    uint32_t pass_sums = warps * n_columns * 16;
    struct warp_ring<Kind> ring = {
        shared + (size_t)warp *ring_bytes, filled + warp *RING_SLOTS, task_of<Kind>(args, warp)
    };
    struct norm_piece kept[NORM_KEPT];
    struct pass_end<Kind> end;
    if (Kind::NORMED) // before the ring's copies, which would keep them waiting
        norm_begin(args, kept);
    else if (threadIdx.x == 0)
        barrier_init(&columns_here, 1);
    ring.begin(args, shape, lane);
    end.begin(args, shape, 0, threadIdx.x);
    for (uint32_t i = threadIdx.x; i < CUDA_BLOCK_BYTES / 16; i += blockDim.x) // of as little as a warp
        ((uint4 *)zeros)[i] = make_uint4(0, 0, 0, 0);
    cuda_release();
    __syncthreads(); // columns_here and zeros are there for all
    cuda_wait();
    if (Kind::NORMED)
        norm_column(args, kept, x, sums);
    else
        load_columns(args, x, &columns_here, warp, lane);
    ring.fill(args, shape, lane, shape.early, shape.slots);
    end.read_old(args);
    if (Kind::NORMED)
        __syncthreads();
    else
        barrier_await(&columns_here, 0);
    uint32_t first = product_chunk_begin(args, ring.task.chunk);
    uint32_t run = product_chunk_begin(args, ring.task.chunk + 1) - first;
    uint32_t tiles_here = shape.tiles_a_block + (blockIdx.x < shape.more_tiles);
    for (uint32_t pass = 0; pass * shape.tiles_a_pass < tiles_here; pass++) {
        float acc[1][4] = {}, *turn = sums + (pass % 2) * pass_sums;
        ring.multiply(args, shape, pass, run, x + first * n_columns * CUDA_BLOCK_BYTES, zeros, lane, acc);
        leave_sums(n_columns, acc[0], turn + warp * n_columns * 16, lane);
        __syncthreads();
        finish_pass<Kind>(args, shape, turn, pass, end);
        if ((pass + 1) * shape.tiles_a_pass < tiles_here) {
            end.begin(args, shape, pass + 1, threadIdx.x);
            end.read_old(args);
        }
    }
#endif
}

// --- shapes ---

// Shared memory beside the rings: the columns, a K block of zeros, the sums of a pass and the next, and the
// squares of a norm in their place.
static size_t beside_rings(const struct product_args &args, uint32_t warps, uint32_t passes)
{
    size_t x = ((size_t)args.k_blocks * args.columns + 1) * CUDA_BLOCK_BYTES;
    size_t sums = (size_t)(passes > 1 ? 2 : 1) * warps * args.columns * 16 * sizeof(float);
    size_t squares = args.norm.x ? args.k_blocks * sizeof(float) : 0;
    return x + (sums > squares ? sums : squares);
}

// The fewest passes whose rings hold enough to be copied while the rest is multiplied: two slots each, or as
// much as the memory's latency asks for. Fills in the shape and the shared memory; false when there are none.
static bool choose_shape(struct small_shape *shape, const struct product_args &args, uint32_t legs,
                         uint32_t record_bytes, uint32_t blocks, size_t room, size_t *shared)
{
    uint32_t tiles = (args.tiles + blocks - 1) / blocks, slot_bytes = 2 * record_bytes;
    for (uint32_t passes = 1; passes <= tiles; passes++) {
        shape->tiles_a_pass = (tiles + passes - 1) / passes;
        uint32_t warps = shape->tiles_a_pass * args.chunks * legs;
        size_t beside = beside_rings(args, warps, passes);
        size_t slots = beside < room ? (room - beside) / (warps * slot_bytes) : 0;
        if (warps > MAX_WARPS || slots == 0 || (slots == 1 && warps * slot_bytes < ENOUGH_BYTES))
            continue;
        shape->slots = slots < RING_SLOTS ? (uint32_t)slots : (uint32_t)RING_SLOTS;
        uint32_t early = EARLY_BYTES / (warps * slot_bytes);
        shape->early = early < 1 ? 1 : early < shape->slots ? early : shape->slots;
        *shared = beside + (size_t)warps * shape->slots * slot_bytes;
        return true;
    }
    return false;
}

// False when the columns and the rings do not fit shared memory.
template <class Kind> static bool launch_kind(struct cuda_device *device, const struct product_args &args)
{
    uint32_t blocks = args.tiles < (uint32_t)device->sms ? args.tiles : (uint32_t)device->sms;
    struct small_shape shape = {};
    shape.tiles_a_block = args.tiles / blocks;
    shape.more_tiles = args.tiles % blocks;
    while (1u << shape.column_shift < args.columns)
        shape.column_shift++;
    // Beside what a kernel has of its own, barriers.
    size_t room = device->shared_limit - MAX_WARPS * RING_SLOTS * sizeof(barrier_t) - 128;
    size_t shared;
    if (!choose_shape(&shape, args, Kind::LEGS, Kind::RECORD_BYTES, blocks, room, &shared))
        return false;
    static uint64_t allowed;
    if (!cuda_allow_shared(device, "product", product_small_kernel<Kind>, room, &allowed))
        return true; // the fault is noted: another kernel would not mend it
    cuda_launch(device, "product", product_small_kernel<Kind>, blocks,
                shape.tiles_a_pass * args.chunks * Kind::LEGS * 32, shared, args, shape);
    return true;
}

template <int A, int B, int BEGIN>
static bool launch_begin(struct cuda_device *device, const struct product_args &args)
{
    if (args.gated.groups)
        return launch_kind<small_kind<A, B, BEGIN, END_GATED>>(device, args);
    if (args.heads.pages)
        return launch_kind<small_kind<A, B, BEGIN, END_HEADS>>(device, args);
    return launch_kind<small_kind<A, B, BEGIN, END_ROWS>>(device, args);
}

// The commonest have instances of their own; the last takes the rest.
template <int A, int B> static bool launch(struct cuda_device *device, const struct product_args &args)
{
    if (args.norm.x)
        return launch_begin<A, B, COLUMN_NORMED>(device, args);
    if (args.columns == 1 && !args.gated.groups && !args.heads.pages)
        return launch_kind<small_kind<A, B, COLUMN_ALONE, END_ROWS>>(device, args);
    return launch_begin<A, B, COLUMNS>(device, args);
}

template <int L> static bool launch_one(struct cuda_device *device, const struct product_args &args)
{
    return launch<L, L>(device, args);
}

// Whether a norm can be made in the kernel.
static bool norm_fits(const struct product_args &args)
{
    return args.columns == 1 && args.norm.width % CUDA_K_BLOCK == 0 && (uintptr_t)args.norm.x % 16 == 0 &&
           (uintptr_t)args.norm.weight % 16 == 0;
}

bool product_small(struct cuda_device *device, const struct product_args &args, int layout, int other)
{
    static bool (*const LAUNCH[RECORD_LAYOUTS])(struct cuda_device *, const struct product_args &) = {
        launch_one<RECORD_NIBBLES>,  launch_one<RECORD_NIBBLES_16>, launch_one<RECORD_FIVES>,
        launch_one<RECORD_SIXES>,    launch_one<RECORD_SCALED_4>,   launch_one<RECORD_SCALED_5>,
        launch_one<RECORD_SCALED_8>, launch_one<RECORD_HALVES>,
    };
    if (args.columns > SMALL_COLUMNS || (args.norm.x && !norm_fits(args)))
        return false;
    if (other == layout)
        return LAUNCH[layout](device, args);
    if (layout == RECORD_NIBBLES && other == RECORD_SIXES) // the mixes of Q4_K_M and Q5_K_M
        return launch<RECORD_NIBBLES, RECORD_SIXES>(device, args);
    if (layout == RECORD_NIBBLES && other == RECORD_FIVES) // of Q4_K_M where many heads share keys and values
        return launch<RECORD_NIBBLES, RECORD_FIVES>(device, args);
    if (layout == RECORD_FIVES && other == RECORD_SIXES)
        return launch<RECORD_FIVES, RECORD_SIXES>(device, args);
    return false;
}
