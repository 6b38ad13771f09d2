// Workers as they should be: joining, loading, linking, steps that give tokens, and the ways for a stream and
// a worker to end. How epochs fail is in worker_faults_test.c.
#include <string.h>

#include "common/clock.h"
#include "common/gguf.h"
#include "common/log.h"
#include "kernels/device.h"
#include "tests/suite.h"
#include "tests/worker_fixture.h"

START_TEST(test_hello_says_who_is_there)
{
    START_ONE(running);
    struct wire_worker_message hello = expect(join, WIRE_HELLO);
    ck_assert_str_eq(hello.worker, "one");
    ck_assert_uint_eq(hello.protocol, WIRE_POOL_PROTOCOL);
    ck_assert_str_eq(hello.backend, "cpu");
    ck_assert_uint_eq(hello.level, device_best_level("cpu", 0));
    ck_assert_ptr_nonnull(strstr(hello.device, "1 thread"));
    ck_assert_ptr_nonnull(strstr(hello.link_address, "127.0.0.1:"));
    ck_assert_uint_gt(hello.memory_free, 1000000);
    ck_assert_uint_gt(strlen(hello.host), 0);
    struct gguf *gguf;
    ck_assert_int_eq(gguf_open(&gguf, model, &error), 0);
    ck_assert_uint_eq(hello.fingerprint, gguf_fingerprint(gguf));
    gguf_close(gguf);
    expect(join, WIRE_HEARTBEAT);
    end_worker(&running);
}
END_TEST

START_TEST(test_epochs_of_one_worker)
{
    atomic_store(&patience, _i * 50);
    START_ONE(running);
    expect(join, WIRE_HELLO);
    int32_t tokens[3];
    uint64_t weight_bytes = 0;
    for (uint64_t epoch = 5; epoch < 8; epoch++) {
        struct wire_worker_message loaded = load(join, epoch, 0, 1);
        ck_assert_uint_gt(loaded.weight_bytes, 100000);
        ck_assert_uint_gt(loaded.kv_bytes, 0);
        ck_assert_uint_eq(loaded.n_weights, 3 + 9 * LAYERS);
        ck_assert(epoch == 5 || loaded.weight_bytes == weight_bytes);
        weight_bytes = loaded.weight_bytes;
        link_alone(join, epoch);
        for (uint64_t number = 0; number < 3; number++) {
            send_step(&join, 1, epoch, number);
            send_step(&join, 1, epoch - 1, number); // nobody runs this
        }
        for (uint64_t number = 0; number < 3; number++) {
            int32_t token = expect_token(join, epoch, number);
            ck_assert(epoch == 5 || token == tokens[number]);
            tokens[number] = token;
        }
        if (epoch == 5)
            abort_epoch(join, epoch); // otherwise the next assignment does it
    }
    end_worker(&running);
}
END_TEST

START_TEST(test_a_pipeline_gives_the_same_tokens_as_one_worker)
{
    atomic_store(&patience, _i * 50);
    struct running pair[2], single;
    struct join *stages[2], *alone;
    link_pair(pair, stages, 3);
    struct worker_options options = defaults();
    single = start_worker(&options, "single");
    run_in_thread(&single);
    alone = next_join(2);
    expect(alone, WIRE_HELLO);
    load(alone, 3, 0, 1);
    link_alone(alone, 3);
    for (uint64_t number = 0; number < 6; number++) { // ahead of their results
        send_step(stages, 2, 3, number);
        send_step(&alone, 1, 3, number);
    }
    for (uint64_t number = 0; number < 6; number++)
        ck_assert_int_eq(expect_token(stages[1], 3, number), expect_token(alone, 3, number));
    for (int i = 0; i < 2; i++)
        end_worker(&pair[i]);
    end_worker(&single);
}
END_TEST

// As when the coordinator deals the layers again by the times it was told: it does not say that the first
// epoch is over.
START_TEST(test_an_assignment_measures_and_the_next_one_moves_layers)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    struct wire_coordinator_message assign = assignment(3, 0, 2);
    assign.measure = true;
    tell(join, &assign);
    struct wire_worker_message loaded = expect(join, WIRE_LOADED);
    ck_assert_uint_gt(loaded.layer_ns, 0);
    ck_assert_uint_eq(loaded.head_ns, 0); // the other stage has it
    ck_assert_uint_eq(loaded.n_weights, 1 + 9 * 2);
    uint64_t bytes = loaded.weight_bytes;
    assign = assignment(4, 0, 2);
    assign.n_layers = 1;
    tell(join, &assign);
    loaded = expect(join, WIRE_LOADED);
    ck_assert_uint_eq(loaded.epoch, 4);
    ck_assert_uint_eq(loaded.n_weights, 1 + 9);
    ck_assert_uint_lt(loaded.weight_bytes, bytes);
    ck_assert_uint_eq(loaded.layer_ns, 0); // nobody asked
    assign = assignment(5, 0, 1);          // alone it has the head as well
    assign.measure = true;
    tell(join, &assign);
    loaded = expect(join, WIRE_LOADED);
    ck_assert_uint_gt(loaded.layer_ns, 0);
    ck_assert_uint_gt(loaded.head_ns, 0);
    link_alone(join, 5);
    send_step(&join, 1, 5, 0);
    expect_token(join, 5, 0);
    end_worker(&running);
}
END_TEST

