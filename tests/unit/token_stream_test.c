// Text and ids on their way to a client: what is held back and why, where stop strings cut, and that every id
// leaves once, in order, with its text. In the small vocabulary the ids below 256 are single bytes.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/limits.h"
#include "common/utf8.h"
#include "coordinator/token_stream.h"
#include "tests/suite.h"
#include "tests/vocabulary.h"

static struct tokenizer *tokenizer;

static void set_up(void)
{
    struct gguf_writer writer = {0};
    small_bpe_write(&writer, "gpt-2");
    tokenizer = tokenizer_from(&writer);
}

static void tear_down(void)
{
    tokenizer_free(tokenizer);
}

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

static struct token_stream *stream_with(uint32_t min_tokens, uint32_t n_stops, const char *const *stops)
{
    struct token_stream_options options = {
        .tokenizer = tokenizer, .stops = stops, .n_stops = n_stops, .min_tokens = min_tokens};
    struct token_stream *stream;
    ck_assert_int_eq(token_stream_new(&stream, &options), 0);
    return stream;
}

// The next delta must be this text with this many ids.
static void takes(struct token_stream *stream, const char *text, uint32_t n_ids)
{
    struct token_delta delta;
    ck_assert(token_stream_take(stream, &delta));
    ck_assert_msg(delta.text_bytes == strlen(text) && memcmp(delta.text, text, delta.text_bytes) == 0,
                  "'%.*s' instead of '%s'", (int)delta.text_bytes, delta.text, text);
    ck_assert_uint_eq(delta.n_ids, n_ids);
}

static void takes_nothing(struct token_stream *stream)
{
    struct token_delta delta;
    ck_assert(!token_stream_take(stream, &delta));
    ck_assert_uint_eq(delta.n_ids, 0);
    ck_assert_uint_eq(delta.text_bytes, 0);
}

START_TEST(text_flows_without_stops)
{
    struct token_stream *stream = stream_with(0, 0, NULL);
    uint32_t dropped;
    takes_nothing(stream);
    ck_assert_int_eq(token_stream_push(stream, id_of("hello")), 0);
    takes(stream, "hello", 1);
    takes_nothing(stream);
    ck_assert_int_eq(token_stream_push(stream, id_of("\u0120world")), 0);
    ck_assert_int_eq(token_stream_push(stream, '!'), 0);
    takes(stream, " world!", 2);
    ck_assert_int_eq(token_stream_push(stream, id_of("<|start|>")), 0); // no text, but an id
    takes(stream, "", 1);
    token_stream_finish(stream);
    takes_nothing(stream);
    ck_assert_ptr_null(token_stream_matched(stream, &dropped));
    ck_assert_uint_eq(dropped, 0);
    token_stream_free(stream);
}
END_TEST

START_TEST(ids_wait_for_their_character)
{
    struct token_stream *stream = stream_with(0, 0, NULL);
    token_stream_push(stream, id_of("\u00f0\u0141\u013a"));
    takes_nothing(stream);
    token_stream_push(stream, id_of("<|start|>")); // has no text of its own, but must not overtake
    takes_nothing(stream);
    token_stream_push(stream, 0x80);
    takes(stream, "\U0001F600", 3);
    token_stream_push(stream, 'a');
    token_stream_push(stream, 0xE2);
    takes(stream, "a", 1);
    token_stream_finish(stream);
    takes(stream, "\uFFFD", 1);
    token_stream_free(stream);
}
END_TEST

START_TEST(special_tokens_show_on_request)
{
    struct token_stream_options options = {.tokenizer = tokenizer, .special = true};
    struct token_stream *stream;
    ck_assert_int_eq(token_stream_new(&stream, &options), 0);
    token_stream_push(stream, id_of("<|start|>"));
    takes(stream, "<|start|>", 1);
    token_stream_free(stream);
}
END_TEST

