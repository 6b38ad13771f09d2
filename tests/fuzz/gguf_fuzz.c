// Any bytes as a model file: open, read everything that can be read, make a spec and a plan of it. What opens
// must keep the promises of gguf.h; a broken promise aborts. One thread.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/gguf.h"
#include "common/model_spec.h"
#include "common/shard_plan.h"
#include "common/tensor_type.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint64_t sink; // keeps the reads

static void promise(bool kept, const char *what)
{
    if (!kept) {
        fprintf(stderr, "broken promise: %s\n", what);
        abort();
    }
}

// The key as C text when it can be one.
static const char *key_text(struct gguf_string key)
{
    static char text[70000];
    if (key.length >= sizeof(text) || memchr(key.bytes, '\0', key.length))
        return NULL;
    memcpy(text, key.bytes, key.length);
    text[key.length] = '\0';
    return text;
}

static void read_value(const struct gguf *gguf, const struct gguf_value *value)
{
    struct gguf_string string;
    size_t cursor = 0;
    uint64_t strings = 0;
    uint32_t number;
    float real;
    bool flag;
    const char *key = key_text(value->key);
    promise(value->kind != GGUF_ARRAY, "a kind is never an array");
    promise(value->is_array || value->count == 1, "a scalar has one element");
    while (gguf_array_next_string(value, &cursor, &string)) {
        strings++;
        for (size_t i = 0; i < string.length; i++)
            sink += (unsigned char)string.bytes[i];
    }
    promise(value->kind != GGUF_STRING || strings == value->count, "every string can be walked");
    for (uint64_t i = 0; i < value->count && i < 1000; i++)
        sink += (uint64_t)gguf_array_int(value, i) + (gguf_array_float(value, i) > 0);
    sink += (uint64_t)gguf_array_int(value, UINT64_MAX) + (uint64_t)gguf_array_int(value, value->count);
    for (size_t i = 0; i < value->bytes; i++)
        sink += value->data[i];
    if (!key)
        return;
    promise(gguf_find(gguf, key) == value, "a key finds its value");
    sink += (uint64_t)gguf_get_u32(gguf, key, &number, NULL);
    sink += (uint64_t)gguf_get_f32(gguf, key, &real, NULL);
    sink += (uint64_t)gguf_get_bool(gguf, key, &flag, NULL);
    sink += (uint64_t)gguf_get_string(gguf, key, &string, NULL);
}

static void read_tensor(const struct gguf *gguf, const struct gguf_tensor *tensor)
{
    const unsigned char *bytes = gguf_tensor_data(gguf, tensor);
    const char *name = key_text(tensor->name);
    promise(tensor_type_info(tensor->type) != NULL, "a type is known");
    promise(tensor->n_dims >= 1 && tensor->n_dims <= 4 && tensor->bytes > 0,
            "a tensor has a shape and bytes");
    promise(tensor->offset % gguf_alignment(gguf) == 0, "a tensor is aligned");
    sink += bytes[0] + bytes[tensor->bytes - 1];
    gguf_tensor_release(gguf, tensor);
    promise(!name || gguf_find_tensor(gguf, name) == tensor, "a name finds its tensor");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *gguf = NULL;
    struct error error = {0};
    struct model_spec spec;
    struct shard_plan plan;
    int status = gguf_open_memory(&gguf, data, size, &error);
    promise((status == 0) == (gguf != NULL) && status == error.status, "a status and its result agree");
    promise((status == 0) == (error.text[0] == '\0'), "a failure has a sentence");
    if (status)
        return 0;
    for (size_t i = 0; i < gguf_value_count(gguf); i++)
        read_value(gguf, gguf_value_at(gguf, i));
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++)
        read_tensor(gguf, gguf_tensor_at(gguf, i));
    sink += gguf_fingerprint(gguf);
    status = model_spec_read(&spec, gguf, &error);
    promise(status == error.status && (status == 0) == (error.text[0] == '\0'),
            "a failed spec has a sentence");
    for (uint32_t stages = 1; status == 0 && stages <= 3 && stages <= spec.n_layers; stages++) {
        promise(shard_plan_make(&plan, &spec, gguf, stages, NULL, &error) == 0, "a valid model can be dealt");
        promise(plan.stages[stages - 1].first_layer + plan.stages[stages - 1].n_layers == spec.n_layers,
                "a plan has every layer");
    }
    gguf_close(gguf);
    return 0;
}
