// One call on the server. gRPC runs its operations one by one for us: a receive, a send and the notice that
// the call is over; each comes back as a tag on the thread of the call's lane, and only that thread runs
// callbacks. Sends from any thread queue up under the call's mutex, with one operation in flight.
//
// The call is over for its service (on_done) when gRPC has reported its end and no operation is pending; the
// gRPC side is given back right then. The record itself stays until the last reference is dropped.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "common/rpc_internal.h"

enum { MAX_HEADERS = 8 };

struct rpc_call {
    struct rpc_server *server; // not touched after on_done
    struct rpc_lane *lane;
    const struct rpc_method_entry *entry; // NULL: refused, no callbacks
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array arrived;
    grpc_byte_buffer *inbox;
    int end_was_bad; // written by gRPC: the call ended other than by our status
    struct rpc_tag accept_tag, receive_tag, send_tag, close_tag;
    atomic_uint references;
    struct rpc_call *previous, *next; // in the server's list of standing calls, under its mutex
    // Set when the call is accepted, then constant:
    char *metadata; // key NUL value NUL ... NUL
    char *peer;
    int64_t deadline_us;
    void *context;

    pthread_mutex_t mutex; // for all below
    bool receiving, sending, ended /* gRPC said so */;
    bool over;   // finished, aborted or ended: nothing more is queued
    bool broken; // a send failed or the call was cancelled by us: nothing more is started
    bool finishing, status_started, greeted, aborted;
    bool send_has_message;
    int code;
    grpc_slice sentence;
    grpc_byte_buffer **outbox; // a ring; its first is in flight while send_has_message
    size_t outbox_first, outbox_count, outbox_capacity;
    grpc_metadata headers[MAX_HEADERS];
    size_t n_headers;
};

// --- life

void rpc_call_ref(struct rpc_call *call)
{
    atomic_fetch_add_explicit(&call->references, 1, memory_order_relaxed);
}

static void outbox_clear(struct rpc_call *call, size_t keep)
{
    while (call->outbox_count > keep) {
        call->outbox_count--;
        grpc_byte_buffer_destroy(
            call->outbox[(call->outbox_first + call->outbox_count) % call->outbox_capacity]);
    }
}

void rpc_call_unref(struct rpc_call *call)
{
    if (atomic_fetch_sub_explicit(&call->references, 1, memory_order_acq_rel) != 1)
        return;
    free(call->metadata);
    free(call->peer);
    free(call->outbox);
    pthread_mutex_destroy(&call->mutex);
    free(call);
}

// Gives gRPC's side back. No operation is pending, and `over` keeps other threads from starting one.
static void release(struct rpc_call *call)
{
    grpc_byte_buffer_destroy(call->inbox);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->arrived);
    pthread_mutex_lock(&call->mutex);
    outbox_clear(call, 0);
    for (size_t i = 0; i < call->n_headers; i++) {
        grpc_slice_unref(call->headers[i].key);
        grpc_slice_unref(call->headers[i].value);
    }
    call->n_headers = 0;
    grpc_slice_unref(call->sentence);
    call->sentence = grpc_empty_slice();
    pthread_mutex_unlock(&call->mutex);
    if (call->call)
        grpc_call_unref(call->call);
    call->call = NULL;
    rpc_call_unref(call);
}

void rpc_call_expect(struct rpc_lane *lane)
{
    struct rpc_call *call = calloc(1, sizeof(*call));
    if (!call) {
        log_error("no memory to wait for another call");
        return;
    }
    call->server = lane->server;
    call->lane = lane;
    call->accept_tag = (struct rpc_tag){RPC_ACCEPTED, call};
    call->receive_tag = (struct rpc_tag){RPC_RECEIVED, call};
    call->send_tag = (struct rpc_tag){RPC_SENT, call};
    call->close_tag = (struct rpc_tag){RPC_CLOSED, call};
    call->sentence = grpc_empty_slice();
    call->deadline_us = INT64_MAX;
    atomic_init(&call->references, 1);
    pthread_mutex_init(&call->mutex, NULL);
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->arrived);
    RPC_HAND_OVER(&call->accept_tag);
    pthread_mutex_lock(&lane->mutex);
    bool closed = lane->closed;
    grpc_call_error failure = GRPC_CALL_OK;
    if (!closed)
        failure = grpc_server_request_call(lane->server->server, &call->call, &call->details, &call->arrived,
                                           lane->queue, lane->queue, &call->accept_tag);
    pthread_mutex_unlock(&lane->mutex);
    if (failure != GRPC_CALL_OK)
        log_error("gRPC takes no more calls: %s", grpc_call_error_to_string(failure));
    if (closed || failure != GRPC_CALL_OK)
        release(call);
}

