// The short calls of strata.v1.Inference: Tokenize, Detokenize, GetModel, GetPool.
#include "proto/wire_internal.h"
#include "strata/v1/inference.pb-c.h"

// --- Tokenize

int wire_encode_tokenize_request(struct wire_bytes *to, const struct wire_tokenize_request *from)
{
    struct wire_encoder e = {0};
    Strata__V1__TokenizeRequest m = STRATA__V1__TOKENIZE_REQUEST__INIT;
    m.text = wire_put_text(&e, from->text);
    m.parse_special = from->parse_special;
    m.add_special = from->add_special;
    if (from->has_messages)
        m.messages = wire_put_messages(&e, &from->messages);
    return wire_encode_end(&e, to, &m.base);
}

int wire_decode_tokenize_request(struct wire_tokenize_request *out, const uint8_t *bytes, size_t length,
                                 struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "TokenizeRequest", .blame = STATUS_INVALID};
    *out = (struct wire_tokenize_request){.text = {"", 0}};
    Strata__V1__TokenizeRequest *m =
        wire_unpack(&d, &strata__v1__tokenize_request__descriptor, bytes, length);
    if (!m)
        return d.status;
    out->text = wire_take_text(&d, m->text, "text");
    out->parse_special = m->parse_special;
    out->add_special = m->add_special;
    out->has_messages = m->messages != NULL;
    if (m->messages)
        wire_take_messages(&d, &out->messages, m->messages);
    return d.status;
}

int wire_encode_tokenize_response(struct wire_bytes *to, const struct wire_tokenize_response *from)
{
    struct wire_encoder e = {0};
    Strata__V1__TokenizeResponse m = STRATA__V1__TOKENIZE_RESPONSE__INIT;
    m.n_ids = from->n_ids;
    m.ids = (int32_t *)from->ids;
    m.rendered = wire_put_text(&e, from->rendered);
    return wire_encode_end(&e, to, &m.base);
}

int wire_decode_tokenize_response(struct wire_tokenize_response *out, const uint8_t *bytes, size_t length,
                                  struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "TokenizeResponse", .blame = STATUS_CORRUPT};
    *out = (struct wire_tokenize_response){.rendered = {"", 0}};
    Strata__V1__TokenizeResponse *m =
        wire_unpack(&d, &strata__v1__tokenize_response__descriptor, bytes, length);
    if (!m)
        return d.status;
    out->n_ids = wire_take_count(&d, m->n_ids, MAX_MESSAGE_BYTES, "ids");
    out->ids = m->ids;
    out->rendered = wire_take_text(&d, m->rendered, "rendered");
    return d.status;
}

// --- Detokenize

int wire_encode_detokenize_request(struct wire_bytes *to, const struct wire_detokenize_request *from)
{
    Strata__V1__DetokenizeRequest m = STRATA__V1__DETOKENIZE_REQUEST__INIT;
    m.n_ids = from->n_ids;
    m.ids = (int32_t *)from->ids;
    m.special = from->special;
    return wire_pack(to, &m.base);
}

int wire_decode_detokenize_request(struct wire_detokenize_request *out, const uint8_t *bytes, size_t length,
                                   struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "DetokenizeRequest", .blame = STATUS_INVALID};
    *out = (struct wire_detokenize_request){0};
    Strata__V1__DetokenizeRequest *m =
        wire_unpack(&d, &strata__v1__detokenize_request__descriptor, bytes, length);
    if (!m)
        return d.status;
    out->n_ids = wire_take_count(&d, m->n_ids, MAX_CONTEXT, "ids");
    out->ids = m->ids;
    out->special = m->special;
    return d.status;
}

int wire_encode_detokenize_response(struct wire_bytes *to, const struct wire_detokenize_response *from)
{
    struct wire_encoder e = {0};
    Strata__V1__DetokenizeResponse m = STRATA__V1__DETOKENIZE_RESPONSE__INIT;
    m.text = wire_put_text(&e, from->text);
    return wire_encode_end(&e, to, &m.base);
}

int wire_decode_detokenize_response(struct wire_detokenize_response *out, const uint8_t *bytes, size_t length,
                                    struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "DetokenizeResponse", .blame = STATUS_CORRUPT};
    *out = (struct wire_detokenize_response){.text = {"", 0}};
    Strata__V1__DetokenizeResponse *m =
        wire_unpack(&d, &strata__v1__detokenize_response__descriptor, bytes, length);
    if (m)
        out->text = wire_take_text(&d, m->text, "text");
    return d.status;
}

// --- GetModel

int wire_encode_model(struct wire_bytes *to, const struct wire_model *from)
{
    struct wire_encoder e = {0};
    Strata__V1__GetModelResponse m = STRATA__V1__GET_MODEL_RESPONSE__INIT;
    m.name = wire_put_cstr(&e, from->name);
    m.architecture = wire_put_cstr(&e, from->architecture);
    m.layers = from->layers;
    m.width = from->width;
    m.heads = from->heads;
    m.kv_heads = from->kv_heads;
    m.head_size = from->head_size;
    m.ffn_width = from->ffn_width;
    m.vocabulary = from->vocabulary;
    m.context = from->context;
    m.trained_context = from->trained_context;
    m.file_bytes = from->file_bytes;
    m.fingerprint = from->fingerprint;
    m.bos_id = from->bos_id;
    m.n_end_ids = from->n_end_ids;
    m.end_ids = (int32_t *)from->end_ids;
    m.has_chat_template = from->has_chat_template;
    m.tokenizer = wire_put_cstr(&e, from->tokenizer);
    m.chat_template = wire_put_cstr(&e, from->chat_template);
    return wire_encode_end(&e, to, &m.base);
}

