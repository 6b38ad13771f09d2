// The worker pool against fake workers over a real connection: joins and refusals, assembly, losses, spares,
// failures, steps, the watchdog.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "coordinator/pipeline.h"
#include "tests/pool_fixture.h"
#include "tests/suite.h"

// --- assembly ---

START_TEST(two_workers_become_a_pool)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct wire_pool picture = expect_state(WIRE_POOL_WAITING);
    ck_assert_ptr_nonnull(strstr(picture.problem, "0 of 2 workers have joined"));
    struct fake *a = fake_join("a");
    while (pool_count_joined(pool) == 0)
        pump_once();
    struct fake *b = fake_dial("b");
    struct wire_worker_message hello = hello_of(b);
    hello.level = 1;
    fake_say(b, &hello);

    struct heard first = fake_expect(a, WIRE_ASSIGN), second = fake_expect(b, WIRE_ASSIGN);
    ck_assert_uint_eq(first.message.stage, 0);
    ck_assert_uint_eq(second.message.stage, 1);
    ck_assert_uint_eq(first.message.n_stages, 2);
    ck_assert_uint_eq(first.message.epoch, second.message.epoch);
    ck_assert_uint_eq(first.message.first_layer, 0);
    ck_assert_uint_eq(second.message.first_layer, first.message.n_layers);
    ck_assert_uint_eq(first.message.n_layers + second.message.n_layers, spec.n_layers);
    ck_assert_uint_eq(first.message.level, 1); // the least
    ck_assert_uint_eq(first.message.n_slots, 4);
    ck_assert_uint_eq(first.message.n_pages, 4 * 2); // four sequences of 128 positions
    ck_assert_uint_eq(first.message.context, 128);
    ck_assert_uint_eq(first.message.max_positions, 64);

    uint64_t epoch = first.message.epoch;
    fake_say(a, &(struct wire_worker_message){
                    .kind = WIRE_PROGRESS, .epoch = epoch, .done_bytes = 10, .total_bytes = 900});
    fake_say(a, &(struct wire_worker_message){
                    .kind = WIRE_LOADED, .epoch = epoch, .weight_bytes = 1000, .source_bytes = 900});
    pump_for(50000);
    picture = expect_state(WIRE_POOL_LOADING);
    ck_assert_uint_eq(picture.stages[0].loaded_bytes, 900);
    ck_assert_uint_eq(picture.stages[0].weight_bytes, 1000);
    ck_assert_str_eq(picture.stages[0].worker, "a");
    ck_assert_str_eq(picture.stages[1].state, "loading");
    fake_say(b, &(struct wire_worker_message){.kind = WIRE_LOADED, .epoch = epoch});
    ck_assert_str_eq(fake_expect(a, WIRE_CONNECT).text, "unix:/b");
    ck_assert_str_eq(fake_expect(b, WIRE_CONNECT).text, "unix:/a"); // the last stage's next is the first
    fake_say(a, &(struct wire_worker_message){.kind = WIRE_LINKED, .epoch = epoch});
    fake_say(b, &(struct wire_worker_message){.kind = WIRE_LINKED, .epoch = epoch});
    uint32_t at = expect_event(WORKER_POOL_READY);
    ck_assert_uint_eq(seen[at].epoch, epoch);
    ck_assert_uint_eq(seen[at].n_stages, 2);
    ck_assert_uint_eq(seen[at].n_pages, 8);
    picture = expect_state(WIRE_POOL_READY);
    ck_assert_str_eq(picture.problem, "");
    fake_leave(a);
    fake_leave(b);
    close_pool();
}
END_TEST

START_TEST(more_workers_than_layers_are_refused_at_the_start)
{
    open_pool((struct worker_pool_options){.n_workers = 1});
    struct worker_pool *too_many;
    struct error error = {0};
    struct worker_pool_options options = {.spec = &spec, .gguf = gguf, .n_workers = spec.n_layers + 1};
    ck_assert_int_eq(worker_pool_new(&too_many, &options, &error), STATUS_INVALID);
    close_pool();
}
END_TEST

// --- refusals ---

