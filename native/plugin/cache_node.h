// cache_node.h - what a node of ggml's graph does with cache tensors.
#pragma once

#include "plugin/kv_buffer.h"

namespace gear {

inline bool is_view_op(int op) {
    const abi::numbers & number = abi::number();
    return op == number.op_none || op == number.op_view || op == number.op_reshape || op == number.op_permute || op == number.op_transpose;
}

// The cache tensor that a source of a node is, nullptr: none.
inline cache_tensor * cache_of(const abi::tensor * source) {
    return source ? kv_buffer::find(source) : nullptr;
}

bool        touches_cache(const abi::tensor * op);
// The device on whose cache an op works; nullptr: on none.
kv_device * cache_owner(const abi::tensor * op);

// SET_ROWS of whole rows: cells from src[1], rows from src[0], into src[2].
bool is_row_write(const abi::tensor * op);
// FLASH_ATTN_EXT over views of K (src[1]) and V (src[2]); in latent attention (MLA) V is a view of K's first channels.
bool is_attention(const abi::tensor * op);
// How many those are; 0: V has a cache of its own.
int  latent_channels(const abi::tensor * op);
// The K-shift: ROPE in place over all cells of src[0], by src[1].
bool is_shift(const abi::tensor * op);

// Note what op does with cache tensors. false: it touches none.
bool observe(const abi::tensor * op);

// The cells that a K-shift moves: u8 [n_stream * n_cell].   shift i32 [n]
std::vector<uint8_t> shifted_cells(const void * shift, int64_t n);

// A K-shift node for a few cells only: ROPE in place over rows that lie elsewhere.
struct part_of_shift {
    abi::tensor rows, positions, rotated;

    // rows: of n cells from `first` on, as whole rows of `row_bytes`, in `buffer`
    void make(const abi::tensor * node, size_t row_bytes, int64_t first, int64_t n, uint16_t * data, abi::buffer * buffer) {
        rows       = *node->src[0];
        positions  = *node->src[1];
        rotated    = *node;
        rows.ne[2] = rotated.ne[2] = positions.ne[0] = n;
        rows.nb[3] = rotated.nb[3] = rows.nb[2] * (size_t) n;
        rows.view_src = positions.view_src = nullptr;
        rows.view_offs = positions.view_offs = rotated.view_offs = 0;
        rows.buf = rotated.buf = buffer;
        rows.data = rotated.data = reinterpret_cast<char *>(data) + node->src[0]->view_offs % row_bytes;
        positions.data           = static_cast<int32_t *>(node->src[1]->data) + first;
        rotated.src[0]           = &rows;
        rotated.src[1]           = &positions;
        rotated.view_src         = &rows;
    }
};

} // namespace gear
