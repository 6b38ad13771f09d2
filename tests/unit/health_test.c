// Health and reflection as a client sees them, on a real server.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/rpc_client.h"
#include "coordinator/health.h"
#include "coordinator/reflection.h"
#include "proto/wire.h"
#include "tests/suite.h"

#include "grpc/reflection/v1/reflection.pb-c.h"

enum { SECOND = 1000000 };

static struct rpc_server *server;
static struct rpc_channel *channel;
static struct health *health;

static void setup(void)
{
    struct error error = {0};
    char address[64];
    int port;
    ck_assert_int_eq(rpc_server_new(&server, NULL, &error), 0);
    ck_assert_int_eq(health_new(&health, server), 0);
    ck_assert_int_eq(reflection_add(server), 0);
    ck_assert_msg(rpc_server_listen(server, "127.0.0.1:0", &port, &error) == 0, "%s", error.text);
    ck_assert_int_eq(rpc_server_start(server, &error), 0);
    snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    ck_assert_int_eq(rpc_channel_new(&channel, address, NULL, &error), 0);
}

static void teardown(void)
{
    rpc_channel_free(channel);
    rpc_server_free(server);
    health_free(health);
}

// --- health

static int check(const char *service, enum wire_health *state)
{
    struct wire_bytes request = {0};
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    ck_assert_int_eq(wire_encode_health_request(&request, service), 0);
    int status = rpc_call_unary(channel, "/grpc.health.v1.Health/Check", request.data, request.length,
                                10 * SECOND, false, &bytes, &length, &error);
    if (!status)
        ck_assert_int_eq(wire_decode_health_response(state, bytes, length, &error), 0);
    free(bytes);
    wire_bytes_free(&request);
    return status;
}

static void expect_check(const char *service, enum wire_health expected)
{
    enum wire_health state = WIRE_HEALTH_UNKNOWN;
    ck_assert_int_eq(check(service, &state), 0);
    ck_assert_int_eq(state, expected);
}

START_TEST(checks)
{
    enum wire_health state;
    expect_check("", WIRE_HEALTH_NOT_SERVING);
    expect_check("strata.v1.Inference", WIRE_HEALTH_NOT_SERVING);
    expect_check("liveness", WIRE_HEALTH_SERVING);
    ck_assert_int_eq(check("strata.v1.Pool", &state), STATUS_NOT_FOUND);
    health_set_serving(health, true);
    expect_check("", WIRE_HEALTH_SERVING);
    expect_check("strata.v1.Inference", WIRE_HEALTH_SERVING);
    health_set_serving(health, false);
    expect_check("", WIRE_HEALTH_NOT_SERVING);
    expect_check("liveness", WIRE_HEALTH_SERVING);
}
END_TEST

START_TEST(malformed_checks)
{
    static const char *const paths[] = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"};
    for (int i = 0; i < 2; i++) {
        struct error error = {0};
        uint8_t *bytes = NULL;
        size_t length = 0;
        int status =
            rpc_call_unary(channel, paths[i], "\x0A\x01\xFF", 3, 10 * SECOND, false, &bytes, &length, &error);
        ck_assert_int_eq(status, STATUS_INVALID);
        ck_assert_ptr_nonnull(strstr(error.text, "UTF-8"));
        status =
            rpc_call_unary(channel, paths[i], "\x0A\x7F", 2, 10 * SECOND, false, &bytes, &length, &error);
        ck_assert_int_eq(status, STATUS_INVALID);
    }
}
END_TEST

static struct rpc_stream *watch(const char *service, int64_t timeout_us)
{
    struct wire_bytes request = {0};
    struct error error = {0};
    struct rpc_stream *stream = NULL;
    ck_assert_int_eq(wire_encode_health_request(&request, service), 0);
    ck_assert_int_eq(
        rpc_stream_open(&stream, channel, "/grpc.health.v1.Health/Watch", timeout_us, NULL, false, &error),
        0);
    ck_assert_int_eq(rpc_stream_send(stream, request.data, request.length), 0);
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    wire_bytes_free(&request);
    return stream;
}

static void expect_state(struct rpc_stream *stream, enum wire_health expected)
{
    struct error error = {0};
    enum wire_health state = WIRE_HEALTH_UNKNOWN;
    uint8_t *bytes = NULL;
    size_t length = 0;
    ck_assert_msg(rpc_stream_receive(stream, &bytes, &length, &error) == 1, "%s", error.text);
    ck_assert_int_eq(wire_decode_health_response(&state, bytes, length, &error), 0);
    ck_assert_int_eq(state, expected);
    free(bytes);
}

