// Stamps: the times of a device are those of the host's clock, in order, and stay so.
#include "tests/ops/op_fixture.h"

#include "common/clock.h"

enum {
    APART_US = 300,   // how far the two clocks may be from each other
    PATIENCE = 60,    // seconds for a mark
    BYTES = 64 << 20, // something to do between two stamps
};

static void await(struct device *device, uint64_t mark)
{
    struct error error = {0};
    int reached, tries = 0;
    while ((reached = device_ops(device)->reached(device, mark, &error)) == 0 && tries++ < PATIENCE * 10000)
        clock_sleep_us(100);
    ck_assert_msg(reached == 1, "%s", reached < 0 ? error.text : "the mark was not reached");
}

// A stamp of an idle device lies between the host's times before it and after its mark.
static void check_one(struct device *device)
{
    const struct kernel_ops *ops = device_ops(device);
    int64_t before = clock_now_us();
    uint64_t stamp = ops->stamp(device);
    await(device, ops->mark(device));
    int64_t after = clock_now_us(), at = ops->stamp_us(device, stamp);
    ck_assert_int_ge(at, before - APART_US);
    ck_assert_int_le(at, after + APART_US);
}

START_TEST(test_stamps_are_on_the_clock_of_the_host)
{
    struct device *device = fixture_open(fixture_best_level(), 1);
    for (int i = 0; i < 3 * DEVICE_STAMPS; i++) { // past where a device looks at the host's clock again
        check_one(device);
        clock_sleep_us(5000);
    }
    fixture_close(device);
}
END_TEST

// All that are remembered, read when the last mark is reached, and in part once more when the clocks met
// again.
START_TEST(test_stamps_ascend)
{
    struct device *device = fixture_open(fixture_best_level(), 1);
    const struct kernel_ops *ops = device_ops(device);
    void *from = fixture_put(device, NULL, BYTES), *to = fixture_put(device, NULL, BYTES);
    uint64_t stamps[DEVICE_STAMPS];
    int64_t began = clock_now_us(), times[DEVICE_STAMPS];
    for (int i = 0; i < DEVICE_STAMPS; i++) {
        ops->copy(device, to, from, BYTES);
        stamps[i] = ops->stamp(device);
    }
    await(device, ops->mark(device));
    int64_t ended = clock_now_us();
    for (int i = 0; i < DEVICE_STAMPS; i++) {
        times[i] = ops->stamp_us(device, stamps[i]);
        ck_assert_int_gt(times[i], i ? times[i - 1] : began - APART_US);
    }
    ck_assert_int_le(times[DEVICE_STAMPS - 1], ended + APART_US);
    for (int i = 0; i < 3; i++) { // a later meeting tells the same time of an earlier stamp
        clock_sleep_us(400000);
        int64_t again = ops->stamp_us(device, stamps[0]);
        ck_assert_int_le(llabs(again - times[0]), APART_US);
    }
    fixture_drop(device, from);
    fixture_drop(device, to);
    fixture_close(device);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("stamps");
    TCase *tcase = tcase_create("stamps");
    tcase_add_test(tcase, test_stamps_are_on_the_clock_of_the_host);
    tcase_add_test(tcase, test_stamps_ascend);
    suite_add_tcase(suite, tcase);
    return suite;
}
