// SentencePiece-style tokenization ("llama" models). Spaces are written as U+2581, then neighbouring
// characters merge wherever both together are a piece of the vocabulary, the best score first. Characters
// that are no piece come out as their bytes' tokens.
//
// The method knows no words. But where no piece has a space behind another character, nothing merges across
// the front of a space, and going word by word gives the same pieces sooner and in less memory.
#include "common/tokenizer_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/utf8.h"

#define SPACE_MARK "\xE2\x96\x81" // U+2581
enum { SPACE_MARK_BYTES = 3 };

int spm_append_bytes(struct tokenizer *tokenizer, const char *text, size_t length)
{
    int status = 0;
    for (size_t at = 0; at < length && !status;) {
        const char *mark = memmem(text + at, length - at, SPACE_MARK, SPACE_MARK_BYTES);
        size_t plain = mark ? (size_t)(mark - text) - at : length - at;
        status = string_pool_append(&tokenizer->pieces, text + at, plain);
        at += plain;
        if (mark && !status) {
            status = string_pool_append(&tokenizer->pieces, " ", 1);
            at += SPACE_MARK_BYTES;
        }
    }
    return status;
}

// Numbers that sort as the scores do, the highest score first. Never NO_RANK: that would be a NaN.
static uint32_t rank_of(float score)
{
    uint32_t bits;
    score += 0.0f; // -0 and 0 are one score
    memcpy(&bits, &score, sizeof(bits));
    uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return ~ascending;
}

// Whether a piece has a space mark behind something else.
static bool crosses_space(const char *text, size_t length)
{
    size_t at = 0;
    while (length - at >= SPACE_MARK_BYTES && memcmp(text + at, SPACE_MARK, SPACE_MARK_BYTES) == 0)
        at += SPACE_MARK_BYTES;
    return memmem(text + at, length - at, SPACE_MARK, SPACE_MARK_BYTES) != NULL;
}

int spm_load_scores(struct tokenizer *tokenizer, const struct gguf_value *scores, struct error *error)
{
    tokenizer->ranks = malloc(tokenizer->size * sizeof(*tokenizer->ranks));
    if (!tokenizer->ranks)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the vocabulary's scores");
    for (uint32_t id = 0; id < tokenizer->size; id++) {
        double score = scores ? gguf_array_float(scores, id) : 0;
        if (isnan(score))
            return error_set(error, STATUS_CORRUPT, "tokenizer.ggml.scores: token %u has no number", id);
        tokenizer->ranks[id] = rank_of((float)score);
    }
    tokenizer->has_words = true;
    for (uint32_t id = 0; id < tokenizer->size; id++) {
        size_t length;
        const char *text = string_pool_get(&tokenizer->texts, id, &length);
        tokenizer->has_words &= !crosses_space(text, length);
    }
    return 0;
}

static uint32_t find_piece(const struct tokenizer *tokenizer, const char *bytes, size_t length)
{
    return length <= tokenizer->longest ? string_index_find(&tokenizer->index, bytes, length) : NO_STRING;
}

static uint32_t spm_rule(const struct tokenizer *tokenizer, const struct merge_node *left,
                         const struct merge_node *right, const char *bytes, size_t length, uint32_t *merged)
{
    (void)left;
    (void)right;
    *merged = find_piece(tokenizer, bytes, length);
    return *merged == NO_STRING ? NO_RANK : tokenizer->ranks[*merged];
}

// Writes the text with its spaces marked into the job's buffer. Returns its length, or STATUS_NO_MEMORY.
static int64_t escape(struct encode_job *job, const char *text, size_t length, bool space_in_front)
{
    size_t spaces = space_in_front;
    for (size_t i = 0; i < length; i++)
        spaces += text[i] == ' ';
    size_t need = length + spaces * SPACE_MARK_BYTES;
    if (need > job->escaped_capacity) {
        char *bigger = realloc(job->escaped, need);
        if (!bigger)
            return STATUS_NO_MEMORY;
        job->escaped = bigger;
        job->escaped_capacity = need;
    }
    char *out = job->escaped;
    if (space_in_front)
        out = mempcpy(out, SPACE_MARK, SPACE_MARK_BYTES);
    for (size_t i = 0; i < length; i++) {
        if (text[i] == ' ')
            out = mempcpy(out, SPACE_MARK, SPACE_MARK_BYTES);
        else
            *out++ = text[i];
    }
    return out - job->escaped;
}

// One node a character; a byte of an ill-formed sequence is a node of its own.
static void split_characters(struct merge_work *work, const struct tokenizer *tokenizer, const char *bytes,
                             size_t length)
{
    work->n_nodes = 0;
    for (size_t at = 0, taken; at < length; at += taken) {
        if (utf8_scan(bytes + at, length - at, &taken) != UTF8_WHOLE)
            taken = 1;
        struct merge_node *node = &work->nodes[work->n_nodes++];
        node->start = (uint32_t)at;
        node->symbol = find_piece(tokenizer, bytes + at, taken);
    }
}

static int emit(struct encode_job *job, const struct merge_node *node, const char *word, size_t end)
{
    if (node->symbol != NO_STRING)
        return token_list_push(job->out, (int32_t)node->symbol);
    for (size_t i = node->start; i < end; i++) {
        int status = encode_byte(job, (unsigned char)word[i]);
        if (status)
            return status;
    }
    return 0;
}

static int encode_word(struct encode_job *job, const char *word, size_t length)
{
    struct merge_work *work = &job->work;
    int status = merge_reserve(work, length);
    if (status)
        return status;
    split_characters(work, job->tokenizer, word, length);
    merge_run(work, job->tokenizer, word, length, spm_rule);
    for (size_t i = 0; i < work->n_nodes && !status; i = work->nodes[i].next)
        status = emit(job, &work->nodes[i], word, work->nodes[work->nodes[i].next].start);
    return status;
}

// Where the word ends that starts at `text`: in front of the first space mark behind another character.
static size_t word_length(const struct tokenizer *tokenizer, const char *text, size_t length)
{
    if (!tokenizer->has_words)
        return length;
    size_t at = 0;
    while (length - at >= SPACE_MARK_BYTES && memcmp(text + at, SPACE_MARK, SPACE_MARK_BYTES) == 0)
        at += SPACE_MARK_BYTES;
    const char *mark = memmem(text + at, length - at, SPACE_MARK, SPACE_MARK_BYTES);
    return mark ? (size_t)(mark - text) : length;
}

int spm_encode(struct encode_job *job, const char *text, size_t length, bool space_in_front)
{
    int64_t escaped = escape(job, text, length, space_in_front);
    if (escaped < 0)
        return (int)escaped;
    int status = 0;
    for (size_t at = 0; at < (size_t)escaped && !status;) {
        size_t word = word_length(job->tokenizer, job->escaped + at, (size_t)escaped - at);
        status = encode_word(job, job->escaped + at, word);
        at += word;
    }
    return status;
}
