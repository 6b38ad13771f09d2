// The pool protocol: WorkerMessage and CoordinatorMessage. Step plans and results go through wire_step.c; the
// rest, a few messages per load, through the generated code. What does not decode is the peer's fault:
// STATUS_CORRUPT.
#include "proto/wire_internal.h"
#include "strata/v1/pool.pb-c.h"

// The body of a step is written behind a gap that fits its tag and length; afterwards the two close up.
enum { GAP = 1 + WIRE_MAX_VARINT };

static int begin_body(struct wire_bytes *to)
{
    to->length = 0;
    if (wire_reserve(to, GAP))
        return STATUS_NO_MEMORY;
    to->length = GAP;
    return STATUS_OK;
}

static void end_body(struct wire_bytes *to, uint32_t field)
{
    uint8_t header[GAP], *end = header;
    size_t body = to->length - GAP;
    *end++ = (uint8_t)WIRE_TAG(field, WIRE_LENGTH);
    end = wire_write_varint(end, body);
    size_t length = (size_t)(end - header);
    memmove(to->data + length, to->data + GAP, body);
    memcpy(to->data, header, length);
    to->length = length + body;
}

// The field that a `oneof kind` message holds: the last one counts. 0 when there is none, -1 when malformed.
static int find_kind(const uint8_t *bytes, size_t length, uint32_t most, struct wire_field *found)
{
    struct wire_reader reader = wire_reader_of(bytes, length);
    int kind = 0;
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        if ((f.tag & 7) == WIRE_LENGTH && f.tag >> 3 <= most) {
            kind = (int)(f.tag >> 3);
            *found = f;
        }
    }
    return reader.bad ? -1 : kind;
}

// --- worker to coordinator

static void put_hello(struct wire_encoder *e, Strata__V1__Hello *to, const struct wire_worker_message *from)
{
    strata__v1__hello__init(to);
    to->worker = wire_put_cstr(e, from->worker);
    to->protocol = from->protocol;
    to->fingerprint = from->fingerprint;
    to->backend = wire_put_cstr(e, from->backend);
    to->device = wire_put_cstr(e, from->device);
    to->level = from->level;
    to->memory_free = from->memory_free;
    to->link_address = wire_put_cstr(e, from->link_address);
    to->threads = from->threads;
    to->pid = from->pid;
    to->host = wire_put_cstr(e, from->host);
    to->nccl = from->nccl;
    to->device_id = wire_put_cstr(e, from->device_id);
    to->oversubscribe = from->oversubscribe;
}

// Bytes that are no text: the generated code only reads them.
static ProtobufCBinaryData put_bytes(struct wire_text from)
{
    return (ProtobufCBinaryData){.len = from.length, .data = (uint8_t *)from.data};
}

static struct wire_text take_bytes(ProtobufCBinaryData from)
{
    return (struct wire_text){.data = (const char *)from.data, .length = from.len};
}

static void put_loaded(Strata__V1__Loaded *to, const struct wire_worker_message *from)
{
    strata__v1__loaded__init(to);
    to->epoch = from->epoch;
    to->weight_bytes = from->weight_bytes;
    to->kv_bytes = from->kv_bytes;
    to->source_bytes = from->source_bytes;
    to->load_us = from->load_us;
    to->n_weights = from->n_weights;
    to->link_id = put_bytes(from->link_id);
    to->layer_ns = from->layer_ns;
    to->head_ns = from->head_ns;
}

static void put_failed(struct wire_encoder *e, Strata__V1__Failed *to, const struct wire_worker_message *from)
{
    strata__v1__failed__init(to);
    to->epoch = from->epoch;
    to->status = from->status;
    to->text = wire_put_cstr(e, from->text);
    to->has_step = from->has_step;
    to->step = from->step;
    to->peer_lost = from->peer_lost;
    to->fits_pages = from->fits_pages;
}

static void put_heartbeat(Strata__V1__Heartbeat *to, const struct wire_worker_message *from)
{
    strata__v1__heartbeat__init(to);
    to->epoch = from->epoch;
    to->steps_done = from->steps_done;
    to->compute_us = from->compute_us;
    to->wait_us = from->wait_us;
    to->memory_free = from->memory_free;
}

