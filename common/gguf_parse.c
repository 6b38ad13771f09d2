// Reads one GGUF file's header, metadata and tensor table out of its bytes. The bytes are an outsider's: a
// cursor checks what is left before every read, counts are held against the bytes that could carry them
// before anything is allocated, and nothing is believed that was not checked. What survives is safe to read
// without further checks: string arrays, for one, were walked here once. Called while a model opens, by one
// thread.
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/gguf_internal.h"
#include "common/limits.h"
#include "common/tensor_type.h"
#include "common/utf8.h"

enum {
    LEAST_KEY_VALUE = 8 + 1 + 4 + 1,      // name length, name, kind, value
    LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8, // name length, name, dimension count, one dimension, type, offset
    LEAST_ARRAY = 4 + 8,                  // kind, count
    LONGEST_KEY = 65535,
    DEEPEST_ARRAY = 8,
    DEFAULT_ALIGNMENT = 32,
};

struct cursor {
    const uint8_t *bytes;
    uint64_t at, length; // at <= length
};

static bool take(struct cursor *cursor, uint64_t count, const uint8_t **out)
{
    if (count > cursor->length - cursor->at)
        return false;
    *out = cursor->bytes + cursor->at;
    cursor->at += count;
    return true;
}

static bool take_u32(struct cursor *cursor, uint32_t *out)
{
    const uint8_t *bytes;
    if (!take(cursor, sizeof(*out), &bytes))
        return false;
    memcpy(out, bytes, sizeof(*out));
    return true;
}

static bool take_u64(struct cursor *cursor, uint64_t *out)
{
    const uint8_t *bytes;
    if (!take(cursor, sizeof(*out), &bytes))
        return false;
    memcpy(out, bytes, sizeof(*out));
    return true;
}

static bool take_string(struct cursor *cursor, struct gguf_string *out)
{
    uint64_t length;
    const uint8_t *bytes;
    if (!take_u64(cursor, &length) || !take(cursor, length, &bytes))
        return false;
    *out = (struct gguf_string){(const char *)bytes, (size_t)length};
    return true;
}

struct gguf_label gguf_label(struct gguf_string name)
{
    struct gguf_label label;
    size_t limit = sizeof(label.text) - 4; // room for the dots
    size_t used = utf8_copy_clean(label.text, limit, name.bytes, name.length);
    if (name.length >= limit)
        strcpy(label.text + used, "...");
    return label;
}

size_t gguf_kind_bytes(uint32_t kind)
{
    switch (kind) {
    case GGUF_U8:
    case GGUF_I8:
    case GGUF_BOOL:
        return 1;
    case GGUF_U16:
    case GGUF_I16:
        return 2;
    case GGUF_U32:
    case GGUF_I32:
    case GGUF_F32:
        return 4;
    case GGUF_U64:
    case GGUF_I64:
    case GGUF_F64:
        return 8;
    default:
        return 0;
    }
}

// --- the header ---

static int refuse_magic(const struct gguf_part *part, struct error *error)
{
    static const char LFS[] = "version https://git-lfs";
    if (part->length == 0)
        return error_set(error, STATUS_CORRUPT, "the file is empty");
    if (part->length >= sizeof(LFS) - 1 && memcmp(part->bytes, LFS, sizeof(LFS) - 1) == 0)
        return error_set(error, STATUS_CORRUPT,
                         "this is a Git LFS pointer, not the model itself: fetch it with 'git lfs pull'");
    return error_set(error, STATUS_CORRUPT, "this is not a GGUF file (it does not begin with 'GGUF')");
}

static int refuse_version(uint32_t version, struct error *error)
{
    uint32_t swapped = __builtin_bswap32(version);
    if (swapped >= 1 && swapped <= 3)
        return error_set(error, STATUS_UNSUPPORTED,
                         "this is a big-endian GGUF file; Strata reads little-endian ones: convert it");
    if (version == 1)
        return error_set(
            error, STATUS_UNSUPPORTED,
            "this is a GGUF version 1 file; Strata reads versions 2 and 3: convert the model again");
    return error_set(error, STATUS_UNSUPPORTED, "GGUF version %" PRIu32 " is not one Strata reads (2 and 3)",
                     version);
}

