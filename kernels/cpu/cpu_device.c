// The CPU as a device: which instruction-set level it runs at, its memory, its threads' scratch.
//
// Memory is the process's own. Large blocks (weights, KV) are mapped in huge pages, because a decode step
// reads every weight once and would otherwise spend its time on page-table walks; how much is left is what
// the machine and the control group both allow.
//
// Called from the executor's thread; the compute threads live in cpu_pool.c.
#include "kernels/cpu/cpu_internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "common/clock.h"

// --- levels ---

static uint32_t best_level(uint32_t index)
{
#if defined(__x86_64__)
    // The compiler's test also asks the operating system (xgetbv) whether it saves the wide registers. Clang
    // 14 does not know F16C by name; it uses the same registers as AVX2.
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vnni");
    return avx2 && avx512 ? LEVEL_AVX512 : avx2 ? LEVEL_AVX2 : LEVEL_PORTABLE;
#else
    return LEVEL_PORTABLE;
#endif
}

static uint32_t all_cores(void)
{
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof(cores), &cores))
        return 1;
    int count = CPU_COUNT(&cores);
    return count < 1 ? 1 : count > CPU_MAX_THREADS ? CPU_MAX_THREADS : (uint32_t)count;
}

// --- open and close ---

static void close_device(struct device *device)
{
    struct cpu_device *cpu = cpu_device_of(device);
    cpu_pool_close(cpu->pool);
    for (uint32_t i = 0; i < cpu->threads; i++)
        free(cpu->scratch[i]);
    for (size_t i = 0; i < sizeof(cpu->buffers) / sizeof(cpu->buffers[0]); i++)
        free(cpu->buffers[i].data);
    free(cpu);
}

static int open_device(struct device **out, const struct device_options *options, struct error *error)
{
    uint32_t best = best_level(0);
    if (options->level > LEVEL_AVX512)
        return error_set(error, STATUS_INVALID, "level %u (%s) is not a level of the CPU backend",
                         options->level, device_level_name(options->level));
    if (options->threads > CPU_MAX_THREADS)
        return error_set(error, STATUS_INVALID, "%u compute threads are more than the limit of %u",
                         options->threads, CPU_MAX_THREADS);
    struct cpu_device *cpu = calloc(1, sizeof(*cpu));
    if (!cpu)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a CPU device");
    cpu->base.backend = &cpu_backend;
    cpu->level = options->level && options->level < best ? options->level : best;
    cpu->base.ops = cpu_ops_of_level(cpu->level);
    cpu->threads = options->threads ? options->threads : all_cores();
    cpu->store_span = cpu->level == LEVEL_AVX512 ? cpu_store_span_avx512
                      : cpu->level == LEVEL_AVX2 ? cpu_store_span_avx2
                                                 : cpu_store_span_portable;
    snprintf(cpu->description, sizeof(cpu->description), "cpu %s, %u thread%s", device_level_name(cpu->level),
             cpu->threads, cpu->threads == 1 ? "" : "s");
    int status = cpu_pool_open(&cpu->pool, cpu->threads, error);
    if (status) {
        free(cpu);
        return status;
    }
    *out = &cpu->base;
    return 0;
}

static uint32_t level_of(const struct device *device)
{
    return ((const struct cpu_device *)device)->level;
}

static const char *describe(const struct device *device)
{
    return ((const struct cpu_device *)device)->description;
}

// --- memory ---

// The number after `key` (or the first one, for NULL) in a file of the kernel's; false when there is none.
static bool read_number(const char *path, const char *key, uint64_t *out)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return false;
    char line[256];
    bool found = false;
    while (!found && fgets(line, sizeof(line), file)) {
        size_t skip = key ? strlen(key) : 0;
        if (key && strncmp(line, key, skip))
            continue;
        char *end;
        errno = 0;
        *out = strtoull(line + skip, &end, 10);
        found = end != line + skip && !errno;
        if (!key)
            break;
    }
    fclose(file);
    return found;
}

// What one control group (as its own root shows it) still allows; UINT64_MAX without a limit. File pages that
// the kernel may drop are free memory: the mapped model is made of them.
static uint64_t group_free(const char *limit_file, const char *used_file, const char *stat_file,
                           const char *stat_key)
{
    uint64_t limit, used, droppable;
    if (!read_number(limit_file, NULL, &limit) || !read_number(used_file, NULL, &used))
        return UINT64_MAX;
    if (read_number(stat_file, stat_key, &droppable))
        used -= droppable < used ? droppable : used;
    return used < limit ? limit - used : 0;
}

static uint64_t memory_free(const struct device *device)
{
    uint64_t kilobytes = 0;
    uint64_t available =
        read_number("/proc/meminfo", "MemAvailable:", &kilobytes) ? kilobytes * 1024 : UINT64_MAX;
    uint64_t v2 = group_free("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current",
                             "/sys/fs/cgroup/memory.stat", "inactive_file ");
    uint64_t v1 = group_free("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                             "/sys/fs/cgroup/memory/memory.usage_in_bytes",
                             "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file ");
    uint64_t group = v1 < v2 ? v1 : v2;
    return group < available ? group : available;
}

