// Links between stages: what arrives is what was sent, and what is wrong (another epoch, another step,
// another length, not a frame, half a frame, silence) is an error or ignored, never data. Neighbours run in
// threads.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/clock.h"
#include "tests/suite.h"
#include "worker/link.h"
#include "worker/link_address.h"

enum { SECOND = 1000000, STAGES_MAX = 4 };

// One stage's end of a ring of links, connecting in its own thread.
struct node {
    pthread_t thread;
    struct link_listener *listener;
    char address[LINK_ADDRESS_BYTES];
    char next_address[LINK_ADDRESS_BYTES];
    uint64_t epoch;
    uint32_t stage, n_stages;
    int64_t timeout_us;
    volatile int cancel;
    struct link *to_next, *from_previous;
    int status;
    struct error error;
};

static void listen_on(struct node *node, const char *address)
{
    ck_assert_int_eq(
        link_listener_open(&node->listener, address, node->address, sizeof(node->address), &node->error), 0);
}

static void *connect_node(void *argument)
{
    struct node *node = argument;
    node->status = link_socket_connect(&node->to_next, &node->from_previous, node->listener,
                                       node->next_address, node->epoch, node->stage, node->n_stages,
                                       node->timeout_us, &node->cancel, &node->error);
    return NULL;
}

static void start(struct node *node)
{
    ck_assert_int_eq(pthread_create(&node->thread, NULL, connect_node, node), 0);
}

static void make_ring(struct node *nodes, uint32_t n, const char *address)
{
    memset(nodes, 0, n * sizeof(*nodes));
    for (uint32_t i = 0; i < n; i++) {
        listen_on(&nodes[i], address);
        nodes[i].epoch = 7;
        nodes[i].stage = i;
        nodes[i].n_stages = n;
        nodes[i].timeout_us = 10 * SECOND;
    }
    for (uint32_t i = 0; i < n; i++)
        strcpy(nodes[i].next_address, nodes[(i + 1) % n].address);
}

static void connect_ring(struct node *nodes, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        start(&nodes[i]);
    for (uint32_t i = 0; i < n; i++) {
        pthread_join(nodes[i].thread, NULL);
        ck_assert_msg(nodes[i].status == 0, "%s", nodes[i].error.text);
    }
}

static void close_ring(struct node *nodes, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (nodes[i].to_next)
            nodes[i].to_next->ops->close(nodes[i].to_next);
        if (nodes[i].from_previous)
            nodes[i].from_previous->ops->close(nodes[i].from_previous);
        link_listener_close(nodes[i].listener);
    }
}

static void exchange(uint32_t n, const char *address)
{
    struct node nodes[STAGES_MAX];
    make_ring(nodes, n, address);
    connect_ring(nodes, n);
    float sent[100], got[100];
    for (uint32_t i = 0; i < n; i++) {
        for (int k = 0; k < 100; k++)
            sent[k] = (float)(i * 1000) + (float)k / 3;
        struct link *to = nodes[i].to_next, *from = nodes[(i + 1) % n].from_previous;
        for (uint64_t step = 5; step < 8; step++)
            ck_assert_int_eq(to->ops->send(to, step, sent, sizeof(sent), NULL), 0);
        for (uint64_t step = 5; step < 8; step++) {
            ck_assert_int_eq(from->ops->receive(from, step, got, sizeof(got), NULL), 0);
            ck_assert_mem_eq(sent, got, sizeof(sent));
        }
    }
    close_ring(nodes, n);
}

START_TEST(test_frames_travel_around_rings)
{
    for (uint32_t n = 2; n <= STAGES_MAX; n++)
        exchange(n, "127.0.0.1:0");
}
END_TEST

