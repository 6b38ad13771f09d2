// The service: a Generate request judged without gRPC, messages as JSON, and calls over a real connection.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/rpc_client.h"
#include "coordinator/service_internal.h"
#include "tests/suite.h"
#include "tests/vocabulary.h"

static struct tokenizer *tokenizer;
static struct service_rules rules;

static void make_rules(void)
{
    struct gguf_writer writer = {0};
    small_bpe_write(&writer, "gpt-2");
    tokenizer = tokenizer_from(&writer);
    rules = (struct service_rules){.model_name = "small",
                                   .tokenizer = tokenizer,
                                   .vocab_size = tokenizer_size(tokenizer),
                                   .context = 16,
                                   .max_slots = 4,
                                   .credit = 8};
}

static void drop_rules(void)
{
    tokenizer_free(tokenizer);
}

static struct wire_generate_request plain(void)
{
    return (struct wire_generate_request){.model = "",
                                          .request_id = "",
                                          .input = WIRE_INPUT_TEXT,
                                          .text = {"hello", 5},
                                          .add_special = true,
                                          .n = 1,
                                          .sampling = SAMPLING_DEFAULTS};
}

static void expect_refusal(const struct wire_generate_request *asked, int status, const char *part)
{
    struct error error = {0};
    ck_assert_int_eq(service_check_generate(&rules, asked, &error), status);
    ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" is not in: %s", part, error.text);
}

START_TEST(a_plain_request_passes)
{
    struct wire_generate_request asked = plain();
    struct error error = {0};
    ck_assert_int_eq(service_check_generate(&rules, &asked, &error), STATUS_OK);
    asked.model = "small";
    ck_assert_int_eq(service_check_generate(&rules, &asked, &error), STATUS_OK);
}
END_TEST

START_TEST(each_field_has_its_limits)
{
    struct wire_generate_request asked;
#define REFUSED(change, status, part)                                                                        \
    asked = plain();                                                                                         \
    change;                                                                                                  \
    expect_refusal(&asked, status, part)
    REFUSED(asked.model = "other", STATUS_NOT_FOUND, "\"other\" is not served here; this is \"small\"");
    REFUSED(asked.input = WIRE_INPUT_NONE, STATUS_INVALID, "no input");
    REFUSED(asked.input = WIRE_INPUT_MESSAGES, STATUS_INVALID, "messages is empty");
    REFUSED(asked.n = 0, STATUS_INVALID, "n is 0");
    REFUSED(asked.n = 5, STATUS_INVALID, "n is 5; this server takes 1 to 4");
    REFUSED((asked.has_max_tokens = true, asked.max_tokens = 2, asked.min_tokens = 3), STATUS_INVALID,
            "min_tokens is 3");
    REFUSED(asked.min_tokens = 17, STATUS_INVALID, "min_tokens is 17");
    REFUSED((asked.logprobs = true, asked.top_logprobs = 21), STATUS_INVALID, "top_logprobs is 21");
    REFUSED(asked.top_logprobs = 2, STATUS_INVALID, "neither logprobs nor prompt_logprobs");
    REFUSED(asked.sampling.temperature = -0.5f, STATUS_INVALID, "temperature is -0.5");
    REFUSED(asked.sampling.temperature = NAN, STATUS_INVALID, "temperature is");
    REFUSED(asked.sampling.temperature = INFINITY, STATUS_INVALID, "temperature is inf");
    REFUSED(asked.sampling.top_p = 0, STATUS_INVALID, "top_p is 0");
    REFUSED(asked.sampling.top_p = 1.5f, STATUS_INVALID, "top_p is 1.5");
    REFUSED(asked.sampling.top_p = NAN, STATUS_INVALID, "top_p is");
    REFUSED(asked.sampling.min_p = -1, STATUS_INVALID, "min_p is -1");
    REFUSED(asked.sampling.min_p = 2, STATUS_INVALID, "min_p is 2");
    REFUSED(asked.sampling.repetition_penalty = 0, STATUS_INVALID, "repetition_penalty is 0");
    REFUSED(asked.sampling.presence_penalty = NAN, STATUS_INVALID, "presence_penalty");
    REFUSED(asked.sampling.frequency_penalty = INFINITY, STATUS_INVALID, "frequency_penalty");
#undef REFUSED
}
END_TEST

