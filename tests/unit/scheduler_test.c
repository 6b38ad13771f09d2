// What the scheduler admits, plans and accepts: named cases, step by step against plans and events written
// out by hand. How requests end is in scheduler_endings_test.c; what holds in general, in
// tests/sim/scheduler_sim_test.c.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/scheduler_fixture.h"
#include "tests/suite.h"

// --- submission ---

#define REFUSE(request_expression, expected, words)                                                          \
    do {                                                                                                     \
        struct request *refused = request_expression;                                                        \
        struct error error = {0};                                                                            \
        ck_assert_int_eq(scheduler_submit(scheduler, refused, now, &error), expected);                       \
        ck_assert_msg(strstr(error.text, words) != NULL, "no '%s' in: %s", words, error.text);               \
        request_free(refused);                                                                               \
    } while (0)

#define WITH(id, prompt, tokens, change)                                                                     \
    ({                                                                                                       \
        struct request *with = request_of(id, prompt, tokens);                                               \
        change;                                                                                              \
        with;                                                                                                \
    })

START_TEST(what_cannot_run_is_refused_with_its_numbers)
{
    start(1, 3);
    REFUSE(request_of(1, 0, 5), STATUS_INVALID, "no tokens");
    REFUSE(request_of(1, 256, 1), STATUS_INVALID, "256 tokens");
    REFUSE(request_of(1, 257, 0), STATUS_INVALID, "257 tokens");
    REFUSE(request_of(1, 100, 94), STATUS_EXHAUSTED, "need 4 KV pages of 64 tokens, the pool has 3");
    REFUSE(WITH(1, 1, 1, with->n_choices = 5), STATUS_EXHAUSTED, "at most 4 sequences");
    REFUSE(WITH(1, 1, 1, with->n_choices = 0), STATUS_INVALID, "0 choices");
    REFUSE(WITH(1, 1, 1, with->n_choices = 65), STATUS_INVALID, "65 choices");
    REFUSE(WITH(1, 2, 1, with->prompt[1] = 100), STATUS_INVALID, "prompt token 100");
    REFUSE(WITH(1, 2, 1, with->prompt[1] = -1), STATUS_INVALID, "prompt token -1");
    REFUSE(WITH(1, 2, 1, with->end_ids[0] = 100), STATUS_INVALID, "stop id 100");
    REFUSE(WITH(1, 2, 1, with->top_logprobs = 21), STATUS_INVALID, "21 top logprobs");
    REFUSE(WITH(1, 2, 1, with->sampling.temperature = -1), STATUS_INVALID, "temperature");
    REFUSE(WITH(1, 2, 1, with->sampling.repetition_penalty = 0), STATUS_INVALID, "repetition penalty");
    REFUSE(WITH(1, 2, 1, with->sampling.min_p = NAN), STATUS_INVALID, "finite");
    for (uint64_t id = 1; id <= 3; id++)
        submit(request_of(id, 100, 92)); // three pages each
    REFUSE(request_of(4, 1, 1), STATUS_EXHAUSTED, "3 requests wait already");
    scheduler_cancel(scheduler, 3, STATUS_CANCELLED, "gone", now);
    REFUSE(request_of(2, 1, 1), STATUS_INTERNAL, "twice");
    finish();
}
END_TEST

START_TEST(options_are_checked)
{
    struct scheduler_options bad[5];
    for (int i = 0; i < 5; i++)
        bad[i] = OPTIONS;
    bad[0].n_slots = MAX_SLOTS + 1;
    bad[1].step_budget = 0;
    bad[2].chunk = 0;
    bad[3].context = 0;
    bad[4].step_budget = MAX_STEP_TOKENS + 1;
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(scheduler_new(&scheduler, &bad[i]), STATUS_INVALID);
        ck_assert_ptr_null(scheduler);
    }
    start(0, 0);
    ck_assert_int_eq(scheduler_pool_ready(scheduler, 1, 0, 10, now), STATUS_INVALID);
    ck_assert_int_eq(scheduler_pool_ready(scheduler, 1, MAX_STAGES + 1, 10, now), STATUS_INVALID);
    submit(request_of(1, 1, 1));
    ck_assert(!plan_next());
    finish();
}
END_TEST

