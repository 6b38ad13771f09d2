// Tile kernels of the AVX2 level: the sums of matmul_avx512.c, operation by operation, on half a tile (8
// rows) at a time. Rows are lanes in both, so both give the same bits.
//
// vpmaddubsw multiplies unsigned codes by signed activations (|x| <= 127) and adds neighbours into 16 bits,
// where it saturates. It never does here: two products of a code of b bits are at most 2 * 127 * (2^b - 1),
// and only as many of them are added in 16 bits as fit: the 4 of a block's half up to 5 bits (31496), 2 for 6
// bits (32004). For 8 bits the signs change sides instead: |w| * (x with w's sign), |w| <= 128: 32512.
//
// Runs on compute threads; pure.
#include "kernels/cpu/cpu_tiles.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { MAX_COLUMNS = 4 };

// --- codes ---

ALWAYS_INLINE __m256i load(const uint8_t *p)
{
    return _mm256_load_si256((const __m256i *)p);
}

// Shifts 16-bit lanes left (or right when negative) by a constant; the bits that cross bytes are masked away
// by the caller.
ALWAYS_INLINE __m256i shift(__m256i v, int by)
{
    return by > 0 ? _mm256_slli_epi16(v, by) : by < 0 ? _mm256_srli_epi16(v, -by) : v;
}

ALWAYS_INLINE __m256i merge(__m256i q, __m256i v, int by, int mask)
{
    return _mm256_or_si256(q, _mm256_and_si256(shift(v, by), _mm256_set1_epi8((char)mask)));
}

// Group `g` of 8 rows x 32 codes; `p` includes the half's 32 bytes.
ALWAYS_INLINE __m256i load_group(const uint8_t *p, const int bits, const int g)
{
    __m256i low_mask = _mm256_set1_epi8(bits >= 4 ? 15 : 3);
    if (bits == 8)
        return load(p + 64 * g);
    if (bits >= 4) {
        __m256i q = _mm256_and_si256(shift(load(p + 64 * (g / 2)), -4 * (g % 2)), low_mask);
        if (bits == 5)
            return merge(q, load(p + 256), 4 - g, 0x10);
        if (bits == 6)
            return merge(q, load(p + 256 + 64 * (g / 4)), 4 - 2 * (g % 4), 0x30);
        return q;
    }
    __m256i q = _mm256_and_si256(shift(load(p + 64 * (g / 4)), -2 * (g % 4)), low_mask);
    return bits == 3 ? merge(q, load(p + 128), 2 - g, 0x04) : q;
}

// --- sums ---

ALWAYS_INLINE const struct cpu_q8_block *block_of(const struct tile_call *call, int column, uint32_t index)
{
    return (const struct cpu_q8_block *)(call->x + column * call->x_stride) + index;
}

// Asks for what is read 2 KB later: the hardware's own prefetching stops at page ends and falls behind while
// a core computes.
ALWAYS_INLINE void fetch_ahead(const uint8_t *p, uint32_t bytes)
{
#pragma GCC unroll 8
    for (uint32_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + 2048 + i, _MM_HINT_T0);
}

ALWAYS_INLINE int log2_of(uint32_t offset)
{
    return __builtin_ctz(offset);
}

// Groups whose products can be added in 16 bits.
ALWAYS_INLINE int groups_in_16_bits(int bits)
{
    return bits <= 5 ? 4 : bits == 6 ? 2 : 1;
}

// sums[c] += four groups of the block x codes, from the first on. 8-bit codes are taken as signed: less 128.
ALWAYS_INLINE void dot(const struct tile_call *call, const int columns, uint32_t index, const uint8_t *codes,
                       const int bits, const int first, __m256i *sums)
{
    const int together = groups_in_16_bits(bits);
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int from = first; from < first + 4; from += together) {
        __m256i pairs[MAX_COLUMNS];
#pragma GCC unroll 4
        for (int g = from; g < from + together; g++) {
            __m256i q = load_group(codes, bits, g), sign = q;
            if (bits == 8) {
                sign = _mm256_xor_si256(q, _mm256_set1_epi8((char)0x80));
                q = _mm256_abs_epi8(sign);
            }
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++) {
                int32_t four;
                memcpy(&four, block_of(call, c, index)->q + 4 * g, 4);
                __m256i x = _mm256_set1_epi32(four);
                if (bits == 8)
                    x = _mm256_sign_epi8(x, sign);
                __m256i products = _mm256_maddubs_epi16(q, x);
                pairs[c] = g == from ? products : _mm256_add_epi16(pairs[c], products);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++)
            sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(pairs[c], ones));
    }
}

