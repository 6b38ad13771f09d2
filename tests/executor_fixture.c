// The engine, the plan at hand and the changed operations behind executor_fixture.h.
#include "tests/executor_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/ops/engine_driver.h"
#include "tests/suite.h"

struct local_engine engine;
struct error error;
struct device_options where = {.threads = 1}; // its backend: see open_engine
struct kernel_ops ops;
const struct kernel_ops *true_ops;

static char model[1024];

void open_engine(int vocabulary)
{
    const int32_t token = 1;
    char options[128];
    double *logits;
    size_t count;
    where.backend = getenv("STRATA_TEST_BACKEND");
    snprintf(options, sizeof(options),
             "arch=llama mix=q8_0 layers=2 vocab_size=%d embd=256 heads=4 kv_heads=2 ffn=256 context=512",
             vocabulary);
    ck_assert_msg(engine_oracle(options, &token, 1, model, sizeof(model), &logits, &count),
                  "the generator needs a python3 with numpy");
    free(logits);
    ck_assert_msg(local_engine_open(&engine, model, &where, SLOTS, CONTEXT, POSITIONS, &error) == 0, "%s",
                  error.text);
}

void executor_fixture_set_up(void)
{
    open_engine(VOCAB);
}

void executor_fixture_tear_down(void)
{
    local_engine_close(&engine);
}

struct step_command *add_open(uint32_t slot)
{
    struct step_command *open = step_plan_add_command(&engine.plan, STEP_OPEN, slot);
    open->sampling = SAMPLING_DEFAULTS;
    open->sampling.temperature = 0;
    return open;
}

void add_pages(uint32_t slot, uint32_t first, uint32_t page, uint32_t count)
{
    struct step_command *pages = step_plan_add_command(&engine.plan, STEP_PAGES, slot);
    pages->table_first = first;
    pages->pages_first = engine.plan.n_pages;
    pages->pages_count = count;
    for (uint32_t i = 0; i < count; i++, page++)
        step_plan_add_pages(&engine.plan, &page, 1);
}

struct step_row *add_row(uint32_t slot, uint32_t position, uint32_t count)
{
    struct step_row *row = step_plan_add_row(&engine.plan);
    row->slot = slot;
    row->position = position;
    row->count = count;
    row->tokens_first = engine.plan.n_tokens;
    for (uint32_t i = 0; i < count; i++) {
        int32_t token = (int32_t)((position + i) * 37 % VOCAB);
        step_plan_add_tokens(&engine.plan, &token, 1);
    }
    return row;
}

struct step_row *drawing(struct step_row *row, uint32_t draws)
{
    row->draws = draws;
    row->logits = STEP_LOGITS_LAST;
    return row;
}

void run(void)
{
    int status = local_engine_run(&engine, &error);
    ck_assert_msg(status == 0, "%s", error.text);
}

void refuse(int status, const char *text)
{
    ck_assert_int_eq(local_engine_run(&engine, &error), status);
    ck_assert_msg(strstr(error.text, text) != NULL, "'%s' does not say '%s'", error.text, text);
    ck_assert_int_eq(local_engine_run(&engine, &error), STATUS_UNAVAILABLE);
}

void change_ops(void)
{
    true_ops = device_ops(engine.device);
    ops = *true_ops;
    engine.device->ops = &ops;
}
