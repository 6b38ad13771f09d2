// Attention of generated tokens: few queries a K and V head, long contexts, so the work is to read KV once
// and fast. After Flash-Decoding (T. Dao and others, 2023): a row's positions are cut into splits at fixed
// absolute positions, blocks compute splits, and the last block of a row and KV head to finish (a ticket
// tells) puts them together in ascending order.
//
// A block goes through its splits in steps of STEP positions. K and V each have one buffer in shared memory:
// K of the next step is on its way while weights meet V, V of the next while K is multiplied, and some blocks
// on the same multiprocessor fill the gaps. On the tensor cores KV is the left operand and the queries of the
// group, 8 or 16, the right one. Scores pass through shared memory; then every warp makes the weights for
// itself and has 32 dimensions of the output, whose sums need no help from other warps.
//
// The grid knows nothing of positions: it is recorded once and replayed. Which block computes a split shows
// nowhere in the result.
#include "kernels/cuda/cuda_attention.cuh"

enum {
    DECODE_THREADS = 128,
    DECODE_WARPS = DECODE_THREADS / 32,
    // Splits: of 128 positions at first, then of 512 and of 2048.
    SPLIT_SHORT = 128,
    SPLIT_MIDDLE = 512,
    SPLIT_LONG = 2048,
    MIDDLE_BEGIN = 4096,
    LONG_BEGIN = 32768,
    MIDDLE_FIRST = MIDDLE_BEGIN / SPLIT_SHORT,
    LONG_FIRST = MIDDLE_FIRST + (LONG_BEGIN - MIDDLE_BEGIN) / SPLIT_MIDDLE,
};

__host__ __device__ __forceinline__ uint32_t split_of(uint32_t position)
{
    return position < MIDDLE_BEGIN ? position / SPLIT_SHORT
           : position < LONG_BEGIN ? MIDDLE_FIRST + (position - MIDDLE_BEGIN) / SPLIT_MIDDLE
                                   : LONG_FIRST + (position - LONG_BEGIN) / SPLIT_LONG;
}

__device__ __forceinline__ uint32_t split_begin(uint32_t split)
{
    return split < MIDDLE_FIRST ? split * SPLIT_SHORT
           : split < LONG_FIRST ? MIDDLE_BEGIN + (split - MIDDLE_FIRST) * SPLIT_MIDDLE
                                : LONG_BEGIN + (split - LONG_FIRST) * SPLIT_LONG;
}

template <uint32_t WIDTH, int QUERY_TILES> struct decode_shape {
    static constexpr int STEP = 64;                   // positions
    static constexpr int SHARE = STEP / DECODE_WARPS; // of them a warp's: a part of one page
    static constexpr int PARTS = WIDTH / 32;          // of 32 dimensions
    static constexpr int OWN_PARTS = (PARTS + DECODE_WARPS - 1) / DECODE_WARPS; // at most, a warp
    static constexpr int CHUNKS = WIDTH / 8;                                    // of 16 bytes, a row of K
    static constexpr int SHARE_CHUNKS = SHARE * CHUNKS;                         // of a warp's K, or V
    static constexpr int IMAGE = STEP * CHUNKS;                                 // chunks of a step's K, or V
    static constexpr int SCORES = STEP + 4; // floats of a query: banks differ by query
    static constexpr size_t SHARED = 2 * IMAGE * sizeof(uint4) + QUERY_TILES * 8 * SCORES * sizeof(float);
};

// Where splits' results go: [row][head][n_splits], each WIDTH sums, and the largest score and sum of weights.
struct decode_args {
    attention_args a;
    float *sums;
    float2 *weights;
    unsigned *tickets;
    uint32_t n_splits, head_groups; // head_groups: blocks that share the group of a KV head
};

// What a block works on.
struct decode_task {
    uint32_t row, kv_head, head, n_queries; // queries: heads [head, head + n_queries)
    uint32_t position, first_seen;
    uint32_t first_split, last_split;
    const uint32_t *table;
};

