// Sampling and scoring against a simple implementation of the contract in f64 with a full sort: order of
// operations, ties, penalties, bans, the random stream; the distribution of draws; and that a sequence's
// tokens depend on nothing else in the batch, nor on threads, level, or having been moved.
#include "kernels/random_stream.h"
#include "tests/ops/op_fixture.h"

// --- one call of sample with everything around it ---

struct bench {
    struct device *device;
    const struct kernel_ops *ops;
    struct sampler *sampler;
    uint32_t vocab;
};

static struct bench bench_open(uint32_t level, uint32_t threads, uint32_t n_slots, uint32_t vocab)
{
    struct bench bench = {.device = fixture_open(level, threads), .vocab = vocab};
    struct error error = {0};
    bench.ops = device_ops(bench.device);
    ck_assert_int_eq(bench.ops->sampler_new(&bench.sampler, bench.device, n_slots, vocab, &error), 0);
    return bench;
}

static void bench_close(struct bench *bench)
{
    bench->ops->sampler_free(bench->device, bench->sampler);
    fixture_close(bench->device);
}

static void bench_slot(struct bench *bench, uint32_t slot, const struct sampler_open *open)
{
    ck_assert_int_eq(bench->ops->sampler_open(bench->device, bench->sampler, slot, open), 0);
}

// Host arrays in, host arrays out.
static void bench_sample(struct bench *bench, const float *logits, uint32_t logits_rows,
                         const struct sample_row *rows, uint32_t n_rows, uint32_t n_out, int32_t *tokens,
                         float *logprobs, struct token_logprob *tops, uint32_t n_tops)
{
    struct device *device = bench->device;
    size_t logit_bytes = (size_t)logits_rows * bench->vocab * sizeof(float);
    float *on_device = fixture_put(device, logits, logit_bytes);
    int32_t *out = fixture_put(device, NULL, n_out * sizeof *out);
    float *out_logprobs = fixture_put(device, NULL, n_out * sizeof *out_logprobs);
    struct token_logprob *out_tops = fixture_put(device, NULL, n_tops * sizeof *out_tops);
    bench->ops->sample(device, bench->sampler, on_device, rows, n_rows, out, out_logprobs, out_tops);
    ck_assert_int_eq(bench->ops->sync(device, NULL), 0);
    ck_assert(!memcmp(on_device, logits, logit_bytes)); // not changed
    fixture_get(device, tokens, out, n_out * sizeof *out);
    if (logprobs)
        fixture_get(device, logprobs, out_logprobs, n_out * sizeof *logprobs);
    if (tops)
        fixture_get(device, tops, out_tops, n_tops * sizeof *tops);
    fixture_drop(device, out_tops);
    fixture_drop(device, out_logprobs);
    fixture_drop(device, out);
    fixture_drop(device, on_device);
}

static int32_t bench_one(struct bench *bench, uint32_t slot, const float *logits, uint32_t position)
{
    struct sample_row row = {.slot = slot, .position = position, .draws = 1};
    int32_t token;
    bench_sample(bench, logits, 1, &row, 1, 1, &token, NULL, NULL, 0);
    return token;
}

// --- the contract, simply ---

struct ranked {
    double logit, probability;
    int32_t id;
};

static int by_rank(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static int by_id(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    return x->id < y->id ? -1 : x->id > y->id;
}

static uint32_t count_of(const int32_t *ids, uint32_t n, int32_t id)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i++)
        count += ids[i] == id;
    return count;
}

