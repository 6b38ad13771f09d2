// Instructions that C++ has no word for: the tensor cores' product of halves, asynchronous copies into shared
// memory, 2^x, and arithmetic on pairs of halves. All exist from sm_80 on. Nothing but instructions is here,
// as in cuda_barrier.cuh and cuda_wgmma.cuh: tests/emulator has others in their place.
#ifndef STRATA_CUDA_MMA_CUH
#define STRATA_CUDA_MMA_CUH

#include <cuda_fp16.h>
#include <cuda_runtime.h>

// c += a b for a warp: a 16x16, b 16x8 halves, c 16x8 floats (m16n8k16). Lane 4 g + t holds
//   a0 = (row g, columns 2t, 2t+1), a1 = row g + 8, a2, a3 = the same at columns 2t+8, 2t+9;
//   b0 = (rows 2t, 2t+1, column g), b1 = rows 2t+8, 2t+9;
//   c = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma_halves(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                           uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 2^x: 2^-22 of itself wrong at most, 0 for -INFINITY, exactly 1 for 0.
__device__ __forceinline__ float power_of_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Starts copying 16 bytes to shared memory, or writing 16 zeros there when `live` is false.
__device__ __forceinline__ void copy_async16(void *shared, const void *global, bool live)
{
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(live ? 16 : 0)
        : "memory");
}

__device__ __forceinline__ void copy_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `PENDING` of this thread's last committed groups are under way.
template <int PENDING> __device__ __forceinline__ void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- pairs of halves held in words ---

__device__ __forceinline__ unsigned pair_multiply(unsigned a, unsigned b)
{
    unsigned c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

__device__ __forceinline__ unsigned pair_fma(unsigned a, unsigned b, unsigned c)
{
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ unsigned pair_add(unsigned a, unsigned b)
{
    unsigned c;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// Both halves as the low one, or the high one: no instruction of its own where a product takes it.
__device__ __forceinline__ unsigned pair_low(unsigned a)
{
    unsigned b;
    asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {low, low};}" : "=r"(b) : "r"(a));
    return b;
}

__device__ __forceinline__ unsigned pair_high(unsigned a)
{
    unsigned b;
    asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {high, high};}" : "=r"(b) : "r"(a));
    return b;
}

// (a & b) | c in one instruction.
__device__ __forceinline__ unsigned and_or(unsigned a, unsigned b, unsigned c)
{
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

#endif
