// Weights from the file to the GPU, faster than one thread can copy. A few threads fill segments of the
// pinned ring with rows of the file (the caller's `read`); the executor's thread hands each segment to the
// copy engine in the order in which it was asked for, and queues the packing of what has arrived. Nothing
// waits at the end of a matrix: its last rows are still being read when the first rows of the next one are
// asked for. So the file is read at the speed of several cores, and the bus and the packing hide behind it.
//
// A piece is some rows of one matrix: queued by the executor's thread, taken and read by a copier, issued to
// the device by the executor's thread. The three counts only grow, and each piece has a segment of its own,
// so a bounded ring of pieces does. The mutex guards the counts and what a copier reports. Copiers never call
// CUDA. They start with the first matrix and sleep when there is nothing to read.
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_internal.h"

enum { COPIERS = 8 };

// A row of the widest matrix fits a segment.
_Static_assert(CUDA_SEGMENT_BYTES >= (size_t)MAX_WIDTH * sizeof(float), "a segment holds a row");

struct load_piece {
    struct matrix_source source;
    uint32_t first, count; // rows to read
    uint32_t segment;
    uint8_t *room;
    void *to; // [device]
    size_t bytes;
    uint32_t packs; // rows to pack once this piece is on the device, from pack_first on; 0: none yet
    uint32_t pack_first;
    const void *staged; // [device]
    struct matrix matrix;
    // Under the mutex, from the copier:
    bool is_read;
    struct error error;
};

struct cuda_load {
    pthread_t copiers[COPIERS];
    uint32_t n_copiers;
    pthread_mutex_t mutex;
    pthread_cond_t work, progress; // something to read; something was read
    struct load_piece pieces[CUDA_SEGMENTS];
    uint64_t queued, taken, issued; // pieces; `issued` is the executor's thread's alone
    bool failed;                    // what is left of this load need not be read
    bool closing;
};

// --- the copiers ---

static void read_piece(const struct load_piece *piece, struct error *error)
{
    int status = piece->source.read(piece->source.context, piece->room, piece->first, piece->count, error);
    if (status && !error->status)
        error_set(error, status, "weights cannot be read");
}

static void *run_copier(void *argument)
{
    struct cuda_load *load = argument;
    pthread_mutex_lock(&load->mutex);
    for (;;) {
        while (!load->closing && load->taken == load->queued)
            pthread_cond_wait(&load->work, &load->mutex);
        if (load->closing)
            break;
        struct load_piece *piece = &load->pieces[load->taken++ % CUDA_SEGMENTS];
        bool skip = load->failed;
        struct error error = {0};
        pthread_mutex_unlock(&load->mutex);
        if (!skip)
            read_piece(piece, &error);
        pthread_mutex_lock(&load->mutex);
        piece->error = error;
        piece->is_read = true;
        load->failed |= error.status != STATUS_OK;
        pthread_cond_signal(&load->progress);
    }
    pthread_mutex_unlock(&load->mutex);
    return NULL;
}

static uint32_t count_cores(void)
{
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? (uint32_t)CPU_COUNT(&cores) : 1;
}

static int open_load(struct cuda_device *device, struct error *error)
{
    struct cuda_load *load = calloc(1, sizeof(*load));
    if (!load)
        return error_set(error, STATUS_NO_MEMORY, "no memory to load weights with");
    pthread_mutex_init(&load->mutex, NULL);
    pthread_cond_init(&load->work, NULL);
    pthread_cond_init(&load->progress, NULL);
    device->load = load;
    uint32_t wanted = count_cores() < COPIERS ? count_cores() : COPIERS;
    while (load->n_copiers < wanted &&
           pthread_create(&load->copiers[load->n_copiers], NULL, run_copier, load) == 0)
        load->n_copiers++;
    if (load->n_copiers > 0)
        return STATUS_OK;
    cuda_load_close(device);
    return error_set(error, STATUS_IO, "cannot start a thread to load weights with");
}

void cuda_load_close(struct cuda_device *device)
{
    struct cuda_load *load = device->load;
    if (!load)
        return;
    pthread_mutex_lock(&load->mutex);
    load->closing = true;
    pthread_cond_broadcast(&load->work);
    pthread_mutex_unlock(&load->mutex);
    for (uint32_t i = 0; i < load->n_copiers; i++)
        pthread_join(load->copiers[i], NULL);
    pthread_cond_destroy(&load->progress);
    pthread_cond_destroy(&load->work);
    pthread_mutex_destroy(&load->mutex);
    free(load);
    device->load = NULL;
}

// --- to the device, in order ---

