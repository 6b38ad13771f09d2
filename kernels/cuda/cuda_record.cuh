// Packed weights: how a matrix lies on the device, and how a warp multiplies a piece of it.
//
// A matrix is cut into tiles of 16 rows, padded with zeros, and K into blocks of 256, padded likewise. One
// tile times one block is a record; a warp reads a record from shared memory and multiplies it with
// `mma.m16n8k16` (halves in, f32 out). Records of 16 neighbouring tiles (a panel) and one K block are
// contiguous: [panel][block][tile in panel], so that a block of threads fetches all it needs for a K block in
// one copy, and a warp alone its own record. After the records, for layouts without integer scales: one f32
// factor a row.
//
// Inside a record lane l = 4 g + t works on rows g and g + 8; of the 32 weights of K group j (j < 8) it holds
// k = 32 j + 8 t + e, e < 8: (e0 e1 | e2 e3) feed the first mma of the group, (e4 e5 | e6 e7) the second. The
// order of k inside a group is free as long as activations follow it: so eight consecutive activations are
// one 16-byte load, and rows of activations stay in plain order.
//
// Nibbles: for j = 2 i (low) and 2 i + 1 (high) lane l reads 16 bytes at 512 i + 16 l: words (row g: e0-3,
// e4-7; row g + 8: the same); e0..e3 at bits 0, 16, 8, 24, so that a mask, or a shift by 8 and a mask, leaves
// two codes in the mantissas of two halves: subnormal numbers code x 2^-24 (16 times that for the high
// nibbles). One multiplication by scale x 2^5 (or 2^1) makes code x scale x 2^-19 of it, exactly (but for
// the last bit of Q6_K's products above 2,048): integer scales go through the tensor cores unrounded, and the
// f32 factors d (and dmin) of a block of 256 are applied to sums of 128 products in f32. Minimums are one
// more mma a record: minimum times the sum of 16 activations.
//
// Layouts, and the types that take them:
//   NIBBLES     Q4_K                    scales and minimums of 8 bits per 32, d and dmin
//   NIBBLES_16  Q2_K, Q3_K              the same per 16, signed (Q3_K: minimum 4 x scale, dmin = d)
//   FIVES       Q5_K                    as NIBBLES, and a plane of fifth bits
//   SIXES       Q6_K                    nibbles, a plane of bits 4 and 5, signed scales per 16, d
//   SCALED_4    Q4_0, Q4_1              nibbles; scale and minimum per 32 as halves of x / row factor
//   SCALED_5    Q5_0, Q5_1              and a plane of fifth bits
//   SCALED_8    Q8_0                    bytes, scales as halves of x / row factor
//   HALVES      F16, BF16, F32          halves of x / row factor
#ifndef STRATA_CUDA_RECORD_CUH
#define STRATA_CUDA_RECORD_CUH

#include "kernels/cuda/cuda_kernel.cuh"
#include "kernels/cuda/cuda_mma.cuh"

enum record_layout {
    RECORD_NIBBLES,
    RECORD_NIBBLES_16,
    RECORD_FIVES,
    RECORD_SIXES,
    RECORD_SCALED_4,
    RECORD_SCALED_5,
    RECORD_SCALED_8,
    RECORD_HALVES,
    RECORD_LAYOUTS
};

constexpr uint32_t PANEL_TILES = 16;

// Constants of a layout. Offsets inside a record: `plane` (bits beyond the nibbles), `scales`, `factors`.
struct record_form {
    uint32_t plane, scales, scale_row_bytes, factors, bytes;
    bool integer_scales, row_factor, has_min, per_16;
};

__host__ __device__ constexpr struct record_form record_form_of(int layout)
{
    switch (layout) {
    case RECORD_NIBBLES:
        return {2048, 2048, 16, 2304, 2368, true, false, true, false};
    case RECORD_NIBBLES_16:
        return {2048, 2048, 32, 2560, 2624, true, false, true, true};
    case RECORD_FIVES:
        return {2048, 2560, 16, 2816, 2880, true, false, true, false};
    case RECORD_SIXES:
        return {2048, 3072, 16, 3328, 3392, true, false, false, true};
    case RECORD_SCALED_4:
        return {2048, 2048, 32, 2560, 2560, false, true, true, false};
    case RECORD_SCALED_5:
        return {2048, 2560, 32, 3072, 3072, false, true, true, false};
    case RECORD_SCALED_8:
        return {4096, 4096, 16, 4352, 4352, false, true, false, false};
    default:
        return {8192, 8192, 0, 8192, 8192, false, true, false, false};
    }
}

