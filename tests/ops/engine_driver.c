// The engine driver: stage threads run executors, the caller's thread plays scheduler. Plans live in a ring;
// a plan's place is free again when every stage is done with it.
#include "tests/ops/engine_driver.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/queue.h"
#include "kernels/device.h"
#include "worker/executor.h"
#include "worker/link.h"
#include "worker/link_address.h"

enum { MAX_ENGINE_STAGES = 8, EPOCH = 3, LINK_TIMEOUT_US = 30000000 };

struct engine_stage {
    struct engine *engine;
    uint32_t index, first_layer, n_layers;
    pthread_t thread;
    struct queue *plans; // of uint32_t: places in the ring, UINT32_MAX ends
    struct link_listener *listener;
    char address[LINK_ADDRESS_BYTES];
    struct device *device;
    struct weight_cache *weights;
    struct weight_list list;
    struct executor *executor;
    struct link *to_next, *from_previous;
    const struct step_plan *running; // for the tap
    uint64_t finished;
    int status;
    struct error error;
};

struct engine {
    struct engine_options options;
    struct gguf *gguf;
    struct model_spec spec;
    uint32_t n_stages;
    struct engine_stage stages[MAX_ENGINE_STAGES];
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint32_t started; // stages that are ready or failed
    struct {
        struct step_plan plan;
        struct step_result result;
        uint32_t users;
    } ring[ENGINE_WINDOW];
    uint64_t submitted, waited;
    uint64_t finished; // results of the last stage
    bool failed;
};

const struct model_spec *engine_spec(const struct engine *engine)
{
    return &engine->spec;
}

// --- a stage's thread ---

static void show(void *context, uint32_t row, uint32_t position, const float *logits, uint32_t vocab)
{
    struct engine_stage *stage = context;
    stage->engine->options.tap(stage->engine->options.tap_context, stage->running->rows[row].slot, position,
                               logits, vocab);
}

static int open_stage(struct engine_stage *stage)
{
    struct engine *engine = stage->engine;
    const struct engine_options *with = &engine->options;
    const char *backend = getenv("STRATA_TEST_BACKEND");
    struct device_options device = {.backend = backend, .threads = with->threads, .level = with->level};
    struct weight_load load = {.memory_free = (uint64_t)1 << 40};
    struct weight_totals totals;
    int status = device_open(&stage->device, &device, &stage->error);
    if (!status)
        status = weight_list_make(&stage->list, engine->gguf, &engine->spec, stage->first_layer,
                                  stage->n_layers, &stage->error);
    if (!status)
        status = weight_cache_new(&stage->weights, stage->device);
    if (status)
        return status;
    weight_cache_set_file(stage->weights, engine->gguf);
    status = weight_cache_precache(stage->weights, &stage->list, &load, &totals, &stage->error);
    struct executor_options options = {.device = stage->device,
                                       .spec = &engine->spec,
                                       .list = &stage->list,
                                       .weights = stage->weights,
                                       .epoch = EPOCH,
                                       .stage = stage->index,
                                       .n_stages = engine->n_stages,
                                       .first_layer = stage->first_layer,
                                       .n_layers = stage->n_layers,
                                       .bounds = {.n_slots = with->n_slots,
                                                  .n_pages = with->n_pages,
                                                  .context = with->context,
                                                  .vocab_size = engine->spec.vocab_size,
                                                  .max_positions = with->max_positions}};
    if (!status)
        status = executor_new(&stage->executor, &options, &stage->error);
    if (!status && engine->n_stages > 1)
        status = link_socket_connect(&stage->to_next, &stage->from_previous, stage->listener,
                                     engine->stages[(stage->index + 1) % engine->n_stages].address, EPOCH,
                                     stage->index, engine->n_stages, LINK_TIMEOUT_US, NULL, &stage->error);
    if (!status) {
        executor_set_links(stage->executor, stage->to_next, stage->from_previous);
        if (with->tap)
            executor_set_tap(stage->executor, show, stage);
    }
    return status;
}

