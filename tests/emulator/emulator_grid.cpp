// Grids, blocks and fibers: how a kernel's threads take turns on a processor (emulator.h has the rules).
//
// The thread that launches, and helpers that wait for work, take blocks one after the other, or the blocks of
// one cluster together. Of a block each runs the fibers in turn, warp by warp: a fiber goes on until it waits
// for a word of memory to change. Fibers switch by setjmp and longjmp, on stacks that makecontext has begun.
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <thread>
#include <time.h>
#include <ucontext.h>
#include <vector>

#include "tests/emulator/emulator.h"

enum {
    STACK_BYTES = 128 << 10,
    WINDOW_BEGIN = 1040, // the address of dynamic shared memory: on a GPU, too, it begins anywhere
    CANARY_BYTES = 256,
    PATIENCE_S = 120, // for other blocks of the cluster
    UNWRITTEN = 0xFF, // bytes of NaN, as halves and as floats
    CANARY = 0xA5
};

static const uint64_t BARRIER_MARK = 0xBA51ull << 48; // above the number of a barrier

thread_local struct uint3 emulated_thread_index, emulated_block_index, emulated_block_size,
    emulated_grid_size;
alignas(1024) thread_local unsigned char emulated_shared[EMULATED_SHARED + CANARY_BYTES];

// The names under which kernels declare their dynamic shared memory.
__asm__(".globl shared\n.set shared, emulated_shared\n"
        ".globl chunks\n.set chunks, emulated_shared\n"
        ".globl attention_shared\n.set attention_shared, emulated_shared\n"
        ".globl part_memory\n.set part_memory, emulated_shared\n");

static thread_local char anchor; // what lies where in a thread's own memory is the same in all threads

namespace
{

struct copy16 {
    void *to;
    const void *from;
    bool live;
    unsigned group;
};

struct fiber {
    ucontext_t begin;
    jmp_buf at;
    bool begun, done;
    struct uint3 index;
    unsigned lane;
    struct warp *warp;
    const uint32_t *word; // it waits until this differs from `seen`; NULL: it does not
    uint32_t seen, cluster_seen;
    std::vector<struct copy16> copies;
    unsigned groups; // committed
};

struct warp {
    void *brought[EMULATED_WARP];
    uint32_t come, live, generation;
    emulated_meeting *meet;
};

struct barrier {
    uint32_t phase, pending, arrivals;
    int64_t bytes; // expected and not there
};

struct bulk_copy {
    void *to;
    const void *from;
    unsigned bytes;
    size_t barrier;
};

struct cluster {
    std::mutex lock;
    uint32_t come, live, generation;
    char *anchors[EMULATED_CLUSTER];
};

// One thread of the processor, and the block it runs.
struct block_runner {
    const struct emulated_launch *launch;
    struct cluster *cluster; // NULL: none
    unsigned rank;
    jmp_buf at;
    struct fiber *current;
    std::deque<struct fiber> fibers; // more than the block has, from earlier ones
    std::vector<unsigned char *> stacks;
    std::vector<struct warp> warps;
    uint32_t n_threads, live, come, generation;
    bool yes, answer; // of the block's meeting: this one's, and what the last said
    std::deque<struct barrier> barriers;
    std::vector<struct bulk_copy> copies;

    ~block_runner()
    {
        for (unsigned char *stack : stacks)
            munmap(stack, STACK_BYTES);
    }
};

} // namespace

// Made when a thread first runs a block, and gone with the thread.
static thread_local struct block_runner *runner;

static void make_runner()
{
    static thread_local std::unique_ptr<struct block_runner> own;
    if (!own)
        own.reset(new struct block_runner());
    runner = own.get();
}

void emulated_misuse(const char *sentence)
{
    fprintf(stderr, "emulated kernel, block (%u, %u, %u), thread %u: %s\n", emulated_block_index.x,
            emulated_block_index.y, emulated_block_index.z, emulated_thread_index.x, sentence);
    abort();
}

