// A stage's weights on its device, by name: (true type, shape, device bytes). Loading is all or nothing, and
// loading a name again is a no-op for the same source and an error for another. Belongs to the device's
// thread.
#ifndef STRATA_WEIGHT_CACHE_H
#define STRATA_WEIGHT_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "common/gguf.h"
#include "common/status.h"
#include "kernels/kernels.h"
#include "worker/weight_file.h"

struct weight_cache;

int weight_cache_new(struct weight_cache **out, struct device *device);
void weight_cache_free(struct weight_cache *cache); // and every weight

// The file that lists given to weight_cache_precache come from. Entries loaded from the file that is set are
// known to be its own; those of an earlier one are compared by the hash of their bytes.
void weight_cache_set_file(struct weight_cache *cache, const struct gguf *gguf);

struct weight_load {
    // What must fit: packed weights that are not loaded yet, and `other_bytes` (KV pages, workspace).
    uint64_t memory_free;
    uint64_t other_bytes;
    // After each weight, in bytes of the file. Nonzero gives the load up (STATUS_CANCELLED). May be NULL.
    int (*progress)(void *context, uint64_t done, uint64_t total);
    void *context;
};
struct weight_totals {
    uint64_t uploaded;     // bytes packed and uploaded by this call
    uint64_t cached;       // bytes of all weights in the cache
    uint64_t source_bytes; // of the list, in the file
    uint32_t n_loaded, n_kept;
};

// Loads what the list names and the cache lacks. Before the first upload every type is known to be readable
// and everything is known to fit. On failure the cache is what it was, and the sentence names the tensor.
int weight_cache_precache(struct weight_cache *cache, const struct weight_list *list,
                          const struct weight_load *load, struct weight_totals *totals, struct error *error);
// Unloads what `keep` does not name (NULL: everything). Returns the bytes freed.
uint64_t weight_cache_drop(struct weight_cache *cache, const struct weight_list *keep);

// Packed bytes that loading the list would add.
uint64_t weight_cache_missing_bytes(const struct weight_cache *cache, const struct weight_list *list);
uint64_t weight_cache_bytes(const struct weight_cache *cache);
uint32_t weight_cache_count(const struct weight_cache *cache);

// NULL when the name is not cached (yet) or has another form. Valid until it is dropped.
const struct matrix *weight_cache_matrix(const struct weight_cache *cache, const char *name);
// `length` f32 values [device].
const float *weight_cache_vector(const struct weight_cache *cache, const char *name, uint32_t length);

#endif
