// norm, ffn_activate and the storing of activations, at every level, against f64; and the bits of a row
// whatever the batch and the number of threads.
//
// CUDA keeps activations as halves of x / unit: 2^-11 of each value, at least 2^-25 of the unit
// (fixture_storing); the unit of ffn_activate is 32, so that its products reach 2^21 before they are cut off.
// Its sums and exponentials are f32, of a few units more error than the CPU's.
#include "tests/ops/op_fixture.h"
#include "tests/weights.h"

static bool missing(int index)
{
    return fixture_lacks(fixture_level(index));
}

static struct device *open_level(int index, uint32_t threads)
{
    return fixture_open(fixture_level(index), threads);
}

static bool without_blocks(int index) // of the CPU's 8-bit form
{
    return fixture_on_cuda() || missing(index) || fixture_level(index) == LEVEL_PORTABLE;
}

static struct activation make_activation(struct device *device, uint32_t width, uint32_t rows, unsigned forms)
{
    return fixture_activation(device, width, rows, forms, 0);
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
    if (without_blocks(_i))
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
    if (without_blocks(_i))
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
    if (fixture_on_cuda() || missing(_i))
        return;
    struct device *device = open_level(_i, 1);
    unsigned forms = fixture_level(_i) == LEVEL_PORTABLE ? FORM_F32 : FORM_F32 | FORM_Q8;
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

// --- both backends ---

// An activation whose rows can be read back as floats.
static struct activation make_readable(struct device *device, uint32_t width, uint32_t rows,
                                       uint32_t n_generated)
{
    unsigned forms = fixture_on_cuda() ? device_ops(device)->matrix_forms(device, TENSOR_F32) : FORM_F32;
    return fixture_activation(device, width, rows, forms, n_generated);
}

static void expect_row(struct device *device, const struct activation *a, uint32_t row,
                       const double *expected, const double *allowed, const char *what)
{
    float *got = malloc(a->width * sizeof *got);
    fixture_activation_row(device, a, row, got);
    for (uint32_t i = 0; i < a->width; i++)
        if (!(fabs(got[i] - expected[i]) <= allowed[i]))
            ck_abort_msg("%s %s, width %u, row %u of %u (%u generated) [%u]: %.9g, not %.9g within %.2g",
                         device_describe(device), what, a->width, row, a->rows, a->n_generated, i, got[i],
                         expected[i], allowed[i]);
    free(got);
}

static void check_store(struct device *device, uint32_t width, uint32_t rows, uint32_t n_generated,
                        uint64_t *random)
{
    struct activation a = make_readable(device, width, rows, n_generated);
    float *x = random_floats((size_t)rows * width, 100, random);
    float *there = fixture_put(device, x, (size_t)rows * width * sizeof *x);
    double *expected = malloc(2 * width * sizeof *expected), *allowed = expected + width;
    device_ops(device)->store(device, &a, there, rows);
    for (uint32_t t = 0; t < rows; t++) {
        for (uint32_t i = 0; i < width; i++) {
            expected[i] = x[t * width + i];
            allowed[i] = fixture_storing(expected[i], a.unit == 0 ? 1 : a.unit);
        }
        expect_row(device, &a, t, expected, allowed, "store");
    }
    free(expected);
    free(x);
    fixture_drop(device, there);
    fixture_drop(device, a.data);
}

// Rows of both classes come back, of any width; and what lies between them is untouched.
START_TEST(test_store_rows)
{
    static const uint32_t WIDTHS[] = {8, 32, 64, 255, 256, 264, 576, 33, 7, 4096};
    uint64_t random = random_seed("test_store_rows");
    if (missing(_i))
        return;
    struct device *device = open_level(_i, 2);
    for (int w = 0; w < 10; w++) {
        check_store(device, WIDTHS[w], 3, 0, &random);
        check_store(device, WIDTHS[w], 3, 3, &random);
        check_store(device, WIDTHS[w], 70, 66, &random);
    }
    fixture_close(device);
}
END_TEST

// Row 0 of `into` is what norm makes of row[0..width), row 1 what it may be off by.
static void define_norm(double *expected, double *allowed, const float *row, const float *weight,
                        const float *bias, uint32_t width, enum norm_kind kind, double epsilon)
{
    double mean = 0, variance = 0, unit = fixture_on_cuda() ? 0x1p-20 : 0x1p-22;
    for (uint32_t i = 0; i < width; i++)
        mean += row[i] / (double)width;
    mean = kind == NORM_LAYER ? mean : 0;
    for (uint32_t i = 0; i < width; i++)
        variance += (row[i] - mean) * (row[i] - mean) / width;
    for (uint32_t i = 0; i < width; i++) {
        double scaled = (row[i] - mean) / sqrt(variance + epsilon) * weight[i];
        expected[i] = scaled + (bias ? bias[i] : 0);
        // A few roundings: of the mean (relative to x, not to the difference), the factors, the sum.
        allowed[i] =
            unit * (fabs(scaled) + fabs(expected[i]) + 5 * fabs(weight[i]) / sqrt(variance + epsilon)) +
            fixture_storing(expected[i], 1);
    }
}

static void check_norm(struct device *device, enum norm_kind kind, uint32_t width, bool biased,
                       uint32_t n_generated, uint64_t *random)
{
    enum { ROWS = 5, CHOSEN = 3 };
    const uint32_t index[CHOSEN] = {4, 0, 2};
    const float epsilon = 1e-5f;
    struct activation a = make_readable(device, width, ROWS, n_generated);
    float *x = random_floats(ROWS * width, 4, random), *weight = random_floats(width, 2, random);
    float *bias = random_floats(width, 1, random);
    double *expected = malloc(2 * width * sizeof *expected);
    for (uint32_t i = 0; i < ROWS * width; i++)
        x[i] += 1; // a mean that matters
    float *x_there = fixture_put(device, x, ROWS * width * sizeof *x);
    float *weight_there = fixture_put(device, weight, width * sizeof *x);
    float *bias_there = biased ? fixture_put(device, bias, width * sizeof *x) : NULL;
    uint32_t *index_there = fixture_put(device, index, sizeof index);
    for (int gathered = 0; gathered < 2; gathered++) {
        uint32_t rows = gathered ? CHOSEN : ROWS;
        device_ops(device)->norm(device, &a, x_there, gathered ? index_there : NULL, rows, kind, weight_there,
                                 bias_there, epsilon);
        for (uint32_t t = 0; t < rows; t++) {
            define_norm(expected, expected + width, x + (gathered ? index[t] : t) * width, weight,
                        biased ? bias : NULL, width, kind, epsilon);
            expect_row(device, &a, t, expected, expected + width, "norm");
        }
    }
    const void *all[] = {x_there, weight_there, index_there, a.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        fixture_drop(device, all[i]);
    if (biased)
        fixture_drop(device, bias_there);
    free(expected);
    free(x);
    free(weight);
    free(bias);
}

START_TEST(test_norm)
{
    static const uint32_t WIDTHS[] = {1, 7, 8, 16, 31, 576, 2048, 2049, 8192};
    uint64_t random = random_seed("test_norm");
    if (missing(_i))
        return;
    struct device *device = open_level(_i, 2);
    for (int w = 0; w < 9; w++)
        for (int i = 0; i < 4; i++)
            check_norm(device, i % 2 ? NORM_LAYER : NORM_RMS, WIDTHS[w], i / 2, (uint32_t)(w + i) % 4 * 2 % 5,
                       &random);
    fixture_close(device);
}
END_TEST

// silu(g) u, or gelu(u), and what it may be off by.
static double define_ffn(double g, double u, bool gated, double unit, double *allowed)
{
    double y = gated ? g : 2 * sqrt(2 / M_PI) * (u + 0.044715 * u * u * u);
    double expected = gated ? g / (1 + exp(-y)) * u : u / (1 + exp(-y));
    // e^-y is off by a unit or two, and by as many units as y is large for each of y's roundings;
    // where e^-y is large, all of it shows. The portable GELU takes 1 + tanh, which cancels to 2^-53.
    *allowed = 0x1p-23 * (4 + (gated ? 1 : 3) * fabs(y)) * fabs(expected) + 0x1p-52 * fabs(u) + 1e-36;
    if (!fixture_on_cuda())
        return expected;
    *allowed = 4 * *allowed + fixture_storing(expected, unit) + (gated ? 0 : 0x1p-22 * fabs(u));
    return fmax(fmin(expected, 65504 * unit), -65504 * unit);
}

static void check_ffn(struct device *device, uint32_t width, bool gated, float scale, uint32_t n_generated,
                      uint64_t *random)
{
    enum { ROWS = 3 };
    uint32_t stride = width + 5;
    size_t bytes = ROWS * stride * sizeof(float);
    struct activation a = make_readable(device, width, ROWS, n_generated);
    float *gate = random_floats(ROWS * stride, scale, random),
          *up = random_floats(ROWS * stride, scale, random);
    gate[0] = scale;
    up[1] = -scale;
    float *gate_there = fixture_put(device, gate, bytes), *up_there = fixture_put(device, up, bytes);
    double *expected = malloc(2 * width * sizeof *expected);
    device_ops(device)->ffn_activate(device, &a, gated ? gate_there : NULL, up_there, stride, ROWS);
    for (uint32_t t = 0; t < ROWS; t++) {
        for (uint32_t i = 0; i < width; i++)
            expected[i] = define_ffn(gate[t * stride + i], up[t * stride + i], gated,
                                     a.unit == 0 ? 1 : a.unit, &expected[width + i]);
        expect_row(device, &a, t, expected, expected + width, gated ? "silu" : "gelu");
    }
    free(expected);
    free(gate);
    free(up);
    fixture_drop(device, gate_there);
    fixture_drop(device, up_there);
    fixture_drop(device, a.data);
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
            check_ffn(device, WIDTHS[w], i % 2, SCALES[i / 2], (uint32_t)(w + i) % 4, &random);
    fixture_close(device);
}
END_TEST

// --- the same bits ---

enum { BATCH = 40, GENERATED = 25, BATCH_WIDTH = 1056 };

// All that is kept of a row: on the CPU the bytes of all its forms, which are one row of a batch that has
// one.
static size_t bits_of(struct device *device, const struct activation *a, uint32_t row, uint8_t *out)
{
    if (fixture_on_cuda()) {
        fixture_activation_row(device, a, row, (float *)out);
        return a->width * sizeof(float);
    }
    size_t bytes = device_ops(device)->activation_bytes(device, a->width, 1, a->forms);
    memcpy(out, (uint8_t *)a->data + row * bytes, bytes);
    return bytes;
}

static void run_row_op(struct device *device, int op, struct activation *out, const float *x, const float *w,
                       uint32_t rows)
{
    if (op == 0)
        device_ops(device)->norm(device, out, x, NULL, rows, NORM_RMS, w, NULL, 1e-6f);
    else if (op == 1)
        device_ops(device)->ffn_activate(device, out, x, x, BATCH_WIDTH, rows);
    else
        device_ops(device)->store(device, out, x, rows);
}

// The same row gives the same bits alone and in a batch, with one thread and with four.
START_TEST(test_batch_invariance)
{
    enum { OPS = 3, ROOM = 4 * BATCH_WIDTH * sizeof(float) };
    uint64_t random = random_seed("test_batch_invariance");
    if (missing(_i))
        return;
    float *x = random_floats(BATCH * BATCH_WIDTH, 4, &random), *w = random_floats(BATCH_WIDTH, 2, &random);
    static uint8_t first[OPS][BATCH][ROOM], together[ROOM], alone[ROOM];
    for (uint32_t threads = 1; threads <= 4; threads++) {
        struct device *device = open_level(_i, threads);
        unsigned forms = device_ops(device)->matrix_forms(device, TENSOR_Q4_0);
        float *x_there = fixture_put(device, x, BATCH * BATCH_WIDTH * sizeof *x);
        float *w_there = fixture_put(device, w, BATCH_WIDTH * sizeof *x);
        struct activation all = fixture_activation(device, BATCH_WIDTH, BATCH, forms, GENERATED),
                          one = fixture_activation(device, BATCH_WIDTH, 1, forms, 1);
        for (int op = 0; op < OPS; op++) {
            run_row_op(device, op, &all, x_there, w_there, BATCH);
            for (uint32_t t = 0; t < BATCH; t++) {
                one.n_generated = t < GENERATED;
                run_row_op(device, op, &one, x_there + t * BATCH_WIDTH, w_there, 1);
                size_t bytes = bits_of(device, &all, t, together);
                ck_assert_uint_le(bytes, ROOM);
                ck_assert_uint_eq(bits_of(device, &one, 0, alone), bytes);
                ck_assert_msg(!memcmp(together, alone, bytes), "op %d, row %u: other bits alone", op, t);
                if (threads == 1)
                    memcpy(first[op][t], together, bytes);
                ck_assert_msg(!memcmp(together, first[op][t], bytes), "op %d, row %u, %u threads", op, t,
                              threads);
            }
        }
        const void *there[] = {x_there, w_there, all.data, one.data};
        for (size_t i = 0; i < sizeof there / sizeof *there; i++)
            fixture_drop(device, there[i]);
        fixture_close(device);
    }
    free(x);
    free(w);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("rows");
    TCase *tcase = tcase_create("rows");
    tcase_set_timeout(tcase, 60);
    tcase_add_loop_test(tcase, test_store, 0, fixture_levels());
    tcase_add_loop_test(tcase, test_store_zero_and_tiny, 0, fixture_levels());
    tcase_add_loop_test(tcase, test_store_spans, 0, fixture_levels());
    tcase_add_loop_test(tcase, test_store_rows, 0, fixture_levels());
    tcase_add_loop_test(tcase, test_norm, 0, fixture_levels());
    tcase_add_loop_test(tcase, test_ffn, 0, fixture_levels());
    tcase_add_loop_test(tcase, test_batch_invariance, 0, fixture_levels());
    suite_add_tcase(suite, tcase);
    return suite;
}
