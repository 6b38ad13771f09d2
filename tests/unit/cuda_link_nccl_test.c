// NCCL links between processes: whole messages in order with work between them, tokens around the ring, and
// every end: a neighbour that is killed, an abort from another thread, linking that does not come about;
// after each the surviving process links again. Each stage is a process of its own, this program started
// again with STRATA_TEST_STAGE set: it takes orders as lines on its input and answers on its output. The test
// itself touches no device. Where there are fewer GPUs than stages, the stages share them (slow: NCCL's
// sockets).
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"
#include "kernels/kernels.h"
#include "tests/suite.h"
#include "worker/link_address.h"
#include "worker/link_nccl.h"

enum {
    SECOND = 1000000,
    LINE = 1024,
    STAGES_MAX = 4,
    STEPS = 200,
    DEPTH = 4,          // steps that a stage has under way
    LONGEST = 1 << 20,  // bytes of a residual
    TOKENS = 32,        // of a step, at most
    SCRATCH = 16 << 20, // bytes copied between two messages, as work
};

// --- a stage: the process that owns a device ---

static struct {
    uint32_t stage, n_stages;
    uint64_t epoch;
    struct device *device;
    const struct kernel_ops *ops;
    struct link_listener *listener;
    char address[LINK_ADDRESS_BYTES];
    unsigned char id[LINK_NCCL_ID_BYTES];
    struct link *to_next, *from_previous;
    char *residual, *work, *kept, *tokens, *kept_tokens; // [device]
    char *host;
    struct error error;
} me;

static size_t bytes_of(uint64_t step)
{
    static const size_t BYTES[] = {4, 4096, 65540, 1 << 18, LONGEST};
    return BYTES[step % 5];
}

static uint32_t tokens_of(uint64_t step)
{
    return 1 + (uint32_t)(step * 7 % TOKENS);
}

// What is sent in a step, told from every other step and place.
static void fill(void *to, uint64_t step, size_t bytes, uint32_t salt)
{
    uint32_t *words = to;
    for (size_t i = 0; i < bytes / 4; i++)
        words[i] = (uint32_t)(me.epoch * 1000003 + step * 65537 + i) * 2654435761u + salt;
}

static int compare_with(const void *got, uint64_t step, size_t bytes, uint32_t salt, const char *what)
{
    fill(me.host, step, bytes, salt);
    if (memcmp(me.host, got, bytes) == 0)
        return 0;
    return error_set(&me.error, STATUS_CORRUPT, "the %s of step %llu is not what was sent", what,
                     (unsigned long long)step);
}

// Work on the device between messages, so that they have to wait for it and it for them.
static void work(void)
{
    for (int i = 0; i < 2; i++)
        me.ops->copy(me.device, me.work, me.work + SCRATCH, SCRATCH);
}

// What the first and the last stage will send lies ready: an upload behind a message that never comes could
// wait for ever.
static int prepare(uint64_t steps)
{
    for (uint64_t step = 0; step < steps; step++) {
        if (me.stage == 0) {
            fill(me.host, step, bytes_of(step), 1);
            me.ops->upload(me.device, me.kept + step * LONGEST, me.host, bytes_of(step));
        } else if (me.stage + 1 == me.n_stages) {
            fill(me.host, step, tokens_of(step) * 4, 2);
            me.ops->upload(me.device, me.kept_tokens + step * TOKENS * 4, me.host, tokens_of(step) * 4);
        }
    }
    return me.ops->sync(me.device, &me.error);
}

static int receive_feedback(uint64_t step)
{
    return me.from_previous->ops->receive(me.from_previous, step, me.kept_tokens + step * TOKENS * 4,
                                          tokens_of(step) * 4, &me.error);
}

