#include "plugin/cuda/device.h"

#include "cache/cuda_side.h"
#include "common/error.h"
#include "common/settings.h"
#include "cuda/loader.h"
#include "plugin/cuda/backend.h"
#include "plugin/cuda/index_uploads.h"

#include <cstdio>
#include <cstring>

namespace gear {

namespace {

const cuda::api & table_for(abi::device * inner) {
    const char * name = abi::ggml().ggml_backend_dev_name(inner);
    if (strncmp(name, "CUDA", 4) != 0) {
        fail(GEAR_ERROR_UNSUPPORTED, "device '%s' is neither a CPU nor one of ggml's CUDA devices, and gearcpp keeps a GEAR cache on those only", name);
    }
    if (!settings::allows_cuda()) {
        fail(GEAR_ERROR_UNSUPPORTED,
             "a GEAR cache on '%s' has not been proven on a GPU yet; set GEARCPP_CUDA=1 to try it, or leave the cache on the CPU (n_gpu_layers=0)", name);
    }
    if (settings::ggml_cuda_forks_streams()) {
        fail(GEAR_ERROR_UNSUPPORTED, "GGML_CUDA_GRAPH_OPT=1 does not go together with a GEAR cache; unset it");
    }
    std::string       problem;
    const cuda::api * table = cuda::load(problem);
    if (!table) {
        fail(GEAR_ERROR_UNSUPPORTED, "%s", problem.c_str());
    }
    return *table;
}

// CUDA's number of ggml's device: where its buffers lie. Not out of the name, for whatever CUDA_VISIBLE_DEVICES and ggml make of the order.
int number_of(const cuda::api & with, abi::device * inner) {
    abi::buffer * probe = abi::ggml().ggml_backend_buft_alloc_buffer(abi::ggml().ggml_backend_dev_buffer_type(inner), 256);
    if (!probe) {
        fail(GEAR_ERROR_MEMORY, "ggml could not allocate 256 bytes on '%s'", abi::ggml().ggml_backend_dev_name(inner));
    }
    int       number = -1;
    const int error  = with.device_of_address(abi::ggml().ggml_backend_buffer_get_base(probe), &number);
    abi::ggml().ggml_backend_buffer_free(probe);
    require_ok(with, error, "asking where a buffer lies");
    if (number < 0) {
        fail(GEAR_ERROR_UNSUPPORTED, "buffers of '%s' do not lie in a GPU's memory", abi::ggml().ggml_backend_dev_name(inner));
    }
    return number;
}

abi::device * wrapped(abi::device * device) {
    return kv_device::of(device).inner();
}

size_t alignment_of(abi::device * inner) {
    return abi::ggml().ggml_backend_buft_get_alignment(abi::ggml().ggml_backend_dev_buffer_type(inner));
}

} // namespace

cuda_device::cuda_device(const gear_device_params & params, abi::device * inner, int index)
    : kv_device(params, inner, index, alignment_of(inner)), worker_(table_for(inner), number_of(table_for(inner), inner)) {
    // Members of the device's table that a CUDA device has and a CPU has not, forwarded.
    abi::device_i &       iface = device_.iface;
    const abi::device_i & of    = inner->iface;
    if (of.get_host_buffer_type) {
        iface.get_host_buffer_type = [](abi::device * d) { return wrapped(d)->iface.get_host_buffer_type(wrapped(d)); };
    }
    if (of.offload_op) {
        iface.offload_op = [](abi::device * d, const abi::tensor * op) { return wrapped(d)->iface.offload_op(wrapped(d), op); };
    }
    if (of.event_new && of.event_free && of.event_synchronize) {
        iface.event_new         = [](abi::device * d) { return wrapped(d)->iface.event_new(wrapped(d)); };
        iface.event_free        = [](abi::device * d, abi::event * e) { wrapped(d)->iface.event_free(wrapped(d), e); };
        iface.event_synchronize = [](abi::device * d, abi::event * e) { wrapped(d)->iface.event_synchronize(wrapped(d), e); };
    }
}

int cuda_device::type() const {
    return abi::device_gpu;
}

void cuda_device::describe(abi::device_props & props) const {
    abi::device_props of[2] = {}; // room for members that a later release may add
    inner()->iface.get_props(inner(), of);
    props.device_id = of->device_id;
    props.caps      = of->caps;
}

abi::backend * cuda_device::make_backend() {
    return gear::make_backend(*this);
}

std::unique_ptr<cache_memory> cuda_device::make_memory(size_t) const {
    return std::make_unique<cuda_memory>(worker_, lock_, method());
}

void cuda_device::made_buffer(abi::buffer * buffer) {
    keep_index_uploads(buffer);
}

// The backend is the wrapped one's structure, so its functions serve.
void * cuda_device::proc_address(const char * name) {
    if (strcmp(name, "ggml_backend_split_buffer_type") == 0) {
        return nullptr; // llama.cpp refuses to split weights by rows then: the half of a layer has no cache of its own
    }
    if (strcmp(name, "ggml_backend_comm_init") == 0) { // asked for once by a device of ggml's that cuts every tensor up over several of ours
        constexpr const char * reason = "split mode 'tensor' cuts a layer's cache up over GPUs, which a GEAR cache does not support; split by layers";
        set_error(GEAR_ERROR_UNSUPPORTED, reason); // fails the first graph
        fprintf(stderr, "gearcpp: %s\n", reason);
        return nullptr;
    }
    return abi::ggml().ggml_backend_reg_get_proc_address(abi::ggml().ggml_backend_dev_backend_reg(inner()), name);
}

int64_t cuda_device::scratch_bytes() const {
    const std::lock_guard<std::mutex> guard(lock_);
    return (int64_t) worker_.scratch_bytes();
}

cache_kind cuda_device::kind_of(const cache_layer & layer) const {
    for (const auto & tensor : layer.side) {
        if (tensor && shape(*tensor).n_head == 0) {
            fail(GEAR_ERROR_UNSUPPORTED, "layer %d: its head size is not known; on a GPU gearcpp needs the model's head table (use gearcpp.Llama)",
                 tensor->il);
        }
    }
    if (const auto & k = layer.side[GEAR_SIDE_K]; k && !layer.side[GEAR_SIDE_V]) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: latent attention (MLA), whose V is a part of K, is on the CPU only; set n_gpu_layers=0", k->il);
    }
    return cache_kind::gear;
}

} // namespace gear
