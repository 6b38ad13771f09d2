// The client API's codec: random messages go there and back, presence and defaults, what is refused and with
// which sentence, what is repaired, and that nothing damaged does harm.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"
#include "tests/suite.h"

static struct arena arena;
static struct wire_bytes bytes, again;
static struct error error;
static uint64_t random_state;

static void setup(void)
{
    memset(&error, 0, sizeof(error));
}

static void teardown(void)
{
    arena_free(&arena);
    wire_bytes_free(&bytes);
    wire_bytes_free(&again);
}

// --- random contents, from the arena

static uint32_t next(uint32_t below)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % below;
}

static uint32_t any_u32(void)
{
    return next(4) == 0 ? 0 : (next(1 << 16) << 16 | next(1 << 16)) >> next(32);
}

static uint64_t any_u64(void)
{
    return (uint64_t)any_u32() << 32 | any_u32();
}

static float any_float(void)
{
    return next(4) == 0 ? 0 : (float)next(1000) / 8 - 20;
}

static const char *any_cstr(void)
{
    static const char *const pieces[] = {
        "", "a", "hello ", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\n", "\"\\"};
    char text[64] = "";
    for (uint32_t i = next(5); i > 0; i--)
        strcat(text, pieces[next(8)]);
    return arena_copy(&arena, text, strlen(text));
}

static struct wire_text any_text(void)
{
    const char *text = any_cstr();
    size_t length = strlen(text);
    if (next(3) || !length)
        return (struct wire_text){text, length};
    char *copy = arena_copy(&arena, text, length); // with a NUL inside, which text may have
    for (size_t i = 0; i < length; i++) {
        if ((unsigned char)copy[i] < 0x80) {
            copy[i] = '\0';
            break;
        }
    }
    return (struct wire_text){copy, length};
}

static const int32_t *any_ids(uint32_t *count, uint32_t most)
{
    *count = next(most + 1);
    int32_t *ids = arena_alloc(&arena, *count, sizeof(*ids));
    for (uint32_t i = 0; i < *count; i++)
        ids[i] = (int32_t)any_u32();
    return ids;
}

static struct wire_messages any_messages(void)
{
    struct wire_messages m = {.n_messages = next(4),
                              .n_tools = next(3),
                              .no_generation_prompt = next(2),
                              .template_arguments_json = any_cstr()};
    struct wire_message *messages = arena_alloc(&arena, m.n_messages, sizeof(*messages));
    struct wire_tool *tools = arena_alloc(&arena, m.n_tools, sizeof(*tools));
    for (uint32_t i = 0; i < m.n_messages; i++) {
        messages[i] = (struct wire_message){.role = any_cstr(),
                                            .content = any_cstr(),
                                            .name = any_cstr(),
                                            .tool_call_id = any_cstr(),
                                            .n_tool_calls = next(3)};
        struct wire_tool_call *calls = arena_alloc(&arena, messages[i].n_tool_calls, sizeof(*calls));
        for (uint32_t j = 0; j < messages[i].n_tool_calls; j++)
            calls[j] = (struct wire_tool_call){any_cstr(), any_cstr(), any_cstr()};
        messages[i].tool_calls = calls;
    }
    for (uint32_t i = 0; i < m.n_tools; i++)
        tools[i] = (struct wire_tool){any_cstr(), any_cstr(), any_cstr()};
    m.messages = messages;
    m.tools = tools;
    return m;
}

