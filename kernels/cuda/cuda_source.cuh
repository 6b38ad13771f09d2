// GGUF's weight types as they stand in a file, read one weight at a time: what packing, unpacking and
// embedding start from. A weight of a quantized type is
//
//     (d * scale[group]) * (code - offset) - dmin * min[group]
//
// with one d and dmin a block, as in kernels/cpu/cpu_types.h. Bytes may be unaligned. Device functions; the
// type is the same in all threads of a kernel.
#ifndef STRATA_CUDA_SOURCE_CUH
#define STRATA_CUDA_SOURCE_CUH

#include <cuda_fp16.h>
#include <stdint.h>

#include "kernels/cuda/cuda_internal.h"

struct source_form { // of a type: constants
    uint32_t block, bytes;
    uint32_t group; // weights under one scale
    uint32_t offset;
    bool has_min;
};

__host__ __device__ inline struct source_form source_form_of(uint32_t type)
{
    switch (type) {
    case 2: // Q4_0
        return {32, 18, 32, 8, false};
    case 3: // Q4_1
        return {32, 20, 32, 0, true};
    case 6: // Q5_0
        return {32, 22, 32, 16, false};
    case 7: // Q5_1
        return {32, 24, 32, 0, true};
    case 8: // Q8_0
        return {32, 34, 32, 128, false};
    case 10: // Q2_K
        return {256, 84, 16, 0, true};
    case 11: // Q3_K
        return {256, 110, 16, 4, false};
    case 12: // Q4_K
        return {256, 144, 32, 0, true};
    case 13: // Q5_K
        return {256, 176, 32, 0, true};
    case 14: // Q6_K
        return {256, 210, 16, 32, false};
    default: // floats
        return {1, type == 0 ? 4u : 2u, 1, 0, false};
    }
}

__device__ inline float source_half(const uint8_t *at)
{
    return __half2float(__ushort_as_half((unsigned short)(at[0] | at[1] << 8)));
}

// d, and dmin with the sign under which `min` counts as above.
__device__ inline float2 source_factors(uint32_t type, const uint8_t *b)
{
    switch (type) {
    case TENSOR_Q4_1:
    case TENSOR_Q5_1:
        return make_float2(source_half(b), -source_half(b + 2));
    case TENSOR_Q2_K:
        return make_float2(source_half(b + 80), source_half(b + 82));
    case TENSOR_Q3_K:
        return make_float2(source_half(b + 108), 0);
    case TENSOR_Q4_K:
    case TENSOR_Q5_K:
        return make_float2(source_half(b), source_half(b + 2));
    case TENSOR_Q6_K:
        return make_float2(source_half(b + 208), 0);
    default:
        return make_float2(source_half(b), 0);
    }
}

// Scale and minimum of a group of the block.
__device__ inline int2 source_scale(uint32_t type, const uint8_t *b, uint32_t g)
{
    switch (type) {
    case TENSOR_Q4_1:
    case TENSOR_Q5_1:
        return make_int2(1, 1);
    case TENSOR_Q2_K:
        return make_int2(b[g] & 15, b[g] >> 4);
    case TENSOR_Q3_K: {
        int nibble = b[96 + g % 8] >> g / 8 * 4 & 15, pair = b[104 + g % 4] >> g / 4 * 2 & 3;
        return make_int2((nibble | pair << 4) - 32, 0);
    }
    case TENSOR_Q4_K:
    case TENSOR_Q5_K: {
        const uint8_t *s = b + 4;
        if (g < 4)
            return make_int2(s[g] & 63, s[4 + g] & 63);
        return make_int2((s[4 + g] & 15) | s[g - 4] >> 6 << 4, s[4 + g] >> 4 | s[g] >> 6 << 4);
    }
    case TENSOR_Q6_K:
        return make_int2((int8_t)b[192 + g], 0);
    default:
        return make_int2(1, 0);
    }
}

// The stored code of weight i of the block, unsigned.
__device__ inline uint32_t source_code(uint32_t type, const uint8_t *b, uint32_t i)
{
    uint32_t nibble_shift = i / 16 * 4; // of the 32-weight types
    switch (type) {
    case TENSOR_Q4_0:
        return b[2 + i % 16] >> nibble_shift & 15;
    case TENSOR_Q4_1:
        return b[4 + i % 16] >> nibble_shift & 15;
    case TENSOR_Q5_0:
        return (b[6 + i % 16] >> nibble_shift & 15) | (b[2 + i / 8] >> i % 8 & 1) << 4;
    case TENSOR_Q5_1:
        return (b[8 + i % 16] >> nibble_shift & 15) | (b[4 + i / 8] >> i % 8 & 1) << 4;
    case TENSOR_Q8_0:
        return b[2 + i] ^ 0x80;
    case TENSOR_Q2_K:
        return b[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
    case TENSOR_Q3_K:
        return (b[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) | (b[i % 32] >> i / 32 & 1) << 2;
    case TENSOR_Q4_K:
        return b[16 + i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
    case TENSOR_Q5_K:
        return (b[48 + i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15) | (b[16 + i % 32] >> i / 32 & 1) << 4;
    default: // Q6_K
        return (b[i / 128 * 64 + i % 64] >> i % 128 / 64 * 4 & 15) |
               (b[128 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) << 4;
    }
}

// Weight k of the row at `row`.
__device__ inline float source_value(uint32_t type, const uint8_t *row, uint32_t k)
{
    struct source_form form = source_form_of(type);
    const uint8_t *b = row + (size_t)(k / form.block) * form.bytes;
    if (type == TENSOR_F32)
        return __uint_as_float(b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24);
    if (type == TENSOR_F16)
        return source_half(b);
    if (type == TENSOR_BF16)
        return __uint_as_float((uint32_t)b[0] << 16 | (uint32_t)b[1] << 24);
    uint32_t i = k % form.block;
    float2 factors = source_factors(type, b);
    int2 scale = source_scale(type, b, i / form.group);
    float value = factors.x * (float)scale.x * (float)((int)source_code(type, b, i) - (int)form.offset);
    return form.has_min ? value - factors.y * (float)scale.y : value;
}

#endif