START_TEST(test_unix_sockets)
{
    char folder[] = "/tmp/strata-link-XXXXXX", address[2][64];
    ck_assert_ptr_nonnull(mkdtemp(folder));
    struct node nodes[2];
    memset(nodes, 0, sizeof(nodes));
    for (uint32_t i = 0; i < 2; i++) {
        snprintf(address[i], sizeof(address[i]), "unix:%s/%u", folder, i);
        listen_on(&nodes[i], address[i]);
        nodes[i].stage = i;
        nodes[i].n_stages = 2;
        nodes[i].timeout_us = 10 * SECOND;
    }
    strcpy(nodes[0].next_address, address[1]);
    strcpy(nodes[1].next_address, address[0]);
    connect_ring(nodes, 2);
    char in[8] = "residua", out[8];
    struct link *to = nodes[0].to_next, *from = nodes[1].from_previous;
    ck_assert_int_eq(to->ops->send(to, 0, in, sizeof(in), NULL), 0);
    ck_assert_int_eq(from->ops->receive(from, 0, out, sizeof(out), NULL), 0);
    ck_assert_mem_eq(in, out, sizeof(in));
    close_ring(nodes, 2);
    ck_assert_int_eq(rmdir(folder), 0); // the sockets are gone
}
END_TEST

START_TEST(test_a_stale_socket_file_is_replaced_but_nothing_else)
{
    char folder[] = "/tmp/strata-link-XXXXXX", path[64], address[80], bound[LINK_ADDRESS_BYTES];
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(path, sizeof(path), "%s/socket", folder);
    snprintf(address, sizeof(address), "unix:%s", path);
    struct sockaddr_un where = {.sun_family = AF_UNIX};
    strcpy(where.sun_path, path);
    int dead = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(bind(dead, (struct sockaddr *)&where, sizeof(where)), 0);
    close(dead); // as a killed process leaves it
    struct link_listener *listener, *second;
    struct error error = {0};
    ck_assert_int_eq(link_listener_open(&listener, address, bound, sizeof(bound), &error), 0);
    ck_assert_int_eq(link_listener_open(&second, address, bound, sizeof(bound), &error), STATUS_IO);
    link_listener_close(listener);
    FILE *file = fopen(path, "w");
    fclose(file);
    ck_assert_int_eq(link_listener_open(&listener, address, bound, sizeof(bound), &error), STATUS_IO);
    ck_assert_int_eq(access(path, F_OK), 0);
    unlink(path);
    rmdir(folder);
}
END_TEST

enum { BYTES = 8 << 20 };
static const char *big_frame;

static void *send_big_frame(void *argument)
{
    struct link *link = argument;
    ck_assert_int_eq(link->ops->send(link, 1, big_frame, BYTES, NULL), 0);
    return NULL;
}

START_TEST(test_big_frames_survive_small_buffers)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    connect_ring(nodes, 2);
    char *sent = malloc(BYTES), *got = malloc(BYTES);
    for (int i = 0; i < BYTES; i++)
        sent[i] = (char)(i * 7 + (i >> 8));
    pthread_t sender; // cannot finish before the receiver reads
    big_frame = sent;
    pthread_create(&sender, NULL, send_big_frame, nodes[0].to_next);
    struct link *from = nodes[1].from_previous;
    ck_assert_int_eq(from->ops->receive(from, 1, got, BYTES, NULL), 0);
    ck_assert_mem_eq(sent, got, BYTES);
    pthread_join(sender, NULL);
    close_ring(nodes, 2);
    free(sent);
    free(got);
}
END_TEST

static int receive_after(uint64_t sent_step, size_t sent_bytes, uint64_t step, size_t bytes,
                         struct error *error)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    connect_ring(nodes, 2);
    char data[64] = {0};
    struct link *to = nodes[0].to_next, *from = nodes[1].from_previous;
    ck_assert_int_eq(to->ops->send(to, sent_step, data, sent_bytes, error), 0);
    int status = from->ops->receive(from, step, data, bytes, error);
    close_ring(nodes, 2);
    return status;
}

START_TEST(test_another_step_or_length_is_an_error)
{
    struct error error = {0};
    ck_assert_int_eq(receive_after(4, 8, 4, 8, &error), 0);
    ck_assert_int_eq(receive_after(4, 8, 5, 8, &error), STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "step 5"));
    ck_assert_int_eq(receive_after(4, 8, 4, 12, &error), STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "12 bytes"));
}
END_TEST

