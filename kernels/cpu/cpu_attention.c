// Paged attention: out = softmax(q K) V, for every query of a batch over the visible positions of its
// sequence.
//
// A query's positions are taken page by page in ascending order with a running softmax, whose state starts
// anew at every SPLIT_POSITIONS-th position; the parts are then merged in ascending order. So the bits of a
// result are fixed by the query and its positions: a tile of many queries, one query alone, and the parts of
// one query on many threads all do the same operations. A page's invisible positions are never multiplied,
// not even by 0: they may hold another sequence's leftovers, or NaN.
//
// A tile is the queries of some consecutive positions of one sequence that share a K and V head. Where there
// are many queries, a page is widened to floats once for all of them; where there are few tiles and long
// contexts, each part is a task of its own.
//
// Called from the executor's thread; the work runs on the compute threads, with each worker's scratch.
#include "kernels/cpu/attention_internal.h"

enum {
    SPLIT_POSITIONS = 512,       // never changes with the batch: results depend on it
    TILE_QUERIES = 48,           // queries a tile aims at
    WIDEN_QUERIES = 12,          // from here on widening a page pays
    PART_BYTES_LIMIT = 64 << 20, // of parts kept between the two phases
};

// Positions [row, row + rows) of the batch, and the parts [part_first, part_end) of what they see.
struct attention_item {
    uint32_t slot, row, rows;
    uint32_t part_first, part_end;
    uint32_t n_parts;     // split: of the whole tile, on its first item; 0 on the others
    uint32_t rows_before; // split: rows of all earlier items, that is where its states go
};

struct attention_args {
    struct cpu_device *device;
    const struct attention_kernels *kernels;
    const struct attention_shape *shape;
    const struct kv_layer *kv;
    const struct batch *batch;
    struct activation *out;
    const float *q;
    uint32_t q_stride;
    uint32_t group, padded, state_stride; // queries a K/V head; dimensions, floats of a state
    uint32_t tile_rows;
    struct attention_item *items;
    uint32_t n_items;
    bool split;   // items are single parts
    float *parts; // split: states of every item [n_kv_heads][rows * group]
    float *heads; // outputs [T][n_heads * head_size] when heads are not whole blocks; else NULL
};

// A worker's arrays for one tile.
struct attention_space {
    float *keys, *values;  // a widened page
    float *scores;         // [queries][KV_PAGE_POSITIONS]
    float *part, *total;   // states [queries]
    float *row;            // outputs of one position's group
    const float **queries; // [queries]
    uint32_t *first, *end; // [queries]: what each sees of the current page
};

static size_t space_cut(struct attention_space *space, uint8_t *memory, const struct attention_args *args)
{
    size_t at = 0, queries = (size_t)args->tile_rows * args->group, padded = args->padded;
#define CUT(field, bytes)                                                                                    \
    (space->field = memory ? (void *)(memory + at) : NULL, at += ((bytes) + 63) / 64 * 64)
    CUT(keys, (size_t)KV_PAGE_POSITIONS * args->shape->head_size * sizeof(float));
    CUT(values, KV_PAGE_POSITIONS * padded * sizeof(float));
    CUT(scores, queries * KV_PAGE_POSITIONS * sizeof(float));
    CUT(part, queries * args->state_stride * sizeof(float));
    CUT(total, queries * args->state_stride * sizeof(float));
    CUT(row, (args->group + 1) * padded * sizeof(float));
    CUT(queries, queries * sizeof(float *));
    CUT(first, queries * sizeof(uint32_t));
    CUT(end, queries * sizeof(uint32_t));
#undef CUT
    return at;
}

static void state_clear(float *states, uint32_t count, const struct attention_args *args)
{
    for (uint32_t i = 0; i < count; i++) {
        float *state = states + (size_t)i * args->state_stride;
        memset(state, 0, args->state_stride * sizeof(float));
        state[args->padded + STATE_MAX] = -INFINITY;
    }
}

