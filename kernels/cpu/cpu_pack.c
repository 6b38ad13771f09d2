// Matrices as the CPU keeps them, and the sizes of activations. The portable level and look-up tables keep
// GGUF's rows. Called from the executor's thread.
#include "kernels/cpu/cpu_internal.h"

size_t cpu_matrix_bytes(const struct device *device, uint32_t type, uint32_t rows, uint32_t width, bool table)
{
    return tensor_type_bytes(type, width, rows);
}

int cpu_matrix_pack(struct device *device, const struct matrix *matrix, const void *source,
                    struct error *error)
{
    memcpy(matrix->data, source, tensor_type_bytes(matrix->type, matrix->width, matrix->rows));
    return 0;
}

unsigned cpu_matrix_forms(const struct device *device, uint32_t type)
{
    return FORM_F32;
}

size_t cpu_activation_bytes(const struct device *device, uint32_t width, uint32_t rows, unsigned forms)
{
    struct activation shape = {.width = width, .rows = rows, .forms = forms};
    struct cpu_activation_rows layout = cpu_activation_rows(&shape);
    return layout.float_stride * 4 * rows + layout.q8_stride * rows;
}
