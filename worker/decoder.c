// The decoder. A layer reads: norm, q k v, attention, output projection onto the residual, norm, FFN onto the
// residual. What a family does otherwise (fused q k v, biases, head norms, LayerNorm, gates) is a field that
// is set or NULL, so that the pass itself has no families in it. Runs on the device's thread; owns its table
// of rope frequencies and its copies of the weights' handles, while the cache owns their bytes.
#include "worker/decoder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

struct norm_weights {
    const float *weight, *bias; // bias NULL: none
};
struct projection {
    const struct matrix *weight; // NULL: the layer has none
    const float *bias;
};
struct layer_weights {
    struct norm_weights attn_norm, ffn_norm;
    struct projection qkv;     // fused, or
    struct projection q, k, v; // separate
    struct projection output, gate, up, down;
    const float *q_norm, *k_norm;
    unsigned attn_forms, output_forms, ffn_forms, down_forms; // of the activations the matrices read
};

struct decoder {
    struct device *device;
    const struct kernel_ops *ops;
    struct model_spec spec;
    uint32_t first_layer, n_layers;
    const struct matrix *embedding, *learned_positions; // first stage
    struct norm_weights head_norm;                      // last stage
    struct projection head;
    float *rope_frequency; // [device] [rope_dims / 2], NULL for learned positions
    struct attention_shape shape;
    struct layer_weights layers[];
};

// --- resolving the weights ---

struct resolver {
    const struct weight_cache *weights;
    struct error *error;
    int status;
    char prefix[24]; // "layer.3."
};

static int missing(struct resolver *resolver, const char *name)
{
    if (!resolver->status)
        resolver->status = error_set(
            resolver->error, STATUS_NOT_FOUND,
            "weight %s is not in the cache: a stage's weights are pre-cached before its first step", name);
    return resolver->status;
}

static const struct matrix *need_matrix(struct resolver *resolver, const char *part)
{
    char name[WEIGHT_NAME_BYTES];
    snprintf(name, sizeof(name), "%s%s.weight", resolver->prefix, part);
    const struct matrix *matrix = weight_cache_matrix(resolver->weights, name);
    if (!matrix)
        missing(resolver, name);
    return matrix;
}

static const float *need_vector(struct resolver *resolver, const char *part, const char *ending,
                                uint32_t length, bool wanted)
{
    char name[WEIGHT_NAME_BYTES];
    snprintf(name, sizeof(name), "%s%s.%s", resolver->prefix, part, ending);
    const float *vector = wanted ? weight_cache_vector(resolver->weights, name, length) : NULL;
    if (wanted && !vector)
        missing(resolver, name);
    return vector;
}

static struct projection need_projection(struct resolver *resolver, const char *part, bool bias)
{
    struct projection projection = {.weight = need_matrix(resolver, part)};
    if (projection.weight)
        projection.bias = need_vector(resolver, part, "bias", projection.weight->rows, bias);
    return projection;
}

static struct norm_weights need_norm(struct resolver *resolver, const struct model_spec *spec,
                                     const char *part)
{
    return (struct norm_weights){
        need_vector(resolver, part, "weight", spec->width, true),
        need_vector(resolver, part, "bias", spec->width, spec->norm == NORM_LAYER),
    };
}

static unsigned forms_of(const struct decoder *decoder, const struct projection *projection)
{
    return projection->weight ? decoder->ops->matrix_forms(decoder->device, projection->weight->type) : 0;
}

