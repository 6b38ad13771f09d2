// The executor as one stage of two: what it sends to the next one, what it takes from the previous one, how
// long it says that it waited for either, and what it does when a link breaks. Links are played by the test.
#include <string.h>

#include "common/clock.h"
#include "tests/executor_fixture.h"
#include "tests/suite.h"

// A link that hands out what the test put in and keeps what is sent.
struct fake_link {
    struct link base;
    const void *incoming;
    size_t bytes;
    int status, sends;
    uint64_t number;
    bool gone;        // what a check finds
    int64_t delay_us; // how long a message takes
};

static int fake_send(struct link *base, uint64_t number, const void *data, size_t bytes, struct error *to)
{
    struct fake_link *link = (struct fake_link *)base;
    clock_sleep_us(link->delay_us);
    link->sends++;
    link->number = number;
    link->bytes = bytes;
    return link->status ? error_set(to, link->status, "the fake link broke") : 0;
}

static int fake_receive(struct link *base, uint64_t number, void *data, size_t bytes, struct error *to)
{
    struct fake_link *link = (struct fake_link *)base;
    if (link->status)
        return error_set(to, link->status, "the fake link broke");
    clock_sleep_us(link->delay_us);
    memcpy(data, link->incoming, bytes);
    link->number = number;
    link->bytes = bytes;
    return 0;
}

static int fake_check(struct link *base, struct error *to)
{
    return ((struct fake_link *)base)->gone ? error_set(to, STATUS_UNAVAILABLE, "the fake neighbour is gone")
                                            : 0;
}

static const struct link_ops FAKE_OPS = {.send = fake_send, .receive = fake_receive, .check = fake_check};

// Both kinds of link: what is on the CPU device's memory is on the host's.
static bool is_played(int on_device)
{
    return !on_device || !where.backend || strcmp(where.backend, "cpu") == 0;
}

static struct executor *new_stage(uint32_t stage)
{
    struct weight_list list;
    ck_assert_int_eq(weight_list_make(&list, engine.gguf, &engine.spec, stage, 1, &error), 0);
    struct executor_options options = {.device = engine.device,
                                       .spec = &engine.spec,
                                       .list = &list,
                                       .weights = engine.weights,
                                       .epoch = 1,
                                       .stage = stage,
                                       .n_stages = 2,
                                       .first_layer = stage,
                                       .n_layers = 1,
                                       .bounds = {SLOTS, 16, CONTEXT, VOCAB, POSITIONS}};
    struct executor *executor;
    ck_assert_msg(executor_new(&executor, &options, &error) == 0, "%s", error.text);
    weight_list_free(&list);
    return executor;
}

static int run_stage(struct executor *executor, uint64_t number)
{
    engine.plan.number = number;
    int status = executor_run(executor, &engine.plan, &engine.result, &error);
    step_plan_clear(&engine.plan);
    engine.plan.epoch = 1;
    return status;
}

START_TEST(test_the_first_stage_sends_residuals_and_reads_draws)
{
    if (!is_played(_i))
        return;
    struct executor *executor = new_stage(0);
    struct fake_link next = {.base = {&FAKE_OPS, _i}}, previous = {.base = {&FAKE_OPS, _i}};
    executor_set_links(executor, &next.base, &previous.base);
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 6), 2);
    ck_assert_int_eq(run_stage(executor, 0), 0);
    ck_assert_uint_eq(next.bytes, 6 * C * sizeof(float));
    ck_assert_uint_eq(engine.result.n_samples, 0);
    int32_t tokens[2] = {11, 12};
    previous.incoming = tokens;
    struct step_row *row = add_row(0, 6, 1);
    row->generated = row->from_sample = true;
    row->source_draw = 1;
    ck_assert_int_eq(run_stage(executor, 1), 0);
    ck_assert_uint_eq(previous.number, 0);
    ck_assert_uint_eq(previous.bytes, sizeof(tokens));
    ck_assert_uint_eq(next.number, 1);
    executor_free(executor);
}
END_TEST

START_TEST(test_draws_nobody_names_are_read_all_the_same)
{
    if (!is_played(_i))
        return;
    struct executor *executor = new_stage(0);
    struct fake_link next = {.base = {&FAKE_OPS, _i}}, previous = {.base = {&FAKE_OPS, _i}, .number = 99};
    executor_set_links(executor, &next.base, &previous.base);
    int32_t tokens[1] = {5};
    previous.incoming = tokens;
    add_open(0);
    add_pages(0, 0, 0, 1);
    uint32_t lag = 2 + (_i ? 1 : 2); // stages, and
    for (uint32_t step = 0; step < 20; step++) {
        drawing(add_row(0, step, 1), 1);
        ck_assert_int_eq(run_stage(executor, step), 0);
        ck_assert_uint_eq(previous.number, step <= lag ? 99 : step - lag - 1);
    }
    executor_free(executor);
}
END_TEST

