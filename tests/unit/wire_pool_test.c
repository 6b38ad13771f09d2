// The pool protocol's codec: random plans and results go there and back, the hand-written fields agree with
// the generated code, and what is damaged is refused without harm.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"
#include "strata/v1/pool.pb-c.h"
#include "tests/suite.h"

static uint64_t random_state;

static uint32_t next(uint32_t below)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    uint32_t value = (uint32_t)(random_state >> 33);
    return below ? value % below : value;
}

// Numbers of all sizes, zero among them.
static uint32_t any_u32(void)
{
    return next(5) == 0 ? 0 : (next(0) << 1 | next(2)) >> next(32);
}

static uint64_t any_u64(void)
{
    return ((uint64_t)next(0) << 33 ^ (uint64_t)next(0) << 2 ^ next(4)) >> next(64);
}

static int32_t any_token(void)
{
    return next(10) == 0 ? -(int32_t)next(5) : (int32_t)next(1 << 20);
}

static float any_float(void)
{
    static const float special[] = {0, 1, -1, INFINITY, -INFINITY, 1e-40f, 3e38f};
    return next(4) == 0 ? special[next(7)] : (float)next(1000) / 7;
}

static void random_open(struct step_command *c)
{
    c->sampling = (struct sampling_params){.temperature = any_float(),
                                           .top_k = any_u32(),
                                           .top_p = any_float(),
                                           .min_p = any_float(),
                                           .repetition_penalty = any_float(),
                                           .presence_penalty = any_float(),
                                           .frequency_penalty = any_float(),
                                           .seed = any_u64(),
                                           .min_tokens = any_u32()};
    c->choice = any_u32();
    c->history_first = any_u32();
    c->history_count = any_u32();
    c->history_prompt = any_u32();
    c->bias_first = any_u32();
    c->bias_count = any_u32();
    c->ban_first = any_u32();
    c->ban_count = any_u32();
}

static void random_plan(struct step_plan *plan, uint32_t rows, uint32_t commands, uint32_t tokens)
{
    step_plan_clear(plan);
    plan->epoch = any_u64();
    plan->number = any_u64();
    for (uint32_t i = 0; i < commands; i++) {
        struct step_command *c = step_plan_add_command(plan, 1 + next(4), any_u32());
        if (c->kind == STEP_OPEN)
            random_open(c);
        c->table_first = any_u32();
        c->pages_first = any_u32();
        c->pages_count = any_u32();
        c->copy_from = any_u32();
        c->copy_to = any_u32();
    }
    for (uint32_t i = 0; i < rows; i++) {
        struct step_row *r = step_plan_add_row(plan);
        *r = (struct step_row){.slot = any_u32(),
                               .position = any_u32(),
                               .count = any_u32(),
                               .from_sample = next(2),
                               .generated = next(2),
                               .must_wait = next(2),
                               .tokens_first = any_u32(),
                               .source_step = any_u64(),
                               .source_row = any_u32(),
                               .source_draw = any_u32(),
                               .draws = any_u32(),
                               .logits = next(3),
                               .logprobs = next(2),
                               .top_logprobs = any_u32(),
                               .next_token = any_token()};
    }
    for (uint32_t i = 0; i < tokens; i++) {
        int32_t token = any_token();
        uint32_t page = any_u32();
        struct logit_bias bias = {any_token(), any_float()};
        ck_assert_int_ge(step_plan_add_tokens(plan, &token, 1), 0);
        ck_assert_int_ge(step_plan_add_pages(plan, &page, 1), 0);
        ck_assert_int_ge(step_plan_add_biases(plan, &bias, 1), 0);
    }
}

