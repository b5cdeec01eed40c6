// cuda_emulated.h - the table of libgearcpp-cuda with its kernels run on the CPU (cuda_on_cpu.h). Device memory is the host's; streams do at once what
// they are told. To be included by one file of a test.
//
// Where guards() says so each device's memory is out of reach but for what is done on that device: a kernel, a copy or a graph that touches another GPU's
// memory, or the host that touches any, is a fault here as it would be there. And as in CUDA a kernel wants a stream of the device that the calling thread
// has selected. One thread at a time then.
#pragma once

#include "cuda_on_cpu.h" // in front of the kernels: it gives CUDA's words their meaning

#include "cuda/api.h"

#include <map>
#include <mutex>
#include <new>
#include <sys/mman.h>

namespace gear::cuda {

struct stream_handle {
    int device;
};

struct event_handle {
    int device;
};

namespace emulated {

enum status { ok = 0, too_much_shared = 1, out_of_memory = 2, wrong_device = 3, not_device_memory = 4 };

inline int & n_device() {
    static int n = 1;
    return n;
}

inline bool & guards() {
    static bool are_up = false;
    return are_up;
}

inline int & selected() {
    static thread_local int device = 0;
    return device;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------------------------------

constexpr size_t page = 4096;

struct block {
    size_t bytes;
    int    device;
};

struct memory {
    std::mutex                 lock;
    std::map<uint8_t *, block> blocks;

    static memory & all() {
        static memory m;
        return m;
    }
    std::map<uint8_t *, block>::iterator holding(const void * address) {
        auto after = blocks.upper_bound(static_cast<uint8_t *>(const_cast<void *>(address)));
        if (after == blocks.begin()) {
            return blocks.end();
        }
        --after;
        return static_cast<const uint8_t *>(address) < after->first + after->second.bytes ? after : blocks.end();
    }
};

inline size_t align() {
    return guards() ? page : 256;
}

inline int allocate_on(int device, void ** at, size_t bytes) {
    const size_t rounded = (bytes + align() - 1) / align() * align() + (bytes == 0 ? align() : 0);
    *at                  = ::operator new(guards() ? rounded : bytes + (bytes == 0), std::align_val_t(align()), std::nothrow);
    if (!*at) {
        return out_of_memory;
    }
    std::lock_guard<std::mutex> guard(memory::all().lock);
    memory::all().blocks[static_cast<uint8_t *>(*at)] = { guards() ? rounded : bytes, device };
    if (guards()) {
        memset(*at, 0xa5, rounded); // as a GPU's: anything
        mprotect(*at, rounded, PROT_NONE);
    }
    return ok;
}

inline int allocate(void ** at, size_t bytes) {
    return allocate_on(selected(), at, bytes);
}

inline int release(void * at) {
    if (!at) {
        return ok;
    }
    std::lock_guard<std::mutex> guard(memory::all().lock);
    const auto                  found = memory::all().blocks.find(static_cast<uint8_t *>(at));
    if (found == memory::all().blocks.end()) {
        return not_device_memory;
    }
    if (guards()) {
        mprotect(at, found->second.bytes, PROT_READ | PROT_WRITE);
    }
    memory::all().blocks.erase(found);
    ::operator delete(at, std::align_val_t(align()));
    return ok;
}

// The memory of one device is within reach while this lives; or only the block that an address lies in, of whatever device.
class within_reach {
  public:
    explicit within_reach(int device) : device_(device) { protect(PROT_READ | PROT_WRITE); }
    explicit within_reach(const void * address) : address_(address) { protect(PROT_READ | PROT_WRITE); }
    ~within_reach() { protect(PROT_NONE); }
    within_reach(const within_reach &)             = delete;
    within_reach & operator=(const within_reach &) = delete;

  private:
    void protect(int how) const {
        if (!guards()) {
            return;
        }
        std::lock_guard<std::mutex> guard(memory::all().lock);
        if (address_) {
            const auto found = memory::all().holding(address_);
            if (found != memory::all().blocks.end()) {
                mprotect(found->first, found->second.bytes, how);
            }
            return;
        }
        for (const auto & [at, block] : memory::all().blocks) {
            if (block.device == device_) {
                mprotect(at, block.bytes, how);
            }
        }
    }
    int          device_  = -1;
    const void * address_ = nullptr;
};

inline int device_of_address(const void * address, int * device) {
    std::lock_guard<std::mutex> guard(memory::all().lock);
    const auto                  found = memory::all().holding(address);
    *device                           = found == memory::all().blocks.end() ? -1 : found->second.device;
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Streams and copies
// ---------------------------------------------------------------------------------------------------------------------------------------------

// nullptr: the default stream of the device selected.
inline int device_of(stream s) {
    return s ? s->device : selected();
}

inline int make_stream(stream * made) {
    *made = new stream_handle{ selected() };
    return ok;
}

inline int free_stream(stream s) {
    delete s;
    return ok;
}

inline int make_event(event * made) {
    *made = new event_handle{ selected() };
    return ok;
}

inline int free_event(event e) {
    delete e;
    return ok;
}

inline int record(event e, stream s) {
    return e->device == device_of(s) ? ok : wrong_device;
}

// From and to: the host's memory, or one of the stream's device.
inline int copy(void * to, const void * from, size_t bytes, stream s) {
    for (const void * end : { static_cast<const void *>(to), from }) {
        int device;
        device_of_address(end, &device);
        if (device >= 0 && device != device_of(s)) {
            return wrong_device;
        }
    }
    const within_reach there(to), here(from);
    if (bytes > 0) {
        memmove(to, from, bytes);
    }
    return ok;
}

inline int fill(void * at, int value, size_t bytes, stream s) {
    int device;
    device_of_address(at, &device);
    if (device != device_of(s)) {
        return wrong_device;
    }
    const within_reach there(at);
    memset(at, value, bytes);
    return ok;
}

inline int select_device(int device) {
    if (device < 0 || device >= n_device()) {
        return wrong_device;
    }
    selected() = device;
    return ok;
}

inline int describe(int, device_facts * facts) {
    *facts = {};
    snprintf(facts->name, sizeof facts->name, "a CPU that plays a GPU");
    facts->major        = 8;
    facts->minor        = 6;
    facts->n_processor  = 2;
    facts->shared_bytes = 99 << 10;
    facts->bytes_free = facts->bytes_total = (int64_t) 1 << 34;
    return ok;
}

inline const char * error_text(int error) {
    constexpr const char * texts[] = { "no error", "more shared memory than a block can have", "out of memory", "a stream or memory of another device",
                                       "no device memory" };
    return texts[error];
}

} // namespace emulated

template <class K, class... A> int start(K kernel, dim3 grid, int n_thread, size_t shared_bytes, stream s, const A &... args) {
    constexpr size_t most_shared = 99 << 10; // of sm_86, the least among those built for
    if (shared_bytes > most_shared) {
        return emulated::too_much_shared;
    }
    if (emulated::device_of(s) != emulated::selected()) {
        return emulated::wrong_device;
    }
    const emulated::within_reach memory(emulated::selected());
    cuda_on_cpu::launch(kernel, grid, n_thread, shared_bytes, args...);
    return 0;
}

} // namespace gear::cuda

#include "cuda/launch.cuh"

namespace gear::cuda::emulated {

inline const api table = {
    api_version,
    error_text,
    [](int * n) { return *n = n_device(), 0; },
    [](const void * address, int * device) {
        const int error = device_of_address(address, device);
        if (getenv("GEARCPP_EMULATED_MIXUP")) { // a fault that tests must find
            *device = 0;
        }
        return error;
    },
    select_device,
    [](int * device) { return *device = selected(), 0; },
    describe,

    [] { return 0; },

    allocate,
    release,
    [](void ** at, size_t bytes) { return *at = malloc(bytes + 1), *at ? 0 : (int) out_of_memory; },
    [](void * at) { return free(at), 0; },

    make_stream,
    free_stream,
    [](stream) { return 0; },
    make_event,
    free_event,
    record,
    [](stream, event) { return 0; },
    [](event) { return 0; },

    copy,
    copy,
    copy,
    fill,

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

} // namespace gear::cuda::emulated
