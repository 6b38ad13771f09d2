// Every decoder of proto/wire.h on arbitrary bytes. The first byte picks the message; what a decoder accepts
// has to survive being encoded and decoded again.
#include <stdlib.h>

#include "proto/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define AGAIN(name)                                                                                          \
    do {                                                                                                     \
        struct wire_##name out, back;                                                                        \
        if (wire_decode_##name(&out, data, size, &arena, &error))                                            \
            break;                                                                                           \
        if (wire_encode_##name(&bytes, &out) ||                                                              \
            wire_decode_##name(&back, bytes.data, bytes.length, &arena, &error))                             \
            abort();                                                                                         \
    } while (0)

static void plan_again(const uint8_t *data, size_t size, struct arena *arena)
{
    struct step_plan first, second;
    struct wire_bytes bytes = {0};
    struct error error = {0};
    step_plan_init(&first);
    step_plan_init(&second);
    struct wire_coordinator_message message = {.plan = &first};
    if (wire_decode_coordinator_message(&message, data, size, arena, &error) == 0) {
        struct wire_coordinator_message back = {.plan = &second};
        if (wire_encode_coordinator_message(&bytes, &message) ||
            wire_decode_coordinator_message(&back, bytes.data, bytes.length, arena, &error))
            abort();
        if (first.n_rows != second.n_rows || first.n_tokens != second.n_tokens ||
            first.n_biases != second.n_biases)
            abort();
    }
    wire_bytes_free(&bytes);
    step_plan_free(&first);
    step_plan_free(&second);
}

static void result_again(const uint8_t *data, size_t size, struct arena *arena)
{
    struct step_result given;
    struct wire_bytes bytes = {0};
    struct error error = {0};
    step_result_init(&given);
    struct wire_worker_message loose = {0}, into = {.result = &given};
    int a = wire_decode_worker_message(&loose, data, size, arena, &error);
    int b = wire_decode_worker_message(&into, data, size, arena, &error);
    if (a != b)
        abort();
    if (a == 0 && (wire_encode_worker_message(&bytes, &loose) ||
                   wire_decode_worker_message(&into, bytes.data, bytes.length, arena, &error)))
        abort();
    wire_bytes_free(&bytes);
    step_result_free(&given);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct arena arena = {0};
    struct wire_bytes bytes = {0};
    struct error error = {0};
    const char *service;
    enum wire_health health;
    if (size == 0)
        return 0;
    int which = *data++ % 13;
    size--;
    switch (which) {
    case 0:
        AGAIN(generate_request);
        break;
    case 1:
        AGAIN(generate_response);
        break;
    case 2:
        AGAIN(tokenize_request);
        break;
    case 3:
        AGAIN(tokenize_response);
        break;
    case 4:
        AGAIN(detokenize_request);
        break;
    case 5:
        AGAIN(detokenize_response);
        break;
    case 6:
        AGAIN(model);
        break;
    case 7:
        AGAIN(pool);
        break;
    case 8:
        plan_again(data, size, &arena);
        break;
    case 9:
        result_again(data, size, &arena);
        break;
    case 10:
        wire_decode_health_request(&service, data, size, &arena, &error);
        break;
    case 11:
        wire_decode_health_response(&health, data, size, &error);
        break;
    default:
        wire_reflect(&bytes, data, size, &error);
    }
    arena_free(&arena);
    wire_bytes_free(&bytes);
    return 0;
}