START_TEST(a_possible_stop_is_held_back)
{
    struct token_stream *stream = stream_with(0, 1, (const char *[]){"END"});
    token_stream_push(stream, 'a');
    takes(stream, "a", 1);
    token_stream_push(stream, 'E');
    takes_nothing(stream);
    token_stream_push(stream, 'N');
    takes_nothing(stream);
    token_stream_push(stream, 'E'); // "EN" is free now, the second E is not
    takes(stream, "EN", 2);
    token_stream_push(stream, 'N');
    ck_assert_int_eq(token_stream_push(stream, 'D'), 1);
    takes_nothing(stream);
    uint32_t dropped;
    ck_assert_str_eq(token_stream_matched(stream, &dropped), "END");
    ck_assert_uint_eq(dropped, 3);
    ck_assert_int_eq(token_stream_push(stream, 'x'), STATUS_INVALID);
    token_stream_finish(stream);
    takes_nothing(stream);
    token_stream_free(stream);
}
END_TEST

START_TEST(what_was_held_leaves_at_the_end)
{
    struct token_stream *stream = stream_with(0, 1, (const char *[]){"END"});
    token_stream_push(stream, 'E');
    token_stream_push(stream, 'N');
    token_stream_push(stream, 0xC3);
    takes_nothing(stream);
    token_stream_finish(stream);
    takes(stream, "EN\uFFFD", 3);
    takes_nothing(stream);
    token_stream_free(stream);
}
END_TEST

// The stop begins inside "hello": that id is released with the part of its text before it.
START_TEST(an_id_that_straddles_the_cut_is_released)
{
    struct token_stream *stream = stream_with(0, 1, (const char *[]){"lo w"});
    uint32_t dropped;
    token_stream_push(stream, id_of("hello"));
    takes_nothing(stream); // "lo" may begin the stop, and text and id leave together
    ck_assert_int_eq(token_stream_push(stream, id_of("\u0120world")), 1);
    takes(stream, "hel", 1);
    token_stream_matched(stream, &dropped);
    ck_assert_uint_eq(dropped, 1); // " world" reaches behind the stop: all of its text is cut
    token_stream_free(stream);

    stream = stream_with(0, 1, (const char *[]){"ell"});
    ck_assert_int_eq(token_stream_push(stream, id_of("hello")), 1);
    takes(stream, "h", 1);
    token_stream_matched(stream, &dropped);
    ck_assert_uint_eq(dropped, 0);
    token_stream_free(stream);
}
END_TEST

START_TEST(ids_without_text_stay_on_their_side_of_the_cut)
{
    struct token_stream *stream = stream_with(0, 1, (const char *[]){"ab"});
    uint32_t dropped;
    token_stream_push(stream, 'x');
    token_stream_push(stream, id_of("<|start|>"));
    token_stream_push(stream, 'a');
    token_stream_push(stream, id_of("<|start|>"));
    ck_assert_int_eq(token_stream_push(stream, 'b'), 1);
    takes(stream, "x", 2);
    token_stream_matched(stream, &dropped);
    ck_assert_uint_eq(dropped, 3);
    token_stream_free(stream);
}
END_TEST

// A character of the stop may be spread over ids; so may the one before it.
START_TEST(a_cut_between_characters_in_pieces)
{
    uint32_t dropped;
    struct token_stream *stream = stream_with(0, 1, (const char *[]){"\u20ac"});
    token_stream_push(stream, 0xE2);
    token_stream_push(stream, 0x82);
    ck_assert_int_eq(token_stream_push(stream, 0xAC), 1);
    takes_nothing(stream);
    token_stream_matched(stream, &dropped);
    ck_assert_uint_eq(dropped, 3);
    token_stream_free(stream);

    stream = stream_with(0, 1, (const char *[]){"!"});
    token_stream_push(stream, 0xC3);
    token_stream_push(stream, 0xA9);
    ck_assert_int_eq(token_stream_push(stream, '!'), 1);
    takes(stream, "\u00e9", 2);
    token_stream_free(stream);
}
END_TEST

