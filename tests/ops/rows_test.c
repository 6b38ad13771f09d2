// norm, ffn_activate and the storing of activations, at every level, against f64; and the bits of a row
// whatever the batch and the number of threads.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu_internal.h"
#include "tests/suite.h"
#include "tests/weights.h"

static const uint32_t LEVELS[] = {LEVEL_PORTABLE, LEVEL_AVX2, LEVEL_AVX512};
enum { N_LEVELS = 3 };

static struct device *open_level(int index, uint32_t threads)
{
    struct device_options options = {.level = LEVELS[index], .threads = threads};
    struct error error;
    struct device *device;
    ck_assert_msg(!device_open(&device, &options, &error), "%s", error.text);
    return device;
}

static bool missing(int index)
{
    return LEVELS[index] > device_best_level("cpu", 0);
}

static struct activation make_activation(struct device *device, uint32_t width, uint32_t rows, unsigned forms)
{
    struct activation a = {.width = width, .rows = rows, .forms = forms};
    a.data =
        device_ops(device)->alloc(device, device_ops(device)->activation_bytes(device, width, rows, forms));
    ck_assert_ptr_nonnull(a.data);
    return a;
}

static float *random_floats(size_t count, float scale, uint64_t *random)
{
    float *values = malloc(count * sizeof(float));
    for (size_t i = 0; i < count; i++)
        values[i] = scale * random_signed(random);
    return values;
}

static const float *row_of(const struct activation *a, uint32_t row)
{
    struct cpu_activation_rows rows = cpu_activation_rows(a);
    return rows.floats + row * rows.float_stride;
}

static void check_half(const struct cpu_q8_block *block, int half, const float *x, uint32_t count)
{
    float most = 0;
    int sum = 0;
    for (uint32_t i = 0; i < 16; i++) {
        float value = i < count ? x[i] : 0;
        int q = block->q[16 * half + (int)i];
        most = fmaxf(most, fabsf(value));
        sum += q;
        double steps = most > 0 ? value / (double)block->scale[half] : 0;
        ck_assert_msg(fabs(steps - q) <= 0.50001, "%g steps became %d", steps, q);
    }
    ck_assert_float_eq(block->scale[half], most / 127);
    ck_assert_int_eq(block->minus_sum[half], -sum);
    ck_assert_float_eq(block->scaled_sum[half], block->scale[half] * (float)sum);
}

// Each half's codes are the nearest to value / scale, its sums are those of the codes; floats are untouched.
START_TEST(test_store)
{
    uint64_t random = random_seed("test_store");
    if (missing(_i) || LEVELS[_i] == LEVEL_PORTABLE)
        return;
    struct device *device = open_level(_i, 1);
    static const uint32_t WIDTHS[] = {32, 64, 576, 33, 7, 95};
    for (int w = 0; w < 6; w++) {
        uint32_t width = WIDTHS[w];
        struct activation a = make_activation(device, width, 3, FORM_F32 | FORM_Q8);
        struct cpu_activation_rows rows = cpu_activation_rows(&a);
        ck_assert_uint_eq((uintptr_t)rows.q8 % 64, 0);
        for (uint32_t t = 0; t < 3; t++) {
            float *x = random_floats(width, ldexpf(1, (int)t * 20 - 20), &random);
            cpu_activation_store_row(cpu_device_of(device), &a, t, x);
            ck_assert(!memcmp(row_of(&a, t), x, width * sizeof(float)));
            const struct cpu_q8_block *block = (const struct cpu_q8_block *)(rows.q8 + t * rows.q8_stride);
            for (uint32_t first = 0; first < width; first += 32, block++) {
                check_half(block, 0, x + first, width - first);
                check_half(block, 1, x + first + 16, width > first + 16 ? width - first - 16 : 0);
                ck_assert_float_eq(block->scaled_total, block->scaled_sum[0] + block->scaled_sum[1]);
            }
            free(x);
        }
        device_ops(device)->free(device, a.data);
    }
    device_close(device);
}
END_TEST

START_TEST(test_store_zero_and_tiny)
{
    if (missing(_i) || LEVELS[_i] == LEVEL_PORTABLE)
        return;
    struct device *device = open_level(_i, 1);
    struct activation a = make_activation(device, 64, 1, FORM_Q8);
    float x[64] = {0};
    x[40] = 1e-40f;
    cpu_activation_store_row(cpu_device_of(device), &a, 0, x);
    const struct cpu_q8_block *block = (const struct cpu_q8_block *)cpu_activation_rows(&a).q8;
    for (int b = 0; b < 2; b++) {
        for (int half = 0; half < 2; half++) {
            ck_assert_float_eq(block[b].scale[half], 0);
            ck_assert_float_eq(block[b].scaled_sum[half], 0);
            ck_assert_int_eq(block[b].minus_sum[half], 0);
        }
        ck_assert_float_eq(block[b].scaled_total, 0);
        for (int i = 0; i < 32; i++)
            ck_assert_int_eq(block[b].q[i], 0);
    }
    device_ops(device)->free(device, a.data);
    device_close(device);
}
END_TEST

