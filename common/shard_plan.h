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

// What stages cost where it was measured, in any unit of time. One unit for all of them: a stage may be on a
// device that is faster than its neighbour's.
#define SHARD_MAX_COST ((uint64_t)1 << 50)
struct shard_costs {
    uint64_t layer[MAX_STAGES]; // one layer on this stage; 1 to SHARD_MAX_COST
    uint64_t head;              // what the last stage does on top; at most SHARD_MAX_COST
    uint64_t room[MAX_STAGES];  // bytes that the stage's weights and KV may take
    uint64_t positions;         // of KV that every layer keeps
};

// Splits so that the largest stage cost is as small as it can be, earlier stages taking the surplus. Without
// `costs` (NULL) the cost of a layer is its bytes, the head counts by half of its own on the last stage, and
// whether a stage fits is not looked at. The embedding costs nothing per step. STATUS_INVALID when there are
// more stages than layers (or none), STATUS_NO_MEMORY when no split has room.
int shard_plan_make(struct shard_plan *out, const struct model_spec *spec, const struct gguf *gguf,
                    uint32_t n_stages, const struct shard_costs *costs, struct error *error);

// What the most expensive stage of a plan costs, at `costs` of as many stages.
uint64_t shard_plan_slowest(const struct shard_plan *plan, const struct shard_costs *costs);

#endif
