// What a step's result means. It is checked whole against the step in flight before anything changes: a
// result that does not answer every draw and every score asked for, in order, comes from a pool that can no
// longer be trusted. Then each row's tokens go to their sequence, or nowhere when that sequence is over (its
// row ran ahead of the token that ended it, or its client left). On the scheduler's thread; allocates only
// while the event queue still grows.
#include "coordinator/scheduler_internal.h"

#include <stdlib.h>

// --- the check ---

static int corrupt(struct error *error, const struct flight *flight, uint32_t row, const char *what)
{
    return error_set(error, STATUS_CORRUPT, "the result of step %llu, row %u: %s",
                     (unsigned long long)flight->number, row, what);
}

static bool tops_fit(const struct scheduler *s, const struct step_result *result, uint32_t first,
                     uint32_t count, uint32_t most)
{
    if (count > most || first > result->n_tops || count > result->n_tops - first)
        return false;
    for (uint32_t i = 0; i < count; i++) {
        int32_t token = result->tops[first + i].token;
        if (token < 0 || (uint32_t)token >= s->options.vocab_size)
            return false;
    }
    return true;
}

static int check_samples(const struct scheduler *s, const struct flight *flight, uint32_t row, uint32_t first,
                         const struct step_result *result, struct error *error)
{
    const struct flight_row *asked = &flight->rows[row];
    for (uint32_t draw = 0; draw < asked->draws; draw++) {
        const struct step_sample *sample = &result->samples[first + draw];
        if (sample->row != row || sample->draw != draw)
            return corrupt(error, flight, row, "its samples are missing or out of order");
        if (sample->token < 0 || (uint32_t)sample->token >= s->options.vocab_size)
            return corrupt(error, flight, row, "a token outside the vocabulary was drawn");
        if (!tops_fit(s, result, sample->top_first, sample->top_count, asked->top_logprobs))
            return corrupt(error, flight, row, "a sample's alternatives are out of range");
    }
    return STATUS_OK;
}

static int check_scores(const struct scheduler *s, const struct flight *flight, uint32_t row, uint32_t first,
                        const struct step_result *result, struct error *error)
{
    const struct flight_row *asked = &flight->rows[row];
    const struct sequence *sequence = &s->sequences[asked->slot];
    bool alive = sequence->generation == asked->generation;
    for (uint32_t i = 0; i < asked->n_scores; i++) {
        const struct step_prompt_logprob *score = &result->prompts[first + i];
        uint32_t position = asked->position + 1 + i;
        if (score->row != row || score->position != position)
            return corrupt(error, flight, row, "its prompt logprobs are missing or out of order");
        if (alive && score->token.token != sequence->entry->spec->prompt[position])
            return corrupt(error, flight, row, "a prompt logprob is of another token");
        if (!tops_fit(s, result, score->top_first, score->top_count, asked->top_logprobs))
            return corrupt(error, flight, row, "a prompt logprob's alternatives are out of range");
    }
    return STATUS_OK;
}

static int check_result(const struct scheduler *s, const struct step_result *result, struct error *error)
{
    if (s->n_flights == 0)
        return error_set(error, STATUS_CORRUPT, "a result of step %llu came, but no step is in flight",
                         (unsigned long long)result->number);
    const struct flight *flight = &s->flights[s->first_flight];
    if (result->number != flight->number)
        return error_set(error, STATUS_CORRUPT, "a result of step %llu came, step %llu was next",
                         (unsigned long long)result->number, (unsigned long long)flight->number);
    if (result->n_samples != flight->n_samples || result->n_prompts != flight->n_prompts)
        return error_set(error, STATUS_CORRUPT,
                         "the result of step %llu has %u samples and %u prompt logprobs, not %u and %u",
                         (unsigned long long)flight->number, result->n_samples, result->n_prompts,
                         flight->n_samples, flight->n_prompts);
    uint32_t sample = 0, prompt = 0;
    for (uint32_t row = 0; row < flight->n_rows; row++) {
        int status = check_samples(s, flight, row, sample, result, error);
        if (status == STATUS_OK)
            status = check_scores(s, flight, row, prompt, result, error);
        if (status != STATUS_OK)
            return status;
        sample += flight->rows[row].draws;
        prompt += flight->rows[row].n_scores;
    }
    return STATUS_OK;
}

// --- what it means ---

static void emit_scores(struct scheduler *s, struct entry *entry, const struct flight_row *row,
                        const struct step_result *result, uint32_t first)
{
    struct event_queue *queue = &s->queue;
    struct queued_event *event = events_push(queue, SCHEDULER_PROMPT, entry, 0);
    event->position = row->position + 1;
    event->scores_first = queue->n_scores;
    event->n_scores = row->n_scores;
    event->tops_first = queue->n_tops;
    for (uint32_t i = 0; i < row->n_scores; i++) {
        struct step_prompt_logprob score = result->prompts[first + i];
        uint32_t tops = events_add_tops(queue, result->tops + score.top_first, score.top_count);
        score.top_first = tops - event->tops_first;
        queue->scores[queue->n_scores++] = score;
        event->n_tops += score.top_count;
    }
}

static int compare_ids(const void *left, const void *right)
{
    int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    return (a > b) - (a < b);
}

