// The weight cache. Entries are few (a dozen a layer) and looked up only when a decoder is built, so they are
// a plain array searched by name. Bytes of the file are touched once, while they are packed and hashed, and
// released at once, so that a worker keeps in memory only what it serves. Runs on the device's thread, which
// owns the cache; the cache owns the device memory.
#include "worker/weight_cache.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "common/tensor_type.h"

struct entry {
    char name[WEIGHT_NAME_BYTES];
    enum weight_form form;
    struct matrix matrix; // a vector: type, one row, width, f32 data
    uint64_t hash;        // of the source bytes, type and shape
    uint64_t file;        // of the cache's files, the one it was loaded from
};

struct weight_cache {
    struct device *device;
    const struct kernel_ops *ops;
    const struct gguf *gguf;
    uint64_t file; // counts weight_cache_set_file
    struct entry **entries;
    uint32_t count, capacity;
    uint64_t bytes;
};

int weight_cache_new(struct weight_cache **out, struct device *device)
{
    struct weight_cache *cache = calloc(1, sizeof(*cache));
    if (!cache)
        return STATUS_NO_MEMORY;
    cache->device = device;
    cache->ops = device_ops(device);
    *out = cache;
    return STATUS_OK;
}

void weight_cache_free(struct weight_cache *cache)
{
    if (!cache)
        return;
    weight_cache_drop(cache, NULL);
    free(cache->entries);
    free(cache);
}

void weight_cache_set_file(struct weight_cache *cache, const struct gguf *gguf)
{
    cache->gguf = gguf;
    cache->file++;
}

static struct entry *find(const struct weight_cache *cache, const char *name)
{
    for (uint32_t i = 0; i < cache->count; i++) {
        if (strcmp(cache->entries[i]->name, name) == 0)
            return cache->entries[i];
    }
    return NULL;
}

static uint64_t hash_source(const struct weight_source *source, const void *bytes)
{
    uint64_t shape[4] = {source->type, source->form, source->rows, source->width};
    return XXH3_64bits_withSeed(bytes, source->tensor->bytes, XXH3_64bits(shape, sizeof(shape)));
}

static uint64_t packed_bytes(const struct weight_cache *cache, const struct weight_source *source)
{
    if (source->form == WEIGHT_VECTOR)
        return (uint64_t)source->rows * source->width * sizeof(float);
    return cache->ops->matrix_bytes(cache->device, source->type, source->rows, source->width,
                                    source->form == WEIGHT_TABLE);
}

uint64_t weight_cache_missing_bytes(const struct weight_cache *cache, const struct weight_list *list)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        if (!find(cache, list->items[i].name))
            bytes += packed_bytes(cache, &list->items[i]);
    }
    return bytes;
}

// --- before anything is uploaded ---

static int check_entry(const struct weight_cache *cache, const struct weight_source *source,
                       const struct entry *entry, struct error *error)
{
    if (entry->file == cache->file)
        return STATUS_OK;
    const void *bytes = gguf_tensor_data(cache->gguf, source->tensor);
    bool same = hash_source(source, bytes) == entry->hash;
    gguf_tensor_release(cache->gguf, source->tensor);
    if (!same)
        return error_set(error, STATUS_INVALID,
                         "weight %s is already loaded from another source; unload it before loading %s",
                         source->name, gguf_path(cache->gguf));
    return STATUS_OK;
}

static int check_type(const struct weight_cache *cache, const struct weight_source *source,
                      struct error *error)
{
    const char *known = tensor_type_ggml_name(source->type);
    if (!tensor_type_info(source->type))
        return error_set(error, STATUS_UNSUPPORTED, "weight %s has type %u (%s), which Strata does not read",
                         source->name, source->type, known ? known : "unknown");
    if (packed_bytes(cache, source) == 0)
        return error_set(error, STATUS_UNSUPPORTED,
                         "weight %s (%s, %u x %u) has no packed form on this device", source->name, known,
                         source->rows, source->width);
    return STATUS_OK;
}

