// attention.h - attention over a K and a V store: q.K^T, mask, soft-cap, softmax, p.V, without ever unpacking the cache to memory.
//
// On a packed tile, with D = zero + scale * code per group and L = A B^T:
//     scores   s_t = sum_c (q_c scale_gc) code_tc + sum_c q_c zero_gc + sum_k sigma_k (q.b_k) a_tk      then the outliers of the channel vectors
//     output   o_c = sum_t (p_t scale_tg) code_tc + sum_t p_t zero_tg + sum_k sigma_k (p.a_k) b_ck      then the outliers of the token vectors
// Latent attention (MLA) has one store: a row's first channels are V. K's groups run along the tokens, so that products with p do not meet codes four at a
// time: a tile is unpacked once for all queries and heads, in the basis that it is coded in, and p meets f16 rows.
//
// All query heads of a KV head share one pass over the codes. Softmax is online over tiles. attention_scalar.cpp is the readable reference.
#pragma once

#include "codec/tile.h"
#include "store/store.h"

namespace gear {

// The share of the codes' own squared error that rounding q and p times scale to one byte may add; where it would be more, they are rounded to two.
// Two cost twice as many products.
constexpr float default_rounding = 0.04f;

class head_bases;

struct attention_op {
    gear_attention_params params;
    const store *         k;
    const store *         v;
    const tile_layout *   k_layout; // nullptr: the store's tiles are plain f16 [T, d] (callback codec), or it has none
    const tile_layout *   v_layout;
    float                 rounding = default_rounding;
    int                   d_latent = 0; // latent attention: V is the first so many channels of K, and v and v_layout are k and k_layout; 0: it is not
    head_bases *          k_bases  = nullptr; // where the queries are noted that K's basis is chosen by; has room for all heads
};

// Scratch of one op for a team of nth threads.
size_t attention_scratch_bytes(const attention_op & op, int nth);

// Called by all threads of the team. scratch is 64-byte aligned and shared by them. Does not throw, does not allocate.
void attention(const attention_op & op, const team & t, void * scratch);

} // namespace gear
