// Between protobuf bytes and our structs: the only door to the generated code. Decoders take untrusted bytes:
// they check UTF-8 of every string, refuse embedded NULs where a C string results, bound every count by
// limits.h, and put what they make into an arena. Encoders write into a `struct wire_bytes` that grows. No
// threads, no state.
//
// The proto sources are proto/strata/v1/*.proto; generated C has its `string` fields as `bytes` (the same on
// the wire), because protobuf-c would cut strings at NUL and not check UTF-8.
#ifndef STRATA_WIRE_H
#define STRATA_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/arena.h"
#include "common/limits.h"
#include "common/sampling.h"
#include "common/status.h"
#include "common/step_plan.h"

struct wire_bytes { // zero-initialize; free with wire_bytes_free
    uint8_t *data;
    size_t length, capacity;
};
void wire_bytes_free(struct wire_bytes *bytes);

struct wire_text { // not necessarily NUL-free; data is NUL-terminated all the same
    const char *data;
    size_t length;
};

// --- strata.v1.Inference (wire_inference.c)

enum wire_input { WIRE_INPUT_NONE, WIRE_INPUT_TEXT, WIRE_INPUT_TOKENS, WIRE_INPUT_MESSAGES };

struct wire_tool_call {
    const char *id, *name, *arguments_json;
};
struct wire_message {
    const char *role, *content, *name, *tool_call_id;
    const struct wire_tool_call *tool_calls;
    uint32_t n_tool_calls;
};
struct wire_tool {
    const char *name, *description, *parameters_json;
};
struct wire_messages {
    const struct wire_message *messages;
    uint32_t n_messages;
    const struct wire_tool *tools;
    uint32_t n_tools;
    bool no_generation_prompt;
    const char *template_arguments_json; // "" = none
};

struct wire_generate_request {
    const char *model, *request_id; // "" when unset
    enum wire_input input;
    struct wire_text text;
    const int32_t *tokens;
    uint32_t n_tokens;
    struct wire_messages messages;
    bool parse_special, add_special /* default true */, ignore_eos, logprobs, prompt_logprobs, echo_special;
    bool has_max_tokens, has_seed;
    uint32_t max_tokens, min_tokens, n, top_logprobs;
    const char *const *stop;
    uint32_t n_stop;
    const int32_t *stop_ids;
    uint32_t n_stop_ids;
    const struct logit_bias *biases;
    uint32_t n_biases;
    struct sampling_params sampling; // defaults filled in
    // For encoding (clients): which of the fields with presence to write; decoding sets it too.
    bool has_add_special, has_n, has_repetition_penalty, has_presence_penalty, has_frequency_penalty,
        has_temperature, has_top_k, has_top_p, has_min_p;
};

struct wire_logprob {
    int32_t token;
    float logprob;
    bool unscored;
    struct wire_text text;
    const struct wire_logprob *top;
    uint32_t n_top;
};
enum wire_finish {
    WIRE_FINISH_NONE,
    WIRE_FINISH_STOP,
    WIRE_FINISH_LENGTH,
    WIRE_FINISH_CANCELLED
}; // as in the proto
struct wire_generate_response {
    uint32_t choice;
    struct wire_text text;
    const int32_t *token_ids;
    uint32_t n_token_ids;
    const struct wire_logprob *logprobs;
    uint32_t n_logprobs;
    const struct wire_logprob *prompt_logprobs;
    uint32_t n_prompt_logprobs;
    enum wire_finish finish;
    bool matched_stop, matched_id;
    struct wire_text stop;
    int32_t stop_id;
    bool has_usage; // usage and timings
    uint32_t prompt_tokens, cached_tokens, completion_tokens;
    uint64_t seed;
    double queue_ms, ttft_ms, total_ms, tokens_per_second;
    const int32_t *prompt_token_ids;
    uint32_t n_prompt_token_ids;
};

struct wire_tokenize_request {
    struct wire_text text;
    bool parse_special, add_special, has_messages;
    struct wire_messages messages;
};
struct wire_tokenize_response {
    const int32_t *ids;
    uint32_t n_ids;
    struct wire_text rendered;
};
struct wire_detokenize_request {
    const int32_t *ids;
    uint32_t n_ids;
    bool special;
};
struct wire_detokenize_response {
    struct wire_text text;
};
struct wire_model {
    const char *name, *architecture, *tokenizer, *chat_template;
    uint32_t layers, width, heads, kv_heads, head_size, ffn_width, vocabulary, context, trained_context;
    uint64_t file_bytes, fingerprint;
    int32_t bos_id;
    const int32_t *end_ids;
    uint32_t n_end_ids;
    bool has_chat_template;
};
struct wire_stage {
    uint32_t index, first_layer, layers;
    const char *worker, *device, *state;
    uint64_t weight_bytes, kv_bytes, loaded_bytes, load_bytes;
    double busy, waiting;       // shares of the last seconds
    uint64_t layer_ns, head_ns; // 0: not measured
};
enum wire_pool_state { // as in the proto
    WIRE_POOL_UNSPECIFIED,
    WIRE_POOL_WAITING,
    WIRE_POOL_LOADING,
    WIRE_POOL_LINKING,
    WIRE_POOL_READY,
    WIRE_POOL_REASSEMBLING,
    WIRE_POOL_DRAINING,
    WIRE_POOL_FAILED
};
struct wire_pool {
    enum wire_pool_state state;
    uint64_t epoch, steps;
    const char *problem;
    const struct wire_stage *stages;
    uint32_t n_stages, workers_wanted, pages, pages_free, page_positions, running, waiting, max_sequences;
};

