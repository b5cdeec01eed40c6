#include "plugin/cuda_wrapper.h"

#include "common/error.h"
#include "cuda/loader.h"
#include "plugin/attention_node.h"
#include "plugin/cache_bytes.h"
#include "plugin/cache_node.h"
#include "plugin/device.h"
#include "plugin/kv_buffer.h"
#include "plugin/kv_session.h"
#include "plugin/report.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <unordered_map>
#include <utility>

namespace gear {

namespace {

constexpr int     flag_compute  = 16;                 // GGML_TENSOR_FLAG_COMPUTE
constexpr int64_t shifted_bytes = (int64_t) 32 << 20; // of rows that the K-shift has unpacked at once

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Cell indices on their way to the device
// ---------------------------------------------------------------------------------------------------------------------------------------------

// What llama.cpp last uploaded to a tensor of indices, by tensor. Tensors of graphs that are gone stay until their address is used again.
struct uploads {
    static constexpr size_t most_bytes   = (size_t) 1 << 24; // indices are of one step, those of a K-shift of all cells
    static constexpr size_t most_tensors = (size_t) 1 << 14;

    std::mutex                                                 lock;
    std::unordered_map<const abi::tensor *, std::vector<char>> data;

    void keep(const abi::tensor * tensor, const void * bytes, size_t size) {
        std::lock_guard<std::mutex> guard(lock);
        if (data.size() >= most_tensors && data.find(tensor) == data.end()) {
            data.clear();
        }
        const char * from = static_cast<const char *>(bytes);
        data[tensor].assign(from, from + size);
    }

    bool find(const abi::tensor * tensor, std::vector<char> & out) {
        std::lock_guard<std::mutex> guard(lock);
        const auto                  found = data.find(tensor);
        if (found == data.end()) {
            return false;
        }
        out = found->second;
        return true;
    }
};

uploads & all_uploads() {
    static uploads u;
    return u;
}

using set_function = decltype(abi::buffer_i::set_tensor);
std::mutex   set_lock;
set_function inner_set_tensor = nullptr; // the same for all buffers of ggml-cuda

bool is_index(const abi::tensor * tensor) {
    return (tensor->type == abi::number().type_i64 || tensor->type == abi::number().type_i32) && !tensor->view_src;
}

void watched_set_tensor(abi::buffer * buffer, abi::tensor * tensor, const void * data, size_t offset, size_t size) {
    if (is_index(tensor) && offset == 0 && size <= uploads::most_bytes && size == abi::ggml().ggml_nbytes(tensor)) {
        all_uploads().keep(tensor, data, size);
    }
    inner_set_tensor(buffer, tensor, data, offset, size);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Cache tensors
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct cuda_tensor final : session_tensor {
    cuda_tensor(const abi::tensor * tensor, int il, gear_side side)
        : session_tensor(il, side, tensor->ne[0]), n_cell(tensor->ne[1]), n_stream((int) tensor->ne[2]), bytes(abi::ggml().ggml_nbytes(tensor)) {}

    bool is_store() const override { return rows != nullptr; }
    void read_store(int n_threads, const reader & f) override;
    void change_store(const changer & f) override;

    int64_t       n_cell;
    int           n_stream;
    size_t        bytes;
    observed_use  use;
    cuda_buffer * home = nullptr;

    std::unique_ptr<address_range>         space; // of a GEAR tensor: addresses that nothing may touch
    std::unique_ptr<cuda::device_block>    plain; // of one that stays f16
    std::shared_ptr<const gear_tile_codec> codec;
    std::unique_ptr<cuda::cache_side>      rows; // of a GEAR tensor, once a layer is computed
};

} // namespace

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The buffer
// ---------------------------------------------------------------------------------------------------------------------------------------------

class cuda_buffer {
  public:
    cuda_buffer(cuda_wrapper & wrapper, size_t size) : wrapper_(wrapper), base_(size) { wrapper_.add(this); }
    ~cuda_buffer() {
        wrapper_.remove(this);
        report_freed(*this);
    }

    static cuda_buffer * of(const abi::tensor * tensor);
    static cuda_tensor * find(const abi::tensor * tensor); // nullptr: no GEAR tensor

    void add(abi::tensor * tensor);
    void settle(cuda_tensor & tensor);
    // Layers share the table of what they write together. One that is changed alone gets a table of its own first; rejoin() lets those that agree again
    // share one.
    void part(cuda_tensor & tensor);
    void rejoin();
    // Pack the full tiles of all tensors that share this one's table.
    void pack_full(cuda_tensor & tensor);
    void write_plain(cuda_tensor & tensor, int64_t n, const int64_t * cells, const uint16_t * rows);
    void set(const abi::tensor * view, const void * data, size_t offset, size_t size);
    void get(const abi::tensor * view, void * data, size_t offset, size_t size);
    bool copy(const abi::tensor * source, const abi::tensor * target);
    void clear(uint8_t value);
    void stats(std::vector<gear_store_stats> & out);

    // What fails half-way leaves layers that do not hold what their tables say: then the buffer is broken until it is cleared.
    template <class F> void whole_or_broken(F && f);

