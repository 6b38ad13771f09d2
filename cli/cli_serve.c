// `strata serve`: one coordinator and N local workers as child processes, supervised. A worker that ends is
// started again with a growing pause; the coordinator re-forms the pool around it. When the coordinator ends,
// or a worker says that it can never serve this model, everything ends. SIGTERM and SIGINT drain: the
// coordinator finishes what runs, then the workers go. One thread: signals arrive through a signalfd, the
// coordinator's "ready" line through a pipe.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/cli_client.h"
#include "cli/cli_devices.h"
#include "cli/cli_internal.h"
#include "cli/cli_process.h"
#include "cli/cli_progress.h"
#include "common/clock.h"
#include "common/log.h"

enum {
    MAX_ARGUMENTS = 96,
    FIRST_PAUSE_US = 500 * 1000,
    LONGEST_PAUSE_US = 30 * 1000 * 1000,
    HEALTHY_US = 60 * 1000 * 1000, // a worker that lived this long starts over with the first pause
    FIRST_FINAL_EXIT = 2,          // a worker's codes for "trying again cannot help": wrong options,
    LAST_FINAL_EXIT = 4,           // unusable model, refused by the coordinator
};

// Options that pass through unchanged have the name they have in the program itself.
static const struct option OPTIONS[] = {
    {"workers", 'w', OPTION_INT, "N", NULL,
     "Worker processes, each with a share of the layers (default: one a GPU; without GPUs, one).", 1,
     MAX_STAGES},
    {"devices", 0, OPTION_STRING, "LIST", "all",
     "GPUs to use, one worker each: all, none, or numbers as in 0,1.", 0, 0},
    {"listen", 'l', OPTION_STRING, "ADDR,...", "127.0.0.1:50051",
     "Where clients connect: HOST:PORT or unix:PATH.", 0, 0},
    {"context", 0, OPTION_INT, "N", NULL, "Positions of the longest sequence.", 0, 0},
    {"max-sequences", 0, OPTION_INT, "N", NULL, "Sequences computed at once.", 0, 0},
    {"max-waiting", 0, OPTION_INT, "N", NULL, "Requests that may wait for room.", 0, 0},
    {"step-budget", 0, OPTION_INT, "N", NULL, "Positions computed in one step at most.", 0, 0},
    {"chunk", 0, OPTION_INT, "N", NULL, "Positions of one prompt computed in one step at most.", 0, 0},
    {"kv-pages", 0, OPTION_INT, "N", NULL, "KV pages of 64 positions (default: what fits).", 0, 0},
    {"memory-fraction", 0, OPTION_FLOAT, "X", NULL, "Share of free memory for weights and KV.", 0, 0},
    {"balance", 0, OPTION_STRING, "time|bytes", NULL,
     "What the stages share evenly: measured time (the default) or the bytes of the weights.", 0, 0},
    {"step-timeout", 0, OPTION_FLOAT, "SECONDS", NULL, "A step without result for so long fails the pool.", 0,
     0},
    {"drain-timeout", 0, OPTION_FLOAT, "SECONDS", NULL, "How long running requests may finish after SIGTERM.",
     0, 0},
    {"max-connection-age", 0, OPTION_FLOAT, "SECONDS", NULL, "Ask clients to reconnect after so long.", 0, 0},
    {"model-name", 0, OPTION_STRING, "NAME", NULL, "The name clients may ask for (default: the model's own).",
     0, 0},
    {"python", 0, OPTION_STRING, "FILE", NULL, "Interpreter with jinja2, for chat templates.", 0, 0},
    {"tls-cert", 0, OPTION_STRING, "FILE", NULL, "Certificate of the client port (PEM); with --tls-key.", 0,
     0},
    {"tls-key", 0, OPTION_STRING, "FILE", NULL, "Private key of the client port (PEM).", 0, 0},
    {"tls-ca", 0, OPTION_STRING, "FILE", NULL, "Ask clients for certificates of this authority (PEM).", 0, 0},
    {"threads", 0, OPTION_INT, "N", NULL, "Compute threads of each worker (default: the cores, shared out).",
     0, 4096},
    {"level", 0, OPTION_STRING, "NAME", NULL, "Instruction set at most: portable, avx2 or avx512.", 0, 0},
    {"backend", 0, OPTION_STRING, "NAME", NULL,
     "The backend of the workers, cpu or cuda (default: cuda where there are GPUs).", 0, 0},
    {"trace", 0, OPTION_STRING, "DIR", NULL,
     "Each worker writes what it does, step by step, to DIR/NAME.json (DIR/worker-0.json and so on), as "
     "Chrome "
     "trace events; anew when it is started again.",
     0, 0},
    {"progress", 0, OPTION_FLAG, NULL, NULL,
     "Draw a bar while loading, also when standard error is no terminal.", 0, 0},
    {"log-level", 0, OPTION_STRING, "LEVEL", "info",
     "Least level that is logged: debug, info, warn or error.", 0, 0},
    {"log-json", 0, OPTION_FLAG, NULL, NULL, "Log lines as JSON.", 0, 0},
    {0},
};

