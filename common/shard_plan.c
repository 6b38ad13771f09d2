// Deals layers to stages. A pipeline is as fast as its slowest stage, so first the largest stage cost is made
// as small as contiguous ranges allow; among the splits that reach it the most even one is taken (least sum
// of squares), and among equals the one that gives more to earlier stages. Both are the same small dynamic
// program over (stages left, first layer), with different ways to join a stage's cost with the rest's. Pure;
// any thread.
//
// What a stage costs is the size of its layers, times the stage's price, and on the last stage the head.
// Before anything was measured the size of a layer is its bytes and every price is 1; then the head counts by
// half of its bytes: the rows of prompts, most of what a busy pipeline computes, do not go through it, and
// those that do cost less by the byte than in a layer, which has attention besides. Of an 8B model it was
// seen to take, with sampling, as long as about two layers on an H200, by its bytes 3.5. Once the workers
// have measured, the size of every layer is 1 and the price is the time that one takes on the stage's device.
#include "common/shard_plan.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned __int128 sum_of_squares; // of byte counts: beyond 64 bits

struct table {
    uint32_t n_layers;
    uint32_t n_stages;
    uint64_t bytes_before[MAX_LAYERS + 1]; // of the layers below, in the file
    uint64_t size_before[MAX_LAYERS + 1];  // of the layers below, in what stages pay for
    uint64_t price[MAX_STAGES];
    uint64_t head_cost;                           // what the last stage pays on top
    uint64_t first_bytes, each_bytes, head_bytes; // on top of the layers: of the first, of every, of the last
    uint64_t kv_bytes;                            // of one layer
    const uint64_t *room;                         // [n_stages]; NULL: no limits
    uint16_t taken[MAX_STAGES][MAX_LAYERS + 1];
};

static uint64_t stage_cost(const struct table *table, uint32_t stage, uint32_t first, uint32_t count)
{
    uint64_t size = table->size_before[first + count] - table->size_before[first];
    return size * table->price[stage] + (stage + 1 == table->n_stages ? table->head_cost : 0);
}

// Of a tied model the head is counted beside the embedding, rightly: a device keeps those bytes twice, packed
// as the table that rows are looked up in and as the matrix that makes logits.
static uint64_t stage_bytes(const struct table *table, uint32_t stage, uint32_t first, uint32_t count)
{
    return table->bytes_before[first + count] - table->bytes_before[first] + table->each_bytes +
           (stage == 0 ? table->first_bytes : 0) + (stage + 1 == table->n_stages ? table->head_bytes : 0);
}

static bool has_room(const struct table *table, uint32_t stage, uint32_t first, uint32_t count)
{
    return !table->room ||
           stage_bytes(table, stage, first, count) + count * table->kv_bytes <= table->room[stage];
}

static const sum_of_squares IMPOSSIBLE = ~(sum_of_squares)0;

