// Tokenizers on small vocabularies made here: merges against a naive model, special tokens, defaults of the
// metadata, and metadata that must be refused.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/limits.h"
#include "tests/suite.h"
#include "tests/vocabulary.h"

static struct gguf_writer writer;
static struct error error;

static void set_up(void)
{
    writer = (struct gguf_writer){0};
    error = (struct error){0};
}

static struct tokenizer *small_bpe(void)
{
    small_bpe_write(&writer, "gpt-2");
    return tokenizer_from(&writer);
}

static struct tokenizer *small_spm(void)
{
    small_spm_write(&writer);
    return tokenizer_from(&writer);
}

static int32_t id_of(const struct tokenizer *tokenizer, const char *text)
{
    for (uint32_t id = 0; id < tokenizer_size(tokenizer); id++) {
        const char *bytes;
        size_t length;
        tokenizer_token(tokenizer, (int32_t)id, &bytes, &length);
        if (length == strlen(text) && memcmp(bytes, text, length) == 0)
            return (int32_t)id;
    }
    return -1;
}

static struct token_list encode(const struct tokenizer *tokenizer, const char *text, size_t length,
                                unsigned flags)
{
    struct token_list list = {0};
    int status = tokenizer_encode(tokenizer, text, length, flags, &list, &error);
    ck_assert_msg(status == 0, "%s", error.text);
    return list;
}

// The tokens of `text` must be those written in `expected`, separated by "|".
static void check_tokens(const struct tokenizer *tokenizer, const char *text, unsigned flags,
                         const char *expected)
{
    struct token_list list = encode(tokenizer, text, strlen(text), flags);
    char found[1024] = "";
    for (size_t i = 0; i < list.count; i++) {
        const char *bytes;
        size_t length;
        tokenizer_token(tokenizer, list.ids[i], &bytes, &length);
        snprintf(found + strlen(found), sizeof(found) - strlen(found), "%s%.*s", i ? "|" : "", (int)length,
                 bytes);
    }
    ck_assert_str_eq(found, expected);
    token_list_free(&list);
}

// --- byte-level BPE ---

START_TEST(bpe_merges_by_rank)
{
    struct tokenizer *tokenizer = small_bpe();
    check_tokens(tokenizer, "", 0, "");
    check_tokens(tokenizer, "hello", 0, "hello");
    check_tokens(tokenizer, "hello world", 0, "hello|\u0120world");
    check_tokens(tokenizer, "hell", 0, "hell");
    check_tokens(tokenizer, "the then", 0, "the|\u0120the|n");
    check_tokens(tokenizer, "aaaaa", 0, "aaaa|a");
    check_tokens(tokenizer, "aaaaaaa", 0, "aaaa|aa|a");
    check_tokens(tokenizer, "123", 0, "123");
    check_tokens(tokenizer, "\n", 0, "\u010a");
    check_tokens(tokenizer, "\u00e9", 0, "\u00c3\u00a9");
    check_tokens(tokenizer, "\U0001F600", 0, "\u00f0\u0141\u013a|\u0122");
    tokenizer_free(tokenizer);
}
END_TEST

// "xy z" makes a string that is no token: it falls apart into bytes, not into "xy" and "z".
START_TEST(a_merge_without_a_token_falls_apart)
{
    struct tokenizer *tokenizer = small_bpe();
    check_tokens(tokenizer, "xy", 0, "xy");
    check_tokens(tokenizer, "xyz", 0, "x|y|z");
    tokenizer_free(tokenizer);
}
END_TEST

// What the two merge rules mean, written down with no regard for time: among all neighbours the pair of the
// lowest rank, the leftmost of equals, merges first.
struct naive_part {
    char text[128];
};

static size_t naive_merge(struct naive_part *parts, size_t count,
                          double (*rank)(const char *left, const char *right))
{
    for (;;) {
        size_t best = count;
        double best_rank = 1e30;
        for (size_t i = 0; i + 1 < count; i++) {
            double here = rank(parts[i].text, parts[i + 1].text);
            if (here < best_rank) {
                best_rank = here;
                best = i;
            }
        }
        if (best == count)
            return count;
        struct naive_part right = parts[best + 1];
        strcat(parts[best].text, right.text);
        memmove(&parts[best + 1], &parts[best + 2], (count - best - 2) * sizeof(*parts));
        count--;
    }
}

