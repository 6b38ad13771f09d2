// Memory: a step like the last one allocates nothing, and when any one allocation of attention or the sampler
// fails (each in turn), the failure is reported and the next call is right again. Replaces the C library's
// allocator to count and to fail, which sanitizers do not allow, and which CUDA's driver would not notice:
// there, this suite is empty.
#include "tests/ops/op_fixture.h"

#include <errno.h>

#include "kernels/cpu/cpu_internal.h"

static bool counting; // only inside ops
static uint64_t allocations, fail_at = UINT64_MAX;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CAN_REPLACE_MALLOC false
#else
#define CAN_REPLACE_MALLOC true
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_memalign(size_t, size_t);

static bool fails(void)
{
    if (!counting || allocations++ != fail_at)
        return false;
    errno = ENOMEM;
    return true;
}

__attribute__((visibility("default"))) void *malloc(size_t bytes)
{
    return fails() ? NULL : __libc_malloc(bytes);
}

__attribute__((visibility("default"))) void *calloc(size_t count, size_t bytes)
{
    return fails() ? NULL : __libc_calloc(count, bytes);
}

__attribute__((visibility("default"))) void *aligned_alloc(size_t alignment, size_t bytes)
{
    return fails() ? NULL : __libc_memalign(alignment, bytes);
}
#endif

static void count_from_here(uint64_t fails_at)
{
    allocations = 0;
    fail_at = fails_at;
    counting = true;
}

// --- attention ---

// Heads of 40, so that rows wait in a buffer; a context of several parts, so that those do too.
enum { HEADS = 4, KV_HEADS = 2, SIZE = 40, CONTEXT = 1100, TOKENS = 9, PAGES = (CONTEXT + 63) / 64 };

struct scene {
    struct device *device;
    struct batch batch;
    struct kv_layer kv;
    struct qkv_args qkv;
    struct activation out;
    float *q_source;
};

static struct scene scene_open(void)
{
    struct scene scene = {.device = fixture_open(device_best_level("cpu", 0), 2)};
    const struct kernel_ops *ops = device_ops(scene.device);
    uint32_t positions[TOKENS], slots[TOKENS] = {0}, table[PAGES];
    struct batch_span span = {0, TOKENS, 0, CONTEXT - TOKENS};
    float frequencies[SIZE / 2], rows[TOKENS * HEADS * SIZE];
    for (uint32_t t = 0; t < TOKENS; t++)
        positions[t] = CONTEXT - TOKENS + t;
    for (uint32_t i = 0; i < PAGES; i++)
        table[i] = i;
    for (uint32_t i = 0; i < SIZE / 2; i++)
        frequencies[i] = 1 / (1 + (float)i);
    fixture_normals(rows, TOKENS * HEADS * SIZE, 1);
    scene.batch = (struct batch){.n_tokens = TOKENS,
                                 .n_spans = 1,
                                 .positions = fixture_put(scene.device, positions, sizeof positions),
                                 .slots = fixture_put(scene.device, slots, sizeof slots),
                                 .spans = fixture_put(scene.device, &span, sizeof span),
                                 .page_tables = fixture_put(scene.device, table, sizeof table),
                                 .table_stride = PAGES};
    scene.kv.page_bytes = ops->kv_page_bytes(scene.device, KV_HEADS, SIZE);
    scene.kv.data = fixture_put(scene.device, NULL, PAGES * scene.kv.page_bytes);
    scene.q_source = fixture_put(scene.device, rows, sizeof rows);
    scene.qkv =
        (struct qkv_args){.q = fixture_put(scene.device, NULL, sizeof rows),
                          .k = fixture_put(scene.device, NULL, sizeof rows),
                          .v = scene.q_source,
                          .q_stride = HEADS * SIZE,
                          .k_stride = HEADS * SIZE,
                          .v_stride = HEADS * SIZE,
                          .position = POSITION_ROPE_HALVES,
                          .rope_dims = SIZE,
                          .rope_frequency = fixture_put(scene.device, frequencies, sizeof frequencies)};
    scene.out = (struct activation){.width = HEADS * SIZE, .rows = TOKENS, .forms = FORM_F32};
    scene.out.data =
        fixture_put(scene.device, NULL, ops->activation_bytes(scene.device, HEADS * SIZE, TOKENS, FORM_F32));
    return scene;
}

