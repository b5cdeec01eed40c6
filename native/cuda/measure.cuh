// measure.cuh - the kernels that compare rows with what packing made of them, as store::measure (store/eviction.cpp) does.
#pragma once

#include "cuda/arguments.h"
#include "cuda/block.cuh"
#include "cuda/tile_device.cuh"

namespace gear::cuda {

constexpr int measure_threads = 128;
constexpr int measured_rows   = 4; // that are taken out of the tile at once

__host__ __device__ inline int measure_shared_floats(const tile_layout & layout) {
    return (measured_rows + 2) * layout.d_head;
}

// A head of a tile a block. A channel's sums are one thread's, in the codec's order of rows.
__global__ void __launch_bounds__(measure_threads) measure_kernel(const __grid_constant__ measure_arguments args) {
    const device_side & side   = args.side;
    const tile_layout & layout = side.layout;
    const int           job = (int) blockIdx.x, head = (int) blockIdx.y, d = layout.d_head;
    const pack_job      which  = args.jobs[job];
    const int32_t *     source = args.source + (int64_t) job * layout.n_token;
    const uint8_t *     tile   = side.tiles + (((int64_t) which.stream * side.n_tile + which.tile) * side.n_head + head) * layout.part.bytes;
    const uint16_t *    pool   = side.pool + ((int64_t) which.stream * side.n_row * side.n_head + head) * d;
    float * const       rows   = reinterpret_cast<float *>(shared_memory());
    float * const       square = rows + measured_rows * d; // [d] of (x - x^)^2
    float * const       size   = square + d;               // [d] of x^2
    for_each(2 * d, [&](int c) { square[c] = 0; });
    int n_row = 0;
    for (int first = 0; first < layout.n_token; first += measured_rows) {
        for_each(measured_rows * d, [&](int i) {
            const int t = first + i / d;
            rows[i]     = t < layout.n_token && source[t] >= 0 ? reconstructed_at(layout, tile, t, i % d) : 0.0f;
        });
        __syncthreads();
        if (layout.config.rotate) {
            hadamard_rows(rows, measured_rows, d, d);
        }
        for (int t = first; t < first + measured_rows && t < layout.n_token; ++t) {
            if (source[t] < 0) {
                continue;
            }
            ++n_row;
            for_each(d, [&](int c) {
                const float coded = rows[(t - first) * d + c], x = from_half(pool[(int64_t) source[t] * side.n_head * d + c]);
                const float off = x - (is_weighted(layout) ? coded / weight_at(layout, tile, c) : coded);
                square[c] += off * off;
                size[c] += x * x;
            });
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const double * weight   = args.weight ? args.weight + (int64_t) head * d : nullptr;
        const bool     is_known = weight && weight[0] >= 0;
        error_sums     sum      = { (double) n_row, 0, 0, is_known ? (double) n_row : 0.0, 0 };
        for (int c = 0; c < d; ++c) {
            sum.squares += square[c];
            sum.of += size[c];
            sum.scores += is_known ? weight[c] * square[c] : 0.0;
        }
        args.fresh[(int64_t) job * side.n_head + head] = sum;
    }
}

__global__ void __launch_bounds__(measure_threads) add_errors_kernel(const __grid_constant__ measure_arguments args) {
    for_each(args.side.n_head, [&](int head) {
        error_sums sum = args.sums[head];
        for (int job = 0; job < args.n_job; ++job) {
            const error_sums fresh = args.fresh[(int64_t) job * args.side.n_head + head];
            const double     all   = fresh.of + fresh.squares + fresh.scores;
            if (all - all == 0) { // a row that is no number says nothing
                sum.n_row += fresh.n_row;
                sum.squares += fresh.squares;
                sum.of += fresh.of;
                sum.n_score += fresh.n_score;
                sum.scores += fresh.scores;
            }
        }
        args.sums[head] = sum;
    });
}

} // namespace gear::cuda
