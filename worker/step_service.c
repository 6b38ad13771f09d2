// The step service as the other threads see it: they queue jobs for the device's thread, end what it does,
// and ask what it said last. `mutex` guards what both sides touch: which epoch is wanted, the links (so that
// an abort can wake a sleeping executor), the free plans and the numbers of heartbeats. An epoch that is no
// longer wanted ends quietly: whoever ended it knows.
#include "worker/step_service.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/step_service_internal.h"

bool step_service_wants(struct step_service *service, uint64_t epoch)
{
    pthread_mutex_lock(&service->mutex);
    bool wanted = epoch != 0 && service->wanted_epoch == epoch;
    pthread_mutex_unlock(&service->mutex);
    return wanted;
}

void step_service_say(struct step_service *service, const struct wire_worker_message *message)
{
    service->options.say(service->options.context, message);
}

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
        status = step_service_open_device(service, 0, error);
    if (!status) {
        step_service_note_memory(service);
        service->started = pthread_create(&service->thread, NULL, step_service_run_jobs, service) == 0;
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
    step_service_end_epoch(service);
    weight_list_free(&service->list);
    step_service_close_device(service);
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
                                     .previous_link = assign->previous_link,
                                     .measure = assign->measure}};
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
    int status = step_service_wants(service, plan->epoch) ? queue_job(service, &job) : STATUS_UNAVAILABLE;
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
