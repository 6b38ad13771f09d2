// matmul at every level and type, against products computed in f64 from the types' own definitions
// (matmul_problem.h says what is allowed), and the same bits whatever the batch and the number of threads.
#include "tests/ops/matmul_problem.h"

START_TEST(test_products)
{
    uint64_t random = random_seed("test_products");
    static const uint32_t ROWS[] = {1, 15, 16, 17, 33}, COLUMNS[] = {1, 2, 3, 5, 8, 17};
    static const uint32_t WIDTHS[] = {32, 64, 96, 576, 256, 768}, FLOAT_WIDTHS[] = {1, 7, 16, 33, 96, 257};
    uint32_t type = WEIGHT_TYPES[_i % N_WEIGHT_TYPES], level = fixture_level(_i / (int)N_WEIGHT_TYPES);
    if (fixture_lacks(level))
        return;
    struct device *device = fixture_open(level, 2);
    uint32_t block = tensor_type_info(type)->block_weights;
    for (int i = 0; i < 40; i++) {
        uint32_t width = block == 1 ? FLOAT_WIDTHS[i % 6] : WIDTHS[i % 6];
        if (block == 256)
            width = 256 * (1 + (uint32_t)i % 3);
        uint32_t columns = COLUMNS[random_bits(&random) % 6];
        uint32_t n_generated = (uint32_t)(random_bits(&random) % (columns + 1));
        struct problem p = make_problem(type, ROWS[random_bits(&random) % 5], width, columns, i % 2, &random);
        check_problem(device, &p, n_generated);
        free_problem(&p);
    }
    fixture_close(device);
}
END_TEST

// Every code and scale at its extreme, with the largest activations: integer sums must not overflow or
// saturate.
START_TEST(test_extremes)
{
    static const uint8_t BYTES[] = {0x00, 0xff, 0x80, 0x7f};
    static const float EVEN[] = {127, -127, 127, 1}, ODD[] = {127, -127, -127, 127};
    uint64_t random = random_seed("test_extremes");
    uint32_t type = WEIGHT_TYPES[_i % N_WEIGHT_TYPES], level = fixture_level(_i / (int)N_WEIGHT_TYPES);
    if (fixture_lacks(level) || tensor_type_info(type)->block_weights == 1)
        return;
    struct device *device = fixture_open(level, 1);
    for (int i = 0; i < 16; i++) {
        struct problem p = make_problem(type, 16, 256, 4, true, &random);
        weights_fill_codes(type, p.weights, 256, 16, BYTES[i % 4], &random);
        problem_define(&p);
        for (uint32_t k = 0; k < 4 * 256; k++)
            p.x[k] = k % 2 ? ODD[i / 4] : EVEN[i / 4];
        check_problem(device, &p, 4 * (i % 2));
        free_problem(&p);
    }
    fixture_close(device);
}
END_TEST

// A column's product is the same bits alone, in any batch, at any place in it, and with any number of
// threads. (What differs between generated and prompt tokens: matmul_classes_test.c.)
START_TEST(test_batch_invariance)
{
    enum { COLUMNS = 33, ROWS = 83 };
    uint64_t random = random_seed("test_batch_invariance");
    uint32_t type = WEIGHT_TYPES[_i % N_WEIGHT_TYPES], level = fixture_level(_i / (int)N_WEIGHT_TYPES);
    if (fixture_lacks(level))
        return;
    struct problem p = make_problem(type, ROWS, 768, COLUMNS, false, &random);
    size_t stride = problem_stride(&p);
    float *alone = malloc(COLUMNS * stride * sizeof(float)), *out = malloc(COLUMNS * stride * sizeof(float));
    for (uint32_t threads = 1; threads <= (fixture_on_cuda() ? 1 : 4); threads++) {
        struct device *device = fixture_open(level, threads);
        problem_put(device, &p);
        for (uint32_t t = 0; threads == 1 && t < COLUMNS; t++)
            multiply(device, &p, t, 1, 1, alone + t * stride);
        for (uint32_t count = 1; count <= COLUMNS; count += count < 9 ? 1 : 8) {
            uint32_t first = (uint32_t)(random_bits(&random) % (COLUMNS - count + 1));
            multiply(device, &p, first, count, count, out);
            ck_assert_msg(!memcmp(out, alone + first * stride, count * stride * sizeof(float)),
                          "%s %s: columns %u..%u differ from the same alone", device_describe(device),
                          tensor_type_info(type)->name, first, first + count - 1);
        }
        problem_drop(device, &p);
        fixture_close(device);
    }
    free(alone);
    free(out);
    free_problem(&p);
}
END_TEST

