// Links over stream sockets, TCP or unix: for CPU workers, and between two that have no NCCL in common. A
// connection opens with a hello from each end (magic, epoch, stage, number of stages); after that every frame
// is a header and its payload, little-endian. Whoever waits is asleep in the kernel: several workers may
// share two cores.
//
// A link belongs to the executor's thread. link_abort only sets a flag and shuts the socket down, which wakes
// a sleeping call; the caller keeps it from racing with close.
#include "worker/link.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common/clock.h"
#include "worker/link_address.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "frames and residuals are little-endian as they are");

enum {
    FRAME_MAGIC = 0x4b4e4c53, // "SLNK"
    FRAME_VERSION = 1,
    FRAME_HELLO = 1,
    FRAME_DATA = 2,
    PENDING = 8,        // connections that have not said hello yet
    HELLO_US = 5000000, // how long one may take to
    RETRY_US = 50000,   // between two attempts to reach the next stage
    POLL_MS = 50,       // how long a cancel may go unnoticed
};

struct frame_header {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    uint64_t epoch;
    uint64_t number; // of the step; of a hello: the number of stages
    uint32_t stage;  // of the sender
    uint32_t zero;
    uint64_t bytes;
};
_Static_assert(sizeof(struct frame_header) == 40, "no padding");

struct socket_link {
    struct link base;
    int fd;
    atomic_bool aborted;
    uint64_t epoch;
    uint32_t stage, peer; // ours and the other end's
};

struct link_listener {
    int fd;
    char bound[LINK_ADDRESS_BYTES];
};

int link_listener_open(struct link_listener **out, const char *address, char *bound, size_t capacity,
                       struct error *error)
{
    struct link_listener *listener = calloc(1, sizeof(*listener));
    if (!listener)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a link listener");
    int status = link_address_listen(&listener->fd, address, listener->bound, sizeof(listener->bound), error);
    if (!status && strlen(listener->bound) >= capacity)
        status = error_set(error, STATUS_INVALID, "the link's address does not fit %zu bytes", capacity);
    if (status) {
        link_listener_close(listener);
        return status;
    }
    memcpy(bound, listener->bound, strlen(listener->bound) + 1);
    *out = listener;
    return STATUS_OK;
}

void link_listener_close(struct link_listener *listener)
{
    if (!listener)
        return;
    if (listener->fd >= 0) {
        close(listener->fd);
        link_address_forget(listener->bound);
    }
    free(listener);
}

// --- frames ---

static int broken(struct socket_link *link, const char *what, ssize_t moved, struct error *error)
{
    if (atomic_load(&link->aborted))
        return error_set(error, STATUS_CANCELLED, "the link was closed because its epoch is over");
    return error_set(error, STATUS_UNAVAILABLE, "%s stage %u failed: %s", what, link->peer,
                     moved == 0 ? "it closed the link" : strerror(errno));
}

