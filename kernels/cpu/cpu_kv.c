// What happens to q, k and v before attention: per-head normalization, rotation by position, and the rounding
// of k and v into the pages of their positions (attention_internal.h has the layout).
//
// Angles are position * frequency in f64, at most about 2^20 radians; their cosines and sines come from our
// own series in f64 rounded to f32, so that they are the same on every machine. All layers of a step ask for
// the same ones: they are kept until the positions or frequencies change.
//
// Called from the executor's thread; a few tokens are one task on the compute threads.
#include "kernels/cpu/attention_internal.h"
#include "kernels/cpu/kv_rows_internal.h"

size_t cpu_kv_page_bytes(const struct device *device, uint32_t n_kv_heads, uint32_t head_size)
{
    return n_kv_heads * kv_head_stride(head_size) * sizeof(uint16_t);
}

// --- angles ---

// x - n pi/2 with pi/2 in two parts, of which n times the first is exact; then Taylor's series for at most
// pi/4. Absolute error below 1e-13 up to 2^20 radians.
static void sine_cosine(double x, double *sine, double *cosine)
{
    double n = (x * 0x1.45f306dc9c883p-1 + 0x1.8p52) - 0x1.8p52;
    double r = (x - n * 0x1.921fb544p+0) - n * 0x1.0b4611a626331p-34;
    double r2 = r * r, s = 0, c = 0;
    for (int i = 15; i > 1; i -= 2) { // sin r = r (1 - r2/(2*3) (1 - r2/(4*5) (...))), cos r likewise
        s = (1 - s) * r2 / (i * (i - 1));
        c = (1 - c) * r2 / ((i - 1) * (i - 2));
    }
    s = r * (1 - s);
    c = 1 - c;
    switch ((int64_t)n & 3) {
    case 0:
        *sine = s, *cosine = c;
        break;
    case 1:
        *sine = c, *cosine = -s;
        break;
    case 2:
        *sine = -s, *cosine = -c;
        break;
    default:
        *sine = -c, *cosine = s;
    }
}

struct prepare_args {
    struct cpu_device *device;
    const struct kv_rows *rows;
    const struct qkv_args *qkv;
    const struct attention_shape *shape;
    const struct kv_layer *kv;
    const struct batch *batch;
    float *angles; // [T][rope_dims / 2] cosines, then sines likewise
    uint32_t tokens_a_task;
};

static void angles_of_tokens(void *context, uint32_t task, uint32_t worker)
{
    const struct prepare_args *args = context;
    uint32_t half = args->qkv->rope_dims / 2, n_tokens = args->batch->n_tokens;
    uint32_t first = task * args->tokens_a_task, end = first + args->tokens_a_task;
    for (uint32_t t = first; t < end && t < n_tokens; t++) {
        float *cosines = args->angles + (size_t)t * half, *sines = cosines + (size_t)n_tokens * half;
        for (uint32_t i = 0; i < half; i++) {
            double sine, cosine;
            sine_cosine((double)args->batch->positions[t] * args->qkv->rope_frequency[i], &sine, &cosine);
            cosines[i] = (float)cosine;
            sines[i] = (float)sine;
        }
    }
}

// Makes args->angles, or finds those of the last call to be the same.
static bool prepare_angles(struct prepare_args *args, uint32_t n_tasks)
{
    uint32_t half = args->qkv->rope_dims / 2, n_tokens = args->batch->n_tokens;
    size_t key_words = 2 + (size_t)half + n_tokens;
    size_t key_bytes = key_words * sizeof(uint32_t),
           angle_bytes = 2 * (size_t)n_tokens * half * sizeof(float);
    bool same = args->device->buffers[BUFFER_ANGLES].bytes >= angle_bytes &&
                args->device->buffers[BUFFER_ANGLES_KEY].bytes >= key_bytes;
    args->angles = cpu_buffer(args->device, BUFFER_ANGLES, angle_bytes);
    uint32_t *key = cpu_buffer(args->device, BUFFER_ANGLES_KEY, key_bytes);
    if (!args->angles || !key)
        return false;
    const uint32_t *frequencies = (const uint32_t *)args->qkv->rope_frequency;
    if (same && key[0] == n_tokens && key[1] == half &&
        !memcmp(key + 2, frequencies, half * sizeof(uint32_t)) &&
        !memcmp(key + 2 + half, args->batch->positions, n_tokens * sizeof(uint32_t)))
        return true;
    key[0] = n_tokens;
    key[1] = half;
    memcpy(key + 2, frequencies, half * sizeof(uint32_t));
    memcpy(key + 2 + half, args->batch->positions, n_tokens * sizeof(uint32_t));
    cpu_parallel(args->device, angles_of_tokens, args, n_tasks);
    return true;
}

