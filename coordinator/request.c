// Construction and release of one request: plain memory, owned by the scheduler once submitted.
#include "coordinator/request.h"

#include <stdlib.h>

struct request *request_new(void)
{
    struct request *request = calloc(1, sizeof(*request));
    if (!request)
        return NULL;
    request->sampling = SAMPLING_DEFAULTS;
    request->n_choices = 1;
    request->deadline_us = INT64_MAX;
    return request;
}

void request_free(struct request *request)
{
    if (!request)
        return;
    free(request->name);
    free(request->prompt);
    free(request->biases);
    free(request->end_ids);
    free(request);
}
