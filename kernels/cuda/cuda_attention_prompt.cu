// Attention of prompt tokens, after FlashAttention-2 (T. Dao, 2023). A block takes 128 consecutive positions
// of one span and one head, and goes through the pages that they see; two pages are in shared memory, one at
// work and the next on its way. A warp has 16 or 32 queries: their scores of a page stay in registers, where
// they turn into weights in the very places where the tensor cores want them for the product with V.
//
// The tensor cores do not care which dimension is called which, as long as both operands agree. So a lane
// reads 16 bytes of 8 neighbouring dimensions (or of 4, of two positions of V) where the instruction's order
// would ask for four separate words, and it ends up with 8 neighbouring dimensions of the output.
//
// What a query does not see has the weight 0 exactly, and a page of which it sees nothing changes nothing of
// its sums: so neither the tile nor the chunk that a query stands in shows in its bits.
//
// Large heads on GPUs with less shared memory: 64 positions a block, one page at a time.
#include "kernels/cuda/cuda_attention.cuh"

enum { TILE_QUERIES = 128, SMALL_TILE_QUERIES = 64 };

template <uint32_t HEAD_WIDTH, uint32_t TILE> struct prompt_shape {
    static constexpr uint32_t WIDTH = HEAD_WIDTH, QUERIES = TILE; // of a head in a page, of a block
    static constexpr int WARPS = WIDTH <= 128 || QUERIES < TILE_QUERIES ? 4 : 8;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int TILES = QUERIES / 16 / WARPS;       // of 16 queries, a warp
    static constexpr int PAGES = QUERIES / 64;               // in shared memory
    static constexpr int PARTS = WIDTH / 32;                 // of 32 dimensions
    static constexpr int CHUNKS = WIDTH / 8;                 // of 16 bytes, a row of K
    static constexpr int IMAGE = KV_PAGE_POSITIONS * CHUNKS; // chunks of a page's K, or V
    static constexpr size_t SHARED = (QUERIES * CHUNKS + PAGES * 2 * IMAGE) * sizeof(uint4);
};

// Queries [row, row + rows) of the batch; the first is at `position`.
struct prompt_tile {
    uint32_t row, rows, position, slot;
};

// Finds tile number `wanted` of the prompt spans, of which each has count / QUERIES rounded up. Every warp
// for itself, 32 spans at once.
template <uint32_t QUERIES>
__device__ __forceinline__ bool find_tile(const attention_args &args, uint32_t wanted, prompt_tile *tile)
{
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t base = args.n_generated; base < args.n_spans; base += 32) {
        batch_span span = {};
        if (base + lane < args.n_spans)
            span = args.spans[base + lane];
        uint32_t tiles = (span.count + QUERIES - 1) / QUERIES, end = tiles;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            uint32_t before = __shfl_up_sync(~0u, end, distance);
            end += lane >= distance ? before : 0;
        }
        uint32_t ahead = __ballot_sync(~0u, end > wanted);
        if (ahead) {
            int owner = __ffs((int)ahead) - 1;
            uint32_t first = (wanted - __shfl_sync(~0u, end - tiles, owner)) * QUERIES;
            tile->row = __shfl_sync(~0u, span.first, owner) + first;
            tile->rows = min(__shfl_sync(~0u, span.count, owner) - first, (uint32_t)QUERIES);
            tile->position = __shfl_sync(~0u, span.position, owner) + first;
            tile->slot = __shfl_sync(~0u, span.slot, owner);
            return true;
        }
        wanted -= __shfl_sync(~0u, end, 31);
    }
    return false;
}