// Adjusted logits in order of id.
static struct ranked *reference_adjust(const float *logits, uint32_t vocab, const struct sampler_open *open)
{
    struct ranked *all = calloc(vocab, sizeof *all);
    const struct sampling_params *params = &open->params;
    const int32_t *outputs = open->history + open->n_prompt;
    uint32_t n_outputs = open->n_history - open->n_prompt;
    for (uint32_t i = 0; i < vocab; i++) {
        double logit = isnan(logits[i]) ? -INFINITY : logits[i];
        for (uint32_t b = 0; b < open->n_biases; b++)
            logit += open->biases[b].token == (int32_t)i ? open->biases[b].bias : 0;
        if (count_of(open->history, open->n_history, (int32_t)i))
            logit = logit > 0 ? logit / params->repetition_penalty : logit * params->repetition_penalty;
        uint32_t drawn = count_of(outputs, n_outputs, (int32_t)i);
        logit -= (drawn ? params->presence_penalty : 0) + params->frequency_penalty * drawn;
        if (n_outputs < params->min_tokens && count_of(open->banned, open->n_banned, (int32_t)i))
            logit = -INFINITY;
        all[i] = (struct ranked){.logit = logit, .id = (int32_t)i};
    }
    return all;
}

enum { UNSURE = -2 };

// The token at `uniform`; UNSURE where a decision hangs on less than `slack` of rounding.
static int32_t reference_draw(const float *logits, uint32_t vocab, const struct sampler_open *open,
                              double uniform, double slack)
{
    const struct sampling_params *params = &open->params;
    struct ranked *all = reference_adjust(logits, vocab, open);
    qsort(all, vocab, sizeof *all, by_rank);
    int32_t token = all[0].id;
    uint32_t kept = vocab;
    double total = 0, sum = 0, top = all[0].logit;
    if (!(params->temperature > 0) || top == -INFINITY)
        goto done;
    if (params->top_k && params->top_k < kept)
        kept = params->top_k;
    for (uint32_t i = 0; i < kept; i++)
        total += all[i].probability = exp((all[i].logit - top) / params->temperature);
    if (params->top_p < 1) {
        uint32_t n = 0;
        while (n < kept && (n == 0 || sum < params->top_p * total)) {
            sum += all[n++].probability;
            if (fabs(sum - params->top_p * total) < slack * total)
                token = UNSURE;
        }
        kept = n;
    }
    if (params->min_p > 0) {
        while (kept > 1 && all[kept - 1].probability < params->min_p)
            if (fabs(all[--kept].probability - params->min_p) < slack)
                token = UNSURE;
        if (kept > 1 && fabs(all[kept - 1].probability - params->min_p) < slack)
            token = UNSURE;
    }
    if (token == UNSURE)
        goto done;
    qsort(all, kept, sizeof *all, by_id);
    total = sum = 0;
    for (uint32_t i = 0; i < kept; i++)
        total += all[i].probability;
    for (uint32_t i = 0; i < kept; i++) {
        sum += all[i].probability;
        if (fabs(sum - uniform * total) < slack * total) {
            token = UNSURE;
            break;
        }
        if (sum > uniform * total) {
            token = all[i].id;
            break;
        }
    }
done:
    free(all);
    return token;
}

// --- random requests ---

enum { MOST_HISTORY = 64, MOST_BIASES = 8, MOST_BANNED = 4 };

struct request {
    struct sampler_open open;
    int32_t history[MOST_HISTORY], banned[MOST_BANNED];
    struct logit_bias biases[MOST_BIASES];
};

static bool maybe(void)
{
    return fixture_below(2);
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
    open->params.temperature = TEMPERATURES[fixture_below(5)];
    open->params.seed = fixture_next(&fixture_state);
    open->params.top_k = maybe() ? 1 + fixture_below(vocab + 5) : 0;
    open->params.top_p = maybe() ? (float)fixture_uniform() : 1;
    open->params.min_p = maybe() ? (float)pow(fixture_uniform(), 3) : 0;
    open->params.repetition_penalty = maybe() ? 0.5f + (float)fixture_uniform() : 1;
    open->params.presence_penalty = maybe() ? (float)fixture_uniform() * 2 - 0.5f : 0;
    open->params.frequency_penalty = maybe() ? (float)fixture_uniform() : 0;
    open->params.min_tokens = maybe() ? fixture_below(30) : 0;
    open->n_history = fixture_below(MOST_HISTORY + 1);
    open->n_prompt = fixture_below(open->n_history + 1);
    for (uint32_t i = 0; i < open->n_history; i++)
        request->history[i] = (int32_t)fixture_below(vocab < 40 ? vocab : 40); // many repeats
    open->n_biases = maybe() ? fixture_below(MOST_BIASES + 1) : 0;
    for (uint32_t i = 0; i < open->n_biases; i++)
        request->biases[i] =
            (struct logit_bias){(int32_t)fixture_below(vocab), maybe() ? 4 * fixture_normal() : -INFINITY};
    open->n_banned = fixture_below(MOST_BANNED + 1);
    for (uint32_t i = 0; i < open->n_banned; i++)
        request->banned[i] = (int32_t)fixture_below(vocab);
}

