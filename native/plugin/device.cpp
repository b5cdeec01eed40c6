#include "plugin/device.h"

#include "common/error.h"
#include "common/memory.h"
#include "common/settings.h"
#include "plugin/cache_node.h"
#include "plugin/cpu/device.h"
#include "plugin/cuda/device.h"
#include "plugin/kv_session.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

namespace gear {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// ggml's device, buffer type and registry interfaces
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct device_tables {
    static kv_device & of(abi::device * device) { return kv_device::of(device); }
    static kv_device & of(abi::buffer_type * type) { return *static_cast<kv_device *>(abi::context_of(type)); }
    static kv_device & of(abi::reg * reg) { return *static_cast<kv_device *>(reg->context); }

    // device

    static const char * name(abi::device * device) { return of(device).name_.c_str(); }
    static const char * description(abi::device * device) { return of(device).description_.c_str(); }
    static void memory(abi::device * device, size_t * free, size_t * total) { abi::ggml().ggml_backend_dev_memory(of(device).inner_, free, total); }

    static int type(abi::device * device) { return of(device).type(); }

    static void props(abi::device * device, abi::device_props * props) {
        props->name        = name(device);
        props->description = description(device);
        props->type        = type(device);
        props->device_id   = nullptr;
        memory(device, &props->memory_free, &props->memory_total);
        of(device).describe(*props);
    }

    static abi::backend * init_backend(abi::device * device, const char *) {
        abi::backend *    backend = nullptr;
        const gear_status status  = guarded([&] { backend = of(device).make_backend(); });
        if (status != GEAR_OK) {
            of(device).set_error(status, gear_last_error());
        }
        return backend;
    }
    static abi::buffer_type * type_of(abi::device * device) { return &of(device).type_; }

    static bool supports_op(abi::device * device, const abi::tensor * op) {
        kv_device & self = of(device);
        // Never no to an op on our cache: llama.cpp would abort. What it does with the cache decides what the cache becomes. And never yes to one on
        // another device's: here it would be done on a copy of the whole cache in f16.
        if (const kv_device * owner = cache_owner(op)) {
            return owner == &self && observe(op);
        }
        // The loader asks with each weight in a size-0 buffer of our type: no, so that weights stay in the formats of the CPU (mmap, repacked). Those of a
        // GPU go where ggml-cuda has them.
        int       il;
        gear_side side;
        for (const abi::tensor * source : op->src) {
            const abi::tensor * root = source && source->view_src ? source->view_src : source;
            if (!self.takes_weights() && root && root->buf && root->buf->size == 0 && root->buf->buft == &self.type_ &&
                !parse_cache_name(root->name, il, side)) {
                return false;
            }
        }
        return abi::ggml().ggml_backend_dev_supports_op(self.inner_, op);
    }

    static bool supports_buft(abi::device * device, abi::buffer_type * type) {
        kv_device & self = of(device);
        return type == &self.type_ || type == &self.kv_type_ || abi::ggml().ggml_backend_dev_supports_buft(self.inner_, type);
    }

    // buffer types: the default one (compute buffers, and the sizes of the cache) and the one that KV buffers are of

    static const char * type_name(abi::buffer_type * type) {
        return type == &of(type).kv_type_ ? of(type).kv_type_name_.c_str() : of(type).type_name_.c_str();
    }

    static abi::buffer_type * inner_type(abi::buffer_type * type) { return abi::ggml().ggml_backend_dev_buffer_type(of(type).inner_); }

    static abi::buffer * alloc(abi::buffer_type * type, size_t size) {
        kv_device &       self   = of(type);
        abi::buffer *     buffer = nullptr;
        const gear_status status = guarded([&] {
            if (std::exchange(kv_device::lost_sizes_, nullptr) == &self) {
                throw std::bad_alloc();
            }
            if (type == &self.type_ && self.take_sizes(size)) {
                buffer = kv_buffer::make(self, size);
                return;
            }
            buffer = abi::ggml().ggml_backend_buft_alloc_buffer(inner_type(type), size);
            self.made_buffer(buffer);
        });
        if (status != GEAR_OK) {
            self.set_error(status, gear_last_error());
        }
        return buffer;
    }

    static size_t alignment(abi::buffer_type * type) { return of(type).alignment_; }
    static size_t max_size(abi::buffer_type * type) { return abi::ggml().ggml_backend_buft_get_max_size(inner_type(type)); }

    static size_t alloc_size(abi::buffer_type * type, const abi::tensor * tensor) {
        kv_device & self = of(type);
        int         il;
        gear_side   side;
        if (tensor->view_src || tensor->type != abi::number().type_f16 || !parse_cache_name(tensor->name, il, side)) {
            const size_t bytes = abi::ggml().ggml_backend_buft_get_alloc_size(inner_type(type), tensor);
            self.note(type, [&] { self.note_other_size(bytes); });
            return bytes;
        }
        const size_t bytes = self.estimate(tensor, il, side);
        self.note(type, [&] { self.note_cache_size(il, side, bytes); });
        return bytes;
    }

    // Even where it is: llama.cpp's memory fit counts the host's memory apart from a device's, and the cache that it measures is of this type.
    static bool is_host(abi::buffer_type *) { return false; }

    // registry

    static const char *  reg_name(abi::reg *) { return "GEAR"; }
    static size_t        device_count(abi::reg *) { return 1; }
    static abi::device * device_at(abi::reg * reg, size_t) { return &of(reg).device_; }

    static void * proc_address(abi::reg * reg, const char * name) { return of(reg).proc_address(name); }
};

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Making a device
// ---------------------------------------------------------------------------------------------------------------------------------------------

thread_local const kv_device * kv_device::lost_sizes_ = nullptr;

std::unique_ptr<kv_device> kv_device::make(const gear_device_params & params, const char * wanted, int index) {
    abi::device * inner =
        strcmp(wanted, "CPU") == 0 ? abi::ggml().ggml_backend_dev_by_type(abi::device_cpu) : abi::ggml().ggml_backend_dev_by_name(wanted);
    if (!inner) {
        fail(GEAR_ERROR_INVALID, "this llama.cpp has no device '%s'", wanted);
    }
    if (abi::ggml().ggml_backend_dev_type(inner) == abi::device_cpu) {
        return std::make_unique<cpu_device>(params, inner, index);
    }
    if (params.codec) {
        fail(GEAR_ERROR_UNSUPPORTED, "a codec of the caller's runs on the CPU, not on '%s'; set n_gpu_layers=0", wanted);
    }
    return std::make_unique<cuda_device>(params, inner, index);
}

namespace {

cache_method::exceptions exceptions_of(const gear_device_params & params) {
    cache_method::exceptions by_layer;
    for (int i = 0; i < params.n_exception; ++i) {
        if (!by_layer.emplace(params.exceptions[i].il, params.exceptions[i].config).second) {
            fail(GEAR_ERROR_INVALID, "layer %d has settings of its own twice", params.exceptions[i].il);
        }
    }
    return by_layer;
}

} // namespace

kv_device::kv_device(const gear_device_params & params, abi::device * inner, int index, size_t alignment)
    : method_(params.config, params.codec, params.codec_user, exceptions_of(params)), n_ubatch_(params.n_ubatch > 0 ? params.n_ubatch : 512),
      inner_(inner), alignment_(std::max<size_t>(tile_align, alignment)) {
    for (int i = 0; i < params.n_layer; ++i) {
        layers_[params.layers[i].il] = params.layers[i];
    }
    name_         = "GEAR" + std::to_string(index);
    description_  = "GEAR KV cache over " + std::string(abi::ggml().ggml_backend_dev_description(inner_));
    type_name_    = "GEAR_" + std::string(abi::ggml().ggml_backend_dev_name(inner_)) + "_" + std::to_string(index); // llama.cpp keys by this name
    kv_type_name_ = type_name_ + "_KV";

    using tables                  = device_tables;
    device_                       = {};
    device_.iface.get_name        = tables::name;
    device_.iface.get_description = tables::description;
    device_.iface.get_memory      = tables::memory;
    device_.iface.get_type        = tables::type;
    device_.iface.get_props       = tables::props;
    device_.iface.init_backend    = tables::init_backend;
    device_.iface.get_buffer_type = tables::type_of;
    device_.iface.supports_op     = tables::supports_op;
    device_.iface.supports_buft   = tables::supports_buft;
    device_.owner                 = &reg_;
    device_.context               = this;
    reg_                          = { abi::version(), { tables::reg_name, tables::device_count, tables::device_at, tables::proc_address }, this };
    type_                         = abi::make_buffer_type(
        abi::layout(), { tables::type_name, tables::alloc, tables::alignment, tables::max_size, tables::alloc_size, tables::is_host }, &device_, this);
    kv_type_ = type_;
}

kv_device::~kv_device() = default;

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Shapes and sizes
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

size_t padded(size_t bytes, size_t alignment) {
    return (bytes + alignment - 1) / alignment * alignment;
}

} // namespace

