// model_spec: every family in every form it comes in, and each way a file can contradict itself or ask for
// what Strata lacks. The models are written by tests/model_writer.c, which knows the families on its own.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/limits.h"
#include "common/model_spec.h"
#include "common/tensor_type.h"
#include "tests/model_writer.h"
#include "tests/suite.h"

static struct gguf_writer writer;
static struct error error;
static unsigned char *file;
static struct gguf *gguf;
static struct model_spec spec;

static void set_up(void)
{
    writer = (struct gguf_writer){0};
    error = (struct error){0};
    file = NULL;
    gguf = NULL;
}

static void close_all(void)
{
    gguf_close(gguf);
    free(file);
    gguf = NULL;
    file = NULL;
}

static int read_writer(void)
{
    size_t length;
    close_all();
    file = gguf_writer_finish(&writer, &length);
    ck_assert_msg(gguf_open_memory(&gguf, file, length, &error) == 0, "%s", error.text);
    memset(&spec, 0xAB, sizeof(spec));
    return model_spec_read(&spec, gguf, &error);
}

static void accept(const struct model_shape *shape)
{
    model_writer_add(&writer, shape);
    ck_assert_msg(read_writer() == 0, "refused: %s", error.text);
}

// The writer's model must be refused, *out untouched, with a sentence that contains `says`.
static void refuse(int status, const char *says)
{
    ck_assert_int_eq(read_writer(), status);
    ck_assert_int_eq(error.status, status);
    ck_assert_int_eq((unsigned char)spec.architecture[0], 0xAB);
    ck_assert_msg(strstr(error.text, says) != NULL, "'%s' is not in '%s'", says, error.text);
    ck_assert_int_eq(model_spec_read(&spec, gguf, NULL), status);
}

START_TEST(reads_llama)
{
    struct model_shape shape = model_shape_small("llama");
    accept(&shape);
    ck_assert_str_eq(spec.architecture, "llama");
    ck_assert_str_eq(spec.name, "a small model");
    ck_assert(spec.n_layers == 3 && spec.width == 64 && spec.n_heads == 4 && spec.n_kv_heads == 2);
    ck_assert(spec.head_size == 16 && spec.ffn_width == 96 && spec.vocab_size == 40 && spec.context == 128);
    ck_assert(spec.rope_dims == 16 && spec.rope_base == 10000 && spec.rope_scale == 1 && spec.window == 0);
    ck_assert(spec.norm_epsilon == 1e-5f);
    ck_assert(spec.norm == NORM_RMS && spec.position == POSITION_ROPE_ADJACENT && spec.ffn == FFN_GATED);
    ck_assert(!spec.fused_qkv && !spec.attn_bias && !spec.output_bias && !spec.ffn_bias && !spec.qk_norm);
    ck_assert(!spec.rope_factors && !spec.tied_head);
    ck_assert_uint_eq(model_spec_kv_bytes(&spec, 3), 3 * 2 * 2 * 16 * 2);
}
END_TEST

START_TEST(reads_llama_forms)
{
    struct model_shape shape = model_shape_small("llama");
    shape.tied = shape.rope_factors = shape.attn_bias = shape.output_bias = shape.ffn_bias = true;
    accept(&shape);
    ck_assert(spec.tied_head && spec.rope_factors && spec.attn_bias && spec.output_bias && spec.ffn_bias);
    shape = model_shape_small("llama");
    shape.fused_qkv = shape.attn_bias = true;
    accept(&shape);
    ck_assert(spec.fused_qkv && spec.attn_bias && !spec.ffn_bias);
    shape = model_shape_small("llama");
    shape.matrix_type = TENSOR_Q4_0;
    accept(&shape);
    shape = model_shape_small("llama");
    shape.drop = "llama.attention.head_count_kv";
    shape.kv_heads = 4;
    accept(&shape);
    ck_assert_uint_eq(spec.n_kv_heads, 4);
}
END_TEST

START_TEST(reads_the_other_families)
{
    struct model_shape shape = model_shape_small("qwen2");
    accept(&shape);
    ck_assert(spec.position == POSITION_ROPE_HALVES && spec.attn_bias && !spec.output_bias && !spec.qk_norm);
    shape = model_shape_small("qwen3");
    accept(&shape);
    ck_assert(spec.position == POSITION_ROPE_HALVES && spec.qk_norm && spec.head_size == 32 &&
              !spec.attn_bias);
    ck_assert_uint_eq(spec.rope_dims, 32);
    shape = model_shape_small("phi3");
    gguf_writer_u32(&writer, "phi3.attention.sliding_window", 7);
    accept(&shape);
    ck_assert(spec.fused_qkv && spec.ffn == FFN_GATED_FUSED && spec.window == 7 && spec.norm == NORM_RMS);
    shape = model_shape_small("gpt2");
    shape.tied = true;
    accept(&shape);
    ck_assert(spec.norm == NORM_LAYER && spec.position == POSITION_LEARNED && spec.ffn == FFN_PLAIN);
    ck_assert(spec.fused_qkv && spec.attn_bias && spec.output_bias && spec.ffn_bias && spec.tied_head);
}
END_TEST

