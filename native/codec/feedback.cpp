#include "codec/feedback.h"

#include "codec/basis.h"
#include "codec/codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace gear {

namespace {

constexpr int     n_block    = 8;    // queries noted at once
constexpr int64_t n_remember = 1024; // Queries noted of which one more counts as one: older ones fade. Measured: from 256 on it does not matter.

// The share of E[q q^T] that its diagonal alone has a say in: queries to come are not those met. And what is added to G's diagonal, in shares of its mean.
constexpr float shrink = 0.3f, damp = 0.05f;

// x to the nearest whole number, as long as that has 22 bits: a form that the compiler makes vectors of
float to_nearest(float x) {
    constexpr float round = 12582912.0f; // 1.5 * 2^23: adding it leaves no bits behind the point
    return (x + round) - round;
}

void transpose(int d, float * square) {
    constexpr int block = 16; // d is a multiple of it
    for (int i = 0; i < d; i += block) {
        for (int j = 0; j <= i; j += block) {
            for (int a = i; a < i + block; ++a) {
                for (int b = j; b < std::min(j + block, a); ++b) {
                    std::swap(square[(size_t) a * d + b], square[(size_t) b * d + a]);
                }
            }
        }
    }
}

// G f32 [d, d]: the metric of an error of y
void metric(const tile_layout & layout, const query_moment & queries, const float * w, float * G) {
    const int d = layout.d_head;
    float     scale[max_d_head];
    for (int c = 0; c < d; ++c) {
        scale[c] = layout.config.rotate == rotate_weighted ? queries.spread(c) / w[c] : queries.spread(c);
    }
    for (int c = 0; c < d; ++c) {
        float * row = G + (size_t) c * d;
        for (int j = 0; j < c; ++j) {
            row[j] = G[(size_t) j * d + c] = (1 - shrink) * queries.correlation(c, j) * scale[c] * scale[j];
        }
        row[c] = scale[c] * scale[c];
    }
    for (int turn = 0; turn < 2 && layout.config.rotate; ++turn) { // H G H: G H is symmetric to H G
        for (int c = 0; c < d; ++c) {
            hadamard(G + (size_t) c * d, d);
        }
        transpose(d, G);
    }
    float trace = 0;
    for (int c = 0; c < d; ++c) {
        trace += G[(size_t) c * d + c];
    }
    for (int c = 0; c < d; ++c) {
        G[(size_t) c * d + c] += damp * trace / (float) d + 1e-30f;
    }
}

} // namespace

void query_moment::meet(const float * q, int64_t n, int64_t stride) {
    const float * noted[n_block];
    int           n_here = 0;
    for (int64_t i = 0; i < n; ++i) {
        if ((uint32_t) n_met_++ * 2654435761u >> 29 != 0) { // which of eight, is scattered, so that no query head is left out
            continue;
        }
        const float * row = reinterpret_cast<const float *>(reinterpret_cast<uintptr_t>(q) + i * stride);
        float         sum = 0;
        for (int c = 0; c < d_; ++c) {
            sum += row[c] * row[c];
        }
        if (!std::isfinite(sum)) {
            continue;
        }
        noted[n_here++] = row;
        if (n_here == n_block) {
            note(n_here, noted);
            n_here = 0;
        }
    }
    if (n_here > 0) {
        note(n_here, noted);
    }
}

// The mean of q q^T over n more queries, in the form that is kept: spreads first, then the correlations under the new ones.
//   q: [n] rows of d
void query_moment::note(int n, const float * const * q) {
    const float share = (float) n / (float) (std::min(n_noted_, n_remember) + n); // of the new ones
    float       fade[max_d_head], u[n_block][max_d_head];                         // what is left of the old entries, and the new ones
    for (int c = 0; c < d_; ++c) {
        double square = 0;
        for (int i = 0; i < n; ++i) {
            square += (double) q[i][c] * q[i][c];
        }
        const float old = spread_[c];
        spread_[c]      = (float) std::sqrt((1 - share) * (double) old * old + share / n * square);
        const bool any  = spread_[c] > 1e-30f;
        fade[c]         = any ? std::sqrt(1 - share) * old / spread_[c] : 0;
        for (int i = 0; i < n; ++i) {
            u[i][c] = any ? std::sqrt(share / (float) n) * q[i][c] / spread_[c] : 0;
        }
    }
    int16_t * kept = correlation_.data();
    for (int c = 1; c < d_; kept += c, ++c) {
        float row[max_d_head];
        for (int j = 0; j < c; ++j) {
            row[j] = (float) kept[j] / correlation_unit * (fade[c] * fade[j]);
        }
        for (int i = 0; i < n; ++i) {
            const float factor = u[i][c];
            for (int j = 0; j < c; ++j) {
                row[j] += factor * u[i][j];
            }
        }
        for (int j = 0; j < c; ++j) {
            kept[j] = (int16_t) (int) to_nearest(std::min(std::max(row[j], -1.0f), 1.0f) * correlation_unit);
        }
    }
    n_noted_ += n;
}

