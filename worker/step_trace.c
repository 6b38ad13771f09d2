// The trace's file. The device's thread puts steps into one of two lists, a thread of its own writes the
// other one, a few times a second: whoever computes meets neither the file nor a system call that wakes
// somebody up, but when an epoch ends or the list is half full. `mutex` is over the lists; descriptor and
// text are the writer's.
#include "worker/step_trace.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"

enum {
    STEPS = 8192, // in a list
    INTERVAL_US = 200000,
    EVENT_BYTES = 256, // at most
    STEP_EVENTS = 3,   // at most
    TEXT_BYTES = 65536,
    NAME_BYTES = 128,
};

struct traced {
    struct step_times times;
    uint64_t epoch;
    uint32_t stage;
};

struct step_trace {
    int fd;
    long pid;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct traced *steps; // [STEPS], of the device's thread
    uint32_t n_steps;
    uint64_t n_dropped;
    bool hurry, ending;
    // The writer's.
    struct traced *writing; // [STEPS]
    char text[TEXT_BYTES];
    size_t length;
    bool failed;
};

// --- the writer ---

static void write_text(struct step_trace *trace)
{
    for (size_t done = 0; done < trace->length && !trace->failed;) {
        ssize_t wrote = write(trace->fd, trace->text + done, trace->length - done);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote < 0) {
            trace->failed = true;
            log_warn("the trace ends here, its file cannot be written: %s", strerror(errno));
            break;
        }
        done += (size_t)wrote;
    }
    trace->length = 0;
}

static void write_span(struct step_trace *trace, const struct traced *step, const char *name,
                       int64_t begin_us, int64_t end_us)
{
    const struct step_times *times = &step->times;
    int length = snprintf(trace->text + trace->length, EVENT_BYTES,
                          ",\n{\"name\":\"%s\",\"ph\":\"X\",\"ts\":%" PRId64 ",\"dur\":%" PRId64
                          ",\"pid\":%ld,\"tid\":0,\"args\":{\"step\":%" PRIu64
                          ",\"rows\":%u,\"positions\":%u,\"epoch\":%" PRIu64 ",\"stage\":%u}}",
                          name, begin_us, end_us - begin_us, trace->pid, times->number, times->rows,
                          times->positions, step->epoch, step->stage);
    trace->length += length > 0 && length < EVENT_BYTES ? (size_t)length : 0;
}

// Steps that only open, close and copy have no span but a wait.
static void write_step(struct step_trace *trace, const struct traced *step)
{
    const struct step_times *times = &step->times;
    if (trace->length + STEP_EVENTS * EVENT_BYTES > TEXT_BYTES)
        write_text(trace);
    if (times->ready_us > times->asks_us)
        write_span(trace, step, "wait", times->asks_us, times->ready_us);
    if (times->positions > 0)
        write_span(trace, step, "compute", times->starts_us, times->computed_us);
    if (times->sent_us > times->computed_us)
        write_span(trace, step, "send", times->computed_us, times->sent_us);
}

// Waits for something to write; takes the list. False: there will be no more.
static bool take_steps(struct step_trace *trace, uint32_t *count, uint64_t *dropped)
{
    int64_t at_us = clock_now_us() + INTERVAL_US;
    struct timespec at = {.tv_sec = at_us / 1000000, .tv_nsec = at_us % 1000000 * 1000};
    int code = 0;
    pthread_mutex_lock(&trace->mutex);
    while (!trace->hurry && !trace->ending && code == 0)
        code = pthread_cond_timedwait(&trace->changed, &trace->mutex, &at);
    bool more = !trace->ending;
    struct traced *taken = trace->steps;
    trace->steps = trace->writing;
    trace->writing = taken;
    *count = trace->n_steps;
    *dropped = trace->n_dropped;
    trace->n_steps = 0;
    trace->n_dropped = 0;
    trace->hurry = false;
    pthread_mutex_unlock(&trace->mutex);
    return more;
}

static void *write_steps(void *argument)
{
    struct step_trace *trace = argument;
    bool more = true;
    while (more) {
        uint32_t count;
        uint64_t dropped;
        more = take_steps(trace, &count, &dropped);
        for (uint32_t i = 0; i < count; i++)
            write_step(trace, &trace->writing[i]);
        if (dropped)
            log_warn("the trace lacks %" PRIu64 " steps: its file is too slow", dropped);
        if (!more)
            trace->length += (size_t)snprintf(trace->text + trace->length, EVENT_BYTES, "\n]\n");
        write_text(trace);
    }
    return NULL;
}

// --- start and end ---

// The name of the process, the first event; what would need escaping in a name has no place in it.
static void begin_text(struct step_trace *trace, const char *worker)
{
    char name[NAME_BYTES];
    snprintf(name, sizeof(name), "%s", worker);
    for (char *c = name; *c; c++) {
        if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ')
            *c = '_';
    }
    trace->length = (size_t)snprintf(
        trace->text, EVENT_BYTES,
        "[\n{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":%ld,\"tid\":0,\"args\":{\"name\":\"%s\"}}",
        trace->pid, name);
    write_text(trace);
}

static void free_trace(struct step_trace *trace)
{
    if (trace->fd >= 0)
        close(trace->fd);
    pthread_cond_destroy(&trace->changed);
    pthread_mutex_destroy(&trace->mutex);
    free(trace->steps);
    free(trace->writing);
    free(trace);
}

int step_trace_open(struct step_trace **out, const char *path, const char *worker, struct error *error)
{
    struct step_trace *trace = calloc(1, sizeof(*trace));
    if (!trace)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a trace");
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&trace->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&trace->mutex, NULL);
    trace->pid = (long)getpid();
    trace->steps = calloc(STEPS, sizeof(*trace->steps));
    trace->writing = calloc(STEPS, sizeof(*trace->writing));
    trace->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    int status = STATUS_OK;
    if (!trace->steps || !trace->writing)
        status = error_set(error, STATUS_NO_MEMORY, "no memory for a trace");
    else if (trace->fd < 0)
        status = error_set(error, STATUS_INVALID, "--trace: %s cannot be written: %s", path, strerror(errno));
    if (!status) {
        begin_text(trace, worker);
        if (pthread_create(&trace->thread, NULL, write_steps, trace))
            status = error_set(error, STATUS_IO, "cannot start the trace's thread");
    }
    if (status) {
        free_trace(trace);
        return status;
    }
    *out = trace;
    return STATUS_OK;
}

void step_trace_close(struct step_trace *trace)
{
    if (!trace)
        return;
    pthread_mutex_lock(&trace->mutex);
    trace->ending = true;
    pthread_cond_signal(&trace->changed);
    pthread_mutex_unlock(&trace->mutex);
    pthread_join(trace->thread, NULL);
    free_trace(trace);
}

// --- the device's thread ---

void step_trace_add(struct step_trace *trace, const struct step_times *times, uint64_t epoch, uint32_t stage)
{
    if (!trace)
        return;
    pthread_mutex_lock(&trace->mutex);
    if (trace->n_steps < STEPS)
        trace->steps[trace->n_steps++] = (struct traced){*times, epoch, stage};
    else
        trace->n_dropped++;
    if (trace->n_steps == STEPS / 2) {
        trace->hurry = true;
        pthread_cond_signal(&trace->changed);
    }
    pthread_mutex_unlock(&trace->mutex);
}

void step_trace_flush(struct step_trace *trace)
{
    if (!trace)
        return;
    pthread_mutex_lock(&trace->mutex);
    trace->hurry = true;
    pthread_cond_signal(&trace->changed);
    pthread_mutex_unlock(&trace->mutex);
}
