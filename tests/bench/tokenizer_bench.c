// Times encoding in MB/s: each vocabulary on source text, on text in many scripts, and on what is hard for a
// merge loop (one long word, one long run); the best of three.
//
//     tokenizer_bench [MODEL.gguf...]     without models: those under tests/fixtures (and ../shared/vocab)
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/vocabulary.h"

enum { LENGTH = 1 << 20, RUNS = 3 };

static char text[LENGTH];

static void repeat(const char *pattern, size_t length)
{
    for (size_t i = 0; i < LENGTH; i++)
        text[i] = pattern[i % length];
}

static void random_letters(void)
{
    uint32_t state = 1;
    for (size_t i = 0; i < LENGTH; i++) {
        state = state * 1664525u + 1013904223u;
        text[i] = (char)('a' + (state >> 16) % 26);
    }
}

// Our own sources, as prose of a kind.
static void source_text(void)
{
    const char *root = getenv("STRATA_TEST_SOURCE");
    char path[1024];
    size_t length = 0;
    snprintf(path, sizeof(path), "%s/common", root ? root : ".");
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && length < LENGTH && (entry = readdir(folder));) {
        char name[1400];
        snprintf(name, sizeof(name), "%s/%s", path, entry->d_name);
        FILE *file = fopen(name, "r");
        if (file) {
            length += fread(text + length, 1, LENGTH - length, file);
            fclose(file);
        }
    }
    if (folder)
        closedir(folder);
    for (size_t i = length; length && i < LENGTH; i++)
        text[i] = text[i - length];
}

static void many_scripts(void)
{
    size_t length;
    char *vectors = fixture_text("gpt-2", ".inp", &length);
    if (vectors)
        repeat(vectors, length);
    free(vectors);
}

static void one_letter(void)
{
    repeat("a", 1);
}

static void spaces(void)
{
    repeat(" ", 1);
}

static const struct {
    const char *name;
    void (*fill)(void);
} texts[] = {{"source", source_text},
             {"scripts", many_scripts},
             {"one word", random_letters},
             {"aaaa...", one_letter},
             {"spaces", spaces}};
enum { N_TEXTS = sizeof(texts) / sizeof(texts[0]) };

static double best_of_runs(const struct tokenizer *tokenizer)
{
    int64_t best = INT64_MAX;
    for (int run = 0; run < RUNS; run++) {
        struct token_list list = {0};
        int64_t start = clock_now_us();
        if (tokenizer_encode(tokenizer, text, LENGTH, 0, &list, NULL))
            exit(1);
        int64_t took = clock_now_us() - start;
        best = took < best ? took : best;
        token_list_free(&list);
    }
    return LENGTH / (double)best;
}

static void bench(const char *name, struct tokenizer *tokenizer)
{
    if (!tokenizer)
        return;
    printf("%-16.16s", name);
    for (int i = 0; i < N_TEXTS; i++) {
        texts[i].fill();
        printf(" %10.1f", best_of_runs(tokenizer));
        fflush(stdout);
    }
    printf("\n");
    tokenizer_free(tokenizer);
}

static struct tokenizer *open_model(const char *path)
{
    struct gguf *gguf;
    struct tokenizer *tokenizer;
    struct error error = {0};
    if (gguf_open(&gguf, path, &error) || tokenizer_new(&tokenizer, gguf, &error)) {
        fprintf(stderr, "%s\n", error.text);
        exit(1);
    }
    gguf_close(gguf);
    return tokenizer;
}

int main(int argc, char **argv)
{
    static const char *const fixtures[] = {"gpt-2", "qwen2", "llama3", "llama-spm"};
    printf("%-16s", "MB/s");
    for (int i = 0; i < N_TEXTS; i++)
        printf(" %10s", texts[i].name);
    printf("\n");
    for (int i = 1; i < argc; i++) {
        const char *slash = strrchr(argv[i], '/');
        bench(slash ? slash + 1 : argv[i], open_model(argv[i]));
    }
    for (int i = 0; argc == 1 && i < 4; i++)
        bench(fixtures[i], tokenizer_from_fixture(fixtures[i]));
}
