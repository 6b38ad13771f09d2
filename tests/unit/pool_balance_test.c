// Deals by measured time: the fake workers say what a layer and the head take them, and the pool deals the
// layers again, once, when that is worth it; and goes back when it was not.
#include <stdio.h>
#include <string.h>

#include "tests/pool_fixture.h"
#include "tests/suite.h"

enum { DEALT = 12, MS = 1000000 }; // layers of the model; its head is next to nothing by bytes

// A worker's device, and what it measures.
struct device_fake {
    const char *name, *device, *host;
    uint64_t memory;
    uint64_t layer_ns, head_ns;
};

static struct device_fake device_of(const char *name, uint64_t layer_ns, uint64_t head_ns)
{
    return (struct device_fake){name, "a fake device", name, 1 << 30, layer_ns, head_ns};
}

static struct fake *join(const struct device_fake *device)
{
    struct fake *fake = fake_dial(device->name);
    struct wire_worker_message hello = hello_of(fake);
    hello.device = device->device;
    hello.host = device->host;
    hello.memory_free = device->memory;
    fake_say(fake, &hello);
    for (uint32_t joined = pool_count_joined(pool); pool_count_joined(pool) == joined;)
        pump_once();
    return fake;
}

static void leave(struct fake *fake)
{
    uint32_t joined = pool_count_joined(pool);
    fake_leave(fake);
    while (pool_count_joined(pool) == joined)
        pump_once();
}

static void open_balanced(void)
{
    open_pool_of(DEALT, (struct worker_pool_options){.n_workers = 2, .retry_us = 50000});
}

// Both are assigned so many layers, the first the first ones. Returns the epoch.
static uint64_t expect_deal(struct fake *const fakes[2], uint32_t layers, bool measure)
{
    uint64_t epoch = 0;
    for (uint32_t s = 0; s < 2; s++) {
        struct wire_coordinator_message assign = fake_expect(fakes[s], WIRE_ASSIGN).message;
        ck_assert_uint_eq(assign.stage, s);
        ck_assert_uint_eq(assign.first_layer, s ? layers : 0);
        ck_assert_uint_eq(assign.n_layers, s ? DEALT - layers : layers);
        ck_assert_int_eq(assign.measure, measure);
        ck_assert(s == 0 || assign.epoch == epoch);
        epoch = assign.epoch;
    }
    return epoch;
}

static void say_loaded(struct fake *fake, uint64_t epoch, uint64_t layer_ns, uint64_t head_ns)
{
    fake_say(fake, &(struct wire_worker_message){
                       .kind = WIRE_LOADED, .epoch = epoch, .layer_ns = layer_ns, .head_ns = head_ns});
}

static void say_measured(struct fake *const fakes[2], const struct device_fake devices[2], uint64_t epoch)
{
    for (uint32_t s = 0; s < 2; s++)
        say_loaded(fakes[s], epoch, devices[s].layer_ns, devices[s].head_ns);
}

static void say_failed(struct fake *fake, uint64_t epoch, uint32_t fits_pages)
{
    fake_say(fake, &(struct wire_worker_message){.kind = WIRE_FAILED,
                                                 .epoch = epoch,
                                                 .status = STATUS_NO_MEMORY,
                                                 .text = "too many",
                                                 .fits_pages = fits_pages});
}

static void expect_aborts(struct fake *const fakes[2])
{
    fake_expect(fakes[0], WIRE_ABORT);
    fake_expect(fakes[1], WIRE_ABORT);
}

static void expect_ready(struct fake *const fakes[2], uint64_t epoch)
{
    n_seen = 0;
    for (uint32_t s = 0; s < 2; s++)
        fake_expect(fakes[s], WIRE_CONNECT);
    for (uint32_t s = 0; s < 2; s++)
        fake_say(fakes[s], &(struct wire_worker_message){.kind = WIRE_LINKED, .epoch = epoch});
    ck_assert_uint_eq(seen[expect_event(WORKER_POOL_READY)].epoch, epoch);
    ck_assert_uint_eq(n_seen, 1);
}

// From the deal by bytes over the one by time to a pool that is ready.
static void become_ready(struct fake *const fakes[2], const struct device_fake devices[2], uint32_t layers)
{
    uint64_t first = expect_deal(fakes, DEALT / 2, true);
    say_measured(fakes, devices, first);
    uint64_t second = expect_deal(fakes, layers, false);
    ck_assert_uint_eq(second, first + 1);
    ck_assert_uint_eq(n_seen, 0); // it was not ready, so nothing was lost
    expect_state(WIRE_POOL_LOADING);
    for (uint32_t s = 0; s < 2; s++)
        say_loaded(fakes[s], second, 0, 0);
    expect_ready(fakes, second);
}