static void resolve_layer(struct decoder *decoder, struct layer_weights *layer, struct resolver *resolver)
{
    const struct model_spec *spec = &decoder->spec;
    layer->attn_norm = need_norm(resolver, spec, "attn_norm");
    if (spec->fused_qkv) {
        layer->qkv = need_projection(resolver, "attn_qkv", spec->attn_bias);
    } else {
        layer->q = need_projection(resolver, "attn_q", spec->attn_bias);
        layer->k = need_projection(resolver, "attn_k", spec->attn_bias);
        layer->v = need_projection(resolver, "attn_v", spec->attn_bias);
    }
    layer->q_norm = need_vector(resolver, "attn_q_norm", "weight", spec->head_size, spec->qk_norm);
    layer->k_norm = need_vector(resolver, "attn_k_norm", "weight", spec->head_size, spec->qk_norm);
    layer->output = need_projection(resolver, "attn_output", spec->output_bias);
    layer->ffn_norm = need_norm(resolver, spec, "ffn_norm");
    if (spec->ffn == FFN_GATED)
        layer->gate = need_projection(resolver, "ffn_gate", spec->ffn_bias);
    layer->up = need_projection(resolver, "ffn_up", spec->ffn_bias);
    layer->down = need_projection(resolver, "ffn_down", spec->ffn_bias);
    layer->attn_forms = forms_of(decoder, &layer->qkv) | forms_of(decoder, &layer->q) |
                        forms_of(decoder, &layer->k) | forms_of(decoder, &layer->v);
    layer->output_forms = forms_of(decoder, &layer->output);
    layer->ffn_forms = forms_of(decoder, &layer->gate) | forms_of(decoder, &layer->up);
    layer->down_forms = forms_of(decoder, &layer->down);
}

// Radians per position of each rotated pair: base^(-2i/dims), over the linear scale and the model's factors.
static int make_rope(struct decoder *decoder, struct resolver *resolver)
{
    const struct model_spec *spec = &decoder->spec;
    uint32_t half = spec->rope_dims / 2;
    if (spec->position == POSITION_LEARNED || half == 0)
        return STATUS_OK;
    const float *factors = need_vector(resolver, "rope_freqs", "weight", half, spec->rope_factors);
    float *host = calloc(half, sizeof(*host));
    decoder->rope_frequency = decoder->ops->alloc(decoder->device, half * sizeof(float));
    if (!host || !decoder->rope_frequency) {
        free(host);
        return error_set(resolver->error, STATUS_NO_MEMORY, "no memory for the table of rope frequencies");
    }
    if (factors)
        decoder->ops->download(decoder->device, host, factors, half * sizeof(float));
    for (uint32_t i = 0; i < half; i++) {
        double frequency = pow(spec->rope_base, -2.0 * i / spec->rope_dims) / spec->rope_scale;
        host[i] = (float)(factors ? frequency / host[i] : frequency);
    }
    decoder->ops->upload(decoder->device, decoder->rope_frequency, host, half * sizeof(float));
    int status = decoder->ops->sync(decoder->device, resolver->error);
    free(host);
    return status;
}

static int resolve(struct decoder *decoder, const struct weight_cache *weights, struct error *error)
{
    const struct model_spec *spec = &decoder->spec;
    struct resolver resolver = {.weights = weights, .error = error};
    if (decoder->first_layer == 0) {
        decoder->embedding = need_matrix(&resolver, "token_embd");
        if (spec->position == POSITION_LEARNED)
            decoder->learned_positions = need_matrix(&resolver, "position_embd");
    }
    if (decoder->first_layer + decoder->n_layers == spec->n_layers) {
        decoder->head_norm = need_norm(&resolver, spec, "output_norm");
        decoder->head = need_projection(&resolver, "output", false);
    }
    int status = make_rope(decoder, &resolver);
    for (uint32_t i = 0; i < decoder->n_layers; i++) {
        snprintf(resolver.prefix, sizeof(resolver.prefix), "layer.%u.", decoder->first_layer + i);
        resolve_layer(decoder, &decoder->layers[i], &resolver);
    }
    return status ? status : resolver.status;
}

int decoder_new(struct decoder **out, struct device *device, const struct model_spec *spec,
                const struct weight_cache *weights, uint32_t first_layer, uint32_t n_layers,
                struct error *error)
{
    struct decoder *decoder = calloc(1, sizeof(*decoder) + n_layers * sizeof(decoder->layers[0]));
    if (!decoder)
        return error_set(error, STATUS_NO_MEMORY, "no memory for a decoder of %u layers", n_layers);
    decoder->device = device;
    decoder->ops = device_ops(device);
    decoder->spec = *spec;
    decoder->first_layer = first_layer;
    decoder->n_layers = n_layers;
    decoder->shape = (struct attention_shape){.n_heads = spec->n_heads,
                                              .n_kv_heads = spec->n_kv_heads,
                                              .head_size = spec->head_size,
                                              .window = spec->window,
                                              .scale = (float)(1.0 / sqrt(spec->head_size))};
    int status = resolve(decoder, weights, error);
    if (status) {
        decoder_free(decoder);
        return status;
    }
    *out = decoder;
    return STATUS_OK;
}

