// What the scheduler's files share: its state, and the operations on it that more than one of them needs.
//   scheduler.c         start and end of requests, choices and pools
//   scheduler_plan.c    what the next step computes: the policy
//   scheduler_result.c  what a step computed
//   scheduler_events.c  the queue of events to the caller
//   scheduler_check.c   the invariants, and figures
#ifndef STRATA_SCHEDULER_INTERNAL_H
#define STRATA_SCHEDULER_INTERNAL_H

#include <stddef.h>

#include "coordinator/kv_ledger.h"
#include "coordinator/scheduler.h"

// --- lists whose nodes lie in their members ---

struct node {
    struct node *previous, *next;
    struct chain *chain; // the list it is in, NULL = none
};
struct chain {
    struct node head; // circular
    uint32_t count;
};

static inline void chain_init(struct chain *chain)
{
    chain->head.previous = chain->head.next = &chain->head;
    chain->count = 0;
}

static inline void chain_append(struct chain *chain, struct node *node)
{
    node->previous = chain->head.previous;
    node->next = &chain->head;
    node->previous->next = node->next->previous = node;
    node->chain = chain;
    chain->count++;
}

static inline void chain_remove(struct node *node) // from whichever list it is in, if any
{
    if (!node->chain)
        return;
    node->previous->next = node->next;
    node->next->previous = node->previous;
    node->chain->count--;
    node->chain = NULL;
}

// --- requests, choices, sequences ---

enum { NO_SLOT = UINT32_MAX, NO_DEADLINE = UINT32_MAX };

struct choice {
    uint32_t slot; // set aside at admission, NO_SLOT before it and after the end
    bool ended;    // its CHOICE_END is queued or taken
    bool cut;      // by a stop string: tokens still queued as events do not come out
};

// A request while the scheduler has it.
struct entry {
    struct node node; // in waiting, prefill or running; first, so that a node is its entry
    struct request *spec;
    struct entry *bucket_next;
    enum request_state state;
    uint32_t max_outputs; // of each choice
    uint32_t n_live;      // choices that have not ended
    bool drawn;           // the first tokens are there: every live choice has its own sequence
    uint32_t n_sharing;   // its sequences with shares_last
    uint32_t reserved;    // pages set aside for it and not yet taken: exactly what it can still take
    uint32_t deadline_index;
    // Output credit: granted == credit + draws planned without a result + tokens emitted.
    uint64_t credit, granted, emitted;
    struct chain stalled; // sequences that could decode if there were credit
    int64_t started_us;
    int status;
    char text[sizeof(((struct scheduler_event *)0)->text)];
    struct choice choices[];
};

// A slot. Before the first tokens are drawn, the slot of choice 0 holds the prompt; after that, each its
// choice.
struct sequence {
    struct node node;    // in the ring, in its entry's stalled list, or in none; first
    struct entry *entry; // NULL = the slot is free
    uint32_t slot;
    uint32_t choice;
    uint32_t generation;  // counts the sequences this slot has had: rows in flight name theirs
    bool opened;          // OPEN was planned: the workers have it, until a CLOSE is
    bool shares_last;     // a fork whose last prompt page is partly filled and not yet its own
    uint32_t position;    // the next one to plan
    uint32_t planned;     // draws planned, those with results included
    uint32_t outputs;     // tokens it got
    uint32_t unresulted;  // rows that draw, planned, without a result yet: at most MAX_AHEAD
    int32_t last_token;   // the latest known, once outputs > 0
    uint64_t source_step; // where its latest draw was planned, once planned > 0
    uint32_t source_row;
    struct kv_table table;
};

enum { MAX_AHEAD = 2 }; // one row computing, one queued behind it

// --- steps in flight ---

