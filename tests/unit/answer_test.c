// An answer on its way out: the scheduler's events become responses, with their logprobs, scores, stops,
// usage, and the credit that each token gives back.
#include <stdlib.h>
#include <string.h>

#include "coordinator/coordinator_internal.h"
#include "tests/suite.h"
#include "tests/vocabulary.h"

enum { MAX_SENT = 64 };

struct sent {
    uint32_t choice, n_ids, n_logprobs, n_scores, n_prompt_ids, tokens, completion_tokens, n_top;
    int32_t ids[32];
    int32_t top_token;
    float logprobs[32];
    char text[64], logprob_text[64], stop[16];
    enum wire_finish finish;
    bool matched_stop, matched_id, unscored, has_usage;
    int32_t stop_id;
    uint64_t seed;
    double queue_ms, ttft_ms, total_ms, tokens_per_second;
};

static struct tokenizer *tokenizer;
static struct request *spec;
static struct answer *answer;
static struct sent sent[MAX_SENT];
static uint32_t n_sent;
static int verdict; // of the next sends

static int record(void *to, const struct wire_generate_response *response, uint32_t tokens)
{
    ck_assert_uint_lt(n_sent, MAX_SENT);
    struct sent *at = &sent[n_sent++];
    memset(at, 0, sizeof(*at));
    at->choice = response->choice;
    at->tokens = tokens;
    at->n_ids = response->n_token_ids;
    for (uint32_t i = 0; i < response->n_token_ids && i < 32; i++)
        at->ids[i] = response->token_ids[i];
    if (response->text.length)
        memcpy(at->text, response->text.data, response->text.length);
    at->n_logprobs = response->n_logprobs;
    for (uint32_t i = 0; i < response->n_logprobs && i < 32; i++)
        at->logprobs[i] = response->logprobs[i].logprob;
    if (response->n_logprobs) {
        memcpy(at->logprob_text, response->logprobs[0].text.data, response->logprobs[0].text.length);
        at->n_top = response->logprobs[0].n_top;
        at->top_token = at->n_top ? response->logprobs[0].top[0].token : -1;
    }
    at->n_scores = response->n_prompt_logprobs;
    at->unscored = response->n_prompt_logprobs && response->prompt_logprobs[0].unscored;
    at->n_prompt_ids = response->n_prompt_token_ids;
    at->finish = response->finish;
    at->matched_stop = response->matched_stop;
    at->matched_id = response->matched_id;
    at->stop_id = response->stop_id;
    if (response->stop.length)
        memcpy(at->stop, response->stop.data, response->stop.length);
    at->has_usage = response->has_usage;
    at->completion_tokens = response->completion_tokens;
    at->seed = response->seed;
    at->queue_ms = response->queue_ms;
    at->ttft_ms = response->ttft_ms;
    at->total_ms = response->total_ms;
    at->tokens_per_second = response->tokens_per_second;
    return verdict;
}

static void open_answer(const char *const *stops, uint32_t n_stops)
{
    const struct answer_options options = {
        .spec = spec, .tokenizer = tokenizer, .stops = stops, .n_stops = n_stops, .send = record};
    ck_assert_int_eq(answer_new(&answer, &options), 0);
}

static void setup(void)
{
    struct gguf_writer writer = {0};
    small_bpe_write(&writer, "gpt-2");
    tokenizer = tokenizer_from(&writer);
    spec = request_new();
    spec->prompt = malloc(8 * sizeof(int32_t));
    for (int i = 0; i < 8; i++)
        spec->prompt[i] = 'a' + i;
    spec->n_prompt = 8;
    spec->arrived_us = 1000000;
    spec->sampling.seed = 99;
    answer = NULL;
    n_sent = 0;
    verdict = STATUS_OK;
}

static void teardown(void)
{
    answer_free(answer);
    request_free(spec);
    tokenizer_free(tokenizer);
}

static struct answer_reply push_at(uint32_t choice, int32_t token, int64_t now_us)
{
    const struct token_logprob tops[] = {{token + 1, -0.25f}, {token, -0.5f}};
    const struct scheduler_event event = {.kind = SCHEDULER_TOKEN,
                                          .spec = spec,
                                          .choice = choice,
                                          .token = token,
                                          .logprob = -0.5f - (float)token,
                                          .tops = tops,
                                          .n_tops = spec->top_logprobs};
    struct answer_reply reply;
    ck_assert_int_eq(answer_take(answer, &event, now_us, &reply), 0);
    return reply;
}

static struct answer_reply push(int32_t token)
{
    return push_at(0, token, 2000000);
}

static struct sent *end(uint32_t choice, enum finish_reason finish, int32_t matched_id, int64_t now_us)
{
    const struct scheduler_event event = {.kind = SCHEDULER_CHOICE_END,
                                          .spec = spec,
                                          .choice = choice,
                                          .finish = finish,
                                          .matched_id = matched_id,
                                          .started_us = 1500000};
    struct answer_reply reply;
    ck_assert_int_eq(answer_take(answer, &event, now_us, &reply), 0);
    return &sent[n_sent - 1];
}

