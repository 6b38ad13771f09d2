// The weight cache's contract, point by point: names, true types, what a stage needs, refusals before
// anything is uploaded, all or nothing, idempotent reload, dropping. On the device that
// STRATA_TEST_BACKEND names (the CPU), with ops that fail on demand.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/tensor_type.h"
#include "kernels/device_internal.h"
#include "tests/gguf_writer.h"
#include "tests/suite.h"
#include "worker/weight_cache.h"

enum { C = 256, HEADS = 4, KV_HEADS = 2, D = 64, F = 512, V = 64, LAYERS = 3, PLENTY = 1 << 30 };

struct model {
    unsigned char *bytes;
    struct gguf *gguf;
    struct model_spec spec;
};

static struct device *device;
static struct kernel_ops failing_ops;
static int packs_left, allocs_left, n_allocated;

static int pack_or_fail(struct device *on, const struct matrix *matrix, const void *source,
                        struct error *error)
{
    if (packs_left-- == 0)
        return error_set(error, STATUS_INTERNAL, "packing failed");
    return device_ops(on) == &failing_ops ? STATUS_OK : STATUS_INTERNAL;
}

static void *alloc_or_fail(struct device *on, size_t bytes)
{
    if (allocs_left-- == 0)
        return NULL;
    n_allocated++;
    return calloc(1, bytes);
}

static void count_free(struct device *on, void *data)
{
    n_allocated--;
    free(data);
}

static void upload_to_host(struct device *on, void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

static void setup(void)
{
    struct device_options options = {.backend = getenv("STRATA_TEST_BACKEND"), .threads = 1};
    struct error error = {0};
    ck_assert_int_eq(device_open(&device, &options, &error), 0);
    packs_left = allocs_left = -1;
    n_allocated = 0;
    failing_ops = *device->ops;
    failing_ops.matrix_pack = pack_or_fail;
    failing_ops.alloc = alloc_or_fail;
    failing_ops.free = count_free;
    failing_ops.upload = upload_to_host;
    failing_ops.matrix_load = NULL;
}

static void teardown(void)
{
    device_close(device);
}

static void put(struct gguf_writer *writer, const char *name, uint32_t type, uint64_t width, uint64_t rows)
{
    uint64_t dims[2] = {width, rows};
    size_t before = writer->data.length;
    gguf_writer_tensor(writer, name, type, rows ? 2 : 1, dims);
    // Bytes that differ from tensor to tensor and are small floats, halves and quants all the same.
    for (size_t i = before; i < writer->data.length; i++)
        writer->data.data[i] = (unsigned char)((i * 31 + strlen(name) + (unsigned char)name[4]) & 0x3b);
}

static void put_layer(struct gguf_writer *writer, uint32_t layer, uint32_t type, bool fused, bool gated)
{
    struct {
        const char *part;
        uint32_t type;
        uint64_t width, rows;
        bool when;
    } parts[] = {
        {"attn_norm.weight", TENSOR_F32, C, 0, true},
        {"attn_norm.bias", TENSOR_F32, C, 0, fused},
        {"attn_qkv.weight", type, C, (HEADS + 2 * KV_HEADS) * D, fused},
        {"attn_qkv.bias", TENSOR_F32, (HEADS + 2 * KV_HEADS) * D, 0, fused},
        {"attn_q.weight", type, C, HEADS * D, !fused},
        {"attn_k.weight", type, C, KV_HEADS * D, !fused},
        {"attn_v.weight", TENSOR_Q6_K, C, KV_HEADS * D, !fused},
        {"attn_output.weight", type, HEADS * D, C, true},
        {"ffn_norm.weight", TENSOR_F32, C, 0, true},
        {"ffn_norm.bias", TENSOR_F32, C, 0, fused},
        {"ffn_gate.weight", type, C, F, gated},
        {"ffn_up.weight", type, C, F, true},
        {"ffn_down.weight", TENSOR_Q8_0, F, C, true},
    };
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        char name[64];
        snprintf(name, sizeof(name), "blk.%u.%s", layer, parts[i].part);
        if (parts[i].when)
            put(writer, name, parts[i].type, parts[i].width, parts[i].rows);
    }
}

