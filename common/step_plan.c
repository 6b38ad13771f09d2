// Step plans and results as growable flat arrays, and the check that both sides run before they trust a plan.
// Arrays keep their capacity across steps, so that a steady load allocates nothing. Plain data; one thread at
// a time.
#include "common/step_plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Token ids of one plan: a step's positions, and the histories and ban lists of the sequences it opens.
enum {
    MAX_PLAN_TOKENS = 1 << 24,
    MAX_PLAN_PAGES = 1 << 22,
    MAX_PLAN_BIASES = 1 << 20,
    MAX_RESULT_TOPS = 1 << 20
};

// Makes room for `more` records behind `count` in *array. False when memory is out or `limit` would be
// passed.
static bool reserve(void *array, uint32_t count, uint32_t *capacity, uint32_t more, uint32_t limit,
                    size_t bytes)
{
    if (more > limit || count > limit - more)
        return false;
    if (count + more <= *capacity)
        return true;
    uint32_t wanted = *capacity ? *capacity * 2 : 16;
    if (wanted < count + more)
        wanted = count + more;
    void **where = array;
    void *grown = realloc(*where, wanted * bytes);
    if (!grown)
        return false;
    *where = grown;
    *capacity = wanted;
    return true;
}

void step_plan_init(struct step_plan *plan)
{
    memset(plan, 0, sizeof(*plan));
}

void step_plan_free(struct step_plan *plan)
{
    free(plan->commands);
    free(plan->rows);
    free(plan->tokens);
    free(plan->pages);
    free(plan->biases);
    step_plan_init(plan);
}

void step_plan_clear(struct step_plan *plan)
{
    plan->epoch = plan->number = 0;
    plan->n_commands = plan->n_rows = plan->n_tokens = plan->n_pages = plan->n_biases = 0;
}

struct step_command *step_plan_add_command(struct step_plan *plan, enum step_command_kind kind, uint32_t slot)
{
    if (!reserve(&plan->commands, plan->n_commands, &plan->capacity.commands, 1, MAX_STEP_COMMANDS,
                 sizeof(*plan->commands)))
        return NULL;
    struct step_command *command = &plan->commands[plan->n_commands++];
    *command = (struct step_command){.kind = kind, .slot = slot};
    return command;
}

struct step_row *step_plan_add_row(struct step_plan *plan)
{
    if (!reserve(&plan->rows, plan->n_rows, &plan->capacity.rows, 1, MAX_STEP_ROWS, sizeof(*plan->rows)))
        return NULL;
    struct step_row *row = &plan->rows[plan->n_rows++];
    *row = (struct step_row){.next_token = -1};
    return row;
}

int64_t step_plan_add_tokens(struct step_plan *plan, const int32_t *tokens, uint32_t count)
{
    if (!reserve(&plan->tokens, plan->n_tokens, &plan->capacity.tokens, count, MAX_PLAN_TOKENS,
                 sizeof(*tokens)))
        return -1;
    if (count)
        memcpy(plan->tokens + plan->n_tokens, tokens, count * sizeof(*tokens));
    plan->n_tokens += count;
    return plan->n_tokens - count;
}

int64_t step_plan_add_pages(struct step_plan *plan, const uint32_t *pages, uint32_t count)
{
    if (!reserve(&plan->pages, plan->n_pages, &plan->capacity.pages, count, MAX_PLAN_PAGES, sizeof(*pages)))
        return -1;
    if (count)
        memcpy(plan->pages + plan->n_pages, pages, count * sizeof(*pages));
    plan->n_pages += count;
    return plan->n_pages - count;
}

int64_t step_plan_add_biases(struct step_plan *plan, const struct logit_bias *biases, uint32_t count)
{
    if (!reserve(&plan->biases, plan->n_biases, &plan->capacity.biases, count, MAX_PLAN_BIASES,
                 sizeof(*biases)))
        return -1;
    if (count)
        memcpy(plan->biases + plan->n_biases, biases, count * sizeof(*biases));
    plan->n_biases += count;
    return plan->n_biases - count;
}

uint32_t step_plan_positions(const struct step_plan *plan)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < plan->n_rows; i++)
        sum += plan->rows[i].count;
    return sum > UINT32_MAX ? UINT32_MAX : (uint32_t)sum;
}

// --- validation ---

static bool range_fits(uint32_t first, uint32_t count, uint32_t size)
{
    return first <= size && count <= size - first;
}

static int check_sampling(const struct sampling_params *p, uint32_t command, struct error *error)
{
    bool numbers = isfinite(p->temperature) && isfinite(p->top_p) && isfinite(p->min_p) &&
                   isfinite(p->repetition_penalty) && isfinite(p->presence_penalty) &&
                   isfinite(p->frequency_penalty);
    if (!numbers || p->temperature < 0 || p->repetition_penalty <= 0)
        return error_set(error, STATUS_CORRUPT, "step command %u: sampling parameters out of range", command);
    return STATUS_OK;
}

