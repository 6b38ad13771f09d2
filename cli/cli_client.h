// What the client commands share: a channel to a server, its calls with decoded answers, the options that
// describe a request, and JSON pieces. Used by one thread per client unless said otherwise.
#ifndef STRATA_CLI_CLIENT_H
#define STRATA_CLI_CLIENT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/arena.h"
#include "common/config.h"
#include "common/status.h"
#include "proto/wire.h"

struct client;

// Options every client command has; put first in its table.
#define CLIENT_OPTIONS                                                                                       \
    {"connect", 'c', OPTION_STRING, "ADDR", "127.0.0.1:50051", "The server: HOST:PORT or unix:PATH.", 0, 0}, \
        {"timeout", 0, OPTION_FLOAT, "SECONDS", "0", "Deadline of the whole call, 0 = none.", 0, 1e9},       \
        {"tls-ca", 0, OPTION_STRING, "FILE", NULL, "Use TLS and trust this certificate authority (PEM).",    \
         0,        0},                                                                                       \
        {"tls-cert", 0, OPTION_STRING, "FILE", NULL, "Certificate of this client (PEM).", 0, 0},             \
    {                                                                                                        \
        "tls-key", 0, OPTION_STRING, "FILE", NULL, "Private key of this client (PEM).", 0, 0                 \
    }

#define SAMPLING_OPTIONS                                                                                     \
    {"max-tokens",                                                                                           \
     'n',                                                                                                    \
     OPTION_INT,                                                                                             \
     "N",                                                                                                    \
     NULL,                                                                                                   \
     "New tokens at most (default: what the context has room for).",                                         \
     0,                                                                                                      \
     1e9},                                                                                                   \
        {"min-tokens", 0, OPTION_INT, "N", NULL, "Do not end before this many new tokens.", 0, 1e9},         \
        {"temperature",                                                                                      \
         't',                                                                                                \
         OPTION_FLOAT,                                                                                       \
         "X",                                                                                                \
         NULL,                                                                                               \
         "0 = always the likeliest token (server default 1).",                                               \
         0,                                                                                                  \
         1e6},                                                                                               \
        {"top-k", 0, OPTION_INT, "K", NULL, "Draw from the K likeliest tokens, 0 = all.", 0, 1e9},           \
        {"top-p", 0, OPTION_FLOAT, "P", NULL, "Draw from the likeliest tokens that hold this probability.",  \
         0,       1},                                                                                        \
        {"min-p", 0, OPTION_FLOAT, "P", NULL, "Drop tokens less likely than P times the likeliest.", 0, 1},  \
        {"repetition-penalty",                                                                               \
         0,                                                                                                  \
         OPTION_FLOAT,                                                                                       \
         "X",                                                                                                \
         NULL,                                                                                               \
         "Above 1: make tokens seen before less likely.",                                                    \
         0,                                                                                                  \
         1e6},                                                                                               \
        {"presence-penalty",                                                                                 \
         0,                                                                                                  \
         OPTION_FLOAT,                                                                                       \
         "X",                                                                                                \
         NULL,                                                                                               \
         "Subtracted once for a token in the answer.",                                                       \
         -1e6,                                                                                               \
         1e6},                                                                                               \
        {"frequency-penalty",                                                                                \
         0,                                                                                                  \
         OPTION_FLOAT,                                                                                       \
         "X",                                                                                                \
         NULL,                                                                                               \
         "Subtracted for each time a token is in the answer.",                                               \
         -1e6,                                                                                               \
         1e6},                                                                                               \
        {"logit-bias",                                                                                       \
         0,                                                                                                  \
         OPTION_STRING,                                                                                      \
         "ID:X,...",                                                                                         \
         NULL,                                                                                               \
         "Added to the logits of tokens; -inf forbids one.",                                                 \
         0,                                                                                                  \
         0},                                                                                                 \
        {"seed", 's', OPTION_INT, "N", NULL, "Seed of the draws (default: drawn by the server).", 0, 0},     \
        {"stop", 0, OPTION_LIST, "TEXT", NULL, "End where the answer has this text; may be given again.",    \
         0,      0},                                                                                         \
        {"stop-ids", 0, OPTION_STRING, "ID,...", NULL, "End at these tokens.", 0, 0},                        \
    {                                                                                                        \
        "ignore-eos", 0, OPTION_FLAG, NULL, NULL, "Go on after the model's end tokens.", 0, 0                \
    }

// Opens a channel as the command line says; connecting happens with the first call.
int client_open(struct client **out, const struct config *config, struct error *error);
void client_close(struct client *client);

// Streams one Generate call. `on_response` runs for each response; false cancels the call (which then counts
// as ended well).
int client_generate(struct client *client, const struct wire_generate_request *request,
                    bool (*on_response)(void *context, const struct wire_generate_response *response),
                    void *context, struct error *error);
// From here on Ctrl-C cancels the Generate call that is running on `client`, or ends the program when none
// is. Call before other threads start.
int client_watch_interrupts(struct client *client, struct error *error);

int client_get_model(struct client *client, struct wire_model *out, struct arena *arena, struct error *error);
int client_get_pool(struct client *client, struct wire_pool *out, struct arena *arena, struct error *error);

// Fills the fields that SAMPLING_OPTIONS describe. Lists go to the arena.
int client_read_sampling(struct wire_generate_request *request, const struct config *config,
                         struct arena *arena, struct error *error);
// "1,2,3" (spaces allowed) to ids in the arena.
int client_parse_ids(const char *text, int32_t **ids, uint32_t *count, struct arena *arena,
                     struct error *error);
// The prompt: --tokens, else the positional words joined by spaces, else standard input.
int client_read_prompt(struct wire_generate_request *request, const struct config *config,
                       struct arena *arena, struct error *error);
// All of a stream; NUL-terminated in the arena.
int client_read_stream(FILE *stream, char **text, size_t *length, struct arena *arena, struct error *error);

// JSON: text with ill-formed UTF-8 replaced; one scored token.
json_t *json_text(const char *text, size_t length);
json_t *json_logprob(const struct wire_logprob *logprob);

#endif
