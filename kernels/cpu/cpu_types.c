// The bit layouts of GGUF's quantized types, each once. Multi-byte numbers are little-endian and may be
// unaligned. Pure functions; any thread.
#include "kernels/cpu/cpu_types.h"

#include "kernels/cpu/cpu_internal.h"

static const struct cpu_type TYPES[] = {
    [TENSOR_Q4_0] = {32, 32, 4, 8, false},   [TENSOR_Q4_1] = {32, 32, 4, 0, true},
    [TENSOR_Q5_0] = {32, 32, 5, 16, false},  [TENSOR_Q5_1] = {32, 32, 5, 0, true},
    [TENSOR_Q8_0] = {32, 32, 8, 128, false}, [TENSOR_Q2_K] = {256, 16, 2, 0, true},
    [TENSOR_Q3_K] = {256, 16, 3, 4, false},  [TENSOR_Q4_K] = {256, 32, 4, 0, true},
    [TENSOR_Q5_K] = {256, 32, 5, 0, true},   [TENSOR_Q6_K] = {256, 16, 6, 32, false},
};

struct cpu_type cpu_type_of(uint32_t type)
{
    return type < sizeof(TYPES) / sizeof(TYPES[0]) ? TYPES[type] : (struct cpu_type){0};
}

static uint16_t read_half(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] | bytes[1] << 8);
}

// 32 nibbles: the low halves come first.
static void unpack_nibbles(const uint8_t *source, uint8_t *q)
{
    for (int i = 0; i < 16; i++) {
        q[i] = source[i] & 15;
        q[16 + i] = source[i] >> 4;
    }
}

static void add_fifth_bits(const uint8_t *source, uint8_t *q)
{
    for (int i = 0; i < 32; i++)
        q[i] |= (uint8_t)((source[i / 8] >> i % 8 & 1) << 4);
}

// Q4_0, Q4_1, Q5_0, Q5_1: d, [m], [fifth bits], nibbles.
static void unpack_32(const uint8_t *source, bool has_min, bool fifth, struct cpu_plain_block *out)
{
    out->d = read_half(source);
    source += 2;
    if (has_min) {
        out->dmin = read_half(source);
        out->negative_min = true;
        out->min[0] = 1;
        source += 2;
    }
    unpack_nibbles(fifth ? source + 4 : source, out->q);
    if (fifth)
        add_fifth_bits(source, out->q);
}

static void unpack_q8_0(const uint8_t *source, struct cpu_plain_block *out)
{
    out->d = read_half(source);
    for (int i = 0; i < 32; i++)
        out->q[i] = source[2 + i] ^ 0x80;
}

