// The commands of `strata`, one file each, and the few lines they share. A command gets its own words
// (argv[0] is its name) and returns the program's exit code: 0, 1 for a failure, 2 for words that make no
// sense.
#ifndef STRATA_CLI_INTERNAL_H
#define STRATA_CLI_INTERNAL_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "common/config.h"
#include "common/status.h"

int command_serve(int argc, char **argv);
int command_generate(int argc, char **argv);
int command_chat(int argc, char **argv);
int command_score(int argc, char **argv);
int command_status(int argc, char **argv);
int command_bench(int argc, char **argv);
int command_plan(int argc, char **argv);
int command_inspect(int argc, char **argv);
int command_tokenize(int argc, char **argv);

// Reads a command's options. Returns -1 when the command should go on; otherwise the exit code to return at
// once: help was printed, or the words were refused on standard error. *out is the caller's only after -1.
int cli_parse(struct config **out, const struct option *options, int argc, char **argv, const char *usage,
              const char *about);

// Prints the sentence of a failure to standard error. Returns the exit code: 0 when `status` is 0, else 1.
int cli_report(int status, const struct error *error);

// Prints one JSON value and a newline, and gives the value up.
void cli_print_json(json_t *root);

// "93.8 MiB". Returns `text`.
const char *cli_format_bytes(char *text, size_t capacity, uint64_t bytes);

#endif