// One step, queued. The first stage makes the residual and gets the tokens some steps later; the last one
// keeps what came and sends tokens; the others pass on. What was sent is overwritten at once.
static int queue_step(uint64_t step)
{
    int status = 0;
    size_t bytes = bytes_of(step);
    bool first = me.stage == 0, last = me.stage + 1 == me.n_stages;
    uint64_t lag = me.n_stages + 1;
    if (first && step >= lag)
        status = receive_feedback(step - lag);
    if (first)
        me.ops->copy(me.device, me.residual, me.kept + step * LONGEST, bytes);
    else if (!status)
        status = me.from_previous->ops->receive(me.from_previous, step, me.residual, bytes, &me.error);
    work();
    if (status)
        return status;
    if (last) {
        me.ops->copy(me.device, me.kept + step * LONGEST, me.residual, bytes);
        me.ops->copy(me.device, me.tokens, me.kept_tokens + step * TOKENS * 4, tokens_of(step) * 4);
        status = me.to_next->ops->send(me.to_next, step, me.tokens, tokens_of(step) * 4, &me.error);
        me.ops->copy(me.device, me.tokens, me.work, TOKENS * 4);
    } else {
        status = me.to_next->ops->send(me.to_next, step, me.residual, bytes, &me.error);
    }
    me.ops->copy(me.device, me.residual, me.work, bytes);
    return status;
}

static int check_links(void)
{
    int status = me.to_next->ops->check(me.to_next, &me.error);
    return status ? status : me.from_previous->ops->check(me.from_previous, &me.error);
}

static int await(uint64_t mark)
{
    for (;;) {
        int reached = me.ops->reached(me.device, mark, &me.error);
        if (reached != 0)
            return reached < 0 ? reached : 0;
        int status = check_links();
        if (status)
            return status;
        clock_sleep_us(200);
    }
}

static int verify(uint64_t steps)
{
    static char got[LONGEST];
    int status = 0;
    for (uint64_t step = 0; step < steps && !status; step++) {
        if (me.stage + 1 == me.n_stages) {
            me.ops->download(me.device, got, me.kept + step * LONGEST, bytes_of(step));
            status = compare_with(got, step, bytes_of(step), 1, "residual");
        } else if (me.stage == 0) {
            me.ops->download(me.device, got, me.kept_tokens + step * TOKENS * 4, tokens_of(step) * 4);
            status = compare_with(got, step, tokens_of(step) * 4, 2, "feedback");
        }
    }
    return status;
}

static int run(uint64_t steps)
{
    uint64_t marks[STEPS];
    int status = prepare(steps);
    for (uint64_t step = 0; step < steps && !status; step++) {
        status = queue_step(step);
        marks[step] = me.ops->mark(me.device);
        if (!status && step >= DEPTH)
            status = await(marks[step - DEPTH]);
    }
    for (uint64_t step = steps > me.n_stages + 1 ? steps - me.n_stages - 1 : 0;
         me.stage == 0 && step < steps && !status; step++)
        status = receive_feedback(step);
    if (!status)
        status = await(me.ops->mark(me.device));
    return status ? status : verify(steps);
}

// Waits for a message that nobody sends, until another thread ends the epoch.
static void *abort_soon(void *unused)
{
    clock_sleep_us(300000);
    me.to_next->ops->abort(me.to_next);
    me.from_previous->ops->abort(me.from_previous);
    return NULL;
}

static int wait_for_abort(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, abort_soon, NULL);
    int status = me.from_previous->ops->receive(me.from_previous, 0, me.residual, 4, &me.error);
    if (!status)
        status = await(me.ops->mark(me.device));
    if (!status)
        status = check_links(); // the end of the link came first
    pthread_join(thread, NULL);
    struct error late;
    if (me.to_next->ops->send(me.to_next, 0, me.residual, 4, &late) != STATUS_CANCELLED)
        return error_set(&me.error, STATUS_INTERNAL, "an aborted link still sends");
    return status;
}