// Normal, or coarse so that many are equal, and now and then -infinity or NaN.
static void logits_make(float *logits, uint32_t vocab)
{
    bool coarse = maybe();
    float scale = 0.5f + 4 * (float)fixture_uniform();
    for (uint32_t i = 0; i < vocab; i++) {
        logits[i] = scale * fixture_normal();
        if (coarse)
            logits[i] = rintf(2 * logits[i]) / 2;
        if (!fixture_below(50))
            logits[i] = maybe() ? -INFINITY : NAN;
    }
}

START_TEST(test_order_of_operations)
{
    fixture_seed("order of operations");
    static const uint32_t VOCABS[] = {1, 5, 16, 255, 256, 257, 1000, 5003};
    uint32_t unsure = 0, drawn = 0;
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++)
        for (size_t v = 0; v < sizeof VOCABS / sizeof *VOCABS; v++) {
            uint32_t vocab = VOCABS[v];
            struct bench bench = bench_open(level, 1, 1, vocab);
            float *logits = malloc(vocab * sizeof *logits);
            for (int round = 0; round < 60; round++) {
                struct request request;
                request_make(&request, vocab);
                logits_make(logits, vocab);
                bench_slot(&bench, 0, &request.open);
                uint32_t position = request.open.n_history;
                double uniform =
                    random_stream_uniform(request.open.params.seed, request.open.choice, position);
                int32_t expected = reference_draw(logits, vocab, &request.open, uniform, 2e-6);
                int32_t token = bench_one(&bench, 0, logits, position);
                drawn++;
                unsure += expected == UNSURE;
                ck_assert_msg(expected == UNSURE || token == expected,
                              "level %u, vocabulary %u, round %d: %d, not %d", level, vocab, round, token,
                              expected);
            }
            free(logits);
            bench_close(&bench);
        }
    printf("%u of %u hung on rounding\n", unsure, drawn);
    ck_assert_uint_le(unsure, drawn / 20);
}
END_TEST

START_TEST(test_random_stream)
{
    // Known answers of Philox4x32-10 from its authors' test vectors.
    uint32_t zeros[4] = {0}, ones[4] = {~0u, ~0u, ~0u, ~0u};
    random_stream_philox(zeros, 0, 0);
    ck_assert_uint_eq(zeros[0], 0x6627e8d5);
    ck_assert_uint_eq(zeros[1], 0xe169c58d);
    ck_assert_uint_eq(zeros[2], 0xbc57ac4c);
    ck_assert_uint_eq(zeros[3], 0x9b00dbd8);
    random_stream_philox(ones, ~0u, ~0u);
    ck_assert_uint_eq(ones[0], 0x408f276d);
    ck_assert_uint_eq(ones[1], 0x41c83b0e);
    ck_assert_uint_eq(ones[2], 0xa20bc7c6);
    ck_assert_uint_eq(ones[3], 0x6d5451fd);
    double a = random_stream_uniform(1, 0, 0);
    ck_assert(a >= 0 && a < 1);
    ck_assert(a != random_stream_uniform(1, 0, 1) && a != random_stream_uniform(1, 1, 0));
    ck_assert(a != random_stream_uniform(2, 0, 0) && a != random_stream_uniform(1ull << 32 | 1, 0, 0));
}
END_TEST

