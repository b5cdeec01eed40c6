// cache_api.cpp - gear_cache_*: the K and V cache of one layer without llama.cpp, for tests and micro-benchmarks.
#include "attention/attention.h"
#include "cache/host_side.h"
#include "common/error.h"
#include "common/memory.h"
#include "common/side.h"
#include "session/callbacks.h"
#include "session/store_image.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

namespace {

constexpr int     max_threads = 1024;
constexpr int64_t max_rows    = 1 << 27; // of one attention op: its numbers of tasks and rows stay far below 2^31

gear::host_side make_side(const gear::cache_method & method, const gear_cache_params & params, gear_side side) {
    const gear_layer & layer  = params.layer;
    const int          d_head = side == GEAR_SIDE_K ? layer.d_head_k : layer.d_head_v;
    return { method.shape(layer.il, side, layer.n_head_kv, d_head, params.n_cell, params.n_stream, params.n_ubatch), method };
}

} // namespace

struct gear_cache {
    explicit gear_cache(const gear_cache_params & params)
        : method(params.config), k(make_side(method, params, GEAR_SIDE_K)), v(make_side(method, params, GEAR_SIDE_V)) {}

    gear::cache_method method;
    gear::host_side    k, v;

    // f(threadpool). The threads stay from call to call: a caller that measures an operation does not measure how they start and wake up.
    template <class F> void with_threads(int n, F && f) {
        const std::lock_guard<std::mutex> guard(lock);
        if (!pool || pool->nth() != n || !pool->is_alive()) {
            pool.reset();
            pool = std::make_unique<gear::threadpool>(n);
        }
        f(*pool);
    }

    gear::host_side & side(const gear_side & side) { return gear::checked_side(side) == GEAR_SIDE_K ? k : v; }

    gear::aligned_buffer scratch; // of attention

  private:
    std::mutex                        lock;
    std::unique_ptr<gear::threadpool> pool;
};

