// Attention over paged KV. The class of a row alone decides which kernel computes it: generated tokens take
// the decode kernel, prompt tokens the prompt kernel. Each kernel takes a row's positions in blocks that
// begin at fixed absolute positions, in ascending order or put together in ascending order, and blocks of
// which a row sees nothing change nothing of it: so its bits depend on nothing but its inputs.
//
// In both the queries are scaled and rounded to halves, the weights of positions (at most 1) too; sums and
// the running maximum are f32.
//
// Queued by the executor's thread; owns no memory.
#include "kernels/cuda/cuda_attention.cuh"

size_t cuda_attention_scratch_bytes(uint32_t n_heads, uint32_t head_size, uint32_t rows, uint32_t pages)
{
    return cuda_attention_decode_scratch(n_heads, head_size, rows, pages);
}

void cuda_attention(struct device *device, struct activation *out, const float *q, uint32_t q_stride,
                    const struct attention_shape *shape, const struct kv_layer *kv, const struct batch *batch)
{
    struct cuda_device *cuda = cuda_device_of(device);
    out->unit = 1;
    out->n_generated = batch->n_generated;
    if (((uintptr_t)q | q_stride * sizeof(float)) % 16) {
        cuda_fault(cuda, STATUS_INTERNAL, "attention wants rows of q at multiples of 16 bytes");
        return;
    }
    attention_args args = {};
    args.q = q;
    args.q_stride = q_stride;
    args.q_scale = shape->scale * 1.44269504088896340736f;
    args.n_heads = shape->n_heads;
    args.n_kv_heads = shape->n_kv_heads;
    args.head_size = shape->head_size;
    args.window = shape->window;
    args.pages = (const unsigned char *)kv->data;
    args.page_bytes = kv->page_bytes;
    args.positions = batch->positions;
    args.slots = batch->slots;
    args.page_tables = batch->page_tables;
    args.spans = batch->spans;
    args.table_stride = batch->table_stride;
    args.n_spans = batch->n_spans;
    args.n_generated = batch->n_generated;
    args.n_tokens = batch->n_tokens;
    args.out = activation_view_of(out);
    if (batch->n_generated)
        cuda_attention_decode(cuda, args);
    if (batch->n_tokens > batch->n_generated)
        cuda_attention_prompt(cuda, args);
}
