// Step plans and results: growth and its limits, and every way in which step_plan_validate must refuse a
// plan.
#include "common/step_plan.h"
#include "tests/suite.h"

#include <math.h>
#include <string.h>

static const struct step_bounds BOUNDS = {
    .n_slots = 4, .n_pages = 10, .context = 200, .vocab_size = 50, .max_positions = 64};

static struct step_plan plan;

// A good plan with one command of each kind and two rows: a prompt chunk of slot 1 and a decode of slot 2.
static void make_plan(void)
{
    static const int32_t tokens[] = {5, 6, 7, 49, 0, 3};
    static const uint32_t pages[] = {9, 0, 4};
    static const struct logit_bias biases[] = {{3, 1.5f}, {4, -INFINITY}};
    step_plan_init(&plan);
    plan.epoch = 3;
    plan.number = 70;
    ck_assert_int_eq(step_plan_add_tokens(&plan, tokens, 6), 0);
    ck_assert_int_eq(step_plan_add_pages(&plan, pages, 3), 0);
    ck_assert_int_eq(step_plan_add_biases(&plan, biases, 2), 0);
    ck_assert_ptr_nonnull(step_plan_add_command(&plan, STEP_CLOSE, 3));
    struct step_command *open = step_plan_add_command(&plan, STEP_OPEN, 1);
    open->sampling = SAMPLING_DEFAULTS;
    open->history_count = 3;
    open->history_prompt = 3;
    open->ban_first = 4;
    open->ban_count = 2;
    open->bias_count = 2;
    struct step_command *table = step_plan_add_command(&plan, STEP_PAGES, 1);
    table->table_first = 1;
    table->pages_count = 3;
    struct step_command *copy = step_plan_add_command(&plan, STEP_COPY, 0);
    copy->copy_from = 9;
    copy->copy_to = 2;
    struct step_row *decode = step_plan_add_row(&plan);
    decode->slot = 2;
    decode->position = 199;
    decode->count = 1;
    decode->generated = decode->from_sample = true;
    decode->source_step = 6;
    decode->source_row = 1023;
    decode->source_draw = 63;
    decode->draws = 1;
    decode->logits = STEP_LOGITS_LAST;
    struct step_row *chunk = step_plan_add_row(&plan);
    chunk->slot = 1;
    chunk->count = 4;
    chunk->draws = 2;
    chunk->must_wait = true;
    chunk->logits = STEP_LOGITS_ALL;
    chunk->next_token = 49;
    chunk->top_logprobs = 20;
}

static void refuse(const char *what)
{
    struct error error = {0};
    ck_assert_msg(step_plan_validate(&plan, &BOUNDS, &error) == STATUS_CORRUPT, "%s was not refused", what);
    ck_assert_msg(error.status == STATUS_CORRUPT && error.text[0], "%s was refused without a sentence", what);
    ck_assert_int_eq(step_plan_validate(&plan, &BOUNDS, NULL), STATUS_CORRUPT);
}