// A step: positions [from, from + STEP) of a split, as far as `end`. Splits are taken from the last, which
// may be long, to the first.
template <int STEP> struct decode_cursor {
    uint32_t split, from, end;

    __device__ __forceinline__ void enter(const decode_task &task, uint32_t number)
    {
        split = number;
        from = max(split_begin(number), task.first_seen / STEP * STEP);
        end = min(split_begin(number + 1), task.position + 1);
    }

    __device__ __forceinline__ bool advance(const decode_task &task, uint32_t stride)
    {
        from += STEP;
        if (from < end)
            return true;
        if (split < task.first_split + stride)
            return false;
        enter(task, split - stride);
        return true;
    }

    // How many of the warp's positions are there, and its page.
    __device__ __forceinline__ uint32_t seen(const decode_task &task) const
    {
        uint32_t share = STEP / DECODE_WARPS, begin = from + threadIdx.x / 32 * share;
        return begin + share <= task.first_seen || begin >= end ? 0 : min(end - begin, share);
    }

    __device__ __forceinline__ uint32_t page(const decode_task &task) const
    {
        uint32_t begin = from + threadIdx.x / 32 * (STEP / DECODE_WARPS);
        return seen(task) ? task.table[begin / KV_PAGE_POSITIONS] : 0;
    }
};

// --- copying ---

template <class Shape>
__device__ __forceinline__ const uint4 *share_in(const unsigned char *head, uint32_t from)
{
    uint32_t begin = (from + threadIdx.x / 32 * Shape::SHARE) % KV_PAGE_POSITIONS;
    return (const uint4 *)head + begin * Shape::CHUNKS;
}

template <uint32_t WIDTH, class Shape>
__device__ __forceinline__ void start_keys(const attention_args &a, const decode_task &task, uint4 *keys,
                                           uint32_t page, uint32_t from, uint32_t seen)
{
    const uint4 *source = share_in<Shape>(page_keys(a, page, task.kv_head, WIDTH), from);
    keys += threadIdx.x / 32 * Shape::SHARE_CHUNKS;
    if (seen) {
#pragma unroll
        for (int i = 0; i < Shape::SHARE_CHUNKS; i += 32)
            copy_async16(keys + i + threadIdx.x % 32, source + i + threadIdx.x % 32, true);
    }
    copy_async_commit();
}

// Pairs of positions that nobody wrote become 0: their weight is 0, but they might be NaN.
template <uint32_t WIDTH, class Shape>
__device__ __forceinline__ void start_values(const attention_args &a, const decode_task &task, uint4 *values,
                                             uint32_t page, uint32_t from, uint32_t seen)
{
    const uint4 *source =
        share_in<Shape>(page_keys(a, page, task.kv_head, WIDTH) + kv_value_offset(a, WIDTH), from);
    values += threadIdx.x / 32 * Shape::SHARE_CHUNKS;
#pragma unroll
    for (int i = 0; i < Shape::SHARE_CHUNKS; i += 32) {
        uint32_t chunk = i + threadIdx.x % 32, pair = chunk / (2 * Shape::CHUNKS);
        copy_async16(values + chunk, source + chunk, 2 * pair < seen);
    }
    copy_async_commit();
}

// The last pair's second position when only the first was written.
template <uint32_t WIDTH, class Shape>
__device__ __forceinline__ void clear_half_pair(uint4 *values, uint32_t seen)
{
    if (seen % 2 == 0)
        return;
    uint32_t *pair =
        (uint32_t *)(values + threadIdx.x / 32 * Shape::SHARE_CHUNKS + seen / 2 * 2 * Shape::CHUNKS);
    for (uint32_t i = threadIdx.x % 32; i < WIDTH; i += 32)
        pair[i] &= 0xffff;
}

// --- computing ---

template <uint32_t WIDTH, int QUERY_TILES> struct decode_state {
    typedef decode_shape<WIDTH, QUERY_TILES> shape;
    uint4 queries[QUERY_TILES][shape::PARTS];        // of query g: 8 dimensions from 8 t of every part
    float sums[shape::OWN_PARTS][QUERY_TILES][2][4]; // see multiply_values
    float most[QUERY_TILES], weight[QUERY_TILES];    // of query g
};

