// Settings from defaults, a file, the environment and the command line. Each value goes through one door,
// set_value, with a rank for where it came from: it is checked whatever its rank, so that a mistake in the
// file is not hidden by a flag, and kept when no higher rank was there before. The environment is read here
// and nowhere else, once, by the thread that starts the program; a config is immutable after that.
#include "common/config.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COLUMNS = 100, LABEL_COLUMNS = 30, NAME_BYTES = 64, CLOSE_ENOUGH = 2 };

// Where a value came from: later ones win.
enum rank { RANK_NONE, RANK_DEFAULT, RANK_FILE, RANK_ENVIRONMENT, RANK_COMMAND_LINE };

struct setting {
    enum rank rank;
    char *text;
    int64_t integer; // FLAG, INT, BYTES
    double real;
    char **items; // LIST: the values of this rank, in order
    size_t n_items;
};

struct config {
    const struct option *options;
    size_t n_options;
    struct setting *settings; // one an option
    char **positionals;
    size_t n_positionals;
    char *file;
    bool help;
};

// Options every program has.
static const struct option COMMON[] = {
    {"config", 0, OPTION_STRING, "FILE", NULL,
     "Read options from this file first: lines 'name = value', # comments.", 0, 0},
    {"help", 'h', OPTION_FLAG, NULL, NULL, "Print this and exit.", 0, 0},
};
enum { N_COMMON = sizeof(COMMON) / sizeof(COMMON[0]) };

// --- values ---

static int parse_flag(const char *text, int64_t *out)
{
    static const char *const TRUE_WORDS[] = {"true", "yes", "on", "1"}, *const FALSE_WORDS[] = {"false", "no",
                                                                                                "off", "0"};
    for (size_t i = 0; i < 4; i++) {
        if (strcasecmp(text, TRUE_WORDS[i]) == 0 || strcasecmp(text, FALSE_WORDS[i]) == 0) {
            *out = strcasecmp(text, TRUE_WORDS[i]) == 0;
            return STATUS_OK;
        }
    }
    return STATUS_INVALID;
}

// A whole number; `units` allows K, M, G, T behind it (powers of 1024; "MB" and "MiB" mean the same).
static int parse_int(const char *text, bool units, int64_t *out)
{
    static const char UNITS[] = "KMGT";
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || errno || isspace((unsigned char)text[0]))
        return STATUS_INVALID;
    const char *unit = units && *end ? strchr(UNITS, toupper((unsigned char)*end)) : NULL;
    if (unit) {
        if (__builtin_mul_overflow(value, (int64_t)1 << (10 * (unit - UNITS + 1)), &value))
            return STATUS_INVALID;
        end += strncasecmp(end + 1, "iB", 2) == 0 ? 3 : strncasecmp(end + 1, "B", 1) == 0 ? 2 : 1;
    }
    *out = value;
    return *end || (units && value < 0) ? STATUS_INVALID : STATUS_OK;
}

static int parse_float(const char *text, double *out)
{
    char *end;
    *out = strtod(text, &end);
    return end == text || *end || isspace((unsigned char)text[0]) || !isfinite(*out) ? STATUS_INVALID
                                                                                     : STATUS_OK;
}

static const char *kind_name(enum option_kind kind)
{
    switch (kind) {
    case OPTION_FLAG:
        return "yes or no";
    case OPTION_INT:
        return "a whole number";
    case OPTION_FLOAT:
        return "a number";
    case OPTION_BYTES:
        return "a number of bytes such as 512M or 2G";
    default:
        return "text";
    }
}

static int parse_value(const struct option *option, const char *text, struct setting *value)
{
    switch (option->kind) {
    case OPTION_FLAG:
        return parse_flag(text, &value->integer);
    case OPTION_INT:
    case OPTION_BYTES:
        return parse_int(text, option->kind == OPTION_BYTES, &value->integer);
    case OPTION_FLOAT:
        return parse_float(text, &value->real);
    default:
        return STATUS_OK;
    }
}

static void setting_free(struct setting *setting)
{
    for (size_t i = 0; i < setting->n_items; i++)
        free(setting->items[i]);
    free(setting->items);
    free(setting->text);
}

