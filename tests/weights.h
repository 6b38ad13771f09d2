// Random weights in GGUF's types, and each type's definition written once more, element by element and in
// f64, for tests to hold the kernels against.
#ifndef STRATA_TESTS_WEIGHTS_H
#define STRATA_TESTS_WEIGHTS_H

#include <stddef.h>
#include <stdint.h>

// A small generator (splitmix64); any seed will do.
uint64_t random_bits(uint64_t *state);
double random_unit(uint64_t *state);  // [0, 1)
float random_signed(uint64_t *state); // (-1, 1)
// A fresh seed, or $STRATA_TEST_SEED; printed, so that a failure can be repeated.
uint64_t random_seed(const char *what);

// All types Strata reads.
extern const uint32_t WEIGHT_TYPES[];
extern const size_t N_WEIGHT_TYPES;

// Fills `rows` rows of `width` weights: any codes, scales of either sign and moderate size.
void weights_fill(uint32_t type, void *out, uint32_t width, uint32_t rows, uint64_t *random);

// The same, but every byte that is not part of a half is `byte`: codes and scales at their extremes. Block
// types.
void weights_fill_codes(uint32_t type, void *out, uint32_t width, uint32_t rows, uint8_t byte,
                        uint64_t *random);

// Weight k of the row at `row`. *gross (may be NULL) gets the sum of the magnitudes of the terms it is the
// sum of.
double weights_value(uint32_t type, const void *row, uint32_t k, double *gross);

#endif
