// The queue of events from the scheduler to its caller. Records are small and point by index into two pools
// (prompt scores, alternatives) that start over whenever the queue is empty; all three grow to the most that
// one load ever needed and stay there. Room for the ends of every live request is kept from its submission
// on, so that a request can always end, memory or not. On the scheduler's thread.
#include "coordinator/scheduler_internal.h"

#include <stdlib.h>
#include <string.h>

static uint32_t grown(uint32_t capacity, uint64_t needed)
{
    uint64_t wanted = capacity ? capacity : 64;
    while (wanted < needed)
        wanted *= 2;
    return wanted > UINT32_MAX / 2 ? 0 : (uint32_t)wanted;
}

static bool grow_pool(void *pool, uint32_t *capacity, uint64_t needed, size_t bytes)
{
    if (needed <= *capacity)
        return true;
    uint32_t wanted = grown(*capacity, needed);
    void **where = pool;
    void *bigger = wanted ? realloc(*where, wanted * bytes) : NULL;
    if (!bigger)
        return false;
    *where = bigger;
    *capacity = wanted;
    return true;
}

static bool grow_ring(struct event_queue *queue, uint64_t needed)
{
    if (needed <= queue->capacity)
        return true;
    uint32_t wanted = grown(queue->capacity, needed);
    struct queued_event *bigger = wanted ? calloc(wanted, sizeof(*bigger)) : NULL;
    if (!bigger)
        return false;
    for (uint32_t i = 0; i < queue->count; i++)
        bigger[i] = queue->events[(queue->first + i) % queue->capacity];
    free(queue->events);
    queue->events = bigger;
    queue->first = 0;
    queue->capacity = wanted;
    return true;
}

bool events_make_room(struct event_queue *queue, uint32_t events, uint32_t scores, uint32_t tops)
{
    if (queue->count == 0)
        queue->n_scores = queue->n_tops = 0;
    return grow_ring(queue, (uint64_t)queue->count + queue->promised + events) &&
           grow_pool(&queue->scores, &queue->scores_capacity, (uint64_t)queue->n_scores + scores,
                     sizeof(*queue->scores)) &&
           grow_pool(&queue->tops, &queue->tops_capacity, (uint64_t)queue->n_tops + tops,
                     sizeof(*queue->tops));
}

struct queued_event *events_push(struct event_queue *queue, enum scheduler_event_kind kind,
                                 struct entry *entry, uint32_t choice)
{
    if (queue->count == queue->capacity)
        abort(); // room was made by whoever pushes
    struct queued_event *event = &queue->events[(queue->first + queue->count++) % queue->capacity];
    *event = (struct queued_event){.kind = kind, .entry = entry, .choice = choice, .token = -1};
    return event;
}

uint32_t events_add_tops(struct event_queue *queue, const struct token_logprob *tops, uint32_t count)
{
    uint32_t first = queue->n_tops;
    if (count)
        memcpy(queue->tops + first, tops, count * sizeof(*tops));
    queue->n_tops += count;
    return first;
}

void events_free(struct event_queue *queue)
{
    free(queue->events);
    free(queue->scores);
    free(queue->tops);
    memset(queue, 0, sizeof(*queue));
}

static void fill(const struct event_queue *queue, const struct queued_event *from,
                 struct scheduler_event *out)
{
    const struct entry *entry = from->entry;
    out->kind = from->kind;
    out->request = entry->spec->id;
    out->spec = entry->spec;
    out->choice = from->choice;
    out->token = from->token;
    out->logprob = from->logprob;
    out->tops = queue->tops + from->tops_first;
    out->n_tops = from->n_tops;
    out->position = from->position;
    out->scores = queue->scores + from->scores_first;
    out->n_scores = from->n_scores;
    out->finish = from->finish;
    out->matched_id = from->kind == SCHEDULER_CHOICE_END ? from->token : -1;
    out->status = entry->status;
    out->text[0] = '\0';
    if (from->kind == SCHEDULER_REQUEST_END)
        memcpy(out->text, entry->text, sizeof(out->text));
    out->cached_tokens = 0; // no prompt is found in the cache yet
    out->started_us = entry->started_us;
}

// A token that was queued before its choice was cut short: as if it had never been drawn.
static void take_back(struct scheduler *s, struct entry *entry)
{
    entry->emitted--;
    entry->credit++;
    s->output_tokens--;
    if (entry->state != REQUEST_DONE)
        scheduler_wake(s, entry);
}

bool scheduler_next_event(struct scheduler *s, struct scheduler_event *event)
{
    struct event_queue *queue = &s->queue;
    if (queue->retired)
        scheduler_forget(s, queue->retired);
    queue->retired = NULL;
    while (queue->count > 0) {
        struct queued_event *next = &queue->events[queue->first];
        queue->first = (queue->first + 1) % queue->capacity;
        queue->count--;
        bool cut = next->kind != SCHEDULER_REQUEST_END && next->entry->choices[next->choice].cut;
        if (cut && next->kind == SCHEDULER_TOKEN) {
            take_back(s, next->entry);
            continue;
        }
        if (cut && next->kind == SCHEDULER_CHOICE_END) {
            next->finish = FINISH_STOP;
            next->token = -1;
        }
        fill(queue, next, event);
        if (next->kind == SCHEDULER_REQUEST_END)
            queue->retired = next->entry;
        return true;
    }
    return false;
}
