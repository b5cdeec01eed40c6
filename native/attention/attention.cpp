// attention.cpp - the op: who computes what, the walk over tiles with its online softmax, and the merge of ranges.
//
// The work is a grid of tasks: stream x KV head x block of queries x range of tiles. A task's rows are its queries times the query heads that share the
// KV head, query by query. With one range of tiles a task writes its output; with several (decode with few KV heads) it leaves max, sum and output in
// scratch, and after a barrier each row is merged from its ranges.
//
// One file of more than 500 lines: plan, worker and merge share the layout of one piece of scratch, which no other file should know.
#include "attention/attention.h"

#include "attention/kernels.h"
#include "codec/basis.h"
#include "codec/codec.h"
#include "common/half_rows.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace gear {

namespace {

constexpr int decode_queries = 8;   // up to so many queries form one block, and tiles are split over threads
constexpr int block_rows     = 128; // rows of a block beyond that: enough to pay for a tile's preparation, few enough for the cache
constexpr int copying_rows   = 16;  // from so many rows on it pays to lay a tile's exact rows side by side
constexpr int tasks_a_thread = 4;   // so that no thread waits long for the last one

int ceil_div(int64_t a, int64_t b) {
    return (int) ((a + b - 1) / b);
}

// How an op is cut into tasks.
struct plan {
    const attention_op &          op;
    const gear_attention_params & params;
    int                           n_head_kv;
    int                           n_share; // query heads of a KV head
    int                           d_k, d_v;
    int                           d_out;    // channels that are added up: V's, or in latent attention all that K's rotation mixes with them
    int                           tile;     // cells
    int                           n_tile;   // that n_kv reaches into
    size_t                        q_stride; // of a row of q and of the output in floats
    size_t                        out_stride;
    int                           queries; // of a block
    int                           n_block;
    int                           tiles; // of a range
    int                           n_range;

    plan(const attention_op & op, int nth) : op(op), params(op.params) {
        n_head_kv  = op.k->shape().n_head;
        n_share    = params.n_head / n_head_kv;
        d_k        = op.k->shape().d_head;
        d_v        = op.d_latent > 0 ? op.d_latent : op.v->shape().d_head;
        d_out      = is_latent() && rotates_v() ? channels_of_runs(d_k, d_v) : d_v;
        tile       = op.k->shape().tile;
        n_tile     = ceil_div(params.n_kv, tile);
        q_stride   = padded(d_k, depth_padding);
        out_stride = padded(d_out, lane_padding);
        queries    = params.n_query <= decode_queries ? std::max(1, params.n_query) : std::max(decode_queries, block_rows / n_share);
        n_block    = ceil_div(params.n_query, queries);
        tiles      = std::max(1, ceil_div(n_tile, ceil_div(tasks_a_thread * nth, std::max(1, n_strip()))));
        n_range    = std::max(1, ceil_div(n_tile, tiles));
    }

    bool is_latent() const { return op.d_latent > 0; }
    bool rotates_k() const { return op.k_layout && op.k_layout->config.rotate; }
    bool rotates_v() const { return op.v_layout && op.v_layout->config.rotate; }
    int  rows() const { return queries * n_share; }                        // of a block, at most
    int  n_strip() const { return params.n_stream * n_head_kv * n_block; } // tasks but for the ranges
    int  n_task() const { return n_strip() * n_range; }
};

// One block of queries of one KV head.
struct strip {
    int stream; // of the op, from 0
    int head;   // KV head
    int query;  // first
    int n_query;
};

// The last queries see most under a causal mask: their blocks come first.
strip strip_at(const plan & p, int index) {
    const int n_pair = p.params.n_stream * p.n_head_kv;
    const int block = p.n_block - 1 - index / n_pair, pair = index % n_pair, query = block * p.queries;
    return { pair / p.n_head_kv, pair % p.n_head_kv, query, std::min(p.queries, p.params.n_query - query) };
}

// Memory laid out in order, every piece on a cache line of its own. From address 0 it only counts.
class arena {
  public:
    explicit arena(uintptr_t start) : next_(start) {}
    template <class T> T * take(size_t n) {
        const uintptr_t piece = next_;
        next_ += (n * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T *>(piece);
    }
    uintptr_t next() const { return next_; }

  private:
    uintptr_t next_;
};

// One side's tile as a task reads it.
struct side_tile {
    prepared_tile packed;
    bool          has_packed; // some cell in range is read from the packed tile
    bool          is_prepared;
    exact_rows    exact;
    uint16_t *    copy;   // [tile, d_head padded] exact rows side by side
    int32_t *     absent; // [n_absent] cells never written
    int           n_absent;

