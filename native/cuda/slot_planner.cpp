#include "cuda/slot_planner.h"

#include "common/error.h"

#include <algorithm>
#include <cstring>

namespace gear::cuda {

// Records the tiles that the store asks it to pack. While it is asked, the store's tables are as they were before the write.
class slot_planner::recording_codec final : public tile_codec {
  public:
    size_t tile_bytes() const override { return tile_align; }
    size_t scratch_bytes() const override { return 0; }
    void   unpack(const uint8_t *, float * x, void *) const override { std::fill_n(x, n_token, 0.0f); }

    bool pack(int head, int64_t first_cell, const float * x, const uint8_t * written, uint8_t * tile, void * scratch) const override {
        return repack(head, first_cell, x, written, nullptr, nullptr, tile, scratch);
    }

    bool repack(int, int64_t first_cell, const float *, const uint8_t * written, const uint8_t * kept, const uint8_t *, uint8_t *, void *) const override {
        const int64_t   n_cell = cells->shape().n_cell, local = first_cell % n_cell;
        const int       stream = (int) (first_cell / n_cell), index = (int) (local / n_token);
        const tile_view view = cells->view(stream, index);
        plan->jobs.push_back({ stream, index });
        for (int t = 0; t < n_token; ++t) {
            plan->source.push_back(!written[t] ? slot_absent : kept && kept[t] ? slot_packed : is_update ? t : view.slot[t]);
        }
        return true;
    }

    const store * cells     = nullptr;
    slot_plan *   plan      = nullptr;
    int           n_token   = 0;
    bool          is_update = false;
};

void slot_planner::make_store(const store_shape & shape) {
    cells_ = std::make_unique<store>(shape, codec_);
    if (codec_) {
        codec_->cells   = cells_.get();
        codec_->n_token = shape.tile;
    }
}

slot_planner::slot_planner(const store_shape & like, bool has_tiles) {
    store_shape shape = like;
    shape.n_head = shape.d_head = 1;
    codec_                      = has_tiles ? std::make_shared<recording_codec>() : nullptr;
    make_store(shape);
    const size_t n_tile = (size_t) shape.n_stream * cells_->n_tile();
    slots_.assign((size_t) (shape.n_stream * shape.n_cell), slot_absent);
    n_exact_.assign(shape.n_stream, 0);
    n_exact_of_.assign(n_tile, 0);
    n_packed_of_.assign(n_tile, 0);
    is_touched_.assign(n_tile, 0);
    count_rows();
}

slot_planner::slot_planner(const slot_planner & other) : slot_planner(other.shape(), other.codec_ != nullptr) {
    for (int stream = 0; stream < shape().n_stream; ++stream) {
        cells_->copy_stream(stream, *other.cells_, stream); // slots stay what they are
    }
    count_rows();
    slots_       = other.slots_;
    n_exact_     = other.n_exact_;
    n_exact_of_  = other.n_exact_of_;
    n_packed_of_ = other.n_packed_of_;
}

slot_planner::~slot_planner() = default;

const store_shape & slot_planner::shape() const {
    return cells_->shape();
}

int slot_planner::n_tile() const {
    return cells_->n_tile();
}

// The store does not say how many rows its pool has, but what they take.
void slot_planner::count_rows() {
    n_row_ = cells_->stats().bytes_exact / (int64_t) sizeof(uint16_t) / cells_->shape().n_stream;
}

gear_store_stats slot_planner::stats() const {
    return cells_->stats();
}

// Where the tile's table differs from the last time.
void slot_planner::note_changes_of_tile(int stream, int tile, slot_plan & plan) {
    const tile_view view  = cells_->view(stream, tile);
    const size_t    first = (size_t) stream * shape().n_cell + (size_t) tile * shape().tile, which = (size_t) stream * n_tile() + tile;
    for (int t = 0; t < view.n_token; ++t) {
        const int32_t now = view.slot[t] >= 0 ? view.slot[t] : view.in_tile[t] ? slot_packed : slot_absent;
        int32_t &     was = slots_[first + t];
        if (now != was) {
            n_exact_[stream] += (now >= 0) - (was >= 0);
            plan.index.push_back((int32_t) (first + t));
            plan.value.push_back(now);
            was = now;
        }
    }
    n_exact_of_[which]  = view.n_exact;
    n_packed_of_[which] = view.n_packed;
}

// A write takes rows from tiles that it does not write to, and their counts then change.
void slot_planner::note_changes(int stream, bool all, slot_plan & plan) {
    for (int tile = 0; tile < n_tile(); ++tile) {
        const size_t    which = (size_t) stream * n_tile() + tile;
        const tile_view view  = cells_->view(stream, tile);
        if (all || is_touched_[which] || view.n_exact != n_exact_of_[which] || view.n_packed != n_packed_of_[which]) {
            note_changes_of_tile(stream, tile, plan);
        }
        is_touched_[which] = 0;
    }
}

void slot_planner::write(int64_t n, const cell_source & cells, slot_plan & plan) {
    const store_shape & s            = shape();
    const int64_t       n_row_before = n_row_;
    plan                             = {};
    std::vector<int64_t> n_new(s.n_stream, 0);
    std::vector<size_t>  touched;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t cell = cells.at(i);
        if (cell < 0 || cell >= s.n_cell * s.n_stream) {
            continue; // the store refuses it
        }
        n_new[cell / s.n_cell] += slots_[cell] < 0;
        const size_t which = (size_t) (cell / s.n_cell) * n_tile() + cell % s.n_cell / s.tile;
        if (!is_touched_[which]) {
            is_touched_[which] = 1;
            touched.push_back(which);
        }
    }
    if (codec_) {
        codec_->plan = &plan;
    }
    const uint16_t nothing = 0;
    barrier        sync;
    if (!cells_->write({ 0, 1, &sync }, n, cells, { &nothing, 0, true })) {
        for (const size_t which : touched) {
            is_touched_[which] = 0;
        }
        throw error(cells_->status(), cells_->message());
    }
    if (n > s.n_ubatch) { // more than the pool was made for: it may have grown
        count_rows();
    }
    for (int stream = 0; stream < s.n_stream; ++stream) {
        if (n_exact_[stream] + n_new[stream] > n_row_before) { // some row had to go
            note_changes(stream, false, plan);
        }
    }
    for (const size_t which : touched) {
        if (is_touched_[which]) {
            is_touched_[which] = 0;
            note_changes_of_tile((int) (which / n_tile()), (int) (which % n_tile()), plan);
        }
    }

