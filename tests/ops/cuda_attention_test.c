// Rope, KV pages and attention of the CUDA backend against references in f64, and the bits of attention: the
// same for a row whatever the chunks of its prompt, the company in its batch, the page numbers, and what lies
// in unwritten memory; and the same when a recorded step is replayed at other positions.
//
// The layouts of pages and activations are written out here once more.
#include "tests/ops/op_fixture.h"

enum { MOST_SEQUENCES = 64 };

static struct device *open_cuda(void)
{
    struct device_options options = {.backend = "cuda"};
    struct device *device;
    struct error error = {0};
    ck_assert_msg(device_open(&device, &options, &error) == 0, "%s", error.text);
    return device;
}

static float float_of_half(uint16_t half)
{
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double x = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent     ? ldexp(1024 + fraction, exponent - 25)
                              : ldexp(fraction, -24);
    return (float)(half >> 15 ? -x : x);
}

// --- layouts ---

static uint32_t kv_width_of(uint32_t head_size)
{
    return (head_size + 31) / 32 * 32;
}

static uint16_t page_key(const uint16_t *page, uint32_t width, uint32_t head, uint32_t position, uint32_t d)
{
    uint32_t chunk = d / 8 ^ (width % 64 == 0 ? position % 2 * 4 : 0);
    return page[(size_t)head * 64 * width + position * width + chunk * 8 + d % 8];
}

static uint16_t page_value(const uint16_t *page, uint32_t n_kv_heads, uint32_t width, uint32_t head,
                           uint32_t position, uint32_t d)
{
    uint32_t pair = position / 2, chunk = d / 4 ^ pair % 4 * 2;
    return page[(size_t)(n_kv_heads + head) * 64 * width + pair * 2 * width + chunk * 8 + d % 4 * 2 +
                position % 2];
}

// Where element k of a K block of a generated row lies, and the two parts of sum s, in bytes from the block
// of the row's group: with up to 16 such rows a record a row, with more as the tensor cores read shared
// memory.
static size_t half_at(bool many, uint32_t row, uint32_t k)
{
    uint32_t r = row % 8, unit = k % 64 / 32 * 4 + k % 8 / 2;
    if (!many)
        return row * 576 + k * 2;
    return row / 8 * 4096 + k / 64 * 1024 + r * 128 + (unit ^ r) * 16 + k % 32 / 8 * 4 + k % 2 * 2;
}

static size_t sum_at(bool many, uint32_t row, uint32_t s, uint32_t part)
{
    if (!many)
        return row * 576 + 512 + (s % 8 / 2 * 8 + s / 8 * 2 + s % 2 + part * 4) * 2;
    return 64 * 512 + row * 64 + ((part * 2 + s / 8) ^ row % 8 / 2) * 16 + s % 8 * 2;
}

// Row t of an activation. Generated rows: checks the sums of 16, which are kept over 64.
static void read_activation_row(const uint8_t *data, uint32_t width, uint32_t rows, uint32_t n_generated,
                                uint32_t t, float *out)
{
    size_t blocks = (width + 255) / 256, groups = (rows + 63) / 64;
    bool many = n_generated > 16;
    for (uint32_t k = 0; k < width; k++) {
        const uint8_t *block = data + (t / 64 * blocks + k / 256) * 64 * 576;
        const uint16_t *plain =
            (const uint16_t *)(data + groups * blocks * 64 * 576) + (size_t)(t - n_generated) * blocks * 256;
        if (t >= n_generated) {
            out[k] = float_of_half(plain[k]);
            continue;
        }
        out[k] = float_of_half(*(const uint16_t *)(block + half_at(many, t % 64, k % 256)));
        if (k % 16 != 15)
            continue;
        double sum = 0, size = 0, got = 0;
        for (uint32_t part = 0; part < 2; part++)
            got +=
                64.0 * float_of_half(*(const uint16_t *)(block + sum_at(many, t % 64, k % 256 / 16, part)));
        for (uint32_t i = k - 15; i <= k; i++) {
            sum += out[i];
            size += fabs(out[i]);
        }
        ck_assert_msg(fabs(got - sum) <= 1e-6 * size + 0x1p-18, "sum of row %u before %u: %.9g, not %.9g", t,
                      k + 1, got, sum);
    }
}

// --- rope and pages ---

struct prepare_case {
    uint32_t n_heads, n_kv_heads, head_size, rope_dims;
    enum position_kind position;
    bool norm;
    uint32_t n_tokens, most_position;
};

