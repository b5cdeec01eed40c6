// cuda_gpu_probe.cu - the first question for a GPU: what does it cost to run a decoding step in n_layer + 1 segments, with a kernel of our own between two
// events in each gap, against one graph; and does capturing the whole step in one outer CUDA graph remove it? Built and run by cuda_gpu.sh.
//     cuda_gpu_probe OUT.jsonl
// The step is Llama-3-8B's products, norms and activations without attention (Q4_0 weights, batch 1), so that only the cutting differs:
//     whole       one graph with a uid, as llama.cpp runs it (ggml captures it into a CUDA graph by itself)
//     segments    n_layer + 1 graphs, nothing between
//     events      n_layer + 1 graphs; between them record, wait, an empty kernel on another stream, record, wait
//     outer       the same, captured once into one CUDA graph and launched from then on; needs GGML_CUDA_DISABLE_GRAPHS=1, so it is a process of its own
#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <string>
#include <vector>

namespace {

constexpr int n_layer = 32, n_embd = 4096, n_ff = 14336, n_kv = 1024;

__global__ void between(float * x) {
    if (threadIdx.x == 0) {
        x[0] += 1.0f;
    }
}

void check(cudaError_t error, const char * what) {
    if (error != cudaSuccess) {
        fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
        exit(1);
    }
}

struct step {
    ggml_context *         ctx   = ggml_init({ (size_t) 64 << 20, nullptr, true });
    ggml_cgraph *          graph = ggml_new_graph_custom(ctx, 4096, false);
    std::vector<int>       cuts; // a segment ends before this node
    ggml_backend_buffer_t  buffer = nullptr;

    explicit step(ggml_backend_t backend) {
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, 1);
        const auto    w = [&](int in, int out) { return ggml_new_tensor_2d(ctx, GGML_TYPE_Q4_0, in, out); };
        for (int i = 0; i < n_layer; ++i) {
            ggml_tensor * norm = ggml_mul(ctx, ggml_rms_norm(ctx, x, 1e-5f), ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_embd));
            ggml_tensor * q = ggml_mul_mat(ctx, w(n_embd, n_embd), norm), *k = ggml_mul_mat(ctx, w(n_embd, n_kv), norm), *v = ggml_mul_mat(ctx, w(n_embd, n_kv), norm);
            for (ggml_tensor * t : { q, k, v }) {
                ggml_build_forward_expand(graph, t);
            }
            cuts.push_back(ggml_graph_n_nodes(graph));
            x    = ggml_add(ctx, x, ggml_mul_mat(ctx, w(n_embd, n_embd), q));
            norm = ggml_mul(ctx, ggml_rms_norm(ctx, x, 1e-5f), ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_embd));
            x    = ggml_add(ctx, x, ggml_mul_mat(ctx, w(n_ff, n_embd), ggml_swiglu_split(ctx, ggml_mul_mat(ctx, w(n_embd, n_ff), norm), ggml_mul_mat(ctx, w(n_embd, n_ff), norm))));
            ggml_build_forward_expand(graph, x);
        }
        cuts.push_back(ggml_graph_n_nodes(graph));
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        if (!buffer) {
            fprintf(stderr, "not enough memory for the step\n");
            exit(1);
        }
        ggml_backend_buffer_clear(buffer, 0);
    }
};

template <class Run> double microseconds(ggml_backend_t backend, Run run) {
    std::vector<double> rounds;
    for (int i = 0; i < 5; ++i) {
        run();
    }
    ggml_backend_synchronize(backend);
    for (int round = 0; round < 7; ++round) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < 20; ++i) { // a token needs its logits before the next one: wait for each
            run();
            ggml_backend_synchronize(backend);
        }
        rounds.push_back(1e6 / 20 * std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(rounds.begin(), rounds.end());
    return rounds[3];
}

} // namespace