START_TEST(test_a_lost_stream_keeps_the_weights)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    struct wire_worker_message before = load(join, 3, 0, 1);
    hang_up(join);
    join = next_join(1);
    ck_assert_uint_gt(expect(join, WIRE_HELLO).memory_free, before.weight_bytes);
    ck_assert_uint_eq(load(join, 4, 0, 1).weight_bytes, before.weight_bytes);
    stop_coordinator(); // and the whole coordinator goes and comes back on its port
    start_coordinator();
    join = next_join(0);
    expect(join, WIRE_HELLO);
    load(join, 5, 0, 1);
    link_alone(join, 5);
    send_step(&join, 1, 5, 0);
    expect_token(join, 5, 0);
    end_worker(&running);
}
END_TEST

START_TEST(test_goodbyes)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    tell(join, &(struct wire_coordinator_message){
                   .kind = WIRE_GOODBYE, .status = STATUS_UNAVAILABLE, .text = "come back", .retry = true});
    join = next_join(1);
    expect(join, WIRE_HELLO);
    tell(join, &(struct wire_coordinator_message){
                   .kind = WIRE_GOODBYE, .status = STATUS_INVALID, .text = "another model is served here"});
    ck_assert_int_eq(wait_worker(&running), STATUS_CANCELLED);
    ck_assert_ptr_nonnull(strstr(running.error.text, "another model is served here"));
}
END_TEST

START_TEST(test_a_lower_level_is_taken_over)
{
    START_ONE(running);
    expect(join, WIRE_HELLO);
    load(join, 3, 0, 1);
    struct wire_coordinator_message assign = assignment(4, 0, 1);
    assign.level = LEVEL_PORTABLE;
    tell(join, &assign);
    expect(join, WIRE_LOADED);
    link_alone(join, 4);
    send_step(&join, 1, 4, 0);
    expect_token(join, 4, 0);
    assign = assignment(5, 0, 1);
    assign.level = LEVEL_CUDA; // never on a CPU
    tell(join, &assign);
    expect(join, WIRE_FAILED);
    load(join, 6, 0, 1);
    end_worker(&running);
}

START_TEST(test_no_coordinator)
{
    struct worker_options options = defaults();
    options.coordinator = "127.0.0.1:1";
    options.connect_timeout_us = SECOND / 2;
    struct running running = start_worker(&options, "lonely");
    run_in_thread(&running);
    ck_assert_int_eq(wait_worker(&running), STATUS_DEADLINE);
    ck_assert_ptr_nonnull(strstr(running.error.text, "127.0.0.1:1"));
    options.connect_timeout_us = 0;
    running = start_worker(&options, "patient");
    run_in_thread(&running);
    clock_sleep_us(SECOND / 2);
    end_worker(&running);
}
END_TEST

START_TEST(test_what_is_wrong_at_the_start)
{
    struct worker *worker;
    struct worker_options options = defaults();
    options.model = "/no/such/model.gguf";
    ck_assert_int_eq(worker_new(&worker, &options, &error), STATUS_NOT_FOUND);
    options = defaults();
    options.listen_link = "nowhere";
    ck_assert_int_eq(worker_new(&worker, &options, &error), STATUS_INVALID);
    options = defaults();
    options.device.backend = "abacus";
    ck_assert_int_eq(worker_new(&worker, &options, &error), STATUS_UNSUPPORTED);
}
END_TEST

Suite *make_suite(void)
{
    log_init("worker_test", LOG_ERROR, 0);
    Suite *suite = suite_create("worker");
    TCase *tests = tcase_create("worker");
    tcase_add_checked_fixture(tests, worker_fixture_set_up, worker_fixture_tear_down);
    tcase_set_timeout(tests, 90);
    tcase_add_test(tests, test_hello_says_who_is_there);
    tcase_add_loop_test(tests, test_epochs_of_one_worker, 0, 2);
    tcase_add_loop_test(tests, test_a_pipeline_gives_the_same_tokens_as_one_worker, 0, 2);
    tcase_add_test(tests, test_an_assignment_measures_and_the_next_one_moves_layers);
    tcase_add_test(tests, test_a_lost_stream_keeps_the_weights);
    tcase_add_test(tests, test_goodbyes);
    tcase_add_test(tests, test_a_lower_level_is_taken_over);
    tcase_add_test(tests, test_no_coordinator);
    tcase_add_test(tests, test_what_is_wrong_at_the_start);
    suite_add_tcase(suite, tests);
    return suite;
}
