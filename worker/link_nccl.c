// Links over NCCL. Everything of a step is queued: a send copies the message aside on the device's stream and
// goes out on the link's own, a receive is waited for by the device's stream, never by the host.
//
// The receive is posted late, behind all that the device's stream has queued: a kernel that waits for its
// neighbour holds a multiprocessor, and one that waits while the stage computes would slow every kernel that
// counts on all of them. A message that comes early waits in NCCL's own buffers.
//
// Communicators do not block the host: what a call queues is on the stream only once the communicator is no
// longer in progress, so nothing is recorded behind it before (settle).
//
// The end is always ncclCommAbort, once: an epoch ends because something is wrong, and an orderly end would
// wait for the neighbour. It also waits for what this end has queued, which may wait for the other link of
// the stage, so each link has a guard, a thread that sleeps until the end and sees to it: two links end at
// once. Once a link is made, `calls` is held around every use of its communicator; only the guard ever makes
// the device's thread wait for it, so a lock that is taken means that the link is over.
#include "worker/link_nccl.h"

#include <cuda_runtime_api.h>
#include <errno.h>
#include <nccl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"
#include "kernels/kernels.h"

enum {
    RANK_SENDER = 0,
    RANK_RECEIVER = 1,
    MAX_ENDS = 2,           // of one stage
    MAX_EXPECTED = 256,     // messages received whose records have not come
    BUFFER_ALIGNMENT = 256, // bytes
    MEGABYTES_A_BLOCK = 12, // of NCCL's buffers, and as much again for the communicator
    SPIN_US = 1000,         // before a wait on the host turns to sleep
    PAUSE_US = 100,         // how long it then sleeps
    SETTLE_US = 60000000,   // a call in progress for so long is stuck
    END_US = 30000000,      // an abort that takes so long never ends
};

_Static_assert(LINK_NCCL_ID_BYTES == NCCL_UNIQUE_ID_BYTES, "an id is carried whole");

// What goes over the socket for each message; also the first message of every edge, over NCCL.
struct record {
    uint64_t number; // of the step; in the first message, the epoch
    uint64_t bytes;  // in the first message, the sender's stage
};

struct nccl_link {
    struct link base;
    struct device *device;
    struct link_connection control;
    struct link_nccl_shape shape;
    bool sender;
    int cuda_device;
    cudaStream_t compute, stream; // the device's and our own
    cudaEvent_t queued;           // all that the device's stream had when a message was queued
    cudaEvent_t *done;            // [depth] of a sender: buffer i is free; [1] of a receiver: it is there
    uint32_t n_done;
    unsigned char *buffers; // [depth] messages of a sender [device], `stride` bytes each
    size_t stride;
    uint64_t count; // messages queued
    struct record expected[MAX_EXPECTED], coming;
    uint64_t n_checked; // of `count`: those whose records came
    size_t coming_bytes;

    pthread_mutex_t calls;
    ncclComm_t comm;
    atomic_bool aborted;

    pthread_t guard;
    bool guarded;
    pthread_mutex_t mutex; // over `ended`, and the wait for `aborted`
    pthread_cond_t changed;
    bool ended;
};

// --- failures ---

static int over(struct error *error)
{
    return error_set(error, STATUS_CANCELLED, "the link was closed because its epoch is over");
}

static int gone(const struct nccl_link *link, const char *why, struct error *error)
{
    if (atomic_load(&link->aborted))
        return over(error);
    return error_set(error, STATUS_UNAVAILABLE, "stage %u is gone: %s", link->control.peer, why);
}

static int nccl_failed(const struct nccl_link *link, ncclResult_t result, struct error *error)
{
    if (atomic_load(&link->aborted))
        return over(error);
    const char *detail = ncclGetLastError(link->comm);
    return error_set(error, STATUS_UNAVAILABLE, "the link %s stage %u failed: %s (%s)",
                     link->sender ? "to" : "from", link->control.peer, ncclGetErrorString(result),
                     detail && *detail ? detail : "NCCL says no more");
}

