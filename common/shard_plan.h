// Deals a model's layers to stages: contiguous ranges, balanced by cost. Pure; any thread.
#ifndef STRATA_SHARD_PLAN_H
#define STRATA_SHARD_PLAN_H

#include <stdint.h>

#include "common/gguf.h"
#include "common/limits.h"
#include "common/model_spec.h"
#include "common/status.h"

struct shard_stage {
    uint32_t first_layer;
    uint32_t n_layers;     // at least 1
    uint64_t weight_bytes; // as in the file, with the embedding (first stage) and the head (last stage)
    uint64_t kv_bytes_per_position;
};

struct shard_plan {
    uint32_t n_stages;
    struct shard_stage stages[MAX_STAGES];
};

// Splits so that the largest stage cost is as small as it can be, earlier stages taking the surplus; the cost
// of a layer is its bytes; the head counts on the last stage, the embedding costs nothing per step.
// STATUS_INVALID when there are more stages than layers (or none).
int shard_plan_make(struct shard_plan *out, const struct model_spec *spec, const struct gguf *gguf,
                    uint32_t n_stages, struct error *error);

#endif
