// codec_tiles.h - what the codec's tests are written with: tiles to pack, and what comes back, through the C interface only.
#pragma once

#include "check.h"
#include "codec/codec.h"
#include "common/half.h"
#include "gearcpp.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <random>
#include <vector>

namespace codec_test {

using numbers = std::vector<float>;

// std::vector's own memory is aligned to 16 bytes only.
template <class T> struct aligned_allocator {
    using value_type    = T;
    aligned_allocator() = default;
    template <class U> aligned_allocator(const aligned_allocator<U> &) {}
    T *  allocate(size_t n) { return (T *) ::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T * memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
    bool operator==(const aligned_allocator &) const { return true; }
    bool operator!=(const aligned_allocator &) const { return false; }
};
using bytes = std::vector<uint8_t, aligned_allocator<uint8_t>>;

// The backbone alone: K groups of 32 tokens, V groups of the head.
inline gear_config plain_config(int bits, int scale_bits, int tile = 256) {
    gear_side_config side = {};
    side.bits             = bits;
    side.scale_bits       = scale_bits;
    side.factor_bits      = 8;
    side.rounds           = 1;
    side.clip             = 1;
    gear_config config    = { side, side, tile, 128, 4, 1 };
    config.k.group        = 32;
    return config;
}

struct tile_case;

// gear_tile_parts, and the tile that they describe.
struct tile_parts {
    std::vector<uint8_t> codes;
    numbers              scale, zero, a, b, mean, outlier_value;
    std::vector<int32_t> outlier_index;
    numbers              reconstruction(const tile_case & c) const;
};

// One configuration, side and head size.
struct tile_case {
    tile_case(const gear_config & config, gear_side side, int d_head) : config(config), side(side), layout(gear::make_layout(config, side, d_head)) {}

    int T() const { return layout.n_token; }
    int d() const { return layout.d_head; }
    int size() const { return T() * d(); }

    bytes pack(const numbers & x, const uint8_t * written = nullptr) const {
        bytes tile(layout.part.bytes, 0xa5); // whatever was there must not show
        CHECK(gear_tile_pack(&config, side, d(), x.data(), written, tile.data()) == GEAR_OK);
        return tile;
    }

    numbers unpack(const bytes & tile) const {
        numbers x(size(), NAN);
        CHECK(gear_tile_unpack(&config, side, d(), tile.data(), x.data()) == GEAR_OK);
        return x;
    }

    tile_parts parts(const bytes & tile) const {
        const int  r = layout.config.rank, n_outlier = layout.part.n_vector * layout.part.n_outlier;
        tile_parts p;
        p.codes.resize(size());
        p.scale.resize(layout.part.n_group);
        p.zero.resize(layout.part.n_group);
        p.a.resize(T() * r);
        p.b.resize(d() * r);
        p.mean.resize(d());
        p.outlier_value.resize(n_outlier);
        p.outlier_index.resize(n_outlier);
        CHECK(gear_tile_parts(&config, side, d(), tile.data(), p.codes.data(), p.scale.data(), p.zero.data(), p.a.data(), p.b.data(), p.mean.data(),
                              p.outlier_value.data(), p.outlier_index.data()) == GEAR_OK);
        return p;
    }

    gear_config       config;
    gear_side         side;
    gear::tile_layout layout;
};

inline numbers tile_parts::reconstruction(const tile_case & c) const {
    const int d = c.d(), r = c.layout.config.rank, n_outlier = c.layout.part.n_outlier;
    numbers   x(c.size());
    for (int i = 0; i < c.size(); ++i) {
        const int t = i / d, channel = i % d, g = group_of(c.layout, t, channel);
        float     low_rank = 0;
        for (int k = 0; k < r; ++k) {
            low_rank += a[t * r + k] * b[channel * r + k];
        }
        x[i] = zero[g] + scale[g] * (float) codes[i] + low_rank + mean[channel];
    }
    for (int i = 0; i < (int) outlier_index.size(); ++i) {
        const int vector = i / n_outlier, index = outlier_index[i];
        x[c.side == GEAR_SIDE_K ? index * d + vector : vector * d + index] = outlier_value[i];
    }
    return x;
}

template <class F> void for_each_side(F f) {
    f(GEAR_SIDE_K);
    f(GEAR_SIDE_V);
}

template <class F> void for_each_level(F f) {
    for (int i = 0; gear_simd_name(i); ++i) {
        printf("%s\n", gear_simd_name(i));
        CHECK(gear_simd_select(gear_simd_name(i)) == GEAR_OK);
        f();
    }
    gear_simd_select(nullptr);
}

template <class T> T one_of(std::mt19937 & random, std::initializer_list<T> values) {
    return values.begin()[random() % values.size()];
}

inline numbers gaussian(int n, uint32_t seed) {
    std::mt19937                    random(seed);
    std::normal_distribution<float> normal;
    numbers                         x(n);
    for (float & value : x) {
        value = normal(random);
    }
    return x;
}

// Channels of very different size and offset, and tokens that a few directions have in common, as in a real cache.
inline numbers cache_like(const tile_case & c, uint32_t seed) {
    const int     T = c.T(), d = c.d();
    const numbers noise = gaussian(T * d, seed), u = gaussian(T * 2, seed + 1000), v = gaussian(d * 2, seed + 2000);
    numbers       size = gaussian(d, seed + 3000), offset = gaussian(d, seed + 4000), x(T * d);
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < d; ++i) {
            x[t * d + i] = 3 * offset[i] + std::exp(size[i]) * noise[t * d + i] + 2 * u[t] * v[i] + u[T + t] * v[d + i];
        }
    }
    return x;
}

