// kernels.h - what attention needs of a kernel level: two products with a packed tile's numbers, two with exact f16 rows, and the softmax between them.
//
// The products with K and with V are one and the same. Both take rows x over the tile's depth (K: channels of q, V: tokens of p) and give rows over its
// lanes (K: scores of tokens, V: channels of the output); a scale and zero belong to one depth and one lane group, an outlier vector is one depth:
//     y_l = sum_i (x_i scale_gi) code_li + sum_i x_i zero_gi + sum_k (x.depth_factor_k) lane_factor_kl + outliers      (g the group of lane l)
// M, each channel's mean, is one more column of L: tokens have factor 1, channels their mean.
#pragma once

#include "codec/tile.h"
#include "common/simd.h"

namespace gear {

constexpr int slice_rows    = 8;  // most rows (query x head) that a kernel is given at once
constexpr int depth_padding = 64; // rows over the depth are padded to this with zeros
constexpr int lane_padding  = 32; // rows over the lanes are padded to this
constexpr int exact_padding = 16; // exact rows are padded to this with zeros

constexpr int padded(int n, int multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// f32 [n, stride]
struct const_rows {
    const float * data;
    size_t        stride;
    int           n;
    const float * row(int i) const { return data + i * stride; }
};

struct rows {
    float * data;
    size_t  stride;
    float * row(int i) const { return data + i * stride; }
};

// What all rows share about one packed tile, made once per tile.
struct prepared_tile {
    const tile_layout * layout;
    const uint8_t *     tile;
    float               rounding;   // see attention_op
    const uint8_t *     next;       // the tile that is read after this one, fetched into the cache meanwhile
    int64_t             n_next;     // its bytes; 0: none
    int64_t             next_first; // of them, those that are read first
    float *             scale;      // [n_lane_group, depth_stride], zeros in the padding
    float *             zero;       // [n_lane_group, depth_stride], zeros in the padding
    float *             widest;     // [depth_stride] the largest scale of the lane groups
    float *             square;     // [depth_stride] the mean square of their scales
    float *             A;          // [n_factor][T] of L, sigma included, and of M
    float *             B;          // [n_factor][d]
    float *             outlier;    // [n_vector, n_outlier] what an outlier's value adds to D + L at its place

    int depth_stride() const { return padded(layout->part.n_depth, depth_padding); }
    // Lanes that are tokens or channels, without padding.
    int n_lane() const { return layout->side == GEAR_SIDE_K ? layout->n_token : layout->d_head; }
    int n_lane_group() const { return (n_lane() + layout->group - 1) / layout->group; }

    static int n_factor(const gear_side_config & config) { return config.rank + config.center; }
    int        n_factor() const { return n_factor(layout->config); }

    // The columns of L's and M's factors over the depth and over the lanes.
    const float * depth_factor(int k) const { return layout->side == GEAR_SIDE_K ? B + k * layout->d_head : A + k * layout->n_token; }
    const float * lane_factor(int k) const { return layout->side == GEAR_SIDE_K ? A + k * layout->n_token : B + k * layout->d_head; }
};

// Exact f16 rows of some of a tile's cells.
struct exact_rows {
    int               n;
    const uint16_t ** row;   // [n] each f16 [d_head padded]
    int32_t *         token; // [n] place within the tile, ascending
};

// One row's place in the online softmax: p = exp(logit - max), sum = sum of p.
struct softmax_state {
    float max;
    float sum;
};

struct attention_kernels {
    // Fill in what the pointers of prepared point at.
    void (*prepare)(const prepared_tile & prepared);

    // y += x . tile for lanes [first, last), multiples of 32.   x f32 [n <= slice_rows, depth_stride]   y f32 [n, n_lane padded]
    void (*multiply)(const prepared_tile & prepared, const const_rows & x, int first_lane, int last_lane, const rows & y);

    // scores[i][token[j]] = q_i . row_j   q f32 [n <= slice_rows, d]
    void (*exact_scores)(const exact_rows & k, int d, const const_rows & q, const rows & scores);

    // out_i += sum_j p[i][token[j]] row_j   out f32 [p.n, d]
    void (*exact_output)(const exact_rows & v, int d, const const_rows & p, const rows & out);

    // Raw scores of n cells become p; scores has room up to a multiple of 16, written over. softcap: 0 or the cap, the scores being divided by it already.
    // mask: f16 [n] or nullptr; it is added slope times. Returns the factor by which the outputs added up so far have to shrink (1: none).
    float (*softmax)(float * scores, int n, float softcap, const uint16_t * mask, float slope, softmax_state & state);

    // x *= factor
    void (*rescale)(float * x, int n, float factor);
};

// Those of the level that is chosen.
const attention_kernels & current_attention_kernels();

// S, the same on all levels: the last part of prepare, and of multiply.
void prepare_outliers(const prepared_tile & prepared);
void multiply_outliers(const prepared_tile & prepared, const const_rows & x, const rows & y);

extern const attention_kernels attention_kernels_scalar;
#if defined(__x86_64__)
extern const attention_kernels attention_kernels_avx2;
extern const attention_kernels attention_kernels_avx512vnni;
#elif defined(__aarch64__)
extern const attention_kernels attention_kernels_neon;
#endif

} // namespace gear
