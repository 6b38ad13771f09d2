// The gRPC wrapper, server and client against each other over loopback and Unix sockets: every shape of call,
// every way for a call to end, and what may not happen (a callback after on_done, a queue past its bound).
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/rpc_client.h"
#include "common/rpc_server.h"
#include "tests/rpc_fixture.h"
#include "tests/suite.h"

// --- shapes of calls

START_TEST(unary)
{
    echo_once("hello");
    echo_once("");
    ck_assert(wait_counter(&seen.done, 2));
    ck_assert_int_eq(seen.cancelled, 0);
    ck_assert_int_eq(seen.sents, 2);
}
END_TEST

START_TEST(unary_over_unix_and_v6)
{
    char path[] = "/tmp/strata_rpc_XXXXXX", listen[128];
    ck_assert_ptr_nonnull(mkdtemp(path));
    snprintf(listen, sizeof(listen), "unix:%s/socket", path);
    start_server(listen, NULL);
    ck_assert_int_eq(port, 0);
    connect_to(address, NULL);
    echo_once("through a file");
    rpc_channel_free(channel);
    rpc_server_free(server);
    struct stat info;
    ck_assert_int_ne(stat(listen + 5, &info), 0); // the socket went with the server
    rmdir(path);
    server = NULL;
    channel = NULL;
    int probe = socket(AF_INET6, SOCK_STREAM, 0);
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    bool v6 = probe >= 0 && bind(probe, (struct sockaddr *)&any, sizeof(any)) == 0;
    if (probe >= 0)
        close(probe);
    if (!v6)
        return; // a machine without IPv6
    start_server("[::1]:0", NULL);
    connect_to(address, NULL);
    echo_once("and version six");
}
END_TEST

START_TEST(server_stream)
{
    struct rpc_stream *stream = ask("/t/Count", "500 100", 0);
    struct error error = {0};
    for (int i = 0; i < 500; i++) {
        char text[101];
        memset(text, 'a' + i % 26, 100);
        text[100] = '\0';
        expect_message(stream, text);
    }
    ck_assert_int_eq(receive_status(stream, &error), 0);
    ck_assert_int_eq(receive_status(stream, &error), 0); // and again
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.sents, 500);
    ck_assert_uint_eq(seen.last_queued, 0);
    ck_assert_int_eq(seen.cancelled, 0);
}
END_TEST

START_TEST(bidi)
{
    struct rpc_stream *stream = open_stream("/t/Chat", 0);
    struct error error = {0};
    for (int i = 0; i < 50; i++) {
        char text[32];
        snprintf(text, sizeof(text), "message %d", i);
        ck_assert_int_eq(rpc_stream_send(stream, text, strlen(text)), 0);
        expect_message(stream, text);
    }
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    ck_assert_int_eq(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.half_closes, 1);
    ck_assert_int_eq(seen.cancelled, 0);
}
END_TEST

static void *send_many(void *argument)
{
    struct rpc_stream *stream = argument;
    for (int i = 0; i < 300; i++)
        ck_assert_int_eq(rpc_stream_send(stream, &i, sizeof(i)), 0);
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    return NULL;
}