    void *         base() const { return base_.data(); }
    cuda_wrapper & wrapper() const { return wrapper_; }

    bool is_broken = false;

  private:
    static cuda_tensor * any_of(const abi::tensor * tensor);
    store_shape          shape_of(const cuda_tensor & tensor) const;
    void                 settle_one(cuda_tensor & tensor);
    row_range            rows_at(const cuda_tensor & tensor, const abi::tensor * view, size_t offset, size_t size) const;
    void                 write_rows(cuda_tensor & tensor, int64_t cell, int64_t n, const uint16_t * rows);

    cuda_wrapper &                                  wrapper_;
    address_range                                   base_;
    std::vector<std::unique_ptr<cuda_tensor>>       tensors_;
    std::vector<std::shared_ptr<cuda::cache_table>> tables_[2]; // [gear_side]
    bool                                            has_parted_ = false;
};

namespace {

cuda_buffer & self(abi::buffer * buffer) {
    return *static_cast<cuda_buffer *>(buffer->context);
}

// What goes wrong here cannot be returned: it is kept in the device and fails the next graph.
template <class F> void reported(abi::buffer * buffer, F && f) {
    cuda_wrapper &              wrapper = self(buffer).wrapper();
    std::lock_guard<std::mutex> guard(wrapper.lock);
    const gear_status           status = guarded([&] {
        const cuda::selected_device selected = wrapper.select();
        f(self(buffer));
    });
    if (status != GEAR_OK) {
        wrapper.device().set_error(status, gear_last_error());
    }
}

void free_cache_buffer(abi::buffer * buffer) {
    delete &self(buffer);
}

int init_tensor(abi::buffer * buffer, abi::tensor * tensor) {
    const gear_status status = guarded([&] {
        if (!tensor->view_src) {
            self(buffer).add(tensor);
        }
    });
    if (status != GEAR_OK) {
        self(buffer).wrapper().device().set_error(status, gear_last_error());
    }
    return status == GEAR_OK ? abi::graph_success : abi::graph_failed;
}

} // namespace

cuda_buffer * cuda_buffer::of(const abi::tensor * tensor) {
    const abi::tensor * root = tensor->view_src ? tensor->view_src : tensor;
    return root->buf && root->buf->iface.free_buffer == free_cache_buffer ? &self(root->buf) : nullptr;
}

cuda_tensor * cuda_buffer::any_of(const abi::tensor * tensor) {
    const abi::tensor * root = tensor->view_src ? tensor->view_src : tensor;
    return of(tensor) ? static_cast<cuda_tensor *>(root->extra) : nullptr;
}

cuda_tensor * cuda_buffer::find(const abi::tensor * tensor) {
    cuda_tensor * found = any_of(tensor);
    return found && !found->plain ? found : nullptr;
}

// Unlike on the CPU it is settled here whether a tensor stays f16: views of it need its address in device memory.
void cuda_buffer::add(abi::tensor * tensor) {
    int       il;
    gear_side side;
    if (!parse_cache_name(tensor->name, il, side)) {
        fail(GEAR_ERROR_UNSUPPORTED, "tensor '%s' was put into the KV buffer, but it is no cache tensor", tensor->name);
    }
    tensors_.push_back(std::make_unique<cuda_tensor>(tensor, il, side));
    cuda_tensor & added = *tensors_.back();
    added.home          = this;
    if (wrapper_.device().is_window(added.n_cell)) {
        const cuda::selected_device selected = wrapper_.select();
        added.plain                          = std::make_unique<cuda::device_block>(wrapper_.worker.with, added.bytes);
        tensor->data                         = added.plain->data();
    } else {
        added.space  = std::make_unique<address_range>(added.bytes);
        tensor->data = added.space->data();
    }
    tensor->extra = &added;
}

store_shape cuda_buffer::shape_of(const cuda_tensor & tensor) const {
    return wrapper_.device().shape(tensor.il, tensor.side, tensor.n_embd, tensor.n_cell, tensor.n_stream, tensor.use);
}

// All layers that can be are settled at once, while nothing is written: so they begin with one table.
void cuda_buffer::settle(cuda_tensor & tensor) {
    if (tensor.rows) {
        return;
    }
    if (shape_of(tensor).n_head == 0) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: its head size is not known; on a GPU gearcpp needs the model's head table (use gearcpp.Llama)", tensor.il);
    }
    for (const auto & other : tensors_) {
        if (!other->plain && !other->rows && shape_of(*other).n_head != 0) {
            settle_one(*other);
        }
    }
}

void cuda_buffer::settle_one(cuda_tensor & tensor) {
    const kv_device &        device = wrapper_.device();
    const store_shape        shape  = shape_of(tensor);
    const gear_side_config & coding = tensor.side == GEAR_SIDE_K ? device.config().k : device.config().v;
    if (coding.bits < 16) {
        tensor.codec = std::make_shared<gear_tile_codec>(device.config(), tensor.side, shape.d_head);
    }
    const auto fits = [&](const std::shared_ptr<cuda::cache_table> & table) {
        const store_shape & book = table->book().shape();
        return book.n_cell == shape.n_cell && book.n_stream == shape.n_stream && book.n_ubatch == shape.n_ubatch && table->book().is_empty();
    };
    auto & tables = tables_[tensor.side];
    auto   found  = std::find_if(tables.begin(), tables.end(), fits);
    if (found == tables.end()) {
        tables.push_back(std::make_shared<cuda::cache_table>(wrapper_.worker.with, shape, coding.bits < 16));
        found = tables.end() - 1;
    }
    tensor.rows =
        std::make_unique<cuda::cache_side>(wrapper_.worker.with, shape, tensor.codec ? &tensor.codec->layout() : nullptr, device.config().seed, *found);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// One layer alone
// ---------------------------------------------------------------------------------------------------------------------------------------------

template <class F> void cuda_buffer::whole_or_broken(F && f) {
    const bool before = std::exchange(is_broken, true);
    f();
    is_broken = before;
}

void cuda_buffer::part(cuda_tensor & tensor) {
    auto & tables = tables_[tensor.side];
    auto   shared = std::find_if(tables.begin(), tables.end(), [&](const auto & table) { return table.get() == &tensor.rows->table(); });
    if (shared->use_count() == 2) { // this list and the tensor
        return;
    }
    tables.push_back(std::make_shared<cuda::cache_table>(wrapper_.worker, **shared));
    tensor.rows->table_of_its_own(tables.back());
    has_parted_ = true;
}

void cuda_buffer::rejoin() {
    if (!std::exchange(has_parted_, false)) {
        return;
    }
    for (auto & tables : tables_) {
        std::vector<std::shared_ptr<cuda::cache_table>> kept;
        for (const auto & table : tables) {
            const auto like = std::find_if(kept.begin(), kept.end(), [&](const auto & other) { return other->book().agrees(table->book()); });
            if (like == kept.end()) {
                kept.push_back(table);
                continue;
            }
            for (const auto & tensor : tensors_) {
                if (tensor->rows && &tensor->rows->table() == table.get()) {
                    tensor->rows->table_of_its_own(*like);
                }
            }
        }
        tables = std::move(kept);
    }
}

void cuda_buffer::pack_full(cuda_tensor & tensor) {
    cuda::cache_table & table = tensor.rows->table();
    whole_or_broken([&] {
        table.plan_flush(wrapper_.worker, true);
        for (const auto & other : tensors_) {
            if (other->rows && &other->rows->table() == &table) {
                other->rows->pack(wrapper_.worker);
            }
        }
    });
}

void cuda_buffer::write_plain(cuda_tensor & tensor, int64_t n, const int64_t * cells, const uint16_t * rows) {
    const cuda::api & with = wrapper_.worker.with;
    const size_t      row  = (size_t) tensor.row_bytes();
    for (int64_t i = 0; i < n; ++i) {
        require_ok(with, with.upload(tensor.plain->data() + (size_t) cells[i] * row, rows + i * tensor.n_embd, row, wrapper_.worker.work),
                   "filling the cache");
    }
    require_ok(with, with.wait_stream(wrapper_.worker.work), "filling the cache");
}

void cuda_tensor::read_store(int, const reader & f) {
    cuda_wrapper &              wrapper = home->wrapper();
    std::lock_guard<std::mutex> guard(wrapper.lock);
    const cuda::selected_device selected = wrapper.select();
    home->pack_full(*this);
    f(*rows->to_store(wrapper.worker, codec), codec.get());
}

// A store on the host takes the changes, so that its decisions are the store's own; then the device holds what it holds.
void cuda_tensor::change_store(const changer & f) {
    cuda_wrapper &              wrapper = home->wrapper();
    std::lock_guard<std::mutex> guard(wrapper.lock);
    const cuda::selected_device selected = wrapper.select();
    if (plain) {
        f(nullptr, nullptr, [&](int64_t n, const int64_t * cells, const uint16_t * from) { home->write_plain(*this, n, cells, from); });
        return;
    }
    home->settle(*this);
    const std::unique_ptr<store> here = rows->to_store(wrapper.worker, codec);
    f(here.get(), codec.get(), [&](int64_t n, const int64_t * cells, const uint16_t * from) {
        barrier sync;
        if (!here->write({ 0, 1, &sync }, n, { cells, sizeof(int64_t), true }, { from, (size_t) row_bytes(), true })) {
            throw error(here->status(), here->message());
        }
    });
    home->whole_or_broken([&] {
        home->part(*this);
        rows->adopt(wrapper.worker, *here);
    });
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Bytes in and out: any range, as llama.cpp saves, restores and clears
// ---------------------------------------------------------------------------------------------------------------------------------------------

row_range cuda_buffer::rows_at(const cuda_tensor & tensor, const abi::tensor * view, size_t offset, size_t size) const {
    const void * first = tensor.plain ? (const void *) tensor.plain->data() : tensor.space->data();
    return rows_of((size_t) (static_cast<const char *>(view->data) - static_cast<const char *>(first)) + offset, size, tensor.bytes,
                   (size_t) tensor.row_bytes());
}

void cuda_buffer::write_rows(cuda_tensor & tensor, int64_t cell, int64_t n, const uint16_t * rows) {
    cuda::cuda_worker &  worker = wrapper_.worker;
    std::vector<int64_t> cells;
    whole_or_broken([&] {
        part(tensor);
        for_each_run(rows, n, tensor.n_embd, wrapper_.device().n_ubatch(), [&](int64_t begin, int64_t n_now, bool is_zero) {
            if (is_zero) {
                tensor.rows->table().plan_erase(worker, cell + begin, n_now);
                return;
            }
            cells.resize((size_t) n_now);
            std::iota(cells.begin(), cells.end(), cell + begin);
            tensor.rows->put(worker, ++wrapper_.n_step, n_now, cells.data(), rows + begin * tensor.n_embd);
        });
    });
}

void cuda_buffer::set(const abi::tensor * view, const void * data, size_t offset, size_t size) {
    cuda_tensor &     tensor  = *any_of(view);
    const cuda::api & with    = wrapper_.worker.with;
    kv_session *      session = wrapper_.device().session_at(data);
    if (session && session->note_restored(tensor, rows_at(tensor, view, offset, size), size, data)) {
        return;
    }
    if (tensor.plain) {
        require_ok(with, with.upload(static_cast<char *>(view->data) + offset, data, size, wrapper_.worker.work), "filling the cache");
        require_ok(with, with.wait_stream(wrapper_.worker.work), "filling the cache");
        return;
    }
    if (!tensor.rows && all_zero(static_cast<const char *>(data), (int64_t) size)) {
        return; // clearing what was never written
    }
    settle(tensor);
    const row_range range = rows_at(tensor, view, offset, size);
    if (is_whole(range, size, (size_t) tensor.row_bytes(), data)) {
        write_rows(tensor, range.first, range.n, static_cast<const uint16_t *>(data));
        return;
    }
    std::vector<uint16_t> rows((size_t) (range.n * tensor.n_embd));
    tensor.rows->read(wrapper_.worker, range.first, range.n, rows.data());
    memcpy(reinterpret_cast<char *>(rows.data()) + range.skip, data, size);
    write_rows(tensor, range.first, range.n, rows.data());
}

void cuda_buffer::get(const abi::tensor * view, void * data, size_t offset, size_t size) {
    cuda_tensor &     tensor  = *any_of(view);
    const cuda::api & with    = wrapper_.worker.with;
    kv_session *      session = wrapper_.device().session_at(data);
    if (session && session->note_saved(tensor, rows_at(tensor, view, offset, size), size, data)) {
        return;
    }
    if (tensor.plain) {
        require_ok(with, with.download(data, static_cast<const char *>(view->data) + offset, size, wrapper_.worker.work), "reading the cache");
        require_ok(with, with.wait_stream(wrapper_.worker.work), "reading the cache");
        return;
    }
    if (!tensor.rows) {
        memset(data, 0, size);
        return;
    }
    const row_range range = rows_at(tensor, view, offset, size);
    if (is_whole(range, size, (size_t) tensor.row_bytes(), data)) {
        tensor.rows->read(wrapper_.worker, range.first, range.n, static_cast<uint16_t *>(data));
        return;
    }
    std::vector<uint16_t> rows((size_t) (range.n * tensor.n_embd));
    tensor.rows->read(wrapper_.worker, range.first, range.n, rows.data());
    memcpy(data, reinterpret_cast<const char *>(rows.data()) + range.skip, size);
}

// Copies of whole streams of one tensor (seq_cp) keep their tiles. Anything else goes through f16, which ggml does when we say no.
bool cuda_buffer::copy(const abi::tensor * source, const abi::tensor * target) {
    cuda_tensor *from = find(source), *to = find(target);
    if (!from || from != to || !from->rows) {
        return false;
    }
    const auto stream_of = [&](const abi::tensor * view) {
        const size_t stream = (size_t) (to->n_cell * to->row_bytes()), offset = (size_t) (static_cast<char *>(view->data) - to->space->data());
        return view->ne[0] == to->n_embd && view->ne[1] == to->n_cell && view->ne[2] == 1 && offset % stream == 0 ? (int) (offset / stream) : -1;
    };
    const int first = stream_of(source), second = stream_of(target);
    if (first < 0 || second < 0) {
        return false;
    }
    whole_or_broken([&] {
        part(*to);
        to->rows->table().plan_copy(wrapper_.worker, first, second);
        to->rows->copy_stream(wrapper_.worker, first, second);
    });
    return true;
}

void cuda_buffer::clear(uint8_t value) {
    const cuda::api & with = wrapper_.worker.with;
    require_ok(with, with.wait_device(), "waiting for earlier steps"); // plain tensors are read on ggml's stream, which knows nothing of ours
    for (const auto & tensor : tensors_) {
        if (tensor->plain) {
            require_ok(with, with.fill(tensor->plain->data(), value, tensor->plain->size(), wrapper_.worker.work), "clearing the cache");
        } else if (value != 0) {
            fail(GEAR_ERROR_UNSUPPORTED, "a GEAR cache can be cleared to zero only, not to %d", value);
        }
    }
    for (auto & tables : tables_) {
        for (const auto & table : tables) {
            table->clear(wrapper_.worker);
        }
    }
    is_broken = false;
    require_ok(with, with.wait_stream(wrapper_.worker.work), "clearing the cache");
}

// A table is counted once, with the first tensor that goes by it.
void cuda_buffer::stats(std::vector<gear_store_stats> & out) {
    std::set<const cuda::cache_table *> counted;
    for (const auto & tensor : tensors_) {
        gear_store_stats s = {};
        if (tensor->plain) {
            s.kind             = (int32_t) cache_kind::f16_window;
            s.n_stream         = tensor->n_stream;
            s.n_cell           = tensor->n_cell;
            s.bytes_exact      = (int64_t) tensor->bytes;
            s.bytes_f16        = (int64_t) tensor->bytes;
            s.bits_per_element = 16;
        } else {
            settle(*tensor);
            s = tensor->rows->stats();
            if (!counted.insert(&tensor->rows->table()).second) {
                s.bytes_tables = 0;
            }
        }
        s.il   = tensor->il;
        s.side = tensor->side;
        out.push_back(s);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// What ops do with the cache
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

cuda_tensor * cache_of(const abi::tensor * source) {
    return source ? cuda_buffer::find(source) : nullptr;
}

bool is_row_write(const abi::tensor * op) {
    const cuda_tensor * tensor = cache_of(op->src[2]);
    return tensor && is_row_write(op, *tensor);
}

bool is_attention(const abi::tensor * op) {
    return is_attention(op, cache_of(op->src[1]), cache_of(op->src[2]));
}

bool is_shift(const abi::tensor * op) {
    const cuda_tensor * tensor = cache_of(op->src[0]);
    return tensor && is_shift(op, *tensor, static_cast<const cuda_tensor *>(cache_of(op)));
}

bool touches_cache(const abi::tensor * op) {
    return std::any_of(op->src, op->src + abi::max_src, [](const abi::tensor * source) { return cache_of(source) != nullptr; });
}

} // namespace

const kv_device * cuda_wrapper::owner_of(const abi::tensor * tensor) {
    const cuda_tensor * found = cuda_buffer::find(tensor);
    return found ? &found->home->wrapper().device() : nullptr;
}

bool cuda_wrapper::observe(const abi::tensor * op) {
    if (is_view_op(op->op)) {
        return cuda_buffer::find(op) != nullptr;
    }
    if (!touches_cache(op)) {
        return false;
    }
    if (is_row_write(op)) {
        observed_use & use = cache_of(op->src[2])->use;
        use.n_rows         = std::max(use.n_rows, (int) op->src[0]->ne[1]);
    } else if (is_attention(op)) {
        for (int i = 1; i <= 2; ++i) {
            observed_use & use = cache_of(op->src[i])->use;
            use.d_head         = (int) op->src[i]->ne[0];
            use.n_head         = (int) op->src[i]->ne[2];
        }
    }
    return true; // never no to an op on the cache: llama.cpp would abort. What is not covered fails when it is computed
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The backend
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

// ggml_backend_event
struct event_view {
    abi::device * dev;
    void *        context; // cudaEvent_t
};

struct cuda_backend {
    abi::backend   base; // first: ggml sees this. The wrapped backend's guid, context and functions, but for three
    cuda_wrapper * wrapper;
    abi::backend * inner;
    abi::event *   reached = nullptr; // on ggml's stream: what our kernels read is there
    abi::event *   done    = nullptr; // on our stream: what ggml reads is there

    // Of the step in progress: which tensor of indices a table was planned with.
    std::vector<std::pair<const cuda::cache_table *, const abi::tensor *>> planned;
    std::vector<char>                                                      uploaded; // cells of a write, or a K-shift

    part_of_shift shift; // stays where it is: ggml-cuda knows graphs by the addresses of their nodes
};

cuda_backend & self(abi::backend * backend) {
    return *reinterpret_cast<cuda_backend *>(backend);
}

cuda::event native(abi::event * e) {
    return static_cast<cuda::event>(reinterpret_cast<event_view *>(e)->context);
}

// Nodes [first, last) on the wrapped backend, as a graph that shares everything else with the whole one; views at both ends are left out, since they are
// what changes when the context grows.
int run_segment(cuda_backend & b, const abi::cgraph & graph, int first, int last) {
    while (first < last && is_view_op(graph.nodes[first]->op)) {
        ++first;
    }
    while (first < last && is_view_op(graph.nodes[last - 1]->op)) {
        --last;
    }
    if (first == last) {
        return abi::graph_success;
    }
    abi::cgraph segment = graph;
    segment.nodes       = graph.nodes + first;
    segment.n_nodes     = last - first;
    return b.inner->iface.graph_compute(b.inner, &segment);
}

void wait_for_ggml(cuda_backend & b) {
    const cuda::cuda_worker & worker = b.wrapper->worker;
    b.inner->iface.event_record(b.inner, b.reached);
    require_ok(worker.with, worker.with.wait_event(worker.work, native(b.reached)), "waiting for an event");
}

void let_ggml_wait(cuda_backend & b) {
    const cuda::cuda_worker & worker = b.wrapper->worker;
    require_ok(worker.with, worker.with.record(native(b.done), worker.work), "recording an event");
    b.inner->iface.event_wait(b.inner, b.done);
}

// What the host last put into a tensor of indices; nullptr: it came from elsewhere. Until the next call.
const void * host_data(cuda_backend & b, const abi::tensor * indices) {
    if (indices->buf && abi::ggml().ggml_backend_buft_is_host(indices->buf->buft)) {
        return indices->data;
    }
    return all_uploads().find(indices, b.uploaded) ? b.uploaded.data() : nullptr;
}

void run_write(cuda_backend & b, const abi::tensor * node) {
    cuda_tensor & tensor = *cache_of(node->src[2]);
    tensor.home->settle(tensor);
    cuda::cache_table & table = tensor.rows->table();
    const abi::tensor * rows = node->src[0], *cells = node->src[1];
    const auto          same = std::find_if(b.planned.begin(), b.planned.end(), [&](const auto & p) { return p.first == &table; });
    if (same == b.planned.end()) {
        const void * data = host_data(b, cells);
        if (!data) {
            fail(GEAR_ERROR_UNSUPPORTED, "layer %d: the cells that a step writes were not uploaded from the host; use kv_type='f16' for this model",
                 tensor.il);
        }
        table.plan(b.wrapper->worker, ++b.wrapper->n_step, rows->ne[1], { data, cells->nb[0], cells->type == abi::number().type_i64 });
        b.planned.push_back({ &table, cells });
    } else if (same->second != cells) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: layers write different cells in one step; use kv_type='f16' for this model", tensor.il);
    }
    tensor.rows->write(b.wrapper->worker, rows->ne[1], rows->data, (int64_t) rows->nb[1], rows->type == abi::number().type_f16);
}

void run_attention(cuda_backend & b, const abi::tensor * node) {
    cuda_tensor &k = *cache_of(node->src[1]), &v = *cache_of(node->src[2]);
    k.home->settle(k);
    v.home->settle(v);
    cuda::attend(b.wrapper->worker, attention_params(node, k.row_bytes() * k.n_cell), *k.rows, *v.rows);
}

// The K-shift: the rows of tiles with a shifted cell are unpacked into memory of ggml's, where its own ROPE turns them. Not on the way of a token, so that
// memory may be allocated and the host may wait.
void run_shift(cuda_backend & b, const abi::cgraph & graph, const abi::tensor * node) {
    cuda_tensor & tensor = *cache_of(node->src[0]);
    if (!tensor.rows) {
        return; // nothing was ever written
    }
    const auto * shift = static_cast<const int32_t *>(host_data(b, node->src[1]));
    if (!shift) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: the K-shift was not uploaded from the host; use kv_type='f16' for this model", tensor.il);
    }
    std::vector<uint8_t> marked((size_t) node->src[1]->ne[0]);
    std::transform(shift, shift + marked.size(), marked.begin(), [](int32_t by) { return (uint8_t) (by != 0); });
    const int64_t of_tile    = tensor.rows->shape().tile * tensor.row_bytes();
    const int64_t most_tiles = std::clamp<int64_t>(shifted_bytes / of_tile, 1, (tensor.n_cell - 1) / tensor.rows->shape().tile + 1);
    abi::buffer * staging =
        abi::ggml().ggml_backend_buft_alloc_buffer(abi::ggml().ggml_backend_dev_buffer_type(b.wrapper->inner()), (size_t) (most_tiles * of_tile));
    if (!staging) {
        fail(GEAR_ERROR_MEMORY, "the GPU has not the %.1f MiB that a shift of the context needs", (double) (most_tiles * of_tile) / 1048576.0);
    }
    const auto                                              give_back = [](abi::buffer * buffer) { abi::ggml().ggml_backend_buffer_free(buffer); };
    const std::unique_ptr<abi::buffer, decltype(give_back)> owner(staging, give_back);

    tensor.home->part(tensor);
    auto * rows = static_cast<uint16_t *>(abi::ggml().ggml_backend_buffer_get_base(staging));
    tensor.rows->update(b.wrapper->worker, marked.data(), rows, most_tiles, [&](int64_t first, int64_t n, uint16_t * at) {
        let_ggml_wait(b);
        b.shift.make(node, (size_t) tensor.row_bytes(), first, n, at, staging);
        abi::tensor * nodes[1] = { &b.shift.rotated };
        abi::cgraph   part     = graph;
        part.nodes             = nodes;
        part.n_nodes           = 1;
        part.uid               = 0; // another graph than the whole one
        if (b.inner->iface.graph_compute(b.inner, &part) != abi::graph_success) {
            fail(GEAR_ERROR_INTERNAL, "layer %d: ggml could not shift the context", tensor.il);
        }
        wait_for_ggml(b);
    });
}

int compute(cuda_backend & b, const abi::cgraph & graph) {
    cuda_wrapper &          wrapper = *b.wrapper;
    bool                    flagged = false;
    std::set<cuda_buffer *> touched;
    for (int i = 0; i < graph.n_nodes; ++i) {
        const abi::tensor * node = graph.nodes[i];
        flagged |= (node->flags & flag_compute) != 0; // releases before the flag compute every node
        if (!is_view_op(node->op) && cuda_wrapper::observe(node)) {
            for (const abi::tensor * source : node->src) {
                if (cache_of(source)) {
                    touched.insert(cache_of(source)->home);
                }
            }
        }
    }
    if (touched.empty()) {
        return b.inner->iface.graph_compute(b.inner, const_cast<abi::cgraph *>(&graph));
    }
    std::lock_guard<std::mutex> guard(wrapper.lock);
    const kept_error            earlier = wrapper.device().take_error(); // of a set_tensor or clear, which could not say so
    if (earlier.status != GEAR_OK) {
        throw error(earlier.status, earlier.text);
    }
    const cuda::selected_device selected = wrapper.select();
    for (cuda_buffer * buffer : touched) {
        if (std::exchange(buffer->is_broken, true)) { // until it is done
            fail(GEAR_ERROR_INTERNAL, "an earlier step failed half-way, and the cache no longer holds what it should; clear it (llama_memory_clear)");
        }
        buffer->rejoin();
    }
    b.planned.clear();
    int  first   = 0; // of the segment in progress
    bool is_ours = false;
    for (int i = 0; i <= graph.n_nodes; ++i) {
        const abi::tensor * node = i < graph.n_nodes ? graph.nodes[i] : nullptr;
        if (node && (is_view_op(node->op) || !touches_cache(node) || (flagged && !(node->flags & flag_compute)))) {
            if (is_ours && !is_view_op(node->op)) { // back to ggml
                let_ggml_wait(b);
                is_ours = false;
                first   = i;
            }
            continue;
        }
        if (!is_ours) {
            const int status = run_segment(b, graph, first, i);
            if (status != abi::graph_success) {
                return status;
            }
            if (node) {
                wait_for_ggml(b);
                is_ours = true;
            }
        }
        if (!node) {
            break;
        }
        if (is_row_write(node)) {
            run_write(b, node);
        } else if (is_attention(node)) {
            run_attention(b, node);
        } else if (is_shift(node)) {
            run_shift(b, graph, node);
        } else {
            fail(GEAR_ERROR_UNSUPPORTED,
                 "the graph uses the KV cache with %s, which a GEAR cache on a GPU does not support; use kv_type='f16' for this model",
                 abi::ggml().ggml_op_name(node->op));
        }
    }
    if (is_ours) {
        let_ggml_wait(b);
    }
    for (cuda_buffer * buffer : touched) {
        buffer->is_broken = false;
    }
    return abi::graph_success;
}

int graph_compute(abi::backend * backend, abi::cgraph * graph) {
    cuda_backend &    b      = self(backend);
    int               result = abi::graph_failed;
    const gear_status status = guarded([&] { result = compute(b, *graph); });
    if (status != GEAR_OK) {
        b.wrapper->device().set_error(status, gear_last_error());
        return abi::graph_failed;
    }
    return result;
}

const char * get_name(abi::backend * backend) {
    return abi::ggml().ggml_backend_dev_name(self(backend).wrapper->device().ggml_device());
}

void free_events(cuda_backend & b) {
    for (abi::event * e : { b.reached, b.done }) {
        if (e) {
            b.wrapper->inner()->iface.event_free(b.wrapper->inner(), e);
        }
    }
}

void free_backend(abi::backend * backend) {
    cuda_backend & b = self(backend);
    free_events(b);
    abi::ggml().ggml_backend_free(b.inner);
    delete &b;
}

} // namespace

abi::backend * cuda_wrapper::make_backend() {
    abi::backend * made = abi::ggml().ggml_backend_dev_init(inner_, nullptr);
    if (!made) {
        fail(GEAR_ERROR_INTERNAL, "the wrapped ggml device could not make a backend");
    }
    auto b                      = std::make_unique<cuda_backend>();
    b->base                     = *made;
    b->base.iface.get_name      = get_name;
    b->base.iface.free          = free_backend;
    b->base.iface.graph_compute = graph_compute;
    b->base.dev                 = device_.ggml_device();
    b->wrapper                  = this;
    b->inner                    = made;
    for (abi::event ** e : { &b->reached, &b->done }) {
        *e = inner_->iface.event_new ? inner_->iface.event_new(inner_) : nullptr;
        if (!*e || reinterpret_cast<event_view *>(*e)->dev != inner_ || !reinterpret_cast<event_view *>(*e)->context) {
            free_events(*b);
            abi::ggml().ggml_backend_free(made);
            fail(GEAR_ERROR_UNSUPPORTED, "this ggml-cuda has no events (GGML_CUDA_NO_PEER_COPY), which a GEAR cache on a GPU needs");
        }
    }
    return &b.release()->base;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The device
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

const cuda::api & table_for(abi::device * inner) {
    const char * name   = abi::ggml().ggml_backend_dev_name(inner);
    const char * wanted = getenv("GEARCPP_CUDA");
    if (strncmp(name, "CUDA", 4) != 0) {
        fail(GEAR_ERROR_UNSUPPORTED, "device '%s' is neither a CPU nor one of ggml's CUDA devices, and gearcpp keeps a GEAR cache on those only", name);
    }
    if (!wanted || strcmp(wanted, "1") != 0) {
        fail(GEAR_ERROR_UNSUPPORTED,
             "a GEAR cache on '%s' has not been proven on a GPU yet; set GEARCPP_CUDA=1 to try it, or leave the cache on the CPU (n_gpu_layers=0)", name);
    }
    const char * forks = getenv("GGML_CUDA_GRAPH_OPT");
    if (forks && atoi(forks) == 1) {
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

} // namespace

cuda_wrapper::cuda_wrapper(kv_device & device, abi::device * inner)
    : worker(table_for(inner), number_of(table_for(inner), inner)), device_(device), inner_(inner) {}

cuda_wrapper::~cuda_wrapper() = default;

void cuda_wrapper::fill_in(abi::device_i & iface, const abi::device_i & inner) const {
    if (inner.get_host_buffer_type) {
        iface.get_host_buffer_type = [](abi::device * d) { return wrapped(d)->iface.get_host_buffer_type(wrapped(d)); };
    }
    if (inner.offload_op) {
        iface.offload_op = [](abi::device * d, const abi::tensor * op) { return wrapped(d)->iface.offload_op(wrapped(d), op); };
    }
    if (inner.event_new && inner.event_free && inner.event_synchronize) {
        iface.event_new         = [](abi::device * d) { return wrapped(d)->iface.event_new(wrapped(d)); };
        iface.event_free        = [](abi::device * d, abi::event * e) { wrapped(d)->iface.event_free(wrapped(d), e); };
        iface.event_synchronize = [](abi::device * d, abi::event * e) { wrapped(d)->iface.event_synchronize(wrapped(d), e); };
    }
}

abi::buffer * cuda_wrapper::make_cache_buffer(size_t size) {
    abi::buffer_i iface = {};
    iface.free_buffer   = free_cache_buffer;
    iface.get_base      = [](abi::buffer * buffer) { return self(buffer).base(); };
    iface.init_tensor   = init_tensor;
    iface.memset_tensor = [](abi::buffer * buffer, abi::tensor * tensor, uint8_t value, size_t offset, size_t n) {
        reported(buffer, [&](cuda_buffer & b) {
            const std::vector<char> bytes(n, (char) value);
            b.set(tensor, bytes.data(), offset, n);
        });
    };
    iface.set_tensor = [](abi::buffer * buffer, abi::tensor * tensor, const void * data, size_t offset, size_t n) {
        reported(buffer, [&](cuda_buffer & b) { b.set(tensor, data, offset, n); });
    };
    iface.get_tensor = [](abi::buffer * buffer, const abi::tensor * tensor, void * data, size_t offset, size_t n) {
        reported(buffer, [&](cuda_buffer & b) { b.get(tensor, data, offset, n); });
    };
    iface.cpy_tensor = [](abi::buffer * buffer, const abi::tensor * source, abi::tensor * target) {
        bool done = false;
        reported(buffer, [&](cuda_buffer & b) { done = b.copy(source, target); });
        return done;
    };
    iface.clear          = [](abi::buffer * buffer, uint8_t value) { reported(buffer, [&](cuda_buffer & b) { b.clear(value); }); };
    auto          buffer = std::make_unique<cuda_buffer>(*this, size);
    abi::buffer * made   = abi::ggml().ggml_backend_buffer_init(device_.kv_type(), iface, buffer.get(), size);
    buffer.release();
    return made;
}

// Its free_buffer stays ggml-cuda's, by which that knows its own buffers.
void cuda_wrapper::watch(abi::buffer * buffer) {
    if (!buffer || buffer->iface.set_tensor == watched_set_tensor) {
        return;
    }
    std::lock_guard<std::mutex> guard(set_lock);
    if (inner_set_tensor && inner_set_tensor != buffer->iface.set_tensor) {
        fail(GEAR_ERROR_UNSUPPORTED, "ggml-cuda has buffers of several kinds; a GEAR cache does not know which one this is");
    }
    inner_set_tensor         = buffer->iface.set_tensor;
    buffer->iface.set_tensor = watched_set_tensor;
}

void cuda_wrapper::add(cuda_buffer * buffer) {
    std::lock_guard<std::mutex> guard(lock);
    buffers_.insert(buffer);
}

void cuda_wrapper::remove(cuda_buffer * buffer) {
    std::lock_guard<std::mutex> guard(lock);
    worker.with.wait_stream(worker.work);
    buffers_.erase(buffer);
}

std::vector<gear_store_stats> cuda_wrapper::stats() {
    std::lock_guard<std::mutex>   guard(lock);
    std::vector<gear_store_stats> all;
    const cuda::selected_device   selected = select();
    for (cuda_buffer * buffer : buffers_) {
        buffer->stats(all);
    }
    return all;
}

int64_t cuda_wrapper::scratch_bytes() {
    std::lock_guard<std::mutex> guard(lock);
    return (int64_t) worker.scratch_bytes();
}

} // namespace gear
