// kernels_avx2.cpp - attention with AVX2 and FMA: half a line of codes is one register.
#include "attention/kernels_simd.h"

#include <immintrin.h>

namespace gear {

namespace {

struct avx2 {
    using floats = __m256;
    using ints   = __m256i;
    using bytes  = __m256i;

    static constexpr int lanes    = 8;
    static constexpr int n_weight = 4;
    static constexpr int n_row    = 2;

    static floats load(const float * x) { return _mm256_loadu_ps(x); }
    static void   store(float * x, floats a) { _mm256_storeu_ps(x, a); }
    static floats set(float x) { return _mm256_set1_ps(x); }
    static floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
    static floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
    static floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
    static floats div(floats a, floats b) { return _mm256_div_ps(a, b); }
    static floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
    static floats min(floats a, floats b) { return _mm256_min_ps(a, b); }
    static floats max(floats a, floats b) { return _mm256_max_ps(a, b); }
    static floats magnitude(floats a) { return _mm256_andnot_ps(set(-0.0f), a); }
    static floats round(floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static float  first(floats a) { return _mm256_cvtss_f32(a); }
    static floats load_half(const uint16_t * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }
    static floats set_half(uint16_t x) { return _mm256_cvtph_ps(_mm_set1_epi16((short) x)); }
    static floats load_u8(const uint8_t * x) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) x))); }
    static floats load_s8(const uint8_t * x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) x))); }

    // 2^n put together as an integer; an exponent of -127 makes it 0.
    static floats mul_power(floats x, floats n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(max(n, set(-127))), _mm256_set1_epi32(127));
        return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }

    static __m128 fold(floats a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }

    static float sum(floats a) {
        const __m128 four = fold(a), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    static float highest(floats a) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }

    static void sum4(const floats * a, float * sums) {
        const __m128 low = _mm_hadd_ps(fold(a[0]), fold(a[1])), high = _mm_hadd_ps(fold(a[2]), fold(a[3]));
        _mm_storeu_ps(sums, _mm_hadd_ps(low, high));
    }

    static bytes                  load_bytes(const uint8_t * x) { return _mm256_loadu_si256((const __m256i *) x); }
    static bytes                  set_byte(int x) { return _mm256_set1_epi8((char) x); }
    static bytes                  both(bytes a, bytes b) { return _mm256_and_si256(a, b); }
    static bytes                  either(bytes a, bytes b) { return _mm256_or_si256(a, b); }
    template <int n> static bytes shift_right(bytes a) {
        if constexpr (n == 0) {
            return a;
        } else if constexpr (n > 0) {
            return _mm256_srli_epi16(a, n);
        } else {
            return _mm256_slli_epi16(a, -n);
        }
    }

    static ints zero_ints() { return _mm256_setzero_si256(); }

    static bytes four_weights(const uint8_t * weight) {
        int four;
        memcpy(&four, weight, sizeof four);
        return _mm256_set1_epi32(four);
    }

    // One factor is unsigned, the other signed; codes are both.
    template <bool positive> static __m256i pairs(bytes code, bytes weight) {
        return positive ? _mm256_maddubs_epi16(weight, code) : _mm256_maddubs_epi16(code, weight);
    }

    // Products of two neighbours are added up in 16 bits, at most 2 * 255 or 2 * 128 * levels, and as many of these as cannot overflow there.
    template <int bits, bool positive> static void dot(ints * sum, const bytes * first, const bytes * second, const uint8_t * weight) {
        constexpr int largest = 2 * (positive ? 255 : 128) * ((1 << bits) - 1);
        constexpr int at_once = 4 * largest <= 32767 ? 4 : 2 * largest <= 32767 ? 2 : 1;
        static_assert(largest <= 32767, "a sum of pairs must fit in 16 bits");
        const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; quad += at_once) {
            const bytes w = four_weights(weight + 4 * quad);
            __m256i     a = pairs<positive>(first[quad], w), b = pairs<positive>(second[quad], w);
#pragma GCC unroll 4
            for (int i = 1; i < at_once; ++i) {
                const bytes next = four_weights(weight + 4 * (quad + i));
                a                = _mm256_add_epi16(a, pairs<positive>(first[quad + i], next));
                b                = _mm256_add_epi16(b, pairs<positive>(second[quad + i], next));
            }
            sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(a, one));
            sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(b, one));
        }
    }

    static ints   join(ints high, ints low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
    static floats to_floats(ints a) { return _mm256_cvtepi32_ps(a); }

    static void round32(const float * x, const float * scale, __m256i * whole) {
        for (int i = 0; i < 4; ++i) {
            whole[i] = _mm256_cvtps_epi32(mul(load(x + 8 * i), load(scale + 8 * i)));
        }
    }

    // Packing to 16 and 8 bits works within 128 bits, which leaves groups of four bytes transposed.
    template <bool positive> static void to_bytes(const float * x, const float * scale, uint8_t * byte, ints & total) {
        const __m256i natural = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        for (int i = 0; i < 64; i += 32) {
            __m256i whole[4];
            round32(x + i, scale + i, whole);
            total           = _mm256_add_epi32(total, _mm256_add_epi32(_mm256_add_epi32(whole[0], whole[1]), _mm256_add_epi32(whole[2], whole[3])));
            const __m256i a = _mm256_packs_epi32(whole[0], whole[1]), b = _mm256_packs_epi32(whole[2], whole[3]);
            const __m256i all = positive ? _mm256_packus_epi16(a, b) : _mm256_packs_epi16(a, b);
            _mm256_storeu_si256((__m256i *) (byte + i), _mm256_permutevar8x32_epi32(all, natural));
        }
    }

    static void split32(const float * x, const float * scale, uint8_t * high, uint8_t * low) {
        __m256i whole[4];
        round32(x, scale, whole);
        const __m256i natural = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), half = _mm256_set1_epi16(128);
        const __m256i a = _mm256_packs_epi32(whole[0], whole[1]), b = _mm256_packs_epi32(whole[2], whole[3]);
        const __m256i high_a = _mm256_srai_epi16(_mm256_add_epi16(a, half), 8), high_b = _mm256_srai_epi16(_mm256_add_epi16(b, half), 8);
        const __m256i low_a = _mm256_sub_epi16(a, _mm256_slli_epi16(high_a, 8)), low_b = _mm256_sub_epi16(b, _mm256_slli_epi16(high_b, 8));
        _mm256_storeu_si256((__m256i *) high, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(high_a, high_b), natural));
        _mm256_storeu_si256((__m256i *) low, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low_a, low_b), natural));
    }

    static void split(const float * x, const float * scale, uint8_t * high, uint8_t * low) {
        split32(x, scale, high, low);
        split32(x + 32, scale + 32, high + 32, low + 32);
    }
};

} // namespace

const attention_kernels attention_kernels_avx2 = kernels_for<avx2>::table;

} // namespace gear
