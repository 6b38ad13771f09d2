// Programs: CUDA graphs of the operations of a step, recorded once for a size of batch and replayed, so that
// a step of several hundred kernels costs the host one launch. A program holds addresses; whoever frees or
// moves memory that one may name calls cuda_forget first. Called by the executor's thread.
#include "kernels/cuda/cuda_internal.h"

static cudaGraphExec_t find(const struct cuda_device *device, uint32_t key)
{
    for (uint32_t i = 0; i < device->n_programs; i++) {
        if (device->programs[i].key == key)
            return device->programs[i].graph;
    }
    return NULL;
}

bool cuda_replay(struct device *base, uint32_t key)
{
    struct cuda_device *device = cuda_device_of(base);
    cudaGraphExec_t graph = find(device, key);
    if (!graph)
        return false;
    cuda_enter(device);
    cuda_failed(device, cudaGraphLaunch(graph, device->stream), "replaying a step");
    return true;
}

void cuda_record(struct device *base, uint32_t key)
{
    struct cuda_device *device = cuda_device_of(base);
    cuda_enter(device);
    if (device->n_programs == CUDA_MAX_PROGRAMS)
        cuda_forget(base);
    device->recording = key;
    device->is_recording = !cuda_failed(
        device, cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeThreadLocal), "recording a step");
}

void cuda_record_end(struct device *base)
{
    struct cuda_device *device = cuda_device_of(base);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t program = NULL;
    if (!device->is_recording)
        return;
    device->is_recording = false;
    if (cuda_failed(device, cudaStreamEndCapture(device->stream, &graph), "recording a step"))
        return;
    bool whole = !device->fault.status; // what failed while it was recorded is missing in it
    bool made =
        whole && !cuda_failed(device, cudaGraphInstantiate(&program, graph, 0), "preparing a recorded step");
    cudaGraphDestroy(graph);
    if (!made)
        return;
    device->programs[device->n_programs].key = device->recording;
    device->programs[device->n_programs++].graph = program;
    cuda_failed(device, cudaGraphLaunch(program, device->stream), "running a recorded step");
}

void cuda_forget(struct device *base)
{
    struct cuda_device *device = cuda_device_of(base);
    if (device->n_programs == 0)
        return;
    cuda_enter(device);
    cuda_failed(device, cudaStreamSynchronize(device->stream), "finishing before programs are dropped");
    while (device->n_programs > 0)
        cudaGraphExecDestroy(device->programs[--device->n_programs].graph);
}
