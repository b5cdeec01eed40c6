// The C interface with arguments that cannot be right: NULL, negative, absurd. Each is an error with a message, and nothing is read or written.
#include "check.h"
#include "gearcpp.h"

#include <climits>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace {

constexpr int n_head = 2, d_head = 32, n_embd = n_head * d_head, n_cell = 300;

int write_none(void *, const void *, int64_t) {
    return 0;
}
int read_none(void *, int64_t, void *, int64_t) {
    return 1;
}
int append(void * user, const void * data, int64_t n) {
    static_cast<std::string *>(user)->append((const char *) data, (size_t) n);
    return 0;
}
int read_string(void * user, int64_t offset, void * data, int64_t n) {
    memcpy(data, static_cast<std::string *>(user)->data() + offset, (size_t) n);
    return 0;
}

gear_cache_params cache_params() {
    return { gear_config_default(), { 0, n_head, d_head, d_head }, n_cell, 1, 64 };
}

int n_refused = 0;

// Refused with a message of its own.
void refused(gear_status status, gear_status expected = GEAR_ERROR_INVALID) {
    ++n_refused;
    CHECK(status == expected);
    if (status != expected) {
        printf("  status %d instead of %d: %s\n", status, expected, gear_last_error());
    }
    CHECK(gear_last_error()[0] != 0 && gear_last_status() == expected);
}

void test_making_a_cache() {
    refused(gear_cache_new(nullptr) ? GEAR_OK : gear_last_status());
    const auto refused_with = [](gear_cache_params params, gear_status expected) {
        gear_cache * cache = gear_cache_new(&params);
        CHECK(!cache);
        refused(cache ? GEAR_OK : gear_last_status(), expected);
        gear_cache_free(cache);
    };
    for (const int number : { 0, -1, INT_MIN }) {
        gear_cache_params params = cache_params();
        params.n_cell            = number;
        refused_with(params, GEAR_ERROR_INVALID);
        params          = cache_params();
        params.n_stream = number;
        refused_with(params, GEAR_ERROR_INVALID);
        params          = cache_params();
        params.n_ubatch = number;
        refused_with(params, GEAR_ERROR_INVALID);
        params                 = cache_params();
        params.layer.n_head_kv = number;
        refused_with(params, GEAR_ERROR_INVALID);
        params                = cache_params();
        params.layer.d_head_k = number;
        refused_with(params, GEAR_ERROR_UNSUPPORTED);
        params             = cache_params();
        params.config.tile = number;
        refused_with(params, GEAR_ERROR_INVALID);
    }
    // A cache of a million cells has numbers beyond 2^31 everywhere; more than that is memory that no machine has.
    for (const int bits : { 4, 16 }) {
        for (const int huge : { 1 << 20, 1 << 28, INT_MAX }) {
            gear_cache_params params = cache_params();
            params.config.k.bits = params.config.v.bits = bits;
            params.layer                                = { 0, 1 << 15, 256, 256 };
            params.n_cell                               = huge;
            refused_with(params, GEAR_ERROR_MEMORY);
            params.n_stream = huge;
            refused_with(params, GEAR_ERROR_MEMORY);
            params.layer.n_head_kv = INT_MAX;
            refused_with(params, GEAR_ERROR_MEMORY);
            params                 = cache_params();
            params.layer.n_head_kv = huge;
            params.n_stream        = 1 << 20;
            refused_with(params, GEAR_ERROR_MEMORY);
        }
    }
    gear_cache_free(nullptr);
}

