// stored.h - the parts of a tile in their stored precision: scale, zero and factors go into a tile's bytes as ranges.h rounds them, and are read back.
#pragma once

#include "codec/codec.h"
#include "codec/kernels.h"
#include "codec/ranges.h"
#include "common/half.h"

#include <cstring>

namespace gear {

// Entry i of an array of f16.
inline float load_half(const uint8_t * bytes, int64_t i) {
    uint16_t half;
    memcpy(&half, bytes + 2 * i, 2);
    return half_to_float(half);
}

inline void store_half(uint8_t * bytes, int64_t i, uint16_t half) {
    memcpy(bytes + 2 * i, &half, 2);
}

// From each group's lowest and highest value: its scale and zero into the tile, and what values are coded with into the rest of the coder.
//   old: nullptr, or a tile whose lo and hi are not narrowed
void code_ranges(const tile_layout & layout, const group_coder & coder, const uint8_t * old, uint8_t * tile);

// The same for the groups of K's channel c.
void code_channel_ranges(const tile_layout & layout, int c, const group_coder & coder, uint8_t * tile);

// Scale and zero of a group from the tile's bytes.
group_range range_at(const tile_layout & layout, const uint8_t * tile, int group);

// A [r][T] and B [r][d] into the tile. load_factors (codec.h) reads them.
void store_factors(const tile_layout & layout, const float * A, const float * B, uint8_t * tile);

} // namespace gear