START_TEST(a_token_is_a_response)
{
    open_answer(NULL, 0);
    struct answer_reply reply = push('x');
    ck_assert_uint_eq(reply.credit, 0); // it comes back when the response went out
    ck_assert(!reply.stop);
    ck_assert_uint_eq(n_sent, 1);
    ck_assert_str_eq(sent[0].text, "x");
    ck_assert_uint_eq(sent[0].n_ids, 1);
    ck_assert_uint_eq(sent[0].tokens, 1);
    ck_assert_uint_eq(sent[0].n_logprobs, 0);
    ck_assert_int_eq(sent[0].finish, WIRE_FINISH_NONE);
    ck_assert_uint_eq(answer_tokens(answer), 1);
}
END_TEST

START_TEST(an_unfinished_character_waits_and_frees_its_credit)
{
    open_answer(NULL, 0);
    ck_assert_uint_eq(push(0xE2).credit, 1);
    ck_assert_uint_eq(push(0x82).credit, 1);
    ck_assert_uint_eq(n_sent, 0);
    ck_assert_uint_eq(push(0xAC).credit, 0);
    ck_assert_uint_eq(n_sent, 1);
    ck_assert_str_eq(sent[0].text, "\u20AC");
    ck_assert_uint_eq(sent[0].n_ids, 3);
    ck_assert_uint_eq(sent[0].tokens, 1);
}
END_TEST

START_TEST(logprobs_travel_with_their_ids)
{
    spec->logprobs = true;
    spec->top_logprobs = 2;
    open_answer(NULL, 0);
    push(0xC3);
    push(0xA9);
    push('z');
    ck_assert_uint_eq(n_sent, 2);
    ck_assert_uint_eq(sent[0].n_logprobs, 2);
    ck_assert_float_eq(sent[0].logprobs[0], -0.5f - 0xC3);
    ck_assert_float_eq(sent[0].logprobs[1], -0.5f - 0xA9);
    ck_assert_str_eq(sent[0].logprob_text, "\xC3"); // its bytes, not a whole character
    ck_assert_uint_eq(sent[0].n_top, 2);
    ck_assert_int_eq(sent[0].top_token, 0xC4);
    ck_assert_uint_eq(sent[1].n_logprobs, 1);
    ck_assert_float_eq(sent[1].logprobs[0], -0.5f - 'z');
}
END_TEST

START_TEST(a_stop_string_ends_the_choice)
{
    const char *const stops[] = {"END"};
    open_answer(stops, 1);
    push('a');
    ck_assert_uint_eq(push('E').credit, 1);
    ck_assert_uint_eq(push('N').credit, 1);
    struct answer_reply reply = push('D');
    ck_assert(reply.stop);
    ck_assert_uint_eq(reply.credit, 1);
    ck_assert_uint_eq(push('q').credit, 1); // one that was on its way: dropped
    struct sent *last = end(0, FINISH_STOP, -1, 3000000);
    ck_assert_uint_eq(n_sent, 2);
    ck_assert_int_eq(last->finish, WIRE_FINISH_STOP);
    ck_assert(last->matched_stop);
    ck_assert_str_eq(last->stop, "END");
    ck_assert_str_eq(last->text, "");
    ck_assert_uint_eq(last->n_ids, 0);
    ck_assert_uint_eq(last->completion_tokens, 1);
}
END_TEST

START_TEST(what_was_held_comes_with_the_end)
{
    const char *const stops[] = {"END"};
    open_answer(stops, 1);
    push('E');
    push('N');
    struct sent *last = end(0, FINISH_LENGTH, -1, 3000000);
    ck_assert_uint_eq(n_sent, 1);
    ck_assert_str_eq(last->text, "EN");
    ck_assert_uint_eq(last->n_ids, 2);
    ck_assert_int_eq(last->finish, WIRE_FINISH_LENGTH);
    ck_assert_uint_eq(last->completion_tokens, 2);
    ck_assert(!last->matched_stop && !last->matched_id);
}
END_TEST

START_TEST(the_end_reports_usage_and_timings)
{
    spec->n_choices = 2;
    open_answer(NULL, 0);
    push_at(1, 'a', 2000000);
    push_at(1, 'b', 2500000);
    push_at(1, 'c', 3000000);
    struct sent *last = end(1, FINISH_STOP, 7, 3100000);
    ck_assert_uint_eq(last->choice, 1);
    ck_assert(last->matched_id);
    ck_assert_int_eq(last->stop_id, 7);
    ck_assert(last->has_usage);
    ck_assert_uint_eq(last->completion_tokens, 3);
    ck_assert_uint_eq(last->seed, 99);
    ck_assert_double_eq(last->queue_ms, 500);
    ck_assert_double_eq(last->ttft_ms, 1000);
    ck_assert_double_eq(last->total_ms, 2100);
    ck_assert_double_eq(last->tokens_per_second, 2); // two after the first, in a second
    last = end(0, FINISH_LENGTH, -1, 3100000);
    ck_assert_uint_eq(last->completion_tokens, 0);
    ck_assert_double_eq(last->ttft_ms, 0);
    ck_assert_uint_eq(answer_tokens(answer), 3);
}
END_TEST

