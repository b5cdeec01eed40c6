// attention_cases.h - what the tests of attention are written with: caches to attend to, requests, and plain attention in f64 on unpacked rows, which
// every kernel level is compared with.
#pragma once

#include "attention/attention.h"
#include "attention/kernels.h"
#include "cache/gear_codec.h"
#include "check.h"
#include "codec/codec.h"
#include "common/half.h"
#include "store/store.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

namespace attention_test {

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

// ---------------------------------------------------------------------------------------------------------------------------------------------
// A cache to attend to
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct shape {
    int n_head_kv = 2;
    int n_share   = 4; // query heads of a KV head
    int d_k       = 64;
    int d_v       = 64;
    int n_cell    = 384;
    int n_stream  = 1;

    bool is_callback = false; // packed by a caller's method

    int n_head() const { return n_head_kv * n_share; }

    bool is_latent = false; // V is the first d_v channels of K
};

inline gear_config config_of(int bits_k, int bits_v, int tile = 128) {
    gear_config config = {};
    config.k           = { bits_k, 32, 8, 0, 8, 1, 0, 0, 0.0f, 1.0f, 0 };
    config.v           = { bits_v, 0, 8, 0, 8, 1, 0, 0, 0.0f, 1.0f, 0 };
    config.tile        = tile;
    config.seed        = 1;
    return config;
}

// A caller's method: every number to the nearest sixteenth.
inline double to_sixteenths(void *, int32_t, int32_t, int32_t, int32_t n_token, int32_t d, const float * x, const uint8_t *, const int64_t *,
                            float * xhat) {
    std::transform(x, x + (size_t) n_token * d, xhat, [](float value) { return std::round(value * 16) / 16; });
    return 0;
}

struct side {
    std::shared_ptr<const gear_tile_codec> gear; // nullptr: f16 rows or a caller's method
    std::unique_ptr<store>                 rows;

    side(const gear_config & config, gear_side which, const shape & s) {
        const int                         d = which == GEAR_SIDE_K ? s.d_k : s.d_v;
        std::shared_ptr<const tile_codec> codec;
        if (s.is_callback) {
            codec = std::make_shared<callback_tile_codec>(config, 0, which, d, to_sixteenths, nullptr);
        } else if ((which == GEAR_SIDE_K ? config.k : config.v).bits < 16) {
            codec = gear = std::make_shared<gear_tile_codec>(config, which, d);
        }
        rows = std::make_unique<store>(store_shape{ 0, which, s.n_head_kv, d, s.n_cell, s.n_stream, config.tile, config.n_tail, config.n_sink, s.n_cell },
                                       codec);
    }

    const tile_layout * layout() const { return gear ? &gear->layout() : nullptr; }

    void write(const std::vector<int64_t> & cells) {
        const int          n_embd = rows->shape().n_embd();
        std::vector<float> values(cells.size() * n_embd);
        for (size_t i = 0; i < values.size(); ++i) { // channels differ in size and sit about a middle of their own, as K's do
            const int c = (int) (i % n_embd);
            values[i]   = (c % 11 == 3 ? 4.0f : 1.0f) * normal() + (float) (c % 5 - 2) * 0.5f;
        }
        barrier    sync;
        const bool ok = rows->write({ 0, 1, &sync }, (int64_t) cells.size(), { cells.data(), sizeof(int64_t), true },
                                    { values.data(), n_embd * sizeof(float), false });
        CHECK(ok);
    }

    void flush() {
        barrier sync;
        CHECK(rows->flush({ 0, 1, &sync }));
    }
};

struct cache {
    shape s;
    side  k, v;

    cache(const gear_config & config, const shape & s) : s(s), k(config, GEAR_SIDE_K, s), v(config, GEAR_SIDE_V, s) {}

    void write(const std::vector<int64_t> & cells) {
        k.write(cells);
        v.write(cells);
    }

    // Every stream's first n cells, packed, then `again` cells anywhere among them written over, apart for K and V: exact rows over packed tiles.
    void fill(int n, int again = 0) {
        std::vector<int64_t> cells;
        for (int stream = 0; stream < s.n_stream; ++stream) {
            for (int i = 0; i < n; ++i) {
                cells.push_back((int64_t) stream * s.n_cell + i);
            }
        }
        write(cells);
        k.flush();
        v.flush();
        std::shuffle(cells.begin(), cells.end(), random_source());
        k.write({ cells.begin(), cells.begin() + again });
        std::shuffle(cells.begin(), cells.end(), random_source());
        v.write({ cells.begin(), cells.begin() + again });
    }
};

// ---------------------------------------------------------------------------------------------------------------------------------------------
// An op, and what it must give
// ---------------------------------------------------------------------------------------------------------------------------------------------

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
    int     written       = 384;
};

struct op {
    const cache &         c;
    request               r;
    gear_attention_params params = {};
    std::vector<float>    q, sinks;
    std::vector<uint16_t> mask;

