// What the tests of ops share: devices of the backend under test at every level of this machine, memory on
// them, activations read back, and fresh random inputs whose seed is printed (STRATA_TEST_SEED repeats a
// run). STRATA_TEST_BACKEND names the backend, "cpu" or "cuda"; unset means cpu.
#ifndef STRATA_TESTS_OP_FIXTURE_H
#define STRATA_TESTS_OP_FIXTURE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cpu/cpu_internal.h"
#include "kernels/kernels.h"
#include "tests/suite.h"

static uint64_t fixture_state;

// Call first in every test: tests run in processes of their own.
static inline void fixture_seed(const char *test)
{
    const char *given = getenv("STRATA_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t)now.tv_nsec * 1000003 + (uint64_t)now.tv_sec;
    printf("%s: STRATA_TEST_SEED=%llu\n", test, (unsigned long long)seed);
    fflush(stdout);
    fixture_state = seed;
}

static inline uint64_t fixture_next(uint64_t *state) // splitmix64
{
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static inline uint32_t fixture_below(uint32_t n)
{
    return (uint32_t)(fixture_next(&fixture_state) % n);
}

static inline double fixture_uniform(void)
{
    return (double)(fixture_next(&fixture_state) >> 11) * 0x1p-53;
}

static inline float fixture_normal(void)
{
    return (float)(sqrt(-2 * log(1 - fixture_uniform())) * cos(6.283185307179586 * fixture_uniform()));
}

static inline void fixture_normals(float *out, size_t count, float scale)
{
    for (size_t i = 0; i < count; i++)
        out[i] = scale * fixture_normal();
}

static inline const char *fixture_backend(void)
{
    const char *backend = getenv("STRATA_TEST_BACKEND");
    return backend && *backend ? backend : "cpu";
}

static inline bool fixture_on_cuda(void)
{
    return !strcmp(fixture_backend(), "cuda");
}

// An instrumented or supervised build: tests take a sample of their cases.
static inline bool fixture_is_slow(void)
{
    return getenv("STRATA_TEST_SLOW") != NULL;
}

// The levels of the backend under test: the CPU's three (of which this machine may lack some), CUDA's one.
static inline int fixture_levels(void)
{
    return fixture_on_cuda() ? 1 : 3;
}

static inline uint32_t fixture_level(int index)
{
    static const uint32_t LEVELS[] = {LEVEL_PORTABLE, LEVEL_AVX2, LEVEL_AVX512};
    return fixture_on_cuda() ? LEVEL_CUDA : LEVELS[index];
}

static inline uint32_t fixture_best_level(void)
{
    return device_best_level(fixture_backend(), 0);
}

static inline bool fixture_lacks(uint32_t level)
{
    return level > fixture_best_level();
}

static inline struct device *fixture_open(uint32_t level, uint32_t threads)
{
    struct device_options options = {.backend = fixture_backend(), .threads = threads, .level = level};
    struct device *device;
    struct error error = {0};
    ck_assert_msg(device_open(&device, &options, &error) == 0, "%s", error.text);
    ck_assert_uint_eq(device_level(device), level);
    return device;
}

// Devices of the CUDA backend that are opened between these two take the general path. Returns what end
// wants.
static inline bool fixture_general_begin(void)
{
    bool was = getenv("STRATA_CUDA_GENERAL") != NULL;
    setenv("STRATA_CUDA_GENERAL", "1", !was);
    return was;
}

static inline void fixture_general_end(bool was)
{
    if (!was)
        unsetenv("STRATA_CUDA_GENERAL");
}

static inline void fixture_close(struct device *device)
{
    struct error error = {0};
    ck_assert_msg(device_ops(device)->sync(device, &error) == 0, "%s", error.text);
    device_close(device);
}

// `bytes` of device memory with a copy of `from` (zeros for NULL).
static inline void *fixture_put(struct device *device, const void *from, size_t bytes)
{
    void *to = device_ops(device)->alloc(device, bytes ? bytes : 1);
    ck_assert_ptr_nonnull(to);
    if (from && bytes)
        device_ops(device)->upload(device, to, from, bytes);
    return to;
}

static inline void fixture_get(struct device *device, void *to, const void *from, size_t bytes)
{
    device_ops(device)->download(device, to, from, bytes);
}

static inline void fixture_drop(struct device *device, const void *memory)
{
    device_ops(device)->free(device, (void *)memory);
}

// --- activations ---

// Room for `rows` rows, of which the first n_generated are of generated tokens.
static inline struct activation fixture_activation(struct device *device, uint32_t width, uint32_t rows,
                                                   unsigned forms, uint32_t n_generated)
{
    struct activation made = {.width = width, .rows = rows, .forms = forms, .n_generated = n_generated};
    made.data = fixture_put(device, NULL, device_ops(device)->activation_bytes(device, width, rows, forms));
    return made;
}

// The value of a half; neither infinity nor NaN is ever stored.
static inline float fixture_half_value(uint16_t half)
{
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    ck_assert_int_ne(exponent, 31);
    double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return (float)(half & 0x8000 ? -size : size);
}

// CUDA's layout, as kernels/cuda/cuda_kernel.cuh describes it.
enum { FIXTURE_BLOCK = 256, FIXTURE_GROUP = 64, FIXTURE_RECORD = 576, FIXTURE_FEW = 16 };

// The sums that a record keeps, over 64 and in two halves each, must be those of its halves, 16 by 16; a
// prompt's row keeps none.
static inline void fixture_check_sums(const unsigned char *record, const float *values)
{
    for (int i = 0; i < FIXTURE_BLOCK / 16; i++) {
        double sum = 0, gross = 0;
        uint16_t parts[2];
        for (int j = 0; j < 16; j++) {
            sum += values[16 * i + j];
            gross += fabs(values[16 * i + j]);
        }
        size_t at = 2 * FIXTURE_BLOCK + 2 * (i % 8 / 2 * 8 + i / 8 * 2 + i % 2);
        memcpy(&parts[0], record + at, 2);
        memcpy(&parts[1], record + at + 8, 2);
        double kept = 64.0 * ((double)fixture_half_value(parts[0]) + (double)fixture_half_value(parts[1]));
        if (fabs(kept - sum) > 0x1p-20 * gross + 0x1p-18)
            ck_abort_msg("the sum of elements %d to %d is %.9g, not %.9g", 16 * i, 16 * i + 15, kept, sum);
    }
}

// The record of a row out of a K block of many rows, where it lies in pieces.
static inline void fixture_gather(unsigned char *record, const unsigned char *block, uint32_t row)
{
    uint32_t r = row % 8;
    const unsigned char *halves = block + row / 8 * 8 * 2 * FIXTURE_BLOCK;
    const unsigned char *sums = block + FIXTURE_GROUP * 2 * FIXTURE_BLOCK + row * 64;
    for (uint32_t k = 0; k < FIXTURE_BLOCK; k++) {
        uint32_t unit = k % 64 / 32 * 4 + k % 8 / 2, in_unit = k % 32 / 8 * 4 + k % 2 * 2;
        memcpy(record + 2 * k, halves + k / 64 * 1024 + r * 128 + (unit ^ r) * 16 + in_unit, 2);
    }
    for (uint32_t s = 0; s < FIXTURE_BLOCK / 16; s++) {
        unsigned char *to = record + 2 * FIXTURE_BLOCK + 2 * (s % 8 / 2 * 8 + s / 8 * 2 + s % 2);
        memcpy(to, sums + ((s / 8) ^ (r / 2)) * 16 + s % 8 * 2, 2);
        memcpy(to + 8, sums + ((2 + s / 8) ^ (r / 2)) * 16 + s % 8 * 2, 2);
    }
}

static inline void fixture_cuda_row(struct device *device, const struct activation *from, uint32_t row,
                                    float *out)
{
    uint32_t blocks = (from->width + FIXTURE_BLOCK - 1) / FIXTURE_BLOCK;
    size_t group = (size_t)blocks * FIXTURE_GROUP * FIXTURE_RECORD;
    const unsigned char *data = from->data,
                        *rows = data + (from->rows + FIXTURE_GROUP - 1) / FIXTURE_GROUP * group;
    bool generated = row < from->n_generated;
    float unit = from->unit == 0 ? 1 : from->unit;
    for (uint32_t b = 0; b < blocks; b++) {
        unsigned char record[FIXTURE_RECORD];
        float values[FIXTURE_BLOCK];
        const unsigned char *block =
            data + row / FIXTURE_GROUP * group + (size_t)b * FIXTURE_GROUP * FIXTURE_RECORD;
        if (generated && from->n_generated > FIXTURE_FEW) {
            static unsigned char whole[FIXTURE_GROUP * FIXTURE_RECORD];
            fixture_get(device, whole, block, sizeof whole);
            fixture_gather(record, whole, row % FIXTURE_GROUP);
        } else if (generated)
            fixture_get(device, record, block + row % FIXTURE_GROUP * FIXTURE_RECORD, sizeof record);
        else
            fixture_get(device, record,
                        rows + ((size_t)(row - from->n_generated) * blocks + b) * 2 * FIXTURE_BLOCK,
                        2 * FIXTURE_BLOCK);
        for (uint32_t i = 0; i < FIXTURE_BLOCK; i++) {
            uint16_t half;
            memcpy(&half, record + 2 * i, 2);
            values[i] = fixture_half_value(half);
            if (b * FIXTURE_BLOCK + i < from->width)
                out[b * FIXTURE_BLOCK + i] = values[i] * unit;
            else
                ck_assert_msg(values[i] == 0, "the padding of row %u was written", row);
        }
        if (generated)
            fixture_check_sums(record, values);
    }
}

// What `row` holds, as floats. On the CPU its forms must have FORM_F32.
static inline void fixture_activation_row(struct device *device, const struct activation *from, uint32_t row,
                                          float *out)
{
    if (fixture_on_cuda()) {
        fixture_cuda_row(device, from, row, out);
        return;
    }
    struct cpu_activation_rows rows = cpu_activation_rows(from);
    memcpy(out, rows.floats + row * rows.float_stride, from->width * sizeof *out);
}

// What storing x as a half, in units, may change it by; nothing on the CPU.
static inline double fixture_storing(double x, double unit)
{
    return fixture_on_cuda() ? 0x1p-11 * fabs(x) + 0x1p-25 * unit : 0;
}

// The numbers below n in the order that `seed` stands for; the caller frees them.
static inline uint32_t *fixture_shuffled(uint32_t n, uint64_t seed)
{
    uint32_t *numbers = malloc(n * sizeof *numbers);
    for (uint32_t i = 0; i < n; i++)
        numbers[i] = i;
    for (uint32_t i = n - 1; i > 0; i--) {
        uint32_t j = (uint32_t)(fixture_next(&seed) % (i + 1)), number = numbers[i];
        numbers[i] = numbers[j];
        numbers[j] = number;
    }
    return numbers;
}

static inline void fixture_rotate(double *x, double *y, double angle)
{
    double x0 = *x, y0 = *y;
    *x = x0 * cos(angle) - y0 * sin(angle);
    *y = x0 * sin(angle) + y0 * cos(angle);
}

// The half nearest to x (ties to even, at most 65504), as a number: by scaling, unlike the code under test.
static inline double fixture_half(double x)
{
    if (fabs(x) > 65504)
        return copysign(65504, x);
    int exponent;
    frexp(x, &exponent);
    double unit = ldexp(1, (exponent < -13 ? -13 : exponent) - 11);
    return rint(x / unit) * unit;
}

#endif
