// From GGUF metadata to a tokenizer. Nothing of the metadata is trusted: counts, kinds and ids are checked
// before use, and what does not fit is refused with the key's name. Strings are copied, so the file may be
// closed afterwards.
#include "common/tokenizer_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool string_is(struct gguf_string string, const char *text)
{
    return string.length == strlen(text) && memcmp(string.bytes, text, string.length) == 0;
}

static int no_memory(struct error *error)
{
    return error_set(error, STATUS_NO_MEMORY, "no memory for the vocabulary");
}

// A string that may be absent ("" then).
static int get_string(const struct gguf *gguf, const char *key, struct gguf_string *out, struct error *error)
{
    *out = (struct gguf_string){"", 0};
    int status = gguf_get_string(gguf, key, out, error);
    return status == STATUS_NOT_FOUND ? 0 : status;
}

static int get_bool(const struct gguf *gguf, const char *key, bool *out, struct error *error)
{
    int status = gguf_get_bool(gguf, key, out, error);
    return status == STATUS_NOT_FOUND ? 0 : status;
}

// A token id that may be absent (*out untouched then). 2^32 - 1 means none.
static int get_id(const struct gguf *gguf, const char *key, uint32_t size, int32_t *out, struct error *error)
{
    uint32_t id;
    int status = gguf_get_u32(gguf, key, &id, error);
    if (status)
        return status == STATUS_NOT_FOUND ? 0 : status;
    if (id != UINT32_MAX && id >= size)
        return error_set(error, STATUS_CORRUPT, "%s is %u, but the vocabulary has %u tokens", key, id, size);
    *out = id == UINT32_MAX ? -1 : (int32_t)id;
    return 0;
}

// An array of one kind; NULL with a status when it is absent and required, or something else.
static int get_array(const struct gguf *gguf, const char *key, bool strings, const struct gguf_value **out,
                     struct error *error)
{
    const struct gguf_value *value = gguf_find(gguf, key);
    *out = NULL;
    if (!value)
        return STATUS_NOT_FOUND;
    if (!value->is_array || value->nested || (value->kind == GGUF_STRING) != strings)
        return error_set(error, STATUS_CORRUPT, "%s is not an array of %s", key,
                         strings ? "strings" : "numbers");
    *out = value;
    return 0;
}

static int get_strings(const struct gguf *gguf, const char *key, uint64_t limit,
                       const struct gguf_value **out, struct error *error)
{
    int status = get_array(gguf, key, true, out, error);
    if (status == STATUS_NOT_FOUND)
        return error_set(error, STATUS_CORRUPT, "the model has no %s", key);
    if (!status && (*out)->count > limit)
        return error_set(error, STATUS_CORRUPT, "%s has %llu entries, more than %llu", key,
                         (unsigned long long)(*out)->count, (unsigned long long)limit);
    return status;
}

// An array with one number for each token; *out is NULL when it is absent.
static int get_numbers(const struct gguf *gguf, const char *key, uint32_t size, const struct gguf_value **out,
                       struct error *error)
{
    int status = get_array(gguf, key, false, out, error);
    if (status == STATUS_NOT_FOUND)
        return 0;
    if (!status && (*out)->count < size)
        return error_set(error, STATUS_CORRUPT, "%s has %llu entries for %u tokens", key,
                         (unsigned long long)(*out)->count, size);
    return status;
}

// A model without a vocabulary: only how many ids there are.
static int load_nameless(struct tokenizer *tokenizer, const struct gguf *gguf, struct error *error)
{
    tokenizer->family = FAMILY_NONE;
    struct gguf_string architecture;
    int status = get_string(gguf, "general.architecture", &architecture, error);
    if (status)
        return status;
    char key[128];
    snprintf(key, sizeof(key), "%.*s.vocab_size", (int)(architecture.length < 64 ? architecture.length : 64),
             architecture.bytes);
    uint32_t size = 0;
    status = gguf_get_u32(gguf, key, &size, error);
    if (status && status != STATUS_NOT_FOUND)
        return status;
    const struct gguf_tensor *embedding = gguf_find_tensor(gguf, "token_embd.weight");
    uint64_t ids = status == STATUS_NOT_FOUND && embedding ? embedding->dims[1] : size;
    if (ids > MAX_VOCABULARY)
        return error_set(error, STATUS_CORRUPT, "a vocabulary of %llu tokens is more than %d",
                         (unsigned long long)ids, MAX_VOCABULARY);
    tokenizer->size = (uint32_t)ids;
    return 0;
}

