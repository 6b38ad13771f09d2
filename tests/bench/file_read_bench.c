// How fast several threads bring a file from the page cache into memory of their own, by reading and by
// copying from a mapping (whose pages are then let go, as the loader of weights must), with and without
// hashing: what bounds the load of a model before any bus does.
//
//   file_read_bench FILE [MOST_THREADS]
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "common/clock.h"

enum { PIECE = 4 << 20, BITE = 128 << 10, ROW = 2304, MOST_THREADS = 64 };
enum method { READ, COPY, COPY_POPULATED };

static int file;
static size_t length;
static unsigned char *mapped;
static uint32_t n_threads;
static enum method method;
static bool hashes;

struct share {
    pthread_t thread;
    uint32_t index;
    uint64_t sum;
};

static void bring(unsigned char *to, size_t at, size_t bytes)
{
    if (method == READ && pread(file, to, bytes, (off_t)at) != (ssize_t)bytes)
        perror("reading");
    if (method != READ)
        memcpy(to, mapped + at, bytes);
}

static void *take_share(void *argument)
{
    struct share *share = argument;
    unsigned char *piece = malloc(PIECE);
    memset(piece, 1, PIECE);
    for (size_t first = (size_t)share->index * PIECE; first + PIECE <= length;
         first += (size_t)n_threads * PIECE) {
        if (method == COPY_POPULATED)
            madvise(mapped + first, PIECE, MADV_POPULATE_READ);
        for (size_t at = 0; at < PIECE; at += BITE) {
            bring(piece + at, first + at, BITE);
            for (size_t row = 0; hashes && row + ROW <= BITE; row += ROW)
                share->sum += XXH3_64bits(piece + at + row, ROW);
        }
        if (method != READ)
            madvise(mapped + first, PIECE, MADV_DONTNEED);
    }
    free(piece);
    return NULL;
}

static double measure(void)
{
    struct share shares[MOST_THREADS] = {0};
    int64_t begin = clock_now_us();
    for (uint32_t i = 0; i < n_threads; i++) {
        shares[i].index = i;
        pthread_create(&shares[i].thread, NULL, take_share, &shares[i]);
    }
    for (uint32_t i = 0; i < n_threads; i++)
        pthread_join(shares[i].thread, NULL);
    return (double)length / 1e3 / (double)(clock_now_us() - begin);
}

int main(int argc, char **argv)
{
    static const char *const NAMES[] = {"pread", "mapping", "mapping, populated"};
    struct stat info;
    file = argc > 1 ? open(argv[1], O_RDONLY) : -1;
    if (file < 0 || fstat(file, &info) < 0) {
        fprintf(stderr, "file_read_bench FILE [MOST_THREADS]\n");
        return EXIT_FAILURE;
    }
    length = (size_t)info.st_size / PIECE * PIECE;
    mapped = mmap(NULL, length, PROT_READ, MAP_PRIVATE, file, 0);
    if (length == 0 || mapped == MAP_FAILED)
        return EXIT_FAILURE;
    uint32_t most = argc > 2 ? (uint32_t)atoi(argv[2]) : 8;
    n_threads = 1;
    measure(); // into the page cache
    printf("%-20s %8s %10s %10s\n", "GB/s", "threads", "copied", "hashed too");
    for (method = READ; method <= COPY_POPULATED; method++) {
        for (n_threads = 1; n_threads <= most && n_threads <= MOST_THREADS; n_threads *= 2) {
            hashes = false;
            double copied = measure();
            hashes = true;
            printf("%-20s %8u %10.2f %10.2f\n", NAMES[method], n_threads, copied, measure());
        }
    }
    return EXIT_SUCCESS;
}
