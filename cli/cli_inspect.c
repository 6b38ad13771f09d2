// `strata inspect`: what a model file holds, from its header alone. Names and texts come from an outsider, so
// what goes to the terminal is escaped first. One thread.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli_internal.h"
#include "common/arena.h"
#include "common/gguf.h"
#include "common/model_spec.h"
#include "common/tensor_type.h"
#include "common/utf8.h"

enum { SHOWN_ELEMENTS = 8, SHOWN_BYTES = 72, SHORT_ARRAY = 64, N_TOKEN_KINDS = 7 };

static const struct option OPTIONS[] = {
    {"metadata", 0, OPTION_FLAG, NULL, NULL, "Print the metadata (with no section named, all are printed).",
     0, 0},
    {"tensors", 0, OPTION_FLAG, NULL, NULL, "Print the tensor table.", 0, 0},
    {"vocab", 0, OPTION_FLAG, NULL, NULL, "Print a summary of the vocabulary.", 0, 0},
    {"json", 'j', OPTION_FLAG, NULL, NULL,
     "Print one JSON object; arrays of more than 64 elements are cut short.", 0, 0},
    {NULL, 0, OPTION_FLAG, NULL, NULL, NULL, 0, 0},
};
static const char USAGE[] = "strata inspect MODEL.gguf [options]";
static const char ABOUT[] =
    "Prints what a GGUF file holds: format, metadata, tensors with their types and sizes, and "
    "vocabulary. Works on vocabulary-only files and on models Strata cannot run.";

struct sections {
    bool metadata, tensors, vocabulary;
};

// --- text ---

// At most `limit` bytes of `from`, control characters and ill-formed UTF-8 as escapes. Never NULL.
static const char *readable(struct arena *arena, struct gguf_string from, size_t limit)
{
    size_t used = 0, at = 0, taken, end = from.length < limit ? from.length : limit;
    char *text = arena_alloc(arena, 4 * end + 8, 1);
    for (; text && at < end; at += taken) {
        const unsigned char *byte = (const unsigned char *)from.bytes + at;
        enum utf8_kind kind = utf8_scan(byte, from.length - at, &taken);
        if (taken > end - at)
            break; // a character cut by the limit
        bool control = byte[0] < 0x20 || byte[0] == 0x7F || (byte[0] == 0xC2 && taken > 1 && byte[1] < 0xA0);
        if (*byte == '\n')
            used += (size_t)sprintf(text + used, "\\n");
        else if (kind == UTF8_WHOLE && !control)
            used += (size_t)sprintf(text + used, "%.*s", (int)taken, byte);
        else
            for (size_t i = 0; i < taken; i++)
                used += (size_t)sprintf(text + used, "\\x%02x", byte[i]);
    }
    if (text)
        strcpy(text + used, at < from.length ? "..." : "");
    return text ? text : "";
}

static json_t *json_of_string(struct arena *arena, struct gguf_string string)
{
    json_t *json = json_stringn(string.bytes, string.length);
    return json ? json : json_string(readable(arena, string, SIZE_MAX));
}

static const char *kind_name(enum gguf_kind kind)
{
    static const char *const NAMES[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                        "bool", "string", "array", "u64", "i64", "f64"};
    return NAMES[kind];
}

static bool is_real(enum gguf_kind kind)
{
    return kind == GGUF_F32 || kind == GGUF_F64;
}

static uint64_t shown_count(const struct gguf_value *value, uint64_t most)
{
    return value->nested ? 0 : value->count < most ? value->count : most;
}

// --- metadata ---

static void print_element(struct arena *arena, const struct gguf_value *value, uint64_t index, size_t *cursor)
{
    struct gguf_string string = {"", 0};
    if (value->kind == GGUF_STRING) {
        gguf_array_next_string(value, cursor, &string);
        printf(value->is_array ? "\"%s\"" : "%s", readable(arena, string, SHOWN_BYTES));
    } else if (is_real(value->kind)) {
        printf("%g", gguf_array_float(value, index));
    } else if (value->kind == GGUF_BOOL) {
        printf("%s", gguf_array_int(value, index) ? "true" : "false");
    } else if (value->kind == GGUF_U64) {
        printf("%.0f", gguf_array_float(value, index));
    } else {
        printf("%" PRId64, gguf_array_int(value, index));
    }
}