static void close_stage(struct engine_stage *stage)
{
    if (stage->to_next)
        stage->to_next->ops->close(stage->to_next);
    if (stage->from_previous)
        stage->from_previous->ops->close(stage->from_previous);
    executor_free(stage->executor);
    weight_cache_free(stage->weights);
    weight_list_free(&stage->list);
    if (stage->device)
        device_close(stage->device);
}

// A step of the stage is over, well or not.
static void count_step(struct engine_stage *stage, uint32_t at, int status)
{
    struct engine *engine = stage->engine;
    bool last = stage->index + 1 == engine->n_stages;
    pthread_mutex_lock(&engine->mutex);
    engine->ring[at].users--;
    engine->finished += last && !status;
    if (status) {
        stage->status = status;
        engine->failed = true;
        for (uint32_t i = 0; i < engine->n_stages; i++) { // wake whoever waits for this stage
            if (engine->stages[i].to_next)
                engine->stages[i].to_next->ops->abort(engine->stages[i].to_next);
            if (engine->stages[i].from_previous)
                engine->stages[i].from_previous->ops->abort(engine->stages[i].from_previous);
        }
    }
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->mutex);
}

static void submit_step(struct engine_stage *stage, uint32_t at)
{
    stage->running = &stage->engine->ring[at].plan;
    int status = executor_submit(stage->executor, stage->running, &stage->error);
    if (status)
        count_step(stage, at, status);
}

static void finish_step(struct engine_stage *stage)
{
    struct engine *engine = stage->engine;
    uint32_t at = stage->finished++ % ENGINE_WINDOW;
    struct step_result scratch, *result = &scratch;
    step_result_init(&scratch);
    if (stage->index + 1 == engine->n_stages)
        result = &engine->ring[at].result;
    int status = executor_finish(stage->executor, result, true, &stage->error);
    step_result_free(&scratch);
    count_step(stage, at, status);
}

static void *stage_main(void *argument)
{
    struct engine_stage *stage = argument;
    struct engine *engine = stage->engine;
    int status = open_stage(stage);
    pthread_mutex_lock(&engine->mutex);
    stage->status = status;
    engine->started++;
    engine->failed |= status != 0;
    pthread_cond_broadcast(&engine->changed);
    while (engine->started < engine->n_stages) // nobody closes links that others may still abort
        pthread_cond_wait(&engine->changed, &engine->mutex);
    pthread_mutex_unlock(&engine->mutex);
    uint32_t at;
    for (;;) { // as many steps on their way as there are
        uint32_t unfinished = status ? 0 : executor_unfinished(stage->executor);
        bool full = unfinished == EXECUTOR_DEPTH;
        if (unfinished > 0 && (full || queue_count(stage->plans) == 0))
            finish_step(stage);
        else if (queue_pop(stage->plans, &at, -1) == 0)
            submit_step(stage, at);
        else
            return NULL;
    }
}

// --- opening and closing ---

static uint32_t or_default(uint32_t value, uint32_t otherwise)
{
    return value ? value : otherwise;
}

static int start_stages(struct engine *engine, struct error *error)
{
    uint32_t first = 0, n = engine->n_stages;
    for (uint32_t i = 0; i < n; i++) {
        struct engine_stage *stage = &engine->stages[i];
        stage->engine = engine;
        stage->index = i;
        stage->first_layer = first;
        stage->n_layers = engine->spec.n_layers / n + (i < engine->spec.n_layers % n);
        first += stage->n_layers;
        int status = queue_new(&stage->plans, sizeof(uint32_t), 2 * ENGINE_WINDOW);
        if (!status)
            status = link_listener_open(&stage->listener, "127.0.0.1:0", stage->address,
                                        sizeof(stage->address), error);
        if (status)
            return status;
    }
    for (uint32_t i = 0; i < n; i++)
        pthread_create(&engine->stages[i].thread, NULL, stage_main, &engine->stages[i]);
    pthread_mutex_lock(&engine->mutex);
    while (engine->started < n)
        pthread_cond_wait(&engine->changed, &engine->mutex);
    pthread_mutex_unlock(&engine->mutex);
    for (uint32_t i = 0; i < n; i++) {
        if (engine->stages[i].status) {
            *error = engine->stages[i].error;
            return engine->stages[i].status;
        }
    }
    return STATUS_OK;
}

