// cuda_cache_cases.h - a store on the CPU and a cache in device memory that are told the same.
#pragma once

#include "cuda_attention_cases.h"

namespace cuda_test {

// A store on the CPU and a cache in device memory that are told the same; every row must come out the same.
struct twins {
    const device &                         on;
    cuda::cuda_worker                      worker;
    std::shared_ptr<const gear_tile_codec> codec;
    store_shape                            shape;
    store                                  here;
    head_bases                             bases[2]; // of `there` and `second`
    std::shared_ptr<cuda::cache_table>     table;
    cuda::cache_side                       there, second; // another layer of the same table
    int64_t                                step = 0, n_measured_rows = 0, n_measured_scores = 0;

    twins(const device & on, const gear_config & config, gear_side side, const store_shape & shape)
        : on(on), worker(on.api, 0), codec(std::make_shared<gear_tile_codec>(config, side, shape.d_head)), shape(shape), here(shape, codec),
          bases{ head_bases(codec->layout()), head_bases(codec->layout()) }, table(std::make_shared<cuda::cache_table>(on.api, shape, true)),
          there(on.api, shape, &codec->layout(), config.seed, table, &bases[0]), second(on.api, shape, &codec->layout(), config.seed, table, &bases[1]) {}

    void wait() { on.check_ok(on.api.wait_stream(worker.work), "wait_stream"); }

    std::vector<float> random_rows(size_t n) const {
        std::vector<float> rows(n * shape.n_embd());
        std::generate(rows.begin(), rows.end(), [] { return normal(); });
        return rows;
    }

    void write(const std::vector<int64_t> & cells, bool is_half) {
        const size_t             n_embd = shape.n_embd();
        const std::vector<float> rows   = random_rows(cells.size());
        std::vector<uint16_t>    halves(rows.size());
        std::transform(rows.begin(), rows.end(), halves.begin(), float_to_half);
        const cell_source where = { cells.data(), sizeof(int64_t), true };
        const void *      data  = is_half ? (const void *) halves.data() : rows.data();
        const size_t      size  = is_half ? 2 : 4;
        barrier           sync;
        CHECK(here.write({ 0, 1, &sync }, (int64_t) cells.size(), where, { data, n_embd * size, is_half }));

        array<uint8_t> uploaded(on, std::vector<uint8_t>((const uint8_t *) data, (const uint8_t *) data + rows.size() * size));
        ++step;
        for (cuda::cache_side * side : { &there, &second }) {
            table->plan(worker, step, (int64_t) cells.size(), where);
            side->write(worker, (int64_t) cells.size(), uploaded.data, (int64_t) (n_embd * size), is_half);
        }
        wait();
    }

    // Queries of 2 query heads a KV head, some channels larger than others, one no number.
    void observe() {
        gear_attention_params p = {};
        p.n_query               = whole(1, 9);
        p.n_head                = 2 * shape.n_head;
        p.n_stream              = 1;
        p.scale                 = 0.25f;
        p.q_stride[0]           = (int64_t) p.n_head * shape.d_head * 4;
        p.q_stride[1]           = (int64_t) shape.d_head * 4;
        std::vector<float> q((size_t) (p.n_query * p.n_head * shape.d_head));
        for (size_t i = 0; i < q.size(); ++i) {
            q[i] = (i % 7 == 3 ? 6.0f : 1.0f) * normal();
        }
        q[0] = NAN;
        codec->bases()->reserve(shape.n_head);
        for (int head = 0; head < p.n_head; ++head) {
            codec->bases()->observe(head / 2, q.data() + head * shape.d_head, p.n_query, p.q_stride[0], p.scale);
        }
        array<float> uploaded(on, q);
        p.q = uploaded.data;
        there.observe(worker, p);
        second.observe(worker, p);
        wait();
    }

    void flush(bool full_only) {
        barrier sync;
        CHECK(here.flush({ 0, 1, &sync }, full_only));
        table->plan_flush(worker, full_only);
        there.pack(worker);
        second.pack(worker);
    }

    // f(side) changes one layer, then the other: each has a table of its own meanwhile, and afterwards both agree.
    template <class F> void one_by_one(F f) {
        second.table_of_its_own(std::make_shared<cuda::cache_table>(worker, *table));
        f(there);
        f(second);
        CHECK(table->planner().agrees(second.table().planner()) && second.table().planner().agrees(table->planner()));
        second.table_of_its_own(table);
        wait();
    }

