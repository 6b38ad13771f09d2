// The blocking client. Each stream has a completion queue of its own that is plucked by tag, so a sender and
// a receiver wait side by side and neither sees the other's events. The threads are the callers'; a channel
// belongs to whoever made it and outlives its streams.
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/rpc_internal.h"

enum {
    FIRST_BACKOFF_MS = 100, // between attempts to connect: a coordinator that has just started is found soon
    LAST_BACKOFF_MS = 2000,
    RETRY_US = 500 * 1000, // what a call that does not wait gives a failed channel to come back
    MAX_PAIRS = 32,        // metadata of one call
};

struct rpc_channel {
    grpc_channel *channel;
};

struct rpc_stream {
    grpc_call *call;
    grpc_completion_queue *queue;
    grpc_metadata_array headers, trailers;
    char nudge_tag, open_tag, send_tag, receive_tag; // only their addresses matter
    // The receiving thread's:
    bool greeted, over; // initial metadata is here; the status is
    grpc_status_code code;
    grpc_slice details;
    char *value; // what rpc_stream_metadata returned last
};

static void read_all(const char *const paths[3], char *texts[3], struct error *error)
{
    for (int i = 0; i < 3 && !error->status; i++) {
        if (paths[i])
            rpc_read_pem(paths[i], &texts[i], error);
    }
}

static int credentials_new(grpc_channel_credentials **out, const struct rpc_channel_options *options,
                           struct error *error)
{
    if (!options->tls_ca && !options->tls_cert && !options->tls_key) {
        *out = grpc_insecure_credentials_create();
        return STATUS_OK;
    }
    if (!options->tls_cert != !options->tls_key)
        return error_set(error, STATUS_INVALID, "a TLS certificate and its key have to be given together");
    char *texts[3] = {NULL, NULL, NULL};
    struct error failure = {0};
    read_all((const char *const[3]){options->tls_ca, options->tls_cert, options->tls_key}, texts, &failure);
    if (!failure.status) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = texts[2], .cert_chain = texts[1]};
        *out = grpc_ssl_credentials_create_ex(texts[0], texts[1] ? &pair : NULL, NULL, NULL);
        if (!*out)
            error_set(&failure, STATUS_INVALID, "the TLS certificates cannot be used");
    }
    for (int i = 0; i < 3; i++)
        free(texts[i]);
    return failure.status ? error_set(error, failure.status, "%s", failure.text) : STATUS_OK;
}

static grpc_channel *connect_lazily(const char *address, const struct rpc_channel_options *options,
                                    grpc_channel_credentials *credentials)
{
    int64_t keepalive_ms = options->keepalive_us / 1000;
    uint32_t largest = options->max_message_bytes ? options->max_message_bytes : RPC_DEFAULT_MESSAGE_BYTES;
    if (keepalive_ms <= 0 || keepalive_ms > INT_MAX)
        keepalive_ms = RPC_KEEPALIVE_MS;
    grpc_arg arguments[] = {
        rpc_arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, largest > INT_MAX ? INT_MAX : (int)largest),
        rpc_arg_int(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, (int)keepalive_ms),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, RPC_KEEPALIVE_TIMEOUT_MS),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        rpc_arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA,
                    0), // no limit: a silent pool is pinged all the same
        rpc_arg_int(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, FIRST_BACKOFF_MS),
        rpc_arg_int(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, LAST_BACKOFF_MS),
        rpc_arg_int(GRPC_ARG_ENABLE_RETRIES, 0), // a failure is the caller's to see; nothing is sent twice
        rpc_arg_int(GRPC_ARG_ENABLE_HTTP_PROXY, 0),
        rpc_arg_int(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        // Every channel has its own connection, so that a load of many channels is a load of many
        // connections.
        rpc_arg_int(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),
    };
    grpc_channel_args all = {.num_args = sizeof(arguments) / sizeof(arguments[0]), .args = arguments};
    return grpc_channel_create(address, credentials, &all);
}