// Each decode returns 0 with *out filled from arena memory, STATUS_INVALID (from clients) or STATUS_CORRUPT
// (from peers) with a sentence. Each encode replaces the content of `to`; STATUS_NO_MEMORY is its only
// failure.
#define WIRE_CODEC(name)                                                                                     \
    int wire_encode_##name(struct wire_bytes *to, const struct wire_##name *from);                           \
    int wire_decode_##name(struct wire_##name *out, const uint8_t *bytes, size_t length,                     \
                           struct arena *arena, struct error *error);
WIRE_CODEC(generate_request)
WIRE_CODEC(generate_response)
WIRE_CODEC(tokenize_request)
WIRE_CODEC(tokenize_response)
WIRE_CODEC(detokenize_request)
WIRE_CODEC(detokenize_response)
WIRE_CODEC(model)
WIRE_CODEC(pool)

// --- strata.v1.Pool (wire_pool.c)

enum {
    WIRE_POOL_PROTOCOL = 2
}; // what a worker's hello must say: raised when old and new cannot work together

// How an edge of the pool is linked; as in the proto.
enum wire_link { WIRE_LINK_SOCKET, WIRE_LINK_NCCL };

enum wire_worker_kind {
    WIRE_HELLO = 1,
    WIRE_PROGRESS,
    WIRE_LOADED,
    WIRE_LINKED,
    WIRE_RESULT,
    WIRE_FAILED,
    WIRE_HEARTBEAT
};
struct wire_worker_message {
    enum wire_worker_kind kind;
    uint64_t epoch; // all but HELLO
    // HELLO
    const char *worker, *backend, *device, *link_address, *host, *device_id;
    uint32_t protocol, level, threads, nccl;
    bool oversubscribe;
    uint64_t fingerprint, memory_free, pid;
    // PROGRESS, LOADED
    uint64_t done_bytes, total_bytes, weight_bytes, kv_bytes, source_bytes, load_us;
    uint32_t n_weights;
    // LOADED
    struct wire_text link_id;   // bytes
    uint64_t layer_ns, head_ns; // 0: not measured
    // RESULT: decoded into the caller's step_result when one is given, else memory of the arena
    struct step_result *result;
    // FAILED
    int32_t status;
    const char *text;
    uint32_t fits_pages;
    bool has_step, peer_lost;
    uint64_t step;
    // HEARTBEAT
    uint64_t steps_done, compute_us, wait_us;
};

enum wire_coordinator_kind {
    WIRE_ASSIGN = 1,
    WIRE_CONNECT,
    WIRE_STEP,
    WIRE_ABORT,
    WIRE_GOODBYE,
    WIRE_COORDINATOR_HEARTBEAT
};
struct wire_coordinator_message {
    enum wire_coordinator_kind kind;
    uint64_t epoch;
    // ASSIGN
    uint32_t stage, n_stages, first_layer, n_layers, n_slots, n_pages, context, max_positions, level;
    enum wire_link next_link, previous_link;
    bool measure;
    // CONNECT
    const char *next_address;
    struct wire_text previous_id; // bytes
    // STEP: decoded into the caller's step_plan (set before decoding), validated only structurally
    struct step_plan *plan;
    // ABORT, GOODBYE
    int32_t status;
    const char *text;
    bool retry;
};
WIRE_CODEC(worker_message)
WIRE_CODEC(coordinator_message)

// --- grpc.health.v1 and grpc.reflection (wire_health.c, wire_reflection.c)

int wire_decode_health_request(const char **service, const uint8_t *bytes, size_t length, struct arena *arena,
                               struct error *error);
enum wire_health {
    WIRE_HEALTH_UNKNOWN = 0,
    WIRE_HEALTH_SERVING = 1,
    WIRE_HEALTH_NOT_SERVING = 2,
    WIRE_HEALTH_SERVICE_UNKNOWN = 3
};
int wire_encode_health_response(struct wire_bytes *to, enum wire_health status);
int wire_encode_health_request(struct wire_bytes *to, const char *service);
int wire_decode_health_response(enum wire_health *out, const uint8_t *bytes, size_t length,
                                struct error *error);

// Answers one ServerReflectionRequest (v1 and v1alpha have the same messages) about the services named in
// wire_reflection.c from the descriptors compiled in. `to` gets the ServerReflectionResponse.
int wire_reflect(struct wire_bytes *to, const uint8_t *bytes, size_t length, struct error *error);

#endif
