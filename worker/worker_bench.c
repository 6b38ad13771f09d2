// Timing of prefill and decode without network and scheduler: synthetic plans through the executor, as a
// worker would run them, each submitted while the ones before it are computed. The best of a few runs is
// reported, because everything that disturbs a run makes it slower. One thread.
#include "worker/worker_bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "worker/local_engine.h"

struct bench_times {
    double prefill_s, decode_s;
};

int worker_bench_parse_batches(struct worker_bench_options *options, const char *text, struct error *error)
{
    options->n_batches = 0;
    for (const char *at = text; *at;) {
        char *end;
        unsigned long batch = strtoul(at, &end, 10);
        if (end == at || batch < 1 || batch > MAX_SLOTS || (*end && *end != ',') ||
            options->n_batches == BENCH_MAX_BATCHES)
            return error_set(error, STATUS_INVALID,
                             "batch sizes '%s': give up to %d numbers from 1 to %d, separated by commas",
                             text, BENCH_MAX_BATCHES, MAX_SLOTS);
        options->batches[options->n_batches++] = (uint32_t)batch;
        at = *end ? end + 1 : end;
    }
    return options->n_batches ? STATUS_OK : error_set(error, STATUS_INVALID, "no batch sizes were given");
}

static int32_t any_token(const struct local_engine *engine, uint32_t slot, uint32_t position)
{
    uint64_t mixed = ((uint64_t)slot << 32 | position) * 0x9e3779b97f4a7c15;
    return (int32_t)((mixed >> 33) % engine->spec.vocab_size);
}

static bool add_prompt_row(struct local_engine *engine, uint32_t slot, uint32_t position, uint32_t count,
                           bool last)
{
    struct step_row *row = step_plan_add_row(&engine->plan);
    if (!row)
        return false;
    row->slot = slot;
    row->position = position;
    row->count = count;
    row->tokens_first = engine->plan.n_tokens;
    row->draws = last;
    row->logits = last ? STEP_LOGITS_LAST : STEP_LOGITS_NONE;
    for (uint32_t i = 0; i < count; i++) {
        int32_t token = any_token(engine, slot, position + i);
        if (step_plan_add_tokens(&engine->plan, &token, 1) < 0)
            return false;
    }
    return true;
}

// The prompts of all sequences, in steps that are as full as they can be.
static int prefill(struct local_engine *engine, const struct worker_bench_options *options, uint32_t batch,
                   struct error *error)
{
    uint32_t room = options->step;
    for (uint32_t slot = 0; slot < batch; slot++) {
        for (uint32_t done = 0; done < options->n_prompt;) {
            uint32_t left = options->n_prompt - done, count = left < room ? left : room;
            if (!add_prompt_row(engine, slot, done, count, count == left))
                return error_set(error, STATUS_NO_MEMORY, "no memory for a step plan");
            done += count;
            room -= count;
            int status = room == 0 ? local_engine_submit(engine, error) : STATUS_OK;
            if (status)
                return status;
            room = room ? room : options->step;
        }
    }
    int status = room < options->step ? local_engine_submit(engine, error) : STATUS_OK;
    return status ? status : local_engine_wait(engine, error);
}

static int decode(struct local_engine *engine, const struct worker_bench_options *options, uint32_t batch,
                  struct error *error)
{
    for (uint32_t i = 0; i < options->n_new; i++) {
        for (uint32_t slot = 0; slot < batch; slot++) {
            // The tokens that the step before drew; the first step takes any.
            bool drawn = i > 0;
            if (!add_prompt_row(engine, slot, options->n_prompt + i, 1, true))
                return error_set(error, STATUS_NO_MEMORY, "no memory for a step plan");
            struct step_row *row = &engine->plan.rows[engine->plan.n_rows - 1];
            row->generated = true;
            row->from_sample = drawn;
            row->source_step = drawn ? engine->steps - 1 : 0;
            row->source_row = slot;
        }
        int status = local_engine_submit(engine, error);
        if (status)
            return status;
    }
    return local_engine_wait(engine, error);
}