START_TEST(test_a_drawn_token_beyond_the_vocabulary_is_refused)
{
    struct executor *executor = new_stage(0);
    struct fake_link next = {.base = {&FAKE_OPS}}, previous = {.base = {&FAKE_OPS}};
    executor_set_links(executor, &next.base, &previous.base);
    int32_t tokens[1] = {VOCAB};
    previous.incoming = tokens;
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 6), 1);
    ck_assert_int_eq(run_stage(executor, 0), 0);
    struct step_row *row = add_row(0, 6, 1);
    row->generated = row->from_sample = true;
    ck_assert_int_eq(run_stage(executor, 1), STATUS_CORRUPT);
    executor_free(executor);
}
END_TEST

START_TEST(test_the_last_stage_receives_samples_and_feeds_back)
{
    if (!is_played(_i))
        return;
    struct executor *executor = new_stage(1);
    struct fake_link next = {.base = {&FAKE_OPS, _i}}, previous = {.base = {&FAKE_OPS, _i}};
    executor_set_links(executor, &next.base, &previous.base);
    float residual[6 * C];
    for (int i = 0; i < 6 * C; i++)
        residual[i] = (float)(i % 13) / 13 - 0.4f;
    previous.incoming = residual;
    add_open(0);
    add_pages(0, 0, 0, 1);
    add_row(0, 0, 3);
    add_open(1);
    add_pages(1, 0, 1, 1);
    drawing(add_row(1, 0, 3), 2);
    ck_assert_int_eq(run_stage(executor, 0), 0);
    ck_assert_uint_eq(previous.bytes, sizeof(residual));
    ck_assert_uint_eq(next.bytes, 2 * sizeof(int32_t));
    ck_assert_uint_eq(engine.result.n_samples, 2);
    ck_assert_uint_eq(engine.result.samples[0].row, 1);
    add_row(0, 3, 1); // draws nothing: nothing to feed back
    ck_assert_int_eq(run_stage(executor, 1), 0);
    ck_assert_int_eq(next.sends, 1);
    // Only commands: nothing travels.
    step_plan_add_command(&engine.plan, STEP_CLOSE, 1);
    previous.number = 99;
    ck_assert_int_eq(run_stage(executor, 2), 0);
    ck_assert_uint_eq(previous.number, 99);
    previous.status = STATUS_UNAVAILABLE;
    add_row(0, 4, 1);
    ck_assert_int_eq(run_stage(executor, 3), STATUS_UNAVAILABLE);
    ck_assert_str_eq(error.text, "the fake link broke");
    executor_free(executor);
}
END_TEST

static int never_reached(struct device *device, uint64_t mark, struct error *to)
{
    return 0;
}

// What the device waits for may never come when a neighbour is gone, of either side.
START_TEST(test_a_wait_for_the_device_ends_when_a_neighbour_is_gone)
{
    change_ops();
    ops.reached = never_reached;
    struct executor *executor = new_stage(0);
    struct fake_link next = {.base = {&FAKE_OPS}, .gone = _i == 0},
                     previous = {.base = {&FAKE_OPS}, .gone = _i == 1};
    executor_set_links(executor, &next.base, &previous.base);
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 6), 1);
    ck_assert_int_eq(run_stage(executor, 0), STATUS_UNAVAILABLE);
    ck_assert_str_eq(error.text, "the fake neighbour is gone");
    ck_assert_int_eq(next.sends, 0);
    executor_free(executor);
}
END_TEST

// --- times ---

enum {
    DELAY_US = 20000,
    SLACK_US = 1000, // between the clocks of a device and the host
};

static void check_times(const struct step_times *before)
{
    const struct step_times *times = executor_times(engine.executor);
    ck_assert_uint_eq(times->number, engine.result.number);
    ck_assert_int_ge(times->begin_us, before->sent_us);
    ck_assert_int_ge(times->asks_us, times->begin_us);
    ck_assert_int_ge(times->ready_us, times->asks_us);
    ck_assert_int_ge(times->starts_us, times->ready_us);
    ck_assert_int_ge(times->computed_us, times->starts_us);
    ck_assert_int_ge(times->sent_us, times->computed_us);
    ck_assert_uint_eq(engine.result.compute_us + engine.result.wait_us, times->sent_us - times->begin_us);
}

