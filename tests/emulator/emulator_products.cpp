// What the tensor cores compute, and cuBLASLt: products of halves. Sixteen products are added exactly (in
// f64), then to the sum, and rounded once; a real tensor core cuts off more, in an order of its own.
#include <stdlib.h>
#include <vector>

#include "tests/emulator/cublasLt.h"
#include "tests/emulator/instructions.h"

// --- halves ---

static const float *make_half_values()
{
    static float values[65536];
    for (unsigned bits = 0; bits < 65536; bits++) {
        unsigned short low = (unsigned short)bits;
        _Float16 half;
        memcpy(&half, &low, sizeof(half));
        values[bits] = (float)half;
    }
    return values;
}

const float *const emulated_half_values = make_half_values();

// --- products of a warp ---

enum { DEPTH = 16, ROWS = 16 };

// A of 16 x 16 from the lanes' words: lane 4 g + t has rows g and g + 8, columns 2 t, 2 t + 1, 2 t + 8, 2 t
// + 9.
static void place_a(double (*a)[DEPTH], unsigned lane, const unsigned *words)
{
    unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 8; i++)
        a[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = emulated_half_of(words[i / 2], (int)i % 2);
}

// sums = A B, of 16 rows and eight columns; B as [k][column].
static void multiply(const double (*a)[DEPTH], const double (*b)[8], double (*sums)[8])
{
    for (int row = 0; row < ROWS; row++) {
        for (int n = 0; n < 8; n++)
            sums[row][n] = 0;
        for (int k = 0; k < DEPTH; k++) {
            for (int n = 0; n < 8; n++)
                sums[row][n] += a[row][k] * b[k][n];
        }
    }
}

// Of eight columns lane 4 g + t has rows g and g + 8 of columns 2 t and 2 t + 1.
static void add_sums(const double (*sums)[8], unsigned lane, float *c, bool fresh)
{
    for (unsigned i = 0; i < 4; i++)
        c[i] = (float)((fresh ? 0 : c[i]) + sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2]);
}

static void want_whole_warp(void **lanes)
{
    for (int lane = 0; lane < EMULATED_WARP; lane++) {
        if (!lanes[lane])
            emulated_misuse("a product of a warp that has not all of its threads");
    }
}

void emulated_mma_of_warp(void **lanes)
{
    double a[ROWS][DEPTH], b[DEPTH][8], sums[ROWS][8];
    want_whole_warp(lanes);
    for (unsigned lane = 0; lane < EMULATED_WARP; lane++) {
        const struct emulated_mma *mine = (const struct emulated_mma *)lanes[lane];
        place_a(a, lane, mine->a);
        for (unsigned i = 0; i < 4; i++)
            b[2 * (lane % 4) + i / 2 * 8 + i % 2][lane / 4] = emulated_half_of(mine->b[i / 2], (int)i % 2);
    }
    multiply(a, b, sums);
    for (unsigned lane = 0; lane < EMULATED_WARP; lane++)
        add_sums(sums, lane, ((struct emulated_mma *)lanes[lane])->c, false);
}

// Columns [8 eight, + 8) of B, as the descriptor says: groups of eight rows (one a column), a row's units of
// 16 bytes swapped by the bits of the address that tell the row.
static void read_b(uint64_t descriptor, unsigned eight, double (*b)[8])
{
    unsigned start = (unsigned)(descriptor & 0x3FFF) << 4, stride = (unsigned)(descriptor >> 32 & 0x3FFF)
                                                                    << 4;
    bool wide = descriptor >> 62 == WGMMA_SWIZZLE_128;
    for (unsigned i = 0; i < 8 * DEPTH / 8; i++) { // units of eight halves
        unsigned n = i / 2, k = i % 2 * 8;
        unsigned address = start + eight * stride + n * (wide ? 128 : 64) + 2 * k;
        unsigned short unit[8];
        address ^= wide ? (address >> 7 & 7) << 4 : (address >> 7 & 3) << 4;
        memcpy(unit, emulated_shared_pointer(address), sizeof(unit));
        for (unsigned j = 0; j < 8; j++)
            b[k + j][n] = emulated_half_values[unit[j]];
    }
}

void emulated_wgmma_of_warp(void **lanes)
{
    double a[ROWS][DEPTH], b[DEPTH][8], sums[ROWS][8];
    emulated_want_90();
    want_whole_warp(lanes);
    for (unsigned lane = 0; lane < EMULATED_WARP; lane++)
        place_a(a, lane, ((struct emulated_wgmma *)lanes[lane])->a);
    const struct emulated_wgmma *one = (const struct emulated_wgmma *)lanes[0];
    for (unsigned eight = 0; eight < (unsigned)one->eights; eight++) {
        read_b(one->b, eight, b);
        multiply(a, b, sums);
        for (unsigned lane = 0; lane < EMULATED_WARP; lane++)
            add_sums(sums, lane, ((struct emulated_wgmma *)lanes[lane])->sums[eight], one->fresh);
    }
}

// --- cuBLASLt ---

struct emulated_layout {
    uint64_t rows, columns;
    int64_t stride;
};

template <typename Handle> static cublasStatus_t make(Handle *handle)
{
    *handle = (Handle)calloc(1, sizeof(struct emulated_layout));
    return *handle ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    return make(handle);
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
    return status == CUBLAS_STATUS_SUCCESS ? "success" : "an emulated product failed";
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *product, cublasComputeType_t, cudaDataType_t)
{
    return make(product);
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product)
{
    free(product);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t,
                                              const void *, size_t)
{
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType_t, uint64_t rows,
                                          uint64_t columns, int64_t stride)
{
    cublasStatus_t status = make(layout);
    if (status == CUBLAS_STATUS_SUCCESS)
        **layout = {rows, columns, stride};
    return status;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *wish)
{
    return make(wish);
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t wish)
{
    free(wish);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t, const void *,
                                                    size_t)
{
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int most,
                                              cublasLtMatmulHeuristicResult_t *results, int *count)
{
    results[0] = {};
    *count = most > 0;
    return CUBLAS_STATUS_SUCCESS;
}

// out[column][row] of one row of the weights, for all columns.
static void multiply_row(const float *weights, const struct emulated_layout &b, const unsigned short *x,
                         float alpha, float beta, float *out, int64_t stride)
{
    for (uint64_t column = 0; column < b.columns; column++) {
        const unsigned short *from = x + (int64_t)column * b.stride;
        float sum = 0, *to = out + (int64_t)column * stride;
        for (uint64_t k = 0; k < b.rows; k++)
            sum += weights[k] * emulated_half_values[from[k]];
        *to = alpha * sum + (beta != 0 ? beta * *to : 0);
    }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *, cublasLtMatrixLayout_t, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *, void *, size_t,
                              cudaStream_t stream)
{
    struct emulated_layout of_a = *a_layout, of_b = *b_layout, of_d = *d_layout;
    float by = *(const float *)alpha, keep = *(const float *)beta;
    if (of_a.rows != of_b.rows || of_a.columns != of_d.rows || of_b.columns != of_d.columns)
        return CUBLAS_STATUS_INVALID_VALUE;
    auto work = [=] {
        std::vector<float> weights(of_a.rows);
        for (uint64_t row = 0; row < of_a.columns; row++) {
            for (uint64_t k = 0; k < of_a.rows; k++)
                weights[k] = emulated_half_values[((const unsigned short *)a)[row * of_a.stride + k]];
            multiply_row(weights.data(), of_b, (const unsigned short *)b, by, keep, (float *)d + row,
                         of_d.stride);
        }
    };
    return emulated_queue(stream, work) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