// --- sending

static bool start(struct rpc_call *call, const grpc_op *ops, size_t n_ops, struct rpc_tag *tag)
{
    RPC_HAND_OVER(tag);
    pthread_mutex_lock(&call->lane->mutex);
    bool closed = call->lane->closed;
    grpc_call_error failure =
        closed ? GRPC_CALL_OK : grpc_call_start_batch(call->call, ops, n_ops, tag, NULL);
    pthread_mutex_unlock(&call->lane->mutex);
    if (!closed && failure == GRPC_CALL_OK)
        return true;
    // The server has stopped, or it is a misuse on our side; the call cannot go on.
    if (!closed)
        log_error("gRPC refused an operation: %s", grpc_call_error_to_string(failure));
    call->broken = true;
    call->over = true;
    grpc_call_cancel_with_status(call->call, GRPC_STATUS_INTERNAL, "the server broke off", NULL);
    return false;
}

static size_t add_headers(struct rpc_call *call, grpc_op *op)
{
    if (call->greeted)
        return 0;
    call->greeted = true;
    *op = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
    op->data.send_initial_metadata.count = call->n_headers;
    op->data.send_initial_metadata.metadata = call->headers;
    return 1;
}

static size_t add_message(struct rpc_call *call, grpc_op *op)
{
    call->send_has_message = call->outbox_count > 0;
    if (!call->send_has_message)
        return 0;
    // Of several, only the last has to go out at once: the others may share its packet.
    *op = (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .flags = call->outbox_count > 1 ? GRPC_WRITE_BUFFER_HINT : 0};
    op->data.send_message.send_message = call->outbox[call->outbox_first];
    return 1;
}

static size_t add_status(struct rpc_call *call, grpc_op *op)
{
    if (!call->finishing || call->outbox_count > 1)
        return 0;
    call->status_started = true;
    *op = (grpc_op){.op = GRPC_OP_SEND_STATUS_FROM_SERVER};
    op->data.send_status_from_server.status = (grpc_status_code)call->code;
    op->data.send_status_from_server.status_details = &call->sentence;
    return 1;
}

// Starts the next send when one is due. Under the mutex.
static void advance(struct rpc_call *call)
{
    if (call->sending || call->broken || call->ended || call->status_started ||
        (call->outbox_count == 0 && !call->finishing))
        return;
    grpc_op ops[3];
    size_t n_ops = add_headers(call, &ops[0]);
    n_ops += add_message(call, &ops[n_ops]);
    n_ops += add_status(call, &ops[n_ops]);
    call->sending = start(call, ops, n_ops, &call->send_tag);
}

// Room for one more in the ring. Under the mutex.
static int outbox_reserve(struct rpc_call *call)
{
    if (call->outbox_count < call->outbox_capacity)
        return STATUS_OK;
    size_t capacity = call->outbox_capacity ? call->outbox_capacity * 2 : 8;
    grpc_byte_buffer **ring = malloc(capacity * sizeof(*ring));
    if (!ring)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < call->outbox_count; i++)
        ring[i] = call->outbox[(call->outbox_first + i) % call->outbox_capacity];
    free(call->outbox);
    call->outbox = ring;
    call->outbox_first = 0;
    call->outbox_capacity = capacity;
    return STATUS_OK;
}

