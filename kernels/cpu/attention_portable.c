// Attention's inner loops in plain C, with sums in f64: what the other levels are checked against. Pure
// functions; any thread.
#include "kernels/cpu/attention_internal.h"

// One row only: a sum is rounded to f32 once a page, so it must not be cut where a neighbour's range ends.
static void multiply(float *const *out, const float *const *a, uint32_t rows, const void *b, bool wide,
                     uint32_t columns, uint32_t first, uint32_t end, bool accumulate)
{
    const uint16_t *halves = b;
    for (uint32_t column = 0; column < columns; column += KV_LANES) {
        double sum[KV_LANES];
        for (uint32_t i = 0; i < KV_LANES; i++)
            sum[i] = accumulate ? out[0][column + i] : 0;
        for (uint32_t k = first; k < end; k++)
            for (uint32_t i = 0; i < KV_LANES; i++)
                sum[i] += (double)a[0][k] * cpu_f16_to_f32(halves[(size_t)k * columns + column + i]);
        for (uint32_t i = 0; i < KV_LANES; i++)
            out[0][column + i] = (float)sum[i];
    }
}

// e^x for x <= 0 in f64, from multiplications and additions alone so that every machine agrees:
// x = n ln 2 + r, and the series of e^r for |r| <= ln 2 / 2.
static double exp_of(double x)
{
    if (x != x || x < -87)
        return x != x ? x : 0;
    double n = (x * 0x1.71547652b82fep0 + 0x1.8p52) - 0x1.8p52;
    double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    double term = 1, sum = 1;
    for (int i = 1; i < 14; i++) {
        term *= r / i;
        sum += term;
    }
    return ldexp(sum, (int)n);
}

static void soften(float *scores, float *state, uint32_t padded, float scale, uint32_t first, uint32_t end)
{
    float *extra = state + padded, max = extra[STATE_MAX];
    for (uint32_t i = first; i < end; i++) {
        scores[i] *= scale;
        max = scores[i] > max ? scores[i] : max;
    }
    double sum = 0, fit = exp_of((double)extra[STATE_MAX] - max);
    for (uint32_t i = first; i < end; i++) {
        scores[i] = (float)exp_of((double)scores[i] - max);
        sum += scores[i];
    }
    for (uint32_t i = 0; i < padded; i++)
        state[i] = (float)(state[i] * fit);
    extra[STATE_MAX] = max;
    extra[STATE_SUM] = (float)(extra[STATE_SUM] * fit + sum);
}

static void merge(float *total, const float *part, uint32_t padded)
{
    float *total_extra = total + padded;
    const float *part_extra = part + padded;
    float max =
        part_extra[STATE_MAX] > total_extra[STATE_MAX] ? part_extra[STATE_MAX] : total_extra[STATE_MAX];
    double fit = exp_of((double)total_extra[STATE_MAX] - max),
           part_fit = exp_of((double)part_extra[STATE_MAX] - max);
    for (uint32_t i = 0; i < padded; i++)
        total[i] = (float)(total[i] * fit + part[i] * part_fit);
    total_extra[STATE_SUM] = (float)(total_extra[STATE_SUM] * fit + part_extra[STATE_SUM] * part_fit);
    total_extra[STATE_MAX] = max;
}

// Adding zero makes one zero of the two.
static void finish(float *out, const float *state, uint32_t padded)
{
    for (uint32_t i = 0; i < padded; i++)
        out[i] = state[i] / state[padded + STATE_SUM] + 0.0f;
}

const struct attention_kernels attention_portable = {
    .most_rows = 1, .multiply = multiply, .soften = soften, .merge = merge, .finish = finish};