static int check_count(const char *what, uint64_t count, uint64_t most, uint64_t left, uint64_t least_bytes,
                       struct error *error)
{
    if (count > most)
        return error_set(error, STATUS_CORRUPT, "the header promises %" PRIu64 " %s, the limit is %" PRIu64,
                         count, what, most);
    if (count > left / least_bytes)
        return error_set(error, STATUS_CORRUPT,
                         "the header promises %" PRIu64
                         " %s, more than the file has room for: it is truncated "
                         "or damaged",
                         count, what);
    return STATUS_OK;
}

static int read_header(struct gguf_part *part, struct cursor *cursor, struct error *error)
{
    const uint8_t *magic;
    uint64_t n_tensors, n_values;
    if (!take(cursor, 4, &magic) || memcmp(magic, "GGUF", 4) != 0)
        return refuse_magic(part, error);
    if (!take_u32(cursor, &part->version))
        return error_set(error, STATUS_CORRUPT, "the file ends inside its header");
    if (part->version != 2 && part->version != 3)
        return refuse_version(part->version, error);
    if (!take_u64(cursor, &n_tensors) || !take_u64(cursor, &n_values))
        return error_set(error, STATUS_CORRUPT, "the file ends inside its header");
    uint64_t left = cursor->length - cursor->at;
    int status = check_count("tensors", n_tensors, MAX_TENSORS, left, LEAST_TENSOR, error);
    if (!status)
        status = check_count("metadata values", n_values, MAX_METADATA, left, LEAST_KEY_VALUE, error);
    if (status)
        return status;
    part->tensors = calloc(n_tensors + 1, sizeof(*part->tensors));
    part->values = calloc(n_values + 1, sizeof(*part->values));
    if (!part->tensors || !part->values)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the tables of the header");
    part->n_tensors = n_tensors;
    part->n_values = n_values;
    return STATUS_OK;
}

// --- metadata ---

static int refuse_end(struct gguf_string key, struct error *error)
{
    return error_set(error, STATUS_CORRUPT, "the file ends inside the value of key '%s'",
                     gguf_label(key).text);
}

static int refuse_kind(struct gguf_string key, uint32_t kind, struct error *error)
{
    return error_set(error, STATUS_CORRUPT, "key '%s' has a value of unknown type %" PRIu32,
                     gguf_label(key).text, kind);
}

// Moves past `count` elements of one kind.
static int skip_elements(struct cursor *cursor, struct gguf_string key, uint32_t kind, uint64_t count,
                         struct error *error)
{
    const uint8_t *data;
    struct gguf_string string;
    size_t size = gguf_kind_bytes(kind);
    if (kind == GGUF_STRING) {
        for (uint64_t i = 0; i < count; i++) // ends with the bytes, whatever the count says
            if (!take_string(cursor, &string))
                return refuse_end(key, error);
        return STATUS_OK;
    }
    if (!size)
        return refuse_kind(key, kind, error);
    if (count > (cursor->length - cursor->at) / size || !take(cursor, count * size, &data))
        return refuse_end(key, error);
    for (uint64_t i = 0; kind == GGUF_BOOL && i < count; i++)
        if (data[i] > 1)
            return error_set(error, STATUS_CORRUPT, "key '%s' has a boolean that is neither 0 nor 1",
                             gguf_label(key).text);
    return STATUS_OK;
}

// Moves past an array of arrays: `open` counts what is left to read at each depth. No recursion.
static int skip_nested(struct cursor *cursor, struct gguf_string key, uint64_t count, struct error *error)
{
    uint64_t open[DEEPEST_ARRAY] = {count};
    size_t depth = 0;
    for (;;) {
        while (open[depth] == 0) {
            if (depth == 0)
                return STATUS_OK;
            depth--;
        }
        open[depth]--;
        uint32_t kind;
        uint64_t inner;
        if (!take_u32(cursor, &kind) || !take_u64(cursor, &inner))
            return refuse_end(key, error);
        if (kind != GGUF_ARRAY) {
            int status = skip_elements(cursor, key, kind, inner, error);
            if (status)
                return status;
        } else if (++depth == DEEPEST_ARRAY) {
            return error_set(error, STATUS_CORRUPT, "key '%s' nests arrays deeper than %d",
                             gguf_label(key).text, DEEPEST_ARRAY);
        } else {
            open[depth] = inner;
        }
    }
}

