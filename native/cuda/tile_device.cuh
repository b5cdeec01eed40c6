// tile_device.cuh - how the threads of a GPU read the bytes of a packed tile. What the bytes mean is told in codec/tile.h, the one description of them; a
// tile packed on either device is read on the other.
//
// Bit layout, in short. Codes lie in planes of 4, 2 and 1 bits; a plane is made of lines of 64 bytes. Word i (0..15) of a line is 4 bytes, one for each
// depth of a quad (4 neighbouring depths); its bits, in fields of the plane's width w, are
//     field 2 * sub + half   ->   lane 32 * lane_block + 16 * half + i,   quad per_line * line + sub          (per_line = 4 / w)
// with K: lanes = tokens, depth = channels; V: lanes = channels, depth = tokens.
//
// Lane mapping. Attention takes the codes into tensor-core products of 16 rows (lanes of the tile) by 16 depths by 8 columns (queries x query heads), with
// mma.sync.m16n8k16. In a warp, thread = 4 * g + tig (g 0..7, tig 0..3). The order of rows and of depths within a product is free, so it is chosen such
// that a thread loads whole words, and neighbouring threads neighbouring words:
//     row g is tile lane 2 g of a half, row g + 8 is lane 2 g + 1:   a thread loads words 2 g and 2 g + 1 of a line, 8 bytes; 8 threads load the line
//     thread tig holds one quad:                                     four lines, one for each tig, are 16 depths
//     fragment a[0], a[1] (rows g, g + 8) hold depths 0 and 2 of the quad, a[2], a[3] depths 1 and 3: bytes 0, 2 and 1, 3 of the word
//     fragment b[0], b[1] of column g likewise hold depths 0 and 2, 1 and 3 of that quad
//     result  c[0], c[1] are row g with columns 2 tig and 2 tig + 1, c[2], c[3] the same of row g + 8
// One word gives both halves, so 32 lanes come out of one load. When planes differ in width, a thread takes the line of the narrowest plane (it has the
// most quads, n_sub of them) and the lines of the others that hold the same quads.
//
// Codes are exact in bf16. What they are multiplied with (query times scale, or p times scale) is split into two bf16 that add up to 16 bits of it: bf16
// has the range of f32, so that nothing has to be scaled first. Sums are f32.
#pragma once

#include "codec/basis.h"
#include "codec/ranges.h"
#include "cuda/arguments.h"
#include "cuda/block.cuh"

