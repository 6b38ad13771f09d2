// Servers and channels of the gRPC wrapper: stopping with calls under way, ports and sockets in use,
// addresses, servers that come late, TLS.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/rpc_client.h"
#include "common/rpc_server.h"
#include "tests/rpc_fixture.h"
#include "tests/suite.h"

// --- starting and stopping

// A call that ends well while the server stops; the server's thread waits in rpc_server_stop.
static void *read_to_the_end(void *argument)
{
    struct error error = {0};
    expect_message(argument, "bye");
    ck_assert_msg(receive_status(argument, &error) == 0, "%s", error.text);
    return NULL;
}

static void *finish_soon(void *argument)
{
    struct rpc_call *call = argument;
    clock_sleep_us(100000);
    rpc_call_send(call, "bye", 3);
    rpc_call_finish(call, STATUS_OK, NULL);
    rpc_call_unref(call);
    return NULL;
}

START_TEST(stop_lets_calls_end_within_the_grace)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    pthread_t finisher, reader;
    int64_t before = clock_now_us();
    pthread_create(&reader, NULL, read_to_the_end, stream);
    pthread_create(&finisher, NULL, finish_soon, call);
    rpc_server_stop(server, 20 * SECOND);
    ck_assert_int_lt(clock_now_us() - before, 10 * SECOND);
    ck_assert_int_eq(seen.done, 1);
    ck_assert_int_eq(seen.cancelled, 0);
    pthread_join(reader, NULL);
    pthread_join(finisher, NULL);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(stop_cancels_what_outlasts_the_grace)
{
    struct rpc_stream *stream = ask("/t/Keep", "x", 0);
    struct rpc_call *call = take_kept();
    int64_t before = clock_now_us();
    rpc_server_stop(server, SECOND / 5);
    ck_assert_int_ge(clock_now_us() - before, SECOND / 5 - 1000);
    ck_assert_int_eq(seen.done, 1);
    ck_assert_int_eq(seen.cancelled, 1);
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    struct error error;
    ck_assert_int_lt(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
    // The record is still the holder's after the server is gone.
    rpc_server_free(server);
    server = NULL;
    ck_assert_int_eq(rpc_call_send(call, "x", 1), STATUS_CANCELLED);
    rpc_call_unref(call);
}
END_TEST

static atomic_bool quit;

static void *call_until_told(void *argument)
{
    while (!atomic_load(&quit)) {
        struct error error = {0};
        struct rpc_stream *stream = NULL;
        ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Count", SECOND, NULL, false, &error), 0);
        if (rpc_stream_send(stream, "200 100", 7) == 0)
            rpc_stream_half_close(stream);
        receive_status(stream, &error);
        rpc_stream_free(stream);
    }
    return NULL;
}

START_TEST(stop_in_the_middle_of_traffic)
{
    pthread_t threads[4];
    atomic_store(&quit, false);
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, call_until_told, NULL);
    ck_assert(wait_counter(&seen.done, 20));
    rpc_server_stop(server, 1000);
    ck_assert_int_eq(read_counter(&seen.started), read_counter(&seen.done));
    atomic_store(&quit, true);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}
END_TEST

START_TEST(servers_that_never_start)
{
    struct error error = {0};
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    rpc_server_free(server);
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    ck_assert_int_eq(rpc_server_listen(server, "127.0.0.1:0", &port, &error), 0);
    rpc_server_free(server);
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    rpc_server_stop(server, 0);
    ck_assert_int_eq(rpc_server_start(server, &error), STATUS_INVALID);
    rpc_server_free(server);
    ck_assert_int_eq(rpc_server_new(&server, &(struct rpc_server_options){.threads = 1000}, &error),
                     STATUS_INVALID);
    server = NULL;
    rpc_server_free(NULL);
    rpc_channel_free(NULL);
    rpc_stream_free(NULL);
}
END_TEST

START_TEST(a_port_in_use_is_refused)
{
    struct error error = {0};
    struct rpc_server *second = NULL;
    ck_assert_int_eq(rpc_server_new(&second, NULL, &error), 0);
    ck_assert_int_eq(rpc_server_listen(second, address, NULL, &error), STATUS_UNAVAILABLE);
    char expected[200];
    snprintf(expected, sizeof(expected), "cannot listen on %s: Address already in use", address);
    ck_assert_str_eq(error.text, expected);
    ck_assert_int_eq(rpc_server_listen(server, "127.0.0.1:0", NULL, &error), STATUS_INVALID); // it runs
    rpc_server_free(second);
    echo_once("the first one is unharmed");
}
END_TEST

