// Byte-level BPE. The vocabulary writes each byte as one of 256 printable characters (the GPT-2 code); here
// it is decoded to plain bytes once, so that text is merged as it comes. Pairs of strings merge by rank, the
// order of the model's merge list. A merge may make a string that is no token; such strings get numbers
// behind the tokens', and what is left of them at the end falls apart into bytes.
#include "common/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

#include "common/utf8.h"

// Code points below 256 that stand for themselves; the other 68 bytes follow from U+0100 on.
static bool stands_for_itself(unsigned c)
{
    return (c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF);
}

// The byte that a code point of the GPT-2 code means, -1 when it has none.
static int byte_of(unsigned code_point)
{
    if (code_point >= BYTE_CODE_POINTS)
        return -1;
    if (code_point < 256)
        return stands_for_itself(code_point) ? (int)code_point : -1;
    unsigned left = code_point - 256;
    for (unsigned byte = 0; byte < 256; byte++) {
        if (!stands_for_itself(byte) && left-- == 0)
            return (int)byte;
    }
    return -1;
}

void bpe_init_code(struct tokenizer *tokenizer)
{
    for (unsigned c = 0; c < BYTE_CODE_POINTS; c++)
        tokenizer->byte_code[c] = (int16_t)byte_of(c);
}

// Decodes the character at `text`: the byte it means, or -1 when it is not one of the 256.
static int code_next(const struct tokenizer *tokenizer, const unsigned char *text, size_t length,
                     size_t *taken)
{
    if (utf8_scan(text, length, taken) != UTF8_WHOLE || *taken > 2)
        return -1;
    unsigned c = *taken == 1 ? text[0] : (text[0] & 0x1Fu) << 6 | (text[1] & 0x3Fu);
    return c < BYTE_CODE_POINTS ? tokenizer->byte_code[c] : -1;
}

int bpe_append_bytes(struct tokenizer *tokenizer, const char *text, size_t length, bool *foreign)
{
    struct string_pool *pool = &tokenizer->pieces;
    *foreign = false;
    for (size_t at = 0, taken; at < length; at += taken) {
        int byte = code_next(tokenizer, (const unsigned char *)text + at, length - at, &taken);
        char one = (char)byte;
        *foreign |= byte < 0;
        int status =
            byte < 0 ? string_pool_append(pool, text + at, taken) : string_pool_append(pool, &one, 1);
        if (status)
            return status;
    }
    return 0;
}

// --- merges ---

// The pair's slot: where it is, or the free one where it belongs.
static struct merge_pair *pair_slot(const struct tokenizer *tokenizer, uint32_t left, uint32_t right)
{
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    for (size_t at = (hash ^ hash >> 32) & tokenizer->pair_mask;; at = (at + 1) & tokenizer->pair_mask) {
        struct merge_pair *pair = &tokenizer->pairs[at];
        if (pair->left == NO_STRING || (pair->left == left && pair->right == right))
            return pair;
    }
}

// Closes the string being built at the end of `pieces` and gives its number: an older one with the same bytes
// (the new one is taken back), or its own.
static int intern(struct tokenizer *tokenizer, uint32_t *number)
{
    struct string_pool *pool = &tokenizer->pieces;
    size_t start = pool->starts[pool->count], length = pool->used - start;
    *number = string_index_find(&tokenizer->index, pool->bytes + start, length);
    if (*number != NO_STRING) {
        pool->used = start;
        return 0;
    }
    int status = string_pool_end(pool);
    if (status)
        return status;
    *number = pool->count - 1;
    return string_index_put(&tokenizer->index, *number);
}

// One line of the merge list, "left right". Lines that cannot match any text are left out.
static int load_merge(struct tokenizer *tokenizer, struct gguf_string line, uint32_t rank)
{
    if (line.length < 3)
        return 0;
    const char *space = memchr(line.bytes + 1, ' ', line.length - 1);
    if (!space)
        return 0;
    struct string_pool *pool = &tokenizer->pieces;
    size_t left_length = (size_t)(space - line.bytes), right_length = line.length - left_length - 1;
    const struct {
        const char *bytes;
        size_t length;
    } parts[2] = {{line.bytes, left_length}, {space + 1, right_length}};
    uint32_t numbers[2];
    for (int i = 0; i < 2; i++) {
        bool foreign;
        int status = bpe_append_bytes(tokenizer, parts[i].bytes, parts[i].length, &foreign);
        if (status)
            return status;
        if (foreign || parts[i].length == 0) {
            pool->used = pool->starts[pool->count];
            return 0;
        }
        status = intern(tokenizer, &numbers[i]);
        if (status)
            return status;
    }
    for (int i = 0; i < 2; i++) {
        bool foreign;
        int status = bpe_append_bytes(tokenizer, parts[i].bytes, parts[i].length, &foreign);
        if (status)
            return status;
    }
    uint32_t merged;
    int status = intern(tokenizer, &merged);
    if (status)
        return status;
    struct merge_pair *pair = pair_slot(tokenizer, numbers[0], numbers[1]);
    if (pair->left == NO_STRING)
        *pair = (struct merge_pair){numbers[0], numbers[1], rank, merged};
    return 0;
}