int rpc_call_send(struct rpc_call *call, const void *bytes, size_t length)
{
    pthread_mutex_lock(&call->mutex);
    int status = STATUS_OK;
    if (call->over)
        status = STATUS_CANCELLED;
    else if (call->outbox_count >= call->server->max_queued)
        status = STATUS_EXHAUSTED;
    else
        status = outbox_reserve(call);
    if (!status) {
        size_t at = (call->outbox_first + call->outbox_count++) % call->outbox_capacity;
        call->outbox[at] = rpc_buffer_from(bytes, length);
        advance(call);
    }
    pthread_mutex_unlock(&call->mutex);
    return status;
}

int rpc_call_set_initial_metadata(struct rpc_call *call, const char *key, const char *value)
{
    grpc_metadata pair = {.key = grpc_slice_from_copied_string(key),
                          .value = grpc_slice_from_copied_string(value)};
    int status = STATUS_OK;
    pthread_mutex_lock(&call->mutex);
    if (!grpc_header_key_is_legal(pair.key) || grpc_is_binary_header(pair.key) ||
        !grpc_header_nonbin_value_is_legal(pair.value))
        status = STATUS_INVALID;
    else if (call->over || call->greeted)
        status = STATUS_CANCELLED;
    else if (call->n_headers == MAX_HEADERS)
        status = STATUS_EXHAUSTED;
    else
        call->headers[call->n_headers++] = pair;
    pthread_mutex_unlock(&call->mutex);
    if (status) {
        grpc_slice_unref(pair.key);
        grpc_slice_unref(pair.value);
    }
    return status;
}

static void set_verdict(struct rpc_call *call, int code, const char *text)
{
    grpc_slice_unref(call->sentence);
    call->code = code;
    call->sentence = code == GRPC_STATUS_OK ? grpc_empty_slice() : rpc_slice_text(text);
    call->finishing = true;
    call->over = true;
}

void rpc_call_finish(struct rpc_call *call, int status, const char *text)
{
    pthread_mutex_lock(&call->mutex);
    if (!call->over) {
        set_verdict(call, rpc_status_to_grpc(status), text);
        advance(call);
    }
    pthread_mutex_unlock(&call->mutex);
}

void rpc_call_abort(struct rpc_call *call, int status, const char *text)
{
    pthread_mutex_lock(&call->mutex);
    if (!call->ended && !call->broken && !call->status_started) {
        call->aborted = true;
        set_verdict(call, rpc_status_to_grpc(status), text);
        outbox_clear(call, call->sending && call->send_has_message ? 1 : 0);
        if (call->sending) {
            // The message in flight may never move (a reader that stopped): the status overtakes it.
            char sentence[RPC_MAX_TEXT + 1];
            snprintf(sentence, sizeof(sentence), "%.*s", (int)GRPC_SLICE_LENGTH(call->sentence),
                     (const char *)GRPC_SLICE_START_PTR(call->sentence));
            call->broken = true;
            grpc_call_cancel_with_status(call->call, (grpc_status_code)call->code, sentence, NULL);
        } else {
            advance(call);
        }
    }
    pthread_mutex_unlock(&call->mutex);
}

// --- standing calls

static void stand(struct rpc_call *call)
{
    struct rpc_server *server = call->server;
    pthread_mutex_lock(&server->mutex);
    call->next = server->standing;
    if (call->next)
        call->next->previous = call;
    server->standing = call;
    bool stopping = server->stopping;
    pthread_mutex_unlock(&server->mutex);
    if (stopping)
        rpc_call_abort(call, STATUS_UNAVAILABLE, "the server stops");
}

static void stand_down(struct rpc_call *call)
{
    struct rpc_server *server = call->server;
    pthread_mutex_lock(&server->mutex);
    if (call->previous)
        call->previous->next = call->next;
    else
        server->standing = call->next;
    if (call->next)
        call->next->previous = call->previous;
    pthread_mutex_unlock(&server->mutex);
}

void rpc_call_end_standing(struct rpc_server *server)
{
    pthread_mutex_lock(&server->mutex);
    server->stopping = true;
    for (struct rpc_call *call = server->standing; call; call = call->next)
        rpc_call_abort(call, STATUS_UNAVAILABLE, "the server stops");
    pthread_mutex_unlock(&server->mutex);
}

