// The sampler of the CPU backend: what each slot needs to draw as its sequence would have drawn alone, and
// the ops that draw and score.
//
// A slot keeps its parameters, biases and bans, and, only when a penalty is on, a hash table of the tokens it
// has seen with their counts: opening a slot costs what its history costs, and memory grows with the tokens
// really used, not with the vocabulary. A row without modifications is read where it lies; otherwise its copy
// in the worker's scratch gets the few changes.
//
// Ops run on the executor's thread; rows are tasks on the compute threads. Each slot belongs to one row of a
// call, so tasks share nothing. sampler_draw.c and vocab_scan_internal.h do the work on a row.
#include <stdlib.h>

#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/sampler_draw_internal.h"
#include "kernels/random_stream.h"

struct seen_token {
    int32_t token;    // -1: a free entry
    uint32_t outputs; // how often it was drawn
};

struct seen_table { // open addressing, at most half full
    struct seen_token *entries;
    uint32_t capacity; // 0 or a power of two
    uint32_t used;
};

struct sampler_slot {
    struct sampling_params params;
    uint32_t choice;
    uint32_t n_outputs;
    bool penalized; // `seen` is kept
    struct seen_table seen;
    struct logit_bias *biases;
    int32_t *banned;
    uint32_t n_biases, n_banned;
};

struct sampler {
    uint32_t n_slots, vocab;
    struct sampler_slot *slots;
};

static const struct vocab_scan *scan_of(const struct cpu_device *device)
{
    return device->level == LEVEL_AVX512 ? &vocab_scan_avx512
           : device->level == LEVEL_AVX2 ? &vocab_scan_avx2
                                         : &vocab_scan_portable;
}

// --- tokens seen ---

static struct seen_token *seen_find(const struct seen_table *seen, int32_t token)
{
    uint32_t at = (uint32_t)token * 0x9E3779B9u;
    for (at ^= at >> 15;; at++) {
        struct seen_token *entry = &seen->entries[at & (seen->capacity - 1)];
        if (entry->token == token || entry->token < 0)
            return entry;
    }
}

// Makes room for `more` tokens that may all be new.
static bool seen_reserve(struct seen_table *seen, uint32_t more)
{
    uint64_t need = 2 * ((uint64_t)seen->used + more), capacity = seen->capacity ? seen->capacity : 64;
    if (need <= seen->capacity)
        return true;
    while (capacity < need)
        capacity *= 2;
    struct seen_table larger = {malloc(capacity * sizeof(struct seen_token)), (uint32_t)capacity, seen->used};
    if (!larger.entries)
        return false;
    memset(larger.entries, 0xff, capacity * sizeof(struct seen_token));
    for (uint32_t i = 0; i < seen->capacity; i++)
        if (seen->entries[i].token >= 0)
            *seen_find(&larger, seen->entries[i].token) = seen->entries[i];
    free(seen->entries);
    *seen = larger;
    return true;
}

// There is room.
static void seen_add(struct seen_table *seen, int32_t token, bool output)
{
    struct seen_token *entry = seen_find(seen, token);
    if (entry->token < 0) {
        *entry = (struct seen_token){token, 0};
        seen->used++;
    }
    entry->outputs += output;
}

// --- slots ---

// Slots live in the process's own heap and grow with what they have seen.
size_t cpu_sampler_bytes(const struct device *device, uint32_t n_slots, uint32_t vocab)
{
    return n_slots * sizeof(struct sampler_slot);
}

int cpu_sampler_new(struct sampler **out, struct device *device, uint32_t n_slots, uint32_t vocab,
                    struct error *error)
{
    struct sampler *sampler = calloc(1, sizeof *sampler);
    if (sampler)
        sampler->slots = calloc(n_slots ? n_slots : 1, sizeof *sampler->slots);
    if (!sampler || !sampler->slots) {
        free(sampler);
        return error_set(error, STATUS_NO_MEMORY, "no memory for a sampler of %u sequences", n_slots);
    }
    sampler->n_slots = n_slots;
    sampler->vocab = vocab;
    *out = sampler;
    return 0;
}

void cpu_sampler_close(struct device *device, struct sampler *sampler, uint32_t slot)
{
    struct sampler_slot *closed = &sampler->slots[slot];
    free(closed->seen.entries);
    free(closed->biases);
    free(closed->banned);
    *closed = (struct sampler_slot){0};
}