START_TEST(lists_are_bounded)
{
    struct wire_generate_request asked = plain();
    const char *stops[MAX_STOP_STRINGS + 1];
    for (int i = 0; i <= MAX_STOP_STRINGS; i++)
        stops[i] = "x";
    asked.stop = stops;
    asked.n_stop = MAX_STOP_STRINGS + 1;
    expect_refusal(&asked, STATUS_INVALID, "stop has 17 strings; it may have 16");
    asked.n_stop = 2;
    stops[1] = "";
    expect_refusal(&asked, STATUS_INVALID, "stop[1] has 0 bytes");
    char longest[MAX_STOP_BYTES + 2] = {0};
    memset(longest, 'x', MAX_STOP_BYTES + 1);
    stops[1] = longest;
    expect_refusal(&asked, STATUS_INVALID, "stop[1] has 257 bytes");

    asked = plain();
    int32_t ids[MAX_STOP_IDS + 1] = {0};
    asked.stop_ids = ids;
    asked.n_stop_ids = MAX_STOP_IDS + 1;
    expect_refusal(&asked, STATUS_INVALID, "stop_ids has 65");
    asked.n_stop_ids = 1;
    ids[0] = -1;
    expect_refusal(&asked, STATUS_INVALID, "stop_ids has the token -1");

    asked = plain();
    struct logit_bias biases[MAX_LOGIT_BIAS + 1] = {0};
    asked.biases = biases;
    asked.n_biases = MAX_LOGIT_BIAS + 1;
    expect_refusal(&asked, STATUS_INVALID, "logit_bias has 1025");
    asked.n_biases = 1;
    biases[0].token = (int32_t)rules.vocab_size;
    expect_refusal(&asked, STATUS_INVALID, "logit_bias has the token");
    biases[0] = (struct logit_bias){3, NAN};
    expect_refusal(&asked, STATUS_INVALID, "logit_bias of token 3");
    struct error error = {0};
    biases[0].bias = -INFINITY;
    ck_assert_int_eq(service_check_generate(&rules, &asked, &error), STATUS_OK);

    asked = plain();
    asked.input = WIRE_INPUT_TOKENS;
    asked.tokens = ids;
    asked.n_tokens = 1;
    ids[0] = (int32_t)rules.vocab_size;
    expect_refusal(&asked, STATUS_INVALID, "tokens has the token");
}
END_TEST

static struct request *make(const struct wire_generate_request *asked, uint32_t n_prompt, struct error *error)
{
    struct token_list prompt = {0};
    struct request *request = NULL;
    for (uint32_t i = 0; i < n_prompt; i++)
        ck_assert_int_eq(token_list_push(&prompt, (int32_t)i), 0);
    int status = service_make_request(&rules, asked, &prompt, &request, error);
    ck_assert_int_eq(status == STATUS_OK, request != NULL);
    token_list_free(&prompt);
    return request;
}

START_TEST(a_prompt_has_to_leave_room)
{
    struct wire_generate_request asked = plain();
    struct error error = {0};
    ck_assert_ptr_null(make(&asked, 0, &error));
    ck_assert_ptr_nonnull(strstr(error.text, "the prompt is empty"));
    ck_assert_ptr_null(make(&asked, 17, &error));
    ck_assert_int_eq(error.status, STATUS_INVALID);
    ck_assert_str_eq(error.text, "the prompt has 17 tokens, more than the context of 16");
    ck_assert_ptr_null(make(&asked, 16, &error));
    ck_assert_ptr_nonnull(strstr(error.text, "leaves no room"));

    struct request *request = make(&asked, 15, &error);
    ck_assert_uint_eq(request->max_tokens, 1);
    request_free(request);
    asked.has_max_tokens = true; // nothing new is wanted: the prompt may fill the context
    request = make(&asked, 16, &error);
    ck_assert_uint_eq(request->max_tokens, 0);
    request_free(request);
    asked.max_tokens = 100;
    request = make(&asked, 6, &error);
    ck_assert_uint_eq(request->max_tokens, 10);
    request_free(request);
}
END_TEST

