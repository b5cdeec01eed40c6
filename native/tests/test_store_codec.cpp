// The store with GEAR's own codec: what packing costs, when bytes are the same, and how a tile wears that is packed again and again. Then gear_cache_*.
#include "cache/gear_codec.h"
#include "common/error.h"
#include "store_model.h"

#include <array>
#include <string>

using namespace store_test;

namespace {

constexpr int d_head = 64, tile = 64, n_head = 2, n_embd = n_head * d_head;

gear_side_config side_config(int bits, int group, int rank, float sparsity) {
    return { bits, group, 8, rank, 8, 1, 0, 0, sparsity, 1.0f };
}

gear_config config_of(int rank, float sparsity, int n_tail, int n_sink) {
    return { side_config(4, 32, rank, sparsity), side_config(4, 0, rank, sparsity), tile, n_tail, n_sink, 1 };
}

store_shape shape_of(const gear_config & config, gear_side side, int64_t n_cell, int n_ubatch) {
    return { 0, side, n_head, d_head, n_cell, 1, config.tile, config.n_tail, config.n_sink, n_ubatch };
}

std::shared_ptr<const tile_codec> codec_of(const gear_config & config, gear_side side) {
    return std::make_shared<gear_tile_codec>(config, side, d_head);
}

// Channels of different size, as keys have them.
std::vector<float> rows_like_keys(std::mt19937 & random, int64_t n) {
    std::vector<float> rows = random_rows(random, n, n_embd);
    for (size_t i = 0; i < rows.size(); ++i) {
        rows[i] *= std::exp2((float) (i % n_embd * 7 % 5) - 2.0f);
    }
    return rows;
}

// Root mean square of (what the store returns - rows) over the cells that `counts` picks.
template <class F> double error_of(const store & cache, const std::vector<float> & rows, F && counts) {
    const int64_t         n = (int64_t) rows.size() / n_embd;
    std::vector<uint16_t> read(rows.size());
    cache.read(0, n, read.data());
    double sum = 0, n_value = 0;
    for (int64_t cell = 0; cell < n; ++cell) {
        for (int i = 0; counts(cell) && i < n_embd; ++i) {
            const double difference = half_to_float(read[cell * n_embd + i]) - rows[cell * n_embd + i];
            sum += difference * difference;
            n_value += 1;
        }
    }
    return std::sqrt(sum / n_value);
}

void test_order_does_not_matter() {
    std::mt19937 random(check::seed());
    const auto   rows = rows_like_keys(random, tile);
    for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        for (const int rank : { 0, 2 }) {
            const gear_config config = config_of(rank, rank ? 0.05f : 0.0f, 0, 0);
            pair              at_once(shape_of(config, side, 2 * tile, tile), codec_of(config, side));
            CHECK(at_once.write(consecutive(0, tile), rows, 1));
            at_once.flush(1);
            for (int order = 0; order < 3; ++order) {
                std::vector<int64_t> cells = consecutive(0, tile);
                std::shuffle(cells.begin(), cells.end(), random);
                pair one_by_one(at_once.shape, codec_of(config, side));
                for (int64_t cell : cells) { // something else first, then the row
                    CHECK(one_by_one.write({ cell, cell }, rows_like_keys(random, 2), 1));
                    CHECK(one_by_one.write({ cell }, { rows.begin() + cell * n_embd, rows.begin() + (cell + 1) * n_embd }, 1));
                }
                one_by_one.flush(1);
                const tile_view a = at_once.cache.view(0, 0), b = one_by_one.cache.view(0, 0);
                CHECK(a.n_packed == tile && b.n_packed == tile);
                CHECK(memcmp(a.packed, b.packed, n_head * at_once.cache.tile_bytes()) == 0);
            }
        }
    }
}

void test_teams_pack_alike() {
    for (const int rank : { 0, 4 }) {
        const gear_config       config = config_of(rank, rank ? 0.05f : 0.0f, 16, 4);
        std::array<uint64_t, 3> digest{};
        for (size_t i = 0; i < digest.size(); ++i) {
            std::mt19937 random(check::seed());
            pair         both(shape_of(config, GEAR_SIDE_K, 8 * tile + 5, 32), codec_of(config, GEAR_SIDE_K));
            for (int64_t cell = 0; cell + 32 < both.n_all(); cell += 32) {
                CHECK(both.write(consecutive(cell, 32), rows_like_keys(random, 32), 1 << i));
            }
            for (int step = 0; step < 40; ++step) {
                std::vector<int64_t> cells(1 + random() % 32);
                std::generate(cells.begin(), cells.end(), [&] { return (int64_t) (random() % both.n_all()); });
                CHECK(both.write(cells, rows_like_keys(random, cells.size()), 1 << i));
            }
            CHECK(both.cache.stats().n_packed > 0);
            digest[i] = both.digest();
        }
        CHECK(digest[1] == digest[0] && digest[2] == digest[0]);
    }
}