    side_tile(arena & memory, const tile_layout * layout, float rounding, int tile, int d_head) {
        packed          = {};
        packed.rounding = rounding;
        if (layout) {
            packed.layout        = layout;
            const size_t n_group = (size_t) packed.n_lane_group() * packed.depth_stride();
            packed.scale         = memory.take<float>(n_group);
            packed.zero          = memory.take<float>(n_group);
            packed.widest        = memory.take<float>(packed.depth_stride());
            packed.square        = memory.take<float>(packed.depth_stride());
            packed.A             = memory.take<float>((size_t) packed.n_factor() * layout->n_token);
            packed.B             = memory.take<float>((size_t) packed.n_factor() * layout->d_head);
            packed.outlier       = memory.take<float>((size_t) layout->part.n_vector * layout->part.n_outlier);
        }
        exact.row   = memory.take<const uint16_t *>(tile);
        exact.token = memory.take<int32_t>(tile);
        copy        = memory.take<uint16_t>((size_t) tile * padded(d_head, exact_padding));
        absent      = memory.take<int32_t>(tile);
    }
};

// A tile's packed rows as V of latent attention: f16, in the basis that they are coded in.
struct unpacked_tile {
    const tile_layout * layout = nullptr; // nullptr: nothing is unpacked
    float *             numbers;          // of unpack_coded
    float *             x;                // f32 [tile, d_head]
    uint16_t *          rows;             // f16 [tile, stride]
    size_t              stride;
    exact_rows          packed; // those of the tile's rows in range that are not exact

    unpacked_tile(arena & memory, const tile_layout * layout_, int tile, int d_head) : layout(layout_) {
        if (layout) {
            stride       = padded(d_head, lane_padding);
            numbers      = memory.take<float>(unpack_numbers(*layout));
            x            = memory.take<float>((size_t) tile * d_head);
            rows         = memory.take<uint16_t>(tile * stride);
            packed.row   = memory.take<const uint16_t *>(tile);
            packed.token = memory.take<int32_t>(tile);
        }
    }

    void add(int token) {
        packed.token[packed.n] = token;
        packed.row[packed.n++] = rows + token * stride;
    }

    void unpack(const uint8_t * tile) {
        const int d = layout->d_head;
        unpack_coded(*layout, tile, numbers, x);
        for (int t = 0; t < layout->n_token; ++t) {
            uint16_t * to = rows + t * stride;
            float_to_half(x + (size_t) t * d, to, d);
            std::fill(to + d, to + stride, 0);
        }
    }
};

// The basis that a tile's rows are coded in.
struct tile_basis {
    bool    is_set = false, is_weighted = false;
    uint8_t bytes[basis_bytes(max_d_head)];
    float   w[max_d_head];

    static const uint8_t * bytes_of(const prepared_tile & p) { return p.tile + p.layout->part.basis; }

