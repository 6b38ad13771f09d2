// The executor: one stage's share of every step. The first stage turns tokens into the residual, the others
// receive it; the last one samples, and its tokens go back to the first stage, which may need them for the
// next step before the coordinator has seen them. Runs on the thread that owns the device; owns KV pages,
// workspace, decoder and sampler of its epoch; borrows weights and links.
//
// Steady steps allocate nothing. Feedback is read when a row needs it, and at the latest n_stages + 2 steps
// after it was sent, so that the last stage never waits for room to send.
#include "worker/executor.h"

#include <stdlib.h>

#include "common/clock.h"
#include "worker/decoder.h"
#include "worker/kv_cache.h"
#include "worker/sample_ring.h"
#include "worker/slot_table.h"
#include "worker/step_head.h"
#include "worker/workspace.h"

struct executor {
    struct device *device;
    const struct kernel_ops *ops;
    uint64_t epoch;
    uint32_t stage, n_stages, width;
    bool first, last;
    struct step_bounds bounds;
    struct kv_cache *kv;
    struct workspace *ws;
    struct decoder *decoder;
    struct sampler *sampler;  // last stage
    struct step_head *head;   // last stage
    struct sample_ring *ring; // first and last stage
    struct slot_state *slots;
    struct link *to_next, *from_previous;
    uint64_t next_number;
    uint64_t next_feedback; // first step whose draws have not come back (first of several stages)
    uint64_t wait_us;       // in the step at hand, for neighbours
    bool failed;
};

static struct workspace_shape shape_of(const struct executor_options *options)
{
    return (struct workspace_shape){.spec = options->spec,
                                    .weights = options->list,
                                    .bounds = options->bounds,
                                    .first = options->stage == 0,
                                    .last = options->stage + 1 == options->n_stages};
}

void executor_plan_bytes(const struct executor_options *options, uint64_t *kv_bytes,
                         uint64_t *workspace_bytes)
{
    struct workspace_shape shape = shape_of(options);
    *kv_bytes =
        kv_cache_plan_bytes(options->device, options->spec, options->n_layers, options->bounds.n_pages);
    *workspace_bytes = workspace_plan_bytes(options->device, &shape);
}

static int build_parts(struct executor *executor, const struct executor_options *options, struct error *error)
{
    struct workspace_shape shape = shape_of(options);
    struct device *device = options->device;
    int status = decoder_new(&executor->decoder, device, options->spec, options->weights,
                             options->first_layer, options->n_layers, error);
    if (!status)
        status = kv_cache_new(&executor->kv, device, options->spec, options->n_layers,
                              options->bounds.n_pages, error);
    if (!status)
        status = workspace_new(&executor->ws, device, &shape, error);
    if (!status && executor->last)
        status = executor->ops->sampler_new(&executor->sampler, device, options->bounds.n_slots,
                                            options->spec->vocab_size, error);
    if (status)
        return status;
    executor->slots = calloc(options->bounds.n_slots, sizeof(*executor->slots));
    if (!executor->slots || sample_ring_new(&executor->ring) ||
        (executor->last && step_head_new(&executor->head, device, options->bounds.max_positions)))
        return error_set(error, STATUS_NO_MEMORY, "no memory for the state of %u sequences",
                         options->bounds.n_slots);
    return STATUS_OK;
}

int executor_new(struct executor **out, const struct executor_options *options, struct error *error)
{
    struct executor *executor = calloc(1, sizeof(*executor));
    if (!executor)
        return error_set(error, STATUS_NO_MEMORY, "no memory for an executor");
    executor->device = options->device;
    executor->ops = device_ops(options->device);
    executor->epoch = options->epoch;
    executor->stage = options->stage;
    executor->n_stages = options->n_stages;
    executor->first = options->stage == 0;
    executor->last = options->stage + 1 == options->n_stages;
    executor->width = options->spec->width;
    executor->bounds = options->bounds;
    int status = build_parts(executor, options, error);
    if (status) {
        executor_free(executor);
        return status;
    }
    *out = executor;
    return STATUS_OK;
}

void executor_free(struct executor *executor)
{
    if (!executor)
        return;
    if (executor->sampler)
        executor->ops->sampler_free(executor->device, executor->sampler);
    step_head_free(executor->head);
    sample_ring_free(executor->ring);
    free(executor->slots);
    decoder_free(executor->decoder);
    workspace_free(executor->ws);
    kv_cache_free(executor->kv);
    free(executor);
}

void executor_set_links(struct executor *executor, struct link *to_next, struct link *from_previous)
{
    executor->to_next = to_next;
    executor->from_previous = from_previous;
}

void executor_set_tap(struct executor *executor, executor_tap *tap, void *context)
{
    if (executor->head)
        step_head_set_tap(executor->head, tap, context);
}

// --- links, with the time spent in them ---

static int send_on(struct executor *executor, uint64_t number, const void *data, size_t bytes,
                   struct error *error)
{
    int64_t begin = clock_now_us();
    int status = executor->to_next->ops->send(executor->to_next, number, data, bytes, error);
    executor->wait_us += (uint64_t)(clock_now_us() - begin);
    return status;
}