static void unlink_stage(void)
{
    struct link *links[] = {me.to_next, me.from_previous};
    for (int i = 0; i < 2; i++)
        if (links[i])
            links[i]->ops->abort(links[i]);
    for (int i = 0; i < 2; i++)
        if (links[i])
            links[i]->ops->close(links[i]);
    me.to_next = me.from_previous = NULL;
}

// "link EPOCH MILLISECONDS NCCL NEXT-ADDRESS PREVIOUS-ID"; without NCCL the edges stay sockets.
static int link_stage(const char *line)
{
    unsigned long long epoch;
    int milliseconds, nccl;
    char address[LINE], id[LINE];
    if (sscanf(line, "link %llu %d %d %1023s %1023s", &epoch, &milliseconds, &nccl, address, id) != 5)
        return error_set(&me.error, STATUS_INVALID, "what is %s?", line);
    me.epoch = epoch;
    bool first = me.stage == 0, last = me.stage + 1 == me.n_stages;
    struct link_nccl_shape residual = link_nccl_residual(LONGEST / 4, 1), tokens = link_nccl_feedback(TOKENS);
    struct link_nccl_end ends[2] = {
        {.link = &me.to_next, .shape = last ? tokens : residual, .sender = true},
        {.link = &me.from_previous, .shape = first ? tokens : residual},
    };
    memcpy(ends[0].id, me.id, LINK_NCCL_ID_BYTES);
    for (int i = 0; i < LINK_NCCL_ID_BYTES; i++) {
        unsigned byte;
        sscanf(id + 2 * i, "%2x", &byte);
        ends[1].id[i] = (unsigned char)byte;
    }
    int status = link_socket_connect(&me.to_next, &me.from_previous, me.listener, address, epoch, me.stage,
                                     me.n_stages, 20 * SECOND, NULL, &me.error);
    if (status || !nccl)
        return status;
    return link_nccl_connect(me.device, ends, 2, (int64_t)milliseconds * 1000, NULL, &me.error);
}

static int say_id(void)
{
    int status = link_nccl_make_id(me.id, &me.error);
    printf("id ");
    for (int i = 0; i < LINK_NCCL_ID_BYTES && !status; i++)
        printf("%02x", me.id[i]);
    printf("\n");
    return status;
}

static int start_stage(void)
{
    uint32_t gpus = device_count("cuda");
    struct device_options options = {.backend = "cuda", .index = me.stage % gpus};
    if (gpus < me.n_stages) {
        char name[32];
        snprintf(name, sizeof(name), "strata-test-%ld", (long)getpid());
        setenv("NCCL_HOSTID", name, 1);
    }
    int status = device_open(&me.device, &options, &me.error);
    if (!status)
        status = link_listener_open(&me.listener, "127.0.0.1:0", me.address, sizeof(me.address), &me.error);
    if (status)
        return status;
    me.ops = device_ops(me.device);
    me.host = malloc(LONGEST);
    me.residual = me.ops->alloc(me.device, LONGEST);
    me.work = me.ops->alloc(me.device, 2 * SCRATCH);
    me.kept = me.ops->alloc(me.device, (size_t)STEPS * LONGEST);
    me.tokens = me.ops->alloc(me.device, TOKENS * 4);
    me.kept_tokens = me.ops->alloc(me.device, STEPS * TOKENS * 4);
    if (!me.residual || !me.work || !me.kept || !me.tokens || !me.kept_tokens)
        return error_set(&me.error, STATUS_NO_MEMORY, "no device memory for a stage");
    return link_nccl_version(me.device) ? 0 : error_set(&me.error, STATUS_UNSUPPORTED, "no NCCL here");
}

static int obey(const char *line)
{
    if (!strncmp(line, "id", 2))
        return say_id();
    if (!strncmp(line, "link", 4))
        return link_stage(line);
    if (!strncmp(line, "run", 3))
        return run(STEPS);
    if (!strncmp(line, "wait", 4))
        return wait_for_abort();
    unlink_stage();
    return me.ops->sync(me.device, &me.error); // the device is none the worse
}

