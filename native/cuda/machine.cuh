// machine.cuh - the few instructions that kernels use beyond C++ and CUDA's own words. In tests the header native/tests/cuda_on_cpu.h, included before
// this one, gives them (and CUDA's words) their meaning on a CPU.
//
// Everything here is compiled with -fmad=false, as the CPU's code is with -ffp-contract=off: a kernel that means a fused multiply-add says fmaf. So what
// the codec computes comes out with the same bits on both.
#pragma once

#if !defined(GEAR_CUDA_ON_CPU)

#    include "common/half.h"

#    include <cstdint>
#    include <cuda_bf16.h>
#    include <cuda_fp16.h>
#    include <cuda_runtime.h>

#    define GEAR_UNROLL _Pragma("unroll")

namespace gear::cuda {

extern __shared__ uint4 shared_block[];

__device__ __forceinline__ unsigned char * shared_memory() {
    return reinterpret_cast<unsigned char *>(shared_block);
}

__device__ __forceinline__ float from_half(uint16_t half) {
    return half_to_float(half);
}

__device__ __forceinline__ uint16_t to_half(float value) {
    return float_to_half(value);
}

__device__ __forceinline__ uint16_t to_bf16(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ __forceinline__ float from_bf16(uint16_t value) {
    return __uint_as_float((uint32_t) value << 16);
}

__device__ __forceinline__ uint32_t half_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Two codes of up to 7 bits in the low ends of a word's halves, as bf16: 128 + code has no rounding, nor has taking 128 away.
__device__ __forceinline__ uint32_t codes_to_bf16(uint32_t codes) {
    uint32_t pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(codes | 0x43004300u), "r"(0x3f803f80u), "r"(0xc300c300u));
    return pair;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

} // namespace gear::cuda

#endif