void test_using_a_cache() {
    const gear_cache_params params = cache_params();
    gear_cache *            cache  = gear_cache_new(&params);
    CHECK(cache);
    std::vector<float>    rows(n_embd);
    std::vector<uint16_t> read(n_embd);
    const int64_t         cell = 0, far = INT64_MAX, before = INT64_MIN;
    gear_store_stats      stats;
    std::vector<uint8_t>  marked(n_cell);
    const auto            change = [](void *, int64_t, int32_t, uint16_t *) {};
    gear_side             neither;
    const int             seven = 7;
    memcpy(&neither, &seven, sizeof neither);

    refused(gear_cache_write(nullptr, GEAR_SIDE_K, 1, &cell, rows.data(), 1));
    refused(gear_cache_write(cache, neither, 1, &cell, rows.data(), 1));
    for (const int64_t n : { (int64_t) -1, INT64_MIN, (int64_t) 1 << 31, INT64_MAX }) {
        refused(gear_cache_write(cache, GEAR_SIDE_K, n, &cell, rows.data(), 1));
    }
    refused(gear_cache_write(cache, GEAR_SIDE_K, 1, nullptr, rows.data(), 1));
    refused(gear_cache_write(cache, GEAR_SIDE_K, 1, &cell, nullptr, 1));
    refused(gear_cache_write(cache, GEAR_SIDE_K, 1, &far, rows.data(), 1));
    refused(gear_cache_write(cache, GEAR_SIDE_K, 1, &before, rows.data(), 1));
    for (const int n_threads : { 0, -1, INT_MIN, INT_MAX }) {
        refused(gear_cache_write(cache, GEAR_SIDE_K, 1, &cell, rows.data(), n_threads));
        refused(gear_cache_flush(cache, GEAR_SIDE_K, n_threads));
    }
    refused(gear_cache_read(nullptr, GEAR_SIDE_K, 0, 1, read.data()));
    refused(gear_cache_read(cache, GEAR_SIDE_K, 0, 1, nullptr));
    for (const int64_t n : { (int64_t) -1, (int64_t) n_cell + 1, INT64_MAX, INT64_MIN }) {
        refused(gear_cache_read(cache, GEAR_SIDE_K, 0, n, read.data()));
        refused(gear_cache_read(cache, GEAR_SIDE_K, n, 1, read.data()));
        refused(gear_cache_erase(cache, GEAR_SIDE_V, n, 1));
        refused(gear_cache_erase(cache, GEAR_SIDE_V, 0, n));
        refused(gear_cache_erase(cache, GEAR_SIDE_V, n, n));
    }
    for (const int stream : { -1, 1, INT_MAX, INT_MIN }) {
        refused(gear_cache_copy_stream(cache, GEAR_SIDE_K, stream, 0));
        refused(gear_cache_copy_stream(cache, GEAR_SIDE_K, 0, stream));
    }
    refused(gear_cache_update(nullptr, GEAR_SIDE_K, marked.data(), change, nullptr));
    refused(gear_cache_update(cache, GEAR_SIDE_K, nullptr, change, nullptr));
    refused(gear_cache_update(cache, GEAR_SIDE_K, marked.data(), nullptr, nullptr));
    refused(gear_cache_flush(nullptr, GEAR_SIDE_K, 1));
    refused(gear_cache_clear(nullptr));
    refused(gear_cache_stats(nullptr, GEAR_SIDE_K, &stats));
    refused(gear_cache_stats(cache, GEAR_SIDE_K, nullptr));
    refused(gear_cache_stats(cache, neither, &stats));

    std::vector<float>          q(2 * d_head), out(2 * d_head);
    const gear_attention_params good = { 1, 2,       n_cell, 0,    1,    q.data(),   { 2 * d_head * 4, d_head * 4, 0 }, nullptr, { 0, 0, 0 }, 1,
                                         1, nullptr, 1.0f,   0.0f, 0.0f, out.data(), { d_head * 4, 2 * d_head * 4, 0 } };
    CHECK(gear_cache_attend(cache, &good, 1) == GEAR_OK);
    refused(gear_cache_attend(nullptr, &good, 1));
    refused(gear_cache_attend(cache, nullptr, 1));
    refused(gear_cache_attend(cache, &good, 0));
    const auto refused_with = [&](auto && spoil) {
        gear_attention_params bad = good;
        spoil(bad);
        refused(gear_cache_attend(cache, &bad, 1));
    };
    refused_with([](auto & p) { p.q = nullptr; });
    refused_with([](auto & p) { p.out = nullptr; });
    refused_with([](auto & p) { p.n_query = -1; });
    for (const int n : { 0, -2, 3, INT_MIN, INT_MAX }) {
        refused_with([&](auto & p) { p.n_head = n; });
    }
    for (const int n : { -1, n_cell + 1, INT_MAX, INT_MIN }) {
        refused_with([&](auto & p) { p.n_kv = n; });
        refused_with([&](auto & p) { p.stream0 = n; });
        refused_with([&](auto & p) { p.n_stream = n; });
    }
    // Numbers that are right one by one, and whose product is not.
    refused_with([](auto & p) { p.n_query = INT_MAX; });
    refused_with([](auto & p) { p.n_head = INT_MAX - 1; });
    refused_with([](auto & p) { p.n_query = 0, p.n_head = 1 << 30; });
    refused_with([](auto & p) { p.n_query = 1 << 16, p.n_head = 1 << 16; });
    const uint16_t mask = 0;
    refused_with([&](auto & p) { p.mask = &mask, p.mask_n_head = 0; });
    refused_with([&](auto & p) { p.mask = &mask, p.mask_n_stream = -1; });

    CHECK(gear_cache_stats(cache, GEAR_SIDE_K, &stats) == GEAR_OK && stats.n_written == 0);
    gear_cache_free(cache);
}

