// codec.cpp - GEAR on one tile of one KV head, top to bottom, in the paper's notation and order (arXiv 2403.05527, section 3 and algorithm 2):
//
//     X ~ D + L + S        S = Filter_s(X)      D = Quant_b(X - S)      R = X - D - S      L = A B^T = PowerIteration_r(R)
//
// and, where the configuration says `center`, not in the paper: X ~ M + D + L, M the mean of each channel, with X - M in the place of X.
//
// X is [T, d]: T tokens, d channels. What the stored bytes mean is told in tile.h; this file says how they are chosen.
//
// One file of more than 500 lines, because it is read beside the paper from X to the tile: each part needs the one before, and the scalar loops stand
// where the method calls them.
//
// Every part is rounded to its stored form before the next one is computed, so that each sees, and mends, the errors of those before.

#include "codec/codec.h"

#include "codec/basis.h"
#include "codec/feedback.h"
#include "codec/kernels.h"
#include "codec/stored.h"
#include "common/simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gear {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float absent   = std::numeric_limits<float>::quiet_NaN(); // marks an entry that D and L need not describe: an outlier, a cell never written

void to_half_range(int n, float * values) {
    for (int i = 0; i < n; ++i) {
        values[i] = in_half_range(values[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Scratch
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct workspace {
    float *     X; // [T, d]   X - S, `absent` where S or nothing stands
    float *     Y; // [T, d]   X - S - L; R while L is computed
    float *     D; // [T, d]
    float *     A; // [r][T]
    float *     B; // [r][d]
    float *     E; // [d][T]   with feedback: what D loses of X
    float *     M; // [d, d]   with feedback: feedback.h's
    group_coder coder;
};

// Lays the workspace out from `scratch` on and returns its bytes. It reckons in numbers: from nullptr, which has no offsets, it only counts.
size_t lay_out_workspace(const tile_layout & layout, void * scratch, workspace & w) {
    const size_t n = (size_t) layout.n_token * layout.d_head, n_group = layout.part.n_group, r = layout.config.rank;
    size_t       bytes = 0;
    const auto   take  = [&](size_t count) {
        float * array = reinterpret_cast<float *>((uintptr_t) scratch + bytes);
        bytes += (count * sizeof(float) + tile_align - 1) / tile_align * tile_align;
        return array;
    };
    w.X = take(n);
    w.Y = r > 0 ? take(n) : w.X;
    w.D = r > 0 || layout.config.center || layout.config.feedback ? take(n) : nullptr;
    w.A = take(r * layout.n_token);
    w.B = take(r * layout.d_head);
    w.E = layout.config.feedback ? take(n) : nullptr;
    w.M = layout.config.feedback ? take((size_t) layout.d_head * layout.d_head) : nullptr;
    for (float ** array :
         { &w.coder.lowest, &w.coder.highest, &w.coder.zero, &w.coder.scale, &w.coder.inverse, &w.coder.first, &w.coder.last, &w.coder.held }) {
        *array = take(n_group);
    }
    return bytes;
}

// out [n_column, n_row] = in^T, in [n_row, n_column]; both are multiples of 16, and blocks of that size stay in the cache
void transpose(int n_row, int n_column, const float * in, float * out) {
    for (int i = 0; i < n_row; i += 16) {
        for (int j = 0; j < n_column; ++j) {
            for (int k = i; k < i + 16; ++k) {
                out[(int64_t) j * n_row + k] = in[(int64_t) k * n_column + j];
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// X
// ---------------------------------------------------------------------------------------------------------------------------------------------

void sanitize(int n, const float * x, float * X) {
    for (int i = 0; i < n; ++i) {
        X[i] = sanitized(x[i]);
    }
}

// kept: rows that X holds already.   w f32 [d]: with rotate 2
void load(const tile_layout & layout, const float * x, const uint8_t * written, const uint8_t * kept, const float * w, float * X) {
    const int d = layout.d_head;
    for (int t = 0; t < layout.n_token; ++t, x += d, X += d) {
        if (written && !written[t]) {
            std::fill(X, X + d, absent);
        } else if (!(kept && kept[t])) {
            sanitize(d, x, X);
            for (int c = 0; c < d && layout.config.rotate == rotate_weighted; ++c) {
                X[c] *= w[c];
            }
            if (layout.config.rotate) {
                hadamard(X, d);
                sanitize(d, X, X);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// M, the mean of each channel
// ---------------------------------------------------------------------------------------------------------------------------------------------

void load_mean(const tile_layout & layout, const uint8_t * tile, float * M) {
    for (int c = 0; c < layout.d_head; ++c) {
        M[c] = load_half(tile + layout.part.mean, c);
    }
}

void store_mean(const tile_layout & layout, float * M, uint8_t * tile) {
    to_half_range(layout.d_head, M);
    for (int c = 0; c < layout.d_head; ++c) {
        store_half(tile + layout.part.mean, c, float_to_half(M[c]));
    }
}

// Mean over the rows of X [T, d] that are not absent, less that of D's where there is a D.   mean [d]
void mean_of_rows(int T, int d, const float * X, const float * D, float * mean) {
    int n = 0;
    std::fill(mean, mean + d, 0.0f);
    for (int t = 0; t < T; ++t, X += d) {
        if (std::isnan(X[0])) { // without S a row is absent as a whole or not at all
            continue;
        }
        for (int c = 0; c < d; ++c) {
            mean[c] += D ? X[c] - D[(int64_t) t * d + c] : X[c];
        }
        ++n;
    }
    for (int c = 0; c < d && n > 0; ++c) {
        mean[c] /= (float) n;
    }
}

// X becomes X - M. As long as a tile keeps a row it keeps its means, and kept rows come without them.
void take_mean(const tile_layout & layout, const kept_rows * kept, float * X, uint8_t * tile) {
    const int T = layout.n_token, d = layout.d_head;
    float     M[max_d_head];
    if (kept) {
        load_mean(layout, kept->tile, M);
    } else {
        mean_of_rows(T, d, X, nullptr, M);
    }
    store_mean(layout, M, tile);
    load_mean(layout, tile, M);
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < d && !(kept && kept->is_kept[t]); ++c) {
            X[(int64_t) t * d + c] -= M[c];
        }
    }
    to_half_range(T * d, X);
}

// What is left of X - M on average when D and L are taken away goes to M, too.   coded [T, d]: D + L
void add_to_mean(const tile_layout & layout, const float * X, const float * coded, uint8_t * tile) {
    float M[max_d_head], left[max_d_head];
    load_mean(layout, tile, M);
    mean_of_rows(layout.n_token, layout.d_head, X, coded, left);
    for (int c = 0; c < layout.d_head; ++c) {
        M[c] += left[c];
    }
    store_mean(layout, M, tile);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// S = Filter_s(X): of each vector (K: a channel over the tokens, V: a token over the channels) the highest and the lowest entries
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Indices of a vector's n_end / 2 lowest entries, then of its n_end / 2 highest; fewer when not so many are present. Returns how many there are.
int pick_ends(const float * entry, int stride, int length, int n_end, uint16_t * index) {
    int n_present = 0;
    for (int i = 0; i < length; ++i) {
        if (!std::isnan(entry[i * stride])) {
            index[n_present++] = (uint16_t) i;
        }
    }
    const auto lower = [&](int i, int j) { return entry[i * stride] != entry[j * stride] ? entry[i * stride] < entry[j * stride] : i < j; };
    const int  n_low = std::min(n_end / 2, (n_present + 1) / 2), n_high = std::min(n_end / 2, n_present / 2);
    std::partial_sort(index, index + n_low, index + n_present, lower);
    std::partial_sort(index + n_low, index + n_low + n_high, index + n_present, [&](int i, int j) { return lower(j, i); });
    return n_low + n_high;
}

// The paper fills the gaps with the mean of the rest, which lies between the other entries and so leaves Quant's range to them. Here the gaps are marked
// as absent, which does the same for groups shorter than the vector, where the vector's mean could widen the range.
void filter_outliers(const tile_layout & layout, const uint8_t * written, float * X, uint8_t * tile) {
    const gear_tile_layout & part      = layout.part;
    const bool               is_k      = layout.side == GEAR_SIDE_K;
    const int                length    = vector_length(layout);
    const int                stride    = is_k ? layout.d_head : 1; // from one entry of a vector to the next
    const int                unwritten = is_k && written ? (int) (std::find(written, written + length, 0) - written) : 0;
    for (int vector = 0; vector < part.n_vector; ++vector) {
        float *   entry = X + (is_k ? vector : (int64_t) vector * layout.d_head);
        uint16_t  index[max_depth];
        const int n_end = pick_ends(entry, stride, length, part.n_outlier, index);
        for (int slot = 0; slot < part.n_outlier; ++slot) {
            const int64_t i_outlier = (int64_t) vector * part.n_outlier + slot;
            const bool    is_filled = slot < n_end;
            store_outlier_index(layout, i_outlier, is_filled ? index[slot] : unwritten, tile);
            store_half(tile + part.outlier_value, i_outlier, is_filled ? float_to_half(entry[index[slot] * stride]) : 0);
            if (is_filled) {
                entry[index[slot] * stride] = absent;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// D = Quant_b(Y): uniform and asymmetric in each group, D = zero + scale * code
//
// Scale and zero are rounded to what is stored (ranges.h) before codes are taken. The lowest value of a group takes a code rounded down, the highest one
// a code rounded up: then a decoded tile codes to itself, and a row that is packed again and again, because its neighbours change, does not drift.
// ---------------------------------------------------------------------------------------------------------------------------------------------

void extremes_scalar(const tile_layout & layout, const float * Y, const group_coder & coder) {
    std::fill_n(coder.lowest, layout.part.n_group, infinity);
    std::fill_n(coder.highest, layout.part.n_group, -infinity);
    for (int t = 0; t < layout.n_token; ++t) {
        for (int c = 0; c < layout.d_head; ++c) {
            const float y = Y[(int64_t) t * layout.d_head + c];
            const int   g = group_of(layout, t, c);
            if (!std::isnan(y)) {
                coder.lowest[g]  = std::min(coder.lowest[g], y);
                coder.highest[g] = std::max(coder.highest[g], y);
            }
        }
    }
}

int code_for(const group_coder & coder, int g, int levels, float y) {
    if (std::isnan(y)) {
        return 0;
    }
    if (y <= coder.lowest[g]) {
        return (int) coder.first[g];
    }
    if (y >= coder.highest[g]) {
        return (int) coder.last[g];
    }
    return nearest_code(y, coder.zero[g], coder.inverse[g], levels);
}

// Where the code of (t, c) lies in a plane: see tile.h.
code_position position_of(const tile_layout & layout, const plane_info & plane, int t, int c) {
    const bool is_k = layout.side == GEAR_SIDE_K;
    return position_of(plane, layout.part.n_depth, is_k ? t : c, is_k ? c : t);
}

void encode_scalar(const tile_layout & layout, const float * Y, const group_coder & coder, uint8_t * tile) {
    for (int i = 0; i < layout.n_plane; ++i) {
        const plane_info & plane = layout.plane[i];
        uint8_t *          bytes = tile + plane.offset;
        std::fill_n(bytes, (int64_t) layout.part.n_lane * layout.part.n_depth * plane.width / 8, 0);
        for (int t = 0; t < layout.n_token; ++t) {
            for (int c = 0; c < layout.d_head; ++c) {
                const int  code     = code_for(coder, group_of(layout, t, c), layout.levels, Y[(int64_t) t * layout.d_head + c]);
                const int  bits     = code >> plane.position & ((1 << plane.width) - 1);
                const auto position = position_of(layout, plane, t, c);
                bytes[position.byte] |= (uint8_t) (bits << position.shift);
            }
        }
    }
}

void decode_scalar(const tile_layout & layout, const uint8_t * tile, const group_coder & coder, float * D) {
    for (int t = 0; t < layout.n_token; ++t) {
        for (int c = 0; c < layout.d_head; ++c) {
            const int g                        = group_of(layout, t, c);
            D[(int64_t) t * layout.d_head + c] = coder.zero[g] + coder.scale[g] * (float) code_of(layout, tile, t, c);
        }
    }
}

void clip_ranges(const tile_layout & layout, const group_coder & coder) {
    for (int group = 0; group < layout.part.n_group; ++group) {
        clip_range(layout.config.clip, coder.lowest[group], coder.highest[group]);
    }
}

// Whether a group's kept rows keep the range old_low to old_high, or low to high becomes the range.
bool is_cut(const tile_layout & layout, const kept_rows & kept, const float * Y, int t, int c, float old_low, float old_high, float low, float high) {
    range_choice choice = make_range_choice(old_low, old_high, low, high, layout.levels);
    for (int i = t; i < t + layout.group; ++i) {
        const float y = Y[(int64_t) i * layout.d_head + c];
        if (!std::isnan(y)) {
            choice.add(y, kept.is_kept[i]);
        }
    }
    return choice.is_cut();
}

// A group that holds a kept row does not narrow: the row then codes to what it was, unless the new ones widen the range.
void hold_ranges(const tile_layout & layout, const float * Y, const kept_rows & kept, const group_coder & coder) {
    const bool is_k = layout.side == GEAR_SIDE_K;
    const int  n_t = is_k ? layout.group : 1, n_c = is_k ? 1 : layout.group; // tokens and channels of a group
    for (int t = 0; t < layout.n_token; t += n_t) {
        if (std::find(kept.is_kept + t, kept.is_kept + t + n_t, 1) == kept.is_kept + t + n_t) {
            continue;
        }
        for (int c = 0; c < layout.d_head; c += n_c) {
            const int         g       = group_of(layout, t, c);
            const group_range range   = range_at(layout, kept.tile, g);
            const float       old_low = range.zero, old_high = range.zero + range.scale * (float) layout.levels;
            const float       low = std::min(coder.lowest[g], old_low), high = std::max(coder.highest[g], old_high);
            // V: a group is of one token, and a kept one is not beyond its own range.
            const bool        is_held = (low == old_low && high == old_high) || (is_k && is_cut(layout, kept, Y, t, c, old_low, old_high, low, high));
            coder.lowest[g]           = is_held ? old_low : low;
            coder.highest[g]          = is_held ? old_high : high;
            coder.held[g]             = is_held ? 1.0f : 0.0f;
        }
    }
}

// kept: nullptr, or the rows whose D was Quant's before.
void quantize(const tile_layout & layout, const pack_kernels & kernels, const float * Y, const kept_rows * kept, const group_coder & coder,
              uint8_t * tile) {
    kernels.extremes(layout, Y, coder);
    if (layout.config.clip < 1) {
        clip_ranges(layout, coder);
    }
    std::fill_n(coder.held, layout.part.n_group, 0.0f);
    if (kept) {
        hold_ranges(layout, Y, *kept, coder);
    }
    code_ranges(layout, coder, kept ? kept->tile : nullptr, tile);
    kernels.encode(layout, Y, coder, tile);
}

// Quant with feedback (feedback.h): channel c of all tokens is rounded as if it were x_c + sum_{j < c} m_cj e_j, e_j what D loses of channel j. Its groups
// get their ranges from that, too. Each token's sums are its own and are taken in the order of the channels, so that vectors over tokens give the same
// bytes.
//   X [T, d]: becomes what was rounded   M [d, d]   E, R [d][T]: scratch
void quantize_with_feedback(const tile_layout & layout, const pack_kernels & kernels, const float * M, float * X, float * E, float * R,
                            const group_coder & coder, uint8_t * tile) {
    const int T = layout.n_token, d = layout.d_head;
    std::fill_n(coder.held, layout.part.n_group, 0.0f);
    transpose(T, d, X, E);
    for (int c = 0; c < d; ++c) {
        float *e = E + (int64_t) c * T, *y = R + (int64_t) c * T; // e: X's column until its own turn
        std::copy_n(e, T, y);
        kernels.add_multiples(T, c, M + (int64_t) c * d, E, T, y);
        to_half_range(T, y);
        kernels.channel_extremes(T, layout.group, y, coder, c, d);
        for (int group = c; layout.config.clip < 1 && group < layout.part.n_group; group += d) {
            clip_range(layout.config.clip, coder.lowest[group], coder.highest[group]);
        }
        code_channel_ranges(layout, c, coder, tile);
        kernels.channel_error(T, layout.group, e, y, coder, c, d, layout.levels, e);
    }
    transpose(d, T, R, X);
    kernels.encode(layout, X, coder, tile);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// L = A B^T = PowerIteration_r(R), algorithm 2
// ---------------------------------------------------------------------------------------------------------------------------------------------

void random_start(uint32_t seed, int n, float * B) {
    for (int i = 0; i < n; ++i) {
        B[i] = start_number(seed, i);
    }
}

float dot(int n, const float * a, const float * b) {
    float sum[n_partial] = {};
    for (int i = 0; i < n; i += n_partial) { // n is a multiple of 16: head sizes and tiles are
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

// The columns of M [r][n], one behind the other, by Gram-Schmidt; a column that adds nothing to those before becomes zero.
void orthonormalize(int n, int r, float * M) {
    for (int k = 0; k < r; ++k) {
        float *     column = M + (int64_t) k * n;
        const float before = dot(n, column, column);
        for (int pass = 0; pass < 2; ++pass) { // the second pass takes away what rounding left in the first
            for (int j = 0; j < k; ++j) {
                const float * other = M + (int64_t) j * n;
                const float   share = dot(n, column, other);
                for (int i = 0; i < n; ++i) {
                    column[i] -= share * other[i];
                }
            }
        }
        const float after  = dot(n, column, column);
        const float factor = column_factor(before, after);
        for (int i = 0; i < n; ++i) {
            column[i] *= factor;
        }
    }
}

void multiply_scalar(int T, int d, int r, const float * R, const float * B, float * A) {
    for (int k = 0; k < r; ++k) {
        for (int t = 0; t < T; ++t) {
            A[k * T + t] = dot(d, R + (int64_t) t * d, B + k * d);
        }
    }
}

void multiply_transposed_scalar(int T, int d, int r, const float * R, const float * A, float * B) {
    std::fill_n(B, r * d, 0.0f);
    for (int k = 0; k < r; ++k) {
        for (int t = 0; t < T; ++t) {
            for (int c = 0; c < d; ++c) {
                B[k * d + c] += A[k * T + t] * R[(int64_t) t * d + c];
            }
        }
    }
}

void add_product_scalar(int T, int d, int r, const float * A, const float * B, float sign, const float * x, float * out) {
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < d; ++c) {
            float L = 0;
            for (int k = 0; k < r; ++k) {
                L += A[k * T + t] * B[k * d + c];
            }
            out[(int64_t) t * d + c] = x[(int64_t) t * d + c] + sign * L;
        }
    }
}

void hadamard_scalar(float * x, int d) {
    const int   block = d & -d; // the largest power of two that divides d
    const float norm  = 1.0f / std::sqrt((float) block);
    for (int half = 1; half < block; half *= 2) {
        for (int i = 0; i < d; i += 2 * half) {
            for (int j = i; j < i + half; ++j) {
                const float sum = x[j] + x[j + half], difference = x[j] - x[j + half];
                x[j]        = sum;
                x[j + half] = difference;
            }
        }
    }
    for (int i = 0; i < d; ++i) {
        x[i] *= norm;
    }
}

// Algorithm 2 orthonormalizes in its last pass only. Doing so in each spans the same spaces, and keeps the small directions apart in f32.
void power_iteration(const tile_layout & layout, const pack_kernels & kernels, uint32_t seed, const float * R, float * A, float * B) {
    const int     T = layout.n_token, d = layout.d_head, r = layout.config.rank;
    constexpr int n_pass = 3;
    random_start(seed, r * d, B);
    for (int pass = 0; pass < n_pass; ++pass) {
        orthonormalize(d, r, B);
        kernels.multiply(T, d, r, R, B, A); // A = R B
        orthonormalize(T, r, A);
        kernels.multiply_transposed(T, d, r, R, A, B); // B = R^T A
    }
}

// Y - D, and 0 where Y is absent.
void subtract(int n, const float * Y, const float * D, float * out) {
    for (int i = 0; i < n; ++i) {
        const float difference = Y[i] - D[i];
        out[i]                 = difference == difference ? difference : 0.0f;
    }
}

// ||Y - D||^2
double squared_error(int T, int d, const float * Y, const float * D) {
    double sum = 0;
    for (int t = 0; t < T; ++t) {
        float row[max_d_head];
        subtract(d, Y + (int64_t) t * d, D + (int64_t) t * d, row);
        sum += dot(d, row, row);
    }
    return sum;
}

// L for the D at hand, then in each further round a D that leaves to L what L holds, and a new L. A tile that L does not improve keeps none.
void add_low_rank(const tile_layout & layout, const pack_kernels & kernels, uint32_t seed, const workspace & w, uint8_t * tile) {
    const int T = layout.n_token, d = layout.d_head, r = layout.config.rank, n = T * d;
    double    error_without = 0, error_with = 0;
    for (int round = 0; round < layout.config.rounds; ++round) {
        if (round > 0) {
            quantize(layout, kernels, w.Y, nullptr, w.coder, tile); // D = Quant(X - S - L)
        }
        kernels.decode(layout, tile, w.coder, w.D);
        float * R = w.Y;
        subtract(n, w.X, w.D, R); // R = X - D - S
        if (round == 0) {
            error_without = squared_error(T, d, w.X, w.D);
        }
        power_iteration(layout, kernels, seed, R, w.A, w.B);
        store_factors(layout, w.A, w.B, tile);
        load_factors(layout, tile, w.A, w.B);
        kernels.add_product(T, d, r, w.A, w.B, -1.0f, w.X, w.Y);
        to_half_range(n, w.Y);
        error_with = squared_error(T, d, w.Y, w.D);
    }
    if (!(error_with < error_without)) {
        std::fill_n(w.A, (int64_t) r * T, 0.0f);
        std::fill_n(w.B, (int64_t) r * d, 0.0f);
        store_factors(layout, w.A, w.B, tile);
        quantize(layout, kernels, w.X, nullptr, w.coder, tile);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// What a tile says
// ---------------------------------------------------------------------------------------------------------------------------------------------

void restore_outliers(const tile_layout & layout, const uint8_t * tile, float * X) {
    const gear_tile_layout & part = layout.part;
    const bool               is_k = layout.side == GEAR_SIDE_K;
    for (int vector = 0; vector < part.n_vector; ++vector) {
        for (int slot = 0; slot < part.n_outlier; ++slot) {
            const int64_t i_outlier = (int64_t) vector * part.n_outlier + slot;
            const int     index     = outlier_index_at(layout, tile, i_outlier);
            const int     t = is_k ? index : vector, c = is_k ? vector : index;
            X[(int64_t) t * layout.d_head + c] = load_half(tile + part.outlier_value, i_outlier);
        }
    }
}

// D + L + S, in the basis that was coded, without M.   X [T, d], A [r][T], B [r][d]
void reconstruct(const tile_layout & layout, const pack_kernels & kernels, const uint8_t * tile, const group_coder & coder, float * A, float * B,
                 float * X) {
    for (int group = 0; group < layout.part.n_group; ++group) {
        const group_range range = range_at(layout, tile, group);
        coder.scale[group]      = range.scale;
        coder.zero[group]       = range.zero;
    }
    kernels.decode(layout, tile, coder, X); // D
    if (layout.config.rank > 0) {
        load_factors(layout, tile, A, B);
        kernels.add_product(layout.n_token, layout.d_head, layout.config.rank, A, B, 1.0f, X, X); // + L
    }
    restore_outliers(layout, tile, X); // S in their places
}

const pack_kernels & kernels_in_use() {
    switch (simd_current()) {
#if defined(__x86_64__)
    case simd_level::avx512vnni:
        return pack_kernels_avx512vnni;
    case simd_level::avx2:
        return pack_kernels_avx2;
#elif defined(__aarch64__)
    case simd_level::neon:
        return pack_kernels_neon;
#endif
    default:
        return pack_kernels_scalar;
    }
}

} // namespace

void add_multiples_scalar(int n, int m, const float * factor, const float * rows, int stride, float * y) {
    for (int j = 0; j < m; ++j) {
        for (int i = 0; i < n; ++i) {
            y[i] += factor[j] * rows[(int64_t) j * stride + i];
        }
    }
}

void channel_extremes_scalar(int T, int group, const float * y, const group_coder & coder, int first, int step) {
    for (int t = 0, g = first; t < T; ++t, g = first + t / group * step) {
        if (t % group == 0) {
            coder.lowest[g]  = infinity;
            coder.highest[g] = -infinity;
        }
        if (!std::isnan(y[t])) {
            coder.lowest[g]  = std::min(coder.lowest[g], y[t]);
            coder.highest[g] = std::max(coder.highest[g], y[t]);
        }
    }
}

void channel_error_scalar(int T, int group, const float * x, const float * y, const group_coder & coder, int first, int step, int levels, float * e) {
    for (int t = 0; t < T; ++t) {
        const int g = first + t / group * step;
        e[t]        = std::isnan(y[t]) ? 0.0f : x[t] - (coder.zero[g] + coder.scale[g] * (float) code_for(coder, g, levels, y[t]));
    }
}

const pack_kernels pack_kernels_scalar = { extremes_scalar,    encode_scalar,   decode_scalar,        multiply_scalar,         multiply_transposed_scalar,
                                           add_product_scalar, hadamard_scalar, add_multiples_scalar, channel_extremes_scalar, channel_error_scalar };

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The tile
// ---------------------------------------------------------------------------------------------------------------------------------------------

size_t pack_scratch_bytes(const tile_layout & layout) {
    workspace w;
    return lay_out_workspace(layout, nullptr, w);
}

void pack_tile(const tile_layout & layout, uint32_t seed, const float * x, const uint8_t * written, uint8_t * tile, void * scratch, const kept_rows * kept,
               const uint8_t * basis, const query_moment * queries) {
    const pack_kernels & kernels = kernels_in_use();
    workspace            w;
    lay_out_workspace(layout, scratch, w);
    if (kept) {
        reconstruct(layout, kernels, kept->tile, w.coder, w.A, w.B, w.X);
        sanitize(layout.n_token * layout.d_head, w.X, w.X);
    }
    uint8_t chosen[basis_bytes(max_d_head)];
    float   weight[max_d_head];
    if (layout.config.rotate == rotate_weighted) {
        if (kept) {
            basis = kept->tile + layout.part.basis;
        } else if (!basis) {
            choose_basis(layout, x, written, nullptr, chosen);
            basis = chosen;
        }
        load_weights(basis, layout.d_head, weight);
    }
    load(layout, x, written, kept ? kept->is_kept : nullptr, weight, w.X); // X

    std::fill_n(tile, layout.part.bytes, 0); // what lies between the parts is part of the bytes, too
    if (layout.config.rotate == rotate_weighted) {
        std::copy_n(basis, basis_bytes(layout.d_head), tile + layout.part.basis);
    }
    if (layout.config.center) {
        take_mean(layout, kept, w.X, tile); // M, and X - M
    }
    if (layout.part.n_outlier > 0) {
        filter_outliers(layout, written, w.X, tile); // S, and X - S
    }
    if (queries && queries->is_known() && !kept) {
        choose_feedback(layout, kernels, *queries, weight, w.M);
        quantize_with_feedback(layout, kernels, w.M, w.X, w.E, w.D, w.coder, tile); // D
    } else {
        quantize(layout, kernels, w.X, layout.config.rank == 0 ? kept : nullptr, w.coder, tile); // D
    }
    if (layout.config.rank > 0) {
        add_low_rank(layout, kernels, seed, w, tile); // L
    }
    if (layout.config.center && !kept) {
        reconstruct(layout, kernels, tile, w.coder, w.A, w.B, w.D);
        add_to_mean(layout, w.X, w.D, tile);
    }
}

void unpack_tile(const tile_layout & layout, const uint8_t * tile, float * xhat) {
    const int   T = layout.n_token, d = layout.d_head;
    float       scale[max_tile * max_d_head / 32], zero[max_tile * max_d_head / 32]; // no group is shorter than 32
    float       A[max_rank * max_tile], B[max_rank * max_d_head];
    group_coder coder = {};
    coder.scale       = scale;
    coder.zero        = zero;
    reconstruct(layout, kernels_in_use(), tile, coder, A, B, xhat);
    float M[max_d_head] = {}, weight[max_d_head];
    if (layout.config.center) {
        load_mean(layout, tile, M);
    }
    if (layout.config.rotate == rotate_weighted) {
        load_weights(tile + layout.part.basis, d, weight);
    }
    for (int t = 0; t < T; ++t) {
        float * row = xhat + (int64_t) t * d;
        for (int c = 0; c < d && layout.config.center; ++c) {
            row[c] += M[c];
        }
        if (layout.config.rotate) {
            hadamard(row, d);
        }
        for (int c = 0; c < d && layout.config.rotate == rotate_weighted; ++c) {
            row[c] /= weight[c];
        }
    }
    to_half_range(T * d, xhat);
}

group_range range_of(const tile_layout & layout, const uint8_t * tile, int token, int channel) {
    return range_at(layout, tile, group_of(layout, token, channel));
}

uint8_t code_of(const tile_layout & layout, const uint8_t * tile, int token, int channel) {
    int code = 0;
    for (int i = 0; i < layout.n_plane; ++i) {
        const plane_info &  plane    = layout.plane[i];
        const code_position position = position_of(layout, plane, token, channel);
        code |= (tile[plane.offset + position.byte] >> position.shift & ((1 << plane.width) - 1)) << plane.position;
    }
    return (uint8_t) code;
}

size_t unpack_numbers(const tile_layout & layout) {
    return 2 * (size_t) layout.part.n_group + (size_t) layout.config.rank * (layout.n_token + layout.d_head);
}

void unpack_coded(const tile_layout & layout, const uint8_t * tile, float * numbers, float * x) {
    group_coder coder = {};
    coder.scale       = numbers;
    coder.zero        = coder.scale + layout.part.n_group;
    float *A = coder.zero + layout.part.n_group, *B = A + layout.config.rank * layout.n_token;
    float  M[max_d_head];
    reconstruct(layout, kernels_in_use(), tile, coder, A, B, x);
    if (layout.config.center) {
        load_mean(layout, tile, M);
    }
    for (int t = 0; t < layout.n_token; ++t, x += layout.d_head) {
        for (int c = 0; c < layout.d_head && layout.config.center; ++c) {
            x[c] += M[c];
        }
        to_half_range(layout.d_head, x);
    }
}

void hadamard(float * x, int d) {
    hadamard_part(x, d, d);
}

int hadamard_part(float * x, int d, int n) {
    const pack_kernels & kernels = kernels_in_use();
    int                  first   = 0;
    while (first < n) {
        const int run = rotation_run(d, first);
        kernels.hadamard(x + first, run);
        first += run;
    }
    return first;
}

int channels_of_runs(int d, int n) {
    int first = 0;
    while (first < n) {
        first += rotation_run(d, first);
    }
    return first;
}

} // namespace gear
