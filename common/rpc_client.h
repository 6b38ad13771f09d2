// A blocking gRPC client over gRPC C core, for command-line tools and for a worker's stream to its
// coordinator. One channel may carry calls of many threads. On one stream, one thread may send while another
// receives; rpc_stream_cancel may be called from any thread and makes both return.
#ifndef STRATA_RPC_CLIENT_H
#define STRATA_RPC_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

struct rpc_channel;
struct rpc_stream;

struct rpc_channel_options {
    uint32_t max_message_bytes;     // received; 0 = 4 MiB
    int64_t keepalive_us;           // 0 = 20 s; the server allows it
    const char *tls_ca;             // PEM file: use TLS; NULL = plaintext
    const char *tls_cert, *tls_key; // for servers that ask
};

int rpc_channel_new(struct rpc_channel **out, const char *address, const struct rpc_channel_options *options,
                    struct error *error);
void rpc_channel_free(struct rpc_channel *channel);

// Opens a call. timeout_us <= 0: no deadline. metadata: NULL-terminated key, value, key, value..., or NULL.
// wait_for_ready: keep trying to connect until the deadline instead of failing at once.
int rpc_stream_open(struct rpc_stream **out, struct rpc_channel *channel, const char *path,
                    int64_t timeout_us, const char *const *metadata, bool wait_for_ready,
                    struct error *error);
int rpc_stream_send(struct rpc_stream *stream, const void *bytes,
                    size_t length); // waits until it is on its way
int rpc_stream_half_close(struct rpc_stream *stream);
// Waits for a message. 1: *bytes (free() it) and *length are set. 0: the call ended well. Negative: it
// failed, and `error` has the server's sentence.
int rpc_stream_receive(struct rpc_stream *stream, uint8_t **bytes, size_t *length, struct error *error);
// A value of the server's initial metadata, after the first receive; NULL when absent.
const char *rpc_stream_metadata(struct rpc_stream *stream, const char *key);
void rpc_stream_cancel(struct rpc_stream *stream);
void rpc_stream_free(struct rpc_stream *stream); // cancels when still open; no other thread may be inside

// One request, one response.
int rpc_call_unary(struct rpc_channel *channel, const char *path, const void *request, size_t request_bytes,
                   int64_t timeout_us, bool wait_for_ready, uint8_t **response, size_t *response_bytes,
                   struct error *error);

#endif
