// From adjusted logits to a token: temperature, top-k, top-p, min-p, draw. Each of the three truncations
// keeps a prefix of the tokens in order of falling probability (equal ones by id), so nothing is sorted: the
// likely candidates are gathered in order of id, a radix histogram over their keys finds where the prefix
// ends by count or by mass, and the rest is filtered out. The draw walks what is kept in order of id, which
// needs no order by probability either.
//
// Masses are summed in f64 in order of id, so a row's token depends on nothing but the row. Any thread; the
// memory is the caller's.
#include <stdbool.h>

#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/sampler_draw_internal.h"

enum {
    KEY_DIGITS = 3,
    MOST_BINS = 2048,
    ENOUGH_CANDIDATES = 512, // from here on looking at each is as fast as looking for fewer
    LOWEST = -87             // offsets below have weight 0
};
static const struct {
    uint32_t shift, bins;
} DIGITS[KEY_DIGITS] = {{20, 2048}, {10, 1024}, {0, 1024}}; // 31 bits

struct draw_bin {
    double mass;
    uint32_t count;
};

static size_t padded_bytes(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

// Cuts the arrays from `memory`, or only counts when it is NULL.
static size_t space_layout(struct draw_space *space, uint8_t *memory, uint32_t vocab)
{
    size_t blocks = (vocab + VOCAB_BLOCK - 1) / VOCAB_BLOCK, floats = blocks * VOCAB_BLOCK * sizeof(float);
    size_t at = 0;
#define CUT(field, bytes) (space->field = memory ? (void *)(memory + at) : NULL, at += padded_bytes(bytes))
    CUT(adjusted, floats);
    CUT(offsets, floats);
    CUT(weights, floats);
    CUT(block_sums, blocks * sizeof(double));
    CUT(block_tops, blocks * sizeof(float));
    CUT(kept_ids, (vocab + 1) * sizeof(int32_t)); // gather writes one past what it keeps
    CUT(kept_keys, vocab * sizeof(uint32_t));
    CUT(kept_weights, vocab * sizeof(float));
    CUT(bins, MOST_BINS * sizeof(struct draw_bin));
#undef CUT
    return at;
}

size_t draw_space_bytes(uint32_t vocab)
{
    struct draw_space unused;
    return space_layout(&unused, NULL, vocab);
}

void draw_space_cut(struct draw_space *out, void *memory, uint32_t vocab)
{
    space_layout(out, memory, vocab);
}

static double kept_mass(const struct draw_space *space, uint32_t n)
{
    double mass = 0;
    for (uint32_t i = 0; i < n; i++)
        mass += space->kept_weights[i];
    return mass;
}

// Gathers all tokens whose offset is at least `least`.
static uint32_t keep_above(const struct vocab_scan *scan, const struct draw_space *space, uint32_t vocab,
                           float least)
{
    uint32_t n = scan->gather(space->offsets, vocab, space->block_tops, least, space->kept_ids);
    for (uint32_t i = 0; i < n; i++) {
        float offset = space->offsets[space->kept_ids[i]];
        space->kept_keys[i] = cpu_float_bits(offset) & 0x7fffffff; // offsets are <= 0: smaller is likelier
        space->kept_weights[i] = space->weights[space->kept_ids[i]];
    }
    return n;
}

// The offset at or above which lie `limit` tokens or `target` mass, and not many more: first by doubling,
// then by halving what is between. LOWEST when there are not that many: below it, weights are 0.
static float find_least(const struct vocab_scan *scan, const struct draw_space *space, uint32_t vocab,
                        uint32_t limit, double target)
{
    float high = 0, low = -1; // too few at or above `high` (itself aside), enough at or above `low`
    uint32_t count_high = 0, count_low;
    double mass;
    while ((count_low = scan->above(space->offsets, space->weights, vocab, space->block_tops, low, &mass)) <
               limit &&
           mass < target) {
        if (low <= LOWEST)
            return LOWEST;
        high = low;
        count_high = count_low;
        low = 2 * low > LOWEST ? 2 * low : LOWEST;
    }
    for (int halvings = 0; halvings < 12 && count_low - count_high > ENOUGH_CANDIDATES; halvings++) {
        float middle = (high + low) / 2;
        uint32_t count = scan->above(space->offsets, space->weights, vocab, space->block_tops, middle, &mass);
        if (count >= limit || mass >= target) {
            low = middle;
            count_low = count;
        } else {
            high = middle;
            count_high = count;
        }
    }
    return low;
}

// A superset of what the truncations keep.
static uint32_t keep_candidates(const struct vocab_scan *scan, const struct draw_space *space, uint32_t vocab,
                                const struct sampling_params *params, double total)
{
    float least = LOWEST;
    if (params->top_k)
        least = find_least(scan, space, vocab, params->top_k, INFINITY);
    else if (params->top_p < 1)
        least = find_least(scan, space, vocab, UINT32_MAX, params->top_p * total);
    else if (params->min_p > 0)
        least = logf(params->min_p < 1 ? params->min_p : 1) - 0.001f; // a little more than enough
    return keep_above(scan, space, vocab, least > LOWEST ? least : LOWEST);
}

// Walks the bins in order until `limit` tokens or `target` mass are reached; *count and *mass become what
// lies before that bin. Rounding may leave the target out of reach: then the last bin with a token is the
// one.
static uint32_t find_bin(const struct draw_bin *bins, uint32_t n_bins, uint32_t limit, double target,
                         uint32_t *count, double *mass)
{
    uint32_t last = 0, count_before = *count;
    double mass_before = *mass;
    for (uint32_t bin = 0; bin < n_bins; bin++) {
        if (!bins[bin].count)
            continue;
        last = bin;
        *count = count_before;
        *mass = mass_before;
        count_before += bins[bin].count;
        mass_before += bins[bin].mass;
        if (count_before >= limit || mass_before >= target)
            break;
    }
    return last;
}

// Keeps the shortest prefix in order of (key, id) that has `limit` tokens or `target` mass; at least one.
static uint32_t keep_prefix(const struct draw_space *space, uint32_t n, uint32_t limit, double target)
{
    uint32_t found = 0, known = 0, before = 0; // `known` bits of the last key, `before` tokens ahead of it
    double mass = 0;
    for (int digit = 0; digit < KEY_DIGITS; digit++) {
        uint32_t shift = DIGITS[digit].shift, n_bins = DIGITS[digit].bins;
        memset(space->bins, 0, n_bins * sizeof *space->bins);
        for (uint32_t i = 0; i < n; i++) {
            if ((space->kept_keys[i] & known) != found)
                continue;
            struct draw_bin *bin = &space->bins[space->kept_keys[i] >> shift & (n_bins - 1)];
            bin->count++;
            bin->mass += space->kept_weights[i];
        }
        found |= find_bin(space->bins, n_bins, limit, target, &before, &mass) << shift;
        known |= (n_bins - 1) << shift;
    }
    uint32_t kept = 0;
    bool full = false; // among the tokens of the last key, the lowest ids fill what is missing
    for (uint32_t i = 0; i < n; i++) {
        uint32_t key = space->kept_keys[i];
        if (key > found || (key == found && full))
            continue;
        if (key == found) {
            before++;
            mass += space->kept_weights[i];
            full = before >= limit || mass >= target;
        }
        space->kept_ids[kept] = space->kept_ids[i];
        space->kept_keys[kept] = key;
        space->kept_weights[kept++] = space->kept_weights[i];
    }
    return kept;
}

static uint32_t keep_likely(const struct draw_space *space, uint32_t n, float min_p)
{
    float least = min_p < 1 ? min_p : 1; // the likeliest has weight 1 and always stays
    uint32_t kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (space->kept_weights[i] < least)
            continue;
        space->kept_ids[kept] = space->kept_ids[i];
        space->kept_weights[kept++] = space->kept_weights[i];
    }
    return kept;
}