START_TEST(watches)
{
    struct rpc_stream *ready = watch("strata.v1.Inference", 20 * SECOND),
                      *alive = watch("liveness", 20 * SECOND), *unknown = watch("nobody", 20 * SECOND);
    expect_state(ready, WIRE_HEALTH_NOT_SERVING);
    expect_state(alive, WIRE_HEALTH_SERVING);
    expect_state(unknown, WIRE_HEALTH_SERVICE_UNKNOWN);
    for (int i = 0; i < 5; i++) {
        health_set_serving(health, true);
        health_set_serving(health, true); // no change, no message
        expect_state(ready, WIRE_HEALTH_SERVING);
        health_set_serving(health, false);
        expect_state(ready, WIRE_HEALTH_NOT_SERVING);
    }
    rpc_stream_free(unknown);
    health_set_serving(health, true);
    expect_state(ready, WIRE_HEALTH_SERVING);
    // A watch does not hold up a stop, and the others heard nothing in the meantime.
    int64_t before = clock_now_us();
    rpc_server_stop(server, 20 * SECOND);
    ck_assert_int_lt(clock_now_us() - before, 5 * SECOND);
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    ck_assert_int_eq(rpc_stream_receive(alive, &bytes, &length, &error), STATUS_UNAVAILABLE);
    ck_assert_int_eq(rpc_stream_receive(ready, &bytes, &length, &error), STATUS_UNAVAILABLE);
    rpc_stream_free(ready);
    rpc_stream_free(alive);
}
END_TEST

// The state changes far more often than a watcher's queue is long, while the watcher does not read. It reads
// until its deadline: not every change was told, the last one was.
START_TEST(a_slow_watcher_learns_the_last_state)
{
    struct rpc_stream *slow = watch("", 4 * SECOND);
    expect_state(slow, WIRE_HEALTH_NOT_SERVING);
    for (int i = 0; i < 50001; i++)
        health_set_serving(health, i % 2 == 0);
    enum wire_health state = WIRE_HEALTH_NOT_SERVING, next;
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    int told = 0, status;
    while ((status = rpc_stream_receive(slow, &bytes, &length, &error)) == 1) {
        ck_assert_int_eq(wire_decode_health_response(&next, bytes, length, &error), 0);
        ck_assert_int_ne(next, state);
        state = next;
        told++;
        free(bytes);
    }
    ck_assert_int_eq(status, STATUS_DEADLINE);
    ck_assert_int_eq(state, WIRE_HEALTH_SERVING);
    ck_assert_int_ge(told, 1024);
    ck_assert_int_lt(told, 50001);
    rpc_stream_free(slow);
}
END_TEST

static void *watch_and_leave(void *argument)
{
    for (int i = 0; i < 40; i++) {
        struct rpc_stream *stream = watch(i % 2 ? "" : "strata.v1.Inference", 20 * SECOND);
        struct error error = {0};
        uint8_t *bytes = NULL;
        size_t length = 0;
        for (int j = 0; j < i % 4; j++) {
            ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 1);
            free(bytes);
        }
        rpc_stream_free(stream);
    }
    return NULL;
}

START_TEST(watchers_come_and_go_while_the_state_changes)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, watch_and_leave, NULL);
    for (int i = 0; i < 2000; i++) {
        health_set_serving(health, i % 2);
        clock_sleep_us(500);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}
END_TEST

// --- reflection

typedef Grpc__Reflection__V1__ServerReflectionRequest request_t;
typedef Grpc__Reflection__V1__ServerReflectionResponse response_t;

static const char *const paths[] = {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};

static response_t *ask(struct rpc_stream *stream, request_t *request)
{
    struct error error = {0};
    uint8_t packed[512], *bytes = NULL;
    size_t length = 0;
    size_t size = grpc__reflection__v1__server_reflection_request__pack(request, packed);
    ck_assert_int_eq(rpc_stream_send(stream, packed, size), 0);
    ck_assert_msg(rpc_stream_receive(stream, &bytes, &length, &error) == 1, "%s", error.text);
    response_t *response = grpc__reflection__v1__server_reflection_response__unpack(NULL, length, bytes);
    ck_assert_ptr_nonnull(response);
    // What was asked comes back.
    ck_assert_ptr_nonnull(response->original_request);
    ck_assert_int_eq(response->original_request->message_request_case, request->message_request_case);
    free(bytes);
    return response;
}