START_TEST(test_a_lost_neighbour_is_unavailable)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    connect_ring(nodes, 2);
    struct link *gone = nodes[0].to_next, *from = nodes[1].from_previous;
    char data[8];
    gone->ops->close(gone);
    nodes[0].to_next = NULL;
    struct error error = {0};
    ck_assert_int_eq(from->ops->receive(from, 0, data, sizeof(data), &error), STATUS_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(error.text, "stage 0"));
    close_ring(nodes, 2);
}
END_TEST

static void *abort_soon(void *argument)
{
    struct link *link = argument;
    clock_sleep_us(50000);
    link->ops->abort(link);
    return NULL;
}

START_TEST(test_abort_wakes_a_waiting_receive)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    connect_ring(nodes, 2);
    pthread_t thread;
    struct link *from = nodes[1].from_previous;
    pthread_create(&thread, NULL, abort_soon, from);
    char data[8];
    struct error error = {0};
    int64_t begin = clock_now_us();
    ck_assert_int_eq(from->ops->receive(from, 0, data, sizeof(data), &error), STATUS_CANCELLED);
    ck_assert_int_lt(clock_now_us() - begin, 5 * SECOND);
    pthread_join(thread, NULL);
    ck_assert_int_eq(from->ops->receive(from, 0, data, sizeof(data), &error), STATUS_CANCELLED);
    close_ring(nodes, 2);
}
END_TEST

START_TEST(test_abort_wakes_a_blocked_send)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    connect_ring(nodes, 2);
    pthread_t thread;
    struct link *to = nodes[0].to_next;
    pthread_create(&thread, NULL, abort_soon, to);
    size_t bytes = 64 << 20; // nobody reads
    char *data = calloc(1, bytes);
    ck_assert_int_eq(to->ops->send(to, 0, data, bytes, NULL), STATUS_CANCELLED);
    pthread_join(thread, NULL);
    free(data);
    close_ring(nodes, 2);
}
END_TEST

// A connection that is not a neighbour of this epoch.
static int dial_raw(const char *address)
{
    struct error error = {0};
    int fd;
    ck_assert_int_eq(link_address_dial(&fd, address, &error), 0);
    clock_sleep_us(20000);
    return fd;
}

static void send_hello(int fd, uint32_t magic, uint64_t epoch, uint64_t n_stages, uint32_t stage)
{
    unsigned char hello[40] = {0};
    uint16_t version = 1, kind = 1;
    memcpy(hello, &magic, 4);
    memcpy(hello + 4, &version, 2);
    memcpy(hello + 6, &kind, 2);
    memcpy(hello + 8, &epoch, 8);
    memcpy(hello + 16, &n_stages, 8);
    memcpy(hello + 24, &stage, 4);
    ck_assert_int_eq(send(fd, hello, sizeof(hello), MSG_NOSIGNAL), sizeof(hello));
}

START_TEST(test_strangers_are_turned_away_and_the_accept_goes_on)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    start(&nodes[1]);
    int silent = dial_raw(nodes[1].address);
    int half = dial_raw(nodes[1].address);
    ck_assert_int_eq(send(half, "SLNK\1", 5, MSG_NOSIGNAL), 5);
    struct {
        uint32_t magic;
        uint64_t epoch, n_stages;
        uint32_t stage;
    } wrong[] = {{0x4b4e4c53, 6, 2, 0}, {0x4b4e4c53, 7, 3, 0}, {0x4b4e4c53, 7, 2, 1}, {0x20544547, 7, 2, 0}};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        int fd = dial_raw(nodes[1].address);
        send_hello(fd, wrong[i].magic, wrong[i].epoch, wrong[i].n_stages, wrong[i].stage);
        char byte;
        ssize_t got = 1;
        for (int wait = 0; wait < 200 && got != 0; wait++) { // closed, not answered
            got = recv(fd, &byte, 1, MSG_DONTWAIT);
            ck_assert_int_le(got, 0);
            clock_sleep_us(10000);
        }
        ck_assert_int_eq(got, 0);
        close(fd);
    }
    ck_assert_ptr_null(nodes[1].from_previous);
    start(&nodes[0]);
    for (int i = 0; i < 2; i++) {
        pthread_join(nodes[i].thread, NULL);
        ck_assert_msg(nodes[i].status == 0, "%s", nodes[i].error.text);
    }
    close(silent);
    close(half);
    close_ring(nodes, 2);
}
END_TEST

