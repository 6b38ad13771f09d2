// Reading the stamps of a step. Stateless. Clocks of a device and of the host are brought together to some
// microseconds only, so whatever would run backwards is held.
#include "worker/step_times.h"

void step_stamps_ask(struct step_stamps *stamps, const struct kernel_ops *ops, struct device *device)
{
    if (!stamps->waits)
        stamps->asks = ops->stamp(device);
    stamps->waits = true;
}

void step_stamps_ready(struct step_stamps *stamps, const struct kernel_ops *ops, struct device *device)
{
    if (stamps->waits)
        stamps->ready = ops->stamp(device);
}

static int64_t later(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

void step_times_read(struct step_times *times, const struct step_stamps *stamps, int64_t free_us,
                     const struct kernel_ops *ops, struct device *device)
{
    *times =
        (struct step_times){.number = stamps->number, .rows = stamps->rows, .positions = stamps->positions};
    times->begin_us = later(stamps->submit_us, free_us);
    times->asks_us = times->ready_us = times->begin_us;
    if (stamps->waits) {
        times->asks_us = later(ops->stamp_us(device, stamps->asks), times->begin_us);
        times->ready_us = later(ops->stamp_us(device, stamps->ready), times->asks_us);
    }
    times->starts_us = times->ready_us;
    if (stamps->positions > 0)
        times->starts_us = later(ops->stamp_us(device, stamps->starts), times->ready_us);
    times->computed_us = later(ops->stamp_us(device, stamps->computed), times->starts_us);
    times->sent_us = times->computed_us + stamps->send_us;
    if (stamps->sends)
        times->sent_us = later(ops->stamp_us(device, stamps->sent), times->computed_us);
}
