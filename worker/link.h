// A link carries the residual from a stage to the next, and drawn tokens from the last stage back to the
// first. A small table of functions so that the executor does not know whether NCCL or a socket is
// underneath. Frames carry epoch and step number; a frame of another epoch or an unexpected step is an error,
// never data. The f32 residual travels unrounded. Owned by the executor's thread, except link_abort, which
// any thread may call and which makes every waiting call return STATUS_CANCELLED.
#ifndef STRATA_LINK_H
#define STRATA_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

struct link;

struct link_listener; // where the previous stage connects; one per worker process

// "127.0.0.1:0", "unix:/path": *bound (at least 128 bytes) gets the address peers can dial.
int link_listener_open(struct link_listener **out, const char *address, char *bound, size_t capacity,
                       struct error *error);
void link_listener_close(struct link_listener *listener);

// There are two kinds of link, and data pointers are what the kind says.
//   On the host: the pointers are host memory; send may wait until the frame is on its way, receive waits for
//     it. Between CPU workers, and GPUs without a better way.
//   On the device: the pointers are device memory. Sends and receives are queued on the device's stream, in
//     order with its ops, and never wait on the host; what goes wrong later comes out of the device's `sync`
//     or `reached`. There are no frames and nothing is checked: both ends queue the same transfers in the
//     same order. The draws that the last stage sends to the first are up to MAX_SLOTS * 4 bytes, and
//     n_stages + 1 of them may have been sent before the first is received: such a send must not wait for its
//     receiver.
struct link_ops {
    // `bytes` for step `number`.
    int (*send)(struct link *link, uint64_t number, const void *data, size_t bytes, struct error *error);
    int (*receive)(struct link *link, uint64_t number, void *data, size_t bytes, struct error *error);
    void (*abort)(struct link *link);
    void (*close)(struct link *link);
};
struct link {
    const struct link_ops *ops;
    bool on_device;
};

// Dials the next stage and accepts the previous one, for `epoch`; both ends check the epoch and each other's
// stage. Stage s sends to (s + 1) % n_stages; the last stage's next is the first (token feedback). Waits at
// most timeout_us, and gives up when *cancel becomes nonzero.
int link_socket_connect(struct link **to_next, struct link **from_previous, struct link_listener *listener,
                        const char *next_address, uint64_t epoch, uint32_t stage, uint32_t n_stages,
                        int64_t timeout_us, const volatile int *cancel, struct error *error);

#endif
