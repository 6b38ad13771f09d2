// Builds small GGUF files in memory for tests: well-formed ones through the calls, damaged ones by changing
// the bytes afterwards or by writing raw values. Running out of memory ends the test.
#ifndef STRATA_TESTS_GGUF_WRITER_H
#define STRATA_TESTS_GGUF_WRITER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/gguf.h"

struct gguf_bytes {
    unsigned char *data;
    size_t length, capacity;
};

struct gguf_writer {    // zero-initialize
    uint32_t version;   // 0 = 3
    uint32_t alignment; // 0 = 32; anything else is also written as general.alignment
    uint64_t n_values, n_tensors;
    struct gguf_bytes values, tensors, data;
};

void gguf_writer_u32(struct gguf_writer *writer, const char *key, uint32_t value);
void gguf_writer_f32(struct gguf_writer *writer, const char *key, float value);
void gguf_writer_bool(struct gguf_writer *writer, const char *key, bool value);
void gguf_writer_string(struct gguf_writer *writer, const char *key, const char *value);
void gguf_writer_strings(struct gguf_writer *writer, const char *key, const char *const *values,
                         size_t count);
// `count` elements of `bytes` bytes in all, as an array.
void gguf_writer_array(struct gguf_writer *writer, const char *key, enum gguf_kind kind, const void *elements,
                       uint64_t count, size_t bytes);
// Any kind number with any bytes behind it.
void gguf_writer_raw(struct gguf_writer *writer, const char *key, uint32_t kind, const void *bytes,
                     size_t length);
// A tensor of zero bytes at the next aligned offset. Unknown types get no bytes.
void gguf_writer_tensor(struct gguf_writer *writer, const char *name, uint32_t type, uint32_t n_dims,
                        const uint64_t *dims);
// The same at an offset of the caller's choice, without bytes of its own.
void gguf_writer_tensor_at(struct gguf_writer *writer, const char *name, uint32_t type, uint32_t n_dims,
                           const uint64_t *dims, uint64_t offset);

// The file, to be freed by the caller; the writer is empty again.
unsigned char *gguf_writer_finish(struct gguf_writer *writer, size_t *length);
// The same into a file.
void gguf_writer_save(struct gguf_writer *writer, const char *path);

#endif
