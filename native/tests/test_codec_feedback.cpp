// Keys rounded by what their queries look at (codec/basis.h, "Feedback"): the same bytes on every level, a smaller error of scores, and tiles that keep
// what a tile promises.

#include "check.h"
#include "codec/basis.h"
#include "codec_tiles.h"

#include <cstring>

using namespace gear;
using namespace codec_test;

static bytes pack_for(const tile_case & c, const numbers & x, const uint8_t * written, const std::vector<double> & moment) {
    bytes tile(c.layout.part.bytes, 0xa5);
    CHECK(gear_tile_pack_for_queries(&c.config, c.side, c.d(), x.data(), written, nullptr, moment.data(), tile.data()) == GEAR_OK);
    return tile;
}

// Of queries that look in some directions much more than in others: those of the channels and of n_direction more.
static std::vector<double> random_moment(int d, int n_direction, std::mt19937 & random) {
    std::vector<double> moment((size_t) d * d);
    for (int i = 0; i < n_direction; ++i) {
        const numbers direction = gaussian(d, (uint32_t) random());
        for (int a = 0; a < d; ++a) {
            for (int b = 0; b < d; ++b) {
                moment[(size_t) a * d + b] += (double) direction[a] * direction[b] / n_direction;
            }
        }
    }
    for (int a = 0; a < d; ++a) {
        moment[(size_t) a * d + a] += 0.02;
    }
    return moment;
}

// sum of e^T moment e over the rows, e = x - xhat
static double score_error(int d, const numbers & x, const numbers & xhat, const std::vector<double> & moment) {
    double sum = 0;
    for (size_t row = 0; row < x.size(); row += d) {
        for (int a = 0; a < d; ++a) {
            for (int b = 0; b < d; ++b) {
                sum += moment[(size_t) a * d + b] * ((double) x[row + a] - xhat[row + a]) * ((double) x[row + b] - xhat[row + b]);
            }
        }
    }
    return sum;
}

static void test_levels_agree() {
    std::mt19937 random(check::seed());
    for (int run = 0; run < 60; ++run) {
        gear_config config = plain_config(one_of(random, { 2, 3, 4, 6 }), one_of(random, { 8, 16 }), one_of(random, { 64, 128, 256 }));
        config.k.group     = one_of(random, { 0, 32, 64 });
        config.k.rotate    = one_of(random, { 0, 1, 2 });
        config.k.clip      = one_of(random, { 1.0f, 0.8f });
        const tile_case           c(config, GEAR_SIDE_K, one_of(random, { 32, 48, 64, 80, 128, 272 }));
        const numbers             x      = run % 3 ? cache_like(c, (uint32_t) random()) : hard_tile(c, (int) (random() % n_kind), (uint32_t) random());
        const std::vector<double> moment = random_moment(c.d(), 1 + (int) (random() % 8), random);
        std::vector<uint8_t>      written(c.T());
        for (uint8_t & w : written) {
            w = one_of(random, { 0, 1, 1, 1 });
        }
        CHECK(gear_simd_select("scalar") == GEAR_OK);
        const bytes   tile = pack_for(c, x, written.data(), moment);
        const numbers xhat = c.unpack(tile);
        for (const float value : xhat) {
            CHECK(std::isfinite(value));
        }
        numbers other = x; // what stands in cells that were not written has no say
        for (int i = 0; i < c.size(); ++i) {
            other[i] = written[i / c.d()] ? x[i] : NAN;
        }
        CHECK(pack_for(c, other, written.data(), moment) == tile);
        for (int i = 0; gear_simd_name(i); ++i) {
            CHECK(gear_simd_select(gear_simd_name(i)) == GEAR_OK);
            CHECK(pack_for(c, x, written.data(), moment) == tile);
        }
    }
    gear_simd_select(nullptr);
}

static void test_scores_err_less() {
    std::mt19937 random(check::seed());
    for (const int rotate : { 0, 1, 2 }) {
        for (const int bits : { 2, 3, 4 }) {
            gear_config config = plain_config(bits, 8);
            config.k.rotate    = rotate;
            const tile_case           c(config, GEAR_SIDE_K, 64);
            const numbers             x       = gaussian(c.size(), (uint32_t) random());
            const std::vector<double> moment  = random_moment(64, 8, random);
            const double              nearest = score_error(64, x, c.unpack(c.pack(x)), moment);
            const double              fed     = score_error(64, x, c.unpack(pack_for(c, x, nullptr, moment)), moment);
            printf("rotate %d, %d bits: %.3f of the error of nearest codes\n", rotate, bits, fed / nearest);
            CHECK(fed < 0.6 * nearest);
        }
    }
}

