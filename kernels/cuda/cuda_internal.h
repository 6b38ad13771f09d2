// What the files of the CUDA backend share on the host: the device, its stream, and the ops each file
// implements. C and C++ both include it; what kernels share is in cuda_kernel.cuh. Everything is called by
// the executor's thread.
#ifndef STRATA_CUDA_INTERNAL_H
#define STRATA_CUDA_INTERNAL_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "common/tensor_type.h"
#include "kernels/device_internal.h"
#include "kernels/kernels.h"

enum {
    CUDA_K_BLOCK = 256,       // weights' widths are padded to whole blocks of so many
    CUDA_TILE_ROWS = 16,      // and their rows to whole tiles
    CUDA_GROUP_ROWS = 64,     // rows of an activation that one decode product takes
    CUDA_FEW_ROWS = 16,       // more rows of generated tokens than these lie otherwise: see cuda_kernel.cuh
    CUDA_BLOCK_BYTES = 576,   // one row of an activation, one K block: see cuda_kernel.cuh
    CUDA_MAX_PROGRAMS = 256,  // recorded programs
    CUDA_MARKS = 64,          // marks that can be outstanding
    CUDA_FORM_HALF = 1,       // the one form of activations
    CUDA_ACTIVATED_UNIT = 32, // the FFN's inside may pass what a half holds: it is stored over 32
    CUDA_TICKETS = 1 << 18,   // rows times key heads of one decode attention
    CUDA_SEGMENTS = 24,       // of the ring of pinned memory, 96 MB
    CUDA_SEGMENT_BYTES = 4 << 20,
};

struct cuda_staging; // pinned memory that uploads pass through (cuda_memory.c)
struct cuda_load;    // the threads that read weights (cuda_load.c)
struct cuda_stamps;  // events with times, and what ties them to the host's clock (cuda_stamp.c)
struct cuda_gemm;    // the library's handle and pinned algorithms (cuda_gemm.cu)

struct cuda_device {
    struct device base;
    int index, sms;
    size_t shared_limit; // bytes of shared memory a block may ask for
    bool general;        // no kernels for 9.0 here, or not wanted: see "Which GPUs" in ARCHITECTURE.md
    cudaStream_t stream;
    char description[160];
    struct error fault;  // first failure since the last report, and
    uint64_t fault_mark; // the next mark when it was noted: those before it are none the worse
    struct cuda_staging *staging;
    struct cuda_load *load; // NULL before the first matrix
    struct cuda_stamps *stamps;
    struct cuda_gemm *gemm;
    void *scratch; // [device] grows while weights are packed and stages planned, never in a step
    size_t scratch_bytes;
    unsigned *tickets; // [CUDA_TICKETS] [device] zero between kernels (cuda_attention_decode.cu)
    cudaEvent_t marks[CUDA_MARKS];
    uint64_t next_mark;
    struct {
        uint32_t key;
        cudaGraphExec_t graph;
    } programs[CUDA_MAX_PROGRAMS];
    uint32_t n_programs, recording; // recording: the key, when is_recording
    bool is_recording;
};

static inline struct cuda_device *cuda_device_of(struct device *device)
{
    return (struct cuda_device *)device;
}

// Makes the device the calling thread's own: a thread starts on GPU 0.
void cuda_enter(const struct cuda_device *device);
// Notes the first failure: CUDA's `code` while doing `what`. True when there was one.
bool cuda_failed(struct cuda_device *device, cudaError_t code, const char *what);
void cuda_fault(struct cuda_device *device, int status, const char *sentence);

static inline uint32_t cuda_padded_width(uint32_t width)
{
    return (width + CUDA_K_BLOCK - 1) / CUDA_K_BLOCK * CUDA_K_BLOCK;
}

extern const struct kernel_ops cuda_ops;

// cuda_memory.c
int cuda_memory_open(struct cuda_device *device, struct error *error);
void cuda_memory_close(struct cuda_device *device);
void *cuda_alloc(struct device *device, size_t bytes);
size_t cuda_alloc_bytes(const struct device *device, size_t bytes);
void cuda_free(struct device *device, void *memory);
void cuda_upload(struct device *device, void *to, const void *from, size_t bytes);
void cuda_download(struct device *device, void *to, const void *from, size_t bytes);
void cuda_copy(struct device *device, void *to, const void *from, size_t bytes);
int cuda_sync(struct device *device, struct error *error);
void *cuda_alloc_host(struct device *device, size_t bytes);
void cuda_free_host(struct device *device, void *memory);
void cuda_fetch(struct device *device, void *to, const void *from, size_t bytes);
uint64_t cuda_mark(struct device *device);
int cuda_reached(struct device *device, uint64_t mark, struct error *error);
// `bytes` of device memory for one op at a time; NULL (and a fault) when there is none.
void *cuda_scratch(struct cuda_device *device, size_t bytes);
size_t cuda_scratch_bytes(const struct device *device, const struct scratch_shape *shape);
int cuda_reserve(struct device *device, size_t bytes, struct error *error);
// A whole segment of the pinned ring, free to be written; NULL after a fault. It is lent again when the
// copies queued before cuda_segment_used are done; until then the borrower answers cuda_load_leave_segment.
uint8_t *cuda_segment_take(struct cuda_device *device, uint32_t *segment);
void cuda_segment_used(struct cuda_device *device, uint32_t segment);