    // Rows from the host, as when a state is restored.
    void put(int64_t first, int64_t n) {
        const std::vector<float> rows = random_rows((size_t) n);
        std::vector<uint16_t>    halves(rows.size());
        std::transform(rows.begin(), rows.end(), halves.begin(), float_to_half);
        std::vector<int64_t> cells((size_t) n);
        std::iota(cells.begin(), cells.end(), first);
        const size_t row = shape.n_embd() * sizeof(uint16_t);
        barrier      sync;
        CHECK(here.write({ 0, 1, &sync }, n, { cells.data(), sizeof(int64_t), true }, { halves.data(), row, true }));
        one_by_one([&](cuda::cache_side & side) { side.put(worker, ++step, n, cells.data(), halves.data()); });
    }

    // Rows changed in place, as by the K-shift: each marked row is turned round.
    void update() {
        const size_t         n_embd = shape.n_embd();
        std::vector<uint8_t> marked((size_t) (shape.n_cell * shape.n_stream));
        const int            kind = whole(0, 2), from = whole(0, (int) marked.size() - 1);
        for (size_t i = 0; i < marked.size(); ++i) {
            marked[i] = kind == 0 ? (int) i >= from : kind == 1 ? whole(0, 9) == 0 : i / 150 % 2 == 0;
        }
        const auto turn = [&](int64_t first, int64_t n, uint16_t * rows) {
            for (int64_t i = 0; i < n; ++i) {
                if (marked[(size_t) (first + i)]) {
                    std::reverse(rows + i * n_embd, rows + (i + 1) * n_embd);
                }
            }
        };
        here.update(marked.data(), turn);
        const int64_t   most_tiles = whole(1, 3);
        array<uint16_t> staging(on, std::vector<uint16_t>((size_t) (most_tiles * shape.tile) * n_embd, 0x7e00));
        one_by_one([&](cuda::cache_side & side) {
            side.update(worker, marked.data(), staging.data, most_tiles, [&](int64_t first, int64_t n, uint16_t *) {
                wait();
                std::vector<uint16_t> rows = staging.get();
                turn(first, n, rows.data());
                staging.set(rows);
            });
        });
    }

    // To the host and back, as a session goes: exact to the bit, and what comes later goes on as if nothing had been.
    void round_trip() {
        one_by_one([&](cuda::cache_side & side) {
            const std::unique_ptr<store> copy = side.to_store(worker, codec);
            compare_stores(*copy);
            side.adopt(worker, *copy);
        });
    }

    void compare_stores(const store & copy) const {
        bool ok = true;
        for (int stream = 0; stream < shape.n_stream; ++stream) {
            ok &= copy.clock(stream) == here.clock(stream) && copy.room(stream) >= here.room(stream);
            const auto mine = copy.exact_cells(stream), wanted = here.exact_cells(stream);
            ok &= std::equal(mine.begin(), mine.end(), wanted.begin(), wanted.end(),
                             [](const exact_cell & a, const exact_cell & b) { return a.cell == b.cell && a.written_at == b.written_at; });
            for (int tile = 0; tile < copy.n_tile(); ++tile) {
                const tile_view a = copy.view(stream, tile), b = here.view(stream, tile);
                ok &= (a.packed != nullptr) == (b.packed != nullptr) && std::equal(a.in_tile, a.in_tile + a.n_token, b.in_tile);
                ok &= !a.packed || !b.packed || memcmp(a.packed, b.packed, shape.n_head * here.tile_bytes()) == 0; // the codec's bytes
                for (int t = 0; t < a.n_token; ++t) {
                    ok &= (a.slot[t] >= 0) == (b.slot[t] >= 0) &&
                          (a.slot[t] < 0 || memcmp(copy.row(stream, a.slot[t]), here.row(stream, b.slot[t]), shape.n_embd() * 2) == 0);
                }
            }
        }
        CHECK(ok);
    }

    void compare(const char * what) {
        const int64_t         n = shape.n_cell * shape.n_stream;
        std::vector<uint16_t> wanted((size_t) (n * shape.n_embd()), 1), got(wanted.size(), 2), again(wanted.size(), 3);
        here.read(0, n, wanted.data());
        there.read(worker, 0, n, got.data());
        second.read(worker, 0, n, again.data());
        const bool ok = wanted == got && got == again;
        if (!ok) {
            const size_t i    = (size_t) (std::mismatch(wanted.begin(), wanted.end(), got.begin()).first - wanted.begin());
            const size_t from = i < wanted.size() ? i : (size_t) (std::mismatch(got.begin(), got.end(), again.begin()).first - got.begin());
            printf("after %s, step %d: channel %d of cell %d of %d is %04x, not %04x (another layer: %04x)\n", what, (int) step,
                   (int) (from % shape.n_embd()), (int) (from / shape.n_embd()), (int) n, got[from], wanted[from], again[from]);
        }
        CHECK(ok);
        const gear_store_stats a = here.stats(), b = there.stats();
        CHECK(a.n_exact == b.n_exact && a.n_packed == b.n_packed && a.n_pack == b.n_pack && a.bytes_tiles_used == b.bytes_tiles_used &&
              a.bytes_tiles == b.bytes_tiles);
        compare_errors(there);
        compare_errors(second);
    }

