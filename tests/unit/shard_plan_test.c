// shard_plan: contiguous, complete, optimal (against trying every split), even, front-heavy on ties, by bytes
// and by measured times, and the byte counts of embedding and head where they belong.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/shard_plan.h"
#include "common/tensor_type.h"
#include "tests/model_writer.h"
#include "tests/suite.h"
#include "tests/weights.h"

static struct error error;
static unsigned char *file;
static struct gguf *gguf;
static struct model_spec spec;
static struct shard_plan plan;

static void set_up(void)
{
    file = NULL;
    gguf = NULL;
    error = (struct error){0};
}

static void close_all(void)
{
    gguf_close(gguf);
    free(file);
    set_up();
}

static void open_writer(struct gguf_writer *writer)
{
    size_t length;
    close_all();
    file = gguf_writer_finish(writer, &length);
    ck_assert_msg(gguf_open_memory(&gguf, file, length, &error) == 0, "%s", error.text);
}

static void open_model(const struct model_shape *shape)
{
    struct gguf_writer writer = {0};
    model_writer_add(&writer, shape);
    open_writer(&writer);
    ck_assert_msg(model_spec_read(&spec, gguf, &error) == 0, "%s", error.text);
}

static void check_plan(uint32_t n_stages)
{
    ck_assert_uint_eq(plan.n_stages, n_stages);
    uint32_t next = 0;
    for (uint32_t i = 0; i < n_stages; i++) {
        ck_assert_uint_eq(plan.stages[i].first_layer, next);
        ck_assert_uint_ge(plan.stages[i].n_layers, 1);
        ck_assert_uint_eq(plan.stages[i].kv_bytes_per_position,
                          model_spec_kv_bytes(&spec, plan.stages[i].n_layers));
        next += plan.stages[i].n_layers;
    }
    ck_assert_uint_eq(next, spec.n_layers);
}

static void make_plan(uint32_t n_stages)
{
    ck_assert_msg(shard_plan_make(&plan, &spec, gguf, n_stages, NULL, &error) == 0, "%s", error.text);
    check_plan(n_stages);
}

static uint64_t all_tensor_bytes(void)
{
    uint64_t total = 0;
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++)
        total += gguf_tensor_at(gguf, i)->bytes;
    return total;
}

static void expect_layers(const uint32_t *layers, uint32_t count)
{
    make_plan(count);
    for (uint32_t i = 0; i < count; i++)
        ck_assert_msg(plan.stages[i].n_layers == layers[i], "stage %u of %u has %u layers, not %u", i, count,
                      plan.stages[i].n_layers, layers[i]);
}

