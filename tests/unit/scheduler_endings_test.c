// How requests and their choices end: by length, an end id or a stop, cancelled, late, or with their pool;
// and what of them is left in plans, pages and slots. Named cases, as in scheduler_test.c.
#include <string.h>

#include "tests/scheduler_fixture.h"
#include "tests/suite.h"

START_TEST(no_row_goes_beyond_the_last_token)
{
    start(1, 10);
    submit(request_of(1, 5, 1));
    ck_assert(plan_next());
    ck_assert(!plan_next());
    answer(7);
    expect_token(1, 0, 7);
    expect_choice_end(1, 0, FINISH_LENGTH, -1);
    expect_request_end(1, STATUS_OK);
    ck_assert_int_eq(event.started_us, now);
    expect_no_event();
    submit(request_of(2, 253, 100)); // room for three: the last at position 255 is never fed back
    ck_assert(plan_next() && plan_next());
    answered = 1;
    for (int i = 0; i < 2; i++)
        answer(1);
    while (plan_next()) {
        for (uint32_t r = 0; r < plan.n_rows; r++)
            ck_assert_uint_le(plan.rows[r].position + plan.rows[r].count, 255);
        answer(7);
    }
    for (int i = 0; i < 3; i++)
        expect_token(2, 0, 7);
    expect_choice_end(2, 0, FINISH_LENGTH, -1);
    expect_request_end(2, STATUS_OK);
    finish();
}
END_TEST

START_TEST(an_end_id_ends_and_is_not_emitted)
{
    start(1, 10);
    struct request *request = request_of(1, 5, 10);
    request->credit = 2;
    submit(request);
    ck_assert(plan_next() && plan_next());
    answer(END_ID);
    expect_choice_end(1, 0, FINISH_STOP, END_ID);
    expect_request_end(1, STATUS_OK);
    ck_assert_uint_eq(stats().slots_used, 0);
    ck_assert_uint_eq(stats().pages_free, 10);
    ck_assert(!plan_next());
    submit(request_of(2, 5, 10)); // gets the same slot and page while the row of the first is in flight
    ck_assert(plan_next());
    ck_assert_int_eq(plan.commands[0].kind, STEP_CLOSE);
    ck_assert_int_eq(plan.commands[1].kind, STEP_OPEN);
    ck_assert_uint_eq(plan.commands[0].slot, plan.commands[1].slot);
    answer(50); // dropped
    expect_no_event();
    answer(60);
    expect_token(2, 0, 60);
    finish();
}
END_TEST

START_TEST(choices_end_one_by_one)
{
    start(1, 10);
    struct request *request = request_of(1, 64, 10);
    request->n_choices = 3;
    request->credit = 4;
    submit(request);
    ck_assert(plan_next());
    answer(97); // 97, 98, and the end id for the last
    expect_token(1, 0, 97);
    expect_token(1, 1, 98);
    expect_choice_end(1, 2, FINISH_STOP, END_ID);
    ck_assert_uint_eq(stats().slots_used, 2);
    ck_assert_uint_eq(stats().pages_free, 10 - 3);
    ck_assert(plan_next()); // its credit is there again: 4 - 3 + 1
    ck_assert_uint_eq(plan.n_rows, 2);
    ck_assert_ptr_null(find_command(STEP_COPY, 0)); // the prompt filled its page
    ck_assert(!plan_next());
    scheduler_stop_choice(scheduler, 1, 0, now);
    expect_choice_end(1, 0, FINISH_STOP, -1);
    ck_assert(plan_next()); // with the credit of the row that was cut
    ck_assert_uint_eq(plan.n_rows, 1);
    answer(10); // of both; the first choice's goes nowhere
    expect_token(1, 1, 11);
    expect_no_event();
    scheduler_stop_choice(scheduler, 1, 1, now);
    expect_choice_end(1, 1, FINISH_STOP, -1);
    expect_request_end(1, STATUS_OK);
    finish();
}
END_TEST

START_TEST(a_stop_takes_back_what_was_not_taken)
{
    start(1, 10);
    submit(request_of(1, 5, 2));
    ck_assert(plan_next() && plan_next());
    answer(7);
    answer(8); // the last by length; all events wait
    expect_token(1, 0, 7);
    scheduler_stop_choice(scheduler, 1, 0, now); // its stop string ended with the first token
    expect_choice_end(1, 0, FINISH_STOP, -1);
    expect_request_end(1, STATUS_OK);
    expect_no_event();
    ck_assert_uint_eq(stats().output_tokens, 1);
    scheduler_stop_choice(scheduler, 1, 0, now); // long gone: ignored
    scheduler_credit(scheduler, 1, 5);
    scheduler_cancel(scheduler, 1, STATUS_CANCELLED, "late", now);
    expect_no_event();
    finish();
}
END_TEST

START_TEST(cancelled_work_stops_at_once)
{
    start(1, 10);
    struct request *request = request_of(1, 70, 10);
    request->n_choices = 2;
    submit(request);
    submit(request_of(2, 70, 10));
    ck_assert(plan_next());
    scheduler_cancel(scheduler, 1, STATUS_CANCELLED, "the client closed the call", now);
    scheduler_cancel(scheduler, 77, STATUS_CANCELLED, "nobody", now);
    expect_choice_end(1, 0, FINISH_CANCELLED, -1);
    expect_choice_end(1, 1, FINISH_CANCELLED, -1);
    expect_request_end(1, STATUS_CANCELLED);
    ck_assert_str_eq(event.text, "the client closed the call");
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.n_rows, 1);
    ck_assert_uint_eq(plan.rows[0].slot, 2);
    answer(1);
    expect_no_event();
    finish();
}
END_TEST

