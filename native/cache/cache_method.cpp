#include "cache/cache_method.h"

#include "cache/gear_codec.h"
#include "codec/codec.h"
#include "common/error.h"
#include "common/settings.h"
#include "store/store_parts.h"

#include <string>

namespace gear {

cache_method::cache_method(const gear_config & config, gear_codec_callback callback, void * callback_user, const exceptions & by_layer)
    : config_(config), by_layer_(by_layer), callback_(callback), callback_user_(callback_user) {
    check_config(config);
    for (const auto & [il, other] : by_layer_) {
        if (gear_config_check(&other) != GEAR_OK) {
            const std::string reason = gear_last_error();
            fail(GEAR_ERROR_INVALID, "layer %d: %s", il, reason.c_str());
        }
        if (il < 0 || other.tile != config.tile || other.n_tail != config.n_tail || other.n_sink != config.n_sink || other.seed != config.seed) {
            fail(GEAR_ERROR_INVALID, "layer %d: tile, n_tail, n_sink and seed are those of all layers, which count from 0", il);
        }
    }
}

const gear_config & cache_method::config(int il) const {
    const auto other = by_layer_.find(il);
    return other == by_layer_.end() ? config_ : other->second;
}

bool cache_method::is_f16(int il, gear_side side) const {
    return (side == GEAR_SIDE_K ? config(il).k : config(il).v).bits == 16;
}

bool cache_method::has_heads(int il, int d_head_k, int d_head_v) const {
    return gear_head_check(&config(il), d_head_k, d_head_v) == GEAR_OK;
}

bool cache_method::is_window(int64_t n_cell, int n_ubatch) const {
    if (settings::packs_small_caches()) {
        return false;
    }
    return n_cell <= (int64_t) config_.n_sink + config_.n_tail + n_ubatch + 2 * config_.tile;
}

bool cache_method::gains(const store_shape & k, const store_shape & v) const {
    if (settings::packs_small_caches() || callback_) {
        return true;
    }
    const auto f16_bytes = [](const store_shape & shape) { return row_bytes(shape) * (size_t) (shape.n_cell * shape.n_stream); };
    return bytes(k) + bytes(v) < f16_bytes(k) + f16_bytes(v);
}

store_shape cache_method::shape(int il, gear_side side, int n_head, int d_head, int64_t n_cell, int n_stream, int n_ubatch) const {
    return { il, side, n_head, d_head, n_cell, n_stream, config_.tile, config_.n_tail, config_.n_sink, n_ubatch };
}

side_codec cache_method::codec(const store_shape & shape, bool is_on_gpu) const {
    if (is_f16(shape.il, shape.side)) {
        return {};
    }
    if (callback_) {
        return { std::make_shared<callback_tile_codec>(config(shape.il), shape.il, shape.side, shape.d_head, callback_, callback_user_), nullptr };
    }
    gear_config of_layer = config(shape.il);
    if (is_on_gpu && of_layer.k.feedback == feedback_auto) {
        of_layer.k.feedback = feedback_never; // its kernels cannot
    }
    const auto codec = std::make_shared<gear_tile_codec>(of_layer, shape.side, shape.d_head);
    return { codec, &codec->layout() };
}

size_t cache_method::bytes(const store_shape & shape) const {
    if (is_f16(shape.il, shape.side)) {
        return store::bytes(shape, 0);
    }
    if (callback_) {
        return store::bytes(shape, callback_tile_codec::tile_bytes(config(shape.il), shape.d_head));
    }
    const tile_layout layout = make_layout(config(shape.il), shape.side, shape.d_head);
    return store::bytes(shape, (size_t) layout.part.bytes) + head_bases::query_bytes(layout, shape.n_head);
}

} // namespace gear