static int check_memory(const struct weight_cache *cache, const struct weight_list *list,
                        const struct weight_load *load, struct error *error)
{
    uint64_t weights = weight_cache_missing_bytes(cache, list);
    if (weights + load->other_bytes <= load->memory_free)
        return STATUS_OK;
    return error_set(
        error, STATUS_NO_MEMORY,
        "%.1f MB of weights (as repacked) and %.1f MB of KV cache and workspace do not fit %.1f MB of "
        "free memory",
        (double)weights / 1e6, (double)load->other_bytes / 1e6, (double)load->memory_free / 1e6);
}

static int check_list(const struct weight_cache *cache, const struct weight_list *list,
                      const struct weight_load *load, struct error *error)
{
    for (uint32_t i = 0; i < list->count; i++) {
        int status = check_type(cache, &list->items[i], error);
        if (status)
            return status;
    }
    for (uint32_t i = 0; i < list->count; i++) {
        const struct entry *entry = find(cache, list->items[i].name);
        int status = entry ? check_entry(cache, &list->items[i], entry, error) : STATUS_OK;
        if (status)
            return status;
    }
    return check_memory(cache, list, load, error);
}

// --- loading ---

static float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    float magnitude;
    if (exponent == 31) {
        uint32_t bits = 0x7f800000 | fraction << 13;
        memcpy(&magnitude, &bits, sizeof(bits));
    } else if (exponent == 0) {
        magnitude = (float)fraction * 0x1p-24f;
    } else {
        uint32_t bits = (exponent + 112) << 23 | fraction << 13;
        memcpy(&magnitude, &bits, sizeof(bits));
    }
    return sign ? -magnitude : magnitude;
}

static void widen(float *out, const void *bytes, uint32_t type, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint16_t half;
        if (type == TENSOR_F32) {
            memcpy(&out[i], (const char *)bytes + 4 * (size_t)i, 4);
            continue;
        }
        memcpy(&half, (const char *)bytes + 2 * (size_t)i, 2);
        uint32_t bits = (uint32_t)half << 16;
        if (type == TENSOR_BF16)
            memcpy(&out[i], &bits, 4);
        else
            out[i] = half_to_float(half);
    }
}

static int upload_vector(struct weight_cache *cache, struct entry *entry, const void *bytes,
                         struct error *error)
{
    uint32_t count = entry->matrix.rows * entry->matrix.width;
    float *values = malloc(count * sizeof(*values));
    if (!values)
        return error_set(error, STATUS_NO_MEMORY, "no memory to convert %u values", count);
    widen(values, bytes, entry->matrix.type, count);
    cache->ops->upload(cache->device, entry->matrix.data, values, count * sizeof(*values));
    int status = cache->ops->sync(cache->device, error);
    free(values);
    return status;
}

static int fill(struct weight_cache *cache, struct entry *entry, const struct weight_source *source,
                struct error *error)
{
    const void *bytes = gguf_tensor_data(cache->gguf, source->tensor);
    entry->hash = hash_source(source, bytes);
    entry->matrix.data = cache->ops->alloc(cache->device, entry->matrix.bytes);
    int status;
    if (!entry->matrix.data)
        status = error_set(error, STATUS_NO_MEMORY, "the device has no %zu bytes left", entry->matrix.bytes);
    else if (source->form == WEIGHT_VECTOR)
        status = upload_vector(cache, entry, bytes, error);
    else
        status = cache->ops->matrix_pack(cache->device, &entry->matrix, bytes, error);
    if (!status)
        status = cache->ops->sync(cache->device, error);
    gguf_tensor_release(cache->gguf, source->tensor);
    return status;
}

static void free_entry(struct weight_cache *cache, struct entry *entry)
{
    if (entry->matrix.data)
        cache->ops->free(cache->device, entry->matrix.data);
    free(entry);
}

