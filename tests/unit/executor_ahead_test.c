// The executor when steps are handed to the device before earlier ones are finished, and when they are padded
// and replayed from recordings: the same results, in order. The device's progress and recordings are the
// test's.
#include <string.h>

#include "tests/executor_fixture.h"
#include "tests/suite.h"

static uint64_t marks, reached; // taken, reached
static uint32_t recorded[64], n_recorded;

static uint64_t take_mark(struct device *device)
{
    return ++marks;
}

static int ask_mark(struct device *device, uint64_t mark, struct error *to)
{
    return mark > reached ? 0 : true_ops->sync(device, to) ? STATUS_INTERNAL : 1;
}

static bool note_replay(struct device *device, uint32_t key)
{
    recorded[n_recorded++] = key;
    return true_ops->replay(device, key);
}

static void watch_ops(void)
{
    change_ops();
    marks = reached = n_recorded = 0;
}

static struct executor_options whole_model(void)
{
    return (struct executor_options){.device = engine.device,
                                     .spec = &engine.spec,
                                     .list = &engine.list,
                                     .weights = engine.weights,
                                     .epoch = 1,
                                     .n_stages = 1,
                                     .n_layers = LAYERS,
                                     .bounds = {SLOTS, SLOTS * 4, CONTEXT, VOCAB, POSITIONS}};
}

static void renew_executor(void)
{
    struct executor_options options = whole_model();
    executor_free(engine.executor);
    ck_assert_msg(executor_new(&engine.executor, &options, &error) == 0, "%s", error.text);
    engine.steps = 0;
}

static int submit(void)
{
    engine.plan.number = engine.steps++;
    int status = executor_submit(engine.executor, &engine.plan, &error);
    step_plan_clear(&engine.plan);
    engine.plan.epoch = 1;
    return status;
}

static int finish(void)
{
    return executor_finish(engine.executor, &engine.result, false, &error);
}

START_TEST(test_steps_are_finished_when_the_device_gets_there)
{
    watch_ops();
    ops.mark = take_mark;
    ops.reached = ask_mark;
    renew_executor();
    ck_assert_int_eq(finish(), STATUS_INTERNAL); // there is none
    int32_t expected[EXECUTOR_DEPTH];
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++) {
        add_open(step);
        add_pages(step, 0, step, 1);
        struct step_row *row = drawing(add_row(step, 0, 4 + step), 1);
        row->logprobs = true;
        row->top_logprobs = 2;
        ck_assert_int_eq(submit(), 0);
        ck_assert_uint_eq(executor_unfinished(engine.executor), step + 1);
        ck_assert_int_eq(finish(), EXECUTOR_PENDING);
    }
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++) {
        reached++;
        ck_assert_int_eq(finish(), 0);
        ck_assert_uint_eq(engine.result.number, step);
        ck_assert_uint_eq(engine.result.n_samples, 1);
        ck_assert_uint_eq(engine.result.n_tops, 2); // its own, not those of a later step
        ck_assert_int_eq(engine.result.tops[0].token, engine.result.samples[0].token);
        expected[step] = engine.result.samples[0].token;
        ck_assert_int_eq(finish(), step + 1 < EXECUTOR_DEPTH ? EXECUTOR_PENDING : STATUS_INTERNAL);
    }
    reached = UINT64_MAX;
    renew_executor();
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++) {
        add_open(step);
        add_pages(step, 0, step, 1);
        drawing(add_row(step, 0, 4 + step), 1);
        run();
        ck_assert_int_eq(engine.result.samples[0].token, expected[step]);
    }
}
END_TEST

START_TEST(test_too_many_steps_are_refused)
{
    watch_ops();
    ops.mark = take_mark;
    ops.reached = ask_mark;
    renew_executor();
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++)
        ck_assert_int_eq(submit(), 0);
    ck_assert_int_eq(submit(), STATUS_INTERNAL);
    reached = 1; // the others are none the worse
    ck_assert_int_eq(finish(), 0);
    ck_assert_int_eq(finish(), EXECUTOR_PENDING);
    ck_assert_int_eq(submit(), STATUS_UNAVAILABLE);
}
END_TEST

