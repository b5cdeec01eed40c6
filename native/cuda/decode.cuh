// decode.cuh - attention of few queries: see attend.cuh. One file of more than 500 lines: the kernel's steps share one plan of shared memory and of
// barriers, and a barrier is only seen to be right beside what stands before and after it.
#pragma once

#include "cuda/attend.cuh"

namespace gear::cuda {

constexpr int decode_threads = 128;
constexpr int decode_rows    = 8;
constexpr int merge_threads  = 128;

// Scales and zeros of one tile in shared memory. Those of a large head in f16 stay in the tile: there is no room for them.
struct tile_ranges {
    uint8_t *       copy;  // scales, then zeros, as stored; nullptr: they are read where they lie
    const uint8_t * scale; // as stored
    const uint8_t * zero;
    float *         lo;    // [n_set]
    float *         width; // [n_set] hi - lo
    float *         mean;  // [d] M, with `center`
};

// Shared memory of a block of decode, in floats but for the last parts.
struct decode_shared {
    float *     q;         // [rows, q_stride] times scale, as packed tiles want it
    float *     q_exact;   // the same as exact rows want it; nullptr: a large head's queries are read where they lie, which leaves room for the rest
    float *     p;         // [rows, p_stride] scores, then p
    float *     out;       // [rows, out_stride] from packed tiles, in their space
    float *     out_exact; // from exact rows
    float *     max;       // [rows]
    float *     sum;       // [rows]
    float *     factor;    // [rows] by which the outputs so far shrink
    float *     shared_k;  // [rows, rank] q.b
    float *     shared_v;  // [rows, rank] p.a
    tile_ranges ranges_k, ranges_v;
    uint8_t *   basis_k; // [d / 2] what q is in, and what `out` is in, where tiles name their basis
    uint8_t *   basis_v;
    int32_t *   slot_k; // [T]
    int32_t *   slot_v; // [T]
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
        const bool               stay = side.layout.d_head > large_head && side.layout.config.scale_bits == 16;
        const int                n    = side.has_tiles && !stay ? part.n_group * side.layout.config.scale_bits / 8 : 0;
        r.copy                        = n > 0 ? take(2 * n) : nullptr;
        r.scale = r.zero = nullptr;
        r.lo             = floats(side.has_tiles ? part.n_set : 0);
        r.width          = floats(side.has_tiles ? part.n_set : 0);
        r.mean           = floats(side.has_tiles && side.layout.config.center ? side.layout.d_head : 0);
    };
    s.q_stride   = padded_to(k.d_head, 32) + 16; // so that 4 threads on each of two neighbouring rows touch 32 banks
    s.p_stride   = T + 16;
    s.out_stride = padded_to(v.d_head, 32);
    s.q          = floats(decode_rows * s.q_stride);
    s.q_exact    = !rotates(args.k) ? s.q : k.d_head > large_head ? nullptr : floats(decode_rows * s.q_stride);
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
    s.basis_k = is_weighted(args.k) ? take(basis_bytes(k.d_head)) : nullptr;
    s.basis_v = is_weighted(args.v) ? take(basis_bytes(v.d_head)) : nullptr;
    s.slot_k  = reinterpret_cast<int32_t *>(take(4 * T));
    s.slot_v  = reinterpret_cast<int32_t *>(take(4 * T));
    s.bytes   = used;
}