    op(const cache & c, const request & r) : c(c), r(r) {
        const int n_head = c.s.n_head();
        q.resize((size_t) r.n_stream * n_head * r.n_query * c.s.d_k);
        std::generate(q.begin(), q.end(), [] { return normal(); });
        params          = {};
        params.n_query  = r.n_query;
        params.n_head   = n_head;
        params.n_kv     = r.n_kv;
        params.stream0  = r.stream0;
        params.n_stream = r.n_stream;
        params.q        = q.data(); // [n_stream, n_query, n_head, d_k], as llama.cpp's permuted q lies in memory
        set_strides(params.q_stride, c.s.d_k * 4, { n_head, 1, (int64_t) n_head * r.n_query });
        params.scale    = 1.0f / std::sqrt((float) c.s.d_k);
        params.max_bias = r.max_bias;
        params.softcap  = r.softcap;
        set_strides(params.out_stride, c.s.d_v * 4, { 1, n_head, (int64_t) n_head * r.n_query });
        if (r.sinks) {
            sinks.resize(n_head);
            std::generate(sinks.begin(), sinks.end(), [] { return normal(2); });
            params.sinks = sinks.data();
        }
        make_mask();
    }

    static void set_strides(int64_t * strides, int64_t unit, std::initializer_list<int64_t> counts) {
        std::transform(counts.begin(), counts.end(), strides, [=](int64_t n) { return n * unit; });
    }

    void make_mask() {
        if (r.mask == masking::none) {
            return;
        }
        mask.resize((size_t) r.mask_n_stream * r.mask_n_head * r.n_query * r.n_kv);
        for (size_t i = 0; i < mask.size(); ++i) {
            const int  cell = (int) (i % r.n_kv), query = (int) (i / r.n_kv % r.n_query);
            const int  position = r.written - r.n_query + query; // the queries are the last rows written
            const bool seen     = query != r.hidden_query && cell <= position && (r.mask == masking::causal || whole(0, 3) == 0 || cell == position);
            mask[i]             = seen ? float_to_half(r.mask == masking::causal && r.max_bias == 0 ? 0.0f : (float) (cell - position) / 16) : 0xfc00;
        }
        params.mask          = mask.data();
        params.mask_n_head   = r.mask_n_head;
        params.mask_n_stream = r.mask_n_stream;
        set_strides(params.mask_stride, r.n_kv * 2, { 1, r.n_query, (int64_t) r.n_query * r.mask_n_head });
    }

    size_t out_size() const { return (size_t) r.n_stream * r.n_query * c.s.n_head() * c.s.d_v; }

    std::vector<float> run(const char * level, int n_threads, float rounding = 0, head_bases * bases = nullptr) const {
        CHECK(gear_simd_select(level) == GEAR_OK);
        std::vector<float> out(out_size(), NAN);
        const side &       v      = c.s.is_latent ? c.k : c.v;
        attention_op       attend = { params, c.k.rows.get(), v.rows.get(), c.k.layout(), v.layout(), rounding, c.s.is_latent ? c.s.d_v : 0, bases };
        attend.params.out         = out.data();
        const size_t         n    = attention_scratch_bytes(attend, n_threads);
        std::vector<uint8_t> memory(n + 64, 0xee);
        uint8_t *            scratch = (uint8_t *) (((uintptr_t) memory.data() + 63) / 64 * 64);
        const size_t         before  = scratch - memory.data();
        run_team(n_threads, [&](const team & t) { attention(attend, t, scratch); });
        CHECK(std::all_of(memory.begin() + before + n, memory.end(), [](uint8_t byte) { return byte == 0xee; }));
        CHECK(gear_simd_select("") == GEAR_OK);
        return out;
    }

    float bias(int stream, int head, int query, int cell) const {
        if (mask.empty()) {
            return 0;
        }
        const size_t plane = (size_t) (stream % r.mask_n_stream) * r.mask_n_head + head % r.mask_n_head;
        return half_to_float(mask[(plane * r.n_query + query) * r.n_kv + cell]);
    }

    double slope(int head) const {
        if (r.max_bias == 0) {
            return 1;
        }
        const int    n     = 1 << (int) std::floor(std::log2(c.s.n_head()));
        const double whole = std::pow(2.0, -r.max_bias / n), half = std::pow(2.0, -r.max_bias / 2 / n);
        return head < n ? std::pow(whole, head + 1) : std::pow(half, 2 * (head - n) + 1);
    }

    std::vector<double> expected() const;
};

inline void unpack(const side & from, const uint8_t * packed, std::vector<float> & tile) {
    if (from.gear) {
        unpack_tile(from.gear->layout(), packed, tile.data());
    } else { // a caller's method: f16
        std::transform((const uint16_t *) packed, (const uint16_t *) packed + tile.size(), tile.begin(),
                       [](uint16_t half) { return half_to_float(half); });
    }
}