START_TEST(bidi_with_a_sender_beside_a_receiver)
{
    struct rpc_stream *stream = open_stream("/t/Chat", 0);
    struct error error = {0};
    pthread_t sender;
    pthread_create(&sender, NULL, send_many, stream);
    for (int i = 0; i < 300; i++) {
        uint8_t *bytes = NULL;
        size_t length = 0;
        int got;
        ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 1);
        ck_assert_uint_eq(length, sizeof(got));
        memcpy(&got, bytes, sizeof(got));
        ck_assert_int_eq(got, i);
        free(bytes);
    }
    ck_assert_int_eq(receive_status(stream, &error), 0);
    pthread_join(sender, NULL);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(metadata_both_ways)
{
    const char *const ours[] = {"x-request-id", "abc-1", "x-other", "2", NULL};
    struct rpc_stream *stream = NULL;
    struct error error = {0};
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Keep", 0, ours, false, &error), 0);
    ck_assert_int_eq(rpc_stream_send(stream, "x", 1), 0);
    struct rpc_call *call = take_kept();
    ck_assert_str_eq(seen.header, "abc-1");
    ck_assert_msg(strncmp(seen.peer, "ipv4:127.0.0.1:", 15) == 0, "%s", seen.peer);
    ck_assert(seen.deadline_us == INT64_MAX);
    ck_assert_ptr_null(rpc_call_metadata(call, "x-absent"));
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "x-answer", "42"), 0);
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "Bad Key", "42"), STATUS_INVALID);
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "x-bad", "line\nbreak"), STATUS_INVALID);
    ck_assert_int_eq(rpc_call_send(call, "y", 1), 0);
    ck_assert_int_eq(rpc_call_set_initial_metadata(call, "x-late", "1"), STATUS_CANCELLED);
    expect_message(stream, "y");
    ck_assert_str_eq(rpc_stream_metadata(stream, "x-answer"), "42");
    ck_assert_ptr_null(rpc_stream_metadata(stream, "x-late"));
    rpc_call_finish(call, STATUS_OK, NULL);
    ck_assert_int_eq(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    // The record outlives the call for those who hold it.
    ck_assert_str_eq(rpc_call_metadata(call, "x-request-id"), "abc-1");
    ck_assert_int_eq(rpc_call_send(call, "z", 1), STATUS_CANCELLED);
    rpc_call_finish(call, STATUS_OK, NULL);
    rpc_call_abort(call, STATUS_OK, NULL);
    rpc_call_unref(call);
}
END_TEST

START_TEST(bad_metadata_is_refused_by_the_client)
{
    const char *const upper[] = {"X-Upper", "1", NULL}, *const lines[] = {"x-lines", "a\nb", NULL};
    const char *many[80];
    for (int i = 0; i < 78; i++)
        many[i] = "x-many";
    many[78] = NULL;
    struct rpc_stream *stream = NULL;
    struct error error = {0};
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Echo", 0, upper, false, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "X-Upper"));
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Echo", 0, lines, false, &error), STATUS_INVALID);
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Echo", 0, many, false, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "32"));
}
END_TEST

// --- ends

START_TEST(failures_carry_their_sentence)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    static const char text[] = "100% wrong: \xC3\xA4\nsecond line";
    int status =
        rpc_call_unary(channel, "/t/Fail", text, strlen(text), 10 * SECOND, false, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_INVALID);
    ck_assert_str_eq(error.text, text);
    // A sentence too long for a header is cut, at a character.
    char longer[3001];
    for (int i = 0; i < 3000; i += 2)
        memcpy(longer + i, "\xC3\xA4", 3);
    struct rpc_stream *stream = ask("/t/Fail", longer, 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_INVALID);
    ck_assert_uint_eq(strlen(error.text) % 2, 0);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(unknown_methods_are_unimplemented)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    int status = rpc_call_unary(channel, "/no/Such", "", 0, 10 * SECOND, false, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_UNSUPPORTED);
    ck_assert_str_eq(error.text, "this server has no method /no/Such");
}
END_TEST

START_TEST(an_answer_before_the_message)
{
    struct error error = {0};
    struct rpc_stream *stream = open_stream("/t/Early", 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_UNAVAILABLE);
    ck_assert_str_eq(error.text, "not now");
    rpc_stream_send(stream, "late", 4); // either outcome is fine; it must return
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.messages, 0);
}
END_TEST

START_TEST(a_call_without_a_message)
{
    struct error error = {0};
    struct rpc_stream *stream = open_stream("/t/Echo", 0);
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "no request message"));
    rpc_stream_free(stream);
}
END_TEST