static inline int record_layout_of(uint32_t type)
{
    switch (type) {
    case TENSOR_Q4_K:
        return RECORD_NIBBLES;
    case TENSOR_Q2_K:
    case TENSOR_Q3_K:
        return RECORD_NIBBLES_16;
    case TENSOR_Q5_K:
        return RECORD_FIVES;
    case TENSOR_Q6_K:
        return RECORD_SIXES;
    case TENSOR_Q4_0:
    case TENSOR_Q4_1:
        return RECORD_SCALED_4;
    case TENSOR_Q5_0:
    case TENSOR_Q5_1:
        return RECORD_SCALED_5;
    case TENSOR_Q8_0:
        return RECORD_SCALED_8;
    default:
        return RECORD_HALVES;
    }
}

// Index of the record of (tile, K block), of a matrix of `tiles` and `k_blocks`.
__host__ __device__ inline size_t record_index(uint32_t tile, uint32_t k_block, uint32_t tiles,
                                               uint32_t k_blocks)
{
    uint32_t panel = tile / PANEL_TILES, left = tiles - panel * PANEL_TILES;
    uint32_t width = left < PANEL_TILES ? left : PANEL_TILES;
    return (size_t)panel * PANEL_TILES * k_blocks + (size_t)k_block * width + tile % PANEL_TILES;
}

__device__ __forceinline__ unsigned shift(unsigned a, int right)
{
    return right >= 0 ? a >> right : a << -right;
}

// --- reading a record ---

// What a lane needs of the scales of one of its two rows.
struct record_row {
    uint4 scales; // 16 bytes: 8 bit scales (and minimums), or 8 halves
    uint4 mins;   // NIBBLES_16's
};

template <int L>
__device__ __forceinline__ struct record_row record_read_row(const unsigned char *record, int row)
{
    constexpr struct record_form form = record_form_of(L);
    struct record_row read = {};
    if constexpr (form.scale_row_bytes > 0)
        read.scales = *(const uint4 *)(record + form.scales + row * form.scale_row_bytes);
    if constexpr (L == RECORD_NIBBLES_16)
        read.mins = *(const uint4 *)(record + form.scales + row * form.scale_row_bytes + 16);
    return read;
}

