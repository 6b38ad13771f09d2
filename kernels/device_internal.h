// What device.c and the backends share: the head of every device, and a backend's table.
#ifndef STRATA_DEVICE_INTERNAL_H
#define STRATA_DEVICE_INTERNAL_H

#include "kernels/device.h"
#include "kernels/kernels.h"

struct device_backend {
    const char *name; // "cpu", "cuda"
    int (*open)(struct device **out, const struct device_options *options, struct error *error);
    void (*close)(struct device *device);
    uint32_t (*level)(const struct device *device);
    const char *(*describe)(const struct device *device);
    uint64_t (*memory_free)(const struct device *device);
    bool (*broken)(const struct device *device); // NULL: never
    uint32_t (*best_level)(uint32_t index);
    void *(*stream)(const struct device *device);
    uint32_t (*count)(void);
};

// The first member of every backend's own struct.
struct device {
    const struct kernel_ops *ops;
    const struct device_backend *backend;
};

// The op project as norm, matmul and ffn_activate (kernel_project.c).
void kernel_project(struct device *device, struct activation *x, uint32_t rows, const struct row_norm *norm,
                    const struct matmul_part *parts, uint32_t n_parts, struct activation *gated);

// The op project_qkv as project and attn_prepare.
void kernel_project_qkv(struct device *device, struct activation *x, const struct row_norm *norm,
                        const struct matmul_part *parts, uint32_t n_parts, const struct qkv_args *qkv,
                        const struct attention_shape *shape, const struct kv_layer *kv,
                        const struct batch *batch);

extern const struct device_backend cpu_backend;
extern const struct device_backend cuda_backend; // STRATA_HAVE_CUDA

#endif
