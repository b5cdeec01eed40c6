#include "codec/basis.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

void head_bases::reserve(int n_head) {
    const size_t d = layout_.d_head;
    while ((int) heads_.size() < n_head) {
        head_state head;
        head.square.resize(d);
        if (layout_.config.feedback) {
            head.queries.emplace(layout_.d_head);
        }
        heads_.push_back(std::move(head));
    }
}

void head_bases::forget() {
    for (head_state & head : heads_) { // in place: a cache is cleared without new memory
        std::fill(head.square.begin(), head.square.end(), 0.0);
        head.n          = 0;
        head.scale      = 1;
        head.is_decided = false;
        head.basis.clear();
        head.weight.clear();
        if (head.queries) {
            head.queries->forget();
        }
    }
}

void head_bases::observe(int head, const float * q, int64_t n, int64_t stride, float scale) {
    if (head < (int) heads_.size() && heads_[head].queries) {
        heads_[head].queries->meet(q, n, stride);
        heads_[head].scale = scale; // a head whose basis came with a tile has met nothing before
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

const query_moment * head_bases::queries(int head) const {
    return head < (int) heads_.size() && heads_[head].queries ? &*heads_[head].queries : nullptr;
}

std::vector<uint8_t> head_bases::learned() const {
    std::vector<uint8_t> bytes;
    const bool           any = std::any_of(heads_.begin(), heads_.end(), [](const head_state & head) { return head.queries && head.queries->is_known(); });
    for (size_t head = 0; any && head < heads_.size(); ++head) {
        const query_moment & queries = *heads_[head].queries;
        bytes.resize(bytes.size() + sizeof(float) + queries.size_in_session());
        uint8_t * to = bytes.data() + bytes.size() - queries.size_in_session();
        memcpy(to - sizeof(float), &heads_[head].scale, sizeof(float));
        queries.get(to);
    }
    return bytes;
}

bool head_bases::learn_again(const std::vector<uint8_t> & bytes) {
    if (!layout_.config.feedback || heads_.empty() || bytes.size() != heads_.size() * (sizeof(float) + heads_[0].queries->size_in_session())) {
        return !layout_.config.feedback; // a cache that does without leaves it
    }
    const bool any = std::any_of(heads_.begin(), heads_.end(), [](const head_state & head) { return head.queries->is_known(); });
    for (size_t head = 0; !any && head < heads_.size(); ++head) {
        const uint8_t * from = bytes.data() + head * (bytes.size() / heads_.size());
        float           scale;
        memcpy(&scale, from, sizeof scale);
        if (!std::isfinite(scale) || !heads_[head].queries->put(from + sizeof scale)) {
            return false;
        }
        heads_[head].scale = scale;
    }
    return true;
}

double head_bases::score_square(int head, const float * e) const {
    const head_state & state = heads_[head];
    return (double) state.scale * state.scale * state.queries->mean_square(e);
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
