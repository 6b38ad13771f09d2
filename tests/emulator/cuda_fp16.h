// Halves as the kernels use them, for g++. Stands where CUDA's header of this name does (emulator.h).
#ifndef STRATA_EMULATED_CUDA_FP16_H
#define STRATA_EMULATED_CUDA_FP16_H

#include "tests/emulator/cuda_runtime.h"

struct alignas(2) __half {
    unsigned short bits;
};

struct alignas(4) __half2 {
    __half x, y;
};

extern const float *const emulated_half_values; // of the 65536 halves, by their bits

static inline float __half2float(__half x)
{
    return emulated_half_values[x.bits];
}

static inline __half __float2half_rn(float x)
{
    _Float16 rounded = (_Float16)x;
    __half out;
    memcpy(&out, &rounded, sizeof(out));
    return out;
}

static inline __half __ushort_as_half(unsigned short bits)
{
    return {bits};
}

static inline __half2 __halves2half2(__half low, __half high)
{
    return {low, high};
}

static inline __half2 __floats2half2_rn(float low, float high)
{
    return {__float2half_rn(low), __float2half_rn(high)};
}

static inline float2 __half22float2(__half2 pair)
{
    return {__half2float(pair.x), __half2float(pair.y)};
}

#endif
