// The executor on a small model: what a plan may ask, in which order, and what it gets; everything else is
// refused and ends the epoch. Links are played by the test.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/device_internal.h"
#include "tests/ops/engine_driver.h"
#include "tests/suite.h"
#include "worker/executor.h"
#include "worker/local_engine.h"

enum { VOCAB = 300, SLOTS = 12, CONTEXT = 256, POSITIONS = 200, C = 256, LAYERS = 2 };

static char model[1024];
static struct local_engine engine;
static struct error error;
static struct device_options where = {.threads = 1}; // its backend: see open_engine

static void open_engine(int vocabulary)
{
    const int32_t token = 1;
    char options[128];
    double *logits;
    size_t count;
    where.backend = getenv("STRATA_TEST_BACKEND");
    snprintf(options, sizeof(options),
             "arch=llama mix=q8_0 layers=2 vocab_size=%d embd=256 heads=4 kv_heads=2 ffn=256 context=512",
             vocabulary);
    ck_assert_msg(engine_oracle(options, &token, 1, model, sizeof(model), &logits, &count),
                  "the generator needs a python3 with numpy");
    free(logits);
    ck_assert_msg(local_engine_open(&engine, model, &where, SLOTS, CONTEXT, POSITIONS, &error) == 0, "%s",
                  error.text);
}

static void setup(void)
{
    open_engine(VOCAB);
}

static void teardown(void)
{
    local_engine_close(&engine);
}

static struct step_command *add_open(uint32_t slot)
{
    struct step_command *open = step_plan_add_command(&engine.plan, STEP_OPEN, slot);
    open->sampling = SAMPLING_DEFAULTS;
    open->sampling.temperature = 0;
    return open;
}

static void add_pages(uint32_t slot, uint32_t first, uint32_t page, uint32_t count)
{
    struct step_command *pages = step_plan_add_command(&engine.plan, STEP_PAGES, slot);
    pages->table_first = first;
    pages->pages_first = engine.plan.n_pages;
    pages->pages_count = count;
    for (uint32_t i = 0; i < count; i++, page++)
        step_plan_add_pages(&engine.plan, &page, 1);
}

static struct step_row *add_row(uint32_t slot, uint32_t position, uint32_t count)
{
    struct step_row *row = step_plan_add_row(&engine.plan);
    row->slot = slot;
    row->position = position;
    row->count = count;
    row->tokens_first = engine.plan.n_tokens;
    for (uint32_t i = 0; i < count; i++) {
        int32_t token = (int32_t)((position + i) * 37 % VOCAB);
        step_plan_add_tokens(&engine.plan, &token, 1);
    }
    return row;
}

static struct step_row *drawing(struct step_row *row, uint32_t draws)
{
    row->draws = draws;
    row->logits = STEP_LOGITS_LAST;
    return row;
}

static void run(void)
{
    int status = local_engine_run(&engine, &error);
    ck_assert_msg(status == 0, "%s", error.text);
}

// The plan at hand must fail and say `text`; afterwards every plan fails.
static void refuse(int status, const char *text)
{
    ck_assert_int_eq(local_engine_run(&engine, &error), status);
    ck_assert_msg(strstr(error.text, text) != NULL, "'%s' does not say '%s'", error.text, text);
    ck_assert_int_eq(local_engine_run(&engine, &error), STATUS_UNAVAILABLE);
}

START_TEST(test_a_sequence_is_opened_computed_and_closed)
{
    add_open(1);
    add_pages(1, 0, 0, 2);
    drawing(add_row(1, 0, 10), 1);
    run();
    ck_assert_uint_eq(engine.result.n_samples, 1);
    ck_assert_uint_eq(engine.result.number, 0);
    ck_assert_uint_eq(engine.result.samples[0].row, 0);
    int32_t drawn = engine.result.samples[0].token;
    ck_assert(drawn >= 0 && drawn < VOCAB);
    ck_assert_uint_gt(engine.result.compute_us, 0);
    struct step_row *row = drawing(add_row(1, 10, 1), 1);
    row->generated = row->from_sample = true;
    row->source_step = 0;
    row->source_row = 0;
    run();
    ck_assert_uint_eq(engine.result.number, 1);
    step_plan_add_command(&engine.plan, STEP_CLOSE, 1);
    run();
    ck_assert_uint_eq(engine.result.n_samples, 0);
    add_open(1); // again, from the beginning
    add_pages(1, 0, 3, 1);
    drawing(add_row(1, 0, 10), 1);
    run();
    ck_assert_int_eq(engine.result.samples[0].token, drawn);
}
END_TEST