namespace gear::cuda {

constexpr unsigned all_threads = 0xffffffffu;

struct alignas(8) word_pair { // one load of 8 bytes
    uint32_t word[2];
};

struct alignas(16) quad_values {
    float x[4];
};

__host__ __device__ inline int least(int a, int b) {
    return a < b ? a : b;
}

__host__ __device__ inline int most(int a, int b) {
    return a > b ? a : b;
}

__device__ inline uint16_t half_at(const uint8_t * bytes, int i) {
    return reinterpret_cast<const uint16_t *>(bytes)[i];
}

// Lanes without padding.
__device__ inline int real_lanes(const tile_layout & layout) {
    return layout.side == GEAR_SIDE_K ? layout.n_token : layout.d_head;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// One number at a time, as the scalar codec computes it
// ---------------------------------------------------------------------------------------------------------------------------------------------

__device__ inline group_range range_at(const tile_layout & layout, const uint8_t * tile, int group) {
    const gear_tile_layout & part = layout.part;
    if (layout.config.scale_bits == 16) {
        return range_of_16({ half_at(tile + part.scale, group), half_at(tile + part.zero, group) });
    }
    const int   set = layout.side == GEAR_SIDE_K ? group % part.n_set : group / layout.n_token;
    const float lo = from_half(half_at(tile + part.lo, set)), hi = from_half(half_at(tile + part.hi, set));
    return stored_set(lo, hi).range_of({ tile[part.scale + group], tile[part.zero + group] }, layout.levels);
}

__device__ inline int code_at(const tile_layout & layout, const uint8_t * tile, int token, int channel) {
    const bool is_k = layout.side == GEAR_SIDE_K;
    int        code = 0;
    for (int i = 0; i < layout.n_plane; ++i) {
        const plane_info &  plane    = layout.plane[i];
        const code_position position = position_of(plane, layout.part.n_depth, is_k ? token : channel, is_k ? channel : token);
        code |= (tile[plane.offset + position.byte] >> position.shift & ((1 << plane.width) - 1)) << plane.position;
    }
    return code;
}

// Entry e of column k of a factor of n rows, without its step.
__device__ inline int factor_at(const tile_layout & layout, const uint8_t * stored, int n, int k, int e) {
    const int bits = layout.config.factor_bits;
    return factor_entry(stored + k * n * bits / 8, bits, n, e);
}

__device__ inline float sigma_at(const tile_layout & layout, const uint8_t * tile, int k) {
    return reinterpret_cast<const float *>(tile + layout.part.sigma)[k];
}

__device__ inline float a_at(const tile_layout & layout, const uint8_t * tile, int k, int token) {
    return sigma_at(layout, tile, k) * (float) factor_at(layout, tile + layout.part.a, layout.n_token, k, token);
}

__device__ inline float b_at(const tile_layout & layout, const uint8_t * tile, int k, int channel) {
    return (float) factor_at(layout, tile + layout.part.b, layout.d_head, k, channel);
}

// D: what codes say.
__device__ inline float quantized_at(const tile_layout & layout, const uint8_t * tile, int token, int channel) {
    const group_range range = range_at(layout, tile, group_of(layout, token, channel));
    return range.zero + range.scale * (float) code_at(layout, tile, token, channel);
}

// L
__device__ inline float low_rank_at(const tile_layout & layout, const uint8_t * tile, int token, int channel) {
    float sum = 0;
    for (int k = 0; k < layout.config.rank; ++k) {
        sum += a_at(layout, tile, k, token) * b_at(layout, tile, k, channel);
    }
    return sum;
}

// M
__device__ inline float mean_at(const tile_layout & layout, const uint8_t * tile, int channel) {
    return layout.config.center ? from_half(half_at(tile + layout.part.mean, channel)) : 0.0f;
}

// What a packed tile says of one number, in the basis that was coded.
__device__ inline float reconstructed_at(const tile_layout & layout, const uint8_t * tile, int t, int c) {
    const gear_tile_layout & part   = layout.part;
    const int                vector = layout.side == GEAR_SIDE_K ? c : t, entry = layout.side == GEAR_SIDE_K ? t : c;
    float                    value = quantized_at(layout, tile, t, c) + low_rank_at(layout, tile, t, c) + mean_at(layout, tile, c);
    for (int i = 0; i < part.n_outlier; ++i) {
        const int i_outlier = vector * part.n_outlier + i;
        value               = outlier_index_at(layout, tile, i_outlier) == entry ? from_half(half_at(tile + part.outlier_value, i_outlier)) : value;
    }
    return value;
}

__host__ __device__ inline bool is_weighted(const tile_layout & layout) {
    return layout.config.rotate == rotate_weighted;
}

// w of a channel of a packed tile, with `rotate` 2
__device__ inline float weight_at(const tile_layout & layout, const uint8_t * tile, int c) {
    return weight_of_channel(tile + layout.part.basis, layout.d_head, c);
}

// Channels of H's block that channel c lies in. Of more than 256 channels the blocks are d's powers of two, the largest first: c's is that of the highest
// bit in which c and d differ.
__device__ inline int rotation_block(int d, int c) {
    if (d <= 256) {
        return d & -d;
    }
    int block = 16;
    while (2 * block <= (c ^ d)) {
        block *= 2;
    }
    return block;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Fragments
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Quads of the narrowest plane's line.
__device__ inline int subs_of(int bits) {
    return bits & 1 ? 4 : bits & 2 ? 2 : 1;
}

// What a thread holds of 32 lanes and up to n_sub quads: for each quad and lane the 4 codes as bytes.
struct lane_codes {
    uint32_t code[4][2][2]; // [sub][half][row g or g + 8]
};

// The words of one plane, put where the code's bits belong.
template <int width> __device__ __forceinline__ void add_plane(const uint8_t * line, int n_sub, int position, lane_codes & codes) {
    constexpr int      per_line = 4 / width;
    constexpr uint32_t field    = ((1u << width) - 1) * 0x01010101u;
    GEAR_UNROLL
    for (int i = 0; i < 4 / per_line; ++i) {
        if (i * per_line >= n_sub) {
            continue;
        }
        const word_pair words = *reinterpret_cast<const word_pair *>(line + 64 * i);
        GEAR_UNROLL
        for (int sub = 0; sub < per_line; ++sub) {
            GEAR_UNROLL
            for (int half = 0; half < 2; ++half) {
                GEAR_UNROLL
                for (int row = 0; row < 2; ++row) {
                    codes.code[i * per_line + sub][half][row] |= (words.word[row] >> width * (2 * sub + half) & field) << position;
                }
            }
        }
    }
}

// first: index of a line of the narrowest plane. Zeros beyond the depth.
template <int known_bits>
__device__ __forceinline__ void load_codes(const tile_layout & layout, const uint8_t * tile, int lane_block, int first, lane_codes & codes) {
    const int bits = known_bits ? known_bits : layout.config.bits, n_sub = subs_of(bits);
    const int lane = (int) threadIdx.x % warp_threads, g = lane / 4, n_quad = layout.part.n_depth / 4;
    GEAR_UNROLL
    for (int sub = 0; sub < 4; ++sub) {
        GEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            codes.code[sub][i / 2][i % 2] = 0;
        }
    }
    if (first * n_sub >= n_quad) {
        return;
    }
    const auto line = [&](int plane, int per_line) {
        return tile + layout.plane[plane].offset + 64 * (lane_block * (n_quad / per_line) + first * n_sub / per_line) + 8 * g;
    };
    int plane = 0;
    if (bits & 4) {
        add_plane<4>(line(plane++, 1), n_sub, 0, codes);
    }
    if (bits & 2) {
        add_plane<2>(line(plane++, 2), n_sub, bits & 4, codes);
    }
    if (bits & 1) {
        add_plane<1>(line(plane, 4), n_sub, bits & 6, codes);
    }
}

// Products of 32 lanes and one quad a thread with x, the thread's column: c[half] += codes . x
__device__ __forceinline__ void multiply_quad(const lane_codes & codes, int sub, const quad_values & x, float (&c)[2][4]) {
    const uint32_t high[2] = { bf16_pair(x.x[0], x.x[2]), bf16_pair(x.x[1], x.x[3]) };
    uint32_t       low[2];
    GEAR_UNROLL
    for (int i = 0; i < 2; ++i) {
        low[i] = bf16_pair(x.x[i] - from_bf16((uint16_t) high[i]), x.x[i + 2] - from_bf16((uint16_t) (high[i] >> 16)));
    }
    GEAR_UNROLL
    for (int half = 0; half < 2; ++half) {
        uint32_t a[4];
        GEAR_UNROLL
        for (int row = 0; row < 2; ++row) {
            const uint32_t four = codes.code[sub][half][row];
            a[row]              = codes_to_bf16(four & 0x007f007fu);
            a[row + 2]          = codes_to_bf16(four >> 8 & 0x007f007fu);
        }
        mma_bf16(c[half], a, high);
        mma_bf16(c[half], a, low);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------------------------------------------------------

__device__ inline float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(all_threads, x, step);
    }
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(all_threads, x, step));
    }
    return x;
}

