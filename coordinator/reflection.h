// Server reflection, v1 and v1alpha: clients such as grpcurl learn the services from the server itself.
// Stateless; runs on the server's threads.
#ifndef STRATA_REFLECTION_H
#define STRATA_REFLECTION_H

#include "common/rpc_server.h"

int reflection_add(struct rpc_server *server); // before it starts

#endif