static int read_value(struct cursor *cursor, struct gguf_value *value, struct error *error)
{
    uint32_t kind;
    if (!take_u32(cursor, &kind))
        return refuse_end(value->key, error);
    value->count = 1;
    if (kind == GGUF_ARRAY) {
        value->is_array = true;
        if (!take_u32(cursor, &kind) || !take_u64(cursor, &value->count))
            return refuse_end(value->key, error);
    }
    value->nested = value->is_array && kind == GGUF_ARRAY;
    value->kind = value->nested ? GGUF_U8 : (enum gguf_kind)kind;
    value->data = cursor->bytes + cursor->at;
    uint64_t start = cursor->at;
    int status = value->nested ? skip_nested(cursor, value->key, value->count, error)
                               : skip_elements(cursor, value->key, kind, value->count, error);
    value->bytes = (size_t)(cursor->at - start);
    return status;
}

static int read_values(struct gguf_part *part, struct cursor *cursor, struct error *error)
{
    for (size_t i = 0; i < part->n_values; i++) {
        struct gguf_value *value = &part->values[i];
        if (!take_string(cursor, &value->key))
            return error_set(error, STATUS_CORRUPT, "the file ends inside the name of metadata key %zu", i);
        if (value->key.length == 0 || value->key.length > LONGEST_KEY)
            return error_set(error, STATUS_CORRUPT,
                             "metadata key %zu has a name of %zu bytes (1 to %d allowed)", i,
                             value->key.length, LONGEST_KEY);
        int status = read_value(cursor, value, error);
        if (status)
            return status;
    }
    return name_index_build(&part->keys, part->values, sizeof(*part->values), part->n_values, "key", error);
}

static int read_alignment(struct gguf_part *part, struct error *error)
{
    uint32_t alignment = DEFAULT_ALIGNMENT;
    const struct gguf_value *value = gguf_part_find(part, "general.alignment");
    if (value && (!gguf_value_u32(value, &alignment) || alignment == 0 || (alignment & (alignment - 1))))
        return error_set(error, STATUS_CORRUPT, "general.alignment is not a power of two");
    part->alignment = alignment;
    return STATUS_OK;
}

// --- the tensor table ---

static int refuse_type(const struct gguf_tensor *tensor, struct error *error)
{
    const char *name = tensor_type_ggml_name(tensor->type);
    if (name)
        return error_set(error, STATUS_UNSUPPORTED,
                         "tensor '%s' has type %s, which Strata does not read (%s)",
                         gguf_label(tensor->name).text, name, tensor_type_list());
    return error_set(error, STATUS_UNSUPPORTED, "tensor '%s' has the unknown type number %" PRIu32,
                     gguf_label(tensor->name).text, tensor->type);
}

static int check_shape(struct gguf_tensor *tensor, struct error *error)
{
    uint64_t rows = 1;
    bool overflow = false;
    for (uint32_t i = 0; i < tensor->n_dims; i++) {
        if (tensor->dims[i] == 0)
            return error_set(error, STATUS_CORRUPT, "tensor '%s' has a dimension of 0",
                             gguf_label(tensor->name).text);
        if (i > 0)
            overflow |= __builtin_mul_overflow(rows, tensor->dims[i], &rows);
    }
    const struct tensor_type_info *info = tensor_type_info(tensor->type);
    if (!info)
        return refuse_type(tensor, error);
    if (tensor->dims[0] % info->block_weights)
        return error_set(error, STATUS_CORRUPT,
                         "tensor '%s' has rows of %" PRIu64 " weights, not a multiple of the %" PRIu32
                         " of a %s block",
                         gguf_label(tensor->name).text, tensor->dims[0], info->block_weights, info->name);
    tensor->bytes = overflow ? 0 : tensor_type_bytes(tensor->type, tensor->dims[0], rows);
    if (tensor->bytes == 0)
        return error_set(error, STATUS_CORRUPT, "the size of tensor '%s' overflows",
                         gguf_label(tensor->name).text);
    return STATUS_OK;
}

