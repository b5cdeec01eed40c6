// codec_api.cpp - the codec's part of the C interface: every argument is checked here, the codec itself trusts its caller.

#include "codec/basis.h"
#include "codec/codec.h"
#include "common/error.h"
#include "common/half.h"
#include "common/side.h"

#include <cmath>
#include <memory>
#include <new>
#include <vector>

namespace {

using namespace gear;

void need(const void * pointer, const char * name) {
    if (!pointer) {
        fail(GEAR_ERROR_INVALID, "%s must not be NULL", name);
    }
}

void need_tile(const void * tile) {
    need(tile, "tile");
    if ((uintptr_t) tile % tile_align != 0) {
        fail(GEAR_ERROR_INVALID, "tile must be aligned to %d bytes", (int) tile_align);
    }
}

tile_layout layout_of(const gear_config * config, const gear_side & side, int d_head) {
    need(config, "config");
    return make_layout(*config, checked_side(side), d_head);
}

struct aligned_delete {
    void operator()(void * memory) const { ::operator delete(memory, std::align_val_t(tile_align)); }
};

std::unique_ptr<void, aligned_delete> aligned_memory(size_t bytes) {
    return std::unique_ptr<void, aligned_delete>(::operator new(bytes, std::align_val_t(tile_align)));
}

// Every slot of the tile must point into its vector: the bytes may come from anywhere.
void check_outliers(const tile_layout & layout, const uint8_t * tile) {
    const int length = vector_length(layout);
    for (int64_t i = 0; i < (int64_t) layout.part.n_vector * layout.part.n_outlier; ++i) {
        const int index = outlier_index_at(layout, tile, i);
        if (index >= length) {
            fail(GEAR_ERROR_DATA, "the tile is damaged or of another configuration: outlier %lld points at entry %d of a vector of %d", (long long) i,
                 index, length);
        }
    }
}

void write_codes(const tile_layout & layout, const uint8_t * tile, uint8_t * codes) {
    for (int t = 0; t < layout.n_token; ++t) {
        for (int c = 0; c < layout.d_head; ++c) {
            codes[(int64_t) t * layout.d_head + c] = code_of(layout, tile, t, c);
        }
    }
}

void write_ranges(const tile_layout & layout, const uint8_t * tile, float * scale, float * zero) {
    const bool is_k = layout.side == GEAR_SIDE_K;
    for (int t = 0; t < layout.n_token; t += is_k ? layout.group : 1) {
        for (int c = 0; c < layout.d_head; c += is_k ? 1 : layout.group) {
            const group_range range = range_of(layout, tile, t, c);
            const int         group = group_of(layout, t, c);
            if (scale) {
                scale[group] = range.scale;
            }
            if (zero) {
                zero[group] = range.zero;
            }
        }
    }
}

// From columns one behind the other, [r][n], to rows [n, r].
void write_transposed(int r, int n, const float * columns, float * rows) {
    for (int i = 0; rows && i < n; ++i) {
        for (int k = 0; k < r; ++k) {
            rows[i * r + k] = columns[k * n + i];
        }
    }
}

void write_outliers(const tile_layout & layout, const uint8_t * tile, float * value, int32_t * index) {
    const uint16_t * halves = (const uint16_t *) (tile + layout.part.outlier_value);
    for (int64_t i = 0; i < (int64_t) layout.part.n_vector * layout.part.n_outlier; ++i) {
        if (value) {
            value[i] = half_to_float(halves[i]);
        }
        if (index) {
            index[i] = outlier_index_at(layout, tile, i);
        }
    }
}

} // namespace

extern "C" gear_status gear_config_check(const gear_config * config) {
    return guarded([&] {
        need(config, "config");
        check_config(*config);
    });
}

extern "C" gear_status gear_head_check(const gear_config * config, int32_t d_head_k, int32_t d_head_v) {
    return guarded([&] {
        need(config, "config");
        check_heads(*config, d_head_k, d_head_v);
    });
}

extern "C" gear_status gear_tile_describe(const gear_config * config, gear_side side, int32_t d_head, gear_tile_layout * layout) {
    return guarded([&] {
        need(layout, "layout");
        *layout = layout_of(config, side, d_head).part;
    });
}

