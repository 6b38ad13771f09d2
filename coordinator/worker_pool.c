// The state machine of the pool (drawn in worker_pool.h): messages and time in, assignments and events out.
// Everything here runs on the one thread that calls worker_pool_next_event; the streams' gRPC side is
// worker_pool_join.c, the arithmetic of who holds what worker_pool_plan.c and worker_pool_balance.c.
//
// A member is lost in one of three ways: its stream breaks, it falls silent, or it is sent away. Each ends
// the epoch if the member has a stage. The rest are told to drop the epoch (they keep their weights), and the
// next assembly begins as soon as enough members are there.
#include "coordinator/worker_pool_internal.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"

enum {
    PROGRESS_LINE_US = 2000000, // between two progress lines in the log
    MAX_RETRY_US = 60000000,    // the longest back-off
    SETTLED_US = 60000000,      // ready for so long: the next failure is a new one
    OVERDUE_BEATS = 4,          // heartbeats: a member that missed so many is a suspect
};

int worker_pool_new(struct worker_pool **out, const struct worker_pool_options *options, struct error *error)
{
    struct worker_pool *pool = calloc(1, sizeof(*pool));
    if (!pool)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    int status = shard_plan_make(&pool->plan, options->spec, options->gguf, options->n_workers, NULL, error);
    if (status) {
        free(pool);
        return status;
    }
    pool->options = *options;
    pool->bytes_plan = pool->plan;
    pool->options.heartbeat_us = options->heartbeat_us ? options->heartbeat_us : 1000000;
    pool->options.silence_us = options->silence_us ? options->silence_us : 10000000;
    pool->options.retry_us = options->retry_us ? options->retry_us : 2000000;
    pool->options.peer_grace_us = options->peer_grace_us ? options->peer_grace_us : 500000;
    pool->options.memory_fraction = options->memory_fraction > 0 ? options->memory_fraction : 0.9;
    pool->backend = options->backend ? strdup(options->backend) : NULL;
    pool->fingerprint = gguf_fingerprint(options->gguf);
    pool->state = WIRE_POOL_WAITING;
    pool->retry_us = pool->options.retry_us;
    // Epochs go up from the time of the start, so that nothing left over from an earlier coordinator fits.
    pool->epoch = (uint64_t)(clock_wall_us() / 1000);
    step_result_init(&pool->result);
    pthread_mutex_init(&pool->door, NULL);
    if (queue_new(&pool->news, sizeof(struct member *), MAX_JOINED) || (options->backend && !pool->backend)) {
        worker_pool_free(pool);
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    }
    *out = pool;
    return STATUS_OK;
}

static void drop_inbox(struct worker_pool *pool)
{
    for (struct parcel *parcel = pool->inbox, *next; parcel; parcel = next) {
        next = parcel->next;
        free(parcel);
    }
    pool->inbox = NULL;
    pool->reading = NULL;
}

// A member is on the list from its first message on; one that never spoke is only in the queue of news.
static void forget(struct worker_pool *pool, struct member *member)
{
    for (struct member **at = &pool->members; *at; at = &(*at)->next) {
        if (*at == member) {
            *at = member->next;
            break;
        }
    }
    pool_member_free(member);
}

void worker_pool_free(struct worker_pool *pool)
{
    if (!pool)
        return;
    drop_inbox(pool);
    bool flooded;
    while (pool->news && pool_collect(pool, &flooded)) {
        struct member *member = pool->reading;
        drop_inbox(pool);
        forget(pool, member);
    }
    while (pool->members)
        forget(pool, pool->members);
    queue_free(pool->news);
    pthread_mutex_destroy(&pool->door);
    step_result_free(&pool->result);
    wire_bytes_free(&pool->bytes);
    arena_free(&pool->arena);
    free(pool->backend);
    free(pool);
}

// --- the end of an epoch ---

bool pool_is_assembled(const struct worker_pool *pool)
{
    return pool->state == WIRE_POOL_LOADING || pool->state == WIRE_POOL_LINKING ||
           pool->state == WIRE_POOL_READY;
}

static void back_off(struct worker_pool *pool, int64_t now_us)
{
    if (pool->state == WIRE_POOL_READY && now_us - pool->ready_us >= SETTLED_US)
        pool->retry_us = pool->options.retry_us;
    pool->retry_at_us = now_us + pool->retry_us;
    pool->retry_us = pool->retry_us * 2 < MAX_RETRY_US ? pool->retry_us * 2 : MAX_RETRY_US;
}