static void take_scores(uint32_t position, uint32_t n)
{
    struct step_prompt_logprob scores[8] = {0};
    const struct token_logprob tops[] = {{'t', -0.125f}};
    for (uint32_t i = 0; i < n; i++)
        scores[i] = (struct step_prompt_logprob){.position = position + i,
                                                 .token = {spec->prompt[position + i], -1.0f},
                                                 .top_count = spec->top_logprobs};
    const struct scheduler_event event = {.kind = SCHEDULER_PROMPT,
                                          .spec = spec,
                                          .position = position,
                                          .n_scores = n,
                                          .scores = scores,
                                          .tops = tops};
    struct answer_reply reply;
    ck_assert_int_eq(answer_take(answer, &event, 2000000, &reply), 0);
}

START_TEST(prompt_scores_come_first_and_in_order)
{
    spec->prompt_logprobs = true;
    spec->top_logprobs = 1;
    open_answer(NULL, 0);
    take_scores(1, 4);
    take_scores(5, 3);
    push('x');
    ck_assert_uint_eq(n_sent, 3);
    ck_assert_uint_eq(sent[0].n_prompt_ids, 8);
    ck_assert_uint_eq(sent[0].n_scores, 5); // the first token has no score of its own
    ck_assert(sent[0].unscored);
    ck_assert_uint_eq(sent[1].n_scores, 3);
    ck_assert_uint_eq(sent[1].n_prompt_ids, 0);
    ck_assert(!sent[1].unscored);
    ck_assert_uint_eq(sent[2].n_scores, 0);
}
END_TEST

START_TEST(a_prompt_of_one_token_has_no_scores)
{
    spec->prompt_logprobs = true;
    spec->n_prompt = 1;
    open_answer(NULL, 0);
    end(0, FINISH_LENGTH, -1, 2000000);
    ck_assert_uint_eq(n_sent, 2);
    ck_assert_uint_eq(sent[0].n_scores, 1);
    ck_assert(sent[0].unscored);
    ck_assert_uint_eq(sent[0].n_prompt_ids, 1);
}
END_TEST

START_TEST(large_scores_come_in_parts)
{
    enum { N = 6000 };
    spec->prompt_logprobs = true;
    free(spec->prompt);
    spec->prompt = calloc(N + 1, sizeof(int32_t));
    spec->n_prompt = N + 1;
    spec->top_logprobs = 20;
    open_answer(NULL, 0);
    struct step_prompt_logprob *scores = calloc(N, sizeof(*scores));
    struct token_logprob *tops = calloc(20, sizeof(*tops));
    for (int i = 0; i < N; i++)
        scores[i].top_count = 20;
    const struct scheduler_event event = {
        .kind = SCHEDULER_PROMPT, .spec = spec, .position = 1, .n_scores = N, .scores = scores, .tops = tops};
    struct answer_reply reply;
    ck_assert_int_eq(answer_take(answer, &event, 2000000, &reply), 0);
    ck_assert_uint_ge(n_sent, 3);
    uint32_t total = 0;
    for (uint32_t i = 0; i < n_sent; i++) {
        total += sent[i].n_scores;
        ck_assert_uint_lt(sent[i].n_scores, 3000);
        ck_assert_uint_eq(sent[i].n_prompt_ids, i == 0 ? N + 1 : 0);
    }
    ck_assert_uint_eq(total, N + 1);
    free(scores);
    free(tops);
}
END_TEST

START_TEST(a_failed_send_is_reported)
{
    open_answer(NULL, 0);
    verdict = STATUS_EXHAUSTED;
    const struct scheduler_event event = {.kind = SCHEDULER_TOKEN, .spec = spec, .token = 'x'};
    struct answer_reply reply;
    ck_assert_int_eq(answer_take(answer, &event, 0, &reply), STATUS_EXHAUSTED);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("answer");
    TCase *tcase = tcase_create("answer");
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, a_token_is_a_response);
    tcase_add_test(tcase, an_unfinished_character_waits_and_frees_its_credit);
    tcase_add_test(tcase, logprobs_travel_with_their_ids);
    tcase_add_test(tcase, a_stop_string_ends_the_choice);
    tcase_add_test(tcase, what_was_held_comes_with_the_end);
    tcase_add_test(tcase, the_end_reports_usage_and_timings);
    tcase_add_test(tcase, prompt_scores_come_first_and_in_order);
    tcase_add_test(tcase, a_prompt_of_one_token_has_no_scores);
    tcase_add_test(tcase, large_scores_come_in_parts);
    tcase_add_test(tcase, a_failed_send_is_reported);
    suite_add_tcase(suite, tcase);
    return suite;
}
