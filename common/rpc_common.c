// What both ends of gRPC need: one library start for the process, status codes, message buffers, addresses,
// PEM files. No state but gRPC's own count of users; any thread.
#include <ctype.h>
#include <errno.h>
#include <grpc/support/log.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#include "common/log.h"
#include "common/rpc_internal.h"

enum { MAX_PEM_BYTES = 4 << 20 };

// gRPC reports everything that matters through statuses; its own log lines are for debugging.
static void log_from_grpc(gpr_log_func_args *args)
{
    log_debug("grpc: %s", args->message);
}

static void set_log(void)
{
    gpr_set_log_function(log_from_grpc);
}

void rpc_library_init(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, set_log);
    grpc_init();
}

void rpc_library_shutdown(void)
{
    grpc_shutdown();
}

int rpc_status_to_grpc(int status)
{
    switch (status) {
    case STATUS_OK:
        return GRPC_STATUS_OK;
    case STATUS_INVALID:
        return GRPC_STATUS_INVALID_ARGUMENT;
    case STATUS_NOT_FOUND:
        return GRPC_STATUS_NOT_FOUND;
    case STATUS_EXHAUSTED:
    case STATUS_NO_MEMORY:
        return GRPC_STATUS_RESOURCE_EXHAUSTED;
    case STATUS_UNAVAILABLE:
        return GRPC_STATUS_UNAVAILABLE;
    case STATUS_CORRUPT:
        return GRPC_STATUS_DATA_LOSS;
    case STATUS_UNSUPPORTED:
        return GRPC_STATUS_UNIMPLEMENTED;
    case STATUS_CANCELLED:
        return GRPC_STATUS_CANCELLED;
    case STATUS_DEADLINE:
        return GRPC_STATUS_DEADLINE_EXCEEDED;
    case STATUS_UNAUTHENTICATED:
        return GRPC_STATUS_UNAUTHENTICATED;
    default:
        return GRPC_STATUS_INTERNAL;
    }
}

int rpc_status_from_grpc(int code)
{
    switch (code) {
    case GRPC_STATUS_OK:
        return STATUS_OK;
    case GRPC_STATUS_INVALID_ARGUMENT:
    case GRPC_STATUS_ALREADY_EXISTS:
    case GRPC_STATUS_FAILED_PRECONDITION:
    case GRPC_STATUS_OUT_OF_RANGE:
        return STATUS_INVALID;
    case GRPC_STATUS_NOT_FOUND:
        return STATUS_NOT_FOUND;
    case GRPC_STATUS_RESOURCE_EXHAUSTED:
        return STATUS_EXHAUSTED;
    case GRPC_STATUS_UNAVAILABLE:
    case GRPC_STATUS_ABORTED:
        return STATUS_UNAVAILABLE;
    case GRPC_STATUS_DATA_LOSS:
        return STATUS_CORRUPT;
    case GRPC_STATUS_UNIMPLEMENTED:
        return STATUS_UNSUPPORTED;
    case GRPC_STATUS_CANCELLED:
        return STATUS_CANCELLED;
    case GRPC_STATUS_DEADLINE_EXCEEDED:
        return STATUS_DEADLINE;
    case GRPC_STATUS_UNAUTHENTICATED:
    case GRPC_STATUS_PERMISSION_DENIED:
        return STATUS_UNAUTHENTICATED;
    default:
        return STATUS_INTERNAL;
    }
}

grpc_byte_buffer *rpc_buffer_from(const void *bytes, size_t length)
{
    grpc_slice slice = grpc_slice_from_copied_buffer(bytes, length);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

uint8_t *rpc_buffer_flatten(grpc_byte_buffer *buffer, size_t *length)
{
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer))
        return NULL;
    size_t total = grpc_byte_buffer_length(reader.buffer_out), used = 0;
    uint8_t *bytes = malloc(total + 1);
    grpc_slice *piece;
    while (bytes && grpc_byte_buffer_reader_peek(&reader, &piece)) {
        memcpy(bytes + used, GRPC_SLICE_START_PTR(*piece), GRPC_SLICE_LENGTH(*piece));
        used += GRPC_SLICE_LENGTH(*piece);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    *length = used;
    return bytes;
}

