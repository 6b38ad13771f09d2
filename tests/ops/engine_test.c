// Whole models through whole engines: logits against the float64 oracle for every family and type, and the
// same bits whatever the batch, the chunks, the threads, the stages, the pages. STRATA_TEST_BACKEND=cuda: all
// stages on one GPU, at its only level.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/device.h"
#include "tests/ops/engine_driver.h"
#include "tests/suite.h"

enum { PROMPT = 70, VOCAB = 300, NEW = 12, BATCH = 16, CAPACITY = 512 };

#define SHAPE " layers=4 vocab_size=300 embd=256 heads=8 kv_heads=2 ffn=256 context=512 "

static int32_t prompt[PROMPT];

static bool on_cuda(void)
{
    const char *backend = getenv("STRATA_TEST_BACKEND");
    return backend && !strcmp(backend, "cuda");
}

static void make_prompt(void)
{
    for (int i = 0; i < PROMPT; i++)
        prompt[i] = (int32_t)((i * 73 + i * i * 11 + 5) % VOCAB);
}

// Every row of logits of a few slots, by position.
struct record {
    uint32_t vocab;
    float *logits[BATCH];
    bool seen[BATCH][CAPACITY];
};

static struct record *new_record(uint32_t vocab)
{
    struct record *record = calloc(1, sizeof(*record));
    record->vocab = vocab;
    for (int i = 0; i < BATCH; i++)
        record->logits[i] = calloc((size_t)CAPACITY * vocab, sizeof(float));
    return record;
}

static void free_record(struct record *record)
{
    for (int i = 0; i < BATCH; i++)
        free(record->logits[i]);
    free(record);
}

static void note(void *context, uint32_t slot, uint32_t position, const float *logits, uint32_t vocab)
{
    struct record *record = context;
    ck_assert_uint_lt(slot, BATCH);
    ck_assert_uint_lt(position, CAPACITY);
    memcpy(record->logits[slot] + (size_t)position * vocab, logits, vocab * sizeof(float));
    record->seen[slot][position] = true;
}

static struct engine *open_engine(const char *model, uint32_t n_stages, uint32_t threads, uint32_t level,
                                  struct record *record)
{
    struct engine_options options = {.model = model,
                                     .n_stages = n_stages,
                                     .threads = threads,
                                     .level = level,
                                     .context = CAPACITY,
                                     .tap = record ? note : NULL,
                                     .tap_context = record};
    struct engine *engine;
    struct error error = {0};
    ck_assert_msg(engine_open(&engine, &options, &error) == 0, "%s", error.text);
    return engine;
}

static void play(struct engine *engine, const struct engine_job *jobs, uint32_t n, const uint32_t *pages)
{
    struct error error = {0};
    ck_assert_msg(engine_play(engine, jobs, n, pages, &error) == 0, "%s", error.text);
}

// --- against the oracle ---

static double distance(const float *logits, const double *oracle, size_t count)
{
    double error = 0, power = 0, mean = 0;
    for (size_t i = 0; i < count; i++)
        mean += oracle[i] / (double)count;
    for (size_t i = 0; i < count; i++) {
        error += (logits[i] - oracle[i]) * (logits[i] - oracle[i]);
        power += (oracle[i] - mean) * (oracle[i] - mean);
    }
    return sqrt(error / power);
}

// The relative distance of all positions' logits from the oracle's.
static double oracle_distance(const char *options, uint32_t level)
{
    char model[1024];
    double *oracle;
    size_t count;
    ck_assert_msg(engine_oracle(options, prompt, PROMPT, model, sizeof(model), &oracle, &count),
                  "the generator and the oracle need a python3 with numpy");
    ck_assert_uint_eq(count, (size_t)PROMPT * VOCAB);
    struct record *record = new_record(VOCAB);
    struct engine *engine = open_engine(model, 1, 2, level, record);
    int32_t out[1];
    struct engine_job job = {.prompt = prompt,
                             .n_prompt = PROMPT,
                             .n_new = 1,
                             .score = true,
                             .sampling = {.repetition_penalty = 1, .top_p = 1},
                             .out = out};
    play(engine, &job, 1, NULL);
    double apart = distance(record->logits[0], oracle, count);
    uint32_t best = 0;
    const float *row = record->logits[0] + (size_t)(PROMPT - 1) * VOCAB;
    for (uint32_t i = 1; i < VOCAB; i++)
        best = row[i] > row[best] ? i : best;
    ck_assert_int_eq(out[0], (int32_t)best);
    engine_close(engine);
    free_record(record);
    free(oracle);
    return apart;
}

static const char *const FAMILIES[] = {
    "arch=llama rope_freqs",
    "arch=llama tied head_dim=64",
    "arch=qwen2 tied",
    "arch=qwen3 head_dim=64",
    "arch=phi3",
    "arch=phi3 window=24",
    "arch=gpt2 tied",
};
enum { N_FAMILIES = sizeof(FAMILIES) / sizeof(FAMILIES[0]) };
static const char *const TYPES[] = {"f32",  "f16",  "bf16", "q4_0", "q4_1", "q5_0", "q5_1",
                                    "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_k_m"};
