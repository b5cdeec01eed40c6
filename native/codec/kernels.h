// kernels.h - the inner loops of packing and unpacking: those that touch every number of a tile. codec.cpp holds their scalar truth and the method around
// them; pack_simd.h writes them for the compiler's vectors. All levels take the same roundings in the same order, so their results are equal.
#pragma once

#include "codec/tile.h"

namespace gear {

// What one group codes its values with. Arrays [n_group], in the order of group_of().
struct group_coder {
    float * lowest;  // values up to here take the code `first`
    float * highest; // values from here on take the code `last`
    float * zero;    // as stored; D = zero + scale * code
    float * scale;
    float * inverse; // 1 / scale, or 0
    float * first;
    float * last;
    float * held; // 1: rows that stay were coded with this range, which is not to change
};

struct pack_kernels {
    // lowest and highest of each group of y [T, d]: infinity and -infinity where a group has no value. NaN marks an entry that does not count.
    void (*extremes)(const tile_layout & layout, const float * y, const group_coder & coder);
    // The codes of y [T, d] into the tile's bit planes. NaN takes code 0.
    void (*encode)(const tile_layout & layout, const float * y, const group_coder & coder, uint8_t * tile);
    // D [T, d] from the tile's bit planes; of the coder only zero and scale are used.
    void (*decode)(const tile_layout & layout, const uint8_t * tile, const group_coder & coder, float * D);
    // A = R B:   R [T, d], A [r][T], B [r][d]
    void (*multiply)(int T, int d, int r, const float * R, const float * B, float * A);
    // B = R^T A
    void (*multiply_transposed)(int T, int d, int r, const float * R, const float * A, float * B);
    // out = x + sign * A B^T:   x, out [T, d]
    void (*add_product)(int T, int d, int r, const float * A, const float * B, float sign, const float * x, float * out);
    // one run of H (tile.h)
    void (*hadamard)(float * x, int d);
    // y += factor[0] rows[0] + factor[1] rows[1] + ..., one after the other: y [n], rows [m][n], `stride` apart. n is a multiple of 16.
    void (*add_multiples)(int n, int m, const float * factor, const float * rows, int stride, float * y);
    // Of a row of one channel, y [T], group by group: lowest and highest as `extremes` has them, at first + i * step in the coder.
    void (*channel_extremes)(int T, int group, const float * y, const group_coder & coder, int first, int step);
    // What coding y loses of x: e = x - D, 0 for NaN.   x, y, e [T]
    void (*channel_error)(int T, int group, const float * x, const float * y, const group_coder & coder, int first, int step, int levels, float * e);
};

extern const pack_kernels pack_kernels_scalar, pack_kernels_avx2, pack_kernels_avx512vnni, pack_kernels_neon;

// Products of vectors add up in this many partial sums on every level.
constexpr int n_partial = 16;

} // namespace gear
