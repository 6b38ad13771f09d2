// The op matmul: which kernel computes which rows.
//
// Rows of generated tokens go through the product kernels in groups of 64 columns, straight from packed
// weights: one arithmetic whatever the number of columns, so that a sequence's bits do not depend on its
// neighbours. Rows of prompts, many at a time, go through cuda_gemm.cu, weights unpacked to halves first.
// Queued by the executor's thread.
#include "kernels/cuda/cuda_kv.cuh"
#include "kernels/cuda/cuda_product.cuh"
#include "kernels/cuda/cuda_rows.cuh"

// Into how many runs K is cut: enough for all the SMs of a large GPU to have eight warps at work, by the
// shapes alone. Two GPUs of different size give the same bits.
static uint32_t choose_chunks(uint32_t tiles, uint32_t k_blocks)
{
    uint32_t chunks = 1;
    while (chunks < PRODUCT_CHUNKS && tiles * chunks < 1024 && k_blocks >= 2 * chunks)
        chunks *= 2;
    return chunks;
}

static uint32_t tiles_of(const struct matrix *matrix)
{
    return (matrix->rows + CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS;
}

static void add_part(struct product_args *args, const struct matmul_part *part, uint32_t first_column)
{
    const struct matrix *weight = part->weight;
    struct product_part *to = &args->parts[args->n_parts++];
    struct record_form form = record_form_of(record_layout_of(weight->type));
    to->records = (const unsigned char *)weight->data;
    to->tiles = tiles_of(weight);
    to->factors = form.row_factor
                      ? (const float *)(to->records + (size_t)to->tiles * args->k_blocks * form.bytes)
                      : NULL;
    to->bias = part->bias;
    to->out = part->out + (size_t)first_column * part->out_stride;
    to->out_stride = part->out_stride;
    to->rows = weight->rows;
    to->first_tile = args->tiles;
    to->accumulate = part->accumulate;
    args->tiles += to->tiles;
}

// What all launches of a group of columns have in common.
static struct product_args group_args(const struct activation *x, uint32_t first_column, uint32_t columns,
                                      uint32_t chunks)
{
    struct activation_view view = activation_view_of(x);
    struct product_args args = {};
    args.k_blocks = view.k_blocks;
    args.chunks = chunks;
    args.chunk_shift = (uint32_t)__builtin_ctz(chunks);
    args.columns = columns;
    args.many = view.many;
    args.x = view.groups + first_column / CUDA_GROUP_ROWS * activation_group_bytes(x->width);
    args.unit = x->unit == 0 ? 1 : x->unit;
    return args;
}

// The layouts of the parts: true when there are at most two; *other is *layout when there is one.
static bool two_layouts(const struct matmul_part *parts, uint32_t n_parts, int *layout, int *other)
{
    *layout = *other = record_layout_of(parts[0].weight->type);
    for (uint32_t p = 1; p < n_parts; p++) {
        int one = record_layout_of(parts[p].weight->type);
        if (*other == *layout)
            *other = one;
        else if (one != *layout && one != *other)
            return false;
    }
    if (*other < *layout) { // the kernels know pairs in ascending order
        int swapped = *other;
        *other = *layout;
        *layout = swapped;
    }
    return true;
}

// What stands before and behind products that are one kernel with them. Where NULL, it does not.
struct surroundings {
    const struct row_norm *norm;
    struct activation *gated;
    const struct product_heads *heads;
};

// All parts at once by the kernel for few columns.
static bool multiply_small(struct cuda_device *device, const struct activation *x, uint32_t columns,
                           const struct matmul_part *parts, uint32_t n_parts, struct surroundings with,
                           uint32_t chunks)
{
    struct product_args args = group_args(x, 0, columns, chunks);
    int layout, other;
    if (device->general || args.many || !two_layouts(parts, n_parts, &layout, &other))
        return false;
    for (uint32_t p = 0; p < n_parts; p++) {
        add_part(&args, &parts[p], 0);
        args.parts[p].layout = record_layout_of(parts[p].weight->type) != layout;
    }
    if (with.norm) {
        args.norm = {with.norm->x, with.norm->weight, x->width, 1.0f / x->width, with.norm->epsilon};
        args.unit = 1;
    }
    if (with.gated) {
        with.gated->unit = CUDA_ACTIVATED_UNIT;
        args.gated = activation_view_of(with.gated);
        args.tiles = args.parts[0].tiles;
    }
    if (with.heads)
        args.heads = *with.heads;
    return product_small(device, args, layout, other);
}

static void multiply_wide(struct cuda_device *device, const struct activation *x, uint32_t first_column,
                          uint32_t columns, const struct matmul_part *parts, uint32_t n_parts,
                          uint32_t chunks)
{
    for (int layout = 0; layout < RECORD_LAYOUTS; layout++) {
        struct product_args args = group_args(x, first_column, columns, chunks);
        for (uint32_t p = 0; p < n_parts; p++) {
            if (record_layout_of(parts[p].weight->type) == layout)
                add_part(&args, &parts[p], first_column);
        }
        if (args.n_parts > 0)
            (device->general ? product_general : product_wide)(device, args, layout);
    }
}

// silu(parts[0]) parts[1] of all rows, a kernel for each 64. False where that cannot be: few rows, two
// layouts, or so few tiles that K is cut into runs, which clusters share.
static bool multiply_gated(struct cuda_device *device, const struct activation *x, uint32_t rows,
                           const struct matmul_part *parts, struct activation *gated, uint32_t chunks)
{
    int layout, other;
    if (device->general || !activation_view_of(x).many || !two_layouts(parts, 2, &layout, &other) ||
        layout != other || chunks > 1)
        return false;
    gated->unit = CUDA_ACTIVATED_UNIT;
    for (uint32_t first = 0; first < rows; first += CUDA_GROUP_ROWS) {
        uint32_t columns = rows - first < CUDA_GROUP_ROWS ? rows - first : (uint32_t)CUDA_GROUP_ROWS;
        struct product_args args = group_args(x, first, columns, chunks);
        add_part(&args, &parts[0], first);
        add_part(&args, &parts[1], first);
        args.gated = activation_view_of(gated);
        args.gated_row = first;
        product_wide(device, args, layout);
    }
    return true;
}

static void multiply_generated(struct cuda_device *device, const struct activation *x, uint32_t rows,
                               const struct matmul_part *parts, uint32_t n_parts, uint32_t chunks)
{
    if (rows <= CUDA_GROUP_ROWS && multiply_small(device, x, rows, parts, n_parts, {}, chunks))
        return;
    for (uint32_t first = 0; first < rows; first += CUDA_GROUP_ROWS) {
        uint32_t columns = rows - first < CUDA_GROUP_ROWS ? rows - first : (uint32_t)CUDA_GROUP_ROWS;
        multiply_wide(device, x, first, columns, parts, n_parts, chunks);
    }
}

// Runs of K: by all tiles of the product.
static uint32_t chunks_of(const struct activation *x, const struct matmul_part *parts, uint32_t n_parts)
{
    uint32_t tiles = 0;
    for (uint32_t p = 0; p < n_parts; p++)
        tiles += tiles_of(parts[p].weight);
    return choose_chunks(tiles, cuda_padded_width(x->width) / CUDA_K_BLOCK);
}

// `gated` not NULL: silu(parts[0]) parts[1] is wanted there, the parts' own results are not.
static void multiply(struct cuda_device *device, const struct activation *x, uint32_t rows,
                     const struct matmul_part *parts, uint32_t n_parts, struct activation *gated,
                     uint32_t chunks)
{
    uint32_t generated = x->n_generated < rows ? x->n_generated : rows, done = 0;
    if (gated && generated > 0 && multiply_gated(device, x, generated, parts, gated, chunks))
        done = generated;
    else if (generated > 0)
        multiply_generated(device, x, generated, parts, n_parts, chunks);
    for (uint32_t p = 0; p < n_parts && generated < rows; p++)
        cuda_gemm(device, x, rows, &parts[p]);
    if (gated)
        cuda_ffn_activate_rows(device, gated, parts[0].out, parts[1].out, parts[0].out_stride, done, rows);
}

extern "C" void cuda_matmul(struct device *base, const struct activation *x, uint32_t rows,
                            const struct matmul_part *parts, uint32_t n_parts)
{
    multiply(cuda_device_of(base), x, rows, parts, n_parts, NULL, chunks_of(x, parts, n_parts));
}

// What a product does together with its surroundings, where its rows are few; false where it did less than
// all but perhaps the norm, which then is there in x.
static bool project_few(struct cuda_device *device, struct activation *x, uint32_t rows,
                        const struct matmul_part *parts, uint32_t n_parts, struct surroundings with,
                        uint32_t chunks)
{
    const struct row_norm *norm = with.norm;
    bool few = x->n_generated >= rows && rows <= CUDA_GROUP_ROWS;
    if (few && norm->kind == NORM_RMS && !norm->bias &&
        multiply_small(device, x, rows, parts, n_parts, with, chunks))
        return true;
    cuda_norm(&device->base, x, norm->x, NULL, rows, norm->kind, norm->weight, norm->bias, norm->epsilon);
    with.norm = NULL;
    return few && (with.gated || with.heads) && multiply_small(device, x, rows, parts, n_parts, with, chunks);
}

extern "C" void cuda_project(struct device *base, struct activation *x, uint32_t rows,
                             const struct row_norm *norm, const struct matmul_part *parts, uint32_t n_parts,
                             struct activation *gated)
{
    struct cuda_device *device = cuda_device_of(base);
    uint32_t chunks = chunks_of(x, parts, n_parts);
    if (project_few(device, x, rows, parts, n_parts, {norm, gated, NULL}, chunks))
        return;
    multiply(device, x, rows, parts, n_parts, gated, chunks);
}

// False where heads are normalized, or pairs that turn are not neighbours.
static bool heads_of(struct product_heads *heads, const struct qkv_args *qkv,
                     const struct attention_shape *shape, const struct kv_layer *kv,
                     const struct batch *batch)
{
    if (qkv->q_norm || qkv->k_norm || qkv->position == POSITION_ROPE_HALVES)
        return false;
    heads->pages = (unsigned char *)kv->data;
    heads->page_bytes = kv->page_bytes;
    heads->frequency = qkv->rope_frequency;
    heads->positions = batch->positions;
    heads->slots = batch->slots;
    heads->page_tables = batch->page_tables;
    heads->table_stride = batch->table_stride;
    heads->q_rows = shape->n_heads * shape->head_size;
    heads->k_rows = shape->n_kv_heads * shape->head_size;
    heads->head_size = shape->head_size;
    heads->width = kv_width(shape->head_size);
    heads->half = qkv->position == POSITION_LEARNED ? 0 : qkv->rope_dims / 2;
    return true;
}

extern "C" void cuda_project_qkv(struct device *base, struct activation *x, const struct row_norm *norm,
                                 const struct matmul_part *parts, uint32_t n_parts,
                                 const struct qkv_args *qkv, const struct attention_shape *shape,
                                 const struct kv_layer *kv, const struct batch *batch)
{
    struct cuda_device *device = cuda_device_of(base);
    uint32_t rows = batch->n_tokens, chunks = chunks_of(x, parts, n_parts);
    struct product_heads heads;
    if (!heads_of(&heads, qkv, shape, kv, batch)) {
        kernel_project_qkv(base, x, norm, parts, n_parts, qkv, shape, kv, batch);
        return;
    }
    if (project_few(device, x, rows, parts, n_parts, {norm, NULL, &heads}, chunks))
        return;
    multiply(device, x, rows, parts, n_parts, NULL, chunks);
    cuda_attn_prepare(base, qkv, shape, kv, batch);
}