static const char *const COORDINATOR_OPTIONS[] = {
    "balance",  "context",         "max-sequences", "max-waiting",   "step-budget",        "chunk",
    "kv-pages", "memory-fraction", "step-timeout",  "drain-timeout", "max-connection-age", "model-name",
    "python",   "tls-cert",        "tls-key",       "tls-ca",        "log-level",          NULL};
static const char *const WORKER_OPTIONS[] = {"threads", "level", "log-level", NULL};

static const char USAGE[] = "strata serve [options] MODEL.gguf";
static const char ABOUT[] =
    "Serves a model over gRPC from a pool of local worker processes. Prints `ready on ADDR` when it serves.";

struct child {
    pid_t pid; // 0: not running
    char *argv[MAX_ARGUMENTS];
    int64_t started_us, restart_at_us, pause_us;
};

struct supervisor {
    const struct config *config;
    const char *model;
    char directory[64]; // private sockets
    char programs[4096];
    char pool_address[128], client_address[128];
    struct child coordinator;
    struct child workers[MAX_STAGES];
    uint32_t n_workers, n_devices;
    uint32_t devices[MAX_STAGES]; // worker i has the i-th GPU, where there are any
    int signals, ready_pipe;
    bool ready, ending, failed;
    char ready_line[1024];
    size_t ready_bytes;
    struct progress *progress;
};

// --- command lines of the children ---

static int add_argument(struct child *child, struct error *error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static int add_argument(struct child *child, struct error *error, const char *format, ...)
{
    size_t n = 0;
    while (child->argv[n])
        n++;
    va_list arguments;
    va_start(arguments, format);
    int length = n + 1 < MAX_ARGUMENTS ? vasprintf(&child->argv[n], format, arguments) : -1;
    va_end(arguments);
    return length < 0 ? error_set(error, STATUS_NO_MEMORY, "out of memory") : STATUS_OK;
}

static int pass_options(struct child *child, const struct config *config, const char *const *names,
                        struct error *error)
{
    int status = STATUS_OK;
    for (; status == STATUS_OK && *names; names++) {
        if (config_string(config, *names))
            status = add_argument(child, error, "--%s=%s", *names, config_string(config, *names));
    }
    if (status == STATUS_OK && config_flag(config, "log-json"))
        status = add_argument(child, error, "--log-json");
    return status;
}

static int prepare_coordinator(struct supervisor *s, struct error *error)
{
    struct child *child = &s->coordinator;
    int status = add_argument(child, error, "%s/strata-coordinator", s->programs);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--model=%s", s->model);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--workers=%u", s->n_workers);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--listen=%s,%s", config_string(s->config, "listen"),
                              s->client_address);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--pool-listen=%s", s->pool_address);
    return status ? status : pass_options(child, s->config, COORDINATOR_OPTIONS, error);
}

static int add_device(const struct supervisor *s, struct child *child, uint32_t index, struct error *error)
{
    const char *backend = config_string(s->config, "backend");
    int status = add_argument(child, error, "--backend=%s",
                              s->n_devices ? "cuda"
                              : backend    ? backend
                                           : "cpu");
    if (status == STATUS_OK && s->n_devices)
        status = add_argument(child, error, "--device=%u", s->devices[index]);
    return status;
}

