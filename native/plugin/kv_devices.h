// kv_devices.h - what llama.cpp is given for one model: a kv_device for each ggml device that its layers may be on, all of one configuration.
#pragma once

#include "plugin/device.h"

#include <memory>
#include <string>
#include <vector>

namespace gear {

class kv_devices {
  public:
    // Throws gear::error. ggml must be open.
    explicit kv_devices(const gear_device_params & params);
    kv_devices(const kv_devices &)             = delete;
    kv_devices & operator=(const kv_devices &) = delete;

    kv_device & operator[](size_t i) const { return *each_[i]; }
    size_t      size() const { return each_.size(); }
    auto        begin() const { return each_.begin(); }
    auto        end() const { return each_.end(); }

    // A registry that lists them all, for programs that load this library as a ggml backend.
    abi::reg * ggml_reg() { return &reg_; }

    kept_error                    take_error(); // of any of them; status GEAR_OK when there was none
    std::vector<gear_store_stats> stats();
    std::string                   other_use(int il); // on a layer's cache: an operation that GEAR does not cover, "" for none
    int64_t                       scratch_bytes() const;

    // The names of ggml's devices that are wrapped when the caller names none, with commas between them.
    static std::string defaults();

  private:
    std::vector<std::unique_ptr<kv_device>> each_;
    abi::reg                                reg_;
};

} // namespace gear