// One more value of a list, behind those of the same rank.
static int add_item(struct setting *value, const struct setting *before, struct error *error)
{
    size_t kept = before->rank == value->rank ? before->n_items : 0;
    value->items = calloc(kept + 1, sizeof(*value->items));
    for (size_t i = 0; value->items && i <= kept; i++) {
        value->items[i] = strdup(i < kept ? before->items[i] : value->text);
        if (!value->items[i])
            break;
        value->n_items++;
    }
    return value->n_items == kept + 1 ? STATUS_OK
                                      : error_set(error, STATUS_NO_MEMORY, "no memory for the options");
}

// `origin` says where the text stands: "--workers", "STRATA_WORKERS", "pool.conf:3: workers".
static int set_value(struct config *config, size_t index, const char *text, enum rank rank,
                     const char *origin, struct error *error)
{
    const struct option *option = &config->options[index];
    struct setting value = {.rank = rank};
    if (parse_value(option, text, &value))
        return error_set(error, STATUS_INVALID, "%s: '%s' is not %s", origin, text, kind_name(option->kind));
    double number = option->kind == OPTION_FLOAT ? value.real : (double)value.integer;
    bool is_number =
        option->kind == OPTION_INT || option->kind == OPTION_FLOAT || option->kind == OPTION_BYTES;
    bool bounded = is_number && option->most > option->least;
    if (bounded && (number < option->least || number > option->most))
        return error_set(error, STATUS_INVALID, "%s: %s is not between %.15g and %.15g", origin, text,
                         option->least, option->most);
    if (rank < config->settings[index].rank)
        return STATUS_OK;
    value.text = strdup(text);
    if (!value.text)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the options");
    int status = STATUS_OK;
    if (option->kind == OPTION_LIST)
        status = add_item(&value, &config->settings[index], error);
    setting_free(&config->settings[index]);
    config->settings[index] = value;
    return status;
}

// --- names ---

static bool find_option(const struct config *config, const char *name, size_t length, size_t *index)
{
    for (size_t i = 0; i < config->n_options; i++) {
        if (strlen(config->options[i].name) == length && memcmp(config->options[i].name, name, length) == 0) {
            *index = i;
            return true;
        }
    }
    return false;
}

// Insertions, deletions and replacements that turn one name into the other.
static size_t edit_distance(const char *a, size_t length, const char *b)
{
    size_t row[NAME_BYTES + 1], width = strlen(b);
    if (width > NAME_BYTES || length > NAME_BYTES)
        return NAME_BYTES;
    for (size_t j = 0; j <= width; j++)
        row[j] = j;
    for (size_t i = 1; i <= length; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= width; j++) {
            size_t replace = diagonal + (a[i - 1] != b[j - 1]),
                   shorter = row[j] < row[j - 1] ? row[j] : row[j - 1];
            diagonal = row[j];
            row[j] = replace < shorter + 1 ? replace : shorter + 1;
        }
    }
    return row[width];
}

// The option a mistyped name is closest to; NULL when none is close.
static const char *closest_name(const struct config *config, const char *name, size_t length)
{
    const char *best = NULL;
    size_t least = CLOSE_ENOUGH + 1;
    for (size_t i = 0; i < config->n_options + N_COMMON; i++) {
        const char *candidate =
            i < config->n_options ? config->options[i].name : COMMON[i - config->n_options].name;
        size_t distance = edit_distance(name, length, candidate);
        bool begins = length >= 3 && strncmp(candidate, name, length) == 0; // cut short
        if (begins && distance > CLOSE_ENOUGH)
            distance = CLOSE_ENOUGH;
        if (distance < least && distance < length) {
            least = distance;
            best = candidate;
        }
    }
    return best;
}

static int refuse_name(const struct config *config, const char *origin, const char *dashes, const char *name,
                       size_t length, struct error *error)
{
    const char *closest = closest_name(config, name, length);
    if (closest)
        return error_set(error, STATUS_INVALID, "%sunknown option %s%.*s; did you mean %s%s?", origin, dashes,
                         (int)length, name, dashes, closest);
    return error_set(error, STATUS_INVALID, "%sunknown option %s%.*s; --help lists them", origin, dashes,
                     (int)length, name);
}

// --- the command line ---

struct words {
    int argc;
    char **argv;
    int at; // the word being read
};