START_TEST(a_request_carries_what_was_asked)
{
    struct wire_generate_request asked = plain();
    struct error error = {0};
    int32_t stop_ids[] = {7, 3, 7};
    struct logit_bias bias = {2, -1.5f};
    asked.stop_ids = stop_ids;
    asked.n_stop_ids = 3;
    asked.biases = &bias;
    asked.n_biases = 1;
    asked.has_seed = true;
    asked.sampling.seed = 42;
    asked.min_tokens = 2;
    asked.n = 3;
    asked.ignore_eos = true;
    struct request *request = make(&asked, 4, &error);
    ck_assert_uint_eq(request->n_end_ids, 2);
    ck_assert_int_eq(request->end_ids[0], 3);
    ck_assert_int_eq(request->end_ids[1], 7);
    ck_assert_uint_eq(request->sampling.seed, 42);
    ck_assert_uint_eq(request->sampling.min_tokens, 2);
    ck_assert_uint_eq(request->n_choices, 3);
    ck_assert_uint_eq(request->n_biases, 1);
    ck_assert_uint_eq(request->credit, 8);
    ck_assert_int_eq(request_check(request, rules.context, rules.vocab_size, &error), STATUS_OK);
    request_free(request);

    asked.ignore_eos = false;
    request = make(&asked, 4, &error);
    size_t n_end;
    tokenizer_end_tokens(tokenizer, &n_end);
    ck_assert_uint_eq(request->n_end_ids, 2 + n_end);
    request_free(request);
}
END_TEST

START_TEST(an_unset_seed_is_drawn_anew)
{
    struct wire_generate_request asked = plain();
    struct error error = {0};
    struct request *first = make(&asked, 4, &error), *second = make(&asked, 4, &error);
    ck_assert_uint_ne(first->sampling.seed, second->sampling.seed);
    request_free(first);
    request_free(second);
}
END_TEST

START_TEST(request_ids_come_from_the_client_or_are_drawn)
{
    char id[MAX_REQUEST_ID_BYTES + 1], other[MAX_REQUEST_ID_BYTES + 1];
    struct error error = {0};
    ck_assert_int_eq(service_pick_id("field", "metadata", id, &error), STATUS_OK);
    ck_assert_str_eq(id, "field");
    ck_assert_int_eq(service_pick_id("", "metadata", id, &error), STATUS_OK);
    ck_assert_str_eq(id, "metadata");
    ck_assert_int_eq(service_pick_id("", NULL, id, &error), STATUS_OK);
    ck_assert_int_eq(service_pick_id("", "", other, &error), STATUS_OK);
    ck_assert_uint_eq(strlen(id), 16);
    ck_assert_str_ne(id, other);
    ck_assert_int_eq(service_pick_id("a\nb", NULL, id, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "at byte 1"));
    char longest[MAX_REQUEST_ID_BYTES + 2] = {0};
    memset(longest, 'x', MAX_REQUEST_ID_BYTES + 1);
    ck_assert_int_eq(service_pick_id(longest, NULL, id, &error), STATUS_INVALID);
}
END_TEST

// --- messages as JSON ---

START_TEST(messages_become_json)
{
    const struct wire_tool_call call = {"c1", "add", "{\"a\": 1}"};
    const struct wire_message messages[] = {
        {.role = "user", .content = "1 + 1?", .name = "", .tool_call_id = ""},
        {.role = "assistant",
         .content = "",
         .name = "",
         .tool_call_id = "",
         .tool_calls = &call,
         .n_tool_calls = 1},
        {.role = "tool", .content = "2", .name = "", .tool_call_id = "c1"},
    };
    const struct wire_tool tool = {"add", "adds", "{\"type\": \"object\"}"};
    struct wire_messages all = {.messages = messages,
                                .n_messages = 3,
                                .tools = &tool,
                                .n_tools = 1,
                                .template_arguments_json = "{\"x\": true}"};
    struct error error = {0};
    char *json = service_chat_json(&all, &error);
    ck_assert_str_eq(
        json,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"1 + 1?\"},{\"role\":\"assistant\",\"content\":\"\","
        "\"tool_calls\":[{\"type\":\"function\",\"function\":{\"name\":\"add\",\"arguments\":{\"a\":1}},"
        "\"id\":\"c1\"}]},{\"role\":\"tool\",\"content\":\"2\",\"tool_call_id\":\"c1\"}],"
        "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"add\",\"description\":\"adds\","
        "\"parameters\":{\"type\":\"object\"}}}],\"add_generation_prompt\":true,\"arguments\":{\"x\":true}}");
    free(json);
}
END_TEST

