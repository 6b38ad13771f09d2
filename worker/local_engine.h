// A whole model on one device in one process, without coordinator: for timing and accuracy work. Steps are
// fed by hand.
#ifndef STRATA_LOCAL_ENGINE_H
#define STRATA_LOCAL_ENGINE_H

#include <stdint.h>

#include "common/gguf.h"
#include "common/model_spec.h"
#include "common/status.h"
#include "common/step_plan.h"
#include "kernels/device.h"
#include "worker/executor.h"

struct local_engine { // zero-initialize; plain members, read only
    struct gguf *gguf;
    struct model_spec spec;
    struct device *device;
    struct weight_cache *weights;
    struct weight_list list;
    struct executor *executor;
    struct step_plan plan;     // for the next step; local_engine_run empties it
    struct step_result result; // of the last step that is finished
    uint64_t steps;
    uint32_t context; // positions of a sequence
    uint64_t weight_bytes;
    uint64_t source_bytes, load_us; // of the weights' file, and how long loading them took
};

// Loads the model for `n_slots` sequences of `context` positions, in steps of at most `max_positions`.
int local_engine_open(struct local_engine *engine, const char *model, const struct device_options *device,
                      uint32_t n_slots, uint32_t context, uint32_t max_positions, struct error *error);
void local_engine_close(struct local_engine *engine);

// Adds the commands that open slot `slot` with greedy sampling and all the pages of its context.
int local_engine_add_open(struct local_engine *engine, uint32_t slot, struct error *error);
int local_engine_run(struct local_engine *engine, struct error *error);
// The same without waiting, as a server does: up to LOCAL_ENGINE_AHEAD steps are on their way, the oldest is
// waited for when there would be more. local_engine_wait waits for all of them.
enum { LOCAL_ENGINE_AHEAD = 3 };
int local_engine_submit(struct local_engine *engine, struct error *error);
int local_engine_wait(struct local_engine *engine, struct error *error);

#endif
