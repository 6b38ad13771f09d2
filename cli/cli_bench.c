// `strata bench`: two measurements. With a MODEL, offline: the engine alone in one process, prompt and decode
// speed at fixed batch sizes (the worker program does it). Without, online: a sweep of concurrencies against
// a running server over gRPC, with time to first token and the gap between tokens as clients see them. One
// thread per client; each keeps its own samples, joined at the end.
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli_client.h"
#include "cli/cli_internal.h"
#include "cli/cli_process.h"
#include "common/clock.h"

enum { MAX_CLIENTS = 1024, MAX_SWEEP = 16 };

static const struct option OPTIONS[] = {
    CLIENT_OPTIONS,
    {"prompt", 'p', OPTION_INT, "N", "128", "Prompt tokens of each request.", 1, MAX_CONTEXT},
    {"new", 'n', OPTION_INT, "N", "128", "New tokens of each request.", 1, MAX_CONTEXT},
    {"concurrency", 0, OPTION_STRING, "N,...", "1,4,16",
     "Online: clients at once, one sweep for each number.", 0, 0},
    {"requests", 'r', OPTION_INT, "N", "0",
     "Online: requests in each sweep (0: 4 for each client, at least 8).", 0, 1e6},
    {"batch", 0, OPTION_STRING, "N,...", "1,8,32",
     "Offline: sequences decoded together, one run for each number.", 0, 0},
    {"threads", 0, OPTION_INT, "N", "0", "Offline: compute threads, 0 = all cores.", 0, 4096},
    {"level", 0, OPTION_STRING, "NAME", NULL, "Offline: portable, avx2 or avx512 at most.", 0, 0},
    {"backend", 0, OPTION_STRING, "NAME", "auto", "Offline: cpu, cuda, or auto (cuda where there is a GPU).",
     0, 0},
    {"json", 'j', OPTION_FLAG, NULL, NULL, "Print one JSON object.", 0, 0},
    {0},
};

static const char USAGE[] = "strata bench [options] [MODEL.gguf]";
static const char ABOUT[] =
    "With a model file: times the engine alone. Without: loads a running server with clients.";

struct samples {
    double *values;
    size_t count, capacity;
};

struct load { // one sweep
    struct client *const *clients;
    uint32_t vocabulary, prompt, new_tokens;
    uint32_t n_requests;
    atomic_uint next_request;
};

struct client_run {
    struct load *load;
    struct client *client;
    struct samples first, gap; // milliseconds
    uint64_t tokens;
    uint32_t failures;
    struct error error; // the last failure
    int64_t started_us, last_us;
};

