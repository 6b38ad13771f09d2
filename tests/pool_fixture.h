// A worker pool with fake workers over a real connection. The test's thread drives the pool as the
// coordinator does; each fake worker has a thread that reads what it is sent. One pool at a time.
#ifndef STRATA_TESTS_POOL_FIXTURE_H
#define STRATA_TESTS_POOL_FIXTURE_H

#include <pthread.h>

#include "common/rpc_client.h"
#include "coordinator/worker_pool_internal.h"

enum { PATIENCE_US = 5000000, MAX_HEARD = 256, MAX_SEEN = 64 };

struct heard {
    struct wire_coordinator_message message; // its strings are copied below
    char text[512], id[32];
    uint64_t step;
    uint32_t rows;
};

struct fake {
    char name[32];
    struct rpc_channel *channel;
    struct rpc_stream *stream;
    pthread_t reader;
    bool reading;
    pthread_mutex_t mutex;
    struct heard heard[MAX_HEARD];
    uint32_t n_heard, n_taken;
    bool over;
};

extern struct worker_pool *pool;
extern struct gguf *gguf;
extern struct model_spec spec;
extern struct worker_pool_event seen[MAX_SEEN];
extern char seen_text[MAX_SEEN][512];
extern uint32_t n_seen;
extern void (*on_event)(const struct worker_pool_event *event);

struct fake *fake_dial(const char *name); // says nothing yet
struct wire_worker_message hello_of(struct fake *fake);
struct fake *fake_join(const char *name); // with that hello
void fake_say(struct fake *fake, const struct wire_worker_message *message);
void fake_leave(struct fake *fake);
// The fake's next message, which must be of this kind.
struct heard fake_expect(struct fake *fake, enum wire_coordinator_kind kind);
void fake_expect_end(struct fake *fake);

void pump_once(void);
void pump_for(int64_t us);
uint32_t expect_event(enum worker_pool_event_kind kind);
struct wire_pool expect_state(enum wire_pool_state state);

// Opens a pool for a small model; the options that matter to the test are given, the rest is filled in.
void open_pool(struct worker_pool_options options);
void open_pool_of(uint32_t layers, struct worker_pool_options options); // of a model of so many
void close_pool(void);
// Brings fakes[s] through stage s. Returns the epoch.
uint64_t serve(struct fake *const fakes[], uint32_t n);

#endif