static int run_once(struct local_engine *engine, const struct worker_bench_options *options, uint32_t batch,
                    struct bench_times *times, struct error *error)
{
    for (uint32_t slot = 0; slot < batch; slot++) {
        int status = local_engine_add_open(engine, slot, error);
        if (status)
            return status;
    }
    int status = local_engine_run(engine, error);
    int64_t start = clock_now_us();
    if (!status)
        status = prefill(engine, options, batch, error);
    int64_t middle = clock_now_us();
    if (!status)
        status = decode(engine, options, batch, error);
    int64_t end = clock_now_us();
    for (uint32_t slot = 0; !status && slot < batch; slot++) {
        if (!step_plan_add_command(&engine->plan, STEP_CLOSE, slot))
            return error_set(error, STATUS_NO_MEMORY, "no memory for a step plan");
    }
    if (!status)
        status = local_engine_run(engine, error);
    *times = (struct bench_times){(double)(middle - start) / 1e6, (double)(end - middle) / 1e6};
    return status;
}

static void print_head(const struct local_engine *engine, const struct worker_bench_options *options)
{
    const char *name = engine->spec.name[0] ? engine->spec.name : engine->spec.architecture;
    double megabytes = (double)engine->weight_bytes / 1e6, seconds = (double)engine->load_us / 1e6;
    double rate = seconds > 0 ? (double)engine->source_bytes / 1e9 / seconds : 0;
    if (options->json) {
        printf("{\"model\": \"");
        for (const char *c = name; *c; c++) // a model's name is any text
            printf(*c == '"' || *c == '\\' || (unsigned char)*c < 32 ? "?" : "%c", *c);
        printf(
            "\", \"device\": \"%s\", \"weight_bytes\": %llu, \"source_bytes\": %llu, \"load_seconds\": %.4f, "
            "\"load_gigabytes_per_second\": %.3f, \"results\": [",
            device_describe(engine->device), (unsigned long long)engine->weight_bytes,
            (unsigned long long)engine->source_bytes, seconds, rate);
        return;
    }
    printf("%s, %.1f MB of weights, %s; %u prompt tokens and %u new ones a sequence\n", name, megabytes,
           device_describe(engine->device), options->n_prompt, options->n_new);
    printf("weights cached in %.2f s: %.1f MB of the file, %.2f GB/s\n", seconds,
           (double)engine->source_bytes / 1e6, rate);
    printf("%6s %16s %16s %14s\n", "batch", "prefill tok/s", "decode tok/s", "ms per step");
}

static void print_result(const struct worker_bench_options *options, uint32_t index,
                         const struct bench_times *best)
{
    uint32_t batch = options->batches[index];
    double prefill_rate = best->prefill_s > 0 ? (double)options->n_prompt * batch / best->prefill_s : 0;
    double decode_rate = best->decode_s > 0 ? (double)options->n_new * batch / best->decode_s : 0;
    double step_ms = options->n_new ? best->decode_s * 1e3 / options->n_new : 0;
    if (options->json)
        printf("%s{\"batch\": %u, \"prompt_tokens\": %u, \"new_tokens\": %u, \"prefill_tokens_per_second\": "
               "%.2f, "
               "\"decode_tokens_per_second\": %.2f, \"decode_step_ms\": %.4f}",
               index ? ", " : "", batch, options->n_prompt, options->n_new, prefill_rate, decode_rate,
               step_ms);
    else
        printf("%6u %16.1f %16.1f %14.3f\n", batch, prefill_rate, decode_rate, step_ms);
    fflush(stdout);
}

static int run_batch(struct local_engine *engine, const struct worker_bench_options *options, uint32_t index,
                     struct error *error)
{
    struct bench_times best = {0};
    for (uint32_t i = 0; i < options->repeat; i++) {
        struct bench_times times = {0};
        int status = run_once(engine, options, options->batches[index], &times, error);
        if (status)
            return status;
        if (i == 0 || times.prefill_s < best.prefill_s)
            best.prefill_s = times.prefill_s;
        if (i == 0 || times.decode_s < best.decode_s)
            best.decode_s = times.decode_s;
    }
    print_result(options, index, &best);
    return STATUS_OK;
}

int worker_bench_run(const struct worker_bench_options *options, struct error *error)
{
    struct local_engine engine;
    uint32_t most = 0;
    for (uint32_t i = 0; i < options->n_batches; i++)
        most = options->batches[i] > most ? options->batches[i] : most;
    uint32_t positions = options->step > most ? options->step : most;
    uint32_t context = options->n_prompt + options->n_new;
    int status = local_engine_open(&engine, options->model, &options->device, most, context ? context : 1,
                                   positions, error);
    if (!status)
        print_head(&engine, options);
    for (uint32_t i = 0; !status && i < options->n_batches; i++)
        status = run_batch(&engine, options, i, error);
    if (!status && options->json)
        printf("]}\n");
    local_engine_close(&engine);
    return status;
}
