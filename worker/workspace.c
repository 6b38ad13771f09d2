// The workspace is one table of (where, how big): planning adds the sizes up, allocating walks the same
// table, so the two cannot disagree. On the device's thread.
#include "worker/workspace.h"

#include <stdlib.h>

enum { MAX_BUFFERS = 32 };

struct buffer {
    void **at;
    uint64_t bytes;
    bool on_device;
};
struct layout {
    struct buffer buffers[MAX_BUFFERS];
    uint32_t count;
};

static void want(struct layout *layout, void *at, uint64_t count, uint64_t size, bool on_device)
{
    if (count)
        layout->buffers[layout->count++] = (struct buffer){at, count * size, on_device};
}

unsigned workspace_forms(struct device *device, const struct weight_list *list, enum weight_input input)
{
    unsigned forms = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        if (list->items[i].input == input)
            forms |= device_ops(device)->matrix_forms(device, list->items[i].type);
    }
    return forms;
}

static void want_activation(struct layout *layout, struct device *device, const struct workspace_shape *shape,
                            struct activation *activation, uint32_t width, enum weight_input input)
{
    *activation = (struct activation){.width = width,
                                      .rows = shape->bounds.max_positions,
                                      .forms = workspace_forms(device, shape->weights, input)};
    want(layout, &activation->data, 1,
         device_ops(device)->activation_bytes(device, width, activation->rows, activation->forms), true);
}

static void lay_out_outputs(struct layout *layout, struct workspace *ws, const struct workspace_shape *shape)
{
    uint64_t rows = shape->last ? ws->head_rows : 0;
    want(layout, &ws->logits, rows, shape->spec->vocab_size * sizeof(float), true);
    // Logprobs of the draws; a score of every position; alternatives of both.
    uint64_t floats = shape->bounds.n_slots + ws->max_positions;
    uint64_t tops = (uint64_t)(ws->max_positions + ws->max_rows) * MAX_TOP_LOGPROBS;
    ws->output_bytes = floats * sizeof(float) + tops * sizeof(struct token_logprob) + OUTPUT_ALIGNMENT;
    want(layout, &ws->outputs, shape->last, ws->output_bytes, true);
}

static void lay_out(struct layout *layout, struct workspace *ws, struct device *device,
                    const struct workspace_shape *shape)
{
    const struct model_spec *spec = shape->spec;
    uint64_t positions = shape->bounds.max_positions;
    ws->max_positions = shape->bounds.max_positions;
    ws->max_rows = ws->max_positions < MAX_STEP_ROWS ? ws->max_positions : MAX_STEP_ROWS;
    ws->head_rows = ws->max_positions < HEAD_ROWS ? ws->max_positions : HEAD_ROWS;
    ws->table_stride = (shape->bounds.context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    ws->qkv_stride = (spec->n_heads + 2 * spec->n_kv_heads) * spec->head_size;
    ws->ffn_stride = spec->ffn == FFN_PLAIN ? spec->ffn_width : 2 * spec->ffn_width;
    bool alone = shape->first && shape->last;
    for (int host = 0; host < 2; host++) {
        want(layout, host ? &ws->host.inputs : &ws->inputs, 1,
             step_inputs_at(NULL, ws->max_positions, ws->max_rows).bytes, !host);
        want(layout, host ? &ws->host.residual : &ws->residual, host && alone ? 0 : positions,
             spec->width * sizeof(float), !host);
    }
    want(layout, &ws->host.draws, alone ? 0 : shape->bounds.n_slots, sizeof(int32_t), false);
    want(layout, &ws->page_tables, ((uint64_t)shape->bounds.n_slots + 1) * ws->table_stride, sizeof(uint32_t),
         true);
    want(layout, &ws->qkv, positions, ws->qkv_stride * sizeof(float), true);
    want(layout, &ws->ffn, positions, ws->ffn_stride * sizeof(float), true);
    want_activation(layout, device, shape, &ws->normed, spec->width, WEIGHT_READS_NORMED);
    want_activation(layout, device, shape, &ws->attended, spec->n_heads * spec->head_size,
                    WEIGHT_READS_ATTENDED);
    want_activation(layout, device, shape, &ws->activated, spec->ffn_width, WEIGHT_READS_ACTIVATED);
    lay_out_outputs(layout, ws, shape);
    for (uint32_t i = 0; i < layout->count; i++) {
        const struct buffer *buffer = &layout->buffers[i];
        if (buffer->on_device)
            ws->bytes += device_ops(device)->alloc_bytes(device, buffer->bytes);
        else if (!device_stream(device)) // the CPU's memory is the host's
            ws->bytes += buffer->bytes;
    }
}

struct step_inputs step_inputs_at(void *block, uint32_t n_tokens, uint32_t n_spans)
{
    size_t stride = ((size_t)n_tokens + 3) / 4 * 4 * sizeof(uint32_t); // arrays begin at multiples of 16
    size_t at = n_spans * sizeof(struct batch_span);
    uintptr_t base = (uintptr_t)block;
    return (struct step_inputs){.spans = (struct batch_span *)base,
                                .tokens = (int32_t *)(base + at),
                                .sources = (int32_t *)(base + at + stride),
                                .positions = (uint32_t *)(base + at + 2 * stride),
                                .slots = (uint32_t *)(base + at + 3 * stride),
                                .bytes = at + 4 * stride};
}

uint64_t workspace_plan_bytes(struct device *device, const struct workspace_shape *shape)
{
    struct workspace planned = {0};
    struct layout layout = {.count = 0};
    lay_out(&layout, &planned, device, shape);
    return planned.bytes;
}

int workspace_new(struct workspace **out, struct device *device, const struct workspace_shape *shape,
                  struct error *error)
{
    struct workspace *ws = calloc(1, sizeof(*ws));
    if (!ws)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the workspace");
    ws->device = device;
    ws->ops = device_ops(device);
    struct layout layout = {.count = 0};
    lay_out(&layout, ws, device, shape);
    for (uint32_t i = 0; i < layout.count; i++) {
        const struct buffer *buffer = &layout.buffers[i];
        *buffer->at = buffer->on_device ? ws->ops->alloc(device, buffer->bytes) : calloc(1, buffer->bytes);
        if (!*buffer->at) {
            uint64_t bytes = ws->bytes;
            workspace_free(ws);
            return error_set(error, STATUS_NO_MEMORY,
                             "there is no room for a workspace of %.1f MB (steps of %u positions)",
                             (double)bytes / 1e6, shape->bounds.max_positions);
        }
    }
    *out = ws;
    return STATUS_OK;
}

static void free_device(struct workspace *ws, void *data)
{
    if (data)
        ws->ops->free(ws->device, data);
}

void workspace_free(struct workspace *ws)
{
    if (!ws)
        return;
    void *on_device[] = {
        ws->inputs,      ws->page_tables,   ws->residual,       ws->qkv,    ws->ffn, ws->logits,
        ws->normed.data, ws->attended.data, ws->activated.data, ws->outputs};
    for (size_t i = 0; i < sizeof(on_device) / sizeof(on_device[0]); i++)
        free_device(ws, on_device[i]);
    free(ws->host.inputs);
    free(ws->host.residual);
    free(ws->host.draws);
    free(ws);
}