// Pearson's chi-square over choices x positions; the bound is passed by chance once in a million.
static void check_distribution(struct sampling_params params, const float *logits, const double *expected,
                               uint32_t vocab, double bound)
{
    enum { CHOICES = 50, POSITIONS = 800 };
    struct bench bench = bench_open(device_best_level("cpu", 0), 2, 1, vocab);
    struct sampler_open open = {.params = params};
    uint32_t *counts = calloc(vocab, sizeof *counts);
    double square = 0;
    bench_slot(&bench, 0, &open);
    for (uint32_t position = 0; position < POSITIONS; position++) {
        struct sample_row row = {.position = position, .draws = CHOICES};
        int32_t tokens[CHOICES];
        bench_sample(&bench, logits, 1, &row, 1, CHOICES, tokens, NULL, NULL, 0);
        for (int i = 0; i < CHOICES; i++)
            counts[tokens[i]]++;
    }
    for (uint32_t i = 0; i < vocab; i++) {
        double mean = expected[i] * CHOICES * POSITIONS;
        if (mean == 0)
            ck_assert_uint_eq(counts[i], 0);
        else
            square += (counts[i] - mean) * (counts[i] - mean) / mean;
    }
    printf("chi-square %.1f, bound %.1f\n", square, bound);
    ck_assert_double_lt(square, bound);
    free(counts);
    bench_close(&bench);
}

START_TEST(test_distribution)
{
    enum { VOCAB = 16 };
    float logits[VOCAB];
    double expected[VOCAB], total = 0;
    for (int i = 0; i < VOCAB; i++)
        logits[i] = (float)((i * 7) % VOCAB) * 0.25f;
    struct sampling_params params = SAMPLING_DEFAULTS;
    params.seed = 12345; // fixed: this test gives the same answer every time
    params.temperature = 0.7f;
    for (int i = 0; i < VOCAB; i++)
        total += expected[i] = exp(logits[i] / params.temperature);
    for (int i = 0; i < VOCAB; i++)
        expected[i] /= total;
    check_distribution(params, logits, expected, VOCAB, 58.0); // 15 degrees of freedom
    params.top_k = 5;
    total = 0;
    for (int i = 0; i < VOCAB; i++)
        total += expected[i] = logits[i] >= 11 * 0.25f ? expected[i] : 0;
    for (int i = 0; i < VOCAB; i++)
        expected[i] /= total;
    check_distribution(params, logits, expected, VOCAB, 33.4); // 4 degrees of freedom
}
END_TEST

// --- the same tokens whatever happens around ---

enum { CROWD = 13, CROWD_VOCAB = 777, CROWD_STEPS = 12 };

static void crowd_run(const struct request *requests, const float *logits, uint32_t level, uint32_t threads,
                      const uint32_t *slots, int32_t tokens[CROWD][CROWD_STEPS])
{
    struct bench bench = bench_open(level, threads, CROWD + 4, CROWD_VOCAB);
    for (uint32_t i = 0; i < CROWD; i++)
        bench_slot(&bench, slots[i], &requests[i].open);
    for (uint32_t step = 0; step < CROWD_STEPS; step++) {
        struct sample_row rows[CROWD];
        int32_t out[CROWD];
        for (uint32_t i = 0; i < CROWD; i++)
            rows[i] = (struct sample_row){.logits_row = i,
                                          .slot = slots[i],
                                          .position = requests[i].open.n_history + step,
                                          .draws = 1,
                                          .out_first = CROWD - 1 - i};
        bench_sample(&bench, logits + (size_t)step * CROWD * CROWD_VOCAB, CROWD, rows, CROWD, CROWD, out,
                     NULL, NULL, 0);
        for (uint32_t i = 0; i < CROWD; i++)
            tokens[i][step] = out[CROWD - 1 - i];
    }
    bench_close(&bench);
}

