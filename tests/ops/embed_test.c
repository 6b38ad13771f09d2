// Embedding: rows of a table of every type, alone and with learned positions added. The CPU's are exact. CUDA
// may fuse the multiplications and additions of one element: a few units in the last place of its largest
// term.
#include "common/tensor_type.h"
#include "tests/ops/op_fixture.h"
#include "tests/weights.h"

static const uint32_t TYPES[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0, TENSOR_Q4_1,
                                 TENSOR_Q5_0, TENSOR_Q5_1, TENSOR_Q8_0, TENSOR_Q2_K, TENSOR_Q3_K,
                                 TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};

// Random bytes, with all that may be a half or float scale kept finite by clearing a bit of its exponent.
static uint8_t *random_rows(uint32_t type, uint32_t width, uint32_t rows)
{
    size_t bytes = tensor_type_bytes(type, width, rows);
    uint8_t *out = malloc(bytes);
    for (size_t i = 0; i < bytes; i++)
        out[i] = (uint8_t)fixture_next(&fixture_state) & 0xbf;
    return out;
}

static struct matrix put_table(struct device *device, uint32_t type, uint32_t width, uint32_t rows,
                               const void *source)
{
    const struct kernel_ops *ops = device_ops(device);
    struct matrix table = {.type = type, .rows = rows, .width = width, .table = true};
    table.bytes = ops->matrix_bytes(device, type, rows, width, true);
    table.data = fixture_put(device, NULL, table.bytes);
    ck_assert_int_eq(ops->matrix_pack(device, &table, source, NULL), 0);
    return table;
}

// What the formats without a structure of blocks mean, independently; Q8_0 for one that has it.
static float independent_value(uint32_t type, const uint8_t *row, uint32_t i, bool *known)
{
    uint16_t half;
    float value;
    *known = true;
    switch (type) {
    case TENSOR_F32:
        memcpy(&value, row + 4 * i, 4);
        return value;
    case TENSOR_BF16: {
        memcpy(&half, row + 2 * i, 2);
        int exponent = half >> 7 & 255, mantissa = half & 127;
        double size = exponent ? ldexp(128 + mantissa, exponent - 134) : ldexp(mantissa, -133);
        return (float)(half >> 15 ? -size : size);
    }
    case TENSOR_Q8_0:
        memcpy(&half, row + i / 32 * 34, 2);
        return cpu_f16_to_f32(half) * (float)(int8_t)row[i / 32 * 34 + 2 + i % 32];
    default:
        *known = false;
        return 0;
    }
}

static double allowed(uint32_t type, const uint8_t *row, uint32_t i, float place)
{
    double gross;
    weights_value(type, row, i, &gross);
    return fixture_on_cuda() ? 0x1p-22 * (gross + fabs(place)) : 0;
}

static void check_type(uint32_t type, uint32_t level, uint32_t threads)
{
    enum { ROWS = 40, PLACES = 90 };
    uint32_t width = type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_BF16 ? 75 : 512;
    uint32_t n_tokens = 1 + fixture_below(70);
    struct device *device = fixture_open(level, threads);
    uint8_t *rows = random_rows(type, width, ROWS), *places = random_rows(TENSOR_F32, width, PLACES);
    struct matrix table = put_table(device, type, width, ROWS, rows);
    struct matrix positions = put_table(device, TENSOR_F32, width, PLACES, places);
    int32_t tokens[70];
    uint32_t at[70];
    for (uint32_t t = 0; t < n_tokens; t++) {
        tokens[t] = t == 0 ? ROWS - 1 : (int32_t)fixture_below(ROWS);
        at[t] = t == 0 ? PLACES - 1 : fixture_below(PLACES);
    }
    struct batch batch = {.n_tokens = n_tokens,
                          .tokens = fixture_put(device, tokens, sizeof tokens),
                          .positions = fixture_put(device, at, sizeof at)};
    float *there = fixture_put(device, NULL, (size_t)n_tokens * width * sizeof *there);
    float *x = malloc((size_t)n_tokens * width * sizeof *x);
    float *expected = malloc(width * sizeof *expected);
    for (int learned = 0; learned < 2; learned++) {
        device_ops(device)->embed(device, there, &table, learned ? &positions : NULL, &batch);
        fixture_get(device, x, there, (size_t)n_tokens * width * sizeof *x);
        for (uint32_t t = 0; t < n_tokens; t++) {
            const uint8_t *row = rows + tensor_type_bytes(type, width, 1) * (size_t)tokens[t];
            cpu_dequantize_row(type, row, expected, width);
            for (uint32_t i = 0; i < width; i++) {
                bool known;
                float value = independent_value(type, row, i, &known), place;
                ck_assert(!known || value == expected[i]);
                memcpy(&place, places + ((size_t)at[t] * width + i) * 4, 4);
                float sum = learned ? expected[i] + place : expected[i], got = x[(size_t)t * width + i];
                ck_assert_msg(got == sum || fabs((double)got - sum) <= allowed(type, row, i, place),
                              "type %u token %u element %u: %g, not %g", type, t, i, got, sum);
            }
        }
    }
    free(expected);
    free(x);
    free(rows);
    free(places);
    fixture_drop(device, there);
    fixture_drop(device, batch.tokens);
    fixture_drop(device, batch.positions);
    fixture_drop(device, table.data);
    fixture_drop(device, positions.data);
    fixture_close(device);
}

START_TEST(test_type)
{
    fixture_seed(tensor_type_info(TYPES[_i])->name);
    for (int i = 0; i < fixture_levels(); i++)
        for (uint32_t threads = 1; threads <= 3; threads++)
            if (!fixture_lacks(fixture_level(i)))
                check_type(TYPES[_i], fixture_level(i), threads);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("embed");
    TCase *tcase = tcase_create("embed");
    tcase_add_loop_test(tcase, test_type, 0, sizeof TYPES / sizeof *TYPES);
    suite_add_tcase(suite, tcase);
    return suite;
}
