// stored.cpp - the parts of a tile in their stored precision: see tile.h.

#include "codec/stored.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gear {

namespace {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Scale and zero
//
// A decoded tile codes to itself. zero is rounded down and scale up, the lowest value of a group takes a code rounded down and the highest one a code
// rounded up: so neither leaves, when decoded, the step of zero or scale that was stored for it. What is stored is the same again, bit for bit.
// ---------------------------------------------------------------------------------------------------------------------------------------------

// The least n in [fewest, most] for which value(n) reaches `high`, searched from an estimate.
template <class Value> int least_reaching(float high, float estimate, int fewest, int most, Value value) {
    int n = (int) std::min(std::max(estimate, (float) fewest), (float) most);
    while (n > fewest && value(n - 1) >= high) {
        --n;
    }
    while (n < most && value(n) < high) {
        ++n;
    }
    return n;
}

// The greatest n in [0, most] for which value(n) does not exceed `low`.
template <class Value> int greatest_within(float low, float estimate, int most, Value value) {
    int n = (int) std::min(std::max(estimate, 0.0f), (float) most);
    while (n > 0 && value(n) > low) {
        --n;
    }
    while (n < most && value(n + 1) <= low) {
        ++n;
    }
    return n;
}

// A group gets its range: low and high are its ends, which take the last code not above the one and the first code not below the other.
void store_range(const group_coder & coder, int group, group_range range, float low, float high, int levels) {
    const auto value     = [&](int code) { return range.zero + range.scale * (float) code; };
    coder.zero[group]    = range.zero;
    coder.scale[group]   = range.scale;
    coder.inverse[group] = 0;
    int first = 0, last = 0;
    if (range.scale > 0) {
        coder.inverse[group] = 1.0f / range.scale;
        first                = greatest_within(low, (low - range.zero) / range.scale, levels, value);
        last                 = least_reaching(high, (high - range.zero) / range.scale, first, levels, value);
    }
    coder.first[group] = (float) first;
    coder.last[group]  = (float) last;
}

// Scale and zero in f16: zero rounded down, scale up.
void code_range_16(const group_coder & coder, int group, int levels, uint8_t * scales, uint8_t * zeros) {
    const float low = coder.lowest[group], high = coder.highest[group];
    uint16_t    scale = 0, zero = 0;
    if (low == high) {
        zero = float_to_half(low);
    } else if (low < high) { // else the group has no values
        zero                = float_to_half_down(low);
        const float base    = half_to_float(zero);
        const int   finest  = std::max<int>(1, float_to_half_up(std::fabs(base) * 0x1p-20f)); // finer steps could not be told apart after adding zero
        const int   wanted  = float_to_half_up((high - base) / (float) levels);
        const int   largest = float_to_half(half_max);
        scale               = (uint16_t) least_reaching(high, (float) wanted, finest, largest,
                                                        [&](int half) { return base + half_to_float((uint16_t) half) * (float) levels; });
    }
    store_half(scales, group, scale);
    store_half(zeros, group, zero);
    store_range(coder, group, { half_to_float(scale), half_to_float(zero) }, low, high, levels);
}

// What the groups of a set share with scale_bits 8.
struct set_range {
    float lowest, highest; // of the set's values
    float lo, hi;          // as stored
    int   fewest;          // least s of a group with a spread

