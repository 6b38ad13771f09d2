// Passes over one row of logits, 16 lanes wide (the compilers' vector extension): vocab_scan_portable.c,
// _avx2.c and _avx512.c each compile this text for their level and export one struct. Multiplies and adds are
// not contracted, and the order of every sum is fixed by the element's index, so all levels give the same
// bits.
//
// NaN counts as -infinity, +infinity as the largest float. Pure functions; any thread.
#ifndef STRATA_VOCAB_SCAN_INTERNAL_H
#define STRATA_VOCAB_SCAN_INTERNAL_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { VOCAB_LANES = 16, VOCAB_BLOCK = 256 };

struct vocab_scan {
    // The lowest index of the largest element; 0 when all are -infinity.
    uint32_t (*argmax)(const float *x, uint32_t n);
    // The largest element; -INFINITY when there is none.
    float (*max)(const float *x, uint32_t n);
    // Sum of exp(x - max), for a log-softmax.
    double (*exp_sum)(const float *x, uint32_t n, float max);
    // offsets[i] = (x[i] - max) * inverse_temperature <= 0, weights[i] = exp(offsets[i]); of each block of
    // VOCAB_BLOCK the sum of weights and the largest offset. Both arrays are padded to whole blocks.
    void (*weigh)(const float *x, uint32_t n, float max, float inverse_temperature, float *offsets,
                  float *weights, double *block_sums, float *block_tops);
    // How many offsets are >= least, and in *mass the sum of their weights; arrays and `tops` as from weigh.
    uint32_t (*above)(const float *offsets, const float *weights, uint32_t n, const float *block_tops,
                      float least, double *mass);
    // The indices of the elements >= least, ascending; `tops` as from weigh. Returns how many.
    uint32_t (*gather)(const float *offsets, uint32_t n, const float *block_tops, float least, int32_t *ids);
    // The `count` largest finite elements with their indices, largest first, equal ones by index. Returns how
    // many there are.
    uint32_t (*top)(const float *x, uint32_t n, uint32_t count, int32_t *ids, float *values);
};

extern const struct vocab_scan vocab_scan_portable, vocab_scan_avx2, vocab_scan_avx512;

#ifdef VOCAB_SCAN_LEVEL // the rest is for the three files that define it

// The 16 lanes are as many vectors as the level needs for them.
#if defined(__AVX512F__)
enum { SCAN_WIDTH = 16, SCAN_VECTORS = VOCAB_LANES / SCAN_WIDTH };
#elif defined(__AVX2__)
enum { SCAN_WIDTH = 8, SCAN_VECTORS = VOCAB_LANES / SCAN_WIDTH };
#else
enum { SCAN_WIDTH = 4, SCAN_VECTORS = VOCAB_LANES / SCAN_WIDTH };
#endif
typedef float scan_floats __attribute__((vector_size(4 * SCAN_WIDTH)));
typedef int32_t scan_ints __attribute__((vector_size(4 * SCAN_WIDTH)));
#define SCAN_INLINE static inline __attribute__((always_inline))

SCAN_INLINE void scan_load(scan_floats *to, const float *from)
{
    memcpy(to, from, sizeof *to); // unaligned
}

// *x where the mask is set, else other.
SCAN_INLINE void scan_select(scan_floats *x, const scan_ints *mask, const scan_floats *other)
{
    *x = (scan_floats)(((scan_ints)*x & *mask) | ((scan_ints)*other & ~*mask));
}

SCAN_INLINE void scan_larger(scan_floats *best, const scan_floats *x)
{
    scan_ints keep = ~(*x > *best); // a NaN is never larger
    scan_select(best, &keep, x);
}

