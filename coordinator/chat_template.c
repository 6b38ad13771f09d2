// Chat templates are programs in Jinja2 that come with a model, so Jinja2 itself runs them, in a process of
// their own (chat_template.py) that may crash, spin or eat memory without harm. One thread owns that process:
// it takes jobs from a bounded queue, starts the process when the first one comes, writes a frame and waits
// for the answer under a time limit. A process that overruns is killed; one that dies on its own is started
// again and given the job once more.
#include "coordinator/chat_template.h"

#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/queue.h"

enum {
    DEFAULT_TIMEOUT_US = 5000000,
    START_TIMEOUT_US = 30000000, // an interpreter on a busy machine
    DEFAULT_WAITING = 256,
    MAX_ANSWER_BYTES = 4 * MAX_MESSAGE_BYTES,
    FRAME_HEAD = 4,
    PATH_BYTES = 4096,
};

typedef void render_done(void *context, int status, const char *text, size_t length);

struct job {
    char *request; // owned
    render_done *done;
    void *context;
};

struct chat_template {
    char *source, *bos, *eos, *python, *helper;
    int64_t timeout_us;
    struct queue *jobs;
    pthread_t thread;
    bool has_thread;
    int wake; // an eventfd: readable once the template is being freed

    // The thread's own.
    pid_t pid; // 0 = no helper runs
    int socket;
    struct error broken; // the template does not compile: said once and for all
};

// --- the helper process ---

static void helper_stop(struct chat_template *chat)
{
    if (chat->pid == 0)
        return;
    close(chat->socket);
    kill(chat->pid, SIGKILL);
    while (waitpid(chat->pid, NULL, 0) < 0 && errno == EINTR)
        continue;
    chat->pid = 0;
}

