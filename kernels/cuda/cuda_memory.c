// Memory of a GPU, and how bytes get there and back without anybody waiting.
//
// Uploads pass through a ring of pinned memory: the caller's bytes are copied into it, and the copy engine
// takes them from there when the stream gets to it. The ring is cut into segments; entering one waits until
// the copies that last used it are done, which in a step never happens (a step uploads some kilobytes, the
// ring holds 96 MB), and while weights are loaded (cuda_load.c, which fills whole segments) is what keeps the
// readers less than a ring ahead of the device. Called by the executor's thread, which owns everything here.
#include "kernels/cuda/cuda_internal.h"

#include <stdlib.h>
#include <string.h>

enum {
    ALIGNMENT = 256,      // of an upload in the ring
    GRANULE = 2 << 20,    // device memory is given out in pieces of so much,
    SMALL_PIECE = 1 << 20 // and small ones share such a piece
};

struct cuda_staging {
    uint8_t *memory; // pinned [CUDA_SEGMENTS][CUDA_SEGMENT_BYTES]
    cudaEvent_t done[CUDA_SEGMENTS];
    uint32_t segment; // the last one entered
    bool filling;     // uploads go to it, `used` bytes so far
    size_t used;
};

static size_t rounded(size_t bytes, size_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

int cuda_memory_open(struct cuda_device *device, struct error *error)
{
    struct cuda_staging *staging = calloc(1, sizeof(*staging));
    if (!staging)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a CUDA device");
    device->staging = staging;
    cudaError_t code = cudaMallocHost((void **)&staging->memory, (size_t)CUDA_SEGMENTS * CUDA_SEGMENT_BYTES);
    for (int i = 0; i < CUDA_SEGMENTS && code == cudaSuccess; i++)
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
    for (int i = 0; staging && i < CUDA_SEGMENTS; i++) {
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
    cuda_load_drain(device);
    cuda_failed(device, cudaStreamSynchronize(device->stream), "finishing before memory is freed");
    cuda_failed(device, cudaFree(memory), "freeing memory");
}

size_t cuda_alloc_bytes(const struct device *device, size_t bytes)
{
    return bytes <= SMALL_PIECE ? rounded(bytes, 512) : rounded(bytes, GRANULE);
}

// --- scratch ---

static void drop_scratch(struct cuda_device *device)
{
    cuda_enter(device);
    cuda_load_drain(device);
    cuda_forget(&device->base); // programs hold the old address
    cuda_failed(device, cudaStreamSynchronize(device->stream), "changing scratch memory");
    cudaFree(device->scratch);
    device->scratch = NULL;
    device->scratch_bytes = 0;
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
    drop_scratch(device);
    bytes = rounded(bytes, GRANULE);
    if (cuda_failed(device, cudaMalloc(&device->scratch, bytes), "growing scratch memory"))
        return NULL;
    device->scratch_bytes = bytes;
    return device->scratch;
}

// Ops take it in turns: the most that any of them needs.
size_t cuda_scratch_bytes(const struct device *device, const struct scratch_shape *shape)
{
    size_t attention =
        cuda_attention_scratch_bytes(shape->n_heads, shape->head_size, shape->generated, shape->pages);
    size_t group = shape->rows ? cuda_pack_group(shape->type, shape->rows, shape->width) : 0;
    size_t packing = group * tensor_type_bytes(shape->type, shape->width, 1);
    size_t product =
        shape->reads_prompts ? (size_t)shape->rows * cuda_padded_width(shape->width) * sizeof(uint16_t) : 0;
    size_t most = attention > packing ? attention : packing;
    return rounded(most > product ? most : product, GRANULE);
}

int cuda_reserve(struct device *base, size_t bytes, struct error *error)
{
    struct cuda_device *device = cuda_device_of(base);
    if (bytes == 0) {
        if (device->scratch)
            drop_scratch(device);
        return STATUS_OK;
    }
    return cuda_scratch(device, bytes) ? STATUS_OK : cuda_sync(base, error);
}

// --- to the device ---

// Uploads go elsewhere from now on.
static void leave_segment(struct cuda_device *device)
{
    struct cuda_staging *staging = device->staging;
    if (staging->filling)
        cuda_segment_used(device, staging->segment);
    staging->filling = false;
}

void cuda_segment_used(struct cuda_device *device, uint32_t segment)
{
    cuda_failed(device, cudaEventRecord(device->staging->done[segment], device->stream), "staging an upload");
}

uint8_t *cuda_segment_take(struct cuda_device *device, uint32_t *segment)
{
    struct cuda_staging *staging = device->staging;
    leave_segment(device);
    staging->segment = (staging->segment + 1) % CUDA_SEGMENTS;
    *segment = staging->segment;
    cuda_load_leave_segment(device, *segment);
    if (cuda_failed(device, cudaEventSynchronize(staging->done[*segment]), "staging an upload"))
        return NULL;
    return staging->memory + (size_t)*segment * CUDA_SEGMENT_BYTES;
}

// Room for `bytes` (at most a segment) in the ring; NULL after a fault.
static uint8_t *stage(struct cuda_device *device, size_t bytes)
{
    struct cuda_staging *staging = device->staging;
    if (!staging->filling || staging->used + bytes > CUDA_SEGMENT_BYTES) {
        uint32_t segment;
        if (!cuda_segment_take(device, &segment))
            return NULL;
        staging->filling = true;
        staging->used = 0;
    }
    uint8_t *room = staging->memory + (size_t)staging->segment * CUDA_SEGMENT_BYTES + staging->used;
    staging->used += rounded(bytes, ALIGNMENT);
    return room;
}

void cuda_upload(struct device *base, void *to, const void *from, size_t bytes)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    for (size_t done = 0; done < bytes;) {
        size_t piece = bytes - done < CUDA_SEGMENT_BYTES ? bytes - done : CUDA_SEGMENT_BYTES;
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
    cuda_load_drain(device);
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
    bool spared = device->fault.status && mark < device->fault_mark; // a later step's failure is that step's
    cudaError_t code =
        device->fault.status && !spared ? cudaSuccess : cudaEventQuery(device->marks[mark % CUDA_MARKS]);
    if (code == cudaErrorNotReady)
        return 0;
    if (spared && code == cudaSuccess)
        return 1;
    cuda_failed(device, code, "computing");
    int status = report(device, error);
    return status ? status : 1;
}