START_TEST(test_plans_of_another_epoch_are_dropped)
{
    engine.plan.epoch = 2;
    engine.plan.number = 0;
    add_row(3, 0, 1); // would be refused
    ck_assert_int_eq(executor_run(engine.executor, &engine.plan, &engine.result, &error), EXECUTOR_DROPPED);
    step_plan_clear(&engine.plan);
    engine.plan.epoch = 1;
    run();
}
END_TEST

static void break_rule(int rule)
{
    switch (rule) {
    case 0:
        add_open(0);
        add_open(0);
        refuse(STATUS_CORRUPT, "slot 0 is opened, but it is open");
        break;
    case 1:
        step_plan_add_command(&engine.plan, STEP_CLOSE, 2);
        refuse(STATUS_CORRUPT, "slot 2 is closed, but it is closed");
        break;
    case 2:
        add_pages(2, 0, 0, 1);
        refuse(STATUS_CORRUPT, "slot 2 is given pages");
        break;
    case 3:
        add_open(0);
        add_pages(0, 1, 0, 1);
        refuse(STATUS_CORRUPT, "begin at entry 1, but its table has 0");
        break;
    case 4:
        add_row(1, 0, 1);
        refuse(STATUS_CORRUPT, "slot 1, which is closed");
        break;
    case 5:
        add_open(0);
        add_pages(0, 0, 0, 1);
        add_row(0, 60, 5);
        refuse(STATUS_CORRUPT, "its 1 pages hold 64");
        break;
    case 6:
        add_open(0);
        add_pages(0, 0, 0, 1);
        add_row(0, 0, 5);
        run();
        add_row(0, 6, 1);
        refuse(STATUS_CORRUPT, "begins at position 6, expected 5");
        break;
    case 7:
        add_open(0);
        add_pages(0, 0, 0, 1);
        add_row(0, 0, 5);
        run();
        add_row(0, 4, 1);
        refuse(STATUS_CORRUPT, "begins at position 4, expected 5");
        break;
    case 8:
        engine.steps = 1;
        refuse(STATUS_CORRUPT, "step 1 came, expected step 0");
        break;
    case 9: // step_plan_validate is asked
        add_open(SLOTS);
        refuse(STATUS_CORRUPT, "slot 12, of 12");
        break;
    }
}

START_TEST(test_broken_rules_end_the_epoch)
{
    break_rule(_i);
}
END_TEST

static void break_source(int kind)
{
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 5), 2);
    add_open(1);
    add_pages(1, 0, 1, 1);
    add_row(1, 0, 5);
    run();
    struct step_row *row = add_row(0, 5, 1);
    row->generated = row->from_sample = true;
    row->source_row = kind == 0 ? 1 : kind == 1 ? 2 : 0; // drew nothing; does not exist
    row->source_draw = kind == 2 ? 2 : 0;                // one too many
    refuse(STATUS_CORRUPT, "which drew no such token");
}

START_TEST(test_tokens_nobody_drew)
{
    break_source(_i);
}
END_TEST

START_TEST(test_a_step_of_long_ago_is_still_known)
{
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 5), 1);
    run();
    for (int i = 0; i < MAX_STEP_HISTORY - 1; i++)
        run();
    struct step_row *row = drawing(add_row(0, 5, 1), 1);
    row->generated = row->from_sample = true;
    run();
    ck_assert_uint_eq(engine.result.number, MAX_STEP_HISTORY);
    row = add_row(0, 6, 1);
    row->generated = row->from_sample = true; // of step 0: one too far back now
    refuse(STATUS_CORRUPT, "cannot take its token from step 0");
}
END_TEST

