// A service that records what it sees, with a server and a channel: what the tests of the gRPC wrapper share.
// Each test file is a program of its own; one test at a time uses the globals.
#ifndef STRATA_TESTS_RPC_FIXTURE_H
#define STRATA_TESTS_RPC_FIXTURE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/rpc_client.h"
#include "common/rpc_server.h"

enum { SECOND = 1000000 };

// What the service saw. One record for all calls of a test.
struct seen {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int started, messages, half_closes, sents, done, cancelled, after_done, overlaps;
    size_t last_queued;
    int refusal; // what rpc_call_send said when it refused
    struct rpc_call *kept;
    int64_t deadline_us;
    char peer[128], header[128];
};

extern struct seen seen;
extern struct rpc_server *server;
extern struct rpc_channel *channel;
extern int port;
extern char address[128];

int read_counter(const int *counter);
// True when the counter reaches `value` within ten seconds.
bool wait_counter(const int *counter, int value);
void start_server(const char *listen, const struct rpc_server_options *options);
void connect_to(const char *to, const struct rpc_channel_options *options);
void rpc_fixture_set_up(void);
void rpc_fixture_tear_down(void);
// The same with a server on loopback and a channel to it.
void rpc_fixture_set_up_loopback(void);
struct rpc_stream *open_stream(const char *path, int64_t timeout_us);
// Opens a stream, sends one message and closes that direction.
struct rpc_stream *ask(const char *path, const char *request, int64_t timeout_us);
// The kept call, once the service has it. The reference is the caller's.
struct rpc_call *take_kept(void);
// Reads to the end: how the call ended.
int receive_status(struct rpc_stream *stream, struct error *error);
void expect_message(struct rpc_stream *stream, const char *text);
void echo_once(const char *text);
// A thread that cancels the stream it is given after a moment.
void *cancel_soon(void *stream);

#endif
