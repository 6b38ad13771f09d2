// The compute threads of a CPU device: they run the tasks of one parallel region at a time.
//
// A decode step is hundreds of regions of a few microseconds, so handing one out must cost less than a system
// call: waiting threads watch one word for a short while before they sleep on a futex. They also give way
// (sched_yield) while they watch, because several workers may share the cores. A region needs nobody: tasks
// are claimed one by one, and whoever is asleep or descheduled is not waited for unless it holds a task.
//
// `state` holds the region's number (high half) and how many tasks are unclaimed (low half). A claim is a
// compare-and-swap on both, so a thread that slept through a region cannot claim a task of a later one with
// the former's body: the swap fails and it reads the job again. The job's fields are atomics because such a
// thread may read them while they change; what it read is used only if the swap succeeds, and then a task was
// unclaimed all along, the region unfinished, and the fields as they were. (Counting tasks up to a limit that
// is a field of the job would not do: between two regions the new limit would open the old one again.)
//
// Threads: `cpu_parallel` belongs to the executor's thread; the pool's threads run pool_thread.
#include "kernels/cpu/cpu_internal.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    SPIN_PAUSES = 200, // watching without giving way: about 10 us
    SPIN_YIELDS = 40   // then between yields, of SPIN_BURST pauses each: about 20 us more
};
enum { SPIN_BURST = 10 };

typedef void task_body(void *args, uint32_t task, uint32_t worker);

struct pool_thread {
    struct cpu_pool *pool;
    pthread_t id;
    uint32_t worker;
};

struct cpu_pool {
    _Alignas(64) _Atomic uint64_t state; // region << 32 | unclaimed tasks
    _Atomic(task_body *) body;
    _Atomic(void *) args;
    _Atomic uint32_t n_tasks;
    _Alignas(64) _Atomic uint32_t done; // tasks of this region that are finished
    _Atomic uint32_t caller_sleeps;
    _Alignas(64) _Atomic uint32_t wake; // what sleeping threads sleep on: the region's number
    _Atomic uint32_t sleepers;
    _Atomic bool stop;
    uint32_t n_threads; // beside the caller
    struct pool_thread threads[CPU_MAX_THREADS];
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int count)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static inline void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// One moment of watching; false when it has lasted long enough to sleep.
static bool spin(uint32_t *turns)
{
    if (*turns < SPIN_PAUSES) {
        pause_cpu();
    } else {
        if (*turns >= SPIN_PAUSES + SPIN_YIELDS)
            return false;
        for (int i = 0; i < SPIN_BURST; i++)
            pause_cpu();
        sched_yield();
    }
    ++*turns;
    return true;
}

// Claims and runs tasks until none is left. What was finished is reported once, at the end: until then the
// region is open and n_tasks its own.
static void run_tasks(struct cpu_pool *pool, uint32_t worker)
{
    uint32_t finished = 0;
    uint64_t state = atomic_load(&pool->state);
    while ((uint32_t)state) {
        task_body *body = atomic_load_explicit(&pool->body, memory_order_relaxed);
        void *args = atomic_load_explicit(&pool->args, memory_order_relaxed);
        uint32_t n_tasks = atomic_load_explicit(&pool->n_tasks, memory_order_relaxed);
        if (!atomic_compare_exchange_weak(&pool->state, &state, state - 1))
            continue;
        body(args, n_tasks - (uint32_t)state, worker);
        finished++;
        state = atomic_load(&pool->state);
    }
    if (!finished)
        return;
    uint32_t n_tasks = atomic_load_explicit(&pool->n_tasks, memory_order_relaxed);
    uint32_t done = atomic_fetch_add(&pool->done, finished) + finished;
    if (done == n_tasks && worker && atomic_load(&pool->caller_sleeps))
        futex_wake(&pool->done, 1);
}

static void *pool_thread(void *argument)
{
    struct pool_thread *self = argument;
    struct cpu_pool *pool = self->pool;
    uint32_t seen = 0, turns = 0;
    while (!atomic_load_explicit(&pool->stop, memory_order_relaxed)) {
        uint32_t region = (uint32_t)(atomic_load_explicit(&pool->state, memory_order_acquire) >> 32);
        if (region != seen) {
            seen = region;
            run_tasks(pool, self->worker);
            turns = 0;
        } else if (!spin(&turns)) {
            // Either this thread sees the new region in `wake`, or the caller sees the sleeper.
            atomic_fetch_add(&pool->sleepers, 1);
            if (atomic_load(&pool->wake) == seen && !atomic_load(&pool->stop))
                futex_wait(&pool->wake, seen);
            atomic_fetch_sub(&pool->sleepers, 1);
            turns = 0;
        }
    }
    return NULL;
}

static void wait_done(struct cpu_pool *pool, uint32_t n_tasks)
{
    uint32_t turns = 0, done;
    while ((done = atomic_load_explicit(&pool->done, memory_order_acquire)) != n_tasks) {
        if (spin(&turns))
            continue;
        atomic_store(&pool->caller_sleeps, 1);
        done = atomic_load(&pool->done);
        if (done != n_tasks)
            futex_wait(&pool->done, done);
        atomic_store(&pool->caller_sleeps, 0);
    }
}

void cpu_parallel(struct cpu_device *device, task_body *body, void *args, uint32_t n_tasks)
{
    struct cpu_pool *pool = device->pool;
    if (n_tasks <= 1 || pool->n_threads == 0) {
        for (uint32_t task = 0; task < n_tasks; task++)
            body(args, task, 0);
        return;
    }
    atomic_store_explicit(&pool->body, body, memory_order_relaxed);
    atomic_store_explicit(&pool->args, args, memory_order_relaxed);
    atomic_store_explicit(&pool->n_tasks, n_tasks, memory_order_relaxed);
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    uint32_t region = (uint32_t)(atomic_load_explicit(&pool->state, memory_order_relaxed) >> 32) + 1;
    atomic_store(&pool->state, (uint64_t)region << 32 | n_tasks);
    atomic_store(&pool->wake, region);
    if (atomic_load(&pool->sleepers))
        futex_wake(&pool->wake, (int)n_tasks - 1);
    run_tasks(pool, 0);
    wait_done(pool, n_tasks);
}

int cpu_pool_open(struct cpu_pool **out, uint32_t threads, struct error *error)
{
    struct cpu_pool *pool = aligned_alloc(64, sizeof(*pool));
    if (!pool)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a pool of %u compute threads", threads);
    memset(pool, 0, sizeof(*pool));
    for (uint32_t i = 1; i < threads; i++) {
        struct pool_thread *thread = &pool->threads[pool->n_threads];
        thread->pool = pool;
        thread->worker = i;
        int failed = pthread_create(&thread->id, NULL, pool_thread, thread);
        if (failed) {
            cpu_pool_close(pool);
            return error_set(error, STATUS_IO, "cannot start compute thread %u of %u: %s", i + 1, threads,
                             strerror(failed));
        }
        pool->n_threads++;
    }
    *out = pool;
    return 0;
}

void cpu_pool_close(struct cpu_pool *pool)
{
    if (!pool)
        return;
    atomic_store(&pool->stop, true);
    atomic_fetch_add(&pool->wake, 1);
    futex_wake(&pool->wake, CPU_MAX_THREADS);
    for (uint32_t i = 0; i < pool->n_threads; i++)
        pthread_join(pool->threads[i].id, NULL);
    free(pool);
}
