// Child processes of `strata serve`: start, look after, end. One thread.
#ifndef STRATA_CLI_PROCESS_H
#define STRATA_CLI_PROCESS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "common/status.h"

// Directory of the running program, where its sister programs lie. At most `capacity` bytes.
int process_own_directory(char *out, size_t capacity, struct error *error);

// Starts program argv[0] (a path). The child dies with this process, has default signal handling, and its
// standard output is `stdout_fd` (or ours when negative).
int process_start(pid_t *out, char *const *argv, int stdout_fd, struct error *error);

// "exited with code 3", "was killed by SIGSEGV (Segmentation fault)".
void process_describe_end(int wait_status, char *out, size_t capacity);

#endif