__device__ __forceinline__ unsigned word_of(const uint4 &four, int i)
{
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// The multipliers of K groups 2 i and 2 i + 1, in the low and the high half. i is a constant after unrolling.
template <int L>
__device__ __forceinline__ unsigned record_multipliers(const struct record_row &row, int i, int t)
{
    constexpr struct record_form form = record_form_of(L);
    if constexpr (!form.integer_scales)
        return word_of(row.scales, i);
    constexpr float BIAS = form.per_16 ? 1024 + 128 : 1024; // signed scales are stored with 128 added
    unsigned biased;                                        // 1024 + stored byte
    if constexpr (form.per_16)
        biased = __byte_perm(word_of(row.scales, i), 0x64646464, 0x4240 + t / 2 * 0x0101);
    else
        biased = __byte_perm(word_of(row.scales, i / 2), 0x64646464, 0x4140 + i % 2 * 0x0202);
    const __half2 times = __floats2half2_rn(32.0f, 2.0f);
    const __half2 minus = __floats2half2_rn(-32.0f * BIAS, -2.0f * BIAS);
    return pair_fma(biased, *(const unsigned *)&times, *(const unsigned *)&minus);
}

// The multiplier of K group j as a pair of equal halves.
template <int L>
__device__ __forceinline__ unsigned record_multiplier(const struct record_row &row, int j, int t)
{
    unsigned both = record_multipliers<L>(row, j / 2, t);
    return j % 2 ? pair_high(both) : pair_low(both);
}

// The weights of K group j, before the row's or block's f32 factor, as the A operands of two mma: a[0..3],
// a[4..7].
template <int L>
__device__ __forceinline__ void record_group(const unsigned char *record, const struct record_row *rows,
                                             int j, int lane, unsigned *a)
{
    constexpr struct record_form form = record_form_of(L);
    int t = lane & 3;
    if constexpr (L == RECORD_HALVES) {
        uint4 upper = *(const uint4 *)(record + j * 1024 + lane * 16);
        uint4 lower = *(const uint4 *)(record + j * 1024 + 512 + lane * 16);
        a[0] = upper.x, a[2] = upper.y, a[4] = upper.z, a[6] = upper.w;
        a[1] = lower.x, a[3] = lower.y, a[5] = lower.z, a[7] = lower.w;
    } else if constexpr (L == RECORD_SCALED_8) {
        uint4 codes = *(const uint4 *)(record + j * 512 + lane * 16); // row g: e0-3, e4-7; row g + 8
#pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned scale = record_multiplier<L>(rows[r], j, t);
#pragma unroll
            for (int p = 0; p < 4; p++) { // 1024 + code + 128, exactly; then the code; then times its scale
                unsigned biased =
                    __byte_perm(word_of(codes, 2 * r + p / 2), 0x64646464, p % 2 ? 0x4342 : 0x4140);
                a[2 * p + r] = pair_multiply(pair_add(biased, 0xE480E480), scale); // -1152
            }
        }
    } else {
        uint4 words = *(const uint4 *)(record + j / 2 * 512 + lane * 16);
        const unsigned mask = j % 2 ? 0x00F000F0 : 0x000F000F;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned scale = record_multiplier<L>(rows[r], j, t), plane = 0;
            if constexpr (L == RECORD_FIVES || L == RECORD_SCALED_5)
                plane = *(const unsigned *)(record + form.plane + j / 2 * 128 + lane * 4);
            if constexpr (L == RECORD_SIXES)
                plane = *(const unsigned *)(record + form.plane + j / 2 * 256 + lane * 8 + r * 4);
#pragma unroll
            for (int p = 0; p < 4; p++) {
                unsigned word = word_of(words, 2 * r + p / 2) >> (p % 2 * 8), code;
                if constexpr (L == RECORD_FIVES ||
                              L == RECORD_SCALED_5) // bit `pair` of each half, to bit 4 or 8
                    code = and_or(word, mask,
                                  shift(plane, j % 2 * 8 + r * 4 + p - (j % 2 ? 8 : 4)) &
                                      (j % 2 ? 0x01000100 : 0x00100010));
                else if constexpr (L == RECORD_SIXES) // bits 2 pair, 2 pair + 1, to 4 and 5, or 8 and 9
                    code = and_or(word, mask,
                                  shift(plane, 2 * (j % 2 * 4 + p) - (j % 2 ? 8 : 4)) &
                                      (j % 2 ? 0x03000300 : 0x00300030));
                else
                    code = word & mask;
                if constexpr (L == RECORD_SIXES) // (code - 32) x scale
                    a[2 * p + r] =
                        pair_fma(code, scale, pair_multiply(scale, j % 2 ? 0x82008200 : 0x80208020));
                else
                    a[2 * p + r] = pair_multiply(code, scale);
            }
        }
    }
}

