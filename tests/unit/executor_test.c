// The executor on a small model: what a plan may ask, in which order, and what it gets; everything else is
// refused and ends the epoch.
#include <string.h>

#include "tests/executor_fixture.h"
#include "tests/suite.h"

START_TEST(test_a_sequence_is_opened_computed_and_closed)
{
    add_open(1);
    add_pages(1, 0, 0, 2);
    drawing(add_row(1, 0, 10), 1);
    run();
    ck_assert_uint_eq(engine.result.n_samples, 1);
    ck_assert_uint_eq(engine.result.number, 0);
    ck_assert_uint_eq(engine.result.samples[0].row, 0);
    int32_t drawn = engine.result.samples[0].token;
    ck_assert(drawn >= 0 && drawn < VOCAB);
    ck_assert_uint_gt(engine.result.compute_us, 0);
    struct step_row *row = drawing(add_row(1, 10, 1), 1);
    row->generated = row->from_sample = true;
    row->source_step = 0;
    row->source_row = 0;
    run();
    ck_assert_uint_eq(engine.result.number, 1);
    step_plan_add_command(&engine.plan, STEP_CLOSE, 1);
    run();
    ck_assert_uint_eq(engine.result.n_samples, 0);
    add_open(1); // again, from the beginning
    add_pages(1, 0, 3, 1);
    drawing(add_row(1, 0, 10), 1);
    run();
    ck_assert_int_eq(engine.result.samples[0].token, drawn);
}
END_TEST

START_TEST(test_plans_of_another_epoch_are_dropped)
{
    engine.plan.epoch = 2;
    engine.plan.number = 0;
    add_row(3, 0, 1); // would be refused
    ck_assert_int_eq(executor_run(engine.executor, &engine.plan, &engine.result, &error), EXECUTOR_DROPPED);
    step_plan_clear(&engine.plan);
    engine.plan.epoch = 1;
    run();
}
END_TEST

static void break_rule(int rule)
{
    switch (rule) {
    case 0:
        add_open(0);
        add_open(0);
        refuse(STATUS_CORRUPT, "slot 0 is opened, but it is open");
        break;
    case 1:
        step_plan_add_command(&engine.plan, STEP_CLOSE, 2);
        refuse(STATUS_CORRUPT, "slot 2 is closed, but it is closed");
        break;
    case 2:
        add_pages(2, 0, 0, 1);
        refuse(STATUS_CORRUPT, "slot 2 is given pages");
        break;
    case 3:
        add_open(0);
        add_pages(0, 1, 0, 1);
        refuse(STATUS_CORRUPT, "begin at entry 1, but its table has 0");
        break;
    case 4:
        add_row(1, 0, 1);
        refuse(STATUS_CORRUPT, "slot 1, which is closed");
        break;
    case 5:
        add_open(0);
        add_pages(0, 0, 0, 1);
        add_row(0, 60, 5);
        refuse(STATUS_CORRUPT, "its 1 pages hold 64");
        break;
    case 6:
        add_open(0);
        add_pages(0, 0, 0, 1);
        add_row(0, 0, 5);
        run();
        add_row(0, 6, 1);
        refuse(STATUS_CORRUPT, "begins at position 6, expected 5");
        break;
    case 7:
        add_open(0);
        add_pages(0, 0, 0, 1);
        add_row(0, 0, 5);
        run();
        add_row(0, 4, 1);
        refuse(STATUS_CORRUPT, "begins at position 4, expected 5");
        break;
    case 8:
        engine.steps = 1;
        refuse(STATUS_CORRUPT, "step 1 came, expected step 0");
        break;
    case 9: // step_plan_validate is asked
        add_open(SLOTS);
        refuse(STATUS_CORRUPT, "slot 12, of 12");
        break;
    }
}

START_TEST(test_broken_rules_end_the_epoch)
{
    break_rule(_i);
}
END_TEST

static void break_source(int kind)
{
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 5), 2);
    add_open(1);
    add_pages(1, 0, 1, 1);
    add_row(1, 0, 5);
    run();
    struct step_row *row = add_row(0, 5, 1);
    row->generated = row->from_sample = true;
    row->source_row = kind == 0 ? 1 : kind == 1 ? 2 : 0; // drew nothing; does not exist
    row->source_draw = kind == 2 ? 2 : 0;                // one too many
    refuse(STATUS_CORRUPT, "which drew no such token");
}

START_TEST(test_tokens_nobody_drew)
{
    break_source(_i);
}
END_TEST