__device__ inline float warp_min(float x) {
    return -warp_max(-x);
}

// One run of H of n rows in shared memory, d channels each, by the whole block: the codec's steps in the codec's order.
__device__ inline void hadamard_run(float * rows, int n, int d, int stride) {
    const int   block = d & -d;
    const float norm  = 1.0f / sqrtf((float) block);
    for (int half = 1; half < block; half *= 2) {
        for (int i = (int) threadIdx.x; i < n * d / 2; i += (int) blockDim.x) {
            const int   row = i / (d / 2), pair = i % (d / 2), first = pair / half * 2 * half + pair % half;
            float *     x   = rows + (int64_t) row * stride + first;
            const float sum = x[0] + x[half], difference = x[0] - x[half];
            x[0]    = sum;
            x[half] = difference;
        }
        __syncthreads();
    }
    for (int i = (int) threadIdx.x; i < n * d; i += (int) blockDim.x) {
        rows[(int64_t) (i / d) * stride + i % d] *= norm;
    }
    __syncthreads();
}

// H of n rows of d floats.
__device__ inline void hadamard_rows(float * rows, int n, int d, int stride) {
    for (int first = 0, run; first < d; first += run) {
        run = rotation_run(d, first);
        hadamard_run(rows + first, n, run, stride);
    }
}

} // namespace gear::cuda