START_TEST(reads_rope_keys)
{
    struct model_shape shape = model_shape_small("llama");
    gguf_writer_f32(&writer, "llama.rope.freq_base", 5e5f);
    gguf_writer_u32(&writer, "llama.rope.dimension_count", 8);
    gguf_writer_string(&writer, "llama.rope.scaling.type", "linear");
    gguf_writer_f32(&writer, "llama.rope.scaling.factor", 4);
    accept(&shape);
    ck_assert(spec.rope_base == 5e5f && spec.rope_dims == 8 && spec.rope_scale == 4);
    gguf_writer_string(&writer, "llama.rope.scaling.type", "none");
    gguf_writer_f32(&writer, "llama.rope.scaling.factor", 4);
    accept(&shape);
    ck_assert(spec.rope_scale == 1);
    gguf_writer_f32(&writer, "llama.rope.scale_linear", 2); // older writers
    accept(&shape);
    ck_assert(spec.rope_scale == 2);
}
END_TEST

START_TEST(takes_lists_that_agree)
{
    struct model_shape shape = model_shape_small("llama");
    static const int32_t same[] = {2, 2, 2}, other[] = {2, 1, 2};
    shape.drop = "llama.attention.head_count_kv";
    gguf_writer_array(&writer, shape.drop, GGUF_I32, same, 3, sizeof(same));
    accept(&shape);
    ck_assert_uint_eq(spec.n_kv_heads, 2);
    gguf_writer_array(&writer, shape.drop, GGUF_I32, other, 3, sizeof(other));
    model_writer_add(&writer, &shape);
    refuse(STATUS_UNSUPPORTED, "'llama.attention.head_count_kv' differs from layer to layer");
    gguf_writer_array(&writer, shape.drop, GGUF_I32, NULL, 0, 0);
    model_writer_add(&writer, &shape);
    refuse(STATUS_CORRUPT, "not a list of counts");
}
END_TEST

START_TEST(clamps_context_and_names)
{
    struct model_shape shape = model_shape_small("llama");
    shape.context = 10000000;
    accept(&shape);
    ck_assert_uint_eq(spec.context, MAX_CONTEXT);
}
END_TEST

START_TEST(refuses_other_architectures)
{
    struct model_shape shape = model_shape_small("llama");
    shape.architecture = "mamba";
    model_writer_add(&writer, &shape);
    refuse(STATUS_UNSUPPORTED,
           "architecture 'mamba' is not one Strata supports (llama, qwen2, qwen3, phi3, gpt2)");
    shape = model_shape_small("llama");
    shape.drop = "general.architecture";
    model_writer_add(&writer, &shape);
    refuse(STATUS_CORRUPT, "'general.architecture' is missing");
    gguf_writer_u32(&writer, "general.architecture", 3);
    refuse(STATUS_CORRUPT, "'general.architecture' is not a string");
}
END_TEST

START_TEST(refuses_missing_keys)
{
    static const char *const keys[] = {
        "llama.block_count",         "llama.context_length",       "llama.embedding_length",
        "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon"};
    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        struct model_shape shape = model_shape_small("llama");
        shape.drop = keys[i];
        model_writer_add(&writer, &shape);
        refuse(STATUS_CORRUPT, keys[i]);
        ck_assert_ptr_nonnull(strstr(error.text, "is missing"));
    }
}
END_TEST

