// Socket addresses of links. TCP sockets send without delay (a decode step's residual is one small frame and
// everybody waits for it) and notice within half a minute when the peer's host is gone. Called by the thread
// that builds a pool's links.
#include "worker/link_address.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 16, PEER_GONE_MS = 30000 };

static const char *unix_path(const char *address)
{
    return strncmp(address, "unix:", 5) == 0 ? address + 5 : NULL;
}

static int unix_address(struct sockaddr_un *out, const char *path, struct error *error)
{
    memset(out, 0, sizeof(*out));
    out->sun_family = AF_UNIX;
    if (!*path || strlen(path) >= sizeof(out->sun_path))
        return error_set(error, STATUS_INVALID, "link address unix:%s: a path has 1 to %zu bytes", path,
                         sizeof(out->sun_path) - 1);
    memcpy(out->sun_path, path, strlen(path));
    return STATUS_OK;
}

// Splits "host:port" or "[host]:port".
static int split(const char *address, char *host, size_t host_capacity, const char **port,
                 struct error *error)
{
    const char *colon = strrchr(address, ':');
    const char *begin = address, *end = colon;
    if (colon && *address == '[' && colon > address && colon[-1] == ']') {
        begin++;
        end--;
    }
    bool number = colon && colon[1] && strspn(colon + 1, "0123456789") == strlen(colon + 1) &&
                  strtoul(colon + 1, NULL, 10) <= 65535;
    if (!number || end <= begin || (size_t)(end - begin) >= host_capacity)
        return error_set(error, STATUS_INVALID, "link address '%s' is neither host:port nor unix:/path",
                         address);
    memcpy(host, begin, (size_t)(end - begin));
    host[end - begin] = '\0';
    *port = colon + 1;
    return STATUS_OK;
}

static int resolve(struct addrinfo **out, const char *address, int flags, struct error *error)
{
    char host[LINK_ADDRESS_BYTES];
    const char *port = "";
    int status = split(address, host, sizeof(host), &port, error);
    if (status)
        return status;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags | AI_NUMERICSERV};
    int failure = getaddrinfo(host, port, &hints, out);
    if (failure)
        return error_set(error, failure == EAI_AGAIN ? STATUS_UNAVAILABLE : STATUS_INVALID,
                         "link address %s: %s", address, gai_strerror(failure));
    return STATUS_OK;
}

static int name_bound(int fd, char *bound, size_t capacity, struct error *error)
{
    struct sockaddr_storage at;
    socklen_t length = sizeof(at);
    char host[64], port[16];
    if (getsockname(fd, (struct sockaddr *)&at, &length) ||
        getnameinfo((struct sockaddr *)&at, length, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV))
        return error_set(error, STATUS_IO, "cannot name the link's listening socket: %s", strerror(errno));
    int written = snprintf(bound, capacity, at.ss_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
    if (written < 0 || (size_t)written >= capacity)
        return error_set(error, STATUS_INVALID, "the link's address does not fit %zu bytes", capacity);
    return STATUS_OK;
}

static int listen_tcp(int *fd, const char *address, char *bound, size_t capacity, struct error *error)
{
    struct addrinfo *found;
    int status = resolve(&found, address, AI_PASSIVE, error);
    if (status)
        return status;
    int at = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int reuse = 1;
    if (at >= 0)
        setsockopt(at, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse));
    if (at < 0 || bind(at, found->ai_addr, found->ai_addrlen) || listen(at, BACKLOG))
        status = error_set(error, STATUS_IO, "cannot listen for links on %s: %s", address, strerror(errno));
    freeaddrinfo(found);
    if (!status)
        status = name_bound(at, bound, capacity, error);
    if (status && at >= 0)
        close(at);
    *fd = status ? -1 : at;
    return status;
}

// A socket file that nobody listens on any more is left from a process that was killed: replace it, but
// nothing else.
static void remove_stale(const struct sockaddr_un *where)
{
    struct stat info;
    if (stat(where->sun_path, &info) || !S_ISSOCK(info.st_mode))
        return;
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe >= 0 && connect(probe, (const struct sockaddr *)where, sizeof(*where)) && errno == ECONNREFUSED)
        unlink(where->sun_path);
    if (probe >= 0)
        close(probe);
}

static int listen_unix(int *fd, const char *address, char *bound, size_t capacity, struct error *error)
{
    struct sockaddr_un where;
    int status = unix_address(&where, unix_path(address), error);
    if (status)
        return status;
    if (strlen(address) >= capacity)
        return error_set(error, STATUS_INVALID, "the link's address does not fit %zu bytes", capacity);
    remove_stale(&where);
    int at = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (at < 0 || bind(at, (struct sockaddr *)&where, sizeof(where)) || listen(at, BACKLOG)) {
        error_set(error, STATUS_IO, "cannot listen for links on %s: %s", address, strerror(errno));
        if (at >= 0)
            close(at);
        return STATUS_IO;
    }
    memcpy(bound, address, strlen(address) + 1);
    *fd = at;
    return STATUS_OK;
}

int link_address_listen(int *fd, const char *address, char *bound, size_t capacity, struct error *error)
{
    *fd = -1;
    return unix_path(address) ? listen_unix(fd, address, bound, capacity, error)
                              : listen_tcp(fd, address, bound, capacity, error);
}

void link_address_forget(const char *bound)
{
    const char *path = unix_path(bound);
    if (path)
        unlink(path);
}

static int start_connect(int at, const struct sockaddr *where, socklen_t length, const char *address,
                         struct error *error)
{
    if (at >= 0 && (connect(at, where, length) == 0 || errno == EINPROGRESS))
        return STATUS_OK;
    error_set(error, STATUS_UNAVAILABLE, "cannot reach the next stage at %s: %s", address, strerror(errno));
    if (at >= 0)
        close(at);
    return STATUS_UNAVAILABLE;
}

int link_address_dial(int *fd, const char *address, struct error *error)
{
    *fd = -1;
    int status, at;
    if (unix_path(address)) {
        struct sockaddr_un where;
        status = unix_address(&where, unix_path(address), error);
        if (status)
            return status;
        at = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        status = start_connect(at, (struct sockaddr *)&where, sizeof(where), address, error);
    } else {
        struct addrinfo *found;
        status = resolve(&found, address, 0, error);
        if (status)
            return status;
        at = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        status = start_connect(at, found->ai_addr, found->ai_addrlen, address, error);
        freeaddrinfo(found);
    }
    if (!status)
        *fd = at;
    return status;
}

int link_address_connected(int fd)
{
    int failure = 0, on = 1, gone = PEER_GONE_MS;
    socklen_t length = sizeof(failure);
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &length))
        return errno;
    // These fail on unix sockets, which need neither.
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &gone, sizeof(gone));
    return failure;
}

int link_address_advertise(char *out, size_t capacity, const char *bound, const char *advertise,
                           struct error *error)
{
    const char *text = advertise ? advertise : bound;
    const char *colon = strrchr(text, ':');
    const char *port = "";
    if (!unix_path(text) && (!colon || (*text == '[' && text[strlen(text) - 1] == ']'))) {
        port = strrchr(bound, ':');
        if (unix_path(bound) || !port)
            return error_set(error, STATUS_INVALID, "'%s' needs a port: links listen on %s", advertise,
                             bound);
    }
    int written = snprintf(out, capacity, "%s%s", text, port);
    if (written < 0 || (size_t)written >= capacity)
        return error_set(error, STATUS_INVALID, "the link's address does not fit %zu bytes", capacity);
    return STATUS_OK;
}
