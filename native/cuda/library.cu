// library.cu - libgearcpp-cuda: the kernels, and the table of functions (api.h) that libgearcpp finds them by. The CUDA run time is linked in statically.
#include "cuda/api.h"

#include <cstdio>
#include <cuda_runtime.h>

namespace gear::cuda {

namespace {

cudaStream_t native(stream s) {
    return reinterpret_cast<cudaStream_t>(s);
}

cudaEvent_t native(event e) {
    return reinterpret_cast<cudaEvent_t>(e);
}

// Blocks get more than 48 KiB of shared memory only when the kernel was told so, once for each device.
template <class K> cudaError_t allow_shared(K kernel, size_t bytes) {
    constexpr size_t given = 48 << 10;
    return bytes > given ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) bytes) : cudaSuccess;
}

template <class K, class... A> int start(K kernel, dim3 grid, int n_thread, size_t shared_bytes, stream s, const A &... args) {
    const cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error != cudaSuccess) {
        (void) cudaGetLastError();
        return error;
    }
    kernel<<<grid, n_thread, shared_bytes, native(s)>>>(args...);
    return cudaGetLastError();
}

} // namespace

} // namespace gear::cuda

#include "cuda/launch.cuh"

namespace gear::cuda {

namespace {

const char * error_text(int error) {
    return cudaGetErrorString((cudaError_t) error);
}

int device_of_address(const void * address, int * device) {
    cudaPointerAttributes attributes;
    const cudaError_t     error = cudaPointerGetAttributes(&attributes, address);
    *device                     = error == cudaSuccess && attributes.type == cudaMemoryTypeDevice ? attributes.device : -1;
    return error;
}

int describe(int device, device_facts * facts) {
    cudaDeviceProp    properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess) {
        return error;
    }
    *facts = {};
    snprintf(facts->name, sizeof facts->name, "%.120s", properties.name);
    facts->major                 = properties.major;
    facts->minor                 = properties.minor;
    facts->n_processor           = properties.multiProcessorCount;
    facts->shared_bytes          = (int64_t) properties.sharedMemPerBlockOptin;
    facts->l2_bytes              = properties.l2CacheSize;
    size_t            bytes_free = 0, bytes_total = 0;
    const cudaError_t asked = cudaMemGetInfo(&bytes_free, &bytes_total); // of the selected device
    facts->bytes_free       = (int64_t) bytes_free;
    facts->bytes_total      = (int64_t) bytes_total;
    return asked;
}

const api table = {
    api_version,
    error_text,
    [](int * n) { return (int) cudaGetDeviceCount(n); },
    device_of_address,
    [](int device) { return (int) cudaSetDevice(device); },
    [](int * device) { return (int) cudaGetDevice(device); },
    describe,

    [] { return (int) cudaDeviceSynchronize(); },

    [](void ** memory, size_t bytes) { return (int) cudaMalloc(memory, bytes); },
    [](void * memory) { return (int) cudaFree(memory); },
    [](void ** memory, size_t bytes) { return (int) cudaMallocHost(memory, bytes); },
    [](void * memory) { return (int) cudaFreeHost(memory); },

    [](stream * made) { return (int) cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t *>(made), cudaStreamNonBlocking); },
    [](stream s) { return (int) cudaStreamDestroy(native(s)); },
    [](stream s) { return (int) cudaStreamSynchronize(native(s)); },
    [](event * made) { return (int) cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t *>(made), cudaEventDisableTiming); },
    [](event e) { return (int) cudaEventDestroy(native(e)); },
    [](event e, stream s) { return (int) cudaEventRecord(native(e), native(s)); },
    [](stream s, event e) { return (int) cudaStreamWaitEvent(native(s), native(e), 0); },
    [](event e) { return (int) cudaEventSynchronize(native(e)); },

    [](void * device, const void * host, size_t bytes, stream s) { return (int) cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, native(s)); },
    [](void * host, const void * device, size_t bytes, stream s) { return (int) cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, native(s)); },
    [](void * to, const void * from, size_t bytes, stream s) { return (int) cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, native(s)); },
    [](void * device, int value, size_t bytes, stream s) { return (int) cudaMemsetAsync(device, value, bytes, native(s)); },

    start_write_rows,
    start_set_slots,
    pack_scratch_bytes,
    start_pack,
    start_unpack,
    plan_attend,
    start_attend,
    start_observe,
    start_measure,
};

} // namespace

} // namespace gear::cuda

extern "C" __attribute__((visibility("default"))) const gear::cuda::api * gearcpp_cuda_api(int version) {
    return version == gear::cuda::api_version ? &gear::cuda::table : nullptr;
}
