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
// `count` of them, from the stage's `first` on.
void decoder_some_layers(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                         const struct batch *batch, uint32_t first, uint32_t count);
// The rows of a step that somebody will look at: their tokens' indices in the batch, ascending.
struct head_rows {
    const uint32_t *tokens; // host memory; NULL: the first `count` of the batch
    uint32_t count;
    uint32_t n_generated; // of them, the first
};
// The last stage's layers: afterwards the first rows of the residual are those of `head`, the others are
// lost: what nobody will look at is not computed to the end.
void decoder_last_layers(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                         const struct batch *batch, const struct head_rows *head);
// Last stage: logits[i] = head of residual row first + i, i < count <= ws->head_rows. Computed as for
// generated tokens, whatever the rows are of: the head's rows are few.
void decoder_head(const struct decoder *decoder, struct workspace *ws, uint32_t first, uint32_t count);

#endif
