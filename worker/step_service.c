// The device's thread. It owns the device, the weights, the executor and the links; `mutex` guards what
// others touch: which epoch is wanted, the links (so that an abort can wake a sleeping executor), the free
// plans and the numbers of heartbeats. An epoch that is no longer wanted ends quietly: whoever ended it
// knows.
//
// A step is submitted to the executor as soon as it comes, and finished when the device got there. While
// steps are unfinished the thread looks now for the one, now for the other: busily for a moment, then with
// short sleeps. A backend that computes at once (the CPU) never leaves a step unfinished, so nothing of this
// is seen.
#include "worker/step_service.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "common/queue.h"
#include "worker/executor.h"
#include "worker/memory_plan.h"
#include "worker/stage_links.h"
#include "worker/weight_cache.h"
#include "worker/weight_file.h"

enum {
    PLANS = 2 * MAX_STAGES + 8, // steps queued; the coordinator keeps stages + 1 in flight
    JOBS = PLANS + 32,
    PROGRESS_US = 100000, // between two reports of a load
    ADDRESS_BYTES = 128,
    SPIN_US = 50,    // how long a look-out for the device and for jobs is busy
    NAP_US = 30,     // and how often it looks afterwards
    CHECK_US = 1000, // between two looks at the links
};

enum job_kind { JOB_ASSIGN, JOB_CONNECT, JOB_STEP, JOB_TIDY };

struct assignment {
    uint32_t stage, n_stages, first_layer, n_layers, n_slots, n_pages, context, max_positions, level;
    enum wire_link next_link, previous_link;
};
struct job {
    enum job_kind kind;
    uint64_t epoch;
    struct assignment assignment;     // ASSIGN
    char next_address[ADDRESS_BYTES]; // CONNECT
    struct stage_link_ids ids;        // CONNECT
    struct step_plan *plan;           // STEP
};

struct step_service {
    struct step_service_options options;
    struct queue *jobs;
    pthread_t thread;
    bool started;
    pthread_mutex_t mutex;
    pthread_cond_t idle;
    // Under the mutex.
    uint64_t wanted_epoch; // 0: none
    int cancel;            // 1: what the thread is doing is not wanted (also read without the mutex)
    uint64_t jobs_queued, jobs_done;
    struct stage_links links;
    struct step_plan *free_plans[PLANS];
    uint32_t n_free;
    uint64_t epoch, steps_done, compute_us, wait_us, memory_free;
    char description[160], device_id[64];
    uint32_t level, nccl;
    struct stage_link_ids ids; // `next` is there from a LOADED to its CONNECT, and used again if none comes
    // The device's thread.
    struct device *device;
    struct weight_cache *weights;
    struct weight_list list;
    struct executor *executor;
    uint64_t executor_epoch, held_bytes; // all that the epoch takes but the weights
    uint32_t fits_pages;                 // with so many pages the load that failed would have fit
    struct assignment assignment;
    struct step_result result;
    bool gave_up;                  // the device is broken, and the owner knows
    int64_t idle_since_us;         // while steps are unfinished: when something happened last
    int64_t progress_us, check_us; // last report of a load, last look at the links
    struct step_plan plans[PLANS];
};

// --- small things under the mutex ---

static bool is_wanted(struct step_service *service, uint64_t epoch)
{
    pthread_mutex_lock(&service->mutex);
    bool wanted = epoch != 0 && service->wanted_epoch == epoch;
    pthread_mutex_unlock(&service->mutex);
    return wanted;
}

// Before long work for `epoch`: clears the signs of an earlier abort. False: this one is over too.
static bool begin(struct step_service *service, uint64_t epoch)
{
    pthread_mutex_lock(&service->mutex);
    bool wanted = service->wanted_epoch == epoch;
    if (wanted)
        __atomic_store_n(&service->cancel, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&service->mutex);
    return wanted;
}

static void note_memory(struct step_service *service)
{
    uint64_t held = service->held_bytes + (service->weights ? weight_cache_bytes(service->weights) : 0);
    uint64_t memory = service->device ? device_memory_free(service->device) + held : 0;
    if (service->options.memory && service->options.memory < memory)
        memory = service->options.memory;
    pthread_mutex_lock(&service->mutex);
    service->memory_free = memory;
    pthread_mutex_unlock(&service->mutex);
}

