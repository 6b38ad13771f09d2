// From residual rows to results. HEAD_ROWS rows of logits are computed at a time, so that prompt logprobs of
// a long chunk never need positions x vocabulary floats; what a row gets does not depend on its group. The
// groups of a step are queued one after the other; what they leave on the device is overwritten by the next
// step, but only behind the fetch that brings it to this step's own memory. Runs on the device's thread, as
// part of the executor, which owns it.
#include "worker/step_head.h"

#include <stdlib.h>

enum { NO_SCORE = -1 };

struct head_row {
    uint32_t row;        // of the plan
    uint32_t position;   // of the token that has these logits
    int32_t target;      // token to score, NO_SCORE
    uint32_t score;      // among the step's scores
    uint32_t slot;       // of the draws
    uint32_t draws;      // from here; 0 = none
    uint32_t first_draw; // among the step's draws
    bool logprob;        // of the draws
    uint32_t top;        // alternatives, each for the score and the draws
    uint32_t score_tops, draw_tops;
};

// A step from its listing to its report.
struct head_step {
    uint32_t count, n_draws, n_scores, n_tops;
    bool logprobs;
    struct head_row *rows; // [max_positions]
    char *fetched;         // from alloc_host: the draws' tokens [n_slots], then outputs
};

// Where outputs lie, from the beginning of their block: logprobs of draws first.
struct output_layout {
    size_t scores, tops, bytes;
};

struct step_head {
    struct device *device;
    const struct kernel_ops *ops;
    executor_tap *tap;
    void *tap_context;
    uint32_t n_slots;
    uint32_t *tokens;  // [max_positions] of the step listed last
    float *tap_logits; // one row, once a tap is set
    struct head_step steps[EXECUTOR_DEPTH];
    // Of the group at hand.
    struct sample_row samples[HEAD_ROWS];
    struct score_row scores[HEAD_ROWS];
    uint32_t n_samples, n_scores;
};

int step_head_new(struct step_head **out, struct device *device, const struct workspace *ws,
                  const struct step_bounds *bounds)
{
    struct step_head *head = calloc(1, sizeof(*head));
    if (!head)
        return STATUS_NO_MEMORY;
    head->device = device;
    head->ops = device_ops(device);
    head->n_slots = bounds->n_slots;
    head->tokens = calloc(bounds->max_positions, sizeof(*head->tokens));
    bool whole = head->tokens != NULL;
    for (int i = 0; i < EXECUTOR_DEPTH; i++) {
        struct head_step *step = &head->steps[i];
        step->rows = calloc(bounds->max_positions, sizeof(*step->rows));
        step->fetched =
            head->ops->alloc_host(device, bounds->n_slots * sizeof(int32_t) + (size_t)ws->output_bytes);
        whole = whole && step->rows && step->fetched;
    }
    if (!whole) {
        step_head_free(head);
        return STATUS_NO_MEMORY;
    }
    *out = head;
    return STATUS_OK;
}

void step_head_free(struct step_head *head)
{
    if (!head)
        return;
    for (int i = 0; i < EXECUTOR_DEPTH; i++) {
        free(head->steps[i].rows);
        if (head->steps[i].fetched)
            head->ops->free_host(head->device, head->steps[i].fetched);
    }
    free(head->tokens);
    free(head->tap_logits);
    free(head);
}

void step_head_set_tap(struct step_head *head, executor_tap *tap, void *context)
{
    head->tap = tap;
    head->tap_context = context;
}

// --- which rows ---

// The token that position `offset` of the row predicts, where its logprob is wanted.
static int32_t score_target(const struct step_plan *plan, const struct step_row *row, uint32_t offset)
{
    if (row->logits != STEP_LOGITS_ALL)
        return NO_SCORE;
    return offset + 1 < row->count ? plan->tokens[row->tokens_first + offset + 1] : row->next_token;
}

