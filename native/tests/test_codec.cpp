// The codec's backbone against what it promises: exact cases first, then Gaussian tiles with bounds on both sides, ranges, H, w and M. L, S and rows that
// stay are in test_codec_parts.cpp, bytes and bad input in test_codec_input.cpp. Every property is checked on every kernel level of this machine;
// test_codec_levels.cpp holds the levels against each other.

#include "check.h"
#include "codec/basis.h"
#include "codec_tiles.h"

#include <algorithm>
#include <cstring>
#include <string>

using namespace gear;
using namespace codec_test;

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Tiles that come back exactly
// ---------------------------------------------------------------------------------------------------------------------------------------------

static void test_constant() {
    for (const float value : { 0.0f, 1.0f, -3.25f, 65504.0f, -65504.0f, 0x1p-24f }) {
        for (const int scale_bits : { 8, 16 }) {
            for_each_side([&](gear_side side) {
                const tile_case c(plain_config(4, scale_bits), side, 64);
                const numbers   x(c.size(), value);
                CHECK(c.unpack(c.pack(x)) == x);
            });
        }
    }
}

// Sixteen values a step apart are what 4 bits can say.
static void test_ramp_and_plateaus() {
    for (const int scale_bits : { 8, 16 }) {
        for_each_side([&](gear_side side) {
            const tile_case c(plain_config(4, scale_bits), side, 128);
            numbers         ramp(c.size()), plateaus(c.size());
            for (int t = 0; t < c.T(); ++t) {
                for (int i = 0; i < c.d(); ++i) {
                    const int along         = side == GEAR_SIDE_K ? t : i;
                    ramp[t * c.d() + i]     = -7.5f + (float) (along % 16);
                    plateaus[t * c.d() + i] = along % 32 < 20 ? 0.25f : -1.625f;
                }
            }
            CHECK(c.unpack(c.pack(ramp)) == ramp);
            CHECK(c.unpack(c.pack(plateaus)) == plateaus);
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// D
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Uniform rounding over the range of n normal numbers: the range of 256 is 5.66 on the mean, of 128 5.19 (tables of the normal range), so the error is
// (range / levels)^2 / 12. The bounds leave 0.6 dB on each side of the formula for the ends, which are exact, and for the 8-bit scales.
static void test_gaussian() {
    for (const int bits : { 2, 3, 4, 6 }) {
        for (const int scale_bits : { 8, 16 }) {
            for_each_side([&](gear_side side) {
                gear_config config = plain_config(bits, scale_bits);
                config.k.group     = 0;
                const tile_case c(config, side, 128);
                const numbers   x        = gaussian(c.size(), check::seed());
                const double    range    = side == GEAR_SIDE_K ? 5.66 : 5.19;
                const double    step     = range / ((1 << bits) - 1);
                const double    expected = 10 * std::log10(12 / (step * step));
                CHECK_NEAR(signal_to_noise(x, c.unpack(c.pack(x))), expected, 0.6);
            });
        }
    }
}

// No value is further from its code than half a step, but for the two ends of a group, which may be one step away.
static void test_every_shape() {
    uint32_t seed = check::seed();
    for (const int d : { 32, 48, 64, 80, 96, 112, 128, 192, 256, 272, 512, 576 }) {
        for (const int T : { 64, 128, 256 }) {
            for (int bits = 2; bits <= 7; ++bits) {
                for (const int scale_bits : { 8, 16 }) {
                    for_each_side([&](gear_side side) {
                        gear_config config = plain_config(bits, scale_bits, T);
                        config.k.group     = T == 64 ? 64 : 32;
                        config.v.group     = d == 48 || d == 128 || d == 576 ? 32 : 0;
                        const tile_case c(config, side, d);
                        const numbers   x    = gaussian(c.size(), ++seed);
                        const bytes     tile = c.pack(x);
                        const numbers   xhat = c.unpack(tile);
                        bool            near = true;
                        for (int i = 0; i < c.size(); ++i) {
                            const group_range range = range_of(c.layout, tile.data(), i / d, i % d);
                            near                    = near && std::fabs(x[i] - xhat[i]) <= 1.0001f * range.scale + 1e-6f;
                        }
                        CHECK(near);
                        CHECK(c.parts(tile).reconstruction(c) == xhat);
                    });
                }
            }
        }
    }
}

// The backbone done by hand, in double, from the formulas of tile.h: zero and scale as the tile says them, each value at its nearest code.
static void test_backbone() {
    for_each_side([&](gear_side side) {
        const tile_case  c(plain_config(4, 8), side, 64);
        const numbers    x     = gaussian(c.size(), check::seed());
        const bytes      tile  = c.pack(x);
        const tile_parts parts = c.parts(tile);
        const uint16_t * lo = (const uint16_t *) (tile.data() + c.layout.part.lo), *hi = (const uint16_t *) (tile.data() + c.layout.part.hi);
        int              wrong = 0;
        for (int t = 0; t < c.T(); ++t) {
            for (int i = 0; i < c.d(); ++i) {
                const int    g   = group_of(c.layout, t, i);
                const int    set = side == GEAR_SIDE_K ? i : i / c.layout.group;
                const double low = half_to_float(lo[set]), span = half_to_float(hi[set]) - low;
                const double zero  = low + span * tile[c.layout.part.zero + g] / 255;
                const double scale = span * tile[c.layout.part.scale + g] / 255 / 15;
                const double exact = (x[t * c.d() + i] - zero) / scale;
                wrong += std::fabs(parts.zero[g] - zero) > 1e-6 || std::fabs(parts.scale[g] - scale) > 1e-7;
                // the ends of the group may be rounded outwards
                wrong += std::fabs(parts.codes[t * c.d() + i] - exact) > (exact < 0.999 || exact > 14.001 ? 1.0 : 0.501);
            }
        }
        CHECK(wrong == 0);
    });
}

static void test_fixed_point() {
    uint32_t seed = check::seed();
    for (const int bits : { 2, 3, 4, 5, 6, 7 }) {
        for (const int scale_bits : { 8, 16 }) {
            for_each_side([&](gear_side side) {
                const tile_case c(plain_config(bits, scale_bits), side, 48);
                for (int kind = 0; kind < n_kind; ++kind) {
                    const numbers x     = hard_tile(c, kind, ++seed);
                    const bytes   once  = c.pack(x);
                    const bytes   twice = c.pack(c.unpack(once));
                    CHECK(once == twice);
                    if (once != twice) {
                        printf("  %d bits, scale_bits %d, side %d, kind %d\n", bits, scale_bits, (int) side, kind);
                    }
                }
            });
        }
    }
}

// Groups much narrower than their set still lie inside their coded range, but for the rounding of f32.
static void test_ranges_cover() {
    uint32_t seed = check::seed();
    for (const int bits : { 2, 4, 7 }) {
        for (const int scale_bits : { 8, 16 }) {
            for_each_side([&](gear_side side) {
                const tile_case c(plain_config(bits, scale_bits), side, 64);
                for (int kind = 0; kind < n_kind; ++kind) {
                    const numbers x       = hard_tile(c, kind, ++seed);
                    const numbers largest = largest_of_sets(c, x);
                    const bytes   tile    = c.pack(x);
                    int           outside = 0;
                    for (int t = 0; t < c.T(); ++t) {
                        for (int i = 0; i < c.d(); ++i) {
                            const int         at    = t * c.d() + i;
                            const group_range range = range_of(c.layout, tile.data(), t, i);
                            const float       value = x[at], top = range.zero + range.scale * (float) c.layout.levels;
                            const float       slack = largest[at] * 2e-6f;
                            // a group of one value is one code: no further away than a 255th of the set
                            const float       alone = range.scale == 0 ? largest[at] * 2.01f / 255.0f : 0.0f;
                            outside += value < range.zero - slack - alone || value > top + slack + alone;
                        }
                    }
                    CHECK(outside == 0);
                    if (outside) {
                        printf("  %d bits, scale_bits %d, side %d, kind %d: %d\n", bits, scale_bits, (int) side, kind, outside);
                    }
                }
            });
        }
    }
}

static void test_rotation() {
    for (const int d : { 32, 48, 80, 96, 128, 256, 272, 320, 496, 512, 560, 576 }) {
        numbers       x     = gaussian(d, check::seed() + (uint32_t) d);
        const numbers exact = x;
        hadamard(x.data(), d);
        CHECK_NEAR(energy(x), energy(exact), 1e-4 * energy(exact));
        hadamard(x.data(), d);
        CHECK_NEAR(signal_to_noise(exact, x), 150, 40); // f32 rounding only
    }
    numbers one(64, 0.0f);
    one[5] = 8;
    hadamard(one.data(), 64);
    CHECK(std::all_of(one.begin(), one.end(), [](float value) { return std::fabs(value) == 1; }));

    // 320 = 256 + 64: a channel is shared out over its own block, and over no other one.
    for (const int c : { 5, 260 }) {
        numbers x(320, 0.0f);
        x[c] = 16;
        hadamard(x.data(), 320);
        const float share = c < 256 ? 1.0f : 2.0f;
        for (int i = 0; i < 320; ++i) {
            CHECK(std::fabs(x[i]) == ((i < 256) == (c < 256) ? share : 0.0f));
        }
    }

    // A channel far larger than the others widens the range of every token of V: spread over all channels it does not.
    gear_config plain = plain_config(4, 8), rotated = plain;
    rotated.v.rotate = 1;
    const tile_case without(plain, GEAR_SIDE_V, 128), with(rotated, GEAR_SIDE_V, 128);
    numbers         x = gaussian(without.size(), check::seed());
    for (int t = 0; t < without.T(); ++t) {
        x[t * 128 + 7] *= 30;
    }
    CHECK(signal_to_noise(x, with.unpack(with.pack(x))) > signal_to_noise(x, without.unpack(without.pack(x))) + 3);
}

// Mean square of the error that packing makes of q.k, the queries being normal numbers whose channel c has variance square[c].
static double score_error(const tile_case & c, const numbers & x, const numbers & xhat, const std::vector<double> & square) {
    double sum = 0;
    for (int i = 0; i < c.size(); ++i) {
        sum += square[i % c.d()] * (x[i] - xhat[i]) * (x[i] - xhat[i]) / c.T();
    }
    return sum;
}

// Weights are sqrt(q / s) about their median; scores then err less than without a rotation and less than with Hadamard's alone.
static void test_weights() {
    gear_config weighted = plain_config(4, 8), plain = weighted, hadamard = weighted;
    weighted.k.rotate     = 2;
    hadamard.k.rotate     = 1;
    constexpr int       d = 64;
    const tile_case     c(weighted, GEAR_SIDE_K, d), without(plain, GEAR_SIDE_K, d), with(hadamard, GEAR_SIDE_K, d);
    numbers             x = gaussian(c.size(), check::seed());
    std::vector<double> square(d);
    for (int i = 0; i < d; ++i) { // keys that stray by 1 to 16, and queries by 1 to 8 on other channels
        square[i] = std::pow(4.0, i / 8 % 4);
        for (int t = 0; t < c.T(); ++t) {
            x[t * d + i] = x[t * d + i] * std::ldexp(1.0f, i % 5) + 100.0f * (float) (i % 3);
        }
    }
    uint8_t basis[d / 2];
    CHECK(gear_basis_choose(&weighted, GEAR_SIDE_K, d, x.data(), nullptr, square.data(), basis) == GEAR_OK);
    float w[d];
    load_weights(basis, d, w);
    for (int i = 0; i < d; ++i) { // q / s is a power of two, and so is its median
        CHECK_NEAR(std::log2(w[i] * w[i] / (w[0] * w[0])), i / 8 % 4 - i % 5, 1.01);
    }
    bytes tile(c.layout.part.bytes);
    CHECK(gear_tile_pack_in_basis(&weighted, GEAR_SIDE_K, d, x.data(), nullptr, basis, tile.data()) == GEAR_OK);
    const double error = score_error(c, x, c.unpack(tile), square);
    const double best  = std::min(score_error(c, x, without.unpack(without.pack(x)), square), score_error(c, x, with.unpack(with.pack(x)), square));
    CHECK(error < 0.8 * best);

    // Without queries each channel errs by its own size: as without a rotation, where Hadamard's alone would drown the small ones.
    const numbers alone    = c.unpack(c.pack(x));
    double        share[2] = {};
    for (int i = 0; i < c.size(); ++i) {
        share[i % d % 5 != 0] += (x[i] - alone[i]) * (x[i] - alone[i]) * std::ldexp(1.0, -2 * (i % d % 5));
    }
    CHECK_NEAR(share[1] / share[0] / 4, 1, 0.4); // 4 of 5 channels

    // All channels alike: no weights but 1, and the tile of a Hadamard rotation.
    const numbers normal = gaussian(c.size(), check::seed() + 1);
    const bytes   one = c.pack(normal), other = with.pack(normal);
    CHECK(std::all_of(one.begin() + c.layout.part.basis, one.begin() + c.layout.part.basis + d / 2, [](uint8_t both) { return both == 0x88; }));
    CHECK(memcmp(one.data(), other.data(), c.layout.part.basis) == 0);

    CHECK(gear_tile_pack_in_basis(&plain, GEAR_SIDE_K, d, x.data(), nullptr, basis, tile.data()) == GEAR_ERROR_INVALID);
    CHECK(gear_tile_pack_in_basis(&weighted, GEAR_SIDE_K, d, x.data(), nullptr, nullptr, tile.data()) == GEAR_ERROR_INVALID);
    CHECK(gear_basis_choose(&weighted, GEAR_SIDE_K, d, x.data(), nullptr, nullptr, nullptr) == GEAR_ERROR_INVALID);
}

// Channels that lie far apart cost V's tokens nothing once their means are taken out, and of every channel the mean over the tile comes back to f16.
static void test_means() {
    for_each_side([&](gear_side side) {
        for (const int rotate : { 0, 1, 2 }) {
            gear_config plain = plain_config(3, 8), centered = plain;
            centered.k.center = centered.v.center = 1;
            plain.k.rotate = plain.v.rotate = centered.k.rotate = centered.v.rotate = rotate;
            const tile_case without(plain, side, 64), with(centered, side, 64);
            numbers         x = gaussian(with.size(), check::seed());
            for (int i = 0; i < with.size(); ++i) {
                x[i] += 5.0f * (float) (i % 64 % 7);
            }
            std::vector<uint8_t> written(with.T(), 1);
            written[3] = written[200] = 0;
            const numbers xhat        = with.unpack(with.pack(x, written.data()));
            for (int c = 0; c < 64; ++c) {
                double difference = 0;
                for (int t = 0; t < with.T(); ++t) {
                    difference += written[t] ? xhat[t * 64 + c] - x[t * 64 + c] : 0.0;
                }
                CHECK(std::fabs(difference / (with.T() - 2)) < 0.03); // f16 at the size of the rotated means
            }
            if (side == GEAR_SIDE_V) {
                const double gain = signal_to_noise(x, with.unpack(with.pack(x))) - signal_to_noise(x, without.unpack(without.pack(x)));
                CHECK(gain > (rotate ? 3 : 12));
            }
        }
    });
}

// A clipped range gives up its ends for the others: at 2 bits the error of a Gaussian falls.
static void test_clip() {
    for_each_side([&](gear_side side) {
        gear_config clipped = plain_config(2, 8);
        clipped.k.group     = 0;
        const tile_case plain(clipped, side, 128);
        clipped.k.clip = clipped.v.clip = 0.7f;
        const tile_case c(clipped, side, 128);
        const numbers   x = gaussian(c.size(), check::seed());
        CHECK(signal_to_noise(x, c.unpack(c.pack(x))) > signal_to_noise(x, plain.unpack(plain.pack(x))) + 1);
    });
}

int main() {
    for_each_level([] {
        test_constant();
        test_ramp_and_plateaus();
        test_gaussian();
        test_every_shape();
        test_backbone();
        test_fixed_point();
        test_ranges_cover();
        test_rotation();
        test_weights();
        test_means();
        test_clip();
    });
    return check::finish();
}
