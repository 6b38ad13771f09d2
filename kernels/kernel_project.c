// The ops project and project_qkv in their parts, for backends that gain nothing from doing them at once. On
// the executor's thread.
#include "kernels/device_internal.h"

void kernel_project(struct device *device, struct activation *x, uint32_t rows, const struct row_norm *norm,
                    const struct matmul_part *parts, uint32_t n_parts, struct activation *gated)
{
    const struct kernel_ops *ops = device->ops;
    ops->norm(device, x, norm->x, NULL, rows, norm->kind, norm->weight, norm->bias, norm->epsilon);
    ops->matmul(device, x, rows, parts, n_parts);
    if (gated)
        ops->ffn_activate(device, gated, parts[0].out, parts[1].out, parts[0].out_stride, rows);
}

void kernel_project_qkv(struct device *device, struct activation *x, const struct row_norm *norm,
                        const struct matmul_part *parts, uint32_t n_parts, const struct qkv_args *qkv,
                        const struct attention_shape *shape, const struct kv_layer *kv,
                        const struct batch *batch)
{
    device->ops->project(device, x, batch->n_tokens, norm, parts, n_parts, NULL);
    device->ops->attn_prepare(device, qkv, shape, kv, batch);
}
