// What runs before the first step, so that no client waits for it: kernels that are loaded and programs that
// are recorded at their first use. Everything is of the padding's slot and page. Runs on the device's thread,
// as part of the executor.
#include "common/clock.h"
#include "worker/executor_internal.h"

enum {
    WARM_UP_US = 1500000, // after so long the sizes that are left wait for their first use
};

// A prompt as long as a step can be, of sequences as long as they can be, all on the one page: what it
// computes is nonsense.
static void warm_prompt(struct executor *executor)
{
    struct workspace *ws = executor->ws;
    uint32_t context = executor->bounds.context, n_tokens = ws->max_positions;
    if ((uint64_t)context * ws->max_rows < n_tokens)
        n_tokens = context * ws->max_rows;
    uint32_t n_spans = (n_tokens + context - 1) / context;
    struct step_inputs host = step_inputs_at(ws->host.inputs, n_tokens, n_spans);
    for (uint32_t i = 0; i < n_spans; i++) {
        uint32_t first = i * context, left = n_tokens - first, count = left < context ? left : context;
        host.spans[i] = (struct batch_span){first, count, executor->bounds.n_slots, 0};
        executor_spell_padding(executor, &host, first, count);
    }
    struct work work = {.n_tokens = n_tokens, .head = {NULL, 1, 1}};
    executor_upload_batch(executor, &work, n_tokens, n_spans, 0);
    executor_compute(executor, &work);
    if (executor->last)
        decoder_head(executor->decoder, ws, 0, 1);
}

// A greedy draw and another, in a slot that is closed again.
static int warm_sampler(struct executor *executor, struct error *error)
{
    struct workspace *ws = executor->ws;
    struct sample_row row = {.draws = 1};
    for (int greedy = 0; greedy < 2; greedy++) {
        struct sampler_open open = {.params = SAMPLING_DEFAULTS};
        open.params.temperature = greedy ? 0 : 1;
        int status = executor->ops->sampler_open(executor->device, executor->sampler, 0, &open);
        if (status)
            return error_set(error, status, "the sampler cannot be warmed up: %s", status_name(status));
        executor->ops->sample(executor->device, executor->sampler, ws->logits, &row, 1, ws->outputs,
                              (float *)ws->outputs + 1, ws->outputs);
        executor->ops->sampler_close(executor->device, executor->sampler, 0);
    }
    return STATUS_OK;
}

// A program of nothing but padding.
static int warm_program(struct executor *executor, uint32_t n_tokens, struct error *error)
{
    struct step_plan nothing = {.n_rows = 0};
    struct work work = {
        .plan = &nothing, .n_tokens = n_tokens, .program = true, .head = {NULL, n_tokens, n_tokens}};
    int status = executor_make_batch(executor, &work, error);
    if (!status)
        executor_compute_or_replay(executor, &work);
    return status;
}

int executor_warm_up(struct executor *executor, struct error *error)
{
    if (!executor->ops->keeps_programs)
        return STATUS_OK;
    int64_t begin = clock_now_us();
    warm_prompt(executor);
    int status = executor->last ? warm_sampler(executor, error) : STATUS_OK;
    uint32_t most = executor_most_generated(&executor->bounds);
    for (uint32_t n = 0; !status && n < most && clock_now_us() - begin < WARM_UP_US;) {
        n = executor_padded_size(executor, n + 1);
        status = warm_program(executor, n, error);
    }
    return status ? status : executor->ops->sync(executor->device, error);
}