// A hash of all logits, in order.
static void hash_row(void *context, uint32_t row, uint32_t position, const float *logits, uint32_t vocab)
{
    uint64_t *hash = context;
    for (uint32_t i = 0; i < vocab; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], sizeof(bits));
        *hash = (*hash ^ bits) * 0x100000001b3;
    }
}

enum { GENERATING = 9 };

static uint64_t generate(void)
{
    uint64_t hash = 7;
    executor_set_tap(engine.executor, hash_row, &hash);
    for (uint32_t slot = 0; slot < GENERATING; slot++) {
        add_open(slot);
        add_pages(slot, 0, slot, 1);
        drawing(add_row(slot, 0, 3 + slot), 1);
    }
    run();
    for (uint32_t step = 1; step < 8; step++) {
        for (uint32_t slot = 0; slot < GENERATING; slot++) {
            struct step_row *row = drawing(add_row(slot, 2 + slot + step, 1), 1);
            row->generated = true;
            row->from_sample = slot % 3 > 0;
            row->source_step = step - 1;
            row->source_row = slot;
        }
        if (step == 5) { // and a prompt behind them
            add_open(GENERATING);
            add_pages(GENERATING, 0, GENERATING, 1);
            drawing(add_row(GENERATING, 0, 20), 1);
        }
        if (step == 7)
            engine.plan.rows[2].draws = 0; // not what a program does
        ck_assert_int_eq(local_engine_submit(&engine, &error), 0);
    }
    ck_assert_int_eq(local_engine_wait(&engine, &error), 0);
    for (uint32_t i = 0; i < engine.result.n_samples; i++)
        hash = (hash ^ (uint32_t)engine.result.samples[i].token) * 0x100000001b3;
    return hash;
}

START_TEST(test_padding_changes_nothing)
{
    watch_ops();
    ops.replay = note_replay;
    ops.keeps_programs = false;
    renew_executor();
    uint64_t expected = generate();
    ck_assert_uint_eq(n_recorded, 0);
    ops.keeps_programs = true;
    renew_executor();
    ck_assert_uint_eq(generate(), expected);
    ck_assert_uint_eq(n_recorded, 5);
    for (uint32_t i = 0; i < n_recorded; i++)
        ck_assert_uint_eq(recorded[i], SLOTS); // sixteen are more than there can be
}
END_TEST

START_TEST(test_warming_up_leaves_no_trace)
{
    watch_ops();
    ops.replay = note_replay;
    ops.keeps_programs = false;
    renew_executor();
    uint64_t expected = generate();
    ck_assert_int_eq(executor_warm_up(engine.executor, &error), 0); // nothing to do
    ck_assert_uint_eq(n_recorded, 0);
    ops.keeps_programs = true;
    renew_executor();
    ck_assert_int_eq(executor_warm_up(engine.executor, &error), 0);
    ck_assert_uint_eq(n_recorded, 9); // one to eight, and as many as there are slots
    for (uint32_t i = 0; i < n_recorded; i++)
        ck_assert_uint_eq(recorded[i], i < 8 ? i + 1 : SLOTS);
    ck_assert_uint_eq(executor_unfinished(engine.executor), 0);
    ck_assert_uint_eq(generate(), expected);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("executor ahead");
    TCase *tests = tcase_create("steps that run ahead");
    tcase_add_checked_fixture(tests, executor_fixture_set_up, executor_fixture_tear_down);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, test_steps_are_finished_when_the_device_gets_there);
    tcase_add_test(tests, test_too_many_steps_are_refused);
    tcase_add_test(tests, test_padding_changes_nothing);
    tcase_add_test(tests, test_warming_up_leaves_no_trace);
    suite_add_tcase(suite, tests);
    return suite;
}
