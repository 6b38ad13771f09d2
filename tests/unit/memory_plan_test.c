// The memory plan of a small model, on a device that rounds and wants scratch memory: what is reserved, and
// how many pages would have fit.
#include <stdlib.h>

#include "kernels/device_internal.h"
#include "tests/ops/engine_driver.h"
#include "tests/suite.h"
#include "worker/executor.h"
#include "worker/local_engine.h"
#include "worker/memory_plan.h"

enum { VOCAB = 300, SLOTS = 12, CONTEXT = 256, POSITIONS = 200 };

static struct local_engine engine;
static struct error error;
static struct kernel_ops ops;
static const struct kernel_ops *true_ops;

static void setup(void)
{
    static char model[1024];
    const struct device_options device = {.backend = getenv("STRATA_TEST_BACKEND"), .threads = 1};
    const int32_t token = 1;
    double *logits;
    size_t count;
    ck_assert_msg(engine_oracle("arch=llama mix=q8_0 layers=2 vocab_size=300 embd=256 heads=4 kv_heads=2 "
                                "ffn=256 context=512",
                                &token, 1, model, sizeof(model), &logits, &count),
                  "the generator needs /usr/bin/python3 with numpy");
    free(logits);
    ck_assert_msg(local_engine_open(&engine, model, &device, SLOTS, CONTEXT, POSITIONS, &error) == 0, "%s",
                  error.text);
}

static void teardown(void)
{
    local_engine_close(&engine);
}

static size_t alloc_rounded(const struct device *device, size_t bytes)
{
    return (bytes + 65535) / 65536 * 65536;
}

static size_t some_scratch(const struct device *device, const struct scratch_shape *shape)
{
    ck_assert_uint_eq(shape->generated, SLOTS);
    return shape->reads_prompts ? (size_t)shape->rows * shape->width : 0; // of the head nothing
}

static size_t reserved;

static int note_reserve(struct device *device, size_t bytes, struct error *to)
{
    reserved = bytes;
    return true_ops->reserve(device, bytes, to);
}

START_TEST(test_memory_is_planned_and_reserved)
{
    true_ops = device_ops(engine.device);
    ops = *true_ops;
    engine.device->ops = &ops;
    ops.alloc_bytes = alloc_rounded;
    ops.scratch_bytes = some_scratch;
    ops.reserve = note_reserve;
    struct executor_options options = {.device = engine.device,
                                       .spec = &engine.spec,
                                       .list = &engine.list,
                                       .weights = engine.weights,
                                       .epoch = 1,
                                       .n_stages = 1,
                                       .n_layers = 2,
                                       .bounds = {SLOTS, SLOTS * 4, CONTEXT, VOCAB, POSITIONS}};
    struct memory_plan plan;
    ck_assert_int_eq(memory_plan_make(&plan, &options, 1000, UINT64_MAX, &error), 0);
    ck_assert(memory_plan_fits(&plan));
    ck_assert_uint_eq(plan.weights, 0); // they are there
    ck_assert_uint_eq(plan.stage.kv % 65536, 0);
    ck_assert_uint_eq(memory_plan_pages(&plan, &options), SLOTS * 4);
    executor_free(engine.executor);
    ck_assert_int_eq(executor_new(&engine.executor, &options, &error), 0);
    ck_assert_uint_eq(reserved, plan.stage.scratch);
    ck_assert_uint_gt(reserved, 0);
    for (uint32_t less = 1; less < 4; less++) {
        plan.free = memory_plan_others(&plan) - plan.stage.kv * less / 4 - 1;
        ck_assert(!memory_plan_fits(&plan));
        struct executor_options fewer = options;
        struct memory_plan smaller;
        uint32_t pages = memory_plan_pages(&plan, &options);
        ck_assert_uint_lt(pages, SLOTS * 4);
        fewer.bounds.n_pages = pages;
        ck_assert_int_eq(memory_plan_make(&smaller, &fewer, 1000, plan.free, &error), 0);
        ck_assert(pages == 0 || memory_plan_fits(&smaller));
        fewer.bounds.n_pages = pages + 1;
        ck_assert_int_eq(memory_plan_make(&smaller, &fewer, 1000, plan.free, &error), 0);
        ck_assert(!memory_plan_fits(&smaller));
    }
    plan.free = 0;
    ck_assert_uint_eq(memory_plan_pages(&plan, &options), 0);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("memory_plan");
    TCase *tests = tcase_create("plan");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, test_memory_is_planned_and_reserved);
    suite_add_tcase(suite, tests);
    return suite;
}
