#include "store/store.h"

#include "common/error.h"
#include "common/half_rows.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace gear {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Sizes
// ---------------------------------------------------------------------------------------------------------------------------------------------

const char * name_of(const store_shape & shape) {
    return shape.side == GEAR_SIDE_K ? "K" : "V";
}

// Rows of a stream's pool: sinks, tail and a write in progress stay exact at once, and a tile may be partly older than the tail.
int64_t n_row_of(const store_shape & shape, bool has_codec, int64_t n_ubatch) {
    const int64_t     wanted    = (int64_t) shape.n_sink + shape.n_tail + n_ubatch + shape.tile;
    constexpr int64_t pool_step = 32; // the pool is a multiple of this many rows
    return has_codec ? std::min(shape.n_cell, (wanted + pool_step - 1) / pool_step * pool_step) : shape.n_cell;
}

namespace {

bool packs(const store_shape & shape, size_t tile_bytes) {
    return tile_bytes > 0 && (int64_t) shape.n_sink + shape.n_tail < shape.n_cell;
}

} // namespace

size_t row_bytes(const store_shape & shape) {
    return (size_t) shape.n_embd() * sizeof(uint16_t);
}

size_t tiles_bytes(const store_shape & shape, size_t tile_bytes) {
    return packs(shape, tile_bytes) ? (size_t) shape.n_stream * n_tile_of(shape.n_cell, shape.tile) * shape.n_head * tile_bytes : 0;
}

size_t table_bytes(const store_shape & shape, int64_t n_row) {
    const size_t n_tile    = n_tile_of(shape.n_cell, shape.tile);
    const size_t of_stream = shape.n_cell * (sizeof(int32_t) + sizeof(uint8_t)) + n_row * (sizeof(exact_row) + sizeof(int32_t)) +
                             n_tile * (sizeof(tile_state) + sizeof(victim));
    return shape.n_stream * of_stream + n_tile * (sizeof(int32_t) + sizeof(candidate));
}

