#include "cuda/loader.h"

#include "common/settings.h"
#include "gearcpp.h"

#include <cstring>
#include <dlfcn.h>
#include <mutex>

namespace gear::cuda {

namespace {

#if defined(__APPLE__)
constexpr const char * library_name = "libgearcpp-cuda.dylib";
#else
constexpr const char * library_name = "libgearcpp-cuda.so";
#endif

std::string library_path() {
    if (const char * named = settings::cuda_library()) {
        return named;
    }
    Dl_info info;
    if (dladdr(reinterpret_cast<const void *>(&gear_version), &info) == 0 || !info.dli_fname) {
        return library_name;
    }
    const std::string self  = info.dli_fname;
    const size_t      slash = self.rfind('/');
    return slash == std::string::npos ? library_name : self.substr(0, slash + 1) + library_name;
}

const api * find(std::string & problem) {
    const std::string path    = library_path();
    void *            library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char * reason = dlerror();
        problem             = "gearcpp was built without its CUDA kernels; install it where nvcc is on PATH (" + std::string(reason ? reason : path) + ")";
        return nullptr;
    }
    get_api get    = nullptr;
    void *  symbol = dlsym(library, "gearcpp_cuda_api");
    memcpy(&get, &symbol, sizeof symbol);
    const api * table = get ? get(api_version) : nullptr;
    if (!table) {
        problem = path + " is not of this gearcpp; install gearcpp again";
        return nullptr;
    }
    int       n     = 0;
    const int error = table->device_count(&n);
    if (error != 0 || n == 0) {
        problem = "no CUDA device can be used: " + std::string(error ? table->error_text(error) : "there is none");
        return nullptr;
    }
    return table;
}

} // namespace

const api * load(std::string & problem) {
    static std::mutex           lock;
    static bool                 is_done = false;
    static const api *          table   = nullptr;
    static std::string          reason;
    std::lock_guard<std::mutex> guard(lock);
    if (!is_done) {
        table   = find(reason);
        is_done = true;
    }
    problem = reason;
    return table;
}

} // namespace gear::cuda

extern "C" const char * gear_cuda_problem(void) {
    thread_local std::string problem;
    gear::cuda::load(problem);
    return problem.c_str();
}
