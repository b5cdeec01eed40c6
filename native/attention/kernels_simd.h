// kernels_simd.h - the kernels of attention for any vector level. A level's source file defines a struct V, its vectors and what they can do, in an
// unnamed namespace (so that no two files share an instantiation) and takes its table from kernels_for<V>. It is one file of more than 500 lines, because
// every level compiles all of it, and what is instantiated nowhere else can be checked in one place.
//
// Exact where the scalar reference is, but for one thing: the 8-bit products. The numbers x_i scale_gi of a row are counted in steps, whole parts of the
// largest of them, and rounded: to one signed byte (q) or one unsigned byte (p, which is never negative) where that adds little to the error of the codes
// themselves, else to 16 bits, w = 256 * high + low with high and low signed bytes. The bytes meet the codes in the instruction that multiplies bytes.
//
// A level has, with `lanes` numbers of 32 bits to a vector:
//     floats, ints, bytes        vectors of f32, s32, and 4 bytes to a lane
//     load, store, set, add, sub, mul, div, fma (a * b + c), min, max, magnitude, round
//     first, sum, highest, sum4                    of a vector: its first number, all added up, the largest; the sums of four vectors at once
//     load_half, set_half, load_u8, load_s8        f16 and bytes as f32
//     mul_power(x, n)                              x * 2^n for whole n in -160..127; 0 where that is below the normal numbers
//     load_bytes, set_byte, both, either, shift_right<n>    on codes; bits that leave their byte are masked away by the caller
//     zero_ints, dot, join, to_floats              dot<bits, positive>(sum[2], first[4], second[4], weight): four quads of depth for two halves of a lane
//                                                  block, the weights being unsigned bytes or signed ones; join: 256 * high + low
//     to_bytes, split                              64 numbers times scale, rounded to bytes, or to high and low bytes; to_bytes adds them to a total, too
//     n_weight                                     rows of bytes that one pass over the codes serves
//     n_row                                        rows that one pass over exact rows serves, four keys or four vectors of channels at a time
#pragma once

#include "attention/kernels.h"

#include <string.h>

