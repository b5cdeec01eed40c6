#include "plugin/kv_buffer.h"

#include "common/error.h"
#include "plugin/cache_bytes.h"
#include "plugin/device.h"
#include "plugin/kv_session.h"
#include "plugin/report.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

namespace gear {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Cache tensors
// ---------------------------------------------------------------------------------------------------------------------------------------------

bool parse_cache_name(const char * name, int & il, gear_side & side) {
    char letter = 0;
    int  used   = 0;
    if (sscanf(name, "cache_%c_l%d%n", &letter, &il, &used) != 2 || name[used] != '\0' || il < 0 || (letter != 'k' && letter != 'v')) {
        return false;
    }
    side = letter == 'k' ? GEAR_SIDE_K : GEAR_SIDE_V;
    return true;
}

cache_tensor::cache_tensor(kv_buffer & home, const abi::tensor * tensor, int il, gear_side side)
    : home(home), il(il), side(side), n_embd(tensor->ne[0]), n_cell(tensor->ne[1]), n_stream((int) tensor->ne[2]), space(abi::ggml().ggml_nbytes(tensor)) {
}

void cache_tensor::read_store(int n_threads, const side_cache::reader & f) {
    locked_use(home.memory(), [&] {
        cache->pack_full(n_threads);
        cache->read_store(f);
    });
}

void cache_tensor::change_store(const side_cache::changer & f) {
    locked_use(home.memory(), [&] {
        home.decide(il);
        if (cache) {
            cache->change_store(f);
            return;
        }
        f(nullptr, nullptr, [&](int64_t n, const int64_t * cells, const uint16_t * rows) {
            for (int64_t i = 0; i < n; ++i) {
                f16->set((size_t) (cells[i] * row_bytes()), rows + i * n_embd, (size_t) row_bytes());
            }
        });
    });
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// ggml's buffer interface
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

kv_buffer & self(abi::buffer * buffer) {
    return *static_cast<kv_buffer *>(buffer->context);
}

// What goes wrong here cannot be returned through ggml's interface: it is kept in the device and fails the next graph.
template <class F> gear_status reported(kv_buffer & buffer, F && f) {
    const gear_status status = guarded(f);
    if (status != GEAR_OK) {
        buffer.device().set_error(status, gear_last_error());
    }
    return status;
}

// The buffer is locked, because statistics may be asked for by another thread at any time.
template <class F> gear_status locked_and_reported(kv_buffer & buffer, F && f) {
    return reported(buffer, [&] { locked_use(buffer.memory(), f); });
}

void free_buffer(abi::buffer * buffer) {
    delete &self(buffer);
}

void * get_base(abi::buffer * buffer) {
    return self(buffer).base();
}

int init_tensor(abi::buffer * buffer, abi::tensor * tensor) {
    if (tensor->view_src) {
        return abi::graph_success;
    }
    return locked_and_reported(self(buffer), [&] { self(buffer).add(tensor); }) == GEAR_OK ? abi::graph_success : abi::graph_failed;
}

void memset_tensor(abi::buffer * buffer, abi::tensor * tensor, uint8_t value, size_t offset, size_t size) {
    locked_and_reported(self(buffer), [&] { self(buffer).fill(tensor, value, offset, size); });
}

void set_tensor(abi::buffer * buffer, abi::tensor * tensor, const void * data, size_t offset, size_t size) {
    locked_and_reported(self(buffer), [&] { self(buffer).set(tensor, data, offset, size); });
}

void get_tensor(abi::buffer * buffer, const abi::tensor * tensor, void * data, size_t offset, size_t size) {
    locked_and_reported(self(buffer), [&] { self(buffer).get(tensor, data, offset, size); });
}

bool cpy_tensor(abi::buffer * buffer, const abi::tensor * source, abi::tensor * target) {
    bool              done   = false;
    kv_buffer * const origin = kv_buffer::of(source);
    const auto        copy   = [&] { done = self(buffer).copy(source, target); };
    if (!origin || &origin->memory().lock() == &self(buffer).memory().lock()) {
        locked_and_reported(self(buffer), copy);
        return done;
    }
    reported(self(buffer), [&] { // of another context: both are locked, in one order for all threads
        const std::scoped_lock guard(origin->memory().lock(), self(buffer).memory().lock());
        self(buffer).memory().use(copy);
    });
    return done;
}

void clear(abi::buffer * buffer, uint8_t value) {
    locked_and_reported(self(buffer), [&] { self(buffer).clear(value); });
}

} // namespace

abi::buffer * kv_buffer::make(kv_device & device, size_t size) {
    abi::buffer_i iface  = {};
    iface.free_buffer    = free_buffer;
    iface.get_base       = get_base;
    iface.init_tensor    = init_tensor;
    iface.memset_tensor  = memset_tensor;
    iface.set_tensor     = set_tensor;
    iface.get_tensor     = get_tensor;
    iface.cpy_tensor     = cpy_tensor;
    iface.clear          = gear::clear;
    auto          buffer = std::make_unique<kv_buffer>(device, size);
    abi::buffer * made   = abi::ggml().ggml_backend_buffer_init(device.kv_type(), iface, buffer.get(), size);
    buffer.release();
    return made;
}

kv_buffer * kv_buffer::of(const abi::tensor * tensor) {
    const abi::tensor * root = tensor->view_src ? tensor->view_src : tensor;
    return root->buf && root->buf->iface.free_buffer == free_buffer ? &self(root->buf) : nullptr;
}

namespace {

// Of a tensor in a kv_buffer.
cache_tensor & tensor_of(const abi::tensor * view) {
    const abi::tensor * root = view->view_src ? view->view_src : view;
    return *static_cast<cache_tensor *>(root->extra);
}

} // namespace

cache_tensor * kv_buffer::find(const abi::tensor * tensor) {
    return of(tensor) && !tensor_of(tensor).is_ordinary() ? &tensor_of(tensor) : nullptr;
}

kv_buffer::kv_buffer(kv_device & device, size_t size) : device_(device), base_(size), memory_(device.make_memory(size)) {
    device_.add(this);
}

kv_buffer::~kv_buffer() {
    device_.remove(this);
    report_freed(*this);
}

void kv_buffer::add(abi::tensor * tensor) {
    int       il;
    gear_side side;
    if (!parse_cache_name(tensor->name, il, side)) {
        fail(GEAR_ERROR_UNSUPPORTED, "tensor '%s' was put into the KV buffer, but it is no cache tensor", tensor->name);
    }
    auto & added = layers_[il].side[side];
    added        = std::make_unique<cache_tensor>(*this, tensor, il, side);
    if (device_.is_ordinary(added->n_cell)) {
        make_f16(*added, cache_kind::f16_window);
    }
    tensor->data  = added->data();
    tensor->extra = added.get();
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// What a layer becomes
// ---------------------------------------------------------------------------------------------------------------------------------------------

void kv_buffer::make_f16(cache_tensor & tensor, cache_kind kind) {
    tensor.f16  = &memory_->make_f16(tensor.space);
    tensor.kind = kind;
}

void kv_buffer::decide(cache_layer & layer) {
    for (auto & tensor : layer.side) {
        if (!tensor || tensor->kind != cache_kind::undecided) {
            continue;
        }
        const cache_kind kind = device_.kind_of(layer);
        if (kind != cache_kind::gear) {
            make_f16(*tensor, kind);
            continue;
        }
        tensor->cache = &memory_->make_side(device_.shape(*tensor));
        tensor->kind  = tensor->cache->has_codec() ? kind : cache_kind::f16_asked;
    }
}

void kv_buffer::decide(int il) {
    decide(layers_.at(il));
    if (!device_.decides_together()) {
        return;
    }
    const auto is_known = [&](const std::unique_ptr<cache_tensor> & tensor) { return !tensor || device_.shape(*tensor).n_head != 0; };
    for (auto & entry : layers_) {
        if (is_known(entry.second.side[GEAR_SIDE_K]) && is_known(entry.second.side[GEAR_SIDE_V])) {
            decide(entry.second);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Bytes in and out: any range, as llama.cpp saves, restores and clears
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

size_t offset_in(const cache_tensor & tensor, const abi::tensor * view, size_t offset) {
    return (size_t) (static_cast<const char *>(view->data) - tensor.data()) + offset;
}

row_range rows_at(const cache_tensor & tensor, const abi::tensor * view, size_t offset, size_t size) {
    return rows_of(offset_in(tensor, view, offset), size, tensor.space.size(), (size_t) tensor.row_bytes());
}

} // namespace

void kv_buffer::write_rows(cache_tensor & tensor, int64_t cell, int64_t n, const uint16_t * rows) {
    std::vector<int64_t> cells;
    for_each_run(rows, n, tensor.n_embd, device_.n_ubatch(), [&](int64_t begin, int64_t n_now, bool is_zero) {
        if (is_zero) {
            tensor.cache->erase(cell + begin, n_now);
            return;
        }
        cells.resize((size_t) n_now);
        std::iota(cells.begin(), cells.end(), cell + begin);
        tensor.cache->write(n_now, cells.data(), rows + begin * tensor.n_embd);
    });
}

void kv_buffer::set(const abi::tensor * view, const void * data, size_t offset, size_t size) {
    cache_tensor &  tensor  = tensor_of(view);
    const row_range range   = rows_at(tensor, view, offset, size);
    kv_session *    session = device_.session_at(data);
    if (session && session->note_restored(tensor, range, size, data)) {
        return;
    }
    if (tensor.kind == cache_kind::undecided) {
        if (all_zero(static_cast<const char *>(data), (int64_t) size)) {
            return; // clearing what was never written
        }
        decide(tensor.il);
    }
    if (tensor.f16) {
        tensor.f16->set(offset_in(tensor, view, offset), data, size);
        return;
    }
    if (is_whole(range, size, (size_t) tensor.row_bytes(), data)) {
        write_rows(tensor, range.first, range.n, static_cast<const uint16_t *>(data));
        return;
    }
    std::vector<uint16_t> rows((size_t) (range.n * tensor.n_embd));
    tensor.cache->read(range.first, range.n, rows.data());
    memcpy(reinterpret_cast<char *>(rows.data()) + range.skip, data, size);
    write_rows(tensor, range.first, range.n, rows.data());
}

void kv_buffer::get(const abi::tensor * view, void * data, size_t offset, size_t size) {
    cache_tensor &  tensor  = tensor_of(view);
    const row_range range   = rows_at(tensor, view, offset, size);
    kv_session *    session = device_.session_at(data);
    if (session && session->note_saved(tensor, range, size, data)) {
        return;
    }
    if (tensor.kind == cache_kind::undecided) {
        memset(data, 0, size);
        return;
    }
    if (tensor.f16) {
        tensor.f16->get(offset_in(tensor, view, offset), data, size);
        return;
    }
    if (is_whole(range, size, (size_t) tensor.row_bytes(), data)) {
        tensor.cache->read(range.first, range.n, static_cast<uint16_t *>(data));
        return;
    }
    std::vector<uint16_t> rows((size_t) (range.n * tensor.n_embd));
    tensor.cache->read(range.first, range.n, rows.data());
    memcpy(data, reinterpret_cast<const char *>(rows.data()) + range.skip, size);
}

void kv_buffer::fill(const abi::tensor * view, uint8_t value, size_t offset, size_t size) {
    constexpr size_t  chunk = (size_t) 1 << 20;
    std::vector<char> bytes(std::min(size, chunk), (char) value);
    for (size_t done = 0; done < size; done += chunk) {
        set(view, bytes.data(), offset + done, std::min(chunk, size - done));
    }
}

// Copies of whole streams (seq_cp) keep their tiles. Anything else goes through f16, which ggml does when we say no.
bool kv_buffer::copy(const abi::tensor * source_view, const abi::tensor * target_view) {
    const cache_tensor * source = find(source_view);
    cache_tensor *       target = find(target_view);
    if (!source || !target || source->side != target->side) {
        return false;
    }
    const auto stream_of = [](const cache_tensor & tensor, const abi::tensor * view) {
        const size_t stream = (size_t) tensor.stream_bytes(), offset = offset_in(tensor, view, 0);
        return view->ne[0] == tensor.n_embd && view->ne[1] == tensor.n_cell && view->ne[2] == 1 && offset % stream == 0 ? (int) (offset / stream) : -1;
    };
    const int from = stream_of(*source, source_view), to = stream_of(*target, target_view);
    if (from < 0 || to < 0 || source->kind == cache_kind::undecided) {
        return false;
    }
    if (target->kind == cache_kind::undecided) {
        target->use = source->use;
        decide(target->il);
    }
    return source->cache && target->cache && target->cache->copy_stream(from, *source->cache, to);
}

void kv_buffer::clear(uint8_t value) {
    for (const auto & entry : layers_) {
        for (const auto & tensor : entry.second.side) {
            if (tensor && !tensor->f16 && value != 0) {
                fail(GEAR_ERROR_UNSUPPORTED, "a GEAR cache can be cleared to zero only, not to %d", value);
            }
        }
    }
    memory_->clear(value);
}

std::string kv_buffer::other_use(int il) const {
    const auto layer = layers_.find(il);
    if (layer == layers_.end()) {
        return {};
    }
    for (const auto & tensor : layer->second.side) {
        if (tensor && !tensor->use.other.empty()) {
            return tensor->use.other;
        }
    }
    return {};
}

void kv_buffer::stats(std::vector<gear_store_stats> & out) {
    for (const auto & entry : layers_) {
        decide(entry.first);
    }
    for (const auto & entry : layers_) {
        for (const auto & tensor : entry.second.side) {
            if (!tensor) {
                continue;
            }
            gear_store_stats s = {};
            if (tensor->cache) {
                s = tensor->cache->stats();
            } else {
                const store_shape shape = device_.shape(*tensor);
                s.n_head_kv             = shape.n_head;
                s.d_head                = shape.d_head;
                s.n_stream              = tensor->n_stream;
                s.n_cell                = tensor->n_cell;
                s.bytes_exact           = (int64_t) tensor->space.size();
                s.bytes_f16             = (int64_t) tensor->space.size();
                s.bits_per_element      = 16;
                s.worst_head            = -1;
            }
            s.il   = tensor->il;
            s.side = tensor->side;
            s.kind = (int32_t) tensor->kind;
            out.push_back(s);
        }
    }
}

} // namespace gear
