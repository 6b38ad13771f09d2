// The loop both kinds of tokenizer are made of: neighbours merge, best pair first, until none does. A chain
// of nodes and a heap of candidate pairs give n log n for a word of n characters; a candidate that an earlier
// merge has overtaken is recognized when it comes up (the node's rank is no longer the candidate's) and
// dropped. Runs on whichever thread encodes, in memory that belongs to that call.
#include "common/tokenizer_internal.h"

#include <stdlib.h>

int merge_reserve(struct merge_work *work, size_t n)
{
    if (n >= UINT32_MAX / 2)
        return STATUS_NO_MEMORY;
    if (n + 1 > work->node_capacity) {
        size_t wanted = n + 1 + n / 2;
        struct merge_node *nodes = realloc(work->nodes, wanted * sizeof(*nodes));
        if (!nodes)
            return STATUS_NO_MEMORY;
        work->nodes = nodes;
        work->node_capacity = wanted;
    }
    // n - 1 candidates at first; each of at most n - 1 merges takes one out and puts two in.
    if (2 * n > work->heap_capacity) {
        size_t wanted = 2 * n + n / 2;
        uint64_t *heap = realloc(work->heap, wanted * sizeof(*heap));
        if (!heap)
            return STATUS_NO_MEMORY;
        work->heap = heap;
        work->heap_capacity = wanted;
    }
    return 0;
}

void merge_free(struct merge_work *work)
{
    free(work->nodes);
    free(work->heap);
    *work = (struct merge_work){0};
}

static void sift_down(uint64_t *heap, size_t count, size_t at)
{
    uint64_t moving = heap[at];
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= count)
            break;
        if (child + 1 < count && heap[child + 1] < heap[child])
            child++;
        if (heap[child] >= moving)
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moving;
}

static void heap_push(struct merge_work *work, uint64_t entry)
{
    size_t at = work->n_heap++;
    while (at > 0 && work->heap[(at - 1) / 2] > entry) {
        work->heap[at] = work->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    work->heap[at] = entry;
}

static uint64_t heap_pop(struct merge_work *work)
{
    uint64_t top = work->heap[0];
    work->heap[0] = work->heap[--work->n_heap];
    if (work->n_heap)
        sift_down(work->heap, work->n_heap, 0);
    return top;
}

struct word {
    const struct tokenizer *tokenizer;
    const char *bytes;
    merge_rule *rule;
};

// Looks up what a node and its next one make. Returns the heap entry; its upper half is NO_RANK when nothing.
static uint64_t node_refresh(struct merge_work *work, const struct word *word, uint32_t at)
{
    struct merge_node *left = &work->nodes[at];
    left->rank = NO_RANK;
    if (left->next != work->n_nodes) {
        const struct merge_node *right = &work->nodes[left->next];
        uint32_t end = work->nodes[right->next].start;
        left->rank = word->rule(word->tokenizer, left, right, word->bytes + left->start, end - left->start,
                                &left->merged);
    }
    return (uint64_t)left->rank << 32 | at;
}

static bool is_candidate(uint64_t entry)
{
    return entry >> 32 != NO_RANK;
}

void merge_run(struct merge_work *work, const struct tokenizer *tokenizer, const char *bytes, size_t length,
               merge_rule *rule)
{
    struct word word = {tokenizer, bytes, rule};
    struct merge_node *nodes = work->nodes;
    uint32_t n = (uint32_t)work->n_nodes;
    for (uint32_t i = 0; i < n; i++) {
        nodes[i].prev = i - 1;
        nodes[i].next = i + 1;
    }
    nodes[n] = (struct merge_node){.prev = n - 1, .start = (uint32_t)length, .rank = NO_RANK};

    work->n_heap = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t entry = node_refresh(work, &word, i);
        if (is_candidate(entry))
            work->heap[work->n_heap++] = entry;
    }
    for (size_t i = work->n_heap / 2; i-- > 0;)
        sift_down(work->heap, work->n_heap, i);

    while (work->n_heap) {
        uint64_t entry = heap_pop(work);
        uint32_t at = (uint32_t)entry;
        if (nodes[at].rank != entry >> 32)
            continue;
        uint32_t right = nodes[at].next;
        nodes[right].rank = NO_RANK;
        nodes[at].symbol = nodes[at].merged;
        nodes[at].next = nodes[right].next;
        nodes[nodes[at].next].prev = at;
        entry = node_refresh(work, &word, at);
        if (is_candidate(entry))
            heap_push(work, entry);
        if (at == 0)
            continue;
        entry = node_refresh(work, &word, nodes[at].prev);
        if (is_candidate(entry))
            heap_push(work, entry);
    }
}
