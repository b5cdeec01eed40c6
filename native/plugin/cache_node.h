// cache_node.h - what a node of ggml's graph does with a cache tensor. Cache: cache_tensor, or its like in device memory.
#pragma once

#include "gearcpp.h"
#include "plugin/abi.h"

namespace gear {

inline bool is_view_op(int op) {
    const abi::numbers & number = abi::number();
    return op == number.op_none || op == number.op_view || op == number.op_reshape || op == number.op_permute || op == number.op_transpose;
}

// SET_ROWS of whole rows: cells from src[1], rows from src[0], into src[2].
template <class Cache> bool is_row_write(const abi::tensor * op, const Cache & tensor) {
    const abi::numbers & number = abi::number();
    const abi::tensor *  rows = op->src[0], *cells = op->src[1];
    return op->op == number.op_set_rows && op->ne[0] == tensor.n_embd && op->ne[2] == 1 && op->ne[3] == 1 && op->view_offs == 0 && rows->ne[2] == 1 &&
           rows->ne[3] == 1 && (rows->type == number.type_f32 || rows->type == number.type_f16) &&
           (cells->type == number.type_i64 || cells->type == number.type_i32);
}

// The [d_head, n_kv, n_head_kv, n_stream] view that attention reads the cache through, from some stream on.
template <class Cache> bool is_attention_view(const abi::tensor * view, const Cache & tensor) {
    const size_t row = (size_t) tensor.row_bytes(), stream = row * (size_t) tensor.n_cell;
    return view->ne[0] * view->ne[2] == tensor.n_embd && view->nb[0] == 2 && view->nb[1] == row && view->nb[2] == (size_t) view->ne[0] * 2 &&
           view->ne[1] <= tensor.n_cell && (view->ne[3] == 1 || view->nb[3] == stream) && view->view_offs % stream == 0;
}

template <class Cache> bool is_attention(const abi::tensor * op, const Cache * k, const Cache * v) {
    return op->op == abi::number().op_flash_attn && k && v && k != v && k->side == GEAR_SIDE_K && v->side == GEAR_SIDE_V &&
           is_attention_view(op->src[1], *k) && is_attention_view(op->src[2], *v) && op->src[0]->type == abi::number().type_f32;
}

// The K-shift: ROPE in place over all cells. `result`: the cache that op is a view of.
template <class Cache> bool is_shift(const abi::tensor * op, const Cache & tensor, const Cache * result) {
    const abi::tensor * rows = op->src[0];
    return op->op == abi::number().op_rope && tensor.side == GEAR_SIDE_K && result == &tensor && rows->nb[2] == (size_t) tensor.row_bytes() &&
           rows->ne[2] == tensor.n_cell * tensor.n_stream && rows->ne[3] == 1 && op->src[1]->type == abi::number().type_i32 &&
           op->src[1]->ne[0] == rows->ne[2];
}

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
