// A ring of encoded messages and the thread that sends them. The buffers are kept, so that a steady load
// allocates nothing. Any thread posts; the worker's own thread attaches and detaches.
#include "worker/outbox.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "common/clock.h"

enum { OUTBOX_MESSAGES = 64, BEAT_US = 1000000 };

struct outbox {
    pthread_mutex_t mutex;
    pthread_cond_t changed; // messages, room, stream, end
    pthread_t thread;
    struct rpc_stream *stream; // NULL: detached
    bool sending, broken, ending;
    bool finishing; // the stream is closed behind the last message
    struct wire_bytes messages[OUTBOX_MESSAGES];
    size_t first, count;
    int64_t next_beat_us;
    outbox_beat *beat;
    void *context;
};

static void wait_until(struct outbox *outbox, int64_t deadline_us)
{
    struct timespec at = {.tv_sec = deadline_us / 1000000, .tv_nsec = deadline_us % 1000000 * 1000};
    pthread_cond_timedwait(&outbox->changed, &outbox->mutex, &at);
}

// Sends one message without the mutex. The buffer stays ours: its place is not given away before.
static void send_one(struct outbox *outbox, const struct wire_bytes *bytes)
{
    struct rpc_stream *stream = outbox->stream;
    outbox->sending = true;
    pthread_mutex_unlock(&outbox->mutex);
    int status = rpc_stream_send(stream, bytes->data, bytes->length);
    pthread_mutex_lock(&outbox->mutex);
    outbox->sending = false;
    outbox->broken |= status != STATUS_OK; // the receiving side learns why the stream ended
}

static void send_first(struct outbox *outbox)
{
    if (outbox->stream && !outbox->broken)
        send_one(outbox, &outbox->messages[outbox->first]);
    outbox->first = (outbox->first + 1) % OUTBOX_MESSAGES;
    outbox->count--;
    pthread_cond_broadcast(&outbox->changed);
}

static void send_beat(struct outbox *outbox, struct wire_bytes *bytes)
{
    struct wire_worker_message beat = {.kind = WIRE_HEARTBEAT};
    outbox->next_beat_us = clock_now_us() + BEAT_US;
    outbox->beat(outbox->context, &beat);
    if (wire_encode_worker_message(bytes, &beat) == STATUS_OK)
        send_one(outbox, bytes);
    pthread_cond_broadcast(&outbox->changed);
}

static void close_stream(struct outbox *outbox)
{
    struct rpc_stream *stream = outbox->stream;
    outbox->sending = true;
    pthread_mutex_unlock(&outbox->mutex);
    rpc_stream_half_close(stream);
    pthread_mutex_lock(&outbox->mutex);
    outbox->sending = false;
    outbox->broken = true;
    pthread_cond_broadcast(&outbox->changed);
}

static void *send_messages(void *argument)
{
    struct outbox *outbox = argument;
    struct wire_bytes beat = {0};
    pthread_mutex_lock(&outbox->mutex);
    while (!outbox->ending) {
        bool attached = outbox->stream && !outbox->broken;
        if (outbox->count > 0)
            send_first(outbox);
        else if (!attached)
            pthread_cond_wait(&outbox->changed, &outbox->mutex);
        else if (outbox->finishing)
            close_stream(outbox);
        else if (clock_now_us() >= outbox->next_beat_us)
            send_beat(outbox, &beat);
        else
            wait_until(outbox, outbox->next_beat_us);
    }
    pthread_mutex_unlock(&outbox->mutex);
    wire_bytes_free(&beat);
    return NULL;
}

int outbox_new(struct outbox **out, outbox_beat *beat, void *context, struct error *error)
{
    struct outbox *outbox = calloc(1, sizeof(*outbox));
    if (!outbox)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the outbox");
    outbox->beat = beat;
    outbox->context = context;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&outbox->mutex, NULL);
    pthread_cond_init(&outbox->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&outbox->thread, NULL, send_messages, outbox)) {
        free(outbox);
        return error_set(error, STATUS_IO, "cannot start the outbox's thread");
    }
    *out = outbox;
    return STATUS_OK;
}

void outbox_free(struct outbox *outbox)
{
    if (!outbox)
        return;
    pthread_mutex_lock(&outbox->mutex);
    outbox->ending = true;
    pthread_cond_broadcast(&outbox->changed);
    pthread_mutex_unlock(&outbox->mutex);
    pthread_join(outbox->thread, NULL);
    for (int i = 0; i < OUTBOX_MESSAGES; i++)
        wire_bytes_free(&outbox->messages[i]);
    pthread_cond_destroy(&outbox->changed);
    pthread_mutex_destroy(&outbox->mutex);
    free(outbox);
}

void outbox_attach(struct outbox *outbox, struct rpc_stream *stream)
{
    pthread_mutex_lock(&outbox->mutex);
    outbox->stream = stream;
    outbox->broken = outbox->finishing = false;
    outbox->next_beat_us = clock_now_us() + BEAT_US;
    pthread_cond_broadcast(&outbox->changed);
    pthread_mutex_unlock(&outbox->mutex);
}

void outbox_detach(struct outbox *outbox)
{
    pthread_mutex_lock(&outbox->mutex);
    outbox->broken = true; // nothing more is sent; what is queued drains into nothing
    pthread_cond_broadcast(&outbox->changed);
    while (outbox->sending || outbox->count > 0)
        pthread_cond_wait(&outbox->changed, &outbox->mutex);
    outbox->stream = NULL;
    pthread_mutex_unlock(&outbox->mutex);
}

void outbox_finish(struct outbox *outbox)
{
    pthread_mutex_lock(&outbox->mutex);
    outbox->finishing = true;
    pthread_cond_broadcast(&outbox->changed);
    pthread_mutex_unlock(&outbox->mutex);
}

static bool takes_messages(const struct outbox *outbox)
{
    return outbox->stream && !outbox->broken && !outbox->finishing;
}

void outbox_post(struct outbox *outbox, const struct wire_worker_message *message)
{
    pthread_mutex_lock(&outbox->mutex);
    while (outbox->count == OUTBOX_MESSAGES && takes_messages(outbox))
        pthread_cond_wait(&outbox->changed, &outbox->mutex);
    if (outbox->count < OUTBOX_MESSAGES && takes_messages(outbox)) {
        size_t at = (outbox->first + outbox->count) % OUTBOX_MESSAGES;
        if (wire_encode_worker_message(&outbox->messages[at], message) == STATUS_OK)
            outbox->count++;
        pthread_cond_broadcast(&outbox->changed);
    }
    pthread_mutex_unlock(&outbox->mutex);
}
