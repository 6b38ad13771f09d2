// norm and ffn_activate, apart from the arithmetic: how rows and spans are dealt to threads and stored.
#ifndef STRATA_CPU_ROWS_H
#define STRATA_CPU_ROWS_H

#include "kernels/cpu/cpu_internal.h"

struct norm_args {
    struct cpu_device *device;
    struct activation *out;
    const float *x, *weight, *bias;
    const uint32_t *index;
    enum norm_kind kind;
    float epsilon;
    void (*row)(const struct norm_args *args, const float *x, float *values); // values[out->width]
};
void cpu_norm_rows(struct norm_args *args, uint32_t rows);

struct ffn_args {
    struct cpu_device *device;
    struct activation *out;
    const float *gate, *up; // gate NULL: plain
    uint32_t stride;
    void (*span)(const float *gate, const float *up, float *values, uint32_t count);
};
void cpu_ffn_rows(struct ffn_args *args, uint32_t rows);

#endif
