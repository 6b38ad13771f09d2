// Tile kernels of the AVX-512 level. One vector register holds one number of each of the 16 rows of a tile;
// vpdpbusd adds four products (unsigned codes x signed activations) to each. Integer sums are exact within 16
// k, which share one scale of the activations; then they become floats, times that scale. Two such halves of
// a block are added, times the weights' scale (each has its own where those belong to 16), to the column's
// f32 sums, block after block. Codes are unsigned: what they exceed the weights by is taken off through the
// activations' own sum, which the integer sum starts from.
//
// The functions below are one kernel, specialized by the compiler for each type and number of columns.
// Runs on compute threads; pure.
#include "kernels/cpu/cpu_tiles.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { MAX_COLUMNS = 8 };

// --- codes ---

// Shifts 16-bit lanes left (or right when negative) by a constant; the bits that cross bytes are masked away
// by the caller.
ALWAYS_INLINE __m512i shift(__m512i v, int by)
{
    return by > 0 ? _mm512_slli_epi16(v, (unsigned)by) : by < 0 ? _mm512_srli_epi16(v, (unsigned)-by) : v;
}

// q | (v shifted by `by` & mask)
ALWAYS_INLINE __m512i merge(__m512i q, __m512i v, int by, int mask)
{
    return _mm512_ternarylogic_epi32(q, shift(v, by), _mm512_set1_epi8((char)mask), 0xf8);
}

// Group `g` of the 16 x 32 codes at `p`.
ALWAYS_INLINE __m512i load_group(const uint8_t *p, const int bits, const int g)
{
    __m512i low_mask = _mm512_set1_epi8(bits >= 4 ? 15 : 3);
    if (bits == 8)
        return _mm512_load_si512(p + 64 * g);
    if (bits >= 4) {
        __m512i q = _mm512_and_si512(shift(_mm512_load_si512(p + 64 * (g / 2)), -4 * (g % 2)), low_mask);
        if (bits == 5)
            return merge(q, _mm512_load_si512(p + 256), 4 - g, 0x10);
        if (bits == 6)
            return merge(q, _mm512_load_si512(p + 256 + 64 * (g / 4)), 4 - 2 * (g % 4), 0x30);
        return q;
    }
    __m512i q = _mm512_and_si512(shift(_mm512_load_si512(p + 64 * (g / 4)), -2 * (g % 4)), low_mask);
    return bits == 3 ? merge(q, _mm512_load_si512(p + 128), 2 - g, 0x04) : q;
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

// sums[c] += four groups of the block x codes, from the first on
ALWAYS_INLINE void dot(const struct tile_call *call, const int columns, uint32_t index, const uint8_t *codes,
                       const int bits, const int first, __m512i *sums)
{
#pragma GCC unroll 4
    for (int g = first; g < first + 4; g++) {
        __m512i q = load_group(codes, bits, g);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {
            int32_t four;
            memcpy(&four, block_of(call, c, index)->q + 4 * g, 4);
            sums[c] = _mm512_dpbusd_epi32(sums[c], q, _mm512_set1_epi32(four));
        }
    }
}

// What an integer sum starts from: the codes' offset times the activations' sum, taken off.
ALWAYS_INLINE __m512i start(const struct cpu_type form, int32_t minus_sum)
{
    if (!form.offset)
        return _mm512_setzero_si512();
    return _mm512_slli_epi32(_mm512_set1_epi32(minus_sum), (unsigned)log2_of(form.offset));
}

// A block's half (four groups, and one scale of the activations): out[c] = its integer sum, codes' offset
// taken off, as a float
ALWAYS_INLINE void dot_half(const struct tile_call *call, const struct cpu_type form, const int columns,
                            uint32_t index, const uint8_t *codes, const int half, __m512 *out)
{
    __m512i sums[MAX_COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++)
        sums[c] = start(form, block_of(call, c, index)->minus_sum[half]);
    dot(call, columns, index, codes, (int)form.bits, 4 * half, sums);
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++)
        out[c] = _mm512_cvtepi32_ps(sums[c]);
}

