#include "store/store.h"

#include "common/error.h"
#include "common/half_rows.h"
#include "common/memory.h"
#include "store/stream.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

namespace gear {

namespace {

constexpr int64_t pool_step       = 32;    // the pool is a multiple of this many rows
constexpr int64_t alone_elements  = 32768; // one thread copies so few in less time than a barrier of the team may take
constexpr int64_t no_limit        = INT64_MAX / 2;
constexpr char    side_name[2][2] = { "K", "V" };

// A tile worth packing: what that would free.
struct candidate {
    int32_t tile;
    int32_t n_row;   // exact rows that may go
    bool    settled; // every cell is written, and every row that is not a sink may go: packing it once is enough
    int64_t newest;  // clock of the newest of these rows
};

struct victim {
    int32_t stream;
    int32_t tile;
};

// Rows that a thread of the team may still see written before somebody has to make room. A cache line each: every thread counts for itself.
struct alignas(cache_line) allowance {
    int64_t n_row = 0;
};

// Rows of a stream's pool: sinks, tail and a write in progress stay exact at once, and a tile may be partly older than the tail.
int64_t n_row_of(const store_shape & shape, bool has_codec, int64_t n_ubatch) {
    const int64_t wanted = (int64_t) shape.n_sink + shape.n_tail + n_ubatch + shape.tile;
    return has_codec ? std::min(shape.n_cell, (wanted + pool_step - 1) / pool_step * pool_step) : shape.n_cell;
}

bool packs(const store_shape & shape, size_t tile_bytes) {
    return tile_bytes > 0 && (int64_t) shape.n_sink + shape.n_tail < shape.n_cell;
}

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
             side_name[shape.side], shape.n_head, shape.d_head, (long long) shape.n_cell, shape.n_stream, shape.tile, shape.n_tail, shape.n_sink,
             shape.n_ubatch);
    }
    // So far no number of bytes below can overflow.
    constexpr double most_elements = (double) ((int64_t) 1 << 54);
    if (shape.n_head > INT32_MAX / shape.d_head || (double) shape.n_stream * (double) shape.n_cell * shape.n_embd() > most_elements) {
        fail(GEAR_ERROR_MEMORY, "layer %d %s: %d heads of %d channels with %lld cells in %d streams are more than any machine has memory for", shape.il,
             side_name[shape.side], shape.n_head, shape.d_head, (long long) shape.n_cell, shape.n_stream);
    }
}

// The parts of a thread's scratch.
struct pack_scratch {
    float *   x;       // [T, d_head]
    uint8_t * written; // [T]
    uint8_t * kept;    // [T] 1: only the old packed form holds the row
    uint8_t * tile;    // a tile on its way: the old form survives a codec that fails
    uint8_t * codec;
};

} // namespace

// ---------------------------------------------------------------------------------------------------------------------------------------------
// State
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct store::state {
    store_shape                       shape;
    std::shared_ptr<const tile_codec> codec;
    int                               n_tile;     // of a stream
    int64_t                           n_row;      // exact rows of a stream
    int64_t                           n_row_most; // rows of one write that are sure to find room
    mapping                           tiles;      // [n_stream, n_tile, n_head, tile_bytes]
    mapping                           pool;       // f16 [n_stream, n_row, n_embd]
    std::vector<stream_state>         streams;
    bool                              is_empty = true; // as clear() leaves it
    int64_t                           n_pack   = 0;
    int64_t                           n_write  = 0; // number of the write in progress

    // Eviction.
    std::vector<int32_t>   candidate_of; // [n_tile] index in candidates, -1: none
    std::vector<candidate> candidates;
    std::vector<victim>    victims;

    // The team. A thread whose allowance covers a write knows, without asking the others, that it will need no room; all threads count alike.
    std::vector<allowance> allowances;        // [nth]
    int                    allowance_nth = 0; // team for which they hold, 0: none
    int64_t                granted       = 0; // allowance that the write in progress ends with

    std::atomic<bool> failed{ false };
    std::mutex        message_lock;
    kept_error        failure;

    size_t tile_bytes() const { return codec ? codec->tile_bytes() : 0; }

    uint8_t * packed(int stream, int64_t tile, int head) const {
        return tiles.data() + (((size_t) stream * n_tile + tile) * shape.n_head + head) * tile_bytes();
    }
    uint16_t * row(int stream, int64_t slot) const { return (uint16_t *) pool.data() + ((size_t) stream * n_row + slot) * shape.n_embd(); }
    int64_t    first_cell(int64_t tile) const { return tile * shape.tile; }
    int        n_token(int64_t tile) const { return (int) std::min<int64_t>(shape.tile, shape.n_cell - first_cell(tile)); }

    size_t       scratch_bytes() const;
    pack_scratch scratch() const;
    void         require_range(int64_t cell, int64_t n, const char * what) const;

    // Eviction
    bool may_go(const stream_state & stream, const exact_row & row) const;
    void find_candidates(stream_state & stream);
    void choose_victims(int stream);
    void pack_victims(const team & t);
    void retire_victims();
    bool encode(int stream, int64_t tile, int head, const uint8_t * marked, const uint16_t * changed, uint8_t * target) const;
    void mark_packed(int stream, int64_t tile);

    // Writing
    bool              is_covered(const team & t, int64_t n) const;
    int64_t           first_invalid(int64_t n, const cell_source & cells) const;
    [[noreturn]] void refuse(int64_t n, const cell_source & cells, int64_t invalid) const;
    void              plan(int nth, int64_t n, const cell_source & cells);
    void              plan_flush(bool full_only);
    void              place(int64_t n, const cell_source & cells);
    void              grant();
    void              copy_rows(int64_t first, int64_t last, const cell_source & cells, const row_source & rows);
    void              enlarge_pool(int64_t n_ubatch);

    // Reading
    void read_tile(int stream, int64_t tile, int first, int last, uint16_t * rows) const;
    void rewrite_tile(int stream, int64_t tile, const uint8_t * marked, const rewrite & f);

    void                                     report(gear_status kind, const char * text);
    template <class F> void                  attempt(F && f);
    template <class Plan, class Commit> bool together(const team & t, Plan && plan, Commit && commit);
};