static const struct prepare_case PREPARE_CASES[] = {
    {9, 3, 64, 64, POSITION_ROPE_ADJACENT, false, 130, 500},
    {4, 2, 128, 128, POSITION_ROPE_HALVES, true, 33, 40000},
    {2, 1, 96, 96, POSITION_ROPE_HALVES, false, 5, MAX_CONTEXT - 1},
    {2, 1, 80, 32, POSITION_ROPE_ADJACENT, false, 70, 1000},
    {3, 3, 80, 20, POSITION_ROPE_HALVES, true, 9, 100},
    {2, 2, 16, 6, POSITION_ROPE_ADJACENT, true, 3, 64},
    {12, 12, 64, 0, POSITION_LEARNED, false, 65, 1023},
    {1, 1, 256, 256, POSITION_ROPE_ADJACENT, false, 64, MAX_CONTEXT - 1},
    {7, 1, 240, 240, POSITION_ROPE_HALVES, true, 300, 5000},
    {5, 5, 192, 96, POSITION_ROPE_HALVES, true, 1, 7},
};

static float norm_weight(uint32_t i)
{
    return 0.5f + (float)(i % 7) / 4;
}

static float frequency_of(const struct prepare_case *shape, uint32_t i)
{
    return (float)pow(10000, -2.0 * i / shape->rope_dims);
}

static void reference_head(const struct prepare_case *shape, const float *x, uint32_t position, double *out)
{
    double square = 0;
    for (uint32_t i = 0; i < shape->head_size; i++)
        square += (double)x[i] * x[i];
    for (uint32_t i = 0; i < shape->head_size; i++)
        out[i] = shape->norm ? x[i] / sqrt(square / shape->head_size + 1e-5) * norm_weight(i) : x[i];
    uint32_t half = shape->position == POSITION_LEARNED ? 0 : shape->rope_dims / 2;
    for (uint32_t i = 0; i < half; i++) {
        uint32_t a = shape->position == POSITION_ROPE_HALVES ? i : 2 * i;
        uint32_t b = shape->position == POSITION_ROPE_HALVES ? i + half : 2 * i + 1;
        fixture_rotate(&out[a], &out[b], (double)position * frequency_of(shape, i));
    }
}

// A batch of single positions, each a sequence of its own with all pages of its table the same.
struct prepared {
    float *rows, *rows_out; // [n_tokens][stride]: q, k, v
    uint32_t stride, *positions;
    uint16_t *pages;
    size_t page_bytes;
};

static void prepare(struct device *device, const struct prepare_case *shape, struct prepared *p)
{
    const struct kernel_ops *ops = device_ops(device);
    uint32_t n = shape->n_tokens, q_width = shape->n_heads * shape->head_size;
    uint32_t kv_width = shape->n_kv_heads * shape->head_size;
    uint32_t table_stride = shape->most_position / KV_PAGE_POSITIONS + 1;
    uint32_t *tables = malloc((size_t)n * table_stride * sizeof *tables), *slots = malloc(n * sizeof *slots);
    float frequencies[128], weights[256];
    for (uint32_t i = 0; i < shape->rope_dims / 2; i++)
        frequencies[i] = frequency_of(shape, i);
    for (uint32_t i = 0; i < shape->head_size; i++)
        weights[i] = norm_weight(i);
    for (uint32_t t = 0; t < n; t++) {
        slots[t] = n - 1 - t;
        for (uint32_t i = 0; i < table_stride; i++)
            tables[(size_t)(n - 1 - t) * table_stride + i] = t;
    }
    size_t row_bytes = (size_t)n * p->stride * sizeof(float);
    float *rows = fixture_put(device, p->rows, row_bytes);
    float *norm = fixture_put(device, weights, shape->head_size * sizeof(float));
    float *frequency = fixture_put(device, frequencies, shape->rope_dims * 2);
    p->page_bytes = ops->kv_page_bytes(device, shape->n_kv_heads, shape->head_size);
    p->pages = calloc(n, p->page_bytes);
    memset(p->pages, 0xff, n * p->page_bytes);
    struct kv_layer kv = {fixture_put(device, p->pages, n * p->page_bytes), p->page_bytes};
    struct batch batch = {.n_tokens = n,
                          .n_spans = n,
                          .positions = fixture_put(device, p->positions, n * sizeof(uint32_t)),
                          .slots = fixture_put(device, slots, n * sizeof *slots),
                          .page_tables =
                              fixture_put(device, tables, (size_t)n * table_stride * sizeof *tables),
                          .table_stride = table_stride};
    struct qkv_args qkv = {.q = rows,
                           .k = rows + q_width,
                           .v = rows + q_width + kv_width,
                           .q_stride = p->stride,
                           .k_stride = p->stride,
                           .v_stride = p->stride,
                           .q_norm = shape->norm ? norm : NULL,
                           .k_norm = shape->norm ? norm : NULL,
                           .norm_epsilon = 1e-5f,
                           .position = shape->position,
                           .rope_dims = shape->rope_dims,
                           .rope_frequency = frequency};
    struct attention_shape attention = {shape->n_heads, shape->n_kv_heads, shape->head_size, 0, 1};
    ops->attn_prepare(device, &qkv, &attention, &kv, &batch);
    ck_assert_int_eq(ops->sync(device, NULL), 0);
    fixture_get(device, p->rows_out, rows, row_bytes);
    fixture_get(device, p->pages, kv.data, n * p->page_bytes);
    const void *all[] = {rows, norm, frequency, kv.data, batch.positions, batch.slots, batch.page_tables};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        fixture_drop(device, all[i]);
    free(slots);
    free(tables);
}