namespace gear {

// log2(e), and ln(2) as a number of few bits plus the rest, so that x - n ln(2) is exact enough.
constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;

constexpr float exp_series[]    = { 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f }; // after 1 / 720
constexpr float lowest_exponent = -110.0f;                                               // its exp is 0
constexpr float minus_infinity  = -__builtin_inff();

template <class V> struct kernels_for {
    using floats = typename V::floats;
    using ints   = typename V::ints;
    using bytes  = typename V::bytes;

    static constexpr int lanes = V::lanes;

    template <int n> struct constant {
        static constexpr int value = n;
    };

    // Call f with the largest constant n <= most that is at most available; returns n.
    template <int most, class F> static int for_some(int available, F && f) {
        if constexpr (most > 1) {
            if (available < most) {
                return for_some<most - 1>(available, f);
            }
        }
        f(constant<most>{});
        return most;
    }

    // ---------------------------------------------------------------------------------------------------------------------------------------------
    // Preparation
    // ---------------------------------------------------------------------------------------------------------------------------------------------

    // scale_bits 8: zero = lo + (hi - lo) z / 255, scale = (hi - lo) s / 255 / levels. K has lo and hi per depth, V per lane group.
    static void prepare_ranges8(const prepared_tile & p) {
        const tile_layout & layout  = *p.layout;
        const bool          is_k    = layout.side == GEAR_SIDE_K;
        const int           n_depth = layout.part.n_depth, stride = p.depth_stride();
        const uint16_t *    lo = (const uint16_t *) (p.tile + layout.part.lo), *hi = (const uint16_t *) (p.tile + layout.part.hi);
        const uint8_t *     s = p.tile + layout.part.scale, *z = p.tile + layout.part.zero;
        const floats        level = V::set(1.0f / layout.levels), unit = V::set(1.0f / 255);
        const int n_range = is_k ? 1 : p.n_lane_group(), n_group = is_k ? p.n_lane_group() : 1; // of ranges, and of lane groups with the same range
        float *   scale = p.scale, *zero = p.zero;
        for (int range = 0; range < n_range; ++range) {
            for (int i = 0; i < n_depth; i += lanes) {
                const floats low  = is_k ? V::load_half(lo + i) : V::set_half(lo[range]);
                const floats high = is_k ? V::load_half(hi + i) : V::set_half(hi[range]);
                const floats step = V::mul(V::sub(high, low), unit), code_step = V::mul(step, level);
                for (int group = range; group < range + n_group; ++group) {
                    V::store(scale + group * stride + i, V::mul(code_step, V::load_u8(s + group * n_depth + i)));
                    V::store(zero + group * stride + i, V::fma(step, V::load_u8(z + group * n_depth + i), low));
                }
            }
        }
    }

    static void prepare_ranges16(const prepared_tile & p) {
        const tile_layout & layout  = *p.layout;
        const int           n_depth = layout.part.n_depth, stride = p.depth_stride(), n_group = p.n_lane_group();
        const uint16_t *    s = (const uint16_t *) (p.tile + layout.part.scale), *z = (const uint16_t *) (p.tile + layout.part.zero);
        for (int group = 0; group < n_group; ++group) {
            for (int i = 0; i < n_depth; i += lanes) {
                V::store(p.scale + group * stride + i, V::load_half(s + group * n_depth + i));
                V::store(p.zero + group * stride + i, V::load_half(z + group * n_depth + i));
            }
        }
    }

    // One column of A or B as numbers.
    static void prepare_column(const uint8_t * column, int n, int bits, float sigma, float * factor) {
        const floats unit = V::set(sigma);
        if (bits == 8) {
            for (int i = 0; i < n; i += lanes) {
                V::store(factor + i, V::mul(unit, V::load_s8(column + i)));
            }
            return;
        }
        int i = 0;
        for (; i + lanes <= n / 2; i += lanes) { // two to a byte, 16 high + low; high is what rounding byte / 16 - 15 / 32 gives
            const floats byte = V::load_u8(column + i);
            const floats high = V::round(V::fma(byte, V::set(1.0f / 16), V::set(-15.0f / 32)));
            const floats low  = V::fma(high, V::set(-16), byte);
            V::store(factor + i, V::mul(unit, V::sub(low, V::set(8))));
            V::store(factor + n / 2 + i, V::mul(unit, V::sub(high, V::set(8))));
        }
        for (; i < n / 2; ++i) {
            factor[i]         = sigma * (float) ((column[i] & 15) - 8);
            factor[n / 2 + i] = sigma * (float) ((column[i] >> 4) - 8);
        }
    }

    static void prepare_factors(const prepared_tile & p) {
        const tile_layout & layout = *p.layout;
        const int           T = layout.n_token, d = layout.d_head, bits = layout.config.factor_bits;
        for (int k = 0; k < layout.config.rank; ++k) {
            float sigma;
            memcpy(&sigma, p.tile + layout.part.sigma + 4 * k, sizeof sigma);
            prepare_column(p.tile + layout.part.a + k * T * bits / 8, T, bits, sigma, p.A + k * T);
            prepare_column(p.tile + layout.part.b + k * d * bits / 8, d, bits, 1, p.B + k * d);
        }
        if (layout.config.center) {
            float *          one = p.A + layout.config.rank * T, *channel_mean = p.B + layout.config.rank * d;
            const uint16_t * mean = (const uint16_t *) (p.tile + layout.part.mean);
            for (int i = 0; i < T; i += lanes) {
                V::store(one + i, V::set(1));
            }
            for (int i = 0; i < d; i += lanes) {
                V::store(channel_mean + i, V::load_half(mean + i));
            }
        }
    }

    static void prepare(const prepared_tile & p) {
        // Numbers of p are read once: the stores below might change them, for all that the compiler knows.
        const int n_depth = p.layout->part.n_depth, stride = p.depth_stride(), n_group = p.n_lane_group();
        float *   scale = p.scale, *zero = p.zero, *widest = p.widest, *square = p.square;
        p.layout->config.scale_bits == 8 ? prepare_ranges8(p) : prepare_ranges16(p);
        for (int group = 0; group < n_group; ++group) {
            for (int i = n_depth; i < stride; ++i) {
                scale[group * stride + i] = zero[group * stride + i] = 0.0f;
            }
        }
        const floats mean = V::set(1.0f / n_group);
        for (int i = 0; i < stride; i += lanes) {
            floats largest = V::load(scale + i), power = V::mul(largest, largest);
            for (int group = 1; group < n_group; ++group) {
                const floats other = V::load(scale + group * stride + i);
                largest            = V::max(largest, other);
                power              = V::fma(other, other, power);
            }
            V::store(widest + i, largest);
            V::store(square + i, V::mul(power, mean));
        }
        prepare_factors(p);
        prepare_outliers(p);
    }

    // ---------------------------------------------------------------------------------------------------------------------------------------------
    // Products with codes
    // ---------------------------------------------------------------------------------------------------------------------------------------------

    // n rows of x in steps of their own, and as bytes against the codes of a lane group: y = step * (sum + constant). With two bytes to a number a
    // row's high ones come before its low ones.
    template <int n_byte, int n> struct weights {
        alignas(64) uint8_t byte[n_byte * n][max_depth];
        alignas(64) float x[n][max_depth];
        float step[n], constant[n];
    };

    // Into how many bytes the numbers of some rows go. A row has one step for all lane groups.
    struct rounding {
        int   n_byte;
        float top[slice_rows]; // the largest magnitude of x times scale
    };

    template <bool positive> static constexpr int byte_levels = positive ? 255 : 127;

    // Two signed bytes hold 127 * 256; over more than 512 depths codes of 7 bits leave room for less in a sum of 32 bits.
    static int two_byte_levels(const prepared_tile & p) {
        const int most = INT32_MAX / (p.layout->levels * p.layout->part.n_depth);
        return most < 127 * 256 ? most : 127 * 256;
    }

    // Two products of such a byte and a code fit in 16 signed bits, which AVX2's instruction needs.
    template <bool positive> static constexpr int most_bits_of_bytes = positive ? 6 : 7;

    // The squared error of a product: a code's error is uniform within a step, that is x^2 scale^2 / 12 for each depth; a byte's is uniform within a
    // step of x and meets a code's distance from the middle, levels^2 / 16 on average, that is step^2 / 12 * levels^2 / 16 for each depth. One byte will
    // do where the second is at most the allowed share of the first in every row.
    template <bool positive> static rounding choose_rounding(const prepared_tile & p, const const_rows & x) {
        const float ratio = (float) p.layout->levels / byte_levels<positive>, spread = ratio * ratio * p.layout->part.n_depth / 16;
        rounding    r;
        r.n_byte = p.layout->config.bits <= most_bits_of_bytes<positive> ? 1 : 2;
        for (int i = 0; i < x.n; ++i) {
            floats largest = V::set(0), power = V::set(0);
            for (int depth = 0; depth < p.depth_stride(); depth += lanes) {
                const floats value = V::load(x.row(i) + depth);
                largest            = V::max(largest, V::magnitude(V::mul(value, V::load(p.widest + depth))));
                power              = V::fma(V::mul(value, value), V::load(p.square + depth), power);
            }
            r.top[i] = V::highest(largest);
            if (r.top[i] * r.top[i] * spread > p.rounding * V::sum(power)) {
                r.n_byte = 2;
            }
        }
        return r;
    }

    // A step of x is the largest number's part by so many levels.
    template <int n_byte, int n>
    static void round_to_steps(const prepared_tile & p, const const_rows & x, const float * top, int levels, weights<n_byte, n> & w) {
        for (int i = 0; i < n; ++i) {
            const bool any       = top[i] > 1e-30f; // all zero: any step will do
            w.step[i]            = any ? top[i] / levels : 1.0f;
            const floats inverse = V::set(any ? levels / top[i] : 1.0f);
            for (int depth = 0; depth < p.depth_stride(); depth += lanes) {
                V::store(w.x[i] + depth, V::mul(V::load(x.row(i) + depth), inverse));
            }
        }
    }

    // Bytes of x * scale for one lane group. The constant is x . zero; with one byte it is x . (the middle code's value) less what the bytes give for that
    // code, so that an error of theirs counts by a code's distance from the middle only.
    template <bool positive, int n_byte, int n> static void weigh(const prepared_tile & p, int group, weights<n_byte, n> & w) {
        constexpr int n_vector = depth_padding / lanes;
        const float * scale    = p.scale + group * p.depth_stride();
        const float * zero     = p.zero + group * p.depth_stride();
        const floats  middle   = V::set(n_byte == 1 ? 0.5f * p.layout->levels : 0.0f);
        floats        constant[(n + 3) / 4 * 4];
        ints          total[n];
        for (auto & sum : constant) {
            sum = V::set(0);
        }
        for (auto & sum : total) {
            sum = V::zero_ints();
        }
        for (int depth = 0; depth < p.depth_stride(); depth += depth_padding) {
            floats value[n_vector];
            for (int j = 0; j < n_vector; ++j) {
                value[j] = V::fma(middle, V::load(scale + depth + lanes * j), V::load(zero + depth + lanes * j));
            }
#pragma GCC unroll 8
            for (int i = 0; i < n; ++i) {
                for (int j = 0; j < n_vector; ++j) {
                    constant[i] = V::fma(V::load(w.x[i] + depth + lanes * j), value[j], constant[i]);
                }
                if constexpr (n_byte == 1) {
                    V::template to_bytes<positive>(w.x[i] + depth, scale + depth, w.byte[i] + depth, total[i]);
                } else {
                    V::split(w.x[i] + depth, scale + depth, w.byte[2 * i] + depth, w.byte[2 * i + 1] + depth);
                }
            }
        }
        for (int i = 0; i < n; ++i) {
            constant[i] = V::sub(constant[i], V::mul(middle, V::to_floats(total[i])));
        }
        for (int i = 0; i < n; i += 4) {
            float four[4];
            V::sum4(constant + i, four);
            memcpy(w.constant + i, four, (n - i < 4 ? n - i : 4) * sizeof(float));
        }
    }

    // One bit plane's part of the codes of a quad (of four) and half. lines: the plane's lines of the four quads.
    template <int width, int position, int quad, int half> static bytes field(const bytes * lines) {
        constexpr int shift = width * (2 * (quad % (4 / width)) + half) - position;
        return V::both(V::template shift_right<shift>(lines[quad / (4 / width)]), V::set_byte(((1 << width) - 1) << position));
    }

    template <int bits, int quad, int half> static bytes code(const bytes * plane4, const bytes * plane2, const bytes * plane1) {
        if constexpr (bits == 1) {
            return field<1, 0, quad, half>(plane1);
        } else if constexpr (bits == 2) {
            return field<2, 0, quad, half>(plane2);
        } else if constexpr (bits == 4) {
            return field<4, 0, quad, half>(plane4);
        } else if constexpr (bits < 4) {
            return V::either(code<2, quad, half>(plane4, plane2, plane1), field<1, 2, quad, half>(plane1));
        } else if constexpr (bits == 5) {
            return V::either(code<4, quad, half>(plane4, plane2, plane1), field<1, 4, quad, half>(plane1));
        } else if constexpr (bits == 6) {
            return V::either(code<4, quad, half>(plane4, plane2, plane1), field<2, 4, quad, half>(plane2));
        } else {
            return V::either(code<6, quad, half>(plane4, plane2, plane1), field<1, 6, quad, half>(plane1));
        }
    }

    // The lines that four quads of depth take in a plane: as many as its width.
    template <int width> static void load_lines(bytes * lines, const uint8_t * plane, int quads) {
        for (int i = 0; i < width; ++i) {
            lines[i] = V::load_bytes(plane + 64 * (quads * width + i));
        }
    }

    // Fetch a piece of the next tile, a little more than is read of this one in a step. Its scales come first, though they lie last: they are read first.
    template <int bits> __attribute__((always_inline)) static void fetch_ahead(const prepared_tile & p, int step) {
        const int64_t piece = 64 * (bits + 1) * (int64_t) step;
        if (piece < p.n_next) {
#pragma GCC unroll 8
            for (int64_t i = piece; i < piece + 64 * (bits + 1); i += 64) {
                __builtin_prefetch(p.next + (p.next_first + i < p.n_next ? p.next_first + i : p.next_first + i - p.n_next), 0, 2);
            }
        }
    }

    // Where the planes of one lane block start; of those that a code of `bits` has.
    struct block_planes {
        const uint8_t * plane4;
        const uint8_t * plane2;
        const uint8_t * plane1;
    };

    static block_planes planes_of(const prepared_tile & p, int lane_block) {
        block_planes planes = {};
        for (int i = 0; i < p.layout->n_plane; ++i) {
            const plane_info & plane = p.layout->plane[i];
            const uint8_t *    start = p.tile + plane.offset + (int64_t) 64 * lane_block * (p.layout->part.n_depth / 4 / plane.per_line);
            (plane.width == 4 ? planes.plane4 : plane.width == 2 ? planes.plane2 : planes.plane1) = start;
        }
        return planes;
    }

    // y[0..32) of n rows += their products with the codes of one lane block.
    template <int bits, bool positive, int n_byte, int n>
    static void multiply_block(const prepared_tile & p, int lane_block, const weights<n_byte, n> & w, const rows & y) {
        const block_planes planes = planes_of(p, lane_block);
        const int          n_step = p.layout->part.n_depth / 16;
        for (int piece = 0; piece < 16 / lanes; ++piece) {
            const int offset = 4 * lanes * piece;
            ints      sum[n_byte * n][2];
            for (auto & pair : sum) {
                pair[0] = pair[1] = V::zero_ints();
            }
            for (int quads = 0; quads < n_step; ++quads) {
                fetch_ahead<bits>(p, lane_block * n_step + quads);
                bytes line4[4], line2[2], line1[1];
                if constexpr (bits & 4) {
                    load_lines<4>(line4, planes.plane4 + offset, quads);
                }
                if constexpr (bits & 2) {
                    load_lines<2>(line2, planes.plane2 + offset, quads);
                }
                if constexpr (bits & 1) {
                    load_lines<1>(line1, planes.plane1 + offset, quads);
                }
                const bytes first[4]  = { code<bits, 0, 0>(line4, line2, line1), code<bits, 1, 0>(line4, line2, line1),
                                          code<bits, 2, 0>(line4, line2, line1), code<bits, 3, 0>(line4, line2, line1) };
                const bytes second[4] = { code<bits, 0, 1>(line4, line2, line1), code<bits, 1, 1>(line4, line2, line1),
                                          code<bits, 2, 1>(line4, line2, line1), code<bits, 3, 1>(line4, line2, line1) };
#pragma GCC unroll 16
                for (int i = 0; i < n_byte * n; ++i) {
                    V::template dot<bits, positive && n_byte == 1>(sum[i], first, second, w.byte[i] + 16 * quads);
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < n; ++i) {
                const floats step = V::set(w.step[i]), constant = V::set(w.constant[i]);
                for (int half = 0; half < 2; ++half) {
                    float *      to    = y.row(i) + 16 * half + lanes * piece;
                    const floats total = V::to_floats(n_byte == 1 ? sum[i][half] : V::join(sum[n_byte * i][half], sum[n_byte * i + n_byte - 1][half]));
                    V::store(to, V::fma(V::add(total, constant), step, V::load(to)));
                }
            }
        }
    }

    template <int bits, bool positive, int n_byte, int n>
    static void multiply_codes(const prepared_tile & p, const float * top, const const_rows & x, int first_lane, int last_lane, const rows & y) {
        weights<n_byte, n> w;
        round_to_steps(p, x, top, n_byte == 2 ? two_byte_levels(p) : byte_levels<positive>, w);
        for (int lane = first_lane; lane < last_lane;) {
            const int group = lane / p.layout->group;
            weigh<positive>(p, group, w);
            for (; lane < last_lane && lane < (group + 1) * p.layout->group; lane += lane_padding) {
                multiply_block<bits, positive>(p, lane / lane_padding, w, { y.data + lane, y.stride });
            }
        }
    }

    template <int bits, bool positive>
    static void multiply_bits(const prepared_tile & p, const const_rows & x, int first_lane, int last_lane, const rows & y) {
        const rounding r = choose_rounding<positive>(p, x);
        for (int i = 0; i < x.n;) {
            const const_rows part          = { x.row(i), x.stride, x.n - i };
            const rows       to            = { y.row(i), y.stride };
            const auto       multiply_part = [&](auto n_byte, auto n) {
                multiply_codes<bits, positive, decltype(n_byte)::value, decltype(n)::value>(p, r.top + i, part, first_lane, last_lane, to);
            };
            if constexpr (bits <= most_bits_of_bytes<positive>) {
                if (r.n_byte == 1) {
                    i += for_some<V::n_weight>(part.n, [&](auto n) { multiply_part(constant<1>{}, n); });
                    continue;
                }
            }
            i += for_some<V::n_weight / 2>(part.n, [&](auto n) { multiply_part(constant<2>{}, n); });
        }
    }

    static void multiply_factors(const prepared_tile & p, const const_rows & x, int first_lane, int last_lane, const rows & y) {
        const int n_lane = last_lane < p.n_lane() ? last_lane : p.n_lane();
        for (int k = 0; k < p.layout->config.rank + p.layout->config.center; ++k) {
            const float *depth_factor = p.depth_factor(k), *lane_factor = p.lane_factor(k);
            for (int i = 0; i < x.n; ++i) {
                floats dot = V::set(0);
                for (int depth = 0; depth < p.layout->part.n_depth; depth += lanes) {
                    dot = V::fma(V::load(x.row(i) + depth), V::load(depth_factor + depth), dot);
                }
                const floats multiple = V::set(V::sum(dot));
                for (int lane = first_lane; lane < n_lane; lane += lanes) {
                    V::store(y.row(i) + lane, V::fma(multiple, V::load(lane_factor + lane), V::load(y.row(i) + lane)));
                }
            }
        }
    }

    static void multiply(const prepared_tile & p, const const_rows & x, int first_lane, int last_lane, const rows & y) {
        using product                         = void (*)(const prepared_tile &, const const_rows &, int, int, const rows &);
        // p is never negative.
        static constexpr product k_by_bits[8] = { nullptr,
                                                  nullptr,
                                                  multiply_bits<2, false>,
                                                  multiply_bits<3, false>,
                                                  multiply_bits<4, false>,
                                                  multiply_bits<5, false>,
                                                  multiply_bits<6, false>,
                                                  multiply_bits<7, false> };
        static constexpr product v_by_bits[8] = { nullptr,
                                                  nullptr,
                                                  multiply_bits<2, true>,
                                                  multiply_bits<3, true>,
                                                  multiply_bits<4, true>,
                                                  multiply_bits<5, true>,
                                                  multiply_bits<6, true>,
                                                  multiply_bits<7, true> };
        (p.layout->side == GEAR_SIDE_K ? k_by_bits : v_by_bits)[p.layout->config.bits](p, x, first_lane, last_lane, y);
        multiply_factors(p, x, first_lane, last_lane, y);
        if (p.layout->part.n_outlier > 0) {
            multiply_outliers(p, x, y);
        }
    }

    // ---------------------------------------------------------------------------------------------------------------------------------------------
    // Products with exact rows
    // ---------------------------------------------------------------------------------------------------------------------------------------------

    // Rows lie far apart in the store, beyond what the processor foresees: fetch one that is read `rows_ahead` rows later, n_byte bytes of it.
    static constexpr int rows_ahead = 8;

    // Inlined early, or GCC finds a function without effect and drops the calls.
    __attribute__((always_inline)) static void fetch_row(const exact_rows & from, int j, int c, int n_byte) {
        if (j + rows_ahead < from.n) {
            for (int i = 0; i < n_byte; i += 64) {
                __builtin_prefetch((const char *) (from.row[j + rows_ahead] + c) + i);
            }
        }
    }

    // n rows of q with four keys from j on; keys past the end are the last one again and not stored.
    template <int n> static void score_block(const exact_rows & k, int j, int d, const const_rows & q, const rows & scores) {
        floats           sum[n][4];
        const uint16_t * key[4];
        for (int i = 0; i < 4; ++i) {
            key[i] = k.row[j + i < k.n ? j + i : k.n - 1];
            fetch_row(k, j + i, 0, 2 * d);
        }
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
            sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = V::set(0);
        }
        for (int c = 0; c < d; c += lanes) {
            const floats part[4] = { V::load_half(key[0] + c), V::load_half(key[1] + c), V::load_half(key[2] + c), V::load_half(key[3] + c) };
#pragma GCC unroll 8
            for (int i = 0; i < n; ++i) {
                const floats value = V::load(q.row(i) + c);
#pragma GCC unroll 4
                for (int key_index = 0; key_index < 4; ++key_index) {
                    sum[i][key_index] = V::fma(value, part[key_index], sum[i][key_index]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
            float four[4];
            V::sum4(sum[i], four);
            for (int key_index = 0; key_index < 4 && j + key_index < k.n; ++key_index) {
                scores.row(i)[k.token[j + key_index]] = four[key_index];
            }
        }
    }

    template <int n> static void score_rows(const exact_rows & k, int d, const const_rows & q, const rows & scores) {
        for (int j = 0; j < k.n; j += 4) {
            score_block<n>(k, j, d, q, scores);
        }
    }

    static void exact_scores(const exact_rows & k, int d, const const_rows & q, const rows & scores) {
        for (int i = 0; i < q.n;) {
            const const_rows part = { q.row(i), q.stride, q.n - i };
            const rows       to   = { scores.row(i), scores.stride };
            i += for_some<V::n_row>(part.n, [&](auto n) { score_rows<decltype(n)::value>(k, d, part, to); });
        }
    }

    // n rows of p, n_vector vectors of channels from c on.
    template <int n, int n_vector> static void output_block(const exact_rows & v, int c, const const_rows & p, const rows & out) {
        floats sum[n][n_vector];
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
#pragma GCC unroll 4
            for (int part = 0; part < n_vector; ++part) {
                sum[i][part] = V::load(out.row(i) + c + lanes * part);
            }
        }
        for (int j = 0; j < v.n; ++j) {
            fetch_row(v, j, c, 2 * lanes * n_vector);
            floats value[n_vector];
#pragma GCC unroll 4
            for (int part = 0; part < n_vector; ++part) {
                value[part] = V::load_half(v.row[j] + c + lanes * part);
            }
#pragma GCC unroll 8
            for (int i = 0; i < n; ++i) {
                const floats weight = V::set(p.row(i)[v.token[j]]);
#pragma GCC unroll 4
                for (int part = 0; part < n_vector; ++part) {
                    sum[i][part] = V::fma(weight, value[part], sum[i][part]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
#pragma GCC unroll 4
            for (int part = 0; part < n_vector; ++part) {
                V::store(out.row(i) + c + lanes * part, sum[i][part]);
            }
        }
    }

    template <int n> static void output_rows(const exact_rows & v, int d, const const_rows & p, const rows & out) {
        int c = 0;
        for (; c + 4 * lanes <= d; c += 4 * lanes) {
            output_block<n, 4>(v, c, p, out);
        }
        for (; c < d; c += lanes) {
            output_block<n, 1>(v, c, p, out);
        }
    }

    static void exact_output(const exact_rows & v, int d, const const_rows & p, const rows & out) {
        for (int i = 0; i < p.n;) {
            const const_rows part = { p.row(i), p.stride, p.n - i };
            const rows       to   = { out.row(i), out.stride };
            i += for_some<V::n_row>(part.n, [&](auto n) { output_rows<decltype(n)::value>(v, d, part, to); });
        }
    }

    // ---------------------------------------------------------------------------------------------------------------------------------------------
    // Softmax
    // ---------------------------------------------------------------------------------------------------------------------------------------------

    // e^x for x <= 88, 0 for x < -104: x = n ln(2) + r, e^r by its Taylor series up to r^6, |r| <= ln(2) / 2.
    static floats exp(floats x) {
        const floats bounded = V::max(x, V::set(lowest_exponent)); // -inf would make r NaN
        const floats n       = V::round(V::mul(bounded, V::set(log2_e)));
        const floats r       = V::fma(n, V::set(-ln2_low), V::fma(n, V::set(-ln2_high), bounded));
        floats       series  = V::set(1.0f / 720);
        for (const float coefficient : exp_series) {
            series = V::fma(series, r, V::set(coefficient));
        }
        return V::mul_power(series, n);
    }

    // 1 - 2 / (e^2x + 1)
    static floats tanh(floats x) {
        const floats e = exp(V::min(V::add(x, x), V::set(40)));
        return V::sub(V::set(1), V::div(V::set(2), V::add(e, V::set(1))));
    }

    // slope * mask for cells t .. t + lanes, -inf for cells past n.
    static floats bias_at(const uint16_t * mask, int t, int n, float slope) {
        if (t + lanes <= n) {
            return mask ? V::mul(V::set(slope), V::load_half(mask + t)) : V::set(0);
        }
        uint16_t rest[lanes] = {};
        float    bias[lanes];
        if (mask) {
            memcpy(rest, mask + t, (n - t) * sizeof(uint16_t));
        }
        V::store(bias, V::mul(V::set(slope), V::load_half(rest)));
        for (int i = n - t; i < lanes; ++i) {
            bias[i] = minus_infinity;
        }
        return V::load(bias);
    }

    static float softmax(float * scores, int n, float softcap, const uint16_t * mask, float slope, softmax_state & state) {
        for (int t = n; t % lanes != 0; ++t) {
            scores[t] = 0;
        }
        floats highest = V::set(minus_infinity);
        for (int t = 0; t < n; t += lanes) {
            const floats score = V::load(scores + t);
            const floats logit = V::add(softcap != 0 ? V::mul(V::set(softcap), tanh(score)) : score, bias_at(mask, t, n, slope));
            V::store(scores + t, logit);
            highest = V::max(highest, logit);
        }
        const float top = V::highest(highest);
        if (top == minus_infinity) { // all hidden: -inf - -inf would be NaN
            memset(scores, 0, n * sizeof(float));
            return 1.0f;
        }
        const float max    = top > state.max ? top : state.max;
        const float factor = max > state.max ? V::first(exp(V::set(state.max - max))) : 1.0f;
        floats      sum    = V::set(0);
        for (int t = 0; t < n; t += lanes) {
            const floats p = exp(V::sub(V::load(scores + t), V::set(max)));
            V::store(scores + t, p);
            sum = V::add(sum, p);
        }
        state = { max, state.sum * factor + V::sum(sum) };
        return factor;
    }

    static void rescale(float * x, int n, float factor) {
        for (int i = 0; i < n; i += lanes) {
            V::store(x + i, V::mul(V::load(x + i), V::set(factor)));
        }
    }

    static constexpr attention_kernels table = { prepare, multiply, exact_scores, exact_output, softmax, rescale };
};

} // namespace gear
