// The executor: one stage's share of every step. The first stage turns tokens into the residual, the others
// receive it; the last one samples, and its tokens go back to the first stage, which may need them for the
// next step before the coordinator has seen them. Runs on the thread that owns the device; owns KV pages,
// workspace, decoder and sampler of its epoch; borrows weights and links.
//
// A step is a list of operations queued on the device, in order behind those of the steps before it. So one
// workspace serves them all: what a step uploads or overwrites is no longer read by the one before. Only what
// the host reads after a step is over is kept a step at a time: what it asked for, and memory that its
// results are fetched to, complete when the device reaches the step's mark. Tokens are fed back on the
// device, from the ring that the sampler writes to.
//
// Programs. A step of generated rows alone is the same operations on the same memory every time, but for the
// number of rows. On a backend that keeps programs its rows are padded to one of a few sizes, and the
// operations from feed to logits are recorded once a size, then replayed. A padding row computes token 0 at
// position 0 of a slot of its own, which has a page of its own; nobody looks at it.
//
// Steady steps allocate nothing, but for a program of a size that the warm-up had no time for. Feedback is
// read when a row needs it, and at the latest a few steps after it was sent, so that the last stage never
// waits for room to send.
#include "worker/executor.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "worker/executor_internal.h"
#include "worker/stage_links.h"

enum {
    SPIN_US = 50,              // how long a wait for the device is busy, before it sleeps for
    NAP_US = 20,               // so long at a time,
    CHECK_US = 1000,           // and looks at the links in between
    PROGRAM_BYTES = 128 << 20, // set aside for programs and code, where there are any
};

static struct workspace_shape shape_of(const struct executor_options *options)
{
    return (struct workspace_shape){.spec = options->spec,
                                    .weights = options->list,
                                    .bounds = options->bounds,
                                    .first = options->stage == 0,
                                    .last = options->stage + 1 == options->n_stages};
}

static bool has_ring(const struct executor_options *options)
{
    return options->stage == 0 || options->stage + 1 == options->n_stages;
}

// The head computes few rows at a time, all in the way of generated ones.
static bool reads_prompts(const struct weight_source *source)
{
    return source->form == WEIGHT_MATRIX && strcmp(source->name, "output.weight") != 0;
}

uint32_t executor_most_generated(const struct step_bounds *bounds)
{
    return bounds->n_slots < bounds->max_positions ? bounds->n_slots : bounds->max_positions;
}