// The two vector levels do the same operations in the same order.
START_TEST(test_levels_agree)
{
    enum { COLUMNS = 7, ROWS = 33 };
    uint64_t random = random_seed("test_levels_agree");
    uint32_t type = WEIGHT_TYPES[_i];
    if (fixture_on_cuda() || fixture_lacks(LEVEL_AVX512))
        return;
    struct problem p = make_problem(type, ROWS, 512, COLUMNS, false, &random);
    float out[2][COLUMNS * (ROWS + PROBLEM_GAP)];
    for (int i = 0; i < 2; i++) {
        struct device *device = fixture_open(i ? LEVEL_AVX512 : LEVEL_AVX2, 1);
        problem_put(device, &p);
        multiply(device, &p, 0, COLUMNS, 0, out[i]);
        problem_drop(device, &p);
        fixture_close(device);
    }
    ck_assert_msg(!memcmp(out[0], out[1], sizeof(out[0])), "%s: avx2 and avx512 differ",
                  tensor_type_info(type)->name);
    free_problem(&p);
}
END_TEST

enum { PARTS = 4, PART_COLUMNS = 9, PART_WIDTH = 256, PART_STRIDE = 100 };

struct part_buffers {
    float before[PART_COLUMNS * PART_STRIDE], plain[PART_COLUMNS * PART_STRIDE],
        out[PART_COLUMNS * PART_STRIDE], bias[PART_STRIDE];
};

static void check_part(struct part_buffers *b, const struct matmul_part *part, int index)
{
    for (uint32_t at = 0; at < PART_COLUMNS * PART_STRIDE; at++) {
        uint32_t n = at % PART_STRIDE;
        double expected = b->before[at];
        if (n < part->weight->rows)
            expected =
                (double)b->plain[at] + (part->bias ? b->bias[n] : 0) + (part->accumulate ? b->before[at] : 0);
        if (!(fabs(b->out[at] - expected) <= 1e-5 + 0x1p-22 * fabs(expected)))
            ck_abort_msg("part %d, column %u, row %u: %g, not %g", index, at / PART_STRIDE, n, b->out[at],
                         expected);
    }
}