// A row stored in spans is the row stored at once.
START_TEST(test_store_spans)
{
    uint64_t random = random_seed("test_store_spans");
    if (missing(_i))
        return;
    struct device *device = open_level(_i, 1);
    unsigned forms = LEVELS[_i] == LEVEL_PORTABLE ? FORM_F32 : FORM_F32 | FORM_Q8;
    struct activation whole = make_activation(device, 200, 2, forms),
                      parts = make_activation(device, 200, 2, forms);
    float *x = random_floats(200, 3, &random);
    cpu_activation_store_row(cpu_device_of(device), &whole, 1, x);
    cpu_activation_store_span(cpu_device_of(device), &parts, 1, 128, 72, x + 128);
    cpu_activation_store_span(cpu_device_of(device), &parts, 1, 0, 96, x);
    cpu_activation_store_span(cpu_device_of(device), &parts, 1, 96, 32, x + 96);
    size_t bytes = device_ops(device)->activation_bytes(device, 200, 2, forms);
    ck_assert(!memcmp(whole.data, parts.data, bytes));
    free(x);
    device_ops(device)->free(device, whole.data);
    device_ops(device)->free(device, parts.data);
    device_close(device);
}
END_TEST

static void check_norm(struct device *device, enum norm_kind kind, uint32_t width, bool biased,
                       uint64_t *random)
{
    enum { ROWS = 5 };
    const uint32_t index[3] = {4, 0, 2};
    const float epsilon = 1e-5f;
    struct activation a = make_activation(device, width, ROWS, FORM_F32);
    float *x = random_floats(ROWS * width, 4, random), *weight = random_floats(width, 2, random);
    float *bias = random_floats(width, 1, random);
    for (uint32_t i = 0; i < ROWS * width; i++)
        x[i] += 1; // a mean that matters
    device_ops(device)->norm(device, &a, x, index, 3, kind, weight, biased ? bias : NULL, epsilon);
    for (uint32_t t = 0; t < 3; t++) {
        const float *row = x + index[t] * width;
        double mean = 0, variance = 0;
        for (uint32_t i = 0; i < width; i++)
            mean += row[i] / (double)width;
        mean = kind == NORM_LAYER ? mean : 0;
        for (uint32_t i = 0; i < width; i++)
            variance += (row[i] - mean) * (row[i] - mean) / width;
        for (uint32_t i = 0; i < width; i++) {
            double scaled = (row[i] - mean) / sqrt(variance + epsilon) * weight[i];
            double expected = scaled + (biased ? bias[i] : 0);
            // A few roundings: of the mean (relative to x, not to the difference), the factors, the sum.
            double allowed =
                0x1p-22 * (fabs(scaled) + fabs(expected) + 5 * fabs(weight[i]) / sqrt(variance + epsilon));
            if (fabs(row_of(&a, t)[i] - expected) > allowed)
                ck_abort_msg("%s width %u row %u [%u]: %.9g, not %.9g", device_describe(device), width, t, i,
                             row_of(&a, t)[i], expected);
        }
    }
    free(x);
    free(weight);
    free(bias);
    device_ops(device)->free(device, a.data);
}

START_TEST(test_norm)
{
    static const uint32_t WIDTHS[] = {1, 7, 8, 16, 31, 576, 2048, 2049};
    uint64_t random = random_seed("test_norm");
    if (missing(_i))
        return;
    struct device *device = open_level(_i, 2);
    for (int w = 0; w < 8; w++)
        for (int i = 0; i < 4; i++)
            check_norm(device, i % 2 ? NORM_LAYER : NORM_RMS, WIDTHS[w], i / 2, &random);
    device_close(device);
}
END_TEST

