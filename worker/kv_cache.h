// The bytes behind page numbers: for every layer of the stage, the same pages. A page id means the same thing
// on every layer and every stage; who may use which page is the coordinator's business. Belongs to the
// device's thread.
#ifndef STRATA_KV_CACHE_H
#define STRATA_KV_CACHE_H

#include <stdint.h>

#include "common/model_spec.h"
#include "common/status.h"
#include "kernels/kernels.h"

struct kv_cache;

// STATUS_UNSUPPORTED when the device has no kernels for heads of this model's size.
int kv_cache_plan(const struct device *device, const struct model_spec *spec, uint32_t n_layers,
                  uint32_t n_pages, uint64_t *bytes, struct error *error);
int kv_cache_new(struct kv_cache **out, struct device *device, const struct model_spec *spec,
                 uint32_t n_layers, uint32_t n_pages, struct error *error);
void kv_cache_free(struct kv_cache *kv);

const struct kv_layer *kv_cache_layer(const struct kv_cache *kv, uint32_t layer); // of the stage, from 0
void kv_cache_copy_page(struct kv_cache *kv, uint32_t from, uint32_t to);         // on every layer

#endif
