// Products with the rows of prompts: weights unpacked to halves, then cuBLASLt with f32 sums. Unpacking costs
// a write and a read of two bytes a weight, which many rows share.
//
// The library's algorithms are pinned: the heuristic is asked once for a shape of weights, for a fixed number
// of rows and without split sums, and its answer is used for any number of rows, so that a row's bits do not
// depend on the length of its chunk. Queued by the executor's thread, which owns the handle.
#include <cublasLt.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda_record.cuh"

enum { PINNED = 256, PINNED_ROWS = 512 };

struct gemm_shape {
    uint32_t n, k, stride;
    bool accumulate, aligned;
};

struct cuda_gemm {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t
        product; // out = W^T x, all column-major: the library's way to see row-major operands
    struct {
        struct gemm_shape shape;
        cublasLtMatmulAlgo_t algorithm;
    } pinned[PINNED];
    uint32_t n_pinned;
};

static bool gemm_failed(struct cuda_device *device, cublasStatus_t code, const char *what)
{
    if (code == CUBLAS_STATUS_SUCCESS)
        return false;
    char sentence[200];
    snprintf(sentence, sizeof(sentence), "GPU %d failed (%s): %s", device->index, what,
             cublasLtGetStatusString(code));
    cuda_fault(device, STATUS_INTERNAL, sentence);
    return true;
}

extern "C" int cuda_gemm_open(struct cuda_device *device, struct error *error)
{
    struct cuda_gemm *gemm = (struct cuda_gemm *)calloc(1, sizeof(*gemm));
    if (!gemm)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a CUDA device");
    device->gemm = gemm;
    cublasOperation_t transposed = CUBLAS_OP_T;
    cublasStatus_t code = cublasLtCreate(&gemm->handle);
    if (code == CUBLAS_STATUS_SUCCESS)
        code = cublasLtMatmulDescCreate(&gemm->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (code == CUBLAS_STATUS_SUCCESS)
        code = cublasLtMatmulDescSetAttribute(gemm->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                              sizeof(transposed));
    if (code != CUBLAS_STATUS_SUCCESS)
        return error_set(error, STATUS_UNSUPPORTED, "GPU %d: cuBLASLt cannot be used: %s", device->index,
                         cublasLtGetStatusString(code));
    return STATUS_OK;
}

extern "C" void cuda_gemm_close(struct cuda_device *device)
{
    struct cuda_gemm *gemm = device->gemm;
    if (!gemm)
        return;
    if (gemm->product)
        cublasLtMatmulDescDestroy(gemm->product);
    if (gemm->handle)
        cublasLtDestroy(gemm->handle);
    free(gemm);
    device->gemm = NULL;
}

struct gemm_layouts {
    cublasLtMatrixLayout_t weights, x, out;
};

static bool make_layouts(struct cuda_device *device, const struct gemm_shape *shape, uint32_t rows,
                         struct gemm_layouts *out)
{
    return !gemm_failed(device,
                        cublasLtMatrixLayoutCreate(&out->weights, CUDA_R_16F, shape->k, shape->n, shape->k),
                        "describing a product") &&
           !gemm_failed(device, cublasLtMatrixLayoutCreate(&out->x, CUDA_R_16F, shape->k, rows, shape->k),
                        "describing a product") &&
           !gemm_failed(device,
                        cublasLtMatrixLayoutCreate(&out->out, CUDA_R_32F, shape->n, rows, shape->stride),
                        "describing a product");
}

static void drop_layouts(struct gemm_layouts *layouts)
{
    if (layouts->weights)
        cublasLtMatrixLayoutDestroy(layouts->weights);
    if (layouts->x)
        cublasLtMatrixLayoutDestroy(layouts->x);
    if (layouts->out)
        cublasLtMatrixLayoutDestroy(layouts->out);
}

static bool ask_heuristic(struct cuda_device *device, const struct gemm_shape *shape,
                          cublasLtMatmulAlgo_t *out)
{
    struct cuda_gemm *gemm = device->gemm;
    struct gemm_layouts layouts = {};
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found = {};
    uint32_t unsplit = CUBLASLT_REDUCTION_SCHEME_NONE, alignment = shape->aligned ? 16 : 4;
    size_t workspace = 0;
    int count = 0;
    bool made = make_layouts(device, shape, PINNED_ROWS, &layouts) &&
                !gemm_failed(device, cublasLtMatmulPreferenceCreate(&wish), "describing a product");
    if (made) {
        cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &unsplit,
                                             sizeof(unsplit));
        cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                             sizeof(workspace));
        cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment,
                                             sizeof(alignment));
        cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment,
                                             sizeof(alignment));
        made = !gemm_failed(device,
                            cublasLtMatmulAlgoGetHeuristic(gemm->handle, gemm->product, layouts.weights,
                                                           layouts.x, layouts.out, layouts.out, wish, 1,
                                                           &found, &count),
                            "choosing a product's algorithm");
        if (made && count == 0)
            made = !gemm_failed(device, CUBLAS_STATUS_NOT_SUPPORTED, "choosing a product's algorithm");
        cublasLtMatmulPreferenceDestroy(wish);
    }
    drop_layouts(&layouts);
    *out = found.algo;
    return made;
}

