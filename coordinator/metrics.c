// Counters and the periodic line made of their differences.
#include "coordinator/metrics.h"

#include <inttypes.h>

#include "common/log.h"

enum { LINE_US = 10000000 };

void metrics_init(struct metrics *metrics, int64_t now_us)
{
    *metrics = (struct metrics){.line_us = now_us};
}

int64_t metrics_wake_us(const struct metrics *metrics)
{
    return metrics->line_us + LINE_US;
}

void metrics_log(struct metrics *metrics, int64_t now_us, uint32_t running, uint32_t waiting)
{
    double seconds = (double)(now_us - metrics->line_us) / 1e6;
    uint64_t steps = metrics->steps - metrics->line_steps;
    uint64_t step_us = metrics->step_us - metrics->line_step_us;
    if (steps > 0)
        log_info(
            "%u sequences run, %u requests wait; %.1f new tokens/s, %.1f prompt tokens/s, %.1f steps/s of "
            "%.1f ms; in all %" PRIu64 " requests ended well, %" PRIu64 " were cancelled, %" PRIu64
            " failed, the pool was lost %" PRIu64 " times",
            running, waiting, (double)(metrics->output_tokens - metrics->line_output) / seconds,
            (double)(metrics->prompt_tokens - metrics->line_prompt) / seconds, (double)steps / seconds,
            (double)step_us / 1e3 / (double)steps, metrics->ok, metrics->cancelled, metrics->failed,
            metrics->losses);
    metrics->line_us = now_us;
    metrics->line_prompt = metrics->prompt_tokens;
    metrics->line_output = metrics->output_tokens;
    metrics->line_steps = metrics->steps;
    metrics->line_step_us = metrics->step_us;
}