static void say(struct step_service *service, const struct wire_worker_message *message)
{
    service->options.say(service->options.context, message);
}

// --- the device ---

static void close_device(struct step_service *service)
{
    weight_cache_free(service->weights);
    service->weights = NULL;
    if (service->device)
        device_close(service->device);
    service->device = NULL;
}

// Swaps the device for one of another level (0: as configured), with an empty weight cache. On failure the
// old one stays.
static int open_device(struct step_service *service, uint32_t level, struct error *error)
{
    struct device_options options = service->options.device;
    struct device *device;
    struct weight_cache *weights;
    options.level = level ? level : options.level;
    int status = device_open(&device, &options, error);
    if (status)
        return status;
    if (level && device_level(device) != level)
        status = error_set(error, STATUS_UNSUPPORTED, "this machine runs at level %s, not at %s",
                           device_level_name(device_level(device)), device_level_name(level));
    else if (weight_cache_new(&weights, device))
        status = error_set(error, STATUS_NO_MEMORY, "no memory for the weight cache");
    if (status) {
        device_close(device);
        return status;
    }
    close_device(service);
    service->device = device;
    service->weights = weights;
    weight_cache_set_file(weights, service->options.gguf);
    pthread_mutex_lock(&service->mutex);
    service->level = device_level(device);
    snprintf(service->description, sizeof(service->description), "%s", device_describe(device));
    service->nccl = service->options.no_nccl ? 0 : link_nccl_version(device);
    service->device_id[0] = '\0';
    if (service->nccl)
        link_nccl_device_name(device, service->device_id, sizeof(service->device_id));
    pthread_mutex_unlock(&service->mutex);
    return STATUS_OK;
}

// Packed weights are of one level: another level means another device and a fresh load.
static int change_level(struct step_service *service, uint32_t level, struct error *error)
{
    if (level == 0 || level == device_level(service->device))
        return STATUS_OK;
    int status = open_device(service, level, error);
    if (!status)
        log_info("running at level %s, as the pool agreed", device_level_name(level));
    return status;
}

// --- the end of an epoch ---

static void close_links(struct step_service *service)
{
    pthread_mutex_lock(&service->mutex);
    struct stage_links links = service->links;
    service->links = (struct stage_links){0};
    pthread_mutex_unlock(&service->mutex);
    stage_links_close(&links);
}

static void end_epoch(struct step_service *service)
{
    close_links(service);
    executor_free(service->executor);
    service->executor = NULL;
    service->executor_epoch = 0;
    service->held_bytes = 0;
    if (service->device)
        device_ops(service->device)->reserve(service->device, 0, NULL);
}

// Every epoch would fail on a device that is broken, until the process is another.
static void check_device(struct step_service *service)
{
    if (service->gave_up || !device_broken(service->device))
        return;
    service->gave_up = true;
    service->options.broken(service->options.context, device_describe(service->device));
}

// Reports what went wrong (`step`: in which one, NULL = none) and ends the epoch; silently when the epoch was
// given up already.
static void fail(struct step_service *service, uint64_t epoch, const uint64_t *step,
                 const struct error *error)
{
    bool wanted;
    pthread_mutex_lock(&service->mutex);
    wanted = service->wanted_epoch == epoch;
    if (wanted)
        service->wanted_epoch = 0;
    pthread_mutex_unlock(&service->mutex);
    end_epoch(service);
    if (!wanted)
        return;
    struct wire_worker_message failed = {.kind = WIRE_FAILED,
                                         .epoch = epoch,
                                         .status = error->status,
                                         .text = error->text,
                                         .has_step = step != NULL,
                                         .step = step ? *step : 0,
                                         .peer_lost = error->status == STATUS_UNAVAILABLE,
                                         .fits_pages = service->fits_pages};
    log_warn("epoch %llu failed here: %s", (unsigned long long)epoch, error->text);
    say(service, &failed);
    check_device(service);
}

// --- loading ---

