// The codec against what its parts promise: exact cases first, then Gaussian tiles with bounds on both sides, L, S, partial tiles, and inputs meant to
// break it. Every property is checked on every kernel level of this machine; test_codec_levels.cpp holds the levels against each other.

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

// ---------------------------------------------------------------------------------------------------------------------------------------------
// L
// ---------------------------------------------------------------------------------------------------------------------------------------------

// The residual of a tile X = Q + U V^T is U V^T when Q codes exactly: L then has to find it to the rounding of its factors.
static void test_exact_rank() {
    for (const int factor_bits : { 8, 4 }) {
        for_each_side([&](gear_side side) {
            gear_config config   = plain_config(4, 16);
            config.k.group       = 0;
            config.k.rank        = 3;
            config.k.factor_bits = factor_bits;
            config.v             = config.k;
            const tile_case c(config, side, 64);
            numbers         x(c.size());
            const numbers   u = gaussian(3 * c.T(), check::seed()), v = gaussian(3 * c.d(), check::seed() + 1);
            double          planted = 0;
            for (int t = 0; t < c.T(); ++t) {
                for (int i = 0; i < c.d(); ++i) {
                    const int  along   = side == GEAR_SIDE_K ? t : i;
                    // two ends fix the range, so that zero = 0 and scale = 64 whatever is planted between
                    const bool is_end  = along < 2;
                    double     product = 0;
                    for (int k = 0; k < 3; ++k) {
                        product += is_end ? 0 : (k + 1) * u[k * c.T() + t] * v[k * c.d() + i];
                    }
                    x[t * c.d() + i] = (float) (is_end ? along * 960.0 : 64.0 * (1 + (t * 7 + i * 3) % 14) + product);
                    planted += product * product;
                }
            }
            const numbers xhat  = c.unpack(c.pack(x));
            const double  share = squared_distance(x, xhat) / planted;
            // a factor entry is off by at most 1/254 (1/14) of its column's largest entry, about 3 times the column's rms
            CHECK(share < (factor_bits == 8 ? 1e-3 : 0.12));
            CHECK(share > (factor_bits == 8 ? 1e-6 : 1e-3));
        });
    }
}

// L never makes a tile worse and, with a residual that has a direction, makes it better; more rounds and a higher rank go further.
static void test_low_rank_helps() {
    uint32_t seed = check::seed();
    for (const int bits : { 2, 4 }) {
        for (const int factor_bits : { 8, 4 }) {
            for_each_side([&](gear_side side) {
                double gain = 0;
                for (int head = 0; head < 8; ++head) {
                    gear_config     config = plain_config(bits, 8);
                    const tile_case plain(config, side, 128);
                    config.k.factor_bits = config.v.factor_bits = factor_bits;
                    double        before                        = 0;
                    const numbers x                             = cache_like(plain, ++seed);
                    before                                      = squared_distance(x, plain.unpack(plain.pack(x)));
                    const double backbone                       = before;
                    for (const int rank : { 1, 2, 4 }) {
                        config.k.rank = config.v.rank = rank;
                        const tile_case c(config, side, 128);
                        const double    error = squared_distance(x, c.unpack(c.pack(x)));
                        CHECK(error < backbone);
                        CHECK(error < before * 1.001);
                        before = error;
                    }
                    config.k.rounds = config.v.rounds = 3;
                    const tile_case c(config, side, 128);
                    const double    error = squared_distance(x, c.unpack(c.pack(x)));
                    gain += 10 * std::log10(before / error);
                    CHECK(error < backbone);
                }
                CHECK(gain > 0);
            });
        }
    }
}

