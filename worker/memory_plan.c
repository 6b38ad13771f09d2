// The memory plan: sums, a table for the log, and the check afterwards. On the device's thread.
#include "worker/memory_plan.h"

#include "common/log.h"

int memory_plan_make(struct memory_plan *out, const struct executor_options *options, uint64_t links,
                     uint64_t free, struct error *error)
{
    *out = (struct memory_plan){.free = free,
                                .weights = weight_cache_missing_bytes(options->weights, options->list),
                                .links = links,
                                .device_free = device_memory_free(options->device)};
    return executor_plan_memory(options, &out->stage, error);
}

uint64_t memory_plan_others(const struct memory_plan *plan)
{
    const struct executor_memory *stage = &plan->stage;
    return plan->links + stage->kv + stage->workspace + stage->sampler + stage->scratch + stage->programs;
}

bool memory_plan_fits(const struct memory_plan *plan)
{
    return plan->weights + memory_plan_others(plan) <= plan->free;
}

uint32_t memory_plan_pages(const struct memory_plan *plan, const struct executor_options *options)
{
    struct executor_options tried = *options;
    struct memory_plan trial = *plan;
    uint32_t fit = 0, beyond = options->bounds.n_pages; // fit: known to, or none
    while (fit < beyond) {
        uint32_t middle = fit + (beyond - fit + 1) / 2;
        tried.bounds.n_pages = middle;
        if (executor_plan_memory(&tried, &trial.stage, NULL) == STATUS_OK && memory_plan_fits(&trial))
            fit = middle;
        else
            beyond = middle - 1;
    }
    return fit;
}

static double megabytes(uint64_t bytes)
{
    return (double)bytes / 1e6;
}

void memory_plan_log(const struct memory_plan *plan)
{
    const struct {
        const char *name;
        uint64_t bytes;
    } parts[] = {{"weights to load", plan->weights},
                 {"KV pages", plan->stage.kv},
                 {"workspace", plan->stage.workspace},
                 {"sampler", plan->stage.sampler},
                 {"scratch", plan->stage.scratch},
                 {"programs", plan->stage.programs},
                 {"links", plan->links}};
    uint64_t total = plan->weights + memory_plan_others(plan);
    log_info("memory plan: %.1f MB of %.1f MB", megabytes(total), megabytes(plan->free));
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        if (parts[i].bytes)
            log_info("  %-16s %10.1f MB", parts[i].name, megabytes(parts[i].bytes));
    }
}

void memory_plan_check(const struct memory_plan *plan, const struct device *device)
{
    uint64_t total = plan->weights + memory_plan_others(plan), left = device_memory_free(device);
    if (!device_stream(device)) // a CPU's memory is everybody's, and given out when it is touched
        return;
    total -= plan->links;
    uint64_t promised = plan->device_free > total ? plan->device_free - total : 0;
    if (left < promised)
        log_warn("the device has %.1f MB left, %.1f MB less than planned", megabytes(left),
                 megabytes(promised - left));
    else
        log_debug("the device has %.1f MB left, %.1f MB were planned", megabytes(left), megabytes(promised));
}
