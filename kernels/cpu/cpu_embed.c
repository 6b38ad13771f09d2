// Embedding: rows of the look-up table, which keeps GGUF's layout, become the residual's first values; a
// learned position is a row of a second table added to it. One task a few tokens, on the device's threads.
#include "kernels/cpu/cpu_internal.h"

enum { TOKENS_A_TASK = 4 };

struct embed_args {
    struct cpu_device *device;
    float *x;
    const struct matrix *table, *positions;
    const struct batch *batch;
};

static void read_row(const struct matrix *table, uint32_t row, float *out)
{
    size_t row_bytes = tensor_type_bytes(table->type, table->width, 1);
    cpu_dequantize_row(table->type, (const uint8_t *)table->data + row * row_bytes, out, table->width);
}

static void embed_tokens(void *context, uint32_t task, uint32_t worker)
{
    const struct embed_args *args = context;
    uint32_t width = args->table->width, first = task * TOKENS_A_TASK, end = first + TOKENS_A_TASK;
    if (end > args->batch->n_tokens)
        end = args->batch->n_tokens;
    float *position = cpu_scratch(args->device, worker);
    for (uint32_t t = first; t < end; t++) {
        float *x = args->x + (size_t)t * width;
        read_row(args->table, (uint32_t)args->batch->tokens[t], x);
        if (!args->positions)
            continue;
        read_row(args->positions, args->batch->positions[t], position);
        for (uint32_t i = 0; i < width; i++)
            x[i] += position[i];
    }
}

void cpu_embed(struct device *device, float *x, const struct matrix *table, const struct matrix *positions,
               const struct batch *batch)
{
    struct embed_args args = {cpu_device_of(device), x, table, positions, batch};
    if (positions && !cpu_scratch_reserve(args.device, table->width * sizeof(float)))
        return;
    cpu_parallel(args.device, embed_tokens, &args, (batch->n_tokens + TOKENS_A_TASK - 1) / TOKENS_A_TASK);
}

void cpu_feed(struct device *device, int32_t *tokens, const int32_t *sources, const int32_t *ring,
              uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (sources[i] >= 0)
            tokens[i] = ring[sources[i]];
    }
}

void cpu_store(struct device *device, struct activation *out, const float *x, uint32_t rows)
{
    for (uint32_t t = 0; t < rows; t++)
        cpu_activation_store_row(cpu_device_of(device), out, t, x + (size_t)t * out->width);
}
