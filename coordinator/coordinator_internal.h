// The hall's own parts: coordinator.c (the loop), coordinator_setup.c (opening and closing),
// coordinator_answer.c (one request's answer on its way out).
#ifndef STRATA_COORDINATOR_INTERNAL_H
#define STRATA_COORDINATOR_INTERNAL_H

#include <stdatomic.h>

#include "common/gguf.h"
#include "common/model_spec.h"
#include "common/queue.h"
#include "common/rpc_server.h"
#include "common/step_plan.h"
#include "common/tokenizer.h"
#include "coordinator/chat_template.h"
#include "coordinator/coordinator.h"
#include "coordinator/health.h"
#include "coordinator/metrics.h"
#include "coordinator/pipeline.h"
#include "coordinator/reflection.h"
#include "coordinator/scheduler.h"
#include "coordinator/service.h"
#include "coordinator/token_stream.h"
#include "coordinator/worker_pool.h"

// --- coordinator_answer.c ---

struct answer;

struct answer_options {
    const struct request *spec; // read by answer_new only
    const struct tokenizer *tokenizer;
    const char *const *stops;
    uint32_t n_stops;
    bool special;
    // Queues a response; `tokens` of credit come back when it went out.
    int (*send)(void *to, const struct wire_generate_response *response, uint32_t tokens);
    void *to;
};

struct answer_reply { // what the scheduler has to be told
    uint32_t credit;  // tokens that need no room in the stream (held back, or dropped)
    bool stop;        // a stop string is complete: this choice ends
};

uint64_t answer_tokens(const struct answer *answer); // sent on, of all choices
int answer_new(struct answer **out, const struct answer_options *options);
void answer_free(struct answer *answer);
// A TOKEN, PROMPT or CHOICE_END. Negative: a response could not be queued.
int answer_take(struct answer *answer, const struct scheduler_event *event, int64_t now_us,
                struct answer_reply *reply);

// --- the hall ---

enum {
    MAX_REQUESTS = 1 << 16, // in flight at once, whatever is configured
    STREAM_CREDIT = 256,    // tokens on their way to one client
    ADDRESS_BYTES = 256,
};

// A request between SERVICE_REQUEST and REQUEST_END.
struct stream {
    uint64_t id; // of the request; 0 = this stream is free
    struct service_call *call;
    struct answer *answer;
};

struct coordinator {
    struct coordinator_options options;
    // The model, constant.
    struct gguf *gguf;
    struct model_spec spec;
    struct tokenizer *tokenizer;
    char model_name[256];
    char *template_source; // NULL: the model has none
    char bos_text[256], eos_text[256];
    // The rooms.
    struct scheduler *scheduler;
    struct service *service;
    struct worker_pool *pool;
    struct pipeline *pipeline;
    struct chat_template *chat;
    struct health *health;
    struct metrics metrics;
    struct rpc_server *clients, *workers;
    char client_address[ADDRESS_BYTES], pool_address[ADDRESS_BYTES];

    struct queue *bell; // rung by whoever has news for the hall
    atomic_uint stops;  // times somebody asked for the end

    struct stream *streams; // [max_streams]
    uint32_t max_streams, n_streams;
    uint32_t *free_streams; // a stack of the indices that are free
    uint64_t next_serial;
    struct step_plan plan;

    bool draining, ended_all;
    int64_t drain_until_us;
    bool serving, announced; // as health and the service were told; whether `ready` was called
    bool stale;              // something changed since the pool's picture was published
    int64_t published_us;
    void (*ready)(const char *address);
    char sentence[1200]; // why_not's
};

#endif
