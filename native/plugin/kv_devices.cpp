#include "plugin/kv_devices.h"

#include "common/error.h"
#include "common/settings.h"
#include "cuda/loader.h"

#include <algorithm>
#include <atomic>

namespace gear {

namespace {

std::atomic<int> n_made{ 0 }; // devices of all models: each has a name of its own

kv_devices & self(abi::reg * reg) {
    return *static_cast<kv_devices *>(reg->context);
}

// Tests name a library whose GPUs are played by the CPU; ggml knows those once it is loaded.
void load_named_library() {
    std::string problem;
    if (settings::cuda_library() && !cuda::load(problem)) { // a test must not pass because it ran without what it names
        fail(GEAR_ERROR_UNSUPPORTED, "%s", problem.c_str());
    }
}

} // namespace

// The CPU, as long as the cache on a GPU is for those who ask for it.
std::string kv_devices::defaults() {
    std::string names;
    if (settings::allows_cuda()) {
        load_named_library();
        for (int i = 0; abi::ggml().ggml_backend_dev_by_name(("CUDA" + std::to_string(i)).c_str()); ++i) {
            names += (i > 0 ? ",CUDA" : "CUDA") + std::to_string(i);
        }
    }
    return names.empty() ? "CPU" : names;
}

kv_devices::kv_devices(const gear_device_params & params) {
    std::string names = params.device ? params.device : defaults();
    if (settings::allows_cuda()) {
        load_named_library();
    }
    while (!names.empty()) {
        const size_t comma = std::min(names.find(','), names.size());
        each_.push_back(kv_device::make(params, names.substr(0, comma).c_str(), n_made++));
        names.erase(0, comma + 1);
    }
    if (each_.empty()) {
        fail(GEAR_ERROR_INVALID, "device is empty: name ggml's devices, as in \"CUDA0,CUDA1\", or leave it NULL");
    }
    // Each device has a registry of its own besides, which ggml asks for functions: those of a CPU and of a GPU are not the same.
    reg_                        = { abi::version(), {}, this };
    reg_.iface.get_name         = [](abi::reg *) { return "GEAR"; };
    reg_.iface.get_device_count = [](abi::reg * reg) { return self(reg).size(); };
    reg_.iface.get_device       = [](abi::reg * reg, size_t i) { return self(reg)[i].ggml_device(); };
    reg_.iface.get_proc_address = [](abi::reg * reg, const char * name) -> void * {
        const abi::reg * first = self(reg)[0].ggml_device()->owner;
        return first->iface.get_proc_address(const_cast<abi::reg *>(first), name);
    };
}

// What failed on one device may have made calls to others fail: one error is told, and none is left over for a call that has nothing to do with it.
kept_error kv_devices::take_error() {
    kept_error first;
    for (const auto & device : each_) {
        const kept_error error = device->take_error();
        if (first.status == GEAR_OK) {
            first = error;
        }
    }
    return first;
}

std::vector<gear_store_stats> kv_devices::stats() {
    std::vector<gear_store_stats> all;
    for (const auto & device : each_) {
        const auto some = device->stats();
        all.insert(all.end(), some.begin(), some.end());
    }
    return all;
}

std::string kv_devices::other_use(int il) {
    std::string name;
    for (const auto & device : each_) {
        if (name.empty()) {
            name = device->other_use(il);
        }
    }
    return name;
}

int64_t kv_devices::scratch_bytes() const {
    int64_t sum = 0;
    for (const auto & device : each_) {
        sum += device->scratch_bytes();
    }
    return sum;
}

} // namespace gear
