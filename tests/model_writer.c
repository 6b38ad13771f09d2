// Families written from their definition, apart from common/model_spec.c, so that each checks the other. One
// thread.
#include "tests/model_writer.h"

#include <stdio.h>
#include <string.h>

#include "common/tensor_type.h"

struct model_shape model_shape_small(const char *architecture)
{
    bool gpt2 = strcmp(architecture, "gpt2") == 0, phi3 = strcmp(architecture, "phi3") == 0;
    return (struct model_shape){
        .architecture = architecture,
        .layers = 3,
        .width = 64,
        .heads = 4,
        .kv_heads = gpt2 ? 4 : 2,
        .head_size = strcmp(architecture, "qwen3") == 0 ? 32 : 16,
        .ffn = 96,
        .vocabulary = 40,
        .context = 128,
        .fused_qkv = gpt2 || phi3,
        .attn_bias = gpt2 || strcmp(architecture, "qwen2") == 0,
        .output_bias = gpt2,
        .ffn_bias = gpt2,
    };
}

static bool is(const char *name, const char *other)
{
    return other && strcmp(name, other) == 0;
}

static void number(struct gguf_writer *writer, const struct model_shape *shape, const char *suffix,
                   uint32_t value)
{
    char key[96];
    snprintf(key, sizeof(key), "%s.%s", shape->architecture, suffix);
    if (!is(key, shape->drop))
        gguf_writer_u32(writer, key, value);
}

static void tensor(struct gguf_writer *writer, const struct model_shape *shape, const char *name,
                   uint64_t width, uint64_t rows)
{
    uint32_t n_dims = rows ? 2 : 1;
    uint64_t dims[2] = {width, rows};
    if (is(name, shape->misshape))
        dims[n_dims - 1]++;
    uint32_t type = rows ? shape->matrix_type : TENSOR_F32;
    if (!is(name, shape->drop))
        gguf_writer_tensor(writer, name, is(name, shape->retype) ? (uint32_t)TENSOR_F16 : type, n_dims, dims);
}

static void layer_tensor(struct gguf_writer *writer, const struct model_shape *shape, uint32_t layer,
                         const char *name, uint64_t width, uint64_t rows)
{
    char full[64];
    snprintf(full, sizeof(full), "blk.%u.%s", layer, name);
    tensor(writer, shape, full, width, rows);
}

static void add_keys(struct gguf_writer *writer, const struct model_shape *shape)
{
    bool gpt2 = strcmp(shape->architecture, "gpt2") == 0;
    char key[96];
    if (!is("general.architecture", shape->drop))
        gguf_writer_string(writer, "general.architecture", shape->architecture);
    gguf_writer_string(writer, "general.name", "a small model");
    number(writer, shape, "block_count", shape->layers);
    number(writer, shape, "context_length", shape->context);
    number(writer, shape, "embedding_length", shape->width);
    number(writer, shape, "feed_forward_length", shape->ffn);
    number(writer, shape, "attention.head_count", shape->heads);
    number(writer, shape, "attention.head_count_kv", shape->kv_heads);
    if (shape->head_size * shape->heads != shape->width) {
        number(writer, shape, "attention.key_length", shape->head_size);
        number(writer, shape, "attention.value_length", shape->head_size);
    }
    snprintf(key, sizeof(key), "%s.attention.layer_norm%s_epsilon", shape->architecture, gpt2 ? "" : "_rms");
    if (!is(key, shape->drop))
        gguf_writer_f32(writer, key, 1e-5f);
}

static void add_layer(struct gguf_writer *writer, const struct model_shape *shape, uint32_t i)
{
    bool gpt2 = strcmp(shape->architecture, "gpt2") == 0, phi3 = strcmp(shape->architecture, "phi3") == 0;
    uint64_t width = shape->width, ffn = shape->ffn, q = (uint64_t)shape->heads * shape->head_size;
    uint64_t kv = (uint64_t)shape->kv_heads * shape->head_size;
    layer_tensor(writer, shape, i, "attn_norm.weight", width, 0);
    if (gpt2)
        layer_tensor(writer, shape, i, "attn_norm.bias", width, 0);
    if (shape->fused_qkv) {
        layer_tensor(writer, shape, i, "attn_qkv.weight", width, q + 2 * kv);
        if (shape->attn_bias)
            layer_tensor(writer, shape, i, "attn_qkv.bias", q + 2 * kv, 0);
    } else {
        layer_tensor(writer, shape, i, "attn_q.weight", width, q);
        layer_tensor(writer, shape, i, "attn_k.weight", width, kv);
        layer_tensor(writer, shape, i, "attn_v.weight", width, kv);
        if (shape->attn_bias) {
            layer_tensor(writer, shape, i, "attn_q.bias", q, 0);
            layer_tensor(writer, shape, i, "attn_k.bias", kv, 0);
            layer_tensor(writer, shape, i, "attn_v.bias", kv, 0);
        }
    }
    if (strcmp(shape->architecture, "qwen3") == 0) {
        layer_tensor(writer, shape, i, "attn_q_norm.weight", shape->head_size, 0);
        layer_tensor(writer, shape, i, "attn_k_norm.weight", shape->head_size, 0);
    }
    layer_tensor(writer, shape, i, "attn_output.weight", q, width);
    if (shape->output_bias)
        layer_tensor(writer, shape, i, "attn_output.bias", width, 0);
    layer_tensor(writer, shape, i, "ffn_norm.weight", width, 0);
    if (gpt2)
        layer_tensor(writer, shape, i, "ffn_norm.bias", width, 0);
    if (!gpt2 && !phi3) {
        layer_tensor(writer, shape, i, "ffn_gate.weight", width, ffn);
        if (shape->ffn_bias)
            layer_tensor(writer, shape, i, "ffn_gate.bias", ffn, 0);
    }
    layer_tensor(writer, shape, i, "ffn_up.weight", width, phi3 ? 2 * ffn : ffn);
    layer_tensor(writer, shape, i, "ffn_down.weight", ffn, width);
    if (shape->ffn_bias) {
        layer_tensor(writer, shape, i, "ffn_up.bias", phi3 ? 2 * ffn : ffn, 0);
        layer_tensor(writer, shape, i, "ffn_down.bias", width, 0);
    }
}

void model_writer_add(struct gguf_writer *writer, const struct model_shape *shape)
{
    bool gpt2 = strcmp(shape->architecture, "gpt2") == 0;
    add_keys(writer, shape);
    tensor(writer, shape, "token_embd.weight", shape->width, shape->vocabulary);
    if (gpt2)
        tensor(writer, shape, "position_embd.weight", shape->width, shape->context);
    if (shape->rope_factors)
        tensor(writer, shape, "rope_freqs.weight", shape->head_size / 2, 0);
    for (uint32_t i = 0; i < shape->layers; i++)
        add_layer(writer, shape, i);
    tensor(writer, shape, "output_norm.weight", shape->width, 0);
    if (gpt2)
        tensor(writer, shape, "output_norm.bias", shape->width, 0);
    if (!shape->tied)
        tensor(writer, shape, "output.weight", shape->width, shape->vocabulary);
}
