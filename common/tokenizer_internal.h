// What the tokenizer's parts share. Everything in a `struct tokenizer` is written by tokenizer_load.c and
// read-only afterwards; an `encode_job` lives for one call of tokenizer_encode.
#ifndef STRATA_TOKENIZER_INTERNAL_H
#define STRATA_TOKENIZER_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/limits.h"
#include "common/status.h"
#include "common/tokenizer.h"

// --- strings by number (string_pool.c) ---

struct string_pool {
    char *bytes;
    size_t used, capacity;
    uint32_t *starts; // [count + 1]
    uint32_t count, room;
};

int string_pool_add(struct string_pool *pool, const void *bytes, size_t length);
// Appends to the string that is being built; string_pool_end closes it. string_pool_add does both.
int string_pool_append(struct string_pool *pool, const void *bytes, size_t length);
int string_pool_end(struct string_pool *pool);
void string_pool_free(struct string_pool *pool);

static inline const char *string_pool_get(const struct string_pool *pool, uint32_t number, size_t *length)
{
    *length = pool->starts[number + 1] - pool->starts[number];
    return pool->bytes + pool->starts[number];
}

#define NO_STRING UINT32_MAX

// From bytes to the number of a string in a pool. Open addressing, at most half full.
struct string_index {
    const struct string_pool *pool;
    struct string_slot {
        uint32_t number; // NO_STRING = free
        uint32_t tag;    // the other half of the hash
    } * slots;
    size_t mask;
    uint32_t count;
};

int string_index_init(struct string_index *index, const struct string_pool *pool);
void string_index_free(struct string_index *index);
// The number under which these bytes were put first, NO_STRING when never.
uint32_t string_index_find(const struct string_index *index, const void *bytes, size_t length);
int string_index_put(struct string_index *index, uint32_t number); // does nothing when the bytes are there

// --- merging (tokenizer_merge.c) ---

#define NO_RANK UINT32_MAX

struct merge_node {
    uint32_t prev, next; // neighbours alive; UINT32_MAX before the first, the sentinel behind the last
    uint32_t start;      // offset of its first byte in the word
    uint32_t symbol;     // what it is: a string of `pieces`, NO_STRING = not in the vocabulary
    uint32_t rank;       // of merging it with the next node; NO_RANK = they do not merge, or it is gone
    uint32_t merged;     // what that merge gives
};

struct merge_work { // grows, never shrinks; zero-initialize
    struct merge_node *nodes;
    size_t n_nodes, node_capacity; // n_nodes without the sentinel
    uint64_t *heap;                // rank << 32 | node
    size_t n_heap, heap_capacity;
};

// The rank at which the neighbours `left` and `right` merge (lower goes first) and what they become; NO_RANK
// when they do not. `bytes` is the text of both together.
typedef uint32_t merge_rule(const struct tokenizer *tokenizer, const struct merge_node *left,
                            const struct merge_node *right, const char *bytes, size_t length,
                            uint32_t *merged);

// Room for `n` nodes and their sentinel. STATUS_NO_MEMORY or 0.
int merge_reserve(struct merge_work *work, size_t n);
// Merges the nodes 0..n_nodes-1 (with start and symbol set) of `word` until nothing merges: lowest rank
// first, leftmost among equals. What is left is the chain from node 0 along `next` to node n_nodes.
void merge_run(struct merge_work *work, const struct tokenizer *tokenizer, const char *word, size_t length,
               merge_rule *rule);
void merge_free(struct merge_work *work);

// --- pre-tokenizers (tokenizer_pre.c) ---

struct pre_tokenizer; // compiled expressions, immutable

struct pre_traits { // what else the name of a pre-tokenizer says
    const char *name;
    bool ignore_merges; // a word that is a token is that token
    bool add_bos;       // unless the metadata says otherwise
};

