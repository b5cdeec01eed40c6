// Keys rounded by what their queries look at (codec/feedback.h): the same bytes on every level, a smaller error of scores, and tiles that keep
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

// M^T P M is the metric of what is coded: checked in f64, element by element, with P found from M.
static void test_factors() {
    std::mt19937 random(check::seed());
    for (const int d : { 32, 80, 128, 576 }) {
        gear_config config         = plain_config(2, 8);
        config.k.rotate            = 1;
        config.k.feedback          = feedback_always;
        const tile_layout   layout = make_layout(config, GEAR_SIDE_K, d);
        std::vector<double> moment = random_moment(d, 6, random);
        query_moment        queries(d);
        queries.set(moment.data());
        numbers M((size_t) d * d);
        choose_feedback(layout, pack_kernels_scalar, queries, nullptr, M.data());
        // G = H S H, S with its off-diagonal entries at 0.7 and 0.05 of its mean more on the diagonal
        numbers G((size_t) d * d);
        double  trace = 0;
        for (int a = 0; a < d; ++a) {
            for (int b = 0; b < d; ++b) {
                G[(size_t) a * d + b] = (float) (moment[(size_t) a * d + b] * (a == b ? 1 : 0.7));
            }
            hadamard(&G[(size_t) a * d], d);
            trace += moment[(size_t) a * d + a];
        }
        for (int b = 0; b < d; ++b) {
            numbers column(d);
            for (int a = 0; a < d; ++a) {
                column[a] = G[(size_t) a * d + b];
            }
            hadamard(column.data(), d);
            for (int a = 0; a < d; ++a) {
                G[(size_t) a * d + b] = column[a] + (a == b ? (float) (0.05 * trace / d) : 0.0f);
            }
        }
        std::vector<double> p(d);
        for (int c = d - 1; c >= 0; --c) {
            const auto of_those_behind = [&](int j) {
                double sum = 0;
                for (int i = c + 1; i < d; ++i) {
                    sum += (double) M[(size_t) i * d + c] * p[i] * M[(size_t) i * d + j];
                }
                return sum;
            };
            p[c] = G[(size_t) c * d + c] - of_those_behind(c);
            CHECK(p[c] > 0);
            for (int j = 0; j < c; ++j) {
                CHECK_NEAR(of_those_behind(j) + p[c] * M[(size_t) c * d + j], G[(size_t) c * d + j], 2e-3 * trace / d);
            }
        }
    }
}

// The moment is the mean over the queries noted, in f64, as long as none fades.
static void test_moment_is_met() {
    const int     d = 48, n = 3000;
    const numbers q = gaussian(n * d, check::seed()), mix = gaussian(d * d, check::seed() + 1);
    numbers       seen((size_t) n * d);
    for (int i = 0; i < n; ++i) { // correlated
        for (int c = 0; c < d; ++c) {
            seen[(size_t) i * d + c] = q[(size_t) i * d + c] + 0.3f * mix[c] * q[(size_t) i * d] + (c == 3 ? 40.0f : 0.0f);
        }
    }
    query_moment queries(d);
    CHECK(!queries.is_known());
    queries.meet(seen.data(), n, d * sizeof(float));
    CHECK(queries.is_known());
    numbers all((size_t) d * d);
    for (int a = 0; a < d; ++a) {
        for (int b = 0; b < d; ++b) {
            double sum = 0;
            for (int i = 0; i < n; ++i) {
                sum += (double) seen[(size_t) i * d + a] * seen[(size_t) i * d + b];
            }
            all[(size_t) a * d + b] = (float) (sum / n);
        }
    }
    for (int a = 0; a < d; ++a) { // one in eight makes a sample of 375
        const double spread = std::sqrt(all[(size_t) a * d + a]);
        CHECK_NEAR(queries.spread(a) / spread, 1, 0.25);
        for (int b = 0; b < a; ++b) {
            CHECK_NEAR(queries.correlation(a, b), all[(size_t) a * d + b] / (spread * std::sqrt(all[(size_t) b * d + b])), 0.25);
        }
    }
    query_moment row_by_row(d); // in pieces, by another stride, with queries between that are no numbers
    numbers      wide((size_t) n * 2 * d, NAN);
    for (int i = 0; i < n; ++i) {
        std::copy_n(&seen[(size_t) i * d], d, &wide[(size_t) i * 2 * d]);
    }
    for (int i = 0; i < n; i += 5) {
        row_by_row.meet(&wide[(size_t) i * 2 * d], 5, 2 * d * sizeof(float));
    }
    for (int a = 0; a < d; ++a) {
        CHECK_NEAR(row_by_row.spread(a), queries.spread(a), 1e-3 * queries.spread(a));
        for (int b = 0; b < a; ++b) {
            CHECK_NEAR(row_by_row.correlation(a, b), queries.correlation(a, b), 2e-3);
        }
    }
}