static double bpe_rank(const char *left, const char *right)
{
    char line[300];
    snprintf(line, sizeof(line), "%s %s", left, right);
    for (uint32_t i = 0; i < small_merge_count; i++) {
        if (strcmp(small_merges[i], line) == 0)
            return i;
    }
    return 1e30;
}

static double spm_rank(const char *left, const char *right)
{
    char text[300];
    snprintf(text, sizeof(text), "%s%s", left, right);
    for (uint32_t i = 0; i < small_piece_count; i++) {
        if (strcmp(small_pieces[i].text, text) == 0 && small_pieces[i].kind == TOKEN_NORMAL)
            return -(double)small_pieces[i].score;
    }
    return 1e30;
}

static uint64_t seed = 1442695040888963407u;

static uint32_t random_below(uint32_t bound)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((seed >> 33) * bound >> 31);
}

START_TEST(bpe_agrees_with_a_naive_model)
{
    struct tokenizer *tokenizer = small_bpe();
    for (int round = 0; round < 3000; round++) {
        char text[25] = "";
        struct naive_part parts[24];
        size_t length = 1 + random_below(24);
        for (size_t i = 0; i < length; i++) {
            text[i] = "heloaworldithenxyz"[random_below(18)]; // one word for the pre-tokenizer
            parts[i] = (struct naive_part){{text[i]}};
        }
        size_t count = naive_merge(parts, length, bpe_rank);
        char expected[128] = "";
        for (size_t i = 0; i < count; i++) {
            if (i)
                strcat(expected, "|");
            strcat(expected, strcmp(parts[i].text, "xyz") == 0 ? "x|y|z" : parts[i].text);
        }
        check_tokens(tokenizer, text, 0, expected);
    }
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(special_tokens_cut_the_text)
{
    struct tokenizer *tokenizer = small_bpe();
    check_tokens(tokenizer, "<|start|>hello<|im_end|>", ENCODE_SPECIAL, "<|start|>|hello|<|im_end|>");
    check_tokens(tokenizer, "<|start", ENCODE_SPECIAL, "<|||s|t|a|r|t");
    check_tokens(tokenizer, "hello<tool>", 0, "hello|<tool>");               // user-defined: always
    check_tokens(tokenizer, "<tool<tool_call>", 0, "<|t|o|o|l|<tool_call>"); // leftmost, then longest
    check_tokens(tokenizer, "<tool><tool_call>", 0, "<tool>|<tool_call>");
    check_tokens(tokenizer, "<pad>", ENCODE_SPECIAL, "<|p|a|d|>"); // unused tokens are never found

    struct token_list list = encode(tokenizer, "<|im_end|>", 10, 0);
    for (size_t i = 0; i < list.count; i++)
        ck_assert_int_ne(list.ids[i], id_of(tokenizer, "<|im_end|>"));
    token_list_free(&list);
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(bos_and_eos_are_added_where_the_model_asks)
{
    small_bpe_write(&writer, "gpt-2");
    gguf_writer_bool(&writer, "tokenizer.ggml.add_bos_token", true);
    gguf_writer_bool(&writer, "tokenizer.ggml.add_eos_token", true);
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    check_tokens(tokenizer, "hello", 0, "hello");
    check_tokens(tokenizer, "hello", ENCODE_ADD_SPECIAL, "<|start|>|hello|<|im_end|>");
    check_tokens(tokenizer, "", ENCODE_ADD_SPECIAL, "<|start|>|<|im_end|>");
    ck_assert(tokenizer_adds_bos(tokenizer) && tokenizer_adds_eos(tokenizer));
    tokenizer_free(tokenizer);
    tokenizer = small_bpe();
    check_tokens(tokenizer, "hello", ENCODE_ADD_SPECIAL, "hello");
    tokenizer_free(tokenizer);
    small_bpe_write(&writer, "llama-bpe");
    tokenizer = tokenizer_from(&writer);
    check_tokens(tokenizer, "hello", ENCODE_ADD_SPECIAL, "<|start|>|hello"); // Llama 3 unless told otherwise
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(llama3_takes_whole_words_first)
{
    // "hel": no merge makes it, but it is a token.
    static const char *const tokens[] = {"h", "e", "l", "he", "hel"};
    static const char *const merges[] = {"h e"};
    for (int llama3 = 0; llama3 < 2; llama3++) {
        gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
        gguf_writer_string(&writer, "tokenizer.ggml.pre", llama3 ? "llama-bpe" : "qwen2");
        gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 5);
        gguf_writer_strings(&writer, "tokenizer.ggml.merges", merges, 1);
        struct tokenizer *tokenizer = tokenizer_from(&writer);
        check_tokens(tokenizer, "hel", 0, llama3 ? "hel" : "he|l");
        check_tokens(tokenizer, "phelp", 0, "he|l"); // no token has a p
        tokenizer_free(tokenizer);
    }
}
END_TEST

// The same text in the words of each pre-tokenizer, told apart by a vocabulary that merges everything: each
// word becomes letters again, but words show in how many tokens digits and spaces give.
static const struct {
    const char *pre, *text, *tokens;
} words[] = {
    {"gpt-2", "123 123", "123|\u0120|123"},
    {"mpt", "123", "123"},
    {"smollm", "123", "1|2|3"},
    {"starcoder", "123", "1|2|3"},
    {"refact", "123", "1|2|3"},
    {"qwen2", "123", "1|2|3"},
    {"llama-bpe", "1231", "123|1"},
    {"llama-bpe", "1212", "12|1|2"},
    {"default", "123123", "123|123"},
    {"falcon", "12312", "123|12"},
    {"deepseek-llm", "12312", "123|12"},
    {"deepseek-coder", "12", "1|2"},
    {"gpt-2", "hello  world", "hello|\u0120|\u0120world"},
    {"smollm", "   x", "\u0120\u0120|\u0120|x"},
    {"qwen2", "\n\n x", "\u010a|\u010a|\u0120|x"},
    {"deepseek-llm", "hello  ", "hello|\u0120\u0120"},
    {"deepseek-coder", "\n\nhello", "\u010a|\u010a|hello"},
    {"gpt-2", "a\u180ea", "a|\u00e1|\u0142|\u0130|a"}, // U+180E is no white space
};

START_TEST(pre_tokenizers_cut_words)
{
    small_bpe_write(&writer, words[_i].pre);
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    ck_assert_str_eq(tokenizer_pre(tokenizer), words[_i].pre);
    check_tokens(tokenizer, words[_i].text, 0, words[_i].tokens);
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(ill_formed_text_keeps_its_bytes)
{
    struct tokenizer *tokenizer = small_bpe();
    static const char *const texts[] = {"\xFF",         "hello\xC3",  "\xE4\xB8hello",
                                        "\xF0\x9F\x98", "a\x80\x80z", "\xED\xA0\x80"};
    for (size_t t = 0; t < sizeof(texts) / sizeof(texts[0]); t++) {
        struct token_list list = encode(tokenizer, texts[t], strlen(texts[t]), 0);
        char back[64];
        size_t at = 0;
        for (size_t i = 0; i < list.count; i++)
            at += (size_t)tokenizer_token_text(tokenizer, list.ids[i], false, back + at, sizeof(back) - at);
        ck_assert_uint_eq(at, strlen(texts[t]));
        ck_assert_mem_eq(back, texts[t], at);
        token_list_free(&list);
    }
    check_tokens(tokenizer, "\xC3", 0, "\u00c3");
    tokenizer_free(tokenizer);
}
END_TEST

// --- SentencePiece ---

START_TEST(spm_merges_by_score)
{
    struct tokenizer *tokenizer = small_spm();
    check_tokens(tokenizer, "", 0, "");
    check_tokens(tokenizer, "hello world", 0, "\u2581hello|\u2581world");
    check_tokens(tokenizer, " hello", 0, "\u2581|\u2581hello");
    check_tokens(tokenizer, "aaaaa", 0, "\u2581|aaaa|a");
    check_tokens(tokenizer, "\u4e16\u754c", 0, "\u2581|\u4e16\u754c");
    check_tokens(tokenizer, "x", 0, "\u2581|<0x78>");
    check_tokens(tokenizer, "\u00e9", 0, "\u2581|<0xC3>|<0xA9>");
    check_tokens(tokenizer, "\xE4\xB8", 0, "\u2581|<0xE4>|<0xB8>");
    check_tokens(tokenizer, "hello", ENCODE_ADD_SPECIAL, "<s>|\u2581hello");
    check_tokens(tokenizer, "", ENCODE_ADD_SPECIAL, "<s>");
    // A space goes in front of the text and behind each special token.
    check_tokens(tokenizer, "<s>hello</s>hello", ENCODE_SPECIAL, "<s>|\u2581hello|</s>|\u2581hello");
    check_tokens(tokenizer, "hello<tool>hello", 0, "\u2581hello|<tool>|\u2581hello");
    // The names of control and byte tokens are ordinary text.
    check_tokens(tokenizer, "<s>", 0, "\u2581|<0x3C>|<0x73>|<0x3E>");
    check_tokens(tokenizer, "<0x41>", ENCODE_SPECIAL, "\u2581|<0x3C>|<0x30>|<0x78>|<0x34>|<0x31>|<0x3E>");
    ck_assert_int_eq(tokenizer_bos(tokenizer), 1);
    ck_assert_int_eq(tokenizer_eos(tokenizer), 2);
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(spm_agrees_with_a_naive_model)
{
    small_spm_write(&writer);
    gguf_writer_bool(&writer, "tokenizer.ggml.add_space_prefix", false);
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    static const char *const characters[] = {"h", "e", "l", "l",      "o",      "w",
                                             "r", "d", "a", "\u4e16", "\u754c", " "};
    for (int round = 0; round < 3000; round++) {
        char text[128] = "", expected[512] = "";
        struct naive_part parts[24];
        size_t length = 1 + random_below(24);
        for (size_t i = 0; i < length; i++) {
            const char *character = characters[random_below(12)];
            strcat(text, character);
            strcpy(parts[i].text, *character == ' ' ? "\u2581" : character);
        }
        size_t count = naive_merge(parts, length, spm_rank);
        for (size_t i = 0; i < count; i++)
            snprintf(expected + strlen(expected), sizeof(expected) - strlen(expected), "%s%s", i ? "|" : "",
                     parts[i].text);
        check_tokens(tokenizer, text, 0, expected);
    }
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(spm_pieces_may_cross_spaces)
{
    static const char *const tokens[] = {"<unk>", "a", "b", "\u2581", "a\u2581", "a\u2581b", "\u2581b"};
    static const int32_t kinds[] = {2, 1, 1, 1, 1, 1, 1};
    static const float scores[] = {0, -9, -9, -9, -1, -2, -3};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 7);
    gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, 7, sizeof(kinds));
    gguf_writer_array(&writer, "tokenizer.ggml.scores", GGUF_F32, scores, 7, sizeof(scores));
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    check_tokens(tokenizer, "a b", 0, "\u2581|a\u2581b");
    check_tokens(tokenizer, "a  b", 0, "\u2581|a\u2581|\u2581b");
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(phi3_special_tokens_take_white_space_along)
{
    static const char *const tokens[] = {"<unk>", "<s>", "</s>", "<|user|>", "\u2581", "a", "<0x0A>"};
    static const int32_t kinds[] = {2, 3, 3, 3, 1, 1, 6};
    gguf_writer_string(&writer, "general.architecture", "phi3");
    gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 7);
    gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, 7, sizeof(kinds));
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    check_tokens(tokenizer, "<|user|>\n a", ENCODE_SPECIAL, "<|user|>|\u2581|a");
    check_tokens(tokenizer, "<s>\na", ENCODE_SPECIAL, "<s>|\u2581|<0x0A>|a");
    check_tokens(tokenizer, "<|user|>\n", ENCODE_SPECIAL, "<|user|>");
    tokenizer_free(tokenizer);
}
END_TEST

// --- threads ---

static void *encode_often(void *context)
{
    const struct tokenizer *tokenizer = context;
    static const char text[] = "hello <tool> the world 123 \u4e16\u754c\U0001F600 aaaa\n\n";
    size_t first = 0, failures = 0;
    for (int round = 0; round < 300; round++) {
        struct token_list list = {0};
        failures += tokenizer_encode(tokenizer, text, sizeof(text) - 1, 0, &list, NULL) != 0;
        first = first ? first : list.count;
        failures += list.count != first || first == 0;
        token_list_free(&list);
    }
    return (void *)failures;
}

START_TEST(threads_share_a_tokenizer)
{
    for (int spm = 0; spm < 2; spm++) {
        struct tokenizer *tokenizer = spm ? small_spm() : small_bpe();
        pthread_t threads[4];
        for (int i = 0; i < 4; i++)
            ck_assert_int_eq(pthread_create(&threads[i], NULL, encode_often, tokenizer), 0);
        for (int i = 0; i < 4; i++) {
            void *failures;
            pthread_join(threads[i], &failures);
            ck_assert_ptr_null(failures);
        }
        tokenizer_free(tokenizer);
    }
}
END_TEST

// --- metadata ---

START_TEST(end_tokens_are_found)
{
    static const char *const tokens[] = {"a", "</s>", "<|eot_id|>", "<|end_of_text|>",
                                         "<", "/s>",  "<eos>",      "b"};
    static const int32_t kinds[] = {1, 1, 3, 3, 1, 1, 4, 1};
    static const char *const merges[] = {"< /s>"};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
    gguf_writer_string(&writer, "tokenizer.ggml.pre", "gpt-2");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 8);
    gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, 8, sizeof(kinds));
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", merges, 1);
    gguf_writer_u32(&writer, "tokenizer.ggml.eos_token_id", 3);
    gguf_writer_u32(&writer, "tokenizer.ggml.eot_token_id", 7);
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    size_t count;
    const int32_t *ends = tokenizer_end_tokens(tokenizer, &count);
    static const int32_t expected[] = {2, 3, 6, 7}; // not 1: merges make it
    ck_assert_uint_eq(count, 4);
    ck_assert_mem_eq(ends, expected, sizeof(expected));
    const char *bytes;
    size_t length;
    ck_assert_int_eq(tokenizer_token(tokenizer, 6, &bytes, &length), TOKEN_CONTROL);
    ck_assert_int_eq(tokenizer_token(tokenizer, 1, &bytes, &length), TOKEN_NORMAL);
    ck_assert_int_eq(tokenizer_token(tokenizer, 8, &bytes, &length), 0);
    ck_assert_int_eq(tokenizer_token(tokenizer, -1, &bytes, &length), 0);
    ck_assert_int_eq(tokenizer_bos(tokenizer), -1);
    tokenizer_free(tokenizer);
}
END_TEST