static ProtobufCBinaryData text(const char *from)
{
    return (ProtobufCBinaryData){.data = (uint8_t *)from, .len = strlen(from)};
}

static response_t *ask_symbol(struct rpc_stream *stream, const char *symbol)
{
    request_t request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
    request.file_containing_symbol = text(symbol);
    return ask(stream, &request);
}

// True when the answer is the file of that name: field 1 of a file descriptor is its name.
static bool is_file(response_t *response, const char *name)
{
    bool file = response->message_response_case ==
                GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    if (file) {
        ck_assert_uint_eq(response->file_descriptor_response->n_file_descriptor_proto, 1);
        ProtobufCBinaryData bytes = response->file_descriptor_response->file_descriptor_proto[0];
        file = bytes.len > 2 + strlen(name) && bytes.data[0] == 0x0A && bytes.data[1] == strlen(name) &&
               memcmp(bytes.data + 2, name, strlen(name)) == 0;
    }
    grpc__reflection__v1__server_reflection_response__free_unpacked(response, NULL);
    return file;
}

static bool is_error(response_t *response, int code)
{
    bool error = response->message_response_case ==
                     GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE &&
                 response->error_response->error_code == code &&
                 response->error_response->error_message.len > 10;
    grpc__reflection__v1__server_reflection_response__free_unpacked(response, NULL);
    return error;
}

static struct rpc_stream *open_reflection(int version)
{
    struct error error = {0};
    struct rpc_stream *stream = NULL;
    ck_assert_int_eq(rpc_stream_open(&stream, channel, paths[version], 20 * SECOND, NULL, false, &error), 0);
    return stream;
}

static void close_reflection(struct rpc_stream *stream)
{
    struct error error = {0};
    uint8_t *bytes = NULL;
    size_t length = 0;
    ck_assert_int_eq(rpc_stream_half_close(stream), 0);
    ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), 0);
    rpc_stream_free(stream);
}

START_TEST(services_are_listed)
{
    static const char *const expected[] = {"strata.v1.Inference", "grpc.health.v1.Health",
                                           "grpc.reflection.v1.ServerReflection",
                                           "grpc.reflection.v1alpha.ServerReflection"};
    struct rpc_stream *stream = open_reflection(_i);
    request_t request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.host = text("localhost");
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
    request.list_services = text("*");
    response_t *response = ask(stream, &request);
    ck_assert_int_eq(
        response->message_response_case,
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE);
    ck_assert_uint_eq(response->valid_host.len, 9);
    ck_assert_uint_eq(response->list_services_response->n_service, 4); // and not the pool's
    for (size_t i = 0; i < 4; i++) {
        ProtobufCBinaryData name = response->list_services_response->service[i]->name;
        ck_assert_uint_eq(name.len, strlen(expected[i]));
        ck_assert_mem_eq(name.data, expected[i], name.len);
    }
    grpc__reflection__v1__server_reflection_response__free_unpacked(response, NULL);
    close_reflection(stream);
}
END_TEST

START_TEST(symbols_are_found)
{
    static const char inference[] = "strata/v1/inference.proto",
                      health_file[] = "grpc/health/v1/health.proto";
    struct rpc_stream *stream = open_reflection(_i);
    ck_assert(is_file(ask_symbol(stream, "strata.v1.Inference"), inference));
    ck_assert(is_file(ask_symbol(stream, "strata.v1.Inference.Generate"), inference));
    ck_assert(is_file(ask_symbol(stream, "strata.v1.GenerateRequest"), inference));
    ck_assert(is_file(ask_symbol(stream, "strata.v1.GenerateRequest.temperature"), inference));
    ck_assert(is_file(ask_symbol(stream, "strata.v1.GenerateRequest.input"), inference));
    ck_assert(is_file(ask_symbol(stream, "strata.v1.FinishReason"), inference));
    ck_assert(is_file(ask_symbol(stream, "strata.v1.FINISH_REASON_STOP"), inference));
    ck_assert(is_file(ask_symbol(stream, ".strata.v1.Usage"), inference));
    ck_assert(is_file(ask_symbol(stream, "grpc.health.v1.HealthCheckResponse.ServingStatus"), health_file));
    ck_assert(is_file(ask_symbol(stream, "grpc.health.v1.HealthCheckResponse.SERVING"), health_file));
    ck_assert(is_file(ask_symbol(stream, "grpc.health.v1.Health.Watch"), health_file));
    ck_assert(is_file(ask_symbol(stream, "grpc.reflection.v1.ServerReflection"),
                      "grpc/reflection/v1/reflection.proto"));
    ck_assert(is_file(ask_symbol(stream, "grpc.reflection.v1alpha.ServerReflection"),
                      "grpc/reflection/v1alpha/reflection.proto"));
    static const char *const absent[] = {"",
                                         ".",
                                         "strata",
                                         "strata.v1",
                                         "strata.v1.",
                                         "strata.v1.Pool",
                                         "strata.v1.StepPlan",
                                         "strata.v1.Inferenc",
                                         "strata.v1.InferenceX",
                                         "strata.v1.Inference.Gen",
                                         "strata.v1.Inference.Generate.x",
                                         "strata.v2.Inference",
                                         "Inference",
                                         "grpc.health.v1.SERVING"};
    for (size_t i = 0; i < sizeof(absent) / sizeof(absent[0]); i++)
        ck_assert_msg(is_error(ask_symbol(stream, absent[i]), 5), "\"%s\"", absent[i]);
    close_reflection(stream);
}
END_TEST