static int load_texts(struct tokenizer *tokenizer, const struct gguf_value *tokens, struct error *error)
{
    size_t cursor = 0;
    struct gguf_string text;
    while (gguf_array_next_string(tokens, &cursor, &text)) {
        if (text.length > MAX_TOKEN_BYTES)
            return error_set(error, STATUS_CORRUPT, "token %u has %zu bytes, more than %d",
                             tokenizer->texts.count, text.length, MAX_TOKEN_BYTES);
        if (string_pool_add(&tokenizer->texts, text.bytes, text.length))
            return no_memory(error);
    }
    tokenizer->size = tokenizer->texts.count;
    if (tokenizer->size == 0 || tokenizer->size != tokens->count)
        return error_set(error, STATUS_CORRUPT, "tokenizer.ggml.tokens is empty or cut short");
    return 0;
}

static int load_kinds(struct tokenizer *tokenizer, const struct gguf *gguf, struct error *error)
{
    const struct gguf_value *types;
    int status = get_numbers(gguf, "tokenizer.ggml.token_type", tokenizer->size, &types, error);
    if (status)
        return status;
    tokenizer->kinds = malloc(tokenizer->size);
    if (!tokenizer->kinds)
        return no_memory(error);
    for (uint32_t id = 0; id < tokenizer->size; id++) {
        int64_t kind = types ? gguf_array_int(types, id) : TOKEN_NORMAL;
        if (kind < 0 || kind > TOKEN_BYTE)
            return error_set(error, STATUS_CORRUPT, "tokenizer.ggml.token_type of token %u is %lld", id,
                             (long long)kind);
        tokenizer->kinds[id] = kind == 0 ? TOKEN_UNUSED : (uint8_t)kind; // 0: "undefined"
    }
    return 0;
}

// --- special tokens ---

static int add_end_token(struct tokenizer *tokenizer, int32_t id, struct error *error)
{
    size_t at = 0;
    while (at < tokenizer->n_end_tokens && tokenizer->end_tokens[at] < id)
        at++;
    if (id < 0 || (at < tokenizer->n_end_tokens && tokenizer->end_tokens[at] == id))
        return 0;
    if (tokenizer->n_end_tokens == MAX_END_TOKENS)
        return error_set(error, STATUS_CORRUPT, "the vocabulary has more than %d end-of-generation tokens",
                         MAX_END_TOKENS);
    memmove(tokenizer->end_tokens + at + 1, tokenizer->end_tokens + at,
            (tokenizer->n_end_tokens - at) * sizeof(*tokenizer->end_tokens));
    tokenizer->end_tokens[at] = id;
    tokenizer->n_end_tokens++;
    return 0;
}

// Converters often leave an end marker a normal or a user-defined token: it is a control token all the same.
// Not so when the vocabulary merely has its characters as a word (Qwen's "</s>"): merges make that one.
static int find_end_texts(struct tokenizer *tokenizer, const struct gguf_value *merges, struct error *error)
{
    for (uint32_t id = 0; id < tokenizer->size; id++) {
        size_t length;
        const char *text = string_pool_get(&tokenizer->texts, id, &length);
        if (!special_is_end_text(text, length))
            continue;
        if (tokenizer->kinds[id] == TOKEN_NORMAL && merges && bpe_merges_make(merges, text, length))
            continue;
        tokenizer->kinds[id] = TOKEN_CONTROL;
        int status = add_end_token(tokenizer, (int32_t)id, error);
        if (status)
            return status;
    }
    return 0;
}

static int find_end_ids(struct tokenizer *tokenizer, const struct gguf *gguf, struct error *error)
{
    static const char *const keys[] = {
        "tokenizer.ggml.eot_token_id",     "tokenizer.ggml.eom_token_id",
        "tokenizer.ggml.fim_pad_token_id", "tokenizer.ggml.fim_rep_token_id",
        "tokenizer.ggml.fim_sep_token_id",
    };
    int status = add_end_token(tokenizer, tokenizer->eos, error);
    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]) && !status; i++) {
        int32_t id = -1;
        status = get_id(gguf, keys[i], tokenizer->size, &id, error);
        if (!status)
            status = add_end_token(tokenizer, id, error);
    }
    return status;
}

