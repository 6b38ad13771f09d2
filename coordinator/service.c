// The calls of strata.v1.Inference. Top: gRPC threads (and, for messages, the chat template's thread) take a
// Generate request from its bytes to a checked, tokenized `struct request` left on the call. Bottom: the
// coordinator's thread takes it from there and writes responses.
//
// Life of a call: two holders, the gRPC side until on_done has been read by the coordinator's thread, and
// that thread itself from SERVICE_REQUEST to service_finish; a rendering under way is a third. The last one
// frees it. Every call gets exactly one end: `refuse` before it was left for the coordinator, service_finish
// after.
#include "coordinator/service_internal.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"

enum news { NEWS_POSTED = 1, NEWS_REQUEST = 2, NEWS_SENT = 4, NEWS_GONE = 8 };

struct service_call {
    struct service *service;
    struct rpc_call *rpc;
    atomic_uint holders;
    atomic_uint news; // bits of enum news
    atomic_uint sent; // messages that went out since the last look

    // From arrival until the request is left for the coordinator: one gRPC or template thread at a time.
    char name[MAX_REQUEST_ID_BYTES + 1];
    int64_t arrived_us;
    struct arena arena; // behind `asked`
    struct wire_generate_request asked;
    struct service_order order;

    // The coordinator's thread only.
    bool taken; // between SERVICE_REQUEST and service_finish
    bool gone;
    uint64_t tag;
    uint32_t worth_first, worth_count; // a ring: what each message that is still queued gives back
    uint8_t worth[];
};

uint32_t service_max_queued(const struct service_rules *rules)
{
    // The tokens in flight, an end for each choice, and room for the parts of long prompt logprobs.
    return rules->credit + MAX_CHOICES + 1024;
}

// --- news: any thread ---

static void post(struct service_call *call, unsigned news)
{
    struct service *service = call->service;
    unsigned before = atomic_fetch_or(&call->news, news | NEWS_POSTED);
    char stroke = 1;
    if (!(before & NEWS_POSTED)) {
        atomic_fetch_add(&call->holders, 1);
        queue_try_push(service->news, &call); // has room for every call
    }
    if (service->options.bell)
        queue_try_push(service->options.bell, &stroke); // a full bell rings already
}

static void release(struct service_call *call)
{
    struct service *service = call->service;
    if (atomic_fetch_sub(&call->holders, 1) != 1)
        return;
    rpc_call_unref(call->rpc);
    request_free(call->order.request);
    arena_free(&call->order.memory);
    arena_free(&call->arena);
    free(call);
    pthread_mutex_lock(&service->mutex);
    service->n_calls--;
    pthread_mutex_unlock(&service->mutex);
}

// --- Generate: from bytes to a request ---

// Counts the call in. NULL: too many are in flight, or memory is out.
static struct service_call *call_new(struct service *service, struct rpc_call *rpc, struct error *error)
{
    pthread_mutex_lock(&service->mutex);
    bool admitted = service->n_calls < service->options.max_calls;
    service->n_calls += admitted;
    pthread_mutex_unlock(&service->mutex);
    if (!admitted) {
        error_set(error, STATUS_EXHAUSTED, "this server takes at most %u requests at once: try again later",
                  service->options.max_calls);
        return NULL;
    }
    struct service_call *call = calloc(1, sizeof(*call) + service_max_queued(&service->options.rules));
    if (!call) {
        pthread_mutex_lock(&service->mutex);
        service->n_calls--;
        pthread_mutex_unlock(&service->mutex);
        error_set(error, STATUS_NO_MEMORY, "the server is out of memory");
        return NULL;
    }
    call->service = service;
    call->rpc = rpc;
    call->arrived_us = clock_now_us();
    call->name[0] = '-'; // until it has one
    atomic_init(&call->holders, 1);
    rpc_call_ref(rpc);
    rpc_call_set_context(rpc, call);
    return call;
}

static void refuse(struct service_call *call, int status, const char *text)
{
    log_info("request %s from %s is refused: %s", call->name, rpc_call_peer(call->rpc), text);
    rpc_call_finish(call->rpc, status, text);
}

// The stop strings outlive the bytes of the request, which may be large.
static bool keep_order(struct service_call *call)
{
    struct service_order *order = &call->order;
    const struct wire_generate_request *asked = &call->asked;
    const char **stops = arena_alloc(&order->memory, asked->n_stop + 1, sizeof(*stops));
    for (uint32_t i = 0; stops && i < asked->n_stop; i++) {
        stops[i] = arena_copy(&order->memory, asked->stop[i], strlen(asked->stop[i]));
        if (!stops[i])
            return false;
    }
    order->stops = stops;
    order->n_stops = asked->n_stop;
    order->special = asked->echo_special;
    return stops != NULL;
}

