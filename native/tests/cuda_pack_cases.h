// cuda_pack_cases.h - packing: tiles are compared byte for byte with the codec's.
#pragma once

#include "cuda_memory.h"

namespace cuda_test {

// Numbers of a tile that are hard to code, as f16.
inline std::vector<uint16_t> hard_rows(int T, int n_head, int d, int kind) {
    std::vector<uint16_t> rows((size_t) T * n_head * d);
    for (size_t i = 0; i < rows.size(); ++i) {
        const int   c = (int) (i % d), t = (int) (i / d / n_head);
        const float x = normal();
        switch (kind % 8) {
        case 0: // as in a real cache
            rows[i] = float_to_half((c % 11 == 3 ? 4.0f : 1.0f) * x + (float) (c % 5 - 2) * 0.5f);
            break;
        case 1: // heavy tails
            rows[i] = float_to_half(std::clamp(x * x * x * x * x, -60000.0f, 60000.0f));
            break;
        case 2: // few values, each many times
            rows[i] = float_to_half(std::nearbyint(2 * x) * 0.37f);
            break;
        case 3: // the whole range is about one spacing of f16
            rows[i] = float_to_half(1000.25f + x);
            break;
        case 4: // constant along a channel or a token
            rows[i] = float_to_half((float) (c + t / 32) * 0.7317f);
            break;
        case 5: // the edge of f16
            rows[i] = float_to_half(65504.0f * std::sin(x));
            break;
        case 6: // below f16's normal range
            rows[i] = float_to_half(x * 1e-7f);
            break;
        case 7: // not numbers
            rows[i] = c % 17 == 0 ? 0x7e00 : c % 19 == 0 ? 0xfc00 : c % 23 == 0 ? 0x8000 : float_to_half(x);
            break;
        }
    }
    return rows;
}

struct packing {
    const device & on;
    tile_layout    layout;
    uint32_t       seed   = 7;
    int            n_head = 2;
    int            T, d, n_row;

    std::vector<uint8_t> basis; // [n_head, d / 2], with `rotate` 2

    packing(const device & on, const gear_config & config, gear_side side, int d_head)
        : on(on), layout(make_layout(config, side, d_head)), T(layout.n_token), d(d_head), n_row(2 * T + 3),
          basis((size_t) (n_head * basis_bytes(d_head))) {
        for (uint8_t & exponents : basis) {
            exponents = (uint8_t) whole(0, 255);
        }
    }

    std::vector<float> row_floats(const std::vector<uint16_t> & rows, const std::vector<int32_t> & slot, int head) const {
        std::vector<float> x((size_t) T * d, 0.0f);
        for (int t = 0; t < T; ++t) {
            for (int c = 0; slot[t] >= 0 && c < d; ++c) {
                x[(size_t) t * d + c] = half_to_float(rows[((size_t) slot[t] * n_head + head) * d + c]);
            }
        }
        return x;
    }

    // The codec's tile of one head. old: the tile as it was, for rows that stay.
    std::vector<uint8_t> expected(const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, int head, const uint8_t * old) const {
        std::vector<uint8_t> written(T), kept(T), tile((size_t) layout.part.bytes + tile_align), scratch(pack_scratch_bytes(layout) + tile_align);
        for (int t = 0; t < T; ++t) {
            written[t] = source[t] != cuda::slot_absent;
            kept[t]    = source[t] == cuda::slot_packed;
        }
        const auto aligned = [](std::vector<uint8_t> & bytes) {
            return (uint8_t *) (((uintptr_t) bytes.data() + tile_align - 1) / tile_align * tile_align);
        };
        const std::vector<float> x    = row_floats(rows, source, head);
        const kept_rows          keep = { kept.data(), old };
        const bool               any  = std::find(kept.begin(), kept.end(), 1) != kept.end();
        pack_tile(layout, seed, x.data(), written.data(), aligned(tile), aligned(scratch), any ? &keep : nullptr,
                  basis.data() + (size_t) head * basis_bytes(d));
        return { aligned(tile), aligned(tile) + layout.part.bytes };
    }

    // All heads on the device, over `tiles`.
    std::vector<uint8_t> pack(const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, const std::vector<uint8_t> & tiles) const {
        const int             n_block = 2;
        array<uint16_t>       pool(on, rows);
        array<uint8_t>        to(on, tiles), scratch(on, (size_t) on.api.pack_scratch_bytes(&layout, n_block));
        array<int32_t>        from(on, source);
        array<uint8_t>        weights(on, basis);
        array<cuda::pack_job> jobs(on, std::vector<cuda::pack_job>{ { 0, 0 } });
        cuda::device_side     side = { layout, to.data, pool.data, nullptr, weights.data, n_head, T, 1, n_row, true };
        cuda::pack_arguments  args = { side, seed, jobs.data, from.data, 1, scratch.data };
        on.check_ok(on.api.pack(&args, n_block, on.stream), "pack");
        return to.get();
    }

