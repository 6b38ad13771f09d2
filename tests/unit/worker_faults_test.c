// What goes wrong within an epoch: links, neighbours, memory, steps, messages and the device itself. A worker
// says what happened and is there for the next epoch; only a broken device ends it.
#include <stdio.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "tests/suite.h"
#include "tests/worker_fixture.h"
#include "worker/executor.h"

// The other side's mistake: this worker computes on a CPU.
START_TEST(test_a_link_that_cannot_be_ends_the_epoch_only)
{
    START_ONE(running);
    ck_assert_uint_eq(expect(join, WIRE_HELLO).nccl, 0);
    struct wire_coordinator_message assign = assignment(4, 0, 2);
    assign.next_link = WIRE_LINK_NCCL;
    tell(join, &assign);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 4);
    ck_assert_msg(strstr(failed.text, "NCCL, which is not here"), "%s", failed.text);
    ck_assert_uint_eq(load(join, 5, 0, 1).link_id.length, 0);
    link_alone(join, 5);
    end_worker(&running);
}
END_TEST

START_TEST(test_a_lost_neighbour_is_reported_and_survived)
{
    atomic_store(&patience, _i * 50);
    struct running pair[2];
    struct join *stages[2];
    link_pair(pair, stages, 3);
    send_step(stages, 2, 3, 0);
    expect_token(stages[1], 3, 0);
    end_worker(&pair[1]);
    for (uint64_t number = 1; number < 3; number++)
        send_step(stages, 1, 3, number);
    struct wire_worker_message failed = expect(stages[0], WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 3);
    ck_assert(failed.peer_lost);
    ck_assert(failed.has_step);
    ck_assert_ptr_nonnull(strstr(failed.text, "stage 1"));
    load(stages[0], 4, 0, 1); // goes on alone
    link_alone(stages[0], 4);
    send_step(stages, 1, 4, 0);
    expect_token(stages[0], 4, 0);
    end_worker(&pair[0]);
}
END_TEST

START_TEST(test_abort_wakes_a_worker_that_waits_for_its_neighbour)
{
    struct running pair[2];
    struct join *stages[2];
    link_pair(pair, stages, 3);
    send_step(stages + 1, 1, 3, 0); // the first stage never sends
    clock_sleep_us(SECOND / 10);
    abort_epoch(stages[1], 3);
    load(stages[1], 4, 0, 1);
    for (int i = 0; i < 2; i++)
        end_worker(&pair[i]);
}
END_TEST

START_TEST(test_abort_wakes_a_worker_that_links)
{
    START_ONE(running);
    char self[128];
    snprintf(self, sizeof(self), "%s", expect(join, WIRE_HELLO).link_address);
    load(join, 3, 0, 2);
    link_to(join, 3, "127.0.0.1:1"); // nobody is there
    clock_sleep_us(SECOND / 10);
    abort_epoch(join, 3);
    int64_t start = clock_now_us();
    load(join, 4, 0, 2);
    ck_assert_int_lt(clock_now_us() - start, 10 * SECOND);
    end_worker(&running);
}
END_TEST

START_TEST(test_what_cannot_be_loaded_is_said_and_survived)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    struct wire_coordinator_message wrong = assignment(2, 0, 1);
    wrong.n_layers = LAYERS + 1;
    tell(join, &wrong);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 2);
    ck_assert_int_eq(failed.status, STATUS_CORRUPT);
    wrong = assignment(3, 0, 1);
    wrong.n_pages = 1u << 31;
    tell(join, &wrong);
    failed = expect(join, WIRE_FAILED);
    ck_assert_int_eq(failed.status, STATUS_NO_MEMORY);
    ck_assert_ptr_nonnull(strstr(failed.text, "do not fit"));
    load(join, 4, 0, 1);
    end_worker(&running);
}
END_TEST

START_TEST(test_the_memory_budget_holds)
{
    struct worker_options options = defaults();
    options.memory = 300000;
    struct running running = start_worker(&options, "small");
    run_in_thread(&running);
    struct join *join = next_join(0);
    ck_assert_uint_eq(expect(join, WIRE_HELLO).memory_free, 300000);
    struct wire_coordinator_message assign = assignment(3, 0, 1);
    tell(join, &assign);
    ck_assert_int_eq(expect(join, WIRE_FAILED).status, STATUS_NO_MEMORY);
    end_worker(&running);
}
END_TEST

START_TEST(test_a_wrong_step_ends_its_epoch_only)
{
    atomic_store(&patience, _i * 50);
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    link_alone(join, 3);
    send_step(&join, 1, 3, 1); // step 0 is missing
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert(failed.has_step);
    ck_assert_uint_eq(failed.step, 1);
    ck_assert(!failed.peer_lost);
    send_step(&join, 1, 3, 0); // over: dropped
    load(join, 4, 0, 1);
    link_alone(join, 4);
    send_step(&join, 1, 4, 0);
    expect_token(join, 4, 0);
    end_worker(&running);
}
END_TEST

