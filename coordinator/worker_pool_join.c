// The streams of strata.v1.Pool/Join. gRPC threads run the callbacks at the top: they copy the bytes of a
// message into the inbox of its member and ring the bell, no more. The pool's thread runs the rest. A member
// is made when its call starts and freed by the pool's thread after it has seen that the call is over, so the
// two sides never disagree about its life.
#include "coordinator/worker_pool_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/log.h"

// --- gRPC threads ---

static void ring(struct worker_pool *pool)
{
    char stroke = 1;
    if (pool->options.bell)
        queue_try_push(pool->options.bell, &stroke); // a full bell rings already
}

// With the member's mutex held. The queue has room for every member once, and a member is in it at most once.
static void post(struct member *member)
{
    if (member->posted)
        return;
    member->posted = true;
    queue_try_push(member->pool->news, &member);
}

static bool enter(struct worker_pool *pool, const char **refusal)
{
    pthread_mutex_lock(&pool->door);
    bool admitted = !pool->closed && pool->streams < MAX_JOINED;
    *refusal = pool->closed ? "the coordinator is shutting down" : "the coordinator has 256 workers already";
    if (admitted)
        pool->streams++;
    pthread_mutex_unlock(&pool->door);
    return admitted;
}

static void join_start(struct rpc_call *call, void *service)
{
    struct worker_pool *pool = service;
    const char *refusal;
    if (!enter(pool, &refusal)) {
        rpc_call_finish(call, STATUS_UNAVAILABLE, refusal);
        return;
    }
    struct member *member = calloc(1, sizeof(*member));
    if (!member) {
        pthread_mutex_lock(&pool->door);
        pool->streams--;
        pthread_mutex_unlock(&pool->door);
        rpc_call_finish(call, STATUS_NO_MEMORY, "the coordinator is out of memory");
        return;
    }
    member->pool = pool;
    member->call = call;
    member->stage = -1;
    pthread_mutex_init(&member->mutex, NULL);
    rpc_call_ref(call);
    rpc_call_set_context(call, member);
    pthread_mutex_lock(&member->mutex);
    post(member); // even one that never says anything is listed, and falls silent
    pthread_mutex_unlock(&member->mutex);
    ring(pool);
}

static void join_message(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    struct member *member = rpc_call_context(call);
    if (!member)
        return;
    struct parcel *parcel = malloc(sizeof(*parcel) + length);
    if (parcel) {
        parcel->next = NULL;
        parcel->length = length;
        if (length)
            memcpy(parcel->bytes, bytes, length);
    }
    pthread_mutex_lock(&member->mutex);
    if (!parcel || member->waiting == MAX_INBOX) {
        member->flooded = true;
        free(parcel);
    } else {
        *(member->last ? &member->last->next : &member->first) = parcel;
        member->last = parcel;
        member->waiting++;
    }
    post(member);
    pthread_mutex_unlock(&member->mutex);
    ring(service);
}

// A worker that half-closes is leaving.
static void join_half_close(struct rpc_call *call, void *service)
{
    rpc_call_finish(call, STATUS_OK, "");
}

static void join_done(struct rpc_call *call, void *service, bool cancelled)
{
    struct member *member = rpc_call_context(call);
    if (!member)
        return;
    pthread_mutex_lock(&member->mutex);
    member->gone = true;
    post(member);
    pthread_mutex_unlock(&member->mutex);
    ring(service);
}

int worker_pool_attach(struct worker_pool *pool, struct rpc_server *server)
{
    static const struct rpc_method join = {
        .path = "/strata.v1.Pool/Join",
        .client_streaming = true,
        .on_start = join_start,
        .on_message = join_message,
        .on_half_close = join_half_close,
        .on_done = join_done,
    };
    return rpc_server_add(server, &join, pool);
}

// --- the pool's thread ---

bool pool_collect(struct worker_pool *pool, bool *flooded)
{
    struct member *member;
    if (queue_pop(pool->news, &member, 0) != STATUS_OK)
        return false;
    pthread_mutex_lock(&member->mutex);
    pool->reading = member;
    pool->inbox = member->first;
    member->first = member->last = NULL;
    member->waiting = 0;
    member->posted = false;
    pool->reading_gone = member->gone;
    *flooded = member->flooded;
    member->flooded = false;
    pthread_mutex_unlock(&member->mutex);
    return true;
}

void pool_member_free(struct member *member)
{
    struct worker_pool *pool = member->pool;
    for (struct parcel *parcel = member->first, *next; parcel; parcel = next) {
        next = parcel->next;
        free(parcel);
    }
    pthread_mutex_lock(&pool->door);
    pool->streams--;
    pthread_mutex_unlock(&pool->door);
    pthread_mutex_destroy(&member->mutex);
    rpc_call_unref(member->call);
    free(member->name);
    free(member->backend);
    free(member->device);
    free(member->link_address);
    free(member->host);
    free(member->device_id);
    free(member);
}

void pool_send_bytes(struct worker_pool *pool, struct member *member)
{
    if (member->leaving)
        return;
    int status = rpc_call_send(member->call, pool->bytes.data, pool->bytes.length);
    if (status == STATUS_EXHAUSTED || status == STATUS_NO_MEMORY)
        pool_cut(member, "it does not read what it is sent");
}

void pool_send(struct worker_pool *pool, struct member *member,
               const struct wire_coordinator_message *message)
{
    if (wire_encode_coordinator_message(&pool->bytes, message) == STATUS_OK)
        pool_send_bytes(pool, member);
    else
        pool_cut(member, "the coordinator is out of memory");
}

void pool_send_goodbye(struct worker_pool *pool, struct member *member, int status, const char *text,
                       bool retry)
{
    if (member->leaving)
        return;
    pool_send(
        pool, member,
        &(struct wire_coordinator_message){
            .kind = WIRE_GOODBYE, .epoch = pool->epoch, .status = status, .text = text, .retry = retry});
    if (member->leaving)
        return; // cut off while it was told
    member->leaving = true;
    rpc_call_finish(member->call, STATUS_OK, "");
}

void pool_cut(struct member *member, const char *text)
{
    if (member->leaving)
        return;
    member->leaving = true;
    snprintf(member->why, sizeof(member->why), "was cut off: %s", text);
    log_warn("worker %s is cut off: %s", member->name ? member->name : rpc_call_peer(member->call), text);
    rpc_call_abort(member->call, STATUS_UNAVAILABLE, text);
}