// Tiles whose ranges are hard to code: see the switch.
constexpr int n_kind = 9;

inline numbers hard_tile(const tile_case & c, int kind, uint32_t seed) {
    numbers      x = gaussian(c.size(), seed);
    std::mt19937 random(seed + 1);
    for (int i = 0; i < c.size(); ++i) {
        const int t = i / c.d(), channel = i % c.d();
        switch (kind) {
        case 0: // plain
            break;
        case 1: // heavy tails
            x[i] = x[i] * x[i] * x[i] * x[i] * x[i];
            break;
        case 2: // a large offset: the f16 spacing is coarse for the range
            x[i] += 1000;
            break;
        case 3: // larger still: the whole range is less than one f16 spacing
            x[i] = 1000.25f + 0.01f * x[i];
            break;
        case 4: // groups of very different ranges
            x[i] *= std::pow(4.0f, (float) ((t / 32 + channel / 32) % 7));
            break;
        case 5: // few values, each many times
            x[i] = std::nearbyint(2 * x[i]) * 0.37f;
            break;
        case 6: // every token or channel constant
            x[i] = (float) ((c.side == GEAR_SIDE_K ? channel + t / 32 : t) * 0.7317);
            break;
        case 7: // the edge of f16
            x[i] = 65504.0f * std::sin(x[i]);
            break;
        case 8: // below the normal range of f16
            x[i] *= 1e-7f;
            break;
        }
    }
    return x;
}

// For each value of a tile the largest magnitude among the values that share its scale set, [T, d].
inline numbers largest_of_sets(const tile_case & c, const numbers & x) {
    const bool is_k       = c.side == GEAR_SIDE_K;
    const bool all_tokens = is_k || c.layout.config.scale_bits == 8;
    const int  n_channel  = is_k ? 1 : c.layout.group; // of a set
    const auto set_of     = [&](int t, int channel) { return (all_tokens ? 0 : t) * c.d() + channel / n_channel; };
    numbers    of_set(x.size(), 0.0f), largest(x.size());
    for (int t = 0; t < c.T(); ++t) {
        for (int i = 0; i < c.d(); ++i) {
            float & found = of_set[set_of(t, i)];
            found         = std::max(found, std::fabs(x[t * c.d() + i]));
        }
    }
    for (int t = 0; t < c.T(); ++t) {
        for (int i = 0; i < c.d(); ++i) {
            largest[t * c.d() + i] = of_set[set_of(t, i)];
        }
    }
    return largest;
}

inline double energy(const numbers & x) {
    double sum = 0;
    for (const float value : x) {
        sum += (double) value * value;
    }
    return sum;
}

inline double squared_distance(const numbers & x, const numbers & y) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double difference = (double) x[i] - y[i];
        sum += difference * difference;
    }
    return sum;
}

// In decibels.
inline double signal_to_noise(const numbers & x, const numbers & xhat) {
    return 10 * std::log10(energy(x) / squared_distance(x, xhat));
}

} // namespace codec_test
