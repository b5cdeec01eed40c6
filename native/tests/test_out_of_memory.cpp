// Every allocation fails once: operator new, mappings and threads, the n-th of each operation for every n, alone or with all that follow. Each time the
// call must say GEAR_ERROR_MEMORY, lose nothing that was in the cache, leak nothing, and work when it is tried again.
#include "allocations.h"
#include "cache/gear_codec.h"
#include "check.h"
#include "common/error.h"
#include "common/half.h"
#include "common/team.h"
#include "gearcpp.h"
#include "store/store.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using namespace gear;

constexpr int n_head = 2, d_head = 32, n_embd = n_head * d_head, tile = 64, n_cell = 6 * tile, n_ubatch = 32;

gear_cache_params cache_params() {
    gear_config config = gear_config_default();
    config.tile        = tile;
    config.n_tail      = 16;
    config.k.bits = config.v.bits = 7;
    config.k.rank = config.v.rank = 1;
    return { config, { 3, n_head, d_head, d_head }, n_cell, 2, n_ubatch };
}

// A cache and the rows that it must hold.
struct content {
    gear_cache *         cache;
    std::vector<float>   rows; // [2 * n_cell, n_embd]
    std::vector<uint8_t> is_written;
    std::mt19937         random{ check::seed() };

    content() : cache(make()), rows(2 * n_cell * n_embd), is_written(2 * n_cell) {}
    ~content() { gear_cache_free(cache); }
    content(const content &)             = delete;
    content & operator=(const content &) = delete;

    static gear_cache * make() {
        const gear_cache_params params = cache_params();
        return gear_cache_new(&params);
    }

    // Both sides, K and V, get the same rows. The failure is that of the first side that fails.
    gear_status write(int64_t first, int64_t n, int n_threads) {
        std::normal_distribution<float> normal(0.0f, 1.0f);
        std::vector<int64_t>            cells(n);
        std::vector<float>              values(n * n_embd);
        std::generate(values.begin(), values.end(), [&] { return std::clamp(normal(random), -3.0f, 3.0f); });
        for (int64_t i = 0; i < n; ++i) {
            cells[i] = first + i;
        }
        return write(cells, values, n_threads);
    }

    gear_status write(const std::vector<int64_t> & cells, const std::vector<float> & values, int n_threads) {
        for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
            const gear_status status = gear_cache_write(cache, side, (int64_t) cells.size(), cells.data(), values.data(), n_threads);
            if (status != GEAR_OK) {
                return status;
            }
        }
        note(cells, values);
        return GEAR_OK;
    }

    void note(const std::vector<int64_t> & cells, const std::vector<float> & values) {
        for (size_t i = 0; i < cells.size(); ++i) {
            std::copy_n(values.begin() + i * n_embd, n_embd, rows.begin() + cells[i] * n_embd);
            is_written[cells[i]] = 1;
        }
    }

    // Every row is there, near enough for 7 bits, and no other.
    bool holds(gear_side side) const {
        std::vector<uint16_t> read(rows.size());
        if (gear_cache_read(cache, side, 0, 2 * n_cell, read.data()) != GEAR_OK) {
            return false;
        }
        gear_store_stats stats;
        gear_cache_stats(cache, side, &stats);
        bool ok = stats.n_written == std::count(is_written.begin(), is_written.end(), 1);
        for (size_t i = 0; i < rows.size(); ++i) {
            ok = ok && std::fabs(half_to_float(read[i]) - rows[i]) < (is_written[i / n_embd] ? 0.15f : 1e-9f);
        }
        return ok;
    }
};

// What a test does with an operation: fail its n-th allocation, for every n.
//   prepare  makes the state that the operation finds
//   attempt  the operation
//   check    after a failure: what must still be so, then the operation again, which must succeed now
template <class State>
void fail_everywhere(const char * name, const std::function<std::unique_ptr<State>()> & prepare, const std::function<gear_status(State &)> & attempt,
                     const std::function<void(State &)> & check_after) {
    for (const bool follow : { false, true }) {
        for (int64_t n = 1;; ++n) {
            bool                   done   = false;
            const int64_t          before = allocations::n_alive;
            // Threads of their own, so that the operation has to allocate what a thread keeps for itself, too.
            std::unique_ptr<State> state;
            std::thread([&] { state = prepare(); }).join();
            std::thread([&] {
                allocations::arm(n, follow);
                const gear_status status = attempt(*state);
                allocations::disarm();
                done                   = allocations::n_failed == 0;
                const bool as_expected = status == (done ? GEAR_OK : GEAR_ERROR_MEMORY) && (done || gear_last_error()[0] != 0);
                CHECK(as_expected);
                if (!as_expected) {
                    printf("  %s: allocation %lld%s: status %d, %s\n", name, (long long) n, follow ? " and all that follow" : "", status,
                           gear_last_error());
                }
                if (!done) {
                    check_after(*state);
                }
            }).join();
            state.reset();
            CHECK(allocations::n_alive == before);
            if (done) {
                printf("%s: %lld allocations failed%s\n", name, (long long) n - 1, follow ? ", with all that follow" : "");
                break;
            }
        }
    }
}

