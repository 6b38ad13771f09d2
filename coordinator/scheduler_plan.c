// What the next step computes: the policy. On the scheduler's thread; touches nothing but scheduler state and
// the plan.
//
// Admission is first come, first served. The oldest waiting request is admitted when there are slots for all
// its choices and pages for the most it can come to need; until then nobody passes it, so a large request
// waits its turn but is never starved by small ones. Because a request's worst case is set aside at once,
// what was admitted always runs to its end, and nothing is ever taken from it. It is admitted at the moment
// when a step has room for its first chunk.
//
// Decodes come first. Sequences that may decode stand in a ring, least recently planned at its head; a step
// takes its share from the head and puts it back at the tail. With S stages and R sequences in the ring there
// are m = min(S, R) micro-batches: turn t takes R / m of them, and one more while t < R mod m. So each m
// steps in a row serve every sequence once, whoever came or went in between: there is no deal to redo, a
// burst is spread over the turns as it enters, and none waits longer than one round. On a single worker a
// step takes them all.
//
// A step is planned before the results it builds on: a row's token may be the sample of a row in flight. Up
// to S + 1 steps are in flight, S in the stages and one queued behind the first, but of each sequence at most
// two rows (the one computed, and the next): more would wait for its own feedback anyway, and would be thrown
// away when it ends. For the same reason a row that follows closely on its source holds up the whole step in
// front of the first stage. A row is "early" when its source step is in flight and fewer than S steps back.
// Early rows are left for a later step as long as there is anything else to compute; with nothing else,
// waiting in front of the first stage is no worse than waiting here. This is what keeps prompts flowing
// through all stages while few sequences decode, and what lets the micro-batches fall back into step after
// sequences have come and gone.
//
// Prompts fill what the decodes leave of the step's budget, oldest first, in chunks, several of them in one
// step if they fit. A chunk needs no result of the one before, so chunks of one prompt follow each other
// through the stages. Cuts fall on page boundaries where that costs less than half of the chunk. While a
// prompt wants to be read, decodes leave a quarter of the budget to it, so that neither starves the other.
//
// A row that draws spends one output credit of its request for each draw when it is planned. Without credit a
// sequence leaves the ring for its request's stalled list and comes back with the credit, and a prompt is
// read up to, but not including, its last token. So what is in flight never exceeds what the client's stream
// has room for, and a slow reader stops itself alone. No row is planned beyond max_tokens or the context.
//
// Rows of several draws (n choices) must wait: the choices need slots, pages and sampling states of their
// own, which depend on the tokens. fork_choices in scheduler_result.c goes on from there.
//
// If memory runs out while a row is added, the plan is put back to what it was before the row and the row's
// request ends with NO_MEMORY; the step goes out with what it has.
#include "coordinator/scheduler_internal.h"

// What opening sequences may add to one plan (histories, bans, biases, page tables) beyond the first that
// opens: keeps the message far below the pool protocol's limit.
enum { OPEN_WEIGHT = 1 << 20 };

enum outcome { PLANNED, SKIPPED, OUT_OF_MEMORY };

struct build {
    struct scheduler *s;
    struct step_plan *plan;
    struct flight *flight;
    uint32_t room;        // positions left of the budget
    uint64_t open_weight; // so far
    struct entry *failed; // memory ran out for its row: nothing is added after it
};

// --- commands ---

static bool add_closes(struct build *b)
{
    for (uint32_t i = 0; i < b->s->n_closing; i++) {
        if (!step_plan_add_command(b->plan, STEP_CLOSE, b->s->closing[i]))
            return false;
    }
    return true;
}

static bool history_needs_prompt(const struct request *spec)
{
    return spec->sampling.repetition_penalty != 1.0f;
}

static uint64_t weigh_open(const struct sequence *sequence, uint32_t pages)
{
    const struct request *spec = sequence->entry->spec;
    return (history_needs_prompt(spec) ? spec->n_prompt : 0) + 1 + spec->n_end_ids + spec->n_biases + pages;
}

