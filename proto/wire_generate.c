// Generate's request and response. A field with presence is a one-member `oneof _name` in the proto: its case
// says whether the client set it, and what it did not set becomes the default documented there.
#include "proto/wire_internal.h"
#include "strata/v1/inference.pb-c.h"

// --- the request, encoded by clients

#define PUT_OPTIONAL(field, NAME, present, from)                                                             \
    do {                                                                                                     \
        if (present) {                                                                                       \
            m._##field##_case = STRATA__V1__GENERATE_REQUEST___##NAME##_##NAME;                              \
            m.field = (from);                                                                                \
        }                                                                                                    \
    } while (0)

static void put_input(struct wire_encoder *e, Strata__V1__GenerateRequest *m, Strata__V1__TokenIds *tokens,
                      const struct wire_generate_request *from)
{
    switch (from->input) {
    case WIRE_INPUT_NONE:
        break;
    case WIRE_INPUT_TEXT:
        m->input_case = STRATA__V1__GENERATE_REQUEST__INPUT_TEXT;
        m->text = wire_put_text(e, from->text);
        break;
    case WIRE_INPUT_TOKENS:
        m->input_case = STRATA__V1__GENERATE_REQUEST__INPUT_TOKENS;
        tokens->ids = (int32_t *)from->tokens;
        tokens->n_ids = from->n_tokens;
        m->tokens = tokens;
        break;
    case WIRE_INPUT_MESSAGES:
        m->input_case = STRATA__V1__GENERATE_REQUEST__INPUT_MESSAGES;
        m->messages = wire_put_messages(e, &from->messages);
        break;
    }
}

static void put_stops_and_biases(struct wire_encoder *e, Strata__V1__GenerateRequest *m,
                                 const struct wire_generate_request *from)
{
    m->stop = wire_scratch(e, from->n_stop, sizeof(*m->stop));
    m->logit_bias = wire_scratch(e, from->n_biases, sizeof(*m->logit_bias));
    Strata__V1__LogitBias *biases = wire_scratch(e, from->n_biases, sizeof(*biases));
    if (e->status)
        return;
    for (uint32_t i = 0; i < from->n_stop; i++)
        m->stop[i] = wire_put_cstr(e, from->stop[i]);
    for (uint32_t i = 0; i < from->n_biases; i++) {
        strata__v1__logit_bias__init(&biases[i]);
        biases[i].token = from->biases[i].token;
        biases[i].bias = from->biases[i].bias;
        m->logit_bias[i] = &biases[i];
    }
    m->n_stop = from->n_stop;
    m->n_logit_bias = from->n_biases;
    m->n_stop_ids = from->n_stop_ids;
    m->stop_ids = (int32_t *)from->stop_ids;
}

int wire_encode_generate_request(struct wire_bytes *to, const struct wire_generate_request *from)
{
    struct wire_encoder e = {0};
    Strata__V1__GenerateRequest m = STRATA__V1__GENERATE_REQUEST__INIT;
    Strata__V1__TokenIds tokens = STRATA__V1__TOKEN_IDS__INIT;
    m.model = wire_put_cstr(&e, from->model);
    m.request_id = wire_put_cstr(&e, from->request_id);
    put_input(&e, &m, &tokens, from);
    put_stops_and_biases(&e, &m, from);
    m.parse_special = from->parse_special;
    m.min_tokens = from->min_tokens;
    m.ignore_eos = from->ignore_eos;
    m.logprobs = from->logprobs;
    m.top_logprobs = from->top_logprobs;
    m.prompt_logprobs = from->prompt_logprobs;
    m.echo_special = from->echo_special;
    PUT_OPTIONAL(add_special, ADD_SPECIAL, from->has_add_special, from->add_special);
    PUT_OPTIONAL(max_tokens, MAX_TOKENS, from->has_max_tokens, from->max_tokens);
    PUT_OPTIONAL(n, N, from->has_n, from->n);
    const struct sampling_params *s = &from->sampling;
    PUT_OPTIONAL(repetition_penalty, REPETITION_PENALTY, from->has_repetition_penalty, s->repetition_penalty);
    PUT_OPTIONAL(presence_penalty, PRESENCE_PENALTY, from->has_presence_penalty, s->presence_penalty);
    PUT_OPTIONAL(frequency_penalty, FREQUENCY_PENALTY, from->has_frequency_penalty, s->frequency_penalty);
    PUT_OPTIONAL(temperature, TEMPERATURE, from->has_temperature, s->temperature);
    PUT_OPTIONAL(top_k, TOP_K, from->has_top_k, s->top_k);
    PUT_OPTIONAL(top_p, TOP_P, from->has_top_p, s->top_p);
    PUT_OPTIONAL(min_p, MIN_P, from->has_min_p, s->min_p);
    PUT_OPTIONAL(seed, SEED, from->has_seed, s->seed);
    return wire_encode_end(&e, to, &m.base);
}

