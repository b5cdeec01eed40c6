// basis.h - the basis that the rows of a head are coded in when the configuration says rotate = 2 (Python: rotate_k="auto").
//
// A row x is coded as   y = H (w o x)   and a query meets it as   q.x = (H (q / w)).y   with H the Hadamard transform and one weight w_c a channel.
//
// Why these weights. All groups of y get steps of about one size, so the error of y is white, of variance proportional to mean_c (w_c s_c)^2, where s_c is
// how far channel c strays within a group. It costs a score mean_c (q_c / w_c)^2 of that. The product of the two is least where w_c^2 = q_c / s_c, and is
// then (mean_c q_c s_c)^2, which is never more than what no rotation pays, mean_c (q_c s_c)^2, nor than what H alone pays, mean_c q_c^2 mean_c s_c^2.
//
// Both are looked up once: q_c^2 is the mean square of the queries that a KV head has met until its first tile is packed, s_c^2 comes from that tile.
// Where no query was seen, q_c = 1 / s_c is taken: each channel then keeps the relative error that it has without a rotation.
//
// A tile carries its basis (tile.h), so that nothing else has to be kept with it; the tiles of a head share one, and attention turns a query once.
//
// The same queries say what an error of K does. A score's error is scale q.e with e = x - x^; over the queries met, E (scale q.e)^2 = scale^2 e^T E[q q^T]
// e, of which rounding, whose signs know nothing of q, keeps the diagonal: sum_c weight_c e_c^2 with weight_c = scale^2 E[q_c^2]. Its root is in nats, the
// unit of the softmax's exponent.
//
// With feedback (feedback.h) M takes care of the queries' directions, so the weights need not: the step goes as the mean of w^2 s^2, det G as
// 1 / prod w^2, and the cost is least where w = 1 / s. As s is that of one tile, w = s^-0.7 is taken, which measured better.
#pragma once

#include "codec/feedback.h"
#include "codec/tile.h"
#include "common/host_device.h"

#include <optional>
#include <vector>

namespace gear {

constexpr int rotate_none = 0, rotate_hadamard = 1, rotate_weighted = 2; // gear_side_config.rotate

// Bytes of the weights of a head of d channels.
GEAR_HD constexpr int basis_bytes(int d) {
    return d / 2;
}

// w of channel c as its 4-bit exponent e_c says: w_c = 2^((e_c - 8) / 2).   basis u8 [d / 2]: e_c in byte c % (d / 2), in the high half if c >= d / 2
GEAR_HD inline float weight_of_channel(const uint8_t * basis, int d, int c) {
    const int e = c < d / 2 ? basis[c] & 15 : basis[c - d / 2] >> 4;
    return (e & 1 ? 0x1.6a09e6p-4f : 0x1p-4f) * (float) (1 << (e >> 1));
}

// w f32 [d]
void load_weights(const uint8_t * basis, int d, float * w);

// The weights for rows such as x f32 [T, d], of which written u8 [T] (nullptr: all) count.   query_square f64 [d]: mean of q_c^2, nullptr: not known
void choose_basis(const tile_layout & layout, const float * x, const uint8_t * written, const double * query_square, uint8_t * basis);

// What a store's heads are coded in, what their errors weigh, and what is learned until that is decided. Different heads may be used by different threads
// at once.
class head_bases {
  public:
    explicit head_bases(const tile_layout & layout) : layout_(layout) {}

    void reserve(int n_head); // before threads share it: observe() does not allocate
    bool is_open(int head) const { return head >= (int) heads_.size() || !heads_[head].is_decided; }

    // Queries that head `head` meets: q f32 [n, d], rows `stride` bytes apart, and what their scores are multiplied by. Once all is decided, only feedback
    // wants them.
    void                 observe(int head, const float * q, int64_t n, int64_t stride, float scale);
    // The same where a GPU has summed up n of them, without what feedback needs: square f64 [d] sum of q_c^2
    void                 add_observed(int head, const double * square, int64_t n, float scale);
    // Decide by the first tile to be packed. Nothing, once all is decided; a basis that was adopted stays.
    void                 decide(int head, const float * x, const uint8_t * written);
    // Take over the basis of a packed tile that comes from elsewhere, if none is decided.
    void                 adopt(int head, const uint8_t * tile);
    // What feedback knows; nullptr: nothing is kept of queries
    const query_moment * queries(int head) const;
    void                 forget();
    // Of moments; what else is learned is small.
    size_t               query_bytes() const { return query_bytes(layout_, (int) heads_.size()); }
    static size_t        query_bytes(const tile_layout & layout, int n_head) {
        return layout.config.feedback ? n_head * query_moment::bytes_of(layout.d_head) : 0;
    }

    const uint8_t *      basis(int head) const { return head >= (int) heads_.size() || heads_[head].basis.empty() ? nullptr : heads_[head].basis.data(); }
    // Mean of (scale q.e)^2 over the queries of queries(), e f32 [d]: with feedback, the diagonal alone would overstate it
    double               score_square(int head, const float * e) const;
    // What is known of all heads' queries, for a session; nothing where none were met.
    std::vector<uint8_t> learned() const;
    // The same back, where no query was met yet. false: it is of other heads, or damaged.
    bool                 learn_again(const std::vector<uint8_t> & bytes);
    // f64 [d] weight_c above; nullptr: no query was met
    const double *       score_weights(int head) const { return is_open(head) || heads_[head].weight.empty() ? nullptr : heads_[head].weight.data(); }

  private:
    struct head_state {
        std::vector<double>         square; // [d] sum of q_c^2
        int64_t                     n          = 0;
        float                       scale      = 1; // of a score
        bool                        is_decided = false;
        std::vector<uint8_t>        basis;   // [d / 2], empty: none (rotate 0 and 1), or open
        std::vector<double>         weight;  // [d], empty: not known
        std::optional<query_moment> queries; // with feedback
    };

    tile_layout             layout_;
    std::vector<head_state> heads_;
};

} // namespace gear
