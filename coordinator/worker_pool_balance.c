// Deals by measured time. A worker says in Loaded what its device takes for a layer, the last one also what
// it takes for the head; a pipeline is as fast as its slowest stage, and bytes only guess at that. Run by the
// pool's thread.
//
// Whose times count. Workers on one CPU host disturb one another while they load and measure, so of those
// that have the same kind of device the least time holds for all; everybody else's is their own. What a kind
// of device took is remembered for the worker that comes in another's place, and so is the head, as what it
// took beside a layer of the same worker: both were measured in the same moments.
//
// A deal is better when its slowest stage takes 5% less, and 100 us, and it leaves room for as many KV pages
// as the deal by bytes does. It is on trial until every stage has loaded. An epoch that ends before that, for
// whatever reason, takes the pool back to the deal that it had; when this happened three times, nothing is
// tried any more.
#include "coordinator/worker_pool_internal.h"

#include <stdio.h>
#include <string.h>

#include "common/log.h"

enum {
    LEAST_GAIN_NS = 100000,
    LEAST_GAIN_PART = 20, // one of so many
    MAX_FAILED_TRIALS = 3,
};

// GPUs of one model are of one kind, whatever their numbers are: "cuda 1: NVIDIA H100, 80 GB".
static void name_kind(char kind[MAX_DEVICE_KIND], const struct member *member, uint32_t level)
{
    const char *colon = strcmp(member->backend, "cuda") == 0 ? strstr(member->device, ": ") : NULL;
    snprintf(kind, MAX_DEVICE_KIND, "%s %u %s", member->backend, level, colon ? colon + 2 : member->device);
}

static bool same_kind(const struct member *a, const struct member *b)
{
    char kinds[2][MAX_DEVICE_KIND];
    name_kind(kinds[0], a, a->run_level);
    name_kind(kinds[1], b, b->run_level);
    return strcmp(kinds[0], kinds[1]) == 0;
}

// The place of this kind, MAX_DEVICE_KINDS when it was never measured.
static uint32_t find_kind(const struct worker_pool *pool, const char *kind)
{
    uint32_t i = 0;
    while (i < MAX_DEVICE_KINDS && (pool->speeds[i].layer_ns == 0 || strcmp(pool->speeds[i].kind, kind) != 0))
        i++;
    return i;
}

// --- what was measured ---

void pool_take_speed(struct member *member, const struct wire_worker_message *loaded)
{
    if (loaded->layer_ns == 0 || loaded->layer_ns > SHARD_MAX_COST || loaded->head_ns > SHARD_MAX_COST)
        return; // what was measured earlier still holds
    member->layer_ns = loaded->layer_ns;
    member->head_ns = loaded->head_ns;
    member->measured_level = member->run_level;
}

static bool is_measured(const struct member *member)
{
    return member->layer_ns > 0 && member->measured_level == member->run_level;
}

static uint64_t scaled(uint64_t ns, uint64_t from, uint64_t to)
{
    double product = (double)ns * ((double)to / (double)from);
    return product < 1 ? 1 : product > (double)SHARD_MAX_COST ? SHARD_MAX_COST : (uint64_t)product;
}

// The least of the same kind that `alike` holds for.
static uint64_t least_of(const struct worker_pool *pool, const struct member *member,
                         bool (*alike)(const struct member *, const struct member *))
{
    uint64_t least = member->layer_ns;
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        const struct member *other = pool->stages[s];
        if (is_measured(other) && other->layer_ns < least && same_kind(member, other) && alike(member, other))
            least = other->layer_ns;
    }
    return least;
}

static bool anywhere(const struct member *a, const struct member *b)
{
    return true;
}

static void remember_kind(struct worker_pool *pool, const struct member *member, uint64_t layer_ns)
{
    char kind[MAX_DEVICE_KIND];
    name_kind(kind, member, member->run_level);
    uint32_t at = find_kind(pool, kind);
    bool is_new = at == MAX_DEVICE_KINDS;
    struct device_speed *speed = &pool->speeds[is_new ? pool->next_speed++ % MAX_DEVICE_KINDS : at];
    if (is_new) {
        *speed = (struct device_speed){.layer_ns = layer_ns};
        memcpy(speed->kind, kind, sizeof(kind));
    }
    if (member->head_ns)
        speed->head_ns = scaled(member->head_ns, member->layer_ns, layer_ns);
    else
        speed->head_ns = speed->head_ns ? scaled(speed->head_ns, speed->layer_ns, layer_ns) : 0;
    speed->layer_ns = layer_ns;
}

void pool_note_speeds(struct worker_pool *pool)
{
    uint64_t least[MAX_STAGES];
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        struct member *member = pool->stages[s];
        if (is_measured(member))
            remember_kind(pool, member, least_of(pool, member, anywhere));
        least[s] = least_of(pool, member, pool_shares_memory);
    }
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        struct member *member = pool->stages[s];
        if (is_measured(member) && member->head_ns)
            member->head_ns = scaled(member->head_ns, member->layer_ns, least[s]);
        if (is_measured(member))
            member->layer_ns = least[s];
    }
}

// --- what stages cost ---

