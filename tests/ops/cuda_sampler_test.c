// The GPU's sampler against the CPU's: the same opens, draws and closes on both, with fresh random logits and
// requests of all kinds. Both keep the same tokens and measure them by the same weights, so tokens agree but
// where a draw or top-p's end hangs on the rounding of a sum: less than one in a thousand. Then what needs no
// second device: that a row's tokens do not depend on its neighbours.
#include "tests/ops/op_fixture.h"

enum { CPU, GPU, SIDES };

struct pair { // both devices with a sampler each
    struct device *device[SIDES];
    struct sampler *sampler[SIDES];
    uint32_t vocab;
};

// `general`: on the CPU's side is the same GPU on the general path.
static struct pair pair_open_either(uint32_t n_slots, uint32_t vocab, bool general)
{
    struct pair pair = {.vocab = vocab};
    struct device_options options[SIDES] = {
        [CPU] = {.backend = "cpu", .threads = 2, .level = LEVEL_PORTABLE}, [GPU] = {.backend = "cuda"}};
    struct error error = {0};
    if (general)
        options[CPU] = options[GPU];
    for (int side = 0; side < SIDES; side++) {
        bool change = general && side == CPU, was = change && fixture_general_begin();
        ck_assert_msg(device_open(&pair.device[side], &options[side], &error) == 0, "%s", error.text);
        if (change)
            fixture_general_end(was);
    }
    for (int side = 0; side < SIDES; side++) {
        const struct kernel_ops *ops = device_ops(pair.device[side]);
        ck_assert_uint_gt(ops->sampler_bytes(pair.device[side], n_slots, vocab), 0);
        ck_assert_msg(ops->sampler_new(&pair.sampler[side], pair.device[side], n_slots, vocab, &error) == 0,
                      "%s", error.text);
    }
    return pair;
}

static struct pair pair_open(uint32_t n_slots, uint32_t vocab)
{
    return pair_open_either(n_slots, vocab, false);
}

static void pair_close(struct pair *pair)
{
    for (int side = 0; side < SIDES; side++) {
        device_ops(pair->device[side])->sampler_free(pair->device[side], pair->sampler[side]);
        fixture_close(pair->device[side]);
    }
}

static void pair_slot(struct pair *pair, uint32_t slot, const struct sampler_open *open)
{
    for (int side = 0; side < SIDES; side++)
        ck_assert_int_eq(
            device_ops(pair->device[side])->sampler_open(pair->device[side], pair->sampler[side], slot, open),
            0);
}

static void pair_slot_close(struct pair *pair, uint32_t slot)
{
    for (int side = 0; side < SIDES; side++)
        device_ops(pair->device[side])->sampler_close(pair->device[side], pair->sampler[side], slot);
}

struct outcome {
    int32_t *tokens;
    float *logprobs;
    struct token_logprob *tops;
    uint32_t n_tokens, n_tops;
};

static struct outcome outcome_new(uint32_t n_tokens, uint32_t n_tops)
{
    return (struct outcome){calloc(n_tokens + 1, sizeof(int32_t)), calloc(n_tokens + 1, sizeof(float)),
                            calloc(n_tops + 1, sizeof(struct token_logprob)), n_tokens, n_tops};
}

static void outcome_free(struct outcome *outcome)
{
    free(outcome->tokens);
    free(outcome->logprobs);
    free(outcome->tops);
}

