// cuda_cases.h - what the kernels of native/cuda must give, as cases that run through the table of api.h: on the CPU behind cuda_on_cpu.h (test_cuda) and
// on a GPU (cuda_device_tests). Tiles are compared byte for byte with the codec's, attention with attention_scalar.cpp.
#pragma once

#include "attention/attention.h"
#include "cache/gear_codec.h"
#include "check.h"
#include "codec/codec.h"
#include "common/error.h"
#include "common/half.h"
#include "cuda/cuda_cache.h"
#include "store/store.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace cuda_test {

using namespace gear;

inline std::mt19937 & random_source() {
    static std::mt19937 source(check::seed());
    return source;
}

inline float normal(float deviation = 1) {
    return std::normal_distribution<float>(0, deviation)(random_source());
}

inline int whole(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random_source());
}

template <class T> T one_of(std::initializer_list<T> values) {
    return *(values.begin() + whole(0, (int) values.size() - 1));
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Device memory
// ---------------------------------------------------------------------------------------------------------------------------------------------

class device {
  public:
    explicit device(const cuda::api & api) : api(api) {
        check_ok(api.select_device(0), "select_device");
        check_ok(api.describe(0, &facts), "describe");
        check_ok(api.make_stream(&stream), "make_stream");
    }
    ~device() { api.free_stream(stream); }

    void check_ok(int error, const char * what) const {
        if (error != 0) {
            printf("%s: %s\n", what, api.error_text(error));
        }
        CHECK(error == 0);
    }

    const cuda::api &  api;
    cuda::device_facts facts;
    cuda::stream       stream = nullptr;
};

template <class T> class array {
  public:
    array(const device & on, size_t n) : on(on), n(n) {
        void * memory = nullptr;
        on.check_ok(on.api.allocate(&memory, n * sizeof(T)), "allocate");
        data = static_cast<T *>(memory);
    }
    array(const device & on, const std::vector<T> & values) : array(on, values.size()) { set(values); }
    ~array() { on.api.release(data); }
    array(const array &)             = delete;
    array & operator=(const array &) = delete;

    void set(const std::vector<T> & values) {
        on.check_ok(on.api.upload(data, values.data(), values.size() * sizeof(T), on.stream), "upload");
        on.check_ok(on.api.wait_stream(on.stream), "wait_stream");
    }
    std::vector<T> get() const {
        std::vector<T> values(n);
        on.check_ok(on.api.download(values.data(), data, n * sizeof(T), on.stream), "download");
        on.check_ok(on.api.wait_stream(on.stream), "wait_stream");
        return values;
    }

    const device & on;
    T *            data;
    size_t         n;
};

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Configurations
// ---------------------------------------------------------------------------------------------------------------------------------------------

inline gear_config config_of(int bits_k, int bits_v, int tile = 128) {
    gear_config config = {};
    config.k           = { bits_k, 32, 8, 0, 8, 1, 0, 0, 0.0f, 1.0f };
    config.v           = { bits_v, 0, 8, 0, 8, 1, 0, 0, 0.0f, 1.0f };
    config.tile        = tile;
    config.seed        = 1;
    return config;
}

inline gear_side_config random_side(int tile, bool is_k, bool with_rank) {
    gear_side_config side = {};
    side.bits             = one_of({ 2, 3, 4, 5, 6, 7 });
    side.group            = is_k ? one_of({ 0, 32, 64 }) : one_of({ 0, 32, 64, 128 });
    side.group            = std::min(side.group, is_k ? tile : max_d_head);
    side.scale_bits       = one_of({ 8, 8, 16 });
    side.rank             = with_rank ? one_of({ 1, 2, 4 }) : 0;
    side.factor_bits      = one_of({ 4, 8 });
    side.rounds           = one_of({ 1, 2 });
    side.rotate           = whole(0, 1);
    side.sparsity         = one_of({ 0.0f, 0.0f, 0.02f });
    side.center           = side.sparsity == 0 ? whole(0, 1) : 0;
    side.clip             = one_of({ 1.0f, 0.9f });
    return side;
}

inline std::string text_of(const gear_side_config & c, int tile, int d) {
    char text[200];
    snprintf(text, sizeof text, "T %d, d %d, bits %d, group %d, scales %d, rank %d in %d bits, rounds %d, rotate %d, center %d, sparsity %g, clip %g",
             tile, d, c.bits, c.group, c.scale_bits, c.rank, c.factor_bits, c.rounds, c.rotate, c.center, c.sparsity, c.clip);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Packing
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Numbers of a tile that are hard to code, as f16.
inline std::vector<uint16_t> hard_rows(int T, int n_head, int d, int kind) {
    std::vector<uint16_t> rows((size_t) T * n_head * d);
    for (size_t i = 0; i < rows.size(); ++i) {
        const int   c = (int) (i % d), t = (int) (i / d / n_head);
        const float x = normal();
        switch (kind % 8) {
        case 0: // as in a real cache
            rows[i] = float_to_half((c % 11 == 3 ? 4.0f : 1.0f) * x + (float) (c % 5 - 2) * 0.5f);
            break;
        case 1: // heavy tails
            rows[i] = float_to_half(std::clamp(x * x * x * x * x, -60000.0f, 60000.0f));
            break;
        case 2: // few values, each many times
            rows[i] = float_to_half(std::nearbyint(2 * x) * 0.37f);
            break;
        case 3: // the whole range is about one spacing of f16
            rows[i] = float_to_half(1000.25f + x);
            break;
        case 4: // constant along a channel or a token
            rows[i] = float_to_half((float) (c + t / 32) * 0.7317f);
            break;
        case 5: // the edge of f16
            rows[i] = float_to_half(65504.0f * std::sin(x));
            break;
        case 6: // below f16's normal range
            rows[i] = float_to_half(x * 1e-7f);
            break;
        case 7: // not numbers
            rows[i] = c % 17 == 0 ? 0x7e00 : c % 19 == 0 ? 0xfc00 : c % 23 == 0 ? 0x8000 : float_to_half(x);
            break;
        }
    }
    return rows;
}

struct packing {
    const device & on;
    tile_layout    layout;
    uint32_t       seed   = 7;
    int            n_head = 2;
    int            T, d, n_row;

    packing(const device & on, const gear_config & config, gear_side side, int d_head)
        : on(on), layout(make_layout(config, side, d_head)), T(layout.n_token), d(d_head), n_row(2 * T + 3) {}

    std::vector<float> row_floats(const std::vector<uint16_t> & rows, const std::vector<int32_t> & slot, int head) const {
        std::vector<float> x((size_t) T * d, 0.0f);
        for (int t = 0; t < T; ++t) {
            for (int c = 0; slot[t] >= 0 && c < d; ++c) {
                x[(size_t) t * d + c] = half_to_float(rows[((size_t) slot[t] * n_head + head) * d + c]);
            }
        }
        return x;
    }

    // The codec's tile of one head. old: the tile as it was, for rows that stay.
    std::vector<uint8_t> expected(const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, int head, const uint8_t * old) const {
        std::vector<uint8_t> written(T), kept(T), tile((size_t) layout.part.bytes + tile_align), scratch(pack_scratch_bytes(layout) + tile_align);
        for (int t = 0; t < T; ++t) {
            written[t] = source[t] != cuda::place_absent;
            kept[t]    = source[t] == cuda::place_packed;
        }
        const auto aligned = [](std::vector<uint8_t> & bytes) {
            return (uint8_t *) (((uintptr_t) bytes.data() + tile_align - 1) / tile_align * tile_align);
        };
        const std::vector<float> x    = row_floats(rows, source, head);
        const kept_rows          keep = { kept.data(), old };
        const bool               any  = std::find(kept.begin(), kept.end(), 1) != kept.end();
        pack_tile(layout, seed, x.data(), written.data(), aligned(tile), aligned(scratch), any ? &keep : nullptr);
        return { aligned(tile), aligned(tile) + layout.part.bytes };
    }

    // All heads on the device, over `tiles`.
    std::vector<uint8_t> pack(const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, const std::vector<uint8_t> & tiles) const {
        const int             n_block = 2;
        array<uint16_t>       pool(on, rows);
        array<uint8_t>        to(on, tiles), scratch(on, (size_t) on.api.pack_scratch_bytes(&layout, n_block));
        array<int32_t>        from(on, source);
        array<cuda::pack_job> jobs(on, std::vector<cuda::pack_job>{ { 0, 0 } });
        cuda::device_side     side = { layout, to.data, pool.data, nullptr, nullptr, n_head, T, 1, n_row, true };
        cuda::pack_arguments  args = { side, seed, jobs.data, from.data, 1, scratch.data };
        on.check_ok(on.api.pack(&args, n_block, on.stream), "pack");
        return to.get();
    }

    double squared_error(const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, int head, const uint8_t * tile) const {
        std::vector<float> xhat((size_t) T * d);
        const auto         x = row_floats(rows, source, head);
        unpack_tile(layout, tile, xhat.data());
        double sum = 0;
        for (size_t i = 0; i < x.size(); ++i) {
            sum += source[i / d] >= 0 ? ((double) x[i] - xhat[i]) * ((double) x[i] - xhat[i]) : 0;
        }
        return sum;
    }

    void compare(const std::string & what, const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, const std::vector<uint8_t> & got,
                 const std::vector<uint8_t> & old) const {
        for (int head = 0; head < n_head; ++head) {
            const uint8_t *            tile   = got.data() + (size_t) head * layout.part.bytes;
            const std::vector<uint8_t> wanted = expected(rows, source, head, old.data() + (size_t) head * layout.part.bytes);
            bool                       ok     = true;
            if (layout.config.rank == 0) {
                const auto differs = std::mismatch(wanted.begin(), wanted.end(), tile);
                ok                 = differs.first == wanted.end();
                if (!ok) {
                    printf("%s: head %d: byte %d of %d is %d, not %d\n", what.c_str(), head, (int) (differs.first - wanted.begin()), (int) wanted.size(),
                           *differs.second, *differs.first);
                }
            } else { // the power iteration sums in another order
                const double error = squared_error(rows, source, head, tile), bound = 1.05 * squared_error(rows, source, head, wanted.data());
                ok = error <= bound + 1e-12;
                if (!ok) {
                    printf("%s: head %d: squared error %g, the codec's is %g\n", what.c_str(), head, error, bound / 1.05);
                }
            }
            CHECK(ok);
        }
    }

    // Pack some rows, then write over some of them and pack again.
    void run(const std::string & what, int kind) {
        std::vector<uint16_t> rows = hard_rows(n_row, n_head, d, kind);
        std::vector<int32_t>  source(T);
        const int             absent = kind % 3 == 0 ? 0 : whole(1, 8);
        for (int t = 0; t < T; ++t) { // anywhere in the pool
            source[t] = absent && t % 8 < absent ? cuda::place_absent : (t * 2 + 1) % n_row;
        }
        if (kind % 3 == 2) { // whole groups and the tile's end were never written
            std::fill(source.begin(), source.begin() + 32, cuda::place_absent);
            std::fill(source.end() - 9, source.end(), cuda::place_absent);
        }
        const std::vector<uint8_t> before((size_t) n_head * layout.part.bytes, 0xa5); // whatever was there must not show
        const std::vector<uint8_t> first = pack(rows, source, before);
        compare(what, rows, source, first, before);

        std::vector<int32_t> again(T);
        for (int t = 0; t < T; ++t) {
            again[t] = source[t] >= 0 && whole(0, 3) != 0 ? cuda::place_packed : t % 5 == 1 ? cuda::place_absent : t;
        }
        const std::vector<uint8_t> second = pack(rows, again, first);
        compare(what + ", again", rows, again, second, first);
    }
};

inline void test_pack(const device & on, int n_round) {
    gear_simd_select("scalar");
    for (int round = 0; round < n_round; ++round) {
        gear_config     config = {};
        const bool      ranked = round % 4 == 3;
        const gear_side side   = round % 2 ? GEAR_SIDE_V : GEAR_SIDE_K;
        config.tile            = one_of({ 64, 128, 256 });
        config.k               = random_side(config.tile, true, ranked);
        config.v               = random_side(config.tile, false, ranked);
        config.seed            = 7;
        const int d            = 16 * (round % 16 < 2 ? whole(17, 36) : whole(2, ranked ? 8 : 16));
        packing(on, config, side, d)
            .run((side == GEAR_SIDE_K ? "K, " : "V, ") + text_of(side == GEAR_SIDE_K ? config.k : config.v, config.tile, d), ranked ? 0 : round / 2);
    }
    gear_simd_select(nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Attention
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct shape {
    int n_head_kv = 2;
    int n_share   = 4; // query heads of a KV head
    int d_k       = 64;
    int d_v       = 64;
    int n_cell    = 384;
    int n_stream  = 1;
    int n_head() const { return n_head_kv * n_share; }
};

// One side as the store on the CPU has it, and the same in device memory.
struct both_sides {
    gear_side                              which;
    std::shared_ptr<const gear_tile_codec> codec;
    std::unique_ptr<store>                 rows;
    std::unique_ptr<array<uint8_t>>        tiles;
    std::unique_ptr<array<uint16_t>>       pool;
    std::unique_ptr<array<int32_t>>        place;
    cuda::device_side                      on_device = {};

    both_sides(const gear_config & config, gear_side which, const shape & s) : which(which) {
        const int d = which == GEAR_SIDE_K ? s.d_k : s.d_v;
        if ((which == GEAR_SIDE_K ? config.k : config.v).bits < 16) {
            codec = std::make_shared<gear_tile_codec>(config, which, d);
        }
        rows = std::make_unique<store>(store_shape{ 0, which, s.n_head_kv, d, s.n_cell, s.n_stream, config.tile, config.n_tail, config.n_sink, s.n_cell },
                                       codec);
    }

    const tile_layout * layout() const { return codec ? &codec->layout() : nullptr; }

    void write(const std::vector<int64_t> & cells) {
        const int          n_embd = rows->shape().n_embd();
        std::vector<float> values(cells.size() * n_embd);
        for (size_t i = 0; i < values.size(); ++i) {
            const int c = (int) (i % n_embd);
            values[i]   = (c % 11 == 3 ? 4.0f : 1.0f) * normal() + (float) (c % 5 - 2) * 0.5f;
        }
        barrier sync;
        CHECK(rows->write({ 0, 1, &sync }, (int64_t) cells.size(), { cells.data(), sizeof(int64_t), true },
                          { values.data(), n_embd * sizeof(float), false }));
    }

    void flush() {
        barrier sync;
        CHECK(rows->flush({ 0, 1, &sync }));
    }

    void upload(const device & on) {
        const store_shape &   s      = rows->shape();
        const int             n_tile = rows->n_tile(), n_row = (int) s.n_cell;
        const size_t          bytes = s.n_head * rows->tile_bytes(), n_embd = s.n_embd();
        std::vector<uint8_t>  all((size_t) s.n_stream * n_tile * std::max<size_t>(bytes, 1), 0xee);
        std::vector<uint16_t> pooled((size_t) s.n_stream * n_row * n_embd, 0x7e00); // what is in no row must not show
        std::vector<int32_t>  places((size_t) s.n_stream * s.n_cell);
        for (int stream = 0; stream < s.n_stream; ++stream) {
            for (int tile = 0; tile < n_tile; ++tile) {
                const tile_view view = rows->view(stream, tile);
                if (view.packed) {
                    memcpy(&all[((size_t) stream * n_tile + tile) * bytes], view.packed, bytes);
                }
                for (int t = 0; t < view.n_token; ++t) {
                    const int32_t slot                                              = view.slot[t];
                    places[(size_t) stream * s.n_cell + (size_t) tile * s.tile + t] = slot >= 0                        ? slot
                                                                                      : view.packed && view.in_tile[t] ? cuda::place_packed
                                                                                                                       : cuda::place_absent;
                    if (slot >= 0) {
                        memcpy(&pooled[((size_t) stream * n_row + slot) * n_embd], rows->row(stream, slot), n_embd * 2);
                    }
                }
            }
        }
        tiles               = std::make_unique<array<uint8_t>>(on, all);
        pool                = std::make_unique<array<uint16_t>>(on, pooled);
        place               = std::make_unique<array<int32_t>>(on, places);
        tile_layout of_rows = {};
        of_rows.config.bits = 16;
        of_rows.side        = which;
        of_rows.n_token     = s.tile;
        of_rows.d_head      = s.d_head;
        on_device           = {
            codec ? codec->layout() : of_rows, tiles->data, pool->data, place->data, nullptr, s.n_head, (int32_t) s.n_cell, n_tile, n_row, codec != nullptr
        };
    }
};

struct cache {
    shape      s;
    both_sides k, v;

    cache(const gear_config & config, const shape & s) : s(s), k(config, GEAR_SIDE_K, s), v(config, GEAR_SIDE_V, s) {}

    // Every stream's first n cells, packed, then `again` cells anywhere among them written over, apart for K and V.
    void fill(const device & on, int n, int again) {
        std::vector<int64_t> cells;
        for (int stream = 0; stream < s.n_stream; ++stream) {
            for (int i = 0; i < n; ++i) {
                cells.push_back((int64_t) stream * s.n_cell + i);
            }
        }
        for (both_sides * side : { &k, &v }) {
            side->write(cells);
            side->flush();
            std::shuffle(cells.begin(), cells.end(), random_source());
            side->write({ cells.begin(), cells.begin() + again });
            side->upload(on);
        }
    }
};

enum class masking { none, causal, scattered };

struct request {
    int     n_query       = 1;
    int     n_kv          = 384;
    int     stream0       = 0;
    int     n_stream      = 1;
    masking mask          = masking::causal;
    int     mask_n_head   = 1;
    int     mask_n_stream = 1;
    float   max_bias      = 0;
    float   softcap       = 0;
    bool    sinks         = false;
    int     hidden_query  = -1; // this query sees nothing
    int     window        = 0;  // sliding window, 0: none
    int     written       = 384;
};

inline double worst_error[2]; // decode, prefill

// Decode splits what it multiplies with into two bf16; prefill takes q, K, V and p in f16, as llama.cpp's own kernels do.
constexpr double error_bound[2] = { 3e-4, 4e-3 };

inline void compare(const device & on, const std::string & what, const cache & c, const request & r) {
    const shape &         s      = c.s;
    const int             n_head = s.n_head();
    std::vector<float>    q((size_t) r.n_stream * n_head * r.n_query * s.d_k), sinks(n_head);
    std::vector<uint16_t> mask;
    gear_attention_params p = {};
    std::generate(q.begin(), q.end(), [] { return normal(); });
    std::generate(sinks.begin(), sinks.end(), [] { return normal(2); });
    const auto strides = [](int64_t * to, int64_t unit, std::initializer_list<int64_t> counts) {
        std::transform(counts.begin(), counts.end(), to, [=](int64_t n) { return n * unit; });
    };
    p.n_query  = r.n_query;
    p.n_head   = n_head;
    p.n_kv     = r.n_kv;
    p.stream0  = r.stream0;
    p.n_stream = r.n_stream;
    strides(p.q_stride, s.d_k * 4, { n_head, 1, (int64_t) n_head * r.n_query });
    strides(p.out_stride, s.d_v * 4, { 1, n_head, (int64_t) n_head * r.n_query });
    p.scale    = 1.0f / std::sqrt((float) s.d_k);
    p.max_bias = r.max_bias;
    p.softcap  = r.softcap;
    if (r.mask != masking::none) {
        mask.resize((size_t) r.mask_n_stream * r.mask_n_head * r.n_query * r.n_kv);
        for (size_t i = 0; i < mask.size(); ++i) {
            const int  cell = (int) (i % r.n_kv), query = (int) (i / r.n_kv % r.n_query), position = r.written - r.n_query + query;
            const bool seen = query != r.hidden_query && cell <= position && (r.mask == masking::causal || whole(0, 3) == 0 || cell == position) &&
                              (r.window == 0 || cell > position - r.window);
            mask[i]         = seen ? float_to_half(r.max_bias == 0 && r.mask == masking::causal ? 0.0f : (float) (cell - position) / 16) : 0xfc00;
        }
        p.mask_n_head   = r.mask_n_head;
        p.mask_n_stream = r.mask_n_stream;
        strides(p.mask_stride, r.n_kv * 2, { 1, r.n_query, (int64_t) r.n_query * r.mask_n_head });
    }

    // On the CPU
    std::vector<float> wanted((size_t) r.n_stream * r.n_query * n_head * s.d_v, NAN);
    p.q                     = q.data();
    p.mask                  = mask.empty() ? nullptr : mask.data();
    p.sinks                 = r.sinks ? sinks.data() : nullptr;
    p.out                   = wanted.data();
    const attention_op   op = { p, c.k.rows.get(), c.v.rows.get(), c.k.layout(), c.v.layout() };
    std::vector<uint8_t> scratch(attention_scratch_bytes(op, 1) + 64);
    barrier              sync;
    gear_simd_select("scalar");
    attention(op, { 0, 1, &sync }, (void *) (((uintptr_t) scratch.data() + 63) / 64 * 64));
    gear_simd_select(nullptr);

    // On the device
    array<float>    q_there(on, q), sinks_there(on, sinks), out(on, std::vector<float>(wanted.size(), NAN));
    array<uint16_t> mask_there(on, mask);
    p.q                                  = q_there.data;
    p.mask                               = mask.empty() ? nullptr : mask_there.data;
    p.sinks                              = r.sinks ? sinks_there.data : nullptr;
    p.out                                = out.data;
    cuda::attend_arguments args          = { p, c.k.on_device, c.v.on_device, 0, 0, 0, 0, 0, nullptr };
    const int64_t          partial_bytes = on.api.plan_attend(&args, on.facts.n_processor);
    array<float>           partial(on, std::vector<float>((size_t) partial_bytes / 4, NAN));
    args.partial = partial.data;
    on.check_ok(on.api.attend(&args, on.stream), what.c_str());
    const std::vector<float> got = out.get();

    double worst = 0;
    for (size_t row = 0; row < wanted.size(); row += s.d_v) {
        double error = 0, length = 0;
        for (int i = 0; i < s.d_v; ++i) {
            error += ((double) got[row + i] - wanted[row + i]) * ((double) got[row + i] - wanted[row + i]);
            length += (double) wanted[row + i] * wanted[row + i];
        }
        const double relative = length > 0 ? std::sqrt(error / length) : error == 0 ? 0 : INFINITY;
        worst                 = relative <= worst ? worst : relative; // NaN becomes the worst
    }
    const int kernel = partial_bytes == 0 && r.n_query > 0;
    if (!(worst <= error_bound[kernel])) {
        printf("%s (%s): relative error %.3g\n", what.c_str(), kernel ? "prefill" : "decode", worst);
    }
    CHECK(worst <= error_bound[kernel]);
    worst_error[kernel] = std::max(worst_error[kernel], worst);
}

inline void test_attention(const device & on, int n_random) {
    const auto run = [&](const std::string & what, const gear_config & config, const shape & s, request r, int again = 33, int written = 384) {
        cache c(config, s);
        c.fill(on, written, again);
        r.written = std::min(r.written, written);
        compare(on, what, c, r);
    };
    const auto with = [](auto change) {
        request r;
        change(r);
        return r;
    };
    for (int bits = 2; bits <= 7; ++bits) {
        run("bits " + std::to_string(bits), config_of(bits, 9 - bits), {}, {}, 0);
        run("bits, many queries " + std::to_string(bits), config_of(bits, 9 - bits), {}, with([](request & r) { r.n_query = 40; }), 0);
    }
    for (int d : { 32, 48, 80, 96, 128, 176, 256 }) {
        shape s;
        s.d_k = d;
        s.d_v = 288 - d;
        for (int n_query : { 1, 19 }) {
            run("head sizes " + std::to_string(d), config_of(4, 4, n_query == 1 ? 64 : 256), s, with([=](request & r) { r.n_query = n_query; }));
            run("head sizes, 3 and 3 bits " + std::to_string(d), config_of(3, 3, 64), s, with([=](request & r) { r.n_query = n_query; }), 0);
        }
    }
    const int sizes[][2] = { { 512, 512 }, { 576, 512 }, { 576, 576 }, { 272, 48 }, { 64, 560 } }; // K's and V's
    for (const auto & d : sizes) {
        shape s;
        s.n_head_kv = 1;
        s.d_k       = d[0];
        s.d_v       = d[1];
        for (int kind = 0; kind < 3; ++kind) { // 1: the most shared memory with scales of 8 bits, 2: with scales in f16
            gear_config config = config_of(kind == 0 ? 4 : 5, kind == 0 ? 4 : 3, kind == 0 ? 64 : 256);
            config.k.rotate = config.v.rotate = kind != 2;
            config.k.center = config.v.center = kind == 1;
            config.k.scale_bits = config.v.scale_bits = kind == 2 ? 16 : 8;
            config.k.rank = config.v.rank = kind == 2 ? 2 : 0;
            config.k.sparsity = config.v.sparsity = kind == 2 ? 0.02f : 0.0f;
            config.v.group                        = 32;
            for (int n_query : { 1, 19 }) {
                run("head sizes " + std::to_string(d[0]) + " and " + std::to_string(d[1]) + ", kind " + std::to_string(kind), config, s,
                    with([=](request & r) { r.n_query = n_query; }), 33, 300);
            }
        }
    }
    for (int n_share : { 1, 2, 3, 7, 8, 20 }) {
        shape s;
        s.n_share = n_share;
        run("query heads " + std::to_string(n_share), config_of(4, 4), s, with([](request & r) { r.n_query = 3; }));
        run("query heads, one query " + std::to_string(n_share), config_of(4, 4), s, {});
    }
    for (masking mask : { masking::none, masking::causal, masking::scattered }) {
        for (int n_query : { 1, 5, 60 }) {
            run("queries " + std::to_string(n_query), config_of(4, 4, 256), {}, with([=](request & r) { r.n_query = n_query, r.mask = mask; }));
        }
    }
    for (int n_kv : { 0, 1, 77, 128, 300, 383 }) {
        for (int n_query : { 1, 30 }) {
            run("n_kv " + std::to_string(n_kv), config_of(4, 4), {}, with([=](request & r) {
                    r.n_kv    = n_kv;
                    r.mask    = n_kv == 77 ? masking::none : masking::causal;
                    r.written = std::max(n_kv, n_query), r.n_query = n_query;
                }));
        }
    }
    for (int n : { 0, 1, 200 }) {
        for (int n_query : { 1, 20 }) {
            run("written " + std::to_string(n), config_of(4, 4), {}, with([=](request & r) { r.mask = masking::none, r.n_query = n_query; }), n / 4, n);
        }
    }
    shape three;
    three.n_head_kv = 3; // 12 heads: ALiBi's slopes beyond the power of two
    for (int n_query : { 1, 20 }) {
        const auto logits = [&](const char * what, auto change) {
            run(what, config_of(4, 4), three, with([&](request & r) {
                    r.n_query = n_query;
                    change(r);
                }));
        };
        logits("ALiBi", [](request & r) { r.max_bias = 8; });
        logits("soft-cap", [](request & r) { r.softcap = 5; });
        logits("soft-cap and sinks", [](request & r) { r.softcap = 5, r.sinks = true; });
        logits("sinks, a query that sees nothing", [](request & r) { r.sinks = true, r.hidden_query = 0; });
        logits("a query that sees nothing", [](request & r) { r.hidden_query = 0; });
        logits("sliding window", [](request & r) { r.window = 70; });
    }
    for (int n_query : { 1, 12 }) {
        shape streams;
        streams.n_stream = 3;
        for (int mask_n_head : { 1, 2 }) {
            run("two streams", config_of(4, 4), streams, with([=](request & r) {
                    r.n_query       = n_query;
                    r.stream0       = 1;
                    r.n_stream      = 2;
                    r.mask          = masking::scattered;
                    r.mask_n_head   = mask_n_head;
                    r.mask_n_stream = 2;
                }));
        }
        gear_config preset = config_of(4, 4, 256); // as the presets are
        preset.k.rotate = preset.v.rotate = preset.v.center = 1;
        run("preset", preset, {}, with([=](request & r) { r.n_query = n_query; }));
        preset.k.center = 1;
        run("K with its mean", preset, {}, with([=](request & r) { r.n_query = n_query; }));
        preset.k.scale_bits = 16;
        run("K with its mean, scales in f16", preset, {}, with([=](request & r) { r.n_query = n_query; }));
        run("K kept as f16", config_of(16, 4), {}, with([=](request & r) { r.n_query = n_query; }));
        run("V kept as f16", config_of(4, 16), {}, with([=](request & r) { r.n_query = n_query; }));
        run("both kept as f16", config_of(16, 16), {}, with([=](request & r) { r.n_query = n_query; }));
    }
    for (int round = 0; round < n_random; ++round) {
        gear_config config = {};
        config.tile        = one_of({ 64, 128, 256 });
        config.k           = random_side(config.tile, true, round % 2);
        config.v           = random_side(config.tile, false, round % 3 == 0);
        config.n_tail      = one_of({ 0, 50 });
        config.n_sink      = one_of({ 0, 4 });
        config.seed        = 1;
        shape s;
        s.n_head_kv = whole(1, 2);
        s.n_share   = whole(1, 5);
        s.d_k       = 16 * whole(2, 10);
        s.d_v       = 16 * whole(2, 10);
        s.n_cell    = whole(100, 400);
        s.n_stream  = whole(1, 2);
        request r;
        r.n_kv          = whole(1, s.n_cell);
        r.written       = whole(1, r.n_kv);
        r.n_query       = std::min(r.written, one_of({ 1, 2, 5, 40 }));
        r.n_stream      = whole(1, s.n_stream);
        r.stream0       = whole(0, s.n_stream - r.n_stream);
        r.mask          = one_of({ masking::none, masking::causal, masking::scattered });
        r.mask_n_head   = one_of({ 1, s.n_head() });
        r.mask_n_stream = one_of({ 1, r.n_stream });
        r.max_bias      = r.mask == masking::none ? 0 : one_of({ 0.0f, 4.0f });
        r.softcap       = one_of({ 0.0f, 20.0f });
        r.sinks         = whole(0, 1);
        run("round " + std::to_string(round) + ": K " + text_of(config.k, config.tile, s.d_k) + "; V " + text_of(config.v, config.tile, s.d_v), config, s,
            r, whole(0, r.written), r.written);
    }
    printf("worst relative error: decode %.3g, prefill %.3g\n", worst_error[0], worst_error[1]);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The cache
// ---------------------------------------------------------------------------------------------------------------------------------------------

// A store on the CPU and a cache in device memory that are told the same; every row must come out the same.
struct twins {
    const device &                         on;
    cuda::cuda_worker                      worker;
    std::shared_ptr<const gear_tile_codec> codec;
    store_shape                            shape;
    store                                  here;
    std::shared_ptr<cuda::cache_table>     table;
    cuda::cache_side                       there, second; // another layer of the same table
    int64_t                                step = 0;

    twins(const device & on, const gear_config & config, gear_side side, const store_shape & shape)
        : on(on), worker(on.api, 0), codec(std::make_shared<gear_tile_codec>(config, side, shape.d_head)), shape(shape), here(shape, codec),
          table(std::make_shared<cuda::cache_table>(on.api, shape, true)), there(on.api, shape, &codec->layout(), config.seed, table),
          second(on.api, shape, &codec->layout(), config.seed, table) {}

    void wait() { on.check_ok(on.api.wait_stream(worker.work), "wait_stream"); }

    std::vector<float> random_rows(size_t n) const {
        std::vector<float> rows(n * shape.n_embd());
        std::generate(rows.begin(), rows.end(), [] { return normal(); });
        return rows;
    }

    void write(const std::vector<int64_t> & cells, bool is_half) {
        const size_t             n_embd = shape.n_embd();
        const std::vector<float> rows   = random_rows(cells.size());
        std::vector<uint16_t>    halves(rows.size());
        std::transform(rows.begin(), rows.end(), halves.begin(), float_to_half);
        const cell_source where = { cells.data(), sizeof(int64_t), true };
        const void *      data  = is_half ? (const void *) halves.data() : rows.data();
        const size_t      size  = is_half ? 2 : 4;
        barrier           sync;
        CHECK(here.write({ 0, 1, &sync }, (int64_t) cells.size(), where, { data, n_embd * size, is_half }));

        array<uint8_t> uploaded(on, std::vector<uint8_t>((const uint8_t *) data, (const uint8_t *) data + rows.size() * size));
        ++step;
        for (cuda::cache_side * side : { &there, &second }) {
            table->plan(worker, step, (int64_t) cells.size(), where);
            side->write(worker, (int64_t) cells.size(), uploaded.data, (int64_t) (n_embd * size), is_half);
        }
        wait();
    }

    void flush(bool full_only) {
        barrier sync;
        CHECK(here.flush({ 0, 1, &sync }, full_only));
        table->plan_flush(worker, full_only);
        there.pack(worker);
        second.pack(worker);
    }

    // f(side) changes one layer, then the other: each has a table of its own meanwhile, and afterwards both agree.
    template <class F> void one_by_one(F f) {
        second.table_of_its_own(std::make_shared<cuda::cache_table>(worker, *table));
        f(there);
        f(second);
        CHECK(table->book().agrees(second.table().book()) && second.table().book().agrees(table->book()));
        second.table_of_its_own(table);
        wait();
    }

    // Rows from the host, as when a state is restored.
    void put(int64_t first, int64_t n) {
        const std::vector<float> rows = random_rows((size_t) n);
        std::vector<uint16_t>    halves(rows.size());
        std::transform(rows.begin(), rows.end(), halves.begin(), float_to_half);
        std::vector<int64_t> cells((size_t) n);
        std::iota(cells.begin(), cells.end(), first);
        const size_t row = shape.n_embd() * sizeof(uint16_t);
        barrier      sync;
        CHECK(here.write({ 0, 1, &sync }, n, { cells.data(), sizeof(int64_t), true }, { halves.data(), row, true }));
        one_by_one([&](cuda::cache_side & side) { side.put(worker, ++step, n, cells.data(), halves.data()); });
    }

    // Rows changed in place, as by the K-shift: each marked row is turned round.
    void update() {
        const size_t         n_embd = shape.n_embd();
        std::vector<uint8_t> marked((size_t) (shape.n_cell * shape.n_stream));
        const int            kind = whole(0, 2), from = whole(0, (int) marked.size() - 1);
        for (size_t i = 0; i < marked.size(); ++i) {
            marked[i] = kind == 0 ? (int) i >= from : kind == 1 ? whole(0, 9) == 0 : i / 150 % 2 == 0;
        }
        const auto turn = [&](int64_t first, int64_t n, uint16_t * rows) {
            for (int64_t i = 0; i < n; ++i) {
                if (marked[(size_t) (first + i)]) {
                    std::reverse(rows + i * n_embd, rows + (i + 1) * n_embd);
                }
            }
        };
        here.update(marked.data(), turn);
        const int64_t   most_tiles = whole(1, 3);
        array<uint16_t> staging(on, std::vector<uint16_t>((size_t) (most_tiles * shape.tile) * n_embd, 0x7e00));
        one_by_one([&](cuda::cache_side & side) {
            side.update(worker, marked.data(), staging.data, most_tiles, [&](int64_t first, int64_t n, uint16_t *) {
                wait();
                std::vector<uint16_t> rows = staging.get();
                turn(first, n, rows.data());
                staging.set(rows);
            });
        });
    }

    // To the host and back, as a session goes: exact to the bit, and what comes later goes on as if nothing had been.
    void round_trip() {
        one_by_one([&](cuda::cache_side & side) {
            const std::unique_ptr<store> copy = side.to_store(worker, codec);
            compare_stores(*copy);
            side.adopt(worker, *copy);
        });
    }

    void compare_stores(const store & copy) const {
        bool ok = true;
        for (int stream = 0; stream < shape.n_stream; ++stream) {
            ok &= copy.clock(stream) == here.clock(stream) && copy.room(stream) >= here.room(stream);
            const auto mine = copy.exact_cells(stream), wanted = here.exact_cells(stream);
            ok &= std::equal(mine.begin(), mine.end(), wanted.begin(), wanted.end(),
                             [](const exact_cell & a, const exact_cell & b) { return a.cell == b.cell && a.written_at == b.written_at; });
            for (int tile = 0; tile < copy.n_tile(); ++tile) {
                const tile_view a = copy.view(stream, tile), b = here.view(stream, tile);
                ok &= (a.packed != nullptr) == (b.packed != nullptr) && std::equal(a.in_tile, a.in_tile + a.n_token, b.in_tile);
                ok &= !a.packed || !b.packed || memcmp(a.packed, b.packed, shape.n_head * here.tile_bytes()) == 0; // the codec's bytes
                for (int t = 0; t < a.n_token; ++t) {
                    ok &= (a.slot[t] >= 0) == (b.slot[t] >= 0) &&
                          (a.slot[t] < 0 || memcmp(copy.row(stream, a.slot[t]), here.row(stream, b.slot[t]), shape.n_embd() * 2) == 0);
                }
            }
        }
        CHECK(ok);
    }

    void compare(const char * what) {
        const int64_t         n = shape.n_cell * shape.n_stream;
        std::vector<uint16_t> wanted((size_t) (n * shape.n_embd()), 1), got(wanted.size(), 2), again(wanted.size(), 3);
        here.read(0, n, wanted.data());
        there.read(worker, 0, n, got.data());
        second.read(worker, 0, n, again.data());
        const bool ok = wanted == got && got == again;
        if (!ok) {
            const size_t i    = (size_t) (std::mismatch(wanted.begin(), wanted.end(), got.begin()).first - wanted.begin());
            const size_t from = i < wanted.size() ? i : (size_t) (std::mismatch(got.begin(), got.end(), again.begin()).first - got.begin());
            printf("after %s, step %d: channel %d of cell %d of %d is %04x, not %04x (another layer: %04x)\n", what, (int) step,
                   (int) (from % shape.n_embd()), (int) (from / shape.n_embd()), (int) n, got[from], wanted[from], again[from]);
        }
        CHECK(ok);
        const gear_store_stats a = here.stats(), b = there.stats();
        CHECK(a.n_exact == b.n_exact && a.n_packed == b.n_packed && a.n_pack == b.n_pack && a.bytes_tiles_used == b.bytes_tiles_used &&
              a.bytes_tiles == b.bytes_tiles);
    }
};

inline void test_cache(const device & on, int n_round, int n_step) {
    gear_simd_select("scalar");
    for (int round = 0; round < n_round; ++round) {
        const gear_side side   = round % 2 ? GEAR_SIDE_V : GEAR_SIDE_K;
        gear_config     config = config_of(4, 4, 64);
        config.k.rotate = config.v.rotate = whole(0, 1);
        config.v.center                   = 1;
        const int   d                     = round == 1 || round == 2 ? 544 : 32; // 512 + 32
        store_shape shape                 = { 3, side, 2, d, 64 * whole(4, 7) + whole(0, 20), whole(1, 2), 64, whole(0, 70), whole(0, 5), 40 };
        twins       t(on, config, side, shape);
        int64_t     next = 0;
        for (int step = 0; step < n_step; ++step) {
            const int            kind = whole(0, 25);
            std::vector<int64_t> cells;
            const char *         what = "a write";
            if (kind < 14) { // a step of a prompt, or a token
                const int     n      = kind < 7 ? 1 : kind == 13 ? whole(41, 90) : whole(2, 40);
                const int64_t stream = whole(0, shape.n_stream - 1);
                for (int i = 0; i < n; ++i) {
                    cells.push_back(stream * shape.n_cell + next++ % shape.n_cell);
                }
                t.write(cells, step % 3 == 0);
            } else if (kind < 16) { // anywhere, some twice
                for (int i = whole(1, 30); i > 0; --i) {
                    cells.push_back(whole(0, (int) (shape.n_cell * shape.n_stream) - 1));
                }
                t.write(cells, false);
            } else if (kind == 16) {
                what = "a flush";
                t.flush(step % 2 == 0);
            } else if (kind == 17) {
                what               = "erasing";
                const int64_t cell = whole(0, (int) shape.n_cell - 50), n = whole(1, 50);
                t.here.erase(cell, n);
                t.one_by_one([&](cuda::cache_side & of) { of.table().plan_erase(t.worker, cell, n); });
            } else if (kind == 18 && shape.n_stream > 1) {
                what = "copying a stream";
                t.here.copy_stream(0, t.here, 1);
                t.one_by_one([&](cuda::cache_side & of) {
                    of.table().plan_copy(t.worker, 0, 1);
                    of.copy_stream(t.worker, 0, 1);
                });
            } else if (kind == 19 && whole(0, 3) == 0) {
                what = "clearing";
                t.here.clear();
                t.table->clear(t.worker);
            } else if (kind == 20 || kind == 21) {
                what            = "rows from the host";
                const int64_t n = whole(1, 40);
                t.put(whole(0, (int) (shape.n_cell * shape.n_stream - n)), n);
            } else if (kind == 22 || kind == 23) {
                what = "a change in place";
                t.update();
            } else if (kind > 23) {
                what = "a way to the host and back";
                t.round_trip();
            }
            if (step % 8 == 7 || kind >= 16) {
                t.compare(what);
            }
        }
        t.compare("all");
        bool              refused = false;
        const int64_t     beyond  = shape.n_cell * shape.n_stream;
        const cell_source where   = { &beyond, sizeof beyond, true };
        try {
            t.table->plan(t.worker, ++t.step, 1, where);
        } catch (const gear::error &) {
            refused = true;
        }
        CHECK(refused);
        t.compare("a refused write");
    }
    gear_simd_select(nullptr);
}

} // namespace cuda_test
