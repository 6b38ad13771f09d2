// The scheduler against a simulated pool and simulated clients: thousands of seeded runs in which everything
// that may happen happens at random times (stages and results of any relative speed, slow and vanishing
// clients, deadlines, stop strings, choices, prompt scores, lost pools of changing size). The pool model
// refuses any plan that a correct pool could not run; the clients require exactly the tokens that the fake
// model gives the request alone, each once; the scheduler's own invariants are checked after every event, and
// the waits of whoever could have been served are bounded. A failing seed is named in the message and can be
// run alone by narrowing SEEDS.
#include "coordinator/scheduler_internal.h"
#include "tests/sim/pool_model.h"
#include "tests/suite.h"

#include <stdio.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SEEDS = 10 }; // several times slower
#else
enum { SEEDS = 40 };
#endif
enum { RUNS_PER_TEST = 50, MAX_CLIENTS = 40, SIM_CHOICES = 5, SIM_SLOTS = 16 };

struct expected {
    int32_t *tokens;
    float *logprobs;
    uint32_t count;
    enum finish_reason finish;
    int32_t matched;
    bool by_stop; // its client stops it after the last token
};

struct client {
    struct request *request; // NULL once submitted
    const struct request *spec;
    uint64_t id;
    uint64_t need; // pages
    uint32_t capacity, granted_at_start;
    uint32_t unread;
    uint32_t reads; // chance in 100 to read when asked
    bool stops;
    int64_t cancel_at; // by step of the run, -1 = never
    bool submitted, done, cancelled, saw_loss;
    uint32_t scored;
    uint64_t *hashes; // [n_prompt]: of the prompt up to and with each token
    struct expected expected[SIM_CHOICES];
    uint32_t got[SIM_CHOICES];
    bool ended[SIM_CHOICES];
};

struct sim {
    uint64_t seed, random;
    struct scheduler_options options;
    struct scheduler *scheduler;
    struct pool_model *pool;
    struct step_plan plan;
    int64_t now;
    uint64_t epoch;
    uint32_t n_pages, n_stages;
    uint32_t losses_left;
    int64_t ticks;
    struct client clients[MAX_CLIENTS];
    uint32_t n_clients, n_done;
    uint32_t waits[SIM_SLOTS]; // steps planned past each sequence that could decode
    uint32_t stage_weight[MAX_STAGES];
};

// Not ck_assert, which writes to a pipe each time it holds.
#define SIM_REQUIRE(sim, condition)                                                                          \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            ck_abort_msg("seed %llu, tick %lld: %s", (unsigned long long)(sim)->seed,                        \
                         (long long)(sim)->ticks, #condition);                                               \
    } while (0)

static uint64_t draw(struct sim *sim)
{
    sim->random = mix(sim->random, 0x51);
    return sim->random;
}

static uint32_t below(struct sim *sim, uint32_t limit)
{
    return (uint32_t)(draw(sim) % limit);
}

static bool chance(struct sim *sim, uint32_t percent)
{
    return below(sim, 100) < percent;
}

// --- clients ---

static bool is_end(const struct request *spec, int32_t token)
{
    for (uint32_t i = 0; i < spec->n_end_ids; i++) {
        if (spec->end_ids[i] == token)
            return true;
    }
    return false;
}

// The request alone, by the fake model.
static void expect_choice(struct sim *sim, struct client *client, const struct request *spec, uint32_t choice)
{
    struct expected *expected = &client->expected[choice];
    uint32_t room = sim->options.context - spec->n_prompt;
    uint32_t most = spec->max_tokens < room ? spec->max_tokens : room;
    struct fake_sampler sampler;
    fake_sampler_init(&sampler, &spec->sampling, spec->biases, spec->n_biases, spec->end_ids,
                      spec->sampling.min_tokens > 0 ? spec->n_end_ids : 0);
    for (uint32_t i = 0; i < spec->n_prompt; i++)
        fake_sampler_see(&sampler, spec->prompt[i], false);
    expected->tokens = calloc(most + 1, sizeof(*expected->tokens));
    expected->logprobs = calloc(most + 1, sizeof(*expected->logprobs));
    expected->finish = FINISH_LENGTH;
    expected->matched = -1;
    uint64_t hash = client->hashes[spec->n_prompt - 1];
    while (expected->count < most) {
        uint32_t k = expected->count;
        int32_t token = fake_draw(&sampler, hash, choice, spec->n_prompt + k, sim->options.vocab_size);
        if (is_end(spec, token)) {
            expected->finish = FINISH_STOP;
            expected->matched = token;
            return;
        }
        expected->tokens[k] = token;
        expected->logprobs[k] = spec->logprobs ? fake_logprob(hash, token) : 0;
        expected->count++;
        fake_sampler_see(&sampler, token, true);
        hash = mix(hash, (uint64_t)token);
        if (client->stops && mix((uint64_t)token, k) % 23 == 0) {
            expected->finish = FINISH_STOP;
            expected->by_stop = true;
            return;
        }
    }
}

