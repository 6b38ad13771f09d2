// Times the CUDA backend's products as a decode step meets them: recorded, one after the other, over enough
// copies of each matrix to be out of the L2 by the time the first is read again. Then the chain of a whole
// step without attention (norm, q k v, output, norm, gate and up, activation, down; head), 32 layers of an 8B
// model.
//
//     cuda_product_bench [type] [columns ...]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/tensor_type.h"
#include "kernels/kernels.h"
#include "tests/weights.h"

enum { COPIES_BYTES = 512 << 20, MAX_COPIES = 64, LAYERS = 32, MAX_COLUMNS = 64, REPLAYS = 30 };

struct stock { // copies of one matrix
    struct matrix copies[MAX_COPIES];
    uint32_t count;
};

struct bench {
    struct device *device;
    const struct kernel_ops *ops;
    uint32_t type, next_key;
    float *out, *residual, *weight; // [device]
    struct activation x, wide;      // widths 4096 and 14336
};

static void *must(void *memory)
{
    if (!memory) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return memory;
}

static void check(struct bench *b)
{
    struct error error = {0};
    if (b->ops->sync(b->device, &error)) {
        fprintf(stderr, "%s\n", error.text);
        exit(1);
    }
}

static void stock_up(struct bench *b, struct stock *stock, uint32_t type, uint32_t rows, uint32_t width,
                     uint32_t copies)
{
    uint64_t random = 1;
    size_t source_bytes = tensor_type_bytes(type, width, rows);
    void *source = must(malloc(source_bytes));
    weights_fill(type, source, width, rows, &random);
    struct matrix matrix = {.type = type, .rows = rows, .width = width};
    matrix.bytes = b->ops->matrix_bytes(b->device, type, rows, width, false);
    stock->count = copies ? copies : (uint32_t)(COPIES_BYTES / matrix.bytes) + 1;
    stock->count = stock->count > MAX_COPIES ? MAX_COPIES : stock->count;
    for (uint32_t i = 0; i < stock->count; i++) {
        matrix.data = must(b->ops->alloc(b->device, matrix.bytes));
        if (i == 0)
            b->ops->matrix_pack(b->device, &matrix, source, NULL);
        else
            b->ops->copy(b->device, matrix.data, stock->copies[0].data, matrix.bytes);
        stock->copies[i] = matrix;
    }
    check(b);
    free(source);
}

static void sell_off(struct bench *b, struct stock *stock)
{
    for (uint32_t i = 0; i < stock->count; i++)
        b->ops->free(b->device, stock->copies[i].data);
}

// Microseconds of one replay of what was recorded under `key`.
static double time_program(struct bench *b, uint32_t key)
{
    for (int i = 0; i < 3; i++)
        b->ops->replay(b->device, key);
    check(b);
    int64_t begin = clock_now_us();
    for (int i = 0; i < REPLAYS; i++)
        b->ops->replay(b->device, key);
    check(b);
    return (double)(clock_now_us() - begin) / REPLAYS;
}

static void multiply(struct bench *b, struct activation *x, uint32_t columns, const struct matrix *one,
                     const struct matrix *two, float *out, uint32_t stride, bool accumulate)
{
    struct matmul_part parts[2] = {{one, NULL, out, stride, accumulate},
                                   {two, NULL, out, stride, accumulate}};
    if (two)
        parts[1].out = out + one->rows;
    x->n_generated = columns;
    b->ops->matmul(b->device, x, columns, parts, two ? 2 : 1);
}

static void time_matrix(struct bench *b, uint32_t rows, uint32_t width, uint32_t columns)
{
    struct stock stock;
    struct activation *x = width == 4096 ? &b->x : &b->wide;
    stock_up(b, &stock, b->type, rows, width, 0);
    uint32_t key = b->next_key++;
    b->ops->record(b->device, key);
    for (uint32_t i = 0; i < stock.count; i++)
        multiply(b, x, columns, &stock.copies[i], NULL, b->out, rows, false);
    b->ops->record_end(b->device);
    double us = time_program(b, key) / stock.count;
    printf("%-5s %6u x %5u, %2u columns: %8.2f us %6.2f TB/s\n", tensor_type_info(b->type)->name, rows, width,
           columns, us, (double)stock.copies[0].bytes / us / 1e6);
    fflush(stdout);
    b->ops->forget(b->device);
    sell_off(b, &stock);
}