// One call of sample, or of score where `scores` are given, on one side. The caller's rows are overwritten
// at once, as it may.
static void side_run(struct pair *pair, int side, const float *logits, uint32_t logits_rows,
                     const struct sample_row *samples, const struct score_row *scores, uint32_t n_rows,
                     struct outcome *out)
{
    struct device *device = pair->device[side];
    const struct kernel_ops *ops = device_ops(device);
    size_t bytes = (size_t)logits_rows * pair->vocab * sizeof(float);
    float *on_device = fixture_put(device, logits, bytes), *back = malloc(bytes);
    int32_t *tokens = fixture_put(device, NULL, out->n_tokens * sizeof *tokens);
    float *logprobs = fixture_put(device, NULL, out->n_tokens * sizeof *logprobs);
    struct token_logprob *tops = fixture_put(device, NULL, out->n_tops * sizeof *tops);
    size_t row_bytes = n_rows * (samples ? sizeof *samples : sizeof *scores);
    void *rows = malloc(row_bytes);
    memcpy(rows, samples ? (const void *)samples : (const void *)scores, row_bytes);
    if (samples)
        ops->sample(device, pair->sampler[side], on_device, rows, n_rows, tokens, logprobs, tops);
    else
        ops->score(device, on_device, pair->vocab, rows, n_rows, logprobs, tops);
    memset(rows, 0xff, row_bytes);
    struct error error = {0};
    ck_assert_msg(ops->sync(device, &error) == 0, "%s", error.text);
    fixture_get(device, back, on_device, bytes);
    ck_assert(!memcmp(back, logits, bytes)); // not changed
    fixture_get(device, out->tokens, tokens, out->n_tokens * sizeof *tokens);
    fixture_get(device, out->logprobs, logprobs, out->n_tokens * sizeof *logprobs);
    fixture_get(device, out->tops, tops, out->n_tops * sizeof *tops);
    fixture_drop(device, tops);
    fixture_drop(device, logprobs);
    fixture_drop(device, tokens);
    fixture_drop(device, on_device);
    free(rows);
    free(back);
}

static void check_logprob(float logprob, float expected)
{
    if (expected == -INFINITY)
        ck_assert_float_eq(logprob, -INFINITY);
    else
        ck_assert_float_eq_tol(logprob, expected, 1e-4f + 1e-6f * fabsf(expected));
}

static void check_tops(const struct outcome *gpu, const struct outcome *cpu)
{
    for (uint32_t i = 0; i < cpu->n_tops; i++) {
        ck_assert_int_eq(gpu->tops[i].token, cpu->tops[i].token);
        check_logprob(gpu->tops[i].logprob, cpu->tops[i].logprob);
    }
}

// --- random requests ---

enum { MOST_HISTORY = 200, MOST_BIASES = 60, MOST_BANNED = 9 };

struct request {
    struct sampler_open open;
    int32_t history[MOST_HISTORY], banned[MOST_BANNED];
    struct logit_bias biases[MOST_BIASES];
};

static bool maybe(void)
{
    return fixture_below(2);
}

// Ids of the vocabulary, now and then one outside of it; a few come often.
static int32_t some_id(uint32_t vocab)
{
    if (!fixture_below(40))
        return maybe() ? -1 : (int32_t)(vocab + fixture_below(9));
    return (int32_t)fixture_below(maybe() && vocab > 30 ? 30 : vocab);
}

static void request_make(struct request *request, uint32_t vocab)
{
    static const float TEMPERATURES[] = {0, 0.3f, 0.8f, 1, 1.7f};
    struct sampler_open *open = &request->open;
    *open = (struct sampler_open){.params = SAMPLING_DEFAULTS,
                                  .choice = fixture_below(3),
                                  .history = request->history,
                                  .biases = request->biases,
                                  .banned = request->banned};
    struct sampling_params *params = &open->params;
    bool truncated = fixture_below(4), few = maybe();
    params->temperature = TEMPERATURES[fixture_below(5)];
    params->seed = fixture_next(&fixture_state);
    params->top_k = truncated && maybe() ? 1 + fixture_below(few ? 50 : vocab + 5) : 0;
    params->top_p = truncated && maybe() ? (float)fixture_uniform() : 1;
    params->min_p = truncated && maybe() ? (float)pow(fixture_uniform(), 3) : 0;
    if (maybe()) {
        params->repetition_penalty = maybe() ? 0.5f + (float)fixture_uniform() : 1;
        params->presence_penalty = maybe() ? (float)fixture_uniform() * 2 - 0.5f : 0;
        params->frequency_penalty = maybe() ? (float)fixture_uniform() : 0;
    }
    params->min_tokens = maybe() ? fixture_below(MOST_HISTORY) : 0;
    open->n_history = fixture_below(MOST_HISTORY + 1);
    open->n_prompt = fixture_below(open->n_history + 1);
    for (uint32_t i = 0; i < open->n_history; i++)
        request->history[i] = some_id(vocab);
    open->n_biases = maybe() ? fixture_below(MOST_BIASES + 1) : 0;
    for (uint32_t i = 0; i < open->n_biases; i++)
        request->biases[i] =
            (struct logit_bias){some_id(vocab), fixture_below(4) ? 4 * fixture_normal() : -INFINITY};
    open->n_banned = fixture_below(MOST_BANNED + 1);
    for (uint32_t i = 0; i < open->n_banned; i++)
        request->banned[i] = some_id(vocab);
}