void draw_set_make(struct draw_set *out, const struct vocab_scan *scan, const struct draw_space *space,
                   const float *logits, uint32_t vocab, const struct sampling_params *params)
{
    *out = (struct draw_set){.space = space, .vocab = vocab, .only = -1};
    float max = params->temperature > 0 ? scan->max(logits, vocab) : -INFINITY;
    if (max == -INFINITY) {
        out->only = (int32_t)scan->argmax(logits, vocab);
        return;
    }
    float inverse = 1 / params->temperature;
    scan->weigh(logits, vocab, max, inverse > FLT_MAX ? FLT_MAX : inverse, space->offsets, space->weights,
                space->block_sums, space->block_tops);
    out->truncated = params->top_k || params->top_p < 1 || params->min_p > 0;
    if (!out->truncated)
        return;
    double total = 0;
    for (uint32_t block = 0; block * VOCAB_BLOCK < vocab; block++)
        total += space->block_sums[block];
    uint32_t n = keep_candidates(scan, space, vocab, params, total);
    if (params->top_k) {
        if (n > params->top_k)
            n = keep_prefix(space, n, params->top_k, INFINITY);
        total = kept_mass(space, n);
    }
    if (params->top_p < 1)
        n = keep_prefix(space, n, UINT32_MAX, params->top_p * total);
    if (params->min_p > 0)
        n = keep_likely(space, n, params->min_p);
    out->n_kept = n;
}

// Index of the first weight where the running sum passes `target`, else of the last positive one.
static uint32_t walk_weights(const float *weights, uint32_t n, double target)
{
    uint32_t last = 0;
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (weights[i] <= 0)
            continue;
        last = i;
        sum += weights[i];
        if (sum > target)
            break;
    }
    return last;
}

static int32_t draw_from_all(const struct draw_set *set, double uniform)
{
    const struct draw_space *space = set->space;
    uint32_t blocks = (set->vocab + VOCAB_BLOCK - 1) / VOCAB_BLOCK, last = 0;
    double total = 0, before = 0, sum = 0;
    for (uint32_t block = 0; block < blocks; block++)
        total += space->block_sums[block];
    double target = uniform * total;
    for (uint32_t block = 0; block < blocks; block++) {
        if (space->block_sums[block] <= 0)
            continue;
        last = block;
        before = sum;
        sum += space->block_sums[block];
        if (sum > target)
            break;
    }
    uint32_t first = last * VOCAB_BLOCK; // the padding behind the vocabulary has no weight
    return (int32_t)(first + walk_weights(space->weights + first, VOCAB_BLOCK, target - before));
}

int32_t draw_set_draw(const struct draw_set *set, double uniform)
{
    if (set->only >= 0)
        return set->only;
    if (!set->truncated)
        return draw_from_all(set, uniform);
    double target = uniform * kept_mass(set->space, set->n_kept);
    return set->space->kept_ids[walk_weights(set->space->kept_weights, set->n_kept, target)];
}