static void check_ffn(struct device *device, uint32_t width, bool gated, float scale, uint64_t *random)
{
    enum { ROWS = 3 };
    uint32_t stride = width + 5;
    struct activation a = make_activation(device, width, ROWS, FORM_F32);
    float *gate = random_floats(ROWS * stride, scale, random),
          *up = random_floats(ROWS * stride, scale, random);
    gate[0] = scale;
    up[1] = -scale;
    device_ops(device)->ffn_activate(device, &a, gated ? gate : NULL, up, stride, ROWS);
    for (uint32_t t = 0; t < ROWS; t++) {
        for (uint32_t i = 0; i < width; i++) {
            double u = up[t * stride + i], g = gate[t * stride + i];
            double y = gated ? g : 2 * sqrt(2 / M_PI) * (u + 0.044715 * u * u * u);
            double expected = gated ? g / (1 + exp(-y)) * u : u / (1 + exp(-y));
            // e^-y is off by a unit or two, and by as many units as y is large for each of y's roundings;
            // where e^-y is large, all of it shows. The portable GELU takes 1 + tanh, which cancels to 2^-53.
            double allowed =
                0x1p-23 * (4 + (gated ? 1 : 3) * fabs(y)) * fabs(expected) + 0x1p-52 * fabs(u) + 1e-36;
            if (fabs(row_of(&a, t)[i] - expected) > allowed)
                ck_abort_msg("%s %s(%.9g, %.9g) = %.9g, not %.9g", device_describe(device),
                             gated ? "silu" : "gelu", g, u, row_of(&a, t)[i], expected);
        }
    }
    free(gate);
    free(up);
    device_ops(device)->free(device, a.data);
}

START_TEST(test_ffn)
{
    static const uint32_t WIDTHS[] = {1, 9, 32, 1536, 8192, 1030};
    static const float SCALES[] = {0.1f, 8, 80, 1e4f};
    uint64_t random = random_seed("test_ffn");
    if (missing(_i))
        return;
    struct device *device = open_level(_i, 2);
    for (int w = 0; w < 6; w++)
        for (int i = 0; i < 8; i++)
            check_ffn(device, WIDTHS[w], i % 2, SCALES[i / 2], &random);
    device_close(device);
}
END_TEST

// The same row gives the same bits alone and in a batch, with one thread and with four.
START_TEST(test_batch_invariance)
{
    enum { ROWS = 40, WIDTH = 1056 };
    uint64_t random = random_seed("test_batch_invariance");
    if (missing(_i))
        return;
    float *x = random_floats(ROWS * WIDTH, 4, &random), *w = random_floats(WIDTH, 2, &random);
    uint8_t *first[2] = {NULL, NULL};
    for (uint32_t threads = 1; threads <= 4; threads++) {
        struct device *device = open_level(_i, threads);
        const struct kernel_ops *ops = device_ops(device);
        unsigned forms = ops->matrix_forms(device, TENSOR_Q4_0);
        size_t row_bytes = ops->activation_bytes(device, WIDTH, 1, forms);
        struct activation all = make_activation(device, WIDTH, ROWS, forms),
                          one = make_activation(device, WIDTH, 1, forms);
        for (int op = 0; op < 2; op++) {
            if (op)
                ops->ffn_activate(device, &all, x, x, WIDTH, ROWS);
            else
                ops->norm(device, &all, x, NULL, ROWS, NORM_RMS, w, NULL, 1e-6f);
            for (uint32_t t = 0; t < ROWS; t++) {
                const float *row = x + t * WIDTH;
                if (op)
                    ops->ffn_activate(device, &one, row, row, WIDTH, 1);
                else
                    ops->norm(device, &one, x, &t, 1, NORM_RMS, w, NULL, 1e-6f);
                ck_assert(!memcmp(one.data, (uint8_t *)all.data + t * row_bytes, row_bytes));
            }
            if (!first[op])
                first[op] = memcpy(malloc(ROWS * row_bytes), all.data, ROWS * row_bytes);
            ck_assert(!memcmp(first[op], all.data, ROWS * row_bytes));
        }
        ops->free(device, all.data);
        ops->free(device, one.data);
        device_close(device);
    }
    free(first[0]);
    free(first[1]);
    free(x);
    free(w);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("rows");
    TCase *tcase = tcase_create("rows");
    tcase_set_timeout(tcase, 60);
    tcase_add_loop_test(tcase, test_store, 0, N_LEVELS);
    tcase_add_loop_test(tcase, test_store_zero_and_tiny, 0, N_LEVELS);
    tcase_add_loop_test(tcase, test_store_spans, 0, N_LEVELS);
    tcase_add_loop_test(tcase, test_norm, 0, N_LEVELS);
    tcase_add_loop_test(tcase, test_ffn, 0, N_LEVELS);
    tcase_add_loop_test(tcase, test_batch_invariance, 0, N_LEVELS);
    suite_add_tcase(suite, tcase);
    return suite;
}
