// Which tensors of a model file a stage needs, and what they are called in the cache: blk.N.X becomes
// layer.N.X, the head is output.weight even where the file ties it to the embedding. The list is made before
// anything is loaded, so that types, sizes and memory can be judged first. Plain values; any thread.
#ifndef STRATA_WEIGHT_FILE_H
#define STRATA_WEIGHT_FILE_H

#include <stdint.h>

#include "common/gguf.h"
#include "common/model_spec.h"
#include "common/status.h"

enum { WEIGHT_NAME_BYTES = 64 };

enum weight_form {
    WEIGHT_VECTOR, // a norm, a bias: kept as f32
    WEIGHT_MATRIX, // packed for matmul
    WEIGHT_TABLE   // packed for row look-up
};

enum weight_input { // which activation a matrix multiplies
    WEIGHT_READS_NONE,
    WEIGHT_READS_NORMED,   // a norm's output: q, k, v, up, gate, head
    WEIGHT_READS_ATTENDED, // attention's output
    WEIGHT_READS_ACTIVATED // the FFN's inside
};

struct weight_source {
    char name[WEIGHT_NAME_BYTES]; // "layer.3.attn_q.weight"
    const struct gguf_tensor *tensor;
    uint32_t type; // the tensor's true type
    enum weight_form form;
    enum weight_input input;
    uint32_t rows, width; // a vector has one row
};

struct weight_list { // zero-initialize; free with weight_list_free
    struct weight_source *items;
    uint32_t count, capacity;
    uint64_t source_bytes; // of the file
};

// The tensors of layers [first_layer, first_layer + n_layers); with layer 0 the embedding, with the last
// layer the final norm and the head. Refuses, by name, a tensor whose type Strata does not read.
int weight_list_make(struct weight_list *out, const struct gguf *gguf, const struct model_spec *spec,
                     uint32_t first_layer, uint32_t n_layers, struct error *error);
void weight_list_free(struct weight_list *list);

#endif