store_shape kv_device::shape(const cache_tensor & tensor) const {
    int        n_head = tensor.use.n_head, d_head = tensor.use.d_head;
    const auto known = layers_.find(tensor.il);
    if (known != layers_.end() && n_head == 0) {
        n_head = known->second.n_head_kv;
        d_head = tensor.side == GEAR_SIDE_K ? known->second.d_head_k : known->second.d_head_v;
    }
    if ((int64_t) n_head * d_head != tensor.n_embd) {
        n_head = d_head = 0;
    }
    return method_.shape(tensor.il, tensor.side, n_head, d_head, tensor.n_cell, tensor.n_stream, std::max(n_ubatch_, tensor.use.n_rows));
}

bool kv_device::is_latent(const cache_tensor & k) const {
    const auto known = layers_.find(k.il);
    return k.use.is_latent || (k.use.n_head == 0 && known != layers_.end() && known->second.d_head_v == 0);
}

size_t kv_device::estimate(const abi::tensor * tensor, int il, gear_side side) const {
    const size_t nominal = abi::ggml().ggml_nbytes(tensor);
    if (is_window(tensor->ne[1]) || settings::reports_nominal_sizes()) {
        return nominal;
    }
    size_t            bytes  = nominal;
    const gear_status status = guarded([&] {
        store_shape shape = method_.shape(il, side, 0, 0, tensor->ne[1], (int) tensor->ne[2], n_ubatch_);
        const auto  known = layers_.find(il);
        if (known != layers_.end()) {
            shape.n_head = known->second.n_head_kv;
            shape.d_head = side == GEAR_SIDE_K ? known->second.d_head_k : known->second.d_head_v;
        } else { // not known before the graph: the usual head size, for a figure that is right to a few percent
            shape.d_head = tensor->ne[0] % 128 == 0 ? 128 : tensor->ne[0] % 64 == 0 ? 64 : 32;
            shape.n_head = (int) (tensor->ne[0] / shape.d_head);
        }
        bytes = std::min(nominal, method_.bytes(shape));
    });
    return status == GEAR_OK ? padded(bytes, alignment_) : nominal;
}

