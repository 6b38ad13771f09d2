// Deals layers to stages. A pipeline is as fast as its slowest stage, so first the largest stage cost is made
// as small as contiguous ranges allow; among the splits that reach it the most even one is taken (least sum
// of squares), and among equals the one that gives more to earlier stages. Both are the same small dynamic
// program over (stages left, first layer), with different ways to join a stage's cost with the rest's. Pure;
// any thread.
#include "common/shard_plan.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned __int128 sum_of_squares; // of byte counts: beyond 64 bits

struct table {
    uint32_t n_layers;
    uint32_t n_stages;
    uint64_t before[MAX_LAYERS + 1]; // bytes of the layers below
    uint64_t head;                   // what the last stage has on top
    uint16_t taken[MAX_STAGES][MAX_LAYERS + 1];
};

static uint64_t stage_cost(const struct table *table, uint32_t stage, uint32_t first, uint32_t count)
{
    uint64_t bytes = table->before[first + count] - table->before[first];
    return stage + 1 == table->n_stages ? bytes + table->head : bytes;
}

// Fills `taken`: how many layers a stage takes when it starts at a layer. Splits with a stage above `most`
// are out. Returns the best total: the largest cost, or with `even` the sum of the squared costs.
static sum_of_squares deal(struct table *table, uint64_t most, bool even)
{
    static const sum_of_squares IMPOSSIBLE = ~(sum_of_squares)0;
    sum_of_squares rest[MAX_LAYERS + 1], best[MAX_LAYERS + 1];
    for (uint32_t i = 0; i <= table->n_layers; i++)
        rest[i] = i == table->n_layers ? 0 : IMPOSSIBLE;
    for (uint32_t stage = table->n_stages; stage-- > 0;) {
        for (uint32_t first = 0; first <= table->n_layers; first++) {
            best[first] = IMPOSSIBLE;
            for (uint32_t count = 1; count <= table->n_layers - first; count++) {
                uint64_t cost = stage_cost(table, stage, first, count);
                sum_of_squares after = rest[first + count];
                if (cost > most || after == IMPOSSIBLE)
                    continue;
                sum_of_squares total = even           ? (sum_of_squares)cost * cost + after
                                       : cost > after ? cost
                                                      : after;
                if (total <= best[first]) { // the larger count wins a tie
                    best[first] = total;
                    table->taken[stage][first] = (uint16_t)count;
                }
            }
        }
        memcpy(rest, best, sizeof(rest));
    }
    return rest[0];
}

static uint64_t tensor_bytes(const struct gguf *gguf, const char *name)
{
    const struct gguf_tensor *tensor = gguf_find_tensor(gguf, name);
    return tensor ? tensor->bytes : 0;
}

// The layer of "blk.12.attn_q.weight", -1 for other names.
static int64_t layer_of(struct gguf_string name)
{
    int64_t layer = 0;
    size_t at = 4;
    if (name.length < 6 || memcmp(name.bytes, "blk.", 4) != 0)
        return -1;
    for (; at < name.length && name.bytes[at] >= '0' && name.bytes[at] <= '9' && layer < MAX_LAYERS; at++)
        layer = layer * 10 + (name.bytes[at] - '0');
    return at > 4 && at < name.length && name.bytes[at] == '.' ? layer : -1;
}

static void weigh_layers(struct table *table, const struct gguf *gguf)
{
    uint64_t bytes[MAX_LAYERS] = {0};
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        int64_t layer = layer_of(tensor->name);
        if (layer >= 0 && layer < table->n_layers)
            bytes[layer] += tensor->bytes;
    }
    for (uint32_t i = 0; i < table->n_layers; i++)
        table->before[i + 1] = table->before[i] + bytes[i];
}

static void fill_plan(struct shard_plan *out, const struct table *table, const struct model_spec *spec,
                      const struct gguf *gguf)
{
    uint32_t first = 0;
    *out = (struct shard_plan){.n_stages = table->n_stages};
    for (uint32_t i = 0; i < table->n_stages; i++) {
        struct shard_stage *stage = &out->stages[i];
        stage->first_layer = first;
        stage->n_layers = table->taken[i][first];
        stage->kv_bytes_per_position = model_spec_kv_bytes(spec, stage->n_layers);
        stage->weight_bytes = stage_cost(table, i, first, stage->n_layers);
        if (spec->rope_factors)
            stage->weight_bytes += tensor_bytes(gguf, "rope_freqs.weight");
        // Of a tied model the head is counted already, rightly: a device keeps those bytes twice, packed as
        // the table that rows are looked up in and as the matrix that makes logits.
        if (i == 0)
            stage->weight_bytes +=
                tensor_bytes(gguf, "token_embd.weight") + tensor_bytes(gguf, "position_embd.weight");
        first += stage->n_layers;
    }
}

int shard_plan_make(struct shard_plan *out, const struct model_spec *spec, const struct gguf *gguf,
                    uint32_t n_stages, struct error *error)
{
    if (n_stages == 0)
        return error_set(error, STATUS_INVALID, "a model needs at least one worker");
    if (n_stages > spec->n_layers)
        return error_set(error, STATUS_INVALID,
                         "%" PRIu32 " workers for a model of %" PRIu32
                         " layers: each needs at least one layer",
                         n_stages, spec->n_layers);
    if (n_stages > MAX_STAGES)
        return error_set(error, STATUS_INVALID, "%" PRIu32 " workers; the limit is %d", n_stages, MAX_STAGES);
    struct table *table = calloc(1, sizeof(*table));
    if (!table)
        return error_set(error, STATUS_NO_MEMORY, "no memory to plan %" PRIu32 " stages", n_stages);
    table->n_layers = spec->n_layers;
    table->n_stages = n_stages;
    table->head = tensor_bytes(gguf, "output_norm.weight") + tensor_bytes(gguf, "output_norm.bias") +
                  tensor_bytes(gguf, spec->tied_head ? "token_embd.weight" : "output.weight");
    weigh_layers(table, gguf);
    deal(table, (uint64_t)deal(table, UINT64_MAX, false), true);
    fill_plan(out, table, spec, gguf);
    free(table);
    return STATUS_OK;
}
