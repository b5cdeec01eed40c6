// backend.cpp - the backend that computes graphs: everything on the wrapped backend, and the few ops that touch a GEAR cache with our code, inside the
// wrapped backend's own threads. The graph that llama.cpp gave is never changed: a shadow graph with its own node array is run, in which copies of those
// nodes have become CUSTOM nodes.

#include "plugin/cpu/backend.h"

#include "attention/attention.h"
#include "cache/host_side.h"
#include "common/error.h"
#include "plugin/attention_node.h"
#include "plugin/cache_node.h"
#include "plugin/cpu/device.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <unistd.h>

namespace gear {

namespace {

const uint8_t gear_guid[16] = { 0x67, 0x65, 0x61, 0x72, 0x63, 0x70, 0x70, 0x2d, 0x6b, 0x76, 0x2d, 0x63, 0x61, 0x63, 0x68, 0x65 };

struct gear_backend;

// One replaced node: what the CUSTOM op is given as userdata.
struct job {
    gear_backend * owner;
    store *        target; // of a write
    attention_op   attend; // of an attention
    abi::tensor    node;   // the copy that stands in the shadow graph
};

struct gear_backend {
    abi::backend   base; // first: ggml sees this
    cpu_device *   device;
    abi::backend * inner     = nullptr; // nullptr: it was given up, and the next graph makes another
    int            n_threads = 4;       // ggml's default
    barrier        sync;

    abi::abort_callback abort      = nullptr;
    void *              abort_data = nullptr;

    std::vector<abi::tensor *> nodes; // of the shadow graph
    std::deque<job>            jobs;  // kept from graph to graph, so that decoding allocates nothing
    size_t                     n_job = 0;

    std::unique_ptr<char[]> scratch_memory;
    size_t                  scratch_bytes = 0;
    size_t                  pack_bytes    = 0; // scratch that the team's threads have for packing
    kept_error              failure;           // of an op in the graph being computed

    void * scratch() const { return reinterpret_cast<void *>(((uintptr_t) scratch_memory.get() + tile_align - 1) / tile_align * tile_align); }

    job & next_job(const abi::tensor * node) {
        if (n_job == jobs.size()) {
            jobs.emplace_back();
        }
        job & j  = jobs[n_job++];
        j.owner  = this;
        j.target = nullptr;
        j.node   = *node;
        return j;
    }

    void reserve_scratch(size_t bytes) {
        if (bytes <= scratch_bytes) {
            return;
        }
        scratch_memory.reset(new char[bytes + tile_align]);
        device->count_scratch((int64_t) bytes - (int64_t) scratch_bytes);
        scratch_bytes = bytes;
    }

