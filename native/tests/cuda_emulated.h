// cuda_emulated.h - the table of libgearcpp-cuda with its kernels run on the CPU (cuda_on_cpu.h). Device memory is the host's; streams do at once what
// they are told. To be included by one file of a test.
#pragma once

#include "cuda_on_cpu.h" // in front of the kernels: it gives CUDA's words their meaning

#include "cuda/api.h"

#include <chrono>
#include <new>

namespace gear::cuda {

template <class K, class... A> int start(K kernel, dim3 grid, int n_thread, size_t shared_bytes, stream, const A &... args) {
    constexpr size_t most_shared = 99 << 10; // of sm_86, the least among those built for
    if (shared_bytes > most_shared) {
        return 1;
    }
    cuda_on_cpu::launch(kernel, grid, n_thread, shared_bytes, args...);
    return 0;
}

} // namespace gear::cuda

#include "cuda/launch.h"

namespace gear::cuda {

namespace emulated {

inline int allocate(void ** memory, size_t bytes) {
    *memory = ::operator new(bytes ? bytes : 1, std::align_val_t(256), std::nothrow);
    return *memory ? 0 : 2;
}

inline int release(void * memory) {
    ::operator delete(memory, std::align_val_t(256));
    return 0;
}

inline int copy(void * to, const void * from, size_t bytes, stream) {
    if (bytes > 0) {
        memmove(to, from, bytes);
    }
    return 0;
}

inline int describe(int, device_facts * facts) {
    *facts = {};
    snprintf(facts->name, sizeof facts->name, "a CPU that plays a GPU");
    facts->major        = 8;
    facts->minor        = 6;
    facts->n_processor  = 2;
    facts->shared_bytes = 99 << 10;
    facts->bytes_free = facts->bytes_total = (int64_t) 1 << 34;
    return 0;
}

inline const api table = {
    api_version,
    true,
    [](int error) { return error == 0   ? "no error"
                           : error == 1 ? "more shared memory than a block can have"
                                        : "out of memory"; },
    [](int * n) { return *n                         = 1, 0; },
    [](const void *, int * device) { return *device = 0, 0; },
    [](int) { return 0; },
    [](int * device) { return *device = 0, 0; },
    describe,

    [] { return 0; },

    allocate,
    release,
    allocate,
    release,

    [](stream * made) { return *made = nullptr, 0; },
    [](stream) { return 0; },
    [](stream) { return 0; },
    [](event * made) { return *made = nullptr, 0; },
    [](event) { return 0; },
    [](event, stream) { return 0; },
    [](stream, event) { return 0; },
    [](event) { return 0; },

    copy,
    copy,
    copy,
    [](void * device, int value, size_t bytes, stream) { return memset(device, value, bytes), 0; },

    start_write_rows,
    start_set_places,
    pack_scratch_bytes,
    start_pack,
    start_unpack,
    plan_attend,
    start_attend,
};

} // namespace emulated

} // namespace gear::cuda
