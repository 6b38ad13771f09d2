// Attention over paged KV against a reference in f64, and its bits: the same for a query whatever the chunks
// of its prompt, the company in its batch, the page numbers, the threads, and what lies in unwritten memory.
#include "kernels/cpu/cpu_internal.h"
#include "tests/ops/op_fixture.h"

enum { MOST_SEQUENCES = 6 };

struct attention_case {
    uint32_t n_heads, n_kv_heads, head_size, window;
    uint32_t n_sequences, lengths[MOST_SEQUENCES];
    float peak; // scale of q: how peaked the softmax is
};

// Inputs of all sequences, and what became of them: rows [length] of each.
struct world {
    struct attention_case shape;
    float *q[MOST_SEQUENCES], *k[MOST_SEQUENCES], *v[MOST_SEQUENCES];
};

struct outputs {
    float *rows[MOST_SEQUENCES]; // [length][n_heads * head_size]
};

struct run_options {
    uint32_t level, threads;
    uint32_t chunk;     // positions of a sequence a step
    bool together;      // all sequences in every batch, else one after the other
    uint32_t page_seed; // the order of page ids
};

static struct world *world_new(const struct attention_case *shape)
{
    struct world *world = calloc(1, sizeof *world);
    world->shape = *shape;
    for (uint32_t s = 0; s < shape->n_sequences; s++) {
        size_t q = (size_t)shape->lengths[s] * shape->n_heads * shape->head_size;
        size_t kv = (size_t)shape->lengths[s] * shape->n_kv_heads * shape->head_size;
        world->q[s] = malloc(q * sizeof(float));
        world->k[s] = malloc(kv * sizeof(float));
        world->v[s] = malloc(kv * sizeof(float));
        fixture_normals(world->q[s], q, shape->peak);
        fixture_normals(world->k[s], kv, 1);
        fixture_normals(world->v[s], kv, 1);
    }
    return world;
}

static void world_free(struct world *world)
{
    for (uint32_t s = 0; s < world->shape.n_sequences; s++) {
        free(world->q[s]);
        free(world->k[s]);
        free(world->v[s]);
    }
    free(world);
}

static void outputs_free(struct outputs *outputs)
{
    for (uint32_t s = 0; s < MOST_SEQUENCES; s++)
        free(outputs->rows[s]);
}

// --- one run of the ops ---

struct stage {
    struct device *device;
    const struct world *world;
    struct kv_layer kv;
    uint32_t stride, *tables;
};