    bool is_of(const prepared_tile & p) const {
        return is_set && (p.layout->part.basis < 0 || memcmp(bytes, bytes_of(p), basis_bytes(p.layout->d_head)) == 0);
    }
    void set(const prepared_tile & p) {
        is_set      = true;
        is_weighted = p.layout->part.basis >= 0;
        if (is_weighted) {
            memcpy(bytes, bytes_of(p), basis_bytes(p.layout->d_head));
            load_weights(bytes, p.layout->d_head, w);
        }
    }
};

struct token_range {
    int  first, last;
    bool empty() const { return first >= last; }
};

token_range join(const token_range & a, const token_range & b) {
    return a.empty() ? b : b.empty() ? a : token_range{ std::min(a.first, b.first), std::max(a.last, b.last) };
}

bool is_hidden(uint16_t mask) {
    return mask == 0xfc00; // -infinity
}

// Four cells at once.
bool are_hidden(const uint16_t * mask) {
    uint64_t four;
    memcpy(&four, mask, sizeof four);
    return four == 0xfc00fc00fc00fc00;
}

token_range visible_part(const uint16_t * mask, int n) {
    int first = 0, last = n;
    while (first + 4 <= n && are_hidden(mask + first)) {
        first += 4;
    }
    while (first < n && is_hidden(mask[first])) {
        ++first;
    }
    while (last - 4 >= first && are_hidden(mask + last - 4)) {
        last -= 4;
    }
    while (last > first && is_hidden(mask[last - 1])) {
        --last;
    }
    return { first, last };
}

// The part of the ascending list that lies in range.
exact_rows part_of(const exact_rows & all, const token_range & range) {
    const int32_t * first = std::lower_bound(all.token, all.token + all.n, range.first);
    const int32_t * last  = std::lower_bound(first, (const int32_t *) all.token + all.n, range.last);
    const ptrdiff_t skip  = first - all.token;
    return { (int) (last - first), all.row + skip, all.token + skip };
}

template <class T> T * at_bytes(T * base, int64_t bytes) {
    return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(base) + bytes);
}

// ALiBi's slope of a query head, as ggml defines it.
float slope_of(const gear_attention_params & params, int head) {
    if (params.max_bias <= 0) {
        return 1.0f;
    }
    const int n_power = 1 << (int) std::floor(std::log2(params.n_head));
    return head < n_power ? std::pow(2.0f, -params.max_bias / n_power * (head + 1))
                          : std::pow(2.0f, -params.max_bias / 2 / n_power * (2 * (head - n_power) + 1));
}

// What a range of tiles left for the merge.
struct partial {
    softmax_state * state; // [rows]
    float *         out;   // [rows, out_stride]
};

partial partial_of(const plan & p, arena & memory) {
    return { memory.take<softmax_state>(p.rows()), memory.take<float>(p.rows() * p.out_stride) };
}

size_t partial_bytes(const plan & p) {
    arena memory(0);
    partial_of(p, memory);
    return p.n_range > 1 ? memory.next() : 0;
}

partial partial_at(const plan & p, void * partials, int task) {
    arena memory((uintptr_t) partials + task * partial_bytes(p));
    return partial_of(p, memory);
}

void write_row(const plan & p, const strip & s, int row, const softmax_state & state, const float * out) {
    const gear_attention_params & params = p.params;
    const int                     query = s.query + row / p.n_share, head = s.head * p.n_share + row % p.n_share;
    const float                   sink   = params.sinks ? params.sinks[head] : -INFINITY;
    const float                   max    = std::max(state.max, sink);
    const float                   shrink = state.max == -INFINITY ? 0.0f : std::exp(state.max - max); // everything hidden: 0, not NaN
    const float                   sum    = state.sum * shrink + (sink == -INFINITY ? 0.0f : std::exp(sink - max));
    const float                   factor = sum > 0 ? shrink / sum : 0.0f;
    float *                       to = at_bytes(params.out, head * params.out_stride[0] + query * params.out_stride[1] + s.stream * params.out_stride[2]);
    for (int c = 0; c < p.d_v; ++c) {
        to[c] = out[c] * factor;
    }
}

// One thread's memory, and the steps of a task.
class worker {
  public:
    worker(const plan & p, arena & memory)
        : p(p), kernels(current_attention_kernels()), k(memory, p.op.k_layout, p.op.rounding, p.tile, p.d_k),
          v(memory, p.is_latent() ? nullptr : p.op.v_layout, p.op.rounding, p.tile, p.is_latent() ? p.d_k : p.d_v),
          latent(memory, p.is_latent() ? p.op.v_layout : nullptr, p.tile, p.d_k) {
        v.packed.layout = p.op.v_layout;
        q               = memory.take<float>(p.rows() * p.q_stride);
        q_rotated       = p.rotates_k() ? memory.take<float>(p.rows() * p.q_stride) : q;
        slope           = memory.take<float>(p.rows());
        state           = memory.take<softmax_state>(p.rows());
        out             = memory.take<float>(p.rows() * p.out_stride);
        out_rotated     = p.rotates_v() ? memory.take<float>(p.rows() * p.out_stride) : out;
        scores          = memory.take<float>((size_t) slice_rows * p.tile);
        scores_shown    = memory.take<float>((size_t) slice_rows * p.tile);
    }