START_TEST(test_more_silent_strangers_than_places)
{
    struct node nodes[2];
    int strangers[20];
    make_ring(nodes, 2, "127.0.0.1:0");
    start(&nodes[1]);
    for (int i = 0; i < 20; i++)
        strangers[i] = dial_raw(nodes[1].address);
    start(&nodes[0]);
    for (int i = 0; i < 2; i++) {
        pthread_join(nodes[i].thread, NULL);
        ck_assert_msg(nodes[i].status == 0, "%s", nodes[i].error.text);
    }
    for (int i = 0; i < 20; i++)
        close(strangers[i]);
    close_ring(nodes, 2);
}
END_TEST

START_TEST(test_epochs_do_not_meet)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    nodes[1].epoch = 8;
    nodes[0].timeout_us = nodes[1].timeout_us = SECOND / 2;
    for (int i = 0; i < 2; i++)
        start(&nodes[i]);
    for (int i = 0; i < 2; i++) {
        pthread_join(nodes[i].thread, NULL);
        ck_assert_int_eq(nodes[i].status, STATUS_DEADLINE);
        ck_assert_ptr_nonnull(strstr(nodes[i].error.text, "stage"));
    }
    close_ring(nodes, 2);
}
END_TEST

START_TEST(test_a_neighbour_that_is_late_is_waited_for)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    link_listener_close(nodes[1].listener); // nobody listens yet
    start(&nodes[0]);
    clock_sleep_us(200000);
    char address[LINK_ADDRESS_BYTES];
    strcpy(address, nodes[1].address);
    listen_on(&nodes[1], address);
    start(&nodes[1]);
    for (int i = 0; i < 2; i++) {
        pthread_join(nodes[i].thread, NULL);
        ck_assert_msg(nodes[i].status == 0, "%s", nodes[i].error.text);
    }
    close_ring(nodes, 2);
}
END_TEST

START_TEST(test_cancel_ends_linking)
{
    struct node nodes[2];
    make_ring(nodes, 2, "127.0.0.1:0");
    start(&nodes[0]);
    clock_sleep_us(50000);
    __atomic_store_n(&nodes[0].cancel, 1, __ATOMIC_RELEASE);
    pthread_join(nodes[0].thread, NULL);
    ck_assert_int_eq(nodes[0].status, STATUS_CANCELLED);
    close_ring(nodes, 2);
}
END_TEST

START_TEST(test_frames_that_are_none)
{
    struct {
        uint32_t magic;
        uint16_t version, kind;
        uint64_t epoch, number;
        uint32_t stage, zero;
        uint64_t bytes;
    } frame = {0x4b4e4c53, 1, 2, 7, 0, 0, 0, 8}, broken;
    for (int damage = 0; damage < 6; damage++) {
        struct node nodes[2];
        memset(nodes, 0, sizeof(nodes));
        // A listener of ours stands in for stage 0: it accepts stage 1's dial and answers its hello.
        int listening, conversation;
        char bound[LINK_ADDRESS_BYTES];
        ck_assert_int_eq(link_address_listen(&listening, "127.0.0.1:0", bound, sizeof(bound), NULL), 0);
        listen_on(&nodes[1], "127.0.0.1:0");
        strcpy(nodes[1].next_address, bound);
        nodes[1].epoch = 7;
        nodes[1].stage = 1;
        nodes[1].n_stages = 2;
        nodes[1].timeout_us = 5 * SECOND;
        start(&nodes[1]);
        int to = dial_raw(nodes[1].address);
        send_hello(to, 0x4b4e4c53, 7, 2, 0);
        while ((conversation = accept(listening, NULL, NULL)) < 0)
            clock_sleep_us(1000);
        send_hello(conversation, 0x4b4e4c53, 7, 2, 0);
        pthread_join(nodes[1].thread, NULL);
        ck_assert_int_eq(nodes[1].status, 0);
        broken = frame;
        broken.magic += damage == 1;
        broken.version += damage == 2;
        broken.kind += damage == 3;
        broken.epoch += damage == 4;
        ck_assert_int_eq(send(to, &broken, sizeof(broken), 0), sizeof(broken));
        ck_assert_int_eq(send(to, "12345678", damage == 5 ? 3 : 8, 0), damage == 5 ? 3 : 8);
        shutdown(to, SHUT_WR); // case 5: half a payload
        char data[8];
        struct error error = {0};
        struct link *from = nodes[1].from_previous;
        int expected = damage == 0 ? 0 : damage == 5 ? STATUS_UNAVAILABLE : STATUS_CORRUPT;
        ck_assert_int_eq(from->ops->receive(from, 0, data, sizeof(data), &error), expected);
        close(to);
        close(conversation);
        close(listening);
        close_ring(nodes + 1, 1);
    }
}
END_TEST

