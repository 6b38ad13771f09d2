// A matmul and what it should give: random weights of any type, columns to multiply them with, products in
// f64 from the types' own definitions, and what a backend may be off by.
//
// CPU, portable: one rounding of each weight and of the result. CPU, elsewhere: activations are rounded to 8
// bits, 16 of them under one scale, so that each is off by at most half a step, max / 254, and a sum by that
// times the weights; and f32 sums are off by a unit for each of their additions. Activations that are whole
// multiples of their step are not rounded at all; with those the bound is that of the sums alone.
// CUDA: activations become halves (2^-11 of each at most; whole numbers up to 127 stay), weights are exact or
// become halves too, minimums apart from the rest; sums are f32, a chain of K / 16 additions of 16 exact
// products each.
#ifndef STRATA_TESTS_MATMUL_PROBLEM_H
#define STRATA_TESTS_MATMUL_PROBLEM_H

#include "kernels/cpu/cpu_types.h"
#include "tests/ops/op_fixture.h"
#include "tests/weights.h"

struct problem {
    uint32_t type, rows, width, columns;
    bool exact;                   // see fill_column
    uint8_t *weights;             // GGUF's layout
    float *x;                     // [columns][width]
    uint32_t n_checked, *checked; // the rows that are held against f64
    double *values;               // [n_checked][width]: their weights, as define() works them out
    double *gross;                // and the magnitudes of their terms
    // On the device:
    struct matrix matrix;
    struct activation activation;
    float *x_there, *out;
};

enum { PROBLEM_GAP = 3 }; // out_stride beyond the rows

static inline size_t problem_stride(const struct problem *p)
{
    return p->rows + PROBLEM_GAP;
}

// Values, 16 by 16: random; or (exact) whole numbers times a power of two, the largest 127.
static inline void fill_column(float *x, uint32_t width, bool exact, uint64_t *random)
{
    for (uint32_t first = 0; first < width; first += 16) {
        int exponent = (int)(random_bits(random) % 5) - 4;
        uint32_t peak = (uint32_t)(random_bits(random) % 16);
        for (uint32_t i = 0; i < 16 && first + i < width; i++) {
            int whole = (int)(random_bits(random) % 255) - 127;
            x[first + i] = exact ? ldexpf((float)(i == peak ? 127 : whole), exponent)
                                 : ldexpf(random_signed(random), exponent);
        }
        if (exact && first + peak >= width)
            x[first] = ldexpf(127, exponent);
    }
}

// Works out the values of p->weights.
static inline void problem_define(struct problem *p)
{
    size_t row_bytes = tensor_type_bytes(p->type, p->width, 1), at = 0;
    for (uint32_t i = 0; i < p->n_checked; i++)
        for (uint32_t k = 0; k < p->width; k++, at++)
            p->values[at] = weights_value(p->type, p->weights + p->checked[i] * row_bytes, k, &p->gross[at]);
}

// All rows are checked where there are at most `most`; of more, the first, the last and others spread evenly.
static inline struct problem make_sampled(uint32_t type, uint32_t rows, uint32_t width, uint32_t columns,
                                          bool exact, uint32_t most, uint64_t *random)
{
    struct problem p = {.type = type, .rows = rows, .width = width, .columns = columns, .exact = exact};
    p.n_checked = rows < most ? rows : most;
    p.checked = malloc(p.n_checked * sizeof *p.checked);
    for (uint32_t i = 0; i < p.n_checked; i++)
        p.checked[i] = p.n_checked == 1 ? 0 : (uint32_t)((uint64_t)i * (rows - 1) / (p.n_checked - 1));
    p.weights = malloc(tensor_type_bytes(type, width, rows));
    p.x = malloc((size_t)columns * width * sizeof(float));
    p.values = malloc((size_t)p.n_checked * width * sizeof(double));
    p.gross = malloc((size_t)p.n_checked * width * sizeof(double));
    weights_fill(type, p.weights, width, rows, random);
    problem_define(&p);
    for (uint32_t t = 0; t < columns; t++)
        fill_column(p.x + (size_t)t * width, width, exact, random);
    return p;
}

static inline struct problem make_problem(uint32_t type, uint32_t rows, uint32_t width, uint32_t columns,
                                          bool exact, uint64_t *random)
{
    return make_sampled(type, rows, width, columns, exact, UINT32_MAX, random);
}

static inline void free_problem(struct problem *p)
{
    free(p->checked);
    free(p->weights);
    free(p->x);
    free(p->values);
    free(p->gross);
}

// Puts the weights, the columns and room for one more column of results than there are on the device.
static inline void problem_put(struct device *device, struct problem *p)
{
    const struct kernel_ops *ops = device_ops(device);
    struct error error = {0};
    p->matrix = (struct matrix){.type = p->type, .rows = p->rows, .width = p->width};
    p->matrix.bytes = ops->matrix_bytes(device, p->type, p->rows, p->width, false);
    p->matrix.data = fixture_put(device, NULL, p->matrix.bytes);
    ck_assert_msg(!ops->matrix_pack(device, &p->matrix, p->weights, &error), "%s", error.text);
    p->activation = fixture_activation(device, p->width, p->columns, ops->matrix_forms(device, p->type), 0);
    p->x_there = fixture_put(device, p->x, (size_t)p->columns * p->width * sizeof(float));
    p->out = fixture_put(device, NULL, (p->columns + 1) * problem_stride(p) * sizeof(float));
}