// Field by field: padding and the order of bits do not matter, floats compare by bits.
static void expect_same_plan(const struct step_plan *a, const struct step_plan *b)
{
    ck_assert(a->epoch == b->epoch && a->number == b->number);
    ck_assert(a->n_commands == b->n_commands && a->n_rows == b->n_rows && a->n_tokens == b->n_tokens);
    ck_assert(a->n_pages == b->n_pages && a->n_biases == b->n_biases);
    for (uint32_t i = 0; i < a->n_commands; i++) {
        const struct step_command *x = &a->commands[i], *y = &b->commands[i];
        ck_assert(x->kind == y->kind && x->slot == y->slot && x->table_first == y->table_first);
        ck_assert(x->pages_first == y->pages_first && x->pages_count == y->pages_count);
        ck_assert(x->copy_from == y->copy_from && x->copy_to == y->copy_to && x->choice == y->choice);
        ck_assert(x->history_first == y->history_first && x->history_count == y->history_count);
        ck_assert(x->history_prompt == y->history_prompt && x->bias_first == y->bias_first);
        ck_assert(x->bias_count == y->bias_count && x->ban_first == y->ban_first);
        ck_assert(x->ban_count == y->ban_count && x->sampling.seed == y->sampling.seed);
        ck_assert(x->sampling.top_k == y->sampling.top_k && x->sampling.min_tokens == y->sampling.min_tokens);
        const float p[] = {x->sampling.temperature,
                           x->sampling.top_p,
                           x->sampling.min_p,
                           x->sampling.repetition_penalty,
                           x->sampling.presence_penalty,
                           x->sampling.frequency_penalty};
        const float q[] = {y->sampling.temperature,
                           y->sampling.top_p,
                           y->sampling.min_p,
                           y->sampling.repetition_penalty,
                           y->sampling.presence_penalty,
                           y->sampling.frequency_penalty};
        ck_assert_mem_eq(p, q, sizeof(p));
    }
    for (uint32_t i = 0; i < a->n_rows; i++) {
        const struct step_row *x = &a->rows[i], *y = &b->rows[i];
        ck_assert(x->slot == y->slot && x->position == y->position && x->count == y->count);
        ck_assert(x->from_sample == y->from_sample && x->must_wait == y->must_wait);
        ck_assert(x->generated == y->generated);
        ck_assert(x->tokens_first == y->tokens_first && x->source_step == y->source_step);
        ck_assert(x->source_row == y->source_row && x->source_draw == y->source_draw && x->draws == y->draws);
        ck_assert(x->logits == y->logits && x->logprobs == y->logprobs && x->top_logprobs == y->top_logprobs);
        ck_assert_int_eq(x->next_token, y->next_token);
    }
    if (a->n_tokens)
        ck_assert_mem_eq(a->tokens, b->tokens, a->n_tokens * sizeof(*a->tokens));
    if (a->n_pages)
        ck_assert_mem_eq(a->pages, b->pages, a->n_pages * sizeof(*a->pages));
    if (a->n_biases)
        ck_assert_mem_eq(a->biases, b->biases, a->n_biases * sizeof(*a->biases));
}

static int decode_plan(struct step_plan *plan, const uint8_t *bytes, size_t length, struct error *error)
{
    struct arena arena = {0};
    struct wire_coordinator_message message = {.plan = plan};
    int status = wire_decode_coordinator_message(&message, bytes, length, &arena, error);
    if (!status)
        ck_assert(message.kind == WIRE_STEP && message.epoch == plan->epoch && message.plan == plan);
    arena_free(&arena);
    return status;
}

static void encode_plan(struct wire_bytes *bytes, struct step_plan *plan)
{
    struct wire_coordinator_message message = {.kind = WIRE_STEP, .plan = plan};
    ck_assert_int_eq(wire_encode_coordinator_message(bytes, &message), 0);
}

START_TEST(plans_go_there_and_back)
{
    struct step_plan plan, back;
    struct wire_bytes bytes = {0};
    struct error error = {0};
    step_plan_init(&plan);
    step_plan_init(&back);
    for (int i = 0; i < 300; i++) {
        random_state = (uint64_t)i;
        random_plan(&plan, next(50), next(20), i % 10 == 0 ? 3000 : next(100));
        encode_plan(&bytes, &plan);
        ck_assert_msg(decode_plan(&back, bytes.data, bytes.length, &error) == 0, "%s", error.text);
        expect_same_plan(&plan, &back);
    }
    wire_bytes_free(&bytes);
    step_plan_free(&plan);
    step_plan_free(&back);
}
END_TEST