// A block of 32 under one scale (and minimum) a row: total[c] += (scale * q - min) * x
ALWAYS_INLINE void add_block(const struct tile_call *call, const struct cpu_type form, const int columns,
                             uint32_t index, const uint8_t *codes, __m512 scale, __m512 plus_min,
                             __m512 *total)
{
    __m512 dots[2][MAX_COLUMNS];
    dot_half(call, form, columns, index, codes, 0, dots[0]);
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++)
        dots[0][c] = _mm512_mul_ps(dots[0][c], _mm512_set1_ps(block_of(call, c, index)->scale[0]));
    dot_half(call, form, columns, index, codes, 1, dots[1]);
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
        const struct cpu_q8_block *x = block_of(call, c, index);
        __m512 both = _mm512_fmadd_ps(dots[1][c], _mm512_set1_ps(x->scale[1]), dots[0][c]);
        total[c] = _mm512_fmadd_ps(both, scale, total[c]);
        if (form.has_min)
            total[c] = _mm512_fmadd_ps(plus_min, _mm512_set1_ps(x->scaled_total), total[c]);
    }
}

ALWAYS_INLINE __m512 signed_bytes(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)p)));
}

ALWAYS_INLINE __m512 nibbles(const uint8_t *p, int by)
{
    __m128i bytes = _mm_and_si128(_mm_srli_epi16(_mm_load_si128((const __m128i *)p), by), _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

ALWAYS_INLINE __m512 halves(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)p));
}

// A block of 32 with a scale (and minimum) for each 16: total[c] += (d * scale * q - dmin * min) * x of each
ALWAYS_INLINE void add_two_groups(const struct tile_call *call, const struct cpu_type form, const int columns,
                                  uint32_t index, const uint8_t *codes, const uint8_t *scales, __m512 d,
                                  __m512 minus_dmin, __m512 *total)
{
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const uint8_t *bytes = scales + 16 * half;
        __m512 scale = _mm512_mul_ps(d, form.has_min ? nibbles(bytes, 0) : signed_bytes(bytes));
        __m512 plus_min = form.has_min ? _mm512_mul_ps(minus_dmin, nibbles(bytes, 4)) : _mm512_setzero_ps();
        __m512 dots[MAX_COLUMNS];
        dot_half(call, form, columns, index, codes, half, dots);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {
            const struct cpu_q8_block *x = block_of(call, c, index);
            __m512 scaled = _mm512_mul_ps(dots[c], _mm512_set1_ps(x->scale[half]));
            total[c] = _mm512_fmadd_ps(scaled, scale, total[c]);
            if (form.has_min)
                total[c] = _mm512_fmadd_ps(plus_min, _mm512_set1_ps(x->scaled_sum[half]), total[c]);
        }
    }
}

// --- tiles ---

ALWAYS_INLINE void sum_32(const struct tile_call *call, const struct cpu_type form, const int columns,
                          __m512 *total)
{
    const uint32_t header = cpu_pair_header(form.has_min), code_bytes = cpu_code_bytes(form.bits);
    const uint8_t *pair = call->tile;
    uint32_t blocks = call->width / 32;
    for (uint32_t i = 0; i < blocks; i++) {
        uint32_t odd = i & 1;
        fetch_ahead(pair + odd * (header / 2 + code_bytes), header / 2 + code_bytes);
        __m512 scale = halves(pair + 32 * odd);
        __m512 min = form.has_min ? halves(pair + 64 + 32 * odd) : _mm512_setzero_ps();
        add_block(call, form, columns, i, pair + header + odd * code_bytes, scale, min, total);
        pair += odd * (header + 2 * code_bytes);
    }
}

ALWAYS_INLINE void sum_256(const struct tile_call *call, const struct cpu_type form, const int columns,
                           __m512 *total)
{
    const uint32_t code_bytes = cpu_code_bytes(form.bits);
    const uint8_t *header = call->tile;
    for (uint32_t i = 0; i < call->width / 32; i += 8, header += K_HEADER + 8 * code_bytes) {
        __m512 d = halves(header), minus_dmin = _mm512_sub_ps(_mm512_setzero_ps(), halves(header + 32));
        const uint8_t *scales = header + 64, *codes = header + K_HEADER;
        fetch_ahead(header, K_HEADER);
        for (uint32_t j = 0; j < 8; j++, codes += code_bytes) {
            fetch_ahead(codes, code_bytes);
            if (form.group == 16) {
                add_two_groups(call, form, columns, i + j, codes, scales + 32 * j, d, minus_dmin, total);
            } else {
                __m512 scale = _mm512_mul_ps(d, signed_bytes(scales + 16 * j));
                __m512 plus_min = _mm512_mul_ps(minus_dmin, signed_bytes(scales + 128 + 16 * j));
                add_block(call, form, columns, i + j, codes, scale, plus_min, total);
            }
        }
    }
}

