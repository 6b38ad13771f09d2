// Clusters of blocks as the kernels use them, for g++. Stands where CUDA's header of this name does
// (emulator.h).
#ifndef STRATA_EMULATED_COOPERATIVE_GROUPS_H
#define STRATA_EMULATED_COOPERATIVE_GROUPS_H

#include "tests/emulator/emulator.h"

namespace cooperative_groups
{

struct cluster_group {
    unsigned block_rank() const
    {
        return emulated_cluster_rank();
    }

    void barrier_arrive() const
    {
        emulated_cluster_arrive();
    }

    void barrier_wait() const
    {
        emulated_cluster_wait();
    }

    void sync() const
    {
        emulated_cluster_arrive();
        emulated_cluster_wait();
    }

    template <typename Type> Type *map_shared_rank(Type *mine, unsigned rank) const
    {
        return (Type *)emulated_cluster_map((void *)mine, rank);
    }
};

static inline struct cluster_group this_cluster()
{
    return {};
}

} // namespace cooperative_groups

#endif
