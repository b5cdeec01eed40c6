// cuda_attention_cases.h - attention in device memory, compared with attention_scalar.cpp.
#pragma once

#include "cuda_memory.h"

namespace cuda_test {

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
    std::unique_ptr<array<int32_t>>        slot;
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
        std::vector<int32_t>  slots((size_t) s.n_stream * s.n_cell);
        for (int stream = 0; stream < s.n_stream; ++stream) {
            for (int tile = 0; tile < n_tile; ++tile) {
                const tile_view view = rows->view(stream, tile);
                if (view.packed) {
                    memcpy(&all[((size_t) stream * n_tile + tile) * bytes], view.packed, bytes);
                }
                for (int t = 0; t < view.n_token; ++t) {
                    const int32_t slot                                             = view.slot[t];
                    slots[(size_t) stream * s.n_cell + (size_t) tile * s.tile + t] = slot >= 0                        ? slot
                                                                                     : view.packed && view.in_tile[t] ? cuda::slot_packed
                                                                                                                      : cuda::slot_absent;
                    if (slot >= 0) {
                        memcpy(&pooled[((size_t) stream * n_row + slot) * n_embd], rows->row(stream, slot), n_embd * 2);
                    }
                }
            }
        }
        tiles               = std::make_unique<array<uint8_t>>(on, all);
        pool                = std::make_unique<array<uint16_t>>(on, pooled);
        slot                = std::make_unique<array<int32_t>>(on, slots);
        tile_layout of_rows = {};
        of_rows.config.bits = 16;
        of_rows.side        = which;
        of_rows.n_token     = s.tile;
        of_rows.d_head      = s.d_head;
        on_device           = {
            codec ? codec->layout() : of_rows, tiles->data, pool->data, slot->data, nullptr, s.n_head, (int32_t) s.n_cell, n_tile, n_row, codec != nullptr
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

// Tiles of one head that are coded in different bases, as after a restore of foreign tiles: forget() has each one chosen anew.
inline void test_bases(const device & on) {
    gear_config config = config_of(4, 4, 64);
    config.k.rotate = config.v.rotate = rotate_weighted;
    config.v.center                   = 1;
    cache c(config, {});
    for (both_sides * side : { &c.k, &c.v }) {
        for (int first = 0; first < c.s.n_cell; first += config.tile) {
            std::vector<int64_t> cells((size_t) config.tile);
            std::iota(cells.begin(), cells.end(), first);
            side->codec->forget();
            side->write(cells);
            side->flush();
        }
        const int64_t basis = side->layout()->part.basis;
        CHECK(memcmp(side->rows->view(0, 0).packed + basis, side->rows->view(0, 1).packed + basis, (size_t) basis_bytes(c.s.d_k)) != 0);
        side->write({ 5, 200 });
        side->upload(on);
    }
    for (int n_query : { 1, 40 }) {
        request r;
        r.n_query = n_query;
        compare(on, "bases that differ", c, r);
    }
}

inline void test_attention(const device & on, int n_random) {
    test_bases(on);
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
            config.k.rotate = config.v.rotate = 2 - kind;
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
        run("rotated", preset, {}, with([=](request & r) { r.n_query = n_query; }));
        preset.k.rotate = rotate_weighted;
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

} // namespace cuda_test