// --- what steps give ---

struct rows {
    uint32_t count;
    uint32_t positions[512];
    float first[512]; // the first logit
    float last_row[VOCAB];
};

static void keep_row(void *context, uint32_t row, uint32_t position, const float *logits, uint32_t vocab)
{
    struct rows *rows = context;
    ck_assert_uint_eq(vocab, VOCAB);
    rows->positions[rows->count] = position;
    rows->first[rows->count++] = logits[0];
    memcpy(rows->last_row, logits, sizeof(rows->last_row));
}

START_TEST(test_logits_only_where_they_are_wanted)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 1);
    add_open(1);
    add_pages(1, 0, 1, 2);
    add_row(0, 0, 20);             // nobody looks
    drawing(add_row(1, 0, 70), 1); // one row
    run();
    ck_assert_uint_eq(rows.count, 1);
    ck_assert_uint_eq(rows.positions[0], 69);
    add_row(0, 20, 3);
    run();
    ck_assert_uint_eq(rows.count, 1);
}
END_TEST

START_TEST(test_prompt_logprobs_in_groups)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 4);
    struct step_row *row = drawing(add_row(0, 0, 150), 1); // three groups of logits
    row->logits = STEP_LOGITS_ALL;
    row->top_logprobs = 3;
    row->logprobs = true;
    row->next_token = -1;
    run();
    ck_assert_uint_eq(rows.count, 150);
    ck_assert_uint_eq(engine.result.n_prompts, 149); // nothing precedes the first, nothing follows the last
    ck_assert_uint_eq(engine.result.n_samples, 1);
    for (uint32_t i = 0; i < 149; i++) {
        const struct step_prompt_logprob *prompt = &engine.result.prompts[i];
        ck_assert_uint_eq(prompt->position, i + 1);
        ck_assert_int_eq(prompt->token.token, (int32_t)((i + 1) * 37 % VOCAB));
        ck_assert_uint_eq(prompt->top_count, 3);
        const struct token_logprob *tops = engine.result.tops + prompt->top_first;
        ck_assert(tops[0].logprob >= tops[1].logprob && tops[1].logprob >= tops[2].logprob);
        ck_assert(prompt->token.logprob <= tops[0].logprob + 1e-6f);
    }
    const struct step_sample *sample = &engine.result.samples[0];
    ck_assert_int_eq(engine.result.tops[sample->top_first].token, sample->token); // greedy
    ck_assert(sample->logprob == engine.result.tops[sample->top_first].logprob);
    // The next chunk's first token is scored by naming it.
    row = add_row(0, 150, 5);
    row->logits = STEP_LOGITS_ALL;
    row->next_token = 7;
    run();
    ck_assert_uint_eq(engine.result.n_prompts, 5);
    ck_assert_int_eq(engine.result.prompts[4].token.token, 7);
    ck_assert_uint_eq(engine.result.prompts[4].position, 155);
}
END_TEST

START_TEST(test_n_draws_share_their_alternatives)
{
    struct step_command *open = add_open(0);
    open->sampling.temperature = 1;
    open->sampling.seed = 5;
    add_pages(0, 0, 0, 1);
    struct step_row *row = drawing(add_row(0, 0, 9), 8);
    row->top_logprobs = 2;
    run();
    ck_assert_uint_eq(engine.result.n_samples, 8);
    bool differ = false;
    for (uint32_t i = 0; i < 8; i++) {
        ck_assert_uint_eq(engine.result.samples[i].draw, i);
        ck_assert_uint_eq(engine.result.samples[i].top_first, 0);
        differ |= engine.result.samples[i].token != engine.result.samples[0].token;
    }
    ck_assert_uint_eq(engine.result.n_tops, 2);
    ck_assert(differ);
}
END_TEST