int engine_open(struct engine **out, const struct engine_options *options, struct error *error)
{
    struct engine *engine = calloc(1, sizeof(*engine));
    engine->options = *options;
    struct engine_options *with = &engine->options;
    with->threads = or_default(with->threads, 1);
    with->n_slots = or_default(with->n_slots, 32);
    with->n_pages = or_default(with->n_pages, 256);
    with->context = or_default(with->context, 1024);
    with->max_positions = or_default(with->max_positions, 1024);
    engine->n_stages = or_default(with->n_stages, 1);
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->changed, NULL);
    for (int i = 0; i < ENGINE_WINDOW; i++) {
        step_plan_init(&engine->ring[i].plan);
        step_result_init(&engine->ring[i].result);
    }
    int status = gguf_open(&engine->gguf, with->model, error);
    if (!status)
        status = model_spec_read(&engine->spec, engine->gguf, error);
    if (!status)
        status = start_stages(engine, error);
    if (status) {
        engine_close(engine);
        return status;
    }
    *out = engine;
    return STATUS_OK;
}

void engine_close(struct engine *engine)
{
    for (uint32_t i = 0; i < engine->n_stages; i++) {
        if (engine->stages[i].plans)
            queue_close(engine->stages[i].plans);
    }
    for (uint32_t i = 0; i < engine->n_stages; i++) {
        if (engine->stages[i].thread)
            pthread_join(engine->stages[i].thread, NULL);
    }
    for (uint32_t i = 0; i < engine->n_stages; i++) {
        close_stage(&engine->stages[i]);
        link_listener_close(engine->stages[i].listener);
        queue_free(engine->stages[i].plans);
    }
    for (int i = 0; i < ENGINE_WINDOW; i++) {
        step_plan_free(&engine->ring[i].plan);
        step_result_free(&engine->ring[i].result);
    }
    gguf_close(engine->gguf);
    pthread_mutex_destroy(&engine->mutex);
    pthread_cond_destroy(&engine->changed);
    free(engine);
}

// --- plans and results ---

struct step_plan *engine_plan(struct engine *engine)
{
    uint32_t at = engine->submitted % ENGINE_WINDOW;
    pthread_mutex_lock(&engine->mutex);
    while (engine->ring[at].users > 0)
        pthread_cond_wait(&engine->changed, &engine->mutex);
    pthread_mutex_unlock(&engine->mutex);
    struct step_plan *plan = &engine->ring[at].plan;
    step_plan_clear(plan);
    plan->epoch = EPOCH;
    plan->number = engine->submitted;
    return plan;
}

void engine_submit(struct engine *engine)
{
    uint32_t at = engine->submitted++ % ENGINE_WINDOW;
    pthread_mutex_lock(&engine->mutex);
    engine->ring[at].users = engine->n_stages;
    pthread_mutex_unlock(&engine->mutex);
    for (uint32_t i = 0; i < engine->n_stages; i++)
        queue_push(engine->stages[i].plans, &at);
}

static int first_failure(const struct engine *engine, struct error *error)
{
    int status = STATUS_INTERNAL;
    for (uint32_t i = 0; i < engine->n_stages; i++) {
        int of_stage = engine->stages[i].status;
        if (of_stage && (status == STATUS_INTERNAL || status == STATUS_CANCELLED)) {
            status = of_stage; // not the cancellations that followed
            *error = engine->stages[i].error;
        }
    }
    return status;
}

int engine_wait(struct engine *engine, const struct step_result **result, struct error *error)
{
    int status = STATUS_OK;
    pthread_mutex_lock(&engine->mutex);
    while (engine->finished <= engine->waited && !engine->failed)
        pthread_cond_wait(&engine->changed, &engine->mutex);
    if (engine->finished <= engine->waited)
        status = first_failure(engine, error);
    pthread_mutex_unlock(&engine->mutex);
    *result = &engine->ring[engine->waited++ % ENGINE_WINDOW].result;
    return status;
}