// The prompt's ids are known: leaves the request for the coordinator.
static void leave_request(struct service_call *call, struct token_list *prompt)
{
    struct error error = {0};
    struct request *request;
    if (service_make_request(&call->service->options.rules, &call->asked, prompt, &request, &error)) {
        refuse(call, error.status, error.text);
        return;
    }
    request->name = strdup(call->name);
    request->arrived_us = call->arrived_us;
    request->deadline_us = rpc_call_deadline_us(call->rpc);
    call->order.request = request;
    if (!request->name || !keep_order(call)) {
        refuse(call, STATUS_NO_MEMORY, "the server is out of memory");
        return;
    }
    arena_free(&call->arena);
    post(call, NEWS_REQUEST);
}

static void leave_text(struct service_call *call, const char *text, size_t length, unsigned flags)
{
    struct error error = {0};
    struct token_list prompt = {0};
    if (tokenizer_encode(call->service->options.rules.tokenizer, text, length, flags, &prompt, &error))
        refuse(call, error.status, error.text);
    else
        leave_request(call, &prompt);
    token_list_free(&prompt);
}

static void leave_tokens(struct service_call *call)
{
    struct token_list prompt = {0};
    bool fits = true;
    for (uint32_t i = 0; fits && i < call->asked.n_tokens; i++)
        fits = token_list_push(&prompt, call->asked.tokens[i]) == STATUS_OK;
    if (fits)
        leave_request(call, &prompt);
    else
        refuse(call, STATUS_NO_MEMORY, "the server is out of memory");
    token_list_free(&prompt);
}

// On the template's thread. The template writes its own BOS, so none is added.
static void rendered(void *context, int status, const char *text, size_t length)
{
    struct service_call *call = context;
    if (status)
        refuse(call, status, text);
    else
        leave_text(call, text, length, ENCODE_SPECIAL);
    release(call);
}

static void leave_messages(struct service_call *call)
{
    struct error error = {0};
    atomic_fetch_add(&call->holders, 1);
    if (service_render(call->service, &call->asked.messages, rendered, call, &error)) {
        refuse(call, error.status, error.text);
        release(call);
    }
}

static int check_welcome(struct service *service, struct error *error)
{
    pthread_mutex_lock(&service->mutex);
    int status = service->welcome;
    if (status)
        error_set(error, status, "%s", service->unwelcome);
    pthread_mutex_unlock(&service->mutex);
    return status;
}

static void generate_message(struct rpc_call *rpc, void *context, const uint8_t *bytes, size_t length)
{
    struct service *service = context;
    struct error error = {0};
    struct service_call *call = call_new(service, rpc, &error);
    if (!call) {
        rpc_call_finish(rpc, error.status, error.text);
        return;
    }
    int status = wire_decode_generate_request(&call->asked, bytes, length, &call->arena, &error);
    if (!status)
        status = service_pick_id(call->asked.request_id, rpc_call_metadata(rpc, "x-request-id"), call->name,
                                 &error);
    if (!status)
        status = rpc_call_set_initial_metadata(rpc, "x-request-id", call->name);
    if (!status)
        status = service_check_generate(&service->options.rules, &call->asked, &error);
    if (!status)
        status = check_welcome(service, &error);
    const struct wire_generate_request *asked = &call->asked;
    if (status)
        refuse(call, status, error.text);
    else if (asked->input == WIRE_INPUT_MESSAGES)
        leave_messages(call);
    else if (asked->input == WIRE_INPUT_TOKENS)
        leave_tokens(call);
    else
        leave_text(call, asked->text.data, asked->text.length,
                   (asked->parse_special ? ENCODE_SPECIAL : 0) |
                       (asked->add_special ? ENCODE_ADD_SPECIAL : 0));
}

static void generate_sent(struct rpc_call *rpc, void *service, size_t queued)
{
    struct service_call *call = rpc_call_context(rpc);
    if (!call)
        return;
    atomic_fetch_add(&call->sent, 1);
    post(call, NEWS_SENT);
}

static void generate_done(struct rpc_call *rpc, void *service, bool cancelled)
{
    struct service_call *call = rpc_call_context(rpc);
    if (call)
        post(call, NEWS_GONE);
}

// --- answers from what was published ---

static void get_model(struct rpc_call *call, void *context, const uint8_t *bytes, size_t length)
{
    struct service *service = context;
    rpc_call_send(call, service->model.data, service->model.length);
    rpc_call_finish(call, STATUS_OK, "");
}

static void get_pool(struct rpc_call *call, void *context, const uint8_t *bytes, size_t length)
{
    struct service *service = context;
    pthread_mutex_lock(&service->mutex);
    rpc_call_send(call, service->pool.data, service->pool.length);
    pthread_mutex_unlock(&service->mutex);
    rpc_call_finish(call, STATUS_OK, "");
}

// --- life ---

int service_new(struct service **out, const struct service_options *options, struct error *error)
{
    struct service *service = calloc(1, sizeof(*service));
    if (!service)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    service->options = *options;
    service->welcome = STATUS_UNAVAILABLE;
    snprintf(service->unwelcome, sizeof(service->unwelcome), "the server is starting");
    pthread_mutex_init(&service->mutex, NULL);
    if (queue_new(&service->news, sizeof(struct service_call *), options->max_calls) ||
        wire_encode_model(&service->model, options->model)) {
        service_free(service);
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    }
    *out = service;
    return STATUS_OK;
}

