// Tokenizers under fire. The first byte chooses: text for a small vocabulary of ours under some pre-tokenizer
// or SentencePiece-style, a vocabulary made from the bytes, or the bytes as a GGUF file. Whatever is encoded
// must come back byte for byte; a broken promise aborts. One thread.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/utf8.h"
#include "tests/vocabulary.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void promise(bool kept, const char *what)
{
    if (!kept) {
        fprintf(stderr, "broken promise: %s\n", what);
        abort();
    }
}

// All of the ids' bytes, and all of their text.
static void decode(const struct tokenizer *tokenizer, const struct token_list *list, char *bytes,
                   size_t *n_bytes, char *text, size_t *n_text, size_t capacity)
{
    struct token_decoder decoder;
    token_decoder_init(&decoder, tokenizer, true, false);
    *n_bytes = *n_text = 0;
    for (size_t i = 0; i < list->count; i++) {
        int got = tokenizer_token_text(tokenizer, list->ids[i], true, bytes + *n_bytes, capacity - *n_bytes);
        promise(got >= 0, "every id has bytes");
        *n_bytes += (size_t)got;
        got = token_decoder_push(&decoder, list->ids[i], text + *n_text, capacity - *n_text);
        promise(got >= 0, "every id decodes");
        promise(utf8_valid_prefix(text + *n_text, (size_t)got) == (size_t)got,
                "only whole characters come out");
        *n_text += (size_t)got;
    }
    int got = token_decoder_finish(&decoder, text + *n_text, capacity - *n_text);
    promise(got >= 0, "decoding ends");
    *n_text += (size_t)got;
}

// `exact`: the vocabulary covers every byte, so encoding succeeds and loses nothing.
static void round_trip(const struct tokenizer *tokenizer, const char *input, size_t size, unsigned flags,
                       bool exact)
{
    struct token_list list = {0};
    struct error error = {0};
    int status = tokenizer_encode(tokenizer, input, size, flags, &list, &error);
    promise(status == 0, "encoding works");
    size_t capacity = (list.count + 1) * tokenizer_max_bytes(tokenizer), n_bytes, n_text;
    char *bytes = malloc(capacity), *text = malloc(capacity);
    if (!bytes || !text)
        abort();
    for (size_t i = 0; i < list.count; i++) {
        const char *entry;
        size_t length;
        enum token_kind kind = tokenizer_token(tokenizer, list.ids[i], &entry, &length);
        promise(kind >= TOKEN_NORMAL && kind <= TOKEN_BYTE, "ids are in range");
        promise((flags & ENCODE_SPECIAL) || kind != TOKEN_CONTROL, "control tokens come only on request");
    }
    decode(tokenizer, &list, bytes, &n_bytes, text, &n_text, capacity);
    if (exact) {
        promise(n_bytes == size && memcmp(bytes, input, size) == 0, "bytes come back");
        bool valid = utf8_valid_prefix(input, size) == size;
        promise(!valid || (n_text == size && memcmp(text, input, size) == 0), "text comes back");
    }
    free(bytes);
    free(text);
    token_list_free(&list);
}

static void fuzz_bpe(const uint8_t *data, size_t size)
{
    static const char *const pres[] = {"gpt-2",  "smollm",       "llama-bpe",      "qwen2",
                                       "falcon", "deepseek-llm", "deepseek-coder", "default"};
    static struct tokenizer *tokenizers[8];
    if (size == 0)
        return;
    struct tokenizer **tokenizer = &tokenizers[data[0] & 7];
    if (!*tokenizer) {
        struct gguf_writer writer = {0};
        small_bpe_write(&writer, pres[data[0] & 7]);
        *tokenizer = tokenizer_from(&writer);
    }
    round_trip(*tokenizer, (const char *)data + 1, size - 1, data[0] & 8 ? ENCODE_SPECIAL : 0, true);
}

static void fuzz_spm(const uint8_t *data, size_t size)
{
    static struct tokenizer *tokenizer;
    if (size == 0)
        return;
    if (!tokenizer) {
        struct gguf_writer writer = {0};
        small_spm_write(&writer);
        gguf_writer_bool(&writer, "tokenizer.ggml.add_space_prefix", false);
        tokenizer = tokenizer_from(&writer);
    }
    // U+2581 and a space are one to this family.
    bool mark = memmem(data + 1, size - 1, "\xE2\x96\x81", 3) != NULL;
    round_trip(tokenizer, (const char *)data + 1, size - 1, data[0] & 8 ? ENCODE_SPECIAL : 0, !mark);
}