void test_saving_a_cache() {
    const gear_cache_params params = cache_params();
    gear_cache *            cache  = gear_cache_new(&params);
    std::vector<float>      rows(4 * n_embd, 0.5f);
    const int64_t           cells[] = { 3, 4, 7, 9 };
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, 4, cells, rows.data(), 1) == GEAR_OK);
    std::string saved;
    refused(gear_cache_save(nullptr, GEAR_SIDE_K, write_none, nullptr));
    refused(gear_cache_save(cache, GEAR_SIDE_K, nullptr, nullptr));
    refused(gear_cache_save(cache, GEAR_SIDE_K, [](void *, const void *, int64_t) -> int32_t { return 1; }, nullptr), GEAR_ERROR_CALLBACK);
    CHECK(gear_cache_save(cache, GEAR_SIDE_K, append, &saved) == GEAR_OK);

    const int64_t n = (int64_t) saved.size();
    refused(gear_cache_load(cache, GEAR_SIDE_K, n, read_string, &saved, nullptr, nullptr)); // it is not empty
    CHECK(gear_cache_clear(cache) == GEAR_OK);
    refused(gear_cache_load(nullptr, GEAR_SIDE_K, n, read_string, &saved, nullptr, nullptr));
    refused(gear_cache_load(cache, GEAR_SIDE_K, n, nullptr, &saved, nullptr, nullptr));
    refused(gear_cache_load(cache, GEAR_SIDE_K, -1, read_string, &saved, nullptr, nullptr));
    refused(gear_cache_load(cache, GEAR_SIDE_K, n, read_none, &saved, nullptr, nullptr), GEAR_ERROR_CALLBACK);
    refused(gear_cache_load(cache, GEAR_SIDE_K, 0, read_string, &saved, nullptr, nullptr), GEAR_ERROR_DATA);
    refused(gear_cache_load(cache, GEAR_SIDE_V, n, read_string, &saved, nullptr, nullptr), GEAR_ERROR_DATA);
    std::vector<int64_t> to(n_cell, 5); // all to one
    refused(gear_cache_load(cache, GEAR_SIDE_K, n, read_string, &saved, to.data(), nullptr));
    for (const int64_t bad : { (int64_t) -1, (int64_t) n_cell, INT64_MAX, INT64_MIN }) {
        for (int i = 0; i < n_cell; ++i) {
            to[i] = i;
        }
        to[7] = bad;
        refused(gear_cache_load(cache, GEAR_SIDE_K, n, read_string, &saved, to.data(), nullptr));
    }
    int64_t n_changed = -1;
    CHECK(gear_cache_load(cache, GEAR_SIDE_K, n, read_string, &saved, nullptr, &n_changed) == GEAR_OK && n_changed == 0);
    gear_store_stats stats;
    CHECK(gear_cache_stats(cache, GEAR_SIDE_K, &stats) == GEAR_OK && stats.n_written == 4);
    gear_cache_free(cache);
}