START_TEST(a_model_without_vocabulary_knows_ids_only)
{
    gguf_writer_string(&writer, "general.architecture", "llama");
    gguf_writer_string(&writer, "tokenizer.ggml.model", "none");
    gguf_writer_u32(&writer, "llama.vocab_size", 300);
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    ck_assert(!tokenizer_has_text(tokenizer));
    ck_assert_uint_eq(tokenizer_size(tokenizer), 300);
    ck_assert_str_eq(tokenizer_model(tokenizer), "none");
    struct token_list list = {0};
    ck_assert_int_eq(tokenizer_encode(tokenizer, "a", 1, 0, &list, &error), STATUS_UNSUPPORTED);
    struct token_decoder decoder;
    token_decoder_init(&decoder, tokenizer, false, false);
    char out[16];
    ck_assert_int_eq(token_decoder_push(&decoder, 1, out, sizeof(out)), STATUS_UNSUPPORTED);
    ck_assert_int_eq(tokenizer_token_text(tokenizer, 1, false, out, sizeof(out)), STATUS_UNSUPPORTED);
    const char *bytes;
    size_t length;
    ck_assert_int_eq(tokenizer_token(tokenizer, 299, &bytes, &length), TOKEN_NORMAL);
    tokenizer_free(tokenizer);
}
END_TEST

