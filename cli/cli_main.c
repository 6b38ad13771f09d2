// The program `strata`: a table of commands and a loop. One thread.
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "cli/cli_internal.h"

static const struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} COMMANDS[] = {
    {"serve", command_serve, "serve a model from local worker processes"},
    {"generate", command_generate, "continue a prompt on a running server"},
    {"chat", command_chat, "talk to a running server"},
    {"score", command_score, "how likely a text is under the served model"},
    {"status", command_status, "the model, pool and load of a running server"},
    {"bench", command_bench, "time the engine alone, or a running server under load"},
    {"plan", command_plan, "print how a model would be split over workers"},
    {"inspect", command_inspect, "print a model file's header, metadata, tensors and vocabulary"},
    {"tokenize", command_tokenize, "turn text into token ids, or ids into text"},
};
enum { N_COMMANDS = sizeof(COMMANDS) / sizeof(COMMANDS[0]) };

int cli_parse(struct config **out, const struct option *options, int argc, char **argv, const char *usage,
              const char *about)
{
    struct error error = {0};
    if (config_parse(out, options, argc, argv, &error)) {
        fprintf(stderr, "strata %s: %s\nusage: %s\n", argv[0], error.text, usage);
        return 2;
    }
    if (!config_wants_help(*out))
        return -1;
    config_print_help(options, usage, about);
    config_free(*out);
    *out = NULL;
    return 0;
}

int cli_report(int status, const struct error *error)
{
    // gRPC's own words for a server that is not there; the end of them has the address and the reason.
    static const char UNREACHED[] = "failed to connect to all addresses; last error: UNKNOWN: ";
    if (status == STATUS_UNAVAILABLE && strncmp(error->text, UNREACHED, sizeof(UNREACHED) - 1) == 0) {
        fprintf(stderr, "strata: no server there: %s\n", error->text + sizeof(UNREACHED) - 1);
        fputs("'strata serve' starts one; --connect says where it is\n", stderr);
        return 1;
    }
    if (status)
        fprintf(stderr, "strata: %s\n", error->text[0] ? error->text : status_name(status));
    return status ? 1 : 0;
}

void cli_print_json(json_t *root)
{
    json_dumpf(root, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(root);
}

const char *cli_format_bytes(char *text, size_t capacity, uint64_t bytes)
{
    static const char *const UNITS[] = {"KiB", "MiB", "GiB", "TiB", "PiB"};
    size_t unit = 0;
    double value = (double)bytes / 1024;
    if (bytes < 1024) {
        snprintf(text, capacity, "%u B", (unsigned)bytes);
        return text;
    }
    for (; value >= 1024 && unit + 1 < sizeof(UNITS) / sizeof(UNITS[0]); unit++)
        value /= 1024;
    snprintf(text, capacity, "%.1f %s", value, UNITS[unit]);
    return text;
}

static const struct command *find_command(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (strcmp(COMMANDS[i].name, name) == 0)
            return &COMMANDS[i];
    return NULL;
}

static void print_usage(FILE *to)
{
    fprintf(to, "usage: strata COMMAND [options]\n\n"
                "Serves quantized GGUF models from a pool of worker processes behind one gRPC endpoint.\n\n"
                "commands:\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(to, "  %-12s%s\n", COMMANDS[i].name, COMMANDS[i].help);
    fprintf(
        to,
        "\n'strata help COMMAND' or 'strata COMMAND --help' tells more; 'strata --version' the version.\n");
}

static int run(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";
    bool help = strcmp(name, "help") == 0;
    if (strcmp(name, "--version") == 0 || strcmp(name, "version") == 0) {
        printf("strata %s\n", STRATA_VERSION);
        return 0;
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || (help && argc == 2)) {
        print_usage(stdout);
        return 0;
    }
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    const struct command *command = find_command(help ? argv[2] : name);
    if (!command) {
        fprintf(stderr, "strata: there is no command '%s'; 'strata help' lists them\n",
                help ? argv[2] : name);
        return 2;
    }
    if (help)
        return command->run(2, (char *[]){argv[2], (char *)"--help", NULL});
    return command->run(argc - 1, argv + 1);
}

int main(int argc, char **argv)
{
    int code = run(argc, argv);
    // What a script reads must have arrived, or the exit code says that it did not.
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "strata: cannot write to standard output: %s\n", strerror(errno));
        code = code ? code : 1;
    }
    return code;
}
