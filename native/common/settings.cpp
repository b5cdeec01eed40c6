#include "common/settings.h"

#include <cstdlib>
#include <cstring>

namespace gear::settings {

namespace {

bool is(const char * name, const char * value) {
    const char * set = getenv(name);
    return set && strcmp(set, value) == 0;
}

} // namespace

const char * kv_type() {
    return getenv("GEARCPP_KV");
}

const char * simd_level() {
    return getenv("GEARCPP_SIMD");
}

bool allows_cuda() {
    return is("GEARCPP_CUDA", "1");
}

const char * cuda_library() {
    const char * path = getenv("GEARCPP_CUDA_LIBRARY");
    return path && *path ? path : nullptr;
}

bool packs_small_caches() {
    return is("GEARCPP_SMALL_CACHE", "store");
}

bool reports_nominal_sizes() {
    return is("GEARCPP_NOMINAL_SIZE", "1");
}

bool reports_caches() {
    return is("GEARCPP_REPORT", "1");
}

bool ggml_cuda_forks_streams() {
    const char * set = getenv("GGML_CUDA_GRAPH_OPT");
    return set && atoi(set) == 1;
}

} // namespace gear::settings
