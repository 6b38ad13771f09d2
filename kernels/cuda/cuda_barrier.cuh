// Barriers in shared memory, and bulk copies that complete on them (sm_90): a thread starts a copy of any
// length, and whoever needs it waits for the barrier. Nothing but instructions: see cuda_mma.cuh.
#ifndef STRATA_CUDA_BARRIER_CUH
#define STRATA_CUDA_BARRIER_CUH

#include <cuda_runtime.h>

typedef unsigned long long barrier_t;

__device__ __forceinline__ unsigned shared_address(const void *pointer)
{
    return (unsigned)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void barrier_init(barrier_t *barrier, unsigned arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialized barriers known to the copy engine; then the block synchronizes before others use them.
__device__ __forceinline__ void barrier_publish()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(barrier_t *barrier, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(barrier_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_await(barrier_t *barrier, unsigned parity)
{
    asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\nbra again;\nover:\n}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// Weights are read once a step: first to leave the L2. Activations are read by every block: last to leave.
constexpr unsigned long long CACHE_FIRST_OUT = 0x12F0000000000000ull, CACHE_LAST_OUT = 0x14F0000000000000ull;

// `bytes` (a multiple of 16) to shared memory, counted by `barrier`, which must expect them.
__device__ __forceinline__ void copy_bulk(void *to, const void *from, unsigned bytes, barrier_t *barrier,
                                          unsigned long long policy)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
        "%2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

#endif
