// Opens the backend a worker asks for, and passes the questions about a device on to it. Constants only; any
// thread, except that a device belongs to the thread that opened it.
#include "kernels/device_internal.h"

#include <string.h>

static const struct device_backend *const BACKENDS[] = {
    &cpu_backend,
#ifdef STRATA_HAVE_CUDA
    &cuda_backend,
#endif
};

const char *device_backend(const char *name)
{
    if (!name)
        return "cpu";
    if (strcmp(name, "auto") != 0)
        return name;
    return device_count("cuda") > 0 ? "cuda" : "cpu";
}

static const struct device_backend *find_backend(const char *name)
{
    name = device_backend(name);
    for (size_t i = 0; i < sizeof(BACKENDS) / sizeof(BACKENDS[0]); i++)
        if (!strcmp(BACKENDS[i]->name, name))
            return BACKENDS[i];
    return NULL;
}

int device_open(struct device **out, const struct device_options *options, struct error *error)
{
    const struct device_backend *backend = find_backend(options->backend);
    if (backend)
        return backend->open(out, options, error);
    if (!strcmp(options->backend, "cuda"))
        return error_set(error, STATUS_UNSUPPORTED, "this build of Strata has no CUDA backend; use \"cpu\"");
    return error_set(error, STATUS_UNSUPPORTED,
                     "there is no backend \"%.64s\"; use \"cpu\", \"cuda\" or \"auto\"", options->backend);
}

void device_close(struct device *device)
{
    if (device)
        device->backend->close(device);
}

const struct kernel_ops *device_ops(const struct device *device)
{
    return device->ops;
}

uint32_t device_level(const struct device *device)
{
    return device->backend->level(device);
}

const char *device_describe(const struct device *device)
{
    return device->backend->describe(device);
}

uint64_t device_memory_free(const struct device *device)
{
    return device->backend->memory_free(device);
}

bool device_broken(const struct device *device)
{
    return device->backend->broken && device->backend->broken(device);
}

void *device_stream(const struct device *device)
{
    return device->backend->stream(device);
}

uint32_t device_count(const char *backend)
{
    const struct device_backend *found = find_backend(backend);
    return found ? found->count() : 0;
}

uint32_t device_best_level(const char *backend, uint32_t index)
{
    const struct device_backend *found = find_backend(backend);
    return found ? found->best_level(index) : 0;
}

const char *device_level_name(uint32_t level)
{
    switch (level) {
    case LEVEL_PORTABLE:
        return "portable";
    case LEVEL_AVX2:
        return "avx2";
    case LEVEL_AVX512:
        return "avx512";
    case LEVEL_CUDA:
        return "cuda";
    default:
        return "unknown";
    }
}