// A pool of two that ends where it began, and whether the layers were dealt again: how many the first gets.
static struct wire_stage last_shown; // of the last stage, at the end

static void expect_layers(const struct device_fake devices[2], uint32_t layers)
{
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    if (layers != DEALT / 2) {
        become_ready(fakes, devices, layers);
    } else {
        uint64_t epoch = expect_deal(fakes, layers, true);
        say_measured(fakes, devices, epoch);
        expect_ready(fakes, epoch);
    }
    last_shown = expect_state(WIRE_POOL_READY).stages[1];
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}

START_TEST(a_heavy_head_moves_layers)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    become_ready(fakes, devices, 8);
    struct wire_pool picture = expect_state(WIRE_POOL_READY);
    ck_assert_uint_eq(picture.stages[0].layers, 8);
    ck_assert_uint_eq(picture.stages[1].layers, 4);
    ck_assert_uint_eq(picture.stages[0].layer_ns, MS);
    ck_assert_uint_eq(picture.stages[0].head_ns, 0);
    ck_assert_uint_eq(picture.stages[1].layer_ns, MS);
    ck_assert_uint_eq(picture.stages[1].head_ns, 4 * MS);
    ck_assert_str_eq(picture.problem, "");
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(a_small_gain_is_not_worth_it)
{
    static const struct {
        uint64_t layer_ns, head_ns;
        uint32_t layers;
    } CASES[] = {
        {MS / 10, 2 * MS / 10, 7},     // of 0.8 ms 0.1
        {MS / 10, 2 * MS / 10 - 1, 6}, // a nanosecond less
        {MS / 100, 6 * MS / 100, 6},   // a quarter of very little
        {10 * MS, 13 * MS, 6},         // of 73 ms 3: 4%
        {10 * MS, 14 * MS, 7},         // of 74 ms 4: 5.4%
        {100 * MS, 0, 6},              // a head that nobody measured
    };
    for (size_t i = 0; i < sizeof(CASES) / sizeof(CASES[0]); i++) {
        struct device_fake devices[2] = {device_of("a", CASES[i].layer_ns, 0),
                                         device_of("b", CASES[i].layer_ns, CASES[i].head_ns)};
        expect_layers(devices, CASES[i].layers);
    }
}
END_TEST

START_TEST(every_stage_at_its_own_speed)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", 5 * MS, 5 * MS)};
    expect_layers(devices, 11); // 11 ms against 10
    devices[0] = device_of("a", 4 * MS, 0);
    devices[1] = device_of("b", MS, MS);
    expect_layers(devices, 2); // 8 ms against 11
}
END_TEST

START_TEST(what_makes_no_sense_was_not_measured)
{
    struct device_fake devices[2] = {device_of("a", 0, 0), device_of("b", MS, 40 * MS)};
    devices[0].device = "one that does not measure";
    expect_layers(devices, 6);
    devices[0].layer_ns = UINT64_MAX;
    expect_layers(devices, 6);
    devices[0].layer_ns = MS;
    devices[1].head_ns = UINT64_MAX;
    devices[1].device = "another one";
    expect_layers(devices, 6);
}
END_TEST

START_TEST(neighbours_on_a_host_disturb_one_another)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", 3 * MS, 12 * MS)};
    devices[0].host = devices[1].host = "both";
    expect_layers(devices, 8); // in truth 1 ms, and a head of 4
    ck_assert_uint_eq(last_shown.layer_ns, MS);
    ck_assert_uint_eq(last_shown.head_ns, 4 * MS);
    devices[1].device = "a slower one";
    expect_layers(devices, 11);
}
END_TEST

START_TEST(by_bytes_nothing_is_measured)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 40 * MS)};
    struct fake *fakes[2];
    open_pool_of(DEALT, (struct worker_pool_options){.n_workers = 2, .by_bytes = true});
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    uint64_t epoch = expect_deal(fakes, 6, false);
    say_measured(fakes, devices, epoch); // unasked
    expect_ready(fakes, epoch);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(one_worker_is_not_measured)
{
    struct device_fake device = device_of("a", MS, 40 * MS);
    open_pool_of(DEALT, (struct worker_pool_options){.n_workers = 1});
    struct fake *fake = join(&device);
    struct heard assign = fake_expect(fake, WIRE_ASSIGN);
    ck_assert(!assign.message.measure);
    say_loaded(fake, assign.message.epoch, 0, 0);
    fake_expect(fake, WIRE_CONNECT);
    fake_leave(fake);
    close_pool();
}
END_TEST

// --- again and again ---

