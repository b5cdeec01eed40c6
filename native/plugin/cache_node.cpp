#include "plugin/cache_node.h"

#include "plugin/device.h"

#include <algorithm>
#include <cstring>

namespace gear {

namespace {

// The [d_head, n_kv, n_head_kv, n_stream] view that attention reads the cache through, from some stream on.
bool is_attention_view(const abi::tensor * view, const cache_tensor & tensor) {
    const size_t row = (size_t) tensor.row_bytes(), stream = (size_t) tensor.stream_bytes();
    return view->ne[0] * view->ne[2] == tensor.n_embd && view->nb[0] == 2 && view->nb[1] == row && view->nb[2] == (size_t) view->ne[0] * 2 &&
           view->ne[1] <= tensor.n_cell && (view->ne[3] == 1 || view->nb[3] == stream) && view->view_offs % stream == 0;
}

// Latent attention's V: the first channels of the rows that K's view is of.
bool is_latent_view(const abi::tensor * v, const abi::tensor * k) {
    return v->type == k->type && v->ne[0] <= k->ne[0] && std::equal(v->ne + 1, v->ne + abi::max_dims, k->ne + 1) &&
           std::equal(v->nb, v->nb + abi::max_dims, k->nb) && v->view_offs == k->view_offs;
}

} // namespace

bool touches_cache(const abi::tensor * op) {
    return std::any_of(op->src, op->src + abi::max_src, [](const abi::tensor * source) { return cache_of(source) != nullptr; });
}

kv_device * cache_owner(const abi::tensor * op) {
    if (is_view_op(op->op)) {
        return cache_of(op) ? &kv_buffer::of(op)->device() : nullptr;
    }
    for (const abi::tensor * source : op->src) {
        if (cache_of(source)) {
            return &kv_buffer::of(source)->device();
        }
    }
    return nullptr;
}

bool is_row_write(const abi::tensor * op) {
    const abi::numbers & number = abi::number();
    const cache_tensor * tensor = cache_of(op->src[2]);
    const abi::tensor *  rows = op->src[0], *cells = op->src[1];
    return tensor && op->op == number.op_set_rows && op->ne[0] == tensor->n_embd && op->ne[2] == 1 && op->ne[3] == 1 && op->view_offs == 0 &&
           rows->ne[2] == 1 && rows->ne[3] == 1 && (rows->type == number.type_f32 || rows->type == number.type_f16) &&
           (cells->type == number.type_i64 || cells->type == number.type_i32);
}

bool is_attention(const abi::tensor * op) {
    const cache_tensor *k = cache_of(op->src[1]), *v = cache_of(op->src[2]);
    return op->op == abi::number().op_flash_attn && k && v && k->side == GEAR_SIDE_K && is_attention_view(op->src[1], *k) &&
           (k == v ? is_latent_view(op->src[2], op->src[1]) : v->side == GEAR_SIDE_V && is_attention_view(op->src[2], *v)) &&
           op->src[0]->type == abi::number().type_f32;
}

int latent_channels(const abi::tensor * op) {
    return cache_of(op->src[1]) == cache_of(op->src[2]) ? (int) op->src[2]->ne[0] : 0;
}

bool is_shift(const abi::tensor * op) {
    const abi::tensor *  rows   = op->src[0];
    const cache_tensor * tensor = cache_of(rows);
    return tensor && op->op == abi::number().op_rope && tensor->side == GEAR_SIDE_K && cache_of(op) == tensor &&
           rows->nb[2] == (size_t) tensor->row_bytes() && rows->ne[2] == tensor->n_cell * tensor->n_stream && rows->ne[3] == 1 &&
           op->src[1]->type == abi::number().type_i32 && op->src[1]->ne[0] == rows->ne[2];
}

bool observe(const abi::tensor * op) {
    if (is_view_op(op->op)) {
        return cache_of(op) != nullptr;
    }
    bool touches = false;
    for (int i = 0; i < abi::max_src; ++i) {
        cache_tensor * tensor = cache_of(op->src[i]);
        if (!tensor) {
            continue;
        }
        touches = true;
        const std::lock_guard<std::mutex> guard(tensor->home.memory().lock()); // statistics may be asked for meanwhile
        observed_use &                    use = tensor->use;
        if (i == 2 && is_row_write(op)) {
            use.n_rows = std::max(use.n_rows, (int) op->src[0]->ne[1]);
        } else if ((i == 1 || i == 2) && is_attention(op)) {
            use.is_latent = latent_channels(op) > 0;
            if (i == 1 || !use.is_latent) {
                use.d_head = (int) op->src[i]->ne[0];
                use.n_head = (int) op->src[i]->ne[2];
            }
        } else if (!(i == 0 && is_shift(op)) && use.other.empty()) {
            use.other = abi::ggml().ggml_op_name(op->op);
        }
    }
    return touches;
}

std::vector<uint8_t> shifted_cells(const void * shift, int64_t n) {
    std::vector<uint8_t> marked((size_t) n);
    const auto *         by = static_cast<const int32_t *>(shift);
    std::transform(by, by + n, marked.begin(), [](int32_t cells) { return (uint8_t) (cells != 0); });
    return marked;
}

} // namespace gear