static int encode_result(struct wire_bytes *to, const struct step_result *result)
{
    if (begin_body(to) || wire_append_result(to, result))
        return STATUS_NO_MEMORY;
    end_body(to, WIRE_RESULT);
    return STATUS_OK;
}

int wire_encode_worker_message(struct wire_bytes *to, const struct wire_worker_message *from)
{
    if (from->kind == WIRE_RESULT)
        return encode_result(to, from->result);
    struct wire_encoder e = {0};
    Strata__V1__WorkerMessage message = STRATA__V1__WORKER_MESSAGE__INIT;
    union {
        Strata__V1__Hello hello;
        Strata__V1__LoadProgress progress;
        Strata__V1__Loaded loaded;
        Strata__V1__Linked linked;
        Strata__V1__Failed failed;
        Strata__V1__Heartbeat heartbeat;
    } body;
    message.kind_case = (Strata__V1__WorkerMessage__KindCase)from->kind;
    message.hello = &body.hello; // the members of both unions are all pointers to the same place
    switch (from->kind) {
    case WIRE_HELLO:
        put_hello(&e, &body.hello, from);
        break;
    case WIRE_PROGRESS:
        strata__v1__load_progress__init(&body.progress);
        body.progress.epoch = from->epoch;
        body.progress.done_bytes = from->done_bytes;
        body.progress.total_bytes = from->total_bytes;
        break;
    case WIRE_LOADED:
        put_loaded(&body.loaded, from);
        break;
    case WIRE_LINKED:
        strata__v1__linked__init(&body.linked);
        body.linked.epoch = from->epoch;
        break;
    case WIRE_FAILED:
        put_failed(&e, &body.failed, from);
        break;
    case WIRE_HEARTBEAT:
        put_heartbeat(&body.heartbeat, from);
        break;
    case WIRE_RESULT:
        break;
    }
    return wire_encode_end(&e, to, &message.base);
}

static void take_hello(struct wire_decoder *d, struct wire_worker_message *out, const Strata__V1__Hello *from)
{
    out->worker = wire_take_cstr(d, from->worker, "worker");
    out->protocol = from->protocol;
    out->fingerprint = from->fingerprint;
    out->backend = wire_take_cstr(d, from->backend, "backend");
    out->device = wire_take_cstr(d, from->device, "device");
    out->level = from->level;
    out->memory_free = from->memory_free;
    out->link_address = wire_take_cstr(d, from->link_address, "link_address");
    out->threads = from->threads;
    out->pid = from->pid;
    out->host = wire_take_cstr(d, from->host, "host");
    out->nccl = from->nccl;
    out->device_id = wire_take_cstr(d, from->device_id, "device_id");
    out->oversubscribe = from->oversubscribe;
}

static void take_loaded(struct wire_worker_message *out, const Strata__V1__Loaded *from)
{
    out->epoch = from->epoch;
    out->weight_bytes = from->weight_bytes;
    out->kv_bytes = from->kv_bytes;
    out->source_bytes = from->source_bytes;
    out->load_us = from->load_us;
    out->n_weights = from->n_weights;
    out->link_id = take_bytes(from->link_id);
    out->layer_ns = from->layer_ns;
    out->head_ns = from->head_ns;
}

static void take_failed(struct wire_decoder *d, struct wire_worker_message *out,
                        const Strata__V1__Failed *from)
{
    out->epoch = from->epoch;
    out->status = from->status;
    out->text = wire_take_cstr(d, from->text, "text");
    out->has_step = from->has_step;
    out->step = from->step;
    out->peer_lost = from->peer_lost;
    out->fits_pages = from->fits_pages;
}

static void take_heartbeat(struct wire_worker_message *out, const Strata__V1__Heartbeat *from)
{
    out->epoch = from->epoch;
    out->steps_done = from->steps_done;
    out->compute_us = from->compute_us;
    out->wait_us = from->wait_us;
    out->memory_free = from->memory_free;
}

