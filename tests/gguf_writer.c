// The writing half of GGUF, for tests only. One thread; the writer owns its buffers until finish.
#include "tests/gguf_writer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/tensor_type.h"

static void put(struct gguf_bytes *bytes, const void *data, size_t length)
{
    if (bytes->capacity - bytes->length < length) {
        bytes->capacity = (bytes->length + length) * 2;
        bytes->data = realloc(bytes->data, bytes->capacity);
        if (!bytes->data)
            abort();
    }
    if (data)
        memcpy(bytes->data + bytes->length, data, length);
    else
        memset(bytes->data + bytes->length, 0, length);
    bytes->length += length;
}

static void put_u32(struct gguf_bytes *bytes, uint32_t value)
{
    put(bytes, &value, sizeof(value));
}

static void put_u64(struct gguf_bytes *bytes, uint64_t value)
{
    put(bytes, &value, sizeof(value));
}

static void put_string(struct gguf_bytes *bytes, const char *text)
{
    put_u64(bytes, strlen(text));
    put(bytes, text, strlen(text));
}

static void pad(struct gguf_bytes *bytes, uint32_t alignment)
{
    if (bytes->length % alignment)
        put(bytes, NULL, alignment - bytes->length % alignment);
}

void gguf_writer_raw(struct gguf_writer *writer, const char *key, uint32_t kind, const void *bytes,
                     size_t length)
{
    put_string(&writer->values, key);
    put_u32(&writer->values, kind);
    put(&writer->values, bytes, length);
    writer->n_values++;
}

void gguf_writer_u32(struct gguf_writer *writer, const char *key, uint32_t value)
{
    gguf_writer_raw(writer, key, GGUF_U32, &value, sizeof(value));
}

void gguf_writer_f32(struct gguf_writer *writer, const char *key, float value)
{
    gguf_writer_raw(writer, key, GGUF_F32, &value, sizeof(value));
}

void gguf_writer_bool(struct gguf_writer *writer, const char *key, bool value)
{
    gguf_writer_raw(writer, key, GGUF_BOOL, &(uint8_t){value}, 1);
}

void gguf_writer_string(struct gguf_writer *writer, const char *key, const char *value)
{
    struct gguf_bytes body = {0};
    put_string(&body, value);
    gguf_writer_raw(writer, key, GGUF_STRING, body.data, body.length);
    free(body.data);
}

void gguf_writer_array(struct gguf_writer *writer, const char *key, enum gguf_kind kind, const void *elements,
                       uint64_t count, size_t bytes)
{
    struct gguf_bytes body = {0};
    put_u32(&body, kind);
    put_u64(&body, count);
    put(&body, elements, bytes);
    gguf_writer_raw(writer, key, GGUF_ARRAY, body.data, body.length);
    free(body.data);
}

void gguf_writer_strings(struct gguf_writer *writer, const char *key, const char *const *values, size_t count)
{
    struct gguf_bytes body = {0};
    for (size_t i = 0; i < count; i++)
        put_string(&body, values[i]);
    gguf_writer_array(writer, key, GGUF_STRING, body.data, count, body.length);
    free(body.data);
}

void gguf_writer_tensor_at(struct gguf_writer *writer, const char *name, uint32_t type, uint32_t n_dims,
                           const uint64_t *dims, uint64_t offset)
{
    put_string(&writer->tensors, name);
    put_u32(&writer->tensors, n_dims);
    for (uint32_t i = 0; i < n_dims; i++)
        put_u64(&writer->tensors, dims[i]);
    put_u32(&writer->tensors, type);
    put_u64(&writer->tensors, offset);
    writer->n_tensors++;
}

void gguf_writer_tensor(struct gguf_writer *writer, const char *name, uint32_t type, uint32_t n_dims,
                        const uint64_t *dims)
{
    uint64_t rows = 1;
    for (uint32_t i = 1; i < n_dims; i++)
        rows *= dims[i];
    gguf_writer_tensor_at(writer, name, type, n_dims, dims, writer->data.length);
    put(&writer->data, NULL, tensor_type_bytes(type, dims[0], rows));
    pad(&writer->data, writer->alignment ? writer->alignment : 32);
}

unsigned char *gguf_writer_finish(struct gguf_writer *writer, size_t *length)
{
    struct gguf_bytes file = {0};
    if (writer->alignment)
        gguf_writer_u32(writer, "general.alignment", writer->alignment);
    put(&file, "GGUF", 4);
    put_u32(&file, writer->version ? writer->version : 3);
    put_u64(&file, writer->n_tensors);
    put_u64(&file, writer->n_values);
    put(&file, writer->values.data, writer->values.length);
    put(&file, writer->tensors.data, writer->tensors.length);
    pad(&file, writer->alignment ? writer->alignment : 32);
    put(&file, writer->data.data, writer->data.length);
    free(writer->values.data);
    free(writer->tensors.data);
    free(writer->data.data);
    *writer = (struct gguf_writer){0};
    *length = file.length;
    return file.data;
}

void gguf_writer_save(struct gguf_writer *writer, const char *path)
{
    size_t length;
    unsigned char *bytes = gguf_writer_finish(writer, &length);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, length, file) != length || fclose(file) != 0)
        abort();
    free(bytes);
}