// Like a model's, or flat, coarse (many are equal), far apart, one far above the others, all equal, tiny,
// or nothing at all; and now and then a NaN or an infinity.
static void logits_make(float *logits, uint32_t vocab)
{
    uint32_t kind = fixture_below(10);
    float scale = kind == 0   ? 0.1f
                  : kind == 1 ? 100
                  : kind == 2 ? 0
                  : kind == 3 ? 1e-8f
                              : 0.5f + 4 * (float)fixture_uniform();
    bool odd = fixture_below(4) == 0, coarse = kind == 4 || kind == 5, nothing = kind == 6 && maybe();
    for (uint32_t i = 0; i < vocab; i++) {
        logits[i] = scale * fixture_normal();
        if (coarse)
            logits[i] = rintf(2 * logits[i]) / 2;
        if (nothing || (odd && !fixture_below(50)))
            logits[i] = maybe() ? -INFINITY : NAN;
    }
    if (kind == 7)
        logits[fixture_below(vocab)] = 30;
    if (kind == 8 && maybe())
        logits[fixture_below(vocab)] = INFINITY;
}

// --- both sides ---

enum { ROWS = 6, TOP = MAX_TOP_LOGPROBS, MOST_DRAWS = 5 };

struct tally {
    uint32_t drawn, differing;
};

// What ROWS fresh requests draw on both sides.
static void compare_round(struct pair *pair, float *logits, struct tally *tally)
{
    static struct request requests[ROWS];
    struct sample_row rows[ROWS];
    struct outcome out[SIDES];
    for (uint32_t i = 0; i < ROWS; i++) {
        request_make(&requests[i], pair->vocab);
        pair_slot(pair, i, &requests[i].open);
        logits_make(logits + (size_t)i * pair->vocab, pair->vocab);
        rows[i] = (struct sample_row){.logits_row = ROWS - 1 - i,
                                      .slot = i,
                                      .position = requests[i].open.n_history,
                                      .draws = maybe() ? 1 : MOST_DRAWS,
                                      .logprob = maybe(),
                                      .top = maybe() ? fixture_below(TOP + 1) : 0,
                                      .out_first = (ROWS - 1 - i) * MOST_DRAWS,
                                      .top_first = i * TOP};
    }
    for (int side = 0; side < SIDES; side++) {
        out[side] = outcome_new(ROWS * MOST_DRAWS, ROWS * TOP);
        side_run(pair, side, logits, ROWS, rows, NULL, ROWS, &out[side]);
    }
    for (uint32_t i = 0; i < ROWS; i++) {
        const struct sampling_params *params = &requests[i].open.params;
        bool exact =
            params->temperature == 0 || (params->top_k && params->top_k < 1000 && params->top_p == 1);
        for (uint32_t at = rows[i].out_first; at < rows[i].out_first + rows[i].draws; at++) {
            bool same = out[CPU].tokens[at] == out[GPU].tokens[at];
            ck_assert_msg(same || !exact, "vocabulary %u: %d, not %d (top-k %u, min-p %g)", pair->vocab,
                          out[GPU].tokens[at], out[CPU].tokens[at], params->top_k, params->min_p);
            tally->drawn++;
            tally->differing += !same;
            if (same)
                check_logprob(out[GPU].logprobs[at], out[CPU].logprobs[at]);
        }
    }
    check_tops(&out[GPU], &out[CPU]);
    for (int side = 0; side < SIDES; side++)
        outcome_free(&out[side]);
}