    float zero(int z) const { return lo + (hi - lo) * (float) z / 255.0f; } // z = 255 gives hi exactly
    float scale(int s, int levels) const { return (hi - lo) * (float) s / (float) (255 * levels); }
    // The set's own extremes are taken as what is stored for them.
    float snapped(float value) const { return value == lowest ? lo : value == highest ? hi : value; }
};

// lo and hi are whole multiples of the f16 spacing at the larger of them: their difference is then exact, with bits to spare for zero() and scale().
set_range make_set_range(float lowest, float highest, int levels) {
    if (!(lowest < highest)) { // one value, or none at all
        const float only = lowest == highest ? half_to_float(float_to_half(lowest)) : 0;
        return { lowest, highest, only, only, 1 };
    }
    // A decoded hi is zero + scale * levels and may have come out a few f32 roundings too high.
    const float forgiven = highest - std::max(std::fabs(lowest), std::fabs(highest)) * 0x1p-20f;
    const float larger   = std::max(std::fabs(half_to_float(float_to_half_down(lowest))), std::fabs(half_to_float(float_to_half_up(forgiven))));
    const float spacing  = std::ldexp(1.0f, std::max(std::ilogb(larger) - 10, -24));
    set_range   set      = { lowest, highest, std::floor(lowest / spacing) * spacing, std::ceil(forgiven / spacing) * spacing, 1 };
    if (set.lo < set.hi) { // steps finer than 1/1024 of the spacing, 8 roundings of f32, could not be told apart after adding zero
        set.fewest = std::max(1, (int) std::ceil((float) (255 * levels) * spacing / (1024.0f * (set.hi - set.lo))));
    }
    return set;
}

// Scale and zero in 8 bits each against the set's lo and hi: zero rounded down, scale up. Those of a range that is held go to the nearest instead: when
// new rows change lo and hi again and again, it moves to and fro by half a step, and does not widen each time.
void code_range_8(const set_range & set, const group_coder & coder, int group, int levels, uint8_t * scales, uint8_t * zeros) {
    const bool  is_empty = coder.lowest[group] > coder.highest[group];
    const float low = is_empty ? set.lo : set.snapped(coder.lowest[group]), high = is_empty ? set.lo : set.snapped(coder.highest[group]);
    int         s = 0, z = 0;
    if (set.lo < set.hi) {
        const float steps = 255.0f / (set.hi - set.lo);
        if (coder.held[group] != 0) {
            const int fewest = low < high ? set.fewest : 0;
            z                = (int) std::min(std::max(std::nearbyint((low - set.lo) * steps), 0.0f), (float) (255 - fewest));
            s                = (int) std::min(std::max(std::nearbyint((high - low) * steps), (float) fewest), (float) (255 - z));
        } else {
            z = greatest_within(low, (low - set.lo) * steps, low < high ? 255 - set.fewest : 255, [&](int n) { return set.zero(n); });
            if (low < high) {
                const float base = set.zero(z);
                s = least_reaching(high, (high - base) * steps, set.fewest, 255 - z, [&](int n) { return base + set.scale(n, levels) * (float) levels; });
            }
        }
    }
    scales[group] = (uint8_t) s;
    zeros[group]  = (uint8_t) z;
    store_range(coder, group, { set.scale(s, levels), set.zero(z) }, low, high, levels);
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

// ---------------------------------------------------------------------------------------------------------------------------------------------
// A and B: whole numbers in 8 or 4 bits, sigma is the product of their steps
// ---------------------------------------------------------------------------------------------------------------------------------------------

float limit_of(int factor_bits) {
    return factor_bits == 8 ? 127.0f : 7.0f;
}

float largest_magnitude(int n, const float * column) {
    float largest = 0;
    for (int i = 0; i < n; ++i) {
        largest = std::max(largest, std::fabs(column[i]));
    }
    return largest;
}

// A column of a factor in 8 or 4 bits: whole numbers from -limit to limit, whose step is largest / limit.
void store_column(int factor_bits, int n, const float * column, float largest, uint8_t * stored) {
    const float limit   = limit_of(factor_bits);
    const auto  rounded = [&](int i) { return largest > 0 ? (int) std::nearbyint(column[i] / largest * limit) : 0; };
    if (factor_bits == 8) {
        for (int i = 0; i < n; ++i) {
            stored[i] = (uint8_t) (int8_t) rounded(i);
        }
    } else {
        for (int i = 0; i < n / 2; ++i) {
            stored[i] = (uint8_t) ((rounded(i) + 8) | (rounded(i + n / 2) + 8) << 4);
        }
    }
}

void load_column(int factor_bits, int n, const uint8_t * stored, float step, float * column) {
    for (int i = 0; i < n; ++i) {
        const int half = i >= n / 2;
        column[i]      = step * (float) (factor_bits == 8 ? (int8_t) stored[i] : (stored[i - half * (n / 2)] >> 4 * half & 15) - 8);
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

group_range range_at(const tile_layout & layout, const uint8_t * tile, int group) {
    const gear_tile_layout & part = layout.part;
    if (layout.config.scale_bits == 16) {
        return { load_half(tile + part.scale, group), load_half(tile + part.zero, group) };
    }
    const int       i_set = layout.side == GEAR_SIDE_K ? group % part.n_set : group / layout.n_token;
    const set_range set   = { 0, 0, load_half(tile + part.lo, i_set), load_half(tile + part.hi, i_set), 1 };
    return { set.scale(tile[part.scale + group], layout.levels), set.zero(tile[part.zero + group]) };
}

void store_factors(const tile_layout & layout, const float * A, const float * B, uint8_t * tile) {
    const int   T = layout.n_token, d = layout.d_head, bits = layout.config.factor_bits;
    const float limit = limit_of(bits);
    for (int k = 0; k < layout.config.rank; ++k) {
        const float *a = A + (int64_t) k * T, *b = B + (int64_t) k * d;
        const float  largest_a = largest_magnitude(T, a), largest_b = largest_magnitude(d, b);
        const float  sigma = largest_a / limit * (largest_b / limit);
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