// Scores of the warp's positions, in shared memory [query][SCORES]; -INFINITY for what is not seen.
template <uint32_t WIDTH, int QUERY_TILES>
__device__ __forceinline__ void multiply_keys(const decode_state<WIDTH, QUERY_TILES> &state,
                                              const decode_task &task, const uint4 *keys, float *scores,
                                              uint32_t from)
{
    typedef decode_shape<WIDTH, QUERY_TILES> shape;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    keys += warp * shape::SHARE_CHUNKS;
    float c[shape::SHARE / 16][QUERY_TILES][4] = {};
#pragma unroll
    for (int part = 0; part < shape::PARTS; part++) {
        uint32_t chunk = kv_key_chunk(WIDTH, g, 4 * part + t);
#pragma unroll
        for (int m = 0; m < shape::SHARE / 16; m++) {
            uint4 low = keys[(16 * m + g) * shape::CHUNKS + chunk];
            uint4 high = keys[(16 * m + g + 8) * shape::CHUNKS + chunk];
#pragma unroll
            for (int n = 0; n < QUERY_TILES; n++) {
                uint4 q = state.queries[n][part];
                mma_halves(c[m][n], low.x, high.x, low.y, high.y, q.x, q.y);
                mma_halves(c[m][n], low.z, high.z, low.w, high.w, q.z, q.w);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < shape::SHARE / 16; m++)
#pragma unroll
        for (int n = 0; n < QUERY_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t at = warp * shape::SHARE + 16 * m + g + i / 2 * 8, position = from + at;
                bool hidden = position > task.position || position < task.first_seen;
                scores[(8 * n + 2 * t + i % 2) * shape::SCORES + at] = hidden ? -INFINITY : c[m][n][i];
            }
}

// The weights of a step's positions 16 s + 2 t, + 1, + 8, + 9 for query g of a tile, as halves: what the
// product with V wants of this lane. Returns what the sums so far are to be multiplied with.
template <int STEP>
__device__ __forceinline__ float soften(const float *scores, uint32_t (*weights)[2], float *most,
                                        float *weight)
{
    uint32_t t = threadIdx.x % 4;
    float2 x[STEP / 16][2];
    float highest = *most;
#pragma unroll
    for (int s = 0; s < STEP / 16; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x[s][i] = *(const float2 *)(scores + 16 * s + 8 * i + 2 * t);
            highest = fmaxf(highest, fmaxf(x[s][i].x, x[s][i].y));
        }
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    float base = highest == -INFINITY ? 0 : highest, sum = 0;
#pragma unroll
    for (int s = 0; s < STEP / 16; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float a = power_of_2(x[s][i].x - base), b = power_of_2(x[s][i].y - base);
            sum += a + b;
            weights[s][i] = halves_of(a, b);
        }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float fit = power_of_2(*most - base);
    *most = highest;
    *weight = *weight * fit + sum;
    return fit;
}

// Adds a step's weighted values. sums[own][n][i][j] is of dimension 32 part + 4 g + 2 i + j / 2 and query
// 8 n + 2 t + j % 2, where part = warp + DECODE_WARPS own.
template <uint32_t WIDTH, int QUERY_TILES>
__device__ __forceinline__ void multiply_values(decode_state<WIDTH, QUERY_TILES> &state, const uint4 *values,
                                                const float *scores)
{
    typedef decode_shape<WIDTH, QUERY_TILES> shape;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (warp >= shape::PARTS)
        return;
    uint32_t weights[QUERY_TILES][shape::STEP / 16][2];
#pragma unroll
    for (int n = 0; n < QUERY_TILES; n++) {
        float fit = soften<shape::STEP>(scores + (8 * n + g) * shape::SCORES, weights[n], &state.most[n],
                                        &state.weight[n]);
        float fit_even = __shfl_sync(~0u, fit, 8 * t), fit_odd = __shfl_sync(~0u, fit, 8 * t + 4);
#pragma unroll
        for (int own = 0; own < shape::OWN_PARTS; own++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    state.sums[own][n][i][j] *= j % 2 ? fit_odd : fit_even;
    }
#pragma unroll
    for (int own = 0; own < shape::OWN_PARTS; own++) {
        uint32_t part = warp + DECODE_WARPS * own;
        if (part >= shape::PARTS)
            break;
        uint32_t chunk = kv_value_chunk(t, 8 * part + g);
#pragma unroll
        for (int s = 0; s < shape::STEP / 16; s++) {
            uint4 low = values[(8 * s + t) * 2 * shape::CHUNKS + chunk];
            uint4 high = values[(8 * s + t + 4) * 2 * shape::CHUNKS + chunk];
#pragma unroll
            for (int n = 0; n < QUERY_TILES; n++) {
                const uint32_t *w = weights[n][s];
                mma_halves(state.sums[own][n][0], low.x, low.y, high.x, high.y, w[0], w[1]);
                mma_halves(state.sums[own][n][1], low.z, low.w, high.z, high.w, w[0], w[1]);
            }
        }
    }
}

template <uint32_t WIDTH, int QUERY_TILES>
__device__ __forceinline__ void clear(decode_state<WIDTH, QUERY_TILES> &state)
{
#pragma unroll
    for (int n = 0; n < QUERY_TILES; n++) {
        state.most[n] = -INFINITY;
        state.weight[n] = 0;
#pragma unroll
        for (int own = 0; own < decode_shape<WIDTH, QUERY_TILES>::OWN_PARTS; own++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                state.sums[own][n][i / 4][i % 4] = 0;
    }
}

// --- putting together ---

// A finished split: query q's go to sums + q * stride * WIDTH and weights[q * stride].
template <uint32_t WIDTH, int QUERY_TILES>
__device__ __forceinline__ void leave_split(const decode_state<WIDTH, QUERY_TILES> &state, uint32_t n_queries,
                                            float *sums, float2 *weights, size_t stride)
{
    typedef decode_shape<WIDTH, QUERY_TILES> shape;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < QUERY_TILES; n++) {
        if (warp == 0 && t == 0 && 8 * n + g < n_queries)
            weights[(8 * n + g) * stride] = make_float2(state.most[n], state.weight[n]);
#pragma unroll
        for (int own = 0; own < shape::OWN_PARTS; own++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t part = warp + DECODE_WARPS * own, query = 8 * n + 2 * t + j;
                const float(*c)[4] = state.sums[own][n];
                if (part < shape::PARTS && query < n_queries)
                    *(float4 *)(sums + query * stride * WIDTH + 32 * part + 4 * g) =
                        make_float4(c[0][j], c[0][2 + j], c[1][j], c[1][2 + j]);
            }
    }
}

// Eight dimensions of one query over its splits in ascending order. `sums` are those dimensions of the first.
template <uint32_t WIDTH>
__device__ __forceinline__ void merge_splits(const float *sums, const float2 *weights, uint32_t n_splits,
                                             float *x)
{
    enum { AT_ONCE = 8 }; // splits on their way
    float most = -INFINITY, weight = 0;
    for (uint32_t first = 0; first < n_splits; first += AT_ONCE) {
        float4 part[AT_ONCE][2];
        float2 own[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            uint32_t split = min(first + i, n_splits - 1);
            own[i] = weights[split];
            part[i][0] = *(const float4 *)(sums + (size_t)split * WIDTH);
            part[i][1] = *(const float4 *)(sums + (size_t)split * WIDTH + 4);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= n_splits)
                break;
            float highest = fmaxf(most, own[i].x);
            float fit = power_of_2(most - highest), own_fit = power_of_2(own[i].x - highest);
            const float *values = (const float *)part[i];
            most = highest;
            weight = weight * fit + own[i].y * own_fit;
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] = x[j] * fit + values[j] * own_fit;
        }
    }
    float factor = 1.0f / weight;
#pragma unroll
    for (int j = 0; j < 8; j++)
        x[j] = x[j] * factor + 0.0f;
}

// The outputs of the block's queries from all splits of the row, of which `sums` and `weights` are the first.
template <uint32_t WIDTH>
__device__ __forceinline__ void store_queries(const attention_args &a, const decode_task &task,
                                              const float *sums, const float2 *weights, size_t stride)
{
    uint32_t chunks = a.head_size / 8, n_splits = task.last_split - task.first_split + 1;
    for (uint32_t base = 0; base < task.n_queries * chunks; base += DECODE_THREADS) {
        uint32_t query = (base + threadIdx.x) / chunks, chunk = (base + threadIdx.x) % chunks;
        bool live = query < task.n_queries;
        float x[8] = {};
        if (live)
            merge_splits<WIDTH>(sums + query * stride * WIDTH + 8 * chunk, weights + query * stride, n_splits,
                                x);
        activation_store8(a.out, task.row, (task.head + query) * a.head_size + 8 * chunk, x, live);
    }
}

// True in the block that is the last of `blocks` to come here; it sees what all of them wrote before.
__device__ __forceinline__ bool is_last(unsigned *ticket, uint32_t blocks)
{
    bool last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(ticket, 1) == blocks - 1;
        if (last)
            *ticket = 0;
        __threadfence();
    }
    return __syncthreads_or(last);
}