static void list_row(struct head_step *step, const struct step_row *row, uint32_t index, uint32_t offset,
                     int32_t target, uint32_t draws, uint32_t first_draw)
{
    struct head_row *wanted = &step->rows[step->count++];
    *wanted = (struct head_row){.row = index,
                                .position = row->position + offset,
                                .target = target,
                                .slot = row->slot,
                                .draws = draws,
                                .first_draw = first_draw,
                                .logprob = row->logprobs,
                                .top = row->top_logprobs};
    step->n_draws += draws;
    step->logprobs |= draws > 0 && row->logprobs;
    if (target != NO_SCORE) {
        wanted->score = step->n_scores++;
        wanted->score_tops = step->n_tops;
        step->n_tops += row->top_logprobs;
    }
    if (draws > 0) {
        wanted->draw_tops = step->n_tops;
        step->n_tops += row->top_logprobs;
    }
}

struct head_rows step_head_list(struct step_head *head, const struct step_plan *plan,
                                const struct step_draws *draws)
{
    struct head_step *step = &head->steps[plan->number % EXECUTOR_DEPTH];
    struct head_rows rows = {.tokens = head->tokens};
    uint32_t first = 0;
    step->count = step->n_draws = step->n_scores = step->n_tops = 0;
    step->logprobs = false;
    for (uint32_t r = 0; r < plan->n_rows; r++) {
        const struct step_row *row = &plan->rows[r];
        uint32_t begin = row->logits == STEP_LOGITS_ALL ? 0 : row->count - 1;
        for (uint32_t i = begin; i < row->count; i++) {
            int32_t target = score_target(plan, row, i);
            uint32_t drawn = i + 1 == row->count ? row->draws : 0;
            if (target == NO_SCORE && drawn == 0)
                continue;
            head->tokens[step->count] = first + i;
            rows.n_generated += row->generated;
            list_row(step, row, r, i, target, drawn, draws->row_first[r]);
        }
        first += row->count;
    }
    rows.count = step->count;
    return rows;
}

// --- a group of rows ---

static struct output_layout layout_of(const struct head_step *step)
{
    struct output_layout at = {.scores = step->n_draws * sizeof(float)};
    size_t floats = at.scores + step->n_scores * sizeof(float);
    at.tops = (floats + OUTPUT_ALIGNMENT - 1) / OUTPUT_ALIGNMENT * OUTPUT_ALIGNMENT;
    at.bytes = step->n_tops     ? at.tops + step->n_tops * sizeof(struct token_logprob)
               : step->n_scores ? floats
               : step->logprobs ? at.scores
                                : 0;
    return at;
}

static void list_group(struct step_head *head, const struct head_row *rows, uint32_t count)
{
    head->n_samples = head->n_scores = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct head_row *wanted = &rows[i];
        if (wanted->target != NO_SCORE)
            head->scores[head->n_scores++] = (struct score_row){.logits_row = i,
                                                                .target = wanted->target,
                                                                .out = wanted->score,
                                                                .top = wanted->top,
                                                                .top_first = wanted->score_tops};
        if (wanted->draws > 0)
            head->samples[head->n_samples++] = (struct sample_row){.logits_row = i,
                                                                   .slot = wanted->slot,
                                                                   .position = wanted->position + 1,
                                                                   .draws = wanted->draws,
                                                                   .logprob = wanted->logprob,
                                                                   .top = wanted->top,
                                                                   .out_first = wanted->first_draw,
                                                                   .top_first = wanted->draw_tops};
    }
}

static void show_logits(struct step_head *head, const struct head_row *rows, const struct workspace *ws,
                        uint32_t count, uint32_t vocab)
{
    if (!head->tap_logits)
        head->tap_logits = malloc(vocab * sizeof(float));
    for (uint32_t i = 0; head->tap_logits && i < count; i++) {
        head->ops->download(head->device, head->tap_logits, ws->logits + (size_t)i * vocab,
                            vocab * sizeof(float));
        head->tap(head->tap_context, rows[i].row, rows[i].position, head->tap_logits, vocab);
    }
}

