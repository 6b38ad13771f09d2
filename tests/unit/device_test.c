// The CPU device: opening, levels, memory; its thread pool; number conversions and the weight types.
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/cpu_types.h"
#include "tests/suite.h"
#include "tests/weights.h"

static struct device *open_threads(uint32_t threads)
{
    struct device_options options = {.threads = threads};
    struct error error;
    struct device *device;
    ck_assert_msg(!device_open(&device, &options, &error), "%s", error.text);
    return device;
}

START_TEST(test_open)
{
    uint32_t best = device_best_level("cpu", 0);
    ck_assert_uint_ge(best, LEVEL_PORTABLE);
    for (uint32_t level = 0; level <= LEVEL_AVX512; level++) {
        struct device_options options = {.backend = "cpu", .level = level, .threads = 2};
        struct device *device;
        ck_assert_int_eq(device_open(&device, &options, NULL), 0);
        uint32_t expected = level && level < best ? level : best;
        ck_assert_uint_eq(device_level(device), expected);
        ck_assert_str_eq(device_ops(device)->name, device_level_name(expected));
        char text[64];
        snprintf(text, sizeof(text), "cpu %s, 2 threads", device_level_name(expected));
        ck_assert_str_eq(device_describe(device), text);
        ck_assert_uint_gt(device_memory_free(device), 1 << 20);
        device_close(device);
    }
}
END_TEST

START_TEST(test_open_refused)
{
    const struct {
        struct device_options options;
        int status;
        const char *says;
    } CASES[] = {{{.backend = "cuda", .index = 63}, STATUS_UNSUPPORTED, device_count("cuda") ? "GPU 63" : ""},
                 {{.backend = "tpu"}, STATUS_UNSUPPORTED, "\"tpu\""},
                 {{.level = 9}, STATUS_INVALID, "level 9"},
                 {{.threads = 1000}, STATUS_INVALID, "1000"}};
    for (size_t i = 0; i < sizeof(CASES) / sizeof(CASES[0]); i++) {
        struct device *device = NULL;
        struct error error = {0};
        ck_assert_int_eq(device_open(&device, &CASES[i].options, &error), CASES[i].status);
        ck_assert_msg(strstr(error.text, CASES[i].says), "%s", error.text);
        ck_assert_ptr_null(device);
    }
    ck_assert_uint_eq(device_best_level("tpu", 0), 0);
    ck_assert_str_eq(device_backend(NULL), "cpu");
    ck_assert_str_eq(device_backend("tpu"), "tpu");
    ck_assert_str_eq(device_backend("auto"), device_count("cuda") ? "cuda" : "cpu");
    ck_assert_str_eq(device_level_name(42), "unknown");
}
END_TEST

START_TEST(test_memory)
{
    struct device *device = open_threads(1);
    const struct kernel_ops *ops = device_ops(device);
    static const size_t SIZES[] = {0, 1, 63, 64, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 3};
    for (size_t i = 0; i < sizeof(SIZES) / sizeof(SIZES[0]); i++) {
        uint8_t *p = ops->alloc(device, SIZES[i]), *q = ops->alloc(device, SIZES[i]);
        ck_assert(p && q && p != q);
        ck_assert_uint_eq((uintptr_t)p % 64, 0);
        size_t zeros = 0; // counted, because Check writes a record for each assertion
        for (size_t j = 0; j < SIZES[i]; j++)
            zeros += !p[j];
        ck_assert_uint_eq(zeros, SIZES[i]);
        if (SIZES[i]) {
            char text[1] = {42}, back[1] = {0};
            ops->upload(device, p + SIZES[i] - 1, text, 1);
            ops->copy(device, q, p + SIZES[i] - 1, 1);
            ops->download(device, back, q, 1);
            ck_assert_int_eq(back[0], 42);
        }
        ops->free(device, p);
        ops->free(device, q);
    }
    ops->free(device, NULL);
    ck_assert_ptr_null(ops->alloc(device, SIZE_MAX - 8));
    ck_assert_ptr_null(ops->alloc(device, (size_t)1 << 50));
    struct error error;
    ck_assert_int_eq(ops->sync(device, &error), 0);
    device_close(device);
}
END_TEST

