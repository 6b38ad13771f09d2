// The one vocabulary of failure. Every fallible function returns 0 or a negative `enum status` and, where it
// takes a `struct error *`, leaves a sentence there that a user can act on. Plain values: no ownership, no
// threads.
#ifndef STRATA_STATUS_H
#define STRATA_STATUS_H

#include <stdarg.h>

enum status {
    STATUS_OK = 0,
    STATUS_INVALID = -1,     // an argument, a request or a configuration is wrong: the caller must change it
    STATUS_NOT_FOUND = -2,   // no such file, model, tensor, method
    STATUS_EXHAUSTED = -3,   // a configured limit or a bounded queue is full: try later or ask for less
    STATUS_UNAVAILABLE = -4, // the pool or a peer is not there (yet, or any more): try later
    STATUS_CORRUPT = -5,     // bytes from a file or a peer are malformed
    STATUS_UNSUPPORTED = -6, // well-formed, but a type, architecture or feature we do not have
    STATUS_IO = -7,          // the operating system refused; the text carries its reason
    STATUS_NO_MEMORY = -8,   // host or device memory ran out, or would
    STATUS_CANCELLED = -9,   // the client or the operator took it back
    STATUS_DEADLINE = -10,   // the deadline passed
    STATUS_INTERNAL = -11,   // a broken invariant of ours
    STATUS_UNAUTHENTICATED = -12 // a missing or wrong token
};

// A failure with its sentence. `status` is 0 while nothing failed. The text is always NUL-terminated.
struct error {
    int status;
    char text[512];
};

// Fills `error` (may be NULL) and returns `status`, so that a failing function ends in `return
// error_set(...)`. Text that does not fit is cut at a UTF-8 boundary.
int error_set(struct error *error, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

// Puts "prefix: " before the text of an error that is set. Returns error->status;
// STATUS_INTERNAL for NULL, so a caller that may pass NULL returns its own copy of the status.
int error_wrap(struct error *error, const char *format, ...) __attribute__((format(printf, 2, 3)));

// "invalid argument", "not found", ...: never NULL.
const char *status_name(int status);

#endif
