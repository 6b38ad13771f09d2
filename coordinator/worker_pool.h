// The pool: which workers have joined, which stage each one holds, and the epoch they serve. Workers dial
// strata.v1.Pool/Join and stay on that stream; gRPC threads only lay the bytes of their messages in a bounded
// inbox and ring the bell, everything else happens on the one thread that calls worker_pool_next_event (the
// coordinator's).
//
//                               better dealt otherwise: once
//                                +--+
//              N have joined     v  | all loaded           all linked
//   WAITING ----------------> LOADING --------> LINKING ----------> READY
//      ^   ^                     |  a worker fails  |                 |
//      |   |     FAILED <--------+------------------+                 | a worker is lost, a step overruns
//      |   +-------'  back-off, or somebody joins                     v
//      +------------------ not enough workers ---------------- REASSEMBLING
//
// Every assembly has a new epoch. Workers beyond the wanted number stay joined and idle: spares that take
// over at a loss. A worker keeps its weights over epochs, so a stage is given to the worker that held most of
// it. Layers are dealt by their bytes until the workers have measured what a layer takes them, then by time.
#ifndef STRATA_WORKER_POOL_H
#define STRATA_WORKER_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "common/gguf.h"
#include "common/model_spec.h"
#include "common/queue.h"
#include "common/rpc_server.h"
#include "common/status.h"
#include "common/step_plan.h"
#include "proto/wire.h"

struct worker_pool;

struct worker_pool_options {
    const struct model_spec *spec; // both outlive the pool
    const struct gguf *gguf;
    uint32_t n_workers;
    const char *backend;    // only workers of this backend may join; NULL = any
    uint32_t n_slots;       // sequences at once
    uint32_t context;       // positions of one sequence
    uint32_t max_positions; // of one step
    uint32_t n_pages;       // KV pages; 0 = what the workers' memory allows
    double memory_fraction; // of a worker's free memory that weights and KV may take; 0 = 0.9
    bool by_bytes;          // the layers are dealt by bytes alone
    int64_t heartbeat_us;   // between two heartbeats to a worker; 0 = 1 s
    int64_t silence_us;     // a worker silent for so long is lost; 0 = 10 s
    int64_t retry_us;       // before the second attempt after a failure, doubling up to 60 s; 0 = 2 s
    int64_t peer_grace_us;  // a broken link waits so long for the stream that explains it; 0 = 500 ms
    struct queue *bell;     // one-byte records: pushed to when there is something to take; may be NULL
};

int worker_pool_new(struct worker_pool **out, const struct worker_pool_options *options, struct error *error);
// After the server that carries it was stopped.
void worker_pool_free(struct worker_pool *pool);
// Adds Join to a server that is not started yet.
int worker_pool_attach(struct worker_pool *pool, struct rpc_server *server);

enum worker_pool_event_kind {
    WORKER_POOL_READY,  // steps can be sent under `epoch`
    WORKER_POOL_RESULT, // of one step, from the last stage
    WORKER_POOL_LOST,   // the epoch is over; `text` names the cause
};
struct worker_pool_event { // pointers are valid until the next call on the pool
    enum worker_pool_event_kind kind;
    uint64_t epoch;
    uint32_t n_stages, n_pages;
    const struct step_result *result;
    const char *text;
};
// Takes in what workers said and what time did. False: nothing until the bell rings or worker_pool_wake_us.
bool worker_pool_next_event(struct worker_pool *pool, int64_t now_us, struct worker_pool_event *event);
int64_t worker_pool_wake_us(const struct worker_pool *pool);

// To every stage of the pool, in order. STATUS_UNAVAILABLE when it is not ready.
int worker_pool_send_step(struct worker_pool *pool, const struct step_plan *plan, struct error *error);
// The stage that step `number` most likely waits for, judged by what the heartbeats say.
uint32_t worker_pool_suspect(const struct worker_pool *pool, uint64_t number);
// The epoch is over: a step overran its time, or a result made no sense. The worker of `stage` is to blame
// and is sent away (it may come back); -1: nobody is, and the same workers try again after a back-off.
void worker_pool_lose(struct worker_pool *pool, int32_t stage, int64_t now_us, const char *text);

// Says goodbye to everybody who joined; new ones are turned away.
void worker_pool_farewell(struct worker_pool *pool, const char *text);

// Why the pool cannot be assembled from those who are here; NULL unless it is FAILED.
const char *worker_pool_failure(const struct worker_pool *pool);
bool worker_pool_is_ready(const struct worker_pool *pool);
// State, epoch, problem, stages and page count of a GetPool answer; the rest is left alone. Pointers are
// valid until the next call on the pool.
void worker_pool_describe(struct worker_pool *pool, struct wire_pool *out);

#endif