void emulated_want_90()
{
    if (emulated_is_general())
        emulated_misuse("an instruction that this GPU does not have");
}

// --- taking turns ---

static __attribute__((noinline)) void leave_fiber()
{
    struct fiber *fiber = runner->current;
    if (_setjmp(fiber->at) == 0)
        _longjmp(runner->at, 1);
}

static __attribute__((noinline)) void enter_fiber(struct fiber *fiber)
{
    runner->current = fiber;
    emulated_thread_index = fiber->index;
    if (_setjmp(runner->at) != 0)
        return;
    if (fiber->begun)
        _longjmp(fiber->at, 1);
    fiber->begun = true;
    setcontext(&fiber->begin);
}

// Lets others run until *word is no longer `seen`.
static void wait_for(const uint32_t *word, uint32_t seen)
{
    if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != seen)
        return;
    runner->current->word = word;
    runner->current->seen = seen;
    leave_fiber();
}

static void finish_meeting(struct warp *warp)
{
    warp->meet(warp->brought);
    memset(warp->brought, 0, sizeof(warp->brought));
    warp->come = 0;
    warp->generation++;
}

void emulated_meet_warp(void *mine, emulated_meeting *meet)
{
    static char nothing;
    struct warp *warp = runner->current->warp;
    uint32_t generation = warp->generation;
    if (warp->come > 0 && warp->meet != meet)
        emulated_misuse("threads of a warp meet at different instructions");
    warp->meet = meet;
    warp->brought[runner->current->lane] = mine ? mine : &nothing;
    if (++warp->come == warp->live)
        finish_meeting(warp);
    else
        wait_for(&warp->generation, generation);
}

static void finish_block_meeting()
{
    runner->answer = runner->yes;
    runner->yes = false;
    runner->come = 0;
    runner->generation++;
}

bool emulated_meet_block(bool yes)
{
    uint32_t generation = runner->generation;
    runner->yes |= yes;
    if (++runner->come == runner->live)
        finish_block_meeting();
    else
        wait_for(&runner->generation, generation);
    return runner->answer;
}

// --- clusters ---

unsigned emulated_cluster_rank()
{
    return runner->rank;
}

static void pass_cluster(struct cluster *cluster)
{
    if (cluster->come < cluster->live)
        return;
    cluster->come = 0;
    __atomic_fetch_add(&cluster->generation, 1, __ATOMIC_RELEASE);
}

void emulated_cluster_arrive()
{
    if (!runner->cluster)
        emulated_misuse("a barrier of a cluster, and the launch has none");
    std::lock_guard<std::mutex> locked(runner->cluster->lock);
    runner->current->cluster_seen = runner->cluster->generation;
    runner->cluster->come++;
    pass_cluster(runner->cluster);
}

void emulated_cluster_wait()
{
    wait_for(&runner->cluster->generation, runner->current->cluster_seen);
}

void *emulated_cluster_map(void *mine, unsigned rank)
{
    if (!runner->cluster || rank >= runner->launch->cluster)
        emulated_misuse("a block that is not of the cluster");
    return runner->cluster->anchors[rank] + ((char *)mine - &anchor);
}

// --- shared memory, barriers, copies ---

unsigned emulated_shared_address(const void *pointer)
{
    ptrdiff_t at = (const unsigned char *)pointer - emulated_shared;
    if (at < 0 || at > EMULATED_SHARED)
        emulated_misuse("an address of shared memory that is not in it");
    return (unsigned)at + WINDOW_BEGIN;
}

void *emulated_shared_pointer(unsigned address)
{
    unsigned at = address - WINDOW_BEGIN;
    if (at >= runner->launch->shared)
        emulated_misuse("a descriptor beyond the block's shared memory");
    return emulated_shared + at;
}

