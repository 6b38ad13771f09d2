// Tokenize and Detokenize: answered on the gRPC thread that read them, except messages, whose template is
// rendered by the helper first.
#include "coordinator/service_internal.h"

#include <stdlib.h>
#include <string.h>

// A Tokenize call whose messages are being rendered.
struct rendering {
    struct service *service;
    struct rpc_call *call;
};

int service_render(const struct service *service, const struct wire_messages *messages,
                   service_rendered *done, void *context, struct error *error)
{
    if (!service->options.render)
        return error_set(error, STATUS_INVALID,
                         "messages cannot be used: the model file has no chat template; send text instead");
    char *json = service_chat_json(messages, error);
    if (!json)
        return error->status;
    int status = service->options.render(service->options.renderer, json, done, context, error);
    free(json);
    return status;
}

static void answer_tokenize(const struct service *service, struct rpc_call *call, struct wire_text text,
                            unsigned flags, bool show)
{
    struct error error = {0};
    struct token_list list = {0};
    struct wire_bytes bytes = {0};
    int status =
        tokenizer_encode(service->options.rules.tokenizer, text.data, text.length, flags, &list, &error);
    if (!status) {
        struct wire_tokenize_response response = {.ids = list.ids, .n_ids = (uint32_t)list.count};
        if (show)
            response.rendered = text;
        status = wire_encode_tokenize_response(&bytes, &response);
    }
    if (!status)
        status = rpc_call_send(call, bytes.data, bytes.length);
    rpc_call_finish(call, status, error.text);
    wire_bytes_free(&bytes);
    token_list_free(&list);
}

// On the template's thread.
static void rendered(void *context, int status, const char *text, size_t length)
{
    struct rendering *rendering = context;
    if (status)
        rpc_call_finish(rendering->call, status, text);
    else
        answer_tokenize(rendering->service, rendering->call, (struct wire_text){text, length}, ENCODE_SPECIAL,
                        true);
    rpc_call_unref(rendering->call);
    free(rendering);
}

static void tokenize_messages(struct service *service, struct rpc_call *call,
                              const struct wire_messages *messages)
{
    struct error error = {0};
    struct rendering *rendering = malloc(sizeof(*rendering));
    if (!rendering) {
        rpc_call_finish(call, STATUS_NO_MEMORY, "the server is out of memory");
        return;
    }
    *rendering = (struct rendering){service, call};
    rpc_call_ref(call);
    if (service_render(service, messages, rendered, rendering, &error)) {
        rpc_call_finish(call, error.status, error.text);
        rpc_call_unref(call);
        free(rendering);
    }
}

void service_tokenize(struct rpc_call *call, void *context, const uint8_t *bytes, size_t length)
{
    struct service *service = context;
    struct error error = {0};
    struct arena arena = {0};
    struct wire_tokenize_request asked;
    int status = wire_decode_tokenize_request(&asked, bytes, length, &arena, &error);
    if (!status && !tokenizer_has_text(service->options.rules.tokenizer))
        status =
            error_set(&error, STATUS_INVALID, "the model file has no text vocabulary: it knows ids only");
    if (status)
        rpc_call_finish(call, status, error.text);
    else if (asked.has_messages)
        tokenize_messages(service, call, &asked.messages);
    else
        answer_tokenize(
            service, call, asked.text,
            (asked.parse_special ? ENCODE_SPECIAL : 0) | (asked.add_special ? ENCODE_ADD_SPECIAL : 0), false);
    arena_free(&arena);
}

// Text of the ids in malloc'd memory.
static int decode_ids(const struct tokenizer *tokenizer, const struct wire_detokenize_request *asked,
                      char **text, size_t *length, struct error *error)
{
    struct token_decoder decoder;
    size_t most = tokenizer_max_bytes(tokenizer) + 4, capacity = most, used = 0;
    char *buffer = malloc(capacity);
    token_decoder_init(&decoder, tokenizer, asked->special, true);
    for (uint32_t i = 0; buffer && i < asked->n_ids; i++) {
        if (capacity - used < 2 * most) {
            capacity = 2 * capacity + 2 * most;
            char *grown = realloc(buffer, capacity);
            if (!grown)
                free(buffer);
            buffer = grown;
        }
        int wrote = buffer ? token_decoder_push(&decoder, asked->ids[i], buffer + used, capacity - used) : 0;
        if (wrote < 0) {
            free(buffer);
            return error_set(error, STATUS_INVALID, "ids[%u] is %d; the model's ids are 0 to %u", i,
                             asked->ids[i], tokenizer_size(tokenizer) - 1);
        }
        used += (size_t)wrote;
    }
    if (!buffer)
        return error_set(error, STATUS_NO_MEMORY, "the server is out of memory");
    used += (size_t)token_decoder_finish(&decoder, buffer + used, capacity - used);
    *text = buffer;
    *length = used;
    return STATUS_OK;
}

void service_detokenize(struct rpc_call *call, void *context, const uint8_t *bytes, size_t length)
{
    struct service *service = context;
    const struct tokenizer *tokenizer = service->options.rules.tokenizer;
    struct error error = {0};
    struct arena arena = {0};
    struct wire_bytes reply = {0};
    struct wire_detokenize_request asked;
    char *text = NULL;
    size_t text_bytes = 0;
    int status = wire_decode_detokenize_request(&asked, bytes, length, &arena, &error);
    if (!status && !tokenizer_has_text(tokenizer))
        status =
            error_set(&error, STATUS_INVALID, "the model file has no text vocabulary: it knows ids only");
    if (!status)
        status = decode_ids(tokenizer, &asked, &text, &text_bytes, &error);
    if (!status)
        status = wire_encode_detokenize_response(
            &reply, &(struct wire_detokenize_response){.text = {text, text_bytes}});
    if (!status)
        status = rpc_call_send(call, reply.data, reply.length);
    rpc_call_finish(call, status, error.text);
    free(text);
    wire_bytes_free(&reply);
    arena_free(&arena);
}
