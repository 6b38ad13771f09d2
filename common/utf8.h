// UTF-8 from outside, one sequence at a time: what is a character, what is broken, what may still become one.
// Plain functions; any thread.
#ifndef STRATA_UTF8_H
#define STRATA_UTF8_H

#include <stdbool.h>
#include <stddef.h>

enum utf8_kind {
    UTF8_WHOLE,  // a well-formed character
    UTF8_BROKEN, // a maximal ill-formed part: one U+FFFD stands for it, as in the WHATWG decoder
    UTF8_PARTIAL // the bytes end inside a character that further bytes could complete
};

// Looks at the first sequence of `length` >= 1 bytes and stores how many bytes it takes (1..4, at most
// `length`). Surrogates, overlong forms and values above U+10FFFF are ill-formed.
enum utf8_kind utf8_scan(const void *bytes, size_t length, size_t *taken);

// How many bytes from the start are well-formed: `length` when all are.
size_t utf8_valid_prefix(const void *bytes, size_t length);

// Text from outside made fit for a sentence, a log line or a protobuf string: '?' stands for control
// characters and ill-formed bytes, and what does not fit into `capacity` (at least 1) with its NUL is cut at
// a character's end. Returns the bytes written, the NUL not counted.
size_t utf8_copy_clean(char *to, size_t capacity, const void *bytes, size_t length);

#define UTF8_REPLACEMENT "\xEF\xBF\xBD"

#endif
