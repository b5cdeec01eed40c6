// cuda_wrapper.h - what a kv_device has besides when the device that it wraps is ggml's CUDA.
//
// State of this file: NOT YET PROVEN ON A GPU. Its logic runs in tests over the CPU backend with emulated kernels; events, streams and ggml-cuda's own
// graphs were never met. So a kv_device refuses a CUDA device unless GEARCPP_CUDA=1 is set, and what is not covered is refused by name, not guessed:
//   - any operation on the cache but SET_ROWS, FLASH_ATTN_EXT and the K-shift
//   - GGML_CUDA_GRAPH_OPT=1 (it forks streams that join at the attention node, which no segment contains)
//   - a ggml-cuda without events; weights split by rows or tensors over several GPUs
//
// How it works. Compute and weight buffers are ggml-cuda's own. A graph runs in segments: what lies between two layers' cache operations is given to the
// wrapped backend as a graph of its own, with the uid that the whole has; then an event makes our stream wait for ggml's, our kernels are put onto our
// stream, and a second event makes ggml's wait for ours. The host waits for nothing. Which cells a step writes, the host learns when llama.cpp uploads the
// indices: the compute buffer's set_tensor is ours and keeps a copy. The backend that llama.cpp sees is the wrapped one's structure with three functions
// of ours, so that async copies, events and graph_optimize are ggml-cuda's.
//
// Of several GPUs each has a wrapper: a stream, tables, tiles and scratch of its own. llama.cpp gives each the layers and the graphs that are its own and
// carries indices and activations between them, as without us; its copies and events for that are ggml-cuda's.
//
// Layers that write the same cells share one table of places. What llama.cpp does to one layer at a time (the K-shift, restoring a state, copying a
// stream) gives that layer a table of its own; the next step lets tables that agree be one again. There the host may wait.
#pragma once

#include "cuda/cuda_cache.h"
#include "plugin/abi.h"

#include <memory>
#include <mutex>
#include <set>
#include <vector>

namespace gear {

class kv_device;
class cuda_buffer;

class cuda_wrapper {
  public:
    // Throws gear::error with the reason why this device cannot be wrapped.
    cuda_wrapper(kv_device & device, abi::device * inner);
    ~cuda_wrapper();

    // Members of the device's table that a CUDA device has and a CPU has not, forwarded.
    void fill_in(abi::device_i & iface, const abi::device_i & inner) const;

    // The buffer of the KV cache. Throws gear::error.
    abi::buffer *  make_cache_buffer(size_t size);
    // Note how host data come into this buffer, which ggml-cuda has just made.
    void           watch(abi::buffer * buffer);
    abi::backend * make_backend();

    // true: op touches a GEAR cache in device memory; what it does with it is noted.
    static bool              observe(const abi::tensor * op);
    // The device whose GEAR cache a tensor is, or is a view of; nullptr: it is none in device memory.
    static const kv_device * owner_of(const abi::tensor * tensor);

    std::vector<gear_store_stats> stats();
    int64_t                       scratch_bytes();

    kv_device &           device() const { return device_; }
    abi::device *         inner() const { return inner_; }
    // For as long as something is done with the worker: a thread that was just with another GPU comes here with that one selected.
    cuda::selected_device select() const { return { worker.with, worker.device }; }

    cuda::cuda_worker worker;
    std::mutex        lock; // of the worker, and of every cache on the device
    int64_t           n_step = 0;

    void add(cuda_buffer * buffer);
    void remove(cuda_buffer * buffer);

  private:
    kv_device &             device_;
    abi::device *           inner_;
    std::set<cuda_buffer *> buffers_;
};

} // namespace gear