START_TEST(the_client_cancels_mid_stream)
{
    struct error error = {0};
    struct rpc_stream *stream = open_stream("/t/KeepChat", 0);
    ck_assert_int_eq(rpc_stream_send(stream, "x", 1), 0);
    struct rpc_call *call = take_kept();
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(rpc_call_send(call, "tick", 4), 0);
        expect_message(stream, "tick");
    }
    rpc_stream_cancel(stream);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_CANCELLED);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    ck_assert_int_eq(seen.half_closes, 0); // a cancel is not a half-close
    ck_assert_int_eq(rpc_call_send(call, "tick", 4), STATUS_CANCELLED);
    ck_assert_int_lt(rpc_stream_send(stream, "y", 1), 0);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

START_TEST(another_thread_cancels_a_receive)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    pthread_t canceller;
    pthread_create(&canceller, NULL, cancel_soon, stream);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_CANCELLED);
    pthread_join(canceller, NULL);
    rpc_stream_free(stream);
    rpc_call_unref(take_kept());
    ck_assert(wait_counter(&seen.cancelled, 1));
}
END_TEST

START_TEST(a_stream_freed_open_is_cancelled)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    rpc_stream_free(stream);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    rpc_call_unref(call);
}
END_TEST

START_TEST(the_client_vanishes)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    rpc_stream_free(stream);
    rpc_channel_free(channel);
    channel = NULL;
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    rpc_call_unref(call);
}
END_TEST

START_TEST(deadlines_end_calls_on_both_sides)
{
    struct error error = {0};
    int64_t before = clock_now_us();
    struct rpc_stream *stream = ask("/t/Keep", "x", SECOND / 2);
    struct rpc_call *call = take_kept();
    ck_assert_int_gt(seen.deadline_us, before);
    ck_assert_int_lt(seen.deadline_us, clock_now_us() + SECOND);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_DEADLINE);
    ck_assert_int_ge(clock_now_us() - before, SECOND / 2 - 10000);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 1);
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

START_TEST(the_server_aborts)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    rpc_call_abort(call, STATUS_UNAVAILABLE, "the pool is gone");
    rpc_call_abort(call, STATUS_INTERNAL, "the first word counts");
    ck_assert_int_eq(receive_status(stream, &error), STATUS_UNAVAILABLE);
    ck_assert_str_eq(error.text, "the pool is gone");
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.cancelled, 0);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

START_TEST(finish_comes_after_what_is_queued)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    for (int i = 0; i < 100; i++)
        ck_assert_int_eq(rpc_call_send(call, &(char){(char)i}, 1), 0);
    rpc_call_finish(call, STATUS_EXHAUSTED, "enough");
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    for (int i = 0; i < 100; i++) {
        uint8_t *bytes = NULL;
        size_t length = 0;
        ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 1);
        ck_assert_uint_eq(length, 1);
        ck_assert_int_eq(bytes[0], i);
        free(bytes);
    }
    ck_assert_int_eq(receive_status(stream, &error), STATUS_EXHAUSTED);
    ck_assert_str_eq(error.text, "enough");
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

// --- bounds