void test_tiles() {
    gear_config      config = gear_config_default();
    gear_tile_layout layout;
    alignas(64) char tile[64] = {};
    float            x        = 0;
    refused(gear_config_check(nullptr));
    refused(gear_head_check(nullptr, 64, 64));
    for (const int d : { 0, -32, 31, 40, 264, 592, INT_MAX, INT_MIN }) {
        refused(gear_head_check(&config, d, 64), GEAR_ERROR_UNSUPPORTED);
        refused(gear_head_check(&config, 64, d), GEAR_ERROR_UNSUPPORTED);
        refused(gear_tile_describe(&config, GEAR_SIDE_K, d, &layout), GEAR_ERROR_UNSUPPORTED);
    }
    gear_side neither;
    for (const int number : { 2, 7, -1, INT_MAX, INT_MIN }) {
        memcpy(&neither, &number, sizeof neither);
        refused(gear_tile_describe(&config, neither, 64, &layout));
        refused(gear_tile_pack(&config, neither, 64, &x, nullptr, tile));
        refused(gear_tile_unpack(&config, neither, 64, tile, &x));
        refused(gear_tile_parts(&config, neither, 64, tile, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr));
    }
    refused(gear_tile_describe(nullptr, GEAR_SIDE_K, 64, &layout));
    refused(gear_tile_describe(&config, GEAR_SIDE_K, 64, nullptr));
    refused(gear_tile_pack(&config, GEAR_SIDE_K, 64, nullptr, nullptr, tile));
    refused(gear_tile_pack(&config, GEAR_SIDE_K, 64, &x, nullptr, nullptr));
    refused(gear_tile_pack(&config, GEAR_SIDE_K, 64, &x, nullptr, tile + 1));
    refused(gear_tile_unpack(&config, GEAR_SIDE_K, 64, nullptr, &x));
    refused(gear_tile_unpack(&config, GEAR_SIDE_K, 64, tile, nullptr));
    refused(gear_tile_parts(&config, GEAR_SIDE_K, 64, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr));
    // Every number of a configuration, one after the other, as far out as it can be.
    const auto spoil = [&](auto & number, auto value) {
        const auto before = number;
        number            = value;
        refused(gear_config_check(&config));
        number = before;
    };
    for (gear_side_config * side : { &config.k, &config.v }) {
        for (int32_t * number :
             { &side->bits, &side->group, &side->scale_bits, &side->rank, &side->factor_bits, &side->rounds, &side->rotate, &side->center }) {
            spoil(*number, INT_MAX), spoil(*number, INT_MIN), spoil(*number, -1);
        }
        for (float * number : { &side->sparsity, &side->clip }) {
            spoil(*number, -1.0f), spoil(*number, 2.0f), spoil(*number, std::numeric_limits<float>::quiet_NaN());
            spoil(*number, std::numeric_limits<float>::infinity());
        }
    }
    for (int32_t * number : { &config.tile, &config.n_tail, &config.n_sink }) {
        spoil(*number, INT_MAX), spoil(*number, INT_MIN), spoil(*number, -1);
    }
    CHECK(gear_config_check(&config) == GEAR_OK);
    CHECK(!gear_simd_name(-1) && !gear_simd_name(INT_MAX) && !gear_simd_name(INT_MIN));
    refused(gear_simd_select("no such level"));
    CHECK(gear_simd_select(nullptr) == GEAR_OK);
}