int bpe_load_merges(struct tokenizer *tokenizer, const struct gguf_value *merges, struct error *error)
{
    size_t slots = 64;
    while (slots < merges->count * 2)
        slots *= 2;
    tokenizer->pairs = malloc(slots * sizeof(*tokenizer->pairs));
    if (!tokenizer->pairs)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the vocabulary's merges");
    tokenizer->pair_mask = slots - 1;
    for (size_t i = 0; i < slots; i++)
        tokenizer->pairs[i].left = NO_STRING;
    size_t cursor = 0;
    struct gguf_string line;
    for (uint32_t rank = 0; gguf_array_next_string(merges, &cursor, &line); rank++) {
        if (load_merge(tokenizer, line, rank))
            return error_set(error, STATUS_NO_MEMORY, "no memory for the vocabulary's merges");
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        char one = (char)byte;
        tokenizer->byte_symbols[byte] = string_index_find(&tokenizer->index, &one, 1);
    }
    return 0;
}

bool bpe_merges_make(const struct gguf_value *merges, const char *text, size_t length)
{
    size_t cursor = 0;
    struct gguf_string line;
    while (gguf_array_next_string(merges, &cursor, &line)) {
        if (line.length != length + 1)
            continue;
        const char *space = memchr(line.bytes + 1, ' ', line.length - 1);
        size_t left = space ? (size_t)(space - line.bytes) : 0;
        if (left && memcmp(line.bytes, text, left) == 0 && memcmp(space + 1, text + left, length - left) == 0)
            return true;
    }
    return false;
}

// --- encoding ---

static uint32_t bpe_rule(const struct tokenizer *tokenizer, const struct merge_node *left,
                         const struct merge_node *right, const char *bytes, size_t length, uint32_t *merged)
{
    (void)bytes;
    (void)length;
    if (left->symbol == NO_STRING || right->symbol == NO_STRING)
        return NO_RANK;
    const struct merge_pair *pair = pair_slot(tokenizer, left->symbol, right->symbol);
    if (pair->left == NO_STRING)
        return NO_RANK;
    *merged = pair->merged;
    return pair->rank;
}

static int emit_span(struct encode_job *job, uint32_t symbol, const char *bytes, size_t length)
{
    if (symbol < job->tokenizer->size)
        return token_list_push(job->out, (int32_t)symbol);
    for (size_t i = 0; i < length; i++) {
        int status = encode_byte(job, (unsigned char)bytes[i]);
        if (status)
            return status;
    }
    return 0;
}

static int encode_word(void *context, const char *bytes, size_t length)
{
    struct encode_job *job = context;
    const struct tokenizer *tokenizer = job->tokenizer;
    if (pre_tokenizer_traits(tokenizer->pre)->ignore_merges && length <= tokenizer->longest) {
        uint32_t whole = string_index_find(&tokenizer->index, bytes, length);
        if (whole < tokenizer->size)
            return token_list_push(job->out, (int32_t)whole);
    }
    struct merge_work *work = &job->work;
    int status = merge_reserve(work, length);
    if (status)
        return status;
    work->n_nodes = length;
    for (size_t i = 0; i < length; i++) {
        work->nodes[i].start = (uint32_t)i;
        work->nodes[i].symbol = tokenizer->byte_symbols[(unsigned char)bytes[i]];
    }
    merge_run(work, tokenizer, bytes, length, bpe_rule);
    for (size_t i = 0; i < length && !status;) {
        const struct merge_node *node = &work->nodes[i];
        size_t end = work->nodes[node->next].start;
        status = emit_span(job, node->symbol, bytes + node->start, end - node->start);
        i = node->next;
    }
    return status;
}

// Ill-formed bytes are no characters to the expressions: each run of them is a word of its own.
int bpe_encode(struct encode_job *job, const char *text, size_t length)
{
    int status = 0;
    for (size_t at = 0; at < length && !status;) {
        size_t good = utf8_valid_prefix(text + at, length - at);
        if (good)
            status = pre_tokenizer_split(job->tokenizer->pre, text + at, good, encode_word, job, job->error);
        at += good;
        size_t bad = 0, taken;
        while (at + bad < length && utf8_scan(text + at + bad, length - at - bad, &taken) != UTF8_WHOLE)
            bad += taken;
        if (bad && !status)
            status = encode_word(job, text + at, bad);
        at += bad;
    }
    return status;
}
