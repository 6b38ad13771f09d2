// strata-worker --logits: the raw logits of every position of some tokens, for comparing this engine with
// others. One thread.
#include <stdio.h>
#include <stdlib.h>
#include <errno.h>
#include <string.h>

#include "worker/local_engine.h"
#include "worker/worker_bench.h"

enum { DUMP_STEP = 512 };

struct dump {
    FILE *file;
    bool failed;
};

static void write_row(void *context, uint32_t row, uint32_t position, const float *logits, uint32_t vocab)
{
    struct dump *dump = context;
    dump->failed |= fwrite(logits, sizeof(*logits), vocab, dump->file) != vocab;
}

static int parse_tokens(struct step_plan *tokens, const char *text, struct error *error)
{
    for (const char *at = text; *at;) {
        char *end;
        long token = strtol(at, &end, 10);
        if (end == at || token < 0 || token > MAX_VOCABULARY || (*end && *end != ','))
            return error_set(error, STATUS_INVALID, "tokens '%s': give ids separated by commas", text);
        int32_t id = (int32_t)token;
        if (step_plan_add_tokens(tokens, &id, 1) < 0)
            return error_set(error, STATUS_NO_MEMORY, "no memory for the tokens");
        at = *end ? end + 1 : end;
    }
    return tokens->n_tokens ? STATUS_OK : error_set(error, STATUS_INVALID, "no tokens were given");
}

static int run_tokens(struct local_engine *engine, const struct step_plan *tokens, struct error *error)
{
    int status = local_engine_add_open(engine, 0, error);
    for (uint32_t done = 0; !status && done < tokens->n_tokens;) {
        uint32_t left = tokens->n_tokens - done, count = left < DUMP_STEP ? left : DUMP_STEP;
        struct step_row *row = step_plan_add_row(&engine->plan);
        int64_t first = step_plan_add_tokens(&engine->plan, tokens->tokens + done, count);
        if (!row || first < 0)
            return error_set(error, STATUS_NO_MEMORY, "no memory for a step plan");
        row->position = done;
        row->count = count;
        row->tokens_first = (uint32_t)first;
        row->logits = STEP_LOGITS_ALL;
        row->next_token = 0; // any: asks for the last position's logits too
        done += count;
        status = local_engine_run(engine, error);
    }
    return status;
}

static int dump_to(struct dump *dump, const char *model, const struct device_options *device,
                   const struct step_plan *tokens, struct error *error)
{
    struct local_engine engine;
    int status = local_engine_open(&engine, model, device, 1, tokens->n_tokens, DUMP_STEP, error);
    if (!status) {
        executor_set_tap(engine.executor, write_row, dump);
        status = run_tokens(&engine, tokens, error);
    }
    local_engine_close(&engine);
    return status;
}

int worker_dump_logits(const char *model, const struct device_options *device, const char *tokens,
                       const char *path, struct error *error)
{
    struct step_plan ids;
    step_plan_init(&ids);
    struct dump dump = {0};
    int status = parse_tokens(&ids, tokens, error);
    if (!status && !(dump.file = fopen(path, "wb")))
        status = error_set(error, STATUS_IO, "cannot write %s: %s", path, strerror(errno));
    if (!status)
        status = dump_to(&dump, model, device, &ids, error);
    if (dump.file && (fclose(dump.file) || dump.failed) && !status)
        status = error_set(error, STATUS_IO, "writing %s failed", path);
    step_plan_free(&ids);
    return status;
}
