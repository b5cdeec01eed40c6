// test_cuda.cpp - the CUDA kernels, compiled for the CPU behind cuda_on_cpu.h. cuda_device_tests runs the same cases on a GPU.
#include "cuda_emulated.h" // first

#include "cuda_cases.h"

int main() {
    const cuda_test::device on(gear::cuda::emulated::table);
    cuda_test::test_pack(on, 32);
    cuda_test::test_attention(on, 24);
    cuda_test::test_cache(on, 4, 40);
    return check::finish();
}