int main(int argc, char ** argv) {
    ggml_backend_dev_t gpu     = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    ggml_backend_t     backend = gpu ? ggml_backend_dev_init(gpu, nullptr) : nullptr;
    FILE *             out     = argc > 1 ? fopen(argv[1], "a") : nullptr;
    if (!backend || !out) {
        fprintf(stderr, "usage: cuda_gpu_probe OUT.jsonl, with a ggml that has a GPU\n");
        return 1;
    }
    check(cudaSetDevice(0), "cudaSetDevice");
    step         s(backend);
    cudaStream_t ours;
    float *      x = nullptr;
    check(cudaStreamCreateWithFlags(&ours, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaMalloc(&x, 4), "cudaMalloc");
    ggml_backend_event_t reached = ggml_backend_event_new(gpu), done = ggml_backend_event_new(gpu);
    const bool           has_graphs = getenv("GGML_CUDA_DISABLE_GRAPHS") == nullptr;
    const auto           report     = [&](const char * name, double us) {
        fprintf(out, "{\"what\": \"probe\", \"name\": \"%s\", \"ggml_graphs\": %s, \"us\": %.1f}\n", name, has_graphs ? "true" : "false", us);
        fflush(out);
        printf("%-10s %s %.1f us a step\n", name, has_graphs ? "with ggml's graphs" : "without ggml's graphs", us);
    };
    s.graph->uid = 1;
    const auto segments = [&](bool with_events) {
        int first = 0;
        for (const int cut : s.cuts) {
            ggml_cgraph part = *s.graph;
            part.nodes       = s.graph->nodes + first;
            part.n_nodes     = cut - first;
            first            = cut;
            if (ggml_backend_graph_compute_async(backend, &part) != GGML_STATUS_SUCCESS) {
                fprintf(stderr, "a segment failed\n");
                exit(1);
            }
            if (with_events) {
                ggml_backend_event_record(reached, backend);
                check(cudaStreamWaitEvent(ours, (cudaEvent_t) reached->context, 0), "cudaStreamWaitEvent");
                between<<<1, 32, 0, ours>>>(x);
                check(cudaEventRecord((cudaEvent_t) done->context, ours), "cudaEventRecord");
                ggml_backend_event_wait(backend, done);
            }
        }
    };
    report("whole", microseconds(backend, [&] { ggml_backend_graph_compute_async(backend, s.graph); }));
    report("segments", microseconds(backend, [&] { segments(false); }));
    report("events", microseconds(backend, [&] { segments(true); }));
    if (!has_graphs && reached && done) { // one capture around everything: ggml's stream joins it through an event
        cudaGraph_t     graph;
        cudaGraphExec_t instance;
        cudaEvent_t     fork;
        check(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming), "cudaEventCreate");
        ggml_backend_synchronize(backend);
        check(cudaStreamBeginCapture(ours, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
        check(cudaEventRecord((cudaEvent_t) done->context, ours), "cudaEventRecord");
        ggml_backend_event_wait(backend, done);
        segments(true);
        ggml_backend_event_record(reached, backend);
        check(cudaStreamWaitEvent(ours, (cudaEvent_t) reached->context, 0), "cudaStreamWaitEvent");
        const cudaError_t ended = cudaStreamEndCapture(ours, &graph);
        if (ended != cudaSuccess) {
            fprintf(out, "{\"what\": \"probe\", \"name\": \"outer\", \"error\": \"%s\"}\n", cudaGetErrorString(ended));
            printf("outer capture failed: %s\n", cudaGetErrorString(ended));
            return 0;
        }
        check(cudaGraphInstantiate(&instance, graph, 0), "cudaGraphInstantiate");
        report("outer", microseconds(backend, [&] {
                   check(cudaGraphLaunch(instance, ours), "cudaGraphLaunch");
                   check(cudaStreamSynchronize(ours), "cudaStreamSynchronize");
               }));
    }
    fclose(out);
    return 0;
}
