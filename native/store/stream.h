// stream.h - the tables of one stream of a store: which cell has an exact row, and which cells a packed tile holds. Bookkeeping only: no memory of rows or
// tiles is touched here.
#pragma once

#include <cstdint>
#include <vector>

namespace gear {

inline int n_tile_of(int64_t n_cell, int tile) {
    return (int) ((n_cell + tile - 1) / tile);
}

// One row of the pool.
struct exact_row {
    int32_t cell;       // of its stream, -1: free
    int32_t source;     // index of the row within the write that last named it
    int64_t write;      // number of that write
    int64_t written_at; // the stream's clock when it was written
};

struct tile_state {
    int32_t n_exact;   // cells with an exact row
    int32_t n_packed;  // cells that only the packed tile holds
    int32_t n_in_tile; // cells whose present row the packed tile holds, whether or not there is an exact row too
};

// Every change of a cell's state goes through hold, release and set_in_tile, which keep the counts.
struct stream_state {
    int                     tile;
    std::vector<int32_t>    slot;      // [n_cell] exact row of the cell, -1: none
    std::vector<uint8_t>    in_tile;   // [n_cell] 1: the packed tile holds the cell's present row
    std::vector<tile_state> tiles;     // [n_tile]
    std::vector<exact_row>  rows;      // [n_row]
    std::vector<int32_t>    free;      // slots without a cell, the next one last
    int64_t                 clock = 0; // rows written so far

    // Of the write in progress.
    int64_t n_write     = 0; // its rows in this stream
    int64_t n_need      = 0; // of these, cells without an exact row
    int64_t evict_until = 0; // rows written by then are older than the tail

    void reset(int tile_size, int64_t n_cell, int64_t n_row) {
        tile = tile_size;
        slot.assign(n_cell, -1);
        in_tile.assign(n_cell, 0);
        tiles.assign(n_tile_of(n_cell, tile), { 0, 0, 0 });
        reserve(n_row);
        rows.assign(n_row, { -1, 0, 0, 0 });
        list_free_rows();
        clock = 0;
    }

    // Descending, so that rows are handed out in the order in which they lie in memory.
    void list_free_rows() {
        free.clear();
        for (int64_t i = (int64_t) rows.size() - 1; i >= 0; --i) {
            if (rows[i].cell < 0) {
                free.push_back((int32_t) i);
            }
        }
    }

    void reserve(int64_t n_row) {
        rows.reserve(n_row);
        free.reserve(n_row);
    }

    void enlarge(int64_t n_row) {
        reserve(n_row);
        if (n_row > (int64_t) rows.size()) { // else a copy goes on handing out rows as its origin does
            rows.resize(n_row, { -1, 0, 0, 0 });
            list_free_rows();
        }
    }

    bool    is_written(int64_t cell) const { return slot[cell] >= 0 || in_tile[cell]; }
    int64_t n_without_row() const { return (int64_t) (slot.size() - (rows.size() - free.size())); } // cells

    // Give the cell an exact row.
    void hold(int64_t cell) {
        const int32_t i = free.back();
        free.pop_back();
        slot[cell]        = i;
        rows[i].cell      = (int32_t) cell;
        tile_state & home = tiles[cell / tile];
        home.n_exact += 1;
        home.n_packed -= in_tile[cell];
    }

    // Take it away. What remains is the packed tile's row, or nothing.
    void release(int64_t cell) {
        const int32_t i = slot[cell];
        free.push_back(i);
        slot[cell]        = -1;
        rows[i].cell      = -1;
        tile_state & home = tiles[cell / tile];
        home.n_exact -= 1;
        home.n_packed += in_tile[cell];
    }

    void set_in_tile(int64_t cell, uint8_t value) {
        tile_state & home   = tiles[cell / tile];
        const int    change = value - in_tile[cell];
        home.n_in_tile += change;
        home.n_packed += slot[cell] < 0 ? change : 0;
        in_tile[cell] = value;
    }
};

} // namespace gear