static void check_tally(const struct tally *tally)
{
    printf("%u of %u draws differ\n", tally->differing, tally->drawn);
    ck_assert_uint_le(tally->differing, 1 + tally->drawn / 1000);
}

START_TEST(test_requests)
{
    fixture_seed("requests");
    static const struct {
        uint32_t vocab, rounds;
    } CASES[] = {{1, 20},     {2, 40},      {37, 100},    {300, 150},   {2049, 100},
                 {32000, 40}, {128256, 25}, {151936, 15}, {151937, 10}, {600001, 4}};
    struct tally tally = {0};
    for (size_t c = 0; c < sizeof CASES / sizeof *CASES; c++) {
        struct pair pair = pair_open(ROWS, CASES[c].vocab);
        float *logits = malloc((size_t)ROWS * pair.vocab * sizeof *logits);
        uint32_t rounds = fixture_is_slow() ? (CASES[c].rounds + 9) / 10 : CASES[c].rounds;
        for (uint32_t round = 0; round < rounds; round++)
            compare_round(&pair, logits, &tally);
        free(logits);
        pair_close(&pair);
    }
    check_tally(&tally);
}
END_TEST

// One block a row draws what eight do.
START_TEST(test_both_paths)
{
    fixture_seed("both paths");
    static const uint32_t VOCABS[] = {300, 32000, 151937};
    struct tally tally = {0};
    for (size_t c = 0; c < sizeof VOCABS / sizeof *VOCABS; c++) {
        struct pair pair = pair_open_either(ROWS, VOCABS[c], true);
        float *logits = malloc((size_t)ROWS * pair.vocab * sizeof *logits);
        for (uint32_t round = 0; round < (fixture_is_slow() ? 2 : 30); round++)
            compare_round(&pair, logits, &tally);
        free(logits);
        pair_close(&pair);
    }
    ck_assert_uint_eq(tally.differing, 0);
}
END_TEST

// Penalties count what was drawn without the host, over many steps; the slot is reopened elsewhere on the
// way, with a history that takes several uploads.
START_TEST(test_history)
{
    fixture_seed("history");
    enum { VOCAB = 5000, HISTORY = 150000, STEPS = 120 };
    int32_t *history = malloc((HISTORY + STEPS) * sizeof *history);
    float *logits = malloc(VOCAB * sizeof *logits);
    for (uint32_t i = 0; i < HISTORY; i++)
        history[i] = (int32_t)fixture_below(VOCAB);
    struct sampler_open open = {
        .params = SAMPLING_DEFAULTS, .history = history, .n_history = HISTORY, .n_prompt = HISTORY - 70000};
    open.params.repetition_penalty = 1.3f;
    open.params.presence_penalty = 0.5f;
    open.params.frequency_penalty = 0.3f;
    open.params.top_k = 20;
    struct pair pair = pair_open(2, VOCAB);
    uint32_t slot = 0, differing = 0;
    pair_slot(&pair, slot, &open);
    fixture_normals(logits, VOCAB, 3);
    for (uint32_t step = 0; step < STEPS; step++) {
        struct sample_row row = {.slot = slot, .position = open.n_history, .draws = 1};
        struct outcome out[SIDES];
        for (int side = 0; side < SIDES; side++) {
            out[side] = outcome_new(1, 0);
            side_run(&pair, side, logits, 1, &row, NULL, 1, &out[side]);
        }
        history[open.n_history++] = out[CPU].tokens[0];
        bool same = out[CPU].tokens[0] == out[GPU].tokens[0];
        differing += !same;
        if (!same || step == STEPS / 2) {
            pair_slot_close(&pair, slot);
            pair_slot(&pair, slot = 1 - slot, &open);
        }
        outcome_free(&out[CPU]);
        outcome_free(&out[GPU]);
    }
    ck_assert_uint_eq(differing, 0);
    pair_close(&pair);
    free(logits);
    free(history);
}
END_TEST