namespace {

void require(const void * pointer, const char * name) {
    if (!pointer) {
        gear::fail(GEAR_ERROR_INVALID, "%s is NULL", name);
    }
}

void require_function(bool is_there, const char * name) {
    if (!is_there) {
        gear::fail(GEAR_ERROR_INVALID, "%s is NULL", name);
    }
}

void require_threads(int32_t n_threads) {
    if (n_threads < 1 || n_threads > max_threads) {
        gear::fail(GEAR_ERROR_INVALID, "n_threads %d: use 1 to %d", n_threads, max_threads);
    }
}

void check_attention(const gear_attention_params & p, const gear::store_shape & shape) {
    require(p.q, "q");
    require(p.out, "out");
    if (p.n_query < 0 || p.n_head < 1 || p.n_head % shape.n_head != 0) {
        gear::fail(GEAR_ERROR_INVALID, "%d queries of %d heads: the heads must be a multiple of the %d KV heads", p.n_query, p.n_head, shape.n_head);
    }
    if (p.n_kv < 0 || p.n_kv > shape.n_cell) {
        gear::fail(GEAR_ERROR_INVALID, "n_kv %d: a stream has %lld cells", p.n_kv, (long long) shape.n_cell);
    }
    if (p.stream0 < 0 || p.n_stream < 1 || p.stream0 > shape.n_stream - p.n_stream) {
        gear::fail(GEAR_ERROR_INVALID, "streams %d to %lld: the cache has %d", p.stream0, (long long) p.stream0 + p.n_stream - 1, shape.n_stream);
    }
    if ((int64_t) std::max(p.n_query, 1) * p.n_head > max_rows / p.n_stream) {
        gear::fail(GEAR_ERROR_INVALID, "%d queries of %d heads in %d streams are more than one operation takes (%lld rows)", p.n_query, p.n_head,
                   p.n_stream, (long long) max_rows);
    }
    if (p.mask && (p.mask_n_head < 1 || p.mask_n_stream < 1)) {
        gear::fail(GEAR_ERROR_INVALID, "a mask of %d heads and %d streams: use at least 1 of each", p.mask_n_head, p.mask_n_stream);
    }
}

// The cells that hold a row, in ranges. `offset` is of llama.cpp's state, which there is none of.
std::vector<gear::cell_range> written_ranges(const gear::store & cells) {
    std::vector<gear::cell_range> ranges;
    const gear::store_shape &     shape = cells.shape();
    for (int stream = 0; stream < shape.n_stream; ++stream) {
        for (int tile = 0; tile < cells.n_tile(); ++tile) {
            const gear::tile_view view = cells.view(stream, tile);
            for (int token = 0; token < view.n_token; ++token) {
                const int64_t cell = stream * shape.n_cell + (int64_t) tile * shape.tile + token;
                if (view.slot[token] < 0 && !view.in_tile[token]) {
                    continue;
                }
                if (!ranges.empty() && ranges.back().cell + ranges.back().n == cell) {
                    ++ranges.back().n;
                } else {
                    ranges.push_back({ cell, 1, 0 });
                }
            }
        }
    }
    return ranges;
}

// One move for each run of cells that stay side by side.
std::vector<gear::cell_move> moves_of(const gear::store_image & image, const int64_t * to, int64_t n_all) {
    std::vector<gear::cell_move> moves;
    std::vector<bool>            is_taken((size_t) n_all);
    for (const gear::cell_range & range : image.ranges) {
        for (int64_t i = 0; i < range.n; ++i) {
            const int64_t cell = range.cell + i, target = to ? to[cell] : cell;
            if (target < 0 || target >= n_all || is_taken[(size_t) target]) {
                gear::fail(GEAR_ERROR_INVALID, "cell %lld cannot go to cell %lld: that is none of the %lld, or one that another goes to", (long long) cell,
                           (long long) target, (long long) n_all);
            }
            is_taken[(size_t) target] = true;
            if (i > 0 && moves.back().to + moves.back().n == target) {
                ++moves.back().n;
            } else {
                moves.push_back({ cell, 1, target });
            }
        }
    }
    return moves;
}

void save_side(const gear::host_side & side, gear::output & out) {
    const gear::store_image image = gear::image_of(side.cells(), side.codec(), written_ranges(side.cells()));
    gear::write_head(out);
    gear::write_section(out, gear::section_kind::tensor, [&](gear::output & to) { gear::write_image(to, image, side.cells()); });
    gear::write_section(out, gear::section_kind::end, [](gear::output &) {});
}

int64_t load_side(gear::host_side & side, const gear::input & in, const int64_t * to) {
    const gear::store_shape & shape    = side.shape();
    const auto                sections = gear::check_sections(in);
    if (sections.size() != 1 || sections[0].kind != gear::section_kind::tensor) {
        gear::fail(GEAR_ERROR_DATA, "it is not what gear_cache_save wrote");
    }
    const gear::store_image   image = gear::read_image(in, sections[0]);
    const gear::store_shape & saved = image.shape;
    gear::require_codec(image, side.codec());
    if (saved.side != shape.side || saved.n_head != shape.n_head || saved.d_head != shape.d_head || saved.n_cell != shape.n_cell ||
        saved.n_stream != shape.n_stream || saved.tile != shape.tile) {
        gear::fail(GEAR_ERROR_DATA, "it is of a cache of another shape");
    }
    if (side.stats().n_written > 0) {
        gear::fail(GEAR_ERROR_INVALID, "this cache holds %lld rows: clear it first", (long long) side.stats().n_written);
    }
    int64_t n_changed = 0;
    side.change_store([&](gear::store * cells, const gear::tile_codec * codec, const gear::row_writer & write) {
        n_changed = gear::restore_image(in, image, moves_of(image, to, shape.n_cell * shape.n_stream), cells, codec, write);
    });
    return n_changed;
}

} // namespace