START_TEST(the_first_to_complete_wins)
{
    uint32_t dropped;
    struct token_stream *stream = stream_with(0, 3, (const char *[]){"hello", "ell", "l"});
    ck_assert_int_eq(token_stream_push(stream, id_of("hello")), 1);
    ck_assert_str_eq(token_stream_matched(stream, &dropped), "l");
    takes(stream, "he", 1);
    token_stream_free(stream);
    stream = stream_with(0, 3, (const char *[]){"l", "hel", "el"}); // all complete together: the longest
    ck_assert_int_eq(token_stream_push(stream, id_of("hello")), 1);
    ck_assert_str_eq(token_stream_matched(stream, &dropped), "hel");
    takes_nothing(stream);
    ck_assert_uint_eq(dropped, 1);
    token_stream_free(stream);
}
END_TEST

START_TEST(early_stops_do_not_count)
{
    struct token_stream *stream = stream_with(4, 1, (const char *[]){"aba"});
    uint32_t dropped;
    ck_assert_int_eq(token_stream_push(stream, 'a'), 0);
    ck_assert_int_eq(token_stream_push(stream, 'b'), 0);
    ck_assert_int_eq(token_stream_push(stream, 'a'), 0); // complete, but too early
    takes(stream, "ab", 2);
    ck_assert_int_eq(token_stream_push(stream, 'b'), 0);
    ck_assert_int_eq(token_stream_push(stream, 'a'), 1); // begun early, complete late
    takes_nothing(stream);
    token_stream_matched(stream, &dropped);
    ck_assert_uint_eq(dropped, 3);
    token_stream_free(stream);
}
END_TEST

START_TEST(bad_options_are_refused)
{
    struct token_stream *stream = (void *)1;
    char longest[MAX_STOP_BYTES + 2];
    memset(longest, 'a', sizeof(longest));
    longest[MAX_STOP_BYTES + 1] = '\0';
    const char *const bad[] = {"", longest, "\xC3",
                               "\x80"
                               "a"};
    for (int i = 0; i < 4; i++) {
        struct token_stream_options options = {.tokenizer = tokenizer, .stops = &bad[i], .n_stops = 1};
        ck_assert_int_eq(token_stream_new(&stream, &options), STATUS_INVALID);
    }
    const char *many[MAX_STOP_STRINGS + 1];
    for (int i = 0; i <= MAX_STOP_STRINGS; i++)
        many[i] = "x";
    struct token_stream_options options = {
        .tokenizer = tokenizer, .stops = many, .n_stops = MAX_STOP_STRINGS + 1};
    ck_assert_int_eq(token_stream_new(&stream, &options), STATUS_INVALID);
    options.tokenizer = NULL;
    options.n_stops = 1;
    ck_assert_int_eq(token_stream_new(&stream, &options), STATUS_UNSUPPORTED);
    ck_assert_ptr_eq(stream, (void *)1);
    token_stream_free(NULL);

    longest[MAX_STOP_BYTES] = '\0';
    stream = stream_with(0, 1, (const char *[]){longest});
    ck_assert_int_eq(token_stream_push(stream, (int32_t)tokenizer_size(tokenizer)), STATUS_INVALID);
    ck_assert_int_eq(token_stream_push(stream, -1), STATUS_INVALID);
    for (int i = 0; i < MAX_STOP_BYTES - 1; i++)
        ck_assert_int_eq(token_stream_push(stream, 'a'), 0);
    takes_nothing(stream);
    ck_assert_int_eq(token_stream_push(stream, 'a'), 1);
    token_stream_free(stream);
}
END_TEST

START_TEST(without_a_vocabulary_ids_pass)
{
    struct token_stream_options options = {0};
    struct token_stream *stream;
    ck_assert_int_eq(token_stream_new(&stream, &options), 0);
    for (int32_t id = 0; id < 100; id++)
        ck_assert_int_eq(token_stream_push(stream, id * 1000), 0);
    takes(stream, "", 100);
    token_stream_finish(stream);
    takes_nothing(stream);
    token_stream_free(stream);
}
END_TEST

