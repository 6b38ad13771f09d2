// What the files of the CPU backend share: the device, its thread pool, the layout of activations and packed
// weights, number conversions, and the functions that cpu_ops.c puts into the op tables.
//
// One file per group of ops and level: NAME_portable.c, NAME_avx2.c, NAME_avx512.c (compiled for that level,
// so nothing outside may be called that is not also right there). Each exports its functions under the name
// cpu_OP_LEVEL, declared at the end of this header; cpu_ops.c has one table a level, and a level without its
// own version of an op names the next lower one's.
#ifndef STRATA_CPU_INTERNAL_H
#define STRATA_CPU_INTERNAL_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "common/tensor_type.h"
#include "kernels/device_internal.h"

// --- the device ---

struct cpu_pool;

struct cpu_device {
    struct device base; // begins with the op table
    uint32_t level;     // enum device_level
    uint32_t threads;   // workers of a parallel region, the calling thread included
    struct cpu_pool *pool;
    char description[64];
    void *scratch[256]; // one a worker, scratch_bytes long
    size_t scratch_bytes;
    struct cpu_buffer {
        void *data;
        size_t bytes;
    } buffers[5];       // one for each enum cpu_buffer_use
    struct error fault; // the first since the last sync
    // Writes values[0, count) as elements [first, first + count) of an activation's row, in all its forms.
    void (*store_span)(const struct activation *activation, uint32_t row, uint32_t first, uint32_t count,
                       const float *values);
};

enum { CPU_MAX_THREADS = 256 };

static inline struct cpu_device *cpu_device_of(struct device *device)
{
    return (struct cpu_device *)device;
}

// Remembers a fault for `sync`.
void cpu_device_fault(struct cpu_device *device, int status, const char *sentence);

// --- threads ---

// Runs body(args, task, worker) for every task in [0, n_tasks), on the device's threads; returns when all are
// done. Tasks go to whichever worker is free, so a task must write only what no other task reads or writes,
// and what it computes must depend on `task` alone. `worker` < device->threads picks scratch. The caller is
// worker 0; one task (or one thread) runs inline. Regions do not nest.
void cpu_parallel(struct cpu_device *device, void (*body)(void *args, uint32_t task, uint32_t worker),
                  void *args, uint32_t n_tasks);

// Every worker's scratch becomes at least `bytes` long (contents are lost). Outside parallel regions.
// Returns false, with a fault noted, when memory is out: the op then writes nothing.
bool cpu_scratch_reserve(struct cpu_device *device, size_t bytes);
static inline void *cpu_scratch(struct cpu_device *device, uint32_t worker) // aligned to 64
{
    return device->scratch[worker];
}

// Memory shared by the workers that an op keeps from call to call: grown on demand, contents lost when it
// grows, aligned to 64. Outside parallel regions. NULL, with a fault noted, when memory is out.
enum cpu_buffer_use {
    BUFFER_ANGLES,         // cpu_kv.c: cosines and sines of a batch's positions
    BUFFER_ANGLES_KEY,     // cpu_kv.c: what they were made of
    BUFFER_ATTENTION_WORK, // cpu_attention.c: the list of tasks
    BUFFER_ATTENTION_PART, // cpu_attention.c: results of parts of long contexts
    BUFFER_ATTENTION_HEAD, // cpu_attention.c: heads whose size is no whole number of blocks
};
void *cpu_buffer(struct cpu_device *device, enum cpu_buffer_use use, size_t bytes);

int cpu_pool_open(struct cpu_pool **out, uint32_t threads, struct error *error);
void cpu_pool_close(struct cpu_pool *pool);

// --- numbers ---

static inline uint32_t cpu_float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float cpu_bits_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float cpu_bf16_to_f32(uint16_t half)
{
    return cpu_bits_float((uint32_t)half << 16);
}

