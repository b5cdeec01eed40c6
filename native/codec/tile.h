// tile.h - what the bytes of a packed tile mean. The one description of them; CPU and CUDA kernels both follow it.
//
// A tile holds T cells of one KV head, for K or for V: X [T, d]. Paper: GEAR, arXiv 2403.05527, section 3 (X ~ D + L + S).
//
// M (`center`; ours, not the paper's): each channel's mean over the tile's written cells, f16 [d], in the basis that is coded. Everything below then
// describes X - M. A tile has M or S, not both. When attention averages over tokens, errors of either sign cancel but a channel's mean error stays: so the
// mean of what D and L lose is added to M at the end.
//
// w (`rotate` 2; ours): what is coded is H (w o x) for each row x, with one weight a channel, 4 bits each; basis.h says why, and what the bits mean. With
// `rotate` 1 it is H x. H is made of Hadamard transforms of blocks of channels (rotation_run).
//
// Groups. K is quantized per channel: a group is `group` consecutive tokens of one channel. V is quantized per token: a group is `group` consecutive
// channels of one token (the last group of a head may be shorter). Each group has a scale and a zero:   D = zero + scale * code.
//
// Sets. The groups that cover the same channels, whatever their tokens, form a set: for K a set is one channel (n_set = d), for V one channel group
// (n_set = ceil(d / group)). With scale_bits 8, scale and zero are stored as u8 s and z against the set's extremes lo and hi over the tile:
//     zero = lo + (hi - lo) * z / 255          (z rounded down, so that zero <= lowest value of the group)
//     scale = (hi - lo) * s / (255 * levels)   (s rounded up, so that zero + scale * levels >= highest value), levels = 2^bits - 1
// lo is rounded down and hi up to a multiple of the f16 spacing at the larger of the two: spacing = 2^(e - 10) where 2^e <= max(|lo|, |hi|) < 2^(e + 1),
// at least 2^-24. With scale_bits 16, zero is rounded down to f16 and scale up. A group of one value has scale 0. Index of a group's scale and zero:  K:
// [token / group][channel]     V: [channel / group][token]
//
// Which code. A value takes the nearest code, ties to even, but for the ends of its group: the lowest value takes the last code not above it, the highest
// the first code not below it. Then a decoded tile codes to the same bytes again (stored.cpp).
//
// Codes. Both products that attention takes with D run along one axis (the depth) and keep the other (the lanes):
//     K: s_t = sum_c q_c D_tc    depth = channels, lanes = tokens           V: o_c = sum_t p_t D_tc    depth = tokens, lanes = channels
// Codes are stored for the instruction that multiplies 4 bytes by 4 bytes and adds them up into one 32-bit lane (vpdpbusd, vdotq, dp4a): a *line* is
// 64 bytes = 16 lanes x 4 depth. A code of b bits is split into bit planes of 4, 2 and 1 bits (b = 6: planes 4 and 2; b = 3: planes 2 and 1); the
// plane of the lowest bits comes first: 4, then 2, then 1. In a plane of width w, a line holds 8 / w such blocks: two lane halves times 4 / w quads.
//     lane = 32 * lane_block + 16 * half + i        depth = 4 * quad + j        per_line = 4 / w quads of a line
//     line = lane_block * (n_depth / 4 / per_line) + quad / per_line            byte = 64 * line + 4 * i + j
//     shift = w * (2 * (quad % per_line) + half)
// Lanes: K: T. V: d rounded up to 32; the codes of padding lanes are 0.
//
// L = A B^T (section 3, per head): L_tc = sum_k sigma_k A_tk B_ck with A [T, r] and B [d, r] integers, stored column by column: a[k][t], b[k][c].
// factor_bits 8: signed bytes, -127..127. factor_bits 4: value + 8 (1..15) in nibbles; entry e of a column of n lies in byte e % (n/2), high half if
// e >= n/2.
//
// S (section 3, "outliers"): vectors are channels for K (over tokens), tokens for V (over channels). Each has n_outlier = 2 * round(s/2 * length)
// entries: index within the vector, in one byte or, for vectors of more than 256, in two, and the value in f16, which the reconstruction returns exactly,
// D and L notwithstanding. Codes at outliers are 0, so that attention can take D back (it is `zero` there) without unpacking. Outliers have no say in lo,
// hi, scale and zero. A slot that a vector could not fill (a tile only partly written) points at an unwritten cell and holds 0; a slot with the same index
// as an earlier one of its vector never occurs among written cells.
//
// Cells never written have code 0 in every channel, factor 0, and no say in lo, hi, scale, zero or outliers. What unpack gives for them is arbitrary but
// finite: the store knows which cells were written.
#pragma once