void cpu_sampler_free(struct device *device, struct sampler *sampler)
{
    if (!sampler)
        return;
    for (uint32_t slot = 0; slot < sampler->n_slots; slot++)
        cpu_sampler_close(device, sampler, slot);
    free(sampler->slots);
    free(sampler);
}

static bool known(const struct sampler *sampler, int32_t token)
{
    return token >= 0 && (uint32_t)token < sampler->vocab;
}

// Copies what the slot keeps; ids outside the vocabulary have no logit to change and are dropped.
static bool slot_fill(const struct sampler *sampler, struct sampler_slot *slot,
                      const struct sampler_open *open)
{
    if (open->n_biases && !(slot->biases = malloc(open->n_biases * sizeof *slot->biases)))
        return false;
    for (uint32_t i = 0; i < open->n_biases; i++)
        if (known(sampler, open->biases[i].token))
            slot->biases[slot->n_biases++] = open->biases[i];
    if (open->n_banned && !(slot->banned = malloc(open->n_banned * sizeof *slot->banned)))
        return false;
    for (uint32_t i = 0; i < open->n_banned; i++)
        if (known(sampler, open->banned[i]))
            slot->banned[slot->n_banned++] = open->banned[i];
    if (!slot->penalized)
        return true;
    for (uint32_t i = 0; i < open->n_history; i++) {
        if (!known(sampler, open->history[i]))
            continue;
        if (!seen_reserve(&slot->seen, 1))
            return false;
        seen_add(&slot->seen, open->history[i], i >= open->n_prompt);
    }
    return true;
}

int cpu_sampler_open(struct device *device, struct sampler *sampler, uint32_t slot,
                     const struct sampler_open *open)
{
    cpu_sampler_close(device, sampler, slot);
    struct sampler_slot *opened = &sampler->slots[slot];
    const struct sampling_params *params = &open->params;
    opened->params = *params;
    opened->choice = open->choice;
    opened->n_outputs = open->n_history > open->n_prompt ? open->n_history - open->n_prompt : 0;
    opened->penalized =
        params->repetition_penalty != 1 || params->presence_penalty != 0 || params->frequency_penalty != 0;
    if (!slot_fill(sampler, opened, open)) {
        cpu_sampler_close(device, sampler, slot);
        return STATUS_NO_MEMORY;
    }
    return 0;
}

// --- sample ---

struct sample_args {
    struct cpu_device *device;
    struct sampler *sampler;
    const float *logits;
    const struct sample_row *rows;
    int32_t *tokens;
    float *logprobs;
    struct token_logprob *tops;
};

// What the row's distribution is measured by: logprob(i) = logit(i) - base.
struct row_measure {
    float max;
    double base;
};

static struct row_measure measure_row(const struct vocab_scan *scan, const float *logits, uint32_t vocab)
{
    struct row_measure measure = {.max = scan->max(logits, vocab)};
    if (measure.max > -INFINITY)
        measure.base = (double)measure.max + log(scan->exp_sum(logits, vocab, measure.max));
    return measure;
}

static float logprob_of(const struct row_measure *measure, float logit)
{
    if (!(logit > -INFINITY)) // NaN too
        return -INFINITY;
    return (float)((double)(logit > FLT_MAX ? FLT_MAX : logit) - measure->base);
}

// The `count` likeliest tokens; where fewer have any probability, the rest is {-1, -infinity}.
static void store_tops(const struct vocab_scan *scan, const float *logits, uint32_t vocab,
                       const struct row_measure *measure, struct token_logprob *out, uint32_t count)
{
    int32_t ids[MAX_TOP_LOGPROBS];
    float values[MAX_TOP_LOGPROBS];
    uint32_t wanted = count < MAX_TOP_LOGPROBS ? count : MAX_TOP_LOGPROBS;
    uint32_t have = scan->top(logits, vocab, wanted, ids, values);
    for (uint32_t i = 0; i < count; i++)
        out[i] = i < have ? (struct token_logprob){ids[i], logprob_of(measure, values[i])}
                          : (struct token_logprob){-1, -INFINITY};
}

// The penalties of a token that was seen, on its biased logit.
static float penalized(float logit, const struct seen_token *seen, const struct sampling_params *params)
{
    if (params->repetition_penalty != 1)
        logit = logit > 0 ? logit / params->repetition_penalty : logit * params->repetition_penalty;
    if (seen->outputs)
        logit -= params->presence_penalty + params->frequency_penalty * (float)seen->outputs;
    return logit;
}

