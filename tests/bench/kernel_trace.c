// A library that CUDA loads into any program (CUDA_INJECTION64_PATH names it): by the program's end it has
// written a line for each kernel that ran, those of replayed graphs too, to the file KERNEL_TRACE names, in
// which %p stands for the process: start and end in nanoseconds of the device's clock, grid, block, registers
// a thread, shared bytes a block, name. Copies have a line as well, with their bytes in place of the grid.
// scripts/kernel_profile.py makes a table of it.
//
// CUPTI's activity records cost some time of their own (a microsecond a kernel or so), and a kernel that
// starts before its predecessor's end is seen as such.
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUFFER_BYTES = 16 << 20, ALIGNMENT = 8 };

static FILE *out;

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *max_records)
{
    *buffer = aligned_alloc(ALIGNMENT, BUFFER_BYTES);
    *size = *buffer ? BUFFER_BYTES : 0;
    *max_records = 0;
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size,
                                 size_t valid)
{
    (void)context, (void)stream, (void)size;
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const CUpti_ActivityMemcpy6 *m = (const CUpti_ActivityMemcpy6 *)record;
            const char *way = m->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_HTOD   ? "up"
                              : m->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH ? "down"
                                                                               : "across";
            fprintf(out, "%llu %llu %llu 1 0 0 copy_%s\n", (unsigned long long)m->start,
                    (unsigned long long)m->end, (unsigned long long)m->bytes, way);
        }
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL)
            continue;
        const CUpti_ActivityKernel10 *k = (const CUpti_ActivityKernel10 *)record;
        fprintf(out, "%llu %llu %dx%dx%d %d %u %d %s\n", (unsigned long long)k->start,
                (unsigned long long)k->end, k->gridX, k->gridY, k->gridZ, k->blockX * k->blockY * k->blockZ,
                k->registersPerThread, k->staticSharedMemory + k->dynamicSharedMemory, k->name);
    }
    free(buffer);
}

static void finish(void)
{
    cuptiActivityFlushAll(1);
    fclose(out);
}

// Called by the driver when it has loaded the library.
int InitializeInjection(void); // CUDA's name for it
int InitializeInjection(void)
{
    const char *path = getenv("KERNEL_TRACE"), *mark;
    char name[4096];
    path = path ? path : "kernel_trace.txt";
    mark = strstr(path, "%p");
    if (mark)
        snprintf(name, sizeof(name), "%.*s%d%s", (int)(mark - path), path, (int)getpid(), mark + 2);
    out = fopen(mark ? name : path, "w");
    if (!out) {
        perror("kernel_trace");
        return 0;
    }
    if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY) != CUPTI_SUCCESS) {
        fprintf(stderr, "kernel_trace: CUPTI does not record kernels here\n");
        return 0;
    }
    atexit(finish);
    return 1;
}
