// The general path against the kernels for 9.0, on one GPU that has both (on others both are the former): the
// same bits of products at any number of columns, and of a whole engine's logits, draws and logprobs. The
// sampler's share is in cuda_sampler_test.c.
#include "tests/ops/engine_driver.h"
#include "tests/ops/matmul_problem.h"

// --- products ---

static void expect_same(const struct problem *p, uint32_t count, const float *general, const float *other)
{
    size_t stride = problem_stride(p);
    for (uint32_t t = 0; t < count; t++)
        for (uint32_t n = 0; n < p->rows; n++)
            ck_assert_msg(!memcmp(general + t * stride + n, other + t * stride + n, sizeof *other),
                          "%s %ux%u, column %u of %u, row %u: %.9g on the general path, else %.9g",
                          tensor_type_info(p->type)->name, p->rows, p->width, t, count, n,
                          general[t * stride + n], other[t * stride + n]);
}

// Widths of one block, and of so many that K is cut into runs.
START_TEST(test_products)
{
    static const uint32_t COUNTS[] = {1, 2, 7, 8, 9, 16, 17, 24, 32, 33, 64, 65, 130}, WIDTHS[] = {256, 2304};
    enum { MOST = 130, ROWS = 150 };
    uint64_t random = random_seed("test_products");
    for (int w = 0; w < 2; w++) {
        struct problem p = make_sampled(WEIGHT_TYPES[_i], ROWS, WIDTHS[w], MOST, false, 1, &random);
        float *out[2];
        for (int general = 0; general < 2; general++) {
            bool was = general && fixture_general_begin();
            struct device *device = fixture_open(fixture_best_level(), 0);
            if (general)
                fixture_general_end(was);
            float *to = out[general] = malloc(sizeof COUNTS / 4 * MOST * problem_stride(&p) * sizeof(float));
            problem_put(device, &p);
            for (size_t i = 0; i < sizeof COUNTS / 4; i++, to += MOST * problem_stride(&p))
                multiply(device, &p, 0, COUNTS[i], COUNTS[i], to);
            problem_drop(device, &p);
            fixture_close(device);
        }
        for (size_t i = 0; i < sizeof COUNTS / 4; i++)
            expect_same(&p, COUNTS[i], out[1] + i * MOST * problem_stride(&p),
                        out[0] + i * MOST * problem_stride(&p));
        free(out[0]);
        free(out[1]);
        free_problem(&p);
    }
}
END_TEST

// --- engines ---

enum { VOCAB = 300, PROMPT = 40, NEW = 8, JOBS = 18, CAPACITY = 64 };

// What a run gives: jobs of different lengths, ways to sample and chunks, more than lie as few rows.
struct run {
    int32_t prompts[JOBS][PROMPT], out[JOBS][NEW];
    float logprobs[JOBS][NEW], logits[JOBS][CAPACITY][VOCAB];
};

static void note(void *context, uint32_t slot, uint32_t position, const float *logits, uint32_t vocab)
{
    struct run *run = context;
    ck_assert(slot < JOBS && position < CAPACITY && vocab == VOCAB);
    memcpy(run->logits[slot][position], logits, sizeof run->logits[slot][position]);
}

static void play(const char *model, uint32_t n_jobs, struct run *run)
{
    struct engine_options options = {
        .model = model, .n_slots = JOBS, .context = CAPACITY, .tap = note, .tap_context = run};
    struct engine_job jobs[JOBS];
    struct engine *engine;
    struct error error = {0};
    for (uint32_t i = 0; i < n_jobs; i++) {
        for (uint32_t t = 0; t < PROMPT; t++)
            run->prompts[i][t] = (int32_t)((t * 73 + t * t * 11 + i * 17 + 5) % VOCAB);
        jobs[i] = (struct engine_job){.prompt = run->prompts[i],
                                      .n_prompt = 1 + i * 23 % PROMPT,
                                      .n_new = NEW,
                                      .chunk = i % 2 ? 16 : 0,
                                      .ahead = true,
                                      .sampling = SAMPLING_DEFAULTS,
                                      .out = run->out[i],
                                      .out_logprobs = run->logprobs[i]};
        jobs[i].sampling.temperature = i % 3 ? 0.8f : 0;
        jobs[i].sampling.top_k = i % 4 == 1 ? 20 : 0;
        jobs[i].sampling.top_p = i % 4 == 2 ? 0.9f : 1;
        jobs[i].sampling.seed = 1000 + i;
    }
    ck_assert_msg(engine_open(&engine, &options, &error) == 0, "%s", error.text);
    ck_assert_msg(engine_play(engine, jobs, n_jobs, NULL, &error) == 0, "%s", error.text);
    engine_close(engine);
}

static const char *const MODELS[] = {"arch=llama mix=q4_k", "arch=qwen3 head_dim=64 mix=q8_0"};

START_TEST(test_engine)
{
    static const uint32_t TOGETHER[] = {1, 5, JOBS};
    char options[256], model[1024];
    double *oracle;
    size_t count;
    int32_t any = 1;
    snprintf(options, sizeof options,
             "%s layers=2 vocab_size=300 embd=512 heads=8 kv_heads=2 ffn=512 context=512", MODELS[_i]);
    ck_assert_msg(engine_oracle(options, &any, 1, model, sizeof model, &oracle, &count),
                  "the generator and the oracle need a python3 with numpy");
    free(oracle);
    for (int i = 0; i < 3; i++) {
        struct run *runs = calloc(2, sizeof *runs);
        play(model, TOGETHER[i], &runs[0]);
        bool was = fixture_general_begin();
        play(model, TOGETHER[i], &runs[1]);
        fixture_general_end(was);
        ck_assert_mem_eq(runs[0].out, runs[1].out, sizeof runs->out);
        ck_assert_mem_eq(runs[0].logprobs, runs[1].logprobs, sizeof runs->logprobs);
        ck_assert_msg(!memcmp(runs[0].logits, runs[1].logits, sizeof runs->logits),
                      "%s, %u together: logits of other bits", options, TOGETHER[i]);
        free(runs);
    }
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("cuda general");
    TCase *tests = tcase_create("cuda general");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, test_products, 0, (int)N_WEIGHT_TYPES);
    tcase_add_loop_test(tests, test_engine, 0, sizeof MODELS / sizeof *MODELS);
    suite_add_tcase(suite, tests);
    return suite;
}
