#include "plugin/kv_buffer.h"

#include "codec/codec.h"
#include "common/error.h"
#include "common/memory.h"
#include "plugin/cache_bytes.h"
#include "plugin/device.h"
#include "plugin/kv_session.h"
#include "plugin/report.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <sys/mman.h>

namespace gear {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Addresses
// ---------------------------------------------------------------------------------------------------------------------------------------------

address_range::address_range(size_t bytes) : size_(std::max<size_t>(bytes, 1)) {
    void * range = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {
        fail(GEAR_ERROR_MEMORY, "could not reserve %.1f MiB of address space for the KV cache; is the address space limited (ulimit -v)?",
             size_ / 1048576.0);
    }
    data_ = static_cast<char *>(range);
}

address_range::~address_range() {
    munmap(data_, size_);
}

void address_range::commit() {
    if (mprotect(data_, size_, PROT_READ | PROT_WRITE) != 0) {
        fail(GEAR_ERROR_MEMORY, "not enough memory for %.1f MiB of f16 KV cache; use a smaller n_ctx", size_ / 1048576.0);
    }
}

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

cache_tensor::cache_tensor(kv_buffer & home, abi::tensor * tensor, int il, gear_side side)
    : session_tensor(il, side, tensor->ne[0]), home(home), n_cell(tensor->ne[1]), n_stream((int) tensor->ne[2]), space(abi::ggml().ggml_nbytes(tensor)) {}

void cache_tensor::read_store(int n_threads, const reader & f) {
    std::lock_guard<std::mutex> guard(home.lock);
    bool                        ok = true;
    run_team(n_threads, [&](const team & t) {
        const bool done = rows->flush(t, true);
        if (t.ith == 0) {
            ok = done;
        }
    });
    if (!ok) {
        throw error(rows->status(), rows->message());
    }
    f(*rows, codec.get());
}

void cache_tensor::change_store(const changer & f) {
    std::lock_guard<std::mutex> guard(home.lock);
    home.settle(il);
    f(rows.get(), codec.get(), [&](int64_t n, const int64_t * cells, const uint16_t * from) { home.write_cells(*this, n, cells, from); });
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// ggml's buffer interface
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

kv_buffer & self(abi::buffer * buffer) {
    return *static_cast<kv_buffer *>(buffer->context);
}

// What goes wrong here cannot be returned through ggml's interface: it is kept in the device and fails the next graph.
// The buffer is locked, because statistics may be asked for by another thread at any time.
template <class F> gear_status reported(kv_buffer & buffer, F && f) {
    const gear_status status = guarded([&] {
        std::lock_guard<std::mutex> guard(buffer.lock);
        f();
    });
    if (status != GEAR_OK) {
        buffer.device().set_error(status, gear_last_error());
    }
    return status;
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
    return reported(self(buffer), [&] { self(buffer).add(tensor); }) == GEAR_OK ? abi::graph_success : abi::graph_failed;
}

void memset_tensor(abi::buffer * buffer, abi::tensor * tensor, uint8_t value, size_t offset, size_t size) {
    reported(self(buffer), [&] { self(buffer).fill(tensor, value, offset, size); });
}

void set_tensor(abi::buffer * buffer, abi::tensor * tensor, const void * data, size_t offset, size_t size) {
    reported(self(buffer), [&] { self(buffer).set(tensor, data, offset, size); });
}

void get_tensor(abi::buffer * buffer, const abi::tensor * tensor, void * data, size_t offset, size_t size) {
    reported(self(buffer), [&] { self(buffer).get(tensor, data, offset, size); });
}

bool cpy_tensor(abi::buffer * buffer, const abi::tensor * source, abi::tensor * target) {
    bool              done   = false;
    kv_buffer * const origin = kv_buffer::of(source);
    if (origin && origin != &self(buffer)) { // of another context: both are locked, in one order for all threads
        const gear_status status = guarded([&] {
            std::scoped_lock guard(origin->lock, self(buffer).lock);
            done = self(buffer).copy(source, target);
        });
        if (status != GEAR_OK) {
            self(buffer).device().set_error(status, gear_last_error());
        }
        return done;
    }
    reported(self(buffer), [&] { done = self(buffer).copy(source, target); });
    return done;
}

void clear(abi::buffer * buffer, uint8_t value) {
    reported(self(buffer), [&] { self(buffer).clear(value); });
}

} // namespace

abi::buffer * kv_buffer::make(kv_device & device, size_t size) {
    abi::buffer_i iface = {};
    iface.free_buffer   = free_buffer;
    iface.get_base      = get_base;
    iface.init_tensor   = init_tensor;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor    = set_tensor;
    iface.get_tensor    = get_tensor;
    iface.cpy_tensor    = cpy_tensor;
    iface.clear         = gear::clear;
    require_memory(size, "the KV cache");
    auto          buffer = std::make_unique<kv_buffer>(device, size);
    abi::buffer * made   = abi::ggml().ggml_backend_buffer_init(device.kv_type(), iface, buffer.get(), size);
    buffer.release();
    return made;
}

kv_buffer * kv_buffer::of(const abi::tensor * tensor) {
    const abi::tensor * root = tensor->view_src ? tensor->view_src : tensor;
    return root->buf && root->buf->iface.free_buffer == free_buffer ? &self(root->buf) : nullptr;
}

cache_tensor * kv_buffer::find(const abi::tensor * tensor) {
    const abi::tensor * root = tensor->view_src ? tensor->view_src : tensor;
    return of(tensor) ? static_cast<cache_tensor *>(root->extra) : nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Life
// ---------------------------------------------------------------------------------------------------------------------------------------------

kv_buffer::kv_buffer(kv_device & device, size_t size) : device_(device), base_(size) {
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
    auto & place  = layers_[il].side[side];
    place         = std::make_unique<cache_tensor>(*this, tensor, il, side);
    tensor->data  = place->space.data();
    tensor->extra = place.get();
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Settling
// ---------------------------------------------------------------------------------------------------------------------------------------------

cache_kind kv_buffer::decide(const cache_layer & layer) const {
    const cache_tensor * k = layer.side[GEAR_SIDE_K].get();
    const cache_tensor * v = layer.side[GEAR_SIDE_V].get();
    if (!k || !v || !k->use.other.empty() || !v->use.other.empty()) {
        return cache_kind::f16_other_use;
    }
    const gear_config & config = device_.config();
    if (config.k.bits == 16 && config.v.bits == 16) {
        return cache_kind::f16_asked;
    }
    if (device_.is_window(k->n_cell)) {
        return cache_kind::f16_window;
    }
    const store_shape shape_k = device_.shape(*k), shape_v = device_.shape(*v);
    if (shape_k.n_head == 0 || shape_v.n_head == 0 || gear_head_check(&config, shape_k.d_head, shape_v.d_head) != GEAR_OK) {
        return cache_kind::f16_other_use;
    }
    return cache_kind::gear;
}

void kv_buffer::settle(int il) {
    auto & layer = layers_.at(il);
    for (auto & tensor : layer.side) {
        if (!tensor || tensor->kind != cache_kind::undecided) {
            continue;
        }
        const cache_kind kind = decide(layer);
        if (kind == cache_kind::gear) {
            const store_shape shape = device_.shape(*tensor);
            tensor->codec           = device_.make_codec(shape, tensor->layout);
            tensor->rows            = std::make_unique<store>(shape, tensor->codec);
            tensor->kind            = tensor->codec ? kind : cache_kind::f16_asked;
        } else {
            tensor->space.commit();
            tensor->kind = kind;
        }
    }
}

void kv_buffer::settle_all() {
    for (auto & entry : layers_) {
        settle(entry.first);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Bytes in and out: any range, as llama.cpp saves, restores and clears
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

row_range rows_at(const cache_tensor & tensor, const abi::tensor * view, size_t offset, size_t size) {
    return rows_of((size_t) (static_cast<const char *>(view->data) - tensor.space.data()) + offset, size, tensor.space.size(),
                   (size_t) tensor.row_bytes());
}

} // namespace

void kv_buffer::write_cells(cache_tensor & tensor, int64_t n, const int64_t * cells, const uint16_t * rows) {
    if (!tensor.is_store()) {
        for (int64_t i = 0; i < n; ++i) {
            memcpy(tensor.space.data() + cells[i] * tensor.row_bytes(), rows + i * tensor.n_embd, (size_t) tensor.row_bytes());
        }
        return;
    }
    for (int64_t begin = 0, n_now = 0; begin < n; begin += n_now) {
        n_now                    = std::min<int64_t>(n - begin, device_.n_ubatch());
        const row_source  source = { rows + begin * tensor.n_embd, (size_t) tensor.row_bytes(), true };
        const cell_source where  = { cells + begin, sizeof(int64_t), true };
        bool              ok     = true;
        run_team(1, [&](const team & t) { ok = tensor.rows->write(t, n_now, where, source); });
        if (!ok) {
            throw error(tensor.rows->status(), tensor.rows->message());
        }
    }
}

void kv_buffer::write_rows(cache_tensor & tensor, int64_t cell, int64_t n, const uint16_t * rows) {
    std::vector<int64_t> cells;
    for_each_run(rows, n, tensor.n_embd, device_.n_ubatch(), [&](int64_t begin, int64_t n_now, bool is_zero) {
        if (is_zero) {
            tensor.rows->erase(cell + begin, n_now);
            return;
        }
        cells.resize((size_t) n_now);
        std::iota(cells.begin(), cells.end(), cell + begin);
        write_cells(tensor, n_now, cells.data(), rows + begin * tensor.n_embd);
    });
}

void kv_buffer::set(const abi::tensor * view, const void * data, size_t offset, size_t size) {
    cache_tensor & tensor  = *find(view);
    kv_session *   session = device_.session_at(data);
    if (session && session->note_restored(tensor, rows_at(tensor, view, offset, size), size, data)) {
        return;
    }
    if (tensor.kind == cache_kind::undecided) {
        if (all_zero(static_cast<const char *>(data), (int64_t) size)) {
            return; // clearing what was never written
        }
        settle(tensor.il);
    }
    if (!tensor.is_store()) {
        memcpy(static_cast<char *>(view->data) + offset, data, size);
        return;
    }
    const row_range range = rows_at(tensor, view, offset, size);
    if (is_whole(range, size, (size_t) tensor.row_bytes(), data)) {
        write_rows(tensor, range.first, range.n, static_cast<const uint16_t *>(data));
        return;
    }
    std::vector<uint16_t> rows((size_t) (range.n * tensor.n_embd));
    tensor.rows->read(range.first, range.n, rows.data());
    memcpy(reinterpret_cast<char *>(rows.data()) + range.skip, data, size);
    write_rows(tensor, range.first, range.n, rows.data());
}

void kv_buffer::get(const abi::tensor * view, void * data, size_t offset, size_t size) {
    cache_tensor & tensor  = *find(view);
    kv_session *   session = device_.session_at(data);
    if (session && session->note_saved(tensor, rows_at(tensor, view, offset, size), size, data)) {
        return;
    }
    if (tensor.kind == cache_kind::undecided) {
        memset(data, 0, size);
        return;
    }
    if (!tensor.is_store()) {
        memcpy(data, static_cast<const char *>(view->data) + offset, size);
        return;
    }
    const row_range range = rows_at(tensor, view, offset, size);
    if (is_whole(range, size, (size_t) tensor.row_bytes(), data)) {
        tensor.rows->read(range.first, range.n, static_cast<uint16_t *>(data));
        return;
    }
    std::vector<uint16_t> rows((size_t) (range.n * tensor.n_embd));
    tensor.rows->read(range.first, range.n, rows.data());
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
    if (!source || !target) {
        return false;
    }
    const auto stream_of = [](const cache_tensor & tensor, const abi::tensor * view) {
        const size_t stream = (size_t) (tensor.n_cell * tensor.row_bytes()), offset = (size_t) (static_cast<char *>(view->data) - tensor.space.data());
        return view->ne[0] == tensor.n_embd && view->ne[1] == tensor.n_cell && view->ne[2] == 1 && offset % stream == 0 ? (int) (offset / stream) : -1;
    };
    const int from = stream_of(*source, source_view), to = stream_of(*target, target_view);
    if (from < 0 || to < 0 || source->kind == cache_kind::undecided) {
        return false;
    }
    if (target->kind == cache_kind::undecided) {
        target->use = source->use;
        settle(target->il);
    }
    if (!source->is_store() || !target->is_store()) {
        return false;
    }
    const store_shape a = source->rows->shape(), b = target->rows->shape();
    if (a.n_head != b.n_head || a.d_head != b.d_head || a.n_cell != b.n_cell || a.tile != b.tile || source->side != target->side ||
        source->rows->tile_bytes() != target->rows->tile_bytes()) {
        return false;
    }
    target->rows->copy_stream(from, *source->rows, to);
    return true;
}

void kv_buffer::clear(uint8_t value) {
    for (auto & entry : layers_) {
        for (auto & tensor : entry.second.side) {
            if (!tensor || (tensor->kind == cache_kind::undecided && value == 0)) {
                continue;
            }
            if (tensor->is_store() && value == 0) {
                tensor->rows->clear();
            } else if (tensor->is_store() || tensor->kind == cache_kind::undecided) {
                fail(GEAR_ERROR_UNSUPPORTED, "a GEAR cache can be cleared to zero only, not to %d", value);
            } else {
                memset(tensor->space.data(), value, tensor->space.size());
            }
        }
    }
}

void kv_buffer::stats(std::vector<gear_store_stats> & out) {
    settle_all();
    for (const auto & entry : layers_) {
        for (const auto & tensor : entry.second.side) {
            if (!tensor) {
                continue;
            }
            gear_store_stats s = {};
            if (tensor->is_store()) {
                s = tensor->rows->stats();
            } else {
                const store_shape shape = device_.shape(*tensor);
                s.n_head_kv             = shape.n_head;
                s.d_head                = shape.d_head;
                s.n_stream              = tensor->n_stream;
                s.n_cell                = tensor->n_cell;
                s.bytes_exact           = (int64_t) tensor->space.size();
                s.bytes_f16             = (int64_t) tensor->space.size();
                s.bits_per_element      = 16;
            }
            s.il   = tensor->il;
            s.side = tensor->side;
            s.kind = (int32_t) tensor->kind;
            out.push_back(s);
        }
    }
}

} // namespace gear
