// The codec's bytes, and inputs meant to break it: configurations, arguments and values. On every kernel level.

#include "check.h"
#include "codec_tiles.h"

#include <algorithm>
#include <cstring>
#include <string>

using namespace gear;
using namespace codec_test;

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Bytes
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Every part in its place, one behind the other, and all of them together are the tile, to the 15 bytes between parts and the 63 at its end.
static void test_bytes_are_counted() {
    for (const int rank : { 0, 3 }) {
        for (const float sparsity : { 0.0f, 0.02f }) {
            for (const int d : { 32, 48, 80, 128, 256, 512, 576 }) {
                for_each_side([&](gear_side side) {
                    gear_config config = plain_config(7, rank ? 16 : 8);
                    config.k.rank = config.v.rank = rank;
                    config.k.sparsity = config.v.sparsity = sparsity;
                    gear_tile_layout part;
                    CHECK(gear_tile_describe(&config, side, d, &part) == GEAR_OK);
                    const int64_t n_outlier = (int64_t) part.n_vector * part.n_outlier, wide = rank ? 2 : 1;
                    const int64_t codes = (int64_t) part.n_lane * part.n_depth;
                    const struct {
                        int64_t offset, bytes;
                    } all[]     = { { part.plane[0], codes / 2 },
                                    { part.plane[1], codes / 4 },
                                    { part.plane[2], codes / 8 },
                                    { part.scale, part.n_group * wide },
                                    { part.zero, part.n_group * wide },
                                    { part.lo, rank ? 0 : 2 * part.n_set },
                                    { part.hi, rank ? 0 : 2 * part.n_set },
                                    { part.sigma, 4 * rank },
                                    { part.a, (int64_t) rank * config.tile },
                                    { part.b, (int64_t) rank * d },
                                    { part.outlier_value, 2 * n_outlier },
                                    { part.outlier_index, n_outlier * (side == GEAR_SIDE_V && d > 256 ? 2 : 1) } };
                    int64_t end = 0;
                    for (const auto & p : all) {
                        CHECK((p.bytes == 0) == (p.offset == -1));
                        if (p.bytes > 0) {
                            CHECK(p.offset >= end && p.offset < end + 16);
                            end = p.offset + p.bytes;
                        }
                    }
                    CHECK(part.bytes >= end && part.bytes < end + 64 && part.bytes % 64 == 0);
                });
            }
        }
    }
    // the default's 4 bits in K groups of 32 tokens: 4 + 16/32 for scale and zero + 32 bits of lo and hi over 256 tokens
    gear_tile_layout  part;
    const gear_config config = plain_config(4, 8);
    CHECK(gear_tile_describe(&config, GEAR_SIDE_K, 128, &part) == GEAR_OK);
    CHECK(part.bytes * 8 == (int64_t) (256 * 128 * (4 + 16.0 / 32 + 32.0 / 256)));
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Bad input
// ---------------------------------------------------------------------------------------------------------------------------------------------

static void test_bad_configs() {
    const struct {
        const char * message;
        void (*spoil)(gear_config &);
    } cases[] = {
        { "bits_k must be", [](gear_config & c) { c.k.bits             = 1; } },
        { "bits_v must be", [](gear_config & c) { c.v.bits             = 8; } },
        { "bits_v must be", [](gear_config & c) { c.v.bits             = -4; } },
        { "tile must be", [](gear_config & c) { c.tile                 = 100; } },
        { "tile must be", [](gear_config & c) { c.tile                 = 0; } },
        { "group_k must be", [](gear_config & c) { c.k.group           = 48; } },
        { "group_k must be", [](gear_config & c) { c.k.group           = -32; } },
        { "group_k must be", [](gear_config & c) { c.k.group           = 96; } },
        { "group_v must be", [](gear_config & c) { c.v.group           = 33; } },
        { "group_v must be", [](gear_config & c) { c.v.group           = 608; } },
        { "scale_bits must be", [](gear_config & c) { c.v.scale_bits   = 4; } },
        { "factor_bits must be", [](gear_config & c) { c.k.factor_bits = 16; } },
        { "rank_k must be", [](gear_config & c) { c.k.rank             = 17; } },
        { "rank_v must be", [](gear_config & c) { c.v.rank             = -1; } },
        { "rounds must be", [](gear_config & c) { c.k.rounds           = 0; } },
        { "rotate_v must be", [](gear_config & c) { c.v.rotate         = 3; } },
        { "center_k must be", [](gear_config & c) { c.k.center         = 3; } },
        { "center_v must be 0 where there are outliers",
          [](gear_config & c) {
              c.v.center   = 1;
              c.v.sparsity = 0.02f;
          } },
        { "sparsity must be", [](gear_config & c) { c.k.sparsity = 0.5f; } },
        { "sparsity must be", [](gear_config & c) { c.k.sparsity = -0.01f; } },
        { "sparsity must be", [](gear_config & c) { c.v.sparsity = NAN; } },
        { "clip_k must be", [](gear_config & c) { c.k.clip       = 0; } },
        { "clip_v must be", [](gear_config & c) { c.v.clip       = 1.5f; } },
        { "clip_v must be", [](gear_config & c) { c.v.clip       = NAN; } },
        { "n_tail must be", [](gear_config & c) { c.n_tail       = -1; } },
        { "n_sink must be", [](gear_config & c) { c.n_sink       = -1; } },
    };
    for (const auto & bad : cases) {
        gear_config config = plain_config(4, 8);
        bad.spoil(config);
        CHECK(gear_config_check(&config) == GEAR_ERROR_INVALID);
        CHECK(std::string(gear_last_error()).find(bad.message) == 0);
        gear_tile_layout part;
        CHECK(gear_tile_describe(&config, GEAR_SIDE_K, 64, &part) == GEAR_ERROR_INVALID);
    }
    const gear_config config = plain_config(4, 8);
    CHECK(gear_config_check(&config) == GEAR_OK);
    CHECK(gear_config_check(nullptr) == GEAR_ERROR_INVALID);
}

static void test_bad_arguments() {
    gear_config config = plain_config(4, 8);
    for (const int d : { 0, 16, 33, 40, 120, 264, 592, 1024, -64 }) {
        CHECK(gear_head_check(&config, 64, d) == GEAR_ERROR_UNSUPPORTED);
        CHECK(std::string(gear_last_error()).find("V heads of " + std::to_string(d)) == 0);
        CHECK(gear_head_check(&config, d, 64) == GEAR_ERROR_UNSUPPORTED);
    }
    CHECK(gear_head_check(&config, 192, 128) == GEAR_OK);
    CHECK(gear_head_check(&config, 576, 512) == GEAR_OK);
    config.v.bits = 16; // a side kept as f16 takes any head size, and has no tiles
    CHECK(gear_config_check(&config) == GEAR_OK);
    CHECK(gear_head_check(&config, 192, 33) == GEAR_OK);
    gear_tile_layout part;
    CHECK(gear_tile_describe(&config, GEAR_SIDE_V, 64, &part) == GEAR_ERROR_INVALID);
    CHECK(std::string(gear_last_error()).find("V is kept as f16") == 0);
    CHECK(gear_tile_describe(&config, GEAR_SIDE_K, 64, nullptr) == GEAR_ERROR_INVALID);

    gear_config with_outliers = plain_config(4, 8, 64);
    with_outliers.k.sparsity  = 0.05f;
    const tile_case c(with_outliers, GEAR_SIDE_K, 64);
    numbers         x    = gaussian(c.size(), check::seed());
    bytes           tile = c.pack(x);
    CHECK(gear_tile_pack(&with_outliers, GEAR_SIDE_K, 64, nullptr, nullptr, tile.data()) == GEAR_ERROR_INVALID);
    CHECK(gear_tile_pack(&with_outliers, GEAR_SIDE_K, 64, x.data(), nullptr, tile.data() + 1) == GEAR_ERROR_INVALID);
    CHECK(gear_tile_unpack(&with_outliers, GEAR_SIDE_K, 64, nullptr, x.data()) == GEAR_ERROR_INVALID);
    tile[c.layout.part.outlier_index] = 64; // past the end of a vector
    CHECK(gear_tile_unpack(&with_outliers, GEAR_SIDE_K, 64, tile.data(), x.data()) == GEAR_ERROR_DATA);
}

// Numbers that are none, or beyond f16: the tile stays finite and the same input gives the same bytes.
static void test_extreme_values() {
    uint32_t                        seed = check::seed();
    std::mt19937                    random(seed);
    std::normal_distribution<float> normal;
    const float                     extremes[] = { NAN,   INFINITY, -INFINITY, 3e38f,  -3e38f,   65504.0f, -65504.0f, 65520.0f, 0.0f,
                                                   -0.0f, 1e-45f,   -1e-45f,   1e-38f, 0x1p-24f, 0x1p-25f, 1.0f,      -1.0f,    1e-3f };
    for (int run = 0; run < 200; ++run) {
        gear_config        config = plain_config(one_of(random, { 2, 3, 4, 5, 6, 7 }), one_of(random, { 8, 16 }), one_of(random, { 64, 128, 256 }));
        gear_side_config & k      = config.k;
        k.group                   = one_of(random, { 0, 32, 64 });
        k.rank                    = one_of(random, { 0, 0, 1, 4, 16 });
        k.factor_bits             = one_of(random, { 4, 8 });
        k.rounds                  = one_of(random, { 1, 3 });
        k.rotate                  = one_of(random, { 0, 1, 2 });
        k.sparsity                = one_of(random, { 0.0f, 0.02f, 0.25f });
        k.center                  = k.sparsity > 0 ? 0 : one_of(random, { 0, 1 });
        k.clip                    = one_of(random, { 1.0f, 0.5f });
        config.v                  = k;
        const tile_case c(config, one_of(random, { GEAR_SIDE_K, GEAR_SIDE_V }), one_of(random, { 32, 48, 128, 256, 512, 576 }));
        numbers         x(c.size());
        const int       n_extreme = one_of(random, { 1, 3, 18 }), n_plain = one_of(random, { 0, 1, 100 });
        for (float & value : x) {
            value = (int) (random() % 101) < n_plain ? normal(random) : extremes[(seed + random() % n_extreme) % 18];
        }
        ++seed;
        std::vector<uint8_t> written(c.T());
        for (uint8_t & w : written) {
            w = one_of(random, { 0, 1, 1 });
        }
        const bytes   tile = c.pack(x, run % 2 ? written.data() : nullptr);
        const numbers xhat = c.unpack(tile);
        CHECK(std::all_of(xhat.begin(), xhat.end(), [](float value) { return std::fabs(value) <= 65504; }));
        CHECK(tile == c.pack(x, run % 2 ? written.data() : nullptr));
    }
}

int main() {
    for_each_level([] {
        test_bytes_are_counted();
        test_bad_configs();
        test_bad_arguments();
        test_extreme_values();
    });
    return check::finish();
}
