// eviction.cpp - making room in the pool: which tiles are packed when a write needs rows, and how a tile is packed out of exact rows and its old form.
#include "common/error.h"
#include "common/half_rows.h"
#include "store/store.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace gear {

namespace {

// It belongs to the thread, so that all stores share it.
thread_local aligned_buffer scratch_of_thread;

} // namespace

size_t store::scratch_bytes() const {
    const size_t x = (size_t) shape_.tile * shape_.d_head * sizeof(float), row_scratch = (size_t) 3 * shape_.d_head * sizeof(float);
    return codec_ ? padded(x) + 2 * padded(shape_.tile) + padded(tile_bytes()) + padded(row_scratch) + padded(codec_->scratch_bytes()) : 0;
}

pack_scratch store::scratch() const {
    pack_scratch parts;
    uint8_t *    data = scratch_of_thread.reserve(scratch_bytes());
    parts.x           = (float *) data;
    parts.written     = data + padded((size_t) shape_.tile * shape_.d_head * sizeof(float));
    parts.kept        = parts.written + padded(shape_.tile);
    parts.tile        = parts.kept + padded(shape_.tile);
    parts.row         = (float *) (parts.tile + padded(tile_bytes()));
    parts.codec       = (uint8_t *) parts.row + padded((size_t) 3 * shape_.d_head * sizeof(float));
    return parts;
}

bool store::may_leave(const stream_state & stream, const exact_row & row) const {
    return row.cell >= shape_.n_sink && row.written_at <= stream.evict_until && row.write != n_write_;
}

// Tiles with rows that may go. A row that its tile holds already goes at once: it costs nothing.
void store::find_candidates(stream_state & stream) {
    candidates_.clear();
    for (const exact_row & row : stream.rows) {
        if (!may_leave(stream, row)) {
            continue;
        }
        if (stream.in_tile[row.cell]) {
            stream.release(row.cell);
            continue;
        }
        const int32_t tile  = row.cell / shape_.tile;
        int32_t &     index = candidate_of_[tile];
        if (index < 0) {
            index = (int32_t) candidates_.size();
            candidates_.push_back({ tile, 0, false, 0 });
        }
        candidate & found = candidates_[index];
        found.n_row += 1;
        found.newest = std::max(found.newest, row.written_at);
    }
    for (candidate & found : candidates_) {
        const tile_state & home   = stream.tiles[found.tile];
        const int          n_sink = (int) std::clamp<int64_t>(shape_.n_sink - first_cell(found.tile), 0, n_token(found.tile));
        found.is_whole            = home.n_exact + home.n_packed == n_token(found.tile) && found.n_row == home.n_exact - n_sink;
        candidate_of_[found.tile] = -1;
    }
}

// The coldest tiles that free what the write needs, whole ones first.
void store::choose_victims(int index) {
    stream_state & stream = streams_[index];
    if (stream.n_need <= (int64_t) stream.free.size()) {
        return;
    }
    find_candidates(stream);
    std::sort(candidates_.begin(), candidates_.end(), [](const candidate & a, const candidate & b) {
        return a.is_whole != b.is_whole ? a.is_whole : a.newest != b.newest ? a.newest < b.newest : a.tile < b.tile;
    });
    int64_t n_free = (int64_t) stream.free.size();
    for (size_t i = 0; i < candidates_.size() && n_free < stream.n_need; ++i) {
        victims_.push_back({ index, candidates_[i].tile });
        n_free += candidates_[i].n_row;
    }
    if (n_free < stream.n_need) {
        fail(GEAR_ERROR_INTERNAL, "layer %d %s: no room for %lld rows in a pool of %lld: please report this as a defect of gearcpp", shape_.il,
             name_of(shape_), (long long) stream.n_need, (long long) n_row_);
    }
}

// One head of a tile from its exact rows and what its packed form holds of the others, to parts.x, written and kept. Sinks are left out: they never leave
// the pool, and their extreme values would widen the ranges of their neighbours.
//   marked u8 [n_token], changed f16 [n_token, n_embd]: rows that take the place of the present ones (nullptr: none)
void store::load_head(int index, int64_t tile, int head, const uint8_t * marked, const uint16_t * changed, const pack_scratch & parts) const {
    const stream_state & stream  = streams_[index];
    const int            d_head  = shape_.d_head;
    const int64_t        first   = first_cell(tile);
    const int            n_valid = n_token(tile);
    if (stream.tiles[tile].n_packed > 0) {
        codec_->unpack(tile_data(index, tile, head), parts.x, parts.codec);
    }
    for (int token = 0; token < shape_.tile; ++token) {
        const int64_t cell   = first + token;
        float *       x      = parts.x + (size_t) token * d_head;
        parts.written[token] = token < n_valid && cell >= shape_.n_sink && stream.is_written(cell);
        parts.kept[token]    = 0;
        if (!parts.written[token]) {
            std::fill(x, x + d_head, 0.0f);
        } else if (marked && marked[token]) {
            half_to_float(changed + (size_t) token * shape_.n_embd() + (size_t) head * d_head, x, d_head);
        } else if (stream.slot[cell] >= 0) {
            half_to_float(row_data(index, stream.slot[cell]) + (size_t) head * d_head, x, d_head);
        } else {
            parts.kept[token] = 1;
        }
    }
}

