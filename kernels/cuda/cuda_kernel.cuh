// What kernels share: how they are launched, how they wait for one another, and the layout of activations.
//
// Compute capability. Kernels are compiled for 9.0 and for 8.0, from which newer GPUs take theirs: the
// general path. What exists on 9.0 alone stands between `#if CUDA_FOR_90`, and the host launches it where
// !device->general.
//
// Programmatic dependent launch: a kernel may start before its predecessor in the stream has ended. So every
// kernel launched with cuda_launch calls cuda_wait() in all threads before it touches memory that any earlier
// kernel reads or writes, and may call cuda_release() as soon as its successor's early part would do no harm.
// Before the wait it may read what no kernel writes while steps run: weights, and the batch's positions,
// slots, page tables and spans, which are uploaded before the step's first kernel.
//
// Activations. Rows are kept as halves of x / unit, K padded to whole blocks of 256 with zeros (the buffer is
// zero when allocated; what steps of another number of rows leave in the padding is finite, and meets weights
// of zero). Rows of generated tokens lie in groups of 64, inside a group by K block, 576 bytes a row: 256
// halves, and the sums of 16 halves each, over 64 and as two halves (high part, rest), for the minimums of
// quantized types. Rows of prompts lie after all groups, plainly: [row][padded width].
//
// With up to CUDA_FEW_ROWS generated rows a K block has one record of 576 bytes a row: the halves in order,
// then the sums in the order in which a lane's tensor-core fragment reads them: for t in 0..3 the high parts
// of sums 2t, 2t+1, 2t+8, 2t+9, then their rests. (576 is 64 modulo 128: eight lanes that read 16 bytes of
// two neighbouring rows hit all banks once.)
//
// With more, a K block lies as the tensor cores read it from shared memory (cuda_wgmma.cuh): first the
// halves, [eight rows][64 of K][row][128 bytes], units of 16 bytes swapped by the row's number (unit u at u ^
// row); then the sums, [eight rows][row][64 bytes: high parts, rests], unit u at u ^ row / 2. Of each 32 of
// K, eight have one lane t, as with packed weights (cuda_record.cuh): its elements 2p and 2p + 1 are pair t
// of unit p.
#ifndef STRATA_CUDA_KERNEL_CUH
#define STRATA_CUDA_KERNEL_CUH

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_internal.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CUDA_FOR_90 1
#else
#define CUDA_FOR_90 0
#endif

// --- launching ---