void query_moment::forget() {
    std::fill(spread_.begin(), spread_.end(), 0.0f);
    std::fill(correlation_.begin(), correlation_.end(), (int16_t) 0);
    n_met_ = n_noted_ = 0;
}

void query_moment::set(const double * moment) {
    for (int c = 0; c < d_; ++c) {
        spread_[c] = (float) std::sqrt(std::max(moment[(size_t) c * d_ + c], 0.0));
    }
    int16_t * kept = correlation_.data();
    for (int c = 1; c < d_; kept += c, ++c) {
        for (int j = 0; j < c; ++j) {
            const double both = (double) spread_[c] * spread_[j];
            const double r    = both > 0 ? moment[(size_t) c * d_ + j] / both : 0;
            kept[j]           = (int16_t) std::lrint(std::min(std::max(r, -1.0), 1.0) * (double) correlation_unit);
        }
    }
    n_noted_ = n_remember;
}

void query_moment::get(uint8_t * out) const {
    const int64_t numbers[] = { n_met_, n_noted_ };
    out                     = std::copy_n(reinterpret_cast<const uint8_t *>(numbers), sizeof numbers, out);
    out                     = std::copy_n(reinterpret_cast<const uint8_t *>(spread_.data()), d_ * sizeof(float), out);
    std::copy_n(reinterpret_cast<const uint8_t *>(correlation_.data()), correlation_.size() * sizeof(int16_t), out);
}

bool query_moment::put(const uint8_t * in) {
    int64_t            numbers[2];
    std::vector<float> spread(d_);
    memcpy(numbers, in, sizeof numbers);
    memcpy(spread.data(), in + sizeof numbers, d_ * sizeof(float));
    const bool is_sound = numbers[0] >= 0 && numbers[1] >= 0 && std::all_of(spread.begin(), spread.end(), [](float s) { return s >= 0 && s < 1e15f; });
    if (is_sound) {
        n_met_   = numbers[0];
        n_noted_ = numbers[1];
        spread_  = std::move(spread);
        memcpy(correlation_.data(), in + sizeof numbers + d_ * sizeof(float), correlation_.size() * sizeof(int16_t));
    }
    return is_sound;
}

double query_moment::mean_square(const float * e) const {
    float  u[max_d_head];
    double sum = 0;
    for (int c = 0; c < d_; ++c) {
        u[c] = spread_[c] * e[c];
        sum += (double) u[c] * u[c];
    }
    const int16_t * kept = correlation_.data();
    for (int c = 1; c < d_; kept += c, ++c) {
        float of_those_before = 0;
        for (int j = 0; j < c; ++j) {
            of_those_before += (float) kept[j] * u[j];
        }
        sum += (double) (2 / correlation_unit) * u[c] * of_those_before;
    }
    return std::max(sum, 0.0); // rounded correlations may make it a little less than nothing
}

void choose_feedback(const tile_layout & layout, const pack_kernels & kernels, const query_moment & queries, const float * w, float * M) {
    const int d = layout.d_head;
    float     p[max_d_head], factor[max_d_head];
    metric(layout, queries, w, M);
    // From the last channel on: row c of G without what the channels behind it say, sum_{i > c} m_ic p_i m_ij, is p_c m_cj.
    for (int c = d - 1; c >= 0; --c) {
        float * row = M + (size_t) c * d;
        for (int i = c + 1; i < d; ++i) {
            factor[i - c - 1] = -(M[(size_t) i * d + c] * p[i]);
        }
        kernels.add_multiples((c + 16) / 16 * 16, d - 1 - c, factor, row + d, d, row);
        p[c] = std::max(row[c], 1e-30f);
        for (int j = 0; j < c; ++j) {
            row[j] /= p[c];
        }
        std::fill(row + c, row + d, 0.0f);
    }
}

} // namespace gear
