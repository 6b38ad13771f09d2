// What an executor measures of its stage, on a device whose clock the test turns: a layer and a head take so
// long by its stamps. And that the measuring leaves no trace.
#include <string.h>

#include "tests/executor_fixture.h"
#include "tests/suite.h"

// The device's clock. The ops it is turned by are one a layer, and one a head.
static int64_t now_us, layer_us, head_us, slower_us; // slower: every layer by so much
static int64_t stamps[DEVICE_STAMPS];
static uint64_t n_stamps;
static uint32_t n_layers_run, n_heads_run, most_rows, most_position;

static uint64_t turned_stamp(struct device *device)
{
    stamps[n_stamps % DEVICE_STAMPS] = now_us;
    return n_stamps++;
}

static int64_t turned_stamp_us(struct device *device, uint64_t stamp)
{
    ck_assert_uint_le(n_stamps - stamp, DEVICE_STAMPS);
    return stamps[stamp % DEVICE_STAMPS];
}

static void turning_attention(struct device *device, struct activation *out, const float *q,
                              uint32_t q_stride, const struct attention_shape *shape,
                              const struct kv_layer *kv, const struct batch *batch)
{
    now_us += layer_us;
    layer_us += slower_us;
    n_layers_run++;
    most_rows = batch->n_tokens > most_rows ? batch->n_tokens : most_rows;
    ck_assert_uint_eq(batch->n_generated, batch->n_tokens);
    for (uint32_t i = 0; i < batch->n_tokens; i++) {
        uint32_t position = 0;
        true_ops->download(device, &position, batch->positions + i, sizeof(position));
        most_position = position > most_position ? position : most_position;
    }
    true_ops->attention(device, out, q, q_stride, shape, kv, batch);
}

static void turning_sample(struct device *device, struct sampler *sampler, const float *logits,
                           const struct sample_row *rows, uint32_t n_rows, int32_t *out_tokens,
                           float *out_logprobs, struct token_logprob *out_tops)
{
    now_us += head_us;
    n_heads_run++;
    true_ops->sample(device, sampler, logits, rows, n_rows, out_tokens, out_logprobs, out_tops);
}

// A stage of `n_stages`: of two the one or the other layer, alone both. In place of the engine's own
// executor: a device keeps the programs of one.
static struct executor *new_stage(uint32_t stage, uint32_t n_stages, uint32_t n_slots)
{
    executor_free(engine.executor);
    engine.executor = NULL;
    struct weight_list list;
    uint32_t layers = LAYERS / n_stages;
    ck_assert_int_eq(weight_list_make(&list, engine.gguf, &engine.spec, stage * layers, layers, &error), 0);
    struct executor_options options = {.device = engine.device,
                                       .spec = &engine.spec,
                                       .list = &list,
                                       .weights = engine.weights,
                                       .epoch = 1,
                                       .stage = stage,
                                       .n_stages = n_stages,
                                       .first_layer = stage * layers,
                                       .n_layers = layers,
                                       .bounds = {n_slots, 16, CONTEXT, VOCAB, POSITIONS}};
    struct executor *executor;
    ck_assert_msg(executor_new(&executor, &options, &error) == 0, "%s", error.text);
    weight_list_free(&list);
    return executor;
}

static struct executor *turned_stage(uint32_t stage, uint32_t n_stages, uint32_t n_slots)
{
    if (device_ops(engine.device) != &ops)
        change_ops();
    ops.stamp = turned_stamp;
    ops.stamp_us = turned_stamp_us;
    ops.attention = turning_attention;
    ops.sample = turning_sample;
    ops.keeps_programs = false; // what is replayed would not turn the clock
    now_us = slower_us = 0;
    n_stamps = n_layers_run = n_heads_run = most_rows = most_position = 0;
    return new_stage(stage, n_stages, n_slots);
}

static struct stage_speed measured(struct executor *executor)
{
    struct stage_speed speed = {77, 77};
    ck_assert_msg(executor_measure(executor, &speed, &error) == 0, "%s", error.text);
    return speed;
}

START_TEST(test_times_are_the_devices)
{
    for (uint32_t stage = 0; stage < 2; stage++) {
        struct executor *executor = turned_stage(stage, 2, SLOTS);
        layer_us = 310;
        head_us = 4700;
        struct stage_speed speed = measured(executor);
        ck_assert_uint_eq(speed.layer_ns, 310000);
        ck_assert_uint_eq(speed.head_ns, stage == 1 ? 4700000 : 0); // no head but on the last stage
        ck_assert_uint_eq(n_heads_run > 0, stage == 1);
        ck_assert_uint_eq(most_rows, SLOTS / 2); // a micro-batch
        ck_assert_uint_eq(most_position, CONTEXT - 1);
        executor_free(executor);
    }
}
END_TEST