static int report_progress(void *context, uint64_t done, uint64_t total)
{
    struct step_service *service = context;
    int64_t now = clock_now_us();
    if (now - service->progress_us >= PROGRESS_US || done == total) {
        service->progress_us = now;
        struct wire_worker_message progress = {.kind = WIRE_PROGRESS,
                                               .epoch = service->executor_epoch,
                                               .done_bytes = done,
                                               .total_bytes = total};
        say(service, &progress);
    }
    return __atomic_load_n(&service->cancel, __ATOMIC_ACQUIRE);
}

static uint64_t memory_left(const struct step_service *service)
{
    uint64_t left = device_memory_free(service->device), budget = service->options.memory;
    uint64_t cached = weight_cache_bytes(service->weights);
    if (budget == 0)
        return left;
    budget = budget > cached ? budget - cached : 0;
    return budget < left ? budget : left;
}

static int check_assignment(const struct step_service *service, const struct assignment *a,
                            struct error *error)
{
    if (a->n_stages == 0 || a->n_stages > MAX_STAGES || a->stage >= a->n_stages || a->n_slots == 0 ||
        a->n_slots > MAX_SLOTS || a->n_pages == 0 || a->n_pages == UINT32_MAX || a->context == 0 ||
        a->context > MAX_CONTEXT || a->max_positions == 0 || a->max_positions > MAX_STEP_TOKENS)
        return error_set(
            error, STATUS_CORRUPT,
            "the assignment makes no sense: stage %u of %u, %u slots, %u pages, context %u, steps of %u",
            a->stage, a->n_stages, a->n_slots, a->n_pages, a->context, a->max_positions);
    bool first = a->first_layer == 0, last = a->first_layer + a->n_layers == service->options.spec->n_layers;
    if (first != (a->stage == 0) || last != (a->stage + 1 == a->n_stages))
        return error_set(error, STATUS_CORRUPT, "stage %u of %u was given layers %u to %u of %u", a->stage,
                         a->n_stages, a->first_layer, a->first_layer + a->n_layers - 1,
                         service->options.spec->n_layers);
    if ((a->next_link == WIRE_LINK_NCCL || a->previous_link == WIRE_LINK_NCCL) && service->nccl == 0)
        return error_set(error, STATUS_UNSUPPORTED, "stage %u was to be linked over NCCL, which is not here",
                         a->stage);
    return STATUS_OK;
}

static struct executor_options executor_options_of(const struct step_service *service, uint64_t epoch)
{
    const struct assignment *a = &service->assignment;
    return (struct executor_options){.device = service->device,
                                     .spec = service->options.spec,
                                     .list = &service->list,
                                     .weights = service->weights,
                                     .epoch = epoch,
                                     .stage = a->stage,
                                     .n_stages = a->n_stages,
                                     .first_layer = a->first_layer,
                                     .n_layers = a->n_layers,
                                     .bounds = {.n_slots = a->n_slots,
                                                .n_pages = a->n_pages,
                                                .context = a->context,
                                                .vocab_size = service->options.spec->vocab_size,
                                                .max_positions = a->max_positions}};
}

static struct stage_edges edges_of(const struct step_service *service)
{
    const struct assignment *a = &service->assignment;
    return (struct stage_edges){.stage = a->stage,
                                .n_stages = a->n_stages,
                                .n_slots = a->n_slots,
                                .max_positions = a->max_positions,
                                .width = service->options.spec->width,
                                .next = a->next_link,
                                .previous = a->previous_link};
}

// The id for the edge to the next stage. NCCL listens for the two ranks of each id it made until they came,
// so one that nobody has seen used yet is offered again.
static int offer_link_id(struct step_service *service, struct wire_worker_message *loaded,
                         unsigned char id[LINK_NCCL_ID_BYTES], struct error *error)
{
    if (service->assignment.next_link != WIRE_LINK_NCCL)
        return STATUS_OK;
    pthread_mutex_lock(&service->mutex);
    bool have = service->ids.has_next;
    memcpy(id, service->ids.next, LINK_NCCL_ID_BYTES);
    pthread_mutex_unlock(&service->mutex);
    int status = have ? STATUS_OK : link_nccl_make_id(id, error);
    if (status)
        return status;
    pthread_mutex_lock(&service->mutex);
    service->ids.has_next = true;
    memcpy(service->ids.next, id, LINK_NCCL_ID_BYTES);
    pthread_mutex_unlock(&service->mutex);
    loaded->link_id = (struct wire_text){.data = (const char *)id, .length = LINK_NCCL_ID_BYTES};
    return STATUS_OK;
}