void test_devices_and_sessions() {
    gear_store_stats stats;
    gear_status      status    = GEAR_ERROR_INTERNAL;
    const auto       no_device = [](const gear_device_params * params, gear_status expected) {
        CHECK(!gear_device_new(params));
        refused(gear_last_status(), expected);
    };
    gear_layer         layer  = { 0, 2, 64, 64 };
    gear_device_params device = { gear_config_default(), &layer, 1, 0, nullptr, nullptr, nullptr };
    no_device(nullptr, GEAR_ERROR_INVALID);
    no_device(&device, GEAR_ERROR_ABI); // ggml is not there
    for (int32_t * number : { &layer.n_head_kv, &layer.d_head_k, &layer.d_head_v }) {
        const int32_t before = *number;
        for (const int bad : { -1, INT_MIN, INT_MAX }) {
            *number = bad;
            no_device(&device, GEAR_ERROR_INVALID);
        }
        *number = before;
    }
    for (const int n : { -1, INT_MIN }) {
        device.n_layer = n;
        no_device(&device, GEAR_ERROR_INVALID);
    }
    device.n_layer = 1, device.layers = nullptr;
    no_device(&device, GEAR_ERROR_INVALID);
    gear_device_free(nullptr);
    CHECK(!gear_device_ggml(nullptr, 0));
    CHECK(!*gear_default_devices());
    CHECK(gear_device_error(nullptr, &status)[0] == 0 && status == GEAR_OK);
    CHECK(gear_device_error(nullptr, nullptr)[0] == 0);
    CHECK(gear_device_stats(nullptr, &stats, 1) == -1);
    CHECK(gear_device_scratch_bytes(nullptr) == 0);

    const auto none = [](gear_session * session, gear_status expected) {
        CHECK(!session);
        refused(session ? GEAR_OK : gear_last_status(), expected);
        gear_session_free(session);
    };
    none(gear_session_new(nullptr, -1), GEAR_ERROR_INVALID);
    none(gear_session_new(nullptr, INT64_MAX), GEAR_ERROR_MEMORY);
    none(gear_session_open(-1, read_none, nullptr, 0), GEAR_ERROR_INVALID);
    none(gear_session_open(1, nullptr, nullptr, 0), GEAR_ERROR_INVALID);
    none(gear_session_open(INT64_MAX, read_none, nullptr, 1), GEAR_ERROR_CALLBACK);
    none(gear_session_open(0, read_none, nullptr, 0), GEAR_ERROR_DATA);
    int64_t n = 1;
    CHECK(!gear_session_window(nullptr, &n) && n == 0);
    CHECK(!gear_session_note(nullptr, &n) && n == 0);
    CHECK(gear_session_extra_bytes(nullptr) == 0);
    gear_session_free(nullptr);
    refused(gear_session_save(nullptr, 0, nullptr, 0, nullptr, 0, 1, write_none, nullptr));
    refused(gear_session_forget_others(nullptr));
    refused(gear_session_attach(nullptr, nullptr));
    refused(gear_session_restore(nullptr, nullptr, nullptr));

    gear_session * session = gear_session_new(nullptr, 100);
    CHECK(session && gear_session_window(session, nullptr));
    CHECK(gear_session_window(session, &n) && n == 100);
    const char * note = "a note";
    refused(gear_session_save(session, 101, note, 6, nullptr, 0, 1, write_none, nullptr));
    refused(gear_session_save(session, -1, note, 6, nullptr, 0, 1, write_none, nullptr));
    refused(gear_session_save(session, 100, nullptr, 6, nullptr, 0, 1, write_none, nullptr));
    refused(gear_session_save(session, 100, note, -6, nullptr, 0, 1, write_none, nullptr));
    refused(gear_session_save(session, 100, note, INT64_MAX, nullptr, 0, 1, write_none, nullptr));
    refused(gear_session_save(session, 100, note, 6, nullptr, 1, 1, write_none, nullptr));
    refused(gear_session_save(session, 100, note, 6, nullptr, 0, 1, nullptr, nullptr));
    for (const int n_threads : { 0, -1, INT_MAX, INT_MIN }) {
        refused(gear_session_save(session, 100, note, 6, nullptr, 0, n_threads, write_none, nullptr));
    }
    refused(gear_session_restore(session, nullptr, nullptr)); // it was made to be saved
    std::string saved;
    CHECK(gear_session_save(session, 100, note, 6, nullptr, 0, 1, append, &saved) == GEAR_OK);
    gear_session_free(session);

    session = gear_session_open((int64_t) saved.size(), read_string, &saved, 0);
    CHECK(session && gear_session_note(session, &n) && n == 6);
    refused(gear_session_save(session, 100, note, 6, nullptr, 0, 1, write_none, nullptr)); // it was made to be restored
    CHECK(gear_session_attach(session, nullptr) == GEAR_OK && gear_session_restore(session, nullptr, nullptr) == GEAR_OK);
    gear_session_free(session);
    CHECK(gear_checksum(nullptr, 5) == gear_checksum("", 0) && gear_checksum("x", -1) == gear_checksum("", 0));
}

} // namespace

int main() {
    test_making_a_cache();
    test_using_a_cache();
    test_saving_a_cache();
    test_tiles();
    test_devices_and_sessions();
    printf("%d calls refused\n", n_refused);
    return check::finish();
}
