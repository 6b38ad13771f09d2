// One write(2) a line, so that lines of several threads and processes do not mix. State is set before threads
// start.
#include "common/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/status.h"
#include "common/utf8.h"

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

// What a text may hold that a line may not: control characters (no forged lines, no terminal codes from a
// request's text), ill-formed UTF-8, and in JSON quotes and backslashes. Cut at a character's end.
static void escape(char *to, size_t capacity, const char *from)
{
    size_t used = 0, left = strlen(from), taken;
    for (; left && used + 7 < capacity; from += taken, left -= taken) {
        enum utf8_kind kind = utf8_scan(from, left, &taken);
        unsigned char c = (unsigned char)*from;
        if (kind != UTF8_WHOLE)
            used += (size_t)sprintf(to + used, UTF8_REPLACEMENT);
        else if (c < 0x20 || c == 0x7F)
            used += (size_t)sprintf(to + used, log_json ? "\\u%04x" : "\\x%02x", c);
        else if (c == 0xC2 && (unsigned char)from[1] < 0xA0)
            used += (size_t)sprintf(to + used, "\\u%04x", (unsigned char)from[1]);
        else
            used += (size_t)sprintf(to + used, "%s%.*s", log_json && (c == '"' || c == '\\') ? "\\" : "",
                                    (int)taken, from);
    }
    to[used] = '\0';
}

void log_write(enum log_level level, const char *format, ...)
{
    static const char *const names[] = {"DEBUG", "INFO", "WARN", "ERROR"};
    if (level < log_least)
        return;
    int saved = errno; // a caller may log before it looks
    char text[1024], escaped[2048], who[128], line[2304], stamp[32];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    escape(escaped, sizeof(escaped), text);
    escape(who, sizeof(who), log_who);
    int64_t now = clock_wall_us();
    time_t seconds = (time_t)(now / 1000000);
    struct tm utc;
    gmtime_r(&seconds, &utc);
    strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
    const char *shape = log_json ? "{\"time\":\"%s.%03dZ\",\"level\":\"%s\",\"who\":\"%s\",\"text\":\"%s\"}\n"
                                 : "%s.%03dZ %s %s: %s\n";
    int length =
        snprintf(line, sizeof(line), shape, stamp, (int)(now / 1000 % 1000), names[level], who, escaped);
    // A line that cannot be written has nowhere else to go.
    ssize_t written = length > 0 ? write(STDERR_FILENO, line, (size_t)length) : 0;
    (void)written;
    errno = saved;
}
