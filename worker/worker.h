// A worker process from start to end: opens the model, keeps dialing the coordinator, joins, does what it is
// told, and comes back after a loss with its weights still loaded.
#ifndef STRATA_WORKER_H
#define STRATA_WORKER_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "kernels/device.h"

struct worker;

struct worker_options {
    const char *model;          // path of the GGUF file
    const char *coordinator;    // "host:port", "unix:/path"
    const char *listen_link;    // where the previous stage connects
    const char *advertise_link; // what others should dial instead; NULL = where we listen
    const char *name;           // NULL = host:pid
    const char *trace;          // file for a trace of the steps, NULL = none
    struct device_options device;
    uint64_t memory;            // bytes for weights and KV, 0 = what the device has
    int64_t connect_timeout_us; // without a coordinator, 0 = for ever
    int64_t link_timeout_us;
    bool no_nccl;                            // link over sockets only
    bool oversubscribe;                      // link with a neighbour on the same GPU
    const char *tls_ca, *tls_cert, *tls_key; // NULL = plaintext
};

// Opens model, device and link listener: what is wrong with them is found before anybody is dialed.
int worker_new(struct worker **out, const struct worker_options *options, struct error *error);
void worker_free(struct worker *worker);

// Returns STATUS_OK after worker_stop; otherwise the reason not to go on: STATUS_CANCELLED when the
// coordinator sent us away for good (with its sentence), STATUS_DEADLINE when none was found in time,
// STATUS_INTERNAL when the device is broken for this process and only a new one can go on.
int worker_run(struct worker *worker, struct error *error);
void worker_stop(struct worker *worker); // any thread

#endif