static void stage_open(struct stage *stage, const struct world *world, const struct run_options *options)
{
    const struct attention_case *shape = &world->shape;
    stage->device = fixture_open(options->level, options->threads);
    stage->world = world;
    stage->stride = 0;
    for (uint32_t s = 0; s < shape->n_sequences; s++) {
        uint32_t pages = (shape->lengths[s] + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
        stage->stride = pages > stage->stride ? pages : stage->stride;
    }
    uint32_t n_pages = stage->stride * shape->n_sequences + 3;
    uint32_t *ids = fixture_shuffled(n_pages, options->page_seed);
    stage->tables = fixture_put(stage->device, ids, stage->stride * shape->n_sequences * sizeof *ids);
    free(ids);
    const struct kernel_ops *ops = device_ops(stage->device);
    stage->kv.page_bytes = ops->kv_page_bytes(stage->device, shape->n_kv_heads, shape->head_size);
    ck_assert_uint_ge(stage->kv.page_bytes,
                      (size_t)4 * KV_PAGE_POSITIONS * shape->n_kv_heads * shape->head_size);
    uint8_t *garbage = malloc(n_pages * stage->kv.page_bytes);
    memset(garbage, 0xff, n_pages * stage->kv.page_bytes); // NaN as halves
    stage->kv.data = fixture_put(stage->device, garbage, n_pages * stage->kv.page_bytes);
    free(garbage);
}

static void stage_close(struct stage *stage)
{
    fixture_drop(stage->device, stage->tables);
    fixture_drop(stage->device, stage->kv.data);
    fixture_close(stage->device);
}

// Computes the spans in one step and puts the outputs where they belong. slot = number of the sequence.
static void stage_step(struct stage *stage, struct batch_span *spans, uint32_t n_spans,
                       struct outputs *outputs)
{
    const struct world *world = stage->world;
    const struct attention_case *shape = &world->shape;
    struct device *device = stage->device;
    const struct kernel_ops *ops = device_ops(device);
    uint32_t q_width = shape->n_heads * shape->head_size, kv_width = shape->n_kv_heads * shape->head_size;
    uint32_t row_width = q_width + 2 * kv_width + 5,
             n_tokens = 0; // q, k, v side by side, as a fused matrix gives
    for (uint32_t i = 0; i < n_spans; i++) {
        spans[i].first = n_tokens;
        n_tokens += spans[i].count;
    }
    uint32_t *positions = calloc(n_tokens, sizeof *positions), *slots = calloc(n_tokens, sizeof *slots);
    float *rows = calloc((size_t)n_tokens * row_width, sizeof *rows);
    for (uint32_t i = 0; i < n_spans; i++)
        for (uint32_t j = 0; j < spans[i].count; j++) {
            uint32_t t = spans[i].first + j, s = spans[i].slot, position = spans[i].position + j;
            positions[t] = position;
            slots[t] = s;
            float *row = rows + (size_t)t * row_width;
            memcpy(row, world->q[s] + (size_t)position * q_width, q_width * sizeof(float));
            memcpy(row + q_width, world->k[s] + (size_t)position * kv_width, kv_width * sizeof(float));
            memcpy(row + q_width + kv_width, world->v[s] + (size_t)position * kv_width,
                   kv_width * sizeof(float));
        }
    struct batch batch = {.n_tokens = n_tokens,
                          .n_spans = n_spans,
                          .positions = fixture_put(device, positions, n_tokens * sizeof *positions),
                          .slots = fixture_put(device, slots, n_tokens * sizeof *slots),
                          .spans = fixture_put(device, spans, n_spans * sizeof *spans),
                          .page_tables = stage->tables,
                          .table_stride = stage->stride};
    float *on_device = fixture_put(device, rows, (size_t)n_tokens * row_width * sizeof *rows);
    struct attention_shape attention = {shape->n_heads, shape->n_kv_heads, shape->head_size, shape->window,
                                        1 / sqrtf((float)shape->head_size)};
    struct qkv_args qkv = {.q = on_device,
                           .k = on_device + q_width,
                           .v = on_device + q_width + kv_width,
                           .q_stride = row_width,
                           .k_stride = row_width,
                           .v_stride = row_width,
                           .position = POSITION_LEARNED};
    struct activation out = {.width = q_width, .rows = n_tokens, .forms = FORM_F32};
    out.data = fixture_put(device, NULL, ops->activation_bytes(device, q_width, n_tokens, out.forms));
    ops->attn_prepare(device, &qkv, &attention, &stage->kv, &batch);
    ops->attention(device, &out, on_device, row_width, &attention, &stage->kv, &batch);
    ck_assert_int_eq(ops->sync(device, NULL), 0);
    struct cpu_activation_rows result = cpu_activation_rows(&out);
    for (uint32_t i = 0; i < n_spans; i++)
        for (uint32_t j = 0; j < spans[i].count; j++)
            memcpy(outputs->rows[spans[i].slot] + (size_t)(spans[i].position + j) * q_width,
                   result.floats + (spans[i].first + j) * result.float_stride, q_width * sizeof(float));
    fixture_drop(device, out.data);
    fixture_drop(device, on_device);
    fixture_drop(device, batch.positions);
    fixture_drop(device, batch.slots);
    fixture_drop(device, batch.spans);
    free(rows);
    free(slots);
    free(positions);
}

static struct outputs run_world(const struct world *world, const struct run_options *options)
{
    const struct attention_case *shape = &world->shape;
    struct outputs outputs = {{0}};
    struct stage stage;
    stage_open(&stage, world, options);
    uint32_t next[MOST_SEQUENCES] = {0};
    for (uint32_t s = 0; s < shape->n_sequences; s++)
        outputs.rows[s] =
            calloc((size_t)shape->lengths[s] * shape->n_heads * shape->head_size, sizeof(float));
    for (;;) {
        struct batch_span spans[MOST_SEQUENCES];
        uint32_t n_spans = 0;
        for (uint32_t s = 0; s < shape->n_sequences; s++) {
            uint32_t left = shape->lengths[s] - next[s];
            if (!left || (n_spans && !options->together))
                continue;
            spans[n_spans++] = (struct batch_span){
                .slot = s, .position = next[s], .count = left < options->chunk ? left : options->chunk};
            next[s] += spans[n_spans - 1].count;
        }
        if (!n_spans)
            break;
        stage_step(&stage, spans, n_spans, &outputs);
    }
    stage_close(&stage);
    return outputs;
}

// --- checks ---

static void reference_row(const struct world *world, uint32_t s, uint32_t position, uint32_t head,
                          double *out)
{
    const struct attention_case *shape = &world->shape;
    uint32_t size = shape->head_size, kv_width = shape->n_kv_heads * size;
    uint32_t kv_head = head / (shape->n_heads / shape->n_kv_heads);
    uint32_t first = shape->window && position + 1 > shape->window ? position + 1 - shape->window : 0;
    const float *q = world->q[s] + ((size_t)position * shape->n_heads + head) * size;
    double *scores = malloc((position + 1) * sizeof *scores), max = -INFINITY, sum = 0;
    for (uint32_t j = first; j <= position; j++) {
        scores[j] = 0;
        for (uint32_t d = 0; d < size; d++)
            scores[j] += q[d] * fixture_half(world->k[s][(size_t)j * kv_width + kv_head * size + d]);
        scores[j] /= sqrt(size);
        max = scores[j] > max ? scores[j] : max;
    }
    memset(out, 0, size * sizeof *out);
    for (uint32_t j = first; j <= position; j++) {
        double weight = exp(scores[j] - max);
        sum += weight;
        for (uint32_t d = 0; d < size; d++)
            out[d] += weight * fixture_half(world->v[s][(size_t)j * kv_width + kv_head * size + d]);
    }
    for (uint32_t d = 0; d < size; d++)
        out[d] /= sum;
    free(scores);
}

// A sample of positions, always the first and last ones of sequences and pages.
static void check_values(const struct world *world, const struct outputs *outputs)
{
    const struct attention_case *shape = &world->shape;
    uint32_t size = shape->head_size, width = shape->n_heads * size;
    double *expected = malloc(size * sizeof *expected), worst = 0;
    for (uint32_t s = 0; s < shape->n_sequences; s++)
        for (uint32_t position = 0; position < shape->lengths[s]; position++) {
            bool edge = position + 1 == shape->lengths[s] || position % KV_PAGE_POSITIONS == 0 ||
                        position % KV_PAGE_POSITIONS == KV_PAGE_POSITIONS - 1;
            if (!edge && fixture_below(8))
                continue;
            for (uint32_t head = 0; head < shape->n_heads; head++) {
                reference_row(world, s, position, head, expected);
                for (uint32_t d = 0; d < size; d++) {
                    float got = outputs->rows[s][(size_t)position * width + head * size + d];
                    ck_assert_msg(fabs(got - expected[d]) < 2e-5,
                                  "sequence %u position %u head %u dimension %u: %.9g, not %.9g", s, position,
                                  head, d, got, expected[d]);
                    worst = fmax(worst, fabs(got - expected[d]));
                }
            }
        }
    printf("  largest error %.2g\n", worst);
    free(expected);
}

static void check_same_bits(const struct world *world, const struct outputs *a, const struct outputs *b,
                            const struct run_options *options)
{
    uint32_t width = world->shape.n_heads * world->shape.head_size;
    for (uint32_t s = 0; s < world->shape.n_sequences; s++)
        for (uint32_t position = 0; position < world->shape.lengths[s]; position++)
            ck_assert_msg(!memcmp(a->rows[s] + (size_t)position * width,
                                  b->rows[s] + (size_t)position * width, width * sizeof(float)),
                          "level %u, %u threads, chunks of %u, %s: sequence %u position %u has other bits",
                          options->level, options->threads, options->chunk,
                          options->together ? "together" : "alone", s, position);
}

static void check_world(const struct world *world)
{
    const struct run_options VARIANTS[] = {
        {.threads = 1, .chunk = 7, .together = true, .page_seed = 1},
        {.threads = 2, .chunk = 100, .together = true, .page_seed = 2},
        {.threads = 3, .chunk = 64, .together = false, .page_seed = 3},
        {.threads = 4, .chunk = 1, .together = true, .page_seed = 4},
        {.threads = 4, .chunk = 1 << 30, .together = true, .page_seed = 5},
    };
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++) {
        struct run_options alone = {.level = level, .threads = 1, .chunk = 1 << 30, .page_seed = 9};
        printf(" level %s\n", device_level_name(level));
        struct outputs first = run_world(world, &alone);
        check_values(world, &first);
        for (size_t i = 0; i < sizeof VARIANTS / sizeof *VARIANTS; i++) {
            struct run_options options = VARIANTS[i];
            if (level == LEVEL_PORTABLE && i % 2) // slow
                continue;
            options.level = level;
            struct outputs other = run_world(world, &options);
            check_same_bits(world, &first, &other, &options);
            outputs_free(&other);
        }
        outputs_free(&first);
    }
}