int pre_tokenizer_new(struct pre_tokenizer **out, const char *name, size_t length, struct error *error);
void pre_tokenizer_free(struct pre_tokenizer *pre);
const struct pre_traits *pre_tokenizer_traits(const struct pre_tokenizer *pre);
// Calls `word` for each word of well-formed UTF-8, in order; together they are the text. Stops at the first
// negative result and returns it.
int pre_tokenizer_split(const struct pre_tokenizer *pre, const char *text, size_t length,
                        int (*word)(void *context, const char *bytes, size_t length), void *context,
                        struct error *error);

// --- the tokenizer ---

enum tokenizer_family { FAMILY_NONE, FAMILY_BPE, FAMILY_SPM };

enum { BYTE_CODE_POINTS = 256 + 68 };

struct merge_pair {
    uint32_t left, right; // strings of `pieces`; left NO_STRING = free slot
    uint32_t rank, merged;
};

struct special_list { // sorted by text
    int32_t *ids;
    size_t count;
    bool starts[256]; // first bytes that occur
};

struct tokenizer {
    enum tokenizer_family family;
    uint32_t size;
    int32_t bos, eos, unknown;
    bool add_bos, add_eos;
    bool add_space;   // SentencePiece: a space in front of the text and behind special tokens
    bool strip_right; // special tokens swallow the white space behind them (Phi-3)
    uint8_t *kinds;   // [size]
    int32_t end_tokens[MAX_END_TOKENS];
    size_t n_end_tokens;
    struct string_pool texts;  // [size] as the file has them
    struct string_pool pieces; // [size] what a token decodes to, then strings that only merges name
    struct string_index index; // pieces that ordinary text may become
    uint32_t longest;          // bytes of the longest piece
    int32_t byte_tokens[256];  // the token of each byte, -1 = none
    struct special_list special, user_defined; // matched in text: always only the second
    // byte-level BPE
    int16_t byte_code[BYTE_CODE_POINTS]; // from a code point of the GPT-2 code to its byte, -1 = none
    uint32_t byte_symbols[256];          // the string of each single byte
    struct pre_tokenizer *pre;
    struct merge_pair *pairs; // open addressing, at most half full
    size_t pair_mask;
    // SentencePiece
    uint32_t *ranks; // [size] order of the scores, best first
    bool has_words;  // no piece has a space behind another character
};

// tokenizer_load.c
int tokenizer_load(struct tokenizer *tokenizer, const struct gguf *gguf, struct error *error);
// The end markers of all models by their texts (tokenizer_special.c).
bool special_is_end_text(const char *text, size_t length);
int special_list_build(struct special_list *list, const struct tokenizer *tokenizer, bool only_user_defined);
void special_list_free(struct special_list *list);
// The longest special token that `text` starts with, -1 when none.
int32_t special_list_match(const struct special_list *list, const struct tokenizer *tokenizer,
                           const char *text, size_t length);

struct encode_job {
    const struct tokenizer *tokenizer;
    struct token_list *out;
    struct error *error;
    struct merge_work work;
    char *escaped; // SentencePiece: the text with its spaces written as U+2581
    size_t escaped_capacity;
};

// One byte that no larger token covers: its byte token, or the unknown token, or nothing.
int encode_byte(struct encode_job *job, unsigned char byte);

// tokenizer_bpe.c
int bpe_load_merges(struct tokenizer *tokenizer, const struct gguf_value *merges, struct error *error);
// Whether ordinary text can merge into this token text (both byte-level).
bool bpe_merges_make(const struct gguf_value *merges, const char *text, size_t length);
int bpe_encode(struct encode_job *job, const char *text, size_t length);
void bpe_init_code(struct tokenizer *tokenizer);
// Appends the bytes that byte-level text stands for to the string being built in `pieces`. *foreign when it
// has characters outside the 256 of the code, which are appended as they are.
int bpe_append_bytes(struct tokenizer *tokenizer, const char *text, size_t length, bool *foreign);

// tokenizer_spm.c
int spm_load_scores(struct tokenizer *tokenizer, const struct gguf_value *scores, struct error *error);
int spm_encode(struct encode_job *job, const char *text, size_t length, bool space_in_front);
// Appends a piece with U+2581 turned back into spaces.
int spm_append_bytes(struct tokenizer *tokenizer, const char *text, size_t length);

#endif
