// Packing: from GGUF's blocks to records (cuda_record.cuh), on the device. The source's bytes come through
// the pinned ring, some rows at a time, so that the host reads the next ones while the device packs these.
// Unpacking, for products with many prompt rows: records to plain rows of halves. Queued by the executor's
// thread.
#include "kernels/cuda/cuda_record.cuh"
#include "kernels/cuda/cuda_source.cuh"

enum { PIECE_BYTES = 64 << 20 };

static uint32_t tiles_of(uint32_t rows)
{
    return (rows + CUDA_TILE_ROWS - 1) / CUDA_TILE_ROWS;
}

static size_t records_bytes(uint32_t type, uint32_t rows, uint32_t width)
{
    return (size_t)tiles_of(rows) * (cuda_padded_width(width) / CUDA_K_BLOCK) *
           record_form_of(record_layout_of(type)).bytes;
}

extern "C" size_t cuda_matrix_bytes(const struct device *device, uint32_t type, uint32_t rows, uint32_t width,
                                    bool table)
{
    if (table)
        return tensor_type_bytes(type, width, rows);
    if (tensor_type_bytes(type, width, rows) == 0)
        return 0;
    return records_bytes(type, rows, width) + (size_t)tiles_of(rows) * CUDA_TILE_ROWS * sizeof(float);
}

extern "C" unsigned cuda_matrix_forms(const struct device *device, uint32_t type)
{
    return CUDA_FORM_HALF;
}

// --- what the kernels are given ---

struct pack_args {
    const uint8_t *source; // rows [first_row, ...) of the file's
    size_t row_bytes;
    uint32_t type, width;
    uint32_t rows;              // of the whole matrix
    uint32_t first_row, n_rows; // in `source`; first_row is a multiple of a panel's rows
    uint32_t tiles, k_blocks;   // of the whole matrix
    unsigned char *records;
    float *factors; // [tiles * 16]
};

// The row's blocks are read through this: zero weights beyond the matrix.
struct pack_row {
    const uint8_t *bytes; // NULL: padding
    uint32_t width;
};

__device__ __forceinline__ struct pack_row pack_row_of(const struct pack_args &args, uint32_t row)
{
    bool there = row < args.rows && row - args.first_row < args.n_rows;
    return {there ? args.source + (size_t)(row - args.first_row) * args.row_bytes : NULL, args.width};
}

__device__ __forceinline__ const uint8_t *pack_block(const struct pack_args &args, const struct pack_row &row,
                                                     uint32_t k)
{
    struct source_form form = source_form_of(args.type);
    return row.bytes && k < row.width ? row.bytes + (size_t)(k / form.block) * form.bytes : NULL;
}

__device__ __forceinline__ uint32_t pack_code(const struct pack_args &args, const struct pack_row &row,
                                              uint32_t k)
{
    const uint8_t *block = pack_block(args, row, k);
    return block ? source_code(args.type, block, k % source_form_of(args.type).block) : 0;
}

// --- row factors ---

