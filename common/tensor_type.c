// The table of tensor types, and GGML's names for the ids Strata refuses.
#include "common/tensor_type.h"

static const struct tensor_type_info TYPES[] = {
    [TENSOR_F32] = {"F32", 1, 4},       [TENSOR_F16] = {"F16", 1, 2},
    [TENSOR_Q4_0] = {"Q4_0", 32, 18},   [TENSOR_Q4_1] = {"Q4_1", 32, 20},
    [TENSOR_Q5_0] = {"Q5_0", 32, 22},   [TENSOR_Q5_1] = {"Q5_1", 32, 24},
    [TENSOR_Q8_0] = {"Q8_0", 32, 34},   [TENSOR_Q2_K] = {"Q2_K", 256, 84},
    [TENSOR_Q3_K] = {"Q3_K", 256, 110}, [TENSOR_Q4_K] = {"Q4_K", 256, 144},
    [TENSOR_Q5_K] = {"Q5_K", 256, 176}, [TENSOR_Q6_K] = {"Q6_K", 256, 210},
    [TENSOR_BF16] = {"BF16", 1, 2},
};

static const char *const GGML_NAMES[] = {
    "F32",      "F16",      "Q4_0",    "Q4_1",  "Q4_2",       "Q4_3",       "Q5_0",       "Q5_1",
    "Q8_0",     "Q8_1",     "Q2_K",    "Q3_K",  "Q4_K",       "Q5_K",       "Q6_K",       "Q8_K",
    "IQ2_XXS",  "IQ2_XS",   "IQ3_XXS", "IQ1_S", "IQ4_NL",     "IQ3_S",      "IQ2_S",      "IQ4_XS",
    "I8",       "I16",      "I32",     "I64",   "F64",        "IQ1_M",      "BF16",       "Q4_0_4_4",
    "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",   "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4",
    "NVFP4",    "Q1_0",     "Q2_0",
};

const struct tensor_type_info *tensor_type_info(uint32_t type)
{
    if (type >= sizeof(TYPES) / sizeof(TYPES[0]) || !TYPES[type].name)
        return NULL;
    return &TYPES[type];
}

const char *tensor_type_ggml_name(uint32_t type)
{
    return type < sizeof(GGML_NAMES) / sizeof(GGML_NAMES[0]) ? GGML_NAMES[type] : NULL;
}

const char *tensor_type_list(void)
{
    return "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";
}

size_t tensor_type_bytes(uint32_t type, uint64_t width, uint64_t rows)
{
    const struct tensor_type_info *info = tensor_type_info(type);
    size_t bytes;
    if (!info || width % info->block_weights)
        return 0;
    if (__builtin_mul_overflow(width / info->block_weights, info->block_bytes, &bytes) ||
        __builtin_mul_overflow(bytes, rows, &bytes))
        return 0;
    return bytes;
}