// Greedy, banned until enough was drawn; a frequency penalty makes every step see the one before.
START_TEST(test_minimum_tokens)
{
    enum { VOCAB = 50, STEPS = 8 };
    float logits[VOCAB] = {[7] = 9, [8] = 8, [9] = 7};
    int32_t banned[] = {7, 8, VOCAB, -1}, history[] = {1, 2, 3};
    static const int32_t PLAIN[STEPS] = {9, 9, 7, 7, 7, 7, 7, 7}, FADING[STEPS] = {9, 9, 7, 8, 7, 8, 7, 8};
    for (int fading = 0; fading < 2; fading++) {
        struct sampler_open open = {.params = SAMPLING_DEFAULTS,
                                    .history = history,
                                    .n_history = 3,
                                    .n_prompt = 2, // one output already
                                    .banned = banned,
                                    .n_banned = 4};
        open.params.temperature = 0;
        open.params.min_tokens = 3;
        open.params.frequency_penalty = fading ? 1.25f : 0;
        struct pair pair = pair_open(1, VOCAB);
        pair_slot(&pair, 0, &open);
        for (uint32_t step = 0; step < STEPS; step++) {
            struct sample_row row = {.position = 3 + step, .draws = 1};
            for (int side = 0; side < SIDES; side++) {
                struct outcome out = outcome_new(1, 0);
                side_run(&pair, side, logits, 1, &row, NULL, 1, &out);
                ck_assert_int_eq(out.tokens[0], fading ? FADING[step] : PLAIN[step]);
                outcome_free(&out);
            }
        }
        pair_close(&pair);
    }
}
END_TEST

// n choices from one row are what n slots with those choices draw, and leave the history alone.
START_TEST(test_choices)
{
    fixture_seed("choices");
    enum { VOCAB = 3000, CHOICES = MAX_CHOICES };
    float *logits = malloc(VOCAB * sizeof *logits);
    fixture_normals(logits, VOCAB, 1);
    struct sampler_open open = {.params = SAMPLING_DEFAULTS};
    open.params.seed = 99;
    open.params.frequency_penalty = 50; // a token once in the history would not come again
    struct pair pair = pair_open(1, VOCAB);
    struct sample_row row = {.position = 7, .draws = CHOICES, .logprob = true};
    struct outcome together[SIDES], again = outcome_new(CHOICES, 0), one = outcome_new(1, 0);
    pair_slot(&pair, 0, &open);
    for (int side = 0; side < SIDES; side++) {
        together[side] = outcome_new(CHOICES, 0);
        side_run(&pair, side, logits, 1, &row, NULL, 1, &together[side]);
    }
    side_run(&pair, GPU, logits, 1, &row, NULL, 1, &again);
    ck_assert_mem_eq(together[GPU].tokens, again.tokens, CHOICES * sizeof(int32_t));
    ck_assert_mem_eq(together[GPU].tokens, together[CPU].tokens, CHOICES * sizeof(int32_t));
    row.draws = 1;
    for (uint32_t choice = 0; choice < CHOICES; choice++) {
        check_logprob(together[GPU].logprobs[choice], together[CPU].logprobs[choice]);
        open.choice = choice;
        pair_slot(&pair, 0, &open);
        side_run(&pair, GPU, logits, 1, &row, NULL, 1, &one);
        ck_assert_int_eq(one.tokens[0], together[GPU].tokens[choice]);
        side_run(&pair, GPU, logits, 1, &row, NULL, 1, &one);
        ck_assert_int_ne(one.tokens[0], together[GPU].tokens[choice]); // drawn once, penalized now
    }
    for (int side = 0; side < SIDES; side++)
        outcome_free(&together[side]);
    outcome_free(&again);
    outcome_free(&one);
    pair_close(&pair);
    free(logits);
}
END_TEST

