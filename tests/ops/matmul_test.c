// matmul at every level and type, against products computed in f64 from the types' own definitions.
//
// What is allowed: at the portable level, one rounding of each weight and of the result. Elsewhere
// activations are rounded to 8 bits, 16 of them under one scale, so that each is off by at most half a step,
// max / 254, and a sum by that times the weights; and f32 sums are off by a unit for each of their additions.
// Activations that are whole multiples of their step are not rounded at all; with those the bound is
// that of the sums alone, far narrower.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/cpu_types.h"
#include "tests/suite.h"
#include "tests/weights.h"

struct problem {
    uint32_t type, rows, width, columns;
    uint8_t *weights; // GGUF's layout
    float *x;         // [columns][width]
    double *values;   // [rows][width]: the weights, as define() works them out
    double *gross;    // and the magnitudes of their terms
    struct matrix matrix;
    struct activation activation;
};

static struct device *open_level(uint32_t level, uint32_t threads)
{
    struct device_options options = {.level = level, .threads = threads};
    struct error error;
    struct device *device;
    ck_assert_msg(!device_open(&device, &options, &error), "%s", error.text);
    return device;
}

// Values, 16 by 16: random; or (exact) whole numbers times a power of two, the largest 127.
static void fill_column(float *x, uint32_t width, bool exact, uint64_t *random)
{
    for (uint32_t first = 0; first < width; first += 16) {
        int exponent = (int)(random_bits(random) % 5) - 4;
        uint32_t peak = (uint32_t)(random_bits(random) % 16);
        for (uint32_t i = 0; i < 16 && first + i < width; i++) {
            int whole = (int)(random_bits(random) % 255) - 127;
            x[first + i] = exact ? ldexpf((float)(i == peak ? 127 : whole), exponent)
                                 : ldexpf(random_signed(random), exponent);
        }
        if (exact && first + peak >= width)
            x[first] = ldexpf(127, exponent);
    }
}

static void pack(struct device *device, struct problem *p)
{
    const struct kernel_ops *ops = device_ops(device);
    struct error error;
    p->matrix = (struct matrix){.type = p->type, .rows = p->rows, .width = p->width};
    p->matrix.bytes = ops->matrix_bytes(device, p->type, p->rows, p->width, false);
    p->matrix.data = ops->alloc(device, p->matrix.bytes);
    ck_assert_ptr_nonnull(p->matrix.data);
    ck_assert_msg(!ops->matrix_pack(device, &p->matrix, p->weights, &error), "%s", error.text);
    unsigned forms = ops->matrix_forms(device, p->type);
    p->activation = (struct activation){.width = p->width, .rows = p->columns, .forms = forms};
    p->activation.data = ops->alloc(device, ops->activation_bytes(device, p->width, p->columns, forms));
    ck_assert_ptr_nonnull(p->activation.data);
    for (uint32_t t = 0; t < p->columns; t++)
        cpu_activation_store_row(cpu_device_of(device), &p->activation, t, p->x + (size_t)t * p->width);
}

static void unpack(struct device *device, struct problem *p)
{
    device_ops(device)->free(device, p->matrix.data);
    device_ops(device)->free(device, p->activation.data);
}

// Works out the values of p->weights.
static void define(struct problem *p)
{
    size_t row_bytes = tensor_type_bytes(p->type, p->width, 1), at = 0;
    for (uint32_t n = 0; n < p->rows; n++)
        for (uint32_t k = 0; k < p->width; k++, at++)
            p->values[at] = weights_value(p->type, p->weights + n * row_bytes, k, &p->gross[at]);
}

static struct problem make_problem(uint32_t type, uint32_t rows, uint32_t width, uint32_t columns, bool exact,
                                   uint64_t *random)
{
    struct problem p = {.type = type, .rows = rows, .width = width, .columns = columns};
    p.weights = malloc(tensor_type_bytes(type, width, rows));
    p.x = malloc((size_t)columns * width * sizeof(float));
    p.values = malloc((size_t)rows * width * sizeof(double));
    p.gross = malloc((size_t)rows * width * sizeof(double));
    weights_fill(type, p.weights, width, rows, random);
    define(&p);
    for (uint32_t t = 0; t < columns; t++)
        fill_column(p.x + (size_t)t * width, width, exact, random);
    return p;
}

static void free_problem(struct problem *p)
{
    free(p->weights);
    free(p->x);
    free(p->values);
    free(p->gross);
}

