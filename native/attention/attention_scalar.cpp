// attention_scalar.cpp - the kernels as the formulas say them. The fast levels are tested against this file.
#include "attention/kernels.h"
#include "codec/codec.h"
#include "common/half.h"

#include <algorithm>
#include <cmath>

namespace gear {

// S restores the value itself: what D (its zero, the code being 0) and L give there is taken back.
void prepare_outliers(const prepared_tile & p) {
    const tile_layout & layout    = *p.layout;
    const int           n_outlier = layout.part.n_outlier, rank = layout.config.rank, stride = p.depth_stride();
    for (int depth = 0; n_outlier > 0 && depth < layout.part.n_vector; ++depth) {
        const uint16_t * value = (const uint16_t *) (p.tile + layout.part.outlier_value) + depth * n_outlier;
        int              lane[max_depth];
        float *          outlier = p.outlier + depth * n_outlier;
        for (int i = 0; i < n_outlier; ++i) {
            lane[i]    = outlier_index_at(layout, p.tile, depth * n_outlier + i);
            outlier[i] = half_to_float(value[i]) - p.zero[lane[i] / layout.group * stride + depth];
        }
        for (int k = 0; k < rank; ++k) {
            const float   factor      = p.depth_factor(k)[depth];
            const float * lane_factor = p.lane_factor(k);
            for (int i = 0; i < n_outlier; ++i) {
                outlier[i] -= factor * lane_factor[lane[i]];
            }
        }
    }
}

void multiply_outliers(const prepared_tile & p, const const_rows & x, const rows & y) {
    const int n_vector = p.layout->part.n_vector, n_outlier = p.layout->part.n_outlier;
    int       lane[max_depth];
    for (int depth = 0; depth < n_vector; ++depth) {
        const float * outlier = p.outlier + depth * n_outlier;
        for (int j = 0; j < n_outlier; ++j) {
            lane[j] = outlier_index_at(*p.layout, p.tile, depth * n_outlier + j);
        }
        for (int i = 0; i < x.n; ++i) {
            const float factor = x.row(i)[depth];
            float *     sum    = y.row(i);
            for (int j = 0; j < n_outlier; ++j) {
                sum[lane[j]] += factor * outlier[j];
            }
        }
    }
}

namespace {

// K: lanes are tokens, depths are channels. V: the other way round.
int token_of(const tile_layout & layout, int lane, int depth) {
    return layout.side == GEAR_SIDE_K ? lane : depth;
}

int channel_of(const tile_layout & layout, int lane, int depth) {
    return layout.side == GEAR_SIDE_K ? depth : lane;
}

void prepare(const prepared_tile & p) {
    const tile_layout & layout = *p.layout;
    const int           stride = p.depth_stride();
    for (int group = 0; group < p.n_lane_group(); ++group) {
        for (int depth = 0; depth < stride; ++depth) {
            const int         lane  = group * layout.group;
            const bool        real  = depth < layout.part.n_depth;
            const group_range range = real ? range_of(layout, p.tile, token_of(layout, lane, depth), channel_of(layout, lane, depth)) : group_range{};
            p.scale[group * stride + depth] = range.scale;
            p.zero[group * stride + depth]  = range.zero;
        }
    }
    if (layout.config.rank > 0) {
        load_factors(layout, p.tile, p.A, p.B);
    }
    if (layout.config.center) {
        const uint16_t * mean = (const uint16_t *) (p.tile + layout.part.mean);
        const int        k    = layout.config.rank;
        std::fill_n(p.A + k * layout.n_token, layout.n_token, 1.0f);
        std::transform(mean, mean + layout.d_head, p.B + k * layout.d_head, half_to_float);
    }
    prepare_outliers(p);
}

// D: the codes of one lane, then one dot product per row.
void multiply_codes(const prepared_tile & p, const const_rows & x, int first_lane, int last_lane, const rows & y) {
    const tile_layout & layout  = *p.layout;
    const int           n_depth = layout.part.n_depth, stride = p.depth_stride();
    float               code[max_depth];
    for (int lane = first_lane; lane < std::min(last_lane, p.n_lane()); ++lane) {
        const float * scale = p.scale + lane / layout.group * stride;
        const float * zero  = p.zero + lane / layout.group * stride;
        for (int depth = 0; depth < n_depth; ++depth) {
            code[depth] = code_of(layout, p.tile, token_of(layout, lane, depth), channel_of(layout, lane, depth));
        }
        for (int i = 0; i < x.n; ++i) {
            float sum = 0;
            for (int depth = 0; depth < n_depth; ++depth) {
                sum += x.row(i)[depth] * (zero[depth] + scale[depth] * code[depth]);
            }
            y.row(i)[lane] += sum;
        }
    }
}

// L and M: one dot product per row and factor, then that multiple of the lane factor.
void multiply_factors(const prepared_tile & p, const const_rows & x, int first_lane, int last_lane, const rows & y) {
    for (int k = 0; k < p.n_factor(); ++k) {
        for (int i = 0; i < x.n; ++i) {
            float dot = 0;
            for (int depth = 0; depth < p.layout->part.n_depth; ++depth) {
                dot += x.row(i)[depth] * p.depth_factor(k)[depth];
            }
            for (int lane = first_lane; lane < std::min(last_lane, p.n_lane()); ++lane) {
                y.row(i)[lane] += dot * p.lane_factor(k)[lane];
            }
        }
    }
}

void multiply(const prepared_tile & p, const const_rows & x, int first_lane, int last_lane, const rows & y) {
    multiply_codes(p, x, first_lane, last_lane, y);
    multiply_factors(p, x, first_lane, last_lane, y);
    multiply_outliers(p, x, y);
}

void exact_scores(const exact_rows & k, int d, const const_rows & q, const rows & scores) {
    for (int j = 0; j < k.n; ++j) {
        for (int i = 0; i < q.n; ++i) {
            float sum = 0;
            for (int c = 0; c < d; ++c) {
                sum += q.row(i)[c] * half_to_float(k.row[j][c]);
            }
            scores.row(i)[k.token[j]] = sum;
        }
    }
}

void exact_output(const exact_rows & v, int d, const const_rows & p, const rows & out) {
    for (int j = 0; j < v.n; ++j) {
        for (int i = 0; i < p.n; ++i) {
            for (int c = 0; c < d; ++c) {
                out.row(i)[c] += p.row(i)[v.token[j]] * half_to_float(v.row[j][c]);
            }
        }
    }
}

float softmax(float * scores, int n, float softcap, const uint16_t * mask, float slope, softmax_state & state) {
    float highest = -INFINITY;
    for (int t = 0; t < n; ++t) {
        scores[t] = (softcap != 0 ? softcap * std::tanh(scores[t]) : scores[t]) + (mask ? slope * half_to_float(mask[t]) : 0.0f);
        highest   = std::max(highest, scores[t]);
    }
    if (highest == -INFINITY) { // all hidden: exp(-inf - -inf) would be NaN
        std::fill(scores, scores + n, 0.0f);
        return 1.0f;
    }
    const float max    = std::max(highest, state.max);
    const float factor = std::exp(state.max - max);
    float       sum    = 0;
    for (int t = 0; t < n; ++t) {
        scores[t] = std::exp(scores[t] - max);
        sum += scores[t];
    }
    state = { max, state.sum * factor + sum };
    return factor;
}

void rescale(float * x, int n, float factor) {
    std::transform(x, x + n, x, [=](float value) { return value * factor; });
}

} // namespace

const attention_kernels attention_kernels_scalar = { prepare, multiply, exact_scores, exact_output, softmax, rescale };

} // namespace gear
