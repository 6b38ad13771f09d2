// Deals the rows of norm and the spans of ffn_activate to the compute threads. Small batches run on the
// calling thread: handing out half a microsecond of work costs as much. Called from the executor's thread.
#include "kernels/cpu/cpu_rows.h"

enum {
    TASK_ELEMENTS = 4096, // worth handing to another thread
    SPAN = 1024           // elements of a row that one step of ffn_activate works on
};

static void norm_task(void *arguments, uint32_t task, uint32_t worker)
{
    const struct norm_args *args = arguments;
    uint32_t width = args->out->width;
    float *values = cpu_scratch(args->device, worker);
    args->row(args, args->x + (size_t)(args->index ? args->index[task] : task) * width, values);
    cpu_activation_store_row(args->device, args->out, task, values);
}

static void run(struct cpu_device *device, void (*body)(void *, uint32_t, uint32_t), void *args,
                uint32_t n_tasks, size_t elements)
{
    if (elements >= 2 * TASK_ELEMENTS) {
        cpu_parallel(device, body, args, n_tasks);
        return;
    }
    for (uint32_t task = 0; task < n_tasks; task++)
        body(args, task, 0);
}

void cpu_norm_rows(struct norm_args *args, uint32_t rows)
{
    size_t width = args->out->width;
    if (cpu_scratch_reserve(args->device, width * sizeof(float)))
        run(args->device, norm_task, args, rows, width * rows);
}

static void ffn_task(void *arguments, uint32_t task, uint32_t worker)
{
    const struct ffn_args *args = arguments;
    uint32_t width = args->out->width, spans = (width + SPAN - 1) / SPAN;
    uint32_t row = task / spans, first = task % spans * SPAN;
    uint32_t count = width - first < SPAN ? width - first : SPAN;
    size_t at = (size_t)row * args->stride + first;
    float *values = cpu_scratch(args->device, worker);
    args->span(args->gate ? args->gate + at : NULL, args->up + at, values, count);
    cpu_activation_store_span(args->device, args->out, row, first, count, values);
}

void cpu_ffn_rows(struct ffn_args *args, uint32_t rows)
{
    size_t width = args->out->width;
    uint32_t spans = (uint32_t)((width + SPAN - 1) / SPAN);
    if (cpu_scratch_reserve(args->device, SPAN * sizeof(float)))
        run(args->device, ffn_task, args, rows * spans, width * rows);
}
