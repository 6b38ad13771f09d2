// Shared by the files of the worker pool: worker_pool.c (the state machine), worker_pool_join.c (the
// streams), worker_pool_hello.c (who may join), worker_pool_plan.c (who gets which stage, how many pages
// fit), worker_pool_balance.c (deals by measured time).
#ifndef STRATA_WORKER_POOL_INTERNAL_H
#define STRATA_WORKER_POOL_INTERNAL_H

#include <pthread.h>

#include "common/shard_plan.h"
#include "coordinator/worker_pool.h"

enum {
    MAX_JOINED = 256,      // Join streams at once
    MAX_INBOX = 1024,      // messages of one worker that nobody has read yet
    MAX_WORKER_NAME = 128, // bytes
    MAX_LINK_ID = 256,     // bytes
    MAX_DEVICE_KIND = 192, // bytes
    MAX_DEVICE_KINDS = 16, // remembered
};

// One message as it came in.
struct parcel {
    struct parcel *next;
    size_t length;
    uint8_t bytes[];
};

enum member_state {
    MEMBER_NEW /* no hello yet */,
    MEMBER_JOINED,
    MEMBER_LOADING,
    MEMBER_LOADED,
    MEMBER_READY
};

// One Join stream, from its first message to its end.
struct member {
    struct worker_pool *pool;
    struct rpc_call *call;

    // Written by gRPC threads, read by the pool's: under `mutex`.
    pthread_mutex_t mutex;
    struct parcel *first, *last;
    uint32_t waiting;
    bool posted; // in pool->news
    bool gone;   // the stream is over
    bool flooded;

    // The pool's thread only.
    struct member *next; // in order of joining
    enum member_state state;
    bool leaving;  // told goodbye or cut off: whatever it still says is not heard
    char why[128]; // it was cut off
    char *name, *backend, *device, *link_address, *host, *device_id;
    uint32_t level, nccl;
    bool oversubscribe;
    char link_id[MAX_LINK_ID]; // of this epoch, for the edge to the next stage
    size_t link_id_length;
    uint64_t pid;
    uint64_t memory; // it would have free if it held nothing of ours
    uint32_t failures;
    int32_t stage; // in this epoch; -1: a spare
    uint32_t held_first, held_layers;
    uint32_t run_level;         // of the last assignment
    uint64_t layer_ns, head_ns; // what it measured, 0: nothing; at
    uint32_t measured_level;
    uint64_t weight_bytes, kv_bytes, done_bytes, total_bytes;
    uint64_t steps_done, compute_us, wait_us;
    int64_t heard_us, beat_us; // last message; last heartbeat
    double busy, wait_share;   // shares of the last seconds
};

// What a worker held when its stream broke: the process may still live and come back.
struct memory_of_member {
    char name[MAX_WORKER_NAME + 1];
    uint64_t pid;
    uint32_t held_first, held_layers;
};

// What a kind of device takes.
struct device_speed {
    char kind[MAX_DEVICE_KIND];
    uint64_t layer_ns; // 0: the place is free
    uint64_t head_ns;  // 0: it was never the last stage
};

struct better_deal {
    struct shard_plan plan;
    uint32_t least_pages; // that it must leave room for
};

struct worker_pool {
    struct worker_pool_options options;
    char *backend;
    struct shard_plan plan;
    struct shard_plan bytes_plan; // before anything is measured, and where it does not help
    uint64_t fingerprint;
    struct queue *news;   // of struct member *: those with something in the inbox, each at most once
    pthread_mutex_t door; // over `streams` and `closed`
    uint32_t streams;     // Join calls that have a member
    bool closed;

    // The pool's thread only.
    struct member *members;
    struct member *stages[MAX_STAGES]; // of this epoch
    enum wire_pool_state state;        // never DRAINING, which is the coordinator's business
    uint64_t epoch;
    uint32_t n_pages;
    uint32_t fitting_pages; // what a worker said would fit, until the pool is ready; 0: none did
    char problem[512];      // why the last assembly ended, "" = nothing went wrong
    struct device_speed speeds[MAX_DEVICE_KINDS];
    uint32_t next_speed;
    bool on_trial;            // `plan` is by time, and has not been loaded yet;
    struct shard_plan proven; // this is what it took the place of,
    uint32_t trial_pages;     // with room for so many pages
    bool redealt;             // these workers were dealt the layers again already, since the pool was ready
    uint32_t failed_trials;
    bool announce_ready, announce_lost;
    int64_t retry_at_us; // no assembly before; 0 = at once
    int64_t retry_us;    // the next back-off
    int64_t ready_us;    // since when the pool is ready
    int64_t grace_us;    // a broken link is explained by then or reported as it is; 0 = none is pending
    uint32_t grace_stage;
    char grace_text[512];
    int64_t tick_us;     // next time to look at heartbeats
    int64_t progress_us; // next progress line in the log