// The epoch is over because of what the sentence says. `next` is the state to wait in.
static void end_epoch(struct worker_pool *pool, enum wire_pool_state next, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void end_epoch(struct worker_pool *pool, enum wire_pool_state next, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(pool->problem, sizeof(pool->problem), format, arguments);
    va_end(arguments);
    log_warn("epoch %" PRIu64 " is over: %s", pool->epoch, pool->problem);
    if (pool->state == WIRE_POOL_READY) {
        pool->announce_lost = true;
        pool->announce_ready = false;
    }
    pool->state = next;
    pool->grace_us = 0;
    pool_give_up_trial(pool);
    struct wire_coordinator_message abort = {
        .kind = WIRE_ABORT, .epoch = pool->epoch, .status = STATUS_UNAVAILABLE, .text = pool->problem};
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        struct member *member = pool->stages[s];
        pool->stages[s] = NULL;
        if (!member)
            continue;
        member->stage = -1;
        member->state = MEMBER_JOINED;
        member->kv_bytes = 0; // the worker frees its pages when it reads this
        pool_send(pool, member, &abort);
    }
}

// A member with a stage cannot go on (its stream broke, it is silent, it was sent away).
static void lose_member(struct worker_pool *pool, struct member *member, const char *why)
{
    if (member->stage < 0 || !pool_is_assembled(pool))
        return;
    uint32_t stage = (uint32_t)member->stage;
    bool was_ready = pool->state == WIRE_POOL_READY;
    member->stage = -1;
    pool->stages[stage] = NULL;
    pool->redealt = false; // the next ones are others
    end_epoch(pool, was_ready ? WIRE_POOL_REASSEMBLING : WIRE_POOL_WAITING, "worker %s (layers %u to %u) %s",
              member->name, member->held_first, member->held_first + member->held_layers - 1, why);
}

// A member that is still there reports that it cannot do its part: wait a little before trying again.
static void fail_epoch(struct worker_pool *pool, struct member *member, int64_t now_us, const char *what,
                       const char *text)
{
    bool was_ready = pool->state == WIRE_POOL_READY;
    member->failures++;
    back_off(pool, now_us);
    end_epoch(pool, was_ready ? WIRE_POOL_REASSEMBLING : WIRE_POOL_FAILED, "worker %s %s: %s", member->name,
              what, text);
}

void worker_pool_lose(struct worker_pool *pool, int32_t stage, int64_t now_us, const char *text)
{
    if (!pool_is_assembled(pool))
        return;
    struct member *member = stage >= 0 ? pool->stages[stage] : NULL;
    if (!member) {
        back_off(pool, now_us);
        end_epoch(pool, WIRE_POOL_REASSEMBLING, "%s", text);
        return;
    }
    member->failures++;
    lose_member(pool, member, text);
    pool_send_goodbye(pool, member, STATUS_UNAVAILABLE, pool->problem, true);
}

// --- assembly ---

uint32_t pool_count_joined(const struct worker_pool *pool)
{
    uint32_t count = 0;
    for (const struct member *member = pool->members; member; member = member->next)
        count += member->state != MEMBER_NEW && !member->leaving;
    return count;
}

// The edge that leaves a stage; a stage alone has none.
static enum wire_link link_after(const struct worker_pool *pool, uint32_t stage)
{
    uint32_t n = pool->plan.n_stages;
    return n > 1 ? pool_choose_link(pool->stages[stage], pool->stages[(stage + 1) % n]) : WIRE_LINK_SOCKET;
}

static enum wire_link link_before(const struct worker_pool *pool, uint32_t stage)
{
    return link_after(pool, (stage + pool->plan.n_stages - 1) % pool->plan.n_stages);
}

// A kind of device is measured once.
static bool wants_times(const struct worker_pool *pool)
{
    return !pool->options.by_bytes && pool->plan.n_stages > 1 && !pool_knows_costs(pool, pool->stages);
}