static void take_worker_body(struct wire_decoder *d, struct wire_worker_message *out,
                             const Strata__V1__WorkerMessage *m)
{
    out->kind = (enum wire_worker_kind)m->kind_case;
    switch (m->kind_case) {
    case STRATA__V1__WORKER_MESSAGE__KIND_HELLO:
        take_hello(d, out, m->hello);
        break;
    case STRATA__V1__WORKER_MESSAGE__KIND_PROGRESS:
        out->epoch = m->progress->epoch;
        out->done_bytes = m->progress->done_bytes;
        out->total_bytes = m->progress->total_bytes;
        break;
    case STRATA__V1__WORKER_MESSAGE__KIND_LOADED:
        take_loaded(out, m->loaded);
        break;
    case STRATA__V1__WORKER_MESSAGE__KIND_LINKED:
        out->epoch = m->linked->epoch;
        break;
    case STRATA__V1__WORKER_MESSAGE__KIND_FAILED:
        take_failed(d, out, m->failed);
        break;
    case STRATA__V1__WORKER_MESSAGE__KIND_HEARTBEAT:
        take_heartbeat(out, m->heartbeat);
        break;
    default:
        wire_refuse(d, STATUS_CORRUPT, "it has no known content");
    }
}

static int take_result(struct wire_decoder *d, struct wire_worker_message *out,
                       const struct wire_field *field)
{
    if (!out->result) {
        out->result = arena_alloc(d->arena, 1, sizeof(*out->result));
        if (!out->result || wire_size_result(out->result, field->bytes, field->length, d->arena))
            return error_set(d->error, STATUS_NO_MEMORY, "no memory for a step's result");
    }
    int status = wire_read_result(out->result, field->bytes, field->length, d->error);
    out->epoch = out->result->epoch;
    return status;
}

int wire_decode_worker_message(struct wire_worker_message *out, const uint8_t *bytes, size_t length,
                               struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "a worker's message", .blame = STATUS_CORRUPT};
    struct wire_field field;
    int kind = find_kind(bytes, length, WIRE_HEARTBEAT, &field);
    *out = (struct wire_worker_message){.kind = (enum wire_worker_kind)kind,
                                        .result = kind == WIRE_RESULT ? out->result : NULL,
                                        .worker = "",
                                        .backend = "",
                                        .device = "",
                                        .link_address = "",
                                        .host = "",
                                        .device_id = "",
                                        .text = ""};
    if (kind == WIRE_RESULT)
        return take_result(&d, out, &field);
    Strata__V1__WorkerMessage *message =
        wire_unpack(&d, &strata__v1__worker_message__descriptor, bytes, length);
    if (message)
        take_worker_body(&d, out, message);
    return d.status;
}

// --- coordinator to worker

static void put_assign(Strata__V1__Assign *to, const struct wire_coordinator_message *from)
{
    strata__v1__assign__init(to);
    to->epoch = from->epoch;
    to->stage = from->stage;
    to->n_stages = from->n_stages;
    to->first_layer = from->first_layer;
    to->n_layers = from->n_layers;
    to->n_slots = from->n_slots;
    to->n_pages = from->n_pages;
    to->context = from->context;
    to->max_positions = from->max_positions;
    to->level = from->level;
    to->next_link = (Strata__V1__LinkKind)from->next_link;
    to->previous_link = (Strata__V1__LinkKind)from->previous_link;
    to->measure = from->measure;
}

static int encode_plan(struct wire_bytes *to, const struct step_plan *plan)
{
    if (begin_body(to) || wire_append_plan(to, plan))
        return STATUS_NO_MEMORY;
    end_body(to, WIRE_STEP);
    return STATUS_OK;
}