static void check_prepared(const struct prepare_case *shape, const struct prepared *p)
{
    double expected[256];
    uint32_t size = shape->head_size, width = kv_width_of(size);
    for (uint32_t t = 0; t < shape->n_tokens; t++) {
        const float *row = p->rows + (size_t)t * p->stride, *got = p->rows_out + (size_t)t * p->stride;
        uint32_t position = p->positions[t];
        for (uint32_t head = 0; head < shape->n_heads; head++) {
            reference_head(shape, row + head * size, position, expected);
            for (uint32_t i = 0; i < size; i++)
                ck_assert_msg(fabs(got[head * size + i] - expected[i]) < 4e-6,
                              "q token %u (position %u) head %u element %u: %.9g, not %.9g", t, position,
                              head, i, got[head * size + i], expected[i]);
        }
        const uint16_t *page = p->pages + t * (p->page_bytes / 2);
        const float *v_row = row + (shape->n_heads + shape->n_kv_heads) * size;
        for (uint32_t head = 0; head < shape->n_kv_heads; head++) {
            reference_head(shape, row + (shape->n_heads + head) * size, position, expected);
            for (uint32_t i = 0; i < width; i++) {
                float k = float_of_half(page_key(page, width, head, position % 64, i));
                float v = float_of_half(page_value(page, shape->n_kv_heads, width, head, position % 64, i));
                double k_wanted = i < size ? expected[i] : 0;
                ck_assert_msg(fabs(k - k_wanted) <= fabs(k_wanted) * 0x1p-11 + (i < size ? 5e-6 : 0),
                              "k token %u head %u element %u: %.9g, not %.9g", t, head, i, k, k_wanted);
                ck_assert_double_eq(v, i < size ? fixture_half(v_row[head * size + i]) : 0);
            }
        }
    }
}

START_TEST(test_prepare)
{
    fixture_seed("rope and kv");
    const struct prepare_case *shape = &PREPARE_CASES[_i];
    uint32_t stride = (shape->n_heads + 2 * shape->n_kv_heads) * shape->head_size + 16;
    size_t count = (size_t)shape->n_tokens * stride;
    struct prepared p = {.rows = malloc(count * sizeof(float)),
                         .rows_out = malloc(count * sizeof(float)),
                         .stride = stride,
                         .positions = malloc(shape->n_tokens * sizeof(uint32_t))};
    fixture_normals(p.rows, count, 2);
    p.rows[(shape->n_heads + shape->n_kv_heads) * shape->head_size] = 1e6f; // becomes the largest half
    for (uint32_t t = 0; t < shape->n_tokens; t++)
        p.positions[t] = t == 0 ? 0 : t == 1 ? shape->most_position : fixture_below(shape->most_position + 1);
    struct device *device = open_cuda();
    prepare(device, shape, &p);
    check_prepared(shape, &p);
    fixture_close(device);
    free(p.pages);
    free(p.positions);
    free(p.rows_out);
    free(p.rows);
}
END_TEST

START_TEST(test_page_bytes)
{
    struct device *device = open_cuda();
    const struct kernel_ops *ops = device_ops(device);
    ck_assert_uint_eq(ops->kv_page_bytes(device, 8, 128), 8 * 64 * 128 * 2 * 2);
    for (uint32_t size = 0; size <= 300; size++)
        ck_assert_uint_eq(ops->kv_page_bytes(device, 3, size) != 0, size && size % 16 == 0 && size <= 256);
    fixture_close(device);
}
END_TEST

// --- attention ---

