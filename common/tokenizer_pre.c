// Pre-tokenizers: the expressions that cut text into words before byte-level BPE merges inside each word. A
// model names its set; the expressions are those its authors trained with, written for PCRE2. A set is a list
// of passes: each pass cuts the pieces that the one before it left into matches and the gaps between them,
// and a piece is a subject of its own, so that look-ahead and "end" mean its end.
//
// Compiled once per tokenizer, with JIT code where the system allows it; match state belongs to the call, so
// any thread may split at any time. The white space class is spelled out because PCRE2's \s has U+180E, which
// Unicode took out of it in version 6.3.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "common/tokenizer_internal.h"

#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PASSES = 6 };

#define SPACE                                                                                                \
    "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define S "[" SPACE "]"

// The last white space of a run stays with the word behind it.
#define SPACES_BUT_ONE S "+(?![^" SPACE "])"

#define GPT2_WORDS                                                                                           \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE "\\p{L}\\p{N}]+|" SPACES_BUT_ONE "|" S "+"

#define CONTRACTIONS "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"

// Llama 3 and Qwen 2 differ in how many digits a word may have.
#define LLAMA3_WORDS(digits)                                                                                 \
    CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?[^" SPACE "\\p{L}\\p{N}]+[\\r\\n]*|" S         \
                 "*[\\r\\n]+|" SPACES_BUT_ONE "|" S "+"

#define CJK_RUN "[\\x{4E00}-\\x{9FA5}\\x{800}-\\x{4E00}\\x{AC00}-\\x{D7FF}]+"

// The cased letters of DeepSeek LLM, as its expression lists them.
#define DEEPSEEK_LETTERS                                                                                     \
    "A-Za-z"                                                                                                 \
    "\\x{B5}\\x{C0}-\\x{D6}\\x{D8}-\\x{F6}\\x{F8}-\\x{1BA}\\x{1BC}-\\x{1BF}\\x{1C4}-\\x{293}"                \
    "\\x{295}-\\x{2AF}\\x{370}-\\x{373}\\x{376}\\x{377}\\x{37B}-\\x{37D}\\x{37F}\\x{386}"                    \
    "\\x{388}-\\x{38A}\\x{38C}\\x{38E}-\\x{3A1}\\x{3A3}-\\x{3F5}\\x{3F7}-\\x{481}\\x{48A}-\\x{52F}"          \
    "\\x{531}-\\x{556}\\x{10A0}-\\x{10C5}\\x{13A0}-\\x{13F5}\\x{13F8}-\\x{13FD}\\x{1C90}-\\x{1CBA}"          \
    "\\x{1CBD}-\\x{1CBF}\\x{1D00}-\\x{1D2B}\\x{1D6B}-\\x{1D77}\\x{1D79}-\\x{1D9A}\\x{1E00}-\\x{1F15}"        \
    "\\x{1F18}-\\x{1F1D}\\x{1F20}-\\x{1F45}\\x{1F48}-\\x{1F4D}\\x{1F50}-\\x{1F57}\\x{1F59}\\x{1F5B}"         \
    "\\x{1F5D}\\x{1F5F}-\\x{1F7D}\\x{1F80}-\\x{1FB4}\\x{1FB6}-\\x{1FBC}\\x{1FBE}\\x{1FC2}-\\x{1FC4}"         \
    "\\x{1FC6}-\\x{1FCC}\\x{1FD0}-\\x{1FD3}\\x{1FD6}-\\x{1FDB}\\x{1FE0}-\\x{1FEC}\\x{1FF2}-\\x{1FF4}"        \
    "\\x{1FF6}-\\x{1FFC}\\x{2102}\\x{2107}\\x{210A}-\\x{2113}\\x{2115}\\x{2119}-\\x{211D}\\x{2124}"          \
    "\\x{2126}\\x{2128}\\x{212A}-\\x{212D}\\x{212F}-\\x{2134}\\x{2139}\\x{213C}-\\x{213F}"                   \
    "\\x{2145}-\\x{2149}\\x{214E}\\x{2183}\\x{2184}\\x{2C00}-\\x{2C7B}\\x{2C7E}-\\x{2CE4}"                   \
    "\\x{2CEB}-\\x{2CEE}\\x{2CF2}\\x{2CF3}\\x{A640}-\\x{A66D}\\x{A680}-\\x{A69B}\\x{A722}-\\x{A76F}"         \
    "\\x{A771}-\\x{A787}\\x{A78B}-\\x{A78E}\\x{AB70}-\\x{ABBF}\\x{FB00}-\\x{FB06}\\x{FB13}-\\x{FB17}"        \
    "\\x{FF21}-\\x{FF3A}\\x{FF41}-\\x{FF5A}\\x{10400}-\\x{1044F}\\x{104B0}-\\x{104D3}"                       \
    "\\x{104D8}-\\x{104FB}\\x{10C80}-\\x{10CB2}\\x{10CC0}-\\x{10CF2}\\x{118A0}-\\x{118DF}"                   \
    "\\x{1E900}-\\x{1E943}"

