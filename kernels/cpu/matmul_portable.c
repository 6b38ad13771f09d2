// The portable matmul: each row of weights is dequantized once and multiplied with every input, in f64, in
// ascending order. The readable reference; matrices stay in GGUF's layout. Called from the executor's thread.
#include "kernels/cpu/cpu_internal.h"

enum { ROWS_A_TASK = 8, COLUMNS = 4 };

struct matmul_args {
    struct cpu_device *device;
    struct cpu_activation_rows x;
    const struct matmul_part *part;
    uint32_t rows;
};

static void store(const struct matmul_part *part, uint32_t t, uint32_t n, double sum)
{
    float *out = part->out + (size_t)t * part->out_stride + n;
    if (part->bias)
        sum += part->bias[n];
    if (part->accumulate)
        sum += *out;
    *out = (float)sum;
}

// COLUMNS sums at a time, each in its own ascending order, only to be a little less slow.
static void multiply_row(const struct matmul_args *args, uint32_t n, const float *weights)
{
    uint32_t width = args->part->weight->width;
    for (uint32_t first = 0; first < args->rows; first += COLUMNS) {
        double sums[COLUMNS] = {0};
        const float *x[COLUMNS];
        for (uint32_t c = 0; c < COLUMNS;
             c++) // the last columns are computed again where there are none left
            x[c] = args->x.floats + (first + c < args->rows ? first + c : first) * args->x.float_stride;
        for (uint32_t k = 0; k < width; k++)
            for (uint32_t c = 0; c < COLUMNS; c++)
                sums[c] += (double)weights[k] * x[c][k];
        for (uint32_t c = 0; c < COLUMNS && first + c < args->rows; c++)
            store(args->part, first + c, n, sums[c]);
    }
}

static void multiply_rows(void *arguments, uint32_t task, uint32_t worker)
{
    const struct matmul_args *args = arguments;
    const struct matrix *weight = args->part->weight;
    size_t row_bytes = tensor_type_bytes(weight->type, weight->width, 1);
    float *weights = cpu_scratch(args->device, worker);
    for (uint32_t n = task * ROWS_A_TASK; n < weight->rows && n < (task + 1) * ROWS_A_TASK; n++) {
        cpu_dequantize_row(weight->type, (const uint8_t *)weight->data + n * row_bytes, weights,
                           weight->width);
        multiply_row(args, n, weights);
    }
}

void cpu_matmul_portable(struct device *device, const struct activation *x, uint32_t rows,
                         const struct matmul_part *parts, uint32_t n_parts)
{
    struct matmul_args args = {cpu_device_of(device), cpu_activation_rows(x), NULL, rows};
    if (!cpu_scratch_reserve(args.device, (size_t)x->width * 4))
        return;
    for (uint32_t i = 0; i < n_parts; i++) {
        args.part = &parts[i];
        cpu_parallel(args.device, multiply_rows, &args,
                     (parts[i].weight->rows + ROWS_A_TASK - 1) / ROWS_A_TASK);
    }
}