// Queries that look everywhere alike leave nothing to choose: the codes are the nearest.
static void test_white_queries() {
    gear_config config = plain_config(3, 8);
    config.k.rotate    = 1;
    const tile_case     c(config, GEAR_SIDE_K, 64);
    const numbers       x = gaussian(c.size(), check::seed());
    std::vector<double> white((size_t) 64 * 64);
    for (int i = 0; i < 64; ++i) {
        white[(size_t) i * 65] = 1;
    }
    const numbers nearest = c.unpack(c.pack(x)), fed = c.unpack(pack_for(c, x, nullptr, white));
    CHECK_NEAR(score_error(64, x, fed, white) / score_error(64, x, nearest, white), 1, 1e-3);
}

static void test_refused() {
    const tile_case     c(plain_config(2, 8), GEAR_SIDE_K, 64);
    const numbers       x(c.size());
    std::vector<double> moment((size_t) 64 * 64);
    bytes               tile(c.layout.part.bytes);
    const auto          pack = [&](const gear_config & config, gear_side side) {
        return gear_tile_pack_for_queries(&config, side, 64, x.data(), nullptr, nullptr, moment.data(), tile.data());
    };
    CHECK(pack(c.config, GEAR_SIDE_K) == GEAR_OK); // no query at all: the nearest codes
    CHECK(pack(c.config, GEAR_SIDE_V) == GEAR_ERROR_INVALID);
    gear_config with_l = c.config, with_m = c.config;
    with_l.k.rank   = 2;
    with_m.k.center = 1;
    CHECK(pack(with_l, GEAR_SIDE_K) == GEAR_ERROR_INVALID);
    CHECK(pack(with_m, GEAR_SIDE_K) == GEAR_ERROR_INVALID);
    moment[5] = NAN;
    CHECK(pack(c.config, GEAR_SIDE_K) == GEAR_ERROR_INVALID);
}

// What a store learns: M of all the queries met, made anew when they have grown by half.
static void test_bases_learn() {
    gear_config config  = plain_config(2, 8);
    config.k.rotate     = 2;
    config.k.feedback   = 1;
    const int         d = 64, n = 64;
    const tile_layout layout = make_layout(config, GEAR_SIDE_K, d);
    head_bases        bases(layout);
    bases.reserve(2);
    const numbers one = gaussian(d, check::seed()), x = gaussian(256 * d, check::seed() + 1);
    const auto    meet = [&] { bases.observe(1, one.data(), n, 0, 1); }; // the same query again and again, whichever of them are noted
    CHECK(!bases.wants_feedback(1));
    meet();
    CHECK(bases.wants_feedback(1) && !bases.wants_feedback(0) && !bases.feedback(1));
    bases.decide(1, x.data(), nullptr);
    bases.renew_feedback(1);
    CHECK(!bases.wants_feedback(1) && bases.feedback(1) && !bases.feedback(0));
    std::vector<double> moment((size_t) d * d);
    for (int a = 0; a < d; ++a) {
        for (int b = 0; b < d; ++b) {
            moment[a * d + b] = (double) one[a] * one[b];
        }
    }
    numbers expected((size_t) d * d);
    choose_feedback(layout, bases.basis(1), moment.data(), expected.data());
    for (int i = 0; i < d * d; ++i) {
        CHECK_NEAR(bases.feedback(1)[i], expected[i], 1e-5 * (1 + std::fabs(expected[i])));
    }
    bases.observe(1, one.data(), 1, 0, 1);
    CHECK(!bases.wants_feedback(1));
    meet();
    CHECK(bases.wants_feedback(1));
    bases.forget();
    CHECK(!bases.feedback(1) && !bases.wants_feedback(1));
}

int main() {
    test_levels_agree();
    test_scores_err_less();
    test_white_queries();
    test_refused();
    test_bases_learn();
    return check::finish();
}
