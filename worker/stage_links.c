// Both links of a stage at once: a ring of stages that made, ended or even tried them one after the other
// could wait in a circle. Keeps nothing.
#include "worker/stage_links.h"

#include <string.h>

// The residual goes from each stage to the next, but from the last one tokens go back to the first.
static struct link_nccl_shape shape_of_edge(const struct stage_edges *edges, bool feedback)
{
    return feedback ? link_nccl_feedback(edges->n_slots)
                    : link_nccl_residual(edges->max_positions, edges->width);
}

static struct link_nccl_shape shape_of_next(const struct stage_edges *edges)
{
    return shape_of_edge(edges, edges->stage + 1 == edges->n_stages);
}

static struct link_nccl_shape shape_of_previous(const struct stage_edges *edges)
{
    return shape_of_edge(edges, edges->stage == 0);
}

uint64_t stage_links_plan_bytes(const struct stage_edges *edges)
{
    const struct link_nccl_shape next = shape_of_next(edges), previous = shape_of_previous(edges);
    uint64_t bytes = 0;
    if (edges->next == WIRE_LINK_NCCL)
        bytes += link_nccl_plan_bytes(&next, true);
    if (edges->previous == WIRE_LINK_NCCL)
        bytes += link_nccl_plan_bytes(&previous, false);
    return bytes;
}

static int upgrade(struct stage_links *links, const struct stage_links_options *options, struct error *error)
{
    struct link_nccl_end ends[2];
    uint32_t n = 0;
    const struct stage_edges *edges = &options->edges;
    const struct stage_link_ids *ids = &options->ids;
    bool next = edges->next == WIRE_LINK_NCCL, previous = edges->previous == WIRE_LINK_NCCL;
    if ((next && !ids->has_next) || (previous && !ids->has_previous))
        return error_set(error, STATUS_CORRUPT, "stage %u has no id for its NCCL link", edges->stage);
    if (next) {
        ends[n] =
            (struct link_nccl_end){.link = &links->to_next, .shape = shape_of_next(edges), .sender = true};
        memcpy(ends[n++].id, ids->next, LINK_NCCL_ID_BYTES);
    }
    if (previous) {
        ends[n] = (struct link_nccl_end){.link = &links->from_previous, .shape = shape_of_previous(edges)};
        memcpy(ends[n++].id, ids->previous, LINK_NCCL_ID_BYTES);
    }
    if (n == 0)
        return STATUS_OK;
    return link_nccl_connect(options->device, ends, n, options->timeout_us, options->cancel, error);
}

int stage_links_make(struct stage_links *out, const struct stage_links_options *options, struct error *error)
{
    *out = (struct stage_links){0};
    if (options->edges.n_stages == 1)
        return STATUS_OK;
    int status = link_socket_connect(&out->to_next, &out->from_previous, options->listener,
                                     options->next_address, options->epoch, options->edges.stage,
                                     options->edges.n_stages, options->timeout_us, options->cancel, error);
    if (!status)
        status = upgrade(out, options, error);
    if (status)
        stage_links_close(out);
    return status;
}

int stage_links_check(const struct stage_links *links, struct error *error)
{
    struct link *both[] = {links->to_next, links->from_previous};
    int status = STATUS_OK;
    for (int i = 0; i < 2 && !status; i++)
        status = both[i] ? both[i]->ops->check(both[i], error) : STATUS_OK;
    return status;
}

void stage_links_abort(const struct stage_links *links)
{
    if (links->to_next)
        links->to_next->ops->abort(links->to_next);
    if (links->from_previous)
        links->from_previous->ops->abort(links->from_previous);
}

void stage_links_close(struct stage_links *links)
{
    stage_links_abort(links);
    if (links->to_next)
        links->to_next->ops->close(links->to_next);
    if (links->from_previous)
        links->from_previous->ops->close(links->from_previous);
    *links = (struct stage_links){0};
}
