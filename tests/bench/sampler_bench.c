// Times the sampler: microseconds a row for greedy, top-p, everything at once, and plain temperature.
//
//   sampler_bench [THREADS [LEVEL]]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/kernels.h"

enum { ROWS = 32, HISTORY = 512 };

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

struct setting {
    const char *name;
    struct sampling_params params;
    bool logprobs;
};

static const struct setting SETTINGS[] = {
    {"greedy", {.temperature = 0, .top_p = 1, .repetition_penalty = 1}, false},
    {"temperature", {.temperature = 1, .top_p = 1, .repetition_penalty = 1}, false},
    {"top-k 40", {.temperature = 1, .top_k = 40, .top_p = 1, .repetition_penalty = 1}, false},
    {"top-p 0.9", {.temperature = 1, .top_p = 0.9f, .repetition_penalty = 1}, false},
    {"all, logprobs",
     {.temperature = 0.8f,
      .top_k = 100,
      .top_p = 0.95f,
      .min_p = 0.05f,
      .repetition_penalty = 1.1f,
      .presence_penalty = 0.1f,
      .frequency_penalty = 0.1f},
     true},
};

// Sums of uniforms, so roughly normal; `spread` 3 is about a language model's, 0.3 is nearly flat.
static void fill(float *logits, size_t n, float spread)
{
    uint32_t state = 7;
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (int j = 0; j < 6; j++) {
            state = state * 1664525 + 1013904223;
            sum += (float)(state >> 8) * 0x1p-24f - 0.5f;
        }
        logits[i] = sum * 1.41f * spread;
    }
}

static double time_rows(struct device *device, struct sampler *sampler, const float *logits, uint32_t n_rows,
                        bool logprobs)
{
    const struct kernel_ops *ops = device_ops(device);
    int32_t *tokens = ops->alloc(device, ROWS * sizeof *tokens);
    float *out = ops->alloc(device, ROWS * sizeof *out);
    struct token_logprob *tops = ops->alloc(device, ROWS * 5 * sizeof *tops);
    double best = INFINITY;
    for (uint32_t run = 0; run < 20; run++) {
        struct sample_row rows[ROWS];
        for (uint32_t i = 0; i < n_rows; i++)
            rows[i] = (struct sample_row){.logits_row = i,
                                          .slot = i,
                                          .position = HISTORY + run,
                                          .draws = 1,
                                          .logprob = logprobs,
                                          .top = logprobs ? 5 : 0,
                                          .out_first = i,
                                          .top_first = i * 5};
        double start = now_us();
        ops->sample(device, sampler, logits, rows, n_rows, tokens, out, tops);
        best = fmin(best, now_us() - start);
    }
    ops->free(device, tokens);
    ops->free(device, out);
    ops->free(device, tops);
    return best;
}

static void bench_vocab(struct device *device, uint32_t vocab, float spread)
{
    const struct kernel_ops *ops = device_ops(device);
    struct sampler *sampler;
    float *logits = ops->alloc(device, (size_t)ROWS * vocab * sizeof *logits);
    int32_t history[HISTORY];
    struct error error = {0};
    if (!logits || ops->sampler_new(&sampler, device, ROWS, vocab, &error)) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    fill(logits, (size_t)ROWS * vocab, spread);
    for (uint32_t i = 0; i < HISTORY; i++)
        history[i] = (int32_t)(i * 7919u % vocab);
    printf("vocabulary %u, spread %.1f\n", vocab, spread);
    for (size_t i = 0; i < sizeof SETTINGS / sizeof *SETTINGS; i++) {
        for (uint32_t slot = 0; slot < ROWS; slot++) {
            struct sampler_open open = {.params = SETTINGS[i].params,
                                        .history = history,
                                        .n_history = HISTORY,
                                        .n_prompt = HISTORY / 2};
            open.params.seed = slot;
            ops->sampler_open(device, sampler, slot, &open);
        }
        double one = time_rows(device, sampler, logits, 1, SETTINGS[i].logprobs);
        double many = time_rows(device, sampler, logits, ROWS, SETTINGS[i].logprobs);
        printf("  %-14s 1 row %7.1f us, %u rows %8.1f us (%.1f each)\n", SETTINGS[i].name, one, ROWS, many,
               many / ROWS);
    }
    ops->sampler_free(device, sampler);
    ops->free(device, logits);
}

int main(int argc, char **argv)
{
    struct device_options options = {.backend = "cpu",
                                     .threads = argc > 1 ? (uint32_t)atoi(argv[1]) : 0,
                                     .level = argc > 2 ? (uint32_t)atoi(argv[2]) : 0};
    struct device *device;
    struct error error = {0};
    if (device_open(&device, &options, &error)) {
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    printf("%s\n", device_describe(device));
    bench_vocab(device, 49152, 3);
    bench_vocab(device, 128256, 3);
    bench_vocab(device, 128256, 0.3f);
    device_close(device);
    return 0;
}
