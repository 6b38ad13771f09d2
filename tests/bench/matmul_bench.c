// Times matmul: for one column the bytes of packed weights read a second, for more the multiply-adds a
// second; per level, type and shape, best of several runs. The matrices of a run exceed the caches, as a
// model's do.
//
//     matmul_bench [threads] [type] [level]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/tensor_type.h"
#include "kernels/cpu/cpu_internal.h"
#include "tests/weights.h"

enum { MAX_COLUMNS = 512, COPIES_BYTES = 192 << 20, MAX_COPIES = 256 };

static const uint32_t COLUMNS[] = {1, 2, 4, 8, 32, 128, 512};
static const struct {
    uint32_t rows, width;
} SHAPES[] = {{576, 576}, {1536, 576}, {576, 1536}, {8192, 2048}, {2048, 8192}};

struct bench {
    struct device *device;
    const struct kernel_ops *ops;
    struct matrix copies[MAX_COPIES];
    uint32_t n_copies;
    struct activation x;
    float *out;
};

// Copies of one matrix, enough of them to be out of every cache by the time the first is read again.
static int set_up(struct bench *b, uint32_t type, uint32_t rows, uint32_t width)
{
    uint64_t random = 1;
    size_t source_bytes = tensor_type_bytes(type, width, rows);
    void *source = malloc(source_bytes);
    weights_fill(type, source, width, rows, &random);
    struct matrix matrix = {.type = type, .rows = rows, .width = width};
    matrix.bytes = b->ops->matrix_bytes(b->device, type, rows, width, false);
    b->n_copies = (uint32_t)(COPIES_BYTES / matrix.bytes);
    b->n_copies = b->n_copies < 1 ? 1 : b->n_copies > MAX_COPIES ? MAX_COPIES : b->n_copies;
    for (uint32_t i = 0; i < b->n_copies; i++) {
        matrix.data = b->ops->alloc(b->device, matrix.bytes);
        if (!matrix.data || b->ops->matrix_pack(b->device, &matrix, source, NULL))
            return -1;
        b->copies[i] = matrix;
    }
    free(source);
    b->x = (struct activation){.width = width, .rows = MAX_COLUMNS};
    b->x.forms = b->ops->matrix_forms(b->device, type);
    b->x.data = b->ops->alloc(b->device, b->ops->activation_bytes(b->device, width, MAX_COLUMNS, b->x.forms));
    b->out = malloc((size_t)rows * MAX_COLUMNS * sizeof(float));
    float *row = malloc(width * sizeof(float));
    if (!b->x.data || !b->out || !row)
        return -1;
    for (uint32_t t = 0; t < MAX_COLUMNS; t++) {
        for (uint32_t i = 0; i < width; i++)
            row[i] = random_signed(&random);
        cpu_activation_store_row(cpu_device_of(b->device), &b->x, t, row);
    }
    free(row);
    return 0;
}

static void tear_down(struct bench *b)
{
    for (uint32_t i = 0; i < b->n_copies; i++)
        b->ops->free(b->device, b->copies[i].data);
    b->ops->free(b->device, b->x.data);
    free(b->out);
}

static double run_products(struct bench *b, uint32_t columns, uint32_t first, uint32_t count)
{
    int64_t start = clock_now_us();
    for (uint32_t i = first; i < first + count; i++) {
        struct matrix *weight = &b->copies[i % b->n_copies];
        struct matmul_part part = {weight, NULL, b->out, weight->rows, false};
        b->ops->matmul(b->device, &b->x, columns, &part, 1);
    }
    return (double)(clock_now_us() - start) / 1e6 / count;
}

// Seconds of one product: the best of many stretches of about a millisecond, so that what else the machine
// does spoils only some of them.
static double time_columns(struct bench *b, uint32_t columns)
{
    double best = run_products(b, columns, 0, 1), spent = 0;
    uint32_t count = 1 + (uint32_t)(1e-3 / (best + 1e-7)), first = 0;
    for (int run = 0; run < 20 || (run < 2000 && spent < 0.4); run++, first += count) {
        double each = run_products(b, columns, first, count);
        spent += each * count;
        best = each < best ? each : best;
    }
    return best;
}

static void bench_shape(struct bench *b, uint32_t type, uint32_t rows, uint32_t width)
{
    if (set_up(b, type, rows, width)) {
        printf("out of memory\n");
        exit(1);
    }
    printf("%-9s %-5s %5ux%-5u", device_level_name(device_level(b->device)), tensor_type_info(type)->name,
           rows, width);
    for (size_t i = 0; i < sizeof(COLUMNS) / sizeof(COLUMNS[0]); i++) {
        double seconds = time_columns(b, COLUMNS[i]);
        if (COLUMNS[i] == 1)
            printf("  %6.2f GB/s %7.1f us |", (double)b->copies[0].bytes / seconds / 1e9, seconds * 1e6);
        else
            printf(" %7.1f", (double)rows * width * COLUMNS[i] / seconds / 1e9);
        fflush(stdout);
    }
    printf("\n");
    tear_down(b);
}

int main(int argc, char **argv)
{
    uint32_t threads = argc > 1 ? (uint32_t)atoi(argv[1]) : 2;
    printf("level     type  rowsxwidth  1 column            | GMAC/s at");
    for (size_t i = 1; i < sizeof(COLUMNS) / sizeof(COLUMNS[0]); i++)
        printf(" %u", COLUMNS[i]);
    printf(" columns; %u threads\n", threads);
    for (uint32_t level = device_best_level("cpu", 0); level > LEVEL_PORTABLE; level--) {
        if (argc > 3 && strcmp(argv[3], device_level_name(level)))
            continue;
        struct device_options options = {.threads = threads, .level = level};
        struct bench b = {0};
        if (device_open(&b.device, &options, NULL))
            return 1;
        b.ops = device_ops(b.device);
        for (size_t t = 0; t < N_WEIGHT_TYPES; t++) {
            if (argc > 2 && strcmp(argv[2], "all") &&
                strcmp(argv[2], tensor_type_info(WEIGHT_TYPES[t])->name))
                continue;
            for (size_t i = 0; i < sizeof(SHAPES) / sizeof(SHAPES[0]); i++)
                if (SHAPES[i].width % tensor_type_info(WEIGHT_TYPES[t])->block_weights == 0)
                    bench_shape(&b, WEIGHT_TYPES[t], SHAPES[i].rows, SHAPES[i].width);
        }
        device_close(b.device);
    }
    return 0;
}