// The value of an option: behind '=' in the same word, or the next word unless that is an option itself.
static int value_of(struct words *words, const char *inside, const char *origin, const char **out,
                    struct error *error)
{
    const char *next = words->at + 1 < words->argc ? words->argv[words->at + 1] : NULL;
    bool option = next && next[0] == '-' && next[1] && !isdigit((unsigned char)next[1]) && next[1] != '.';
    *out = inside ? inside : next;
    if (inside)
        return STATUS_OK;
    if (!next || option)
        return error_set(error, STATUS_INVALID, "%s needs a value", origin);
    words->at++;
    return STATUS_OK;
}

static int read_long(struct config *config, struct words *words, struct error *error)
{
    const char *name = words->argv[words->at] + 2, *value = strchr(name, '='), *text = NULL;
    size_t length = value ? (size_t)(value - name) : strlen(name), index;
    char origin[NAME_BYTES + 8];
    snprintf(origin, sizeof(origin), "--%.*s", (int)length, name);
    value = value ? value + 1 : NULL;
    if (find_option(config, name, length, &index)) {
        if (config->options[index].kind == OPTION_FLAG)
            return set_value(config, index, value ? value : "yes", RANK_COMMAND_LINE, origin, error);
        int status = value_of(words, value, origin, &text, error);
        return status ? status : set_value(config, index, text, RANK_COMMAND_LINE, origin, error);
    }
    if (length > 3 && memcmp(name, "no-", 3) == 0 && find_option(config, name + 3, length - 3, &index) &&
        config->options[index].kind == OPTION_FLAG && !value)
        return set_value(config, index, "no", RANK_COMMAND_LINE, origin, error);
    if (length == 6 && memcmp(name, "config", 6) == 0) {
        int status = value_of(words, value, origin, &text, error);
        if (status)
            return status;
        free(config->file);
        config->file = strdup(text);
        return config->file ? STATUS_OK : error_set(error, STATUS_NO_MEMORY, "no memory for the options");
    }
    return refuse_name(config, "", "--", name, length, error);
}

static int read_short(struct config *config, struct words *words, struct error *error)
{
    const char *word = words->argv[words->at], *text = NULL;
    const char origin[3] = {'-', word[1], '\0'};
    for (size_t i = 0; i < config->n_options; i++) {
        if (config->options[i].letter != word[1])
            continue;
        if (config->options[i].kind != OPTION_FLAG) {
            int status = value_of(words, word[2] ? word + 2 : NULL, origin, &text, error);
            return status ? status : set_value(config, i, text, RANK_COMMAND_LINE, origin, error);
        }
        if (!word[2])
            return set_value(config, i, "yes", RANK_COMMAND_LINE, origin, error);
    }
    return error_set(error, STATUS_INVALID, "unknown option %s; --help lists them", word);
}

static int read_command_line(struct config *config, int argc, char **argv, struct error *error)
{
    struct words words = {argc, argv, 1};
    bool options = true;
    config->positionals = calloc((size_t)argc + 1, sizeof(*config->positionals));
    if (!config->positionals)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the options");
    for (; words.at < argc; words.at++) {
        const char *word = argv[words.at];
        int status = STATUS_OK;
        if (options && strcmp(word, "--") == 0)
            options = false;
        else if (options && word[0] == '-' && word[1] == '-')
            status = read_long(config, &words, error);
        else if (options && word[0] == '-' && word[1])
            status = read_short(config, &words, error);
        else if (!(config->positionals[config->n_positionals++] = strdup(word)))
            status = error_set(error, STATUS_NO_MEMORY, "no memory for the options");
        if (status)
            return status;
    }
    return STATUS_OK;
}

static bool asks_for_help(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return true;
    return false;
}

// --- the file and the environment ---

static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    size_t length = strlen(text);
    while (length > 0 && isspace((unsigned char)text[length - 1]))
        text[--length] = '\0';
    return text;
}

// Cuts a comment, or takes off the quotes of "a value with # or spaces at its ends". NULL when quotes do not
// match.
static char *unquote(char *text)
{
    if (*text != '"') {
        for (char *at = text; *at; at++)
            if (*at == '#' && (at == text || isspace((unsigned char)at[-1])))
                *at = '\0';
        return trim(text);
    }
    char *end = strchr(text + 1, '"');
    if (!end)
        return NULL;
    *end = '\0';
    const char *rest = trim(end + 1);
    return *rest && *rest != '#' ? NULL : text + 1;
}

