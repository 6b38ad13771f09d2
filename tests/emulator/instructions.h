// The instructions of kernels/cuda/cuda_mma.cuh, cuda_barrier.cuh and cuda_wgmma.cuh, which hold PTX, on a
// processor. Included before each of the backend's files (emulator.cmake), it takes those headers' guards, so
// that what they declare comes from here. What the functions mean, they say.
#ifndef STRATA_EMULATED_INSTRUCTIONS_H
#define STRATA_EMULATED_INSTRUCTIONS_H

#ifdef __cplusplus

#include "tests/emulator/cuda_fp16.h"
#include "tests/emulator/cuda_runtime.h"

// --- kernels/cuda/cuda_mma.cuh ---

#define STRATA_CUDA_MMA_CUH

struct emulated_mma {
    unsigned a[4];
    unsigned b[2];
    float *c;
};

void emulated_mma_of_warp(void **lanes); // each a struct emulated_mma

static inline void mma_halves(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                              uint32_t b1)
{
    struct emulated_mma mine = {{a0, a1, a2, a3}, {b0, b1}, c};
    emulated_meet_warp(&mine, emulated_mma_of_warp);
}

static inline float power_of_2(float x)
{
    return exp2f(x);
}

static inline void copy_async16(void *shared, const void *global, bool live)
{
    emulated_copy16(shared, global, live);
}

static inline void copy_async_commit()
{
    emulated_copy_commit();
}

template <int PENDING> static inline void copy_async_wait()
{
    emulated_copy_wait(PENDING);
}

static inline float emulated_half_of(unsigned pair, int i)
{
    return emulated_half_values[pair >> 16 * i & 0xFFFF];
}

static inline unsigned emulated_pair(float low, float high)
{
    _Float16 pair[2] = {(_Float16)low, (_Float16)high};
    unsigned bits;
    memcpy(&bits, pair, sizeof(bits));
    return bits;
}

// Products are exact in f32; sums are rounded twice, which is once but for ties of the first rounding.
static inline unsigned pair_multiply(unsigned a, unsigned b)
{
    return emulated_pair(emulated_half_of(a, 0) * emulated_half_of(b, 0),
                         emulated_half_of(a, 1) * emulated_half_of(b, 1));
}

static inline unsigned pair_fma(unsigned a, unsigned b, unsigned c)
{
    return emulated_pair(fmaf(emulated_half_of(a, 0), emulated_half_of(b, 0), emulated_half_of(c, 0)),
                         fmaf(emulated_half_of(a, 1), emulated_half_of(b, 1), emulated_half_of(c, 1)));
}

static inline unsigned pair_add(unsigned a, unsigned b)
{
    return emulated_pair(emulated_half_of(a, 0) + emulated_half_of(b, 0),
                         emulated_half_of(a, 1) + emulated_half_of(b, 1));
}

static inline unsigned pair_low(unsigned a)
{
    return (a & 0xFFFF) | a << 16;
}

static inline unsigned pair_high(unsigned a)
{
    return a >> 16 | (a & 0xFFFF0000);
}

static inline unsigned and_or(unsigned a, unsigned b, unsigned c)
{
    return (a & b) | c;
}

// --- kernels/cuda/cuda_barrier.cuh ---

#define STRATA_CUDA_BARRIER_CUH

typedef unsigned long long barrier_t;

static inline unsigned shared_address(const void *pointer)
{
    return emulated_shared_address(pointer);
}

static inline void barrier_init(barrier_t *barrier, unsigned arrivals)
{
    emulated_barrier_init(barrier, arrivals);
}

static inline void barrier_publish()
{
}

static inline void barrier_expect(barrier_t *barrier, unsigned bytes)
{
    emulated_barrier_arrive(barrier, bytes);
}

static inline void barrier_arrive(barrier_t *barrier)
{
    emulated_barrier_arrive(barrier, 0);
}

static inline void barrier_await(barrier_t *barrier, unsigned parity)
{
    emulated_barrier_await(barrier, parity);
}

constexpr unsigned long long CACHE_FIRST_OUT = 0, CACHE_LAST_OUT = 1;

static inline void copy_bulk(void *to, const void *from, unsigned bytes, barrier_t *barrier,
                             unsigned long long policy)
{
    emulated_copy_bulk(to, from, bytes, barrier);
}

// --- kernels/cuda/cuda_wgmma.cuh ---
//
// A warp's share of a warpgroup's product needs nothing of the other warps, so it is made by the warp, at
// once.

#define STRATA_CUDA_WGMMA_CUH

enum wgmma_swizzle { WGMMA_SWIZZLE_128 = 1, WGMMA_SWIZZLE_64 = 2 };

struct emulated_wgmma {
    const unsigned *a;
    uint64_t b; // a descriptor, the bits of PTX's
    float (*sums)[4];
    int eights; // columns / 8
    bool fresh;
};

void emulated_wgmma_of_warp(void **lanes); // each a struct emulated_wgmma

static inline uint64_t wgmma_descriptor(uint32_t shared, uint32_t stride, enum wgmma_swizzle swizzle)
{
    return (uint64_t)(shared >> 4 & 0x3FFF) | (uint64_t)1 << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)swizzle << 62;
}

static inline void wgmma_fence()
{
}

static inline void wgmma_commit()
{
}

template <int PENDING> static inline void wgmma_wait()
{
}

template <int NT> static inline void wgmma_settled(float (*sums)[4])
{
}

template <int NT, bool FRESH> static inline void wgmma_halves(float (*sums)[4], const unsigned *a, uint64_t b)
{
    struct emulated_wgmma mine = {a, b, sums, NT, FRESH};
    emulated_meet_warp(&mine, emulated_wgmma_of_warp);
}

#endif

#endif