    // What was measured of the rows that were packed, head by head.
    void compare_errors(const cuda::cache_side & side) {
        const std::vector<head_error> & wanted = here.errors();
        const std::vector<head_error>   got    = side.errors(worker);
        const auto                      alike  = [](double x, double y) { return std::fabs(x - y) <= 1e-5 * std::fabs(y); };
        if (got.empty()) {
            CHECK(std::all_of(wanted.begin(), wanted.end(), [](const head_error & of) { return of.n_row == 0; }));
            return;
        }
        CHECK(std::equal(got.begin(), got.end(), wanted.begin(), wanted.end(), [&](const head_error & a, const head_error & b) {
            return a.n_row == b.n_row && a.n_score == b.n_score && alike(a.squares, b.squares) && alike(a.of, b.of) && alike(a.scores, b.scores);
        }));
        n_measured_rows += got[0].n_row;
        n_measured_scores += got[0].n_score;
    }
};

inline void test_cache(const device & on, int n_round, int n_step) {
    gear_simd_select("scalar");
    int64_t n_row = 0, n_score = 0; // measured
    for (int round = 0; round < n_round; ++round) {
        const gear_side side   = round % 2 ? GEAR_SIDE_V : GEAR_SIDE_K;
        gear_config     config = config_of(4, 4, 64);
        config.k.rotate = config.v.rotate = round < 3 ? round : whole(0, 2);
        config.v.center                   = 1;
        const int   d                     = round == 1 || round == 2 ? 544 : 32; // 512 + 32
        store_shape shape                 = { 3, side, 2, d, 64 * whole(4, 7) + whole(0, 20), whole(1, 2), 64, whole(0, 70), whole(0, 5), 40 };
        twins       t(on, config, side, shape);
        int64_t     next = 0;
        for (int step = 0; step < n_step; ++step) {
            const int            kind = whole(0, 25);
            std::vector<int64_t> cells;
            const char *         what = "a write";
            if (kind < 14) { // a step of a prompt, or a token
                const int     n      = kind < 7 ? 1 : kind == 13 ? whole(41, 90) : whole(2, 40);
                const int64_t stream = whole(0, shape.n_stream - 1);
                for (int i = 0; i < n; ++i) {
                    cells.push_back(stream * shape.n_cell + next++ % shape.n_cell);
                }
                t.write(cells, step % 3 == 0);
                if (side == GEAR_SIDE_K) {
                    t.observe();
                }
            } else if (kind < 16) { // anywhere, some twice
                for (int i = whole(1, 30); i > 0; --i) {
                    cells.push_back(whole(0, (int) (shape.n_cell * shape.n_stream) - 1));
                }
                t.write(cells, false);
            } else if (kind == 16) {
                what = "a flush";
                t.flush(step % 2 == 0);
            } else if (kind == 17) {
                what               = "erasing";
                const int64_t cell = whole(0, (int) shape.n_cell - 50), n = whole(1, 50);
                t.here.erase(cell, n);
                t.one_by_one([&](cuda::cache_side & of) { of.table().plan_erase(t.worker, cell, n); });
            } else if (kind == 18 && shape.n_stream > 1) {
                what = "copying a stream";
                t.here.copy_stream(0, t.here, 1);
                t.one_by_one([&](cuda::cache_side & of) {
                    of.table().plan_copy(t.worker, 0, 1);
                    of.copy_stream(t.worker, 0, 1);
                });
            } else if (kind == 19 && whole(0, 3) == 0) {
                what = "clearing";
                t.here.clear();
                t.table->clear(t.worker);
                t.there.forget();
                t.second.forget();
            } else if (kind == 20 || kind == 21) {
                what            = "rows from the host";
                const int64_t n = whole(1, 40);
                t.put(whole(0, (int) (shape.n_cell * shape.n_stream - n)), n);
            } else if (kind == 22 || kind == 23) {
                what = "a change in place";
                t.update();
            } else if (kind > 23) {
                what = "a way to the host and back";
                t.round_trip();
            }
            if (step % 8 == 7 || kind >= 16) {
                t.compare(what);
            }
        }
        t.compare("all");
        bool              refused = false;
        const int64_t     beyond  = shape.n_cell * shape.n_stream;
        const cell_source where   = { &beyond, sizeof beyond, true };
        try {
            t.table->plan(t.worker, ++t.step, 1, where);
        } catch (const gear::error &) {
            refused = true;
        }
        CHECK(refused);
        t.compare("a refused write");
        n_row += t.n_measured_rows;
        n_score += t.n_measured_scores;
    }
    CHECK(n_round < 3 || (n_row > n_score && n_score > 0));
    gear_simd_select(nullptr);
}

} // namespace cuda_test
