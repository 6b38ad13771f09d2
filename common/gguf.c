// A model's file or files as one: opens and maps each part, lets gguf_parse.c read it, checks that the parts
// belong together, joins their tensor tables and answers look-ups. The mapping is private and read-only, and
// only the header's pages are touched, so a worker's memory holds no more of the file than the slice it
// reads. A file that another process shortens meanwhile faults a reader of the mapping: that is its price,
// and why models are replaced by renaming, never rewritten in place. The files stay open, for those who would
// rather read than map.
#include "common/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "common/gguf_internal.h"
#include "common/limits.h"

enum { SPLIT_SUFFIX = 20 }; // "-00001-of-00002.gguf"

struct gguf {
    char *path;
    struct gguf_part *parts;
    uint32_t n_parts;
    struct gguf_tensor *tensors; // of all parts
    size_t n_tensors;
    struct name_index names;
    uint64_t fingerprint;
};

// --- names ---

static int compare_strings(const struct gguf_string *a, const struct gguf_string *b)
{
    size_t shorter = a->length < b->length ? a->length : b->length;
    int order = memcmp(a->bytes, b->bytes, shorter);
    return order ? order : (a->length > b->length) - (a->length < b->length);
}

static const struct gguf_string *name_at(const struct name_index *index, size_t i)
{
    return (const void *)((const char *)index->records + index->order[i] * index->stride);
}

static int compare_records(const void *left, const void *right, void *context)
{
    const struct name_index *index = context;
    const char *records = index->records;
    return compare_strings((const void *)(records + *(const uint32_t *)left * index->stride),
                           (const void *)(records + *(const uint32_t *)right * index->stride));
}

int name_index_build(struct name_index *index, const void *records, size_t stride, size_t count,
                     const char *what, struct error *error)
{
    *index = (struct name_index){.records = records, .stride = stride, .count = count};
    index->order = malloc((count + 1) * sizeof(*index->order));
    if (!index->order)
        return error_set(error, STATUS_NO_MEMORY, "no memory for an index of %zu names", count);
    for (size_t i = 0; i < count; i++)
        index->order[i] = (uint32_t)i;
    qsort_r(index->order, count, sizeof(*index->order), compare_records, index);
    for (size_t i = 1; i < count; i++)
        if (compare_strings(name_at(index, i - 1), name_at(index, i)) == 0)
            return error_set(error, STATUS_CORRUPT, "%s '%s' appears twice", what,
                             gguf_label(*name_at(index, i)).text);
    return STATUS_OK;
}

