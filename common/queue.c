// A ring of records under one mutex, with a condition for each side.
#include "common/queue.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/status.h"

struct queue {
    pthread_mutex_t mutex;
    pthread_cond_t filled, drained;
    size_t record_bytes, capacity, first, count;
    bool closed;
    unsigned char ring[];
};

int queue_new(struct queue **out, size_t record_bytes, size_t capacity)
{
    size_t bytes;
    if (capacity == 0 || __builtin_mul_overflow(record_bytes, capacity, &bytes) ||
        __builtin_add_overflow(bytes, sizeof(struct queue), &bytes))
        return STATUS_INVALID;
    struct queue *queue = calloc(1, bytes);
    if (!queue)
        return STATUS_NO_MEMORY;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&queue->mutex, NULL);
    pthread_cond_init(&queue->filled, &monotonic);
    pthread_cond_init(&queue->drained, &monotonic);
    pthread_condattr_destroy(&monotonic);
    queue->record_bytes = record_bytes;
    queue->capacity = capacity;
    *out = queue;
    return STATUS_OK;
}

void queue_free(struct queue *queue)
{
    if (!queue)
        return;
    pthread_cond_destroy(&queue->filled);
    pthread_cond_destroy(&queue->drained);
    pthread_mutex_destroy(&queue->mutex);
    free(queue);
}

static int push(struct queue *queue, const void *record, bool wait)
{
    int status = STATUS_OK;
    pthread_mutex_lock(&queue->mutex);
    while (wait && !queue->closed && queue->count == queue->capacity)
        pthread_cond_wait(&queue->drained, &queue->mutex);
    if (queue->closed) {
        status = STATUS_UNAVAILABLE;
    } else if (queue->count == queue->capacity) {
        status = STATUS_EXHAUSTED;
    } else {
        size_t at = (queue->first + queue->count++) % queue->capacity;
        memcpy(queue->ring + at * queue->record_bytes, record, queue->record_bytes);
        pthread_cond_signal(&queue->filled);
    }
    pthread_mutex_unlock(&queue->mutex);
    return status;
}

int queue_try_push(struct queue *queue, const void *record)
{
    return push(queue, record, false);
}

int queue_push(struct queue *queue, const void *record)
{
    return push(queue, record, true);
}

static struct timespec deadline_after(int64_t timeout_us)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    int64_t nanoseconds = at.tv_nsec + timeout_us % 1000000 * 1000;
    at.tv_sec += timeout_us / 1000000 + nanoseconds / 1000000000;
    at.tv_nsec = nanoseconds % 1000000000;
    return at;
}

int queue_pop(struct queue *queue, void *record, int64_t timeout_us)
{
    struct timespec deadline = deadline_after(timeout_us > 0 ? timeout_us : 0);
    int status = STATUS_OK;
    pthread_mutex_lock(&queue->mutex);
    while (queue->count == 0 && !queue->closed && status == STATUS_OK) {
        if (timeout_us < 0)
            pthread_cond_wait(&queue->filled, &queue->mutex);
        else if (pthread_cond_timedwait(&queue->filled, &queue->mutex, &deadline) == ETIMEDOUT)
            status = STATUS_DEADLINE;
    }
    if (queue->count > 0) {
        memcpy(record, queue->ring + queue->first * queue->record_bytes, queue->record_bytes);
        queue->first = (queue->first + 1) % queue->capacity;
        queue->count--;
        pthread_cond_signal(&queue->drained);
        status = STATUS_OK;
    } else if (queue->closed) {
        status = STATUS_UNAVAILABLE;
    }
    pthread_mutex_unlock(&queue->mutex);
    return status;
}

size_t queue_count(struct queue *queue)
{
    pthread_mutex_lock(&queue->mutex);
    size_t count = queue->count;
    pthread_mutex_unlock(&queue->mutex);
    return count;
}

void queue_close(struct queue *queue)
{
    pthread_mutex_lock(&queue->mutex);
    queue->closed = true;
    pthread_cond_broadcast(&queue->filled);
    pthread_cond_broadcast(&queue->drained);
    pthread_mutex_unlock(&queue->mutex);
}