__device__ inline void load_ranges(const tile_layout & layout, const uint8_t * tile, tile_ranges & r) {
    const gear_tile_layout & part  = layout.part;
    const int                words = part.n_group * layout.config.scale_bits / 8 / 4; // n_group is a multiple of 16
    r.scale                        = r.copy ? r.copy : tile + part.scale;
    r.zero                         = r.copy ? r.copy + 4 * words : tile + part.zero;
    for_each(r.copy ? words : 0, [&](int i) {
        reinterpret_cast<uint32_t *>(r.copy)[i]         = reinterpret_cast<const uint32_t *>(tile + part.scale)[i];
        reinterpret_cast<uint32_t *>(r.copy)[words + i] = reinterpret_cast<const uint32_t *>(tile + part.zero)[i];
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

__device__ __forceinline__ quad_ranges ranges_of(const tile_layout & layout, const tile_ranges & r, int first, int set) {
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
__device__ __forceinline__ row_sums multiply_lanes(const tile_layout & layout, const uint8_t * tile, const tile_ranges & r, int lane_block,
                                                   const float * x, int stride, float (&c)[2][4]) {
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
__device__ __forceinline__ void of_columns(float of_row, float (&of_column)[2]) {
    const int tig = (int) threadIdx.x % 4;
    for (int i = 0; i < 2; ++i) {
        of_column[i] = __shfl_sync(all_threads, of_row, 4 * (2 * tig + i));
    }
}

// Lane blocks of V that a warp has, in heads of up to `large_head` channels and of up to max_d_head.
constexpr int few_blocks  = large_head / 32 / (decode_threads / 32);
constexpr int many_blocks = (max_d_head / 32 + decode_threads / 32 - 1) / (decode_threads / 32);

// One block of decode.
template <int bits_k, int bits_v, int n_block> struct decoder {
    const attend_arguments & args;
    decode_shared            s;
    int                      stream, head, first_row, n_rows, split; // stream of the op; KV head
    float                    out[n_block][2][4];                     // of the warp's lane blocks of channels
    bool                     has_basis_k, has_basis_v;               // the block has met a tile that names one

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

    // Goes into q, divided by the soft-cap where there is one.
    __device__ float score_scale() const { return args.params.softcap != 0 ? args.params.scale / args.params.softcap : args.params.scale; }

    __device__ void load_queries() {
        const float scale = score_scale();
        for_each(decode_rows * s.q_stride, [&](int i) {
            const int   r = i / s.q_stride, c = i % s.q_stride;
            const float x = r < n_rows && c < args.k.layout.d_head ? query_row(args, stream, row(r))[c] * scale : 0.0f;
            s.q[i]        = x;
            if (s.q_exact) {
                s.q_exact[i] = x;
            }
        });
        for_each(decode_rows * s.out_stride, [&](int i) { s.out[i] = s.out_exact[i] = 0; });
        for_each(decode_rows, [&](int r) {
            s.max[r] = -infinite;
            s.sum[r] = 0;
        });
        GEAR_UNROLL
        for (int i = 0; i < 8 * n_block; ++i) {
            out[i / 8][i / 4 % 2][i % 4] = 0;
        }
        __syncthreads();
        if (rotates(args.k) && !is_weighted(args.k)) {
            hadamard_rows(s.q, decode_rows, args.k.layout.d_head, s.q_stride);
        }
    }

    // Tiles of a head have one basis, unless they come from elsewhere: it seldom differs from the last tile's.
    __device__ bool differs(const tile_layout & layout, const uint8_t * tile, const uint8_t * basis, bool is_set) const {
        int found = !is_set;
        for_each(is_set ? basis_bytes(layout.d_head) : 0, [&](int i) { found |= basis[i] != tile[layout.part.basis + i]; });
        return __syncthreads_or(found) != 0;
    }

    __device__ void take_basis(const tile_layout & layout, const uint8_t * tile, uint8_t * basis) const {
        for_each(basis_bytes(layout.d_head), [&](int i) { basis[i] = tile[layout.part.basis + i]; });
        __syncthreads();
    }

    // q.k = (H (q / w)).y where y = H (w o k)
    __device__ void enter_basis_k(const uint8_t * tile) {
        const tile_layout & layout = args.k.layout;
        if (!is_weighted(args.k) || !differs(layout, tile, s.basis_k, has_basis_k)) {
            return;
        }
        take_basis(layout, tile, s.basis_k);
        has_basis_k       = true;
        const float scale = score_scale();
        for_each(decode_rows * s.q_stride, [&](int i) {
            const int  r = i / s.q_stride, c = i % s.q_stride;
            const bool is_there = r < n_rows && c < layout.d_head;
            s.q[i]              = is_there ? query_row(args, stream, row(r))[c] * scale / weight_of_channel(s.basis_k, layout.d_head, c) : 0.0f;
        });
        __syncthreads();
        hadamard_rows(s.q, decode_rows, layout.d_head, s.q_stride);
    }

    __device__ void enter_basis_v(const uint8_t * tile) {
        if (!is_weighted(args.v) || !differs(args.v.layout, tile, s.basis_v, has_basis_v)) {
            return;
        }
        if (has_basis_v) {
            rotate_back();
        }
        take_basis(args.v.layout, tile, s.basis_v);
        has_basis_v = true;
    }

    // p.V = (H (p.Y)) / w: what was added up in this basis joins the rest, and `out` begins anew.
    __device__ void rotate_back() {
        const int d = args.v.layout.d_head;
        collect();
        hadamard_rows(s.out, decode_rows, d, s.out_stride);
        for_each(decode_rows * s.out_stride, [&](int i) {
            const int c = i % s.out_stride;
            if (c < d) {
                s.out_exact[i] += is_weighted(args.v) ? s.out[i] / weight_of_channel(s.basis_v, d, c) : s.out[i];
            }
            s.out[i] = 0;
        });
        __syncthreads();
    }

    __device__ __forceinline__ void attend_tile(int tile) {
        const int n_cell = least(T(), args.params.n_kv - tile * T());
        if (!is_visible(args, stream, head, first_row, n_rows, tile * T(), n_cell)) {
            return;
        }
        const int n_cell_k = least(T(), args.k.n_cell - tile * T()); // of the table: cells beyond n_kv count as hidden
        int       found    = 0;
        for_each(T(), [&](int t) {
            const int64_t cell = (int64_t) cache_stream() * args.k.n_cell + tile * T() + t;
            s.slot_k[t]        = t < n_cell_k ? args.k.slot[cell] : slot_absent;
            s.slot_v[t]        = t < n_cell_k ? args.v.slot[cell] : slot_absent;
            found |= (s.slot_k[t] == slot_packed) | (s.slot_k[t] != slot_packed) << 1;
            found |= (s.slot_v[t] == slot_packed) << 2 | (s.slot_v[t] != slot_packed) << 3;
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
            enter_basis_k(tile_k);
            score_packed(tile_k);
        }
        if (k_exact) {
            score_exact();
        }
        __syncthreads();
        softmax_rows(tile, n_cell);
        __syncthreads();
        shrink();
        if (v_exact) {
            add_p_v_exact();
        }
        if (v_packed) {
            enter_basis_v(tile_v);
            add_p_v_packed(tile_v);
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
                const int   c = i / n_outlier, t = outlier_index_at(layout, tile, i);
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
        return from_half(half_at(tile + layout.part.outlier_value, i)) - range_at(layout, tile, group_of(layout, t, c)).zero -
               low_rank_at(layout, tile, t, c);
    }

    // Scores of exact rows, and 0 for cells never written.
    __device__ void score_exact() {
        const int d = args.k.layout.d_head;
        for_each_warp(T(), [&](int t, int lane) {
            const int slot = s.slot_k[t];
            if (slot == slot_packed) {
                return;
            }
            float dot[decode_rows] = {};
            if (slot >= 0) {
                const uint32_t * row = reinterpret_cast<const uint32_t *>(exact_row_at(args.k, cache_stream(), slot, head));
                for (int c = lane; c < d / 2; c += warp_threads) {
                    const uint32_t pair = row[c];
                    const float    low = from_half((uint16_t) pair), high = from_half((uint16_t) (pair >> 16));
                    GEAR_UNROLL
                    for (int r = 0; r < decode_rows; ++r) {
                        const float * q =
                            s.q_exact ? s.q_exact + r * s.q_stride + 2 * c : query_row(args, stream, this->row(least(r, n_rows - 1))) + 2 * c;
                        dot[r] = fmaf(q[0], low, fmaf(q[1], high, dot[r]));
                    }
                }
            }
            // 8 sums over 32 lanes: each step halves the rows that a lane looks after, then the lanes.
            int first = 0;
            GEAR_UNROLL
            for (int n = decode_rows / 2, step = 16; n > 0; n /= 2, step /= 2) {
                const bool upper = lane & step;
                GEAR_UNROLL
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
                s.p[first * s.p_stride + t] = s.q_exact ? dot[0] : dot[0] * score_scale();
            }
        });
    }

    // Scores become p, a warp a row.
    __device__ void softmax_rows(int tile, int n_cell) {
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
            for (int j = 0; j < 2 * n_block; ++j) {
                out[j / 2][j % 2][i] *= factor;
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
    __device__ void add_p_v_exact() {
        for (int first = 0; first < args.v.layout.d_head / 2; first += decode_threads) {
            add_p_v_exact(first, least(decode_threads, args.v.layout.d_head / 2 - first));
        }
        __syncthreads();
        for_each(decode_rows * T(), [&](int i) {
            if (s.slot_v[i % T()] != slot_packed) {
                s.p[i / T() * s.p_stride + i % T()] = 0;
            }
        });
        __syncthreads();
    }

    // Of n_pair pairs of channels, at most one a thread.
    __device__ void add_p_v_exact(int first, int n_pair) {
        const int n_team = decode_threads / n_pair, team = (int) threadIdx.x / n_pair, c = first + (int) threadIdx.x % n_pair;
        float     sum[decode_rows][2] = {};
        for (int t = team; team < n_team && t < T(); t += n_team) {
            const int slot = s.slot_v[t];
            if (slot < 0) {
                continue;
            }
            const uint32_t pair = reinterpret_cast<const uint32_t *>(exact_row_at(args.v, cache_stream(), slot, head))[c];
            const float    low = from_half((uint16_t) pair), high = from_half((uint16_t) (pair >> 16));
            GEAR_UNROLL
            for (int r = 0; r < decode_rows; ++r) {
                const float p = s.p[r * s.p_stride + t];
                sum[r][0]     = fmaf(p, low, sum[r][0]);
                sum[r][1]     = fmaf(p, high, sum[r][1]);
            }
        }
        if (team < n_team) {
            GEAR_UNROLL
            for (int r = 0; r < decode_rows; ++r) {
                if (r < n_rows) {
                    atomicAdd(&s.out_exact[r * s.out_stride + 2 * c], sum[r][0]);
                    atomicAdd(&s.out_exact[r * s.out_stride + 2 * c + 1], sum[r][1]);
                }
            }
        }
    }

    // 32 channels of it
    __device__ __forceinline__ void add_p_v_lanes(const uint8_t * tile, int lane_block, float (&sum)[2][4]) {
        const tile_layout & layout = args.v.layout;
        if (32 * lane_block >= layout.part.n_lane) {
            return;
        }
        const row_sums sums = multiply_lanes<bits_v>(layout, tile, s.ranges_v, lane_block, s.p, s.p_stride, sum);
        float          zero[2], all[2];
        of_columns(sums.zeros, zero);
        of_columns(sums.all, all);
        GEAR_UNROLL
        for (int j = 0; j < 8; ++j) {
            const int c = 32 * lane_block + 16 * (j / 4) + lane() / 4 * 2 + j % 4 / 2;
            sum[j / 4][j % 4] += zero[j % 2];
            if (layout.config.center && c < layout.d_head) {
                sum[j / 4][j % 4] += all[j % 2] * s.ranges_v.mean[c];
            }
        }
    }

    // out += p.V over the packed tile
    __device__ __forceinline__ void add_p_v_packed(const uint8_t * tile) {
        const tile_layout & layout = args.v.layout;
        GEAR_UNROLL
        for (int i = 0; i < n_block; ++i) {
            add_p_v_lanes(tile, warp() + i * n_warp(), out[i]);
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
                const int t = i / n_outlier, c = outlier_index_at(layout, tile, i);
                if (s.slot_v[t] == slot_packed) {
                    const float excess = outlier_excess(layout, tile, i, t, c);
                    for (int r = 0; r < n_rows; ++r) {
                        atomicAdd(&s.out[r * s.out_stride + c], s.p[r * s.p_stride + t] * excess);
                    }
                }
            });
        }
    }

    __device__ __forceinline__ void add_lanes(int lane_block, const float (&sum)[2][4]) {
        GEAR_UNROLL
        for (int j = 0; j < 8; ++j) {
            const int c = 32 * lane_block + 16 * (j / 4) + lane() / 4 * 2 + j % 4 / 2, r = lane() % 4 * 2 + j % 2;
            if (c < args.v.layout.d_head) {
                s.out[r * s.out_stride + c] += sum[j / 4][j % 4];
            }
        }
    }

    // What the threads hold of `out` goes there.
    __device__ void collect() {
        GEAR_UNROLL
        for (int i = 0; i < n_block; ++i) {
            add_lanes(warp() + i * n_warp(), out[i]);
            GEAR_UNROLL
            for (int j = 0; j < 8; ++j) {
                out[i][j / 4][j % 4] = 0;
            }
        }
        __syncthreads();
    }

    // The range's max, sum and output.
    __device__ void finish() {
        const int d = args.v.layout.d_head;
        if (!rotates(args.v)) {
            collect();
        } else if (has_basis_v || !is_weighted(args.v)) {
            rotate_back();
        }
        for_each(n_rows * d, [&](int i) {
            const int r = i / d, c = i % d;
            partial(r)[2 + c] = s.out_exact[r * s.out_stride + c];
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
template <int bits_k, int bits_v, int n_block>
__global__ void __launch_bounds__(decode_threads) decode_kernel(const __grid_constant__ attend_arguments args) {
    const int n_all = args.params.n_query * args.n_share, head = (int) blockIdx.y % args.k.n_head, first = (int) blockIdx.y / args.k.n_head * decode_rows;
    decoder<bits_k, bits_v, n_block> d = {
        args, {}, (int) blockIdx.z, head, first, least(decode_rows, n_all - first), (int) blockIdx.x, {}, false, false
    };
    lay_out(args, shared_memory(), d.s);
    d.run();
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

} // namespace gear::cuda
