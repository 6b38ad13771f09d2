// Deals the tiles of a matmul to the compute threads.
//
// With few columns the weights are read once from memory and that is the cost; with many, a tile stays in the
// first-level cache while it meets all columns of a chunk, and the chunk's activations stay in the second.
// Called from the executor's thread.
#include "kernels/cpu/cpu_tiles.h"

enum {
    CHUNK_BYTES = 512 << 10, // activations that stay in the second-level cache
    TASK_BYTES = 12 << 10,   // weights (times columns) worth handing to another thread
    TASKS_A_THREAD = 8
};

struct tiles_args {
    const struct tile_kernels *kernels;
    const struct matmul_part *parts;
    uint32_t n_parts;
    struct cpu_activation_rows x;
    uint32_t rows;
    uint32_t chunk; // columns of a chunk
    uint32_t tiles_a_task;
    uint32_t tasks_a_chunk;
};

// Runs one tile over columns [first, end).
static void run_tile(const struct tiles_args *args, const struct matmul_part *part, uint32_t tile,
                     uint32_t first, uint32_t end)
{
    const struct matrix *weight = part->weight;
    const struct tile_kernels *kernels = &args->kernels[weight->type];
    bool quantized = cpu_type_of(weight->type).block;
    uint32_t n = tile * TILE_ROWS;
    struct tile_call call = {
        .tile = (const uint8_t *)weight->data + tile * cpu_tile_bytes(weight->type, weight->width),
        .width = weight->width,
        .n_rows = weight->rows - n < TILE_ROWS ? weight->rows - n : TILE_ROWS,
        .x_stride = quantized ? args->x.q8_stride : args->x.float_stride * sizeof(float),
        .out_stride = part->out_stride,
        .bias = part->bias ? part->bias + n : NULL,
        .accumulate = part->accumulate,
    };
    const uint8_t *x = quantized ? args->x.q8 : (const uint8_t *)args->x.floats;
    int size = TILE_KERNELS - 1;
    while (first < end) {
        while (!kernels->columns[size] || 1u << size > end - first)
            size--;
        call.x = x + first * call.x_stride;
        call.out = part->out + (size_t)first * part->out_stride + n;
        kernels->columns[size](&call);
        first += 1u << size;
    }
}

static void run_task(void *arguments, uint32_t task, uint32_t worker)
{
    const struct tiles_args *args = arguments;
    uint32_t first = task / args->tasks_a_chunk * args->chunk;
    uint32_t end = args->rows - first < args->chunk ? args->rows : first + args->chunk;
    uint32_t tile = task % args->tasks_a_chunk * args->tiles_a_task, left = args->tiles_a_task;
    for (uint32_t i = 0; i < args->n_parts && left; i++) { // the parts' tiles, one after another
        uint32_t count = cpu_tile_count(args->parts[i].weight->rows);
        for (; tile < count && left; tile++, left--)
            run_tile(args, &args->parts[i], tile, first, end);
        tile = tile < count ? 0 : tile - count;
    }
}

void cpu_matmul_tiles(struct cpu_device *device, const struct activation *x, uint32_t rows,
                      const struct matmul_part *parts, uint32_t n_parts, const struct tile_kernels *kernels)
{
    struct tiles_args args = {
        .kernels = kernels, .parts = parts, .n_parts = n_parts, .x = cpu_activation_rows(x), .rows = rows};
    size_t tiles = 0, bytes = 0;
    for (uint32_t i = 0; i < n_parts; i++) {
        const struct matrix *weight = parts[i].weight;
        tiles += cpu_tile_count(weight->rows);
        bytes += cpu_tile_count(weight->rows) * cpu_tile_bytes(weight->type, weight->width);
    }
    if (!rows || !tiles)
        return;
    size_t column_bytes = args.x.q8_stride + args.x.float_stride * sizeof(float);
    size_t chunk = CHUNK_BYTES / column_bytes / 8 * 8;
    args.chunk = chunk < 8 ? 8 : chunk > rows ? rows : (uint32_t)chunk;
    size_t task_bytes = bytes / tiles * (args.chunk < 8 ? args.chunk : 8);
    size_t least = (TASK_BYTES + task_bytes - 1) / task_bytes;
    size_t fair = tiles / (device->threads * TASKS_A_THREAD);
    args.tiles_a_task = (uint32_t)(fair > least ? fair : least);
    args.tasks_a_chunk = (uint32_t)((tiles + args.tiles_a_task - 1) / args.tiles_a_task);
    uint32_t chunks = (rows + args.chunk - 1) / args.chunk;
    cpu_parallel(device, run_task, &args, chunks * args.tasks_a_chunk);
}