static void print_metadata(struct arena *arena, const struct gguf *gguf)
{
    printf("\nmetadata: %zu values\n", gguf_value_count(gguf));
    for (size_t i = 0; i < gguf_value_count(gguf); i++) {
        const struct gguf_value *value = gguf_value_at(gguf, i);
        uint64_t shown = shown_count(value, SHOWN_ELEMENTS);
        size_t cursor = 0;
        char kind[48];
        if (value->is_array)
            snprintf(kind, sizeof(kind), "%s[%" PRIu64 "]", value->nested ? "array" : kind_name(value->kind),
                     value->count);
        else
            snprintf(kind, sizeof(kind), "%s", kind_name(value->kind));
        printf("  %-44s %-15s ", readable(arena, value->key, SHOWN_BYTES), kind);
        for (uint64_t j = 0; j < shown; j++) {
            printf("%s", j ? ", " : "");
            print_element(arena, value, j, &cursor);
        }
        printf("%s\n", shown < value->count ? shown ? ", ..." : "..." : "");
        arena_reset(arena);
    }
}

static json_t *json_of_element(struct arena *arena, const struct gguf_value *value, uint64_t index,
                               size_t *cursor)
{
    struct gguf_string string = {"", 0};
    if (value->kind == GGUF_STRING) {
        gguf_array_next_string(value, cursor, &string);
        return json_of_string(arena, string);
    }
    if (is_real(value->kind)) {
        json_t *real = json_real(gguf_array_float(value, index));
        return real ? real : json_null(); // JSON has no infinities
    }
    return value->kind == GGUF_BOOL ? json_boolean(gguf_array_int(value, index) != 0)
                                    : json_integer(gguf_array_int(value, index));
}

// A scalar as itself, an array as an array, one too long (or nested) as an object that says so.
static json_t *json_of_value(struct arena *arena, const struct gguf_value *value)
{
    size_t cursor = 0;
    if (!value->is_array)
        return json_of_element(arena, value, 0, &cursor);
    json_t *array = json_array();
    bool whole = !value->nested && value->count <= SHORT_ARRAY;
    for (uint64_t i = 0; i < shown_count(value, whole ? SHORT_ARRAY : SHOWN_ELEMENTS); i++)
        json_array_append_new(array, json_of_element(arena, value, i, &cursor));
    if (whole)
        return array;
    return json_pack("{s:s, s:I, s:o}", "kind", value->nested ? "array" : kind_name(value->kind), "count",
                     (json_int_t)value->count, "first", array);
}

static json_t *json_of_metadata(struct arena *arena, const struct gguf *gguf)
{
    json_t *object = json_object();
    for (size_t i = 0; i < gguf_value_count(gguf); i++) {
        const struct gguf_value *value = gguf_value_at(gguf, i);
        json_object_set_new(object, readable(arena, value->key, SIZE_MAX), json_of_value(arena, value));
        arena_reset(arena);
    }
    return object;
}

// --- tensors ---

struct type_total {
    uint64_t tensors, bytes;
};

static void count_types(const struct gguf *gguf, struct type_total *totals, size_t n_totals)
{
    memset(totals, 0, n_totals * sizeof(*totals));
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        totals[tensor->type].tensors++;
        totals[tensor->type].bytes += tensor->bytes;
    }
}

enum { N_TYPES = TENSOR_BF16 + 1 };

