// device.h - a device over ggml's CPU.
#pragma once

#include "plugin/device.h"

#include <atomic>

namespace gear {

class cpu_device final : public kv_device {
  public:
    cpu_device(const gear_device_params & params, abi::device * inner, int index);

    int                           type() const override;
    void                          describe(abi::device_props & props) const override;
    abi::backend *                make_backend() override;
    std::unique_ptr<cache_memory> make_memory(size_t nominal) const override;
    bool                          takes_weights() const override { return false; } // they stay in the formats of the CPU (mmap, repacked)
    void                          made_buffer(abi::buffer *) override {}
    void *                        proc_address(const char * name) override;
    int64_t                       scratch_bytes() const override { return scratch_bytes_; }
    bool                          is_ordinary(int64_t) const override { return false; } // later: the graph is to show more
    cache_kind                    kind_of(const cache_layer & layer) const override;
    bool                          decides_together() const override { return false; }

    void count_scratch(int64_t change) { scratch_bytes_ += change; }

  private:
    std::atomic<int64_t> scratch_bytes_{ 0 };
};

} // namespace gear