static int read_line(struct config *config, char *line, const char *where, struct error *error)
{
    char origin[256];
    size_t index;
    char *name = trim(line), *value = strchr(name, '=');
    if (*name == '\0' || *name == '#')
        return STATUS_OK;
    if (!value)
        return error_set(error, STATUS_INVALID, "%s'%s' is not of the form name = value", where, name);
    *value++ = '\0';
    name = trim(name);
    value = unquote(trim(value));
    if (!value)
        return error_set(error, STATUS_INVALID, "%sthe quotes around the value of %s do not match", where,
                         name);
    if (!find_option(config, name, strlen(name), &index))
        return refuse_name(config, where, "", name, strlen(name), error);
    snprintf(origin, sizeof(origin), "%s%s", where, name);
    return set_value(config, index, value, RANK_FILE, origin, error);
}

static int read_file(struct config *config, struct error *error)
{
    char *line = NULL, where[160];
    size_t capacity = 0;
    ssize_t length;
    int number = 0, status = STATUS_OK;
    if (!config->file)
        return STATUS_OK;
    FILE *file = fopen(config->file, "re");
    if (!file)
        return error_set(error, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO, "--config %s: %s",
                         config->file, strerror(errno));
    while (!status && (errno = 0, length = getline(&line, &capacity, file)) >= 0) {
        snprintf(where, sizeof(where), "%.128s:%d: ", config->file, ++number);
        if (strlen(line) != (size_t)length)
            status = error_set(error, STATUS_INVALID, "%sthe line holds a NUL byte", where);
        else
            status = read_line(config, line, where, error);
    }
    if (!status && ferror(file))
        status = error_set(error, STATUS_IO, "--config %s: %s", config->file, strerror(errno));
    free(line);
    fclose(file);
    return status;
}

static void variable_name(char *to, size_t capacity, const char *option)
{
    snprintf(to, capacity, "STRATA_%s", option);
    for (char *at = to; *at; at++)
        *at = *at == '-' ? '_' : (char)toupper((unsigned char)*at);
}

static int read_environment(struct config *config, struct error *error)
{
    char name[NAME_BYTES + 8];
    for (size_t i = 0; i < config->n_options; i++) {
        variable_name(name, sizeof(name), config->options[i].name);
        const char *text = getenv(name);
        int status = text && *text ? set_value(config, i, text, RANK_ENVIRONMENT, name, error) : STATUS_OK;
        if (status)
            return status;
    }
    const char *file = getenv("STRATA_CONFIG");
    if (!config->file && file && *file && !(config->file = strdup(file)))
        return error_set(error, STATUS_NO_MEMORY, "no memory for the options");
    return STATUS_OK;
}

bool config_switch(const char *name)
{
    const char *text = getenv(name);
    return text && *text && strcmp(text, "0") != 0;
}

void config_forget_environment(const struct option *options)
{
    char name[NAME_BYTES + 8];
    for (; options->name; options++) {
        variable_name(name, sizeof(name), options->name);
        unsetenv(name);
    }
    unsetenv("STRATA_CONFIG");
}

void config_export(const char *name, const char *value)
{
    setenv(name, value, 0);
}

static int read_defaults(struct config *config, struct error *error)
{
    int status = STATUS_OK;
    for (size_t i = 0; i < config->n_options && !status; i++)
        if (config->options[i].fallback)
            status = set_value(config, i, config->options[i].fallback, RANK_DEFAULT, config->options[i].name,
                               error);
    return status;
}

// --- the whole ---

int config_parse(struct config **out, const struct option *options, int argc, char **argv,
                 struct error *error)
{
    struct config *config = calloc(1, sizeof(*config));
    if (!config)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the options");
    config->options = options;
    while (options[config->n_options].name)
        config->n_options++;
    config->settings = calloc(config->n_options + 1, sizeof(*config->settings));
    config->help = asks_for_help(argc, argv);
    int status = config->settings ? read_defaults(config, error)
                                  : error_set(error, STATUS_NO_MEMORY, "no memory for the options");
    // With --help nothing else matters, least of all a mistake that the help would explain.
    if (!status && !config->help) {
        status = read_command_line(config, argc, argv, error);
        if (!status)
            status = read_environment(config, error);
        if (!status)
            status = read_file(config, error);
    }
    if (status)
        config_free(config);
    else
        *out = config;
    return status;
}

