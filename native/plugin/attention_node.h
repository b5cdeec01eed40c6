// attention_node.h - a FLASH_ATTN_EXT node of ggml as the parameters of our attention.
#pragma once

#include "gearcpp.h"
#include "plugin/abi.h"

#include <cstring>

namespace gear {

// stream_bytes: of one stream of the cache tensor that src[1] is a view of.
inline gear_attention_params attention_params(const abi::tensor * node, int64_t stream_bytes) {
    const abi::tensor *   q = node->src[0], *view = node->src[1], *mask = node->src[3], *sinks = node->src[4];
    gear_attention_params p = {};
    p.n_query               = (int32_t) q->ne[1];
    p.n_head                = (int32_t) q->ne[2];
    p.n_kv                  = (int32_t) view->ne[1];
    p.stream0               = (int32_t) (view->view_offs / (size_t) stream_bytes);
    p.n_stream              = (int32_t) q->ne[3];
    p.q                     = static_cast<const float *>(q->data);
    p.sinks                 = sinks ? static_cast<const float *>(sinks->data) : nullptr;
    p.out                   = static_cast<float *>(node->data);
    for (int i = 0; i < 3; ++i) {
        p.q_stride[i]    = (int64_t) q->nb[i + 1];
        p.out_stride[i]  = (int64_t) node->nb[i + 1];
        p.mask_stride[i] = mask ? (int64_t) mask->nb[i + 1] : 0;
    }
    if (mask) {
        p.mask          = static_cast<const uint16_t *>(mask->data);
        p.mask_n_head   = (int32_t) mask->ne[2];
        p.mask_n_stream = (int32_t) mask->ne[3];
    }
    memcpy(&p.scale, &node->op_params[0], sizeof(float));
    memcpy(&p.max_bias, &node->op_params[1], sizeof(float));
    memcpy(&p.softcap, &node->op_params[2], sizeof(float));
    return p;
}

} // namespace gear
