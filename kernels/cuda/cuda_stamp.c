// When the GPU was where, on the host's clock. A stamp is an event with a time, of a fixed ring, recorded on
// the device's stream. Such times are only known as distances between two events, so there is a third party:
// an event on a stream of its own where nothing else runs, recorded while the host looks at its clock before
// and after. This tie is made when the device is opened, and again every quarter of a second that stamps are
// read, because the two clocks drift apart and distances are floats, in milliseconds. A new tie is taken only
// when host and GPU met within some microseconds; then it costs the host no more than that, and the device's
// stream nothing. Where the last one is long ago, because there was nothing to do, more is done for it.
// Called by the executor's thread.
#include "kernels/cuda/cuda_internal.h"

#include <stdlib.h>

#include "common/clock.h"

enum {
    RENEW_US = 250000,          // between two ties,
    RETRY_US = 10000,           // or two attempts at one
    MEETING_US = 40,            // the longest that an attempt takes, and it succeeds when it takes less
    TRIES = 8,                  // where there is no tie that is any good,
    STALE_US = 2000000,         // which it is not when it is so old:
    STALE_MEETING_US = 2000,    // the attempts may take longer then,
    FIRST_MEETING_US = 1000000, // and at the first one
};

struct cuda_stamps {
    cudaEvent_t ring[DEVICE_STAMPS];
    uint64_t next;
    cudaStream_t meeting_place;
    cudaEvent_t ties[2];
    int tie;          // the one that holds
    int64_t tie_us;   // when it was, on the host's clock
    int64_t renew_us; // when to try for another
};

// Records the tie that does not hold, and takes it if host and GPU meet within `most_us`. Nothing that goes
// wrong here is worth a step: times are then those of the older tie. Returns how long it took, negative when
// they did not meet.
static int64_t tie(struct cuda_stamps *stamps, int64_t most_us)
{
    int other = !stamps->tie;
    int64_t before = clock_now_us(), after = before;
    cudaError_t code = cudaEventRecord(stamps->ties[other], stamps->meeting_place);
    if (code == cudaSuccess) {
        do {
            code = cudaEventQuery(stamps->ties[other]);
            after = clock_now_us();
        } while (code == cudaErrorNotReady && after - before < most_us);
    }
    if (code != cudaSuccess) {
        cudaGetLastError();
        return -1;
    }
    if (after - before > most_us)
        return -1;
    stamps->tie = other;
    stamps->tie_us = before + (after - before) / 2;
    return after - before;
}

// The best of some meetings: the first ones wake things up.
static bool tie_best(struct cuda_stamps *stamps, int64_t most_us)
{
    bool met = false;
    for (int i = 0; i < TRIES; i++) {
        int64_t took = tie(stamps, most_us);
        met |= took >= 0;
        most_us = took >= 0 ? took : most_us;
    }
    return met;
}

int cuda_stamps_open(struct cuda_device *device, struct error *error)
{
    struct cuda_stamps *stamps = calloc(1, sizeof(*stamps));
    if (!stamps)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a CUDA device");
    device->stamps = stamps;
    cudaError_t code = cudaStreamCreateWithFlags(&stamps->meeting_place, cudaStreamNonBlocking);
    for (int i = 0; i < 2 && code == cudaSuccess; i++)
        code = cudaEventCreate(&stamps->ties[i]);
    for (int i = 0; i < DEVICE_STAMPS && code == cudaSuccess; i++)
        code = cudaEventCreate(&stamps->ring[i]);
    if (code != cudaSuccess)
        return error_set(error, STATUS_NO_MEMORY, "GPU %d has no events for a worker: %s", device->index,
                         cudaGetErrorString(code));
    if (!tie_best(stamps, FIRST_MEETING_US))
        return error_set(error, STATUS_UNSUPPORTED, "GPU %d cannot be opened: its clock cannot be read",
                         device->index);
    return STATUS_OK;
}

void cuda_stamps_close(struct cuda_device *device)
{
    struct cuda_stamps *stamps = device->stamps;
    if (!stamps)
        return;
    for (int i = 0; i < DEVICE_STAMPS; i++) {
        if (stamps->ring[i])
            cudaEventDestroy(stamps->ring[i]);
    }
    for (int i = 0; i < 2; i++) {
        if (stamps->ties[i])
            cudaEventDestroy(stamps->ties[i]);
    }
    if (stamps->meeting_place)
        cudaStreamDestroy(stamps->meeting_place);
    free(stamps);
    device->stamps = NULL;
}

uint64_t cuda_stamp(struct device *base)
{
    struct cuda_device *device = cuda_device_of(base);
    struct cuda_stamps *stamps = device->stamps;
    cuda_enter(device);
    cuda_failed(device, cudaEventRecord(stamps->ring[stamps->next % DEVICE_STAMPS], device->stream),
                "stamping");
    return stamps->next++;
}

// A tie that failed to be renewed is tried again soon: the old one still holds.
static void renew(struct cuda_stamps *stamps, int64_t now)
{
    if (now < stamps->renew_us)
        return;
    bool stale = now - stamps->tie_us > STALE_US;
    bool met = stale ? tie_best(stamps, STALE_MEETING_US) : tie(stamps, MEETING_US) >= 0;
    stamps->renew_us = now + (met ? RENEW_US : RETRY_US);
}

int64_t cuda_stamp_us(struct device *base, uint64_t stamp)
{
    struct cuda_device *device = cuda_device_of(base);
    struct cuda_stamps *stamps = device->stamps;
    int64_t now = clock_now_us(); // the stamp is of the past
    float ms;
    cuda_enter(device);
    renew(stamps, now);
    cudaError_t code =
        cudaEventElapsedTime(&ms, stamps->ties[stamps->tie], stamps->ring[stamp % DEVICE_STAMPS]);
    if (code != cudaSuccess) { // whoever waits for the mark hears of it; a time is told all the same
        cudaGetLastError();
        return now;
    }
    double us = (double)ms * 1e3; // negative where the stamp is older than the tie
    int64_t at = stamps->tie_us + (int64_t)(us < 0 ? us - 0.5 : us + 0.5);
    return at < now ? at : now;
}
