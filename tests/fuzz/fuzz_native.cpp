// Coverage-guided fuzzing of what the native library parses (libFuzzer; GEARCPP_FUZZ=ON in CMake, which needs clang). The first byte of an input says
// which:
//
//     0  a whole session, as gear_session_open reads it
//     1  one store of a session, read into a cache in place and then renumbered, as gear_cache_load does
//     2  a tile: unpacked, taken apart, if it is sound
//     3  GEARCPP_KV, the configuration of programs that load the plugin
//
// The checksums of 0 and 1 are put right before the input is parsed: what is looked for lies behind them. Seeds: tests/fuzz/seeds.py.
#include "codec/config_text.h"
#include "common/checksum.h"
#include "common/error.h"
#include "gearcpp.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr size_t head_bytes = 16, section_bytes = 16, sum_bytes = 8;

void put_sum(std::vector<uint8_t> & data, size_t first, size_t n) {
    const uint64_t sum = gear::checksum_of(data.data() + first, n);
    memcpy(data.data() + first + n, &sum, sizeof sum);
}

// As far as sections follow one another.
void put_sums(std::vector<uint8_t> & data) {
    if (data.size() < head_bytes + sum_bytes) {
        return;
    }
    put_sum(data, 0, head_bytes);
    for (size_t at = head_bytes + sum_bytes; data.size() - at >= section_bytes + sum_bytes;) {
        uint64_t size;
        memcpy(&size, data.data() + at + 8, sizeof size);
        if (size > data.size() - at - section_bytes - sum_bytes) {
            return;
        }
        put_sum(data, at, section_bytes + (size_t) size);
        at += section_bytes + (size_t) size + sum_bytes;
    }
}

int32_t read(void * user, int64_t offset, void * data, int64_t n) {
    const auto & from = *static_cast<const std::vector<uint8_t> *>(user);
    if (offset < 0 || n < 0 || (uint64_t) offset + (uint64_t) n > from.size()) {
        abort(); // nothing outside may be asked for
    }
    memcpy(data, from.data() + offset, (size_t) n);
    return 0;
}

struct cache_delete {
    void operator()(gear_cache * cache) const { gear_cache_free(cache); }
};

// As tests/fuzz/seeds.py makes them.
std::unique_ptr<gear_cache, cache_delete> make_cache(uint8_t kind) {
    gear_config config = gear_config_default();
    config.tile = 64, config.n_tail = 8, config.n_sink = 2;
    if (kind % 4 == 1) {
        config.k.sparsity = config.v.sparsity = 0.05f;
        config.v.center                       = 0;
    }
    config.k.bits                  = kind % 4 == 2 ? 16 : 4;
    config.k.rank                  = kind % 4 == 3 ? 2 : 0;
    const gear_cache_params params = { config, { 0, 2, 32, 32 }, 200, 2, 16 };
    return std::unique_ptr<gear_cache, cache_delete>(gear_cache_new(&params));
}

void session(std::vector<uint8_t> & data) {
    put_sums(data);
    for (const int note_only : { 1, 0 }) {
        if (gear_session * opened = gear_session_open((int64_t) data.size(), read, &data, note_only)) {
            if (gear_session_attach(opened, nullptr) == GEAR_OK) {
                std::vector<uint8_t> extra((size_t) gear_session_extra_bytes(opened) + 1);
                gear_session_restore(opened, extra.data(), nullptr);
            }
            gear_session_free(opened);
        }
    }
}

void one_store(std::vector<uint8_t> & data, uint8_t kind) {
    put_sums(data);
    std::vector<int64_t> to(400);
    for (size_t i = 0; i < to.size(); ++i) {
        to[i] = (int64_t) ((i + 37) % to.size());
    }
    for (const int64_t * places : { (const int64_t *) nullptr, (const int64_t *) to.data() }) {
        const auto       cache = make_cache(kind);
        const gear_side  side  = kind & 16 ? GEAR_SIDE_V : GEAR_SIDE_K;
        const bool       taken = gear_cache_load(cache.get(), side, (int64_t) data.size(), read, &data, places, nullptr) == GEAR_OK;
        gear_store_stats stats;
        gear_cache_stats(cache.get(), side, &stats);
        std::vector<uint16_t> rows(400 * 64);
        if (gear_cache_read(cache.get(), side, 0, 400, rows.data()) != GEAR_OK || stats.n_written != stats.n_exact + stats.n_packed) {
            abort();
        }
        if (taken) { // the cache goes on
            const int64_t      cells[] = { 0, 63, 64, 199, 200, 399 };
            std::vector<float> fresh(6 * 64, 0.5f);
            if (gear_cache_write(cache.get(), side, 6, cells, fresh.data(), 1) != GEAR_OK || gear_cache_flush(cache.get(), side, 1) != GEAR_OK) {
                abort();
            }
        }
    }
}

void tile(const uint8_t * data, size_t size) {
    static const int heads[] = { 32, 64, 80, 128, 256 };
    if (size < 8) {
        return;
    }
    gear_config config      = gear_config_default();
    config.tile             = 64 << data[0] % 3;
    config.k.bits           = 2 + data[1] % 6;
    config.k.group          = data[2] % 2 * 32;
    config.k.scale_bits     = data[2] & 2 ? 16 : 8;
    config.k.rank           = data[3] % 17;
    config.k.factor_bits    = data[2] & 4 ? 4 : 8;
    config.k.rotate         = (data[2] >> 3 & 3) % 3;
    config.k.sparsity       = (float) (data[4] % 16) / 100;
    config.k.center         = config.k.sparsity == 0 && (data[2] & 16);
    config.v                = config.k;
    const gear_side  side   = data[5] & 1 ? GEAR_SIDE_V : GEAR_SIDE_K;
    const int        d_head = heads[data[6] % 5];
    gear_tile_layout layout;
    if (gear_tile_describe(&config, side, d_head, &layout) != GEAR_OK) {
        return;
    }
    const size_t n_bytes = (size_t) layout.bytes;
    void *       bytes   = aligned_alloc(64, n_bytes);
    memset(bytes, data[7], n_bytes);
    memcpy(bytes, data + 8, std::min(size - 8, n_bytes));
    std::vector<float> x((size_t) config.tile * d_head), scale(layout.n_group), zero(layout.n_group), a((size_t) config.tile * config.k.rank),
        b((size_t) d_head * config.k.rank), mean(d_head), values((size_t) layout.n_vector * layout.n_outlier);
    std::vector<int32_t> places(values.size());
    std::vector<uint8_t> codes(x.size());
    gear_tile_unpack(&config, side, d_head, bytes, x.data());
    gear_tile_parts(&config, side, d_head, bytes, codes.data(), scale.data(), zero.data(), a.data(), b.data(), mean.data(), values.data(), places.data());
    free(bytes);
}

void setting(const uint8_t * data, size_t size) {
    try {
        const gear_config config = gear::config_from_text(std::string((const char *) data, size).c_str()).config;
        if (gear_config_check(&config) != GEAR_OK) {
            abort(); // what was taken is right
        }
    } catch (const gear::error &) {
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 2) {
        return 0;
    }
    std::vector<uint8_t> rest(data + 2, data + size);
    switch (data[0] % 4) {
    case 0:
        session(rest);
        break;
    case 1:
        one_store(rest, data[1]);
        break;
    case 2:
        tile(data + 2, size - 2);
        break;
    default:
        setting(data + 2, size - 2);
        break;
    }
    return 0;
}
