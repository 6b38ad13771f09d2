// Matrices as the CPU keeps them (cpu_packed.h), and the sizes of activations. The portable level and look-up
// tables keep GGUF's rows. Called from the executor's thread; packing runs on the compute threads, a tile a
// task.
#include "kernels/cpu/cpu_packed.h"

static bool is_packed(const struct device *device, bool table)
{
    return !table && ((const struct cpu_device *)device)->level > LEVEL_PORTABLE;
}

size_t cpu_matrix_bytes(const struct device *device, uint32_t type, uint32_t rows, uint32_t width, bool table)
{
    size_t plain = tensor_type_bytes(type, width, rows), packed;
    if (!plain || !is_packed(device, table))
        return plain;
    return __builtin_mul_overflow(cpu_tile_count(rows), cpu_tile_bytes(type, width), &packed) ? 0 : packed;
}

unsigned cpu_matrix_forms(const struct device *device, uint32_t type)
{
    return is_packed(device, false) && cpu_type_of(type).block ? FORM_Q8 : FORM_F32;
}

size_t cpu_activation_bytes(const struct device *device, uint32_t width, uint32_t rows, unsigned forms)
{
    struct activation shape = {.width = width, .rows = rows, .forms = forms};
    struct cpu_activation_rows layout = cpu_activation_rows(&shape);
    return (layout.float_stride * 4 + layout.q8_stride) * rows;
}

// --- packing ---

static void put_word(uint8_t *vector, uint32_t row, uint32_t word)
{
    memcpy(vector + row * 4, &word, 4);
}

// One plane of a row's 32 codes: bits [shift, shift + bits) of each. `codes` are its 8 groups of four bytes.
// Returns the end of the plane.
static uint8_t *put_plane(uint8_t *plane, uint32_t row, const uint32_t codes[8], uint32_t bits,
                          uint32_t shift)
{
    uint32_t groups = 8 / bits, mask = 0x01010101u * ((1u << bits) - 1); // groups to a vector
    for (uint32_t v = 0; v < bits; v++) {
        uint32_t word = 0;
        for (uint32_t i = 0; i < groups; i++)
            word |= (codes[v * groups + i] >> shift & mask) << i * bits;
        put_word(plane + v * 64, row, word);
    }
    return plane + bits * 64;
}

static void put_codes(uint8_t *to, uint32_t row, const uint8_t *q, uint32_t bits)
{
    uint32_t codes[8], shift = 0;
    memcpy(codes, q, 32);
    for (uint32_t plane = 8; plane; plane /= 2) {
        if (!(bits & plane))
            continue;
        to = put_plane(to, row, codes, plane, shift);
        shift += plane;
    }
}

static void put_half(uint8_t *vector, uint32_t row, uint16_t half)
{
    memcpy(vector + row * 2, &half, 2);
}

// Blocks of 32: block `index` of a row.
static void pack_block_32(uint8_t *tile, uint32_t row, uint32_t index, struct cpu_type form,
                          const struct cpu_plain_block *block)
{
    uint32_t header = cpu_pair_header(form.has_min), codes = cpu_code_bytes(form.bits), odd = index & 1;
    uint8_t *pair = tile + (size_t)(index / 2) * (header + 2 * codes);
    put_half(pair + odd * 32, row, block->d);
    if (form.has_min)
        put_half(pair + 64 + odd * 32, row, block->dmin);
    put_codes(pair + header + odd * codes, row, block->q, form.bits);
}

static void pack_block_256(uint8_t *tile, uint32_t row, uint32_t index, struct cpu_type form,
                           const struct cpu_plain_block *block)
{
    uint32_t codes = cpu_code_bytes(form.bits);
    uint8_t *header = tile + (size_t)index * (K_HEADER + 8 * codes);
    put_half(header, row, block->d);
    put_half(header + 32, row, block->dmin);
    for (uint32_t i = 0; i < 16; i++) {
        int byte = form.group == 32 ? (i < 8 ? block->scale[i] : block->min[i - 8])
                   : form.has_min   ? block->scale[i] | block->min[i] << 4
                                    : block->scale[i];
        header[64 + i * 16 + row] = (uint8_t)byte;
    }
    for (uint32_t i = 0; i < 8; i++)
        put_codes(header + K_HEADER + i * codes, row, block->q + 32 * i, form.bits);
}

static void pack_floats(uint8_t *tile, uint32_t row, uint32_t width, uint32_t bytes, const uint8_t *source)
{
    for (uint32_t k = 0; k < width; k++)
        memcpy(tile + ((size_t)k * TILE_ROWS + row) * bytes, source + (size_t)k * bytes, bytes);
}

static void pack_row(uint8_t *tile, uint32_t row, uint32_t type, uint32_t width, const uint8_t *source)
{
    struct cpu_type form = cpu_type_of(type);
    uint32_t block_bytes = tensor_type_info(type)->block_bytes;
    if (!form.block) {
        pack_floats(tile, row, width, block_bytes, source);
        return;
    }
    uint32_t n_blocks = width / form.block;
    struct cpu_plain_block block;
    for (uint32_t i = 0; i < n_blocks; i++) {
        cpu_unpack_block(type, source + (size_t)i * block_bytes, &block);
        if (form.block == 32)
            pack_block_32(tile, row, i, form, &block);
        else
            pack_block_256(tile, row, i, form, &block);
    }
}

struct pack_args {
    const struct matrix *matrix;
    const uint8_t *source;
};

static void pack_tile(void *arguments, uint32_t task, uint32_t worker)
{
    const struct pack_args *args = arguments;
    const struct matrix *matrix = args->matrix;
    size_t row_bytes = tensor_type_bytes(matrix->type, matrix->width, 1);
    size_t tile_bytes = cpu_tile_bytes(matrix->type, matrix->width);
    uint8_t *tile = (uint8_t *)matrix->data + task * tile_bytes;
    memset(tile, 0, tile_bytes);
    uint32_t first = task * TILE_ROWS;
    for (uint32_t row = 0; row < TILE_ROWS && first + row < matrix->rows; row++)
        pack_row(tile, row, matrix->type, matrix->width, args->source + (first + row) * row_bytes);
}

int cpu_matrix_pack(struct device *device, const struct matrix *matrix, const void *source,
                    struct error *error)
{
    struct pack_args args = {matrix, source};
    size_t plain = tensor_type_bytes(matrix->type, matrix->width, matrix->rows);
    if (!plain)
        return error_set(error, STATUS_INVALID, "a matrix of %u x %u weights cannot have type %u",
                         matrix->rows, matrix->width, matrix->type);
    if (is_packed(device, matrix->table))
        cpu_parallel(cpu_device_of(device), pack_tile, &args, cpu_tile_count(matrix->rows));
    else
        memcpy(matrix->data, source, plain);
    return 0;
}