// Starts copying a page's K and V of one head. V's pairs from `pairs` on, which nobody has written, become 0.
template <class shape>
__device__ __forceinline__ void start_page(const attention_args &args, uint4 *keys, uint4 *values,
                                           uint32_t page, uint32_t kv_head, uint32_t pairs)
{
    const uint4 *from = (const uint4 *)page_keys(args, page, kv_head, shape::WIDTH);
    const uint4 *from_values =
        (const uint4 *)((const unsigned char *)from + kv_value_offset(args, shape::WIDTH));
#pragma unroll 4
    for (int i = threadIdx.x; i < shape::IMAGE; i += shape::THREADS) {
        copy_async16(keys + i, from + i, true);
        copy_async16(values + i, from_values + i, i / (2 * shape::CHUNKS) < pairs);
    }
    copy_async_commit();
}

// A warp's queries: scores of one page, sums of weighted values, largest scores and sums of weights. Index
// [tile]; of a tile's rows this lane has g and g + 8.
template <class shape> struct prompt_state {
    float scores[shape::TILES][KV_PAGE_POSITIONS / 8][4];
    float sums[shape::TILES][4 * shape::PARTS][4];
    float most[shape::TILES][2];
    float weight[shape::TILES][2]; // of this lane's positions alone
};

template <class shape>
__device__ __forceinline__ void multiply_keys(prompt_state<shape> &state, const uint4 *queries,
                                              const uint4 *keys)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < shape::TILES; m++)
#pragma unroll
        for (int n = 0; n < KV_PAGE_POSITIONS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                state.scores[m][n][i] = 0;
#pragma unroll
    for (int part = 0; part < shape::PARTS; part++) {
        uint32_t chunk = kv_key_chunk(shape::WIDTH, g, 4 * part + t);
        uint4 q[shape::TILES][2];
#pragma unroll
        for (int m = 0; m < shape::TILES; m++) {
            q[m][0] = queries[(16 * m + g) * shape::CHUNKS + chunk];
            q[m][1] = queries[(16 * m + g + 8) * shape::CHUNKS + chunk];
        }
#pragma unroll
        for (int n = 0; n < KV_PAGE_POSITIONS / 8; n++) {
            uint4 k = keys[(8 * n + g) * shape::CHUNKS + chunk];
#pragma unroll
            for (int m = 0; m < shape::TILES; m++)
                mma_halves(state.scores[m][n], q[m][0].x, q[m][1].x, q[m][0].y, q[m][1].y, k.x, k.y);
#pragma unroll
            for (int m = 0; m < shape::TILES; m++)
                mma_halves(state.scores[m][n], q[m][0].z, q[m][1].z, q[m][0].w, q[m][1].w, k.z, k.w);
        }
    }
}

// Scores of what the queries, the first at `position`, do not see of the page that begins at `from`.
template <class shape>
__device__ __forceinline__ void hide_unseen(prompt_state<shape> &state, uint32_t window, uint32_t position,
                                            uint32_t from)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < shape::TILES; m++)
#pragma unroll
        for (int n = 0; n < KV_PAGE_POSITIONS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t own = position + 16 * m + g + i / 2 * 8, other = from + 8 * n + 2 * t + i % 2;
                if (other > own || (window && own - other >= window))
                    state.scores[m][n][i] = -INFINITY;
            }
}