#include "common/host_device.h"
#include "gearcpp.h"

#include <cstddef>
#include <cstdint>

namespace gear {

constexpr int    max_tile   = 256;
constexpr int    max_d_head = 576;
constexpr int    max_rank   = 16;
constexpr int    max_depth  = max_tile > max_d_head ? max_tile : max_d_head; // of a tile, and entries of an outlier vector
constexpr size_t tile_align = 64;

struct plane_info {
    int     width;    // bits: 4, 2 or 1
    int     per_line; // depth quads of a line: 4 / width
    int     position; // of the plane's lowest bit in the code
    int64_t offset;   // bytes from the tile's start
};

// Everything that a kernel needs to read one packed tile; made once per (config, side, d_head) by make_layout.
struct tile_layout {
    gear_side_config config;
    gear_tile_layout part; // byte offsets, as the C interface shows them
    gear_side        side;
    int              n_token;  // T
    int              d_head;   // d
    int              levels;   // 2^bits - 1
    int              group;    // resolved: never 0
    int              n_plane;  //
    plane_info       plane[3]; // lowest bits first
};

// Byte and shift of one code within a plane.
struct code_position {
    int64_t byte;  // from the plane's start
    int     shift; //
};

GEAR_HD inline code_position position_of(const plane_info & plane, int n_depth, int lane, int depth) {
    const int     lane_block = lane / 32, half = lane % 32 / 16, i = lane % 16;
    const int     quad = depth / 4, j = depth % 4;
    const int64_t line = (int64_t) lane_block * (n_depth / 4 / plane.per_line) + quad / plane.per_line;
    return { 64 * line + 4 * i + j, plane.width * (2 * (quad % plane.per_line) + half) };
}

// Index of the scale and zero of (token, channel).
GEAR_HD inline int group_of(const tile_layout & layout, int token, int channel) {
    return layout.side == GEAR_SIDE_K ? token / layout.group * layout.d_head + channel : channel / layout.group * layout.n_token + token;
}

// Bytes of an outlier's index within its vector.
GEAR_HD inline int outlier_index_bytes(int length) {
    return length > 256 ? 2 : 1;
}

// Entries of an outlier vector: K's are channels over the tokens, V's tokens over the channels.
GEAR_HD inline int vector_length(const tile_layout & layout) {
    return layout.side == GEAR_SIDE_K ? layout.n_token : layout.d_head;
}

GEAR_HD inline int outlier_index_at(const tile_layout & layout, const uint8_t * tile, int64_t i) {
    const uint8_t * index = tile + layout.part.outlier_index;
    return outlier_index_bytes(vector_length(layout)) == 1 ? index[i] : index[2 * i] | index[2 * i + 1] << 8;
}

GEAR_HD inline void store_outlier_index(const tile_layout & layout, int64_t i, int index, uint8_t * tile) {
    const int n_byte = outlier_index_bytes(vector_length(layout));
    uint8_t * to     = tile + layout.part.outlier_index + n_byte * i;
    to[0]            = (uint8_t) index;
    if (n_byte == 2) {
        to[1] = (uint8_t) (index >> 8);
    }
}

// H goes run by run: from channel `first` on, so many channels, which are transformed in blocks of the largest power of two that divides their number.
// Up to 256 channels are one run (80 = 5 blocks of 16). More are taken apart into powers of two, the largest first (576 = 512 + 64): the wider a block,
// the more an outlier's size is shared out, and one of 512 costs one more step than two of 256. Errors of the choices: docs/architecture.md.
GEAR_HD inline int rotation_run(int d, int first) {
    if (d <= 256) {
        return d;
    }
    int run = 16;
    while (2 * run <= d - first) {
        run *= 2;
    }
    return run;
}

} // namespace gear
