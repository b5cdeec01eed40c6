// device.h - a device over ggml's CUDA. A GPU has a device of its own: a stream, tables, tiles and scratch. llama.cpp gives each the layers and the graphs
// that are its own and carries indices and activations between them, as without us; its copies and events for that are ggml-cuda's.
//
// A GEAR cache on a GPU is for those who ask for it (GEARCPP_CUDA=1): on how far it is proven see docs/cuda.md. What is not covered is refused by name:
//   - any operation on the cache but SET_ROWS, FLASH_ATTN_EXT and the K-shift
//   - GGML_CUDA_GRAPH_OPT=1 (it forks streams that join at the attention node, which no segment contains)
//   - a ggml-cuda without events; weights split by rows or tensors over several GPUs
#pragma once

#include "cuda/cuda_cache.h"
#include "plugin/device.h"

#include <mutex>

namespace gear {

class cuda_device final : public kv_device {
  public:
    // Throws gear::error with the reason why this device cannot be wrapped.
    cuda_device(const gear_device_params & params, abi::device * inner, int index);

    int                           type() const override;
    void                          describe(abi::device_props & props) const override;
    abi::backend *                make_backend() override;
    std::unique_ptr<cache_memory> make_memory(size_t nominal) const override;
    bool                          takes_weights() const override { return true; } // they go where ggml-cuda has them
    void                          made_buffer(abi::buffer * buffer) override;
    void *                        proc_address(const char * name) override;
    int64_t                       scratch_bytes() const override;
    bool                          is_ordinary(int64_t n_cell) const override { return is_window(n_cell); } // views need its address in device memory
    cache_kind                    kind_of(const cache_layer & layer) const override;
    bool                          decides_together() const override { return true; } // so they begin with one table

    cuda::cuda_worker & worker() const { return worker_; }
    std::mutex &        lock() const { return lock_; } // of the worker, and of every cache on the device

  private:
    mutable cuda::cuda_worker worker_;
    mutable std::mutex        lock_;
};

} // namespace gear
