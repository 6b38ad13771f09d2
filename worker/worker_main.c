// strata-worker: options, signals, exit codes. The first thread waits for signals; the worker runs in
// another.
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/config.h"
#include "common/limits.h"
#include "common/log.h"
#include "worker/worker.h"
#include "worker/worker_bench.h"
#include "worker/worker_devices.h"

enum {
    EXIT_FAILED = 1,    // something went wrong in the middle
    EXIT_USAGE = 2,     // an option or address is wrong
    EXIT_MODEL = 3,     // the model file is missing, damaged or unsupported
    EXIT_SENT_AWAY = 4, // the coordinator will not have this worker
    EXIT_NO_COORDINATOR = 5,
    EXIT_DEVICE = 6 // the GPU is broken for this process: start a new one
};

static const struct option OPTIONS[] = {
    {"model", 'm', OPTION_STRING, "FILE", NULL,
     "GGUF model: the file the coordinator serves (any part of a split one). A positional argument does as "
     "well.",
     0, 0},
    {"coordinator", 'c', OPTION_STRING, "ADDR", "127.0.0.1:50052",
     "Where the coordinator takes workers in: host:port or unix:/path.", 0, 0},
    {"listen-link", 0, OPTION_STRING, "ADDR", "127.0.0.1:0",
     "Where the previous stage's worker connects: host:port (port 0: any) or unix:/path.", 0, 0},
    {"advertise-link", 0, OPTION_STRING, "ADDR", NULL,
     "What that worker should dial, when it is not what we listen on: a host, or host:port.", 0, 0},
    {"name", 'n', OPTION_STRING, "NAME", NULL, "Unique name in the pool; host:pid unless given.", 0, 0},
    {"trace", 0, OPTION_STRING, "FILE", NULL,
     "Write what the device does, step by step, as Chrome trace events (JSON; ui.perfetto.dev shows them).",
     0, 0},
    {"backend", 0, OPTION_STRING, "NAME", "auto", "cpu, cuda, or auto: cuda where there is a GPU.", 0, 0},
    {"device", 0, OPTION_INT, "N", "0", "Which GPU; see --list-devices.", 0, 63},
    {"threads", 't', OPTION_INT, "N", "0", "Compute threads; 0 takes all cores.", 0, 1024},
    {"level", 0, OPTION_STRING, "NAME", NULL,
     "Highest instruction-set level to use: portable, avx2 or avx512. The best unless given; a pool runs at "
     "its workers' lowest.",
     0, 0},
    {"memory", 0, OPTION_BYTES, "BYTES", "0",
     "Most memory for weights and KV cache, as in 8G; 0 is what the device has.", 0, 1e15},
    {"connect-timeout", 0, OPTION_FLOAT, "SECONDS", "0",
     "Give up after so long without a coordinator; 0 waits for ever.", 0, 1e6},
    {"link-timeout", 0, OPTION_FLOAT, "SECONDS", "30", "How long the links of a pool may take to be built.",
     0.1, 1e6},
    {"nccl", 0, OPTION_FLAG, NULL, "yes",
     "Link GPUs over NCCL where both neighbours can (--no-nccl: over sockets).", 0, 0},
    {"oversubscribe", 0, OPTION_FLAG, NULL, NULL,
     "Let workers that share a GPU link over NCCL: slow, for tests. All of them need it.", 0, 0},
    {"tls-ca", 0, OPTION_STRING, "FILE", NULL, "Dial the coordinator with TLS, trusting this PEM file.", 0,
     0},
    {"tls-cert", 0, OPTION_STRING, "FILE", NULL, "Our own certificate, for a coordinator that asks.", 0, 0},
    {"tls-key", 0, OPTION_STRING, "FILE", NULL, "Its key.", 0, 0},
    {"log-level", 0, OPTION_STRING, "LEVEL", "info", "debug, info, warn or error.", 0, 0},
    {"log-json", 0, OPTION_FLAG, NULL, NULL, "Log lines as JSON objects.", 0, 0},
    {"list-devices", 0, OPTION_FLAG, NULL, NULL,
     "Print this machine's devices, a line each (backend, index, free bytes, description), and end.", 0, 0},
    {"bench", 0, OPTION_FLAG, NULL, NULL,
     "No pool: load the whole model here, time prefill and decode, print a table.", 0, 0},
    {"bench-prompt", 0, OPTION_INT, "N", "512", "Prompt tokens of each sequence; 0 = none.", 0,
     MAX_CONTEXT / 2},
    {"bench-new", 0, OPTION_INT, "N", "128", "New tokens of each sequence.", 0, MAX_CONTEXT / 2},
    {"bench-batch", 0, OPTION_STRING, "LIST", "1,8,32", "Numbers of sequences at once.", 0, 0},
    {"bench-step", 0, OPTION_INT, "N", "512", "Positions of one prefill step.", 1, MAX_STEP_TOKENS},
    {"bench-repeat", 0, OPTION_INT, "N", "3", "Report the best of so many runs.", 1, 1000},
    {"json", 0, OPTION_FLAG, NULL, NULL, "The table, or the devices, as JSON.", 0, 0},
    {"logits", 0, OPTION_STRING, "IDS", NULL,
     "No pool: compute the logits at every position of these tokens (1,2,3) and write them to --save.", 0, 0},
    {"save", 0, OPTION_STRING, "FILE", NULL,
     "Where --logits writes: raw little-endian float32, positions x vocabulary.", 0, 0},
    {NULL, 0, OPTION_FLAG, NULL, NULL, NULL, 0, 0},
};

