// Real vocabularies against the ids that their authors' tools give, and properties that hold for any text:
// what goes in comes out again, at a speed that does not depend on how the text is built. Vocabularies whose
// licences keep them out of the repository are tested where they lie beside the checkout.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/suite.h"
#include "tests/vocabulary.h"

static const char *const names[] = {"gpt-2", "qwen2", "llama3", "llama-spm"};
enum { N_NAMES = sizeof(names) / sizeof(names[0]), FIRST_UNPACKED = 2 };

static struct tokenizer *open_or_skip(int which)
{
    struct tokenizer *tokenizer = tokenizer_from_fixture(names[which]);
    if (!tokenizer) {
        ck_assert_msg(which >= FIRST_UNPACKED, "the fixture of %s is missing", names[which]);
        printf("skipped: no vocabulary %s here\n", names[which]);
    }
    return tokenizer;
}

static struct token_list encode(const struct tokenizer *tokenizer, const char *text, size_t length,
                                unsigned flags)
{
    struct token_list list = {0};
    struct error error = {0};
    int status = tokenizer_encode(tokenizer, text, length, flags, &list, &error);
    ck_assert_msg(status == 0, "%s", error.text);
    return list;
}

static void check_vector(const struct tokenizer *tokenizer, const char *text, size_t length, char *ids)
{
    struct token_list list = encode(tokenizer, text, length, 0);
    size_t at = 0;
    for (char *end; *ids; ids = end, at++) {
        long id = strtol(ids, &end, 10);
        if (end == ids)
            break;
        ck_assert_msg(at < list.count && list.ids[at] == id, "id %zu of '%.*s'", at, (int)length, text);
    }
    ck_assert_uint_eq(at, list.count);
    token_list_free(&list);
}

START_TEST(every_vector_matches)
{
    static const char separator[] = "\n__ggml_vocab_test__\n";
    struct tokenizer *tokenizer = open_or_skip(_i);
    if (!tokenizer)
        return;
    size_t text_length, ids_length, vectors = 0;
    char *text = fixture_text(names[_i], ".inp", &text_length);
    char *ids = fixture_text(names[_i], ".out", &ids_length);
    ck_assert(text && ids);
    ids[ids_length - 1] = '\0';
    char *line = ids;
    for (char *at = text, *next; at; at = next, vectors++) {
        size_t left = text_length - (size_t)(at - text);
        char *end = memmem(at, left, separator, sizeof(separator) - 1);
        next = end ? end + sizeof(separator) - 1 : NULL;
        char *line_end = strchr(line, '\n');
        if (line_end)
            *line_end = '\0';
        check_vector(tokenizer, at, end ? (size_t)(end - at) : left, line);
        line = line_end ? line_end + 1 : line + strlen(line);
    }
    ck_assert_uint_gt(vectors, 40);
    free(text);
    free(ids);
    tokenizer_free(tokenizer);
}
END_TEST

static uint64_t seed = 88172645463325252u;

static uint32_t random_below(uint32_t bound)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)((seed >> 32) * bound >> 32);
}

// A random character of some script, as UTF-8.
static size_t put_character(char *out)
{
    static const uint32_t ranges[][2] = {{0x20, 0x5F},     {0x00, 0x20},    {0x80, 0x180},
                                         {0x400, 0x60},    {0x5D0, 0x80},   {0x900, 0x80},
                                         {0x2000, 0x70},   {0x3000, 0x100}, {0x4E00, 0x5000},
                                         {0xAC00, 0x2000}, {0xFE00, 0x30},  {0x1F300, 0x400}};
    const uint32_t *range = ranges[random_below(sizeof(ranges) / sizeof(ranges[0]))];
    uint32_t c = range[0] + random_below(range[1]);
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    size_t length = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char leads[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = length - 1; i > 0; i--, c >>= 6)
        out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)(leads[length] | c);
    return length;
}

static size_t decode(const struct tokenizer *tokenizer, const struct token_list *list, char *out,
                     size_t capacity)
{
    struct token_decoder decoder;
    token_decoder_init(&decoder, tokenizer, true, true);
    size_t length = 0;
    for (size_t i = 0; i < list->count; i++) {
        int written = token_decoder_push(&decoder, list->ids[i], out + length, capacity - length);
        ck_assert_int_ge(written, 0);
        length += (size_t)written;
    }
    ck_assert_int_eq(token_decoder_finish(&decoder, out + length, capacity - length), 0);
    return length;
}

