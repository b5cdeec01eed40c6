// observe.cuh - the kernel that notes the queries that each KV head meets, as head_bases::observe (codec/basis.h) does.
#pragma once

#include "cuda/arguments.h"
#include "cuda/block.cuh"

namespace gear::cuda {

constexpr int observe_threads = 128;

// One KV head a block, a channel a thread, in the codec's order: the sums have the codec's bits.
__global__ void __launch_bounds__(observe_threads) observe_kernel(const __grid_constant__ observe_arguments args) {
    const gear_attention_params & p    = args.params;
    const int                     head = (int) blockIdx.x, n_share = p.n_head / args.n_head_kv;
    double *                      sums = args.square + (int64_t) head * args.d_head;
    for_each(args.d_head, [&](int c) {
        double sum = sums[c];
        for (int share = 0; share < n_share; ++share) {
            for (int stream = 0; stream < p.n_stream; ++stream) {
                const char * q = reinterpret_cast<const char *>(p.q) + (head * n_share + share) * p.q_stride[1] + stream * p.q_stride[2];
                for (int query = 0; query < p.n_query; ++query) {
                    const float  x      = reinterpret_cast<const float *>(q + query * p.q_stride[0])[c];
                    const double square = (double) x * x;
                    sum += square - square == 0 ? square : 0.0; // not of a number that is none
                }
            }
        }
        sums[c] = sum;
    });
}

} // namespace gear::cuda