namespace {

// It belongs to the thread, so that all stores share it.
thread_local aligned_buffer scratch_of_thread;

} // namespace

size_t store::state::scratch_bytes() const {
    const size_t x = (size_t) shape.tile * shape.d_head * sizeof(float);
    return codec ? padded(x) + 2 * padded(shape.tile) + padded(tile_bytes()) + padded(codec->scratch_bytes()) : 0;
}

pack_scratch store::state::scratch() const {
    pack_scratch parts;
    uint8_t *    data = scratch_of_thread.reserve(scratch_bytes());
    parts.x           = (float *) data;
    parts.written     = data + padded((size_t) shape.tile * shape.d_head * sizeof(float));
    parts.kept        = parts.written + padded(shape.tile);
    parts.tile        = parts.kept + padded(shape.tile);
    parts.codec       = parts.tile + padded(tile_bytes());
    return parts;
}

void store::state::require_range(int64_t cell, int64_t n, const char * what) const {
    const int64_t n_all = shape.n_cell * shape.n_stream;
    if (cell < 0 || n < 0 || cell > n_all - n) {
        fail(GEAR_ERROR_INVALID, "layer %d %s: cannot %s %lld cells from cell %lld on: the cache has cells 0 to %lld", shape.il, side_name[shape.side],
             what, (long long) n, (long long) cell, (long long) n_all - 1);
    }
}

void store::state::report(gear_status kind, const char * text) {
    const std::lock_guard<std::mutex> lock(message_lock);
    if (!failed.exchange(true)) {
        failure.keep(kind, text);
    }
}

