// Ops on whole rows: tokens, embedding, norms, the inside of the FFN, and storing activations. They move
// little and mostly wait for their predecessor, so each is one kernel with one block a row (or a piece of a
// row), and everything a row needs fits its block's registers. Queued by the executor's thread.
#include "kernels/cuda/cuda_kernel.cuh"
#include "kernels/cuda/cuda_source.cuh"

enum { ACTIVATED_UNIT = 32 }; // the FFN's inside may pass what a half holds: it is stored over 32

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

// The sum over a block, in one order: lanes of a warp by halves, then the warps ascending.
__device__ float block_sum(float value, float *shared)
{
    for (int offset = 16; offset; offset >>= 1)
        value += __shfl_xor_sync(~0u, value, offset);
    __syncthreads(); // an earlier sum was read
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (uint32_t i = 0; i < blockDim.x / 32; i++)
        sum += shared[i];
    return sum;
}

// Eight values from k on; zero from `width` on.
__device__ void load8(const float *x, uint32_t k, uint32_t width, float *out)
{
    if (k + 8 <= width && ((uintptr_t)(x + k) & 15) == 0) {
        float4 low = *(const float4 *)(x + k), high = *(const float4 *)(x + k + 4);
        out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
        out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
        return;
    }
    for (uint32_t i = 0; i < 8; i++)
        out[i] = k + i < width ? x[k + i] : 0;
}

// How many threads a row gets, by its width alone: eight elements each, in as many turns as it takes.
static uint32_t row_threads(uint32_t width)
{
    uint32_t threads = ((width + 7) / 8 + 31) / 32 * 32;
    return threads < 1024 ? threads : 1024;
}

enum { KEPT = 2 }; // turns whose elements stay in registers; later ones are read again

template <bool LAYER>
__global__ void __launch_bounds__(1024)
    norm_kernel(struct activation_view out, const float *x, const uint32_t *index, uint32_t width,
                const float *weight, const float *bias, float epsilon)
{
    __shared__ float shared[32];
    uint32_t row = blockIdx.x, step = 8 * blockDim.x, first = 8 * threadIdx.x;
    float kept[KEPT][8], values[8], factors[8], shifts[8], sum = 0, squares = 0;
    load8(weight, first, width, factors); // nobody writes weights in a step
    cuda_release();
    cuda_wait();
    const float *from = x + (size_t)(index ? index[row] : row) * width;
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        load8(from, first + i * step, width, kept[i]);
    if (LAYER) { // the variance takes a pass of its own: a difference of squares would cancel
        for (uint32_t k = first; k < width; k += step) {
            load8(from, k, width, values);
            for (int e = 0; e < 8; e++)
                sum += values[e];
        }
    }
    float mean = LAYER ? block_sum(sum, shared) / width : 0;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        for (int e = 0; e < 8; e++) {
            float centred = first + i * step + e < width ? kept[i][e] - mean : 0;
            squares = fmaf(centred, centred, squares);
        }
    }
    for (uint32_t k = first + KEPT * step; k < width; k += step) {
        load8(from, k, width, values);
        for (int e = 0; e < 8; e++)
            squares = k + e < width ? fmaf(values[e] - mean, values[e] - mean, squares) : squares;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, shared) / width + epsilon);
    for (uint32_t turn = 0; turn * step < width; turn++) { // all threads take every turn
        uint32_t k = first + turn * step;
        if (turn == 0)
            memcpy(values, kept[0], sizeof(values));
        else
            load8(from, k, width, values);
        if (turn > 0)
            load8(weight, k, width, factors);
        if (bias)
            load8(bias, k, width, shifts);
        for (int e = 0; e < 8; e++) {
            float normed = (values[e] - mean) * scale * factors[e];
            values[e] = k + e >= width ? 0 : bias ? normed + shifts[e] : normed;
        }
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
                rows, row_threads(out->width), 0, activation_view_of(out), x, index, out->width, weight, bias,
                epsilon);
}

// --- element by element ---

__device__ __forceinline__ float silu(float x)
{
    return x / (1.0f + __expf(-x));
}

__device__ __forceinline__ float gelu_tanh(float x)
{
    return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
}

// gate NULL: gelu of `up`, or up itself where `plain` is false too.
__global__ void activate_kernel(struct activation_view out, const float *gate, const float *up,
                                uint32_t stride, uint32_t width, bool plain)
{
    cuda_release();
    cuda_wait();
    uint32_t row = blockIdx.y, k = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    float values[8] = {}, gates[8];
    if (k < width)
        load8(up + (size_t)row * stride, k, width, values);
    if (k < width && gate)
        load8(gate + (size_t)row * stride, k, width, gates);
    for (int e = 0; e < 8 && k < width; e++)
        values[e] = gate ? silu(gates[e]) * values[e] : plain ? gelu_tanh(values[e]) : values[e];
    activation_store8(out, row, k, values, k < width);
}

static void activate(struct device *base, struct activation *out, const float *gate, const float *up,
                     uint32_t stride, uint32_t rows, bool plain)
{
    uint32_t threads = 128;
    dim3 grid(((out->width + 7) / 8 + threads - 1) / threads, rows);
    if (rows)
        cuda_launch(cuda_device_of(base), "activate", activate_kernel, grid, threads, 0,
                    activation_view_of(out), gate, up, stride, out->width, plain);
}

extern "C" void cuda_ffn_activate(struct device *base, struct activation *out, const float *gate,
                                  const float *up, uint32_t stride, uint32_t rows)
{
    out->unit = ACTIVATED_UNIT;
    activate(base, out, gate, up, stride, rows, true);
}

extern "C" void cuda_store(struct device *base, struct activation *out, const float *x, uint32_t rows)
{
    out->unit = 1;
    activate(base, out, NULL, x, out->width, rows, false);
}
