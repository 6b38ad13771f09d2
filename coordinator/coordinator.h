// The coordinator: one endpoint for clients, one for workers, and the thread between them that owns
// everything that changes.
#ifndef STRATA_COORDINATOR_H
#define STRATA_COORDINATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

struct coordinator;

struct coordinator_options {        // strings outlive the coordinator; zero means the default in brackets
    const char *model;              // GGUF file
    const char *model_name;         // [general.name, else the file's name]
    const char *listen;             // client addresses, comma separated [127.0.0.1:50051]
    const char *pool_listen;        // worker address [127.0.0.1:50052]
    uint32_t n_workers;             // [1]
    const char *backend;            // of the workers; [any]
    uint32_t context;               // positions of one sequence [the model's, at most 4096]
    uint32_t max_sequences;         // at once [32]
    uint32_t max_waiting;           // requests not yet admitted [256]
    uint32_t step_budget;           // positions of one step [512]
    uint32_t chunk;                 // positions of one prompt chunk [256]
    uint32_t n_pages;               // KV pages [what the workers' memory allows]
    bool by_bytes;                  // layers are dealt by their bytes alone, not by measured time
    double memory_fraction;         // of the workers' free memory for weights and KV [0.9]
    int64_t step_timeout_us;        // [30 s]
    int64_t drain_timeout_us;       // requests that run when a stop is asked for may take so long; 0 = none
    uint32_t max_connection_age_ms; // then clients are asked to reconnect; 0 = never
    const char *python;             // renders chat templates [/usr/bin/python3]
    const char *tls_cert, *tls_key, *tls_ca;                // PEM files for the client endpoint [plaintext]
    const char *pool_tls_cert, *pool_tls_key, *pool_tls_ca; // and for the workers'
};

// Opens the model and both endpoints; workers and clients can connect, but nothing answers before _run.
int coordinator_new(struct coordinator **out, const struct coordinator_options *options, struct error *error);
// Serves until a stop has been carried out. `ready` (may be NULL) is called once, when the pool first serves,
// with the first client address.
void coordinator_run(struct coordinator *coordinator, void (*ready)(const char *address));
// Any thread. The first call lets the running requests finish, the second ends them.
void coordinator_stop(struct coordinator *coordinator);
void coordinator_free(struct coordinator *coordinator);

#endif