int service_attach(struct service *service, struct rpc_server *server)
{
    static const struct rpc_method methods[] = {
        {.path = "/strata.v1.Inference/Generate",
         .on_message = generate_message,
         .on_sent = generate_sent,
         .on_done = generate_done},
        {.path = "/strata.v1.Inference/Tokenize", .on_message = service_tokenize},
        {.path = "/strata.v1.Inference/Detokenize", .on_message = service_detokenize},
        {.path = "/strata.v1.Inference/GetModel", .on_message = get_model},
        {.path = "/strata.v1.Inference/GetPool", .on_message = get_pool},
    };
    int status = STATUS_OK;
    for (size_t i = 0; !status && i < sizeof(methods) / sizeof(methods[0]); i++)
        status = rpc_server_add(server, &methods[i], service);
    return status;
}

void service_free(struct service *service)
{
    if (!service)
        return;
    struct service_event event;
    while (service->news && service_next_event(service, &event)) {
        if (event.kind == SERVICE_REQUEST)
            service_finish(event.call, STATUS_UNAVAILABLE, "the server is shutting down");
    }
    queue_free(service->news);
    wire_bytes_free(&service->model);
    wire_bytes_free(&service->pool);
    wire_bytes_free(&service->bytes);
    pthread_mutex_destroy(&service->mutex);
    free(service);
}

// --- the coordinator's thread ---

// What the messages that went out give back.
static uint32_t take_worth(struct service_call *call)
{
    uint32_t sent = atomic_exchange(&call->sent, 0), tokens = 0;
    uint32_t capacity = service_max_queued(&call->service->options.rules);
    for (; sent > 0 && call->worth_count > 0; sent--) {
        tokens += call->worth[call->worth_first];
        call->worth_first = (call->worth_first + 1) % capacity;
        call->worth_count--;
    }
    return tokens;
}

// Turns the news of one call into an event. False: they matter to nobody.
static bool read_news(struct service_call *call, struct service_event *event)
{
    unsigned news = atomic_exchange(&call->news, 0);
    bool wanted = true;
    *event = (struct service_event){.call = call, .tag = call->tag, .order = &call->order};
    if (news & NEWS_GONE)
        call->gone = true;
    if ((news & NEWS_REQUEST) && !call->gone) {
        event->kind = SERVICE_REQUEST;
        call->taken = true;
        atomic_fetch_add(&call->holders, 1);
    } else if (call->taken && (news & NEWS_GONE)) {
        event->kind = SERVICE_GONE;
    } else if (call->taken && (news & NEWS_SENT)) {
        event->kind = SERVICE_CREDIT;
        event->tokens = take_worth(call);
        wanted = event->tokens > 0;
    } else {
        wanted = false;
    }
    if (news & NEWS_GONE)
        release(call); // for the gRPC side
    return wanted;
}

bool service_next_event(struct service *service, struct service_event *event)
{
    struct service_call *call;
    while (queue_pop(service->news, &call, 0) == STATUS_OK) {
        bool wanted = read_news(call, event);
        release(call); // for the queue; an event is about a call that the coordinator holds
        if (wanted)
            return true;
    }
    return false;
}

void service_set_tag(struct service_call *call, uint64_t tag)
{
    call->tag = tag;
}

int service_send(struct service_call *call, const struct wire_generate_response *response, uint32_t tokens)
{
    struct service *service = call->service;
    uint32_t capacity = service_max_queued(&service->options.rules);
    int status = wire_encode_generate_response(&service->bytes, response);
    if (status)
        return status;
    if (call->worth_count == capacity)
        return STATUS_EXHAUSTED;
    call->worth[(call->worth_first + call->worth_count) % capacity] = (uint8_t)tokens;
    call->worth_count++;
    status = rpc_call_send(call->rpc, service->bytes.data, service->bytes.length);
    if (status)
        call->worth_count--;
    return status;
}

void service_finish(struct service_call *call, int status, const char *text)
{
    call->taken = false;
    call->tag = 0;
    rpc_call_finish(call->rpc, status, text);
    release(call);
}

void service_set_welcome(struct service *service, int status, const char *text)
{
    pthread_mutex_lock(&service->mutex);
    service->welcome = status;
    snprintf(service->unwelcome, sizeof(service->unwelcome), "%s", text);
    pthread_mutex_unlock(&service->mutex);
}

void service_publish_pool(struct service *service, const struct wire_pool *pool)
{
    if (wire_encode_pool(&service->bytes, pool))
        return; // the last picture stays
    pthread_mutex_lock(&service->mutex);
    struct wire_bytes old = service->pool;
    service->pool = service->bytes;
    service->bytes = old;
    pthread_mutex_unlock(&service->mutex);
}