START_TEST(deals_equal_layers)
{
    struct model_shape shape = model_shape_small("llama");
    shape.layers = 10;
    shape.vocabulary = 1; // a head of next to nothing
    open_model(&shape);
    expect_layers((uint32_t[]){10}, 1);
    expect_layers((uint32_t[]){5, 5}, 2);
    expect_layers((uint32_t[]){4, 3, 3}, 3);
    expect_layers((uint32_t[]){3, 3, 2, 2}, 4);
    expect_layers((uint32_t[]){2, 2, 2, 1, 1, 1, 1}, 7);
    expect_layers((uint32_t[]){1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 10);
}
END_TEST

START_TEST(the_head_weighs_on_the_last_stage)
{
    struct model_shape shape = model_shape_small("llama");
    shape.layers = 10;
    // One layer: q, k, v, o and three of ffn: 64 * (64 + 32 + 32 + 64 + 3 * 96) weights. A head of four
    // layers, which counts as two.
    shape.vocabulary = 4 * (64 + 32 + 32 + 64 + 3 * 96);
    open_model(&shape);
    expect_layers((uint32_t[]){6, 4}, 2);
    expect_layers((uint32_t[]){4, 4, 2}, 3);
    shape.tied = true; // the same bytes again
    open_model(&shape);
    expect_layers((uint32_t[]){6, 4}, 2);
}
END_TEST

START_TEST(counts_every_byte_once)
{
    static const char *const families[] = {"llama", "qwen2", "phi3", "gpt2"};
    for (size_t f = 0; f < sizeof(families) / sizeof(families[0]); f++) {
        struct model_shape shape = model_shape_small(families[f]);
        open_model(&shape);
        for (uint32_t stages = 1; stages <= 3; stages++) {
            uint64_t total = 0;
            make_plan(stages);
            for (uint32_t i = 0; i < stages; i++)
                total += plan.stages[i].weight_bytes;
            ck_assert_uint_eq(total, all_tensor_bytes());
        }
    }
}
END_TEST

START_TEST(counts_shared_tensors_where_they_are_needed)
{
    struct model_shape shape = model_shape_small("llama");
    shape.tied = shape.rope_factors = true;
    open_model(&shape);
    uint64_t factors = gguf_find_tensor(gguf, "rope_freqs.weight")->bytes;
    uint64_t embedding = gguf_find_tensor(gguf, "token_embd.weight")->bytes;
    make_plan(1);
    ck_assert_uint_eq(plan.stages[0].weight_bytes, all_tensor_bytes() + embedding); // as table and as head
    make_plan(2);
    ck_assert_uint_eq(plan.stages[0].weight_bytes + plan.stages[1].weight_bytes,
                      all_tensor_bytes() + embedding + factors);
}
END_TEST

// The least possible largest cost, by trying every split.
static uint64_t best_of_all(const uint64_t *cost, uint32_t n_layers, uint32_t n_stages, uint64_t head)
{
    uint64_t best = UINT64_MAX, sum = 0;
    for (uint32_t take = 1; take + n_stages - 1 <= n_layers; take++) {
        sum += cost[take - 1];
        if (n_stages == 1 && take < n_layers)
            continue;
        uint64_t here = n_stages == 1 ? sum + head : sum;
        uint64_t rest = n_stages == 1 ? 0 : best_of_all(cost + take, n_layers - take, n_stages - 1, head);
        uint64_t largest = here > rest ? here : rest;
        best = largest < best ? largest : best;
    }
    return best;
}

// Layers of unequal cost: only the names matter to the plan, so one tensor a layer is enough.
START_TEST(is_optimal_on_uneven_layers)
{
    uint32_t random = 12345;
    for (int round = 0; round < 200; round++) {
        struct gguf_writer writer = {0};
        uint64_t cost[9];
        spec = (struct model_spec){.n_kv_heads = 1, .head_size = 1};
        random = random * 1664525 + 1013904223;
        spec.n_layers = 3 + (random >> 24) % 7;
        for (uint32_t i = 0; i < spec.n_layers; i++) {
            char name[32];
            random = random * 1664525 + 1013904223;
            snprintf(name, sizeof(name), "blk.%u.ffn_up.weight", i);
            gguf_writer_tensor(&writer, name, TENSOR_F32, 1, (uint64_t[]){1 + (random >> 20) % 40});
            cost[i] = 4 * (1 + (random >> 20) % 40);
        }
        random = random * 1664525 + 1013904223;
        uint64_t head = 1 + (random >> 20) % 60;
        gguf_writer_tensor(&writer, "output.weight", TENSOR_F32, 1, &head);
        open_writer(&writer);
        for (uint32_t stages = 1; stages <= 3; stages++) {
            uint64_t largest = 0;
            make_plan(stages);
            for (uint32_t i = 0; i < stages; i++) { // of the last stage's, half of the head counts
                uint64_t counted = plan.stages[i].weight_bytes - (i + 1 == stages ? 2 * head : 0);
                largest = counted > largest ? counted : largest;
            }
            ck_assert_uint_eq(largest, best_of_all(cost, spec.n_layers, stages, 2 * head));
        }
    }
}
END_TEST

START_TEST(takes_the_largest_of_models)
{
    struct gguf_writer writer = {0};
    spec = (struct model_spec){.n_kv_heads = 1, .head_size = 1, .n_layers = MAX_LAYERS};
    for (uint32_t i = 0; i < MAX_LAYERS; i++) {
        char name[32];
        snprintf(name, sizeof(name), "blk.%u.ffn_up.weight", i);
        gguf_writer_tensor(&writer, name, TENSOR_F32, 1, (uint64_t[]){1});
    }
    open_writer(&writer);
    make_plan(MAX_STAGES);
    for (uint32_t i = 0; i < MAX_STAGES; i++)
        ck_assert_uint_eq(plan.stages[i].n_layers, MAX_LAYERS / MAX_STAGES);
}
END_TEST

START_TEST(refuses_what_cannot_be_dealt)
{
    struct model_shape shape = model_shape_small("llama");
    open_model(&shape);
    plan.n_stages = 77;
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, 0, NULL, &error), STATUS_INVALID);
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, 4, NULL, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "4 workers for a model of 3 layers"));
    spec.n_layers = MAX_LAYERS;
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, MAX_STAGES + 1, NULL, &error), STATUS_INVALID);
    ck_assert_ptr_nonnull(strstr(error.text, "the limit is 64"));
    ck_assert_uint_eq(plan.n_stages, 77);
}
END_TEST