// Every block is preceded by its header, and both by the padding that aligns the block.
struct block {
    _Alignas(64) void *start; // what the system gave
    size_t mapped;            // bytes to unmap; 0: from the heap
};

enum { HUGE_PAGE = 2 << 20 };

size_t cpu_alloc_bytes(const struct device *device, size_t bytes)
{
    return bytes;
}

void *cpu_alloc(struct device *device, size_t bytes)
{
    size_t total;
    if (__builtin_add_overflow(bytes, sizeof(struct block) + HUGE_PAGE, &total))
        return NULL;
    if (bytes < HUGE_PAGE) {
        total = (bytes + sizeof(struct block) + 63) / 64 * 64;
        struct block *block = aligned_alloc(64, total);
        if (!block)
            return NULL;
        memset(block, 0, total);
        block->start = block;
        return block + 1;
    }
    if (bytes > memory_free(device))
        return NULL;
    uint8_t *start = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    madvise(start, total, MADV_HUGEPAGE); // only faster: a refusal changes nothing
    uintptr_t data = ((uintptr_t)start + sizeof(struct block) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    struct block *block = (struct block *)data - 1;
    block->start = start;
    block->mapped = total;
    return block + 1;
}

void cpu_free(struct device *device, void *memory)
{
    if (!memory)
        return;
    struct block *block = (struct block *)memory - 1;
    if (block->mapped)
        munmap(block->start, block->mapped);
    else
        free(block->start);
}

void cpu_upload(struct device *device, void *to, const void *from, size_t bytes)
{
    memmove(to, from, bytes);
}

void cpu_download(struct device *device, void *to, const void *from, size_t bytes)
{
    memmove(to, from, bytes);
}

void cpu_copy(struct device *device, void *to, const void *from, size_t bytes)
{
    memmove(to, from, bytes);
}

void cpu_device_fault(struct cpu_device *device, int status, const char *sentence)
{
    if (!device->fault.status)
        error_set(&device->fault, status, "%s", sentence);
}

// Scratch space is the threads' own, and small.
size_t cpu_scratch_bytes(const struct device *device, const struct scratch_shape *shape)
{
    return 0;
}

int cpu_reserve(struct device *device, size_t bytes, struct error *error)
{
    return STATUS_OK;
}

int cpu_sync(struct device *device, struct error *error)
{
    struct cpu_device *cpu = cpu_device_of(device);
    int status = cpu->fault.status;
    if (status) {
        error_set(error, status, "%s", cpu->fault.text);
        memset(&cpu->fault, 0, sizeof(cpu->fault));
    }
    return status;
}

// What is queued is done: marks are always reached, and there is nothing to gain from keeping programs.
void *cpu_alloc_host(struct device *device, size_t bytes)
{
    return calloc(1, bytes);
}

void cpu_free_host(struct device *device, void *memory)
{
    free(memory);
}

uint64_t cpu_mark(struct device *device)
{
    return 0;
}

int cpu_reached(struct device *device, uint64_t mark, struct error *error)
{
    int status = cpu_sync(device, error);
    return status ? status : 1;
}

// A stamp is the time itself.
uint64_t cpu_stamp(struct device *device)
{
    return (uint64_t)clock_now_us();
}

int64_t cpu_stamp_us(struct device *device, uint64_t stamp)
{
    return (int64_t)stamp;
}

bool cpu_replay(struct device *device, uint32_t key)
{
    return false;
}

void cpu_record(struct device *device, uint32_t key)
{
}

void cpu_record_end(struct device *device)
{
}

bool cpu_scratch_reserve(struct cpu_device *device, size_t bytes)
{
    if (bytes <= device->scratch_bytes)
        return true;
    bytes = (bytes + 4095) / 4096 * 4096;
    device->scratch_bytes = 0;
    for (uint32_t i = 0; i < device->threads; i++) {
        free(device->scratch[i]);
        device->scratch[i] = aligned_alloc(4096, bytes);
        if (!device->scratch[i]) {
            cpu_device_fault(device, STATUS_NO_MEMORY, "no memory for a compute thread's scratch space");
            return false;
        }
    }
    device->scratch_bytes = bytes;
    return true;
}

void *cpu_buffer(struct cpu_device *device, enum cpu_buffer_use use, size_t bytes)
{
    struct cpu_buffer *buffer = &device->buffers[use];
    if (bytes > buffer->bytes) {
        bytes = (bytes + 4095) / 4096 * 4096;
        free(buffer->data);
        buffer->data = aligned_alloc(4096, bytes);
        buffer->bytes = buffer->data ? bytes : 0;
        if (!buffer->data)
            cpu_device_fault(device, STATUS_NO_MEMORY, "no memory for an operation's intermediate results");
    }
    return buffer->data;
}

static void *stream(const struct device *device)
{
    return NULL;
}

static uint32_t count(void)
{
    return 1;
}

const struct device_backend cpu_backend = {
    .name = "cpu",
    .open = open_device,
    .close = close_device,
    .level = level_of,
    .describe = describe,
    .memory_free = memory_free,
    .best_level = best_level,
    .stream = stream,
    .count = count,
};
