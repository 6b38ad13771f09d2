// Text to token ids and back: byte-level BPE ("gpt2" models) and SentencePiece-style ("llama" models), as the
// GGUF metadata describes them. A tokenizer is immutable once made and may be used by any thread at once; a
// decoder is owned by one thread.
#ifndef STRATA_TOKENIZER_H
#define STRATA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/gguf.h"
#include "common/status.h"

struct tokenizer;

enum token_kind { // as GGUF's tokenizer.ggml.token_type numbers them
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_USER_DEFINED = 4,
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6
};

// Copies what it needs from the metadata. tokenizer.ggml.model "none" gives a tokenizer that knows ids only:
// encode and decode then fail with STATUS_UNSUPPORTED. An unknown model or pre-tokenizer is refused by name.
int tokenizer_new(struct tokenizer **out, const struct gguf *gguf, struct error *error);
void tokenizer_free(struct tokenizer *tokenizer);

bool tokenizer_has_text(const struct tokenizer *tokenizer);     // false for model "none"
const char *tokenizer_model(const struct tokenizer *tokenizer); // "gpt2", "llama", "none"
const char *tokenizer_pre(const struct tokenizer *tokenizer);   // "smollm"; "" when the model has none
uint32_t tokenizer_size(const struct tokenizer *tokenizer);

// The raw vocabulary entry (byte-level text for BPE): points into the tokenizer. Kind 0 when the id is out of
// range.
enum token_kind tokenizer_token(const struct tokenizer *tokenizer, int32_t id, const char **bytes,
                                size_t *length);
int32_t tokenizer_bos(const struct tokenizer *tokenizer); // -1 when the model has none
int32_t tokenizer_eos(const struct tokenizer *tokenizer); // -1 when the model has none
bool tokenizer_adds_bos(const struct tokenizer *tokenizer);
bool tokenizer_adds_eos(const struct tokenizer *tokenizer);
// Every end-of-generation token: EOS, EOT, EOM ids of the metadata, and control tokens whose text is a known
// end marker. Sorted ascending, at most MAX_END_TOKENS. Points into the tokenizer.
const int32_t *tokenizer_end_tokens(const struct tokenizer *tokenizer, size_t *count);

struct token_list { // grows as needed; zero-initialize; free with token_list_free
    int32_t *ids;
    size_t count, capacity;
};
void token_list_free(struct token_list *list);
int token_list_push(struct token_list *list, int32_t id); // STATUS_NO_MEMORY or 0

enum {
    ENCODE_SPECIAL = 1,     // special tokens written out in the text become their ids
    ENCODE_ADD_SPECIAL = 2, // BOS in front / EOS behind where the model asks for them
};
// Appends the ids of `text` (UTF-8; ill-formed bytes are kept as bytes, never undefined behaviour) to `list`.
// A byte for which the vocabulary has neither a token nor an unknown token is left out, as the models' own
// tools do.
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t length, unsigned flags,
                     struct token_list *list, struct error *error);

// Incremental decoding: each id adds its bytes; only whole UTF-8 characters come out. A byte sequence that
// can no longer become a character comes out as U+FFFD.
struct token_decoder {
    const struct tokenizer *tokenizer;
    bool special;     // control tokens come out as their text; otherwise as nothing
    bool strip_space; // SentencePiece: drop the leading space of the very first token (a prompt's own prefix)
    unsigned char held[4];
    uint32_t n_held; // bytes of an unfinished character
};
void token_decoder_init(struct token_decoder *decoder, const struct tokenizer *tokenizer, bool special,
                        bool strip_space);
// Writes what is whole, at most `capacity` bytes; a token never gives more than tokenizer_max_bytes().
// Returns the bytes written, or STATUS_INVALID for an id out of range.
int token_decoder_push(struct token_decoder *decoder, int32_t id, char *out, size_t capacity);
// The end: an unfinished character becomes U+FFFD. Returns the bytes written (0 or 3).
int token_decoder_finish(struct token_decoder *decoder, char *out, size_t capacity);
size_t tokenizer_max_bytes(const struct tokenizer *tokenizer); // the longest output of one push
// Raw bytes of one token as generation would emit them (for logprob reports): bytes written.
int tokenizer_token_text(const struct tokenizer *tokenizer, int32_t id, bool special, char *out,
                         size_t capacity);

#endif
