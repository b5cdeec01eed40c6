// layout.cpp - what configurations and head sizes the codec takes, and where the parts of a tile lie.

#include "codec/basis.h"
#include "codec/codec.h"
#include "codec/feedback.h"
#include "common/error.h"

#include <algorithm>
#include <cmath>

namespace gear {

namespace {

void check_range(const char * name, const char * side, double value, double low, double high) {
    if (!(value >= low && value <= high)) { // also catches NaN
        fail(GEAR_ERROR_INVALID, "%s%s must be from %g to %g, not %g", name, side, low, high, value);
    }
}

void check_share(const char * name, const char * side, float value, float high, bool zero_allowed) {
    if (!(value >= 0 && value <= high) || (value == 0 && !zero_allowed)) {
        fail(GEAR_ERROR_INVALID, "%s%s must be %s 0 and at most %g, not %g", name, side, zero_allowed ? "at least" : "above", high, value);
    }
}

// side is "_k" or "_v", so that the messages name the fields as GearConfig does.
void check_side(const gear_side_config & c, const char * side) {
    if (c.bits != 16 && (c.bits < 2 || c.bits > 7)) {
        fail(GEAR_ERROR_INVALID, "bits%s must be 2 to 7, or 16 for f16, not %d", side, c.bits);
    }
    if (c.scale_bits != 8 && c.scale_bits != 16) {
        fail(GEAR_ERROR_INVALID, "scale_bits must be 8 or 16, not %d", c.scale_bits);
    }
    if (c.factor_bits != 4 && c.factor_bits != 8) {
        fail(GEAR_ERROR_INVALID, "factor_bits must be 4 or 8, not %d", c.factor_bits);
    }
    if (c.rotate < rotate_none || c.rotate > rotate_weighted) {
        fail(GEAR_ERROR_INVALID, "rotate%s must be 0, 1 or 2, not %d", side, c.rotate);
    }
    if (c.center != 0 && c.center != 1) {
        fail(GEAR_ERROR_INVALID, "center%s must be 0 or 1, not %d", side, c.center);
    }
    if (c.center == 1 && c.sparsity > 0) {
        fail(GEAR_ERROR_INVALID, "center%s must be 0 where there are outliers (sparsity %g): their exact values and a mean do not go together", side,
             c.sparsity);
    }
    if (c.feedback < feedback_never || c.feedback > feedback_auto) {
        fail(GEAR_ERROR_INVALID, "feedback%s must be 0, 1 or 2, not %d", side, c.feedback);
    }
    if (c.feedback == feedback_always && (side[1] != 'k' || c.rank > 0 || c.sparsity > 0 || c.center)) {
        fail(GEAR_ERROR_INVALID, "feedback is for keys without a low rank, outliers and a mean: feedback%s must be 0 here", side);
    }
    check_range("rank", side, c.rank, 0, max_rank);
    check_range("rounds", "", c.rounds, 1, 16);
    check_share("sparsity", "", c.sparsity, 0.25f, true);
    check_share("clip", side, c.clip, 1.0f, false);
}

void check_head(gear_side side, int d) {
    if (d < 32 || d > max_d_head || d % 16 != 0) {
        fail(GEAR_ERROR_UNSUPPORTED,
             "%s heads of %d channels cannot be packed: the head size must be a multiple of 16 from 32 to %d. Keep this side as f16 (bits = 16).",
             side == GEAR_SIDE_K ? "K" : "V", d, max_d_head);
    }
}

// Outliers of a vector, the top half and the bottom half together.
int outliers_of(float sparsity, int length) {
    return 2 * (int) std::lround(sparsity / 2 * (double) length);
}

// Hands out the offsets of a tile's parts, one behind the other.
class placer {
  public:
    // -1 for a part of no bytes. Parts begin at multiples of 16 bytes, so that a 16-byte load never straddles two cache lines.
    int64_t place(int64_t bytes) {
        if (bytes == 0) {
            return -1;
        }
        const int64_t offset = end_;
        end_ += (bytes + 15) / 16 * 16;
        return offset;
    }
    int64_t tile_bytes() const { return (end_ + (int64_t) tile_align - 1) / (int64_t) tile_align * (int64_t) tile_align; }