struct pre_set {
    const char *passes[MAX_PASSES];
};

static const struct pre_set llama3 = {{LLAMA3_WORDS("\\p{N}{1,3}")}};
static const struct pre_set qwen2 = {{LLAMA3_WORDS("\\p{N}")}};
static const struct pre_set gpt2 = {{GPT2_WORDS}};
static const struct pre_set single_digits = {{"\\p{N}", GPT2_WORDS}};
static const struct pre_set falcon = {{"[\\p{P}$+<=>^~|`]+", GPT2_WORDS, "[0-9][0-9][0-9]"}};
static const struct pre_set plain = {{"[\\p{P}$+<=>^~|]+", GPT2_WORDS, "\\p{N}+", "[0-9][0-9][0-9]"}};
static const struct pre_set deepseek_coder = {{"[\\r\\n]", S "?\\p{L}+", S "?\\p{P}+", CJK_RUN, "\\p{N}"}};
// White space at the end of a piece is a word. The look-behind keeps a long run that is not at the end from
// being tried once from each of its characters.
static const struct pre_set deepseek_llm = {
    {"[\\r\\n]", S "?[" DEEPSEEK_LETTERS "]+",
     S "?[!-/:-~\\x{FF01}-\\x{FF0F}\\x{FF1A}-\\x{FF5E}\\x{2018}-\\x{201F}\\x{3000}-\\x{3002}]+",
     "(?<!" S ")" S "++\\z", CJK_RUN, "\\p{N}+"}};

static const struct {
    struct pre_traits traits;
    const struct pre_set *set;
} known[] = {
    {{"default", false, false}, &plain},
    {{"llama-bpe", true, true}, &llama3},
    {{"llama3", true, true}, &llama3},
    {{"llama-v3", true, true}, &llama3},
    {{"falcon3", true, true}, &llama3},
    {{"falcon-h1", true, true}, &llama3},
    {{"pixtral", true, true}, &llama3},
    {{"midm-2.0", true, true}, &llama3},
    {{"lfm2", true, true}, &llama3},
    {{"dbrx", false, false}, &llama3},
    {{"smaug-bpe", false, false}, &llama3},
    {{"glm4", false, false}, &llama3},
    {{"chatglm-bpe", false, false}, &llama3},
    {{"qwen2", false, false}, &qwen2},
    {{"deepseek-r1-qwen", false, false}, &qwen2},
    {{"megrez", false, false}, &qwen2},
    {{"stablelm2", false, false}, &qwen2},
    {{"hunyuan", false, false}, &qwen2},
    {{"gpt-2", false, false}, &gpt2},
    {{"phi-2", false, false}, &gpt2},
    {{"mpt", false, false}, &gpt2},
    {{"olmo", false, false}, &gpt2},
    {{"jais", false, false}, &gpt2},
    {{"gigachat", false, false}, &gpt2},
    {{"mellum", false, false}, &gpt2},
    {{"exaone4", false, false}, &gpt2},
    {{"trillion", false, false}, &gpt2},
    {{"granite-docling", false, false}, &gpt2},
    {{"smollm", false, false}, &single_digits},
    {{"starcoder", false, false}, &single_digits},
    {{"refact", false, false}, &single_digits},
    {{"command-r", false, false}, &single_digits},
    {{"codeshell", false, false}, &single_digits},
    {{"exaone", false, false}, &single_digits},
    {{"minerva-7b", false, false}, &single_digits},
    {{"mellum2", false, false}, &single_digits},
    {{"falcon", false, false}, &falcon},
    {{"deepseek-llm", false, false}, &deepseek_llm},
    {{"deepseek-coder", false, false}, &deepseek_coder},
};

struct pre_tokenizer {
    const struct pre_traits *traits;
    pcre2_code *passes[MAX_PASSES];
    int n_passes;
    pcre2_match_context *limits;
};

static int compile(struct pre_tokenizer *pre, const char *expression, struct error *error)
{
    int code;
    PCRE2_SIZE offset;
    pcre2_code *compiled = pcre2_compile((PCRE2_SPTR)expression, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                                         &code, &offset, NULL);
    if (!compiled) {
        PCRE2_UCHAR text[128];
        pcre2_get_error_message(code, text, sizeof(text));
        return error_set(error, STATUS_INTERNAL, "pre-tokenizer \"%s\": %s at offset %zu of its expression",
                         pre->traits->name, (char *)text, (size_t)offset);
    }
    // Without JIT (a build or a system that forbids it) the interpreter gives the same words, slower.
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);
    pre->passes[pre->n_passes++] = compiled;
    return 0;
}

