// The two codecs that a store can be given, without a store: GEAR itself and a caller's method.

#include "cache/gear_codec.h"
#include "codec_tiles.h"
#include "common/team.h"

#include <atomic>
#include <cstring>

using namespace gear;
using namespace codec_test;

static void test_gear_codec() {
    for_each_side([](gear_side side) {
        gear_config config = plain_config(3, 8, 64);
        config.k.rank = config.v.rank = 2;
        config.seed                   = 7;
        const tile_case       c(config, side, 96);
        const gear_tile_codec codec(config, side, 96);
        const numbers         x = cache_like(c, check::seed());
        std::vector<uint8_t>  written(c.T(), 1);
        written[5] = 0;
        CHECK(codec.tile_bytes() == (size_t) c.layout.part.bytes);
        CHECK(codec.layout().part.bytes == c.layout.part.bytes);

        bytes tile(codec.tile_bytes()), scratch(codec.scratch_bytes());
        CHECK(codec.pack(0, 0, x.data(), written.data(), tile.data(), scratch.data()));
        CHECK(tile == c.pack(x, written.data()));
        numbers xhat(c.size());
        codec.unpack(tile.data(), xhat.data(), scratch.data());
        CHECK(xhat == c.unpack(tile));

        // nothing kept: as if packed for the first time
        bytes                      again(tile.size());
        const std::vector<uint8_t> none(c.T(), 0);
        CHECK(codec.repack(0, 0, x.data(), written.data(), none.data(), tile.data(), again.data(), scratch.data()));
        CHECK(again == tile);
    });
}

namespace {

// A method of the caller that halves every number and writes down what it was called with.
struct method {
    double           bytes   = 100.5; // what it returns
    float            factor  = 0.5f;
    std::atomic<int> running = 0, overlaps = 0, calls = 0;
    int32_t          il = -1, side = -1, head = -1, n_token = -1, d_head = -1;
    int64_t          first_cell = -1, last_cell = -1;
    uint8_t          written_5 = 2;

    static double call(void * user, int32_t il, int32_t side, int32_t head, int32_t n_token, int32_t d_head, const float * x, const uint8_t * written,
                       const int64_t * cells, float * xhat) {
        method & m = *(method *) user;
        m.overlaps += m.running++ != 0;
        m.il         = il;
        m.side       = side;
        m.head       = head;
        m.n_token    = n_token;
        m.d_head     = d_head;
        m.first_cell = cells[0];
        m.last_cell  = cells[n_token - 1];
        m.written_5  = written[5];
        for (int i = 0; i < n_token * d_head; ++i) {
            xhat[i] = m.factor * x[i];
        }
        ++m.calls;
        --m.running;
        return m.bytes;
    }
};

} // namespace

static void test_callback_codec() {
    const gear_config         config = plain_config(4, 8, 64);
    const int                 d = 40, T = 64; // any head size: nothing is packed
    method                    m;
    const callback_tile_codec codec(config, 3, GEAR_SIDE_V, d, method::call, &m);
    numbers                   x = gaussian(T * d, check::seed()), xhat(x.size());
    std::vector<uint8_t>      written(T, 1);
    written[5] = 0;
    bytes tile(codec.tile_bytes()), scratch(codec.scratch_bytes());
    CHECK(codec.tile_bytes() == (T * d * 2 + 63) / 64 * 64);
    CHECK(codec.pack(2, 1000, x.data(), written.data(), tile.data(), scratch.data()));
    CHECK(m.il == 3 && m.side == GEAR_SIDE_V && m.head == 2 && m.n_token == T && m.d_head == d && m.written_5 == 0);
    CHECK(m.first_cell == 1000 && m.last_cell == 1000 + T - 1);
    codec.unpack(tile.data(), xhat.data(), scratch.data());
    int wrong = 0;
    for (int i = 0; i < T * d; ++i) {
        wrong += xhat[i] != half_to_float(float_to_half(0.5f * x[i]));
    }
    CHECK(wrong == 0);
    CHECK(codec.counted_bytes() == 100.5);

    m.bytes = -1; // the method failed
    CHECK(!codec.pack(2, 1000, x.data(), written.data(), tile.data(), scratch.data()));
    m.bytes = NAN;
    CHECK(!codec.pack(2, 1000, x.data(), written.data(), tile.data(), scratch.data()));
    CHECK(codec.counted_bytes() == 100.5);
    m.bytes  = 1;
    m.factor = 1e6f; // beyond f16
    CHECK(!codec.pack(2, 1000, x.data(), written.data(), tile.data(), scratch.data()));
    m.factor = NAN;
    CHECK(!codec.pack(2, 1000, x.data(), written.data(), tile.data(), scratch.data()));
    m.factor = 1;
    x[5 * d] = NAN; // in a cell never written
    CHECK(codec.pack(2, 1000, x.data(), written.data(), tile.data(), scratch.data()));
}

static void test_callback_is_called_by_one_thread_at_a_time() {
    method                    m;
    const int                 d = 64, T = 64, n_call = 50;
    const callback_tile_codec codec(plain_config(4, 8, T), 0, GEAR_SIDE_K, d, method::call, &m);
    const numbers             x = gaussian(T * d, check::seed());
    run_team(4, [&](const team &) {
        bytes                      tile(codec.tile_bytes()), scratch(codec.scratch_bytes());
        const std::vector<uint8_t> written(T, 1);
        for (int i = 0; i < n_call; ++i) {
            codec.pack(0, 0, x.data(), written.data(), tile.data(), scratch.data());
        }
    });
    CHECK(m.calls == 4 * n_call && m.overlaps == 0);
    CHECK(codec.counted_bytes() == 4 * n_call * 100.5);
}

int main() {
    test_gear_codec();
    test_callback_codec();
    test_callback_is_called_by_one_thread_at_a_time();
    return check::finish();
}
