// test_cuda.cpp - the CUDA kernels, compiled for the CPU behind cuda_on_cpu.h. cuda_device_tests runs the same cases on a GPU.
#include "cuda_emulated.h" // first

#include "cuda_cases.h"

// Under sanitizers a fiber's switch costs ten times as much and more: fewer of the random cases.
#if defined(__SANITIZE_THREAD__)
constexpr int n_pack = 6, n_attention = 4, n_cache = 1;
#elif defined(__SANITIZE_ADDRESS__)
constexpr int n_pack = 16, n_attention = 8, n_cache = 2;
#else
constexpr int n_pack = 32, n_attention = 24, n_cache = 4;
#endif

int main() {
    const cuda_test::device on(gear::cuda::emulated::table);
    cuda_test::test_pack(on, n_pack);
    cuda_test::test_attention(on, n_attention);
    cuda_test::test_cache(on, n_cache, 40);
    return check::finish();
}