// --- against a naive model ---

static uint64_t seed;

static uint32_t random_below(uint32_t bound)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((seed >> 33) * bound >> 31);
}

enum { MOST_IDS = 60, MOST_TEXT = 4096 };

// The choice as the model sees it, whole: all text, and after how many bytes each id's push left it.
struct choice {
    int32_t ids[MOST_IDS];
    size_t count;
    char text[MOST_TEXT];
    size_t after[MOST_IDS]; // text decoded when this id had been pushed
    bool open[MOST_IDS];    // its last character is unfinished
    size_t length;          // finished
};

static void choice_make(struct choice *choice)
{
    static const char *const pieces[] = {"aa",           "aaaa",         "he",        "hello",
                                         "\u00c3\u00a9", "\u00f0\u0141", "<|start|>", "<tool>"};
    struct token_decoder decoder;
    token_decoder_init(&decoder, tokenizer, false, false);
    choice->count = random_below(MOST_IDS);
    choice->length = 0;
    for (size_t i = 0; i < choice->count; i++) {
        choice->ids[i] = random_below(3) ? (int32_t) "abaab\xC3\xA9\xF0\x9F"[random_below(9)] & 0xFF
                                         : id_of(pieces[random_below(8)]);
        choice->length += (size_t)token_decoder_push(&decoder, choice->ids[i], choice->text + choice->length,
                                                     MOST_TEXT - choice->length);
        choice->after[i] = choice->length;
        choice->open[i] = decoder.n_held > 0;
    }
    choice->length +=
        (size_t)token_decoder_finish(&decoder, choice->text + choice->length, MOST_TEXT - choice->length);
}

static bool ends_with(const char *text, size_t length, const char *stop, size_t stop_length)
{
    return stop_length <= length && memcmp(text + length - stop_length, stop, stop_length) == 0;
}

// The stop that completes first in what the first `pushes` ids gave: its end, 0 when none.
static size_t naive_match(const struct choice *choice, size_t pushes, uint32_t min_tokens,
                          const char *const *stops, uint32_t n_stops, size_t *start)
{
    size_t id = 0;
    for (size_t end = 1; pushes && end <= choice->after[pushes - 1]; end++) {
        while (choice->after[id] < end)
            id++;
        size_t longest = 0;
        for (uint32_t s = 0; s < n_stops; s++) {
            size_t length = strlen(stops[s]);
            if (id + 1 >= min_tokens && length > longest && ends_with(choice->text, end, stops[s], length))
                longest = length;
        }
        *start = end - longest;
        if (longest)
            return end;
    }
    return 0;
}

// How much text may be out after `pushes` ids: up to the last whole id that no stop string can reach.
static size_t naive_free(const struct choice *choice, size_t pushes, const char *const *stops,
                         uint32_t n_stops, size_t *n_ids)
{
    size_t total = pushes ? choice->after[pushes - 1] : 0, held = 0;
    for (uint32_t s = 0; s < n_stops; s++) {
        for (size_t length = 1; length < strlen(stops[s]); length++) {
            if (ends_with(choice->text, total, stops[s], length) && held < length)
                held = length;
        }
    }
    *n_ids = 0;
    for (size_t i = 0; i < pushes; i++) {
        if (!choice->open[i] && choice->after[i] + held <= total)
            *n_ids = i + 1;
    }
    return *n_ids ? choice->after[*n_ids - 1] : 0;
}

// How many of the first `pushes` ids began before `start`, or ended there without a character of their own.
static size_t naive_kept(const struct choice *choice, size_t pushes, size_t start)
{
    size_t kept = 0;
    for (; kept < pushes; kept++) {
        size_t begin = kept ? choice->after[kept - 1] : 0, end = choice->after[kept], taken;
        if (choice->open[kept]) {
            utf8_scan(choice->text + end, choice->length - end, &taken);
            end += taken;
        }
        if (begin >= start && end > start)
            break;
    }
    return kept;
}

