// Opening and closing: the model file, the rooms, the two endpoints. Everything here runs on the main thread,
// before the hall's loop and after it. coordinator_free takes a coordinator at any stage of its making.
#include "coordinator/coordinator_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/log.h"

enum {
    DEFAULT_CONTEXT = 4096,
    STOP_GRACE_US = 1000000, // for the last responses to leave
};

// --- the model ---

// The served name: general.name, else the file's name without its ending.
static void name_model(struct coordinator *hall)
{
    const char *given = hall->options.model_name;
    if (given || hall->spec.name[0] != '\0') {
        snprintf(hall->model_name, sizeof(hall->model_name), "%s", given ? given : hall->spec.name);
        return;
    }
    const char *slash = strrchr(hall->options.model, '/');
    snprintf(hall->model_name, sizeof(hall->model_name), "%s", slash ? slash + 1 : hall->options.model);
    char *ending = strstr(hall->model_name, ".gguf");
    if (ending && ending > hall->model_name && ending[5] == '\0')
        *ending = '\0';
}

static int read_template(struct coordinator *hall, struct error *error)
{
    struct gguf_string source = {0};
    int status = gguf_get_string(hall->gguf, "tokenizer.chat_template", &source, error);
    if (status == STATUS_NOT_FOUND)
        return STATUS_OK;
    if (status)
        return status;
    hall->template_source = strndup(source.bytes, source.length);
    return hall->template_source ? STATUS_OK : error_set(error, STATUS_NO_MEMORY, "out of memory");
}

static void token_name(const struct coordinator *hall, int32_t id, char *out, size_t capacity)
{
    int length = 0;
    if (id >= 0 && tokenizer_has_text(hall->tokenizer))
        length = tokenizer_token_text(hall->tokenizer, id, true, out, capacity - 1);
    out[length > 0 ? length : 0] = '\0';
}

static int open_model(struct coordinator *hall, struct error *error)
{
    int status = gguf_open(&hall->gguf, hall->options.model, error);
    if (!status)
        status = model_spec_read(&hall->spec, hall->gguf, error);
    if (!status)
        status = tokenizer_new(&hall->tokenizer, hall->gguf, error);
    if (!status)
        status = read_template(hall, error);
    if (status)
        return status;
    name_model(hall);
    token_name(hall, tokenizer_bos(hall->tokenizer), hall->bos_text, sizeof(hall->bos_text));
    token_name(hall, tokenizer_eos(hall->tokenizer), hall->eos_text, sizeof(hall->eos_text));
    return STATUS_OK;
}

// --- the options ---

static void fill_defaults(struct coordinator_options *options)
{
    options->listen = options->listen ? options->listen : "127.0.0.1:50051";
    options->pool_listen = options->pool_listen ? options->pool_listen : "127.0.0.1:50052";
    options->n_workers = options->n_workers ? options->n_workers : 1;
    options->max_sequences = options->max_sequences ? options->max_sequences : 32;
    options->max_waiting = options->max_waiting ? options->max_waiting : 256;
    options->step_budget = options->step_budget ? options->step_budget : 512;
    options->chunk = options->chunk ? options->chunk : 256;
    options->memory_fraction = options->memory_fraction > 0 ? options->memory_fraction : 0.9;
    options->step_timeout_us = options->step_timeout_us ? options->step_timeout_us : 30000000;
}