START_TEST(test_addresses)
{
    char bound[LINK_ADDRESS_BYTES], out[LINK_ADDRESS_BYTES];
    struct link_listener *listener;
    struct error error = {0};
    const char *bad[] = {
        "", "localhost", ":80", "127.0.0.1:", "unix:", "127.0.0.1:99999999", "no.such.host.invalid:1"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        ck_assert_msg(link_listener_open(&listener, bad[i], bound, sizeof(bound), &error) != 0, "%s", bad[i]);
        ck_assert_msg(strlen(error.text) > 0, "%s", bad[i]);
    }
    ck_assert_int_eq(link_listener_open(&listener, "127.0.0.1:0", bound, sizeof(bound), &error), 0);
    ck_assert_ptr_nonnull(strstr(bound, "127.0.0.1:"));
    ck_assert_str_ne(bound, "127.0.0.1:0");
    link_listener_close(listener);
    ck_assert_int_eq(link_address_advertise(out, sizeof(out), "0.0.0.0:4100", NULL, &error), 0);
    ck_assert_str_eq(out, "0.0.0.0:4100");
    ck_assert_int_eq(link_address_advertise(out, sizeof(out), "0.0.0.0:4100", "worker-1", &error), 0);
    ck_assert_str_eq(out, "worker-1:4100");
    ck_assert_int_eq(link_address_advertise(out, sizeof(out), "[::]:4100", "[fd00::1]", &error), 0);
    ck_assert_str_eq(out, "[fd00::1]:4100");
    ck_assert_int_eq(link_address_advertise(out, sizeof(out), "0.0.0.0:4100", "worker-1:5000", &error), 0);
    ck_assert_str_eq(out, "worker-1:5000");
    ck_assert_int_eq(link_address_advertise(out, sizeof(out), "unix:/x", "worker-1", &error), STATUS_INVALID);
    ck_assert_int_eq(link_address_advertise(out, 4, "0.0.0.0:4100", NULL, &error), STATUS_INVALID);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("link");
    TCase *tests = tcase_create("link");
    tcase_set_timeout(tests, 30);
    tcase_add_test(tests, test_frames_travel_around_rings);
    tcase_add_test(tests, test_unix_sockets);
    tcase_add_test(tests, test_a_stale_socket_file_is_replaced_but_nothing_else);
    tcase_add_test(tests, test_big_frames_survive_small_buffers);
    tcase_add_test(tests, test_another_step_or_length_is_an_error);
    tcase_add_test(tests, test_a_lost_neighbour_is_unavailable);
    tcase_add_test(tests, test_abort_wakes_a_waiting_receive);
    tcase_add_test(tests, test_abort_wakes_a_blocked_send);
    tcase_add_test(tests, test_strangers_are_turned_away_and_the_accept_goes_on);
    tcase_add_test(tests, test_more_silent_strangers_than_places);
    tcase_add_test(tests, test_epochs_do_not_meet);
    tcase_add_test(tests, test_a_neighbour_that_is_late_is_waited_for);
    tcase_add_test(tests, test_cancel_ends_linking);
    tcase_add_test(tests, test_frames_that_are_none);
    tcase_add_test(tests, test_addresses);
    suite_add_tcase(suite, tests);
    return suite;
}
