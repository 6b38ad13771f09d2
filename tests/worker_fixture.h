// Workers with their threads, in this process, against a coordinator that the test plays over loopback. The
// coordinator's calls are recorded by the server's threads; the test's thread reads them through expect().
// One coordinator at a time.
#ifndef STRATA_TESTS_WORKER_FIXTURE_H
#define STRATA_TESTS_WORKER_FIXTURE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/wire.h"
#include "worker/worker.h"

enum { SECOND = 1000000, LAYERS = 3 };

extern char model[1024]; // its path
extern int n_joins;      // so many Join calls have come to this coordinator
extern struct error error;

// A step is found unfinished so many times before it is over, as on a device that computes by itself. The
// linker puts the fixture in front of executor_finish, and of device_broken.
extern atomic_uint patience;
extern atomic_bool broken; // the device is
extern atomic_bool deaf;   // to a worker that leaves

// --- the coordinator ---

struct join; // one Join call, as the coordinator sees it

void worker_fixture_set_up(void); // a model, and the coordinator started
void worker_fixture_tear_down(void);
void start_coordinator(void); // again, on its port
void stop_coordinator(void);
struct join *next_join(int index);
void hang_up(struct join *join);
// The next message of this kind; heartbeats and progress are skipped, anything else is wrong.
struct wire_worker_message expect(struct join *join, enum wire_worker_kind kind);
void tell(struct join *join, const struct wire_coordinator_message *message);
void tell_nonsense(struct join *join);
struct wire_coordinator_message assignment(uint64_t epoch, uint32_t stage, uint32_t n_stages);
struct wire_worker_message load(struct join *join, uint64_t epoch, uint32_t stage, uint32_t n_stages);
void link_to(struct join *join, uint64_t epoch, const char *next);
void link_alone(struct join *join, uint64_t epoch);
void abort_epoch(struct join *join, uint64_t epoch);
// Step 0 opens slot 0 and runs a prompt; later steps decode.
void send_step(struct join *const *stages, int n, uint64_t epoch, uint64_t number);
int32_t expect_token(struct join *last, uint64_t epoch, uint64_t number);

// --- workers ---

struct running {
    struct worker *worker;
    pthread_t thread;
    int status;
    struct error error;
};

struct worker_options defaults(void);
struct running start_worker(const struct worker_options *options, const char *name);
void run_in_thread(struct running *running);
int wait_worker(struct running *running);
void end_worker(struct running *running);
// Two workers as a pipeline; leaves them linked under `epoch`.
void link_pair(struct running pair[2], struct join *stages[2], uint64_t epoch);

#define START_ONE(running)                                                                                   \
    struct worker_options options = defaults();                                                              \
    struct running running = start_worker(&options, "one");                                                  \
    run_in_thread(&running);                                                                                 \
    struct join *join = next_join(0)

#endif