START_TEST(the_oldest_is_admitted_first)
{
    start(1, 4);
    submit(request_of(1, 100, 20)); // two pages of four
    submit(request_of(2, 190, 3));  // three: has to wait
    submit(request_of(3, 10, 1));   // would fit, but does not pass
    ck_assert(plan_next());
    ck_assert_uint_eq(stats().running, 1);
    ck_assert_uint_eq(stats().waiting, 2);
    ck_assert_uint_eq(stats().pages_free, 2);
    scheduler_cancel(scheduler, 1, STATUS_CANCELLED, "gone", now);
    ck_assert(plan_next());
    ck_assert_uint_eq(stats().running, 2);
    ck_assert_uint_eq(stats().pages_free, 0);
    finish();
}
END_TEST

// --- one sequence ---

START_TEST(a_step_is_planned_ahead_of_its_token)
{
    start(1, 10);
    submit(request_of(1, 5, 10));
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.number, 0);
    ck_assert_uint_eq(plan.epoch, 1);
    ck_assert_uint_eq(plan.n_commands, 2);
    ck_assert_int_eq(plan.commands[0].kind, STEP_OPEN);
    ck_assert_int_eq(plan.commands[1].kind, STEP_PAGES);
    ck_assert_uint_eq(plan.commands[1].pages_count, 1);
    ck_assert_uint_eq(plan.n_rows, 1);
    ck_assert_uint_eq(plan.rows[0].count, 5);
    ck_assert_uint_eq(plan.rows[0].draws, 1);
    ck_assert_int_eq(plan.rows[0].logits, STEP_LOGITS_LAST);
    ck_assert(!plan.rows[0].must_wait && !plan.rows[0].from_sample);
    ck_assert_int_eq(plan.tokens[plan.rows[0].tokens_first + 4], 4);
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.n_commands, 0);
    ck_assert(plan.rows[0].from_sample);
    ck_assert_uint_eq(plan.rows[0].source_step, 0);
    ck_assert_uint_eq(plan.rows[0].position, 5);
    ck_assert(!plan_next()); // stages + 1
    answer(7);
    expect_token(1, 0, 7);
    expect_no_event();
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.rows[0].source_step, 1);
    answer(8);
    answer(9);
    expect_token(1, 0, 8);
    expect_token(1, 0, 9);
    ck_assert(plan_next()); // nothing in flight: the token is known
    ck_assert(!plan.rows[0].from_sample);
    ck_assert_int_eq(plan.tokens[plan.rows[0].tokens_first], 9);
    finish();
}
END_TEST

START_TEST(pages_come_as_they_are_reached)
{
    start(1, 10);
    submit(request_of(1, 63, 70));
    ck_assert_uint_eq(stats().pages_free, 10);
    ck_assert(plan_next());
    ck_assert_uint_eq(stats().pages_free, 7); // all that it may need is set aside: 132 positions
    ck_assert_uint_eq(find_command(STEP_PAGES, 0)->pages_count, 1);
    ck_assert(plan_next()); // position 63
    ck_assert_ptr_null(find_command(STEP_PAGES, 0));
    answer(1);
    ck_assert(plan_next()); // position 64
    ck_assert_uint_eq(find_command(STEP_PAGES, 0)->table_first, 1);
    ck_assert_uint_eq(find_command(STEP_PAGES, 0)->pages_count, 1);
    finish();
}
END_TEST

START_TEST(an_open_says_what_sampling_needs)
{
    start(1, 10);
    struct request *request = request_of(1, 5, 10);
    request->sampling.repetition_penalty = 1.5f;
    request->sampling.min_tokens = 3;
    request->sampling.seed = 77;
    request->biases = calloc(1, sizeof(*request->biases));
    request->biases[0] = (struct logit_bias){9, 2.5f};
    request->n_biases = 1;
    submit(request);
    submit(request_of(2, 6, 10)); // no penalty looks at its prompt, no end id is banned
    ck_assert(plan_next());
    const struct step_command *open = find_command(STEP_OPEN, 0);
    ck_assert_uint_eq(open->history_count, 5);
    ck_assert_uint_eq(open->history_prompt, 5);
    ck_assert_int_eq(plan.tokens[open->history_first + 4], 4);
    ck_assert_uint_eq(open->ban_count, 1);
    ck_assert_int_eq(plan.tokens[open->ban_first], END_ID);
    ck_assert_uint_eq(open->bias_count, 1);
    ck_assert_int_eq(plan.biases[open->bias_first].token, 9);
    ck_assert_uint_eq(open->sampling.seed, 77);
    open = find_command(STEP_OPEN, 1);
    ck_assert_uint_eq(open->history_count + open->history_prompt + open->ban_count + open->bias_count, 0);
    finish();
}
END_TEST