// A model in the shape of llama or (fused, plain) of gpt2. The spec is written by hand: reading it is another
// test's business.
static void make_model(struct model *model, bool gpt2, bool tied, unsigned char salt)
{
    struct gguf_writer writer = {0};
    gguf_writer_string(&writer, "general.architecture", gpt2 ? "gpt2" : "llama");
    put(&writer, "token_embd.weight", TENSOR_Q4_0, C, V);
    if (gpt2)
        put(&writer, "position_embd.weight", TENSOR_F32, C, 32);
    else
        put(&writer, "rope_freqs.weight", TENSOR_F32, D / 2, 0);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        put_layer(&writer, layer, TENSOR_Q4_K, gpt2, !gpt2);
    put(&writer, "output_norm.weight", TENSOR_F16, C, 0);
    if (gpt2)
        put(&writer, "output_norm.bias", TENSOR_BF16, C, 0);
    if (!tied)
        put(&writer, "output.weight", TENSOR_Q6_K, C, V);
    for (size_t i = 0; i < writer.data.length; i++)
        writer.data.data[i] ^= salt;
    size_t length;
    model->bytes = gguf_writer_finish(&writer, &length);
    struct error error = {0};
    ck_assert_msg(gguf_open_memory(&model->gguf, model->bytes, length, &error) == 0, "%s", error.text);
    model->spec = (struct model_spec){.n_layers = LAYERS,
                                      .width = C,
                                      .n_heads = HEADS,
                                      .n_kv_heads = KV_HEADS,
                                      .head_size = D,
                                      .ffn_width = F,
                                      .vocab_size = V,
                                      .context = 32,
                                      .rope_dims = D,
                                      .rope_base = 10000,
                                      .rope_scale = 1,
                                      .norm = gpt2 ? NORM_LAYER : NORM_RMS,
                                      .position = gpt2 ? POSITION_LEARNED : POSITION_ROPE_ADJACENT,
                                      .ffn = gpt2 ? FFN_PLAIN : FFN_GATED,
                                      .fused_qkv = gpt2,
                                      .attn_bias = gpt2,
                                      .rope_factors = !gpt2,
                                      .tied_head = tied};
}

static void free_model(struct model *model)
{
    gguf_close(model->gguf);
    free(model->bytes);
}

static struct weight_list list_of(const struct model *model, uint32_t first, uint32_t n)
{
    struct weight_list list;
    struct error error = {0};
    ck_assert_msg(weight_list_make(&list, model->gguf, &model->spec, first, n, &error) == 0, "%s",
                  error.text);
    return list;
}

static const struct weight_source *listed(const struct weight_list *list, const char *name)
{
    for (uint32_t i = 0; i < list->count; i++)
        if (!strcmp(list->items[i].name, name))
            return &list->items[i];
    return NULL;
}

static struct weight_cache *new_cache(const struct model *model)
{
    struct weight_cache *cache;
    ck_assert_int_eq(weight_cache_new(&cache, device), 0);
    weight_cache_set_file(cache, model->gguf);
    return cache;
}

static struct weight_totals load(struct weight_cache *cache, const struct weight_list *list)
{
    struct weight_load how = {.memory_free = PLENTY};
    struct weight_totals totals;
    struct error error = {0};
    ck_assert_msg(weight_cache_precache(cache, list, &how, &totals, &error) == 0, "%s", error.text);
    return totals;
}

START_TEST(test_names_of_a_separate_gated_model)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list list = list_of(&model, 0, LAYERS);
    const char *expected[] = {
        "token_embd.weight",       "rope_freqs.weight",          "output_norm.weight",
        "output.weight",           "layer.0.attn_q.weight",      "layer.1.attn_k.weight",
        "layer.2.attn_v.weight",   "layer.0.attn_output.weight", "layer.0.attn_norm.weight",
        "layer.0.ffn_norm.weight", "layer.0.ffn_gate.weight",    "layer.0.ffn_up.weight",
        "layer.0.ffn_down.weight"};
    for (size_t i = 0; i < sizeof(expected) / sizeof(expected[0]); i++)
        ck_assert_msg(listed(&list, expected[i]) != NULL, "%s", expected[i]);
    ck_assert_uint_eq(list.count, 4 + 9 * LAYERS);
    ck_assert_ptr_null(listed(&list, "layer.0.attn_qkv.weight"));
    ck_assert_uint_eq(listed(&list, "layer.2.attn_v.weight")->type, TENSOR_Q6_K);
    ck_assert_uint_eq(listed(&list, "layer.2.attn_q.weight")->type, TENSOR_Q4_K);
    ck_assert_uint_eq(listed(&list, "token_embd.weight")->form, WEIGHT_TABLE);
    ck_assert_uint_eq(listed(&list, "layer.1.ffn_down.weight")->input, WEIGHT_READS_ACTIVATED);
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < list.count; i++)
        bytes += list.items[i].tensor->bytes;
    ck_assert_uint_eq(list.source_bytes, bytes);
    weight_list_free(&list);
    free_model(&model);
}
END_TEST