START_TEST(the_second_load_is_not_dealt_again)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    say_measured(fakes, devices, expect_deal(fakes, 6, true));
    uint64_t epoch = expect_deal(fakes, 8, false);
    devices[0].layer_ns = 40 * MS; // unasked, and quite another story
    say_measured(fakes, devices, epoch);
    expect_ready(fakes, epoch);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(a_device_of_a_known_kind_is_dealt_by_time_at_once)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    become_ready(fakes, devices, 8);
    for (int turn = 0; turn < 2; turn++) { // either worker, one after the other
        struct device_fake other = device_of(turn ? "c" : "d", 0, 0);
        leave(fakes[turn]);
        fake_expect(fakes[1 - turn], WIRE_ABORT);
        fakes[turn] = join(&other);
        uint64_t epoch = expect_deal(fakes, 8, false);
        say_loaded(fakes[0], epoch, 0, 0);
        say_loaded(fakes[1], epoch, 0, 0);
        expect_ready(fakes, epoch);
    }
    ck_assert_uint_eq(expect_state(WIRE_POOL_READY).stages[1].head_ns, 4 * MS);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(a_device_of_another_kind_is_measured)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    become_ready(fakes, devices, 8);
    leave(fakes[0]);
    fake_expect(fakes[1], WIRE_ABORT);
    devices[0] = device_of("c", 4 * MS, 0);
    devices[0].device = "a slow device";
    fakes[0] = join(&devices[0]);
    n_seen = 0;
    become_ready(fakes, devices, 3); // 12 ms against 9 and the head
    leave(fakes[0]);
    fake_expect(fakes[1], WIRE_ABORT);
    devices[0] = device_of("d", 0, 0); // of the first kind again, which is known
    fakes[0] = join(&devices[0]);
    uint64_t epoch = expect_deal(fakes, 8, false);
    say_measured(fakes, devices, epoch);
    expect_ready(fakes, epoch);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(gpus_of_one_model_are_of_one_kind)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 3; s++) {
        fakes[s % 2] = fake_dial(s == 2 ? "c" : devices[s].name);
        struct wire_worker_message hello = hello_of(fakes[s % 2]);
        char device[64];
        snprintf(device, sizeof(device), "cuda %u: NVIDIA H100 80GB HBM3, 84 GB", s);
        hello.backend = "cuda";
        hello.device = device;
        fake_say(fakes[s % 2], &hello);
        while (pool_count_joined(pool) < 1 + (s > 0))
            pump_once();
        if (s == 1)
            become_ready(fakes, devices, 8);
        if (s == 1)
            leave(fakes[0]);
    }
    fake_expect(fakes[1], WIRE_ABORT);
    expect_deal(fakes, 8, false);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

// --- what does not come about ---

START_TEST(a_load_that_fails_takes_the_pool_back)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    say_measured(fakes, devices, expect_deal(fakes, 6, true));
    for (int failed = 0; failed < 4; failed++) {
        uint64_t epoch;
        if (failed < 3) { // not for ever
            say_failed(fakes[0], expect_deal(fakes, 8, false), 3);
            expect_aborts(fakes);
        }
        epoch = expect_deal(fakes, 6, false);
        say_loaded(fakes[0], epoch, 0, 0);
        say_loaded(fakes[1], epoch, 0, 0);
        expect_ready(fakes, epoch);
        worker_pool_lose(pool, -1, 0, "an accident");
        expect_aborts(fakes);
    }
    ck_assert_uint_eq(pool->members->failures, 0); // nobody is blamed
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

START_TEST(a_worker_that_dies_of_it_takes_the_pool_back)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    say_measured(fakes, devices, expect_deal(fakes, 6, true));
    expect_deal(fakes, 8, false);
    leave(fakes[0]);
    fake_expect(fakes[1], WIRE_ABORT);
    fakes[0] = join(&devices[0]);
    uint64_t epoch = expect_deal(fakes, 6, false);
    say_loaded(fakes[0], epoch, 0, 0);
    say_loaded(fakes[1], epoch, 0, 0);
    expect_ready(fakes, epoch);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

// Memory of a worker that has room for these layers, first ones, and `pages`; the pool uses nine tenths of
// it.
static uint64_t memory_for(uint32_t layers, uint32_t pages)
{
    const struct shard_stage *half = &pool->plan.stages[0]; // with the embedding
    uint64_t embedding = gguf_find_tensor(gguf, "token_embd.weight")->bytes;
    uint64_t layer = (half->weight_bytes - embedding) / half->n_layers;
    uint64_t page = half->kv_bytes_per_position / half->n_layers * KV_PAGE_POSITIONS;
    return (embedding + layers * (layer + page * pages)) * 10 / 9 + 100;
}

