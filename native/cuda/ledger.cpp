#include "cuda/ledger.h"

#include "common/error.h"

#include <algorithm>
#include <cstring>

namespace gear::cuda {

// The book's codec. While it is asked, the tables are still as they were before the write.
class ledger::scribe final : public tile_codec {
  public:
    size_t tile_bytes() const override { return tile_align; }
    size_t scratch_bytes() const override { return 0; }
    void   unpack(const uint8_t *, float * x, void *) const override { std::fill_n(x, n_token, 0.0f); }

    bool pack(int head, int64_t first_cell, const float * x, const uint8_t * written, uint8_t * tile, void * scratch) const override {
        return repack(head, first_cell, x, written, nullptr, nullptr, tile, scratch);
    }

    bool repack(int, int64_t first_cell, const float *, const uint8_t * written, const uint8_t * kept, const uint8_t *, uint8_t *, void *) const override {
        const int64_t   n_cell = book->shape().n_cell, local = first_cell % n_cell;
        const int       stream = (int) (first_cell / n_cell), index = (int) (local / n_token);
        const tile_view view = book->view(stream, index);
        step->jobs.push_back({ stream, index });
        for (int t = 0; t < n_token; ++t) {
            step->source.push_back(!written[t] ? place_absent : kept && kept[t] ? place_packed : is_update ? t : view.slot[t]);
        }
        return true;
    }

    const store * book      = nullptr;
    ledger_step * step      = nullptr;
    int           n_token   = 0;
    bool          is_update = false;
};

void ledger::make_book(const store_shape & shape) {
    book_ = std::make_unique<store>(shape, scribe_);
    if (scribe_) {
        scribe_->book    = book_.get();
        scribe_->n_token = shape.tile;
    }
}

ledger::ledger(const store_shape & like, bool has_tiles) {
    store_shape shape = like;
    shape.n_head = shape.d_head = 1;
    scribe_                     = has_tiles ? std::make_shared<scribe>() : nullptr;
    make_book(shape);
    const size_t n_tile = (size_t) shape.n_stream * book_->n_tile();
    places_.assign((size_t) (shape.n_stream * shape.n_cell), place_absent);
    n_exact_.assign(shape.n_stream, 0);
    n_exact_of_.assign(n_tile, 0);
    n_packed_of_.assign(n_tile, 0);
    is_touched_.assign(n_tile, 0);
    count_rows();
}

ledger::ledger(const ledger & other) : ledger(other.shape(), other.scribe_ != nullptr) {
    for (int stream = 0; stream < shape().n_stream; ++stream) {
        book_->copy_stream(stream, *other.book_, stream); // slots stay what they are
    }
    count_rows();
    places_      = other.places_;
    n_exact_     = other.n_exact_;
    n_exact_of_  = other.n_exact_of_;
    n_packed_of_ = other.n_packed_of_;
}

ledger::~ledger() = default;

const store_shape & ledger::shape() const {
    return book_->shape();
}

int ledger::n_tile() const {
    return book_->n_tile();
}

// The store does not say how many rows its pool has, but what they take.
void ledger::count_rows() {
    n_row_ = book_->stats().bytes_exact / (int64_t) sizeof(uint16_t) / book_->shape().n_stream;
}

gear_store_stats ledger::stats() const {
    return book_->stats();
}

// Where the tile's table differs from the last time.
void ledger::note_tile(int stream, int tile, ledger_step & step) {
    const tile_view view  = book_->view(stream, tile);
    const size_t    first = (size_t) stream * shape().n_cell + (size_t) tile * shape().tile, which = (size_t) stream * n_tile() + tile;
    for (int t = 0; t < view.n_token; ++t) {
        const int32_t now = view.slot[t] >= 0 ? view.slot[t] : view.in_tile[t] ? place_packed : place_absent;
        int32_t &     was = places_[first + t];
        if (now != was) {
            n_exact_[stream] += (now >= 0) - (was >= 0);
            step.index.push_back((int32_t) (first + t));
            step.value.push_back(now);
            was = now;
        }
    }
    n_exact_of_[which]  = view.n_exact;
    n_packed_of_[which] = view.n_packed;
}

// A write takes rows from tiles that it does not write to, and their counts then change.
void ledger::note_stream(int stream, bool all, ledger_step & step) {
    for (int tile = 0; tile < n_tile(); ++tile) {
        const size_t    which = (size_t) stream * n_tile() + tile;
        const tile_view view  = book_->view(stream, tile);
        if (all || is_touched_[which] || view.n_exact != n_exact_of_[which] || view.n_packed != n_packed_of_[which]) {
            note_tile(stream, tile, step);
        }
        is_touched_[which] = 0;
    }
}

void ledger::write(int64_t n, const cell_source & cells, ledger_step & step) {
    const store_shape & s            = shape();
    const int64_t       n_row_before = n_row_;
    step                             = {};
    std::vector<int64_t> n_new(s.n_stream, 0);
    std::vector<size_t>  touched;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t cell = cells.at(i);
        if (cell < 0 || cell >= s.n_cell * s.n_stream) {
            continue; // the book refuses it
        }
        n_new[cell / s.n_cell] += places_[cell] < 0;
        const size_t which = (size_t) (cell / s.n_cell) * n_tile() + cell % s.n_cell / s.tile;
        if (!is_touched_[which]) {
            is_touched_[which] = 1;
            touched.push_back(which);
        }
    }
    if (scribe_) {
        scribe_->step = &step;
    }
    const uint16_t nothing = 0;
    barrier        sync;
    if (!book_->write({ 0, 1, &sync }, n, cells, { &nothing, 0, true })) {
        for (const size_t which : touched) {
            is_touched_[which] = 0;
        }
        throw error(book_->status(), book_->message());
    }
    if (n > s.n_ubatch) { // more than the pool was made for: it may have grown
        count_rows();
    }
    for (int stream = 0; stream < s.n_stream; ++stream) {
        if (n_exact_[stream] + n_new[stream] > n_row_before) { // some row had to go
            note_stream(stream, false, step);
        }
    }
    for (const size_t which : touched) {
        if (is_touched_[which]) {
            is_touched_[which] = 0;
            note_tile((int) (which / n_tile()), (int) (which % n_tile()), step);
        }
    }