START_TEST(test_names_of_a_fused_plain_tied_model)
{
    struct model model;
    make_model(&model, true, true, 0);
    struct weight_list list = list_of(&model, 0, LAYERS);
    ck_assert_ptr_nonnull(listed(&list, "layer.1.attn_qkv.weight"));
    ck_assert_ptr_nonnull(listed(&list, "layer.1.attn_qkv.bias"));
    ck_assert_ptr_nonnull(listed(&list, "layer.1.attn_norm.bias"));
    ck_assert_ptr_nonnull(listed(&list, "position_embd.weight"));
    ck_assert_ptr_null(listed(&list, "layer.1.attn_q.weight"));
    ck_assert_ptr_null(listed(&list, "layer.1.ffn_gate.weight"));
    const struct weight_source *head = listed(&list, "output.weight"),
                               *table = listed(&list, "token_embd.weight");
    ck_assert_ptr_eq(head->tensor, table->tensor);
    ck_assert_uint_eq(head->type, TENSOR_Q4_0);
    ck_assert_uint_eq(head->form, WEIGHT_MATRIX);
    weight_list_free(&list);
    free_model(&model);
}
END_TEST

START_TEST(test_each_stage_gets_its_slice)
{
    struct model model;
    make_model(&model, false, true, 0);
    struct weight_list stages[3];
    for (uint32_t i = 0; i < 3; i++) {
        stages[i] = list_of(&model, i, 1);
        ck_assert_int_eq(listed(&stages[i], "token_embd.weight") != NULL, i == 0);
        ck_assert_int_eq(listed(&stages[i], "output.weight") != NULL, i == 2);
        ck_assert_int_eq(listed(&stages[i], "output_norm.weight") != NULL, i == 2);
        ck_assert_ptr_nonnull(listed(&stages[i], "rope_freqs.weight"));
        char mine[64], other[64];
        snprintf(mine, sizeof(mine), "layer.%u.ffn_up.weight", i);
        snprintf(other, sizeof(other), "layer.%u.ffn_up.weight", (i + 1) % 3);
        ck_assert_ptr_nonnull(listed(&stages[i], mine));
        ck_assert_ptr_null(listed(&stages[i], other));
        weight_list_free(&stages[i]);
    }
    struct weight_list list;
    struct error error = {0};
    ck_assert_int_eq(weight_list_make(&list, model.gguf, &model.spec, 2, 2, &error), STATUS_INVALID);
    ck_assert_int_eq(weight_list_make(&list, model.gguf, &model.spec, 3, 1, &error), STATUS_INVALID);
    ck_assert_int_eq(weight_list_make(&list, model.gguf, &model.spec, 0, 0, &error), STATUS_INVALID);
    free_model(&model);
}
END_TEST

START_TEST(test_a_missing_tensor_is_named)
{
    struct model model;
    make_model(&model, false, true, 0);
    model.spec.tied_head = false;
    struct weight_list list;
    struct error error = {0};
    ck_assert_int_eq(weight_list_make(&list, model.gguf, &model.spec, 0, LAYERS, &error), STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "output.weight"));
    free_model(&model);
}
END_TEST

START_TEST(test_loading_gives_types_shapes_and_bytes)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list list = list_of(&model, 0, LAYERS);
    struct weight_cache *cache = new_cache(&model);
    uint64_t planned = weight_cache_missing_bytes(cache, &list);
    ck_assert_ptr_null(weight_cache_matrix(cache, "layer.0.attn_q.weight")); // not yet
    struct weight_totals totals = load(cache, &list);
    ck_assert_uint_eq(totals.uploaded, planned);
    ck_assert_uint_eq(totals.cached, planned);
    ck_assert_uint_eq(totals.source_bytes, list.source_bytes);
    ck_assert_uint_eq(totals.n_loaded, list.count);
    ck_assert_uint_eq(weight_cache_count(cache), list.count);
    const struct matrix *v = weight_cache_matrix(cache, "layer.2.attn_v.weight");
    ck_assert_uint_eq(v->type, TENSOR_Q6_K);
    ck_assert_uint_eq(v->rows, KV_HEADS * D);
    ck_assert_uint_eq(v->width, C);
    ck_assert(!v->table);
    ck_assert(weight_cache_matrix(cache, "token_embd.weight")->table);
    ck_assert_ptr_null(weight_cache_matrix(cache, "output_norm.weight"));
    ck_assert_ptr_nonnull(weight_cache_vector(cache, "output_norm.weight", C));
    ck_assert_ptr_null(weight_cache_vector(cache, "output_norm.weight", C + 1));
    ck_assert_ptr_null(weight_cache_vector(cache, "output.weight", C));
    ck_assert_ptr_null(weight_cache_vector(cache, "no.such", C));
    weight_cache_free(cache);
    weight_list_free(&list);
    free_model(&model);
}
END_TEST

