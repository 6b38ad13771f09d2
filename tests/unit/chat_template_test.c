// The coordinator's side of chat templates: answers in order, and a helper process that is missing, broken,
// slow or killed becomes a sentence and a status, not a hang. What templates can do is
// chat_template_helper_test.py's.
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"
#include "coordinator/chat_template.h"
#include "tests/suite.h"

enum { MOST_ANSWERS = 400 };

struct answer {
    int status;
    char *text;
    size_t length;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct answer answers[MOST_ANSWERS];
static int n_answers;
static struct error error;
static char helper[1024];

static void set_up(void)
{
    const char *folder = getenv("STRATA_TEST_SOURCE");
    snprintf(helper, sizeof(helper), "%s/coordinator/chat_template.py", folder ? folder : ".");
    log_init("test", LOG_ERROR, 0);
    n_answers = 0;
    error = (struct error){0};
}

static void tear_down(void)
{
    for (int i = 0; i < n_answers; i++)
        free(answers[i].text);
}

static struct chat_template *open_template(const char *source, int64_t timeout_us)
{
    struct chat_template_options options = {
        .source = source, .bos = "<s>", .eos = "</s>", .helper = helper, .timeout_us = timeout_us};
    struct chat_template *chat;
    ck_assert_msg(chat_template_new(&chat, &options, &error) == 0, "%s", error.text);
    return chat;
}

static void on_done(void *context, int status, const char *text, size_t length)
{
    (void)context;
    pthread_mutex_lock(&mutex);
    struct answer *answer = &answers[n_answers++];
    *answer = (struct answer){status, malloc(length + 1), length};
    memcpy(answer->text, text, length);
    answer->text[length] = '\0';
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

static void ask(struct chat_template *chat, const char *content)
{
    char request[512];
    snprintf(request, sizeof(request), "{\"messages\": [{\"role\": \"user\", \"content\": \"%s\"}]}",
             content);
    int status = chat_template_render(chat, request, on_done, NULL, &error);
    ck_assert_msg(status == 0, "%s", error.text);
}

static struct answer *wait_for(int which)
{
    pthread_mutex_lock(&mutex);
    while (n_answers <= which)
        pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    return &answers[which];
}

// The next answer must have this status and contain this.
static void answers_with(int which, int status, const char *part)
{
    struct answer *answer = wait_for(which);
    ck_assert_msg(answer->status == status, "status %d: %s", answer->status, answer->text);
    ck_assert_msg(strstr(answer->text, part) != NULL, "'%s' is not in '%s'", part, answer->text);
}

// Spins on demand, so that one template can be slow and quick.
#define SPIN                                                                                                 \
    "{% if messages[0].content == 'spin' %}{% for i in range(99999) %}{% for j in range(99999) %}"           \
    "{% endfor %}{% endfor %}{% endif %}"

START_TEST(messages_are_rendered_in_order)
{
    struct chat_template *chat = open_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", 0);
    for (int i = 0; i < 100; i++) {
        char content[32];
        snprintf(content, sizeof(content), "number %d \\u00e9", i);
        ask(chat, content);
    }
    for (int i = 0; i < 100; i++) {
        char expected[64];
        snprintf(expected, sizeof(expected), "<s>number %d \u00e9</s>", i);
        ck_assert_int_eq(wait_for(i)->status, 0);
        ck_assert_str_eq(answers[i].text, expected);
    }
    chat_template_free(chat);
}
END_TEST

START_TEST(large_prompts_pass)
{
    struct chat_template *chat = open_template("{{ messages[0].content * 1000000 }}", 20000000);
    ask(chat, "abc");
    struct answer *answer = wait_for(0);
    ck_assert_int_eq(answer->status, 0);
    ck_assert_uint_eq(answer->length, 3000000);
    chat_template_free(chat);
}
END_TEST

START_TEST(a_models_own_refusal_reaches_the_caller)
{
    struct chat_template *chat = open_template("{{ raise_exception('roles must alternate') }}", 0);
    ask(chat, "x");
    answers_with(0, STATUS_INVALID, "roles must alternate");
    chat_template_free(chat);
    chat = open_template("{{ ''.__class__.mro() }}", 0);
    ask(chat, "x");
    answers_with(1, STATUS_INVALID, "SecurityError");
    chat_template_free(chat);
}
END_TEST

START_TEST(no_template_is_a_sentence)
{
    struct chat_template_options options = {0};
    struct chat_template *chat;
    ck_assert_int_eq(chat_template_new(&chat, &options, &error), 0);
    ck_assert_int_eq(chat_template_render(chat, "{}", on_done, NULL, &error), STATUS_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(error.text, "no chat template"));
    chat_template_free(chat);
    chat_template_free(NULL);
}
END_TEST

START_TEST(a_broken_template_is_reported_each_time)
{
    struct chat_template *chat = open_template("{% if %}", 0);
    ask(chat, "x");
    ask(chat, "y");
    answers_with(0, STATUS_UNSUPPORTED, "does not compile");
    answers_with(1, STATUS_UNSUPPORTED, "does not compile");
    chat_template_free(chat);
}
END_TEST

START_TEST(a_missing_interpreter_is_a_sentence)
{
    struct chat_template_options options = {
        .source = "x", .helper = helper, .python = "/nonexistent/python3"};
    struct chat_template *chat;
    ck_assert_int_eq(chat_template_new(&chat, &options, &error), 0);
    ask(chat, "x");
    answers_with(0, STATUS_UNAVAILABLE, "apt install python3-jinja2");
    chat_template_free(chat);
}
END_TEST

START_TEST(a_missing_helper_is_a_sentence)
{
    struct chat_template_options options = {.source = "x", .helper = "/nonexistent/chat_template.py"};
    struct chat_template *chat;
    ck_assert_int_eq(chat_template_new(&chat, &options, &error), 0);
    ask(chat, "x");
    answers_with(0, STATUS_UNAVAILABLE, "/nonexistent/chat_template.py");
    chat_template_free(chat);
}
END_TEST

// Runs `script` in place of the interpreter.
static void with_interpreter(const char *script, int status, const char *part)
{
    char path[] = P_tmpdir "/strata-python-XXXXXX";
    int file = mkstemp(path);
    ck_assert_int_ge(file, 0);
    ck_assert_int_eq(write(file, script, strlen(script)), (ssize_t)strlen(script));
    ck_assert_int_eq(fchmod(file, 0700), 0);
    close(file);
    struct chat_template_options options = {.source = "x", .helper = helper, .python = path};
    struct chat_template *chat;
    ck_assert_int_eq(chat_template_new(&chat, &options, &error), 0);
    int before = n_answers;
    ask(chat, "x");
    answers_with(before, status, part);
    chat_template_free(chat);
    unlink(path);
}

START_TEST(odd_interpreters_are_sentences)
{
    // Without site packages there is no jinja2.
    with_interpreter("#!/bin/sh\nexec /usr/bin/python3 -S \"$@\"\n", STATUS_UNAVAILABLE, "python3-jinja2");
    with_interpreter("#!/bin/sh\nexit 3\n", STATUS_UNAVAILABLE, "ended at once");
    with_interpreter("#!/bin/sh\nprintf '\\377\\377\\377\\377'\nsleep 1\n", STATUS_EXHAUSTED, "bytes");
    with_interpreter("#!/bin/sh\nprintf '\\0\\0\\0\\4{{{{'\nsleep 1\n", STATUS_UNAVAILABLE, "died");
}
END_TEST

START_TEST(a_template_that_spins_is_ended)
{
    struct chat_template *chat = open_template(SPIN "done", 1000000);
    ask(chat, "hello");
    answers_with(0, 0, "done");
    int64_t start = clock_now_us();
    ask(chat, "spin");
    answers_with(1, STATUS_DEADLINE, "1.0 s");
    int64_t took = clock_now_us() - start;
    ck_assert_int_ge(took, 1000000);
    ask(chat, "hello");
    answers_with(2, 0, "done");
    chat_template_free(chat);
}
END_TEST

// Whether /proc/NAME is a child of ours that runs the helper.
static bool is_helper(const char *name)
{
    char path[300], text[1024] = "";
    int parent = 0;
    snprintf(path, sizeof(path), "/proc/%s/stat", name);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    int fields = fscanf(file, "%*d (%*[^)]) %*c %d", &parent);
    fclose(file);
    snprintf(path, sizeof(path), "/proc/%s/cmdline", name);
    file = fopen(path, "r");
    size_t length = file ? fread(text, 1, sizeof(text) - 1, file) : 0;
    if (file)
        fclose(file);
    return fields == 1 && parent == getpid() && memmem(text, length, "chat_template.py", 16) != NULL;
}

static pid_t find_helper(pid_t other_than)
{
    for (int tries = 0; tries < 6000; tries++) {
        DIR *processes = opendir("/proc");
        long found = 0;
        for (struct dirent *entry; (entry = readdir(processes));) {
            long pid = strtol(entry->d_name, NULL, 10);
            if (pid > 0 && pid != other_than && is_helper(entry->d_name))
                found = pid;
        }
        closedir(processes);
        if (found)
            return (pid_t)found;
        clock_sleep_us(10000);
    }
    ck_abort_msg("no helper process");
}

START_TEST(a_helper_that_is_killed_starts_again)
{
    struct chat_template *chat = open_template(SPIN "done", 60000000);
    ask(chat, "hello");
    answers_with(0, 0, "done");
    pid_t first = find_helper(0);
    ck_assert_int_eq(kill(first, SIGKILL), 0); // idle
    ask(chat, "hello");
    answers_with(1, 0, "done");
    pid_t second = find_helper(first);

    ask(chat, "spin");
    clock_sleep_us(100000);
    ck_assert_int_eq(kill(second, SIGKILL), 0); // busy: the job gets a second chance
    pid_t third = find_helper(second);
    clock_sleep_us(100000);
    ck_assert_int_eq(kill(third, SIGKILL), 0);
    answers_with(2, STATUS_UNAVAILABLE, "helper");
    ask(chat, "hello");
    answers_with(3, 0, "done");
    chat_template_free(chat);
}
END_TEST

START_TEST(the_queue_is_bounded)
{
    struct chat_template_options options = {
        .source = SPIN "done", .helper = helper, .timeout_us = 1500000, .max_waiting = 4};
    struct chat_template *chat;
    ck_assert_int_eq(chat_template_new(&chat, &options, &error), 0);
    ask(chat, "hello");
    wait_for(0);
    ask(chat, "spin");
    int accepted = 0, status;
    static const char hello[] = "{\"messages\": [{\"content\": \"hello\"}]}";
    while ((status = chat_template_render(chat, hello, on_done, NULL, &error)) == 0)
        accepted++;
    ck_assert_int_eq(status, STATUS_EXHAUSTED);
    ck_assert_int_ge(accepted, 3);
    ck_assert_int_le(accepted, 5);
    answers_with(1, STATUS_DEADLINE, "took more than");
    for (int i = 0; i < accepted; i++)
        answers_with(2 + i, 0, "done");
    chat_template_free(chat);
}
END_TEST

START_TEST(freeing_answers_everything)
{
    struct chat_template *chat = open_template(SPIN "done", 60000000);
    ask(chat, "hello");
    wait_for(0);
    ask(chat, "spin");
    ask(chat, "hello");
    ask(chat, "hello");
    pid_t child = find_helper(0);
    int64_t start = clock_now_us();
    chat_template_free(chat);
    ck_assert_int_lt(clock_now_us() - start, 30000000);
    for (int i = 1; i < 4; i++)
        answers_with(i, STATUS_UNAVAILABLE, "shutting down");
    ck_assert_int_eq(kill(child, 0), -1); // and nothing is left running
    ck_assert_int_eq(errno, ESRCH);
}
END_TEST

START_TEST(bad_requests_are_sentences)
{
    struct chat_template *chat = open_template("{{ messages[0].content }}", 0);
    ck_assert_int_eq(chat_template_render(chat, "{\"messages\": 3}", on_done, NULL, &error), 0);
    answers_with(0, STATUS_INVALID, "chat template");
    chat_template_free(chat);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("chat template");
    TCase *tests = tcase_create("chat template");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, no_template_is_a_sentence);
    tcase_add_test(tests, a_missing_interpreter_is_a_sentence);
    tcase_add_test(tests, a_missing_helper_is_a_sentence);
    if (system("/usr/bin/python3 -c 'import jinja2' 2>/dev/null") == 0) {
        tcase_add_test(tests, messages_are_rendered_in_order);
        tcase_add_test(tests, large_prompts_pass);
        tcase_add_test(tests, a_models_own_refusal_reaches_the_caller);
        tcase_add_test(tests, a_broken_template_is_reported_each_time);
        tcase_add_test(tests, odd_interpreters_are_sentences);
        tcase_add_test(tests, a_template_that_spins_is_ended);
        tcase_add_test(tests, a_helper_that_is_killed_starts_again);
        tcase_add_test(tests, the_queue_is_bounded);
        tcase_add_test(tests, freeing_answers_everything);
        tcase_add_test(tests, bad_requests_are_sentences);
    } else {
        printf("skipped: rendering, as there is no python3-jinja2 here\n");
    }
    suite_add_tcase(suite, tests);
    return suite;
}