// --- prompts ---

START_TEST(prompts_are_read_in_chunks_beside_decodes)
{
    start(1, 12);
    submit(request_of(1, 5, 50));
    ck_assert(plan_next());
    submit(request_of(2, 150, 50));
    submit(request_of(3, 70, 50));
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.n_rows, 3);
    ck_assert_uint_eq(plan.rows[0].slot, 0); // the decode first
    ck_assert_uint_eq(plan.rows[0].count, 1);
    ck_assert_uint_eq(plan.rows[1].count, 64);
    ck_assert_uint_eq(plan.rows[1].draws, 0);
    ck_assert_int_eq(plan.rows[1].logits, STEP_LOGITS_NONE);
    ck_assert_uint_eq(plan.rows[2].count, 63); // what is left of the budget
    answer(1);
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.rows[1].position, 64);
    ck_assert_uint_eq(plan.rows[1].count, 64);
    ck_assert_uint_eq(plan.rows[2].position, 63);
    ck_assert_uint_eq(plan.rows[2].count, 7);
    ck_assert_uint_eq(plan.rows[2].draws, 1);
    answer(1);
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.rows[plan.n_rows - 1].count, 22); // the rest of the long one
    ck_assert_uint_eq(stats().prompt_tokens, 225);
    finish();
}
END_TEST

START_TEST(decodes_leave_room_for_prompts)
{
    struct scheduler_options options = OPTIONS;
    options.step_budget = 4;
    start_with(&options, 1, 20);
    for (uint64_t id = 1; id <= 3; id++) {
        submit(request_of(id, 1, 100));
        ck_assert(plan_next());
        if (id > 1)
            answer(1);
    }
    submit(request_of(4, 10, 5));
    answer(1);
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.n_rows, 4);
    ck_assert_uint_eq(plan.rows[3].count, 1); // one of four positions
    finish();
}
END_TEST

// Decodes that take what a prompt left of its share still stand before it, and their samples are named
// rightly.
START_TEST(generated_rows_come_first)
{
    struct scheduler_options options = OPTIONS;
    options.n_slots = 6;
    options.max_waiting = 6;
    options.step_budget = 5;
    start_with(&options, 1, 30);
    for (uint64_t id = 1; id <= 4; id++) {
        submit(request_of(id, 1, 100));
        ck_assert(plan_next());
        answer(1);
    }
    submit(request_of(5, 1, 100));
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.n_rows, 5); // three decodes, two positions kept for prompts: one of them not used
    uint32_t slots[5];
    for (uint32_t r = 0; r < 5; r++) {
        ck_assert_int_eq(plan.rows[r].generated, r < 4);
        slots[r] = plan.rows[r].slot;
    }
    uint64_t number = plan.number;
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.n_rows, 5);
    for (uint32_t r = 0; r < 5; r++) {
        ck_assert(plan.rows[r].generated && plan.rows[r].from_sample);
        ck_assert_uint_eq(plan.rows[r].source_step, number);
        ck_assert_uint_eq(slots[plan.rows[r].source_row], plan.rows[r].slot);
    }
    answer(1);
    answer(7);
    finish();
}
END_TEST

