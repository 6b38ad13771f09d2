// Steps under way: plans go out to every stage of the pool, results come back in order from the last one.
// Keeps what is in flight and how long the oldest step may still take. The coordinator's thread only.
#ifndef STRATA_PIPELINE_H
#define STRATA_PIPELINE_H

#include <stdint.h>

#include "common/status.h"
#include "common/step_plan.h"
#include "coordinator/worker_pool.h"

struct pipeline;

struct pipeline_options {
    struct worker_pool *pool;
    struct step_bounds bounds; // n_pages is set by pipeline_begin
    int64_t step_timeout_us;   // of a step of one position; longer steps get more
};

int pipeline_new(struct pipeline **out, const struct pipeline_options *options);
void pipeline_free(struct pipeline *pipeline);

void pipeline_begin(struct pipeline *pipeline, uint64_t epoch, uint32_t n_pages); // the pool is ready
void pipeline_end(struct pipeline *pipeline);                                     // the pool is lost
// STATUS_CORRUPT: the plan breaks the pool's bounds. Any failure leaves the epoch without this step: it is
// over.
int pipeline_send(struct pipeline *pipeline, const struct step_plan *plan, int64_t now_us,
                  struct error *error);
// A result came in: *took_us is how long its step was under way. STATUS_CORRUPT when it is not the oldest's.
int pipeline_take(struct pipeline *pipeline, const struct step_result *result, int64_t now_us,
                  int64_t *took_us, struct error *error);
// Ends the epoch when the oldest step overran its time.
void pipeline_check(struct pipeline *pipeline, int64_t now_us);
int64_t pipeline_wake_us(const struct pipeline *pipeline); // INT64_MAX = nothing is in flight

#endif