static int check_open(const struct step_plan *plan, uint32_t index, const struct step_bounds *bounds,
                      struct error *error)
{
    const struct step_command *c = &plan->commands[index];
    if (!range_fits(c->history_first, c->history_count, plan->n_tokens) ||
        c->history_prompt > c->history_count || c->history_count > bounds->context ||
        !range_fits(c->bias_first, c->bias_count, plan->n_biases) ||
        !range_fits(c->ban_first, c->ban_count, plan->n_tokens) || c->choice >= MAX_CHOICES)
        return error_set(error, STATUS_CORRUPT, "step command %u: an open of slot %u points outside the plan",
                         index, c->slot);
    return check_sampling(&c->sampling, index, error);
}

static int check_pages(const struct step_plan *plan, uint32_t index, const struct step_bounds *bounds,
                       struct error *error)
{
    const struct step_command *c = &plan->commands[index];
    uint32_t table_pages = (bounds->context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    if (!range_fits(c->pages_first, c->pages_count, plan->n_pages) ||
        !range_fits(c->table_first, c->pages_count, table_pages))
        return error_set(error, STATUS_CORRUPT, "step command %u: pages of slot %u lie outside its table",
                         index, c->slot);
    for (uint32_t i = 0; i < c->pages_count; i++) {
        if (plan->pages[c->pages_first + i] >= bounds->n_pages)
            return error_set(error, STATUS_CORRUPT, "step command %u: page %u, of %u", index,
                             plan->pages[c->pages_first + i], bounds->n_pages);
    }
    return STATUS_OK;
}

static int check_command(const struct step_plan *plan, uint32_t index, const struct step_bounds *bounds,
                         struct error *error)
{
    const struct step_command *c = &plan->commands[index];
    if (c->kind != STEP_COPY && c->slot >= bounds->n_slots)
        return error_set(error, STATUS_CORRUPT, "step command %u: slot %u, of %u", index, c->slot,
                         bounds->n_slots);
    switch (c->kind) {
    case STEP_OPEN:
        return check_open(plan, index, bounds, error);
    case STEP_CLOSE:
        return STATUS_OK;
    case STEP_PAGES:
        return check_pages(plan, index, bounds, error);
    case STEP_COPY:
        if (c->copy_from >= bounds->n_pages || c->copy_to >= bounds->n_pages || c->copy_from == c->copy_to)
            return error_set(error, STATUS_CORRUPT, "step command %u: copy of page %u to %u, of %u", index,
                             c->copy_from, c->copy_to, bounds->n_pages);
        return STATUS_OK;
    }
    return error_set(error, STATUS_CORRUPT, "step command %u: unknown kind %u", index, (unsigned)c->kind);
}

static int check_source(const struct step_plan *plan, uint32_t index, struct error *error)
{
    const struct step_row *row = &plan->rows[index];
    if (row->generated && (row->count != 1 || (index > 0 && !plan->rows[index - 1].generated)))
        return error_set(error, STATUS_CORRUPT,
                         "step row %u: a generated row has %u positions, or stands behind one that is not",
                         index, row->count);
    if (!row->from_sample) {
        if (!range_fits(row->tokens_first, row->count, plan->n_tokens))
            return error_set(error, STATUS_CORRUPT, "step row %u: its tokens lie outside the plan", index);
        return STATUS_OK;
    }
    bool recent = row->source_step < plan->number && plan->number - row->source_step <= MAX_STEP_HISTORY;
    if (!row->generated || row->must_wait || !recent || row->source_row >= MAX_STEP_ROWS ||
        row->source_draw >= MAX_CHOICES)
        return error_set(error, STATUS_CORRUPT, "step row %u: cannot take its token from step %llu", index,
                         (unsigned long long)row->source_step);
    return STATUS_OK;
}

static int check_row(const struct step_plan *plan, uint32_t index, const struct step_bounds *bounds,
                     struct error *error)
{
    const struct step_row *row = &plan->rows[index];
    if (row->slot >= bounds->n_slots)
        return error_set(error, STATUS_CORRUPT, "step row %u: slot %u, of %u", index, row->slot,
                         bounds->n_slots);
    if (row->count == 0 || !range_fits(row->position, row->count, bounds->context))
        return error_set(error, STATUS_CORRUPT, "step row %u: %u positions at %u, of %u", index, row->count,
                         row->position, bounds->context);
    if (row->draws > MAX_CHOICES || row->top_logprobs > MAX_TOP_LOGPROBS ||
        (unsigned)row->logits > STEP_LOGITS_ALL || (row->draws > 0 && row->logits == STEP_LOGITS_NONE) ||
        row->next_token < -1 || row->next_token >= (int64_t)bounds->vocab_size)
        return error_set(error, STATUS_CORRUPT, "step row %u: asks for results that cannot be", index);
    return check_source(plan, index, error);
}

// History, ban and bias ids index tables on the device.
static int check_ids(const struct step_plan *plan, const struct step_bounds *bounds, struct error *error)
{
    for (uint32_t i = 0; i < plan->n_tokens; i++) {
        if (plan->tokens[i] < 0 || (uint32_t)plan->tokens[i] >= bounds->vocab_size)
            return error_set(error, STATUS_CORRUPT, "step: token %d, of %u", plan->tokens[i],
                             bounds->vocab_size);
    }
    for (uint32_t i = 0; i < plan->n_biases; i++) {
        if (plan->biases[i].token < 0 || (uint32_t)plan->biases[i].token >= bounds->vocab_size ||
            isnan(plan->biases[i].bias))
            return error_set(error, STATUS_CORRUPT, "step: bias of token %d, of %u", plan->biases[i].token,
                             bounds->vocab_size);
    }
    return STATUS_OK;
}

// Both fill tables of one entry a slot on the device.
static int check_sums(const struct step_plan *plan, const struct step_bounds *bounds, struct error *error)
{
    uint32_t generated = 0, draws = 0; // at most MAX_STEP_ROWS * MAX_CHOICES
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        generated += plan->rows[i].generated;
        draws += plan->rows[i].draws;
    }
    if (generated > bounds->n_slots || draws > bounds->n_slots)
        return error_set(error, STATUS_CORRUPT, "step: %u generated rows and %u draws for %u slots",
                         generated, draws, bounds->n_slots);
    if (step_plan_positions(plan) > bounds->max_positions)
        return error_set(error, STATUS_CORRUPT, "step: %u positions, over %u", step_plan_positions(plan),
                         bounds->max_positions);
    return STATUS_OK;
}

