// Times attention and attn_prepare: prefill chunks in GFLOP/s, decode steps in GB/s of KV read.
//
//   attention_bench [THREADS [LEVEL]]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/cpu/cpu_internal.h"

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

struct scene {
    const char *name;
    struct attention_shape shape;
};

static const struct scene SCENES[] = {
    {"135M (9/3 heads of 64)", {9, 3, 64, 0, 0.125f}},
    {"1B (32/8 heads of 64)", {32, 8, 64, 0, 0.125f}},
    {"8B (32/8 heads of 128)", {32, 8, 128, 0, 0.088388f}},
};

struct step {
    struct device *device;
    const struct kernel_ops *ops;
    const struct attention_shape *shape;
    struct batch batch;
    struct kv_layer kv;
    struct qkv_args qkv;
    struct activation out;
    size_t pages;
};

static void *device_array(struct step *step, const void *from, size_t bytes)
{
    void *to = step->ops->alloc(step->device, bytes);
    if (!to) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    if (from)
        step->ops->upload(step->device, to, from, bytes);
    return to;
}

static void fill(float *x, size_t n)
{
    uint32_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525 + 1013904223;
        x[i] = (float)(int32_t)state * 0x1p-31f;
    }
}

// `rows` positions at the end of each of `sequences` contexts.
static struct step step_new(struct device *device, const struct attention_shape *shape, uint32_t sequences,
                            uint32_t context, uint32_t rows)
{
    struct step step = {.device = device, .ops = device_ops(device), .shape = shape};
    uint32_t n_tokens = sequences * rows, stride = (context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    uint32_t q_width = shape->n_heads * shape->head_size, kv_width = shape->n_kv_heads * shape->head_size;
    uint32_t *positions = malloc(n_tokens * 4), *slots = malloc(n_tokens * 4),
             *tables = malloc((size_t)sequences * stride * 4);
    struct batch_span *spans = malloc(sequences * sizeof *spans);
    for (uint32_t s = 0; s < sequences; s++) {
        spans[s] = (struct batch_span){s * rows, rows, s, context - rows};
        for (uint32_t i = 0; i < rows; i++) {
            positions[s * rows + i] = context - rows + i;
            slots[s * rows + i] = s;
        }
        for (uint32_t i = 0; i < stride; i++) // spread, as pages of many sequences are
            tables[s * stride + i] = i * sequences + s;
    }
    step.pages = (size_t)sequences * stride;
    step.kv.page_bytes = step.ops->kv_page_bytes(device, shape->n_kv_heads, shape->head_size);
    step.kv.data = device_array(&step, NULL, step.pages * step.kv.page_bytes);
    uint16_t *halves = step.kv.data; // the CPU's memory
    for (size_t i = 0; i < step.pages * step.kv.page_bytes / 2; i++)
        halves[i] = (uint16_t)(0x3000 + (i * 40503u & 0x83ff));
    step.batch = (struct batch){.n_tokens = n_tokens,
                                .n_spans = sequences,
                                .positions = device_array(&step, positions, n_tokens * 4),
                                .slots = device_array(&step, slots, n_tokens * 4),
                                .spans = device_array(&step, spans, sequences * sizeof *spans),
                                .page_tables = device_array(&step, tables, (size_t)sequences * stride * 4),
                                .table_stride = stride};
    float frequencies[64], *x = malloc((size_t)n_tokens * q_width * 4);
    for (int i = 0; i < 64; i++)
        frequencies[i] = powf(10000, -(float)i / 64);
    fill(x, (size_t)n_tokens * q_width);
    step.qkv = (struct qkv_args){.q = device_array(&step, x, (size_t)n_tokens * q_width * 4),
                                 .k = device_array(&step, x, (size_t)n_tokens * kv_width * 4),
                                 .v = device_array(&step, x, (size_t)n_tokens * kv_width * 4),
                                 .q_stride = q_width,
                                 .k_stride = kv_width,
                                 .v_stride = kv_width,
                                 .position = POSITION_ROPE_ADJACENT,
                                 .rope_dims = shape->head_size,
                                 .rope_frequency = device_array(&step, frequencies, sizeof frequencies)};
    step.out = (struct activation){.width = q_width, .rows = n_tokens, .forms = FORM_F32};
    step.out.data =
        device_array(&step, NULL, step.ops->activation_bytes(device, q_width, n_tokens, step.out.forms));
    free(x);
    free(spans);
    free(tables);
    free(slots);
    free(positions);
    return step;
}

static void step_free(struct step *step)
{
    const void *all[] = {step->batch.positions,
                         step->batch.slots,
                         step->batch.spans,
                         step->batch.page_tables,
                         step->kv.data,
                         step->qkv.q,
                         step->qkv.k,
                         step->qkv.v,
                         step->qkv.rope_frequency,
                         step->out.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        step->ops->free(step->device, (void *)all[i]);
}

// The best of some runs, in microseconds.
static void step_time(struct step *step, double *prepare, double *attend)
{
    *prepare = *attend = INFINITY;
    double begin = now_us();
    for (int run = 0; run < 50 && (run < 3 || now_us() - begin < 400000); run++) {
        double start = now_us();
        step->ops->attn_prepare(step->device, &step->qkv, step->shape, &step->kv, &step->batch);
        double middle = now_us();
        step->ops->attention(step->device, &step->out, step->qkv.q, step->qkv.q_stride, step->shape,
                             &step->kv, &step->batch);
        double end = now_us();
        *prepare = fmin(*prepare, middle - start);
        *attend = fmin(*attend, end - middle);
    }
}

static void bench_prefill(struct device *device, const struct scene *scene, uint32_t context)
{
    uint32_t rows = context < 512 ? context : 512;
    struct step step = step_new(device, &scene->shape, 1, context, rows);
    double prepare, attend;
    step_time(&step, &prepare, &attend);
    double seen = (double)rows * (context - rows) + (double)rows * (rows + 1) / 2;
    double flops = 4 * seen * scene->shape.n_heads * scene->shape.head_size;
    printf("  prefill %4u at %5u: prepare %7.1f us, attention %9.1f us (%.2f us a token), %6.1f GFLOP/s\n",
           rows, context, prepare, attend, attend / rows, flops / attend / 1e3);
    step_free(&step);
}

static void bench_decode(struct device *device, const struct scene *scene, uint32_t sequences,
                         uint32_t context)
{
    struct step step = step_new(device, &scene->shape, sequences, context, 1);
    double prepare, attend;
    step_time(&step, &prepare, &attend);
    double bytes = 4.0 * sequences * context * scene->shape.n_kv_heads * scene->shape.head_size;
    printf("  decode  %4u at %5u: prepare %7.1f us, attention %9.1f us (%.2f us a token), %6.1f GB/s\n",
           sequences, context, prepare, attend, attend / sequences, bytes / attend / 1e3);
    step_free(&step);
}

int main(int argc, char **argv)
{
    struct device_options options = {.backend = "cpu",
                                     .threads = argc > 1 ? (uint32_t)atoi(argv[1]) : 0,
                                     .level = argc > 2 ? (uint32_t)atoi(argv[2]) : 0};
    struct device *device;
    struct error error = {0};
    if (device_open(&device, &options, &error)) {
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    printf("%s\n", device_describe(device));
    for (size_t i = 0; i < sizeof SCENES / sizeof *SCENES; i++) {
        printf("%s\n", SCENES[i].name);
        for (uint32_t context = 128; context <= 8192; context *= 4)
            bench_prefill(device, &SCENES[i], context);
        for (uint32_t context = 128; context <= 8192; context *= 4) {
            bench_decode(device, &SCENES[i], 1, context);
            bench_decode(device, &SCENES[i], 32, context);
        }
    }
    device_close(device);
    return 0;
}
