// restore.cpp - parts of a session: what the cells of a stream are made of, and how they are made the same again.
#include "common/error.h"
#include "store/store.h"

#include <algorithm>
#include <cstring>

namespace gear {

bool store::has_tiles() const {
    return tiles_.size() > 0;
}

int64_t store::room(int stream) const {
    return (int64_t) streams_[stream].free.size();
}

int64_t store::clock(int stream) const {
    return streams_[stream].clock;
}

std::vector<exact_cell> store::exact_cells(int stream) const {
    std::vector<exact_cell> cells;
    for (const exact_row & row : streams_[stream].rows) {
        if (row.cell >= 0) {
            cells.push_back({ row.cell, row.written_at });
        }
    }
    std::sort(cells.begin(), cells.end(), [](const exact_cell & a, const exact_cell & b) { return a.written_at < b.written_at; });
    return cells;
}

void store::put_tile(int index, int tile, const uint8_t * in_tile, const uint8_t * heads) {
    stream_state & stream = streams_.at(index);
    if (tile < 0 || tile >= n_tile_ || !has_tiles() || stream.tiles[tile].n_in_tile > 0) {
        fail(GEAR_ERROR_INTERNAL, "layer %d %s: tile %d of stream %d cannot be put back", shape_.il, name_of(shape_), tile, index);
    }
    memcpy(tile_data(index, tile, 0), heads, shape_.n_head * tile_bytes());
    adopt(index, tile);
    for (int token = 0; token < n_token(tile); ++token) {
        stream.set_in_tile(first_cell(tile) + token, in_tile[token] != 0);
    }
    is_empty_ = false;
}

void store::put_row(int index, const exact_cell & cell, const uint16_t * row) {
    stream_state & stream = streams_.at(index);
    if (cell.cell < 0 || cell.cell >= shape_.n_cell || stream.slot[cell.cell] >= 0 || stream.free.empty()) {
        fail(GEAR_ERROR_INTERNAL, "layer %d %s: the row of cell %lld of stream %d cannot be put back", shape_.il, name_of(shape_), (long long) cell.cell,
             index);
    }
    stream.hold(cell.cell);
    const int32_t slot = stream.slot[cell.cell];
    stream.rows[slot]  = { (int32_t) cell.cell, 0, 0, cell.written_at };
    memcpy(row_data(index, slot), row, row_bytes(shape_));
    put_clock(index, std::max(stream.clock, cell.written_at));
}

void store::put_clock(int index, int64_t clock) {
    streams_.at(index).clock = clock;
    is_empty_                = false;
    allowance_nth_           = 0; // there may be less room than the team was told
}

} // namespace gear
