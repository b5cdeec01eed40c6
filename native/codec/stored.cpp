// stored.cpp - the parts of a tile in their stored precision: see tile.h.

#include "codec/stored.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gear {

namespace {

// A group gets its range, and the codes of its ends low and high.
void store_range(const group_coder & coder, int group, group_range range, float low, float high, int levels) {
    const end_codes ends = end_codes_of(range, low, high, levels);
    coder.zero[group]    = range.zero;
    coder.scale[group]   = range.scale;
    coder.inverse[group] = inverse_of(range.scale);
    coder.first[group]   = (float) ends.first;
    coder.last[group]    = (float) ends.last;
}

void code_range_16(const group_coder & coder, int group, int levels, uint8_t * scales, uint8_t * zeros) {
    const float        low = coder.lowest[group], high = coder.highest[group];
    const stored_range stored = round_range_16(low, high, levels);
    store_half(scales, group, stored.scale);
    store_half(zeros, group, stored.zero);
    store_range(coder, group, range_of_16(stored), low, high, levels);
}

void code_range_8(const set_range & set, const group_coder & coder, int group, int levels, uint8_t * scales, uint8_t * zeros) {
    const value_ends   ends   = set.ends_of(coder.lowest[group], coder.highest[group]);
    const stored_range stored = round_range_8(set, ends, levels, coder.held[group] != 0);
    scales[group]             = (uint8_t) stored.scale;
    zeros[group]              = (uint8_t) stored.zero;
    store_range(coder, group, set.range_of(stored, levels), ends.low, ends.high, levels);
}

// The groups of a set are every n_set-th one for K (token groups of a channel) and neighbours for V (tokens of a channel group).
void code_set_8(const tile_layout & layout, int i_set, const group_coder & coder, const uint8_t * old, uint8_t * tile) {
    const gear_tile_layout & part    = layout.part;
    const bool               is_k    = layout.side == GEAR_SIDE_K;
    const int                begin   = is_k ? i_set : i_set * layout.n_token;
    const int                end     = is_k ? part.n_group : begin + layout.n_token;
    const int                step    = is_k ? part.n_set : 1;
    float                    lowest  = old ? load_half(old + part.lo, i_set) : std::numeric_limits<float>::infinity();
    float                    highest = old ? load_half(old + part.hi, i_set) : -lowest;
    for (int group = begin; group < end; group += step) {
        lowest  = std::min(lowest, coder.lowest[group]);
        highest = std::max(highest, coder.highest[group]);
    }
    const set_range set = make_set_range(lowest, highest, layout.levels);
    store_half(tile + part.lo, i_set, float_to_half(set.lo));
    store_half(tile + part.hi, i_set, float_to_half(set.hi));
    for (int group = begin; group < end; group += step) {
        code_range_8(set, coder, group, layout.levels, tile + part.scale, tile + part.zero);
    }
}

float largest_magnitude(int n, const float * column) {
    float largest = 0;
    for (int i = 0; i < n; ++i) {
        largest = std::max(largest, std::fabs(column[i]));
    }
    return largest;
}

void store_column(int factor_bits, int n, const float * column, float largest, uint8_t * stored) {
    const float limit = factor_limit(factor_bits);
    const auto  code  = [&](int i) { return factor_code(column[i], largest, limit); };
    if (factor_bits == 8) {
        for (int i = 0; i < n; ++i) {
            stored[i] = (uint8_t) (int8_t) code(i);
        }
    } else {
        for (int i = 0; i < n / 2; ++i) {
            stored[i] = factor_nibbles(code(i), code(i + n / 2));
        }
    }
}

void load_column(int factor_bits, int n, const uint8_t * stored, float step, float * column) {
    for (int i = 0; i < n; ++i) {
        column[i] = step * (float) factor_entry(stored, factor_bits, n, i);
    }
}

} // namespace

void code_ranges(const tile_layout & layout, const group_coder & coder, const uint8_t * old, uint8_t * tile) {
    if (layout.config.scale_bits == 8) {
        for (int set = 0; set < layout.part.n_set; ++set) {
            code_set_8(layout, set, coder, old, tile);
        }
    } else {
        for (int group = 0; group < layout.part.n_group; ++group) {
            code_range_16(coder, group, layout.levels, tile + layout.part.scale, tile + layout.part.zero);
        }
    }
}

void code_channel_ranges(const tile_layout & layout, int c, const group_coder & coder, uint8_t * tile) {
    if (layout.config.scale_bits == 8) {
        code_set_8(layout, c, coder, nullptr, tile);
    } else {
        for (int group = c; group < layout.part.n_group; group += layout.d_head) {
            code_range_16(coder, group, layout.levels, tile + layout.part.scale, tile + layout.part.zero);
        }
    }
}

group_range range_at(const tile_layout & layout, const uint8_t * tile, int group) {
    const gear_tile_layout & part = layout.part;
    if (layout.config.scale_bits == 16) {
        return { load_half(tile + part.scale, group), load_half(tile + part.zero, group) };
    }
    const int       i_set = layout.side == GEAR_SIDE_K ? group % part.n_set : group / layout.n_token;
    const set_range set   = stored_set(load_half(tile + part.lo, i_set), load_half(tile + part.hi, i_set));
    return set.range_of({ tile[part.scale + group], tile[part.zero + group] }, layout.levels);
}

void store_factors(const tile_layout & layout, const float * A, const float * B, uint8_t * tile) {
    const int   T = layout.n_token, d = layout.d_head, bits = layout.config.factor_bits;
    const float limit = factor_limit(bits);
    for (int k = 0; k < layout.config.rank; ++k) {
        const float *a = A + (int64_t) k * T, *b = B + (int64_t) k * d;
        const float  largest_a = largest_magnitude(T, a), largest_b = largest_magnitude(d, b);
        const float  sigma = factor_sigma(largest_a, largest_b, limit);
        memcpy(tile + layout.part.sigma + 4 * k, &sigma, 4);
        store_column(bits, T, a, largest_a, tile + layout.part.a + (int64_t) k * T * bits / 8);
        store_column(bits, d, b, largest_b, tile + layout.part.b + (int64_t) k * d * bits / 8);
    }
}

void load_factors(const tile_layout & layout, const uint8_t * tile, float * A, float * B) {
    const int T = layout.n_token, d = layout.d_head, bits = layout.config.factor_bits;
    for (int k = 0; k < layout.config.rank; ++k) {
        float sigma;
        memcpy(&sigma, tile + layout.part.sigma + 4 * k, 4);
        load_column(bits, T, tile + layout.part.a + (int64_t) k * T * bits / 8, sigma, A + (int64_t) k * T);
        load_column(bits, d, tile + layout.part.b + (int64_t) k * d * bits / 8, 1.0f, B + (int64_t) k * d);
    }
}

} // namespace gear
