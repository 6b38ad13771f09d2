// The ledger of KV pages: which page numbers are free, set aside, or held, and by how many sequences. Numbers
// only; workers own the bytes, and hear of every change through the commands of a step plan. Pure, and one
// thread's (the scheduler's).
//
// A page is free, or held with one reference for each page table that names it. Pages are set aside
// (reserved) by count before they are taken by number, so that what a request may come to need is there when
// it needs it. A page with more than one reference is read-only: who wants to write it calls kv_ledger_own
// first.
#ifndef STRATA_KV_LEDGER_H
#define STRATA_KV_LEDGER_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

struct kv_ledger;

// The page table of one sequence: entry i holds positions [i, i + 1) * KV_PAGE_POSITIONS. `pages` belongs to
// whoever owns the table.
struct kv_table {
    uint32_t *pages; // [capacity]
    uint32_t count, capacity;
};

int kv_ledger_new(struct kv_ledger **out, uint32_t n_pages); // STATUS_NO_MEMORY
void kv_ledger_free(struct kv_ledger *ledger);

uint32_t kv_ledger_total(const struct kv_ledger *ledger);
uint32_t kv_ledger_available(const struct kv_ledger *ledger); // neither held nor set aside
uint32_t kv_ledger_reserved(const struct kv_ledger *ledger);
uint32_t kv_ledger_references(const struct kv_ledger *ledger, uint32_t page); // 0 = free

// Sets `count` pages aside; false, and nothing done, when so many are not available.
bool kv_ledger_reserve(struct kv_ledger *ledger, uint64_t count);
void kv_ledger_unreserve(struct kv_ledger *ledger, uint32_t count);

// Appends `count` pages to the table, out of those set aside.
void kv_ledger_grow(struct kv_ledger *ledger, struct kv_table *table, uint32_t count);
// A fork: the empty table `to` gets every entry of `from`, each page one reference more.
void kv_ledger_share(struct kv_ledger *ledger, const struct kv_table *from, struct kv_table *to);
// Makes entry `index` writable. When others hold its page too, a page out of those set aside takes its place,
// and true is returned: the caller has *copy_from copied to the new entry before anything is written.
bool kv_ledger_own(struct kv_ledger *ledger, struct kv_table *table, uint32_t index, uint32_t *copy_from);
// Empties the table; pages that nobody else holds are free again.
void kv_ledger_release(struct kv_ledger *ledger, struct kv_table *table);

#endif