  private:
    int64_t end_ = 0;
};

} // namespace

void check_config(const gear_config & config) {
    if (config.tile != 64 && config.tile != 128 && config.tile != 256) {
        fail(GEAR_ERROR_INVALID, "tile must be 64, 128 or 256, not %d", config.tile);
    }
    check_side(config.k, "_k");
    check_side(config.v, "_v");
    const int group_k = config.k.group, group_v = config.v.group;
    if (group_k < 0 || group_k % 32 != 0 || (group_k != 0 && config.tile % group_k != 0)) {
        fail(GEAR_ERROR_INVALID, "group_k must be 0 or a multiple of 32 that divides the tile (%d), not %d", config.tile, group_k);
    }
    if (group_v < 0 || group_v > max_d_head || group_v % 32 != 0) {
        fail(GEAR_ERROR_INVALID, "group_v must be 0 or a multiple of 32 up to %d, not %d", max_d_head, group_v);
    }
    check_range("n_tail", "", config.n_tail, 0, 1 << 30);
    check_range("n_sink", "", config.n_sink, 0, 1 << 20);
}

void check_heads(const gear_config & config, int d_head_k, int d_head_v) {
    check_config(config);
    if (config.k.bits != 16) {
        check_head(GEAR_SIDE_K, d_head_k);
    }
    if (config.v.bits != 16) {
        check_head(GEAR_SIDE_V, d_head_v);
    }
}

tile_layout make_layout(const gear_config & config, gear_side side, int d_head) {
    check_config(config);
    check_head(side, d_head);
    const bool is_k = side == GEAR_SIDE_K;

    tile_layout layout = {};
    layout.config      = is_k ? config.k : config.v;
    layout.side        = side;
    layout.n_token     = config.tile;
    layout.d_head      = d_head;
    const int bits = layout.config.bits, T = config.tile, d = d_head;
    if (layout.config.feedback == feedback_auto) {
        layout.config.feedback = is_k && d <= most_auto_feedback && layout.config.rank == 0 && layout.config.sparsity == 0 && !layout.config.center;
    }
    if (bits == 16) {
        fail(GEAR_ERROR_INVALID, "%s is kept as f16 (bits%s = 16): it has no packed tiles", is_k ? "K" : "V", is_k ? "_k" : "_v");
    }
    const int length = is_k ? T : d; // of a vector: K is quantized along the tokens, V along the channels
    layout.levels    = (1 << bits) - 1;
    layout.group     = layout.config.group == 0 ? length : std::min(layout.config.group, length);

    gear_tile_layout & part = layout.part;
    part.n_lane             = is_k ? T : (d + 31) / 32 * 32;
    part.n_depth            = is_k ? d : T;
    part.n_set              = is_k ? d : (d + layout.group - 1) / layout.group;
    part.n_group            = is_k ? T / layout.group * d : part.n_set * T;
    part.n_vector           = is_k ? d : T;
    part.n_outlier          = outliers_of(layout.config.sparsity, length);

    placer    tile;
    const int widths[3] = { 4, 2, 1 };
    for (int i = 0, position = 0; i < 3; ++i) {
        const int width = widths[i];
        part.plane[i]   = tile.place(bits & width ? (int64_t) part.n_lane * part.n_depth * width / 8 : 0);
        if (part.plane[i] >= 0) {
            layout.plane[layout.n_plane++] = { width, 4 / width, position, part.plane[i] };
            position += width;
        }
    }
    const int64_t n_outlier = (int64_t) part.n_vector * part.n_outlier;
    const int     r = layout.config.rank, scale_bytes = layout.config.scale_bits / 8;
    part.scale         = tile.place((int64_t) part.n_group * scale_bytes);
    part.zero          = tile.place((int64_t) part.n_group * scale_bytes);
    part.lo            = tile.place(scale_bytes == 1 ? 2 * part.n_set : 0);
    part.hi            = tile.place(scale_bytes == 1 ? 2 * part.n_set : 0);
    part.sigma         = tile.place(4 * r);
    part.a             = tile.place((int64_t) r * T * layout.config.factor_bits / 8);
    part.b             = tile.place((int64_t) r * d * layout.config.factor_bits / 8);
    part.mean          = tile.place(layout.config.center ? 2 * d : 0);
    part.basis         = tile.place(layout.config.rotate == rotate_weighted ? basis_bytes(d) : 0);
    part.outlier_value = tile.place(2 * n_outlier);
    part.outlier_index = tile.place(n_outlier * outlier_index_bytes(length));
    part.bytes         = tile.tile_bytes();
    return layout;
}

} // namespace gear