// --- playing jobs ---

struct player {
    uint32_t done;     // positions planned
    uint32_t drawn;    // tokens planned to be drawn
    uint32_t received; // tokens that came back
    uint32_t n_pages;
    uint64_t last_step; // that drew for it
    uint32_t last_row;
    bool open, closed;
};

struct game {
    struct engine *engine;
    const struct engine_job *jobs;
    struct player *players;
    uint32_t n_jobs, next_page;
    const uint32_t *page_order;
};

static bool over(const struct game *game, uint32_t i)
{
    const struct engine_job *job = &game->jobs[i];
    return game->players[i].done >= job->n_prompt && game->players[i].drawn == job->n_new;
}

static void open_job(struct game *game, struct step_plan *plan, uint32_t i)
{
    const struct engine_job *job = &game->jobs[i];
    struct step_command *open = step_plan_add_command(plan, STEP_OPEN, i);
    open->sampling = job->sampling;
    open->history_first = (uint32_t)step_plan_add_tokens(plan, job->prompt, job->n_prompt);
    open->history_count = open->history_prompt = job->n_prompt;
    game->players[i].open = true;
}

static void give_pages(struct game *game, struct step_plan *plan, uint32_t i, uint32_t end)
{
    struct player *player = &game->players[i];
    while (player->n_pages * KV_PAGE_POSITIONS < end) {
        uint32_t page = game->page_order ? game->page_order[game->next_page] : game->next_page;
        game->next_page++;
        struct step_command *pages = step_plan_add_command(plan, STEP_PAGES, i);
        pages->table_first = player->n_pages++;
        pages->pages_first = (uint32_t)step_plan_add_pages(plan, &page, 1);
        pages->pages_count = 1;
    }
}

static void add_row(struct game *game, struct step_plan *plan, uint32_t i)
{
    const struct engine_job *job = &game->jobs[i];
    struct player *player = &game->players[i];
    bool prefill = player->done < job->n_prompt;
    uint32_t left = prefill ? job->n_prompt - player->done : 1;
    uint32_t count = prefill && job->chunk && job->chunk < left ? job->chunk : left;
    give_pages(game, plan, i, player->done + count);
    struct step_row *row = step_plan_add_row(plan);
    row->slot = i;
    row->position = player->done;
    row->count = count;
    row->generated = !prefill;
    if (prefill) {
        row->tokens_first = (uint32_t)step_plan_add_tokens(plan, job->prompt + player->done, count);
    } else if (job->ahead) {
        row->from_sample = true;
        row->source_step = player->last_step;
        row->source_row = player->last_row;
    } else {
        row->tokens_first = (uint32_t)step_plan_add_tokens(plan, &job->out[player->received - 1], 1);
    }
    player->done += count;
    if (player->done >= job->n_prompt && player->drawn < job->n_new) {
        row->draws = 1;
        row->logits = STEP_LOGITS_LAST;
        row->logprobs = job->out_logprobs != NULL;
        player->drawn++;
        player->last_step = plan->number;
        player->last_row = plan->n_rows - 1;
    }
    row->top_logprobs = job->top;
    if (prefill && job->score) {
        row->logits = STEP_LOGITS_ALL;
        row->next_token = player->done < job->n_prompt ? job->prompt[player->done] : -1;
    }
}

static void take_result(struct game *game, const struct step_plan *plan, const struct step_result *result)
{
    for (uint32_t s = 0; s < result->n_samples; s++) {
        uint32_t slot = plan->rows[result->samples[s].row].slot;
        struct player *player = &game->players[slot];
        if (game->jobs[slot].out_logprobs)
            game->jobs[slot].out_logprobs[player->received] = result->samples[s].logprob;
        game->jobs[slot].out[player->received++] = result->samples[s].token;
    }
    for (uint32_t p = 0; p < result->n_prompts; p++) {
        uint32_t slot = plan->rows[result->prompts[p].row].slot;
        if (game->jobs[slot].scores)
            game->jobs[slot].scores[result->prompts[p].position] = result->prompts[p].token.logprob;
    }
}