static void refused(int status, const char *part)
{
    size_t length;
    unsigned char *bytes = gguf_writer_finish(&writer, &length);
    struct gguf *gguf;
    struct tokenizer *tokenizer = (void *)1;
    ck_assert_int_eq(gguf_open_memory(&gguf, bytes, length, &error), 0);
    ck_assert_int_eq(tokenizer_new(&tokenizer, gguf, &error), status);
    ck_assert_ptr_eq(tokenizer, (void *)1);
    ck_assert_msg(strstr(error.text, part) != NULL, "'%s' is not in '%s'", part, error.text);
    gguf_close(gguf);
    free(bytes);
}

static void start(const char *model, const char *pre)
{
    static const char *const tokens[] = {"a", "b", "ab"};
    gguf_writer_string(&writer, "tokenizer.ggml.model", model);
    gguf_writer_string(&writer, "tokenizer.ggml.pre", pre);
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 3);
}

START_TEST(bad_metadata_is_refused)
{
    static const char *const merges[] = {"a b"};
    static const int32_t kinds[] = {1, 1, 9}, bytes[] = {1, 1, 6};
    static const float scores[] = {0, 0, __builtin_nanf("")};
    uint32_t number = 7;

    start("wordpiece", "");
    refused(STATUS_UNSUPPORTED, "\"wordpiece\"");
    start("gpt2", "klingon");
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", merges, 1);
    refused(STATUS_UNSUPPORTED, "\"klingon\"");
    start("gpt2", "gpt-2");
    refused(STATUS_CORRUPT, "tokenizer.ggml.merges");
    start("gpt2", "gpt-2");
    gguf_writer_u32(&writer, "tokenizer.ggml.merges", number);
    refused(STATUS_CORRUPT, "not an array of strings");
    gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
    refused(STATUS_CORRUPT, "no tokenizer.ggml.tokens");
    gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", merges, 0);
    refused(STATUS_CORRUPT, "empty");
    gguf_writer_u32(&writer, "tokenizer.ggml.model", number);
    refused(STATUS_CORRUPT, "tokenizer.ggml.model");

    start("llama", "");
    gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, 2, 8);
    refused(STATUS_CORRUPT, "2 entries for 3 tokens");
    start("llama", "");
    gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, 3, 12);
    refused(STATUS_CORRUPT, "token 2 is 9");
    start("llama", "");
    gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, bytes, 3, 12);
    refused(STATUS_CORRUPT, "<0xHH>");
    start("llama", "");
    gguf_writer_strings(&writer, "tokenizer.ggml.token_type", merges, 1);
    refused(STATUS_CORRUPT, "not an array of numbers");
    start("llama", "");
    gguf_writer_array(&writer, "tokenizer.ggml.scores", GGUF_F32, scores, 3, 12);
    refused(STATUS_CORRUPT, "token 2 has no number");
    start("llama", "");
    gguf_writer_array(&writer, "tokenizer.ggml.scores", GGUF_F32, scores, 1, 4);
    refused(STATUS_CORRUPT, "1 entries for 3 tokens");
    start("llama", "");
    gguf_writer_u32(&writer, "tokenizer.ggml.bos_token_id", 3);
    refused(STATUS_CORRUPT, "bos_token_id is 3");
    start("llama", "");
    gguf_writer_u32(&writer, "tokenizer.ggml.eot_token_id", 3);
    refused(STATUS_CORRUPT, "eot_token_id is 3");
    start("llama", "");
    gguf_writer_string(&writer, "tokenizer.ggml.add_bos_token", "yes");
    refused(STATUS_CORRUPT, "add_bos_token");
    gguf_writer_string(&writer, "general.architecture", "llama");
    gguf_writer_u32(&writer, "llama.vocab_size", MAX_VOCABULARY + 1);
    refused(STATUS_CORRUPT, "1048577");
}
END_TEST

