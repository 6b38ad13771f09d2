// A GPU as a device: opening it, its description, its faults. Everything runs on one stream of its own, in
// the order of the calls. Called by the executor's thread, except that the thread that opens the device may
// be another: cuda_enter sees to it that CUDA's idea of the current GPU follows.
#include "common/config.h"
#include "kernels/cuda/cuda_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t count_devices(void)
{
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0 ? (uint32_t)count : 0;
}

static uint32_t best_level(uint32_t index)
{
    return index < count_devices() ? LEVEL_CUDA : 0;
}

void cuda_enter(const struct cuda_device *device)
{
    static _Thread_local int current = -1;
    if (current == device->index)
        return;
    cudaSetDevice(device->index);
    current = device->index;
}

// --- faults ---

void cuda_fault(struct cuda_device *device, int status, const char *sentence)
{
    if (device->fault.status)
        return;
    error_set(&device->fault, status, "%s", sentence);
    device->fault_mark = device->next_mark;
}

bool cuda_failed(struct cuda_device *device, cudaError_t code, const char *what)
{
    if (code == cudaSuccess)
        return false;
    cudaGetLastError(); // what is not sticky is reported once
    char sentence[300];
    snprintf(sentence, sizeof(sentence), "GPU %d failed (%s): %s", device->index, what,
             cudaGetErrorString(code));
    cuda_fault(device, code == cudaErrorMemoryAllocation ? STATUS_NO_MEMORY : STATUS_INTERNAL, sentence);
    return true;
}

static bool is_sound(cudaError_t code)
{
    return code == cudaSuccess || code == cudaErrorNotReady || code == cudaErrorMemoryAllocation;
}

// What is not sticky goes away by being looked at. The stream answers for the context, the memory for a GPU
// that is gone: an idle stream would not miss it.
static bool broken(const struct device *base)
{
    const struct cuda_device *device = (const struct cuda_device *)base;
    bool sound = false;
    cuda_enter(device);
    for (int look = 0; look < 2 && !sound; look++) {
        size_t left, all;
        sound = is_sound(cudaStreamQuery(device->stream)) && is_sound(cudaMemGetInfo(&left, &all));
        cudaGetLastError();
    }
    return !sound;
}

// --- open and close ---

static void close_device(struct device *base)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    cuda_load_close(device);
    if (device->stream)
        cudaStreamSynchronize(device->stream);
    cuda_forget(base);
    cuda_gemm_close(device);
    cuda_stamps_close(device);
    cuda_memory_close(device);
    if (device->stream)
        cudaStreamDestroy(device->stream);
    free(device);
}

static int check_index(const struct device_options *options, struct error *error)
{
    int count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess)
        return error_set(error, STATUS_UNSUPPORTED, "no GPU can be used here: %s", cudaGetErrorString(code));
    if (options->index >= (uint32_t)count)
        return error_set(error, STATUS_UNSUPPORTED, "there is no GPU %u: this machine has %d, from 0",
                         options->index, count);
    if (options->level && options->level != LEVEL_CUDA)
        return error_set(error, STATUS_INVALID, "level %u (%s) is not a level of the CUDA backend",
                         options->level, device_level_name(options->level));
    return STATUS_OK;
}

// Whether the GPU can be used, and by which path.
static int choose_path(struct cuda_device *device, const struct cudaDeviceProp *gpu, struct error *error)
{
    if (gpu->major < 8)
        return error_set(error, STATUS_UNSUPPORTED,
                         "GPU %d (%s) has compute capability %d.%d; 8.0 or newer is needed", device->index,
                         gpu->name, gpu->major, gpu->minor);
    int architecture = cuda_kernel_architecture();
    if (architecture == 0)
        return error_set(error, STATUS_UNSUPPORTED,
                         "GPU %d (%s) has compute capability %d.%d, for which this build has no kernels: "
                         "build with STRATA_CUDA_ARCH=%d%d-real",
                         device->index, gpu->name, gpu->major, gpu->minor, gpu->major, gpu->minor);
    device->general = gpu->major != 9 || architecture < 90 || config_switch("STRATA_CUDA_GENERAL");
    return STATUS_OK;
}

static int set_up(struct cuda_device *device, struct error *error)
{
    struct cudaDeviceProp properties;
    cuda_enter(device);
    cudaError_t code = cudaGetDeviceProperties(&properties, device->index);
    if (code == cudaSuccess)
        code = cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking);
    if (code != cudaSuccess)
        return error_set(error, STATUS_UNSUPPORTED, "GPU %d cannot be opened: %s", device->index,
                         cudaGetErrorString(code));
    int status = choose_path(device, &properties, error);
    if (status)
        return status;
    device->sms = properties.multiProcessorCount;
    device->shared_limit = properties.sharedMemPerBlockOptin;
    snprintf(device->description, sizeof(device->description), "cuda %d: %.100s, %.0f GB", device->index,
             properties.name, (double)properties.totalGlobalMem / 1e9);
    status = cuda_memory_open(device, error);
    if (!status)
        status = cuda_stamps_open(device, error);
    return status ? status : cuda_gemm_open(device, error);
}

static int open_device(struct device **out, const struct device_options *options, struct error *error)
{
    int status = check_index(options, error);
    if (status)
        return status;
    struct cuda_device *device = calloc(1, sizeof(*device));
    if (!device)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a CUDA device");
    device->base.backend = &cuda_backend;
    device->base.ops = &cuda_ops;
    device->index = (int)options->index;
    status = set_up(device, error);
    if (status) {
        close_device(&device->base);
        return status;
    }
    *out = &device->base;
    return STATUS_OK;
}

static uint32_t level_of(const struct device *device)
{
    return LEVEL_CUDA;
}

static const char *describe(const struct device *device)
{
    return ((const struct cuda_device *)device)->description;
}

static uint64_t memory_free(const struct device *device)
{
    size_t left = 0, all;
    cuda_enter((const struct cuda_device *)device);
    return cudaMemGetInfo(&left, &all) == cudaSuccess ? left : 0;
}

static void *stream(const struct device *device)
{
    return ((const struct cuda_device *)device)->stream;
}

const struct device_backend cuda_backend = {
    .name = "cuda",
    .open = open_device,
    .close = close_device,
    .level = level_of,
    .describe = describe,
    .memory_free = memory_free,
    .broken = broken,
    .best_level = best_level,
    .stream = stream,
    .count = count_devices,
};
