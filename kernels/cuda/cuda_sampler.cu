// The sampler on a GPU: the state of every slot lies on the device, and a drawn token joins it there, so that
// steps can be queued ahead of the host. One kernel takes a row from its logits to its tokens; a cluster of
// blocks shares it (cuda_vocab_row.cuh has the passes and says why sums have no order).
//
// Rows travel in the kernel's parameters, 64 a launch: nothing is uploaded in a step, and the caller's array
// is free at return. A slot keeps its parameters, biases in order of token, bans, and in a dense row of the
// table `seen` how often each token was drawn and whether it occurred at all; the row is only kept while a
// penalty is on. All device memory is one allocation, stated by cuda_sampler_bytes beforehand.
//
// Everything is called by the executor's thread and queued on the device's stream.
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/cuda_vocab_row.cuh"
#include "kernels/random_stream.h"

static const uint32_t CALL_ROWS = 64;          // rows of one launch
static const uint32_t STAGED_TOKENS = 1 << 16; // of a history that is uploaded at a time
static const uint32_t SLOT_BANNED = MAX_STOP_IDS + MAX_END_TOKENS;
static const uint32_t SEEN = 0x80000000u; // in `seen`, above the number of times drawn

struct sampler_slot { // [device]
    struct sampling_params params;
    uint32_t choice, n_outputs, n_biases, n_banned;
    bool penalized; // its row of `seen` is kept
    int32_t banned[SLOT_BANNED];
    struct logit_bias biases[MAX_LOGIT_BIAS]; // those of one token beside one another, in the order given
};

struct sampler {
    uint32_t n_slots, vocab;
    void *memory; // [device], all that follows
    struct sampler_slot *slots;
    uint32_t *seen;   // [n_slots][vocab]
    void *staged;     // what the last open uploaded: biases, then pieces of history
    float *adjusted;  // [CALL_ROWS][vocab] where a part does not fit into shared memory, else NULL
    size_t row_bytes; // of shared memory for a part; 0 with `adjusted`
};

// --- kernels: a row of logits to its tokens ---

struct sample_call {
    const float *logits;
    uint32_t vocab;
    struct sampler_slot *slots;
    uint32_t *seen;
    float *adjusted;
    int32_t *tokens;
    float *logprobs;
    struct token_logprob *tops;
    struct sample_row rows[CALL_ROWS];
};
static_assert(sizeof(struct sample_call) <= 4096, "kernel parameters end there");

// What a slot does to its logits.
struct adjustment {
    uint32_t n_biases, n_banned;
    bool penalized;
};

__device__ __forceinline__ float penalized(float logit, uint32_t seen, const struct sampling_params &params)
{
    if (params.repetition_penalty != 1)
        logit = logit > 0 ? logit / params.repetition_penalty : __fmul_rn(logit, params.repetition_penalty);
    uint32_t outputs = seen & ~SEEN;
    if (outputs)
        logit = __fsub_rn(
            logit, __fadd_rn(params.presence_penalty, __fmul_rn(params.frequency_penalty, (float)outputs)));
    return logit;
}

// Bias, penalties and bans on the part's logits; `seen` is the slot's row. Ends with a barrier of the block.
__device__ void adjust_row(const struct vocab_row &part, const struct adjustment &adjust,
                           const struct sampler_slot *slot, const uint32_t *seen)
{
    const struct logit_bias *biases = slot->biases;
    for (uint32_t i = threadIdx.x; i < adjust.n_biases; i += ROW_THREADS) {
        int32_t token = biases[i].token;
        uint32_t at = (uint32_t)token - part.first; // ids outside the part and the vocabulary are nobody's
        if (at >= part.count || (i > 0 && biases[i - 1].token == token))
            continue;
        for (uint32_t j = i; j < adjust.n_biases && biases[j].token == token; j++)
            part.x[at] += biases[j].bias;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; adjust.penalized && i < part.count; i += ROW_THREADS) {
        uint32_t times = seen[part.first + i];
        if (times)
            part.x[i] = penalized(part.x[i], times, slot->params);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < adjust.n_banned; i += ROW_THREADS) {
        uint32_t at = (uint32_t)slot->banned[i] - part.first;
        if (at < part.count)
            part.x[at] = -INFINITY;
    }
    __syncthreads();
}

// Called by the one thread that has the token.
__device__ void store_draw(const struct sample_call &call, const struct sample_row &row, uint32_t draw,
                           uint32_t token, double base)
{
    const float *logits = call.logits + (size_t)row.logits_row * call.vocab;
    call.tokens[row.out_first + draw] = (int32_t)token;
    call.logprobs[row.out_first + draw] = row.logprob ? row_logprob(logits[token], base) : 0;
    if (row.draws != 1)
        return;
    struct sampler_slot *slot = &call.slots[row.slot];
    slot->n_outputs++;
    if (slot->penalized) {
        uint32_t *seen = &call.seen[(size_t)row.slot * call.vocab + token];
        *seen = (*seen + 1) | SEEN;
    }
}