static void samples_add(struct samples *samples, double value)
{
    if (samples->count == samples->capacity) {
        size_t capacity = samples->capacity ? samples->capacity * 2 : 256;
        double *grown = realloc(samples->values, capacity * sizeof(*grown));
        if (!grown)
            return;
        samples->values = grown;
        samples->capacity = capacity;
    }
    samples->values[samples->count++] = value;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Of sorted samples, nearest rank.
static double percentile(const struct samples *samples, double p)
{
    if (!samples->count)
        return 0;
    size_t rank = (size_t)(p * (double)samples->count);
    return samples->values[rank < samples->count ? rank : samples->count - 1];
}

static bool on_response(void *context, const struct wire_generate_response *response)
{
    struct client_run *run = context;
    if (!response->n_token_ids)
        return true;
    int64_t now = clock_now_us();
    if (run->last_us == 0) {
        samples_add(&run->first, (double)(now - run->started_us) / 1e3);
    } else {
        for (uint32_t i = 0; i < response->n_token_ids; i++)
            samples_add(&run->gap, (double)(now - run->last_us) / 1e3 / response->n_token_ids);
    }
    run->last_us = now;
    run->tokens += response->n_token_ids;
    return true;
}

// Prompts differ from each other, so that no cache of prefixes flatters the figures.
static void fill_prompt(int32_t *ids, uint32_t count, uint32_t vocabulary, uint64_t seed)
{
    uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
    for (uint32_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (int32_t)((state >> 33) % vocabulary);
    }
}

static void *client_main(void *argument)
{
    struct client_run *run = argument;
    struct load *load = run->load;
    int32_t *ids = calloc(load->prompt, sizeof(*ids));
    uint32_t index;
    while (ids && (index = atomic_fetch_add(&load->next_request, 1)) < load->n_requests) {
        fill_prompt(ids, load->prompt, load->vocabulary, index + 1);
        struct wire_generate_request request = {.model = "",
                                                .request_id = "",
                                                .input = WIRE_INPUT_TOKENS,
                                                .tokens = ids,
                                                .n_tokens = load->prompt,
                                                .n = 1,
                                                .has_max_tokens = true,
                                                .max_tokens = load->new_tokens,
                                                .ignore_eos = true,
                                                .sampling = SAMPLING_DEFAULTS,
                                                .has_temperature = true};
        request.sampling.temperature = 0;
        run->started_us = clock_now_us();
        run->last_us = 0;
        if (client_generate(run->client, &request, on_response, run, &run->error))
            run->failures++;
    }
    free(ids);
    return NULL;
}

static void samples_join(struct samples *to, struct samples *from)
{
    for (size_t i = 0; i < from->count; i++)
        samples_add(to, from->values[i]);
    free(from->values);
}

struct sweep_result {
    uint32_t concurrency, requests, failures;
    double seconds;
    uint64_t tokens;
    struct samples first, gap;
    struct error error;
};

static int run_sweep(struct load *load, uint32_t concurrency, struct sweep_result *result)
{
    struct client_run *runs = calloc(concurrency, sizeof(*runs));
    pthread_t *threads = calloc(concurrency, sizeof(*threads));
    uint32_t n_started = 0;
    *result = (struct sweep_result){.concurrency = concurrency, .requests = load->n_requests};
    int64_t begun_us = clock_now_us();
    for (; runs && threads && n_started < concurrency; n_started++) {
        runs[n_started] = (struct client_run){.load = load, .client = load->clients[n_started]};
        if (pthread_create(&threads[n_started], NULL, client_main, &runs[n_started]))
            break;
    }
    for (uint32_t i = 0; i < n_started; i++)
        pthread_join(threads[i], NULL);
    result->seconds = (double)(clock_now_us() - begun_us) / 1e6;
    for (uint32_t i = 0; i < n_started; i++) {
        result->tokens += runs[i].tokens;
        result->failures += runs[i].failures;
        if (runs[i].failures)
            result->error = runs[i].error;
        samples_join(&result->first, &runs[i].first);
        samples_join(&result->gap, &runs[i].gap);
    }
    qsort(result->first.values, result->first.count, sizeof(double), compare_doubles);
    qsort(result->gap.values, result->gap.count, sizeof(double), compare_doubles);
    free(runs);
    free(threads);
    return n_started == concurrency ? STATUS_OK : STATUS_NO_MEMORY;
}

static json_t *percentiles_json(const struct samples *samples)
{
    return json_pack("{s:f, s:f, s:f}", "p50", percentile(samples, 0.50), "p95", percentile(samples, 0.95),
                     "p99", percentile(samples, 0.99));
}

static void report_sweep(const struct sweep_result *r, const struct load *load, json_t *rows)
{
    double prompts = (double)(r->requests - r->failures) * load->prompt;
    if (rows) {
        json_array_append_new(
            rows, json_pack("{s:i, s:i, s:i, s:f, s:f, s:f, s:o, s:o}", "concurrency", (int)r->concurrency,
                            "requests", (int)r->requests, "failures", (int)r->failures, "seconds", r->seconds,
                            "new_tokens_per_second", (double)r->tokens / r->seconds,
                            "prompt_tokens_per_second", prompts / r->seconds, "ttft_ms",
                            percentiles_json(&r->first), "gap_ms", percentiles_json(&r->gap)));
        return;
    }
    printf("%7u %8u %10.1f %10.1f  %8.1f %8.1f %8.1f  %7.2f %7.2f %7.2f\n", r->concurrency, r->requests,
           (double)r->tokens / r->seconds, prompts / r->seconds, percentile(&r->first, 0.50),
           percentile(&r->first, 0.95), percentile(&r->first, 0.99), percentile(&r->gap, 0.50),
           percentile(&r->gap, 0.95), percentile(&r->gap, 0.99));
    fflush(stdout);
    if (r->failures)
        fprintf(stderr, "%u requests failed; the last: %s\n", r->failures, r->error.text);
}

static int sweep_all(struct load *load, const int32_t *concurrencies, uint32_t count,
                     const struct config *config, struct error *error)
{
    json_t *rows = config_flag(config, "json") ? json_array() : NULL;
    uint32_t failures = 0;
    int status = STATUS_OK;
    if (!rows)
        printf("%7s %8s %10s %10s  %26s  %23s\n%7s %8s %10s %10s  %8s %8s %8s  %7s %7s %7s\n", "clients",
               "requests", "new tok/s", "prompt", "first token ms", "between tokens ms", "", "", "", "tok/s",
               "p50", "p95", "p99", "p50", "p95", "p99");
    for (uint32_t i = 0; status == STATUS_OK && i < count; i++) {
        uint32_t n = (uint32_t)concurrencies[i], wanted = (uint32_t)config_int(config, "requests");
        struct sweep_result result;
        load->n_requests = wanted ? wanted : (4 * n > 8 ? 4 * n : 8);
        atomic_store(&load->next_request, 0);
        status = run_sweep(load, n, &result);
        if (status)
            error_set(error, status, "cannot start %u clients", n);
        else
            report_sweep(&result, load, rows);
        failures += result.failures;
        free(result.first.values);
        free(result.gap.values);
    }
    if (rows)
        cli_print_json(json_pack("{s:i, s:i, s:o}", "prompt_tokens", (int)load->prompt, "new_tokens",
                                 (int)load->new_tokens, "sweeps", rows));
    if (status == STATUS_OK && failures)
        status = error_set(error, STATUS_UNAVAILABLE, "%u requests failed", failures);
    return status;
}

static int bench_online(const struct config *config, struct error *error)
{
    static struct client *clients[MAX_CLIENTS];
    struct arena arena = {0};
    struct wire_model model;
    int32_t *concurrencies;
    uint32_t count, most = 0;
    int status =
        client_parse_ids(config_string(config, "concurrency"), &concurrencies, &count, &arena, error);
    for (uint32_t i = 0; status == STATUS_OK && i < count; i++) {
        if (concurrencies[i] < 1 || concurrencies[i] > MAX_CLIENTS || count > MAX_SWEEP)
            status = error_set(error, STATUS_INVALID, "--concurrency takes up to %d numbers from 1 to %d",
                               MAX_SWEEP, MAX_CLIENTS);
        most = most > (uint32_t)concurrencies[i] ? most : (uint32_t)concurrencies[i];
    }
    for (uint32_t i = 0; status == STATUS_OK && i < most; i++)
        status = client_open(&clients[i], config, error);
    if (status == STATUS_OK)
        status = client_get_model(clients[0], &model, &arena, error);
    if (status == STATUS_OK) {
        struct load load = {.clients = clients,
                            .vocabulary = model.vocabulary,
                            .prompt = (uint32_t)config_int(config, "prompt"),
                            .new_tokens = (uint32_t)config_int(config, "new")};
        status = sweep_all(&load, concurrencies, count, config, error);
    }
    for (uint32_t i = 0; i < most && i < MAX_CLIENTS; i++)
        client_close(clients[i]);
    arena_free(&arena);
    return status;
}

// Becomes the worker program's own benchmark.
static int bench_offline(const struct config *config, struct error *error)
{
    char directory[4096], program[4200], model[4200], prompt[64], new_tokens[64], batch[256], threads[64],
        level[64];
    char backend[64];
    char json[] = "--json", bench[] = "--bench";
    int status = process_own_directory(directory, sizeof(directory), error);
    if (status)
        return status;
    snprintf(program, sizeof(program), "%s/strata-worker", directory);
    snprintf(model, sizeof(model), "--model=%s", config_positional(config, 0));
    snprintf(prompt, sizeof(prompt), "--bench-prompt=%s", config_string(config, "prompt"));
    snprintf(new_tokens, sizeof(new_tokens), "--bench-new=%s", config_string(config, "new"));
    snprintf(batch, sizeof(batch), "--bench-batch=%s", config_string(config, "batch"));
    snprintf(threads, sizeof(threads), "--threads=%s", config_string(config, "threads"));
    snprintf(backend, sizeof(backend), "--backend=%s", config_string(config, "backend"));
    char *arguments[12] = {program, bench, model, prompt, new_tokens, batch, threads, backend};
    size_t n = 8;
    if (config_string(config, "level")) {
        snprintf(level, sizeof(level), "--level=%s", config_string(config, "level"));
        arguments[n++] = level;
    }
    if (config_flag(config, "json"))
        arguments[n++] = json;
    config_forget_environment(OPTIONS); // ours; the worker's of the same names mean other things
    execv(program, arguments);
    return error_set(error, STATUS_IO, "%s: %s", program, strerror(errno));
}

int command_bench(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    int status;
    if (config_positional_count(config) > 1)
        status = error_set(&error, STATUS_INVALID, "give one model file, or none: %s", USAGE);
    else if (config_positional_count(config) == 1)
        status = bench_offline(config, &error);
    else
        status = bench_online(config, &error);
    config_free(config);
    return cli_report(status, &error);
}