enum { N_TYPES = sizeof(TYPES) / sizeof(TYPES[0]), FIRST_QUANT = 3 };

// Everybody rounds keys and values to 16 bits. Above the portable level, quantized weights meet activations
// rounded to 8 bits, 16 under one scale: steps of max / 127 put a normal value off by half a percent, and the
// products of four layers and the head each add theirs. On random weights, which forgive nothing, that comes
// to 1.7 - 2.1% (Q4_0 and GPT-2: at most 1.2%), with other seeds of the weights to 2.3%. With 32 under one
// scale it was up to 2.6%, which the bound would catch. On CUDA, activations and (some) weights are rounded
// to 11 bits in each product: a few parts in ten thousand, ten products deep.
static double bound_of(int type, uint32_t level)
{
    if (on_cuda())
        return 0.005;
    return type >= FIRST_QUANT && level != LEVEL_PORTABLE ? 0.025 : 0.002;
}

static void check_distance(const char *family, int type, uint32_t level)
{
    char options[256];
    snprintf(options, sizeof(options), "%s mix=%s" SHAPE, family, TYPES[type]);
    double apart = oracle_distance(options, level);
    if (getenv("STRATA_TEST_VERBOSE"))
        printf("%-9s %-32s %-7s %.5f\n",
               device_level_name(on_cuda() ? LEVEL_CUDA
                                 : level   ? level
                                           : device_best_level("cpu", 0)),
               family, TYPES[type], apart);
    ck_assert_msg(apart < bound_of(type, level), "%s: distance %f, over %f", options, apart,
                  bound_of(type, level));
}

START_TEST(test_every_type_of_llama)
{
    check_distance(FAMILIES[0], _i, 0);
    if (on_cuda())
        return;
    check_distance(FAMILIES[0], _i, LEVEL_PORTABLE);
    check_distance(FAMILIES[0], _i, LEVEL_AVX2);
}
END_TEST

START_TEST(test_every_family)
{
    const int types[] = {0, 3, 7, 13};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        check_distance(FAMILIES[_i], types[i], 0);
}
END_TEST

// --- the same bits ---

static void make_model(const char *family, const char *mix, char *model, size_t capacity)
{
    char options[256];
    double *oracle;
    size_t count;
    snprintf(options, sizeof(options), "%s mix=%s" SHAPE, family, mix);
    ck_assert_msg(engine_oracle(options, prompt, PROMPT, model, capacity, &oracle, &count),
                  "the generator and the oracle need a python3 with numpy");
    free(oracle);
}

// Sixteen sequences of different lengths and ways to sample.
struct mix {
    struct engine_job jobs[BATCH];
    int32_t prompts[BATCH][PROMPT];
    int32_t out[BATCH][NEW];
    float logprobs[BATCH][NEW];
    float scores[BATCH][PROMPT];
};

static struct mix *new_mix(void)
{
    struct mix *mix = calloc(1, sizeof(*mix));
    for (int i = 0; i < BATCH; i++) {
        uint32_t length = (uint32_t)(1 + i * 23 % PROMPT);
        for (uint32_t t = 0; t < length; t++)
            mix->prompts[i][t] = (prompt[t] + i * 17) % VOCAB;
        mix->jobs[i] = (struct engine_job){
            .prompt = mix->prompts[i],
            .n_prompt = length,
            .n_new = NEW,
            .sampling = {.temperature = i % 3 == 0 ? 0.0f : 0.8f,
                         .top_k = i % 4 == 1 ? 20 : 0,
                         .top_p = i % 4 == 2 ? 0.9f : 1.0f,
                         .repetition_penalty = i % 5 == 3 ? 1.2f : 1.0f,
                         .seed = 1000 + (uint64_t)i},
            .out = mix->out[i],
            .out_logprobs = mix->logprobs[i],
            .scores = mix->scores[i],
        };
    }
    return mix;
}

// What each sequence of the mix gets when it runs alone: one stage, one thread, its prompt in one piece,
// logits of every position. One engine after the other sequence: what was in its pages must not matter.
static void play_alone(const char *model, struct mix *mix, struct record *record)
{
    struct record *scratch = new_record(VOCAB);
    struct engine *engine = open_engine(model, 1, 1, 0, scratch);
    for (int i = 0; i < BATCH; i++) {
        mix->jobs[i].score = true;
        play(engine, &mix->jobs[i], 1, NULL);
        memcpy(record->logits[i], scratch->logits[0], (size_t)CAPACITY * VOCAB * sizeof(float));
        memcpy(record->seen[i], scratch->seen[0], sizeof(record->seen[i]));
        memset(scratch->seen, 0, sizeof(scratch->seen));
    }
    engine_close(engine);
    free_record(scratch);
}

struct variant {
    uint32_t n_stages, threads, chunk;
    bool ahead, score, permute, stagger;
};