// The coordinator learns what happened, and the worker ends, whether the coordinator lets it go or not.
START_TEST(test_a_broken_device_ends_the_worker)
{
    atomic_store(&deaf, _i == 1);
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    link_alone(join, 3);
    send_step(&join, 1, 3, 0);
    expect_token(join, 3, 0);
    atomic_store(&broken, true);
    send_step(&join, 1, 3, 5);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 3);
    ck_assert_uint_eq(failed.step, 5);
    ck_assert_int_eq(wait_worker(&running), STATUS_INTERNAL);
    ck_assert_ptr_nonnull(strstr(running.error.text, "is broken"));
    ck_assert_int_eq(n_joins, 1);
}
END_TEST

// The fault shows elsewhere first: a neighbour's word ends the epoch, or its stream.
START_TEST(test_a_broken_device_is_found_at_the_end_of_an_epoch)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    atomic_store(&broken, true);
    if (_i == 0)
        abort_epoch(join, 3);
    else
        hang_up(join);
    ck_assert_int_eq(wait_worker(&running), STATUS_INTERNAL);
}
END_TEST

START_TEST(test_unfinished_steps_end_with_their_epoch)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    for (uint64_t epoch = 3; epoch < 6; epoch++) {
        load(join, epoch, 0, 1);
        link_alone(join, epoch);
        atomic_store(&patience, 0);
        send_step(&join, 1, epoch, 0);
        expect_token(join, epoch, 0);
        atomic_store(&patience, UINT32_MAX);
        for (uint64_t number = 1; number < 4 + EXECUTOR_DEPTH; number++) // some have to wait
            send_step(&join, 1, epoch, number);
        clock_sleep_us(SECOND / 20);
        if (epoch == 3)
            abort_epoch(join, epoch); // otherwise the next assignment does it, or the worker's end
    }
    end_worker(&running);
}
END_TEST

// The steps before the one that fails give their results.
START_TEST(test_a_wrong_step_behind_unfinished_ones)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    link_alone(join, 3);
    atomic_store(&patience, 50);
    send_step(&join, 1, 3, 0);
    send_step(&join, 1, 3, 1);
    send_step(&join, 1, 3, 5);
    expect_token(join, 3, 0);
    expect_token(join, 3, 1);
    ck_assert_uint_eq(expect(join, WIRE_FAILED).step, 5);
    end_worker(&running);
}
END_TEST

START_TEST(test_nonsense_ends_the_epoch_only)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    tell_nonsense(join);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_int_eq(failed.status, STATUS_CORRUPT);
    ck_assert_uint_eq(failed.epoch, 3);
    load(join, 4, 0, 1);
    end_worker(&running);
}
END_TEST

START_TEST(test_more_steps_than_a_worker_keeps)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 2);
    link_to(join, 3, "127.0.0.1:1"); // keeps the device's thread busy
    for (uint64_t number = 0; number < 300; number++)
        send_step(&join, 1, 3, number);
    struct wire_worker_message failed = expect(join, WIRE_FAILED);
    ck_assert_uint_eq(failed.epoch, 3);
    ck_assert_int_eq(failed.status, STATUS_EXHAUSTED);
    load(join, 4, 0, 1);
    end_worker(&running);
}
END_TEST

Suite *make_suite(void)
{
    log_init("worker_faults_test", LOG_ERROR, 0);
    Suite *suite = suite_create("worker_faults");
    TCase *tests = tcase_create("worker_faults");
    tcase_add_checked_fixture(tests, worker_fixture_set_up, worker_fixture_tear_down);
    tcase_set_timeout(tests, 90);
    tcase_add_test(tests, test_a_link_that_cannot_be_ends_the_epoch_only);
    tcase_add_loop_test(tests, test_a_lost_neighbour_is_reported_and_survived, 0, 2);
    tcase_add_test(tests, test_abort_wakes_a_worker_that_waits_for_its_neighbour);
    tcase_add_test(tests, test_abort_wakes_a_worker_that_links);
    tcase_add_test(tests, test_what_cannot_be_loaded_is_said_and_survived);
    tcase_add_test(tests, test_the_memory_budget_holds);
    tcase_add_loop_test(tests, test_a_wrong_step_ends_its_epoch_only, 0, 2);
    tcase_add_loop_test(tests, test_a_broken_device_ends_the_worker, 0, 2);
    tcase_add_loop_test(tests, test_a_broken_device_is_found_at_the_end_of_an_epoch, 0, 2);
    tcase_add_test(tests, test_unfinished_steps_end_with_their_epoch);
    tcase_add_test(tests, test_a_wrong_step_behind_unfinished_ones);
    tcase_add_test(tests, test_nonsense_ends_the_epoch_only);
    tcase_add_test(tests, test_more_steps_than_a_worker_keeps);
    suite_add_tcase(suite, tests);
    return suite;
}
