// The random stream of sampling: a counter-based generator, so that the draw of a position depends on (seed,
// choice, position) and on nothing drawn before, and every backend gives the same number. Philox4x32-10, from
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Pure functions; any
// thread.
#ifndef STRATA_RANDOM_STREAM_H
#define STRATA_RANDOM_STREAM_H

#include <stdint.h>

#ifdef __CUDACC__
#define RANDOM_STREAM_FUNCTION static inline __host__ __device__
#else
#define RANDOM_STREAM_FUNCTION static inline
#endif

RANDOM_STREAM_FUNCTION void random_stream_philox(uint32_t counter[4], uint32_t key0, uint32_t key1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * counter[0], b = (uint64_t)0xCD9E8D57u * counter[2];
        uint32_t c1 = counter[1], c3 = counter[3];
        counter[0] = (uint32_t)(b >> 32) ^ c1 ^ key0;
        counter[1] = (uint32_t)b;
        counter[2] = (uint32_t)(a >> 32) ^ c3 ^ key1;
        counter[3] = (uint32_t)a;
        key0 += 0x9E3779B9u; // the golden ratio
        key1 += 0xBB67AE85u; // sqrt(3) - 1
    }
}

// Uniform in [0, 1), 53 bits. Key = seed; counter = (position, choice, 0, 0).
RANDOM_STREAM_FUNCTION double random_stream_uniform(uint64_t seed, uint32_t choice, uint32_t position)
{
    uint32_t counter[4] = {position, choice, 0, 0};
    random_stream_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    uint64_t bits = (uint64_t)(counter[0] >> 5) << 26 | counter[1] >> 6;
    return (double)bits * 0x1p-53;
}

#endif
