// How the edges of a pool are linked: the kind is chosen edge by edge from what the workers can, and the ids
// of communicators go from the worker that made them to its next one.
#include <stdio.h>
#include <string.h>

#include "tests/pool_fixture.h"
#include "tests/suite.h"

// A worker's GPU: none where there is no version. The fakes' ids are their names.
struct gpu {
    const char *name, *device_id;
    uint32_t nccl;
    bool oversubscribe;
};

static struct fake *fake_join_gpu(const struct gpu *gpu)
{
    struct fake *fake = fake_dial(gpu->name);
    struct wire_worker_message hello = hello_of(fake);
    hello.nccl = gpu->nccl;
    hello.device_id = gpu->device_id;
    hello.oversubscribe = gpu->oversubscribe;
    fake_say(fake, &hello);
    for (uint32_t joined = pool_count_joined(pool); pool_count_joined(pool) == joined;)
        pump_once();
    return fake;
}

static void say_loaded(struct fake *fake, uint64_t epoch, const char *id)
{
    fake_say(fake, &(struct wire_worker_message){
                       .kind = WIRE_LOADED, .epoch = epoch, .link_id = {.data = id, .length = strlen(id)}});
}

// Assembles a pool of these, in order. nccl[s]: the edge from s to the next is to be of that kind.
static void expect_links(const struct gpu *gpus, const bool *nccl, uint32_t n)
{
    struct fake *fakes[MAX_STAGES];
    open_pool((struct worker_pool_options){.n_workers = n});
    for (uint32_t s = 0; s < n; s++)
        fakes[s] = fake_join_gpu(&gpus[s]);
    for (uint32_t s = 0; s < n; s++) {
        struct heard assign = fake_expect(fakes[s], WIRE_ASSIGN);
        ck_assert_uint_eq(assign.message.stage, s);
        ck_assert_int_eq(assign.message.next_link == WIRE_LINK_NCCL, nccl[s]);
        ck_assert_int_eq(assign.message.previous_link == WIRE_LINK_NCCL, nccl[(s + n - 1) % n]);
        say_loaded(fakes[s], assign.message.epoch, nccl[s] ? gpus[s].name : "");
    }
    for (uint32_t s = 0; s < n; s++) {
        struct heard connect = fake_expect(fakes[s], WIRE_CONNECT);
        const struct gpu *previous = &gpus[(s + n - 1) % n];
        ck_assert_str_eq(connect.id, nccl[(s + n - 1) % n] ? previous->name : "");
        ck_assert_uint_gt(strlen(connect.text), 0); // the socket is dialed on edges of every kind
    }
    for (uint32_t s = 0; s < n; s++)
        fake_leave(fakes[s]);
    close_pool();
}

START_TEST(two_gpus_link_over_nccl_where_both_can)
{
    const struct gpu apart[] = {{"a", "GPU-1", 22803, false}, {"b", "GPU-2", 22803, false}};
    expect_links(apart, (bool[]){true, true}, 2); // the feedback too
    const struct gpu versions[] = {{"a", "GPU-1", 22803, false}, {"b", "GPU-2", 22809, false}};
    expect_links(versions, (bool[]){false, false}, 2);
    const struct gpu nameless[] = {{"a", "", 22803, true}, {"b", "", 22803, true}};
    expect_links(nameless, (bool[]){false, false}, 2);
    expect_links(apart, (bool[]){false}, 1);
}
END_TEST

START_TEST(one_gpu_links_with_itself_only_when_both_say_so)
{
    const struct gpu one_says[] = {{"a", "GPU-1", 22803, true}, {"b", "GPU-1", 22803, false}};
    expect_links(one_says, (bool[]){false, false}, 2);
    const struct gpu both_say[] = {{"a", "GPU-1", 22803, true}, {"b", "GPU-1", 22803, true}};
    expect_links(both_say, (bool[]){true, true}, 2);
}
END_TEST

START_TEST(gpus_and_cpus_of_one_pool_link_as_they_can)
{
    const struct gpu first_two[] = {
        {"a", "GPU-1", 22803, false}, {"b", "GPU-2", 22803, false}, {"c", "", 0, false}};
    expect_links(first_two, (bool[]){true, false, false}, 3);
    const struct gpu ends[] = {
        {"a", "GPU-1", 22803, false}, {"b", "", 0, false}, {"c", "GPU-3", 22803, false}};
    expect_links(ends, (bool[]){false, false, true}, 3); // the feedback alone
}
END_TEST

START_TEST(an_id_comes_where_an_edge_needs_it_and_nowhere_else)
{
    const struct gpu gpus[] = {{"a", "GPU-1", 22803, false}, {"b", "GPU-2", 22803, false}};
    char long_id[300];
    memset(long_id, 'x', sizeof(long_id) - 1);
    long_id[sizeof(long_id) - 1] = '\0';
    const char *ids[] = {"", long_id, "unasked"};
    for (int i = 0; i < 3; i++) {
        uint32_t n = i == 2 ? 1 : 2;
        open_pool((struct worker_pool_options){.n_workers = n});
        struct fake *a = fake_join_gpu(&gpus[0]), *b = n == 2 ? fake_join_gpu(&gpus[1]) : NULL;
        say_loaded(a, fake_expect(a, WIRE_ASSIGN).message.epoch, ids[i]);
        struct wire_pool picture = expect_state(WIRE_POOL_FAILED);
        ck_assert_msg(strstr(picture.problem, "worker a could not begin its link"), "%s", picture.problem);
        fake_expect(a, WIRE_ABORT);
        fake_leave(a);
        fake_leave(b);
        close_pool();
    }
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("pool_links");
    TCase *tcase = tcase_create("pool_links");
    tcase_set_timeout(tcase, 30);
    tcase_add_test(tcase, two_gpus_link_over_nccl_where_both_can);
    tcase_add_test(tcase, one_gpu_links_with_itself_only_when_both_say_so);
    tcase_add_test(tcase, gpus_and_cpus_of_one_pool_link_as_they_can);
    tcase_add_test(tcase, an_id_comes_where_an_edge_needs_it_and_nowhere_else);
    suite_add_tcase(suite, tcase);
    return suite;
}
