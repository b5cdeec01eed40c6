// test_attention.cpp - every kernel level against plain attention in f64 on unpacked rows. A little over 500 lines: short cases of one subject, whose
// harness is in attention_cases.h already.
#include "attention_cases.h"

using namespace attention_test;

namespace {

void test_bits() {
    for (int bits = 2; bits <= 7; ++bits) {
        cache c(config_of(bits, 9 - bits), {});
        c.fill(384);
        compare("bits " + std::to_string(bits), c, {});
    }
}

void test_head_sizes() {
    for (int d = 32; d <= 256; d += 16) {
        shape s;
        s.d_k = d;
        s.d_v = 288 - d;
        cache c(config_of(4, 3, 64), s);
        c.fill(384, 20);
        compare("head size " + std::to_string(d), c, {});
    }
    const int sizes[][2] = { { 512, 512 }, { 576, 512 }, { 576, 576 }, { 272, 48 }, { 64, 560 }, { 320, 128 } }; // K's and V's
    for (const auto & d : sizes) {
        shape s;
        s.d_k = d[0];
        s.d_v = d[1];
        for (int rotate : { 0, 2 }) {
            gear_config config = config_of(4, 3, 64);
            config.k.rotate = config.v.rotate = rotate;
            config.v.group                    = rotate ? 0 : 32;
            cache c(config, s);
            c.fill(384, 20);
            for (int n_query : { 1, 11 }) {
                request r;
                r.n_query = n_query;
                compare("head sizes " + std::to_string(d[0]) + " and " + std::to_string(d[1]), c, r);
            }
        }
    }
}

void test_shared_heads() {
    for (int n_share : { 1, 2, 3, 4, 7, 8, 20 }) {
        shape s;
        s.n_share = n_share;
        cache c(config_of(4, 4), s);
        c.fill(384, 30);
        compare("heads a KV head " + std::to_string(n_share), c, {});
    }
}

void test_queries() {
    cache c(config_of(4, 4, 256), {});
    c.fill(384, 40);
    for (int n_query : { 1, 2, 5, 17, 64, 100 }) {
        for (masking mask : { masking::none, masking::causal, masking::scattered }) {
            request r;
            r.n_query = n_query;
            r.mask    = mask;
            compare("queries " + std::to_string(n_query), c, r);
        }
    }
}

void test_parts_of_a_tile() {
    cache c(config_of(4, 4), {});
    c.fill(384, 10);
    for (int n_kv : { 1, 77, 128, 300, 383 }) {
        request r;
        r.n_kv = r.written = n_kv;
        compare("n_kv " + std::to_string(n_kv), c, r);
        r.mask = masking::none;
        compare("n_kv without mask " + std::to_string(n_kv), c, r);
    }
}

// Cells never written are rows of zeros, which weigh in the sum when the mask shows them.
void test_unwritten_cells() {
    for (int n : { 0, 1, 200, 300 }) {
        cache c(config_of(4, 4), {});
        c.fill(n, n / 4);
        request r;
        r.mask = masking::none;
        compare("written " + std::to_string(n), c, r);
        r.n_query = 20;
        compare("written, many queries " + std::to_string(n), c, r);
    }
}

void test_logits() {
    shape s;
    s.n_head_kv = 3; // 12 heads: ALiBi's slopes beyond the power of two
    cache c(config_of(4, 4), s);
    c.fill(384, 25);
    for (int n_query : { 1, 20 }) {
        request r;
        r.n_query  = n_query;
        r.max_bias = 8;
        compare("ALiBi", c, r);
        r         = {};
        r.n_query = n_query;
        r.softcap = 5;
        compare("soft-cap", c, r);
        r.sinks = true;
        compare("soft-cap and sinks", c, r);
        r.softcap = 0;
        compare("sinks", c, r);
        r.hidden_query = 0;
        compare("sinks and a query that sees nothing", c, r);
        r.sinks = false;
        compare("a query that sees nothing", c, r);
    }
}

void test_streams_and_mask_broadcast() {
    shape s;
    s.n_stream = 3;
    cache c(config_of(4, 4), s);
    c.fill(384, 50);
    for (int n_query : { 1, 12 }) {
        for (int mask_n_head : { 1, 2, s.n_head() }) {
            for (int mask_n_stream : { 1, 2 }) {
                request r;
                r.n_query       = n_query;
                r.stream0       = 1;
                r.n_stream      = 2;
                r.mask          = masking::scattered;
                r.mask_n_head   = mask_n_head;
                r.mask_n_stream = mask_n_stream;
                compare("two streams", c, r);
            }
        }
    }
}

void test_parts_of_the_codec() {
    const auto attend = [](const char * what, const gear_config & config, int d) {
        shape s;
        s.d_k = s.d_v = d;
        cache c(config, s);
        c.fill(384, 33);
        for (int n_query : { 1, 11 }) {
            request r;
            r.n_query = n_query;
            compare(what, c, r);
        }
    };
    for (int d : { 512, 576 }) {
        gear_config config = config_of(7, 7, 64);
        config.k.rotate = config.v.rotate = 1;
        config.k.center = config.v.center = 1;
        config.k.rank = config.v.rank = 2;
        attend("means and low rank of a large head", config, d);
        config.k.center = config.v.center = 0;
        config.k.sparsity = config.v.sparsity = 0.02f;
        attend("outliers of a large head", config, d);
    }
    for (int tile : { 64, 128, 256 }) {
        gear_config config = config_of(4, 4, tile);
        attend("plain", config, 128);
        config.k.rotate = config.v.rotate = 1;
        attend("rotation", config, 96);
        config.k.center = config.v.center = 1;
        attend("means", config, 112);
        config.k.rank = config.v.rank = 3;
        attend("means and low rank", config, 48);
        config.k.center = config.v.center = 0;
        attend("low rank", config, 80);
        config.k.factor_bits = config.v.factor_bits = 4;
        attend("low rank in 4 bits", config, 64);
        config.k.sparsity = config.v.sparsity = 0.05f;
        attend("low rank and outliers", config, 64);
        config.k.rank = config.v.rank = 0;
        attend("outliers", config, 112);
        config.k.scale_bits = config.v.scale_bits = 16;
        attend("scales in f16", config, 64);
        config.k.group = 0;
        config.v.group = 32;
        attend("groups", config, 80);
    }
}

// Tiles of one head that are coded in different bases, as after a restore of foreign tiles: forget() has each one chosen anew.
void test_bases() {
    gear_config config = config_of(4, 4);
    config.k.rotate = config.v.rotate = 2;
    config.v.center                   = 1;
    cache c(config, {});
    for (int first = 0; first < c.s.n_cell; first += config.tile) {
        std::vector<int64_t> cells(config.tile);
        std::iota(cells.begin(), cells.end(), first);
        c.k.gear->forget();
        c.v.gear->forget();
        c.write(cells);
        c.k.flush();
        c.v.flush();
    }
    const tile_view first = c.k.rows->view(0, 0), second = c.k.rows->view(0, 1);
    const int64_t   basis = c.k.layout()->part.basis;
    CHECK(memcmp(first.packed + basis, second.packed + basis, basis_bytes(c.s.d_k)) != 0);
    c.k.write({ 5, 200 });
    for (int n_query : { 1, 11 }) {
        request r;
        r.n_query = n_query;
        compare("bases that differ", c, r);
    }
}

// K's basis comes from the queries that were there before the first tile was packed, whatever the number of threads.
void test_queries_choose_the_basis() {
    gear_config config = config_of(4, 4);
    config.k.rotate    = 2;
    std::vector<uint8_t> chosen[3];
    for (int n_threads = 0; n_threads < 3; ++n_threads) { // 0: no query at all
        random_source().seed(7);
        cache                c(config, {});
        std::vector<int64_t> cells(config.tile);
        std::iota(cells.begin(), cells.end(), 0);
        c.write(cells);
        request r;
        r.n_query = 30;
        r.written = r.n_kv = config.tile;
        op seen(c, r);
        if (n_threads > 0) {
            c.k.gear->bases()->reserve(c.s.n_head_kv);
            seen.run("scalar", n_threads, 0, c.k.gear->bases());
        }
        c.k.flush();
        const uint8_t * tile = c.k.rows->view(0, 0).packed + c.k.layout()->part.basis;
        chosen[n_threads].assign(tile, tile + basis_bytes(c.s.d_k));
    }
    CHECK(chosen[1] == chosen[2]);
    CHECK(chosen[0] != chosen[1]);
}

// One store for both: the sizes of DeepSeek and of its small relatives, and some where H does not end with V.
void test_latent() {
    const int sizes[][2] = { { 576, 512 }, { 320, 256 }, { 96, 64 }, { 336, 304 }, { 64, 48 } };
    for (const auto & d : sizes) {
        for (int kind = 0; kind < 6; ++kind) {
            shape s;
            s.is_latent        = true;
            s.n_head_kv        = kind == 5 ? 2 : 1;
            s.n_share          = kind == 2 ? 20 : 3;
            s.d_k              = d[0];
            s.d_v              = d[1];
            s.n_stream         = 2;
            s.is_callback      = kind == 4;
            gear_config config = config_of(kind == 3 ? 16 : 4, 4, kind == 1 ? 256 : 64);
            config.k.rotate    = kind % 3;
            config.k.center    = kind == 1 || kind == 2;
            config.k.rank      = kind == 1 ? 2 : 0;
            config.k.sparsity  = kind == 0 || kind == 5 ? 0.02f : 0.0f;
            cache c(config, s);
            c.fill(384, 20);
            for (int n_query : { 1, 11 }) {
                request r;
                r.n_query = n_query;
                r.stream0 = 1;
                r.mask    = kind == 5 ? masking::scattered : masking::causal;
                compare("latent " + std::to_string(d[0]) + ", V " + std::to_string(d[1]) + ", kind " + std::to_string(kind), c, r);
            }
        }
    }
}

void test_exact_sides() {
    for (int d : { 20, 40, 64, 100, 320 }) { // a side kept as f16 takes any head size
        shape s;
        s.d_k = s.d_v = d;
        cache c(config_of(16, 16), s);
        c.fill(384);
        for (int n_query : { 1, 19 }) {
            request r;
            r.n_query = n_query;
            compare("f16, head size " + std::to_string(d), c, r);
        }
    }
    cache k(config_of(16, 4), {}), v(config_of(4, 16), {});
    k.fill(384, 9);
    v.fill(384, 9);
    compare("K kept as f16", k, {});
    compare("V kept as f16", v, {});
}

void test_callback() {
    shape s;
    s.is_callback = true;
    cache c(config_of(4, 4), s);
    c.fill(384, 60);
    for (int n_query : { 1, 19 }) {
        request r;
        r.n_query = n_query;
        compare("a caller's method", c, r);
    }
}

// Queries that are zero see the mean; those that are huge see one row.
void test_extreme_queries() {
    cache c(config_of(4, 4), {});
    c.fill(384);
    for (float factor : { 0.0f, 1e-20f, 1e3f }) {
        op o(c, {});
        for (float & q : o.q) {
            q *= factor;
        }
        const std::vector<double> expected = o.expected();
        for (int i = 0; const char * level = gear_simd_name(i); ++i) {
            const std::vector<float> out = o.run(level, 2);
            CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
            CHECK(factor > 1 || row_error(out, expected, c.s.d_v) <= bound_of(level));
        }
    }
}

// A tile prepared by the chosen level's kernels.
struct prepared {
    std::vector<uint8_t> tile;
    std::vector<float>   scale, zero, widest, square, A, B, outlier;
    prepared_tile        p = {};