int pre_tokenizer_new(struct pre_tokenizer **out, const char *name, size_t length, struct error *error)
{
    const struct pre_set *set = NULL;
    const struct pre_traits *traits = NULL;
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (strlen(known[i].traits.name) == length && memcmp(known[i].traits.name, name, length) == 0) {
            set = known[i].set;
            traits = &known[i].traits;
        }
    }
    if (!set)
        return error_set(error, STATUS_UNSUPPORTED, "unknown pre-tokenizer \"%.*s\" (tokenizer.ggml.pre)",
                         (int)(length < 64 ? length : 64), name);
    struct pre_tokenizer *pre = calloc(1, sizeof(*pre));
    if (!pre)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the pre-tokenizer");
    pre->traits = traits;
    pre->limits = pcre2_match_context_create(NULL);
    int status = pre->limits ? 0 : error_set(error, STATUS_NO_MEMORY, "no memory for the pre-tokenizer");
    for (int i = 0; !status && i < MAX_PASSES && set->passes[i]; i++)
        status = compile(pre, set->passes[i], error);
    if (status) {
        pre_tokenizer_free(pre);
        return status;
    }
    // The expressions have no nested repeats, so a match takes time in proportion to its length; PCRE2's
    // default limits would only refuse long words.
    pcre2_set_match_limit(pre->limits, UINT32_MAX);
    pcre2_set_depth_limit(pre->limits, UINT32_MAX);
    *out = pre;
    return 0;
}

void pre_tokenizer_free(struct pre_tokenizer *pre)
{
    if (!pre)
        return;
    for (int i = 0; i < pre->n_passes; i++)
        pcre2_code_free(pre->passes[i]);
    pcre2_match_context_free(pre->limits);
    free(pre);
}

const struct pre_traits *pre_tokenizer_traits(const struct pre_tokenizer *pre)
{
    return pre->traits;
}

struct split {
    const struct pre_tokenizer *pre;
    pcre2_match_data *match;
    int (*word)(void *context, const char *bytes, size_t length);
    void *context;
    struct error *error;
};

// The bounds of the next match at or behind `from`; both are `length` when there is none.
static int find_match(struct split *split, int pass, const char *text, size_t length, size_t from,
                      size_t *start, size_t *end)
{
    const pcre2_code *code = split->pre->passes[pass];
    PCRE2_SPTR subject = (PCRE2_SPTR)text;
    *start = *end = length;
    int found =
        pcre2_match(code, subject, length, from, PCRE2_NO_UTF_CHECK, split->match, split->pre->limits);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT)
        found = pcre2_match(code, subject, length, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, split->match,
                            split->pre->limits);
    if (found == PCRE2_ERROR_NOMATCH)
        return 0;
    if (found == PCRE2_ERROR_NOMEMORY || found == PCRE2_ERROR_HEAPLIMIT)
        return error_set(split->error, STATUS_NO_MEMORY, "no memory to split the text into words");
    if (found < 0)
        return error_set(split->error, STATUS_INTERNAL, "splitting the text into words: PCRE2 error %d",
                         found);
    const PCRE2_SIZE *bounds = pcre2_get_ovector_pointer(split->match);
    *start = bounds[0];
    *end = bounds[1];
    return 0;
}

static int split_piece(struct split *split, int pass, const char *text, size_t length)
{
    if (length == 0)
        return 0;
    if (pass == split->pre->n_passes)
        return split->word(split->context, text, length);
    size_t at = 0;
    while (at < length) {
        size_t start, end;
        int status = find_match(split, pass, text, length, at, &start, &end);
        if (!status)
            status = split_piece(split, pass + 1, text + at, start - at);
        if (!status)
            status = split_piece(split, pass + 1, text + start, end - start);
        if (status)
            return status;
        at = end;
    }
    return 0;
}

int pre_tokenizer_split(const struct pre_tokenizer *pre, const char *text, size_t length,
                        int (*word)(void *context, const char *bytes, size_t length), void *context,
                        struct error *error)
{
    struct split split = {.pre = pre, .word = word, .context = context, .error = error};
    split.match = pcre2_match_data_create(1, NULL);
    if (!split.match)
        return error_set(error, STATUS_NO_MEMORY, "no memory to split the text into words");
    int status = split_piece(&split, 0, text, length);
    pcre2_match_data_free(split.match);
    return status;
}