static inline void problem_drop(struct device *device, struct problem *p)
{
    const void *all[] = {p->matrix.data, p->activation.data, p->x_there, p->out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        fixture_drop(device, all[i]);
}

static const uint32_t PROBLEM_POISON = 0x7fc0dead; // a NaN that no arithmetic makes

// Columns [first, first + count), the first n_generated of them as generated tokens. out [count][stride]. All
// of it must have been written, and nothing else.
static inline void multiply(struct device *device, struct problem *p, uint32_t first, uint32_t count,
                            uint32_t n_generated, float *out)
{
    const struct kernel_ops *ops = device_ops(device);
    size_t stride = problem_stride(p), all = (count + 1) * stride;
    uint32_t *bits = malloc(all * sizeof *bits);
    for (size_t i = 0; i < all; i++)
        bits[i] = PROBLEM_POISON;
    ops->upload(device, p->out, bits, all * sizeof *bits);
    p->activation.n_generated = n_generated;
    ops->store(device, &p->activation, p->x_there + (size_t)first * p->width, count);
    struct matmul_part part = {&p->matrix, NULL, p->out, (uint32_t)stride, false};
    ops->matmul(device, &p->activation, count, &part, 1);
    fixture_get(device, bits, p->out, all * sizeof *bits);
    for (size_t i = 0; i < all; i++) {
        uint32_t column = (uint32_t)(i / stride), row = (uint32_t)(i % stride);
        bool ours = column < count && row < p->rows;
        if (ours == (bits[i] == PROBLEM_POISON))
            ck_abort_msg("%s %ux%u, %u columns (%u generated): row %u of column %u %s",
                         tensor_type_info(p->type)->name, p->rows, p->width, count, n_generated, row, column,
                         ours ? "was not written" : "does not exist and was written");
    }
    memcpy(out, bits, count * stride * sizeof *bits);
    free(bits);
}

struct problem_sums {
    double sum, gross, weights, x, rounding;
};

static inline double allowed_on_cpu(const struct problem *p, struct problem_sums s)
{
    bool quantized = p->activation.forms & FORM_Q8;
    // Additions of one f32 sum: for the products and the minimums, if any, one a group of weights; for floats
    // one a k; and a few for the factors.
    struct cpu_type form = cpu_type_of(p->type);
    double additions = (quantized ? p->width / form.group * (form.has_min ? 2 : 1) : p->width) + 8;
    bool rounded = quantized && !p->exact;
    return additions * 0x1p-24 * (s.gross + (rounded ? s.rounding * 2 : 0)) +
           (rounded ? s.rounding * 1.00001 : 0) + 1e-30;
}

static inline double allowed_on_cuda(const struct problem *p, struct problem_sums s)
{
    double roundings = (p->exact ? 0 : 1) + (p->type == TENSOR_F16 ? 0 : 1);
    double tiny = 0x1p-25 * (s.weights + s.x); // halves below 2^-14
    return roundings * 0x1.002p-11 * s.gross + tiny + (p->width / 16 + 16) * 0x1p-23 * s.gross + 1e-30;
}

// The product in f64 of the i-th checked row and column t, and what a kernel may be off by.
static inline double problem_reference(const struct problem *p, uint32_t i, uint32_t t, double *allowed)
{
    const double *values = p->values + (size_t)i * p->width, *gross = p->gross + (size_t)i * p->width;
    const float *x = p->x + (size_t)t * p->width;
    struct problem_sums s = {0};
    for (uint32_t first = 0; first < p->width; first += 16) {
        double most = 0, weights = 0;
        for (uint32_t k = first; k < first + 16 && k < p->width; k++) {
            double size = fabs(x[k]);
            s.sum += values[k] * x[k];
            s.gross += gross[k] * size;
            s.x += size;
            weights += fabs(values[k]);
            most = size > most ? size : most;
        }
        s.weights += weights;
        s.rounding += weights * most / 254;
    }
    *allowed = fixture_on_cuda() ? allowed_on_cuda(p, s) : allowed_on_cpu(p, s);
    return s.sum;
}

// Multiplies and holds the checked rows of columns [0, count) against f64. Returns the relative distance
// (rms) of them all.
static inline double check_columns(struct device *device, struct problem *p, uint32_t count,
                                   uint32_t n_generated)
{
    size_t stride = problem_stride(p);
    float *out = malloc(count * stride * sizeof(float));
    double error = 0, power = 0;
    multiply(device, p, 0, count, n_generated, out);
    for (uint32_t t = 0; t < count; t++) {
        for (uint32_t i = 0; i < p->n_checked; i++) {
            double allowed, expected = problem_reference(p, i, t, &allowed);
            double got = out[t * stride + p->checked[i]];
            error += (got - expected) * (got - expected);
            power += expected * expected;
            if (!(fabs(got - expected) <= allowed))
                ck_abort_msg(
                    "%s %s %ux%u, column %u of %u (%u generated), row %u: %.9g, expected %.9g within %.3g",
                    device_describe(device), tensor_type_info(p->type)->name, p->rows, p->width, t, count,
                    n_generated, p->checked[i], got, expected, allowed);
        }
    }
    free(out);
    return power > 0 ? sqrt(error / power) : 0;
}

static inline void check_problem(struct device *device, struct problem *p, uint32_t n_generated)
{
    problem_put(device, p);
    check_columns(device, p, p->columns, n_generated);
    problem_drop(device, p);
}

#endif