static int list_weights(struct step_service *service, const struct assignment *a, struct error *error)
{
    weight_list_free(&service->list);
    int status = weight_list_make(&service->list, service->options.gguf, service->options.spec,
                                  a->first_layer, a->n_layers, error);
    uint64_t dropped = status ? 0 : weight_cache_drop(service->weights, &service->list);
    if (dropped)
        log_info("dropped %.1f MB of weights that other workers hold now", (double)dropped / 1e6);
    return status;
}

static int load_weights(struct step_service *service, const struct memory_plan *plan,
                        struct weight_totals *totals, struct error *error)
{
    struct weight_load load = {.memory_free = plan->free,
                               .other_bytes = memory_plan_others(plan),
                               .progress = report_progress,
                               .context = service};
    return weight_cache_precache(service->weights, &service->list, &load, totals, error);
}

// Everything up to LOADED.
static int load(struct step_service *service, const struct job *job, struct weight_totals *totals,
                struct memory_plan *plan, struct error *error)
{
    const struct assignment *a = &job->assignment;
    int status = check_assignment(service, a, error);
    if (!status)
        status = change_level(service, a->level, error);
    if (!status)
        status = list_weights(service, a, error);
    if (status)
        return status;
    service->assignment = *a;
    struct executor_options options = executor_options_of(service, job->epoch);
    const struct stage_edges edges = edges_of(service);
    status = memory_plan_make(plan, &options, stage_links_plan_bytes(&edges), memory_left(service), error);
    if (status)
        return status;
    memory_plan_log(plan);
    if (!memory_plan_fits(plan)) // which the load will say
        service->fits_pages = memory_plan_pages(plan, &options);
    status = load_weights(service, plan, totals, error);
    if (!status)
        status = executor_new(&service->executor, &options, error);
    if (!status)
        status = executor_warm_up(service->executor, error);
    if (status)
        return status;
    memory_plan_check(plan, service->device);
    service->held_bytes = memory_plan_others(plan);
    return STATUS_OK;
}

static void run_assign(struct step_service *service, const struct job *job)
{
    end_epoch(service);
    if (!begin(service, job->epoch))
        return;
    struct weight_totals totals = {0};
    struct error error = {0};
    struct memory_plan plan = {0};
    int64_t start = clock_now_us();
    service->executor_epoch = job->epoch;
    service->fits_pages = 0;
    service->progress_us = 0;
    unsigned char link_id[LINK_NCCL_ID_BYTES];
    struct wire_worker_message loaded = {.kind = WIRE_LOADED, .epoch = job->epoch};
    int status = load(service, job, &totals, &plan, &error);
    if (!status)
        status = offer_link_id(service, &loaded, link_id, &error);
    if (status) {
        fail(service, job->epoch, NULL, &error);
        service->fits_pages = 0;
    }
    note_memory(service);
    if (status)
        return;
    pthread_mutex_lock(&service->mutex);
    service->epoch = job->epoch;
    service->steps_done = service->compute_us = service->wait_us = 0;
    pthread_mutex_unlock(&service->mutex);
    const struct assignment *a = &service->assignment;
    log_info("stage %u of %u: layers %u to %u, %.1f MB of weights cached (%u loaded, %u kept), %.1f MB of KV",
             a->stage, a->n_stages, a->first_layer, a->first_layer + a->n_layers - 1,
             (double)totals.cached / 1e6, totals.n_loaded, totals.n_kept, (double)plan.stage.kv / 1e6);
    loaded.weight_bytes = totals.cached;
    loaded.kv_bytes = plan.stage.kv;
    loaded.source_bytes = totals.source_bytes;
    loaded.load_us = (uint64_t)(clock_now_us() - start);
    loaded.n_weights = totals.n_loaded + totals.n_kept;
    say(service, &loaded);
}

// --- linking and steps ---