// --- the kernel ---

__device__ __forceinline__ decode_task find_task(const decode_args &args, int most_queries)
{
    decode_task task;
    uint32_t group = args.a.n_heads / args.a.n_kv_heads, share = blockIdx.x % args.head_groups;
    task.row = blockIdx.y;
    task.kv_head = blockIdx.x / args.head_groups;
    task.head = task.kv_head * group + share * most_queries;
    task.n_queries = min(group - share * most_queries, (uint32_t)most_queries);
    task.position = args.a.positions[task.row];
    task.table = args.a.page_tables + (size_t)args.a.slots[task.row] * args.a.table_stride;
    task.first_seen = first_seen(args.a, task.position);
    task.first_split = split_of(task.first_seen);
    task.last_split = split_of(task.position);
    return task;
}

template <uint32_t WIDTH, int QUERY_TILES>
__device__ __forceinline__ void load_queries(decode_state<WIDTH, QUERY_TILES> &state, const attention_args &a,
                                             const decode_task &task)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < QUERY_TILES; n++) {
        uint32_t query = 8 * n + g;
        const float *row = a.q + (size_t)task.row * a.q_stride + (task.head + query) * a.head_size;
#pragma unroll
        for (int part = 0; part < decode_shape<WIDTH, QUERY_TILES>::PARTS; part++)
            state.queries[n][part] = query_chunk(a, row, 32 * part + 8 * t, query < task.n_queries);
    }
}