static const struct attention_case CASES[] = {
    {9, 3, 64, 0, 4, {1, 130, 64, 65}, 1}, // the demo model's shape
    {8, 2, 128, 0, 3, {129, 63, 17}, 3},   // ratio 4, peaked
    {8, 1, 64, 0, 2, {100, 66}, 1},        // one K/V head
    {3, 3, 80, 0, 3, {70, 5, 128}, 1},     // no groups, heads of 80
    {4, 4, 96, 40, 2, {130, 33}, 1},       // a window within a page
    {2, 1, 256, 0, 2, {67, 2}, 2},         // large heads
    {6, 2, 40, 64, 2, {300, 129}, 1},      // a window of one page
    {4, 2, 8, 100, 3, {260, 1, 64}, 1},    // small heads, a window across pages
    {3, 1, 13, 0, 2, {75, 130}, 1},        // an odd size
    {5, 1, 1, 1, 1, {70}, 1},              // one dimension, a window of one position
    {50, 1, 16, 0, 1, {20}, 1},            // more queries a head than a tile aims at
};

START_TEST(test_shapes)
{
    fixture_seed("shapes");
    const struct attention_case *shape = &CASES[_i];
    printf("%u heads, %u kv, size %u, window %u\n", shape->n_heads, shape->n_kv_heads, shape->head_size,
           shape->window);
    struct world *world = world_new(shape);
    check_world(world);
    world_free(world);
}
END_TEST

