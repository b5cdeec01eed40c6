// pack_simd.h - the inner loops of packing, written so that the compiler makes vectors of them: fixed widths, no branches, no calls. One source for every
// vector level; each level's .cpp includes it and is compiled with that level's flags (CMakeLists.txt).
//
// Everything here is in an unnamed namespace, and nothing inline of another header is called: the linker keeps one copy of such a function for all files,
// and that copy could be the one made for a processor that this is not.
//
// The sums and roundings are those of codec.cpp and ranges.h, in the same order: the results are equal bit for bit. The codes go through two small forms:
//     strip   codes [n_row][n_column] of some tokens: 32 tokens for K, 16 for V; as many lines of the planes as hold these tokens are written from it
//     brick   32 lanes x 16 depths in the order of the lines: 8 blocks (4 quads x 2 halves) of 64 bytes
#pragma once

#include "codec/kernels.h"

namespace gear {

namespace {

constexpr int n_block = 8, block_bytes = 64, quad_depths = 16;

struct brick {
    uint8_t block[n_block][block_bytes];
};

struct strip_shape {
    bool is_k;
    int  n_row;    // tokens
    int  n_column; // channels; V: with the padding lanes
    int  n_brick;  // bricks of a strip
};

strip_shape shape_of(const tile_layout & layout) {
    const bool is_k = layout.side == GEAR_SIDE_K;
    return is_k ? strip_shape{ true, 32, layout.d_head, layout.d_head / quad_depths }
                : strip_shape{ false, quad_depths, layout.part.n_lane, layout.part.n_lane / 32 };
}

constexpr int max_strip = 32 * max_d_head;

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Codes and bit planes
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Where the codes of a block lie in a strip: 16 lanes x 4 depths.
//     K: lane = row, depth = column: 16 rows of 4 bytes        V: lane = column, depth = row: 4 rows of 16 bytes
int first_code(const strip_shape & strip, int i_brick, int block) {
    const int quad = block / 2, half = block % 2;
    return strip.is_k ? 16 * half * strip.n_column + quad_depths * i_brick + 4 * quad : 4 * quad * strip.n_column + 32 * i_brick + 16 * half;
}

void load_codes(const strip_shape & strip, const uint8_t * codes, int i_brick, brick & out) {
    for (int b = 0; b < n_block; ++b) {
        const uint8_t * from = codes + first_code(strip, i_brick, b);
        for (int lane = 0; lane < 16; ++lane) {
            for (int j = 0; j < 4; ++j) {
                out.block[b][4 * lane + j] = strip.is_k ? from[lane * strip.n_column + j] : from[j * strip.n_column + lane];
            }
        }
    }
}

void scatter(const strip_shape & strip, const brick & in, int i_brick, uint8_t * codes) {
    for (int b = 0; b < n_block; ++b) {
        uint8_t * to = codes + first_code(strip, i_brick, b);
        for (int lane = 0; lane < 16; ++lane) {
            for (int j = 0; j < 4; ++j) {
                (strip.is_k ? to[lane * strip.n_column + j] : to[j * strip.n_column + lane]) = in.block[b][4 * lane + j];
            }
        }
    }
}

// First line of a brick in a plane. A brick has 4 / per_line lines, one behind the other.
int64_t first_line(const tile_layout & layout, const plane_info & plane, const strip_shape & strip, int i_strip, int i_brick) {
    const int lane_block = strip.is_k ? i_strip : i_brick, quads = strip.is_k ? i_brick : i_strip; // quads: in fours
    return (int64_t) lane_block * (layout.part.n_depth / 4 / plane.per_line) + quads * 4 / plane.per_line;
}

void write_lines(const plane_info & plane, const brick & in, uint8_t * lines) {
    const int per_line = 2 * plane.per_line, mask = (1 << plane.width) - 1; // blocks of a line
    for (int line = 0; line < n_block / per_line; ++line) {
        uint8_t sum[block_bytes] = {};
        for (int b = 0; b < per_line; ++b) {
            const uint8_t * block = in.block[line * per_line + b];
            for (int i = 0; i < block_bytes; ++i) {
                sum[i] |= (uint8_t) ((block[i] >> plane.position & mask) << plane.width * b);
            }
        }
        for (int i = 0; i < block_bytes; ++i) {
            lines[line * block_bytes + i] = sum[i];
        }
    }
}

// Adds the plane's bits to the brick.
void read_lines(const plane_info & plane, const uint8_t * lines, brick & out) {
    const int per_line = 2 * plane.per_line, mask = (1 << plane.width) - 1;
    for (int b = 0; b < n_block; ++b) {
        const uint8_t * line = lines + b / per_line * block_bytes;
        for (int i = 0; i < block_bytes; ++i) {
            out.block[b][i] |= (uint8_t) ((line[i] >> plane.width * (b % per_line) & mask) << plane.position);
        }
    }
}

void write_strip(const tile_layout & layout, const strip_shape & strip, int i_strip, const uint8_t * codes, uint8_t * tile) {
    for (int i_brick = 0; i_brick < strip.n_brick; ++i_brick) {
        brick all;
        load_codes(strip, codes, i_brick, all);
        for (int i = 0; i < layout.n_plane; ++i) {
            const plane_info & plane = layout.plane[i];
            write_lines(plane, all, tile + plane.offset + block_bytes * first_line(layout, plane, strip, i_strip, i_brick));
        }
    }
}

void read_strip(const tile_layout & layout, const strip_shape & strip, int i_strip, const uint8_t * tile, uint8_t * codes) {
    for (int i_brick = 0; i_brick < strip.n_brick; ++i_brick) {
        brick all = {};
        for (int i = 0; i < layout.n_plane; ++i) {
            const plane_info & plane = layout.plane[i];
            read_lines(plane, tile + plane.offset + block_bytes * first_line(layout, plane, strip, i_strip, i_brick), all);
        }
        scatter(strip, all, i_brick, codes);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// D
// ---------------------------------------------------------------------------------------------------------------------------------------------

// NaN compares false with everything: it is never the lower or the higher one.
void take_extremes(int n, const float * y, float * lowest, float * highest) {
    for (int i = 0; i < n; ++i) {
        lowest[i]  = y[i] < lowest[i] ? y[i] : lowest[i];
        highest[i] = y[i] > highest[i] ? y[i] : highest[i];
    }
}

void group_extremes(int n, const float * y, float * lowest, float * highest) {
    float low[16], high[16];
    for (int j = 0; j < 16; ++j) {
        low[j]  = __builtin_inff();
        high[j] = -__builtin_inff();
    }
    for (int i = 0; i < n; i += 16) {
        take_extremes(16, y + i, low, high);
    }
    for (int j = 1; j < 16; ++j) {
        low[0]  = low[j] < low[0] ? low[j] : low[0];
        high[0] = high[j] > high[0] ? high[j] : high[0];
    }
    *lowest  = low[0];
    *highest = high[0];
}

void extremes(const tile_layout & layout, const float * Y, const group_coder & coder) {
    const int T = layout.n_token, d = layout.d_head, group = layout.group;
    if (layout.side == GEAR_SIDE_K) {
        for (int i = 0; i < layout.part.n_group; ++i) {
            coder.lowest[i]  = __builtin_inff();
            coder.highest[i] = -__builtin_inff();
        }
        for (int t = 0; t < T; ++t) {
            take_extremes(d, Y + (int64_t) t * d, coder.lowest + t / group * d, coder.highest + t / group * d);
        }
    } else {
        for (int t = 0; t < T; ++t) {
            for (int c = 0, set = 0; c < d; c += group, ++set) {
                group_extremes(d - c < group ? d - c : group, Y + (int64_t) t * d + c, coder.lowest + set * T + t, coder.highest + set * T + t);
            }
        }
    }
}

// Row of a strip: `columns` values from y on, whose groups begin at `g` and are `step` apart (K: 1, every channel its own; V: 0, all the same one).
template <int step> void encode_row(int n, const float * y, const group_coder & coder, int g, float levels, uint8_t * codes) {
    constexpr float round  = 12582912.0f; // 1.5 * 2^23: adding it leaves no bits behind the point, rounded to nearest, ties to even
    const float *   lowest = coder.lowest + g, *highest = coder.highest + g, *zero = coder.zero + g, *inverse = coder.inverse + g;
    const float *   first = coder.first + g, *last = coder.last + g;
    for (int i = 0; i < n; ++i) {
        const float value = y[i];
        float       code  = ((value - zero[i * step]) * inverse[i * step] + round) - round;
        code              = code > levels ? levels : code;
        code              = code < 0.0f ? 0.0f : code; // the zero of a held range may lie above the value
        code              = value >= highest[i * step] ? last[i * step] : code;
        code              = value <= lowest[i * step] ? first[i * step] : code;
        code              = value == value ? code : 0.0f;
        codes[i]          = (uint8_t) (int) code;
    }
}

template <int step> void decode_row(int n, const uint8_t * codes, const group_coder & coder, int g, float * D) {
    for (int i = 0; i < n; ++i) {
        D[i] = coder.zero[g + i * step] + coder.scale[g + i * step] * (float) codes[i];
    }
}

void encode(const tile_layout & layout, const float * Y, const group_coder & coder, uint8_t * tile) {
    const strip_shape strip = shape_of(layout);
    const int         T = layout.n_token, d = layout.d_head, group = layout.group;
    uint8_t           codes[max_strip] = {}; // padding lanes have code 0
    for (int t = 0; t < T; ++t) {
        const float * y   = Y + (int64_t) t * d;
        uint8_t *     row = codes + t % strip.n_row * strip.n_column;
        if (strip.is_k) {
            encode_row<1>(d, y, coder, t / group * d, (float) layout.levels, row);
        } else {
            for (int c = 0, set = 0; c < d; c += group, ++set) {
                encode_row<0>(d - c < group ? d - c : group, y + c, coder, set * T + t, (float) layout.levels, row + c);
            }
        }
        if ((t + 1) % strip.n_row == 0) {
            write_strip(layout, strip, t / strip.n_row, codes, tile);
        }
    }
}

void decode(const tile_layout & layout, const uint8_t * tile, const group_coder & coder, float * D) {
    const strip_shape strip = shape_of(layout);
    const int         T = layout.n_token, d = layout.d_head, group = layout.group;
    uint8_t           codes[max_strip];
    for (int t = 0; t < T; ++t) {
        if (t % strip.n_row == 0) {
            read_strip(layout, strip, t / strip.n_row, tile, codes);
        }
        const uint8_t * row = codes + t % strip.n_row * strip.n_column;
        float *         out = D + (int64_t) t * d;
        if (strip.is_k) {
            decode_row<1>(d, row, coder, t / group * d, out);
        } else {
            for (int c = 0, set = 0; c < d; c += group, ++set) {
                decode_row<0>(d - c < group ? d - c : group, row + c, coder, set * T + t, out + c);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// L
// ---------------------------------------------------------------------------------------------------------------------------------------------

float dot_product(int n, const float * a, const float * b) {
    float sum[n_partial] = {};
    for (int i = 0; i < n; i += n_partial) {
        for (int j = 0; j < n_partial; ++j) {
            sum[j] += a[i + j] * b[i + j];
        }
    }
    for (int width = n_partial / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) {
            sum[j] += sum[j + width];
        }
    }
    return sum[0];
}

// y += factor * x
void add_multiple(int n, float factor, const float * x, float * y) {
    for (int i = 0; i < n; ++i) {
        y[i] += factor * x[i];
    }
}

void multiply(int T, int d, int r, const float * R, const float * B, float * A) {
    for (int t = 0; t < T; ++t) {
        for (int k = 0; k < r; ++k) {
            A[k * T + t] = dot_product(d, R + (int64_t) t * d, B + k * d);
        }
    }
}

void multiply_transposed(int T, int d, int r, const float * R, const float * A, float * B) {
    for (int i = 0; i < r * d; ++i) {
        B[i] = 0;
    }
    for (int t = 0; t < T; ++t) {
        for (int k = 0; k < r; ++k) {
            add_multiple(d, A[k * T + t], R + (int64_t) t * d, B + k * d);
        }
    }
}

void add_product(int T, int d, int r, const float * A, const float * B, float sign, const float * x, float * out) {
    for (int t = 0; t < T; ++t) {
        float L[max_d_head] = {};
        for (int k = 0; k < r; ++k) {
            add_multiple(d, A[k * T + t], B + k * d, L);
        }
        for (int c = 0; c < d; ++c) {
            out[(int64_t) t * d + c] = x[(int64_t) t * d + c] + sign * L[c];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Rotation
// ---------------------------------------------------------------------------------------------------------------------------------------------

typedef float   floats16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints16 __attribute__((vector_size(64)));

// One step of the butterfly within 16 numbers: sums where bit `half` of the index is 0, differences where it is 1.
template <int half> void butterfly(floats16 & x) {
#if defined(__clang__)
    const floats16 partner = __builtin_shufflevector(x, x, 0 ^ half, 1 ^ half, 2 ^ half, 3 ^ half, 4 ^ half, 5 ^ half, 6 ^ half, 7 ^ half, 8 ^ half,
                                                     9 ^ half, 10 ^ half, 11 ^ half, 12 ^ half, 13 ^ half, 14 ^ half, 15 ^ half);
#else
    const ints16   index   = { 0 ^ half, 1 ^ half, 2 ^ half,  3 ^ half,  4 ^ half,  5 ^ half,  6 ^ half,  7 ^ half,
                               8 ^ half, 9 ^ half, 10 ^ half, 11 ^ half, 12 ^ half, 13 ^ half, 14 ^ half, 15 ^ half };
    const floats16 partner = __builtin_shuffle(x, index);
#endif
    floats16 sign = {};
    for (int i = 0; i < 16; ++i) {
        sign[i] = i & half ? -1.0f : 1.0f;
    }
    x = partner + sign * x;
}

// Head sizes are multiples of 16.
void hadamard_vectors(float * x, int d) {
    const int block = d & -d;
    for (int i = 0; i < d; i += 16) {
        floats16 part = *(floats16 *) (x + i);
        butterfly<1>(part);
        butterfly<2>(part);
        butterfly<4>(part);
        butterfly<8>(part);
        *(floats16 *) (x + i) = part;
    }
    for (int half = 16; half < block; half *= 2) {
        for (int i = 0; i < d; i += 2 * half) {
            for (int j = i; j < i + half; j += 16) {
                floats16 *     low = (floats16 *) (x + j), *high = (floats16 *) (x + j + half);
                const floats16 sum = *low + *high, difference = *low - *high;
                *low  = sum;
                *high = difference;
            }
        }
    }
    const float norm = 1.0f / __builtin_sqrtf((float) block);
    for (int i = 0; i < d; ++i) {
        x[i] *= norm;
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Feedback
// ---------------------------------------------------------------------------------------------------------------------------------------------

// n_vector x 16 sums stay in registers while all rows go by.
template <int n_vector> void add_multiples_part(int m, const float * factor, const float * rows, int stride, float * y) {
    floats16 sum[n_vector];
    for (int i = 0; i < n_vector; ++i) {
        sum[i] = *(const floats16 *) (y + 16 * i);
    }
    for (int j = 0; j < m; ++j) {
        const float * row = rows + (int64_t) j * stride;
        for (int i = 0; i < n_vector; ++i) {
            sum[i] = sum[i] + factor[j] * *(const floats16 *) (row + 16 * i);
        }
    }
    for (int i = 0; i < n_vector; ++i) {
        *(floats16 *) (y + 16 * i) = sum[i];
    }
}

void add_multiples(int n, int m, const float * factor, const float * rows, int stride, float * y) {
    int i = 0;
    for (; i + 64 <= n; i += 64) {
        add_multiples_part<4>(m, factor, rows + i, stride, y + i);
    }
    for (; i < n; i += 16) {
        add_multiples_part<1>(m, factor, rows + i, stride, y + i);
    }
}

void channel_extremes(int T, int group, const float * y, const group_coder & coder, int first, int step) {
    for (int t = 0; t < T; t += group, first += step) {
        group_extremes(group, y + t, coder.lowest + first, coder.highest + first);
    }
}

void channel_error(int T, int group, const float * x, const float * y, const group_coder & coder, int first, int step, int levels, float * e) {
    uint8_t codes[max_tile];
    float   D[max_tile];
    for (int t = 0; t < T; t += group, first += step) {
        encode_row<0>(group, y + t, coder, first, (float) levels, codes + t);
        decode_row<0>(group, codes + t, coder, first, D + t);
    }
    for (int t = 0; t < T; ++t) {
        e[t] = y[t] == y[t] ? x[t] - D[t] : 0.0f;
    }
}

constexpr pack_kernels kernels_of_this_level = { extremes,    encode,           decode,        multiply,         multiply_transposed,
                                                 add_product, hadamard_vectors, add_multiples, channel_extremes, channel_error };

} // namespace

} // namespace gear
