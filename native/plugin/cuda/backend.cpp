// backend.cpp - the backend that computes graphs on a GPU. A graph runs in segments: what lies between two layers' cache operations is given to the
// wrapped backend as a graph of its own, with the uid that the whole has; then an event makes our stream wait for ggml's, our kernels are put onto our
// stream, and a second event makes ggml's wait for ours. The host waits for nothing. The backend that llama.cpp sees is the wrapped one's structure with
// three functions of ours, so that async copies, events and graph_optimize are ggml-cuda's.
#include "plugin/cuda/backend.h"

#include "cache/cuda_side.h"
#include "common/error.h"
#include "plugin/attention_node.h"
#include "plugin/cache_node.h"
#include "plugin/cuda/device.h"
#include "plugin/cuda/index_uploads.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

namespace gear {

namespace {

constexpr int     flag_compute  = 16;                 // GGML_TENSOR_FLAG_COMPUTE
constexpr int64_t shifted_bytes = (int64_t) 32 << 20; // of rows that the K-shift has unpacked at once

// ggml_backend_event
struct event_view {
    abi::device * dev;
    void *        context; // cudaEvent_t
};

struct cuda_backend {
    abi::backend   base; // first: ggml sees this. The wrapped backend's guid, context and functions, but for three
    cuda_device *  device;
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
    const cuda::cuda_worker & worker = b.device->worker();
    b.inner->iface.event_record(b.inner, b.reached);
    require_ok(worker.with, worker.with.wait_event(worker.work, native(b.reached)), "waiting for an event");
}

void let_ggml_wait(cuda_backend & b) {
    const cuda::cuda_worker & worker = b.device->worker();
    require_ok(worker.with, worker.with.record(native(b.done), worker.work), "recording an event");
    b.inner->iface.event_wait(b.inner, b.done);
}

// What the host last put into a tensor of indices; nullptr: it came from elsewhere. Until the next call.
const void * host_data(cuda_backend & b, const abi::tensor * indices) {
    if (indices->buf && abi::ggml().ggml_backend_buft_is_host(indices->buf->buft)) {
        return indices->data;
    }
    return find_index_upload(indices, b.uploaded) ? b.uploaded.data() : nullptr;
}

// Caches of this device's tensors are in its GPU's memory.
cuda_side & cache_in(const cache_tensor & tensor) {
    return static_cast<cuda_side &>(*tensor.cache);
}

cuda_memory & memory_of(const cache_tensor & tensor) {
    return static_cast<cuda_memory &>(tensor.home.memory());
}

void run_write(cuda_backend & b, const abi::tensor * node) {
    cache_tensor & tensor = *cache_of(node->src[2]);
    tensor.home.decide(tensor.il);
    cuda::cache_side &  side  = cache_in(tensor).on_device();
    cuda::cache_table & table = side.table();
    const abi::tensor * rows = node->src[0], *cells = node->src[1];
    const auto          same = std::find_if(b.planned.begin(), b.planned.end(), [&](const auto & p) { return p.first == &table; });
    if (same == b.planned.end()) {
        const void * data = host_data(b, cells);
        if (!data) {
            fail(GEAR_ERROR_UNSUPPORTED, "layer %d: the cells that a step writes were not uploaded from the host; use kv_type='f16' for this model",
                 tensor.il);
        }
        table.plan(b.device->worker(), memory_of(tensor).next_step(), rows->ne[1], { data, cells->nb[0], cells->type == abi::number().type_i64 });
        b.planned.push_back({ &table, cells });
    } else if (same->second != cells) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: layers write different cells in one step; use kv_type='f16' for this model", tensor.il);
    }
    side.write(b.device->worker(), rows->ne[1], rows->data, (int64_t) rows->nb[1], rows->type == abi::number().type_f16);
}

void run_attention(cuda_backend & b, const abi::tensor * node) {
    cache_tensor &k = *cache_of(node->src[1]), &v = *cache_of(node->src[2]);
    k.home.decide(k.il);
    v.home.decide(v.il);
    cuda::attend(b.device->worker(), attention_params(node, k.stream_bytes()), cache_in(k).on_device(), cache_in(v).on_device());
}

// The K-shift: the rows of tiles with a shifted cell are unpacked into memory of ggml's, where its own ROPE turns them. Not on the way of a token, so that
// memory may be allocated and the host may wait.
void run_shift(cuda_backend & b, const abi::cgraph & graph, const abi::tensor * node) {
    cache_tensor & tensor = *cache_of(node->src[0]);
    if (!tensor.cache) {
        return; // nothing was ever written
    }
    const void * shift = host_data(b, node->src[1]);
    if (!shift) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: the K-shift was not uploaded from the host; use kv_type='f16' for this model", tensor.il);
    }
    const std::vector<uint8_t> marked = shifted_cells(shift, node->src[1]->ne[0]);
    const int64_t              tile = tensor.cache->shape().tile, of_tile = tile * tensor.row_bytes();
    const int64_t              most_tiles = std::clamp<int64_t>(shifted_bytes / of_tile, 1, (tensor.n_cell - 1) / tile + 1);
    abi::buffer *              staging =
        abi::ggml().ggml_backend_buft_alloc_buffer(abi::ggml().ggml_backend_dev_buffer_type(b.device->inner()), (size_t) (most_tiles * of_tile));
    if (!staging) {
        fail(GEAR_ERROR_MEMORY, "the GPU has not the %.1f MiB that a shift of the context needs", (double) (most_tiles * of_tile) / 1048576.0);
    }
    const auto                                              give_back = [](abi::buffer * buffer) { abi::ggml().ggml_backend_buffer_free(buffer); };
    const std::unique_ptr<abi::buffer, decltype(give_back)> owner(staging, give_back);

