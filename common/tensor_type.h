// The GGML tensor types Strata reads, by the ids GGUF files carry. Constants only; any thread.
#ifndef STRATA_TENSOR_TYPE_H
#define STRATA_TENSOR_TYPE_H

#include <stddef.h>
#include <stdint.h>

enum tensor_type {
    TENSOR_F32 = 0,
    TENSOR_F16 = 1,
    TENSOR_Q4_0 = 2,
    TENSOR_Q4_1 = 3,
    TENSOR_Q5_0 = 6,
    TENSOR_Q5_1 = 7,
    TENSOR_Q8_0 = 8,
    TENSOR_Q2_K = 10,
    TENSOR_Q3_K = 11,
    TENSOR_Q4_K = 12,
    TENSOR_Q5_K = 13,
    TENSOR_Q6_K = 14,
    TENSOR_BF16 = 30,
};

struct tensor_type_info {
    const char *name;       // "Q4_K"
    uint32_t block_weights; // weights a block: 1, 32 or 256
    uint32_t block_bytes;   // bytes a block
};

// NULL when Strata does not read this type.
const struct tensor_type_info *tensor_type_info(uint32_t type);

// The name GGML gives the id, also for types Strata refuses ("IQ2_XXS"); NULL when GGML has none.
const char *tensor_type_ggml_name(uint32_t type);

// The types Strata reads, for sentences: "F32, F16, ...".
const char *tensor_type_list(void);

// Bytes of `rows` rows of `width` weights; 0 when the width is not a whole number of blocks or the type is
// unknown or the product overflows.
size_t tensor_type_bytes(uint32_t type, uint64_t width, uint64_t rows);

#endif
