// One request's answer on its way out: what the scheduler says of its choices becomes responses. Each choice
// has a token stream, which holds ids and text back while a character is unfinished or a stop string is
// possible; the logprobs of held ids wait here in the same order. The hall's thread.
//
// Credit: a token's room in the client's stream is taken by the response that leaves because of it. One that
// is held back needs none now, and the response that releases it is charged to the token that set it free, so
// the responses in the queue never outnumber the credit, and no held token can use the credit up.
#include "coordinator/coordinator_internal.h"

#include <stdlib.h>
#include <string.h>

enum {
    RESPONSE_BYTES = 1000000, // prompt logprobs in one response, about
    SCORE_BYTES = 24,         // one logprob on the wire, its text not counted, at most
};

struct held_logprob {
    struct token_logprob token;
    uint32_t n_tops;
    struct token_logprob tops[MAX_TOP_LOGPROBS];
};

struct answer_choice {
    struct token_stream *stream;
    struct held_logprob *held; // of pushed ids that are not released yet, oldest first
    uint32_t n_held, held_capacity;
    uint32_t pushed, released;
    bool stopped; // a stop string is complete
    int64_t first_us, last_us;
};

struct answer {
    struct answer_options options; // .spec is not kept
    bool prompt_due;               // prompt logprobs were asked for and have not begun
    struct arena arena;            // of the response being made
    uint32_t n_choices;
    struct answer_choice choices[];
};

int answer_new(struct answer **out, const struct answer_options *options)
{
    const struct request *spec = options->spec;
    struct answer *answer = calloc(1, sizeof(*answer) + spec->n_choices * sizeof(answer->choices[0]));
    if (!answer)
        return STATUS_NO_MEMORY;
    answer->options = *options;
    answer->options.spec = NULL;
    answer->prompt_due = spec->prompt_logprobs;
    const struct token_stream_options stream = {.tokenizer = options->tokenizer,
                                                .stops = options->stops,
                                                .n_stops = options->n_stops,
                                                .min_tokens = spec->sampling.min_tokens,
                                                .special = options->special};
    for (; answer->n_choices < spec->n_choices; answer->n_choices++) {
        int status = token_stream_new(&answer->choices[answer->n_choices].stream, &stream);
        if (status) {
            answer_free(answer);
            return status;
        }
    }
    *out = answer;
    return STATUS_OK;
}

void answer_free(struct answer *answer)
{
    if (!answer)
        return;
    for (uint32_t c = 0; c < answer->n_choices; c++) {
        token_stream_free(answer->choices[c].stream);
        free(answer->choices[c].held);
    }
    arena_free(&answer->arena);
    free(answer);
}

uint64_t answer_tokens(const struct answer *answer)
{
    uint64_t tokens = 0;
    for (uint32_t c = 0; answer && c < answer->n_choices; c++)
        tokens += answer->choices[c].released;
    return tokens;
}

// --- logprobs ---

static struct wire_text token_text(struct answer *answer, int32_t token)
{
    const struct tokenizer *tokenizer = answer->options.tokenizer;
    if (!tokenizer_has_text(tokenizer))
        return (struct wire_text){"", 0};
    size_t capacity = tokenizer_max_bytes(tokenizer);
    char *text = arena_alloc(&answer->arena, capacity + 1, 1);
    int length = text ? tokenizer_token_text(tokenizer, token, true, text, capacity) : 0;
    return (struct wire_text){text ? text : "", length > 0 ? (size_t)length : 0};
}

// A token with its alternatives. *bytes grows by about what it takes on the wire.
static bool fill_logprob(struct answer *answer, struct wire_logprob *to, struct token_logprob token,
                         const struct token_logprob *tops, uint32_t n_tops, size_t *bytes)
{
    struct wire_logprob *top = n_tops ? arena_alloc(&answer->arena, n_tops, sizeof(*top)) : NULL;
    *to = (struct wire_logprob){
        .token = token.token, .logprob = token.logprob, .text = token_text(answer, token.token), .top = top};
    *bytes += SCORE_BYTES + to->text.length;
    for (uint32_t i = 0; top && i < n_tops; i++) {
        top[i] = (struct wire_logprob){
            .token = tops[i].token, .logprob = tops[i].logprob, .text = token_text(answer, tops[i].token)};
        *bytes += SCORE_BYTES + top[i].text.length;
    }
    to->n_top = top ? n_tops : 0;
    return top || n_tops == 0;
}