// --- the request, decoded by the server

static void take_input(struct wire_decoder *d, struct wire_generate_request *out,
                       const Strata__V1__GenerateRequest *m)
{
    switch (m->input_case) {
    case STRATA__V1__GENERATE_REQUEST__INPUT_TEXT:
        out->input = WIRE_INPUT_TEXT;
        out->text = wire_take_text(d, m->text, "text");
        break;
    case STRATA__V1__GENERATE_REQUEST__INPUT_TOKENS:
        out->input = WIRE_INPUT_TOKENS;
        out->n_tokens = wire_take_count(d, m->tokens->n_ids, MAX_CONTEXT, "token ids");
        out->tokens = m->tokens->ids;
        break;
    case STRATA__V1__GENERATE_REQUEST__INPUT_MESSAGES:
        out->input = WIRE_INPUT_MESSAGES;
        wire_take_messages(d, &out->messages, m->messages);
        break;
    default:
        out->input = WIRE_INPUT_NONE;
    }
}

static void take_stops(struct wire_decoder *d, struct wire_generate_request *out,
                       const Strata__V1__GenerateRequest *m)
{
    out->n_stop = wire_take_count(d, m->n_stop, MAX_STOP_STRINGS, "stop strings");
    const char **stop = wire_make(d, out->n_stop, sizeof(*stop));
    for (uint32_t i = 0; stop && i < out->n_stop; i++) {
        stop[i] = wire_take_cstr(d, m->stop[i], "stop");
        if (m->stop[i].len > MAX_STOP_BYTES)
            wire_refuse(d, STATUS_INVALID, "a stop string of %zu bytes is longer than the limit of %d",
                        m->stop[i].len, MAX_STOP_BYTES);
        if (m->stop[i].len == 0)
            wire_refuse(d, STATUS_INVALID, "a stop string is empty");
    }
    out->stop = stop;
    out->n_stop_ids = wire_take_count(d, m->n_stop_ids, MAX_STOP_IDS, "stop ids");
    out->stop_ids = m->stop_ids;
}

static void take_biases(struct wire_decoder *d, struct wire_generate_request *out,
                        const Strata__V1__GenerateRequest *m)
{
    out->n_biases = wire_take_count(d, m->n_logit_bias, MAX_LOGIT_BIAS, "logit biases");
    struct logit_bias *biases = wire_make(d, out->n_biases, sizeof(*biases));
    for (uint32_t i = 0; biases && i < out->n_biases; i++)
        biases[i] = (struct logit_bias){m->logit_bias[i]->token, m->logit_bias[i]->bias};
    out->biases = biases;
}

#define TAKE_OPTIONAL(field, to)                                                                             \
    do {                                                                                                     \
        out->has_##field = m->_##field##_case != 0;                                                          \
        if (out->has_##field)                                                                                \
            (to) = m->field;                                                                                 \
    } while (0)

static void take_optional(struct wire_generate_request *out, const Strata__V1__GenerateRequest *m)
{
    struct sampling_params *s = &out->sampling;
    *s = SAMPLING_DEFAULTS;
    s->min_tokens = m->min_tokens;
    out->add_special = true;
    out->n = 1;
    TAKE_OPTIONAL(add_special, out->add_special);
    TAKE_OPTIONAL(max_tokens, out->max_tokens);
    TAKE_OPTIONAL(n, out->n);
    TAKE_OPTIONAL(repetition_penalty, s->repetition_penalty);
    TAKE_OPTIONAL(presence_penalty, s->presence_penalty);
    TAKE_OPTIONAL(frequency_penalty, s->frequency_penalty);
    TAKE_OPTIONAL(temperature, s->temperature);
    TAKE_OPTIONAL(top_k, s->top_k);
    TAKE_OPTIONAL(top_p, s->top_p);
    TAKE_OPTIONAL(min_p, s->min_p);
    TAKE_OPTIONAL(seed, s->seed);
}

int wire_decode_generate_request(struct wire_generate_request *out, const uint8_t *bytes, size_t length,
                                 struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "GenerateRequest", .blame = STATUS_INVALID};
    *out = (struct wire_generate_request){.model = "", .request_id = "", .text = {"", 0}};
    Strata__V1__GenerateRequest *m =
        wire_unpack(&d, &strata__v1__generate_request__descriptor, bytes, length);
    if (!m)
        return d.status;
    out->model = wire_take_cstr(&d, m->model, "model");
    out->request_id = wire_take_cstr(&d, m->request_id, "request_id");
    if (m->request_id.len > MAX_REQUEST_ID_BYTES)
        wire_refuse(&d, STATUS_INVALID, "a request_id of %zu bytes is longer than the limit of %d",
                    m->request_id.len, MAX_REQUEST_ID_BYTES);
    take_input(&d, out, m);
    take_stops(&d, out, m);
    take_biases(&d, out, m);
    out->parse_special = m->parse_special;
    out->min_tokens = m->min_tokens;
    out->ignore_eos = m->ignore_eos;
    out->logprobs = m->logprobs;
    out->top_logprobs = m->top_logprobs;
    out->prompt_logprobs = m->prompt_logprobs;
    out->echo_special = m->echo_special;
    take_optional(out, m);
    return d.status;
}