START_TEST(a_unix_socket_in_use_is_refused)
{
    char path[] = "/tmp/strata_rpc_XXXXXX", listen[128], file[128];
    ck_assert_ptr_nonnull(mkdtemp(path));
    snprintf(listen, sizeof(listen), "unix:%s/socket", path);
    snprintf(file, sizeof(file), "unix:%s/file", path);
    start_server(listen, NULL);
    connect_to(address, NULL);
    struct error error = {0};
    struct rpc_server *second = NULL;
    ck_assert_int_eq(rpc_server_new(&second, NULL, &error), 0);
    ck_assert_int_eq(rpc_server_listen(second, listen, NULL, &error), STATUS_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(error.text, "another process listens there"));
    FILE *plain = fopen(file + 5, "w");
    fclose(plain);
    ck_assert_int_eq(rpc_server_listen(second, file, NULL, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "not a socket"));
    unlink(file + 5);
    ck_assert_int_eq(rpc_server_listen(second, "unix:/no/such/folder/socket", NULL, &error),
                     STATUS_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(error.text, "No such file or directory"));
    rpc_server_free(second);
    echo_once("still there");
    rpc_server_free(server);
    // A socket nobody answers on any more is in nobody's way.
    int stale = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    snprintf(at.sun_path, sizeof(at.sun_path), "%.100s", listen + 5);
    ck_assert_int_eq(bind(stale, (struct sockaddr *)&at, sizeof(at)), 0);
    close(stale);
    start_server(listen, NULL);
    rpc_server_free(server);
    server = NULL;
    rmdir(path);
}
END_TEST

START_TEST(bad_addresses_are_refused)
{
    static const char *const bad[] = {"",
                                      "127.0.0.1",
                                      "127.0.0.1:",
                                      "127.0.0.1:http",
                                      "127.0.0.1:65536",
                                      "127.0.0.1:-1",
                                      ":50051",
                                      "::1:50051",
                                      "[::1]",
                                      "[]:1",
                                      "[::1]50051",
                                      "unix:",
                                      "127.0.0.1:1 2",
                                      "http://127.0.0.1:1"};
    struct error error;
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        error = (struct error){0};
        ck_assert_msg(rpc_server_listen(server, bad[i], &port, &error) == STATUS_INVALID, "%s", bad[i]);
        ck_assert_int_gt(strlen(error.text), 10);
        ck_assert_msg(rpc_channel_new(&channel, bad[i], NULL, &error) == STATUS_INVALID, "%s", bad[i]);
    }
    char deep[300] = "unix:/";
    memset(deep + 6, 'x', 200);
    ck_assert_int_eq(rpc_server_listen(server, deep, &port, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "201"));
    ck_assert_int_lt(rpc_server_listen(server, "no-such-host.invalid:1", &port, &error), 0);
    ck_assert_int_lt(rpc_server_listen(server, "192.0.2.1:0", &port, &error), 0); // nobody's
    ck_assert_ptr_nonnull(strstr(error.text, "192.0.2.1:0"));
    channel = NULL;
}
END_TEST

// A port that was free a moment ago.
static int free_port(void)
{
    int probe = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof(at);
    ck_assert_int_eq(bind(probe, (struct sockaddr *)&at, sizeof(at)), 0);
    ck_assert_int_eq(getsockname(probe, (struct sockaddr *)&at, &length), 0);
    close(probe);
    return ntohs(at.sin_port);
}

START_TEST(a_client_to_nowhere)
{
    char nowhere[64];
    snprintf(nowhere, sizeof(nowhere), "127.0.0.1:%d", free_port());
    connect_to(nowhere, NULL);
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    int64_t before = clock_now_us();
    int status = rpc_call_unary(channel, "/t/Echo", "x", 1, 20 * SECOND, false, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(error.text, "Connection refused"));
    ck_assert_int_lt(clock_now_us() - before, 10 * SECOND);
    // wait_for_ready keeps trying until the deadline,
    status = rpc_call_unary(channel, "/t/Echo", "x", 1, SECOND / 2, true, &bytes, &length, &error);
    ck_assert_int_eq(status, STATUS_DEADLINE);
    // and a stream that waits so can be given up.
    struct rpc_stream *stream = NULL;
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Chat", 0, NULL, true, &error), 0);
    pthread_t canceller;
    pthread_create(&canceller, NULL, cancel_soon, stream);
    ck_assert_int_lt(rpc_stream_send(stream, "x", 1), 0);
    ck_assert_int_eq(receive_status(stream, &error), STATUS_CANCELLED);
    pthread_join(canceller, NULL);
    rpc_stream_free(stream);
}
END_TEST

static void *say_late(void *stream)
{
    clock_sleep_us(5 * SECOND); // gRPC pings no more often than once a second
    ck_assert_int_eq(rpc_stream_send(stream, "late", 4), 0);
    return NULL;
}