START_TEST(a_slow_reader_meets_the_queue_bound)
{
    rpc_fixture_set_up();
    start_server("127.0.0.1:0", &(struct rpc_server_options){.max_queued = 64});
    connect_to(address, NULL);
    struct error error = {0};
    // Far more than the windows and buffers between the two hold, and nobody reads.
    struct rpc_stream *stream = ask("/t/Count", "100000 65536", 0);
    ck_assert(wait_counter(&seen.done, 1));
    ck_assert_int_eq(seen.refusal, STATUS_EXHAUSTED);
    ck_assert_int_eq(seen.cancelled, 0);
    ck_assert_int_lt(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    echo_once("the connection still works");
    rpc_fixture_tear_down();
}
END_TEST

START_TEST(the_queue_of_a_reader_that_catches_up)
{
    struct error error = {0};
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    char block[1 << 14] = {0};
    size_t sent = 0;
    int status;
    while ((status = rpc_call_send(call, block, sizeof(block))) == STATUS_OK)
        sent++;
    ck_assert_int_eq(status, STATUS_EXHAUSTED);
    ck_assert_uint_ge(sent, 1024);
    for (size_t i = 0; i < sent; i++) {
        uint8_t *bytes = NULL;
        size_t length = 0;
        ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 1);
        ck_assert_uint_eq(length, sizeof(block));
        free(bytes);
    }
    ck_assert(wait_counter(&seen.sents, (int)sent));
    ck_assert_int_eq(rpc_call_send(call, "again", 5), STATUS_OK);
    expect_message(stream, "again");
    rpc_call_finish(call, STATUS_OK, NULL);
    ck_assert_int_eq(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    rpc_call_unref(call);
}
END_TEST

static int echo_bytes(size_t length, struct error *error)
{
    uint8_t *bytes = malloc(length), *back = NULL;
    size_t got = 0;
    for (size_t i = 0; i < length; i++)
        bytes[i] = (uint8_t)(i * 131 >> 3);
    *error = (struct error){0};
    int status = rpc_call_unary(channel, "/t/Echo", bytes, length, 30 * SECOND, false, &back, &got, error);
    if (status == 0) {
        ck_assert_uint_eq(got, length);
        ck_assert_mem_eq(bytes, back, length);
    }
    free(bytes);
    free(back);
    return status;
}

START_TEST(messages_at_the_limit_and_over)
{
    rpc_fixture_set_up();
    start_server("127.0.0.1:0", &(struct rpc_server_options){.max_message_bytes = 1 << 20});
    connect_to(address, NULL);
    struct error error;
    ck_assert_int_eq(echo_bytes(1 << 20, &error), 0);
    ck_assert_int_eq(echo_bytes((1 << 20) + 1, &error), STATUS_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(error.text, "1048577"));
    rpc_channel_free(channel);
    connect_to(address, &(struct rpc_channel_options){.max_message_bytes = 1000});
    ck_assert_int_eq(echo_bytes(1000, &error), 0);
    ck_assert_int_eq(echo_bytes(1001, &error), STATUS_EXHAUSTED);
    ck_assert(wait_counter(&seen.done, 4));
    rpc_fixture_tear_down();
}
END_TEST

START_TEST(calls_over_the_limit_are_refused)
{
    rpc_fixture_set_up();
    start_server("127.0.0.1:0", &(struct rpc_server_options){.max_calls = 2});
    connect_to(address, NULL);
    struct rpc_stream *one = ask("/t/Keep", "1", 0), *two = ask("/t/Keep", "2", 0);
    ck_assert(wait_counter(&seen.messages, 2));
    struct error error;
    struct rpc_stream *three = open_stream("/t/Keep", 0);
    ck_assert_int_eq(receive_status(three, &error), STATUS_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(error.text, "limit of 2 calls"));
    rpc_stream_free(one);
    rpc_stream_free(two);
    rpc_stream_free(three);
    rpc_call_unref(take_kept());
    ck_assert(wait_counter(&seen.done, 2));
    echo_once("room again");
    rpc_fixture_tear_down();
}
END_TEST

enum { CALLERS = 8, CALLS = 40 };

static void *call_many(void *argument)
{
    struct error error;
    for (int i = 0; i < CALLS; i++) {
        char text[64];
        snprintf(text, sizeof(text), "caller %p call %d", argument, i);
        switch (i % 4) {
        case 0:
            echo_once(text);
            break;
        case 1: {
            struct rpc_stream *stream = ask("/t/Count", "20 50", 0);
            ck_assert_int_eq(receive_status(stream, &error), 0);
            rpc_stream_free(stream);
            break;
        }
        case 2: {
            struct rpc_stream *stream = open_stream("/t/Chat", 0);
            ck_assert_int_eq(rpc_stream_send(stream, text, strlen(text)), 0);
            expect_message(stream, text);
            rpc_stream_free(stream); // cancels
            break;
        }
        default: {
            struct rpc_stream *stream = open_stream("/t/Count", 2000);
            if (rpc_stream_send(stream, "2000 50", 7) == 0)
                rpc_stream_half_close(stream);
            receive_status(stream, &error); // the deadline hits wherever it does
            rpc_stream_free(stream);
        }
        }
    }
    return NULL;
}

START_TEST(hundreds_of_calls_at_once)
{
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_many, (void *)(intptr_t)(i + 1)), 0);
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    struct rpc_stream *streams[300];
    for (int i = 0; i < 300; i++)
        streams[i] = ask("/t/Count", "10 10", 0);
    for (int i = 0; i < 300; i++) {
        struct error error;
        ck_assert_int_eq(receive_status(streams[i], &error), 0);
        rpc_stream_free(streams[i]);
    }
}
END_TEST

