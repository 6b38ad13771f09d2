// Health checks. A watcher is told each change; when its queue is full it is told the latest state as soon as
// there is room, so a slow one may miss a change and its reversal, never the state that holds. Watchers are
// the calls' contexts and live from the first message to on_done.
#include "coordinator/health.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

enum subject { SUBJECT_UNKNOWN, SUBJECT_READINESS, SUBJECT_LIVENESS };

struct watcher {
    struct watcher *previous, *next;
    struct rpc_call *call;
    enum subject subject;
    enum wire_health told; // last
};

struct health {
    pthread_mutex_t mutex; // for all below
    bool serving;
    struct watcher *watchers;
};

static enum subject subject_of(const char *service)
{
    if (service[0] == '\0' || strcmp(service, "strata.v1.Inference") == 0)
        return SUBJECT_READINESS;
    return strcmp(service, "liveness") == 0 ? SUBJECT_LIVENESS : SUBJECT_UNKNOWN;
}

static enum wire_health state_of(const struct health *health, enum subject subject)
{
    if (subject == SUBJECT_UNKNOWN)
        return WIRE_HEALTH_SERVICE_UNKNOWN;
    return subject == SUBJECT_LIVENESS || health->serving ? WIRE_HEALTH_SERVING : WIRE_HEALTH_NOT_SERVING;
}

static int send_state(struct rpc_call *call, enum wire_health state)
{
    struct wire_bytes bytes = {0};
    int status = wire_encode_health_response(&bytes, state);
    if (!status)
        status = rpc_call_send(call, bytes.data, bytes.length);
    wire_bytes_free(&bytes);
    return status;
}

// The service that a request names; false when it is malformed, and then the call has ended.
static bool read_request(struct rpc_call *call, const uint8_t *bytes, size_t length, enum subject *subject)
{
    struct arena arena = {0};
    struct error error = {0};
    const char *service = "";
    int status = wire_decode_health_request(&service, bytes, length, &arena, &error);
    if (status)
        rpc_call_finish(call, status, error.text);
    else
        *subject = subject_of(service);
    arena_free(&arena);
    return status == STATUS_OK;
}

static void on_check(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    struct health *health = service;
    enum subject subject;
    if (!read_request(call, bytes, length, &subject))
        return;
    if (subject == SUBJECT_UNKNOWN) {
        rpc_call_finish(call, STATUS_NOT_FOUND,
                        "health is known of \"\", \"strata.v1.Inference\" and \"liveness\"");
        return;
    }
    pthread_mutex_lock(&health->mutex);
    enum wire_health state = state_of(health, subject);
    pthread_mutex_unlock(&health->mutex);
    int status = send_state(call, state);
    rpc_call_finish(call, status, "the server is out of memory");
}

// Under the mutex. What does not fit now is said by on_watch_sent.
static void tell(struct health *health, struct watcher *watcher)
{
    enum wire_health state = state_of(health, watcher->subject);
    if (state != watcher->told && send_state(watcher->call, state) == STATUS_OK)
        watcher->told = state;
}

static void on_watch(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    struct health *health = service;
    enum subject subject;
    if (!read_request(call, bytes, length, &subject))
        return;
    struct watcher *watcher = calloc(1, sizeof(*watcher));
    if (!watcher) {
        rpc_call_finish(call, STATUS_NO_MEMORY, "the server is out of memory");
        return;
    }
    *watcher = (struct watcher){.call = call, .subject = subject, .told = WIRE_HEALTH_UNKNOWN};
    rpc_call_set_context(call, watcher);
    pthread_mutex_lock(&health->mutex);
    watcher->next = health->watchers;
    if (watcher->next)
        watcher->next->previous = watcher;
    health->watchers = watcher;
    tell(health, watcher);
    pthread_mutex_unlock(&health->mutex);
}

static void on_watch_sent(struct rpc_call *call, void *service, size_t queued)
{
    struct health *health = service;
    pthread_mutex_lock(&health->mutex);
    tell(health, rpc_call_context(call));
    pthread_mutex_unlock(&health->mutex);
}

static void on_watch_done(struct rpc_call *call, void *service, bool cancelled)
{
    struct health *health = service;
    struct watcher *watcher = rpc_call_context(call);
    if (!watcher)
        return;
    pthread_mutex_lock(&health->mutex);
    if (watcher->previous)
        watcher->previous->next = watcher->next;
    else
        health->watchers = watcher->next;
    if (watcher->next)
        watcher->next->previous = watcher->previous;
    pthread_mutex_unlock(&health->mutex);
    free(watcher);
}

int health_new(struct health **out, struct rpc_server *server)
{
    static const struct rpc_method check = {.path = "/grpc.health.v1.Health/Check", .on_message = on_check};
    static const struct rpc_method watch = {.path = "/grpc.health.v1.Health/Watch",
                                            .standing = true,
                                            .on_message = on_watch,
                                            .on_sent = on_watch_sent,
                                            .on_done = on_watch_done};
    struct health *health = calloc(1, sizeof(*health));
    if (!health)
        return STATUS_NO_MEMORY;
    pthread_mutex_init(&health->mutex, NULL);
    int status = rpc_server_add(server, &check, health);
    if (!status)
        status = rpc_server_add(server, &watch, health);
    if (status) {
        health_free(health);
        return status;
    }
    *out = health;
    return STATUS_OK;
}

void health_free(struct health *health)
{
    if (!health)
        return;
    pthread_mutex_destroy(&health->mutex);
    free(health);
}

void health_set_serving(struct health *health, bool serving)
{
    pthread_mutex_lock(&health->mutex);
    if (health->serving != serving) {
        health->serving = serving;
        for (struct watcher *watcher = health->watchers; watcher; watcher = watcher->next)
            tell(health, watcher);
    }
    pthread_mutex_unlock(&health->mutex);
}