int rpc_read_pem(const char *path, char **out, struct error *error)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return error_set(error, STATUS_IO, "cannot read the PEM file %s: %s", path, strerror(errno));
    char *text = malloc(MAX_PEM_BYTES + 1);
    size_t length = text ? fread(text, 1, MAX_PEM_BYTES + 1, file) : 0;
    int failed = ferror(file) ? errno : 0;
    fclose(file);
    if (!text)
        return error_set(error, STATUS_NO_MEMORY, "no memory to read %s", path);
    int status = STATUS_OK;
    if (failed)
        status = error_set(error, STATUS_IO, "cannot read the PEM file %s: %s", path, strerror(failed));
    else if (length > MAX_PEM_BYTES)
        status = error_set(error, STATUS_INVALID, "%s is larger than %d bytes: not a PEM file", path,
                           MAX_PEM_BYTES);
    else if (!memmem(text, length, "-----BEGIN ", 11))
        status = error_set(error, STATUS_INVALID, "%s is not a PEM file", path);
    if (status) {
        free(text);
        return status;
    }
    text[length] = '\0';
    char *fitted = realloc(text, length + 1);
    *out = fitted ? fitted : text;
    return STATUS_OK;
}

static bool has_prefix(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

// gRPC would take a missing or misspelt port for "https" and listen on 443.
static int check_port(const char *address, const char *port, struct error *error)
{
    unsigned long value = 0;
    size_t digits = 0;
    for (; isdigit((unsigned char)port[digits]) && digits < 6; digits++)
        value = value * 10 + (unsigned long)(port[digits] - '0');
    if (digits == 0 || port[digits] || value > 65535)
        return error_set(error, STATUS_INVALID, "\"%s\": the port has to be a number from 0 to 65535",
                         address);
    return STATUS_OK;
}

int rpc_address_check(const char *address, bool schemes, struct error *error)
{
    if (has_prefix(address, "unix:")) {
        size_t length = strlen(address + 5), room = sizeof(((struct sockaddr_un *)0)->sun_path) - 1;
        if (length == 0)
            return error_set(error, STATUS_INVALID, "\"%s\": a path has to follow \"unix:\"", address);
        if (length > room)
            return error_set(error, STATUS_INVALID,
                             "\"%s\": a socket's path has at most %zu bytes, this one has %zu", address, room,
                             length);
        return STATUS_OK;
    }
    if (schemes &&
        (has_prefix(address, "dns:") || has_prefix(address, "ipv4:") || has_prefix(address, "ipv6:")))
        return STATUS_OK;
    const char *colon = strrchr(address, ':'), *bracket = strchr(address, ']');
    if (address[0] == '[') {
        if (!bracket || bracket == address + 1 || bracket[1] != ':')
            return error_set(error, STATUS_INVALID, "\"%s\" is not an address: write [IPv6]:port", address);
        return check_port(address, bracket + 2, error);
    }
    if (!colon || colon == address || strchr(address, ':') != colon)
        return error_set(error, STATUS_INVALID,
                         "\"%s\" is not an address: write host:port, [IPv6]:port or unix:path", address);
    return check_port(address, colon + 1, error);
}

grpc_arg rpc_arg_int(const char *key, int value)
{
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

grpc_slice rpc_slice_text(const char *text)
{
    size_t length = strlen(text ? text : "");
    if (length > RPC_MAX_TEXT) {
        length = RPC_MAX_TEXT;
        while (length > 0 && ((unsigned char)text[length] & 0xC0) == 0x80)
            length--;
    }
    return grpc_slice_from_copied_buffer(text ? text : "", length);
}