// A tile of which only some cells were ever written packs with those only: the others read as zeros and cost the written ones nothing.
void test_partial_tile() {
    const gear_config config = config_of(0, 0.0f, 0, 4);
    for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        std::mt19937 random(check::seed());
        pair         both(shape_of(config, side, tile + 37, tile), codec_of(config, side)); // the second tile is short
        const auto   rows  = rows_like_keys(random, both.n_all());
        const auto   write = [&](std::vector<int64_t> cells) {
            std::vector<float> values;
            for (int64_t cell : cells) {
                values.insert(values.end(), rows.begin() + cell * n_embd, rows.begin() + (cell + 1) * n_embd);
            }
            CHECK(both.write(cells, values, 1));
        };
        write({ 1, 5, 9, 33, 63 });
        write({ tile, tile + 36 });
        both.flush(1);
        CHECK(both.cache.view(0, 0).n_exact == 1 && both.cache.view(0, 0).n_packed == 4 && both.cache.view(0, 1).n_packed == 2);
        const auto is_packed = [](int64_t cell) { return cell == 5 || cell == 9 || cell == 33 || cell == 63 || cell == tile || cell == tile + 36; };
        // Normal values times 1/4 to 4: groups of 4 bits span at most some 2 * 3 * 4, a 15th of which is a step, whose third is a generous error.
        CHECK(error_of(both.cache, rows, is_packed) < 24.0 / 15 / 3);
        CHECK(error_of(both.cache, rows, [](int64_t cell) { return cell == 1; }) < 4 * 1e-3);
        std::vector<uint16_t> read(both.n_all() * n_embd);
        both.cache.read(0, both.n_all(), read.data());
        for (int64_t cell = 0; cell < both.n_all(); ++cell) {
            const bool is_zero = std::all_of(read.begin() + cell * n_embd, read.begin() + (cell + 1) * n_embd, [](uint16_t h) { return h == 0; });
            CHECK(is_zero == !(is_packed(cell) || cell == 1));
        }
    }
}

// Half of every tile's cells are written again and again, one at a time, under a pool too small to hold them; the other half is never touched. Each new
// packing may round an untouched row once more, by its group's step at most, and the ranges of groups move with the new rows. Roundings of different
// packings add up like independent errors, so the bound is error * sqrt(packings of a tile); it fails for a store that packs at every refill.
void test_refills() {
    constexpr int     n_tile = 8, n_refill = 500;
    const gear_config config = config_of(0, 0.0f, 0, 0);
    for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        std::mt19937 random(check::seed());
        pair         both(shape_of(config, side, n_tile * tile, 1), codec_of(config, side));
        const auto   rows = rows_like_keys(random, both.n_all());
        for (int64_t cell = 0; cell < both.n_all(); ++cell) { // one at a time: a larger write would enlarge the pool
            CHECK(both.write({ cell }, { rows.begin() + cell * n_embd, rows.begin() + (cell + 1) * n_embd }, 1));
        }
        both.flush(1);
        const auto    is_untouched = [](int64_t cell) { return cell % 2 == 1; };
        const double  once         = error_of(both.cache, rows, is_untouched);
        const int64_t n_before     = both.cache.stats().n_pack;
        for (int i = 0; i < n_refill; ++i) {
            CHECK(both.write({ (int64_t) (random() % (both.n_all() / 2) * 2) }, rows_like_keys(random, 1), 1));
        }
        const double n_more = (double) (both.cache.stats().n_pack - n_before) / n_tile;
        const double worn   = error_of(both.cache, rows, is_untouched);
        printf("%c: error of untouched rows %.4f, after %d refills and %.1f packings of each tile %.4f\n", "KV"[side], once, n_refill, n_more, worn);
        CHECK(both.cache.stats().n_exact <= 128);
        CHECK(n_more > 0 && n_more <= n_refill / n_tile / 4.0);
        CHECK(worn <= once * std::sqrt(1 + n_more));
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// gear_cache_*
// ---------------------------------------------------------------------------------------------------------------------------------------------

gear_cache_params cache_params() {
    return { config_of(0, 0.0f, 32, 4), { 7, n_head, d_head, d_head }, 10 * tile, 2, 32 };
}

bool says(const char * part) {
    const bool ok = strstr(gear_last_error(), part) != nullptr;
    printf(ok ? "" : "last error: %s\n", gear_last_error());
    return ok;
}

void test_cache() {
    gear_cache_params params = cache_params();
    params.config.v.bits     = 16; // a side kept as f16
    gear_cache * cache       = gear_cache_new(&params);
    CHECK(cache != nullptr);
    std::mt19937 random(check::seed());
    const auto   rows = rows_like_keys(random, 10 * tile);
    for (int64_t first = 0; first < 10 * tile; first += 32) {
        const auto cells = consecutive(first, 32);
        CHECK(gear_cache_write(cache, GEAR_SIDE_K, 32, cells.data(), rows.data() + first * n_embd, 2) == GEAR_OK);
        CHECK(gear_cache_write(cache, GEAR_SIDE_V, 32, cells.data(), rows.data() + first * n_embd, 1) == GEAR_OK);
    }
    gear_store_stats k, v;
    CHECK(gear_cache_flush(cache, GEAR_SIDE_K, 2) == GEAR_OK);
    CHECK(gear_cache_flush(cache, GEAR_SIDE_V, 2) == GEAR_OK);
    CHECK(gear_cache_stats(cache, GEAR_SIDE_K, &k) == GEAR_OK);
    CHECK(gear_cache_stats(cache, GEAR_SIDE_V, &v) == GEAR_OK);
    CHECK(k.il == 7 && k.side == GEAR_SIDE_K && k.kind == 0 && k.n_exact == 36 && k.n_packed == 10 * tile - 36 && k.n_pack == 10);
    CHECK(v.il == 7 && v.side == GEAR_SIDE_V && v.kind == 3 && v.n_exact == 10 * tile && v.n_packed == 0 && v.n_pack == 0);

    std::vector<uint16_t> from(10 * tile * n_embd), to(from.size());
    CHECK(gear_cache_read(cache, GEAR_SIDE_V, 0, 10 * tile, from.data()) == GEAR_OK);
    CHECK(std::equal(from.begin(), from.end(), rows.begin(), [](uint16_t half, float value) { return half == float_to_half(value); }));
    for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        CHECK(gear_cache_copy_stream(cache, side, 0, 1) == GEAR_OK);
        CHECK(gear_cache_read(cache, side, 0, 10 * tile, from.data()) == GEAR_OK);
        CHECK(gear_cache_read(cache, side, 10 * tile, 10 * tile, to.data()) == GEAR_OK);
        CHECK(from == to);
    }
    CHECK(gear_cache_clear(cache) == GEAR_OK);
    CHECK(gear_cache_stats(cache, GEAR_SIDE_K, &k) == GEAR_OK && k.n_written == 0 && k.bytes_tiles_used == 0);
    gear_cache_free(cache);
    gear_cache_free(nullptr);
}

