// The op table: every computation a worker needs, once per backend. kernels/cpu has three sets: portable
// (scalar, sums in f64: the readable reference), AVX2 and AVX-512 VNNI; kernels/cuda the GPU's.
//
// Conventions
// - Ops are queued on the device in order and return nothing; `sync` waits, `reached` asks, and both report
// the
//   first fault since the last report. The CPU backend computes before it returns. All calls come from the
//   executor's thread.
// - Pointers marked [device] came from `alloc`, the others are host memory that may be reused when the call
//   returns; only `fetch` writes later, into memory from `alloc_host`.
// - Matrices are row-major; T is the number of token positions of the batch. After warm-up no op takes device
//   memory but one that records a program.
// - Batch invariance: what an op writes for one row depends on nothing but that row's inputs: not on T, not
// on which
//   rows stand beside it, not on thread count. Sums have one order, fixed by width and absolute position
//   alone.
#ifndef STRATA_KERNELS_H
#define STRATA_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/limits.h"
#include "common/model_spec.h"
#include "common/sampling.h"
#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/device.h"

enum { DEVICE_STAMPS = 64 }; // see `stamp`

// --- operands ---

// A quantized matrix in the device's own layout. out[n] = sum over k of w[n][k] * x[k].
struct matrix {
    uint32_t type;  // enum tensor_type: the true type of the source
    uint32_t rows;  // N, outputs
    uint32_t width; // K, inputs
    bool table;     // packed for row look-up (embedding), not for matmul
    void *data;     // [device], matrix_bytes() long
    size_t bytes;
};

// The rows of a matrix as they stand in its file, for a backend that reads them by itself: `read` writes rows
// [first, first + count) to `to`, is called on several threads at once and once for each row. It outlives the
// sync after the call that was given it.
struct matrix_source {
    int (*read)(void *context, void *to, uint32_t first, uint32_t count, struct error *error);
    void *context;
};

// What decides how much memory of its own a backend wants for one matrix and the attention of a stage.
struct scratch_shape {
    uint32_t type, rows, width; // of the matrix
    bool reads_prompts;         // it is multiplied with rows of prompts, not with generated ones alone
    uint32_t n_heads, head_size;
    uint32_t generated; // most generated tokens of a step
    uint32_t pages;     // of one page table
};

// Rows of inputs to matmul, in the forms its weights want (floats, int8 blocks, halves): made by norm,
// attention and ffn_activate, read by matmul only.
struct activation {
    void *data;           // [device], activation_bytes() long
    uint32_t width;       // K
    uint32_t rows;        // capacity
    unsigned forms;       // union of matrix_forms() over the matrices that will read it
    uint32_t n_generated; // rows [0, n_generated) are of generated tokens, the others of prompts
    float unit;           // the device's: what is stored is x / unit; set by the op that fills it
};

// The positions of one step, flattened. All arrays [device].
struct batch_span {        // consecutive positions of one sequence
    uint32_t first, count; // tokens [first, first + count)
    uint32_t slot;
    uint32_t position; // of the first
};
struct batch {
    uint32_t n_tokens; // T
    uint32_t n_spans;
    uint32_t
        n_generated; // spans [0, n_generated) are one generated token each, so tokens [0, n_generated) too
    const int32_t *tokens;          // [T]
    const uint32_t *positions;      // [T]
    const uint32_t *slots;          // [T]
    const struct batch_span *spans; // [n_spans]
    const uint32_t *page_tables;    // [n_slots][table_stride]: page ids
    uint32_t table_stride;
};

// The KV pages of one layer: page p begins at data + p * page_bytes. The layout inside a page is the
// device's.
struct kv_layer {
    void *data; // [device]
    size_t page_bytes;
};

struct matmul_part {
    const struct matrix *weight;
    const float *bias; // [N] [device], NULL = none
    float *out;        // [T][out_stride] [device]
    uint32_t out_stride;
    bool accumulate; // out += instead of out =
};

// The norm that makes an activation: out[i] = norm(x[i]) * weight (+ bias).
struct row_norm {
    const float *x; // [rows][width] [device]
    enum norm_kind kind;
    const float *weight, *bias; // [width] [device]; bias NULL: none
    float epsilon;
};

struct attention_shape {
    uint32_t n_heads, n_kv_heads, head_size;
    uint32_t window; // 0 = none: position p sees (p - window, p]
    float scale;     // 1 / sqrt(head_size)
};

struct qkv_args { // of attn_prepare: q, k, v are rows of [T][stride]
    float *q, *k, *v;
    uint32_t q_stride, k_stride, v_stride;
    const float *q_norm, *k_norm; // [head_size], NULL = none
    float norm_epsilon;
    enum position_kind position;
    uint32_t rope_dims;
    const float
        *rope_frequency; // [rope_dims / 2] [device]: radians per position, factors and scaling included
};

