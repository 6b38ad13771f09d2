// What rpc_server.c, rpc_call.c and rpc_client.c share; the only header that shows <grpc/*>.
#ifndef STRATA_RPC_INTERNAL_H
#define STRATA_RPC_INTERNAL_H

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdatomic.h>

#include "common/rpc_client.h"
#include "common/rpc_server.h"

// A tag goes to gRPC with one thread and comes back on another. The order between the two is real (the
// completion queue makes it), but gRPC is not instrumented, so ThreadSanitizer has to be told.
#if defined(__SANITIZE_THREAD__)
#define RPC_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define RPC_THREAD_SANITIZER 1
#endif
#endif
#ifdef RPC_THREAD_SANITIZER
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define RPC_HAND_OVER(tag) __tsan_release(tag)
#define RPC_TAKE_OVER(tag) __tsan_acquire(tag)
#else
#define RPC_HAND_OVER(tag) ((void)(tag))
#define RPC_TAKE_OVER(tag) ((void)(tag))
#endif

enum {
    RPC_DEFAULT_MESSAGE_BYTES = 4 << 20,
    RPC_KEEPALIVE_MS = 20000,         // between pings on a silent connection
    RPC_KEEPALIVE_TIMEOUT_MS = 10000, // for the answer to a ping
    RPC_MAX_TEXT = 1024, // bytes of a status sentence: it travels in a header, whose size is limited
};

// --- rpc_common.c

grpc_byte_buffer *rpc_buffer_from(const void *bytes, size_t length);
// Copies a received message into malloc'd memory; NULL when memory is out.
uint8_t *rpc_buffer_flatten(grpc_byte_buffer *buffer, size_t *length);
// Reads a whole PEM file into malloc'd, NUL-terminated memory.
int rpc_read_pem(const char *path, char **out, struct error *error);
// "host:port", "[v6]:port" or "unix:path"; with `schemes` also "dns:", "ipv4:", "ipv6:" targets.
// STATUS_INVALID with a sentence.
int rpc_address_check(const char *address, bool schemes, struct error *error);
grpc_arg rpc_arg_int(const char *key, int value);
// A sentence short enough for a header, cut at a character.
grpc_slice rpc_slice_text(const char *text);

// --- rpc_call.c, called by rpc_server.c on the thread of the call's lane

enum rpc_event { RPC_ACCEPTED, RPC_RECEIVED, RPC_SENT, RPC_CLOSED, RPC_STOPPED };
struct rpc_tag {
    enum rpc_event event;
    struct rpc_call *call; // NULL: the server's own
};

struct rpc_method_entry {
    struct rpc_method method;
    void *service;
};

struct rpc_server {
    grpc_server *server;
    struct rpc_lane *lanes;
    uint32_t n_lanes, n_threads; // threads that run: the first lanes'
    uint32_t max_queued, max_calls;
    struct rpc_method_entry *methods;
    size_t n_methods;
    grpc_server_credentials *credentials;
    bool tls, started, stopped;
    atomic_uint calls; // between accept and on_done
    struct rpc_tag stop_tag;
    pthread_mutex_t mutex;
    pthread_cond_t ended; // `drained` became true
    bool drained;
    bool stopping;             // with `standing`: under the mutex
    struct rpc_call *standing; // calls of standing methods, a list
};

// Calls bound to a lane's queue get all their events on the lane's thread, so a call's callbacks cannot
// overlap.
struct rpc_lane {
    struct rpc_server *server;
    grpc_completion_queue *queue;
    pthread_t thread;
    pthread_mutex_t mutex; // starting an operation and shutting the queue down exclude each other
    bool closed;           // the queue is shut down: gRPC would abort the process for another operation
};

// Waits for one more call on this lane.
void rpc_call_expect(struct rpc_lane *lane);
void rpc_call_end_standing(struct rpc_server *server);
void rpc_call_handle(struct rpc_lane *lane, const struct rpc_tag *tag, bool success);

#endif
