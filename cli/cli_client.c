// A client of strata.v1.Inference for the commands of this folder: calls and request options. The channel is
// shared by the threads of a benchmark; each call's stream is its own.
#include "cli/cli_client.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/rpc_client.h"
#include "common/utf8.h"

struct client {
    struct rpc_channel *channel;
    int64_t timeout_us;
    pthread_mutex_t mutex; // guards `running`
    struct rpc_stream *running;
    bool cancelled;
};

int client_open(struct client **out, const struct config *config, struct error *error)
{
    struct rpc_channel_options options = {
        .max_message_bytes = MAX_MESSAGE_BYTES,
        .tls_ca = config_string(config, "tls-ca"),
        .tls_cert = config_string(config, "tls-cert"),
        .tls_key = config_string(config, "tls-key"),
    };
    struct client *client = calloc(1, sizeof(*client));
    if (!client)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    int status = rpc_channel_new(&client->channel, config_string(config, "connect"), &options, error);
    if (status) {
        free(client);
        return status;
    }
    client->timeout_us = (int64_t)(config_float(config, "timeout") * 1e6);
    pthread_mutex_init(&client->mutex, NULL);
    *out = client;
    return STATUS_OK;
}

void client_close(struct client *client)
{
    if (!client)
        return;
    rpc_channel_free(client->channel);
    pthread_mutex_destroy(&client->mutex);
    free(client);
}

// Owns SIGINT for the rest of the process.
static void *interrupt_main(void *argument)
{
    struct client *client = argument;
    sigset_t set;
    int signal;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    while (sigwait(&set, &signal) == 0) {
        pthread_mutex_lock(&client->mutex);
        if (!client->running)
            _exit(128 + SIGINT);
        client->cancelled = true;
        rpc_stream_cancel(client->running);
        pthread_mutex_unlock(&client->mutex);
    }
    return NULL;
}

int client_watch_interrupts(struct client *client, struct error *error)
{
    pthread_t thread;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    int failure = pthread_create(&thread, NULL, interrupt_main, client);
    if (failure)
        return error_set(error, STATUS_INTERNAL, "cannot start a thread: %s", strerror(failure));
    pthread_detach(thread);
    return STATUS_OK;
}

static void set_running(struct client *client, struct rpc_stream *stream)
{
    pthread_mutex_lock(&client->mutex);
    client->running = stream;
    if (stream)
        client->cancelled = false;
    pthread_mutex_unlock(&client->mutex);
}

// Receives until the call ends. Each response lives in an arena of its own.
static int receive_responses(struct rpc_stream *stream,
                             bool (*on_response)(void *context,
                                                 const struct wire_generate_response *response),
                             void *context, struct error *error)
{
    struct arena arena = {0};
    int status;
    for (;;) {
        uint8_t *bytes;
        size_t length;
        status = rpc_stream_receive(stream, &bytes, &length, error);
        if (status != 1)
            break;
        struct wire_generate_response response;
        arena_reset(&arena);
        status = wire_decode_generate_response(&response, bytes, length, &arena, error);
        bool go_on = status == STATUS_OK && on_response(context, &response);
        free(bytes);
        if (!go_on)
            break;
    }
    arena_free(&arena);
    return status;
}

int client_generate(struct client *client, const struct wire_generate_request *request,
                    bool (*on_response)(void *context, const struct wire_generate_response *response),
                    void *context, struct error *error)
{
    struct wire_bytes bytes = {0};
    struct rpc_stream *stream = NULL;
    int status = wire_encode_generate_request(&bytes, request);
    if (status) {
        error_set(error, status, "the request could not be encoded: is the prompt UTF-8?");
        goto done;
    }
    status = rpc_stream_open(&stream, client->channel, "/strata.v1.Inference/Generate", client->timeout_us,
                             NULL, false, error);
    if (status)
        goto done;
    set_running(client, stream);
    status = rpc_stream_send(stream, bytes.data, bytes.length);
    if (status == STATUS_OK)
        status = rpc_stream_half_close(stream);
    // A call that failed at once refuses the send; its sentence comes with the receive.
    status = receive_responses(stream, on_response, context, error);
    pthread_mutex_lock(&client->mutex);
    if (client->cancelled)
        status = STATUS_OK;
    pthread_mutex_unlock(&client->mutex);
done:
    set_running(client, NULL);
    rpc_stream_free(stream);
    wire_bytes_free(&bytes);
    return status;
}

