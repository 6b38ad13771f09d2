// What the gRPC wrapper costs: the round trip of a small unary call, and the rate at which one producer feeds
// 64 streams a small message each, round after round, as a decode step does. Server and clients share this
// process and its cores, so the rates are of both together; "send" is what the producer alone pays for a
// message.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/rpc_client.h"
#include "common/rpc_server.h"

enum { STREAMS = 64, ROUNDS = 1000, MESSAGE_BYTES = 40, UNARY_CALLS = 3000, WARM_UP = 200, SECOND = 1000000 };

static struct rpc_call *calls[STREAMS];
static int n_calls;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void on_echo(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    rpc_call_send(call, bytes, length);
    rpc_call_finish(call, STATUS_OK, NULL);
}

static void on_stream(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    rpc_call_ref(call);
    pthread_mutex_lock(&mutex);
    calls[n_calls++] = call;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&mutex);
}

static void check(int status, const struct error *error)
{
    if (status == 0)
        return;
    fprintf(stderr, "rpc_bench: %s\n", error->text);
    exit(EXIT_FAILURE);
}

static int by_time(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static void bench_unary(const char *address, const char *name)
{
    struct rpc_channel *channel;
    struct error error = {0};
    check(rpc_channel_new(&channel, address, NULL, &error), &error);
    static int64_t took[UNARY_CALLS];
    char request[MESSAGE_BYTES] = {0};
    for (int i = -WARM_UP; i < UNARY_CALLS; i++) {
        uint8_t *response;
        size_t length;
        int64_t before = clock_now_us();
        check(rpc_call_unary(channel, "/bench/Echo", request, sizeof(request), 10 * SECOND, true, &response,
                             &length, &error),
              &error);
        if (i >= 0)
            took[i] = clock_now_us() - before;
        free(response);
    }
    qsort(took, UNARY_CALLS, sizeof(*took), by_time);
    printf("unary round trip, %-8s  p50 %4lld us  p99 %4lld us  min %4lld us\n", name,
           (long long)took[UNARY_CALLS / 2], (long long)took[UNARY_CALLS * 99 / 100], (long long)took[0]);
    rpc_channel_free(channel);
}

static void *read_stream(void *argument)
{
    struct rpc_stream *stream = argument;
    struct error error = {0};
    uint8_t *bytes;
    size_t length, count = 0;
    int status;
    while ((status = rpc_stream_receive(stream, &bytes, &length, &error)) == 1) {
        free(bytes);
        count++;
    }
    check(status, &error);
    if (count != ROUNDS) {
        fprintf(stderr, "rpc_bench: %zu messages of %d arrived\n", count, ROUNDS);
        exit(EXIT_FAILURE);
    }
    return NULL;
}

// Sends a round to every stream. A full queue means that the readers are behind: wait for them a little.
static void feed(int64_t *sending_us)
{
    char message[MESSAGE_BYTES] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < STREAMS; i++) {
            int64_t before = clock_now_us();
            while (rpc_call_send(calls[i], message, sizeof(message)) == STATUS_EXHAUSTED) {
                clock_sleep_us(500);
                before = clock_now_us();
            }
            *sending_us += clock_now_us() - before;
        }
    }
}

static void bench_streams(const char *address, int connections)
{
    struct rpc_channel *channels[STREAMS];
    struct rpc_stream *streams[STREAMS];
    pthread_t readers[STREAMS];
    struct error error = {0};
    n_calls = 0;
    for (int i = 0; i < connections; i++)
        check(rpc_channel_new(&channels[i], address, NULL, &error), &error);
    for (int i = 0; i < STREAMS; i++) {
        check(rpc_stream_open(&streams[i], channels[i % connections], "/bench/Stream", 0, NULL, true, &error),
              &error);
        rpc_stream_send(streams[i], "x", 1);
        rpc_stream_half_close(streams[i]);
        pthread_create(&readers[i], NULL, read_stream, streams[i]);
    }
    pthread_mutex_lock(&mutex);
    while (n_calls < STREAMS)
        pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    int64_t before = clock_now_us(), sending_us = 0;
    feed(&sending_us);
    for (int i = 0; i < STREAMS; i++)
        rpc_call_finish(calls[i], STATUS_OK, NULL);
    for (int i = 0; i < STREAMS; i++)
        pthread_join(readers[i], NULL);
    double seconds = (double)(clock_now_us() - before) / 1e6, messages = (double)STREAMS * ROUNDS;
    printf("%d streams over %2d connections: %7.0f messages/s, send %4.1f us a message\n", STREAMS,
           connections, messages / seconds, (double)sending_us / messages);
    for (int i = 0; i < STREAMS; i++) {
        rpc_stream_free(streams[i]);
        rpc_call_unref(calls[i]);
    }
    for (int i = 0; i < connections; i++)
        rpc_channel_free(channels[i]);
}

int main(void)
{
    static const struct rpc_method echo = {.path = "/bench/Echo", .on_message = on_echo};
    static const struct rpc_method stream = {.path = "/bench/Stream", .on_message = on_stream};
    struct rpc_server *server;
    struct error error = {0};
    char folder[] = "/tmp/strata_bench_XXXXXX", by_file[64], by_port[64];
    int port;
    if (!mkdtemp(folder))
        return EXIT_FAILURE;
    snprintf(by_file, sizeof(by_file), "unix:%s/socket", folder);
    check(rpc_server_new(&server, NULL, &error), &error);
    check(rpc_server_listen(server, by_file, &port, &error), &error);
    check(rpc_server_listen(server, "127.0.0.1:0", &port, &error), &error);
    snprintf(by_port, sizeof(by_port), "127.0.0.1:%d", port);
    rpc_server_add(server, &echo, NULL);
    rpc_server_add(server, &stream, NULL);
    check(rpc_server_start(server, &error), &error);
    bench_unary(by_file, "unix");
    bench_unary(by_port, "loopback");
    bench_streams(by_port, 1);
    bench_streams(by_port, 8);
    bench_streams(by_port, 64);
    rpc_server_free(server);
    rmdir(folder);
    return EXIT_SUCCESS;
}
