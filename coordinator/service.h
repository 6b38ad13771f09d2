// strata.v1.Inference on a gRPC server: Generate, Tokenize, Detokenize, GetModel, GetPool. gRPC threads parse
// a request, check it against the server's rules, turn its text into ids and leave it for the coordinator;
// they never wait for it. What the coordinator's thread knows of the pool is published here as bytes, so
// GetPool is answered even while that thread computes.
//
// News of a call (it has a request, a response went out, the client is gone) are flags on the call; a call
// with news is in a queue at most once and the queue has room for every call, so none is ever lost or waits.
#ifndef STRATA_SERVICE_H
#define STRATA_SERVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "common/arena.h"
#include "common/queue.h"
#include "common/rpc_server.h"
#include "common/status.h"
#include "common/tokenizer.h"
#include "coordinator/request.h"
#include "proto/wire.h"

struct service;
struct service_call; // one Generate call

// What requests are held to. Pointers outlive the service.
struct service_rules {
    const char *model_name;
    const struct tokenizer *tokenizer;
    uint32_t vocab_size;
    uint32_t context;   // positions of one sequence
    uint32_t max_slots; // sequences at once: choices of one request
    uint32_t credit;    // tokens on their way to one client
};

typedef void service_rendered(void *context, int status, const char *text, size_t length);

struct service_options {
    struct service_rules rules;
    const struct wire_model *model; // GetModel's answer
    uint32_t max_calls;             // Generate calls at once
    // Renders messages (chat_template_render's contract); NULL: the model has no template.
    int (*render)(void *renderer, const char *request_json, service_rendered *done, void *context,
                  struct error *error);
    void *renderer;
    struct queue *bell; // one-byte records: pushed to when there is something to take; may be NULL
};

int service_new(struct service **out, const struct service_options *options, struct error *error);
// After the server was stopped, and nothing renders any more.
void service_free(struct service *service);
int service_attach(struct service *service, struct rpc_server *server);
// Messages that may wait on one call: the rpc_server needs room for as many.
uint32_t service_max_queued(const struct service_rules *rules);

// --- for the coordinator's thread ---

// A request as asked: `request` is the taker's, the rest belongs to the call.
struct service_order {
    struct request *request;
    const char *const *stops;
    uint32_t n_stops;
    bool special; // control tokens come out as their text
    struct arena memory;
};

enum service_event_kind {
    SERVICE_REQUEST, // a call with its order; end it with service_finish
    SERVICE_CREDIT,  // `tokens` tokens went out
    SERVICE_GONE,    // nobody listens any more; end it with service_finish all the same
};
struct service_event {
    enum service_event_kind kind;
    struct service_call *call;
    uint64_t tag; // as set, 0 before
    struct service_order *order;
    uint32_t tokens;
};
bool service_next_event(struct service *service, struct service_event *event);
void service_set_tag(struct service_call *call, uint64_t tag);

// Queues a response whose going out is worth `tokens` (0 or 1) of credit. STATUS_CANCELLED: nobody listens.
int service_send(struct service_call *call, const struct wire_generate_response *response, uint32_t tokens);
// The call's one end; the pointer is the coordinator's no longer.
void service_finish(struct service_call *call, int status, const char *text);

// Whether new requests are welcome (STATUS_OK), or the status and sentence they are refused with.
void service_set_welcome(struct service *service, int status, const char *text);
void service_publish_pool(struct service *service, const struct wire_pool *pool);

#endif