// Extreme parameters do what they say and nothing worse.
START_TEST(test_extremes)
{
    enum { VOCAB = 600 };
    float logits[VOCAB];
    struct pair pair = pair_open(1, VOCAB);
    const struct sampling_params GREEDY_LIKE[] = {
        {.temperature = 1e-40f, .top_p = 1, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 0, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 1, .top_k = 1, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 1, .min_p = 1, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 1, .min_p = 5, .repetition_penalty = 1},
    };
    struct outcome out = outcome_new(1, 0);
    for (int i = 0; i < VOCAB; i++)
        logits[i] = i == 444 ? 2 : 1;
    for (size_t i = 0; i < sizeof GREEDY_LIKE / sizeof *GREEDY_LIKE; i++) {
        struct sampler_open open = {.params = GREEDY_LIKE[i]};
        pair_slot(&pair, 0, &open);
        for (uint32_t position = 0; position < 20; position++) {
            struct sample_row row = {.position = position, .draws = 1};
            side_run(&pair, GPU, logits, 1, &row, NULL, 1, &out);
            ck_assert_int_eq(out.tokens[0], 444);
        }
    }
    // Among equal ones the lowest ids are kept: 444 and nine of the others.
    struct sampler_open open = {.params = SAMPLING_DEFAULTS};
    open.params.top_k = 10;
    pair_slot(&pair, 0, &open);
    for (uint32_t position = 0; position < 100; position++) {
        struct sample_row row = {.position = position, .draws = 1};
        side_run(&pair, GPU, logits, 1, &row, NULL, 1, &out);
        ck_assert(out.tokens[0] == 444 || (out.tokens[0] >= 0 && out.tokens[0] < 9));
    }
    struct logit_bias biases[MAX_LOGIT_BIAS + 1] = {{33, -INFINITY}, {-1, 9}, {VOCAB, 9}, {1 << 30, 9}};
    logits[33] = INFINITY;
    open.params.temperature = 0;
    open.biases = biases;
    open.n_biases = MAX_LOGIT_BIAS + 1;
    ck_assert_int_lt(
        device_ops(pair.device[GPU])->sampler_open(pair.device[GPU], pair.sampler[GPU], 0, &open), 0);
    open.n_biases = 4;
    pair_slot(&pair, 0, &open); // infinity - infinity is nothing; ids outside are nobody
    struct sample_row row = {.draws = 1};
    side_run(&pair, GPU, logits, 1, &row, NULL, 1, &out);
    ck_assert_int_eq(out.tokens[0], 444);
    outcome_free(&out);
    pair_close(&pair);
}
END_TEST

START_TEST(test_score)
{
    fixture_seed("score");
    static const uint32_t VOCABS[] = {5, 1234, 128256};
    enum { ROWS_SCORED = 70 };
    for (size_t v = 0; v < sizeof VOCABS / sizeof *VOCABS; v++) {
        struct pair pair = pair_open(1, VOCABS[v]);
        float *logits = malloc((size_t)ROWS * pair.vocab * sizeof *logits);
        struct score_row rows[ROWS_SCORED];
        struct outcome out[SIDES];
        for (uint32_t i = 0; i < ROWS; i++)
            logits_make(logits + (size_t)i * pair.vocab, pair.vocab);
        for (uint32_t i = 0; i < ROWS_SCORED; i++)
            rows[i] = (struct score_row){.logits_row = i % ROWS,
                                         .target = i % 9 == 4 ? -1 : (int32_t)fixture_below(pair.vocab),
                                         .out = ROWS_SCORED - 1 - i,
                                         .top = i % 2 ? fixture_below(TOP + 1) : 0,
                                         .top_first = i * TOP};
        for (int side = 0; side < SIDES; side++) {
            out[side] = outcome_new(ROWS_SCORED, ROWS_SCORED * TOP);
            side_run(&pair, side, logits, ROWS, NULL, rows, ROWS_SCORED, &out[side]);
        }
        for (uint32_t i = 0; i < ROWS_SCORED; i++)
            check_logprob(out[GPU].logprobs[i], out[CPU].logprobs[i]);
        check_tops(&out[GPU], &out[CPU]);
        for (int side = 0; side < SIDES; side++)
            outcome_free(&out[side]);
        pair_close(&pair);
        free(logits);
    }
}
END_TEST

// --- the same tokens in any company ---

enum { CROWD = 70, CROWD_VOCAB = 32003, CROWD_STEPS = 3, CROWD_DRAWS = 3 };

