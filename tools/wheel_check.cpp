// wheel_check.cpp - the library out of a wheel, on its own: every kernel level that this machine can run packs a tile to the scalar level's bytes, and
// attends to a cache as that does. Compiled by tools/build_wheels.py for the machine of the wheel; prints the levels, and ends with 1 when one is wrong.
#include "gearcpp.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int d_head = 128, n_head = 2, n_row = 1024, n_cell = 1024;

void require(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "%s: %s\n", what, gear_last_error());
        exit(1);
    }
}

std::vector<float> numbers(size_t n, uint32_t seed) {
    std::vector<float> x(n);
    for (float & value : x) {
        seed  = seed * 1664525u + 1013904223u;
        value = (float) (seed >> 8) / (float) (1 << 23) - 1.0f;
    }
    return x;
}

std::vector<char> packed(gear_side side) {
    const gear_config config = gear_config_default();
    gear_tile_layout  layout;
    require(gear_tile_describe(&config, side, d_head, &layout) == GEAR_OK, "describing a tile");
    std::vector<char> space((size_t) layout.bytes + 64);
    char *            tile = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64) % 64;
    require(gear_tile_pack(&config, side, d_head, numbers((size_t) config.tile * d_head, 7).data(), nullptr, tile) == GEAR_OK, "packing a tile");
    return { tile, tile + layout.bytes };
}

std::vector<float> attended() {
    gear_cache_params params = {};
    params.config            = gear_config_default();
    params.layer             = { 0, n_head, d_head, d_head };
    params.n_cell            = n_cell;
    params.n_stream          = 1;
    params.n_ubatch          = 64;
    gear_cache * cache       = gear_cache_new(&params);
    require(cache, "making a cache");
    for (const gear_side side : { GEAR_SIDE_K, GEAR_SIDE_V }) {
        const std::vector<float> rows = numbers((size_t) n_row * n_head * d_head, 11 + (uint32_t) side);
        for (int first = 0; first < n_row; first += params.n_ubatch) {
            std::vector<int64_t> cells;
            for (int i = 0; i < params.n_ubatch; ++i) {
                cells.push_back(first + i);
            }
            require(gear_cache_write(cache, side, params.n_ubatch, cells.data(), rows.data() + (size_t) first * n_head * d_head, 1) == GEAR_OK, "writing");
        }
    }
    gear_store_stats stats;
    require(gear_cache_stats(cache, GEAR_SIDE_K, &stats) == GEAR_OK && stats.n_packed > n_row / 2, "packing rows");

    const std::vector<float> q = numbers((size_t) n_head * d_head, 17);
    std::vector<float>       out((size_t) n_head * d_head);
    gear_attention_params    p = {};
    p.n_query                  = 1;
    p.n_head                   = n_head;
    p.n_kv                     = n_row;
    p.n_stream                 = 1;
    p.q                        = q.data();
    p.q_stride[0]              = n_head * d_head * 4;
    p.q_stride[1]              = d_head * 4;
    p.q_stride[2]              = n_head * d_head * 4;
    p.mask_n_head = p.mask_n_stream = 1;
    p.scale                         = 1.0f / std::sqrt((float) d_head);
    p.out                           = out.data();
    p.out_stride[0]                 = d_head * 4;
    p.out_stride[1]                 = n_head * d_head * 4;
    p.out_stride[2]                 = n_head * d_head * 4;
    require(gear_cache_attend(cache, &p, 1) == GEAR_OK, "attending");
    gear_cache_free(cache);
    return out;
}

} // namespace

int main() {
    std::vector<std::string> levels;
    for (int i = 0; const char * name = gear_simd_name(i); ++i) {
        levels.emplace_back(name);
    }
    require(gear_simd_select("scalar") == GEAR_OK, "the scalar level");
    const std::vector<char>  k = packed(GEAR_SIDE_K), v = packed(GEAR_SIDE_V);
    const std::vector<float> right = attended();
    double                   size  = 0;
    for (const float value : right) {
        size += (double) value * value;
    }
    for (const std::string & level : levels) {
        require(gear_simd_select(level.c_str()) == GEAR_OK, level.c_str());
        require(packed(GEAR_SIDE_K) == k && packed(GEAR_SIDE_V) == v, (level + " packs other bytes").c_str());
        const std::vector<float> out  = attended();
        double                   away = 0;
        for (size_t i = 0; i < out.size(); ++i) {
            away += ((double) out[i] - right[i]) * ((double) out[i] - right[i]);
        }
        require(size > 0 && away <= 1e-4 * size, (level + " attends otherwise").c_str()); // queries are in 8 bits there
        printf("%s ", level.c_str());
    }
    printf("\n");
    return 0;
}