static int socket_send(struct link *base, uint64_t number, const void *data, size_t bytes,
                       struct error *error)
{
    struct socket_link *link = (struct socket_link *)base;
    struct frame_header header = {.magic = FRAME_MAGIC,
                                  .version = FRAME_VERSION,
                                  .kind = FRAME_DATA,
                                  .epoch = link->epoch,
                                  .number = number,
                                  .stage = link->stage,
                                  .bytes = bytes};
    struct iovec parts[2] = {{&header, sizeof(header)}, {(void *)data, bytes}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    while (parts[0].iov_len + parts[1].iov_len > 0) {
        ssize_t sent = sendmsg(link->fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return broken(link, "sending to", sent, error);
        for (int i = 0; i < 2; i++) {
            size_t of_part = (size_t)sent < parts[i].iov_len ? (size_t)sent : parts[i].iov_len;
            parts[i].iov_base = (char *)parts[i].iov_base + of_part;
            parts[i].iov_len -= of_part;
            sent -= (ssize_t)of_part;
        }
    }
    return STATUS_OK;
}

static int read_fully(struct socket_link *link, void *data, size_t bytes, struct error *error)
{
    for (size_t have = 0; have < bytes;) {
        ssize_t got = recv(link->fd, (char *)data + have, bytes - have, MSG_WAITALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return broken(link, "receiving from", got, error);
        have += (size_t)got;
    }
    return STATUS_OK;
}

static int check_data(const struct socket_link *link, const struct frame_header *header, uint64_t number,
                      size_t bytes, struct error *error)
{
    if (header->magic != FRAME_MAGIC || header->version != FRAME_VERSION || header->kind != FRAME_DATA)
        return error_set(error, STATUS_CORRUPT, "stage %u sent something that is not a link frame",
                         link->peer);
    if (header->epoch != link->epoch || header->stage != link->peer)
        return error_set(error, STATUS_CORRUPT,
                         "a link frame is of epoch %llu from stage %u, expected epoch %llu from stage %u",
                         (unsigned long long)header->epoch, header->stage, (unsigned long long)link->epoch,
                         link->peer);
    if (header->number != number || header->bytes != bytes)
        return error_set(error, STATUS_CORRUPT,
                         "stage %u sent %llu bytes for step %llu, expected %llu bytes for step %llu",
                         link->peer, (unsigned long long)header->bytes, (unsigned long long)header->number,
                         (unsigned long long)bytes, (unsigned long long)number);
    return STATUS_OK;
}

static int socket_receive(struct link *base, uint64_t number, void *data, size_t bytes, struct error *error)
{
    struct socket_link *link = (struct socket_link *)base;
    struct frame_header header;
    int status = read_fully(link, &header, sizeof(header), error);
    if (!status)
        status = check_data(link, &header, number, bytes, error);
    return status ? status : read_fully(link, data, bytes, error);
}

static int socket_check(struct link *base, struct error *error)
{
    return STATUS_OK;
}

static void socket_abort(struct link *base)
{
    struct socket_link *link = (struct socket_link *)base;
    atomic_store(&link->aborted, true);
    shutdown(link->fd, SHUT_RDWR);
}

static void socket_close(struct link *base)
{
    if (!base)
        return;
    struct socket_link *link = (struct socket_link *)base;
    close(link->fd);
    free(link);
}

static const struct link_ops SOCKET_OPS = {socket_send, socket_receive, socket_check, socket_abort,
                                           socket_close};

struct link_connection link_socket_release(struct link *base)
{
    struct socket_link *link = (struct socket_link *)base;
    struct link_connection connection = {link->fd, link->epoch, link->stage, link->peer};
    free(link);
    return connection;
}

// --- building the links of an epoch ---

// A connection whose hello has not come in whole.
struct pending {
    int fd; // -1: free
    size_t have;
    int64_t deadline_us;
    struct frame_header hello;
};

// What link_socket_connect knows while it waits for both neighbours.
struct meeting {
    struct link_listener *listener;
    const char *next_address;
    uint64_t epoch;
    uint32_t stage, n_stages, next, previous;
    struct pending arrivals[PENDING];
    int from_previous; // accepted and greeted
    enum { DIAL_IDLE, DIAL_CONNECTING, DIAL_GREETED, DIAL_DONE } dial;
    struct pending dialed;
    int64_t retry_us;
    struct error dial_error;
};

static int write_hello(const struct meeting *meeting, int fd)
{
    struct frame_header hello = {.magic = FRAME_MAGIC,
                                 .version = FRAME_VERSION,
                                 .kind = FRAME_HELLO,
                                 .epoch = meeting->epoch,
                                 .number = meeting->n_stages,
                                 .stage = meeting->stage};
    // The first bytes on a fresh connection always fit its buffer.
    return send(fd, &hello, sizeof(hello), MSG_NOSIGNAL) == (ssize_t)sizeof(hello) ? 0 : -1;
}

// Reads more of the hello. 1: whole. 0: not yet. -1: the connection is gone.
static int read_hello(struct pending *from)
{
    ssize_t got = recv(from->fd, (char *)&from->hello + from->have, sizeof(from->hello) - from->have, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0)
        return -1;
    from->have += (size_t)got;
    return from->have == sizeof(from->hello);
}

static bool right_hello(const struct meeting *meeting, const struct frame_header *hello, uint32_t stage)
{
    return hello->magic == FRAME_MAGIC && hello->version == FRAME_VERSION && hello->kind == FRAME_HELLO &&
           hello->epoch == meeting->epoch && hello->number == meeting->n_stages && hello->stage == stage;
}

static void forget(struct pending *pending)
{
    if (pending->fd >= 0)
        close(pending->fd);
    pending->fd = -1;
    pending->have = 0;
}

static void accept_arrival(struct meeting *meeting, int64_t now)
{
    int fd = accept4(meeting->listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    link_address_connected(fd); // socket options
    struct pending *place = &meeting->arrivals[0];
    for (int i = 0; i < PENDING; i++) {
        if (meeting->arrivals[i].fd < 0) {
            place = &meeting->arrivals[i];
            break;
        }
        if (meeting->arrivals[i].deadline_us < place->deadline_us)
            place = &meeting->arrivals[i];
    }
    forget(place); // all taken: the oldest has been silent for longest
    *place = (struct pending){.fd = fd, .deadline_us = now + HELLO_US};
}

static void greet_arrivals(struct meeting *meeting, int64_t now)
{
    for (int i = 0; i < PENDING; i++) {
        struct pending *arrival = &meeting->arrivals[i];
        if (arrival->fd < 0)
            continue;
        int heard = read_hello(arrival);
        bool right = heard == 1 && right_hello(meeting, &arrival->hello, meeting->previous) &&
                     write_hello(meeting, arrival->fd) == 0;
        if (right) { // a second one: the first attempt of a neighbour that dialed again
            if (meeting->from_previous >= 0)
                close(meeting->from_previous);
            meeting->from_previous = arrival->fd;
            *arrival = (struct pending){.fd = -1};
        } else if (heard != 0 || now > arrival->deadline_us) {
            forget(arrival);
        }
    }
}

static void dial_failed(struct meeting *meeting, int64_t now)
{
    forget(&meeting->dialed);
    meeting->dial = DIAL_IDLE;
    meeting->retry_us = now + RETRY_US;
}

static void dial_next(struct meeting *meeting, int64_t now)
{
    if (meeting->dial == DIAL_IDLE && now >= meeting->retry_us) {
        if (link_address_dial(&meeting->dialed.fd, meeting->next_address, &meeting->dial_error))
            dial_failed(meeting, now);
        else
            meeting->dial = DIAL_CONNECTING;
    }
    if (meeting->dial == DIAL_CONNECTING) {
        struct pollfd ready = {.fd = meeting->dialed.fd, .events = POLLOUT};
        if (poll(&ready, 1, 0) < 1)
            return;
        int failure = link_address_connected(meeting->dialed.fd);
        if (failure || write_hello(meeting, meeting->dialed.fd)) {
            error_set(&meeting->dial_error, STATUS_UNAVAILABLE, "cannot reach stage %u at %s: %s",
                      meeting->next, meeting->next_address, strerror(failure ? failure : errno));
            dial_failed(meeting, now);
        } else {
            meeting->dial = DIAL_GREETED;
        }
    }
    if (meeting->dial == DIAL_GREETED) {
        int heard = read_hello(&meeting->dialed);
        if (heard == 1 && right_hello(meeting, &meeting->dialed.hello, meeting->next)) {
            meeting->dial = DIAL_DONE;
        } else if (heard != 0) {
            error_set(&meeting->dial_error, STATUS_UNAVAILABLE,
                      "%s answered, but not as stage %u of epoch %llu", meeting->next_address, meeting->next,
                      (unsigned long long)meeting->epoch);
            dial_failed(meeting, now);
        }
    }
}

static void sleep_until_something(const struct meeting *meeting)
{
    struct pollfd watched[PENDING + 2];
    nfds_t count = 0;
    watched[count++] = (struct pollfd){.fd = meeting->listener->fd, .events = POLLIN};
    for (int i = 0; i < PENDING; i++) {
        if (meeting->arrivals[i].fd >= 0)
            watched[count++] = (struct pollfd){.fd = meeting->arrivals[i].fd, .events = POLLIN};
    }
    if (meeting->dial == DIAL_CONNECTING || meeting->dial == DIAL_GREETED)
        watched[count++] = (struct pollfd){.fd = meeting->dialed.fd,
                                           .events = meeting->dial == DIAL_GREETED ? POLLIN : POLLOUT};
    poll(watched, count, POLL_MS);
}

static int meet(struct meeting *meeting, int64_t timeout_us, const volatile int *cancel, struct error *error)
{
    int64_t deadline = clock_now_us() + timeout_us;
    while (meeting->from_previous < 0 || meeting->dial != DIAL_DONE) {
        int64_t now = clock_now_us();
        if (cancel && __atomic_load_n(cancel, __ATOMIC_ACQUIRE))
            return error_set(error, STATUS_CANCELLED, "linking was given up because its epoch is over");
        if (now > deadline && meeting->dial != DIAL_DONE)
            return error_set(error, STATUS_DEADLINE, "stage %u did not reach stage %u in %lld ms%s%s",
                             meeting->stage, meeting->next, (long long)(timeout_us / 1000),
                             meeting->dial_error.status ? ": " : "", meeting->dial_error.text);
        if (now > deadline)
            return error_set(error, STATUS_DEADLINE, "stage %u did not connect to stage %u in %lld ms",
                             meeting->previous, meeting->stage, (long long)(timeout_us / 1000));
        dial_next(meeting, now);
        accept_arrival(meeting, now);
        greet_arrivals(meeting, now);
        if (meeting->from_previous < 0 || meeting->dial != DIAL_DONE)
            sleep_until_something(meeting);
    }
    return STATUS_OK;
}

static struct link *new_link(const struct meeting *meeting, int fd, uint32_t peer)
{
    struct socket_link *link = calloc(1, sizeof(*link));
    if (!link)
        return NULL;
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    *link = (struct socket_link){.base = {.ops = &SOCKET_OPS},
                                 .fd = fd,
                                 .epoch = meeting->epoch,
                                 .stage = meeting->stage,
                                 .peer = peer};
    return &link->base;
}

int link_socket_connect(struct link **to_next, struct link **from_previous, struct link_listener *listener,
                        const char *next_address, uint64_t epoch, uint32_t stage, uint32_t n_stages,
                        int64_t timeout_us, const volatile int *cancel, struct error *error)
{
    struct meeting meeting = {.listener = listener,
                              .next_address = next_address,
                              .epoch = epoch,
                              .stage = stage,
                              .n_stages = n_stages,
                              .next = (stage + 1) % n_stages,
                              .previous = (stage + n_stages - 1) % n_stages,
                              .from_previous = -1,
                              .dialed = {.fd = -1}};
    for (int i = 0; i < PENDING; i++)
        meeting.arrivals[i].fd = -1;
    int status = meet(&meeting, timeout_us, cancel, error);
    for (int i = 0; i < PENDING; i++)
        forget(&meeting.arrivals[i]);
    struct link *next = status ? NULL : new_link(&meeting, meeting.dialed.fd, meeting.next);
    struct link *previous = status ? NULL : new_link(&meeting, meeting.from_previous, meeting.previous);
    if (next && previous) {
        *to_next = next;
        *from_previous = previous;
        return STATUS_OK;
    }
    if (!status)
        status = error_set(error, STATUS_NO_MEMORY, "no memory for a link");
    free(next);
    free(previous);
    forget(&meeting.dialed);
    if (meeting.from_previous >= 0)
        close(meeting.from_previous);
    return status;
}
