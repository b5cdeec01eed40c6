// attend.cuh - what the kernels of attention share. Attention over packed tiles and exact rows, as attention/attention_scalar.cpp says it, is two kernels
// and a merge:
//
//     decode.cuh  few queries. A block takes 8 rows (query x query head of one KV head) through a range of tiles: the codes are read once for all of them
//                 and go straight into tensor-core products (tile_device.cuh has the lane mapping). Ranges are merged by merge_kernel.
//     prefill.cuh many queries. A block takes 128 rows (64 for heads of more than 128 channels, 32 of more than 256) through all tiles, a strip of
//                 cells at a time: the strip is unpacked into f16 in shared memory, where all rows multiply with it. There is no f16 copy of the cache.
//
// Both fit heads of 576 channels, in any configuration, into the 99 KiB of shared memory that a block has at least (sm_86, sm_89).
//
// The block's threads read the table of slots, so that the host need not know what is packed when it launches; a captured graph stays valid.
#pragma once

#include "cuda/arguments.h"
#include "cuda/pack.cuh"
#include "cuda/tile_device.cuh"

namespace gear::cuda {

constexpr float log2_e     = 1.4426950408889634f;
constexpr int   large_head = 256; // heads of more channels than that have instances of their own

__device__ inline float exp_fast(float x) {
    return exp2_fast(x * log2_e);
}

// ALiBi's slope of a query head.
__device__ inline float slope_at(const gear_attention_params & params, int head) {
    if (params.max_bias <= 0) {
        return 1.0f;
    }
    int n_power = 1;
    while (2 * n_power <= params.n_head) {
        n_power *= 2;
    }
    const float exponent = head < n_power ? -params.max_bias / (float) n_power * (float) (head + 1)
                                          : -params.max_bias / 2 / (float) n_power * (float) (2 * (head - n_power) + 1);
    return exp2f(exponent);
}

// A row of a block: one query of one query head.
struct row_at {
    int query, head;
};

__device__ inline row_at row_of(const attend_arguments & args, int head_kv, int row) {
    return { row / args.n_share, head_kv * args.n_share + row % args.n_share };
}

__device__ inline const uint16_t * mask_row(const attend_arguments & args, int stream, const row_at & row) {
    const gear_attention_params & p = args.params;
    const int64_t bytes = row.query * p.mask_stride[0] + row.head % p.mask_n_head * p.mask_stride[1] + stream % p.mask_n_stream * p.mask_stride[2];
    return reinterpret_cast<const uint16_t *>(reinterpret_cast<const char *>(p.mask) + bytes);
}

__device__ inline const float * query_row(const attend_arguments & args, int stream, const row_at & row) {
    const gear_attention_params & p = args.params;
    return reinterpret_cast<const float *>(reinterpret_cast<const char *>(p.q) + row.query * p.q_stride[0] + row.head * p.q_stride[1] +
                                           stream * p.q_stride[2]);
}

__device__ inline float * output_row(const attend_arguments & args, int stream, const row_at & row) {
    const gear_attention_params & p = args.params;
    return reinterpret_cast<float *>(reinterpret_cast<char *>(p.out) + row.head * p.out_stride[0] + row.query * p.out_stride[1] +
                                     stream * p.out_stride[2]);
}

constexpr uint16_t hidden = 0xfc00; // -infinity

// Can one of the block's rows see one of the cells first .. first + n - 1? Asked by all threads.
__device__ inline bool is_visible(const attend_arguments & args, int stream, int head_kv, int first_row, int n_rows, int first, int n) {
    if (!args.params.mask) {
        return true;
    }
    const int step = args.params.mask_n_head == 1 ? args.n_share : 1; // one mask for all heads: look at it once a query
    const int row0 = first_row - first_row % step, n_look = (first_row + n_rows - row0 + step - 1) / step;
    int       seen = 0;
    for_each(n_look * n, [&](int i) { seen |= mask_row(args, stream, row_of(args, head_kv, row0 + i / n * step))[first + i % n] != hidden; });
    return __syncthreads_or(seen) != 0;
}

__device__ inline const uint8_t * tile_at(const device_side & side, int stream, int tile, int head) {
    return side.tiles + (((int64_t) stream * side.n_tile + tile) * side.n_head + head) * side.layout.part.bytes;
}

__device__ inline const uint16_t * exact_row_at(const device_side & side, int stream, int slot, int head) {
    return side.pool + (((int64_t) stream * side.n_row + slot) * side.n_head + head) * side.layout.d_head;
}

__host__ __device__ inline int padded_to(int n, int multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

__host__ __device__ inline bool rotates(const device_side & side) {
    return side.has_tiles && side.layout.config.rotate;
}

// Whether each packed tile names the basis it is coded in (codec/basis.h).
__host__ __device__ inline bool is_weighted(const device_side & side) {
    return side.has_tiles && is_weighted(side.layout);
}

// A sink is one more score without a row. Everything hidden gives 0.
__device__ inline float with_sink(const attend_arguments & args, int head, float max, float sum, float & shrink) {
    const float sink = args.params.sinks ? args.params.sinks[head] : -infinite, high = fmaxf(max, sink);
    shrink = max == -infinite ? 0.0f : exp_fast(max - high);
    return sum * shrink + (sink == -infinite ? 0.0f : exp_fast(sink - high));
}

} // namespace gear::cuda