// The first position that the query at `position` sees.
static uint32_t first_seen(const struct attention_shape *shape, uint32_t position)
{
    return shape->window && position >= shape->window ? position - shape->window + 1 : 0;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t most(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

// --- one page ---

// Weighted values of `n` queries that may see different parts of the page: what all see together, the rest
// one by one, each in ascending order.
static void mix_values(const struct attention_args *args, float *const *states, const float *const *weights,
                       const uint32_t *first, const uint32_t *end, uint32_t n, const void *values, bool wide)
{
    uint32_t from = first[0], to = end[0];
    for (uint32_t i = 1; i < n; i++) {
        from = most(from, first[i]);
        to = least(to, end[i]);
    }
    if (from >= to) { // nothing in common
        for (uint32_t i = 0; i < n; i++)
            args->kernels->multiply(states + i, weights + i, 1, values, wide, args->padded, first[i], end[i],
                                    true);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        if (first[i] < from)
            args->kernels->multiply(states + i, weights + i, 1, values, wide, args->padded, first[i], from,
                                    true);
    args->kernels->multiply(states, weights, n, values, wide, args->padded, from, to, true);
    for (uint32_t i = 0; i < n; i++)
        if (to < end[i])
            args->kernels->multiply(states + i, weights + i, 1, values, wide, args->padded, to, end[i], true);
}

// Queries [query, query + n) of the tile take in a page, most_rows at a time.
static void visit_page(const struct attention_args *args, const struct attention_space *space, uint16_t *page,
                       uint32_t query, uint32_t n)
{
    enum { MOST = 16 };
    const struct attention_kernels *kernels = args->kernels;
    uint32_t size = args->shape->head_size, most_rows = least(kernels->most_rows, MOST);
    const void *keys = page, *values = kv_head_values(page, size);
    bool wide = kernels->widens && n >= WIDEN_QUERIES;
    if (wide) {
        kernels->widen(space->keys, keys, (size_t)KV_PAGE_POSITIONS * size);
        kernels->widen(space->values, values, (size_t)KV_PAGE_POSITIONS * args->padded);
        keys = space->keys;
        values = space->values;
    }
    uint32_t calls = (n + most_rows - 1) / most_rows;
    for (uint32_t call = 0; call < calls; call++) { // evenly: 8 rows are 4 + 4, not 6 + 2
        uint32_t begin = query + n * call / calls, end = query + n * (call + 1) / calls;
        float *scores[MOST];
        for (uint32_t i = begin; i < end; i++)
            scores[i - begin] = space->scores + (size_t)i * KV_PAGE_POSITIONS;
        kernels->multiply(scores, space->queries + begin, end - begin, keys, wide, KV_PAGE_POSITIONS, 0, size,
                          false);
    }
    for (uint32_t i = query; i < query + n; i++)
        kernels->soften(space->scores + (size_t)i * KV_PAGE_POSITIONS,
                        space->part + (size_t)i * args->state_stride, args->padded, args->shape->scale,
                        space->first[i], space->end[i]);
    for (uint32_t call = 0; call < calls; call++) {
        uint32_t begin = query + n * call / calls, end = query + n * (call + 1) / calls;
        float *states[MOST];
        const float *weights[MOST];
        for (uint32_t i = begin; i < end; i++) {
            states[i - begin] = space->part + (size_t)i * args->state_stride;
            weights[i - begin] = space->scores + (size_t)i * KV_PAGE_POSITIONS;
        }
        mix_values(args, states, weights, space->first + begin, space->end + begin, end - begin, values,
                   wide);
    }
}

// --- one part ---

// Which of the item's rows see anything of positions [from, to): a run, because positions ascend. For each of
// their queries, the range within the page that begins at `from`.
static void rows_that_see(const struct attention_args *args, const struct attention_space *space,
                          const struct attention_item *item, uint32_t from, uint32_t to, uint32_t *row_first,
                          uint32_t *row_end)
{
    *row_first = *row_end = 0;
    for (uint32_t row = 0; row < item->rows; row++) {
        uint32_t position = args->batch->positions[item->row + row];
        uint32_t first = most(first_seen(args->shape, position), from), end = least(position + 1, to);
        if (first >= end)
            continue;
        if (*row_end == 0)
            *row_first = row;
        *row_end = row + 1;
        for (uint32_t i = row * args->group; i < (row + 1) * args->group; i++) {
            space->first[i] = first - from;
            space->end[i] = end - from;
        }
    }
}

// space->part becomes the states of the item's queries over positions [part, part + 1) * SPLIT_POSITIONS.
static void compute_part(const struct attention_args *args, const struct attention_space *space,
                         const struct attention_item *item, uint32_t head, uint32_t part)
{
    const struct batch *batch = args->batch;
    uint32_t last_position = batch->positions[item->row + item->rows - 1];
    uint32_t seen = first_seen(args->shape, batch->positions[item->row]) / KV_PAGE_POSITIONS;
    uint32_t pages_a_part = SPLIT_POSITIONS / KV_PAGE_POSITIONS;
    uint32_t page = most(part * pages_a_part, seen);
    uint32_t page_end = least((part + 1) * pages_a_part, last_position / KV_PAGE_POSITIONS + 1);
    const uint32_t *table = batch->page_tables + (size_t)item->slot * batch->table_stride;
    state_clear(space->part, item->rows * args->group, args);
    for (; page < page_end; page++) {
        uint32_t row_first, row_end, from = page * KV_PAGE_POSITIONS;
        rows_that_see(args, space, item, from, from + KV_PAGE_POSITIONS, &row_first, &row_end);
        if (row_first < row_end)
            visit_page(args, space, kv_page_head(args->kv, table[page], head, args->shape->head_size),
                       row_first * args->group, (row_end - row_first) * args->group);
    }
}

// A part in which a query saw nothing leaves the total as it is, whoever else is in the tile.
static void merge_part(const struct attention_args *args, float *totals, const float *parts, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        const float *part = parts + (size_t)i * args->state_stride;
        if (part[args->padded + STATE_SUM] != 0)
            args->kernels->merge(totals + (size_t)i * args->state_stride, part, args->padded);
    }
}

static void store_tile(const struct attention_args *args, const struct attention_space *space,
                       const struct attention_item *item, uint32_t head)
{
    uint32_t size = args->shape->head_size, span = args->group * size;
    for (uint32_t row = 0; row < item->rows; row++) {
        for (uint32_t i = 0; i < args->group; i++) // ascending: the next head overwrites the padding
            args->kernels->finish(space->row + (size_t)i * size,
                                  space->total + (size_t)(row * args->group + i) * args->state_stride,
                                  args->padded);
        if (args->heads)
            memcpy(args->heads + (size_t)(item->row + row) * args->out->width + head * span, space->row,
                   span * sizeof(float));
        else
            cpu_activation_store_span(args->device, args->out, item->row + row, head * span, span,
                                      space->row);
    }
}

// --- tasks ---

static float *part_states(const struct attention_args *args, const struct attention_item *item, uint32_t head)
{
    size_t rows = (size_t)item->rows_before * args->shape->n_kv_heads + (size_t)item->rows * head;
    return args->parts + rows * args->group * args->state_stride;
}

// A tile's head with all its parts, or one part of it.
static void attend(void *context, uint32_t task, uint32_t worker)
{
    const struct attention_args *args = context;
    const struct attention_item *item = &args->items[args->n_items - 1 - task / args->shape->n_kv_heads];
    uint32_t head = task % args->shape->n_kv_heads, n_queries = item->rows * args->group;
    struct attention_space space;
    space_cut(&space, cpu_scratch(args->device, worker), args);
    for (uint32_t i = 0; i < n_queries; i++)
        space.queries[i] = args->q + (size_t)(item->row + i / args->group) * args->q_stride +
                           (size_t)(head * args->group + i % args->group) * args->shape->head_size;
    if (args->split) {
        compute_part(args, &space, item, head, item->part_first);
        memcpy(part_states(args, item, head), space.part,
               (size_t)n_queries * args->state_stride * sizeof(float));
        return;
    }
    state_clear(space.total, n_queries, args);
    for (uint32_t part = item->part_first; part < item->part_end; part++) {
        compute_part(args, &space, item, head, part);
        merge_part(args, space.total, space.part, n_queries);
    }
    store_tile(args, &space, item, head);
}

// Second phase of a split: the tile that begins at the item is put together from its parts.
static void join_parts(void *context, uint32_t task, uint32_t worker)
{
    const struct attention_args *args = context;
    const struct attention_item *item = &args->items[task / args->shape->n_kv_heads];
    uint32_t head = task % args->shape->n_kv_heads, n_queries = item->rows * args->group;
    if (!item->n_parts)
        return;
    struct attention_space space;
    space_cut(&space, cpu_scratch(args->device, worker), args);
    state_clear(space.total, n_queries, args);
    for (uint32_t part = 0; part < item->n_parts; part++)
        merge_part(args, space.total, part_states(args, item + part, head), n_queries);
    store_tile(args, &space, item, head);
}

static void store_rows(void *context, uint32_t task, uint32_t worker)
{
    const struct attention_args *args = context;
    cpu_activation_store_row(args->device, args->out, task, args->heads + (size_t)task * args->out->width);
}

// --- planning ---

// Goes through the tiles in order, and lists them (their parts, if `split`) in `items` when that is not NULL.
// Returns how many entries there are, and in *rows the sum of their rows.
static uint32_t list_items(const struct attention_args *args, bool split, struct attention_item *items,
                           uint64_t *rows)
{
    const struct batch *batch = args->batch;
    uint32_t n = 0;
    *rows = 0;
    for (uint32_t s = 0; s < batch->n_spans; s++) {
        const struct batch_span *span = &batch->spans[s];
        for (uint32_t row = 0; row < span->count; row += args->tile_rows) {
            uint32_t position = span->position + row;
            struct attention_item item = {.slot = span->slot, .row = span->first + row};
            item.rows = least(args->tile_rows, span->count - row);
            item.part_first = first_seen(args->shape, position) / SPLIT_POSITIONS;
            item.part_end = (position + item.rows - 1) / SPLIT_POSITIONS + 1;
            item.n_parts = item.part_end - item.part_first;
            for (uint32_t entries = split ? item.n_parts : 1; entries; entries--) {
                if (split)
                    item.part_end = item.part_first + 1;
                item.rows_before = (uint32_t)*rows;
                if (items)
                    items[n] = item;
                n++;
                *rows += item.rows;
                item.part_first++;
                item.n_parts = 0;
            }
        }
    }
    return n;
}

// Fewer rows a tile when there would not be enough tiles for the threads.
static uint32_t choose_tile_rows(const struct attention_args *args)
{
    uint32_t longest = 1, rows = most(TILE_QUERIES / args->group, 1);
    for (uint32_t s = 0; s < args->batch->n_spans; s++)
        longest = most(longest, args->batch->spans[s].count);
    while (rows > 4 && (uint64_t)args->batch->n_tokens / rows * args->shape->n_kv_heads <
                           (uint64_t)4 * args->device->threads)
        rows /= 2;
    return least(rows, longest);
}

// Decides on tiles and parts, and finds the memory. False when there is none.
static bool plan_work(struct attention_args *args)
{
    args->tile_rows = choose_tile_rows(args);
    uint64_t rows, part_rows;
    uint32_t n_tiles = list_items(args, false, NULL, &rows),
             n_parts = list_items(args, true, NULL, &part_rows);
    uint64_t part_bytes = part_rows * args->shape->n_heads * args->state_stride * sizeof(float);
    args->split = args->device->threads > 1 && n_parts > n_tiles && part_bytes <= PART_BYTES_LIMIT;
    args->n_items = args->split ? n_parts : n_tiles;
    struct attention_space unused;
    if (!cpu_scratch_reserve(args->device, space_cut(&unused, NULL, args)))
        return false;
    args->items =
        cpu_buffer(args->device, BUFFER_ATTENTION_WORK, args->n_items * sizeof(struct attention_item));
    if (!args->items)
        return false;
    if (args->split && !(args->parts = cpu_buffer(args->device, BUFFER_ATTENTION_PART, part_bytes)))
        return false;
    size_t head_bytes = (size_t)args->batch->n_tokens * args->out->width * sizeof(float);
    if (args->shape->head_size % 32 &&
        !(args->heads = cpu_buffer(args->device, BUFFER_ATTENTION_HEAD, head_bytes)))
        return false;
    list_items(args, args->split, args->items, &rows);
    return true;
}

void cpu_attention(struct device *device, struct activation *out, const float *q, uint32_t q_stride,
                   const struct attention_shape *shape, const struct kv_layer *kv, const struct batch *batch)
{
    struct cpu_device *cpu = cpu_device_of(device);
    struct attention_args args = {.device = cpu,
                                  .kernels = cpu->level == LEVEL_AVX512 ? &attention_avx512
                                             : cpu->level == LEVEL_AVX2 ? &attention_avx2
                                                                        : &attention_portable,
                                  .shape = shape,
                                  .kv = kv,
                                  .batch = batch,
                                  .out = out,
                                  .q = q,
                                  .q_stride = q_stride,
                                  .group = shape->n_heads / shape->n_kv_heads,
                                  .padded = kv_padded_size(shape->head_size),
                                  .state_stride = kv_padded_size(shape->head_size) + STATE_EXTRA};
    if (!batch->n_tokens || !plan_work(&args))
        return;
    cpu_parallel(cpu, attend, &args, args.n_items * shape->n_kv_heads);
    if (args.split)
        cpu_parallel(cpu, join_parts, &args, args.n_items * shape->n_kv_heads);
    if (args.heads)
        cpu_parallel(cpu, store_rows, &args, batch->n_tokens);
}
