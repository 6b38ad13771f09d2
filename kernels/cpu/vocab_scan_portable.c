// The passes over a row of logits at level portable: vocab_scan_internal.h, compiled for it. Pure functions;
// any thread.
#define VOCAB_SCAN_LEVEL vocab_scan_portable
#include "kernels/cpu/vocab_scan_internal.h"