    struct memory_of_member past[MAX_STAGES];
    uint32_t next_past;

    struct parcel *inbox; // taken from `reading`, not handled yet
    struct member *reading;
    bool reading_gone; // its stream is over
    struct arena arena;
    struct step_result result;
    struct wire_bytes bytes;
    struct wire_stage described[MAX_STAGES];
    char problem_text[1024];
};

// --- worker_pool.c ---
bool pool_is_assembled(const struct worker_pool *pool); // loading, linking or ready
uint32_t pool_count_joined(const struct worker_pool *pool);

// --- worker_pool_join.c ---
// The inbox of the next member that has something: fills pool->reading, reading_gone and inbox. False: no
// news.
bool pool_collect(struct worker_pool *pool, bool *flooded);
void pool_member_free(struct member *member);
// Encodes and queues; a member that cannot take more is cut off.
void pool_send(struct worker_pool *pool, struct member *member,
               const struct wire_coordinator_message *message);
void pool_send_bytes(struct worker_pool *pool, struct member *member);
void pool_send_goodbye(struct worker_pool *pool, struct member *member, int status, const char *text,
                       bool retry);
void pool_cut(struct member *member, const char *text);

// --- worker_pool_hello.c ---
// Empty when the worker may join; otherwise the sentence to refuse it with.
void pool_judge_hello(const struct worker_pool *pool, const struct wire_worker_message *hello, char *text,
                      size_t capacity);
bool pool_copy_hello(struct member *member, const struct wire_worker_message *hello); // false: no memory
// What the worker's device would have free if Strata's workers held nothing on it: on a CPU host the others'
// weights and pages are missing from what it reports.
uint64_t pool_free_without_us(const struct worker_pool *pool, const struct member *member, uint64_t free_now);

// --- worker_pool_balance.c ---
void pool_take_speed(struct member *member, const struct wire_worker_message *loaded);
void pool_note_speeds(struct worker_pool *pool); // when all have loaded
// Whether the times of all these are known, and the layers are to be dealt by them.
bool pool_knows_costs(const struct worker_pool *pool, struct member *const stages[]);
// Whether the present deal fits these workers, with as many pages as the one by bytes.
bool pool_has_room(const struct worker_pool *pool, struct member *const stages[]);
// Whether a deal by time is so much better for these than the present one that it is worth a load.
bool pool_find_better(const struct worker_pool *pool, struct member *const stages[], struct better_deal *out);
void pool_begin_trial(struct worker_pool *pool, const struct better_deal *better);
void pool_give_up_trial(struct worker_pool *pool); // back to the deal before, if there is a trial
// Of an assembled pool's stage, and of its head; 0: not known.
uint64_t pool_layer_ns(const struct worker_pool *pool, uint32_t stage);
uint64_t pool_head_ns(const struct worker_pool *pool);

// --- worker_pool_plan.c ---
// Picks n_stages members and deals them the stages: those that failed least first, then in order of joining;
// among the picked, a stage goes to the one that holds most of its layers. False: too few are there.
bool pool_deal(const struct worker_pool *pool, struct member *stages[]);
void pool_remember(struct worker_pool *pool, const struct member *member);
void pool_recall(const struct worker_pool *pool, struct member *member);
// One instruction-set level for all the workers of a backend: the least.
uint32_t pool_common_level(struct member *const stages[], uint32_t n_stages, const struct member *member);
bool pool_shares_memory(const struct member *a, const struct member *b); // and processors
// How the edge from one worker to the next is linked.
enum wire_link pool_choose_link(const struct member *from, const struct member *to);
// Pages that fit beside the weights on every device; on a CPU host the workers share one memory.
int pool_count_pages(const struct worker_pool_options *options, const struct shard_plan *plan,
                     struct member *const stages[], uint32_t *n_pages, struct error *error);

#endif