START_TEST(broken_json_is_named)
{
    const struct wire_message message = {.role = "user", .content = "hi", .name = "", .tool_call_id = ""};
    struct wire_messages all = {.messages = &message, .n_messages = 1, .template_arguments_json = "{"};
    struct error error = {0};
    ck_assert_ptr_null(service_chat_json(&all, &error));
    ck_assert_int_eq(error.status, STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "template_arguments_json is not JSON"));
    all.template_arguments_json = "[1]";
    ck_assert_ptr_null(service_chat_json(&all, &error));
    ck_assert_ptr_nonnull(strstr(error.text, "not an object"));
    all.template_arguments_json = "";
    const struct wire_tool_call call = {"", "f", "nope"};
    struct wire_message with_call = message;
    with_call.tool_calls = &call;
    with_call.n_tool_calls = 1;
    all.messages = &with_call;
    ck_assert_ptr_null(service_chat_json(&all, &error));
    ck_assert_ptr_nonnull(strstr(error.text, "arguments_json of a tool call"));
}
END_TEST

// --- calls over a real connection ---

enum { PATIENCE_US = 5000000, MAX_CALLS = 3 };

static struct service *service;
static struct rpc_server *server;
static struct rpc_channel *channel;
static struct queue *bell;

// A renderer that keeps what it is given until the test lets it go.
static _Atomic(service_rendered *) render_done; // set last
static void *render_context;
static char render_json[512];

static int render(void *renderer, const char *json, service_rendered *done, void *context,
                  struct error *error)
{
    snprintf(render_json, sizeof(render_json), "%s", json);
    render_context = context;
    render_done = done;
    return STATUS_OK;
}

static void open_calls(void)
{
    make_rules();
    struct error error = {0};
    char address[64];
    int port;
    const struct wire_model model = {.name = "small",
                                     .architecture = "llama",
                                     .tokenizer = "gpt2/gpt-2",
                                     .chat_template = "",
                                     .context = 16,
                                     .bos_id = -1};
    queue_new(&bell, 1, 1);
    const struct service_options options = {
        .rules = rules, .model = &model, .max_calls = MAX_CALLS, .render = render, .bell = bell};
    const struct rpc_server_options server_options = {.max_queued = service_max_queued(&rules)};
    render_done = NULL;
    rpc_library_init();
    ck_assert_int_eq(service_new(&service, &options, &error), 0);
    ck_assert_int_eq(rpc_server_new(&server, &server_options, &error), 0);
    ck_assert_int_eq(rpc_server_listen(server, "127.0.0.1:0", &port, &error), 0);
    ck_assert_int_eq(service_attach(service, server), 0);
    ck_assert_int_eq(rpc_server_start(server, &error), 0);
    snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    ck_assert_int_eq(rpc_channel_new(&channel, address, NULL, &error), 0);
    service_set_welcome(service, STATUS_OK, "");
}

static void close_calls(void)
{
    rpc_channel_free(channel);
    rpc_server_stop(server, 0);
    rpc_server_free(server);
    service_free(service);
    queue_free(bell);
    rpc_library_shutdown();
    drop_rules();
}

static struct rpc_stream *ask(const struct wire_generate_request *asked)
{
    struct rpc_stream *stream;
    struct error error = {0};
    struct wire_bytes bytes = {0};
    const char *const metadata[] = {"x-request-id", "from-metadata", NULL};
    ck_assert_int_eq(wire_encode_generate_request(&bytes, asked), 0);
    ck_assert_int_eq(
        rpc_stream_open(&stream, channel, "/strata.v1.Inference/Generate", 9000000, metadata, true, &error),
        0);
    ck_assert_int_eq(rpc_stream_send(stream, bytes.data, bytes.length), 0);
    rpc_stream_half_close(stream);
    wire_bytes_free(&bytes);
    return stream;
}