// A token was drawn for a live choice: it ends the choice, or comes out, and may be the last.
static void accept_token(struct scheduler *s, struct entry *entry, uint32_t choice, uint32_t n_before,
                         const struct step_sample *sample, const struct step_result *result)
{
    const struct request *spec = entry->spec;
    if (spec->n_end_ids > 0 &&
        bsearch(&sample->token, spec->end_ids, spec->n_end_ids, sizeof(*spec->end_ids), compare_ids)) {
        entry->credit++;
        scheduler_end_choice(s, entry, choice, FINISH_STOP, sample->token);
        return;
    }
    struct queued_event *event = events_push(&s->queue, SCHEDULER_TOKEN, entry, choice);
    event->token = sample->token;
    event->logprob = sample->logprob;
    event->n_tops = spec->logprobs ? sample->top_count : 0; // those of prompt logprobs say nothing here
    event->tops_first = events_add_tops(&s->queue, result->tops + sample->top_first, event->n_tops);
    entry->emitted++;
    s->output_tokens++;
    if (n_before + 1 == entry->max_outputs)
        scheduler_end_choice(s, entry, choice, FINISH_LENGTH, -1);
}

// The choices that go on after their first tokens get sequences of their own: the prompt's pages shared, the
// last one, when partly filled, copied before the first write (provide_pages). Choice 0 keeps the slot that
// read the prompt, but as a new sequence to the workers, because its sampling state has to begin with its own
// first token.
static void fork_choices(struct scheduler *s, struct entry *entry, const struct step_sample *samples)
{
    struct sequence *prompt = sequence_of(s, entry, 0);
    bool partial = entry->spec->n_prompt % KV_PAGE_POSITIONS != 0;
    entry->drawn = true;
    s->closing[s->n_closing++] = prompt->slot;
    prompt->opened = false;
    for (uint32_t c = 0; c < entry->spec->n_choices; c++) {
        if (entry->choices[c].ended)
            continue;
        struct sequence *sequence = sequence_of(s, entry, c);
        if (c > 0)
            kv_ledger_share(s->ledger, &prompt->table, &sequence->table);
        sequence->shares_last = partial;
        entry->n_sharing += partial;
        sequence->position = entry->spec->n_prompt;
        sequence->planned = sequence->outputs = 1;
        sequence->unresulted = 0;
        sequence->last_token = samples[c].token;
    }
    for (uint32_t c = 0; c < entry->spec->n_choices; c++) {
        if (entry->choices[c].ended)
            scheduler_release_choice(s, entry, c);
        else
            scheduler_enroll(s, sequence_of(s, entry, c));
    }
    scheduler_return_excess(s, entry);
    scheduler_wake(s, entry);
}

// The first tokens of several choices, drawn from one row.
static void accept_first_tokens(struct scheduler *s, struct entry *entry, const struct step_sample *samples,
                                const struct step_result *result)
{
    for (uint32_t c = 0; c < entry->spec->n_choices; c++) {
        if (entry->choices[c].ended)
            entry->credit++;
        else
            accept_token(s, entry, c, 0, &samples[c], result);
    }
    if (entry->state != REQUEST_DONE)
        fork_choices(s, entry, samples);
}

static void end_scored(struct scheduler *s, struct entry *entry)
{
    for (uint32_t c = 0; entry->state != REQUEST_DONE; c++) {
        if (!entry->choices[c].ended)
            scheduler_end_choice(s, entry, c, FINISH_LENGTH, -1);
    }
}

static void accept_row(struct scheduler *s, const struct flight_row *row, const struct step_result *result,
                       uint32_t first_sample, uint32_t first_prompt)
{
    struct sequence *sequence = &s->sequences[row->slot];
    if (sequence->generation != row->generation)
        return; // it ended while this row was in flight
    struct entry *entry = sequence->entry;
    if (row->n_scores > 0)
        emit_scores(s, entry, row, result, first_prompt);
    if (row->draws == 0) {
        if (row->prompt_end)
            end_scored(s, entry);
        return;
    }
    sequence->unresulted--;
    const struct step_sample *samples = &result->samples[first_sample];
    if (row->draws > 1) {
        accept_first_tokens(s, entry, samples, result);
        return;
    }
    entry->drawn = true;
    sequence->last_token = samples[0].token;
    accept_token(s, entry, sequence->choice, sequence->outputs++, &samples[0], result);
}

// Several draws of one row may share their alternatives; each event gets its own copy.
static uint32_t count_tops(const struct step_result *result)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < result->n_samples; i++)
        count += result->samples[i].top_count;
    for (uint32_t i = 0; i < result->n_prompts; i++)
        count += result->prompts[i].top_count;
    return count;
}

int scheduler_result(struct scheduler *s, const struct step_result *result, int64_t now_us,
                     struct error *error)
{
    scheduler_expire(s, now_us);
    if (!s->ready || result->epoch != s->epoch)
        return STATUS_OK; // of a pool that is gone, and so are the requests it worked for
    int status = check_result(s, result, error);
    if (status != STATUS_OK)
        return status;
    const struct flight *flight = &s->flights[s->first_flight];
    if (!events_make_room(&s->queue, result->n_samples + flight->n_rows, result->n_prompts,
                          count_tops(result)))
        return error_set(error, STATUS_NO_MEMORY, "memory ran out for the result of step %llu",
                         (unsigned long long)flight->number);
    s->first_flight = (s->first_flight + 1) % s->flights_capacity;
    s->n_flights--;
    uint32_t sample = 0, prompt = 0;
    for (uint32_t row = 0; row < flight->n_rows; row++) {
        accept_row(s, &flight->rows[row], result, sample, prompt);
        sample += flight->rows[row].draws;
        prompt += flight->rows[row].n_scores;
    }
    return STATUS_OK;
}