static void assign(struct worker_pool *pool, uint32_t stage)
{
    struct member *member = pool->stages[stage];
    const struct shard_stage *share = &pool->plan.stages[stage];
    member->stage = (int32_t)stage;
    member->state = MEMBER_LOADING;
    member->held_first = share->first_layer;
    member->held_layers = share->n_layers;
    member->done_bytes = 0;
    member->total_bytes = share->weight_bytes;
    member->steps_done = member->compute_us = member->wait_us = 0;
    member->busy = member->wait_share = 0;
    member->link_id_length = 0;
    member->kv_bytes = 0;
    member->run_level = pool_common_level(pool->stages, pool->plan.n_stages, member);
    struct wire_coordinator_message message = {.kind = WIRE_ASSIGN,
                                               .epoch = pool->epoch,
                                               .stage = stage,
                                               .n_stages = pool->plan.n_stages,
                                               .first_layer = share->first_layer,
                                               .n_layers = share->n_layers,
                                               .n_slots = pool->options.n_slots,
                                               .n_pages = pool->n_pages,
                                               .context = pool->options.context,
                                               .max_positions = pool->options.max_positions,
                                               .level = member->run_level,
                                               .next_link = link_after(pool, stage),
                                               .previous_link = link_before(pool, stage),
                                               .measure = wants_times(pool)};
    log_info("epoch %" PRIu64 ": stage %u of %u, layers %u to %u, goes to worker %s (%s)%s", pool->epoch,
             stage, pool->plan.n_stages, share->first_layer, share->first_layer + share->n_layers - 1,
             member->name, member->device,
             message.next_link == WIRE_LINK_NCCL ? ", linked to the next one over NCCL" : "");
    pool_send(pool, member, &message);
}

static int count_pages(struct worker_pool *pool, struct member *const stages[], struct error *error)
{
    int status = pool_count_pages(&pool->options, &pool->plan, stages, &pool->n_pages, error);
    if (!status && pool->fitting_pages && pool->fitting_pages < pool->n_pages)
        pool->n_pages = pool->fitting_pages;
    return status;
}

// How these workers are dealt the layers, as far as it is known. What was dealt to others by time need not
// fit them.
static void choose_deal(struct worker_pool *pool, struct member *const stages[])
{
    struct better_deal better;
    if (!pool_knows_costs(pool, stages) || !pool_has_room(pool, stages)) {
        pool->plan = pool->bytes_plan;
        pool->on_trial = false;
    }
    if (pool_find_better(pool, stages, &better))
        pool_begin_trial(pool, &better);
}

static void begin_epoch(struct worker_pool *pool, int64_t now_us)
{
    pool->epoch++;
    pool->state = WIRE_POOL_LOADING;
    pool->progress_us = now_us + PROGRESS_LINE_US;
    for (uint32_t s = 0; s < pool->plan.n_stages; s++)
        assign(pool, s);
}

static void assemble(struct worker_pool *pool, int64_t now_us)
{
    struct member *stages[MAX_STAGES];
    if (now_us < pool->retry_at_us)
        return;
    pool->retry_at_us = 0;
    if (!pool_deal(pool, stages))
        return; // somebody has to join first
    struct error error = {0};
    choose_deal(pool, stages);
    if (count_pages(pool, stages, &error)) {
        if (strcmp(pool->problem, error.text) != 0)
            log_error("%s", error.text);
        snprintf(pool->problem, sizeof(pool->problem), "%s", error.text);
        pool->state = WIRE_POOL_FAILED;
        back_off(pool, now_us);
        return;
    }
    memcpy(pool->stages, stages, pool->plan.n_stages * sizeof(*stages));
    begin_epoch(pool, now_us);
}

static bool all_in(const struct worker_pool *pool, enum member_state state)
{
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        if (!pool->stages[s] || pool->stages[s]->state != state)
            return false;
    }
    return true;
}

// Everybody has loaded and measured: perhaps the same workers are better dealt otherwise. At most once before
// the pool is ready; they keep what they have already and load only the layers that move.
static bool deal_again(struct worker_pool *pool, int64_t now_us)
{
    struct better_deal better;
    struct error ignored;
    pool->on_trial = false; // it has stood it
    pool_note_speeds(pool);
    if (!pool_find_better(pool, pool->stages, &better))
        return false;
    pool_begin_trial(pool, &better);
    pool->redealt = true;
    count_pages(pool, pool->stages, &ignored); // which the better deal has room for
    begin_epoch(pool, now_us);
    return true;
}

static void start_linking(struct worker_pool *pool)
{
    pool->state = WIRE_POOL_LINKING;
    uint32_t n = pool->plan.n_stages;
    for (uint32_t s = 0; s < n; s++) {
        const struct member *previous = pool->stages[(s + n - 1) % n];
        struct wire_coordinator_message connect = {
            .kind = WIRE_CONNECT,
            .epoch = pool->epoch,
            .next_address = pool->stages[(s + 1) % n]->link_address,
            .previous_id = {.data = previous->link_id, .length = previous->link_id_length}};
        pool_send(pool, pool->stages[s], &connect);
    }
}