template <uint32_t WIDTH, int QUERY_TILES>
__global__ void __launch_bounds__(DECODE_THREADS) attention_decode_kernel(const decode_args args)
{
    typedef decode_shape<WIDTH, QUERY_TILES> shape;
    extern __shared__ uint4 attention_shared[];
    uint4 *keys = attention_shared, *values = keys + shape::IMAGE;
    float *scores = (float *)(values + shape::IMAGE);
    const attention_args &a = args.a;
    decode_task task = find_task(args, 8 * QUERY_TILES);
    uint32_t n_splits = task.last_split - task.first_split + 1, blocks = min(n_splits, gridDim.z);
    if (blockIdx.z >= n_splits)
        return;
    decode_cursor<shape::STEP> now, next;
    now.enter(task, task.last_split - blockIdx.z);
    uint32_t seen = now.seen(task), page = now.page(task);
    cuda_wait();
    start_keys<WIDTH, shape>(a, task, keys, page, now.from, seen);
    start_values<WIDTH, shape>(a, task, values, page, now.from, seen);
    decode_state<WIDTH, QUERY_TILES> state;
    load_queries(state, a, task);
    cuda_release(); // no sooner: the successor's weights would stand before what was just asked for
    clear(state);
    // Results of this row and the block's first head; with a single split they stay in shared memory.
    size_t first = ((size_t)task.row * a.n_heads + task.head) * args.n_splits;
    float *sums = n_splits == 1 ? (float *)keys : args.sums + first * WIDTH;
    float2 *weights = n_splits == 1 ? (float2 *)scores : args.weights + first;
    size_t stride = n_splits == 1 ? 1 : args.n_splits;
    for (bool more = true; more; now = next) {
        next = now;
        more = next.advance(task, blocks);
        uint32_t next_seen = more ? next.seen(task) : 0, next_page = more ? next.page(task) : 0;
        copy_async_wait<1>(); // K
        __syncwarp();
        multiply_keys(state, task, keys, scores, now.from);
        __syncwarp();
        start_keys<WIDTH, shape>(a, task, keys, next_page, next.from, next_seen);
        copy_async_wait<1>(); // V
        __syncwarp();
        clear_half_pair<WIDTH, shape>(values, seen);
        __syncthreads();
        multiply_values(state, values, scores);
        __syncthreads();
        if (more)
            start_values<WIDTH, shape>(a, task, values, next_page, next.from, next_seen);
        seen = next_seen;
        if (!more || next.split != now.split) {
            uint32_t at = n_splits == 1 ? 0 : now.split;
            leave_split(state, task.n_queries, sums + (size_t)at * WIDTH, weights + at, stride);
            clear(state);
        }
    }
    if (n_splits == 1)
        __syncthreads();
    else if (!is_last(args.tickets + task.row * gridDim.x + blockIdx.x, blocks))
        return;
    uint32_t at = n_splits == 1 ? 0 : task.first_split;
    store_queries<WIDTH>(a, task, sums + (size_t)at * WIDTH, weights + at, stride);
}

