// pack.cuh - the kernel that packs tiles. One block of threads packs one tile of one head.
//
// The steps and their order are those of codec/codec.cpp, which says why, and the roundings are those of codec/ranges.h, which both call: a tile comes out
// with the same bytes. With L it agrees to the rounding of the power iteration's sums. What is large lies in the block's scratch, which the L2 holds: a
// tile is packed once in T tokens.
#pragma once

#include "cuda/power_iteration.cuh"

namespace gear::cuda {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Scale and zero of a group
// ---------------------------------------------------------------------------------------------------------------------------------------------

__device__ inline void store_range(const pack_scratch_device & w, int group, group_range range, float low, float high, int levels) {
    const end_codes ends = end_codes_of(range, low, high, levels);
    w.zero[group]        = range.zero;
    w.scale[group]       = range.scale;
    w.first[group]       = (float) ends.first;
    w.last[group]        = (float) ends.last;
}

__device__ inline void code_range_16(const pack_scratch_device & w, int group, int levels, uint8_t * scales, uint8_t * zeros) {
    const float        low = w.lowest[group], high = w.highest[group];
    const stored_range stored                   = round_range_16(low, high, levels);
    reinterpret_cast<uint16_t *>(scales)[group] = stored.scale;
    reinterpret_cast<uint16_t *>(zeros)[group]  = stored.zero;
    store_range(w, group, range_of_16(stored), low, high, levels);
}

__device__ inline void code_range_8(const set_range & set, const pack_scratch_device & w, int group, int levels, uint8_t * scales, uint8_t * zeros,
                                    bool is_held) {
    const value_ends   ends   = set.ends_of(w.lowest[group], w.highest[group]);
    const stored_range stored = round_range_8(set, ends, levels, is_held);
    scales[group]             = (uint8_t) stored.scale;
    zeros[group]              = (uint8_t) stored.zero;
    store_range(w, group, set.range_of(stored, levels), ends.low, ends.high, levels);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The tile
// ---------------------------------------------------------------------------------------------------------------------------------------------

struct packer : low_rank_block {
    __device__ void pack() {
        const bool has_kept = load();
        const bool is_held  = has_kept && layout.config.rank == 0;
        for_each(has_kept && layout.config.center ? d() : 0, [&](int c) { s.mean[c] = mean_at(layout, tile, c); });
        if (is_held) {
            for_each(layout.part.n_set, [&](int set) {
                s.old_lo[set] = layout.config.scale_bits == 8 ? from_half(half_at(tile + layout.part.lo, set)) : 0.0f;
                s.old_hi[set] = layout.config.scale_bits == 8 ? from_half(half_at(tile + layout.part.hi, set)) : 0.0f;
            });
            hold_ranges();
        }
        __syncthreads(); // all is read that the tile said before
        for_each((int) (layout.part.bytes / 4), [&](int i) { reinterpret_cast<uint32_t *>(tile)[i] = 0; });
        __syncthreads();
        for_each(is_weighted(layout) ? d() / 2 : 0, [&](int i) { tile[layout.part.basis + i] = s.basis[i]; });
        if (layout.config.center) {
            take_mean(has_kept);
        }
        if (layout.part.n_outlier > 0) {
            filter_outliers();
        }
        quantize(w.X, is_held);
        if (layout.config.rank > 0) {
            add_low_rank();
        }
        if (layout.config.center && !has_kept) {
            add_to_mean();
        }
    }

    // X, sanitized, weighted and rotated. true: some rows stay as the tile has them, and so does its basis.
    __device__ bool load() {
        int has_kept = 0;
        for_each(T(), [&](int t) { has_kept |= source[t] == slot_packed; });
        has_kept = __syncthreads_or(has_kept);
        for_each(is_weighted(layout) ? d() / 2 : 0, [&](int i) { s.basis[i] = has_kept ? tile[layout.part.basis + i] : basis[i]; });
        __syncthreads();
        for_each(T() * d(), [&](int i) {
            const int t = i / d(), c = i % d(), from = source[t];
            float     x = 0;
            if (from >= 0) {
                x = sanitized(from_half(pool[(int64_t) from * stride + c]));
                x = is_weighted(layout) ? x * weight_of_channel(s.basis, d(), c) : x;
            } else if (has_kept && from == slot_packed) {
                x = quantized_at(layout, tile, t, c);
                x += low_rank_at(layout, tile, t, c);
            }
            w.X[i] = x;
        });
        __syncthreads();
        if (has_kept) {
            for_each(layout.part.n_vector * layout.part.n_outlier, [&](int i) {
                const int vector = i / layout.part.n_outlier, index = outlier_index_at(layout, tile, i);
                const int t = layout.side == GEAR_SIDE_K ? index : vector, c = layout.side == GEAR_SIDE_K ? vector : index;
                if (source[t] == slot_packed) {
                    w.X[t * d() + c] = from_half(half_at(tile + layout.part.outlier_value, i));
                }
            });
            __syncthreads();
            for_each(T() * d(), [&](int i) {
                if (source[i / d()] == slot_packed) {
                    w.X[i] = sanitized(w.X[i]);
                }
            });
            __syncthreads();
        }
        if (layout.config.rotate) {
            rotate();
        }
        for_each(T() * d(), [&](int i) {
            if (source[i / d()] == slot_absent) {
                w.X[i] = nanf("");
            }
        });
        __syncthreads();
        return has_kept != 0;
    }

    // Rows from the pool only: what is kept is rotated already.
    __device__ void rotate() {
        for (int first = 0, run; first < d(); first += run) {
            run = rotation_run(d(), first);
            rotate_run(first, run);
        }
    }

    __device__ void rotate_run(int first, int n) {
        const int   block = n & -n;
        const float norm  = 1.0f / sqrtf((float) block);
        for (int half = 1; half < block; half *= 2) {
            for_each(T() * n / 2, [&](int i) {
                const int t = i / (n / 2), pair = i % (n / 2);
                float *   x = w.X + t * d() + first + pair / half * 2 * half + pair % half;
                if (source[t] >= 0) {
                    const float sum = x[0] + x[half], difference = x[0] - x[half];
                    x[0]    = sum;
                    x[half] = difference;
                }
            });
            __syncthreads();
        }
        for_each(T() * n, [&](int i) {
            float & x = w.X[i / n * d() + first + i % n];
            if (source[i / n] >= 0) {
                x = sanitized(x * norm);
            }
        });
        __syncthreads();
    }

    // -----------------------------------------------------------------------------------------------------------------------------------------
    // M: a thread sums up a channel, token by token, as the codec does
    // -----------------------------------------------------------------------------------------------------------------------------------------

    // Mean of x(t) over the rows that are not absent.
    template <class F> __device__ float mean_of_rows(F x) const {
        float sum = 0;
        int   n   = 0;
        for (int t = 0; t < T(); ++t) {
            if (source[t] != slot_absent) {
                sum += x(t);
                ++n;
            }
        }
        return n > 0 ? sum / (float) n : sum;
    }

    __device__ void store_mean(int c, float mean) {
        const uint16_t half                                      = to_half(in_half_range(mean));
        reinterpret_cast<uint16_t *>(tile + layout.part.mean)[c] = half;
        s.mean[c]                                                = from_half(half);
    }

    // X becomes X - M. As long as a tile keeps a row it keeps its means, and kept rows come without them.
    __device__ void take_mean(bool has_kept) {
        for_each(d(), [&](int c) {
            store_mean(c, has_kept ? s.mean[c] : mean_of_rows([&](int t) { return w.X[t * d() + c]; }));
            for (int t = 0; t < T(); ++t) {
                if (source[t] != slot_packed) {
                    w.X[t * d() + c] = in_half_range(w.X[t * d() + c] - s.mean[c]);
                }
            }
        });
        __syncthreads();
    }

    // What is left of X - M on average when D and L are taken away goes to M, too.
    __device__ void add_to_mean() {
        __syncthreads();
        for_each(d(), [&](int c) {
            store_mean(c, s.mean[c] + mean_of_rows([&](int t) {
                              const float coded = quantized_at(layout, tile, t, c);
                              return w.X[t * d() + c] - (layout.config.rank > 0 ? coded + low_rank_at(layout, tile, t, c) : coded);
                          }));
        });
        __syncthreads();
    }

    // A group that holds a kept row does not narrow. Its old range waits in scale and zero, which quantize() looks at before it fills them.
    __device__ void hold_ranges() {
        const bool is_k = layout.side == GEAR_SIDE_K;
        for_each(layout.part.n_group, [&](int group) {
            const int first = is_k ? group / d() * layout.group : group % T(), n = is_k ? layout.group : 1;
            bool      holds = false;
            for (int t = first; t < first + n; ++t) {
                holds |= source[t] == slot_packed;
            }
            const group_range range = range_at(layout, tile, group);
            w.zero[group]           = holds ? range.zero : infinite;
            w.scale[group]          = holds ? range.zero + range.scale * (float) layout.levels : -infinite;
        });
        __syncthreads();
    }

    // S: of each vector the n_low lowest entries, then the n_high highest, each by its rank among those present; equal ones by index.
    __device__ void filter_outliers() {
        const gear_tile_layout & part   = layout.part;
        const bool               is_k   = layout.side == GEAR_SIDE_K;
        const int                length = is_k ? T() : d(), step = is_k ? d() : 1;
        for_each_warp(part.n_vector, [&](int vector, int lane) {
            float * entry     = w.X + (is_k ? vector : vector * d());
            int     n_present = 0, unwritten = length;
            for (int i = 0; i < length; ++i) {
                const bool absent = is_absent(entry[i * step]);
                n_present += !absent;
                unwritten = absent && i < unwritten ? i : unwritten;
            }
            unwritten        = is_k && unwritten < length ? unwritten : 0; // V: a token is written whole or not at all
            const int  n_low = least(part.n_outlier / 2, (n_present + 1) / 2), n_high = least(part.n_outlier / 2, n_present / 2);
            const int  first = vector * part.n_outlier;
            uint16_t * value = reinterpret_cast<uint16_t *>(tile + part.outlier_value) + vector * part.n_outlier;
            for (int slot = n_low + n_high + lane; slot < part.n_outlier; slot += warp_threads) {
                store_outlier_index(layout, first + slot, unwritten, tile);
                value[slot] = 0;
            }
            for (int i = lane; i < length; i += warp_threads) {
                const float x = entry[i * step];
                if (is_absent(x)) {
                    continue;
                }
                int rank = 0;
                for (int j = 0; j < length; ++j) {
                    const float y = entry[j * step];
                    rank += y < x || (y == x && j < i);
                }
                const int slot = rank < n_low ? rank : n_present - 1 - rank < n_high ? n_low + n_present - 1 - rank : -1;
                if (slot >= 0) {
                    store_outlier_index(layout, first + slot, i, tile);
                    value[slot] = to_half(x);
                }
            }
            __syncwarp(); // every rank was taken among all
            for (int slot = lane; slot < n_low + n_high; slot += warp_threads) {
                entry[outlier_index_at(layout, tile, first + slot) * step] = nanf("");
            }
        });
        __syncthreads();
    }

    // D
    __device__ void quantize(const float * Y, bool is_held) {
        extremes(Y, is_held);
        code_ranges(is_held);
        encode(Y);
    }

    __device__ void extremes(const float * Y, bool is_held) {
        const bool is_k = layout.side == GEAR_SIDE_K;
        for_each(layout.part.n_group, [&](int group) {
            const int first_t = is_k ? group / d() * layout.group : group % T(), n_t = is_k ? layout.group : 1;
            const int first_c = is_k ? group % d() : group / T() * layout.group, last_c = is_k ? first_c + 1 : least(first_c + layout.group, d());
            float     low = infinite, high = -infinite;
            for (int t = first_t; t < first_t + n_t; ++t) {
                for (int c = first_c; c < last_c; ++c) {
                    const float y = Y[t * d() + c];
                    low           = y < low ? y : low;
                    high          = y > high ? y : high;
                }
            }
            if (layout.config.clip < 1) {
                clip_range(layout.config.clip, low, high);
            }
            w.lowest[group]  = is_held ? fminf(low, w.zero[group]) : low;
            w.highest[group] = is_held ? fmaxf(high, w.scale[group]) : high;
            if (is_held && is_k && w.zero[group] <= w.scale[group] && is_cut(Y, group)) {
                w.lowest[group]  = w.zero[group];
                w.highest[group] = w.scale[group];
            }
        });
        __syncthreads();
    }

    // Whether kept rows keep their range and what new ones have beyond it is cut off, or the range widens. The old one waits in zero and scale.
    __device__ bool is_cut(const float * Y, int group) const {
        const int    first = group / d() * layout.group, c = group % d();
        range_choice choice = make_range_choice(w.zero[group], w.scale[group], w.lowest[group], w.highest[group], layout.levels);
        for (int t = first; t < first + layout.group; ++t) {
            const float y = Y[t * d() + c];
            if (!is_absent(y)) {
                choice.add(y, source[t] == slot_packed);
            }
        }
        return choice.is_cut();
    }

    __device__ void code_ranges(bool is_held) {
        const gear_tile_layout & part   = layout.part;
        uint8_t *                scales = tile + part.scale, *zeros = tile + part.zero;
        if (layout.config.scale_bits == 16) {
            for_each(part.n_group, [&](int group) { code_range_16(w, group, layout.levels, scales, zeros); });
            __syncthreads();
            return;
        }
        const bool is_k = layout.side == GEAR_SIDE_K;
        for_each_warp(part.n_set, [&](int set, int lane) {
            const int n = part.n_group / part.n_set, first = is_k ? set : set * T(), step = is_k ? part.n_set : 1;
            float     low = is_held ? s.old_lo[set] : infinite, high = is_held ? s.old_hi[set] : -infinite;
            for (int i = lane; i < n; i += warp_threads) {
                low  = fminf(low, w.lowest[first + i * step]);
                high = fmaxf(high, w.highest[first + i * step]);
            }
            low  = warp_min(low);
            high = warp_max(high);
            if (lane == 0) {
                const set_range range                             = make_set_range(low, high, layout.levels);
                s.lowest[set]                                     = low;
                s.highest[set]                                    = high;
                reinterpret_cast<uint16_t *>(tile + part.lo)[set] = to_half(range.lo);
                reinterpret_cast<uint16_t *>(tile + part.hi)[set] = to_half(range.hi);
            }
        });
        __syncthreads();
        for_each(part.n_group, [&](int group) {
            const int  set       = is_k ? group % part.n_set : group / T();
            const bool as_it_was = is_held && w.lowest[group] == w.zero[group] && w.highest[group] == w.scale[group];
            code_range_8(make_set_range(s.lowest[set], s.highest[set], layout.levels), w, group, layout.levels, scales, zeros, as_it_was);
        });
        __syncthreads();
    }

    __device__ int code_for(int group, float y) const {
        if (is_absent(y)) {
            return 0;
        }
        if (y <= w.lowest[group]) {
            return (int) w.first[group];
        }
        if (y >= w.highest[group]) {
            return (int) w.last[group];
        }
        return nearest_code(y, w.zero[group], inverse_of(w.scale[group]), layout.levels);
    }

    // A thread writes a word: 4 depths of 2 * per_line lanes and quads.
    __device__ void encode(const float * Y) {
        const bool is_k   = layout.side == GEAR_SIDE_K;
        const int  n_lane = real_lanes(layout);
        for (int i = 0; i < layout.n_plane; ++i) {
            const plane_info & plane  = layout.plane[i];
            const int          n_line = layout.part.n_depth / 4 / plane.per_line; // of a lane block
            const uint32_t     field  = (1u << plane.width) - 1;
            uint32_t *         words  = reinterpret_cast<uint32_t *>(tile + plane.offset);
            for_each(layout.part.n_lane / 32 * n_line * 16, [&](int i_word) {
                const int lane0 = i_word / 16 / n_line * 32 + i_word % 16, quad0 = i_word / 16 % n_line * plane.per_line;
                uint32_t  word = 0;
                for (int sub = 0; sub < plane.per_line; ++sub) {
                    for (int half = 0; half < 2; ++half) {
                        const int lane = lane0 + 16 * half, shift = plane.width * (2 * sub + half);
                        for (int j = 0; j < 4 && lane < n_lane; ++j) {
                            const int depth = 4 * (quad0 + sub) + j, t = is_k ? lane : depth, c = is_k ? depth : lane;
                            const int code = code_for(group_of(layout, t, c), Y[t * d() + c]);
                            word |= ((uint32_t) code >> plane.position & field) << (8 * j + shift);
                        }
                    }
                }
                words[i_word] = word;
            });
        }
        __syncthreads();
    }

    // -----------------------------------------------------------------------------------------------------------------------------------------
    // L
    // -----------------------------------------------------------------------------------------------------------------------------------------

    __device__ float difference(const float * Y, int i) const {
        const int   t = i / d(), c = i % d(), group = group_of(layout, t, c);
        const float D = w.zero[group] + w.scale[group] * (float) code_at(layout, tile, t, c);
        const float x = Y[i] - D;
        return x == x ? x : 0.0f;
    }

    __device__ void add_low_rank() {
        float error_without = 0, error_with = 0;
        for (int round = 0; round < layout.config.rounds; ++round) {
            if (round > 0) {
                quantize(w.Y, false);
            }
            float without = 0;
            for_each(T() * d(), [&](int i) { // R = X - D - S
                const float x = difference(w.X, i);
                w.Y[i]        = x;
                without += x * x;
            });
            __syncthreads();
            error_without = round == 0 ? block_sum(without) : error_without;
            power_iteration(w.Y);
            store_factors();
            float with = 0;
            for_each(T() * d(), [&](int i) { // Y = X - L
                w.Y[i]        = in_half_range(w.X[i] - low_rank_at(layout, tile, i / d(), i % d()));
                const float x = difference(w.Y, i);
                with += x * x;
            });
            __syncthreads();
            error_with = block_sum(with);
        }
        if (!(error_with < error_without)) {
            for_each(layout.config.rank * T(), [&](int i) { s.A[i] = 0; });
            for_each(layout.config.rank * d(), [&](int i) { s.B[i] = 0; });
            __syncthreads();
            store_factors();
            quantize(w.X, false);
        }
    }
};

__global__ void __launch_bounds__(pack_threads) pack_kernel(const __grid_constant__ pack_arguments args) {
    const tile_layout & layout = args.side.layout;
    const int64_t       stride = (int64_t) args.side.n_head * layout.d_head;
    for (int64_t job = blockIdx.x; job < (int64_t) args.n_job * args.side.n_head; job += gridDim.x) {
        const int      head = (int) (job % args.side.n_head), index = (int) (job / args.side.n_head);
        const pack_job which = args.jobs[index];
        packer p = { { { layout,
                         args.side.pool + (int64_t) which.stream * args.side.n_row * stride + (int64_t) head * layout.d_head,
                         (int) stride,
                         args.source + (int64_t) index * layout.n_token,
                         args.side.tiles + (((int64_t) which.stream * args.side.n_tile + which.tile) * args.side.n_head + head) * layout.part.bytes,
                         is_weighted(layout) ? args.side.basis + (int64_t) head * (layout.d_head / 2) : nullptr,
                         args.seed,
                         {},
                         {} } } };
        lay_out(layout, reinterpret_cast<float *>(args.scratch) + blockIdx.x * pack_scratch_floats(layout), p.w);
        lay_out(layout, p.s);
        p.pack();
        __syncthreads();
    }
}

} // namespace gear::cuda
