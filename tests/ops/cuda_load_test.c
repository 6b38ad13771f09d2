// Loading matrices by the device's own threads: the same bytes as packing from memory, through many segments
// of the ring and several groups of rows, with uploads in between; and what a reader's failure becomes.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/tensor_type.h"
#include "kernels/kernels.h"
#include "tests/suite.h"
#include "tests/weights.h"

struct source {
    const unsigned char *bytes;
    size_t row_bytes;
    uint32_t bad_row; // reading it fails; UINT32_MAX: none
};

static struct device *device;
static const struct kernel_ops *ops;
static struct error error;

static void setup(void)
{
    struct device_options options = {.backend = "cuda"};
    ck_assert_msg(device_open(&device, &options, &error) == 0, "%s", error.text);
    ops = device_ops(device);
}

static void teardown(void)
{
    device_close(device);
}

static int read_rows(void *context, void *to, uint32_t first, uint32_t count, struct error *to_error)
{
    const struct source *source = context;
    if (source->bad_row - first < count)
        return error_set(to_error, STATUS_CORRUPT, "row %u is bad", source->bad_row);
    if (first % 3 == 0)
        usleep(500); // so that pieces are done in another order
    memcpy(to, source->bytes + first * source->row_bytes, count * source->row_bytes);
    return STATUS_OK;
}

static struct matrix new_matrix(uint32_t type, uint32_t rows, uint32_t width, bool table)
{
    struct matrix matrix = {.type = type, .rows = rows, .width = width, .table = table};
    matrix.bytes = ops->matrix_bytes(device, type, rows, width, table);
    matrix.data = ops->alloc(device, matrix.bytes);
    ck_assert_ptr_nonnull(matrix.data);
    return matrix;
}

enum { N = 8 };
static struct {
    uint32_t type, rows, width;
    bool table;
} SHAPES[N] = {
    {TENSOR_Q4_K, 33000, 4096, false}, // 76 MB: more than is packed at once
    {TENSOR_Q6_K, 100, 512, false},    {TENSOR_Q8_0, 5000, 4096, false}, {TENSOR_Q4_0, 7777, 96, false},
    {TENSOR_Q4_K, 12000, 1024, true},  {TENSOR_F16, 3000, 2048, false},  {TENSOR_F32, 1, 64, false},
    {TENSOR_Q5_K, 4097, 2048, false},
};

START_TEST(test_loading_packs_as_packing_does)
{
    uint64_t random = random_seed("test_loading_packs_as_packing_does");
    struct matrix loaded[N], packed[N];
    struct source sources[N];
    unsigned char *bytes[N];
    float values[1000], back[1000];
    float *beside = ops->alloc(device, sizeof(values));
    for (int i = 0; i < N; i++) {
        if (getenv("STRATA_TEST_SLOW") && SHAPES[i].rows > 1000)
            SHAPES[i].rows /= 16;
        size_t row_bytes = tensor_type_bytes(SHAPES[i].type, SHAPES[i].width, 1);
        bytes[i] = malloc(SHAPES[i].rows * row_bytes);
        weights_fill(SHAPES[i].type, bytes[i], SHAPES[i].width, SHAPES[i].rows, &random);
        sources[i] = (struct source){bytes[i], row_bytes, UINT32_MAX};
        packed[i] = new_matrix(SHAPES[i].type, SHAPES[i].rows, SHAPES[i].width, SHAPES[i].table);
        loaded[i] = new_matrix(SHAPES[i].type, SHAPES[i].rows, SHAPES[i].width, SHAPES[i].table);
    }
    for (int i = 0; i < N; i++) { // nobody waits in between
        struct matrix_source source = {read_rows, &sources[i]};
        ck_assert_msg(ops->matrix_load(device, &loaded[i], &source, &error) == 0, "%s", error.text);
        for (int k = 0; k < 1000; k++)
            values[k] = (float)(1000 * i + k);
        ops->upload(device, beside, values, sizeof(values));
    }
    ck_assert_msg(ops->sync(device, &error) == 0, "%s", error.text);
    ops->download(device, back, beside, sizeof(back));
    ck_assert_mem_eq(back, values, sizeof(values));
    for (int i = 0; i < N; i++) {
        unsigned char *a = malloc(loaded[i].bytes), *b = malloc(loaded[i].bytes);
        ck_assert_int_eq(ops->matrix_pack(device, &packed[i], bytes[i], &error), 0);
        ops->download(device, a, loaded[i].data, loaded[i].bytes);
        ops->download(device, b, packed[i].data, packed[i].bytes);
        ck_assert_msg(memcmp(a, b, loaded[i].bytes) == 0, "matrix %d differs", i);
        ops->free(device, loaded[i].data);
        ops->free(device, packed[i].data);
        free(a);
        free(b);
        free(bytes[i]);
    }
    ops->free(device, beside);
    ck_assert_int_eq(ops->sync(device, &error), 0);
}
END_TEST

