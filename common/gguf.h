// GGUF model files, versions 2 and 3, single or split: header, metadata, tensor table, memory-mapped bytes.
// Everything read here comes from outside: each offset, count and size is checked before use, and what is
// malformed, truncated, overlapping or absurd is refused with a sentence that names the key or tensor.
// A `struct gguf` is immutable once open and may be read by any thread; strings and arrays point into the
// mapping.
#ifndef STRATA_GGUF_H
#define STRATA_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

enum gguf_kind {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64
};

struct gguf_string {
    const char *bytes; // not NUL-terminated; may hold any byte
    size_t length;
};

// One metadata value. A scalar is its own one-element array: `count` is 1 and `kind` the element's.
struct gguf_value {
    struct gguf_string key;
    enum gguf_kind kind; // of the elements; never GGUF_ARRAY (nested arrays are kept as bytes: `nested`)
    bool is_array;
    bool nested; // an array of arrays: listed, but not readable
    uint64_t count;
    const uint8_t *data; // unaligned little-endian elements; for strings, length-prefixed records
    size_t bytes;
};

struct gguf_tensor {
    struct gguf_string name;
    uint32_t type;    // enum tensor_type
    uint32_t n_dims;  // 1..4
    uint64_t dims[4]; // dims[0] is the row width (fastest); unused ones are 1
    uint64_t bytes;
    uint32_t part;   // which split file holds it
    uint64_t offset; // of its first byte in that file
};

struct gguf;

// Opens `path`; when its name ends in -0000I-of-0000N.gguf, all N parts beside it. Maps, never reads tensor
// bytes.
int gguf_open(struct gguf **out, const char *path, struct error *error);
// The same from memory that outlives the result (tests, fuzzing): one part.
int gguf_open_memory(struct gguf **out, const void *bytes, size_t length, struct error *error);
void gguf_close(struct gguf *gguf);

const char *gguf_path(const struct gguf *gguf);
uint32_t gguf_version(const struct gguf *gguf);
uint32_t gguf_part_count(const struct gguf *gguf);
uint64_t gguf_file_bytes(const struct gguf *gguf); // all parts
uint64_t gguf_alignment(const struct gguf *gguf);

size_t gguf_value_count(const struct gguf *gguf);
const struct gguf_value *gguf_value_at(const struct gguf *gguf, size_t index);
const struct gguf_value *gguf_find(const struct gguf *gguf, const char *key); // NULL when absent

size_t gguf_tensor_count(const struct gguf *gguf);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *gguf, size_t index);
const struct gguf_tensor *gguf_find_tensor(const struct gguf *gguf, const char *name); // NULL when absent
// First byte of the tensor in the mapping (aligned as the file says; do not assume more than 1).
const void *gguf_tensor_data(const struct gguf *gguf, const struct gguf_tensor *tensor);
// Reads `bytes` bytes of the tensor, from `offset` on, without touching the mapping: a file that was cut
// short is STATUS_CORRUPT where the mapping would be a fault. Any thread, many at once.
int gguf_tensor_read(const struct gguf *gguf, const struct gguf_tensor *tensor, uint64_t offset, void *to,
                     size_t bytes, struct error *error);
// STATUS_CORRUPT when one of the files was changed since it was opened.
int gguf_check_unchanged(const struct gguf *gguf, struct error *error);
// Tells the system that these bytes were read and may leave memory again.
void gguf_tensor_release(const struct gguf *gguf, const struct gguf_tensor *tensor);

// Typed reads of scalars. Integers of any width convert when the value fits. Absent: STATUS_NOT_FOUND, *out
// untouched (and no error text); present with another type: STATUS_CORRUPT with a sentence.
int gguf_get_u32(const struct gguf *gguf, const char *key, uint32_t *out, struct error *error);
int gguf_get_f32(const struct gguf *gguf, const char *key, float *out, struct error *error);
int gguf_get_bool(const struct gguf *gguf, const char *key, bool *out, struct error *error);
int gguf_get_string(const struct gguf *gguf, const char *key, struct gguf_string *out, struct error *error);
// Element `index` of an array of integers or floats (bounds-checked).
int64_t gguf_array_int(const struct gguf_value *value, uint64_t index);
double gguf_array_float(const struct gguf_value *value, uint64_t index);
// Walks an array of strings: `cursor` starts at 0. Returns false after the last one.
bool gguf_array_next_string(const struct gguf_value *value, size_t *cursor, struct gguf_string *out);

// A hash (xxh3) of header, metadata, tensor table and file sizes: equal means the same model for a pool's
// purposes.
uint64_t gguf_fingerprint(const struct gguf *gguf);

#endif