static const char USAGE[] = "strata-worker [OPTIONS] [MODEL.gguf]";
static const char ABOUT[] =
    "One worker of a pool: joins the coordinator, loads the layers it is given, runs their share of every "
    "step. "
    "It may be started before its coordinator and outlives its restarts, keeping the weights. Exit codes: 0 "
    "stopped by SIGTERM or SIGINT; 1 failed; 2 wrong options; 3 unusable model or backend; 4 refused by the "
    "coordinator; 5 no coordinator found in time; 6 the GPU is broken for this process, and a new one has to "
    "be "
    "started.";

static int complain(int status, const struct error *error)
{
    fprintf(stderr, "strata-worker: %s\n", error->text);
    switch (status) {
    case STATUS_INVALID:
        return EXIT_USAGE;
    case STATUS_NOT_FOUND:
    case STATUS_CORRUPT:
    case STATUS_UNSUPPORTED:
        return EXIT_MODEL;
    case STATUS_CANCELLED:
        return EXIT_SENT_AWAY;
    case STATUS_DEADLINE:
        return EXIT_NO_COORDINATOR;
    default:
        return EXIT_FAILED;
    }
}

static int read_level(const struct config *config, uint32_t *level, struct error *error)
{
    const char *name = config_string(config, "level");
    *level = 0;
    for (uint32_t l = LEVEL_PORTABLE; name && l <= LEVEL_AVX512; l++) {
        if (strcmp(name, device_level_name(l)) == 0)
            *level = l;
    }
    if (name && *level == 0)
        return error_set(error, STATUS_INVALID, "--level %s is none of portable, avx2, avx512", name);
    return STATUS_OK;
}

static int read_options(const struct config *config, struct worker_options *options, struct error *error)
{
    *options = (struct worker_options){
        .model = config_string(config, "model"),
        .coordinator = config_string(config, "coordinator"),
        .listen_link = config_string(config, "listen-link"),
        .advertise_link = config_string(config, "advertise-link"),
        .name = config_string(config, "name"),
        .trace = config_string(config, "trace"),
        .device = {.backend = config_string(config, "backend"),
                   .index = (uint32_t)config_int(config, "device"),
                   .threads = (uint32_t)config_int(config, "threads")},
        .memory = (uint64_t)config_int(config, "memory"),
        .connect_timeout_us = (int64_t)(config_float(config, "connect-timeout") * 1e6),
        .link_timeout_us = (int64_t)(config_float(config, "link-timeout") * 1e6),
        .no_nccl = !config_flag(config, "nccl"),
        .oversubscribe = config_flag(config, "oversubscribe"),
        .tls_ca = config_string(config, "tls-ca"),
        .tls_cert = config_string(config, "tls-cert"),
        .tls_key = config_string(config, "tls-key"),
    };
    size_t words = config_positional_count(config);
    if (!options->model && words > 0)
        options->model = config_positional(config, 0);
    else if (words > 0)
        words++; // --model and a word besides
    if (words > 1)
        return error_set(error, STATUS_INVALID, "one model is all a worker takes; see --help");
    if (!options->model)
        return error_set(error, STATUS_INVALID, "which model? Give --model FILE; see --help");
    enum log_level level;
    if (log_level_parse(config_string(config, "log-level"), &level))
        return error_set(error, STATUS_INVALID, "--log-level %s is none of debug, info, warn, error",
                         config_string(config, "log-level"));
    log_init(options->name ? options->name : "worker", level, config_flag(config, "log-json"));
    return read_level(config, &options->device.level, error);
}