static void become_ready(struct worker_pool *pool, int64_t now_us)
{
    uint64_t weights = 0, kv = 0;
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        weights += pool->stages[s]->weight_bytes;
        kv += pool->stages[s]->kv_bytes;
    }
    pool->state = WIRE_POOL_READY;
    pool->ready_us = now_us;
    pool->problem[0] = '\0';
    pool->fitting_pages = 0; // another assembly, another question
    pool->redealt = false;
    pool->announce_ready = true;
    log_info("epoch %" PRIu64
             " is ready: %u stages, %.1f MB of weights, %u KV pages of %d positions (%.1f MB)",
             pool->epoch, pool->plan.n_stages, (double)weights / 1e6, pool->n_pages, KV_PAGE_POSITIONS,
             (double)kv / 1e6);
}

// --- what workers say ---

static struct member *find_named(const struct worker_pool *pool, const char *name,
                                 const struct member *except)
{
    for (struct member *member = pool->members; member; member = member->next) {
        if (member != except && !member->leaving && member->name && strcmp(member->name, name) == 0)
            return member;
    }
    return NULL;
}

static void take_hello(struct worker_pool *pool, struct member *member,
                       const struct wire_worker_message *hello, int64_t now_us)
{
    char refusal[512];
    pool_judge_hello(pool, hello, refusal, sizeof(refusal));
    if (refusal[0] != '\0') {
        log_warn("a worker at %s is refused: %s", rpc_call_peer(member->call), refusal);
        pool_send_goodbye(pool, member, STATUS_INVALID, refusal, false);
        return;
    }
    struct member *namesake = find_named(pool, hello->worker, member);
    if (namesake && now_us - namesake->heard_us <= 3 * pool->options.heartbeat_us) {
        snprintf(refusal, sizeof(refusal), "a worker named %s is here already", hello->worker);
        log_warn("a worker at %s is refused: %s", rpc_call_peer(member->call), refusal);
        pool_send_goodbye(pool, member, STATUS_UNAVAILABLE, refusal, true);
        return;
    }
    if (namesake) {
        lose_member(pool, namesake, "was replaced by a new worker of its name");
        pool_cut(namesake, "a new worker took its name");
    }
    if (!pool_copy_hello(member, hello)) {
        pool_cut(member, "the coordinator is out of memory");
        return;
    }
    member->memory = pool_free_without_us(pool, member, hello->memory_free);
    member->state = MEMBER_JOINED;
    member->beat_us = now_us;
    pool_recall(pool, member);
    pool->retry_at_us = 0; // whatever failed may go well with this one
    log_info("worker %s joined from %s: %s, %.2f GB free (%u of %u)", member->name,
             rpc_call_peer(member->call), member->device, (double)hello->memory_free / 1e9,
             pool_count_joined(pool), pool->plan.n_stages);
}

static void take_loaded(struct worker_pool *pool, struct member *member,
                        const struct wire_worker_message *said, int64_t now_us)
{
    if (member->state != MEMBER_LOADING)
        return;
    bool id_due = link_after(pool, (uint32_t)member->stage) == WIRE_LINK_NCCL;
    if (said->link_id.length > (id_due ? MAX_LINK_ID : 0) || (id_due && said->link_id.length == 0)) {
        fail_epoch(pool, member, now_us, "could not begin its link",
                   id_due ? "it sent no id that its neighbour could use"
                          : "it sent an id that nobody asked for");
        return;
    }
    member->link_id_length = said->link_id.length;
    if (id_due)
        memcpy(member->link_id, said->link_id.data, said->link_id.length);
    member->state = MEMBER_LOADED;
    member->weight_bytes = said->weight_bytes;
    member->kv_bytes = said->kv_bytes;
    member->total_bytes = said->source_bytes ? said->source_bytes : member->total_bytes;
    member->done_bytes = member->total_bytes;
    pool_take_speed(member, said);
    log_info("worker %s loaded %u weights: %.1f MB of the file became %.1f MB in %.2f s", member->name,
             said->n_weights, (double)said->source_bytes / 1e6, (double)said->weight_bytes / 1e6,
             (double)said->load_us / 1e6);
}

