// Shared by the files of the service: service.c (calls), service_text.c (tokenize, detokenize, messages),
// service_check.c and service_chat.c (pure: a request judged, messages as JSON).
#ifndef STRATA_SERVICE_INTERNAL_H
#define STRATA_SERVICE_INTERNAL_H

#include <pthread.h>

#include "coordinator/service.h"

struct service {
    struct service_options options;
    struct queue *news; // of struct service_call *: those with news, each at most once
    struct wire_bytes model;

    pthread_mutex_t mutex; // over what follows
    uint32_t n_calls;
    int welcome;
    char unwelcome[1024]; // the sentence when not STATUS_OK
    struct wire_bytes pool;

    // The coordinator's thread only.
    struct wire_bytes bytes;
};

// --- service_check.c ---
// All that can be judged before the prompt's ids are known: STATUS_INVALID or STATUS_NOT_FOUND with a
// sentence.
int service_check_generate(const struct service_rules *rules, const struct wire_generate_request *asked,
                           struct error *error);
// The request with its prompt, which it takes over from `prompt`. STATUS_INVALID when it does not fit.
int service_make_request(const struct service_rules *rules, const struct wire_generate_request *asked,
                         struct token_list *prompt, struct request **out, struct error *error);
// The request id: the field, else the metadata value (may be NULL), else drawn. STATUS_INVALID when
// malformed.
int service_pick_id(const char *field, const char *metadata, char out[MAX_REQUEST_ID_BYTES + 1],
                    struct error *error);
uint64_t service_draw(void);

// --- service_chat.c ---
// What the template helper is sent (chat_template.h); free() it. NULL with a sentence.
char *service_chat_json(const struct wire_messages *messages, struct error *error);

// --- service_text.c ---
void service_tokenize(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length);
void service_detokenize(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length);
// Starts rendering; `done` runs once unless this fails.
int service_render(const struct service *service, const struct wire_messages *messages,
                   service_rendered *done, void *context, struct error *error);

#endif
