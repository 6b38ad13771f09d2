// The device, and what an epoch takes of it: opening it at the level that the pool agreed on, the weights and
// the executor of an assignment, and the end of all that. Runs on the device's thread, which owns the device,
// the weights and the executor; opening and closing also on the thread that makes and frees the service, when
// there is no other.
#include "worker/step_service.h"

#include <stdio.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/memory_plan.h"
#include "worker/step_service_internal.h"

enum {
    PROGRESS_US = 100000, // between two reports of a load
};

// --- the device ---

void step_service_close_device(struct step_service *service)
{
    weight_cache_free(service->weights);
    service->weights = NULL;
    if (service->device)
        device_close(service->device);
    service->device = NULL;
}

// Swaps the device for one of another level (0: as configured), with an empty weight cache. On failure the
// old one stays.
int step_service_open_device(struct step_service *service, uint32_t level, struct error *error)
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
    step_service_close_device(service);
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
    int status = step_service_open_device(service, level, error);
    if (!status)
        log_info("running at level %s, as the pool agreed", device_level_name(level));
    return status;
}

void step_service_note_memory(struct step_service *service)
{
    uint64_t held = service->held_bytes + (service->weights ? weight_cache_bytes(service->weights) : 0);
    uint64_t memory = service->device ? device_memory_free(service->device) + held : 0;
    if (service->options.memory && service->options.memory < memory)
        memory = service->options.memory;
    pthread_mutex_lock(&service->mutex);
    service->memory_free = memory;
    pthread_mutex_unlock(&service->mutex);
}

// --- the end of an epoch ---

void step_service_close_links(struct step_service *service)
{
    pthread_mutex_lock(&service->mutex);
    struct stage_links links = service->links;
    service->links = (struct stage_links){0};
    pthread_mutex_unlock(&service->mutex);
    stage_links_close(&links);
}

void step_service_end_epoch(struct step_service *service)
{
    step_service_close_links(service);
    if (service->executor)
        step_trace_flush(service->options.trace);
    executor_free(service->executor);
    service->executor = NULL;
    service->executor_epoch = 0;
    service->held_bytes = 0;
    if (service->device)
        device_ops(service->device)->reserve(service->device, 0, NULL);
}

// Every epoch would fail on a device that is broken, until the process is another.
void step_service_check_device(struct step_service *service)
{
    if (service->gave_up || !device_broken(service->device))
        return;
    service->gave_up = true;
    service->options.broken(service->options.context, device_describe(service->device));
}

void step_service_fail(struct step_service *service, uint64_t epoch, const uint64_t *step,
                       const struct error *error)
{
    bool wanted;
    pthread_mutex_lock(&service->mutex);
    wanted = service->wanted_epoch == epoch;
    if (wanted)
        service->wanted_epoch = 0;
    pthread_mutex_unlock(&service->mutex);
    step_service_end_epoch(service);
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
    step_service_say(service, &failed);
    step_service_check_device(service);
}

// --- loading ---

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
        step_service_say(service, &progress);
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

struct stage_edges step_service_edges(const struct step_service *service)
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

// What the pool deals the layers by, where it wants to know.
static int measure(struct step_service *service, struct stage_speed *speed, struct error *error)
{
    int64_t begin = clock_now_us();
    if (!service->assignment.measure)
        return STATUS_OK;
    int status = executor_measure(service->executor, speed, error);
    if (!status && speed->layer_ns == 0)
        log_info("this device is too slow to be measured");
    else if (!status)
        log_info("measured in %.0f ms: a layer takes %.3f ms, the head %.3f ms",
                 (double)(clock_now_us() - begin) / 1e3, (double)speed->layer_ns / 1e6,
                 (double)speed->head_ns / 1e6);
    return status;
}

// Everything up to LOADED.
static int load(struct step_service *service, const struct job *job, struct weight_totals *totals,
                struct memory_plan *plan, struct stage_speed *speed, struct error *error)
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
    const struct stage_edges edges = step_service_edges(service);
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
    if (!status)
        status = measure(service, speed, error);
    if (status)
        return status;
    memory_plan_check(plan, service->device);
    service->held_bytes = memory_plan_others(plan);
    return STATUS_OK;
}

void step_service_load(struct step_service *service, const struct job *job)
{
    step_service_end_epoch(service);
    if (!begin(service, job->epoch))
        return;
    struct weight_totals totals = {0};
    struct error error = {0};
    struct memory_plan plan = {0};
    struct stage_speed speed = {0};
    int64_t start = clock_now_us();
    service->executor_epoch = job->epoch;
    service->fits_pages = 0;
    service->progress_us = 0;
    unsigned char link_id[LINK_NCCL_ID_BYTES];
    struct wire_worker_message loaded = {.kind = WIRE_LOADED, .epoch = job->epoch};
    int status = load(service, job, &totals, &plan, &speed, &error);
    if (!status)
        status = offer_link_id(service, &loaded, link_id, &error);
    if (status) {
        step_service_fail(service, job->epoch, NULL, &error);
        service->fits_pages = 0;
    }
    step_service_note_memory(service);
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
    loaded.layer_ns = speed.layer_ns;
    loaded.head_ns = speed.head_ns;
    step_service_say(service, &loaded);
}