    // Of rows that go to one cell the last one counts.
    owner_.resize((size_t) (n_row_ * s.n_stream));
    plan.slot.resize((size_t) n);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t cell   = cells.at(i);
        plan.slot[i]         = (int32_t) (cell / s.n_cell * n_row_ + slots_[cell]);
        owner_[plan.slot[i]] = (int32_t) i;
    }
    for (int64_t i = 0; i < n; ++i) {
        plan.slot[i] = owner_[plan.slot[i]] == i ? plan.slot[i] : -1;
    }
    plan.n_row = n_row_;
}

void slot_planner::flush(slot_plan & plan, bool full_only) {
    plan = {};
    if (codec_) {
        codec_->plan = &plan;
    }
    barrier sync;
    if (!cells_->flush({ 0, 1, &sync }, full_only)) {
        throw error(cells_->status(), cells_->message());
    }
    for (int stream = 0; stream < shape().n_stream; ++stream) {
        note_changes(stream, false, plan);
    }
    plan.n_row = n_row_;
}

void slot_planner::erase(int64_t cell, int64_t n, slot_plan & plan) {
    plan = {};
    cells_->erase(cell, n);
    for (int64_t first = cell; first < cell + n;) {
        const int64_t local = first % shape().n_cell;
        const int     tile  = (int) (local / shape().tile);
        note_changes_of_tile((int) (first / shape().n_cell), tile, plan);
        first += std::min<int64_t>(shape().tile - local % shape().tile, shape().n_cell - local);
    }
    plan.n_row = n_row_;
}