// --- sampling ---

struct sampler; // the sampling state of every slot: parameters, counts of tokens seen

struct sampler_open { // host memory; copied
    struct sampling_params params;
    uint32_t choice;
    const int32_t *history;
    uint32_t n_history, n_prompt;
    const struct logit_bias *biases;
    uint32_t n_biases;
    const int32_t *banned; // until params.min_tokens outputs
    uint32_t n_banned;
};

struct sample_row {
    uint32_t logits_row;
    uint32_t slot;
    uint32_t position;  // of the token being drawn: counts the random stream
    uint32_t draws;     // 1: the slot's own choice, and the token joins the slot's history. More: choices
                        // 0..draws-1, and the history is left alone
    bool logprob;       // wanted
    uint32_t top;       // alternatives wanted
    uint32_t out_first; // samples go to out_tokens[out_first + draw]
    uint32_t top_first; // the first of `top` alternatives in out_tops; the same for all draws. Where fewer
                        // tokens have any probability, the rest is {-1, -INFINITY}
};

struct score_row { // a prompt logprob
    uint32_t logits_row;
    int32_t target; // -1: only the alternatives
    uint32_t out;   // into out_logprobs
    uint32_t top, top_first;
};

// --- the table ---

struct kernel_ops {
    const char *name;    // "portable", "avx2", "avx512", "cuda"
    bool keeps_programs; // `record` keeps something, so that batches are worth bringing to few sizes

    // Memory. alloc returns NULL when the device has no more; zeroed, aligned to 64. alloc_bytes is what it
    // takes of the device's memory for so many bytes.
    void *(*alloc)(struct device *, size_t bytes);
    size_t (*alloc_bytes)(const struct device *, size_t bytes);
    void (*free)(struct device *, void *);
    void (*upload)(struct device *, void *to /* [device] */, const void *from, size_t bytes);
    void (*download)(struct device *, void *to, const void *from /* [device] */, size_t bytes);
    void (*copy)(struct device *, void *to, const void *from, size_t bytes); // device to device
    int (*sync)(struct device *, struct error *error);

    // Steps that run ahead of the host. alloc_host: host memory that the device can write to by itself,
    // zeroed. fetch: a download that is complete once `mark`, taken after it, has been reached. reached: 1
    // yes, 0 not yet, negative: a status, with its sentence. Marks are reached in order.
    void *(*alloc_host)(struct device *, size_t bytes);
    void (*free_host)(struct device *, void *);
    void (*fetch)(struct device *, void *to /* alloc_host */, const void *from /* [device] */, size_t bytes);
    uint64_t (*mark)(struct device *);
    int (*reached)(struct device *, uint64_t mark, struct error *error);

    // Times. stamp: notes when the device is through with what was queued so far. stamp_us: that time, on the
    // clock of clock_now_us, once a mark that was taken after the stamp has been reached; good to some
    // microseconds. The last DEVICE_STAMPS are remembered. Neither waits for the device.
    uint64_t (*stamp)(struct device *);
    int64_t (*stamp_us)(struct device *, uint64_t stamp);

    // Programs: the ops between `record` and `record_end` are kept under `key` (and queued); `replay` queues
    // them again at little cost, with the same addresses and sizes. replay is false when nothing is kept
    // under that key, or the backend keeps nothing. In between: no alloc, upload, download, sync, stamp,
    // sample or score. `forget` drops every program.
    bool (*replay)(struct device *, uint32_t key);
    void (*record)(struct device *, uint32_t key);
    void (*record_end)(struct device *);
    void (*forget)(struct device *);

    // Weights. matrix_bytes is the exact size of the packed form. matrix_pack reads rows x width weights in
    // GGUF's layout from host memory `source` and fills matrix->data, allocated by the caller; `matrix` has
    // type, rows, width, table set.
    size_t (*matrix_bytes)(const struct device *, uint32_t type, uint32_t rows, uint32_t width, bool table);
    int (*matrix_pack)(struct device *, const struct matrix *matrix, const void *source, struct error *error);
    unsigned (*matrix_forms)(const struct device *, uint32_t type);
    // As matrix_pack, but the rows are read by the backend's own threads, while the caller goes on to the
    // next matrix. The matrix is there after the next sync, which also reports what `read` failed with. NULL:
    // the backend has no such threads.
    int (*matrix_load)(struct device *, const struct matrix *matrix, const struct matrix_source *source,
                       struct error *error);

