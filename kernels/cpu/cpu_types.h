// The quantized GGUF types in one plain form, from which rows are dequantized and matrices packed: every type
// is codes q with a scale, and maybe a minimum, per group of 16 or 32:
//
//     weight = (d * scale[group]) * (q - offset) - dmin * min[group]
//
// Constants and pure functions; any thread.
#ifndef STRATA_CPU_TYPES_H
#define STRATA_CPU_TYPES_H

#include <stdbool.h>
#include <stdint.h>

struct cpu_type {
    uint32_t block;  // weights a block: 32 or 256; 0: not a quantized type
    uint32_t group;  // weights under one scale: 16 or 32
    uint32_t bits;   // of a code
    uint32_t offset; // what a stored code exceeds its value by
    bool has_min;
};

// Of any enum tensor_type.
struct cpu_type cpu_type_of(uint32_t type);

struct cpu_plain_block {
    uint16_t d, dmin;           // halves
    bool negative_min;          // dmin counts with the opposite sign: the *_1 types add it
    int16_t scale[16], min[16]; // by group
    uint8_t q[256];             // codes, unsigned
};

// Reads one block of a quantized type.
void cpu_unpack_block(uint32_t type, const uint8_t *source, struct cpu_plain_block *out);

#endif
