// Strings laid end to end and found again by their bytes: a vocabulary of 150,000 tokens is two allocations,
// not 150,000. Written while a tokenizer loads, read by any thread afterwards.
#include "common/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

// Doubles an array until it holds `need` elements.
static int grow(void **array, size_t *capacity, size_t need, size_t element)
{
    if (need <= *capacity)
        return 0;
    size_t wanted = *capacity ? *capacity : 64;
    while (wanted < need)
        wanted *= 2;
    void *bigger = realloc(*array, wanted * element);
    if (!bigger)
        return STATUS_NO_MEMORY;
    *array = bigger;
    *capacity = wanted;
    return 0;
}

int string_pool_append(struct string_pool *pool, const void *bytes, size_t length)
{
    if (length > UINT32_MAX - pool->used) // starts are 32 bits wide
        return STATUS_NO_MEMORY;
    int status = grow((void **)&pool->bytes, &pool->capacity, pool->used + length, 1);
    if (status)
        return status;
    if (length)
        memcpy(pool->bytes + pool->used, bytes, length);
    pool->used += length;
    return 0;
}

int string_pool_end(struct string_pool *pool)
{
    size_t room = pool->room;
    // Strings that are all empty have an address too.
    int status = grow((void **)&pool->bytes, &pool->capacity, 1, 1);
    if (!status)
        status = grow((void **)&pool->starts, &room, (size_t)pool->count + 2, sizeof(*pool->starts));
    if (status)
        return status;
    pool->room = (uint32_t)room;
    if (pool->count == 0)
        pool->starts[0] = 0;
    pool->starts[++pool->count] = (uint32_t)pool->used;
    return 0;
}

int string_pool_add(struct string_pool *pool, const void *bytes, size_t length)
{
    int status = string_pool_append(pool, bytes, length);
    return status ? status : string_pool_end(pool);
}

void string_pool_free(struct string_pool *pool)
{
    free(pool->bytes);
    free(pool->starts);
    *pool = (struct string_pool){0};
}

static int index_allocate(struct string_index *index, size_t slots)
{
    struct string_slot *fresh = malloc(slots * sizeof(*fresh));
    if (!fresh)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < slots; i++)
        fresh[i].number = NO_STRING;
    index->slots = fresh;
    index->mask = slots - 1;
    return 0;
}

int string_index_init(struct string_index *index, const struct string_pool *pool)
{
    *index = (struct string_index){.pool = pool};
    return index_allocate(index, 1024);
}

void string_index_free(struct string_index *index)
{
    free(index->slots);
    *index = (struct string_index){0};
}

// The slot of these bytes: where they are, or the free one where they belong.
static struct string_slot *index_slot(const struct string_index *index, const void *bytes, size_t length,
                                      uint64_t hash)
{
    uint32_t tag = (uint32_t)(hash >> 32);
    for (size_t at = hash & index->mask;; at = (at + 1) & index->mask) {
        struct string_slot *slot = &index->slots[at];
        if (slot->number == NO_STRING)
            return slot;
        if (slot->tag != tag)
            continue;
        size_t there;
        const char *text = string_pool_get(index->pool, slot->number, &there);
        if (there == length && memcmp(text, bytes, length) == 0)
            return slot;
    }
}

uint32_t string_index_find(const struct string_index *index, const void *bytes, size_t length)
{
    return index_slot(index, bytes, length, XXH3_64bits(bytes, length))->number;
}

static int index_grow(struct string_index *index)
{
    struct string_index old = *index;
    int status = index_allocate(index, (old.mask + 1) * 2);
    if (status)
        return status;
    for (size_t i = 0; i <= old.mask; i++) {
        if (old.slots[i].number == NO_STRING)
            continue;
        size_t length;
        const char *bytes = string_pool_get(index->pool, old.slots[i].number, &length);
        *index_slot(index, bytes, length, XXH3_64bits(bytes, length)) = old.slots[i];
    }
    free(old.slots);
    return 0;
}

int string_index_put(struct string_index *index, uint32_t number)
{
    if ((size_t)index->count * 2 > index->mask) {
        int status = index_grow(index);
        if (status)
            return status;
    }
    size_t length;
    const char *bytes = string_pool_get(index->pool, number, &length);
    uint64_t hash = XXH3_64bits(bytes, length);
    struct string_slot *slot = index_slot(index, bytes, length, hash);
    if (slot->number == NO_STRING) {
        *slot = (struct string_slot){number, (uint32_t)(hash >> 32)};
        index->count++;
    }
    return 0;
}
