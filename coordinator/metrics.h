// What the coordinator counts: totals since the start, and a line for the log now and then. One thread.
#ifndef STRATA_METRICS_H
#define STRATA_METRICS_H

#include <stdint.h>

struct metrics {
    uint64_t requests, ok, cancelled, failed; // taken in; ended well, by the client, by anything else
    uint64_t prompt_tokens, output_tokens;    // of requests taken in; sent on to clients
    uint64_t steps, step_us;                  // results taken, and the time their steps were under way
    uint64_t losses;                          // epochs that ended while the pool was ready
    // The totals at the last line.
    uint64_t line_prompt, line_output, line_steps, line_step_us;
    int64_t line_us;
};

void metrics_init(struct metrics *metrics, int64_t now_us);
// The line since the last one, unless nothing was computed. `running`, `waiting`: right now.
void metrics_log(struct metrics *metrics, int64_t now_us, uint32_t running, uint32_t waiting);
int64_t metrics_wake_us(const struct metrics *metrics); // when the next line is due

#endif
