// project and project_qkv against the ops they are made of, bit for bit, whatever a backend does at once:
// over types and mixes of types, biases, counts of rows of either class, with a gate and without, heads of
// all sizes, both pairings. At the best level of the backend under test.
#include "tests/ops/op_fixture.h"
#include "tests/weights.h"

enum { MOST_ROWS = 80, TABLE = 24 };

struct stage { // what one call reads, and the two results: [0] as one, [1] in parts
    struct device *device;
    const struct kernel_ops *ops;
    uint32_t rows, generated, width;
    struct matrix weights[3];
    float *biases[3];
    uint32_t n_parts, stride; // floats of a row of out
    float *x, *norm, *norm_bias, *out[2];
    enum norm_kind kind;
    uint64_t *random;
};

static uint32_t pick(uint32_t n)
{
    return fixture_below(n);
}

static bool maybe(void)
{
    return fixture_below(2) == 1;
}

static float *put_normals(struct stage *s, size_t count, float scale)
{
    float *host = malloc(count * sizeof *host);
    fixture_normals(host, count, scale);
    float *device = fixture_put(s->device, host, count * sizeof *host);
    free(host);
    return device;
}

static void put_weight(struct stage *s, struct matrix *matrix, uint32_t type, uint32_t rows)
{
    size_t bytes = (size_t)rows * tensor_type_bytes(type, s->width, 1);
    void *source = malloc(bytes);
    struct error error = {0};
    weights_fill(type, source, s->width, rows, s->random);
    *matrix = (struct matrix){.type = type, .rows = rows, .width = s->width};
    matrix->bytes = s->ops->matrix_bytes(s->device, type, rows, s->width, false);
    matrix->data = fixture_put(s->device, NULL, matrix->bytes);
    ck_assert_msg(s->ops->matrix_pack(s->device, matrix, source, &error) == 0, "%s", error.text);
    free(source);
}

// Types that stand together in files, and any two.
static void pick_types(uint32_t *types, uint32_t count)
{
    static const uint32_t MIXES[][2] = {
        {TENSOR_Q4_K, TENSOR_Q6_K}, {TENSOR_Q5_K, TENSOR_Q6_K}, {TENSOR_Q4_K, TENSOR_Q4_K}};
    uint32_t any[2] = {WEIGHT_TYPES[pick((uint32_t)N_WEIGHT_TYPES)],
                       WEIGHT_TYPES[pick((uint32_t)N_WEIGHT_TYPES)]};
    uint32_t mix = pick(6);
    if (mix >= 4)
        any[1] = any[0];
    for (uint32_t i = 0; i < count; i++)
        types[i] = mix < 3 ? MIXES[mix][pick(2)] : any[pick(2)];
}

// Of `rows` of x; matrices of `part_rows` and `types`.
static void open_stage(struct stage *s, uint64_t *random, uint32_t rows, uint32_t width, uint32_t n_parts,
                       const uint32_t *part_rows, const uint32_t *types)
{
    s->device = fixture_open(fixture_best_level(), 2);
    s->ops = device_ops(s->device);
    s->random = random;
    s->n_parts = n_parts;
    s->width = width;
    s->rows = rows;
    s->generated = pick(4) ? rows : pick(rows + 1);
    s->kind = pick(4) ? NORM_RMS : NORM_LAYER;
    s->x = put_normals(s, (size_t)s->rows * s->width, 1);
    s->norm = put_normals(s, s->width, 1);
    s->norm_bias = s->kind == NORM_LAYER ? put_normals(s, s->width, 1) : NULL;
    for (uint32_t p = 0; p < n_parts; p++) {
        put_weight(s, &s->weights[p], types[p], part_rows[p]);
        s->biases[p] = maybe() ? put_normals(s, part_rows[p], 1) : NULL;
        s->stride += part_rows[p];
    }
    for (int way = 0; way < 2; way++)
        s->out[way] = fixture_put(s->device, NULL, (size_t)s->rows * s->stride * sizeof(float));
}

