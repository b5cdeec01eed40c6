// feedback.h - rounding keys for the error of scores instead of their own ("feedback"; not in the paper).
//
// A score errs by q.e, e = x - x^. Over the queries that is e^T E[q q^T] e, of which rounding each channel by itself, with signs that know nothing of q,
// keeps the diagonal. With all of E[q q^T], roundings can be chosen that cancel. In the basis that is coded (basis.h), the metric of an error e = y - D is
// G = B^-T E[q q^T] B^-1, B = H diag(w). Write G = M^T P M, M lower triangular with ones on its diagonal, P diagonal:
//     e^T G e = sum_c p_c (e_c + sum_{j < c} m_cj e_j)^2
// Channel c, coded after those before it, is rounded as if it were y_c + sum_{j < c} m_cj e_j: its own rounding is all that is left in the bracket. With
// steps of one size the cost goes from the mean of G's eigenvalues to at least their geometric mean (the product of the p is det G). The tile's bytes mean
// what they meant; only the packer knows M. This is Babai's nearest plane; docs/coding-keys.md has what it brings.
//
// What is kept of a head's queries is their second moment, of the last ones above all: which of them made it does not matter, but that there are enough. M
// takes as long as packing a tile (d^3 / 3 products) and as much memory as 64 tokens in f16: it is made anew for each tile, in scratch.
#pragma once

#include "codec/kernels.h"
#include "codec/tile.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gear {

constexpr int feedback_never = 0, feedback_always = 1, feedback_auto = 2; // gear_side_config.feedback; auto: where the side can have it
constexpr int most_auto_feedback = 256; // channels of a head: what it takes in memory goes with their square, against that of their rows

// E[q q^T] of the queries that a KV head meets.
class query_moment {
  public:
    explicit query_moment(int d) : d_(d), spread_(d), correlation_((size_t) d * (d - 1) / 2) {} // later on nothing allocates

    // q f32 [n, d], rows `stride` bytes apart. One in eight is noted: neighbours are alike.
    void          meet(const float * q, int64_t n, int64_t stride);
    void          forget();
    // Take moment f64 [d, d] itself, symmetric and finite.
    void          set(const double * moment);
    bool          is_known() const { return n_noted_ > 0; }
    int           d() const { return d_; }
    size_t        bytes() const { return bytes_of(d_); }
    // e^T E[q q^T] e, e f32 [d]
    double        mean_square(const float * e) const;
    static size_t bytes_of(int d) { return d * sizeof(float) + (size_t) d * (d - 1) / 2 * sizeof(int16_t); }

    // What is known, for a session: n bytes, the same for all heads of d channels. put() is false, and nothing is changed, where they are no moment.
    size_t size_in_session() const { return 2 * sizeof(int64_t) + bytes(); }
    void   get(uint8_t * out) const;
    bool   put(const uint8_t * in);

    float spread(int c) const { return spread_[c]; }
    float correlation(int c, int j) const { return (float) correlation_[(size_t) c * (c - 1) / 2 + j] / correlation_unit; } // j < c

  private:
    static constexpr float correlation_unit = 32767;
    void                   note(int n, const float * const * q);

    int                  d_;
    std::vector<float>   spread_;      // [d] root of the mean of q_c^2
    std::vector<int16_t> correlation_; // [d (d - 1) / 2], lower triangle: E[q_c q_j] / (spread_c spread_j), in units of 1 / 32767
    int64_t              n_met_ = 0, n_noted_ = 0;
};

// M above, f32 [d, d]: entry (c, j) for j < c; the others are 0.   w f32 [d]: weights of the basis (rotate = 2)
void choose_feedback(const tile_layout & layout, const pack_kernels & kernels, const query_moment & queries, const float * w, float * M);

} // namespace gear
