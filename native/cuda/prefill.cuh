// prefill.cuh - attention of many queries: see attend.cuh.
#pragma once

#include "cuda/attend.cuh"

namespace gear::cuda {

// max_d: the largest head size of an instance; sizes in between use the next one.
// Large heads: two warps share 16 rows, because one's registers do not hold the output's channels; each takes half of them, and both compute the scores.
// And V comes into K's place when the scores are there.
template <int max_d> struct prefill_sizes {
    static constexpr bool is_large = max_d > large_head;
    static constexpr int  n_warp   = max_d > 128 ? 4 : 8;
    static constexpr int  n_part   = is_large ? 2 : 1; // of the channels
    static constexpr int  threads  = n_warp * warp_threads;
    static constexpr int  rows     = 16 * n_warp / n_part;
    static constexpr int  strip    = max_d > 128 ? 32 : 64; // cells
    static constexpr int  pad      = 8;                     // halves between rows, so that 8 rows of 4 words touch 32 banks
};

// Shared memory: q [rows, d_k + pad], K of the strip [strip, d_k + pad], V of the strip turned round [d_v, strip + pad], all f16; slots of its cells.
template <int max_d> struct prefill_shared {
    uint16_t * q;
    uint16_t * k;
    uint16_t * v;
    int32_t *  slot_k;
    int32_t *  slot_v;
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
    s.q      = halves(sizes::rows * s.k_stride);
    s.k      = halves(sizes::is_large ? most(sizes::strip * s.k_stride, d_v * s.v_stride) : sizes::strip * s.k_stride);
    s.v      = sizes::is_large ? s.k : halves(d_v * s.v_stride);
    s.slot_k = reinterpret_cast<int32_t *>(halves(2 * sizes::strip));
    s.slot_v = reinterpret_cast<int32_t *>(halves(2 * sizes::strip));
    s.bytes  = used;
}

// H of a row of a warp: channel c is x[c / 32] of lane c % 32. The codec's steps in the codec's order. A block begins at a multiple of its size, so that
// x[i] of all lanes is of one block, or (blocks of 16) of two that no step of theirs joins.
template <int n> __device__ __forceinline__ void hadamard_warp(float (&x)[n], int d, int lane) {
    const auto block_of = [d](int i) { return 32 * n <= large_head ? d & -d : rotation_block(d, 32 * i); };
    GEAR_UNROLL
    for (int half = 1; half < 32; half *= 2) {
        GEAR_UNROLL
        for (int i = 0; i < n; ++i) {
            if (32 * i < d && half < block_of(i)) {
                const float other = __shfl_xor_sync(all_threads, x[i], half);
                x[i]              = lane & half ? other - x[i] : x[i] + other;
            }
        }
    }
    GEAR_UNROLL
    for (int half = 1; half < n; half *= 2) {
        GEAR_UNROLL
        for (int i = 0; i < n; ++i) {
            if ((i & half) == 0 && i + half < n && 32 * i < d && 32 * half < block_of(i)) {
                const float sum = x[i] + x[i + half], difference = x[i] - x[i + half];
                x[i]        = sum;
                x[i + half] = difference;
            }
        }
    }
    GEAR_UNROLL
    for (int i = 0; i < n; ++i) {
        if (32 * i < d) {
            x[i] *= 1.0f / sqrtf((float) block_of(i));
        }
    }
}

template <int max_d> struct prefiller {
    using sizes                    = prefill_sizes<max_d>;
    static constexpr int n_channel = max_d / 32;                // of a row, a lane
    static constexpr int n_out     = max_d / 8 / sizes::n_part; // products of 8 channels, of a warp

    const attend_arguments & args;
    prefill_shared<max_d>    s;
    int                      stream, head, first_row, n_rows;
    float                    out[n_out][4];
    float                    max[2], sum[2]; // of rows g and g + 8

    __device__ int        cache_stream() const { return args.params.stream0 + stream; }
    __device__ static int warp() { return (int) threadIdx.x / warp_threads; }
    __device__ static int lane() { return (int) threadIdx.x % warp_threads; }
    __device__ static int first_row_of_warp() { return 16 * (warp() / sizes::n_part); }
    __device__ static int first_channel() { return 8 * n_out * (warp() % sizes::n_part); } // of the warp's part of the output
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
                attend_strip(first, n_cell);
                __syncthreads();
            }
        }
        write();
    }

    // Whether a side's rows are rotated in shared memory. Tiles that name their basis are taken out of it: it need not be the same for all of a strip's
    // readers, and f16 is too coarse for a row in which H has spread a channel that stands out.
    __device__ static bool stays_rotated(const device_side & side) { return rotates(side) && !is_weighted(side); }

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
            if (stays_rotated(args.k)) {
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

    // Where the strip's cells are: bit 0: some K is packed, bit 1: some V.
    __device__ int look_up(int first) {
        int found = 0;
        for_each(sizes::strip, [&](int i) {
            const int64_t cell = (int64_t) cache_stream() * args.k.n_cell + first + i;
            const bool    has  = first + i < args.k.n_cell;
            s.slot_k[i]        = has ? args.k.slot[cell] : slot_absent;
            s.slot_v[i]        = has ? args.v.slot[cell] : slot_absent;
            found |= (s.slot_k[i] == slot_packed) | (s.slot_v[i] == slot_packed) << 1;
        });
        const bool k_packed = __syncthreads_or(found & 1) != 0, v_packed = __syncthreads_or(found & 2) != 0;
        return (int) k_packed | (int) v_packed << 1;
    }

    // K, V or both, and whether some of it is packed.
    __device__ void load_strip(int first, bool with_k, bool with_v, int packed) {
        const bool k_packed = with_k && (packed & 1) && !is_weighted(args.k), v_packed = with_v && (packed & 2) && !is_weighted(args.v);
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
        if (with_k) {
            load_rows(args.k, s.slot_k, tile, token);
        }
        if (with_v) {
            load_rows(args.v, s.slot_v, tile, token);
        }
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
                    const group_range range = range_at(layout, tile, group_of(layout, 32 * lane_block, c + j));
                    for (int entry = 0; entry < 4; ++entry) {
                        const int   t          = 32 * lane_block + 16 * (entry / 2) + 2 * g() + entry % 2;
                        const int   code       = codes.code[sub][entry / 2][entry % 2] >> 8 * j & 255;
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
                    for (int entry = 0; entry < 4; ++entry) {
                        const int c = 32 * lane_block + 16 * (entry / 2) + 2 * g() + entry % 2;
                        if (c < layout.d_head) {
                            const group_range range = range_at(layout, tile, group_of(layout, t, c));
                            const float       D     = range.zero + range.scale * (float) (codes.code[sub][entry / 2][entry % 2] >> 8 * j & 255);
                            v_at(t - token, c)      = to_half(in_half_range(D + low_rank_at(layout, tile, t, c) + mean_at(layout, tile, c)));
                        }
                    }
                }
            }
        });
    }

    __device__ void restore_outliers(const tile_layout & layout, const uint8_t * tile, int token) {
        const bool is_k = layout.side == GEAR_SIDE_K;
        for_each(layout.part.n_vector * layout.part.n_outlier, [&](int i) {
            const int vector = i / layout.part.n_outlier, index = outlier_index_at(layout, tile, i);
            const int t = (is_k ? index : vector) - token, c = is_k ? vector : index;
            if (t >= 0 && t < sizes::strip) {
                (is_k ? k_at(t, c) : v_at(t, c)) = half_at(tile + layout.part.outlier_value, i);
            }
        });
    }

    // Exact rows, and zeros for cells never written, as packed ones are; and packed rows of a tile that names its basis, which they leave.
    __device__ void load_rows(const device_side & side, const int32_t * slots, int tile_number, int token) {
        const int       d        = side.layout.d_head;
        const bool      is_k     = side.layout.side == GEAR_SIDE_K;
        const uint8_t * weighted = is_weighted(side) ? tile_at(side, cache_stream(), tile_number, head) : nullptr;
        for_each_warp(sizes::strip, [&](int cell, int lane) {
            const int  slot      = slots[cell];
            const bool is_packed = slot == slot_packed;
            if (is_packed && !weighted) {
                return;
            }
            const uint16_t * row = slot >= 0 ? exact_row_at(side, cache_stream(), slot, head) : nullptr;
            float            x[n_channel];
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                const int c = lane + 32 * i;
                x[i]        = c >= d ? 0.0f : is_packed ? reconstructed_at(side.layout, weighted, token + cell, c) : row ? from_half(row[c]) : 0.0f;
            }
            if (is_packed || stays_rotated(side)) {
                hadamard_warp(x, d, lane);
            }
            GEAR_UNROLL
            for (int i = 0; i < n_channel; ++i) {
                const int c = lane + 32 * i;
                if (c < d) {
                    const float value                      = is_packed ? x[i] / weight_at(side.layout, weighted, c) : x[i];
                    (is_k ? k_at(cell, c) : v_at(cell, c)) = to_half(in_half_range(value));
                }
            }
        });
    }

    __device__ static uint32_t pair_at(const uint16_t * halves) { return *reinterpret_cast<const uint32_t *>(halves); }

    __device__ __forceinline__ void attend_strip(int first, int n_cell) {
        constexpr int                 n_column = sizes::strip / 8;
        const gear_attention_params & params   = args.params;
        const int                     d_k = args.k.layout.d_head, d_v = args.v.layout.d_head;
        float                         score[n_column][4] = {};
        const int                     packed             = look_up(first);
        load_strip(first, true, !sizes::is_large, packed);
        for (int c = 0; c < d_k; c += 16) {
            const uint16_t * q    = s.q + (first_row_of_warp() + g()) * s.k_stride + c + 2 * tig();
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
            const int        r     = first_row_of_warp() + g() + 8 * half;
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
        if (sizes::is_large) {
            __syncthreads();
            load_strip(first, false, true, packed);
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
                if (first_channel() + 8 * n < d_v) {
                    const uint16_t * v    = s.v + (first_channel() + 8 * n + g()) * s.v_stride + 16 * step + 2 * tig();
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
            const int r = first_row_of_warp() + g() + 8 * half;
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
                    const int c = first_channel() + 8 * n + 2 * tig() + i;
                    if (c < d) {
                        to[c] = out[n][2 * half + i] * factor;
                    }
                }
            }
        }
        if (!stays_rotated(args.v)) {
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
template <int max_d> __global__ void __launch_bounds__(prefill_sizes<max_d>::threads, 1) prefill_kernel(const __grid_constant__ attend_arguments args) {
    const int        n_all = args.params.n_query * args.n_share, first = (int) (gridDim.x - 1 - blockIdx.x) * prefill_sizes<max_d>::rows;
    prefiller<max_d> p = { args, {}, (int) blockIdx.z, (int) blockIdx.y, first, least(prefill_sizes<max_d>::rows, n_all - first), {}, {}, {} };
    lay_out<max_d>(args, shared_memory(), p.s);
    p.run();
}

} // namespace gear::cuda