static int link_stage(struct step_service *service, const struct job *job, struct error *error)
{
    if (!service->executor || service->executor_epoch != job->epoch)
        return error_set(error, STATUS_CORRUPT, "the links of epoch %llu come before its weights",
                         (unsigned long long)job->epoch);
    const struct stage_links_options options = {.device = service->device,
                                                .listener = service->options.listener,
                                                .next_address = job->next_address,
                                                .epoch = job->epoch,
                                                .edges = edges_of(service),
                                                .ids = job->ids,
                                                .timeout_us = service->options.link_timeout_us,
                                                .cancel = &service->cancel};
    struct stage_links links;
    int status = stage_links_make(&links, &options, error);
    if (status)
        return status;
    close_links(service);
    pthread_mutex_lock(&service->mutex);
    service->links = links;
    pthread_mutex_unlock(&service->mutex);
    executor_set_links(service->executor, links.to_next, links.from_previous);
    return STATUS_OK;
}

static void run_connect(struct step_service *service, const struct job *job)
{
    struct error error = {0};
    if (link_stage(service, job, &error)) {
        fail(service, job->epoch, NULL, &error);
        return;
    }
    // An abort that came just before the links were known has not touched them.
    if (!is_wanted(service, job->epoch)) {
        end_epoch(service);
        return;
    }
    struct wire_worker_message linked = {.kind = WIRE_LINKED, .epoch = job->epoch};
    say(service, &linked);
}

static uint32_t unfinished(const struct step_service *service)
{
    return service->executor ? executor_unfinished(service->executor) : 0;
}

static void report_step(struct step_service *service)
{
    pthread_mutex_lock(&service->mutex);
    service->steps_done++;
    service->compute_us += service->result.compute_us;
    service->wait_us += service->result.wait_us;
    pthread_mutex_unlock(&service->mutex);
    if (service->assignment.stage + 1 < service->assignment.n_stages)
        return;
    struct wire_worker_message result = {
        .kind = WIRE_RESULT, .epoch = service->executor_epoch, .result = &service->result};
    say(service, &result);
}

// A device waits for ever for a neighbour that is gone.
static int check_links(struct step_service *service, struct error *error)
{
    int64_t now = clock_now_us();
    if (now - service->check_us < CHECK_US)
        return STATUS_OK;
    service->check_us = now;
    return stage_links_check(&service->links, error); // only this thread makes and closes them
}

// Reports the steps that the device is done with. An epoch that is over ends with its unfinished steps, and
// one in which a step fails. True when anything happened.
static bool finish_steps(struct step_service *service)
{
    bool any = false;
    while (unfinished(service) > 0) {
        struct error error = {0};
        if (!is_wanted(service, service->executor_epoch)) {
            end_epoch(service);
            return true;
        }
        int status = executor_finish(service->executor, &service->result, false, &error);
        if (status == EXECUTOR_PENDING && check_links(service, &error)) {
            fail(service, service->executor_epoch, NULL, &error);
            return true;
        }
        if (status == EXECUTOR_PENDING)
            return any;
        any = true;
        if (status)
            fail(service, service->executor_epoch, &service->result.number, &error);
        else
            report_step(service);
    }
    return any;
}

// While the device computes and nothing comes.
static void rest(struct step_service *service)
{
    if (clock_now_us() - service->idle_since_us < SPIN_US)
        sched_yield();
    else
        clock_sleep_us(NAP_US);
}

static void finish_all_steps(struct step_service *service)
{
    service->idle_since_us = clock_now_us();
    while (finish_steps(service), unfinished(service) > 0)
        rest(service);
}

static void run_step(struct step_service *service, const struct job *job)
{
    struct error error = {0};
    uint64_t number = job->plan->number;
    int status;
    if (service->executor)
        status = executor_submit(service->executor, job->plan, &error);
    else
        status = error_set(&error, STATUS_CORRUPT, "a step came before its stage was loaded");
    if (status == STATUS_OK || status == EXECUTOR_DROPPED)
        return;
    finish_all_steps(service); // those before it are none the worse
    fail(service, job->epoch, &number, &error);
}