// A power of two near the largest scale (or weight) of a row, so that what is stored stays well inside the
// range of a half: see cuda_record.cuh. One block a row.
__global__ void row_factor_kernel(struct pack_args args)
{
    __shared__ float largest[32];
    cuda_wait();
    uint32_t row = args.first_row + blockIdx.x;
    struct pack_row from = pack_row_of(args, row);
    struct source_form form = source_form_of(args.type);
    float most = 0;
    for (uint32_t k = threadIdx.x * form.block; from.bytes && k < args.width; k += blockDim.x * form.block) {
        const uint8_t *block = pack_block(args, from, k);
        float value = form.block == 1 ? source_value(args.type, from.bytes, k) : source_half(block);
        most = fmaxf(most, fabsf(value));
    }
    for (int offset = 16; offset; offset >>= 1)
        most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    if (threadIdx.x % 32 == 0)
        largest[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    for (uint32_t i = 1; i < blockDim.x / 32; i++)
        most = fmaxf(most, largest[i]);
    int exponent = most > 0 && isfinite(most) ? max(ilogbf(most), -100) : 0;
    int layout_exponent = args.type == TENSOR_Q8_0 ? -4 : form.block == 1 ? -14 : 10;
    args.factors[row] = args.type == TENSOR_F16 ? 1.0f : ldexpf(1.0f, exponent + layout_exponent);
}

// --- the parts of a record; each thread of the block does some words of each ---

struct pack_place { // the record that a block of threads writes
    uint32_t tile, k_block;
    unsigned char *record;
};

__device__ __forceinline__ uint32_t place_row(const struct pack_place &place, uint32_t row)
{
    return place.tile * CUDA_TILE_ROWS + row;
}

// Of weight e of K group j in lane l's row g + 8 r.
__device__ __forceinline__ uint32_t place_k(const struct pack_place &place, uint32_t j, uint32_t lane,
                                            uint32_t e)
{
    return place.k_block * CUDA_K_BLOCK + 32 * j + 8 * (lane & 3) + e;
}

// Words of four 4-bit codes of group 2 i (low nibbles) and four of 2 i + 1.
__device__ __forceinline__ void pack_nibbles(const struct pack_args &args, const struct pack_place &place)
{
    for (uint32_t w = threadIdx.x; w < 512; w += blockDim.x) {
        uint32_t i = w / 128, lane = w / 4 % 32, r = w / 2 % 2, part = w % 2, word = 0;
        struct pack_row row = pack_row_of(args, place_row(place, lane / 4 + 8 * r));
        for (uint32_t high = 0; high < 2; high++) {
            for (uint32_t e = 0; e < 4; e++) {
                uint32_t code = pack_code(args, row, place_k(place, 2 * i + high, lane, 4 * part + e)) & 15;
                word |= code << (4 * high + e % 2 * 16 + e / 2 * 8);
            }
        }
        ((uint32_t *)place.record)[w] = word;
    }
}

// The fifth bits: word [i][lane], bit `pair` and 16 + `pair` for the two codes of a pair, pair = 8 high + 4 r
// + e / 2.
__device__ __forceinline__ void pack_fifth_bits(const struct pack_args &args, const struct pack_place &place,
                                                uint32_t offset)
{
    for (uint32_t w = threadIdx.x; w < 128; w += blockDim.x) {
        uint32_t i = w / 32, lane = w % 32, word = 0;
        for (uint32_t r = 0; r < 2; r++) {
            struct pack_row row = pack_row_of(args, place_row(place, lane / 4 + 8 * r));
            for (uint32_t high = 0; high < 2; high++) {
                for (uint32_t e = 0; e < 8; e++) {
                    uint32_t bit = pack_code(args, row, place_k(place, 2 * i + high, lane, e)) >> 4 & 1;
                    word |= bit << (8 * high + 4 * r + e / 2 + e % 2 * 16);
                }
            }
        }
        ((uint32_t *)(place.record + offset))[w] = word;
    }
}

// Bits 4 and 5: word [i][lane][r], at 2 pair and 16 + 2 pair, pair = 4 high + e / 2.
__device__ __forceinline__ void pack_high_pairs(const struct pack_args &args, const struct pack_place &place,
                                                uint32_t offset)
{
    for (uint32_t w = threadIdx.x; w < 256; w += blockDim.x) {
        uint32_t i = w / 64, lane = w / 2 % 32, r = w % 2, word = 0;
        struct pack_row row = pack_row_of(args, place_row(place, lane / 4 + 8 * r));
        for (uint32_t high = 0; high < 2; high++) {
            for (uint32_t e = 0; e < 8; e++) {
                uint32_t bits = pack_code(args, row, place_k(place, 2 * i + high, lane, e)) >> 4 & 3;
                word |= bits << (2 * (4 * high + e / 2) + e % 2 * 16);
            }
        }
        ((uint32_t *)(place.record + offset))[w] = word;
    }
}

__device__ __forceinline__ void pack_bytes(const struct pack_args &args, const struct pack_place &place)
{
    for (uint32_t w = threadIdx.x; w < 1024; w += blockDim.x) {
        uint32_t j = w / 128, lane = w / 4 % 32, r = w / 2 % 2, part = w % 2, word = 0;
        struct pack_row row = pack_row_of(args, place_row(place, lane / 4 + 8 * r));
        for (uint32_t e = 0; e < 4; e++)
            word |= pack_code(args, row, place_k(place, j, lane, 4 * part + e)) << 8 * e;
        ((uint32_t *)place.record)[w] = word;
    }
}

__device__ __forceinline__ void pack_halves(const struct pack_args &args, const struct pack_place &place)
{
    for (uint32_t w = threadIdx.x; w < 4096; w += blockDim.x) {
        uint32_t j = w / 512, r = w / 256 % 2, lane = w / 8 % 32, e = w % 8,
                 row = place_row(place, lane / 4 + 8 * r);
        struct pack_row from = pack_row_of(args, row);
        uint32_t k = place_k(place, j, lane, e);
        float value = from.bytes && k < args.width ? source_value(args.type, from.bytes, k) : 0;
        if (args.type != TENSOR_F16)
            value /= args.factors[row];
        ((__half *)place.record)[w] = __float2half_rn(fminf(fmaxf(value, -65504.0f), 65504.0f));
    }
}

// Integer scales and minimums, and the block's factors.
__device__ __forceinline__ void pack_integer_scales(const struct pack_args &args,
                                                    const struct pack_place &place,
                                                    const struct record_form &form)
{
    uint32_t groups = form.per_16 ? 16 : 8, group = CUDA_K_BLOCK / groups, bias = form.per_16 ? 128 : 0;
    for (uint32_t i = threadIdx.x; i < 16 * groups; i += blockDim.x) {
        uint32_t r = i / groups, s = i % groups;
        struct pack_row row = pack_row_of(args, place_row(place, r));
        const uint8_t *block = pack_block(args, row, place.k_block * CUDA_K_BLOCK + s * group);
        int2 scale = block ? source_scale(args.type, block, s) : make_int2(0, 0);
        if (args.type == TENSOR_Q3_K)
            scale.y = 4 * scale.x; // scale x (code - 4)
        unsigned char *to = place.record + form.scales + r * form.scale_row_bytes;
        to[s] = (unsigned char)(scale.x + (int)bias);
        if (form.has_min)
            to[groups + s] = (unsigned char)(scale.y + (int)bias);
    }
    for (uint32_t r = threadIdx.x; r < 16; r += blockDim.x) {
        struct pack_row row = pack_row_of(args, place_row(place, r));
        const uint8_t *block = pack_block(args, row, place.k_block * CUDA_K_BLOCK);
        float2 factors = block ? source_factors(args.type, block) : make_float2(0, 0);
        if (args.type == TENSOR_Q3_K)
            factors.y = factors.x;
        *(__half2 *)(place.record + form.factors + 4 * r) = __floats2half2_rn(factors.x, factors.y);
    }
}

// Scales (and what to add, in the units of the sums over 64) as halves, over the row's factor.
__device__ __forceinline__ void pack_half_scales(const struct pack_args &args, const struct pack_place &place,
                                                 const struct record_form &form)
{
    struct source_form source = source_form_of(args.type);
    for (uint32_t i = threadIdx.x; i < 128; i += blockDim.x) {
        uint32_t r = i / 8, j = i % 8, row = place_row(place, r);
        struct pack_row from = pack_row_of(args, row);
        const uint8_t *block = pack_block(args, from, place.k_block * CUDA_K_BLOCK + 32 * j);
        float2 factors = block ? source_factors(args.type, block) : make_float2(0, 0);
        float unit = 1.0f / args.factors[row], d = factors.x * unit;
        __half *to = (__half *)(place.record + form.scales + r * form.scale_row_bytes);
        if (!form.has_min) {
            to[j] = __float2half_rn(d);
            continue;
        }
        float add = source.has_min ? -factors.y : -factors.x * (float)source.offset;
        to[j] = __float2half_rn(d * (j % 2 ? 1048576.0f : 16777216.0f)); // 2^20: the code is 16 times itself
        to[8 + j] = __float2half_rn(add * unit * 64.0f);
    }
}

// One block of threads a record. The type is a constant of the instance, so that nothing is looked up and
// nothing divided for each weight.
template <uint32_t TYPE, int LAYOUT> __global__ void pack_kernel(struct pack_args given)
{
    cuda_wait();
    constexpr struct record_form form = record_form_of(LAYOUT);
    struct pack_args args = given;
    args.type = TYPE;
    struct pack_place place;
    place.tile = args.first_row / CUDA_TILE_ROWS + blockIdx.y;
    place.k_block = blockIdx.x;
    place.record =
        args.records + record_index(place.tile, place.k_block, args.tiles, args.k_blocks) * form.bytes;
    if constexpr (LAYOUT == RECORD_HALVES) {
        pack_halves(args, place);
    } else {
        if constexpr (LAYOUT == RECORD_SCALED_8)
            pack_bytes(args, place);
        else
            pack_nibbles(args, place);
        if constexpr (LAYOUT == RECORD_FIVES || LAYOUT == RECORD_SCALED_5)
            pack_fifth_bits(args, place, form.plane);
        if constexpr (LAYOUT == RECORD_SIXES)
            pack_high_pairs(args, place, form.plane);
        if constexpr (form.integer_scales)
            pack_integer_scales(args, place, form);
        else
            pack_half_scales(args, place, form);
    }
}

typedef void packer(struct pack_args);

static packer *packer_of(uint32_t type)
{
    switch (type) {
    case TENSOR_Q4_0:
        return pack_kernel<TENSOR_Q4_0, RECORD_SCALED_4>;
    case TENSOR_Q4_1:
        return pack_kernel<TENSOR_Q4_1, RECORD_SCALED_4>;
    case TENSOR_Q5_0:
        return pack_kernel<TENSOR_Q5_0, RECORD_SCALED_5>;
    case TENSOR_Q5_1:
        return pack_kernel<TENSOR_Q5_1, RECORD_SCALED_5>;
    case TENSOR_Q8_0:
        return pack_kernel<TENSOR_Q8_0, RECORD_SCALED_8>;
    case TENSOR_Q2_K:
        return pack_kernel<TENSOR_Q2_K, RECORD_NIBBLES_16>;
    case TENSOR_Q3_K:
        return pack_kernel<TENSOR_Q3_K, RECORD_NIBBLES_16>;
    case TENSOR_Q4_K:
        return pack_kernel<TENSOR_Q4_K, RECORD_NIBBLES>;
    case TENSOR_Q5_K:
        return pack_kernel<TENSOR_Q5_K, RECORD_FIVES>;
    case TENSOR_Q6_K:
        return pack_kernel<TENSOR_Q6_K, RECORD_SIXES>;
    case TENSOR_F32:
        return pack_kernel<TENSOR_F32, RECORD_HALVES>;
    case TENSOR_F16:
        return pack_kernel<TENSOR_F16, RECORD_HALVES>;
    default:
        return pack_kernel<TENSOR_BF16, RECORD_HALVES>;
    }
}

// --- the op ---

static struct pack_args pack_args_of(const struct matrix *matrix)
{
    struct pack_args args = {};
    args.row_bytes = tensor_type_bytes(matrix->type, matrix->width, 1);
    args.type = matrix->type;
    args.width = matrix->width;
    args.rows = matrix->rows;
    args.tiles = tiles_of(matrix->rows);
    args.k_blocks = cuda_padded_width(matrix->width) / CUDA_K_BLOCK;
    args.records = (unsigned char *)matrix->data;
    args.factors = (float *)(args.records + records_bytes(matrix->type, matrix->rows, matrix->width));
    return args;
}

static void pack_piece(struct cuda_device *device, struct pack_args *args)
{
    uint32_t tiles = tiles_of(args->n_rows);
    if (record_form_of(record_layout_of(args->type)).row_factor)
        cuda_launch(device, "packing", row_factor_kernel, tiles * CUDA_TILE_ROWS, 128, 0, *args);
    for (uint32_t first = 0; first < tiles; first += 32768) { // a grid's y is bounded
        uint32_t count = tiles - first < 32768 ? tiles - first : 32768;
        struct pack_args part = *args;
        part.source += (size_t)first * CUDA_TILE_ROWS * args->row_bytes;
        part.first_row += first * CUDA_TILE_ROWS;
        part.n_rows -= first * CUDA_TILE_ROWS;
        cuda_launch(device, "packing", packer_of(args->type), dim3(args->k_blocks, count), 256, 0, part);
    }
}

extern "C" uint32_t cuda_pack_group(uint32_t type, uint32_t rows, uint32_t width)
{
    uint32_t panel_rows = PANEL_TILES * CUDA_TILE_ROWS;
    size_t panel_bytes = tensor_type_bytes(type, width, panel_rows);
    uint32_t panels = panel_bytes < PIECE_BYTES ? (uint32_t)(PIECE_BYTES / panel_bytes) : 1;
    size_t group = (size_t)panels * panel_rows;
    return group < rows ? (uint32_t)group : rows;
}

extern "C" void cuda_pack_rows(struct cuda_device *device, const struct matrix *matrix, const void *staged,
                               uint32_t first, uint32_t count)
{
    struct pack_args args = pack_args_of(matrix);
    args.source = (const uint8_t *)staged;
    args.first_row = first;
    args.n_rows = count;
    pack_piece(device, &args);
}

extern "C" int cuda_matrix_pack(struct device *base, const struct matrix *matrix, const void *source,
                                struct error *error)
{
    struct cuda_device *device = cuda_device_of(base);
    if (tensor_type_bytes(matrix->type, matrix->width, matrix->rows) == 0)
        return error_set(error, STATUS_INVALID, "a matrix of %u x %u weights cannot have type %u",
                         matrix->rows, matrix->width, matrix->type);
    size_t row_bytes = tensor_type_bytes(matrix->type, matrix->width, 1);
    if (matrix->table) {
        cuda_upload(base, matrix->data, source, matrix->bytes);
        return STATUS_OK;
    }
    uint32_t group = cuda_pack_group(matrix->type, matrix->rows, matrix->width);
    cuda_load_drain(device); // it packs from the same scratch memory
    void *staged = cuda_scratch(device, group * row_bytes);
    if (!staged)
        return cuda_sync(base, error); // says why, and takes the fault back
    for (size_t row = 0; row < matrix->rows; row += group) {
        uint32_t count = (uint32_t)(matrix->rows - row < group ? matrix->rows - row : group);
        cuda_upload(base, staged, (const uint8_t *)source + row * row_bytes, count * row_bytes);
        cuda_pack_rows(device, matrix, staged, (uint32_t)row, count);
    }
    return STATUS_OK;
}

// --- and back, to halves ---

// One warp a record: a lane writes 8 weights of one row at a time.
template <int L>
__global__ void __launch_bounds__(128)
    unpack_kernel(const unsigned char *records, const float *factors, uint32_t rows, uint32_t tiles,
                  uint32_t k_blocks, __half *out)
{
    constexpr struct record_form form = record_form_of(L);
    cuda_wait();
    cuda_release();
    uint32_t k_block = blockIdx.x * 4 + threadIdx.x / 32, tile = blockIdx.y, lane = threadIdx.x % 32;
    if (k_block >= k_blocks)
        return;
    const unsigned char *record = records + record_index(tile, k_block, tiles, k_blocks) * form.bytes;
    int g = lane >> 2, t = lane & 3;
    struct record_row scales[2] = {record_read_row<L>(record, g), record_read_row<L>(record, g + 8)};
    for (int j = 0; j < 8; j++) {
        unsigned a[8];
        record_group<L>(record, scales, j, lane, a);
        for (int r = 0; r < 2; r++) {
            uint32_t row = tile * CUDA_TILE_ROWS + g + 8 * r;
            float factor, add = 0;
            if constexpr (form.integer_scales) {
                float2 block = __half22float2(*(const __half2 *)(record + form.factors + (g + 8 * r) * 4));
                factor = block.x * 524288.0f;
                const unsigned char *bytes = record + form.scales + (g + 8 * r) * form.scale_row_bytes;
                if constexpr (L == RECORD_NIBBLES_16)
                    add = -block.y * (float)((int)bytes[16 + 2 * j + t / 2] - 128);
                else if constexpr (form.has_min)
                    add = -block.y * (float)bytes[8 + j];
            } else {
                factor = factors[row];
                if constexpr (form.has_min)
                    add = factor / 64 *
                          __half2float(*(const __half *)(record + form.scales +
                                                         (g + 8 * r) * form.scale_row_bytes + 16 + 2 * j));
            }
            __half2 weights[4];
            for (int p = 0; p < 4; p++) {
                float2 pair = __half22float2(*(__half2 *)&a[2 * p + r]);
                weights[p] = __floats2half2_rn(fmaf(pair.x, factor, add), fmaf(pair.y, factor, add));
            }
            if (row < rows)
                *(uint4 *)(out + (size_t)row * k_blocks * CUDA_K_BLOCK + k_block * CUDA_K_BLOCK + 32 * j +
                           8 * t) = *(uint4 *)weights;
        }
    }
}

template <int L> static void unpack(struct cuda_device *device, const struct pack_args *args, __half *out)
{
    cuda_launch(device, "unpacking", unpack_kernel<L>, dim3((args->k_blocks + 3) / 4, args->tiles), 128, 0,
                args->records, args->factors, args->rows, args->tiles, args->k_blocks, out);
}

extern "C" void cuda_matrix_unpack(struct cuda_device *device, const struct matrix *matrix, void *out)
{
    static void (*const UNPACK[RECORD_LAYOUTS])(struct cuda_device *, const struct pack_args *, __half *) = {
        unpack<RECORD_NIBBLES>,  unpack<RECORD_NIBBLES_16>, unpack<RECORD_FIVES>,    unpack<RECORD_SIXES>,
        unpack<RECORD_SCALED_4>, unpack<RECORD_SCALED_5>,   unpack<RECORD_SCALED_8>, unpack<RECORD_HALVES>,
    };
    struct pack_args args = pack_args_of(matrix);
    UNPACK[record_layout_of(matrix->type)](device, &args, (__half *)out);
}
