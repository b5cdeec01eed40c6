// half.h - IEEE binary16 in and out of f32, in portable C++. Kernels use their own instructions; this is the reference. On a GPU it is the instruction.
#pragma once

#include "common/host_device.h"

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#    include <cuda_fp16.h>
#endif

namespace gear {

GEAR_HD inline float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(h));
#else
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t       bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | fraction << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else { // zero or subnormal: fraction * 2^-24
        float value = (float) fraction * 5.9604644775390625e-8f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
#endif
}

// Round to nearest, ties to even, as the hardware does. Overflow gives infinity.
GEAR_HD inline uint16_t float_to_half(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        return sign | 0x7e00; // NaN
    }
    if (bits >= 0x477ff000) {
        return sign | 0x7c00; // rounds to infinity
    }
    if (bits < 0x38800000) { // subnormal: adding 2^-1 * 2^... aligns the fraction at 2^-24
        float magnitude, magic = 0.5f;
        memcpy(&magnitude, &bits, 4);
        magnitude += magic;
        uint32_t sum;
        memcpy(&sum, &magnitude, 4);
        return sign | (uint16_t) (sum - 0x3f000000);
    }
    const uint32_t odd = bits >> 13 & 1;
    bits += 0xc8000fff + odd; // rebias the exponent by -112 and round
    return sign | (uint16_t) (bits >> 13);
#endif
}

// The nearest f16 not above / not below value.
GEAR_HD inline uint16_t float_to_half_down(float value) {
    uint16_t h = float_to_half(value);
    if (half_to_float(h) > value) {
        h = (uint16_t) (h & 0x8000 ? h + 1 : h == 0 ? 0x8001 : h - 1);
    }
    return h;
}

GEAR_HD inline uint16_t float_to_half_up(float value) {
    return float_to_half_down(-value) ^ 0x8000;
}

} // namespace gear