// Each order is answered with "STATUS TEXT".
static void be_stage(const char *place)
{
    char line[LINE];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    log_init("stage", LOG_WARN, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    sscanf(place, "%u/%u", &me.stage, &me.n_stages);
    int status = start_stage();
    printf("%d %s\n", status, status ? me.error.text : me.address);
    while (!status && fgets(line, sizeof(line), stdin)) {
        me.error = (struct error){0};
        int answer = obey(line);
        printf("%d %s\n", answer, answer ? me.error.text : "");
    }
    _exit(EXIT_SUCCESS);
}

// --- the test: orders for the stages ---

struct stage {
    pid_t pid;
    FILE *orders, *answers;
    char address[LINK_ADDRESS_BYTES], id[LINE], text[LINE];
};
static struct stage stages[STAGES_MAX];
static uint32_t n_stages;
static uint64_t epoch;

static void order(uint32_t s, const char *line)
{
    fprintf(stages[s].orders, "%s\n", line);
    fflush(stages[s].orders);
}

// CTest's time limit ends a wait for a stage that hangs; the stages die with this process.
static int answer(uint32_t s)
{
    char line[LINE];
    int status, at;
    ck_assert_msg(fgets(line, sizeof(line), stages[s].answers) != NULL, "stage %u is gone", s);
    line[strcspn(line, "\n")] = '\0';
    ck_assert_msg(sscanf(line, "%d %n", &status, &at) == 1, "stage %u says: %s", s, line);
    snprintf(stages[s].text, sizeof(stages[s].text), "%s", line + at);
    return status;
}

static void expect_done(uint32_t s)
{
    int status = answer(s);
    ck_assert_msg(status == 0, "stage %u: %d %s", s, status, stages[s].text);
}

static void start(uint32_t s)
{
    int in[2], out[2];
    char place[32];
    char *arguments[] = {(char *)"cuda_link_nccl_test", NULL};
    posix_spawn_file_actions_t actions;
    ck_assert(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    snprintf(place, sizeof(place), "%u/%u", s, n_stages);
    setenv("STRATA_TEST_STAGE", place, 1);
    ck_assert_int_eq(posix_spawn(&stages[s].pid, "/proc/self/exe", &actions, NULL, arguments, environ), 0);
    unsetenv("STRATA_TEST_STAGE");
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    stages[s].orders = fdopen(in[1], "w");
    stages[s].answers = fdopen(out[0], "r");
    expect_done(s);
    memcpy(stages[s].address, stages[s].text, sizeof(stages[s].address));
}

static void stop(uint32_t s)
{
    if (stages[s].pid <= 0)
        return;
    kill(stages[s].pid, SIGKILL);
    waitpid(stages[s].pid, NULL, 0);
    fclose(stages[s].orders);
    fclose(stages[s].answers);
    stages[s].pid = 0;
}

static void start_all(uint32_t n)
{
    signal(SIGPIPE, SIG_IGN);
    n_stages = n;
    for (uint32_t s = 0; s < n; s++)
        start(s);
}

static void stop_all(void)
{
    for (uint32_t s = 0; s < STAGES_MAX; s++)
        stop(s);
}

// `nccl`: which stages go on to NCCL after their sockets.
static void begin_linking(int milliseconds, unsigned nccl)
{
    char line[2 * LINE];
    epoch++;
    for (uint32_t s = 0; s < n_stages; s++) {
        order(s, "id");
        ck_assert(fgets(line, sizeof(line), stages[s].answers) != NULL);
        ck_assert_int_eq(sscanf(line, "id %1023s", stages[s].id), 1);
        expect_done(s);
    }
    for (uint32_t s = 0; s < n_stages; s++) {
        snprintf(line, sizeof(line), "link %llu %d %d %s %s", (unsigned long long)epoch, milliseconds,
                 (int)(nccl >> s & 1), stages[(s + 1) % n_stages].address,
                 stages[(s + n_stages - 1) % n_stages].id);
        order(s, line);
    }
}

static void link_all(void)
{
    begin_linking(60000, ~0u);
    for (uint32_t s = 0; s < n_stages; s++)
        expect_done(s);
}

static void each(const char *line)
{
    for (uint32_t s = 0; s < n_stages; s++)
        order(s, line);
    for (uint32_t s = 0; s < n_stages; s++)
        expect_done(s);
}

START_TEST(messages_arrive_whole_and_in_order)
{
    const uint32_t sizes[] = {2, 4};
    start_all(sizes[_i]);
    for (int round = 0; round < 2; round++) { // the second time as a pool that was assembled again
        link_all();
        each("run");
        each("unlink");
    }
}
END_TEST

// One of two stages is killed while the other waits for it.
START_TEST(a_killed_neighbour_is_noticed_and_replaced)
{
    uint32_t victim = (uint32_t)_i, left = 1 - victim;
    start_all(2);
    link_all();
    order(left, "run");
    clock_sleep_us(SECOND / 2);
    int64_t begin = clock_now_us();
    stop(victim);
    int status = answer(left);
    ck_assert_msg(status == STATUS_UNAVAILABLE, "%d %s", status, stages[left].text);
    ck_assert_int_lt(clock_now_us() - begin, 5 * SECOND);
    order(left, "unlink");
    expect_done(left);
    ck_assert_int_lt(clock_now_us() - begin, 10 * SECOND);
    start(victim);
    link_all();
    each("run");
}
END_TEST

START_TEST(an_abort_ends_a_wait)
{
    start_all(2);
    link_all();
    int64_t begin = clock_now_us();
    order(1, "wait");
    int status = answer(1);
    ck_assert_msg(status == STATUS_CANCELLED, "%d %s", status, stages[1].text);
    order(1, "unlink");
    expect_done(1);
    ck_assert_int_lt(clock_now_us() - begin, 5 * SECOND);
    order(0, "run"); // its neighbour has left the epoch
    ck_assert_int_eq(answer(0), STATUS_UNAVAILABLE);
    order(0, "unlink");
    expect_done(0);
    link_all();
    each("run");
}
END_TEST

START_TEST(linking_gives_up_in_time)
{
    start_all(2);
    begin_linking(2000, 1); // stage 1 greets, and never comes to the communicators
    expect_done(1);
    int status = answer(0);
    ck_assert_msg(status == STATUS_DEADLINE, "%d %s", status, stages[0].text);
    each("unlink");
    begin_linking(30000, 1); // and here it dies in the middle
    expect_done(1);
    clock_sleep_us(SECOND / 2);
    stop(1);
    status = answer(0);
    ck_assert_msg(status == STATUS_UNAVAILABLE, "%d %s", status, stages[0].text);
    order(0, "unlink");
    expect_done(0);
    start(1);
    link_all();
    each("run");
}
END_TEST

Suite *make_suite(void)
{
    const char *place = getenv("STRATA_TEST_STAGE");
    if (device_count("cuda") == 0 || LINK_NCCL_IS_BUILT == 0) {
        printf("skipped: no GPU here, or a build without NCCL\n");
        exit(77);
    }
    if (place)
        be_stage(place);
    Suite *suite = suite_create("cuda_link_nccl");
    TCase *tcase = tcase_create("cuda_link_nccl");
    tcase_set_timeout(tcase, 300);
    tcase_add_checked_fixture(tcase, NULL, stop_all);
    tcase_add_loop_test(tcase, messages_arrive_whole_and_in_order, 0, 2);
    tcase_add_loop_test(tcase, a_killed_neighbour_is_noticed_and_replaced, 0, 2);
    tcase_add_test(tcase, an_abort_ends_a_wait);
    tcase_add_test(tcase, linking_gives_up_in_time);
    suite_add_tcase(suite, tcase);
    return suite;
}
