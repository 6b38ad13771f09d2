// Links over NCCL, between the GPUs of two workers. An edge of the pool has its own communicator of two
// ranks, the sender (rank 0) and the receiver (rank 1), and its own stream at each end. The sender makes the
// communicator's id, the coordinator hands it on. The socket that link_socket_connect made for the same edge
// stays beside it: a process that dies closes it at once, and it carries a record of each message.
//
// The only file behind this header, link_nccl.c, is compiled where there is NCCL; elsewhere nothing here is
// there, and link_nccl_version says 0.
#ifndef STRATA_LINK_NCCL_H
#define STRATA_LINK_NCCL_H

#include "common/limits.h"
#include "kernels/device.h"
#include "worker/link.h"

enum { LINK_NCCL_ID_BYTES = 128 };

// What an edge carries, the same at both ends.
struct link_nccl_shape {
    size_t message_bytes; // the longest
    uint32_t depth;       // messages that the sender may have queued before its stream waits
    uint32_t blocks;      // thread blocks that move a long message
};
// The residual: one message under way and one behind it. Many blocks carry a prompt's megabytes: kernels that
// count on all multiprocessors wait for those that carry, and so for a shorter time.
static inline struct link_nccl_shape link_nccl_residual(uint32_t max_positions, uint32_t width)
{
    return (struct link_nccl_shape){(size_t)max_positions * width * sizeof(float), 2, 16};
}
// The tokens that go back to the first stage, which may fetch them as late as MAX_STEP_HISTORY steps after
// they were sent: with fewer buffers the last stage would wait for a step that waits for its own.
static inline struct link_nccl_shape link_nccl_feedback(uint32_t n_slots)
{
    return (struct link_nccl_shape){(size_t)n_slots * sizeof(int32_t), MAX_STEP_HISTORY + 2, 1};
}

// One end of an edge to be made. *link: the socket link of the edge, replaced by the new link.
struct link_nccl_end {
    struct link **link;
    struct link_nccl_shape shape;
    bool sender;
    unsigned char id[LINK_NCCL_ID_BYTES];
};

#ifdef STRATA_HAVE_NCCL
enum { LINK_NCCL_IS_BUILT = 1 };

// The library's version where `device` can be linked with it, else 0. Workers of two versions do not link.
uint32_t link_nccl_version(const struct device *device);
// A name no other GPU has, "" when it cannot be found out.
void link_nccl_device_name(const struct device *device, char *out, size_t capacity);
// For one communicator; one that was never used may be offered again. This process must be one of its ranks.
int link_nccl_make_id(unsigned char id[LINK_NCCL_ID_BYTES], struct error *error);
// Device memory that one end takes, NCCL's own buffers as estimated.
uint64_t link_nccl_plan_bytes(const struct link_nccl_shape *shape, bool sender);
// Makes the ends of this stage together: a ring of stages that made one after the other would wait in a
// circle. Each edge is tried with a message before this returns. Gives up after timeout_us, or when *cancel
// becomes nonzero; then every *link is closed and NULL. The device's thread.
int link_nccl_connect(struct device *device, struct link_nccl_end *ends, uint32_t n_ends, int64_t timeout_us,
                      const volatile int *cancel, struct error *error);

#else
enum { LINK_NCCL_IS_BUILT = 0 };

static inline uint32_t link_nccl_version(const struct device *device)
{
    return 0;
}
static inline void link_nccl_device_name(const struct device *device, char *out, size_t capacity)
{
    out[0] = '\0';
}
static inline int link_nccl_make_id(unsigned char id[LINK_NCCL_ID_BYTES], struct error *error)
{
    return error_set(error, STATUS_UNSUPPORTED, "this build of Strata has no NCCL");
}
static inline uint64_t link_nccl_plan_bytes(const struct link_nccl_shape *shape, bool sender)
{
    return 0;
}
static inline int link_nccl_connect(struct device *device, struct link_nccl_end *ends, uint32_t n_ends,
                                    int64_t timeout_us, const volatile int *cancel, struct error *error)
{
    return error_set(error, STATUS_UNSUPPORTED, "this build of Strata has no NCCL");
}

#endif

#endif
