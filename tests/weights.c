// See weights.h. Written from the formats' definitions, apart from the code under test.
#include "tests/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/tensor_type.h"

const uint32_t WEIGHT_TYPES[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0, TENSOR_Q4_1,
                                 TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0, TENSOR_Q2_K, TENSOR_Q3_K,
                                 TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};
const size_t N_WEIGHT_TYPES = sizeof(WEIGHT_TYPES) / sizeof(WEIGHT_TYPES[0]);

uint64_t random_bits(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

double random_unit(uint64_t *state)
{
    return (double)(random_bits(state) >> 11) * 0x1p-53;
}

float random_signed(uint64_t *state)
{
    return (float)(2 * random_unit(state) - 1);
}

uint64_t random_seed(const char *what)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const char *fixed = getenv("STRATA_TEST_SEED");
    uint64_t seed =
        fixed ? strtoull(fixed, NULL, 10) : (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    printf("%s: STRATA_TEST_SEED=%llu\n", what, (unsigned long long)seed);
    return seed;
}

static double half_value(uint16_t half)
{
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    double value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return half & 0x8000 ? -value : value;
}

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] + 256 * p[1]);
}

// Where the halves (d, dmin) of a block are; -1: none.
static void half_offsets(uint32_t type, int offsets[2])
{
    offsets[0] = type == TENSOR_Q2_K ? 80 : type == TENSOR_Q3_K ? 108 : type == TENSOR_Q6_K ? 208 : 0;
    offsets[1] = type == TENSOR_Q2_K ? 82
                 : type == TENSOR_Q4_1 || type == TENSOR_Q5_1 || type == TENSOR_Q4_K || type == TENSOR_Q5_K
                     ? 2
                     : -1;
}

// Either sign, magnitude in [2^-6, 2^-4): any mantissa.
static uint16_t random_half(uint64_t *random)
{
    uint64_t bits = random_bits(random);
    return (uint16_t)((bits & 0x83ff) | (9 + (bits >> 20 & 1)) << 10);
}

static void fill_float(uint32_t type, uint8_t *p, uint64_t *random)
{
    float value = random_signed(random);
    uint16_t half = random_half(random);
    if (type == TENSOR_F32)
        memcpy(p, &value, 4);
    else if (type == TENSOR_BF16)
        memcpy(p, (uint8_t *)&value + 2, 2);
    else
        memcpy(p, &half, 2);
}

static void fill_halves(uint32_t type, uint8_t *block, uint64_t *random)
{
    int halves[2];
    half_offsets(type, halves);
    for (int i = 0; i < 2; i++) {
        uint16_t half = random_half(random);
        if (halves[i] >= 0)
            memcpy(block + halves[i], &half, 2);
    }
}

void weights_fill(uint32_t type, void *out, uint32_t width, uint32_t rows, uint64_t *random)
{
    const struct tensor_type_info *info = tensor_type_info(type);
    uint8_t *p = out;
    size_t blocks = (size_t)rows * (width / info->block_weights);
    for (size_t i = 0; i < blocks; i++, p += info->block_bytes) {
        if (info->block_weights == 1) {
            fill_float(type, p, random);
            continue;
        }
        for (uint32_t j = 0; j < info->block_bytes; j++)
            p[j] = (uint8_t)random_bits(random);
        fill_halves(type, p, random);
    }
}

void weights_fill_codes(uint32_t type, void *out, uint32_t width, uint32_t rows, uint8_t byte,
                        uint64_t *random)
{
    const struct tensor_type_info *info = tensor_type_info(type);
    uint8_t *p = out;
    size_t blocks = (size_t)rows * (width / info->block_weights);
    for (size_t i = 0; i < blocks; i++, p += info->block_bytes) {
        memset(p, byte, info->block_bytes);
        fill_halves(type, p, random);
    }
}

static int bit(const uint8_t *bytes, uint32_t index)
{
    return bytes[index / 8] >> index % 8 & 1;
}

// value = a * q + b, the terms of one element. Where codes have an offset it is a term: kernels may round
// them apart.
struct terms {
    double a, q, b;
};

