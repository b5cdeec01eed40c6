// cuda_memory.h - what the cases of native/cuda are written with: device memory through the table of api.h, and configurations.
#pragma once

#include "attention/attention.h"
#include "cache/gear_codec.h"
#include "check.h"
#include "codec/codec.h"
#include "common/error.h"
#include "common/half.h"
#include "cuda/cuda_cache.h"
#include "store/store.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace cuda_test {

using namespace gear;

inline std::mt19937 & random_source() {
    static std::mt19937 source(check::seed());
    return source;
}

inline float normal(float deviation = 1) {
    return std::normal_distribution<float>(0, deviation)(random_source());
}

inline int whole(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random_source());
}

template <class T> T one_of(std::initializer_list<T> values) {
    return *(values.begin() + whole(0, (int) values.size() - 1));
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Device memory
// ---------------------------------------------------------------------------------------------------------------------------------------------

class device {
  public:
    explicit device(const cuda::api & api) : api(api) {
        check_ok(api.select_device(0), "select_device");
        check_ok(api.describe(0, &facts), "describe");
        check_ok(api.make_stream(&stream), "make_stream");
    }
    ~device() { api.free_stream(stream); }

    void check_ok(int error, const char * what) const {
        if (error != 0) {
            printf("%s: %s\n", what, api.error_text(error));
        }
        CHECK(error == 0);
    }

    const cuda::api &  api;
    cuda::device_facts facts;
    cuda::stream       stream = nullptr;
};

template <class T> class array {
  public:
    array(const device & on, size_t n) : on(on), n(n) {
        void * memory = nullptr;
        on.check_ok(on.api.allocate(&memory, n * sizeof(T)), "allocate");
        data = static_cast<T *>(memory);
    }
    array(const device & on, const std::vector<T> & values) : array(on, values.size()) { set(values); }
    ~array() { on.api.release(data); }
    array(const array &)             = delete;
    array & operator=(const array &) = delete;

    void set(const std::vector<T> & values) {
        on.check_ok(on.api.upload(data, values.data(), values.size() * sizeof(T), on.stream), "upload");
        on.check_ok(on.api.wait_stream(on.stream), "wait_stream");
    }
    std::vector<T> get() const {
        std::vector<T> values(n);
        on.check_ok(on.api.download(values.data(), data, n * sizeof(T), on.stream), "download");
        on.check_ok(on.api.wait_stream(on.stream), "wait_stream");
        return values;
    }

    const device & on;
    T *            data;
    size_t         n;
};

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Configurations
// ---------------------------------------------------------------------------------------------------------------------------------------------

inline gear_config config_of(int bits_k, int bits_v, int tile = 128) {
    gear_config config = {};
    config.k           = { bits_k, 32, 8, 0, 8, 1, 0, 0, 0.0f, 1.0f, 0 };
    config.v           = { bits_v, 0, 8, 0, 8, 1, 0, 0, 0.0f, 1.0f, 0 };
    config.tile        = tile;
    config.seed        = 1;
    return config;
}

inline gear_side_config random_side(int tile, bool is_k, bool with_rank) {
    gear_side_config side = {};
    side.bits             = one_of({ 2, 3, 4, 5, 6, 7 });
    side.group            = is_k ? one_of({ 0, 32, 64 }) : one_of({ 0, 32, 64, 128 });
    side.group            = std::min(side.group, is_k ? tile : max_d_head);
    side.scale_bits       = one_of({ 8, 8, 16 });
    side.rank             = with_rank ? one_of({ 1, 2, 4 }) : 0;
    side.factor_bits      = one_of({ 4, 8 });
    side.rounds           = one_of({ 1, 2 });
    side.rotate           = whole(0, 2);
    side.sparsity         = one_of({ 0.0f, 0.0f, 0.02f });
    side.center           = side.sparsity == 0 ? whole(0, 1) : 0;
    side.clip             = one_of({ 1.0f, 0.9f });
    return side;
}

inline std::string text_of(const gear_side_config & c, int tile, int d) {
    char text[200];
    snprintf(text, sizeof text, "T %d, d %d, bits %d, group %d, scales %d, rank %d in %d bits, rounds %d, rotate %d, center %d, sparsity %g, clip %g",
             tile, d, c.bits, c.group, c.scale_bits, c.rank, c.factor_bits, c.rounds, c.rotate, c.center, c.sparsity, c.clip);
    return text;
}

} // namespace cuda_test
