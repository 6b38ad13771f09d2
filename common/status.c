// Failure sentences: formatting, cutting, wrapping. No state.
#include "common/status.h"

#include <stdio.h>
#include <string.h>

// Shortens `text` to at most `limit` bytes without leaving half a UTF-8 character.
static void cut_at_character(char *text, size_t limit)
{
    size_t end = limit;
    while (end > 0 && ((unsigned char)text[end] & 0xC0) == 0x80)
        end--;
    text[end] = '\0';
}

int error_set(struct error *error, int status, const char *format, ...)
{
    if (!error)
        return status;
    va_list arguments;
    va_start(arguments, format);
    char text[sizeof(error->text) + 4];
    int length = vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    if (length >= (int)sizeof(error->text))
        cut_at_character(text, sizeof(error->text) - 1);
    error->status = status;
    memcpy(error->text, text, strlen(text) + 1);
    return status;
}

int error_wrap(struct error *error, const char *format, ...)
{
    if (!error)
        return STATUS_INTERNAL;
    char prefix[sizeof(error->text)];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(prefix, sizeof(prefix), format, arguments);
    va_end(arguments);
    char inner[sizeof(error->text)];
    memcpy(inner, error->text, sizeof(inner));
    return error_set(error, error->status, "%s: %s", prefix, inner);
}

const char *status_name(int status)
{
    switch (status) {
    case STATUS_OK:
        return "ok";
    case STATUS_INVALID:
        return "invalid argument";
    case STATUS_NOT_FOUND:
        return "not found";
    case STATUS_EXHAUSTED:
        return "exhausted";
    case STATUS_UNAVAILABLE:
        return "unavailable";
    case STATUS_CORRUPT:
        return "corrupt";
    case STATUS_UNSUPPORTED:
        return "unsupported";
    case STATUS_IO:
        return "input/output error";
    case STATUS_NO_MEMORY:
        return "out of memory";
    case STATUS_CANCELLED:
        return "cancelled";
    case STATUS_DEADLINE:
        return "deadline exceeded";
    case STATUS_INTERNAL:
        return "internal error";
    case STATUS_UNAUTHENTICATED:
        return "unauthenticated";
    default:
        return "unknown status";
    }
}