// 16 scales and minimums of 4 bits, 256 codes of 2 bits, d, dmin. Codes: per half of 128, byte i holds those
// of i, 32 + i, 64 + i, 96 + i.
static void unpack_q2_k(const uint8_t *source, struct cpu_plain_block *out)
{
    for (int i = 0; i < 16; i++) {
        out->scale[i] = source[i] & 15;
        out->min[i] = source[i] >> 4;
    }
    for (int i = 0; i < 256; i++)
        out->q[i] = source[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
    out->d = read_half(source + 80);
    out->dmin = read_half(source + 82);
}

// High bits (bit i / 32 of byte i % 32), low 2 bits as in Q2_K, 16 scales of 6 bits (low nibbles in 8 bytes,
// high pairs in 4), d.
static void unpack_q3_k(const uint8_t *source, struct cpu_plain_block *out)
{
    const uint8_t *high = source, *low = source + 32, *scales = source + 96;
    for (int i = 0; i < 256; i++)
        out->q[i] = (uint8_t)((low[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) |
                              (high[i % 32] >> i / 32 & 1) << 2);
    for (int i = 0; i < 16; i++) {
        int nibble = scales[i % 8] >> i / 8 * 4 & 15, pair = scales[8 + i % 4] >> i / 4 * 2 & 3;
        out->scale[i] = (int16_t)((nibble | pair << 4) - 32);
    }
    out->d = read_half(source + 108);
}

// d, dmin, 8 scales and minimums of 6 bits in 12 bytes, [high bits: bit i / 32 of byte i % 32], nibbles: per
// 64, byte i holds those of i and 32 + i.
static void unpack_q45_k(const uint8_t *source, bool fifth, struct cpu_plain_block *out)
{
    const uint8_t *s = source + 4, *high = source + 16, *low = fifth ? source + 48 : source + 16;
    out->d = read_half(source);
    out->dmin = read_half(source + 2);
    for (int i = 0; i < 4; i++) {
        out->scale[i] = s[i] & 63;
        out->min[i] = s[4 + i] & 63;
        out->scale[4 + i] = (int16_t)((s[8 + i] & 15) | s[i] >> 6 << 4);
        out->min[4 + i] = (int16_t)(s[8 + i] >> 4 | s[4 + i] >> 6 << 4);
    }
    for (int i = 0; i < 256; i++)
        out->q[i] = low[i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
    for (int i = 0; fifth && i < 256; i++)
        out->q[i] |= (uint8_t)((high[i % 32] >> i / 32 & 1) << 4);
}

// Low nibbles (per 128: byte i holds those of i and 64 + i, i < 64), high pairs as in Q2_K, 16 signed scales,
// d.
static void unpack_q6_k(const uint8_t *source, struct cpu_plain_block *out)
{
    const uint8_t *low = source, *high = source + 128;
    for (int i = 0; i < 256; i++)
        out->q[i] = (uint8_t)((low[i / 128 * 64 + i % 64] >> i % 128 / 64 * 4 & 15) |
                              (high[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) << 4);
    for (int i = 0; i < 16; i++)
        out->scale[i] = (int8_t)source[192 + i];
    out->d = read_half(source + 208);
}

void cpu_unpack_block(uint32_t type, const uint8_t *source, struct cpu_plain_block *out)
{
    out->dmin = 0;
    out->negative_min = false;
    out->scale[0] = 1;
    out->min[0] = 0;
    switch (type) {
    case TENSOR_Q4_0:
        unpack_32(source, false, false, out);
        break;
    case TENSOR_Q4_1:
        unpack_32(source, true, false, out);
        break;
    case TENSOR_Q5_0:
        unpack_32(source, false, true, out);
        break;
    case TENSOR_Q5_1:
        unpack_32(source, true, true, out);
        break;
    case TENSOR_Q8_0:
        unpack_q8_0(source, out);
        break;
    case TENSOR_Q2_K:
        unpack_q2_k(source, out);
        break;
    case TENSOR_Q3_K:
        unpack_q3_k(source, out);
        break;
    case TENSOR_Q4_K:
        unpack_q45_k(source, false, out);
        break;
    case TENSOR_Q5_K:
        unpack_q45_k(source, true, out);
        break;
    case TENSOR_Q6_K:
        unpack_q6_k(source, out);
        break;
    }
}

static void dequantize_block(uint32_t type, struct cpu_type form, const uint8_t *source, float *out)
{
    struct cpu_plain_block block;
    cpu_unpack_block(type, source, &block);
    float d = cpu_f16_to_f32(block.d), dmin = cpu_f16_to_f32(block.dmin);
    if (block.negative_min)
        dmin = -dmin;
    for (uint32_t first = 0; first < form.block; first += form.group) {
        float scale = d * (float)block.scale[first / form.group];
        float min = form.has_min ? dmin * (float)block.min[first / form.group] : 0.0f;
        for (uint32_t i = first; i < first + form.group; i++)
            out[i] = scale * (float)((int)block.q[i] - (int)form.offset) - min;
    }
}

void cpu_dequantize_row(uint32_t type, const void *source, float *out, uint32_t width)
{
    const uint8_t *bytes = source;
    struct cpu_type form = cpu_type_of(type);
    if (form.block) {
        uint32_t block_bytes = tensor_type_info(type)->block_bytes;
        for (uint32_t i = 0; i < width; i += form.block, bytes += block_bytes)
            dequantize_block(type, form, bytes, out + i);
    } else if (type == TENSOR_F16) {
        for (uint32_t i = 0; i < width; i++)
            out[i] = cpu_f16_to_f32(read_half(bytes + 2 * i));
    } else if (type == TENSOR_BF16) {
        for (uint32_t i = 0; i < width; i++)
            out[i] = cpu_bf16_to_f32(read_half(bytes + 2 * i));
    } else {
        memcpy(out, bytes, (size_t)width * 4);
    }
}