extern "C" gear_status gear_basis_choose(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written,
                                         const double * query_square, uint8_t * basis) {
    return guarded([&] {
        const tile_layout layout = layout_of(config, side, d_head);
        need(x, "x");
        need(basis, "basis");
        choose_basis(layout, x, written, query_square, basis);
    });
}

extern "C" gear_status gear_tile_pack_in_basis(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written,
                                               const uint8_t * basis, void * tile) {
    return guarded([&] {
        const tile_layout layout = layout_of(config, side, d_head);
        need(x, "x");
        need_tile(tile);
        if (layout.part.basis < 0) {
            fail(GEAR_ERROR_INVALID, "a basis is for rotate = 2; this side has rotate = %d", layout.config.rotate);
        }
        need(basis, "basis");
        const auto scratch = aligned_memory(pack_scratch_bytes(layout));
        pack_tile(layout, config->seed, x, written, (uint8_t *) tile, scratch.get(), nullptr, basis);
    });
}

extern "C" gear_status gear_tile_pack_for_queries(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written,
                                                  const uint8_t * basis, const double * query_moment, void * tile) {
    return guarded([&] {
        need(config, "config");
        if (side != GEAR_SIDE_K) {
            fail(GEAR_ERROR_INVALID, "queries have a say in the rounding of K only");
        }
        gear_config with_feedback = *config;
        with_feedback.k.feedback  = feedback_always;
        const tile_layout layout  = make_layout(with_feedback, side, d_head);
        need(x, "x");
        need(query_moment, "query_moment");
        need_tile(tile);
        for (int64_t i = 0; i < (int64_t) d_head * d_head; ++i) {
            if (!std::isfinite(query_moment[i])) {
                fail(GEAR_ERROR_INVALID, "query_moment must be finite; entry %lld is %g", (long long) i, query_moment[i]);
            }
        }
        uint8_t chosen[basis_bytes(max_d_head)];
        if (layout.config.rotate == rotate_weighted && !basis) {
            choose_basis(layout, x, written, nullptr, chosen);
            basis = chosen;
        }
        class query_moment queries(d_head);
        queries.set(query_moment);
        const auto scratch = aligned_memory(pack_scratch_bytes(layout));
        pack_tile(layout, config->seed, x, written, (uint8_t *) tile, scratch.get(), nullptr, basis, &queries);
    });
}

extern "C" gear_status gear_tile_pack(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written, void * tile) {
    return guarded([&] {
        const tile_layout layout = layout_of(config, side, d_head);
        need(x, "x");
        need_tile(tile);
        const auto scratch = aligned_memory(pack_scratch_bytes(layout));
        pack_tile(layout, config->seed, x, written, (uint8_t *) tile, scratch.get());
    });
}

extern "C" gear_status gear_tile_unpack(const gear_config * config, gear_side side, int32_t d_head, const void * tile, float * x) {
    return guarded([&] {
        const tile_layout layout = layout_of(config, side, d_head);
        need_tile(tile);
        need(x, "x");
        check_outliers(layout, (const uint8_t *) tile);
        unpack_tile(layout, (const uint8_t *) tile, x);
    });
}

extern "C" gear_status gear_tile_parts(const gear_config * config, gear_side side, int32_t d_head, const void * tile, uint8_t * codes, float * scale,
                                       float * zero, float * a, float * b, float * mean, float * outlier_value, int32_t * outlier_index) {
    return guarded([&] {
        const tile_layout layout = layout_of(config, side, d_head);
        need_tile(tile);
        const uint8_t * bytes = (const uint8_t *) tile;
        const int       r     = layout.config.rank;
        if (codes) {
            write_codes(layout, bytes, codes);
        }
        write_ranges(layout, bytes, scale, zero);
        std::vector<float> A((size_t) r * layout.n_token), B((size_t) r * d_head);
        load_factors(layout, bytes, A.data(), B.data());
        write_transposed(r, layout.n_token, A.data(), a);
        write_transposed(r, d_head, B.data(), b);
        for (int c = 0; mean && c < d_head; ++c) {
            mean[c] = layout.part.mean < 0 ? 0.0f : half_to_float(((const uint16_t *) (bytes + layout.part.mean))[c]);
        }
        write_outliers(layout, bytes, outlier_value, outlier_index);
    });
}