// Our bytes, read and written again by the generated code, have to be the same message.
START_TEST(plans_agree_with_the_generated_code)
{
    struct step_plan plan, back;
    struct wire_bytes bytes = {0};
    struct error error = {0};
    step_plan_init(&plan);
    step_plan_init(&back);
    for (int i = 0; i < 100; i++) {
        random_state = 77 + (uint64_t)i;
        random_plan(&plan, next(20), next(20), next(40));
        encode_plan(&bytes, &plan);
        Strata__V1__CoordinatorMessage *message =
            strata__v1__coordinator_message__unpack(NULL, bytes.length, bytes.data);
        ck_assert_ptr_nonnull(message);
        ck_assert_int_eq(message->kind_case, STRATA__V1__COORDINATOR_MESSAGE__KIND_STEP);
        const Strata__V1__StepPlan *step = message->step;
        ck_assert(step->epoch == plan.epoch && step->number == plan.number && step->n_rows == plan.n_rows);
        ck_assert(step->n_commands == plan.n_commands && step->n_biases == plan.n_biases);
        ck_assert_uint_eq(step->base.n_unknown_fields, 0);
        for (uint32_t j = 0; j < plan.n_rows; j++) {
            ck_assert_uint_eq(step->rows[j]->base.n_unknown_fields, 0);
            ck_assert(step->rows[j]->next_token == plan.rows[j].next_token);
            ck_assert(step->rows[j]->source_step == plan.rows[j].source_step);
        }
        for (uint32_t j = 0; j < plan.n_commands; j++)
            ck_assert_uint_eq(step->commands[j]->base.n_unknown_fields, 0);
        uint8_t *again = malloc(strata__v1__coordinator_message__get_packed_size(message) + 1);
        size_t length = strata__v1__coordinator_message__pack(message, again);
        ck_assert_msg(decode_plan(&back, again, length, &error) == 0, "%s", error.text);
        expect_same_plan(&plan, &back);
        free(again);
        strata__v1__coordinator_message__free_unpacked(message, NULL);
    }
    wire_bytes_free(&bytes);
    step_plan_free(&plan);
    step_plan_free(&back);
}
END_TEST

static void random_result(struct step_result *result, uint32_t count)
{
    step_result_clear(result);
    result->epoch = any_u64();
    result->number = any_u64();
    result->compute_us = any_u64();
    result->wait_us = any_u64();
    uint32_t n_tops = next(count + 1) * 3;
    struct token_logprob *tops = n_tops ? step_result_add_tops(result, n_tops) : NULL;
    for (uint32_t i = 0; i < n_tops; i++)
        tops[i] = (struct token_logprob){any_token(), any_float()};
    for (uint32_t i = 0; i < count; i++) {
        uint32_t first = next(n_tops + 1), some = next(n_tops - first + 1);
        *step_result_add_sample(result) = (struct step_sample){.row = any_u32(),
                                                               .draw = any_u32(),
                                                               .token = any_token(),
                                                               .logprob = any_float(),
                                                               .top_first = first,
                                                               .top_count = some};
        if (next(2))
            *step_result_add_prompt(result) =
                (struct step_prompt_logprob){.row = any_u32(),
                                             .position = any_u32(),
                                             .token = {any_token(), any_float()},
                                             .top_first = first,
                                             .top_count = some};
    }
}