START_TEST(test_a_step_of_long_ago_is_still_known)
{
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 5), 1);
    run();
    for (int i = 0; i < MAX_STEP_HISTORY - 1; i++)
        run();
    struct step_row *row = drawing(add_row(0, 5, 1), 1);
    row->generated = row->from_sample = true;
    run();
    ck_assert_uint_eq(engine.result.number, MAX_STEP_HISTORY);
    row = add_row(0, 6, 1);
    row->generated = row->from_sample = true; // of step 0: one too far back now
    refuse(STATUS_CORRUPT, "cannot take its token from step 0");
}
END_TEST

// --- what steps give ---

struct rows {
    uint32_t count;
    uint32_t positions[512];
    float first[512]; // the first logit
    float last_row[VOCAB];
};

static void keep_row(void *context, uint32_t row, uint32_t position, const float *logits, uint32_t vocab)
{
    struct rows *rows = context;
    ck_assert_uint_eq(vocab, VOCAB);
    rows->positions[rows->count] = position;
    rows->first[rows->count++] = logits[0];
    memcpy(rows->last_row, logits, sizeof(rows->last_row));
}

START_TEST(test_logits_only_where_they_are_wanted)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 1);
    add_open(1);
    add_pages(1, 0, 1, 2);
    add_row(0, 0, 20);             // nobody looks
    drawing(add_row(1, 0, 70), 1); // one row
    run();
    ck_assert_uint_eq(rows.count, 1);
    ck_assert_uint_eq(rows.positions[0], 69);
    add_row(0, 20, 3);
    run();
    ck_assert_uint_eq(rows.count, 1);
}
END_TEST

START_TEST(test_prompt_logprobs_in_groups)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 4);
    struct step_row *row = drawing(add_row(0, 0, 150), 1); // three groups of logits
    row->logits = STEP_LOGITS_ALL;
    row->top_logprobs = 3;
    row->logprobs = true;
    row->next_token = -1;
    run();
    ck_assert_uint_eq(rows.count, 150);
    ck_assert_uint_eq(engine.result.n_prompts, 149); // nothing precedes the first, nothing follows the last
    ck_assert_uint_eq(engine.result.n_samples, 1);
    for (uint32_t i = 0; i < 149; i++) {
        const struct step_prompt_logprob *prompt = &engine.result.prompts[i];
        ck_assert_uint_eq(prompt->position, i + 1);
        ck_assert_int_eq(prompt->token.token, (int32_t)((i + 1) * 37 % VOCAB));
        ck_assert_uint_eq(prompt->top_count, 3);
        const struct token_logprob *tops = engine.result.tops + prompt->top_first;
        ck_assert(tops[0].logprob >= tops[1].logprob && tops[1].logprob >= tops[2].logprob);
        ck_assert(prompt->token.logprob <= tops[0].logprob + 1e-6f);
    }
    const struct step_sample *sample = &engine.result.samples[0];
    ck_assert_int_eq(engine.result.tops[sample->top_first].token, sample->token); // greedy
    ck_assert(sample->logprob == engine.result.tops[sample->top_first].logprob);
    // The next chunk's first token is scored by naming it.
    row = add_row(0, 150, 5);
    row->logits = STEP_LOGITS_ALL;
    row->next_token = 7;
    run();
    ck_assert_uint_eq(engine.result.n_prompts, 5);
    ck_assert_int_eq(engine.result.prompts[4].token.token, 7);
    ck_assert_uint_eq(engine.result.prompts[4].position, 155);
}
END_TEST

START_TEST(test_n_draws_share_their_alternatives)
{
    struct step_command *open = add_open(0);
    open->sampling.temperature = 1;
    open->sampling.seed = 5;
    add_pages(0, 0, 0, 1);
    struct step_row *row = drawing(add_row(0, 0, 9), 8);
    row->top_logprobs = 2;
    run();
    ck_assert_uint_eq(engine.result.n_samples, 8);
    bool differ = false;
    for (uint32_t i = 0; i < 8; i++) {
        ck_assert_uint_eq(engine.result.samples[i].draw, i);
        ck_assert_uint_eq(engine.result.samples[i].top_first, 0);
        differ |= engine.result.samples[i].token != engine.result.samples[0].token;
    }
    ck_assert_uint_eq(engine.result.n_tops, 2);
    ck_assert(differ);
}
END_TEST