START_TEST(text_comes_back)
{
    struct tokenizer *tokenizer = open_or_skip(_i);
    if (!tokenizer)
        return;
    static char text[256], back[4096];
    for (int round = 0; round < 2000; round++) {
        size_t length = 0;
        for (uint32_t n = random_below(40); n > 0; n--)
            length += put_character(text + length);
        struct token_list list = encode(tokenizer, text, length, round & 1 ? ENCODE_SPECIAL : 0);
        ck_assert_uint_eq(decode(tokenizer, &list, back, sizeof(back)), length);
        ck_assert_mem_eq(back, text, length);
        token_list_free(&list);
    }
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(any_bytes_come_back)
{
    struct tokenizer *tokenizer = open_or_skip(_i);
    if (!tokenizer)
        return;
    for (int round = 0; round < 2000; round++) {
        char text[64], back[256];
        size_t length = random_below(sizeof(text)), at = 0;
        for (size_t i = 0; i < length; i++)
            text[i] = (char)(random_below(2) ? 0x61 + random_below(4) : random_below(256));
        struct token_list list = encode(tokenizer, text, length, 0);
        for (size_t i = 0; i < list.count; i++) {
            int n = tokenizer_token_text(tokenizer, list.ids[i], true, back + at, sizeof(back) - at);
            ck_assert_int_ge(n, 0);
            at += (size_t)n;
        }
        bool space = strcmp(tokenizer_model(tokenizer), "llama") == 0 && length > 0;
        ck_assert_uint_eq(at, length + space);
        ck_assert_mem_eq(back + space, text, length);
        token_list_free(&list);
    }
    tokenizer_free(tokenizer);
}
END_TEST

// A megabyte of each: whatever takes time quadratic in a word, a run or a text would run for hours.
START_TEST(a_megabyte_of_anything_is_quick)
{
    static const char *const patterns[] = {"a",
                                           " ",
                                           "\n",
                                           " \n",
                                           "7",
                                           "!?",
                                           "\xE4\xB8\xAD",
                                           "\xF0\x9F\x98\x80",
                                           "<|",
                                           "\xFF",
                                           "\xE4\xB8",
                                           "ab",
                                           "the quick brown fox "};
    struct tokenizer *tokenizer = open_or_skip(_i);
    if (!tokenizer)
        return;
    const size_t length = getenv("STRATA_TEST_SLOW") ? 1 << 17 : 1 << 20;
    char *text = malloc(length + 1);
    ck_assert_ptr_nonnull(text);
    for (size_t p = 0; p < sizeof(patterns) / sizeof(patterns[0]); p++) {
        size_t unit = strlen(patterns[p]);
        for (size_t i = 0; i < length; i++)
            text[i] = patterns[p][i % unit];
        text[length] = 'x'; // a run of white space that does not end the text
        struct token_list list = encode(tokenizer, text, length + 1, ENCODE_SPECIAL);
        ck_assert_uint_gt(list.count, 0);
        token_list_free(&list);
    }
    free(text);
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(known_facts)
{
    struct tokenizer *tokenizer = open_or_skip(1);
    size_t count;
    const int32_t *ends = tokenizer_end_tokens(tokenizer, &count);
    // <|endoftext|>, <|im_end|>, <|fim_pad|>, <|repo_name|>, <|file_sep|>; "</s>" is a word of this
    // vocabulary.
    static const int32_t expected[] = {151643, 151645, 151662, 151663, 151664};
    ck_assert_uint_eq(count, 5);
    ck_assert_mem_eq(ends, expected, sizeof(expected));
    ck_assert_int_eq(tokenizer_eos(tokenizer), 151645);
    ck_assert_int_eq(tokenizer_bos(tokenizer), -1);
    ck_assert(!tokenizer_adds_bos(tokenizer));
    ck_assert_uint_eq(tokenizer_size(tokenizer), 151669);
    ck_assert_str_eq(tokenizer_pre(tokenizer), "qwen2");
    ck_assert_str_eq(tokenizer_model(tokenizer), "gpt2");

    // User-defined tokens are always found in text, control tokens only on request.
    static const char text[] = "<|im_start|><think>";
    struct token_list list = encode(tokenizer, text, sizeof(text) - 1, 0);
    ck_assert_int_eq(list.ids[list.count - 1], 151667);
    ck_assert_uint_gt(list.count, 2);
    token_list_free(&list);
    list = encode(tokenizer, text, sizeof(text) - 1, ENCODE_SPECIAL);
    ck_assert_uint_eq(list.count, 2);
    ck_assert_int_eq(list.ids[0], 151644);
    token_list_free(&list);
    tokenizer_free(tokenizer);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("tokenizer vectors");
    TCase *tests = tcase_create("real vocabularies");
    tcase_set_timeout(tests, 60);
    tcase_add_loop_test(tests, every_vector_matches, 0, N_NAMES);
    tcase_add_loop_test(tests, text_comes_back, 0, N_NAMES);
    tcase_add_loop_test(tests, any_bytes_come_back, 0, N_NAMES);
    tcase_add_loop_test(tests, a_megabyte_of_anything_is_quick, 0, N_NAMES);
    tcase_add_test(tests, known_facts);
    suite_add_tcase(suite, tests);
    return suite;
}
