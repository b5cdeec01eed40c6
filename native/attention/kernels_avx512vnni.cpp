// kernels_avx512vnni.cpp - attention with AVX-512 VNNI: a line of codes is one register.
// GCC 12 warns about its own intrinsics, whose undefined inputs it reads as uninitialized (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "attention/kernels_simd.h"

#include <immintrin.h>

namespace gear {

namespace {

struct avx512 {
    using floats = __m512;
    using ints   = __m512i;
    using bytes  = __m512i;

    static constexpr int lanes    = 16;
    static constexpr int n_weight = 8;
    static constexpr int n_row    = 4;

    static floats load(const float * x) { return _mm512_loadu_ps(x); }
    static void   store(float * x, floats a) { _mm512_storeu_ps(x, a); }
    static floats set(float x) { return _mm512_set1_ps(x); }
    static floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
    static floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
    static floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
    static floats div(floats a, floats b) { return _mm512_div_ps(a, b); }
    static floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
    static floats min(floats a, floats b) { return _mm512_min_ps(a, b); }
    static floats max(floats a, floats b) { return _mm512_max_ps(a, b); }
    static floats magnitude(floats a) { return _mm512_abs_ps(a); }
    static floats round(floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static float  first(floats a) { return _mm512_cvtss_f32(a); }
    static float  sum(floats a) { return _mm512_reduce_add_ps(a); }
    static float  highest(floats a) { return _mm512_reduce_max_ps(a); }
    static floats load_half(const uint16_t * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }
    static floats set_half(uint16_t x) { return _mm512_cvtph_ps(_mm256_set1_epi16((short) x)); }
    static floats load_u8(const uint8_t * x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) x))); }
    static floats load_s8(const uint8_t * x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) x))); }
    static floats mul_power(floats x, floats n) { return _mm512_scalef_ps(x, n); }

    // Halves are folded until four lanes of each are left; the rest is a 4 x 4 transposition while adding.
    static void sum4(const floats * a, float * sums) {
        __m128 b[4];
        for (int i = 0; i < 4; ++i) {
            const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a[i]), _mm512_extractf32x8_ps(a[i], 1));
            b[i]              = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        }
        const __m128 low  = _mm_add_ps(_mm_unpacklo_ps(b[0], b[1]), _mm_unpackhi_ps(b[0], b[1]));
        const __m128 high = _mm_add_ps(_mm_unpacklo_ps(b[2], b[3]), _mm_unpackhi_ps(b[2], b[3]));
        _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low)));
    }

    static bytes                  load_bytes(const uint8_t * x) { return _mm512_loadu_si512(x); }
    static bytes                  set_byte(int x) { return _mm512_set1_epi8((char) x); }
    static bytes                  both(bytes a, bytes b) { return _mm512_and_si512(a, b); }
    static bytes                  either(bytes a, bytes b) { return _mm512_or_si512(a, b); }
    template <int n> static bytes shift_right(bytes a) {
        if constexpr (n == 0) {
            return a;
        } else if constexpr (n > 0) {
            return _mm512_srli_epi16(a, n);
        } else {
            return _mm512_slli_epi16(a, -n);
        }
    }

    static ints zero_ints() { return _mm512_setzero_si512(); }

    template <int bits, bool positive> static void dot(ints * sum, const bytes * first, const bytes * second, const uint8_t * weight) {
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; ++quad) {
            int four;
            memcpy(&four, weight + 4 * quad, sizeof four);
            const __m512i w = _mm512_set1_epi32(four);
            sum[0]          = positive ? _mm512_dpbusd_epi32(sum[0], w, first[quad]) : _mm512_dpbusd_epi32(sum[0], first[quad], w);
            sum[1]          = positive ? _mm512_dpbusd_epi32(sum[1], w, second[quad]) : _mm512_dpbusd_epi32(sum[1], second[quad], w);
        }
    }

    static ints   join(ints high, ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
    static floats to_floats(ints a) { return _mm512_cvtepi32_ps(a); }

    // Packing to 16 and 8 bits works within 128 bits, which leaves groups of four bytes transposed.
    static void round64(const float * x, const float * scale, __m512i * whole) {
        for (int i = 0; i < 4; ++i) {
            whole[i] = _mm512_cvtps_epi32(mul(load(x + 16 * i), load(scale + 16 * i)));
        }
    }

    template <bool positive> static void to_bytes(const float * x, const float * scale, uint8_t * byte, ints & total) {
        __m512i whole[4];
        round64(x, scale, whole);
        total                 = _mm512_add_epi32(total, _mm512_add_epi32(_mm512_add_epi32(whole[0], whole[1]), _mm512_add_epi32(whole[2], whole[3])));
        const __m512i natural = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i a = _mm512_packs_epi32(whole[0], whole[1]), b = _mm512_packs_epi32(whole[2], whole[3]);
        _mm512_storeu_si512(byte, _mm512_permutexvar_epi32(natural, positive ? _mm512_packus_epi16(a, b) : _mm512_packs_epi16(a, b)));
    }

    static void split(const float * x, const float * scale, uint8_t * high, uint8_t * low) {
        __m512i whole[4];
        round64(x, scale, whole);
        const __m512i natural = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), half = _mm512_set1_epi16(128);
        const __m512i a = _mm512_packs_epi32(whole[0], whole[1]), b = _mm512_packs_epi32(whole[2], whole[3]);
        const __m512i high_a = _mm512_srai_epi16(_mm512_add_epi16(a, half), 8), high_b = _mm512_srai_epi16(_mm512_add_epi16(b, half), 8);
        const __m512i low_a = _mm512_sub_epi16(a, _mm512_slli_epi16(high_a, 8)), low_b = _mm512_sub_epi16(b, _mm512_slli_epi16(high_b, 8));
        _mm512_storeu_si512(high, _mm512_permutexvar_epi32(natural, _mm512_packs_epi16(high_a, high_b)));
        _mm512_storeu_si512(low, _mm512_permutexvar_epi32(natural, _mm512_packs_epi16(low_a, low_b)));
    }
};

} // namespace

const attention_kernels attention_kernels_avx512vnni = kernels_for<avx512>::table;

} // namespace gear