int rpc_channel_new(struct rpc_channel **out, const char *address, const struct rpc_channel_options *options,
                    struct error *error)
{
    static const struct rpc_channel_options defaults;
    options = options ? options : &defaults;
    int status = rpc_address_check(address, true, error);
    if (status)
        return status;
    struct rpc_channel *channel = calloc(1, sizeof(*channel));
    if (!channel)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a channel");
    rpc_library_init();
    grpc_channel_credentials *credentials = NULL;
    status = credentials_new(&credentials, options, error);
    if (status) {
        rpc_library_shutdown();
        free(channel);
        return status;
    }
    channel->channel = connect_lazily(address, options, credentials);
    grpc_channel_credentials_release(credentials);
    *out = channel;
    return STATUS_OK;
}

void rpc_channel_free(struct rpc_channel *channel)
{
    if (!channel)
        return;
    grpc_channel_destroy(channel->channel);
    rpc_library_shutdown();
    free(channel);
}

static gpr_timespec deadline_in(int64_t timeout_us)
{
    if (timeout_us <= 0)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_micros(timeout_us, GPR_TIMESPAN));
}

static bool start(struct rpc_stream *stream, const grpc_op *ops, size_t n_ops, char *tag)
{
    RPC_HAND_OVER(tag);
    return grpc_call_start_batch(stream->call, ops, n_ops, tag, NULL) == GRPC_CALL_OK;
}

