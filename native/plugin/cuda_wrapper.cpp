#include "plugin/cuda_wrapper.h"

#include "common/error.h"
#include "cuda/loader.h"
#include "plugin/attention_node.h"
#include "plugin/device.h"
#include "plugin/kv_buffer.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

namespace gear {

namespace {

constexpr int flag_compute = 16; // GGML_TENSOR_FLAG_COMPUTE

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Cell indices on their way to the device
// ---------------------------------------------------------------------------------------------------------------------------------------------

// What llama.cpp last uploaded to a tensor of indices, by tensor. Tensors of graphs that are gone stay until their address is used again.
struct uploads {
    static constexpr size_t most_bytes   = (size_t) 1 << 20; // indices are of one step
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

struct cuda_tensor {
    cuda_tensor(const abi::tensor * tensor, int il, gear_side side)
        : il(il), side(side), n_embd(tensor->ne[0]), n_cell(tensor->ne[1]), n_stream((int) tensor->ne[2]), bytes(abi::ggml().ggml_nbytes(tensor)) {}

    int64_t row_bytes() const { return n_embd * 2; }

    int           il;
    gear_side     side;
    int64_t       n_embd, n_cell;
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
    ~cuda_buffer() { wrapper_.remove(this); }

    static cuda_buffer * of(const abi::tensor * tensor);
    static cuda_tensor * find(const abi::tensor * tensor); // nullptr: no GEAR tensor

    void add(abi::tensor * tensor);
    void settle(cuda_tensor & tensor);
    void set(const abi::tensor * view, const void * data, size_t offset, size_t size);
    void get(const abi::tensor * view, void * data, size_t offset, size_t size);
    bool copy(const abi::tensor * source, const abi::tensor * target);
    void clear(uint8_t value);
    void stats(std::vector<gear_store_stats> & out);

    void *         base() const { return base_.data(); }
    cuda_wrapper & wrapper() const { return wrapper_; }

  private:
    static cuda_tensor * any_of(const abi::tensor * tensor);