START_TEST(test_a_reader_that_fails_is_told_once)
{
    enum { ROWS = 9000, WIDTH = 4096 };
    size_t row_bytes = tensor_type_bytes(TENSOR_Q4_K, WIDTH, 1);
    unsigned char *bytes = calloc(ROWS, row_bytes);
    struct source good = {bytes, row_bytes, UINT32_MAX}, bad = {bytes, row_bytes, 8000};
    struct matrix first = new_matrix(TENSOR_Q4_K, ROWS, WIDTH, false),
                  second = new_matrix(TENSOR_Q4_K, ROWS, WIDTH, false);
    for (int again = 0; again < 2; again++) {
        struct matrix_source source = {read_rows, &bad};
        error = (struct error){0};
        int status = ops->matrix_load(device, &first, &source, &error);
        source.context = &good;
        if (!status)
            status = ops->matrix_load(device, &second, &source, &error);
        if (!status)
            status = ops->sync(device, &error);
        ck_assert_int_eq(status, STATUS_CORRUPT);
        ck_assert_str_eq(error.text, "row 8000 is bad");
        ck_assert_int_eq(ops->sync(device, &error), 0);
        ck_assert_int_eq(ops->matrix_load(device, &second, &source, &error), 0);
        ck_assert_int_eq(ops->sync(device, &error), 0);
    }
    struct matrix_source source = {read_rows, &good};
    ck_assert_int_eq(ops->matrix_load(device, &first, &source, &error), 0);
    ops->free(device, first.data); // while it is read: nobody may write to it afterwards
    ops->free(device, second.data);
    ck_assert_int_eq(ops->sync(device, &error), 0);
    free(bytes);
}
END_TEST

START_TEST(test_scratch_memory_is_reserved_and_given_back)
{
    struct scratch_shape shape = {.type = TENSOR_Q4_K,
                                  .rows = 14336,
                                  .width = 4096,
                                  .reads_prompts = true,
                                  .n_heads = 32,
                                  .head_size = 128,
                                  .generated = 64,
                                  .pages = 128};
    size_t bytes = ops->scratch_bytes(device, &shape);
    ck_assert_uint_ge(bytes, (size_t)14336 * 4096 * 2);
    shape.reads_prompts = false;
    ck_assert_uint_le(ops->scratch_bytes(device, &shape), bytes);
    uint64_t before = device_memory_free(device);
    ck_assert_int_eq(ops->reserve(device, bytes, &error), 0);
    ck_assert_uint_le(device_memory_free(device), before - bytes + (64 << 20)); // others may free meanwhile
    ck_assert_int_eq(ops->reserve(device, 0, &error), 0);
    ck_assert_int_eq(ops->reserve(device, (size_t)1 << 50, &error), STATUS_NO_MEMORY);
    ck_assert_int_eq(ops->sync(device, &error), 0);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("cuda_load");
    TCase *tests = tcase_create("load");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, test_loading_packs_as_packing_does);
    tcase_add_test(tests, test_a_reader_that_fails_is_told_once);
    tcase_add_test(tests, test_scratch_memory_is_reserved_and_given_back);
    suite_add_tcase(suite, tests);
    return suite;
}