// One request by itself, closed and opened anew with its history before step `moved`.
static void alone_run(const struct request *request, uint32_t number, const float *logits, uint32_t level,
                      uint32_t moved, int32_t tokens[CROWD_STEPS])
{
    struct bench bench = bench_open(level, 1, 2, CROWD_VOCAB);
    int32_t history[MOST_HISTORY + CROWD_STEPS];
    struct sampler_open open = request->open;
    memcpy(history, request->history, sizeof request->history);
    open.history = history;
    bench_slot(&bench, 0, &open);
    uint32_t slot = 0;
    for (uint32_t step = 0; step < CROWD_STEPS; step++) {
        if (step == moved) {
            bench.ops->sampler_close(bench.device, bench.sampler, slot);
            bench_slot(&bench, slot = 1, &open);
        }
        tokens[step] =
            bench_one(&bench, slot, logits + ((size_t)step * CROWD + number) * CROWD_VOCAB, open.n_history);
        history[open.n_history++] = tokens[step];
    }
    bench_close(&bench);
}

START_TEST(test_same_tokens_in_any_company)
{
    fixture_seed("company");
    struct request *requests = calloc(CROWD, sizeof *requests);
    float *logits = malloc((size_t)CROWD_STEPS * CROWD * CROWD_VOCAB * sizeof *logits);
    uint32_t in_order[CROWD], reversed[CROWD];
    for (uint32_t i = 0; i < CROWD; i++) {
        request_make(&requests[i], CROWD_VOCAB);
        in_order[i] = i;
        reversed[i] = CROWD + 3 - i;
    }
    for (uint32_t i = 0; i < CROWD_STEPS * CROWD; i++)
        logits_make(logits + (size_t)i * CROWD_VOCAB, CROWD_VOCAB);
    int32_t first[CROWD][CROWD_STEPS], other[CROWD][CROWD_STEPS], alone[CROWD_STEPS];
    crowd_run(requests, logits, LEVEL_PORTABLE, 1, in_order, first);
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++) {
        for (uint32_t threads = 1; threads <= 4; threads++) {
            crowd_run(requests, logits, level, threads, threads % 2 ? reversed : in_order, other);
            ck_assert_mem_eq(first, other, sizeof first);
        }
        for (uint32_t i = 0; i < CROWD; i++) {
            alone_run(&requests[i], i, logits, level, fixture_below(CROWD_STEPS), alone);
            ck_assert_mem_eq(first[i], alone, sizeof alone);
        }
    }
    free(logits);
    free(requests);
}
END_TEST

// n choices from one row are what n slots with those choices would draw, and leave the history alone.
START_TEST(test_choices)
{
    fixture_seed("choices");
    enum { VOCAB = 300, CHOICES = 20 };
    float logits[VOCAB];
    fixture_normals(logits, VOCAB, 1);
    struct sampler_open open = {.params = SAMPLING_DEFAULTS};
    open.params.seed = 99;
    open.params.frequency_penalty = 50; // a token once in the history would not come again
    struct bench bench = bench_open(device_best_level("cpu", 0), 2, 1, VOCAB);
    bench_slot(&bench, 0, &open);
    struct sample_row row = {.position = 7, .draws = CHOICES};
    int32_t together[CHOICES], again[CHOICES];
    bench_sample(&bench, logits, 1, &row, 1, CHOICES, together, NULL, NULL, 0);
    bench_sample(&bench, logits, 1, &row, 1, CHOICES, again, NULL, NULL, 0);
    ck_assert_mem_eq(together, again, sizeof together);
    uint32_t distinct = 0;
    for (uint32_t choice = 0; choice < CHOICES; choice++) {
        open.choice = choice;
        bench_slot(&bench, 0, &open);
        ck_assert_int_eq(bench_one(&bench, 0, logits, 7), together[choice]);
        distinct += together[choice] != together[0];
        ck_assert_int_ne(bench_one(&bench, 0, logits, 7), together[choice]); // drawn once, penalized now
    }
    ck_assert_uint_gt(distinct, 0);
    bench_close(&bench);
}
END_TEST