// The product in f64 and what a kernel may be off by.
static double reference(const struct problem *p, uint32_t n, uint32_t t, bool quantized, bool exact,
                        double *allowed)
{
    const double *values = p->values + (size_t)n * p->width, *gross = p->gross + (size_t)n * p->width;
    const float *x = p->x + (size_t)t * p->width;
    double sum = 0, gross_sum = 0, rounding = 0;
    for (uint32_t first = 0; first < p->width; first += 16) {
        double most = 0, weights = 0;
        for (uint32_t k = first; k < first + 16 && k < p->width; k++) {
            sum += values[k] * x[k];
            gross_sum += gross[k] * fabs(x[k]);
            weights += fabs(values[k]);
            most = fabs(x[k]) > most ? fabs(x[k]) : most;
        }
        rounding += weights * most / 254;
    }
    // Additions of one f32 sum: for the products and the minimums, if any, one a group of weights; for floats
    // one a k; and a few for the factors.
    struct cpu_type form = cpu_type_of(p->type);
    double additions = (quantized ? p->width / form.group * (form.has_min ? 2 : 1) : p->width) + 8;
    *allowed = additions * 0x1p-24 * (gross_sum + (quantized && !exact ? rounding * 2 : 0)) + 1e-30;
    if (quantized && !exact)
        *allowed += rounding * 1.00001;
    return sum;
}

static const uint32_t LEVELS[] = {LEVEL_PORTABLE, LEVEL_AVX2, LEVEL_AVX512};
enum { N_LEVELS = 3 };

static void check_problem(struct device *device, struct problem *p, bool exact)
{
    pack(device, p);
    size_t stride = p->rows + 3;
    float *out = malloc(p->columns * stride * sizeof(float));
    for (size_t i = 0; i < p->columns * stride; i++)
        out[i] = -77;
    struct matmul_part part = {&p->matrix, NULL, out, (uint32_t)stride, false};
    device_ops(device)->matmul(device, &p->activation, p->columns, &part, 1);
    bool quantized = p->activation.forms & FORM_Q8;
    for (uint32_t t = 0; t < p->columns; t++) {
        for (uint32_t n = 0; n < p->rows; n++) {
            double allowed, expected = reference(p, n, t, quantized, exact, &allowed);
            double got = out[t * stride + n];
            if (fabs(got - expected) > allowed)
                ck_abort_msg("%s %s %ux%u, column %u of %u, row %u: %.9g, expected %.9g within %.3g",
                             device_describe(device), tensor_type_info(p->type)->name, p->rows, p->width, t,
                             p->columns, n, got, expected, allowed);
        }
        for (size_t n = p->rows; n < stride; n++)
            if (out[t * stride + n] != -77)
                ck_abort_msg("written behind the last row");
    }
    free(out);
    unpack(device, p);
}

START_TEST(test_products)
{
    uint64_t random = random_seed("test_products");
    static const uint32_t ROWS[] = {1, 15, 16, 17, 33}, COLUMNS[] = {1, 2, 3, 5, 8, 17};
    static const uint32_t WIDTHS[] = {32, 64, 96, 576, 256, 768}, FLOAT_WIDTHS[] = {1, 7, 16, 33, 96, 257};
    uint32_t type = WEIGHT_TYPES[_i % N_WEIGHT_TYPES], level = LEVELS[_i / (int)N_WEIGHT_TYPES];
    if (level > device_best_level("cpu", 0))
        return;
    struct device *device = open_level(level, 2);
    uint32_t block = tensor_type_info(type)->block_weights;
    for (int i = 0; i < 40; i++) {
        uint32_t width = block == 1 ? FLOAT_WIDTHS[i % 6] : WIDTHS[i % 6];
        if (block == 256)
            width = 256 * (1 + (uint32_t)i % 3);
        bool exact = i % 2;
        struct problem p = make_problem(type, ROWS[random_bits(&random) % 5], width,
                                        COLUMNS[random_bits(&random) % 6], exact, &random);
        check_problem(device, &p, exact);
        free_problem(&p);
    }
    device_close(device);
}
END_TEST