    void run(int task, void * partials) {
        const strip s      = strip_at(p, task / p.n_range);
        const int   range  = task % p.n_range;
        const int   n_rows = s.n_query * p.n_share;
        load_queries(s);
        for (int tile = range * p.tiles; tile < std::min(p.n_tile, (range + 1) * p.tiles); ++tile) {
            attend_tile(s, tile);
        }
        rotate_back(n_rows);
        if (p.n_range == 1) {
            for (int row = 0; row < n_rows; ++row) {
                write_row(p, s, row, state[row], out + row * p.out_stride);
            }
        } else {
            const partial to = partial_at(p, partials, task);
            std::copy(state, state + n_rows, to.state);
            std::copy(out, out + n_rows * p.out_stride, to.out);
        }
    }

  private:
    // scale goes into q, divided by the soft-cap where there is one.
    void load_queries(const strip & s) {
        const gear_attention_params & params = p.params;
        const float                   scale  = params.softcap != 0 ? params.scale / params.softcap : params.scale;
        for (int row = 0; row < s.n_query * p.n_share; ++row) {
            const int     query = s.query + row / p.n_share, head = s.head * p.n_share + row % p.n_share;
            const float * from = at_bytes(params.q, query * params.q_stride[0] + head * params.q_stride[1] + s.stream * params.q_stride[2]);
            float *       to   = q + row * p.q_stride;
            std::transform(from, from + p.d_k, to, [=](float x) { return x * scale; });
            std::fill(to + p.d_k, to + p.q_stride, 0.0f);
            slope[row] = slope_of(params, head);
            state[row] = { -INFINITY, 0.0f };
        }
        const size_t n_out = s.n_query * p.n_share * p.out_stride;
        std::fill(out, out + n_out, 0.0f);
        std::fill(out_rotated, out_rotated + n_out, 0.0f);
        k_basis.is_set = v_basis.is_set = false;
    }

    // q.k = (H (q / w)).y where y = H (w o k): the queries as packed tiles of this basis want them.
    void rotate_queries(int n_rows) {
        for (int row = 0; row < n_rows; ++row) {
            const float * from = q + row * p.q_stride;
            float *       to   = q_rotated + row * p.q_stride;
            std::copy(from, from + p.q_stride, to);
            for (int c = 0; k_basis.is_weighted && c < p.d_k; ++c) {
                to[c] /= k_basis.w[c];
            }
            hadamard(to, p.d_k);
        }
    }

    // p.V = (H (p.Y)) / w: what was added up in this basis joins the rest.
    void rotate_back(int n_rows) {
        for (int row = 0; v_basis.is_set && row < n_rows; ++row) {
            float * rotated = out_rotated + row * p.out_stride;
            hadamard_part(rotated, p.op.v->shape().d_head, p.d_v);
            for (int c = 0; c < p.d_v; ++c) {
                out[row * p.out_stride + c] += v_basis.is_weighted ? rotated[c] / v_basis.w[c] : rotated[c];
            }
        }
    }

    // Tiles of a head have one basis, unless they come from elsewhere: the queries are seldom rotated twice.
    void enter_bases(int n_rows) {
        if (p.rotates_k() && k.has_packed && !k_basis.is_of(k.packed)) {
            k_basis.set(k.packed);
            rotate_queries(n_rows);
        }
        if (p.rotates_v() && v.has_packed && !v_basis.is_of(v.packed)) {
            rotate_back(n_rows);
            if (v_basis.is_set) {
                std::fill(out_rotated, out_rotated + n_rows * p.out_stride, 0.0f);
            }
            v_basis.set(v.packed);
        }
    }

    const uint16_t * mask_of(const strip & s, int query, int head, int tile) const {
        const gear_attention_params & params = p.params;
        const int64_t                 bytes =
            query * params.mask_stride[0] + head % params.mask_n_head * params.mask_stride[1] + s.stream % params.mask_n_stream * params.mask_stride[2];
        return at_bytes(params.mask, bytes) + (size_t) tile * p.tile;
    }

