// attn_prepare: normalization of heads, rotation by position in both pairings, and the rounding of k and v
// into pages, against f64 with the C library's sine and cosine.
#include "kernels/cpu/attention_internal.h"
#include "tests/ops/op_fixture.h"

struct prepare_case {
    uint32_t n_heads, n_kv_heads, head_size, rope_dims;
    enum position_kind position;
    bool norm;
    uint32_t n_tokens, most_position;
    float base; // of the frequencies; 0 = 10000
};

// A batch of single positions, each a sequence of its own with all pages of its table the same.
struct prepared {
    float *q, *k, *v; // inputs, packed
    uint32_t *positions;
    float *q_out;
    uint16_t *page; // one for every token
    size_t page_bytes;
};

static const float *norm_weights(const struct prepare_case *shape)
{
    static float weights[512];
    for (uint32_t i = 0; i < shape->head_size; i++)
        weights[i] = 0.5f + (float)(i % 7) / 4;
    return weights;
}

static float frequency_of(const struct prepare_case *shape, uint32_t i)
{
    return (float)pow(shape->base > 0 ? shape->base : 10000, -2.0 * i / shape->rope_dims);
}

static void prepare(struct device *device, const struct prepare_case *shape, struct prepared *out)
{
    const struct kernel_ops *ops = device_ops(device);
    uint32_t n = shape->n_tokens, q_width = shape->n_heads * shape->head_size;
    uint32_t kv_width = shape->n_kv_heads * shape->head_size;
    uint32_t stride = shape->most_position / KV_PAGE_POSITIONS + 1;
    out->page_bytes = ops->kv_page_bytes(device, shape->n_kv_heads, shape->head_size);
    uint32_t *tables = malloc((size_t)n * stride * sizeof *tables), *slots = malloc(n * sizeof *slots);
    struct batch_span *spans = malloc(n * sizeof *spans);
    float *frequencies = calloc(shape->rope_dims / 2 + 1, sizeof *frequencies);
    for (uint32_t t = 0; t < n; t++) {
        slots[t] = t;
        spans[t] = (struct batch_span){t, 1, t, out->positions[t]};
        for (uint32_t i = 0; i < stride; i++)
            tables[(size_t)t * stride + i] = t;
    }
    for (uint32_t i = 0; i < shape->rope_dims / 2; i++)
        frequencies[i] = frequency_of(shape, i);
    struct batch batch = {.n_tokens = n,
                          .n_spans = n,
                          .positions = fixture_put(device, out->positions, n * sizeof(uint32_t)),
                          .slots = fixture_put(device, slots, n * sizeof *slots),
                          .spans = fixture_put(device, spans, n * sizeof *spans),
                          .page_tables = fixture_put(device, tables, (size_t)n * stride * sizeof *tables),
                          .table_stride = stride};
    struct kv_layer kv = {fixture_put(device, NULL, n * out->page_bytes), out->page_bytes};
    float *weights = fixture_put(device, norm_weights(shape), shape->head_size * sizeof(float));
    struct qkv_args qkv = {.q = fixture_put(device, out->q, (size_t)n * q_width * sizeof(float)),
                           .k = fixture_put(device, out->k, (size_t)n * kv_width * sizeof(float)),
                           .v = fixture_put(device, out->v, (size_t)n * kv_width * sizeof(float)),
                           .q_stride = q_width,
                           .k_stride = kv_width,
                           .v_stride = kv_width,
                           .q_norm = shape->norm ? weights : NULL,
                           .k_norm = shape->norm ? weights : NULL,
                           .norm_epsilon = 1e-5f,
                           .position = shape->position,
                           .rope_dims = shape->rope_dims,
                           .rope_frequency = fixture_put(device, frequencies, shape->rope_dims * 2)};
    struct attention_shape attention = {shape->n_heads, shape->n_kv_heads, shape->head_size, 0, 1};
    ops->attn_prepare(device, &qkv, &attention, &kv, &batch);
    ck_assert_int_eq(ops->sync(device, NULL), 0);
    fixture_get(device, out->q_out, qkv.q, (size_t)n * q_width * sizeof(float));
    fixture_get(device, out->page, kv.data, n * out->page_bytes);
    const void *all[] = {batch.positions, batch.slots, batch.spans, batch.page_tables, kv.data, weights,
                         qkv.q,           qkv.k,       qkv.v,       qkv.rope_frequency};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        fixture_drop(device, all[i]);
    free(frequencies);
    free(spans);
    free(slots);
    free(tables);
}