// Every code and scale at its extreme, with the largest activations: integer sums must not overflow or
// saturate.
START_TEST(test_extremes)
{
    static const uint8_t BYTES[] = {0x00, 0xff, 0x80, 0x7f};
    static const float EVEN[] = {127, -127, 127, 1}, ODD[] = {127, -127, -127, 127};
    uint64_t random = random_seed("test_extremes");
    uint32_t type = WEIGHT_TYPES[_i % N_WEIGHT_TYPES], level = LEVELS[_i / (int)N_WEIGHT_TYPES];
    if (level > device_best_level("cpu", 0) || tensor_type_info(type)->block_weights == 1)
        return;
    struct device *device = open_level(level, 1);
    for (int i = 0; i < 16; i++) {
        struct problem p = make_problem(type, 16, 256, 4, true, &random);
        weights_fill_codes(type, p.weights, 256, 16, BYTES[i % 4], &random);
        define(&p);
        for (uint32_t k = 0; k < 4 * 256; k++)
            p.x[k] = k % 2 ? ODD[i / 4] : EVEN[i / 4];
        check_problem(device, &p, true);
        free_problem(&p);
    }
    device_close(device);
}
END_TEST

// All columns of a problem at once.
static void multiply(struct device *device, const struct problem *p, uint32_t first, uint32_t count,
                     float *out)
{
    struct activation x = p->activation;
    struct activation part_of = {.width = x.width, .rows = count, .forms = x.forms};
    const struct kernel_ops *ops = device_ops(device);
    part_of.data = ops->alloc(device, ops->activation_bytes(device, x.width, count, x.forms));
    for (uint32_t t = 0; t < count; t++)
        cpu_activation_store_row(cpu_device_of(device), &part_of, t, p->x + (size_t)(first + t) * p->width);
    struct matmul_part part = {&p->matrix, NULL, out, p->rows, false};
    ops->matmul(device, &part_of, count, &part, 1);
    ops->free(device, part_of.data);
}

