// From the tokens of one choice to what its client sees: text in whole characters, stop strings cut out, and
// with every piece of text the ids it came from. Ids and text wait together while a character is unfinished
// or a stop string is possible. One thread.
#ifndef STRATA_TOKEN_STREAM_H
#define STRATA_TOKEN_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "common/tokenizer.h"

struct token_stream;

struct token_stream_options {
    const struct tokenizer *tokenizer; // NULL or without text: ids only
    const char *const *stops;          // NUL-terminated, copied
    uint32_t n_stops;
    uint32_t min_tokens; // stop strings that would end the choice earlier do not count
    bool special;        // control tokens come out as their text
};

// STATUS_INVALID: a stop string is empty, over MAX_STOP_BYTES or not UTF-8, or there are too many;
// STATUS_UNSUPPORTED: stop strings without text.
int token_stream_new(struct token_stream **out, const struct token_stream_options *options);
void token_stream_free(struct token_stream *stream);

// One more token. Returns 1 when a stop string is complete (push nothing after that), 0 otherwise, or a
// negative status. Of several stop strings the one that completes first counts, the longest of those that
// complete together; text behind it in the same token is cut with it.
int token_stream_push(struct token_stream *stream, int32_t id);
// No more tokens: what was held back is released (an unfinished character as U+FFFD; nothing of a matched
// stop).
void token_stream_finish(struct token_stream *stream);

struct token_delta { // points into the stream until the next push or take
    const char *text;
    size_t text_bytes;
    const int32_t *ids;
    uint32_t n_ids; // the next n_ids pushed ids, in order
};
// What is ready since the last take; false when nothing is.
bool token_stream_take(struct token_stream *stream, struct token_delta *delta);
// After a match: which stop string, and how many pushed ids will never be released because all of their text
// was cut. An id whose text began before the stop string is released, with that part of its text.
const char *token_stream_matched(const struct token_stream *stream, uint32_t *n_dropped); // NULL = none

#endif