static inline float cpu_f16_to_f32(uint16_t half)
{
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
    if (exponent == 31)
        return cpu_bits_float(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    if (exponent == 0) { // zero or subnormal: mantissa * 2^-24, exact in f32
        float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return cpu_bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

// Round to nearest even.
static inline uint16_t cpu_f32_to_f16(float value)
{
#ifdef __F16C__
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    uint32_t bits = cpu_float_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) // NaN stays NaN, quiet
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) // rounds to 2^16 or more
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) // subnormal half: adding 0.5 rounds at 2^-24
        return (uint16_t)(sign | (cpu_float_bits(cpu_bits_float(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
#endif
}

// One row of `width` weights in GGUF's layout to f32: the value of the format's definition, rounded to f32
// once per product and once per sum (for all but the *_1 and the K types, exact).
void cpu_dequantize_row(uint32_t type, const void *source, float *out, uint32_t width);

// --- activations ---

// matrix_forms: what a matmul reads. Portable: floats for every type.
enum { FORM_F32 = 1, FORM_Q8 = 2 };

// Blocks of 32 elements, each half of 16 with its own scale: value[i] ~ scale[i / 16] * q[i], scale = max
// |value| / 127 of the half, q rounded to nearest even. The largest of 16 is smaller than that of 32, and so
// are the steps and the errors: by an eighth for normally distributed values, by more for wilder ones. (A
// little more range for the rest, at the cost of the largest value, would lose: its own error counts too.)
struct cpu_q8_block {
    int8_t q[32];
    float scale[2];
    float scaled_sum[2];  // scale * (sum of q) of each half
    float scaled_total;   // scaled_sum[0] + scaled_sum[1]
    int32_t minus_sum[2]; // -(sum of q) of each half
};

// FORM_F32: rows of [width rounded up to 16] floats. FORM_Q8, after those: rows of blocks. Rows begin at
// multiples of 64 bytes.
struct cpu_activation_rows {
    float *floats; // NULL when not among the forms
    size_t float_stride;
    uint8_t *q8;      // NULL when not among the forms
    size_t q8_stride; // bytes from row to row
};

static inline struct cpu_activation_rows cpu_activation_rows(const struct activation *activation)
{
    struct cpu_activation_rows rows = {0};
    size_t width = activation->width, bytes = 0;
    if (activation->forms & FORM_F32) {
        rows.floats = activation->data;
        rows.float_stride = (width + 15) / 16 * 16;
        bytes = rows.float_stride * 4 * activation->rows;
    }
    if (activation->forms & FORM_Q8) {
        rows.q8 = (uint8_t *)activation->data + bytes;
        rows.q8_stride = ((width + 31) / 32 * sizeof(struct cpu_q8_block) + 63) / 64 * 64;
    }
    return rows;
}

// A whole row.
static inline void cpu_activation_store_row(struct cpu_device *device, const struct activation *activation,
                                            uint32_t row, const float *values)
{
    device->store_span(activation, row, 0, activation->width, values);
}

// Part of a row (a head of attention): `first` is a multiple of 32, and `count` one too unless the span ends
// the row. Different spans may be stored by different workers.
static inline void cpu_activation_store_span(struct cpu_device *device, const struct activation *activation,
                                             uint32_t row, uint32_t first, uint32_t count,
                                             const float *values)
{
    device->store_span(activation, row, first, count, values);
}

// --- the op tables ---

// cpu_ops.c
const struct kernel_ops *cpu_ops_of_level(uint32_t level);

// cpu_device.c
void *cpu_alloc(struct device *device, size_t bytes);
size_t cpu_alloc_bytes(const struct device *device, size_t bytes);
size_t cpu_scratch_bytes(const struct device *device, const struct scratch_shape *shape);
int cpu_reserve(struct device *device, size_t bytes, struct error *error);
void cpu_free(struct device *device, void *memory);
void cpu_upload(struct device *device, void *to, const void *from, size_t bytes);
void cpu_download(struct device *device, void *to, const void *from, size_t bytes);
void cpu_copy(struct device *device, void *to, const void *from, size_t bytes);
int cpu_sync(struct device *device, struct error *error);
void *cpu_alloc_host(struct device *device, size_t bytes);
void cpu_free_host(struct device *device, void *memory);
uint64_t cpu_mark(struct device *device);
int cpu_reached(struct device *device, uint64_t mark, struct error *error);
uint64_t cpu_stamp(struct device *device);
int64_t cpu_stamp_us(struct device *device, uint64_t stamp);
bool cpu_replay(struct device *device, uint32_t key);
void cpu_record(struct device *device, uint32_t key);
void cpu_record_end(struct device *device);

// cpu_pack.c
size_t cpu_matrix_bytes(const struct device *device, uint32_t type, uint32_t rows, uint32_t width,
                        bool table);
int cpu_matrix_pack(struct device *device, const struct matrix *matrix, const void *source,
                    struct error *error);
unsigned cpu_matrix_forms(const struct device *device, uint32_t type);
size_t cpu_activation_bytes(const struct device *device, uint32_t width, uint32_t rows, unsigned forms);

// rows_*.c: ops that work on whole rows and make activations
#define CPU_ROWS_OPS(level)                                                                                  \
    void cpu_store_span_##level(const struct activation *activation, uint32_t row, uint32_t first,           \
                                uint32_t count, const float *values);                                        \
    void cpu_norm_##level(struct device *device, struct activation *out, const float *x,                     \
                          const uint32_t *index, uint32_t rows, enum norm_kind kind, const float *weight,    \
                          const float *bias, float epsilon);                                                 \
    void cpu_ffn_activate_##level(struct device *device, struct activation *out, const float *gate,          \
                                  const float *up, uint32_t stride, uint32_t rows)
CPU_ROWS_OPS(portable);
CPU_ROWS_OPS(avx2);
CPU_ROWS_OPS(avx512);

// matmul_*.c
#define CPU_MATMUL_OPS(level)                                                                                \
    void cpu_matmul_##level(struct device *device, const struct activation *x, uint32_t rows,                \
                            const struct matmul_part *parts, uint32_t n_parts)