static uint64_t plan_scratch(const struct executor_options *options)
{
    const struct kernel_ops *ops = device_ops(options->device);
    struct scratch_shape shape = {.n_heads = options->spec->n_heads,
                                  .head_size = options->spec->head_size,
                                  .generated = executor_most_generated(&options->bounds),
                                  .pages =
                                      (options->bounds.context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS};
    uint64_t most = 0;
    for (uint32_t i = 0; i < options->list->count; i++) {
        const struct weight_source *source = &options->list->items[i];
        if (source->form != WEIGHT_MATRIX)
            continue;
        shape.type = source->type;
        shape.rows = source->rows;
        shape.width = source->width;
        shape.reads_prompts = reads_prompts(source);
        uint64_t bytes = ops->scratch_bytes(options->device, &shape);
        most = bytes > most ? bytes : most;
    }
    return most;
}

int executor_plan_memory(const struct executor_options *options, struct executor_memory *out,
                         struct error *error)
{
    const struct kernel_ops *ops = device_ops(options->device);
    struct workspace_shape shape = shape_of(options);
    uint32_t n_slots = options->bounds.n_slots;
    *out = (struct executor_memory){.workspace = workspace_plan_bytes(options->device, &shape),
                                    .scratch = plan_scratch(options),
                                    .programs = ops->keeps_programs ? PROGRAM_BYTES : 0};
    if (has_ring(options))
        out->workspace += ops->alloc_bytes(options->device, sample_ring_plan_bytes(n_slots));
    if (shape.last)
        out->sampler = ops->alloc_bytes(
            options->device, ops->sampler_bytes(options->device, n_slots, options->spec->vocab_size));
    return kv_cache_plan(options->device, options->spec, options->n_layers, options->bounds.n_pages + 1,
                         &out->kv, error);
}

// The padding's slot comes behind the others, and so does its page, which is its page at every position.
static int give_scratch_page(struct executor *executor, struct error *error)
{
    const struct workspace *ws = executor->ws;
    uint32_t *pages = malloc(ws->table_stride * sizeof(*pages));
    if (!pages)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a page table");
    for (uint32_t i = 0; i < ws->table_stride; i++)
        pages[i] = executor->bounds.n_pages;
    size_t row = (size_t)executor->bounds.n_slots * ws->table_stride;
    executor->ops->upload(executor->device, ws->page_tables + row, pages, ws->table_stride * sizeof(*pages));
    free(pages);
    return STATUS_OK;
}

static int build_parts(struct executor *executor, const struct executor_options *options, struct error *error)
{
    struct workspace_shape shape = shape_of(options);
    struct device *device = options->device;
    int status = executor->ops->reserve(device, plan_scratch(options), error);
    if (!status)
        status = decoder_new(&executor->decoder, device, options->spec, options->weights,
                             options->first_layer, options->n_layers, error);
    if (!status)
        status = kv_cache_new(&executor->kv, device, options->spec, options->n_layers,
                              options->bounds.n_pages + 1, error);
    if (!status)
        status = workspace_new(&executor->ws, device, &shape, error);
    if (!status && executor->last)
        status = executor->ops->sampler_new(&executor->sampler, device, options->bounds.n_slots,
                                            options->spec->vocab_size, error);
    if (!status)
        status = give_scratch_page(executor, error);
    if (status)
        return status;
    executor->slots = calloc(options->bounds.n_slots, sizeof(*executor->slots));
    if (!executor->slots ||
        (has_ring(options) && sample_ring_new(&executor->ring, device, options->bounds.n_slots)) ||
        (executor->last && step_head_new(&executor->head, device, executor->ws, &options->bounds)))
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
    executor->n_layers = options->n_layers;
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
    struct error ignored; // of steps that nobody waits for any more
    executor->ops->sync(executor->device, &ignored);
    executor->ops->forget(executor->device);
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

// Only what is queued before the step's mark can be stamped, and the last stage's draws are not.
static int send_on(struct executor *executor, uint64_t number, const void *data, size_t bytes,
                   struct error *error)
{
    struct step_stamps *stamps = &executor->stamps;
    int64_t begin = clock_now_us();
    int status = executor->to_next->ops->send(executor->to_next, number, data, bytes, error);
    if (!executor->to_next->on_device) {
        stamps->send_us += clock_now_us() - begin;
    } else if (!executor->last) {
        stamps->sends = true;
        stamps->sent = executor->ops->stamp(executor->device);
    }
    return status;
}

static int receive(struct executor *executor, uint64_t number, void *data, size_t bytes, struct error *error)
{
    step_stamps_ask(&executor->stamps, executor->ops, executor->device);
    return executor->from_previous->ops->receive(executor->from_previous, number, data, bytes, error);
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

// One step's draws, from the last stage into the ring.
static int receive_draws(struct executor *executor, uint64_t number, const struct step_draws *draws,
                         struct error *error)
{
    int32_t *place = sample_ring_tokens(executor->ring) + draws->first, *host = executor->ws->host.draws;
    size_t bytes = draws->count * sizeof(*host);
    if (executor->from_previous->on_device)
        return receive(executor, number, place, bytes, error);
    int status = receive(executor, number, host, bytes, error);
    for (uint32_t i = 0; !status && i < draws->count; i++) {
        if (host[i] < 0 || (uint32_t)host[i] >= executor->bounds.vocab_size)
            status = error_set(error, STATUS_CORRUPT, "the last stage drew token %d, of %u", host[i],
                               executor->bounds.vocab_size);
    }
    if (!status)
        executor->ops->upload(executor->device, place, host, bytes);
    return status;
}

// The draws of every step before `end`, which the last stage sends in order.
static int collect_feedback(struct executor *executor, uint64_t end, struct error *error)
{
    int status = STATUS_OK;
    for (; !status && executor->next_feedback < end; executor->next_feedback++) {
        const struct step_draws *draws = sample_ring_step(executor->ring, executor->next_feedback);
        if (draws && draws->count > 0)
            status = receive_draws(executor, executor->next_feedback, draws, error);
    }
    step_stamps_ready(&executor->stamps, executor->ops, executor->device);
    return status;
}

// What the rows need, and what is long underway. With n_stages + 1 steps in flight in the pool, the result of
// the step that is one further back is known: a queued receive of its draws does not hold up the device.
static int collect_needed_feedback(struct executor *executor, const struct step_plan *plan,
                                   struct error *error)
{
    if (!executor->first || executor->last)
        return STATUS_OK;
    uint64_t lag = executor->n_stages + (executor->from_previous->on_device ? 1 : 2);
    if (lag > MAX_STEP_HISTORY)
        lag = MAX_STEP_HISTORY;
    uint64_t end = plan->number > lag ? plan->number - lag : 0;
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        if (plan->rows[i].from_sample && plan->rows[i].source_step + 1 > end)
            end = plan->rows[i].source_step + 1;
    }
    return collect_feedback(executor, end, error);
}

// Whether the step is the same every time: generated rows alone, each drawing its next token.
static bool is_program(const struct executor *executor, const struct step_plan *plan)
{
    bool same = executor->ops->keeps_programs && plan->n_rows > 0;
    for (uint32_t i = 0; same && i < plan->n_rows; i++) {
        const struct step_row *row = &plan->rows[i];
        same = row->generated && (!executor->last || (row->draws == 1 && row->logits == STEP_LOGITS_LAST));
    }
    return same;
}

// Few sizes, and little padding: every one up to 8, then multiples of 8, then of 32.
uint32_t executor_padded_size(const struct executor *executor, uint32_t n)
{
    uint32_t unit = n <= 8 ? 1 : n <= 64 ? 8 : 32;
    uint32_t padded = (n + unit - 1) / unit * unit, most = executor_most_generated(&executor->bounds);
    return padded < most ? padded : most;
}

static int spell_row(struct executor *executor, const struct step_plan *plan, const struct step_row *row,
                     const struct step_inputs *inputs, uint32_t first, struct error *error)
{
    int status = slot_state_advance(executor->slots, row, error);
    if (status)
        return status;
    for (uint32_t t = 0; t < row->count; t++) {
        inputs->tokens[first + t] = row->from_sample ? 0 : plan->tokens[row->tokens_first + t];
        inputs->sources[first + t] = -1;
        inputs->positions[first + t] = row->position + t;
        inputs->slots[first + t] = row->slot;
    }
    return row->from_sample && executor->first
               ? sample_ring_source(executor->ring, row, &inputs->sources[first], error)
               : STATUS_OK;
}

// `count` positions of the padding's slot, from token `first` and position 0 on.
void executor_spell_padding(const struct executor *executor, const struct step_inputs *inputs, uint32_t first,
                            uint32_t count)
{
    for (uint32_t t = 0; t < count; t++) {
        inputs->tokens[first + t] = 0;
        inputs->sources[first + t] = -1;
        inputs->positions[first + t] = t;
        inputs->slots[first + t] = executor->bounds.n_slots;
    }
}

// Brings what was spelled out in the host's inputs to the device.
void executor_upload_batch(struct executor *executor, struct work *work, uint32_t n_tokens, uint32_t n_spans,
                           uint32_t n_generated)
{
    struct workspace *ws = executor->ws;
    work->inputs = step_inputs_at(ws->inputs, n_tokens, n_spans);
    executor->ops->upload(executor->device, ws->inputs, ws->host.inputs, work->inputs.bytes);
    work->batch = (struct batch){.n_tokens = n_tokens,
                                 .n_spans = n_spans,
                                 .n_generated = n_generated,
                                 .tokens = work->inputs.tokens,
                                 .positions = work->inputs.positions,
                                 .slots = work->inputs.slots,
                                 .spans = work->inputs.spans,
                                 .page_tables = ws->page_tables,
                                 .table_stride = ws->table_stride};
}

// Spells the rows out position by position, and the padding.
int executor_make_batch(struct executor *executor, struct work *work, struct error *error)
{
    const struct step_plan *plan = work->plan;
    struct workspace *ws = executor->ws;
    uint32_t n_tokens = work->program ? executor_padded_size(executor, work->n_tokens) : work->n_tokens;
    uint32_t n_spans = work->program ? n_tokens : plan->n_rows, n_generated = 0, first = 0;
    struct step_inputs host = step_inputs_at(ws->host.inputs, n_tokens, n_spans);
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        const struct step_row *row = &plan->rows[i];
        int status = spell_row(executor, plan, row, &host, first, error);
        if (status)
            return status;
        host.spans[i] = (struct batch_span){first, row->count, row->slot, row->position};
        n_generated += row->generated;
        work->feeds |= row->from_sample;
        first += row->count;
    }
    for (; first < n_tokens; first++) {
        host.spans[first] = (struct batch_span){first, 1, executor->bounds.n_slots, 0};
        executor_spell_padding(executor, &host, first, 1);
    }
    executor_upload_batch(executor, work, n_tokens, n_spans, work->program ? n_tokens : n_generated);
    return STATUS_OK;
}

// --- waiting for the device ---

// Until the device is at `mark`, or a neighbour is gone whose message it waits for.
static int wait_for(struct executor *executor, uint64_t mark, struct error *error)
{
    const struct stage_links links = {executor->to_next, executor->from_previous};
    int64_t begin = clock_now_us(), checked = begin;
    for (;;) {
        int reached = executor->ops->reached(executor->device, mark, error);
        if (reached)
            return reached < 0 ? reached : STATUS_OK;
        int64_t now = clock_now_us();
        if (now - checked >= CHECK_US) {
            int status = stage_links_check(&links, error);
            if (status)
                return status;
            checked = now;
        }
        if (now - begin < SPIN_US)
            sched_yield();
        else
            clock_sleep_us(NAP_US);
    }
}

// --- the residual, from stage to stage ---

static int receive_residual(struct executor *executor, const struct work *work, struct error *error)
{
    struct workspace *ws = executor->ws;
    size_t bytes = (size_t)work->n_tokens * executor->width * sizeof(float);
    bool on_device = executor->from_previous->on_device;
    float *place = on_device ? ws->residual : ws->host.residual;
    int status = receive(executor, work->plan->number, place, bytes, error);
    if (!status && !on_device)
        executor->ops->upload(executor->device, ws->residual, place, bytes);
    step_stamps_ready(&executor->stamps, executor->ops, executor->device);
    return status;
}

static int send_residual(struct executor *executor, const struct work *work, struct error *error)
{
    struct workspace *ws = executor->ws;
    size_t bytes = (size_t)work->n_tokens * executor->width * sizeof(float);
    if (executor->to_next->on_device)
        return send_on(executor, work->plan->number, ws->residual, bytes, error);
    int status = wait_for(executor, executor->ops->mark(executor->device), error);
    if (status)
        return status;
    executor->ops->download(executor->device, ws->host.residual, ws->residual, bytes);
    status = executor->ops->sync(executor->device, error);
    return status ? status : send_on(executor, work->plan->number, ws->host.residual, bytes, error);
}

// --- what a stage computes ---

// Whether a program goes as far as the logits: they are there a group of rows at a time.
static bool includes_head(const struct executor *executor, const struct work *work)
{
    return executor->last && work->program && work->batch.n_tokens <= executor->ws->head_rows;
}

void executor_compute(struct executor *executor, const struct work *work)
{
    struct workspace *ws = executor->ws;
    const struct batch *batch = &work->batch;
    if (executor->first && (work->feeds || work->program))
        executor->ops->feed(executor->device, work->inputs.tokens, work->inputs.sources,
                            sample_ring_tokens(executor->ring), batch->n_tokens);
    if (executor->first)
        decoder_embed(executor->decoder, ws, batch);
    if (executor->last)
        decoder_last_layers(executor->decoder, ws, executor->kv, batch, &work->head);
    else
        decoder_layers(executor->decoder, ws, executor->kv, batch);
    if (includes_head(executor, work))
        decoder_head(executor->decoder, ws, 0, batch->n_tokens);
}

void executor_compute_or_replay(struct executor *executor, const struct work *work)
{
    uint32_t key = work->batch.n_tokens;
    if (!work->program) {
        executor_compute(executor, work);
    } else if (!executor->ops->replay(executor->device, key)) {
        executor->ops->record(executor->device, key);
        executor_compute(executor, work);
        executor->ops->record_end(executor->device);
    }
}

// --- submitting ---

static int check_plan(struct executor *executor, const struct step_plan *plan, struct error *error)
{
    if (executor->failed)
        return error_set(error, STATUS_UNAVAILABLE, "an earlier step of epoch %llu failed on this stage",
                         (unsigned long long)executor->epoch);
    if (executor->n_stages > 1 && (!executor->to_next || !executor->from_previous))
        return error_set(error, STATUS_INTERNAL, "a step came before the links of stage %u", executor->stage);
    if (executor_unfinished(executor) == EXECUTOR_DEPTH)
        return error_set(error, STATUS_INTERNAL, "step %llu was submitted while %d were unfinished",
                         (unsigned long long)plan->number, EXECUTOR_DEPTH);
    if (plan->number != executor->next_number)
        return error_set(error, STATUS_CORRUPT, "step %llu came, expected step %llu",
                         (unsigned long long)plan->number, (unsigned long long)executor->next_number);
    return step_plan_validate(plan, &executor->bounds, error);
}

static void mark_computed(struct executor *executor, struct work *work)
{
    executor->stamps.computed = executor->ops->stamp(executor->device);
    work->step->mark = executor->ops->mark(executor->device);
}

// Draws, and what becomes of them. The mark comes before the feedback: the step is over for the coordinator
// even while the first stage does not read it.
static int queue_draws(struct executor *executor, struct work *work, struct error *error)
{
    uint64_t number = work->plan->number;
    int32_t *drawn = sample_ring_tokens(executor->ring) + work->draws->first;
    size_t bytes = work->draws->count * sizeof(*drawn);
    step_head_queue(executor->head, number, executor->decoder, executor->ws, executor->sampler, drawn,
                    includes_head(executor, work));
    work->step->reports = true;
    mark_computed(executor, work);
    if (executor->first)
        return STATUS_OK;
    if (executor->to_next->on_device)
        return bytes ? send_on(executor, number, drawn, bytes, error) : STATUS_OK;
    int status = wait_for(executor, work->step->mark, error); // the next thing may be to wait for a neighbour
    if (!status && bytes)
        status = send_on(executor, number, step_head_drawn(executor->head, number), bytes, error);
    return status;
}

static int queue_rows(struct executor *executor, struct work *work, struct error *error)
{
    int status = executor_make_batch(executor, work, error);
    if (!status && !executor->first)
        status = receive_residual(executor, work, error);
    if (status)
        return status;
    if (executor->last)
        work->head = step_head_list(executor->head, work->plan, work->draws);
    if (work->program)
        work->head = (struct head_rows){NULL, work->batch.n_tokens, work->batch.n_tokens};
    executor->stamps.starts = executor->ops->stamp(executor->device);
    executor_compute_or_replay(executor, work);
    if (executor->last)
        return queue_draws(executor, work, error);
    executor->stamps.computed = executor->ops->stamp(executor->device);
    status = send_residual(executor, work, error);
    work->step->mark = executor->ops->mark(executor->device);
    return status;
}

static int queue_step(struct executor *executor, struct work *work, struct error *error)
{
    const struct step_plan *plan = work->plan;
    int status = STATUS_OK;
    for (uint32_t i = 0; !status && i < plan->n_commands; i++)
        status = apply_command(executor, plan, &plan->commands[i], error);
    if (!status)
        status = collect_needed_feedback(executor, plan, error);
    if (status)
        return status;
    if (executor->ring)
        work->draws = sample_ring_begin(executor->ring, plan);
    work->n_tokens = step_plan_positions(plan);
    work->program = is_program(executor, plan);
    executor->stamps.rows = plan->n_rows;
    executor->stamps.positions = work->n_tokens;
    if (work->n_tokens > 0)
        return queue_rows(executor, work, error);
    mark_computed(executor, work); // it only opens, closes and copies
    return STATUS_OK;
}

int executor_submit(struct executor *executor, const struct step_plan *plan, struct error *error)
{
    if (plan->epoch != executor->epoch)
        return EXECUTOR_DROPPED;
    struct unfinished step = {0};
    struct work work = {.plan = plan, .step = &step};
    executor->stamps = (struct step_stamps){.number = plan->number, .submit_us = clock_now_us()};
    int status = check_plan(executor, plan, error);
    if (!status)
        status = queue_step(executor, &work, error);
    if (status) {
        executor->failed = true;
        return status;
    }
    step.stamps = executor->stamps;
    executor->steps[executor->next_number++ % EXECUTOR_DEPTH] = step;
    return STATUS_OK;
}

// --- finishing ---

uint32_t executor_unfinished(const struct executor *executor)
{
    return (uint32_t)(executor->next_number - executor->next_finished);
}

const struct step_times *executor_times(const struct executor *executor)
{
    return &executor->times;
}

int executor_finish(struct executor *executor, struct step_result *result, bool wait, struct error *error)
{
    if (executor_unfinished(executor) == 0)
        return error_set(error, STATUS_INTERNAL, "there is no step to finish");
    uint64_t number = executor->next_finished;
    const struct unfinished *step = &executor->steps[number % EXECUTOR_DEPTH];
    int status = STATUS_OK;
    if (wait) {
        status = wait_for(executor, step->mark, error);
    } else {
        int reached = executor->ops->reached(executor->device, step->mark, error);
        if (reached == 0)
            return EXECUTOR_PENDING;
        status = reached < 0 ? reached : STATUS_OK;
    }
    executor->next_finished++;
    step_result_clear(result);
    result->epoch = executor->epoch;
    result->number = number;
    if (!status && step->reports && step_head_report(executor->head, number, result))
        status = error_set(error, STATUS_NO_MEMORY, "no memory for the result of step %llu",
                           (unsigned long long)number);
    executor->failed |= status != STATUS_OK;
    if (status)
        return status;
    step_times_read(&executor->times, &step->stamps, executor->times.sent_us, executor->ops,
                    executor->device);
    result->wait_us = step_times_wait_us(&executor->times);
    result->compute_us = step_times_compute_us(&executor->times);
    return STATUS_OK;
}

int executor_run(struct executor *executor, const struct step_plan *plan, struct step_result *result,
                 struct error *error)
{
    int status = executor_submit(executor, plan, error);
    return status ? status : executor_finish(executor, result, true, error);
}