// Steps of a stage, each slowed down by one of its neighbours: they are waits, whatever it computes
// meanwhile, and waits and computing together are no more than the time that passed.
static void check_slow_neighbour(uint32_t stage, struct fake_link *next, struct fake_link *previous)
{
    struct executor *executor = new_stage(stage), *whole = engine.executor;
    engine.executor = executor;
    executor_set_links(executor, &next->base, &previous->base);
    add_open(0);
    add_pages(0, 0, 0, 1);
    struct step_times before = {0};
    uint64_t waited = 0, computed = 0;
    int64_t begin = clock_now_us();
    for (uint32_t step = 0; step < 4; step++) {
        struct step_row *row = drawing(add_row(0, step, 1), 1);
        row->generated = row->from_sample = step > 0;
        row->source_step = step > 0 ? step - 1 : 0;
        ck_assert_msg(run_stage(executor, step) == 0, "%s", error.text);
        check_times(&before);
        before = *executor_times(executor);
        ck_assert_uint_eq(before.positions, 1);
        waited += engine.result.wait_us;
        computed += engine.result.compute_us;
    }
    ck_assert_uint_ge(waited, 3 * DELAY_US - SLACK_US);
    ck_assert_uint_gt(computed, 0);
    ck_assert_uint_le(waited + computed, (uint64_t)(clock_now_us() - begin) + SLACK_US);
    step_plan_add_command(&engine.plan, STEP_CLOSE, 0);
    ck_assert_int_eq(run_stage(executor, 4), 0);
    check_times(&before);
    ck_assert_uint_eq(executor_times(executor)->positions, 0);
    engine.executor = whole;
    executor_free(executor);
}

START_TEST(test_a_slow_neighbour_is_waited_for)
{
    static const float residual[C];
    static const int32_t tokens[1] = {7};
    if (!is_played(_i))
        return;
    for (uint32_t stage = 0; stage < 2; stage++) {
        for (int sends = 0; sends < 2; sends++) {
            struct fake_link next = {.base = {&FAKE_OPS, _i}}, previous = {.base = {&FAKE_OPS, _i}};
            previous.incoming = stage ? (const void *)residual : tokens;
            *(sends ? &next.delay_us : &previous.delay_us) = DELAY_US;
            if (!sends || stage == 0 || !_i) // draws that the device sends are nothing its step waits for
                check_slow_neighbour(stage, &next, &previous);
        }
    }
}
END_TEST

// A device that works behind the host's back: ten milliseconds from each stamp to the next.
static uint64_t n_stamps;
static int64_t stamps_from_us;

static uint64_t take_stamp(struct device *device)
{
    return n_stamps++;
}

static int64_t time_of_stamp(struct device *device, uint64_t stamp)
{
    return stamps_from_us + (int64_t)stamp * 10000;
}

START_TEST(test_times_are_those_of_the_device)
{
    static const float residual[C];
    static const int32_t tokens[1] = {7};
    if (!is_played(1))
        return;
    change_ops();
    ops.stamp = take_stamp;
    ops.stamp_us = time_of_stamp;
    n_stamps = 0;
    stamps_from_us = clock_now_us() + 100000000; // after all submissions
    struct executor *executor = new_stage((uint32_t)_i);
    struct fake_link next = {.base = {&FAKE_OPS, true}}, previous = {.base = {&FAKE_OPS, true}};
    previous.incoming = _i ? (const void *)residual : tokens;
    executor_set_links(executor, &next.base, &previous.base);
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 1), 1);
    ck_assert_int_eq(run_stage(executor, 0), 0);
    struct step_row *row = drawing(add_row(0, 1, 1), 1);
    row->generated = row->from_sample = true;
    ck_assert_int_eq(run_stage(executor, 1), 0);
    // From the end of the step before: its commands, the wait, what it computes, and on the first stage the
    // wait for room to send.
    ck_assert_uint_eq(engine.result.compute_us, 30000);
    ck_assert_uint_eq(engine.result.wait_us, _i ? 10000 : 20000);
    ck_assert_int_eq(executor_times(executor)->computed_us - executor_times(executor)->starts_us, 10000);
    ck_assert_uint_eq(n_stamps, 8);
    executor_free(executor);
}
END_TEST

START_TEST(test_steps_before_links_are_refused)
{
    struct executor *executor = new_stage(0);
    ck_assert_int_eq(run_stage(executor, 0), STATUS_INTERNAL);
    executor_free(executor);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("executor stages");
    TCase *tests = tcase_create("several stages");
    tcase_add_checked_fixture(tests, executor_fixture_set_up, executor_fixture_tear_down);
    tcase_set_timeout(tests, 60);
    tcase_add_loop_test(tests, test_the_first_stage_sends_residuals_and_reads_draws, 0, 2);
    tcase_add_loop_test(tests, test_draws_nobody_names_are_read_all_the_same, 0, 2);
    tcase_add_test(tests, test_a_drawn_token_beyond_the_vocabulary_is_refused);
    tcase_add_loop_test(tests, test_the_last_stage_receives_samples_and_feeds_back, 0, 2);
    tcase_add_loop_test(tests, test_a_wait_for_the_device_ends_when_a_neighbour_is_gone, 0, 2);
    tcase_add_loop_test(tests, test_a_slow_neighbour_is_waited_for, 0, 2);
    tcase_add_loop_test(tests, test_times_are_those_of_the_device, 0, 2);
    tcase_add_test(tests, test_steps_before_links_are_refused);
    suite_add_tcase(suite, tests);
    return suite;
}
