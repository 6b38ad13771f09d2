// The list of a stage's tensors, from the model's spec. Another family adds lines to the tables below. Called
// by the device's thread before a load; owns nothing but the list.
#include "worker/weight_file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/limits.h"
#include "common/tensor_type.h"

struct wanted {
    const char *name; // behind "blk.N." or alone
    bool when;
    enum weight_form form;
    enum weight_input input;
};

static int refuse_type(const char *name, uint32_t type, struct error *error)
{
    const char *known = tensor_type_ggml_name(type);
    return error_set(error, STATUS_UNSUPPORTED, "tensor %s has type %u (%s), which Strata does not read",
                     name, type, known ? known : "unknown");
}

static bool is_float(uint32_t type)
{
    return type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_BF16;
}

static int check_source(const struct weight_source *source, struct error *error)
{
    if (!tensor_type_info(source->type))
        return refuse_type(source->name, source->type, error);
    if (source->form == WEIGHT_VECTOR && !is_float(source->type))
        return error_set(error, STATUS_UNSUPPORTED,
                         "tensor %s is a vector of type %s; Strata reads vectors of F32, F16 or BF16",
                         source->name, tensor_type_info(source->type)->name);
    if (source->width == 0 || source->rows == 0)
        return error_set(error, STATUS_CORRUPT, "tensor %s is empty", source->name);
    return STATUS_OK;
}

static struct weight_source *append(struct weight_list *list)
{
    if (list->count == list->capacity) {
        uint32_t capacity = list->capacity ? 2 * list->capacity : 64;
        struct weight_source *items = realloc(list->items, capacity * sizeof(*items));
        if (!items)
            return NULL;
        list->items = items;
        list->capacity = capacity;
    }
    struct weight_source *source = &list->items[list->count++];
    memset(source, 0, sizeof(*source));
    return source;
}

// Adds the tensor `file_name` of the file under the name `name`.
static int add(struct weight_list *list, const struct gguf *gguf, const char *file_name, const char *name,
               const struct wanted *wanted, struct error *error)
{
    const struct gguf_tensor *tensor = gguf_find_tensor(gguf, file_name);
    if (!tensor)
        return error_set(error, STATUS_CORRUPT, "tensor %s is missing from %s", file_name, gguf_path(gguf));
    struct weight_source *source = append(list);
    if (!source)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the list of weights");
    snprintf(source->name, sizeof(source->name), "%s", name);
    source->tensor = tensor;
    source->type = tensor->type;
    source->form = wanted->form;
    source->input = wanted->input;
    if (tensor->dims[0] > MAX_VOCABULARY || tensor->dims[1] > MAX_VOCABULARY)
        return error_set(
            error, STATUS_UNSUPPORTED, "tensor %s is %llu x %llu; %d is the most in one dimension", file_name,
            (unsigned long long)tensor->dims[0], (unsigned long long)tensor->dims[1], MAX_VOCABULARY);
    source->width = (uint32_t)tensor->dims[0];
    source->rows = (uint32_t)tensor->dims[1];
    list->source_bytes += tensor->bytes;
    return check_source(source, error);
}

static int add_layer(struct weight_list *list, const struct gguf *gguf, const struct model_spec *spec,
                     uint32_t layer, struct error *error)
{
    bool shift = spec->norm == NORM_LAYER, split = !spec->fused_qkv, gated = spec->ffn == FFN_GATED;
    const struct wanted wanted[] = {
        {"attn_norm.weight", true, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_norm.bias", shift, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_qkv.weight", !split, WEIGHT_MATRIX, WEIGHT_READS_NORMED},
        {"attn_qkv.bias", !split && spec->attn_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_q.weight", split, WEIGHT_MATRIX, WEIGHT_READS_NORMED},
        {"attn_k.weight", split, WEIGHT_MATRIX, WEIGHT_READS_NORMED},
        {"attn_v.weight", split, WEIGHT_MATRIX, WEIGHT_READS_NORMED},
        {"attn_q.bias", split && spec->attn_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_k.bias", split && spec->attn_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_v.bias", split && spec->attn_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_q_norm.weight", spec->qk_norm, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_k_norm.weight", spec->qk_norm, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"attn_output.weight", true, WEIGHT_MATRIX, WEIGHT_READS_ATTENDED},
        {"attn_output.bias", spec->output_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"ffn_norm.weight", true, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"ffn_norm.bias", shift, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"ffn_gate.weight", gated, WEIGHT_MATRIX, WEIGHT_READS_NORMED},
        {"ffn_gate.bias", gated && spec->ffn_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"ffn_up.weight", true, WEIGHT_MATRIX, WEIGHT_READS_NORMED},
        {"ffn_up.bias", spec->ffn_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"ffn_down.weight", true, WEIGHT_MATRIX, WEIGHT_READS_ACTIVATED},
        {"ffn_down.bias", spec->ffn_bias, WEIGHT_VECTOR, WEIGHT_READS_NONE},
    };
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        char file_name[WEIGHT_NAME_BYTES], name[WEIGHT_NAME_BYTES];
        snprintf(file_name, sizeof(file_name), "blk.%u.%s", layer, wanted[i].name);
        snprintf(name, sizeof(name), "layer.%u.%s", layer, wanted[i].name);
        int status = wanted[i].when ? add(list, gguf, file_name, name, &wanted[i], error) : STATUS_OK;
        if (status)
            return status;
    }
    return STATUS_OK;
}

static int add_ends(struct weight_list *list, const struct gguf *gguf, const struct model_spec *spec,
                    bool first, bool last, struct error *error)
{
    const struct wanted wanted[] = {
        {"token_embd.weight", first, WEIGHT_TABLE, WEIGHT_READS_NONE},
        {"position_embd.weight", first && spec->position == POSITION_LEARNED, WEIGHT_TABLE,
         WEIGHT_READS_NONE},
        {"rope_freqs.weight", spec->rope_factors, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"output_norm.weight", last, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"output_norm.bias", last && spec->norm == NORM_LAYER, WEIGHT_VECTOR, WEIGHT_READS_NONE},
        {"output.weight", last, WEIGHT_MATRIX, WEIGHT_READS_NORMED},
    };
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        const char *name = wanted[i].name;
        bool tied = spec->tied_head && strcmp(name, "output.weight") == 0;
        int status = wanted[i].when
                         ? add(list, gguf, tied ? "token_embd.weight" : name, name, &wanted[i], error)
                         : STATUS_OK;
        if (status)
            return status;
    }
    return STATUS_OK;
}

int weight_list_make(struct weight_list *out, const struct gguf *gguf, const struct model_spec *spec,
                     uint32_t first_layer, uint32_t n_layers, struct error *error)
{
    memset(out, 0, sizeof(*out));
    if (n_layers == 0 || first_layer >= spec->n_layers || n_layers > spec->n_layers - first_layer)
        return error_set(error, STATUS_INVALID, "layers %u to %llu were asked for, the model has %u",
                         first_layer, (unsigned long long)first_layer + n_layers - 1, spec->n_layers);
    bool last = first_layer + n_layers == spec->n_layers;
    int status = add_ends(out, gguf, spec, first_layer == 0, last, error);
    for (uint32_t layer = first_layer; !status && layer < first_layer + n_layers; layer++)
        status = add_layer(out, gguf, spec, layer, error);
    if (status)
        weight_list_free(out);
    return status;
}

void weight_list_free(struct weight_list *list)
{
    free(list->items);
    memset(list, 0, sizeof(*list));
}
