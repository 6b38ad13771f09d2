// The portable versions of norm, ffn_activate and the storing of activations: the readable reference. Called
// from the executor's thread; rows and spans go to the compute threads.
#include "kernels/cpu/cpu_rows.h"

void cpu_store_span_portable(const struct activation *activation, uint32_t row, uint32_t first,
                             uint32_t count, const float *values)
{
    struct cpu_activation_rows rows = cpu_activation_rows(activation);
    memcpy(rows.floats + row * rows.float_stride + first, values, (size_t)count * sizeof(float));
}

static void norm_row(const struct norm_args *args, const float *x, float *values)
{
    uint32_t width = args->out->width;
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
}

void cpu_norm_portable(struct device *device, struct activation *out, const float *x, const uint32_t *index,
                       uint32_t rows, enum norm_kind kind, const float *weight, const float *bias,
                       float epsilon)
{
    struct norm_args args = {cpu_device_of(device), out, x, weight, bias, index, kind, epsilon, norm_row};
    cpu_norm_rows(&args, rows);
}

static void ffn_span(const float *gate, const float *up, float *values, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        double x = gate ? gate[i] : up[i];
        if (gate)
            values[i] = (float)(x / (1 + exp(-x)) * up[i]);
        else // 0.79... = sqrt(2 / pi)
            values[i] = (float)(0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x))));
    }
}

void cpu_ffn_activate_portable(struct device *device, struct activation *out, const float *gate,
                               const float *up, uint32_t stride, uint32_t rows)
{
    struct ffn_args args = {cpu_device_of(device), out, gate, up, stride, ffn_span};
    cpu_ffn_rows(&args, rows);
}
