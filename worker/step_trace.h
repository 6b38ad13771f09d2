// A file of what the device did, step by step: Chrome's trace events as JSON, which Perfetto shows and
// scripts/pipeline_timeline.py draws. One complete event a span, "wait", "compute" or "send", one after the
// other; times in microseconds of CLOCK_MONOTONIC, so that files of workers on one host go together. The file
// is an array whose closing bracket is written at the end: until then it is one that readers of traces take
// all the same, also after the process was killed.
#ifndef STRATA_STEP_TRACE_H
#define STRATA_STEP_TRACE_H

#include <stdint.h>

#include "common/status.h"
#include "worker/step_times.h"

struct step_trace;

// Empties the file. STATUS_INVALID when it cannot be written. `worker`: a name for people.
int step_trace_open(struct step_trace **out, const char *path, const char *worker, struct error *error);
void step_trace_close(struct step_trace *trace); // waits until everything is written

// Of a step that is over. Never waits for the file: what is more than a disk takes is dropped, and the log
// says so. One thread at a time; does nothing where `trace` is NULL, like the next one.
void step_trace_add(struct step_trace *trace, const struct step_times *times, uint64_t epoch, uint32_t stage);
// Writes now instead of within a moment; does not wait for it.
void step_trace_flush(struct step_trace *trace);

#endif