SCAN_INLINE void scan_clean(scan_floats *x)
{
    scan_floats largest = (scan_floats){0} + FLT_MAX, least = (scan_floats){0} - INFINITY;
    scan_ints finite = ~(*x > largest), number = *x == *x;
    scan_select(x, &finite, &largest);
    scan_select(x, &number, &least);
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below exp(-87), about the smallest normal number.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e^r fitted for the least relative error.
SCAN_INLINE void scan_exp(scan_floats *y, const scan_floats *x)
{
    scan_floats least = (scan_floats){0} - 87.0f, zero = {0}, bounded = *x;
    scan_ints inside = *x >= least;
    scan_select(&bounded, &inside, &least);
    scan_floats n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f; // to the nearest integer
    scan_floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;   // ln 2 in two parts
    scan_floats p = r * 0.00138145395f + 0.00836874545f;
    p = p * r + 0.0416683890f;
    p = p * r + 0.166665211f;
    p = p * r + 0.49999994f;
    p = (p * (r * r) + r) + 1.0f;
    scan_ints power = (__builtin_convertvector(n, scan_ints) + 127) << 23;
    *y = p * (scan_floats)power;
    scan_select(y, &inside, &zero);
}

// The block at x, of `left` elements at least 1: a whole block is read in place, the last one is padded.
static inline const float *scan_block(const float *x, uint32_t left, float *padded)
{
    if (left >= VOCAB_BLOCK)
        return x;
    memcpy(padded, x, left * sizeof(float));
    for (uint32_t i = left; i < VOCAB_BLOCK; i++)
        padded[i] = -INFINITY;
    return padded;
}

static inline float scan_block_max(const float *x)
{
    scan_floats best[4], next;
    for (int i = 0; i < 4; i++)
        best[i] = (scan_floats){0} - INFINITY;
    for (int at = 0; at < VOCAB_BLOCK; at += 4 * SCAN_WIDTH)
        for (int i = 0; i < 4; i++) {
            scan_load(&next, x + at + i * SCAN_WIDTH);
            scan_larger(&best[i], &next);
        }
    scan_larger(&best[0], &best[1]);
    scan_larger(&best[2], &best[3]);
    scan_larger(&best[0], &best[2]);
    float top = best[0][0];
    for (int i = 1; i < SCAN_WIDTH; i++)
        top = best[0][i] > top ? best[0][i] : top;
    return top;
}

static uint32_t scan_argmax(const float *x, uint32_t n)
{
    float best = -INFINITY, padded[VOCAB_BLOCK];
    uint32_t best_block = 0;
    for (uint32_t first = 0; first < n; first += VOCAB_BLOCK) {
        float top = scan_block_max(scan_block(x + first, n - first, padded));
        if (top > best) {
            best = top;
            best_block = first;
        }
    }
    if (best == -INFINITY)
        return 0;
    while (x[best_block] != best)
        best_block++;
    return best_block;
}

static float scan_max(const float *x, uint32_t n)
{
    float best = -INFINITY, padded[VOCAB_BLOCK];
    for (uint32_t first = 0; first < n; first += VOCAB_BLOCK) {
        float top = scan_block_max(scan_block(x + first, n - first, padded));
        best = top > best ? top : best;
    }
    return best > FLT_MAX ? FLT_MAX : best;
}

SCAN_INLINE double scan_lane_sum(const scan_floats *lanes)
{
    double sum = 0;
    for (int i = 0; i < VOCAB_LANES; i++)
        sum += lanes[i / SCAN_WIDTH][i % SCAN_WIDTH];
    return sum;
}

static double scan_exp_sum(const float *x, uint32_t n, float max)
{
    double sum = 0;
    float padded[VOCAB_BLOCK];
    for (uint32_t first = 0; first < n; first += VOCAB_BLOCK) {
        const float *block = scan_block(x + first, n - first, padded);
        scan_floats lanes[SCAN_VECTORS] = {0}, value, weight;
        for (int at = 0; at < VOCAB_BLOCK; at += SCAN_WIDTH) {
            scan_load(&value, block + at);
            scan_clean(&value);
            value -= max;
            scan_exp(&weight, &value);
            lanes[at / SCAN_WIDTH % SCAN_VECTORS] += weight;
        }
        sum += scan_lane_sum(lanes);
    }
    return sum;
}

static void scan_weigh(const float *x, uint32_t n, float max, float inverse_temperature, float *offsets,
                       float *weights, double *block_sums, float *block_tops)
{
    float padded[VOCAB_BLOCK];
    for (uint32_t first = 0; first < n; first += VOCAB_BLOCK) {
        const float *block = scan_block(x + first, n - first, padded);
        scan_floats lanes[SCAN_VECTORS] = {0}, value, weight;
        for (int at = 0; at < VOCAB_BLOCK; at += SCAN_WIDTH) {
            scan_load(&value, block + at);
            scan_clean(&value);
            value = (value - max) * inverse_temperature;
            scan_exp(&weight, &value);
            lanes[at / SCAN_WIDTH % SCAN_VECTORS] += weight;
            memcpy(offsets + first + at, &value, sizeof value);
            memcpy(weights + first + at, &weight, sizeof weight);
        }
        block_sums[first / VOCAB_BLOCK] = scan_lane_sum(lanes);
        block_tops[first / VOCAB_BLOCK] = scan_block_max(offsets + first);
    }
}

// The padding has weight 0 and an offset of -infinity, which no `least` of ours reaches.
static uint32_t scan_above(const float *offsets, const float *weights, uint32_t n, const float *block_tops,
                           float least, double *mass)
{
    uint32_t count = 0;
    *mass = 0;
    for (uint32_t first = 0; first < n; first += VOCAB_BLOCK) {
        if (!(block_tops[first / VOCAB_BLOCK] >= least))
            continue;
        scan_floats lanes[SCAN_VECTORS] = {0}, offset, weight, zero = {0};
        scan_ints counts = {0};
        for (int at = 0; at < VOCAB_BLOCK; at += SCAN_WIDTH) {
            scan_load(&offset, offsets + first + at);
            scan_load(&weight, weights + first + at);
            scan_ints over = offset >= least; // -1 where true
            scan_select(&weight, &over, &zero);
            lanes[at / SCAN_WIDTH % SCAN_VECTORS] += weight;
            counts -= over;
        }
        *mass += scan_lane_sum(lanes);
        for (int i = 0; i < SCAN_WIDTH; i++)
            count += (uint32_t)counts[i];
    }
    return count;
}

static uint32_t scan_gather(const float *offsets, uint32_t n, const float *block_tops, float least,
                            int32_t *ids)
{
    uint32_t count = 0;
    for (uint32_t first = 0; first < n; first += VOCAB_BLOCK) {
        if (!(block_tops[first / VOCAB_BLOCK] >= least))
            continue;
        uint32_t end = n - first < VOCAB_BLOCK ? n : first + VOCAB_BLOCK;
        for (uint32_t i = first; i < end; i++) { // without a branch: written anyway, kept or not
            ids[count] = (int32_t)i;
            count += offsets[i] >= least;
        }
    }
    return count;
}

static uint32_t scan_top(const float *x, uint32_t n, uint32_t count, int32_t *ids, float *values)
{
    uint32_t have = 0;
    float padded[VOCAB_BLOCK];
    for (uint32_t first = 0; count && first < n; first += VOCAB_BLOCK) {
        float worst = have == count ? values[count - 1] : -INFINITY;
        const float *block = scan_block(x + first, n - first, padded);
        if (!(scan_block_max(block) > worst))
            continue;
        for (uint32_t i = 0; i < VOCAB_BLOCK; i++) {
            if (!(block[i] > (have == count ? values[count - 1] : -INFINITY)))
                continue;
            uint32_t at = have < count ? have++ : count - 1;
            for (; at > 0 && values[at - 1] < block[i]; at--) {
                values[at] = values[at - 1];
                ids[at] = ids[at - 1];
            }
            values[at] = block[i];
            ids[at] = (int32_t)(first + i);
        }
    }
    return have;
}

const struct vocab_scan VOCAB_SCAN_LEVEL = {.argmax = scan_argmax,
                                            .max = scan_max,
                                            .exp_sum = scan_exp_sum,
                                            .weigh = scan_weigh,
                                            .above = scan_above,
                                            .gather = scan_gather,
                                            .top = scan_top};

#endif
#endif