static void expect_same_result(const struct step_result *a, const struct step_result *b)
{
    ck_assert(a->epoch == b->epoch && a->number == b->number);
    ck_assert(a->compute_us == b->compute_us && a->wait_us == b->wait_us);
    ck_assert(a->n_samples == b->n_samples && a->n_prompts == b->n_prompts && a->n_tops == b->n_tops);
    // None of the records has padding.
    if (a->n_samples)
        ck_assert_mem_eq(a->samples, b->samples, a->n_samples * sizeof(*a->samples));
    if (a->n_prompts)
        ck_assert_mem_eq(a->prompts, b->prompts, a->n_prompts * sizeof(*a->prompts));
    if (a->n_tops)
        ck_assert_mem_eq(a->tops, b->tops, a->n_tops * sizeof(*a->tops));
}

START_TEST(results_go_there_and_back)
{
    struct step_result result, back;
    struct wire_bytes bytes = {0};
    struct arena arena = {0};
    struct error error = {0};
    step_result_init(&result);
    step_result_init(&back);
    for (int i = 0; i < 300; i++) {
        random_state = (uint64_t)i * 3;
        random_result(&result, next(80));
        struct wire_worker_message message = {.kind = WIRE_RESULT, .result = &result};
        ck_assert_int_eq(wire_encode_worker_message(&bytes, &message), 0);
        message = (struct wire_worker_message){.result = i % 2 ? &back : NULL};
        int status = wire_decode_worker_message(&message, bytes.data, bytes.length, &arena, &error);
        ck_assert_msg(status == 0, "%s", error.text);
        ck_assert(message.kind == WIRE_RESULT && message.epoch == result.epoch);
        expect_same_result(&result, message.result);
        // And through the generated code.
        Strata__V1__WorkerMessage *theirs =
            strata__v1__worker_message__unpack(NULL, bytes.length, bytes.data);
        ck_assert_ptr_nonnull(theirs);
        ck_assert_uint_eq(theirs->result->n_samples, result.n_samples);
        ck_assert_uint_eq(theirs->result->base.n_unknown_fields, 0);
        uint8_t *again = malloc(strata__v1__worker_message__get_packed_size(theirs) + 1);
        size_t length = strata__v1__worker_message__pack(theirs, again);
        message = (struct wire_worker_message){.result = &back};
        ck_assert_int_eq(wire_decode_worker_message(&message, again, length, &arena, &error), 0);
        expect_same_result(&result, &back);
        free(again);
        strata__v1__worker_message__free_unpacked(theirs, NULL);
        arena_reset(&arena);
    }
    arena_free(&arena);
    wire_bytes_free(&bytes);
    step_result_free(&result);
    step_result_free(&back);
}
END_TEST

static void expect_same_bytes(struct wire_text out, struct wire_text in)
{
    ck_assert_uint_eq(out.length, in.length);
    ck_assert(in.length == 0 || memcmp(out.data, in.data, in.length) == 0);
}

static void expect_same_strings(const struct wire_worker_message *out, const struct wire_worker_message *in)
{
    ck_assert_str_eq(out->worker, in->worker ? in->worker : "");
    ck_assert_str_eq(out->backend, in->backend ? in->backend : "");
    ck_assert_str_eq(out->device, in->device ? in->device : "");
    ck_assert_str_eq(out->link_address, in->link_address ? in->link_address : "");
    ck_assert_str_eq(out->host, in->host ? in->host : "");
    ck_assert_str_eq(out->device_id, in->device_id ? in->device_id : "");
}

// What a stage says of itself when it has loaded, failed or is at work.
static void expect_same_ends(const struct wire_worker_message *out, const struct wire_worker_message *in)
{
    ck_assert(out->layer_ns == in->layer_ns && out->head_ns == in->head_ns);
    ck_assert(out->peer_lost == in->peer_lost && out->fits_pages == in->fits_pages);
    ck_assert(out->steps_done == in->steps_done && out->compute_us == in->compute_us);
    ck_assert(out->wait_us == in->wait_us);
}