static void run_job(struct step_service *service, const struct job *job)
{
    if (job->kind != JOB_STEP)
        finish_all_steps(service);
    if (job->kind == JOB_TIDY || !is_wanted(service, job->epoch)) {
        if (service->executor && !is_wanted(service, service->executor_epoch))
            end_epoch(service);
        if (job->kind == JOB_TIDY) {
            note_memory(service);
            check_device(service); // the fault may be why the epoch ended, on another's word
        }
    } else if (job->kind == JOB_ASSIGN) {
        run_assign(service, job);
    } else if (job->kind == JOB_CONNECT) {
        run_connect(service, job);
    } else {
        run_step(service, job);
    }
    if (job->plan)
        step_service_return(service, job->plan);
}

// The next job, while unfinished steps are looked after. False: there will be none.
static bool next_job(struct step_service *service, struct job *job)
{
    service->idle_since_us = clock_now_us();
    for (;;) {
        if (finish_steps(service))
            service->idle_since_us = clock_now_us();
        uint32_t count = unfinished(service);
        if (count == 0)
            return queue_pop(service->jobs, job, -1) == STATUS_OK;
        if (count < EXECUTOR_DEPTH && queue_count(service->jobs) > 0)
            return queue_pop(service->jobs, job, 0) == STATUS_OK;
        rest(service);
    }
}

static void *run_jobs(void *argument)
{
    struct step_service *service = argument;
    struct job job;
    while (next_job(service, &job)) {
        run_job(service, &job);
        pthread_mutex_lock(&service->mutex);
        service->jobs_done++;
        pthread_cond_broadcast(&service->idle);
        pthread_mutex_unlock(&service->mutex);
    }
    return NULL;
}

// --- the other threads' side ---

static int queue_job(struct step_service *service, const struct job *job)
{
    pthread_mutex_lock(&service->mutex);
    int status = queue_try_push(service->jobs, job);
    if (!status)
        service->jobs_queued++;
    pthread_mutex_unlock(&service->mutex);
    return status;
}

int step_service_new(struct step_service **out, const struct step_service_options *options,
                     struct error *error)
{
    struct step_service *service = calloc(1, sizeof(*service));
    if (!service)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the step service");
    service->options = *options;
    pthread_mutex_init(&service->mutex, NULL);
    pthread_cond_init(&service->idle, NULL);
    step_result_init(&service->result);
    for (uint32_t i = 0; i < PLANS; i++) {
        step_plan_init(&service->plans[i]);
        service->free_plans[service->n_free++] = &service->plans[i];
    }
    int status = queue_new(&service->jobs, sizeof(struct job), JOBS);
    if (status)
        error_set(error, status, "no memory for the queue of steps");
    else
        status = open_device(service, 0, error);
    if (!status) {
        note_memory(service);
        service->started = pthread_create(&service->thread, NULL, run_jobs, service) == 0;
        if (!service->started)
            status = error_set(error, STATUS_IO, "cannot start the device's thread");
    }
    if (status) {
        step_service_free(service);
        return status;
    }
    *out = service;
    return STATUS_OK;
}

void step_service_free(struct step_service *service)
{
    if (!service)
        return;
    step_service_abort(service, 0);
    if (service->jobs)
        queue_close(service->jobs);
    if (service->started)
        pthread_join(service->thread, NULL);
    end_epoch(service);
    weight_list_free(&service->list);
    close_device(service);
    queue_free(service->jobs);
    step_result_free(&service->result);
    for (uint32_t i = 0; i < PLANS; i++)
        step_plan_free(&service->plans[i]);
    pthread_cond_destroy(&service->idle);
    pthread_mutex_destroy(&service->mutex);
    free(service);
}

int step_service_assign(struct step_service *service, const struct wire_coordinator_message *assign)
{
    step_service_abort(service, 0); // whatever there was is over
    pthread_mutex_lock(&service->mutex);
    service->wanted_epoch = assign->epoch;
    pthread_mutex_unlock(&service->mutex);
    struct job job = {.kind = JOB_ASSIGN,
                      .epoch = assign->epoch,
                      .assignment = {.stage = assign->stage,
                                     .n_stages = assign->n_stages,
                                     .first_layer = assign->first_layer,
                                     .n_layers = assign->n_layers,
                                     .n_slots = assign->n_slots,
                                     .n_pages = assign->n_pages,
                                     .context = assign->context,
                                     .max_positions = assign->max_positions,
                                     .level = assign->level,
                                     .next_link = assign->next_link,
                                     .previous_link = assign->previous_link}};
    return queue_job(service, &job);
}