    auto * rows = static_cast<uint16_t *>(abi::ggml().ggml_backend_buffer_get_base(staging));
    tensor.cache->update(marked.data(), { rows, most_tiles }, [&](int64_t first, int64_t n, uint16_t * at) {
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

// Run one node on the cache.
void run_on_cache(cuda_backend & b, const abi::cgraph & graph, const abi::tensor * node) {
    if (is_row_write(node)) {
        run_write(b, node);
    } else if (is_attention(node)) {
        run_attention(b, node);
    } else if (is_shift(node)) {
        run_shift(b, graph, node);
    } else {
        fail(GEAR_ERROR_UNSUPPORTED, "the graph uses the KV cache with %s, which a GEAR cache on a GPU does not support; use kv_type='f16' for this model",
             abi::ggml().ggml_op_name(node->op));
    }
}

// All nodes, by turns on ggml's stream and on ours.
int run_graph(cuda_backend & b, const abi::cgraph & graph, bool has_flags) {
    int  first   = 0; // of the segment in progress
    bool is_ours = false;
    for (int i = 0; i <= graph.n_nodes; ++i) {
        const abi::tensor * node = i < graph.n_nodes ? graph.nodes[i] : nullptr;
        if (node && (is_view_op(node->op) || !touches_cache(node) || (has_flags && !(node->flags & flag_compute)))) {
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
        if (node) {
            run_on_cache(b, graph, node);
        }
    }
    if (is_ours) {
        let_ggml_wait(b);
    }
    return abi::graph_success;
}

int compute(cuda_backend & b, const abi::cgraph & graph) {
    cuda_device &           device    = *b.device;
    bool                    has_flags = false; // releases before the flag compute every node
    std::set<cuda_memory *> touched;
    for (int i = 0; i < graph.n_nodes; ++i) {
        const abi::tensor * node = graph.nodes[i];
        has_flags |= (node->flags & flag_compute) != 0;
        if (!is_view_op(node->op) && observe(node)) {
            for (const abi::tensor * source : node->src) {
                if (cache_of(source)) {
                    touched.insert(&memory_of(*cache_of(source)));
                }
            }
        }
    }
    if (touched.empty()) {
        return b.inner->iface.graph_compute(b.inner, const_cast<abi::cgraph *>(&graph));
    }
    const std::lock_guard<std::mutex> guard(device.lock());
    const kept_error                  earlier = device.take_error(); // of a set_tensor or clear, which could not say so
    if (earlier.status != GEAR_OK) {
        throw error(earlier.status, earlier.text);
    }
    int status = abi::graph_failed;
    (*touched.begin())->use([&] {
        for (cuda_memory * memory : touched) {
            if (std::exchange(memory->is_broken, true)) { // until it is done
                fail(GEAR_ERROR_INTERNAL, "an earlier step failed half-way, and the cache no longer holds what it should; clear it (llama_memory_clear)");
            }
            memory->share_tables();
        }
        b.planned.clear();
        status = run_graph(b, graph, has_flags);
    });
    for (cuda_memory * memory : touched) {
        memory->is_broken = status != abi::graph_success;
    }
    return status;
}

int graph_compute(abi::backend * backend, abi::cgraph * graph) {
    cuda_backend &    b      = self(backend);
    int               result = abi::graph_failed;
    const gear_status status = guarded([&] { result = compute(b, *graph); });
    if (status != GEAR_OK) {
        b.device->set_error(status, gear_last_error());
        return abi::graph_failed;
    }
    return result;
}

const char * get_name(abi::backend * backend) {
    return abi::ggml().ggml_backend_dev_name(self(backend).device->ggml_device());
}

void free_events(cuda_backend & b) {
    for (abi::event * e : { b.reached, b.done }) {
        if (e) {
            b.device->inner()->iface.event_free(b.device->inner(), e);
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

abi::backend * make_backend(cuda_device & device) {
    abi::device * const inner = device.inner();
    abi::backend *      made  = abi::ggml().ggml_backend_dev_init(inner, nullptr);
    if (!made) {
        fail(GEAR_ERROR_INTERNAL, "the wrapped ggml device could not make a backend");
    }
    auto b                      = std::make_unique<cuda_backend>();
    b->base                     = *made;
    b->base.iface.get_name      = get_name;
    b->base.iface.free          = free_backend;
    b->base.iface.graph_compute = graph_compute;
    b->base.dev                 = device.ggml_device();
    b->device                   = &device;
    b->inner                    = made;
    for (abi::event ** e : { &b->reached, &b->done }) {
        *e = inner->iface.event_new ? inner->iface.event_new(inner) : nullptr;
        if (!*e || reinterpret_cast<event_view *>(*e)->dev != inner || !reinterpret_cast<event_view *>(*e)->context) {
            free_events(*b);
            abi::ggml().ggml_backend_free(made);
            fail(GEAR_ERROR_UNSUPPORTED, "this ggml-cuda has no events (GGML_CUDA_NO_PEER_COPY), which a GEAR cache on a GPU needs");
        }
    }
    return &b.release()->base;
}

} // namespace gear