// Sampling state from the start: nothing was drawn yet, or, for a choice of several, its first token.
static bool add_open(struct build *b, struct sequence *sequence)
{
    const struct request *spec = sequence->entry->spec;
    uint32_t n_prompt = history_needs_prompt(spec) ? spec->n_prompt : 0;
    uint32_t n_banned = spec->sampling.min_tokens > 0 ? spec->n_end_ids : 0;
    int64_t history = step_plan_add_tokens(b->plan, spec->prompt, n_prompt);
    int64_t output = step_plan_add_tokens(b->plan, &sequence->last_token, sequence->outputs);
    int64_t banned = step_plan_add_tokens(b->plan, spec->end_ids, n_banned);
    int64_t biases = step_plan_add_biases(b->plan, spec->biases, spec->n_biases);
    struct step_command *open = step_plan_add_command(b->plan, STEP_OPEN, sequence->slot);
    if (history < 0 || output < 0 || banned < 0 || biases < 0 || !open)
        return false;
    open->sampling = spec->sampling;
    open->choice = sequence->choice;
    open->history_first = (uint32_t)history;
    open->history_count = n_prompt + sequence->outputs;
    open->history_prompt = n_prompt;
    open->ban_first = (uint32_t)banned;
    open->ban_count = n_banned;
    open->bias_first = (uint32_t)biases;
    open->bias_count = spec->n_biases;
    return true;
}

static bool add_copy(struct build *b, uint32_t from, uint32_t to)
{
    struct step_command *copy = step_plan_add_command(b->plan, STEP_COPY, 0);
    if (!copy)
        return false;
    copy->copy_from = from;
    copy->copy_to = to;
    return true;
}

static bool add_pages(struct build *b, const struct sequence *sequence, uint32_t first)
{
    uint32_t count = sequence->table.count - first;
    int64_t pages = step_plan_add_pages(b->plan, sequence->table.pages + first, count);
    struct step_command *command = step_plan_add_command(b->plan, STEP_PAGES, sequence->slot);
    if (pages < 0 || !command)
        return false;
    command->table_first = first;
    command->pages_first = (uint32_t)pages;
    command->pages_count = count;
    return true;
}