START_TEST(test_vectors_widen_to_f32)
{
    static const struct {
        uint16_t half;
        float value;
    } halves[] = {{0x3c00, 1},          {0xc000, -2},    {0x0001, 0x1p-24f}, {0x03ff, 0x3ffp-24f},
                  {0x0400, 0x1p-14f},   {0x7bff, 65504}, {0x8000, -0.0f},    {0x7c00, __builtin_inff()},
                  {0x3555, 0x1.554p-2f}};
    enum { N = sizeof(halves) / sizeof(halves[0]) };
    struct gguf_writer writer = {0};
    uint64_t dims[1] = {N};
    gguf_writer_tensor(&writer, "h", TENSOR_F16, 1, dims);
    gguf_writer_tensor(&writer, "b", TENSOR_BF16, 1, dims);
    for (int i = 0; i < N; i++) {
        memcpy(writer.data.data + 2 * i, &halves[i].half, 2);
        uint32_t bits;
        memcpy(&bits, &halves[i].value, 4);
        uint16_t top = (uint16_t)(bits >> 16);
        memcpy(writer.data.data + 32 + 2 * i, &top, 2);
    }
    struct model model;
    size_t length;
    model.bytes = gguf_writer_finish(&writer, &length);
    struct error error = {0};
    ck_assert_msg(gguf_open_memory(&model.gguf, model.bytes, length, &error) == 0, "%s", error.text);
    struct weight_source items[2] = {
        {"h", gguf_find_tensor(model.gguf, "h"), TENSOR_F16, WEIGHT_VECTOR, WEIGHT_READS_NONE, 1, N},
        {"b", gguf_find_tensor(model.gguf, "b"), TENSOR_BF16, WEIGHT_VECTOR, WEIGHT_READS_NONE, 1, N}};
    struct weight_list list = {items, 2, 2, 4 * N};
    struct weight_cache *cache = new_cache(&model);
    load(cache, &list);
    float h[N], b[N];
    device_ops(device)->download(device, h, weight_cache_vector(cache, "h", N), sizeof(h));
    device_ops(device)->download(device, b, weight_cache_vector(cache, "b", N), sizeof(b));
    for (int i = 0; i < N; i++) {
        ck_assert_mem_eq(&h[i], &halves[i].value, 4);
        uint32_t exact, got;
        memcpy(&exact, &halves[i].value, 4);
        memcpy(&got, &b[i], 4);
        ck_assert_uint_eq(got, exact & 0xffff0000);
    }
    weight_cache_free(cache);
    free_model(&model);
}
END_TEST

// Tries to load and must fail with nothing uploaded and the sentence naming `named`.
static void refuse(struct weight_cache *cache, const struct weight_list *list, uint64_t memory,
                   uint64_t others, int status, const char *named)
{
    uint32_t count = weight_cache_count(cache);
    uint64_t bytes = weight_cache_bytes(cache);
    struct weight_load how = {.memory_free = memory, .other_bytes = others};
    struct weight_totals totals;
    struct error error = {0};
    ck_assert_int_eq(weight_cache_precache(cache, list, &how, &totals, &error), status);
    ck_assert_msg(strstr(error.text, named) != NULL, "'%s' does not say '%s'", error.text, named);
    ck_assert_uint_eq(weight_cache_count(cache), count);
    ck_assert_uint_eq(weight_cache_bytes(cache), bytes);
}