static int cuda_result(const struct nccl_link *link, cudaError_t code, struct error *error)
{
    if (code == cudaSuccess)
        return STATUS_OK;
    return error_set(error, STATUS_IO, "CUDA failed in the link %s stage %u: %s",
                     link->sender ? "to" : "from", link->control.peer, cudaGetErrorString(code));
}

// --- waiting on the host, as little as NCCL allows ---

struct patience {
    int64_t since_us, until_us;
    const volatile int *cancel; // may be NULL
};

static struct patience patience_of(int64_t us, const volatile int *cancel)
{
    int64_t now = clock_now_us();
    return (struct patience){now, now + us, cancel};
}

static bool has_hung_up(const struct nccl_link *link)
{
    struct pollfd watched = {.fd = link->control.fd, .events = POLLRDHUP};
    return poll(&watched, 1, 0) == 1 && (watched.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL));
}

// A turn of a loop that waits for NCCL or the neighbour. Not OK: there is nothing left to wait for.
static int wait_a_turn(const struct nccl_link *link, const struct patience *patience, struct error *error)
{
    int64_t now = clock_now_us();
    if (atomic_load(&link->aborted))
        return over(error);
    if (patience->cancel && __atomic_load_n(patience->cancel, __ATOMIC_ACQUIRE))
        return error_set(error, STATUS_CANCELLED, "linking was given up because its epoch is over");
    if (now > patience->until_us)
        return error_set(error, STATUS_DEADLINE, "the link %s stage %u was not ready in %lld ms",
                         link->sender ? "to" : "from", link->control.peer,
                         (long long)(patience->until_us - patience->since_us) / 1000);
    if (now - patience->since_us < SPIN_US) {
        sched_yield();
        return STATUS_OK;
    }
    if (has_hung_up(link))
        return gone(link, "it closed the link", error);
    clock_sleep_us(PAUSE_US);
    return STATUS_OK;
}

// Until the communicator is no longer in progress, beginning with what a call returned.
static int settle(const struct nccl_link *link, ncclResult_t result, const struct patience *patience,
                  struct error *error)
{
    int status = STATUS_OK;
    while (result == ncclInProgress && !status) {
        ncclResult_t asked = ncclCommGetAsyncError(link->comm, &result);
        if (asked != ncclSuccess)
            return nccl_failed(link, asked, error);
        if (result == ncclInProgress)
            status = wait_a_turn(link, patience, error);
    }
    if (!status && result != ncclSuccess)
        return nccl_failed(link, result, error);
    return status;
}

// --- records beside the messages ---

static int tell(struct nccl_link *link, uint64_t number, size_t bytes, struct error *error)
{
    struct record record = {number, bytes};
    ssize_t sent = send(link->control.fd, &record, sizeof(record), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent == (ssize_t)sizeof(record))
        return STATUS_OK;
    return gone(link, sent < 0 && errno != EAGAIN ? strerror(errno) : "it does not read what it is sent",
                error);
}

static int compare(const struct nccl_link *link, const struct record *said, const struct record *expected,
                   struct error *error)
{
    if (said->number == expected->number && said->bytes == expected->bytes)
        return STATUS_OK;
    return error_set(error, STATUS_CORRUPT,
                     "stage %u sent %llu bytes for step %llu, expected %llu bytes for step %llu",
                     link->control.peer, (unsigned long long)said->bytes, (unsigned long long)said->number,
                     (unsigned long long)expected->bytes, (unsigned long long)expected->number);
}

