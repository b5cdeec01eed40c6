#include "codec/basis.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

namespace gear {

namespace {

constexpr int middle_exponent = 8, highest_exponent = 15;

// s_c^2: the mean square of what the written rows of a group lie off their mean. K's groups are of tokens; V's are not, and the tile is taken as one.
void spreads(const tile_layout & layout, const float * x, const uint8_t * written, double * square) {
    const int T = layout.n_token, d = layout.d_head, length = layout.side == GEAR_SIDE_K ? layout.group : T;
    int64_t   n_all = 0;
    std::fill(square, square + d, 0.0);
    for (int first = 0; first < T; first += length) {
        int64_t n               = 0;
        double  sum[max_d_head] = {}, power[max_d_head] = {};
        for (int t = first; t < first + length; ++t) {
            if (written && !written[t]) {
                continue;
            }
            ++n;
            for (int c = 0; c < d; ++c) {
                const double value = x[(int64_t) t * d + c];
                const double sound = std::isfinite(value) ? value : 0.0;
                sum[c] += sound;
                power[c] += sound * sound;
            }
        }
        for (int c = 0; c < d && n > 0; ++c) {
            square[c] += std::max(power[c] - sum[c] * sum[c] / (double) n, 0.0);
        }
        n_all += n;
    }
    for (int c = 0; c < d && n_all > 0; ++c) {
        square[c] /= (double) n_all;
    }
}

// Nothing is so small beside the largest that it decides alone.
void lift(int d, double * square) {
    const double least = *std::max_element(square, square + d) * 1e-9 + 1e-30;
    for (int c = 0; c < d; ++c) {
        square[c] = std::max(square[c], least);
    }
}

// H in f64, run by run (tile.h), in place.   x: d numbers, `stride` apart
void rotate(int d, int stride, double * x) {
    for (int first = 0, run = 0; first < d; first += run) {
        run             = rotation_run(d, first);
        const int block = run & -run;
        for (int half = 1; half < block; half *= 2) {
            for (int i = first; i < first + run; i += 2 * half) {
                for (int j = i; j < i + half; ++j) {
                    double &     a = x[(int64_t) j * stride], &b = x[(int64_t) (j + half) * stride];
                    const double sum = a + b, difference = a - b;
                    a = sum;
                    b = difference;
                }
            }
        }
        for (int i = first; i < first + run; ++i) {
            x[(int64_t) i * stride] /= std::sqrt((double) block);
        }
    }
}

// The share of E[q q^T] that its diagonal alone has a say in: queries to come are not those met. And what is added to G's diagonal, in shares of its mean.
constexpr double shrink = 0.3, damp = 0.05;

} // namespace

void load_weights(const uint8_t * basis, int d, float * w) {
    for (int c = 0; c < d; ++c) {
        w[c] = weight_of_channel(basis, d, c);
    }
}

void choose_basis(const tile_layout & layout, const float * x, const uint8_t * written, const double * query_square, uint8_t * basis) {
    const int d              = layout.d_head;
    double    s2[max_d_head] = {}, q2[max_d_head] = {}, ratio[max_d_head], sorted[max_d_head]; // ratio: log2(q / s)
    spreads(layout, x, written, s2);
    lift(d, s2);
    for (int c = 0; c < d; ++c) {
        q2[c] = query_square ? query_square[c] : 1 / s2[c];
    }
    lift(d, q2);
    for (int c = 0; c < d; ++c) {
        sorted[c] = ratio[c] = layout.config.feedback ? -0.7 * std::log2(s2[c]) : 0.5 * std::log2(q2[c] / s2[c]);
    }
    std::sort(sorted, sorted + d);
    std::fill(basis, basis + basis_bytes(d), 0);
    for (int c = 0; c < d; ++c) { // w = sqrt(q / s), with feedback s^-0.7, about the median
        const double exponent = middle_exponent + std::nearbyint(ratio[c] - sorted[d / 2]);
        const int    e        = (int) std::min(std::max(exponent, 0.0), (double) highest_exponent);
        basis[c % (d / 2)] |= (uint8_t) (c < d / 2 ? e : e << 4);
    }
}

void choose_feedback(const tile_layout & layout, const uint8_t * basis, const double * moment, float * feedback) {
    const int           d = layout.d_head;
    std::vector<double> G(moment, moment + (size_t) d * d);
    float               w[max_d_head];
    std::fill(w, w + d, 1.0f);
    if (layout.config.rotate == rotate_weighted) {
        load_weights(basis, d, w);
    }
    for (int i = 0; i < d; ++i) {
        for (int j = 0; j < d; ++j) {
            G[(size_t) i * d + j] *= (i == j ? 1 : 1 - shrink) / ((double) w[i] * w[j]);
        }
    }
    for (int i = 0; i < d && layout.config.rotate; ++i) { // H G H
        rotate(d, 1, &G[(size_t) i * d]);
    }
    for (int i = 0; i < d && layout.config.rotate; ++i) {
        rotate(d, d, &G[i]);
    }
    double trace = 0;
    for (int c = 0; c < d; ++c) {
        trace += G[(size_t) c * d + c];
    }
    for (int c = 0; c < d; ++c) {
        G[(size_t) c * d + c] += damp * trace / d + 1e-30;
    }
    // From the last channel on: its row over its p is M's, and G without what that says is the metric of those before.
    std::fill(feedback, feedback + (size_t) d * d, 0.0f);
    for (int c = d - 1; c >= 0; --c) {
        const double * row = &G[(size_t) c * d];
        const double   p   = row[c];
        if (!(p > 0)) { // of no moment of queries: rounded to the nearest
            continue;
        }
        for (int i = 0; i < c; ++i) {
            for (int j = 0; j <= i; ++j) {
                G[(size_t) i * d + j] -= row[i] * row[j] / p;
            }
        }
        for (int j = 0; j < c; ++j) {
            feedback[(size_t) c * d + j] = (float) (row[j] / p);
        }
    }
}

void head_bases::reserve(int n_head) {
    const size_t d = layout_.d_head;
    while ((int) heads_.size() < n_head) {
        head_state head;
        head.square.resize(d);
        if (layout_.config.feedback) {
            head.moment.resize(d * d);
            head.feedback.resize(d * d);
        }
        heads_.push_back(std::move(head));
    }
}

void head_bases::observe(int head, const float * q, int64_t n, int64_t stride, float scale) {
    if (layout_.config.feedback && head < (int) heads_.size()) {
        add_to_moment(heads_[head], q, n, stride);
    }
    if (!is_open(head)) {
        return;
    }
    head_state & state = heads_[head];
    for (int64_t i = 0; i < n; ++i) {
        const float * row = reinterpret_cast<const float *>(reinterpret_cast<uintptr_t>(q) + i * stride);
        for (int c = 0; c < layout_.d_head; ++c) {
            const double square = (double) row[c] * row[c];
            state.square[c] += std::isfinite(square) ? square : 0.0;
        }
    }
    state.n += n;
    state.scale = scale;
}

void head_bases::add_observed(int head, const double * square, int64_t n, float scale) {
    reserve(head + 1);
    if (!is_open(head)) {
        return;
    }
    head_state & state = heads_[head];
    std::transform(square, square + layout_.d_head, state.square.begin(), state.square.begin(), std::plus<double>());
    state.n += n;
    state.scale = scale;
}

// One in four will do, since queries of neighbouring tokens are alike and each costs d^2 / 2: which, is scattered, so that no query head is left out.
void head_bases::add_to_moment(head_state & state, const float * q, int64_t n, int64_t stride) {
    for (int64_t i = 0; i < n; ++i) {
        if ((uint32_t) state.n_met++ * 2654435761u >> 30 != 0) {
            continue;
        }
        const float * row = reinterpret_cast<const float *>(reinterpret_cast<uintptr_t>(q) + i * stride);
        double        sum = 0;
        for (int c = 0; c < layout_.d_head; ++c) {
            sum += (double) row[c] * row[c];
        }
        if (!std::isfinite(sum)) {
            continue;
        }
        for (int c = 0; c < layout_.d_head; ++c) {
            double * to = &state.moment[(size_t) c * layout_.d_head];
            for (int j = 0; j <= c; ++j) {
                to[j] += (double) row[c] * row[j];
            }
        }
        ++state.n_moment;
    }
}

size_t head_bases::feedback_bytes() const {
    size_t bytes = 0;
    for (const head_state & head : heads_) {
        bytes += head.moment.size() * sizeof(double) + head.feedback.size() * sizeof(float);
    }
    return bytes;
}

bool head_bases::wants_feedback(int head) const {
    return layout_.config.feedback && head < (int) heads_.size() && heads_[head].n_moment > 0 && 2 * heads_[head].n_moment >= 3 * heads_[head].n_fed;
}

void head_bases::renew_feedback(int head) {
    head_state & state = heads_[head];
    const size_t d     = layout_.d_head;
    if (layout_.config.rotate == rotate_weighted && state.basis.empty()) {
        return;
    }
    std::vector<double> mean(d * d);
    for (size_t c = 0; c < d; ++c) {
        for (size_t j = 0; j <= c; ++j) {
            mean[c * d + j] = mean[j * d + c] = state.moment[c * d + j] / (double) state.n_moment;
        }
    }
    choose_feedback(layout_, state.basis.empty() ? nullptr : state.basis.data(), mean.data(), state.feedback.data());
    state.n_fed = state.n_moment;
}

void head_bases::decide(int head, const float * x, const uint8_t * written) {
    reserve(head + 1);
    head_state & state = heads_[head];
    if (state.is_decided) {
        return;
    }
    std::vector<double> mean = state.square;
    for (double & square : mean) {
        square /= std::max<double>(1, (double) state.n);
    }
    const bool is_known = *std::max_element(mean.begin(), mean.end()) > 0;
    if (layout_.config.rotate == rotate_weighted && state.basis.empty()) {
        std::vector<uint8_t> basis(basis_bytes(layout_.d_head));
        choose_basis(layout_, x, written, is_known ? mean.data() : nullptr, basis.data());
        state.basis = std::move(basis);
    }
    if (is_known) {
        for (double & square : mean) {
            square *= (double) state.scale * state.scale;
        }
        state.weight = std::move(mean);
    }
    state.is_decided = true;
}

void head_bases::adopt(int head, const uint8_t * tile) {
    reserve(head + 1);
    if (layout_.part.basis >= 0 && heads_[head].basis.empty()) {
        heads_[head].basis.assign(tile + layout_.part.basis, tile + layout_.part.basis + basis_bytes(layout_.d_head));
    }
}

} // namespace gear