static int load_one(struct weight_cache *cache, const struct weight_source *source, struct error *error)
{
    if (cache->count == cache->capacity) {
        uint32_t capacity = cache->capacity ? 2 * cache->capacity : 128;
        struct entry **entries = realloc(cache->entries, capacity * sizeof(*entries));
        if (!entries)
            return error_set(error, STATUS_NO_MEMORY, "weight %s: no memory for its entry", source->name);
        cache->entries = entries;
        cache->capacity = capacity;
    }
    struct entry *entry = calloc(1, sizeof(*entry));
    if (!entry)
        return error_set(error, STATUS_NO_MEMORY, "weight %s: no memory for its entry", source->name);
    memcpy(entry->name, source->name, sizeof(entry->name));
    entry->form = source->form;
    entry->file = cache->file;
    entry->matrix = (struct matrix){.type = source->type,
                                    .rows = source->rows,
                                    .width = source->width,
                                    .table = source->form == WEIGHT_TABLE,
                                    .bytes = packed_bytes(cache, source)};
    int status = fill(cache, entry, source, error);
    if (status) {
        free_entry(cache, entry);
        error_wrap(error, "weight %s", source->name);
        return status;
    }
    cache->entries[cache->count++] = entry;
    cache->bytes += entry->matrix.bytes;
    return STATUS_OK;
}

// Forgets the entries from `count` on: those of a load that failed.
static void roll_back(struct weight_cache *cache, uint32_t count)
{
    while (cache->count > count) {
        struct entry *entry = cache->entries[--cache->count];
        cache->bytes -= entry->matrix.bytes;
        free_entry(cache, entry);
    }
}

static int load_missing(struct weight_cache *cache, const struct weight_list *list,
                        const struct weight_load *load, struct weight_totals *totals, struct error *error)
{
    uint64_t done = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        const struct weight_source *source = &list->items[i];
        if (find(cache, source->name)) {
            totals->n_kept++;
        } else {
            int status = load_one(cache, source, error);
            if (status)
                return status;
            totals->n_loaded++;
        }
        done += source->tensor->bytes;
        if (load->progress && load->progress(load->context, done, list->source_bytes))
            return error_set(error, STATUS_CANCELLED, "the load was given up at weight %s", source->name);
    }
    return STATUS_OK;
}

int weight_cache_precache(struct weight_cache *cache, const struct weight_list *list,
                          const struct weight_load *load, struct weight_totals *totals, struct error *error)
{
    struct weight_totals counted = {.source_bytes = list->source_bytes};
    int status = check_list(cache, list, load, error);
    if (status)
        return status;
    uint32_t count = cache->count;
    uint64_t bytes = cache->bytes;
    status = load_missing(cache, list, load, &counted, error);
    if (status) {
        roll_back(cache, count);
        return status;
    }
    for (uint32_t i = 0; i < list->count; i++) // those that were kept have proved to be this file's
        find(cache, list->items[i].name)->file = cache->file;
    counted.uploaded = cache->bytes - bytes;
    counted.cached = cache->bytes;
    *totals = counted;
    return STATUS_OK;
}

static bool names(const struct weight_list *list, const char *name)
{
    for (uint32_t i = 0; list && i < list->count; i++) {
        if (strcmp(list->items[i].name, name) == 0)
            return true;
    }
    return false;
}

uint64_t weight_cache_drop(struct weight_cache *cache, const struct weight_list *keep)
{
    uint64_t before = cache->bytes;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < cache->count; i++) {
        struct entry *entry = cache->entries[i];
        if (names(keep, entry->name)) {
            cache->entries[kept++] = entry;
        } else {
            cache->bytes -= entry->matrix.bytes;
            free_entry(cache, entry);
        }
    }
    cache->count = kept;
    return before - cache->bytes;
}

uint64_t weight_cache_bytes(const struct weight_cache *cache)
{
    return cache->bytes;
}

uint32_t weight_cache_count(const struct weight_cache *cache)
{
    return cache->count;
}

const struct matrix *weight_cache_matrix(const struct weight_cache *cache, const char *name)
{
    const struct entry *entry = find(cache, name);
    return entry && entry->form != WEIGHT_VECTOR ? &entry->matrix : NULL;
}

const float *weight_cache_vector(const struct weight_cache *cache, const char *name, uint32_t length)
{
    const struct entry *entry = find(cache, name);
    bool fits = entry && entry->form == WEIGHT_VECTOR && entry->matrix.rows * entry->matrix.width == length;
    return fits ? entry->matrix.data : NULL;
}
