// How long a stage's device takes for a layer, and for the head: some rows of generated tokens, in the middle
// of a context of middling length, as a busy pool computes them. The times are the device's own (stamps
// between the ops), the median of a few runs. A slow device runs only as many layers as it has time for,
// other ones each time; where the programs of steps are recorded, so is this. The values are random: a draw
// may take longer where all logits are the same. Runs on the device's thread, as part of the executor.
#include <stdlib.h>

#include "common/clock.h"
#include "worker/executor_internal.h"

enum {
    ROWS = 8,          // at most,
    POSITIONS = 512,   // below this one
    REPEATS = 5,       // of which the median counts
    RUN_US = 40000,    // what the layers of a run may take
    TOTAL_US = 400000, // after so long no other run begins
    LONG_US = 120000,  // a device that takes so long for one layer and the head of one row is not measured
};

// Keys of programs, beyond every number of rows.
enum { LAYERS_PROGRAM = 1 << 30, HEAD_PROGRAM };

struct run {
    uint32_t rows;
    uint32_t first_layer, n_layers; // of the stage
    bool recorded;
    int64_t layers_us, head_us;
};

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

// A micro-batch of a pool whose slots are all taken.
static uint32_t rows_of(const struct executor *executor)
{
    const struct step_bounds *bounds = &executor->bounds;
    uint32_t rows = least(bounds->n_slots / executor->n_stages, ROWS);
    return rows > 0 ? least(rows, least(bounds->max_positions, bounds->context)) : 1;
}

// Every row is at a position of its own of the padding's slot: they write to one page, and not to one place.
static void spell_rows(struct executor *executor, struct work *work, uint32_t rows)
{
    uint32_t first = least(executor->bounds.context, POSITIONS) - rows;
    struct step_inputs host = step_inputs_at(executor->ws->host.inputs, rows, rows);
    for (uint32_t i = 0; i < rows; i++) {
        executor_spell_padding(executor, &host, i, 1);
        host.positions[i] = first + i;
        host.spans[i] = (struct batch_span){i, 1, executor->bounds.n_slots, host.positions[i]};
    }
    executor_upload_batch(executor, work, rows, rows, rows);
}

static int fill_residual(struct executor *executor, uint32_t rows, struct error *error)
{
    size_t n = (size_t)rows * executor->width;
    float *values = malloc(n * sizeof(*values));
    uint32_t state = 1;
    if (!values)
        return error_set(error, STATUS_NO_MEMORY, "no memory to measure %u rows", rows);
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525 + 1013904223;
        values[i] = (float)(int32_t)state / 0x1p31f;
    }
    executor->ops->upload(executor->device, executor->ws->residual, values, n * sizeof(*values));
    free(values);
    return STATUS_OK;
}

// --- what is measured ---

static void compute_layers(struct executor *executor, const struct run *run, const struct batch *batch)
{
    const struct kernel_ops *ops = executor->ops;
    if (run->recorded && ops->replay(executor->device, LAYERS_PROGRAM))
        return;
    if (run->recorded)
        ops->record(executor->device, LAYERS_PROGRAM);
    decoder_some_layers(executor->decoder, executor->ws, executor->kv, batch, run->first_layer,
                        run->n_layers);
    if (run->recorded)
        ops->record_end(executor->device);
}

static void compute_head(struct executor *executor, const struct run *run)
{
    const struct kernel_ops *ops = executor->ops;
    struct workspace *ws = executor->ws;
    struct sample_row draws[ROWS];
    for (uint32_t i = 0; i < run->rows; i++)
        draws[i] = (struct sample_row){.logits_row = i, .slot = i, .position = i, .draws = 1, .out_first = i};
    if (!run->recorded || !ops->replay(executor->device, HEAD_PROGRAM)) {
        if (run->recorded)
            ops->record(executor->device, HEAD_PROGRAM);
        decoder_head(executor->decoder, ws, 0, run->rows);
        if (run->recorded)
            ops->record_end(executor->device);
    }
    ops->sample(executor->device, executor->sampler, ws->logits, draws, run->rows,
                sample_ring_tokens(executor->ring), ws->outputs, ws->outputs);
}

