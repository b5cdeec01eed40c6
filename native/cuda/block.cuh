// block.cuh - how the threads of a block share out work.
#pragma once

#include "cuda/machine.cuh"

namespace gear::cuda {

constexpr int warp_threads = 32;

// f(i) for all i < n, shared out among the threads of the block.
template <class F> __device__ inline void for_each(int n, F f) {
    for (int i = (int) threadIdx.x; i < n; i += (int) blockDim.x) {
        f(i);
    }
}

// f(i, lane) for all i < n, each by a whole warp.
template <class F> __device__ inline void for_each_warp(int n, F f) {
    for (int i = (int) threadIdx.x / warp_threads; i < n; i += (int) blockDim.x / warp_threads) {
        f(i, (int) threadIdx.x % warp_threads);
    }
}

} // namespace gear::cuda
