// Ops on whole rows: tokens, embedding, norms, the inside of the FFN, and storing activations. They move
// little and mostly wait for their predecessor, so each is one kernel with one block a row (or a piece of a
// row), and everything a row needs fits its block's registers. Queued by the executor's thread.
#include "kernels/cuda/cuda_rows.cuh"
#include "kernels/cuda/cuda_source.cuh"

extern "C" size_t cuda_activation_bytes(const struct device *device, uint32_t width, uint32_t rows,
                                        unsigned forms)
{
    return activation_groups(rows) * activation_group_bytes(width) +
           (size_t)rows * cuda_padded_width(width) * sizeof(__half);
}

// --- tokens and embedding ---

__global__ void feed_kernel(int32_t *tokens, const int32_t *sources, const int32_t *ring, uint32_t count)
{
    cuda_release();
    cuda_wait();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && sources[i] >= 0)
        tokens[i] = ring[sources[i]];
}

extern "C" void cuda_feed(struct device *base, int32_t *tokens, const int32_t *sources, const int32_t *ring,
                          uint32_t count)
{
    if (count)
        cuda_launch(cuda_device_of(base), "feed", feed_kernel, (count + 255) / 256, 256, 0, tokens, sources,
                    ring, count);
}

struct table_view { // a look-up table keeps GGUF's layout
    const uint8_t *data;
    uint32_t type;
    size_t row_bytes;
};

__global__ void embed_kernel(float *x, struct table_view table, struct table_view positions, uint32_t width,
                             const int32_t *tokens, const uint32_t *token_positions)
{
    cuda_release();
    cuda_wait();
    uint32_t t = blockIdx.y, k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= width)
        return;
    float value = source_value(table.type, table.data + (size_t)tokens[t] * table.row_bytes, k);
    if (positions.data)
        value += source_value(positions.type,
                              positions.data + (size_t)token_positions[t] * positions.row_bytes, k);
    x[(size_t)t * width + k] = value;
}

static struct table_view table_view_of(const struct matrix *table)
{
    struct table_view view = {};
    if (table) {
        view.data = (const uint8_t *)table->data;
        view.type = table->type;
        view.row_bytes = tensor_type_bytes(table->type, table->width, 1);
    }
    return view;
}

extern "C" void cuda_embed(struct device *base, float *x, const struct matrix *table,
                           const struct matrix *positions, const struct batch *batch)
{
    dim3 grid((table->width + 255) / 256, batch->n_tokens);
    if (batch->n_tokens)
        cuda_launch(cuda_device_of(base), "embed", embed_kernel, grid, 256, 0, x, table_view_of(table),
                    table_view_of(positions), table->width, batch->tokens, batch->positions);
}

// --- whole rows ---

// How many threads a row gets, by its width alone: eight elements each, in as many turns as it takes.
static uint32_t row_threads(uint32_t width)
{
    uint32_t threads = cuda_padded_width(width) / 8;
    return threads < 1024 ? threads : 1024;
}

