// The parts of a worker's stage without its network, put together for a whole model. One thread; owns
// everything in the struct.
#include "worker/local_engine.h"

#include <string.h>

#include "common/clock.h"
#include "common/sampling.h"
#include "worker/memory_plan.h"
#include "worker/weight_cache.h"
#include "worker/weight_file.h"

static uint32_t pages_of(uint32_t context)
{
    return (context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
}

static int load(struct local_engine *engine, const struct executor_options *options, struct memory_plan *plan,
                struct error *error)
{
    struct weight_totals totals;
    int status = memory_plan_make(plan, options, 0, device_memory_free(engine->device), error);
    if (status)
        return status;
    struct weight_load load = {.memory_free = plan->free, .other_bytes = memory_plan_others(plan)};
    int64_t begin = clock_now_us();
    status = weight_cache_precache(engine->weights, &engine->list, &load, &totals, error);
    engine->load_us = (uint64_t)(clock_now_us() - begin);
    engine->weight_bytes = status ? 0 : totals.cached;
    engine->source_bytes = status ? 0 : totals.source_bytes;
    return status;
}

int local_engine_open(struct local_engine *engine, const char *model, const struct device_options *device,
                      uint32_t n_slots, uint32_t context, uint32_t max_positions, struct error *error)
{
    memset(engine, 0, sizeof(*engine));
    step_plan_init(&engine->plan);
    step_result_init(&engine->result);
    int status = gguf_open(&engine->gguf, model, error);
    if (!status)
        status = model_spec_read(&engine->spec, engine->gguf, error);
    if (!status)
        status =
            weight_list_make(&engine->list, engine->gguf, &engine->spec, 0, engine->spec.n_layers, error);
    if (!status)
        status = device_open(&engine->device, device, error);
    if (!status && weight_cache_new(&engine->weights, engine->device))
        status = error_set(error, STATUS_NO_MEMORY, "no memory for the weight cache");
    if (status)
        return status;
    weight_cache_set_file(engine->weights, engine->gguf);
    struct executor_options options = {.device = engine->device,
                                       .spec = &engine->spec,
                                       .list = &engine->list,
                                       .weights = engine->weights,
                                       .epoch = 1,
                                       .n_stages = 1,
                                       .n_layers = engine->spec.n_layers,
                                       .bounds = {.n_slots = n_slots,
                                                  .n_pages = n_slots * pages_of(context),
                                                  .context = context,
                                                  .vocab_size = engine->spec.vocab_size,
                                                  .max_positions = max_positions}};
    struct memory_plan plan;
    status = load(engine, &options, &plan, error);
    if (!status)
        status = executor_new(&engine->executor, &options, error);
    if (!status)
        status = executor_warm_up(engine->executor, error);
    if (!status)
        memory_plan_check(&plan, engine->device);
    engine->plan.epoch = 1;
    engine->context = context;
    return status;
}

void local_engine_close(struct local_engine *engine)
{
    executor_free(engine->executor);
    weight_cache_free(engine->weights);
    weight_list_free(&engine->list);
    if (engine->device)
        device_close(engine->device);
    gguf_close(engine->gguf);
    step_plan_free(&engine->plan);
    step_result_free(&engine->result);
    memset(engine, 0, sizeof(*engine));
}

int local_engine_add_open(struct local_engine *engine, uint32_t slot, struct error *error)
{
    uint32_t n_pages = pages_of(engine->context);
    struct step_command *open = step_plan_add_command(&engine->plan, STEP_OPEN, slot);
    if (open) {
        open->sampling = SAMPLING_DEFAULTS;
        open->sampling.temperature = 0;
    }
    struct step_command *pages = step_plan_add_command(&engine->plan, STEP_PAGES, slot);
    if (!open || !pages)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a step plan");
    pages->pages_first = engine->plan.n_pages;
    for (uint32_t i = 0; i < n_pages; i++) {
        uint32_t page = slot * n_pages + i;
        if (step_plan_add_pages(&engine->plan, &page, 1) < 0)
            return error_set(error, STATUS_NO_MEMORY, "no memory for a step plan");
        pages->pages_count++;
    }
    return STATUS_OK;
}

int local_engine_submit(struct local_engine *engine, struct error *error)
{
    int status = STATUS_OK;
    if (executor_unfinished(engine->executor) >= LOCAL_ENGINE_AHEAD)
        status = executor_finish(engine->executor, &engine->result, true, error);
    engine->plan.number = engine->steps++;
    if (!status)
        status = executor_submit(engine->executor, &engine->plan, error);
    step_plan_clear(&engine->plan);
    engine->plan.epoch = 1;
    return status;
}

int local_engine_wait(struct local_engine *engine, struct error *error)
{
    int status = STATUS_OK;
    while (!status && executor_unfinished(engine->executor) > 0)
        status = executor_finish(engine->executor, &engine->result, true, error);
    return status;
}

int local_engine_run(struct local_engine *engine, struct error *error)
{
    int status = local_engine_submit(engine, error);
    return status ? status : local_engine_wait(engine, error);
}