// Holds what the sender said against what was received, as far as it came.
static int read_records(struct nccl_link *link, struct error *error)
{
    while (link->n_checked < link->count) {
        size_t have = link->coming_bytes;
        ssize_t got =
            recv(link->control.fd, (char *)&link->coming + have, sizeof(link->coming) - have, MSG_DONTWAIT);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return STATUS_OK;
        if (got <= 0)
            return gone(link, got == 0 ? "it closed the link" : strerror(errno), error);
        link->coming_bytes += (size_t)got;
        if (link->coming_bytes < sizeof(link->coming))
            continue;
        link->coming_bytes = 0;
        int status = compare(link, &link->coming, &link->expected[link->n_checked++ % MAX_EXPECTED], error);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// --- messages ---

// OK: `calls` is held.
static int enter(struct nccl_link *link, size_t bytes, struct error *error)
{
    if (bytes > link->shape.message_bytes)
        return error_set(error, STATUS_INTERNAL, "a message of %zu bytes on a link made for %zu", bytes,
                         link->shape.message_bytes);
    if (atomic_load(&link->aborted) || pthread_mutex_trylock(&link->calls))
        return over(error);
    if (link->comm)
        return STATUS_OK;
    pthread_mutex_unlock(&link->calls);
    return over(error);
}

// The link's stream goes on when the device's has come to here.
static cudaError_t follow_compute(struct nccl_link *link)
{
    cudaError_t code = cudaEventRecord(link->queued, link->compute);
    return code ? code : cudaStreamWaitEvent(link->stream, link->queued, 0);
}

static int queue_send(struct nccl_link *link, uint64_t number, const void *data, size_t bytes,
                      struct error *error)
{
    uint32_t at = (uint32_t)(link->count++ % link->shape.depth);
    void *buffer = link->buffers + at * link->stride;
    int status = tell(link, number, bytes, error);
    if (status)
        return status;
    cudaError_t code = cudaStreamWaitEvent(link->compute, link->done[at], 0);
    if (!code)
        code = cudaMemcpyAsync(buffer, data, bytes, cudaMemcpyDeviceToDevice, link->compute);
    if (!code)
        code = follow_compute(link);
    if (code)
        return cuda_result(link, code, error);
    struct patience patience = patience_of(SETTLE_US, NULL);
    ncclResult_t result = ncclSend(buffer, bytes, ncclChar, RANK_RECEIVER, link->comm, link->stream);
    status = settle(link, result, &patience, error);
    return status ? status : cuda_result(link, cudaEventRecord(link->done[at], link->stream), error);
}

static int nccl_send(struct link *base, uint64_t number, const void *data, size_t bytes, struct error *error)
{
    struct nccl_link *link = (struct nccl_link *)base;
    int status = enter(link, bytes, error);
    if (status)
        return status;
    status = queue_send(link, number, data, bytes, error);
    pthread_mutex_unlock(&link->calls);
    return status;
}

static int queue_receive(struct nccl_link *link, uint64_t number, void *data, size_t bytes,
                         struct error *error)
{
    if (link->count - link->n_checked == MAX_EXPECTED)
        return error_set(error, STATUS_INTERNAL, "%d messages are under way from stage %u", MAX_EXPECTED,
                         link->control.peer);
    link->expected[link->count++ % MAX_EXPECTED] = (struct record){number, bytes};
    int status = read_records(link, error);
    if (!status)
        status = cuda_result(link, follow_compute(link), error);
    if (status)
        return status;
    struct patience patience = patience_of(SETTLE_US, NULL);
    ncclResult_t result = ncclRecv(data, bytes, ncclChar, RANK_SENDER, link->comm, link->stream);
    status = settle(link, result, &patience, error);
    if (status)
        return status;
    cudaError_t code = cudaEventRecord(link->done[0], link->stream);
    return cuda_result(link, code ? code : cudaStreamWaitEvent(link->compute, link->done[0], 0), error);
}

static int nccl_receive(struct link *base, uint64_t number, void *data, size_t bytes, struct error *error)
{
    struct nccl_link *link = (struct nccl_link *)base;
    int status = enter(link, bytes, error);
    if (status)
        return status;
    status = queue_receive(link, number, data, bytes, error);
    pthread_mutex_unlock(&link->calls);
    return status;
}

static int nccl_check(struct link *base, struct error *error)
{
    struct nccl_link *link = (struct nccl_link *)base;
    int status = enter(link, 0, error);
    if (status)
        return status;
    ncclResult_t result, asked = ncclCommGetAsyncError(link->comm, &result);
    if (has_hung_up(link))
        status = gone(link, "it closed the link", error);
    else if (asked != ncclSuccess || (result != ncclSuccess && result != ncclInProgress))
        status = nccl_failed(link, asked != ncclSuccess ? asked : result, error);
    else if (!link->sender)
        status = read_records(link, error);
    pthread_mutex_unlock(&link->calls);
    return status;
}

// --- the end ---

static void *guard_link(void *argument)
{
    struct nccl_link *link = argument;
    pthread_mutex_lock(&link->mutex);
    while (!atomic_load(&link->aborted))
        pthread_cond_wait(&link->changed, &link->mutex);
    pthread_mutex_unlock(&link->mutex);
    pthread_mutex_lock(&link->calls);
    cudaSetDevice(link->cuda_device);
    ncclResult_t result = link->comm ? ncclCommAbort(link->comm) : ncclSuccess;
    if (result != ncclSuccess)
        log_warn("a link to stage %u did not end well: %s", link->control.peer, ncclGetErrorString(result));
    link->comm = NULL;
    pthread_mutex_unlock(&link->calls);
    pthread_mutex_lock(&link->mutex);
    link->ended = true;
    pthread_cond_broadcast(&link->changed);
    pthread_mutex_unlock(&link->mutex);
    return NULL;
}

static void nccl_abort(struct link *base)
{
    struct nccl_link *link = (struct nccl_link *)base;
    if (atomic_exchange(&link->aborted, true))
        return;
    shutdown(link->control.fd, SHUT_RDWR); // so that the neighbour knows at once
    pthread_mutex_lock(&link->mutex);
    pthread_cond_broadcast(&link->changed);
    pthread_mutex_unlock(&link->mutex);
}

// A communicator that does not end holds the device's stream for ever: only a new process can go on.
static void await_end(struct nccl_link *link)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += END_US / 1000000;
    int code = 0;
    pthread_mutex_lock(&link->mutex);
    while (!link->ended && code != ETIMEDOUT)
        code = pthread_cond_timedwait(&link->changed, &link->mutex, &until);
    bool ended = link->ended;
    pthread_mutex_unlock(&link->mutex);
    if (!ended) {
        log_error("the link with stage %u cannot be ended: this process gives up its device",
                  link->control.peer);
        _exit(EXIT_FAILURE);
    }
    pthread_join(link->guard, NULL);
}

static void nccl_close(struct link *base)
{
    if (!base)
        return;
    struct nccl_link *link = (struct nccl_link *)base;
    nccl_abort(base);
    if (link->guarded)
        await_end(link);
    if (link->stream)
        cudaStreamDestroy(link->stream);
    if (link->queued)
        cudaEventDestroy(link->queued);
    for (uint32_t i = 0; i < link->n_done; i++)
        cudaEventDestroy(link->done[i]);
    if (link->buffers)
        device_ops(link->device)->free(link->device, link->buffers);
    close(link->control.fd);
    pthread_cond_destroy(&link->changed);
    pthread_mutex_destroy(&link->mutex);
    pthread_mutex_destroy(&link->calls);
    free(link->done);
    free(link);
}

static const struct link_ops NCCL_OPS = {nccl_send, nccl_receive, nccl_check, nccl_abort, nccl_close};

// --- making the links of an epoch ---

uint32_t link_nccl_version(const struct device *device)
{
    int version;
    if (!device_stream(device) || ncclGetVersion(&version) != ncclSuccess)
        return 0;
    return (uint32_t)version;
}

void link_nccl_device_name(const struct device *device, char *out, size_t capacity)
{
    int index;
    struct cudaDeviceProp properties;
    out[0] = '\0';
    if (cudaStreamGetDevice(device_stream(device), &index) || cudaGetDeviceProperties(&properties, index))
        return;
    size_t used = (size_t)snprintf(out, capacity, "GPU-");
    for (size_t i = 0; i < sizeof(properties.uuid.bytes) && used + 3 <= capacity; i++)
        used += (size_t)snprintf(out + used, capacity - used, "%02x",
                                 (unsigned)(unsigned char)properties.uuid.bytes[i]);
}

int link_nccl_make_id(unsigned char id[LINK_NCCL_ID_BYTES], struct error *error)
{
    ncclUniqueId made;
    ncclResult_t result = ncclGetUniqueId(&made);
    if (result != ncclSuccess)
        return error_set(error, STATUS_UNAVAILABLE, "NCCL cannot start here: %s (%s)",
                         ncclGetErrorString(result), ncclGetLastError(NULL));
    memcpy(id, made.internal, LINK_NCCL_ID_BYTES);
    return STATUS_OK;
}

// One message, in whole units of alignment; also room for the first one.
static size_t stride_of(const struct link_nccl_shape *shape)
{
    size_t bytes = shape->message_bytes ? shape->message_bytes : 1;
    return (bytes + BUFFER_ALIGNMENT - 1) / BUFFER_ALIGNMENT * BUFFER_ALIGNMENT;
}

// The receiver needs room for the first message only: later ones go where they are wanted.
static size_t buffer_bytes(const struct link_nccl_shape *shape, bool sender)
{
    return sender ? shape->depth * stride_of(shape) : BUFFER_ALIGNMENT;
}

uint64_t link_nccl_plan_bytes(const struct link_nccl_shape *shape, bool sender)
{
    return buffer_bytes(shape, sender) + ((uint64_t)(shape->blocks + 1) * MEGABYTES_A_BLOCK << 20);
}

static int make_parts(struct nccl_link *link, struct error *error)
{
    int least, greatest;
    uint32_t n = link->sender ? link->shape.depth : 1;
    link->stride = stride_of(&link->shape);
    link->done = calloc(n, sizeof(*link->done));
    if (!link->done)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a link");
    link->buffers = device_ops(link->device)->alloc(link->device, buffer_bytes(&link->shape, link->sender));
    if (!link->buffers)
        return error_set(error, STATUS_NO_MEMORY, "no device memory for a link's %zu bytes",
                         buffer_bytes(&link->shape, link->sender));
    cudaError_t code = cudaDeviceGetStreamPriorityRange(&least, &greatest);
    if (!code)
        code = cudaStreamCreateWithPriority(&link->stream, cudaStreamNonBlocking, greatest);
    if (!code)
        code = cudaEventCreateWithFlags(&link->queued, cudaEventDisableTiming);
    for (; !code && link->n_done < n; link->n_done += !code)
        code = cudaEventCreateWithFlags(&link->done[link->n_done], cudaEventDisableTiming);
    if (!code)
        code = follow_compute(link); // fresh memory may still be waiting to be zeroed
    return cuda_result(link, code, error);
}

// A fresh link over the connection of *end->link, which is NULL then. Its communicator is being made.
static int begin_link(struct nccl_link **out, struct device *device, struct link_nccl_end *end,
                      int cuda_device, struct error *error)
{
    struct nccl_link *link = calloc(1, sizeof(*link));
    if (!link)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a link");
    *out = link;
    link->base = (struct link){.ops = &NCCL_OPS, .on_device = true};
    link->device = device;
    link->cuda_device = cuda_device;
    link->compute = device_stream(device);
    link->shape = end->shape;
    link->sender = end->sender;
    link->control = link_socket_release(*end->link);
    *end->link = NULL;
    pthread_mutex_init(&link->calls, NULL);
    pthread_mutex_init(&link->mutex, NULL);
    pthread_cond_init(&link->changed, NULL);
    int status = make_parts(link, error);
    if (status)
        return status;
    link->guarded = pthread_create(&link->guard, NULL, guard_link, link) == 0;
    if (!link->guarded)
        return error_set(error, STATUS_IO, "cannot start a link's thread");
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.minCTAs = 1;
    config.maxCTAs = (int)end->shape.blocks;
    ncclUniqueId id;
    memcpy(id.internal, end->id, sizeof(id.internal));
    ncclResult_t result =
        ncclCommInitRankConfig(&link->comm, 2, id, link->sender ? RANK_SENDER : RANK_RECEIVER, &config);
    return result == ncclSuccess || result == ncclInProgress ? STATUS_OK : nccl_failed(link, result, error);
}

// Queues the first message of every link. As one group, so that no kernel of one link waits while another
// link is still setting itself up, which may need the whole device for a moment.
static int queue_greetings(struct nccl_link *const *links, uint32_t n, const struct patience *patience,
                           struct error *error)
{
    ncclResult_t result = ncclGroupStart();
    for (uint32_t i = 0; i < n && result == ncclSuccess; i++) {
        struct nccl_link *link = links[i];
        result = link->sender ? ncclSend(link->buffers, sizeof(struct record), ncclChar, RANK_RECEIVER,
                                         link->comm, link->stream)
                              : ncclRecv(link->buffers, sizeof(struct record), ncclChar, RANK_SENDER,
                                         link->comm, link->stream);
    }
    ncclResult_t ended = ncclGroupEnd();
    result = result == ncclSuccess ? ended : result;
    int status = STATUS_OK;
    for (uint32_t i = 0; i < n && !status; i++)
        status = settle(links[i], result, patience, error);
    for (uint32_t i = 0; i < n && !status; i++)
        status = cuda_result(links[i], cudaEventRecord(links[i]->queued, links[i]->stream), error);
    return status;
}

static int write_greeting(struct nccl_link *link, struct error *error)
{
    struct record greeting = {link->control.epoch, link->control.stage};
    if (!link->sender)
        return STATUS_OK;
    cudaError_t code =
        cudaMemcpyAsync(link->buffers, &greeting, sizeof(greeting), cudaMemcpyHostToDevice, link->stream);
    return cuda_result(link, code ? code : cudaStreamSynchronize(link->stream), error);
}

static int read_greeting(struct nccl_link *link, const struct patience *patience, struct error *error)
{
    struct record greeting;
    cudaError_t code;
    int status = STATUS_OK;
    while ((code = cudaEventQuery(link->queued)) == cudaErrorNotReady && !status)
        status = wait_a_turn(link, patience, error);
    if (status || code || link->sender)
        return status ? status : cuda_result(link, code, error);
    code = cudaMemcpyAsync(&greeting, link->buffers, sizeof(greeting), cudaMemcpyDeviceToHost, link->stream);
    status = cuda_result(link, code ? code : cudaStreamSynchronize(link->stream), error);
    if (!status && (greeting.number != link->control.epoch || greeting.bytes != link->control.peer))
        return error_set(error, STATUS_CORRUPT, "stage %u did not greet as one of epoch %llu",
                         link->control.peer, (unsigned long long)link->control.epoch);
    return status;
}

static int finish_links(struct nccl_link *const *links, uint32_t n, const struct patience *patience,
                        struct error *error)
{
    int status = STATUS_OK;
    for (uint32_t i = 0; i < n && !status; i++)
        status = settle(links[i], ncclInProgress, patience, error);
    for (uint32_t i = 0; i < n && !status; i++)
        status = write_greeting(links[i], error);
    if (!status)
        status = queue_greetings(links, n, patience, error);
    for (uint32_t i = 0; i < n && !status; i++)
        status = read_greeting(links[i], patience, error);
    return status;
}

static void drop_links(struct nccl_link *const *links, struct link_nccl_end *ends, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (links[i])
            nccl_abort(&links[i]->base);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (links[i])
            nccl_close(&links[i]->base);
        if (*ends[i].link)
            (*ends[i].link)->ops->close(*ends[i].link);
        *ends[i].link = NULL;
    }
}

int link_nccl_connect(struct device *device, struct link_nccl_end *ends, uint32_t n_ends, int64_t timeout_us,
                      const volatile int *cancel, struct error *error)
{
    struct nccl_link *links[MAX_ENDS] = {NULL};
    struct patience patience = patience_of(timeout_us, cancel);
    int cuda_device, status = STATUS_OK;
    if (n_ends > MAX_ENDS || cudaStreamGetDevice(device_stream(device), &cuda_device) ||
        cudaSetDevice(cuda_device))
        status = error_set(error, STATUS_INTERNAL, "%u links cannot be made on this device", n_ends);
    for (uint32_t i = 0; i < n_ends && !status; i++)
        status = begin_link(&links[i], device, &ends[i], cuda_device, error);
    if (!status)
        status = finish_links(links, n_ends, &patience, error);
    if (status) {
        drop_links(links, ends, n_ends < MAX_ENDS ? n_ends : MAX_ENDS);
        return status;
    }
    for (uint32_t i = 0; i < n_ends; i++)
        *ends[i].link = &links[i]->base;
    return STATUS_OK;
}
