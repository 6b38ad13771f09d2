// Memory of a GPU, and how bytes get there and back without anybody waiting.
//
// Uploads pass through a ring of pinned memory: the caller's bytes are copied into it, and the copy engine
// takes them from there when the stream gets to it. The ring is cut into segments; entering one waits until
// the copies that last used it are done, which in a step never happens (a step uploads some kilobytes, the
// ring holds 64 MB), and while weights are loaded is what keeps the reader a few segments ahead of the
// device. Called by the executor's thread, which owns everything here.
#include "kernels/cuda/cuda_internal.h"

#include <stdlib.h>
#include <string.h>

enum { SEGMENTS = 8, SEGMENT_BYTES = 8 << 20, ALIGNMENT = 256 };

struct cuda_staging {
    uint8_t *memory; // pinned [SEGMENTS][SEGMENT_BYTES]
    cudaEvent_t done[SEGMENTS];
    uint32_t segment; // being filled
    size_t used;      // of it
};

int cuda_memory_open(struct cuda_device *device, struct error *error)
{
    struct cuda_staging *staging = calloc(1, sizeof(*staging));
    if (!staging)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a CUDA device");
    device->staging = staging;
    cudaError_t code = cudaMallocHost((void **)&staging->memory, (size_t)SEGMENTS * SEGMENT_BYTES);
    for (int i = 0; i < SEGMENTS && code == cudaSuccess; i++)
        code = cudaEventCreateWithFlags(&staging->done[i], cudaEventDisableTiming);
    for (int i = 0; i < CUDA_MARKS && code == cudaSuccess; i++)
        code = cudaEventCreateWithFlags(&device->marks[i], cudaEventDisableTiming);
    if (code == cudaSuccess)
        code = cudaMalloc((void **)&device->tickets, CUDA_TICKETS * sizeof(unsigned));
    if (code == cudaSuccess)
        code = cudaMemsetAsync(device->tickets, 0, CUDA_TICKETS * sizeof(unsigned), device->stream);
    if (code != cudaSuccess)
        return error_set(error, STATUS_NO_MEMORY, "GPU %d has no room for a worker: %s", device->index,
                         cudaGetErrorString(code));
    return STATUS_OK;
}

void cuda_memory_close(struct cuda_device *device)
{
    struct cuda_staging *staging = device->staging;
    for (int i = 0; i < CUDA_MARKS; i++) {
        if (device->marks[i])
            cudaEventDestroy(device->marks[i]);
    }
    for (int i = 0; staging && i < SEGMENTS; i++) {
        if (staging->done[i])
            cudaEventDestroy(staging->done[i]);
    }
    if (staging && staging->memory)
        cudaFreeHost(staging->memory);
    free(staging);
    cudaFree(device->tickets);
    cudaFree(device->scratch);
}

// --- device memory ---