void test_making() {
    struct holder {
        gear_cache * cache = nullptr;
        ~holder() { gear_cache_free(cache); }
        gear_status make() {
            const gear_cache_params params = cache_params();
            cache                          = gear_cache_new(&params);
            return cache ? GEAR_OK : gear_last_status();
        }
    };
    fail_everywhere<holder>(
        "making a cache", [] { return std::make_unique<holder>(); }, [](holder & h) { return h.make(); }, [](holder & h) { CHECK(h.make() == GEAR_OK); });
}

std::unique_ptr<content> filled(int64_t n, int n_threads) {
    auto c = std::make_unique<content>();
    for (int64_t first = 0; first < n; first += n_ubatch) {
        CHECK(c->write(first, std::min<int64_t>(n_ubatch, n - first), n_threads) == GEAR_OK);
    }
    return c;
}

void check_content(content & c) {
    CHECK(c.holds(GEAR_SIDE_K));
    CHECK(c.holds(GEAR_SIDE_V));
}

// Writes of n rows at `first` into a cache with n_before rows.
void test_writing(const char * name, int64_t n_before, int64_t first, int64_t n, int n_threads_before, int n_threads) {
    struct writing : content {
        std::vector<int64_t> cells;
        std::vector<float>   values;
    };
    for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        const auto write = [=](writing & w) { return gear_cache_write(w.cache, side, n, w.cells.data(), w.values.data(), n_threads); };
        fail_everywhere<writing>(
            name,
            [=] {
                auto w = std::make_unique<writing>();
                for (int64_t at = 0; at < n_before; at += n_ubatch) {
                    CHECK(w->write(at, n_ubatch, n_threads_before) == GEAR_OK);
                }
                w->values.resize(n * n_embd, 0.5f);
                for (int64_t i = 0; i < n; ++i) {
                    w->cells.push_back(first + i);
                }
                return w;
            },
            write,
            [=](writing & w) {
                check_content(w); // as before
                CHECK(write(w) == GEAR_OK);
                w.note(w.cells, w.values);
                CHECK(w.holds(side));
            });
    }
}

void test_operations(int n_threads) {
    const auto full = [=] { return filled(n_cell, n_threads); };
    for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        const auto flush = [=](content & c) { return gear_cache_flush(c.cache, side, n_threads); };
        fail_everywhere<content>("flush", full, flush, [=](content & c) {
            check_content(c);
            CHECK(flush(c) == GEAR_OK);
            check_content(c);
        });

        std::vector<uint16_t> rows(2 * n_cell * n_embd);
        const auto            read = [&](content & c) { return gear_cache_read(c.cache, side, 0, 2 * n_cell, rows.data()); };
        fail_everywhere<content>("read", full, read, [&](content & c) {
            CHECK(read(c) == GEAR_OK);
            check_content(c);
        });

        const auto copy = [=](content & c) { return gear_cache_copy_stream(c.cache, side, 0, 1); };
        fail_everywhere<content>("copy of a stream", full, copy, [=](content & c) {
            check_content(c);
            CHECK(copy(c) == GEAR_OK);
            std::copy_n(c.rows.begin(), n_cell * n_embd, c.rows.begin() + n_cell * n_embd);
            std::copy_n(c.is_written.begin(), n_cell, c.is_written.begin() + n_cell);
            CHECK(c.holds(side));
        });

        gear_store_stats stats;
        fail_everywhere<content>("statistics", full, [&](content & c) { return gear_cache_stats(c.cache, side, &stats); }, check_content);
    }
    fail_everywhere<content>("clear", full, [](content & c) { return gear_cache_clear(c.cache); }, check_content);

    std::vector<float>          q(4 * d_head, 0.3f), out(q.size()), reference(q.size());
    const gear_attention_params params = { 1, 4,       n_cell, 0,    1,    q.data(),   { 4 * d_head * 4, d_head * 4, 0 }, nullptr, { 0, 0, 0 }, 1,
                                           1, nullptr, 0.2f,   0.0f, 0.0f, out.data(), { d_head * 4, 4 * d_head * 4, 0 } };
    fail_everywhere<content>(
        "attention", full, [&](content & c) { return gear_cache_attend(c.cache, &params, n_threads); },
        [&](content & c) {
            check_content(c);
            CHECK(gear_cache_attend(c.cache, &params, n_threads) == GEAR_OK);
            CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
        });
}

