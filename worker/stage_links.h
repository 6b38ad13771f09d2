// The two links of a stage in one epoch, to the next stage and from the previous one: of which kind each is,
// what they take, how they are made and how they end together. The device's thread, except stage_links_abort,
// which the caller keeps apart from the making and closing.
#ifndef STRATA_STAGE_LINKS_H
#define STRATA_STAGE_LINKS_H

#include "kernels/device.h"
#include "proto/wire.h"
#include "worker/link.h"
#include "worker/link_nccl.h"

// What the assignment says about them.
struct stage_edges {
    uint32_t stage, n_stages;
    uint32_t n_slots, max_positions, width;
    enum wire_link next, previous;
};

// Of communicators. `next` is made here, `previous` comes from the stage before.
struct stage_link_ids {
    unsigned char next[LINK_NCCL_ID_BYTES], previous[LINK_NCCL_ID_BYTES];
    bool has_next, has_previous;
};

struct stage_links {
    struct link *to_next, *from_previous; // NULL: not made, or the stage is alone
};

// Device memory they take beside weights, pages and workspace.
uint64_t stage_links_plan_bytes(const struct stage_edges *edges);

struct stage_links_options {
    struct device *device;
    struct link_listener *listener;
    const char *next_address;
    uint64_t epoch;
    struct stage_edges edges;
    struct stage_link_ids ids;
    int64_t timeout_us;
    const volatile int *cancel;
};
// Sockets first, which greet and check; then the edges that are to be NCCL become so. On failure none is
// left.
int stage_links_make(struct stage_links *out, const struct stage_links_options *options, struct error *error);
// See link_ops: any neighbour that is gone.
int stage_links_check(const struct stage_links *links, struct error *error);
void stage_links_abort(const struct stage_links *links);
// Aborts both before it closes either.
void stage_links_close(struct stage_links *links);

#endif