    double squared_error(const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, int head, const uint8_t * tile) const {
        std::vector<float> xhat((size_t) T * d);
        const auto         x = row_floats(rows, source, head);
        unpack_tile(layout, tile, xhat.data());
        double sum = 0;
        for (size_t i = 0; i < x.size(); ++i) {
            sum += source[i / d] >= 0 ? ((double) x[i] - xhat[i]) * ((double) x[i] - xhat[i]) : 0;
        }
        return sum;
    }

    void compare(const std::string & what, const std::vector<uint16_t> & rows, const std::vector<int32_t> & source, const std::vector<uint8_t> & got,
                 const std::vector<uint8_t> & old) const {
        for (int head = 0; head < n_head; ++head) {
            const uint8_t *            tile   = got.data() + (size_t) head * layout.part.bytes;
            const std::vector<uint8_t> wanted = expected(rows, source, head, old.data() + (size_t) head * layout.part.bytes);
            bool                       ok     = true;
            if (layout.config.rank == 0) {
                const auto differs = std::mismatch(wanted.begin(), wanted.end(), tile);
                ok                 = differs.first == wanted.end();
                if (!ok) {
                    printf("%s: head %d: byte %d of %d is %d, not %d\n", what.c_str(), head, (int) (differs.first - wanted.begin()), (int) wanted.size(),
                           *differs.second, *differs.first);
                }
            } else { // the power iteration sums in another order
                const double error = squared_error(rows, source, head, tile), bound = 1.05 * squared_error(rows, source, head, wanted.data());
                ok = error <= bound + 1e-12;
                if (!ok) {
                    printf("%s: head %d: squared error %g, the codec's is %g\n", what.c_str(), head, error, bound / 1.05);
                }
            }
            CHECK(ok);
        }
    }

    // Pack some rows, then write over some of them and pack again.
    void run(const std::string & what, int kind) {
        std::vector<uint16_t> rows = hard_rows(n_row, n_head, d, kind);
        std::vector<int32_t>  source(T);
        const int             absent = kind % 3 == 0 ? 0 : whole(1, 8);
        for (int t = 0; t < T; ++t) { // anywhere in the pool
            source[t] = absent && t % 8 < absent ? cuda::slot_absent : (t * 2 + 1) % n_row;
        }
        if (kind % 3 == 2) { // whole groups and the tile's end were never written
            std::fill(source.begin(), source.begin() + 32, cuda::slot_absent);
            std::fill(source.end() - 9, source.end(), cuda::slot_absent);
        }
        const std::vector<uint8_t> before((size_t) n_head * layout.part.bytes, 0xa5); // whatever was there must not show
        const std::vector<uint8_t> first = pack(rows, source, before);
        compare(what, rows, source, first, before);

        std::vector<int32_t> again(T);
        for (int t = 0; t < T; ++t) {
            again[t] = source[t] >= 0 && whole(0, 3) != 0 ? cuda::slot_packed : t % 5 == 1 ? cuda::slot_absent : t;
        }
        for (uint8_t & exponents : basis) { // a tile that keeps rows keeps its basis
            exponents = (uint8_t) whole(0, 255);
        }
        const std::vector<uint8_t> second = pack(rows, again, first);
        compare(what + ", again", rows, again, second, first);
    }
};

inline void test_pack(const device & on, int n_round) {
    gear_simd_select("scalar");
    for (int round = 0; round < n_round; ++round) {
        gear_config     config = {};
        const bool      ranked = round % 4 == 3;
        const gear_side side   = round % 2 ? GEAR_SIDE_V : GEAR_SIDE_K;
        config.tile            = one_of({ 64, 128, 256 });
        config.k               = random_side(config.tile, true, ranked);
        config.v               = random_side(config.tile, false, ranked);
        config.seed            = 7;
        const int d            = 16 * (round % 16 < 2 ? whole(17, 36) : whole(2, ranked ? 8 : 16));
        packing(on, config, side, d)
            .run((side == GEAR_SIDE_K ? "K, " : "V, ") + text_of(side == GEAR_SIDE_K ? config.k : config.v, config.tile, d), ranked ? 0 : round / 2);
    }
    gear_simd_select(nullptr);
}

} // namespace cuda_test