int client_get_model(struct client *client, struct wire_model *out, struct arena *arena, struct error *error)
{
    uint8_t *bytes;
    size_t length;
    int status = rpc_call_unary(client->channel, "/strata.v1.Inference/GetModel", "", 0, client->timeout_us,
                                false, &bytes, &length, error);
    if (status)
        return status;
    status = wire_decode_model(out, bytes, length, arena, error);
    free(bytes);
    return status;
}

int client_get_pool(struct client *client, struct wire_pool *out, struct arena *arena, struct error *error)
{
    uint8_t *bytes;
    size_t length;
    int status = rpc_call_unary(client->channel, "/strata.v1.Inference/GetPool", "", 0, client->timeout_us,
                                false, &bytes, &length, error);
    if (status)
        return status;
    status = wire_decode_pool(out, bytes, length, arena, error);
    free(bytes);
    return status;
}

// --- request options ---

int client_parse_ids(const char *text, int32_t **ids, uint32_t *count, struct arena *arena,
                     struct error *error)
{
    size_t capacity = 1;
    for (const char *at = text; *at; at++)
        capacity += *at == ',';
    *ids = arena_alloc(arena, capacity, sizeof(**ids));
    *count = 0;
    if (!*ids)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    const char *at = text;
    while (*at) {
        char *end;
        errno = 0;
        long id = strtol(at, &end, 10);
        while (isspace((unsigned char)*end))
            end++;
        if (end == at || errno || id < 0 || id > INT32_MAX || (*end && *end != ','))
            return error_set(error, STATUS_INVALID,
                             "token ids are numbers separated by commas, not \"%.40s\"", at);
        (*ids)[(*count)++] = (int32_t)id;
        at = *end ? end + 1 : end;
    }
    return STATUS_OK;
}

static int parse_biases(struct wire_generate_request *request, const char *text, struct arena *arena,
                        struct error *error)
{
    size_t capacity = 1;
    for (const char *at = text; *at; at++)
        capacity += *at == ',';
    struct logit_bias *biases = arena_alloc(arena, capacity, sizeof(*biases));
    if (!biases)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    const char *at = text;
    while (*at) {
        char *colon, *end = NULL;
        long id = strtol(at, &colon, 10);
        float bias = *colon == ':' ? strtof(colon + 1, &end) : 0;
        if (colon == at || !end || end == colon + 1 || id < 0 || id > INT32_MAX || isnan(bias) ||
            (*end && *end != ','))
            return error_set(error, STATUS_INVALID, "--logit-bias takes ID:BIAS,..., not \"%.40s\"", at);
        biases[request->n_biases++] = (struct logit_bias){.token = (int32_t)id, .bias = bias};
        at = *end ? end + 1 : end;
    }
    request->biases = biases;
    return STATUS_OK;
}

static int read_stops(struct wire_generate_request *request, const struct config *config, struct arena *arena,
                      struct error *error)
{
    size_t n_stop = config_list_count(config, "stop");
    const char **stops = arena_alloc(arena, n_stop ? n_stop : 1, sizeof(*stops));
    if (!stops)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    for (size_t i = 0; i < n_stop; i++)
        stops[i] = config_list(config, "stop", i);
    request->stop = stops;
    request->n_stop = (uint32_t)n_stop;
    if (!config_is_set(config, "stop-ids"))
        return STATUS_OK;
    int32_t *ids;
    int status =
        client_parse_ids(config_string(config, "stop-ids"), &ids, &request->n_stop_ids, arena, error);
    request->stop_ids = ids;
    return status;
}

