// One row of logits in the hands of a cluster of 8 blocks: each block keeps its part of the vocabulary in
// shared memory (where it fits), and they agree through distributed shared memory. On the general path a row
// has one block.
//
// Every sum is one of integers: weights exp(offset) are rounded to multiples of 2^-42 once and then added
// exactly. So nothing depends on the order in which threads or blocks come, nor on their number, and "the
// token where the sum passes the target" always exists. The weights themselves have the bits of the CPU
// backend's.
//
// Selections (top-k by count, top-p by mass, the likeliest alternatives) follow the CPU's sampler_draw.c: a
// radix descent over keys that grow as tokens become less likely, without sorting; among equal keys the
// lowest ids are taken. The first digit of offsets is not taken from their bits but in even steps, where a
// row spreads over hundreds of bins and atomics seldom meet; the later ones divide what range is left. Most
// rows need two rounds.
//
// Threads of all blocks of a cluster call every function that names `row` together.
#ifndef STRATA_CUDA_VOCAB_ROW_CUH
#define STRATA_CUDA_VOCAB_ROW_CUH

#include <cfloat>
#include <cooperative_groups.h>

#include "kernels/cuda/cuda_kernel.cuh"

enum {
    ROW_THREADS = 512,
    ROW_WARPS = ROW_THREADS / 32,
    ROW_BIN_BITS = 11,
    ROW_BINS = 1 << ROW_BIN_BITS,
    ROW_MOST_PARTS = 8, // blocks that share a row: so many, or one
};

typedef unsigned long long row_mass; // in units of 2^-42; at most 2^20 tokens of weight 1 in all

// Where the crossing of a target was found, told to every block by the one that found it.
struct row_found {
    uint32_t place; // a bin, or a token
    uint32_t count; // tokens in the bin
    row_mass before;
};

struct row_shared { // of one block
    uint32_t counts[ROW_BINS], mass_low[ROW_BINS], mass_high[ROW_BINS];
    row_mass warps[ROW_WARPS];
    row_mass mail[2][ROW_MOST_PARTS];
    struct row_found found;
    uint32_t n_listed;
    row_mass listed[MAX_TOP_LOGPROBS]; // key << 32 | id
};

struct vocab_row { // one thread's view
    struct row_shared *shared;
    float *x; // the part's logits; for a draw they become offsets, -INFINITY for what cannot be drawn
    uint32_t first, count; // ids of the part; count may be 0
    uint32_t chunk;        // x[thread * chunk, + chunk) are the thread's in order of id: odd, so that a warp
                           // reads 32 banks
    uint32_t rank, parts;  // of the part, of the row
    uint32_t turn;         // of the two mailboxes
};

// Ids per part: whole groups of four floats.
static inline __host__ __device__ uint32_t row_part_size(uint32_t vocab, uint32_t parts)
{
    return ((vocab + parts - 1) / parts + 3) / 4 * 4;
}

// --- the cluster ---

// Blocks may write to one another after cluster_join() and, later, cluster_joined(). A block alone has nobody
// to wait for.
__device__ __forceinline__ void cluster_join(const struct vocab_row &row)
{
#if CUDA_FOR_90
    if (row.parts > 1)
        cooperative_groups::this_cluster().barrier_arrive();
#endif
}

__device__ __forceinline__ void cluster_joined(const struct vocab_row &row)
{
#if CUDA_FOR_90
    if (row.parts > 1)
        cooperative_groups::this_cluster().barrier_wait();
#endif
}

__device__ __forceinline__ void cluster_sync(const struct vocab_row &row)
{
#if CUDA_FOR_90
    if (row.parts > 1) {
        cooperative_groups::this_cluster().sync();
        return;
    }
#endif
    __syncthreads();
}

// The same variable in the shared memory of block `part`.
template <typename Type>
__device__ __forceinline__ Type *cluster_peer(const struct vocab_row &row, Type *mine, uint32_t part)
{
#if CUDA_FOR_90
    if (row.parts > 1)
        return cooperative_groups::this_cluster().map_shared_rank(mine, part);
#endif
    return mine;
}

// Tells every block the `value` of this one (the same in all its threads) and returns all, by part. Two
// mailboxes take turns: who writes to one again has passed a barrier after all have read it.
__device__ __forceinline__ const row_mass *row_exchange(struct vocab_row &row, row_mass value)
{
    row_mass *mail = row.shared->mail[row.turn++ & 1];
    if (threadIdx.x < row.parts)
        *cluster_peer(row, &mail[row.rank], threadIdx.x) = value;
    cluster_sync(row);
    return mail;
}

