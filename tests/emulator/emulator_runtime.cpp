// The runtime's side of the emulator: memory, streams, events and graphs (cuda_runtime_api.h), and what a
// launch must keep to.
#include <map>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <vector>

#include "tests/emulator/emulator.h"

static const size_t MEMORY = (size_t)8 << 30, ALIGNMENT = 256, POISONED = 64 << 20, UNASKED_SHARED = 48 << 10;
static const size_t GENERAL_SHARED = 99 << 10;

struct emulated_stream {
    bool recording;
    std::vector<std::function<void()>> recorded;
};

struct emulated_graph {
    std::vector<std::function<void()>> works;
};

struct emulated_event {
    bool recorded;
    double us;
};

static std::mutex lock;                                         // of what follows
static std::map<void *, std::pair<void *, size_t>> allocations; // memory -> mapping and its length
static size_t allocated;
static std::map<const void *, size_t> allowed_shared;

// --- the device ---

int emulated_multiprocessors()
{
    const char *wish = getenv("STRATA_EMULATED_SMS");
    int count = wish ? atoi(wish) : 0;
    return count > 0 ? count : 132;
}

bool emulated_is_general()
{
    static const bool is_general = getenv("STRATA_EMULATED_GENERAL") != NULL;
    return is_general;
}

static size_t most_shared()
{
    return emulated_is_general() ? GENERAL_SHARED : (size_t)EMULATED_SHARED;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = __builtin_cpu_supports("avx2") ? 1 : 0; // emulator.cmake compiles for it
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device)
{
    *properties = {};
    snprintf(properties->name, sizeof(properties->name), "emulated");
    properties->totalGlobalMem = MEMORY;
    properties->sharedMemPerBlockOptin = most_shared();
    properties->major = emulated_is_general() ? 8 : 9;
    properties->minor = emulated_is_general() ? 6 : 0;
    properties->multiProcessorCount = emulated_multiprocessors();
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t code)
{
    switch (code) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    default:
        return "invalid argument";
    }
}

// --- memory ---

static size_t page_size()
{
    static const size_t size = (size_t)sysconf(_SC_PAGESIZE);
    return size;
}

cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    size_t page = page_size(), held = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t length = (held + page - 1) / page * page;
    std::lock_guard<std::mutex> locked(lock);
    *memory = NULL;
    if (bytes == 0 || bytes > MEMORY - allocated)
        return bytes ? cudaErrorMemoryAllocation : cudaErrorInvalidValue;
    void *mapping =
        mmap(NULL, length + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return cudaErrorMemoryAllocation;
    mprotect((char *)mapping + length, page, PROT_NONE);
    *memory = (char *)mapping + length - held;
    if (held <= POISONED)
        memset(*memory, 0xFF, held);
    allocations[*memory] = {mapping, length + page};
    allocated += length;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory)
{
    std::lock_guard<std::mutex> locked(lock);
    if (!memory)
        return cudaSuccess;
    auto found = allocations.find(memory);
    if (found == allocations.end())
        return cudaErrorInvalidValue;
    munmap(found->second.first, found->second.second);
    allocated -= found->second.second - page_size();
    allocations.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **memory, size_t bytes)
{
    *memory = aligned_alloc(page_size(), (bytes + page_size() - 1) / page_size() * page_size());
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory)
{
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *all)
{
    std::lock_guard<std::mutex> locked(lock);
    *left = MEMORY - allocated;
    *all = MEMORY;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind,
                            cudaStream_t stream)
{
    return emulated_queue(stream, [=] { memmove(to, from, bytes); });
}

// Zeros of whole pages cost nothing until they are looked at.
static void set_memory(void *memory, int value, size_t bytes)
{
    uintptr_t page = page_size(), first = ((uintptr_t)memory + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)memory + bytes) / page * page;
    if (value != 0 || bytes < POISONED) {
        memset(memory, value, bytes);
        return;
    }
    memset(memory, 0, first - (uintptr_t)memory);
    madvise((void *)first, end - first, MADV_DONTNEED);
    memset((void *)end, 0, (uintptr_t)memory + bytes - end);
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream)
{
    return emulated_queue(stream, [=] { set_memory(memory, value, bytes); });
}

// --- streams and graphs ---

cudaError_t emulated_queue(cudaStream_t stream, std::function<void()> work)
{
    if (stream && stream->recording)
        stream->recorded.push_back(std::move(work));
    else
        work();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned)
{
    *stream = new emulated_stream();
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    return stream && stream->recording ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return cudaStreamSynchronize(stream);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode)
{
    if (stream->recording)
        return cudaErrorInvalidValue;
    stream->recording = true;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    *graph = NULL;
    if (!stream->recording)
        return cudaErrorInvalidValue;
    *graph = new emulated_graph{std::move(stream->recorded)};
    stream->recorded.clear();
    stream->recording = false;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *program, cudaGraph_t graph, unsigned long long)
{
    *program = new emulated_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t program, cudaStream_t stream)
{
    for (const std::function<void()> &work : program->works)
        emulated_queue(stream, work);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t program)
{
    delete program;
    return cudaSuccess;
}

// --- events ---

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    *event = new emulated_event();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    return cudaEventCreate(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    return emulated_queue(stream, [=] {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        event->recorded = true;
        event->us = (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
    });
}

cudaError_t cudaEventQuery(cudaEvent_t)
{
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t)
{
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end)
{
    if (!begin->recorded || !end->recorded)
        return cudaErrorInvalidValue;
    *ms = (float)((end->us - begin->us) / 1e3);
    return cudaSuccess;
}

// --- kernels ---

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute, int value)
{
    std::lock_guard<std::mutex> locked(lock);
    if (value < 0 || (size_t)value > most_shared())
        return cudaErrorInvalidValue;
    allowed_shared[kernel] = (size_t)value;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *)
{
    attributes->ptxVersion = emulated_is_general() ? 80 : 90;
    attributes->binaryVersion = emulated_is_general() ? 86 : 90;
    return cudaSuccess;
}

static bool is_sound(const void *kernel, const struct emulated_launch &launch)
{
    std::lock_guard<std::mutex> locked(lock);
    auto found = allowed_shared.find(kernel);
    size_t most = found == allowed_shared.end() ? UNASKED_SHARED : found->second;
    const struct uint3 &grid = launch.grid, &block = launch.block;
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    return launch.shared <= (most > UNASKED_SHARED ? most : UNASKED_SHARED) && threads >= 1 &&
           threads <= 1024 && grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.y < 65536 && grid.z < 65536 &&
           !(emulated_is_general() && launch.attributes) && launch.cluster <= EMULATED_CLUSTER &&
           (launch.cluster <= 1 || grid.x % launch.cluster == 0);
}

cudaError_t emulated_queue_launch(cudaStream_t stream, const void *kernel, struct emulated_launch launch)
{
    if (!is_sound(kernel, launch))
        return cudaErrorInvalidConfiguration;
    return emulated_queue(stream, [launch = std::move(launch)] { emulated_run(launch); });
}