static int load_special_ids(struct tokenizer *tokenizer, const struct gguf *gguf,
                            const struct gguf_value *merges, struct error *error)
{
    if (tokenizer->family == FAMILY_SPM &&
        tokenizer->size > 2) { // what these models use when nothing is said
        tokenizer->unknown = 0;
        tokenizer->bos = 1;
        tokenizer->eos = 2;
    }
    const struct {
        const char *key;
        int32_t *id;
    } ids[] = {{"tokenizer.ggml.bos_token_id", &tokenizer->bos},
               {"tokenizer.ggml.eos_token_id", &tokenizer->eos},
               {"tokenizer.ggml.unknown_token_id", &tokenizer->unknown}};
    int status = 0;
    for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]) && !status; i++)
        status = get_id(gguf, ids[i].key, tokenizer->size, ids[i].id, error);
    if (!status)
        status = get_bool(gguf, "tokenizer.ggml.add_bos_token", &tokenizer->add_bos, error);
    if (!status)
        status = get_bool(gguf, "tokenizer.ggml.add_eos_token", &tokenizer->add_eos, error);
    tokenizer->add_bos &= tokenizer->bos >= 0;
    tokenizer->add_eos &= tokenizer->eos >= 0;
    if (!status)
        status = find_end_texts(tokenizer, merges, error);
    if (!status)
        status = find_end_ids(tokenizer, gguf, error);
    return status;
}

// --- pieces: what tokens decode to ---

