// attend.h - attention over packed tiles and exact rows, as attention/attention_scalar.cpp says it, in two kernels and a merge:
//
//     decode    few queries. A block takes 8 rows (query x query head of one KV head) through a range of tiles: the codes are read once for all of them
//     and go
//               straight into tensor-core products (tile_device.h has the lane mapping). Ranges are merged by merge_kernel.
//     prefill   many queries. A block takes 128 rows (64 for heads of more than 128 channels) through all tiles, a strip of cells at a time: the strip is
//               unpacked into f16 in shared memory, where all rows multiply with it. There is no f16 copy of the cache.
//
// The block's threads read the table of places, so that the host need not know what is packed when it launches; a captured graph stays valid.
#pragma once

#include "cuda/arguments.h"
#include "cuda/pack.h"
#include "cuda/tile_device.h"

namespace gear::cuda {

constexpr int decode_threads = 128;
constexpr int decode_rows    = 8;
constexpr int merge_threads  = 128;

// ---------------------------------------------------------------------------------------------------------------------------------------------
// What both kernels need
// ---------------------------------------------------------------------------------------------------------------------------------------------

constexpr float log2_e = 1.4426950408889634f;

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

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Decode
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Scales and zeros of one tile in shared memory.
struct tile_ranges {
    uint8_t * scale; // as stored
    uint8_t * zero;
    float *   lo;    // [n_set]
    float *   width; // [n_set] hi - lo
    float *   mean;  // [d] M, with `center`
};

// Shared memory of a block of decode, in floats but for the last parts.
struct decode_shared {
    float *     q;         // [rows, q_stride] times scale, as packed tiles want it
    float *     q_exact;   // the same as exact rows want it
    float *     p;         // [rows, p_stride] scores, then p
    float *     out;       // [rows, out_stride] from packed tiles, in their space
    float *     out_exact; // from exact rows
    float *     max;       // [rows]
    float *     sum;       // [rows]
    float *     factor;    // [rows] by which the outputs so far shrink
    float *     shared_k;  // [rows, rank] q.b
    float *     shared_v;  // [rows, rank] p.a
    tile_ranges ranges_k, ranges_v;
    int32_t *   place_k; // [T]
    int32_t *   place_v; // [T]
    int         q_stride, p_stride, out_stride, bytes;
};

__host__ __device__ inline void lay_out(const attend_arguments & args, unsigned char * memory, decode_shared & s) {
    const tile_layout &k = args.k.layout, &v = args.v.layout;
    const int          T    = k.n_token;
    int                used = 0;
    const auto         take = [&](int bytes) {
        unsigned char * part = memory + used;
        used += padded_to(bytes, 16);
        return part;
    };
    const auto floats = [&](int n) { return reinterpret_cast<float *>(take(4 * n)); };
    const auto ranges = [&](const device_side & side, tile_ranges & r) {
        const gear_tile_layout & part = side.layout.part;
        const int                n    = side.has_tiles ? part.n_group * side.layout.config.scale_bits / 8 : 0;
        r.scale                       = take(n);
        r.zero                        = take(n);
        r.lo                          = floats(side.has_tiles ? part.n_set : 0);
        r.width                       = floats(side.has_tiles ? part.n_set : 0);
        r.mean                        = floats(side.has_tiles && side.layout.config.center ? side.layout.d_head : 0);
    };
    s.q_stride   = padded_to(k.d_head, 32) + 16; // so that 4 threads on each of two neighbouring rows touch 32 banks
    s.p_stride   = T + 16;
    s.out_stride = padded_to(v.d_head, 32);
    s.q          = floats(decode_rows * s.q_stride);
    s.q_exact    = rotates(args.k) ? floats(decode_rows * s.q_stride) : s.q;
    s.p          = floats(decode_rows * s.p_stride);
    s.out        = floats(decode_rows * s.out_stride);
    s.out_exact  = rotates(args.v) ? floats(decode_rows * s.out_stride) : s.out;
    s.max        = floats(decode_rows);
    s.sum        = floats(decode_rows);
    s.factor     = floats(decode_rows);
    s.shared_k   = floats(decode_rows * max_rank);
    s.shared_v   = floats(decode_rows * max_rank);
    ranges(args.k, s.ranges_k);
    ranges(args.v, s.ranges_v);
    s.place_k = reinterpret_cast<int32_t *>(take(4 * T));
    s.place_v = reinterpret_cast<int32_t *>(take(4 * T));
    s.bytes   = used;
}

__device__ inline void load_ranges(const tile_layout & layout, const uint8_t * tile, const tile_ranges & r) {
    const gear_tile_layout & part  = layout.part;
    const int                words = part.n_group * layout.config.scale_bits / 8 / 4; // n_group is a multiple of 16
    for_each(words, [&](int i) {
        reinterpret_cast<uint32_t *>(r.scale)[i] = reinterpret_cast<const uint32_t *>(tile + part.scale)[i];
        reinterpret_cast<uint32_t *>(r.zero)[i]  = reinterpret_cast<const uint32_t *>(tile + part.zero)[i];
    });
    for_each(layout.config.center ? layout.d_head : 0, [&](int c) { r.mean[c] = mean_at(layout, tile, c); });
    if (layout.config.scale_bits == 8) {
        for_each(part.n_set, [&](int set) {
            const float lo = from_half(half_at(tile + part.lo, set));
            r.width[set]   = from_half(half_at(tile + part.hi, set)) - lo;
            r.lo[set]      = layout.side == GEAR_SIDE_K ? lo + mean_at(layout, tile, set) : lo; // K: a set is a channel, and M part of its zero
        });
    }
}

// Scales and zeros of 4 neighbouring depths of one group of lanes. first: index of the first one's group; its set for scale_bits 8.
struct quad_ranges {
    quad_values scale, zero;
};

__device__ inline quad_ranges ranges_of(const tile_layout & layout, const tile_ranges & r, int first, int set) {
    quad_ranges values;
    if (layout.config.scale_bits == 16) {
        for (int j = 0; j < 4; ++j) {
            values.scale.x[j] = from_half(half_at(r.scale, first + j));
            values.zero.x[j]  = from_half(half_at(r.zero, first + j));
            if (layout.side == GEAR_SIDE_K && layout.config.center) {
                values.zero.x[j] += r.mean[set + j];
            }
        }
        return values;
    }
    const uint32_t s = *reinterpret_cast<const uint32_t *>(r.scale + first), z = *reinterpret_cast<const uint32_t *>(r.zero + first);
    const float    per_scale = 1.0f / (float) (255 * layout.levels), per_zero = 1.0f / 255.0f;
    const int      step = layout.side == GEAR_SIDE_K; // K: a set for each channel; V: one for all tokens
    for (int j = 0; j < 4; ++j) {
        const float width = r.width[set + step * j];
        values.scale.x[j] = width * ((float) (s >> 8 * j & 255) * per_scale);
        values.zero.x[j]  = fmaf(width, (float) (z >> 8 * j & 255) * per_zero, r.lo[set + step * j]);
    }
    return values;
}

// Of the thread's row x (the same on all four threads that have the row): x.zero, and the sum of x.
struct row_sums {
    float zeros, all;
};

// c[half] += codes . (x scale) for 32 lanes and 8 rows x
template <int bits>
__device__ inline row_sums multiply_lanes(const tile_layout & layout, const uint8_t * tile, const tile_ranges & r, int lane_block, const float * x,
                                          int stride, float (&c)[2][4]) {
    const int  lane = (int) threadIdx.x % warp_threads, g = lane / 4, tig = lane % 4;
    const int  n_sub = subs_of(bits ? bits : layout.config.bits), n_quad = layout.part.n_depth / 4;
    const int  lane_group = 32 * lane_block / layout.group;
    const bool is_k       = layout.side == GEAR_SIDE_K;
    row_sums   sums       = { 0, 0 };
    for (int line = 0; line * n_sub < n_quad; line += 4) {
        lane_codes codes;
        load_codes<bits>(layout, tile, lane_block, line + tig, codes);
        GEAR_UNROLL
        for (int sub = 0; sub < 4; ++sub) {
            if (sub >= n_sub) {
                continue;
            }
            const int   quad = (line + tig) * n_sub + sub;
            quad_values xs   = {};
            if (quad < n_quad) {
                const quad_values values = *reinterpret_cast<const quad_values *>(x + g * stride + 4 * quad);
                const quad_ranges range  = ranges_of(layout, r, lane_group * layout.part.n_depth + 4 * quad, is_k ? 4 * quad : lane_group);
                for (int j = 0; j < 4; ++j) {
                    xs.x[j]    = values.x[j] * range.scale.x[j];
                    sums.zeros = fmaf(values.x[j], range.zero.x[j], sums.zeros);
                    sums.all += values.x[j];
                }
            }
            multiply_quad(codes, sub, xs, c);
        }
    }
    for (int step = 1; step < 4; step *= 2) {
        sums.zeros += __shfl_xor_sync(all_threads, sums.zeros, step);
        sums.all += __shfl_xor_sync(all_threads, sums.all, step);
    }
    return sums;
}

// Of a value that each row's four threads hold: those of the two columns that the thread has in a result.
__device__ inline void of_columns(float of_row, float (&of_column)[2]) {
    const int tig = (int) threadIdx.x % 4;
    for (int i = 0; i < 2; ++i) {
        of_column[i] = __shfl_sync(all_threads, of_row, 4 * (2 * tig + i));
    }
}

// One block of decode.
template <int bits_k, int bits_v> struct decoder {
    const attend_arguments & args;
    decode_shared            s;
    int                      stream, head, first_row, n_rows, split; // stream of the op; KV head
    float                    out[2][2][4];                           // the warp's lane blocks of channels

    __device__ int           T() const { return args.k.layout.n_token; }
    __device__ int           cache_stream() const { return args.params.stream0 + stream; }
    __device__ row_at        row(int i) const { return row_of(args, head, first_row + i); }
    __device__ static int    warp() { return (int) threadIdx.x / warp_threads; }
    __device__ static int    lane() { return (int) threadIdx.x % warp_threads; }
    __device__ constexpr int n_warp() const { return decode_threads / warp_threads; }

    __device__ void run() {
        load_queries();
        const int last = least(args.n_tile, (split + 1) * args.tiles_of_split);
        for (int tile = split * args.tiles_of_split; tile < last; ++tile) {
            attend_tile(tile);
        }
        finish();
    }

    __device__ void load_queries() {
        const gear_attention_params & params = args.params;
        const float                   scale  = params.softcap != 0 ? params.scale / params.softcap : params.scale;
        for_each(decode_rows * s.q_stride, [&](int i) {
            const int   r = i / s.q_stride, c = i % s.q_stride;
            const float x = r < n_rows && c < args.k.layout.d_head ? query_row(args, stream, row(r))[c] * scale : 0.0f;
            s.q[i]        = x;
            s.q_exact[i]  = x;
        });
        for_each(decode_rows * s.out_stride, [&](int i) { s.out[i] = s.out_exact[i] = 0; });
        for_each(decode_rows, [&](int r) {
            s.max[r] = -infinite;
            s.sum[r] = 0;
        });
        GEAR_UNROLL
        for (int i = 0; i < 16; ++i) {
            out[i / 8][i / 4 % 2][i % 4] = 0;
        }
        __syncthreads();
        if (rotates(args.k)) {
            hadamard_rows(s.q, decode_rows, args.k.layout.d_head, s.q_stride);
        }
    }

    __device__ void attend_tile(int tile) {
        const int n_cell = least(T(), args.params.n_kv - tile * T());
        if (!is_visible(args, stream, head, first_row, n_rows, tile * T(), n_cell)) {
            return;
        }
        const int n_cell_k = least(T(), args.k.n_cell - tile * T()); // of the table: cells beyond n_kv count as hidden
        int       found    = 0;
        for_each(T(), [&](int t) {
            const int64_t cell = (int64_t) cache_stream() * args.k.n_cell + tile * T() + t;
            s.place_k[t]       = t < n_cell_k ? args.k.place[cell] : place_absent;
            s.place_v[t]       = t < n_cell_k ? args.v.place[cell] : place_absent;
            found |= (s.place_k[t] == place_packed) | (s.place_k[t] != place_packed) << 1;
            found |= (s.place_v[t] == place_packed) << 2 | (s.place_v[t] != place_packed) << 3;
        });
        const bool      k_packed = __syncthreads_or(found & 1) != 0, k_exact = __syncthreads_or(found & 2) != 0;
        const bool      v_packed = __syncthreads_or(found & 4) != 0, v_exact = __syncthreads_or(found & 8) != 0;
        const uint8_t * tile_k = k_packed ? tile_at(args.k, cache_stream(), tile, head) : nullptr;
        const uint8_t * tile_v = v_packed ? tile_at(args.v, cache_stream(), tile, head) : nullptr;
        if (k_packed) {
            load_ranges(args.k.layout, tile_k, s.ranges_k);
        }
        if (v_packed) {
            load_ranges(args.v.layout, tile_v, s.ranges_v);
        }
        __syncthreads();
        if (k_packed) {
            score_packed(tile_k);
        }
        if (k_exact) {
            score_exact();
        }
        __syncthreads();
        soften(tile, n_cell);
        __syncthreads();
        shrink();
        if (v_exact) {
            gather_exact();
        }
        if (v_packed) {
            gather_packed(tile_v);
        }
        __syncthreads();
    }

    // p[r][t] = q_r . K_t for the whole tile as it is packed
    __device__ void score_packed(const uint8_t * tile) {
        const tile_layout & layout = args.k.layout;
        for (int lane_block = warp(); lane_block < T() / 32; lane_block += n_warp()) {
            float c[2][4] = {};
            float zero[2];
            of_columns(multiply_lanes<bits_k>(layout, tile, s.ranges_k, lane_block, s.q, s.q_stride, c).zeros, zero);
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) {
                    const int token = 32 * lane_block + 16 * half + lane() / 4 * 2 + i / 2, r = lane() % 4 * 2 + i % 2;
                    s.p[r * s.p_stride + token] = c[half][i] + zero[i % 2];
                }
            }
        }
        const int rank = layout.config.rank, n_outlier = layout.part.n_outlier;
        if (rank > 0) {
            for_each_warp(decode_rows * rank, [&](int i, int lane) { // q.b
                const int r = i / rank, k = i % rank;
                float     dot = 0;
                for (int c = lane; c < layout.d_head; c += warp_threads) {
                    dot = fmaf(s.q[r * s.q_stride + c], b_at(layout, tile, k, c), dot);
                }
                dot = warp_sum(dot);
                if (lane == 0) {
                    s.shared_k[r * max_rank + k] = dot;
                }
            });
            __syncthreads();
            for_each(decode_rows * T(), [&](int i) {
                const int r = i / T(), t = i % T();
                float     sum = 0;
                for (int k = 0; k < rank; ++k) {
                    sum = fmaf(s.shared_k[r * max_rank + k], a_at(layout, tile, k, t), sum);
                }
                s.p[r * s.p_stride + t] += sum;
            });
        }
        __syncthreads();
        if (n_outlier > 0) {
            for_each(layout.part.n_vector * n_outlier, [&](int i) {
                const int   c = i / n_outlier, t = tile[layout.part.outlier_index + i];
                const float excess = outlier_excess(layout, tile, i, t, c);
                for (int r = 0; r < n_rows; ++r) {
                    atomicAdd(&s.p[r * s.p_stride + t], s.q[r * s.q_stride + c] * excess);
                }
            });
            __syncthreads();
        }
    }

    // What an outlier's value adds to D + L at its place, where the code is 0.
    __device__ float outlier_excess(const tile_layout & layout, const uint8_t * tile, int i, int t, int c) const {
        return from_half(half_at(tile + layout.part.outlier_value, i)) - range_at(layout, tile, group_index(layout, t, c)).zero -
               low_rank_at(layout, tile, t, c);
    }

    // Scores of exact rows, and 0 for cells never written.
    __device__ void score_exact() {
        const int d = args.k.layout.d_head;
        for_each_warp(T(), [&](int t, int lane) {
            const int place = s.place_k[t];
            if (place == place_packed) {
                return;
            }
            float dot[decode_rows] = {};
            if (place >= 0) {
                const uint32_t * row = reinterpret_cast<const uint32_t *>(exact_row_at(args.k, cache_stream(), place, head));
                for (int c = lane; c < d / 2; c += warp_threads) {
                    const uint32_t pair = row[c];
                    const float    low = from_half((uint16_t) pair), high = from_half((uint16_t) (pair >> 16));
                    for (int r = 0; r < decode_rows; ++r) {
                        const float * q = s.q_exact + r * s.q_stride + 2 * c;
                        dot[r]          = fmaf(q[0], low, fmaf(q[1], high, dot[r]));
                    }
                }
            }
            // 8 sums over 32 lanes: each step halves the rows that a lane looks after, then the lanes.
            int first = 0;
            for (int n = decode_rows / 2, step = 16; n > 0; n /= 2, step /= 2) {
                const bool upper = lane & step;
                for (int r = 0; r < decode_rows / 2; ++r) {
                    if (r < n) {
                        const float sent = upper ? dot[r] : dot[r + n], kept = upper ? dot[r + n] : dot[r];
                        dot[r] = kept + __shfl_xor_sync(all_threads, sent, step);
                    }
                }
                first += upper ? n : 0;
            }
            dot[0] += __shfl_xor_sync(all_threads, dot[0], 2);
            dot[0] += __shfl_xor_sync(all_threads, dot[0], 1);
            if (lane % 4 == 0) {
                s.p[first * s.p_stride + t] = dot[0];
            }
        });
    }

    // Scores become p, a warp a row.
    __device__ void soften(int tile, int n_cell) {
        const gear_attention_params & params = args.params;
        for_each_warp(decode_rows, [&](int r, int lane) {
            float * score = s.p + r * s.p_stride;
            float   high  = -infinite;
            if (r < n_rows) {
                const row_at     at    = row(r);
                const uint16_t * mask  = params.mask ? mask_row(args, stream, at) + tile * T() : nullptr;
                const float      slope = slope_at(params, at.head);
                for (int t = lane; t < T(); t += warp_threads) {
                    float x  = params.softcap != 0 ? params.softcap * tanhf(score[t]) : score[t];
                    x        = t >= n_cell ? -infinite : mask ? x + slope * from_half(mask[t]) : x;
                    high     = fmaxf(high, x);
                    score[t] = x;
                }
            }
            high              = warp_max(high);
            const float max   = fmaxf(high, s.max[r]);
            float       sum   = 0;
            const bool  empty = high == -infinite; // all hidden: exp(-inf - -inf) would be NaN
            for (int t = lane; t < T(); t += warp_threads) {
                const float p = empty ? 0.0f : exp_fast(score[t] - max);
                score[t]      = p;
                sum += p;
            }
            sum = warp_sum(sum);
            __syncwarp();
            if (lane == 0) {
                const float factor = empty ? 1.0f : s.max[r] == -infinite ? 0.0f : exp_fast(s.max[r] - max);
                s.factor[r]        = factor;
                s.sum[r]           = s.sum[r] * factor + sum;
                s.max[r]           = max;
            }
        });
    }

    __device__ void shrink() {
        GEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float factor = s.factor[lane() % 4 * 2 + i % 2];
            GEAR_UNROLL
            for (int block = 0; block < 4; ++block) {
                out[block / 2][block % 2][i] *= factor;
            }
        }
        for_each(decode_rows * s.out_stride, [&](int i) {
            const float factor = s.factor[i / s.out_stride];
            s.out[i] *= factor;
            if (s.out_exact != s.out) {
                s.out_exact[i] *= factor;
            }
        });
        __syncthreads();
    }

    // out_exact += p.V over exact rows; then p of what is not packed becomes 0.
    __device__ void gather_exact() {
        const int d = args.v.layout.d_head, n_pair = d / 2, n_team = decode_threads / n_pair, team = (int) threadIdx.x / n_pair;
        float     sum[decode_rows][2] = {};
        const int c                   = (int) threadIdx.x % n_pair;
        for (int t = team; team < n_team && t < T(); t += n_team) {
            const int place = s.place_v[t];
            if (place < 0) {
                continue;
            }
            const uint32_t pair = reinterpret_cast<const uint32_t *>(exact_row_at(args.v, cache_stream(), place, head))[c];
            const float    low = from_half((uint16_t) pair), high = from_half((uint16_t) (pair >> 16));
            for (int r = 0; r < decode_rows; ++r) {
                const float p = s.p[r * s.p_stride + t];
                sum[r][0]     = fmaf(p, low, sum[r][0]);
                sum[r][1]     = fmaf(p, high, sum[r][1]);
            }
        }
        if (team < n_team) {
            for (int r = 0; r < n_rows; ++r) {
                atomicAdd(&s.out_exact[r * s.out_stride + 2 * c], sum[r][0]);
                atomicAdd(&s.out_exact[r * s.out_stride + 2 * c + 1], sum[r][1]);
            }
        }
        __syncthreads();
        for_each(decode_rows * T(), [&](int i) {
            if (s.place_v[i % T()] != place_packed) {
                s.p[i / T() * s.p_stride + i % T()] = 0;
            }
        });
        __syncthreads();
    }

    // out += p.V over the packed tile
    __device__ void gather_packed(const uint8_t * tile) {
        const tile_layout & layout = args.v.layout;
        GEAR_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int lane_block = warp() + i * n_warp();
            if (32 * lane_block >= layout.part.n_lane) {
                continue;
            }
            const row_sums sums = multiply_lanes<bits_v>(layout, tile, s.ranges_v, lane_block, s.p, s.p_stride, out[i]);
            float          zero[2], all[2];
            of_columns(sums.zeros, zero);
            of_columns(sums.all, all);
            GEAR_UNROLL
            for (int j = 0; j < 8; ++j) {
                const int c = 32 * lane_block + 16 * (j / 4) + lane() / 4 * 2 + j % 4 / 2;
                out[i][j / 4][j % 4] += zero[j % 2];
                if (layout.config.center && c < layout.d_head) {
                    out[i][j / 4][j % 4] += all[j % 2] * s.ranges_v.mean[c];
                }
            }
        }
        const int rank = layout.config.rank, n_outlier = layout.part.n_outlier;
        if (rank > 0) {
            for_each_warp(decode_rows * rank, [&](int i, int lane) { // p.a
                const int r = i / rank, k = i % rank;
                float     dot = 0;
                for (int t = lane; t < T(); t += warp_threads) {
                    dot = fmaf(s.p[r * s.p_stride + t], a_at(layout, tile, k, t), dot);
                }
                dot = warp_sum(dot);
                if (lane == 0) {
                    s.shared_v[r * max_rank + k] = dot;
                }
            });
            __syncthreads();
            for_each(decode_rows * layout.d_head, [&](int i) {
                const int r = i / layout.d_head, c = i % layout.d_head;
                float     sum = 0;
                for (int k = 0; k < rank; ++k) {
                    sum = fmaf(s.shared_v[r * max_rank + k], b_at(layout, tile, k, c), sum);
                }
                s.out[r * s.out_stride + c] += sum;
            });
        }
        if (n_outlier > 0) {
            __syncthreads();
            for_each(layout.part.n_vector * n_outlier, [&](int i) {
                const int t = i / n_outlier, c = tile[layout.part.outlier_index + i];
                if (s.place_v[t] == place_packed) {
                    const float excess = outlier_excess(layout, tile, i, t, c);
                    for (int r = 0; r < n_rows; ++r) {
                        atomicAdd(&s.out[r * s.out_stride + c], s.p[r * s.p_stride + t] * excess);
                    }
                }
            });
        }
    }

    // The range's max, sum and output.
    __device__ void finish() {
        const int d = args.v.layout.d_head;
        GEAR_UNROLL
        for (int i = 0; i < 2; ++i) {
            GEAR_UNROLL
            for (int j = 0; j < 8; ++j) {
                const int c = 32 * (warp() + i * n_warp()) + 16 * (j / 4) + lane() / 4 * 2 + j % 4 / 2, r = lane() % 4 * 2 + j % 2;
                if (c < d) {
                    s.out[r * s.out_stride + c] += out[i][j / 4][j % 4];
                }
            }
        }
        __syncthreads();
        if (rotates(args.v)) {
            hadamard_rows(s.out, decode_rows, d, s.out_stride);
        }
        for_each(n_rows * d, [&](int i) {
            const int r = i / d, c = i % d, at = r * s.out_stride + c;
            partial(r)[2 + c] = s.out[at] + (s.out_exact != s.out ? s.out_exact[at] : 0.0f);
        });
        for_each(n_rows, [&](int r) {
            partial(r)[0] = s.max[r];
            partial(r)[1] = s.sum[r];
        });
    }

    __device__ float * partial(int r) const {
        const row_at at = row(r);
        return args.partial +
               ((((int64_t) stream * args.params.n_head + at.head) * args.params.n_query + at.query) * args.n_split + split) * args.out_stride;
    }
};

