// A gRPC server over gRPC C core: method paths to callbacks, messages as bytes. The only files that know
// <grpc/*> are rpc_*.c.
//
// Threads: the server runs its own few threads. The callbacks of one call never run at once and never after
// on_done; they must not block. The functions on a `struct rpc_call` may be called from any thread, from
// inside callbacks too. A call lives until on_done has run and every reference taken with rpc_call_ref was
// dropped.
#ifndef STRATA_RPC_SERVER_H
#define STRATA_RPC_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

struct rpc_server;
struct rpc_call;

struct rpc_method {
    const char *path;      // "/strata.v1.Inference/Generate"
    bool client_streaming; // false: exactly one message is read, then on_message runs
    bool standing; // lasts as long as the client likes (a watch): rpc_server_stop ends it at once, with
                   // UNAVAILABLE
    // A call arrived, before any message. May set a context with rpc_call_set_context. NULL = nothing to do.
    void (*on_start)(struct rpc_call *call, void *service);
    // One message. The bytes are the callback's only until it returns.
    void (*on_message)(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length);
    // The client will send no more (client_streaming only). May be NULL.
    void (*on_half_close)(struct rpc_call *call, void *service);
    // A queued message went out to the transport; `queued` are still waiting. For output credit. May be NULL.
    void (*on_sent)(struct rpc_call *call, void *service, size_t queued);
    // The call is over, whoever ended it. `cancelled`: the client went away, cancelled, or its deadline
    // passed before rpc_call_finish took effect. Runs exactly once, last. May be NULL.
    void (*on_done)(struct rpc_call *call, void *service, bool cancelled);
};

struct rpc_server_options {
    uint32_t threads;               // 0 = 2
    uint32_t max_message_bytes;     // received; 0 = 4 MiB
    uint32_t max_queued;            // messages waiting to be sent on one call; 0 = 1024
    uint32_t max_calls;             // in flight at once, more are answered RESOURCE_EXHAUSTED; 0 = 4096
    uint32_t max_connection_age_ms; // then clients are asked to reconnect (load balancers); 0 = never
    const char *tls_cert, *tls_key,
        *tls_ca; // PEM file names; NULL = plaintext. tls_ca asks clients for certificates
};

int rpc_server_new(struct rpc_server **out, const struct rpc_server_options *options, struct error *error);
// "127.0.0.1:0", "[::1]:50051", "unix:/path". *port gets the bound port (0 for Unix sockets). Before start;
// repeatable.
int rpc_server_listen(struct rpc_server *server, const char *address, int *port, struct error *error);
// Methods not added are answered UNIMPLEMENTED. The struct is copied; `service` is passed back. Before start.
int rpc_server_add(struct rpc_server *server, const struct rpc_method *method, void *service);
int rpc_server_start(struct rpc_server *server, struct error *error);
// No new calls; those in flight may end within `grace_us`, then they are cancelled. Returns when all are
// done.
void rpc_server_stop(struct rpc_server *server, int64_t grace_us);
void rpc_server_free(struct rpc_server *server); // stops first if needed

void rpc_call_set_context(struct rpc_call *call, void *context);
void *rpc_call_context(const struct rpc_call *call);
void rpc_call_ref(struct rpc_call *call);
void rpc_call_unref(struct rpc_call *call);
// Microseconds on the monotonic clock, INT64_MAX when the client set none.
int64_t rpc_call_deadline_us(const struct rpc_call *call);
const char *rpc_call_peer(const struct rpc_call *call);
// A text metadata value the client sent, NULL when absent. Lower-case keys.
const char *rpc_call_metadata(const struct rpc_call *call, const char *key);
// Initial metadata; only before the first send. Copied.
int rpc_call_set_initial_metadata(struct rpc_call *call, const char *key, const char *value);

// Queues one message (copied). STATUS_EXHAUSTED when max_queued wait, STATUS_CANCELLED when the call is over.
int rpc_call_send(struct rpc_call *call, const void *bytes, size_t length);
// Ends the call after what is queued: STATUS_OK or an enum status, mapped onto gRPC's codes, with its
// sentence.
void rpc_call_finish(struct rpc_call *call, int status, const char *text);
// Ends it now, dropping what is queued.
void rpc_call_abort(struct rpc_call *call, int status, const char *text);

// enum status <-> gRPC status code numbers (also used by the client).
int rpc_status_to_grpc(int status);
int rpc_status_from_grpc(int code);
// One grpc_init for the process; both nest.
void rpc_library_init(void);
void rpc_library_shutdown(void);

#endif
