// One write(2) a line, so that lines of several threads and processes do not mix. State is set before threads
// start.
#include "common/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/status.h"

static char log_who[64] = "strata";
static enum log_level log_least = LOG_INFO;
static int log_json;

void log_init(const char *who, enum log_level level, int json)
{
    log_set_who(who);
    log_least = level;
    log_json = json;
}

void log_set_who(const char *who)
{
    snprintf(log_who, sizeof(log_who), "%s", who);
}

int log_level_parse(const char *text, enum log_level *out)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    for (int i = 0; i < 4; i++) {
        if (strcmp(text, names[i]) == 0) {
            *out = (enum log_level)i;
            return STATUS_OK;
        }
    }
    return STATUS_INVALID;
}

// Escapes for JSON, or only control bytes for plain lines (no forged lines from request text).
static size_t escape(char *to, size_t capacity, const char *from)
{
    size_t used = 0;
    for (; *from && used + 7 < capacity; from++) {
        unsigned char c = (unsigned char)*from;
        if (c < 0x20 || c == 0x7F)
            used += (size_t)snprintf(to + used, capacity - used, log_json ? "\\u%04x" : "\\x%02x", c);
        else if (log_json && (c == '"' || c == '\\'))
            used += (size_t)snprintf(to + used, capacity - used, "\\%c", c);
        else
            to[used++] = (char)c;
    }
    to[used] = '\0';
    return used;
}

void log_write(enum log_level level, const char *format, ...)
{
    static const char *const names[] = {"DEBUG", "INFO", "WARN", "ERROR"};
    if (level < log_least)
        return;
    char text[1024], escaped[2048], line[2304], stamp[32];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    escape(escaped, sizeof(escaped), text);
    int64_t now = clock_wall_us();
    time_t seconds = (time_t)(now / 1000000);
    struct tm utc;
    gmtime_r(&seconds, &utc);
    strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
    const char *shape = log_json ? "{\"time\":\"%s.%03dZ\",\"level\":\"%s\",\"who\":\"%s\",\"text\":\"%s\"}\n"
                                 : "%s.%03dZ %s %s: %s\n";
    int length =
        snprintf(line, sizeof(line), shape, stamp, (int)(now / 1000 % 1000), names[level], log_who, escaped);
    if (length > 0 && write(STDERR_FILENO, line, (size_t)length) < 0)
        return; // nowhere left to say it
}