// Many a server takes a client's keepalive pings for an attack and hangs up.
START_TEST(frequent_pings_are_welcome)
{
    start_server("127.0.0.1:0", NULL);
    connect_to(address, &(struct rpc_channel_options){.keepalive_us = SECOND / 50});
    struct rpc_stream *stream = open_stream("/t/Chat", 0);
    pthread_t speaker;
    pthread_create(&speaker, NULL, say_late, stream);
    expect_message(stream, "late");
    pthread_join(speaker, NULL);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(a_server_that_comes_later)
{
    char later[64];
    snprintf(later, sizeof(later), "127.0.0.1:%d", free_port());
    connect_to(later, NULL);
    struct error error = {0};
    struct rpc_stream *stream = NULL;
    ck_assert_int_eq(rpc_stream_open(&stream, channel, "/t/Chat", 20 * SECOND, NULL, true, &error), 0);
    clock_sleep_us(SECOND / 4);
    start_server(later, NULL);
    ck_assert_int_eq(rpc_stream_send(stream, "patience", 8), 0);
    expect_message(stream, "patience");
    // The server goes while the stream is open: the client learns it.
    rpc_server_stop(server, 0);
    ck_assert_int_lt(receive_status(stream, &error), 0);
    rpc_stream_free(stream);
}
END_TEST

START_TEST(tls_files_are_checked)
{
    struct error error = {0};
    struct rpc_server_options half = {.tls_cert = "/no/such.pem"};
    ck_assert_int_eq(rpc_server_new(&server, &half, &error), STATUS_INVALID);
    struct rpc_server_options missing = {.tls_cert = "/no/such.pem", .tls_key = "/no/such.key"};
    ck_assert_int_eq(rpc_server_new(&server, &missing, &error), STATUS_IO);
    ck_assert_ptr_nonnull(strstr(error.text, "/no/such.pem"));
    struct rpc_server_options wrong = {.tls_cert = "/proc/self/cmdline", .tls_key = "/proc/self/cmdline"};
    ck_assert_int_eq(rpc_server_new(&server, &wrong, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "not a PEM file"));
    struct rpc_channel_options lonely = {.tls_key = "/no/such.key"};
    ck_assert_int_eq(rpc_channel_new(&channel, "127.0.0.1:1", &lonely, &error), STATUS_INVALID);
    struct rpc_channel_options gone = {.tls_ca = "/no/such.pem"};
    ck_assert_int_eq(rpc_channel_new(&channel, "127.0.0.1:1", &gone, &error), STATUS_IO);
    server = NULL;
    channel = NULL;
}
END_TEST

START_TEST(tls_calls)
{
    char folder[] = "/tmp/strata_tls_XXXXXX", command[600], cert[64], key[64];
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(cert, sizeof(cert), "%s/cert.pem", folder);
    snprintf(key, sizeof(key), "%s/key.pem", folder);
    snprintf(command, sizeof(command),
             "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext "
             "subjectAltName=IP:127.0.0.1 "
             "-keyout %s -out %s 2>/dev/null",
             key, cert);
    bool made = system(command) == 0;
    if (made) {
        start_server("127.0.0.1:0",
                     &(struct rpc_server_options){.tls_cert = cert, .tls_key = key, .tls_ca = cert});
        connect_to(address, &(struct rpc_channel_options){.tls_ca = cert, .tls_cert = cert, .tls_key = key});
        echo_once("secret");
        rpc_channel_free(channel);
        struct error error = {0};
        uint8_t *bytes = NULL;
        size_t length = 0;
        connect_to(address, &(struct rpc_channel_options){.tls_ca = cert}); // no certificate of its own
        ck_assert_int_lt(
            rpc_call_unary(channel, "/t/Echo", "x", 1, 5 * SECOND, false, &bytes, &length, &error), 0);
        rpc_channel_free(channel);
        connect_to(address, NULL); // plaintext
        ck_assert_int_lt(
            rpc_call_unary(channel, "/t/Echo", "x", 1, 5 * SECOND, false, &bytes, &length, &error), 0);
    }
    unlink(cert);
    unlink(key);
    rmdir(folder);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("rpc_server");
    TCase *running = tcase_create("running");
    tcase_add_checked_fixture(running, rpc_fixture_set_up_loopback, rpc_fixture_tear_down);
    tcase_set_timeout(running, 60);
    tcase_add_test(running, stop_lets_calls_end_within_the_grace);
    tcase_add_test(running, stop_cancels_what_outlasts_the_grace);
    tcase_add_test(running, stop_in_the_middle_of_traffic);
    tcase_add_test(running, a_port_in_use_is_refused);
    suite_add_tcase(suite, running);
    TCase *own = tcase_create("own");
    tcase_add_checked_fixture(own, rpc_fixture_set_up, rpc_fixture_tear_down);
    tcase_set_timeout(own, 60);
    tcase_add_test(own, servers_that_never_start);
    tcase_add_test(own, a_unix_socket_in_use_is_refused);
    tcase_add_test(own, bad_addresses_are_refused);
    tcase_add_test(own, a_client_to_nowhere);
    tcase_add_test(own, a_server_that_comes_later);
    tcase_add_test(own, frequent_pings_are_welcome);
    tcase_add_test(own, tls_files_are_checked);
    tcase_add_test(own, tls_calls);
    suite_add_tcase(suite, own);
    return suite;
}