START_TEST(refuses_bad_numbers)
{
    static const struct {
        const char *key;
        uint32_t value;
        int status;
        const char *says;
    } cases[] = {
        {"llama.block_count", 0, STATUS_CORRUPT, "block_count 0 (1 to 1024 allowed)"},
        {"llama.block_count", 5000, STATUS_CORRUPT, "block_count 5000"},
        {"llama.block_count", 4, STATUS_CORRUPT, "tensor 'blk.3.attn_norm.weight' is missing"},
        {"llama.block_count", 2, STATUS_UNSUPPORTED, "tensor 'blk.2."},
        {"llama.embedding_length", 0, STATUS_CORRUPT, "embedding_length 0"},
        {"llama.embedding_length", 3000000000u, STATUS_CORRUPT, "embedding_length 3000000000"},
        {"llama.embedding_length", 128, STATUS_CORRUPT, "the metadata implies 128 x 40"},
        {"llama.embedding_length", 66, STATUS_CORRUPT, "66 is no multiple of 4 heads"},
        {"llama.attention.head_count", 0, STATUS_CORRUPT, "head_count 0"},
        {"llama.attention.head_count", 128, STATUS_CORRUPT, "multiple of 128 heads"},
        {"llama.attention.head_count_kv", 3, STATUS_CORRUPT, "4 heads do not share 3"},
        {"llama.attention.head_count_kv", 0, STATUS_CORRUPT, "head_count_kv 0"},
        {"llama.attention.key_length", 32, STATUS_UNSUPPORTED, "keys of 32 and values of 16"},
        {"llama.attention.value_length", 32, STATUS_UNSUPPORTED, "keys of 16 and values of 32"},
        {"llama.rope.dimension_count", 0, STATUS_CORRUPT, "0 rotated dimensions"},
        {"llama.rope.dimension_count", 7, STATUS_CORRUPT, "7 rotated dimensions"},
        {"llama.rope.dimension_count", 18, STATUS_CORRUPT, "up to the head size 16"},
        {"llama.feed_forward_length", 97, STATUS_CORRUPT, "the metadata implies 64 x 97"},
        {"llama.context_length", 0, STATUS_CORRUPT, "context_length 0"},
        {"llama.expert_count", 8, STATUS_UNSUPPORTED, "mixture-of-experts"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct model_shape shape = model_shape_small("llama");
        shape.drop = cases[i].key;
        gguf_writer_u32(&writer, cases[i].key, cases[i].value);
        model_writer_add(&writer, &shape);
        refuse(cases[i].status, cases[i].says);
    }
}
END_TEST

START_TEST(refuses_bad_reals)
{
    static const struct {
        const char *key;
        float value;
        int status;
        const char *says;
    } cases[] = {
        {"llama.attention.layer_norm_rms_epsilon", 0, STATUS_CORRUPT, "norm epsilon of 0"},
        {"llama.attention.layer_norm_rms_epsilon", -1, STATUS_CORRUPT, "norm epsilon of -1"},
        {"llama.rope.freq_base", 0.0f / 0.0f, STATUS_CORRUPT, "rope base of"},
        {"llama.rope.freq_base", 1.0f / 0.0f, STATUS_CORRUPT, "rope base of inf"},
        {"llama.rope.scaling.factor", -2, STATUS_CORRUPT, "rope scaling factor of -2"},
        {"llama.rope.scaling.attn_factor", 1.5, STATUS_UNSUPPORTED,
         "'llama.rope.scaling.attn_factor' is 1.5"},
        {"llama.final_logit_softcapping", 30, STATUS_UNSUPPORTED, "logit soft caps"},
        {"llama.attn_logit_softcapping", 50, STATUS_UNSUPPORTED, "attention soft caps"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct model_shape shape = model_shape_small("llama");
        shape.drop = cases[i].key;
        gguf_writer_f32(&writer, cases[i].key, cases[i].value);
        model_writer_add(&writer, &shape);
        refuse(cases[i].status, cases[i].says);
    }
}
END_TEST

START_TEST(refuses_other_rope_scalings)
{
    static const char *const kinds[] = {"yarn", "longrope", "su", "linear-ish", ""};
    struct model_shape shape = model_shape_small("phi3");
    char says[64];
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        gguf_writer_string(&writer, "phi3.rope.scaling.type", kinds[i]);
        model_writer_add(&writer, &shape);
        snprintf(says, sizeof(says), "rope scaling '%s'", kinds[i]);
        refuse(STATUS_UNSUPPORTED, says);
    }
    // Long rope shows in its tensors as well.
    gguf_writer_tensor(&writer, "rope_factors_long.weight", TENSOR_F32, 1, (uint64_t[]){8});
    model_writer_add(&writer, &shape);
    refuse(STATUS_UNSUPPORTED, "'rope_factors_long.weight' belongs to no part");
}
END_TEST

START_TEST(refuses_attention_that_is_not_causal)
{
    struct model_shape shape = model_shape_small("llama");
    gguf_writer_bool(&writer, "llama.attention.causal", false);
    model_writer_add(&writer, &shape);
    refuse(STATUS_UNSUPPORTED, "not causal");
    gguf_writer_bool(&writer, "llama.attention.causal", true);
    accept(&shape);
}
END_TEST

// Each tensor of each family in turn is left out, given another shape, and (norms, biases) another type.
// Leaving out what decides a form (a first layer's bias, the head) must not pass either, except where it
// makes the model another valid one.
START_TEST(refuses_each_tensor_damaged)
{
    static const char *const families[] = {"llama", "qwen2", "qwen3", "phi3", "gpt2"};
    for (size_t f = 0; f < sizeof(families) / sizeof(families[0]); f++) {
        struct model_shape shape = model_shape_small(families[f]);
        shape.rope_factors = f == 0;
        accept(&shape);
        size_t count = gguf_tensor_count(gguf);
        for (size_t i = 0; i < count; i++) {
            const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
            char name[64];
            snprintf(name, sizeof(name), "%.*s", (int)tensor->name.length, tensor->name.bytes);
            bool vector = tensor->n_dims == 1;
            bool optional = strcmp(name, "output.weight") == 0 || strcmp(name, "rope_freqs.weight") == 0;
            struct model_shape bad = shape;
            bad.drop = name;
            model_writer_add(&writer, &bad);
            int status = read_writer();
            ck_assert_msg((status == 0) == optional, "%s without %s: %d %s", families[f], name, status,
                          error.text);
            if (!optional)
                ck_assert_ptr_nonnull(strstr(error.text, name[0] == 'b' ? "blk." : name));
            error = (struct error){0};
            bad.drop = NULL;
            bad.misshape = name;
            model_writer_add(&writer, &bad);
            if (strcmp(name, "token_embd.weight") == 0)
                refuse(STATUS_CORRUPT, "'output.weight' is 64 x 40 x 1 x 1, the metadata implies 64 x 41");
            else if (strcmp(name, "position_embd.weight") != 0) // it may be longer
                refuse(STATUS_CORRUPT, name);
            else
                ck_assert_int_eq(read_writer(), 0);
            bad.misshape = NULL;
            bad.retype = name;
            model_writer_add(&writer, &bad);
            if (vector)
                refuse(STATUS_UNSUPPORTED, "has type F16; Strata needs F32");
            else
                ck_assert_int_eq(read_writer(), 0);
            error = (struct error){0};
            model_writer_add(&writer, &shape);
            ck_assert_int_eq(read_writer(), 0);
        }
    }
}
END_TEST

START_TEST(refuses_short_position_table)
{
    struct model_shape shape = model_shape_small("gpt2");
    shape.drop = "gpt2.context_length";
    gguf_writer_u32(&writer, shape.drop, 129);
    model_writer_add(&writer, &shape);
    refuse(STATUS_CORRUPT, "'position_embd.weight' has 128 positions, the context length is 129");
}
END_TEST

START_TEST(refuses_a_vocabulary)
{
    struct model_shape shape = model_shape_small("llama");
    model_writer_add(&writer, &shape);
    writer.n_tensors = 0;
    writer.tensors.length = writer.data.length = 0;
    refuse(STATUS_CORRUPT, "has no tensors");
}
END_TEST

START_TEST(refuses_unknown_tensors)
{
    struct model_shape shape = model_shape_small("qwen2");
    gguf_writer_tensor(&writer, "output.bias", TENSOR_F32, 1, (uint64_t[]){40});
    model_writer_add(&writer, &shape);
    refuse(STATUS_UNSUPPORTED, "tensor 'output.bias' belongs to no part");
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("model_spec");
    TCase *good = tcase_create("good"), *bad = tcase_create("bad");
    tcase_add_checked_fixture(good, set_up, close_all);
    tcase_add_checked_fixture(bad, set_up, close_all);
    tcase_add_test(good, reads_llama);
    tcase_add_test(good, reads_llama_forms);
    tcase_add_test(good, reads_the_other_families);
    tcase_add_test(good, reads_rope_keys);
    tcase_add_test(good, takes_lists_that_agree);
    tcase_add_test(good, clamps_context_and_names);
    tcase_add_test(bad, refuses_other_architectures);
    tcase_add_test(bad, refuses_missing_keys);
    tcase_add_test(bad, refuses_bad_numbers);
    tcase_add_test(bad, refuses_bad_reals);
    tcase_add_test(bad, refuses_other_rope_scalings);
    tcase_add_test(bad, refuses_attention_that_is_not_causal);
    tcase_add_test(bad, refuses_each_tensor_damaged);
    tcase_add_test(bad, refuses_short_position_table);
    tcase_add_test(bad, refuses_a_vocabulary);
    tcase_add_test(bad, refuses_unknown_tensors);
    suite_add_tcase(suite, good);
    suite_add_tcase(suite, bad);
    return suite;
}