void decoder_free(struct decoder *decoder)
{
    if (!decoder)
        return;
    if (decoder->rope_frequency)
        decoder->ops->free(decoder->device, decoder->rope_frequency);
    free(decoder);
}

uint32_t decoder_vocabulary(const struct decoder *decoder)
{
    return decoder->spec.vocab_size;
}

// --- the parts ---

// An activation in only the forms that its readers want, its first rows of generated tokens.
static struct activation in_forms(const struct activation *whole, unsigned forms, uint32_t n_generated)
{
    struct activation part = *whole;
    part.forms = forms;
    part.n_generated = n_generated;
    return part;
}

static struct row_norm norm_of(const struct decoder *decoder, const float *x, const struct norm_weights *norm)
{
    return (struct row_norm){x, decoder->spec.norm, norm->weight, norm->bias, decoder->spec.norm_epsilon};
}

// Queries, ready for attention, in ws->qkv; k and v of the batch join the pages.
static void project_qkv(const struct decoder *decoder, struct workspace *ws,
                        const struct layer_weights *layer, const struct kv_layer *kv,
                        const struct batch *batch)
{
    uint32_t q_width = decoder->shape.n_heads * decoder->shape.head_size;
    uint32_t k_width = decoder->shape.n_kv_heads * decoder->shape.head_size;
    uint32_t stride = ws->qkv_stride;
    struct activation x = in_forms(&ws->normed, layer->attn_forms, batch->n_generated);
    struct row_norm norm = norm_of(decoder, ws->residual, &layer->attn_norm);
    struct matmul_part fused = {layer->qkv.weight, layer->qkv.bias, ws->qkv, stride, false};
    struct matmul_part separate[] = {
        {layer->q.weight, layer->q.bias, ws->qkv, stride, false},
        {layer->k.weight, layer->k.bias, ws->qkv + q_width, stride, false},
        {layer->v.weight, layer->v.bias, ws->qkv + q_width + k_width, stride, false},
    };
    struct qkv_args qkv = {.q = ws->qkv,
                           .k = ws->qkv + q_width,
                           .v = ws->qkv + q_width + k_width,
                           .q_stride = stride,
                           .k_stride = stride,
                           .v_stride = stride,
                           .q_norm = layer->q_norm,
                           .k_norm = layer->k_norm,
                           .norm_epsilon = decoder->spec.norm_epsilon,
                           .position = decoder->spec.position,
                           .rope_dims = decoder->spec.rope_dims,
                           .rope_frequency = decoder->rope_frequency};
    bool one = layer->qkv.weight != NULL;
    decoder->ops->project_qkv(decoder->device, &x, &norm, one ? &fused : separate, one ? 1 : 3, &qkv,
                              &decoder->shape, kv, batch);
}

// Attention's output for the whole batch, in `attended`.
static void attend(const struct decoder *decoder, struct workspace *ws, const struct layer_weights *layer,
                   const struct kv_layer *kv, const struct batch *batch, struct activation *attended)
{
    project_qkv(decoder, ws, layer, kv, batch);
    decoder->ops->attention(decoder->device, attended, ws->qkv, ws->qkv_stride, &decoder->shape, kv, batch);
}

static void add_to_residual(const struct decoder *decoder, struct workspace *ws,
                            const struct projection *projection, const struct activation *x, uint32_t rows)
{
    struct matmul_part onto = {projection->weight, projection->bias, ws->residual, decoder->spec.width, true};
    decoder->ops->matmul(decoder->device, x, rows, &onto, 1);
}

