// One op table a level. A level that has no version of its own of an op names the next lower one's.
#include "kernels/cpu/cpu_internal.h"

// What does not depend on the level, or sees to it itself.
#define COMMON_OPS                                                                                           \
    .alloc = cpu_alloc, .alloc_bytes = cpu_alloc_bytes, .free = cpu_free, .upload = cpu_upload,              \
    .download = cpu_download, .copy = cpu_copy, .sync = cpu_sync, .alloc_host = cpu_alloc_host,              \
    .free_host = cpu_free_host, .fetch = cpu_download, .mark = cpu_mark, .reached = cpu_reached,             \
    .replay = cpu_replay, .record = cpu_record, .record_end = cpu_record_end, .forget = cpu_record_end,      \
    .feed = cpu_feed, .store = cpu_store, .project = kernel_project, .project_qkv = kernel_project_qkv,      \
    .sampler_bytes = cpu_sampler_bytes, .matrix_bytes = cpu_matrix_bytes, .matrix_pack = cpu_matrix_pack,    \
    .matrix_forms = cpu_matrix_forms, .activation_bytes = cpu_activation_bytes,                              \
    .kv_page_bytes = cpu_kv_page_bytes, .embed = cpu_embed, .attn_prepare = cpu_attn_prepare,                \
    .attention = cpu_attention, .sampler_new = cpu_sampler_new, .sampler_free = cpu_sampler_free,            \
    .sampler_open = cpu_sampler_open, .sampler_close = cpu_sampler_close, .stamp = cpu_stamp,                \
    .stamp_us = cpu_stamp_us, .sample = cpu_sample, .score = cpu_score, .scratch_bytes = cpu_scratch_bytes,  \
    .reserve = cpu_reserve

static const struct kernel_ops PORTABLE = {
    .name = "portable",
    COMMON_OPS,
    .norm = cpu_norm_portable,
    .matmul = cpu_matmul_portable,
    .ffn_activate = cpu_ffn_activate_portable,
};

static const struct kernel_ops AVX2 = {
    .name = "avx2",
    COMMON_OPS,
    .norm = cpu_norm_avx2,
    .matmul = cpu_matmul_avx2,
    .ffn_activate = cpu_ffn_activate_avx2,
};

static const struct kernel_ops AVX512 = {
    .name = "avx512",
    COMMON_OPS,
    .norm = cpu_norm_avx512,
    .matmul = cpu_matmul_avx512,
    .ffn_activate = cpu_ffn_activate_avx512,
};

const struct kernel_ops *cpu_ops_of_level(uint32_t level)
{
    return level == LEVEL_AVX512 ? &AVX512 : level == LEVEL_AVX2 ? &AVX2 : &PORTABLE;
}