START_TEST(worker_messages_go_there_and_back)
{
    static const struct wire_worker_message messages[] = {
        {.kind = WIRE_HELLO,
         .worker = "host:1",
         .backend = "cpu",
         .device = "gr\xC3\xB6\xC3\x9F"
                   "er",
         .link_address = "127.0.0.1:9",
         .host = "host",
         .protocol = 1,
         .level = 3,
         .nccl = 22809,
         .device_id = "GPU-0123",
         .oversubscribe = true,
         .threads = 2,
         .fingerprint = UINT64_MAX,
         .memory_free = 1ull << 40,
         .pid = 77},
        {.kind = WIRE_PROGRESS, .epoch = 5, .done_bytes = 6, .total_bytes = 7},
        {.kind = WIRE_LOADED,
         .epoch = 5,
         .weight_bytes = 1,
         .kv_bytes = 2,
         .source_bytes = 3,
         .load_us = 4,
         .n_weights = 9,
         .layer_ns = 1ull << 50,
         .head_ns = 123456789,
         .link_id = {.data = "id\0of\xFFten.", .length = 10}},
        {.kind = WIRE_LINKED, .epoch = 8},
        {.kind = WIRE_FAILED,
         .epoch = 2,
         .status = STATUS_NO_MEMORY,
         .text = "no room",
         .has_step = true,
         .step = 12,
         .peer_lost = true,
         .fits_pages = 4000000000u},
        {.kind = WIRE_HEARTBEAT,
         .epoch = 1,
         .steps_done = 2,
         .compute_us = 3,
         .wait_us = 4,
         .memory_free = 5},
        {.kind = WIRE_LINKED}, // all zero
    };
    struct wire_bytes bytes = {0};
    struct arena arena = {0};
    struct error error = {0};
    for (size_t i = 0; i < sizeof(messages) / sizeof(messages[0]); i++) {
        const struct wire_worker_message *in = &messages[i];
        struct wire_worker_message out = {0};
        ck_assert_int_eq(wire_encode_worker_message(&bytes, in), 0);
        int status = wire_decode_worker_message(&out, bytes.data, bytes.length, &arena, &error);
        ck_assert_msg(status == 0, "%s", error.text);
        ck_assert(out.kind == in->kind && out.epoch == in->epoch && out.fingerprint == in->fingerprint);
        ck_assert(out.protocol == in->protocol && out.level == in->level && out.threads == in->threads);
        ck_assert(out.nccl == in->nccl && out.oversubscribe == in->oversubscribe);
        ck_assert(out.memory_free == in->memory_free && out.pid == in->pid && out.status == in->status);
        ck_assert(out.done_bytes == in->done_bytes && out.total_bytes == in->total_bytes);
        ck_assert(out.weight_bytes == in->weight_bytes && out.kv_bytes == in->kv_bytes);
        ck_assert(out.source_bytes == in->source_bytes && out.load_us == in->load_us);
        ck_assert(out.n_weights == in->n_weights && out.has_step == in->has_step && out.step == in->step);
        expect_same_ends(&out, in);
        expect_same_strings(&out, in);
        expect_same_bytes(out.link_id, in->link_id);
        ck_assert_str_eq(out.text, in->text ? in->text : "");
    }
    arena_free(&arena);
    wire_bytes_free(&bytes);
}
END_TEST