// --- the response, encoded by the server

// One level of alternatives; alternatives of alternatives mean nothing and are not written.
static Strata__V1__TokenLogprob **put_logprobs(struct wire_encoder *e, const struct wire_logprob *from,
                                               uint32_t count, bool with_tops)
{
    Strata__V1__TokenLogprob **pointers = wire_scratch(e, count, sizeof(*pointers));
    Strata__V1__TokenLogprob *records = wire_scratch(e, count, sizeof(*records));
    for (uint32_t i = 0; !e->status && i < count; i++) {
        strata__v1__token_logprob__init(&records[i]);
        records[i].token = from[i].token;
        records[i].logprob = from[i].logprob;
        records[i].unscored = from[i].unscored;
        records[i].text =
            (ProtobufCBinaryData){.data = (uint8_t *)from[i].text.data, .len = from[i].text.length};
        if (with_tops && from[i].n_top) {
            records[i].top = put_logprobs(e, from[i].top, from[i].n_top, false);
            records[i].n_top = e->status ? 0 : from[i].n_top;
        }
        pointers[i] = &records[i];
    }
    return pointers;
}

static void put_usage(Strata__V1__GenerateResponse *m, Strata__V1__Usage *usage, Strata__V1__Timings *timings,
                      const struct wire_generate_response *from)
{
    usage->prompt_tokens = from->prompt_tokens;
    usage->cached_tokens = from->cached_tokens;
    usage->completion_tokens = from->completion_tokens;
    usage->seed = from->seed;
    timings->queue_ms = from->queue_ms;
    timings->ttft_ms = from->ttft_ms;
    timings->total_ms = from->total_ms;
    timings->tokens_per_second = from->tokens_per_second;
    m->usage = usage;
    m->timings = timings;
}

int wire_encode_generate_response(struct wire_bytes *to, const struct wire_generate_response *from)
{
    struct wire_encoder e = {0};
    Strata__V1__GenerateResponse m = STRATA__V1__GENERATE_RESPONSE__INIT;
    Strata__V1__Usage usage = STRATA__V1__USAGE__INIT;
    Strata__V1__Timings timings = STRATA__V1__TIMINGS__INIT;
    m.choice = from->choice;
    m.text = wire_put_text(&e, from->text);
    m.n_token_ids = from->n_token_ids;
    m.token_ids = (int32_t *)from->token_ids;
    m.n_prompt_token_ids = from->n_prompt_token_ids;
    m.prompt_token_ids = (int32_t *)from->prompt_token_ids;
    if (from->n_logprobs)
        m.logprobs = put_logprobs(&e, from->logprobs, from->n_logprobs, true);
    if (from->n_prompt_logprobs)
        m.prompt_logprobs = put_logprobs(&e, from->prompt_logprobs, from->n_prompt_logprobs, true);
    m.n_logprobs = from->n_logprobs;
    m.n_prompt_logprobs = from->n_prompt_logprobs;
    m.finish_reason = (Strata__V1__FinishReason)from->finish;
    if (from->matched_stop) {
        m.matched_case = STRATA__V1__GENERATE_RESPONSE__MATCHED_STOP;
        m.stop = wire_put_text(&e, from->stop);
    } else if (from->matched_id) {
        m.matched_case = STRATA__V1__GENERATE_RESPONSE__MATCHED_STOP_ID;
        m.stop_id = from->stop_id;
    }
    if (from->has_usage)
        put_usage(&m, &usage, &timings, from);
    return wire_encode_end(&e, to, &m.base);
}

