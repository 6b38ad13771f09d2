// The smallest C client: sends a prompt to a Strata server and prints the answer as it comes.
//
//     generate 127.0.0.1:50051 "Once upon a time"
//
// Built with the project (build/examples/generate); links strata_proto and strata_common, which carry the
// gRPC C core wrapper and the message structs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/rpc_client.h"
#include "proto/wire.h"

// Sends the request and prints each response. `error` has the server's sentence when it fails.
static int generate(struct rpc_stream *stream, const struct wire_generate_request *request,
                    struct error *error)
{
    struct wire_bytes encoded = {0};
    int status = wire_encode_generate_request(&encoded, request);
    if (status == 0)
        status = rpc_stream_send(stream, encoded.data, encoded.length);
    if (status == 0)
        status = rpc_stream_half_close(stream);
    uint8_t *bytes;
    size_t length;
    struct arena arena = {0};
    while ((status = rpc_stream_receive(stream, &bytes, &length, error)) == 1) {
        struct wire_generate_response response;
        arena_reset(&arena);
        if (wire_decode_generate_response(&response, bytes, length, &arena, error) == 0)
            fwrite(response.text.data, 1, response.text.length, stdout);
        fflush(stdout);
        free(bytes);
    }
    arena_free(&arena);
    wire_bytes_free(&encoded);
    return status;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: %s ADDRESS PROMPT\n", argv[0]);
        return 2;
    }
    struct wire_generate_request request = {
        .model = "",
        .request_id = "",
        .input = WIRE_INPUT_TEXT,
        .text = {.data = argv[2], .length = strlen(argv[2])},
        .has_max_tokens = true,
        .max_tokens = 64,
        .n = 1,
        .has_temperature = true, // 0: greedy
    };
    struct error error = {0};
    struct rpc_channel *channel = NULL;
    struct rpc_stream *stream = NULL;
    int status = rpc_channel_new(&channel, argv[1], &(struct rpc_channel_options){0}, &error);
    if (status == 0)
        status = rpc_stream_open(&stream, channel, "/strata.v1.Inference/Generate", 0, NULL, false, &error);
    if (status == 0)
        status = generate(stream, &request, &error);
    putchar('\n');
    if (status)
        fprintf(stderr, "%s\n", error.text);
    rpc_stream_free(stream);
    rpc_channel_free(channel);
    return status ? EXIT_FAILURE : EXIT_SUCCESS;
}