START_TEST(test_unknown_types_are_refused_by_name_before_any_upload)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list list = list_of(&model, 0, LAYERS);
    device->ops = &failing_ops;
    struct weight_cache *cache = new_cache(&model);
    list.items[list.count - 1].type = 16; // the very last one: IQ2_XXS
    refuse(cache, &list, PLENTY, 0, STATUS_UNSUPPORTED, list.items[list.count - 1].name);
    refuse(cache, &list, PLENTY, 0, STATUS_UNSUPPORTED, "IQ2_XXS");
    ck_assert_int_eq(n_allocated, 0);
    list.items[3].type = 77;
    refuse(cache, &list, PLENTY, 0, STATUS_UNSUPPORTED, list.items[3].name);
    ck_assert_int_eq(n_allocated, 0);
    weight_cache_free(cache);
    weight_list_free(&list);
    free_model(&model);
}
END_TEST

START_TEST(test_memory_is_checked_first_everything_counted)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list list = list_of(&model, 0, LAYERS);
    device->ops = &failing_ops;
    struct weight_cache *cache = new_cache(&model);
    uint64_t needed = weight_cache_missing_bytes(cache, &list);
    refuse(cache, &list, needed - 1, 0, STATUS_NO_MEMORY, "MB");
    refuse(cache, &list, needed + 999, 1000, STATUS_NO_MEMORY, "KV");
    ck_assert_int_eq(n_allocated, 0);
    struct weight_load how = {.memory_free = needed + 1000, .other_bytes = 1000};
    struct weight_totals totals;
    ck_assert_int_eq(weight_cache_precache(cache, &list, &how, &totals, NULL), 0);
    how.memory_free = 1000; // nothing is missing any more
    ck_assert_int_eq(weight_cache_precache(cache, &list, &how, &totals, NULL), 0);
    weight_cache_free(cache);
    weight_list_free(&list);
    free_model(&model);
}
END_TEST

START_TEST(test_a_failure_anywhere_leaves_the_cache_as_it_was)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list one = list_of(&model, 1, 1), all = list_of(&model, 0, LAYERS);
    device->ops = &failing_ops;
    struct weight_cache *cache = new_cache(&model);
    load(cache, &one);
    int held = n_allocated;
    for (int fail_at = 0; fail_at < 5; fail_at++) {
        packs_left = fail_at * 3;
        refuse(cache, &all, PLENTY, 0, STATUS_INTERNAL, ".weight: packing failed");
        packs_left = -1;
        allocs_left = fail_at * 5;
        refuse(cache, &all, PLENTY, 0, STATUS_NO_MEMORY, "weight ");
        allocs_left = -1;
        ck_assert_int_eq(n_allocated, held);
    }
    struct weight_totals totals = load(cache, &all);
    ck_assert_uint_eq(totals.n_kept, one.count);
    ck_assert_uint_eq(totals.n_loaded, all.count - one.count);
    weight_cache_free(cache);
    ck_assert_int_eq(n_allocated, 0);
    weight_list_free(&one);
    weight_list_free(&all);
    free_model(&model);
}
END_TEST

START_TEST(test_reload_of_the_same_source_does_nothing)
{
    struct model model, same;
    make_model(&model, false, false, 0);
    make_model(&same, false, false, 0);
    struct weight_list list = list_of(&model, 0, LAYERS), again = list_of(&same, 0, LAYERS);
    struct weight_cache *cache = new_cache(&model);
    load(cache, &list);
    const void *before = weight_cache_matrix(cache, "output.weight")->data;
    struct weight_totals totals = load(cache, &list);
    ck_assert_uint_eq(totals.uploaded, 0);
    ck_assert_uint_eq(totals.n_kept, list.count);
    weight_cache_set_file(cache, same.gguf); // a copy of the file is the same source
    totals = load(cache, &again);
    ck_assert_uint_eq(totals.uploaded, 0);
    ck_assert_ptr_eq(weight_cache_matrix(cache, "output.weight")->data, before);
    weight_cache_free(cache);
    weight_list_free(&list);
    weight_list_free(&again);
    free_model(&model);
    free_model(&same);
}
END_TEST