int wire_decode_model(struct wire_model *out, const uint8_t *bytes, size_t length, struct arena *arena,
                      struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "GetModelResponse", .blame = STATUS_CORRUPT};
    *out = (struct wire_model){.name = "", .architecture = "", .tokenizer = "", .chat_template = ""};
    Strata__V1__GetModelResponse *m =
        wire_unpack(&d, &strata__v1__get_model_response__descriptor, bytes, length);
    if (!m)
        return d.status;
    out->name = wire_take_cstr(&d, m->name, "name");
    out->architecture = wire_take_cstr(&d, m->architecture, "architecture");
    out->tokenizer = wire_take_cstr(&d, m->tokenizer, "tokenizer");
    out->chat_template = wire_take_cstr(&d, m->chat_template, "chat_template");
    out->layers = m->layers;
    out->width = m->width;
    out->heads = m->heads;
    out->kv_heads = m->kv_heads;
    out->head_size = m->head_size;
    out->ffn_width = m->ffn_width;
    out->vocabulary = m->vocabulary;
    out->context = m->context;
    out->trained_context = m->trained_context;
    out->file_bytes = m->file_bytes;
    out->fingerprint = m->fingerprint;
    out->bos_id = m->bos_id;
    out->n_end_ids = wire_take_count(&d, m->n_end_ids, MAX_END_TOKENS, "end ids");
    out->end_ids = m->end_ids;
    out->has_chat_template = m->has_chat_template;
    return d.status;
}

// --- GetPool

static void put_stages(struct wire_encoder *e, Strata__V1__GetPoolResponse *m, const struct wire_pool *from)
{
    m->stages = wire_scratch(e, from->n_stages, sizeof(*m->stages));
    Strata__V1__Stage *stages = wire_scratch(e, from->n_stages, sizeof(*stages));
    for (uint32_t i = 0; !e->status && i < from->n_stages; i++) {
        const struct wire_stage *stage = &from->stages[i];
        strata__v1__stage__init(&stages[i]);
        stages[i].index = stage->index;
        stages[i].worker = wire_put_cstr(e, stage->worker);
        stages[i].device = wire_put_cstr(e, stage->device);
        stages[i].first_layer = stage->first_layer;
        stages[i].layers = stage->layers;
        stages[i].weight_bytes = stage->weight_bytes;
        stages[i].kv_bytes = stage->kv_bytes;
        stages[i].loaded_bytes = stage->loaded_bytes;
        stages[i].load_bytes = stage->load_bytes;
        stages[i].state = wire_put_cstr(e, stage->state);
        stages[i].busy = stage->busy;
        stages[i].waiting = stage->waiting;
        stages[i].layer_ns = stage->layer_ns;
        stages[i].head_ns = stage->head_ns;
        m->stages[i] = &stages[i];
    }
    m->n_stages = from->n_stages;
}

int wire_encode_pool(struct wire_bytes *to, const struct wire_pool *from)
{
    struct wire_encoder e = {0};
    Strata__V1__GetPoolResponse m = STRATA__V1__GET_POOL_RESPONSE__INIT;
    m.state = (Strata__V1__PoolState)from->state;
    m.epoch = from->epoch;
    m.problem = wire_put_cstr(&e, from->problem);
    put_stages(&e, &m, from);
    m.workers_wanted = from->workers_wanted;
    m.pages = from->pages;
    m.pages_free = from->pages_free;
    m.page_positions = from->page_positions;
    m.running = from->running;
    m.waiting = from->waiting;
    m.steps = from->steps;
    m.max_sequences = from->max_sequences;
    return wire_encode_end(&e, to, &m.base);
}

static void take_stage(struct wire_decoder *d, struct wire_stage *out, const Strata__V1__Stage *from)
{
    out->index = from->index;
    out->worker = wire_take_cstr(d, from->worker, "worker");
    out->device = wire_take_cstr(d, from->device, "device");
    out->first_layer = from->first_layer;
    out->layers = from->layers;
    out->weight_bytes = from->weight_bytes;
    out->kv_bytes = from->kv_bytes;
    out->loaded_bytes = from->loaded_bytes;
    out->load_bytes = from->load_bytes;
    out->state = wire_take_cstr(d, from->state, "state");
    out->busy = from->busy;
    out->waiting = from->waiting;
    out->layer_ns = from->layer_ns;
    out->head_ns = from->head_ns;
}

int wire_decode_pool(struct wire_pool *out, const uint8_t *bytes, size_t length, struct arena *arena,
                     struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "GetPoolResponse", .blame = STATUS_CORRUPT};
    *out = (struct wire_pool){.problem = ""};
    Strata__V1__GetPoolResponse *m =
        wire_unpack(&d, &strata__v1__get_pool_response__descriptor, bytes, length);
    if (!m)
        return d.status;
    out->state = (enum wire_pool_state)m->state;
    out->epoch = m->epoch;
    out->problem = wire_take_cstr(&d, m->problem, "problem");
    out->n_stages = wire_take_count(&d, m->n_stages, MAX_STAGES, "stages");
    struct wire_stage *stages = wire_make(&d, out->n_stages, sizeof(*stages));
    for (uint32_t i = 0; stages && i < out->n_stages; i++)
        take_stage(&d, &stages[i], m->stages[i]);
    out->stages = stages;
    out->workers_wanted = m->workers_wanted;
    out->pages = m->pages;
    out->pages_free = m->pages_free;
    out->page_positions = m->page_positions;
    out->running = m->running;
    out->waiting = m->waiting;
    out->steps = m->steps;
    out->max_sequences = m->max_sequences;
    return d.status;
}
