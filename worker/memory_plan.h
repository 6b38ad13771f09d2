// What a stage takes of its device's memory, added up before anything is uploaded: it is what the load is
// checked against, what the log shows, and what the device is held to once the stage is warm. Plain values;
// the device's thread.
#ifndef STRATA_MEMORY_PLAN_H
#define STRATA_MEMORY_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/device.h"
#include "worker/executor.h"

struct memory_plan {
    uint64_t free;    // what weights to load and everything else may take
    uint64_t weights; // that are not there yet
    uint64_t links;
    struct executor_memory stage;
    uint64_t device_free; // of the device when the plan was made, whatever may be taken
};

// Of the options' stage, with `links` bytes of links, when `free` bytes may be taken. STATUS_UNSUPPORTED when
// the device cannot run a model of this shape.
int memory_plan_make(struct memory_plan *out, const struct executor_options *options, uint64_t links,
                     uint64_t free, struct error *error);
uint64_t memory_plan_others(const struct memory_plan *plan); // all but the weights
bool memory_plan_fits(const struct memory_plan *plan);
// The most KV pages, of those that the options ask for, with which the plan fits; 0: none do.
uint32_t memory_plan_pages(const struct memory_plan *plan, const struct executor_options *options);
void memory_plan_log(const struct memory_plan *plan);
// After the warm-up, before the links: warns when the device has less left than the plan said.
void memory_plan_check(const struct memory_plan *plan, const struct device *device);

#endif