static struct service_event expect_event(enum service_event_kind kind)
{
    struct service_event event;
    char stroke;
    for (int64_t until = clock_now_us() + PATIENCE_US; clock_now_us() < until;) {
        if (service_next_event(service, &event)) {
            ck_assert_int_eq(event.kind, kind);
            return event;
        }
        queue_pop(bell, &stroke, 5000);
    }
    ck_abort_msg("event %d never came", (int)kind);
    return event;
}

// The call ends with this status and a sentence with this part.
static void expect_end(struct rpc_stream *stream, int status, const char *part)
{
    struct error error = {0};
    uint8_t *bytes;
    size_t length;
    ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), status);
    ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" is not in: %s", part, error.text);
    rpc_stream_free(stream);
}

static void expect_text(struct rpc_stream *stream, const char *text)
{
    struct error error = {0};
    struct arena arena = {0};
    struct wire_generate_response response;
    uint8_t *bytes;
    size_t length;
    ck_assert_msg(rpc_stream_receive(stream, &bytes, &length, &error) == 1, "%s", error.text);
    ck_assert_int_eq(wire_decode_generate_response(&response, bytes, length, &arena, &error), 0);
    ck_assert_str_eq(response.text.data, text);
    free(bytes);
    arena_free(&arena);
}

static int send_text(struct service_call *call, const char *text, uint32_t tokens)
{
    const struct wire_generate_response response = {.text = {text, strlen(text)}};
    return service_send(call, &response, tokens);
}

START_TEST(a_request_comes_through_and_its_answer_goes_back)
{
    struct wire_generate_request asked = plain();
    const char *stops[] = {"stop"};
    asked.stop = stops;
    asked.n_stop = 1;
    struct rpc_stream *stream = ask(&asked);
    struct service_event event = expect_event(SERVICE_REQUEST);
    struct request *request = event.order->request;
    ck_assert_str_eq(request->name, "from-metadata");
    ck_assert_uint_gt(request->n_prompt, 0);
    // The client's 9 s, which gRPC rounds up on their way.
    ck_assert(request->deadline_us < clock_now_us() + 10000000);
    ck_assert(request->deadline_us > clock_now_us() + 1000000);
    ck_assert_uint_eq(event.order->n_stops, 1);
    ck_assert_str_eq(event.order->stops[0], "stop");
    service_set_tag(event.call, 77);

    ck_assert_int_eq(send_text(event.call, "one", 1), 0);
    ck_assert_int_eq(send_text(event.call, "two", 1), 0);
    ck_assert_int_eq(send_text(event.call, "end", 0), 0);
    uint32_t credit = 0;
    while (credit < 2) {
        struct service_event sent = expect_event(SERVICE_CREDIT);
        ck_assert_uint_eq(sent.tag, 77);
        credit += sent.tokens;
    }
    ck_assert_uint_eq(credit, 2);
    service_finish(event.call, STATUS_OK, "");
    expect_text(stream, "one");
    ck_assert_str_eq(rpc_stream_metadata(stream, "x-request-id"), "from-metadata");
    expect_text(stream, "two");
    expect_text(stream, "end");
    expect_end(stream, 0, "");
}
END_TEST

// Reads ends until no call is left.
static void settle(void)
{
    struct service_event event;
    bool any = true;
    for (int64_t until = clock_now_us() + PATIENCE_US; any && clock_now_us() < until;) {
        ck_assert(!service_next_event(service, &event));
        pthread_mutex_lock(&service->mutex);
        any = service->n_calls > 0;
        pthread_mutex_unlock(&service->mutex);
    }
    ck_assert(!any);
}

START_TEST(bad_requests_end_at_once)
{
    struct wire_generate_request asked = plain();
    asked.has_n = true;
    asked.n = 9;
    expect_end(ask(&asked), STATUS_INVALID, "n is 9");
    asked = plain();
    asked.text = (struct wire_text){"twenty single bytes!", 20};
    expect_end(ask(&asked), STATUS_INVALID, "more than the context of 16");
    settle();
    asked = plain();
    asked.model = "gone";
    expect_end(ask(&asked), STATUS_NOT_FOUND, "gone");
    service_set_welcome(service, STATUS_UNAVAILABLE, "the pool is not ready: nobody is here");
    asked = plain();
    expect_end(ask(&asked), STATUS_UNAVAILABLE, "nobody is here");
    settle();
    struct rpc_stream *stream;
    struct error error = {0};
    ck_assert_int_eq(
        rpc_stream_open(&stream, channel, "/strata.v1.Inference/Generate", 0, NULL, true, &error), 0);
    ck_assert_int_eq(rpc_stream_send(stream, "\xff\xff", 2), 0);
    expect_end(stream, STATUS_INVALID, "");
    settle();
}
END_TEST