// More alternatives than there are tokens: what comes back has none that is no token.
START_TEST(test_alternatives_end_with_the_vocabulary)
{
    local_engine_close(&engine);
    open_engine(12);
    add_open(0);
    add_pages(0, 0, 0, 1);
    struct step_row *row = drawing(add_row(0, 0, 1), 1);
    row->logits = STEP_LOGITS_ALL;
    row->next_token = 3;
    row->top_logprobs = MAX_TOP_LOGPROBS;
    run();
    ck_assert_uint_eq(engine.result.n_prompts, 1);
    ck_assert_uint_eq(engine.result.n_samples, 1);
    ck_assert_uint_eq(engine.result.prompts[0].top_count, 12);
    ck_assert_uint_eq(engine.result.samples[0].top_count, 12);
    ck_assert_uint_eq(engine.result.n_tops, 24);
    for (uint32_t i = 0; i < engine.result.n_tops; i++)
        ck_assert(engine.result.tops[i].token >= 0 && engine.result.tops[i].token < 12);
}
END_TEST

START_TEST(test_copied_pages_carry_a_sequence_on)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 2);
    add_row(0, 0, 100);
    run();
    drawing(add_row(0, 100, 1), 1);
    run();
    float expected[VOCAB];
    memcpy(expected, rows.last_row, sizeof(expected));
    // A fork: the full page is shared, the unfinished one copied; then the first sequence goes on writing.
    struct step_command *copy = step_plan_add_command(&engine.plan, STEP_COPY, 0);
    copy->copy_from = 1;
    copy->copy_to = 9;
    add_open(1);
    add_pages(1, 0, 0, 1);
    add_pages(1, 1, 9, 1);
    add_row(0, 101, 20);
    drawing(add_row(1, 100, 1), 1);
    run();
    ck_assert_mem_eq(expected, rows.last_row, sizeof(expected));
}
END_TEST

START_TEST(test_replaced_pages_are_read)
{
    struct rows rows = {0};
    executor_set_tap(engine.executor, keep_row, &rows);
    add_open(0);
    add_pages(0, 0, 0, 1);
    add_row(0, 0, 30);
    run();
    struct step_command *copy = step_plan_add_command(&engine.plan, STEP_COPY, 0);
    copy->copy_from = 0;
    copy->copy_to = 5;
    add_pages(0, 0, 5, 1);
    drawing(add_row(0, 30, 1), 1);
    run();
    float expected[VOCAB];
    memcpy(expected, rows.last_row, sizeof(expected));
    add_open(1);
    add_pages(1, 0, 7, 1);
    drawing(add_row(1, 0, 31), 1);
    run();
    ck_assert_mem_eq(expected, rows.last_row, sizeof(expected));
}
END_TEST

// --- steps that run ahead ---

// The device's operations, changed by a test for executors made after it.
static struct kernel_ops ops;
static const struct kernel_ops *true_ops;
static uint64_t marks, reached; // taken, reached
static uint32_t recorded[64], n_recorded;

static uint64_t take_mark(struct device *device)
{
    return ++marks;
}

static int ask_mark(struct device *device, uint64_t mark, struct error *to)
{
    return mark > reached ? 0 : true_ops->sync(device, to) ? STATUS_INTERNAL : 1;
}

static bool note_replay(struct device *device, uint32_t key)
{
    recorded[n_recorded++] = key;
    return true_ops->replay(device, key);
}

static void change_ops(void)
{
    true_ops = device_ops(engine.device);
    ops = *true_ops;
    engine.device->ops = &ops;
    marks = reached = n_recorded = 0;
}

static struct executor_options whole_model(void)
{
    return (struct executor_options){.device = engine.device,
                                     .spec = &engine.spec,
                                     .list = &engine.list,
                                     .weights = engine.weights,
                                     .epoch = 1,
                                     .n_stages = 1,
                                     .n_layers = LAYERS,
                                     .bounds = {SLOTS, SLOTS * 4, CONTEXT, VOCAB, POSITIONS}};
}

