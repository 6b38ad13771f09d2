// What the tests of ops share: devices at every level of this machine, memory on them, and fresh random
// inputs whose seed is printed (STRATA_TEST_SEED repeats a run).
#ifndef STRATA_TESTS_OP_FIXTURE_H
#define STRATA_TESTS_OP_FIXTURE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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

static inline struct device *fixture_open(uint32_t level, uint32_t threads)
{
    struct device_options options = {.backend = "cpu", .threads = threads, .level = level};
    struct device *device;
    struct error error = {0};
    ck_assert_msg(device_open(&device, &options, &error) == 0, "%s", error.text);
    ck_assert_uint_eq(device_level(device), level);
    return device;
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
