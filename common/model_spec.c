// From GGUF metadata to a model_spec: first the family, then the dimensions its keys give, then the parts
// that the tensor table shows (fused or separate, biases, tied head), at last every tensor the spec implies,
// held against the table. A tensor that no rule asks for is refused too: to leave it out would compute
// another model. No state; any thread.
#include "common/model_spec.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/limits.h"
#include "common/tensor_type.h"
#include "common/utf8.h"

// What an architecture's name alone decides.
static const struct family {
    const char *name;
    enum norm_kind norm;
    enum position_kind position;
    enum ffn_kind ffn;
    bool qk_norm;
    bool window; // attention.sliding_window applies to every layer
} FAMILIES[] = {
    {"llama", NORM_RMS, POSITION_ROPE_ADJACENT, FFN_GATED, false, false},
    {"qwen2", NORM_RMS, POSITION_ROPE_HALVES, FFN_GATED, false, false},
    {"qwen3", NORM_RMS, POSITION_ROPE_HALVES, FFN_GATED, true, false},
    {"phi3", NORM_RMS, POSITION_ROPE_HALVES, FFN_GATED_FUSED, false, true},
    {"gpt2", NORM_LAYER, POSITION_LEARNED, FFN_PLAIN, false, false},
};
enum { N_FAMILIES = sizeof(FAMILIES) / sizeof(FAMILIES[0]) };

// Reads keys of one architecture. The first failure sticks, so that a list of reads stays a list.
struct reader {
    const struct gguf *gguf;
    const char *architecture;
    struct error *error;
    int status;
    char key[128];
};

static const char *key_of(struct reader *reader, const char *suffix)
{
    snprintf(reader->key, sizeof(reader->key), "%s.%s", reader->architecture, suffix);
    return reader->key;
}

// --- metadata ---

// A number that may also stand as an array with one entry a layer; layers must agree.
static int get_u32(struct reader *reader, const char *key, uint32_t *out)
{
    const struct gguf_value *value = gguf_find(reader->gguf, key);
    if (!value || !value->is_array)
        return gguf_get_u32(reader->gguf, key, out, reader->error);
    bool integers = !value->nested && value->kind != GGUF_STRING && value->kind != GGUF_F32 &&
                    value->kind != GGUF_F64 && value->kind != GGUF_BOOL;
    int64_t first = gguf_array_int(value, 0);
    if (!integers || value->count == 0 || first < 0 || first > UINT32_MAX)
        return error_set(reader->error, STATUS_CORRUPT, "metadata key '%s' is not a list of counts", key);
    for (uint64_t i = 1; i < value->count; i++)
        if (gguf_array_int(value, i) != first)
            return error_set(reader->error, STATUS_UNSUPPORTED,
                             "'%s' differs from layer to layer, which Strata does not support", key);
    *out = (uint32_t)first;
    return STATUS_OK;
}

// Returns whether the key is there; *out keeps its value when it is not.
static bool read_u32(struct reader *reader, const char *suffix, uint32_t *out)
{
    if (reader->status)
        return false;
    int status = get_u32(reader, key_of(reader, suffix), out);
    if (status && status != STATUS_NOT_FOUND)
        reader->status = status;
    return status == STATUS_OK;
}

static bool read_f32(struct reader *reader, const char *suffix, float *out)
{
    if (reader->status)
        return false;
    int status = gguf_get_f32(reader->gguf, key_of(reader, suffix), out, reader->error);
    if (status && status != STATUS_NOT_FOUND)
        reader->status = status;
    return status == STATUS_OK;
}

static void fail_missing(struct reader *reader, const char *suffix)
{
    if (!reader->status)
        reader->status =
            error_set(reader->error, STATUS_CORRUPT, "metadata key '%s' is missing", key_of(reader, suffix));
}

static void check_range(struct reader *reader, const char *what, uint64_t value, uint64_t most)
{
    if (!reader->status && (value == 0 || value > most))
        reader->status =
            error_set(reader->error, STATUS_CORRUPT,
                      "the metadata gives %s %" PRIu64 " (1 to %" PRIu64 " allowed)", what, value, most);
}

