// Blocks chained newest first; each allocation is cut from the newest, a large one gets a block of its own
// size.
#include "common/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 16, FIRST_BLOCK = 4096, LARGEST_GROWTH = 1 << 20 };

struct arena_block {
    struct arena_block *next;
    size_t used, capacity;
    _Alignas(ALIGNMENT) unsigned char bytes[];
};

static struct arena_block *block_new(struct arena *arena, size_t need)
{
    size_t capacity = arena->blocks ? arena->blocks->capacity * 2 : FIRST_BLOCK;
    if (capacity > LARGEST_GROWTH)
        capacity = LARGEST_GROWTH;
    if (capacity < need)
        capacity = need;
    struct arena_block *block = malloc(sizeof(*block) + capacity);
    if (!block)
        return NULL;
    *block = (struct arena_block){.next = arena->blocks, .capacity = capacity};
    arena->blocks = block;
    return block;
}

void *arena_alloc(struct arena *arena, size_t count, size_t size)
{
    if (size && count > (SIZE_MAX / 2 - ALIGNMENT) / size)
        return NULL;
    size_t bytes = (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (bytes == 0)
        bytes = ALIGNMENT;
    struct arena_block *block = arena->blocks;
    if (!block || block->capacity - block->used < bytes)
        block = block_new(arena, bytes);
    if (!block)
        return NULL;
    void *result = block->bytes + block->used;
    block->used += bytes;
    arena->total += bytes;
    return memset(result, 0, bytes);
}

char *arena_copy(struct arena *arena, const void *bytes, size_t length)
{
    char *copy = length < SIZE_MAX ? arena_alloc(arena, length + 1, 1) : NULL;
    if (copy && length)
        memcpy(copy, bytes, length);
    return copy;
}

void arena_reset(struct arena *arena)
{
    while (arena->blocks && arena->blocks->next) {
        struct arena_block *older = arena->blocks->next;
        arena->blocks->next = older->next;
        free(older);
    }
    if (arena->blocks)
        arena->blocks->used = 0;
    arena->total = 0;
}

void arena_free(struct arena *arena)
{
    arena_reset(arena);
    free(arena->blocks);
    arena->blocks = NULL;
}
