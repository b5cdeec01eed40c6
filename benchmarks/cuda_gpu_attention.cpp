// cuda_gpu_attention.cpp - attention alone on a GPU: gearcpp's kernels against ggml-cuda's FLASH_ATTN_EXT on f16, q8_0 and q4_0, for the shapes of
// Llama-3-8B and Qwen2.5-7B, batch 1, 4 and 16, at growing depth; and the copy bandwidth of the same run. Built and run by cuda_gpu.sh.
//     cuda_gpu_attention PATH/libgearcpp-cuda.so OUT.jsonl [SECONDS]
// One line of JSON a measurement, appended as it is made, the most important cases first; the run ends by itself after SECONDS (status 3: some cases were
// left), and cases that OUT.jsonl has already are not measured again.
#include "codec/codec.h"
#include "common/half.h"
#include "cuda/api.h"
#include "gearcpp.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

using clock_type = std::chrono::steady_clock;

struct shape {
    const char * name;
    int          n_head_kv, n_share, d;
};

const shape shapes[]  = { { "llama-3-8b", 8, 4, 128 }, { "qwen2.5-7b", 4, 7, 128 } };

// Queries, batch, depth: decode where it must win, a step of a prompt, then the rest.
struct extent {
    int n_query, batch, depth;
};

const extent extents[] = {
    { 1, 1, 32768 }, { 1, 1, 4096 },   { 512, 1, 4096 }, { 1, 4, 32768 },  { 1, 1, 131072 }, { 1, 16, 4096 },  { 512, 1, 32768 }, { 1, 1, 256 },
    { 1, 1, 8192 },  { 1, 16, 32768 }, { 1, 4, 4096 },   { 1, 4, 131072 }, { 1, 16, 256 },   { 1, 16, 131072 }, { 1, 4, 8192 },    { 1, 16, 8192 },
    { 1, 4, 256 },   { 512, 1, 256 },  { 512, 1, 8192 },
};

// The case as its lines have it.
std::string name_of(const shape & sh, const char * cache, const extent & e) {
    char text[200];
    snprintf(text, sizeof text, "\"shape\": \"%s\", \"cache\": \"%s\", \"n_query\": %d, \"batch\": %d, \"depth\": %d,", sh.name, cache, e.n_query, e.batch,
             e.depth);
    return text;
}