template <typename Operation>
__device__ row_mass row_reduce(struct vocab_row &row, row_mass value, Operation operation)
{
    row_mass *warps = row.shared->warps;
    for (int step = 16; step > 0; step /= 2)
        value = operation(value, __shfl_xor_sync(~0u, value, step));
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = warps[0];
    for (int warp = 1; warp < ROW_WARPS; warp++)
        value = operation(value, warps[warp]);
    const row_mass *parts = row_exchange(row, value);
    value = parts[0];
#pragma unroll
    for (uint32_t part = 1; part < ROW_MOST_PARTS; part++)
        value = part < row.parts ? operation(value, parts[part]) : value;
    return value;
}

__device__ __forceinline__ row_mass row_max(struct vocab_row &row, row_mass value)
{
    return row_reduce(row, value, [](row_mass a, row_mass b) { return a > b ? a : b; });
}

__device__ __forceinline__ row_mass row_sum(struct vocab_row &row, row_mass value)
{
    return row_reduce(row, value, [](row_mass a, row_mass b) { return a + b; });
}

// The sum of `value` over all threads before this one, in order of part and thread.
__device__ row_mass row_scan(struct vocab_row &row, row_mass value, row_mass *total)
{
    row_mass *warps = row.shared->warps, sum = value;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t step = 1; step < 32; step *= 2) {
        row_mass lower = __shfl_up_sync(~0u, sum, step);
        if (lane >= step)
            sum += lower;
    }
    if (lane == 31)
        warps[warp] = sum;
    __syncthreads();
    row_mass before = sum - value, block = 0;
    for (uint32_t i = 0; i < ROW_WARPS; i++) {
        before += i < warp ? warps[i] : 0;
        block += warps[i];
    }
    const row_mass *parts = row_exchange(row, block);
    *total = 0;
#pragma unroll
    for (uint32_t part = 0; part < ROW_MOST_PARTS; part++) {
        before += part < row.rank ? parts[part] : 0;
        *total += part < row.parts ? parts[part] : 0;
    }
    return before;
}

// One thread of the cluster tells what it found; all read it behind the next cluster_sync().
__device__ __forceinline__ void row_tell(const struct vocab_row &row, struct row_found found)
{
    for (uint32_t part = 0; part < row.parts; part++)
        *cluster_peer(row, &row.shared->found, part) = found;
}

// --- a row ---

// Cuts this block's part out of a row of `vocab`, kept at `memory` (shared) or at `memory` + the part's first
// id. cluster_joined() must follow before blocks talk.
__device__ struct vocab_row row_open(struct row_shared *shared, float *memory, bool of_part, uint32_t vocab)
{
    struct vocab_row row;
    row.shared = shared;
    row.rank = blockIdx.x; // the cluster is the grid's whole x
    row.parts = gridDim.x;
    uint32_t part = row_part_size(vocab, row.parts);
    row.first = min(row.rank * part, vocab);
    row.count = min(part, vocab - row.first);
    row.chunk = ((part + ROW_THREADS - 1) / ROW_THREADS) | 1;
    row.x = of_part ? memory : memory + row.first;
    row.turn = 0;
    if (threadIdx.x == 0)
        shared->n_listed = 0;
    cluster_join(row);
    return row;
}

// Copies the part from `logits`, the whole row. Ends with a barrier of the block.
__device__ void row_load(const struct vocab_row &row, const float *logits)
{
    const float *from = logits + row.first;
    if (((size_t)from | (size_t)row.x) % sizeof(float4) == 0 && row.count % 4 == 0) {
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < row.count / 4; i += ROW_THREADS)
            ((float4 *)row.x)[i] = ((const float4 *)from)[i];
    } else {
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < row.count; i += ROW_THREADS)
            row.x[i] = from[i];
    }
    __syncthreads();
}