// Only the worker knows what its device takes beside weights and pages. What it could do is tried at once,
// with fewer pages each time, and held against nobody.
static bool accept_fewer_pages(struct worker_pool *pool, const struct member *member,
                               const struct wire_worker_message *said)
{
    uint32_t least = (pool->options.context + KV_PAGE_POSITIONS - 1) / KV_PAGE_POSITIONS; // one sequence
    bool on_trial = pool->on_trial;
    if (on_trial && pool->trial_pages > least)
        least = pool->trial_pages;
    if (pool->options.n_pages || said->fits_pages < least || said->fits_pages >= pool->n_pages)
        return false;
    pool->fitting_pages = said->fits_pages;
    pool->on_trial = false;
    end_epoch(pool, WIRE_POOL_WAITING, "worker %s has room for %u of %u KV pages", member->name,
              said->fits_pages, pool->n_pages);
    pool->on_trial = on_trial; // which it stays
    return true;
}

static void take_failed(struct worker_pool *pool, struct member *member,
                        const struct wire_worker_message *said, int64_t now_us)
{
    if (pool->state == WIRE_POOL_LOADING && accept_fewer_pages(pool, member, said))
        return;
    if (pool->state == WIRE_POOL_LOADING && pool->on_trial) {
        end_epoch(pool, WIRE_POOL_WAITING, "worker %s could not load the layers it was dealt by time: %s",
                  member->name, said->text);
    } else if (pool->state == WIRE_POOL_LOADING) {
        fail_epoch(pool, member, now_us, "could not load its layers", said->text);
    } else if (said->peer_lost) {
        // The stream of the neighbour that died breaks about now, and says more than its neighbour can.
        if (pool->grace_us == 0) {
            pool->grace_us = now_us + pool->options.peer_grace_us;
            pool->grace_stage = (uint32_t)member->stage;
            snprintf(pool->grace_text, sizeof(pool->grace_text), "%s", said->text);
        }
    } else if (pool->state == WIRE_POOL_LINKING) {
        fail_epoch(pool, member, now_us, "could not link to its neighbours", said->text);
    } else {
        char what[64] = "failed";
        if (said->has_step)
            snprintf(what, sizeof(what), "failed in step %" PRIu64, said->step);
        fail_epoch(pool, member, now_us, what, said->text);
    }
}

// The newer half of a share that forgets: so much of `span` went by since the counter was at `before`.
static void update_share(double *share, uint64_t before, uint64_t now, int64_t span)
{
    if (now < before || span <= 0)
        return; // of another epoch
    double part = (double)(now - before) / (double)span;
    *share = 0.5 * *share + 0.5 * (part < 1 ? part : 1);
}

static void take_heartbeat(struct member *member, const struct wire_worker_message *said, int64_t now_us)
{
    int64_t span = now_us - member->beat_us;
    update_share(&member->busy, member->compute_us, said->compute_us, span);
    update_share(&member->wait_share, member->wait_us, said->wait_us, span);
    member->compute_us = said->compute_us;
    member->wait_us = said->wait_us;
    member->steps_done = said->steps_done;
    member->beat_us = now_us;
}

// Messages of an assembled epoch. True: `event` is a result.
static bool take_epoch_message(struct worker_pool *pool, struct member *member,
                               const struct wire_worker_message *said, int64_t now_us,
                               struct worker_pool_event *event)
{
    if (member->stage < 0 || !pool_is_assembled(pool) || said->epoch != pool->epoch)
        return false; // of an epoch that is over
    switch (said->kind) {
    case WIRE_PROGRESS:
        member->done_bytes = said->done_bytes;
        member->total_bytes = said->total_bytes;
        return false;
    case WIRE_LOADED:
        take_loaded(pool, member, said, now_us);
        return false;
    case WIRE_LINKED:
        if (pool->state == WIRE_POOL_LINKING)
            member->state = MEMBER_READY;
        return false;
    case WIRE_RESULT:
        *event = (struct worker_pool_event){.kind = WORKER_POOL_RESULT,
                                            .epoch = pool->epoch,
                                            .n_stages = pool->plan.n_stages,
                                            .result = &pool->result};
        return pool->state == WIRE_POOL_READY && (uint32_t)member->stage == pool->plan.n_stages - 1;
    case WIRE_FAILED:
        take_failed(pool, member, said, now_us);
        return false;
    case WIRE_HEARTBEAT:
        take_heartbeat(member, said, now_us);
        return false;
    default:
        return false;
    }
}