    // From the first to the last cell of the tile that one of the rows may see, the first rounded down to a lane block.
    token_range visible(const strip & s, int tile, int first_row, int n_rows) const {
        const int n_cell = std::min(p.tile, p.params.n_kv - tile * p.tile);
        if (!p.params.mask) {
            return { 0, n_cell };
        }
        const int   step  = p.params.mask_n_head == 1 ? p.n_share : 1; // one mask for all heads: look at it once a query
        token_range range = { 0, 0 };
        for (int row = first_row - first_row % step; row < first_row + n_rows; row += step) {
            const uint16_t * mask = mask_of(s, s.query + row / p.n_share, s.head * p.n_share + row % p.n_share, tile);
            range                 = join(range, visible_part(mask, n_cell));
        }
        return { range.first / lane_padding * lane_padding, range.last };
    }

    void attend_tile(const strip & s, int tile) {
        const int         n_rows = s.n_query * p.n_share;
        const token_range range  = visible(s, tile, 0, n_rows);
        if (range.empty()) {
            return;
        }
        open(k, *p.op.k, s, tile, range);
        open(v, *p.op.v, s, tile, range);
        const uint8_t * next = tile + 1 < p.n_tile ? packed_tile(*p.op.k, s, tile + 1) : nullptr;
        prefetch_next(k, v, p.is_latent() ? next : v.has_packed ? v.packed.tile : nullptr);
        prefetch_next(v, k, next);
        enter_bases(n_rows);
        for (int row = 0; row < n_rows; row += slice_rows) {
            const int n = std::min(slice_rows, n_rows - row);
            attend_slice(s, tile, row, n, n == n_rows ? range : visible(s, tile, row, n));
        }
    }

    const uint8_t * packed_tile(const store & from, const strip & s, int tile) const {
        const uint8_t * packed = from.view(p.params.stream0 + s.stream, tile).packed;
        return packed ? packed + s.head * from.tile_bytes() : nullptr;
    }

    // Tell one side's kernels which tile of the other side comes next.
    static void prefetch_next(side_tile & side, const side_tile & other, const uint8_t * next) {
        const tile_layout * layout = other.packed.layout;
        side.packed.next           = next;
        side.packed.n_next         = next && layout ? layout->part.bytes : 0;
        side.packed.next_first     = layout ? layout->part.scale / 64 * 64 : 0;
    }

    // Find out where each cell in range is read from.
    void open(side_tile & side, const store & from, const strip & s, int tile, const token_range & range) {
        const int           stream = p.params.stream0 + s.stream;
        const tile_view     view   = from.view(stream, tile);
        const uint8_t *     packed = view.packed ? view.packed + s.head * from.tile_bytes() : nullptr;
        const size_t        d      = from.shape().d_head;
        const tile_layout * layout = side.packed.layout;
        side.has_packed            = layout && view.n_packed > 0;
        side.exact.n               = 0;
        side.n_absent              = 0;
        const bool all_packed      = layout && view.n_packed == view.n_token;
        for (int t = range.first; !all_packed && t < range.last; ++t) {
            if (view.slot[t] >= 0) {
                add(side.exact, t, from.row(stream, view.slot[t]) + s.head * d);
            } else if (!packed || !view.in_tile[t]) {
                side.absent[side.n_absent++] = t;
            } else if (!layout) { // a callback codec's tile: f16 [T, d]
                add(side.exact, t, (const uint16_t *) packed + t * d);
            }
        }
        if (d % exact_padding != 0 || s.n_query * p.n_share >= copying_rows) {
            copy_exact(side, d);
        }
        if (side.has_packed) {
            side.packed.tile = packed;
        }
        side.is_prepared = false;
        if (&side == &v && latent.layout) {
            latent.packed.n = 0;
            for (int t = range.first; side.has_packed && t < range.last; ++t) {
                if (view.slot[t] < 0 && view.in_tile[t]) {
                    latent.add(t);
                }
            }
        }
    }

    // When a tile is first multiplied with and no sooner: until then its ranges are still being fetched.
    const prepared_tile & prepared(side_tile & side) {
        if (!side.is_prepared) {
            kernels.prepare(side.packed);
            side.is_prepared = true;
        }
        return side.packed;
    }