// --- the response, decoded by clients

// protobuf-c recurses as deep as a message nests, and TokenLogprob can nest without end. Ours has two levels;
// a third is an attack on the stack and is refused before it is unpacked.
static bool nests_deeper(const uint8_t *bytes, size_t length, int levels)
{
    struct wire_reader reader = wire_reader_of(bytes, length);
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        bool nested = f.tag == WIRE_TAG(4, WIRE_LENGTH);
        if (nested && (levels == 0 || nests_deeper(f.bytes, f.length, levels - 1)))
            return true;
    }
    return false;
}

static bool logprobs_nest_deeper(const uint8_t *bytes, size_t length)
{
    struct wire_reader reader = wire_reader_of(bytes, length);
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        bool logprob = f.tag == WIRE_TAG(4, WIRE_LENGTH) || f.tag == WIRE_TAG(5, WIRE_LENGTH);
        if (logprob && nests_deeper(f.bytes, f.length, 1))
            return true;
    }
    return false;
}

static const struct wire_logprob *take_logprobs(struct wire_decoder *d, Strata__V1__TokenLogprob *const *from,
                                                size_t count, const char *what, uint32_t *taken)
{
    *taken = wire_take_count(d, count, MAX_CONTEXT, what);
    struct wire_logprob *out = wire_make(d, *taken, sizeof(*out));
    for (uint32_t i = 0; out && i < *taken; i++) {
        out[i].token = from[i]->token;
        out[i].logprob = from[i]->logprob;
        out[i].unscored = from[i]->unscored;
        out[i].text = from[i]->text.len
                          ? (struct wire_text){(const char *)from[i]->text.data, from[i]->text.len}
                          : (struct wire_text){"", 0};
        if (from[i]->n_top)
            out[i].top = take_logprobs(d, from[i]->top, from[i]->n_top, "top logprobs", &out[i].n_top);
    }
    return out;
}

static void take_end(struct wire_decoder *d, struct wire_generate_response *out,
                     const Strata__V1__GenerateResponse *m)
{
    out->finish = (enum wire_finish)m->finish_reason;
    if (m->matched_case == STRATA__V1__GENERATE_RESPONSE__MATCHED_STOP) {
        out->matched_stop = true;
        out->stop = wire_take_text(d, m->stop, "stop");
    } else if (m->matched_case == STRATA__V1__GENERATE_RESPONSE__MATCHED_STOP_ID) {
        out->matched_id = true;
        out->stop_id = m->stop_id;
    }
    if (m->usage) {
        out->has_usage = true;
        out->prompt_tokens = m->usage->prompt_tokens;
        out->cached_tokens = m->usage->cached_tokens;
        out->completion_tokens = m->usage->completion_tokens;
        out->seed = m->usage->seed;
    }
    if (m->timings) {
        out->queue_ms = m->timings->queue_ms;
        out->ttft_ms = m->timings->ttft_ms;
        out->total_ms = m->timings->total_ms;
        out->tokens_per_second = m->timings->tokens_per_second;
    }
}

int wire_decode_generate_response(struct wire_generate_response *out, const uint8_t *bytes, size_t length,
                                  struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "GenerateResponse", .blame = STATUS_CORRUPT};
    *out = (struct wire_generate_response){.text = {"", 0}, .stop = {"", 0}};
    if (logprobs_nest_deeper(bytes, length))
        wire_refuse(&d, STATUS_CORRUPT, "log-probabilities nest more than two deep");
    Strata__V1__GenerateResponse *m =
        wire_unpack(&d, &strata__v1__generate_response__descriptor, bytes, length);
    if (!m)
        return d.status;
    out->choice = m->choice;
    out->text = wire_take_text(&d, m->text, "text");
    out->n_token_ids = wire_take_count(&d, m->n_token_ids, MAX_CONTEXT, "token ids");
    out->token_ids = m->token_ids;
    out->n_prompt_token_ids = wire_take_count(&d, m->n_prompt_token_ids, MAX_CONTEXT, "prompt token ids");
    out->prompt_token_ids = m->prompt_token_ids;
    out->logprobs = take_logprobs(&d, m->logprobs, m->n_logprobs, "logprobs", &out->n_logprobs);
    out->prompt_logprobs = take_logprobs(&d, m->prompt_logprobs, m->n_prompt_logprobs, "prompt logprobs",
                                         &out->n_prompt_logprobs);
    take_end(&d, out, m);
    return d.status;
}