// Draws from the offsets that were not dropped, and are likely enough for min-p.
__device__ void draw_row(struct vocab_row &part, const struct sample_call &call, const struct sample_row &row,
                         const struct sampling_params &params, uint32_t slot_choice, double base)
{
    float least =
        params.min_p > 0 ? fminf(params.min_p, 1.0f) : 0; // the likeliest has weight 1 and always stays
    auto weigh = [least](float x) -> row_mass {
        float weight = row_exp(x);
        return weight < least ? 0 : row_fixed(weight);
    };
    row_mass own = row_chunk_sum(part, weigh), total, before = row_scan(part, own, &total);
    for (uint32_t draw = 0; draw < row.draws; draw++) {
        uint32_t choice = row.draws > 1 ? draw : slot_choice;
        double uniform = random_stream_uniform(params.seed, choice, row.position);
        row_mass target = min((row_mass)(uniform * (double)total), total - 1) + 1; // to reach: to pass it - 1
        if (before < target && target <= before + own)
            store_draw(call, row, draw, row_walk(part, before, target, weigh), base);
    }
}

template <bool SHARED>
__global__ void __launch_bounds__(ROW_THREADS, 2) sample_rows(const __grid_constant__ struct sample_call call)
{
    extern __shared__ float4 part_memory[];
    __shared__ struct row_shared shared;
    const struct sample_row row = call.rows[blockIdx.y];
    const float *logits = call.logits + (size_t)row.logits_row * call.vocab;
    const struct sampler_slot *slot = &call.slots[row.slot];
    float *memory = SHARED ? (float *)part_memory : call.adjusted + (size_t)blockIdx.y * call.vocab;
    struct vocab_row part = row_open(&shared, memory, SHARED, call.vocab);
    cuda_wait();
    row_load(part, logits);
    cuda_release();
    // Read before the first barrier of the cluster: another block's thread may count its draw after it.
    const struct sampling_params params = slot->params;
    const uint32_t choice = slot->choice;
    const struct adjustment adjust = {
        slot->n_biases, slot->n_outputs < params.min_tokens ? slot->n_banned : 0, slot->penalized};
    cluster_joined(part);

    double base = 0;
    struct row_best best = row_find_best(part);
    if (row.logprob || row.top)
        base = row_base(part, best.value);
    if (row.top)
        row_store_tops(part, logits, base, row.top, call.tops + row.top_first);
    if (adjust.n_biases || adjust.n_banned || adjust.penalized) {
        adjust_row(part, adjust, slot, call.seen + (size_t)row.slot * call.vocab);
        best = row_find_best(part);
    }
    if (!(params.temperature > 0) || best.value == -INFINITY) {
        if (part.rank == 0 && threadIdx.x == 0)
            for (uint32_t draw = 0; draw < row.draws; draw++)
                store_draw(call, row, draw, best.id, base);
        return;
    }
    row_offset(part, best.value, params.temperature);
    if (params.top_k)
        row_drop(part, row_select<offset_keys, false>(part, params.top_k, 0));
    if (params.top_p < 1)
        row_drop(part, row_select<offset_keys, true>(part, 0, params.top_p));
    draw_row(part, call, row, params, choice, base);
}

// --- kernels: prompt logprobs ---

struct score_call {
    const float *logits;
    uint32_t vocab;
    float *logprobs;
    struct token_logprob *tops;
    struct score_row rows[CALL_ROWS];
};

// The logits are read where they lie: only alternatives need more than two passes.
__global__ void __launch_bounds__(ROW_THREADS, 2) score_rows(const __grid_constant__ struct score_call call)
{
    __shared__ struct row_shared shared;
    const struct score_row row = call.rows[blockIdx.y];
    const float *logits = call.logits + (size_t)row.logits_row * call.vocab;
    struct vocab_row part = row_open(&shared, (float *)logits, false, call.vocab);
    cuda_wait();
    cluster_joined(part);
    double base = row_base(part, row_find_best(part).value);
    if (row.target >= 0 && part.rank == 0 && threadIdx.x == 0)
        call.logprobs[row.out] = row_logprob(logits[row.target], base);
    if (row.top)
        row_store_tops(part, logits, base, row.top, call.tops + row.top_first);
}

// --- kernels: opening a slot ---

struct open_call {
    struct sampler_slot *slot;
    struct sampling_params params;
    uint32_t choice, n_outputs, n_biases, n_banned;
    bool penalized;
    const struct logit_bias *biases; // [device], as given
    int32_t banned[SLOT_BANNED];
};