struct received {
    char text[MOST_TEXT];
    size_t length, count;
};

static void receive(struct token_stream *stream, const struct choice *choice, struct received *received)
{
    struct token_delta delta;
    if (!token_stream_take(stream, &delta))
        return;
    memcpy(received->text + received->length, delta.text, delta.text_bytes);
    received->length += delta.text_bytes;
    ck_assert_uint_le(received->count + delta.n_ids, choice->count);
    ck_assert_mem_eq(delta.ids, choice->ids + received->count, delta.n_ids * sizeof(int32_t));
    received->count += delta.n_ids;
}

static void run_choice(const struct choice *choice, uint32_t min_tokens, const char *const *stops,
                       uint32_t n_stops)
{
    struct token_stream *stream = stream_with(min_tokens, n_stops, stops);
    struct received received = {0};
    size_t start = 0, free_ids, i = 0;
    bool stopped = false;
    for (; i < choice->count && !stopped; i++) {
        int result = token_stream_push(stream, choice->ids[i]);
        size_t end = naive_match(choice, i + 1, min_tokens, stops, n_stops, &start);
        ck_assert_int_eq(result, end > 0);
        stopped = result;
        if (random_below(3)) { // a reader that sometimes sleeps
            receive(stream, choice, &received);
            if (!stopped) {
                ck_assert_uint_eq(received.length, naive_free(choice, i + 1, stops, n_stops, &free_ids));
                ck_assert_uint_eq(received.count, free_ids);
            }
        }
    }
    token_stream_finish(stream);
    receive(stream, choice, &received);
    takes_nothing(stream);
    uint32_t dropped;
    ck_assert_int_eq(token_stream_matched(stream, &dropped) != NULL, stopped);
    size_t length = stopped ? start : choice->length;
    ck_assert_uint_eq(received.length, length);
    ck_assert_mem_eq(received.text, choice->text, length);
    ck_assert_uint_eq(received.count + dropped, i);
    ck_assert_uint_eq(received.count, stopped ? naive_kept(choice, i, start) : i);
    token_stream_free(stream);
}

START_TEST(random_choices_agree_with_a_naive_model)
{
    static const char *const some[] = {"a",    "aa",     "ab",     "aba",     "abaab",        "aab",
                                       "b",    "helloa", "\u00e9", "a\u00e9", "\u00e9\uFFFD", "<tool>a",
                                       "lo<t", "\uFFFD"};
    static struct choice choice;
    seed = 1 + (uint64_t)_i * 7919;
    for (int round = 0; round < 2000; round++) {
        const char *stops[3];
        uint32_t n_stops = random_below(4);
        for (uint32_t s = 0; s < n_stops; s++)
            stops[s] = some[1 + random_below(sizeof(some) / sizeof(some[0]) - 1)];
        choice_make(&choice);
        run_choice(&choice, random_below(4) ? 0 : random_below(20), stops, n_stops);
    }
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("token stream");
    TCase *tests = tcase_create("token stream");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, text_flows_without_stops);
    tcase_add_test(tests, ids_wait_for_their_character);
    tcase_add_test(tests, special_tokens_show_on_request);
    tcase_add_test(tests, a_possible_stop_is_held_back);
    tcase_add_test(tests, what_was_held_leaves_at_the_end);
    tcase_add_test(tests, an_id_that_straddles_the_cut_is_released);
    tcase_add_test(tests, ids_without_text_stay_on_their_side_of_the_cut);
    tcase_add_test(tests, a_cut_between_characters_in_pieces);
    tcase_add_test(tests, the_first_to_complete_wins);
    tcase_add_test(tests, early_stops_do_not_count);
    tcase_add_test(tests, bad_options_are_refused);
    tcase_add_test(tests, without_a_vocabulary_ids_pass);
    tcase_add_loop_test(tests, random_choices_agree_with_a_naive_model, 0, 5);
    suite_add_tcase(suite, tests);
    return suite;
}
