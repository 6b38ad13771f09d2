// Tokens in, text and ids out. Three things hold an id back: a character that its bytes left unfinished, a
// stop string that its text may have begun, and the ids before it. Everything is kept as offsets into the
// text of the whole choice: each pending id knows where its text starts and ends, a match knows where it
// starts, and what may leave is a prefix of both lists.
//
// Stop strings are followed byte by byte (Knuth, Morris and Pratt), so the match that completes first wins,
// however the text was cut into tokens, and the longest prefix that is still open is the text to hold back.
// Owned by whoever owns the choice; one thread.
#include "coordinator/token_stream.h"

#include <stdlib.h>
#include <string.h>

#include "common/limits.h"
#include "common/utf8.h"

struct stop {
    char *text;
    uint32_t length;
    uint16_t *fallback; // [length + 1] longest proper prefix that ends where this prefix ends
    uint32_t matched;   // how much of it the text ends with
};

struct span { // of one pending id, in bytes of the choice's text
    uint64_t start, end;
    bool open; // ends inside a character: goes with the next id
};

enum { FINISH_BYTES = sizeof(UTF8_REPLACEMENT) - 1 };

struct token_stream {
    struct token_decoder decoder;
    bool has_text;
    size_t max_bytes; // of one push
    uint32_t min_tokens, n_pushed;
    struct stop *stops;
    uint32_t n_stops;
    const struct stop *match;
    uint32_t n_dropped;

    char *text; // from offset `base` on
    size_t text_capacity;
    uint64_t base, total, ready, taken; // base <= taken <= ready <= total
    int32_t *ids;
    struct span *spans;
    size_t n_ids, n_ready, n_taken, id_capacity;
};

static int stop_init(struct stop *stop, const char *text)
{
    size_t length = strlen(text);
    if (length == 0 || length > MAX_STOP_BYTES || utf8_valid_prefix(text, length) != length)
        return STATUS_INVALID;
    stop->text = strdup(text);
    stop->fallback = calloc(length + 1, sizeof(*stop->fallback));
    if (!stop->text || !stop->fallback)
        return STATUS_NO_MEMORY;
    stop->length = (uint32_t)length;
    for (uint32_t i = 1, k = 0; i < length; i++) {
        while (k && text[i] != text[k])
            k = stop->fallback[k];
        k += text[i] == text[k];
        stop->fallback[i + 1] = (uint16_t)k;
    }
    return 0;
}

// True when `byte` completes the stop string.
static bool stop_follow(struct stop *stop, char byte)
{
    if (stop->matched == stop->length)
        stop->matched = stop->fallback[stop->length];
    while (stop->matched && byte != stop->text[stop->matched])
        stop->matched = stop->fallback[stop->matched];
    stop->matched += byte == stop->text[stop->matched];
    return stop->matched == stop->length;
}

int token_stream_new(struct token_stream **out, const struct token_stream_options *options)
{
    bool has_text = options->tokenizer && tokenizer_has_text(options->tokenizer);
    if (options->n_stops > MAX_STOP_STRINGS)
        return STATUS_INVALID;
    if (options->n_stops && !has_text)
        return STATUS_UNSUPPORTED;
    struct token_stream *stream = calloc(1, sizeof(*stream));
    if (!stream)
        return STATUS_NO_MEMORY;
    stream->min_tokens = options->min_tokens;
    stream->has_text = has_text;
    if (has_text) {
        token_decoder_init(&stream->decoder, options->tokenizer, options->special, false);
        stream->max_bytes = tokenizer_max_bytes(options->tokenizer);
    }
    int status = 0;
    stream->stops = calloc(options->n_stops + 1, sizeof(*stream->stops));
    if (!stream->stops)
        status = STATUS_NO_MEMORY;
    for (uint32_t i = 0; i < options->n_stops && !status; i++)
        status = stop_init(&stream->stops[stream->n_stops++], options->stops[i]);
    if (status) {
        token_stream_free(stream);
        return status;
    }
    *out = stream;
    return 0;
}

void token_stream_free(struct token_stream *stream)
{
    if (!stream)
        return;
    for (uint32_t i = 0; i < stream->n_stops; i++) {
        free(stream->stops[i].text);
        free(stream->stops[i].fallback);
    }
    free(stream->stops);
    free(stream->text);
    free(stream->ids);
    free(stream->spans);
    free(stream);
}

// Forgets what was taken.
static void compact(struct token_stream *stream)
{
    size_t gone = (size_t)(stream->taken - stream->base);
    memmove(stream->text, stream->text + gone, (size_t)(stream->total - stream->taken));
    stream->base = stream->taken;
    size_t left = stream->n_ids - stream->n_taken;
    memmove(stream->ids, stream->ids + stream->n_taken, left * sizeof(*stream->ids));
    memmove(stream->spans, stream->spans + stream->n_taken, left * sizeof(*stream->spans));
    stream->n_ids = left;
    stream->n_ready -= stream->n_taken;
    stream->n_taken = 0;
}