START_TEST(test_reload_from_another_source_is_an_error)
{
    struct model model, other;
    make_model(&model, false, false, 0);
    make_model(&other, false, false, 1); // the same table of tensors, other bytes
    ck_assert_uint_eq(gguf_fingerprint(model.gguf), gguf_fingerprint(other.gguf));
    struct weight_list mine = list_of(&model, 0, 1), theirs = list_of(&other, 0, LAYERS);
    struct weight_cache *cache = new_cache(&model);
    load(cache, &mine);
    weight_cache_set_file(cache, other.gguf);
    refuse(cache, &theirs, PLENTY, 0, STATUS_INVALID, "already loaded from another source");
    weight_cache_drop(cache, NULL);
    ck_assert_uint_eq(load(cache, &theirs).n_loaded, theirs.count);
    weight_cache_free(cache);
    weight_list_free(&mine);
    weight_list_free(&theirs);
    free_model(&model);
    free_model(&other);
}
END_TEST

START_TEST(test_drop_keeps_what_the_new_plan_names)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list before = list_of(&model, 0, 2), after = list_of(&model, 1, 2);
    struct weight_cache *cache = new_cache(&model);
    load(cache, &before);
    const void *kept = weight_cache_matrix(cache, "layer.1.ffn_up.weight")->data;
    uint64_t bytes = weight_cache_bytes(cache);
    uint64_t dropped = weight_cache_drop(cache, &after);
    ck_assert_uint_gt(dropped, 0);
    ck_assert_uint_eq(weight_cache_bytes(cache), bytes - dropped);
    ck_assert_ptr_null(weight_cache_matrix(cache, "layer.0.ffn_up.weight"));
    ck_assert_ptr_null(weight_cache_matrix(cache, "token_embd.weight"));
    struct weight_totals totals = load(cache, &after);
    ck_assert_uint_eq(totals.n_kept, 10); // layer 1 and rope_freqs
    ck_assert_ptr_eq(weight_cache_matrix(cache, "layer.1.ffn_up.weight")->data, kept);
    ck_assert_uint_eq(weight_cache_drop(cache, &after), 0);
    ck_assert_uint_eq(weight_cache_drop(cache, NULL), totals.cached);
    ck_assert_uint_eq(weight_cache_count(cache), 0);
    weight_cache_free(cache);
    weight_list_free(&before);
    weight_list_free(&after);
    free_model(&model);
}
END_TEST

struct progress {
    uint64_t last, total, calls, stop_after;
};

static int note_progress(void *context, uint64_t done, uint64_t total)
{
    struct progress *progress = context;
    ck_assert_uint_gt(done, progress->last);
    ck_assert_uint_le(done, total);
    progress->last = done;
    progress->total = total;
    return ++progress->calls == progress->stop_after;
}

START_TEST(test_progress_reaches_the_total_and_can_stop_the_load)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list list = list_of(&model, 0, LAYERS);
    struct weight_cache *cache = new_cache(&model);
    struct progress progress = {.stop_after = 5};
    struct weight_load how = {.memory_free = PLENTY, .progress = note_progress, .context = &progress};
    struct weight_totals totals;
    struct error error = {0};
    ck_assert_int_eq(weight_cache_precache(cache, &list, &how, &totals, &error), STATUS_CANCELLED);
    ck_assert_uint_eq(weight_cache_count(cache), 0);
    progress = (struct progress){0};
    ck_assert_int_eq(weight_cache_precache(cache, &list, &how, &totals, &error), 0);
    ck_assert_uint_eq(progress.calls, list.count);
    ck_assert_uint_eq(progress.last, list.source_bytes);
    ck_assert_uint_eq(progress.total, list.source_bytes);
    weight_cache_free(cache);
    weight_list_free(&list);
    free_model(&model);
}
END_TEST

// --- a backend that reads by itself ---

// Three threads a matrix, which nobody waits for before the next sync.
enum { READERS = 3, PENDING = 64 };
struct reader {
    pthread_t thread;
    struct matrix_source source;
    void *to;
    uint32_t first, count;
    struct error error;
};
struct pending {
    struct matrix matrix;
    void *bytes;
    struct reader readers[READERS];
};
static struct kernel_ops reading_ops;
static const struct kernel_ops *real_ops;
static struct pending pending[PENDING];
static uint32_t n_pending;

static void *run_reader(void *argument)
{
    struct reader *reader = argument;
    reader->source.read(reader->source.context, reader->to, reader->first, reader->count, &reader->error);
    return NULL;
}