// The minimums of a row for the mma with the sums of 16 activations: groups 2t, 2t + 1 and 2t + 8, 2t + 9.
// Integers, to be subtracted times dmin; or (without integer scales) what is to be added.
template <int L>
__device__ __forceinline__ uint2 record_mins(const unsigned char *record, const struct record_row &row, int r,
                                             int t)
{
    constexpr struct record_form form = record_form_of(L);
    if constexpr (L == RECORD_NIBBLES_16) {
        unsigned sel = 0x4140 + t % 2 * 0x0202;
        unsigned low = __byte_perm(t / 2 ? row.mins.y : row.mins.x, 0x64646464, sel);
        unsigned high = __byte_perm(t / 2 ? row.mins.w : row.mins.z, 0x64646464, sel);
        return make_uint2(pair_add(low, 0xE480E480), pair_add(high, 0xE480E480)); // -1152
    } else if constexpr (form.integer_scales) {
        unsigned sel = 0x4040 + t * 0x0101;
        unsigned low = __byte_perm(row.scales.z, 0x64646464, sel);
        unsigned high = __byte_perm(row.scales.w, 0x64646464, sel);
        return make_uint2(pair_add(low, 0xE400E400), pair_add(high, 0xE400E400)); // -1024
    } else {
        const unsigned short *mins =
            (const unsigned short *)(record + form.scales + r * form.scale_row_bytes + 16);
        return make_uint2(mins[t] * 0x00010001u, mins[t + 4] * 0x00010001u);
    }
}

// --- a record times 8 NT columns ---

// acc[n][i], n < NT: element (row g + 8 (i / 2), column 8 n + 2 t + i % 2) of a tile times columns.

// A K block of columns as a lane reads it: its column of each eight, its eight halves of a K group, its sums
// of 16. Columns from `count` on repeat the last one: what comes of them is nobody's. Few columns lie as
// records of an activation.
template <int NT> struct record_columns {
    const unsigned char *at[NT];

    __device__ __forceinline__ void begin(const unsigned char *x, uint32_t count, int lane)
    {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint32_t column = min(8 * n + (lane >> 2), count - 1);
            at[n] = x + column * CUDA_BLOCK_BYTES + (lane & 3) * 16;
        }
    }

    __device__ __forceinline__ uint4 group(int n, int j) const
    {
        return *(const uint4 *)(at[n] + j * 64);
    }

    __device__ __forceinline__ uint4 sums(int n) const
    {
        return *(const uint4 *)(at[n] + 2 * CUDA_K_BLOCK);
    }
};

// sums += the products of K groups [first, first + 4).
template <int L, int NT, class Columns>
__device__ __forceinline__ void record_multiply_half(const unsigned char *record,
                                                     const struct record_row *rows, const Columns &columns,
                                                     int first, int lane, float (*sums)[4])
{
    constexpr int AT_ONCE = NT < 4 ? NT : 4; // products that do not wait for one another stand together
#pragma unroll
    for (int j = first; j < first + 4; j++) {
        unsigned a[8];
        record_group<L>(record, rows, j, lane, a);
#pragma unroll
        for (int n = 0; n < NT; n += AT_ONCE) {
            uint4 b[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                b[i] = columns.group(n + i, j);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                mma_halves(sums[n + i], a[0], a[1], a[2], a[3], b[i].x, b[i].y);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                mma_halves(sums[n + i], a[4], a[5], a[6], a[7], b[i].z, b[i].w);
        }
    }
}

// Minimums times the sums of 16 activations: subtracted times dmin, or, without integer scales, added as they
// are.
template <int L, int NT, class Columns>
__device__ __forceinline__ void record_multiply_mins(const unsigned char *record,
                                                     const struct record_row *rows, const Columns &columns,
                                                     const float2 *factors, int lane, float (*acc)[4])
{
    constexpr struct record_form form = record_form_of(L);
    int g = lane >> 2, t = lane & 3;
    uint2 upper = record_mins<L>(record, rows[0], g, t), lower = record_mins<L>(record, rows[1], g + 8, t);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        uint4 b = columns.sums(n);
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[i] = form.integer_scales ? 0 : acc[n][i];
        mma_halves(sums, upper.x, lower.x, upper.y, lower.y, b.x, b.y);
        mma_halves(sums, upper.x, lower.x, upper.y, lower.y, b.z, b.w);
#pragma unroll
        for (int i = 0; i < 4; i++)
            acc[n][i] = form.integer_scales ? fmaf(factors[i / 2].y * -64.0f, sums[i], acc[n][i]) : sums[i];
    }
}

