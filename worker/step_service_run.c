// The device's thread: one job after the other, as they were queued. It owns the executor and the links.
//
// A step is submitted to the executor as soon as it comes, and finished when the device got there. While
// steps are unfinished the thread looks now for the one, now for the other: busily for a moment, then with
// short sleeps. A backend that computes at once (the CPU) never leaves a step unfinished, so nothing of this
// is seen.
#include "worker/step_service.h"

#include <sched.h>

#include "common/clock.h"
#include "worker/step_service_internal.h"

enum {
    SPIN_US = 50,    // how long a look-out for the device and for jobs is busy
    NAP_US = 30,     // and how often it looks afterwards
    CHECK_US = 1000, // between two looks at the links
};

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
                                                .edges = step_service_edges(service),
                                                .ids = job->ids,
                                                .timeout_us = service->options.link_timeout_us,
                                                .cancel = &service->cancel};
    struct stage_links links;
    int status = stage_links_make(&links, &options, error);
    if (status)
        return status;
    step_service_close_links(service);
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
        step_service_fail(service, job->epoch, NULL, &error);
        return;
    }
    // An abort that came just before the links were known has not touched them.
    if (!step_service_wants(service, job->epoch)) {
        step_service_end_epoch(service);
        return;
    }
    struct wire_worker_message linked = {.kind = WIRE_LINKED, .epoch = job->epoch};
    step_service_say(service, &linked);
}

static uint32_t unfinished(const struct step_service *service)
{
    return service->executor ? executor_unfinished(service->executor) : 0;
}

static void report_step(struct step_service *service)
{
    step_trace_add(service->options.trace, executor_times(service->executor), service->executor_epoch,
                   service->assignment.stage);
    pthread_mutex_lock(&service->mutex);
    service->steps_done++;
    service->compute_us += service->result.compute_us;
    service->wait_us += service->result.wait_us;
    pthread_mutex_unlock(&service->mutex);
    if (service->assignment.stage + 1 < service->assignment.n_stages)
        return;
    struct wire_worker_message result = {
        .kind = WIRE_RESULT, .epoch = service->executor_epoch, .result = &service->result};
    step_service_say(service, &result);
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
        if (!step_service_wants(service, service->executor_epoch)) {
            step_service_end_epoch(service);
            return true;
        }
        int status = executor_finish(service->executor, &service->result, false, &error);
        if (status == EXECUTOR_PENDING && check_links(service, &error)) {
            step_service_fail(service, service->executor_epoch, NULL, &error);
            return true;
        }
        if (status == EXECUTOR_PENDING)
            return any;
        any = true;
        if (status)
            step_service_fail(service, service->executor_epoch, &service->result.number, &error);
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
    step_service_fail(service, job->epoch, &number, &error);
}

static void run_job(struct step_service *service, const struct job *job)
{
    if (job->kind != JOB_STEP)
        finish_all_steps(service);
    if (job->kind == JOB_TIDY || !step_service_wants(service, job->epoch)) {
        if (service->executor && !step_service_wants(service, service->executor_epoch))
            step_service_end_epoch(service);
        if (job->kind == JOB_TIDY) {
            step_service_note_memory(service);
            step_service_check_device(service); // the fault may be why the epoch ended, on another's word
        }
    } else if (job->kind == JOB_ASSIGN) {
        step_service_load(service, job);
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

void *step_service_run_jobs(void *argument)
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