// What an integer sum starts from: the codes' offset times the activations' sum, taken off.
ALWAYS_INLINE __m256i start(const struct cpu_type form, int32_t minus_sum)
{
    if (!form.offset || form.bits == 8)
        return _mm256_setzero_si256();
    return _mm256_slli_epi32(_mm256_set1_epi32(minus_sum), log2_of(form.offset));
}

// A block's half (four groups, and one scale of the activations): out[c] = its integer sum, codes' offset
// taken off, as a float
ALWAYS_INLINE void dot_half(const struct tile_call *call, const struct cpu_type form, const int columns,
                            uint32_t index, const uint8_t *codes, const int half, __m256 *out)
{
    __m256i sums[MAX_COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
        sums[c] = start(form, block_of(call, c, index)->minus_sum[half]);
    dot(call, columns, index, codes, (int)form.bits, 4 * half, sums);
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
        out[c] = _mm256_cvtepi32_ps(sums[c]);
}

// A block of 32 under one scale (and minimum) a row: total[c] += (scale * q - min) * x
ALWAYS_INLINE void add_block(const struct tile_call *call, const struct cpu_type form, const int columns,
                             uint32_t index, const uint8_t *codes, __m256 scale, __m256 plus_min,
                             __m256 *total)
{
    __m256 dots[2][MAX_COLUMNS];
    dot_half(call, form, columns, index, codes, 0, dots[0]);
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
        dots[0][c] = _mm256_mul_ps(dots[0][c], _mm256_set1_ps(block_of(call, c, index)->scale[0]));
    dot_half(call, form, columns, index, codes, 1, dots[1]);
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++) {
        const struct cpu_q8_block *x = block_of(call, c, index);
        __m256 both = _mm256_fmadd_ps(dots[1][c], _mm256_set1_ps(x->scale[1]), dots[0][c]);
        total[c] = _mm256_fmadd_ps(both, scale, total[c]);
        if (form.has_min)
            total[c] = _mm256_fmadd_ps(plus_min, _mm256_set1_ps(x->scaled_total), total[c]);
    }
}

ALWAYS_INLINE __m256 signed_bytes(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

ALWAYS_INLINE __m256 nibbles(const uint8_t *p, int by)
{
    __m128i bytes = _mm_and_si128(_mm_srli_epi16(_mm_loadl_epi64((const __m128i *)p), by), _mm_set1_epi8(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

ALWAYS_INLINE __m256 halves(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p));
}

// A block of 32 with a scale (and minimum) for each 16: total[c] += (d * scale * q - dmin * min) * x of each
ALWAYS_INLINE void add_two_groups(const struct tile_call *call, const struct cpu_type form, const int columns,
                                  uint32_t index, const uint8_t *codes, const uint8_t *scales, __m256 d,
                                  __m256 minus_dmin, __m256 *total)
{
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const uint8_t *bytes = scales + 16 * half;
        __m256 scale = _mm256_mul_ps(d, form.has_min ? nibbles(bytes, 0) : signed_bytes(bytes));
        __m256 plus_min = form.has_min ? _mm256_mul_ps(minus_dmin, nibbles(bytes, 4)) : _mm256_setzero_ps();
        __m256 dots[MAX_COLUMNS];
        dot_half(call, form, columns, index, codes, half, dots);
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            const struct cpu_q8_block *x = block_of(call, c, index);
            __m256 scaled = _mm256_mul_ps(dots[c], _mm256_set1_ps(x->scale[half]));
            total[c] = _mm256_fmadd_ps(scaled, scale, total[c]);
            if (form.has_min)
                total[c] = _mm256_fmadd_ps(plus_min, _mm256_set1_ps(x->scaled_sum[half]), total[c]);
        }
    }
}