// The sequence gets to be open on the workers, with writable pages from its position up to `end`.
static bool provide_pages(struct build *b, struct sequence *sequence, uint32_t end)
{
    struct kv_ledger *ledger = b->s->ledger;
    uint32_t reserved = kv_ledger_reserved(ledger), changed = sequence->table.count, copy_from = 0;
    uint32_t needed = (end + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    bool copies = false;
    if (sequence->shares_last) {
        uint32_t index = sequence->position / KV_PAGE_POSITIONS;
        copies = kv_ledger_own(ledger, &sequence->table, index, &copy_from);
        sequence->shares_last = false;
        sequence->entry->n_sharing--;
        changed = copies ? index : changed;
    }
    if (needed > sequence->table.count)
        kv_ledger_grow(ledger, &sequence->table, needed - sequence->table.count);
    sequence->entry->reserved -= reserved - kv_ledger_reserved(ledger);
    if (copies && !add_copy(b, copy_from, sequence->table.pages[changed]))
        return false;
    if (!sequence->opened) {
        if (!add_open(b, sequence))
            return false;
        b->open_weight += weigh_open(sequence, sequence->table.count);
        changed = 0;
    }
    return changed == sequence->table.count || add_pages(b, sequence, changed);
}

// --- rows ---

static bool opens_fit(const struct build *b, const struct sequence *sequence, uint32_t end)
{
    uint32_t pages = (end + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    return sequence->opened || b->open_weight == 0 ||
           b->open_weight + weigh_open(sequence, pages) <= OPEN_WEIGHT;
}

// Opens, pages and the row itself, with its tokens unless it takes a sample (tokens == NULL); all or nothing.
static struct step_row *add_row(struct build *b, struct sequence *sequence, uint32_t count,
                                const int32_t *tokens)
{
    struct step_plan *plan = b->plan;
    struct step_plan before = *plan;
    int64_t first = 0;
    struct step_row *row = NULL;
    if (provide_pages(b, sequence, sequence->position + count)) {
        first = tokens ? step_plan_add_tokens(plan, tokens, count) : 0;
        row = first >= 0 ? step_plan_add_row(plan) : NULL;
    }
    if (!row) {
        plan->n_commands = before.n_commands;
        plan->n_tokens = before.n_tokens;
        plan->n_pages = before.n_pages;
        plan->n_biases = before.n_biases;
        b->failed = sequence->entry;
        return NULL;
    }
    row->slot = sequence->slot;
    row->position = sequence->position;
    row->count = count;
    row->tokens_first = (uint32_t)first;
    return row;
}

// The row is whole: the sequence moves on, the flight remembers what to expect of it.
static void commit_row(struct build *b, struct sequence *sequence, const struct step_row *row,
                       bool prompt_end)
{
    uint32_t n_scores = row->logits == STEP_LOGITS_ALL ? row->count - (row->next_token < 0) : 0;
    b->flight->rows[b->plan->n_rows - 1] = (struct flight_row){
        .slot = sequence->slot,
        .generation = sequence->generation,
        .position = row->position,
        .draws = row->draws,
        .n_scores = n_scores,
        .top_logprobs = row->top_logprobs,
        .prompt_end = prompt_end,
    };
    b->flight->n_samples += row->draws;
    b->flight->n_prompts += n_scores;
    b->room -= row->count;
    sequence->opened = true;
    sequence->position += row->count;
    if (row->draws == 0)
        return;
    sequence->entry->credit -= row->draws;
    sequence->planned++;
    sequence->unresulted++;
    sequence->source_step = b->plan->number;
    sequence->source_row = b->plan->n_rows - 1;
}

static enum outcome plan_decode(struct build *b, struct sequence *sequence)
{
    struct entry *entry = sequence->entry;
    if (!opens_fit(b, sequence, sequence->position + 1))
        return SKIPPED;
    bool ahead = sequence->unresulted > 0;
    struct step_row *row = add_row(b, sequence, 1, ahead ? NULL : &sequence->last_token);
    if (!row)
        return OUT_OF_MEMORY;
    row->generated = true;
    row->from_sample = ahead;
    row->source_step = ahead ? sequence->source_step : 0;
    row->source_row = ahead ? sequence->source_row : 0;
    row->draws = 1;
    row->logits = STEP_LOGITS_LAST;
    row->logprobs = entry->spec->logprobs;
    row->top_logprobs = entry->spec->logprobs ? entry->spec->top_logprobs : 0;
    commit_row(b, sequence, row, false);
    scheduler_enroll(b->s, sequence);
    return PLANNED;
}

// How much of the prompt this step reads: 0 when nothing can be.
static uint32_t chunk_size(const struct build *b, const struct entry *entry, uint32_t done)
{
    uint32_t left = entry->spec->n_prompt - done;
    uint32_t draws = entry->max_outputs > 0 ? entry->spec->n_choices : 0;
    uint32_t chunk = left < b->s->options.chunk ? left : b->s->options.chunk;
    if (chunk > b->room)
        chunk = b->room;
    if (chunk == left && entry->credit < draws)
        chunk--; // the last position draws, and the stream has no room for that yet
    uint32_t cut = (done + chunk) / KV_PAGE_POSITIONS * KV_PAGE_POSITIONS;
    return chunk < left && cut > done && cut - done >= chunk / 2 ? cut - done : chunk;
}

static enum outcome plan_chunk(struct build *b, struct entry *entry, int64_t now_us)
{
    const struct request *spec = entry->spec;
    struct sequence *sequence = sequence_of(b->s, entry, 0);
    uint32_t count = chunk_size(b, entry, sequence->position);
    if (count == 0 || !opens_fit(b, sequence, sequence->position + count))
        return SKIPPED;
    uint32_t end = sequence->position + count;
    struct step_row *row = add_row(b, sequence, count, spec->prompt + sequence->position);
    if (!row)
        return OUT_OF_MEMORY;
    bool whole = end == spec->n_prompt;
    row->draws = whole && entry->max_outputs > 0 ? spec->n_choices : 0;
    row->must_wait = row->draws > 1;
    row->logits = spec->prompt_logprobs ? STEP_LOGITS_ALL
                  : row->draws > 0      ? STEP_LOGITS_LAST
                                        : STEP_LOGITS_NONE;
    row->next_token = spec->prompt_logprobs && !whole ? spec->prompt[end] : -1;
    row->logprobs = row->draws > 0 && spec->logprobs;
    row->top_logprobs = row->logprobs || spec->prompt_logprobs ? spec->top_logprobs : 0;
    commit_row(b, sequence, row, whole);
    b->s->prompt_tokens += count;
    if (entry->started_us == 0)
        entry->started_us = now_us;
    if (whole) {
        chain_remove(&entry->node);
        chain_append(&b->s->running, &entry->node);
        entry->state = REQUEST_RUNNING;
        if (row->draws == 1)
            scheduler_enroll(b->s, sequence);
    }
    return PLANNED;
}

// --- admission ---

static bool next_fits(const struct scheduler *s)
{
    if (s->waiting.count == 0)
        return false;
    const struct request *spec = ((const struct entry *)s->waiting.head.next)->spec;
    return spec->n_choices <= s->n_free_slots &&
           request_pages(spec, s->options.context) <= kv_ledger_available(s->ledger);
}

// The oldest waiting request gets slots and pages for all it can need; NULL when they are not there.
static struct entry *admit_next(struct scheduler *s)
{
    if (!next_fits(s))
        return NULL;
    struct entry *entry = (struct entry *)s->waiting.head.next;
    entry->reserved = (uint32_t)request_pages(entry->spec, s->options.context);
    kv_ledger_reserve(s->ledger, entry->reserved);
    for (uint32_t c = 0; c < entry->spec->n_choices; c++) {
        uint32_t slot = s->free_slots[--s->n_free_slots];
        entry->choices[c].slot = slot;
        s->sequences[slot].entry = entry;
        s->sequences[slot].choice = c;
    }
    chain_remove(&entry->node);
    chain_append(&s->prefill, &entry->node);
    entry->state = REQUEST_PREFILL;
    return entry;
}

// --- the step ---

static bool is_early(const struct build *b, const struct sequence *sequence)
{
    return sequence->unresulted > 0 && b->plan->number - sequence->source_step < b->s->n_stages;
}

// The ring's share of this turn.
static uint32_t micro_batch(const struct scheduler *s)
{
    uint32_t running = s->ring.count;
    uint32_t turns = running < s->n_stages ? running : s->n_stages;
    return turns > 0 ? running / turns + (s->turn % turns < running % turns) : 0;
}

static void plan_decodes(struct build *b, uint32_t share, bool early)
{
    struct scheduler *s = b->s;
    struct node *node = s->ring.head.next, *next;
    for (uint32_t left = s->ring.count; left > 0 && share > 0 && !b->failed; left--, node = next) {
        next = node->next;
        struct sequence *sequence = (struct sequence *)node;
        if (sequence->entry->credit == 0)
            scheduler_enroll(s, sequence); // another choice took the last of it
        else if (sequence->unresulted < MAX_AHEAD && (early || !is_early(b, sequence)))
            share -= plan_decode(b, sequence) == PLANNED;
    }
}

static void plan_prompts(struct build *b, int64_t now_us)
{
    struct scheduler *s = b->s;
    struct node *node = s->prefill.head.next, *next;
    for (; node != &s->prefill.head && b->room > 0 && !b->failed; node = next) {
        next = node->next;
        plan_chunk(b, (struct entry *)node, now_us);
    }
    while (b->room > 0 && !b->failed) {
        struct entry *entry = admit_next(s);
        if (!entry)
            break;
        plan_chunk(b, entry, now_us);
    }
}

static void reverse_rows(struct build *b, uint32_t begin, uint32_t end)
{
    struct step_row *rows = b->plan->rows;
    struct flight_row *expected = b->flight->rows;
    for (; begin + 1 < end; begin++) {
        end--;
        struct step_row row = rows[begin];
        rows[begin] = rows[end];
        rows[end] = row;
        struct flight_row expects = expected[begin];
        expected[begin] = expected[end];
        expected[end] = expects;
    }
}

// Generated rows stand before prompts in a plan. Those that filled up what the prompts left are behind them:
// [first decodes][prompts][late decodes] is turned around in place, as two reversals of a part and one of the
// whole do, and the sequences learn where their samples will be.
static void order_rows(struct build *b)
{
    uint32_t prompts = 0, late = b->plan->n_rows;
    while (prompts < b->plan->n_rows && b->plan->rows[prompts].generated)
        prompts++;
    while (late > prompts && b->plan->rows[late - 1].generated)
        late--;
    if (late == b->plan->n_rows)
        return;
    reverse_rows(b, prompts, late);
    reverse_rows(b, late, b->plan->n_rows);
    reverse_rows(b, prompts, b->plan->n_rows);
    for (uint32_t i = prompts; i < b->plan->n_rows; i++) {
        if (b->plan->rows[i].draws > 0)
            b->s->sequences[b->plan->rows[i].slot].source_row = i;
    }
}

static void fill_step(struct build *b, int64_t now_us)
{
    struct scheduler *s = b->s;
    bool prompts = s->prefill.count > 0 || next_fits(s);
    uint32_t share = micro_batch(s);
    b->room = s->options.step_budget;
    uint32_t kept = b->room > 1 ? (b->room + 3) / 4 : s->turn % 2; // a budget of one is taken in turns
    uint32_t most = b->room - (prompts ? kept : 0);
    uint32_t rest = share > most ? share - most : 0;
    plan_decodes(b, share - rest, false);
    plan_prompts(b, now_us);
    plan_decodes(b, rest < b->room ? rest : b->room, false); // the prompts may not have used what was kept
    if (b->plan->n_rows == 0)
        plan_decodes(b, share < b->room ? share : b->room, true);
    order_rows(b);
}

// One try. False: nothing can be planned, or the only request that could had to end for want of memory.
static bool plan_step(struct build *b, int64_t now_us)
{
    struct scheduler *s = b->s;
    b->flight = &s->flights[(s->first_flight + s->n_flights) % s->flights_capacity];
    b->flight->number = s->next_number;
    b->flight->n_samples = b->flight->n_prompts = 0;
    step_plan_clear(b->plan);
    b->plan->epoch = s->epoch;
    b->plan->number = s->next_number;
    if (!add_closes(b))
        return false; // memory is out: the next event tries again
    fill_step(b, now_us);
    b->flight->n_rows = b->plan->n_rows;
    if (b->plan->n_rows == 0)
        return false;
    s->n_flights++;
    s->next_number++;
    s->turn++;
    s->steps++;
    s->n_closing = 0;
    return true;
}

bool scheduler_plan(struct scheduler *s, int64_t now_us, struct step_plan *plan)
{
    scheduler_expire(s, now_us);
    for (;;) {
        if (!s->ready || s->n_flights > s->n_stages)
            return false;
        struct build build = {.s = s, .plan = plan};
        bool planned = plan_step(&build, now_us);
        if (build.failed) // after the step is committed: its slots are closed by the next one
            scheduler_end_entry(s, build.failed, STATUS_NO_MEMORY, "memory ran out while a step was planned");
        if (planned || !build.failed)
            return planned;
    }
}