struct flight_row {
    uint32_t slot, generation;
    uint32_t position;
    uint32_t draws;
    uint32_t n_scores; // prompt logprobs expected, for positions from `position` + 1 on
    uint32_t top_logprobs;
    bool prompt_end; // the last chunk of a prompt
};
struct flight {
    uint64_t number;
    uint32_t n_rows, n_samples, n_prompts;
    struct flight_row *rows; // [n_slots]
};

// --- events to the caller ---

struct queued_event {
    enum scheduler_event_kind kind;
    struct entry *entry;
    uint32_t choice;
    int32_t token; // or the end id that matched
    float logprob;
    enum finish_reason finish;
    uint32_t position;
    uint32_t scores_first, n_scores;
    uint32_t tops_first, n_tops;
};

// A queue and the memory that its records point into. It grows to the most that was ever queued.
struct event_queue {
    struct queued_event *events; // a ring
    uint32_t first, count, capacity;
    uint32_t promised; // room for the ends of all requests that live
    struct step_prompt_logprob *scores;
    uint32_t n_scores, scores_capacity;
    struct token_logprob *tops;
    uint32_t n_tops, tops_capacity;
    struct entry *retired; // its REQUEST_END was taken: freed when the next event is
};

// --- the whole ---

struct scheduler {
    struct scheduler_options options;
    uint32_t table_pages; // entries of a page table

    struct sequence *sequences; // [n_slots]
    uint32_t *table_memory;     // their page tables
    uint32_t *free_slots;       // a stack
    uint32_t n_free_slots;
    uint32_t *closing; // free or forked slots that the workers still have open: closed by the next step
    uint32_t n_closing;

    struct chain waiting, prefill, running; // entries, oldest first
    struct chain ring;                      // sequences that may decode, least recently planned first
    struct entry **buckets;                 // by id
    uint32_t n_buckets;                     // a power of two
    struct entry **deadlines;               // a heap, the earliest first
    uint32_t n_deadlines, deadlines_capacity;
    struct event_queue queue;

    bool ready;
    uint64_t epoch;
    uint32_t n_stages;
    struct kv_ledger *ledger; // of the latest pool
    uint64_t next_number;
    uint32_t turn; // of the micro-batches
    struct flight *flights;
    struct flight_row *flight_rows;
    uint32_t first_flight, n_flights, flights_capacity; // n_stages + 1

    uint64_t steps, prompt_tokens, output_tokens, requests_done;
};

static inline struct sequence *sequence_of(struct scheduler *s, const struct entry *entry, uint32_t choice)
{
    return &s->sequences[entry->choices[choice].slot];
}

// scheduler.c
struct entry *scheduler_find(const struct scheduler *s, uint64_t id);
void scheduler_forget(struct scheduler *s, struct entry *entry); // out of the table by id, and freed
void scheduler_expire(struct scheduler *s, int64_t now_us);
void scheduler_release_choice(struct scheduler *s, struct entry *entry, uint32_t choice);
void scheduler_return_excess(struct scheduler *s, struct entry *entry);
uint32_t scheduler_pages_left(const struct scheduler *s, const struct entry *entry); // what it can still take
void scheduler_enroll(struct scheduler *s, struct sequence *sequence);
void scheduler_wake(struct scheduler *s, struct entry *entry);
// One choice ends; with the last one, and unless the caller ends it otherwise, its request.
void scheduler_end_choice(struct scheduler *s, struct entry *entry, uint32_t choice,
                          enum finish_reason finish, int32_t matched_id);
void scheduler_end_entry(struct scheduler *s, struct entry *entry, int status, const char *text);

// scheduler_events.c
// Room for events beyond those promised to the ends of requests; false when memory is out.
bool events_make_room(struct event_queue *queue, uint32_t events, uint32_t scores, uint32_t tops);
struct queued_event *events_push(struct event_queue *queue, enum scheduler_event_kind kind,
                                 struct entry *entry, uint32_t choice);
uint32_t events_add_tops(struct event_queue *queue, const struct token_logprob *tops, uint32_t count);
void events_free(struct event_queue *queue);

#endif