static int read_tensor(struct cursor *cursor, struct gguf_tensor *tensor, size_t number, struct error *error)
{
    if (!take_string(cursor, &tensor->name))
        return error_set(error, STATUS_CORRUPT, "the file ends inside the name of tensor %zu", number);
    if (tensor->name.length == 0 || tensor->name.length > LONGEST_KEY)
        return error_set(error, STATUS_CORRUPT, "tensor %zu has a name of %zu bytes (1 to %d allowed)",
                         number, tensor->name.length, LONGEST_KEY);
    bool whole = take_u32(cursor, &tensor->n_dims);
    if (whole && (tensor->n_dims == 0 || tensor->n_dims > MAX_TENSOR_DIMS))
        return error_set(error, STATUS_CORRUPT, "tensor '%s' has %" PRIu32 " dimensions (1 to %d allowed)",
                         gguf_label(tensor->name).text, tensor->n_dims, MAX_TENSOR_DIMS);
    for (uint32_t i = 0; i < MAX_TENSOR_DIMS; i++) {
        tensor->dims[i] = 1;
        if (i < tensor->n_dims)
            whole = whole && take_u64(cursor, &tensor->dims[i]);
    }
    if (!whole || !take_u32(cursor, &tensor->type) || !take_u64(cursor, &tensor->offset))
        return error_set(error, STATUS_CORRUPT, "the file ends inside the description of tensor '%s'",
                         gguf_label(tensor->name).text);
    return check_shape(tensor, error);
}

// Turns offsets within the data section into offsets within the file, and checks that the bytes are there.
static int place_tensor(const struct gguf_part *part, struct gguf_tensor *tensor, struct error *error)
{
    uint64_t data_start = (part->header_bytes + part->alignment - 1) / part->alignment * part->alignment;
    uint64_t room = part->length > data_start ? part->length - data_start : 0;
    if (tensor->offset % part->alignment)
        return error_set(error, STATUS_CORRUPT,
                         "tensor '%s' begins at offset %" PRIu64 ", not a multiple of the alignment %" PRIu64,
                         gguf_label(tensor->name).text, tensor->offset, part->alignment);
    if (tensor->offset > room || tensor->bytes > room - tensor->offset)
        return error_set(error, STATUS_CORRUPT,
                         "tensor '%s' (%" PRIu64 " bytes at offset %" PRIu64
                         ") goes beyond the end of the file: it is truncated or damaged",
                         gguf_label(tensor->name).text, tensor->bytes, tensor->offset);
    tensor->offset += data_start;
    return STATUS_OK;
}

static int by_offset(const void *left, const void *right)
{
    const struct gguf_tensor *a = *(const struct gguf_tensor *const *)left;
    const struct gguf_tensor *b = *(const struct gguf_tensor *const *)right;
    return (a->offset > b->offset) - (a->offset < b->offset);
}

static int check_overlap(const struct gguf_part *part, struct error *error)
{
    const struct gguf_tensor **order = malloc((part->n_tensors + 1) * sizeof(*order));
    if (!order)
        return error_set(error, STATUS_NO_MEMORY, "no memory to check the tensor table");
    for (size_t i = 0; i < part->n_tensors; i++)
        order[i] = &part->tensors[i];
    qsort(order, part->n_tensors, sizeof(*order), by_offset);
    int status = STATUS_OK;
    for (size_t i = 1; i < part->n_tensors && !status; i++)
        if (order[i]->offset < order[i - 1]->offset + order[i - 1]->bytes)
            status = error_set(error, STATUS_CORRUPT, "tensors '%s' and '%s' overlap in the file",
                               gguf_label(order[i - 1]->name).text, gguf_label(order[i]->name).text);
    free(order);
    return status;
}

static int read_tensors(struct gguf_part *part, struct cursor *cursor, struct error *error)
{
    int status = STATUS_OK;
    for (size_t i = 0; i < part->n_tensors && !status; i++)
        status = read_tensor(cursor, &part->tensors[i], i, error);
    part->header_bytes = cursor->at;
    for (size_t i = 0; i < part->n_tensors && !status; i++)
        status = place_tensor(part, &part->tensors[i], error);
    return status ? status : check_overlap(part, error);
}

int gguf_parse_part(struct gguf_part *part, struct error *error)
{
    struct cursor cursor = {.bytes = part->bytes, .length = part->length};
    int status = read_header(part, &cursor, error);
    if (!status)
        status = read_values(part, &cursor, error);
    if (!status)
        status = read_alignment(part, error);
    if (!status)
        status = read_tensors(part, &cursor, error);
    return status;
}

void gguf_part_free(struct gguf_part *part)
{
    name_index_free(&part->keys);
    free(part->values);
    free(part->tensors);
    part->values = NULL;
    part->tensors = NULL;
}

const struct gguf_value *gguf_part_find(const struct gguf_part *part, const char *key)
{
    return name_index_find(&part->keys, key);
}
