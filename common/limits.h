// Hard maxima. Every queue, message, batch and table is bounded by one of these, and by a configured value
// that may be smaller. A sentence that refuses something names the number.
#ifndef STRATA_LIMITS_H
#define STRATA_LIMITS_H

enum {
    KV_PAGE_POSITIONS = 64,    // positions in one KV page, on every device
    MAX_STAGES = 64,           // workers in a pool
    MAX_SLOTS = 1024,          // sequences open at once (a choice is a sequence)
    MAX_STEP_ROWS = 1024,      // rows of a step plan
    MAX_STEP_TOKENS = 8192,    // token positions computed in one step
    MAX_STEP_COMMANDS = 8192,  // opens, closes, page changes of one step
    MAX_STEP_HISTORY = 64,     // how many steps back a row may name as the source of its token
    MAX_CHOICES = 64,          // `n` of one request
    MAX_TOP_LOGPROBS = 20,     // alternatives reported beside a token
    MAX_LOGIT_BIAS = 1024,     // entries of one request
    MAX_STOP_STRINGS = 16,     // of one request
    MAX_STOP_BYTES = 256,      // length of one stop string
    MAX_STOP_IDS = 64,         // of one request, the model's own end tokens not counted
    MAX_END_TOKENS = 64,       // end-of-generation tokens of one model
    MAX_CONTEXT = 1 << 20,     // positions of one sequence
    MAX_VOCABULARY = 1 << 20,  // tokens
    MAX_MERGES = 1 << 22,      // pairs in a byte-level BPE vocabulary
    MAX_TOKEN_BYTES = 1 << 16, // text of one token
    MAX_LAYERS = 1024,
    MAX_WIDTH = 1 << 20,               // any one dimension of an activation
    MAX_MESSAGE_BYTES = 16 << 20,      // a gRPC message on the client port
    MAX_POOL_MESSAGE_BYTES = 64 << 20, // a gRPC message on the pool port
    MAX_TENSORS = 1 << 20,             // in one GGUF model
    MAX_METADATA = 1 << 16,            // key-value pairs in one GGUF file
    MAX_TENSOR_DIMS = 4,
    MAX_SPLITS = 1024, // parts of one split model
    MAX_REQUEST_ID_BYTES = 128,
    MAX_CHAT_MESSAGES = 4096, // of one request
    MAX_CHAT_TOOLS = 512,     // definitions of one request
    MAX_TOOL_CALLS = 256,     // of one chat message
};

#endif