// Scratch that cannot be had is a fault that the next sync reports, once.
START_TEST(test_scratch)
{
    struct device *device = open_threads(2);
    struct cpu_device *cpu = cpu_device_of(device);
    ck_assert(cpu_scratch_reserve(cpu, 1000));
    ck_assert(cpu_scratch(cpu, 0) != cpu_scratch(cpu, 1));
    memset(cpu_scratch(cpu, 1), 1, 1000);
    ck_assert(!cpu_scratch_reserve(cpu, (size_t)1 << 60));
    struct error error = {0};
    ck_assert_int_eq(device_ops(device)->sync(device, &error), STATUS_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(error.text, "scratch"));
    ck_assert_int_eq(device_ops(device)->sync(device, &error), 0);
    ck_assert(cpu_scratch_reserve(cpu, 2000));
    memset(cpu_scratch(cpu, 0), 1, 2000);
    device_close(device);
}
END_TEST

// --- the pool ---

enum { MOST_TASKS = 300 };

struct region {
    uint32_t runs[MOST_TASKS]; // written by one task each: a data race would show under TSan
    uint64_t salt;
    uint32_t n_workers;
    _Atomic uint32_t bad_worker;
};

static void mark(void *args, uint32_t task, uint32_t worker)
{
    struct region *region = args;
    region->runs[task] += 1 + (uint32_t)(region->salt % 3);
    if (worker >= region->n_workers)
        atomic_fetch_add(&region->bad_worker, 1);
    if (region->salt % 97 == 0)
        usleep(1);
}

static void run_regions(struct device *device, uint32_t threads, int count, uint64_t *random)
{
    static struct region region;
    for (int i = 0; i < count; i++) {
        uint32_t n =
            (uint32_t)(random_bits(random) % 4 ? random_bits(random) % 8 : random_bits(random) % MOST_TASKS);
        memset(region.runs, 0, sizeof(region.runs));
        region.salt = random_bits(random);
        region.n_workers = threads;
        cpu_parallel(cpu_device_of(device), mark, &region, n);
        uint32_t right = 0;
        for (uint32_t t = 0; t < MOST_TASKS; t++)
            right += region.runs[t] == (t < n ? 1 + region.salt % 3 : 0);
        ck_assert_uint_eq(right, MOST_TASKS);
        if (random_bits(random) % 100 == 0)
            usleep(300); // long enough for the others to fall asleep
    }
    ck_assert_uint_eq(atomic_load(&region.bad_worker), 0);
}

START_TEST(test_pool)
{
    uint64_t random = random_seed("test_pool");
    for (uint32_t threads = 1; threads <= 8; threads += threads < 4 ? 1 : 4) {
        struct device *device = open_threads(threads);
        run_regions(device, threads, 2000, &random);
        device_close(device);
    }
}
END_TEST

static void note_worker(void *args, uint32_t task, uint32_t worker)
{
    _Atomic uint32_t *workers = args;
    atomic_fetch_or(workers, 1u << worker);
    usleep(2000);
}

// Sleeping threads do come to help.
START_TEST(test_pool_wakes)
{
    struct device *device = open_threads(3);
    usleep(20000);
    _Atomic uint32_t workers = 0;
    cpu_parallel(cpu_device_of(device), note_worker, &workers, 30);
    ck_assert_uint_eq(atomic_load(&workers), 7);
    device_close(device);
}
END_TEST

// A device that waits for work uses no processor time.
START_TEST(test_pool_sleeps)
{
    struct device *device = open_threads(4);
    struct rusage before, after;
    usleep(50000);
    getrusage(RUSAGE_SELF, &before);
    usleep(200000);
    getrusage(RUSAGE_SELF, &after);
    long used = (after.ru_utime.tv_sec - before.ru_utime.tv_sec) * 1000000 + after.ru_utime.tv_usec -
                before.ru_utime.tv_usec;
    ck_assert_msg(used < 20000, "%ld us", used);
    device_close(device);
}
END_TEST

// --- numbers ---

static double half_definition(uint32_t half)
{
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31)
        return mantissa ? NAN : half & 0x8000 ? -INFINITY : INFINITY;
    double value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return half & 0x8000 ? -value : value;
}

