// A GPU that fails: memory that ran out passes, a kernel's bad access stays with the process. One test,
// because nothing on the GPU works in this process after it.
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "tests/suite.h"

START_TEST(test_what_passes_and_what_stays)
{
    const struct device_options options = {.backend = "cuda"};
    struct error error = {0};
    struct device *device;
    ck_assert_msg(!device_open(&device, &options, &error), "%s", error.text);
    const struct kernel_ops *ops = device_ops(device);
    ck_assert(!device_broken(device));
    ck_assert_ptr_null(ops->alloc(device, (size_t)1 << 50));
    ck_assert(!device_broken(device));
    ck_assert_int_ne(ops->reserve(device, (size_t)1 << 50, &error), 0);
    ck_assert(!device_broken(device));
    int32_t *tokens = ops->alloc(device, 4096);
    ck_assert_ptr_nonnull(tokens);
    ck_assert_msg(!ops->sync(device, &error), "%s", error.text);

    ops->feed(device, tokens, (const int32_t *)64, tokens, 1); // reads where nothing is
    ck_assert_int_eq(ops->sync(device, &error), STATUS_INTERNAL);
    for (int i = 0; i < 3; i++)
        ck_assert(device_broken(device));
    ops->free(device, tokens);
    device_close(device);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("cuda_fault");
    TCase *tcase = tcase_create("cuda_fault");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_what_passes_and_what_stays);
    suite_add_tcase(suite, tcase);
    return suite;
}