// Scores become weights; sums are fitted to the new maximum. A factor of 1 is left out: that changes no bits.
template <class shape> __device__ __forceinline__ void soften(prompt_state<shape> &state)
{
#pragma unroll
    for (int m = 0; m < shape::TILES; m++) {
        float fit[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = state.most[m][h];
#pragma unroll
            for (int n = 0; n < KV_PAGE_POSITIONS / 8; n++)
                most = fmaxf(most, fmaxf(state.scores[m][n][2 * h], state.scores[m][n][2 * h + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            float base = most == -INFINITY ? 0 : most, sum = 0; // nothing seen so far: all weights 0
            fit[h] = power_of_2(state.most[m][h] - base);
            state.most[m][h] = most;
#pragma unroll
            for (int n = 0; n < KV_PAGE_POSITIONS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float weight = power_of_2(state.scores[m][n][2 * h + i] - base);
                    state.scores[m][n][2 * h + i] = weight;
                    sum += weight;
                }
            state.weight[m][h] = state.weight[m][h] * fit[h] + sum;
        }
        if (__any_sync(~0u, fit[0] != 1 || fit[1] != 1)) {
#pragma unroll
            for (int n = 0; n < 4 * shape::PARTS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    state.sums[m][n][i] *= fit[i / 2];
        }
    }
}

template <class shape>
__device__ __forceinline__ void multiply_values(prompt_state<shape> &state, const uint4 *values)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < KV_PAGE_POSITIONS / 16; step++) {
        uint32_t p[shape::TILES][4];
#pragma unroll
        for (int m = 0; m < shape::TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = state.scores[m][2 * step + i / 2] + i % 2 * 2;
                p[m][i] = halves_of(pair[0], pair[1]);
            }
#pragma unroll
        for (int part = 0; part < shape::PARTS; part++) {
            uint32_t chunk = kv_value_chunk(t, 8 * part + g);
            uint4 low = values[(8 * step + t) * 2 * shape::CHUNKS + chunk];
            uint4 high = values[(8 * step + t + 4) * 2 * shape::CHUNKS + chunk];
            uint32_t a[4] = {low.x, low.y, low.z, low.w}, b[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int m = 0; m < shape::TILES; m++)
                    mma_halves(state.sums[m][4 * part + i], p[m][0], p[m][1], p[m][2], p[m][3], a[i], b[i]);
        }
    }
}

// The warp's queries are rows [row, row + rows) of the batch.
template <class shape>
__device__ __forceinline__ void store_queries(const attention_args &args, const prompt_state<shape> &state,
                                              uint32_t head, uint32_t row, uint32_t rows)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < shape::TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float weight = state.weight[m][h];
            weight += __shfl_xor_sync(~0u, weight, 1);
            weight += __shfl_xor_sync(~0u, weight, 2);
            float factor = 1.0f / weight;
            uint32_t r = 16 * m + 8 * h + g;
#pragma unroll
            for (int part = 0; part < shape::PARTS; part++) {
                uint32_t dimension = 32 * part + 8 * t;
                float x[8];
#pragma unroll
                for (int i = 0; i < 8; i++)
                    x[i] = state.sums[m][4 * part + i % 4][2 * h + i / 4] * factor + 0.0f;
                activation_store8(args.out, row + r, head * args.head_size + dimension, x,
                                  r < rows && dimension < args.head_size);
            }
        }
}

template <class shape>
__device__ __forceinline__ void load_queries(const attention_args &args, const prompt_tile &tile,
                                             uint32_t head, uint4 *queries)
{
    for (int i = threadIdx.x; i < shape::QUERIES * shape::CHUNKS; i += shape::THREADS) {
        uint32_t r = i / shape::CHUNKS, chunk = i % shape::CHUNKS;
        const float *query = args.q + (size_t)(tile.row + r) * args.q_stride + head * args.head_size;
        queries[r * shape::CHUNKS + kv_key_chunk(shape::WIDTH, r, chunk)] =
            query_chunk(args, query, 8 * chunk, r < tile.rows);
    }
}

