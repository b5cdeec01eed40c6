// codec.h - packing and unpacking of one tile. codec.cpp is the one readable truth: short, scalar, in the paper's notation and order; every fast path is
// tested against it. This room knows no ggml, no cells and no store.
#pragma once

#include "codec/ranges.h"
#include "codec/tile.h"

namespace gear {

class query_moment; // feedback.h

// Throws gear::error when the configuration does not allow this side, head size or tile.
tile_layout make_layout(const gear_config & config, gear_side side, int d_head);

// Throws gear::error with the reason when config is out of range.
void check_config(const gear_config & config);

// The same for the head sizes of the sides that are packed (bits other than 16).
void check_heads(const gear_config & config, int d_head_k, int d_head_v);

// Bytes of scratch that pack_tile needs.
size_t pack_scratch_bytes(const tile_layout & layout);

// Rows of a packed tile that stay while others are written over it. `tile` must not be the one that is being packed.
struct kept_rows {
    const uint8_t * is_kept; // u8 [T]; x is not looked at for these
    const uint8_t * tile;    // as it was packed before
};

// x f32 [T, d]; written u8 [T] or nullptr; tile [layout.part.bytes]; scratch 64-byte aligned. All kernel levels give the same bytes.
// With r = 0 and s = 0, kept rows change only where new ones widen the range of their group.
// basis u8 [d / 2], with rotate 2: nullptr chooses it by x. A tile that keeps rows keeps its basis.
// queries: keys are rounded for what these see (feedback.h), but not beside kept rows. Only where the configuration has feedback.
void pack_tile(const tile_layout & layout, uint32_t seed, const float * x, const uint8_t * written, uint8_t * tile, void * scratch,
               const kept_rows * kept = nullptr, const uint8_t * basis = nullptr, const query_moment * queries = nullptr);

// xhat f32 [T, d]
void unpack_tile(const tile_layout & layout, const uint8_t * tile, float * xhat);

// The same in the basis that is coded, from memory of the caller's. numbers f32 [unpack_numbers(layout)]
size_t unpack_numbers(const tile_layout & layout);
void   unpack_coded(const tile_layout & layout, const uint8_t * tile, float * numbers, float * x);

// H of tile.h: normalized Hadamard transforms of a head's blocks, in place (its own inverse).
void hadamard(float * x, int d);
// H of the first n channels of d and of those that share a run with them. Returns how many those are.
int  hadamard_part(float * x, int d, int n);
int  channels_of_runs(int d, int n);

group_range range_of(const tile_layout & layout, const uint8_t * tile, int token, int channel);
uint8_t     code_of(const tile_layout & layout, const uint8_t * tile, int token, int channel);

// A and B as stored, sigma folded into A:   A f32 [r][T], B f32 [r][d]
void load_factors(const tile_layout & layout, const uint8_t * tile, float * A, float * B);

} // namespace gear