static int load_with_threads(struct device *on, const struct matrix *matrix,
                             const struct matrix_source *source, struct error *error)
{
    struct pending *new = &pending[n_pending++];
    size_t row_bytes = tensor_type_bytes(matrix->type, matrix->width, 1);
    *new = (struct pending){.matrix = *matrix, .bytes = malloc(matrix->rows * row_bytes)};
    for (uint32_t i = READERS; i-- > 0;) { // the last rows first
        uint32_t first = matrix->rows * i / READERS, end = matrix->rows * (i + 1) / READERS;
        new->readers[i] = (struct reader){.source = *source,
                                          .to = (char *)new->bytes + first *row_bytes,
                                          .first = first,
                                          .count = end - first};
        ck_assert_int_eq(pthread_create(&new->readers[i].thread, NULL, run_reader, &new->readers[i]), 0);
    }
    return STATUS_OK;
}

static int sync_threads(struct device *on, struct error *error)
{
    int status = STATUS_OK;
    for (uint32_t p = 0; p < n_pending; p++) {
        for (uint32_t i = 0; i < READERS; i++) {
            pthread_join(pending[p].readers[i].thread, NULL);
            if (!status && pending[p].readers[i].error.status) {
                *error = pending[p].readers[i].error;
                status = error->status;
            }
        }
        if (!status)
            status = real_ops->matrix_pack(on, &pending[p].matrix, pending[p].bytes, error);
        if (!status)
            status = real_ops->sync(on, error);
        free(pending[p].bytes);
    }
    n_pending = 0;
    return status;
}

static void read_with_threads(void)
{
    real_ops = device->ops;
    reading_ops = *device->ops;
    reading_ops.matrix_load = load_with_threads;
    reading_ops.sync = sync_threads;
    device->ops = &reading_ops;
}

// The model once more, in a file.
static void write_model(const struct model *model, char path[64], struct gguf **gguf)
{
    struct error error = {0};
    strcpy(path, P_tmpdir "/strata-weights-XXXXXX");
    int file = mkstemp(path);
    ck_assert_int_ge(file, 0);
    size_t length = gguf_file_bytes(model->gguf);
    ck_assert_int_eq(write(file, model->bytes, length), (ssize_t)length);
    close(file);
    ck_assert_msg(gguf_open(gguf, path, &error) == 0, "%s", error.text);
}

static void expect_equal_weights(const struct weight_cache *a, const struct weight_cache *b,
                                 const struct weight_list *list)
{
    for (uint32_t i = 0; i < list->count; i++) {
        const struct matrix *one = weight_cache_matrix(a, list->items[i].name),
                            *other = weight_cache_matrix(b, list->items[i].name);
        ck_assert_int_eq(one != NULL, other != NULL);
        if (!one)
            continue;
        ck_assert_uint_eq(one->bytes, other->bytes);
        unsigned char *x = malloc(one->bytes), *y = malloc(one->bytes);
        real_ops->download(device, x, one->data, one->bytes);
        real_ops->download(device, y, other->data, one->bytes);
        ck_assert_msg(memcmp(x, y, one->bytes) == 0, "%s", list->items[i].name);
        free(x);
        free(y);
    }
}

START_TEST(test_however_it_is_read_a_weight_is_the_same)
{
    struct model model, other;
    make_model(&model, false, false, 0);
    make_model(&other, false, false, 1);
    char path[64];
    struct gguf *file;
    write_model(&model, path, &file);
    struct weight_list mapped = list_of(&model, 0, LAYERS), theirs = list_of(&other, 0, LAYERS), read;
    ck_assert_int_eq(weight_list_make(&read, file, &model.spec, 0, LAYERS, NULL), 0);
    const struct kernel_ops *ops = device->ops;
    struct weight_cache *plain = new_cache(&model);
    load(plain, &mapped);
    read_with_threads();
    struct weight_cache *cache = new_cache(&model);
    weight_cache_set_file(cache, file);
    struct weight_totals totals = load(cache, &read);
    ck_assert_uint_eq(totals.n_loaded, read.count);
    expect_equal_weights(plain, cache, &mapped);
    weight_cache_set_file(cache, model.gguf); // hashed through the mapping, the other way round too
    ck_assert_uint_eq(load(cache, &mapped).uploaded, 0);
    weight_cache_set_file(cache, other.gguf);
    refuse(cache, &theirs, PLENTY, 0, STATUS_INVALID, "already loaded from another source");
    device->ops = ops;
    weight_cache_set_file(plain, file);
    ck_assert_uint_eq(load(plain, &read).n_kept, read.count);
    weight_cache_free(cache);
    weight_cache_free(plain);
    weight_list_free(&mapped);
    weight_list_free(&theirs);
    weight_list_free(&read);
    gguf_close(file);
    unlink(path);
    free_model(&model);
    free_model(&other);
}
END_TEST