    // Memory of the backend's own. scratch_bytes: what the ops need at most for this shape. A stage reserves
    // the most that its shapes need before its first step, so that no step makes it grow; 0 gives it back.
    size_t (*scratch_bytes)(const struct device *, const struct scratch_shape *shape);
    int (*reserve)(struct device *, size_t bytes, struct error *error);

    size_t (*activation_bytes)(const struct device *, uint32_t width, uint32_t rows, unsigned forms);
    size_t (*kv_page_bytes)(const struct device *, uint32_t n_kv_heads,
                            uint32_t head_size); // K and V, one layer

    // tokens[i] = ring[sources[i]] where sources[i] >= 0, i < count. All [device].
    void (*feed)(struct device *, int32_t *tokens, const int32_t *sources, const int32_t *ring,
                 uint32_t count);
    // x[t] = table[tokens[t]] (+ positions[positions[t]] where that table is not NULL). x [T][width]
    void (*embed)(struct device *, float *x, const struct matrix *table, const struct matrix *positions,
                  const struct batch *batch);
    // out[t] = x[t], t < rows. x [rows][width] [device]
    void (*store)(struct device *, struct activation *out, const float *x, uint32_t rows);
    // out[i] = norm(x[index ? index[i] : i]) * weight (+ bias), i < rows. x [.][width]; weight, bias [width];
    // index [device]
    void (*norm)(struct device *, struct activation *out, const float *x, const uint32_t *index,
                 uint32_t rows, enum norm_kind kind, const float *weight, const float *bias, float epsilon);
    // Up to 4 products of one input: parts[i].out[t] (+)= weight_i x[t] + bias_i, t < rows.
    void (*matmul)(struct device *, const struct activation *x, uint32_t rows,
                   const struct matmul_part *parts, uint32_t n_parts);
    // norm, then matmul of what it made, then (gated not NULL, two parts) gated = silu(parts[0]) * parts[1],
    // as one: a backend may leave x and, where gated is given, the parts' `out` unwritten.
    void (*project)(struct device *, struct activation *x, uint32_t rows, const struct row_norm *norm,
                    const struct matmul_part *parts, uint32_t n_parts, struct activation *gated);
    // Normalizes heads of q and k where asked, rotates both, rounds k and v into the pages of their
    // positions. q in place.
    void (*attn_prepare)(struct device *, const struct qkv_args *qkv, const struct attention_shape *shape,
                         const struct kv_layer *kv, const struct batch *batch);
    // project, then attn_prepare of what came out, as one: parts are q, k and v, or one of all their rows. A
    // backend may leave x and what it has rounded into the pages unwritten.
    void (*project_qkv)(struct device *, struct activation *x, const struct row_norm *norm,
                        const struct matmul_part *parts, uint32_t n_parts, const struct qkv_args *qkv,
                        const struct attention_shape *shape, const struct kv_layer *kv,
                        const struct batch *batch);
    // out[t] = softmax(q[t] K) V over the positions <= positions[t] of its sequence; out.width = n_heads *
    // head_size
    void (*attention)(struct device *, struct activation *out, const float *q, uint32_t q_stride,
                      const struct attention_shape *shape, const struct kv_layer *kv,
                      const struct batch *batch);
    // gated: out = silu(gate) * up; plain: out = gelu_tanh(up), gate NULL. gate, up rows of [T][stride]
    void (*ffn_activate)(struct device *, struct activation *out, const float *gate, const float *up,
                         uint32_t stride, uint32_t rows);

    // Sampling. logits [.][vocab] [device], not changed. NaN counts as -INFINITY. A slot is in one row of a
    // call.
    size_t (*sampler_bytes)(const struct device *, uint32_t n_slots,
                            uint32_t vocab); // device memory it takes
    int (*sampler_new)(struct sampler **out, struct device *, uint32_t n_slots, uint32_t vocab,
                       struct error *error);
    void (*sampler_free)(struct device *, struct sampler *);
    int (*sampler_open)(struct device *, struct sampler *, uint32_t slot, const struct sampler_open *open);
    void (*sampler_close)(struct device *, struct sampler *, uint32_t slot);
    void (*sample)(struct device *, struct sampler *, const float *logits, const struct sample_row *rows,
                   uint32_t n_rows, int32_t *out_tokens /* [device] */,
                   float *out_logprobs /* [device], beside out_tokens */,
                   struct token_logprob *out_tops /* [device] */);
    void (*score)(struct device *, const float *logits, uint32_t vocab, const struct score_row *rows,
                  uint32_t n_rows, float *out_logprobs /* [device] */,
                  struct token_logprob *out_tops /* [device] */);
};

const struct kernel_ops *device_ops(const struct device *device);

#endif