const void *name_index_find(const struct name_index *index, const char *name)
{
    struct gguf_string wanted = {name, strlen(name)};
    size_t low = 0, high = index->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_strings(&wanted, name_at(index, middle));
        if (order == 0)
            return name_at(index, middle);
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

void name_index_free(struct name_index *index)
{
    free(index->order);
    *index = (struct name_index){0};
}

// --- parts ---

static int map_file(struct gguf_part *part, const char *path, struct error *error)
{
    struct stat info;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a fifo must not hang us
    if (file < 0)
        return error_set(error, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO, "cannot open it: %s",
                         strerror(errno));
    int status = STATUS_OK;
    part->file = -1;
    if (fstat(file, &info) < 0)
        status = error_set(error, STATUS_IO, "cannot examine it: %s", strerror(errno));
    else if (!S_ISREG(info.st_mode))
        status = error_set(error, STATUS_INVALID, "it is not a regular file");
    else if (info.st_size > 0) {
        void *bytes = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
        if (bytes == MAP_FAILED) {
            status = error_set(error, STATUS_IO, "cannot map it: %s", strerror(errno));
        } else {
            part->bytes = bytes;
            part->length = (size_t)info.st_size;
            part->mapped = true;
            part->file = file;
            part->modified = info.st_mtim;
        }
    }
    if (!part->mapped)
        close(file);
    return status;
}

static int split_number(const struct gguf_part *part, const char *key, uint32_t *out, struct error *error)
{
    const struct gguf_value *value = gguf_part_find(part, key);
    if (value && !gguf_value_u32(value, out))
        return error_set(error, STATUS_CORRUPT, "metadata key '%s' is not a count", key);
    return STATUS_OK;
}

// The name says part `number` of `count`; the metadata must agree.
static int check_split(const struct gguf_part *part, uint32_t number, uint32_t count, struct error *error)
{
    uint32_t own_number = 0, own_count = 1;
    int status = split_number(part, "split.no", &own_number, error);
    if (!status)
        status = split_number(part, "split.count", &own_count, error);
    if (status)
        return status;
    if (own_count <= 1 && count == 1)
        return STATUS_OK;
    if (count == 1)
        return error_set(error, STATUS_INVALID,
                         "this is one of %" PRIu32 " parts of a split model, but its name does not end in "
                         "-%05" PRIu32 "-of-%05" PRIu32 ".gguf, so that the others cannot be found",
                         own_count, own_number + 1, own_count);
    if (own_count != count || own_number != number)
        return error_set(error, STATUS_CORRUPT,
                         "its name says part %" PRIu32 " of %" PRIu32 ", its metadata part %" PRIu32
                         " of %" PRIu32,
                         number + 1, count, own_number + 1, own_count);
    return STATUS_OK;
}

static int open_part(struct gguf_part *part, const char *path, uint32_t number, uint32_t count,
                     struct error *error)
{
    int status = map_file(part, path, error);
    if (!status)
        status = gguf_parse_part(part, error);
    if (!status)
        status = check_split(part, number, count, error);
    if (status)
        error_wrap(error, "%s", path);
    return status;
}

// "...-00002-of-00005.gguf" gives 5, any other name 1.
static uint32_t split_count_of_name(const char *path)
{
    size_t length = strlen(path);
    unsigned number, count;
    int end = 0;
    if (length < SPLIT_SUFFIX)
        return 1;
    const char *suffix = path + length - SPLIT_SUFFIX;
    for (size_t i = 1; i < SPLIT_SUFFIX - 5; i++)
        if (i != 6 && i != 7 && i != 8 && i != 9 && (suffix[i] < '0' || suffix[i] > '9'))
            return 1;
    if (sscanf(suffix, "-%5u-of-%5u.gguf%n", &number, &count, &end) != 2 || end != SPLIT_SUFFIX)
        return 1;
    return number >= 1 && number <= count ? count : 1;
}

static int open_parts(struct gguf *gguf, const char *path, struct error *error)
{
    size_t stem = strlen(path) - (gguf->n_parts > 1 ? SPLIT_SUFFIX : 0);
    char *name = malloc(strlen(path) + 1);
    if (!name)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the name of a file");
    strcpy(name, path);
    int status = STATUS_OK;
    for (uint32_t i = 0; i < gguf->n_parts && !status; i++) {
        if (gguf->n_parts > 1)
            snprintf(name + stem, SPLIT_SUFFIX + 1, "-%05" PRIu32 "-of-%05" PRIu32 ".gguf", (i + 1) % 100000,
                     gguf->n_parts % 100000);
        status = open_part(&gguf->parts[i], name, i, gguf->n_parts, error);
    }
    free(name);
    return status;
}

// --- the whole ---

static int join_tensors(struct gguf *gguf, struct error *error)
{
    size_t total = 0, at = 0;
    uint32_t promised;
    for (uint32_t i = 0; i < gguf->n_parts; i++)
        total += gguf->parts[i].n_tensors;
    if (total > MAX_TENSORS)
        return error_set(error, STATUS_CORRUPT, "the parts hold %zu tensors, the limit is %d", total,
                         MAX_TENSORS);
    promised = (uint32_t)total;
    int status = split_number(&gguf->parts[0], "split.tensors.count", &promised, error);
    if (status)
        return status;
    if (promised != total)
        return error_set(error, STATUS_CORRUPT,
                         "the parts hold %zu tensors, split.tensors.count promises %" PRIu32, total,
                         promised);
    gguf->tensors = malloc((total + 1) * sizeof(*gguf->tensors));
    if (!gguf->tensors)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a table of %zu tensors", total);
    for (uint32_t i = 0; i < gguf->n_parts; i++) {
        for (size_t j = 0; j < gguf->parts[i].n_tensors; j++) {
            gguf->tensors[at] = gguf->parts[i].tensors[j];
            gguf->tensors[at++].part = i;
        }
    }
    gguf->n_tensors = total;
    return name_index_build(&gguf->names, gguf->tensors, sizeof(*gguf->tensors), total, "tensor", error);
}

static int take_fingerprint(struct gguf *gguf, struct error *error)
{
    XXH3_state_t *state = XXH3_createState();
    if (!state)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a hash");
    XXH3_64bits_reset(state);
    for (uint32_t i = 0; i < gguf->n_parts; i++) {
        uint64_t length = gguf->parts[i].length;
        XXH3_64bits_update(state, &length, sizeof(length));
        XXH3_64bits_update(state, gguf->parts[i].bytes, gguf->parts[i].header_bytes);
    }
    gguf->fingerprint = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    return STATUS_OK;
}

static struct gguf *new_with_parts(const char *path, uint32_t n_parts)
{
    struct gguf *gguf = calloc(1, sizeof(*gguf));
    if (!gguf)
        return NULL;
    gguf->path = strdup(path);
    gguf->parts = calloc(n_parts, sizeof(*gguf->parts));
    gguf->n_parts = n_parts;
    if (gguf->path && gguf->parts)
        return gguf;
    free(gguf->path);
    free(gguf->parts);
    free(gguf);
    return NULL;
}

static int finish(struct gguf **out, struct gguf *gguf, int status, struct error *error)
{
    if (!status && (status = join_tensors(gguf, error)))
        error_wrap(error, "%s", gguf->path);
    if (!status)
        status = take_fingerprint(gguf, error);
    if (status)
        gguf_close(gguf);
    else
        *out = gguf;
    return status;
}

int gguf_open(struct gguf **out, const char *path, struct error *error)
{
    uint32_t n_parts = split_count_of_name(path);
    if (n_parts > MAX_SPLITS)
        return error_set(error, STATUS_INVALID, "%s: a model of %" PRIu32 " parts; the limit is %d", path,
                         n_parts, MAX_SPLITS);
    struct gguf *gguf = new_with_parts(path, n_parts);
    if (!gguf)
        return error_set(error, STATUS_NO_MEMORY, "%s: no memory to open it", path);
    return finish(out, gguf, open_parts(gguf, path, error), error);
}

int gguf_open_memory(struct gguf **out, const void *bytes, size_t length, struct error *error)
{
    struct gguf *gguf = new_with_parts("(memory)", 1);
    if (!gguf)
        return error_set(error, STATUS_NO_MEMORY, "no memory to open a model");
    gguf->parts[0].bytes = bytes;
    gguf->parts[0].length = length;
    int status = gguf_parse_part(&gguf->parts[0], error);
    if (!status)
        status = check_split(&gguf->parts[0], 0, 1, error);
    return finish(out, gguf, status, error);
}

void gguf_close(struct gguf *gguf)
{
    if (!gguf)
        return;
    for (uint32_t i = 0; i < gguf->n_parts; i++) {
        gguf_part_free(&gguf->parts[i]);
        if (gguf->parts[i].mapped) {
            munmap((void *)gguf->parts[i].bytes, gguf->parts[i].length);
            close(gguf->parts[i].file);
        }
    }
    name_index_free(&gguf->names);
    free(gguf->tensors);
    free(gguf->parts);
    free(gguf->path);
    free(gguf);
}

// --- look-ups ---

const char *gguf_path(const struct gguf *gguf)
{
    return gguf->path;
}

uint32_t gguf_version(const struct gguf *gguf)
{
    return gguf->parts[0].version;
}

uint32_t gguf_part_count(const struct gguf *gguf)
{
    return gguf->n_parts;
}

uint64_t gguf_file_bytes(const struct gguf *gguf)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < gguf->n_parts; i++)
        total += gguf->parts[i].length;
    return total;
}

