// power_iteration.cuh - L = A B^T = PowerIteration_r(R) on a GPU (algorithm 2; codec.cpp says why it is done so). The sums go by threads and warps, in
// another order than the codec's: A and B agree with its own to their rounding.
#pragma once

#include "cuda/pack_block.cuh"

namespace gear::cuda {

struct low_rank_block : pack_block {
    // The codec sums in f64; a tree of f32 sums is as good for a comparison.
    __device__ float block_sum(float x) {
        x              = warp_sum(x);
        const int warp = (int) threadIdx.x / warp_threads, lane = (int) threadIdx.x % warp_threads;
        float *   of_warp = s.sum + 2;
        __syncthreads();
        if (lane == 0) {
            of_warp[warp] = x;
        }
        __syncthreads();
        float sum = 0;
        for (int i = 0; i < (int) blockDim.x / warp_threads; ++i) {
            sum += of_warp[i];
        }
        return sum;
    }

    __device__ void random_start() {
        for_each(layout.config.rank * d(), [&](int i) { s.B[i] = start_number(seed, i); });
        __syncthreads();
    }

    // By the first warp: columns are short.
    __device__ void orthonormalize(int n, float * M) {
        const int  lane = (int) threadIdx.x % warp_threads;
        const auto dot  = [&](const float * a, const float * b) {
            float sum = 0;
            for (int i = lane; i < n; i += warp_threads) {
                sum += a[i] * b[i];
            }
            return warp_sum(sum);
        };
        for (int k = 0; k < layout.config.rank && threadIdx.x < (unsigned) warp_threads; ++k) {
            float *     column = M + k * n;
            const float before = dot(column, column);
            for (int pass = 0; pass < 2; ++pass) {
                for (int j = 0; j < k; ++j) {
                    const float share = dot(column, M + j * n);
                    for (int i = lane; i < n; i += warp_threads) {
                        column[i] -= share * M[j * n + i];
                    }
                    __syncwarp();
                }
            }
            const float factor = column_factor(before, dot(column, column));
            for (int i = lane; i < n; i += warp_threads) {
                column[i] *= factor;
            }
            __syncwarp();
        }
        __syncthreads();
    }

    __device__ void power_iteration(const float * R) {
        const int r = layout.config.rank;
        random_start();
        for (int pass = 0; pass < 3; ++pass) {
            orthonormalize(d(), s.B);
            for_each_warp(T() * r, [&](int i, int lane) { // A = R B
                const int k = i / T(), t = i % T();
                float     sum = 0;
                for (int c = lane; c < d(); c += warp_threads) {
                    sum += R[t * d() + c] * s.B[k * d() + c];
                }
                sum = warp_sum(sum);
                if (lane == 0) {
                    s.A[i] = sum;
                }
            });
            __syncthreads();
            orthonormalize(T(), s.A);
            for_each(r * d(), [&](int i) { // B = R^T A
                const int k = i / d(), c = i % d();
                float     sum = 0;
                for (int t = 0; t < T(); ++t) {
                    sum += s.A[k * T() + t] * R[t * d() + c];
                }
                s.B[i] = sum;
            });
            __syncthreads();
        }
    }

    __device__ void store_column(int n, const float * column, float largest, uint8_t * stored) const {
        const int   lane = (int) threadIdx.x % warp_threads, bits = layout.config.factor_bits;
        const float limit = factor_limit(bits);
        const auto  code  = [&](int i) { return factor_code(column[i], largest, limit); };
        for (int i = lane; bits == 8 && i < n; i += warp_threads) {
            stored[i] = (uint8_t) (int8_t) code(i);
        }
        for (int i = lane; bits == 4 && i < n / 2; i += warp_threads) {
            stored[i] = factor_nibbles(code(i), code(i + n / 2));
        }
    }

    // A and B into the tile.
    __device__ void store_factors() {
        const float limit = factor_limit(layout.config.factor_bits);
        for_each_warp(layout.config.rank, [&](int k, int lane) {
            const float *a = s.A + k * T(), *b = s.B + k * d();
            float        largest_a = 0, largest_b = 0;
            for (int t = lane; t < T(); t += warp_threads) {
                largest_a = fmaxf(largest_a, fabsf(a[t]));
            }
            for (int c = lane; c < d(); c += warp_threads) {
                largest_b = fmaxf(largest_b, fabsf(b[c]));
            }
            largest_a = warp_max(largest_a);
            largest_b = warp_max(largest_b);
            if (lane == 0) {
                reinterpret_cast<float *>(tile + layout.part.sigma)[k] = factor_sigma(largest_a, largest_b, limit);
            }
            store_column(T(), a, largest_a, tile + layout.part.a + k * T() * layout.config.factor_bits / 8);
            store_column(d(), b, largest_b, tile + layout.part.b + k * d() * layout.config.factor_bits / 8);
        });
        __syncthreads();
    }
};

} // namespace gear::cuda