// --- launching ---

static uint32_t splits_of_pages(uint32_t pages)
{
    return split_of((pages ? pages : 1) * KV_PAGE_POSITIONS - 1) + 1;
}

// Sums first, so that they are aligned to lines.
static size_t sums_bytes(uint32_t n_heads, uint32_t head_size, uint32_t rows, uint32_t pages)
{
    return (size_t)rows * n_heads * splits_of_pages(pages) * kv_width(head_size) * sizeof(float);
}

size_t cuda_attention_decode_scratch(uint32_t n_heads, uint32_t head_size, uint32_t rows, uint32_t pages)
{
    return sums_bytes(n_heads, head_size, rows, pages) +
           (size_t)rows * n_heads * splits_of_pages(pages) * sizeof(float2);
}

// Blocks that share the splits of a row and KV head: enough for the machine to be full about twice with one
// row, and for its end not to drag with many. More would be idle, and even idle blocks want their time.
static uint32_t blocks_a_head(const struct cuda_device *device, size_t shared, uint32_t pairs,
                              uint32_t n_splits)
{
    uint32_t at_once = (uint32_t)(device->sms * (device->shared_limit / shared));
    uint32_t blocks = 2 * at_once / pairs;
    blocks = blocks < 4 ? 4 : blocks;
    return blocks < n_splits ? blocks : n_splits;
}

template <uint32_t WIDTH, int QUERY_TILES>
static void launch_decode(struct cuda_device *device, const decode_args &args)
{
    typedef decode_shape<WIDTH, QUERY_TILES> shape;
    static uint64_t allowed;
    const char *name = "attention of generated tokens";
    if (!cuda_allow_shared(device, name, attention_decode_kernel<WIDTH, QUERY_TILES>, shape::SHARED,
                           &allowed))
        return;
    uint32_t heads = args.a.n_kv_heads * args.head_groups;
    dim3 grid(heads, args.a.n_generated,
              blocks_a_head(device, shape::SHARED, heads * args.a.n_generated, args.n_splits));
    cuda_launch(device, name, attention_decode_kernel<WIDTH, QUERY_TILES>, grid, dim3(DECODE_THREADS),
                shape::SHARED, args);
}

void cuda_attention_decode(struct cuda_device *device, const attention_args &a)
{
    typedef void launcher(struct cuda_device *, const decode_args &);
    static launcher *const launch[][2] = {
        {launch_decode<32, 1>, launch_decode<32, 2>},   {launch_decode<64, 1>, launch_decode<64, 2>},
        {launch_decode<96, 1>, launch_decode<96, 2>},   {launch_decode<128, 1>, launch_decode<128, 2>},
        {launch_decode<160, 1>, launch_decode<160, 2>}, {launch_decode<192, 1>, launch_decode<192, 2>},
        {launch_decode<224, 1>, launch_decode<224, 2>}, {launch_decode<256, 1>, launch_decode<256, 2>}};
    uint32_t group = a.n_heads / a.n_kv_heads, query_tiles = group <= 8 ? 1 : 2;
    decode_args args = {};
    args.a = a;
    args.head_groups = (group + 8 * query_tiles - 1) / (8 * query_tiles);
    args.n_splits = splits_of_pages(a.table_stride);
    args.tickets = device->tickets;
    if ((uint64_t)a.n_generated * a.n_kv_heads * args.head_groups > CUDA_TICKETS) {
        cuda_fault(device, STATUS_INTERNAL, "too many generated tokens and KV heads for one attention");
        return;
    }
    char *scratch = (char *)cuda_scratch(
        device, cuda_attention_decode_scratch(a.n_heads, a.head_size, a.n_generated, a.table_stride));
    if (!scratch)
        return;
    args.sums = (float *)scratch;
    args.weights = (float2 *)(scratch + sums_bytes(a.n_heads, a.head_size, a.n_generated, a.table_stride));
    launch[kv_width(a.head_size) / 32 - 1][query_tiles - 1](device, args);
}
