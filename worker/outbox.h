// What a worker says to its coordinator: messages of any thread, sent in order by a thread of its own, with a
// heartbeat every second. So the thread that computes never waits for the network unless the outbox is full.
#ifndef STRATA_OUTBOX_H
#define STRATA_OUTBOX_H

#include "common/rpc_client.h"
#include "common/status.h"
#include "proto/wire.h"

struct outbox;

// Fills in a heartbeat; called by the outbox's thread.
typedef void outbox_beat(void *context, struct wire_worker_message *beat);

int outbox_new(struct outbox **out, outbox_beat *beat, void *context, struct error *error);
void outbox_free(struct outbox *outbox); // detached

// From now on messages go to `stream`; until then, and after detaching, they are dropped. To detach, cancel
// the stream first; afterwards the outbox no longer touches it.
void outbox_attach(struct outbox *outbox, struct rpc_stream *stream);
void outbox_detach(struct outbox *outbox);

// What was posted is sent, and then the stream's sending half is closed: to the coordinator we are leaving.
// Later messages are dropped. Does not wait.
void outbox_finish(struct outbox *outbox);

// Copies the message. Any thread; waits while the outbox is full.
void outbox_post(struct outbox *outbox, const struct wire_worker_message *message);

#endif
