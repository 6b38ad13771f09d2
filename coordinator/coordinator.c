// The hall. One thread runs this file and owns all that changes: the requests, their answers, the scheduler's
// state, the pool, the steps in flight. gRPC threads, the template's thread and the signal thread leave news
// in the rooms they belong to and ring the bell. The loop, `coordinator_run`, is the table of contents:
//
//   take_stop             is it time to go?
//   take_pool             workers joined, loaded, left; results of steps       worker_pool -> scheduler
//   publish_change        whether requests are welcome
//   take_clients          new requests, room in streams, clients that left     service -> scheduler
//   plan_steps            the next steps, while there is something to compute  scheduler -> pipeline
//   take_outcomes         tokens, scores and ends, as responses                scheduler -> answer -> service
//   publish_now_and_then  the picture that GetPool shows, figures for the log
//   wait_for_news         for the bell, or for what is due next
//
// The rooms do not know each other: whatever passes between two of them passes through here.
#include "coordinator/coordinator_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"

enum {
    STREAM_BITS = 20,         // of a request's id: its stream's index; the rest is a serial number
    PUBLISH_EVERY_US = 20000, // at most so often while steps run
};

// --- streams: which call a request belongs to ---

static struct stream *find_stream(struct coordinator *hall, uint64_t id)
{
    struct stream *stream = &hall->streams[id & ((1u << STREAM_BITS) - 1)];
    return stream->id == id ? stream : NULL;
}

static struct stream *open_stream(struct coordinator *hall, struct service_call *call)
{
    if (hall->n_streams == hall->max_streams)
        return NULL;
    uint32_t index = hall->free_streams[hall->max_streams - 1 - hall->n_streams++];
    struct stream *stream = &hall->streams[index];
    *stream = (struct stream){.id = ++hall->next_serial << STREAM_BITS | index, .call = call};
    return stream;
}

static void close_stream(struct coordinator *hall, struct stream *stream, int status, const char *text)
{
    service_finish(stream->call, status, text);
    answer_free(stream->answer);
    stream->id = 0;
    hall->free_streams[hall->max_streams - 1 - --hall->n_streams] = (uint32_t)(stream - hall->streams);
}

static void cancel_all(struct coordinator *hall, int status, const char *text, int64_t now_us)
{
    for (uint32_t i = 0; i < hall->max_streams; i++) {
        if (hall->streams[i].id)
            scheduler_cancel(hall->scheduler, hall->streams[i].id, status, text, now_us);
    }
}

// --- the end ---

static void take_stop(struct coordinator *hall, int64_t now_us)
{
    unsigned stops = atomic_load(&hall->stops);
    if (stops > 0 && !hall->draining) {
        hall->draining = true;
        hall->drain_until_us = now_us + hall->options.drain_timeout_us;
        log_info("stopping: %u requests may still finish", hall->n_streams);
    }
    if (hall->draining && !hall->ended_all && (stops > 1 || now_us >= hall->drain_until_us)) {
        hall->ended_all = true;
        if (hall->n_streams > 0)
            log_warn("stopping: %u requests are ended", hall->n_streams);
        cancel_all(hall, STATUS_UNAVAILABLE, "the server is shutting down", now_us);
    }
}

static bool is_over(const struct coordinator *hall)
{
    return hall->draining && hall->n_streams == 0;
}

// --- the pool ---

static void pool_became_ready(struct coordinator *hall, const struct worker_pool_event *event, int64_t now_us)
{
    pipeline_begin(hall->pipeline, event->epoch, event->n_pages);
    if (scheduler_pool_ready(hall->scheduler, event->epoch, event->n_stages, event->n_pages, now_us))
        worker_pool_lose(hall->pool, -1, now_us, "the scheduler could not take the pool in: out of memory");
}

static void pool_was_lost(struct coordinator *hall, const struct worker_pool_event *event, int64_t now_us)
{
    hall->metrics.losses++;
    pipeline_end(hall->pipeline);
    scheduler_pool_lost(hall->scheduler, event->text, now_us);
}

static void step_came_back(struct coordinator *hall, const struct worker_pool_event *event, int64_t now_us)
{
    struct error error = {0};
    int64_t took_us = 0;
    int status = pipeline_take(hall->pipeline, event->result, now_us, &took_us, &error);
    if (!status)
        status = scheduler_result(hall->scheduler, event->result, now_us, &error);
    if (status) {
        worker_pool_lose(hall->pool, (int32_t)event->n_stages - 1, now_us, error.text);
        return;
    }
    hall->metrics.steps++;
    hall->metrics.step_us += (uint64_t)took_us;
}

static void take_pool(struct coordinator *hall, int64_t now_us)
{
    struct worker_pool_event event;
    pipeline_check(hall->pipeline, now_us);
    while (worker_pool_next_event(hall->pool, now_us, &event)) {
        switch (event.kind) {
        case WORKER_POOL_READY:
            pool_became_ready(hall, &event, now_us);
            break;
        case WORKER_POOL_RESULT:
            step_came_back(hall, &event, now_us);
            break;
        case WORKER_POOL_LOST:
            pool_was_lost(hall, &event, now_us);
            break;
        }
    }
    const char *failure = worker_pool_failure(hall->pool);
    if (failure && hall->n_streams > 0)
        cancel_all(hall, STATUS_UNAVAILABLE, failure, now_us); // those who waited for it to come back
}