// Generated rows stand first in a plan: one pass for them, then one for prompts.
static void add_rows(struct game *game, uint64_t turn, struct step_plan *plan, bool generated)
{
    for (uint32_t i = 0; i < game->n_jobs; i++) {
        const struct player *player = &game->players[i];
        bool decodes = player->done >= game->jobs[i].n_prompt;
        if (player->closed || over(game, i) || decodes != generated || turn < game->jobs[i].delay)
            continue;
        if (!player->open)
            open_job(game, plan, i);
        add_row(game, plan, i);
    }
}

static bool plan_step(struct game *game, uint64_t turn, struct step_plan *plan)
{
    bool all_over = true;
    for (uint32_t i = 0; i < game->n_jobs; i++) {
        struct player *player = &game->players[i];
        all_over &= over(game, i);
        if (!over(game, i) || player->closed)
            continue;
        if (player->open)
            step_plan_add_command(plan, STEP_CLOSE, i);
        player->closed = true;
    }
    add_rows(game, turn, plan, true);
    add_rows(game, turn, plan, false);
    return !all_over;
}

int engine_play(struct engine *engine, const struct engine_job *jobs, uint32_t n_jobs,
                const uint32_t *page_order, struct error *error)
{
    struct game game = {engine, jobs, calloc(n_jobs, sizeof(struct player)), n_jobs, 0, page_order};
    bool waits = false, more = true;
    int status = STATUS_OK;
    for (uint32_t i = 0; i < n_jobs; i++)
        waits |= !jobs[i].ahead;
    for (uint64_t turn = 0; !status && (more || engine->waited < engine->submitted); turn++) {
        if (more) {
            more = plan_step(&game, turn, engine_plan(engine));
            engine_submit(engine); // the last one only closes
        }
        uint64_t keep = waits || !more ? 0 : engine->n_stages + 1; // steps left in flight
        while (!status && engine->submitted - engine->waited > keep) {
            const struct step_plan *plan = &engine->ring[engine->waited % ENGINE_WINDOW].plan;
            const struct step_result *result;
            status = engine_wait(engine, &result, error);
            if (!status)
                take_result(&game, plan, result);
        }
    }
    free(game.players);
    return status;
}

// --- the oracle ---

static bool read_line(FILE *from, char *line, size_t capacity)
{
    if (!fgets(line, (int)capacity, from))
        return false;
    line[strcspn(line, "\n")] = '\0';
    return *line != '\0';
}

static double *read_doubles(const char *path, size_t *count)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return NULL;
    fseek(file, 0, SEEK_END);
    *count = (size_t)ftell(file) / sizeof(double);
    rewind(file);
    double *values = malloc(*count * sizeof(double));
    size_t got = fread(values, sizeof(double), *count, file);
    fclose(file);
    if (got == *count)
        return values;
    free(values);
    return NULL;
}

bool engine_oracle(const char *options, const int32_t *tokens, uint32_t n_tokens, char *model,
                   size_t capacity, double **logits, size_t *count)
{
    char command[8192], saved[1024];
    const char *source = getenv("STRATA_TEST_SOURCE"), *python = getenv("STRATA_TEST_PYTHON");
    size_t at = (size_t)snprintf(command, sizeof(command), "%s '%s/tests/tools/oracle.py' ",
                                 python ? python : "/usr/bin/python3", source ? source : ".");
    for (uint32_t i = 0; i < n_tokens; i++)
        at += (size_t)snprintf(command + at, sizeof(command) - at, "%s%d", i ? "," : "", tokens[i]);
    snprintf(command + at, sizeof(command) - at, " %s", options);
    FILE *run = popen(command, "r");
    bool made = run && read_line(run, model, capacity) && read_line(run, saved, sizeof(saved));
    made = run && pclose(run) == 0 && made;
    *logits = made ? read_doubles(saved, count) : NULL;
    return *logits != NULL;
}
