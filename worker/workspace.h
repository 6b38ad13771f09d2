// Every buffer a stage's steps need, on the device and beside it, sized for the largest step and planned
// before any of it is allocated. A plain record shared by the executor (which fills the inputs and reads the
// outputs) and the decoder (which computes in between). Belongs to the device's thread.
#ifndef STRATA_WORKSPACE_H
#define STRATA_WORKSPACE_H

#include <stdint.h>

#include "common/model_spec.h"
#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/kernels.h"
#include "worker/weight_file.h"

enum {
    HEAD_ROWS = 64,        // rows of logits in memory at once
    OUTPUT_ALIGNMENT = 16, // of the alternatives among a step's outputs
};

struct workspace_shape {
    const struct model_spec *spec;
    const struct weight_list *weights; // the types decide the forms of activations
    struct step_bounds bounds;
    bool first, last; // stage
};

struct workspace {
    struct device *device;
    const struct kernel_ops *ops;
    uint32_t max_positions, max_rows, table_stride, head_rows;
    uint32_t qkv_stride, ffn_stride;
    uint64_t bytes; // of the device's memory
    // [device] inputs of a step
    void *inputs;          // step_inputs_at the size of the batch; uploaded in one go
    uint32_t *page_tables; // [n_slots + 1][table_stride]
    // [device] activations
    float *residual; // [max_positions][width]
    float *qkv;      // [max_positions][qkv_stride]: q, k, v side by side
    float *ffn;      // [max_positions][ffn_stride]: gate, up side by side
    float *logits;   // [head_rows][vocab]; last stage
    struct activation normed, attended, activated;
    // [device] logprobs, scores and alternatives of a step, as step_head lays them out; last stage
    void *outputs;
    uint64_t output_bytes;
    // host: what is uploaded, downloaded, sent
    struct {
        void *inputs;
        float *residual; // more than one stage
        int32_t *draws;  // [n_slots]; more than one stage
    } host;
};

// A step's inputs lie in one block, laid out for the size of its batch.
struct step_inputs {
    struct batch_span *spans;
    int32_t *tokens;
    int32_t *sources; // where tokens come from: places in the sample ring, -1 = they are there
    uint32_t *positions, *slots;
    size_t bytes; // of all
};
struct step_inputs step_inputs_at(void *block, uint32_t n_tokens, uint32_t n_spans);

uint64_t workspace_plan_bytes(struct device *device, const struct workspace_shape *shape);
int workspace_new(struct workspace **out, struct device *device, const struct workspace_shape *shape,
                  struct error *error);
void workspace_free(struct workspace *workspace);

// The forms that the matrices of `list` reading `input` want.
unsigned workspace_forms(struct device *device, const struct weight_list *list, enum weight_input input);

#endif