START_TEST(prompt_scores_come_in_order)
{
    start(1, 10);
    struct request *request = request_of(1, 70, 0);
    request->prompt_logprobs = true;
    request->top_logprobs = 1;
    submit(request);
    struct error error = {0};
    struct step_result result;
    for (uint32_t step = 0; step < 2; step++) {
        ck_assert(plan_next());
        ck_assert_int_eq(plan.rows[0].logits, STEP_LOGITS_ALL);
        ck_assert_int_eq(plan.rows[0].next_token, step == 0 ? 64 % 50 : -1);
        ck_assert_uint_eq(plan.rows[0].draws, 0);
        make_result(&result, 1, 0);
        for (uint32_t p = step * 64 + 1; p <= (step == 0 ? 64 : 69); p++) {
            struct step_prompt_logprob *score = step_result_add_prompt(&result);
            *score = (struct step_prompt_logprob){.position = p,
                                                  .token = {(int32_t)(p % 50), -1.0f},
                                                  .top_first = result.n_tops,
                                                  .top_count = 1};
            *step_result_add_tops(&result, 1) = (struct token_logprob){(int32_t)(p % 60), -0.5f};
        }
        ck_assert_msg(scheduler_result(scheduler, &result, now, &error) == STATUS_OK, "%s", error.text);
        answered++;
        step_result_free(&result); // the events do not need it any more
    }
    for (uint32_t step = 0, position = 1; step < 2; step++) {
        ck_assert(scheduler_next_event(scheduler, &event));
        ck_assert_int_eq(event.kind, SCHEDULER_PROMPT);
        ck_assert_uint_eq(event.position, position);
        ck_assert_uint_eq(event.n_scores, step == 0 ? 64 : 5);
        for (uint32_t i = 0; i < event.n_scores; i++, position++) {
            ck_assert_uint_eq(event.scores[i].position, position);
            ck_assert_int_eq(event.tops[event.scores[i].top_first].token, (int32_t)(position % 60));
        }
    }
    expect_choice_end(1, 0, FINISH_LENGTH, -1); // nothing was to be generated
    expect_request_end(1, STATUS_OK);
    finish();
}
END_TEST

// --- choices ---

START_TEST(choices_fork_after_their_first_tokens)
{
    start(1, 10);
    struct request *request = request_of(1, 70, 10);
    request->n_choices = 3;
    submit(request);
    ck_assert(plan_next());
    ck_assert_uint_eq(stats().slots_used, 3);
    ck_assert_uint_eq(stats().pages_free, 10 - 4); // a shared page, and one for each choice
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.rows[0].draws, 3);
    ck_assert(plan.rows[0].must_wait);
    ck_assert(!plan_next()); // must wait
    answered = 0;
    answer(0);
    answer(40);
    for (uint32_t c = 0; c < 3; c++)
        expect_token(1, c, (int32_t)(40 + c));
    ck_assert(plan_next());
    ck_assert_int_eq(plan.commands[0].kind, STEP_CLOSE);
    ck_assert_uint_eq(plan.n_rows, 3);
    for (uint32_t c = 0; c < 3; c++) {
        const struct step_command *open = find_command(STEP_OPEN, c);
        ck_assert_uint_eq(open->choice, c);
        ck_assert_uint_eq(open->history_count, 1);
        ck_assert_uint_eq(open->history_prompt, 0);
        ck_assert_int_eq(plan.tokens[open->history_first], (int32_t)(40 + c));
        ck_assert_uint_eq(find_command(STEP_PAGES, c)->pages_count, 2);
        ck_assert_uint_eq(plan.rows[c].position, 70);
        ck_assert_int_eq(plan.tokens[plan.rows[c].tokens_first], (int32_t)(40 + c));
    }
    const struct step_command *copy = find_command(STEP_COPY, 1);
    ck_assert_ptr_nonnull(copy);
    ck_assert_ptr_null(find_command(STEP_COPY, 2)); // the last keeps the original
    ck_assert_uint_eq(copy->copy_from, find_command(STEP_COPY, 0)->copy_from);
    ck_assert_uint_eq(plan.pages[0], plan.pages[2]); // the full page is one and the same
    ck_assert_uint_ne(plan.pages[1], plan.pages[3]);
    ck_assert_uint_eq(stats().pages_free, 6);
    finish();
}
END_TEST

// --- credit ---

START_TEST(a_slow_reader_pauses_only_itself)
{
    start(2, 10);
    struct request *slow = request_of(1, 5, 50);
    slow->credit = 0;
    submit(slow);
    submit(request_of(2, 5, 3));
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.n_rows, 2);
    ck_assert_uint_eq(plan.rows[0].count, 4); // all but the token that draws
    ck_assert_uint_eq(plan.rows[0].draws, 0);
    ck_assert(plan_next()); // the other goes on
    ck_assert(!plan_next());
    answer(1);
    ck_assert(plan_next());
    answer(1);
    answer(1);
    for (int i = 0; i < 3; i++)
        expect_token(2, 0, 1);
    expect_choice_end(2, 0, FINISH_LENGTH, -1);
    expect_request_end(2, STATUS_OK);
    ck_assert(!plan_next());
    scheduler_credit(scheduler, 1, 1);
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.rows[0].count, 1);
    ck_assert_uint_eq(plan.rows[0].draws, 1);
    ck_assert(!plan_next());
    answer(9);
    expect_token(1, 0, 9);
    ck_assert(!plan_next());
    scheduler_credit(scheduler, 1, 1);
    ck_assert(plan_next());
    ck_assert(!plan_next());
    finish();
}
END_TEST