    void expect_packing(const store & target) {
        const size_t bytes = target.scratch_bytes() * (size_t) n_threads;
        if (bytes > pack_bytes) {
            device->count_scratch((int64_t) bytes - (int64_t) pack_bytes);
            pack_bytes = bytes;
        }
    }
};

gear_backend & self(abi::backend * backend) {
    return *reinterpret_cast<gear_backend *>(backend);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Ops, run by every thread of ggml's team
// ---------------------------------------------------------------------------------------------------------------------------------------------

void run_write(abi::tensor * node, int ith, int nth, void * userdata) {
    job &              j    = *static_cast<job *>(userdata);
    const abi::tensor *rows = node->src[0], *cells = node->src[1];
    const team         t      = { ith, nth, &j.owner->sync };
    const row_source   source = { rows->data, rows->nb[1], rows->type == abi::number().type_f16 };
    const cell_source  where  = { cells->data, cells->nb[0], cells->type == abi::number().type_i64 };
    if (!j.target->write(t, rows->ne[1], where, source) && ith == 0) {
        j.owner->failure.keep(j.target->status(), j.target->message());
    }
}

void run_attention(abi::tensor *, int ith, int nth, void * userdata) {
    job & j = *static_cast<job *>(userdata);
    attention(j.attend, { ith, nth, &j.owner->sync }, j.owner->scratch());
}

// Caches of this device's tensors are in host memory.
host_side & cache_in(const cache_tensor & tensor) {
    return static_cast<host_side &>(*tensor.cache);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Graphs
// ---------------------------------------------------------------------------------------------------------------------------------------------

// A function of the wrapped backend's registry, by name.
template <class F> F inner_function(const gear_backend & b, const char * name) {
    F      function = nullptr;
    void * address  = abi::ggml().ggml_backend_reg_get_proc_address(abi::ggml().ggml_backend_dev_backend_reg(b.device->inner()), name);
    memcpy(&function, &address, sizeof function);
    return function;
}

// Hand the settings of the backend to the wrapped one.
void pass_threads(gear_backend & b) {
    using setter = void (*)(abi::backend *, int);
    if (const auto set = inner_function<setter>(b, "ggml_backend_set_n_threads"); set && b.inner) {
        set(b.inner, b.n_threads);
    }
}

void pass_abort(gear_backend & b) {
    using setter = void (*)(abi::backend *, abi::abort_callback, void *);
    if (const auto set = inner_function<setter>(b, "ggml_backend_set_abort_callback"); set && b.inner) {
        set(b.inner, b.abort, b.abort_data);
    }
}

void make_inner(gear_backend & b) {
    b.inner = abi::ggml().ggml_backend_dev_init(b.device->inner(), nullptr);
    if (!b.inner) {
        fail(GEAR_ERROR_INTERNAL, "the wrapped ggml device could not make a backend");
    }
}

// Run nodes on the wrapped backend, as a graph that shares everything else with `like`.
int run_nodes(gear_backend & b, const abi::cgraph & like, abi::tensor ** nodes, int n) {
    if (n == 0) {
        return abi::graph_success;
    }
    if (!b.inner) {
        make_inner(b);
        pass_threads(b);
        pass_abort(b);
    }
    abi::cgraph shadow = like;
    shadow.nodes       = nodes;
    shadow.n_nodes     = n;
    try {
        return b.inner->iface.graph_compute(b.inner, &shadow);
    } catch (...) {
        // Memory was short. ggml's CPU backend (0.25.3) has freed its work space before it asked for more, and would free it again: it is left alone
        // from here on, which costs its few bytes.
        b.inner = nullptr;
        throw;
    }
}

// The K-shift of a GEAR cache: only tiles with a shifted cell, each through ggml's own ROPE on a copy of its rows.
int run_shift(gear_backend & b, const abi::cgraph & graph, const abi::tensor * node, cache_tensor & tensor) {
    const std::vector<uint8_t> marked = shifted_cells(node->src[1]->data, node->src[1]->ne[0]);
    int                        status = abi::graph_success;
    tensor.cache->update(marked.data(), {}, [&](int64_t first_cell, int64_t n, uint16_t * rows) {
        part_of_shift part;
        part.make(node, (size_t) tensor.row_bytes(), first_cell, n, rows, nullptr);
        abi::tensor * nodes[1] = { &part.rotated };
        const int     result   = run_nodes(b, graph, nodes, 1);
        status                 = result != abi::graph_success ? result : status;
    });
    return status;
}

// The KV buffers that a graph touches, each locked, in one order for all threads.
struct buffer_locks {
    std::vector<kv_buffer *> buffers;
    void                     lock() {
        std::sort(buffers.begin(), buffers.end());
        buffers.erase(std::unique(buffers.begin(), buffers.end()), buffers.end());
        for (kv_buffer * buffer : buffers) {
            buffer->memory().lock().lock();
        }
    }
    ~buffer_locks() {
        for (kv_buffer * buffer : buffers) {
            buffer->memory().lock().unlock();
        }
    }
};

void decide_touched(const abi::tensor * op) {
    for (const abi::tensor * source : op->src) {
        cache_tensor * tensor = cache_of(source);
        if (tensor && tensor->kind == cache_kind::undecided) {
            tensor->home.decide(tensor->il);
        }
    }
}

// The node to run in place of `node`: itself, or a CUSTOM copy. `shift` is set when it is the K-shift of a GEAR cache instead.
abi::tensor * shadow_of(gear_backend & b, abi::tensor * node, cache_tensor *& shift, size_t & scratch) {
    shift                       = nullptr;
    const abi::numbers & number = abi::number();
    if (is_view_op(node->op)) {
        return node;
    }
    job * replaced = nullptr;
    for (int i = 0; i < abi::max_src && !replaced; ++i) {
        cache_tensor * tensor = cache_of(node->src[i]);
        if (!tensor || !tensor->is_store()) {
            continue;
        }
        if (!tensor->use.other.empty()) {
            fail(GEAR_ERROR_UNSUPPORTED,
                 "layer %d: the graph uses the KV cache with %s, which a GEAR cache does not support; use kv_type='f16' for this model", tensor->il,
                 tensor->use.other.c_str());
        }
        if (node->op == number.op_rope) {
            shift = tensor;
            return node;
        }
        replaced                = &b.next_job(node);
        abi::custom_params call = { run_write, -1, replaced };
        if (node->op == number.op_set_rows) {
            replaced->target = &cache_in(*tensor).cells();
            b.expect_packing(*replaced->target);
        } else {
            replaced->attend =
                attention_of(attention_params(node, tensor->stream_bytes()), cache_in(*tensor), cache_in(*cache_of(node->src[2])), latent_channels(node));
            scratch  = std::max(scratch, attention_scratch_bytes(replaced->attend, b.n_threads));
            call.fun = run_attention;
        }
        replaced->node.op = number.op_custom;
        memcpy(replaced->node.op_params, &call, sizeof call);
    }
    return replaced ? &replaced->node : node;
}

// A child of a process in which OpenMP has had several threads would wait for them for ever.
void check_fork(const gear_backend & b) {
    static std::atomic<pid_t> first_user{ 0 }; // of several threads
    if (b.n_threads == 1 || !abi::uses_gnu_openmp()) {
        return;
    }
    pid_t user = 0;
    if (!first_user.compare_exchange_strong(user, getpid()) && user != getpid()) {
        fail(GEAR_ERROR_UNSUPPORTED,
             "this process was forked from one in which llama.cpp had computed with several threads, which GNU OpenMP does not survive: fork before the "
             "first token, start processes afresh (multiprocessing's 'spawn'), or use n_threads=1 and n_threads_batch=1 here");
    }
}

int compute(gear_backend & b, const abi::cgraph & graph) {
    check_fork(b);
    buffer_locks locks;
    for (int i = 0; i < graph.n_nodes; ++i) {
        const abi::tensor * node = graph.nodes[i];
        if (!is_view_op(node->op) && observe(node)) {
            for (const abi::tensor * source : node->src) {
                if (cache_of(source)) {
                    locks.buffers.push_back(kv_buffer::of(source));
                }
            }
        }
    }
    if (locks.buffers.empty()) {
        return run_nodes(b, graph, graph.nodes, graph.n_nodes);
    }
    locks.lock();
    const kept_error earlier = b.device->take_error(); // of a set_tensor or clear, which could not say so
    if (earlier.status != GEAR_OK) {
        throw error(earlier.status, earlier.text);
    }

    b.nodes.clear();
    b.n_job        = 0;
    b.failure      = {};
    size_t scratch = 0;
    int    status  = abi::graph_success;
    for (int i = 0; i < graph.n_nodes && status == abi::graph_success; ++i) {
        abi::tensor * node = graph.nodes[i];
        if (!is_view_op(node->op)) {
            decide_touched(node);
        }
        cache_tensor * shift;
        abi::tensor *  shadow = shadow_of(b, node, shift, scratch);
        if (!shift) {
            b.nodes.push_back(shadow);
            continue;
        }
        b.reserve_scratch(scratch);
        status = run_nodes(b, graph, b.nodes.data(), (int) b.nodes.size());
        b.nodes.clear();
        if (status == abi::graph_success) {
            status = run_shift(b, graph, node, *shift);
        }
    }
    b.reserve_scratch(scratch);
    if (status == abi::graph_success) {
        status = run_nodes(b, graph, b.nodes.data(), (int) b.nodes.size());
    }
    if (b.failure.status != GEAR_OK) {
        throw error(b.failure.status, b.failure.text);
    }
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// ggml's backend interface
// ---------------------------------------------------------------------------------------------------------------------------------------------

const char * get_name(abi::backend * backend) {
    return abi::ggml().ggml_backend_dev_name(self(backend).device->ggml_device());
}

void free_backend(abi::backend * backend) {
    gear_backend & b = self(backend);
    b.device->count_scratch(-(int64_t) (b.scratch_bytes + b.pack_bytes));
    if (b.inner) {
        abi::ggml().ggml_backend_free(b.inner);
    }
    delete &b;
}

int graph_compute(abi::backend * backend, abi::cgraph * graph) {
    gear_backend &    b      = self(backend);
    int               result = abi::graph_failed;
    const gear_status status = guarded([&] { result = compute(b, *graph); });
    if (status != GEAR_OK) {
        b.device->set_error(status, gear_last_error());
        return abi::graph_failed;
    }
    return result;
}

} // namespace

abi::backend * make_backend(cpu_device & device) {
    auto b    = std::make_unique<gear_backend>();
    b->device = &device;
    make_inner(*b);
    b->base                     = {};
    b->base.guid                = gear_guid;
    b->base.iface.get_name      = get_name;
    b->base.iface.free          = free_backend;
    b->base.iface.graph_compute = graph_compute;
    b->base.dev                 = device.ggml_device();
    b->base.context             = b.get();
    return &b.release()->base;
}

void set_backend_threads(abi::backend * backend, int n_threads) {
    self(backend).n_threads = n_threads;
    pass_threads(self(backend));
}

void set_backend_abort(abi::backend * backend, abi::abort_callback callback, void * data) {
    self(backend).abort      = callback;
    self(backend).abort_data = data;
    pass_abort(self(backend));
}

} // namespace gear
