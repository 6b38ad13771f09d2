// The packed layout of matrices at the AVX2 and AVX-512 levels, which matmul reads front to back.
//
// A tile is 16 rows (the last one filled up with zeros); tiles follow one another. Inside a tile k runs in
// blocks of 32, eight groups of four: a 64-byte vector holds one group of all 16 rows, row r in bytes
// 4r..4r+3, as the byte dot-product instructions want it. Codes of fewer than 8 bits are split into planes of
// 4, 2 and 1 bits, lowest bits first; a plane's vector holds several groups, the earlier in the lower bits:
//
//     8 bits: 8 vectors          4 bits: 4 vectors, groups 2v and 2v + 1
//     2 bits: 2 vectors, groups 4v..4v + 3             1 bit: 1 vector, all groups
//
// Scales go before the codes they belong to, as vectors of one per row:
//
//     blocks of 32:   two blocks together: d[2][16] halves, [m[2][16] halves], codes of each
//     blocks of 256:  d[16], dmin[16] halves, 16 vectors of 16 bytes, then the codes of its eight 32s. The
//     bytes:
//                     Q4_K, Q5_K  8 scales, 8 minimums       Q6_K, Q3_K  16 scales (signed)
//                     Q2_K        16 times scale | minimum << 4
//     F32, F16, BF16: for each k the 16 rows' weights
//
// Any width that the type allows, and any number of rows, has this form; every vector is aligned to its size.
#ifndef STRATA_CPU_PACKED_H
#define STRATA_CPU_PACKED_H

#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/cpu_types.h"

enum { TILE_ROWS = 16, K_HEADER = 64 + 256 };

static inline uint32_t cpu_code_bytes(uint32_t bits) // of 16 rows x 32 codes
{
    return bits * 64;
}

static inline uint32_t cpu_pair_header(bool has_min)
{
    return has_min ? 128 : 64;
}

static inline uint32_t cpu_tile_count(uint32_t rows)
{
    return (rows + TILE_ROWS - 1) / TILE_ROWS;
}

static inline size_t cpu_tile_bytes(uint32_t type, uint32_t width)
{
    struct cpu_type form = cpu_type_of(type);
    size_t blocks = width / 32;
    if (form.block == 32)
        return (blocks + 1) / 2 * cpu_pair_header(form.has_min) + blocks * cpu_code_bytes(form.bits);
    if (form.block == 256)
        return blocks / 8 * (K_HEADER + 8 * cpu_code_bytes(form.bits));
    size_t bytes = (size_t)width * TILE_ROWS * tensor_type_info(type)->block_bytes;
    return (bytes + 63) / 64 * 64;
}

#endif