int client_read_sampling(struct wire_generate_request *request, const struct config *config,
                         struct arena *arena, struct error *error)
{
    struct sampling_params *sampling = &request->sampling;
    const struct {
        const char *name;
        float *value;
        bool *present;
    } floats[] = {
        {"temperature", &sampling->temperature, &request->has_temperature},
        {"top-p", &sampling->top_p, &request->has_top_p},
        {"min-p", &sampling->min_p, &request->has_min_p},
        {"repetition-penalty", &sampling->repetition_penalty, &request->has_repetition_penalty},
        {"presence-penalty", &sampling->presence_penalty, &request->has_presence_penalty},
        {"frequency-penalty", &sampling->frequency_penalty, &request->has_frequency_penalty},
    };
    *sampling = SAMPLING_DEFAULTS;
    for (size_t i = 0; i < sizeof(floats) / sizeof(floats[0]); i++) {
        *floats[i].present = config_is_set(config, floats[i].name);
        if (*floats[i].present)
            *floats[i].value = (float)config_float(config, floats[i].name);
    }
    request->has_top_k = config_is_set(config, "top-k");
    if (request->has_top_k)
        sampling->top_k = (uint32_t)config_int(config, "top-k");
    request->has_seed = config_is_set(config, "seed");
    if (request->has_seed)
        sampling->seed = (uint64_t)config_int(config, "seed");
    request->has_max_tokens = config_is_set(config, "max-tokens");
    if (request->has_max_tokens)
        request->max_tokens = (uint32_t)config_int(config, "max-tokens");
    if (config_is_set(config, "min-tokens"))
        request->min_tokens = (uint32_t)config_int(config, "min-tokens");
    request->ignore_eos = config_flag(config, "ignore-eos");
    if (config_is_set(config, "logit-bias")) {
        int status = parse_biases(request, config_string(config, "logit-bias"), arena, error);
        if (status)
            return status;
    }
    return read_stops(request, config, arena, error);
}

int client_read_stream(FILE *stream, char **text, size_t *length, struct arena *arena, struct error *error)
{
    size_t capacity = 1 << 16, used = 0;
    char *buffer = malloc(capacity);
    while (buffer) {
        used += fread(buffer + used, 1, capacity - used, stream);
        if (used < capacity)
            break;
        char *grown = realloc(buffer, capacity *= 2);
        if (!grown)
            free(buffer);
        buffer = grown;
    }
    *text = buffer ? arena_copy(arena, buffer, used) : NULL;
    *length = used;
    free(buffer);
    if (!*text)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    return ferror(stream) ? error_set(error, STATUS_IO, "reading standard input: %s", strerror(errno))
                          : STATUS_OK;
}

int client_read_prompt(struct wire_generate_request *request, const struct config *config,
                       struct arena *arena, struct error *error)
{
    const char *tokens = config_string(config, "tokens");
    size_t n_words = config_positional_count(config);
    if (tokens) {
        if (n_words)
            return error_set(error, STATUS_INVALID, "give either --tokens or a text, not both");
        int32_t *ids;
        request->input = WIRE_INPUT_TOKENS;
        int status = client_parse_ids(tokens, &ids, &request->n_tokens, arena, error);
        request->tokens = ids;
        return status;
    }
    request->input = WIRE_INPUT_TEXT;
    if (!n_words) {
        char *text;
        int status = client_read_stream(stdin, &text, &request->text.length, arena, error);
        request->text.data = text;
        return status;
    }
    size_t length = 0;
    for (size_t i = 0; i < n_words; i++)
        length += strlen(config_positional(config, i)) + 1;
    char *text = arena_alloc(arena, length + 1, 1), *to = text;
    if (!text)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    for (size_t i = 0; i < n_words; i++)
        to = stpcpy(stpcpy(to, i ? " " : ""), config_positional(config, i));
    request->text = (struct wire_text){.data = text, .length = (size_t)(to - text)};
    return STATUS_OK;
}

// --- JSON ---

json_t *json_text(const char *text, size_t length)
{
    char *clean = malloc(length * 3 + 1), *to = clean;
    for (size_t at = 0, taken; clean && at < length; at += taken) {
        bool whole = utf8_scan(text + at, length - at, &taken) == UTF8_WHOLE;
        to = mempcpy(to, whole ? text + at : UTF8_REPLACEMENT, whole ? taken : 3);
    }
    json_t *result = clean ? json_stringn(clean, (size_t)(to - clean)) : NULL;
    free(clean);
    return result;
}

// Minus infinity has no place in JSON; a bias can make one.
static json_t *json_score(float logprob)
{
    return isfinite(logprob) ? json_real(logprob) : json_null();
}

json_t *json_logprob(const struct wire_logprob *logprob)
{
    json_t *tops = json_array();
    for (uint32_t i = 0; i < logprob->n_top; i++) {
        const struct wire_logprob *top = &logprob->top[i];
        json_array_append_new(tops, json_pack("{s:i, s:o, s:o}", "token", top->token, "text",
                                              json_text(top->text.data, top->text.length), "logprob",
                                              json_score(top->logprob)));
    }
    return json_pack("{s:i, s:o, s:o, s:o}", "token", logprob->token, "text",
                     json_text(logprob->text.data, logprob->text.length), "logprob",
                     logprob->unscored ? json_null() : json_score(logprob->logprob), "top", tops);
}
