// A pool of workers without arithmetic: executes step plans as the stages of a pool must, stage by stage and
// in order, and fails the test on every plan that a correct pool could not run. For scheduler tests and
// timings.
//
// Every stage has its own pages. A cell holds the token of one position and a hash of all tokens up to it, as
// keys and values depend on all that came before; each row first walks every cell below it and requires one
// unbroken history. A page shared, copied, reused or overwritten wrongly breaks the walk, or gives a hash
// that draws other tokens than the model does when the request is alone (fake_draw, which knows nothing of
// plans).
#ifndef STRATA_TESTS_POOL_MODEL_H
#define STRATA_TESTS_POOL_MODEL_H

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "common/step_plan.h"

// Not ck_assert, which writes to a pipe each time it holds.
#define MODEL_REQUIRE(condition, ...)                                                                        \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            ck_abort_msg(__VA_ARGS__);                                                                       \
    } while (0)

// --- the fake model ---

static inline uint64_t mix(uint64_t hash, uint64_t value)
{
    uint64_t x = (hash ^ value) + 0x9E3779B97F4A7C15u + (hash << 6);
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// What a sampler knows of a sequence. Sums of hashes: order does not matter to a penalty.
struct fake_sampler {
    struct sampling_params params;
    uint32_t choice;
    uint64_t prompt_sum, output_sum, bias_hash;
    uint32_t n_outputs;
    int32_t banned[256];
    uint32_t n_banned;
};

static inline void fake_sampler_init(struct fake_sampler *sampler, const struct sampling_params *params,
                                     const struct logit_bias *biases, uint32_t n_biases,
                                     const int32_t *banned, uint32_t n_banned)
{
    memset(sampler, 0, sizeof(*sampler));
    sampler->params = *params;
    for (uint32_t i = 0; i < n_biases; i++)
        sampler->bias_hash += mix((uint64_t)biases[i].token, (uint64_t)(int64_t)(biases[i].bias * 16));
    memcpy(sampler->banned, banned, n_banned * sizeof(*banned));
    sampler->n_banned = n_banned;
}

static inline void fake_sampler_see(struct fake_sampler *sampler, int32_t token, bool output)
{
    if (output) {
        sampler->output_sum += mix(7, (uint64_t)token);
        sampler->n_outputs++;
    } else if (sampler->params.repetition_penalty != 1.0f) {
        sampler->prompt_sum += mix(7, (uint64_t)token);
    }
}

// The token drawn for `position` by `choice` after the history hashed in `hash`.
static inline int32_t fake_draw(const struct fake_sampler *sampler, uint64_t hash, uint32_t choice,
                                uint32_t position, uint32_t vocab_size)
{
    const struct sampling_params *p = &sampler->params;
    uint64_t x = mix(mix(mix(hash, p->seed), choice), position);
    x = mix(x, sampler->bias_hash);
    if (p->repetition_penalty != 1.0f)
        x = mix(x, sampler->prompt_sum + sampler->output_sum);
    if (p->presence_penalty != 0 || p->frequency_penalty != 0)
        x = mix(x, sampler->output_sum);
    int32_t token = (int32_t)(x % vocab_size);
    for (uint32_t i = 0; sampler->n_outputs < p->min_tokens && i < sampler->n_banned; i++) {
        if (token == sampler->banned[i]) {
            token = (token + 1) % (int32_t)vocab_size;
            i = UINT32_MAX; // once more from the first
        }
    }
    return token;
}

static inline float fake_logprob(uint64_t hash, int32_t token)
{
    return -(float)(mix(hash, (uint64_t)token) % 4096) / 256.0f;
}

static inline struct token_logprob fake_top(uint64_t hash, uint32_t rank, uint32_t vocab_size)
{
    int32_t token = (int32_t)(mix(hash, 1000 + rank) % vocab_size);
    return (struct token_logprob){.token = token, .logprob = fake_logprob(hash, token)};
}

// --- the pool ---

enum { MODEL_HISTORY = MAX_STEP_HISTORY + 1 };

struct model_cell {
    int32_t token;
    uint64_t hash;
};
struct model_slot {
    bool open;
    uint32_t table_count;
    uint32_t *table;
    struct fake_sampler sampler;
};
struct model_stage {
    struct model_cell *cells; // [n_pages * KV_PAGE_POSITIONS]
    struct model_slot *slots;
    uint32_t *table_memory;
    uint64_t done; // steps it has run
};
struct model_samples {
    uint32_t n_rows;
    uint32_t first[MAX_STEP_ROWS], draws[MAX_STEP_ROWS];
    int32_t *tokens;
    uint32_t capacity;
};
struct pool_model {
    struct step_bounds bounds;
    uint64_t epoch;
    uint32_t n_stages;
    uint32_t table_pages;
    struct model_stage stages[MAX_STAGES];
    struct step_plan plans[MODEL_HISTORY]; // by number
    uint64_t queued;                       // plans received
    uint64_t resulted;                     // results taken
    uint64_t waits_for[MAX_SLOTS];         // no row of the slot may be planned before so many results
    struct model_samples samples[MODEL_HISTORY];
    struct step_result results[MODEL_HISTORY];
};

static inline struct pool_model *pool_model_new(uint64_t epoch, uint32_t n_stages,
                                                const struct step_bounds *bounds)
{
    struct pool_model *pool = calloc(1, sizeof(*pool));
    MODEL_REQUIRE(pool, "memory is out");
    pool->bounds = *bounds;
    pool->epoch = epoch;
    pool->n_stages = n_stages;
    pool->table_pages = (bounds->context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    for (uint32_t i = 0; i < n_stages; i++) {
        struct model_stage *stage = &pool->stages[i];
        size_t n_cells = (size_t)bounds->n_pages * KV_PAGE_POSITIONS;
        stage->cells = calloc(n_cells, sizeof(*stage->cells));
        stage->slots = calloc(bounds->n_slots, sizeof(*stage->slots));
        stage->table_memory =
            calloc((size_t)bounds->n_slots * pool->table_pages, sizeof(*stage->table_memory));
        for (size_t c = 0; c < n_cells; c++)
            stage->cells[c] = (struct model_cell){.token = -1, .hash = mix(epoch, c)};
        for (uint32_t slot = 0; slot < bounds->n_slots; slot++)
            stage->slots[slot].table = stage->table_memory + (size_t)slot * pool->table_pages;
    }
    return pool;
}

static inline void pool_model_free(struct pool_model *pool)
{
    if (!pool)
        return;
    for (uint32_t i = 0; i < pool->n_stages; i++) {
        free(pool->stages[i].cells);
        free(pool->stages[i].slots);
        free(pool->stages[i].table_memory);
    }
    for (uint32_t i = 0; i < MODEL_HISTORY; i++) {
        step_plan_free(&pool->plans[i]);
        step_result_free(&pool->results[i]);
        free(pool->samples[i].tokens);
    }
    free(pool);
}

// A row that must wait is the last of its sequence until its result is there; several draws have to wait.
static inline void model_check_waiting(struct pool_model *pool, const struct step_plan *plan)
{
    for (uint32_t i = 0; i < plan->n_commands; i++) {
        if (plan->commands[i].kind == STEP_CLOSE)
            pool->waits_for[plan->commands[i].slot] = 0;
    }
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        const struct step_row *row = &plan->rows[i];
        MODEL_REQUIRE(pool->resulted >= pool->waits_for[row->slot],
                      "slot %u ran ahead of a row that must wait", row->slot);
        MODEL_REQUIRE(row->draws <= 1 || row->must_wait, "several draws that need not wait");
        pool->waits_for[row->slot] = row->must_wait ? plan->number + 1 : 0;
    }
}

// The plan arrives: checked as a worker checks it, and kept.
static inline void pool_model_push(struct pool_model *pool, const struct step_plan *plan)
{
    struct error error = {0};
    MODEL_REQUIRE(plan->epoch == pool->epoch && plan->number == pool->queued, "step %llu out of order",
                  (unsigned long long)plan->number);
    MODEL_REQUIRE(pool->queued - pool->resulted <= pool->n_stages, "more than stages + 1 steps in flight");
    MODEL_REQUIRE(step_plan_validate(plan, &pool->bounds, &error) == STATUS_OK, "%s", error.text);
    MODEL_REQUIRE(plan->n_rows > 0, "a step without rows");
    model_check_waiting(pool, plan);
    struct step_plan *copy = &pool->plans[pool->queued++ % MODEL_HISTORY];
    step_plan_clear(copy);
    copy->epoch = plan->epoch;
    copy->number = plan->number;
    for (uint32_t i = 0; i < plan->n_commands; i++)
        *step_plan_add_command(copy, plan->commands[i].kind, 0) = plan->commands[i];
    for (uint32_t i = 0; i < plan->n_rows; i++)
        *step_plan_add_row(copy) = plan->rows[i];
    step_plan_add_tokens(copy, plan->tokens, plan->n_tokens);
    step_plan_add_pages(copy, plan->pages, plan->n_pages);
    step_plan_add_biases(copy, plan->biases, plan->n_biases);
}

static inline struct model_cell *model_cell_at(const struct pool_model *pool, struct model_stage *stage,
                                               const struct model_slot *slot, uint32_t position)
{
    uint32_t index = position / KV_PAGE_POSITIONS;
    MODEL_REQUIRE(index < slot->table_count, "position %u lies outside the page table of %u", position,
                  slot->table_count);
    return &stage->cells[(size_t)slot->table[index] * KV_PAGE_POSITIONS + position % KV_PAGE_POSITIONS];
}

static inline void model_open(const struct step_plan *plan, const struct step_command *c,
                              struct model_slot *slot)
{
    MODEL_REQUIRE(!slot->open, "slot %u is opened twice", c->slot);
    slot->open = true;
    slot->table_count = 0;
    MODEL_REQUIRE(c->ban_count <= 256, "%u banned ids", c->ban_count);
    fake_sampler_init(&slot->sampler, &c->sampling, plan->biases + c->bias_first, c->bias_count,
                      plan->tokens + c->ban_first, c->ban_count);
    slot->sampler.choice = c->choice;
    for (uint32_t i = 0; i < c->history_count; i++)
        fake_sampler_see(&slot->sampler, plan->tokens[c->history_first + i], i >= c->history_prompt);
}

static inline void model_command(struct pool_model *pool, struct model_stage *stage,
                                 const struct step_plan *plan, const struct step_command *c)
{
    struct model_slot *slot = &stage->slots[c->kind == STEP_COPY ? 0 : c->slot];
    switch (c->kind) {
    case STEP_OPEN:
        model_open(plan, c, slot);
        return;
    case STEP_CLOSE:
        MODEL_REQUIRE(slot->open, "slot %u is closed twice", c->slot);
        slot->open = false;
        slot->table_count = 0;
        return;
    case STEP_PAGES:
        MODEL_REQUIRE(slot->open, "pages for the closed slot %u", c->slot);
        MODEL_REQUIRE(c->table_first <= slot->table_count, "a gap in the page table of slot %u", c->slot);
        memcpy(slot->table + c->table_first, plan->pages + c->pages_first,
               c->pages_count * sizeof(*plan->pages));
        if (c->table_first + c->pages_count > slot->table_count)
            slot->table_count = c->table_first + c->pages_count;
        return;
    case STEP_COPY:
        memcpy(stage->cells + (size_t)c->copy_to * KV_PAGE_POSITIONS,
               stage->cells + (size_t)c->copy_from * KV_PAGE_POSITIONS,
               KV_PAGE_POSITIONS * sizeof(*stage->cells));
        return;
    }
}

// Nobody else who is open may see what is written.
static inline void model_check_private(struct pool_model *pool, struct model_stage *stage, uint32_t writer,
                                       uint32_t index)
{
    uint32_t page = stage->slots[writer].table[index];
    for (uint32_t other = 0; other < pool->bounds.n_slots; other++) {
        for (uint32_t i = 0; i < stage->slots[other].table_count; i++) {
            if (stage->slots[other].table[i] == page && (other != writer || i != index))
                ck_abort_msg("slot %u writes page %u, which slot %u holds too", writer, page, other);
        }
    }
}

static inline int32_t model_row_token(struct pool_model *pool, const struct step_plan *plan,
                                      const struct step_row *row, uint32_t index)
{
    if (!row->from_sample)
        return plan->tokens[row->tokens_first + index];
    const struct model_samples *samples = &pool->samples[row->source_step % MODEL_HISTORY];
    MODEL_REQUIRE(row->source_row < samples->n_rows && row->source_draw < samples->draws[row->source_row],
                  "row %u of step %llu drew no such sample", row->source_row,
                  (unsigned long long)row->source_step);
    return samples->tokens[samples->first[row->source_row] + row->source_draw];
}

static inline void model_score(struct pool_model *pool, struct step_result *result, uint32_t r,
                               const struct step_row *row, uint64_t hash, uint32_t position, int32_t token)
{
    struct step_prompt_logprob *score = step_result_add_prompt(result);
    *score = (struct step_prompt_logprob){.row = r,
                                          .position = position,
                                          .token = {.token = token, .logprob = fake_logprob(hash, token)},
                                          .top_first = result->n_tops,
                                          .top_count = row->top_logprobs};
    struct token_logprob *tops = step_result_add_tops(result, row->top_logprobs);
    for (uint32_t i = 0; i < row->top_logprobs; i++)
        tops[i] = fake_top(hash, i, pool->bounds.vocab_size);
}

static inline void model_sample(struct pool_model *pool, const struct step_plan *plan, uint32_t r,
                                struct model_slot *slot, uint64_t hash, struct step_result *result)
{
    const struct step_row *row = &plan->rows[r];
    struct model_samples *samples = &pool->samples[plan->number % MODEL_HISTORY];
    uint32_t first = r == 0 ? 0 : samples->first[r - 1] + samples->draws[r - 1];
    samples->first[r] = first;
    samples->draws[r] = row->draws;
    samples->n_rows = r + 1;
    if (first + row->draws > samples->capacity) {
        samples->capacity = (first + row->draws) * 2;
        samples->tokens = realloc(samples->tokens, samples->capacity * sizeof(*samples->tokens));
    }
    uint32_t tops = row->draws > 0 ? row->top_logprobs : 0, top_first = result->n_tops;
    struct token_logprob *top = step_result_add_tops(result, tops);
    for (uint32_t i = 0; i < tops; i++)
        top[i] = fake_top(hash, i, pool->bounds.vocab_size);
    for (uint32_t draw = 0; draw < row->draws; draw++) {
        uint32_t choice = row->draws > 1 ? draw : slot->sampler.choice;
        int32_t token =
            fake_draw(&slot->sampler, hash, choice, row->position + row->count, pool->bounds.vocab_size);
        samples->tokens[first + draw] = token;
        struct step_sample *sample = step_result_add_sample(result);
        *sample = (struct step_sample){.row = r,
                                       .draw = draw,
                                       .token = token,
                                       .logprob = row->logprobs ? fake_logprob(hash, token) : 0,
                                       .top_first = top_first,
                                       .top_count = tops};
        if (row->draws == 1)
            fake_sampler_see(&slot->sampler, token, true);
    }
}

static inline void model_row(struct pool_model *pool, struct model_stage *stage, const struct step_plan *plan,
                             uint32_t r, struct step_result *result)
{
    const struct step_row *row = &plan->rows[r];
    struct model_slot *slot = &stage->slots[row->slot];
    MODEL_REQUIRE(slot->open, "a row for the closed slot %u", row->slot);
    for (uint32_t other = 0; other < r; other++)
        MODEL_REQUIRE(plan->rows[other].slot != row->slot, "two rows for slot %u in one step", row->slot);
    uint64_t hash = 0;
    for (uint32_t p = 0; p < row->position; p++) {
        const struct model_cell *cell = model_cell_at(pool, stage, slot, p);
        hash = mix(hash, (uint64_t)cell->token);
        MODEL_REQUIRE(cell->token >= 0 && hash == cell->hash,
                      "step %llu, row %u, slot %u: position %u of %u is not of this history",
                      (unsigned long long)plan->number, r, row->slot, p, row->position);
    }
    uint32_t end = row->position + row->count;
    for (uint32_t p = row->position; p < end; p++) {
        if (p == row->position || p % KV_PAGE_POSITIONS == 0)
            model_check_private(pool, stage, row->slot, p / KV_PAGE_POSITIONS);
        int32_t token = model_row_token(pool, plan, row, p - row->position);
        hash = mix(hash, (uint64_t)token);
        *model_cell_at(pool, stage, slot, p) = (struct model_cell){.token = token, .hash = hash};
        int32_t next =
            p + 1 < end ? plan->tokens[row->tokens_first + p + 1 - row->position] : row->next_token;
        if (result && row->logits == STEP_LOGITS_ALL && next >= 0)
            model_score(pool, result, r, row, hash, p + 1, next);
    }
    if (result)
        model_sample(pool, plan, r, slot, hash, result);
}

// Whether stage `i` has a step to run, and the tokens for it.
static inline bool pool_model_can_run(const struct pool_model *pool, uint32_t i)
{
    uint64_t number = pool->stages[i].done;
    if (number >= (i == 0 ? pool->queued : pool->stages[i - 1].done))
        return false;
    const struct step_plan *plan = &pool->plans[number % MODEL_HISTORY];
    for (uint32_t r = 0; i == 0 && r < plan->n_rows; r++) {
        if (plan->rows[r].from_sample && plan->rows[r].source_step >= pool->stages[pool->n_stages - 1].done)
            return false; // its token has not come back yet
    }
    return true;
}

static inline void pool_model_run(struct pool_model *pool, uint32_t i)
{
    struct model_stage *stage = &pool->stages[i];
    const struct step_plan *plan = &pool->plans[stage->done % MODEL_HISTORY];
    struct step_result *result = NULL;
    if (i == pool->n_stages - 1) {
        result = &pool->results[plan->number % MODEL_HISTORY];
        step_result_clear(result);
        result->epoch = plan->epoch;
        result->number = plan->number;
    }
    for (uint32_t c = 0; c < plan->n_commands; c++)
        model_command(pool, stage, plan, &plan->commands[c]);
    for (uint32_t r = 0; r < plan->n_rows; r++)
        model_row(pool, stage, plan, r, result);
    stage->done++;
}

// The next result, NULL when there is none yet.
static inline const struct step_result *pool_model_result(struct pool_model *pool)
{
    if (pool->resulted >= pool->stages[pool->n_stages - 1].done)
        return NULL;
    return &pool->results[pool->resulted++ % MODEL_HISTORY];
}

#endif