static void renew_executor(void)
{
    struct executor_options options = whole_model();
    executor_free(engine.executor);
    ck_assert_msg(executor_new(&engine.executor, &options, &error) == 0, "%s", error.text);
    engine.steps = 0;
}

static int submit(void)
{
    engine.plan.number = engine.steps++;
    int status = executor_submit(engine.executor, &engine.plan, &error);
    step_plan_clear(&engine.plan);
    engine.plan.epoch = 1;
    return status;
}

static int finish(void)
{
    return executor_finish(engine.executor, &engine.result, false, &error);
}

START_TEST(test_steps_are_finished_when_the_device_gets_there)
{
    change_ops();
    ops.mark = take_mark;
    ops.reached = ask_mark;
    renew_executor();
    ck_assert_int_eq(finish(), STATUS_INTERNAL); // there is none
    int32_t expected[EXECUTOR_DEPTH];
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++) {
        add_open(step);
        add_pages(step, 0, step, 1);
        struct step_row *row = drawing(add_row(step, 0, 4 + step), 1);
        row->logprobs = true;
        row->top_logprobs = 2;
        ck_assert_int_eq(submit(), 0);
        ck_assert_uint_eq(executor_unfinished(engine.executor), step + 1);
        ck_assert_int_eq(finish(), EXECUTOR_PENDING);
    }
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++) {
        reached++;
        ck_assert_int_eq(finish(), 0);
        ck_assert_uint_eq(engine.result.number, step);
        ck_assert_uint_eq(engine.result.n_samples, 1);
        ck_assert_uint_eq(engine.result.n_tops, 2); // its own, not those of a later step
        ck_assert_int_eq(engine.result.tops[0].token, engine.result.samples[0].token);
        expected[step] = engine.result.samples[0].token;
        ck_assert_int_eq(finish(), step + 1 < EXECUTOR_DEPTH ? EXECUTOR_PENDING : STATUS_INTERNAL);
    }
    reached = UINT64_MAX;
    renew_executor();
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++) {
        add_open(step);
        add_pages(step, 0, step, 1);
        drawing(add_row(step, 0, 4 + step), 1);
        run();
        ck_assert_int_eq(engine.result.samples[0].token, expected[step]);
    }
}
END_TEST

START_TEST(test_too_many_steps_are_refused)
{
    change_ops();
    ops.mark = take_mark;
    ops.reached = ask_mark;
    renew_executor();
    for (uint32_t step = 0; step < EXECUTOR_DEPTH; step++)
        ck_assert_int_eq(submit(), 0);
    ck_assert_int_eq(submit(), STATUS_INTERNAL);
    reached = 1; // the others are none the worse
    ck_assert_int_eq(finish(), 0);
    ck_assert_int_eq(finish(), EXECUTOR_PENDING);
    ck_assert_int_eq(submit(), STATUS_UNAVAILABLE);
}
END_TEST

// A hash of all logits, in order.
static void hash_row(void *context, uint32_t row, uint32_t position, const float *logits, uint32_t vocab)
{
    uint64_t *hash = context;
    for (uint32_t i = 0; i < vocab; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], sizeof(bits));
        *hash = (*hash ^ bits) * 0x100000001b3;
    }
}

enum { GENERATING = 9 };

static uint64_t generate(void)
{
    uint64_t hash = 7;
    executor_set_tap(engine.executor, hash_row, &hash);
    for (uint32_t slot = 0; slot < GENERATING; slot++) {
        add_open(slot);
        add_pages(slot, 0, slot, 1);
        drawing(add_row(slot, 0, 3 + slot), 1);
    }
    run();
    for (uint32_t step = 1; step < 8; step++) {
        for (uint32_t slot = 0; slot < GENERATING; slot++) {
            struct step_row *row = drawing(add_row(slot, 2 + slot + step, 1), 1);
            row->generated = true;
            row->from_sample = slot % 3 > 0;
            row->source_step = step - 1;
            row->source_row = slot;
        }
        if (step == 5) { // and a prompt behind them
            add_open(GENERATING);
            add_pages(GENERATING, 0, GENERATING, 1);
            drawing(add_row(GENERATING, 0, 20), 1);
        }
        if (step == 7)
            engine.plan.rows[2].draws = 0; // not what a program does
        ck_assert_int_eq(local_engine_submit(&engine, &error), 0);
    }
    ck_assert_int_eq(local_engine_wait(&engine, &error), 0);
    for (uint32_t i = 0; i < engine.result.n_samples; i++)
        hash = (hash ^ (uint32_t)engine.result.samples[i].token) * 0x100000001b3;
    return hash;
}

