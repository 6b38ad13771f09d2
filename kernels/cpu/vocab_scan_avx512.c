// The passes over a row of logits at level avx512: vocab_scan_internal.h, compiled for it. Pure functions;
// any thread.
#define VOCAB_SCAN_LEVEL vocab_scan_avx512
#include "kernels/cpu/vocab_scan_internal.h"