static int check_options(struct coordinator *hall, struct error *error)
{
    struct coordinator_options *options = &hall->options;
    uint32_t trained = hall->spec.context ? hall->spec.context : DEFAULT_CONTEXT;
    if (options->context == 0)
        options->context = trained < DEFAULT_CONTEXT ? trained : DEFAULT_CONTEXT;
    if (options->context > MAX_CONTEXT)
        return error_set(error, STATUS_INVALID, "--context is %u; it may be at most %d", options->context,
                         MAX_CONTEXT);
    if (options->context > trained && hall->spec.position == POSITION_LEARNED)
        return error_set(error, STATUS_INVALID, "--context is %u, but the model has positions for %u only",
                         options->context, trained);
    if (options->context > trained)
        log_warn("--context is %u; the model was trained for %u", options->context, trained);
    if (options->max_sequences > MAX_SLOTS)
        return error_set(error, STATUS_INVALID, "--max-sequences is %u; it may be at most %d",
                         options->max_sequences, MAX_SLOTS);
    if (options->step_budget > MAX_STEP_TOKENS || options->step_budget < options->max_sequences)
        return error_set(
            error, STATUS_INVALID,
            "--step-budget is %u; it must be at least --max-sequences, which is %u, and at most %d",
            options->step_budget, options->max_sequences, MAX_STEP_TOKENS);
    uint32_t per_sequence = (options->context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    if (options->n_pages && options->n_pages < per_sequence)
        return error_set(error, STATUS_INVALID, "--kv-pages is %u; one sequence of %u positions needs %u",
                         options->n_pages, options->context, per_sequence);
    hall->max_streams = options->max_sequences + options->max_waiting;
    if (hall->max_streams > MAX_REQUESTS)
        return error_set(error, STATUS_INVALID, "--max-waiting is %u; it may be at most %u",
                         options->max_waiting, MAX_REQUESTS - options->max_sequences);
    return STATUS_OK;
}

// --- the rooms ---

static int no_memory(struct error *error)
{
    return error_set(error, STATUS_NO_MEMORY, "out of memory");
}

static int open_streams(struct coordinator *hall, struct error *error)
{
    hall->streams = calloc(hall->max_streams, sizeof(*hall->streams));
    hall->free_streams = calloc(hall->max_streams, sizeof(*hall->free_streams));
    if (!hall->streams || !hall->free_streams || queue_new(&hall->bell, 1, 1))
        return no_memory(error);
    for (uint32_t i = 0; i < hall->max_streams; i++)
        hall->free_streams[i] = hall->max_streams - 1 - i;
    step_plan_init(&hall->plan);
    return STATUS_OK;
}

static int open_steps(struct coordinator *hall, struct error *error)
{
    const struct coordinator_options *options = &hall->options;
    const struct worker_pool_options pool = {.spec = &hall->spec,
                                             .gguf = hall->gguf,
                                             .n_workers = options->n_workers,
                                             .backend = options->backend,
                                             .n_slots = options->max_sequences,
                                             .context = options->context,
                                             .max_positions = options->step_budget,
                                             .n_pages = options->n_pages,
                                             .memory_fraction = options->memory_fraction,
                                             .by_bytes = options->by_bytes,
                                             .bell = hall->bell};
    int status = worker_pool_new(&hall->pool, &pool, error);
    if (status)
        return status;
    const struct pipeline_options pipeline = {.pool = hall->pool,
                                              .bounds = {.n_slots = options->max_sequences,
                                                         .context = options->context,
                                                         .vocab_size = hall->spec.vocab_size,
                                                         .max_positions = options->step_budget},
                                              .step_timeout_us = options->step_timeout_us};
    const struct scheduler_options scheduler = {.n_slots = options->max_sequences,
                                                .context = options->context,
                                                .vocab_size = hall->spec.vocab_size,
                                                .max_waiting = options->max_waiting,
                                                .step_budget = options->step_budget,
                                                .chunk = options->chunk};
    if (pipeline_new(&hall->pipeline, &pipeline) || scheduler_new(&hall->scheduler, &scheduler))
        return no_memory(error);
    return STATUS_OK;
}

static void describe_model(const struct coordinator *hall, struct wire_model *model, char *tokenizer,
                           size_t capacity)
{
    const struct model_spec *spec = &hall->spec;
    const char *pre = tokenizer_pre(hall->tokenizer);
    size_t n_end = 0;
    snprintf(tokenizer, capacity, "%s%s%s", tokenizer_model(hall->tokenizer), pre[0] ? "/" : "", pre);
    *model = (struct wire_model){.name = hall->model_name,
                                 .architecture = spec->architecture,
                                 .tokenizer = tokenizer,
                                 .chat_template = hall->template_source ? hall->template_source : "",
                                 .layers = spec->n_layers,
                                 .width = spec->width,
                                 .heads = spec->n_heads,
                                 .kv_heads = spec->n_kv_heads,
                                 .head_size = spec->head_size,
                                 .ffn_width = spec->ffn_width,
                                 .vocabulary = spec->vocab_size,
                                 .context = hall->options.context,
                                 .trained_context = spec->context,
                                 .file_bytes = gguf_file_bytes(hall->gguf),
                                 .fingerprint = gguf_fingerprint(hall->gguf),
                                 .bos_id = tokenizer_bos(hall->tokenizer),
                                 .end_ids = tokenizer_end_tokens(hall->tokenizer, &n_end),
                                 .has_chat_template = hall->template_source != NULL};
    model->n_end_ids = (uint32_t)n_end;
}

static int render(void *chat, const char *json, service_rendered *done, void *context, struct error *error)
{
    return chat_template_render(chat, json, done, context, error);
}

static int open_service(struct coordinator *hall, struct error *error)
{
    struct wire_model model;
    char tokenizer[128];
    describe_model(hall, &model, tokenizer, sizeof(tokenizer));
    const struct chat_template_options chat = {.source = hall->template_source,
                                               .bos = hall->bos_text,
                                               .eos = hall->eos_text,
                                               .python = hall->options.python};
    int status = chat_template_new(&hall->chat, &chat, error);
    if (status)
        return status;
    const struct service_options service = {.rules = {.model_name = hall->model_name,
                                                      .tokenizer = hall->tokenizer,
                                                      .vocab_size = hall->spec.vocab_size,
                                                      .context = hall->options.context,
                                                      .max_slots = hall->options.max_sequences,
                                                      .credit = STREAM_CREDIT},
                                            .model = &model,
                                            .max_calls = hall->max_streams,
                                            .render = hall->template_source ? render : NULL,
                                            .renderer = hall->chat,
                                            .bell = hall->bell};
    return service_new(&hall->service, &service, error);
}

// --- the endpoints ---

// The address people can dial: a port that was left to the system is filled in.
static void bound_address(const char *address, int port, char out[ADDRESS_BYTES])
{
    const char *colon = strrchr(address, ':');
    if (strncmp(address, "unix:", 5) == 0 || !colon)
        snprintf(out, ADDRESS_BYTES, "%s", address);
    else
        snprintf(out, ADDRESS_BYTES, "%.*s:%d", (int)(colon - address), address, port);
}

static int listen_all(struct rpc_server *server, const char *addresses, char first[ADDRESS_BYTES],
                      struct error *error)
{
    for (const char *at = addresses; *at;) {
        size_t length = strcspn(at, ",");
        char address[ADDRESS_BYTES];
        int port = 0;
        if (length == 0 || length >= sizeof(address))
            return error_set(error, STATUS_INVALID, "\"%s\" is not a list of addresses", addresses);
        snprintf(address, sizeof(address), "%.*s", (int)length, at);
        int status = rpc_server_listen(server, address, &port, error);
        if (status)
            return status;
        if (first[0] == '\0')
            bound_address(address, port, first);
        at += length + (at[length] == ',');
    }
    return first[0] ? STATUS_OK : error_set(error, STATUS_INVALID, "there is no address to listen on");
}

static int open_client_port(struct coordinator *hall, struct error *error)
{
    const struct service_rules rules = {.credit = STREAM_CREDIT};
    const struct rpc_server_options options = {.threads = 2,
                                               .max_message_bytes = MAX_MESSAGE_BYTES,
                                               .max_queued = service_max_queued(&rules),
                                               .max_connection_age_ms = hall->options.max_connection_age_ms,
                                               .tls_cert = hall->options.tls_cert,
                                               .tls_key = hall->options.tls_key,
                                               .tls_ca = hall->options.tls_ca};
    int status = rpc_server_new(&hall->clients, &options, error);
    if (!status)
        status = listen_all(hall->clients, hall->options.listen, hall->client_address, error);
    if (!status && (service_attach(hall->service, hall->clients) ||
                    health_new(&hall->health, hall->clients) || reflection_add(hall->clients)))
        status = no_memory(error);
    return status;
}

static int open_pool_port(struct coordinator *hall, struct error *error)
{
    const struct rpc_server_options options = {.threads = 1,
                                               .max_message_bytes = MAX_POOL_MESSAGE_BYTES,
                                               .tls_cert = hall->options.pool_tls_cert,
                                               .tls_key = hall->options.pool_tls_key,
                                               .tls_ca = hall->options.pool_tls_ca};
    int status = rpc_server_new(&hall->workers, &options, error);
    if (!status)
        status = listen_all(hall->workers, hall->options.pool_listen, hall->pool_address, error);
    if (!status && worker_pool_attach(hall->pool, hall->workers))
        status = no_memory(error);
    return status;
}

int coordinator_new(struct coordinator **out, const struct coordinator_options *options, struct error *error)
{
    struct coordinator *hall = calloc(1, sizeof(*hall));
    if (!hall)
        return no_memory(error);
    hall->options = *options;
    fill_defaults(&hall->options);
    int status = open_model(hall, error);
    if (!status)
        status = check_options(hall, error);
    if (!status)
        status = open_streams(hall, error);
    if (!status)
        status = open_steps(hall, error);
    if (!status)
        status = open_service(hall, error);
    if (!status)
        status = open_client_port(hall, error);
    if (!status)
        status = open_pool_port(hall, error);
    if (!status)
        status = rpc_server_start(hall->clients, error);
    if (!status)
        status = rpc_server_start(hall->workers, error);
    if (status) {
        coordinator_free(hall);
        return status;
    }
    log_info("serving %s (%s, %u layers) with a context of %u to clients on %s, waiting for %u workers on %s",
             hall->model_name, hall->spec.architecture, hall->spec.n_layers, hall->options.context,
             hall->client_address, hall->options.n_workers, hall->pool_address);
    *out = hall;
    return STATUS_OK;
}

void coordinator_free(struct coordinator *hall)
{
    if (!hall)
        return;
    // Callbacks end first, then what they called.
    if (hall->clients)
        rpc_server_stop(hall->clients, STOP_GRACE_US);
    if (hall->workers)
        rpc_server_stop(hall->workers, STOP_GRACE_US);
    chat_template_free(hall->chat);
    for (uint32_t i = 0; hall->streams && i < hall->max_streams; i++) {
        if (hall->streams[i].id) {
            service_finish(hall->streams[i].call, STATUS_UNAVAILABLE, "the server is shutting down");
            answer_free(hall->streams[i].answer);
        }
    }
    service_free(hall->service);
    scheduler_free(hall->scheduler);
    pipeline_free(hall->pipeline);
    worker_pool_free(hall->pool);
    health_free(hall->health);
    rpc_server_free(hall->clients);
    rpc_server_free(hall->workers);
    step_plan_free(&hall->plan);
    queue_free(hall->bell);
    free(hall->streams);
    free(hall->free_streams);
    tokenizer_free(hall->tokenizer);
    free(hall->template_source);
    gguf_close(hall->gguf);
    free(hall);
}