// cuda_stamp.c
int cuda_stamps_open(struct cuda_device *device, struct error *error);
void cuda_stamps_close(struct cuda_device *device);
uint64_t cuda_stamp(struct device *device);
int64_t cuda_stamp_us(struct device *device, uint64_t stamp);

// cuda_load.c
int cuda_matrix_load(struct device *device, const struct matrix *matrix, const struct matrix_source *source,
                     struct error *error);
void cuda_load_drain(struct cuda_device *device); // all that was asked for is queued on the stream
void cuda_load_leave_segment(struct cuda_device *device, uint32_t segment);
void cuda_load_close(struct cuda_device *device);

// cuda_program.c
bool cuda_replay(struct device *device, uint32_t key);
void cuda_record(struct device *device, uint32_t key);
void cuda_record_end(struct device *device);
void cuda_forget(struct device *device);

// cuda_pack.cu
size_t cuda_matrix_bytes(const struct device *device, uint32_t type, uint32_t rows, uint32_t width,
                         bool table);
int cuda_matrix_pack(struct device *device, const struct matrix *matrix, const void *source,
                     struct error *error);
unsigned cuda_matrix_forms(const struct device *device, uint32_t type);
// Rows that are packed at once, and their packing from `staged` [device], where they stand as in the file.
// `first` is a multiple of cuda_pack_group.
uint32_t cuda_pack_group(uint32_t type, uint32_t rows, uint32_t width);
void cuda_pack_rows(struct cuda_device *device, const struct matrix *matrix, const void *staged,
                    uint32_t first, uint32_t count);

// cuda_rows.cu
size_t cuda_activation_bytes(const struct device *device, uint32_t width, uint32_t rows, unsigned forms);
void cuda_feed(struct device *device, int32_t *tokens, const int32_t *sources, const int32_t *ring,
               uint32_t count);
void cuda_store(struct device *device, struct activation *out, const float *x, uint32_t rows);
void cuda_embed(struct device *device, float *x, const struct matrix *table, const struct matrix *positions,
                const struct batch *batch);
void cuda_norm(struct device *device, struct activation *out, const float *x, const uint32_t *index,
               uint32_t rows, enum norm_kind kind, const float *weight, const float *bias, float epsilon);
void cuda_ffn_activate(struct device *device, struct activation *out, const float *gate, const float *up,
                       uint32_t stride, uint32_t rows);

// cuda_matmul.cu, and its prompt rows in cuda_gemm.cu
void cuda_matmul(struct device *device, const struct activation *x, uint32_t rows,
                 const struct matmul_part *parts, uint32_t n_parts);
void cuda_project(struct device *device, struct activation *x, uint32_t rows, const struct row_norm *norm,
                  const struct matmul_part *parts, uint32_t n_parts, struct activation *gated);
void cuda_project_qkv(struct device *device, struct activation *x, const struct row_norm *norm,
                      const struct matmul_part *parts, uint32_t n_parts, const struct qkv_args *qkv,
                      const struct attention_shape *shape, const struct kv_layer *kv,
                      const struct batch *batch);
// The architecture that this GPU's kernels were compiled for: 80, 90; 0 where the build has none for it.
int cuda_kernel_architecture(void);
int cuda_gemm_open(struct cuda_device *device, struct error *error);
void cuda_gemm_close(struct cuda_device *device);
// out[t] (+)= weight x[t] + bias for the prompt rows of x, t < rows - x->n_generated.
void cuda_gemm(struct cuda_device *device, const struct activation *x, uint32_t rows,
               const struct matmul_part *part);
// Writes the weights as halves, [rows][padded width], to `out` [device].
void cuda_matrix_unpack(struct cuda_device *device, const struct matrix *matrix, void *out);

// cuda_kv.cu. kv_page_bytes is 0 for a head size that the kernels have no instance of.
size_t cuda_kv_page_bytes(const struct device *device, uint32_t n_kv_heads, uint32_t head_size);
void cuda_attn_prepare(struct device *device, const struct qkv_args *qkv, const struct attention_shape *shape,
                       const struct kv_layer *kv, const struct batch *batch);

// cuda_attention.cu. Scratch memory that `rows` generated tokens want whose page tables hold `pages` pages.
size_t cuda_attention_scratch_bytes(uint32_t n_heads, uint32_t head_size, uint32_t rows, uint32_t pages);
void cuda_attention(struct device *device, struct activation *out, const float *q, uint32_t q_stride,
                    const struct attention_shape *shape, const struct kv_layer *kv,
                    const struct batch *batch);

// cuda_sampler.cu
size_t cuda_sampler_bytes(const struct device *device, uint32_t n_slots, uint32_t vocab);
int cuda_sampler_new(struct sampler **out, struct device *device, uint32_t n_slots, uint32_t vocab,
                     struct error *error);
void cuda_sampler_free(struct device *device, struct sampler *sampler);
int cuda_sampler_open(struct device *device, struct sampler *sampler, uint32_t slot,
                      const struct sampler_open *open);
void cuda_sampler_close(struct device *device, struct sampler *sampler, uint32_t slot);
void cuda_sample(struct device *device, struct sampler *sampler, const float *logits,
                 const struct sample_row *rows, uint32_t n_rows, int32_t *out_tokens, float *out_logprobs,
                 struct token_logprob *out_tops);
void cuda_score(struct device *device, const float *logits, uint32_t vocab, const struct score_row *rows,
                uint32_t n_rows, float *out_logprobs, struct token_logprob *out_tops);

#ifdef __cplusplus
}
#endif

#endif
