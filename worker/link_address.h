// Addresses of links: "host:port", "[v6]:port", "unix:/path". Listening and dialing without blocking; the
// caller polls. No state.
#ifndef STRATA_LINK_ADDRESS_H
#define STRATA_LINK_ADDRESS_H

#include <stddef.h>

#include "common/status.h"

enum { LINK_ADDRESS_BYTES = 128 };

// A listening, non-blocking socket. `bound` gets the address that peers can dial, with the port the system
// chose.
int link_address_listen(int *fd, const char *address, char *bound, size_t capacity, struct error *error);
// Removes what listening on `bound` left in the file system.
void link_address_forget(const char *bound);
// A non-blocking socket that is connecting (or connected): poll it for writing, then ask
// link_address_connected.
int link_address_dial(int *fd, const char *address, struct error *error);
int link_address_connected(int fd); // 0, or the errno of the attempt
// What other hosts should dial: `advertise` when it has a port or is a unix path, else its host with
// `bound`'s port. `bound` itself when `advertise` is NULL.
int link_address_advertise(char *out, size_t capacity, const char *bound, const char *advertise,
                           struct error *error);

#endif