// --- tiles ---

ALWAYS_INLINE void sum_32(const struct tile_call *call, const struct cpu_type form, const int columns,
                          __m256 total[2][MAX_COLUMNS])
{
    const uint32_t header = cpu_pair_header(form.has_min), code_bytes = cpu_code_bytes(form.bits);
    const uint8_t *pair = call->tile;
    uint32_t blocks = call->width / 32;
    for (uint32_t i = 0; i < blocks; i++) {
        uint32_t odd = i & 1;
        fetch_ahead(pair + odd * (header / 2 + code_bytes), header / 2 + code_bytes);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const uint8_t *scales = pair + 32 * odd + 16 * half;
            __m256 min = form.has_min ? halves(scales + 64) : _mm256_setzero_ps();
            add_block(call, form, columns, i, pair + header + odd * code_bytes + 32 * half, halves(scales),
                      min, total[half]);
        }
        pair += odd * (header + 2 * code_bytes);
    }
}

// One half of the eight blocks under one header, of which the first is `index`.
ALWAYS_INLINE void sum_k_block(const struct tile_call *call, const struct cpu_type form, const int columns,
                               uint32_t index, const uint8_t *header, int half, __m256 *total)
{
    __m256 d = halves(header + 16 * half);
    __m256 minus_dmin = _mm256_sub_ps(_mm256_setzero_ps(), halves(header + 32 + 16 * half));
    const uint8_t *scales = header + 64 + 8 * half, *codes = header + K_HEADER + 32 * half;
    for (uint32_t j = 0; j < 8; j++, codes += cpu_code_bytes(form.bits)) {
        if (half == 0)
            fetch_ahead(codes, cpu_code_bytes(form.bits));
        if (form.group == 16) {
            add_two_groups(call, form, columns, index + j, codes, scales + 32 * j, d, minus_dmin, total);
            continue;
        }
        __m256 scale = _mm256_mul_ps(d, signed_bytes(scales + 16 * j));
        __m256 plus_min = _mm256_mul_ps(minus_dmin, signed_bytes(scales + 128 + 16 * j));
        add_block(call, form, columns, index + j, codes, scale, plus_min, total);
    }
}

ALWAYS_INLINE void sum_256(const struct tile_call *call, const struct cpu_type form, const int columns,
                           __m256 total[2][MAX_COLUMNS])
{
    const uint8_t *header = call->tile;
    for (uint32_t i = 0; i < call->width / 32; i += 8, header += K_HEADER + 8 * cpu_code_bytes(form.bits))
        for (int half = 0; half < 2; half++)
            sum_k_block(call, form, columns, i, header, half, total[half]);
}

ALWAYS_INLINE __m256 load_floats(uint32_t type, const uint8_t *tile, uint32_t k, int half)
{
    if (type == TENSOR_F32)
        return _mm256_load_ps((const float *)tile + 16 * k + 8 * half);
    const uint8_t *p = tile + 32 * k + 16 * half;
    if (type == TENSOR_F16)
        return halves(p);
    __m128i bits = _mm_load_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Even and odd k are summed apart, so that one column alone does not wait for each addition.
ALWAYS_INLINE void sum_floats(const struct tile_call *call, uint32_t type, const int columns, int half,
                              __m256 *total)
{
    __m256 odd[MAX_COLUMNS];
    uint32_t k = 0;
    for (int c = 0; c < columns; c++)
        odd[c] = _mm256_setzero_ps();
    for (; k + 2 <= call->width; k += 2) {
        __m256 w0 = load_floats(type, call->tile, k, half), w1 = load_floats(type, call->tile, k + 1, half);
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            const float *x = (const float *)(call->x + c * call->x_stride) + k;
            total[c] = _mm256_fmadd_ps(w0, _mm256_set1_ps(x[0]), total[c]);
            odd[c] = _mm256_fmadd_ps(w1, _mm256_set1_ps(x[1]), odd[c]);
        }
    }
    for (int c = 0; c < columns; c++) {
        const float *x = (const float *)(call->x + c * call->x_stride) + k;
        if (k < call->width)
            total[c] =
                _mm256_fmadd_ps(load_floats(type, call->tile, k, half), _mm256_set1_ps(x[0]), total[c]);
        total[c] = _mm256_add_ps(total[c], odd[c]);
    }
}