// --- by measured times ---

static uint32_t below(uint64_t *random, uint32_t n)
{
    return (uint32_t)(random_bits(random) % n);
}

struct split {
    uint32_t taken[MAX_STAGES];
    uint64_t slowest;
    double squares; // of small numbers: exact
};

static uint64_t bytes_of_stage(const struct gguf *model, uint32_t stage, uint32_t n_stages, uint32_t first,
                               uint32_t count)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < gguf_tensor_count(model); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(model, i);
        char name[64];
        unsigned layer;
        snprintf(name, sizeof(name), "%.*s", (int)tensor->name.length, tensor->name.bytes);
        if (sscanf(name, "blk.%u.", &layer) == 1)
            bytes += layer >= first && layer < first + count ? tensor->bytes : 0;
        else if (strcmp(name, "token_embd.weight") == 0)
            bytes += stage == 0 ? tensor->bytes : 0;
        else
            bytes += stage + 1 == n_stages ? tensor->bytes : 0;
    }
    return bytes;
}

// Tries every split of the layers from `first` on over the stages from `stage` on; the best is kept.
static void try_splits(const struct shard_costs *costs, uint32_t n_stages, uint32_t stage, uint32_t first,
                       struct split tried, struct split *best)
{
    if (stage == n_stages) {
        bool better =
            first == spec.n_layers && (tried.slowest < best->slowest ||
                                       (tried.slowest == best->slowest && tried.squares < best->squares));
        // The first one found gives most to the earliest stage: more is tried before less.
        *best = better ? tried : *best;
        return;
    }
    for (uint32_t count = spec.n_layers - first; count >= 1; count--) {
        struct split next = tried;
        uint64_t cost = costs->layer[stage] * count + (stage + 1 == n_stages ? costs->head : 0);
        uint64_t kv = model_spec_kv_bytes(&spec, count) * costs->positions;
        if (bytes_of_stage(gguf, stage, n_stages, first, count) + kv > costs->room[stage])
            continue;
        next.taken[stage] = count;
        next.slowest = cost > tried.slowest ? cost : tried.slowest;
        next.squares += (double)cost * (double)cost;
        try_splits(costs, n_stages, stage + 1, first + count, next, best);
    }
}

static void open_uneven(uint64_t *random)
{
    struct gguf_writer writer = {0};
    spec = (struct model_spec){.n_kv_heads = 1, .head_size = 1, .n_layers = 4 + below(random, 6)};
    for (uint32_t i = 0; i < spec.n_layers; i++) {
        char name[32];
        snprintf(name, sizeof(name), "blk.%u.ffn_up.weight", i);
        gguf_writer_tensor(&writer, name, TENSOR_F32, 1, (uint64_t[]){1 + below(random, 40)});
    }
    gguf_writer_tensor(&writer, "token_embd.weight", TENSOR_F32, 1, (uint64_t[]){1 + below(random, 60)});
    gguf_writer_tensor(&writer, "output.weight", TENSOR_F32, 1, (uint64_t[]){1 + below(random, 60)});
    open_writer(&writer);
}