static void misbehaved(struct worker_pool *pool, struct member *member, const char *text)
{
    char why[600];
    snprintf(why, sizeof(why), "sent what it should not: %s", text);
    lose_member(pool, member, why);
    pool_cut(member, why);
}

static bool take_parcel(struct worker_pool *pool, struct member *member, const struct parcel *parcel,
                        int64_t now_us, struct worker_pool_event *event)
{
    struct error error = {0};
    struct wire_worker_message said = {.result = &pool->result};
    if (member->leaving)
        return false;
    member->heard_us = now_us;
    arena_reset(&pool->arena);
    step_result_clear(&pool->result);
    if (wire_decode_worker_message(&said, parcel->bytes, parcel->length, &pool->arena, &error)) {
        misbehaved(pool, member, error.text);
        return false;
    }
    if ((said.kind == WIRE_HELLO) != (member->state == MEMBER_NEW)) {
        misbehaved(pool, member,
                   said.kind == WIRE_HELLO ? "a second hello" : "no hello before anything else");
        return false;
    }
    if (said.kind == WIRE_HELLO) {
        take_hello(pool, member, &said, now_us);
        return false;
    }
    if (said.kind == WIRE_HEARTBEAT && (member->stage < 0 || said.epoch != pool->epoch))
        member->beat_us = now_us;
    return take_epoch_message(pool, member, &said, now_us, event);
}

// --- the loop ---

static bool is_listed(const struct worker_pool *pool, const struct member *member)
{
    for (const struct member *at = pool->members; at; at = at->next) {
        if (at == member)
            return true;
    }
    return false;
}

static void list_member(struct worker_pool *pool, struct member *member, int64_t now_us)
{
    struct member **end = &pool->members;
    while (*end)
        end = &(*end)->next;
    *end = member;
    member->heard_us = member->beat_us = now_us;
}

// The stream is over and everything it said was read.
static void member_gone(struct worker_pool *pool, struct member *member)
{
    lose_member(pool, member, member->why[0] ? member->why : "is gone: its connection broke");
    member->leaving = true;
    if (member->name)
        log_info("worker %s left (%u of %u are here)", member->name, pool_count_joined(pool),
                 pool->plan.n_stages);
    pool_remember(pool, member);
    forget(pool, member);
}

// Reads inboxes until a result turns up or everything is read.
static bool read_inboxes(struct worker_pool *pool, int64_t now_us, struct worker_pool_event *event)
{
    for (;;) {
        while (pool->inbox) {
            struct parcel *parcel = pool->inbox;
            pool->inbox = parcel->next;
            bool is_event = take_parcel(pool, pool->reading, parcel, now_us, event);
            free(parcel);
            if (is_event)
                return true;
        }
        if (pool->reading && pool->reading_gone)
            member_gone(pool, pool->reading);
        pool->reading = NULL;
        bool flooded;
        if (!pool_collect(pool, &flooded))
            return false;
        if (!is_listed(pool, pool->reading))
            list_member(pool, pool->reading, now_us);
        if (flooded)
            misbehaved(pool, pool->reading, "more messages than the coordinator can hold");
    }
}

static void check_silence(struct worker_pool *pool, int64_t now_us)
{
    struct wire_coordinator_message beat = {.kind = WIRE_COORDINATOR_HEARTBEAT, .epoch = pool->epoch};
    for (struct member *member = pool->members; member; member = member->next) {
        if (member->leaving)
            continue;
        if (now_us - member->heard_us >= pool->options.silence_us) {
            char why[96];
            snprintf(why, sizeof(why), "is silent: no heartbeat for %.0f s",
                     (double)pool->options.silence_us / 1e6);
            lose_member(pool, member, why);
            pool_cut(member, why);
        } else if (member->state != MEMBER_NEW) {
            pool_send(pool, member, &beat);
        }
    }
}

static void log_progress(struct worker_pool *pool, int64_t now_us)
{
    uint64_t done = 0, total = 0;
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        done += pool->stages[s]->done_bytes;
        total += pool->stages[s]->total_bytes;
    }
    log_info("loading: %.1f of %.1f MB", (double)done / 1e6, (double)total / 1e6);
    pool->progress_us = now_us + PROGRESS_LINE_US;
}