// What a thread of the team does must not throw past the others.
template <class F> void store::state::attempt(F && f) {
    try {
        f();
    } catch (const std::bad_alloc &) {
        report(GEAR_ERROR_MEMORY, "not enough memory for a write");
    } catch (const error & e) {
        report(e.status, e.what());
    } catch (const std::exception & e) {
        report(GEAR_ERROR_INTERNAL, e.what());
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Making room
// ---------------------------------------------------------------------------------------------------------------------------------------------

bool store::state::may_go(const stream_state & stream, const exact_row & row) const {
    return row.cell >= shape.n_sink && row.written_at <= stream.evict_until && row.write != n_write;
}

// Tiles with rows that may go. A row that its tile holds already goes at once: it costs nothing.
void store::state::find_candidates(stream_state & stream) {
    candidates.clear();
    for (const exact_row & row : stream.rows) {
        if (!may_go(stream, row)) {
            continue;
        }
        if (stream.in_tile[row.cell]) {
            stream.release(row.cell);
            continue;
        }
        const int32_t tile  = row.cell / shape.tile;
        int32_t &     index = candidate_of[tile];
        if (index < 0) {
            index = (int32_t) candidates.size();
            candidates.push_back({ tile, 0, false, 0 });
        }
        candidate & found = candidates[index];
        found.n_row += 1;
        found.newest = std::max(found.newest, row.written_at);
    }
    for (candidate & found : candidates) {
        const tile_state & home   = stream.tiles[found.tile];
        const int          n_sink = (int) std::clamp<int64_t>(shape.n_sink - first_cell(found.tile), 0, n_token(found.tile));
        found.settled             = home.n_exact + home.n_packed == n_token(found.tile) && found.n_row == home.n_exact - n_sink;
        candidate_of[found.tile]  = -1;
    }
}

// The coldest tiles that free what the write needs, settled ones first.
void store::state::choose_victims(int index) {
    stream_state & stream = streams[index];
    if (stream.n_need <= (int64_t) stream.free.size()) {
        return;
    }
    find_candidates(stream);
    std::sort(candidates.begin(), candidates.end(), [](const candidate & a, const candidate & b) {
        return a.settled != b.settled ? a.settled : a.newest != b.newest ? a.newest < b.newest : a.tile < b.tile;
    });
    int64_t n_free = (int64_t) stream.free.size();
    for (size_t i = 0; i < candidates.size() && n_free < stream.n_need; ++i) {
        victims.push_back({ index, candidates[i].tile });
        n_free += candidates[i].n_row;
    }
    if (n_free < stream.n_need) {
        fail(GEAR_ERROR_INTERNAL, "layer %d %s: no room for %lld rows in a pool of %lld: please report this as a defect of gearcpp", shape.il,
             side_name[shape.side], (long long) stream.n_need, (long long) n_row);
    }
}

// One head of a tile from its exact rows and what its packed form holds of the others. Sinks are left out: they never leave the pool, and their extreme
// values would widen the ranges of their neighbours.
//   marked u8 [n_token], changed f16 [n_token, n_embd]: rows that take the place of the present ones (nullptr: none)
bool store::state::encode(int index, int64_t tile, int head, const uint8_t * marked, const uint16_t * changed, uint8_t * target) const {
    const stream_state & stream  = streams[index];
    const pack_scratch   parts   = scratch();
    const int            d_head  = shape.d_head;
    const int64_t        first   = first_cell(tile);
    const int            n_valid = n_token(tile);
    const bool           has_old = stream.tiles[tile].n_packed > 0;
    const uint8_t *      old     = packed(index, tile, head);
    if (has_old) {
        codec->unpack(old, parts.x, parts.codec);
    }
    for (int token = 0; token < shape.tile; ++token) {
        const int64_t cell   = first + token;
        float *       x      = parts.x + (size_t) token * d_head;
        parts.written[token] = token < n_valid && cell >= shape.n_sink && stream.is_written(cell);
        parts.kept[token]    = 0;
        if (!parts.written[token]) {
            std::fill(x, x + d_head, 0.0f);
        } else if (marked && marked[token]) {
            half_to_float(changed + (size_t) token * shape.n_embd() + (size_t) head * d_head, x, d_head);
        } else if (stream.slot[cell] >= 0) {
            half_to_float(row(index, stream.slot[cell]) + (size_t) head * d_head, x, d_head);
        } else {
            parts.kept[token] = 1;
        }
    }
    const int64_t global = index * shape.n_cell + first;
    return has_old ? codec->repack(head, global, parts.x, parts.written, parts.kept, old, target, parts.codec)
                   : codec->pack(head, global, parts.x, parts.written, target, parts.codec);
}

void store::state::mark_packed(int index, int64_t tile) {
    stream_state & stream = streams[index];
    for (int64_t cell = std::max<int64_t>(first_cell(tile), shape.n_sink), end = first_cell(tile) + n_token(tile); cell < end; ++cell) {
        if (stream.is_written(cell)) {
            stream.set_in_tile(cell, 1);
        }
    }
    ++n_pack;
}

void store::state::pack_victims(const team & t) {
    const int64_t n_job = (int64_t) victims.size() * shape.n_head;
    for (int64_t job = t.ith; job < n_job && !failed; job += t.nth) {
        const victim & v    = victims[job / shape.n_head];
        const int      head = (int) (job % shape.n_head);
        attempt([&] {
            uint8_t * fresh = scratch().tile;
            if (!encode(v.stream, v.tile, head, nullptr, nullptr, fresh)) {
                fail(GEAR_ERROR_CALLBACK, "layer %d %s: the codec failed on head %d of the tile at cell %lld of stream %d; nothing was written", shape.il,
                     side_name[shape.side], head, (long long) first_cell(v.tile), v.stream);
            }
            memcpy(packed(v.stream, v.tile, head), fresh, tile_bytes());
        });
    }
}

void store::state::retire_victims() {
    for (const victim & v : victims) {
        stream_state & stream = streams[v.stream];
        mark_packed(v.stream, v.tile);
        for (int64_t first = first_cell(v.tile), cell = first + n_token(v.tile) - 1; cell >= first; --cell) { // the lowest slot is taken first again
            if (stream.slot[cell] >= 0 && may_go(stream, stream.rows[stream.slot[cell]])) {
                stream.release(cell);
            }
        }
    }
}

// Thread 0 plans, all threads pack the victims that the plan names, thread 0 commits. false on all of them when something failed; a barrier has to follow
// before the next call.
template <class Plan, class Commit> bool store::state::together(const team & t, Plan && plan, Commit && commit) {
    if (t.ith == 0) {
        failed = false;
        victims.clear();
        attempt(plan);
        if (failed) {
            victims.clear();
        } else if (victims.empty()) {
            commit();
        }
    }
    t.wait();
    if (!victims.empty()) {
        pack_victims(t);
        t.wait();
        if (t.ith == 0 && !failed) {
            retire_victims();
            commit();
        }
        t.wait();
    }
    return !failed;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Writing
// ---------------------------------------------------------------------------------------------------------------------------------------------

bool store::state::is_covered(const team & t, int64_t n) const {
    return t.nth == allowance_nth && n <= allowances[t.ith].n_row && n * shape.n_embd() <= alone_elements;
}

// Index of the first cell out of range, -1: none.
int64_t store::state::first_invalid(int64_t n, const cell_source & cells) const {
    const int64_t n_all = shape.n_cell * shape.n_stream;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t cell = cells.at(i);
        if (cell < 0 || cell >= n_all) {
            return i;
        }
    }
    return -1;
}

void store::state::refuse(int64_t n, const cell_source & cells, int64_t invalid) const {
    fail(GEAR_ERROR_INVALID, "layer %d %s: row %lld of a write of %lld goes to cell %lld, but the cache has cells 0 to %lld; nothing was written",
         shape.il, side_name[shape.side], (long long) invalid, (long long) n, (long long) cells.at(invalid),
         (long long) (shape.n_cell * shape.n_stream) - 1);
}

// Everything that can fail, and nothing that loses a row: look at the cells, enlarge the pool if it must be, choose the victims.
void store::state::plan(int nth, int64_t n, const cell_source & cells) {
    if (allowances.size() < (size_t) nth) {
        allowances.resize(nth);
    }
    for (stream_state & stream : streams) {
        stream.n_write = stream.n_need = 0;
    }
    ++n_write;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t  global = cells.at(i);
        stream_state & stream = streams[global / shape.n_cell];
        const int32_t  slot   = stream.slot[global % shape.n_cell];
        stream.n_write += 1;
        if (slot >= 0) {
            stream.rows[slot].write = n_write; // stays where it is
        } else {
            stream.n_need += 1;
        }
    }
    for (stream_state & stream : streams) {
        stream.n_need = std::min(stream.n_need, stream.n_without_row()); // a cell that comes twice needs one
        if (stream.n_write > n_row_most) {
            enlarge_pool(stream.n_write);
        }
    }
    for (int index = 0; index < shape.n_stream; ++index) {
        stream_state & stream = streams[index];
        stream.evict_until    = stream.clock + stream.n_write - std::max<int64_t>(stream.n_write, shape.n_tail);
        choose_victims(index);
    }
}

void store::state::plan_flush(bool full_only) {
    ++n_write;
    for (int index = 0; tiles.size() > 0 && index < shape.n_stream; ++index) {
        stream_state & stream = streams[index];
        stream.evict_until    = stream.clock - shape.n_tail;
        find_candidates(stream);
        for (const candidate & found : candidates) {
            const tile_state & home = stream.tiles[found.tile];
            if (!full_only || home.n_exact + home.n_packed == n_token(found.tile)) {
                victims.push_back({ index, found.tile });
            }
        }
    }
}

// Give each cell its exact row. Where a cell occurs twice the later row counts.
void store::state::place(int64_t n, const cell_source & cells) {
    is_empty = false;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t  global = cells.at(i), cell = global % shape.n_cell;
        stream_state & stream = streams[global / shape.n_cell];
        if (stream.slot[cell] < 0) {
            stream.hold(cell);
        }
        stream.set_in_tile(cell, 0);
        exact_row & row = stream.rows[stream.slot[cell]];
        row.write       = n_write;
        row.source      = (int32_t) i;
        row.written_at  = ++stream.clock;
    }
}

