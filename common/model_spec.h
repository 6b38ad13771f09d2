// What a model is, apart from its bytes: the dimensions and the choice of parts that the decoder is built
// from. Read from GGUF metadata and checked against the tensor table: after model_spec_read every tensor the
// spec implies is known to exist with the right shape. A plain value; any thread.
#ifndef STRATA_MODEL_SPEC_H
#define STRATA_MODEL_SPEC_H

#include <stdbool.h>
#include <stdint.h>

#include "common/gguf.h"
#include "common/status.h"

enum norm_kind { NORM_RMS, NORM_LAYER };
enum position_kind {
    POSITION_ROPE_ADJACENT, // rotates pairs (2i, 2i+1): the llama family as GGUF stores it
    POSITION_ROPE_HALVES,   // rotates pairs (i, i + rope_dims/2): qwen, phi3
    POSITION_LEARNED        // a table added to the embedding: gpt2
};
enum ffn_kind {
    FFN_GATED,       // down(silu(gate(x)) * up(x)), separate matrices
    FFN_GATED_FUSED, // the same, gate and up stacked in ffn_up (gate first): phi3
    FFN_PLAIN        // down(gelu_tanh(up(x))): gpt2
};

struct model_spec {
    char architecture[32]; // "llama"
    char name[128];        // general.name, cut to fit; "" when absent
    uint32_t n_layers;
    uint32_t width;      // C: the residual's
    uint32_t n_heads;    // H
    uint32_t n_kv_heads; // KV, divides H
    uint32_t head_size;  // D, the same for K and V
    uint32_t ffn_width;  // F
    uint32_t vocab_size; // V: rows of the embedding
    uint32_t context;    // positions the model was trained for
    uint32_t rope_dims;  // rotated dimensions of each head, even, <= D
    uint32_t window;     // sliding attention window in positions, 0 = none
    float norm_epsilon;
    float rope_base;
    float rope_scale; // positions are divided by this (linear scaling), 1 = none
    enum norm_kind norm;
    enum position_kind position;
    enum ffn_kind ffn;
    bool fused_qkv;    // layer.N.attn_qkv.weight: rows q (H*D), k (KV*D), v (KV*D)
    bool attn_bias;    // biases on q, k, v (or qkv)
    bool output_bias;  // a bias on attn_output
    bool ffn_bias;     // biases on ffn_up and ffn_down (and gate)
    bool qk_norm;      // per-head RMSNorm of q and k before rope
    bool rope_factors; // rope_freqs.weight divides the frequencies
    bool tied_head;    // no output.weight: the head is token_embd.weight
};

// STATUS_UNSUPPORTED names an architecture or feature Strata lacks; STATUS_CORRUPT a missing or misshapen
// piece.
int model_spec_read(struct model_spec *out, const struct gguf *gguf, struct error *error);

// Bytes of KV one position costs on `n_layers` layers, with 16-bit entries.
uint64_t model_spec_kv_bytes(const struct model_spec *spec, uint32_t n_layers);

#endif
