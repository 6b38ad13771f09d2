// config: every way to say a thing, which way wins, and a sentence for every way to say it wrong.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/config.h"
#include "tests/suite.h"

static const struct option OPTIONS[] = {
    {"workers", 'w', OPTION_INT, "N", "1", "Worker processes.", 1, 64},
    {"max-sequences", 0, OPTION_INT, "N", NULL, "Sequences open at once.", 1, 1024},
    {"memory", 0, OPTION_BYTES, "BYTES", "1G", "Memory for the KV cache.", 0, 0},
    {"ratio", 'r', OPTION_FLOAT, "R", "0.5", "A ratio.", 0, 1},
    {"listen", 'l', OPTION_STRING, "ADDR", NULL, "Where to listen.", 0, 0},
    {"json", 'j', OPTION_FLAG, NULL, NULL, "Print JSON.", 0, 0},
    {"color", 0, OPTION_FLAG, NULL, "yes", "Use colors.", 0, 0},
    {"stop", 0, OPTION_LIST, "TEXT", NULL, "Where to stop.", 0, 0},
    {"offset", 0, OPTION_INT, "N", NULL, "Any whole number.", 0, 0},
    {NULL, 0, OPTION_FLAG, NULL, NULL, NULL, 0, 0},
};

static struct error error;
static struct config *config;
static char path[64];

static void set_up(void)
{
    static const char *const variables[] = {"STRATA_WORKERS", "STRATA_MAX_SEQUENCES", "STRATA_LISTEN",
                                            "STRATA_STOP", "STRATA_CONFIG"};
    for (size_t i = 0; i < sizeof(variables) / sizeof(variables[0]); i++)
        unsetenv(variables[i]);
    config = NULL;
    error = (struct error){0};
    strcpy(path, P_tmpdir "/strata-config-XXXXXX");
    close(mkstemp(path));
}

static void tear_down(void)
{
    config_free(config);
    config = NULL;
    unlink(path);
}

static int parse_words(char **argv)
{
    int argc = 0;
    while (argv[argc])
        argc++;
    config_free(config);
    config = NULL;
    return config_parse(&config, OPTIONS, argc, argv, &error);
}
#define parse(...) parse_words((char *[]){"program", __VA_ARGS__, NULL})
#define accept(...)                                                                                          \
    do {                                                                                                     \
        int status_ = parse(__VA_ARGS__);                                                                    \
        ck_assert_msg(status_ == 0, "%s", error.text);                                                       \
    } while (0)
#define refuse(says, ...)                                                                                    \
    do {                                                                                                     \
        ck_assert_int_eq(parse(__VA_ARGS__), STATUS_INVALID);                                                \
        ck_assert_str_eq(error.text, says);                                                                  \
        ck_assert_ptr_null(config);                                                                          \
    } while (0)

static void write_file(const char *text)
{
    FILE *file = fopen(path, "w");
    ck_assert_ptr_nonnull(file);
    fputs(text, file);
    fclose(file);
}

START_TEST(gives_defaults)
{
    ck_assert_int_eq(parse_words((char *[]){"program", NULL}), 0);
    ck_assert_int_eq(config_int(config, "workers"), 1);
    ck_assert_int_eq(config_int(config, "memory"), 1 << 30);
    ck_assert(config_float(config, "ratio") == 0.5);
    ck_assert_ptr_null(config_string(config, "listen"));
    ck_assert(!config_flag(config, "json") && config_flag(config, "color"));
    ck_assert_int_eq(config_int(config, "max-sequences"), 0);
    ck_assert(!config_is_set(config, "workers") && !config_is_set(config, "listen"));
    ck_assert_uint_eq(config_positional_count(config), 0);
    ck_assert_ptr_null(config_positional(config, 0));
    ck_assert(!config_wants_help(config));
}
END_TEST

