// An engine on a small model whose steps a test makes itself, row by row: plans are added to `engine.plan`
// and run, or handed to executors of the test's own. One engine at a time, in epoch 1.
#ifndef STRATA_TESTS_EXECUTOR_FIXTURE_H
#define STRATA_TESTS_EXECUTOR_FIXTURE_H

#include <stdint.h>

#include "kernels/device_internal.h"
#include "worker/executor.h"
#include "worker/local_engine.h"

enum { VOCAB = 300, SLOTS = 12, CONTEXT = 256, POSITIONS = 200, C = 256, LAYERS = 2 };

extern struct local_engine engine;
extern struct error error;
extern struct device_options where; // the backend of STRATA_TEST_BACKEND

void executor_fixture_set_up(void);
void executor_fixture_tear_down(void);
void open_engine(int vocabulary);

// --- the plan at hand ---

struct step_command *add_open(uint32_t slot); // greedy
void add_pages(uint32_t slot, uint32_t first, uint32_t page, uint32_t count);
struct step_row *add_row(uint32_t slot, uint32_t position, uint32_t count); // tokens by their positions
struct step_row *drawing(struct step_row *row, uint32_t draws);
void run(void);
// It must fail and say `text`; afterwards every plan fails.
void refuse(int status, const char *text);

// --- the device's operations, for a test to change ---

extern struct kernel_ops ops;             // in use after change_ops, by executors made then
extern const struct kernel_ops *true_ops; // those that were in use before
void change_ops(void);

#endif