static struct wire_generate_request any_request(void)
{
    struct wire_generate_request r = {.model = any_cstr(),
                                      .request_id = any_cstr(),
                                      .input = next(4),
                                      .parse_special = next(2),
                                      .ignore_eos = next(2),
                                      .logprobs = next(2),
                                      .prompt_logprobs = next(2),
                                      .echo_special = next(2),
                                      .min_tokens = any_u32(),
                                      .top_logprobs = any_u32()};
    r.has_add_special = next(2), r.add_special = next(2);
    r.has_max_tokens = next(2), r.max_tokens = any_u32();
    r.has_n = next(2), r.n = any_u32();
    r.has_seed = next(2), r.sampling.seed = any_u64();
    r.has_repetition_penalty = next(2), r.sampling.repetition_penalty = any_float();
    r.has_presence_penalty = next(2), r.sampling.presence_penalty = any_float();
    r.has_frequency_penalty = next(2), r.sampling.frequency_penalty = any_float();
    r.has_temperature = next(2), r.sampling.temperature = any_float();
    r.has_top_k = next(2), r.sampling.top_k = any_u32();
    r.has_top_p = next(2), r.sampling.top_p = any_float();
    r.has_min_p = next(2), r.sampling.min_p = any_float();
    if (r.input == WIRE_INPUT_TEXT)
        r.text = any_text();
    if (r.input == WIRE_INPUT_TOKENS)
        r.tokens = any_ids(&r.n_tokens, 50);
    if (r.input == WIRE_INPUT_MESSAGES)
        r.messages = any_messages();
    r.stop_ids = any_ids(&r.n_stop_ids, MAX_STOP_IDS);
    r.n_stop = next(4);
    const char **stop = arena_alloc(&arena, r.n_stop, sizeof(*stop));
    for (uint32_t i = 0; i < r.n_stop; i++)
        stop[i] = next(2) ? "\n\n" : "\xE2\x82\xAC";
    r.stop = stop;
    r.n_biases = next(6);
    struct logit_bias *biases = arena_alloc(&arena, r.n_biases, sizeof(*biases));
    for (uint32_t i = 0; i < r.n_biases; i++)
        biases[i] = (struct logit_bias){(int32_t)any_u32(), next(3) ? any_float() : -INFINITY};
    r.biases = biases;
    return r;
}

static struct wire_logprob *any_logprobs(uint32_t *count, bool tops)
{
    *count = next(5);
    struct wire_logprob *out = arena_alloc(&arena, *count, sizeof(*out));
    for (uint32_t i = 0; i < *count; i++) {
        out[i] = (struct wire_logprob){
            .token = (int32_t)any_u32(), .logprob = any_float(), .unscored = next(2), .text = any_text()};
        if (tops)
            out[i].top = any_logprobs(&out[i].n_top, false);
    }
    return out;
}

static struct wire_generate_response any_response(void)
{
    struct wire_generate_response r = {.choice = any_u32(), .text = any_text(), .finish = next(4)};
    r.token_ids = any_ids(&r.n_token_ids, 20);
    r.prompt_token_ids = any_ids(&r.n_prompt_token_ids, 20);
    r.logprobs = any_logprobs(&r.n_logprobs, true);
    r.prompt_logprobs = any_logprobs(&r.n_prompt_logprobs, true);
    uint32_t matched = next(3);
    r.matched_stop = matched == 1;
    r.matched_id = matched == 2;
    if (r.matched_stop)
        r.stop = any_text();
    if (r.matched_id)
        r.stop_id = (int32_t)any_u32();
    r.has_usage = next(2);
    if (r.has_usage) {
        r.prompt_tokens = any_u32();
        r.cached_tokens = any_u32();
        r.completion_tokens = any_u32();
        r.seed = any_u64();
        r.queue_ms = any_float();
        r.ttft_ms = any_float();
        r.total_ms = any_float();
        r.tokens_per_second = any_float();
    }
    return r;
}

static struct wire_model any_model(void)
{
    struct wire_model m = {.name = any_cstr(),
                           .architecture = any_cstr(),
                           .tokenizer = any_cstr(),
                           .chat_template = any_cstr(),
                           .layers = any_u32(),
                           .width = any_u32(),
                           .heads = any_u32(),
                           .kv_heads = any_u32(),
                           .head_size = any_u32(),
                           .ffn_width = any_u32(),
                           .vocabulary = any_u32(),
                           .context = any_u32(),
                           .trained_context = any_u32(),
                           .file_bytes = any_u64(),
                           .fingerprint = any_u64(),
                           .bos_id = (int32_t)any_u32(),
                           .has_chat_template = next(2)};
    m.end_ids = any_ids(&m.n_end_ids, 10);
    return m;
}