START_TEST(reads_every_form)
{
    accept("-w", "2", "--max-sequences=32", "--memory", "512M", "-r0.25", "--listen", "unix:/x", "-j",
           "--no-color", "--offset", "-5");
    ck_assert_int_eq(config_int(config, "workers"), 2);
    ck_assert_int_eq(config_int(config, "max-sequences"), 32);
    ck_assert_int_eq(config_int(config, "memory"), 512 << 20);
    ck_assert(config_float(config, "ratio") == 0.25);
    ck_assert_str_eq(config_string(config, "listen"), "unix:/x");
    ck_assert(config_flag(config, "json") && !config_flag(config, "color"));
    ck_assert_int_eq(config_int(config, "offset"), -5);
    ck_assert(config_is_set(config, "color") && config_is_set(config, "workers"));
    accept("--json=off", "--color=TRUE", "--listen=", "--workers", "3", "--workers", "4", "--offset=-0");
    ck_assert(!config_flag(config, "json") && config_flag(config, "color"));
    ck_assert_str_eq(config_string(config, "listen"), "");
    ck_assert_int_eq(config_int(config, "workers"), 4);
    accept("--listen", "-", "--ratio", ".5");
    ck_assert_str_eq(config_string(config, "listen"), "-");
}
END_TEST

START_TEST(separates_positionals)
{
    accept("one", "--workers", "2", "-", "", "--", "--json", "-x");
    ck_assert_uint_eq(config_positional_count(config), 5);
    static const char *const words[] = {"one", "-", "", "--json", "-x"};
    for (size_t i = 0; i < 5; i++)
        ck_assert_str_eq(config_positional(config, i), words[i]);
    ck_assert_ptr_null(config_positional(config, 5));
    ck_assert(!config_flag(config, "json"));
}
END_TEST

START_TEST(reads_byte_counts)
{
    static const struct {
        char *text;
        int64_t bytes;
    } cases[] = {{"0", 0},         {"4096", 4096},    {"1k", 1024},      {"1K", 1024},
                 {"3MB", 3 << 20}, {"2MiB", 2 << 20}, {"8T", 8ll << 40}, {"5Gb", 5ll << 30}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        accept("--memory", cases[i].text);
        ck_assert_int_eq(config_int(config, "memory"), cases[i].bytes);
    }
    static char *const bad[] = {
        "", "M", "1X", "1MM", "1MiBs", "-1", "1.5G", "9999999999T", "99999999999999999999", " 1"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        char word[64];
        snprintf(word, sizeof(word), "--memory=%s", bad[i]);
        ck_assert_msg(parse(word) == STATUS_INVALID, "'%s' was taken", bad[i]);
        ck_assert_ptr_nonnull(strstr(error.text, "is not a number of bytes such as 512M or 2G"));
    }
}
END_TEST

START_TEST(refuses_bad_words)
{
    refuse("--workers: 'two' is not a whole number", "--workers", "two");
    refuse("--workers: '2x' is not a whole number", "--workers=2x");
    refuse("-w: '2K' is not a whole number", "-w", "2K");
    refuse("--workers: 65 is not between 1 and 64", "--workers", "65");
    refuse("-w: 0 is not between 1 and 64", "-w0");
    refuse("--offset: '99999999999999999999' is not a whole number", "--offset", "99999999999999999999");
    refuse("--ratio: 'nan' is not a number", "--ratio", "nan");
    refuse("--ratio: '0.5x' is not a number", "--ratio", "0.5x");
    refuse("--ratio: 1.5 is not between 0 and 1", "--ratio", "1.5");
    refuse("--json: 'maybe' is not yes or no", "--json=maybe");
    refuse("--listen needs a value", "--listen");
    refuse("--listen needs a value", "--listen", "--json");
    refuse("-l needs a value", "-l", "-j");
    refuse("unknown option --max-sequence; did you mean --max-sequences?", "--max-sequence", "3");
    refuse("unknown option --wrokers; did you mean --workers?", "--wrokers=3");
    refuse("unknown option --max; did you mean --max-sequences?", "--max");
    refuse("unknown option --quantum; --help lists them", "--quantum");
    refuse("unknown option --no-workers; --help lists them", "--no-workers");
    refuse("unknown option -x; --help lists them", "-x");
    refuse("unknown option -jx; --help lists them", "-jx");
    refuse("unknown option --; --help lists them", "--=3");
}
END_TEST

