// launch.cuh - how the kernels are launched: grids, blocks and shared memory. It is compiled twice: by nvcc into the library, and in tests behind
// cuda_on_cpu.h. Whoever includes it defines, in front of it,
//     template <class K, class... A> int gear::cuda::start(K kernel, dim3 grid, int n_thread, size_t shared_bytes, stream s, A... args)
#pragma once

#include "cuda/api.h"
#include "cuda/decode.cuh"
#include "cuda/measure.cuh"
#include "cuda/observe.cuh"
#include "cuda/pack.cuh"
#include "cuda/prefill.cuh"
#include "cuda/rows.cuh"

namespace gear::cuda {

constexpr int      most_decode_rows = 32;   // rows (queries x query heads of a KV head) beyond which prefill's kernel pays
constexpr int      blocks_a_core    = 4;    // of decode, that run at once on a multiprocessor
constexpr unsigned most_blocks      = 1024; // of kernels that go round

inline int64_t pack_scratch_bytes(const tile_layout * layout, int n_block) {
    return n_block * pack_scratch_floats(*layout) * (int64_t) sizeof(float);
}

inline int start_write_rows(const write_arguments * args, stream s) {
    return args->n > 0 ? start(write_rows_kernel, dim3((unsigned) args->n, (unsigned) args->n_side), row_threads, 0, s, *args) : 0;
}

inline int start_set_slots(const slot_arguments * args, stream s) {
    const unsigned n_block = ((unsigned) args->n + row_threads - 1) / row_threads;
    return args->n > 0 ? start(set_slots_kernel, dim3(n_block < most_blocks ? n_block : most_blocks), row_threads, 0, s, *args) : 0;
}

inline int start_pack(const pack_arguments * args, int n_block, stream s) {
    const int64_t n_job = (int64_t) args->n_job * args->side.n_head;
    return n_job > 0 ? start(pack_kernel, dim3((unsigned) (n_job < n_block ? n_job : n_block)), pack_threads,
                             (size_t) pack_shared_floats(args->side.layout) * sizeof(float), s, *args)
                     : 0;
}

inline int start_unpack(const unpack_arguments * args, stream s) {
    return args->n > 0 ? start(unpack_kernel, dim3((unsigned) args->n, (unsigned) args->side.n_head), unpack_threads,
                               (size_t) args->side.layout.d_head * sizeof(float), s, *args)
                       : 0;
}

inline int start_observe(const observe_arguments * args, stream s) {
    return args->params.n_query > 0 ? start(observe_kernel, dim3((unsigned) args->n_head_kv), observe_threads, 0, s, *args) : 0;
}

inline int start_measure(const measure_arguments * args, stream s) {
    if (args->n_job == 0) {
        return 0;
    }
    const int error = start(measure_kernel, dim3((unsigned) args->n_job, (unsigned) args->side.n_head), measure_threads,
                            (size_t) measure_shared_floats(args->side.layout) * sizeof(float), s, *args);
    return error ? error : start(add_errors_kernel, dim3(1), measure_threads, 0, s, *args);
}

inline bool is_decode(const attend_arguments & args) {
    return args.params.n_query * args.n_share <= most_decode_rows || args.params.n_query == 1;
}

inline int64_t plan_attend(attend_arguments * args, int n_processor) {
    const gear_attention_params & p = args->params;
    args->n_share                   = p.n_head / args->k.n_head;
    args->n_tile                    = (p.n_kv + args->k.layout.n_token - 1) / args->k.layout.n_token;
    args->out_stride                = padded_to(2 + args->v.layout.d_head, 4);
    const int64_t n_strip           = (int64_t) p.n_stream * args->k.n_head * ((p.n_query * args->n_share + decode_rows - 1) / decode_rows);
    int64_t       n_split           = (int64_t) n_processor * blocks_a_core / (n_strip > 0 ? n_strip : 1);
    n_split                         = n_split < 1 ? 1 : n_split > args->n_tile ? args->n_tile : n_split;
    n_split                         = n_split < 1 ? 1 : n_split;
    args->tiles_of_split            = (int) ((args->n_tile + n_split - 1) / n_split);
    args->tiles_of_split            = args->tiles_of_split < 1 ? 1 : args->tiles_of_split;
    args->n_split                   = (args->n_tile + args->tiles_of_split - 1) / args->tiles_of_split;
    args->n_split                   = args->n_split < 1 ? 1 : args->n_split;
    return is_decode(*args) ? (int64_t) p.n_stream * p.n_head * p.n_query * args->n_split * args->out_stride * (int64_t) sizeof(float) : 0;
}

template <int bits_k, int bits_v, int n_block> int start_decode(const attend_arguments & args, stream s) {
    decode_shared  sizes;
    const unsigned n_row_block = (unsigned) (args.params.n_query * args.n_share + decode_rows - 1) / decode_rows;
    lay_out(args, static_cast<unsigned char *>(nullptr), sizes);
    const int error = start(decode_kernel<bits_k, bits_v, n_block>,
                            dim3((unsigned) args.n_split, (unsigned) args.k.n_head * n_row_block, (unsigned) args.params.n_stream), decode_threads,
                            (size_t) sizes.bytes, s, args);
    return error ? error
                 : start(merge_kernel, dim3((unsigned) args.params.n_query, (unsigned) args.params.n_head, (unsigned) args.params.n_stream), merge_threads,
                         0, s, args);
}

template <int max_d> int start_prefill(const attend_arguments & args, stream s) {
    prefill_shared<max_d> sizes;
    lay_out<max_d>(args, nullptr, sizes);
    const unsigned rows = prefill_sizes<max_d>::rows, n_row = (unsigned) (args.params.n_query * args.n_share);
    return start(prefill_kernel<max_d>, dim3((n_row + rows - 1) / rows, (unsigned) args.k.n_head, (unsigned) args.params.n_stream),
                 prefill_sizes<max_d>::threads, (size_t) sizes.bytes, s, args);
}

// The bits that have kernels of their own are the presets'; all others share one that looks.
template <int n_block> int start_decode_of_bits(const attend_arguments & args, int k, int v, stream s) {
    if (k == v && k >= 2 && k <= 4) {
        return k == 4 ? start_decode<4, 4, n_block>(args, s) : k == 3 ? start_decode<3, 3, n_block>(args, s) : start_decode<2, 2, n_block>(args, s);
    }
    return start_decode<0, 0, n_block>(args, s);
}

inline int start_attend(const attend_arguments * args, stream s) {
    if (args->params.n_query == 0) {
        return 0;
    }
    if (!is_decode(*args)) {
        const int d = most(args->k.layout.d_head, args->v.layout.d_head);
        return d <= 64    ? start_prefill<64>(*args, s)
               : d <= 128 ? start_prefill<128>(*args, s)
               : d <= 256 ? start_prefill<256>(*args, s)
                          : start_prefill<max_d_head>(*args, s);
    }
    const int k = args->k.has_tiles ? args->k.layout.config.bits : 0, v = args->v.has_tiles ? args->v.layout.config.bits : 0;
    return args->v.layout.d_head <= large_head ? start_decode_of_bits<few_blocks>(*args, k, v, s) : start_decode_of_bits<many_blocks>(*args, k, v, s);
}

} // namespace gear::cuda