void *cuda_alloc(struct device *base, size_t bytes)
{
    struct cuda_device *device = cuda_device_of(base);
    void *memory = NULL;
    cuda_enter(device);
    if (cudaMalloc(&memory, bytes ? bytes : 1) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    cuda_failed(device, cudaMemsetAsync(memory, 0, bytes, device->stream), "clearing memory");
    return memory;
}

void cuda_free(struct device *base, void *memory)
{
    struct cuda_device *device = cuda_device_of(base);
    if (!memory)
        return;
    cuda_enter(device);
    cuda_failed(device, cudaStreamSynchronize(device->stream), "finishing before memory is freed");
    cuda_failed(device, cudaFree(memory), "freeing memory");
}

void *cuda_scratch(struct cuda_device *device, size_t bytes)
{
    if (bytes <= device->scratch_bytes)
        return device->scratch;
    if (device->is_recording) {
        cuda_fault(device, STATUS_INTERNAL,
                   "a recorded operation needs more scratch memory than was planned");
        return NULL;
    }
    cuda_enter(device);
    cuda_forget(&device->base); // programs hold the old address
    cuda_failed(device, cudaStreamSynchronize(device->stream), "growing scratch memory");
    cudaFree(device->scratch);
    device->scratch = NULL;
    device->scratch_bytes = 0;
    bytes = (bytes + (2 << 20) - 1) / (2 << 20) * (2 << 20);
    if (cuda_failed(device, cudaMalloc(&device->scratch, bytes), "growing scratch memory"))
        return NULL;
    device->scratch_bytes = bytes;
    return device->scratch;
}

// --- to the device ---

// Room for `bytes` (at most a segment) in the ring; NULL after a fault.
static uint8_t *stage(struct cuda_device *device, size_t bytes)
{
    struct cuda_staging *staging = device->staging;
    if (staging->used + bytes > SEGMENT_BYTES) {
        if (cuda_failed(device, cudaEventRecord(staging->done[staging->segment], device->stream),
                        "staging an upload"))
            return NULL;
        staging->segment = (staging->segment + 1) % SEGMENTS;
        staging->used = 0;
        if (cuda_failed(device, cudaEventSynchronize(staging->done[staging->segment]), "staging an upload"))
            return NULL;
    }
    uint8_t *room = staging->memory + (size_t)staging->segment * SEGMENT_BYTES + staging->used;
    staging->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return room;
}

void cuda_upload(struct device *base, void *to, const void *from, size_t bytes)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    for (size_t done = 0; done < bytes;) {
        size_t piece = bytes - done < SEGMENT_BYTES ? bytes - done : SEGMENT_BYTES;
        uint8_t *room = stage(device, piece);
        if (!room)
            return;
        memcpy(room, (const uint8_t *)from + done, piece);
        if (cuda_failed(
                device,
                cudaMemcpyAsync((uint8_t *)to + done, room, piece, cudaMemcpyHostToDevice, device->stream),
                "uploading"))
            return;
        done += piece;
    }
}

void cuda_copy(struct device *base, void *to, const void *from, size_t bytes)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    cuda_failed(device, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, device->stream),
                "copying");
}

// --- and back ---

void cuda_download(struct device *base, void *to, const void *from, size_t bytes)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    if (!cuda_failed(device, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, device->stream),
                     "downloading"))
        cuda_failed(device, cudaStreamSynchronize(device->stream), "downloading");
}

static int report(struct cuda_device *device, struct error *error)
{
    int status = device->fault.status;
    if (status) {
        error_set(error, status, "%s", device->fault.text);
        memset(&device->fault, 0, sizeof(device->fault));
    }
    return status;
}

int cuda_sync(struct device *base, struct error *error)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    cuda_failed(device, cudaStreamSynchronize(device->stream), "computing");
    return report(device, error);
}

void *cuda_alloc_host(struct device *base, size_t bytes)
{
    void *memory = NULL;
    cuda_enter(cuda_device_of(base));
    if (cudaMallocHost(&memory, bytes ? bytes : 1) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    memset(memory, 0, bytes);
    return memory;
}

void cuda_free_host(struct device *base, void *memory)
{
    struct cuda_device *device = cuda_device_of(base);
    if (!memory)
        return;
    cuda_enter(device);
    cuda_failed(device, cudaStreamSynchronize(device->stream), "finishing before memory is freed");
    cudaFreeHost(memory);
}

void cuda_fetch(struct device *base, void *to, const void *from, size_t bytes)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    cuda_failed(device, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, device->stream), "fetching");
}

uint64_t cuda_mark(struct device *base)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    cuda_failed(device, cudaEventRecord(device->marks[device->next_mark % CUDA_MARKS], device->stream),
                "marking");
    return device->next_mark++;
}

int cuda_reached(struct device *base, uint64_t mark, struct error *error)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    cudaError_t code = device->fault.status ? cudaSuccess : cudaEventQuery(device->marks[mark % CUDA_MARKS]);
    if (code == cudaErrorNotReady)
        return 0;
    cuda_failed(device, code, "computing");
    int status = report(device, error);
    return status ? status : 1;
}