struct attention_case {
    uint32_t n_heads, n_kv_heads, head_size, window;
    uint32_t n_sequences, shortest, longest; // lengths lie between
    uint32_t generated;                      // the last so many positions of each
    float peak;                              // scale of q: how peaked the softmax is
};

// Inputs of all sequences, and lengths.
struct world {
    struct attention_case shape;
    uint32_t lengths[MOST_SEQUENCES];
    float *rows[MOST_SEQUENCES]; // [length][row_width]: q, k, v
    uint32_t q_width, kv_width, row_width;
};

struct outputs {
    float *rows[MOST_SEQUENCES]; // [length][q_width]
};

struct run_options {
    uint32_t chunk;     // prompt positions of a sequence a step; 0: random
    bool together;      // all sequences in every batch, else one after the other
    uint64_t page_seed; // the order of page ids
    uint8_t garbage;    // in unwritten pages
};

static struct world *world_new(const struct attention_case *shape)
{
    struct world *world = calloc(1, sizeof *world);
    world->shape = *shape;
    world->q_width = shape->n_heads * shape->head_size;
    world->kv_width = shape->n_kv_heads * shape->head_size;
    world->row_width = world->q_width + 2 * world->kv_width;
    for (uint32_t s = 0; s < shape->n_sequences; s++) {
        world->lengths[s] =
            s ? shape->shortest + fixture_below(shape->longest - shape->shortest + 1) : shape->longest;
        world->rows[s] = malloc((size_t)world->lengths[s] * world->row_width * sizeof(float));
        for (uint32_t i = 0; i < world->lengths[s]; i++) {
            float *row = world->rows[s] + (size_t)i * world->row_width;
            fixture_normals(row, world->q_width, shape->peak);
            fixture_normals(row + world->q_width, (size_t)2 * world->kv_width, 1);
        }
    }
    return world;
}

static void world_free(struct world *world)
{
    for (uint32_t s = 0; s < world->shape.n_sequences; s++)
        free(world->rows[s]);
    free(world);
}

static void outputs_free(struct outputs *outputs)
{
    for (uint32_t s = 0; s < MOST_SEQUENCES; s++)
        free(outputs->rows[s]);
}

struct stage {
    struct device *device;
    const struct kernel_ops *ops;
    const struct world *world;
    struct kv_layer kv;
    uint32_t stride, *tables;
    struct attention_shape attention;
    // Of a step:
    struct batch batch;
    struct activation out;
    float *rows;
};