// --- events

// Ends the call towards its service once nothing is pending.
static void end_if_complete(struct rpc_call *call)
{
    pthread_mutex_lock(&call->mutex);
    bool complete = call->ended && !call->receiving && !call->sending;
    bool cancelled = call->end_was_bad && !call->aborted;
    pthread_mutex_unlock(&call->mutex);
    if (!complete)
        return;
    if (call->entry && call->entry->method.standing)
        stand_down(call);
    if (call->entry && call->entry->method.on_done)
        call->entry->method.on_done(call, call->entry->service, cancelled);
    atomic_fetch_sub(&call->server->calls, 1);
    release(call);
}

static void receive(struct rpc_call *call)
{
    pthread_mutex_lock(&call->mutex);
    if (!call->over) {
        grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
        op.data.recv_message.recv_message = &call->inbox;
        call->receiving = start(call, &op, 1, &call->receive_tag);
    }
    pthread_mutex_unlock(&call->mutex);
}

// What came with the call outlives gRPC's side of it.
static void keep_arrival(struct rpc_call *call)
{
    size_t total = 1;
    for (size_t i = 0; i < call->arrived.count; i++)
        total += GRPC_SLICE_LENGTH(call->arrived.metadata[i].key) +
                 GRPC_SLICE_LENGTH(call->arrived.metadata[i].value) + 2;
    char *at = call->metadata = calloc(total, 1);
    for (size_t i = 0; at && i < call->arrived.count; i++) {
        const grpc_metadata *pair = &call->arrived.metadata[i];
        if (grpc_is_binary_header(pair->key))
            continue;
        memcpy(at, GRPC_SLICE_START_PTR(pair->key), GRPC_SLICE_LENGTH(pair->key));
        at += GRPC_SLICE_LENGTH(pair->key) + 1;
        memcpy(at, GRPC_SLICE_START_PTR(pair->value), GRPC_SLICE_LENGTH(pair->value));
        at += GRPC_SLICE_LENGTH(pair->value) + 1;
    }
    char *peer = grpc_call_get_peer(call->call);
    call->peer = strdup(peer ? peer : "unknown");
    gpr_free(peer);
    gpr_timespec deadline = call->details.deadline;
    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) != 0) {
        gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
        call->deadline_us = clock_now_us() + left.tv_sec * 1000000 + left.tv_nsec / 1000;
    }
}

static const struct rpc_method_entry *find_method(struct rpc_server *server, grpc_slice path)
{
    for (size_t i = 0; i < server->n_methods; i++) {
        if (grpc_slice_str_cmp(path, server->methods[i].method.path) == 0)
            return &server->methods[i];
    }
    return NULL;
}

static void watch_for_end(struct rpc_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    op.data.recv_close_on_server.cancelled = &call->end_was_bad;
    pthread_mutex_lock(&call->mutex);
    if (!start(call, &op, 1, &call->close_tag))
        call->ended = true;
    pthread_mutex_unlock(&call->mutex);
}

static void on_accepted(struct rpc_call *call)
{
    struct rpc_server *server = call->server;
    unsigned before = atomic_fetch_add(&server->calls, 1);
    keep_arrival(call);
    watch_for_end(call);
    call->entry = find_method(server, call->details.method);
    char text[256];
    if (!call->entry) {
        size_t length = GRPC_SLICE_LENGTH(call->details.method);
        snprintf(text, sizeof(text), "this server has no method %.*s", (int)(length > 160 ? 160 : length),
                 (const char *)GRPC_SLICE_START_PTR(call->details.method));
        rpc_call_finish(call, STATUS_UNSUPPORTED, text);
    } else if (before >= server->max_calls) {
        call->entry = NULL;
        snprintf(text, sizeof(text), "this server has its limit of %u calls in flight: try again later",
                 server->max_calls);
        rpc_call_finish(call, STATUS_EXHAUSTED, text);
    } else {
        if (call->entry->method.standing)
            stand(call);
        if (call->entry->method.on_start)
            call->entry->method.on_start(call, call->entry->service);
        receive(call);
    }
    end_if_complete(call);
}