    // In the store a head's rows lie a whole row of all heads apart, where they crowd into a few sets of the cache.
    static void copy_exact(side_tile & side, int d) {
        const int stride = padded(d, exact_padding);
        for (int j = 0; j < side.exact.n; ++j) {
            uint16_t * to = side.copy + j * stride;
            std::copy(side.exact.row[j], side.exact.row[j] + d, to);
            std::fill(to + d, to + stride, 0);
            side.exact.row[j] = to;
        }
    }

    static void add(exact_rows & list, int token, const uint16_t * row) {
        list.token[list.n] = token;
        list.row[list.n++] = row;
    }

    void attend_slice(const strip & s, int tile, int first_row, int n, const token_range & range) {
        if (range.empty()) {
            return;
        }
        score(first_row, n, range);
        for (int i = 0; i < n; ++i) {
            const int        row  = first_row + i;
            const uint16_t * mask = p.params.mask ? mask_of(s, s.query + row / p.n_share, s.head * p.n_share + row % p.n_share, tile) : nullptr;
            softmax_row(row, scores + i * p.tile, mask, range);
        }
        add_p_v(first_row, n, range);
    }

    // scores = q.K^T
    void score(int first_row, int n, const token_range & range) {
        const rows y         = { scores, (size_t) p.tile };
        const int  last_lane = padded(range.last, lane_padding);
        if (k.has_packed) {
            for (int i = 0; i < n; ++i) {
                std::fill(y.row(i) + range.first, y.row(i) + last_lane, 0.0f);
            }
            kernels.multiply(prepared(k), { q_rotated + first_row * p.q_stride, p.q_stride, n }, range.first, last_lane, y);
        }
        kernels.exact_scores(part_of(k.exact, range), p.d_k, { q + first_row * p.q_stride, p.q_stride, n }, y);
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < k.n_absent; ++j) {
                y.row(i)[k.absent[j]] = 0.0f;
            }
        }
    }

    // Scores of one row become p; cells out of range get 0.
    void softmax_row(int row, float * score, const uint16_t * mask, const token_range & range) {
        const float factor =
            kernels.softmax(score + range.first, range.last - range.first, p.params.softcap, mask ? mask + range.first : nullptr, slope[row], state[row]);
        std::fill(score, score + range.first, 0.0f);
        std::fill(score + range.last, score + p.tile, 0.0f);
        if (factor != 1.0f) {
            kernels.rescale(out + row * p.out_stride, p.out_stride, factor);
            if (p.rotates_v()) {
                kernels.rescale(out_rotated + row * p.out_stride, p.out_stride, factor);
            }
        }
    }

    // out += p.V
    void add_p_v(int first_row, int n, const token_range & range) {
        const size_t     offset = first_row * p.out_stride;
        const const_rows all    = { scores, (size_t) p.tile, n };
        if (v.has_packed && latent.layout) {
            if (!v.is_prepared) {
                latent.unpack(v.packed.tile);
                v.is_prepared = true;
            }
            kernels.exact_output(part_of(latent.packed, range), p.d_out, all, { out_rotated + offset, p.out_stride });
        } else if (v.has_packed) {
            const const_rows shown = v.exact.n + v.n_absent == 0 ? all : only_packed(n);
            kernels.multiply(prepared(v), shown, 0, (int) p.out_stride, { out_rotated + offset, p.out_stride });
        }
        kernels.exact_output(part_of(v.exact, range), p.d_v, all, { out + offset, p.out_stride });
    }

    // p with 0 where the packed tile does not hold the cell's row.
    const_rows only_packed(int n) {
        std::copy(scores, scores + (size_t) n * p.tile, scores_shown);
        for (int i = 0; i < n; ++i) {
            float * row = scores_shown + (size_t) i * p.tile;
            for (int j = 0; j < v.exact.n; ++j) {
                row[v.exact.token[j]] = 0.0f;
            }
            for (int j = 0; j < v.n_absent; ++j) {
                row[v.absent[j]] = 0.0f;
            }
        }
        return { scores_shown, (size_t) p.tile, n };
    }

    const plan &              p;
    const attention_kernels & kernels;
    side_tile                 k, v;
    unpacked_tile             latent;
    tile_basis                k_basis, v_basis; // of the tile at hand
    float *                   q;                // [rows, q_stride] times scale
    float *                   q_rotated;        // the same as packed tiles want it
    float *                   slope;            // [rows]
    softmax_state *           state;            // [rows]
    float *                   out;              // [rows, out_stride] not yet divided by the sum
    float *                   out_rotated;      // what came from packed tiles, in their space
    float *                   scores;           // [slice_rows, tile]
    float *                   scores_shown;     // [slice_rows, tile]
};