static void expect_refusal(struct fake *fake, const struct wire_worker_message *hello, bool retry,
                           const char *part)
{
    fake_say(fake, hello);
    struct heard goodbye = fake_expect(fake, WIRE_GOODBYE);
    ck_assert_int_eq(goodbye.message.retry, retry);
    ck_assert_msg(strstr(goodbye.text, part) != NULL, "\"%s\" is not in: %s", part, goodbye.text);
    fake_expect_end(fake);
    fake_leave(fake);
}

START_TEST(strangers_are_refused_with_a_sentence)
{
    open_pool((struct worker_pool_options){.n_workers = 2, .backend = "cpu"});
    struct fake *fake = fake_dial("x");
    struct wire_worker_message hello = hello_of(fake);
    hello.fingerprint++;
    expect_refusal(fake, &hello, false, "another model file");
    fake = fake_dial("x");
    hello = hello_of(fake);
    hello.protocol = 7;
    expect_refusal(fake, &hello, false, "version 7 of the pool protocol");
    fake = fake_dial("x");
    hello = hello_of(fake);
    hello.backend = "cuda";
    expect_refusal(fake, &hello, false, "this pool is for cpu");
    fake = fake_dial("x");
    hello = hello_of(fake);
    hello.backend = "abacus";
    expect_refusal(fake, &hello, false, "\"abacus\" is unknown");
    fake = fake_dial("x");
    hello = hello_of(fake);
    hello.worker = "";
    expect_refusal(fake, &hello, false, "name has 0 bytes");
    fake = fake_dial("x");
    hello = hello_of(fake);
    hello.link_address = "";
    expect_refusal(fake, &hello, false, "previous stage");
    ck_assert_uint_eq(pool_count_joined(pool), 0);
    close_pool();
}
END_TEST

START_TEST(a_name_is_taken_once)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct fake *a = fake_join("a");
    while (pool_count_joined(pool) == 0)
        pump_once();
    struct fake *again = fake_dial("a");
    struct wire_worker_message hello = hello_of(again);
    expect_refusal(again, &hello, true, "a worker named a is here already");
    fake_leave(a);
    while (pool_count_joined(pool) > 0)
        pump_once();
    again = fake_join("a"); // the first one is gone: the name is free
    while (pool_count_joined(pool) == 0)
        pump_once();
    fake_leave(again);
    close_pool();
}
END_TEST

START_TEST(a_silent_namesake_is_replaced)
{
    open_pool((struct worker_pool_options){.n_workers = 2, .heartbeat_us = 50000});
    struct fake *old = fake_join("a");
    while (pool_count_joined(pool) == 0)
        pump_once();
    pump_for(300000);
    struct fake *new = fake_join("a");
    fake_expect_end(old);
    pump_for(50000);
    ck_assert_uint_eq(pool_count_joined(pool), 1);
    fake_leave(old);
    fake_leave(new);
    close_pool();
}
END_TEST

START_TEST(nonsense_is_hung_up_on)
{
    open_pool((struct worker_pool_options){.n_workers = 1});
    struct fake *fake = fake_dial("x");
    fake_say(fake, &(struct wire_worker_message){.kind = WIRE_HEARTBEAT}); // before any hello
    fake_expect_end(fake);
    fake_leave(fake);
    fake = fake_dial("y");
    rpc_stream_send(fake->stream, "\xff\xff\xff", 3);
    fake_expect_end(fake);
    fake_leave(fake);
    fake = fake_join("z");
    serve(&fake, 1);
    rpc_stream_send(fake->stream, "\xff\xff\xff", 3);
    uint32_t at = expect_event(WORKER_POOL_LOST);
    ck_assert_msg(strstr(seen_text[at], "worker z") && strstr(seen_text[at], "sent what it should not"), "%s",
                  seen_text[at]);
    fake_leave(fake);
    close_pool();
}
END_TEST

// --- losses ---

