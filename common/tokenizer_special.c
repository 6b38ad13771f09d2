// Tokens that are found in the text before anything else looks at it: control tokens where the caller asks
// for them, user-defined ones always. The lists are sorted by text, so the tokens with a given beginning are
// neighbours and the longest match is found by narrowing a range byte by byte.
#include "common/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

// Markers of many models. Metadata often names only one of a model's end tokens, so they are known by text.
static const char *const end_texts[] = {
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<\uFF5Cend\u2581of\u2581sentence\uFF5C>", // DeepSeek
    // Code models: what follows belongs to another file or repository, or is padding.
    "<|file_sep|>",
    "<|repo_name|>",
    "<|fim_repo|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
};

bool special_is_end_text(const char *text, size_t length)
{
    for (size_t i = 0; i < sizeof(end_texts) / sizeof(end_texts[0]); i++) {
        if (strlen(end_texts[i]) == length && memcmp(end_texts[i], text, length) == 0)
            return true;
    }
    return false;
}

static int compare_texts(const void *left, const void *right, void *context)
{
    const struct string_pool *texts = context;
    int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    size_t a_length, b_length;
    const char *a_text = string_pool_get(texts, (uint32_t)a, &a_length);
    const char *b_text = string_pool_get(texts, (uint32_t)b, &b_length);
    int order = memcmp(a_text, b_text, a_length < b_length ? a_length : b_length);
    if (order == 0)
        order = (a_length > b_length) - (a_length < b_length);
    return order ? order : (a > b) - (a < b);
}

static bool belongs(const struct tokenizer *tokenizer, uint32_t id, bool only_user_defined)
{
    if (tokenizer->texts.starts[id + 1] == tokenizer->texts.starts[id])
        return false;
    uint8_t kind = tokenizer->kinds[id];
    return kind == TOKEN_USER_DEFINED ||
           (!only_user_defined && (kind == TOKEN_CONTROL || kind == TOKEN_UNKNOWN));
}

int special_list_build(struct special_list *list, const struct tokenizer *tokenizer, bool only_user_defined)
{
    for (uint32_t id = 0; id < tokenizer->size; id++)
        list->count += belongs(tokenizer, id, only_user_defined);
    list->ids = malloc((list->count + 1) * sizeof(*list->ids));
    if (!list->ids)
        return STATUS_NO_MEMORY;
    size_t filled = 0;
    for (uint32_t id = 0; id < tokenizer->size; id++) {
        if (!belongs(tokenizer, id, only_user_defined))
            continue;
        list->ids[filled++] = (int32_t)id;
        list->starts[(unsigned char)tokenizer->texts.bytes[tokenizer->texts.starts[id]]] = true;
    }
    qsort_r(list->ids, list->count, sizeof(*list->ids), compare_texts, (void *)&tokenizer->texts);
    return 0;
}

void special_list_free(struct special_list *list)
{
    free(list->ids);
    *list = (struct special_list){0};
}

// The byte at `depth` of a token's text, -1 behind its end.
static int text_byte(const struct tokenizer *tokenizer, int32_t id, size_t depth)
{
    size_t length;
    const char *text = string_pool_get(&tokenizer->texts, (uint32_t)id, &length);
    return depth < length ? (unsigned char)text[depth] : -1;
}

// The first index of low..high whose byte at `depth` is at least `byte`.
static size_t lower_bound(const struct special_list *list, const struct tokenizer *tokenizer, size_t low,
                          size_t high, size_t depth, int byte)
{
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (text_byte(tokenizer, list->ids[middle], depth) < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

int32_t special_list_match(const struct special_list *list, const struct tokenizer *tokenizer,
                           const char *text, size_t length)
{
    if (length == 0 || !list->starts[(unsigned char)text[0]])
        return -1;
    int32_t best = -1;
    size_t low = 0, high = list->count;
    for (size_t depth = 0; low < high; depth++) {
        if (text_byte(tokenizer, list->ids[low], depth) < 0) // sorts first: all of it has matched
            best = list->ids[low];
        if (depth == length)
            break;
        int byte = (unsigned char)text[depth];
        low = lower_bound(list, tokenizer, low, high, depth, byte);
        high = lower_bound(list, tokenizer, low, high, depth, byte + 1);
    }
    return best;
}