static bool wait_for(struct rpc_stream *stream, char *tag)
{
    grpc_event event =
        grpc_completion_queue_pluck(stream->queue, tag, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    RPC_TAKE_OVER(tag);
    return event.type == GRPC_OP_COMPLETE && event.success;
}

static bool run(struct rpc_stream *stream, const grpc_op *ops, size_t n_ops, char *tag)
{
    return start(stream, ops, n_ops, tag) && wait_for(stream, tag);
}

static uint32_t header_flags(bool wait_for_ready)
{
    return GRPC_INITIAL_METADATA_WAIT_FOR_READY_EXPLICITLY_SET |
           (wait_for_ready ? GRPC_INITIAL_METADATA_WAIT_FOR_READY : 0);
}

static struct rpc_stream *stream_new(struct rpc_channel *channel, const char *path, int64_t timeout_us)
{
    struct rpc_stream *stream = calloc(1, sizeof(*stream));
    if (!stream)
        return NULL;
    grpc_slice method = grpc_slice_from_copied_string(path);
    stream->queue = grpc_completion_queue_create_for_pluck(NULL);
    stream->call = grpc_channel_create_call(channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS, stream->queue,
                                            method, NULL, deadline_in(timeout_us), NULL);
    grpc_slice_unref(method);
    grpc_metadata_array_init(&stream->headers);
    grpc_metadata_array_init(&stream->trailers);
    stream->details = grpc_empty_slice();
    return stream;
}

// Everything that was started has come back.
static void stream_delete(struct rpc_stream *stream)
{
    grpc_call_unref(stream->call);
    grpc_completion_queue_shutdown(stream->queue);
    grpc_completion_queue_destroy(stream->queue);
    grpc_metadata_array_destroy(&stream->headers);
    grpc_metadata_array_destroy(&stream->trailers);
    grpc_slice_unref(stream->details);
    free(stream->value);
    free(stream);
}

// A channel works only while somebody waits on one of its queues, so one that has failed keeps saying so to
// calls that do not wait, although its server may be back. Gives such a channel a moment to try again.
static void give_another_chance(struct rpc_channel *channel, struct rpc_stream *stream)
{
    if (grpc_channel_check_connectivity_state(channel->channel, 1) != GRPC_CHANNEL_TRANSIENT_FAILURE)
        return;
    grpc_channel_reset_connect_backoff(channel->channel);
    RPC_HAND_OVER(&stream->nudge_tag);
    grpc_channel_watch_connectivity_state(channel->channel, GRPC_CHANNEL_TRANSIENT_FAILURE,
                                          deadline_in(RETRY_US), stream->queue, &stream->nudge_tag);
    wait_for(stream, &stream->nudge_tag);
}

static int metadata_fill(grpc_metadata pairs[MAX_PAIRS], size_t *count, const char *const *metadata,
                         struct error *error)
{
    *count = 0;
    for (; metadata && metadata[0]; metadata += 2) {
        if (*count == MAX_PAIRS)
            return error_set(error, STATUS_INVALID, "a call carries at most %d metadata values", MAX_PAIRS);
        grpc_metadata pair = {.key = grpc_slice_from_static_string(metadata[0]),
                              .value = grpc_slice_from_copied_string(metadata[1])};
        pairs[(*count)++] = pair;
        if (!grpc_header_key_is_legal(pair.key) || grpc_is_binary_header(pair.key) ||
            !grpc_header_nonbin_value_is_legal(pair.value))
            return error_set(error, STATUS_INVALID,
                             "the metadata \"%s\" cannot be sent: keys are lower-case, values "
                             "printable ASCII",
                             metadata[0]);
    }
    return STATUS_OK;
}

int rpc_stream_open(struct rpc_stream **out, struct rpc_channel *channel, const char *path,
                    int64_t timeout_us, const char *const *metadata, bool wait_for_ready, struct error *error)
{
    grpc_metadata pairs[MAX_PAIRS];
    size_t n_pairs = 0;
    int status = metadata_fill(pairs, &n_pairs, metadata, error);
    struct rpc_stream *stream = NULL;
    if (!status && !(stream = stream_new(channel, path, timeout_us)))
        status = error_set(error, STATUS_NO_MEMORY, "no memory for a call");
    if (!status && !wait_for_ready)
        give_another_chance(channel, stream);
    if (!status) {
        // Not waited for: with wait_for_ready it ends when the connection is there, and rpc_stream_cancel has
        // to work until then. rpc_stream_free collects it.
        grpc_op open = {.op = GRPC_OP_SEND_INITIAL_METADATA, .flags = header_flags(wait_for_ready)};
        open.data.send_initial_metadata.count = n_pairs;
        open.data.send_initial_metadata.metadata = pairs;
        if (!start(stream, &open, 1, &stream->open_tag)) {
            stream_delete(stream);
            status = error_set(error, STATUS_INTERNAL, "gRPC refused to open a call to %s", path);
        }
    }
    for (size_t i = 0; i < n_pairs; i++)
        grpc_slice_unref(pairs[i].value);
    if (!status)
        *out = stream;
    return status;
}

int rpc_stream_send(struct rpc_stream *stream, const void *bytes, size_t length)
{
    grpc_byte_buffer *buffer = rpc_buffer_from(bytes, length);
    grpc_op send = {.op = GRPC_OP_SEND_MESSAGE};
    send.data.send_message.send_message = buffer;
    bool sent = run(stream, &send, 1, &stream->send_tag);
    grpc_byte_buffer_destroy(buffer);
    return sent ? STATUS_OK : STATUS_UNAVAILABLE;
}

int rpc_stream_half_close(struct rpc_stream *stream)
{
    grpc_op close = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    return run(stream, &close, 1, &stream->send_tag) ? STATUS_OK : STATUS_UNAVAILABLE;
}

// The sentence of a call that is over.
static int verdict(const struct rpc_stream *stream, struct error *error)
{
    if (stream->code == GRPC_STATUS_OK)
        return STATUS_OK;
    size_t length = GRPC_SLICE_LENGTH(stream->details);
    const char *text = (const char *)GRPC_SLICE_START_PTR(stream->details);
    int status = rpc_status_from_grpc(stream->code);
    if (length == 0)
        return error_set(error, status, "%s", status_name(status));
    return error_set(error, status, "%.*s", (int)(length > 4096 ? 4096 : length), text);
}

static grpc_op status_op(struct rpc_stream *stream)
{
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &stream->trailers;
    op.data.recv_status_on_client.status = &stream->code;
    op.data.recv_status_on_client.status_details = &stream->details;
    return op;
}

static int receive_status(struct rpc_stream *stream, struct error *error)
{
    if (!stream->over) {
        grpc_op op = status_op(stream);
        if (!run(stream, &op, 1, &stream->receive_tag))
            return error_set(error, STATUS_INTERNAL, "gRPC lost the status of a call");
        stream->over = true;
    }
    return verdict(stream, error);
}

int rpc_stream_receive(struct rpc_stream *stream, uint8_t **bytes, size_t *length, struct error *error)
{
    if (stream->over)
        return verdict(stream, error);
    grpc_byte_buffer *buffer = NULL;
    grpc_op ops[2] = {{.op = GRPC_OP_RECV_MESSAGE}, {.op = GRPC_OP_RECV_INITIAL_METADATA}};
    ops[0].data.recv_message.recv_message = &buffer;
    ops[1].data.recv_initial_metadata.recv_initial_metadata = &stream->headers;
    run(stream, ops, stream->greeted ? 1 : 2, &stream->receive_tag);
    stream->greeted = true;
    if (!buffer)
        return receive_status(stream, error);
    *bytes = rpc_buffer_flatten(buffer, length);
    grpc_byte_buffer_destroy(buffer);
    if (*bytes)
        return 1;
    rpc_stream_cancel(stream);
    return error_set(error, STATUS_NO_MEMORY,
                     "no memory for a received message, or it cannot be decompressed");
}

const char *rpc_stream_metadata(struct rpc_stream *stream, const char *key)
{
    for (size_t i = 0; i < stream->headers.count; i++) {
        const grpc_metadata *pair = &stream->headers.metadata[i];
        if (grpc_slice_str_cmp(pair->key, key) != 0)
            continue;
        free(stream->value);
        size_t length = GRPC_SLICE_LENGTH(pair->value);
        stream->value = malloc(length + 1);
        if (!stream->value)
            return NULL;
        memcpy(stream->value, GRPC_SLICE_START_PTR(pair->value), length);
        stream->value[length] = '\0';
        return stream->value;
    }
    return NULL;
}

void rpc_stream_cancel(struct rpc_stream *stream)
{
    grpc_call_cancel(stream->call, NULL);
}

void rpc_stream_free(struct rpc_stream *stream)
{
    if (!stream)
        return;
    if (!stream->over)
        grpc_call_cancel(stream->call, NULL);
    wait_for(stream, &stream->open_tag);
    stream_delete(stream);
}

int rpc_call_unary(struct rpc_channel *channel, const char *path, const void *request, size_t request_bytes,
                   int64_t timeout_us, bool wait_for_ready, uint8_t **response, size_t *response_bytes,
                   struct error *error)
{
    struct rpc_stream *stream = stream_new(channel, path, timeout_us);
    if (!stream)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a call");
    if (!wait_for_ready)
        give_another_chance(channel, stream);
    grpc_byte_buffer *sent = rpc_buffer_from(request, request_bytes), *received = NULL;
    grpc_op ops[6] = {{.op = GRPC_OP_SEND_INITIAL_METADATA, .flags = header_flags(wait_for_ready)},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                      {.op = GRPC_OP_RECV_INITIAL_METADATA},
                      {.op = GRPC_OP_RECV_MESSAGE}};
    ops[1].data.send_message.send_message = sent;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &stream->headers;
    ops[4].data.recv_message.recv_message = &received;
    ops[5] = status_op(stream);
    int status;
    if (!run(stream, ops, 6, &stream->receive_tag))
        status = error_set(error, STATUS_INTERNAL, "gRPC refused to call %s", path);
    else
        status = verdict(stream, error);
    if (!status && !received)
        status = error_set(error, STATUS_INTERNAL, "%s ended well without an answer", path);
    if (!status && !(*response = rpc_buffer_flatten(received, response_bytes)))
        status = error_set(error, STATUS_NO_MEMORY, "no memory for the answer of %s", path);
    grpc_byte_buffer_destroy(sent);
    grpc_byte_buffer_destroy(received);
    stream_delete(stream);
    return status;
}
