// rows.cuh - kernels that put rows into the pool, change the table of slots and take rows out of tiles and pool.
#pragma once

#include "cuda/arguments.h"
#include "cuda/block.cuh"
#include "cuda/tile_device.cuh"

namespace gear::cuda {

constexpr int row_threads    = 256;
constexpr int unpack_threads = 64;

__global__ void __launch_bounds__(row_threads) write_rows_kernel(const __grid_constant__ write_arguments args) {
    const int          row  = (int) blockIdx.x;
    const write_side & side = args.side[blockIdx.y];
    const int          slot = args.slot[blockIdx.y][row];
    if (slot < 0) {
        return;
    }
    const char * from = static_cast<const char *>(side.rows) + row * side.stride;
    uint16_t *   to   = side.pool + (int64_t) slot * side.n_embd;
    for_each(side.n_embd,
             [&](int i) { to[i] = side.is_half ? reinterpret_cast<const uint16_t *>(from)[i] : to_half(reinterpret_cast<const float *>(from)[i]); });
}

__global__ void __launch_bounds__(row_threads) set_slots_kernel(const __grid_constant__ slot_arguments args) {
    for (int i = (int) (blockIdx.x * blockDim.x + threadIdx.x); i < args.n; i += (int) (gridDim.x * blockDim.x)) {
        args.slot[args.index[i]] = args.value[i];
    }
}

// One cell of one head a block: rows as f16, cells never written as zeros.
__global__ void __launch_bounds__(unpack_threads) unpack_kernel(const __grid_constant__ unpack_arguments args) {
    const device_side & side   = args.side;
    const tile_layout & layout = side.layout;
    const int           head = (int) blockIdx.y, cell = args.first + (int) blockIdx.x, d = layout.d_head;
    const int           slot = side.slot[(int64_t) args.stream * side.n_cell + cell];
    uint16_t *          to   = args.rows + ((int64_t) blockIdx.x * side.n_head + head) * d;
    if (slot != slot_packed) {
        const uint16_t * from = side.pool + (((int64_t) args.stream * side.n_row + slot) * side.n_head + head) * d;
        for_each(d, [&](int c) { to[c] = slot >= 0 ? from[c] : (uint16_t) 0; });
        return;
    }
    const uint8_t * tile = side.tiles + (((int64_t) args.stream * side.n_tile + cell / layout.n_token) * side.n_head + head) * layout.part.bytes;
    float *         row  = reinterpret_cast<float *>(shared_memory());
    for_each(d, [&](int c) { row[c] = reconstructed_at(layout, tile, cell % layout.n_token, c); });
    __syncthreads();
    if (layout.config.rotate) {
        hadamard_rows(row, 1, d, d);
    }
    for_each(d, [&](int c) { to[c] = to_half(in_half_range(is_weighted(layout) ? row[c] / weight_at(layout, tile, c) : row[c])); });
}

} // namespace gear::cuda