START_TEST(coordinator_messages_go_there_and_back)
{
    static const struct wire_coordinator_message messages[] = {
        {.kind = WIRE_ASSIGN,
         .epoch = 1,
         .stage = 2,
         .n_stages = 3,
         .first_layer = 4,
         .n_layers = 5,
         .n_slots = 6,
         .n_pages = 7,
         .context = 8,
         .max_positions = 9,
         .level = 10,
         .next_link = WIRE_LINK_NCCL,
         .measure = true},
        {.kind = WIRE_ASSIGN, .previous_link = WIRE_LINK_NCCL},
        {.kind = WIRE_CONNECT, .epoch = 3, .next_address = "unix:/next"},
        {.kind = WIRE_CONNECT, .next_address = "h:1", .previous_id = {.data = "\0\1", .length = 2}},
        {.kind = WIRE_ABORT, .epoch = 4, .text = "a worker was lost"},
        {.kind = WIRE_GOODBYE, .status = STATUS_INVALID, .text = "another model", .retry = true},
        {.kind = WIRE_COORDINATOR_HEARTBEAT, .epoch = 6},
    };
    struct wire_bytes bytes = {0};
    struct arena arena = {0};
    struct error error = {0};
    for (size_t i = 0; i < sizeof(messages) / sizeof(messages[0]); i++) {
        const struct wire_coordinator_message *in = &messages[i];
        struct wire_coordinator_message out = {0};
        ck_assert_int_eq(wire_encode_coordinator_message(&bytes, in), 0);
        int status = wire_decode_coordinator_message(&out, bytes.data, bytes.length, &arena, &error);
        ck_assert_msg(status == 0, "%s", error.text);
        ck_assert(out.kind == in->kind && out.epoch == in->epoch && out.stage == in->stage);
        ck_assert(out.n_stages == in->n_stages && out.first_layer == in->first_layer);
        ck_assert(out.n_layers == in->n_layers && out.n_slots == in->n_slots && out.n_pages == in->n_pages);
        ck_assert(out.context == in->context && out.max_positions == in->max_positions);
        ck_assert(out.level == in->level && out.status == in->status && out.retry == in->retry);
        ck_assert_str_eq(out.text, in->text ? in->text : "");
        ck_assert_str_eq(out.next_address, in->next_address ? in->next_address : "");
        ck_assert(out.next_link == in->next_link && out.previous_link == in->previous_link);
        ck_assert(out.measure == in->measure);
        expect_same_bytes(out.previous_id, in->previous_id);
    }
    arena_free(&arena);
    wire_bytes_free(&bytes);
}
END_TEST

static void expect_corrupt(const void *bytes, size_t length)
{
    struct arena arena = {0};
    struct error error = {0};
    struct wire_worker_message worker = {0};
    ck_assert_int_eq(wire_decode_worker_message(&worker, bytes, length, &arena, &error), STATUS_CORRUPT);
    ck_assert_int_gt(strlen(error.text), 10);
    struct step_plan plan;
    step_plan_init(&plan);
    struct wire_coordinator_message coordinator = {.plan = &plan};
    ck_assert_int_eq(wire_decode_coordinator_message(&coordinator, bytes, length, &arena, &error),
                     STATUS_CORRUPT);
    step_plan_free(&plan);
    arena_free(&arena);
}

START_TEST(garbage_is_refused)
{
    expect_corrupt("", 0);
    expect_corrupt("\xFF", 1);
    expect_corrupt("\x0A", 1); // a length that is missing
    expect_corrupt("\x0A\x05"
                   "ab",
                   4);                                                      // or too large
    expect_corrupt("\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", 11);     // far too large
    expect_corrupt("\x0A\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", 12); // a varint without end
    expect_corrupt("\x00\x00", 2);                                          // field zero
    expect_corrupt("\x0B\x0C", 2);                                          // a group
    expect_corrupt("\x7A\x02\x08\x01", 4);                                  // only an unknown field
    expect_corrupt("\x08\x01", 2);                                          // a known field of another type
    struct wire_worker_message hello = {.kind = WIRE_HELLO, .worker = "x"}, out = {0};
    struct wire_bytes bytes = {0};
    struct arena arena = {0};
    struct error error = {0};
    ck_assert_int_eq(wire_encode_worker_message(&bytes, &hello), 0);
    uint8_t *name = memchr(bytes.data, 'x', bytes.length);
    *name = 0xFF;
    ck_assert_int_eq(wire_decode_worker_message(&out, bytes.data, bytes.length, &arena, &error),
                     STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "worker is not valid UTF-8 at byte 0"));
    *name = 0;
    ck_assert_int_eq(wire_decode_worker_message(&out, bytes.data, bytes.length, &arena, &error),
                     STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "worker has a NUL at byte 0"));
    arena_free(&arena);
    wire_bytes_free(&bytes);
}
END_TEST