template <class shape>
__global__ void __launch_bounds__(shape::THREADS, shape::WIDTH <= 128 ? 2 : 1)
    attention_prompt_kernel(const attention_args args)
{
    extern __shared__ uint4 attention_shared[];
    uint4 *queries = attention_shared, *images = queries + shape::QUERIES * shape::CHUNKS;
    cuda_release();
    cuda_wait();
    prompt_tile tile; // the last ones first: they see most
    if (!find_tile<shape::QUERIES>(args, gridDim.x - 1 - blockIdx.x, &tile))
        return;
    uint32_t head = blockIdx.y, kv_head = head / (args.n_heads / args.n_kv_heads);
    uint32_t end = tile.position + tile.rows; // nobody sees what is there or later
    uint32_t page = first_seen(args, tile.position) / KV_PAGE_POSITIONS;
    uint32_t last_page = (end - 1) / KV_PAGE_POSITIONS, odd_end = end - last_page * KV_PAGE_POSITIONS;
    const uint32_t *table = args.page_tables + (size_t)tile.slot * args.table_stride;
    // The warp's queries.
    uint32_t first = threadIdx.x / 32 * 16 * shape::TILES, position = tile.position + first;
    uint32_t rows = first < tile.rows ? min(tile.rows - first, 16u * shape::TILES) : 0;
    prompt_state<shape> state = {};
#pragma unroll
    for (int m = 0; m < shape::TILES; m++)
        state.most[m][0] = state.most[m][1] = -INFINITY;

    // Position p of a page that nobody wrote makes pair p / 2 half or wholly unwritten.
    auto start = [&](uint32_t number) {
        uint4 *image = images + number % shape::PAGES * 2 * shape::IMAGE;
        start_page<shape>(args, image, image + shape::IMAGE, table[number], kv_head,
                          number < last_page ? KV_PAGE_POSITIONS / 2 : (odd_end + 1) / 2);
    };
    start(page);
    load_queries<shape>(args, tile, head, queries);
    for (; page <= last_page; page++) {
        uint4 *keys = images + page % shape::PAGES * 2 * shape::IMAGE, *values = keys + shape::IMAGE;
        copy_async_wait<0>();
        __syncthreads();
        if (page < last_page) {
            if (shape::PAGES > 1)
                start(page + 1);
        } else if (odd_end % 2) {
            uint32_t *pair = (uint32_t *)(values + odd_end / 2 * 2 * shape::CHUNKS);
            for (uint32_t i = threadIdx.x; i < shape::WIDTH; i += shape::THREADS)
                pair[i] &= 0xffff;
            __syncthreads();
        }
        uint32_t from = page * KV_PAGE_POSITIONS, to = from + KV_PAGE_POSITIONS;
        if (rows && from < position + rows && to > first_seen(args, position)) {
            multiply_keys<shape>(state, queries + first * shape::CHUNKS, keys);
            if (to > position + 1 || from < first_seen(args, position + rows - 1))
                hide_unseen<shape>(state, args.window, position, from);
            soften<shape>(state);
            multiply_values<shape>(state, values);
        }
        if (shape::PAGES == 1 && page < last_page) {
            __syncthreads(); // nobody reads this one any more
            start(page + 1);
        }
    }
    if (rows) // the whole warp
        store_queries<shape>(args, state, head, tile.row + first, rows);
}

template <class shape> static void launch_shape(struct cuda_device *device, const attention_args &args)
{
    static uint64_t allowed;
    if (!cuda_allow_shared(device, "attention of prompts", attention_prompt_kernel<shape>, shape::SHARED,
                           &allowed))
        return;
    uint32_t tiles = (args.n_tokens - args.n_generated) / shape::QUERIES + args.n_spans - args.n_generated;
    cuda_launch(device, "attention of prompts", attention_prompt_kernel<shape>, dim3(tiles, args.n_heads),
                dim3(shape::THREADS), shape::SHARED, args);
}

template <uint32_t WIDTH> static void launch_prompt(struct cuda_device *device, const attention_args &args)
{
    typedef prompt_shape<WIDTH, TILE_QUERIES> large;
    typedef prompt_shape<WIDTH, SMALL_TILE_QUERIES> small;
    static_assert(small::SHARED <= 99 << 10, "what every GPU gives a block");
    if (large::SHARED <= device->shared_limit)
        launch_shape<large>(device, args);
    else
        launch_shape<small>(device, args);
}

void cuda_attention_prompt(struct cuda_device *device, const attention_args &args)
{
    void (*const launch[])(struct cuda_device *, const attention_args &) = {
        launch_prompt<32>,  launch_prompt<64>,  launch_prompt<96>,  launch_prompt<128>,
        launch_prompt<160>, launch_prompt<192>, launch_prompt<224>, launch_prompt<256>};
    launch[kv_width(args.head_size) / 32 - 1](device, args);
}
