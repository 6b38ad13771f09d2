// A bounded first-in first-out queue of fixed-size records between threads. Push and pop copy the record.
// Any number of producers and consumers. After queue_close, pushes fail and pops drain what is left.
#ifndef STRATA_QUEUE_H
#define STRATA_QUEUE_H

#include <stddef.h>
#include <stdint.h>

struct queue;

// `capacity` of at least 1.
int queue_new(struct queue **out, size_t record_bytes, size_t capacity);
void queue_free(struct queue *queue);
int queue_try_push(struct queue *queue,
                   const void *record); // STATUS_EXHAUSTED when full, STATUS_UNAVAILABLE when closed
int queue_push(struct queue *queue, const void *record); // waits for room; STATUS_UNAVAILABLE when closed
// Waits at most `timeout_us` (negative: for ever). 0 with a record, STATUS_DEADLINE on time-out,
// STATUS_UNAVAILABLE when closed and empty.
int queue_pop(struct queue *queue, void *record, int64_t timeout_us);
size_t queue_count(struct queue *queue);
void queue_close(struct queue *queue);

#endif
