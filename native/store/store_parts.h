// store_parts.h - what the files of the store share: its sizes, and the structures of a write in progress.
#pragma once

#include "common/memory.h"
#include "gearcpp.h"
#include "store/stream.h"

#include <cstdint>

namespace gear {

struct store_shape;

// A tile worth packing: what that would free.
struct candidate {
    int32_t tile;
    int32_t n_row;    // exact rows that may go
    bool    is_whole; // every cell is written, and every row that is not a sink may go: packing it once is enough
    int64_t newest;   // clock of the newest of these rows
};

struct victim {
    int32_t stream;
    int32_t tile;
};

// Rows that a thread of the team may still see written before somebody has to make room. A cache line each: every thread counts for itself.
struct alignas(cache_line) allowance {
    int64_t n_row = 0;
};

// Above this root mean square error a side packs no more: K's in nats of a score, V's as a share of the rows' own size.
constexpr double most_error(gear_side side) {
    return side == GEAR_SIDE_K ? 2.0 : 0.8;
}

// Tiles of one write whose errors are measured, at most.
constexpr int n_measured = 16;

// Rows of which one is measured where each takes a product of all pairs of channels.
constexpr int score_every = 16;

// The parts of a thread's scratch.
struct pack_scratch {
    float *   x;       // [T, d_head]
    uint8_t * written; // [T]
    uint8_t * kept;    // [T] 1: only the old packed form holds the row
    uint8_t * tile;    // a tile on its way: the old form survives a codec that fails
    float *   row;     // [3, d_head] an exact row, and sums of channels
    uint8_t * codec;
};

// Throws gear::error for a shape that no store has; the sizes below are of those that it lets pass.
void    check_shape(const store_shape & shape);
// Sizes of a store of this shape.
int64_t n_row_of(const store_shape & shape, bool has_codec, int64_t n_ubatch); // of a stream's pool
size_t  row_bytes(const store_shape & shape);
size_t  tiles_bytes(const store_shape & shape, size_t tile_bytes);
size_t  table_bytes(const store_shape & shape, int64_t n_row);

const char * name_of(const store_shape & shape); // "K" or "V"

} // namespace gear
