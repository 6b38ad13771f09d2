// Settings of a program from four places, the later winning: defaults, a config file, the environment, the
// command line. One table of options per program gives all four and the --help text. The only place that
// reads the environment. Used by one thread, at start.
#ifndef STRATA_CONFIG_H
#define STRATA_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

enum option_kind {
    OPTION_FLAG,
    OPTION_INT,
    OPTION_FLOAT,
    OPTION_STRING,
    OPTION_BYTES, // "512M", "2G"
    OPTION_LIST   // text; each time it is given adds one value
};

// --max-sequences, STRATA_MAX_SEQUENCES and "max-sequences = 32" in the file are the same option.
struct option {
    const char *name; // "max-sequences"
    char letter;      // 'w' for -w, 0 = none
    enum option_kind kind;
    const char *argument; // "N", "ADDR": shown in --help; NULL for flags
    const char *fallback; // default as text, NULL = unset
    const char *help;     // one or more sentences
    double least, most;   // bounds of INT, FLOAT and BYTES when most > least
};

struct config;

// Parses argv[1..]. Options end at "--". Words that are no options are positionals. "--name=value", "--name
// value",
// "-w 2", "--no-flag". An unknown option is refused with the closest name. --config FILE names the file
// (default: none). The options array is terminated by a NULL name and must outlive the config.
int config_parse(struct config **out, const struct option *options, int argc, char **argv,
                 struct error *error);
void config_free(struct config *config);

bool config_is_set(const struct config *config, const char *name); // given anywhere, the default not counted
bool config_flag(const struct config *config, const char *name);
int64_t config_int(const struct config *config, const char *name); // also OPTION_BYTES
double config_float(const struct config *config, const char *name);
const char *config_string(const struct config *config, const char *name); // NULL when unset
// The values of an OPTION_LIST in the order they were given; NULL past the last.
size_t config_list_count(const struct config *config, const char *name);
const char *config_list(const struct config *config, const char *name, size_t index);
size_t config_positional_count(const struct config *config);
const char *config_positional(const struct config *config, size_t index);
bool config_wants_help(const struct config *config); // --help or -h was given

// "usage: <usage>", the text, then the options in their order, wrapped at 100 columns, with defaults.
void config_print_help(const struct option *options, const char *usage, const char *text);

// Takes what config_parse reads for these options, and STRATA_CONFIG, out of the environment: for a program
// that passes its options on to children as words, whose own options may share a name and mean something
// else. A parsed config stays as it is.
void config_forget_environment(const struct option *options);

// Whether a variable is set to anything but nothing or 0: a switch that is no option, for tests. Any thread.
bool config_switch(const char *name);

// Sets a variable that a library reads from the environment and from nowhere else, unless the user has set
// it. While the program has one thread.
void config_export(const char *name, const char *value);

#endif
