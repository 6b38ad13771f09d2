// Small vocabularies written out as GGUF metadata, and real ones read from compressed fixtures.
#include "tests/vocabulary.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const small_merges[] = {
    "h e",           "l l",
    "he ll",         "hell o",
    "\u0120 w",      "o r",
    "\u0120w or",    "l d",
    "\u0120wor ld",  "a a",
    "aa aa",         "i n",
    "t he",          "\u0120 the",
    "1 2",           "12 3",
    "\u0120 \u0120", "\u00c3 \u00a9",
    "\u00f0 \u0141", "\u00f0\u0141 \u013a",
    "x y",           "xy z" /* its result is no token */,
    "e n",
};
const uint32_t small_merge_count = sizeof(small_merges) / sizeof(small_merges[0]);

const char *const small_specials[SMALL_SPECIALS] = {"<|start|>", "<|im_end|>", "<tool>", "<tool_call>",
                                                    "<pad>"};

const struct small_piece small_pieces[] = {
    {"\u2581", -10, 1},
    {"h", -20, 1},
    {"e", -21, 1},
    {"l", -22, 1},
    {"o", -23, 1},
    {"w", -24, 1},
    {"r", -25, 1},
    {"d", -26, 1},
    {"a", -27, 1},
    {"he", -1, 1},
    {"ll", -2, 1},
    {"hell", -3, 1},
    {"hello", -4, 1},
    {"\u2581hello", -5, 1},
    {"\u2581w", -6, 1},
    {"or", -7, 1},
    {"ld", -8, 1},
    {"\u2581wor", -9, 1},
    {"\u2581world", -9.5f, 1},
    {"aa", -11, 1},
    {"aaaa", -12, 1},
    {"\u2581\u2581", -13, 1},
    {"\u4e16", -14, 1},
    {"\u754c", -15, 1},
    {"\u4e16\u754c", -16, 1},
    {"<tool>", 0, 4},
    {"<pad>", 0, 5},
};
const uint32_t small_piece_count = sizeof(small_pieces) / sizeof(small_pieces[0]);

enum { MOST = 512 };

const char *byte_level(unsigned char byte, char out[3])
{
    unsigned shifted = 256, c = byte;
    bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
    for (unsigned b = 0; b < byte && !printable; b++)
        shifted += !((b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD));
    if (!printable)
        c = shifted;
    if (c < 0x80) {
        out[0] = (char)c;
        out[1] = 0;
    } else {
        out[0] = (char)(0xC0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3F));
        out[2] = 0;
    }
    return out;
}

void small_bpe_write(struct gguf_writer *writer, const char *pre)
{
    static char bytes[256][3], merged[MOST][32];
    const char *tokens[MOST];
    int32_t kinds[MOST];
    uint32_t count = 0;
    for (unsigned byte = 0; byte < 256; byte++)
        tokens[count++] = byte_level((unsigned char)byte, bytes[byte]);
    for (uint32_t i = 0; i < small_merge_count; i++) {
        const char *space = strchr(small_merges[i], ' ');
        if (strcmp(small_merges[i], "xy z") == 0)
            continue;
        snprintf(merged[i], sizeof(merged[i]), "%.*s%s", (int)(space - small_merges[i]), small_merges[i],
                 space + 1);
        tokens[count++] = merged[i];
    }
    for (uint32_t i = 0; i < count; i++)
        kinds[i] = TOKEN_NORMAL;
    static const int32_t special_kinds[SMALL_SPECIALS] = {3, 3, 4, 4, 5};
    for (int i = 0; i < SMALL_SPECIALS; i++) {
        kinds[count] = special_kinds[i];
        tokens[count++] = small_specials[i];
    }
    gguf_writer_string(writer, "general.architecture", "llama");
    gguf_writer_string(writer, "tokenizer.ggml.model", "gpt2");
    gguf_writer_string(writer, "tokenizer.ggml.pre", pre);
    gguf_writer_strings(writer, "tokenizer.ggml.tokens", tokens, count);
    gguf_writer_array(writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, count, count * sizeof(kinds[0]));
    gguf_writer_strings(writer, "tokenizer.ggml.merges", small_merges, small_merge_count);
    gguf_writer_u32(writer, "tokenizer.ggml.bos_token_id", count - SMALL_SPECIALS);
    gguf_writer_u32(writer, "tokenizer.ggml.eos_token_id", count - SMALL_SPECIALS + 1);
}