static struct wire_pool any_pool(void)
{
    struct wire_pool p = {.state = next(8),
                          .epoch = any_u64(),
                          .steps = any_u64(),
                          .problem = any_cstr(),
                          .n_stages = next(5),
                          .workers_wanted = any_u32(),
                          .pages = any_u32(),
                          .pages_free = any_u32(),
                          .page_positions = any_u32(),
                          .running = any_u32(),
                          .waiting = any_u32(),
                          .max_sequences = any_u32()};
    struct wire_stage *stages = arena_alloc(&arena, p.n_stages, sizeof(*stages));
    for (uint32_t i = 0; i < p.n_stages; i++)
        stages[i] = (struct wire_stage){.index = i,
                                        .first_layer = any_u32(),
                                        .layers = any_u32(),
                                        .worker = any_cstr(),
                                        .device = any_cstr(),
                                        .state = any_cstr(),
                                        .weight_bytes = any_u64(),
                                        .kv_bytes = any_u64(),
                                        .loaded_bytes = any_u64(),
                                        .load_bytes = any_u64(),
                                        .busy = any_float(),
                                        .waiting = any_float(),
                                        .layer_ns = any_u64(),
                                        .head_ns = any_u64()};
    p.stages = stages;
    return p;
}

// --- there and back

// Encodes, decodes, encodes again: the second bytes are the first, so nothing was lost on the way. What the
// decoded struct says is checked one by one below.
#define THERE_AND_BACK(name, value)                                                                          \
    do {                                                                                                     \
        struct wire_##name in = (value), out;                                                                \
        memset(&out, 0xA5, sizeof(out));                                                                     \
        ck_assert_int_eq(wire_encode_##name(&bytes, &in), 0);                                                \
        int status = wire_decode_##name(&out, bytes.data, bytes.length, &arena, &error);                     \
        ck_assert_msg(status == 0, "%s", error.text);                                                        \
        ck_assert_int_eq(wire_encode_##name(&again, &out), 0);                                               \
        ck_assert_uint_eq(bytes.length, again.length);                                                       \
        ck_assert(bytes.length == 0 || memcmp(bytes.data, again.data, bytes.length) == 0);                   \
    } while (0)

START_TEST(random_messages_go_there_and_back)
{
    for (int i = 0; i < 2000; i++) {
        random_state = (uint64_t)i;
        THERE_AND_BACK(generate_request, any_request());
        THERE_AND_BACK(generate_response, any_response());
        THERE_AND_BACK(model, any_model());
        THERE_AND_BACK(pool, any_pool());
        struct wire_tokenize_request tokenize = {
            .text = any_text(), .parse_special = next(2), .add_special = next(2), .has_messages = next(2)};
        if (tokenize.has_messages)
            tokenize.messages = any_messages();
        THERE_AND_BACK(tokenize_request, tokenize);
        struct wire_tokenize_response tokenized = {.rendered = any_text()};
        tokenized.ids = any_ids(&tokenized.n_ids, 30);
        THERE_AND_BACK(tokenize_response, tokenized);
        struct wire_detokenize_request detokenize = {.special = next(2)};
        detokenize.ids = any_ids(&detokenize.n_ids, 30);
        THERE_AND_BACK(detokenize_request, detokenize);
        THERE_AND_BACK(detokenize_response, (struct wire_detokenize_response){any_text()});
        arena_reset(&arena);
    }
}
END_TEST

static bool text_is(struct wire_text text, const char *expected, size_t length)
{
    return text.length == length && memcmp(text.data, expected, length) == 0 && text.data[length] == '\0';
}

START_TEST(an_empty_request_has_the_documented_defaults)
{
    struct wire_generate_request out;
    memset(&out, 0xA5, sizeof(out));
    ck_assert_int_eq(wire_decode_generate_request(&out, NULL, 0, &arena, &error), 0);
    ck_assert_str_eq(out.model, "");
    ck_assert_str_eq(out.request_id, "");
    ck_assert_int_eq(out.input, WIRE_INPUT_NONE);
    ck_assert(out.add_special && !out.has_add_special && !out.parse_special && !out.ignore_eos);
    ck_assert(out.n == 1 && !out.has_n && !out.has_max_tokens && !out.has_seed);
    ck_assert(out.n_stop == 0 && out.n_stop_ids == 0 && out.n_biases == 0 && out.n_tokens == 0);
    const struct sampling_params *s = &out.sampling;
    ck_assert(s->temperature == 1 && s->top_p == 1 && s->repetition_penalty == 1 && s->top_k == 0);
    ck_assert(s->min_p == 0 && s->presence_penalty == 0 && s->frequency_penalty == 0 && s->min_tokens == 0);
    ck_assert(!out.has_temperature && !out.has_top_k && !out.has_top_p && !out.has_min_p);
}
END_TEST

START_TEST(zero_is_not_unset)
{
    const struct wire_generate_request in = {.has_temperature = true,
                                             .has_max_tokens = true,
                                             .has_add_special = true,
                                             .has_seed = true,
                                             .has_top_p = true,
                                             .has_n = true,
                                             .input = WIRE_INPUT_TEXT,
                                             .text = {"", 0}};
    struct wire_generate_request out;
    ck_assert_int_eq(wire_encode_generate_request(&bytes, &in), 0);
    ck_assert_int_eq(wire_decode_generate_request(&out, bytes.data, bytes.length, &arena, &error), 0);
    ck_assert(out.has_temperature && out.sampling.temperature == 0);
    ck_assert(out.has_max_tokens && out.max_tokens == 0);
    ck_assert(out.has_add_special && !out.add_special);
    ck_assert(out.has_seed && out.sampling.seed == 0);
    ck_assert(out.has_top_p && out.sampling.top_p == 0);
    ck_assert(out.has_n && out.n == 0);
    ck_assert(!out.has_top_k && !out.has_min_p && !out.has_presence_penalty);
    ck_assert_int_eq(out.input, WIRE_INPUT_TEXT);
}
END_TEST

START_TEST(fields_arrive_where_they_belong)
{
    static const int32_t ids[] = {1, -2, 300000}, stop_ids[] = {7};
    static const char *const stop[] = {"END", "\n"};
    static const struct logit_bias biases[] = {{5, -INFINITY}, {6, 1.5f}};
    struct wire_generate_request in = {.model = "m",
                                       .request_id = "r-1",
                                       .input = WIRE_INPUT_TOKENS,
                                       .tokens = ids,
                                       .n_tokens = 3,
                                       .stop = stop,
                                       .n_stop = 2,
                                       .stop_ids = stop_ids,
                                       .n_stop_ids = 1,
                                       .biases = biases,
                                       .n_biases = 2,
                                       .min_tokens = 4,
                                       .logprobs = true,
                                       .top_logprobs = 3,
                                       .has_top_k = true,
                                       .has_min_p = true,
                                       .sampling = {.top_k = 40, .min_p = 0.25f}};
    struct wire_generate_request out;
    ck_assert_int_eq(wire_encode_generate_request(&bytes, &in), 0);
    ck_assert_int_eq(wire_decode_generate_request(&out, bytes.data, bytes.length, &arena, &error), 0);
    ck_assert_str_eq(out.model, "m");
    ck_assert_str_eq(out.request_id, "r-1");
    ck_assert(out.input == WIRE_INPUT_TOKENS && out.n_tokens == 3);
    ck_assert_mem_eq(out.tokens, ids, sizeof(ids));
    ck_assert(out.n_stop == 2 && strcmp(out.stop[0], "END") == 0 && strcmp(out.stop[1], "\n") == 0);
    ck_assert(out.n_stop_ids == 1 && out.stop_ids[0] == 7);
    ck_assert(out.n_biases == 2 && out.biases[0].token == 5 && isinf(out.biases[0].bias));
    ck_assert(out.biases[1].bias == 1.5f);
    ck_assert(out.sampling.min_tokens == 4 && out.min_tokens == 4 && out.logprobs && out.top_logprobs == 3);
    ck_assert(out.sampling.top_k == 40 && out.sampling.min_p == 0.25f && out.sampling.temperature == 1);

    in = (struct wire_generate_request){.input = WIRE_INPUT_TEXT, .text = {"a\0b", 3}};
    ck_assert_int_eq(wire_encode_generate_request(&bytes, &in), 0);
    ck_assert_int_eq(wire_decode_generate_request(&out, bytes.data, bytes.length, &arena, &error), 0);
    ck_assert(out.input == WIRE_INPUT_TEXT && text_is(out.text, "a\0b", 3));
}
END_TEST

START_TEST(a_response_says_how_it_ended)
{
    static const int32_t ids[] = {9};
    const struct wire_logprob top = {
        .token = 3, .logprob = -2, .text = {"\xE2", 1}}; // half a character is allowed
    const struct wire_logprob one = {.token = 9, .logprob = -0.5f, .text = {"x", 1}, .top = &top, .n_top = 1};
    const struct wire_generate_response in = {.choice = 2,
                                              .text = {"x", 1},
                                              .token_ids = ids,
                                              .n_token_ids = 1,
                                              .logprobs = &one,
                                              .n_logprobs = 1,
                                              .finish = WIRE_FINISH_STOP,
                                              .matched_id = true,
                                              .stop_id = 0,
                                              .has_usage = true,
                                              .prompt_tokens = 5,
                                              .completion_tokens = 6,
                                              .seed = UINT64_MAX,
                                              .ttft_ms = 1.25};
    struct wire_generate_response out;
    ck_assert_int_eq(wire_encode_generate_response(&bytes, &in), 0);
    ck_assert_int_eq(wire_decode_generate_response(&out, bytes.data, bytes.length, &arena, &error), 0);
    ck_assert(out.choice == 2 && text_is(out.text, "x", 1) && out.n_token_ids == 1 && out.token_ids[0] == 9);
    ck_assert(out.n_logprobs == 1 && out.logprobs[0].logprob == -0.5f && out.logprobs[0].n_top == 1);
    ck_assert(out.logprobs[0].top[0].token == 3 && text_is(out.logprobs[0].top[0].text, "\xE2", 1));
    ck_assert(out.finish == WIRE_FINISH_STOP && out.matched_id && out.stop_id == 0 && !out.matched_stop);
    ck_assert(out.has_usage && out.prompt_tokens == 5 && out.completion_tokens == 6 &&
              out.seed == UINT64_MAX);
    ck_assert(out.ttft_ms == 1.25 && out.n_prompt_logprobs == 0);
}
END_TEST

// --- what is refused

// One field of a GenerateRequest, as bytes.
static void expect_refused(const char *field, size_t length, const char *sentence)
{
    struct wire_generate_request out;
    int status = wire_decode_generate_request(&out, (const uint8_t *)field, length, &arena, &error);
    ck_assert_int_eq(status, STATUS_INVALID);
    ck_assert_msg(strstr(error.text, sentence) != NULL, "\"%s\" lacks \"%s\"", error.text, sentence);
}

START_TEST(broken_text_is_refused_with_its_place)
{
    expect_refused("\x0A\x03"
                   "ab\xFF",
                   5, "model is not valid UTF-8 at byte 2");
    expect_refused("\x12\x02\xC0\x80", 4, "request_id is not valid UTF-8 at byte 0"); // overlong
    expect_refused("\x1A\x03\xED\xA0\x80", 5, "text is not valid UTF-8 at byte 0");   // a surrogate
    expect_refused("\x1A\x02"
                   "a\xC3",
                   4, "text is not valid UTF-8 at byte 1"); // cut
    expect_refused("\x52\x01\xFE", 3, "stop is not valid UTF-8");
    expect_refused("\x2A\x05\x0A\x03\x12\x01\xFF", 7, "content is not valid UTF-8");
    expect_refused("\x0A\x03"
                   "a\0b",
                   5, "model has a NUL at byte 1");
    expect_refused("\x52\x02\0a", 4, "stop has a NUL at byte 0");
    expect_refused("\x2A\x05\x0A\x03\x12\x01\0", 7, "content has a NUL");
}
END_TEST

START_TEST(too_much_is_refused_with_the_number)
{
    struct wire_generate_request in = {.input = WIRE_INPUT_NONE}, out;
    static const char *stop[MAX_STOP_STRINGS + 1];
    static char longest[MAX_STOP_BYTES + 2], id[MAX_REQUEST_ID_BYTES + 2];
    static int32_t ids[MAX_STOP_IDS + 1];
    static struct logit_bias biases[MAX_LOGIT_BIAS + 1];
    for (int i = 0; i <= MAX_STOP_STRINGS; i++)
        stop[i] = "x";
    memset(longest, 'x', MAX_STOP_BYTES + 1);
    memset(id, 'x', MAX_REQUEST_ID_BYTES + 1);
#define EXPECT(sentence)                                                                                     \
    do {                                                                                                     \
        ck_assert_int_eq(wire_encode_generate_request(&bytes, &in), 0);                                      \
        int status = wire_decode_generate_request(&out, bytes.data, bytes.length, &arena, &error);           \
        ck_assert_int_eq(status, STATUS_INVALID);                                                            \
        ck_assert_msg(strstr(error.text, sentence) != NULL, "%s", error.text);                               \
    } while (0)
    in = (struct wire_generate_request){.stop = stop, .n_stop = MAX_STOP_STRINGS + 1};
    EXPECT("17 stop strings are more than the limit of 16");
    stop[0] = longest;
    in.n_stop = 1;
    EXPECT("a stop string of 257 bytes is longer than the limit of 256");
    stop[0] = "";
    EXPECT("a stop string is empty");
    in = (struct wire_generate_request){.stop_ids = ids, .n_stop_ids = MAX_STOP_IDS + 1};
    EXPECT("65 stop ids are more than the limit of 64");
    in = (struct wire_generate_request){.biases = biases, .n_biases = MAX_LOGIT_BIAS + 1};
    EXPECT("1025 logit biases are more than the limit of 1024");
    in = (struct wire_generate_request){.request_id = id};
    EXPECT("a request_id of 129 bytes is longer than the limit of 128");
    in = (struct wire_generate_request){.input = WIRE_INPUT_TOKENS, .n_tokens = MAX_CONTEXT + 1};
    in.tokens = calloc(in.n_tokens, sizeof(*in.tokens));
    EXPECT("1048577 token ids are more than the limit of 1048576");
    free((void *)in.tokens);
    struct wire_message *messages = calloc(MAX_CHAT_MESSAGES + 1, sizeof(*messages));
    in = (struct wire_generate_request){
        .input = WIRE_INPUT_MESSAGES,
        .messages = {.messages = messages, .n_messages = MAX_CHAT_MESSAGES + 1}};
    EXPECT("4097 messages are more than the limit of 4096");
    free(messages);
#undef EXPECT
}
END_TEST

START_TEST(a_small_message_cannot_ask_for_much_memory)
{
    // Two bytes each on the wire, a struct of a hundred in memory.
    size_t length = 8 << 20;
    uint8_t *raw = malloc(length);
    for (size_t i = 0; i < length; i += 2)
        memcpy(raw + i, "\x72\x00", 2); // logit_bias {}
    struct wire_generate_request out;
    ck_assert_int_eq(wire_decode_generate_request(&out, raw, length, &arena, &error), STATUS_INVALID);
    ck_assert_uint_lt(arena.total, 33 * length);
    free(raw);
}
END_TEST

START_TEST(endless_nesting_is_refused)
{
    // logprobs { top { top { ... } } }, from the inside out
    size_t room = 4 << 20, start = room;
    uint8_t *raw = malloc(room);
    while (start > 16) {
        size_t length = room - start;
        uint8_t header[12], *end = header;
        *end++ = 0x22;
        for (; length >= 0x80; length >>= 7)
            *end++ = (uint8_t)(length | 0x80);
        *end++ = (uint8_t)length;
        start -= (size_t)(end - header);
        memcpy(raw + start, header, (size_t)(end - header));
    }
    struct wire_generate_response out;
    int status = wire_decode_generate_response(&out, raw + start, room - start, &arena, &error);
    ck_assert_int_eq(status, STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "nest"));
    free(raw);
    // Two levels are what there is.
    ck_assert_int_eq(
        wire_decode_generate_response(&out, (const uint8_t *)"\x22\x02\x22\x00", 4, &arena, &error), 0);
    ck_assert_int_eq(
        wire_decode_generate_response(&out, (const uint8_t *)"\x22\x04\x22\x02\x22\x00", 6, &arena, &error),
        STATUS_CORRUPT);
}
END_TEST

START_TEST(unknown_fields_are_skipped)
{
    struct wire_generate_request out;
    // 1000: 5, 1001: "new", model: "m"
    static const uint8_t newer[] = {0xC0, 0x3E, 0x05, 0xCA, 0x3E, 0x03, 'n', 'e', 'w', 0x0A, 0x01, 'm'};
    ck_assert_int_eq(wire_decode_generate_request(&out, newer, sizeof(newer), &arena, &error), 0);
    ck_assert_str_eq(out.model, "m");
    // A known field of another wire type is no field of ours either.
    static const uint8_t mistyped[] = {0x08, 0x05};
    int status = wire_decode_generate_request(&out, mistyped, sizeof(mistyped), &arena, &error);
    ck_assert(status == 0 || status == STATUS_INVALID);
    // The last member of a oneof counts.
    static const uint8_t twice[] = {0x1A, 0x01, 'a', 0x22, 0x03, 0x0A, 0x01, 0x07};
    ck_assert_int_eq(wire_decode_generate_request(&out, twice, sizeof(twice), &arena, &error), 0);
    ck_assert(out.input == WIRE_INPUT_TOKENS && out.n_tokens == 1 && out.tokens[0] == 7);
}
END_TEST

// --- what is repaired

START_TEST(broken_text_of_ours_is_repaired)
{
    struct wire_generate_response in = {.text = {"a\xFF"
                                                 "b\xE2\x82",
                                                 5}},
                                  out;
    ck_assert_int_eq(wire_encode_generate_response(&bytes, &in), 0);
    ck_assert_int_eq(wire_decode_generate_response(&out, bytes.data, bytes.length, &arena, &error), 0);
    ck_assert(text_is(out.text,
                      "a\xEF\xBF\xBD"
                      "b\xEF\xBF\xBD",
                      8));
    struct wire_pool pool = {.problem = "\xFF"}, back;
    ck_assert_int_eq(wire_encode_pool(&bytes, &pool), 0);
    ck_assert_int_eq(wire_decode_pool(&back, bytes.data, bytes.length, &arena, &error), 0);
    ck_assert_str_eq(back.problem, "\xEF\xBF\xBD");
}
END_TEST

// --- damage

#define DECODE(name, data, size)                                                                             \
    do {                                                                                                     \
        struct wire_##name out;                                                                              \
        int status = wire_decode_##name(&out, data, size, &arena, &error);                                   \
        ck_assert(status == 0 || status == STATUS_INVALID || status == STATUS_CORRUPT);                      \
        if (!status) /* what was accepted can be said again */                                               \
            ck_assert_int_eq(wire_encode_##name(&again, &out), 0);                                           \
    } while (0)

static void decode_all(const uint8_t *data, size_t size)
{
    DECODE(generate_request, data, size);
    DECODE(generate_response, data, size);
    DECODE(tokenize_request, data, size);
    DECODE(tokenize_response, data, size);
    DECODE(detokenize_request, data, size);
    DECODE(detokenize_response, data, size);
    DECODE(model, data, size);
    DECODE(pool, data, size);
    const char *service;
    enum wire_health state;
    wire_decode_health_request(&service, data, size, &arena, &error);
    wire_decode_health_response(&state, data, size, &error);
    if (wire_reflect(&again, data, size, &error) == 0)
        ck_assert_uint_gt(again.length, 0);
    arena_reset(&arena);
}

static void damage(void)
{
    uint8_t *exact = malloc(bytes.length + 1); // so that a sanitizer sees one byte too far
    for (size_t cut = 0; cut < bytes.length; cut++) {
        uint8_t *shorter = malloc(cut ? cut : 1);
        memcpy(shorter, bytes.data, cut);
        decode_all(shorter, cut);
        free(shorter);
    }
    for (size_t i = 0; i < bytes.length * 8; i += 1 + next(3)) {
        memcpy(exact, bytes.data, bytes.length);
        exact[i / 8] ^= (uint8_t)(1 << i % 8);
        decode_all(exact, bytes.length);
    }
    free(exact);
}

START_TEST(cuts_and_flips_do_no_harm)
{
    for (int i = 0; i < 6; i++) {
        random_state = 1000 + (uint64_t)i;
        struct wire_generate_request request = any_request();
        ck_assert_int_eq(wire_encode_generate_request(&bytes, &request), 0);
        damage();
        struct wire_generate_response response = any_response();
        ck_assert_int_eq(wire_encode_generate_response(&bytes, &response), 0);
        damage();
        struct wire_pool pool = any_pool();
        ck_assert_int_eq(wire_encode_pool(&bytes, &pool), 0);
        damage();
    }
    ck_assert_int_eq(wire_encode_health_request(&bytes, "strata.v1.Inference"), 0);
    damage();
}
END_TEST

START_TEST(noise_does_no_harm)
{
    for (int i = 0; i < 3000; i++) {
        random_state = 5000 + (uint64_t)i;
        size_t length = next(40);
        uint8_t *noise = malloc(length ? length : 1);
        for (size_t j = 0; j < length; j++) // small numbers make plausible tags
            noise[j] = (uint8_t)(next(3) ? next(64) : next(256));
        decode_all(noise, length);
        free(noise);
    }
}
END_TEST

START_TEST(health_goes_there_and_back)
{
    const char *service;
    enum wire_health state;
    ck_assert_int_eq(wire_encode_health_request(&bytes, "strata.v1.Inference"), 0);
    ck_assert_int_eq(wire_decode_health_request(&service, bytes.data, bytes.length, &arena, &error), 0);
    ck_assert_str_eq(service, "strata.v1.Inference");
    for (int i = 0; i <= WIRE_HEALTH_SERVICE_UNKNOWN; i++) {
        ck_assert_int_eq(wire_encode_health_response(&bytes, i), 0);
        ck_assert_int_eq(wire_decode_health_response(&state, bytes.data, bytes.length, &error), 0);
        ck_assert_int_eq(state, i);
    }
    // A status this client does not know.
    ck_assert_int_eq(wire_decode_health_response(&state, (const uint8_t *)"\x08\x63", 2, &error), 0);
    ck_assert_int_eq(state, WIRE_HEALTH_UNKNOWN);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("wire");
    TCase *tests = tcase_create("inference");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, random_messages_go_there_and_back);
    tcase_add_test(tests, an_empty_request_has_the_documented_defaults);
    tcase_add_test(tests, zero_is_not_unset);
    tcase_add_test(tests, fields_arrive_where_they_belong);
    tcase_add_test(tests, a_response_says_how_it_ended);
    tcase_add_test(tests, broken_text_is_refused_with_its_place);
    tcase_add_test(tests, too_much_is_refused_with_the_number);
    tcase_add_test(tests, a_small_message_cannot_ask_for_much_memory);
    tcase_add_test(tests, endless_nesting_is_refused);
    tcase_add_test(tests, unknown_fields_are_skipped);
    tcase_add_test(tests, broken_text_of_ours_is_repaired);
    tcase_add_test(tests, cuts_and_flips_do_no_harm);
    tcase_add_test(tests, noise_does_no_harm);
    tcase_add_test(tests, health_goes_there_and_back);
    suite_add_tcase(suite, tests);
    return suite;
}
