// The program strata-coordinator: options to a coordinator, signals to its end.
//
// SIGTERM and SIGINT are taken by a thread of their own (sigwait), so nothing here runs in a signal handler.
// The first lets running requests finish within --drain-timeout, the second ends them.
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/config.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/rpc_server.h"
#include "coordinator/coordinator.h"

static const struct option options[] = {
    {"model", 'm', OPTION_STRING, "FILE", NULL,
     "The model: a GGUF file, any part of a split one. A positional argument does as well.", 0, 0},
    {"model-name", 0, OPTION_STRING, "NAME", NULL,
     "The name clients may ask for. Default: the file's general.name, else the file's name.", 0, 0},
    {"workers", 'w', OPTION_INT, "N", "1", "Workers the model is dealt to.", 1, MAX_STAGES},
    {"listen", 'l', OPTION_STRING, "ADDR[,ADDR...]", "127.0.0.1:50051",
     "Where clients connect: host:port or unix:/path.", 0, 0},
    {"pool-listen", 0, OPTION_STRING, "ADDR", "127.0.0.1:50052",
     "Where workers connect. Whoever can connect here can join: keep it on a private network.", 0, 0},
    {"backend", 0, OPTION_STRING, "NAME", NULL, "Take in workers of this backend only (cpu or cuda).", 0, 0},
    {"context", 'c', OPTION_INT, "N", NULL,
     "Positions a sequence may have, prompt and answer together. Default: the model's, at most 4096.", 1,
     MAX_CONTEXT},
    {"max-sequences", 0, OPTION_INT, "N", "32",
     "Sequences computed at once; each choice of a request is one.", 1, MAX_SLOTS},
    {"max-waiting", 0, OPTION_INT, "N", "256", "Requests that may wait for their turn; more are refused.", 1,
     60000},
    {"step-budget", 0, OPTION_INT, "N", "512", "Positions computed in one step at most.", 1, MAX_STEP_TOKENS},
    {"chunk", 0, OPTION_INT, "N", "256", "Positions of one prompt computed in one step at most.", 1,
     MAX_STEP_TOKENS},
    {"kv-pages", 0, OPTION_INT, "N", NULL,
     "KV pages of 64 positions. Default: what the workers' memory allows, at most what --max-sequences full "
     "contexts need.",
     1, 1 << 24},
    {"memory-fraction", 0, OPTION_FLOAT, "X", "0.9",
     "Share of a worker's free memory that weights and KV pages may take.", 0.05, 1},
    {"balance", 0, OPTION_STRING, "time|bytes", "time",
     "What the stages of a pool share evenly: the time that workers measured for layers and head after they "
     "loaded, "
     "or the bytes of the weights.",
     0, 0},
    {"step-timeout", 0, OPTION_FLOAT, "SECONDS", "30",
     "A step that takes longer means that a worker hangs. Long prompts are given time in proportion.", 0.1,
     86400},
    {"drain-timeout", 0, OPTION_FLOAT, "SECONDS", "30",
     "How long running requests may take to finish at the end.", 0, 86400},
    {"max-connection-age", 0, OPTION_FLOAT, "SECONDS", "0",
     "Ask clients to reconnect after so long, so that those behind a load balancer spread; running answers "
     "are not cut. 0: never.",
     0, 1e6},
    {"python", 0, OPTION_STRING, "FILE", "/usr/bin/python3", "The interpreter that renders chat templates.",
     0, 0},
    {"tls-cert", 0, OPTION_STRING, "FILE", NULL, "Serve clients over TLS with this certificate (PEM).", 0, 0},
    {"tls-key", 0, OPTION_STRING, "FILE", NULL, "The key of --tls-cert (PEM).", 0, 0},
    {"tls-ca", 0, OPTION_STRING, "FILE", NULL, "Ask clients for a certificate of this authority (PEM).", 0,
     0},
    {"pool-tls-cert", 0, OPTION_STRING, "FILE", NULL, "Serve workers over TLS with this certificate (PEM).",
     0, 0},
    {"pool-tls-key", 0, OPTION_STRING, "FILE", NULL, "The key of --pool-tls-cert (PEM).", 0, 0},
    {"pool-tls-ca", 0, OPTION_STRING, "FILE", NULL, "Ask workers for a certificate of this authority (PEM).",
     0, 0},
    {"log-level", 0, OPTION_STRING, "LEVEL", "info", "debug, info, warn or error.", 0, 0},
    {"log-json", 0, OPTION_FLAG, NULL, NULL, "Log lines as JSON objects.", 0, 0},
    {0},
};

static int64_t seconds(const struct config *config, const char *name)
{
    return (int64_t)(config_float(config, name) * 1e6);
}