static bool half_is_right(uint32_t half)
{
    double expected = half_definition(half);
    float value = cpu_f16_to_f32((uint16_t)half);
    if (isnan(expected))
        return isnan(value) && isnan(cpu_f16_to_f32(cpu_f32_to_f16(value)));
    if (value != expected || !signbit(value) != !signbit(expected) || cpu_f32_to_f16(value) != half)
        return false;
    if (isinf(expected))
        return true;
    // Between two halves the nearer wins, in the middle the even one. The step above the last finite one is
    // to what would be 2^16.
    double next = (half & 0x7fff) == 0x7bff ? copysign(65536, expected) : half_definition(half + 1);
    float middle = (float)((expected + next) / 2);
    return cpu_f32_to_f16(nextafterf(middle, (float)expected)) == half &&
           cpu_f32_to_f16(nextafterf(middle, (float)next)) == half + 1 &&
           cpu_f32_to_f16(middle) == (half % 2 ? half + 1 : half);
}

START_TEST(test_halves)
{
    for (uint32_t half = 0; half < 0x10000; half++)
        if (!half_is_right(half))
            ck_abort_msg("half %04x", half);
    ck_assert_uint_eq(cpu_f32_to_f16(1e30f), 0x7c00);
    ck_assert_uint_eq(cpu_f32_to_f16(-INFINITY), 0xfc00);
    ck_assert_uint_eq(cpu_f32_to_f16(1e-30f), 0);
    ck_assert_float_eq(cpu_bf16_to_f32(0x3fc0), 1.5f);
}
END_TEST

START_TEST(test_dequantize)
{
    enum { WIDTH = 1024 };
    uint64_t random = random_seed("test_dequantize");
    uint32_t type = WEIGHT_TYPES[_i];
    uint8_t *row = malloc(tensor_type_bytes(type, WIDTH, 1) + 1);
    float values[WIDTH];
    for (int run = 0; run < 20; run++) {
        uint8_t *at = row + run % 2; // rows in a file may be unaligned
        weights_fill(type, at, WIDTH, 1, &random);
        cpu_dequantize_row(type, at, values, WIDTH);
        for (uint32_t k = 0; k < WIDTH; k++) {
            double gross, expected = weights_value(type, at, k, &gross);
            // Exact, but for the rounding of a product of three factors and of a difference.
            double allowed = tensor_type_info(type)->block_weights == 1 ? 0 : 0x1p-23 * gross;
            if (fabs(values[k] - expected) > allowed)
                ck_abort_msg("%s [%u]: %.9g, not %.9g", tensor_type_info(type)->name, k, values[k], expected);
        }
    }
    free(row);
}
END_TEST

// Types without a minimum and with one scale are exact.
START_TEST(test_dequantize_exact)
{
    static const uint32_t TYPES[] = {TENSOR_Q4_0, TENSOR_Q5_0, TENSOR_Q8_0, TENSOR_Q3_K};
    uint64_t random = random_seed("test_dequantize_exact");
    uint8_t row[1024];
    float values[256];
    for (int run = 0; run < 20; run++) {
        uint32_t type = TYPES[run % 4];
        weights_fill(type, row, 256, 1, &random);
        cpu_dequantize_row(type, row, values, 256);
        for (uint32_t k = 0; k < 256; k++)
            if (values[k] != weights_value(type, row, k, NULL))
                ck_abort_msg("%s [%u]", tensor_type_info(type)->name, k);
    }
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("device");
    TCase *tcase = tcase_create("device");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_open);
    tcase_add_test(tcase, test_open_refused);
    tcase_add_test(tcase, test_memory);
    tcase_add_test(tcase, test_scratch);
    tcase_add_test(tcase, test_pool);
    tcase_add_test(tcase, test_pool_wakes);
    tcase_add_test(tcase, test_pool_sleeps);
    tcase_add_test(tcase, test_halves);
    tcase_add_loop_test(tcase, test_dequantize, 0, (int)N_WEIGHT_TYPES);
    tcase_add_test(tcase, test_dequantize_exact);
    suite_add_tcase(suite, tcase);
    return suite;
}