START_TEST(unknown_fields_are_skipped)
{
    struct wire_worker_message out = {0};
    struct arena arena = {0};
    struct error error = {0};
    // linked { epoch: 3, 15: 7 as each of the four types }, 100: "later"
    static const uint8_t bytes[] = {0x22, 0x17, 0x08, 0x03, 0x78, 0x07, 0x79, 1,    2,    3,   4,   5,   6,
                                    7,    8,    0x7D, 1,    2,    3,    4,    0x7A, 0x02, 'h', 'i', 0x00};
    ck_assert_int_eq(wire_decode_worker_message(&out, bytes, 2 + 0x17, &arena, &error),
                     STATUS_CORRUPT); // the zero tag
    static const uint8_t good[] = {0x22, 0x16, 0x08, 0x03, 0x78, 0x07, 0x79, 1,   2,   3,    4,
                                   5,    6,    7,    8,    0x7D, 1,    2,    3,   4,   0x7A, 0x02,
                                   'h',  'i',  0xA2, 0x06, 0x05, 'l',  'a',  't', 'e', 'r'};
    int status = wire_decode_worker_message(&out, good, sizeof(good), &arena, &error);
    ck_assert_msg(status == 0, "%s", error.text);
    ck_assert(out.kind == WIRE_LINKED && out.epoch == 3);
    // The same in a step plan: rows [ { slot: 2, 20: 1 } ], 30: "x"
    static const uint8_t step[] = {0x1A, 0x0D, 0x08, 0x09, 0x22, 0x05, 0x08, 0x02,
                                   0xA0, 0x01, 0x01, 0xF2, 0x01, 0x01, 'x'};
    struct step_plan plan;
    step_plan_init(&plan);
    ck_assert_msg(decode_plan(&plan, step, sizeof(step), &error) == 0, "%s", error.text);
    ck_assert(plan.epoch == 9 && plan.n_rows == 1 && plan.rows[0].slot == 2);
    step_plan_free(&plan);
    arena_free(&arena);
}
END_TEST

START_TEST(plans_past_their_limits_are_refused)
{
    struct wire_bytes bytes = {0};
    struct error error = {0};
    struct step_plan plan;
    step_plan_init(&plan);
    // One row too many: 4 bytes each.
    size_t length = 4 * (MAX_STEP_ROWS + 1);
    uint8_t *raw = malloc(length + 16);
    size_t at = 0;
    raw[at++] = 0x1A;
    raw[at++] = (uint8_t)(length & 0x7F) | 0x80;
    raw[at++] = (uint8_t)(length >> 7);
    for (int i = 0; i <= MAX_STEP_ROWS; i++, at += 4)
        memcpy(raw + at, "\x22\x02\x08\x01", 4);
    ck_assert_int_eq(decode_plan(&plan, raw, at, &error), STATUS_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(error.text, "1024"));
    free(raw);
    // Ids without their numbers.
    static const uint8_t lonely[] = {0x1A, 0x04, 0x3A, 0x02, 0x01, 0x02};
    ck_assert_int_eq(decode_plan(&plan, lonely, sizeof(lonely), &error), STATUS_CORRUPT);
    // Alternatives that are not there.
    static const uint8_t beyond[] = {0x2A, 0x04, 0x1A, 0x02, 0x30, 0x05};
    struct wire_worker_message out = {0};
    struct arena arena = {0};
    ck_assert_int_eq(wire_decode_worker_message(&out, beyond, sizeof(beyond), &arena, &error),
                     STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "alternatives"));
    arena_free(&arena);
    step_plan_free(&plan);
    wire_bytes_free(&bytes);
}
END_TEST

