// Vocabularies for tests: two small ones made here, and real ones from files.
#ifndef STRATA_TESTS_VOCABULARY_H
#define STRATA_TESTS_VOCABULARY_H

#include <stdbool.h>

#include "common/tokenizer.h"
#include "tests/gguf_writer.h"

// A byte-level BPE vocabulary: token i is byte i for i < 256, then what small_merges make, in order, then the
// special tokens. The values are in `writer`, to be changed or finished by the caller.
void small_bpe_write(struct gguf_writer *writer, const char *pre);
// Pairs in the vocabulary's own writing ("\u0120w or").
extern const char *const small_merges[];
extern const uint32_t small_merge_count;
enum { SMALL_SPECIALS = 5 };
// <|start|> (control), <|im_end|> (control), <tool> (user defined), <tool_call> (user defined), <pad>
// (unused)
extern const char *const small_specials[SMALL_SPECIALS];
// The byte-level writing of a byte, NUL-terminated.
const char *byte_level(unsigned char byte, char out[3]);

// A SentencePiece-style vocabulary: <unk>, <s>, </s>, 256 byte tokens, then small_pieces with their scores.
void small_spm_write(struct gguf_writer *writer);
struct small_piece {
    const char *text;
    float score;
    int kind;
};
extern const struct small_piece small_pieces[];
extern const uint32_t small_piece_count;
enum { SMALL_FIRST_PIECE = 3 + 256 };

// A tokenizer from what the writer holds; the test fails when it is refused.
struct tokenizer *tokenizer_from(struct gguf_writer *writer);

// tests/fixtures/NAME.gguf.gz, or ../shared/vocab/NAME.gguf beside the checkout; NULL when neither is there.
struct tokenizer *tokenizer_from_fixture(const char *name);
// The whole file beside that vocabulary (NAME.inp, NAME.out); NULL when it is not there. To be freed.
char *fixture_text(const char *name, const char *suffix, size_t *length);

#endif