START_TEST(a_spare_takes_over)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct fake *fakes[3] = {0};
    const char *names[] = {"a", "b", "c"};
    for (uint32_t i = 0; i < 3; i++) {
        fakes[i] = fake_join(names[i]);
        while (pool_count_joined(pool) <= i)
            pump_once();
    }
    uint64_t epoch = serve(fakes, 2);
    fake_leave(fakes[0]);
    uint32_t at = expect_event(WORKER_POOL_LOST);
    ck_assert_msg(strstr(seen_text[at], "worker a (layers 0 to "), "%s", seen_text[at]);
    struct heard abort = fake_expect(fakes[1], WIRE_ABORT);
    ck_assert_uint_eq(abort.message.epoch, epoch);
    ck_assert_ptr_nonnull(strstr(abort.text, "worker a"));
    struct fake *now[2] = {fakes[2], fakes[1]}; // b keeps the layers it has
    ck_assert_uint_gt(serve(now, 2), epoch);
    fake_leave(fakes[1]);
    fake_leave(fakes[2]);
    close_pool();
}
END_TEST

START_TEST(without_a_spare_the_pool_waits)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct fake *fakes[2] = {fake_join("a"), NULL};
    while (pool_count_joined(pool) == 0)
        pump_once();
    fakes[1] = fake_join("b");
    uint64_t epoch = serve(fakes, 2);
    fake_leave(fakes[1]);
    struct wire_pool picture = expect_state(WIRE_POOL_REASSEMBLING);
    ck_assert_msg(strstr(picture.problem, "worker b") && strstr(picture.problem, "1 of 2 workers"), "%s",
                  picture.problem);
    fake_expect(fakes[0], WIRE_ABORT);
    fakes[1] = fake_join("b");
    ck_assert_uint_gt(serve(fakes, 2), epoch);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(workers_that_come_back_get_their_layers_back)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct fake *fakes[2] = {fake_join("a"), NULL};
    while (pool_count_joined(pool) == 0)
        pump_once();
    fakes[1] = fake_join("b");
    serve(fakes, 2);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    while (pool_count_joined(pool) > 0)
        pump_once();
    fakes[1] = fake_join("b"); // in the other order, from the same processes
    while (pool_count_joined(pool) == 0)
        pump_once();
    fakes[0] = fake_join("a");
    serve(fakes, 2);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(silence_is_a_loss)
{
    open_pool((struct worker_pool_options){.n_workers = 1, .heartbeat_us = 50000, .silence_us = 400000});
    struct fake *fake = fake_join("a");
    serve(&fake, 1);
    for (int i = 0; i < 12; i++) { // longer than the silence that is allowed
        fake_say(fake, &(struct wire_worker_message){.kind = WIRE_HEARTBEAT, .epoch = seen[0].epoch});
        pump_for(50000);
    }
    ck_assert_uint_eq(n_seen, 1);
    uint32_t at = expect_event(WORKER_POOL_LOST);
    ck_assert_msg(strstr(seen_text[at], "is silent"), "%s", seen_text[at]);
    fake_expect_end(fake);
    fake_leave(fake);
    close_pool();
}
END_TEST

// --- failures ---

START_TEST(a_failed_load_is_told_and_tried_again)
{
    open_pool((struct worker_pool_options){.n_workers = 1, .retry_us = 100000});
    struct fake *fake = fake_join("a");
    uint64_t epoch = fake_expect(fake, WIRE_ASSIGN).message.epoch;
    fake_say(fake, &(struct wire_worker_message){.kind = WIRE_FAILED,
                                                 .epoch = epoch,
                                                 .status = STATUS_NO_MEMORY,
                                                 .text = "layer.1.ffn_up.weight needs 5 MB, 3 MB are free"});
    struct wire_pool picture = expect_state(WIRE_POOL_FAILED);
    ck_assert_msg(strstr(picture.problem, "worker a could not load its layers: layer.1.ffn_up.weight"), "%s",
                  picture.problem);
    ck_assert_ptr_nonnull(worker_pool_failure(pool));
    ck_assert_uint_eq(n_seen, 0); // it was never ready, so nothing was lost
    fake_expect(fake, WIRE_ABORT);
    ck_assert_uint_gt(serve(&fake, 1), epoch);
    fake_leave(fake);
    close_pool();
}
END_TEST

