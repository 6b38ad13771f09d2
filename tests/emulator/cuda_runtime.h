// What nvcc knows beyond C++: the keywords, vectors, built-in variables and functions that the kernels use,
// and how a kernel is launched, for g++. Stands where CUDA's header of this name does (emulator.h).
#ifndef STRATA_EMULATED_CUDA_RUNTIME_H
#define STRATA_EMULATED_CUDA_RUNTIME_H

#include <math.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tests/emulator/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A block is one thread's: what its threads share is that thread's own.
#define __shared__ thread_local

#define __expf(x) expf(x) // the C library has this name, too

#define threadIdx emulated_thread_index
#define blockIdx emulated_block_index
#define blockDim emulated_block_size
#define gridDim emulated_grid_size

// --- vectors ---

struct int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};

static inline int2 make_int2(int x, int y)
{
    return {x, y};
}

static inline uint2 make_uint2(unsigned x, unsigned y)
{
    return {x, y};
}

static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

static inline float2 make_float2(float x, float y)
{
    return {x, y};
}

static inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

// --- functions ---

template <typename A, typename B> static inline std::common_type_t<A, B> min(A a, B b)
{
    using Both = std::common_type_t<A, B>;
    return (Both)a < (Both)b ? (Both)a : (Both)b;
}

template <typename A, typename B> static inline std::common_type_t<A, B> max(A a, B b)
{
    using Both = std::common_type_t<A, B>;
    return (Both)a > (Both)b ? (Both)a : (Both)b;
}

static inline float __fmul_rn(float a, float b)
{
    return a * b; // -ffp-contract=off
}

static inline float __fadd_rn(float a, float b)
{
    return a + b;
}

static inline float __fdividef(float a, float b)
{
    return a / b;
}

static inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}

static inline float __fsub_rn(float a, float b)
{
    return a - b;
}

static inline unsigned long long __float2ull_rn(float x)
{
    return (unsigned long long)nearbyintf(x);
}

static inline float __uint_as_float(unsigned bits)
{
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}

static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector)
{
    unsigned long long bytes = (unsigned long long)high << 32 | low;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned nibble = selector >> 4 * i & 15, byte = (unsigned)(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8)
            byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * i;
    }
    return out;
}

template <typename Type> static inline Type atomicAdd(Type *at, std::common_type_t<Type> value)
{
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

template <typename Type> static inline Type atomicOr(Type *at, std::common_type_t<Type> value)
{
    return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}

template <typename Type> static inline Type atomicMax(Type *at, std::common_type_t<Type> value)
{
    Type old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < value &&
           !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        continue;
    return old;
}

static inline void __threadfence()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline size_t __cvta_generic_to_shared(const void *pointer)
{
    return emulated_shared_address(pointer);
}

// --- warps and blocks ---

static inline void __syncthreads()
{
    emulated_meet_block(false);
}

static inline int __syncthreads_or(int yes)
{
    return emulated_meet_block(yes != 0);
}

static inline void __syncwarp()
{
    emulated_meet_warp(NULL, [](void **) {});
}

template <typename Type> struct emulated_shuffle {
    Type value;
    int from;
    Type got;
};

// The value of another lane; zero of one that is not there any more. Masks are not looked at: kernels shuffle
// by whole warps.
template <typename Type> static inline Type __shfl_sync(unsigned mask, Type value, int lane)
{
    struct emulated_shuffle<Type> mine = {
        value, lane & 31,
        {
        }
    };
    emulated_meet_warp(&mine, [](void **theirs) {
        for (int to = 0; to < EMULATED_WARP; to++) {
            struct emulated_shuffle<Type> *one = (struct emulated_shuffle<Type> *)theirs[to];
            if (one && theirs[one->from])
                one->got = ((struct emulated_shuffle<Type> *)theirs[one->from])->value;
        }
    });
    return mine.got;
}

template <typename Type> static inline Type __shfl_xor_sync(unsigned mask, Type value, int bits)
{
    return __shfl_sync(mask, value, (int)threadIdx.x ^ bits);
}

template <typename Type> static inline Type __shfl_up_sync(unsigned mask, Type value, unsigned by)
{
    unsigned lane = threadIdx.x % EMULATED_WARP;
    return __shfl_sync(mask, value, (int)(lane >= by ? lane - by : lane));
}

struct emulated_ballot {
    bool yes;
    unsigned all;
};

static inline unsigned __ballot_sync(unsigned mask, bool yes)
{
    struct emulated_ballot mine = {yes, 0};
    emulated_meet_warp(&mine, [](void **theirs) {
        unsigned all = 0;
        for (int lane = 0; lane < EMULATED_WARP; lane++)
            all |= (unsigned)(theirs[lane] && ((struct emulated_ballot *)theirs[lane])->yes) << lane;
        for (int lane = 0; lane < EMULATED_WARP; lane++) {
            if (theirs[lane])
                ((struct emulated_ballot *)theirs[lane])->all = all;
        }
    });
    return mine.all;
}

static inline int __any_sync(unsigned mask, bool yes)
{
    return __ballot_sync(mask, yes) != 0;
}

// --- launching ---

struct dim3 {
    unsigned x, y, z;

    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

enum cudaLaunchAttributeID {
    cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

struct cudaLaunchAttribute {
    enum cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
        struct uint3 clusterDim;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    struct cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

static inline unsigned emulated_cluster_of(const cudaLaunchConfig_t *config)
{
    unsigned cluster = 0;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
            cluster = config->attrs[i].val.clusterDim.x;
    }
    return cluster;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments &&...arguments)
{
    std::tuple<std::decay_t<Parameters>...> kept(std::forward<Arguments>(arguments)...);
    struct emulated_launch launch = {};
    launch.grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
    launch.block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
    launch.cluster = emulated_cluster_of(config);
    launch.attributes = config->numAttrs;
    launch.shared = config->dynamicSmemBytes;
    launch.kernel = [kernel, kept] { std::apply(kernel, kept); };
    return emulated_queue_launch(config->stream, (const void *)kernel, std::move(launch));
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, Kernel *kernel, const cudaLaunchConfig_t *config)
{
    unsigned cluster = emulated_cluster_of(config);
    *clusters = emulated_multiprocessors() / (int)(cluster ? cluster : 1);
    return cudaSuccess;
}

#endif