static struct prepared prepared_new(const struct prepare_case *shape)
{
    size_t q = (size_t)shape->n_tokens * shape->n_heads * shape->head_size;
    size_t kv = (size_t)shape->n_tokens * shape->n_kv_heads * shape->head_size;
    size_t padded = (size_t)shape->n_tokens * shape->n_kv_heads * (shape->head_size + 16);
    struct prepared out = {.q = malloc(q * sizeof(float)),
                           .k = malloc(kv * sizeof(float)),
                           .v = malloc(kv * sizeof(float)),
                           .positions = malloc(shape->n_tokens * sizeof(uint32_t)),
                           .q_out = malloc(q * sizeof(float)),
                           .page = malloc(padded * 2 * KV_PAGE_POSITIONS * sizeof(uint16_t))};
    fixture_normals(out.q, q, 2);
    fixture_normals(out.k, kv, 2);
    fixture_normals(out.v, kv, 2);
    for (uint32_t t = 0; t < shape->n_tokens; t++)
        out.positions[t] = t == 0   ? 0
                           : t == 1 ? shape->most_position
                                    : fixture_below(shape->most_position + 1);
    return out;
}

static void prepared_free(struct prepared *out)
{
    free(out->q);
    free(out->k);
    free(out->v);
    free(out->positions);
    free(out->q_out);
    free(out->page);
}

static void reference_head(const struct prepare_case *shape, const float *x, uint32_t position, double *out)
{
    double square = 0;
    for (uint32_t i = 0; i < shape->head_size; i++)
        square += (double)x[i] * x[i];
    for (uint32_t i = 0; i < shape->head_size; i++)
        out[i] = shape->norm ? x[i] / sqrt(square / shape->head_size + 1e-5) * norm_weights(shape)[i] : x[i];
    if (shape->position == POSITION_LEARNED)
        return;
    uint32_t half = shape->rope_dims / 2;
    for (uint32_t i = 0; i < half; i++) {
        uint32_t a = shape->position == POSITION_ROPE_HALVES ? i : 2 * i;
        uint32_t b = shape->position == POSITION_ROPE_HALVES ? i + half : 2 * i + 1;
        fixture_rotate(&out[a], &out[b], (double)position * frequency_of(shape, i));
    }
}

static void check_prepared(const struct prepare_case *shape, const struct prepared *got)
{
    double expected[512];
    uint32_t size = shape->head_size;
    for (uint32_t t = 0; t < shape->n_tokens; t++) {
        for (uint32_t head = 0; head < shape->n_heads; head++) {
            size_t at = ((size_t)t * shape->n_heads + head) * size;
            reference_head(shape, got->q + at, got->positions[t], expected);
            for (uint32_t i = 0; i < size; i++)
                ck_assert_msg(fabs(got->q_out[at + i] - expected[i]) < 3e-6,
                              "q token %u (position %u) head %u element %u: %.9g, not %.9g", t,
                              got->positions[t], head, i, got->q_out[at + i], expected[i]);
        }
        struct kv_layer kv = {got->page, got->page_bytes};
        uint32_t lane = got->positions[t] % KV_PAGE_POSITIONS;
        for (uint32_t head = 0; head < shape->n_kv_heads; head++) {
            size_t at = ((size_t)t * shape->n_kv_heads + head) * size;
            uint16_t *keys = kv_page_head(&kv, t, head, size), *values = kv_head_values(keys, size);
            reference_head(shape, got->k + at, got->positions[t], expected);
            for (uint32_t i = 0; i < size; i++) {
                float k = cpu_f16_to_f32(keys[i * KV_PAGE_POSITIONS + lane]);
                float v = cpu_f16_to_f32(values[lane * kv_padded_size(size) + i]);
                ck_assert_msg(fabs(k - expected[i]) < fabs(expected[i]) * 0x1p-11 + 4e-6,
                              "k token %u head %u element %u: %.9g, not %.9g", t, head, i, k, expected[i]);
                ck_assert_double_eq(v, fixture_half(got->v[at + i]));
            }
        }
    }
}