// Each bias finds its place by counting those before it: there are few, and it happens once a request.
__global__ void open_slot(const __grid_constant__ struct open_call call)
{
    struct sampler_slot *slot = call.slot;
    cuda_wait();
    for (uint32_t i = threadIdx.x; i < call.n_biases; i += blockDim.x) {
        struct logit_bias bias = call.biases[i];
        uint32_t place = 0;
        for (uint32_t j = 0; j < call.n_biases; j++) {
            int32_t other = call.biases[j].token;
            place += other < bias.token || (other == bias.token && j < i);
        }
        slot->biases[place] = bias;
    }
    for (uint32_t i = threadIdx.x; i < call.n_banned; i += blockDim.x)
        slot->banned[i] = call.banned[i];
    if (threadIdx.x != 0)
        return;
    slot->params = call.params;
    slot->choice = call.choice;
    slot->n_outputs = call.n_outputs;
    slot->n_biases = call.n_biases;
    slot->n_banned = call.n_banned;
    slot->penalized = call.penalized;
}

// Tokens of a history, of which those from `first_output` on were drawn, into a slot's row of `seen`.
__global__ void see_tokens(uint32_t *seen, uint32_t vocab, const int32_t *tokens, uint32_t count,
                           uint32_t first_output)
{
    cuda_wait();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count || (uint32_t)tokens[i] >= vocab)
        return;
    atomicOr(&seen[tokens[i]], SEEN);
    if (i >= first_output)
        atomicAdd(&seen[tokens[i]], 1u);
}

// --- memory ---

// Blocks that share a row.
static uint32_t row_parts(const struct cuda_device *device)
{
    return device->general ? 1 : (uint32_t)ROW_MOST_PARTS;
}

// Bytes of shared memory that a block can have for its part of a row.
static size_t part_room(const struct cuda_device *device)
{
    return device->shared_limit - sizeof(struct row_shared) - 256;
}

// The next `bytes` of `memory`, NULL while there is none.
static void *cut(void *memory, size_t *at, size_t bytes)
{
    size_t begin = *at;
    *at += (bytes + 255) / 256 * 256;
    return memory ? (char *)memory + begin : NULL;
}

// Places the arrays in sampler->memory; returns the bytes of all.
static size_t sampler_layout(struct sampler *sampler, const struct cuda_device *device)
{
    size_t at = 0, n_slots = sampler->n_slots, vocab = sampler->vocab;
    void *memory = sampler->memory;
    size_t part = row_part_size(sampler->vocab, row_parts(device)) * sizeof(float);
    sampler->row_bytes = part <= part_room(device) ? part : 0;
    sampler->slots = (struct sampler_slot *)cut(memory, &at, n_slots * sizeof(struct sampler_slot));
    sampler->seen = (uint32_t *)cut(memory, &at, n_slots * vocab * sizeof(uint32_t));
    sampler->staged = cut(memory, &at, STAGED_TOKENS * sizeof(int32_t));
    sampler->adjusted = NULL;
    if (!sampler->row_bytes)
        sampler->adjusted = (float *)cut(memory, &at, CALL_ROWS * vocab * sizeof(float));
    return at;
}

size_t cuda_sampler_bytes(const struct device *device, uint32_t n_slots, uint32_t vocab)
{
    struct sampler sampler = {};
    sampler.n_slots = n_slots;
    sampler.vocab = vocab;
    return sampler_layout(&sampler, (const struct cuda_device *)device);
}

int cuda_sampler_new(struct sampler **out, struct device *device, uint32_t n_slots, uint32_t vocab,
                     struct error *error)
{
    struct sampler *sampler = (struct sampler *)calloc(1, sizeof *sampler);
    if (!sampler)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a sampler of %u sequences", n_slots);
    sampler->n_slots = n_slots;
    sampler->vocab = vocab;
    size_t bytes = sampler_layout(sampler, cuda_device_of(device));
    sampler->memory = cuda_alloc(device, bytes);
    cudaError_t code = cudaSuccess;
    if (sampler->memory && sampler->row_bytes)
        code =
            cudaFuncSetAttribute((const void *)sample_rows<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)part_room(cuda_device_of(device)));
    if (!sampler->memory || code != cudaSuccess) {
        cuda_sampler_free(device, sampler);
        if (code != cudaSuccess)
            return error_set(error, STATUS_INTERNAL, "the sampler's shared memory: %s",
                             cudaGetErrorString(code));
        return error_set(error, STATUS_NO_MEMORY,
                         "the device has no %zu bytes for a sampler of %u sequences over %u tokens", bytes,
                         n_slots, vocab);
    }
    sampler_layout(sampler, cuda_device_of(device));
    *out = sampler;
    return 0;
}

