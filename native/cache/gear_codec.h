// gear_codec.h - the tile_codecs that the store can be given: GEAR itself, and a caller's method whose reconstruction is kept as f16.
#pragma once

#include "codec/basis.h"
#include "codec/codec.h"
#include "store/store.h"

namespace gear {

// Raise it when bytes of a packed tile come to mean something else without a change of the layout's numbers (codec/tile.h): sessions hold tiles as they
// are.
constexpr uint32_t gear_tile_version = 1;

class gear_tile_codec final : public tile_codec {
  public:
    gear_tile_codec(const gear_config & config, gear_side side, int d_head);
    const tile_layout &  layout() const { return layout_; }
    size_t               tile_bytes() const override;
    size_t               scratch_bytes() const override;
    bool                 pack(int head, int64_t first_cell, const float * x, const uint8_t * written, uint8_t * tile, void * scratch) const override;
    bool                 wants_to_learn(int head) const override;
    void                 learn(int head, const float * x, const uint8_t * written) const override;
    void                 adopt(int head, const uint8_t * tile) const override;
    void                 forget() const override;
    std::vector<uint8_t> learned() const override { return bases_ ? bases_->learned() : std::vector<uint8_t>(); }
    bool                 learn_again(const std::vector<uint8_t> & bytes) const override { return bases_ ? bases_->learn_again(bytes) : bytes.empty(); }
    size_t               learned_bytes() const override { return bases_ ? bases_->query_bytes() : 0; }
    bool                 measures_error() const override { return true; }
    const double *       score_weights(int head) const override;
    bool                 knows_pairs(int head) const override;
    double               score_square(int head, const float * e) const override;
    // Where attention reports the queries of K's heads; nullptr: nothing is learned from them.
    head_bases *         bases() const { return bases_.get(); }
    bool     repack(int head, int64_t first_cell, const float * x, const uint8_t * written, const uint8_t * kept, const uint8_t * old, uint8_t * tile,
                    void * scratch) const override;
    void     unpack(const uint8_t * tile, float * x, void * scratch) const override;
    // Of everything that decoding depends on: version, coding and layout.
    uint64_t format() const override;
    bool     is_sound(const uint8_t * tile) const override; // its outliers lie inside of their vectors

  private:
    tile_layout                 layout_;
    uint32_t                    seed_;
    std::unique_ptr<head_bases> bases_; // K's, and V's with rotate 2
};

// Where attention reports the queries that a side's heads meet; nullptr where nothing is learned from them.
inline head_bases * bases_of(const tile_codec * codec) {
    const auto * gear = dynamic_cast<const gear_tile_codec *>(codec);
    return gear ? gear->bases() : nullptr;
}

// Tiles of f16 [T, d]: what the callback returned. Saves no memory; counted_bytes() is what the method says it would take.
class callback_tile_codec final : public tile_codec {
  public:
    callback_tile_codec(const gear_config & config, int il, gear_side side, int d_head, gear_codec_callback callback, void * user);
    double        counted_bytes() const; // sum over the tiles packed
    static size_t tile_bytes(const gear_config & config, int d_head);
    size_t        tile_bytes() const override;
    size_t        scratch_bytes() const override;
    bool          pack(int head, int64_t first_cell, const float * x, const uint8_t * written, uint8_t * tile, void * scratch) const override;
    void          unpack(const uint8_t * tile, float * x, void * scratch) const override;
    uint64_t      format() const override { return 1; } // no checksum of numbers: of a callback's tiles nothing is known but that they are f16

  private:
    bool all_finite(const uint16_t * xhat, const uint8_t * written) const;

    int                 n_token_, il_, d_head_;
    size_t              tile_bytes_;
    gear_side           side_;
    gear_codec_callback callback_;
    void *              user_;
    struct shared; // a lock (one call at a time) and the count
    std::shared_ptr<shared> shared_;
};

} // namespace gear