static void print_tensors(struct arena *arena, const struct gguf *gguf)
{
    struct type_total totals[N_TYPES];
    char bytes[32], shape[96];
    printf("\ntensors: %zu\n", gguf_tensor_count(gguf));
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        int used = snprintf(shape, sizeof(shape), "%" PRIu64, tensor->dims[0]);
        for (uint32_t d = 1; d < tensor->n_dims; d++)
            used += snprintf(shape + used, sizeof(shape) - (size_t)used, " x %" PRIu64, tensor->dims[d]);
        printf("  %-36s %-5s %-20s %12" PRIu64 " bytes\n", readable(arena, tensor->name, SHOWN_BYTES),
               tensor_type_info(tensor->type)->name, shape, tensor->bytes);
        arena_reset(arena);
    }
    count_types(gguf, totals, N_TYPES);
    printf("%s", gguf_tensor_count(gguf) ? "\ntypes\n" : "");
    for (uint32_t type = 0; type < N_TYPES; type++)
        if (totals[type].tensors)
            printf("  %-5s %6" PRIu64 " tensors %12s\n", tensor_type_info(type)->name, totals[type].tensors,
                   cli_format_bytes(bytes, sizeof(bytes), totals[type].bytes));
}

static json_t *json_of_tensors(struct arena *arena, const struct gguf *gguf)
{
    json_t *array = json_array();
    for (size_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        json_t *shape = json_array();
        for (uint32_t d = 0; d < tensor->n_dims; d++)
            json_array_append_new(shape, json_integer((json_int_t)tensor->dims[d]));
        json_array_append_new(array, json_pack("{s:o, s:s, s:o, s:I, s:I, s:I}", "name",
                                               json_of_string(arena, tensor->name), "type",
                                               tensor_type_info(tensor->type)->name, "shape", shape, "bytes",
                                               (json_int_t)tensor->bytes, "part", (json_int_t)tensor->part,
                                               "offset", (json_int_t)tensor->offset));
        arena_reset(arena);
    }
    return array;
}

static json_t *json_of_types(const struct gguf *gguf)
{
    struct type_total totals[N_TYPES];
    json_t *object = json_object();
    count_types(gguf, totals, N_TYPES);
    for (uint32_t type = 0; type < N_TYPES; type++)
        if (totals[type].tensors)
            json_object_set_new(object, tensor_type_info(type)->name,
                                json_pack("{s:I, s:I}", "tensors", (json_int_t)totals[type].tensors, "bytes",
                                          (json_int_t)totals[type].bytes));
    return object;
}

// --- vocabulary ---

static const char *const TOKEN_KINDS[N_TOKEN_KINDS] = {"undefined",    "normal", "unknown", "control",
                                                       "user_defined", "unused", "byte"};

static uint64_t array_count(const struct gguf *gguf, const char *key)
{
    const struct gguf_value *value = gguf_find(gguf, key);
    return value && value->is_array ? value->count : 0;
}

static void count_kinds(const struct gguf *gguf, uint64_t *kinds)
{
    const struct gguf_value *types = gguf_find(gguf, "tokenizer.ggml.token_type");
    memset(kinds, 0, N_TOKEN_KINDS * sizeof(*kinds));
    for (uint64_t i = 0; types && types->is_array && i < types->count; i++) {
        int64_t kind = gguf_array_int(types, i);
        kinds[kind > 0 && kind < N_TOKEN_KINDS ? kind : 0]++;
    }
}

static bool token_text(const struct gguf *gguf, uint32_t id, struct gguf_string *out)
{
    const struct gguf_value *tokens = gguf_find(gguf, "tokenizer.ggml.tokens");
    size_t cursor = 0;
    if (!tokens || !tokens->is_array || id >= tokens->count)
        return false;
    for (uint32_t i = 0; i <= id; i++)
        if (!gguf_array_next_string(tokens, &cursor, out))
            return false;
    return true;
}

// The metadata's own names for tokens with a role: tokenizer.ggml.NAME_token_id.
static bool special_token(const struct gguf_value *value, struct gguf_string *name)
{
    static const char PREFIX[] = "tokenizer.ggml.", SUFFIX[] = "_token_id";
    size_t prefix = sizeof(PREFIX) - 1, suffix = sizeof(SUFFIX) - 1;
    if (value->is_array || value->key.length <= prefix + suffix ||
        memcmp(value->key.bytes, PREFIX, prefix) != 0 ||
        memcmp(value->key.bytes + value->key.length - suffix, SUFFIX, suffix) != 0)
        return false;
    *name = (struct gguf_string){value->key.bytes + prefix, value->key.length - prefix - suffix};
    return true;
}

