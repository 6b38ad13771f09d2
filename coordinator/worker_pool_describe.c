// The pool in words and numbers, for GetPool and for the sentence of an UNAVAILABLE. Run by the pool's
// thread.
#include "coordinator/worker_pool_internal.h"

#include <stdio.h>

bool worker_pool_is_ready(const struct worker_pool *pool)
{
    return pool->state == WIRE_POOL_READY;
}

const char *worker_pool_failure(const struct worker_pool *pool)
{
    return pool->state == WIRE_POOL_FAILED ? pool->problem : NULL;
}

static const char *member_state_name(const struct member *member)
{
    if (!member)
        return "";
    switch (member->state) {
    case MEMBER_LOADING:
        return "loading";
    case MEMBER_LOADED:
        return "linking";
    case MEMBER_READY:
        return "ready";
    default:
        return "joined";
    }
}

static void describe_stage(struct worker_pool *pool, uint32_t s, const struct member *member)
{
    const struct shard_stage *share = &pool->plan.stages[s];
    struct wire_stage *stage = &pool->described[s];
    *stage = (struct wire_stage){.index = s,
                                 .first_layer = share->first_layer,
                                 .layers = share->n_layers,
                                 .load_bytes = share->weight_bytes,
                                 .worker = member ? member->name : "",
                                 .device = member ? member->device : "",
                                 .state = member_state_name(member)};
    if (!member || member->stage < 0)
        return;
    bool loaded = member->state == MEMBER_LOADED || member->state == MEMBER_READY;
    stage->weight_bytes = loaded ? member->weight_bytes : 0;
    stage->kv_bytes = loaded ? member->kv_bytes : 0;
    stage->loaded_bytes = member->done_bytes;
    stage->load_bytes = member->total_bytes;
    stage->busy = member->busy;
    stage->waiting = member->wait_share;
    stage->layer_ns = pool_layer_ns(pool, s);
    stage->head_ns = s + 1 == pool->plan.n_stages ? pool_head_ns(pool) : 0;
}

static const char *describe_problem(struct worker_pool *pool)
{
    uint32_t joined = pool_count_joined(pool), wanted = pool->plan.n_stages;
    const char *cause = pool->problem, *gap = cause[0] ? "; " : "";
    char *text = pool->problem_text;
    size_t capacity = sizeof(pool->problem_text);
    switch (pool->state) {
    case WIRE_POOL_READY:
        return "";
    case WIRE_POOL_LOADING:
        snprintf(text, capacity, "%s%sthe workers are loading the model", cause, gap);
        return text;
    case WIRE_POOL_LINKING:
        snprintf(text, capacity, "%s%sthe workers are connecting to each other", cause, gap);
        return text;
    default:
        if (joined < wanted)
            snprintf(text, capacity, "%s%s%u of %u workers have joined", cause, gap, joined, wanted);
        else
            snprintf(text, capacity, "%s", cause[0] ? cause : "the pool is being assembled");
        return text;
    }
}

void worker_pool_describe(struct worker_pool *pool, struct wire_pool *out)
{
    bool assembled = pool_is_assembled(pool);
    const struct member *next = pool->members; // before an assembly: whoever is here, in order
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        while (!assembled && next && (next->state == MEMBER_NEW || next->leaving))
            next = next->next;
        describe_stage(pool, s, assembled ? pool->stages[s] : next);
        if (next)
            next = next->next;
    }
    out->state = pool->state;
    out->epoch = pool->epoch;
    out->problem = describe_problem(pool);
    out->stages = pool->described;
    out->n_stages = pool->plan.n_stages;
    out->workers_wanted = pool->plan.n_stages;
    out->pages = pool->n_pages;
    out->page_positions = KV_PAGE_POSITIONS;
}