// What time alone changes.
static void take_time(struct worker_pool *pool, int64_t now_us)
{
    if (pool->grace_us && now_us >= pool->grace_us && pool_is_assembled(pool)) {
        struct member *member = pool->stages[pool->grace_stage];
        fail_epoch(pool, member, now_us, "lost the link to a neighbour", pool->grace_text);
    }
    if (now_us >= pool->tick_us) {
        pool->tick_us = now_us + pool->options.heartbeat_us;
        check_silence(pool, now_us);
    }
    if (pool->state == WIRE_POOL_LOADING && now_us >= pool->progress_us)
        log_progress(pool, now_us);
}

static void advance(struct worker_pool *pool, int64_t now_us)
{
    if (!pool_is_assembled(pool) && !pool->closed)
        assemble(pool, now_us);
    if (pool->state == WIRE_POOL_LOADING && all_in(pool, MEMBER_LOADED) && !deal_again(pool, now_us))
        start_linking(pool);
    if (pool->state == WIRE_POOL_LINKING && all_in(pool, MEMBER_READY))
        become_ready(pool, now_us);
}

static bool announce(struct worker_pool *pool, struct worker_pool_event *event)
{
    if (pool->announce_lost) {
        pool->announce_lost = false;
        *event =
            (struct worker_pool_event){.kind = WORKER_POOL_LOST, .epoch = pool->epoch, .text = pool->problem};
        return true;
    }
    if (pool->announce_ready) {
        pool->announce_ready = false;
        *event = (struct worker_pool_event){.kind = WORKER_POOL_READY,
                                            .epoch = pool->epoch,
                                            .n_stages = pool->plan.n_stages,
                                            .n_pages = pool->n_pages};
        return true;
    }
    return false;
}

bool worker_pool_next_event(struct worker_pool *pool, int64_t now_us, struct worker_pool_event *event)
{
    if (announce(pool, event))
        return true;
    if (read_inboxes(pool, now_us, event))
        return true;
    take_time(pool, now_us);
    if (announce(pool, event))
        return true; // the loss is told before the next epoch begins
    advance(pool, now_us);
    return announce(pool, event);
}

int64_t worker_pool_wake_us(const struct worker_pool *pool)
{
    if (pool->announce_lost || pool->announce_ready)
        return 0;
    int64_t wake = pool->tick_us;
    if (pool->grace_us && pool->grace_us < wake)
        wake = pool->grace_us;
    if (!pool_is_assembled(pool) && pool->retry_at_us && pool->retry_at_us < wake)
        wake = pool->retry_at_us;
    return wake;
}

// --- steps ---

int worker_pool_send_step(struct worker_pool *pool, const struct step_plan *plan, struct error *error)
{
    if (pool->state != WIRE_POOL_READY || plan->epoch != pool->epoch)
        return error_set(error, STATUS_UNAVAILABLE, "the pool is not ready");
    struct wire_coordinator_message message = {
        .kind = WIRE_STEP, .epoch = plan->epoch, .plan = (struct step_plan *)plan};
    if (wire_encode_coordinator_message(&pool->bytes, &message))
        return error_set(error, STATUS_NO_MEMORY, "out of memory while a step was encoded");
    for (uint32_t s = 0; s < pool->plan.n_stages; s++)
        pool_send_bytes(pool, pool->stages[s]);
    for (uint32_t s = 0; s < pool->plan.n_stages && pool->state == WIRE_POOL_READY; s++) {
        if (pool->stages[s]->leaving)
            lose_member(pool, pool->stages[s], "does not read what it is sent");
    }
    return STATUS_OK;
}

uint32_t worker_pool_suspect(const struct worker_pool *pool, uint64_t number)
{
    int64_t now_us = clock_now_us();
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        if (pool->stages[s] &&
            now_us - pool->stages[s]->heard_us > OVERDUE_BEATS * pool->options.heartbeat_us)
            return s;
    }
    for (uint32_t s = 0; s < pool->plan.n_stages; s++) {
        if (pool->stages[s] && pool->stages[s]->steps_done <= number)
            return s;
    }
    return pool->plan.n_stages - 1;
}

void worker_pool_farewell(struct worker_pool *pool, const char *text)
{
    pthread_mutex_lock(&pool->door);
    pool->closed = true;
    pthread_mutex_unlock(&pool->door);
    for (struct member *member = pool->members; member; member = member->next)
        pool_send_goodbye(pool, member, STATUS_UNAVAILABLE, text, true);
}