// Of any size that is quickly done, one row often; widths are of whole blocks of 256 where the types ask for
// them, and now and then of many.
static void open_small_stage(struct stage *s, uint64_t *random, uint32_t n_parts, const uint32_t *part_rows)
{
    uint32_t types[3], block = 32, rows = pick(4) ? 1 + pick(10) : 1 + pick(MOST_ROWS);
    pick_types(types, n_parts);
    for (uint32_t p = 0; p < n_parts; p++)
        block = tensor_type_info(types[p])->block_weights > block ? 256 : block;
    uint32_t width = block == 256 || pick(2) ? 256 * (1 + pick(pick(4) ? 6 : 40)) : block * (1 + pick(48));
    open_stage(s, random, pick(3) ? rows : 1, width, n_parts, part_rows, types);
}

static void close_stage(struct stage *s)
{
    const void *all[] = {s->x, s->norm, s->norm_bias, s->out[0], s->out[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (all[i])
            fixture_drop(s->device, all[i]);
    }
    for (uint32_t p = 0; p < s->n_parts; p++) {
        fixture_drop(s->device, s->weights[p].data);
        if (s->biases[p])
            fixture_drop(s->device, s->biases[p]);
    }
    fixture_close(s->device);
}

static unsigned forms_of(const struct stage *s)
{
    unsigned forms = 0;
    for (uint32_t p = 0; p < s->n_parts; p++)
        forms |= s->ops->matrix_forms(s->device, s->weights[p].type);
    return forms;
}

static struct row_norm norm_of(const struct stage *s)
{
    return (struct row_norm){s->x, s->kind, s->norm, s->norm_bias, 1e-5f};
}

static void parts_of(const struct stage *s, struct matmul_part *parts, int way)
{
    float *out = s->out[way];
    for (uint32_t p = 0; p < s->n_parts; p++) {
        parts[p] = (struct matmul_part){&s->weights[p], s->biases[p], out, s->stride, false};
        out += s->weights[p].rows;
    }
}

// The norm and the products, apart.
static void multiply_apart(const struct stage *s, struct activation *x, const struct matmul_part *parts)
{
    struct row_norm norm = norm_of(s);
    s->ops->norm(s->device, x, norm.x, NULL, s->rows, norm.kind, norm.weight, norm.bias, norm.epsilon);
    s->ops->matmul(s->device, x, s->rows, parts, s->n_parts);
}

// `bytes` of both results, the second of which is expected.
static void expect_same(const struct stage *s, const char *what, const void *got, const void *expected,
                        size_t bytes)
{
    unsigned char *a = malloc(bytes), *b = malloc(bytes);
    fixture_get(s->device, a, got, bytes);
    fixture_get(s->device, b, expected, bytes);
    for (size_t i = 0; i < bytes; i++) {
        if (a[i] != b[i])
            ck_abort_msg("%s differ at byte %zu of %zu: %u rows, %u generated, width %u, types %u %u %u",
                         what, i, bytes, s->rows, s->generated, s->width, s->weights[0].type,
                         s->weights[1].type, s->weights[2].type);
    }
    free(a);
    free(b);
}

// project as one, and in parts.
static void expect_its_parts(struct stage *s, bool gated)
{
    uint32_t n_parts = s->n_parts, rows = s->weights[0].rows;
    struct matmul_part parts[2];
    struct activation x[2], inner[2];
    unsigned forms = s->ops->matrix_forms(s->device, TENSOR_Q4_K);
    for (int way = 0; way < 2; way++) {
        x[way] = fixture_activation(s->device, s->width, s->rows, forms_of(s), s->generated);
        inner[way] = fixture_activation(s->device, rows, s->rows, forms, s->generated);
    }
    struct row_norm norm = norm_of(s);
    parts_of(s, parts, 0);
    s->ops->project(s->device, &x[0], s->rows, &norm, parts, n_parts, gated ? &inner[0] : NULL);
    parts_of(s, parts, 1);
    multiply_apart(s, &x[1], parts);
    if (gated) {
        s->ops->ffn_activate(s->device, &inner[1], parts[0].out, parts[1].out, s->stride, s->rows);
        ck_assert(inner[0].unit == inner[1].unit);
        expect_same(s, "activations", inner[0].data, inner[1].data,
                    s->ops->activation_bytes(s->device, rows, s->rows, forms));
    } else {
        expect_same(s, "products", s->out[0], s->out[1], (size_t)s->rows * s->stride * sizeof(float));
    }
    for (int way = 0; way < 2; way++) {
        fixture_drop(s->device, x[way].data);
        fixture_drop(s->device, inner[way].data);
    }
}

START_TEST(test_project_is_its_parts)
{
    uint64_t random = random_seed("test_project_is_its_parts") + (uint64_t)_i;
    fixture_state = random;
    struct stage s = {0};
    uint32_t rows[2] = {1 + pick(400), 1 + pick(200)}, n_parts = 1 + pick(2);
    bool gated = n_parts == 2 && maybe();
    rows[1] = gated ? rows[0] : rows[1];
    open_small_stage(&s, &random, n_parts, rows);
    expect_its_parts(&s, gated);
    close_stage(&s);
}
END_TEST

// So many tiles and rows that a GPU's backend may make product and gate one kernel; both of one type.
START_TEST(test_wide_gate_is_its_parts)
{
    uint64_t random = random_seed("test_wide_gate_is_its_parts") + (uint64_t)_i;
    fixture_state = random;
    struct stage s = {0};
    uint32_t width = 256u << pick(fixture_is_slow() ? 3 : 5), rows[2], types[2];
    rows[0] = rows[1] = (pick(4) ? 8200 : 4300) + pick(600);
    types[0] = types[1] = WEIGHT_TYPES[pick((uint32_t)N_WEIGHT_TYPES)];
    open_stage(&s, &random, 17 + pick(MOST_ROWS - 17), width, 2, rows, types);
    expect_its_parts(&s, true);
    close_stage(&s);
}
END_TEST

// Every token its own sequence, in any slot, with pages of its own.
static struct batch put_batch(const struct stage *s)
{
    uint32_t *positions = malloc(s->rows * 4), *slots = malloc(s->rows * 4);
    uint32_t *tables = malloc((size_t)s->rows * TABLE * 4);
    struct batch_span *spans = malloc(s->rows * sizeof *spans);
    for (uint32_t t = 0; t < s->rows; t++) {
        positions[t] = pick(TABLE * KV_PAGE_POSITIONS);
        slots[t] = (t + 3) % s->rows;
        spans[t] = (struct batch_span){t, 1, slots[t], positions[t]};
    }
    for (uint32_t i = 0; i < s->rows * TABLE; i++)
        tables[i] = i / TABLE;
    struct batch batch = {.n_tokens = s->rows,
                          .n_spans = s->rows,
                          .n_generated = s->generated,
                          .positions = fixture_put(s->device, positions, s->rows * 4),
                          .slots = fixture_put(s->device, slots, s->rows * 4),
                          .spans = fixture_put(s->device, spans, s->rows * sizeof *spans),
                          .page_tables = fixture_put(s->device, tables, (size_t)s->rows * TABLE * 4),
                          .table_stride = TABLE};
    free(positions);
    free(slots);
    free(tables);
    free(spans);
    return batch;
}

static void drop_batch(const struct stage *s, const struct batch *batch)
{
    const void *all[] = {batch->positions, batch->slots, batch->spans, batch->page_tables};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        fixture_drop(s->device, all[i]);
}

// How heads are made: sizes, pairing, norms.
static struct qkv_args put_heads(const struct stage *s, const struct attention_shape *shape)
{
    uint32_t dims = pick(3) ? shape->head_size : shape->head_size / 2;
    bool normed = pick(4) == 0;
    struct qkv_args qkv = {.norm_epsilon = 1e-5f, .position = (enum position_kind)pick(3), .rope_dims = dims};
    float *frequencies = malloc(dims / 2 * sizeof *frequencies);
    for (uint32_t i = 0; i < dims / 2; i++)
        frequencies[i] = (float)pow(10000, -2.0 * i / dims);
    qkv.q_stride = qkv.k_stride = qkv.v_stride = s->stride;
    qkv.rope_frequency = fixture_put(s->device, frequencies, dims / 2 * sizeof *frequencies);
    qkv.q_norm = qkv.k_norm = NULL;
    if (normed) {
        float *weights = malloc(shape->head_size * sizeof *weights);
        fixture_normals(weights, shape->head_size, 1);
        qkv.q_norm = fixture_put(s->device, weights, shape->head_size * sizeof *weights);
        qkv.k_norm = fixture_put(s->device, weights, shape->head_size * sizeof *weights);
        free(weights);
    }
    free(frequencies);
    return qkv;
}

static void expect_same_queries(const struct stage *s, uint32_t q_width)
{
    for (uint32_t t = 0; t < s->rows; t++)
        expect_same(s, "queries", s->out[0] + (size_t)t * s->stride, s->out[1] + (size_t)t * s->stride,
                    q_width * sizeof(float));
}

START_TEST(test_project_qkv_is_its_parts)
{
    static const uint32_t SIZES[] = {32, 64, 80, 96, 128, 256};
    uint64_t random = random_seed("test_project_qkv_is_its_parts") + (uint64_t)_i;
    fixture_state = random;
    struct stage s = {0};
    struct attention_shape shape = {.n_kv_heads = 1 + pick(3), .head_size = SIZES[pick(6)], .scale = 1};
    shape.n_heads = shape.n_kv_heads * (1 + pick(3));
    uint32_t q_width = shape.n_heads * shape.head_size, k_width = shape.n_kv_heads * shape.head_size;
    uint32_t separate[3] = {q_width, k_width, k_width}, fused[1] = {q_width + 2 * k_width};
    bool one = pick(3) == 0;
    open_small_stage(&s, &random, one ? 1 : 3, one ? fused : separate);
    struct batch batch = put_batch(&s);
    struct qkv_args qkv = put_heads(&s, &shape);
    size_t page_bytes = s.ops->kv_page_bytes(s.device, shape.n_kv_heads, shape.head_size);
    struct row_norm norm = norm_of(&s);
    struct kv_layer kv[2];
    struct activation x[2];
    struct matmul_part parts[3];
    for (int way = 0; way < 2; way++) {
        x[way] = fixture_activation(s.device, s.width, s.rows, forms_of(&s), s.generated);
        kv[way] = (struct kv_layer){fixture_put(s.device, NULL, s.rows * page_bytes), page_bytes};
        qkv.q = s.out[way];
        qkv.k = qkv.q + q_width;
        qkv.v = qkv.k + k_width;
        parts_of(&s, parts, way);
        if (way == 0) {
            s.ops->project_qkv(s.device, &x[0], &norm, parts, s.n_parts, &qkv, &shape, &kv[0], &batch);
        } else {
            multiply_apart(&s, &x[1], parts);
            s.ops->attn_prepare(s.device, &qkv, &shape, &kv[1], &batch);
        }
    }
    expect_same_queries(&s, q_width);
    expect_same(&s, "pages", kv[0].data, kv[1].data, s.rows * page_bytes);
    for (int way = 0; way < 2; way++) {
        fixture_drop(s.device, x[way].data);
        fixture_drop(s.device, kv[way].data);
    }
    const void *heads[] = {qkv.rope_frequency, qkv.q_norm, qkv.k_norm};
    for (int i = 0; i < 3; i++) {
        if (heads[i])
            fixture_drop(s.device, heads[i]);
    }
    drop_batch(&s, &batch);
    close_stage(&s);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("project");
    TCase *tests = tcase_create("project");
    int rounds = fixture_is_slow() ? 10 : 60;
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, test_project_is_its_parts, 0, rounds);
    tcase_add_loop_test(tests, test_wide_gate_is_its_parts, 0, fixture_is_slow() ? 3 : 30);
    tcase_add_loop_test(tests, test_project_qkv_is_its_parts, 0, rounds);
    suite_add_tcase(suite, tests);
    return suite;
}