// What all products with a record begin with.
template <int L> struct record_head {
    struct record_row rows[2];
    float2 factors[2]; // of rows g and g + 8

    __device__ __forceinline__ void read(const unsigned char *record, int lane)
    {
        constexpr struct record_form form = record_form_of(L);
        int g = lane >> 2;
        rows[0] = record_read_row<L>(record, g);
        rows[1] = record_read_row<L>(record, g + 8);
        factors[0] = factors[1] = make_float2(0, 0);
        if constexpr (form.integer_scales) {
            factors[0] = __half22float2(*(const __half2 *)(record + form.factors + g * 4));
            factors[1] = __half22float2(*(const __half2 *)(record + form.factors + g * 4 + 32));
        }
    }
};

// acc += what 128 products came to, times the factor of their block where there are integer scales. (Without,
// sums began with acc.)
template <int L>
__device__ __forceinline__ void record_add_half(const float2 *factors, const float *sums, float *acc)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        acc[i] =
            record_form_of(L).integer_scales ? fmaf(factors[i / 2].x * 524288.0f, sums[i], acc[i]) : sums[i];
}

template <int L> __device__ __forceinline__ void record_begin_half(float *sums, const float *acc)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        sums[i] = record_form_of(L).integer_scales ? 0 : acc[i];
}

// acc += the record's product with a K block of columns. Every column sees the same operations in the same
// order, whatever NT is and whatever stands beside it.
template <int L, int NT, class Columns>
__device__ __forceinline__ void record_multiply_columns(const unsigned char *record, const Columns &columns,
                                                        int lane, float (*acc)[4])
{
    struct record_head<L> head;
    head.read(record, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) { // 128 products each, then the factor in f32
        float sums[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++)
            record_begin_half<L>(sums[n], acc[n]);
        record_multiply_half<L, NT>(record, head.rows, columns, 4 * half, lane, sums);
#pragma unroll
        for (int n = 0; n < NT; n++)
            record_add_half<L>(head.factors, sums[n], acc[n]);
    }
    if constexpr (record_form_of(L).has_min)
        record_multiply_mins<L, NT>(record, head.rows, columns, head.factors, lane, acc);
}

// The same with K block `x` of `count` columns that lie for few: records of an activation, 576 bytes each.
template <int L, int NT>
__device__ __forceinline__ void record_multiply(const unsigned char *record, const unsigned char *x,
                                                uint32_t count, int lane, float (*acc)[4])
{
    struct record_columns<NT> columns;
    columns.begin(x, count, lane);
    record_multiply_columns<L, NT>(record, columns, lane, acc);
}

// The same for the records of two K blocks in a row of a tile and up to 8 columns each, step by step in turn,
// so that one's products do not wait for the other's. With integer scales only: what is added to acc is made
// side by side, and added in order.
template <int L>
__device__ __forceinline__ void record_multiply_two(const unsigned char *const *records,
                                                    const unsigned char *const *x, const uint32_t *counts,
                                                    int lane, float (*acc)[4])
{
    static_assert(record_form_of(L).integer_scales, "else the second product begins with the first's sums");
    struct record_head<L> head[2];
    struct record_columns<1> columns[2];
    float sums[2][2][4]; // [record][half]
#pragma unroll
    for (int r = 0; r < 2; r++) {
        head[r].read(records[r], lane);
        columns[r].begin(x[r], counts[r], lane);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int r = 0; r < 2; r++)
            record_begin_half<L>(sums[r][half], acc[0]);
#pragma unroll
        for (int j = 4 * half; j < 4 * half + 4; j++) {
            unsigned a[2][8];
            uint4 b[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                record_group<L>(records[r], head[r].rows, j, lane, a[r]);
                b[r] = columns[r].group(0, j);
            }
#pragma unroll
            for (int r = 0; r < 2; r++)
                mma_halves(sums[r][half], a[r][0], a[r][1], a[r][2], a[r][3], b[r].x, b[r].y);
#pragma unroll
            for (int r = 0; r < 2; r++)
                mma_halves(sums[r][half], a[r][4], a[r][5], a[r][6], a[r][7], b[r].z, b[r].w);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            record_add_half<L>(head[r].factors, sums[r][half], acc[0]);
        if constexpr (record_form_of(L).has_min)
            record_multiply_mins<L, 1>(records[r], head[r].rows, columns[r], head[r].factors, lane, acc);
    }
}

#endif