// Contexts of several parts, where one sequence is many tasks.
START_TEST(test_long_contexts)
{
    static const struct attention_case LONG[] = {
        {3, 1, 64, 0, 2, {1100, 513}, 1},
        {2, 2, 32, 600, 2, {1500, 512}, 2},
    };
    fixture_seed("long contexts");
    struct world *world = world_new(&LONG[_i]);
    check_world(world);
    world_free(world);
}
END_TEST

START_TEST(test_random_shapes)
{
    fixture_seed("random shapes");
    static const uint32_t RATIOS[] = {1, 2, 3, 4, 8}, SIZES[] = {8, 16, 24, 33, 64, 72, 80, 96};
    struct attention_case shape = {.n_kv_heads = 1 + fixture_below(3),
                                   .peak = 0.5f + 3 * (float)fixture_uniform()};
    shape.n_heads = shape.n_kv_heads * RATIOS[fixture_below(5)];
    shape.head_size = SIZES[fixture_below(8)];
    shape.window = fixture_below(2) ? 1 + fixture_below(200) : 0;
    shape.n_sequences = 1 + fixture_below(MOST_SEQUENCES);
    for (uint32_t s = 0; s < shape.n_sequences; s++)
        shape.lengths[s] = 1 + fixture_below(130);
    struct world *world = world_new(&shape);
    check_world(world);
    world_free(world);
}
END_TEST

// What a later position holds is nothing to an earlier one, not even when it is not a number.
START_TEST(test_later_positions_do_not_leak)
{
    fixture_seed("leaks");
    const struct attention_case shape = {6, 2, 64, 0, 1, {100}, 1};
    struct world *world = world_new(&shape);
    uint32_t q_width = 6 * 64, kv_width = 2 * 64, spoiled = 70;
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++) {
        struct run_options options = {.level = level, .threads = 2, .chunk = 1 << 30, .page_seed = 1};
        struct outputs clean = run_world(world, &options);
        float key = world->k[0][spoiled * kv_width], value = world->v[0][spoiled * kv_width];
        world->k[0][spoiled * kv_width] = NAN;
        world->v[0][spoiled * kv_width] = NAN;
        struct outputs other = run_world(world, &options);
        world->k[0][spoiled * kv_width] = key;
        world->v[0][spoiled * kv_width] = value;
        ck_assert(!memcmp(clean.rows[0], other.rows[0], spoiled * q_width * sizeof(float)));
        ck_assert(isnan(other.rows[0][spoiled * q_width])); // but to itself it is
        ck_assert(isnan(other.rows[0][99 * q_width]));
        outputs_free(&clean);
        outputs_free(&other);
    }
    world_free(world);
}
END_TEST

// Values beyond a half's range become its largest.
START_TEST(test_values_saturate)
{
    fixture_seed("saturation");
    const struct attention_case shape = {1, 1, 16, 0, 1, {3}, 1};
    struct world *world = world_new(&shape);
    world->v[0][0] = 1e9f;
    world->v[0][1] = -INFINITY;
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++) {
        struct run_options options = {.level = level, .threads = 1, .chunk = 3};
        struct outputs outputs = run_world(world, &options);
        ck_assert_float_eq(outputs.rows[0][0], 65504);
        ck_assert_float_eq(outputs.rows[0][1], -65504);
        outputs_free(&outputs);
    }
    world_free(world);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("attention");
    TCase *tcase = tcase_create("attention");
    tcase_set_timeout(tcase, 120);
    tcase_add_loop_test(tcase, test_shapes, 0, sizeof CASES / sizeof *CASES);
    tcase_add_loop_test(tcase, test_long_contexts, 0, 2);
    tcase_add_loop_test(tcase, test_random_shapes, 0, 4);
    tcase_add_test(tcase, test_later_positions_do_not_leak);
    tcase_add_test(tcase, test_values_saturate);
    suite_add_tcase(suite, tcase);
    return suite;
}
