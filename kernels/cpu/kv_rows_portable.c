// Rows on their way into KV pages at level portable: kv_rows_internal.h, compiled for it. Pure functions; any
// thread.
#define KV_ROWS_LEVEL kv_rows_portable
#include "kernels/cpu/kv_rows_internal.h"
