// `strata tokenize`: text to token ids and back, from a model file or one that has only a vocabulary; no
// server. Standard input is taken byte for byte. One thread.
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli_internal.h"
#include "common/gguf.h"
#include "common/tokenizer.h"

static const struct option OPTIONS[] = {
    {"special", 's', OPTION_FLAG, NULL, NULL,
     "Special tokens written out in the text become their ids; with --detokenize they are printed.", 0, 0},
    {"add-special", 'a', OPTION_FLAG, NULL, NULL,
     "Put the beginning and end tokens where the model asks for them.", 0, 0},
    {"detokenize", 'd', OPTION_FLAG, NULL, NULL,
     "Standard input has ids, separated by commas or white space; print their text.", 0, 0},
    {"json", 'j', OPTION_FLAG, NULL, NULL, "Print one JSON object.", 0, 0},
    {NULL, 0, OPTION_FLAG, NULL, NULL, NULL, 0, 0},
};
static const char USAGE[] = "strata tokenize MODEL.gguf [options] < TEXT";
static const char ABOUT[] =
    "Prints the token ids of the text on standard input, separated by commas. The text is taken as it is, a "
    "newline at its end included. Files that have only a vocabulary will do.";

static int read_input(char **out, size_t *length, struct error *error)
{
    size_t capacity = 0;
    *out = NULL;
    *length = 0;
    for (;;) {
        if (*length == capacity) {
            capacity = capacity ? capacity * 2 : 1 << 16;
            char *bigger = realloc(*out, capacity);
            if (!bigger)
                return error_set(error, STATUS_NO_MEMORY, "no memory for %zu bytes of text", capacity);
            *out = bigger;
        }
        size_t got = fread(*out + *length, 1, capacity - *length, stdin);
        *length += got;
        if (ferror(stdin))
            return error_set(error, STATUS_IO, "cannot read standard input: %s", strerror(errno));
        if (got == 0)
            return 0;
    }
}

static bool is_separator(char c)
{
    return c == ',' || isspace((unsigned char)c);
}

// Ids separated by commas or white space.
static int parse_ids(const char *text, size_t length, struct token_list *list, struct error *error)
{
    for (size_t at = 0; at < length;) {
        if (is_separator(text[at])) {
            at++;
            continue;
        }
        int64_t id = 0;
        size_t start = at;
        while (at < length && id <= INT32_MAX && isdigit((unsigned char)text[at]))
            id = id * 10 + (text[at++] - '0');
        if (id > INT32_MAX || (at < length && !is_separator(text[at]))) {
            while (at < length && at - start < 20 && !is_separator(text[at]))
                at++;
            return error_set(error, STATUS_INVALID, "'%.*s' on standard input is no token id",
                             (int)(at - start), text + start);
        }
        if (token_list_push(list, (int32_t)id))
            return error_set(error, STATUS_NO_MEMORY, "no memory for the ids");
    }
    return 0;
}

static int decode_ids(const struct tokenizer *tokenizer, const struct token_list *list, bool special,
                      char **out, size_t *length, struct error *error)
{
    if (!tokenizer_has_text(tokenizer))
        return error_set(error, STATUS_UNSUPPORTED, "this model has no vocabulary");
    struct token_decoder decoder;
    token_decoder_init(&decoder, tokenizer, special, true);
    size_t most = tokenizer_max_bytes(tokenizer), capacity = most;
    *length = 0;
    *out = malloc(capacity);
    for (size_t i = 0; *out && i <= list->count; i++) {
        if (capacity - *length < most) {
            char *bigger = realloc(*out, capacity = capacity * 2 + most);
            if (!bigger)
                break;
            *out = bigger;
        }
        int written = i == list->count
                          ? token_decoder_finish(&decoder, *out + *length, capacity - *length)
                          : token_decoder_push(&decoder, list->ids[i], *out + *length, capacity - *length);
        if (written < 0)
            return error_set(error, written, "id %d: the vocabulary has %u tokens", list->ids[i],
                             tokenizer_size(tokenizer));
        *length += (size_t)written;
        if (i == list->count)
            return 0;
    }
    return error_set(error, STATUS_NO_MEMORY, "no memory for the text");
}

static void print_ids(const struct token_list *list, bool json)
{
    if (json) {
        json_t *ids = json_array();
        for (size_t i = 0; i < list->count; i++)
            json_array_append_new(ids, json_integer(list->ids[i]));
        cli_print_json(json_pack("{s:o}", "token_ids", ids));
        return;
    }
    for (size_t i = 0; i < list->count; i++)
        printf("%s%d", i ? "," : "", list->ids[i]);
    putchar('\n');
}

static int tokenize(const struct tokenizer *tokenizer, const struct config *config, const char *input,
                    size_t length, struct error *error)
{
    struct token_list list = {0};
    unsigned flags = (config_flag(config, "special") ? ENCODE_SPECIAL : 0) |
                     (config_flag(config, "add-special") ? ENCODE_ADD_SPECIAL : 0);
    int status = tokenizer_encode(tokenizer, input, length, flags, &list, error);
    if (!status)
        print_ids(&list, config_flag(config, "json"));
    token_list_free(&list);
    return status;
}

static int detokenize(const struct tokenizer *tokenizer, const struct config *config, const char *input,
                      size_t length, struct error *error)
{
    struct token_list list = {0};
    char *text = NULL;
    size_t text_length = 0;
    int status = parse_ids(input, length, &list, error);
    if (!status)
        status = decode_ids(tokenizer, &list, config_flag(config, "special"), &text, &text_length, error);
    if (!status && config_flag(config, "json"))
        cli_print_json(json_pack("{s:s%}", "text", text, text_length));
    else if (!status)
        fwrite(text, 1, text_length, stdout);
    token_list_free(&list);
    free(text);
    return status;
}

static int run(const struct config *config, struct error *error)
{
    if (config_positional_count(config) != 1)
        return error_set(error, STATUS_INVALID, "tokenize takes one model file; usage: %s", USAGE);
    struct gguf *gguf;
    int status = gguf_open(&gguf, config_positional(config, 0), error);
    if (status)
        return status;
    struct tokenizer *tokenizer;
    status = tokenizer_new(&tokenizer, gguf, error);
    if (status)
        error_wrap(error, "%s", config_positional(config, 0));
    gguf_close(gguf);
    if (status)
        return status;
    char *input;
    size_t length;
    status = read_input(&input, &length, error);
    if (!status)
        status = config_flag(config, "detokenize") ? detokenize(tokenizer, config, input, length, error)
                                                   : tokenize(tokenizer, config, input, length, error);
    free(input);
    tokenizer_free(tokenizer);
    return status;
}

int command_tokenize(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    int status = run(config, &error);
    config_free(config);
    return cli_report(status, &error);
}