START_TEST(every_cut_and_flip_is_survived)
{
    struct step_plan plan, back;
    struct step_result result;
    struct wire_bytes bytes = {0};
    struct error error = {0};
    struct arena arena = {0};
    step_plan_init(&plan);
    step_plan_init(&back);
    step_result_init(&result);
    random_state = 5;
    random_plan(&plan, 6, 6, 12);
    random_result(&result, 6);
    for (int kind = 0; kind < 2; kind++) {
        if (kind == 0)
            encode_plan(&bytes, &plan);
        else
            ck_assert_int_eq(
                wire_encode_worker_message(
                    &bytes, &(struct wire_worker_message){.kind = WIRE_RESULT, .result = &result}),
                0);
        for (size_t i = 0; i < bytes.length * 9; i++) {
            // An exact copy on the heap, so that a sanitizer sees one byte too far.
            size_t length = i < bytes.length ? i : bytes.length;
            uint8_t *exact = malloc(length ? length : 1);
            memcpy(exact, bytes.data, length);
            if (i >= bytes.length)
                exact[(i - bytes.length) / 8] ^= (uint8_t)(1 << i % 8);
            struct wire_worker_message out = {0};
            int status = kind == 0 ? decode_plan(&back, exact, length, &error)
                                   : wire_decode_worker_message(&out, exact, length, &arena, &error);
            ck_assert_msg(status == 0 || status == STATUS_CORRUPT || status == STATUS_EXHAUSTED, "%d",
                          status);
            if (length < bytes.length)
                ck_assert_int_eq(status, STATUS_CORRUPT);
            free(exact);
            arena_reset(&arena);
        }
    }
    arena_free(&arena);
    step_plan_free(&plan);
    step_plan_free(&back);
    step_result_free(&result);
    wire_bytes_free(&bytes);
}
END_TEST

// A decode step of 64 rows, as it crosses at every token: back as it went, in few bytes.
START_TEST(a_decode_step_is_small)
{
    struct step_plan plan, back;
    struct step_result result, back_result;
    struct wire_bytes bytes = {0};
    struct error error = {0};
    struct arena arena = {0};
    step_plan_init(&plan);
    step_plan_init(&back);
    step_result_init(&result);
    step_result_init(&back_result);
    plan.number = 100000;
    for (uint32_t i = 0; i < 64; i++) {
        *step_plan_add_row(&plan) = (struct step_row){.slot = i,
                                                      .position = 1000 + i,
                                                      .count = 1,
                                                      .generated = true,
                                                      .from_sample = true,
                                                      .source_step = 99999,
                                                      .source_row = i,
                                                      .draws = 1,
                                                      .logits = STEP_LOGITS_LAST,
                                                      .next_token = -1};
        *step_result_add_sample(&result) = (struct step_sample){.row = i, .token = (int32_t)(1000 * i)};
    }
    encode_plan(&bytes, &plan);
    ck_assert_uint_le(bytes.length, 64 * 32);
    ck_assert_int_eq(decode_plan(&back, bytes.data, bytes.length, &error), 0);
    struct wire_worker_message message = {.kind = WIRE_RESULT, .result = &result};
    wire_encode_worker_message(&bytes, &message);
    ck_assert_uint_le(bytes.length, 64 * 10);
    message.result = &back_result;
    ck_assert_int_eq(wire_decode_worker_message(&message, bytes.data, bytes.length, &arena, &error), 0);
    expect_same_result(&result, &back_result);
    expect_same_plan(&plan, &back);
    arena_free(&arena);
    step_plan_free(&plan);
    step_plan_free(&back);
    step_result_free(&result);
    step_result_free(&back_result);
    wire_bytes_free(&bytes);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("wire_pool");
    TCase *tests = tcase_create("pool");
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, plans_go_there_and_back);
    tcase_add_test(tests, plans_agree_with_the_generated_code);
    tcase_add_test(tests, results_go_there_and_back);
    tcase_add_test(tests, worker_messages_go_there_and_back);
    tcase_add_test(tests, coordinator_messages_go_there_and_back);
    tcase_add_test(tests, garbage_is_refused);
    tcase_add_test(tests, unknown_fields_are_skipped);
    tcase_add_test(tests, plans_past_their_limits_are_refused);
    tcase_add_test(tests, every_cut_and_flip_is_survived);
    tcase_add_test(tests, a_decode_step_is_small);
    suite_add_tcase(suite, tests);
    return suite;
}