struct interruption {
    const char *path; // cut short after the first weight
    uint32_t stop_after, calls;
};

static int interrupt(void *context, uint64_t done, uint64_t total)
{
    struct interruption *interruption = context;
    if (interruption->path && interruption->calls == 0)
        ck_assert_int_eq(truncate(interruption->path, 8192), 0);
    return ++interruption->calls == interruption->stop_after;
}

START_TEST(test_a_load_that_is_read_by_threads_can_be_given_up)
{
    struct model model;
    make_model(&model, false, false, 0);
    struct weight_list list = list_of(&model, 0, LAYERS);
    read_with_threads();
    struct weight_cache *cache = new_cache(&model);
    for (uint32_t at = 1; at <= list.count; at += 7) {
        struct interruption stop = {.stop_after = at};
        struct weight_load how = {.memory_free = PLENTY, .progress = interrupt, .context = &stop};
        struct weight_totals totals;
        struct error error = {0};
        ck_assert_int_eq(weight_cache_precache(cache, &list, &how, &totals, &error), STATUS_CANCELLED);
        ck_assert_uint_eq(weight_cache_count(cache), 0);
        ck_assert_uint_eq(weight_cache_bytes(cache), 0);
        ck_assert_uint_eq(n_pending, 0); // nobody reads for an entry that is gone
    }
    ck_assert_uint_eq(load(cache, &list).n_loaded, list.count);
    weight_cache_free(cache);
    weight_list_free(&list);
    free_model(&model);
}
END_TEST

START_TEST(test_a_file_that_was_cut_short_is_an_error)
{
    struct model model;
    make_model(&model, false, false, 0);
    char path[64];
    struct gguf *file;
    write_model(&model, path, &file);
    struct weight_list list;
    ck_assert_int_eq(weight_list_make(&list, file, &model.spec, 0, LAYERS, NULL), 0);
    read_with_threads();
    struct weight_cache *cache = new_cache(&model);
    weight_cache_set_file(cache, file);
    struct interruption cut = {.path = path}; // while it is read
    struct weight_load how = {.memory_free = PLENTY, .progress = interrupt, .context = &cut};
    struct weight_totals totals;
    struct error error = {0};
    ck_assert_int_eq(weight_cache_precache(cache, &list, &how, &totals, &error), STATUS_CORRUPT);
    ck_assert_msg(strstr(error.text, "weight ") && strstr(error.text, "was cut short"), "%s", error.text);
    ck_assert_uint_eq(weight_cache_count(cache), 0);
    refuse(cache, &list, PLENTY, 0, STATUS_CORRUPT, "was changed since it was opened"); // before it is read
    device->ops = real_ops;
    refuse(cache, &list, PLENTY, 0, STATUS_CORRUPT, "was changed since it was opened");
    weight_cache_free(cache);
    weight_list_free(&list);
    gguf_close(file);
    unlink(path);
    free_model(&model);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("weight_cache");
    TCase *tests = tcase_create("contract");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, test_names_of_a_separate_gated_model);
    tcase_add_test(tests, test_names_of_a_fused_plain_tied_model);
    tcase_add_test(tests, test_each_stage_gets_its_slice);
    tcase_add_test(tests, test_a_missing_tensor_is_named);
    tcase_add_test(tests, test_loading_gives_types_shapes_and_bytes);
    tcase_add_test(tests, test_vectors_widen_to_f32);
    tcase_add_test(tests, test_unknown_types_are_refused_by_name_before_any_upload);
    tcase_add_test(tests, test_memory_is_checked_first_everything_counted);
    tcase_add_test(tests, test_a_failure_anywhere_leaves_the_cache_as_it_was);
    tcase_add_test(tests, test_reload_of_the_same_source_does_nothing);
    tcase_add_test(tests, test_reload_from_another_source_is_an_error);
    tcase_add_test(tests, test_drop_keeps_what_the_new_plan_names);
    tcase_add_test(tests, test_progress_reaches_the_total_and_can_stop_the_load);
    tcase_add_test(tests, test_however_it_is_read_a_weight_is_the_same);
    tcase_add_test(tests, test_a_load_that_is_read_by_threads_can_be_given_up);
    tcase_add_test(tests, test_a_file_that_was_cut_short_is_an_error);
    suite_add_tcase(suite, tests);
    return suite;
}