// The byte that a byte token's text <0xHH> names, -1 when it is no such text.
static int named_byte(const char *text, size_t length)
{
    static const char digits[] = "0123456789ABCDEF";
    if (length != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>')
        return -1;
    const char *high = memchr(digits, text[3], 16), *low = memchr(digits, text[4], 16);
    return high && low ? (int)((high - digits) << 4 | (low - digits)) : -1;
}

// Appends the piece of one token. *plain: ordinary text may become this token.
static int append_piece(struct tokenizer *tokenizer, uint32_t id, bool *plain, struct error *error)
{
    size_t length;
    const char *text = string_pool_get(&tokenizer->texts, id, &length);
    uint8_t kind = tokenizer->kinds[id];
    bool foreign = false;
    int status = 0;
    *plain = (kind == TOKEN_NORMAL || kind == TOKEN_USER_DEFINED) && length > 0;
    if (kind == TOKEN_BYTE) {
        int byte = named_byte(text, length);
        if (byte < 0)
            return error_set(error, STATUS_CORRUPT, "token %u is a byte, but its text is not <0xHH>", id);
        char one = (char)byte;
        if (tokenizer->byte_tokens[byte] < 0)
            tokenizer->byte_tokens[byte] = (int32_t)id;
        status = string_pool_append(&tokenizer->pieces, &one, 1);
    } else if (kind == TOKEN_NORMAL && tokenizer->family == FAMILY_BPE) {
        status = bpe_append_bytes(tokenizer, text, length, &foreign);
        *plain &= !foreign;
    } else if (kind == TOKEN_NORMAL) {
        status = spm_append_bytes(tokenizer, text, length);
    } else if (kind != TOKEN_UNUSED) {
        status = string_pool_append(&tokenizer->pieces, text, length);
    }
    if (!status)
        status = string_pool_end(&tokenizer->pieces);
    return status ? no_memory(error) : 0;
}

// BPE finds tokens by the bytes they decode to, SentencePiece by their own text.
static int load_pieces(struct tokenizer *tokenizer, struct error *error)
{
    const struct string_pool *named =
        tokenizer->family == FAMILY_BPE ? &tokenizer->pieces : &tokenizer->texts;
    if (string_index_init(&tokenizer->index, named))
        return no_memory(error);
    for (uint32_t id = 0; id < tokenizer->size; id++) {
        bool plain;
        int status = append_piece(tokenizer, id, &plain, error);
        if (status)
            return status;
        if (plain && string_index_put(&tokenizer->index, id))
            return no_memory(error);
        uint32_t bytes = named->starts[id + 1] - named->starts[id];
        uint32_t decoded = tokenizer->pieces.starts[id + 1] - tokenizer->pieces.starts[id];
        if (tokenizer->longest < bytes)
            tokenizer->longest = bytes;
        if (tokenizer->longest < decoded)
            tokenizer->longest = decoded;
    }
    for (unsigned byte = 0; byte < 256; byte++) { // a byte without a byte token: the token of that one byte
        char one = (char)byte;
        uint32_t token = string_index_find(&tokenizer->index, &one, 1);
        if (token != NO_STRING && (tokenizer->family == FAMILY_BPE || tokenizer->byte_tokens[byte] < 0))
            tokenizer->byte_tokens[byte] = (int32_t)token;
    }
    return 0;
}

// --- the two families ---

static int load_bpe(struct tokenizer *tokenizer, const struct gguf *gguf, struct error *error)
{
    struct gguf_string pre;
    const struct gguf_value *merges;
    int status = get_string(gguf, "tokenizer.ggml.pre", &pre, error);
    if (status)
        return status;
    if (pre.length == 0)
        pre = (struct gguf_string){"default", 7};
    status = pre_tokenizer_new(&tokenizer->pre, pre.bytes, pre.length, error);
    if (!status)
        status = get_strings(gguf, "tokenizer.ggml.merges", MAX_MERGES, &merges, error);
    if (status)
        return status;
    tokenizer->add_bos = pre_tokenizer_traits(tokenizer->pre)->add_bos;
    bpe_init_code(tokenizer);
    status = load_special_ids(tokenizer, gguf, merges, error);
    if (!status)
        status = load_pieces(tokenizer, error);
    return status ? status : bpe_load_merges(tokenizer, merges, error);
}

static int load_spm(struct tokenizer *tokenizer, const struct gguf *gguf, struct error *error)
{
    tokenizer->add_bos = tokenizer->add_space = true;
    const struct gguf_value *scores;
    struct gguf_string architecture;
    int status = get_bool(gguf, "tokenizer.ggml.add_space_prefix", &tokenizer->add_space, error);
    if (!status)
        status = get_string(gguf, "general.architecture", &architecture, error);
    if (!status)
        status = get_numbers(gguf, "tokenizer.ggml.scores", tokenizer->size, &scores, error);
    if (status)
        return status;
    tokenizer->strip_right = string_is(architecture, "phi3");
    status = load_special_ids(tokenizer, gguf, NULL, error);
    if (!status)
        status = load_pieces(tokenizer, error);
    return status ? status : spm_load_scores(tokenizer, scores, error);
}

int tokenizer_load(struct tokenizer *tokenizer, const struct gguf *gguf, struct error *error)
{
    tokenizer->bos = tokenizer->eos = tokenizer->unknown = -1;
    memset(tokenizer->byte_tokens, 0xFF, sizeof(tokenizer->byte_tokens));
    struct gguf_string model;
    int status = get_string(gguf, "tokenizer.ggml.model", &model, error);
    if (status)
        return status;
    if (model.length == 0 || string_is(model, "none") || string_is(model, "no_vocab"))
        return load_nameless(tokenizer, gguf, error);
    bool bpe = string_is(model, "gpt2");
    if (!bpe && !string_is(model, "llama"))
        return error_set(error, STATUS_UNSUPPORTED, "unknown tokenizer \"%.*s\" (tokenizer.ggml.model)",
                         (int)(model.length < 64 ? model.length : 64), model.bytes);
    tokenizer->family = bpe ? FAMILY_BPE : FAMILY_SPM;
    const struct gguf_value *tokens;
    status = get_strings(gguf, "tokenizer.ggml.tokens", MAX_VOCABULARY, &tokens, error);
    if (!status)
        status = load_texts(tokenizer, tokens, error);
    if (!status)
        status = load_kinds(tokenizer, gguf, error);
    if (!status)
        status = bpe ? load_bpe(tokenizer, gguf, error) : load_spm(tokenizer, gguf, error);
    if (!status && (special_list_build(&tokenizer->special, tokenizer, false) ||
                    special_list_build(&tokenizer->user_defined, tokenizer, true)))
        status = no_memory(error);
    return status;
}
