// Rows on their way into KV pages at level avx512: kv_rows_internal.h, compiled for it. Pure functions; any
// thread.
#define KV_ROWS_LEVEL kv_rows_avx512
#include "kernels/cpu/kv_rows_internal.h"