bool store::encode(int index, int64_t tile, int head, const uint8_t * marked, const uint16_t * changed, uint8_t * target) const {
    const pack_scratch parts   = scratch();
    const bool         has_old = streams_[index].tiles[tile].n_packed > 0;
    const uint8_t *    old     = tile_data(index, tile, head);
    load_head(index, tile, head, marked, changed, parts);
    const int64_t global = index * shape_.n_cell + first_cell(tile);
    return has_old ? codec_->repack(head, global, parts.x, parts.written, parts.kept, old, target, parts.codec)
                   : codec_->pack(head, global, parts.x, parts.written, target, parts.codec);
}

// What became of the rows that a tile was packed from and that are still in the pool.   packed: the head's tile
head_error store::measure(int index, int64_t tile, int head, const uint8_t * packed) const {
    const stream_state & stream = streams_[index];
    const int            d_head = shape_.d_head;
    const pack_scratch   parts  = scratch();
    float *const exact = parts.row, *const square = exact + d_head, *const size = square + d_head; // sums of a channel: (x - x^)^2, x^2
    const bool knows_pairs = codec_->knows_pairs(head);
    head_error sum;
    std::fill(square, square + 2 * d_head, 0.0f);
    codec_->unpack(packed, parts.x, parts.codec);
    for (int token = 0; token < n_token(tile); ++token) {
        const int64_t cell = first_cell(tile) + token;
        if (cell < shape_.n_sink || stream.slot[cell] < 0) {
            continue;
        }
        const float * x_hat = parts.x + (size_t) token * d_head;
        half_to_float(row_data(index, stream.slot[cell]) + (size_t) head * d_head, exact, d_head);
        for (int c = 0; c < d_head; ++c) {
            size[c] += exact[c] * exact[c];
            exact[c] -= x_hat[c];
            square[c] += exact[c] * exact[c];
        }
        if (knows_pairs && sum.n_row % score_every == 0) {
            sum.scores += codec_->score_square(head, exact);
            sum.n_score += 1;
        }
        sum.n_row += 1;
    }
    const double * weight = knows_pairs ? nullptr : codec_->score_weights(head);
    for (int c = 0; c < d_head; ++c) {
        sum.squares += square[c];
        sum.of += size[c];
        sum.scores += weight ? weight[c] * square[c] : 0;
    }
    sum.n_score += weight ? sum.n_row : 0;
    return sum;
}

// Thread 0, after the tiles of a write were packed.
void store::note_errors() {
    const size_t n = std::min<size_t>(victims_.size(), n_measured);
    for (size_t i = 0; i < n * errors_.size(); ++i) {
        head_error &       sum   = errors_[i % errors_.size()];
        const head_error & fresh = fresh_errors_[i];
        if (!std::isfinite(fresh.of + fresh.squares + fresh.scores)) {
            continue; // a row that is no number says nothing
        }
        sum.add(fresh);
    }
    const bool is_beyond =
        std::any_of(errors_.begin(), errors_.end(), [&](const head_error & of) { return of.root(shape_.side) > most_error(shape_.side); });
    if (is_beyond && outlook_ == outlook::packs) {
        outlook_ = outlook::should_stay_exact;
    }
}

// Before the first tile is packed, one thread shows it to the codec: what it learns then does not depend on the number of threads.
void store::teach(int index, int64_t tile, const uint8_t * marked, const uint16_t * changed) const {
    for (int head = 0; head < shape_.n_head; ++head) {
        if (codec_->wants_to_learn(head)) {
            const pack_scratch parts = scratch();
            load_head(index, tile, head, marked, changed, parts);
            codec_->learn(head, parts.x, parts.written);
        }
    }
}

// The codec goes on as tiles that came from elsewhere begin.
void store::adopt(int index, int64_t tile) const {
    for (int head = 0; head < shape_.n_head; ++head) {
        codec_->adopt(head, tile_data(index, tile, head));
    }
}

void store::mark_packed(int index, int64_t tile) {
    stream_state & stream = streams_[index];
    for (int64_t cell = std::max<int64_t>(first_cell(tile), shape_.n_sink), end = first_cell(tile) + n_token(tile); cell < end; ++cell) {
        if (stream.is_written(cell)) {
            stream.set_in_tile(cell, 1);
        }
    }
    ++n_pack_;
}

void store::pack_victims(const team & t) {
    const int64_t n_job = (int64_t) victims_.size() * shape_.n_head;
    for (int64_t job = t.ith; job < n_job && !failed_; job += t.nth) {
        const victim & v    = victims_[job / shape_.n_head];
        const int      head = (int) (job % shape_.n_head);
        attempt([&] {
            uint8_t * fresh = scratch().tile;
            if (!encode(v.stream, v.tile, head, nullptr, nullptr, fresh)) {
                fail(GEAR_ERROR_CALLBACK, "layer %d %s: the codec failed on head %d of the tile at cell %lld of stream %d; nothing was written", shape_.il,
                     name_of(shape_), head, (long long) first_cell(v.tile), v.stream);
            }
            memcpy(tile_data(v.stream, v.tile, head), fresh, tile_bytes());
            if (!errors_.empty() && job / shape_.n_head < n_measured) {
                fresh_errors_[job] = measure(v.stream, v.tile, head, fresh);
            }
        });
    }
}

void store::release_victims() {
    note_errors();
    for (const victim & v : victims_) {
        stream_state & stream = streams_[v.stream];
        mark_packed(v.stream, v.tile);
        for (int64_t first = first_cell(v.tile), cell = first + n_token(v.tile) - 1; cell >= first; --cell) { // the lowest slot is taken first again
            if (stream.slot[cell] >= 0 && may_leave(stream, stream.rows[stream.slot[cell]])) {
                stream.release(cell);
            }
        }
    }
}

} // namespace gear