// Names the backend for good. CUDA may start threads while it looks for GPUs: called when signals are where
// they belong. A CPU level is asked of the CPU.
static void choose_backend(struct worker_options *options)
{
    bool automatic = strcmp(options->device.backend, "auto") == 0;
    options->device.backend =
        automatic && options->device.level ? "cpu" : device_backend(options->device.backend);
}

static int run_bench(const struct config *config, const struct worker_options *options)
{
    struct error error = {0};
    struct worker_bench_options bench = {.model = options->model,
                                         .device = options->device,
                                         .n_prompt = (uint32_t)config_int(config, "bench-prompt"),
                                         .n_new = (uint32_t)config_int(config, "bench-new"),
                                         .step = (uint32_t)config_int(config, "bench-step"),
                                         .repeat = (uint32_t)config_int(config, "bench-repeat"),
                                         .json = config_flag(config, "json")};
    int status = worker_bench_parse_batches(&bench, config_string(config, "bench-batch"), &error);
    if (!status)
        status = worker_bench_run(&bench, &error);
    return status ? complain(status, &error) : EXIT_SUCCESS;
}

static int dump_logits(const struct config *config, const struct worker_options *options)
{
    struct error error = {0};
    int status;
    if (!config_is_set(config, "save"))
        status = error_set(&error, STATUS_INVALID, "--logits needs --save FILE");
    else
        status = worker_dump_logits(options->model, &options->device, config_string(config, "logits"),
                                    config_string(config, "save"), &error);
    return status ? complain(status, &error) : EXIT_SUCCESS;
}

// NCCL refuses two ranks on one device; ranks of two hosts it takes. So each process is a host of its own.
static void pose_as_host(void)
{
    char name[32];
    snprintf(name, sizeof(name), "strata-%ld", (long)getpid());
    config_export("NCCL_HOSTID", name);
}

struct running {
    struct worker *worker;
    pthread_t waiting; // the thread that waits for signals
    int status;
    struct error error;
};

static void *run_worker(void *argument)
{
    struct running *running = argument;
    running->status = worker_run(running->worker, &running->error);
    pthread_kill(running->waiting, SIGUSR1); // the end is one more thing it waits for
    return NULL;
}

// Signals are blocked in every thread and taken here. A second one ends the process at once.
static int run_until_signal(struct worker *worker, const sigset_t *ending)
{
    struct running running = {.worker = worker, .waiting = pthread_self()};
    pthread_t thread;
    sigset_t signals = *ending;
    sigaddset(&signals, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    int taken;
    if (pthread_create(&thread, NULL, run_worker, &running)) {
        fprintf(stderr, "strata-worker: cannot start a thread\n");
        return EXIT_FAILED;
    }
    sigwait(&signals, &taken);
    pthread_sigmask(SIG_UNBLOCK, ending, NULL);
    worker_stop(worker);
    pthread_join(thread, NULL);
    if (running.status == STATUS_OK)
        return EXIT_SUCCESS;
    int code = complain(running.status, &running.error);
    return running.status == STATUS_INTERNAL ? EXIT_DEVICE : code;
}

static int join_pool(struct worker_options *options)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL); // before any thread starts
    signal(SIGPIPE, SIG_IGN);
    choose_backend(options);
    struct worker *worker;
    struct error error = {0};
    int status = worker_new(&worker, options, &error);
    if (status)
        return complain(status, &error);
    int code = run_until_signal(worker, &signals);
    if (code == EXIT_DEVICE)
        _exit(code); // what is left to close is the GPU's, which may never answer
    worker_free(worker);
    return code;
}

int main(int argc, char **argv)
{
    struct config *config;
    struct error error = {0};
    struct worker_options options;
    int status = config_parse(&config, OPTIONS, argc, argv, &error), code;
    if (status)
        return complain(STATUS_INVALID, &error);
    if (config_wants_help(config)) {
        config_print_help(OPTIONS, USAGE, ABOUT);
        code = EXIT_SUCCESS;
    } else if (config_flag(config, "list-devices")) {
        code = worker_list_devices(config_flag(config, "json")) ? EXIT_FAILED : EXIT_SUCCESS;
    } else if ((status = read_options(config, &options, &error)) != STATUS_OK) {
        code = complain(status, &error);
    } else if (config_flag(config, "bench")) {
        choose_backend(&options);
        code = run_bench(config, &options);
    } else if (config_is_set(config, "logits")) {
        choose_backend(&options);
        code = dump_logits(config, &options);
    } else {
        if (options.oversubscribe)
            pose_as_host(); // before there are threads
        code = join_pool(&options);
    }
    config_free(config);
    return code;
}
