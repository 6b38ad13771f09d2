// The worker's device and the thread that owns it: loads a stage, builds its links, runs its steps, one job
// after the other, as the coordinator's messages ask. The caller's thread only queues; what there is to say
// comes out through `say`. Weights outlive epochs; everything else belongs to one.
//
//   assign -> (load) LOADED -> connect -> LINKED -> steps -> RESULT...      FAILED ends the epoch at any
//   point
#ifndef STRATA_STEP_SERVICE_H
#define STRATA_STEP_SERVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "common/gguf.h"
#include "common/model_spec.h"
#include "common/status.h"
#include "kernels/device.h"
#include "proto/wire.h"
#include "worker/link.h"
#include "worker/step_trace.h"

struct step_service;

struct step_service_options {
    struct device_options device;
    const struct gguf *gguf; // outlive the service
    const struct model_spec *spec;
    struct link_listener *listener;
    bool no_nccl;       // link over sockets only
    bool oversubscribe; // this process may share its GPU with a neighbour
    uint64_t memory;    // budget for weights and KV in bytes, 0 = what the device has
    int64_t link_timeout_us;
    struct step_trace *trace; // gets every step; NULL: none. Outlives the service
    // Called by the device's thread; `message` and what it points to are valid during the call.
    void (*say)(void *context, const struct wire_worker_message *message);
    // Once, after the FAILED that it caused: no epoch will run here any more.
    void (*broken)(void *context, const char *device);
    void *context;
};

// Opens the device and starts its thread.
int step_service_new(struct step_service **out, const struct step_service_options *options,
                     struct error *error);
void step_service_free(struct step_service *service); // ends what runs

// Jobs, in the order of the calls. STATUS_EXHAUSTED: the coordinator queued more than any pool needs.
int step_service_assign(struct step_service *service, const struct wire_coordinator_message *assign);
int step_service_connect(struct step_service *service, const struct wire_coordinator_message *connect);
// A plan to decode a step into; give it back with step_service_step (which also runs it) or
// step_service_return. NULL: too many steps are queued.
struct step_plan *step_service_borrow(struct step_service *service);
void step_service_return(struct step_service *service, struct step_plan *plan);
int step_service_step(struct step_service *service, struct step_plan *plan);

// The epoch is over: what runs is interrupted, what is queued for it is dropped. Any thread.
void step_service_abort(struct step_service *service, uint64_t epoch);
// Ends whatever epoch there is and waits until the device's thread is idle.
void step_service_reset(struct step_service *service);

// Device, level, threads, links and memory of a Hello; numbers of a heartbeat. Any thread.
void step_service_describe(struct step_service *service, struct wire_worker_message *hello);
void step_service_beat(struct step_service *service, struct wire_worker_message *beat);
uint64_t step_service_epoch(struct step_service *service); // assigned and not over; 0: none

#endif