void config_free(struct config *config)
{
    if (!config)
        return;
    for (size_t i = 0; config->settings && i < config->n_options; i++)
        setting_free(&config->settings[i]);
    for (size_t i = 0; i < config->n_positionals; i++)
        free(config->positionals[i]);
    free(config->settings);
    free(config->positionals);
    free(config->file);
    free(config);
}

// A name that is not in the program's own table is a slip of ours, found by the first run.
static const struct setting *setting_of(const struct config *config, const char *name)
{
    size_t index;
    if (!find_option(config, name, strlen(name), &index)) {
        fprintf(stderr, "config: this program has no option '%s'\n", name);
        abort();
    }
    return &config->settings[index];
}

bool config_is_set(const struct config *config, const char *name)
{
    return setting_of(config, name)->rank > RANK_DEFAULT;
}

bool config_flag(const struct config *config, const char *name)
{
    return setting_of(config, name)->integer != 0;
}

int64_t config_int(const struct config *config, const char *name)
{
    return setting_of(config, name)->integer;
}

double config_float(const struct config *config, const char *name)
{
    return setting_of(config, name)->real;
}

const char *config_string(const struct config *config, const char *name)
{
    return setting_of(config, name)->text;
}

size_t config_list_count(const struct config *config, const char *name)
{
    return setting_of(config, name)->n_items;
}

const char *config_list(const struct config *config, const char *name, size_t index)
{
    const struct setting *setting = setting_of(config, name);
    return index < setting->n_items ? setting->items[index] : NULL;
}

size_t config_positional_count(const struct config *config)
{
    return config->n_positionals;
}

const char *config_positional(const struct config *config, size_t index)
{
    return index < config->n_positionals ? config->positionals[index] : NULL;
}

bool config_wants_help(const struct config *config)
{
    return config->help;
}

// --- help ---

// Prints `text` from column `at`, continuing lines at `indent`; ends the line. Newlines stay, and a line that
// begins with a space is an example: it is printed as it is.
static void print_wrapped(const char *text, size_t at, size_t indent)
{
    bool verbatim = *text == ' ', fresh = true; // fresh: nothing on this line yet
    while (*text) {
        size_t word = strcspn(text, verbatim ? "\n" : " \n");
        if (!fresh && at + 1 + word > COLUMNS) {
            printf("\n%*s", (int)indent, "");
            at = indent;
            fresh = true;
        }
        if (word)
            printf("%s%.*s", fresh ? "" : " ", (int)word, text);
        at += word + !fresh;
        fresh = fresh && word == 0;
        text += word;
        if (*text == '\n') {
            printf("\n%*s", text[1] && text[1] != '\n' ? (int)indent : 0, "");
            at = indent;
            fresh = true;
            verbatim = text[1] == ' ';
        }
        text += *text != '\0';
    }
    printf("\n");
}

static void print_option(const struct option *option)
{
    char label[NAME_BYTES * 2], help[1024];
    int used = option->letter ? snprintf(label, sizeof(label), "  -%c, --%s", option->letter, option->name)
                              : snprintf(label, sizeof(label), "      --%s", option->name);
    if (option->argument)
        used += snprintf(label + used, sizeof(label) - (size_t)used, " %s", option->argument);
    bool shown = option->fallback && option->fallback[0] && option->kind != OPTION_FLAG;
    snprintf(help, sizeof(help), "%s%s%s%s", option->help, shown ? " (default: " : "",
             shown ? option->fallback : "", shown ? ")" : "");
    if (used + 2 <= LABEL_COLUMNS)
        printf("%-*s", LABEL_COLUMNS, label);
    else
        printf("%s\n%*s", label, LABEL_COLUMNS, "");
    print_wrapped(help, LABEL_COLUMNS, LABEL_COLUMNS);
}

void config_print_help(const struct option *options, const char *usage, const char *text)
{
    printf("usage: %s\n\n", usage);
    if (text && *text) {
        print_wrapped(text, 0, 0);
        printf("\n");
    }
    printf("options:\n");
    for (const struct option *option = options; option->name; option++)
        print_option(option);
    for (size_t i = 0; i < N_COMMON; i++)
        print_option(&COMMON[i]);
    printf("\n");
    print_wrapped(
        "An option can also be set in the environment (--some-name as STRATA_SOME_NAME) or in the file of "
        "--config. The command line wins over the environment, and that over the file.",
        0, 0);
}