static bool is_over(struct rpc_call *call)
{
    pthread_mutex_lock(&call->mutex);
    bool over = call->over;
    pthread_mutex_unlock(&call->mutex);
    return over;
}

static void deliver(struct rpc_call *call)
{
    const struct rpc_method *method = &call->entry->method;
    size_t length = 0;
    uint8_t *bytes = rpc_buffer_flatten(call->inbox, &length);
    grpc_byte_buffer_destroy(call->inbox);
    call->inbox = NULL;
    if (!bytes) {
        rpc_call_abort(call, STATUS_NO_MEMORY, "no memory for the message, or it cannot be decompressed");
        return;
    }
    if (method->on_message)
        method->on_message(call, call->entry->service, bytes, length);
    free(bytes);
    if (method->client_streaming)
        receive(call);
}

static void on_received(struct rpc_call *call, bool success)
{
    pthread_mutex_lock(&call->mutex);
    call->receiving = false;
    pthread_mutex_unlock(&call->mutex);
    const struct rpc_method *method = &call->entry->method;
    if (is_over(call) || !success) {
        grpc_byte_buffer_destroy(call->inbox); // of a call that ended meanwhile
        call->inbox = NULL;
    } else if (call->inbox) {
        deliver(call);
    } else if (grpc_call_failed_before_recv_message(call->call)) {
        // Broken or cancelled, which also looks like the client's last word; on_done follows.
    } else if (!method->client_streaming) {
        rpc_call_abort(call, STATUS_INVALID, "the call carries no request message");
    } else if (method->on_half_close) {
        method->on_half_close(call, call->entry->service);
    }
}

static void on_sent(struct rpc_call *call, bool success)
{
    pthread_mutex_lock(&call->mutex);
    bool message = call->send_has_message;
    call->sending = false;
    call->send_has_message = false;
    if (message) {
        grpc_byte_buffer_destroy(call->outbox[call->outbox_first]);
        call->outbox_first = (call->outbox_first + 1) % call->outbox_capacity;
        call->outbox_count--;
    }
    size_t queued = call->outbox_count;
    if (success) {
        advance(call);
    } else {
        call->broken = true;
        call->over = true;
        outbox_clear(call, 0);
    }
    pthread_mutex_unlock(&call->mutex);
    if (success && message && call->entry->method.on_sent)
        call->entry->method.on_sent(call, call->entry->service, queued);
}

static void on_closed(struct rpc_call *call)
{
    pthread_mutex_lock(&call->mutex);
    call->ended = true;
    call->over = true;
    outbox_clear(call, call->send_has_message ? 1 : 0);
    pthread_mutex_unlock(&call->mutex);
}

void rpc_call_handle(struct rpc_lane *lane, const struct rpc_tag *tag, bool success)
{
    struct rpc_call *call = tag->call;
    switch (tag->event) {
    case RPC_ACCEPTED:
        if (!success) { // the server stops
            release(call);
            return;
        }
        rpc_call_expect(lane);
        on_accepted(call);
        return;
    case RPC_RECEIVED:
        on_received(call, success);
        break;
    case RPC_SENT:
        on_sent(call, success);
        break;
    case RPC_CLOSED:
        on_closed(call);
        break;
    case RPC_STOPPED:
        return;
    }
    end_if_complete(call);
}

// --- what callbacks and other threads ask

void rpc_call_set_context(struct rpc_call *call, void *context)
{
    call->context = context;
}

void *rpc_call_context(const struct rpc_call *call)
{
    return call->context;
}

int64_t rpc_call_deadline_us(const struct rpc_call *call)
{
    return call->deadline_us;
}

const char *rpc_call_peer(const struct rpc_call *call)
{
    return call->peer ? call->peer : "unknown";
}

const char *rpc_call_metadata(const struct rpc_call *call, const char *key)
{
    for (const char *at = call->metadata; at && *at;) {
        const char *value = at + strlen(at) + 1;
        if (strcmp(at, key) == 0)
            return value;
        at = value + strlen(value) + 1;
    }
    return NULL;
}