// --- rows ---

static void prepare_head(const struct prepare_args *args, uint32_t t, float *x, const float *norm)
{
    const struct qkv_args *qkv = args->qkv;
    if (norm)
        args->rows->normalize(x, norm, args->shape->head_size, qkv->norm_epsilon);
    if (!args->angles)
        return;
    uint32_t half = qkv->rope_dims / 2;
    const float *cosines = args->angles + (size_t)t * half;
    args->rows->rotate(x, cosines, cosines + (size_t)args->batch->n_tokens * half, half,
                       qkv->position == POSITION_ROPE_HALVES);
}

static void prepare_token(const struct prepare_args *args, uint32_t t)
{
    const struct qkv_args *qkv = args->qkv;
    const struct batch *batch = args->batch;
    uint32_t size = args->shape->head_size;
    float *q = qkv->q + (size_t)t * qkv->q_stride, *k = qkv->k + (size_t)t * qkv->k_stride;
    const float *v = qkv->v + (size_t)t * qkv->v_stride;
    for (uint32_t head = 0; head < args->shape->n_heads; head++)
        prepare_head(args, t, q + (size_t)head * size, qkv->q_norm);
    uint32_t position = batch->positions[t], lane = position % KV_PAGE_POSITIONS;
    uint32_t page =
        batch->page_tables[(size_t)batch->slots[t] * batch->table_stride + position / KV_PAGE_POSITIONS];
    for (uint32_t head = 0; head < args->shape->n_kv_heads; head++) {
        prepare_head(args, t, k + (size_t)head * size, qkv->k_norm);
        uint16_t *keys = kv_page_head(args->kv, page, head, size);
        args->rows->store_key(keys + lane, k + (size_t)head * size, size);
        args->rows->store_value(kv_head_values(keys, size) + (size_t)lane * kv_padded_size(size),
                                v + (size_t)head * size, size);
    }
}

static void prepare_tokens(void *context, uint32_t task, uint32_t worker)
{
    const struct prepare_args *args = context;
    uint32_t first = task * args->tokens_a_task, end = first + args->tokens_a_task;
    for (uint32_t t = first; t < end && t < args->batch->n_tokens; t++)
        prepare_token(args, t);
}

// Large enough that two threads seldom write into one cache line of keys, small enough to go round.
static uint32_t tokens_a_task(uint32_t n_tokens, uint32_t threads)
{
    uint32_t tokens = n_tokens / (2 * threads);
    return tokens < 1 ? 1 : tokens > 32 ? 32 : tokens;
}

void cpu_attn_prepare(struct device *device, const struct qkv_args *qkv, const struct attention_shape *shape,
                      const struct kv_layer *kv, const struct batch *batch)
{
    struct cpu_device *cpu = cpu_device_of(device);
    struct prepare_args args = {.device = cpu,
                                .rows = cpu->level == LEVEL_AVX512 ? &kv_rows_avx512
                                        : cpu->level == LEVEL_AVX2 ? &kv_rows_avx2
                                                                   : &kv_rows_portable,
                                .qkv = qkv,
                                .shape = shape,
                                .kv = kv,
                                .batch = batch,
                                .tokens_a_task = tokens_a_task(batch->n_tokens, cpu->threads)};
    uint32_t n_tasks = (batch->n_tokens + args.tokens_a_task - 1) / args.tokens_a_task;
    bool rotates = qkv->position != POSITION_LEARNED && qkv->rope_dims >= 2 && batch->n_tokens;
    if (rotates && !prepare_angles(&args, n_tasks))
        return;
    cpu_parallel(cpu, prepare_tokens, &args, n_tasks);
}