// The child gets one end of the socket as its input and output and nothing else of ours: no descriptors, no
// blocked or ignored signals, no environment, and a process group of its own, so that a Ctrl-C ends it only
// with us. posix_spawn, because fork in a process with threads may copy a held lock.
static int spawn(struct chat_template *chat, int child_end)
{
    char *arguments[] = {chat->python, "-I", "-B", chat->helper, NULL};
    char *environment[] = {"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C.UTF-8", NULL};
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    int result = posix_spawn_file_actions_init(&actions);
    if (result)
        return result;
    result = posix_spawnattr_init(&attributes);
    if (result) {
        posix_spawn_file_actions_destroy(&actions);
        return result;
    }
    posix_spawn_file_actions_adddup2(&actions, child_end, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, child_end, STDOUT_FILENO);
    posix_spawn_file_actions_addclosefrom_np(&actions, STDERR_FILENO + 1);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(&attributes,
                             POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    result = posix_spawn(&chat->pid, chat->python, &actions, &attributes, arguments, environment);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    return result;
}

// Waits until the socket is ready for `events`. STATUS_DEADLINE, or STATUS_CANCELLED when we are being freed.
static int wait_ready(struct chat_template *chat, short events, int64_t deadline)
{
    struct pollfd polled[2] = {{chat->socket, events, 0}, {chat->wake, POLLIN, 0}};
    for (;;) {
        int64_t left = deadline - clock_now_us();
        if (left <= 0)
            return STATUS_DEADLINE;
        int64_t milliseconds = (left + 999) / 1000;
        int count = poll(polled, 2, milliseconds > 1000 ? 1000 : (int)milliseconds);
        if (count < 0 && errno != EINTR)
            return STATUS_IO;
        if (count > 0 && polled[1].revents)
            return STATUS_CANCELLED;
        if (count > 0)
            return 0;
    }
}

// Moves exactly `length` bytes one way. STATUS_IO when the helper is gone.
static int transfer(struct chat_template *chat, bool sending, void *bytes, size_t length, int64_t deadline)
{
    char *at = bytes;
    while (length) {
        int status = wait_ready(chat, sending ? POLLOUT : POLLIN, deadline);
        if (status)
            return status;
        ssize_t moved = sending ? send(chat->socket, at, length, MSG_NOSIGNAL | MSG_DONTWAIT)
                                : recv(chat->socket, at, length, MSG_DONTWAIT);
        if (moved == 0 || (moved < 0 && errno != EAGAIN && errno != EINTR))
            return STATUS_IO;
        if (moved > 0) {
            at += moved;
            length -= (size_t)moved;
        }
    }
    return 0;
}

static int send_frame(struct chat_template *chat, char *body, size_t length, int64_t deadline)
{
    unsigned char head[FRAME_HEAD] = {(unsigned char)(length >> 24), (unsigned char)(length >> 16),
                                      (unsigned char)(length >> 8), (unsigned char)length};
    int status = transfer(chat, true, head, sizeof(head), deadline);
    return status ? status : transfer(chat, true, body, length, deadline);
}

// The next answer, parsed.
static int receive_frame(struct chat_template *chat, json_t **answer, int64_t deadline)
{
    unsigned char head[FRAME_HEAD];
    int status = transfer(chat, false, head, sizeof(head), deadline);
    if (status)
        return status;
    size_t length = (size_t)head[0] << 24 | (size_t)head[1] << 16 | (size_t)head[2] << 8 | head[3];
    if (length > MAX_ANSWER_BYTES)
        return STATUS_EXHAUSTED;
    char *body = malloc(length + 1);
    if (!body)
        return STATUS_NO_MEMORY;
    status = transfer(chat, false, body, length, deadline);
    if (!status) {
        *answer = json_loadb(body, length, JSON_ALLOW_NUL, NULL);
        status = *answer ? 0 : STATUS_INTERNAL;
    }
    free(body);
    return status;
}

// What an answer's error means to a client.
static int answer_status(const json_t *answer)
{
    const char *kind = json_string_value(json_object_get(answer, "kind"));
    if (!kind)
        return STATUS_INTERNAL;
    if (strcmp(kind, "missing") == 0)
        return STATUS_UNAVAILABLE;
    return strcmp(kind, "broken") == 0 ? STATUS_UNSUPPORTED : STATUS_INVALID;
}

static int transport_error(struct chat_template *chat, int status, struct error *error)
{
    switch (status) {
    case STATUS_DEADLINE:
        return error_set(error, status, "rendering the chat template took more than %.1f s",
                         (double)chat->timeout_us / 1e6);
    case STATUS_CANCELLED:
        return error_set(error, STATUS_UNAVAILABLE, "the server is shutting down");
    case STATUS_EXHAUSTED:
        return error_set(error, status, "the chat template rendered more than %d bytes", MAX_ANSWER_BYTES);
    case STATUS_NO_MEMORY:
        return error_set(error, status, "no memory to render the chat template");
    default:
        return error_set(error, STATUS_UNAVAILABLE, "the chat template's helper process died");
    }
}

// Sends the template and learns whether it compiles.
static int handshake(struct chat_template *chat, struct error *error)
{
    json_t *setup = json_pack("{s:s, s:s, s:s, s:f}", "template", chat->source, "bos_token", chat->bos,
                              "eos_token", chat->eos, "timeout", (double)chat->timeout_us / 1e6);
    char *text = setup ? json_dumps(setup, JSON_COMPACT) : NULL;
    json_decref(setup);
    if (!text)
        return error_set(error, STATUS_UNSUPPORTED, "the model's chat template is not UTF-8 text");
    int64_t deadline = clock_now_us() + START_TIMEOUT_US;
    json_t *answer = NULL;
    int status = send_frame(chat, text, strlen(text), deadline);
    if (!status)
        status = receive_frame(chat, &answer, deadline);
    free(text);
    if (status == STATUS_IO)
        return error_set(error, STATUS_UNAVAILABLE, "the chat template's helper (%s %s) ended at once",
                         chat->python, chat->helper);
    if (status == STATUS_DEADLINE)
        return error_set(error, STATUS_UNAVAILABLE, "the chat template's helper did not start within %d s",
                         START_TIMEOUT_US / 1000000);
    if (status)
        return transport_error(chat, status, error);
    const char *sentence = json_string_value(json_object_get(answer, "error"));
    if (sentence) {
        status = error_set(error, answer_status(answer), "%s", sentence);
        if (status == STATUS_UNSUPPORTED)
            chat->broken = *error;
    }
    json_decref(answer);
    return status;
}

static int helper_start(struct chat_template *chat, struct error *error)
{
    if (chat->broken.status) {
        *error = chat->broken;
        return error->status;
    }
    if (access(chat->helper, R_OK) != 0)
        return error_set(error, STATUS_UNAVAILABLE, "cannot read the chat template's helper %s: %s",
                         chat->helper, strerror(errno));
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
        return error_set(error, STATUS_UNAVAILABLE, "no socket for the chat template's helper: %s",
                         strerror(errno));
    int result = spawn(chat, ends[1]);
    close(ends[1]);
    if (result) {
        close(ends[0]);
        chat->pid = 0;
        return error_set(
            error, STATUS_UNAVAILABLE,
            "chat templates need python3 and python3-jinja2 (apt install python3-jinja2): cannot "
            "start %s: %s",
            chat->python, strerror(result));
    }
    chat->socket = ends[0];
    int status = handshake(chat, error);
    if (status)
        helper_stop(chat);
    else
        log_debug("chat template helper %d started", (int)chat->pid);
    return status;
}

// --- jobs ---

// One try at one job. STATUS_IO: the helper died meanwhile.
static int attempt(struct chat_template *chat, const struct job *job, json_t **answer, struct error *error)
{
    if (chat->pid == 0) {
        int status = helper_start(chat, error);
        if (status)
            return status;
    }
    int64_t deadline = clock_now_us() + chat->timeout_us;
    int status = send_frame(chat, job->request, strlen(job->request), deadline);
    if (!status)
        status = receive_frame(chat, answer, deadline);
    if (!status)
        return 0;
    helper_stop(chat); // it is dead, or in the middle of something nobody waits for
    transport_error(chat, status, error);
    return status == STATUS_IO ? STATUS_IO : error->status;
}

static void job_run(struct chat_template *chat, const struct job *job)
{
    struct error error = {0};
    json_t *answer = NULL;
    int status = attempt(chat, job, &answer, &error);
    if (status == STATUS_IO) {
        log_warn("the chat template's helper process died; starting it again");
        status = attempt(chat, job, &answer, &error);
    }
    if (status) {
        job->done(job->context, error.status, error.text, strlen(error.text));
        return;
    }
    const json_t *text = json_object_get(answer, "text");
    const char *sentence = json_string_value(json_object_get(answer, "error"));
    if (json_is_string(text)) {
        job->done(job->context, 0, json_string_value(text), json_string_length(text));
    } else {
        status = error_set(&error, answer_status(answer), "%s",
                           sentence ? sentence : "the chat template's helper gave no answer");
        job->done(job->context, status, error.text, strlen(error.text));
    }
    json_decref(answer);
}

static bool is_closing(const struct chat_template *chat)
{
    struct pollfd polled = {chat->wake, POLLIN, 0};
    return poll(&polled, 1, 0) > 0;
}

static void *run(void *context)
{
    struct chat_template *chat = context;
    struct job job;
    while (queue_pop(chat->jobs, &job, -1) == 0) {
        static const char closing[] = "the server is shutting down";
        if (is_closing(chat))
            job.done(job.context, STATUS_UNAVAILABLE, closing, sizeof(closing) - 1);
        else
            job_run(chat, &job);
        free(job.request);
    }
    helper_stop(chat);
    return NULL;
}

// --- the interface ---

// chat_template.py beside the running program.
static char *default_helper(void)
{
    char path[PATH_BYTES];
    ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (length <= 0)
        return NULL;
    path[length] = '\0';
    *strrchr(path, '/') = '\0';
    char *helper;
    return asprintf(&helper, "%s/chat_template.py", path) < 0 ? NULL : helper;
}

static int start_thread(struct chat_template *chat, uint32_t max_waiting, struct error *error)
{
    int status = queue_new(&chat->jobs, sizeof(struct job), max_waiting ? max_waiting : DEFAULT_WAITING);
    if (status)
        return error_set(error, status, "no memory for the chat template's queue");
    chat->wake = eventfd(0, EFD_CLOEXEC);
    if (chat->wake < 0)
        return error_set(error, STATUS_IO, "chat template: %s", strerror(errno));
    int result = pthread_create(&chat->thread, NULL, run, chat);
    if (result)
        return error_set(error, STATUS_IO, "no thread for the chat template: %s", strerror(result));
    chat->has_thread = true;
    return 0;
}

int chat_template_new(struct chat_template **out, const struct chat_template_options *options,
                      struct error *error)
{
    struct chat_template *chat = calloc(1, sizeof(*chat));
    if (!chat)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the chat template");
    chat->wake = -1;
    chat->timeout_us = options->timeout_us ? options->timeout_us : DEFAULT_TIMEOUT_US;
    int status = 0;
    if (options->source) {
        chat->source = strdup(options->source);
        chat->bos = strdup(options->bos ? options->bos : "");
        chat->eos = strdup(options->eos ? options->eos : "");
        chat->python = strdup(options->python ? options->python : "/usr/bin/python3");
        chat->helper = options->helper ? strdup(options->helper) : default_helper();
        if (!chat->source || !chat->bos || !chat->eos || !chat->python || !chat->helper)
            status = error_set(error, STATUS_NO_MEMORY, "no memory for the chat template");
        else
            status = start_thread(chat, options->max_waiting, error);
    }
    if (status) {
        chat_template_free(chat);
        return status;
    }
    *out = chat;
    return 0;
}

void chat_template_free(struct chat_template *chat)
{
    if (!chat)
        return;
    if (chat->has_thread) {
        if (eventfd_write(chat->wake, 1) != 0)
            log_error("chat template: %s", strerror(errno));
        queue_close(chat->jobs);
        pthread_join(chat->thread, NULL);
    }
    if (chat->jobs)
        queue_free(chat->jobs);
    if (chat->wake >= 0)
        close(chat->wake);
    free(chat->source);
    free(chat->bos);
    free(chat->eos);
    free(chat->python);
    free(chat->helper);
    free(chat);
}

int chat_template_render(struct chat_template *chat, const char *request_json, render_done *done,
                         void *context, struct error *error)
{
    if (!chat->source)
        return error_set(error, STATUS_UNSUPPORTED,
                         "the model has no chat template: send text or token ids instead of messages");
    struct job job = {strdup(request_json), done, context};
    if (!job.request)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the chat messages");
    int status = queue_try_push(chat->jobs, &job);
    if (status == 0)
        return 0;
    free(job.request);
    if (status == STATUS_EXHAUSTED)
        return error_set(error, status, "too many requests wait for the chat template");
    return error_set(error, status, "the server is shutting down");
}
