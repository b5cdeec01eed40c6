// ranges.h - the roundings of a packed tile, number by number: what is stored of a scale, a zero, a value and a factor. tile.h says what the bytes mean,
// codec.cpp and cuda/pack.cuh choose what is rounded and in which order.
//
// The CPU's code and the CUDA kernels both call these functions, and both are compiled without fused multiply-adds (CMakeLists.txt): so a tile comes out
// with the same bytes on both. pack_simd.h alone writes two of them again, as loops that the compiler makes vectors of: take_extremes and encode_row.
#pragma once

#include "codec/tile.h"
#include "common/half.h"
#include "common/host_device.h"

#include <math.h>

namespace gear {

constexpr float half_max      = 65504.0f; // largest f16
constexpr int   half_max_bits = 0x7bff;

// x, or the end of [low, high] that it is beyond. NaN stays.
GEAR_HD inline float limited(float x, float low, float high) {
    const float above = x < low ? low : x;
    return high < above ? high : above;
}

template <class T> GEAR_HD inline T greater_of(T a, T b) {
    return a < b ? b : a;
}

GEAR_HD inline float in_half_range(float x) {
    return limited(x, -half_max, half_max);
}

// Nothing that is not a number and nothing beyond f16 gets into a tile: NaN becomes 0. So does -0: which of the two zeros is the lower one would depend on
// the order in which they are looked at.
GEAR_HD inline float sanitized(float x) {
    return in_half_range((x == x ? x : 0.0f) + 0.0f);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Scale and zero
//
// A decoded tile codes to itself. zero is rounded down and scale up, the lowest value of a group takes a code rounded down and the highest one a code
// rounded up: so neither leaves, when decoded, the step of zero or scale that was stored for it. What is stored is the same again, bit for bit.
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Scale and zero of a group as f32.
struct group_range {
    float scale;
    float zero;
};

// The same as a tile stores them: f16, or 8 bits each against a set's extremes.
struct stored_range {
    uint16_t scale;
    uint16_t zero;
};

// The least n in [fewest, most] for which value(n) reaches `high`, searched from an estimate.
template <class Value> GEAR_HD inline int least_reaching(float high, float estimate, int fewest, int most, Value value) {
    int n = (int) limited(estimate, (float) fewest, (float) most);
    while (n > fewest && value(n - 1) >= high) {
        --n;
    }
    while (n < most && value(n) < high) {
        ++n;
    }
    return n;
}

// The greatest n in [0, most] for which value(n) does not exceed `low`.
template <class Value> GEAR_HD inline int greatest_within(float low, float estimate, int most, Value value) {
    int n = (int) limited(estimate, 0.0f, (float) most);
    while (n > 0 && value(n) > low) {
        --n;
    }
    while (n < most && value(n + 1) <= low) {
        ++n;
    }
    return n;
}

// Shrink a group's range about its middle.
GEAR_HD inline void clip_range(float clip, float & low, float & high) {
    if (low < high) {
        const float middle = 0.5f * (low + high), half = 0.5f * (high - low);
        low  = middle - half * clip;
        high = middle + half * clip;
    }
}

// Scale and zero in f16: zero rounded down, scale up.
GEAR_HD inline stored_range round_range_16(float low, float high, int levels) {
    if (low == high) {
        return { 0, float_to_half(low) };
    }
    if (!(low < high)) { // the group has no values
        return { 0, 0 };
    }
    const uint16_t zero   = float_to_half_down(low);
    const float    base   = half_to_float(zero);
    const int      finest = greater_of<int>(1, float_to_half_up(fabsf(base) * 0x1p-20f)); // finer steps could not be told apart after adding zero
    const int      wanted = float_to_half_up((high - base) / (float) levels);
    const int      scale =
        least_reaching(high, (float) wanted, finest, half_max_bits, [&](int half) { return base + half_to_float((uint16_t) half) * (float) levels; });
    return { (uint16_t) scale, zero };
}

GEAR_HD inline group_range range_of_16(stored_range stored) {
    return { half_to_float(stored.scale), half_to_float(stored.zero) };
}

// The lowest and the highest value of a group.
struct value_ends {
    float low, high;
};

// What the groups of a set share with scale_bits 8.
struct set_range {
    float lowest, highest; // of the set's values
    float lo, hi;          // as stored
    int   fewest;          // least s of a group with a spread

    GEAR_HD float       zero(int z) const { return lo + (hi - lo) * (float) z / 255.0f; } // z = 255 gives hi exactly
    GEAR_HD float       scale(int s, int levels) const { return (hi - lo) * (float) s / (float) (255 * levels); }
    // The set's own extremes are taken as what is stored for them, and a group without values as lo.
    GEAR_HD float       snapped(float value) const { return value == lowest ? lo : value == highest ? hi : value; }
    GEAR_HD value_ends  ends_of(float low, float high) const { return low > high ? value_ends{ lo, lo } : value_ends{ snapped(low), snapped(high) }; }
    GEAR_HD group_range range_of(stored_range stored, int levels) const { return { scale(stored.scale, levels), zero(stored.zero) }; }
};

// The set of a tile that is read: only lo and hi are known, and only they are needed.
GEAR_HD inline set_range stored_set(float lo, float hi) {
    return { 0, 0, lo, hi, 1 };
}

// lo and hi are whole multiples of the f16 spacing at the larger of them: their difference is then exact, with bits to spare for zero() and scale().
GEAR_HD inline set_range make_set_range(float lowest, float highest, int levels) {
    if (!(lowest < highest)) { // one value, or none at all
        const float only = lowest == highest ? half_to_float(float_to_half(lowest)) : 0;
        return { lowest, highest, only, only, 1 };
    }
    // A decoded hi is zero + scale * levels and may have come out a few f32 roundings too high.
    const float forgiven = highest - greater_of(fabsf(lowest), fabsf(highest)) * 0x1p-20f;
    const float larger   = greater_of(fabsf(half_to_float(float_to_half_down(lowest))), fabsf(half_to_float(float_to_half_up(forgiven))));
    const float spacing  = ldexpf(1.0f, greater_of(ilogbf(larger) - 10, -24));
    set_range   set      = { lowest, highest, floorf(lowest / spacing) * spacing, ceilf(forgiven / spacing) * spacing, 1 };
    if (set.lo < set.hi) { // steps finer than 1/1024 of the spacing, 8 roundings of f32, could not be told apart after adding zero
        set.fewest = greater_of(1, (int) ceilf((float) (255 * levels) * spacing / (1024.0f * (set.hi - set.lo))));
    }
    return set;
}

// Scale and zero in 8 bits each against the set's lo and hi: zero rounded down, scale up. Those of a range that is held go to the nearest instead: when
// new rows change lo and hi again and again, it moves to and fro by half a step, and does not widen each time.
//   ends: of set.ends_of
GEAR_HD inline stored_range round_range_8(const set_range & set, value_ends ends, int levels, bool is_held) {
    if (!(set.lo < set.hi)) {
        return { 0, 0 };
    }
    const float low = ends.low, high = ends.high, steps = 255.0f / (set.hi - set.lo);
    if (is_held) {
        const int   fewest = low < high ? set.fewest : 0;
        const float z      = limited(nearbyintf((low - set.lo) * steps), 0.0f, (float) (255 - fewest));
        const float s      = limited(nearbyintf((high - low) * steps), (float) fewest, 255.0f - z);
        return { (uint16_t) s, (uint16_t) z };
    }
    const int z = greatest_within(low, (low - set.lo) * steps, low < high ? 255 - set.fewest : 255, [&](int n) { return set.zero(n); });
    int       s = 0;
    if (low < high) {
        const float base = set.zero(z);
        s = least_reaching(high, (high - base) * steps, set.fewest, 255 - z, [&](int n) { return base + set.scale(n, levels) * (float) levels; });
    }
    return { (uint16_t) s, (uint16_t) z };
}

// The choice for a group of K that holds kept rows and gets new ones: to keep the old range, which cuts off what the new rows have beyond it, or to widen
// it to the new one, which rounds the kept rows once more. Whichever adds the smaller squared error: a code rounded to the nearest has one of step^2 / 12.
// Without this a few new rows, again and again, would wear down the many that stay.
struct range_choice {
    float old_low, old_high, old_rounding; // of the range that the kept rows were coded with
    float low, high, rounding;             // of the wider one
    float cut, widened;                    // the errors of the two, summed up

    GEAR_HD void add(float y, bool is_kept) {
        const float beyond_old = y < old_low ? old_low - y : y > old_high ? y - old_high : 0.0f; // a kept row's, too, where it was an outlier
        const float beyond     = y < low ? low - y : y > high ? y - high : 0.0f;                 // a configuration may clip
        cut += beyond_old * beyond_old + (is_kept ? 0.0f : old_rounding);
        widened += beyond * beyond + rounding;
    }
    GEAR_HD bool is_cut() const { return cut <= widened; }
};

GEAR_HD inline range_choice make_range_choice(float old_low, float old_high, float low, float high, int levels) {
    const float old_step = (old_high - old_low) / (float) levels, step = (high - low) / (float) levels;
    return { old_low, old_high, old_step * old_step / 12.0f, low, high, step * step / 12.0f, 0, 0 };
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Codes
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Codes of a group's ends: the last code not above its lowest value and the first code not below its highest one.
struct end_codes {
    int first, last;
};

GEAR_HD inline end_codes end_codes_of(group_range range, float low, float high, int levels) {
    if (!(range.scale > 0)) {
        return { 0, 0 };
    }
    const auto value = [&](int code) { return range.zero + range.scale * (float) code; };
    const int  first = greatest_within(low, (low - range.zero) / range.scale, levels, value);
    return { first, least_reaching(high, (high - range.zero) / range.scale, first, levels, value) };
}

GEAR_HD inline float inverse_of(float scale) {
    return scale > 0 ? 1.0f / scale : 0.0f;
}

// What lies between a group's ends takes the nearest code, ties to even.
GEAR_HD inline int nearest_code(float y, float zero, float inverse, int levels) {
    return (int) limited(nearbyintf((y - zero) * inverse), 0.0f, (float) levels); // the zero of a held range may lie above y
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// A and B: whole numbers in 8 or 4 bits, sigma is the product of their steps
// ---------------------------------------------------------------------------------------------------------------------------------------------

GEAR_HD inline float factor_limit(int factor_bits) {
    return factor_bits == 8 ? 127.0f : 7.0f;
}

// An entry of a column as a whole number from -limit to limit.   largest: the column's largest magnitude
GEAR_HD inline int factor_code(float entry, float largest, float limit) {
    return largest > 0 ? (int) nearbyintf(entry / largest * limit) : 0;
}

// Byte i of a column of n entries with 4 bits: entries i and i + n / 2.
GEAR_HD inline uint8_t factor_nibbles(int low, int high) {
    return (uint8_t) ((low + 8) | (high + 8) << 4);
}

// Entry i of a stored column of n, in steps.
GEAR_HD inline int factor_entry(const uint8_t * column, int factor_bits, int n, int i) {
    if (factor_bits == 8) {
        return (int8_t) column[i];
    }
    const int half = i >= n / 2;
    return (column[i - half * (n / 2)] >> 4 * half & 15) - 8;
}

GEAR_HD inline float factor_sigma(float largest_a, float largest_b, float limit) {
    return largest_a / limit * (largest_b / limit);
}

// Number i of the power iteration's start, close to normal and the same on every machine: a sum of four uniform numbers (splitmix64).
GEAR_HD inline float start_number(uint32_t seed, int i) {
    uint64_t bits = (uint64_t) seed + (uint64_t) (i + 1) * 0x9e3779b97f4a7c15u;
    bits          = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits          = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    return (float) ((int) (bits & 0xffff) + (int) (bits >> 16 & 0xffff) + (int) (bits >> 32 & 0xffff) + (int) (bits >> 48) - 2 * 0xffff) / 65536.0f;
}

// A column that is nothing but rounding after those before it were taken out of it becomes zero: what its entries are multiplied with.
//   before, after: squared lengths
GEAR_HD inline float column_factor(float before, float after) {
    return after > 1e-10f * before && after > 1e-30f ? 1.0f / sqrtf(after) : 0.0f;
}

} // namespace gear
