// settings.h - every environment variable that native code reads. docs/settings.md describes them; a variable is read anew at each call.
#pragma once

namespace gear::settings {

const char * kv_type();               // GEARCPP_KV: the cache of programs that load the plugin by GGML_BACKEND_PATH; nullptr: not set
const char * simd_level();            // GEARCPP_SIMD: a kernel level by name; nullptr: not set
bool         allows_cuda();           // GEARCPP_CUDA=1: a GEAR cache may be put on a GPU
const char * cuda_library();          // GEARCPP_CUDA_LIBRARY: another libgearcpp-cuda; nullptr: not set
bool         packs_small_caches();    // GEARCPP_SMALL_CACHE=store: no cache is too small to be packed (for tests)
bool         reports_nominal_sizes(); // GEARCPP_NOMINAL_SIZE=1: for a llama.cpp with assertions, which wants buffers of no less than nominal size
bool         reports_caches();        // GEARCPP_REPORT=1: lines on stderr about the ggml that was found and what each cache held when it is freed

// ggml-cuda's own GGML_CUDA_GRAPH_OPT=1: its graphs fork streams.
bool ggml_cuda_forks_streams();

} // namespace gear::settings