void step_head_queue(struct step_head *head, uint64_t number, const struct decoder *decoder,
                     struct workspace *ws, struct sampler *sampler, int32_t *drawn, bool computed)
{
    struct head_step *step = &head->steps[number % EXECUTOR_DEPTH];
    struct output_layout at = layout_of(step);
    uint32_t vocab = decoder_vocabulary(decoder);
    char *outputs = ws->outputs;
    struct token_logprob *tops = (struct token_logprob *)(outputs + at.tops);
    for (uint32_t first = 0; first < step->count; first += ws->head_rows) {
        uint32_t count = step->count - first < ws->head_rows ? step->count - first : ws->head_rows;
        if (!computed)
            decoder_head(decoder, ws, first, count);
        if (head->tap)
            show_logits(head, step->rows + first, ws, count, vocab);
        list_group(head, step->rows + first, count);
        if (head->n_scores)
            head->ops->score(head->device, ws->logits, vocab, head->scores, head->n_scores,
                             (float *)(outputs + at.scores), tops);
        if (head->n_samples)
            head->ops->sample(head->device, sampler, ws->logits, head->samples, head->n_samples, drawn,
                              (float *)outputs, tops);
    }
    if (step->n_draws)
        head->ops->fetch(head->device, step->fetched, drawn, step->n_draws * sizeof(int32_t));
    if (at.bytes)
        head->ops->fetch(head->device, step->fetched + head->n_slots * sizeof(int32_t), outputs, at.bytes);
}

// --- results ---

const int32_t *step_head_drawn(const struct step_head *head, uint64_t number)
{
    return (const int32_t *)head->steps[number % EXECUTOR_DEPTH].fetched;
}

// Copies up to `most` alternatives; *first and *count get their place in the result. There are fewer where
// fewer tokens have any probability: a small vocabulary, or logits that are no numbers.
static int report_tops(struct step_result *result, const struct token_logprob *from, uint32_t most,
                       uint32_t *first, uint32_t *count)
{
    *first = result->n_tops;
    *count = 0;
    while (*count < most && from[*count].token >= 0)
        ++*count;
    struct token_logprob *to = *count ? step_result_add_tops(result, *count) : NULL;
    if (*count && !to)
        return STATUS_NO_MEMORY;
    for (uint32_t i = 0; i < *count; i++)
        to[i] = from[i];
    return STATUS_OK;
}

struct fetched { // of a step
    const int32_t *tokens;
    const float *logprobs, *scores;
    const struct token_logprob *tops;
};

static int report_score(struct step_result *result, const struct fetched *fetched,
                        const struct head_row *wanted)
{
    struct step_prompt_logprob *prompt = step_result_add_prompt(result);
    if (!prompt)
        return STATUS_NO_MEMORY;
    prompt->row = wanted->row;
    prompt->position = wanted->position + 1;
    prompt->token = (struct token_logprob){wanted->target, fetched->scores[wanted->score]};
    return report_tops(result, fetched->tops + wanted->score_tops, wanted->top, &prompt->top_first,
                       &prompt->top_count);
}

static int report_draws(struct step_result *result, const struct fetched *fetched,
                        const struct head_row *wanted)
{
    uint32_t top_first, top_count;
    int status = report_tops(result, fetched->tops + wanted->draw_tops, wanted->top, &top_first, &top_count);
    for (uint32_t draw = 0; !status && draw < wanted->draws; draw++) {
        struct step_sample *sample = step_result_add_sample(result);
        if (!sample)
            return STATUS_NO_MEMORY;
        *sample = (struct step_sample){.row = wanted->row,
                                       .draw = draw,
                                       .token = fetched->tokens[wanted->first_draw + draw],
                                       .top_first = top_first,
                                       .top_count = top_count};
        if (wanted->logprob)
            sample->logprob = fetched->logprobs[wanted->first_draw + draw];
    }
    return status;
}

int step_head_report(const struct step_head *head, uint64_t number, struct step_result *result)
{
    const struct head_step *step = &head->steps[number % EXECUTOR_DEPTH];
    struct output_layout at = layout_of(step);
    const char *outputs = step->fetched + head->n_slots * sizeof(int32_t);
    struct fetched fetched = {.tokens = (const int32_t *)step->fetched,
                              .logprobs = (const float *)outputs,
                              .scores = (const float *)(outputs + at.scores),
                              .tops = (const struct token_logprob *)(outputs + at.tops)};
    int status = STATUS_OK;
    for (uint32_t i = 0; !status && i < step->count; i++) {
        const struct head_row *wanted = &step->rows[i];
        if (wanted->target != NO_SCORE)
            status = report_score(result, &fetched, wanted);
        if (!status && wanted->draws > 0)
            status = report_draws(result, &fetched, wanted);
    }
    return status;
}
