// cuda_device_tests.cpp - the cases of cuda_cases.h on a GPU, through libgearcpp-cuda. Not run by ctest: it needs a GPU.
//     cuda_device_tests LIBRARY [quick]        quick: fewer cases, for compute-sanitizer
#include "cuda_cases.h"

#include <dlfcn.h>

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: cuda_device_tests PATH/libgearcpp-cuda.so [quick]\n");
        return 2;
    }
    void * library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    gear::cuda::get_api get    = nullptr;
    void *              symbol = dlsym(library, "gearcpp_cuda_api");
    memcpy(&get, &symbol, sizeof symbol);
    const gear::cuda::api * api = get ? get(gear::cuda::api_version) : nullptr;
    if (!api) {
        fprintf(stderr, "%s has no table of version %d\n", argv[1], gear::cuda::api_version);
        return 2;
    }
    int       n     = 0;
    const int error = api->device_count(&n);
    if (error != 0 || n == 0) {
        fprintf(stderr, "no CUDA device: %s\n", error ? api->error_text(error) : "none found");
        return 2;
    }
    const bool              is_quick = argc > 2 && strcmp(argv[2], "quick") == 0;
    const cuda_test::device on(*api);
    printf("%s, sm_%d%d, %d multiprocessors\n", on.facts.name, on.facts.major, on.facts.minor, on.facts.n_processor);
    cuda_test::test_pack(on, is_quick ? 16 : 400);
    cuda_test::test_attention(on, is_quick ? 8 : 200);
    cuda_test::test_cache(on, is_quick ? 2 : 40, 60);
    return check::finish();
}