// Grows with x, -INFINITY lowest; both zeros are one. Not for NaN.
__device__ __forceinline__ uint32_t row_image(float x)
{
    uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct row_best {
    float value; // -INFINITY: there is none
    uint32_t id; // the lowest with this value; 0 when there is none
};

__device__ struct row_best row_find_best(struct vocab_row &row)
{
    float best = -INFINITY;
    uint32_t at = threadIdx.x;
    for (uint32_t i = threadIdx.x; i < row.count; i += ROW_THREADS)
        if (row.x[i] > best) { // a NaN is never larger
            best = row.x[i];
            at = i;
        }
    row_mass found = row_max(row, (row_mass)row_image(best) << 32 | (uint32_t) ~(row.first + at));
    uint32_t image = (uint32_t)(found >> 32);
    return {__uint_as_float(image & 0x80000000u ? image ^ 0x80000000u : ~image), ~(uint32_t)found};
}

// --- weights ---

__device__ __forceinline__ float row_clean(float x)
{
    return x > FLT_MAX ? FLT_MAX : x == x ? x : -INFINITY;
}

// exp(x) for x <= 0, 0 below -87: operation by operation what vocab_scan_internal.h does, never contracted.
__device__ __forceinline__ float row_exp(float x)
{
    if (!(x >= -87.0f))
        return 0;
    float n = __fsub_rn(__fadd_rn(__fmul_rn(x, 1.44269504f), 12582912.0f), 12582912.0f);
    float r = __fadd_rn(__fsub_rn(x, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, 2.12194440e-4f));
    float p = __fadd_rn(__fmul_rn(r, 0.00138145395f), 0.00836874545f);
    p = __fadd_rn(__fmul_rn(p, r), 0.0416683890f);
    p = __fadd_rn(__fmul_rn(p, r), 0.166665211f);
    p = __fadd_rn(__fmul_rn(p, r), 0.49999994f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    return __fmul_rn(p, __uint_as_float((uint32_t)((int)n + 127) << 23));
}

__device__ __forceinline__ row_mass row_fixed(float weight)
{
    return __float2ull_rn(weight * 0x1p42f);
}

__device__ __forceinline__ double row_number(row_mass mass)
{
    return (double)mass * 0x1p-42;
}

// What logprobs are measured from: logprob(i) = logit(i) - base. 0 when no token has any probability.
__device__ double row_base(struct vocab_row &row, float max)
{
    row_mass mass = 0;
    max = row_clean(max);
    if (max == -INFINITY)
        return 0;
    for (uint32_t i = threadIdx.x; i < row.count; i += ROW_THREADS)
        mass += row_fixed(row_exp(__fsub_rn(row_clean(row.x[i]), max)));
    return (double)max + log(row_number(row_sum(row, mass)));
}

__device__ __forceinline__ float row_logprob(float logit, double base)
{
    if (!(logit > -INFINITY)) // NaN too
        return -INFINITY;
    return (float)((double)row_clean(logit) - base);
}

// Logits to offsets from `max` in units of the temperature.
__device__ void row_offset(const struct vocab_row &row, float max, float temperature)
{
    float inverse = row_clean(1.0f / temperature);
    max = row_clean(max);
    for (uint32_t i = threadIdx.x; i < row.count; i += ROW_THREADS) {
        float offset = __fmul_rn(__fsub_rn(row_clean(row.x[i]), max), inverse);
        row.x[i] = offset >= -87.0f ? offset : -INFINITY;
    }
    __syncthreads();
}

// --- selection ---

struct key_range {
    uint32_t low, high; // both within
    uint32_t shift;     // a bin is (key - low) >> shift
    bool even;          // a bin is even_bin(key) instead
};

// The shift that makes at most ROW_BINS bins of what is from low to high.
__device__ __forceinline__ uint32_t key_shift(uint32_t low, uint32_t high)
{
    uint32_t bits = 32 - __clz(high - low);
    return bits > ROW_BIN_BITS ? bits - ROW_BIN_BITS : 0;
}

// Keys of offsets: the bits of their absolute value.
struct offset_keys {
    static constexpr uint32_t LAST = 0x42AE0000; // 87
    static constexpr float BINS_PER_UNIT = (ROW_BINS - 1) / 87.0f;

    static __device__ __forceinline__ uint32_t key(float x)
    {
        return __float_as_uint(x) & 0x7fffffffu;
    }
    static __device__ __forceinline__ struct key_range all()
    {
        return {0, LAST, 0, true};
    }
    static __device__ __forceinline__ uint32_t even_bin(uint32_t key)
    {
        return (uint32_t)__fmul_rn(__uint_as_float(key), BINS_PER_UNIT);
    }
    // The least key of a bin: the quotient, corrected by what its rounding did.
    static __device__ uint32_t even_edge(uint32_t bin)
    {
        if (bin == 0)
            return 0;
        uint32_t edge = __float_as_uint((float)bin / BINS_PER_UNIT);
        while (even_bin(edge) < bin)
            edge++;
        while (even_bin(edge - 1) >= bin)
            edge--;
        return edge;
    }
};

// Keys of logits themselves.
struct logit_keys {
    static constexpr uint32_t LAST = 0xff7fffff; // -FLT_MAX

    static __device__ __forceinline__ uint32_t key(float x)
    {
        return x == x ? ~row_image(x) : ~0u;
    }
    static __device__ __forceinline__ struct key_range all()
    {
        return {0, LAST, key_shift(0, LAST), false};
    }
    static __device__ __forceinline__ uint32_t even_bin(uint32_t key)
    {
        return 0;
    }
    static __device__ __forceinline__ uint32_t even_edge(uint32_t bin)
    {
        return 0;
    }
};

// The range of one bin of `range`.
template <typename Keys>
__device__ __forceinline__ struct key_range key_narrow(const struct key_range &range, uint32_t bin)
{
    struct key_range next;
    next.low = range.even ? Keys::even_edge(bin) : range.low + (bin << range.shift);
    uint32_t last = range.even ? Keys::even_edge(bin + 1) - 1 : next.low + ((1u << range.shift) - 1);
    next.high = min(last, range.high);
    next.shift = key_shift(next.low, next.high);
    next.even = false;
    return next;
}

// 64-bit additions as 32-bit atomics: who makes the low half pass over carries.
__device__ __forceinline__ void bin_add_mass(struct row_shared *shared, uint32_t bin, row_mass mass)
{
    uint32_t low = (uint32_t)mass, high = (uint32_t)(mass >> 32);
    uint32_t old = atomicAdd(&shared->mass_low[bin], low);
    high += old + low < old;
    if (high)
        atomicAdd(&shared->mass_high[bin], high);
}

// Counts the part's tokens, and with MASS their weights, by bin. Ends with a barrier of the cluster.
template <typename Keys, bool MASS>
__device__ void row_count(const struct vocab_row &row, const struct key_range &range)
{
    struct row_shared *shared = row.shared;
    for (uint32_t bin = threadIdx.x; bin < ROW_BINS; bin += ROW_THREADS) {
        shared->counts[bin] = 0;
        if (MASS)
            shared->mass_low[bin] = shared->mass_high[bin] = 0;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < row.count; i += ROW_THREADS) {
        float x = row.x[i];
        uint32_t key = Keys::key(x);
        if (key < range.low || key > range.high)
            continue;
        uint32_t bin = range.even ? Keys::even_bin(key) : (key - range.low) >> range.shift;
        atomicAdd(&shared->counts[bin], 1u);
        if (MASS)
            bin_add_mass(shared, bin, row_fixed(row_exp(x)));
    }
    cluster_sync(row);
}

// A bin's tokens in all parts, and their mass (with MASS) or their number again.
template <bool MASS>
__device__ __forceinline__ row_mass bin_total(const struct vocab_row &row, uint32_t bin, uint32_t *count)
{
    row_mass mass = 0;
    *count = 0;
#pragma unroll
    for (uint32_t part = 0; part < ROW_MOST_PARTS; part++) {
        if (part >= row.parts)
            break;
        const struct row_shared *peer = cluster_peer(row, row.shared, part);
        *count += peer->counts[bin];
        if (MASS)
            mass += (row_mass)peer->mass_high[bin] << 32 | peer->mass_low[bin];
    }
    return MASS ? mass : *count;
}

// The token of this thread's chunk at which `sum`, running on over `weigh` in order of id, reaches `target`:
// it does so in this chunk.
template <typename Weigh>
__device__ uint32_t row_walk(const struct vocab_row &row, row_mass sum, row_mass target, Weigh weigh)
{
    uint32_t i = threadIdx.x * row.chunk;
    while ((sum += weigh(row.x[i])) < target)
        i++;
    return row.first + i;
}

// The sum of `weigh` over this thread's chunk.
template <typename Weigh> __device__ row_mass row_chunk_sum(const struct vocab_row &row, Weigh weigh)
{
    uint32_t begin = min(threadIdx.x * row.chunk, row.count), end = min(begin + row.chunk, row.count);
    row_mass sum = 0;
    for (uint32_t i = begin; i < end; i++)
        sum += weigh(row.x[i]);
    return sum;
}

// What a selection keeps: smaller keys, and of this key the ids up to this one.
struct row_cut {
    uint32_t key, id;
};

// Of the tokens with the same `key`, the `needed` lowest ids.
template <typename Keys>
__device__ struct row_cut row_cut_ties(struct vocab_row &row, uint32_t key, row_mass needed)
{
    auto weigh = [key](float x) -> row_mass { return Keys::key(x) == key; };
    row_mass own = row_chunk_sum(row, weigh), total, before = row_scan(row, own, &total);
    if (before < needed && needed <= before + own)
        row_tell(row, {row_walk(row, before, needed, weigh), 0, 0});
    cluster_sync(row);
    return {key, row.shared->found.place};
}

// Keeps the shortest prefix in order of (key, id) that has `tokens` tokens or, with MASS, `share` of the mass
// of all; at least one token.
template <typename Keys, bool MASS>
__device__ struct row_cut row_select(struct vocab_row &row, uint32_t tokens, float share)
{
    const uint32_t part_bins = ROW_BINS / row.parts; // that each block adds up, and each of its threads
    const uint32_t thread_bins = (part_bins + ROW_THREADS - 1) / ROW_THREADS;
    struct key_range range = Keys::all();
    struct row_found found = {0, 0, 0}; // found.before: what lies ahead of the range
    row_mass target = 0;
    do {
        row_count<Keys, MASS>(row, range);
        uint32_t in_part = threadIdx.x * thread_bins, count;
        uint32_t bin = row.rank * part_bins + in_part;
        row_mass own = 0, total;
        for (uint32_t i = 0; i < thread_bins && in_part < part_bins; i++)
            own += bin_total<MASS>(row, bin + i, &count);
        row_mass before = found.before + row_scan(row, own, &total);
        if (target == 0) { // the first round
            target = MASS ? min((row_mass)fmax(1.0, ceil((double)share * (double)total)), total) : tokens;
            if (total == 0 || (!MASS && total <= tokens))
                return {Keys::LAST, ~0u};
        }
        if (before < target && target <= before + own) {
            row_mass in_bin;
            for (; before + (in_bin = bin_total<MASS>(row, bin, &count)) < target; bin++)
                before += in_bin;
            row_tell(row, {bin, count, before});
        }
        cluster_sync(row);
        found = row.shared->found;
        range = key_narrow<Keys>(range, found.place);
    } while (range.low < range.high && found.count > 1 && (MASS || found.before + found.count > target));
    if (range.low == range.high && found.count > 1) {
        row_mass each = MASS ? row_fixed(row_exp(-__uint_as_float(range.low))) : 1;
        row_mass needed = (target - found.before + each - 1) / each;
        if (needed < found.count)
            return row_cut_ties<Keys>(row, range.high, needed);
    }
    return {range.high, ~0u};
}

template <typename Keys>
__device__ __forceinline__ bool row_keeps(const struct row_cut &cut, float x, uint32_t id)
{
    uint32_t key = Keys::key(x);
    return key < cut.key || (key == cut.key && id <= cut.id);
}

// Takes from the offsets what the cut does not keep.
__device__ void row_drop(const struct vocab_row &row, struct row_cut cut)
{
    for (uint32_t i = threadIdx.x; i < row.count; i += ROW_THREADS)
        if (!row_keeps<offset_keys>(cut, row.x[i], row.first + i))
            row.x[i] = -INFINITY;
    __syncthreads();
}

// The `count` likeliest tokens with their logprobs; where fewer have any probability, the rest is
// {-1, -INFINITY}. row.x holds logits. Once in a kernel.
__device__ void row_store_tops(struct vocab_row &row, const float *logits, double base, uint32_t count,
                               struct token_logprob *out)
{
    uint32_t wanted = min(count, (uint32_t)MAX_TOP_LOGPROBS);
    struct row_cut cut = row_select<logit_keys, false>(row, wanted, 0);
    for (uint32_t i = threadIdx.x; i < row.count; i += ROW_THREADS) {
        if (!row_keeps<logit_keys>(cut, row.x[i], row.first + i))
            continue;
        uint32_t at = atomicAdd(cluster_peer(row, &row.shared->n_listed, 0), 1u);
        *cluster_peer(row, &row.shared->listed[at], 0) =
            (row_mass)logit_keys::key(row.x[i]) << 32 | (row.first + i);
    }
    cluster_sync(row);
    if (row.rank != 0)
        return;
    uint32_t listed = row.shared->n_listed;
    for (uint32_t i = threadIdx.x; i < count; i += ROW_THREADS) {
        if (i >= listed) {
            out[i] = {-1, -INFINITY};
            continue;
        }
        uint32_t place = 0;
        for (uint32_t j = 0; j < listed; j++)
            place += row.shared->listed[j] < row.shared->listed[i];
        uint32_t id = (uint32_t)row.shared->listed[i];
        out[place] = {(int32_t)id, row_logprob(logits[id], base)};
    }
}

#endif