START_TEST(test_greedy)
{
    fixture_seed("greedy");
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++)
        for (uint32_t vocab = 1; vocab < 1100; vocab += 1 + fixture_below(60)) {
            struct bench bench = bench_open(level, 1, 1, vocab);
            struct sampler_open open = {.params = SAMPLING_DEFAULTS};
            open.params.temperature = 0;
            bench_slot(&bench, 0, &open);
            float *logits = malloc(vocab * sizeof *logits);
            for (uint32_t i = 0; i < vocab; i++)
                logits[i] = -3 - (float)fixture_below(4);
            uint32_t best = fixture_below(vocab), twin = best + fixture_below(vocab - best);
            logits[best] = logits[twin] = -1;
            if (best > 0)
                logits[fixture_below(best)] = NAN;
            ck_assert_int_eq(bench_one(&bench, 0, logits, 0), (int32_t)best);
            logits[twin] = INFINITY;
            ck_assert_int_eq(bench_one(&bench, 0, logits, 0), (int32_t)twin);
            for (uint32_t i = 0; i < vocab; i++)
                logits[i] = maybe() ? -INFINITY : NAN;
            ck_assert_int_eq(bench_one(&bench, 0, logits, 0), 0); // nothing to choose: the lowest id
            open.params.temperature = 1;
            bench_slot(&bench, 0, &open);
            ck_assert_int_eq(bench_one(&bench, 0, logits, 0), 0);
            free(logits);
            bench_close(&bench);
        }
}
END_TEST

// Extreme parameters do what they say and nothing worse.
START_TEST(test_extremes)
{
    enum { VOCAB = 600 };
    float logits[VOCAB];
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++) {
        struct bench bench = bench_open(level, 1, 1, VOCAB);
        for (int i = 0; i < VOCAB; i++)
            logits[i] = i == 444 ? 2 : 1;
        struct sampler_open open = {.params = SAMPLING_DEFAULTS};
        const struct sampling_params GREEDY_LIKE[] = {
            {.temperature = 1e-40f, .top_p = 1, .repetition_penalty = 1},
            {.temperature = 1, .top_p = 0, .repetition_penalty = 1},
            {.temperature = 1, .top_p = 1, .top_k = 1, .repetition_penalty = 1},
            {.temperature = 1, .top_p = 1, .min_p = 1, .repetition_penalty = 1},
            {.temperature = 1, .top_p = 1, .min_p = 5, .repetition_penalty = 1},
        };
        for (size_t i = 0; i < sizeof GREEDY_LIKE / sizeof *GREEDY_LIKE; i++) {
            open.params = GREEDY_LIKE[i];
            bench_slot(&bench, 0, &open);
            for (uint32_t position = 0; position < 20; position++)
                ck_assert_int_eq(bench_one(&bench, 0, logits, position), 444);
        }
        open.params = (struct sampling_params)SAMPLING_DEFAULTS;
        logits[33] = INFINITY; // as large as can be: certain
        bench_slot(&bench, 0, &open);
        ck_assert_int_eq(bench_one(&bench, 0, logits, 1), 33);
        struct logit_bias biases[] = {{33, -INFINITY}, {-1, 9}, {VOCAB, 9}, {1 << 30, 9}};
        open.biases = biases;
        open.n_biases = 4;
        open.params.temperature = 0;
        bench_slot(&bench, 0, &open); // infinity - infinity is nothing; ids outside are nobody
        ck_assert_int_eq(bench_one(&bench, 0, logits, 1), 444);
        bench_close(&bench);
    }
}
END_TEST

START_TEST(test_minimum_tokens)
{
    enum { VOCAB = 50 };
    float logits[VOCAB] = {[7] = 9, [8] = 8, [9] = 7};
    int32_t banned[] = {7, 8}, history[] = {1, 2, 3};
    struct sampler_open open = {.params = SAMPLING_DEFAULTS,
                                .history = history,
                                .n_history = 3,
                                .n_prompt = 2, // one output already
                                .banned = banned,
                                .n_banned = 2};
    open.params.temperature = 0;
    open.params.min_tokens = 3;
    struct bench bench = bench_open(device_best_level("cpu", 0), 1, 1, VOCAB);
    bench_slot(&bench, 0, &open);
    ck_assert_int_eq(bench_one(&bench, 0, logits, 3), 9);
    ck_assert_int_eq(bench_one(&bench, 0, logits, 4), 9);
    ck_assert_int_eq(bench_one(&bench, 0, logits, 5), 7);
    bench_close(&bench);
}
END_TEST