START_TEST(reads_a_file)
{
    write_file("# the pool\n\n  workers = 3   # processes\nlisten=\"unix:/a # b \" # quoted\n\tjson = "
               "yes\r\nmemory = 2G");
    accept("--config", path);
    ck_assert_int_eq(config_int(config, "workers"), 3);
    ck_assert_str_eq(config_string(config, "listen"), "unix:/a # b ");
    ck_assert(config_flag(config, "json"));
    ck_assert_int_eq(config_int(config, "memory"), 2ll << 30);
    ck_assert(config_is_set(config, "memory"));
    write_file("listen = a#b\n");
    accept("--config", path);
    ck_assert_str_eq(config_string(config, "listen"), "a#b");
}
END_TEST

START_TEST(refuses_a_bad_file)
{
    static const struct {
        const char *text, *says;
    } cases[] = {{"workers\n", ":1: 'workers' is not of the form name = value"},
                 {"\nworkers = many\n", ":2: workers: 'many' is not a whole number"},
                 {"worker = 2\n", ":1: unknown option worker; did you mean workers?"},
                 {"listen = \"half\n", ":1: the quotes around the value of listen do not match"},
                 {"listen = \"a\" b\n", ":1: the quotes around the value of listen do not match"},
                 {" = 2\n", ":1: unknown option ; --help lists them"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char says[256];
        write_file(cases[i].text);
        snprintf(says, sizeof(says), "%s%s", path, cases[i].says);
        refuse(says, "--config", path);
    }
    FILE *file = fopen(path, "w");
    fwrite("json = \0yes\n", 1, 12, file);
    fclose(file);
    ck_assert_int_eq(parse("--config", path), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "NUL"));
    ck_assert_int_eq(parse("--config", "absent.conf"), STATUS_NOT_FOUND);
    ck_assert_str_eq(error.text, "--config absent.conf: No such file or directory");
    ck_assert_int_eq(parse("--config", P_tmpdir), STATUS_IO);
    refuse("--config needs a value", "--config");
}
END_TEST

START_TEST(later_places_win)
{
    write_file("workers = 3\nmax-sequences = 3\nratio = 0.3\n");
    setenv("STRATA_WORKERS", "4", 1);
    setenv("STRATA_MAX_SEQUENCES", "4", 1);
    setenv("STRATA_LISTEN", "", 1); // empty is unset
    setenv("STRATA_UNRELATED", "x", 1);
    accept("--workers", "5", "--config", path);
    ck_assert_int_eq(config_int(config, "workers"), 5);
    ck_assert_int_eq(config_int(config, "max-sequences"), 4);
    ck_assert(config_float(config, "ratio") == 0.3);
    ck_assert(!config_is_set(config, "listen"));
    setenv("STRATA_CONFIG", path, 1);
    accept("--workers", "5");
    ck_assert(config_float(config, "ratio") == 0.3);
    // A mistake counts even where something else wins.
    setenv("STRATA_WORKERS", "4x", 1);
    refuse("STRATA_WORKERS: '4x' is not a whole number", "--workers", "5");
}
END_TEST

START_TEST(help_needs_nothing_else)
{
    accept("--quantum", "--help");
    ck_assert(config_wants_help(config));
    accept("-h");
    ck_assert(config_wants_help(config));
    accept("--", "--help");
    ck_assert(!config_wants_help(config));
    ck_assert_uint_eq(config_positional_count(config), 1);
}
END_TEST

