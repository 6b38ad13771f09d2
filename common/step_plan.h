// The step plan: everything the stages need for one forward pass of one micro-batch, emitted by the
// scheduler, checked on both sides, carried to every stage of the pool in order. Flat: arrays with bounds, no
// pointers between records.
//
// A stage does, for each plan in order of `number`: the commands, in order; then the rows, as one batch. A
// plan of another epoch is dropped. Numbers start at 0 in each epoch and have no gaps. Plain data; owned by
// one thread at a time.
#ifndef STRATA_STEP_PLAN_H
#define STRATA_STEP_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "common/limits.h"
#include "common/sampling.h"
#include "common/status.h"

enum step_command_kind {
    STEP_OPEN = 1,  // a closed slot becomes a sequence: sampling state is set, the page table is empty
    STEP_CLOSE = 2, // an open slot is closed; its page table is forgotten (pages are only numbers here)
    STEP_PAGES = 3, // entries [table_first, table_first + pages_count) of the slot's page table become
                    // plan->pages[...]
    STEP_COPY =
        4 // the bytes of page `copy_from` are copied to `copy_to` on every layer (forks, copy-on-write)
};

struct step_command {
    enum step_command_kind kind;
    uint32_t slot;                     // OPEN, CLOSE, PAGES
    uint32_t table_first;              // PAGES
    uint32_t pages_first, pages_count; // PAGES: into plan->pages
    uint32_t copy_from, copy_to;       // COPY: page ids
    // OPEN: what the last stage needs so that a resumed sequence samples as if it had never moved.
    struct sampling_params sampling;
    uint32_t choice; // part of the random stream
    // Into plan->tokens: every token so far, prompt first, then output. The prompt may be left out when the
    // repetition penalty is off (nothing else looks at it); history_count - history_prompt is always the
    // number of outputs so far.
    uint32_t history_first, history_count;
    uint32_t history_prompt;         // how many of them are prompt
    uint32_t bias_first, bias_count; // into plan->biases
    uint32_t ban_first,
        ban_count; // into plan->tokens: ids that cannot be drawn before sampling.min_tokens outputs
};

enum step_logits { STEP_LOGITS_NONE = 0, STEP_LOGITS_LAST = 1, STEP_LOGITS_ALL = 2 };

// `count` consecutive positions of one sequence. A row is generated when it computes a token that was drawn,
// known to the coordinator or not: the class decides how it is computed, so a token's class never changes.
struct step_row {
    uint32_t slot;
    uint32_t position; // of the first token
    uint32_t count;    // positions computed
    bool generated;    // computes a token that was generated: count 1, before all rows that are not
    bool from_sample; // generated, and the one token (count 1) is sample `source_draw` of row `source_row` of
                      // step `source_step`
    bool
        must_wait; // this sequence's next row may not be planned before this one's result (never from_sample)
    uint32_t tokens_first; // !from_sample: into plan->tokens
    uint64_t source_step;  // from_sample: number - MAX_STEP_HISTORY <= source_step < number
    uint32_t source_row;
    uint32_t source_draw;
    uint32_t draws; // samples drawn from the last position: 0, 1, or n (choices 0..n-1 of the random stream)
    enum step_logits
        logits;    // LAST iff draws > 0 and no prompt logprobs; ALL: a prompt logprob for every position
    bool logprobs; // report the logprob of each sample
    uint32_t top_logprobs; // and that many alternatives (also for prompt logprobs)
    int32_t next_token;    // ALL: the token after the last position (its logprob is reported), -1 = none:
                           // the last position is then not scored
};

struct step_plan {
    uint64_t epoch;
    uint64_t number;
    uint32_t n_commands, n_rows, n_tokens, n_pages, n_biases;
    struct step_command *commands; // [capacity.commands]
    struct step_row *rows;         // [capacity.rows]
    int32_t *tokens;               // [capacity.tokens]
    uint32_t *pages;               // [capacity.pages]
    struct logit_bias *biases;     // [capacity.biases]
    struct {
        uint32_t commands, rows, tokens, pages, biases;
    } capacity;
};

// Arrays grow on demand through step_plan_reserve_*; after the first steps of a load they no longer do.
void step_plan_init(struct step_plan *plan);
void step_plan_free(struct step_plan *plan);
void step_plan_clear(struct step_plan *plan); // keeps capacity
// Each appends and returns the new record zeroed (or the index of the first element), NULL / -1 when memory
// is out or the limit is reached.
struct step_command *step_plan_add_command(struct step_plan *plan, enum step_command_kind kind,
                                           uint32_t slot);
struct step_row *step_plan_add_row(struct step_plan *plan);
int64_t step_plan_add_tokens(struct step_plan *plan, const int32_t *tokens, uint32_t count);
int64_t step_plan_add_pages(struct step_plan *plan, const uint32_t *pages, uint32_t count);
int64_t step_plan_add_biases(struct step_plan *plan, const struct logit_bias *biases, uint32_t count);
uint32_t step_plan_positions(const struct step_plan *plan); // sum of row counts

// What a pool agreed on at assembly: bounds for validation.
struct step_bounds {
    uint32_t n_slots; // slots 0..n_slots-1; also the most draws of one step, as each draw is for a sequence
    uint32_t n_pages; // pages 0..n_pages-1
    uint32_t context; // positions a sequence may have
    uint32_t vocab_size;
    uint32_t max_positions; // of one step
};
// Checks every index and bound that can be checked without history. STATUS_CORRUPT with a sentence.
int step_plan_validate(const struct step_plan *plan, const struct step_bounds *bounds, struct error *error);

// --- results: from the last stage back to the coordinator ---

struct token_logprob {
    int32_t token;
    float logprob; // natural logarithm, of the model's own distribution
};

struct step_sample {
    uint32_t row;  // of the plan
    uint32_t draw; // 0..draws-1
    int32_t token;
    float logprob;                 // 0 unless asked for
    uint32_t top_first, top_count; // into result->tops
};

struct step_prompt_logprob {
    uint32_t row;
    uint32_t position; // of the token scored (the logits came from position - 1)
    struct token_logprob token;
    uint32_t top_first, top_count;
};

struct step_result { // samples by row, then draw; prompts by row, then position, without gaps
    uint64_t epoch;
    uint64_t number;
    uint32_t n_samples, n_prompts, n_tops;
    struct step_sample *samples;
    struct step_prompt_logprob *prompts;
    struct token_logprob *tops;
    struct {
        uint32_t samples, prompts, tops;
    } capacity;
    uint64_t compute_us; // on the last stage
    uint64_t wait_us;    // on the last stage, for its neighbour
};
void step_result_init(struct step_result *result);
void step_result_free(struct step_result *result);
void step_result_clear(struct step_result *result);
struct step_sample *step_result_add_sample(struct step_result *result);
struct step_prompt_logprob *step_result_add_prompt(struct step_result *result);
struct token_logprob *step_result_add_tops(struct step_result *result,
                                           uint32_t count); // `count` records, zeroed

#endif
