// Writes whole models of zero weights for tests that look at metadata and tensor tables: any family, any
// small shape, with one thing wrong when a test asks for it.
#ifndef STRATA_TESTS_MODEL_WRITER_H
#define STRATA_TESTS_MODEL_WRITER_H

#include "tests/gguf_writer.h"

struct model_shape {
    const char *architecture;
    uint32_t layers, width, heads, kv_heads, head_size, ffn, vocabulary, context;
    bool tied, fused_qkv, attn_bias, output_bias, ffn_bias, rope_factors;
    uint32_t matrix_type;
    // What goes wrong; NULL for nothing.
    const char *drop;     // a key or tensor that is left out
    const char *misshape; // a tensor whose last dimension is one more
    const char *retype;   // a tensor written as F16
};

// Small and valid: llama, 3 layers of width 64, 4 heads over 2 of 16, ffn 96, vocabulary 40, context 128,
// F32. The gpt2 and phi3 shapes have their fused parts and biases set.
struct model_shape model_shape_small(const char *architecture);
void model_writer_add(struct gguf_writer *writer, const struct model_shape *shape);

#endif
