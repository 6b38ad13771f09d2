// A device: the CPU with its compute threads, or one GPU. Everything a worker does on it goes through the op
// table in kernels.h. A device and its memory belong to one thread, the executor; its compute threads are its
// own business.
#ifndef STRATA_DEVICE_H
#define STRATA_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

struct device; // every backend's struct begins with `const struct kernel_ops *ops`

// Instruction-set levels of the CPU backend. A pool runs at the least level of its workers, so that a
// sequence gets the same bits on every stage and wherever it is resumed.
enum device_level {
    LEVEL_PORTABLE = 1,
    LEVEL_AVX2 = 2,
    LEVEL_AVX512 = 3 /* F BW VL DQ VNNI */,
    LEVEL_CUDA = 100
};

struct device_options {
    const char *backend; // "cpu", "cuda" or "auto": see device_backend; NULL = "cpu"
    uint32_t index;      // of the GPU
    uint32_t threads;    // compute threads of the CPU backend, the calling one included; 0 = all cores
    uint32_t level;      // at most this level; 0 = the best this machine has
};

// STATUS_UNSUPPORTED names what the machine or this build lacks.
int device_open(struct device **out, const struct device_options *options, struct error *error);
void device_close(struct device *device);

// The backend that a name means: "auto" is cuda where there is a GPU that this build can use, else cpu. Other
// names are themselves.
const char *device_backend(const char *name);

uint32_t device_level(const struct device *device);
const char *device_describe(const struct device *device); // "cpu avx512, 2 threads"
uint64_t device_memory_free(const struct device *device); // bytes
// After a failure: true when the device will do nothing more for this process, whose end alone helps (a
// kernel's bad access, a GPU that fell off the bus). Memory that ran out is no such thing. Not while a
// program is recorded.
bool device_broken(const struct device *device);
// The queue that ops go to, for libraries that join it: a cudaStream_t; NULL on the CPU.
void *device_stream(const struct device *device);
// How many devices the backend finds on this machine.
uint32_t device_count(const char *backend);
// The best level this machine can run, without opening anything.
uint32_t device_best_level(const char *backend, uint32_t index);
const char *device_level_name(uint32_t level);

#endif