static int prepare_worker(struct supervisor *s, uint32_t index, struct error *error)
{
    struct child *child = &s->workers[index];
    int status = add_argument(child, error, "%s/strata-worker", s->programs);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--model=%s", s->model);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--name=worker-%u", index);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--coordinator=%s", s->pool_address);
    if (status == STATUS_OK)
        status = add_argument(child, error, "--listen-link=unix:%s/link-%u", s->directory, index);
    if (status == STATUS_OK)
        status = add_device(s, child, index, error);
    if (status == STATUS_OK && config_is_set(s->config, "trace"))
        status =
            add_argument(child, error, "--trace=%s/worker-%u.json", config_string(s->config, "trace"), index);
    if (status == STATUS_OK && !config_is_set(s->config, "threads")) {
        long cores = sysconf(_SC_NPROCESSORS_ONLN);
        long share = cores / (long)s->n_workers;
        status = add_argument(child, error, "--threads=%ld", share > 0 ? share : 1);
    }
    return status ? status : pass_options(child, s->config, WORKER_OPTIONS, error);
}

// --- starting and ending ---

static int start_child(struct child *child, int stdout_fd, struct error *error)
{
    child->started_us = clock_now_us();
    child->restart_at_us = 0;
    return process_start(&child->pid, child->argv, stdout_fd, error);
}

static int start_all(struct supervisor *s, struct error *error)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        return error_set(error, STATUS_IO, "pipe: %s", strerror(errno));
    s->ready_pipe = ends[0];
    int status = start_child(&s->coordinator, ends[1], error);
    close(ends[1]);
    for (uint32_t i = 0; status == STATUS_OK && i < s->n_workers; i++)
        status = start_child(&s->workers[i], -1, error);
    return status;
}

static void signal_child(const struct child *child, int signal)
{
    if (child->pid > 0)
        kill(child->pid, signal);
}

static void begin_end(struct supervisor *s)
{
    if (s->ending)
        log_warn("ending now");
    s->ending = true;
    // The workers leave when the coordinator tells them to; a second signal reaches it too and cuts the drain
    // short.
    if (s->coordinator.pid > 0) {
        signal_child(&s->coordinator, SIGTERM);
        return;
    }
    for (uint32_t i = 0; i < s->n_workers; i++)
        signal_child(&s->workers[i], SIGTERM);
}

static bool anyone_runs(const struct supervisor *s)
{
    bool runs = s->coordinator.pid > 0;
    for (uint32_t i = 0; i < s->n_workers; i++)
        runs |= s->workers[i].pid > 0;
    return runs;
}

static void coordinator_ended(struct supervisor *s, int wait_status)
{
    char how[96];
    process_describe_end(wait_status, how, sizeof(how));
    s->coordinator.pid = 0;
    bool by_us = s->ending && WIFSIGNALED(wait_status) && WTERMSIG(wait_status) == SIGTERM;
    if (!by_us && (!s->ending || wait_status)) {
        log_error("the coordinator %s", how);
        s->failed = true;
    }
    s->ending = true;
    for (uint32_t i = 0; i < s->n_workers; i++)
        signal_child(&s->workers[i], SIGTERM);
}

static void worker_ended(struct supervisor *s, uint32_t index, int wait_status)
{
    struct child *child = &s->workers[index];
    char how[96];
    process_describe_end(wait_status, how, sizeof(how));
    child->pid = 0;
    if (s->ending)
        return;
    int exit_code = WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 0;
    if (exit_code >= FIRST_FINAL_EXIT && exit_code <= LAST_FINAL_EXIT) {
        static const char *const reasons[] = {"was given wrong options",
                                              "cannot use this model, or this machine for it (it said why)",
                                              "was sent away by the coordinator"};
        log_error("worker %u %s", index, reasons[exit_code - FIRST_FINAL_EXIT]);
        s->failed = true;
        begin_end(s);
        return;
    }
    bool was_healthy = clock_now_us() - child->started_us > HEALTHY_US;
    child->pause_us = was_healthy || !child->pause_us ? FIRST_PAUSE_US : child->pause_us * 2;
    if (child->pause_us > LONGEST_PAUSE_US)
        child->pause_us = LONGEST_PAUSE_US;
    child->restart_at_us = clock_now_us() + child->pause_us;
    log_warn("worker %u %s; starting it again in %.1f s", index, how, (double)child->pause_us / 1e6);
}