START_TEST(a_client_that_leaves_is_noticed)
{
    struct wire_generate_request asked = plain();
    struct rpc_stream *stream = ask(&asked);
    struct service_event event = expect_event(SERVICE_REQUEST);
    service_set_tag(event.call, 5);
    rpc_stream_cancel(stream);
    rpc_stream_free(stream);
    struct service_event gone = expect_event(SERVICE_GONE);
    ck_assert_uint_eq(gone.tag, 5);
    ck_assert_ptr_eq(gone.call, event.call);
    ck_assert_int_eq(send_text(event.call, "late", 1), STATUS_CANCELLED);
    service_finish(event.call, STATUS_CANCELLED, "the client went away");
}
END_TEST

START_TEST(calls_are_counted)
{
    struct wire_generate_request asked = plain();
    struct rpc_stream *streams[MAX_CALLS];
    struct service_call *calls[MAX_CALLS];
    for (int i = 0; i < MAX_CALLS; i++) {
        streams[i] = ask(&asked);
        calls[i] = expect_event(SERVICE_REQUEST).call;
    }
    expect_end(ask(&asked), STATUS_EXHAUSTED, "at most 3 requests at once");
    for (int i = 0; i < MAX_CALLS; i++) {
        service_finish(calls[i], STATUS_OK, "");
        expect_end(streams[i], 0, "");
    }
    settle();
}
END_TEST

START_TEST(messages_wait_for_the_template)
{
    const struct wire_message message = {.role = "user", .content = "hi", .name = "", .tool_call_id = ""};
    struct wire_generate_request asked = plain();
    asked.input = WIRE_INPUT_MESSAGES;
    asked.messages =
        (struct wire_messages){.messages = &message, .n_messages = 1, .template_arguments_json = ""};
    struct rpc_stream *stream = ask(&asked);
    for (int64_t until = clock_now_us() + PATIENCE_US; !render_done && clock_now_us() < until;)
        clock_sleep_us(2000);
    ck_assert_ptr_nonnull(strstr(render_json, "\"content\":\"hi\""));
    (*render_done)(render_context, STATUS_OK, "hi<|im_end|>", 12);
    struct service_event event = expect_event(SERVICE_REQUEST);
    ck_assert_uint_eq(event.order->request->n_prompt, 3); // the special token written out is one id
    service_finish(event.call, STATUS_OK, "");
    expect_end(stream, 0, "");

    render_done = NULL;
    stream = ask(&asked);
    for (int64_t until = clock_now_us() + PATIENCE_US; !render_done && clock_now_us() < until;)
        clock_sleep_us(2000);
    (*render_done)(render_context, STATUS_INVALID, "the template says no", 20);
    expect_end(stream, STATUS_INVALID, "the template says no");

    render_done = NULL;
    stream = ask(&asked);
    for (int64_t until = clock_now_us() + PATIENCE_US; !render_done && clock_now_us() < until;)
        clock_sleep_us(2000);
    rpc_stream_cancel(stream);
    rpc_stream_free(stream);
    for (int i = 0; i < 20; i++) { // the end is read while the rendering still holds the call
        ck_assert(!service_next_event(service, &event));
        clock_sleep_us(5000);
    }
    (*render_done)(render_context, STATUS_OK, "hi", 2);
    ck_assert(!service_next_event(service, &event));
}
END_TEST

static int call_unary(const char *method, const struct wire_bytes *request, uint8_t **reply, size_t *length,
                      struct error *error)
{
    char path[64];
    snprintf(path, sizeof(path), "/strata.v1.Inference/%s", method);
    return rpc_call_unary(channel, path, request->data, request->length, 5000000, true, reply, length, error);
}

