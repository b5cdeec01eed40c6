// cuda_emulated.cpp - libgearcpp-cuda with its kernels on the CPU, for tests of the wrapper: GEARCPP_CUDA=1 GEARCPP_CUDA_LIBRARY=<this library> makes
// gearcpp treat ggml's CPU as if it were a GPU. tests/test_cuda_wrapper.py compiles it.
#include "cuda_emulated.h"

extern "C" __attribute__((visibility("default"))) const gear::cuda::api * gearcpp_cuda_api(int version) {
    return version == gear::cuda::api_version ? &gear::cuda::emulated::table : nullptr;
}