static uint64_t pages_needed(const struct sim *sim, const struct request *spec)
{
    uint32_t room = sim->options.context - spec->n_prompt;
    uint32_t most = spec->max_tokens < room ? spec->max_tokens : room;
    uint32_t prompt = spec->n_prompt, full = prompt / KV_PAGE_POSITIONS;
    uint32_t all = prompt + (most > 0 ? most - 1 : 0);
    uint32_t each = (all + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS;
    return spec->n_choices > 1 && most > 1 ? full + spec->n_choices * (each - full) : each;
}

static void randomize_sampling(struct sim *sim, struct request *spec)
{
    spec->sampling.seed = draw(sim);
    spec->sampling.temperature = (float)below(sim, 3);
    if (chance(sim, 30))
        spec->sampling.repetition_penalty = 1.1f;
    if (chance(sim, 30))
        spec->sampling.frequency_penalty = 0.5f;
    if (chance(sim, 30))
        spec->sampling.min_tokens = below(sim, 20);
    spec->n_end_ids = below(sim, 4);
    spec->end_ids = calloc(spec->n_end_ids + 1, sizeof(*spec->end_ids));
    for (uint32_t i = 0; i < spec->n_end_ids; i++)
        spec->end_ids[i] = (int32_t)(10 * i + below(sim, 10));
    spec->n_biases = chance(sim, 20) ? 1 + below(sim, 3) : 0;
    spec->biases = calloc(spec->n_biases + 1, sizeof(*spec->biases));
    for (uint32_t i = 0; i < spec->n_biases; i++)
        spec->biases[i] =
            (struct logit_bias){(int32_t)below(sim, sim->options.vocab_size), (float)below(sim, 8)};
    spec->logprobs = chance(sim, 40);
    spec->top_logprobs = below(sim, 4);
    spec->prompt_logprobs = chance(sim, 25);
}

static void client_new(struct sim *sim, struct client *client, uint64_t id)
{
    struct request *spec = request_new();
    ck_assert_ptr_nonnull(spec);
    static const uint32_t longest[] = {4, 70, 200, 300};
    spec->id = client->id = id;
    spec->n_prompt = 1 + below(sim, longest[below(sim, 4)]);
    if (chance(sim, 20))
        spec->n_prompt = KV_PAGE_POSITIONS * (1 + below(sim, 3)) + below(sim, 3) - 1;
    if (spec->n_prompt >= sim->options.context)
        spec->n_prompt = sim->options.context - 1;
    spec->prompt = calloc(spec->n_prompt, sizeof(*spec->prompt));
    for (uint32_t i = 0; i < spec->n_prompt; i++)
        spec->prompt[i] = (int32_t)below(sim, sim->options.vocab_size);
    spec->max_tokens = chance(sim, 10) ? below(sim, 3) : below(sim, 150);
    spec->n_choices = chance(sim, 35) ? 1 + below(sim, SIM_CHOICES) : 1;
    randomize_sampling(sim, spec);
    client->stops = chance(sim, 30);
    client->capacity = spec->n_choices + below(sim, chance(sim, 50) ? 6 : 100);
    client->granted_at_start = chance(sim, 80) ? client->capacity : below(sim, client->capacity + 1);
    client->reads = chance(sim, 25) ? 3 : 50;
    client->cancel_at = chance(sim, 12) ? sim->ticks + below(sim, 4000) : -1;
    spec->credit = client->granted_at_start;
    client->need = pages_needed(sim, spec);
    client->hashes = calloc(spec->n_prompt, sizeof(*client->hashes));
    for (uint32_t i = 0; i < spec->n_prompt; i++)
        client->hashes[i] = mix(i > 0 ? client->hashes[i - 1] : 0, (uint64_t)spec->prompt[i]);
    for (uint32_t c = 0; c < spec->n_choices; c++)
        expect_choice(sim, client, spec, c);
    client->request = spec;
    client->spec = spec;
}

static void client_done(struct sim *sim, struct client *client)
{
    client->done = true;
    sim->n_done++;
}

static void client_free(struct client *client)
{
    request_free(client->request);
    free(client->hashes);
    for (uint32_t c = 0; c < SIM_CHOICES; c++) {
        free(client->expected[c].tokens);
        free(client->expected[c].logprobs);
    }
}

static void client_submit(struct sim *sim, struct client *client)
{
    struct error error = {0};
    struct scheduler_stats stats;
    scheduler_stats(sim->scheduler, &stats);
    if (chance(sim, 10))
        client->request->deadline_us = sim->now + 1 + below(sim, 40000);
    int status = scheduler_submit(sim->scheduler, client->request, sim->now, &error);
    if (status == STATUS_OK) {
        client->submitted = true;
        client->request = NULL;
        return;
    }
    bool never = client->spec->n_choices > sim->options.n_slots || (sim->pool && client->need > sim->n_pages);
    SIM_REQUIRE(sim, status == STATUS_EXHAUSTED && error.text[0]);
    SIM_REQUIRE(sim, never || stats.waiting == sim->options.max_waiting);
    if (never)
        client_done(sim, client);
}

static struct client *client_find(struct sim *sim, uint64_t id)
{
    SIM_REQUIRE(sim, id >= 1 && id <= sim->n_clients);
    return &sim->clients[id - 1];
}

static void take_token(struct sim *sim, struct client *client, const struct scheduler_event *event)
{
    uint32_t c = event->choice;
    struct expected *expected = &client->expected[c];
    uint32_t k = client->got[c]++;
    SIM_REQUIRE(sim, !client->ended[c] && k < expected->count);
    SIM_REQUIRE(sim, event->token == expected->tokens[k] && event->logprob == expected->logprobs[k]);
    SIM_REQUIRE(sim, event->n_tops == (client->spec->logprobs ? client->spec->top_logprobs : 0));
    SIM_REQUIRE(sim, !client->spec->prompt_logprobs || client->scored == client->spec->n_prompt - 1);
    client->unread++;
    SIM_REQUIRE(sim, client->unread <= client->capacity);
    if (expected->by_stop && client->got[c] == expected->count)
        scheduler_stop_choice(sim->scheduler, client->id, c, sim->now);
}

static void take_scores(struct sim *sim, struct client *client, const struct scheduler_event *event)
{
    const struct request *spec = client->spec;
    SIM_REQUIRE(sim, spec->prompt_logprobs && event->position == client->scored + 1 && event->n_scores > 0);
    for (uint32_t i = 0; i < event->n_scores; i++) {
        const struct step_prompt_logprob *score = &event->scores[i];
        uint32_t position = ++client->scored;
        SIM_REQUIRE(sim, position < spec->n_prompt && score->position == position);
        uint64_t hash = client->hashes[position - 1];
        SIM_REQUIRE(sim, score->token.token == spec->prompt[position]);
        SIM_REQUIRE(sim, score->token.logprob == fake_logprob(hash, spec->prompt[position]));
        SIM_REQUIRE(sim, score->top_count == spec->top_logprobs &&
                             score->top_first + score->top_count <= event->n_tops);
        for (uint32_t t = 0; t < score->top_count; t++)
            SIM_REQUIRE(sim, event->tops[score->top_first + t].token ==
                                 fake_top(hash, t, sim->options.vocab_size).token);
    }
}

static void take_choice_end(struct sim *sim, struct client *client, const struct scheduler_event *event)
{
    uint32_t c = event->choice;
    struct expected *expected = &client->expected[c];
    SIM_REQUIRE(sim, !client->ended[c]);
    client->ended[c] = true;
    if (event->finish == FINISH_CANCELLED)
        return;
    SIM_REQUIRE(sim, event->finish == expected->finish && event->matched_id == expected->matched);
    SIM_REQUIRE(sim, client->got[c] == expected->count);
}

static void take_request_end(struct sim *sim, struct client *client, const struct scheduler_event *event)
{
    const struct request *spec = client->spec;
    bool whole = true;
    for (uint32_t c = 0; c < spec->n_choices; c++) {
        SIM_REQUIRE(sim, client->ended[c]);
        whole = whole && client->got[c] == client->expected[c].count;
    }
    switch (event->status) {
    case STATUS_OK:
        SIM_REQUIRE(sim, whole && event->started_us > 0);
        SIM_REQUIRE(sim, !spec->prompt_logprobs || client->scored == spec->n_prompt - 1);
        break;
    case STATUS_CANCELLED:
        SIM_REQUIRE(sim, client->cancelled && !strcmp(event->text, "the client left"));
        break;
    case STATUS_DEADLINE:
        SIM_REQUIRE(sim, spec->deadline_us <= sim->now && event->text[0]);
        break;
    case STATUS_UNAVAILABLE:
        SIM_REQUIRE(sim, client->saw_loss && event->started_us >= 0);
        break;
    default:
        SIM_REQUIRE(sim, event->status == STATUS_EXHAUSTED && client->need > sim->n_pages && event->text[0]);
    }
    client_done(sim, client);
}

static void drain(struct sim *sim)
{
    struct scheduler_event event;
    while (scheduler_next_event(sim->scheduler, &event)) {
        struct client *client = client_find(sim, event.request);
        SIM_REQUIRE(sim, client->submitted && !client->done && event.spec == client->spec);
        if (event.kind == SCHEDULER_TOKEN)
            take_token(sim, client, &event);
        else if (event.kind == SCHEDULER_PROMPT)
            take_scores(sim, client, &event);
        else if (event.kind == SCHEDULER_CHOICE_END)
            take_choice_end(sim, client, &event);
        else
            take_request_end(sim, client, &event);
    }
}

// --- the pool ---

static void pool_start(struct sim *sim)
{
    static const uint32_t stages[] = {1, 1, 2, 3, 4, 7};
    sim->n_stages = stages[below(sim, 6)];
    sim->n_pages = 8 + below(sim, 60);
    struct step_bounds bounds = {.n_slots = sim->options.n_slots,
                                 .n_pages = sim->n_pages,
                                 .context = sim->options.context,
                                 .vocab_size = sim->options.vocab_size,
                                 .max_positions = sim->options.step_budget};
    sim->pool = pool_model_new(++sim->epoch, sim->n_stages, &bounds);
    for (uint32_t i = 0; i < sim->n_stages; i++)
        sim->stage_weight[i] = 1 + below(sim, chance(sim, 30) ? 30 : 3);
    memset(sim->waits, 0, sizeof(sim->waits));
    SIM_REQUIRE(sim,
                scheduler_pool_ready(sim->scheduler, sim->epoch, sim->n_stages, sim->n_pages, sim->now) == 0);
}

static void pool_stop(struct sim *sim)
{
    struct scheduler_stats stats;
    for (uint32_t i = 0; i < sim->n_clients; i++)
        sim->clients[i].saw_loss |= sim->clients[i].submitted;
    scheduler_pool_lost(sim->scheduler, "worker 2 is gone", sim->now);
    scheduler_stats(sim->scheduler, &stats);
    SIM_REQUIRE(sim, stats.running == 0 && stats.slots_used == 0 && stats.steps_in_flight == 0);
    struct step_result late = {.epoch = sim->epoch, .number = sim->pool->resulted};
    SIM_REQUIRE(sim, scheduler_result(sim->scheduler, &late, sim->now, NULL) == STATUS_OK);
    SIM_REQUIRE(sim, !scheduler_plan(sim->scheduler, sim->now, &sim->plan));
    pool_model_free(sim->pool);
    sim->pool = NULL;
}

// The oldest prompt that can be read, as the policy promises it a place in every step that has room for
// prompts.
static uint32_t first_prompt_slot(const struct scheduler *s)
{
    for (const struct node *node = s->prefill.head.next; node != &s->prefill.head; node = node->next) {
        const struct entry *entry = (const struct entry *)node;
        const struct sequence *sequence = &s->sequences[entry->choices[0].slot];
        uint32_t draws = entry->max_outputs > 0 ? entry->spec->n_choices : 0;
        if (entry->credit >= draws || entry->spec->n_prompt - sequence->position > 1)
            return sequence->slot;
    }
    return NO_SLOT;
}

// Whoever could decode and has credit is passed over at most for a bounded number of steps.
static void check_waits(struct sim *sim, uint32_t prompt_slot)
{
    const struct scheduler *s = sim->scheduler;
    bool prompt_served = prompt_slot == NO_SLOT;
    uint32_t budget = sim->options.step_budget, least = budget - (budget + 3) / 4;
    uint32_t rounds = budget > 1 ? (sim->options.n_slots + least - 1) / least : 2 * sim->options.n_slots;
    uint32_t bound = 2 * sim->n_stages + rounds + 1;
    for (uint32_t slot = 0; slot < sim->options.n_slots; slot++) {
        const struct sequence *sequence = &s->sequences[slot];
        bool could = sequence->node.chain == &s->ring && sequence->entry->credit > 0 &&
                     sequence->unresulted < MAX_AHEAD;
        sim->waits[slot] = could ? sim->waits[slot] + 1 : 0;
    }
    for (uint32_t r = 0; r < sim->plan.n_rows; r++) {
        sim->waits[sim->plan.rows[r].slot] = 0;
        prompt_served |= sim->plan.rows[r].slot == prompt_slot;
    }
    SIM_REQUIRE(sim, prompt_served || budget == 1); // which is taken in turns
    for (uint32_t slot = 0; slot < sim->options.n_slots; slot++)
        SIM_REQUIRE(sim, sim->waits[slot] <= bound);
}

static bool plan_once(struct sim *sim)
{
    scheduler_expire(sim->scheduler,
                     sim->now); // so that the prompt looked at is there when the step is planned
    uint32_t prompt_slot = first_prompt_slot(sim->scheduler);
    if (!scheduler_plan(sim->scheduler, sim->now, &sim->plan))
        return false;
    SIM_REQUIRE(sim, sim->pool != NULL);
    pool_model_push(sim->pool, &sim->plan);
    check_waits(sim, prompt_slot);
    return true;
}

static void run_a_stage(struct sim *sim)
{
    if (!sim->pool)
        return;
    uint32_t stage = below(sim, sim->n_stages);
    if (below(sim, sim->stage_weight[stage]) == 0 && pool_model_can_run(sim->pool, stage))
        pool_model_run(sim->pool, stage);
}

static void deliver_a_result(struct sim *sim)
{
    const struct step_result *result = sim->pool ? pool_model_result(sim->pool) : NULL;
    struct error error = {0};
    if (result)
        ck_assert_msg(scheduler_result(sim->scheduler, result, sim->now, &error) == STATUS_OK,
                      "seed %llu: %s", (unsigned long long)sim->seed, error.text);
}

// --- the run ---

static void act_as_client(struct sim *sim)
{
    struct client *client = &sim->clients[below(sim, sim->n_clients)];
    if (!client->submitted) {
        if (!client->done)
            client_submit(sim, client);
        return;
    }
    if (client->granted_at_start < client->capacity && chance(sim, 20)) {
        scheduler_credit(sim->scheduler, client->id, client->capacity - client->granted_at_start);
        client->granted_at_start = client->capacity;
    }
    if (client->unread > 0 && chance(sim, client->reads)) {
        uint32_t read = 1 + below(sim, client->unread);
        client->unread -= read;
        scheduler_credit(sim->scheduler, client->id, read); // also when it has just ended
    }
    if (!client->done && client->cancel_at >= 0 && sim->ticks > client->cancel_at) {
        client->cancelled = true;
        scheduler_cancel(sim->scheduler, client->id, STATUS_CANCELLED, "the client left", sim->now);
    }
}

static void tick(struct sim *sim)
{
    sim->ticks++;
    sim->now += 1 + below(sim, 20);
    uint32_t action = below(sim, 100);
    if (!sim->pool) {
        if (chance(sim, 20))
            pool_start(sim);
    } else if (sim->losses_left > 0 && below(sim, 2500) == 0) {
        sim->losses_left--;
        pool_stop(sim);
    }
    if (action < 60)
        run_a_stage(sim);
    else if (action < 80)
        deliver_a_result(sim);
    else
        act_as_client(sim);
    if (chance(sim, 70))
        drain(sim);
    for (uint32_t most = chance(sim, 50) ? 100 : below(sim, 2); most > 0 && plan_once(sim); most--)
        ;
}

static void check_deadlines(struct sim *sim)
{
    int64_t earliest = INT64_MAX;
    scheduler_expire(sim->scheduler, sim->now);
    drain(sim);
    for (uint32_t i = 0; i < sim->n_clients; i++) {
        struct client *client = &sim->clients[i];
        if (client->submitted && !client->done && client->spec->deadline_us < earliest)
            earliest = client->spec->deadline_us;
    }
    SIM_REQUIRE(sim, earliest > sim->now);
    SIM_REQUIRE(sim, earliest == scheduler_wake_us(sim->scheduler));
}

static void check_empty(struct sim *sim)
{
    struct scheduler_stats stats;
    for (uint32_t i = 0; i < 1000 && sim->pool; i++) { // what is in flight comes back to nobody
        for (uint32_t stage = 0; stage < sim->n_stages; stage++) {
            if (pool_model_can_run(sim->pool, stage))
                pool_model_run(sim->pool, stage);
        }
        deliver_a_result(sim);
        SIM_REQUIRE(sim, !plan_once(sim));
    }
    scheduler_check(sim->scheduler);
    scheduler_stats(sim->scheduler, &stats);
    SIM_REQUIRE(sim, stats.waiting == 0 && stats.running == 0 && stats.slots_used == 0);
    SIM_REQUIRE(sim, stats.steps_in_flight == 0 && stats.pages_free == stats.pages_total);
    SIM_REQUIRE(sim, scheduler_wake_us(sim->scheduler) == INT64_MAX);
}

static void sim_run(uint64_t seed)
{
    struct sim *sim = calloc(1, sizeof(*sim));
    ck_assert_ptr_nonnull(sim);
    sim->seed = seed;
    sim->random = mix(seed, 0x5EED);
    sim->now = 1000;
    static const uint32_t budgets[] = {1, 2, 5, 16, 64, 100, 256};
    sim->options = (struct scheduler_options){.n_slots = 1 + below(sim, SIM_SLOTS),
                                              .context = 100 + below(sim, 300),
                                              .vocab_size = 50 + below(sim, 150),
                                              .max_waiting = 1 + below(sim, 20),
                                              .step_budget = budgets[below(sim, 7)],
                                              .chunk = 1 + below(sim, 130)};
    sim->losses_left = chance(sim, 40) ? 1 + below(sim, 3) : 0;
    step_plan_init(&sim->plan);
    SIM_REQUIRE(sim, scheduler_new(&sim->scheduler, &sim->options) == STATUS_OK);
    sim->n_clients = 1 + below(sim, MAX_CLIENTS);
    for (uint32_t i = 0; i < sim->n_clients; i++)
        client_new(sim, &sim->clients[i], i + 1);
    if (chance(sim, 70))
        pool_start(sim);
    while (sim->n_done < sim->n_clients) {
        tick(sim);
        if (sim->ticks % 16 == 0) {
            scheduler_check(sim->scheduler);
            check_deadlines(sim);
        }
        SIM_REQUIRE(sim, sim->ticks < 4000000); // else somebody waits for ever
    }
    check_empty(sim);
    for (uint32_t i = 0; i < sim->n_clients; i++)
        client_free(&sim->clients[i]);
    scheduler_free(sim->scheduler);
    pool_model_free(sim->pool);
    step_plan_free(&sim->plan);
    free(sim);
}

START_TEST(random_runs)
{
    for (uint64_t run = 0; run < RUNS_PER_TEST; run++)
        sim_run((uint64_t)_i * RUNS_PER_TEST + run);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("scheduler_sim");
    TCase *runs = tcase_create("runs");
    tcase_set_timeout(runs, 120);
    tcase_add_loop_test(runs, random_runs, 0, SEEDS);
    suite_add_tcase(suite, runs);
    return suite;
}