static void reap(struct supervisor *s)
{
    int wait_status;
    pid_t pid;
    while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0) {
        if (pid == s->coordinator.pid)
            coordinator_ended(s, wait_status);
        for (uint32_t i = 0; i < s->n_workers; i++) {
            if (pid == s->workers[i].pid)
                worker_ended(s, i, wait_status);
        }
    }
}

// --- the loop ---

// The coordinator names the first address it listens on, which is the user's.
static void relay_ready_line(struct supervisor *s)
{
    char *newline = memchr(s->ready_line, '\n', s->ready_bytes);
    if (!newline || s->ready)
        return;
    *newline = '\0';
    progress_end(s->progress);
    s->ready = true;
    puts(s->ready_line);
    fflush(stdout);
}

static void read_ready_pipe(struct supervisor *s)
{
    ssize_t got =
        read(s->ready_pipe, s->ready_line + s->ready_bytes, sizeof(s->ready_line) - 1 - s->ready_bytes);
    if (got <= 0) {
        close(s->ready_pipe);
        s->ready_pipe = -1;
        return;
    }
    s->ready_bytes += (size_t)got;
    relay_ready_line(s);
    if (s->ready)
        s->ready_bytes = 0; // later lines have no reader here
}

static void restart_due(struct supervisor *s)
{
    int64_t now = clock_now_us();
    for (uint32_t i = 0; i < s->n_workers && !s->ending; i++) {
        struct child *child = &s->workers[i];
        struct error error = {0};
        if (child->restart_at_us && now >= child->restart_at_us && start_child(child, -1, &error)) {
            log_error("%s", error.text);
            child->restart_at_us = now + LONGEST_PAUSE_US;
        }
    }
}

static void take_signal(struct supervisor *s)
{
    struct signalfd_siginfo info;
    if (read(s->signals, &info, sizeof(info)) != sizeof(info))
        return;
    if (info.ssi_signo == SIGCHLD)
        reap(s);
    else
        begin_end(s);
}

static void supervise(struct supervisor *s)
{
    while (anyone_runs(s) || (!s->ending && s->coordinator.pid)) {
        struct pollfd waits[] = {{.fd = s->signals, .events = POLLIN},
                                 {.fd = s->ready_pipe, .events = POLLIN}};
        poll(waits, 2, s->ready ? 200 : 50);
        if (waits[0].revents)
            take_signal(s);
        if (waits[1].revents)
            read_ready_pipe(s);
        restart_due(s);
        if (!s->ready && !s->ending)
            progress_update(s->progress);
    }
}

static int open_signals(struct supervisor *s, struct error *error)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    s->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return s->signals < 0 ? error_set(error, STATUS_IO, "signalfd: %s", strerror(errno)) : STATUS_OK;
}

// A worker for every GPU, as many as --workers says at most; without GPUs on the CPU, which is also where a
// level of its instruction sets leads.
static int choose_devices(struct supervisor *s, struct error *error)
{
    const char *backend = config_string(s->config, "backend"), *list = config_string(s->config, "devices");
    bool wanted = config_is_set(s->config, "workers"), named = config_is_set(s->config, "devices");
    bool on_cpu = backend ? strcmp(backend, "cpu") == 0 : config_is_set(s->config, "level") && !named;
    int status = on_cpu ? STATUS_OK : cli_devices_read(list, s->programs, s->devices, &s->n_devices, error);
    if (status)
        return status;
    s->n_workers = wanted ? (uint32_t)config_int(s->config, "workers") : s->n_devices ? s->n_devices : 1;
    if (s->n_devices && s->n_workers > s->n_devices) {
        log_warn("%u workers were asked for, but each has a GPU of its own and there are %u: %u workers",
                 s->n_workers, s->n_devices, s->n_devices);
        s->n_workers = s->n_devices;
    }
    return STATUS_OK;
}