START_TEST(test_padding_changes_nothing)
{
    change_ops();
    ops.replay = note_replay;
    ops.keeps_programs = false;
    renew_executor();
    uint64_t expected = generate();
    ck_assert_uint_eq(n_recorded, 0);
    ops.keeps_programs = true;
    renew_executor();
    ck_assert_uint_eq(generate(), expected);
    ck_assert_uint_eq(n_recorded, 5);
    for (uint32_t i = 0; i < n_recorded; i++)
        ck_assert_uint_eq(recorded[i], SLOTS); // sixteen are more than there can be
}
END_TEST

START_TEST(test_warming_up_leaves_no_trace)
{
    change_ops();
    ops.replay = note_replay;
    ops.keeps_programs = false;
    renew_executor();
    uint64_t expected = generate();
    ck_assert_int_eq(executor_warm_up(engine.executor, &error), 0); // nothing to do
    ck_assert_uint_eq(n_recorded, 0);
    ops.keeps_programs = true;
    renew_executor();
    ck_assert_int_eq(executor_warm_up(engine.executor, &error), 0);
    ck_assert_uint_eq(n_recorded, 9); // one to eight, and as many as there are slots
    for (uint32_t i = 0; i < n_recorded; i++)
        ck_assert_uint_eq(recorded[i], i < 8 ? i + 1 : SLOTS);
    ck_assert_uint_eq(executor_unfinished(engine.executor), 0);
    ck_assert_uint_eq(generate(), expected);
}
END_TEST

// --- several stages ---

// A link that hands out what the test put in and keeps what is sent.
struct fake_link {
    struct link base;
    const void *incoming;
    size_t bytes;
    int status, sends;
    uint64_t number;
};

static int fake_send(struct link *base, uint64_t number, const void *data, size_t bytes, struct error *to)
{
    struct fake_link *link = (struct fake_link *)base;
    link->sends++;
    link->number = number;
    link->bytes = bytes;
    return link->status ? error_set(to, link->status, "the fake link broke") : 0;
}

static int fake_receive(struct link *base, uint64_t number, void *data, size_t bytes, struct error *to)
{
    struct fake_link *link = (struct fake_link *)base;
    if (link->status)
        return error_set(to, link->status, "the fake link broke");
    memcpy(data, link->incoming, bytes);
    link->number = number;
    link->bytes = bytes;
    return 0;
}

static const struct link_ops FAKE_OPS = {.send = fake_send, .receive = fake_receive};

// Both kinds of link: what is on the CPU device's memory is on the host's.
static bool is_played(int on_device)
{
    return !on_device || !where.backend || strcmp(where.backend, "cpu") == 0;
}

static struct executor *new_stage(uint32_t stage)
{
    struct weight_list list;
    ck_assert_int_eq(weight_list_make(&list, engine.gguf, &engine.spec, stage, 1, &error), 0);
    struct executor_options options = {.device = engine.device,
                                       .spec = &engine.spec,
                                       .list = &list,
                                       .weights = engine.weights,
                                       .epoch = 1,
                                       .stage = stage,
                                       .n_stages = 2,
                                       .first_layer = stage,
                                       .n_layers = 1,
                                       .bounds = {SLOTS, 16, CONTEXT, VOCAB, POSITIONS}};
    struct executor *executor;
    ck_assert_msg(executor_new(&executor, &options, &error) == 0, "%s", error.text);
    weight_list_free(&list);
    return executor;
}

