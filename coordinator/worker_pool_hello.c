// A worker's hello: whether it may join, and what the pool keeps of what it says. Run by the pool's thread.
#include "coordinator/worker_pool_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void pool_judge_hello(const struct worker_pool *pool, const struct wire_worker_message *hello, char *text,
                      size_t capacity)
{
    text[0] = '\0';
    size_t length = strlen(hello->worker);
    if (hello->protocol != WIRE_POOL_PROTOCOL)
        snprintf(text, capacity,
                 "the worker speaks version %u of the pool protocol, the coordinator version %d: install the "
                 "same release of Strata on both",
                 hello->protocol, WIRE_POOL_PROTOCOL);
    else if (hello->fingerprint != pool->fingerprint)
        snprintf(text, capacity,
                 "the worker has another model file: its fingerprint is %016" PRIx64
                 ", that of the coordinator's %s %016" PRIx64,
                 hello->fingerprint, gguf_path(pool->options.gguf), pool->fingerprint);
    else if (strcmp(hello->backend, "cpu") != 0 && strcmp(hello->backend, "cuda") != 0)
        snprintf(text, capacity, "the backend \"%s\" is unknown; it must be cpu or cuda", hello->backend);
    else if (pool->backend && strcmp(hello->backend, pool->backend) != 0)
        snprintf(text, capacity, "the worker's backend is %s; this pool is for %s", hello->backend,
                 pool->backend);
    else if (length == 0 || length > MAX_WORKER_NAME)
        snprintf(text, capacity, "the worker's name has %zu bytes; it must have 1 to %d", length,
                 MAX_WORKER_NAME);
    else if (hello->level == 0)
        snprintf(text, capacity, "the worker did not say its instruction-set level");
    else if (pool->plan.n_stages > 1 && hello->link_address[0] == '\0')
        snprintf(text, capacity, "the worker did not say where the previous stage can connect");
}

bool pool_copy_hello(struct member *member, const struct wire_worker_message *hello)
{
    member->name = strdup(hello->worker);
    member->backend = strdup(hello->backend);
    member->device = strdup(hello->device);
    member->link_address = strdup(hello->link_address);
    member->host = strdup(hello->host);
    member->device_id = strdup(hello->device_id);
    member->level = hello->level;
    member->nccl = hello->nccl;
    member->oversubscribe = hello->oversubscribe;
    member->pid = hello->pid;
    return member->name && member->backend && member->device && member->link_address && member->host &&
           member->device_id;
}

uint64_t pool_free_without_us(const struct worker_pool *pool, const struct member *member, uint64_t free_now)
{
    if (strcmp(member->backend, "cpu") != 0 || member->host[0] == '\0')
        return free_now;
    for (const struct member *other = pool->members; other; other = other->next) {
        if (other != member && other->host && strcmp(other->backend, "cpu") == 0 &&
            strcmp(other->host, member->host) == 0 && !other->leaving)
            free_now += other->weight_bytes + other->kv_bytes;
    }
    return free_now;
}