// The workers say it of a file; here nothing has been started yet.
static int make_trace_directory(const struct supervisor *s, struct error *error)
{
    const char *path = config_string(s->config, "trace");
    if (!path || ((mkdir(path, 0777) == 0 || errno == EEXIST) && access(path, W_OK | X_OK) == 0))
        return STATUS_OK;
    return error_set(error, STATUS_INVALID, "--trace: no files can be written to %s: %s", path,
                     strerror(errno));
}

static int set_up(struct supervisor *s, struct error *error)
{
    int status = process_own_directory(s->programs, sizeof(s->programs), error);
    if (status == STATUS_OK)
        status = choose_devices(s, error);
    if (status == STATUS_OK)
        status = make_trace_directory(s, error);
    if (status)
        return status;
    strcpy(s->directory, "/tmp/strata-XXXXXX");
    if (!mkdtemp(s->directory)) {
        s->directory[0] = '\0';
        return error_set(error, STATUS_IO, "cannot make a directory in /tmp: %s", strerror(errno));
    }
    snprintf(s->pool_address, sizeof(s->pool_address), "unix:%s/pool", s->directory);
    snprintf(s->client_address, sizeof(s->client_address), "unix:%s/client", s->directory);
    status = prepare_coordinator(s, error);
    for (uint32_t i = 0; status == STATUS_OK && i < s->n_workers; i++)
        status = prepare_worker(s, i, error);
    if (status == STATUS_OK)
        status = open_signals(s, error);
    return status;
}

static void remove_directory(const struct supervisor *s)
{
    char path[sizeof(s->directory) + 32];
    if (!s->directory[0])
        return;
    for (uint32_t i = 0; i < s->n_workers; i++) {
        snprintf(path, sizeof(path), "%s/link-%u", s->directory, i);
        unlink(path);
    }
    snprintf(path, sizeof(path), "%s/pool", s->directory);
    unlink(path);
    snprintf(path, sizeof(path), "%s/client", s->directory);
    unlink(path);
    rmdir(s->directory);
}

static void tear_down(struct supervisor *s)
{
    progress_free(s->progress);
    remove_directory(s);
    for (size_t i = 0; i < MAX_ARGUMENTS; i++)
        free(s->coordinator.argv[i]);
    for (uint32_t w = 0; w < s->n_workers; w++) {
        for (size_t i = 0; i < MAX_ARGUMENTS; i++)
            free(s->workers[w].argv[i]);
    }
    if (s->signals >= 0)
        close(s->signals);
    if (s->ready_pipe >= 0)
        close(s->ready_pipe);
}

int command_serve(int argc, char **argv)
{
    static struct supervisor s;
    struct error error = {0};
    struct config *config = NULL;
    enum log_level level;
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    // The children get these options as words. Left in the environment they would be read once more: a
    // worker's --tls-ca is about the pool port, ours about the clients'.
    config_forget_environment(OPTIONS);
    s = (struct supervisor){.config = config, .signals = -1, .ready_pipe = -1};
    int status = STATUS_OK;
    if (config_positional_count(config) != 1)
        status = error_set(&error, STATUS_INVALID, "give one model file: %s", USAGE);
    else if (log_level_parse(config_string(config, "log-level"), &level))
        status = error_set(&error, STATUS_INVALID, "--log-level is debug, info, warn or error");
    if (status)
        goto done;
    log_init("serve", level, config_flag(config, "log-json"));
    s.model = config_positional(config, 0);
    status = set_up(&s, &error);
    if (status == STATUS_OK)
        status = start_all(&s, &error);
    if (status == STATUS_OK && (config_flag(config, "progress") || isatty(STDERR_FILENO)))
        s.progress = progress_new(s.client_address);
    if (status)
        begin_end(&s); // what did start ends again
    supervise(&s);
done:
    tear_down(&s);
    config_free(config);
    code = cli_report(status, &error);
    return code ? code : s.failed;
}