static void check_positive(struct reader *reader, const char *what, float value)
{
    if (!reader->status && !(isfinite(value) && value > 0))
        reader->status = error_set(reader->error, STATUS_CORRUPT,
                                   "the metadata gives %s %g, which is not positive", what, (double)value);
}

static void need_u32(struct reader *reader, const char *suffix, uint32_t *out, uint32_t most)
{
    if (!read_u32(reader, suffix, out))
        fail_missing(reader, suffix);
    check_range(reader, reader->key, *out, most);
}

static bool string_is(struct gguf_string string, const char *text)
{
    return string.length == strlen(text) && memcmp(string.bytes, text, string.length) == 0;
}

static const struct family *read_family(struct reader *reader, struct model_spec *spec)
{
    struct gguf_string name;
    reader->status = gguf_get_string(reader->gguf, "general.architecture", &name, reader->error);
    if (reader->status == STATUS_NOT_FOUND)
        reader->status =
            error_set(reader->error, STATUS_CORRUPT, "metadata key 'general.architecture' is missing");
    if (reader->status)
        return NULL;
    utf8_copy_clean(spec->architecture, sizeof(spec->architecture), name.bytes, name.length);
    for (size_t i = 0; i < N_FAMILIES; i++)
        if (string_is(name, FAMILIES[i].name))
            return &FAMILIES[i];
    reader->status = error_set(
        reader->error, STATUS_UNSUPPORTED,
        "architecture '%s' is not one Strata supports (llama, qwen2, qwen3, phi3, gpt2)", spec->architecture);
    return NULL;
}

static void read_heads(struct reader *reader, struct model_spec *spec)
{
    need_u32(reader, "attention.head_count", &spec->n_heads, MAX_WIDTH);
    spec->n_kv_heads = spec->n_heads;
    if (read_u32(reader, "attention.head_count_kv", &spec->n_kv_heads))
        check_range(reader, reader->key, spec->n_kv_heads, MAX_WIDTH);
    if (reader->status)
        return;
    if (spec->n_heads % spec->n_kv_heads) {
        reader->status =
            error_set(reader->error, STATUS_CORRUPT, "%u heads do not share %u key/value heads evenly",
                      spec->n_heads, spec->n_kv_heads);
        return;
    }
    spec->head_size = spec->width / spec->n_heads;
    uint32_t value_size = spec->head_size;
    bool key_given = read_u32(reader, "attention.key_length", &spec->head_size);
    bool value_given = read_u32(reader, "attention.value_length", &value_size);
    if (reader->status)
        return;
    if (!(key_given && value_given) && spec->width % spec->n_heads)
        reader->status = error_set(reader->error, STATUS_CORRUPT, "a width of %u is no multiple of %u heads",
                                   spec->width, spec->n_heads);
    else if (spec->head_size != value_size)
        reader->status = error_set(reader->error, STATUS_UNSUPPORTED,
                                   "keys of %u and values of %u numbers a head: Strata needs them equal",
                                   spec->head_size, value_size);
    check_range(reader, "a head size of", spec->head_size, MAX_WIDTH);
    check_range(reader, "a total width of all heads of",
                ((uint64_t)spec->n_heads + 2 * (uint64_t)spec->n_kv_heads) * spec->head_size, MAX_WIDTH);
}

static void read_rope_scaling(struct reader *reader, struct model_spec *spec)
{
    struct gguf_string kind = {"linear", 6};
    int status = gguf_get_string(reader->gguf, key_of(reader, "rope.scaling.type"), &kind, reader->error);
    if (status && status != STATUS_NOT_FOUND) {
        reader->status = status;
        return;
    }
    if (string_is(kind, "none"))
        return;
    if (!string_is(kind, "linear")) {
        char name[32];
        utf8_copy_clean(name, sizeof(name), kind.bytes, kind.length);
        reader->status = error_set(reader->error, STATUS_UNSUPPORTED,
                                   "rope scaling '%s' is not one Strata supports (none, linear)", name);
        return;
    }
    float factor = 0, attention = 1;
    if (!read_f32(reader, "rope.scaling.factor", &factor))
        read_f32(reader, "rope.scale_linear", &factor);
    if (factor != 0) // writers put 0 for "none"
        spec->rope_scale = factor;
    check_positive(reader, "a rope scaling factor of", spec->rope_scale);
    if (read_f32(reader, "rope.scaling.attn_factor", &attention) && attention != 1)
        reader->status = error_set(reader->error, STATUS_UNSUPPORTED, "'%s' is %g; Strata supports only 1",
                                   reader->key, (double)attention);
}

