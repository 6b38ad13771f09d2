// Figures, and the invariants between requests, slots, pages, credit and steps in flight, as code. Tests call
// scheduler_check after every event; a server never does (it walks everything and allocates).
#include "coordinator/scheduler_internal.h"

#include <stdio.h>
#include <stdlib.h>

void scheduler_stats(const struct scheduler *s, struct scheduler_stats *out)
{
    *out = (struct scheduler_stats){
        .waiting = s->waiting.count,
        .running = s->prefill.count + s->running.count,
        .slots_used = s->options.n_slots - s->n_free_slots,
        .pages_total = s->ready ? kv_ledger_total(s->ledger) : 0,
        .pages_free = s->ready ? kv_ledger_available(s->ledger) : 0,
        .steps_in_flight = s->n_flights,
        .steps = s->steps,
        .prompt_tokens = s->prompt_tokens,
        .output_tokens = s->output_tokens,
        .requests_done = s->requests_done,
    };
}

#define REQUIRE(condition)                                                                                   \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "scheduler_check: %s (%s:%d)\n", #condition, __FILE__, __LINE__);                \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

// Rows in flight that draw for one sequence, and how many draws they make.
static uint32_t rows_in_flight(const struct scheduler *s, const struct sequence *sequence, uint32_t *draws)
{
    uint32_t rows = 0;
    *draws = 0;
    for (uint32_t f = 0; f < s->n_flights; f++) {
        const struct flight *flight = &s->flights[(s->first_flight + f) % s->flights_capacity];
        for (uint32_t r = 0; r < flight->n_rows; r++) {
            const struct flight_row *row = &flight->rows[r];
            if (row->slot == sequence->slot && row->generation == sequence->generation && row->draws > 0) {
                rows++;
                *draws += row->draws;
            }
        }
    }
    return rows;
}

static void check_flights(const struct scheduler *s)
{
    REQUIRE(s->n_flights <= s->n_stages + 1 || !s->ready);
    for (uint32_t f = 0; f < s->n_flights; f++) {
        const struct flight *flight = &s->flights[(s->first_flight + f) % s->flights_capacity];
        uint32_t samples = 0, prompts = 0;
        for (uint32_t r = 0; r < flight->n_rows; r++) {
            samples += flight->rows[r].draws;
            prompts += flight->rows[r].n_scores;
        }
        REQUIRE(flight->number == s->next_number - s->n_flights + f);
        REQUIRE(flight->n_rows > 0 && samples == flight->n_samples && prompts == flight->n_prompts);
    }
}

static void check_slots(const struct scheduler *s)
{
    uint8_t *seen = calloc(s->options.n_slots, 1);
    REQUIRE(seen);
    for (uint32_t i = 0; i < s->n_free_slots; i++) {
        const struct sequence *sequence = &s->sequences[s->free_slots[i]];
        REQUIRE(!(seen[sequence->slot] & 1));
        seen[sequence->slot] |= 1;
        REQUIRE(!sequence->entry && sequence->table.count == 0 && !sequence->node.chain && !sequence->opened);
    }
    for (uint32_t i = 0; i < s->n_closing; i++) {
        REQUIRE(!(seen[s->closing[i]] & 2) && !s->sequences[s->closing[i]].opened);
        seen[s->closing[i]] |= 2;
    }
    for (uint32_t i = 0; i < s->options.n_slots; i++) {
        const struct sequence *sequence = &s->sequences[i];
        REQUIRE((sequence->entry == NULL) == (seen[i] & 1));
        REQUIRE(!sequence->entry || sequence->entry->choices[sequence->choice].slot == i);
    }
    free(seen);
}

static void check_pages(const struct scheduler *s)
{
    if (!s->ledger)
        return;
    uint32_t total = kv_ledger_total(s->ledger), held = 0;
    uint32_t *references = calloc(total + 1, sizeof(*references));
    REQUIRE(references);
    for (uint32_t i = 0; i < s->options.n_slots; i++) {
        const struct kv_table *table = &s->sequences[i].table;
        for (uint32_t p = 0; p < table->count; p++)
            references[table->pages[p]]++;
    }
    for (uint32_t page = 0; page < total; page++) {
        REQUIRE(references[page] == kv_ledger_references(s->ledger, page));
        held += references[page] > 0;
    }
    REQUIRE(held + kv_ledger_reserved(s->ledger) + kv_ledger_available(s->ledger) == total);
    free(references);
}

