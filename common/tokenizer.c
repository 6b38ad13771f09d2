// The tokenizer's front: making one, asking it, and encoding. Encoding cuts the text at special tokens and
// hands what lies between to the family's part. Nothing here writes to a tokenizer once it is made, so any
// thread may use it.
#include "common/tokenizer_internal.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "common/utf8.h"

int tokenizer_new(struct tokenizer **out, const struct gguf *gguf, struct error *error)
{
    struct tokenizer *tokenizer = calloc(1, sizeof(*tokenizer));
    if (!tokenizer)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the tokenizer");
    int status = tokenizer_load(tokenizer, gguf, error);
    if (status) {
        tokenizer_free(tokenizer);
        return status;
    }
    *out = tokenizer;
    return 0;
}

void tokenizer_free(struct tokenizer *tokenizer)
{
    if (!tokenizer)
        return;
    string_pool_free(&tokenizer->texts);
    string_pool_free(&tokenizer->pieces);
    string_index_free(&tokenizer->index);
    special_list_free(&tokenizer->special);
    special_list_free(&tokenizer->user_defined);
    pre_tokenizer_free(tokenizer->pre);
    free(tokenizer->kinds);
    free(tokenizer->pairs);
    free(tokenizer->ranks);
    free(tokenizer);
}

bool tokenizer_has_text(const struct tokenizer *tokenizer)
{
    return tokenizer->family != FAMILY_NONE;
}

const char *tokenizer_model(const struct tokenizer *tokenizer)
{
    static const char *const names[] = {
        [FAMILY_NONE] = "none", [FAMILY_BPE] = "gpt2", [FAMILY_SPM] = "llama"};
    return names[tokenizer->family];
}

const char *tokenizer_pre(const struct tokenizer *tokenizer)
{
    return tokenizer->pre ? pre_tokenizer_traits(tokenizer->pre)->name : "";
}

uint32_t tokenizer_size(const struct tokenizer *tokenizer)
{
    return tokenizer->size;
}

enum token_kind tokenizer_token(const struct tokenizer *tokenizer, int32_t id, const char **bytes,
                                size_t *length)
{
    *bytes = "";
    *length = 0;
    if (id < 0 || (uint32_t)id >= tokenizer->size)
        return (enum token_kind)0;
    if (tokenizer->family == FAMILY_NONE)
        return TOKEN_NORMAL;
    *bytes = string_pool_get(&tokenizer->texts, (uint32_t)id, length);
    return (enum token_kind)tokenizer->kinds[id];
}

int32_t tokenizer_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t tokenizer_eos(const struct tokenizer *tokenizer)
{
    return tokenizer->eos;
}

bool tokenizer_adds_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->add_bos;
}

bool tokenizer_adds_eos(const struct tokenizer *tokenizer)
{
    return tokenizer->add_eos;
}

const int32_t *tokenizer_end_tokens(const struct tokenizer *tokenizer, size_t *count)
{
    *count = tokenizer->n_end_tokens;
    return tokenizer->end_tokens;
}

// --- lists of ids ---

void token_list_free(struct token_list *list)
{
    free(list->ids);
    *list = (struct token_list){0};
}

int token_list_push(struct token_list *list, int32_t id)
{
    if (list->count == list->capacity) {
        size_t wanted = list->capacity ? list->capacity * 2 : 64;
        int32_t *ids = realloc(list->ids, wanted * sizeof(*ids));
        if (!ids)
            return STATUS_NO_MEMORY;
        list->ids = ids;
        list->capacity = wanted;
    }
    list->ids[list->count++] = id;
    return 0;
}

// --- encoding ---

int encode_byte(struct encode_job *job, unsigned char byte)
{
    const struct tokenizer *tokenizer = job->tokenizer;
    int32_t id = tokenizer->byte_tokens[byte];
    // Some vocabularies call a control token their unknown one. No text may become that.
    if (id < 0 && tokenizer->unknown >= 0 && tokenizer->kinds[tokenizer->unknown] != TOKEN_CONTROL)
        id = tokenizer->unknown;
    return id < 0 ? 0 : token_list_push(job->out, id);
}

static int encode_plain(struct encode_job *job, const char *text, size_t length, bool after_special)
{
    if (length == 0)
        return 0;
    if (job->tokenizer->family == FAMILY_BPE)
        return bpe_encode(job, text, length);
    return spm_encode(job, text, length, job->tokenizer->add_space && after_special);
}

// Phi-3's special tokens take the white space behind them along, but for these.
static bool strips_right(const struct tokenizer *tokenizer, int32_t id)
{
    static const char *const not_these[] = {"<unk>", "<s>", "<|endoftext|>"};
    if (!tokenizer->strip_right)
        return false;
    size_t length;
    const char *text = string_pool_get(&tokenizer->texts, (uint32_t)id, &length);
    for (size_t i = 0; i < sizeof(not_these) / sizeof(not_these[0]); i++) {
        if (strlen(not_these[i]) == length && memcmp(not_these[i], text, length) == 0)
            return false;
    }
    return true;
}

// Cuts the text at special tokens: the leftmost one, the longest of those that start there.
static int encode_text(struct encode_job *job, const char *text, size_t length, bool special)
{
    const struct tokenizer *tokenizer = job->tokenizer;
    const struct special_list *list = special ? &tokenizer->special : &tokenizer->user_defined;
    bool after_special = true;
    size_t done = 0;
    for (size_t at = 0; at < length && list->count;) {
        int32_t id = special_list_match(list, tokenizer, text + at, length - at);
        if (id < 0) {
            at++;
            continue;
        }
        int status = encode_plain(job, text + done, at - done, after_special);
        if (!status)
            status = token_list_push(job->out, id);
        if (status)
            return status;
        size_t token_length;
        string_pool_get(&tokenizer->texts, (uint32_t)id, &token_length);
        at += token_length;
        while (at < length && strips_right(tokenizer, id) && isspace((unsigned char)text[at]))
            at++;
        done = at;
        after_special = true;
    }
    return encode_plain(job, text + done, length - done, after_special);
}

int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t length, unsigned flags,
                     struct token_list *list, struct error *error)
{
    if (tokenizer->family == FAMILY_NONE)
        return error_set(error, STATUS_UNSUPPORTED, "this model has no vocabulary: give token ids, not text");
    struct encode_job job = {.tokenizer = tokenizer, .out = list, .error = error};
    size_t before = list->count;
    int status = 0;
    if ((flags & ENCODE_ADD_SPECIAL) && tokenizer->add_bos)
        status = token_list_push(list, tokenizer->bos);
    if (!status)
        status = encode_text(&job, text, length, flags & ENCODE_SPECIAL);
    if (!status && (flags & ENCODE_ADD_SPECIAL) && tokenizer->add_eos)
        status = token_list_push(list, tokenizer->eos);
    merge_free(&job.work);
    free(job.escaped);
    if (status)
        list->count = before;
    if (status == STATUS_NO_MEMORY)
        error_set(error, status, "no memory to tokenize %zu bytes of text", length);
    return status;
}
