// What the codec adds to its backbone: L, S, tiles only partly written, and tiles that keep rows while others are written over them. On every kernel
// level.

#include "check.h"
#include "codec_tiles.h"

#include <algorithm>
#include <cstring>
#include <string>

using namespace gear;
using namespace codec_test;

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

int main() {
    for_each_level([] {
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
    });
    return check::finish();
}