    // Of rows that go to one cell the last one counts.
    owner_.resize((size_t) (n_row_ * s.n_stream));
    step.slot.resize((size_t) n);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t cell   = cells.at(i);
        step.slot[i]         = (int32_t) (cell / s.n_cell * n_row_ + places_[cell]);
        owner_[step.slot[i]] = (int32_t) i;
    }
    for (int64_t i = 0; i < n; ++i) {
        step.slot[i] = owner_[step.slot[i]] == i ? step.slot[i] : -1;
    }
    step.n_row = n_row_;
}

void ledger::flush(ledger_step & step, bool full_only) {
    step = {};
    if (scribe_) {
        scribe_->step = &step;
    }
    barrier sync;
    if (!book_->flush({ 0, 1, &sync }, full_only)) {
        throw error(book_->status(), book_->message());
    }
    for (int stream = 0; stream < shape().n_stream; ++stream) {
        note_stream(stream, false, step);
    }
    step.n_row = n_row_;
}

void ledger::erase(int64_t cell, int64_t n, ledger_step & step) {
    step = {};
    book_->erase(cell, n);
    for (int64_t first = cell; first < cell + n;) {
        const int64_t local = first % shape().n_cell;
        const int     tile  = (int) (local / shape().tile);
        note_tile((int) (first / shape().n_cell), tile, step);
        first += std::min<int64_t>(shape().tile - local % shape().tile, shape().n_cell - local);
    }
    step.n_row = n_row_;
}

