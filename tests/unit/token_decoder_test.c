// Incremental decoding: whole characters only, U+FFFD where the WHATWG decoder puts it, whatever way the
// bytes are dealt to tokens.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/utf8.h"
#include "tests/suite.h"
#include "tests/vocabulary.h"

static struct tokenizer *tokenizer;
static struct gguf_writer writer;

static void set_up_bpe(void)
{
    writer = (struct gguf_writer){0};
    small_bpe_write(&writer, "gpt-2");
    tokenizer = tokenizer_from(&writer);
}

static void tear_down(void)
{
    tokenizer_free(tokenizer);
}

#define FFFD UTF8_REPLACEMENT

// In the small BPE vocabulary, token i < 256 is the byte i.
static const struct {
    const char *bytes, *text;
} cases[] = {
    {"plain", "plain"},
    {"caf\xC3\xA9", "caf\u00e9"},
    {"\xE2\x82\xAC\xF0\x9F\x98\x80", "\u20ac\U0001F600"},
    {"\xFF", FFFD},
    {"\x80\x80", FFFD FFFD},
    {"\xC3", FFFD},
    {"\xC3\xC3\xA9", FFFD "\u00e9"},
    {"\xE2\x82", FFFD},
    {"\xE2\x82z", FFFD "z"},
    {"\xE2z", FFFD "z"},
    {"\xF0\x9F\x98", FFFD},
    {"\xF0\x9F\x98\xE2\x82\xAC", FFFD "\u20ac"},
    {"\xF0\x80\x80\x80", FFFD FFFD FFFD FFFD},
    {"\xED\xA0\x80", FFFD FFFD FFFD},
    {"\xC0\xAF", FFFD FFFD},
    {"\xF4\x90\x80\x80z", FFFD FFFD FFFD FFFD "z"},
    {"\xF0\x9F\xF0\x9F\x98\x80", FFFD "\U0001F600"},
    {"a\xF0\x9F\x98\xF0\x9F\x98\xF0", "a" FFFD FFFD FFFD},
};

START_TEST(bytes_become_characters)
{
    struct token_decoder decoder;
    token_decoder_init(&decoder, tokenizer, false, false);
    char text[128];
    size_t length = 0;
    for (const char *at = cases[_i].bytes; *at; at++) {
        int written = token_decoder_push(&decoder, (unsigned char)*at, text + length, sizeof(text) - length);
        ck_assert_int_ge(written, 0);
        ck_assert_uint_eq(utf8_valid_prefix(text + length, (size_t)written), (size_t)written);
        length += (size_t)written;
    }
    int written = token_decoder_finish(&decoder, text + length, sizeof(text) - length);
    ck_assert(written == 0 || written == 3);
    length += (size_t)written;
    text[length] = '\0';
    ck_assert_str_eq(text, cases[_i].text);
    ck_assert_int_eq(token_decoder_finish(&decoder, text, sizeof(text)), 0);
}
END_TEST

static int32_t id_of(const char *text)
{
    for (int32_t id = 0; id < (int32_t)tokenizer_size(tokenizer); id++) {
        const char *bytes;
        size_t length;
        tokenizer_token(tokenizer, id, &bytes, &length);
        if (length == strlen(text) && memcmp(bytes, text, length) == 0)
            return id;
    }
    ck_abort_msg("no token %s", text);
}

// A token may end one character and begin the next.
START_TEST(characters_cross_tokens)
{
    struct token_decoder decoder;
    token_decoder_init(&decoder, tokenizer, false, false);
    char out[64];
    int32_t three = id_of("\u00f0\u0141\u013a"); // F0 9F 98
    ck_assert_int_eq(token_decoder_push(&decoder, three, out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("<|im_end|>"), out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_push(&decoder, 0x80, out, sizeof(out)), 4);
    ck_assert_mem_eq(out, "\U0001F600", 4);
    ck_assert_int_eq(token_decoder_push(&decoder, three, out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_push(&decoder, three, out, sizeof(out)), 3);
    ck_assert_mem_eq(out, FFFD, 3);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("hello"), out, sizeof(out)), 8);
    ck_assert_mem_eq(out, FFFD "hello", 8);
}
END_TEST

