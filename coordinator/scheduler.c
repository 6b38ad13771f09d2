// The scheduler's state: how requests, choices, slots and pools begin and end. What a step computes is
// decided in scheduler_plan.c, what its result means in scheduler_result.c. A pure state machine, owned and
// called by one thread; it owns every submitted request until the event after its last one is taken. Slots,
// page tables, flights and lists are sized at the start or when a pool gets ready, a request's own record at
// its submission: a step allocates nothing.
//
// A slot's life:
//
//          admit_next         OPEN is planned       sequence ends, or forks
//   (free) ----------> set aside ----------> open ----------------------> closing ---> (free)
//                          |                                     next step: CLOSE
//                          +---- released before it was opened: free at once
//
// When a sequence ends, its slot and pages are free at once, though steps in flight may still write to them.
// That is safe because every stage runs whole steps in the order of their numbers. Say step j holds rows of
// the ended sequence, and its page P or slot T goes to another sequence in step k; k was planned later, so j
// < k. On each stage, all of j is done before the first command of k: whatever j wrote to P lies there before
// k, and the new sequence reads only positions it has written itself, from k on, or that a COPY command of k
// or later has filled. Stages stand at different steps at one time, but no stage reads another's pages. A
// slot that the workers have open is closed by the first command of the next step, ahead of any OPEN of the
// same slot; the sampler state on the last stage goes the same way. Samples fed back are named by step and
// row, not by slot. When j's result arrives, its row names a generation of the slot that is over, and is
// dropped. Shared pages stay held by the sequences that share them. The simulation keeps a model of every
// page's contents and fails on any read that this argument forbids.
#include "coordinator/scheduler_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// --- the whole ---

static uint32_t power_of_two(uint32_t least)
{
    uint32_t size = 16;
    while (size < least && size < 1u << 30)
        size *= 2;
    return size;
}

static bool options_hold(const struct scheduler_options *o)
{
    return o->n_slots >= 1 && o->n_slots <= MAX_SLOTS && o->context >= 1 && o->context <= MAX_CONTEXT &&
           o->vocab_size >= 1 && o->vocab_size <= MAX_VOCABULARY && o->max_waiting >= 1 &&
           o->max_waiting <= 1u << 24 && o->step_budget >= 1 && o->step_budget <= MAX_STEP_TOKENS &&
           o->chunk >= 1;
}

