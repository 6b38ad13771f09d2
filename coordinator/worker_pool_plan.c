// Who gets which layers, and how many KV pages fit: arithmetic on what the workers said when they joined. Run
// by the pool's thread; changes nothing.
#include "coordinator/worker_pool_internal.h"

#include <stdio.h>
#include <string.h>

static bool is_candidate(const struct member *member)
{
    return member->state != MEMBER_NEW && !member->leaving;
}

// The n candidates that failed least; among equals the first to join. False: fewer than n are there.
static bool pick(const struct worker_pool *pool, uint32_t n, struct member *picked[])
{
    uint32_t count = 0;
    for (struct member *member = pool->members; member; member = member->next) {
        if (!is_candidate(member))
            continue;
        uint32_t at = count < n ? count : n;
        while (at > 0 && picked[at - 1]->failures > member->failures)
            at--;
        if (at == n)
            continue; // n are there that failed no more often
        uint32_t last = count < n ? count : n - 1;
        memmove(picked + at + 1, picked + at, (last - at) * sizeof(*picked));
        picked[at] = member;
        if (count < n)
            count++;
    }
    return count == n;
}

static uint32_t overlap(const struct member *member, const struct shard_stage *stage)
{
    uint32_t first = member->held_first > stage->first_layer ? member->held_first : stage->first_layer;
    uint32_t held_end = member->held_first + member->held_layers;
    uint32_t stage_end = stage->first_layer + stage->n_layers;
    uint32_t end = held_end < stage_end ? held_end : stage_end;
    return end > first ? end - first : 0;
}

bool pool_deal(const struct worker_pool *pool, struct member *stages[])
{
    const struct shard_plan *plan = &pool->plan;
    uint32_t n = plan->n_stages;
    struct member *picked[MAX_STAGES];
    if (!pick(pool, n, picked))
        return false;
    memset(stages, 0, n * sizeof(*stages));
    // The greatest overlap first; what holds nothing fills the gaps in order.
    for (;;) {
        uint32_t best = 0, best_stage = 0, best_member = 0;
        for (uint32_t s = 0; s < n; s++) {
            for (uint32_t m = 0; !stages[s] && m < n; m++) {
                uint32_t common = picked[m] ? overlap(picked[m], &plan->stages[s]) : 0;
                if (common > best) {
                    best = common;
                    best_stage = s;
                    best_member = m;
                }
            }
        }
        if (best == 0)
            break;
        stages[best_stage] = picked[best_member];
        picked[best_member] = NULL;
    }
    for (uint32_t s = 0, m = 0; s < n; s++) {
        if (stages[s])
            continue;
        while (!picked[m])
            m++;
        stages[s] = picked[m++];
    }
    return true;
}

void pool_remember(struct worker_pool *pool, const struct member *member)
{
    if (!member->name || member->held_layers == 0)
        return;
    struct memory_of_member *past = &pool->past[pool->next_past++ % MAX_STAGES];
    snprintf(past->name, sizeof(past->name), "%s", member->name);
    past->pid = member->pid;
    past->held_first = member->held_first;
    past->held_layers = member->held_layers;
}

void pool_recall(const struct worker_pool *pool, struct member *member)
{
    for (uint32_t back = 1; back <= MAX_STAGES && back <= pool->next_past; back++) {
        const struct memory_of_member *past = &pool->past[(pool->next_past - back) % MAX_STAGES];
        if (past->pid == member->pid && strcmp(past->name, member->name) == 0) {
            member->held_first = past->held_first;
            member->held_layers = past->held_layers;
            return;
        }
    }
}

uint32_t pool_common_level(struct member *const stages[], uint32_t n_stages, const struct member *member)
{
    uint32_t level = member->level;
    for (uint32_t s = 0; s < n_stages; s++) {
        if (strcmp(stages[s]->backend, member->backend) == 0 && stages[s]->level < level)
            level = stages[s]->level;
    }
    return level;
}

// One GPU has no edge with itself, unless two test workers share it and said so. A GPU without a name could
// be any.
enum wire_link pool_choose_link(const struct member *from, const struct member *to)
{
    bool able = from->nccl != 0 && from->nccl == to->nccl && from->device_id[0] && to->device_id[0];
    bool apart = able && strcmp(from->device_id, to->device_id) != 0;
    return able && (apart || (from->oversubscribe && to->oversubscribe)) ? WIRE_LINK_NCCL : WIRE_LINK_SOCKET;
}

bool pool_shares_memory(const struct member *a, const struct member *b)
{
    return a == b || (strcmp(a->backend, "cpu") == 0 && strcmp(b->backend, "cpu") == 0 &&
                      a->host[0] != '\0' && strcmp(a->host, b->host) == 0);
}

static double megabytes(uint64_t bytes)
{
    return (double)bytes / 1e6;
}

int pool_count_pages(const struct worker_pool_options *options, const struct shard_plan *plan,
                     struct member *const stages[], uint32_t *n_pages, struct error *error)
{
    uint64_t per_sequence = (options->context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    uint64_t pages = per_sequence * options->n_slots;
    if (options->n_pages) {
        *n_pages = options->n_pages;
        return STATUS_OK;
    }
    for (uint32_t s = 0; s < plan->n_stages; s++) {
        uint64_t weights = 0, page = 0, memory = UINT64_MAX;
        for (uint32_t other = 0; other < plan->n_stages; other++) {
            if (!pool_shares_memory(stages[s], stages[other]))
                continue;
            weights += plan->stages[other].weight_bytes;
            page += plan->stages[other].kv_bytes_per_position * KV_PAGE_POSITIONS;
            if (stages[other]->memory < memory)
                memory = stages[other]->memory;
        }
        uint64_t budget = (uint64_t)((double)memory * options->memory_fraction);
        uint64_t room = budget > weights && page > 0 ? (budget - weights) / page : 0;
        if (room < per_sequence)
            return error_set(error, STATUS_NO_MEMORY,
                             "the model does not fit: worker %s (%s) has %.1f MB of memory free, of which "
                             "%.1f may be used; its weights take %.1f MB and one sequence of %u positions "
                             "%.1f MB. Use more workers, a smaller --context or a larger --memory-fraction",
                             stages[s]->name, stages[s]->device, megabytes(memory), megabytes(budget),
                             megabytes(weights), options->context, megabytes(per_sequence * page));
        if (room < pages)
            pages = room;
    }
    *n_pages = (uint32_t)(pages < UINT32_MAX ? pages : UINT32_MAX);
    return STATUS_OK;
}