// The row with bias, penalties and bans on it: a copy in `to` if there are any.
static const float *adjust_row(const struct sampler_slot *slot, const float *logits, uint32_t vocab,
                               float *to)
{
    uint32_t n_banned = slot->n_outputs < slot->params.min_tokens ? slot->n_banned : 0;
    if (!slot->n_biases && !slot->seen.used && !n_banned)
        return logits;
    memcpy(to, logits, vocab * sizeof *to);
    for (uint32_t i = 0; i < slot->n_biases; i++)
        to[slot->biases[i].token] += slot->biases[i].bias;
    for (uint32_t i = 0; i < slot->seen.capacity; i++) {
        const struct seen_token *seen = &slot->seen.entries[i];
        if (seen->token >= 0)
            to[seen->token] = penalized(to[seen->token], seen, &slot->params);
    }
    for (uint32_t i = 0; i < n_banned; i++)
        to[slot->banned[i]] = -INFINITY;
    return to;
}

static void sample_one(void *context, uint32_t task, uint32_t worker)
{
    const struct sample_args *args = context;
    const struct sample_row *row = &args->rows[task];
    const struct vocab_scan *scan = scan_of(args->device);
    struct sampler_slot *slot = &args->sampler->slots[row->slot];
    uint32_t vocab = args->sampler->vocab;
    const float *logits = args->logits + (size_t)row->logits_row * vocab;
    struct draw_space space;
    draw_space_cut(&space, cpu_scratch(args->device, worker), vocab);
    struct draw_set set;
    draw_set_make(&set, scan, &space, adjust_row(slot, logits, vocab, space.adjusted), vocab, &slot->params);

    struct row_measure measure = {0};
    if (row->logprob || row->top)
        measure = measure_row(scan, logits, vocab);
    for (uint32_t draw = 0; draw < row->draws; draw++) {
        uint32_t choice = row->draws > 1 ? draw : slot->choice;
        int32_t token = draw_set_draw(&set, random_stream_uniform(slot->params.seed, choice, row->position));
        args->tokens[row->out_first + draw] = token;
        args->logprobs[row->out_first + draw] = row->logprob ? logprob_of(&measure, logits[token]) : 0;
    }
    if (row->top)
        store_tops(scan, logits, vocab, &measure, args->tops + row->top_first, row->top);
    if (row->draws == 1) {
        slot->n_outputs++;
        if (slot->penalized)
            seen_add(&slot->seen, args->tokens[row->out_first], true);
    }
}

void cpu_sample(struct device *device, struct sampler *sampler, const float *logits,
                const struct sample_row *rows, uint32_t n_rows, int32_t *out_tokens, float *out_logprobs,
                struct token_logprob *out_tops)
{
    struct sample_args args = {cpu_device_of(device), sampler, logits, rows, out_tokens,
                               out_logprobs,          out_tops};
    if (!cpu_scratch_reserve(args.device, draw_space_bytes(sampler->vocab)))
        return;
    for (uint32_t i = 0; i < n_rows; i++) {
        struct sampler_slot *slot = &sampler->slots[rows[i].slot];
        if (slot->penalized && !seen_reserve(&slot->seen, 1)) {
            cpu_device_fault(args.device, STATUS_NO_MEMORY, "no memory for the tokens a sequence has seen");
            return;
        }
    }
    cpu_parallel(args.device, sample_one, &args, n_rows);
}

// --- score ---

struct score_args {
    struct cpu_device *device;
    const float *logits;
    uint32_t vocab;
    const struct score_row *rows;
    float *logprobs;
    struct token_logprob *tops;
};

static void score_one(void *context, uint32_t task, uint32_t worker)
{
    const struct score_args *args = context;
    const struct score_row *row = &args->rows[task];
    const struct vocab_scan *scan = scan_of(args->device);
    const float *logits = args->logits + (size_t)row->logits_row * args->vocab;
    struct row_measure measure = measure_row(scan, logits, args->vocab);
    if (row->target >= 0)
        args->logprobs[row->out] = logprob_of(&measure, logits[row->target]);
    if (row->top)
        store_tops(scan, logits, args->vocab, &measure, args->tops + row->top_first, row->top);
}

void cpu_score(struct device *device, const float *logits, uint32_t vocab, const struct score_row *rows,
               uint32_t n_rows, float *out_logprobs, struct token_logprob *out_tops)
{
    struct score_args args = {cpu_device_of(device), logits, vocab, rows, out_logprobs, out_tops};
    cpu_parallel(args.device, score_one, &args, n_rows);
}