static void time_chain(struct bench *b, const uint32_t *columns, int n)
{
    static struct stock qkv, output, gate, up, down, head;
    stock_up(b, &qkv, b->type, 6144, 4096, LAYERS);
    stock_up(b, &output, b->type, 4096, 4096, LAYERS);
    stock_up(b, &gate, b->type, 14336, 4096, LAYERS);
    stock_up(b, &up, b->type, 14336, 4096, LAYERS);
    stock_up(b, &down, b->type, 4096, 14336, LAYERS);
    stock_up(b, &head, b->type, 128256, 4096, 1);
    double bytes = (double)(qkv.copies[0].bytes + output.copies[0].bytes + 2 * gate.copies[0].bytes +
                            down.copies[0].bytes) *
                       LAYERS +
                   (double)head.copies[0].bytes;
    for (int c = 0; c < n; c++) {
        uint32_t key = b->next_key++, rows = columns[c];
        b->ops->record(b->device, key);
        struct row_norm norm = {b->residual, NORM_RMS, b->weight, NULL, 1e-5f};
        for (uint32_t i = 0; i < LAYERS; i++) {
            struct matmul_part in = {&qkv.copies[i], NULL, b->out, 6144, false};
            struct matmul_part inner[2] = {{&gate.copies[i], NULL, b->out, 28672, false},
                                           {&up.copies[i], NULL, b->out + 14336, 28672, false}};
            b->x.n_generated = b->wide.n_generated = rows;
            b->ops->project(b->device, &b->x, rows, &norm, &in, 1, NULL);
            multiply(b, &b->x, rows, &output.copies[i], NULL, b->residual, 4096, true);
            b->ops->project(b->device, &b->x, rows, &norm, inner, 2, &b->wide);
            multiply(b, &b->wide, rows, &down.copies[i], NULL, b->residual, 4096, true);
        }
        struct matmul_part logits = {&head.copies[0], NULL, b->out, 128256, false};
        b->ops->project(b->device, &b->x, rows, &norm, &logits, 1, NULL);
        b->ops->record_end(b->device);
        double us = time_program(b, key);
        printf("%-5s step without attention, %2u columns: %8.1f us, %.2f TB/s, %.0f tok/s\n",
               tensor_type_info(b->type)->name, rows, us, bytes / us / 1e6, rows * 1e6 / us);
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    struct bench b = {.type = TENSOR_Q4_K};
    struct error error = {0};
    struct device_options options = {.backend = "cuda"};
    uint32_t columns[16] = {1, 8, 32, 64};
    int n = 4;
    for (uint32_t type = 0; argc > 1 && type < 40; type++) {
        if (tensor_type_info(type) && strcmp(tensor_type_info(type)->name, argv[1]) == 0)
            b.type = type;
    }
    if (argc > 2)
        n = 0;
    for (int i = 2; i < argc && n < 16; i++)
        columns[n++] = (uint32_t)atoi(argv[i]);
    if (device_open(&b.device, &options, &error)) {
        fprintf(stderr, "%s\n", error.text);
        return 77;
    }
    b.ops = device_ops(b.device);
    printf("%s\n", device_describe(b.device));
    b.out = must(b.ops->alloc(b.device, (size_t)MAX_COLUMNS * 128256 * sizeof(float)));
    b.residual = must(b.ops->alloc(b.device, (size_t)MAX_COLUMNS * 4096 * sizeof(float)));
    b.weight = must(b.ops->alloc(b.device, 4096 * sizeof(float)));
    float *host = must(malloc((size_t)MAX_COLUMNS * 14336 * sizeof(float)));
    uint64_t random = 7;
    for (size_t i = 0; i < (size_t)MAX_COLUMNS * 14336; i++)
        host[i] = random_signed(&random);
    b.ops->upload(b.device, b.residual, host, (size_t)MAX_COLUMNS * 4096 * sizeof(float));
    b.ops->upload(b.device, b.weight, host, 4096 * sizeof(float));
    b.ops->upload(b.device, b.out, host, (size_t)MAX_COLUMNS * 14336 * sizeof(float));
    b.x = (struct activation){.width = 4096, .rows = MAX_COLUMNS, .forms = 1, .n_generated = MAX_COLUMNS};
    b.wide = (struct activation){.width = 14336, .rows = MAX_COLUMNS, .forms = 1, .n_generated = MAX_COLUMNS};
    b.x.data = must(b.ops->alloc(b.device, b.ops->activation_bytes(b.device, 4096, MAX_COLUMNS, 1)));
    b.wide.data = must(b.ops->alloc(b.device, b.ops->activation_bytes(b.device, 14336, MAX_COLUMNS, 1)));
    b.ops->store(b.device, &b.x, b.residual, MAX_COLUMNS);
    b.ops->store(b.device, &b.wide, b.out, MAX_COLUMNS);
    check(&b);
    static const uint32_t SHAPES[][2] = {
        {6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}, {128256, 4096}};
    for (int c = 0; c < n; c++) {
        for (size_t s = 0; s < sizeof(SHAPES) / sizeof(SHAPES[0]); s++)
            time_matrix(&b, SHAPES[s][0], SHAPES[s][1], columns[c]);
    }
    time_chain(&b, columns, n);
    device_close(b.device);
    return 0;
}