static int open_slots(struct executor *executor, uint32_t rows, struct error *error)
{
    struct sampler_open open = {.params = SAMPLING_DEFAULTS};
    for (uint32_t slot = 0; executor->last && slot < rows; slot++) {
        int status = executor->ops->sampler_open(executor->device, executor->sampler, slot, &open);
        if (status)
            return error_set(error, status, "the sampler cannot be measured: %s", status_name(status));
    }
    return STATUS_OK;
}

static void close_slots(struct executor *executor, uint32_t rows)
{
    for (uint32_t slot = 0; executor->last && slot < rows; slot++)
        executor->ops->sampler_close(executor->device, executor->sampler, slot);
}

static int do_run(struct executor *executor, struct run *run, struct error *error)
{
    const struct kernel_ops *ops = executor->ops;
    struct device *device = executor->device;
    struct work work = {.n_tokens = run->rows};
    int status = fill_residual(executor, run->rows, error);
    if (status)
        return status;
    spell_rows(executor, &work, run->rows);
    uint64_t begin = ops->stamp(device);
    compute_layers(executor, run, &work.batch);
    uint64_t between = ops->stamp(device);
    if (executor->last)
        compute_head(executor, run);
    uint64_t end = ops->stamp(device);
    ops->mark(device);
    status = ops->sync(device, error);
    if (status)
        return status;
    int64_t begin_us = ops->stamp_us(device, begin), between_us = ops->stamp_us(device, between);
    run->layers_us = between_us - begin_us;
    run->head_us = ops->stamp_us(device, end) - between_us;
    return STATUS_OK;
}

// --- how often ---

static int ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int64_t median(int64_t *values, uint32_t count)
{
    qsort(values, count, sizeof(*values), ascending);
    return values[count / 2];
}

// How many layers a run has time for, after one of all rows.
static uint32_t affordable(const struct executor *executor, const struct run *run)
{
    int64_t each_us = run->layers_us / run->n_layers, many = RUN_US / (each_us > 0 ? each_us : 1);
    if (run->recorded || many >= executor->n_layers)
        return executor->n_layers;
    return many > 0 ? (uint32_t)many : 1;
}

// The first run of all rows has been; where it was long enough, it is the only one.
static int repeat(struct executor *executor, struct run *run, int64_t begin_us, struct stage_speed *out,
                  struct error *error)
{
    int64_t layers_us[REPEATS] = {run->layers_us}, head_us[REPEATS] = {run->head_us};
    uint32_t many = affordable(executor, run), count = 0;
    for (; count < REPEATS && clock_now_us() - begin_us < TOTAL_US; count++) {
        run->n_layers = many;
        run->first_layer = (executor->n_layers - many) * count / (REPEATS - 1);
        int status = do_run(executor, run, error);
        if (status)
            return status;
        layers_us[count] = run->layers_us;
        head_us[count] = run->head_us;
    }
    count = count > 0 ? count : 1;
    int64_t layers = median(layers_us, count), head = median(head_us, count);
    out->layer_ns = (uint64_t)(layers > 0 ? layers : 1) * 1000 / run->n_layers;
    out->head_ns = executor->last ? (uint64_t)(head > 0 ? head : 1) * 1000 : 0;
    return STATUS_OK;
}

static int measure(struct executor *executor, uint32_t rows, struct stage_speed *out, struct error *error)
{
    int64_t begin_us = clock_now_us();
    struct run run = {.rows = 1, .n_layers = 1};
    int status = do_run(executor, &run, error); // cold: to see whether a run of all rows can be afforded
    if (status || run.layers_us + run.head_us > LONG_US)
        return status;
    run.rows = rows;
    run.recorded = executor->ops->keeps_programs;
    run.n_layers = run.recorded ? executor->n_layers : 1;
    status = do_run(executor, &run, error);
    return status ? status : repeat(executor, &run, begin_us, out, error);
}

int executor_measure(struct executor *executor, struct stage_speed *out, struct error *error)
{
    uint32_t rows = rows_of(executor);
    *out = (struct stage_speed){0};
    int status = open_slots(executor, rows, error);
    if (!status)
        status = measure(executor, rows, out, error);
    close_slots(executor, rows);
    return status;
}