// llama.cpp asks for the size of every cache tensor of a KV cache and then allocates their sum. With memory fitting it asks many more times without ever
// allocating. So the questions of each thread are kept, and an allocation is the KV buffer when the last of them, back to some cache tensor, add up to it.
void kv_device::note_cache_size(int il, gear_side side, size_t bytes) {
    constexpr size_t            enough = 4096; // more than any model has cache tensors
    std::lock_guard<std::mutex> guard(mutex_);
    auto &                      log = asked_[std::this_thread::get_id()];
    log.push_back({ true, il, side, padded(bytes, alignment_) });
    last_layer_ = std::max(last_layer_, il);
    if (log.size() > enough) {
        log.pop_front();
    }
}

void kv_device::check_exceptions() const {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto &                by_layer = method_.by_layer();
    if (layers_.empty() && !by_layer.empty() && by_layer.rbegin()->first > last_layer_) {
        fail(GEAR_ERROR_INVALID, "layer %d has settings of its own, but the last layer of this model with a KV cache is %d", by_layer.rbegin()->first,
             last_layer_);
    }
}

void kv_device::note_other_size(size_t bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto                  log = asked_.find(std::this_thread::get_id());
    if (log == asked_.end() || log->second.empty()) {
        return;
    }
    if (log->second.back().is_cache) {
        log->second.push_back({ false, 0, GEAR_SIDE_K, 0 });
    }
    log->second.back().bytes += padded(bytes, alignment_);
}