// Room for one more id, its text and what finishing may add.
static int reserve(struct token_stream *stream)
{
    if (stream->n_taken)
        compact(stream);
    if (stream->n_ids == stream->id_capacity) {
        size_t wanted = stream->id_capacity ? stream->id_capacity * 2 : 16;
        int32_t *ids = realloc(stream->ids, wanted * sizeof(*ids));
        if (!ids)
            return STATUS_NO_MEMORY;
        stream->ids = ids;
        struct span *spans = realloc(stream->spans, wanted * sizeof(*spans));
        if (!spans)
            return STATUS_NO_MEMORY;
        stream->spans = spans;
        stream->id_capacity = wanted;
    }
    size_t need = (size_t)(stream->total - stream->base) + stream->max_bytes + FINISH_BYTES;
    if (need > stream->text_capacity) {
        char *text = realloc(stream->text, need * 2);
        if (!text)
            return STATUS_NO_MEMORY;
        stream->text = text;
        stream->text_capacity = need * 2;
    }
    return 0;
}

// Follows the stop strings through the text from `from` on. The one that completes first; among those that
// complete together the longest, which starts first. *start is where it begins.
static const struct stop *find_stop(struct token_stream *stream, uint64_t from, uint64_t *start)
{
    bool counts = stream->n_pushed >= stream->min_tokens;
    for (uint64_t at = from; at < stream->total; at++) {
        const struct stop *found = NULL;
        for (uint32_t i = 0; i < stream->n_stops; i++) {
            struct stop *stop = &stream->stops[i];
            if (stop_follow(stop, stream->text[at - stream->base]) && counts &&
                (!found || found->length < stop->length))
                found = stop;
        }
        if (found) {
            *start = at + 1 - found->length;
            return found;
        }
    }
    return NULL;
}

// Cuts text and ids at a stop string. An id that began before it is kept whole.
static void cut(struct token_stream *stream, uint64_t start)
{
    size_t keep = stream->n_ready;
    while (keep < stream->n_ids && (stream->spans[keep].start < start || stream->spans[keep].end <= start))
        keep++;
    stream->n_dropped = (uint32_t)(stream->n_ids - keep);
    stream->n_ids = stream->n_ready = keep;
    stream->total = stream->ready = start;
}

// Lets go of the ids, and with them their text, that no stop string can reach any more.
static void release(struct token_stream *stream)
{
    uint32_t held = 0;
    for (uint32_t i = 0; i < stream->n_stops; i++) {
        const struct stop *stop = &stream->stops[i];
        uint32_t prefix = stop->matched == stop->length ? stop->fallback[stop->length] : stop->matched;
        if (held < prefix)
            held = prefix;
    }
    uint64_t safe = stream->total - held;
    for (size_t i = stream->n_ready; i < stream->n_ids && stream->spans[i].end <= safe; i++) {
        if (!stream->spans[i].open) {
            stream->n_ready = i + 1;
            stream->ready = stream->spans[i].end;
        }
    }
}

int token_stream_push(struct token_stream *stream, int32_t id)
{
    if (stream->match)
        return STATUS_INVALID;
    int status = reserve(stream);
    if (status)
        return status;
    uint64_t before = stream->total;
    if (stream->has_text) {
        int written = token_decoder_push(&stream->decoder, id, stream->text + (before - stream->base),
                                         stream->max_bytes);
        if (written < 0)
            return written;
        stream->total += (uint64_t)written;
    }
    bool open = stream->decoder.n_held > 0;
    // An open id reaches into the character that comes next, whatever its length.
    stream->spans[stream->n_ids] = (struct span){before, stream->total + open, open};
    stream->ids[stream->n_ids++] = id;
    stream->n_pushed++;
    uint64_t start;
    stream->match = find_stop(stream, before, &start);
    if (stream->match)
        cut(stream, start);
    else
        release(stream);
    return stream->match != NULL;
}

void token_stream_finish(struct token_stream *stream)
{
    if (stream->match)
        return;
    if (stream->decoder.n_held) // reserve() left room for it
        stream->total += (uint64_t)token_decoder_finish(
            &stream->decoder, stream->text + (stream->total - stream->base), FINISH_BYTES);
    stream->ready = stream->total;
    stream->n_ready = stream->n_ids;
}

bool token_stream_take(struct token_stream *stream, struct token_delta *delta)
{
    *delta = (struct token_delta){.text = ""};
    if (stream->n_ready == stream->n_taken && stream->ready == stream->taken)
        return false;
    delta->text = stream->text + (stream->taken - stream->base);
    delta->text_bytes = (size_t)(stream->ready - stream->taken);
    delta->ids = stream->ids + stream->n_taken;
    delta->n_ids = (uint32_t)(stream->n_ready - stream->n_taken);
    stream->taken = stream->ready;
    stream->n_taken = stream->n_ready;
    return true;
}

const char *token_stream_matched(const struct token_stream *stream, uint32_t *n_dropped)
{
    *n_dropped = stream->n_dropped;
    return stream->match ? stream->match->text : NULL;
}
