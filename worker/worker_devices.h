// strata-worker --list-devices: what --backend and --device may name on this machine.
#ifndef STRATA_WORKER_DEVICES_H
#define STRATA_WORKER_DEVICES_H

#include <stdbool.h>

// Prints every device that can be opened, GPUs first: a line each (backend, index, free bytes, description)
// or, as JSON, one array. Those that cannot are named on standard error. 0, or a status when there is none.
int worker_list_devices(bool json);

#endif