static void print_vocabulary(struct arena *arena, const struct gguf *gguf)
{
    struct gguf_string model = {"none", 4}, pre = {"", 0}, template, name, text;
    uint64_t kinds[N_TOKEN_KINDS];
    gguf_get_string(gguf, "tokenizer.ggml.model", &model, NULL);
    gguf_get_string(gguf, "tokenizer.ggml.pre", &pre, NULL);
    printf("\nvocabulary\n  model %s%s%s, %" PRIu64 " tokens, %" PRIu64 " merges, %" PRIu64 " scores\n",
           readable(arena, model, SHOWN_BYTES), pre.length ? ", pre-tokenizer " : "",
           readable(arena, pre, SHOWN_BYTES), array_count(gguf, "tokenizer.ggml.tokens"),
           array_count(gguf, "tokenizer.ggml.merges"), array_count(gguf, "tokenizer.ggml.scores"));
    count_kinds(gguf, kinds);
    const char *before = "  kinds: ";
    for (size_t i = 0; i < N_TOKEN_KINDS; i++) {
        if (kinds[i]) {
            printf("%s%" PRIu64 " %s", before, kinds[i], TOKEN_KINDS[i]);
            before = ", ";
        }
    }
    printf("%s", before[0] == ',' ? "\n" : "");
    for (size_t i = 0; i < gguf_value_count(gguf); i++) {
        const struct gguf_value *value = gguf_value_at(gguf, i);
        if (!special_token(value, &name))
            continue;
        int64_t id = gguf_array_int(value, 0);
        bool known = id >= 0 && id <= UINT32_MAX && token_text(gguf, (uint32_t)id, &text);
        printf("  %-14s %" PRId64 " %s\n", readable(arena, name, SHOWN_BYTES), id,
               known ? readable(arena, text, SHOWN_BYTES) : "");
    }
    if (!gguf_get_string(gguf, "tokenizer.chat_template", &template, NULL))
        printf("  chat template  %zu bytes\n", template.length);
    arena_reset(arena);
}

static json_t *json_of_vocabulary(struct arena *arena, const struct gguf *gguf)
{
    struct gguf_string model = {"none", 4}, pre = {"", 0}, template = {"", 0}, name, text;
    uint64_t kinds[N_TOKEN_KINDS];
    json_t *by_kind = json_object(), *special = json_object();
    gguf_get_string(gguf, "tokenizer.ggml.model", &model, NULL);
    gguf_get_string(gguf, "tokenizer.ggml.pre", &pre, NULL);
    gguf_get_string(gguf, "tokenizer.chat_template", &template, NULL);
    count_kinds(gguf, kinds);
    for (size_t i = 0; i < N_TOKEN_KINDS; i++)
        if (kinds[i])
            json_object_set_new(by_kind, TOKEN_KINDS[i], json_integer((json_int_t)kinds[i]));
    for (size_t i = 0; i < gguf_value_count(gguf); i++) {
        const struct gguf_value *value = gguf_value_at(gguf, i);
        if (!special_token(value, &name))
            continue;
        int64_t id = gguf_array_int(value, 0);
        bool known = id >= 0 && id <= UINT32_MAX && token_text(gguf, (uint32_t)id, &text);
        json_object_set_new(special, readable(arena, name, SIZE_MAX),
                            json_pack("{s:I, s:o}", "id", (json_int_t)id, "text",
                                      known ? json_of_string(arena, text) : json_null()));
    }
    json_t *result = json_pack("{s:o, s:o, s:I, s:I, s:I, s:o, s:o, s:I}", "model",
                               json_of_string(arena, model), "pre", json_of_string(arena, pre), "tokens",
                               (json_int_t)array_count(gguf, "tokenizer.ggml.tokens"), "merges",
                               (json_int_t)array_count(gguf, "tokenizer.ggml.merges"), "scores",
                               (json_int_t)array_count(gguf, "tokenizer.ggml.scores"), "kinds", by_kind,
                               "special", special, "chat_template_bytes", (json_int_t) template.length);
    arena_reset(arena);
    return result;
}

// --- the whole ---

