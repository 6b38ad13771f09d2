// `strata plan`: the stages a model would be dealt to, from its header alone. Nothing is loaded. One thread.
#include <inttypes.h>
#include <stdio.h>

#include "cli/cli_internal.h"
#include "common/gguf.h"
#include "common/limits.h"
#include "common/model_spec.h"
#include "common/shard_plan.h"

enum { DEFAULT_CONTEXT = 4096 }; // what a server takes when the model's is longer

static const struct option OPTIONS[] = {
    {"workers", 'w', OPTION_INT, "N", "1", "Workers the model is dealt to.", 1, MAX_STAGES},
    {"context", 'c', OPTION_INT, "N", NULL,
     "Positions of the longest sequence. Default: the model's, at most 4096.", 1, MAX_CONTEXT},
    {"max-sequences", 0, OPTION_INT, "N", "32", "Sequences computed at once.", 1, MAX_SLOTS},
    {"json", 'j', OPTION_FLAG, NULL, NULL, "Print one JSON object.", 0, 0},
    {NULL, 0, OPTION_FLAG, NULL, NULL, NULL, 0, 0},
};
static const char USAGE[] = "strata plan MODEL.gguf [options]";
static const char ABOUT[] = "Prints how a model would be split over workers by bytes, before anything is "
                            "measured: for each stage its layers, the "
                            "bytes of its weights in the file, "
                            "and the bytes of key/value cache with which every sequence could reach the "
                            "whole context. Nothing is loaded.";

struct outlook {
    struct model_spec spec;
    struct shard_plan plan;
    uint64_t context, sequences;
    uint64_t positions; // of KV cache: whole pages for every sequence
    uint64_t file_bytes;
};

static uint64_t total_weights(const struct outlook *outlook)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < outlook->plan.n_stages; i++)
        total += outlook->plan.stages[i].weight_bytes;
    return total;
}

static void print_text(const struct outlook *outlook)
{
    const struct model_spec *spec = &outlook->spec;
    char weights[32], kv[32], layers[32];
    printf("%s (%s), %" PRIu32 " layers, %" PRIu32 " tokens, file %s\n", spec->name[0] ? spec->name : "model",
           spec->architecture, spec->n_layers, spec->vocab_size,
           cli_format_bytes(weights, sizeof(weights), outlook->file_bytes));
    printf("%" PRIu64 " sequences of %" PRIu64 " positions\n\n", outlook->sequences, outlook->context);
    printf("stage  layers        weights    KV/position       KV cache\n");
    for (uint32_t i = 0; i < outlook->plan.n_stages; i++) {
        const struct shard_stage *stage = &outlook->plan.stages[i];
        snprintf(layers, sizeof(layers), "%" PRIu32 "-%" PRIu32, stage->first_layer,
                 stage->first_layer + stage->n_layers - 1);
        printf("%5" PRIu32 "  %-9s %11s  %11" PRIu64 " B  %13s\n", i, layers,
               cli_format_bytes(weights, sizeof(weights), stage->weight_bytes), stage->kv_bytes_per_position,
               cli_format_bytes(kv, sizeof(kv), stage->kv_bytes_per_position * outlook->positions));
    }
    uint64_t per_position = model_spec_kv_bytes(spec, spec->n_layers);
    printf("total  %-9" PRIu32 " %11s  %11" PRIu64 " B  %13s\n", spec->n_layers,
           cli_format_bytes(weights, sizeof(weights), total_weights(outlook)), per_position,
           cli_format_bytes(kv, sizeof(kv), per_position * outlook->positions));
}

static void print_json(const struct outlook *outlook)
{
    const struct model_spec *spec = &outlook->spec;
    json_t *stages = json_array();
    for (uint32_t i = 0; i < outlook->plan.n_stages; i++) {
        const struct shard_stage *stage = &outlook->plan.stages[i];
        json_array_append_new(
            stages, json_pack("{s:I, s:I, s:I, s:I, s:I, s:I}", "stage", (json_int_t)i, "first_layer",
                              (json_int_t)stage->first_layer, "layers", (json_int_t)stage->n_layers,
                              "weight_bytes", (json_int_t)stage->weight_bytes, "kv_bytes_per_position",
                              (json_int_t)stage->kv_bytes_per_position, "kv_bytes",
                              (json_int_t)(stage->kv_bytes_per_position * outlook->positions)));
    }
    cli_print_json(json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:o}", "name", spec->name,
                             "architecture", spec->architecture, "layers", (json_int_t)spec->n_layers,
                             "vocabulary", (json_int_t)spec->vocab_size, "file_bytes",
                             (json_int_t)outlook->file_bytes, "context", (json_int_t)outlook->context,
                             "max_sequences", (json_int_t)outlook->sequences, "weight_bytes",
                             (json_int_t)total_weights(outlook), "stages", stages));
}

static int read_outlook(struct outlook *outlook, const struct config *config, struct error *error)
{
    struct gguf *gguf = NULL;
    if (config_positional_count(config) != 1)
        return error_set(error, STATUS_INVALID, "plan takes one model file; usage: %s", USAGE);
    int status = gguf_open(&gguf, config_positional(config, 0), error);
    if (status)
        return status;
    outlook->file_bytes = gguf_file_bytes(gguf);
    status = model_spec_read(&outlook->spec, gguf, error);
    if (!status)
        status = shard_plan_make(&outlook->plan, &outlook->spec, gguf,
                                 (uint32_t)config_int(config, "workers"), NULL, error);
    gguf_close(gguf);
    if (status)
        return status;
    outlook->context = outlook->spec.context < DEFAULT_CONTEXT ? outlook->spec.context : DEFAULT_CONTEXT;
    if (config_is_set(config, "context"))
        outlook->context = (uint64_t)config_int(config, "context");
    if (outlook->context > outlook->spec.context)
        return error_set(error, STATUS_INVALID,
                         "a context of %" PRIu64 " positions; the model was made for %" PRIu32,
                         outlook->context, outlook->spec.context);
    outlook->sequences = (uint64_t)config_int(config, "max-sequences");
    uint64_t pages = (outlook->context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    outlook->positions = pages * KV_PAGE_POSITIONS * outlook->sequences;
    return STATUS_OK;
}

int command_plan(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    struct outlook outlook;
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    int status = read_outlook(&outlook, config, &error);
    if (!status && config_flag(config, "json"))
        print_json(&outlook);
    else if (!status)
        print_text(&outlook);
    config_free(config);
    return cli_report(status, &error);
}