int step_plan_validate(const struct step_plan *plan, const struct step_bounds *bounds, struct error *error)
{
    if (plan->n_commands > MAX_STEP_COMMANDS || plan->n_rows > MAX_STEP_ROWS)
        return error_set(error, STATUS_CORRUPT, "step: %u commands and %u rows, over %d and %d",
                         plan->n_commands, plan->n_rows, MAX_STEP_COMMANDS, MAX_STEP_ROWS);
    int status = check_ids(plan, bounds, error);
    for (uint32_t i = 0; status == STATUS_OK && i < plan->n_commands; i++)
        status = check_command(plan, i, bounds, error);
    for (uint32_t i = 0; status == STATUS_OK && i < plan->n_rows; i++)
        status = check_row(plan, i, bounds, error);
    return status ? status : check_sums(plan, bounds, error);
}

// --- results ---

void step_result_init(struct step_result *result)
{
    memset(result, 0, sizeof(*result));
}

void step_result_free(struct step_result *result)
{
    free(result->samples);
    free(result->prompts);
    free(result->tops);
    step_result_init(result);
}

void step_result_clear(struct step_result *result)
{
    result->epoch = result->number = result->compute_us = result->wait_us = 0;
    result->n_samples = result->n_prompts = result->n_tops = 0;
}

struct step_sample *step_result_add_sample(struct step_result *result)
{
    if (!reserve(&result->samples, result->n_samples, &result->capacity.samples, 1,
                 MAX_STEP_ROWS * MAX_CHOICES, sizeof(*result->samples)))
        return NULL;
    struct step_sample *sample = &result->samples[result->n_samples++];
    *sample = (struct step_sample){0};
    return sample;
}

struct step_prompt_logprob *step_result_add_prompt(struct step_result *result)
{
    if (!reserve(&result->prompts, result->n_prompts, &result->capacity.prompts, 1, MAX_STEP_TOKENS,
                 sizeof(*result->prompts)))
        return NULL;
    struct step_prompt_logprob *prompt = &result->prompts[result->n_prompts++];
    *prompt = (struct step_prompt_logprob){0};
    return prompt;
}

struct token_logprob *step_result_add_tops(struct step_result *result, uint32_t count)
{
    bool needed = count > 0 || !result->tops; // asked for none: still not NULL, which would mean failure
    if (needed && !reserve(&result->tops, result->n_tops, &result->capacity.tops, count ? count : 1,
                           MAX_RESULT_TOPS, sizeof(*result->tops)))
        return NULL;
    struct token_logprob *tops = result->tops + result->n_tops;
    memset(tops, 0, count * sizeof(*tops));
    result->n_tops += count;
    return tops;
}