int step_service_connect(struct step_service *service, const struct wire_coordinator_message *connect)
{
    struct job job = {.kind = JOB_CONNECT, .epoch = connect->epoch};
    snprintf(job.next_address, sizeof(job.next_address), "%s", connect->next_address);
    pthread_mutex_lock(&service->mutex);
    job.ids = service->ids;
    service->ids.has_next = false; // the neighbour uses it now
    pthread_mutex_unlock(&service->mutex);
    job.ids.has_previous = connect->previous_id.length == LINK_NCCL_ID_BYTES;
    if (job.ids.has_previous)
        memcpy(job.ids.previous, connect->previous_id.data, LINK_NCCL_ID_BYTES);
    return queue_job(service, &job);
}

struct step_plan *step_service_borrow(struct step_service *service)
{
    pthread_mutex_lock(&service->mutex);
    struct step_plan *plan = service->n_free ? service->free_plans[--service->n_free] : NULL;
    pthread_mutex_unlock(&service->mutex);
    if (plan)
        step_plan_clear(plan);
    return plan;
}

void step_service_return(struct step_service *service, struct step_plan *plan)
{
    pthread_mutex_lock(&service->mutex);
    service->free_plans[service->n_free++] = plan;
    pthread_mutex_unlock(&service->mutex);
}

int step_service_step(struct step_service *service, struct step_plan *plan)
{
    struct job job = {.kind = JOB_STEP, .epoch = plan->epoch, .plan = plan};
    int status = is_wanted(service, plan->epoch) ? queue_job(service, &job) : STATUS_UNAVAILABLE;
    if (status)
        step_service_return(service, plan);
    return status == STATUS_UNAVAILABLE ? STATUS_OK : status; // of another epoch: dropped
}

void step_service_abort(struct step_service *service, uint64_t epoch)
{
    pthread_mutex_lock(&service->mutex);
    bool meant = service->wanted_epoch != 0 && (epoch == 0 || service->wanted_epoch == epoch);
    if (meant) {
        service->wanted_epoch = 0;
        __atomic_store_n(&service->cancel, 1, __ATOMIC_RELEASE);
        stage_links_abort(&service->links);
    }
    pthread_mutex_unlock(&service->mutex);
    struct job tidy = {.kind = JOB_TIDY};
    if (meant)
        queue_job(service, &tidy); // a full queue tidies up by itself
}

void step_service_reset(struct step_service *service)
{
    step_service_abort(service, 0);
    struct job tidy = {.kind = JOB_TIDY};
    queue_job(service, &tidy);
    pthread_mutex_lock(&service->mutex);
    service->ids.has_next = false;
    while (service->jobs_done < service->jobs_queued)
        pthread_cond_wait(&service->idle, &service->mutex);
    pthread_mutex_unlock(&service->mutex);
}

void step_service_describe(struct step_service *service, struct wire_worker_message *hello)
{
    pthread_mutex_lock(&service->mutex);
    hello->backend = service->options.device.backend ? service->options.device.backend : "cpu";
    hello->device = service->description;
    hello->level = service->level;
    hello->threads = service->options.device.threads;
    hello->nccl = service->nccl;
    hello->device_id = service->device_id;
    hello->oversubscribe = service->options.oversubscribe;
    hello->memory_free = service->memory_free;
    pthread_mutex_unlock(&service->mutex);
}

void step_service_beat(struct step_service *service, struct wire_worker_message *beat)
{
    pthread_mutex_lock(&service->mutex);
    beat->epoch = service->epoch;
    beat->steps_done = service->steps_done;
    beat->compute_us = service->compute_us;
    beat->wait_us = service->wait_us;
    beat->memory_free = service->memory_free;
    pthread_mutex_unlock(&service->mutex);
}

uint64_t step_service_epoch(struct step_service *service)
{
    pthread_mutex_lock(&service->mutex);
    uint64_t epoch = service->wanted_epoch;
    pthread_mutex_unlock(&service->mutex);
    return epoch;
}