void small_spm_write(struct gguf_writer *writer)
{
    static char bytes[256][8];
    const char *tokens[MOST] = {"<unk>", "<s>", "</s>"};
    int32_t kinds[MOST] = {TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_CONTROL};
    float scores[MOST] = {0};
    uint32_t count = 3;
    for (unsigned byte = 0; byte < 256; byte++) {
        snprintf(bytes[byte], sizeof(bytes[byte]), "<0x%02X>", byte);
        kinds[count] = TOKEN_BYTE;
        tokens[count++] = bytes[byte];
    }
    for (uint32_t i = 0; i < small_piece_count; i++) {
        kinds[count] = small_pieces[i].kind;
        scores[count] = small_pieces[i].score;
        tokens[count++] = small_pieces[i].text;
    }
    gguf_writer_string(writer, "general.architecture", "llama");
    gguf_writer_string(writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(writer, "tokenizer.ggml.tokens", tokens, count);
    gguf_writer_array(writer, "tokenizer.ggml.token_type", GGUF_I32, kinds, count, count * sizeof(kinds[0]));
    gguf_writer_array(writer, "tokenizer.ggml.scores", GGUF_F32, scores, count, count * sizeof(scores[0]));
}

static struct tokenizer *tokenizer_from_bytes(const void *bytes, size_t length)
{
    struct gguf *gguf;
    struct tokenizer *tokenizer;
    struct error error = {0};
    if (gguf_open_memory(&gguf, bytes, length, &error) || tokenizer_new(&tokenizer, gguf, &error)) {
        fprintf(stderr, "vocabulary refused: %s\n", error.text);
        abort();
    }
    gguf_close(gguf);
    return tokenizer;
}

struct tokenizer *tokenizer_from(struct gguf_writer *writer)
{
    size_t length;
    unsigned char *bytes = gguf_writer_finish(writer, &length);
    struct tokenizer *tokenizer = tokenizer_from_bytes(bytes, length);
    free(bytes);
    return tokenizer;
}

// Everything the stream has. Closes nothing.
static char *read_all(FILE *stream, size_t *length)
{
    size_t capacity = 1 << 16, got;
    char *bytes = malloc(capacity);
    *length = 0;
    while (bytes && (got = fread(bytes + *length, 1, capacity - *length, stream)) > 0) {
        *length += got;
        if (*length == capacity)
            bytes = realloc(bytes, capacity *= 2);
    }
    if (!bytes)
        abort();
    return bytes;
}

static const char *source_folder(void)
{
    const char *folder = getenv("STRATA_TEST_SOURCE");
    return folder ? folder : ".";
}

// The file in either place, NULL when it is in neither.
static FILE *open_fixture(const char *name, const char *suffix)
{
    static const char *const folders[] = {"tests/fixtures", "../shared/vocab"};
    char path[1024];
    FILE *file = NULL;
    for (int i = 0; i < 2 && !file; i++) {
        snprintf(path, sizeof(path), "%s/%s/%s%s", source_folder(), folders[i], name, suffix);
        file = fopen(path, "rb");
    }
    return file;
}

char *fixture_text(const char *name, const char *suffix, size_t *length)
{
    FILE *file = open_fixture(name, suffix);
    if (!file)
        return NULL;
    char *text = read_all(file, length);
    fclose(file);
    return text;
}

struct tokenizer *tokenizer_from_fixture(const char *name)
{
    size_t length = 0;
    char *bytes = NULL, command[1200];
    FILE *packed = open_fixture(name, ".gguf.gz");
    if (packed) {
        fclose(packed);
        snprintf(command, sizeof(command), "gzip -dc '%s/tests/fixtures/%s.gguf.gz'", source_folder(), name);
        FILE *pipe = popen(command, "r");
        if (pipe) {
            bytes = read_all(pipe, &length);
            pclose(pipe);
        }
    } else {
        bytes = fixture_text(name, ".gguf", &length);
    }
    if (!bytes)
        return NULL;
    struct tokenizer *tokenizer = tokenizer_from_bytes(bytes, length);
    free(bytes);
    return tokenizer;
}