void test_cache_errors() {
    gear_cache_params params = cache_params();
    CHECK(gear_cache_new(nullptr) == nullptr && says("params is NULL"));
    params.n_cell = -1;
    CHECK(gear_cache_new(&params) == nullptr && says("layer 7 K: no store has"));
    params                = cache_params();
    params.layer.d_head_v = 17;
    CHECK(gear_cache_new(&params) == nullptr && says("17"));
    params               = cache_params();
    params.config.k.bits = 1;
    CHECK(gear_cache_new(&params) == nullptr && says("bits"));

    params                     = cache_params();
    gear_cache *       cache   = gear_cache_new(&params);
    const int64_t      cells[] = { 0, 20 * tile };
    std::vector<float> rows(2 * n_embd);
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, 2, cells, rows.data(), 1) == GEAR_ERROR_INVALID && says("goes to cell 1280"));
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, 0, nullptr, nullptr, 1) == GEAR_OK);
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, -1, cells, rows.data(), 1) == GEAR_ERROR_INVALID && says("-1 rows"));
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, 1, nullptr, rows.data(), 1) == GEAR_ERROR_INVALID && says("cells is NULL"));
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, 1, cells, rows.data(), 0) == GEAR_ERROR_INVALID && says("n_threads 0"));
    CHECK(gear_cache_write(cache, (gear_side) 2, 1, cells, rows.data(), 1) == GEAR_ERROR_INVALID && says("side 2"));
    CHECK(gear_cache_read(cache, GEAR_SIDE_K, 0, 1, nullptr) == GEAR_ERROR_INVALID && says("rows is NULL"));
    CHECK(gear_cache_copy_stream(cache, GEAR_SIDE_K, 0, 2) == GEAR_ERROR_INVALID && says("stream 2 of 2"));
    CHECK(gear_cache_stats(cache, GEAR_SIDE_K, nullptr) == GEAR_ERROR_INVALID && says("stats is NULL"));
    CHECK(gear_cache_flush(nullptr, GEAR_SIDE_K, 1) == GEAR_ERROR_INVALID && says("cache is NULL"));
    CHECK(gear_cache_erase(cache, GEAR_SIDE_K, 20 * tile, 1) == GEAR_ERROR_INVALID && says("cannot erase 1 cells"));
    CHECK(gear_cache_update(cache, GEAR_SIDE_K, nullptr, nullptr, nullptr) == GEAR_ERROR_INVALID && says("marked is NULL"));
    CHECK(gear_cache_clear(nullptr) == GEAR_ERROR_INVALID && says("cache is NULL"));

    std::vector<float>    q(4 * d_head, 1.0f), out(q.size());
    gear_attention_params attention = { 1, 4,       64,   0,    1,    q.data(),   { 0, d_head * 4, 0 }, nullptr, { 0, 0, 0 }, 1,
                                        1, nullptr, 1.0f, 0.0f, 0.0f, out.data(), { d_head * 4, 0, 0 } };
    const auto            refuses   = [&](const char * part, auto change) {
        gear_attention_params wrong = attention;
        change(wrong);
        return gear_cache_attend(cache, &wrong, 1) == GEAR_ERROR_INVALID && says(part);
    };
    CHECK(refuses("q is NULL", [](auto & p) { p.q = nullptr; }));
    CHECK(refuses("out is NULL", [](auto & p) { p.out = nullptr; }));
    CHECK(refuses("multiple of the 2 KV heads", [](auto & p) { p.n_head = 3; }));
    CHECK(refuses("n_kv 641", [](auto & p) { p.n_kv = 641; }));
    CHECK(refuses("streams 1 to 2", [](auto & p) { p.stream0 = 1, p.n_stream = 2; }));
    CHECK(gear_cache_attend(cache, nullptr, 1) == GEAR_ERROR_INVALID && says("params is NULL"));
    gear_cache_free(cache);
}

