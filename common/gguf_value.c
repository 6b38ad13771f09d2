// Typed reads of metadata that gguf_parse.c has checked: scalars with conversion, array elements, string
// arrays. Elements lie unaligned in the mapping, so each is copied out. No state; any thread.
#include <math.h>
#include <string.h>

#include "common/gguf_internal.h"

// Any integer kind as (magnitude in 64 bits, sign). False for other kinds.
static bool element_int(const struct gguf_value *value, uint64_t index, uint64_t *bits, bool *negative)
{
    size_t size = gguf_kind_bytes(value->kind);
    const uint8_t *data = value->data + index * size;
    uint64_t raw = 0;
    switch (value->kind) {
    case GGUF_U8:
    case GGUF_U16:
    case GGUF_U32:
    case GGUF_U64:
    case GGUF_BOOL:
        memcpy(&raw, data, size);
        *bits = raw;
        *negative = false;
        return true;
    case GGUF_I8:
    case GGUF_I16:
    case GGUF_I32:
    case GGUF_I64: {
        memcpy(&raw, data, size);
        unsigned shift = (unsigned)(64 - 8 * size);
        *bits = (uint64_t)((int64_t)(raw << shift) >> shift);
        *negative = (int64_t)*bits < 0;
        return true;
    }
    default:
        return false;
    }
}

bool gguf_value_u32(const struct gguf_value *value, uint32_t *out)
{
    uint64_t bits;
    bool negative;
    if (value->is_array || value->kind == GGUF_BOOL || !element_int(value, 0, &bits, &negative))
        return false;
    if (negative || bits > UINT32_MAX)
        return false;
    *out = (uint32_t)bits;
    return true;
}

static int refuse(const char *key, const char *wanted, struct error *error)
{
    return error_set(error, STATUS_CORRUPT, "metadata key '%s' is not %s", key, wanted);
}

int gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t *out, struct error *error)
{
    const struct gguf_value *value = gguf_find(gguf, key);
    if (!value)
        return STATUS_NOT_FOUND;
    return gguf_value_u32(value, out) ? STATUS_OK : refuse(key, "an integer between 0 and 4294967295", error);
}

int gguf_get_f32(const struct gguf *gguf, const char *key, float *out, struct error *error)
{
    const struct gguf_value *value = gguf_find(gguf, key);
    if (!value)
        return STATUS_NOT_FOUND;
    if (value->is_array || (value->kind != GGUF_F32 && value->kind != GGUF_F64))
        return refuse(key, "a floating point number", error);
    *out = (float)gguf_array_float(value, 0);
    return STATUS_OK;
}

int gguf_get_bool(const struct gguf *gguf, const char *key, bool *out, struct error *error)
{
    const struct gguf_value *value = gguf_find(gguf, key);
    if (!value)
        return STATUS_NOT_FOUND;
    if (value->is_array || value->kind != GGUF_BOOL)
        return refuse(key, "a boolean", error);
    *out = value->data[0] != 0;
    return STATUS_OK;
}

int gguf_get_string(const struct gguf *gguf, const char *key, struct gguf_string *out, struct error *error)
{
    const struct gguf_value *value = gguf_find(gguf, key);
    size_t cursor = 0;
    if (!value)
        return STATUS_NOT_FOUND;
    if (value->is_array || value->kind != GGUF_STRING)
        return refuse(key, "a string", error);
    gguf_array_next_string(value, &cursor, out);
    return STATUS_OK;
}

int64_t gguf_array_int(const struct gguf_value *value, uint64_t index)
{
    uint64_t bits;
    bool negative;
    if (value->nested || index >= value->count || !element_int(value, index, &bits, &negative))
        return 0;
    return !negative && bits > INT64_MAX ? INT64_MAX : (int64_t)bits;
}

double gguf_array_float(const struct gguf_value *value, uint64_t index)
{
    uint64_t bits;
    bool negative;
    if (value->nested || index >= value->count)
        return 0;
    if (value->kind == GGUF_F32) {
        float element;
        memcpy(&element, value->data + index * sizeof(element), sizeof(element));
        return (double)element;
    }
    if (value->kind == GGUF_F64) {
        double element;
        memcpy(&element, value->data + index * sizeof(element), sizeof(element));
        return element;
    }
    if (!element_int(value, index, &bits, &negative))
        return 0;
    return negative ? (double)(int64_t)bits : (double)bits;
}

bool gguf_array_next_string(const struct gguf_value *value, size_t *cursor, struct gguf_string *out)
{
    uint64_t length;
    if (value->nested || value->kind != GGUF_STRING || *cursor > value->bytes ||
        value->bytes - *cursor < sizeof(length))
        return false;
    memcpy(&length, value->data + *cursor, sizeof(length));
    if (length > value->bytes - *cursor - sizeof(length))
        return false; // a cursor that was not ours
    *out = (struct gguf_string){(const char *)value->data + *cursor + sizeof(length), (size_t)length};
    *cursor += sizeof(length) + (size_t)length;
    return true;
}