static int run_stage(struct executor *executor, uint64_t number)
{
    engine.plan.number = number;
    int status = executor_run(executor, &engine.plan, &engine.result, &error);
    step_plan_clear(&engine.plan);
    engine.plan.epoch = 1;
    return status;
}

START_TEST(test_the_first_stage_sends_residuals_and_reads_draws)
{
    if (!is_played(_i))
        return;
    struct executor *executor = new_stage(0);
    struct fake_link next = {.base = {&FAKE_OPS, _i}}, previous = {.base = {&FAKE_OPS, _i}};
    executor_set_links(executor, &next.base, &previous.base);
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 6), 2);
    ck_assert_int_eq(run_stage(executor, 0), 0);
    ck_assert_uint_eq(next.bytes, 6 * C * sizeof(float));
    ck_assert_uint_eq(engine.result.n_samples, 0);
    int32_t tokens[2] = {11, 12};
    previous.incoming = tokens;
    struct step_row *row = add_row(0, 6, 1);
    row->generated = row->from_sample = true;
    row->source_draw = 1;
    ck_assert_int_eq(run_stage(executor, 1), 0);
    ck_assert_uint_eq(previous.number, 0);
    ck_assert_uint_eq(previous.bytes, sizeof(tokens));
    ck_assert_uint_eq(next.number, 1);
    executor_free(executor);
}
END_TEST

START_TEST(test_draws_nobody_names_are_read_all_the_same)
{
    if (!is_played(_i))
        return;
    struct executor *executor = new_stage(0);
    struct fake_link next = {.base = {&FAKE_OPS, _i}}, previous = {.base = {&FAKE_OPS, _i}, .number = 99};
    executor_set_links(executor, &next.base, &previous.base);
    int32_t tokens[1] = {5};
    previous.incoming = tokens;
    add_open(0);
    add_pages(0, 0, 0, 1);
    uint32_t lag = 2 + (_i ? 1 : 2); // stages, and
    for (uint32_t step = 0; step < 20; step++) {
        drawing(add_row(0, step, 1), 1);
        ck_assert_int_eq(run_stage(executor, step), 0);
        ck_assert_uint_eq(previous.number, step <= lag ? 99 : step - lag - 1);
    }
    executor_free(executor);
}
END_TEST

START_TEST(test_a_drawn_token_beyond_the_vocabulary_is_refused)
{
    struct executor *executor = new_stage(0);
    struct fake_link next = {.base = {&FAKE_OPS}}, previous = {.base = {&FAKE_OPS}};
    executor_set_links(executor, &next.base, &previous.base);
    int32_t tokens[1] = {VOCAB};
    previous.incoming = tokens;
    add_open(0);
    add_pages(0, 0, 0, 1);
    drawing(add_row(0, 0, 6), 1);
    ck_assert_int_eq(run_stage(executor, 0), 0);
    struct step_row *row = add_row(0, 6, 1);
    row->generated = row->from_sample = true;
    ck_assert_int_eq(run_stage(executor, 1), STATUS_CORRUPT);
    executor_free(executor);
}
END_TEST