int wire_encode_coordinator_message(struct wire_bytes *to, const struct wire_coordinator_message *from)
{
    if (from->kind == WIRE_STEP)
        return encode_plan(to, from->plan);
    struct wire_encoder e = {0};
    Strata__V1__CoordinatorMessage message = STRATA__V1__COORDINATOR_MESSAGE__INIT;
    union {
        Strata__V1__Assign assign;
        Strata__V1__Connect connect;
        Strata__V1__Abort abort;
        Strata__V1__Goodbye goodbye;
        Strata__V1__Heartbeat heartbeat;
    } body;
    message.kind_case = (Strata__V1__CoordinatorMessage__KindCase)from->kind;
    message.assign = &body.assign; // the members of both unions are all pointers to the same place
    switch (from->kind) {
    case WIRE_ASSIGN:
        put_assign(&body.assign, from);
        break;
    case WIRE_CONNECT:
        strata__v1__connect__init(&body.connect);
        body.connect.epoch = from->epoch;
        body.connect.next_address = wire_put_cstr(&e, from->next_address);
        body.connect.previous_id = put_bytes(from->previous_id);
        break;
    case WIRE_ABORT:
        strata__v1__abort__init(&body.abort);
        body.abort.epoch = from->epoch;
        body.abort.text = wire_put_cstr(&e, from->text);
        break;
    case WIRE_GOODBYE:
        strata__v1__goodbye__init(&body.goodbye);
        body.goodbye.status = from->status;
        body.goodbye.text = wire_put_cstr(&e, from->text);
        body.goodbye.retry = from->retry;
        break;
    case WIRE_COORDINATOR_HEARTBEAT:
        strata__v1__heartbeat__init(&body.heartbeat);
        body.heartbeat.epoch = from->epoch;
        break;
    case WIRE_STEP:
        break;
    }
    return wire_encode_end(&e, to, &message.base);
}

static void take_assign(struct wire_coordinator_message *out, const Strata__V1__Assign *from)
{
    out->epoch = from->epoch;
    out->stage = from->stage;
    out->n_stages = from->n_stages;
    out->first_layer = from->first_layer;
    out->n_layers = from->n_layers;
    out->n_slots = from->n_slots;
    out->n_pages = from->n_pages;
    out->context = from->context;
    out->max_positions = from->max_positions;
    out->level = from->level;
    out->next_link = (enum wire_link)from->next_link;
    out->previous_link = (enum wire_link)from->previous_link;
    out->measure = from->measure;
}

static void take_coordinator_body(struct wire_decoder *d, struct wire_coordinator_message *out,
                                  const Strata__V1__CoordinatorMessage *m)
{
    out->kind = (enum wire_coordinator_kind)m->kind_case;
    switch (m->kind_case) {
    case STRATA__V1__COORDINATOR_MESSAGE__KIND_ASSIGN:
        take_assign(out, m->assign);
        break;
    case STRATA__V1__COORDINATOR_MESSAGE__KIND_CONNECT:
        out->epoch = m->connect->epoch;
        out->next_address = wire_take_cstr(d, m->connect->next_address, "next_address");
        out->previous_id = take_bytes(m->connect->previous_id);
        break;
    case STRATA__V1__COORDINATOR_MESSAGE__KIND_ABORT:
        out->epoch = m->abort->epoch;
        out->text = wire_take_cstr(d, m->abort->text, "text");
        break;
    case STRATA__V1__COORDINATOR_MESSAGE__KIND_GOODBYE:
        out->status = m->goodbye->status;
        out->text = wire_take_cstr(d, m->goodbye->text, "text");
        out->retry = m->goodbye->retry;
        break;
    case STRATA__V1__COORDINATOR_MESSAGE__KIND_HEARTBEAT:
        out->epoch = m->heartbeat->epoch;
        break;
    default:
        wire_refuse(d, STATUS_CORRUPT, "it has no known content");
    }
}

int wire_decode_coordinator_message(struct wire_coordinator_message *out, const uint8_t *bytes, size_t length,
                                    struct arena *arena, struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "a coordinator's message", .blame = STATUS_CORRUPT};
    struct wire_field field;
    int kind = find_kind(bytes, length, WIRE_COORDINATOR_HEARTBEAT, &field);
    struct step_plan *plan = out->plan;
    *out = (struct wire_coordinator_message){
        .kind = (enum wire_coordinator_kind)kind, .plan = plan, .next_address = "", .text = ""};
    if (kind == WIRE_STEP) {
        if (!plan)
            return error_set(error, STATUS_INTERNAL, "a step plan arrived where none was expected");
        int status = wire_read_plan(plan, field.bytes, field.length, error);
        out->epoch = plan->epoch;
        return status;
    }
    Strata__V1__CoordinatorMessage *message =
        wire_unpack(&d, &strata__v1__coordinator_message__descriptor, bytes, length);
    if (message)
        take_coordinator_body(&d, out, message);
    return d.status;
}
