// Polls GetPool and redraws one line, often enough that a small model's quarter of a second shows too. A
// server that does not answer yet draws nothing.
#include "cli/cli_progress.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/rpc_client.h"
#include "proto/wire.h"

enum { BAR_WIDTH = 32, INTERVAL_US = 50 * 1000, ANSWER_US = 500 * 1000 };

struct progress {
    char address[128];
    struct rpc_channel *channel;
    int64_t last_us;
    bool drawn;
};

struct progress *progress_new(const char *address)
{
    struct progress *progress = calloc(1, sizeof(*progress));
    if (!progress)
        return NULL;
    snprintf(progress->address, sizeof(progress->address), "%s", address);
    if (rpc_channel_new(&progress->channel, address, &(struct rpc_channel_options){0}, NULL)) {
        free(progress);
        return NULL;
    }
    return progress;
}

void progress_free(struct progress *progress)
{
    if (!progress)
        return;
    progress_end(progress);
    rpc_channel_free(progress->channel);
    free(progress);
}

void progress_end(struct progress *progress)
{
    if (!progress || !progress->drawn)
        return;
    fputs("\r\033[K", stderr);
    progress->drawn = false;
}

static void draw(struct progress *progress, const struct wire_pool *pool)
{
    uint64_t done = 0, total = 0;
    for (uint32_t i = 0; i < pool->n_stages; i++) {
        done += pool->stages[i].loaded_bytes;
        total += pool->stages[i].load_bytes;
    }
    if (pool->state != WIRE_POOL_LOADING && pool->state != WIRE_POOL_LINKING) {
        if (pool->problem[0])
            fprintf(stderr, "\r\033[K%.100s", pool->problem);
        progress->drawn |= pool->problem[0] != '\0';
        return;
    }
    double share = total ? (double)done / (double)total : 0;
    int filled = (int)(share * BAR_WIDTH + 0.5);
    char bar[BAR_WIDTH + 1];
    memset(bar, '.', BAR_WIDTH);
    memset(bar, '#', (size_t)(filled > BAR_WIDTH ? BAR_WIDTH : filled));
    bar[BAR_WIDTH] = '\0';
    fprintf(stderr, "\r\033[Kloading on %u %s [%s] %3.0f%% of %.1f MiB", pool->n_stages,
            pool->n_stages == 1 ? "worker" : "workers", bar, share * 100, (double)total / (1 << 20));
    progress->drawn = true;
}

void progress_update(struct progress *progress)
{
    if (!progress || clock_now_us() - progress->last_us < INTERVAL_US)
        return;
    progress->last_us = clock_now_us();
    // Nobody waits for a coordinator that does not listen yet: the supervisor has signals to hear.
    static const char UNIX[] = "unix:";
    if (strncmp(progress->address, UNIX, sizeof(UNIX) - 1) == 0 &&
        access(progress->address + sizeof(UNIX) - 1, F_OK))
        return;
    uint8_t *bytes;
    size_t length;
    if (rpc_call_unary(progress->channel, "/strata.v1.Inference/GetPool", "", 0, ANSWER_US, true, &bytes,
                       &length, NULL))
        return;
    struct arena arena = {0};
    struct wire_pool pool;
    if (wire_decode_pool(&pool, bytes, length, &arena, NULL) == STATUS_OK)
        draw(progress, &pool);
    arena_free(&arena);
    free(bytes);
}