// A long history in a sparse table: penalties find every token of it, and no other.
START_TEST(test_long_history)
{
    fixture_seed("long history");
    enum { VOCAB = 5000, HISTORY = 3000 };
    int32_t *history = malloc(HISTORY * sizeof *history);
    float *logits = calloc(VOCAB, sizeof *logits);
    for (int i = 0; i < HISTORY; i++)
        history[i] = 2 * i % VOCAB; // even ones, some twice
    for (int i = 0; i < VOCAB; i++)
        logits[i] = 100 - (float)i / 100;
    struct sampler_open open = {.params = SAMPLING_DEFAULTS, .history = history, .n_history = HISTORY};
    open.params.temperature = 0;
    open.params.repetition_penalty = 1000;
    struct bench bench = bench_open(device_best_level("cpu", 0), 1, 1, VOCAB);
    bench_slot(&bench, 0, &open);
    for (int32_t expected = 1; expected < 1000; expected += 2)
        ck_assert_int_eq(bench_one(&bench, 0, logits, HISTORY), expected);
    bench_close(&bench);
    free(logits);
    free(history);
}
END_TEST

// --- logprobs ---

static double reference_logprob(const float *logits, uint32_t vocab, int32_t token)
{
    double max = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < vocab; i++)
        max = logits[i] > max ? logits[i] : max;
    for (uint32_t i = 0; i < vocab; i++)
        sum += isnan(logits[i]) ? 0 : exp(logits[i] - max);
    return isnan(logits[token]) ? -INFINITY : logits[token] - max - log(sum);
}

static void check_tops(const float *logits, uint32_t vocab, const struct token_logprob *tops, uint32_t n)
{
    bool *taken = calloc(vocab, sizeof *taken);
    for (uint32_t i = 0; i < n; i++) {
        int32_t best = -1;
        for (uint32_t j = 0; j < vocab; j++)
            if (!taken[j] && logits[j] > -INFINITY && (best < 0 || logits[j] > logits[best]))
                best = (int32_t)j;
        ck_assert_int_eq(tops[i].token, best);
        if (best < 0) {
            ck_assert_float_eq(tops[i].logprob, -INFINITY);
            continue;
        }
        taken[best] = true;
        ck_assert_double_eq_tol(tops[i].logprob, reference_logprob(logits, vocab, best), 2e-6);
    }
    free(taken);
}

// Logprobs are of the model's own distribution, whatever the parameters make of it.
START_TEST(test_logprobs)
{
    fixture_seed("logprobs");
    static const uint32_t VOCABS[] = {3, 256, 1000};
    enum { ROWS = 3, DRAWS = 4, TOP = 20 };
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++)
        for (size_t v = 0; v < 3; v++) {
            uint32_t vocab = VOCABS[v];
            struct bench bench = bench_open(level, 2, ROWS, vocab);
            float *logits = malloc(ROWS * vocab * sizeof *logits);
            struct sample_row rows[ROWS];
            for (uint32_t i = 0; i < ROWS; i++) {
                struct request request;
                request_make(&request, vocab);
                bench_slot(&bench, i, &request.open);
                logits_make(logits + i * vocab, vocab);
                logits[i * vocab] = 1;
                rows[i] = (struct sample_row){.logits_row = i,
                                              .slot = i,
                                              .position = 5,
                                              .draws = i == 0 ? 1 : DRAWS,
                                              .logprob = i != 1,
                                              .top = i * TOP / 2,
                                              .out_first = i * DRAWS,
                                              .top_first = i * TOP};
            }
            int32_t tokens[ROWS * DRAWS];
            float logprobs[ROWS * DRAWS];
            struct token_logprob tops[ROWS * TOP];
            bench_sample(&bench, logits, ROWS, rows, ROWS, ROWS * DRAWS, tokens, logprobs, tops, ROWS * TOP);
            for (uint32_t i = 0; i < ROWS; i++) {
                for (uint32_t draw = 0; draw < rows[i].draws; draw++) {
                    double expected = reference_logprob(logits + i * vocab, vocab, tokens[i * DRAWS + draw]);
                    if (!rows[i].logprob)
                        ck_assert_float_eq(logprobs[i * DRAWS + draw], 0);
                    else if (expected == -INFINITY)
                        ck_assert_float_eq(logprobs[i * DRAWS + draw], -INFINITY);
                    else
                        ck_assert_double_eq_tol(logprobs[i * DRAWS + draw], expected, 2e-6);
                }
                check_tops(logits + i * vocab, vocab, tops + i * TOP, rows[i].top);
            }
            free(logits);
            bench_close(&bench);
        }
}
END_TEST