static void read_positions(struct reader *reader, struct model_spec *spec)
{
    need_u32(reader, "context_length", &spec->context, UINT32_MAX);
    if (spec->context > MAX_CONTEXT)
        spec->context = MAX_CONTEXT;
    if (spec->position == POSITION_LEARNED)
        return;
    spec->rope_dims = spec->head_size;
    read_u32(reader, "rope.dimension_count", &spec->rope_dims);
    if (!reader->status && (spec->rope_dims == 0 || spec->rope_dims % 2 || spec->rope_dims > spec->head_size))
        reader->status = error_set(reader->error, STATUS_CORRUPT,
                                   "%u rotated dimensions: an even number up to the head size %u is needed",
                                   spec->rope_dims, spec->head_size);
    spec->rope_base = 10000;
    read_f32(reader, "rope.freq_base", &spec->rope_base);
    check_positive(reader, "a rope base of", spec->rope_base);
    if (!reader->status)
        read_rope_scaling(reader, spec);
}

// Keys that ask for a part Strata does not have. Harmless values are 0 (and, for the last, true).
static void refuse_features(struct reader *reader)
{
    static const struct {
        const char *suffix, *feature;
    } NUMBERS[] = {{"expert_count", "mixture-of-experts layers"},
                   {"attn_logit_softcapping", "attention soft caps"},
                   {"final_logit_softcapping", "logit soft caps"},
                   {"attention.max_alibi_bias", "ALiBi positions"},
                   {"attention.clamp_kqv", "clamped attention inputs"}};
    for (size_t i = 0; i < sizeof(NUMBERS) / sizeof(NUMBERS[0]) && !reader->status; i++) {
        const struct gguf_value *value = gguf_find(reader->gguf, key_of(reader, NUMBERS[i].suffix));
        if (value && gguf_array_float(value, 0) != 0)
            reader->status = error_set(reader->error, STATUS_UNSUPPORTED,
                                       "the model has %s ('%s'), which Strata does not support",
                                       NUMBERS[i].feature, reader->key);
    }
    bool causal = true;
    if (!reader->status && !gguf_get_bool(reader->gguf, key_of(reader, "attention.causal"), &causal, NULL) &&
        !causal)
        reader->status = error_set(reader->error, STATUS_UNSUPPORTED,
                                   "the model's attention is not causal: it does not generate text");
}

static void read_dimensions(struct reader *reader, const struct family *family, struct model_spec *spec)
{
    spec->norm = family->norm;
    spec->position = family->position;
    spec->ffn = family->ffn;
    spec->qk_norm = family->qk_norm;
    spec->rope_scale = 1;
    refuse_features(reader);
    need_u32(reader, "block_count", &spec->n_layers, MAX_LAYERS);
    need_u32(reader, "embedding_length", &spec->width, MAX_WIDTH);
    need_u32(reader, "feed_forward_length", &spec->ffn_width, MAX_WIDTH);
    if (!reader->status)
        read_heads(reader, spec);
    read_positions(reader, spec);
    if (family->window)
        read_u32(reader, "attention.sliding_window", &spec->window);
    const char *epsilon =
        spec->norm == NORM_RMS ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon";
    if (!read_f32(reader, epsilon, &spec->norm_epsilon))
        fail_missing(reader, epsilon);
    check_positive(reader, "a norm epsilon of", spec->norm_epsilon);
    struct gguf_string name;
    if (!reader->status && !gguf_get_string(reader->gguf, "general.name", &name, NULL))
        utf8_copy_clean(spec->name, sizeof(spec->name), name.bytes, name.length);
}

// --- the tensor table ---