static void feed_forward(const struct decoder *decoder, struct workspace *ws,
                         const struct layer_weights *layer, uint32_t rows, uint32_t n_generated)
{
    const struct model_spec *spec = &decoder->spec;
    struct activation x = in_forms(&ws->normed, layer->ffn_forms, n_generated);
    struct row_norm norm = norm_of(decoder, ws->residual, &layer->ffn_norm);
    float *gate = spec->ffn == FFN_PLAIN ? NULL : ws->ffn;
    float *up = gate ? ws->ffn + spec->ffn_width : ws->ffn;
    struct matmul_part parts[2];
    uint32_t n_parts = 0;
    if (layer->gate.weight)
        parts[n_parts++] =
            (struct matmul_part){layer->gate.weight, layer->gate.bias, gate, ws->ffn_stride, false};
    // A fused matrix writes gate and up in one go.
    float *up_out = spec->ffn == FFN_GATED_FUSED ? gate : up;
    parts[n_parts++] = (struct matmul_part){layer->up.weight, layer->up.bias, up_out, ws->ffn_stride, false};
    struct activation inner = in_forms(&ws->activated, layer->down_forms, n_generated);
    bool gated = n_parts == 2;
    decoder->ops->project(decoder->device, &x, rows, &norm, parts, n_parts, gated ? &inner : NULL);
    if (!gated)
        decoder->ops->ffn_activate(decoder->device, &inner, gate, up, ws->ffn_stride, rows);
    add_to_residual(decoder, ws, &layer->down, &inner, rows);
}

// --- the pass ---

void decoder_embed(const struct decoder *decoder, struct workspace *ws, const struct batch *batch)
{
    decoder->ops->embed(decoder->device, ws->residual, decoder->embedding, decoder->learned_positions, batch);
}

static void whole_layer(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                        const struct batch *batch, uint32_t index)
{
    const struct layer_weights *layer = &decoder->layers[index];
    struct activation attended = in_forms(&ws->attended, layer->output_forms, batch->n_generated);
    attend(decoder, ws, layer, kv_cache_layer(kv, index), batch, &attended);
    add_to_residual(decoder, ws, &layer->output, &attended, batch->n_tokens);
    feed_forward(decoder, ws, layer, batch->n_tokens, batch->n_generated);
}

void decoder_some_layers(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                         const struct batch *batch, uint32_t first, uint32_t count)
{
    for (uint32_t i = first; i < first + count; i++)
        whole_layer(decoder, ws, kv, batch, i);
}

void decoder_layers(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                    const struct batch *batch)
{
    decoder_some_layers(decoder, ws, kv, batch, 0, decoder->n_layers);
}

// Moves the wanted rows of the residual to its front.
static void gather(const struct decoder *decoder, struct workspace *ws, const struct head_rows *head)
{
    size_t width = decoder->spec.width;
    for (uint32_t i = 0; head->tokens && i < head->count; i++) {
        if (head->tokens[i] != i)
            decoder->ops->copy(decoder->device, ws->residual + i * width,
                               ws->residual + head->tokens[i] * width, width * sizeof(float));
    }
}

void decoder_last_layers(const struct decoder *decoder, struct workspace *ws, const struct kv_cache *kv,
                         const struct batch *batch, const struct head_rows *head)
{
    uint32_t last = decoder->n_layers - 1;
    for (uint32_t i = 0; i < last; i++)
        whole_layer(decoder, ws, kv, batch, i);
    const struct layer_weights *layer = &decoder->layers[last];
    struct activation attended = in_forms(&ws->attended, layer->output_forms, batch->n_generated);
    attend(decoder, ws, layer, kv_cache_layer(kv, last), batch, &attended);
    if (head->count == 0)
        return;
    add_to_residual(decoder, ws, &layer->output, &attended, batch->n_tokens);
    gather(decoder, ws, head);
    feed_forward(decoder, ws, layer, head->count, head->n_generated);
}

void decoder_head(const struct decoder *decoder, struct workspace *ws, uint32_t first, uint32_t count)
{
    size_t width = decoder->spec.width;
    struct activation x = in_forms(&ws->normed, forms_of(decoder, &decoder->head), count);
    struct row_norm norm = norm_of(decoder, ws->residual + first * width, &decoder->head_norm);
    struct matmul_part logits = {decoder->head.weight, NULL, ws->logits, decoder->spec.vocab_size, false};
    decoder->ops->project(decoder->device, &x, count, &norm, &logits, 1, NULL);
}