START_TEST(test_score)
{
    fixture_seed("score");
    enum { VOCAB = 1234, ROWS = 9, TOP = 5 };
    static float logits[ROWS * VOCAB];
    for (int i = 0; i < ROWS; i++)
        logits_make(logits + i * VOCAB, VOCAB);
    float first[ROWS];
    for (uint32_t level = LEVEL_PORTABLE; level <= device_best_level("cpu", 0); level++) {
        struct bench bench = bench_open(level, 1 + level, 1, VOCAB);
        struct score_row rows[ROWS];
        float out[ROWS];
        struct token_logprob tops[ROWS * TOP];
        for (uint32_t i = 0; i < ROWS; i++)
            rows[i] = (struct score_row){.logits_row = ROWS - 1 - i,
                                         .target = i == 4 ? -1 : (int32_t)fixture_below(VOCAB),
                                         .out = i,
                                         .top = i % 2 ? TOP : 0,
                                         .top_first = i * TOP};
        float *on_device = fixture_put(bench.device, logits, sizeof logits);
        float *out_device = fixture_put(bench.device, NULL, sizeof out);
        struct token_logprob *tops_device = fixture_put(bench.device, NULL, sizeof tops);
        bench.ops->score(bench.device, on_device, VOCAB, rows, ROWS, out_device, tops_device);
        fixture_get(bench.device, out, out_device, sizeof out);
        fixture_get(bench.device, tops, tops_device, sizeof tops);
        for (uint32_t i = 0; i < ROWS; i++) {
            const float *row = logits + (size_t)rows[i].logits_row * VOCAB;
            double expected = rows[i].target < 0 ? 0 : reference_logprob(row, VOCAB, rows[i].target);
            if (expected == -INFINITY)
                ck_assert_float_eq(out[i], -INFINITY);
            else
                ck_assert_double_eq_tol(out[i], expected, 2e-6);
            check_tops(row, VOCAB, tops + i * TOP, rows[i].top);
        }
        for (uint32_t i = 0; i < ROWS; i++) // the same bits at every level
            rows[i].target = (int32_t)i;
        bench.ops->score(bench.device, on_device, VOCAB, rows, ROWS, out_device, tops_device);
        fixture_get(bench.device, out, out_device, sizeof out);
        if (level == LEVEL_PORTABLE)
            memcpy(first, out, sizeof out);
        ck_assert_mem_eq(first, out, sizeof out);
        fixture_drop(bench.device, on_device);
        fixture_drop(bench.device, out_device);
        fixture_drop(bench.device, tops_device);
        bench_close(&bench);
    }
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("sampler");
    TCase *tcase = tcase_create("sampler");
    tcase_set_timeout(tcase, 120);
    tcase_add_test(tcase, test_order_of_operations);
    tcase_add_test(tcase, test_random_stream);
    tcase_add_test(tcase, test_distribution);
    tcase_add_test(tcase, test_same_tokens_in_any_company);
    tcase_add_test(tcase, test_choices);
    tcase_add_test(tcase, test_greedy);
    tcase_add_test(tcase, test_extremes);
    tcase_add_test(tcase, test_minimum_tokens);
    tcase_add_test(tcase, test_long_history);
    tcase_add_test(tcase, test_logprobs);
    tcase_add_test(tcase, test_score);
    suite_add_tcase(suite, tcase);
    return suite;
}