static int receive(struct executor *executor, uint64_t number, void *data, size_t bytes, struct error *error)
{
    int64_t begin = clock_now_us();
    int status = executor->from_previous->ops->receive(executor->from_previous, number, data, bytes, error);
    executor->wait_us += (uint64_t)(clock_now_us() - begin);
    return status;
}

// --- commands ---

static int open_sampler(struct executor *executor, const struct step_plan *plan,
                        const struct step_command *command, struct error *error)
{
    struct sampler_open open = {.params = command->sampling,
                                .choice = command->choice,
                                .history = plan->tokens + command->history_first,
                                .n_history = command->history_count,
                                .n_prompt = command->history_prompt,
                                .biases = plan->biases + command->bias_first,
                                .n_biases = command->bias_count,
                                .banned = plan->tokens + command->ban_first,
                                .n_banned = command->ban_count};
    int status = executor->ops->sampler_open(executor->device, executor->sampler, command->slot, &open);
    if (status)
        return error_set(error, status, "slot %u cannot sample: %s", command->slot, status_name(status));
    return STATUS_OK;
}

static int apply_command(struct executor *executor, const struct step_plan *plan,
                         const struct step_command *command, struct error *error)
{
    int status = slot_state_apply(executor->slots, command, error);
    if (status)
        return status;
    struct workspace *ws = executor->ws;
    switch (command->kind) {
    case STEP_OPEN:
        return executor->last ? open_sampler(executor, plan, command, error) : STATUS_OK;
    case STEP_CLOSE:
        if (executor->last)
            executor->ops->sampler_close(executor->device, executor->sampler, command->slot);
        return STATUS_OK;
    case STEP_PAGES:
        if (command->pages_count)
            executor->ops->upload(
                executor->device,
                ws->page_tables + (size_t)command->slot * ws->table_stride + command->table_first,
                plan->pages + command->pages_first, command->pages_count * sizeof(uint32_t));
        return STATUS_OK;
    case STEP_COPY:
        kv_cache_copy_page(executor->kv, command->copy_from, command->copy_to);
        return STATUS_OK;
    }
    return error_set(error, STATUS_INTERNAL, "a step command of kind %u was not validated", command->kind);
}

// --- inputs ---

// Waits for the draws of every step before `end`, which the last stage sends in order.
static int collect_feedback(struct executor *executor, uint64_t end, struct error *error)
{
    for (; executor->next_feedback < end; executor->next_feedback++) {
        struct step_draws *draws = sample_ring_step(executor->ring, executor->next_feedback);
        if (!draws || draws->count == 0)
            continue;
        int status =
            receive(executor, executor->next_feedback, draws->tokens, draws->count * sizeof(int32_t), error);
        if (status)
            return status;
        for (uint32_t i = 0; i < draws->count; i++) {
            if (draws->tokens[i] < 0 || (uint32_t)draws->tokens[i] >= executor->bounds.vocab_size)
                return error_set(error, STATUS_CORRUPT, "the last stage drew token %d, of %u",
                                 draws->tokens[i], executor->bounds.vocab_size);
        }
    }
    return STATUS_OK;
}

static int collect_needed_feedback(struct executor *executor, const struct step_plan *plan,
                                   struct error *error)
{
    if (!executor->first || executor->last)
        return STATUS_OK;
    uint64_t lag = executor->n_stages + 2;
    if (lag > MAX_STEP_HISTORY)
        lag = MAX_STEP_HISTORY;
    uint64_t end = plan->number > lag ? plan->number - lag : 0;
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        if (plan->rows[i].from_sample && plan->rows[i].source_step + 1 > end)
            end = plan->rows[i].source_step + 1;
    }
    return collect_feedback(executor, end, error);
}

static int resolve_tokens(struct executor *executor, const struct step_plan *plan, struct error *error)
{
    int32_t *to = executor->ws->host.tokens;
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        const struct step_row *row = &plan->rows[i];
        int status = STATUS_OK;
        if (row->from_sample)
            status = sample_ring_token(executor->ring, row, to, error);
        for (uint32_t t = 0; !row->from_sample && t < row->count; t++)
            to[t] = plan->tokens[row->tokens_first + t];
        if (status)
            return status;
        to += row->count;
    }
    return STATUS_OK;
}

// Spells the rows out position by position and brings them to the device.
static int make_batch(struct executor *executor, const struct step_plan *plan, struct batch *batch,
                      struct error *error)
{
    struct workspace *ws = executor->ws;
    uint32_t tokens = 0;
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        const struct step_row *row = &plan->rows[i];
        int status = slot_state_advance(executor->slots, row, error);
        if (status)
            return status;
        ws->host.spans[i] = (struct batch_span){tokens, row->count, row->slot, row->position};
        for (uint32_t t = 0; t < row->count; t++) {
            ws->host.positions[tokens] = row->position + t;
            ws->host.slots[tokens++] = row->slot;
        }
    }
    *batch = (struct batch){.n_tokens = tokens,
                            .n_spans = plan->n_rows,
                            .tokens = ws->tokens,
                            .positions = ws->positions,
                            .slots = ws->slots,
                            .spans = ws->spans,
                            .page_tables = ws->page_tables,
                            .table_stride = ws->table_stride};
    executor->ops->upload(executor->device, ws->positions, ws->host.positions, tokens * sizeof(uint32_t));
    executor->ops->upload(executor->device, ws->slots, ws->host.slots, tokens * sizeof(uint32_t));
    executor->ops->upload(executor->device, ws->spans, ws->host.spans, plan->n_rows * sizeof(*ws->spans));
    return STATUS_OK;
}