START_TEST(a_token_too_long_is_refused)
{
    char *text = calloc(1, MAX_TOKEN_BYTES + 2);
    memset(text, 'a', MAX_TOKEN_BYTES + 1);
    const char *tokens[] = {text};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 1);
    refused(STATUS_CORRUPT, "65537 bytes");
    free(text);
}
END_TEST

START_TEST(too_many_tokens_are_refused)
{
    const char **tokens = malloc((MAX_VOCABULARY + 1) * sizeof(*tokens));
    for (size_t i = 0; i <= MAX_VOCABULARY; i++)
        tokens[i] = "";
    gguf_writer_string(&writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, MAX_VOCABULARY + 1);
    refused(STATUS_CORRUPT, "1048577 entries");
    free(tokens);
}
END_TEST

// Empty tokens, doubled tokens, merges of nothing or of foreign text: odd, but no reason to refuse a model.
START_TEST(odd_vocabularies_are_taken)
{
    static const char *const tokens[] = {"a", "", "a", "b", "\xFF", "ab"};
    static const char *const merges[] = {"a b", "a b", "ab",     "",         " ",
                                         "a ",  " b",  "\xFF a", "\u4e16 a", "q r"};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 6);
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", merges, 10);
    gguf_writer_u32(&writer, "tokenizer.ggml.unknown_token_id", 1);
    gguf_writer_u32(&writer, "tokenizer.ggml.bos_token_id", UINT32_MAX); // none
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    ck_assert_str_eq(tokenizer_pre(tokenizer), "default");
    check_tokens(tokenizer, "aab", 0, "a|ab");
    check_tokens(tokenizer, "c", 0, ""); // the unknown token
    struct token_list list = encode(tokenizer, "ac", 2, 0);
    ck_assert_uint_eq(list.count, 2);
    ck_assert_int_eq(list.ids[0], 0);
    ck_assert_int_eq(list.ids[1], 1);
    token_list_free(&list);
    tokenizer_free(tokenizer);
}
END_TEST