// More alternatives than there are tokens: what comes back has none that is no token.
START_TEST(test_alternatives_end_with_the_vocabulary)
{
    local_engine_close(&engine);
    open_engine(12);
    add_open(0);
    add_pages(0, 0, 0, 1);
    struct step_row *row = drawing(add_row(0, 0, 1), 1);
    row->logits = STEP_LOGITS_ALL;
    row->next_token = 3;
    row->top_logprobs = MAX_TOP_LOGPROBS;
    run();
    ck_assert_uint_eq(engine.result.n_prompts, 1);
    ck_assert_uint_eq(engine.result.n_samples, 1);
    ck_assert_uint_eq(engine.result.prompts[0].top_count, 12);
    ck_assert_uint_eq(engine.result.samples[0].top_count, 12);
    ck_assert_uint_eq(engine.result.n_tops, 24);
    for (uint32_t i = 0; i < engine.result.n_tops; i++)
        ck_assert(engine.result.tops[i].token >= 0 && engine.result.tops[i].token < 12);
}
END_TEST

START_TEST(test_copied_pages_carry_a_sequence_on)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 2);
    add_row(0, 0, 100);
    run();
    drawing(add_row(0, 100, 1), 1);
    run();
    float expected[VOCAB];
    memcpy(expected, rows.last_row, sizeof(expected));
    // A fork: the full page is shared, the unfinished one copied; then the first sequence goes on writing.
    struct step_command *copy = step_plan_add_command(&engine.plan, STEP_COPY, 0);
    copy->copy_from = 1;
    copy->copy_to = 9;
    add_open(1);
    add_pages(1, 0, 0, 1);
    add_pages(1, 1, 9, 1);
    add_row(0, 101, 20);
    drawing(add_row(1, 100, 1), 1);
    run();
    ck_assert_mem_eq(expected, rows.last_row, sizeof(expected));
}
END_TEST

START_TEST(test_replaced_pages_are_read)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 1);
    add_row(0, 0, 30);
    run();
    struct step_command *copy = step_plan_add_command(&engine.plan, STEP_COPY, 0);
    copy->copy_from = 0;
    copy->copy_to = 5;
    add_pages(0, 0, 5, 1);
    drawing(add_row(0, 30, 1), 1);
    run();
    float expected[VOCAB];
    memcpy(expected, rows.last_row, sizeof(expected));
    add_open(1);
    add_pages(1, 0, 7, 1);
    drawing(add_row(1, 0, 31), 1);
    run();
    ck_assert_mem_eq(expected, rows.last_row, sizeof(expected));
}
END_TEST

START_TEST(test_weights_come_before_an_executor)
{
    struct weight_list list;
    ck_assert_int_eq(weight_list_make(&list, engine.gguf, &engine.spec, 0, LAYERS, &error), 0);
    struct weight_cache *empty;
    ck_assert_int_eq(weight_cache_new(&empty, engine.device), 0);
    struct executor_options options = {.device = engine.device,
                                       .spec = &engine.spec,
                                       .list = &list,
                                       .weights = empty,
                                       .epoch = 1,
                                       .n_stages = 1,
                                       .n_layers = LAYERS,
                                       .bounds = {SLOTS, 16, CONTEXT, VOCAB, POSITIONS}};
    struct executor *executor;
    ck_assert_int_eq(executor_new(&executor, &options, &error), STATUS_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(error.text, "token_embd.weight is not in the cache"));
    weight_cache_free(empty);
    weight_list_free(&list);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("executor");
    TCase *tests = tcase_create("plans");
    tcase_add_checked_fixture(tests, executor_fixture_set_up, executor_fixture_tear_down);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, test_a_sequence_is_opened_computed_and_closed);
    tcase_add_test(tests, test_plans_of_another_epoch_are_dropped);
    tcase_add_loop_test(tests, test_broken_rules_end_the_epoch, 0, 10);
    tcase_add_loop_test(tests, test_tokens_nobody_drew, 0, 3);
    tcase_add_test(tests, test_a_step_of_long_ago_is_still_known);
    tcase_add_test(tests, test_logits_only_where_they_are_wanted);
    tcase_add_test(tests, test_prompt_logprobs_in_groups);
    tcase_add_test(tests, test_n_draws_share_their_alternatives);
    tcase_add_test(tests, test_alternatives_end_with_the_vocabulary);
    tcase_add_test(tests, test_copied_pages_carry_a_sequence_on);
    tcase_add_test(tests, test_replaced_pages_are_read);
    tcase_add_test(tests, test_weights_come_before_an_executor);
    suite_add_tcase(suite, tests);
    return suite;
}