static void use(const struct tokenizer *tokenizer, const uint8_t *data, size_t size)
{
    if (!tokenizer_has_text(tokenizer))
        return;
    size_t count;
    const int32_t *ends = tokenizer_end_tokens(tokenizer, &count);
    for (size_t i = 0; i < count; i++)
        promise(ends[i] >= 0 && (uint32_t)ends[i] < tokenizer_size(tokenizer) &&
                    (!i || ends[i - 1] < ends[i]),
                "end tokens are sorted ids");
    promise(tokenizer_bos(tokenizer) < (int32_t)tokenizer_size(tokenizer), "bos is an id or none");
    size = size < 512 ? size : 512;
    round_trip(tokenizer, (const char *)data, size, 0, false);
    round_trip(tokenizer, (const char *)data, size, ENCODE_SPECIAL | ENCODE_ADD_SPECIAL, false);
}

static void fuzz_file(const void *bytes, size_t length, const uint8_t *text, size_t size)
{
    struct gguf *gguf;
    struct tokenizer *tokenizer;
    struct error error = {0};
    if (gguf_open_memory(&gguf, bytes, length, &error))
        return;
    if (tokenizer_new(&tokenizer, gguf, &error) == 0) {
        gguf_close(gguf); // the tokenizer must not need it any more
        use(tokenizer, text, size);
        tokenizer_free(tokenizer);
        return;
    }
    promise(error.text[0] != '\0', "a refusal has a sentence");
    gguf_close(gguf);
}

enum { MOST_STRINGS = 64, MOST_BYTES = 32 };

// The pieces of `data` between bytes 0xFE, up to an 0xFD.
static size_t take_strings(const uint8_t **data, size_t *size, char strings[][MOST_BYTES], const char **out)
{
    size_t count = 0, length = 0;
    while (*size && count < MOST_STRINGS) {
        uint8_t byte = *(*data)++;
        (*size)--;
        if (byte == 0xFE || byte == 0xFD) {
            strings[count][length] = '\0';
            out[count] = strings[count];
            count++;
            length = 0;
            if (byte == 0xFD)
                break;
        } else if (length + 1 < MOST_BYTES) {
            strings[count][length++] = (char)byte;
        }
    }
    return count;
}

// Tokens, merges, kinds and scores out of the bytes; what is left is the text.
static void fuzz_vocabulary(const uint8_t *data, size_t size)
{
    static char token_bytes[MOST_STRINGS][MOST_BYTES], merge_bytes[MOST_STRINGS][MOST_BYTES];
    static const char *const pres[] = {"gpt-2", "llama-bpe", "deepseek-llm", "nonsense"};
    const char *tokens[MOST_STRINGS], *merges[MOST_STRINGS];
    int32_t kinds[MOST_STRINGS];
    float scores[MOST_STRINGS];
    if (size < 4 + 2 * MOST_STRINGS)
        return;
    const uint8_t *settings = data, *kind_bytes = data + 4, *score_bytes = kind_bytes + MOST_STRINGS;
    data += 4 + 2 * MOST_STRINGS;
    size -= 4 + 2 * MOST_STRINGS;
    for (int i = 0; i < MOST_STRINGS; i++) {
        kinds[i] = kind_bytes[i] % 8;
        scores[i] = score_bytes[i] == 255 ? __builtin_nanf("") : (float)(int8_t)score_bytes[i];
    }
    size_t n_tokens = take_strings(&data, &size, token_bytes, tokens);
    size_t n_merges = take_strings(&data, &size, merge_bytes, merges);
    struct gguf_writer writer = {0};
    gguf_writer_string(&writer, "general.architecture", settings[0] & 1 ? "phi3" : "llama");
    gguf_writer_string(&writer, "tokenizer.ggml.model", settings[0] & 2 ? "llama" : "gpt2");
    gguf_writer_string(&writer, "tokenizer.ggml.pre", pres[settings[0] >> 2 & 3]);
    gguf_writer_strings(&writer, "tokenizer.ggml.tokens", tokens, n_tokens);
    gguf_writer_strings(&writer, "tokenizer.ggml.merges", merges, n_merges);
    if (settings[0] & 16)
        gguf_writer_array(&writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, n_tokens, n_tokens * 4);
    if (settings[0] & 32)
        gguf_writer_array(&writer, "tokenizer.ggml.scores", GGUF_F32, scores, n_tokens, n_tokens * 4);
    if (settings[1] < 128)
        gguf_writer_u32(&writer, "tokenizer.ggml.bos_token_id", settings[1]);
    if (settings[2] < 128)
        gguf_writer_u32(&writer, "tokenizer.ggml.unknown_token_id", settings[2]);
    gguf_writer_bool(&writer, "tokenizer.ggml.add_bos_token", settings[3] & 1);
    size_t length;
    unsigned char *bytes = gguf_writer_finish(&writer, &length);
    fuzz_file(bytes, length, data, size);
    free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    switch (data[0] & 3) {
    case 0:
        fuzz_bpe(data + 1, size - 1);
        break;
    case 1:
        fuzz_spm(data + 1, size - 1);
        break;
    case 2:
        fuzz_vocabulary(data + 1, size - 1);
        break;
    default:
        fuzz_file(data + 1, size - 1, data + 1, size - 1);
    }
    return 0;
}