static int allocate(struct scheduler *s)
{
    uint32_t n_slots = s->options.n_slots;
    uint32_t n_entries = s->options.max_waiting + n_slots; // that have not ended
    s->table_pages = (s->options.context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    s->n_buckets = power_of_two(n_entries);
    s->deadlines_capacity = n_entries;
    s->sequences = calloc(n_slots, sizeof(*s->sequences));
    s->table_memory = calloc((size_t)n_slots * s->table_pages, sizeof(*s->table_memory));
    s->free_slots = calloc(n_slots, sizeof(*s->free_slots));
    s->closing = calloc(n_slots, sizeof(*s->closing));
    s->buckets = calloc(s->n_buckets, sizeof(*s->buckets));
    s->deadlines = calloc(n_entries, sizeof(*s->deadlines));
    bool whole = s->sequences && s->table_memory && s->free_slots && s->closing && s->buckets && s->deadlines;
    return whole ? STATUS_OK : STATUS_NO_MEMORY;
}

int scheduler_new(struct scheduler **out, const struct scheduler_options *options)
{
    *out = NULL;
    if (!options_hold(options))
        return STATUS_INVALID;
    struct scheduler *s = calloc(1, sizeof(*s));
    if (!s)
        return STATUS_NO_MEMORY;
    s->options = *options;
    chain_init(&s->waiting);
    chain_init(&s->prefill);
    chain_init(&s->running);
    chain_init(&s->ring);
    if (allocate(s) != STATUS_OK) {
        scheduler_free(s);
        return STATUS_NO_MEMORY;
    }
    for (uint32_t i = options->n_slots; i-- > 0;) { // slot 0 goes out first
        s->sequences[i].slot = i;
        s->sequences[i].table.pages = s->table_memory + (size_t)i * s->table_pages;
        s->sequences[i].table.capacity = s->table_pages;
        s->free_slots[s->n_free_slots++] = i;
    }
    *out = s;
    return STATUS_OK;
}

void scheduler_free(struct scheduler *s)
{
    if (!s)
        return;
    for (uint32_t i = 0; s->buckets && i < s->n_buckets; i++) {
        while (s->buckets[i])
            scheduler_forget(s, s->buckets[i]);
    }
    events_free(&s->queue);
    kv_ledger_free(s->ledger);
    free(s->flights);
    free(s->flight_rows);
    free(s->sequences);
    free(s->table_memory);
    free(s->free_slots);
    free(s->closing);
    free(s->buckets);
    free(s->deadlines);
    free(s);
}

// --- requests by id ---

static struct entry **bucket_of(const struct scheduler *s, uint64_t id)
{
    return &s->buckets[(id * 0x9E3779B97F4A7C15u >> 32) & (s->n_buckets - 1)];
}

struct entry *scheduler_find(const struct scheduler *s, uint64_t id)
{
    struct entry *entry = *bucket_of(s, id);
    while (entry && entry->spec->id != id)
        entry = entry->bucket_next;
    return entry;
}

void scheduler_forget(struct scheduler *s, struct entry *entry)
{
    struct entry **where = bucket_of(s, entry->spec->id);
    while (*where != entry)
        where = &(*where)->bucket_next;
    *where = entry->bucket_next;
    request_free(entry->spec);
    free(entry);
}

// --- deadlines: a heap ---

static void deadline_place(struct scheduler *s, uint32_t index, struct entry *entry)
{
    s->deadlines[index] = entry;
    entry->deadline_index = index;
}

static void deadline_up(struct scheduler *s, uint32_t index, struct entry *entry)
{
    while (index > 0 && s->deadlines[(index - 1) / 2]->spec->deadline_us > entry->spec->deadline_us) {
        deadline_place(s, index, s->deadlines[(index - 1) / 2]);
        index = (index - 1) / 2;
    }
    deadline_place(s, index, entry);
}

static void deadline_down(struct scheduler *s, uint32_t index, struct entry *entry)
{
    for (;;) {
        uint32_t child = 2 * index + 1;
        if (child >= s->n_deadlines)
            break;
        if (child + 1 < s->n_deadlines &&
            s->deadlines[child + 1]->spec->deadline_us < s->deadlines[child]->spec->deadline_us)
            child++;
        if (s->deadlines[child]->spec->deadline_us >= entry->spec->deadline_us)
            break;
        deadline_place(s, index, s->deadlines[child]);
        index = child;
    }
    deadline_place(s, index, entry);
}

static void deadline_add(struct scheduler *s, struct entry *entry)
{
    entry->deadline_index = NO_DEADLINE;
    if (entry->spec->deadline_us != INT64_MAX)
        deadline_up(s, s->n_deadlines++, entry);
}

static void deadline_remove(struct scheduler *s, struct entry *entry)
{
    uint32_t index = entry->deadline_index;
    if (index == NO_DEADLINE)
        return;
    entry->deadline_index = NO_DEADLINE;
    struct entry *last = s->deadlines[--s->n_deadlines];
    if (last == entry)
        return;
    deadline_up(s, index, last); // one of the two moves it, if any
    deadline_down(s, last->deadline_index, last);
}

void scheduler_expire(struct scheduler *s, int64_t now_us)
{
    while (s->n_deadlines > 0 && s->deadlines[0]->spec->deadline_us <= now_us) {
        struct entry *entry = s->deadlines[0];
        char text[sizeof(entry->text)];
        if (entry->state == REQUEST_WAITING)
            snprintf(text, sizeof(text), "the deadline passed while the request waited for room");
        else
            snprintf(text, sizeof(text), "the deadline passed after %llu new tokens",
                     (unsigned long long)entry->emitted);
        scheduler_end_entry(s, entry, STATUS_DEADLINE, text);
    }
}

int64_t scheduler_wake_us(const struct scheduler *s)
{
    return s->n_deadlines > 0 ? s->deadlines[0]->spec->deadline_us : INT64_MAX;
}

// --- sequences ---

// Puts a sequence where it belongs now: in the ring when it may decode, in its request's stalled list when
// only credit is missing, in neither when all its draws are planned.
void scheduler_enroll(struct scheduler *s, struct sequence *sequence)
{
    struct entry *entry = sequence->entry;
    chain_remove(&sequence->node);
    if (sequence->planned < entry->max_outputs)
        chain_append(entry->credit > 0 ? &s->ring : &entry->stalled, &sequence->node);
}

// Credit came: all that waited for it line up again, in the order in which they stalled.
void scheduler_wake(struct scheduler *s, struct entry *entry)
{
    while (entry->credit > 0 && entry->stalled.count > 0)
        scheduler_enroll(s, (struct sequence *)entry->stalled.head.next);
}

uint32_t scheduler_pages_left(const struct scheduler *s, const struct entry *entry)
{
    if (entry->state == REQUEST_WAITING || entry->state == REQUEST_DONE)
        return 0;
    if (!entry->drawn) {
        const struct sequence *prompt = &s->sequences[entry->choices[0].slot];
        return (uint32_t)request_pages(entry->spec, s->options.context) - prompt->table.count;
    }
    uint32_t positions = request_positions(entry->spec, s->options.context);
    uint32_t each = (positions + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    uint32_t left = entry->n_sharing > 1 ? entry->n_sharing - 1 : 0; // the last to share copies nothing
    for (uint32_t c = 0; c < entry->spec->n_choices; c++) {
        if (entry->choices[c].slot != NO_SLOT)
            left += each - s->sequences[entry->choices[c].slot].table.count;
    }
    return left;
}

void scheduler_return_excess(struct scheduler *s, struct entry *entry)
{
    uint32_t left = scheduler_pages_left(s, entry);
    kv_ledger_unreserve(s->ledger, entry->reserved - left);
    entry->reserved = left;
}

void scheduler_release_choice(struct scheduler *s, struct entry *entry, uint32_t choice)
{
    struct sequence *sequence = sequence_of(s, entry, choice);
    chain_remove(&sequence->node);
    entry->n_sharing -= sequence->shares_last;
    kv_ledger_release(s->ledger, &sequence->table);
    if (sequence->opened && s->ready)
        s->closing[s->n_closing++] = sequence->slot;
    s->free_slots[s->n_free_slots++] = sequence->slot;
    *sequence = (struct sequence){
        .slot = sequence->slot, .generation = sequence->generation + 1, .table = sequence->table};
    entry->choices[choice].slot = NO_SLOT;
}

// --- ends ---

static void announce_choice_end(struct scheduler *s, struct entry *entry, uint32_t choice,
                                enum finish_reason finish, int32_t matched_id)
{
    struct queued_event *event = events_push(&s->queue, SCHEDULER_CHOICE_END, entry, choice);
    s->queue.promised--;
    event->finish = finish;
    event->token = matched_id;
    entry->choices[choice].ended = true;
    entry->n_live--;
}

void scheduler_end_choice(struct scheduler *s, struct entry *entry, uint32_t choice,
                          enum finish_reason finish, int32_t matched_id)
{
    announce_choice_end(s, entry, choice, finish, matched_id);
    if (entry->n_live == 0) {
        scheduler_end_entry(s, entry, STATUS_OK, "");
        return;
    }
    if (!entry->drawn)
        return; // the prompt is still needed; fork_choices gives the slot back
    entry->credit += sequence_of(s, entry, choice)->unresulted;
    scheduler_release_choice(s, entry, choice);
    scheduler_return_excess(s, entry);
    scheduler_wake(s, entry);
}

void scheduler_end_entry(struct scheduler *s, struct entry *entry, int status, const char *text)
{
    for (uint32_t c = 0; c < entry->spec->n_choices; c++) {
        if (!entry->choices[c].ended)
            announce_choice_end(s, entry, c, FINISH_CANCELLED, -1);
        if (entry->choices[c].slot != NO_SLOT)
            scheduler_release_choice(s, entry, c);
    }
    if (entry->reserved > 0)
        kv_ledger_unreserve(s->ledger, entry->reserved);
    entry->reserved = 0;
    deadline_remove(s, entry);
    chain_remove(&entry->node);
    entry->state = REQUEST_DONE;
    entry->status = status;
    snprintf(entry->text, sizeof(entry->text), "%s", text ? text : "");
    s->requests_done++;
    events_push(&s->queue, SCHEDULER_REQUEST_END, entry, 0);
    s->queue.promised--;
}

void scheduler_cancel(struct scheduler *s, uint64_t request, int status, const char *text, int64_t now_us)
{
    scheduler_expire(s, now_us);
    struct entry *entry = scheduler_find(s, request);
    if (entry && entry->state != REQUEST_DONE)
        scheduler_end_entry(s, entry, status, text);
}

void scheduler_stop_choice(struct scheduler *s, uint64_t request, uint32_t choice, int64_t now_us)
{
    scheduler_expire(s, now_us);
    struct entry *entry = scheduler_find(s, request);
    if (!entry || choice >= entry->spec->n_choices)
        return;
    entry->choices[choice].cut = true;
    if (!entry->choices[choice].ended)
        scheduler_end_choice(s, entry, choice, FINISH_STOP, -1);
}

void scheduler_credit(struct scheduler *s, uint64_t request, uint32_t tokens)
{
    struct entry *entry = scheduler_find(s, request);
    if (!entry)
        return;
    entry->credit += tokens;
    entry->granted += tokens;
    if (entry->state != REQUEST_DONE)
        scheduler_wake(s, entry);
}

// --- beginnings ---

// Whether an idle scheduler could hold it: STATUS_EXHAUSTED with the numbers when not.
static int check_fit(const struct scheduler *s, const struct request *request, struct error *error)
{
    if (request->n_choices > s->options.n_slots)
        return error_set(error, STATUS_EXHAUSTED,
                         "%u choices were asked for, this server runs at most %u sequences",
                         request->n_choices, s->options.n_slots);
    uint64_t pages = request_pages(request, s->options.context);
    if (s->ready && pages > kv_ledger_total(s->ledger))
        return error_set(
            error, STATUS_EXHAUSTED,
            "%u prompt tokens and up to %u new ones in %u choice%s need %llu KV pages of %d tokens, "
            "the pool has %u",
            request->n_prompt, request_max_outputs(request, s->options.context), request->n_choices,
            request->n_choices == 1 ? "" : "s", (unsigned long long)pages, KV_PAGE_POSITIONS,
            kv_ledger_total(s->ledger));
    return STATUS_OK;
}

static int check_submission(const struct scheduler *s, const struct request *request, struct error *error)
{
    int status = request_check(request, s->options.context, s->options.vocab_size, error);
    if (status != STATUS_OK)
        return status;
    if (scheduler_find(s, request->id))
        return error_set(error, STATUS_INTERNAL, "request %llu was submitted twice",
                         (unsigned long long)request->id);
    if (s->waiting.count >= s->options.max_waiting)
        return error_set(error, STATUS_EXHAUSTED, "%u requests wait already, the most this server queues",
                         s->waiting.count);
    return check_fit(s, request, error);
}

int scheduler_submit(struct scheduler *s, struct request *request, int64_t now_us, struct error *error)
{
    scheduler_expire(s, now_us);
    int status = check_submission(s, request, error);
    if (status != STATUS_OK)
        return status;
    struct entry *entry = calloc(1, sizeof(*entry) + request->n_choices * sizeof(entry->choices[0]));
    if (!entry || !events_make_room(&s->queue, request->n_choices + 1, 0, 0)) {
        free(entry);
        return error_set(error, STATUS_NO_MEMORY, "memory ran out while the request was queued");
    }
    s->queue.promised += request->n_choices + 1;
    entry->spec = request;
    entry->max_outputs = request_max_outputs(request, s->options.context);
    entry->n_live = request->n_choices;
    entry->credit = entry->granted = request->credit;
    chain_init(&entry->stalled);
    for (uint32_t c = 0; c < request->n_choices; c++)
        entry->choices[c].slot = NO_SLOT;
    chain_append(&s->waiting, &entry->node);
    struct entry **bucket = bucket_of(s, request->id);
    entry->bucket_next = *bucket;
    *bucket = entry;
    deadline_add(s, entry);
    return STATUS_OK;
}

// --- the pool ---

void scheduler_pool_lost(struct scheduler *s, const char *text, int64_t now_us)
{
    scheduler_expire(s, now_us);
    s->ready = false;
    s->n_flights = 0;
    s->n_closing = 0;
    while (s->prefill.count > 0)
        scheduler_end_entry(s, (struct entry *)s->prefill.head.next, STATUS_UNAVAILABLE, text);
    while (s->running.count > 0)
        scheduler_end_entry(s, (struct entry *)s->running.head.next, STATUS_UNAVAILABLE, text);
}

static int size_flights(struct scheduler *s, uint32_t n_stages)
{
    uint32_t capacity = n_stages + 1;
    struct flight *flights = calloc(capacity, sizeof(*flights));
    struct flight_row *rows = calloc((size_t)capacity * s->options.n_slots, sizeof(*rows));
    if (!flights || !rows) {
        free(flights);
        free(rows);
        return STATUS_NO_MEMORY;
    }
    for (uint32_t i = 0; i < capacity; i++)
        flights[i].rows = rows + (size_t)i * s->options.n_slots;
    free(s->flights);
    free(s->flight_rows);
    s->flights = flights;
    s->flight_rows = rows;
    s->flights_capacity = capacity;
    return STATUS_OK;
}

static void refuse_unfitting(struct scheduler *s)
{
    struct node *next;
    for (struct node *node = s->waiting.head.next; node != &s->waiting.head; node = next) {
        next = node->next;
        struct entry *entry = (struct entry *)node;
        struct error error = {0};
        if (check_fit(s, entry->spec, &error) != STATUS_OK)
            scheduler_end_entry(s, entry, error.status, error.text);
    }
}

int scheduler_pool_ready(struct scheduler *s, uint64_t epoch, uint32_t n_stages, uint32_t n_pages,
                         int64_t now_us)
{
    scheduler_pool_lost(s, "the pool was reassembled", now_us); // no-op when it was lost already
    if (n_stages < 1 || n_stages > MAX_STAGES)
        return STATUS_INVALID;
    struct kv_ledger *ledger;
    if (kv_ledger_new(&ledger, n_pages) != STATUS_OK)
        return STATUS_NO_MEMORY;
    if (size_flights(s, n_stages) != STATUS_OK) {
        kv_ledger_free(ledger);
        return STATUS_NO_MEMORY;
    }
    kv_ledger_free(s->ledger);
    s->ledger = ledger;
    s->epoch = epoch;
    s->n_stages = n_stages;
    s->next_number = 0;
    s->first_flight = 0;
    s->turn = 0;
    s->ready = true;
    refuse_unfitting(s);
    return STATUS_OK;
}