void ledger::copy_stream(int from, int to, ledger_step & step) {
    step = {};
    book_->copy_stream(from, *book_, to);
    count_rows();
    note_stream(to, true, step);
    step.n_row = n_row_;
}

// No place changes: exact rows stay where they are, and packed ones stay packed.
void ledger::update(const uint8_t * marked, ledger_step & step) {
    step = {};
    if (scribe_) {
        scribe_->step      = &step;
        scribe_->is_update = true;
    }
    book_->update(marked, [](int64_t, int, uint16_t *) {});
    if (scribe_) {
        scribe_->is_update = false;
    }
    step.n_row = n_row_;
}

void ledger::adopt(const store & rows, ledger_step & step) {
    const store_shape & from = rows.shape();
    if (from.n_cell != shape().n_cell || from.n_stream != shape().n_stream || from.tile != shape().tile || (rows.has_tiles() && !book_->has_tiles())) {
        fail(GEAR_ERROR_INTERNAL, "layer %d: a book of %lld cells cannot be that of a store of %lld", from.il, (long long) shape().n_cell,
             (long long) from.n_cell);
    }
    int64_t most = 0;
    for (int stream = 0; stream < from.n_stream; ++stream) {
        most = std::max(most, rows.room(stream) + (int64_t) rows.exact_cells(stream).size());
    }
    store_shape like = shape();
    like.n_ubatch    = (int) std::max<int64_t>(like.n_ubatch, most - like.n_sink - like.n_tail - like.tile); // room for as many rows
    make_book(like);
    count_rows();
    clear();
    const std::vector<uint8_t> nothing(tile_align);
    const uint16_t             row = 0;
    step                           = {};
    for (int stream = 0; stream < from.n_stream; ++stream) {
        for (int tile = 0; tile < rows.n_tile(); ++tile) {
            const tile_view view = rows.view(stream, tile);
            if (view.packed) {
                book_->put_tile(stream, tile, view.in_tile, nothing.data());
            }
        }
        for (const exact_cell & e : rows.exact_cells(stream)) {
            book_->put_row(stream, e, &row);
        }
        book_->put_clock(stream, rows.clock(stream));
        note_stream(stream, true, step);
    }
    step.n_row = n_row_;
}

bool ledger::is_empty() const {
    return std::all_of(places_.begin(), places_.end(), [](int32_t place) { return place == place_absent; });
}

bool ledger::agrees(const ledger & other) const {
    const store_shape &a = shape(), &b = other.shape();
    if (a.n_cell != b.n_cell || a.n_stream != b.n_stream || a.tile != b.tile || a.n_tail != b.n_tail || a.n_sink != b.n_sink || n_row_ != other.n_row_ ||
        book_->has_tiles() != other.book_->has_tiles() || places_ != other.places_) {
        return false;
    }
    for (int stream = 0; stream < a.n_stream; ++stream) {
        const auto mine = book_->exact_cells(stream), theirs = other.book_->exact_cells(stream);
        const auto is_same = [](const exact_cell & x, const exact_cell & y) { return x.cell == y.cell && x.written_at == y.written_at; };
        if (book_->clock(stream) != other.book_->clock(stream) || !std::equal(mine.begin(), mine.end(), theirs.begin(), theirs.end(), is_same)) {
            return false;
        }
        for (int tile = 0; tile < n_tile(); ++tile) { // what lies under exact rows is not in the places
            const tile_view x = book_->view(stream, tile), y = other.book_->view(stream, tile);
            if (!std::equal(x.in_tile, x.in_tile + x.n_token, y.in_tile)) {
                return false;
            }
        }
    }
    return true;
}

void ledger::clear() {
    book_->clear();
    std::fill(places_.begin(), places_.end(), place_absent);
    std::fill(n_exact_.begin(), n_exact_.end(), 0);
    std::fill(n_exact_of_.begin(), n_exact_of_.end(), 0);
    std::fill(n_packed_of_.begin(), n_packed_of_.end(), 0);
}

} // namespace gear::cuda
