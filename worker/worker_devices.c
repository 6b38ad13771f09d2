// The list of devices, for people and for `strata serve`, which may not include kernels and asks us. Each
// device is opened for a moment, because only then its free memory is known and whether it works. One thread.
#include "worker/worker_devices.h"

#include <inttypes.h>
#include <stdio.h>

#include "kernels/device.h"

// A description is a name that the maker of a device chose.
static void print_quoted(const char *text)
{
    putchar('"');
    for (; *text; text++)
        putchar(*text == '"' || *text == '\\' || (unsigned char)*text < 32 ? '?' : *text);
    putchar('"');
}

static int list_device(const char *backend, uint32_t index, bool json, bool first)
{
    struct device_options options = {.backend = backend, .index = index, .threads = 1};
    struct device *device;
    struct error error = {0};
    int status = device_open(&device, &options, &error);
    if (status) {
        fprintf(stderr, "strata-worker: %s\n", error.text);
        return status;
    }
    uint64_t memory = device_memory_free(device);
    if (json) {
        printf("%s\n {\"backend\": \"%s\", \"index\": %u, \"memory_free\": %" PRIu64 ", \"device\": ",
               first ? "" : ",", backend, index, memory);
        print_quoted(device_describe(device));
        putchar('}');
    } else {
        printf("%s %u %" PRIu64 " %s\n", backend, index, memory, device_describe(device));
    }
    device_close(device);
    return STATUS_OK;
}

int worker_list_devices(bool json)
{
    static const char *const BACKENDS[] = {"cuda", "cpu"};
    int status = STATUS_UNSUPPORTED;
    if (json)
        putchar('[');
    for (int b = 0; b < 2; b++) {
        for (uint32_t i = 0; i < device_count(BACKENDS[b]); i++) {
            if (list_device(BACKENDS[b], i, json, status != STATUS_OK) == STATUS_OK)
                status = STATUS_OK;
        }
    }
    if (json)
        puts("]");
    return status;
}