START_TEST(deadlines_end_requests_wherever_they_are)
{
    start(1, 2);
    struct request *running = request_of(1, 70, 10), *waiting = request_of(2, 70, 10);
    running->deadline_us = 5000;
    waiting->deadline_us = 4000;
    ck_assert_int_eq(scheduler_wake_us(scheduler), INT64_MAX);
    submit(running);
    submit(waiting);
    submit(request_of(3, 70, 10));
    ck_assert(plan_next());
    ck_assert_int_eq(scheduler_wake_us(scheduler), 4000);
    now = 3999;
    ck_assert(plan_next());
    expect_no_event();
    now = 4000;
    ck_assert(!plan_next());
    expect_choice_end(2, 0, FINISH_CANCELLED, -1);
    expect_request_end(2, STATUS_DEADLINE);
    ck_assert_ptr_nonnull(strstr(event.text, "waited"));
    ck_assert_int_eq(scheduler_wake_us(scheduler), 5000);
    answer(3);
    answer(4);
    expect_token(1, 0, 4);
    now = 6000;
    ck_assert(plan_next()); // the third gets the room
    expect_choice_end(1, 0, FINISH_CANCELLED, -1);
    expect_request_end(1, STATUS_DEADLINE);
    ck_assert_ptr_nonnull(strstr(event.text, "after 1 new token"));
    ck_assert_int_eq(scheduler_wake_us(scheduler), INT64_MAX);
    finish();
}
END_TEST

START_TEST(a_lost_pool_ends_what_ran_and_keeps_what_waits)
{
    start(2, 3);
    submit(request_of(1, 130, 10));
    submit(request_of(2, 130, 10));
    submit(request_of(3, 5, 10));
    ck_assert(plan_next() && plan_next());
    scheduler_pool_lost(scheduler, "worker a:1 is gone", now);
    expect_choice_end(1, 0, FINISH_CANCELLED, -1);
    expect_request_end(1, STATUS_UNAVAILABLE);
    ck_assert_str_eq(event.text, "worker a:1 is gone");
    expect_no_event();
    ck_assert(!plan_next());
    ck_assert_uint_eq(stats().waiting, 2);
    ck_assert_uint_eq(stats().pages_total, 0);
    ck_assert_int_eq(scheduler_pool_ready(scheduler, 2, 1, 2, now), STATUS_OK);
    expect_choice_end(2, 0, FINISH_CANCELLED, -1); // three pages, and there are two now
    expect_request_end(2, STATUS_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(event.text, "need 3 KV pages"));
    struct step_result late = {.epoch = 1, .number = 0};
    ck_assert_int_eq(scheduler_result(scheduler, &late, now, NULL), STATUS_OK); // of the old epoch
    ck_assert(plan_next());
    ck_assert_uint_eq(plan.epoch, 2);
    ck_assert_uint_eq(plan.number, 0);
    ck_assert_int_eq(plan.commands[0].kind, STEP_OPEN); // the new workers have nothing to close
    scheduler_pool_ready(scheduler, 3, 1, 2, now);      // replaced without a word
    expect_choice_end(3, 0, FINISH_CANCELLED, -1);
    expect_request_end(3, STATUS_UNAVAILABLE);
    finish();
}
END_TEST

// A request outlives its events by one: whoever takes them may still read its fields.
START_TEST(requests_are_freed_after_their_last_event)
{
    start(1, 10);
    submit(request_of(1, 5, 5));
    submit(request_of(2, 5, 5));
    scheduler_cancel(scheduler, 1, STATUS_CANCELLED, "gone", now);
    scheduler_cancel(scheduler, 2, STATUS_CANCELLED, "gone", now);
    for (int i = 0; i < 4; i++) {
        ck_assert(scheduler_next_event(scheduler, &event));
        ck_assert_uint_eq(event.spec->n_prompt, 5);
        ck_assert_int_eq(event.spec->prompt[4], 4);
    }
    expect_no_event();
    submit(request_of(1, 5, 5)); // freed by scheduler_free, with what waits in the queue
    scheduler_cancel(scheduler, 1, STATUS_CANCELLED, "gone", now);
    finish();
    scheduler_free(NULL);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("scheduler_endings");
    TCase *cases = tcase_create("cases");
    tcase_add_test(cases, no_row_goes_beyond_the_last_token);
    tcase_add_test(cases, an_end_id_ends_and_is_not_emitted);
    tcase_add_test(cases, choices_end_one_by_one);
    tcase_add_test(cases, a_stop_takes_back_what_was_not_taken);
    tcase_add_test(cases, cancelled_work_stops_at_once);
    tcase_add_test(cases, deadlines_end_requests_wherever_they_are);
    tcase_add_test(cases, a_lost_pool_ends_what_ran_and_keeps_what_waits);
    tcase_add_test(cases, requests_are_freed_after_their_last_event);
    suite_add_tcase(suite, cases);
    return suite;
}