static void want_shared(const void *to, size_t bytes)
{
    ptrdiff_t at = (const unsigned char *)to - emulated_shared;
    if (at < 0 || at + bytes > runner->launch->shared)
        emulated_misuse("a copy to what is not the block's shared memory");
}

static size_t barrier_number(const unsigned long long *barrier)
{
    if (*barrier >> 48 != BARRIER_MARK >> 48 || (*barrier & ~BARRIER_MARK) >= runner->barriers.size())
        emulated_misuse("a barrier that was not made");
    return *barrier & ~BARRIER_MARK;
}

static void pass_barrier(struct barrier &barrier)
{
    if (barrier.pending > 0 || barrier.bytes != 0)
        return;
    barrier.pending = barrier.arrivals;
    barrier.phase++;
}

void emulated_barrier_init(unsigned long long *barrier, unsigned arrivals)
{
    emulated_want_90();
    *barrier = BARRIER_MARK | runner->barriers.size();
    runner->barriers.push_back({0, arrivals, arrivals, 0});
}

void emulated_barrier_arrive(unsigned long long *barrier, unsigned expected_bytes)
{
    struct barrier &to = runner->barriers[barrier_number(barrier)];
    if (to.pending == 0)
        emulated_misuse("more arrivals at a barrier than it was made for");
    to.pending--;
    to.bytes += expected_bytes;
    pass_barrier(to);
}

static void finish_copy(const struct bulk_copy &copy)
{
    struct barrier &barrier = runner->barriers[copy.barrier];
    memcpy(copy.to, copy.from, copy.bytes);
    barrier.bytes -= copy.bytes;
    pass_barrier(barrier);
}

// Of one barrier, or of all (`barrier` beyond them). Returns whether there were any.
static bool finish_copies(size_t barrier)
{
    std::vector<struct bulk_copy> left, now;
    for (const struct bulk_copy &copy : runner->copies)
        (copy.barrier == barrier || barrier >= runner->barriers.size() ? now : left).push_back(copy);
    runner->copies = left;
    for (const struct bulk_copy &copy : now)
        finish_copy(copy);
    return !now.empty();
}

void emulated_barrier_await(unsigned long long *barrier, unsigned parity)
{
    size_t number = barrier_number(barrier);
    struct barrier &of = runner->barriers[number];
    if ((of.phase & 1) == parity && !runner->copies.empty())
        finish_copies(number);
    while ((of.phase & 1) == parity)
        wait_for(&of.phase, of.phase);
}

void emulated_copy_bulk(void *to, const void *from, unsigned bytes, unsigned long long *barrier)
{
    if (((uintptr_t)to | (uintptr_t)from | bytes) % 16 || bytes == 0)
        emulated_misuse("a bulk copy that is not of whole units of 16 bytes");
    want_shared(to, bytes);
    for (const struct bulk_copy &other : runner->copies) {
        if ((char *)to < (char *)other.to + other.bytes && (char *)other.to < (char *)to + bytes)
            emulated_misuse("two copies under way to the same place");
    }
    memset(to, UNWRITTEN, bytes);
    runner->copies.push_back({to, from, bytes, barrier_number(barrier)});
}

void emulated_copy16(void *to, const void *from, bool live)
{
    if (((uintptr_t)to | (live ? (uintptr_t)from : 0)) % 16)
        emulated_misuse("a copy of 16 bytes that is not aligned");
    want_shared(to, 16);
    memset(to, UNWRITTEN, 16);
    runner->current->copies.push_back({to, from, live, runner->current->groups});
}

void emulated_copy_commit()
{
    runner->current->groups++;
}

static void finish_copies_before(struct fiber *fiber, unsigned group)
{
    size_t done = 0;
    for (; done < fiber->copies.size() && fiber->copies[done].group < group; done++) {
        const struct copy16 &copy = fiber->copies[done];
        if (copy.live)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
    }
    fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + (ptrdiff_t)done);
}