static bool may_serve(const struct coordinator *hall)
{
    return worker_pool_is_ready(hall->pool) && !hall->draining;
}

// The sentence for those who come while nothing can be served. Valid until the next call.
static const char *why_not(struct coordinator *hall)
{
    struct wire_pool picture = {0};
    if (hall->draining)
        return "the server is shutting down";
    worker_pool_describe(hall->pool, &picture);
    snprintf(hall->sentence, sizeof(hall->sentence), "the pool is not ready: %s", picture.problem);
    return hall->sentence;
}

// --- clients ---

static int send_response(void *call, const struct wire_generate_response *response, uint32_t tokens)
{
    return service_send(call, response, tokens);
}

// Hands the order's request to the scheduler.
static int submit(struct coordinator *hall, struct stream *stream, struct service_order *order,
                  int64_t now_us, struct error *error)
{
    const struct answer_options options = {.spec = order->request,
                                           .tokenizer = hall->tokenizer,
                                           .stops = order->stops,
                                           .n_stops = order->n_stops,
                                           .special = order->special,
                                           .send = send_response,
                                           .to = stream->call};
    if (answer_new(&stream->answer, &options))
        return error_set(error, STATUS_NO_MEMORY, "the server is out of memory");
    order->request->id = stream->id;
    service_set_tag(stream->call, stream->id);
    log_debug("request %s: %u prompt tokens, at most %u new, %u choices", order->request->name,
              order->request->n_prompt, order->request->max_tokens, order->request->n_choices);
    uint32_t n_prompt = order->request->n_prompt;
    int status = scheduler_submit(hall->scheduler, order->request, now_us, error);
    if (status)
        return status;
    order->request = NULL; // the scheduler's now
    hall->metrics.requests++;
    hall->metrics.prompt_tokens += n_prompt;
    return STATUS_OK;
}

static void start_request(struct coordinator *hall, struct service_call *call, struct service_order *order,
                          int64_t now_us)
{
    struct error error = {0};
    struct stream *stream = NULL;
    if (!may_serve(hall))
        error_set(&error, STATUS_UNAVAILABLE, "%s", why_not(hall));
    else if (!(stream = open_stream(hall, call)))
        error_set(&error, STATUS_EXHAUSTED, "this server takes at most %u requests at once: try again later",
                  hall->max_streams);
    else
        submit(hall, stream, order, now_us, &error);
    if (!error.status)
        return;
    log_info("request %s is refused: %s", order->request->name, error.text);
    if (stream)
        close_stream(hall, stream, error.status, error.text);
    else
        service_finish(call, error.status, error.text);
}

static void take_clients(struct coordinator *hall, int64_t now_us)
{
    struct service_event event;
    while (service_next_event(hall->service, &event)) {
        switch (event.kind) {
        case SERVICE_REQUEST:
            start_request(hall, event.call, event.order, now_us);
            break;
        case SERVICE_CREDIT:
            scheduler_credit(hall->scheduler, event.tag, event.tokens);
            break;
        case SERVICE_GONE:
            scheduler_cancel(hall->scheduler, event.tag, STATUS_CANCELLED, "the client went away", now_us);
            break;
        }
    }
}

// --- steps ---

static void plan_steps(struct coordinator *hall, int64_t now_us)
{
    struct error error = {0};
    while (scheduler_plan(hall->scheduler, now_us, &hall->plan)) {
        if (!pipeline_send(hall->pipeline, &hall->plan, now_us, &error))
            continue;
        if (error.status != STATUS_UNAVAILABLE) { // then the pool is lost already, and will say so
            log_error("step %" PRIu64 " was not sent: %s", hall->plan.number, error.text);
            worker_pool_lose(hall->pool, -1, now_us, error.text);
        }
        return;
    }
}

// --- outcomes ---

static void request_ended(struct coordinator *hall, struct stream *stream,
                          const struct scheduler_event *event, int64_t now_us)
{
    double ms = (double)(now_us - event->spec->arrived_us) / 1e3;
    if (event->status == STATUS_OK)
        hall->metrics.ok++;
    else if (event->status == STATUS_CANCELLED || event->status == STATUS_DEADLINE)
        hall->metrics.cancelled++;
    else
        hall->metrics.failed++;
    log_info("request %s: %u prompt tokens, %" PRIu64 " new in %u choices, %.1f ms: %s%s%s",
             event->spec->name, event->spec->n_prompt, answer_tokens(stream->answer), event->spec->n_choices,
             ms, status_name(event->status), event->status ? ": " : "", event->status ? event->text : "");
    close_stream(hall, stream, event->status, event->text);
}

