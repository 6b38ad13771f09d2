// A ring of the steps in flight and the watchdog over its oldest one. A step begins to count when it is sent
// or when the one before it came back, whichever is later, so a full pipeline does not look slow; a step with
// many positions (a prompt's chunk) is given time in proportion.
#include "coordinator/pipeline.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    MAX_FLIGHT = MAX_STEP_HISTORY + MAX_STAGES,
    TIMEOUT_POSITIONS = 512, // so many positions double a step's time
};

struct flight {
    uint64_t number;
    int64_t sent_us;
    uint32_t positions;
};

struct pipeline {
    struct pipeline_options options;
    uint64_t epoch;
    int64_t last_us; // when the last result came
    uint32_t first, count;
    struct flight ring[MAX_FLIGHT];
};

int pipeline_new(struct pipeline **out, const struct pipeline_options *options)
{
    struct pipeline *pipeline = calloc(1, sizeof(*pipeline));
    if (!pipeline)
        return STATUS_NO_MEMORY;
    pipeline->options = *options;
    *out = pipeline;
    return STATUS_OK;
}

void pipeline_free(struct pipeline *pipeline)
{
    free(pipeline);
}

void pipeline_begin(struct pipeline *pipeline, uint64_t epoch, uint32_t n_pages)
{
    pipeline->epoch = epoch;
    pipeline->options.bounds.n_pages = n_pages;
    pipeline->count = 0;
    pipeline->last_us = 0;
}

void pipeline_end(struct pipeline *pipeline)
{
    pipeline->count = 0;
}

int pipeline_send(struct pipeline *pipeline, const struct step_plan *plan, int64_t now_us,
                  struct error *error)
{
    int status = step_plan_validate(plan, &pipeline->options.bounds, error);
    if (!status && pipeline->count == MAX_FLIGHT)
        status = error_set(error, STATUS_INTERNAL, "%d steps are in flight", MAX_FLIGHT);
    if (!status)
        status = worker_pool_send_step(pipeline->options.pool, plan, error);
    if (status)
        return status;
    pipeline->ring[(pipeline->first + pipeline->count++) % MAX_FLIGHT] =
        (struct flight){.number = plan->number, .sent_us = now_us, .positions = step_plan_positions(plan)};
    return STATUS_OK;
}

int pipeline_take(struct pipeline *pipeline, const struct step_result *result, int64_t now_us,
                  int64_t *took_us, struct error *error)
{
    const struct flight *oldest = &pipeline->ring[pipeline->first];
    if (pipeline->count == 0 || result->epoch != pipeline->epoch || result->number != oldest->number)
        return error_set(error, STATUS_CORRUPT,
                         "sent a result of step %" PRIu64 " when step %" PRIu64 " was due", result->number,
                         pipeline->count ? oldest->number : 0);
    *took_us = now_us - oldest->sent_us;
    pipeline->last_us = now_us;
    pipeline->first = (pipeline->first + 1) % MAX_FLIGHT;
    pipeline->count--;
    return STATUS_OK;
}

int64_t pipeline_wake_us(const struct pipeline *pipeline)
{
    if (pipeline->count == 0)
        return INT64_MAX;
    const struct flight *oldest = &pipeline->ring[pipeline->first];
    int64_t began = oldest->sent_us > pipeline->last_us ? oldest->sent_us : pipeline->last_us;
    int64_t each = pipeline->options.step_timeout_us;
    return began + each + each / TIMEOUT_POSITIONS * oldest->positions;
}

void pipeline_check(struct pipeline *pipeline, int64_t now_us)
{
    if (pipeline->count == 0 || now_us < pipeline_wake_us(pipeline))
        return;
    const struct flight *oldest = &pipeline->ring[pipeline->first];
    char text[128];
    snprintf(text, sizeof(text), "did not finish step %" PRIu64 " of %u positions in %.1f s", oldest->number,
             oldest->positions, (double)(now_us - oldest->sent_us) / 1e6);
    uint32_t suspect = worker_pool_suspect(pipeline->options.pool, oldest->number);
    pipeline->count = 0;
    worker_pool_lose(pipeline->options.pool, (int32_t)suspect, now_us, text);
}
