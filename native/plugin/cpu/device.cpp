#include "plugin/cpu/device.h"

#include "cache/host_side.h"
#include "common/memory.h"
#include "plugin/cpu/backend.h"

#include <cstring>

namespace gear {

cpu_device::cpu_device(const gear_device_params & params, abi::device * inner, int index) : kv_device(params, inner, index, tile_align) {}

// An integrated GPU over the CPU: llama.cpp offloads layers to it when it is asked to, and passes it by when there is a GPU.
int cpu_device::type() const {
    return abi::device_igpu;
}

// Members up to events only: mmap_support is not there in older releases, and weights never live here.
void cpu_device::describe(abi::device_props & props) const {
    props.caps.async = props.caps.host_buffer = props.caps.buffer_from_host_ptr = props.caps.events = false;
}

abi::backend * cpu_device::make_backend() {
    return gear::make_backend(*this);
}

std::unique_ptr<cache_memory> cpu_device::make_memory(size_t nominal) const {
    require_memory(nominal, "the KV cache");
    return std::make_unique<host_memory>(method());
}

void * cpu_device::proc_address(const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(set_backend_threads);
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(set_backend_abort);
    }
    return nullptr;
}

cache_kind cpu_device::kind_of(const cache_layer & layer) const {
    check_exceptions();
    const cache_tensor * k = layer.side[GEAR_SIDE_K].get();
    const cache_tensor * v = layer.side[GEAR_SIDE_V].get();
    if (!k || !k->use.other.empty() || (v ? !v->use.other.empty() : !is_latent(*k))) {
        return cache_kind::f16_other_use;
    }
    if (v ? method().is_f16(k->il) : method().is_f16(k->il, GEAR_SIDE_K)) {
        return cache_kind::f16_asked;
    }
    if (is_window(k->n_cell)) {
        return cache_kind::f16_window;
    }
    const store_shape shape_k = shape(*k), shape_v = shape(v ? *v : *k);
    if (shape_k.n_head == 0 || shape_v.n_head == 0 || !method().has_heads(k->il, shape_k.d_head, shape_v.d_head)) {
        return cache_kind::f16_other_use;
    }
    return method().gains(shape_k, shape_v) ? cache_kind::gear : cache_kind::f16_window;
}

} // namespace gear
