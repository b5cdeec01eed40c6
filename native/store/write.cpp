// write.cpp - rows on their way into the pool: which cells they go to, whether there is room, and who of a team does what.
#include "common/error.h"
#include "common/half_rows.h"
#include "store/store.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace gear {

namespace {

constexpr int64_t alone_elements = 32768; // one thread copies so few in less time than a barrier of the team may take
constexpr int64_t no_limit       = INT64_MAX / 2;

} // namespace

bool store::write(const team & t, int64_t n, const cell_source & cells, const row_source & rows) {
    if (is_covered(t, n)) { // a decode step: thread 0 does it alone, and nobody waits
        const int64_t invalid = first_invalid(n, cells);
        if (t.ith == 0 && invalid < 0) {
            ++n_write_;
            assign_rows(n, cells);
            copy_rows(0, n, cells, rows);
        } else if (t.ith == 0) {
            failed_ = false;
            attempt([&] { refuse(n, cells, invalid); });
        }
        allowances_[t.ith].n_row -= n;
        return invalid < 0;
    }

    const auto make_plan = [&] {
        const int64_t invalid = first_invalid(n, cells);
        if (invalid >= 0) {
            refuse(n, cells, invalid);
        }
        plan(t.nth, n, cells);
    };
    const auto commit = [&] {
        assign_rows(n, cells);
        grant_allowance();
    };
    const bool ok = together(t, make_plan, commit);
    if (ok) {
        copy_rows(n * t.ith / t.nth, n * (t.ith + 1) / t.nth, cells, rows);
        allowances_[t.ith].n_row = granted_;
        if (t.ith == 0) {
            allowance_nth_ = t.nth; // not before the barrier: until then others may still be asking is_covered()
        }
    }
    t.wait();
    return ok;
}

bool store::flush(const team & t, bool full_only) {
    const bool ok = together(t, [&] { plan_flush(full_only); }, [] {});
    t.wait();
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Planning
// ---------------------------------------------------------------------------------------------------------------------------------------------

bool store::is_covered(const team & t, int64_t n) const {
    return t.nth == allowance_nth_ && n <= allowances_[t.ith].n_row && n * shape_.n_embd() <= alone_elements;
}

// Index of the first cell out of range, -1: none.
int64_t store::first_invalid(int64_t n, const cell_source & cells) const {
    const int64_t n_all = shape_.n_cell * shape_.n_stream;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t cell = cells.at(i);
        if (cell < 0 || cell >= n_all) {
            return i;
        }
    }
    return -1;
}

void store::refuse(int64_t n, const cell_source & cells, int64_t invalid) const {
    fail(GEAR_ERROR_INVALID, "layer %d %s: row %lld of a write of %lld goes to cell %lld, but the cache has cells 0 to %lld; nothing was written",
         shape_.il, name_of(shape_), (long long) invalid, (long long) n, (long long) cells.at(invalid), (long long) (shape_.n_cell * shape_.n_stream) - 1);
}

// Everything that can fail, and nothing that loses a row: look at the cells, enlarge the pool if it must be, choose the victims.
void store::plan(int nth, int64_t n, const cell_source & cells) {
    if (allowances_.size() < (size_t) nth) {
        allowances_.resize(nth);
    }
    for (stream_state & stream : streams_) {
        stream.n_write = stream.n_need = 0;
    }
    if (outlook_ == outlook::should_stay_exact) {
        try_to_stay_exact();
    }
    ++n_write_;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t  global = cells.at(i);
        stream_state & stream = streams_[global / shape_.n_cell];
        const int32_t  slot   = stream.slot[global % shape_.n_cell];
        stream.n_write += 1;
        if (slot >= 0) {
            stream.rows[slot].write = n_write_; // stays where it is
        } else {
            stream.n_need += 1;
        }
    }
    for (stream_state & stream : streams_) {
        stream.n_need = std::min(stream.n_need, stream.n_without_row()); // a cell that comes twice needs one
        if (stream.n_write > n_row_most_) {
            enlarge_pool(stream.n_write);
        }
    }
    for (int index = 0; index < shape_.n_stream; ++index) {
        stream_state & stream = streams_[index];
        stream.evict_until    = stream.clock + stream.n_write - std::max<int64_t>(stream.n_write, shape_.n_tail);
        choose_victims(index);
    }
}