static const struct prepare_case CASES[] = {
    {9, 3, 64, 64, POSITION_ROPE_ADJACENT, false, 130, 500, 0},
    {4, 2, 128, 128, POSITION_ROPE_HALVES, true, 33, 40000, 0},
    {2, 1, 96, 96, POSITION_ROPE_HALVES, false, 5, MAX_CONTEXT - 1, 0},
    {2, 1, 80, 32, POSITION_ROPE_ADJACENT, false, 70, 1000, 0},
    {3, 3, 80, 20, POSITION_ROPE_HALVES, true, 9, 100, 0},
    {2, 2, 13, 6, POSITION_ROPE_ADJACENT, true, 3, 64, 0},
    {12, 12, 64, 0, POSITION_LEARNED, false, 65, 1023, 0},
    {1, 1, 256, 256, POSITION_ROPE_ADJACENT, false, 64, MAX_CONTEXT - 1, 500},
};

START_TEST(test_shapes)
{
    fixture_seed("rope and kv");
    const struct prepare_case *shape = &CASES[_i];
    struct prepared data = prepared_new(shape), first = prepared_new(shape);
    size_t q_bytes = (size_t)shape->n_tokens * shape->n_heads * shape->head_size * sizeof(float);
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++)
        for (uint32_t threads = 1; threads <= 3; threads++) {
            struct device *device = fixture_open(level, threads);
            prepare(device, shape, &data);
            check_prepared(shape, &data);
            if (level == LEVEL_PORTABLE && threads == 1) {
                memcpy(first.q_out, data.q_out, q_bytes);
                memcpy(first.page, data.page, shape->n_tokens * data.page_bytes);
            }
            ck_assert(!memcmp(first.q_out, data.q_out, q_bytes)); // and the same bits everywhere
            ck_assert(!memcmp(first.page, data.page, shape->n_tokens * data.page_bytes));
            fixture_close(device);
        }
    prepared_free(&first);
    prepared_free(&data);
}
END_TEST

// Angles are kept from layer to layer: a change of anything they are made of must be noticed.
START_TEST(test_angles_follow_changes)
{
    fixture_seed("angles");
    struct prepare_case shapes[] = {
        {1, 1, 32, 32, POSITION_ROPE_ADJACENT, false, 6, 900, 0},
        {1, 1, 32, 32, POSITION_ROPE_ADJACENT, false, 6, 900, 0}, // other positions
        {1, 1, 32, 16, POSITION_ROPE_ADJACENT, false, 6, 900, 0}, // other frequencies
        {1, 1, 32, 16, POSITION_ROPE_HALVES, false, 40, 900, 0},  // more tokens
        {1, 1, 64, 64, POSITION_ROPE_HALVES, false, 5, 900, 0},   // fewer
    };
    struct device *device = fixture_open(device_best_level("cpu", 0), 2);
    for (int round = 0; round < 3; round++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            struct prepared data = prepared_new(&shapes[i]);
            prepare(device, &shapes[i], &data);
            check_prepared(&shapes[i], &data);
            prepare(device, &shapes[i], &data);
            check_prepared(&shapes[i], &data);
            shapes[i].base = 500; // the same positions with other frequencies
            prepare(device, &shapes[i], &data);
            check_prepared(&shapes[i], &data);
            shapes[i].base = 0;
            prepared_free(&data);
        }
    fixture_close(device);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("rope_kv");
    TCase *tcase = tcase_create("rope_kv");
    tcase_set_timeout(tcase, 60);
    tcase_add_loop_test(tcase, test_shapes, 0, sizeof CASES / sizeof *CASES);
    tcase_add_test(tcase, test_angles_follow_changes);
    suite_add_tcase(suite, tcase);
    return suite;
}