static uint64_t layer_cost(const struct worker_pool *pool, struct member *const stages[], uint32_t s)
{
    const struct member *member = stages[s];
    uint32_t level = pool_common_level(stages, pool->plan.n_stages, member);
    if (member->layer_ns > 0 && member->measured_level == level)
        return member->layer_ns;
    char kind[MAX_DEVICE_KIND];
    name_kind(kind, member, level);
    uint32_t at = find_kind(pool, kind);
    return at < MAX_DEVICE_KINDS ? pool->speeds[at].layer_ns : 0;
}

// As many layers' time as a head took on this kind of device, or on any.
static uint64_t head_cost(const struct worker_pool *pool, struct member *const stages[], uint64_t layer_ns)
{
    uint32_t n = pool->plan.n_stages;
    char kind[MAX_DEVICE_KIND];
    name_kind(kind, stages[n - 1], pool_common_level(stages, n, stages[n - 1]));
    uint32_t at = find_kind(pool, kind);
    const struct device_speed *speed = at < MAX_DEVICE_KINDS ? &pool->speeds[at] : NULL;
    for (uint32_t i = 0; i < MAX_DEVICE_KINDS && (!speed || !speed->head_ns); i++)
        speed = &pool->speeds[i];
    return speed->head_ns ? scaled(speed->head_ns, speed->layer_ns, layer_ns) : 0;
}

static bool find_costs(const struct worker_pool *pool, struct member *const stages[],
                       struct shard_costs *costs)
{
    uint32_t n = pool->plan.n_stages;
    *costs = (struct shard_costs){0};
    for (uint32_t s = 0; s < n; s++) {
        costs->layer[s] = layer_cost(pool, stages, s);
        costs->room[s] = (uint64_t)((double)stages[s]->memory * pool->options.memory_fraction);
        if (costs->layer[s] == 0)
            return false;
    }
    costs->head = head_cost(pool, stages, costs->layer[n - 1]);
    return costs->head > 0;
}

bool pool_knows_costs(const struct worker_pool *pool, struct member *const stages[])
{
    struct shard_costs costs;
    return !pool->options.by_bytes && pool->plan.n_stages > 1 && find_costs(pool, stages, &costs);
}

uint64_t pool_layer_ns(const struct worker_pool *pool, uint32_t s)
{
    return pool->options.by_bytes ? 0 : layer_cost(pool, pool->stages, s);
}

uint64_t pool_head_ns(const struct worker_pool *pool)
{
    uint64_t layer_ns = pool_layer_ns(pool, pool->plan.n_stages - 1);
    return layer_ns ? head_cost(pool, pool->stages, layer_ns) : 0;
}

// --- a better deal ---

// Pages that a plan has room for on these workers; 0: not even for one sequence.
static uint32_t pages_of(const struct worker_pool *pool, const struct shard_plan *plan,
                         struct member *const stages[])
{
    struct error ignored;
    uint32_t pages;
    if (pool_count_pages(&pool->options, plan, stages, &pages, &ignored))
        return 0;
    return pool->fitting_pages && pool->fitting_pages < pages ? pool->fitting_pages : pages;
}

static uint32_t least_pages(const struct worker_pool *pool, struct member *const stages[])
{
    uint32_t by_bytes = pages_of(pool, &pool->bytes_plan, stages);
    uint32_t one_sequence = (pool->options.context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    return by_bytes ? by_bytes : one_sequence;
}

bool pool_has_room(const struct worker_pool *pool, struct member *const stages[])
{
    return pages_of(pool, &pool->plan, stages) >= least_pages(pool, stages);
}

bool pool_find_better(const struct worker_pool *pool, struct member *const stages[], struct better_deal *out)
{
    struct shard_costs costs;
    struct error ignored;
    if (pool->redealt || pool->failed_trials >= MAX_FAILED_TRIALS || !pool_knows_costs(pool, stages))
        return false;
    find_costs(pool, stages, &costs);
    out->least_pages = least_pages(pool, stages);
    costs.positions = (uint64_t)out->least_pages * KV_PAGE_POSITIONS;
    if (shard_plan_make(&out->plan, pool->options.spec, pool->options.gguf, pool->plan.n_stages, &costs,
                        &ignored) ||
        pages_of(pool, &out->plan, stages) < out->least_pages)
        return false;
    uint64_t before = shard_plan_slowest(&pool->plan, &costs);
    uint64_t after = shard_plan_slowest(&out->plan, &costs);
    if (before < after + LEAST_GAIN_NS || before - after < before / LEAST_GAIN_PART)
        return false;
    log_info("the layers are dealt by measured time: the slowest stage of a step takes %.3f ms, not %.3f ms",
             (double)after / 1e6, (double)before / 1e6);
    return true;
}

void pool_begin_trial(struct worker_pool *pool, const struct better_deal *better)
{
    if (!pool->on_trial)
        pool->proven = pool->plan;
    pool->on_trial = true;
    pool->trial_pages = better->least_pages;
    pool->plan = better->plan;
}

void pool_give_up_trial(struct worker_pool *pool)
{
    if (!pool->on_trial)
        return;
    log_warn("the deal by measured time did not come about: the layers go back to where they were");
    pool->on_trial = false;
    pool->redealt = true;
    pool->failed_trials++;
    pool->plan = pool->proven;
}