ALWAYS_INLINE __m512 load_floats(uint32_t type, const uint8_t *tile, uint32_t k)
{
    if (type == TENSOR_F32)
        return _mm512_load_ps((const float *)tile + 16 * k);
    if (type == TENSOR_F16)
        return halves(tile + 32 * k);
    __m256i bits = _mm256_load_si256((const __m256i *)(tile + 32 * k));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Even and odd k are summed apart, so that one column alone does not wait for each addition.
ALWAYS_INLINE void sum_floats(const struct tile_call *call, uint32_t type, const int columns, __m512 *total)
{
    __m512 odd[MAX_COLUMNS];
    uint32_t k = 0;
    for (int c = 0; c < columns; c++)
        odd[c] = _mm512_setzero_ps();
    const uint32_t pair_bytes = type == TENSOR_F32 ? 128 : 64;
    for (; k + 2 <= call->width; k += 2) {
        fetch_ahead(call->tile + k / 2 * pair_bytes, pair_bytes);
        __m512 w0 = load_floats(type, call->tile, k), w1 = load_floats(type, call->tile, k + 1);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {
            const float *x = (const float *)(call->x + c * call->x_stride) + k;
            total[c] = _mm512_fmadd_ps(w0, _mm512_set1_ps(x[0]), total[c]);
            odd[c] = _mm512_fmadd_ps(w1, _mm512_set1_ps(x[1]), odd[c]);
        }
    }
    for (int c = 0; c < columns; c++) {
        const float *x = (const float *)(call->x + c * call->x_stride) + k;
        if (k < call->width)
            total[c] = _mm512_fmadd_ps(load_floats(type, call->tile, k), _mm512_set1_ps(x[0]), total[c]);
        total[c] = _mm512_add_ps(total[c], odd[c]);
    }
}

ALWAYS_INLINE void run(const struct tile_call *call, uint32_t type, const struct cpu_type form,
                       const int columns)
{
    __m512 total[MAX_COLUMNS];
    for (int c = 0; c < columns; c++)
        total[c] = _mm512_setzero_ps();
    if (form.block == 32)
        sum_32(call, form, columns, total);
    else if (form.block == 256)
        sum_256(call, form, columns, total);
    else
        sum_floats(call, type, columns, total);
    __mmask16 rows = (__mmask16)((1u << call->n_rows) - 1);
    __m512 bias = call->bias ? _mm512_maskz_loadu_ps(rows, call->bias) : _mm512_setzero_ps();
    for (int c = 0; c < columns; c++) {
        float *out = call->out + c * call->out_stride;
        __m512 value = call->bias ? _mm512_add_ps(total[c], bias) : total[c];
        if (call->accumulate)
            value = _mm512_add_ps(_mm512_maskz_loadu_ps(rows, out), value);
        _mm512_mask_storeu_ps(out, rows, value);
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
    KERNEL(name, 4, __VA_ARGS__)                                                                             \
    KERNEL(name, 8, __VA_ARGS__)

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

#define ENTRY(name) [TENSOR_##name] = {{name##_1, name##_2, name##_4, name##_8}}
static const struct tile_kernels KERNELS_OF[] = {
    ENTRY(F32),  ENTRY(F16),  ENTRY(BF16), ENTRY(Q4_0), ENTRY(Q4_1), ENTRY(Q5_0), ENTRY(Q5_1),
    ENTRY(Q8_0), ENTRY(Q2_K), ENTRY(Q3_K), ENTRY(Q4_K), ENTRY(Q5_K), ENTRY(Q6_K),
};

void cpu_matmul_avx512(struct device *device, const struct activation *x, uint32_t rows,
                       const struct matmul_part *parts, uint32_t n_parts)
{
    cpu_matmul_tiles(cpu_device_of(device), x, rows, parts, n_parts, KERNELS_OF);
}