START_TEST(is_optimal_by_time)
{
    uint64_t random = random_seed("is_optimal_by_time");
    uint32_t dealt = 0, impossible = 0;
    for (int round = 0; round < 400; round++) {
        open_uneven(&random);
        uint32_t n_stages = 1 + below(&random, 4);
        struct shard_costs costs = {.head = below(&random, 200), .positions = below(&random, 30)};
        uint64_t same = 1 + below(&random, 30); // half of the rounds: devices of one speed
        for (uint32_t i = 0; i < n_stages; i++) {
            costs.layer[i] = round % 2 ? 1 + below(&random, 30) : same;
            costs.room[i] = round % 3 ? UINT64_MAX : 200 + below(&random, 800);
        }
        struct split best = {.slowest = UINT64_MAX};
        try_splits(&costs, n_stages, 0, 0, (struct split){0}, &best);
        int status = shard_plan_make(&plan, &spec, gguf, n_stages, &costs, &error);
        ck_assert_int_eq(status, best.slowest == UINT64_MAX ? STATUS_NO_MEMORY : STATUS_OK);
        dealt += !status;
        impossible += status != 0;
        if (status)
            continue;
        check_plan(n_stages);
        ck_assert_uint_eq(shard_plan_slowest(&plan, &costs), best.slowest);
        for (uint32_t i = 0; i < n_stages; i++) {
            const struct shard_stage *stage = &plan.stages[i];
            ck_assert_uint_eq(stage->n_layers, best.taken[i]);
            ck_assert_uint_eq(stage->weight_bytes,
                              bytes_of_stage(gguf, i, n_stages, stage->first_layer, stage->n_layers));
        }
    }
    ck_assert_uint_gt(dealt, 200);
    ck_assert_uint_gt(impossible, 5);
}
END_TEST

START_TEST(a_slow_device_gets_few_layers)
{
    struct model_shape shape = model_shape_small("llama");
    struct shard_costs costs = {
        .layer = {10, 90, 10}, .head = 25, .room = {UINT64_MAX, UINT64_MAX, UINT64_MAX}};
    shape.layers = 22;
    open_model(&shape);
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, 3, &costs, &error), 0);
    check_plan(3);
    ck_assert_uint_eq(plan.stages[0].n_layers, 12);
    ck_assert_uint_eq(plan.stages[1].n_layers, 1);
    ck_assert_uint_eq(plan.stages[2].n_layers, 9);
    ck_assert_uint_eq(shard_plan_slowest(&plan, &costs), 120);
}
END_TEST

START_TEST(times_that_are_none_are_refused)
{
    struct model_shape shape = model_shape_small("llama");
    open_model(&shape);
    struct shard_costs costs = {.layer = {5, 0}, .room = {UINT64_MAX, UINT64_MAX}};
    plan.n_stages = 77;
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, 2, &costs, &error), STATUS_INVALID);
    costs.layer[1] = SHARD_MAX_COST + 1;
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, 2, &costs, &error), STATUS_INVALID);
    costs.layer[1] = 5;
    costs.head = SHARD_MAX_COST + 1;
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, 2, &costs, &error), STATUS_INVALID);
    ck_assert_uint_eq(plan.n_stages, 77);
    costs.head = SHARD_MAX_COST; // the largest there is
    ck_assert_int_eq(shard_plan_make(&plan, &spec, gguf, 2, &costs, &error), STATUS_OK);
    ck_assert_uint_eq(plan.stages[1].n_layers, 1);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("shard_plan");
    TCase *all = tcase_create("all");
    tcase_add_checked_fixture(all, set_up, close_all);
    tcase_add_test(all, deals_equal_layers);
    tcase_add_test(all, the_head_weighs_on_the_last_stage);
    tcase_add_test(all, counts_every_byte_once);
    tcase_add_test(all, counts_shared_tensors_where_they_are_needed);
    tcase_add_test(all, is_optimal_on_uneven_layers);
    tcase_add_test(all, takes_the_largest_of_models);
    tcase_add_test(all, is_optimal_by_time);
    tcase_add_test(all, a_slow_device_gets_few_layers);
    tcase_add_test(all, times_that_are_none_are_refused);
    tcase_add_test(all, refuses_what_cannot_be_dealt);
    suite_add_tcase(suite, all);
    return suite;
}
