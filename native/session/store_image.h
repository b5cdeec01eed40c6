// store_image.h - one store in a session: which cells it had, their packed tiles as they are, and their exact rows with the order in which they were
// written. Restored to the same cells, of the same stream or of another one that is empty, the store is what it was, bit for bit. Cells that come back
// elsewhere are written as rows, oldest first: their tiles are unpacked and coded again.
//
//     i32 layer, side, KV heads, channels of a head, tile, tail, sinks, streams;  i64 cells of a stream
//     u64 bytes of a head's tile (0: a side kept as f16), u64 format of the tiles (tile_codec::format)
//     u64 n_range;  n_range x { i64 first cell (stream * cells of a stream + cell), i64 cells, u64 offset of the first row in llama.cpp's state }
//     for each stream:  i64 clock, u64 n_tile, u64 n_exact
//                       n_tile  x { i64 tile, u8 [T / 8] bit 1: the tile holds this cell }
//                       n_exact x { i64 cell, i64 clock when written }, oldest first
//     for each stream:  n_tile x [heads, bytes of a head's tile];  n_exact x f16 [heads * channels]
#pragma once

#include "session/format.h"
#include "store/store.h"

#include <functional>
#include <vector>

namespace gear {

// Cells that llama.cpp counts as used.
struct cell_range {
    int64_t  cell;   // global
    int64_t  n;      //
    uint64_t offset; // of the first row within llama.cpp's state
};

struct tile_image {
    int64_t              tile;
    std::vector<uint8_t> in_tile; // [T]
};

struct stream_image {
    int64_t                 clock;
    std::vector<tile_image> tiles;    // ascending
    std::vector<exact_cell> exact;    // oldest first
    uint64_t                tiles_at; // in the input
    uint64_t                rows_at;
};

struct store_image {
    store_shape               shape; // n_ubatch is not kept
    uint64_t                  tile_bytes;
    uint64_t                  format;
    std::vector<cell_range>   ranges; // ascending
    std::vector<stream_image> streams;

    size_t row_bytes() const { return (size_t) shape.n_embd() * sizeof(uint16_t); }
};

// Of the cells in `ranges`, which must ascend.
store_image image_of(const store & cache, const tile_codec * codec, std::vector<cell_range> ranges);
void        write_image(output & out, const store_image & image, const store & cache);

// Throws GEAR_ERROR_DATA when the numbers contradict each other.
store_image read_image(const input & in, const section & from);
// Throws GEAR_ERROR_DATA unless tiles of this codec (nullptr: f16) are what the image holds.
void        require_codec(const store_image & image, const tile_codec * codec);

// Cells that come back, and where to.
struct cell_move {
    int64_t from; // global, in the image
    int64_t n;    //
    int64_t to;   // global, in the target
};

// Rows of any cells, f16 [n, n_embd]; called with at most restore_batch rows at a time.
using row_writer                = std::function<void(int64_t n, const int64_t * cells, const uint16_t * rows)>;
constexpr int64_t restore_batch = 64;

// `moves` must cover the image's cells. target nullptr, or of another shape: everything goes through `write`. codec unpacks the image's tiles.
// Returns the cells whose rows were not restored bit for bit, because they came out of a tile.
int64_t restore_image(const input & in, const store_image & image, std::vector<cell_move> moves, store * target, const tile_codec * codec,
                      const row_writer & write);

} // namespace gear