// Grid: ranges of tiles, KV heads x blocks of rows, streams.
template <int bits_k, int bits_v> __global__ void __launch_bounds__(decode_threads) decode_kernel(const __grid_constant__ attend_arguments args) {
    const int n_all = args.params.n_query * args.n_share, head = (int) blockIdx.y % args.k.n_head, first = (int) blockIdx.y / args.k.n_head * decode_rows;
    decoder<bits_k, bits_v> d = { args, {}, (int) blockIdx.z, head, first, least(decode_rows, n_all - first), (int) blockIdx.x, {} };
    lay_out(args, shared_memory(), d.s);
    d.run();
}

// A sink is one more score without a row. Everything hidden gives 0.
__device__ inline float with_sink(const attend_arguments & args, int head, float max, float sum, float & shrink) {
    const float sink = args.params.sinks ? args.params.sinks[head] : -infinite, high = fmaxf(max, sink);
    shrink = max == -infinite ? 0.0f : exp_fast(max - high);
    return sum * shrink + (sink == -infinite ? 0.0f : exp_fast(sink - high));
}

// Grid: queries, query heads, streams.
__global__ void __launch_bounds__(merge_threads) merge_kernel(const __grid_constant__ attend_arguments args) {
    const row_at  at     = { (int) blockIdx.x, (int) blockIdx.y };
    const int     stream = (int) blockIdx.z, d = args.v.layout.d_head;
    const float * part =
        args.partial + (((int64_t) stream * args.params.n_head + at.head) * args.params.n_query + at.query) * args.n_split * args.out_stride;
    float max = -infinite, sum = 0;
    for (int i = 0; i < args.n_split; ++i) {
        max = fmaxf(max, part[(int64_t) i * args.out_stride]);
    }
    for (int i = 0; i < args.n_split && max > -infinite; ++i) {
        const float * of = part + (int64_t) i * args.out_stride;
        sum += of[0] == -infinite ? 0.0f : of[1] * exp_fast(of[0] - max);
    }
    float       shrink;
    const float all = with_sink(args, at.head, max, sum, shrink), factor = all > 0 ? shrink / all : 0.0f;
    float *     to = output_row(args, stream, at);
    for_each(d, [&](int c) {
        float x = 0;
        for (int i = 0; i < args.n_split; ++i) {
            const float * of = part + (int64_t) i * args.out_stride;
            x += of[0] == -infinite ? 0.0f : of[2 + c] * exp_fast(of[0] - max);
        }
        to[c] = x * factor;
    });
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Prefill
// ---------------------------------------------------------------------------------------------------------------------------------------------

// max_d: the largest head size of an instance; sizes in between use the next one.
template <int max_d> struct prefill_sizes {
    static constexpr int n_warp  = max_d > 128 ? 4 : 8;
    static constexpr int threads = n_warp * warp_threads;
    static constexpr int rows    = 16 * n_warp;
    static constexpr int strip   = max_d > 128 ? 32 : 64; // cells
    static constexpr int pad     = 8;                     // halves between rows, so that 8 rows of 4 words touch 32 banks
};

// Shared memory: q [rows, d_k + pad], K of the strip [strip, d_k + pad], V of the strip turned round [d_v, strip + pad], all f16; places of its cells.
template <int max_d> struct prefill_shared {
    uint16_t * q;
    uint16_t * k;
    uint16_t * v;
    int32_t *  place_k;
    int32_t *  place_v;
    int        k_stride, v_stride, bytes;
};

template <int max_d> __host__ __device__ inline void lay_out(const attend_arguments & args, unsigned char * memory, prefill_shared<max_d> & s) {
    using sizes   = prefill_sizes<max_d>;
    const int d_k = args.k.layout.d_head, d_v = args.v.layout.d_head;
    s.k_stride        = d_k + sizes::pad;
    s.v_stride        = sizes::strip + sizes::pad;
    int        used   = 0;
    const auto halves = [&](int n) {
        uint16_t * part = reinterpret_cast<uint16_t *>(memory + used);
        used += padded_to(2 * n, 16);
        return part;
    };
    s.q       = halves(sizes::rows * s.k_stride);
    s.k       = halves(sizes::strip * s.k_stride);
    s.v       = halves(d_v * s.v_stride);
    s.place_k = reinterpret_cast<int32_t *>(halves(2 * sizes::strip));
    s.place_v = reinterpret_cast<int32_t *>(halves(2 * sizes::strip));
    s.bytes   = used;
}

// The Hadamard transform of a row of a warp: channel c is x[c / 32] of lane c % 32. The codec's steps in the codec's order.
template <int n> __device__ inline void hadamard_warp(float (&x)[n], int d, int lane) {
    const int block = d & -d;
    GEAR_UNROLL
    for (int half = 1; half < 32; half *= 2) {
        if (half < block) {
            GEAR_UNROLL
            for (int i = 0; i < n; ++i) {
                const float other = __shfl_xor_sync(all_threads, x[i], half);
                x[i]              = lane & half ? other - x[i] : x[i] + other;
            }
        }
    }
    GEAR_UNROLL
    for (int half = 1; half < n; half *= 2) {
        if (32 * half < block) {
            GEAR_UNROLL
            for (int i = 0; i < n; ++i) {
                if ((i & half) == 0 && i + half < n) {
                    const float sum = x[i] + x[i + half], difference = x[i] - x[i + half];
                    x[i]        = sum;
                    x[i + half] = difference;
                }
            }
        }
    }
    const float norm = 1.0f / sqrtf((float) block);
    GEAR_UNROLL
    for (int i = 0; i < n; ++i) {
        x[i] *= norm;
    }
}

template <int max_d> struct prefiller {
    using sizes                    = prefill_sizes<max_d>;
    static constexpr int n_channel = max_d / 32; // of a row, a lane
    static constexpr int n_out     = max_d / 8;  // products of 8 channels

    const attend_arguments & args;
    prefill_shared<max_d>    s;
    int                      stream, head, first_row, n_rows;
    float                    out[n_out][4];
    float                    max[2], sum[2]; // of rows g and g + 8

    __device__ int        cache_stream() const { return args.params.stream0 + stream; }
    __device__ static int warp() { return (int) threadIdx.x / warp_threads; }
    __device__ static int lane() { return (int) threadIdx.x % warp_threads; }
    __device__ static int g() { return lane() / 4; }
    __device__ static int tig() { return lane() % 4; }

    __device__ void run() {
        load_queries();
        GEAR_UNROLL
        for (int i = 0; i < n_out; ++i) {
            GEAR_UNROLL
            for (int j = 0; j < 4; ++j) {
                out[i][j] = 0;
            }
        }
        for (int i = 0; i < 2; ++i) {
            max[i] = -infinite;
            sum[i] = 0;
        }
        for (int first = 0; first < args.params.n_kv; first += sizes::strip) {
            const int n_cell = least(sizes::strip, args.params.n_kv - first);
            if (is_visible(args, stream, head, first_row, n_rows, first, n_cell)) {
                load_strip(first);
                attend_strip(first, n_cell);
                __syncthreads();
            }
        }
        write();
    }

    // Rotated, if packed tiles want it so: exact rows are rotated when they are loaded.
    __device__ void load_queries() {
        const gear_attention_params & params = args.params;
        const int                     d      = args.k.layout.d_head;
        const float                   scale  = params.softcap != 0 ? params.scale / params.softcap : params.scale;
        for_each_warp(sizes::rows, [&](int r, int lane) {
            float x[n_channel];
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                const int c = lane + 32 * i;
                x[i]        = r < n_rows && c < d ? query_row(args, stream, row_of(args, head, first_row + r))[c] * scale : 0.0f;
            }
            if (rotates(args.k)) {
                hadamard_warp(x, d, lane);
            }
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                if (lane + 32 * i < d) {
                    s.q[r * s.k_stride + lane + 32 * i] = to_half(x[i]);
                }
            }
        });
        __syncthreads();
    }

    // -----------------------------------------------------------------------------------------------------------------------------------------
    // A strip
    // -----------------------------------------------------------------------------------------------------------------------------------------

    __device__ uint16_t & k_at(int cell, int c) { return s.k[cell * s.k_stride + c]; }
    __device__ uint16_t & v_at(int cell, int c) { return s.v[c * s.v_stride + cell]; }

    __device__ void load_strip(int first) {
        int found = 0;
        for_each(sizes::strip, [&](int i) {
            const int64_t cell = (int64_t) cache_stream() * args.k.n_cell + first + i;
            const bool    has  = first + i < args.k.n_cell;
            s.place_k[i]       = has ? args.k.place[cell] : place_absent;
            s.place_v[i]       = has ? args.v.place[cell] : place_absent;
            found |= (s.place_k[i] == place_packed) | (s.place_v[i] == place_packed) << 1;
        });
        const bool k_packed = __syncthreads_or(found & 1) != 0, v_packed = __syncthreads_or(found & 2) != 0;
        const int  T = args.k.layout.n_token, tile = first / T, token = first % T;
        if (k_packed) {
            unpack_k(tile_at(args.k, cache_stream(), tile, head), token);
        }
        if (v_packed) {
            unpack_v(tile_at(args.v, cache_stream(), tile, head), token);
        }
        __syncthreads();
        if (k_packed && args.k.layout.part.n_outlier > 0) {
            restore_outliers(args.k.layout, tile_at(args.k, cache_stream(), tile, head), token);
        }
        if (v_packed && args.v.layout.part.n_outlier > 0) {
            restore_outliers(args.v.layout, tile_at(args.v, cache_stream(), tile, head), token);
        }
        __syncthreads();
        load_exact(args.k, s.place_k);
        load_exact(args.v, s.place_v);
        __syncthreads();
    }

    // Lanes are tokens: two lane blocks, or one, of all channels.
    __device__ void unpack_k(const uint8_t * tile, int token) {
        const tile_layout & layout = args.k.layout;
        const int           n_sub = subs_of(layout.config.bits), n_quad = layout.d_head / 4, n_step = (n_quad / n_sub + 3) / 4;
        for_each_warp(sizes::strip / 32 * n_step, [&](int i, int) {
            const int  lane_block = token / 32 + i / n_step, line = i % n_step * 4 + tig();
            lane_codes codes;
            load_codes<0>(layout, tile, lane_block, line, codes);
            GEAR_UNROLL
            for (int sub = 0; sub < 4; ++sub) {
                if (sub >= n_sub || line * n_sub >= n_quad) {
                    continue;
                }
                const int c = 4 * (line * n_sub + sub);
                for (int j = 0; j < 4; ++j) {
                    const range_device range = range_at(layout, tile, group_index(layout, 32 * lane_block, c + j));
                    for (int place = 0; place < 4; ++place) {
                        const int   t          = 32 * lane_block + 16 * (place / 2) + 2 * g() + place % 2;
                        const int   code       = codes.code[sub][place / 2][place % 2] >> 8 * j & 255;
                        const float D          = range.zero + range.scale * (float) code;
                        k_at(t - token, c + j) = to_half(in_half_range(D + low_rank_at(layout, tile, t, c + j) + mean_at(layout, tile, c + j)));
                    }
                }
            }
        });
    }

    // Depths are tokens: some quads of all channels.
    __device__ void unpack_v(const uint8_t * tile, int token) {
        const tile_layout & layout = args.v.layout;
        const int n_sub = subs_of(layout.config.bits), first_line = token / 4 / n_sub, n_line = sizes::strip / 4 / n_sub, n_step = (n_line + 3) / 4;
        for_each_warp(layout.part.n_lane / 32 * n_step, [&](int i, int) {
            const int  lane_block = i / n_step, line = i % n_step * 4 + tig();
            lane_codes codes;
            load_codes<0>(layout, tile, lane_block, first_line + line, codes);
            GEAR_UNROLL
            for (int sub = 0; sub < 4; ++sub) {
                if (sub >= n_sub || line >= n_line) {
                    continue;
                }
                for (int j = 0; j < 4; ++j) {
                    const int t = 4 * ((first_line + line) * n_sub + sub) + j;
                    for (int place = 0; place < 4; ++place) {
                        const int c = 32 * lane_block + 16 * (place / 2) + 2 * g() + place % 2;
                        if (c < layout.d_head) {
                            const range_device range = range_at(layout, tile, group_index(layout, t, c));
                            const float        D     = range.zero + range.scale * (float) (codes.code[sub][place / 2][place % 2] >> 8 * j & 255);
                            v_at(t - token, c)       = to_half(in_half_range(D + low_rank_at(layout, tile, t, c) + mean_at(layout, tile, c)));
                        }
                    }
                }
            }
        });
    }

    __device__ void restore_outliers(const tile_layout & layout, const uint8_t * tile, int token) {
        const bool is_k = layout.side == GEAR_SIDE_K;
        for_each(layout.part.n_vector * layout.part.n_outlier, [&](int i) {
            const int vector = i / layout.part.n_outlier, index = tile[layout.part.outlier_index + i];
            const int t = (is_k ? index : vector) - token, c = is_k ? vector : index;
            if (t >= 0 && t < sizes::strip) {
                (is_k ? k_at(t, c) : v_at(t, c)) = half_at(tile + layout.part.outlier_value, i);
            }
        });
    }

    // Exact rows, and zeros for cells never written; as packed ones are.
    __device__ void load_exact(const device_side & side, const int32_t * places) {
        const int  d    = side.layout.d_head;
        const bool is_k = side.layout.side == GEAR_SIDE_K;
        for_each_warp(sizes::strip, [&](int cell, int lane) {
            const int place = places[cell];
            if (place == place_packed) {
                return;
            }
            const uint16_t * row = place >= 0 ? exact_row_at(side, cache_stream(), place, head) : nullptr;
            float            x[n_channel];
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                x[i] = row && lane + 32 * i < d ? from_half(row[lane + 32 * i]) : 0.0f;
            }
            if (rotates(side)) {
                hadamard_warp(x, d, lane);
            }
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                const int c = lane + 32 * i;
                if (c < d) {
                    (is_k ? k_at(cell, c) : v_at(cell, c)) = to_half(in_half_range(x[i]));
                }
            }
        });
    }

    __device__ static uint32_t pair_at(const uint16_t * halves) { return *reinterpret_cast<const uint32_t *>(halves); }

    __device__ void attend_strip(int first, int n_cell) {
        constexpr int                 n_column = sizes::strip / 8;
        const gear_attention_params & params   = args.params;
        const int                     d_k = args.k.layout.d_head, d_v = args.v.layout.d_head;
        float                         score[n_column][4] = {};
        for (int c = 0; c < d_k; c += 16) {
            const uint16_t * q    = s.q + (16 * warp() + g()) * s.k_stride + c + 2 * tig();
            const uint32_t   a[4] = { pair_at(q), pair_at(q + 8 * s.k_stride), pair_at(q + 8), pair_at(q + 8 * s.k_stride + 8) };
            GEAR_UNROLL
            for (int n = 0; n < n_column; ++n) {
                const uint16_t * k    = s.k + (8 * n + g()) * s.k_stride + c + 2 * tig();
                const uint32_t   b[2] = { pair_at(k), pair_at(k + 8) };
                mma_f16(score[n], a, b);
            }
        }
        GEAR_UNROLL
        for (int half = 0; half < 2; ++half) { // rows g and g + 8
            const int        r     = 16 * warp() + g() + 8 * half;
            const row_at     at    = row_of(args, head, first_row + least(r, n_rows - 1));
            const uint16_t * mask  = params.mask ? mask_row(args, stream, at) + first : nullptr;
            const float      slope = slope_at(params, at.head);
            float            high  = -infinite;
            GEAR_UNROLL
            for (int n = 0; n < n_column; ++n) {
                GEAR_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int cell = 8 * n + 2 * tig() + i;
                    float &   x    = score[n][2 * half + i];
                    x              = params.softcap != 0 ? params.softcap * tanhf(x) : x;
                    x              = cell >= n_cell || r >= n_rows ? -infinite : mask ? x + slope * from_half(mask[cell]) : x;
                    high           = fmaxf(high, x);
                }
            }
            high               = fmaxf(high, __shfl_xor_sync(all_threads, high, 1));
            high               = fmaxf(high, __shfl_xor_sync(all_threads, high, 2));
            const bool  empty  = high == -infinite;
            const float top    = fmaxf(high, max[half]);
            const float factor = empty ? 1.0f : max[half] == -infinite ? 0.0f : exp_fast(max[half] - top);
            float       part   = 0;
            GEAR_UNROLL
            for (int n = 0; n < n_column; ++n) {
                GEAR_UNROLL
                for (int i = 0; i < 2; ++i) {
                    float & x = score[n][2 * half + i];
                    x         = empty ? 0.0f : exp_fast(x - top);
                    part += x;
                }
            }
            part += __shfl_xor_sync(all_threads, part, 1);
            part += __shfl_xor_sync(all_threads, part, 2);
            max[half] = top;
            sum[half] = sum[half] * factor + part;
            GEAR_UNROLL
            for (int n = 0; n < n_out; ++n) {
                out[n][2 * half] *= factor;
                out[n][2 * half + 1] *= factor;
            }
        }
        GEAR_UNROLL
        for (int step = 0; step < sizes::strip / 16; ++step) {
            uint32_t a[4]; // a result's entries lie where the next product wants them
            GEAR_UNROLL
            for (int i = 0; i < 4; ++i) {
                a[i] = half_pair(score[2 * step + i / 2][i % 2 * 2], score[2 * step + i / 2][i % 2 * 2 + 1]);
            }
            GEAR_UNROLL
            for (int n = 0; n < n_out; ++n) {
                if (8 * n < d_v) {
                    const uint16_t * v    = s.v + (8 * n + g()) * s.v_stride + 16 * step + 2 * tig();
                    const uint32_t   b[2] = { pair_at(v), pair_at(v + 8) };
                    mma_f16(out[n], a, b);
                }
            }
        }
    }

    __device__ void write() {
        const int d = args.v.layout.d_head;
        GEAR_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int r = 16 * warp() + g() + 8 * half;
            if (r >= n_rows) {
                continue;
            }
            const row_at at = row_of(args, head, first_row + r);
            float        shrink;
            const float  all = with_sink(args, at.head, max[half], sum[half], shrink), factor = all > 0 ? shrink / all : 0.0f;
            float *      to = output_row(args, stream, at);
            GEAR_UNROLL
            for (int n = 0; n < n_out; ++n) {
                for (int i = 0; i < 2; ++i) {
                    const int c = 8 * n + 2 * tig() + i;
                    if (c < d) {
                        to[c] = out[n][2 * half + i] * factor;
                    }
                }
            }
        }
        if (!rotates(args.v)) {
            return;
        }
        __syncthreads(); // the rows are the block's own
        for_each_warp(n_rows, [&](int r, int lane) {
            float * row = output_row(args, stream, row_of(args, head, first_row + r));
            float   x[n_channel];
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                x[i] = lane + 32 * i < d ? row[lane + 32 * i] : 0.0f;
            }
            hadamard_warp(x, d, lane);
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                if (lane + 32 * i < d) {
                    row[lane + 32 * i] = x[i];
                }
            }
        });
    }
};

// Grid: blocks of rows (the last ones, which see most, first), KV heads, streams.
template <int max_d> __global__ void __launch_bounds__(prefill_sizes<max_d>::threads) prefill_kernel(const __grid_constant__ attend_arguments args) {
    const int        n_all = args.params.n_query * args.n_share, first = (int) (gridDim.x - 1 - blockIdx.x) * prefill_sizes<max_d>::rows;
    prefiller<max_d> p = { args, {}, (int) blockIdx.z, (int) blockIdx.y, first, least(prefill_sizes<max_d>::rows, n_all - first), {}, {}, {} };
    lay_out<max_d>(args, shared_memory(), p.s);
    p.run();
}

} // namespace gear::cuda