START_TEST(prints_help)
{
    static const struct option options[] = {
        {"workers", 'w', OPTION_INT, "N", "1",
         "Worker processes to start. Each owns one device and holds one stage of the model, a contiguous "
         "range of its layers.",
         1, 64},
        {"a-name-that-is-rather-long", 0, OPTION_STRING, "VALUE", NULL, "Short.", 0, 0},
        {"json", 0, OPTION_FLAG, NULL, "no", "Print JSON.", 0, 0},
        {NULL, 0, OPTION_FLAG, NULL, NULL, NULL, 0, 0},
    };
    static const char expected[] =
        "usage: strata plan MODEL [options]\n"
        "\n"
        "Prints the stages a model would be split into, without loading it: their layers, the bytes of "
        "their\n"
        "weights and what a position of context costs.\n"
        "\n"
        "    strata plan m.gguf --workers 4\n"
        "\n"
        "options:\n"
        "  -w, --workers N             Worker processes to start. Each owns one device and holds one stage "
        "of\n"
        "                              the model, a contiguous range of its layers. (default: 1)\n"
        "      --a-name-that-is-rather-long VALUE\n"
        "                              Short.\n"
        "      --json                  Print JSON.\n"
        "      --config FILE           Read options from this file first: lines 'name = value', # comments.\n"
        "  -h, --help                  Print this and exit.\n"
        "\n"
        "An option can also be set in the environment (--some-name as STRATA_SOME_NAME) or in the file of\n"
        "--config. The command line wins over the environment, and that over the file.\n";
    char printed[4096] = "";
    ck_assert_ptr_nonnull(freopen(path, "w", stdout));
    config_print_help(
        options, "strata plan MODEL [options]",
        "Prints the stages a model would be split into, without loading it: their layers, the bytes of "
        "their weights and what a position of context costs.\n\n    strata plan m.gguf --workers 4");
    fflush(stdout);
    FILE *file = fopen(path, "r");
    printed[fread(printed, 1, sizeof(printed) - 1, file)] = '\0';
    fclose(file);
    ck_assert_str_eq(printed, expected);
}
END_TEST

START_TEST(forgets_what_it_read)
{
    setenv("STRATA_LISTEN", "here", 1);
    setenv("STRATA_CONFIG", path, 1);
    setenv("STRATA_MAX_SEQUENCES", "7", 1);
    setenv("STRATA_LISTENER", "another's", 1);
    accept("-w", "2");
    config_forget_environment(OPTIONS);
    ck_assert_str_eq(config_string(config, "listen"), "here");
    ck_assert_int_eq(config_int(config, "max-sequences"), 7);
    ck_assert_ptr_null(getenv("STRATA_LISTEN"));
    ck_assert_ptr_null(getenv("STRATA_CONFIG"));
    ck_assert_ptr_null(getenv("STRATA_MAX_SEQUENCES"));
    ck_assert_str_eq(getenv("STRATA_LISTENER"), "another's");
    unsetenv("STRATA_LISTENER");
}
END_TEST

START_TEST(collects_lists)
{
    accept("--stop", "one");
    ck_assert_uint_eq(config_list_count(config, "stop"), 1);
    accept("--stop", "one", "--stop=two, three", "--stop=");
    ck_assert_uint_eq(config_list_count(config, "stop"), 3);
    ck_assert_str_eq(config_list(config, "stop", 0), "one");
    ck_assert_str_eq(config_list(config, "stop", 1), "two, three");
    ck_assert_str_eq(config_list(config, "stop", 2), "");
    ck_assert_ptr_null(config_list(config, "stop", 3));
    setenv("STRATA_STOP", "weaker", 1);
    accept("--stop", "stronger");
    ck_assert_uint_eq(config_list_count(config, "stop"), 1);
    ck_assert_str_eq(config_list(config, "stop", 0), "stronger");
    accept("word");
    ck_assert_uint_eq(config_list_count(config, "stop"), 1);
    ck_assert_str_eq(config_list(config, "stop", 0), "weaker");
    unsetenv("STRATA_STOP");
    accept("word");
    ck_assert_uint_eq(config_list_count(config, "stop"), 0);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("config");
    TCase *all = tcase_create("all");
    tcase_add_checked_fixture(all, set_up, tear_down);
    tcase_add_test(all, gives_defaults);
    tcase_add_test(all, reads_every_form);
    tcase_add_test(all, collects_lists);
    tcase_add_test(all, separates_positionals);
    tcase_add_test(all, reads_byte_counts);
    tcase_add_test(all, refuses_bad_words);
    tcase_add_test(all, reads_a_file);
    tcase_add_test(all, refuses_a_bad_file);
    tcase_add_test(all, later_places_win);
    tcase_add_test(all, help_needs_nothing_else);
    tcase_add_test(all, prints_help);
    tcase_add_test(all, forgets_what_it_read);
    suite_add_tcase(suite, all);
    return suite;
}