size_t worker_bytes(const plan & p) {
    arena memory(0);
    worker(p, memory);
    return memory.next();
}

// The ranges of one row become one, in the first range's place.
void merge_row(const plan & p, void * partials, int index, int row) {
    const partial   into = partial_at(p, partials, index * p.n_range);
    softmax_state & sum  = into.state[row];
    float *         out  = into.out + row * p.out_stride;
    for (int range = 1; range < p.n_range; ++range) {
        const partial       part  = partial_at(p, partials, index * p.n_range + range);
        const softmax_state state = part.state[row];
        if (state.max == -INFINITY) { // the range was hidden
            continue;
        }
        const float   max    = std::max(sum.max, state.max);
        const float   shrink = std::exp(sum.max - max), factor = std::exp(state.max - max);
        const float * from = part.out + row * p.out_stride;
        for (int c = 0; c < p.d_v; ++c) {
            out[c] = out[c] * shrink + from[c] * factor;
        }
        sum = { max, sum.sum * shrink + state.sum * factor };
    }
    write_row(p, strip_at(p, index), row, sum, out);
}

void merge(const plan & p, const team & t, void * partials) {
    for (int index = t.ith; index < p.n_strip() * p.rows(); index += t.nth) {
        const int row = index % p.rows();
        if (row < strip_at(p, index / p.rows()).n_query * p.n_share) {
            merge_row(p, partials, index / p.rows(), row);
        }
    }
}

// Scratch: the counter of tasks, what ranges leave, one worker a thread.
struct scratch_parts {
    std::atomic<int> * next_task;
    uint8_t *          partials;
    uint8_t *          workers;
    uintptr_t          end;

    scratch_parts(const plan & p, int nth, uintptr_t scratch) {
        arena memory(scratch);
        next_task = memory.take<std::atomic<int>>(1);
        partials  = memory.take<uint8_t>(partial_bytes(p) * p.n_task());
        workers   = memory.take<uint8_t>(worker_bytes(p) * nth);
        end       = memory.next();
    }
};

// The queries that meet each KV head, one thread a head: what is learned does not depend on the number of threads.
void observe_queries(const plan & p, const team & t) {
    const gear_attention_params & params = p.params;
    for (int head = 0; head < params.n_head; ++head) {
        if (head / p.n_share % t.nth != t.ith) {
            continue;
        }
        for (int stream = 0; stream < params.n_stream; ++stream) {
            const float * q = at_bytes(params.q, head * params.q_stride[1] + stream * params.q_stride[2]);
            p.op.k_bases->observe(head / p.n_share, q, params.n_query, params.q_stride[0]);
        }
    }
}

} // namespace

const attention_kernels & current_attention_kernels() {
    switch (simd_current()) {
#if defined(__x86_64__)
    case simd_level::avx512vnni:
        return attention_kernels_avx512vnni;
    case simd_level::avx2:
        return attention_kernels_avx2;
#elif defined(__aarch64__)
    case simd_level::neon:
        return attention_kernels_neon;
#endif
    default:
        return attention_kernels_scalar;
    }
}

size_t attention_scratch_bytes(const attention_op & op, int nth) {
    return scratch_parts(plan(op, nth), nth, 0).end;
}

void attention(const attention_op & op, const team & t, void * scratch) {
    const plan          p(op, t.nth);
    const scratch_parts parts(p, t.nth, (uintptr_t) scratch);
    if (t.ith == 0) {
        new (parts.next_task) std::atomic<int>(0);
    }
    t.wait();
    if (op.k_bases) {
        observe_queries(p, t);
    }
    arena  memory((uintptr_t) parts.workers + t.ith * worker_bytes(p));
    worker own(p, memory);
    for (int task; (task = parts.next_task->fetch_add(1, std::memory_order_relaxed)) < p.n_task();) {
        own.run(task, parts.partials);
    }
    if (p.n_range > 1) {
        t.wait();
        merge(p, t, parts.partials);
    }
}

} // namespace gear
