// Every kernel level of this machine against the scalar truth: the same bytes from the same numbers, and the same numbers from the same bytes.

#include "codec_tiles.h"

using namespace gear;
using namespace codec_test;

static gear_config random_config(std::mt19937 & random) {
    gear_config config   = plain_config(one_of(random, { 2, 3, 4, 5, 6, 7 }), one_of(random, { 8, 16 }), one_of(random, { 64, 128, 256 }));
    config.seed          = (uint32_t) random();
    config.k.group       = one_of(random, { 0, 32, 64 });
    config.k.rank        = one_of(random, { 0, 0, 1, 3, 4, 8 });
    config.k.factor_bits = one_of(random, { 4, 8 });
    config.k.rounds      = one_of(random, { 1, 1, 2 });
    config.k.rotate      = one_of(random, { 0, 1, 2 });
    config.k.sparsity    = one_of(random, { 0.0f, 0.0f, 0.03f });
    config.k.center      = config.k.sparsity > 0 ? 0 : one_of(random, { 0, 1 });
    config.k.clip        = one_of(random, { 1.0f, 1.0f, 0.8f });
    config.v             = config.k;
    return config;
}

static void test_levels_agree() {
    std::mt19937 random(check::seed());
    for (int run = 0; run < 300; ++run) {
        const gear_config config = random_config(random);
        const tile_case c(config, one_of(random, { GEAR_SIDE_K, GEAR_SIDE_V }), one_of(random, { 32, 48, 64, 80, 96, 112, 128, 192, 256, 272, 512, 576 }));
        const numbers   x = run % 3 ? cache_like(c, (uint32_t) random()) : hard_tile(c, (int) (random() % n_kind), (uint32_t) random());
        std::vector<uint8_t> written(c.T());
        for (uint8_t & w : written) {
            w = one_of(random, { 0, 1, 1, 1 });
        }
        const uint8_t * some = run % 4 == 0 ? written.data() : nullptr;

        CHECK(gear_simd_select("scalar") == GEAR_OK);
        const bytes   tile = c.pack(x, some);
        const numbers xhat = c.unpack(tile);
        for (int i = 0; gear_simd_name(i); ++i) {
            CHECK(gear_simd_select(gear_simd_name(i)) == GEAR_OK);
            const bool same_bytes = c.pack(x, some) == tile, same_numbers = c.unpack(tile) == xhat;
            CHECK(same_bytes);
            CHECK(same_numbers);
            if (!same_bytes || !same_numbers) {
                printf("  run %d on %s: side %d, d %d, T %d, %d bits, rank %d\n", run, gear_simd_name(i), (int) c.side, c.d(), c.T(), config.k.bits,
                       config.k.rank);
            }
        }
    }
    gear_simd_select(nullptr);
}

int main() {
    test_levels_agree();
    return check::finish();
}
