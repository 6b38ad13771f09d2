// KV pages by number: a stack of free ones and a reference count for each. Allocated once for a pool; nothing
// here allocates afterwards. Pure bookkeeping on the scheduler's thread, which owns the ledger. Broken
// preconditions are bugs of the caller that would hand one sequence's pages to another, so they end the
// process at once.
#include "coordinator/kv_ledger.h"

#include <stdio.h>
#include <stdlib.h>

struct kv_ledger {
    uint32_t n_pages;
    uint32_t n_free;   // on the stack, those set aside included
    uint32_t reserved; // <= n_free
    uint32_t *free; // [n_pages]: a stack; the most recently freed page, still warm in caches, goes out first
    uint32_t *references;
};

static void require(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "kv_ledger: %s\n", what);
    abort();
}

int kv_ledger_new(struct kv_ledger **out, uint32_t n_pages)
{
    *out = NULL;
    struct kv_ledger *ledger = calloc(1, sizeof(*ledger));
    if (!ledger)
        return STATUS_NO_MEMORY;
    ledger->n_pages = ledger->n_free = n_pages;
    ledger->free = calloc(n_pages ? n_pages : 1, sizeof(*ledger->free));
    ledger->references = calloc(n_pages ? n_pages : 1, sizeof(*ledger->references));
    if (!ledger->free || !ledger->references) {
        kv_ledger_free(ledger);
        return STATUS_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n_pages; i++)
        ledger->free[i] = n_pages - 1 - i; // page 0 goes out first
    *out = ledger;
    return STATUS_OK;
}

void kv_ledger_free(struct kv_ledger *ledger)
{
    if (!ledger)
        return;
    free(ledger->free);
    free(ledger->references);
    free(ledger);
}

uint32_t kv_ledger_total(const struct kv_ledger *ledger)
{
    return ledger->n_pages;
}

uint32_t kv_ledger_available(const struct kv_ledger *ledger)
{
    return ledger->n_free - ledger->reserved;
}

uint32_t kv_ledger_reserved(const struct kv_ledger *ledger)
{
    return ledger->reserved;
}

uint32_t kv_ledger_references(const struct kv_ledger *ledger, uint32_t page)
{
    require(page < ledger->n_pages, "no such page");
    return ledger->references[page];
}

bool kv_ledger_reserve(struct kv_ledger *ledger, uint64_t count)
{
    if (count > kv_ledger_available(ledger))
        return false;
    ledger->reserved += (uint32_t)count;
    return true;
}

void kv_ledger_unreserve(struct kv_ledger *ledger, uint32_t count)
{
    require(count <= ledger->reserved, "more pages given back than were set aside");
    ledger->reserved -= count;
}

// A page out of those set aside.
static uint32_t take(struct kv_ledger *ledger)
{
    require(ledger->reserved > 0 && ledger->n_free > 0, "a page is taken that was not set aside");
    ledger->reserved--;
    uint32_t page = ledger->free[--ledger->n_free];
    require(ledger->references[page] == 0, "a free page is held");
    ledger->references[page] = 1;
    return page;
}

static void drop(struct kv_ledger *ledger, uint32_t page)
{
    require(page < ledger->n_pages && ledger->references[page] > 0, "a page is dropped that nobody holds");
    if (--ledger->references[page] == 0)
        ledger->free[ledger->n_free++] = page;
}

void kv_ledger_grow(struct kv_ledger *ledger, struct kv_table *table, uint32_t count)
{
    require(count <= table->capacity - table->count, "a page table overflows");
    for (uint32_t i = 0; i < count; i++)
        table->pages[table->count++] = take(ledger);
}

void kv_ledger_share(struct kv_ledger *ledger, const struct kv_table *from, struct kv_table *to)
{
    require(to->count == 0 && from->count <= to->capacity,
            "a fork into a table that is not empty, or too small");
    for (uint32_t i = 0; i < from->count; i++) {
        ledger->references[from->pages[i]]++;
        to->pages[i] = from->pages[i];
    }
    to->count = from->count;
}

bool kv_ledger_own(struct kv_ledger *ledger, struct kv_table *table, uint32_t index, uint32_t *copy_from)
{
    require(index < table->count, "no such entry in the page table");
    uint32_t page = table->pages[index];
    if (ledger->references[page] == 1)
        return false;
    *copy_from = page;
    table->pages[index] = take(ledger);
    drop(ledger, page);
    return true;
}

void kv_ledger_release(struct kv_ledger *ledger, struct kv_table *table)
{
    while (table->count > 0)
        drop(ledger, table->pages[--table->count]);
}
