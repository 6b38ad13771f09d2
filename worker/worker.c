// The worker's life outside of its device: the connection to the coordinator. One thread runs worker_run and
// receives; the outbox's thread sends; the device's thread (step_service) does the work. A lost connection
// ends the epoch but not the weights: the worker dials again, with growing pauses.
#include "worker/worker.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/arena.h"
#include "common/clock.h"
#include "common/gguf.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/model_spec.h"
#include "common/rpc_client.h"
#include "proto/wire.h"
#include "worker/link.h"
#include "worker/link_address.h"
#include "worker/outbox.h"
#include "worker/step_service.h"

enum {
    FIRST_PAUSE_US = 200000,
    LAST_PAUSE_US = 2000000,
    LEAVE_US = 2000000,
    HOST_BYTES = 65,
    NAME_BYTES = 128
};

struct worker {
    struct worker_options options;
    struct gguf *gguf;
    struct model_spec spec;
    struct link_listener *listener;
    struct step_trace *trace; // NULL: none
    struct step_service *service;
    struct outbox *outbox;
    struct arena arena;
    struct step_plan unwanted; // where a step is decoded that cannot be run
    char host[HOST_BYTES], name[NAME_BYTES], link_address[LINK_ADDRESS_BYTES];
    bool heard;    // the coordinator spoke on this connection
    bool farewell; // and said goodbye: the end of the connection is no surprise
    bool released; // it sent us away for good
    struct error why;
    // Under the mutex: what worker_stop and leave touch.
    pthread_mutex_t mutex;
    pthread_cond_t changed; // stopping, stream
    bool stopping;
    struct error broken; // its device, for good
    struct rpc_stream *stream;
};

static void say(void *context, const struct wire_worker_message *message)
{
    struct worker *worker = context;
    outbox_post(worker->outbox, message);
}

static void beat(void *context, struct wire_worker_message *message)
{
    struct worker *worker = context;
    step_service_beat(worker->service, message);
}

// The device's thread has said FAILED. The coordinator hangs up on a worker that closes its half of the
// stream, and has read everything by then; one that does not is not waited for.
static void leave(void *context, const char *device)
{
    struct worker *worker = context;
    int64_t at_us = clock_now_us() + LEAVE_US;
    struct timespec at = {.tv_sec = at_us / 1000000, .tv_nsec = at_us % 1000000 * 1000};
    log_error("%s is broken for this process, which ends: a new one has to go on", device);
    outbox_finish(worker->outbox);
    pthread_mutex_lock(&worker->mutex);
    error_set(&worker->broken, STATUS_INTERNAL, "%s is broken for this process; start a new one", device);
    while (worker->stream && !worker->stopping && clock_now_us() < at_us)
        pthread_cond_timedwait(&worker->changed, &worker->mutex, &at);
    pthread_mutex_unlock(&worker->mutex);
    worker_stop(worker);
}

// --- start and end ---

static void name_worker(struct worker *worker)
{
    if (gethostname(worker->host, sizeof(worker->host) - 1))
        snprintf(worker->host, sizeof(worker->host), "localhost");
    if (worker->options.name)
        snprintf(worker->name, sizeof(worker->name), "%s", worker->options.name);
    else
        snprintf(worker->name, sizeof(worker->name), "%s:%ld", worker->host, (long)getpid());
}

static int open_parts(struct worker *worker, struct error *error)
{
    const struct worker_options *options = &worker->options;
    char bound[LINK_ADDRESS_BYTES];
    int status = gguf_open(&worker->gguf, options->model, error);
    if (status)
        return status;
    status = model_spec_read(&worker->spec, worker->gguf, error);
    if (status) {
        error_wrap(error, "%s", options->model);
        return status;
    }
    status = link_listener_open(&worker->listener, options->listen_link, bound, sizeof(bound), error);
    if (!status)
        status = link_address_advertise(worker->link_address, sizeof(worker->link_address), bound,
                                        options->advertise_link, error);
    if (!status)
        status = outbox_new(&worker->outbox, beat, worker, error);
    if (!status && options->trace)
        status = step_trace_open(&worker->trace, options->trace, worker->name, error);
    if (status)
        return status;
    struct step_service_options service = {.device = options->device,
                                           .gguf = worker->gguf,
                                           .spec = &worker->spec,
                                           .listener = worker->listener,
                                           .no_nccl = options->no_nccl,
                                           .oversubscribe = options->oversubscribe,
                                           .memory = options->memory,
                                           .link_timeout_us = options->link_timeout_us,
                                           .trace = worker->trace,
                                           .say = say,
                                           .broken = leave,
                                           .context = worker};
    return step_service_new(&worker->service, &service, error);
}

