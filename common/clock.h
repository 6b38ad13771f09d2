// Time. Monotonic microseconds for everything that is compared; wall time only for log lines and templates.
#ifndef STRATA_CLOCK_H
#define STRATA_CLOCK_H

#include <stdint.h>

int64_t clock_now_us(void);  // monotonic
int64_t clock_wall_us(void); // since 1970 UTC
void clock_sleep_us(int64_t us);

#endif
