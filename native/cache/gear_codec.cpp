#include "cache/gear_codec.h"

#include "common/checksum.h"
#include "common/half_rows.h"

#include <algorithm>
#include <cmath>
#include <mutex>

namespace gear {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// GEAR
// ---------------------------------------------------------------------------------------------------------------------------------------------

gear_tile_codec::gear_tile_codec(const gear_config & config, gear_side side, int d_head)
    : layout_(make_layout(config, side, d_head)), seed_(config.seed),
      bases_(side == GEAR_SIDE_K || layout_.config.rotate == rotate_weighted ? std::make_unique<head_bases>(layout_) : nullptr) {}

size_t gear_tile_codec::tile_bytes() const {
    return (size_t) layout_.part.bytes;
}

size_t gear_tile_codec::scratch_bytes() const {
    return pack_scratch_bytes(layout_);
}

bool gear_tile_codec::pack(int head, int64_t, const float * x, const uint8_t * written, uint8_t * tile, void * scratch) const {
    pack_tile(layout_, seed_, x, written, tile, scratch, nullptr, bases_ ? bases_->basis(head) : nullptr, bases_ ? bases_->queries(head) : nullptr);
    return true;
}

bool gear_tile_codec::wants_to_learn(int head) const {
    return bases_ && bases_->is_open(head);
}

void gear_tile_codec::learn(int head, const float * x, const uint8_t * written) const {
    bases_->decide(head, x, written);
}

void gear_tile_codec::adopt(int head, const uint8_t * tile) const {
    if (bases_) {
        bases_->adopt(head, tile);
    }
}

void gear_tile_codec::forget() const {
    if (bases_) {
        bases_->forget();
    }
}

const double * gear_tile_codec::score_weights(int head) const {
    return bases_ ? bases_->score_weights(head) : nullptr;
}

bool gear_tile_codec::knows_pairs(int head) const {
    return bases_ && bases_->queries(head) && bases_->queries(head)->is_known();
}

double gear_tile_codec::score_square(int head, const float * e) const {
    return bases_->score_square(head, e);
}

bool gear_tile_codec::repack(int head, int64_t, const float * x, const uint8_t * written, const uint8_t * kept, const uint8_t * old, uint8_t * tile,
                             void * scratch) const {
    const bool      any  = std::find(kept, kept + layout_.n_token, 1) != kept + layout_.n_token;
    const kept_rows rows = { kept, old };
    pack_tile(layout_, seed_, x, written, tile, scratch, any ? &rows : nullptr, bases_ ? bases_->basis(head) : nullptr,
              bases_ ? bases_->queries(head) : nullptr);
    return true;
}

void gear_tile_codec::unpack(const uint8_t * tile, float * x, void *) const {
    unpack_tile(layout_, tile, x);
}

uint64_t gear_tile_codec::format() const {
    static_assert(sizeof(gear_tile_layout) == 15 * 8 + 6 * 4, "a new part of the tile has to be among these numbers");
    const gear_side_config & c         = layout_.config;
    const gear_tile_layout & part      = layout_.part;
    const int64_t            numbers[] = {
        gear_tile_version, layout_.side,  layout_.n_token, layout_.d_head,     layout_.group,      c.bits,      c.scale_bits, c.rank,     c.factor_bits,
        c.rotate,          part.bytes,    part.plane[0],   part.plane[1],      part.plane[2],      part.lo,     part.hi,      part.scale, part.zero,
        part.sigma,        part.a,        part.b,          part.outlier_value, part.outlier_index, part.n_lane, part.n_depth, part.n_set, part.n_group,
        part.n_vector,     part.n_outlier
    };
    const uint64_t sum = checksum_of(numbers, sizeof numbers);
    if (part.basis < 0) {
        return sum;
    }
    const int64_t with_basis[] = { (int64_t) sum, part.basis }; // apart, so that tiles without one are what they were
    return checksum_of(with_basis, sizeof with_basis);
}

bool gear_tile_codec::is_sound(const uint8_t * tile) const {
    const int     length = vector_length(layout_);
    const int64_t n      = (int64_t) layout_.part.n_vector * layout_.part.n_outlier;
    for (int64_t place = 0; place < n; ++place) {
        if (outlier_index_at(layout_, tile, place) >= length) {
            return false;
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// A caller's method
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct callback_tile_codec::shared {
    std::mutex lock;
    double     bytes = 0;
};

callback_tile_codec::callback_tile_codec(const gear_config & config, int il, gear_side side, int d_head, gear_codec_callback callback, void * user)
    : n_token_(config.tile), il_(il), d_head_(d_head), tile_bytes_(tile_bytes(config, d_head)), side_(side), callback_(callback), user_(user),
      shared_(std::make_shared<shared>()) {}

double callback_tile_codec::counted_bytes() const {
    std::lock_guard<std::mutex> guard(shared_->lock);
    return shared_->bytes;
}

size_t callback_tile_codec::tile_bytes(const gear_config & config, int d_head) {
    return ((size_t) config.tile * d_head * sizeof(uint16_t) + tile_align - 1) / tile_align * tile_align;
}

size_t callback_tile_codec::tile_bytes() const {
    return tile_bytes_;
}

// The cells and the reconstruction that the callback is given.
size_t callback_tile_codec::scratch_bytes() const {
    return (size_t) n_token_ * sizeof(int64_t) + (size_t) n_token_ * d_head_ * sizeof(float);
}

// A reconstruction that is no number, or beyond f16, would spoil every token that attends to it.
bool callback_tile_codec::all_finite(const uint16_t * xhat, const uint8_t * written) const {
    for (int i = 0; i < n_token_ * d_head_; ++i) {
        if (written[i / d_head_] && (xhat[i] & 0x7c00) == 0x7c00) {
            return false;
        }
    }
    return true;
}

bool callback_tile_codec::pack(int head, int64_t first_cell, const float * x, const uint8_t * written, uint8_t * tile, void * scratch) const {
    int64_t * cells = (int64_t *) scratch;
    float *   xhat  = (float *) (cells + n_token_);
    for (int t = 0; t < n_token_; ++t) {
        cells[t] = first_cell + t;
    }
    const size_t n = (size_t) n_token_ * d_head_;
    std::fill_n(xhat, n, 0.0f);
    double bytes;
    {
        std::lock_guard<std::mutex> guard(shared_->lock); // "called from one thread at a time"
        bytes = callback_(user_, il_, side_, head, n_token_, d_head_, x, written, cells, xhat);
        if (!(bytes >= 0)) {
            return false;
        }
        shared_->bytes += bytes;
    }
    uint16_t * kept = (uint16_t *) tile;
    float_to_half(xhat, kept, n);
    return all_finite(kept, written);
}

void callback_tile_codec::unpack(const uint8_t * tile, float * x, void *) const {
    half_to_float((const uint16_t *) tile, x, (size_t) n_token_ * d_head_);
}

} // namespace gear
