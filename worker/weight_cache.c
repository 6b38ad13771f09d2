// The weight cache. Entries are few (a dozen a layer) and looked up only when a decoder is built, so they are
// a plain array searched by name. Bytes of the file are touched once, while they are packed and hashed, and
// released at once, so that a worker keeps in memory only what it serves.
//
// An entry's hash is a sum over the rows of its source, each row's XXH3 times an odd number of its own: so
// several threads may hash a weight in any order, each the rows it has just read, and a backend may cut a
// matrix where it likes. A backend with readers of its own (matrix_load) is still reading when the next
// weight is asked for: hashes are there, and failures known, when the load is over.
//
// Runs on the device's thread, which owns the cache, but for read_rows; the cache owns the device memory.
#include "worker/weight_cache.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "common/tensor_type.h"

enum { BITE_BYTES = 128 << 10 }; // read and hashed at once

struct entry {
    char name[WEIGHT_NAME_BYTES];
    enum weight_form form;
    struct matrix matrix; // a vector: type, one row, width, f32 data
    uint64_t taken;       // of the device's memory
    uint64_t hash;        // of the source bytes, type and shape
    uint64_t file;        // of the cache's files, the one it was loaded from
    // While it is loaded:
    const struct gguf *gguf;
    const struct weight_source *source;
    uint64_t sum; // of the rows hashed so far
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

// --- hashes ---

static uint64_t sum_rows(const void *bytes, size_t row_bytes, uint32_t first, uint32_t count)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += XXH3_64bits((const char *)bytes + i * row_bytes, row_bytes) * (2 * (uint64_t)(first + i) + 1);
    return sum;
}

static uint64_t hash_of(const struct weight_source *source, uint64_t sum)
{
    uint64_t whole[5] = {source->type, source->form, source->rows, source->width, sum};
    return XXH3_64bits(whole, sizeof(whole));
}

static size_t row_bytes_of(const struct weight_source *source)
{
    return source->tensor->bytes / source->rows;
}

static uint64_t hash_source(const struct weight_source *source, const void *bytes)
{
    return hash_of(source, sum_rows(bytes, row_bytes_of(source), 0, source->rows));
}

// --- sizes ---

static uint64_t packed_bytes(const struct weight_cache *cache, const struct weight_source *source)
{
    if (source->form == WEIGHT_VECTOR)
        return (uint64_t)source->rows * source->width * sizeof(float);
    return cache->ops->matrix_bytes(cache->device, source->type, source->rows, source->width,
                                    source->form == WEIGHT_TABLE);
}

static uint64_t taken_bytes(const struct weight_cache *cache, const struct weight_source *source)
{
    return cache->ops->alloc_bytes(cache->device, packed_bytes(cache, source));
}

uint64_t weight_cache_missing_bytes(const struct weight_cache *cache, const struct weight_list *list)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        if (!find(cache, list->items[i].name))
            bytes += taken_bytes(cache, &list->items[i]);
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
    int changed = gguf_check_unchanged(cache->gguf, error);
    if (changed)
        return changed;
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

static int load_vector(struct weight_cache *cache, struct entry *entry, struct error *error)
{
    const struct gguf_tensor *tensor = entry->source->tensor;
    uint32_t count = entry->matrix.rows * entry->matrix.width;
    float *values = malloc(count * sizeof(*values));
    void *bytes = malloc(tensor->bytes);
    int status = values && bytes
                     ? gguf_tensor_read(cache->gguf, tensor, 0, bytes, tensor->bytes, error)
                     : error_set(error, STATUS_NO_MEMORY, "no memory to convert %u values", count);
    if (!status) {
        entry->sum = sum_rows(bytes, row_bytes_of(entry->source), 0, entry->source->rows);
        widen(values, bytes, entry->matrix.type, count);
        cache->ops->upload(cache->device, entry->matrix.data, values, count * sizeof(*values));
    }
    free(values);
    free(bytes);
    return status;
}

// Called by the device's own threads: some rows at a time, and hashed while the core's cache has them.
static int read_rows(void *context, void *to, uint32_t first, uint32_t count, struct error *error)
{
    struct entry *entry = context;
    size_t row_bytes = row_bytes_of(entry->source);
    uint32_t most = row_bytes < BITE_BYTES ? (uint32_t)(BITE_BYTES / row_bytes) : 1;
    uint64_t sum = 0;
    for (uint32_t row = 0; row < count; row += most) {
        uint32_t some = count - row < most ? count - row : most;
        char *bytes = (char *)to + row * row_bytes;
        int status = gguf_tensor_read(entry->gguf, entry->source->tensor, (first + row) * (uint64_t)row_bytes,
                                      bytes, some * row_bytes, error);
        if (status) {
            error_wrap(error, "weight %s", entry->name);
            return status;
        }
        sum += sum_rows(bytes, row_bytes, first + row, some);
    }
    __atomic_fetch_add(&entry->sum, sum, __ATOMIC_RELAXED); // the sync puts it in order
    return STATUS_OK;
}