// What any stream has room for; a pool that holds all cells never lacks it.
void store::state::grant() {
    granted = no_limit;
    for (const stream_state & stream : streams) {
        granted = n_row == shape.n_cell ? no_limit : std::min<int64_t>(granted, stream.free.size());
    }
}

void store::state::copy_rows(int64_t first, int64_t last, const cell_source & cells, const row_source & rows) {
    for (int64_t i = first; i < last; ++i) {
        const int64_t global = cells.at(i);
        const int     index  = (int) (global / shape.n_cell);
        const int32_t slot   = streams[index].slot[global % shape.n_cell];
        if (streams[index].rows[slot].source != i) {
            continue;
        }
        const char * data = (const char *) rows.data + i * rows.stride;
        if (rows.is_half) {
            memcpy(row(index, slot), data, row_bytes(shape));
        } else {
            float_to_half((const float *) data, row(index, slot), shape.n_embd());
        }
    }
}

void store::state::enlarge_pool(int64_t n_ubatch) {
    const int64_t n_new = n_row_of(shape, codec != nullptr, n_ubatch);
    if (n_new > n_row) {
        const size_t stream_bytes = n_row * row_bytes(shape), new_stream_bytes = n_new * row_bytes(shape);
        require_memory(shape.n_stream * new_stream_bytes, "a write of more rows than n_ubatch");
        mapping larger(shape.n_stream * new_stream_bytes);
        for (stream_state & stream : streams) {
            stream.reserve(n_new); // all that can fail comes before the first change
        }
        for (int index = 0; index < shape.n_stream; ++index) {
            streams[index].enlarge(n_new);
            memcpy(larger.data() + index * new_stream_bytes, pool.data() + index * stream_bytes, stream_bytes);
        }
        pool  = std::move(larger);
        n_row = n_new;
    }
    n_row_most = n_ubatch;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Reading and rewriting
// ---------------------------------------------------------------------------------------------------------------------------------------------

// rows f16 [last - first, n_embd]: tokens first .. last - 1 of a tile
void store::state::read_tile(int index, int64_t tile, int first, int last, uint16_t * rows) const {
    const stream_state & stream     = streams[index];
    const int64_t        cell0      = first_cell(tile);
    const size_t         n_embd     = shape.n_embd();
    bool                 has_packed = false;
    for (int token = first; token < last; ++token) {
        const int32_t slot = stream.slot[cell0 + token];
        uint16_t *    out  = rows + (token - first) * n_embd;
        if (slot >= 0) {
            memcpy(out, row(index, slot), row_bytes(shape));
        } else if (stream.in_tile[cell0 + token]) {
            has_packed = true;
        } else {
            memset(out, 0, row_bytes(shape));
        }
    }
    for (int head = 0; has_packed && head < shape.n_head; ++head) {
        const pack_scratch parts = scratch();
        codec->unpack(packed(index, tile, head), parts.x, parts.codec);
        for (int token = first; token < last; ++token) {
            if (stream.slot[cell0 + token] < 0 && stream.in_tile[cell0 + token]) {
                float_to_half(parts.x + (size_t) token * shape.d_head, rows + (token - first) * n_embd + (size_t) head * shape.d_head, shape.d_head);
            }
        }
    }
}

// marked u8 [n_token]
void store::state::rewrite_tile(int index, int64_t tile, const uint8_t * marked, const rewrite & f) {
    stream_state &        stream = streams[index];
    const int64_t         first  = first_cell(tile);
    const int             n      = n_token(tile);
    const size_t          n_embd = shape.n_embd();
    std::vector<uint16_t> rows(n * n_embd);
    read_tile(index, tile, 0, n, rows.data());
    f(index * shape.n_cell + first, n, rows.data());

    bool is_stale = false; // the packed tile holds a row that has changed
    for (int token = 0; token < n; ++token) {
        is_stale |= marked[token] && stream.in_tile[first + token];
    }
    if (is_stale) {
        aligned_buffer fresh;
        uint8_t *      heads = fresh.reserve(shape.n_head * tile_bytes());
        for (int head = 0; head < shape.n_head; ++head) {
            if (!encode(index, tile, head, marked, rows.data(), heads + head * tile_bytes())) {
                fail(GEAR_ERROR_CALLBACK, "layer %d %s: the codec failed on head %d of the tile at cell %lld of stream %d while its rows were changed",
                     shape.il, side_name[shape.side], head, (long long) first, index);
            }
        }
        memcpy(packed(index, tile, 0), heads, shape.n_head * tile_bytes());
        mark_packed(index, tile);
    }
    for (int token = 0; token < n; ++token) {
        const int32_t slot = stream.slot[first + token];
        if (marked[token] && slot >= 0) {
            memcpy(row(index, slot), rows.data() + token * n_embd, row_bytes(shape));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The public side
// ---------------------------------------------------------------------------------------------------------------------------------------------

store::store(const store_shape & shape, std::shared_ptr<const tile_codec> codec) : self(std::make_unique<state>()) {
    check_shape(shape);
    char what[64];
    snprintf(what, sizeof what, "the %s cache of layer %d", side_name[shape.side], shape.il);
    const size_t tile_bytes = codec ? codec->tile_bytes() : 0;
    require_memory(bytes(shape, tile_bytes), what);

    state & s    = *self;
    s.shape      = shape;
    s.codec      = codec;
    s.n_tile     = n_tile_of(shape.n_cell, shape.tile);
    s.n_row      = n_row_of(shape, codec != nullptr, shape.n_ubatch);
    s.n_row_most = shape.n_ubatch;
    s.tiles      = mapping(tiles_bytes(shape, tile_bytes));
    s.pool       = mapping(shape.n_stream * s.n_row * row_bytes(shape));
    s.streams.resize(shape.n_stream);
    for (stream_state & stream : s.streams) {
        stream.reset(shape.tile, shape.n_cell, s.n_row);
    }
    s.candidate_of.assign(s.n_tile, -1);
    s.candidates.reserve(s.n_tile);
    s.victims.reserve((size_t) shape.n_stream * s.n_tile);
}

store::~store() = default;

const store_shape & store::shape() const {
    return self->shape;
}

size_t store::tile_bytes() const {
    return self->tile_bytes();
}

int store::n_tile() const {
    return self->n_tile;
}

size_t store::scratch_bytes() const {
    return self->scratch_bytes();
}

size_t store::bytes(const store_shape & shape, size_t tile_bytes) {
    const int64_t n_row = n_row_of(shape, tile_bytes > 0, shape.n_ubatch);
    return tiles_bytes(shape, tile_bytes) + shape.n_stream * n_row * row_bytes(shape) + table_bytes(shape, n_row);
}

bool store::write(const team & t, int64_t n, const cell_source & cells, const row_source & rows) {
    state & s = *self;
    if (s.is_covered(t, n)) { // a decode step: thread 0 does it alone, and nobody waits
        const int64_t invalid = s.first_invalid(n, cells);
        if (t.ith == 0 && invalid < 0) {
            ++s.n_write;
            s.place(n, cells);
            s.copy_rows(0, n, cells, rows);
        } else if (t.ith == 0) {
            s.failed = false;
            s.attempt([&] { s.refuse(n, cells, invalid); });
        }
        s.allowances[t.ith].n_row -= n;
        return invalid < 0;
    }

    const auto plan = [&] {
        const int64_t invalid = s.first_invalid(n, cells);
        if (invalid >= 0) {
            s.refuse(n, cells, invalid);
        }
        s.plan(t.nth, n, cells);
    };
    const auto commit = [&] {
        s.place(n, cells);
        s.grant();
    };
    const bool ok = s.together(t, plan, commit);
    if (ok) {
        s.copy_rows(n * t.ith / t.nth, n * (t.ith + 1) / t.nth, cells, rows);
        s.allowances[t.ith].n_row = s.granted;
        if (t.ith == 0) {
            s.allowance_nth = t.nth; // not before the barrier: until then others may still be asking is_covered()
        }
    }
    t.wait();
    return ok;
}

bool store::flush(const team & t, bool full_only) {
    state &    s  = *self;
    const bool ok = s.together(t, [&] { s.plan_flush(full_only); }, [] {});
    t.wait();
    return ok;
}

gear_status store::status() const {
    return self->failure.status;
}

const char * store::message() const {
    return self->failure.text;
}

void store::read(int64_t cell, int64_t n, uint16_t * rows) const {
    const state & s = *self;
    s.require_range(cell, n, "read");
    while (n > 0) {
        const int64_t local = cell % s.shape.n_cell, tile = local / s.shape.tile;
        const int     first = (int) (local - s.first_cell(tile));
        const int     last  = (int) std::min<int64_t>(s.n_token(tile), first + n);
        s.read_tile((int) (cell / s.shape.n_cell), tile, first, last, rows);
        cell += last - first;
        n -= last - first;
        rows += (size_t) (last - first) * s.shape.n_embd();
    }
}

void store::erase(int64_t cell, int64_t n) {
    state & s = *self;
    s.require_range(cell, n, "erase");
    for (; n > 0; ++cell, --n) {
        stream_state & stream = s.streams[cell / s.shape.n_cell];
        const int64_t  local  = cell % s.shape.n_cell;
        stream.set_in_tile(local, 0);
        if (stream.slot[local] >= 0) {
            stream.release(local);
        }
    }
}

void store::keep(const uint8_t * marked) {
    state & s = *self;
    for (int index = 0; index < s.shape.n_stream; ++index) {
        stream_state &       stream = s.streams[index];
        const uint8_t *      mark   = marked + index * s.shape.n_cell;
        bool                 any    = false;
        std::vector<int64_t> gone; // when the exact rows were written that go now
        for (int64_t cell = 0; cell < s.shape.n_cell; ++cell) {
            any = any || (mark[cell] && stream.is_written(cell));
            if (!mark[cell] && stream.slot[cell] >= 0) {
                gone.push_back(stream.rows[stream.slot[cell]].written_at);
            }
        }
        if (!any) {
            stream.reset(s.shape.tile, s.shape.n_cell, s.n_row);
            continue;
        }
        for (int64_t cell = 0; cell < s.shape.n_cell; ++cell) {
            if (!mark[cell] && stream.is_written(cell)) {
                erase(index * s.shape.n_cell + cell, 1);
            }
        }
        std::sort(gone.begin(), gone.end());
        for (exact_row & row : stream.rows) {
            row.written_at -= std::lower_bound(gone.begin(), gone.end(), row.written_at) - gone.begin();
        }
        stream.clock -= (int64_t) gone.size();
    }
    s.allowance_nth = 0; // what the team was told holds no more
}

void store::clear() {
    state & s = *self;
    if (s.is_empty) {
        return;
    }
    s.n_row         = n_row_of(s.shape, s.codec != nullptr, s.shape.n_ubatch); // a pool that grew is a new store's again
    s.n_row_most    = s.shape.n_ubatch;
    s.allowance_nth = 0;
    for (stream_state & stream : s.streams) {
        stream.reset(s.shape.tile, s.shape.n_cell, s.n_row);
    }
    s.tiles.discard();
    s.is_empty = true;
}

void store::copy_stream(int from, const store & source, int to) {
    state &             s = *self;
    const state &       o = *source.self;
    const store_shape & a = s.shape;
    const store_shape & b = o.shape;
    if (a.side != b.side || a.n_head != b.n_head || a.d_head != b.d_head || a.n_cell != b.n_cell || a.tile != b.tile || a.n_tail != b.n_tail ||
        a.n_sink != b.n_sink || s.tile_bytes() != o.tile_bytes()) {
        fail(GEAR_ERROR_INVALID, "layer %d %s: a stream can only be copied between caches of one shape and configuration", a.il, side_name[a.side]);
    }
    if (from < 0 || from >= b.n_stream || to < 0 || to >= a.n_stream) {
        fail(GEAR_ERROR_INVALID, "layer %d %s: cannot copy stream %d of %d to stream %d of %d", a.il, side_name[a.side], from, b.n_stream, to, a.n_stream);
    }
    if (&s == &o && from == to) {
        return;
    }
    s.enlarge_pool(std::max(s.n_row_most, o.n_row_most));
    stream_state &       target = s.streams[to];
    const stream_state & origin = o.streams[from];

    target = origin;
    target.enlarge(s.n_row);
    for (int64_t i = 0; i < o.n_row; ++i) {
        target.rows[i].write = 0; // numbers of the source's writes mean nothing here
        if (origin.rows[i].cell >= 0) {
            memcpy(s.row(to, i), o.row(from, i), row_bytes(a));
        }
    }
    for (int tile = 0; tile < s.n_tile; ++tile) {
        if (origin.tiles[tile].n_in_tile > 0) {
            memcpy(s.packed(to, tile, 0), o.packed(from, tile, 0), a.n_head * s.tile_bytes());
        }
    }
    s.is_empty      = false;
    s.allowance_nth = 0; // there may be less room than the team was told
}

void store::update(const uint8_t * marked, const rewrite & f) {
    state & s = *self;
    for (int index = 0; index < s.shape.n_stream; ++index) {
        for (int64_t tile = 0; tile < s.n_tile; ++tile) {
            const uint8_t * first = marked + index * s.shape.n_cell + s.first_cell(tile);
            if (std::any_of(first, first + s.n_token(tile), [](uint8_t mark) { return mark != 0; })) {
                s.rewrite_tile(index, tile, first, f);
            }
        }
    }
}

bool store::has_tiles() const {
    return self->tiles.size() > 0;
}

int64_t store::room(int stream) const {
    return (int64_t) self->streams[stream].free.size();
}

int64_t store::clock(int stream) const {
    return self->streams[stream].clock;
}

std::vector<exact_cell> store::exact_cells(int stream) const {
    std::vector<exact_cell> cells;
    for (const exact_row & row : self->streams[stream].rows) {
        if (row.cell >= 0) {
            cells.push_back({ row.cell, row.written_at });
        }
    }
    std::sort(cells.begin(), cells.end(), [](const exact_cell & a, const exact_cell & b) { return a.written_at < b.written_at; });
    return cells;
}

void store::put_tile(int index, int tile, const uint8_t * in_tile, const uint8_t * heads) {
    state &        s      = *self;
    stream_state & stream = s.streams.at(index);
    if (tile < 0 || tile >= s.n_tile || !has_tiles() || stream.tiles[tile].n_in_tile > 0) {
        fail(GEAR_ERROR_INTERNAL, "layer %d %s: tile %d of stream %d cannot be put back", s.shape.il, side_name[s.shape.side], tile, index);
    }
    memcpy(s.packed(index, tile, 0), heads, s.shape.n_head * s.tile_bytes());
    for (int token = 0; token < s.n_token(tile); ++token) {
        stream.set_in_tile(s.first_cell(tile) + token, in_tile[token] != 0);
    }
    s.is_empty = false;
}

void store::put_row(int index, const exact_cell & cell, const uint16_t * row) {
    state &        s      = *self;
    stream_state & stream = s.streams.at(index);
    if (cell.cell < 0 || cell.cell >= s.shape.n_cell || stream.slot[cell.cell] >= 0 || stream.free.empty()) {
        fail(GEAR_ERROR_INTERNAL, "layer %d %s: the row of cell %lld of stream %d cannot be put back", s.shape.il, side_name[s.shape.side],
             (long long) cell.cell, index);
    }
    stream.hold(cell.cell);
    const int32_t slot = stream.slot[cell.cell];
    stream.rows[slot]  = { (int32_t) cell.cell, 0, 0, cell.written_at };
    memcpy(s.row(index, slot), row, row_bytes(s.shape));
    put_clock(index, std::max(stream.clock, cell.written_at));
}

void store::put_clock(int index, int64_t clock) {
    state & s                 = *self;
    s.streams.at(index).clock = clock;
    s.is_empty                = false;
    s.allowance_nth           = 0; // there may be less room than the team was told
}

tile_view store::view(int stream, int tile) const {
    const state &        s     = *self;
    const stream_state & of    = s.streams[stream];
    const tile_state &   home  = of.tiles[tile];
    const int64_t        first = s.first_cell(tile);
    return { home.n_in_tile > 0 ? s.packed(stream, tile, 0) : nullptr,
             of.slot.data() + first,
             of.in_tile.data() + first,
             s.n_token(tile),
             home.n_exact,
             home.n_packed };
}

const uint16_t * store::row(int stream, int32_t slot) const {
    return self->row(stream, slot);
}

gear_store_stats store::stats() const {
    const state &    s     = *self;
    gear_store_stats stats = {};
    stats.il               = s.shape.il;
    stats.side             = s.shape.side;
    stats.kind             = s.codec ? 0 : 3;
    stats.n_head_kv        = s.shape.n_head;
    stats.d_head           = s.shape.d_head;
    stats.n_stream         = s.shape.n_stream;
    stats.n_cell           = s.shape.n_cell;
    stats.n_pack           = s.n_pack;
    for (const stream_state & stream : s.streams) {
        for (const tile_state & tile : stream.tiles) {
            stats.n_exact += tile.n_exact;
            stats.n_packed += tile.n_packed;
            stats.bytes_tiles_used += tile.n_in_tile > 0 ? s.shape.n_head * s.tile_bytes() : 0;
        }
    }
    stats.n_written        = stats.n_exact + stats.n_packed;
    stats.bytes_tiles      = s.tiles.size();
    stats.bytes_exact      = s.pool.size();
    stats.bytes_tables     = table_bytes(s.shape, s.n_row);
    stats.bytes_f16        = s.shape.n_stream * s.shape.n_cell * row_bytes(s.shape);
    stats.bits_per_element = s.codec ? 8.0 * s.tile_bytes() / ((double) s.shape.tile * s.shape.d_head) : 16.0;
    return stats;
}

} // namespace gear