static int take_residual(struct executor *executor, const struct step_plan *plan, const struct batch *batch,
                         struct error *error)
{
    struct workspace *ws = executor->ws;
    size_t bytes = (size_t)batch->n_tokens * executor->width * sizeof(float);
    int status;
    if (executor->first) {
        status = resolve_tokens(executor, plan, error);
        if (status)
            return status;
        executor->ops->upload(executor->device, ws->tokens, ws->host.tokens,
                              batch->n_tokens * sizeof(int32_t));
        decoder_embed(executor->decoder, ws, batch);
        return STATUS_OK;
    }
    status = receive(executor, plan->number, ws->host.residual, bytes, error);
    if (!status)
        executor->ops->upload(executor->device, ws->residual, ws->host.residual, bytes);
    return status;
}

// --- outputs ---

static int pass_on(struct executor *executor, const struct step_plan *plan, const struct batch *batch,
                   struct error *error)
{
    struct workspace *ws = executor->ws;
    size_t bytes = (size_t)batch->n_tokens * executor->width * sizeof(float);
    decoder_layers(executor->decoder, ws, executor->kv, batch);
    executor->ops->download(executor->device, ws->host.residual, ws->residual, bytes);
    int status = executor->ops->sync(executor->device, error);
    return status ? status : send_on(executor, plan->number, ws->host.residual, bytes, error);
}

static int finish(struct executor *executor, const struct step_plan *plan, const struct batch *batch,
                  struct step_draws *draws, struct step_result *result, struct error *error)
{
    const uint32_t *wanted;
    uint32_t n_wanted = step_head_list(executor->head, plan, &wanted);
    decoder_last_layers(executor->decoder, executor->ws, executor->kv, batch, wanted, n_wanted);
    int status = step_head_run(executor->head, plan, executor->decoder, executor->ws, executor->sampler,
                               draws, result, error);
    if (!status)
        status = executor->ops->sync(executor->device, error);
    if (!status && !executor->first && draws->count)
        status = send_on(executor, plan->number, draws->tokens, draws->count * sizeof(int32_t), error);
    return status;
}

// --- the step ---

static int check_plan(struct executor *executor, const struct step_plan *plan, struct error *error)
{
    if (executor->failed)
        return error_set(error, STATUS_UNAVAILABLE, "an earlier step of epoch %llu failed on this stage",
                         (unsigned long long)executor->epoch);
    if (executor->n_stages > 1 && (!executor->to_next || !executor->from_previous))
        return error_set(error, STATUS_INTERNAL, "a step came before the links of stage %u", executor->stage);
    if (plan->number != executor->next_number)
        return error_set(error, STATUS_CORRUPT, "step %llu came, expected step %llu",
                         (unsigned long long)plan->number, (unsigned long long)executor->next_number);
    return step_plan_validate(plan, &executor->bounds, error);
}

static int run_rows(struct executor *executor, const struct step_plan *plan, struct step_result *result,
                    struct error *error)
{
    struct batch batch;
    int status = collect_needed_feedback(executor, plan, error);
    struct step_draws *draws = status ? NULL : sample_ring_begin(executor->ring, plan);
    if (!status && !draws)
        status = error_set(error, STATUS_NO_MEMORY, "no memory for the tokens of step %llu",
                           (unsigned long long)plan->number);
    if (!status)
        status = make_batch(executor, plan, &batch, error);
    if (status || batch.n_tokens == 0)
        return status;
    status = take_residual(executor, plan, &batch, error);
    if (status)
        return status;
    return executor->last ? finish(executor, plan, &batch, draws, result, error)
                          : pass_on(executor, plan, &batch, error);
}

int executor_run(struct executor *executor, const struct step_plan *plan, struct step_result *result,
                 struct error *error)
{
    if (plan->epoch != executor->epoch)
        return EXECUTOR_DROPPED;
    int64_t begin = clock_now_us();
    executor->wait_us = 0;
    step_result_clear(result);
    result->epoch = plan->epoch;
    result->number = plan->number;
    int status = check_plan(executor, plan, error);
    for (uint32_t i = 0; !status && i < plan->n_commands; i++)
        status = apply_command(executor, plan, &plan->commands[i], error);
    if (!status)
        status = run_rows(executor, plan, result, error);
    executor->failed |= status != STATUS_OK;
    executor->next_number++;
    result->wait_us = executor->wait_us;
    result->compute_us = (uint64_t)(clock_now_us() - begin) - executor->wait_us;
    return status;
}