uint64_t gguf_alignment(const struct gguf *gguf)
{
    return gguf->parts[0].alignment;
}

size_t gguf_value_count(const struct gguf *gguf)
{
    return gguf->parts[0].n_values;
}

const struct gguf_value *gguf_value_at(const struct gguf *gguf, size_t index)
{
    return index < gguf->parts[0].n_values ? &gguf->parts[0].values[index] : NULL;
}

const struct gguf_value *gguf_find(const struct gguf *gguf, const char *key)
{
    return gguf_part_find(&gguf->parts[0], key);
}

size_t gguf_tensor_count(const struct gguf *gguf)
{
    return gguf->n_tensors;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t index)
{
    return index < gguf->n_tensors ? &gguf->tensors[index] : NULL;
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf *gguf, const char *name)
{
    return name_index_find(&gguf->names, name);
}

const void *gguf_tensor_data(const struct gguf *gguf, const struct gguf_tensor *tensor)
{
    return gguf->parts[tensor->part].bytes + tensor->offset;
}

int gguf_tensor_read(const struct gguf *gguf, const struct gguf_tensor *tensor, uint64_t offset, void *to,
                     size_t bytes, struct error *error)
{
    const struct gguf_part *part = &gguf->parts[tensor->part];
    uint64_t at = tensor->offset + offset;
    if (!part->mapped) {
        memcpy(to, part->bytes + at, bytes);
        return STATUS_OK;
    }
    for (size_t done = 0; done < bytes;) {
        ssize_t got = pread(part->file, (char *)to + done, bytes - done, (off_t)(at + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return error_set(error, STATUS_IO, "cannot read %s: %s", gguf->path, strerror(errno));
        if (got == 0)
            return error_set(error, STATUS_CORRUPT,
                             "%s was cut short: it ends at byte %" PRIu64 ", inside of its weights",
                             gguf->path, at + done);
        done += (size_t)got;
    }
    return STATUS_OK;
}

int gguf_check_unchanged(const struct gguf *gguf, struct error *error)
{
    for (uint32_t i = 0; i < gguf->n_parts; i++) {
        const struct gguf_part *part = &gguf->parts[i];
        struct stat info;
        if (!part->mapped)
            continue;
        if (fstat(part->file, &info) < 0)
            return error_set(error, STATUS_IO, "cannot examine %s: %s", gguf->path, strerror(errno));
        if ((uint64_t)info.st_size != part->length || info.st_mtim.tv_sec != part->modified.tv_sec ||
            info.st_mtim.tv_nsec != part->modified.tv_nsec)
            return error_set(
                error, STATUS_CORRUPT,
                "%s was changed since it was opened: replace a model by renaming, and start anew",
                gguf->path);
    }
    return STATUS_OK;
}

void gguf_tensor_release(const struct gguf *gguf, const struct gguf_tensor *tensor)
{
    const struct gguf_part *part = &gguf->parts[tensor->part];
    if (!part->mapped)
        return;
    // Whole pages: a neighbour's first or last page may go too, and comes back from the file when it is read.
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t first = tensor->offset / page * page;
    uint64_t end = tensor->offset + tensor->bytes;
    madvise((void *)(part->bytes + first), end - first, MADV_DONTNEED);
}

uint64_t gguf_fingerprint(const struct gguf *gguf)
{
    return gguf->fingerprint;
}