// Draws CROWD rows in calls of `together`, each step after the other, in slots counted from `first_slot`.
static void crowd_run(struct pair *pair, const struct request *requests, const float *logits,
                      uint32_t together, uint32_t first_slot, struct outcome *out)
{
    struct sample_row rows[CROWD];
    for (uint32_t i = 0; i < CROWD; i++) {
        uint32_t slot = (first_slot + i) % CROWD;
        pair_slot(pair, slot, &requests[i].open);
        rows[i] = (struct sample_row){.logits_row = i % 8,
                                      .slot = slot,
                                      .draws = i % 7 == 3 ? CROWD_DRAWS : 1,
                                      .logprob = i % 5 == 0,
                                      .top = i % 11 == 0 ? 5 : 0,
                                      .top_first = i * TOP};
    }
    for (uint32_t step = 0; step < CROWD_STEPS; step++) {
        for (uint32_t i = 0; i < CROWD; i++) {
            rows[i].position = requests[i].open.n_history + step;
            rows[i].out_first = (step * CROWD + i) * CROWD_DRAWS;
        }
        for (uint32_t first = 0; first < CROWD; first += together) {
            struct outcome part = outcome_new(out->n_tokens, out->n_tops);
            uint32_t count = CROWD - first < together ? CROWD - first : together;
            side_run(pair, GPU, logits, 8, rows + first, NULL, count, &part);
            for (uint32_t i = first; i < first + count; i++) {
                memcpy(out->tokens + rows[i].out_first, part.tokens + rows[i].out_first, 4 * CROWD_DRAWS);
                memcpy(out->logprobs + rows[i].out_first, part.logprobs + rows[i].out_first, 4 * CROWD_DRAWS);
                memcpy(out->tops + rows[i].top_first, part.tops + rows[i].top_first, TOP * sizeof *out->tops);
            }
            outcome_free(&part);
        }
    }
}

START_TEST(test_same_tokens_in_any_company)
{
    fixture_seed("company");
    struct request *requests = calloc(CROWD, sizeof *requests);
    float *logits = malloc((size_t)8 * CROWD_VOCAB * sizeof *logits);
    struct pair pair = pair_open(CROWD, CROWD_VOCAB);
    struct outcome all = outcome_new(CROWD * CROWD_STEPS * CROWD_DRAWS, CROWD * TOP);
    struct outcome some = outcome_new(all.n_tokens, all.n_tops);
    for (uint32_t i = 0; i < CROWD; i++)
        request_make(&requests[i], CROWD_VOCAB);
    for (uint32_t i = 0; i < 8; i++)
        logits_make(logits + (size_t)i * CROWD_VOCAB, CROWD_VOCAB);
    crowd_run(&pair, requests, logits, CROWD, 0, &all);
    static const uint32_t TOGETHER[] = {1, 9, 64};
    for (size_t t = 0; t < sizeof TOGETHER / sizeof *TOGETHER; t++) {
        crowd_run(&pair, requests, logits, TOGETHER[t], (uint32_t)t * 13, &some);
        ck_assert_mem_eq(all.tokens, some.tokens, all.n_tokens * sizeof *all.tokens);
        ck_assert_mem_eq(all.logprobs, some.logprobs, all.n_tokens * sizeof *all.logprobs);
        ck_assert_mem_eq(all.tops, some.tops, all.n_tops * sizeof *all.tops);
    }
    outcome_free(&all);
    outcome_free(&some);
    pair_close(&pair);
    free(logits);
    free(requests);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("cuda sampler");
    TCase *tcase = tcase_create("cuda sampler");
    tcase_set_timeout(tcase, 300);
    tcase_add_test(tcase, test_extremes);
    tcase_add_test(tcase, test_minimum_tokens);
    tcase_add_test(tcase, test_choices);
    tcase_add_test(tcase, test_requests);
    tcase_add_test(tcase, test_both_paths);
    tcase_add_test(tcase, test_history);
    tcase_add_test(tcase, test_score);
    tcase_add_test(tcase, test_same_tokens_in_any_company);
    suite_add_tcase(suite, tcase);
    return suite;
}