static void queue_on_device(struct cuda_device *device, const struct load_piece *piece)
{
    cudaError_t code =
        cudaMemcpyAsync(piece->to, piece->room, piece->bytes, cudaMemcpyHostToDevice, device->stream);
    if (cuda_failed(device, code, "uploading weights"))
        return;
    cuda_segment_used(device, piece->segment);
    if (piece->packs)
        cuda_pack_rows(device, &piece->matrix, piece->staged, piece->pack_first, piece->packs);
}

// Waits until the oldest piece was read. After a failure nothing goes to the device any more.
static void issue_oldest(struct cuda_device *device)
{
    struct cuda_load *load = device->load;
    struct load_piece *piece = &load->pieces[load->issued % CUDA_SEGMENTS];
    pthread_mutex_lock(&load->mutex);
    while (!piece->is_read)
        pthread_cond_wait(&load->progress, &load->mutex);
    bool failed = load->failed;
    load->issued++;
    if (load->issued == load->queued)
        load->failed = false;
    pthread_mutex_unlock(&load->mutex);
    if (piece->error.status)
        cuda_fault(device, piece->error.status, piece->error.text);
    else if (!failed && !device->fault.status)
        queue_on_device(device, piece);
}

static bool oldest_is_read(struct cuda_load *load)
{
    pthread_mutex_lock(&load->mutex);
    bool is_read = load->issued < load->queued && load->pieces[load->issued % CUDA_SEGMENTS].is_read;
    pthread_mutex_unlock(&load->mutex);
    return is_read;
}

void cuda_load_drain(struct cuda_device *device)
{
    struct cuda_load *load = device->load;
    while (load && load->issued < load->queued)
        issue_oldest(device);
}

void cuda_load_leave_segment(struct cuda_device *device, uint32_t segment)
{
    struct cuda_load *load = device->load;
    for (uint64_t i = load ? load->issued : 0; load && i < load->queued; i++) {
        while (load->issued <= i && load->pieces[i % CUDA_SEGMENTS].segment == segment)
            issue_oldest(device);
    }
}

// --- the op ---

// The pieces in flight are fewer than the segments: the ring sees to it before it lends a segment twice.
static bool queue_piece(struct cuda_device *device, const struct load_piece *wanted)
{
    struct cuda_load *load = device->load;
    struct load_piece piece = *wanted;
    piece.room = cuda_segment_take(device, &piece.segment);
    if (!piece.room)
        return false;
    pthread_mutex_lock(&load->mutex);
    load->pieces[load->queued++ % CUDA_SEGMENTS] = piece;
    pthread_cond_signal(&load->work);
    pthread_mutex_unlock(&load->mutex);
    while (oldest_is_read(load))
        issue_oldest(device);
    return true;
}

// Rows [first, first + count) of the matrix to `to`, and then, unless it is a table, packed from there.
static bool load_rows(struct cuda_device *device, const struct matrix *matrix,
                      const struct matrix_source *source, uint32_t first, uint32_t count, uint8_t *to)
{
    size_t row_bytes = tensor_type_bytes(matrix->type, matrix->width, 1);
    uint32_t most = (uint32_t)(CUDA_SEGMENT_BYTES / row_bytes);
    for (uint32_t row = 0; row < count; row += most) {
        uint32_t some = count - row < most ? count - row : most;
        bool packs = !matrix->table && row + some == count;
        struct load_piece piece = {.source = *source,
                                   .first = first + row,
                                   .count = some,
                                   .to = to + row * row_bytes,
                                   .bytes = some * row_bytes,
                                   .packs = packs ? count : 0,
                                   .pack_first = first,
                                   .staged = to,
                                   .matrix = *matrix};
        if (!queue_piece(device, &piece))
            return false;
    }
    return true;
}

int cuda_matrix_load(struct device *base, const struct matrix *matrix, const struct matrix_source *source,
                     struct error *error)
{
    struct cuda_device *device = cuda_device_of(base);
    int status = device->load ? STATUS_OK : open_load(device, error);
    if (status)
        return status;
    size_t row_bytes = tensor_type_bytes(matrix->type, matrix->width, 1);
    if (row_bytes > CUDA_SEGMENT_BYTES)
        return error_set(error, STATUS_UNSUPPORTED, "rows of %u weights are too wide", matrix->width);
    cuda_enter(device);
    uint32_t group =
        matrix->table ? matrix->rows : cuda_pack_group(matrix->type, matrix->rows, matrix->width);
    uint8_t *staged = matrix->table ? matrix->data : cuda_scratch(device, group * row_bytes);
    for (uint64_t row = 0; staged && !device->fault.status && row < matrix->rows; row += group) {
        uint32_t some = matrix->rows - row < group ? (uint32_t)(matrix->rows - row) : group;
        if (!load_rows(device, matrix, source, (uint32_t)row, some, staged))
            break;
    }
    return device->fault.status ? cuda_sync(base, error) : STATUS_OK; // of this matrix or one before it
}