void emulated_copy_wait(unsigned pending)
{
    struct fiber *fiber = runner->current;
    finish_copies_before(fiber, fiber->groups > pending ? fiber->groups - pending : 0);
}

// --- a block ---

// A thread that ends is waited for no longer.
static void end_fiber()
{
    struct fiber *fiber = runner->current;
    fiber->done = true;
    finish_copies_before(fiber, ~0u);
    fiber->warp->live--;
    runner->live--;
    if (fiber->warp->live > 0 && fiber->warp->come == fiber->warp->live)
        finish_meeting(fiber->warp);
    if (runner->live > 0 && runner->come == runner->live)
        finish_block_meeting();
    if (runner->cluster) {
        std::lock_guard<std::mutex> locked(runner->cluster->lock);
        runner->cluster->live--;
        if (runner->cluster->come > 0)
            pass_cluster(runner->cluster);
    }
}

static void fiber_main()
{
    for (;;) {
        runner->launch->kernel();
        end_fiber();
        leave_fiber();
    }
}

static void add_fiber()
{
    void *stack =
        mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) {
        perror("emulator: a fiber's stack");
        abort();
    }
    runner->stacks.push_back((unsigned char *)stack);
    runner->fibers.emplace_back();
    struct fiber &fiber = runner->fibers.back();
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = stack;
    fiber.begin.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.begin, fiber_main, 0);
}

static void set_up_block(uint32_t number)
{
    const struct emulated_launch &launch = *runner->launch;
    emulated_block_size = launch.block;
    emulated_grid_size = launch.grid;
    emulated_block_index = {number % launch.grid.x, number / launch.grid.x % launch.grid.y,
                            number / launch.grid.x / launch.grid.y};
    runner->n_threads = runner->live = launch.block.x * launch.block.y * launch.block.z;
    runner->come = 0;
    runner->yes = false;
    runner->barriers.clear();
    runner->copies.clear();
    runner->warps.assign((runner->n_threads + EMULATED_WARP - 1) / EMULATED_WARP, {});
    while (runner->fibers.size() < runner->n_threads)
        add_fiber();
    for (uint32_t i = 0; i < runner->n_threads; i++) {
        struct fiber &fiber = runner->fibers[i];
        fiber.done = false;
        fiber.word = NULL;
        fiber.index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                       i / launch.block.x / launch.block.y};
        fiber.lane = i % EMULATED_WARP;
        fiber.warp = &runner->warps[i / EMULATED_WARP];
        fiber.warp->live++;
        fiber.groups = 0;
    }
    memset(emulated_shared, UNWRITTEN, launch.shared);
    memset(emulated_shared + launch.shared, CANARY, CANARY_BYTES);
}

// Runs the warp's fibers that do not wait. Returns whether there were any.
static bool run_warp(uint32_t number)
{
    uint32_t first = number * EMULATED_WARP, end = first + EMULATED_WARP;
    bool moved = false;
    for (uint32_t i = first; i < end && i < runner->n_threads; i++) {
        struct fiber *fiber = &runner->fibers[i];
        if (fiber->done || (fiber->word && __atomic_load_n(fiber->word, __ATOMIC_ACQUIRE) == fiber->seen))
            continue;
        fiber->word = NULL;
        enter_fiber(fiber);
        moved = true;
    }
    return moved;
}

static void check_canary()
{
    for (size_t i = 0; i < CANARY_BYTES; i++) {
        if (emulated_shared[runner->launch->shared + i] != CANARY)
            emulated_misuse("the block wrote behind its shared memory");
    }
}