    cuda_wrapper &                                  wrapper_;
    address_range                                   base_;
    std::vector<std::unique_ptr<cuda_tensor>>       tensors_;
    std::vector<std::shared_ptr<cuda::cache_table>> tables_[2]; // [gear_side]
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
        wrapper.worker.select();
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
        wrapper_.worker.select();
        added.plain  = std::make_unique<cuda::device_block>(wrapper_.worker.with, added.bytes);
        tensor->data = added.plain->data();
    } else {
        added.space  = std::make_unique<address_range>(added.bytes);
        tensor->data = added.space->data();
    }
    tensor->extra = &added;
}

void cuda_buffer::settle(cuda_tensor & tensor) {
    if (tensor.rows) {
        return;
    }
    kv_device & device = wrapper_.device();
    store_shape shape  = device.shape(tensor.il, tensor.side, tensor.n_embd, tensor.n_cell, tensor.n_stream, tensor.use);
    if (shape.n_head == 0) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: its head size is not known; on a GPU gearcpp needs the model's head table (use gearcpp.Llama)", tensor.il);
    }
    const gear_side_config & coding = tensor.side == GEAR_SIDE_K ? device.config().k : device.config().v;
    if (coding.bits < 16) {
        tensor.codec = std::make_shared<gear_tile_codec>(device.config(), tensor.side, shape.d_head);
    }
    const auto fits = [&](const std::shared_ptr<cuda::cache_table> & table) {
        const store_shape & book = table->book().shape();
        return book.n_cell == shape.n_cell && book.n_stream == shape.n_stream && book.n_ubatch == shape.n_ubatch;
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
// Bytes in and out. The table belongs to all layers of one shape, so bytes of one layer alone can be read, and cleared with all others, but not written.
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

bool all_zero(const void * data, size_t size) {
    const char * bytes = static_cast<const char *>(data);
    return std::all_of(bytes, bytes + size, [](char b) { return b == 0; });
}

} // namespace

void cuda_buffer::set(const abi::tensor * view, const void * data, size_t offset, size_t size) {
    cuda_tensor &     tensor = *any_of(view);
    const cuda::api & with   = wrapper_.worker.with;
    if (tensor.plain) {
        require_ok(with, with.upload(static_cast<char *>(view->data) + offset, data, size, wrapper_.worker.work), "filling the cache");
        require_ok(with, with.wait_stream(wrapper_.worker.work), "filling the cache");
        return;
    }
    if (!tensor.rows && all_zero(data, size)) {
        return; // clearing what was never written
    }
    fail(GEAR_ERROR_UNSUPPORTED, "restoring a state into a GEAR cache on a GPU is not there yet");
}

void cuda_buffer::get(const abi::tensor * view, void * data, size_t offset, size_t size) {
    cuda_tensor &     tensor = *any_of(view);
    const cuda::api & with   = wrapper_.worker.with;
    if (tensor.plain) {
        require_ok(with, with.download(data, static_cast<const char *>(view->data) + offset, size, wrapper_.worker.work), "reading the cache");
        require_ok(with, with.wait_stream(wrapper_.worker.work), "reading the cache");
        return;
    }
    if (!tensor.rows) {
        memset(data, 0, size);
        return;
    }
    const size_t begin = (size_t) (static_cast<const char *>(view->data) - tensor.space->data()) + offset, row = (size_t) tensor.row_bytes();
    if (begin + size > tensor.bytes) {
        fail(GEAR_ERROR_INVALID, "bytes %zu to %zu are outside of the cache tensor (%zu bytes)", begin, begin + size, tensor.bytes);
    }
    const int64_t         first = (int64_t) (begin / row), n = (int64_t) ((begin + size + row - 1) / row) - first;
    std::vector<uint16_t> rows((size_t) (n * tensor.n_embd));
    tensor.rows->read(wrapper_.worker, first, n, rows.data());
    memcpy(data, reinterpret_cast<const char *>(rows.data()) + begin % row, size);
}

// Copies between streams (seq_cp) come layer by layer, but the table is one for all layers: not there yet.
bool cuda_buffer::copy(const abi::tensor * source, const abi::tensor * target) {
    const cuda_tensor *from = find(source), *to = find(target);
    if (from || to) {
        fail(GEAR_ERROR_UNSUPPORTED, "copying a sequence to another stream is not there yet for a GEAR cache on a GPU; use kv_unified");
    }
    return false;
}

void cuda_buffer::clear(uint8_t value) {
    const cuda::api & with = wrapper_.worker.with;
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
    wrapper_.worker.is_broken = false;
    require_ok(with, with.wait_stream(wrapper_.worker.work), "clearing the cache");
}

void cuda_buffer::stats(std::vector<gear_store_stats> & out) {
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

bool is_view_op(int op) {
    const abi::numbers & number = abi::number();
    return op == number.op_none || op == number.op_view || op == number.op_reshape || op == number.op_permute || op == number.op_transpose;
}

cuda_tensor * cache_of(const abi::tensor * source) {
    return source ? cuda_buffer::find(source) : nullptr;
}

// SET_ROWS of whole rows: cells from src[1], rows from src[0], into src[2].
bool is_row_write(const abi::tensor * op) {
    const abi::numbers & number = abi::number();
    const cuda_tensor *  tensor = cache_of(op->src[2]);
    const abi::tensor *  rows = op->src[0], *cells = op->src[1];
    return op->op == number.op_set_rows && tensor && op->ne[0] == tensor->n_embd && op->ne[2] == 1 && op->ne[3] == 1 && op->view_offs == 0 &&
           rows->ne[2] == 1 && rows->ne[3] == 1 && (rows->type == number.type_f32 || rows->type == number.type_f16) &&
           (cells->type == number.type_i64 || cells->type == number.type_i32);
}

bool is_attention_view(const abi::tensor * view, const cuda_tensor & tensor) {
    const size_t row = (size_t) tensor.row_bytes(), stream = row * (size_t) tensor.n_cell;
    return view->ne[0] * view->ne[2] == tensor.n_embd && view->nb[0] == 2 && view->nb[1] == row && view->nb[2] == (size_t) view->ne[0] * 2 &&
           view->ne[1] <= tensor.n_cell && (view->ne[3] == 1 || view->nb[3] == stream) && view->view_offs % stream == 0;
}

bool is_attention(const abi::tensor * op) {
    const cuda_tensor *k = cache_of(op->src[1]), *v = cache_of(op->src[2]);
    return op->op == abi::number().op_flash_attn && k && v && k != v && k->side == GEAR_SIDE_K && v->side == GEAR_SIDE_V &&
           is_attention_view(op->src[1], *k) && is_attention_view(op->src[2], *v) && op->src[0]->type == abi::number().type_f32;
}

bool touches_cache(const abi::tensor * op) {
    return std::any_of(op->src, op->src + abi::max_src, [](const abi::tensor * source) { return cache_of(source) != nullptr; });
}

} // namespace

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
    std::vector<char>                                                      cells;
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
    if (b.reached) {
        b.inner->iface.event_record(b.inner, b.reached);
        require_ok(worker.with, worker.with.wait_event(worker.work, native(b.reached)), "waiting for an event");
    }
}

void let_ggml_wait(cuda_backend & b) {
    const cuda::cuda_worker & worker = b.wrapper->worker;
    if (b.done) {
        require_ok(worker.with, worker.with.record(native(b.done), worker.work), "recording an event");
        b.inner->iface.event_wait(b.inner, b.done);
    }
}

void run_write(cuda_backend & b, const abi::tensor * node) {
    cuda_tensor & tensor = *cache_of(node->src[2]);
    tensor.home->settle(tensor);
    cuda::cache_table & table = tensor.rows->table();
    const abi::tensor * rows = node->src[0], *cells = node->src[1];
    const auto          same = std::find_if(b.planned.begin(), b.planned.end(), [&](const auto & p) { return p.first == &table; });
    if (same == b.planned.end()) {
        const void * data = nullptr;
        if (cells->buf && abi::ggml().ggml_backend_buft_is_host(cells->buf->buft)) {
            data = cells->data;
        } else if (all_uploads().find(cells, b.cells)) {
            data = b.cells.data();
        } else {
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

int compute(cuda_backend & b, const abi::cgraph & graph) {
    cuda_wrapper & wrapper = *b.wrapper;
    bool           flagged = false, touches = false;
    for (int i = 0; i < graph.n_nodes; ++i) {
        flagged |= (graph.nodes[i]->flags & flag_compute) != 0; // releases before the flag compute every node
        touches |= !is_view_op(graph.nodes[i]->op) && cuda_wrapper::observe(graph.nodes[i]);
    }
    if (!touches) {
        return b.inner->iface.graph_compute(b.inner, const_cast<abi::cgraph *>(&graph));
    }
    std::lock_guard<std::mutex> guard(wrapper.lock);
    const kept_error            earlier = wrapper.device().take_error(); // of a set_tensor or clear, which could not say so
    if (earlier.status != GEAR_OK) {
        throw error(earlier.status, earlier.text);
    }
    if (wrapper.worker.is_broken) {
        fail(GEAR_ERROR_INTERNAL, "an earlier step failed half-way, and the cache no longer holds what it should; clear it (llama_memory_clear)");
    }
    int before;
    wrapper.worker.with.current_device(&before);
    wrapper.worker.select();
    b.planned.clear();
    int  first               = 0; // of the segment in progress
    bool is_ours             = false;
    wrapper.worker.is_broken = true; // until it is done
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
        } else {
            fail(GEAR_ERROR_UNSUPPORTED,
                 "the graph uses the KV cache with %s, which a GEAR cache on a GPU does not support; use kv_type='f16' for this model",
                 abi::ggml().ggml_op_name(node->op));
        }
    }
    if (is_ours) {
        let_ggml_wait(b);
    }
    wrapper.worker.is_broken = false;
    wrapper.worker.with.select_device(before);
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
    if (!worker.with.is_emulated) {
        for (abi::event ** e : { &b->reached, &b->done }) {
            *e = inner_->iface.event_new ? inner_->iface.event_new(inner_) : nullptr;
            if (!*e || reinterpret_cast<event_view *>(*e)->dev != inner_ || !reinterpret_cast<event_view *>(*e)->context) {
                free_events(*b);
                abi::ggml().ggml_backend_free(made);
                fail(GEAR_ERROR_UNSUPPORTED, "this ggml-cuda has no events (GGML_CUDA_NO_PEER_COPY), which a GEAR cache on a GPU needs");
            }
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
    const bool   is_cpu = abi::ggml().ggml_backend_dev_type(inner) == abi::device_cpu; // in tests
    if (!is_cpu && strncmp(name, "CUDA", 4) != 0) {
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
    if (is_cpu != table->is_emulated) {
        fail(GEAR_ERROR_UNSUPPORTED, "the library that GEARCPP_CUDA_LIBRARY names is for tests over the CPU, not for '%s'", name);
    }
    return *table;
}

// CUDA's number of ggml's device: where its buffers lie.
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
    if (!buffer || worker.with.is_emulated || buffer->iface.set_tensor == watched_set_tensor) {
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
    worker.select();
    worker.with.wait_stream(worker.work);
    buffers_.erase(buffer);
}

std::vector<gear_store_stats> cuda_wrapper::stats() {
    std::lock_guard<std::mutex>   guard(lock);
    std::vector<gear_store_stats> all;
    worker.select();
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