START_TEST(fewer_pages_are_tried_at_once)
{
    open_pool((struct worker_pool_options){.n_workers = 2, .retry_us = 60000000});
    struct fake *fakes[2] = {fake_join("a")};
    while (pool_count_joined(pool) == 0)
        pump_once();
    fakes[1] = fake_join("b");
    static const uint32_t FIT[] = {8, 6, 3}; // of 8
    for (int i = 1; i < 3; i++) {
        struct heard assign = fake_expect(fakes[0], WIRE_ASSIGN);
        ck_assert_uint_eq(assign.message.n_pages, FIT[i - 1]);
        fake_expect(fakes[1], WIRE_ASSIGN);
        fake_say(fakes[i - 1], &(struct wire_worker_message){.kind = WIRE_FAILED,
                                                             .epoch = assign.message.epoch,
                                                             .status = STATUS_NO_MEMORY,
                                                             .text = "too many",
                                                             .fits_pages = FIT[i]});
        fake_expect(fakes[0], WIRE_ABORT);
        fake_expect(fakes[1], WIRE_ABORT);
    }
    uint64_t epoch = fake_expect(fakes[0], WIRE_ASSIGN).message.epoch;
    struct heard assign = fake_expect(fakes[1], WIRE_ASSIGN);
    ck_assert_uint_eq(assign.message.n_pages, 3);
    fake_say(fakes[1], &(struct wire_worker_message){.kind = WIRE_FAILED,
                                                     .epoch = epoch,
                                                     .status = STATUS_NO_MEMORY,
                                                     .text = "too many",
                                                     .fits_pages = 1}); // no sequence has room in that
    struct wire_pool picture = expect_state(WIRE_POOL_FAILED);
    ck_assert_msg(strstr(picture.problem, "worker b could not load its layers: too many"), "%s",
                  picture.problem);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(waiting_is_not_spinning)
{
    open_pool((struct worker_pool_options){.n_workers = 1, .retry_us = 50000});
    struct fake *fake = fake_join("a");
    uint64_t epoch = fake_expect(fake, WIRE_ASSIGN).message.epoch;
    fake_say(fake, &(struct wire_worker_message){.kind = WIRE_FAILED, .epoch = epoch, .text = "no luck"});
    expect_state(WIRE_POOL_FAILED);
    fake_leave(fake);
    while (pool_count_joined(pool) > 0)
        pump_once();
    pump_for(100000); // past the back-off, and nobody is here to try with
    ck_assert_int_gt(worker_pool_wake_us(pool), clock_now_us());
    close_pool();
}
END_TEST

START_TEST(one_that_failed_less_is_preferred)
{
    open_pool((struct worker_pool_options){.n_workers = 1, .retry_us = 50000});
    struct fake *bad = fake_join("bad");
    uint64_t epoch = fake_expect(bad, WIRE_ASSIGN).message.epoch;
    struct fake *good = fake_join("good");
    while (pool_count_joined(pool) < 2)
        pump_once();
    fake_say(bad, &(struct wire_worker_message){.kind = WIRE_FAILED, .epoch = epoch, .text = "out of luck"});
    serve(&good, 1);
    fake_leave(bad);
    fake_leave(good);
    close_pool();
}
END_TEST

START_TEST(the_broken_stream_explains_a_broken_link)
{
    open_pool((struct worker_pool_options){.n_workers = 2, .retry_us = 50000, .peer_grace_us = 300000});
    struct fake *fakes[2] = {fake_join("a"), NULL};
    while (pool_count_joined(pool) == 0)
        pump_once();
    fakes[1] = fake_join("b");
    uint64_t epoch = serve(fakes, 2);
    fake_say(fakes[0], &(struct wire_worker_message){
                           .kind = WIRE_FAILED, .epoch = epoch, .text = "the link broke", .peer_lost = true});
    pump_for(50000);
    ck_assert(worker_pool_is_ready(pool));
    fake_leave(fakes[1]);
    uint32_t at = expect_event(WORKER_POOL_LOST);
    ck_assert_msg(strstr(seen_text[at], "worker b"), "%s", seen_text[at]);
    fake_expect(fakes[0], WIRE_ABORT);

    fakes[1] = fake_join("b");
    epoch = serve(fakes, 2);
    fake_say(fakes[0], &(struct wire_worker_message){
                           .kind = WIRE_FAILED, .epoch = epoch, .text = "the link broke", .peer_lost = true});
    at = expect_event(WORKER_POOL_LOST); // nobody left: the link alone is to blame
    ck_assert_msg(strstr(seen_text[at], "the link broke"), "%s", seen_text[at]);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(what_does_not_fit_is_said_with_numbers)
{
    open_pool((struct worker_pool_options){.n_workers = 1, .retry_us = 50000});
    struct fake *fake = fake_dial("small");
    struct wire_worker_message hello = hello_of(fake);
    hello.memory_free = 100000;
    fake_say(fake, &hello);
    struct wire_pool picture = expect_state(WIRE_POOL_FAILED);
    ck_assert_msg(strstr(picture.problem, "the model does not fit: worker small"), "%s", picture.problem);
    struct fake *large = fake_join("large"); // room has come: no need to wait for the back-off
    fake_leave(fake);
    serve(&large, 1);
    fake_leave(large);
    close_pool();
}
END_TEST

START_TEST(workers_of_one_host_share_its_memory)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct member a = {.name = "a", .backend = "cpu", .device = "", .host = "h", .memory = 0};
    struct member b = a;
    struct member *stages[] = {&a, &b};
    uint64_t weights = pool->plan.stages[0].weight_bytes + pool->plan.stages[1].weight_bytes;
    uint64_t page =
        (pool->plan.stages[0].kv_bytes_per_position + pool->plan.stages[1].kv_bytes_per_position) * 64;
    struct error error = {0};
    uint32_t pages;
    a.memory = b.memory = (uint64_t)((double)(weights + 5 * page) / 0.9) + 100;
    ck_assert_int_eq(pool_count_pages(&pool->options, &pool->plan, stages, &pages, &error), 0);
    ck_assert_uint_eq(pages, 5);
    b.host = "other"; // each has its own: more than the four sequences can use
    ck_assert_int_eq(pool_count_pages(&pool->options, &pool->plan, stages, &pages, &error), 0);
    ck_assert_uint_eq(pages, 8);
    close_pool();
}
END_TEST

// --- steps ---

static uint32_t n_results;
static uint64_t last_result;
static int32_t last_token;

static void take_result(const struct worker_pool_event *event)
{
    if (event->kind != WORKER_POOL_RESULT)
        return;
    n_results++;
    last_result = event->result->number;
    last_token = event->result->n_samples ? event->result->samples[0].token : -1;
}

static void make_plan(struct step_plan *plan, uint64_t epoch, uint64_t number)
{
    const int32_t tokens[] = {1, 2, 3};
    const uint32_t page = 0;
    step_plan_init(plan);
    plan->epoch = epoch;
    plan->number = number;
    struct step_command *open = step_plan_add_command(plan, STEP_OPEN, 0);
    open->sampling = SAMPLING_DEFAULTS;
    open->history_first = (uint32_t)step_plan_add_tokens(plan, tokens, 3);
    open->history_count = open->history_prompt = 3;
    struct step_command *pages = step_plan_add_command(plan, STEP_PAGES, 0);
    pages->pages_first = (uint32_t)step_plan_add_pages(plan, &page, 1);
    pages->pages_count = 1;
    struct step_row *row = step_plan_add_row(plan);
    row->count = 3;
    row->tokens_first = open->history_first;
    row->draws = 1;
    row->logits = STEP_LOGITS_LAST;
    row->next_token = -1;
}

static void say_result(struct fake *fake, uint64_t epoch, uint64_t number, int32_t token)
{
    struct step_result result;
    step_result_init(&result);
    result.epoch = epoch;
    result.number = number;
    step_result_add_sample(&result)->token = token;
    fake_say(fake, &(struct wire_worker_message){.kind = WIRE_RESULT, .epoch = epoch, .result = &result});
    step_result_free(&result);
}

START_TEST(steps_go_to_all_and_come_back_from_the_last)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct fake *fakes[2] = {fake_join("a"), NULL};
    while (pool_count_joined(pool) == 0)
        pump_once();
    fakes[1] = fake_join("b");
    struct step_plan plan;
    struct error error = {0};
    make_plan(&plan, 1, 0);
    ck_assert_int_eq(worker_pool_send_step(pool, &plan, &error), STATUS_UNAVAILABLE);
    plan.epoch = serve(fakes, 2);
    n_results = 0;
    on_event = take_result;
    ck_assert_int_eq(worker_pool_send_step(pool, &plan, &error), STATUS_OK);
    for (int s = 0; s < 2; s++) {
        struct heard step = fake_expect(fakes[s], WIRE_STEP);
        ck_assert_uint_eq(step.rows, 1);
        ck_assert_uint_eq(step.message.epoch, plan.epoch);
    }
    say_result(fakes[0], plan.epoch, 0, 5);     // not the last stage
    say_result(fakes[1], plan.epoch - 1, 0, 6); // another epoch
    say_result(fakes[1], plan.epoch, 0, 7);
    expect_event(WORKER_POOL_RESULT);
    pump_for(50000);
    ck_assert_uint_eq(n_results, 1);
    ck_assert_int_eq(last_token, 7);
    step_plan_free(&plan);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

static struct pipeline *open_pipeline(int64_t timeout_us)
{
    struct pipeline *pipeline;
    const struct pipeline_options options = {
        .pool = pool,
        .bounds = {.n_slots = 4, .context = 128, .vocab_size = spec.vocab_size, .max_positions = 64},
        .step_timeout_us = timeout_us};
    ck_assert_int_eq(pipeline_new(&pipeline, &options), 0);
    return pipeline;
}

// Half of a share is what the last heartbeat says; a worker has not more time than there is.
START_TEST(heartbeats_tell_what_a_stage_does)
{
    open_pool((struct worker_pool_options){.n_workers = 1});
    struct fake *fake = fake_join("a");
    uint64_t epoch = serve(&fake, 1);
    struct wire_worker_message beat = {.kind = WIRE_HEARTBEAT, .epoch = epoch, .wait_us = 3600000000};
    struct wire_pool described = {0};
    pump_for(10000);
    fake_say(fake, &beat);
    while (described.n_stages == 0 || described.stages[0].waiting == 0) {
        pump_once();
        worker_pool_describe(pool, &described);
    }
    ck_assert_double_eq(described.stages[0].waiting, 0.5);
    ck_assert_double_eq(described.stages[0].busy, 0);
    pump_for(10000);
    beat.compute_us = 3600000000;
    fake_say(fake, &beat);
    while (described.stages[0].busy == 0) {
        pump_once();
        worker_pool_describe(pool, &described);
    }
    ck_assert_double_eq(described.stages[0].waiting, 0.25);
    ck_assert_double_eq(described.stages[0].busy, 0.5);
    fake_leave(fake);
    close_pool();
}
END_TEST

START_TEST(the_watchdog_names_the_stage_that_hangs)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct fake *fakes[2] = {fake_join("a"), NULL};
    while (pool_count_joined(pool) == 0)
        pump_once();
    fakes[1] = fake_join("b");
    struct pipeline *pipeline = open_pipeline(200000);
    struct step_plan plan;
    struct error error = {0};
    make_plan(&plan, serve(fakes, 2), 0);
    pipeline_begin(pipeline, plan.epoch, 8);
    ck_assert_int_eq(pipeline_wake_us(pipeline), INT64_MAX);
    ck_assert_msg(pipeline_send(pipeline, &plan, clock_now_us(), &error) == 0, "%s", error.text);
    fake_expect(fakes[0], WIRE_STEP);
    fake_expect(fakes[1], WIRE_STEP);
    fake_say(fakes[0],
             &(struct wire_worker_message){.kind = WIRE_HEARTBEAT, .epoch = plan.epoch, .steps_done = 1});
    pump_for(100000);
    pipeline_check(pipeline, clock_now_us());
    ck_assert(worker_pool_is_ready(pool));
    pump_for(200000);
    pipeline_check(pipeline, clock_now_us());
    uint32_t at = expect_event(WORKER_POOL_LOST);
    ck_assert_msg(strstr(seen_text[at], "worker b") && strstr(seen_text[at], "did not finish step 0"), "%s",
                  seen_text[at]);
    fake_expect(fakes[0], WIRE_ABORT);
    ck_assert(fake_expect(fakes[1], WIRE_GOODBYE).message.retry);
    fake_expect_end(fakes[1]);
    step_plan_free(&plan);
    pipeline_free(pipeline);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(results_come_in_order_and_plans_are_checked)
{
    open_pool((struct worker_pool_options){.n_workers = 1});
    struct fake *fake = fake_join("a");
    struct pipeline *pipeline = open_pipeline(10000000);
    struct step_plan plan;
    struct error error = {0};
    int64_t took = -1;
    make_plan(&plan, serve(&fake, 1), 0);
    pipeline_begin(pipeline, plan.epoch, 8);
    struct step_result result = {.epoch = plan.epoch, .number = 0};
    ck_assert_int_eq(pipeline_take(pipeline, &result, 1000, &took, &error), STATUS_CORRUPT);
    ck_assert_int_eq(pipeline_send(pipeline, &plan, 1000, &error), 0);
    result.number = 1;
    ck_assert_int_eq(pipeline_take(pipeline, &result, 1500, &took, &error), STATUS_CORRUPT);
    result.number = 0;
    ck_assert_int_eq(pipeline_take(pipeline, &result, 1500, &took, &error), 0);
    ck_assert_int_eq(took, 500);
    plan.rows[0].slot = 4; // out of bounds
    ck_assert_int_eq(pipeline_send(pipeline, &plan, 2000, &error), STATUS_CORRUPT);
    step_plan_free(&plan);
    pipeline_free(pipeline);
    fake_leave(fake);
    close_pool();
}
END_TEST

START_TEST(nobodys_fault_keeps_the_workers)
{
    open_pool((struct worker_pool_options){.n_workers = 1, .retry_us = 50000});
    struct fake *fake = fake_join("a");
    uint64_t epoch = serve(&fake, 1);
    worker_pool_lose(pool, -1, clock_now_us(), "the plan made no sense");
    ck_assert_str_eq(seen_text[expect_event(WORKER_POOL_LOST)], "the plan made no sense");
    fake_expect(fake, WIRE_ABORT);
    ck_assert_uint_gt(serve(&fake, 1), epoch);
    fake_leave(fake);
    close_pool();
}
END_TEST

START_TEST(farewell_reaches_all_and_closes_the_door)
{
    open_pool((struct worker_pool_options){.n_workers = 2});
    struct fake *a = fake_join("a");
    while (pool_count_joined(pool) == 0)
        pump_once();
    worker_pool_farewell(pool, "closing time");
    struct heard goodbye = fake_expect(a, WIRE_GOODBYE);
    ck_assert_str_eq(goodbye.text, "closing time");
    ck_assert(goodbye.message.retry);
    fake_expect_end(a);
    struct fake *late = fake_join("late");
    fake_expect_end(late);
    fake_leave(a);
    fake_leave(late);
    close_pool();
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("worker_pool");
    TCase *tcase = tcase_create("worker_pool");
    tcase_set_timeout(tcase, 30);
    tcase_add_test(tcase, two_workers_become_a_pool);
    tcase_add_test(tcase, more_workers_than_layers_are_refused_at_the_start);
    tcase_add_test(tcase, strangers_are_refused_with_a_sentence);
    tcase_add_test(tcase, a_name_is_taken_once);
    tcase_add_test(tcase, a_silent_namesake_is_replaced);
    tcase_add_test(tcase, nonsense_is_hung_up_on);
    tcase_add_test(tcase, a_spare_takes_over);
    tcase_add_test(tcase, without_a_spare_the_pool_waits);
    tcase_add_test(tcase, workers_that_come_back_get_their_layers_back);
    tcase_add_test(tcase, silence_is_a_loss);
    tcase_add_test(tcase, a_failed_load_is_told_and_tried_again);
    tcase_add_test(tcase, fewer_pages_are_tried_at_once);
    tcase_add_test(tcase, waiting_is_not_spinning);
    tcase_add_test(tcase, one_that_failed_less_is_preferred);
    tcase_add_test(tcase, the_broken_stream_explains_a_broken_link);
    tcase_add_test(tcase, what_does_not_fit_is_said_with_numbers);
    tcase_add_test(tcase, workers_of_one_host_share_its_memory);
    tcase_add_test(tcase, steps_go_to_all_and_come_back_from_the_last);
    tcase_add_test(tcase, heartbeats_tell_what_a_stage_does);
    tcase_add_test(tcase, the_watchdog_names_the_stage_that_hangs);
    tcase_add_test(tcase, results_come_in_order_and_plans_are_checked);
    tcase_add_test(tcase, nobodys_fault_keeps_the_workers);
    tcase_add_test(tcase, farewell_reaches_all_and_closes_the_door);
    suite_add_tcase(suite, tcase);
    return suite;
}