int worker_new(struct worker **out, const struct worker_options *options, struct error *error)
{
    struct worker *worker = calloc(1, sizeof(*worker));
    if (!worker)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a worker");
    worker->options = *options;
    step_plan_init(&worker->unwanted);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&worker->mutex, NULL);
    pthread_cond_init(&worker->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    name_worker(worker);
    int status = open_parts(worker, error);
    if (status) {
        worker_free(worker);
        return status;
    }
    *out = worker;
    return STATUS_OK;
}

void worker_free(struct worker *worker)
{
    if (!worker)
        return;
    step_service_free(worker->service);
    step_trace_close(worker->trace);
    outbox_free(worker->outbox);
    link_listener_close(worker->listener);
    gguf_close(worker->gguf);
    arena_free(&worker->arena);
    step_plan_free(&worker->unwanted);
    pthread_cond_destroy(&worker->changed);
    pthread_mutex_destroy(&worker->mutex);
    free(worker);
}

void worker_stop(struct worker *worker)
{
    pthread_mutex_lock(&worker->mutex);
    worker->stopping = true;
    if (worker->stream)
        rpc_stream_cancel(worker->stream);
    pthread_cond_broadcast(&worker->changed);
    pthread_mutex_unlock(&worker->mutex);
}

static bool is_stopping(struct worker *worker)
{
    pthread_mutex_lock(&worker->mutex);
    bool stopping = worker->stopping;
    pthread_mutex_unlock(&worker->mutex);
    return stopping;
}

// --- one connection ---

// What arrived cannot be used: the epoch at hand is over, the connection is not.
static void report_failure(struct worker *worker, const struct error *error)
{
    uint64_t epoch = step_service_epoch(worker->service);
    struct wire_worker_message failed = {
        .kind = WIRE_FAILED, .epoch = epoch, .status = error->status, .text = error->text};
    if (epoch == 0) {
        log_debug("%s", error->text); // there is no epoch, or it is over already
        return;
    }
    log_warn("epoch %llu failed here: %s", (unsigned long long)epoch, error->text);
    step_service_abort(worker->service, epoch);
    say(worker, &failed);
}

static void report_flood(struct worker *worker, int status)
{
    struct error error;
    error_set(&error, status, "the coordinator queued more steps than a worker keeps");
    report_failure(worker, &error);
}

static void take_goodbye(struct worker *worker, const struct wire_coordinator_message *goodbye)
{
    const char *text = goodbye->text && *goodbye->text ? goodbye->text : "it gave no reason";
    log_info("the coordinator says goodbye: %s", text);
    worker->farewell = true;
    if (goodbye->retry)
        return;
    worker->released = true;
    error_set(&worker->why, STATUS_CANCELLED, "the coordinator at %s sent this worker away: %s",
              worker->options.coordinator, text);
}

// False: the connection is over.
static bool dispatch(struct worker *worker, const struct wire_coordinator_message *message)
{
    int status = STATUS_OK;
    switch (message->kind) {
    case WIRE_ASSIGN:
        log_info("epoch %llu: stage %u of %u", (unsigned long long)message->epoch, message->stage,
                 message->n_stages);
        status = step_service_assign(worker->service, message);
        break;
    case WIRE_CONNECT:
        status = step_service_connect(worker->service, message);
        break;
    case WIRE_STEP:
        status = step_service_step(worker->service, message->plan);
        break;
    case WIRE_ABORT:
        log_info("epoch %llu is over: %s", (unsigned long long)message->epoch,
                 message->text ? message->text : "");
        step_service_abort(worker->service, message->epoch);
        break;
    case WIRE_GOODBYE:
        take_goodbye(worker, message);
        return false;
    case WIRE_COORDINATOR_HEARTBEAT:
        break;
    }
    if (status)
        report_flood(worker, status);
    return true;
}

// Decodes into a plan of the service's, or, when it has none left, into one whose step will not run.
static bool take_message(struct worker *worker, const uint8_t *bytes, size_t length)
{
    struct error error = {0};
    struct step_plan *plan = step_service_borrow(worker->service);
    struct wire_coordinator_message message = {.plan = plan ? plan : &worker->unwanted};
    arena_reset(&worker->arena);
    int status = wire_decode_coordinator_message(&message, bytes, length, &worker->arena, &error);
    if (plan && (status || message.kind != WIRE_STEP))
        step_service_return(worker->service, plan);
    if (status) {
        error_wrap(&error, "a message of the coordinator's makes no sense");
        report_failure(worker, &error);
        return true;
    }
    worker->heard = true;
    if (!plan && message.kind == WIRE_STEP) {
        report_flood(worker, STATUS_EXHAUSTED);
        return true;
    }
    return dispatch(worker, &message);
}