// A shift that fails half way: every tile holds its old rows or its new ones.
void test_update() {
    struct shifting {
        store_shape                            shape = { 0, GEAR_SIDE_K, n_head, d_head, n_cell, 1, tile, 16, 0, n_ubatch };
        std::shared_ptr<const gear_tile_codec> codec = std::make_shared<gear_tile_codec>(cache_params().config, GEAR_SIDE_K, d_head);
        store                                  rows{ shape, codec };
        std::vector<uint8_t>                   marked = std::vector<uint8_t>(n_cell, 1);

        shifting() {
            std::vector<float>   values(n_cell * n_embd);
            std::vector<int64_t> cells(n_cell);
            for (int i = 0; i < n_cell; ++i) {
                cells[i] = i;
                std::fill_n(values.begin() + i * n_embd, n_embd, 1.0f + (float) (i % 8) / 8);
            }
            for (int first = 0; first < n_cell; first += n_ubatch) {
                run_team(1, [&](const team & t) {
                    CHECK(rows.write(t, n_ubatch, { cells.data() + first, 8, true }, { values.data() + first * n_embd, n_embd * 4, false }));
                });
            }
        }
        gear_status shift() {
            return guarded([&] {
                rows.update(marked.data(), [](int64_t, int n_token, uint16_t * changed) {
                    for (int i = 0; i < n_token * n_embd; ++i) {
                        changed[i] = float_to_half(-half_to_float(changed[i]));
                    }
                });
            });
        }
    };
    fail_everywhere<shifting>(
        "shift", [] { return std::make_unique<shifting>(); }, [](shifting & s) { return s.shift(); },
        [](shifting & s) {
            std::vector<uint16_t> read(n_cell * n_embd);
            s.rows.read(0, n_cell, read.data());
            bool ok = true;
            for (int i = 0; i < n_cell * n_embd; ++i) {
                const int   cell = i / n_embd;
                const float sign = half_to_float(read[cell / tile * tile * n_embd]) < 0 ? -1.0f : 1.0f; // as the tile's first row
                ok               = ok && std::fabs(sign * half_to_float(read[i]) - (1.0f + (float) (cell % 8) / 8)) < 0.1f;
            }
            CHECK(ok);
            CHECK(s.shift() == GEAR_OK);
        });
}

void test_parts() {
    struct packed {
        gear_config config = cache_params().config;
        uint8_t *   data   = nullptr;
        packed() {
            gear_tile_layout layout;
            CHECK(gear_tile_describe(&config, GEAR_SIDE_K, d_head, &layout) == GEAR_OK);
            data = (uint8_t *) ::operator new(layout.bytes, std::align_val_t(64));
            const std::vector<float> x(tile * d_head, 1.0f);
            CHECK(gear_tile_pack(&config, GEAR_SIDE_K, d_head, x.data(), nullptr, data) == GEAR_OK);
        }
        ~packed() { ::operator delete(data, std::align_val_t(64)); }
    };
    std::vector<float> a(tile), b(d_head), x(tile * d_head);
    const auto         nothing = [](packed &) {};
    const auto         prepare = [] { return std::make_unique<packed>(); };
    fail_everywhere<packed>(
        "parts of a tile", prepare,
        [&](packed & p) {
            return gear_tile_parts(&p.config, GEAR_SIDE_K, d_head, p.data, nullptr, nullptr, nullptr, a.data(), b.data(), nullptr, nullptr, nullptr);
        },
        nothing);
    fail_everywhere<packed>(
        "unpacking a tile", prepare, [&](packed & p) { return gear_tile_unpack(&p.config, GEAR_SIDE_K, d_head, p.data, x.data()); }, nothing);
    fail_everywhere<packed>(
        "packing a tile", prepare, [&](packed & p) { return gear_tile_pack(&p.config, GEAR_SIDE_K, d_head, x.data(), nullptr, p.data); }, nothing);
}

// What happens once in a process, before any other test.
void test_first_use() {
    allocations::arm(1, true);
    const char * name = gear_simd_current();
    allocations::disarm();
    CHECK(name[0] != 0 && allocations::n_failed == 0);
}

} // namespace

int main() {
    test_first_use();
    test_making();
    for (const int n_threads : { 1, 3 }) {
        test_writing("first write", 0, 0, n_ubatch, n_threads, n_threads);
        test_writing("write over packed tiles", n_cell, 0, n_ubatch, n_threads, n_threads);
        test_writing("write that makes room", 4 * n_ubatch, 4 * n_ubatch, n_ubatch, n_threads, n_threads);
        test_writing("write by another team", 4 * n_ubatch, 4 * n_ubatch, n_ubatch, 4 - n_threads, n_threads);
        test_writing("write of more rows than n_ubatch", 5 * n_ubatch, n_cell, 3 * n_ubatch, n_threads, n_threads);
        test_operations(n_threads);
    }
    test_update();
    test_parts();
    return check::finish();
}