static void read_parts(struct reader *reader, struct model_spec *spec)
{
    const struct gguf *gguf = reader->gguf;
    if (reader->status)
        return;
    const struct gguf_tensor *embedding = gguf_find_tensor(gguf, "token_embd.weight");
    if (gguf_tensor_count(gguf) == 0) {
        reader->status =
            error_set(reader->error, STATUS_CORRUPT, "the file has no tensors (a vocabulary, not a model)");
        return;
    }
    if (!embedding) {
        reader->status = error_set(reader->error, STATUS_CORRUPT, "tensor 'token_embd.weight' is missing");
        return;
    }
    check_range(reader, "a vocabulary of", embedding->dims[1], MAX_VOCABULARY);
    spec->vocab_size = (uint32_t)embedding->dims[1];
    spec->tied_head = !gguf_find_tensor(gguf, "output.weight");
    spec->rope_factors = gguf_find_tensor(gguf, "rope_freqs.weight") && spec->position != POSITION_LEARNED;
    spec->fused_qkv = gguf_find_tensor(gguf, "blk.0.attn_qkv.weight") != NULL;
    spec->attn_bias = gguf_find_tensor(gguf, spec->fused_qkv ? "blk.0.attn_qkv.bias" : "blk.0.attn_q.bias");
    spec->output_bias = gguf_find_tensor(gguf, "blk.0.attn_output.bias");
    spec->ffn_bias = gguf_find_tensor(gguf, "blk.0.ffn_down.bias");
}

// The tensors asked for so far. The first failure sticks.
struct checklist {
    const struct gguf *gguf;
    struct error *error;
    bool *asked; // by tensor index
    int status;
};

static const struct gguf_tensor *ask(struct checklist *list, int layer, const char *name, char *full,
                                     size_t capacity)
{
    if (layer >= 0)
        snprintf(full, capacity, "blk.%d.%s", layer, name);
    else
        snprintf(full, capacity, "%s", name);
    const struct gguf_tensor *tensor = gguf_find_tensor(list->gguf, full);
    if (tensor)
        list->asked[tensor - gguf_tensor_at(list->gguf, 0)] = true;
    else
        list->status = error_set(list->error, STATUS_CORRUPT, "tensor '%s' is missing", full);
    return tensor;
}

static void need_matrix(struct checklist *list, int layer, const char *name, uint64_t width, uint64_t rows)
{
    char full[64];
    const struct gguf_tensor *tensor = list->status ? NULL : ask(list, layer, name, full, sizeof(full));
    if (!tensor ||
        (tensor->dims[0] == width && tensor->dims[1] == rows && tensor->dims[2] == 1 && tensor->dims[3] == 1))
        return;
    list->status =
        error_set(list->error, STATUS_CORRUPT,
                  "tensor '%s' is %" PRIu64 " x %" PRIu64 " x %" PRIu64 " x %" PRIu64
                  ", the metadata implies %" PRIu64 " x %" PRIu64,
                  full, tensor->dims[0], tensor->dims[1], tensor->dims[2], tensor->dims[3], width, rows);
}

// Norms, biases and rope factors: one row of F32.
static void need_vector(struct checklist *list, int layer, const char *name, uint64_t width)
{
    need_matrix(list, layer, name, width, 1);
    char full[64];
    const struct gguf_tensor *tensor = list->status ? NULL : ask(list, layer, name, full, sizeof(full));
    if (tensor && tensor->type != TENSOR_F32)
        list->status =
            error_set(list->error, STATUS_UNSUPPORTED, "tensor '%s' has type %s; Strata needs F32 there",
                      full, tensor_type_info(tensor->type)->name);
}

static void need_norm(struct checklist *list, const struct model_spec *spec, int layer, const char *name,
                      uint64_t width)
{
    char full[32];
    snprintf(full, sizeof(full), "%s.weight", name);
    need_vector(list, layer, full, width);
    snprintf(full, sizeof(full), "%s.bias", name);
    if (spec->norm == NORM_LAYER)
        need_vector(list, layer, full, width);
}

static void need_linear(struct checklist *list, bool bias, int layer, const char *name, uint64_t width,
                        uint64_t rows)
{
    char full[32];
    snprintf(full, sizeof(full), "%s.weight", name);
    need_matrix(list, layer, full, width, rows);
    snprintf(full, sizeof(full), "%s.bias", name);
    if (bias)
        need_vector(list, layer, full, rows);
}

