// The portable versions of norm, ffn_activate and the storing of activations: the readable reference.
// Called from the executor's thread.
#include "kernels/cpu/cpu_internal.h"

void cpu_store_span_portable(const struct activation *activation, uint32_t row, uint32_t first,
                             uint32_t count, const float *values)
{
    struct cpu_activation_rows rows = cpu_activation_rows(activation);
    memcpy(rows.floats + row * rows.float_stride + first, values, (size_t)count * 4);
}

struct norm_args {
    struct cpu_device *device;
    struct activation *out;
    const float *x, *weight, *bias;
    const uint32_t *index;
    enum norm_kind kind;
    float epsilon;
};

static void norm_row(void *arguments, uint32_t row, uint32_t worker)
{
    const struct norm_args *args = arguments;
    uint32_t width = args->out->width;
    const float *x = args->x + (size_t)(args->index ? args->index[row] : row) * width;
    float *values = cpu_scratch(args->device, worker);
    double mean = 0, squares = 0;
    if (args->kind == NORM_LAYER) {
        for (uint32_t i = 0; i < width; i++)
            mean += x[i];
        mean /= width;
    }
    for (uint32_t i = 0; i < width; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    double scale = 1 / sqrt(squares / width + args->epsilon);
    for (uint32_t i = 0; i < width; i++)
        values[i] = (float)((x[i] - mean) * scale * args->weight[i] + (args->bias ? args->bias[i] : 0));
    cpu_activation_store_row(args->device, args->out, row, values);
}

void cpu_norm_portable(struct device *device, struct activation *out, const float *x, const uint32_t *index,
                       uint32_t rows, enum norm_kind kind, const float *weight, const float *bias,
                       float epsilon)
{
    struct norm_args args = {cpu_device_of(device), out, x, weight, bias, index, kind, epsilon};
    if (cpu_scratch_reserve(args.device, (size_t)out->width * 4))
        cpu_parallel(args.device, norm_row, &args, rows);
}

struct ffn_args {
    struct cpu_device *device;
    struct activation *out;
    const float *gate, *up;
    uint32_t stride;
};

static void ffn_row(void *arguments, uint32_t row, uint32_t worker)
{
    const struct ffn_args *args = arguments;
    uint32_t width = args->out->width;
    const float *up = args->up + (size_t)row * args->stride;
    const float *gate = args->gate ? args->gate + (size_t)row * args->stride : NULL;
    float *values = cpu_scratch(args->device, worker);
    for (uint32_t i = 0; i < width; i++) {
        double x = gate ? gate[i] : up[i];
        if (gate)
            values[i] = (float)(x / (1 + exp(-x)) * up[i]);
        else // 0.79... = sqrt(2 / pi)
            values[i] = (float)(0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x))));
    }
    cpu_activation_store_row(args->device, args->out, row, values);
}

void cpu_ffn_activate_portable(struct device *device, struct activation *out, const float *gate,
                               const float *up, uint32_t stride, uint32_t rows)
{
    struct ffn_args args = {cpu_device_of(device), out, gate, up, stride};
    if (cpu_scratch_reserve(args.device, (size_t)out->width * 4))
        cpu_parallel(args.device, ffn_row, &args, rows);
}