void cuda_sampler_free(struct device *device, struct sampler *sampler)
{
    if (!sampler)
        return;
    if (sampler->memory)
        cuda_free(device, sampler->memory);
    free(sampler);
}

// --- slots ---

// Counts the history into the slot's row, which is cleared first.
static void see_history(struct cuda_device *device, struct sampler *sampler, uint32_t slot,
                        const struct sampler_open *open)
{
    uint32_t *seen = sampler->seen + (size_t)slot * sampler->vocab;
    cuda_failed(device, cudaMemsetAsync(seen, 0, sampler->vocab * sizeof *seen, device->stream),
                "clear the tokens a sequence has seen");
    for (uint32_t first = 0; first < open->n_history; first += STAGED_TOKENS) {
        uint32_t left = open->n_history - first, count = left < STAGED_TOKENS ? left : STAGED_TOKENS;
        uint32_t first_output = open->n_prompt > first ? open->n_prompt - first : 0;
        cuda_upload(&device->base, sampler->staged, open->history + first, count * sizeof(int32_t));
        cuda_launch(device, "count a sequence's history", see_tokens, (count + 255) / 256, 256, 0, seen,
                    sampler->vocab, (const int32_t *)sampler->staged, count, first_output);
    }
}

// More biases or bans than a slot holds are the caller's fault: requests are bounded by the same limits.
int cuda_sampler_open(struct device *base, struct sampler *sampler, uint32_t slot,
                      const struct sampler_open *open)
{
    if (open->n_biases > MAX_LOGIT_BIAS || open->n_banned > SLOT_BANNED)
        return STATUS_INVALID;
    struct cuda_device *device = cuda_device_of(base);
    const struct sampling_params *params = &open->params;
    struct open_call call = {};
    call.slot = sampler->slots + slot;
    call.params = *params;
    call.choice = open->choice;
    call.n_outputs = open->n_history > open->n_prompt ? open->n_history - open->n_prompt : 0;
    call.n_biases = open->n_biases;
    call.n_banned = open->n_banned;
    call.penalized =
        params->repetition_penalty != 1 || params->presence_penalty != 0 || params->frequency_penalty != 0;
    call.biases = (const struct logit_bias *)sampler->staged;
    if (open->n_banned)
        memcpy(call.banned, open->banned, open->n_banned * sizeof(int32_t));
    if (open->n_biases)
        cuda_upload(base, sampler->staged, open->biases, open->n_biases * sizeof(struct logit_bias));
    cuda_launch(device, "open a sampler's slot", open_slot, 1, 256, 0, call);
    if (call.penalized)
        see_history(device, sampler, slot, open);
    return 0;
}

// Opening writes all that sampling reads, so a closed slot has nothing to clear.
void cuda_sampler_close(struct device *device, struct sampler *sampler, uint32_t slot)
{
}

// --- the ops ---

void cuda_sample(struct device *base, struct sampler *sampler, const float *logits,
                 const struct sample_row *rows, uint32_t n_rows, int32_t *out_tokens, float *out_logprobs,
                 struct token_logprob *out_tops)
{
    struct cuda_device *device = cuda_device_of(base);
    uint32_t parts = row_parts(device);
    struct sample_call call = {};
    call.logits = logits;
    call.vocab = sampler->vocab;
    call.slots = sampler->slots;
    call.seen = sampler->seen;
    call.adjusted = sampler->adjusted;
    call.tokens = out_tokens;
    call.logprobs = out_logprobs;
    call.tops = out_tops;
    for (uint32_t first = 0; first < n_rows; first += CALL_ROWS) {
        uint32_t count = n_rows - first < CALL_ROWS ? n_rows - first : CALL_ROWS;
        memcpy(call.rows, rows + first, count * sizeof *rows);
        cuda_launch_clusters(device, "sample", sampler->row_bytes ? sample_rows<true> : sample_rows<false>,
                             dim3(parts, count), ROW_THREADS, sampler->row_bytes, parts, call);
    }
}

void cuda_score(struct device *base, const float *logits, uint32_t vocab, const struct score_row *rows,
                uint32_t n_rows, float *out_logprobs, struct token_logprob *out_tops)
{
    struct cuda_device *device = cuda_device_of(base);
    uint32_t parts = row_parts(device);
    struct score_call call = {};
    call.logits = logits;
    call.vocab = vocab;
    call.logprobs = out_logprobs;
    call.tops = out_tops;
    for (uint32_t first = 0; first < n_rows; first += CALL_ROWS) {
        uint32_t count = n_rows - first < CALL_ROWS ? n_rows - first : CALL_ROWS;
        memcpy(call.rows, rows + first, count * sizeof *rows);
        cuda_launch_clusters(device, "score", score_rows, dim3(parts, count), ROW_THREADS, 0, parts, call);
    }
}
