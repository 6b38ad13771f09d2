// A question, an answer, as often as the client likes; what is answered is in wire_reflection.c.
#include "coordinator/reflection.h"

#include "proto/wire.h"

static void on_question(struct rpc_call *call, void *service, const uint8_t *bytes, size_t length)
{
    struct wire_bytes answer = {0};
    struct error error = {0};
    int status = wire_reflect(&answer, bytes, length, &error);
    if (!status)
        status = rpc_call_send(call, answer.data, answer.length);
    if (status == STATUS_EXHAUSTED)
        error_set(&error, status, "too many questions wait to be answered: read the answers first");
    if (status)
        rpc_call_finish(call, status, error.text);
    wire_bytes_free(&answer);
}

static void on_last_question(struct rpc_call *call, void *service)
{
    rpc_call_finish(call, STATUS_OK, NULL);
}

int reflection_add(struct rpc_server *server)
{
    static const char *const paths[] = {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
    int status = STATUS_OK;
    for (int i = 0; i < 2 && !status; i++) {
        const struct rpc_method method = {.path = paths[i],
                                          .client_streaming = true,
                                          .standing = true,
                                          .on_message = on_question,
                                          .on_half_close = on_last_question};
        status = rpc_server_add(server, &method, NULL);
    }
    return status;
}
