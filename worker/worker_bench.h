// strata-worker --bench and --logits: a whole model in this process, timed or looked into.
#ifndef STRATA_WORKER_BENCH_H
#define STRATA_WORKER_BENCH_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "kernels/device.h"

enum { BENCH_MAX_BATCHES = 16 };

struct worker_bench_options {
    const char *model;
    struct device_options device;
    uint32_t n_prompt, n_new; // of every sequence
    uint32_t batches[BENCH_MAX_BATCHES];
    uint32_t n_batches;
    uint32_t step;   // positions of one prefill step
    uint32_t repeat; // the best of so many
    bool json;
};
// "1,8,32" into options->batches.
int worker_bench_parse_batches(struct worker_bench_options *options, const char *text, struct error *error);
// Prints a table, or one JSON object, to standard output.
int worker_bench_run(const struct worker_bench_options *options, struct error *error);

// Writes the logits of every position of `tokens` ("1,2,3") to `path`: raw little-endian float32, (positions,
// vocabulary).
int worker_dump_logits(const char *model, const struct device_options *device, const char *tokens,
                       const char *path, struct error *error);

#endif
