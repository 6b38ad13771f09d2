// A Generate request judged against the server's rules, and made into what the scheduler takes. Pure apart
// from the random numbers: no calls, no state. Runs on gRPC threads and on the chat template's. Every refusal
// names the field, the value and the limit.
#include "coordinator/service_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "common/clock.h"

uint64_t service_draw(void)
{
    uint64_t value = 0;
    ssize_t got;
    do {
        got = getrandom(&value, sizeof(value), 0);
    } while (got < 0 && errno == EINTR);
    // Without a source of randomness a seed may still be drawn; it only has to differ between requests.
    if (got != (ssize_t)sizeof(value))
        value = (uint64_t)clock_wall_us() * UINT64_C(0x9E3779B97F4A7C15);
    return value >> 11; // 53 bits: a seed that is reported survives every JSON reader
}

int service_pick_id(const char *field, const char *metadata, char out[MAX_REQUEST_ID_BYTES + 1],
                    struct error *error)
{
    const char *id = field[0] != '\0' ? field : metadata && metadata[0] != '\0' ? metadata : NULL;
    if (!id) {
        snprintf(out, MAX_REQUEST_ID_BYTES + 1, "%016" PRIx64, service_draw());
        return STATUS_OK;
    }
    size_t length = strlen(id);
    if (length > MAX_REQUEST_ID_BYTES)
        return error_set(error, STATUS_INVALID, "request_id has %zu bytes; it may have %d", length,
                         MAX_REQUEST_ID_BYTES);
    for (size_t i = 0; i < length; i++) {
        if (id[i] <= ' ' || id[i] > '~')
            return error_set(error, STATUS_INVALID,
                             "request_id has a character that is not printable ASCII at byte %zu", i);
    }
    memcpy(out, id, length + 1);
    return STATUS_OK;
}

static int check_token(const struct service_rules *rules, const char *field, int32_t token,
                       struct error *error)
{
    if (token >= 0 && (uint32_t)token < rules->vocab_size)
        return STATUS_OK;
    return error_set(error, STATUS_INVALID, "%s has the token %d; the model's ids are 0 to %u", field, token,
                     rules->vocab_size - 1);
}