static void run_block(uint32_t number)
{
    time_t idle_since = 0;
    set_up_block(number);
    uint32_t n = (uint32_t)runner->warps.size(), start = number * 7 % n;
    bool backwards = number % 2;
    while (runner->live > 0) {
        bool moved = false;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t turn = (start + i) % n;
            while (run_warp(backwards ? n - 1 - turn : turn))
                moved = true;
        }
        if (moved || finish_copies(~(size_t)0)) {
            idle_since = 0;
            continue;
        }
        if (runner->live == 0)
            break;
        idle_since = idle_since ? idle_since : time(NULL);
        if (!runner->cluster || time(NULL) > idle_since + PATIENCE_S)
            emulated_misuse("all threads of the block wait for one another");
        sched_yield();
    }
    check_canary();
}

// --- a grid ---

namespace
{

struct grid {
    const struct emulated_launch *launch;
    uint32_t blocks;
    unsigned width; // threads of the processor
    std::atomic<uint32_t> next;
    struct cluster cluster;
    pthread_barrier_t between; // clusters
};

struct helpers {
    std::mutex lock;
    std::condition_variable work, done;
    struct grid *grid; // NULL: none
    uint64_t number;   // of grids so far
    unsigned running, count;
};

} // namespace

static struct helpers &pool = *new helpers; // never gone: helpers wait in it when the program ends
static std::mutex one_grid_at_a_time;

static void run_cluster_blocks(struct grid *grid, unsigned rank)
{
    struct cluster *cluster = &grid->cluster;
    cluster->anchors[rank] = &anchor;
    runner->cluster = cluster;
    runner->rank = rank;
    for (uint32_t first = 0; first < grid->blocks; first += grid->width) {
        pthread_barrier_wait(&grid->between);
        if (rank == 0) {
            const struct uint3 &block = grid->launch->block;
            cluster->come = 0;
            cluster->live = grid->width * block.x * block.y * block.z;
        }
        pthread_barrier_wait(&grid->between);
        run_block(first + rank);
    }
    pthread_barrier_wait(&grid->between);
    runner->cluster = NULL;
}

static void take_part(struct grid *grid, unsigned rank)
{
    make_runner();
    runner->launch = grid->launch;
    if (grid->launch->cluster > 1) {
        run_cluster_blocks(grid, rank);
        return;
    }
    runner->rank = 0;
    for (uint32_t number; (number = grid->next++) < grid->blocks;)
        run_block(number);
}

static void help(unsigned rank)
{
    uint64_t seen = 0;
    for (;;) {
        std::unique_lock<std::mutex> locked(pool.lock);
        pool.work.wait(locked, [&] { return pool.grid && pool.number != seen; });
        seen = pool.number;
        struct grid *grid = pool.grid;
        if (rank >= grid->width)
            continue;
        locked.unlock();
        take_part(grid, rank);
        locked.lock();
        if (--pool.running == 0)
            pool.done.notify_all();
    }
}

static void run_with_helpers(struct grid *grid)
{
    {
        std::lock_guard<std::mutex> locked(pool.lock);
        for (; pool.count + 1 < grid->width; pool.count++)
            std::thread(help, pool.count + 1).detach();
        pool.grid = grid;
        pool.number++;
        pool.running = grid->width - 1;
    }
    pool.work.notify_all();
    take_part(grid, 0);
    std::unique_lock<std::mutex> locked(pool.lock);
    pool.done.wait(locked, [] { return pool.running == 0; });
    pool.grid = NULL;
}

void emulated_run(const struct emulated_launch &launch)
{
    std::lock_guard<std::mutex> locked(one_grid_at_a_time);
    unsigned cores = std::thread::hardware_concurrency();
    struct grid grid = {};
    grid.launch = &launch;
    grid.blocks = launch.grid.x * launch.grid.y * launch.grid.z;
    grid.width = launch.cluster > 1    ? launch.cluster
                 : cores < grid.blocks ? cores
                 : grid.blocks < 1     ? 1
                                       : grid.blocks;
    pthread_barrier_init(&grid.between, NULL, grid.width);
    if (grid.width > 1)
        run_with_helpers(&grid);
    else
        take_part(&grid, 0);
    pthread_barrier_destroy(&grid.between);
}