// A tile that D holds exactly has no residual: L must be 0, and with it the tile what it is without L.
static void test_low_rank_of_nothing() {
    for (const int factor_bits : { 8, 4 }) {
        for_each_side([&](gear_side side) {
            gear_config     config = plain_config(4, 8);
            const tile_case plain(config, side, 64);
            config.k.rank = config.v.rank = 4;
            config.k.rounds = config.v.rounds = 3;
            config.k.factor_bits = config.v.factor_bits = factor_bits;
            const tile_case c(config, side, 64);
            numbers         x(c.size());
            for (int i = 0; i < c.size(); ++i) {
                x[i] = (float) ((side == GEAR_SIDE_K ? i / c.d() : i) % 16);
            }
            const tile_parts parts = c.parts(c.pack(x));
            CHECK(parts.codes == plain.parts(plain.pack(x)).codes);
            CHECK(std::all_of(parts.a.begin(), parts.a.end(), [](float value) { return value == 0; }));
            CHECK(c.unpack(c.pack(x)) == x);
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// S
// ---------------------------------------------------------------------------------------------------------------------------------------------

static void test_outliers() {
    uint32_t seed = check::seed();
    for (const int rank : { 0, 2 }) {
        for_each_side([&](gear_side side) {
            gear_config     config = plain_config(2, 8);
            const tile_case plain(config, side, 128);
            config.k.sparsity = config.v.sparsity = 0.04f;
            config.k.rank = config.v.rank = rank;
            const tile_case c(config, side, 128);
            const int       length = side == GEAR_SIDE_K ? c.T() : c.d();
            CHECK(c.layout.part.n_outlier == 2 * (int) std::lround(0.02 * length));

            numbers      x = gaussian(c.size(), ++seed);
            std::mt19937 random(++seed);
            for (int vector = 0; vector < c.layout.part.n_vector; ++vector) { // all of them, of both signs, far out
                for (int k = 0; k < c.layout.part.n_outlier / 2; ++k) {
                    for (const float sign : { 1.0f, -1.0f }) {
                        int index;
                        do {
                            const int i = (int) (random() % length);
                            index       = side == GEAR_SIDE_K ? i * c.d() + vector : vector * c.d() + i;
                        } while (std::fabs(x[index]) > 90);
                        x[index] = sign * half_to_float(float_to_half(100 + (float) (random() % 1000) * 0.37f));
                    }
                }
            }
            const bytes   tile  = c.pack(x);
            const numbers xhat  = c.unpack(tile);
            int           wrong = 0, n_planted = 0;
            const auto    codes = c.parts(tile).codes;
            for (int i = 0; i < c.size(); ++i) {
                if (std::fabs(x[i]) > 90) {
                    ++n_planted;
                    wrong += xhat[i] != x[i] || codes[i] != 0;
                }
            }
            CHECK(n_planted == c.layout.part.n_vector * c.layout.part.n_outlier);
            CHECK(wrong == 0);
            // with them out of the way the rest is coded as a Gaussian is at 2 bits: 12 / (range / 3)^2, 6 dB for V's range of 5.2 and 8 dB for K's of 4.1
            numbers rest = x, rest_hat = xhat;
            for (int i = 0; i < c.size(); ++i) {
                if (std::fabs(x[i]) > 90) {
                    rest[i] = rest_hat[i] = 0;
                }
            }
            CHECK(signal_to_noise(rest, rest_hat) > 5);
            CHECK(signal_to_noise(rest, rest_hat) < 11);
            CHECK(squared_distance(x, plain.unpack(plain.pack(x))) > 100 * squared_distance(x, xhat));
        });
    }
}

// Without outliers to speak of, filtering takes the ends of each vector: the highest and lowest, as many as the share says.
static void test_outliers_are_the_ends() {
    gear_config config = plain_config(3, 8);
    config.v.sparsity  = 0.05f;
    const tile_case  c(config, GEAR_SIDE_V, 64);
    const numbers    x     = gaussian(c.size(), check::seed());
    const tile_parts parts = c.parts(c.pack(x));
    const int        n     = c.layout.part.n_outlier;
    CHECK(n == 4);
    int wrong = 0;
    for (int t = 0; t < c.T(); ++t) {
        numbers sorted(x.begin() + t * 64, x.begin() + (t + 1) * 64), kept;
        std::sort(sorted.begin(), sorted.end());
        for (int slot = 0; slot < n; ++slot) {
            kept.push_back(x[t * 64 + parts.outlier_index[t * n + slot]]);
        }
        std::sort(kept.begin(), kept.end());
        wrong += kept != numbers{ sorted[0], sorted[1], sorted[62], sorted[63] };
    }
    CHECK(wrong == 0);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Partial tiles
// ---------------------------------------------------------------------------------------------------------------------------------------------

// What stands in cells never written changes no byte, and they change nothing for the others.
static void test_unwritten_have_no_say() {
    uint32_t seed = check::seed();
    for (const int n_written : { 0, 1, 5, 37, 200 }) {
        for (const int variant : { 0, 1, 2 }) {
            for_each_side([&](gear_side side) {
                gear_config config = plain_config(4, variant == 1 ? 16 : 8);
                if (variant == 2) {
                    config.k.rank = config.v.rank = 2;
                    config.k.rounds = config.v.rounds = 2;
                    config.k.factor_bits = config.v.factor_bits = 4;
                    config.k.sparsity = config.v.sparsity = 0.05f;
                    config.k.rotate = config.v.rotate = 1;
                }
                const tile_case      c(config, side, 64);
                std::mt19937         random(++seed);
                std::vector<uint8_t> written(c.T(), 0);
                std::fill_n(written.begin(), n_written, 1);
                std::shuffle(written.begin(), written.end(), random);
                const numbers x       = gaussian(c.size(), ++seed);
                numbers       garbage = x, tame = x;
                for (int i = 0; i < c.size(); ++i) {
                    if (!written[i / c.d()]) {
                        garbage[i] = i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -1e30f;
                        tame[i]    = 0;
                    }
                }
                const bytes      tile  = c.pack(x, written.data());
                const tile_parts parts = c.parts(tile);
                const numbers    xhat  = c.unpack(tile);
                CHECK(tile == c.pack(garbage, written.data()));
                CHECK(tile == c.pack(tame, written.data()));
                int    wrong = 0;
                double error = 0;
                for (int t = 0; t < c.T(); ++t) {
                    for (int i = 0; i < c.d(); ++i) {
                        const int at = t * c.d() + i;
                        wrong += !std::isfinite(xhat[at]) || (!written[t] && parts.codes[at] != 0);
                        error += written[t] ? std::pow(xhat[at] - x[at], 2) : 0;
                    }
                    for (int k = 0; k < config.k.rank; ++k) {
                        wrong += !written[t] && parts.a[t * config.k.rank + k] != 0;
                    }
                }
                CHECK(wrong == 0);
                CHECK(error <= 0.02 * n_written * c.d());
                // slots without an outlier point at unwritten cells
                if (side == GEAR_SIDE_K && variant == 2) {
                    for (int i = 0; i < c.layout.part.n_vector * c.layout.part.n_outlier; ++i) {
                        wrong += !written[parts.outlier_index[i]] && parts.outlier_value[i] != 0;
                    }
                    CHECK(wrong == 0);
                }
            });
        }
    }
    // all written is the same, said or not
    const tile_case            c(plain_config(4, 8), GEAR_SIDE_K, 64);
    const numbers              x = gaussian(c.size(), ++seed);
    const std::vector<uint8_t> all(c.T(), 1);
    CHECK(c.pack(x) == c.pack(x, all.data()));
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Kept rows
// ---------------------------------------------------------------------------------------------------------------------------------------------

static bytes repack(const tile_case & c, const numbers & x, const std::vector<uint8_t> & kept, const bytes & old) {
    bytes           tile(old.size()), scratch(pack_scratch_bytes(c.layout));
    const kept_rows rows = { kept.data(), old.data() };
    pack_tile(c.layout, c.config.seed, x.data(), nullptr, tile.data(), scratch.data(), &rows);
    return tile;
}

// Rows that stay do not change, be the basis rotated or not, as long as the new ones lie within their ranges.
static void test_kept_rows_stay() {
    uint32_t seed = check::seed();
    for (const int bits : { 2, 3, 4, 7 }) {
        for (const int scale_bits : { 8, 16 }) {
            for (const int variant : { 0, 1, 2, 3 }) {
                for_each_side([&](gear_side side) {
                    gear_config config = plain_config(bits, scale_bits);
                    config.k.rotate = config.v.rotate = variant & 1 ? 1 + (variant >> 1 & 1) : 0;
                    config.k.center = config.v.center = variant >> 1;
                    const tile_case            c(config, side, 80);
                    const numbers              x   = cache_like(c, ++seed), nothing(c.size(), NAN);
                    const bytes                old = c.pack(x);
                    const std::vector<uint8_t> all(c.T(), 1);
                    CHECK(repack(c, nothing, all, old) == old);

                    std::vector<uint8_t> some = all;
                    numbers              next = c.unpack(old);
                    for (int t = 0; t < c.T(); t += 3) { // these become the mean of their neighbours
                        some[t] = 0;
                        for (int i = 0; i < c.d(); ++i) {
                            float sum = 0;
                            for (int other = t / 32 * 32; other < t / 32 * 32 + 32; ++other) {
                                sum += next[other * c.d() + i];
                            }
                            next[t * c.d() + i] = sum / 32;
                        }
                    }
                    const auto before = c.parts(old).codes, after = c.parts(repack(c, next, some, old)).codes;
                    int        changed = 0;
                    for (int i = 0; i < c.size(); ++i) {
                        changed += some[i / c.d()] && before[i] != after[i];
                    }
                    CHECK(changed == 0);
                });
            }
        }
    }
}

// Neighbours that are written two hundred times over wear a kept row down only where a K group widens for them, and by the steps of lo and hi. Of n normal
// numbers ln n are the largest so far when they come, but a range is widened only for one that lies far beyond it: 5 to 16 times the error of one coding
// were seen, and 1.4 for V. Coded anew each time, it would become hundreds.
static void test_kept_rows_do_not_wear() {
    uint32_t seed = check::seed();
    for (const int every : { 2, 8 }) { // of so many rows one is written over, and the same the other way round
        for (const bool few_stay : { false, true }) {
            for (const int scale_bits : { 8, 16 }) {
                for_each_side([&](gear_side side) {
                    const tile_case      c(plain_config(4, scale_bits), side, 64);
                    const numbers        x    = gaussian(c.size(), ++seed);
                    bytes                tile = c.pack(x);
                    std::vector<uint8_t> kept(c.T());
                    for (int t = 0; t < c.T(); ++t) {
                        kept[t] = (t % every == 0) == few_stay;
                    }
                    const auto error = [&] {
                        const numbers xhat = c.unpack(tile);
                        double        sum  = 0;
                        for (int i = 0; i < c.size(); ++i) {
                            sum += kept[i / c.d()] ? std::pow(x[i] - xhat[i], 2) : 0;
                        }
                        return sum;
                    };
                    const double once = error();
                    for (int refill = 0; refill < 200; ++refill) {
                        tile = repack(c, gaussian(c.size(), ++seed), kept, tile);
                    }
                    CHECK(error() < (side == GEAR_SIDE_V ? 2 : 20) * once);
                });
            }
        }
    }
}

// A K group of which most rows stay keeps its range, and cuts a new row off that reaches a little beyond it; one of which few stay widens for the others.
static void test_the_cheaper_range_is_taken() {
    uint32_t seed = check::seed();
    for (const int bits : { 2, 4 }) {
        const tile_case c(plain_config(bits, 16), GEAR_SIDE_K, 64);
        const numbers   x   = gaussian(c.size(), ++seed);
        const bytes     old = c.pack(x);
        for (const bool most_stay : { true, false }) {
            std::vector<uint8_t> kept(c.T());
            numbers              next(c.size());
            for (int t = 0; t < c.T(); ++t) {
                kept[t] = (t % 32 != 0) == most_stay;
                for (int i = 0; i < c.d(); ++i) {
                    const group_range range = range_of(c.layout, old.data(), t, i);
                    const float       reach = range.scale * (float) c.layout.levels;
                    next[t * c.d() + i]     = range.zero + reach * (most_stay ? 1.05f : (float) (t % 32) / 8.0f);
                }
            }
            const bytes   tile = repack(c, next, kept, old);
            const numbers xhat = c.unpack(tile), before = c.unpack(old);
            int           changed = 0, wrong = 0;
            for (int i = 0; i < c.size(); ++i) {
                const group_range range = range_of(c.layout, old.data(), i / c.d(), i % c.d());
                const float       reach = range.scale * (float) c.layout.levels;
                changed += kept[i / c.d()] && xhat[i] != before[i];
                wrong += !kept[i / c.d()] && std::fabs(xhat[i] - next[i]) > reach * (most_stay ? 0.06f : 4.0f / (float) c.layout.levels * 0.51f);
            }
            CHECK(most_stay ? changed == 0 : changed > 0);
            CHECK(wrong == 0);
        }
    }
}

// A narrow group beside wide ones: its zero in 8 bits is coarser than its codes, and where the set widens the nearest one may lie above what the group
// holds.
static void test_a_held_narrow_range_does_not_wrap() {
    uint32_t seed = check::seed();
    for (const int round : { 0, 1, 2, 3, 4, 5, 6, 7 }) {
        const tile_case      c(plain_config(7, 8, 64), GEAR_SIDE_K, 64);
        numbers              x = gaussian(c.size(), ++seed);
        std::vector<uint8_t> kept(c.T(), 1);
        for (int i = 0; i < 32 * c.d(); ++i) {
            x[i] = 0.1f * x[i] + 0.01f * (float) (i % c.d()); // the first group of each channel
        }
        const bytes old  = c.pack(x);
        numbers     next = c.unpack(old);
        kept[40]         = 0;
        for (int i = 0; i < c.d(); ++i) {
            next[40 * c.d() + i] = 6 + (float) round / 8; // widens the set
        }
        const numbers after = c.unpack(repack(c, next, kept, old));
        float         most  = 0;
        for (int i = 0; i < 32 * c.d(); ++i) {
            most = std::max(most, std::fabs(after[i] - next[i]));
        }
        CHECK(most < 2 * 12.0f / 255); // two steps of the zero
    }
}

// An entry of a kept row that was an outlier, and is none beside the new rows, keeps its value to a code's rounding: it is not cut off.
static void test_kept_outliers_are_not_cut_off() {
    uint32_t seed = check::seed();
    for (const int scale_bits : { 8, 16 }) {
        for_each_side([&](gear_side side) {
            gear_config config = plain_config(4, scale_bits, 64);
            config.k.sparsity = config.v.sparsity = 0.05f;
            const tile_case      c(config, side, 64);
            numbers              x = gaussian(c.size(), ++seed);
            std::vector<uint8_t> kept(c.T(), 1);
            std::transform(x.begin(), x.end(), x.begin(), [](float number) { return 0.25f * number; });
            for (int i = 0; i < c.d(); ++i) {
                x[3 * c.d() + i] = 5, x[7 * c.d() + i] = 4; // outliers of K's channels
            }
            const bytes   old    = c.pack(x);
            const numbers before = c.unpack(old);
            numbers       next   = before;
            for (const int t : { 20, 40 }) {
                kept[t] = 0;
                for (int i = 0; i < c.d(); ++i) {
                    next[t * c.d() + i] = 8 + (float) i / 64;
                }
            }
            const numbers after = c.unpack(repack(c, next, kept, old));
            float         most  = 0;
            for (int i = 0; i < c.size(); ++i) {
                most = std::max(most, std::fabs(after[i] - next[i]));
            }
            CHECK(most < 0.75f * 6 / (float) c.layout.levels); // from about -1 to 5, and a little for scales of 8 bits
        });
    }
}

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
        test_exact_rank();
        test_low_rank_helps();
        test_low_rank_of_nothing();
        test_outliers();
        test_outliers_are_the_ends();
        test_unwritten_have_no_say();
        test_kept_rows_stay();
        test_kept_rows_do_not_wear();
        test_kept_outliers_are_not_cut_off();
        test_a_held_narrow_range_does_not_wrap();
        test_the_cheaper_range_is_taken();
        test_bytes_are_counted();
        test_bad_configs();
        test_bad_arguments();
        test_extreme_values();
    });
    return check::finish();
}