static void answer_event(struct coordinator *hall, struct stream *stream, const struct scheduler_event *event,
                         int64_t now_us)
{
    struct answer_reply reply = {0};
    uint32_t choice = event->choice; // the event is gone with the first call on the scheduler
    uint64_t id = stream->id;
    hall->metrics.output_tokens += event->kind == SCHEDULER_TOKEN;
    int status = answer_take(stream->answer, event, now_us, &reply);
    if (reply.credit)
        scheduler_credit(hall->scheduler, id, reply.credit);
    if (reply.stop)
        scheduler_stop_choice(hall->scheduler, id, choice, now_us);
    if (status == STATUS_EXHAUSTED)
        scheduler_cancel(hall->scheduler, id, status, "the client does not read its answer", now_us);
    else if (status && status != STATUS_CANCELLED) // of a cancelled call we are told in take_clients
        scheduler_cancel(hall->scheduler, id, status, "the answer could not be written: out of memory",
                         now_us);
}

static bool take_outcomes(struct coordinator *hall, int64_t now_us)
{
    struct scheduler_event event;
    bool any = false;
    while (scheduler_next_event(hall->scheduler, &event)) {
        struct stream *stream = find_stream(hall, event.request);
        any = true;
        if (!stream)
            continue; // its request was never taken
        if (event.kind == SCHEDULER_REQUEST_END)
            request_ended(hall, stream, &event, now_us);
        else
            answer_event(hall, stream, &event, now_us);
    }
    return any;
}

// --- what others are told ---

static void describe(struct coordinator *hall, struct wire_pool *picture)
{
    struct scheduler_stats stats;
    scheduler_stats(hall->scheduler, &stats);
    *picture = (struct wire_pool){0};
    worker_pool_describe(hall->pool, picture);
    if (hall->draining)
        picture->state = WIRE_POOL_DRAINING;
    picture->pages_free = worker_pool_is_ready(hall->pool) ? stats.pages_free : 0;
    picture->running = stats.slots_used;
    picture->waiting = stats.waiting;
    picture->steps = stats.steps;
    picture->max_sequences = hall->options.max_sequences;
}

static void tell_readiness(struct coordinator *hall)
{
    bool serving = may_serve(hall);
    service_set_welcome(hall->service, serving ? STATUS_OK : STATUS_UNAVAILABLE,
                        serving ? "" : why_not(hall));
    if (serving != hall->serving) {
        hall->serving = serving;
        health_set_serving(hall->health, serving);
    }
    if (serving && !hall->announced) {
        hall->announced = true;
        log_info("ready on %s", hall->client_address);
        if (hall->ready)
            hall->ready(hall->client_address);
    }
}

static void publish(struct coordinator *hall, int64_t now_us)
{
    struct wire_pool picture;
    describe(hall, &picture);
    service_publish_pool(hall->service, &picture);
    tell_readiness(hall);
    hall->stale = false;
    hall->published_us = now_us;
}

// At once when the pool came or went, so that nobody who is sent away for it is told that it is there.
static void publish_change(struct coordinator *hall, int64_t now_us)
{
    if (may_serve(hall) != hall->serving) {
        publish(hall, now_us);
        hall->stale = true; // what follows from the change is not in the picture
    }
}

static void publish_now_and_then(struct coordinator *hall, int64_t now_us)
{
    if (hall->stale && now_us - hall->published_us >= PUBLISH_EVERY_US)
        publish(hall, now_us);
    if (now_us >= metrics_wake_us(&hall->metrics)) {
        struct scheduler_stats stats;
        scheduler_stats(hall->scheduler, &stats);
        metrics_log(&hall->metrics, now_us, stats.slots_used, stats.waiting);
    }
}

// --- the loop ---

static int64_t earlier(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void wait_for_news(struct coordinator *hall)
{
    int64_t due = earlier(worker_pool_wake_us(hall->pool), scheduler_wake_us(hall->scheduler));
    due = earlier(due, pipeline_wake_us(hall->pipeline));
    due = earlier(due, metrics_wake_us(&hall->metrics));
    if (hall->draining && !hall->ended_all)
        due = earlier(due, hall->drain_until_us);
    int64_t until = hall->stale ? earlier(due, hall->published_us + PUBLISH_EVERY_US) : due;
    int64_t now_us = clock_now_us();
    char stroke;
    bool rang = queue_pop(hall->bell, &stroke, until > now_us ? until - now_us : 0) == STATUS_OK;
    if (rang || clock_now_us() >= due)
        hall->stale = true; // what was published may be true no longer
}

void coordinator_run(struct coordinator *hall, void (*ready)(const char *address))
{
    hall->ready = ready;
    hall->stale = true;
    metrics_init(&hall->metrics, clock_now_us());
    while (!is_over(hall)) {
        int64_t now_us = clock_now_us();
        take_stop(hall, now_us);
        take_pool(hall, now_us);
        publish_change(hall, now_us);
        take_clients(hall, now_us);
        do
            plan_steps(hall, now_us);
        while (take_outcomes(hall, now_us)); // an outcome may be what the next step waited for
        publish_now_and_then(hall, now_us);
        wait_for_news(hall);
    }
    worker_pool_farewell(hall->pool, "the coordinator is shutting down");
    log_info("stopped");
}

void coordinator_stop(struct coordinator *hall)
{
    char stroke = 1;
    atomic_fetch_add(&hall->stops, 1);
    queue_try_push(hall->bell, &stroke);
}
