// kernels_neon.cpp - attention with NEON and its byte dot product: a quarter of a line of codes is one register.
#include "attention/kernels_simd.h"

#include <arm_neon.h>

namespace gear {

namespace {

struct neon {
    using floats = float32x4_t;
    using ints   = int32x4_t;
    using bytes  = uint8x16_t;

    static constexpr int lanes    = 4;
    static constexpr int n_weight = 8;
    static constexpr int n_row    = 4;

    static floats    load(const float * x) { return vld1q_f32(x); }
    static void      store(float * x, floats a) { vst1q_f32(x, a); }
    static floats    set(float x) { return vdupq_n_f32(x); }
    static floats    add(floats a, floats b) { return vaddq_f32(a, b); }
    static floats    sub(floats a, floats b) { return vsubq_f32(a, b); }
    static floats    mul(floats a, floats b) { return vmulq_f32(a, b); }
    static floats    div(floats a, floats b) { return vdivq_f32(a, b); }
    static floats    fma(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
    static floats    min(floats a, floats b) { return vminq_f32(a, b); }
    static floats    max(floats a, floats b) { return vmaxq_f32(a, b); }
    static floats    magnitude(floats a) { return vabsq_f32(a); }
    static floats    round(floats a) { return vrndnq_f32(a); }
    static float     first(floats a) { return vgetq_lane_f32(a, 0); }
    static float     sum(floats a) { return vaddvq_f32(a); }
    static float     highest(floats a) { return vmaxvq_f32(a); }
    static void      sum4(const floats * a, float * sums) { store(sums, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3]))); }
    static floats    load_half(const uint16_t * x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
    static floats    set_half(uint16_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))); }
    static uint8x8_t four_bytes(const uint8_t * x) {
        uint32_t four;
        memcpy(&four, x, sizeof four);
        return vreinterpret_u8_u32(vdup_n_u32(four));
    }

    static floats load_u8(const uint8_t * x) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(x))))); }
    static floats load_s8(const uint8_t * x) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(x)))))); }

    // 2^n put together as an integer; an exponent of -127 makes it 0.
    static floats mul_power(floats x, floats n) {
        return mul(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(max(n, set(-127))), vdupq_n_s32(127)), 23)));
    }

    static bytes                  load_bytes(const uint8_t * x) { return vld1q_u8(x); }
    static bytes                  set_byte(int x) { return vdupq_n_u8((uint8_t) x); }
    static bytes                  both(bytes a, bytes b) { return vandq_u8(a, b); }
    static bytes                  either(bytes a, bytes b) { return vorrq_u8(a, b); }
    template <int n> static bytes shift_right(bytes a) {
        if constexpr (n == 0) {
            return a;
        } else if constexpr (n > 0) {
            return vshrq_n_u8(a, n);
        } else {
            return vshlq_n_u8(a, -n);
        }
    }

    static ints zero_ints() { return vdupq_n_s32(0); }

    // Codes have at most 7 bits: signed bytes hold them, too.
    static ints dot_half(ints sum, const bytes * code, int8x16_t quads) {
        sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(code[0]), quads, 0);
        sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(code[1]), quads, 1);
        sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(code[2]), quads, 2);
        return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(code[3]), quads, 3);
    }

    static ints dot_half(ints sum, const bytes * code, uint8x16_t quads) {
        uint32x4_t total = vreinterpretq_u32_s32(sum);
        total            = vdotq_laneq_u32(total, code[0], quads, 0);
        total            = vdotq_laneq_u32(total, code[1], quads, 1);
        total            = vdotq_laneq_u32(total, code[2], quads, 2);
        return vreinterpretq_s32_u32(vdotq_laneq_u32(total, code[3], quads, 3));
    }

    template <int bits, bool positive> static void dot(ints * sum, const bytes * first, const bytes * second, const uint8_t * weight) {
        const uint8x16_t quads = vld1q_u8(weight);
        if constexpr (positive) {
            sum[0] = dot_half(sum[0], first, quads);
            sum[1] = dot_half(sum[1], second, quads);
        } else {
            sum[0] = dot_half(sum[0], first, vreinterpretq_s8_u8(quads));
            sum[1] = dot_half(sum[1], second, vreinterpretq_s8_u8(quads));
        }
    }

    static ints   join(ints high, ints low) { return vaddq_s32(vshlq_n_s32(high, 8), low); }
    static floats to_floats(ints a) { return vcvtq_f32_s32(a); }

    static ints round4(const float * x, const float * scale) { return vcvtnq_s32_f32(mul(load(x), load(scale))); }

    template <bool positive> static void to_bytes(const float * x, const float * scale, uint8_t * byte, ints & total) {
        for (int i = 0; i < 64; i += 8) {
            const int32x4_t a = round4(x + i, scale + i), b = round4(x + i + 4, scale + i + 4);
            total = vaddq_s32(total, vaddq_s32(a, b));
            vst1_u8(byte + i, vmovn_u16(vreinterpretq_u16_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b)))));
        }
    }

    static void split8(const float * x, const float * scale, uint8_t * high, uint8_t * low) {
        const int32x4_t a = round4(x, scale), b = round4(x + 4, scale + 4);
        const int16x8_t whole = vcombine_s16(vmovn_s32(a), vmovn_s32(b)), upper = vrshrq_n_s16(whole, 8);
        vst1_u8(high, vreinterpret_u8_s8(vmovn_s16(upper)));
        vst1_u8(low, vreinterpret_u8_s8(vmovn_s16(vsubq_s16(whole, vshlq_n_s16(upper, 8)))));
    }

    static void split(const float * x, const float * scale, uint8_t * high, uint8_t * low) {
        for (int i = 0; i < 64; i += 8) {
            split8(x + i, scale + i, high + i, low + i);
        }
    }
};

} // namespace

const attention_kernels attention_kernels_neon = kernels_for<neon>::table;

} // namespace gear