// Four parts of different types and sizes at once, with biases and accumulation, equal each part on its own.
static void check_parts(struct device *device, uint32_t n_generated, uint64_t *random)
{
    static const uint32_t TYPES[PARTS] = {TENSOR_Q4_1, TENSOR_Q6_K, TENSOR_F16, TENSOR_Q8_0};
    static const uint32_t ROWS[PARTS] = {96, 1, 33, 17};
    static struct part_buffers b;
    const struct kernel_ops *ops = device_ops(device);
    struct problem p[PARTS];
    struct matmul_part parts[PARTS];
    unsigned forms = 0;
    for (uint32_t i = 0; i < PART_STRIDE; i++)
        b.bias[i] = random_signed(random);
    for (uint32_t i = 0; i < PART_COLUMNS * PART_STRIDE; i++)
        b.before[i] = random_signed(random);
    float *bias = fixture_put(device, b.bias, sizeof b.bias),
          *plain = fixture_put(device, NULL, sizeof b.plain);
    for (int i = 0; i < PARTS; i++) {
        p[i] = make_problem(TYPES[i], ROWS[i], PART_WIDTH, PART_COLUMNS, false, random);
        problem_put(device, &p[i]);
        forms |= ops->matrix_forms(device, TYPES[i]);
        float *out = fixture_put(device, b.before, sizeof b.before);
        parts[i] = (struct matmul_part){&p[i].matrix, i % 2 ? NULL : bias, out, PART_STRIDE, i >= 2};
    }
    struct activation x = fixture_activation(device, PART_WIDTH, PART_COLUMNS, forms, n_generated);
    ops->store(device, &x, p[0].x_there, PART_COLUMNS);
    ops->matmul(device, &x, PART_COLUMNS, parts, PARTS);
    for (int i = 0; i < PARTS; i++) {
        struct matmul_part single = {&p[i].matrix, NULL, plain, PART_STRIDE, false};
        ops->matmul(device, &x, PART_COLUMNS, &single, 1);
        fixture_get(device, b.plain, plain, sizeof b.plain);
        fixture_get(device, b.out, parts[i].out, sizeof b.out);
        check_part(&b, &parts[i], i);
        fixture_drop(device, parts[i].out);
        problem_drop(device, &p[i]);
        free_problem(&p[i]);
    }
    fixture_drop(device, x.data);
    fixture_drop(device, plain);
    fixture_drop(device, bias);
}

START_TEST(test_parts)
{
    uint64_t random = random_seed("test_parts");
    uint32_t level = fixture_level(_i);
    if (fixture_lacks(level))
        return;
    struct device *device = fixture_open(level, 3);
    check_parts(device, 0, &random);
    check_parts(device, 4, &random);
    check_parts(device, PART_COLUMNS, &random);
    fixture_close(device);
}
END_TEST

// Enough columns for several chunks, and an activation with room for more rows than are used.
START_TEST(test_many_columns)
{
    enum { COLUMNS = 400, WIDTH = 2048 };
    uint64_t random = random_seed("test_many_columns");
    if (fixture_lacks(fixture_level(_i)))
        return;
    struct device *device = fixture_open(fixture_level(_i), 2);
    struct problem p = make_problem(TENSOR_Q4_K, 40, WIDTH, COLUMNS, true, &random);
    problem_put(device, &p);
    check_columns(device, &p, COLUMNS, 0);
    check_columns(device, &p, COLUMNS - 50, COLUMNS - 50);
    problem_drop(device, &p);
    free_problem(&p);
    fixture_close(device);
}
END_TEST

START_TEST(test_refusals)
{
    struct device *device =
        fixture_open(fixture_lacks(fixture_level(_i)) ? LEVEL_PORTABLE : fixture_level(_i), 1);
    const struct kernel_ops *ops = device_ops(device);
    struct error error = {0};
    ck_assert_uint_eq(ops->matrix_bytes(device, TENSOR_Q4_0, 4, 33, false), 0);
    ck_assert_uint_eq(ops->matrix_bytes(device, 77, 4, 32, false), 0);
    struct matrix matrix = {.type = TENSOR_Q4_K, .rows = 2, .width = 32};
    ck_assert_int_eq(ops->matrix_pack(device, &matrix, "", &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "2 x 32"));
    fixture_close(device);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("matmul");
    TCase *tcase = tcase_create("matmul");
    int types = (int)N_WEIGHT_TYPES, levels = fixture_levels();
    tcase_set_timeout(tcase, 120);
    tcase_add_loop_test(tcase, test_products, 0, types * levels);
    tcase_add_loop_test(tcase, test_extremes, 0, types * levels);
    tcase_add_loop_test(tcase, test_batch_invariance, 0, types * levels);
    tcase_add_loop_test(tcase, test_levels_agree, 0, types);
    tcase_add_loop_test(tcase, test_parts, 0, levels);
    tcase_add_loop_test(tcase, test_many_columns, 0, levels);
    tcase_add_loop_test(tcase, test_refusals, 0, levels);
    suite_add_tcase(suite, tcase);
    return suite;
}
