// `strata status`: what a server serves and how its pool is, from GetModel and GetPool.
#include <stdio.h>

#include "cli/cli_client.h"
#include "cli/cli_internal.h"

static const struct option OPTIONS[] = {
    CLIENT_OPTIONS,
    {"json", 'j', OPTION_FLAG, NULL, NULL, "Print one JSON object.", 0, 0},
    {0},
};

static const char USAGE[] = "strata status [options]";
static const char ABOUT[] = "Prints the model, the pool's stages and the load of a running server.";

static const char *pool_state_name(enum wire_pool_state state)
{
    static const char *const names[] = {"unknown", "waiting",      "loading",  "linking",
                                        "ready",   "reassembling", "draining", "failed"};
    return (unsigned)state < sizeof(names) / sizeof(names[0]) ? names[state] : names[0];
}

static json_t *stage_json(const struct wire_stage *stage)
{
    return json_pack("{s:i, s:s, s:s, s:i, s:i, s:I, s:I, s:I, s:I, s:s, s:f, s:f, s:I, s:I}", "index",
                     (int)stage->index, "worker", stage->worker, "device", stage->device, "first_layer",
                     (int)stage->first_layer, "layers", (int)stage->layers, "weight_bytes",
                     (json_int_t)stage->weight_bytes, "kv_bytes", (json_int_t)stage->kv_bytes, "loaded_bytes",
                     (json_int_t)stage->loaded_bytes, "load_bytes", (json_int_t)stage->load_bytes, "state",
                     stage->state, "busy", stage->busy, "waiting", stage->waiting, "layer_ns",
                     (json_int_t)stage->layer_ns, "head_ns", (json_int_t)stage->head_ns);
}

static void print_json(const struct wire_model *model, const struct wire_pool *pool)
{
    json_t *stages = json_array();
    for (uint32_t i = 0; i < pool->n_stages; i++)
        json_array_append_new(stages, stage_json(&pool->stages[i]));
    char fingerprint[20];
    snprintf(fingerprint, sizeof(fingerprint), "%016llx", (unsigned long long)model->fingerprint);
    json_t *about =
        json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:I, s:s, s:s, s:b}", "name", model->name, "architecture",
                  model->architecture, "layers", (int)model->layers, "vocabulary", (int)model->vocabulary,
                  "context", (int)model->context, "trained_context", (int)model->trained_context,
                  "file_bytes", (json_int_t)model->file_bytes, "fingerprint", fingerprint, "tokenizer",
                  model->tokenizer, "has_chat_template", (int)model->has_chat_template);
    cli_print_json(json_pack("{s:o, s:s, s:I, s:s, s:o, s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:i}", "model",
                             about, "state", pool_state_name(pool->state), "epoch", (json_int_t)pool->epoch,
                             "problem", pool->problem, "stages", stages, "workers_wanted",
                             (int)pool->workers_wanted, "pages", (int)pool->pages, "pages_free",
                             (int)pool->pages_free, "page_positions", (int)pool->page_positions, "running",
                             (int)pool->running, "waiting", (int)pool->waiting, "steps",
                             (json_int_t)pool->steps, "max_sequences", (int)pool->max_sequences));
}

static uint32_t count_joined(const struct wire_pool *pool)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < pool->n_stages; i++)
        n += pool->stages[i].worker[0] != '\0';
    return n;
}

// What the layers were dealt by, where it was measured.
static void print_times(const struct wire_stage *stage)
{
    if (stage->layer_ns)
        printf(", %.3f ms a layer", (double)stage->layer_ns / 1e6);
    if (stage->head_ns)
        printf(", head %.3f ms", (double)stage->head_ns / 1e6);
}

static void print_text(const struct wire_model *model, const struct wire_pool *pool)
{
    printf("model  %s (%s), %u layers, context %u of %u, %.1f MiB\n", model->name, model->architecture,
           model->layers, model->context, model->trained_context, (double)model->file_bytes / (1 << 20));
    printf("pool   %s%s%s, epoch %llu, %u of %u workers\n", pool_state_name(pool->state),
           pool->problem[0] ? ": " : "", pool->problem, (unsigned long long)pool->epoch, count_joined(pool),
           pool->workers_wanted);
    printf("load   %u running, %u waiting, %u of %u KV pages free, %llu steps\n", pool->running,
           pool->waiting, pool->pages_free, pool->pages, (unsigned long long)pool->steps);
    for (uint32_t i = 0; i < pool->n_stages; i++) {
        const struct wire_stage *stage = &pool->stages[i];
        if (!stage->worker[0]) {
            printf("stage %u  %-10s layers %u-%u, no worker yet\n", stage->index, "waiting",
                   stage->first_layer, stage->first_layer + stage->layers - 1);
            continue;
        }
        printf("stage %u  %-10s layers %u-%u, weights %.1f MiB, KV %.1f MiB", stage->index, stage->state,
               stage->first_layer, stage->first_layer + stage->layers - 1,
               (double)stage->weight_bytes / (1 << 20), (double)stage->kv_bytes / (1 << 20));
        print_times(stage);
        printf(", busy %.0f%%, waiting %.0f%%  %s (%s)\n", stage->busy * 100, stage->waiting * 100,
               stage->worker, stage->device);
    }
}

int command_status(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    struct client *client = NULL;
    struct arena arena = {0};
    struct wire_model model;
    struct wire_pool pool;
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    int status = client_open(&client, config, &error);
    if (status == STATUS_OK)
        status = client_get_model(client, &model, &arena, &error);
    if (status == STATUS_OK)
        status = client_get_pool(client, &pool, &arena, &error);
    if (status == STATUS_OK && config_flag(config, "json"))
        print_json(&model, &pool);
    else if (status == STATUS_OK)
        print_text(&model, &pool);
    client_close(client);
    arena_free(&arena);
    config_free(config);
    return cli_report(status, &error);
}