__device__ __forceinline__ void cuda_wait()
{
#if defined(__CUDA_ARCH__) && CUDA_FOR_90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void cuda_release()
{
#if defined(__CUDA_ARCH__) && CUDA_FOR_90
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A launch on the device's stream that may start before its predecessor has ended, of clusters of `cluster`
// blocks along x (0: none); on the general path it waits, and there are no clusters. `attributes` must live
// as long as the result.
enum { CUDA_LAUNCH_ATTRIBUTES = 2 };

static inline cudaLaunchConfig_t cuda_launch_config(const struct cuda_device *device, dim3 grid, dim3 block,
                                                    size_t shared, uint32_t cluster,
                                                    cudaLaunchAttribute *attributes)
{
    cudaLaunchConfig_t config = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = device->stream;
    config.attrs = attributes;
    config.numAttrs = device->general ? 0 : cluster > 0 ? 2 : 1;
    return config;
}

// Queues kernel<<<grid, block, shared>>>(arguments) on the device's stream, in clusters; a failure becomes
// its fault.
template <typename... Parameters, typename... Arguments>
void cuda_launch_clusters(struct cuda_device *device, const char *name, void (*kernel)(Parameters...),
                          dim3 grid, dim3 block, size_t shared, uint32_t cluster, Arguments... arguments)
{
    cudaLaunchAttribute attributes[CUDA_LAUNCH_ATTRIBUTES] = {};
    cudaLaunchConfig_t config = cuda_launch_config(device, grid, block, shared, cluster, attributes);
    cuda_failed(device, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

// The same without.
template <typename... Parameters, typename... Arguments>
void cuda_launch(struct cuda_device *device, const char *name, void (*kernel)(Parameters...), dim3 grid,
                 dim3 block, size_t shared, Arguments... arguments)
{
    cuda_launch_clusters(device, name, kernel, grid, block, shared, 0, arguments...);
}

// Lets a kernel have `shared` bytes of dynamic shared memory; once for each device and instance, whose
// `allowed` this is. False: the device has not so much, and the fault says so.
template <typename Kernel>
bool cuda_allow_shared(struct cuda_device *device, const char *name, Kernel *kernel, size_t shared,
                       uint64_t *allowed)
{
    uint64_t bit = (uint64_t)1 << (device->index % 64);
    if (__atomic_load_n(allowed, __ATOMIC_RELAXED) & bit)
        return true;
    if (cuda_failed(device,
                    cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)shared),
                    name))
        return false;
    __atomic_fetch_or(allowed, bit, __ATOMIC_RELAXED);
    return true;
}

// --- activations ---

struct activation_view {
    unsigned char *groups; // rows [0, n_generated)
    __half *rows;          // rows [n_generated, ...)
    uint32_t k_blocks;     // padded width / 256
    uint32_t n_generated;
    bool many;      // generated rows: more than CUDA_FEW_ROWS
    float per_unit; // 1 / unit
};

static inline size_t activation_group_bytes(uint32_t width)
{
    return (size_t)cuda_padded_width(width) / CUDA_K_BLOCK * CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES;
}

static inline size_t activation_groups(uint32_t rows)
{
    return (rows + CUDA_GROUP_ROWS - 1) / CUDA_GROUP_ROWS;
}

static inline struct activation_view activation_view_of(const struct activation *activation)
{
    struct activation_view view;
    view.groups = (unsigned char *)activation->data;
    view.rows = (__half *)(view.groups +
                           activation_groups(activation->rows) * activation_group_bytes(activation->width));
    view.k_blocks = cuda_padded_width(activation->width) / CUDA_K_BLOCK;
    view.n_generated = activation->n_generated;
    view.many = activation->n_generated > CUDA_FEW_ROWS;
    view.per_unit = activation->unit == 0 ? 1.0f : 1.0f / activation->unit;
    return view;
}

// The K block of a group of generated rows.
__device__ __forceinline__ unsigned char *activation_block(const struct activation_view &view, uint32_t row,
                                                           uint32_t k_block)
{
    return view.groups +
           ((size_t)row / CUDA_GROUP_ROWS * view.k_blocks + k_block) * CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES;
}

__device__ __forceinline__ unsigned char *activation_record(const struct activation_view &view, uint32_t row,
                                                            uint32_t k_block)
{
    return activation_block(view, row, k_block) + row % CUDA_GROUP_ROWS * CUDA_BLOCK_BYTES;
}

// Stores sum s (of the rounded halves 16 s to 16 s + 15) of a record.
__device__ __forceinline__ void activation_store_sum(unsigned char *record, uint32_t s, float sum)
{
    __half *at = (__half *)(record + 2 * CUDA_K_BLOCK) + (s & 7) / 2 * 8 + (s & 8) / 4 + (s & 1);
    float scaled = sum / 64;
    __half high = __float2half_rn(scaled);
    at[0] = high;
    at[4] = __float2half_rn(scaled - __half2float(high));
}

// The same in a block of many rows.
__device__ __forceinline__ void activation_store_sum_of_many(unsigned char *block, uint32_t row, uint32_t s,
                                                             float sum)
{
    uint32_t r = row % 8;
    unsigned char *at = block + CUDA_GROUP_ROWS * 2 * CUDA_K_BLOCK + row % CUDA_GROUP_ROWS * 64 + s % 8 * 2;
    float scaled = sum / 64;
    __half high = __float2half_rn(scaled);
    *(__half *)(at + (s / 8 ^ r / 2) * 16) = high;
    *(__half *)(at + ((2 + s / 8) ^ r / 2) * 16) = __float2half_rn(scaled - __half2float(high));
}

// Stores the eight halves from element k (a multiple of 8) of a K block of many rows.
__device__ __forceinline__ void activation_store_of_many(unsigned char *block, uint32_t row, uint32_t k,
                                                         uint4 halves)
{
    uint32_t in_group = row % CUDA_GROUP_ROWS, r = in_group % 8, unit = k % 64 / 32 * 4;
    unsigned char *at =
        block + in_group / 8 * (8 * 2 * CUDA_K_BLOCK) + k / 64 * 1024 + r * 128 + k % 32 / 8 * 4;
    *(unsigned *)(at + (unit ^ r) * 16) = halves.x;
    *(unsigned *)(at + ((unit + 1) ^ r) * 16) = halves.y;
    *(unsigned *)(at + ((unit + 2) ^ r) * 16) = halves.z;
    *(unsigned *)(at + ((unit + 3) ^ r) * 16) = halves.w;
}

// x / unit as the half that is stored; what is too large stays finite.
__device__ __forceinline__ __half activation_half(const struct activation_view &view, float x)
{
    return __float2half_rn(fminf(fmaxf(x * view.per_unit, -65504.0f), 65504.0f));
}

// Sums of 16 have one order, the butterfly's: neighbours, pairs, fours, eights.
__device__ __forceinline__ float activation_sum8(const float *x)
{
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// x[k, k + 8) as halves, and the sum of the 16 that a pair of lanes (2i and 2i + 1) holds. Whole warps.
__device__ __forceinline__ uint4 activation_round8(const struct activation_view &view, const float *x,
                                                   float *sum)
{
    __half2 pairs[4];
    float rounded[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pairs[i] = __halves2half2(activation_half(view, x[2 * i]), activation_half(view, x[2 * i + 1]));
        float2 two = __half22float2(pairs[i]);
        rounded[2 * i] = two.x;
        rounded[2 * i + 1] = two.y;
    }
    *sum = activation_sum8(rounded);
    *sum += __shfl_xor_sync(~0u, *sum, 1);
    return *(uint4 *)pairs;
}

// Stores x[k, k + 8) of a row, k a multiple of 8. Called by whole warps whose lanes 2i and 2i + 1 hold the
// two halves of the same 16 elements (of any row; `live` false: nothing is stored).
__device__ __forceinline__ void activation_store8(const struct activation_view &view, uint32_t row,
                                                  uint32_t k, const float *x, bool live)
{
    float sum;
    uint4 halves = activation_round8(view, x, &sum);
    if (!live)
        return;
    uint32_t inside = k % CUDA_K_BLOCK;
    if (row >= view.n_generated) {
        *(uint4 *)(view.rows + (size_t)(row - view.n_generated) * view.k_blocks * CUDA_K_BLOCK + k) = halves;
    } else if (view.many) {
        unsigned char *block = activation_block(view, row, k / CUDA_K_BLOCK);
        activation_store_of_many(block, row, inside, halves);
        if (k % 16 == 0)
            activation_store_sum_of_many(block, row, inside / 16, sum);
    } else {
        unsigned char *record = activation_record(view, row, k / CUDA_K_BLOCK);
        *(uint4 *)(record + inside * 2) = halves;
        if (k % 16 == 0)
            activation_store_sum(record, inside / 16, sum);
    }
}

// Stores x, element k of one of few rows of generated tokens. Called by whole warps whose 16 lanes from a
// multiple of 16 on hold 16 neighbouring elements.
__device__ __forceinline__ void activation_store1(const struct activation_view &view, uint32_t row,
                                                  uint32_t k, float x, bool live)
{
    __half rounded = activation_half(view, x);
    float sum = __half2float(rounded);
#pragma unroll
    for (int offset = 1; offset < 16; offset *= 2)
        sum += __shfl_xor_sync(~0u, sum, offset);
    if (!live)
        return;
    unsigned char *record = activation_record(view, row, k / CUDA_K_BLOCK);
    ((__half *)record)[k % CUDA_K_BLOCK] = rounded;
    if (k % 16 == 0)
        activation_store_sum(record, k % CUDA_K_BLOCK / 16, sum);
}

#endif