    prepared(const gear_config & config, const gear_tile_codec & codec, const std::vector<float> & x, float rounding) {
        p.layout   = &codec.layout();
        p.rounding = rounding;
        tile.resize(p.layout->part.bytes + 64);
        uint8_t * aligned = (uint8_t *) (((uintptr_t) tile.data() + 63) / 64 * 64);
        CHECK(gear_tile_pack(&config, p.layout->side, p.layout->d_head, x.data(), nullptr, aligned) == GEAR_OK);
        p.tile    = aligned;
        p.scale   = sized(scale, p.n_lane_group() * p.depth_stride());
        p.zero    = sized(zero, p.n_lane_group() * p.depth_stride());
        p.widest  = sized(widest, p.depth_stride());
        p.square  = sized(square, p.depth_stride());
        p.A       = sized(A, p.n_factor() * p.layout->n_token);
        p.B       = sized(B, p.n_factor() * p.layout->d_head);
        p.outlier = sized(outlier, p.layout->part.n_vector * p.layout->part.n_outlier);
        current_attention_kernels().prepare(p);
    }

    static float * sized(std::vector<float> & numbers, size_t n) {
        numbers.resize(n + 1);
        return numbers.data();
    }
};

// One product of rows with a tile by one level.   y f32 [n, n_lane padded]
std::vector<float> product(const char * level, const gear_config & config, const gear_tile_codec & codec, const std::vector<float> & tile, float rounding,
                           const const_rows & x, std::vector<double> * code_error = nullptr) {
    CHECK(gear_simd_select(level) == GEAR_OK);
    const prepared     own(config, codec, tile, rounding);
    const int          n_lane = padded(own.p.n_lane(), lane_padding);
    std::vector<float> y((size_t) x.n * n_lane);
    current_attention_kernels().multiply(own.p, x, 0, n_lane, { y.data(), (size_t) n_lane });
    for (int i = 0; code_error && i < x.n; ++i) { // mean square over the lanes: each code's is its squared step by 12
        double sum = 0;
        for (int depth = 0; depth < own.p.n_lane_group() * own.p.depth_stride(); ++depth) {
            const double step = (double) x.row(i)[depth % own.p.depth_stride()] * own.p.scale[depth];
            sum += step * step / 12 / own.p.n_lane_group();
        }
        code_error->push_back(sum);
    }
    CHECK(gear_simd_select("") == GEAR_OK);
    return y;
}

// The largest sum that two bytes a number can come to: 576 weights of one size, and the last code of 7 bits in each channel.
void test_largest_sum() {
    constexpr int         d      = 576;
    const gear_config     config = config_of(7, 7, 64);
    const gear_tile_codec codec(config, GEAR_SIDE_K, d);
    std::vector<float>    tile((size_t) config.tile * d), x(d, 1.0f);
    for (size_t i = 0; i < tile.size(); ++i) {
        tile[i] = i / d % 2 ? 1.0f : -1.0f;
    }
    for (int i = 0; const char * level = gear_simd_name(i); ++i) {
        const std::vector<float> y = product(level, config, codec, tile, 0, { x.data(), d, 1 });
        for (int token = 0; token < config.tile; ++token) {
            CHECK_NEAR(y[token], token % 2 ? d : -d, 0.1);
        }
    }
}

// What rounding to bytes adds to the squared error of a product is about the share of the codes' own that it is allowed, and no more; with 0 it adds
// nothing.
void test_rounding() {
    constexpr int n = 7;
    for (const gear_side which : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        for (int bits = 2; bits <= 7; ++bits) {
            gear_config config = config_of(bits, bits, 256);
            config.k.rotate = config.v.rotate = 1;
            const gear_tile_codec codec(config, which, 128);
            std::vector<float>    tile((size_t) config.tile * 128), x((size_t) n * config.tile);
            std::generate(tile.begin(), tile.end(), [] { return normal(); });
            const int        stride = which == GEAR_SIDE_K ? 128 : config.tile;
            const const_rows rows   = { x.data(), (size_t) stride, n };
            for (const float sharpness : { 0.0f, 1.0f, 3.0f, 10.0f }) { // from all alike to one that outweighs the others
                std::generate(x.begin(), x.end(),
                              [&] { return std::exp(sharpness * normal()) * (which == GEAR_SIDE_V || sharpness == 0 ? 1 : whole(0, 1) * 2 - 1); });
                std::vector<double>      code_error;
                const std::vector<float> exact = product("scalar", config, codec, tile, 0, rows, &code_error);
                for (int i = 1; const char * level = gear_simd_name(i); ++i) {
                    for (const float share : { 0.0f, default_rounding, 0.5f }) {
                        const std::vector<float> y      = product(level, config, codec, tile, share, rows);
                        const size_t             n_lane = y.size() / n;
                        for (int row = 0; row < n; ++row) {
                            double error = 0, length = 0;
                            for (size_t lane = row * n_lane; lane < (row + 1) * n_lane; ++lane) {
                                error += (double) (y[lane] - exact[lane]) * (y[lane] - exact[lane]) / n_lane;
                                length += (double) exact[lane] * exact[lane] / n_lane;
                            }
                            const double allowed = 2 * share * code_error[row] + 1e-2 * code_error[row] + 1e-10 * length;
                            if (!(error <= allowed)) {
                                printf("%s, side %d, %d bits, sharpness %g, share %g: squared error %.3g of the codes'\n", level, which, bits, sharpness,
                                       share, error / code_error[row]);
                            }
                            CHECK(error <= allowed);
                        }
                    }
                }
            }
        }
    }
}

template <class T> T one_of(std::initializer_list<T> values) {
    return *(values.begin() + whole(0, (int) values.size() - 1));
}

gear_side_config random_side(int tile, bool is_k) {
    gear_side_config side = {};
    side.bits             = one_of({ 2, 3, 4, 5, 6, 7 });
    side.group            = is_k ? one_of({ 0, 32, 64 }) : one_of({ 0, 32, 64, 128 });
    side.group            = std::min(side.group, is_k ? tile : max_d_head);
    side.scale_bits       = one_of({ 8, 16 });
    side.rank             = one_of({ 0, 0, 1, 2, 16 });
    side.factor_bits      = one_of({ 4, 8 });
    side.rounds           = one_of({ 1, 2 });
    side.rotate           = whole(0, 2);
    side.sparsity         = one_of({ 0.0f, 0.0f, 0.02f, 0.25f });
    side.center           = side.sparsity > 0 ? 0 : whole(0, 1);
    side.clip             = one_of({ 1.0f, 0.9f });
    return side;
}

// Everything at once, drawn by chance.
void test_random() {
    for (int round = 0; round < 60; ++round) {
        gear_config config = {};
        config.tile        = one_of({ 64, 128, 256 });
        config.k           = random_side(config.tile, true);
        config.v           = random_side(config.tile, false);
        config.n_tail      = one_of({ 0, 50 });
        config.n_sink      = one_of({ 0, 4 });
        config.seed        = 1;
        shape s;
        s.n_head_kv = whole(1, 2);
        s.n_share   = whole(1, 9);
        s.d_k       = 16 * (round % 8 ? whole(2, 10) : whole(17, 36));
        s.d_v       = 16 * (round % 8 % 7 ? whole(2, 10) : whole(17, 36));
        s.n_cell    = whole(100, 600);
        s.n_stream  = whole(1, 2);
        request r;
        r.n_kv          = whole(1, s.n_cell);
        r.written       = whole(1, r.n_kv);
        r.n_query       = std::min(r.written, one_of({ 1, 1, 2, 5, 9, 40 }));
        r.n_stream      = whole(1, s.n_stream);
        r.stream0       = whole(0, s.n_stream - r.n_stream);
        r.mask          = one_of({ masking::none, masking::causal, masking::scattered });
        r.mask_n_head   = one_of({ 1, s.n_head() });
        r.mask_n_stream = one_of({ 1, r.n_stream });
        r.max_bias      = r.mask == masking::none ? 0 : one_of({ 0.0f, 4.0f });
        r.softcap       = one_of({ 0.0f, 20.0f });
        r.sinks         = whole(0, 1);
        r.hidden_query  = one_of({ -1, 0 });
        cache c(config, s);
        c.fill(r.written, whole(0, r.written));
        compare("round " + std::to_string(round), c, r);
    }
}

void test_nothing_to_do() {
    cache   c(config_of(4, 4), {});
    request r;
    r.n_query = 0;
    for (int i = 0; const char * level = gear_simd_name(i); ++i) {
        CHECK(op(c, r).run(level, 2).empty());
    }
    r.n_query = 1;
    r.n_kv    = 0;
    compare("no cells", c, r);
}

} // namespace

int main() {
    test_bits();
    test_head_sizes();
    test_shared_heads();
    test_queries();
    test_parts_of_a_tile();
    test_unwritten_cells();
    test_logits();
    test_streams_and_mask_broadcast();
    test_parts_of_the_codec();
    test_bases();
    test_queries_choose_the_basis();
    test_latent();
    test_exact_sides();
    test_callback();
    test_extreme_queries();
    test_largest_sum();
    test_rounding();
    test_random();
    test_nothing_to_do();
    printf("worst relative error: scalar %.3g, vectors %.3g, vectors and bytes %.3g\n", worst_seen[0], worst_seen[1], worst_seen[2]);
    return check::finish();
}