START_TEST(the_other_questions)
{
    struct rpc_stream *stream = open_reflection(_i);
    request_t request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    request.file_by_filename = text("strata/v1/inference.proto");
    ck_assert(is_file(ask(stream, &request), "strata/v1/inference.proto"));
    request.file_by_filename = text("strata/v1/pool.proto");
    ck_assert(is_error(ask(stream, &request), 5));

    Grpc__Reflection__V1__ExtensionRequest extension = GRPC__REFLECTION__V1__EXTENSION_REQUEST__INIT;
    extension.containing_type = text("strata.v1.Usage");
    extension.extension_number = 100;
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION;
    request.file_containing_extension = &extension;
    ck_assert(is_error(ask(stream, &request), 5));

    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE;
    request.all_extension_numbers_of_type = text("strata.v1.Usage");
    response_t *response = ask(stream, &request);
    ck_assert_int_eq(
        response->message_response_case,
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ALL_EXTENSION_NUMBERS_RESPONSE);
    ck_assert_uint_eq(response->all_extension_numbers_response->n_extension_number, 0);
    ck_assert_uint_eq(response->all_extension_numbers_response->base_type_name.len,
                      strlen("strata.v1.Usage"));
    grpc__reflection__v1__server_reflection_response__free_unpacked(response, NULL);
    request.all_extension_numbers_of_type = text("strata.v1.Inference"); // not a message
    ck_assert(is_error(ask(stream, &request), 5));

    request_t nothing = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    ck_assert(is_error(ask(stream, &nothing), 3)); // asks nothing
    close_reflection(stream);
}
END_TEST

START_TEST(a_malformed_question_ends_the_call)
{
    static const struct wire_text bad[] = {
        {"\x22\x05\x61", 3}, {"\x22\x01\xFF", 3}, {"\x3A\x01\xFF", 3}, {"\x0A\x01\xFF", 3}, {"\xFF", 1}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct rpc_stream *stream = open_reflection(0);
        struct error error = {0};
        uint8_t *bytes = NULL;
        size_t length = 0;
        ck_assert_int_eq(rpc_stream_send(stream, bad[i].data, bad[i].length), 0);
        ck_assert_int_eq(rpc_stream_receive(stream, &bytes, &length, &error), STATUS_INVALID);
        ck_assert_msg(strstr(error.text, "ServerReflectionRequest") != NULL, "%s", error.text);
        rpc_stream_free(stream);
    }
    // A very long name with broken characters where the sentence is cut.
    struct rpc_stream *stream = open_reflection(0);
    char name[400] = "a";
    for (int i = 1; i + 2 < 400; i += 2)
        memcpy(name + i, "\xC3\xA4", 3);
    ck_assert(is_error(ask_symbol(stream, name), 5));
    close_reflection(stream);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("health");
    TCase *tests = tcase_create("health and reflection");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, checks);
    tcase_add_test(tests, malformed_checks);
    tcase_add_test(tests, watches);
    tcase_add_test(tests, a_slow_watcher_learns_the_last_state);
    tcase_add_test(tests, watchers_come_and_go_while_the_state_changes);
    tcase_add_loop_test(tests, services_are_listed, 0, 2);
    tcase_add_loop_test(tests, symbols_are_found, 0, 2);
    tcase_add_loop_test(tests, the_other_questions, 0, 2);
    tcase_add_test(tests, a_malformed_question_ends_the_call);
    suite_add_tcase(suite, tests);
    return suite;
}