// Bias, accumulation and the rows that exist of one half.
ALWAYS_INLINE void store_half(const struct tile_call *call, const int columns, int half, const __m256 *total)
{
    uint32_t first = 8 * (uint32_t)half;
    if (call->n_rows <= first)
        return;
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i rows = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(call->n_rows - first)), lanes);
    for (int c = 0; c < columns; c++) {
        float *out = call->out + c * call->out_stride + first;
        __m256 value = total[c];
        if (call->bias)
            value = _mm256_add_ps(value, _mm256_maskload_ps(call->bias + first, rows));
        if (call->accumulate)
            value = _mm256_add_ps(_mm256_maskload_ps(out, rows), value);
        _mm256_maskstore_ps(out, rows, value);
    }
}

ALWAYS_INLINE void run(const struct tile_call *call, uint32_t type, const struct cpu_type form,
                       const int columns)
{
    __m256 total[2][MAX_COLUMNS];
    for (int c = 0; c < columns; c++)
        total[0][c] = total[1][c] = _mm256_setzero_ps();
    if (form.block == 32)
        sum_32(call, form, columns, total);
    else if (form.block == 256)
        sum_256(call, form, columns, total);
    for (int half = 0; half < 2; half++) {
        if (!form.block)
            sum_floats(call, type, columns, half, total[half]);
        store_half(call, columns, half, total[half]);
    }
}

// The types again as constants the compiler sees through; tests hold them against cpu_type_of.
#define KERNEL(name, columns, ...)                                                                           \
    static void name##_##columns(const struct tile_call *call)                                               \
    {                                                                                                        \
        run(call, TENSOR_##name, (struct cpu_type)__VA_ARGS__, columns);                                     \
    }
#define KERNELS(name, ...)                                                                                   \
    KERNEL(name, 1, __VA_ARGS__)                                                                             \
    KERNEL(name, 2, __VA_ARGS__)                                                                             \
    KERNEL(name, 4, __VA_ARGS__)

KERNELS(F32, {0})
KERNELS(F16, {0})
KERNELS(BF16, {0})
KERNELS(Q4_0, {32, 32, 4, 8, false})
KERNELS(Q4_1, {32, 32, 4, 0, true})
KERNELS(Q5_0, {32, 32, 5, 16, false})
KERNELS(Q5_1, {32, 32, 5, 0, true})
KERNELS(Q8_0, {32, 32, 8, 128, false})
KERNELS(Q2_K, {256, 16, 2, 0, true})
KERNELS(Q3_K, {256, 16, 3, 4, false})
KERNELS(Q4_K, {256, 32, 4, 0, true})
KERNELS(Q5_K, {256, 32, 5, 0, true})
KERNELS(Q6_K, {256, 16, 6, 32, false})

#define ENTRY(name) [TENSOR_##name] = {{name##_1, name##_2, name##_4}}
static const struct tile_kernels KERNELS_OF[] = {
    ENTRY(F32),  ENTRY(F16),  ENTRY(BF16), ENTRY(Q4_0), ENTRY(Q4_1), ENTRY(Q5_0), ENTRY(Q5_1),
    ENTRY(Q8_0), ENTRY(Q2_K), ENTRY(Q3_K), ENTRY(Q4_K), ENTRY(Q5_K), ENTRY(Q6_K),
};

void cpu_matmul_avx2(struct device *device, const struct activation *x, uint32_t rows,
                     const struct matmul_part *parts, uint32_t n_parts)
{
    cpu_matmul_tiles(cpu_device_of(device), x, rows, parts, n_parts, KERNELS_OF);
}
