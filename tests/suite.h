// A test file defines make_suite(); suite_main.c runs it. Exit code 77 (test_skip_all) counts as skipped
// under CTest.
#ifndef STRATA_TESTS_SUITE_H
#define STRATA_TESTS_SUITE_H

#include <check.h>

Suite *make_suite(void);

#endif