START_TEST(test_the_last_stage_receives_samples_and_feeds_back)
{
    if (!is_played(_i))
        return;
    struct executor *executor = new_stage(1);
    struct fake_link next = {.base = {&FAKE_OPS, _i}}, previous = {.base = {&FAKE_OPS, _i}};
    executor_set_links(executor, &next.base, &previous.base);
    float residual[6 * C];
    for (int i = 0; i < 6 * C; i++)
        residual[i] = (float)(i % 13) / 13 - 0.4f;
    previous.incoming = residual;
    add_open(0);
    add_pages(0, 0, 0, 1);
    add_row(0, 0, 3);
    add_open(1);
    add_pages(1, 0, 1, 1);
    drawing(add_row(1, 0, 3), 2);
    ck_assert_int_eq(run_stage(executor, 0), 0);
    ck_assert_uint_eq(previous.bytes, sizeof(residual));
    ck_assert_uint_eq(next.bytes, 2 * sizeof(int32_t));
    ck_assert_uint_eq(engine.result.n_samples, 2);
    ck_assert_uint_eq(engine.result.samples[0].row, 1);
    add_row(0, 3, 1); // draws nothing: nothing to feed back
    ck_assert_int_eq(run_stage(executor, 1), 0);
    ck_assert_int_eq(next.sends, 1);
    // Only commands: nothing travels.
    step_plan_add_command(&engine.plan, STEP_CLOSE, 1);
    previous.number = 99;
    ck_assert_int_eq(run_stage(executor, 2), 0);
    ck_assert_uint_eq(previous.number, 99);
    previous.status = STATUS_UNAVAILABLE;
    add_row(0, 4, 1);
    ck_assert_int_eq(run_stage(executor, 3), STATUS_UNAVAILABLE);
    ck_assert_str_eq(error.text, "the fake link broke");
    executor_free(executor);
}
END_TEST

START_TEST(test_steps_before_links_are_refused)
{
    struct executor *executor = new_stage(0);
    ck_assert_int_eq(run_stage(executor, 0), STATUS_INTERNAL);
    executor_free(executor);
}
END_TEST

START_TEST(test_weights_come_before_an_executor)
{
    struct weight_list list;
    ck_assert_int_eq(weight_list_make(&list, engine.gguf, &engine.spec, 0, LAYERS, &error), 0);
    struct weight_cache *empty;
    ck_assert_int_eq(weight_cache_new(&empty, engine.device), 0);
    struct executor_options options = {.device = engine.device,
                                       .spec = &engine.spec,
                                       .list = &list,
                                       .weights = empty,
                                       .epoch = 1,
                                       .n_stages = 1,
                                       .n_layers = LAYERS,
                                       .bounds = {SLOTS, 16, CONTEXT, VOCAB, POSITIONS}};
    struct executor *executor;
    ck_assert_int_eq(executor_new(&executor, &options, &error), STATUS_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(error.text, "token_embd.weight is not in the cache"));
    weight_cache_free(empty);
    weight_list_free(&list);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("executor");
    TCase *tests = tcase_create("executor");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, test_a_sequence_is_opened_computed_and_closed);
    tcase_add_test(tests, test_plans_of_another_epoch_are_dropped);
    tcase_add_loop_test(tests, test_broken_rules_end_the_epoch, 0, 10);
    tcase_add_loop_test(tests, test_tokens_nobody_drew, 0, 3);
    tcase_add_test(tests, test_a_step_of_long_ago_is_still_known);
    tcase_add_test(tests, test_logits_only_where_they_are_wanted);
    tcase_add_test(tests, test_prompt_logprobs_in_groups);
    tcase_add_test(tests, test_n_draws_share_their_alternatives);
    tcase_add_test(tests, test_alternatives_end_with_the_vocabulary);
    tcase_add_test(tests, test_copied_pages_carry_a_sequence_on);
    tcase_add_test(tests, test_replaced_pages_are_read);
    tcase_add_test(tests, test_steps_are_finished_when_the_device_gets_there);
    tcase_add_test(tests, test_too_many_steps_are_refused);
    tcase_add_test(tests, test_padding_changes_nothing);
    tcase_add_test(tests, test_warming_up_leaves_no_trace);
    tcase_add_loop_test(tests, test_the_first_stage_sends_residuals_and_reads_draws, 0, 2);
    tcase_add_loop_test(tests, test_draws_nobody_names_are_read_all_the_same, 0, 2);
    tcase_add_test(tests, test_a_drawn_token_beyond_the_vocabulary_is_refused);
    tcase_add_loop_test(tests, test_the_last_stage_receives_samples_and_feeds_back, 0, 2);
    tcase_add_test(tests, test_steps_before_links_are_refused);
    tcase_add_test(tests, test_weights_come_before_an_executor);
    suite_add_tcase(suite, tests);
    return suite;
}