START_TEST(what_does_not_fit_is_not_dealt)
{
    static const uint32_t ROOM[] = {6, 7, 8, 9}; // layers of the first worker, with the eight pages there are
    for (size_t i = 0; i < sizeof(ROOM) / sizeof(ROOM[0]); i++) {
        struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
        struct fake *fakes[2];
        open_balanced();
        devices[0].memory = memory_for(ROOM[i], 8);
        for (uint32_t s = 0; s < 2; s++)
            fakes[s] = join(&devices[s]);
        uint64_t epoch = expect_deal(fakes, 6, true);
        say_measured(fakes, devices, epoch);
        if (ROOM[i] == 6) {
            fake_expect(fakes[0], WIRE_CONNECT);
        } else {
            expect_deal(fakes, ROOM[i] < 8 ? ROOM[i] : 8, false);
            ck_assert_uint_eq(pool->n_pages, 8);
        }
        fake_leave(fakes[0]);
        fake_leave(fakes[1]);
        close_pool();
    }
}
END_TEST

START_TEST(what_was_dealt_to_a_larger_worker_need_not_fit)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    uint64_t small = memory_for(6, 8);
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    become_ready(fakes, devices, 8);
    leave(fakes[0]);
    fake_expect(fakes[1], WIRE_ABORT);
    devices[0] = device_of("c", 0, 0); // of a known kind, with less memory
    devices[0].memory = small;
    fakes[0] = join(&devices[0]);
    uint64_t epoch = expect_deal(fakes, 6, false);
    say_loaded(fakes[0], epoch, 0, 0);
    say_loaded(fakes[1], epoch, 0, 0);
    expect_ready(fakes, epoch);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

// The last worker has room for three pages of its six layers, of fewer layers for more: but not for as many
// as the coordinator thinks.
START_TEST(a_trial_may_have_fewer_pages_than_hoped)
{
    struct device_fake devices[2] = {device_of("a", MS, 0), device_of("b", MS, 4 * MS)};
    struct fake *fakes[2];
    open_balanced();
    devices[1].memory = memory_for(6, 3) + 5000;
    for (uint32_t s = 0; s < 2; s++)
        fakes[s] = join(&devices[s]);
    say_measured(fakes, devices, expect_deal(fakes, 6, true));
    ck_assert_uint_eq(pool->n_pages, 3);
    uint64_t epoch = expect_deal(fakes, 8, false);
    ck_assert_uint_eq(pool->n_pages, 8);
    say_failed(fakes[1], epoch, 5);
    expect_aborts(fakes);
    epoch = expect_deal(fakes, 8, false);
    ck_assert_uint_eq(pool->n_pages, 5);
    say_failed(fakes[1], epoch, 2); // fewer than there were
    expect_aborts(fakes);
    epoch = expect_deal(fakes, 6, false);
    ck_assert_uint_eq(pool->n_pages, 3);
    say_loaded(fakes[0], epoch, 0, 0);
    say_loaded(fakes[1], epoch, 0, 0);
    expect_ready(fakes, epoch);
    fake_leave(fakes[0]);
    fake_leave(fakes[1]);
    close_pool();
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("pool_balance");
    TCase *tcase = tcase_create("pool_balance");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, a_heavy_head_moves_layers);
    tcase_add_test(tcase, a_small_gain_is_not_worth_it);
    tcase_add_test(tcase, every_stage_at_its_own_speed);
    tcase_add_test(tcase, what_makes_no_sense_was_not_measured);
    tcase_add_test(tcase, neighbours_on_a_host_disturb_one_another);
    tcase_add_test(tcase, by_bytes_nothing_is_measured);
    tcase_add_test(tcase, one_worker_is_not_measured);
    tcase_add_test(tcase, the_second_load_is_not_dealt_again);
    tcase_add_test(tcase, a_device_of_a_known_kind_is_dealt_by_time_at_once);
    tcase_add_test(tcase, a_device_of_another_kind_is_measured);
    tcase_add_test(tcase, gpus_of_one_model_are_of_one_kind);
    tcase_add_test(tcase, a_load_that_fails_takes_the_pool_back);
    tcase_add_test(tcase, a_worker_that_dies_of_it_takes_the_pool_back);
    tcase_add_test(tcase, what_does_not_fit_is_not_dealt);
    tcase_add_test(tcase, what_was_dealt_to_a_larger_worker_need_not_fit);
    tcase_add_test(tcase, a_trial_may_have_fewer_pages_than_hoped);
    suite_add_tcase(suite, tcase);
    return suite;
}
