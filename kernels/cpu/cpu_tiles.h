// How matmul is cut up at the AVX2 and AVX-512 levels: a tile kernel multiplies one tile of 16 rows of
// weights with 1, 2, 4 or 8 columns (rows of activations); cpu_tiles.c deals tiles and columns to the
// threads.
//
// A kernel computes each of its sums on its own, in ascending order of k, in the same order for every number
// of columns: that is what makes matmul batch-invariant.
#ifndef STRATA_CPU_TILES_H
#define STRATA_CPU_TILES_H

#include "kernels/cpu/cpu_packed.h"

struct tile_call {
    const uint8_t *tile;
    uint32_t width;
    uint32_t n_rows;   // of the tile that exist: 1..16
    const uint8_t *x;  // the first column's floats or blocks
    size_t x_stride;   // bytes from column to column
    float *out;        // [column][row], columns out_stride apart
    size_t out_stride; // floats
    const float *bias; // of the tile's first row, or NULL
    bool accumulate;
};

typedef void tile_kernel(const struct tile_call *call);

enum { TILE_KERNELS = 4 }; // for 1, 2, 4 and 8 columns
struct tile_kernels {
    tile_kernel *columns[TILE_KERNELS]; // the wider ones may be missing
};

// matmul, with kernels[type].
void cpu_matmul_tiles(struct cpu_device *device, const struct activation *x, uint32_t rows,
                      const struct matmul_part *parts, uint32_t n_parts, const struct tile_kernels *kernels);

#endif