static void scene_close(struct scene *scene)
{
    const void *all[] = {scene->batch.positions,
                         scene->batch.slots,
                         scene->batch.spans,
                         scene->batch.page_tables,
                         scene->kv.data,
                         scene->qkv.q,
                         scene->qkv.k,
                         scene->q_source,
                         scene->qkv.rope_frequency,
                         scene->out.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        fixture_drop(scene->device, all[i]);
    fixture_close(scene->device);
}

// The status of one step, whose first output goes to *first.
static int scene_step(struct scene *scene, uint64_t fails_at, float *first)
{
    const struct kernel_ops *ops = device_ops(scene->device);
    struct attention_shape shape = {HEADS, KV_HEADS, SIZE, 0, 0.158f};
    size_t bytes = TOKENS * HEADS * SIZE * sizeof(float);
    ops->copy(scene->device, scene->qkv.q, scene->q_source, bytes);
    ops->copy(scene->device, scene->qkv.k, scene->q_source, bytes);
    struct error error = {0};
    count_from_here(fails_at);
    ops->attn_prepare(scene->device, &scene->qkv, &shape, &scene->kv, &scene->batch);
    ops->attention(scene->device, &scene->out, scene->qkv.q, HEADS * SIZE, &shape, &scene->kv, &scene->batch);
    counting = false;
    int status = ops->sync(scene->device, &error);
    ck_assert_int_eq(status, error.status);
    ck_assert_int_eq(status != 0, error.text[0] != 0);
    *first = cpu_activation_rows(&scene->out).floats[0];
    return status;
}

START_TEST(test_attention)
{
    fixture_seed("attention's memory");
    struct scene scene = scene_open();
    float expected, got;
    ck_assert_int_eq(scene_step(&scene, UINT64_MAX, &expected), 0);
    uint64_t warming = allocations;
    ck_assert_uint_gt(warming, 4);
    ck_assert_int_eq(scene_step(&scene, UINT64_MAX, &got), 0);
    ck_assert_uint_eq(allocations, 0); // steady
    struct cpu_device *cpu = cpu_device_of(scene.device);
    for (uint64_t failing = 0; failing < warming; failing++) {
        for (size_t i = 0; i < sizeof cpu->buffers / sizeof *cpu->buffers; i++) { // as if new
            free(cpu->buffers[i].data);
            cpu->buffers[i] = (struct cpu_buffer){0};
        }
        cpu->scratch_bytes = 0;
        ck_assert_int_eq(scene_step(&scene, failing, &got), STATUS_NO_MEMORY);
        ck_assert_int_eq(scene_step(&scene, UINT64_MAX, &got), 0);
        ck_assert(got == expected);
    }
    scene_close(&scene);
}
END_TEST

// --- sampler ---

enum { VOCAB = 400, HISTORY = 100 };

START_TEST(test_sampler)
{
    fixture_seed("the sampler's memory");
    struct device *device = fixture_open(device_best_level("cpu", 0), 1);
    const struct kernel_ops *ops = device_ops(device);
    struct error error = {0};
    struct sampler *sampler;
    for (uint64_t failing = 0; failing < 2; failing++) {
        count_from_here(failing);
        int status = ops->sampler_new(&sampler, device, 2, VOCAB, &error);
        counting = false;
        ck_assert_int_eq(status, STATUS_NO_MEMORY);
        ck_assert(strstr(error.text, "2 sequences"));
    }
    ck_assert_int_eq(ops->sampler_new(&sampler, device, 2, VOCAB, &error), 0);

    int32_t history[HISTORY], banned[] = {3};
    struct logit_bias bias = {5, 1};
    for (int i = 0; i < HISTORY; i++)
        history[i] = i;
    struct sampler_open open = {.params = SAMPLING_DEFAULTS,
                                .history = history,
                                .n_history = HISTORY,
                                .biases = &bias,
                                .n_biases = 1,
                                .banned = banned,
                                .n_banned = 1};
    open.params.repetition_penalty = 2;
    uint64_t failing = 0;
    for (int status = STATUS_NO_MEMORY; status; failing++) {
        count_from_here(failing);
        status = ops->sampler_open(device, sampler, 1, &open);
        counting = false;
        ck_assert(status == 0 || status == STATUS_NO_MEMORY);
    }
    ck_assert_uint_gt(failing, 4); // biases, bans, a table that grew

    float logits[VOCAB] = {0}; // even, so that ever new tokens are seen and the table grows again
    float *on_device = fixture_put(device, logits, sizeof logits), *logprobs = fixture_put(device, NULL, 4);
    int32_t *token = fixture_put(device, NULL, sizeof *token);
    uint32_t failed = 0;
    for (uint32_t position = 0; position < 300; position++) {
        struct sample_row row = {.slot = 1, .position = position, .draws = 1};
        for (fail_at = 0;; fail_at = UINT64_MAX) {
            count_from_here(fail_at);
            ops->sample(device, sampler, on_device, &row, 1, token, logprobs, NULL);
            counting = false;
            if (ops->sync(device, &error) == 0)
                break;
            ck_assert_int_eq(error.status, STATUS_NO_MEMORY);
            failed++;
        }
    }
    ck_assert_uint_ge(failed, 2); // scratch, and the table
    ck_assert_uint_le(failed, 4); // otherwise nothing was allocated
    fixture_drop(device, token);
    fixture_drop(device, logprobs);
    fixture_drop(device, on_device);
    ops->sampler_free(device, sampler);
    fixture_close(device);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("op_memory");
    TCase *tcase = tcase_create("op_memory");
    if (CAN_REPLACE_MALLOC && !fixture_on_cuda()) {
        tcase_add_test(tcase, test_attention);
        tcase_add_test(tcase, test_sampler);
    }
    suite_add_tcase(suite, tcase);
    return suite;
}