static int say_hello(struct worker *worker, struct rpc_stream *stream)
{
    struct wire_bytes bytes = {0};
    struct wire_worker_message hello = {.kind = WIRE_HELLO,
                                        .worker = worker->name,
                                        .host = worker->host,
                                        .link_address = worker->link_address,
                                        .protocol = WIRE_POOL_PROTOCOL,
                                        .fingerprint = gguf_fingerprint(worker->gguf),
                                        .pid = (uint64_t)getpid()};
    step_service_describe(worker->service, &hello);
    int status = wire_encode_worker_message(&bytes, &hello);
    if (!status)
        status = rpc_stream_send(stream, bytes.data, bytes.length);
    wire_bytes_free(&bytes);
    return status;
}

static void set_stream(struct worker *worker, struct rpc_stream *stream)
{
    pthread_mutex_lock(&worker->mutex);
    worker->stream = stream;
    pthread_cond_broadcast(&worker->changed);
    if (stream && worker->stopping)
        rpc_stream_cancel(stream);
    pthread_mutex_unlock(&worker->mutex);
}

// Until the stream ends. `error` has the reason when there is one.
static void converse(struct worker *worker, struct rpc_stream *stream, struct error *error)
{
    uint8_t *bytes;
    size_t length;
    bool more = true;
    // A failed hello is no reason to leave: the receive below says why the stream is gone.
    if (say_hello(worker, stream) == STATUS_OK)
        outbox_attach(worker->outbox, stream);
    while (more && rpc_stream_receive(stream, &bytes, &length, error) == 1) {
        more = take_message(worker, bytes, length);
        free(bytes);
    }
    rpc_stream_cancel(stream);
    outbox_detach(worker->outbox);
}

static int connect_once(struct worker *worker, struct error *error)
{
    struct rpc_channel_options options = {.max_message_bytes = MAX_POOL_MESSAGE_BYTES,
                                          .tls_ca = worker->options.tls_ca,
                                          .tls_cert = worker->options.tls_cert,
                                          .tls_key = worker->options.tls_key};
    struct rpc_channel *channel;
    struct rpc_stream *stream;
    worker->heard = worker->farewell = false;
    int status = rpc_channel_new(&channel, worker->options.coordinator, &options, error);
    if (status)
        return status;
    status = rpc_stream_open(&stream, channel, "/strata.v1.Pool/Join", 0, NULL, false, error);
    if (!status) {
        set_stream(worker, stream);
        converse(worker, stream, error);
        set_stream(worker, NULL);
        step_service_reset(worker->service);
        rpc_stream_free(stream);
    }
    rpc_channel_free(channel);
    return status;
}

// --- again and again ---

static void pause_for(struct worker *worker, int64_t us)
{
    int64_t at_us = clock_now_us() + us;
    struct timespec at = {.tv_sec = at_us / 1000000, .tv_nsec = at_us % 1000000 * 1000};
    pthread_mutex_lock(&worker->mutex);
    while (!worker->stopping && clock_now_us() < at_us)
        pthread_cond_timedwait(&worker->changed, &worker->mutex, &at);
    pthread_mutex_unlock(&worker->mutex);
}

// The end of a connection, in the log: once, not at every attempt.
static void note_loss(struct worker *worker, const struct error *error, bool *noted)
{
    const char *text = error->status ? error->text : "the stream ended";
    if (worker->heard && !worker->farewell)
        log_warn("the coordinator at %s is lost: %s", worker->options.coordinator, text);
    else if (!worker->heard && !*noted)
        log_info("waiting for a coordinator at %s: %s", worker->options.coordinator, text);
    *noted = !worker->heard;
}

int worker_run(struct worker *worker, struct error *error)
{
    int64_t pause = FIRST_PAUSE_US, since = clock_now_us();
    bool noted = false;
    int status;
    log_info("worker %s: %s, links at %s", worker->name, gguf_path(worker->gguf), worker->link_address);
    while (!is_stopping(worker)) {
        struct error ended = {0};
        status = connect_once(worker, &ended);
        if (status == STATUS_INVALID)
            return error_set(error, status, "%s", ended.text); // an address or certificate that cannot work
        if (worker->released) {
            *error = worker->why;
            return error->status;
        }
        if (is_stopping(worker))
            break;
        note_loss(worker, &ended, &noted);
        if (worker->heard) {
            pause = FIRST_PAUSE_US;
            since = clock_now_us();
        }
        if (worker->options.connect_timeout_us > 0 &&
            clock_now_us() - since > worker->options.connect_timeout_us)
            return error_set(error, STATUS_DEADLINE, "no coordinator at %s for %.1f s: %s",
                             worker->options.coordinator, (double)worker->options.connect_timeout_us / 1e6,
                             ended.text);
        pause_for(worker, pause);
        pause = 2 * pause < LAST_PAUSE_US ? 2 * pause : LAST_PAUSE_US;
    }
    log_info("worker %s stops", worker->name);
    pthread_mutex_lock(&worker->mutex);
    status = worker->broken.status;
    if (status)
        *error = worker->broken;
    pthread_mutex_unlock(&worker->mutex);
    return status;
}