void slot_planner::copy_stream(int from, int to, slot_plan & plan) {
    plan = {};
    cells_->copy_stream(from, *cells_, to);
    count_rows();
    note_changes(to, true, plan);
    plan.n_row = n_row_;
}

// No slot changes: exact rows stay where they are, and packed ones stay packed.
void slot_planner::update(const uint8_t * marked, slot_plan & plan) {
    plan = {};
    if (codec_) {
        codec_->plan      = &plan;
        codec_->is_update = true;
    }
    cells_->update(marked, [](int64_t, int, uint16_t *) {});
    if (codec_) {
        codec_->is_update = false;
    }
    plan.n_row = n_row_;
}

void slot_planner::adopt(const store & from, slot_plan & plan) {
    const store_shape & of = from.shape();
    if (of.n_cell != shape().n_cell || of.n_stream != shape().n_stream || of.tile != shape().tile || (from.has_tiles() && !cells_->has_tiles())) {
        fail(GEAR_ERROR_INTERNAL, "layer %d: a cache of %lld cells cannot hold what a store of %lld does", of.il, (long long) shape().n_cell,
             (long long) of.n_cell);
    }
    int64_t most = 0;
    for (int stream = 0; stream < of.n_stream; ++stream) {
        most = std::max(most, from.room(stream) + (int64_t) from.exact_cells(stream).size());
    }
    store_shape like = shape();
    like.n_ubatch    = (int) std::max<int64_t>(like.n_ubatch, most - like.n_sink - like.n_tail - like.tile); // room for as many rows
    make_store(like);
    count_rows();
    clear();
    const std::vector<uint8_t> nothing(tile_align);
    const uint16_t             row = 0;
    plan                           = {};
    for (int stream = 0; stream < of.n_stream; ++stream) {
        for (int tile = 0; tile < from.n_tile(); ++tile) {
            const tile_view view = from.view(stream, tile);
            if (view.packed) {
                cells_->put_tile(stream, tile, view.in_tile, nothing.data());
            }
        }
        for (const exact_cell & e : from.exact_cells(stream)) {
            cells_->put_row(stream, e, &row);
        }
        cells_->put_clock(stream, from.clock(stream));
        note_changes(stream, true, plan);
    }
    plan.n_row = n_row_;
}

bool slot_planner::is_empty() const {
    return std::all_of(slots_.begin(), slots_.end(), [](int32_t slot) { return slot == slot_absent; });
}

bool slot_planner::agrees(const slot_planner & other) const {
    const store_shape &a = shape(), &b = other.shape();
    if (a.n_cell != b.n_cell || a.n_stream != b.n_stream || a.tile != b.tile || a.n_tail != b.n_tail || a.n_sink != b.n_sink || n_row_ != other.n_row_ ||
        cells_->has_tiles() != other.cells_->has_tiles() || slots_ != other.slots_) {
        return false;
    }
    for (int stream = 0; stream < a.n_stream; ++stream) {
        const auto mine = cells_->exact_cells(stream), theirs = other.cells_->exact_cells(stream);
        const auto is_same = [](const exact_cell & x, const exact_cell & y) { return x.cell == y.cell && x.written_at == y.written_at; };
        if (cells_->clock(stream) != other.cells_->clock(stream) || !std::equal(mine.begin(), mine.end(), theirs.begin(), theirs.end(), is_same)) {
            return false;
        }
        for (int tile = 0; tile < n_tile(); ++tile) { // slots do not say what lies under exact rows
            const tile_view x = cells_->view(stream, tile), y = other.cells_->view(stream, tile);
            if (!std::equal(x.in_tile, x.in_tile + x.n_token, y.in_tile)) {
                return false;
            }
        }
    }
    return true;
}

void slot_planner::clear() {
    cells_->clear();
    std::fill(slots_.begin(), slots_.end(), slot_absent);
    std::fill(n_exact_.begin(), n_exact_.end(), 0);
    std::fill(n_exact_of_.begin(), n_exact_of_.end(), 0);
    std::fill(n_packed_of_.begin(), n_packed_of_.end(), 0);
}

} // namespace gear::cuda