// One block a row. `chunks` (shared memory): a sum for each K block.
template <bool LAYER>
__global__ void __launch_bounds__(1024)
    norm_kernel(struct activation_view out, const float *x, const uint32_t *index, uint32_t width,
                const float *weight, const float *bias, float epsilon)
{
    extern __shared__ __align__(16) float chunks[];
    uint32_t row = blockIdx.x, step = 8 * blockDim.x, first = 8 * threadIdx.x, lane = threadIdx.x % 32;
    float kept[8], values[8], factors[8], shifts[8], mean = 0, per_width = 1.0f / width;
    row_load8(weight, first, width, factors); // nobody writes weights in a step
    cuda_release();
    cuda_wait();
    const float *from = x + (size_t)(index ? index[row] : row) * width;
    row_load8(from, first, width, kept);
    if (LAYER) { // the variance takes a pass of its own: a difference of squares would cancel
        for (uint32_t k = first; k < out.k_blocks * CUDA_K_BLOCK; k += step) {
            float sum = 0;
            row_load8(from, k, width, values);
            for (int e = 0; e < 8; e++)
                sum += values[e];
            sum = row_warp_sum(sum);
            if (lane == 0)
                chunks[k / CUDA_K_BLOCK] = sum;
        }
        __syncthreads();
        mean = row_chunks_sum(chunks, out.k_blocks) / width;
        __syncthreads();
    }
    for (uint32_t k = first; k < out.k_blocks * CUDA_K_BLOCK; k += step) { // whole warps take every turn
        if (k == first)
            memcpy(values, kept, sizeof(values));
        else
            row_load8(from, k, width, values);
        for (int e = 0; LAYER && e < 8; e++)
            values[e] = k + e < width ? values[e] - mean : 0;
        float sum = row_chunk_squares(values);
        if (lane == 0)
            chunks[k / CUDA_K_BLOCK] = sum;
    }
    __syncthreads();
    float scale = row_scale(chunks, out.k_blocks, per_width, epsilon);
    for (uint32_t k = first; k < out.k_blocks * CUDA_K_BLOCK; k += step) {
        if (k == first) {
            memcpy(values, kept, sizeof(values));
        } else {
            row_load8(from, k, width, values);
            row_load8(weight, k, width, factors);
        }
        for (int e = 0; LAYER && e < 8; e++)
            values[e] -= mean;
        row_apply(values, factors, scale);
        if (bias)
            row_load8(bias, k, width, shifts);
        for (int e = 0; e < 8; e++)
            values[e] = k + e >= width ? 0 : bias ? values[e] + shifts[e] : values[e];
        activation_store8(out, row, k, values, k < width);
    }
}

extern "C" void cuda_norm(struct device *base, struct activation *out, const float *x, const uint32_t *index,
                          uint32_t rows, enum norm_kind kind, const float *weight, const float *bias,
                          float epsilon)
{
    out->unit = 1;
    if (rows == 0)
        return;
    cuda_launch(cuda_device_of(base), "norm", kind == NORM_LAYER ? norm_kernel<true> : norm_kernel<false>,
                rows, row_threads(out->width), cuda_padded_width(out->width) / CUDA_K_BLOCK * sizeof(float),
                activation_view_of(out), x, index, out->width, weight, bias, epsilon);
}

// --- element by element ---

__device__ __forceinline__ float gelu_tanh(float x)
{
    return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
}

// Rows from `first` on. gate NULL: gelu of `up`, or up itself where `plain` is false too.
__global__ void activate_kernel(struct activation_view out, const float *gate, const float *up,
                                uint32_t stride, uint32_t width, uint32_t first, bool plain)
{
    cuda_release();
    cuda_wait();
    uint32_t row = first + blockIdx.y, k = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    float values[8] = {}, gates[8];
    if (k < width)
        row_load8(up + (size_t)row * stride, k, width, values);
    if (k < width && gate)
        row_load8(gate + (size_t)row * stride, k, width, gates);
    for (int e = 0; e < 8 && k < width; e++)
        values[e] = gate ? row_gated(gates[e], values[e]) : plain ? gelu_tanh(values[e]) : values[e];
    activation_store8(out, row, k, values, k < width);
}

static void activate(struct cuda_device *device, struct activation *out, const float *gate, const float *up,
                     uint32_t stride, uint32_t first, uint32_t rows, bool plain)
{
    uint32_t threads = 128;
    dim3 grid(((out->width + 7) / 8 + threads - 1) / threads, rows - first);
    if (rows > first)
        cuda_launch(device, "activate", activate_kernel, grid, threads, 0, activation_view_of(out), gate, up,
                    stride, out->width, first, plain);
}

void cuda_ffn_activate_rows(struct cuda_device *device, struct activation *out, const float *gate,
                            const float *up, uint32_t stride, uint32_t first, uint32_t rows)
{
    out->unit = CUDA_ACTIVATED_UNIT;
    activate(device, out, gate, up, stride, first, rows, true);
}

extern "C" void cuda_ffn_activate(struct device *base, struct activation *out, const float *gate,
                                  const float *up, uint32_t stride, uint32_t rows)
{
    cuda_ffn_activate_rows(cuda_device_of(base), out, gate, up, stride, 0, rows);
}

extern "C" void cuda_store(struct device *base, struct activation *out, const float *x, uint32_t rows)
{
    out->unit = 1;
    activate(cuda_device_of(base), out, NULL, x, out->width, 0, rows, false);
}