// Some models name their end token as the unknown one: a byte without a token must not end a text.
START_TEST(an_unknown_byte_never_becomes_a_control_token)
{
    static const char *const tokens[] = {"a", "<|endoftext|>"};
    static const int32_t kinds[] = {1, 3};
    gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
    gguf_writer_string(&writer, "tokenizer.ggml.pre", "smollm");
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, 2);
    gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, 2, sizeof(kinds));
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", tokens, 1);
    gguf_writer_u32(&writer, "tokenizer.ggml.unknown_token_id", 1);
    struct tokenizer *tokenizer = tokenizer_from(&writer);
    check_tokens(tokenizer, "aba", 0, "a|a");
    tokenizer_free(tokenizer);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("tokenizer");
    TCase *tests = tcase_create("small vocabularies");
    tcase_add_checked_fixture(tests, set_up, NULL);
    tcase_set_timeout(tests, 30);
    tcase_add_test(tests, bpe_merges_by_rank);
    tcase_add_test(tests, a_merge_without_a_token_falls_apart);
    tcase_add_test(tests, bpe_agrees_with_a_naive_model);
    tcase_add_test(tests, special_tokens_cut_the_text);
    tcase_add_test(tests, bos_and_eos_are_added_where_the_model_asks);
    tcase_add_test(tests, llama3_takes_whole_words_first);
    tcase_add_loop_test(tests, pre_tokenizers_cut_words, 0, (int)(sizeof(words) / sizeof(words[0])));
    tcase_add_test(tests, ill_formed_text_keeps_its_bytes);
    tcase_add_test(tests, spm_merges_by_score);
    tcase_add_test(tests, spm_agrees_with_a_naive_model);
    tcase_add_test(tests, spm_pieces_may_cross_spaces);
    tcase_add_test(tests, phi3_special_tokens_take_white_space_along);
    tcase_add_test(tests, threads_share_a_tokenizer);
    tcase_add_test(tests, end_tokens_are_found);
    tcase_add_test(tests, a_model_without_vocabulary_knows_ids_only);
    tcase_add_test(tests, bad_metadata_is_refused);
    tcase_add_test(tests, a_token_too_long_is_refused);
    tcase_add_test(tests, too_many_tokens_are_refused);
    tcase_add_test(tests, odd_vocabularies_are_taken);
    tcase_add_test(tests, an_unknown_byte_never_becomes_a_control_token);
    suite_add_tcase(suite, tests);
    return suite;
}