static int load_matrix(struct weight_cache *cache, struct entry *entry, struct error *error)
{
    const struct weight_source *source = entry->source;
    if (cache->ops->matrix_load) {
        struct matrix_source rows = {.read = read_rows, .context = entry};
        return cache->ops->matrix_load(cache->device, &entry->matrix, &rows, error);
    }
    const void *bytes = gguf_tensor_data(cache->gguf, source->tensor);
    entry->sum = sum_rows(bytes, row_bytes_of(source), 0, source->rows);
    int status = cache->ops->matrix_pack(cache->device, &entry->matrix, bytes, error);
    if (!status)
        status = cache->ops->sync(cache->device, error);
    gguf_tensor_release(cache->gguf, source->tensor);
    return status;
}

static int fill(struct weight_cache *cache, struct entry *entry, struct error *error)
{
    entry->matrix.data = cache->ops->alloc(cache->device, entry->matrix.bytes);
    if (!entry->matrix.data)
        return error_set(error, STATUS_NO_MEMORY, "the device has no %zu bytes left", entry->matrix.bytes);
    return entry->form == WEIGHT_VECTOR ? load_vector(cache, entry, error) : load_matrix(cache, entry, error);
}

static void free_entry(struct weight_cache *cache, struct entry *entry)
{
    if (entry->matrix.data)
        cache->ops->free(cache->device, entry->matrix.data);
    free(entry);
}

// An entry of the source's form, without its bytes.
static struct entry *add_entry(struct weight_cache *cache, const struct weight_source *source)
{
    if (cache->count == cache->capacity) {
        uint32_t capacity = cache->capacity ? 2 * cache->capacity : 128;
        struct entry **entries = realloc(cache->entries, capacity * sizeof(*entries));
        if (!entries)
            return NULL;
        cache->entries = entries;
        cache->capacity = capacity;
    }
    struct entry *entry = calloc(1, sizeof(*entry));
    if (!entry)
        return NULL;
    memcpy(entry->name, source->name, sizeof(entry->name));
    entry->form = source->form;
    entry->file = cache->file;
    entry->gguf = cache->gguf;
    entry->source = source;
    entry->taken = taken_bytes(cache, source);
    entry->matrix = (struct matrix){.type = source->type,
                                    .rows = source->rows,
                                    .width = source->width,
                                    .table = source->form == WEIGHT_TABLE,
                                    .bytes = packed_bytes(cache, source)};
    cache->entries[cache->count++] = entry;
    cache->bytes += entry->taken;
    return entry;
}

static int load_one(struct weight_cache *cache, const struct weight_source *source, struct error *error)
{
    struct entry *entry = add_entry(cache, source);
    if (!entry)
        return error_set(error, STATUS_NO_MEMORY, "weight %s: no memory for its entry", source->name);
    int status = fill(cache, entry, error);
    bool behind = cache->ops->matrix_load && entry->matrix.data; // what failed may be a weight before it
    if (status)
        error_wrap(error, behind ? "loading as far as weight %s" : "weight %s", source->name);
    return status;
}

// Forgets the entries from `count` on: those of a load that failed. Nobody reads for them after the sync.
static void roll_back(struct weight_cache *cache, uint32_t count)
{
    struct error ignored = {0};
    cache->ops->sync(cache->device, &ignored);
    while (cache->count > count) {
        struct entry *entry = cache->entries[--cache->count];
        cache->bytes -= entry->taken;
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
    int status = cache->ops->sync(cache->device, error);
    return status ? status : gguf_check_unchanged(cache->gguf, error);
}

static void finish_entries(struct weight_cache *cache, uint32_t first)
{
    for (uint32_t i = first; i < cache->count; i++) {
        struct entry *entry = cache->entries[i];
        entry->hash = hash_of(entry->source, __atomic_load_n(&entry->sum, __ATOMIC_RELAXED));
        entry->gguf = NULL;
        entry->source = NULL;
    }
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
    finish_entries(cache, count);
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
            cache->bytes -= entry->taken;
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