// A column's product is the same bits alone, in any batch, at any place in it, and with any number of
// threads.
START_TEST(test_batch_invariance)
{
    enum { COLUMNS = 33, ROWS = 83 };
    uint64_t random = random_seed("test_batch_invariance");
    uint32_t type = WEIGHT_TYPES[_i % N_WEIGHT_TYPES], level = LEVELS[_i / (int)N_WEIGHT_TYPES];
    if (level > device_best_level("cpu", 0))
        return;
    struct problem p = make_problem(type, ROWS, 768, COLUMNS, false, &random);
    float *alone = malloc(COLUMNS * ROWS * sizeof(float)), *out = malloc(COLUMNS * ROWS * sizeof(float));
    for (uint32_t threads = 1; threads <= 4; threads++) {
        struct device *device = open_level(level, threads);
        pack(device, &p);
        for (uint32_t t = 0; threads == 1 && t < COLUMNS; t++)
            multiply(device, &p, t, 1, alone + t * ROWS);
        for (uint32_t count = 1; count <= COLUMNS; count += count < 9 ? 1 : 8) {
            uint32_t first = (uint32_t)(random_bits(&random) % (COLUMNS - count + 1));
            multiply(device, &p, first, count, out);
            ck_assert_msg(!memcmp(out, alone + first * ROWS, count * ROWS * sizeof(float)),
                          "%s %s: columns %u..%u differ from the same alone", device_describe(device),
                          tensor_type_info(type)->name, first, first + count - 1);
        }
        unpack(device, &p);
        device_close(device);
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
    if (device_best_level("cpu", 0) < LEVEL_AVX512)
        return;
    struct problem p = make_problem(type, ROWS, 512, COLUMNS, false, &random);
    float out[2][COLUMNS * ROWS];
    for (int i = 0; i < 2; i++) {
        struct device *device = open_level(i ? LEVEL_AVX512 : LEVEL_AVX2, 1);
        pack(device, &p);
        multiply(device, &p, 0, COLUMNS, out[i]);
        unpack(device, &p);
        device_close(device);
    }
    ck_assert_msg(!memcmp(out[0], out[1], sizeof(out[0])), "%s: avx2 and avx512 differ",
                  tensor_type_info(type)->name);
    free_problem(&p);
}
END_TEST

// Four parts of different types and sizes at once, with biases and accumulation, equal each part on its own.
START_TEST(test_parts)
{
    enum { PARTS = 4, COLUMNS = 9, WIDTH = 256, STRIDE = 100 };
    static const uint32_t TYPES[PARTS] = {TENSOR_Q4_1, TENSOR_Q6_K, TENSOR_F16, TENSOR_Q8_0};
    static const uint32_t ROWS[PARTS] = {96, 1, 33, 17};
    uint64_t random = random_seed("test_parts");
    uint32_t level = LEVELS[_i];
    if (level > device_best_level("cpu", 0))
        return;
    struct device *device = open_level(level, 3);
    const struct kernel_ops *ops = device_ops(device);
    struct problem p[PARTS];
    struct matmul_part parts[PARTS];
    static float plain[PARTS][COLUMNS * STRIDE], out[PARTS][COLUMNS * STRIDE], before[COLUMNS * STRIDE],
        bias[STRIDE];
    struct activation x = {.width = WIDTH, .rows = COLUMNS};
    for (uint32_t i = 0; i < STRIDE; i++)
        bias[i] = random_signed(&random);
    for (uint32_t i = 0; i < COLUMNS * STRIDE; i++)
        before[i] = random_signed(&random);
    for (int i = 0; i < PARTS; i++) {
        p[i] = make_problem(TYPES[i], ROWS[i], WIDTH, COLUMNS, false, &random);
        pack(device, &p[i]);
        x.forms |= ops->matrix_forms(device, TYPES[i]);
        memcpy(out[i], before, sizeof(before));
        parts[i] = (struct matmul_part){&p[i].matrix, i % 2 ? NULL : bias, out[i], STRIDE, i >= 2};
    }
    x.data = ops->alloc(device, ops->activation_bytes(device, WIDTH, COLUMNS, x.forms));
    for (uint32_t t = 0; t < COLUMNS; t++)
        cpu_activation_store_row(cpu_device_of(device), &x, t, p[0].x + t * WIDTH);
    ops->matmul(device, &x, COLUMNS, parts, PARTS);
    for (int i = 0; i < PARTS; i++) {
        struct matmul_part single = {&p[i].matrix, NULL, plain[i], STRIDE, false};
        ops->matmul(device, &x, COLUMNS, &single, 1);
        for (uint32_t t = 0; t < COLUMNS; t++)
            for (uint32_t n = 0; n < STRIDE; n++) {
                uint32_t at = t * STRIDE + n;
                double expected = before[at];
                if (n < ROWS[i])
                    expected = (double)plain[i][at] + (i % 2 ? 0 : bias[n]) + (i >= 2 ? before[at] : 0);
                if (fabs(out[i][at] - expected) > 1e-5)
                    ck_abort_msg("%s part %d, column %u, row %u: %g, not %g", device_describe(device), i, t,
                                 n, out[i][at], expected);
            }
        unpack(device, &p[i]);
        free_problem(&p[i]);
    }
    ops->free(device, x.data);
    device_close(device);
}
END_TEST

// Enough columns for several chunks, and an activation with room for more rows than are used.
START_TEST(test_many_columns)
{
    enum { COLUMNS = 400, WIDTH = 2048 };
    uint64_t random = random_seed("test_many_columns");
    if (device_best_level("cpu", 0) < LEVEL_AVX2)
        return;
    struct device *device = open_level(LEVELS[_i], 2);
    struct problem p = make_problem(TENSOR_Q4_K, 40, WIDTH, COLUMNS, true, &random);
    check_problem(device, &p, true);
    free_problem(&p);
    device_close(device);
}
END_TEST

START_TEST(test_refusals)
{
    struct device *device = open_level(LEVELS[_i] <= device_best_level("cpu", 0) ? LEVELS[_i] : 1, 1);
    const struct kernel_ops *ops = device_ops(device);
    struct error error = {0};
    ck_assert_uint_eq(ops->matrix_bytes(device, TENSOR_Q4_0, 4, 33, false), 0);
    ck_assert_uint_eq(ops->matrix_bytes(device, 77, 4, 32, false), 0);
    struct matrix matrix = {.type = TENSOR_Q4_K, .rows = 2, .width = 32};
    ck_assert_int_eq(ops->matrix_pack(device, &matrix, "", &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "2 x 32"));
    device_close(device);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("matmul");
    TCase *tcase = tcase_create("matmul");
    int types = (int)N_WEIGHT_TYPES;
    tcase_set_timeout(tcase, 120);
    tcase_add_loop_test(tcase, test_products, 0, types * N_LEVELS);
    tcase_add_loop_test(tcase, test_extremes, 0, types * N_LEVELS);
    tcase_add_loop_test(tcase, test_batch_invariance, 0, types * N_LEVELS);
    tcase_add_loop_test(tcase, test_levels_agree, 0, types);
    tcase_add_loop_test(tcase, test_parts, 0, N_LEVELS);
    tcase_add_loop_test(tcase, test_many_columns, 0, N_LEVELS);
    tcase_add_loop_test(tcase, test_refusals, 0, N_LEVELS);
    suite_add_tcase(suite, tcase);
    return suite;
}