std::string text_of_file(const char * path) {
    std::ifstream     file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

double seconds_since(clock_type::time_point start) {
    return std::chrono::duration<double>(clock_type::now() - start).count();
}

void check(const gear::cuda::api & with, int error, const char * what) {
    if (error) {
        fprintf(stderr, "%s: %s\n", what, with.error_text(error));
        exit(1);
    }
}

// Median over rounds of the mean time of some runs, in microseconds. run starts work; wait waits for all of it.
template <class Run, class Wait> double time_of(Run run, Wait wait) {
    constexpr int       n_round = 5, n_run = 20;
    std::vector<double> rounds;
    for (int i = 0; i < 3; ++i) {
        run();
    }
    wait();
    for (int round = 0; round < n_round; ++round) {
        const auto start = clock_type::now();
        for (int i = 0; i < n_run; ++i) {
            run();
        }
        wait();
        rounds.push_back(1e6 * seconds_since(start) / n_run);
    }
    std::sort(rounds.begin(), rounds.end());
    return rounds[n_round / 2];
}

struct device_memory {
    device_memory(const gear::cuda::api & with, size_t bytes) : with(with) {
        void * memory = nullptr;
        ok            = with.allocate(&memory, bytes) == 0;
        data          = static_cast<uint8_t *>(memory);
    }
    ~device_memory() { with.release(data); }
    const gear::cuda::api & with;
    uint8_t *               data;
    bool                    ok;
};

std::vector<uint16_t> random_halves(size_t n) {
    std::mt19937                    random(1);
    std::normal_distribution<float> normal;
    std::vector<uint16_t>           values(n);
    std::generate(values.begin(), values.end(), [&] { return gear::float_to_half(normal(random)); });
    return values;
}

// One side with every tile packed but for a tail of exact rows, as after a long prompt. All tiles are copies of one.
struct gear_side_memory {
    gear::tile_layout       layout;
    int                     n_row;
    size_t                  n_tile;
    device_memory           tiles, pool, slot_table;
    gear::cuda::device_side side = {};

    gear_side_memory(const gear::cuda::api & with, gear::cuda::stream s, const gear_config & config, gear_side which, const shape & sh, int n_stream, int n_cell)
        : layout(gear::make_layout(config, which, sh.d)), n_row(config.tile + 512), n_tile((size_t) (n_cell + config.tile - 1) / config.tile),
          tiles(with, n_stream * n_tile * sh.n_head_kv * layout.part.bytes), pool(with, (size_t) n_stream * n_row * sh.n_head_kv * sh.d * 2),
          slot_table(with, (size_t) n_stream * n_cell * 4) {
        if (!ok()) {
            return;
        }
        const size_t                row = (size_t) sh.n_head_kv * sh.d;
        const std::vector<uint16_t> rows = random_halves((size_t) n_row * row);
        std::vector<int32_t>        slots((size_t) n_stream * n_cell, gear::cuda::slot_packed), source(config.tile);
        for (int stream = 0; stream < n_stream; ++stream) {
            check(with, with.upload(pool.data + stream * n_row * row * 2, rows.data(), rows.size() * 2, s), "upload");
            for (int i = 0; i < config.n_tail && i < n_cell; ++i) {
                slots[(size_t) stream * n_cell + n_cell - 1 - i] = i;
            }
        }
        for (int t = 0; t < config.tile; ++t) {
            source[t] = t;
        }
        check(with, with.upload(slot_table.data, slots.data(), slots.size() * 4, s), "upload");
        side = { layout, tiles.data, reinterpret_cast<uint16_t *>(pool.data), reinterpret_cast<const int32_t *>(slot_table.data), nullptr, sh.n_head_kv, n_cell,
                 (int32_t) n_tile, n_row, true };
        device_memory              jobs(with, sizeof(gear::cuda::pack_job)), from(with, source.size() * 4), scratch(with, with.pack_scratch_bytes(&layout, 64));
        const gear::cuda::pack_job first = { 0, 0 };
        check(with, with.upload(jobs.data, &first, sizeof first, s), "upload");
        check(with, with.upload(from.data, source.data(), source.size() * 4, s), "upload");
        const gear::cuda::pack_arguments args = { side, 1, reinterpret_cast<gear::cuda::pack_job *>(jobs.data), reinterpret_cast<int32_t *>(from.data), 1, scratch.data };
        check(with, with.pack(&args, 64, s), "pack");
        const size_t tile = sh.n_head_kv * layout.part.bytes, all = n_stream * n_tile * tile;
        for (size_t done = tile; done < all; done *= 2) {
            check(with, with.copy(tiles.data + done, tiles.data, std::min(done, all - done), s), "copy");
        }
        check(with, with.wait_stream(s), "wait");
    }
    bool ok() const { return tiles.ok && pool.ok && slot_table.ok; }
};

gear_config preset(int bits) {
    gear_config config = gear_config_default();
    config.k.bits = config.v.bits = bits;
    if (bits < 4) {
        config.k.clip = config.v.clip = 0.95f;
    }
    return config;
}

double time_gear(const gear::cuda::api & with, const gear::cuda::device_facts & facts, gear::cuda::stream s, const shape & sh, int bits, int n_stream, int n_cell,
                 int n_query) {
    const gear_config config = preset(bits);
    gear_side_memory  k(with, s, config, GEAR_SIDE_K, sh, n_stream, n_cell), v(with, s, config, GEAR_SIDE_V, sh, n_stream, n_cell);
    const int         n_head = sh.n_head_kv * sh.n_share;
    const size_t      n_q    = (size_t) n_stream * n_query * n_head * sh.d;
    device_memory     q(with, n_q * 4), out(with, n_q * 4), mask(with, (size_t) n_stream * n_query * n_cell * 2);
    if (!k.ok() || !v.ok() || !q.ok || !out.ok || !mask.ok) {
        return 0;
    }
    check(with, with.fill(q.data, 0x3c, n_q * 4, s), "fill"); // 0.0115
    check(with, with.fill(mask.data, 0, (size_t) n_stream * n_query * n_cell * 2, s), "fill");
    gear_attention_params p = {};
    p.n_query  = n_query;
    p.n_head   = n_head;
    p.n_kv     = n_cell;
    p.n_stream = n_stream;
    p.q        = reinterpret_cast<float *>(q.data);
    p.mask     = reinterpret_cast<uint16_t *>(mask.data);
    p.out      = reinterpret_cast<float *>(out.data);
    p.scale    = 1 / std::sqrt((float) sh.d);
    p.q_stride[0] = (int64_t) n_head * sh.d * 4, p.q_stride[1] = sh.d * 4, p.q_stride[2] = p.q_stride[0] * n_query;
    p.out_stride[0] = sh.d * 4, p.out_stride[1] = (int64_t) n_head * sh.d * 4, p.out_stride[2] = p.out_stride[1] * n_query;
    p.mask_stride[0] = n_cell * 2, p.mask_stride[1] = p.mask_stride[2] = p.mask_stride[0] * n_query;
    p.mask_n_head = 1, p.mask_n_stream = n_stream;
    gear::cuda::attend_arguments args = { p, k.side, v.side, 0, 0, 0, 0, 0, nullptr };
    device_memory                partial(with, std::max<int64_t>(16, with.plan_attend(&args, facts.n_processor)));
    args.partial = reinterpret_cast<float *>(partial.data);
    return time_of([&] { check(with, with.attend(&args, s), "attend"); }, [&] { check(with, with.wait_stream(s), "wait"); });
}

double time_ggml(ggml_backend_t backend, const shape & sh, ggml_type type, int n_stream, int n_cell, int n_query) {
    ggml_context * ctx  = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *  q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, sh.d, n_query, sh.n_head_kv * sh.n_share, n_stream);
    ggml_tensor *  k    = ggml_new_tensor_4d(ctx, type, sh.d, n_cell, sh.n_head_kv, n_stream);
    ggml_tensor *  v    = ggml_new_tensor_4d(ctx, type, sh.d, n_cell, sh.n_head_kv, n_stream);
    ggml_tensor *  mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_cell, n_query, 1, n_stream);
    ggml_tensor *  out  = ggml_flash_attn_ext(ctx, q, k, v, mask, 1 / std::sqrt((float) sh.d), 0, 0);
    ggml_cgraph *  graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    double                time   = 0;
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    if (buffer) {
        ggml_backend_buffer_clear(buffer, 0);
        time = time_of([&] { ggml_backend_graph_compute_async(backend, graph); }, [&] { ggml_backend_synchronize(backend); });
        ggml_backend_buffer_free(buffer);
    }
    ggml_free(ctx);
    return time;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: cuda_gpu_attention LIBRARY OUT.jsonl [SECONDS]\n");
        return 2;
    }
    const auto   started = clock_type::now();
    const double limit   = argc > 3 ? atof(argv[3]) : 200;
    void *       library = dlopen(argv[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    gear::cuda::get_api get    = nullptr;
    void *              symbol = dlsym(library, "gearcpp_cuda_api");
    memcpy(&get, &symbol, sizeof symbol);
    const gear::cuda::api *  table = get ? get(gear::cuda::api_version) : nullptr;
    ggml_backend_dev_t       gpu   = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    ggml_backend_t           rival = gpu ? ggml_backend_dev_init(gpu, nullptr) : nullptr;
    const std::string        had   = text_of_file(argv[2]);
    FILE *                   out   = fopen(argv[2], "a");
    gear::cuda::device_facts facts;
    gear::cuda::stream       s;
    if (!table || !rival || !out || table->select_device(0) || table->describe(0, &facts) || table->make_stream(&s)) {
        fprintf(stderr, "no kernels, no GPU in this ggml, or no place to write\n");
        return 1;
    }
    const auto write = [&](const std::string & line) {
        fprintf(out, "%s\n", line.c_str());
        fflush(out);
    };
    char text[400];
    {
        constexpr size_t    bytes = (size_t) 2 << 30;
        const device_memory a(*table, bytes), b(*table, bytes);
        const double        us = time_of([&] { check(*table, table->copy(a.data, b.data, bytes, s), "copy"); }, [&] { table->wait_stream(s); });
        snprintf(text, sizeof text, "{\"what\": \"copy\", \"device\": \"%s\", \"sm\": %d, \"gb_per_s\": %.0f}", facts.name, facts.major * 10 + facts.minor, 2 * bytes / us / 1e3);
        write(text);
    }
    int n_left = 0;
    for (const extent & e : extents) {
        for (const shape & sh : shapes) {
            if (had.find(name_of(sh, "gear2", e)) != std::string::npos) {
                continue;
            }
            if (seconds_since(started) > limit) {
                ++n_left;
                continue;
            }
            const double read_f16 = 4.0 * e.batch * e.depth * sh.n_head_kv * sh.d;
            const auto   report   = [&](const char * name, double bits, double us) {
                snprintf(text, sizeof text, "{\"what\": \"attention\", %s \"us\": %.2f, \"gb_per_s\": %.0f}", name_of(sh, name, e).c_str(), us,
                         us > 0 ? read_f16 * bits / 16 / us / 1e3 : 0.0);
                write(text);
            };
            report("f16", 16, time_ggml(rival, sh, GGML_TYPE_F16, e.batch, e.depth, e.n_query));
            report("q8_0", 8.5, time_ggml(rival, sh, GGML_TYPE_Q8_0, e.batch, e.depth, e.n_query));
            report("q4_0", 4.5, time_ggml(rival, sh, GGML_TYPE_Q4_0, e.batch, e.depth, e.n_query));
            for (const int bits : { 4, 3, 2 }) {
                const std::string name = bits == 4 ? "gear" : "gear" + std::to_string(bits);
                report(name.c_str(), bits + 0.41, time_gear(*table, facts, s, sh, bits, e.batch, e.depth, e.n_query));
            }
        }
    }
    if (n_left > 0) {
        printf("out of time: %d cases left\n", n_left);
    }
    fclose(out);
    ggml_backend_free(rival);
    return n_left > 0 ? 3 : 0;
}