// All rows of a stream as the store says they are: f32 [n_head, n, d]
inline std::vector<float> unpacked(const side & from, int stream, int n) {
    const store &      rows = *from.rows;
    const int          T = rows.shape().tile, d = rows.shape().d_head, n_head = rows.shape().n_head;
    std::vector<float> values((size_t) n_head * n * d), tile((size_t) T * d);
    for (int head = 0; head < n_head; ++head) {
        for (int first = 0; first < n; first += T) {
            const tile_view view = rows.view(stream, first / T);
            if (view.packed) {
                unpack(from, view.packed + head * rows.tile_bytes(), tile);
            }
            for (int t = 0; t < std::min(T, n - first); ++t) {
                float * to = &values[((size_t) head * n + first + t) * d];
                if (view.slot[t] >= 0) {
                    std::transform(rows.row(stream, view.slot[t]) + head * d, rows.row(stream, view.slot[t]) + (head + 1) * d, to,
                                   [](uint16_t half) { return half_to_float(half); });
                } else if (view.packed && view.in_tile[t]) {
                    std::copy(&tile[(size_t) t * d], &tile[(size_t) t * d] + d, to);
                }
            }
        }
    }
    return values;
}

inline std::vector<double> op::expected() const {
    const shape &       s = c.s;
    std::vector<double> out(out_size());
    for (int stream = 0; stream < r.n_stream; ++stream) {
        const std::vector<float> k = unpacked(c.k, r.stream0 + stream, r.n_kv), v = unpacked(s.is_latent ? c.k : c.v, r.stream0 + stream, r.n_kv);
        const int                v_stride = s.is_latent ? s.d_k : s.d_v;
        for (int query = 0; query < r.n_query; ++query) {
            for (int head = 0; head < s.n_head(); ++head) {
                const size_t        row   = ((size_t) stream * r.n_query + query) * s.n_head() + head;
                const size_t        first = (size_t) (head / s.n_share) * r.n_kv;
                std::vector<double> logit(r.n_kv);
                for (int cell = 0; cell < r.n_kv; ++cell) {
                    double dot = 0;
                    for (int i = 0; i < s.d_k; ++i) {
                        dot += (double) q[row * s.d_k + i] * k[(first + cell) * s.d_k + i];
                    }
                    dot *= params.scale;
                    logit[cell] = (r.softcap != 0 ? r.softcap * std::tanh(dot / r.softcap) : dot) + slope(head) * bias(stream, head, query, cell);
                }
                double max = r.sinks ? sinks[head] : -INFINITY;
                for (const double x : logit) {
                    max = std::max(max, x);
                }
                double sum = r.sinks ? std::exp(sinks[head] - max) : 0;
                for (int cell = 0; max > -INFINITY && cell < r.n_kv; ++cell) {
                    const double p = std::exp(logit[cell] - max);
                    sum += p;
                    for (int i = 0; i < s.d_v; ++i) {
                        out[row * s.d_v + i] += p * v[(first + cell) * v_stride + i];
                    }
                }
                for (int i = 0; sum > 0 && i < s.d_v; ++i) {
                    out[row * s.d_v + i] /= sum;
                }
            }
        }
    }
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Comparison
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Largest error of an output row against the row's length; a row that must be 0 must be exactly that.
inline double row_error(const std::vector<float> & out, const std::vector<double> & expected, int d) {
    double worst = 0;
    for (size_t row = 0; row < out.size(); row += d) {
        double error = 0, length = 0;
        for (int i = 0; i < d; ++i) {
            error += (out[row + i] - expected[row + i]) * (out[row + i] - expected[row + i]);
            length += expected[row + i] * expected[row + i];
        }
        const double relative = length > 0 ? std::sqrt(error / length) : error > 0 ? INFINITY : 0;
        worst                 = relative <= worst ? worst : relative; // NaN becomes the worst
    }
    return worst;
}

// Scalar: the rounding of f32 sums. Vectors: 15 bits of q times scale and p times scale on top of it, or one byte of them (test_rounding says how far
// that may go in one product). Latent attention rounds V's rows to f16.
inline double bound_of(const std::string & level, float rounding = 0, bool is_latent = false) {
    return level == "scalar" ? is_latent ? 1e-3 : 2e-5 : rounding == 0 ? 3e-3 : 0.08;
}

inline double worst_seen[3];

// Every level gives what plain attention gives, on teams of one to three threads by turns, with q and p in two bytes and as products take them.
inline void compare(const std::string & what, const cache & c, const request & r) {
    static int                turn = 0;
    const op                  o(c, r);
    const std::vector<double> expected = o.expected();
    for (int i = 0; const char * level = gear_simd_name(i); ++i) {
        for (const float rounding : { 0.0f, default_rounding }) {
            const int    n_threads = 1 + (turn + i) % 3;
            const double error     = row_error(o.run(level, n_threads, rounding), expected, c.s.d_v);
            double &     worst     = worst_seen[std::string(level) == "scalar" ? 0 : rounding == 0 ? 1 : 2];
            worst                  = c.s.is_latent ? worst : std::max(worst, error);
            if (!(error <= bound_of(level, rounding, c.s.is_latent))) {
                printf("%s: %s, %d threads, rounding %g: relative error %.3g\n", what.c_str(), level, n_threads, rounding, error);
            }
            CHECK(error <= bound_of(level, rounding, c.s.is_latent));
        }
    }
    ++turn;
}

} // namespace attention_test