START_TEST(test_the_mean_of_layers_and_the_median_of_runs)
{
    struct executor *executor = turned_stage(0, 1, SLOTS);
    layer_us = 1000;
    head_us = 10;
    slower_us = 100; // one cold layer, one to see, then five runs of two layers
    struct stage_speed speed = measured(executor);
    ck_assert_uint_le(n_layers_run, 12); // fewer where this machine is slow
    if (n_layers_run == 12)
        ck_assert_uint_eq(speed.layer_ns, 1000 * (1000 + 6 * 100 + 50));
    ck_assert_uint_eq(speed.head_ns, 10000);
    ck_assert_uint_eq(most_rows, 8); // however many slots there are
    executor_free(executor);
}
END_TEST

START_TEST(test_a_run_is_no_longer_than_it_must)
{
    struct executor *executor = turned_stage(0, 1, SLOTS);
    layer_us = 30000;
    head_us = 20000;
    struct stage_speed speed = measured(executor);
    ck_assert_uint_le(n_layers_run, 7); // of two layers, a run has time for one
    ck_assert_uint_eq(speed.layer_ns, 30000000);
    ck_assert_uint_eq(speed.head_ns, 20000000);
    executor_free(executor);
}
END_TEST

START_TEST(test_a_device_that_is_too_slow_is_not_measured)
{
    struct executor *executor = turned_stage(0, 1, SLOTS);
    layer_us = 90000;
    head_us = 40000;
    struct stage_speed speed = measured(executor);
    ck_assert_uint_eq(n_layers_run, 1);
    ck_assert_uint_eq(speed.layer_ns, 0);
    ck_assert_uint_eq(speed.head_ns, 0);
    executor_free(executor);
}
END_TEST

START_TEST(test_one_slot_is_measured)
{
    struct executor *executor = turned_stage(1, 2, 1);
    layer_us = head_us = 5;
    struct stage_speed speed = measured(executor);
    ck_assert_uint_eq(most_rows, 1);
    ck_assert_uint_eq(speed.layer_ns, 5000);
    ck_assert_uint_eq(speed.head_ns, 5000);
    executor_free(executor);
}
END_TEST

static int broken_sync(struct device *device, struct error *to)
{
    true_ops->sync(device, to);
    return error_set(to, STATUS_IO, "the device is gone");
}

START_TEST(test_a_fault_of_the_device_is_told)
{
    struct executor *executor = turned_stage(0, 1, SLOTS);
    struct stage_speed speed;
    layer_us = head_us = 5;
    ops.sync = broken_sync;
    ck_assert_int_eq(executor_measure(executor, &speed, &error), STATUS_IO);
    ck_assert_str_eq(error.text, "the device is gone");
    ops.sync = true_ops->sync;
    executor_free(executor);
}
END_TEST

// Two prompts and some steps of their answers: greedy, and drawn at random.
static void generate(struct executor *executor, int32_t tokens[], float logprobs[])
{
    uint32_t n = 0;
    for (uint64_t step = 0; step < 6; step++) {
        for (uint32_t slot = 0; slot < 2; slot++) {
            if (step == 0 && slot == 1)
                add_open(slot)->sampling.temperature = 1;
            else if (step == 0)
                add_open(slot);
            if (step == 0)
                add_pages(slot, 0, 2 * slot, 2);
            struct step_row *row = drawing(add_row(slot, step ? 69 + (uint32_t)step : 0, step ? 1 : 70), 1);
            row->generated = step > 0;
            row->logprobs = true;
        }
        engine.plan.epoch = 1;
        engine.plan.number = step;
        int status = executor_run(executor, &engine.plan, &engine.result, &error);
        ck_assert_msg(status == 0, "%s", error.text);
        step_plan_clear(&engine.plan);
        ck_assert_uint_eq(engine.result.n_samples, 2);
        for (uint32_t i = 0; i < 2; i++, n++) {
            tokens[n] = engine.result.samples[i].token;
            logprobs[n] = engine.result.samples[i].logprob;
        }
    }
}

START_TEST(test_no_trace_is_left)
{
    int32_t tokens[2][12];
    float logprobs[2][12];
    for (int measuring = 0; measuring < 2; measuring++) {
        struct executor *executor = new_stage(0, 1, SLOTS);
        ck_assert_int_eq(executor_warm_up(executor, &error), 0);
        if (measuring)
            ck_assert_uint_gt(measured(executor).layer_ns, 0);
        generate(executor, tokens[measuring], logprobs[measuring]);
        executor_free(executor);
    }
    ck_assert_mem_eq(tokens[0], tokens[1], sizeof(tokens[0]));
    ck_assert_mem_eq(logprobs[0], logprobs[1], sizeof(logprobs[0]));
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("executor_measure");
    TCase *all = tcase_create("all");
    tcase_set_timeout(all, 120);
    tcase_add_checked_fixture(all, executor_fixture_set_up, executor_fixture_tear_down);
    tcase_add_test(all, test_times_are_the_devices);
    tcase_add_test(all, test_the_mean_of_layers_and_the_median_of_runs);
    tcase_add_test(all, test_a_run_is_no_longer_than_it_must);
    tcase_add_test(all, test_a_device_that_is_too_slow_is_not_measured);
    tcase_add_test(all, test_one_slot_is_measured);
    tcase_add_test(all, test_a_fault_of_the_device_is_told);
    tcase_add_test(all, test_no_trace_is_left);
    suite_add_tcase(suite, all);
    return suite;
}