static void check_sequence(const struct scheduler *s, const struct entry *entry,
                           const struct sequence *sequence, uint64_t *draws_in_flight)
{
    uint32_t draws, rows = rows_in_flight(s, sequence, &draws);
    *draws_in_flight += draws;
    REQUIRE(sequence->entry == entry && sequence->unresulted == rows && rows <= MAX_AHEAD);
    REQUIRE(sequence->planned <= entry->max_outputs && sequence->outputs <= sequence->planned);
    REQUIRE(sequence->table.count * (uint64_t)KV_PAGE_POSITIONS >= sequence->position);
    REQUIRE(sequence->position <= request_positions(entry->spec, s->options.context));
    bool decodes = sequence->planned > 0 && sequence->planned < entry->max_outputs &&
                   (entry->drawn || entry->spec->n_choices == 1);
    REQUIRE(decodes ? sequence->node.chain == &s->ring || sequence->node.chain == &entry->stalled
                    : sequence->node.chain == NULL);
}

static void check_admitted(const struct scheduler *s, const struct entry *entry)
{
    uint64_t draws = 0;
    uint32_t live = 0, sharing = 0;
    for (uint32_t c = 0; c < entry->spec->n_choices; c++) {
        const struct choice *choice = &entry->choices[c];
        live += !choice->ended;
        REQUIRE(!choice->ended || choice->slot == NO_SLOT || !entry->drawn);
        REQUIRE(choice->ended || choice->slot != NO_SLOT);
        if (choice->slot == NO_SLOT)
            continue;
        const struct sequence *sequence = &s->sequences[choice->slot];
        check_sequence(s, entry, sequence, &draws);
        sharing += sequence->shares_last;
    }
    REQUIRE(live == entry->n_live && live > 0);
    REQUIRE(sharing == entry->n_sharing);
    REQUIRE(entry->reserved == scheduler_pages_left(s, entry));
    REQUIRE(entry->granted == entry->credit + draws + entry->emitted);
    REQUIRE(entry->credit == 0 || entry->stalled.count == 0);
}

static uint32_t check_list(const struct scheduler *s, const struct chain *chain, enum request_state state,
                           uint64_t *reserved, uint64_t *promised)
{
    uint32_t count = 0;
    for (const struct node *node = chain->head.next; node != &chain->head; node = node->next) {
        const struct entry *entry = (const struct entry *)node;
        REQUIRE(node->chain == chain && node->next->previous == node && entry->state == state);
        REQUIRE(scheduler_find(s, entry->spec->id) == entry);
        REQUIRE((entry->deadline_index == NO_DEADLINE) == (entry->spec->deadline_us == INT64_MAX));
        REQUIRE(entry->deadline_index == NO_DEADLINE || s->deadlines[entry->deadline_index] == entry);
        if (state == REQUEST_WAITING)
            REQUIRE(entry->reserved == 0 && entry->credit == entry->granted);
        else
            check_admitted(s, entry);
        *reserved += entry->reserved;
        *promised += entry->n_live + 1;
        count++;
    }
    REQUIRE(count == chain->count);
    return count;
}

void scheduler_check(const struct scheduler *s)
{
    uint64_t reserved = 0, promised = 0;
    check_flights(s);
    check_slots(s);
    check_pages(s);
    REQUIRE(check_list(s, &s->waiting, REQUEST_WAITING, &reserved, &promised) <= s->options.max_waiting);
    check_list(s, &s->prefill, REQUEST_PREFILL, &reserved, &promised);
    check_list(s, &s->running, REQUEST_RUNNING, &reserved, &promised);
    REQUIRE(s->ready || s->prefill.count + s->running.count + s->ring.count + s->n_flights == 0);
    REQUIRE(reserved == (s->ledger ? kv_ledger_reserved(s->ledger) : 0));
    REQUIRE(promised == s->queue.promised && s->queue.count + promised <= s->queue.capacity);
    for (uint32_t i = 1; i < s->n_deadlines; i++)
        REQUIRE(s->deadlines[(i - 1) / 2]->spec->deadline_us <= s->deadlines[i]->spec->deadline_us);
}