static void print_summary(const struct gguf *gguf)
{
    struct model_spec spec;
    struct error error = {0};
    char bytes[32];
    printf("%s\nGGUF version %" PRIu32 ", %" PRIu32 " part%s, %s, alignment %" PRIu64
           ", fingerprint %016" PRIx64 "\n",
           gguf_path(gguf), gguf_version(gguf), gguf_part_count(gguf), gguf_part_count(gguf) == 1 ? "" : "s",
           cli_format_bytes(bytes, sizeof(bytes), gguf_file_bytes(gguf)), gguf_alignment(gguf),
           gguf_fingerprint(gguf));
    if (gguf_tensor_count(gguf) == 0)
        printf("no tensors: a vocabulary\n");
    else if (model_spec_read(&spec, gguf, &error))
        printf("cannot be run: %s\n", error.text);
    else
        printf("%s: %s, %" PRIu32 " layers of width %" PRIu32 ", %" PRIu32 " heads over %" PRIu32
               " of %" PRIu32 ", feed-forward %" PRIu32 ", %" PRIu32 " tokens, context %" PRIu32 "\n",
               spec.name[0] ? spec.name : "model", spec.architecture, spec.n_layers, spec.width, spec.n_heads,
               spec.n_kv_heads, spec.head_size, spec.ffn_width, spec.vocab_size, spec.context);
}

static json_t *json_of_summary(struct arena *arena, const struct gguf *gguf)
{
    struct model_spec spec;
    struct error error = {0};
    char fingerprint[24];
    snprintf(fingerprint, sizeof(fingerprint), "%016" PRIx64, gguf_fingerprint(gguf));
    bool runs = model_spec_read(&spec, gguf, &error) == 0;
    return json_pack("{s:o, s:I, s:I, s:I, s:I, s:s, s:b, s:o}", "path",
                     json_of_string(arena, (struct gguf_string){gguf_path(gguf), strlen(gguf_path(gguf))}),
                     "version", (json_int_t)gguf_version(gguf), "parts", (json_int_t)gguf_part_count(gguf),
                     "bytes", (json_int_t)gguf_file_bytes(gguf), "alignment",
                     (json_int_t)gguf_alignment(gguf), "fingerprint", fingerprint, "runs", runs, "problem",
                     json_of_string(arena, (struct gguf_string){error.text, strlen(error.text)}));
}

static void print_text(const struct gguf *gguf, const struct sections *sections)
{
    struct arena arena = {0};
    print_summary(gguf);
    if (sections->metadata)
        print_metadata(&arena, gguf);
    if (sections->tensors)
        print_tensors(&arena, gguf);
    if (sections->vocabulary)
        print_vocabulary(&arena, gguf);
    arena_free(&arena);
}

static void print_json(const struct gguf *gguf, const struct sections *sections)
{
    struct arena arena = {0};
    json_t *root = json_of_summary(&arena, gguf);
    if (sections->metadata)
        json_object_set_new(root, "metadata", json_of_metadata(&arena, gguf));
    if (sections->tensors) {
        json_object_set_new(root, "tensors", json_of_tensors(&arena, gguf));
        json_object_set_new(root, "types", json_of_types(gguf));
    }
    if (sections->vocabulary)
        json_object_set_new(root, "vocabulary", json_of_vocabulary(&arena, gguf));
    arena_free(&arena);
    cli_print_json(root);
}

static int inspect(const struct config *config, struct error *error)
{
    struct gguf *gguf = NULL;
    struct sections sections = {config_flag(config, "metadata"), config_flag(config, "tensors"),
                                config_flag(config, "vocab")};
    if (!sections.metadata && !sections.tensors && !sections.vocabulary)
        sections = (struct sections){true, true, true};
    if (config_positional_count(config) != 1)
        return error_set(error, STATUS_INVALID, "inspect takes one model file; usage: %s", USAGE);
    int status = gguf_open(&gguf, config_positional(config, 0), error);
    if (status)
        return status;
    if (config_flag(config, "json"))
        print_json(gguf, &sections);
    else
        print_text(gguf, &sections);
    gguf_close(gguf);
    return STATUS_OK;
}

int command_inspect(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    int status = inspect(config, &error);
    config_free(config);
    return cli_report(status, &error);
}