CPU_MATMUL_OPS(portable);
CPU_MATMUL_OPS(avx2);
CPU_MATMUL_OPS(avx512);

// The rest have one version each and call the level's inner loops.
// cpu_embed.c
void cpu_feed(struct device *device, int32_t *tokens, const int32_t *sources, const int32_t *ring,
              uint32_t count);
void cpu_store(struct device *device, struct activation *out, const float *x, uint32_t rows);
void cpu_embed(struct device *device, float *x, const struct matrix *table, const struct matrix *positions,
               const struct batch *batch);

// cpu_kv.c
size_t cpu_kv_page_bytes(const struct device *device, uint32_t n_kv_heads, uint32_t head_size);
void cpu_attn_prepare(struct device *device, const struct qkv_args *qkv, const struct attention_shape *shape,
                      const struct kv_layer *kv, const struct batch *batch);

// cpu_attention.c
void cpu_attention(struct device *device, struct activation *out, const float *q, uint32_t q_stride,
                   const struct attention_shape *shape, const struct kv_layer *kv, const struct batch *batch);

// cpu_sampler.c
size_t cpu_sampler_bytes(const struct device *device, uint32_t n_slots, uint32_t vocab);
int cpu_sampler_new(struct sampler **out, struct device *device, uint32_t n_slots, uint32_t vocab,
                    struct error *error);
void cpu_sampler_free(struct device *device, struct sampler *sampler);
int cpu_sampler_open(struct device *device, struct sampler *sampler, uint32_t slot,
                     const struct sampler_open *open);
void cpu_sampler_close(struct device *device, struct sampler *sampler, uint32_t slot);
void cpu_sample(struct device *device, struct sampler *sampler, const float *logits,
                const struct sample_row *rows, uint32_t n_rows, int32_t *out_tokens, float *out_logprobs,
                struct token_logprob *out_tops);
void cpu_score(struct device *device, const float *logits, uint32_t vocab, const struct score_row *rows,
               uint32_t n_rows, float *out_logprobs, struct token_logprob *out_tops);

#endif
