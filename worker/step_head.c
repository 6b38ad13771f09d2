// From residual rows to results. HEAD_ROWS rows of logits are computed at a time, so that prompt logprobs of
// a long chunk never need positions x vocabulary floats; what a row gets does not depend on its group. Runs
// on the device's thread, as part of the executor, which owns it.
#include "worker/step_head.h"

#include <stdlib.h>

enum { NO_SCORE = -1 };

struct head_row {
    uint32_t row;    // of the plan
    uint32_t offset; // of the position in that row
    int32_t target;  // token to score, NO_SCORE
    bool sample;     // the row's draws come from here
};

struct step_head {
    struct device *device;
    const struct kernel_ops *ops;
    executor_tap *tap;
    void *tap_context;
    uint32_t count;
    uint32_t *tokens;      // [max_positions]
    struct head_row *rows; // [max_positions]
    float *tap_logits;     // one row, once a tap is set
    // Of the group at hand.
    struct sample_row samples[HEAD_ROWS];
    struct score_row scores[HEAD_ROWS];
    uint32_t n_samples, n_scores, n_drawn;
    bool logprobs, tops;
};

int step_head_new(struct step_head **out, struct device *device, uint32_t max_positions)
{
    struct step_head *head = calloc(1, sizeof(*head));
    if (!head)
        return STATUS_NO_MEMORY;
    head->device = device;
    head->ops = device_ops(device);
    head->tokens = calloc(max_positions, sizeof(*head->tokens));
    head->rows = calloc(max_positions, sizeof(*head->rows));
    if (!head->tokens || !head->rows) {
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
    free(head->tokens);
    free(head->rows);
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

uint32_t step_head_list(struct step_head *head, const struct step_plan *plan, const uint32_t **tokens)
{
    uint32_t first = 0;
    head->count = 0;
    for (uint32_t r = 0; r < plan->n_rows; r++) {
        const struct step_row *row = &plan->rows[r];
        uint32_t begin = row->logits == STEP_LOGITS_ALL ? 0 : row->count - 1;
        for (uint32_t i = begin; i < row->count; i++) {
            int32_t target = score_target(plan, row, i);
            bool sample = row->draws > 0 && i + 1 == row->count;
            if (target == NO_SCORE && !sample)
                continue;
            head->tokens[head->count] = first + i;
            head->rows[head->count++] = (struct head_row){r, i, target, sample};
        }
        first += row->count;
    }
    *tokens = head->tokens;
    return head->count;
}

// --- a group of rows ---

// Alternatives of a sample and of a score have their places in ws->tops.
static uint32_t sample_tops(uint32_t index)
{
    return index * MAX_TOP_LOGPROBS;
}

static uint32_t score_tops(const struct workspace *ws, uint32_t index)
{
    return (ws->head_rows + index) * MAX_TOP_LOGPROBS;
}

static void list_group(struct step_head *head, const struct step_plan *plan, const struct workspace *ws,
                       uint32_t first, uint32_t count)
{
    head->n_samples = head->n_scores = head->n_drawn = 0;
    head->logprobs = head->tops = false;
    for (uint32_t i = 0; i < count; i++) {
        const struct head_row *wanted = &head->rows[first + i];
        const struct step_row *row = &plan->rows[wanted->row];
        head->tops |= row->top_logprobs > 0;
        if (wanted->target != NO_SCORE)
            head->scores[head->n_scores++] = (struct score_row){.logits_row = i,
                                                                .target = wanted->target,
                                                                .out = i,
                                                                .top = row->top_logprobs,
                                                                .top_first = score_tops(ws, i)};
        if (!wanted->sample)
            continue;
        head->logprobs |= row->logprobs;
        head->samples[head->n_samples++] = (struct sample_row){.logits_row = i,
                                                               .slot = row->slot,
                                                               .position = row->position + row->count,
                                                               .draws = row->draws,
                                                               .logprob = row->logprobs,
                                                               .top = row->top_logprobs,
                                                               .out_first = head->n_drawn,
                                                               .top_first = sample_tops(i)};
        head->n_drawn += row->draws;
    }
}

static void show_logits(struct step_head *head, const struct step_plan *plan, struct workspace *ws,
                        uint32_t first, uint32_t count, uint32_t vocab)
{
    if (!head->tap_logits)
        head->tap_logits = malloc(vocab * sizeof(float));
    for (uint32_t i = 0; head->tap_logits && i < count; i++) {
        const struct head_row *wanted = &head->rows[first + i];
        head->ops->download(head->device, head->tap_logits, ws->logits + (size_t)i * vocab,
                            vocab * sizeof(float));
        head->tap(head->tap_context, wanted->row, plan->rows[wanted->row].position + wanted->offset,
                  head->tap_logits, vocab);
    }
}

static void fetch(struct step_head *head, void *to, const void *from, uint32_t count, size_t size)
{
    if (count)
        head->ops->download(head->device, to, from, count * size);
}

static void compute_group(struct step_head *head, struct workspace *ws, struct sampler *sampler,
                          uint32_t vocab, uint32_t count)
{
    if (head->n_scores)
        head->ops->score(head->device, ws->logits, vocab, head->scores, head->n_scores, ws->scores, ws->tops);
    if (head->n_samples)
        head->ops->sample(head->device, sampler, ws->logits, head->samples, head->n_samples, ws->drawn,
                          ws->drawn_logprobs, ws->tops);
    fetch(head, ws->host.drawn, ws->drawn, head->n_drawn, sizeof(*ws->drawn));
    fetch(head, ws->host.drawn_logprobs, ws->drawn_logprobs, head->logprobs ? head->n_drawn : 0,
          sizeof(*ws->drawn_logprobs));
    fetch(head, ws->host.scores, ws->scores, head->n_scores ? count : 0, sizeof(*ws->scores));
    uint32_t top_rows = head->tops ? (head->n_scores ? ws->head_rows + count : count) : 0;
    fetch(head, ws->host.tops, ws->tops, top_rows * MAX_TOP_LOGPROBS, sizeof(*ws->tops));
}

// --- results ---

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

static int report_score(struct step_result *result, const struct step_plan *plan, const struct workspace *ws,
                        const struct head_row *wanted, const struct score_row *score)
{
    struct step_prompt_logprob *prompt = step_result_add_prompt(result);
    if (!prompt)
        return STATUS_NO_MEMORY;
    prompt->row = wanted->row;
    prompt->position = plan->rows[wanted->row].position + wanted->offset + 1;
    prompt->token = (struct token_logprob){wanted->target, ws->host.scores[score->out]};
    return report_tops(result, ws->host.tops + score->top_first, score->top, &prompt->top_first,
                       &prompt->top_count);
}

static int report_samples(struct step_result *result, struct step_draws *draws, const struct workspace *ws,
                          uint32_t row, const struct sample_row *sampled)
{
    uint32_t top_first, top_count;
    int status =
        report_tops(result, ws->host.tops + sampled->top_first, sampled->top, &top_first, &top_count);
    for (uint32_t draw = 0; !status && draw < sampled->draws; draw++) {
        struct step_sample *sample = step_result_add_sample(result);
        if (!sample)
            return STATUS_NO_MEMORY;
        int32_t token = ws->host.drawn[sampled->out_first + draw];
        draws->tokens[draws->row_first[row] + draw] = token;
        *sample = (struct step_sample){
            .row = row, .draw = draw, .token = token, .top_first = top_first, .top_count = top_count};
        if (sampled->logprob)
            sample->logprob = ws->host.drawn_logprobs[sampled->out_first + draw];
    }
    return status;
}

static int report_group(struct step_head *head, const struct step_plan *plan, const struct workspace *ws,
                        uint32_t first, uint32_t count, struct step_draws *draws, struct step_result *result)
{
    const struct score_row *score = head->scores;
    const struct sample_row *sample = head->samples;
    int status = STATUS_OK;
    for (uint32_t i = 0; !status && i < count; i++) {
        const struct head_row *wanted = &head->rows[first + i];
        if (wanted->target != NO_SCORE)
            status = report_score(result, plan, ws, wanted, score++);
        if (!status && wanted->sample)
            status = report_samples(result, draws, ws, wanted->row, sample++);
    }
    return status;
}

int step_head_run(struct step_head *head, const struct step_plan *plan, const struct decoder *decoder,
                  struct workspace *ws, struct sampler *sampler, struct step_draws *draws,
                  struct step_result *result, struct error *error)
{
    uint32_t vocab = decoder_vocabulary(decoder);
    for (uint32_t first = 0; first < head->count; first += ws->head_rows) {
        uint32_t count = head->count - first < ws->head_rows ? head->count - first : ws->head_rows;
        decoder_head(decoder, ws, first, count);
        if (head->tap)
            show_logits(head, plan, ws, first, count, vocab);
        list_group(head, plan, ws, first, count);
        compute_group(head, ws, sampler, vocab, count);
        if (report_group(head, plan, ws, first, count, draws, result))
            return error_set(error, STATUS_NO_MEMORY, "no memory for the result of step %llu",
                             (unsigned long long)plan->number);
    }
    return STATUS_OK;
}
