// Runs one Check suite. CK_FORK=no in the environment keeps it in one process (debuggers, device suites).
#include <stdlib.h>

#include "tests/suite.h"

int main(void)
{
    SRunner *runner = srunner_create(make_suite());
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