extern "C" {

int64_t gear_side_bytes(const gear_config * config, const gear_layer * layer, gear_side side, int64_t n_cell, int32_t n_stream, int32_t n_ubatch,
                        int32_t * kind) {
    int64_t bytes = -1;
    gear::guarded([&] {
        require(config, "config");
        require(layer, "layer");
        const gear::cache_method method(*config);
        gear::checked_side(side);
        const gear::store_shape k   = method.shape(layer->il, GEAR_SIDE_K, layer->n_head_kv, layer->d_head_k, n_cell, n_stream, n_ubatch);
        const int               d_v = layer->d_head_v == 0 ? layer->d_head_k : layer->d_head_v; // latent attention has no V to ask for
        const gear::store_shape v   = method.shape(layer->il, GEAR_SIDE_V, layer->n_head_kv, d_v, n_cell, n_stream, n_ubatch);
        gear::check_shape(k);
        gear::check_shape(v);
        const gear::store_shape & shape  = side == GEAR_SIDE_K ? k : v;
        // In the order in which a device decides (plugin/cpu/device.cpp).
        const bool                is_f16 = method.is_f16(layer->il), is_window = method.is_window(n_cell, n_ubatch);
        const bool                has_heads = is_f16 || is_window || method.has_heads(layer->il, k.d_head, v.d_head);
        const bool                is_packed = !is_f16 && !is_window && has_heads && method.gains(k, v);
        if (kind) {
            *kind = is_packed && !method.is_f16(layer->il, side) ? 0 : is_packed || is_f16 ? 3 : has_heads ? 1 : 2;
        }
        bytes = (int64_t) (is_packed ? method.bytes(shape) : gear::row_bytes(shape) * (size_t) (n_cell * n_stream));
    });
    return bytes;
}

gear_cache * gear_cache_new(const gear_cache_params * params) {
    gear_cache * cache = nullptr;
    gear::guarded([&] {
        require(params, "params");
        cache = new gear_cache(*params);
    });
    return cache;
}

void gear_cache_free(gear_cache * cache) {
    delete cache;
}

gear_status gear_cache_write(gear_cache * cache, gear_side side, int64_t n, const int64_t * cells, const float * rows, int32_t n_threads) {
    return gear::guarded([&] {
        require(cache, "cache");
        if (n < 0 || n > INT32_MAX) {
            gear::fail(GEAR_ERROR_INVALID, "cannot write %lld rows at once", (long long) n);
        }
        if (n == 0) {
            return;
        }
        require(cells, "cells");
        require(rows, "rows");
        require_threads(n_threads);
        gear::host_side & to = cache->side(side);
        cache->with_threads(n_threads, [&](gear::threadpool & threads) {
            to.write(n, { cells, sizeof(int64_t), true }, { rows, to.shape().n_embd() * sizeof(float), false }, threads);
        });
    });
}

gear_status gear_cache_read(gear_cache * cache, gear_side side, int64_t cell, int64_t n, uint16_t * rows) {
    return gear::guarded([&] {
        require(cache, "cache");
        require(rows, "rows");
        cache->side(side).read(cell, n, rows);
    });
}

gear_status gear_cache_copy_stream(gear_cache * cache, gear_side side, int32_t from, int32_t to) {
    return gear::guarded([&] {
        require(cache, "cache");
        gear::host_side & of = cache->side(side);
        of.copy_stream(from, of, to);
    });
}

gear_status gear_cache_erase(gear_cache * cache, gear_side side, int64_t cell, int64_t n) {
    return gear::guarded([&] {
        require(cache, "cache");
        cache->side(side).erase(cell, n);
    });
}

gear_status gear_cache_update(gear_cache * cache, gear_side side, const uint8_t * marked, gear_rows_callback f, void * user) {
    return gear::guarded([&] {
        require(cache, "cache");
        require(marked, "marked");
        require_function(f != nullptr, "f");
        cache->side(side).update(marked, {}, [&](int64_t cell, int64_t n, uint16_t * rows) { f(user, cell, (int32_t) n, rows); });
    });
}

gear_status gear_cache_flush(gear_cache * cache, gear_side side, int32_t n_threads) {
    return gear::guarded([&] {
        require(cache, "cache");
        require_threads(n_threads);
        gear::host_side & of = cache->side(side);
        cache->with_threads(n_threads, [&](gear::threadpool & threads) { of.flush(threads, false); });
    });
}

gear_status gear_cache_clear(gear_cache * cache) {
    return gear::guarded([&] {
        require(cache, "cache");
        cache->k.cells().clear();
        cache->v.cells().clear();
    });
}

gear_status gear_cache_attend(gear_cache * cache, const gear_attention_params * params, int32_t n_threads) {
    return gear::guarded([&] {
        require(cache, "cache");
        require(params, "params");
        require_threads(n_threads);
        check_attention(*params, cache->k.shape());
        const gear::attention_op op = gear::attention_of(*params, cache->k, cache->v);
        cache->with_threads(n_threads, [&](gear::threadpool & threads) {
            void * data = cache->scratch.reserve(gear::attention_scratch_bytes(op, n_threads));
            threads.run([&](const gear::team & t) { gear::attention(op, t, data); });
        });
    });
}

gear_status gear_cache_stats(gear_cache * cache, gear_side side, gear_store_stats * stats) {
    return gear::guarded([&] {
        require(cache, "cache");
        require(stats, "stats");
        *stats = cache->side(side).stats();
    });
}

gear_status gear_cache_save(gear_cache * cache, gear_side side, gear_session_write write, void * user) {
    return gear::guarded([&] {
        require(cache, "cache");
        require_function(write != nullptr, "write");
        gear::callback_output out(write, user);
        save_side(cache->side(side), out);
        out.finish();
    });
}

gear_status gear_cache_load(gear_cache * cache, gear_side side, int64_t n_bytes, gear_session_read read, void * user, const int64_t * to,
                            int64_t * n_changed) {
    return gear::guarded([&] {
        require(cache, "cache");
        require_function(read != nullptr, "read");
        if (n_bytes < 0) {
            gear::fail(GEAR_ERROR_INVALID, "there cannot be %lld bytes", (long long) n_bytes);
        }
        const int64_t n = load_side(cache->side(side), gear::callback_input(n_bytes, read, user), to);
        if (n_changed) {
            *n_changed = n;
        }
    });
}

} // extern "C"
