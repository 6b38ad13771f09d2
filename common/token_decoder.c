// From ids back to text, one id at a time. A token's bytes may end inside a UTF-8 character; those bytes wait
// for the next token, so only whole characters leave. Bytes that can no longer become a character leave as
// U+FFFD, one for each maximal ill-formed part. A decoder belongs to one thread.
#include <string.h>

#include "common/tokenizer_internal.h"
#include "common/utf8.h"

enum { REPLACEMENT_BYTES = 3 };

// What generating `id` adds to the text.
static const char *piece_of(const struct tokenizer *tokenizer, int32_t id, bool special, size_t *length)
{
    uint8_t kind = tokenizer->kinds[id];
    if (!special && (kind == TOKEN_CONTROL || kind == TOKEN_UNKNOWN)) {
        *length = 0;
        return "";
    }
    return string_pool_get(&tokenizer->pieces, (uint32_t)id, length);
}

static bool is_token(const struct tokenizer *tokenizer, int32_t id)
{
    return tokenizer->family != FAMILY_NONE && id >= 0 && (uint32_t)id < tokenizer->size;
}

void token_decoder_init(struct token_decoder *decoder, const struct tokenizer *tokenizer, bool special,
                        bool strip_space)
{
    *decoder = (struct token_decoder){
        .tokenizer = tokenizer, .special = special, .strip_space = strip_space && tokenizer->add_space};
}

size_t tokenizer_max_bytes(const struct tokenizer *tokenizer)
{
    // Each byte of the token may become a U+FFFD, and so may the bytes that waited.
    return ((size_t)tokenizer->longest + 1) * REPLACEMENT_BYTES + 1;
}

// Takes the bytes that waited and one byte more, as long as they are one unfinished character.
static size_t take_byte(struct token_decoder *decoder, unsigned char byte, char *out)
{
    size_t taken, written = 0;
    decoder->held[decoder->n_held++] = byte;
    while (decoder->n_held) {
        enum utf8_kind kind = utf8_scan(decoder->held, decoder->n_held, &taken);
        if (kind == UTF8_PARTIAL)
            break;
        if (kind == UTF8_WHOLE) {
            memcpy(out + written, decoder->held, taken);
            written += taken;
        } else {
            memcpy(out + written, UTF8_REPLACEMENT, REPLACEMENT_BYTES);
            written += REPLACEMENT_BYTES;
        }
        decoder->n_held -= (uint32_t)taken;
        memmove(decoder->held, decoder->held + taken, decoder->n_held);
    }
    return written;
}

int token_decoder_push(struct token_decoder *decoder, int32_t id, char *out, size_t capacity)
{
    if (!is_token(decoder->tokenizer, id))
        return decoder->tokenizer->family == FAMILY_NONE ? STATUS_UNSUPPORTED : STATUS_INVALID;
    size_t length;
    const char *piece = piece_of(decoder->tokenizer, id, decoder->special, &length);
    if (capacity < (length + 1) * REPLACEMENT_BYTES + 1 && capacity < tokenizer_max_bytes(decoder->tokenizer))
        return STATUS_EXHAUSTED;
    size_t at = 0, written = 0;
    if (decoder->strip_space && length) {
        at = piece[0] == ' ';
        decoder->strip_space = false;
    }
    while (at < length) {
        size_t whole = decoder->n_held ? 0 : utf8_valid_prefix(piece + at, length - at);
        memcpy(out + written, piece + at, whole);
        written += whole;
        at += whole;
        if (at < length)
            written += take_byte(decoder, (unsigned char)piece[at++], out + written);
    }
    return (int)written;
}

int token_decoder_finish(struct token_decoder *decoder, char *out, size_t capacity)
{
    if (decoder->n_held == 0)
        return 0;
    if (capacity < REPLACEMENT_BYTES)
        return STATUS_EXHAUSTED;
    decoder->n_held = 0;
    memcpy(out, UTF8_REPLACEMENT, REPLACEMENT_BYTES);
    return REPLACEMENT_BYTES;
}

int tokenizer_token_text(const struct tokenizer *tokenizer, int32_t id, bool special, char *out,
                         size_t capacity)
{
    if (!is_token(tokenizer, id))
        return tokenizer->family == FAMILY_NONE ? STATUS_UNSUPPORTED : STATUS_INVALID;
    size_t length;
    const char *piece = piece_of(tokenizer, id, special, &length);
    if (length > capacity)
        return STATUS_EXHAUSTED;
    memcpy(out, piece, length);
    return (int)length;
}
