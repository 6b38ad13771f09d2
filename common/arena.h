// A bump allocator: many small allocations, freed together. One thread at a time.
#ifndef STRATA_ARENA_H
#define STRATA_ARENA_H

#include <stddef.h>

struct arena {
    struct arena_block *blocks; // newest first; zero-initialize the struct
    size_t total;               // bytes handed out
};

// Aligned to 16 and zeroed; NULL when memory is out or count * size overflows.
void *arena_alloc(struct arena *arena, size_t count, size_t size);
// A NUL-terminated copy of `length` bytes.
char *arena_copy(struct arena *arena, const void *bytes, size_t length);
void arena_reset(struct arena *arena); // frees everything but one block
void arena_free(struct arena *arena);

#endif