static void compare(const struct mix *mix, const struct record *got, const struct mix *alone,
                    const struct record *expected, const struct variant *v)
{
    char how[128];
    snprintf(how, sizeof(how), "%u stages, %u threads, chunk %u, ahead %d, score %d, permute %d, stagger %d",
             v->n_stages, v->threads, v->chunk, v->ahead, v->score, v->permute, v->stagger);
    for (int i = 0; i < BATCH; i++) {
        uint32_t end = mix->jobs[i].n_prompt + NEW - 1, rows = 0;
        for (uint32_t p = 0; p < end; p++) {
            if (!got->seen[i][p])
                continue;
            rows++;
            ck_assert_msg(expected->seen[i][p], "sequence %d position %u was not expected", i, p);
            ck_assert_msg(!memcmp(got->logits[i] + (size_t)p * VOCAB, expected->logits[i] + (size_t)p * VOCAB,
                                  VOCAB * sizeof(float)),
                          "%s: sequence %d, position %u: other bits", how, i, p);
        }
        ck_assert_msg(rows == (v->score ? end : NEW), "%s: sequence %d has %u rows", how, i, rows);
        ck_assert_msg(!memcmp(mix->out[i], alone->out[i], sizeof(mix->out[i])), "%s: sequence %d drew others",
                      how, i);
        ck_assert_mem_eq(mix->logprobs[i], alone->logprobs[i], sizeof(mix->logprobs[i]));
        if (v->score)
            ck_assert_mem_eq(mix->scores[i], alone->scores[i], sizeof(mix->scores[i]));
    }
}

static void play_variant(const char *model, const struct variant *v, const struct mix *alone,
                         const struct record *expected)
{
    struct record *record = new_record(VOCAB);
    struct mix *mix = new_mix();
    uint32_t pages[256];
    for (uint32_t i = 0; i < 256; i++)
        pages[i] = v->permute ? i * 101 % 256 : i;
    for (int i = 0; i < BATCH; i++) {
        mix->jobs[i].chunk = v->chunk;
        mix->jobs[i].ahead = v->ahead;
        mix->jobs[i].score = v->score;
        mix->jobs[i].delay = v->stagger ? (uint32_t)(i * 5 % 11) : 0;
    }
    struct engine *engine = open_engine(model, v->n_stages, v->threads, 0, record);
    play(engine, mix->jobs, BATCH, pages);
    engine_close(engine);
    compare(mix, record, alone, expected, v);
    free(mix);
    free_record(record);
}

static void check_invariance(const char *family, const char *type, const struct variant *variants, size_t n)
{
    char model[1024];
    make_model(family, type, model, sizeof(model));
    struct record *expected = new_record(VOCAB);
    struct mix *alone = new_mix();
    play_alone(model, alone, expected);
    for (size_t i = 0; i < n; i++)
        play_variant(model, &variants[i], alone, expected);
    free(alone);
    free_record(expected);
}

static const struct variant VARIANTS[] = {
    {1, 1, 0, false, false, false, false}, // a batch
    {1, 2, 7, false, true, true, true},   // odd chunks, prompt logprobs, scattered pages, arriving one by one
    {2, 1, 0, true, false, false, false}, // a pipeline, steps ahead of their results
    {4, 3, 64, true, true, true, true},   // more threads than cores
    {1, 1, 1, false, false, false, false}, // prompts token by token
    {1, 1, 0, true, true, false, false},   {3, 1, 7, true, false, false, true},
    {2, 2, 1, false, false, true, true},
};

START_TEST(test_bits_do_not_depend_on_company)
{
    static const struct {
        const char *family, *mix;
        size_t n_variants;
    } cases[] = {
        {"arch=llama rope_freqs", "q4_k_m", 8},     {"arch=gpt2 tied", "f16", 8},
        {"arch=llama tied head_dim=64", "q4_1", 4}, {"arch=qwen2 tied", "q8_0", 4},
        {"arch=qwen3 head_dim=64", "q6_k", 4},      {"arch=phi3 window=24", "q5_0", 4},
    };
    check_invariance(cases[_i].family, cases[_i].mix, VARIANTS, cases[_i].n_variants);
}
END_TEST

START_TEST(test_bits_of_every_type)
{
    const struct variant some[] = {{2, 2, 7, true, false, true, true}};
    check_invariance("arch=llama rope_freqs", TYPES[_i], some, 1);
}
END_TEST

Suite *make_suite(void)
{
    make_prompt();
    bool slow = getenv("STRATA_TEST_SLOW") != NULL; // an instrumented build: a sample of each kind of case
    Suite *suite = suite_create("engine");
    TCase *oracle = tcase_create("oracle");
    tcase_set_timeout(oracle, 120);
    tcase_add_loop_test(oracle, test_every_type_of_llama, slow ? 10 : 0, N_TYPES);
    tcase_add_loop_test(oracle, test_every_family, 0, N_FAMILIES);
    suite_add_tcase(suite, oracle);
    TCase *bits = tcase_create("bits");
    tcase_set_timeout(bits, 240);
    tcase_add_loop_test(bits, test_bits_do_not_depend_on_company, slow ? 4 : 0, 6);
    tcase_add_loop_test(bits, test_bits_of_every_type, slow ? N_TYPES - 2 : 0, N_TYPES);
    suite_add_tcase(suite, bits);
    return suite;
}
