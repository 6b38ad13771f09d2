// The forward pass of a stage's layers, put together from the parts that the model's spec names. Computes on
// a workspace: the executor fills in the batch, the decoder leaves the residual or logits. Resolves every
// weight once, when it is made. Belongs to the device's thread.
#ifndef STRATA_DECODER_H
#define STRATA_DECODER_H

#include <stdint.h>

#include "common/model_spec.h"
#include "common/status.h"
#include "kernels/kernels.h"
#include "worker/kv_cache.h"
#include "worker/weight_cache.h"
#include "worker/workspace.h"

struct decoder;

// STATUS_NOT_FOUND names a weight that is not in the cache: weight_cache_precache comes before the first
// step.
int decoder_new(struct decoder **out, struct device *device, const struct model_spec *spec,
                const struct weight_cache *weights, uint32_t first_layer, uint32_t n_layers,
                struct error *error);
void decoder_free(struct decoder *decoder);
uint32_t decoder_vocabulary(const struct decoder *decoder);

// First stage: residual = embedding of the batch's tokens.
void decoder_embed(const struct decoder *decoder, struct workspace *ws, const struct batch *batch);
// The stage's layers, residual in place.
void decoder_layers(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                    const struct batch *batch);
// The last stage's layers: afterwards the first n_head rows of the residual are those of the ascending token
// indices `head` (host memory), the others are lost: what nobody will look at is not computed to the end.
void decoder_last_layers(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                         const struct batch *batch, const uint32_t *head, uint32_t n_head);
// Last stage: logits[i] = head of residual row first + i, i < count <= ws->head_rows.
void decoder_head(const struct decoder *decoder, struct workspace *ws, uint32_t first, uint32_t count);

#endif
