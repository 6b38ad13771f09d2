// KV pages, one block of device memory a layer. Allocated once for an epoch; on the device's thread, which
// owns it.
#include "worker/kv_cache.h"

#include <stdlib.h>

struct kv_cache {
    struct device *device;
    const struct kernel_ops *ops;
    uint32_t n_layers;
    struct kv_layer layers[];
};

static size_t page_bytes(const struct device *device, const struct model_spec *spec)
{
    return device_ops(device)->kv_page_bytes(device, spec->n_kv_heads, spec->head_size);
}

int kv_cache_plan(const struct device *device, const struct model_spec *spec, uint32_t n_layers,
                  uint32_t n_pages, uint64_t *bytes, struct error *error)
{
    size_t layer = page_bytes(device, spec) * n_pages;
    *bytes = (uint64_t)device_ops(device)->alloc_bytes(device, layer) * n_layers;
    if (page_bytes(device, spec) == 0)
        return error_set(error, STATUS_UNSUPPORTED,
                         "the model's attention heads have size %u, for which %s has no kernels",
                         spec->head_size, device_describe(device));
    return STATUS_OK;
}

int kv_cache_new(struct kv_cache **out, struct device *device, const struct model_spec *spec,
                 uint32_t n_layers, uint32_t n_pages, struct error *error)
{
    uint64_t bytes;
    int status = kv_cache_plan(device, spec, n_layers, n_pages, &bytes, error);
    if (status)
        return status;
    struct kv_cache *kv = calloc(1, sizeof(*kv) + n_layers * sizeof(kv->layers[0]));
    if (!kv)
        return error_set(error, STATUS_NO_MEMORY, "no memory for the KV cache of %u layers", n_layers);
    kv->device = device;
    kv->ops = device_ops(device);
    kv->n_layers = n_layers;
    for (uint32_t i = 0; i < n_layers; i++) {
        kv->layers[i].page_bytes = page_bytes(device, spec);
        kv->layers[i].data = kv->ops->alloc(device, kv->layers[i].page_bytes * n_pages);
        if (!kv->layers[i].data) {
            kv_cache_free(kv);
            return error_set(error, STATUS_NO_MEMORY,
                             "the device has no room for %u KV pages on %u layers (%.1f MB)", n_pages,
                             n_layers, (double)bytes / 1e6);
        }
    }
    *out = kv;
    return STATUS_OK;
}

void kv_cache_free(struct kv_cache *kv)
{
    if (!kv)
        return;
    for (uint32_t i = 0; i < kv->n_layers; i++) {
        if (kv->layers[i].data)
            kv->ops->free(kv->device, kv->layers[i].data);
    }
    free(kv);
}

const struct kv_layer *kv_cache_layer(const struct kv_cache *kv, uint32_t layer)
{
    return &kv->layers[layer];
}

void kv_cache_copy_page(struct kv_cache *kv, uint32_t from, uint32_t to)
{
    for (uint32_t i = 0; i < kv->n_layers; i++) {
        char *pages = kv->layers[i].data;
        size_t bytes = kv->layers[i].page_bytes;
        kv->ops->copy(kv->device, pages + to * bytes, pages + from * bytes, bytes);
    }
}