static int check_input(const struct service_rules *rules, const struct wire_generate_request *asked,
                       struct error *error)
{
    if (asked->input == WIRE_INPUT_NONE)
        return error_set(error, STATUS_INVALID, "the request has no input: set text, tokens or messages");
    if (asked->input != WIRE_INPUT_TOKENS && !tokenizer_has_text(rules->tokenizer))
        return error_set(error, STATUS_INVALID,
                         "the model file has no text vocabulary: send tokens instead of text or messages");
    if (asked->input == WIRE_INPUT_MESSAGES && asked->messages.n_messages == 0)
        return error_set(error, STATUS_INVALID, "messages is empty");
    for (uint32_t i = 0; asked->input == WIRE_INPUT_TOKENS && i < asked->n_tokens; i++) {
        int status = check_token(rules, "tokens", asked->tokens[i], error);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static int check_amounts(const struct service_rules *rules, const struct wire_generate_request *asked,
                         struct error *error)
{
    uint32_t most = rules->max_slots < MAX_CHOICES ? rules->max_slots : MAX_CHOICES;
    if (asked->n == 0 || asked->n > most)
        return error_set(error, STATUS_INVALID, "n is %u; this server takes 1 to %u", asked->n, most);
    if (asked->has_max_tokens && asked->min_tokens > asked->max_tokens)
        return error_set(error, STATUS_INVALID, "min_tokens is %u, more than max_tokens, which is %u",
                         asked->min_tokens, asked->max_tokens);
    if (asked->min_tokens > rules->context)
        return error_set(error, STATUS_INVALID, "min_tokens is %u, more than the context of %u",
                         asked->min_tokens, rules->context);
    if (asked->top_logprobs > MAX_TOP_LOGPROBS)
        return error_set(error, STATUS_INVALID, "top_logprobs is %u; it may be at most %d",
                         asked->top_logprobs, MAX_TOP_LOGPROBS);
    if (asked->top_logprobs > 0 && !asked->logprobs && !asked->prompt_logprobs)
        return error_set(error, STATUS_INVALID,
                         "top_logprobs is %u, but neither logprobs nor prompt_logprobs is set",
                         asked->top_logprobs);
    return STATUS_OK;
}

static int check_stops(const struct service_rules *rules, const struct wire_generate_request *asked,
                       struct error *error)
{
    if (asked->n_stop > MAX_STOP_STRINGS)
        return error_set(error, STATUS_INVALID, "stop has %u strings; it may have %d", asked->n_stop,
                         MAX_STOP_STRINGS);
    if (asked->n_stop > 0 && !tokenizer_has_text(rules->tokenizer))
        return error_set(error, STATUS_INVALID,
                         "stop cannot be used: the model file has no text vocabulary; use stop_ids");
    for (uint32_t i = 0; i < asked->n_stop; i++) {
        size_t length = strlen(asked->stop[i]);
        if (length == 0 || length > MAX_STOP_BYTES)
            return error_set(error, STATUS_INVALID, "stop[%u] has %zu bytes; it must have 1 to %d", i, length,
                             MAX_STOP_BYTES);
    }
    if (asked->n_stop_ids > MAX_STOP_IDS)
        return error_set(error, STATUS_INVALID, "stop_ids has %u ids; it may have %d", asked->n_stop_ids,
                         MAX_STOP_IDS);
    for (uint32_t i = 0; i < asked->n_stop_ids; i++) {
        int status = check_token(rules, "stop_ids", asked->stop_ids[i], error);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static int check_biases(const struct service_rules *rules, const struct wire_generate_request *asked,
                        struct error *error)
{
    if (asked->n_biases > MAX_LOGIT_BIAS)
        return error_set(error, STATUS_INVALID, "logit_bias has %u entries; it may have %d", asked->n_biases,
                         MAX_LOGIT_BIAS);
    for (uint32_t i = 0; i < asked->n_biases; i++) {
        float bias = asked->biases[i].bias;
        int status = check_token(rules, "logit_bias", asked->biases[i].token, error);
        if (status)
            return status;
        if (isnan(bias) || bias == INFINITY)
            return error_set(error, STATUS_INVALID,
                             "logit_bias of token %d is %g; it must be a number, or -inf to forbid the token",
                             asked->biases[i].token, (double)bias);
    }
    return STATUS_OK;
}

static int check_sampling(const struct sampling_params *sampling, struct error *error)
{
    if (!isfinite(sampling->temperature) || sampling->temperature < 0)
        return error_set(error, STATUS_INVALID, "temperature is %g; it must be 0 (greedy) or more",
                         (double)sampling->temperature);
    if (!(sampling->top_p > 0 && sampling->top_p <= 1))
        return error_set(error, STATUS_INVALID, "top_p is %g; it must be over 0 and at most 1",
                         (double)sampling->top_p);
    if (!(sampling->min_p >= 0 && sampling->min_p <= 1))
        return error_set(error, STATUS_INVALID, "min_p is %g; it must be 0 to 1", (double)sampling->min_p);
    if (!isfinite(sampling->repetition_penalty) || sampling->repetition_penalty <= 0)
        return error_set(error, STATUS_INVALID, "repetition_penalty is %g; it must be over 0 (1 is none)",
                         (double)sampling->repetition_penalty);
    if (!isfinite(sampling->presence_penalty))
        return error_set(error, STATUS_INVALID, "presence_penalty is %g; it must be a finite number",
                         (double)sampling->presence_penalty);
    if (!isfinite(sampling->frequency_penalty))
        return error_set(error, STATUS_INVALID, "frequency_penalty is %g; it must be a finite number",
                         (double)sampling->frequency_penalty);
    return STATUS_OK;
}

int service_check_generate(const struct service_rules *rules, const struct wire_generate_request *asked,
                           struct error *error)
{
    if (asked->model[0] != '\0' && strcmp(asked->model, rules->model_name) != 0)
        return error_set(error, STATUS_NOT_FOUND, "the model \"%.128s\" is not served here; this is \"%s\"",
                         asked->model, rules->model_name);
    int status = check_input(rules, asked, error);
    if (!status)
        status = check_amounts(rules, asked, error);
    if (!status)
        status = check_stops(rules, asked, error);
    if (!status)
        status = check_biases(rules, asked, error);
    if (!status)
        status = check_sampling(&asked->sampling, error);
    return status;
}

// --- the request ---

static int check_prompt(const struct service_rules *rules, const struct wire_generate_request *asked,
                        size_t n_prompt, struct error *error)
{
    bool scores_only = asked->has_max_tokens && asked->max_tokens == 0;
    if (n_prompt == 0)
        return error_set(error, STATUS_INVALID, "the prompt is empty: it has no tokens");
    if (n_prompt > rules->context)
        return error_set(error, STATUS_INVALID, "the prompt has %zu tokens, more than the context of %u",
                         n_prompt, rules->context);
    if (n_prompt == rules->context && !scores_only)
        return error_set(error, STATUS_INVALID,
                         "the prompt has %zu tokens, which fills the context of %u and leaves no room for an "
                         "answer",
                         n_prompt, rules->context);
    return STATUS_OK;
}

static int compare_ids(const void *a, const void *b)
{
    int32_t left = *(const int32_t *)a, right = *(const int32_t *)b;
    return (left > right) - (left < right);
}

// The model's own end tokens (unless ignored) and the stop ids: sorted, each once.
static bool gather_end_ids(const struct service_rules *rules, const struct wire_generate_request *asked,
                           struct request *request)
{
    size_t n_end = 0;
    const int32_t *end = asked->ignore_eos ? NULL : tokenizer_end_tokens(rules->tokenizer, &n_end);
    size_t count = 0;
    request->end_ids = malloc((n_end + asked->n_stop_ids + 1) * sizeof(int32_t));
    if (!request->end_ids)
        return false;
    for (size_t i = 0; i < n_end; i++) {
        if (end[i] >= 0 && (uint32_t)end[i] < rules->vocab_size)
            request->end_ids[count++] = end[i];
    }
    for (uint32_t i = 0; i < asked->n_stop_ids; i++)
        request->end_ids[count++] = asked->stop_ids[i];
    qsort(request->end_ids, count, sizeof(int32_t), compare_ids);
    for (size_t i = 0; i < count; i++) {
        if (i == 0 || request->end_ids[i] != request->end_ids[i - 1])
            request->end_ids[request->n_end_ids++] = request->end_ids[i];
    }
    return true;
}

static bool copy_biases(const struct wire_generate_request *asked, struct request *request)
{
    if (asked->n_biases == 0)
        return true;
    request->biases = malloc(asked->n_biases * sizeof(*asked->biases));
    if (!request->biases)
        return false;
    memcpy(request->biases, asked->biases, asked->n_biases * sizeof(*asked->biases));
    request->n_biases = asked->n_biases;
    return true;
}

int service_make_request(const struct service_rules *rules, const struct wire_generate_request *asked,
                         struct token_list *prompt, struct request **out, struct error *error)
{
    int status = check_prompt(rules, asked, prompt->count, error);
    if (status)
        return status;
    struct request *request = request_new();
    if (!request || !gather_end_ids(rules, asked, request) || !copy_biases(asked, request)) {
        request_free(request);
        return error_set(error, STATUS_NO_MEMORY, "the server is out of memory");
    }
    uint32_t room = rules->context - (uint32_t)prompt->count;
    request->max_tokens = asked->has_max_tokens && asked->max_tokens < room ? asked->max_tokens : room;
    request->n_choices = asked->n;
    request->sampling = asked->sampling;
    request->sampling.seed = asked->has_seed ? asked->sampling.seed : service_draw();
    request->sampling.min_tokens = asked->min_tokens;
    request->logprobs = asked->logprobs;
    request->prompt_logprobs = asked->prompt_logprobs;
    request->top_logprobs = asked->top_logprobs;
    request->credit = rules->credit;
    request->prompt = prompt->ids;
    request->n_prompt = (uint32_t)prompt->count;
    *prompt = (struct token_list){0};
    *out = request;
    return STATUS_OK;
}