// The error that a store measures is that of the moment's scores.
static void test_mean_square() {
    std::mt19937 random(check::seed());
    for (const int d : { 32, 80, 256 }) {
        const std::vector<double> moment = random_moment(d, 5, random);
        query_moment              queries(d);
        queries.set(moment.data());
        const numbers e = gaussian(d, (uint32_t) random()), nothing(d);
        CHECK_NEAR(queries.mean_square(e.data()) / score_error(d, e, nothing, moment), 1, 2e-3);
        CHECK(queries.mean_square(nothing.data()) == 0);
    }
}

// Queries of another kind take over: what is old fades.
static void test_moment_fades() {
    const int     d = 32;
    query_moment  queries(d);
    const numbers one = gaussian(d, check::seed()), other = gaussian(d, check::seed() + 1);
    queries.meet(one.data(), 100000, 0);
    CHECK_NEAR(queries.spread(0), std::fabs(one[0]), 1e-4 * std::fabs(one[0]));
    queries.meet(other.data(), 100000, 0);
    for (int c = 0; c < d; ++c) {
        CHECK_NEAR(queries.spread(c), std::fabs(other[c]), 1e-3 + 0.05 * std::fabs(one[c]));
    }
    const numbers bad(d, INFINITY);
    const float   before = queries.spread(5);
    queries.meet(bad.data(), 1000, 0);
    CHECK(queries.spread(5) == before);
}

static void test_bases_learn() {
    gear_config config = plain_config(2, 8);
    config.k.rotate    = 2;
    for (const int feedback : { feedback_never, feedback_always, feedback_auto }) {
        config.k.feedback = feedback;
        head_bases bases(make_layout(config, GEAR_SIDE_K, 64));
        bases.reserve(2);
        const numbers q = gaussian(64 * 64, check::seed());
        bases.observe(1, q.data(), 64, 64 * sizeof(float), 1);
        CHECK((bases.queries(1) != nullptr) == (feedback != feedback_never));
        CHECK(bases.query_bytes() == (feedback == feedback_never ? 0 : 2 * query_moment::bytes_of(64)));
        if (feedback != feedback_never) {
            CHECK(bases.queries(1)->is_known() && !bases.queries(0)->is_known());
        }
        bases.forget();
        CHECK(!bases.queries(1) || !bases.queries(1)->is_known());
        CHECK(bases.query_bytes() == (feedback == feedback_never ? 0 : 2 * query_moment::bytes_of(64)));
    }
    config.k.feedback = feedback_auto; // goes without where it cannot be
    config.k.rank     = 2;
    CHECK(make_layout(config, GEAR_SIDE_K, 64).config.feedback == feedback_never);
    CHECK(make_layout(config, GEAR_SIDE_V, 64).config.feedback == feedback_never);
}

int main() {
    test_levels_agree();
    test_scores_err_less();
    test_white_queries();
    test_refused();
    test_factors();
    test_moment_is_met();
    test_moment_fades();
    test_mean_square();
    test_bases_learn();
    return check::finish();
}
