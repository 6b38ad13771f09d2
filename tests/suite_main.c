// Runs one Check suite. CK_FORK=no in the environment keeps it in one process (debuggers). Suites of the CUDA
// backend always are in one, because a CUDA context does not survive a fork: those whose name begins with
// cuda_, and those that STRATA_TEST_BACKEND=cuda sends there. Without a GPU they are skipped.
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/device.h"
#include "tests/suite.h"

static int check_gpu(void)
{
    if (device_count("cuda") > 0)
        return 0;
    printf("skipped: no GPU here, or a build without CUDA\n");
    return 77;
}

int main(void)
{
    if (!strncmp(program_invocation_short_name, "cuda_", 5))
        setenv("STRATA_TEST_BACKEND", "cuda", 1);
    const char *backend = getenv("STRATA_TEST_BACKEND");
    bool on_cuda = backend && !strcmp(backend, "cuda");
    if (on_cuda && check_gpu())
        return 77;
    SRunner *runner = srunner_create(make_suite());
    if (on_cuda)
        srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