static struct terms block_32(uint32_t type, const uint8_t *p, uint32_t i)
{
    double d = half_value(get16(p)), m = half_value(get16(p + 2));
    switch (type) {
    case TENSOR_Q4_0:
        return (struct terms){d, i < 16 ? p[2 + i] % 16 : p[2 + i - 16] / 16, -8 * d};
    case TENSOR_Q4_1:
        return (struct terms){d, i < 16 ? p[4 + i] % 16 : p[4 + i - 16] / 16, m};
    case TENSOR_Q5_0:
        return (struct terms){d, (i < 16 ? p[6 + i] % 16 : p[6 + i - 16] / 16) + 16 * bit(p + 2, i), -16 * d};
    case TENSOR_Q5_1:
        return (struct terms){d, (i < 16 ? p[8 + i] % 16 : p[8 + i - 16] / 16) + 16 * bit(p + 4, i), m};
    default:
        return (struct terms){d, (int8_t)p[2 + i], 0};
    }
}

// The 6-bit scale (which = 0) or minimum (1) of group j of Q4_K and Q5_K.
static int six_bits(const uint8_t *s, uint32_t j, int which)
{
    if (j < 4)
        return s[j + 4 * (uint32_t)which] % 64;
    int low = which ? s[j + 4] / 16 : s[j + 4] % 16;
    return low + 16 * (s[j - 4 + 4 * (uint32_t)which] / 64);
}

static struct terms block_256(uint32_t type, const uint8_t *p, uint32_t i)
{
    int halves[2];
    half_offsets(type, halves);
    double d = half_value(get16(p + halves[0])), dmin = halves[1] < 0 ? 0 : half_value(get16(p + halves[1]));
    uint32_t big = i / 128, in = i % 128, g16 = i / 16, g32 = i / 32;
    if (type == TENSOR_Q2_K) {
        int q = p[16 + 32 * big + in % 32] >> 2 * (in / 32) & 3;
        return (struct terms){d * (p[g16] % 16), q, -dmin * (p[g16] / 16)};
    }
    if (type == TENSOR_Q3_K) {
        int q = (p[32 + 32 * big + in % 32] >> 2 * (in / 32) & 3) + 4 * (p[i % 32] >> g32 & 1) - 4;
        const uint8_t *s = p + 96;
        int scale =
            (g16 < 8 ? s[g16] % 16 : s[g16 - 8] / 16) + 16 * (s[8 + g16 % 4] >> 2 * (g16 / 4) & 3) - 32;
        return (struct terms){d * scale, q, 0};
    }
    if (type == TENSOR_Q6_K) {
        uint8_t low = p[64 * big + in % 64];
        int q =
            (in < 64 ? low % 16 : low / 16) + 16 * (p[128 + 32 * big + in % 32] >> 2 * (in / 32) & 3) - 32;
        return (struct terms){d * (int8_t)p[192 + g16], q, 0};
    }
    const uint8_t *q4 = p + (type == TENSOR_Q5_K ? 48 : 16);
    uint8_t byte = q4[i / 64 * 32 + i % 32];
    int q = g32 % 2 ? byte / 16 : byte % 16;
    if (type == TENSOR_Q5_K)
        q += 16 * (p[16 + i % 32] >> g32 & 1);
    return (struct terms){d * six_bits(p + 4, g32, 0), q, -dmin * six_bits(p + 4, g32, 1)};
}

double weights_value(uint32_t type, const void *row, uint32_t k, double *gross)
{
    const struct tensor_type_info *info = tensor_type_info(type);
    const uint8_t *p = (const uint8_t *)row + (size_t)(k / info->block_weights) * info->block_bytes;
    double value;
    float single;
    uint32_t bits;
    switch (info->block_weights) {
    case 1:
        if (type == TENSOR_F16) {
            value = half_value(get16(p));
        } else {
            bits = type == TENSOR_BF16 ? (uint32_t)get16(p) << 16 : 0;
            memcpy(&single, type == TENSOR_BF16 ? (const void *)&bits : p, 4);
            value = single;
        }
        if (gross)
            *gross = fabs(value);
        return value;
    default: {
        struct terms t = info->block_weights == 32 ? block_32(type, p, k % 32) : block_256(type, p, k % 256);
        if (gross)
            *gross = fabs(t.a * t.q) + fabs(t.b);
        return t.a * t.q + t.b;
    }
    }
}