#define REFUSE(change)                                                                                       \
    do {                                                                                                     \
        make_plan();                                                                                         \
        change;                                                                                              \
        refuse(#change);                                                                                     \
        step_plan_free(&plan);                                                                               \
    } while (0)

START_TEST(a_good_plan_passes)
{
    struct error error = {0};
    make_plan();
    ck_assert_msg(step_plan_validate(&plan, &BOUNDS, &error) == STATUS_OK, "%s", error.text);
    ck_assert_uint_eq(step_plan_positions(&plan), 5);
    step_plan_clear(&plan);
    ck_assert_int_eq(step_plan_validate(&plan, &BOUNDS, &error), STATUS_OK);
    ck_assert_uint_eq(step_plan_positions(&plan), 0);
    ck_assert_uint_gt(plan.capacity.rows, 0);
    step_plan_free(&plan);
    ck_assert_ptr_null(plan.rows);
}
END_TEST

START_TEST(bad_commands_are_refused)
{
    REFUSE(plan.commands[0].slot = 4);
    REFUSE(plan.commands[0].kind = 0);
    REFUSE(plan.commands[0].kind = 5);
    REFUSE(plan.commands[1].slot = UINT32_MAX);
    REFUSE(plan.commands[1].history_count = 7);
    REFUSE(plan.commands[1].history_first = UINT32_MAX);
    REFUSE(plan.commands[1].history_prompt = 4);
    REFUSE(plan.commands[1].bias_count = 3);
    REFUSE(plan.commands[1].ban_first = 5);
    REFUSE(plan.commands[1].choice = MAX_CHOICES);
    REFUSE(plan.commands[1].sampling.temperature = -1);
    REFUSE(plan.commands[1].sampling.temperature = NAN);
    REFUSE(plan.commands[1].sampling.repetition_penalty = 0);
    REFUSE(plan.commands[1].sampling.top_p = INFINITY);
    REFUSE(plan.commands[1].sampling.frequency_penalty = NAN);
    REFUSE(plan.commands[2].pages_count = 4);
    REFUSE(plan.commands[2].pages_first = UINT32_MAX);
    REFUSE(plan.commands[2].table_first = 2); // a context of 200 has four pages
    REFUSE(plan.commands[2].table_first = UINT32_MAX);
    REFUSE(plan.pages[2] = 10);
    REFUSE(plan.commands[3].copy_from = 10);
    REFUSE(plan.commands[3].copy_to = 10);
    REFUSE(plan.commands[3].copy_to = 9);
}
END_TEST

START_TEST(bad_rows_are_refused)
{
    REFUSE(plan.rows[1].slot = 4);
    REFUSE(plan.rows[1].count = 0);
    REFUSE(plan.rows[1].count = 7); // more than the plan has tokens
    REFUSE(plan.rows[1].tokens_first = 3);
    REFUSE(plan.rows[1].tokens_first = UINT32_MAX);
    REFUSE(plan.rows[1].position = 197);
    REFUSE(plan.rows[1].position = UINT32_MAX);
    REFUSE(plan.rows[1].draws = MAX_CHOICES + 1);
    REFUSE(plan.rows[1].top_logprobs = MAX_TOP_LOGPROBS + 1);
    REFUSE(plan.rows[1].logits = STEP_LOGITS_NONE);
    REFUSE(plan.rows[1].logits = 3);
    REFUSE(plan.rows[1].next_token = 50);
    REFUSE(plan.rows[1].next_token = -2);
    REFUSE(plan.rows[0].count = 2);
    REFUSE(plan.rows[0].must_wait = true);
    REFUSE(plan.rows[0].source_step = 70);
    REFUSE(plan.rows[0].source_step = 71);
    REFUSE(plan.rows[0].source_step = 5); // too long ago
    REFUSE(plan.rows[0].source_row = MAX_STEP_ROWS);
    REFUSE(plan.rows[0].source_draw = MAX_CHOICES);
    REFUSE(plan.rows[0].generated = false);                           // a drawn token is
    REFUSE(plan.rows[1].generated = true);                            // of four positions
    REFUSE(plan.rows[0].generated = plan.rows[0].from_sample = false; // behind one that is not
           plan.rows[1].generated = true; plan.rows[1].count = 1);
    REFUSE(plan.rows[1].draws = 4); // and one of the other row, for four slots
}
END_TEST

START_TEST(bad_ids_and_sums_are_refused)
{
    REFUSE(plan.tokens[3] = 50);
    REFUSE(plan.tokens[0] = -1);
    REFUSE(plan.biases[1].token = 50);
    REFUSE(plan.biases[1].token = -1);
    REFUSE(plan.biases[0].bias = NAN);
    struct step_bounds tight = BOUNDS;
    tight.max_positions = 4;
    make_plan();
    ck_assert_int_eq(step_plan_validate(&plan, &tight, NULL), STATUS_CORRUPT);
    plan.rows[0].count = plan.rows[1].count = UINT32_MAX; // the sum does not wrap around
    ck_assert_uint_eq(step_plan_positions(&plan), UINT32_MAX);
    step_plan_free(&plan);
}
END_TEST

START_TEST(plans_grow_to_their_limits)
{
    step_plan_init(&plan);
    for (uint32_t i = 0; i < MAX_STEP_ROWS; i++) {
        struct step_row *row = step_plan_add_row(&plan);
        ck_assert_ptr_nonnull(row);
        ck_assert_int_eq(row->next_token, -1);
        row->slot = i;
    }
    ck_assert_ptr_null(step_plan_add_row(&plan));
    for (uint32_t i = 0; i < MAX_STEP_COMMANDS; i++)
        ck_assert_ptr_nonnull(step_plan_add_command(&plan, STEP_CLOSE, i % 4));
    ck_assert_ptr_null(step_plan_add_command(&plan, STEP_CLOSE, 0));
    ck_assert_uint_eq(plan.n_rows, MAX_STEP_ROWS);
    ck_assert_uint_eq(plan.rows[1000].slot, 1000);
    ck_assert_uint_eq(plan.commands[MAX_STEP_COMMANDS - 1].slot, 3);
    ck_assert_int_eq(step_plan_add_tokens(&plan, NULL, UINT32_MAX), -1);
    ck_assert_int_eq(step_plan_add_pages(&plan, NULL, UINT32_MAX), -1);
    ck_assert_int_eq(step_plan_add_biases(&plan, NULL, UINT32_MAX), -1);
    ck_assert_int_eq(step_plan_add_tokens(&plan, NULL, 0), 0);
    plan.n_rows = MAX_STEP_ROWS + 1; // as a decoder may never leave it
    ck_assert_int_eq(step_plan_validate(&plan, &BOUNDS, NULL), STATUS_CORRUPT);
    step_plan_free(&plan);
}
END_TEST

START_TEST(cleared_plans_keep_their_memory)
{
    int32_t tokens[100] = {0};
    step_plan_init(&plan);
    ck_assert_int_eq(step_plan_add_tokens(&plan, tokens, 100), 0);
    ck_assert_int_eq(step_plan_add_tokens(&plan, tokens, 50), 100);
    const int32_t *memory = plan.tokens;
    step_plan_clear(&plan);
    ck_assert_int_eq(step_plan_add_tokens(&plan, tokens, 100), 0);
    ck_assert_ptr_eq(plan.tokens, memory);
    step_plan_free(&plan);
}
END_TEST

START_TEST(results_grow_and_clear)
{
    struct step_result result;
    step_result_init(&result);
    ck_assert_ptr_nonnull(step_result_add_tops(&result, 0)); // none were asked for: no failure
    ck_assert_uint_eq(result.n_tops, 0);
    result.epoch = 4;
    for (int32_t i = 0; i < 1000; i++) {
        struct step_sample *sample = step_result_add_sample(&result);
        ck_assert_ptr_nonnull(sample);
        ck_assert_int_eq(sample->token, 0);
        sample->token = i;
        step_result_add_prompt(&result)->position = (uint32_t)i;
        struct token_logprob *tops = step_result_add_tops(&result, 3);
        ck_assert(tops && tops[2].token == 0);
        tops[2].token = i;
    }
    ck_assert_int_eq(result.samples[999].token, 999);
    ck_assert_uint_eq(result.prompts[500].position, 500);
    ck_assert_int_eq(result.tops[3 * 7 + 2].token, 7);
    ck_assert_ptr_null(step_result_add_tops(&result, UINT32_MAX));
    step_result_clear(&result);
    ck_assert_uint_eq(result.epoch + result.n_samples + result.n_prompts + result.n_tops, 0);
    step_result_free(&result);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("step_plan");
    TCase *plans = tcase_create("plans");
    tcase_add_test(plans, a_good_plan_passes);
    tcase_add_test(plans, bad_commands_are_refused);
    tcase_add_test(plans, bad_rows_are_refused);
    tcase_add_test(plans, bad_ids_and_sums_are_refused);
    tcase_add_test(plans, plans_grow_to_their_limits);
    tcase_add_test(plans, cleared_plans_keep_their_memory);
    tcase_add_test(plans, results_grow_and_clear);
    suite_add_tcase(suite, plans);
    return suite;
}
