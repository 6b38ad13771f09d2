// When a stage's device did what for a step: how long it stood waiting for a neighbour and how long it
// computed, told apart also where the device works behind the host's back. Stamps are queued between the ops
// of a step (see kernels.h) and read when the step is over. Called by the executor, on its thread.
#ifndef STRATA_STEP_TIMES_H
#define STRATA_STEP_TIMES_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/kernels.h"

// All on the clock of clock_now_us, ascending as they stand here, and from step to step.
struct step_times {
    uint64_t number;
    uint32_t rows, positions; // of the plan
    int64_t begin_us;         // the device was free for it: the end of the step before, or its submission
    int64_t asks_us;          // from here
    int64_t ready_us;         // to here it waited for a neighbour's message; the same where there was none
    int64_t starts_us;   // its layers begin; apart from waits, its commands and the host came before that
    int64_t computed_us; // results and draws included
    int64_t sent_us;     // what goes to the next stage is out of the way
};

// Of a step that is being submitted, or was.
struct step_stamps {
    uint64_t number;
    uint32_t rows, positions;
    int64_t submit_us;
    bool waits, sends;                            // stamped: asks and ready, sent
    uint64_t asks, ready, starts, computed, sent; // starts: where there are positions
    int64_t send_us;                              // on a host link, while the device had nothing to do
};

// The device is about to receive; the first time in a step counts.
void step_stamps_ask(struct step_stamps *stamps, const struct kernel_ops *ops, struct device *device);
// What it asked for is there; nothing when it did not ask.
void step_stamps_ready(struct step_stamps *stamps, const struct kernel_ops *ops, struct device *device);

// Of a step whose mark was reached; `free_us` is when the step before it was out of the way.
void step_times_read(struct step_times *times, const struct step_stamps *stamps, int64_t free_us,
                     const struct kernel_ops *ops, struct device *device);

static inline uint64_t step_times_wait_us(const struct step_times *times)
{
    return (uint64_t)(times->ready_us - times->asks_us + times->sent_us - times->computed_us);
}

static inline uint64_t step_times_compute_us(const struct step_times *times)
{
    return (uint64_t)(times->asks_us - times->begin_us + times->computed_us - times->ready_us);
}

#endif