bool kv_device::take_sizes(size_t size) {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto                  log = asked_.find(std::this_thread::get_id());
    if (log == asked_.end()) {
        return false;
    }
    std::set<std::pair<int, int>> seen;
    size_t                        sum   = 0;
    bool                          mixed = false;
    for (auto ask = log->second.rbegin(); ask != log->second.rend() && sum < size; ++ask) {
        if (ask->is_cache && !seen.insert({ ask->il, ask->side }).second) {
            return false; // an earlier round of questions
        }
        mixed |= !ask->is_cache;
        sum += ask->bytes;
    }
    if (sum != size || seen.empty()) {
        return false;
    }
    asked_.erase(log);
    if (mixed) {
        fail(GEAR_ERROR_UNSUPPORTED, "this model keeps other tensors in the buffer of its KV cache; use kv_type='f16' for it");
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Errors and statistics
// ---------------------------------------------------------------------------------------------------------------------------------------------

void kv_device::set_error(gear_status status, const char * message) noexcept {
    std::lock_guard<std::mutex> guard(mutex_);
    if (error_.status == GEAR_OK) {
        error_.keep(status, message); // the first one is the cause
    }
}

kept_error kv_device::take_error() {
    std::lock_guard<std::mutex> guard(mutex_);
    return std::exchange(error_, kept_error());
}

void kv_device::add(kv_buffer * buffer) {
    std::lock_guard<std::mutex> guard(buffers_mutex_);
    buffers_.insert(buffer);
}

void kv_device::remove(kv_buffer * buffer) {
    std::lock_guard<std::mutex> guard(buffers_mutex_);
    buffers_.erase(buffer);
}

void kv_device::add(kv_session * session) {
    std::lock_guard<std::mutex> guard(mutex_);
    sessions_.insert(session);
}

void kv_device::remove(kv_session * session) {
    std::lock_guard<std::mutex> guard(mutex_);
    sessions_.erase(session);
}

kv_session * kv_device::session_at(const void * data) {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto                  found = std::find_if(sessions_.begin(), sessions_.end(), [&](kv_session * session) { return session->has(data); });
    return found == sessions_.end() ? nullptr : *found;
}

std::string kv_device::other_use(int il) {
    std::lock_guard<std::mutex> none_goes(buffers_mutex_);
    std::string                 name;
    for (kv_buffer * buffer : buffers_) {
        locked_use(buffer->memory(), [&] {
            if (name.empty()) {
                name = buffer->other_use(il);
            }
        });
    }
    return name;
}

std::vector<gear_store_stats> kv_device::stats() {
    std::lock_guard<std::mutex>   none_goes(buffers_mutex_);
    std::vector<gear_store_stats> all;
    for (kv_buffer * buffer : buffers_) {
        locked_use(buffer->memory(), [&] { buffer->stats(all); });
    }
    return all;
}

} // namespace gear