void check_shape(const store_shape & shape) {
    if (shape.n_head < 1 || shape.d_head < 1 || shape.n_cell < 1 || shape.n_cell > INT32_MAX || shape.n_stream < 1 || shape.tile < 1 || shape.n_tail < 0 ||
        shape.n_sink < 0 || shape.n_ubatch < 1) {
        fail(GEAR_ERROR_INVALID,
             "layer %d %s: no store has %d heads of %d channels, %lld cells in %d streams, tiles of %d, tail %d, sinks %d, writes of %d rows", shape.il,
             name_of(shape), shape.n_head, shape.d_head, (long long) shape.n_cell, shape.n_stream, shape.tile, shape.n_tail, shape.n_sink, shape.n_ubatch);
    }
    // So far no number of bytes below can overflow.
    constexpr double most_elements = (double) ((int64_t) 1 << 54);
    if (shape.n_head > INT32_MAX / shape.d_head || (double) shape.n_stream * (double) shape.n_cell * shape.n_embd() > most_elements) {
        fail(GEAR_ERROR_MEMORY, "layer %d %s: %d heads of %d channels with %lld cells in %d streams are more than any machine has memory for", shape.il,
             name_of(shape), shape.n_head, shape.d_head, (long long) shape.n_cell, shape.n_stream);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Making it
// ---------------------------------------------------------------------------------------------------------------------------------------------

store::store(const store_shape & shape, std::shared_ptr<const tile_codec> codec) {
    check_shape(shape);
    char what[64];
    snprintf(what, sizeof what, "the %s cache of layer %d", name_of(shape), shape.il);
    const size_t tile_bytes = codec ? codec->tile_bytes() : 0;
    require_memory(bytes(shape, tile_bytes), what);

    shape_      = shape;
    codec_      = std::move(codec);
    n_tile_     = n_tile_of(shape.n_cell, shape.tile);
    n_row_      = n_row_of(shape, codec_ != nullptr, shape.n_ubatch);
    n_row_most_ = shape.n_ubatch;
    tiles_      = mapping(tiles_bytes(shape, tile_bytes));
    pool_       = mapping(shape.n_stream * n_row_ * row_bytes(shape));
    streams_.resize(shape.n_stream);
    for (stream_state & stream : streams_) {
        stream.reset(shape.tile, shape.n_cell, n_row_);
    }
    if (codec_ && codec_->measures_error()) {
        errors_.resize(shape.n_head);
        fresh_errors_.resize((size_t) n_measured * shape.n_head);
    }
    candidate_of_.assign(n_tile_, -1);
    candidates_.reserve(n_tile_);
    victims_.reserve((size_t) shape.n_stream * n_tile_);
}

size_t store::bytes(const store_shape & shape, size_t tile_bytes) {
    const int64_t n_row = n_row_of(shape, tile_bytes > 0, shape.n_ubatch);
    return tiles_bytes(shape, tile_bytes) + shape.n_stream * n_row * row_bytes(shape) + table_bytes(shape, n_row);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Reading and rewriting
// ---------------------------------------------------------------------------------------------------------------------------------------------

void store::require_range(int64_t cell, int64_t n, const char * what) const {
    const int64_t n_all = shape_.n_cell * shape_.n_stream;
    if (cell < 0 || n < 0 || cell > n_all - n) {
        fail(GEAR_ERROR_INVALID, "layer %d %s: cannot %s %lld cells from cell %lld on: the cache has cells 0 to %lld", shape_.il, name_of(shape_), what,
             (long long) n, (long long) cell, (long long) n_all - 1);
    }
}

// rows f16 [last - first, n_embd]: tokens first .. last - 1 of a tile
void store::read_tile(int index, int64_t tile, int first, int last, uint16_t * rows) const {
    const stream_state & stream     = streams_[index];
    const int64_t        cell0      = first_cell(tile);
    const size_t         n_embd     = shape_.n_embd();
    bool                 has_packed = false;
    for (int token = first; token < last; ++token) {
        const int32_t slot = stream.slot[cell0 + token];
        uint16_t *    out  = rows + (token - first) * n_embd;
        if (slot >= 0) {
            memcpy(out, row_data(index, slot), row_bytes(shape_));
        } else if (stream.in_tile[cell0 + token]) {
            has_packed = true;
        } else {
            memset(out, 0, row_bytes(shape_));
        }
    }
    for (int head = 0; has_packed && head < shape_.n_head; ++head) {
        const pack_scratch parts = scratch();
        codec_->unpack(tile_data(index, tile, head), parts.x, parts.codec);
        for (int token = first; token < last; ++token) {
            if (stream.slot[cell0 + token] < 0 && stream.in_tile[cell0 + token]) {
                float_to_half(parts.x + (size_t) token * shape_.d_head, rows + (token - first) * n_embd + (size_t) head * shape_.d_head, shape_.d_head);
            }
        }
    }
}

// marked u8 [n_token]
void store::rewrite_tile(int index, int64_t tile, const uint8_t * marked, const rewrite & f) {
    stream_state &        stream = streams_[index];
    const int64_t         first  = first_cell(tile);
    const int             n      = n_token(tile);
    const size_t          n_embd = shape_.n_embd();
    std::vector<uint16_t> rows(n * n_embd);
    read_tile(index, tile, 0, n, rows.data());
    f(index * shape_.n_cell + first, n, rows.data());

    bool is_stale = false; // the packed tile holds a row that has changed
    for (int token = 0; token < n; ++token) {
        is_stale |= marked[token] && stream.in_tile[first + token];
    }
    if (is_stale) {
        aligned_buffer fresh;
        uint8_t *      heads = fresh.reserve(shape_.n_head * tile_bytes());
        teach(index, tile, marked, rows.data());
        for (int head = 0; head < shape_.n_head; ++head) {
            if (!encode(index, tile, head, marked, rows.data(), heads + head * tile_bytes())) {
                fail(GEAR_ERROR_CALLBACK, "layer %d %s: the codec failed on head %d of the tile at cell %lld of stream %d while its rows were changed",
                     shape_.il, name_of(shape_), head, (long long) first, index);
            }
        }
        memcpy(tile_data(index, tile, 0), heads, shape_.n_head * tile_bytes());
        mark_packed(index, tile);
    }
    for (int token = 0; token < n; ++token) {
        const int32_t slot = stream.slot[first + token];
        if (marked[token] && slot >= 0) {
            memcpy(row_data(index, slot), rows.data() + token * n_embd, row_bytes(shape_));
        }
    }
}

void store::read(int64_t cell, int64_t n, uint16_t * rows) const {
    require_range(cell, n, "read");
    while (n > 0) {
        const int64_t local = cell % shape_.n_cell, tile = local / shape_.tile;
        const int     first = (int) (local - first_cell(tile));
        const int     last  = (int) std::min<int64_t>(n_token(tile), first + n);
        read_tile((int) (cell / shape_.n_cell), tile, first, last, rows);
        cell += last - first;
        n -= last - first;
        rows += (size_t) (last - first) * shape_.n_embd();
    }
}

void store::erase(int64_t cell, int64_t n) {
    require_range(cell, n, "erase");
    for (; n > 0; ++cell, --n) {
        stream_state & stream = streams_[cell / shape_.n_cell];
        const int64_t  local  = cell % shape_.n_cell;
        stream.set_in_tile(local, 0);
        if (stream.slot[local] >= 0) {
            stream.release(local);
        }
    }
}

void store::keep(const uint8_t * marked) {
    bool is_empty = true;
    for (int index = 0; index < shape_.n_stream; ++index) {
        stream_state &       stream = streams_[index];
        const uint8_t *      mark   = marked + index * shape_.n_cell;
        bool                 any    = false;
        std::vector<int64_t> gone; // when the exact rows were written that go now
        for (int64_t cell = 0; cell < shape_.n_cell; ++cell) {
            any = any || (mark[cell] && stream.is_written(cell));
            if (!mark[cell] && stream.slot[cell] >= 0) {
                gone.push_back(stream.rows[stream.slot[cell]].written_at);
            }
        }
        if (!any) {
            stream.reset(shape_.tile, shape_.n_cell, n_row_);
            continue;
        }
        is_empty = false;
        for (int64_t cell = 0; cell < shape_.n_cell; ++cell) {
            if (!mark[cell] && stream.is_written(cell)) {
                erase(index * shape_.n_cell + cell, 1);
            }
        }
        std::sort(gone.begin(), gone.end());
        for (exact_row & row : stream.rows) {
            row.written_at -= std::lower_bound(gone.begin(), gone.end(), row.written_at) - gone.begin();
        }
        stream.clock -= (int64_t) gone.size();
    }
    if (is_empty) {
        clear();
    }
    allowance_nth_ = 0; // what the team was told holds no more
}

void store::clear() {
    if (is_empty_) {
        return;
    }
    if (outlook_ == outlook::stays_exact) {
        pool_.discard();
    }
    n_row_         = n_row_of(shape_, codec_ != nullptr, shape_.n_ubatch); // a pool that grew is a new store's again
    n_row_most_    = shape_.n_ubatch;
    allowance_nth_ = 0;
    for (stream_state & stream : streams_) {
        stream.reset(shape_.tile, shape_.n_cell, n_row_);
    }
    tiles_.discard();
    forget();
    is_empty_ = true;
}

// What was learned of rows that are gone.
void store::forget() {
    std::fill(errors_.begin(), errors_.end(), head_error());
    outlook_ = outlook::packs;
    if (codec_) {
        codec_->forget();
    }
}

void store::copy_stream(int from, const store & source, int to) {
    const store_shape & a = shape_;
    const store_shape & b = source.shape_;
    if (a.side != b.side || a.n_head != b.n_head || a.d_head != b.d_head || a.n_cell != b.n_cell || a.tile != b.tile || a.n_tail != b.n_tail ||
        a.n_sink != b.n_sink || tile_bytes() != source.tile_bytes()) {
        fail(GEAR_ERROR_INVALID, "layer %d %s: a stream can only be copied between caches of one shape and configuration", a.il, name_of(a));
    }
    if (from < 0 || from >= b.n_stream || to < 0 || to >= a.n_stream) {
        fail(GEAR_ERROR_INVALID, "layer %d %s: cannot copy stream %d of %d to stream %d of %d", a.il, name_of(a), from, b.n_stream, to, a.n_stream);
    }
    if (this == &source && from == to) {
        return;
    }
    enlarge_pool(std::max(n_row_most_, source.n_row_most_));
    if (source.n_row_ > n_row_) { // only of a side that stays exact
        resize_pool(source.n_row_);
        outlook_ = source.outlook_;
    }
    stream_state &       target = streams_[to];
    const stream_state & origin = source.streams_[from];

    target = origin;
    target.enlarge(n_row_);
    for (int64_t i = 0; i < source.n_row_; ++i) {
        target.rows[i].write = 0; // numbers of the source's writes mean nothing here
        if (origin.rows[i].cell >= 0) {
            memcpy(row_data(to, i), source.row_data(from, i), row_bytes(a));
        }
    }
    for (int tile = 0; tile < n_tile_; ++tile) {
        if (origin.tiles[tile].n_in_tile > 0) {
            memcpy(tile_data(to, tile, 0), source.tile_data(from, tile, 0), a.n_head * tile_bytes());
            adopt(to, tile);
        }
    }
    is_empty_      = false;
    allowance_nth_ = 0; // there may be less room than the team was told
}

void store::update(const uint8_t * marked, const rewrite & f) {
    for (int index = 0; index < shape_.n_stream; ++index) {
        for (int64_t tile = 0; tile < n_tile_; ++tile) {
            const uint8_t * first = marked + index * shape_.n_cell + first_cell(tile);
            if (std::any_of(first, first + n_token(tile), [](uint8_t mark) { return mark != 0; })) {
                rewrite_tile(index, tile, first, f);
            }
        }
    }
}

tile_view store::view(int stream, int tile) const {
    const stream_state & of    = streams_[stream];
    const tile_state &   home  = of.tiles[tile];
    const int64_t        first = first_cell(tile);
    return { home.n_in_tile > 0 ? tile_data(stream, tile, 0) : nullptr,
             of.slot.data() + first,
             of.in_tile.data() + first,
             n_token(tile),
             home.n_exact,
             home.n_packed };
}

void store::put_errors(const std::vector<head_error> & heads) {
    std::copy(heads.begin(), heads.end(), errors_.begin());
    outlook_ = outlook::cannot_stay_exact;
}

void describe_errors(const std::vector<head_error> & heads, gear_store_stats & stats) {
    const auto side = (gear_side) stats.side;
    head_error sum;
    stats.worst_head  = -1;
    stats.worst_error = std::numeric_limits<double>::quiet_NaN();
    for (size_t head = 0; head < heads.size(); ++head) {
        const head_error & of = heads[head];
        sum.add(of);
        if (of.root(side) > (stats.worst_head < 0 ? -1.0 : stats.worst_error)) {
            stats.worst_head  = (int32_t) head;
            stats.worst_error = of.root(side);
        }
    }
    stats.error       = sum.relative();
    stats.score_error = sum.score();
}

gear_store_stats store::stats() const {
    gear_store_stats stats = {};
    stats.il               = shape_.il;
    stats.side             = shape_.side;
    stats.kind             = codec_ ? 0 : 3;
    stats.n_head_kv        = shape_.n_head;
    stats.d_head           = shape_.d_head;
    stats.n_stream         = shape_.n_stream;
    stats.n_cell           = shape_.n_cell;
    stats.n_pack           = n_pack_;
    for (const stream_state & stream : streams_) {
        for (const tile_state & tile : stream.tiles) {
            stats.n_exact += tile.n_exact;
            stats.n_packed += tile.n_packed;
            stats.bytes_tiles_used += tile.n_in_tile > 0 ? shape_.n_head * tile_bytes() : 0;
        }
    }
    stats.n_written    = stats.n_exact + stats.n_packed;
    stats.bytes_tiles  = tiles_.size();
    stats.bytes_exact  = shape_.n_stream * n_row_ * row_bytes(shape_);
    stats.bytes_tables = (int64_t) (table_bytes(shape_, n_row_) + (codec_ ? codec_->learned_bytes() : 0));
    stats.bytes_f16    = shape_.n_stream * shape_.n_cell * row_bytes(shape_);
    stats.stays_exact  = outlook_ == outlook::stays_exact;
    describe_errors(errors_, stats);
    stats.bits_per_element = codec_ ? 8.0 * tile_bytes() / ((double) shape_.tile * shape_.d_head) : 16.0;
    return stats;
}

} // namespace gear