static bool hold_logprob(struct answer_choice *choice, const struct scheduler_event *event)
{
    if (choice->n_held == choice->held_capacity) {
        uint32_t capacity = choice->held_capacity ? choice->held_capacity * 2 : 4;
        struct held_logprob *grown = realloc(choice->held, capacity * sizeof(*grown));
        if (!grown)
            return false;
        choice->held = grown;
        choice->held_capacity = capacity;
    }
    struct held_logprob *held = &choice->held[choice->n_held++];
    held->token = (struct token_logprob){event->token, event->logprob};
    held->n_tops = event->n_tops < MAX_TOP_LOGPROBS ? event->n_tops : MAX_TOP_LOGPROBS;
    if (held->n_tops)
        memcpy(held->tops, event->tops, held->n_tops * sizeof(*held->tops));
    return true;
}

// The logprobs of the `n` oldest ids held.
static bool release_logprobs(struct answer *answer, struct answer_choice *choice, uint32_t n,
                             struct wire_generate_response *response)
{
    if (choice->n_held < n)
        return true; // not asked for
    struct wire_logprob *list = arena_alloc(&answer->arena, n, sizeof(*list));
    size_t bytes = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct held_logprob *held = &choice->held[i];
        if (!list || !fill_logprob(answer, &list[i], held->token, held->tops, held->n_tops, &bytes))
            return false;
    }
    choice->n_held -= n;
    memmove(choice->held, choice->held + n, choice->n_held * sizeof(*choice->held));
    response->logprobs = list;
    response->n_logprobs = n;
    return true;
}

// --- the prompt ---

static int send_scores(struct answer *answer, const struct request *spec, const struct wire_logprob *list,
                       uint32_t n, bool first)
{
    const struct wire_generate_response response = {.prompt_logprobs = list,
                                                    .n_prompt_logprobs = n,
                                                    .prompt_token_ids = first ? spec->prompt : NULL,
                                                    .n_prompt_token_ids = first ? spec->n_prompt : 0};
    return answer->options.send(answer->options.to, &response, 0);
}

// Scores [0, n) of an event (which may be none), in as many responses as their size asks for. The first one
// of all begins with the prompt's ids and its first token, which nothing precedes.
static int take_scores(struct answer *answer, const struct scheduler_event *event, uint32_t n)
{
    const struct request *spec = event->spec;
    bool first = answer->prompt_due;
    size_t bytes = first ? (size_t)spec->n_prompt * 3 : 0;
    uint32_t count = 0;
    answer->prompt_due = false;
    arena_reset(&answer->arena);
    struct wire_logprob *list = arena_alloc(&answer->arena, n + 1, sizeof(*list));
    if (!list)
        return STATUS_NO_MEMORY;
    if (first) {
        list[count++] = (struct wire_logprob){
            .token = spec->prompt[0], .unscored = true, .text = token_text(answer, spec->prompt[0])};
    }
    uint32_t sent = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct step_prompt_logprob *score = &event->scores[i];
        if (!fill_logprob(answer, &list[count++], score->token, event->tops + score->top_first,
                          score->top_count, &bytes))
            return STATUS_NO_MEMORY;
        if (bytes < RESPONSE_BYTES)
            continue;
        int status = send_scores(answer, spec, list + sent, count - sent, first);
        if (status)
            return status;
        sent = count;
        bytes = 0;
        first = false;
    }
    return count > sent ? send_scores(answer, spec, list + sent, count - sent, first) : STATUS_OK;
}

// --- the choices ---

// What the stream has ready, as a response. False: nothing, or (with *status) memory is out.
static bool take_ready(struct answer *answer, uint32_t c, struct wire_generate_response *response,
                       int *status)
{
    struct answer_choice *choice = &answer->choices[c];
    struct token_delta delta;
    arena_reset(&answer->arena);
    *response = (struct wire_generate_response){.choice = c};
    if (!token_stream_take(choice->stream, &delta))
        return false;
    response->text = (struct wire_text){delta.text, delta.text_bytes};
    response->token_ids = delta.ids;
    response->n_token_ids = delta.n_ids;
    choice->released += delta.n_ids;
    if (!release_logprobs(answer, choice, delta.n_ids, response))
        *status = STATUS_NO_MEMORY;
    return *status == STATUS_OK;
}

