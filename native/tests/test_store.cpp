// The store against a plain f16 cache, with a codec that has nothing to do with GEAR. One file of more than 500 lines: short cases of one subject, whose
// harness is in store_model.h already.
#include "allocations.h"
#include "common/error.h"
#include "common/half_rows.h"
#include "store_model.h"

using namespace store_test;

namespace {

constexpr int n_head = 3, d_head = 16, tile = 32;

store_shape shape_of(int64_t n_cell, int n_stream, int n_tail, int n_sink, int n_ubatch) {
    return { 5, GEAR_SIDE_K, n_head, d_head, n_cell, n_stream, tile, n_tail, n_sink, n_ubatch };
}

std::shared_ptr<byte_codec> codec() {
    return std::make_shared<byte_codec>(tile, d_head);
}

std::vector<float> rows_for(std::mt19937 & random, const std::vector<int64_t> & cells) {
    return random_rows(random, cells.size(), n_head * d_head);
}

int below(std::mt19937 & random, int64_t n) {
    return (int) std::uniform_int_distribution<int64_t>(0, n - 1)(random);
}

// A row or an ubatch in sequence packs each tile once, when it is full and wholly older than the tail.
void test_sequential(int n_ubatch, int step, int n_sink) {
    std::mt19937 random(check::seed());
    auto         bytes = codec();
    pair         both(shape_of(20 * tile, 1, 48, n_sink, n_ubatch), bytes);
    for (int64_t cell = 0; cell + step <= both.n_all(); cell += step) {
        const auto cells = consecutive(cell, step);
        CHECK(both.write(cells, rows_for(random, cells), 2));
        for (int i = 0; i < both.cache.n_tile(); ++i) {
            const bool is_packed = both.cache.view(0, i).packed != nullptr;
            CHECK(!is_packed || (i + 1) * tile + both.shape.n_tail <= cell + std::max(step, both.shape.n_tail));
        }
    }
    CHECK(both.agree());
    CHECK(bytes->n_lost == 0);
    const auto stats   = both.cache.stats();
    int        n_used  = 0;
    bool       is_next = true; // the oldest tiles, without a gap; a tile of sinks only is never packed
    for (int i = n_sink / tile; i < both.cache.n_tile(); ++i) {
        const bool is_packed = both.cache.view(0, i).packed != nullptr;
        CHECK(is_next || !is_packed);
        is_next = is_packed;
        n_used += is_packed;
    }
    CHECK(n_used >= 20 - (n_sink + 48 + n_ubatch + tile + 31) / tile - 1);
    CHECK(stats.n_pack == n_used);
    CHECK(bytes->n_pack == n_used * n_head);
}

// Anything in any order. Returns what a reader sees in the end.
uint64_t random_session(uint32_t seed, const store_shape & shape, bool has_codec, int nth, int n_step) {
    std::mt19937 random(seed);
    const auto   bytes = codec();
    pair         both(shape, has_codec ? bytes : nullptr);
    int64_t      next = 0;
    for (int step = 0; step < n_step; ++step) {
        const int            kind = below(random, 100);
        const int            n    = 1 + below(random, below(random, 3) ? 3 : shape.n_ubatch);
        std::vector<int64_t> cells;
        if (kind < 35) { // in sequence
            for (int i = 0; i < n; ++i) {
                cells.push_back(next++ % both.n_all());
            }
        } else if (kind < 65) { // scattered, cells may come twice
            for (int i = 0; i < n; ++i) {
                cells.push_back(below(random, both.n_all()));
            }
        } else if (kind < 75) { // few cells, again and again
            const int64_t first = below(random, both.n_all());
            for (int i = 0; i < n; ++i) {
                cells.push_back(std::min<int64_t>(both.n_all() - 1, first + below(random, 4)));
            }
        } else if (kind < 80) { // more than the store was made for
            for (int i = 0; i < shape.n_ubatch + 1 + below(random, 8); ++i) {
                cells.push_back(below(random, both.n_all()));
            }
        } else if (kind < 85) {
            const int64_t first = below(random, both.n_all());
            both.erase(first, 1 + below(random, std::min<int64_t>(3 * tile, both.n_all() - first)));
        } else if (kind < 90) {
            both.copy_stream(below(random, shape.n_stream), below(random, shape.n_stream));
        } else if (kind < 94) {
            std::vector<uint8_t> marked(both.n_all(), 0);
            for (int i = 0; i < 20; ++i) {
                marked[below(random, both.n_all())] = 1;
            }
            both.update(marked);
        } else if (kind < 97) {
            both.flush(nth);
        } else if (kind < 98) {
            both.clear();
            next = 0;
        } else { // out of range
            const uint64_t before = both.digest();
            CHECK(!both.write({ below(random, both.n_all()), below(random, 2) ? -1 : both.n_all() }, random_rows(random, 2, shape.n_embd()), nth));
            CHECK(both.digest() == before);
        }
        if (!cells.empty()) {
            const bool is_half = below(random, 2), is_wide = below(random, 2);
            CHECK(both.write(cells, rows_for(random, cells), nth, is_half, is_wide));
        }
        if (!both.agree()) {
            printf("step %d of the session with seed %u, %d threads, kind %d\n", step, seed, nth, kind);
            CHECK(!"the store holds what was written");
            break;
        }
    }
    CHECK(bytes->n_lost == 0);
    return both.digest();
}

void test_random_sessions() {
    uint32_t seed = check::seed();
    for (const store_shape & shape : { shape_of(10 * tile, 1, 32, 4, 16), shape_of(7 * tile + 5, 3, 16, 0, 8), shape_of(12 * tile, 2, 0, 0, 1),
                                       shape_of(3 * tile, 2, 200, 4, 16), shape_of(9 * tile + 1, 1, 40, 70, 8) }) {
        for (const bool has_codec : { true, false }) {
            ++seed;
            const uint64_t digest = random_session(seed, shape, has_codec, 1, 300);
            CHECK(random_session(seed, shape, has_codec, 2, 300) == digest);
            CHECK(random_session(seed, shape, has_codec, 4, 300) == digest);
        }
    }
}

// Threads may run ahead of each other from write to write; whether a write needs a barrier is something each finds out for itself.
void test_writes_without_pause() {
    std::mt19937       random(check::seed());
    pair               both(shape_of(16 * tile, 2, 32, 4, 16), codec());
    std::vector<batch> batches;
    int                n_valid = 0;
    for (int i = 0; i < 1500; ++i) {
        const int n = below(random, 20) ? 1 + below(random, 2) : 1 + below(random, 40);
        batch     b;
        for (int j = 0; j < n; ++j) {
            b.cells.push_back((i + j + below(random, 2) * both.shape.n_cell) % both.n_all());
        }
        b.values = rows_for(random, b.cells);
        if (below(random, 30) == 0) {
            b.cells.back() = both.n_all();
        }
        n_valid += b.cells.back() < both.n_all();
        batches.push_back(b);
    }
    CHECK(both.write_all(batches, 3) == n_valid);
    CHECK(both.agree());
    CHECK(both.write_all({ batches[0] }, 2) == 1); // another team
    CHECK(both.agree());
}

// A cell out of range: an error that names it, and everything is as before, with a barrier or without.
void test_out_of_range() {
    std::mt19937 random(check::seed());
    pair         both(shape_of(8 * tile, 2, 16, 0, 16), codec());
    CHECK(std::string(both.cache.message()).empty());
    const auto cells = consecutive(0, 16);
    CHECK(both.write(cells, rows_for(random, cells), 2));
    const uint64_t before = both.digest();
    for (const int64_t bad : { (int64_t) -1, both.n_all(), INT64_MAX, INT64_MIN }) {
        for (const int nth : { 2, 1, 2 }) {
            CHECK(!both.write({ 3, bad }, random_rows(random, 2, n_head * d_head), nth));
            CHECK(both.cache.status() == GEAR_ERROR_INVALID);
            const std::string message = both.cache.message();
            CHECK(message.find("layer 5 K: row 1 of a write of 2 goes to cell " + std::to_string(bad)) == 0);
            CHECK(message.find("cells 0 to 511") != std::string::npos);
            CHECK(both.digest() == before);
        }
    }
    CHECK(!both.write({ INT32_MIN }, random_rows(random, 1, n_head * d_head), 1, true, false));
    CHECK(both.agree());
}

template <class F> bool fails(gear_status status, const char * part, F && f) {
    try {
        f();
    } catch (const error & e) {
        const bool ok = e.status == status && strstr(e.what(), part);
        printf(ok ? "" : "unexpected: %d: %s\n", e.status, e.what());
        return ok;
    }
    printf("no error, but one with '%s' was due\n", part);
    return false;
}

void test_bad_arguments() {
    store                 cache(shape_of(4 * tile, 2, 16, 0, 16), codec());
    std::vector<uint16_t> rows(n_head * d_head);
    CHECK(fails(GEAR_ERROR_INVALID, "cannot read 1 cells from cell 256", [&] { cache.read(8 * tile, 1, rows.data()); }));
    CHECK(fails(GEAR_ERROR_INVALID, "cannot read -1 cells", [&] { cache.read(0, -1, rows.data()); }));
    CHECK(fails(GEAR_ERROR_INVALID, "cannot erase 2 cells from cell 255", [&] { cache.erase(8 * tile - 1, 2); }));
    CHECK(fails(GEAR_ERROR_INVALID, "cannot copy stream 0 of 2 to stream 2 of 2", [&] { cache.copy_stream(0, cache, 2); }));
    const store longer(shape_of(5 * tile, 2, 16, 0, 16), codec());
    CHECK(fails(GEAR_ERROR_INVALID, "one shape", [&] { cache.copy_stream(0, longer, 0); }));
    CHECK(fails(GEAR_ERROR_INVALID, "layer 5 K: no store has", [&] { store none(shape_of(0, 1, 16, 0, 16), codec()); }));
    CHECK(fails(GEAR_ERROR_INVALID, "layer 5 K: no store has", [&] { store none(shape_of(8, 1, 16, 0, 0), codec()); }));
    CHECK(fails(GEAR_ERROR_MEMORY, "the K cache of layer 5 needs", [&] { store huge(shape_of(INT32_MAX, 10000, 16, 0, 16), codec()); }));
}

// A codec that fails stops the write and loses nothing, whatever it had packed by then.
void test_failing_codec() {
    std::mt19937 random(check::seed());
    const auto   bytes = codec();
    pair         both(shape_of(12 * tile, 1, 8, 0, 16), bytes);
    for (int64_t cell = 0; cell < both.n_all(); cell += 16) {
        const auto cells = consecutive(cell, 16);
        CHECK(both.write(cells, rows_for(random, cells), 2));
    }
    for (int round = 0; round < 6; ++round) {
        std::vector<int64_t> cells;
        for (int i = 0; i < 16; ++i) {
            cells.push_back(below(random, both.n_all()));
        }
        const auto values   = rows_for(random, cells);
        bytes->failing_head = round % n_head;
        int n_written       = 0;
        while (n_written < 20 && both.write(cells, values, 1 + round % 3)) { // until it needs room
            std::for_each(cells.begin(), cells.end(), [&](int64_t & cell) { cell = below(random, both.n_all()); });
            ++n_written;
        }
        CHECK(n_written < 20);
        CHECK(both.cache.status() == GEAR_ERROR_CALLBACK);
        CHECK(strstr(both.cache.message(), "layer 5 K: the codec failed on head"));
        CHECK(both.agree());
        bytes->failing_head = -1;
        CHECK(both.write(cells, values, 2));
        CHECK(both.agree());
    }
}

// More rows than n_ubatch: the pool grows once, for all streams, and all of the write stays exact.
void test_growth() {
    std::mt19937 random(check::seed());
    pair         both(shape_of(20 * tile, 2, 16, 4, 8), codec());
    const auto   some = consecutive(3, 40);
    CHECK(both.write(some, rows_for(random, some), 2));
    const int64_t before = both.cache.stats().bytes_exact;
    int64_t       after  = 0;
    for (int64_t first : { (int64_t) 60, both.shape.n_cell, both.shape.n_cell + 200, (int64_t) 300 }) {
        const auto many = consecutive(first, 200);
        CHECK(both.write(many, rows_for(random, many), 2));
        CHECK(both.agree());
        const gear_store_stats stats = both.cache.stats();
        CHECK(stats.bytes_exact > before && (after == 0 || stats.bytes_exact == after));
        CHECK(stats.n_exact >= 200);
        after = stats.bytes_exact;
    }
    both.copy_stream(0, 1);
    CHECK(both.agree());
}

// Where the pool holds all cells, as many repeated ones as may come never lack room.
void test_repeated_cells_in_full_pool() {
    std::mt19937 random(check::seed());
    for (const bool has_codec : { true, false }) {
        pair       both(shape_of(3 * tile, 1, 2 * tile, 0, 3 * tile), has_codec ? codec() : nullptr);
        const auto all = consecutive(0, 3 * tile - 1);
        CHECK(both.write(all, rows_for(random, all), 2));
        const std::vector<int64_t> same(700, 3 * tile - 1); // so many that the team shares the work
        CHECK(both.write(same, rows_for(random, same), 2));
        CHECK(both.agree());
        CHECK(both.cache.stats().n_exact == 3 * tile);
    }
}

// Full tiles go before a partial one, however cold that is.
void test_full_tiles_first() {
    std::mt19937 random(check::seed());
    pair         both(shape_of(20 * tile, 1, 8, 0, 16), codec()); // a pool of 64 rows
    const auto   partial = consecutive(10 * tile, 5);
    CHECK(both.write(partial, rows_for(random, partial), 2));
    for (int64_t cell = 0; cell < 64; cell += 16) {
        const auto cells = consecutive(cell, 16);
        CHECK(both.write(cells, rows_for(random, cells), 2));
    }
    CHECK(both.cache.view(0, 0).n_packed == tile && both.cache.view(0, 1).n_exact == tile && both.cache.view(0, 10).n_exact == 5);
}

// A row that the write replaces stays where it is, even when its tile has to go.
void test_replaced_row_stays() {
    std::mt19937 random(check::seed());
    pair         both(shape_of(20 * tile, 1, 8, 0, 16), codec()); // a pool of 64 rows
    for (int64_t cell = 0; cell < 64; cell += 16) {
        const auto cells = consecutive(cell, 16);
        CHECK(both.write(cells, rows_for(random, cells), 2));
    }
    const int32_t slot  = both.cache.view(0, 0).slot[3];
    auto          cells = consecutive(64, 14);
    cells.push_back(3);
    cells.push_back(tile + 3);
    CHECK(both.write(cells, rows_for(random, cells), 2));
    CHECK(both.cache.view(0, 0).n_packed == tile - 1 && both.cache.view(0, 0).slot[3] == slot);
    CHECK(both.agree());
}

// A snapshot: streams go to another store and back, tiles as they are.
void test_snapshot() {
    std::mt19937 random(check::seed());
    const auto   bytes = codec();
    pair         both(shape_of(10 * tile + 3, 2, 16, 4, 16), bytes);
    for (int64_t cell = 0; cell < both.n_all(); cell += 13) {
        const auto cells = consecutive(cell, std::min<int64_t>(13, both.n_all() - cell));
        CHECK(both.write(cells, rows_for(random, cells), 2));
    }
    const auto many = consecutive(0, 100); // the pool to be copied has grown
    CHECK(both.write(many, rows_for(random, many), 2));
    const uint64_t digest = both.digest();
    const int64_t  n_pack = bytes->n_pack;

    store_shape one = both.shape;
    one.n_stream    = 1;
    store first(one, bytes), second(one, bytes);
    first.copy_stream(0, both.cache, 0);
    second.copy_stream(1, both.cache, 0);
    std::vector<uint16_t> saved(one.n_cell * one.n_embd()), present(saved.size());
    first.read(0, one.n_cell, saved.data());
    both.cache.read(0, one.n_cell, present.data());
    CHECK(saved == present);
    both.cache.clear();
    CHECK(both.cache.stats().n_written == 0);
    both.cache.copy_stream(0, first, 0);
    both.cache.copy_stream(0, second, 1);
    CHECK(both.digest() == digest);
    CHECK(both.agree());
    CHECK(bytes->n_pack == n_pack);
    for (int64_t cell = 0; cell < 200; cell += 20) {
        const auto cells = consecutive(cell, 20);
        CHECK(both.write(cells, rows_for(random, cells), 2));
        CHECK(both.agree());
    }
}

// What a store knew about its room, and the numbers of its writes, end with a copy from another one.
void test_copy_into_used_store() {
    std::mt19937      random(check::seed());
    const store_shape shape  = shape_of(20 * tile, 1, 0, 0, 2 * tile); // a pool of 3 tiles
    const auto        values = random_rows(random, 2 * tile, shape.n_embd());
    const auto        write  = [&](store & cache, int64_t first, int64_t n) {
        const auto       cells = consecutive(first, n);
        std::atomic<int> n_ok{ 0 };
        run_team(2, [&](const team & t) { n_ok += cache.write(t, n, { cells.data(), 8, true }, { values.data(), (size_t) shape.n_embd() * 4, false }); });
        return n_ok == 2;
    };
    store full(shape, codec()), fresh(shape, codec()), used(shape, codec());
    CHECK(write(full, 0, 2 * tile));
    fresh.copy_stream(0, full, 0);
    CHECK(write(fresh, 2 * tile, 2 * tile));
    CHECK(fresh.stats().n_written == 4 * tile);

    CHECK(write(full, 2 * tile, tile));
    CHECK(full.stats().n_exact == 3 * tile);
    CHECK(write(used, 0, 1));
    used.copy_stream(0, full, 0);
    CHECK(write(used, 3 * tile, 1));
    CHECK(used.stats().n_written == 3 * tile + 1);
}

// Each stream has a tail of its own: a long write to one packs nothing of the other.
void test_streams_are_apart() {
    std::mt19937 random(check::seed());
    pair         both(shape_of(20 * tile, 2, 24, 0, 16), codec());
    const auto   few = consecutive(both.shape.n_cell, 24);
    CHECK(both.write(few, rows_for(random, few), 2));
    for (int64_t cell = 0; cell < both.shape.n_cell; cell += 16) {
        const auto cells = consecutive(cell, 16);
        CHECK(both.write(cells, rows_for(random, cells), 2));
    }
    CHECK(both.agree());
    CHECK(both.cache.view(1, 0).n_exact == 24);
}

// Rows that come back exact after packing (flush) need no second packing as long as they are not written again.
void test_flush_packs_once() {
    std::mt19937 random(check::seed());
    pair         both(shape_of(10 * tile, 1, 24, 0, 16), codec());
    for (int64_t cell = 0; cell < 4 * tile; cell += 16) {
        const auto cells = consecutive(cell, 16);
        CHECK(both.write(cells, rows_for(random, cells), 2));
    }
    both.flush(2);
    CHECK(both.agree());
    CHECK(both.cache.stats().n_exact == 24);
    const int64_t n_pack = both.cache.stats().n_pack;
    CHECK(n_pack == 4);
    both.flush(2);
    CHECK(both.cache.stats().n_pack == n_pack);
    const auto more = consecutive(4 * tile, 24); // pushes the old tail out
    CHECK(both.write(more, rows_for(random, more), 2));
    both.flush(2);
    CHECK(both.agree());
    CHECK(both.cache.stats().n_pack == n_pack);
}

// Whether two stores hold the same in the same form, and think their rows of the same age.
bool are_alike(const store & a, const store & b) {
    const int64_t         n_all = a.shape().n_cell * a.shape().n_stream;
    std::vector<uint16_t> rows_a((size_t) (n_all * n_head * d_head)), rows_b(rows_a.size());
    a.read(0, n_all, rows_a.data());
    b.read(0, n_all, rows_b.data());
    bool alike = rows_a == rows_b && a.stats().n_packed == b.stats().n_packed;
    for (int stream = 0; stream < a.shape().n_stream; ++stream) {
        const auto of_a = a.exact_cells(stream), of_b = b.exact_cells(stream);
        alike = alike && a.clock(stream) == b.clock(stream) && of_a.size() == of_b.size();
        for (size_t i = 0; alike && i < of_a.size(); ++i) {
            alike = of_a[i].cell == of_b[i].cell && of_a[i].written_at == of_b[i].written_at;
        }
    }
    return alike;
}

// Cells that are given up leave no trace: a stream goes on as one that never had them, and one without any is new.
void test_given_up_cells_leave_no_trace() {
    std::mt19937 random(check::seed());
    const auto   shape = shape_of(10 * tile, 2, 24, 4, 16);
    pair         fresh(shape, codec()), used(shape, codec());
    const auto   write = [&](pair & both, int64_t cell, const std::vector<float> & rows) { CHECK(both.write(consecutive(cell, 16), rows, 2)); };
    const auto   keep  = [&](pair & both, int64_t n) { // the first n cells of stream 0
        std::vector<uint8_t> marked(2 * shape.n_cell);
        std::fill_n(marked.begin(), n, (uint8_t) 1);
        both.cache.keep(marked.data());
    };
    for (int64_t cell = 0; cell < shape.n_cell; cell += 16) { // earlier lives, in both streams
        write(used, cell, rows_for(random, consecutive(cell, 16)));
        write(used, shape.n_cell + cell, rows_for(random, consecutive(cell, 16)));
    }
    keep(used, 0);
    CHECK(used.cache.stats().n_written == 0);
    CHECK(are_alike(fresh.cache, used.cache));
    for (int64_t cell = 0; cell < 8 * tile; cell += 16) {
        const auto rows = rows_for(random, consecutive(cell, 16));
        write(fresh, cell, rows);
        write(used, cell, rows);
        if (cell == 3 * tile || cell == 5 * tile + 16) {
            write(used, cell + 16, rows_for(random, consecutive(cell, 16)));
            write(used, shape.n_cell, rows_for(random, consecutive(cell, 16)));
            keep(used, cell + 16);
        }
    }
    CHECK(fresh.cache.stats().n_packed > 0);
    CHECK(are_alike(fresh.cache, used.cache));
    fresh.flush(2);
    used.flush(2);
    CHECK(are_alike(fresh.cache, used.cache));
}

// A pool that a large write made larger is a new store's again after clear().
void test_clear_after_growth() {
    std::mt19937 random(check::seed());
    pair         fresh(shape_of(20 * tile, 1, 24, 0, 16), codec()), used(shape_of(20 * tile, 1, 24, 0, 16), codec());
    CHECK(used.write(consecutive(0, 8 * tile), rows_for(random, consecutive(0, 8 * tile)), 2));
    used.cache.clear();
    for (int64_t cell = 0; cell < 12 * tile; cell += 16) {
        const auto rows = rows_for(random, consecutive(cell, 16));
        CHECK(fresh.write(consecutive(cell, 16), rows, 2) && used.write(consecutive(cell, 16), rows, 2));
    }
    CHECK(fresh.cache.room(0) == used.cache.room(0) && are_alike(fresh.cache, used.cache));
}

void test_statistics() {
    const auto        bytes = codec();
    const store_shape shape = shape_of(10 * tile + 1, 3, 16, 4, 8);
    pair              both(shape, bytes);
    gear_store_stats  stats = both.cache.stats();
    CHECK(stats.il == 5 && stats.side == GEAR_SIDE_K && stats.kind == 0 && stats.n_head_kv == n_head && stats.d_head == d_head && stats.n_stream == 3);
    CHECK(stats.n_cell == shape.n_cell && stats.n_written == 0 && stats.n_pack == 0 && stats.bytes_tiles_used == 0);
    CHECK(stats.bytes_tiles == 3 * 11 * n_head * (int64_t) bytes->tile_bytes());
    CHECK(stats.bytes_exact == 3 * 64 * n_head * d_head * 2); // 4 + 16 + 8 + 32 rows, rounded up to 32
    CHECK(stats.bytes_f16 == 3 * shape.n_cell * n_head * d_head * 2);
    CHECK(stats.bits_per_element == 8.0);
    CHECK(stats.bytes_tiles + stats.bytes_exact + stats.bytes_tables == (int64_t) store::bytes(shape, bytes->tile_bytes()));

    const store f16(shape, nullptr);
    stats = f16.stats();
    CHECK(stats.kind == 3 && stats.bytes_tiles == 0 && stats.bytes_exact == stats.bytes_f16 && stats.bits_per_element == 16.0);
    CHECK(stats.bytes_exact + stats.bytes_tables == (int64_t) store::bytes(shape, 0));

    const store_shape all_tail = shape_of(10 * tile, 1, 10 * tile, 0, 8); // a tail as long as the context: nothing to pack
    const store       exact(all_tail, bytes);
    CHECK(exact.stats().bytes_tiles == 0 && exact.stats().bytes_exact == exact.stats().bytes_f16);
}

// Decoding allocates nothing, with tiles packed on the way.
void test_no_allocation() {
    store                    cache(shape_of(30 * tile, 2, 16, 4, 16), codec());
    const std::vector<float> row(n_head * d_head, 1.0f);
    barrier                  sync;
    const team               t     = { 0, 1, &sync };
    const auto               write = [&](int64_t cell) { return cache.write(t, 1, { &cell, 8, true }, { row.data(), row.size() * 4, false }); };
    for (int64_t cell = 0; cell < 4 * tile; ++cell) { // the first packing makes the thread's scratch
        CHECK(write(cell));
    }
    const int64_t n_pack = cache.stats().n_pack, before = allocations::n_made;
    for (int64_t i = 0; i < 3000; ++i) {
        CHECK(write(i * 7 % (60 * tile)));
    }
    CHECK(allocations::n_made == before);
    CHECK(cache.stats().n_pack > n_pack);
}

void test_rows_of_halves() {
    std::vector<uint16_t> halves;
    for (uint32_t h = 0; h < 65536; ++h) {
        if ((h & 0x7c00) != 0x7c00 || (h & 0x3ff) == 0) { // how a NaN travels is the hardware's affair
            halves.push_back((uint16_t) h);
        }
    }
    std::mt19937       random(check::seed());
    std::vector<float> values(100003);
    for (float & value : values) {
        const uint32_t bits = random();
        memcpy(&value, &bits, 4);
        value = std::isnan(value) ? 65519.9f : value;
    }
    for (int level = 0; gear_simd_name(level); ++level) {
        CHECK(gear_simd_select(gear_simd_name(level)) == GEAR_OK);
        std::vector<float>    wide(halves.size());
        std::vector<uint16_t> narrow(values.size());
        half_to_float(halves.data(), wide.data(), halves.size());
        float_to_half(values.data(), narrow.data(), values.size());
        int n_wrong = 0;
        for (size_t i = 0; i < halves.size(); ++i) {
            n_wrong += wide[i] != half_to_float(halves[i]) || std::signbit(wide[i]) != (halves[i] >> 15 != 0);
        }
        for (size_t i = 0; i < values.size(); ++i) {
            n_wrong += narrow[i] != float_to_half(values[i]);
        }
        CHECK(n_wrong == 0);
    }
    CHECK(gear_simd_select(nullptr) == GEAR_OK);
}

} // namespace

int main() {
    for (const int n_sink : { 0, 4, 40 }) {
        test_sequential(64, 1, n_sink);
        test_sequential(64, 16, n_sink);
        test_sequential(64, 64, n_sink);
        test_sequential(1, 1, n_sink);
    }
    test_random_sessions();
    test_writes_without_pause();
    test_out_of_range();
    test_bad_arguments();
    test_failing_codec();
    test_growth();
    test_repeated_cells_in_full_pool();
    test_full_tiles_first();
    test_replaced_row_stays();
    test_snapshot();
    test_copy_into_used_store();
    test_streams_are_apart();
    test_flush_packs_once();
    test_given_up_cells_leave_no_trace();
    test_clear_after_growth();
    test_statistics();
    test_no_allocation();
    test_rows_of_halves();
    return check::finish();
}