START_TEST(control_tokens_show_on_request)
{
    struct token_decoder decoder;
    char out[64];
    int32_t start = id_of("<|start|>");
    token_decoder_init(&decoder, tokenizer, true, false);
    ck_assert_int_eq(token_decoder_push(&decoder, start, out, sizeof(out)), 9);
    token_decoder_init(&decoder, tokenizer, false, false);
    ck_assert_int_eq(token_decoder_push(&decoder, start, out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("<tool>"), out, sizeof(out)), 6); // user defined
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("<pad>"), out, sizeof(out)), 0);  // unused
    ck_assert_int_eq(tokenizer_token_text(tokenizer, start, true, out, sizeof(out)), 9);
    ck_assert_int_eq(tokenizer_token_text(tokenizer, start, false, out, sizeof(out)), 0);
    ck_assert_int_eq(tokenizer_token_text(tokenizer, 0xE2, false, out, sizeof(out)), 1);
    ck_assert_int_eq(out[0], (char)0xE2);
}
END_TEST

START_TEST(bad_ids_and_small_buffers_are_refused)
{
    struct token_decoder decoder;
    char out[64];
    token_decoder_init(&decoder, tokenizer, false, false);
    ck_assert_int_eq(token_decoder_push(&decoder, -1, out, sizeof(out)), STATUS_INVALID);
    ck_assert_int_eq(token_decoder_push(&decoder, (int32_t)tokenizer_size(tokenizer), out, sizeof(out)),
                     STATUS_INVALID);
    ck_assert_int_eq(tokenizer_token_text(tokenizer, -1, false, out, sizeof(out)), STATUS_INVALID);
    ck_assert_int_eq(tokenizer_token_text(tokenizer, id_of("hello"), false, out, 4), STATUS_EXHAUSTED);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("hello"), out, 4), STATUS_EXHAUSTED);
    ck_assert_int_eq(token_decoder_push(&decoder, 0xE2, out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_finish(&decoder, out, 2), STATUS_EXHAUSTED);
    ck_assert_int_eq(token_decoder_finish(&decoder, out, 3), 3);
}
END_TEST

// tokenizer_max_bytes holds for every token in every state.
START_TEST(a_push_never_gives_more_than_promised)
{
    size_t most = tokenizer_max_bytes(tokenizer);
    char *out = malloc(most); // exactly: the sanitizer watches the end
    struct token_decoder decoder;
    unsigned state = 1;
    token_decoder_init(&decoder, tokenizer, true, false);
    for (int i = 0; i < 100000; i++) {
        state = state * 1664525u + 1013904223u;
        int32_t id = (int32_t)((state >> 8) % tokenizer_size(tokenizer));
        int written = token_decoder_push(&decoder, id, out, most);
        ck_assert_int_ge(written, 0);
        ck_assert_uint_eq(utf8_valid_prefix(out, (size_t)written), (size_t)written);
    }
    free(out);
}
END_TEST

static void set_up_spm(void)
{
    writer = (struct gguf_writer){0};
    small_spm_write(&writer);
    tokenizer = tokenizer_from(&writer);
}

START_TEST(sentencepiece_spaces_come_back)
{
    struct token_decoder decoder;
    char out[64];
    token_decoder_init(&decoder, tokenizer, false, false);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("\u2581hello"), out, sizeof(out)), 6);
    ck_assert_mem_eq(out, " hello", 6);
    token_decoder_init(&decoder, tokenizer, false, true);
    ck_assert_int_eq(token_decoder_push(&decoder, 1, out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("\u2581hello"), out, sizeof(out)), 5);
    ck_assert_mem_eq(out, "hello", 5);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("\u2581hello"), out, sizeof(out)), 6);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("<0xE2>"), out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("<0x82>"), out, sizeof(out)), 0);
    ck_assert_int_eq(token_decoder_push(&decoder, id_of("<0xAC>"), out, sizeof(out)), 3);
    ck_assert_mem_eq(out, "\u20ac", 3);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("token decoder");
    TCase *bpe = tcase_create("byte-level");
    tcase_add_checked_fixture(bpe, set_up_bpe, tear_down);
    tcase_add_loop_test(bpe, bytes_become_characters, 0, (int)(sizeof(cases) / sizeof(cases[0])));
    tcase_add_test(bpe, characters_cross_tokens);
    tcase_add_test(bpe, control_tokens_show_on_request);
    tcase_add_test(bpe, bad_ids_and_small_buffers_are_refused);
    tcase_add_test(bpe, a_push_never_gives_more_than_promised);
    suite_add_tcase(suite, bpe);
    TCase *spm = tcase_create("sentencepiece");
    tcase_add_checked_fixture(spm, set_up_spm, tear_down);
    tcase_add_test(spm, sentencepiece_spaces_come_back);
    suite_add_tcase(suite, spm);
    return suite;
}