void store::plan_flush(bool full_only) {
    ++n_write_;
    for (int index = 0; tiles_.size() > 0 && outlook_ != outlook::stays_exact && index < shape_.n_stream; ++index) {
        stream_state & stream = streams_[index];
        stream.evict_until    = stream.clock - shape_.n_tail;
        find_candidates(stream);
        for (const candidate & found : candidates_) {
            const tile_state & home = stream.tiles[found.tile];
            if (!full_only || home.n_exact + home.n_packed == n_token(found.tile)) {
                victims_.push_back({ index, found.tile });
            }
        }
    }
}

// Give each cell its exact row. Where a cell occurs twice the later row counts.
void store::assign_rows(int64_t n, const cell_source & cells) {
    is_empty_ = false;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t  global = cells.at(i), cell = global % shape_.n_cell;
        stream_state & stream = streams_[global / shape_.n_cell];
        if (stream.slot[cell] < 0) {
            stream.hold(cell);
        }
        stream.set_in_tile(cell, 0);
        exact_row & row = stream.rows[stream.slot[cell]];
        row.write       = n_write_;
        row.source      = (int32_t) i;
        row.written_at  = ++stream.clock;
    }
}

// What any stream has room for; a pool that holds all cells never lacks it.
void store::grant_allowance() {
    granted_ = no_limit;
    for (const stream_state & stream : streams_) {
        granted_ = n_row_ == shape_.n_cell ? no_limit : std::min<int64_t>(granted_, stream.free.size());
    }
}

void store::copy_rows(int64_t first, int64_t last, const cell_source & cells, const row_source & rows) {
    for (int64_t i = first; i < last; ++i) {
        const int64_t global = cells.at(i);
        const int     index  = (int) (global / shape_.n_cell);
        const int32_t slot   = streams_[index].slot[global % shape_.n_cell];
        if (streams_[index].rows[slot].source != i) {
            continue;
        }
        const char * data = (const char *) rows.data + i * rows.stride;
        if (rows.is_half) {
            memcpy(row_data(index, slot), data, row_bytes(shape_));
        } else {
            float_to_half((const float *) data, row_data(index, slot), shape_.n_embd());
        }
    }
}

void store::enlarge_pool(int64_t n_ubatch) {
    const int64_t n_row = n_row_of(shape_, codec_ != nullptr, n_ubatch);
    if (n_row > n_row_) {
        resize_pool(n_row);
    }
    n_row_most_ = n_ubatch;
}

void store::resize_pool(int64_t n_row) {
    const size_t stream_bytes = n_row_ * row_bytes(shape_), new_stream_bytes = n_row * row_bytes(shape_);
    require_memory(shape_.n_stream * new_stream_bytes, "more exact rows than the cache was made for");
    mapping larger(shape_.n_stream * new_stream_bytes);
    for (stream_state & stream : streams_) {
        stream.reserve(n_row); // all that can fail comes before the first change
    }
    for (int index = 0; index < shape_.n_stream; ++index) {
        streams_[index].enlarge(n_row);
        memcpy(larger.data() + index * new_stream_bytes, pool_.data() + index * stream_bytes, stream_bytes);
    }
    pool_  = std::move(larger);
    n_row_ = n_row;
}

// A side whose packing does too much harm keeps a row of every cell from now on, if there is memory for them. What is packed stays so.
void store::try_to_stay_exact() {
    has_news_ = true;
    outlook_  = outlook::cannot_stay_exact;
    try {
        resize_pool(shape_.n_cell);
        outlook_ = outlook::stays_exact;
    } catch (const std::bad_alloc &) {
    } catch (const error &) {
    }
}

bool store::has_news() {
    return std::exchange(has_news_, false);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The team
// ---------------------------------------------------------------------------------------------------------------------------------------------

void store::report(gear_status kind, const char * text) {
    const std::lock_guard<std::mutex> lock(message_lock_);
    if (!failed_.exchange(true)) {
        failure_.keep(kind, text);
    }
}

// Thread 0 plans, all threads pack the victims that the plan names, thread 0 commits. false on all of them when something failed; a barrier has to
// follow before the next call.
template <class Plan, class Commit> bool store::together(const team & t, Plan && plan, Commit && commit) {
    if (t.ith == 0) {
        failed_ = false;
        victims_.clear();
        attempt([&] {
            plan();
            if (!victims_.empty()) {
                teach(victims_[0].stream, victims_[0].tile, nullptr, nullptr);
            }
        });
        if (failed_) {
            victims_.clear();
        } else if (victims_.empty()) {
            commit();
        }
    }
    t.wait();
    if (!victims_.empty()) {
        pack_victims(t);
        t.wait();
        if (t.ith == 0 && !failed_) {
            release_victims();
            commit();
        }
        t.wait();
    }
    return !failed_;
}

} // namespace gear