// --- results ---

static struct step_result good; // the expected result of a step with one draw and one score

static void expect_corrupt(const char *what)
{
    struct error error = {0};
    ck_assert_msg(scheduler_result(scheduler, &good, now, &error) == STATUS_CORRUPT, "%s was accepted", what);
    ck_assert_msg(error.text[0], "%s was refused without a sentence", what);
    ck_assert_uint_eq(stats().steps_in_flight, 1);
    expect_no_event();
    scheduler_check(scheduler);
}

#define CORRUPT(field, value)                                                                                \
    do {                                                                                                     \
        __typeof__(good.field) kept = good.field;                                                            \
        good.field = (value);                                                                                \
        expect_corrupt(#field " = " #value);                                                                 \
        good.field = kept;                                                                                   \
    } while (0)

START_TEST(wrong_results_change_nothing)
{
    start(1, 10);
    struct request *request = request_of(1, 2, 1);
    request->prompt_logprobs = true;
    request->logprobs = true;
    request->top_logprobs = 2;
    submit(request);
    ck_assert(plan_next());
    make_result(&good, 1, 7);
    *step_result_add_prompt(&good) =
        (struct step_prompt_logprob){.position = 1, .token = {1, -2.0f}, .top_first = 2, .top_count = 1};
    good.samples[0].top_count = 2;
    step_result_add_tops(&good, 3);
    CORRUPT(number, 1);
    CORRUPT(n_samples, 0);
    CORRUPT(n_prompts, 0);
    CORRUPT(samples[0].row, 1);
    CORRUPT(samples[0].draw, 1);
    CORRUPT(samples[0].token, VOCABULARY);
    CORRUPT(samples[0].token, -1);
    CORRUPT(samples[0].top_count, 3);
    CORRUPT(samples[0].top_first, 2);
    CORRUPT(samples[0].top_first, UINT32_MAX);
    CORRUPT(tops[1].token, VOCABULARY);
    CORRUPT(prompts[0].row, 1);
    CORRUPT(prompts[0].position, 2);
    CORRUPT(prompts[0].token.token, 0);
    CORRUPT(prompts[0].top_first, 3);
    ck_assert_int_eq(scheduler_result(scheduler, &good, now, NULL), STATUS_OK);
    ck_assert_int_eq(scheduler_result(scheduler, &good, now, NULL), STATUS_CORRUPT); // none is in flight
    step_result_free(&good);
    ck_assert(scheduler_next_event(scheduler, &event));
    ck_assert_int_eq(event.kind, SCHEDULER_PROMPT);
    expect_token(1, 0, 7);
    ck_assert_uint_eq(event.n_tops, 2);
    finish();
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("scheduler");
    TCase *cases = tcase_create("cases");
    tcase_add_test(cases, what_cannot_run_is_refused_with_its_numbers);
    tcase_add_test(cases, options_are_checked);
    tcase_add_test(cases, the_oldest_is_admitted_first);
    tcase_add_test(cases, a_step_is_planned_ahead_of_its_token);
    tcase_add_test(cases, pages_come_as_they_are_reached);
    tcase_add_test(cases, an_open_says_what_sampling_needs);
    tcase_add_test(cases, prompts_are_read_in_chunks_beside_decodes);
    tcase_add_test(cases, decodes_leave_room_for_prompts);
    tcase_add_test(cases, generated_rows_come_first);
    tcase_add_test(cases, prompt_scores_come_in_order);
    tcase_add_test(cases, choices_fork_after_their_first_tokens);
    tcase_add_test(cases, a_slow_reader_pauses_only_itself);
    tcase_add_test(cases, wrong_results_change_nothing);
    suite_add_tcase(suite, cases);
    return suite;
}
