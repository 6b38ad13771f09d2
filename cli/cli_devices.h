// The GPUs that `strata serve` gives its workers.
#ifndef STRATA_CLI_DEVICES_H
#define STRATA_CLI_DEVICES_H

#include <stdint.h>

#include "common/limits.h"
#include "common/status.h"

// Reads --devices: "none", "all" (those that `programs`/strata-worker --list-devices finds) or a list of
// numbers among those ("0,2"; one may stand twice). *n is 0 when there is none.
int cli_devices_read(const char *text, const char *programs, uint32_t devices[MAX_STAGES], uint32_t *n,
                     struct error *error);

#endif