START_TEST(text_and_ids_go_both_ways)
{
    struct error error = {0};
    struct arena arena = {0};
    struct wire_bytes bytes = {0};
    uint8_t *reply;
    size_t length;
    const struct wire_tokenize_request asked = {.text = {"a<|im_end|>", 11}, .parse_special = true};
    wire_encode_tokenize_request(&bytes, &asked);
    ck_assert_msg(call_unary("Tokenize", &bytes, &reply, &length, &error) == 0, "%s", error.text);
    struct wire_tokenize_response tokens;
    ck_assert_int_eq(wire_decode_tokenize_response(&tokens, reply, length, &arena, &error), 0);
    ck_assert_uint_eq(tokens.n_ids, 2);
    ck_assert_int_eq(tokens.ids[0], 'a');
    free(reply);

    struct wire_detokenize_request back = {.ids = tokens.ids, .n_ids = 2, .special = true};
    wire_encode_detokenize_request(&bytes, &back);
    ck_assert_int_eq(call_unary("Detokenize", &bytes, &reply, &length, &error), 0);
    struct wire_detokenize_response text;
    ck_assert_int_eq(wire_decode_detokenize_response(&text, reply, length, &arena, &error), 0);
    ck_assert_str_eq(text.text.data, "a<|im_end|>");
    free(reply);

    const int32_t wrong[] = {'a', 1 << 20};
    back.ids = wrong;
    wire_encode_detokenize_request(&bytes, &back);
    ck_assert_int_eq(call_unary("Detokenize", &bytes, &reply, &length, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "ids[1] is 1048576"));
    wire_bytes_free(&bytes);
    arena_free(&arena);
}
END_TEST

START_TEST(what_was_published_is_answered)
{
    struct error error = {0};
    struct arena arena = {0};
    struct wire_bytes none = {0};
    uint8_t *reply;
    size_t length;
    struct wire_model model;
    ck_assert_int_eq(call_unary("GetModel", &none, &reply, &length, &error), 0);
    ck_assert_int_eq(wire_decode_model(&model, reply, length, &arena, &error), 0);
    ck_assert_str_eq(model.name, "small");
    ck_assert_int_eq(model.bos_id, -1);
    free(reply);
    service_publish_pool(service, &(struct wire_pool){.state = WIRE_POOL_READY, .problem = "", .pages = 12});
    struct wire_pool pool;
    ck_assert_int_eq(call_unary("GetPool", &none, &reply, &length, &error), 0);
    ck_assert_int_eq(wire_decode_pool(&pool, reply, length, &arena, &error), 0);
    ck_assert_int_eq(pool.state, WIRE_POOL_READY);
    ck_assert_uint_eq(pool.pages, 12);
    free(reply);
    arena_free(&arena);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("service");
    TCase *pure = tcase_create("pure");
    tcase_add_checked_fixture(pure, make_rules, drop_rules);
    tcase_add_test(pure, a_plain_request_passes);
    tcase_add_test(pure, each_field_has_its_limits);
    tcase_add_test(pure, lists_are_bounded);
    tcase_add_test(pure, a_prompt_has_to_leave_room);
    tcase_add_test(pure, a_request_carries_what_was_asked);
    tcase_add_test(pure, an_unset_seed_is_drawn_anew);
    tcase_add_test(pure, request_ids_come_from_the_client_or_are_drawn);
    tcase_add_test(pure, messages_become_json);
    tcase_add_test(pure, broken_json_is_named);
    suite_add_tcase(suite, pure);
    TCase *calls = tcase_create("calls");
    tcase_set_timeout(calls, 30);
    tcase_add_checked_fixture(calls, open_calls, close_calls);
    tcase_add_test(calls, a_request_comes_through_and_its_answer_goes_back);
    tcase_add_test(calls, bad_requests_end_at_once);
    tcase_add_test(calls, a_client_that_leaves_is_noticed);
    tcase_add_test(calls, calls_are_counted);
    tcase_add_test(calls, messages_wait_for_the_template);
    tcase_add_test(calls, text_and_ids_go_both_ways);
    tcase_add_test(calls, what_was_published_is_answered);
    suite_add_tcase(suite, calls);
    return suite;
}