static const cublasLtMatmulAlgo_t *pinned_algorithm(struct cuda_device *device,
                                                    const struct gemm_shape *shape)
{
    struct cuda_gemm *gemm = device->gemm;
    for (uint32_t i = 0; i < gemm->n_pinned; i++) {
        const struct gemm_shape *known = &gemm->pinned[i].shape;
        if (known->n == shape->n && known->k == shape->k && known->stride == shape->stride &&
            known->accumulate == shape->accumulate && known->aligned == shape->aligned)
            return &gemm->pinned[i].algorithm;
    }
    if (gemm->n_pinned == PINNED)
        gemm->n_pinned = 0; // more shapes than any model has
    if (!ask_heuristic(device, shape, &gemm->pinned[gemm->n_pinned].algorithm))
        return NULL;
    gemm->pinned[gemm->n_pinned].shape = *shape;
    return &gemm->pinned[gemm->n_pinned++].algorithm;
}

__global__ void add_bias_kernel(float *out, uint32_t stride, const float *bias, uint32_t n)
{
    cuda_wait();
    cuda_release();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[(size_t)blockIdx.y * stride + i] += bias[i];
}

extern "C" void cuda_gemm(struct cuda_device *device, const struct activation *x, uint32_t rows,
                          const struct matmul_part *part)
{
    struct activation_view view = activation_view_of(x);
    uint32_t generated = x->n_generated < rows ? x->n_generated : rows, count = rows - generated;
    float *out = part->out + (size_t)generated * part->out_stride;
    struct gemm_shape shape = {part->weight->rows, view.k_blocks * CUDA_K_BLOCK, part->out_stride,
                               part->accumulate, part->out_stride % 4 == 0 && (uintptr_t)part->out % 16 == 0};
    void *weights = cuda_scratch(device, (size_t)shape.n * shape.k * sizeof(__half));
    const cublasLtMatmulAlgo_t *algorithm = weights ? pinned_algorithm(device, &shape) : NULL;
    struct gemm_layouts layouts = {};
    float alpha = x->unit == 0 ? 1 : x->unit, beta = part->accumulate ? 1 : 0;
    if (!algorithm)
        return;
    cuda_matrix_unpack(device, part->weight, weights);
    if (make_layouts(device, &shape, count, &layouts))
        gemm_failed(device,
                    cublasLtMatmul(device->gemm->handle, device->gemm->product, &alpha, weights,
                                   layouts.weights, view.rows, layouts.x, &beta, out, layouts.out, out,
                                   layouts.out, algorithm, NULL, 0, device->stream),
                    "multiplying");
    drop_layouts(&layouts);
    for (uint32_t first = 0; part->bias && first < count; first += 65535) {
        uint32_t some = count - first < 65535 ? count - first : 65535;
        cuda_launch(device, "adding a bias", add_bias_kernel, dim3((shape.n + 255) / 256, some), 256, 0,
                    out + (size_t)first * shape.stride, shape.stride, part->bias, shape.n);
    }
}
