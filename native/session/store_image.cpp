#include "session/store_image.h"

#include "common/error.h"
#include "common/half_rows.h"
#include "common/memory.h"
#include "store/stream.h"

#include <algorithm>

namespace gear {

namespace {

constexpr int64_t most_cells = INT32_MAX, most_embd = 1 << 24; // so that nothing below can overflow

[[noreturn]] void fail_inconsistent(const store_shape & shape, const char * what) {
    fail(GEAR_ERROR_DATA, "it is inconsistent: layer %d %s: %s", shape.il, shape.side == GEAR_SIDE_K ? "K" : "V", what);
}

// Whether a range has the cell.
bool covers(const std::vector<cell_range> & ranges, int64_t cell) {
    const auto after = std::upper_bound(ranges.begin(), ranges.end(), cell, [](int64_t c, const cell_range & range) { return c < range.cell; });
    return after != ranges.begin() && cell < std::prev(after)->cell + std::prev(after)->n;
}

int64_t target_of(const std::vector<cell_move> & moves, int64_t cell) {
    const auto after = std::upper_bound(moves.begin(), moves.end(), cell, [](int64_t c, const cell_move & move) { return c < move.from; });
    return std::prev(after)->to + (cell - std::prev(after)->from);
}

size_t tile_bytes(const store_image & image) {
    return (size_t) image.shape.n_head * image.tile_bytes;
}

} // namespace

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Saving
// ---------------------------------------------------------------------------------------------------------------------------------------------

store_image image_of(const store & cache, const tile_codec * codec, std::vector<cell_range> ranges) {
    const store_shape & shape = cache.shape();
    store_image         image = { shape, codec ? codec->tile_bytes() : 0, codec ? codec->format() : 0, std::move(ranges), {} };
    for (int index = 0; index < shape.n_stream; ++index) {
        const int64_t first = index * shape.n_cell;
        stream_image  of    = { cache.clock(index), {}, cache.exact_cells(index), 0, 0 };
        of.exact.erase(std::remove_if(of.exact.begin(), of.exact.end(), [&](const exact_cell & e) { return !covers(image.ranges, first + e.cell); }),
                       of.exact.end());
        for (int tile = 0; tile < cache.n_tile(); ++tile) {
            const tile_view view = cache.view(index, tile);
            if (!view.packed) {
                continue;
            }
            tile_image kept  = { tile, std::vector<uint8_t>(shape.tile) };
            bool       holds = false;
            for (int token = 0; token < view.n_token; ++token) {
                kept.in_tile[token] = view.in_tile[token] && covers(image.ranges, first + (int64_t) tile * shape.tile + token);
                holds |= kept.in_tile[token] != 0;
            }
            if (holds) {
                of.tiles.push_back(std::move(kept));
            }
        }
        image.streams.push_back(std::move(of));
    }
    return image;
}

void write_image(output & out, const store_image & image, const store & cache) {
    const store_shape & shape = image.shape;
    for (const int32_t number : { shape.il, (int) shape.side, shape.n_head, shape.d_head, shape.tile, shape.n_tail, shape.n_sink, shape.n_stream }) {
        out.put(number);
    }
    out.put(shape.n_cell);
    out.put(image.tile_bytes);
    out.put(image.format);
    out.put((uint64_t) image.ranges.size());
    for (const cell_range & range : image.ranges) {
        out.put(range.cell);
        out.put(range.n);
        out.put(range.offset);
    }
    std::vector<uint8_t> bits((shape.tile + 7) / 8);
    for (const stream_image & of : image.streams) {
        out.put(of.clock);
        out.put((uint64_t) of.tiles.size());
        out.put((uint64_t) of.exact.size());
        for (const tile_image & kept : of.tiles) {
            std::fill(bits.begin(), bits.end(), 0);
            for (int token = 0; token < shape.tile; ++token) {
                bits[token / 8] |= kept.in_tile[token] << token % 8;
            }
            out.put(kept.tile);
            out.write(bits.data(), bits.size());
        }
        for (const exact_cell & e : of.exact) {
            out.put(e.cell);
            out.put(e.written_at);
        }
    }
    for (int index = 0; index < shape.n_stream; ++index) {
        const stream_image & of = image.streams[index];
        for (const tile_image & kept : of.tiles) {
            out.write(cache.view(index, (int) kept.tile).packed, tile_bytes(image));
        }
        for (const exact_cell & e : of.exact) {
            const tile_view view = cache.view(index, (int) (e.cell / shape.tile));
            out.write(cache.row(index, view.slot[e.cell % shape.tile]), image.row_bytes());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Reading
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

void check_shape(const store_image & image) {
    const store_shape & s         = image.shape;
    const auto          is_within = [](int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; };
    if (!is_within(s.il, 0, 1 << 20) || !is_within(s.n_head, 1, 1 << 16) || !is_within(s.d_head, 1, most_embd / s.n_head) ||
        !is_within(s.tile, 1, 1 << 16) || s.n_tail < 0 || s.n_sink < 0 || !is_within(s.n_stream, 1, 1 << 16) || !is_within(s.n_cell, 1, most_cells) ||
        s.n_cell > most_cells / s.n_stream || image.tile_bytes > (uint64_t) 1 << 32) {
        fail_inconsistent(s, "its shape is out of range");
    }
}

void read_ranges(cursor & from, store_image & image) {
    const int64_t n_all   = image.shape.n_cell * image.shape.n_stream;
    const auto    n_range = from.value<uint64_t>();
    from.require(n_range, 3 * sizeof(int64_t));
    int64_t end = 0; // of the range before
    for (uint64_t i = 0; i < n_range; ++i) {
        const cell_range range = { from.value<int64_t>(), from.value<int64_t>(), from.value<uint64_t>() };
        if (range.cell < end || range.n < 1 || range.n > n_all || range.cell > n_all - range.n) {
            fail_inconsistent(image.shape, "its cells are out of range");
        }
        end = range.cell + range.n;
        image.ranges.push_back(range);
    }
}

stream_image read_stream(cursor & from, const store_image & image, int index) {
    const store_shape & shape   = image.shape;
    const int64_t       first   = index * shape.n_cell;
    const int           n_tile  = n_tile_of(shape.n_cell, shape.tile);
    stream_image        of      = { from.value<int64_t>(), {}, {}, 0, 0 };
    const auto          n_kept  = from.value<uint64_t>();
    const auto          n_exact = from.value<uint64_t>();
    if (of.clock < 0 || of.clock > INT64_MAX / 4 || n_exact > (uint64_t) shape.n_cell || n_kept > (uint64_t) (image.tile_bytes > 0 ? n_tile : 0)) {
        fail_inconsistent(shape, "its tables are out of range");
    }
    std::vector<uint8_t> bits((shape.tile + 7) / 8);
    from.require(n_kept, sizeof(int64_t) + bits.size());
    int64_t next = 0;
    for (uint64_t i = 0; i < n_kept; ++i) {
        tile_image kept = { from.value<int64_t>(), std::vector<uint8_t>(shape.tile) };
        from.bytes(bits.data(), bits.size());
        if (kept.tile < next || kept.tile >= n_tile) {
            fail_inconsistent(shape, "its tiles are out of order");
        }
        next = kept.tile + 1;
        for (int token = 0; token < shape.tile; ++token) {
            const int64_t cell  = kept.tile * shape.tile + token;
            kept.in_tile[token] = bits[token / 8] >> token % 8 & 1;
            if (kept.in_tile[token] && (cell >= shape.n_cell || !covers(image.ranges, first + cell))) {
                fail_inconsistent(shape, "a tile holds a cell that is not used");
            }
        }
        of.tiles.push_back(std::move(kept));
    }
    from.require(n_exact, 2 * sizeof(int64_t));
    std::vector<int64_t> cells; // not a table of all cells: what a session says of its cells must not cost more memory than the session has bytes
    int64_t              before = 0;
    for (uint64_t i = 0; i < n_exact; ++i) {
        const exact_cell e = { from.value<int64_t>(), from.value<int64_t>() };
        if (e.cell < 0 || e.cell >= shape.n_cell || !covers(image.ranges, first + e.cell) || e.written_at <= before || e.written_at > of.clock) {
            fail_inconsistent(shape, "its exact rows are out of order");
        }
        before = e.written_at;
        cells.push_back(e.cell);
        of.exact.push_back(e);
    }
    std::sort(cells.begin(), cells.end());
    if (std::adjacent_find(cells.begin(), cells.end()) != cells.end()) {
        fail_inconsistent(shape, "a cell has two exact rows");
    }
    return of;
}

} // namespace

store_image read_image(const input & in, const section & from) {
    cursor      at(in, from);
    store_image image = {};
    int32_t     numbers[8];
    at.bytes(numbers, sizeof numbers);
    if (numbers[1] != GEAR_SIDE_K && numbers[1] != GEAR_SIDE_V) {
        fail(GEAR_ERROR_DATA, "it is inconsistent: a tensor is neither K nor V");
    }
    image.shape = { numbers[0], (gear_side) numbers[1], numbers[2], numbers[3], at.value<int64_t>(), numbers[7], numbers[4], numbers[5], numbers[6], 1 };
    image.tile_bytes = at.value<uint64_t>();
    image.format     = at.value<uint64_t>();
    check_shape(image);
    read_ranges(at, image);
    for (int index = 0; index < image.shape.n_stream; ++index) {
        image.streams.push_back(read_stream(at, image, index));
    }
    for (stream_image & of : image.streams) {
        at.require(of.tiles.size(), tile_bytes(image));
        of.tiles_at = at.offset();
        at.skip(of.tiles.size() * tile_bytes(image));
        at.require(of.exact.size(), image.row_bytes());
        of.rows_at = at.offset();
        at.skip(of.exact.size() * image.row_bytes());
    }
    if (at.left() != 0) {
        fail_inconsistent(image.shape, "it is longer than its contents");
    }
    return image;
}

void require_codec(const store_image & image, const tile_codec * codec) {
    if (image.tile_bytes != (codec ? codec->tile_bytes() : 0) || image.format != (codec ? codec->format() : 0)) {
        fail(GEAR_ERROR_DATA,
             "layer %d %s: its tiles are of another cache configuration, or of a gearcpp that lays them out differently; load it with the configuration "
             "that it was saved with (presets before 0.2.0 had rotate_k=True)",
             image.shape.il, image.shape.side == GEAR_SIDE_K ? "K" : "V");
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Restoring
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

// Collects rows for a row_writer.
class row_batch {
  public:
    row_batch(size_t n_embd, const row_writer & write) : n_embd_(n_embd), write_(write), rows_(restore_batch * n_embd) { cells_.reserve(restore_batch); }

    // Where the next row goes to.
    uint16_t * add(int64_t cell) {
        if ((int64_t) cells_.size() == restore_batch) {
            finish();
        }
        cells_.push_back(cell);
        return rows_.data() + (cells_.size() - 1) * n_embd_;
    }
    void finish() {
        if (!cells_.empty()) {
            write_((int64_t) cells_.size(), cells_.data(), rows_.data());
            cells_.clear();
        }
    }

  private:
    size_t                n_embd_;
    const row_writer &    write_;
    std::vector<int64_t>  cells_;
    std::vector<uint16_t> rows_;
};

class restorer {
  public:
    restorer(const input & in, const store_image & image, const std::vector<cell_move> & moves, store * target, const tile_codec * codec,
             const row_writer & write)
        : in_(in), image_(image), moves_(moves), target_(fits(image, target) ? target : nullptr), codec_(codec), batch_(image.shape.n_embd(), write) {
        if (codec) {
            heads_.reserve(tile_bytes(image));
            x_.resize((size_t) image.shape.tile * image.shape.d_head);
            scratch_.reserve(codec->scratch_bytes());
        }
    }

    void stream(int index) {
        const stream_image & of       = image_.streams[index];
        home_                         = target_ ? home_of(index) : -1;
        // Rows of a stream before this one may have come here: then the clock runs already, and exact rows cannot go back to the clock that they had.
        is_fresh_                     = home_ >= 0 && target_->clock(home_) == 0;
        const bool           in_place = stays(index);
        std::vector<uint8_t> has_row(image_.shape.n_cell);
        for (const exact_cell & e : of.exact) {
            has_row[e.cell] = 1;
        }
        // Tiles that stay come first: rows may have to be written over them.
        for (const bool moved : { false, true }) {
            for (size_t i = 0; i < of.tiles.size(); ++i) {
                if (stays(index, of.tiles[i]) != moved) {
                    uint8_t * heads = heads_.reserve(tile_bytes(image_));
                    in_.read(of.tiles_at + i * tile_bytes(image_), heads, tile_bytes(image_));
                    moved ? unpack(index, of.tiles[i], heads, has_row) : put(of.tiles[i], heads);
                }
            }
        }
        batch_.finish();
        std::vector<uint16_t> row(image_.shape.n_embd());
        for (size_t i = 0; i < of.exact.size(); ++i) {
            in_.read(of.rows_at + i * image_.row_bytes(), row.data(), image_.row_bytes());
            if (in_place) {
                target_->put_row(home_, of.exact[i], row.data());
            } else {
                std::copy(row.begin(), row.end(), batch_.add(target_of(moves_, index * image_.shape.n_cell + of.exact[i].cell)));
            }
        }
        batch_.finish();
        if (in_place) {
            target_->put_clock(home_, of.clock);
        }
    }

    int64_t n_changed() const { return n_changed_; }

  private:
    // Tiles of the image can lie in the target as they are.
    static bool fits(const store_image & image, const store * target) {
        if (!target) {
            return false;
        }
        const store_shape &a = image.shape, &b = target->shape();
        const bool         has_tiles = std::any_of(image.streams.begin(), image.streams.end(), [](const stream_image & of) { return !of.tiles.empty(); });
        return a.n_head == b.n_head && a.d_head == b.d_head && a.tile == b.tile && a.n_tail == b.n_tail && a.n_sink == b.n_sink &&
               image.tile_bytes == target->tile_bytes() && (!has_tiles || target->has_tiles());
    }

    // The stream of the target that a stream's first cell goes to; -1: it has no cell. A sequence that comes back to another slot has another one.
    int home_of(int index) const {
        const int64_t first = index * image_.shape.n_cell, end = first + image_.shape.n_cell;
        const auto    in_stream = [&](const cell_range & range) { return range.cell < end && first < range.cell + range.n; };
        const auto    range     = std::find_if(image_.ranges.begin(), image_.ranges.end(), in_stream);
        return range == image_.ranges.end() ? -1 : (int) (target_of(moves_, std::max(range->cell, first)) / target_->shape().n_cell);
    }

    // Whether a cell, a tile with all its cells, or a stream with all of its exact rows can be what it was in its home, at the same place.
    bool stays(int index, int64_t cell) const { return target_of(moves_, index * image_.shape.n_cell + cell) == home_ * target_->shape().n_cell + cell; }
    bool stays(int index, const tile_image & kept) const {
        if (!is_fresh_) {
            return false;
        }
        for (int token = 0; token < image_.shape.tile; ++token) {
            if (kept.in_tile[token] && !stays(index, kept.tile * image_.shape.tile + token)) {
                return false;
            }
        }
        return true;
    }
    bool stays(int index) const {
        const stream_image & of = image_.streams[index];
        return is_fresh_ && (int64_t) of.exact.size() <= target_->room(home_) &&
               std::all_of(of.tiles.begin(), of.tiles.end(), [&](const tile_image & kept) { return stays(index, kept); }) &&
               std::all_of(of.exact.begin(), of.exact.end(), [&](const exact_cell & e) { return stays(index, e.cell); });
    }

    void check(const uint8_t * heads) const {
        for (int head = 0; head < image_.shape.n_head; ++head) {
            if (!codec_->is_sound(heads + head * image_.tile_bytes)) {
                fail(GEAR_ERROR_DATA, "it is inconsistent: a packed tile of layer %d points outside of itself", image_.shape.il);
            }
        }
    }

    void put(const tile_image & kept, const uint8_t * heads) {
        check(heads);
        target_->put_tile(home_, (int) kept.tile, kept.in_tile.data(), heads);
    }

    // Cells that have an exact row, too, are left to it.
    void unpack(int index, const tile_image & kept, const uint8_t * heads, const std::vector<uint8_t> & has_row) {
        check(heads);
        const store_shape &   shape = image_.shape;
        const size_t          d     = shape.d_head;
        std::vector<uint16_t> rows((size_t) shape.tile * shape.n_embd());
        for (int head = 0; head < shape.n_head; ++head) {
            codec_->unpack(heads + head * image_.tile_bytes, x_.data(), scratch_.reserve(codec_->scratch_bytes()));
            for (int token = 0; token < shape.tile; ++token) {
                float_to_half(x_.data() + token * d, rows.data() + (size_t) token * shape.n_embd() + head * d, shape.d_head);
            }
        }
        for (int token = 0; token < shape.tile; ++token) {
            const int64_t cell = kept.tile * shape.tile + token;
            if (kept.in_tile[token] && !has_row[cell]) {
                const uint16_t * row = rows.data() + (size_t) token * shape.n_embd();
                std::copy_n(row, shape.n_embd(), batch_.add(target_of(moves_, index * shape.n_cell + cell)));
                ++n_changed_;
            }
        }
    }

    const input &                  in_;
    const store_image &            image_;
    const std::vector<cell_move> & moves_;
    store *                        target_; // nullptr: rows only
    const tile_codec *             codec_;
    row_batch                      batch_;
    aligned_buffer                 heads_, scratch_;
    std::vector<float>             x_;                 // [T, d_head]
    int                            home_      = -1;    // where the stream in hand goes to
    bool                           is_fresh_  = false; // nothing was written there
    int64_t                        n_changed_ = 0;
};

} // namespace

int64_t restore_image(const input & in, const store_image & image, std::vector<cell_move> moves, store * target, const tile_codec * codec,
                      const row_writer & write) {
    std::sort(moves.begin(), moves.end(), [](const cell_move & a, const cell_move & b) { return a.from < b.from; });
    auto    move = moves.begin();
    int64_t at   = 0; // the next cell to be found
    for (const cell_range & range : image.ranges) {
        for (at = range.cell; at < range.cell + range.n; at += move->n, ++move) {
            if (move == moves.end() || move->from != at || move->n < 1 || move->n > range.cell + range.n - at) {
                fail(GEAR_ERROR_DATA, "llama.cpp did not take back what it saved of layer %d: is this another release of it?", image.shape.il);
            }
        }
    }
    if (move != moves.end()) {
        fail(GEAR_ERROR_DATA, "llama.cpp took back more than it saved of layer %d: is this another release of it?", image.shape.il);
    }
    restorer restore(in, image, moves, target, codec, write);
    for (int index = 0; index < image.shape.n_stream; ++index) {
        restore.stream(index);
    }
    return restore.n_changed();
}

} // namespace gear
