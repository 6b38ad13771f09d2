// Leveled logging to standard error: one line an event, "2026-01-31T12:00:00.123Z INFO coordinator: text" or
// JSON. Any thread; a line is written with one write(2).
#ifndef STRATA_LOG_H
#define STRATA_LOG_H

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

// `who` ("coordinator", "worker 2") is copied. Call before threads start. json: one object a line.
void log_init(const char *who, enum log_level level, int json);
void log_set_who(const char *who);
int log_level_parse(const char *text,
                    enum log_level *out); // "debug" "info" "warn" "error"; STATUS_INVALID otherwise
void log_write(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_debug(...) log_write(LOG_DEBUG, __VA_ARGS__)
#define log_info(...) log_write(LOG_INFO, __VA_ARGS__)
#define log_warn(...) log_write(LOG_WARN, __VA_ARGS__)
#define log_error(...) log_write(LOG_ERROR, __VA_ARGS__)

#endif