// Attention over a cache that is partly packed, against the plain formula on the rows that the cache returns.
void test_cache_attention() {
    constexpr int           n_query_head = 4, n_kv = 3 * tile;
    const gear_cache_params params = cache_params();
    gear_cache *            cache  = gear_cache_new(&params);
    std::mt19937            random(check::seed());
    const auto              cells = consecutive(0, n_kv);
    const auto              k = random_rows(random, n_kv, n_embd), v = random_rows(random, n_kv, n_embd), q = random_rows(random, n_query_head, d_head);
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, n_kv, cells.data(), k.data(), 2) == GEAR_OK);
    CHECK(gear_cache_write(cache, GEAR_SIDE_V, n_kv, cells.data(), v.data(), 2) == GEAR_OK);
    CHECK(gear_cache_flush(cache, GEAR_SIDE_K, 2) == GEAR_OK && gear_cache_flush(cache, GEAR_SIDE_V, 2) == GEAR_OK);
    std::vector<uint16_t> k_read(n_kv * n_embd), v_read(n_kv * n_embd);
    CHECK(gear_cache_read(cache, GEAR_SIDE_K, 0, n_kv, k_read.data()) == GEAR_OK &&
          gear_cache_read(cache, GEAR_SIDE_V, 0, n_kv, v_read.data()) == GEAR_OK);

    std::vector<float>          out(n_query_head * d_head);
    const gear_attention_params p = { 1,
                                      n_query_head,
                                      n_kv,
                                      0,
                                      1,
                                      q.data(),
                                      { d_head * 4, d_head * 4, 0 },
                                      nullptr,
                                      { 0, 0, 0 },
                                      1,
                                      1,
                                      nullptr,
                                      0.125f,
                                      0.0f,
                                      0.0f,
                                      out.data(),
                                      { d_head * 4, d_head * n_query_head * 4, 0 } };
    for (const int n_threads : { 1, 2 }) {
        std::fill(out.begin(), out.end(), NAN);
        CHECK(gear_cache_attend(cache, &p, n_threads) == GEAR_OK);
        for (int head = 0; head < n_query_head; ++head) {
            const int           kv_head = head / (n_query_head / n_head);
            std::vector<double> expected(d_head, 0.0);
            double              sum = 0;
            for (int cell = 0; cell < n_kv; ++cell) {
                double score = 0;
                for (int c = 0; c < d_head; ++c) {
                    score += 0.125 * q[head * d_head + c] * half_to_float(k_read[cell * n_embd + kv_head * d_head + c]);
                }
                sum += std::exp(score);
                for (int c = 0; c < d_head; ++c) {
                    expected[c] += std::exp(score) * half_to_float(v_read[cell * n_embd + kv_head * d_head + c]);
                }
            }
            double error = 0;
            for (int c = 0; c < d_head; ++c) {
                error += std::fabs(out[head * d_head + c] - expected[c] / sum) / d_head;
            }
            CHECK_NEAR(error, 0, 0.01); // q and p are coded in 8 bits on some kernel levels
        }
    }
    gear_cache_free(cache);
}

} // namespace

int main() {
    test_order_does_not_matter();
    test_teams_pack_alike();
    test_partial_tile();
    test_refills();
    test_cache();
    test_cache_errors();
    test_cache_attention();
    return check::finish();
}