static void need_layer(struct checklist *list, const struct model_spec *spec, int layer)
{
    uint64_t width = spec->width, ffn = spec->ffn_width;
    uint64_t q = (uint64_t)spec->n_heads * spec->head_size, kv = (uint64_t)spec->n_kv_heads * spec->head_size;
    need_norm(list, spec, layer, "attn_norm", width);
    if (spec->fused_qkv) {
        need_linear(list, spec->attn_bias, layer, "attn_qkv", width, q + 2 * kv);
    } else {
        need_linear(list, spec->attn_bias, layer, "attn_q", width, q);
        need_linear(list, spec->attn_bias, layer, "attn_k", width, kv);
        need_linear(list, spec->attn_bias, layer, "attn_v", width, kv);
    }
    if (spec->qk_norm) {
        need_vector(list, layer, "attn_q_norm.weight", spec->head_size);
        need_vector(list, layer, "attn_k_norm.weight", spec->head_size);
    }
    need_linear(list, spec->output_bias, layer, "attn_output", q, width);
    need_norm(list, spec, layer, "ffn_norm", width);
    if (spec->ffn == FFN_GATED)
        need_linear(list, spec->ffn_bias, layer, "ffn_gate", width, ffn);
    need_linear(list, spec->ffn_bias, layer, "ffn_up", width, spec->ffn == FFN_GATED_FUSED ? 2 * ffn : ffn);
    need_linear(list, spec->ffn_bias, layer, "ffn_down", ffn, width);
}

static void need_position_table(struct checklist *list, const struct model_spec *spec)
{
    char full[64];
    const struct gguf_tensor *table =
        list->status ? NULL : ask(list, -1, "position_embd.weight", full, sizeof(full));
    if (!table)
        return;
    if (table->dims[1] < spec->context)
        list->status = error_set(list->error, STATUS_CORRUPT,
                                 "tensor '%s' has %" PRIu64 " positions, the context length is %u", full,
                                 table->dims[1], spec->context);
    need_matrix(list, -1, "position_embd.weight", spec->width, table->dims[1]);
}

static void refuse_rest(struct checklist *list)
{
    for (size_t i = 0; i < gguf_tensor_count(list->gguf) && !list->status; i++)
        if (!list->asked[i]) {
            struct gguf_string raw = gguf_tensor_at(list->gguf, i)->name;
            char name[64];
            utf8_copy_clean(name, sizeof(name), raw.bytes, raw.length);
            list->status = error_set(list->error, STATUS_UNSUPPORTED,
                                     "tensor '%s' belongs to no part of the model that Strata knows", name);
        }
}

static int check_tensors(const struct gguf *gguf, const struct model_spec *spec, struct error *error)
{
    struct checklist list = {.gguf = gguf, .error = error};
    list.asked = calloc(gguf_tensor_count(gguf) + 1, sizeof(*list.asked));
    if (!list.asked)
        return error_set(error, STATUS_NO_MEMORY, "no memory to check the tensor table");
    need_matrix(&list, -1, "token_embd.weight", spec->width, spec->vocab_size);
    if (spec->position == POSITION_LEARNED)
        need_position_table(&list, spec);
    if (spec->rope_factors)
        need_vector(&list, -1, "rope_freqs.weight", spec->rope_dims / 2);
    for (uint32_t i = 0; i < spec->n_layers && !list.status; i++)
        need_layer(&list, spec, (int)i);
    need_norm(&list, spec, -1, "output_norm", spec->width);
    if (!spec->tied_head)
        need_matrix(&list, -1, "output.weight", spec->width, spec->vocab_size);
    refuse_rest(&list);
    free(list.asked);
    return list.status;
}

int model_spec_read(struct model_spec *out, const struct gguf *gguf, struct error *error)
{
    struct model_spec spec = {0};
    struct reader reader = {.gguf = gguf, .error = error};
    const struct family *family = read_family(&reader, &spec);
    reader.architecture = spec.architecture;
    if (!reader.status)
        read_dimensions(&reader, family, &spec);
    read_parts(&reader, &spec);
    if (!reader.status)
        reader.status = check_tensors(gguf, &spec, error);
    if (reader.status)
        error_wrap(error, "%s", gguf_path(gguf));
    else
        *out = spec;
    return reader.status;
}

uint64_t model_spec_kv_bytes(const struct model_spec *spec, uint32_t n_layers)
{
    return (uint64_t)n_layers * spec->n_kv_heads * spec->head_size * 2 * sizeof(uint16_t);
}