static void stage_open(struct stage *stage, const struct world *world, const struct run_options *options)
{
    const struct attention_case *shape = &world->shape;
    stage->device = open_cuda();
    stage->ops = device_ops(stage->device);
    stage->world = world;
    stage->attention = (struct attention_shape){shape->n_heads, shape->n_kv_heads, shape->head_size,
                                                shape->window, 1 / sqrtf((float)shape->head_size)};
    stage->stride = (shape->longest + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS + 2;
    uint32_t n_pages = stage->stride * shape->n_sequences + 3;
    uint32_t *ids = fixture_shuffled(n_pages, options->page_seed);
    stage->tables = fixture_put(stage->device, ids, stage->stride * shape->n_sequences * sizeof *ids);
    free(ids);
    stage->kv.page_bytes = stage->ops->kv_page_bytes(stage->device, shape->n_kv_heads, shape->head_size);
    uint8_t *garbage = malloc(n_pages * stage->kv.page_bytes);
    memset(garbage, options->garbage, n_pages * stage->kv.page_bytes);
    stage->kv.data = fixture_put(stage->device, garbage, n_pages * stage->kv.page_bytes);
    free(garbage);
}

static void stage_close(struct stage *stage)
{
    fixture_drop(stage->device, stage->tables);
    fixture_drop(stage->device, stage->kv.data);
    fixture_close(stage->device);
}

// The arrays of a step on the device, from its spans; slot = number of the sequence. Sets spans[i].first.
struct step_arrays {
    uint32_t n_tokens, *positions, *slots;
    float *rows;
};

static struct step_arrays step_arrays_new(const struct world *world, struct batch_span *spans,
                                          uint32_t n_spans)
{
    struct step_arrays step = {0};
    for (uint32_t i = 0; i < n_spans; i++) {
        spans[i].first = step.n_tokens;
        step.n_tokens += spans[i].count;
    }
    step.positions = calloc(step.n_tokens, sizeof *step.positions);
    step.slots = calloc(step.n_tokens, sizeof *step.slots);
    step.rows = calloc((size_t)step.n_tokens * world->row_width, sizeof *step.rows);
    for (uint32_t i = 0; i < n_spans; i++)
        for (uint32_t j = 0; j < spans[i].count; j++) {
            uint32_t t = spans[i].first + j, position = spans[i].position + j;
            step.positions[t] = position;
            step.slots[t] = spans[i].slot;
            memcpy(step.rows + (size_t)t * world->row_width,
                   world->rows[spans[i].slot] + (size_t)position * world->row_width,
                   world->row_width * sizeof(float));
        }
    return step;
}

static void step_arrays_free(struct step_arrays *step)
{
    free(step->positions);
    free(step->slots);
    free(step->rows);
}

static void step_begin(struct stage *stage, const struct step_arrays *step, const struct batch_span *spans,
                       uint32_t n_spans, uint32_t n_generated)
{
    struct device *device = stage->device;
    uint32_t n = step->n_tokens, width = stage->world->q_width;
    stage->batch = (struct batch){.n_tokens = n,
                                  .n_spans = n_spans,
                                  .n_generated = n_generated,
                                  .positions = fixture_put(device, step->positions, n * sizeof(uint32_t)),
                                  .slots = fixture_put(device, step->slots, n * sizeof(uint32_t)),
                                  .spans = fixture_put(device, spans, n_spans * sizeof *spans),
                                  .page_tables = stage->tables,
                                  .table_stride = stage->stride};
    stage->rows = fixture_put(device, step->rows, (size_t)n * stage->world->row_width * sizeof(float));
    stage->out = (struct activation){.width = width, .rows = n, .forms = 1};
    stage->out.data = fixture_put(device, NULL, stage->ops->activation_bytes(device, width, n, 1));
}

static void step_queue(struct stage *stage)
{
    uint32_t q_width = stage->world->q_width, stride = stage->world->row_width;
    struct qkv_args qkv = {.q = stage->rows,
                           .k = stage->rows + q_width,
                           .v = stage->rows + q_width + stage->world->kv_width,
                           .q_stride = stride,
                           .k_stride = stride,
                           .v_stride = stride,
                           .position = POSITION_LEARNED};
    stage->ops->attn_prepare(stage->device, &qkv, &stage->attention, &stage->kv, &stage->batch);
    stage->ops->attention(stage->device, &stage->out, stage->rows, stride, &stage->attention, &stage->kv,
                          &stage->batch);
}

// Waits, and puts the outputs where they belong.
static void step_read(struct stage *stage, const struct batch_span *spans, uint32_t n_spans,
                      struct outputs *outputs)
{
    struct error error = {0};
    uint32_t width = stage->world->q_width;
    size_t bytes = stage->ops->activation_bytes(stage->device, width, stage->out.rows, 1);
    uint8_t *data = malloc(bytes);
    ck_assert_msg(stage->ops->sync(stage->device, &error) == 0, "%s", error.text);
    fixture_get(stage->device, data, stage->out.data, bytes);
    ck_assert_uint_eq(stage->out.n_generated, stage->batch.n_generated);
    ck_assert(stage->out.unit == 1);
    for (uint32_t i = 0; i < n_spans; i++)
        for (uint32_t j = 0; j < spans[i].count; j++)
            read_activation_row(data, width, stage->out.rows, stage->out.n_generated, spans[i].first + j,
                                outputs->rows[spans[i].slot] + (size_t)(spans[i].position + j) * width);
    free(data);
}

static void step_end(struct stage *stage)
{
    fixture_drop(stage->device, stage->out.data);
    fixture_drop(stage->device, stage->rows);
    fixture_drop(stage->device, stage->batch.positions);
    fixture_drop(stage->device, stage->batch.slots);
    fixture_drop(stage->device, stage->batch.spans);
}

static void run_step(struct stage *stage, struct batch_span *spans, uint32_t n_spans, uint32_t n_generated,
                     struct outputs *outputs)
{
    struct step_arrays step = step_arrays_new(stage->world, spans, n_spans);
    step_begin(stage, &step, spans, n_spans, n_generated);
    step_queue(stage);
    step_read(stage, spans, n_spans, outputs);
    step_end(stage);
    step_arrays_free(&step);
}

static struct outputs outputs_new(const struct world *world)
{
    struct outputs outputs = {{0}};
    for (uint32_t s = 0; s < world->shape.n_sequences; s++)
        outputs.rows[s] = calloc((size_t)world->lengths[s] * world->q_width, sizeof(float));
    return outputs;
}

// The next step's spans: generated ones first. 0: there is nothing left.
static uint32_t plan_step(const struct world *world, const struct run_options *options, uint32_t *next,
                          struct batch_span *spans, uint32_t *n_generated)
{
    uint32_t n = 0, only = 0;
    while (!options->together && only < world->shape.n_sequences && next[only] == world->lengths[only])
        only++;
    for (int prompts = 0; prompts < 2; prompts++) {
        for (uint32_t s = 0; s < world->shape.n_sequences; s++) {
            uint32_t prompt = world->lengths[s] - world->shape.generated, count = 1;
            if (next[s] == world->lengths[s] || (next[s] < prompt) != prompts ||
                (!options->together && s != only))
                continue;
            if (prompts) {
                count = options->chunk ? options->chunk : 1 + fixture_below(200);
                count = prompt - next[s] < count ? prompt - next[s] : count;
            }
            spans[n++] = (struct batch_span){.slot = s, .position = next[s], .count = count};
        }
        if (!prompts)
            *n_generated = n;
    }
    for (uint32_t i = 0; i < n; i++)
        next[spans[i].slot] += spans[i].count;
    return n;
}

static struct outputs run_world(const struct world *world, const struct run_options *options)
{
    struct outputs outputs = outputs_new(world);
    struct stage stage;
    struct batch_span spans[MOST_SEQUENCES];
    uint32_t next[MOST_SEQUENCES] = {0}, n_spans, n_generated;
    stage_open(&stage, world, options);
    while ((n_spans = plan_step(world, options, next, spans, &n_generated)))
        run_step(&stage, spans, n_spans, n_generated, &outputs);
    stage_close(&stage);
    return outputs;
}

// --- checks ---

static void reference_row(const struct world *world, uint32_t s, uint32_t position, uint32_t head,
                          double *out)
{
    const struct attention_case *shape = &world->shape;
    uint32_t size = shape->head_size, kv_head = head / (shape->n_heads / shape->n_kv_heads);
    uint32_t first = shape->window && position + 1 > shape->window ? position + 1 - shape->window : 0;
    const float *q = world->rows[s] + (size_t)position * world->row_width + head * size;
    double *scores = malloc((position + 1) * sizeof *scores), max = -INFINITY, sum = 0;
    for (uint32_t j = first; j <= position; j++) {
        const float *k = world->rows[s] + (size_t)j * world->row_width + world->q_width + kv_head * size;
        scores[j] = 0;
        for (uint32_t d = 0; d < size; d++)
            scores[j] += q[d] * fixture_half(k[d]);
        scores[j] /= sqrt(size);
        max = scores[j] > max ? scores[j] : max;
    }
    memset(out, 0, size * sizeof *out);
    for (uint32_t j = first; j <= position; j++) {
        const float *v =
            world->rows[s] + (size_t)j * world->row_width + world->q_width + world->kv_width + kv_head * size;
        double weight = exp(scores[j] - max);
        sum += weight;
        for (uint32_t d = 0; d < size; d++)
            out[d] += weight * fixture_half(v[d]);
    }
    for (uint32_t d = 0; d < size; d++)
        out[d] /= sum;
    free(scores);
}

// A sample of positions, always the edges of sequences, pages and splits, and all that were generated.
static void check_values(const struct world *world, const struct outputs *outputs, uint32_t one_in)
{
    const struct attention_case *shape = &world->shape;
    uint32_t size = shape->head_size;
    // Queries are rounded to halves, which moves scores in proportion to their size.
    double expected[256], worst = 0, most = 1e-3 * (1 + shape->peak);
    for (uint32_t s = 0; s < shape->n_sequences; s++)
        for (uint32_t position = 0; position < world->lengths[s]; position++) {
            bool edge = position + shape->generated >= world->lengths[s] ||
                        (position < 300 && (position + 1) % KV_PAGE_POSITIONS < 2);
            if (!edge && fixture_below(one_in))
                continue;
            for (uint32_t head = 0; head < shape->n_heads; head++) {
                const float *got = outputs->rows[s] + (size_t)position * world->q_width + head * size;
                double error = 0, square = 0;
                reference_row(world, s, position, head, expected);
                for (uint32_t d = 0; d < size; d++) {
                    error += (got[d] - expected[d]) * (got[d] - expected[d]);
                    square += expected[d] * expected[d];
                }
                error = sqrt(error / square);
                ck_assert_msg(error < most, "sequence %u position %u of %u head %u is wrong by %.3g", s,
                              position, world->lengths[s], head, error);
                worst = error > worst ? error : worst;
            }
        }
    printf("heads %u/%u of %u, window %u: worst error %.2e\n", shape->n_heads, shape->n_kv_heads, size,
           shape->window, worst);
}

static void check_same(const struct world *world, const struct outputs *a, const struct outputs *b,
                       const char *what)
{
    for (uint32_t s = 0; s < world->shape.n_sequences; s++)
        for (uint32_t position = 0; position < world->lengths[s]; position++) {
            size_t at = (size_t)position * world->q_width;
            ck_assert_msg(!memcmp(a->rows[s] + at, b->rows[s] + at, world->q_width * sizeof(float)),
                          "%s: sequence %u position %u of %u differs", what, s, position, world->lengths[s]);
        }
}

static const struct attention_case CASES[] = {
    {4, 4, 16, 0, 2, 70, 150, 3, 1},     {8, 4, 32, 0, 2, 1, 140, 1, 1},
    {3, 1, 48, 0, 2, 60, 200, 3, 1},     {8, 2, 64, 0, 3, 5, 300, 3, 3},
    {7, 1, 64, 50, 2, 100, 333, 4, 1},   {4, 4, 80, 0, 2, 100, 260, 3, 1},
    {8, 1, 96, 0, 2, 100, 260, 3, 1},    {2, 1, 112, 100, 2, 1, 270, 1, 1},
    {8, 2, 128, 0, 3, 200, 700, 5, 1},   {14, 2, 128, 0, 2, 129, 400, 2, 6},
    {8, 1, 128, 200, 2, 300, 900, 4, 1}, {1, 1, 144, 0, 2, 64, 257, 3, 1},
    {4, 1, 160, 0, 2, 64, 257, 3, 1},    {2, 2, 176, 30, 2, 64, 257, 3, 1},
    {7, 1, 192, 0, 2, 64, 257, 3, 1},    {2, 1, 208, 0, 2, 64, 257, 3, 1},
    {4, 2, 224, 0, 2, 64, 257, 3, 1},    {2, 2, 240, 0, 2, 64, 257, 3, 1},
    {8, 1, 256, 0, 2, 64, 300, 4, 1},    {9, 1, 128, 0, 1, 300, 300, 3, 1},
    {16, 1, 64, 0, 1, 300, 300, 3, 1},   {40, 2, 128, 1, 1, 200, 200, 3, 1},
    {71, 1, 64, 0, 1, 200, 200, 2, 1},   {16, 1, 256, 64, 1, 200, 200, 2, 1},
};

START_TEST(test_values)
{
    if (fixture_is_slow() && _i % 3 > 0)
        return;
    fixture_seed("attention");
    struct world *world = world_new(&CASES[_i]);
    struct run_options options = {.together = true, .page_seed = fixture_below(1000), .garbage = 0xff};
    struct outputs outputs = run_world(world, &options);
    check_values(world, &outputs, 8);
    outputs_free(&outputs);
    world_free(world);
}
END_TEST

// Prompts at once, in pieces of every size, alone and in company.
START_TEST(test_chunks)
{
    fixture_seed("attention of chunks");
    static const struct attention_case cases[] = {{4, 2, 128, 0, 3, 130, 280, 2, 1},
                                                  {2, 1, 64, 70, 3, 1, 400, 1, 1},
                                                  {2, 1, 80, 0, 2, 100, 300, 1, 2},
                                                  {2, 1, 256, 100, 2, 200, 300, 1, 1}};
    struct world *world = world_new(&cases[_i]);
    struct run_options whole = {.chunk = 10000, .page_seed = 1, .garbage = 0xff};
    struct outputs expected = run_world(world, &whole);
    check_values(world, &expected, 8);
    uint32_t chunks[] = {1, 7, 64, 100, 128, 0, 0};
    for (uint32_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        struct run_options options = {.chunk = chunks[i], .together = i % 2, .page_seed = 2 + i};
        struct outputs outputs = run_world(world, &options);
        check_same(world, &expected, &outputs, "other chunks");
        outputs_free(&outputs);
    }
    outputs_free(&expected);
    world_free(world);
}
END_TEST

// Generated rows alone, and 64 of all lengths together.
START_TEST(test_company)
{
    fixture_seed("attention in company");
    static const struct attention_case cases[] = {{8, 2, 128, 0, 64, 10, 1200, 8, 1},
                                                  {7, 1, 64, 300, 64, 10, 900, 8, 1},
                                                  {4, 4, 256, 0, 17, 10, 500, 5, 1}};
    struct world *world = world_new(&cases[_i]);
    struct run_options alone = {.chunk = 10000, .page_seed = 1, .garbage = 0xff};
    struct run_options together = {.chunk = 10000, .together = true, .page_seed = 2};
    struct outputs expected = run_world(world, &alone), outputs = run_world(world, &together);
    check_same(world, &expected, &outputs, "in company");
    check_values(world, &outputs, 200);
    outputs_free(&outputs);
    outputs_free(&expected);
    world_free(world);
}
END_TEST

// Contexts that reach into the longer splits.
START_TEST(test_long)
{
    fixture_seed("attention of long contexts");
    static const struct attention_case cases[] = {{4, 1, 64, 0, 2, 4094, 36000, 4, 2},
                                                  {4, 1, 64, 5000, 2, 4094, 36000, 4, 2},
                                                  {2, 1, 128, 0, 2, 4500, 5200, 4, 1}};
    struct world *world = world_new(&cases[_i]);
    struct run_options alone = {.chunk = 8000, .page_seed = 1, .garbage = 0xff};
    struct run_options together = {.chunk = 3001, .together = true, .page_seed = 2};
    struct outputs expected = run_world(world, &alone), outputs = run_world(world, &together);
    check_values(world, &expected, 1000);
    check_same(world, &expected, &outputs, "other chunks of long contexts");
    outputs_free(&outputs);
    outputs_free(&expected);
    world_free(world);
}
END_TEST

// A recorded step of generated tokens, replayed for the positions after it.
START_TEST(test_replay)
{
    fixture_seed("attention replayed");
    static const struct attention_case shape = {8, 2, 128, 0, 5, 100, 700, 12, 1};
    struct world *world = world_new(&shape);
    struct run_options options = {.chunk = 10000, .together = true, .page_seed = 1};
    struct outputs expected = run_world(world, &options), outputs = outputs_new(world);
    struct stage stage;
    struct batch_span spans[MOST_SEQUENCES];
    stage_open(&stage, world, &options);
    for (uint32_t s = 0; s < shape.n_sequences; s++)
        spans[s] = (struct batch_span){.slot = s, .count = world->lengths[s] - shape.generated};
    run_step(&stage, spans, shape.n_sequences, 0, &outputs);
    for (uint32_t i = 0; i < shape.generated; i++) {
        for (uint32_t s = 0; s < shape.n_sequences; s++)
            spans[s] = (struct batch_span){
                .slot = s, .position = world->lengths[s] - shape.generated + i, .count = 1};
        struct step_arrays step = step_arrays_new(world, spans, shape.n_sequences);
        if (i == 0)
            step_begin(&stage, &step, spans, shape.n_sequences, shape.n_sequences);
        stage.ops->upload(stage.device, (void *)stage.batch.positions, step.positions,
                          step.n_tokens * sizeof(uint32_t));
        stage.ops->upload(stage.device, (void *)stage.batch.spans, spans, step.n_tokens * sizeof *spans);
        stage.ops->upload(stage.device, stage.rows, step.rows,
                          (size_t)step.n_tokens * world->row_width * sizeof(float));
        if (i == 0) {
            step_queue(&stage); // scratch memory grows here, not in the recording
        } else if (!stage.ops->replay(stage.device, 1)) {
            stage.ops->record(stage.device, 1);
            step_queue(&stage);
            stage.ops->record_end(stage.device);
        }
        step_read(&stage, spans, shape.n_sequences, &outputs);
        step_arrays_free(&step);
    }
    stage.ops->forget(stage.device);
    step_end(&stage);
    stage_close(&stage);
    check_same(world, &expected, &outputs, "replayed");
    outputs_free(&outputs);
    outputs_free(&expected);
    world_free(world);
}
END_TEST

Suite *make_suite(void)
{
    const struct {
        const char *name;
        const TTest *test;
        int count, slow_from; // what an instrumented build leaves out
    } tests[] = {{"page_bytes", test_page_bytes, 1, 0},
                 {"prepare", test_prepare, sizeof PREPARE_CASES / sizeof *PREPARE_CASES, 0},
                 {"values", test_values, sizeof CASES / sizeof *CASES, 0},
                 {"chunks", test_chunks, 4, 2},
                 {"company", test_company, 3, 2},
                 {"long", test_long, 3, 2},
                 {"replay", test_replay, 1, 0}};
    Suite *suite = suite_create("cuda_attention");
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        TCase *tcase = tcase_create(tests[i].name);
        tcase_set_timeout(tcase, 300);
        tcase_add_loop_test(tcase, tests[i].test, fixture_is_slow() ? tests[i].slow_from : 0, tests[i].count);
        suite_add_tcase(suite, tcase);
    }
    return suite;
}
