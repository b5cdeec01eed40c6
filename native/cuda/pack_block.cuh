// pack_block.cuh - the block of threads that packs one tile of one head: what it works on, and its memory. What is large lies in the block's scratch,
// which the L2 holds: a tile is packed once in T tokens.
#pragma once

#include "cuda/arguments.h"
#include "cuda/block.cuh"
#include "cuda/tile_device.cuh"

namespace gear::cuda {

constexpr int   pack_threads = 256;
constexpr float infinite     = __builtin_huge_valf();

// Numbers of one block, in the order in which they lie in its scratch.
struct pack_scratch_device {
    float * X;       // [T, d]  X - S; NaN where S or nothing stands
    float * Y;       // [T, d]  X - S - L; R while L is computed
    float * lowest;  // [n_group]
    float * highest; // [n_group]
    float * zero;    // [n_group]
    float * scale;   // [n_group]
    float * first;   // [n_group]
    float * last;    // [n_group]
};

__host__ __device__ inline int64_t pack_scratch_floats(const tile_layout & layout) {
    return (layout.config.rank > 0 ? 2 : 1) * (int64_t) layout.n_token * layout.d_head + 6 * (int64_t) layout.part.n_group;
}

// Shared memory: A [r][T] and B [r][d], sums of a block, ranges of the sets.
struct pack_shared {
    float *   A;
    float *   B;
    float *   sum;    // [2 + warps]
    float *   lowest; // [n_set] of the set
    float *   highest;
    float *   mean;   // [d]
    float *   old_lo; // [n_set] of the tile as it was packed before
    float *   old_hi;
    uint8_t * basis; // [d / 2] weights of the channels, with `rotate` 2
};

__host__ __device__ inline int64_t pack_shared_floats(const tile_layout & layout) {
    return layout.config.rank * (layout.n_token + layout.d_head) + 64 + 4 * layout.part.n_set + layout.d_head + layout.d_head / 8;
}

__device__ inline bool is_absent(float x) {
    return x != x;
}

__device__ inline void lay_out(const tile_layout & layout, float * scratch, pack_scratch_device & w) {
    const int64_t n = (int64_t) layout.n_token * layout.d_head, n_group = layout.part.n_group;
    w.X       = scratch;
    w.Y       = layout.config.rank > 0 ? w.X + n : w.X;
    w.lowest  = w.Y + n;
    w.highest = w.lowest + n_group;
    w.zero    = w.highest + n_group;
    w.scale   = w.zero + n_group;
    w.first   = w.scale + n_group;
    w.last    = w.first + n_group;
}

__device__ inline void lay_out(const tile_layout & layout, pack_shared & s) {
    s.A       = reinterpret_cast<float *>(shared_memory());
    s.B       = s.A + layout.config.rank * layout.n_token;
    s.sum     = s.B + layout.config.rank * layout.d_head;
    s.lowest  = s.sum + 64;
    s.highest = s.lowest + layout.part.n_set;
    s.old_lo  = s.highest + layout.part.n_set;
    s.old_hi  = s.old_lo + layout.part.n_set;
    s.mean    = s.old_hi + layout.part.n_set;
    s.basis   = reinterpret_cast<uint8_t *>(s.mean + layout.d_head);
}

struct pack_block {
    const tile_layout & layout;
    const uint16_t *    pool;   // row 0 of the stream, this head's part
    int                 stride; // elements from row to row
    const int32_t *     source; // [T]
    uint8_t *           tile;
    const uint8_t *     basis; // [d / 2] what a tile without kept rows is coded in, with `rotate` 2
    uint32_t            seed;
    pack_scratch_device w;
    pack_shared         s;

    __device__ int T() const { return layout.n_token; }
    __device__ int d() const { return layout.d_head; }
};

} // namespace gear::cuda
