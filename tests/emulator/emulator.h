// Kernels on a processor, for the tests: the CUDA backend's own files (kernels/cuda), compiled by g++ against
// the headers of this folder in place of CUDA's, so that every machine runs every kernel: the same tests as
// on a GPU, the same launches, shapes and barriers. `cmake -DSTRATA_CUDA=EMULATED` builds the backend so
// (emulator.cmake).
//
// A thread of a kernel is a fiber, a block the business of one thread of the processor, a cluster that of
// several at once. Fibers run until they wait for others: at a barrier, a shuffle, a product of a warp.
// Nothing is as on a GPU in time; what a kernel means is held to more strictly than there:
//
//   - dynamic shared memory holds NaN before a block begins (static memory zeros: little should be static),
//     and the place of an asynchronous copy from its start until somebody waits for it: who reads too early,
//     or writes where a copy is under way, is found out;
//   - copies must be aligned, launches within the device's limits, memory within its allocation (a page
//     behind it cannot be touched);
//   - warps take their turns in an order that differs from block to block;
//   - a block all of whose threads wait for one another ends the program, and says so.
//
// Not emulated: the memory model (a processor's is stronger), the tensor cores' rounding (products of 16 are
// added exactly, then rounded once), misaligned vectors, limits on registers, and NCCL.
//
// STRATA_EMULATED_SMS (132): how many multiprocessors the device says it has.
// STRATA_EMULATED_GENERAL (unset): set, it is a GPU of compute capability 8.6 whose blocks may have 99 KB of
// shared memory. Launches with attributes are refused, and what only 9.0 has ends the program.
#ifndef STRATA_EMULATOR_H
#define STRATA_EMULATOR_H

#include <functional>
#include <stdint.h>

#include "tests/emulator/cuda_runtime_api.h"

enum { EMULATED_WARP = 32, EMULATED_SHARED = 227 << 10, EMULATED_CLUSTER = 8 };

struct uint3 {
    unsigned x, y, z;
};

// --- what a kernel's thread knows and does (emulator_grid.cpp) ---

struct emulated_thread;
extern thread_local struct uint3 emulated_thread_index, emulated_block_index, emulated_block_size,
    emulated_grid_size;
extern thread_local unsigned char emulated_shared[]; // the block's dynamic shared memory

// Waits until the warp's other threads have come to the same place. `mine` points at what the thread brings;
// the last to come calls meet(theirs, n) with what all of them brought, by lane (NULL for a lane that is not
// there any more).
typedef void emulated_meeting(void **theirs);
void emulated_meet_warp(void *mine, emulated_meeting *meet);
// The same for the block's threads; returns whether any of them said yes.
bool emulated_meet_block(bool yes);
// Of a cluster: the block's number, and arriving and waiting, which stand apart; and where `mine`, in this
// block's shared memory, lies in that of block `rank`.
unsigned emulated_cluster_rank(void);
void emulated_cluster_arrive(void);
void emulated_cluster_wait(void);
void *emulated_cluster_map(void *mine, unsigned rank);

// Shared memory has addresses of its own.
unsigned emulated_shared_address(const void *pointer);
void *emulated_shared_pointer(unsigned address);

// Barriers that count arrivals and bytes, 64 bits of shared memory each, and copies that they count.
void emulated_barrier_init(unsigned long long *barrier, unsigned arrivals);
void emulated_barrier_arrive(unsigned long long *barrier, unsigned expected_bytes);
void emulated_barrier_await(unsigned long long *barrier, unsigned parity);
void emulated_copy_bulk(void *to, const void *from, unsigned bytes, unsigned long long *barrier);

// Copies of one thread, in groups.
void emulated_copy16(void *to, const void *from, bool live);
void emulated_copy_commit(void);
void emulated_copy_wait(unsigned pending);

// The kernel does what no kernel may: says so and ends the program.
[[noreturn]] void emulated_misuse(const char *sentence);
// That it did what takes 9.0.
void emulated_want_90(void);

// --- launching ---

struct emulated_launch {
    struct uint3 grid, block;
    unsigned cluster;    // blocks in a row along x; 0 and 1: none
    unsigned attributes; // how many the launch has
    size_t shared;
    std::function<void()> kernel;
};

// Runs a grid to its end. The launch is sound.
void emulated_run(const struct emulated_launch &launch);

// --- streams (emulator_runtime.cpp) ---

// Does it, or notes it while the stream is recorded.
cudaError_t emulated_queue(cudaStream_t stream, std::function<void()> work);
// Checks a launch against the device's limits and queues it.
cudaError_t emulated_queue_launch(cudaStream_t stream, const void *kernel, struct emulated_launch launch);
int emulated_multiprocessors(void);
bool emulated_is_general(void); // the GPU is one of 8.6

#endif
