// Shared by the files of the step service: step_service.c (the other threads' side), step_service_load.c (the
// device and what an epoch takes of it), step_service_run.c (links, steps and the thread that does all this).
// What is declared here runs on the device's thread unless it says otherwise.
#ifndef STRATA_STEP_SERVICE_INTERNAL_H
#define STRATA_STEP_SERVICE_INTERNAL_H

#include <pthread.h>

#include "common/queue.h"
#include "worker/executor.h"
#include "worker/stage_links.h"
#include "worker/step_service.h"
#include "worker/weight_cache.h"
#include "worker/weight_file.h"

enum {
    PLANS = 2 * MAX_STAGES + 8, // steps queued; the coordinator keeps stages + 1 in flight
    JOBS = PLANS + 32,
    ADDRESS_BYTES = 128,
};

enum job_kind { JOB_ASSIGN, JOB_CONNECT, JOB_STEP, JOB_TIDY };

struct assignment {
    uint32_t stage, n_stages, first_layer, n_layers, n_slots, n_pages, context, max_positions, level;
    enum wire_link next_link, previous_link;
    bool measure;
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

// step_service.c. The epoch is not over; any thread.
bool step_service_wants(struct step_service *service, uint64_t epoch);
void step_service_say(struct step_service *service, const struct wire_worker_message *message);

// step_service_load.c
int step_service_open_device(struct step_service *service, uint32_t level, struct error *error);
void step_service_close_device(struct step_service *service);
void step_service_note_memory(struct step_service *service);  // for hellos and heartbeats
void step_service_check_device(struct step_service *service); // tells the owner, once, that it is broken
void step_service_load(struct step_service *service, const struct job *assign);
struct stage_edges step_service_edges(const struct step_service *service);
void step_service_close_links(struct step_service *service);
void step_service_end_epoch(struct step_service *service);
// Reports what went wrong (`step`: in which one, NULL = none) and ends the epoch; silently when the epoch was
// given up already.
void step_service_fail(struct step_service *service, uint64_t epoch, const uint64_t *step,
                       const struct error *error);

// step_service_run.c
void *step_service_run_jobs(void *service); // the device's thread

#endif