START_TEST(status_codes_go_there_and_back)
{
    static const int same[] = {STATUS_OK,          STATUS_INVALID,  STATUS_NOT_FOUND,      STATUS_EXHAUSTED,
                               STATUS_UNAVAILABLE, STATUS_CORRUPT,  STATUS_UNSUPPORTED,    STATUS_CANCELLED,
                               STATUS_DEADLINE,    STATUS_INTERNAL, STATUS_UNAUTHENTICATED};
    for (size_t i = 0; i < sizeof(same) / sizeof(same[0]); i++)
        ck_assert_int_eq(rpc_status_from_grpc(rpc_status_to_grpc(same[i])), same[i]);
    ck_assert_int_eq(rpc_status_to_grpc(STATUS_INVALID), 3);
    ck_assert_int_eq(rpc_status_to_grpc(STATUS_NO_MEMORY), 8);
    ck_assert_int_eq(rpc_status_to_grpc(STATUS_IO), 13);
    ck_assert_int_eq(rpc_status_to_grpc(-999), 13);
    for (int code = 0; code <= 20; code++)
        ck_assert_int_le(rpc_status_from_grpc(code), 0);
    ck_assert_int_eq(rpc_status_from_grpc(2), STATUS_INTERNAL);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("rpc");
    TCase *calls = tcase_create("calls");
    tcase_add_checked_fixture(calls, rpc_fixture_set_up_loopback, rpc_fixture_tear_down);
    tcase_set_timeout(calls, 60);
    tcase_add_test(calls, unary);
    tcase_add_test(calls, server_stream);
    tcase_add_test(calls, bidi);
    tcase_add_test(calls, bidi_with_a_sender_beside_a_receiver);
    tcase_add_test(calls, metadata_both_ways);
    tcase_add_test(calls, bad_metadata_is_refused_by_the_client);
    tcase_add_test(calls, failures_carry_their_sentence);
    tcase_add_test(calls, unknown_methods_are_unimplemented);
    tcase_add_test(calls, an_answer_before_the_message);
    tcase_add_test(calls, a_call_without_a_message);
    tcase_add_test(calls, the_client_cancels_mid_stream);
    tcase_add_test(calls, another_thread_cancels_a_receive);
    tcase_add_test(calls, a_stream_freed_open_is_cancelled);
    tcase_add_test(calls, the_client_vanishes);
    tcase_add_test(calls, deadlines_end_calls_on_both_sides);
    tcase_add_test(calls, the_server_aborts);
    tcase_add_test(calls, finish_comes_after_what_is_queued);
    tcase_add_test(calls, the_queue_of_a_reader_that_catches_up);
    tcase_add_test(calls, hundreds_of_calls_at_once);
    suite_add_tcase(suite, calls);
    TCase *ends = tcase_create("ends");
    tcase_add_checked_fixture(ends, rpc_fixture_set_up, rpc_fixture_tear_down);
    tcase_set_timeout(ends, 60);
    tcase_add_test(ends, unary_over_unix_and_v6);
    suite_add_tcase(suite, ends);
    TCase *bounds = tcase_create("bounds");
    tcase_set_timeout(bounds, 60);
    tcase_add_test(bounds, a_slow_reader_meets_the_queue_bound);
    tcase_add_test(bounds, messages_at_the_limit_and_over);
    tcase_add_test(bounds, calls_over_the_limit_are_refused);
    tcase_add_test(bounds, status_codes_go_there_and_back);
    suite_add_tcase(suite, bounds);
    return suite;
}