// Fills `taken`: how many layers a stage takes when it starts at a layer. Splits with a stage above `most`,
// or without room, are out. Returns the best total: the largest cost, or with `even` the sum of the squared
// costs.
static sum_of_squares deal(struct table *table, uint64_t most, bool even)
{
    sum_of_squares rest[MAX_LAYERS + 1], best[MAX_LAYERS + 1];
    for (uint32_t i = 0; i <= table->n_layers; i++)
        rest[i] = i == table->n_layers ? 0 : IMPOSSIBLE;
    for (uint32_t stage = table->n_stages; stage-- > 0;) {
        for (uint32_t first = 0; first <= table->n_layers; first++) {
            best[first] = IMPOSSIBLE;
            for (uint32_t count = 1; count <= table->n_layers - first; count++) {
                uint64_t cost = stage_cost(table, stage, first, count);
                sum_of_squares after = rest[first + count];
                if (cost > most || after == IMPOSSIBLE || !has_room(table, stage, first, count))
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

static void weigh(struct table *table, const struct model_spec *spec, const struct gguf *gguf)
{
    uint64_t bytes[MAX_LAYERS] = {0};
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        int64_t layer = layer_of(tensor->name);
        if (layer >= 0 && layer < table->n_layers)
            bytes[layer] += tensor->bytes;
    }
    for (uint32_t i = 0; i < table->n_layers; i++)
        table->bytes_before[i + 1] = table->bytes_before[i] + bytes[i];
    table->first_bytes = tensor_bytes(gguf, "token_embd.weight") + tensor_bytes(gguf, "position_embd.weight");
    table->each_bytes = spec->rope_factors ? tensor_bytes(gguf, "rope_freqs.weight") : 0;
    table->head_bytes = tensor_bytes(gguf, "output_norm.weight") + tensor_bytes(gguf, "output_norm.bias") +
                        tensor_bytes(gguf, spec->tied_head ? "token_embd.weight" : "output.weight");
}

static void price_by_bytes(struct table *table)
{
    memcpy(table->size_before, table->bytes_before, sizeof(table->size_before));
    for (uint32_t i = 0; i < table->n_stages; i++)
        table->price[i] = 1;
    table->head_cost = table->head_bytes / 2;
}

static int price_by_time(struct table *table, const struct model_spec *spec, const struct shard_costs *costs,
                         struct error *error)
{
    bool sane = costs->head <= SHARD_MAX_COST;
    for (uint32_t i = 0; i < table->n_stages; i++)
        sane = sane && costs->layer[i] > 0 && costs->layer[i] <= SHARD_MAX_COST;
    if (!sane)
        return error_set(error, STATUS_INVALID, "no time was measured, or one without measure");
    for (uint32_t i = 0; i <= table->n_layers; i++)
        table->size_before[i] = i;
    memcpy(table->price, costs->layer, sizeof(table->price));
    table->head_cost = costs->head;
    table->kv_bytes = model_spec_kv_bytes(spec, 1) * costs->positions;
    table->room = costs->room;
    return STATUS_OK;
}

static void fill_plan(struct shard_plan *out, const struct table *table, const struct model_spec *spec)
{
    uint32_t first = 0;
    *out = (struct shard_plan){.n_stages = table->n_stages};
    for (uint32_t i = 0; i < table->n_stages; i++) {
        struct shard_stage *stage = &out->stages[i];
        stage->first_layer = first;
        stage->n_layers = table->taken[i][first];
        stage->kv_bytes_per_position = model_spec_kv_bytes(spec, stage->n_layers);
        stage->weight_bytes = stage_bytes(table, i, first, stage->n_layers);
        first += stage->n_layers;
    }
}

static int check_stages(const struct model_spec *spec, uint32_t n_stages, struct error *error)
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
    return STATUS_OK;
}

int shard_plan_make(struct shard_plan *out, const struct model_spec *spec, const struct gguf *gguf,
                    uint32_t n_stages, const struct shard_costs *costs, struct error *error)
{
    int status = check_stages(spec, n_stages, error);
    if (status)
        return status;
    struct table *table = calloc(1, sizeof(*table));
    if (!table)
        return error_set(error, STATUS_NO_MEMORY, "no memory to plan %" PRIu32 " stages", n_stages);
    table->n_layers = spec->n_layers;
    table->n_stages = n_stages;
    weigh(table, spec, gguf);
    if (costs)
        status = price_by_time(table, spec, costs, error);
    else
        price_by_bytes(table);
    sum_of_squares most = status ? 0 : deal(table, UINT64_MAX, false);
    if (!status && most == IMPOSSIBLE)
        status = error_set(error, STATUS_NO_MEMORY, "no split of the layers has room on every stage");
    if (!status) {
        deal(table, (uint64_t)most, true);
        fill_plan(out, table, spec);
    }
    free(table);
    return status;
}

uint64_t shard_plan_slowest(const struct shard_plan *plan, const struct shard_costs *costs)
{
    uint64_t slowest = 0;
    for (uint32_t i = 0; i < plan->n_stages; i++) {
        uint64_t cost = plan->stages[i].n_layers * costs->layer[i];
        cost += i + 1 == plan->n_stages ? costs->head : 0;
        slowest = cost > slowest ? cost : slowest;
    }
    return slowest;
}
