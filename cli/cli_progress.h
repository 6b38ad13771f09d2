// The bar that `strata serve` draws on standard error while its pool loads. One thread.
#ifndef STRATA_CLI_PROGRESS_H
#define STRATA_CLI_PROGRESS_H

struct progress;

// Asks the server at `address` how far it is. NULL when memory is out; the other functions accept NULL.
struct progress *progress_new(const char *address);
void progress_free(struct progress *progress);
// Asks and draws, at most a few times a second; returns soon when the server does not answer yet.
void progress_update(struct progress *progress);
// Clears the line.
void progress_end(struct progress *progress);

#endif
