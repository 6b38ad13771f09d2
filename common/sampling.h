// How one sequence draws its tokens. A plain value that travels from the client to the last stage. Applied in
// this order: logit bias, repetition penalty (prompt and output), presence and frequency penalties (output),
// temperature, top-k, top-p, min-p, draw. Equal logits go to the lowest id. Reported logprobs are of the
// model's own distribution.
//
// Each truncation keeps a prefix of the tokens in order of falling probability, of what the one before kept:
// top-p the shortest whose probabilities reach it, min-p those at least that fraction of the likeliest. The
// draw goes through what is left in order of id, to where the sum of probabilities passes the random number.
#ifndef STRATA_SAMPLING_H
#define STRATA_SAMPLING_H

#include <stdint.h>

struct logit_bias {
    int32_t token;
    float bias; // added to the logit; -INFINITY forbids
};

struct sampling_params {
    float temperature;        // 0 = greedy; otherwise logits are divided by it
    uint32_t top_k;           // 0 = off
    float top_p;              // 1 = off
    float min_p;              // 0 = off
    float repetition_penalty; // 1 = off
    float presence_penalty;   // 0 = off
    float frequency_penalty;  // 0 = off
    uint64_t seed;            // of the counter-based stream (seed, choice, position)
    uint32_t min_tokens;      // until so many were drawn, the ids in step_open's ban list cannot be
};

#define SAMPLING_DEFAULTS                                                                                    \
    ((struct sampling_params){.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f})

#endif
