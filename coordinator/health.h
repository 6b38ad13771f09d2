// grpc.health.v1.Health for the client port. "" and "strata.v1.Inference" are SERVING while tokens can flow,
// "liveness" as long as the process works. Any thread may set; the calls run on the server's threads.
#ifndef STRATA_HEALTH_H
#define STRATA_HEALTH_H

#include <stdbool.h>

#include "common/rpc_server.h"

struct health;

// Adds Check and Watch to a server that has not started. NOT_SERVING at first.
int health_new(struct health **out, struct rpc_server *server);
void health_free(struct health *health); // after the server is stopped
void health_set_serving(struct health *health, bool serving);

#endif
