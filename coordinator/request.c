// One request as plain memory: construction, release, the check that keeps what no step plan could say out of
// the scheduler, and the arithmetic of what a request can come to need. Owned by the scheduler once
// submitted.
#include "coordinator/request.h"

#include <math.h>
#include <stdlib.h>

struct request *request_new(void)
{
    struct request *request = calloc(1, sizeof(*request));
    if (!request)
        return NULL;
    request->sampling = SAMPLING_DEFAULTS;
    request->n_choices = 1;
    request->deadline_us = INT64_MAX;
    return request;
}

void request_free(struct request *request)
{
    if (!request)
        return;
    free(request->name);
    free(request->prompt);
    free(request->biases);
    free(request->end_ids);
    free(request);
}

static int check_sizes(const struct request *request, uint32_t context, struct error *error)
{
    uint32_t longest = request->max_tokens > 0 ? context - 1 : context;
    if (request->n_prompt == 0)
        return error_set(error, STATUS_INVALID, "the prompt has no tokens");
    if (request->n_prompt > longest)
        return error_set(error, STATUS_INVALID, "the prompt has %u tokens, at most %u fit the context of %u",
                         request->n_prompt, longest, context);
    if (request->n_choices == 0 || request->n_choices > MAX_CHOICES)
        return error_set(error, STATUS_INVALID, "%u choices, at least 1 and at most %d can be asked for",
                         request->n_choices, MAX_CHOICES);
    if (request->top_logprobs > MAX_TOP_LOGPROBS)
        return error_set(error, STATUS_INVALID, "%u top logprobs, over the limit of %d",
                         request->top_logprobs, MAX_TOP_LOGPROBS);
    if (request->n_biases > MAX_LOGIT_BIAS)
        return error_set(error, STATUS_INVALID, "%u logit biases, over the limit of %d", request->n_biases,
                         MAX_LOGIT_BIAS);
    if (request->n_end_ids > MAX_STOP_IDS + MAX_END_TOKENS)
        return error_set(error, STATUS_INVALID, "%u stop ids, over the limit of %d", request->n_end_ids,
                         MAX_STOP_IDS + MAX_END_TOKENS);
    return STATUS_OK;
}

static int check_id(const char *what, int32_t id, uint32_t vocab_size, struct error *error)
{
    if (id >= 0 && (uint32_t)id < vocab_size)
        return STATUS_OK;
    return error_set(error, STATUS_INVALID, "%s %d is not in the vocabulary of %u", what, id, vocab_size);
}

static int check_ids(const struct request *request, uint32_t vocab_size, struct error *error)
{
    int status = STATUS_OK;
    for (uint32_t i = 0; status == STATUS_OK && i < request->n_prompt; i++)
        status = check_id("prompt token", request->prompt[i], vocab_size, error);
    for (uint32_t i = 0; status == STATUS_OK && i < request->n_end_ids; i++) {
        status = check_id("stop id", request->end_ids[i], vocab_size, error);
        if (status == STATUS_OK && i > 0 && request->end_ids[i - 1] > request->end_ids[i])
            status = error_set(error, STATUS_INVALID, "the stop ids are not sorted");
    }
    for (uint32_t i = 0; status == STATUS_OK && i < request->n_biases; i++) {
        status = check_id("logit bias token", request->biases[i].token, vocab_size, error);
        if (status == STATUS_OK && isnan(request->biases[i].bias))
            status = error_set(error, STATUS_INVALID, "the logit bias of token %d is not a number",
                               request->biases[i].token);
    }
    return status;
}

static int check_sampling(const struct sampling_params *p, struct error *error)
{
    if (!isfinite(p->temperature) || p->temperature < 0)
        return error_set(error, STATUS_INVALID, "the temperature %g is not 0 or more", p->temperature);
    if (!isfinite(p->repetition_penalty) || p->repetition_penalty <= 0)
        return error_set(error, STATUS_INVALID, "the repetition penalty %g is not over 0",
                         p->repetition_penalty);
    if (!isfinite(p->top_p) || !isfinite(p->min_p) || !isfinite(p->presence_penalty) ||
        !isfinite(p->frequency_penalty))
        return error_set(error, STATUS_INVALID, "a sampling parameter is not a finite number");
    return STATUS_OK;
}

int request_check(const struct request *request, uint32_t context, uint32_t vocab_size, struct error *error)
{
    int status = check_sizes(request, context, error);
    if (status == STATUS_OK)
        status = check_ids(request, vocab_size, error);
    if (status == STATUS_OK)
        status = check_sampling(&request->sampling, error);
    return status;
}

uint32_t request_max_outputs(const struct request *request, uint32_t context)
{
    uint32_t room = context - request->n_prompt;
    return request->max_tokens < room ? request->max_tokens : room;
}

uint32_t request_positions(const struct request *request, uint32_t context)
{
    uint32_t outputs = request_max_outputs(request, context);
    return request->n_prompt + (outputs > 0 ? outputs - 1 : 0);
}

static uint64_t page_count(uint32_t positions)
{
    return ((uint64_t)positions + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
}

uint64_t request_pages(const struct request *request, uint32_t context)
{
    uint64_t each = page_count(request_positions(request, context));
    if (request->n_choices == 1 || request_max_outputs(request, context) <= 1)
        return each; // one sequence writes, or nothing is written after the prompt
    uint64_t shared = request->n_prompt / KV_PAGE_POSITIONS;
    return shared + request->n_choices * (each - shared);
}