static struct coordinator_options read_options(const struct config *config)
{
    return (struct coordinator_options){
        .model =
            config_is_set(config, "model") ? config_string(config, "model") : config_positional(config, 0),
        .model_name = config_string(config, "model-name"),
        .listen = config_string(config, "listen"),
        .pool_listen = config_string(config, "pool-listen"),
        .n_workers = (uint32_t)config_int(config, "workers"),
        .backend = config_string(config, "backend"),
        .context = config_is_set(config, "context") ? (uint32_t)config_int(config, "context") : 0,
        .max_sequences = (uint32_t)config_int(config, "max-sequences"),
        .max_waiting = (uint32_t)config_int(config, "max-waiting"),
        .step_budget = (uint32_t)config_int(config, "step-budget"),
        .chunk = (uint32_t)config_int(config, "chunk"),
        .n_pages = config_is_set(config, "kv-pages") ? (uint32_t)config_int(config, "kv-pages") : 0,
        .memory_fraction = config_float(config, "memory-fraction"),
        .by_bytes = strcmp(config_string(config, "balance"), "bytes") == 0,
        .step_timeout_us = seconds(config, "step-timeout"),
        .drain_timeout_us = seconds(config, "drain-timeout"),
        .max_connection_age_ms = (uint32_t)(config_float(config, "max-connection-age") * 1e3),
        .python = config_string(config, "python"),
        .tls_cert = config_string(config, "tls-cert"),
        .tls_key = config_string(config, "tls-key"),
        .tls_ca = config_string(config, "tls-ca"),
        .pool_tls_cert = config_string(config, "pool-tls-cert"),
        .pool_tls_key = config_string(config, "pool-tls-key"),
        .pool_tls_ca = config_string(config, "pool-tls-ca"),
    };
}

static void say_ready(const char *address)
{
    printf("ready on %s\n", address);
    fflush(stdout);
}

// SIGUSR1 is our own: the coordinator stopped without being asked to.
static void *wait_for_signals(void *context)
{
    struct coordinator *coordinator = context;
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGUSR1);
    for (int number = 0; number != SIGUSR1;) {
        if (sigwait(&signals, &number) == 0 && number != SIGUSR1)
            coordinator_stop(coordinator);
    }
    return NULL;
}

static void block_signals(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &signals, NULL); // inherited by every thread made later
    signal(SIGPIPE, SIG_IGN);
}

static int serve(const struct coordinator_options *given)
{
    struct error error = {0};
    struct coordinator *coordinator;
    pthread_t signals;
    block_signals();
    rpc_library_init();
    int status = coordinator_new(&coordinator, given, &error);
    if (!status && pthread_create(&signals, NULL, wait_for_signals, coordinator)) {
        coordinator_free(coordinator);
        status = error_set(&error, STATUS_NO_MEMORY, "no thread for signals could be made");
    }
    if (status) {
        log_error("%s", error.text);
        rpc_library_shutdown();
        return EXIT_FAILURE;
    }
    coordinator_run(coordinator, say_ready);
    pthread_kill(signals, SIGUSR1);
    pthread_join(signals, NULL);
    coordinator_free(coordinator);
    rpc_library_shutdown();
    return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    struct error error = {0};
    struct config *config;
    enum log_level level = LOG_INFO;
    log_init("coordinator", level, 0);
    if (config_parse(&config, options, argc, argv, &error)) {
        fprintf(stderr, "strata-coordinator: %s\n", error.text);
        return 2;
    }
    int result = 2;
    struct coordinator_options given = read_options(config);
    if (config_wants_help(config)) {
        config_print_help(options, "strata-coordinator [OPTIONS] [MODEL.gguf]",
                          "Serves a model to gRPC clients from the workers that join it.");
        result = EXIT_SUCCESS;
    } else if (!given.model) {
        fprintf(stderr, "strata-coordinator: no model was given (--model FILE)\n");
    } else if (log_level_parse(config_string(config, "log-level"), &level)) {
        fprintf(stderr, "strata-coordinator: --log-level must be debug, info, warn or error\n");
    } else if (!given.by_bytes && strcmp(config_string(config, "balance"), "time") != 0) {
        fprintf(stderr, "strata-coordinator: --balance must be time or bytes\n");
    } else if (config_positional_count(config) > (config_is_set(config, "model") ? 0 : 1)) {
        fprintf(stderr, "strata-coordinator: one model is served, but \"%s\" was given too\n",
                config_positional(config, config_positional_count(config) - 1));
    } else {
        log_init("coordinator", level, config_flag(config, "log-json"));
        result = serve(&given);
    }
    config_free(config);
    return result;
}
