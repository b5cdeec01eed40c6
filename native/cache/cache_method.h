// cache_method.h - how a model's cache is coded: by a configuration of GEAR, or by a caller's codec. The one place that makes codecs of a configuration,
// and that knows that 16 bits mean f16.
#pragma once

#include "codec/tile.h"
#include "store/store.h"

#include <map>
#include <memory>

namespace gear {

// What packs the tiles of one side of a layer.
struct side_codec {
    std::shared_ptr<const tile_codec> codec;            // nullptr: the side is kept as f16
    const tile_layout *               layout = nullptr; // of codec's tiles; nullptr: they are f16 [T, d_head] (a caller's codec), or there are none
};

class cache_method {
  public:
    using exceptions = std::map<int, gear_config>; // by layer

    // Throws gear::error when the configuration, or that of an exception, is out of range, or exceptions change what all layers share.
    explicit cache_method(const gear_config & config, gear_codec_callback callback = nullptr, void * callback_user = nullptr,
                          const exceptions & by_layer = {});

    const gear_config & config() const { return config_; } // of what all layers share: tile, tail, sinks, seed
    const gear_config & config(int il) const;
    const exceptions &  by_layer() const { return by_layer_; }

    bool is_f16(int il, gear_side side) const;
    bool is_f16(int il) const { return is_f16(il, GEAR_SIDE_K) && is_f16(il, GEAR_SIDE_V); }
    bool has_heads(int il, int d_head_k, int d_head_v) const; // heads of these sizes can be packed
    // The pool of exact rows would hold all of a cache with so few cells.
    bool is_window(int64_t n_cell, int n_ubatch) const;
    // Packed, the sides of a layer take less memory than as f16. Not asked where a caller's codec packs, which saves none.
    bool gains(const store_shape & k, const store_shape & v) const;

    store_shape shape(int il, gear_side side, int n_head, int d_head, int64_t n_cell, int n_stream, int n_ubatch) const;
    side_codec  codec(const store_shape & shape, bool is_on_gpu = false) const;
    // Bytes of host memory that a side takes, without making one.
    size_t      bytes(const store_shape & shape) const;

  private:
    gear_config         config_;
    exceptions          by_layer_;
    gear_codec_callback callback_;
    void *              callback_user_;
};

} // namespace gear