static int take_token(struct answer *answer, const struct scheduler_event *event, int64_t now_us,
                      struct answer_reply *reply)
{
    struct answer_choice *choice = &answer->choices[event->choice];
    reply->credit = 1; // unless a response leaves
    if (choice->stopped)
        return STATUS_OK;
    if (event->spec->logprobs && !hold_logprob(choice, event))
        return STATUS_NO_MEMORY;
    int matched = token_stream_push(choice->stream, event->token);
    if (matched < 0)
        return matched;
    choice->first_us = choice->pushed++ ? choice->first_us : now_us;
    choice->last_us = now_us;
    choice->stopped = reply->stop = matched > 0;
    if (choice->stopped)
        return STATUS_OK; // what is left comes with the choice's end
    struct wire_generate_response response;
    int status = STATUS_OK;
    if (!take_ready(answer, event->choice, &response, &status))
        return status;
    reply->credit = 0;
    return answer->options.send(answer->options.to, &response, 1);
}

static void fill_timings(const struct answer_choice *choice, const struct scheduler_event *event,
                         int64_t now_us, struct wire_generate_response *response)
{
    int64_t arrived_us = event->spec->arrived_us;
    if (event->started_us)
        response->queue_ms = (double)(event->started_us - arrived_us) / 1e3;
    if (choice->pushed)
        response->ttft_ms = (double)(choice->first_us - arrived_us) / 1e3;
    response->total_ms = (double)(now_us - arrived_us) / 1e3;
    if (choice->pushed > 1 && choice->last_us > choice->first_us)
        response->tokens_per_second =
            (choice->pushed - 1) * 1e6 / (double)(choice->last_us - choice->first_us);
}

static int take_end(struct answer *answer, const struct scheduler_event *event, int64_t now_us)
{
    struct answer_choice *choice = &answer->choices[event->choice];
    struct wire_generate_response response;
    int status = STATUS_OK;
    uint32_t dropped;
    token_stream_finish(choice->stream);
    if (!take_ready(answer, event->choice, &response, &status) && status)
        return status;
    const char *stop = token_stream_matched(choice->stream, &dropped);
    response.finish = (enum wire_finish)event->finish; // the same order, by the assertion below
    if (event->finish == FINISH_STOP && choice->stopped && stop) {
        response.matched_stop = true;
        response.stop = (struct wire_text){stop, strlen(stop)};
    } else if (event->finish == FINISH_STOP && event->matched_id >= 0) {
        response.matched_id = true;
        response.stop_id = event->matched_id;
    }
    response.has_usage = true;
    response.prompt_tokens = event->spec->n_prompt;
    response.cached_tokens = event->cached_tokens;
    response.completion_tokens = choice->released;
    response.seed = event->spec->sampling.seed;
    fill_timings(choice, event, now_us, &response);
    return answer->options.send(answer->options.to, &response, 0);
}
_Static_assert((int)FINISH_STOP == WIRE_FINISH_STOP && (int)FINISH_LENGTH == WIRE_FINISH_LENGTH &&
                   (int)FINISH_CANCELLED == WIRE_FINISH_CANCELLED,
               "the scheduler's and the wire's finish reasons are numbered alike");

int answer_take(struct answer *answer, const struct scheduler_event *event, int64_t now_us,
                struct answer_reply *reply)
{
    *reply = (struct answer_reply){0};
    if (event->kind == SCHEDULER_PROMPT)
        return take_scores(answer, event, event->n_scores);
    bool cancelled = event->kind == SCHEDULER_CHOICE_END && event->finish == FINISH_CANCELLED;
    if (answer->prompt_due && !cancelled) { // a prompt of one token has no scores
        int status = take_scores(answer, event, 0);
        if (status)
            return status;
    }
    if (event->kind == SCHEDULER_TOKEN)
        return take_token(answer, event, now_us, reply);
    return take_end(answer, event, now_us);
}
