// What gguf.c and gguf_parse.c share: one file's parsed tables, and an index of names.
#ifndef STRATA_GGUF_INTERNAL_H
#define STRATA_GGUF_INTERNAL_H

#include <time.h>

#include "common/gguf.h"

// Finds records by name: an order over them, sorted by bytes. Sorting, not hashing: a file cannot choose
// names that make it slow, and equal names end up side by side.
struct name_index {
    const void *records; // each starts with its struct gguf_string
    size_t stride, count;
    uint32_t *order;
};

// STATUS_CORRUPT with a sentence when two records have one name; `what` is "key" or "tensor".
int name_index_build(struct name_index *index, const void *records, size_t stride, size_t count,
                     const char *what, struct error *error);
const void *name_index_find(const struct name_index *index, const char *name); // NULL when absent
void name_index_free(struct name_index *index);

struct gguf_part {
    const uint8_t *bytes; // set by the caller of gguf_parse_part
    size_t length;
    bool mapped;              // ours to unmap, and then:
    int file;                 // ours to close
    struct timespec modified; // when it was opened
    uint32_t version;
    uint64_t alignment;
    uint64_t header_bytes; // from the start to the end of the tensor table
    struct gguf_value *values;
    size_t n_values;
    struct gguf_tensor *tensors;
    size_t n_tensors;
    struct name_index keys;
};

// Fills the tables from `bytes`. On failure the part holds whatever gguf_part_free must release.
int gguf_parse_part(struct gguf_part *part, struct error *error);
void gguf_part_free(struct gguf_part *part);
const struct gguf_value *gguf_part_find(const struct gguf_part *part, const char *key);

// Reads a scalar of any integer type; false when it is none or does not fit.
bool gguf_value_u32(const struct gguf_value *value, uint32_t *out);

// A name from a file made fit for a sentence.
struct gguf_label {
    char text[72];
};
struct gguf_label gguf_label(struct gguf_string name);

// Bytes of one element, 0 for strings, arrays and unknown kinds.
size_t gguf_kind_bytes(uint32_t kind);

#endif
