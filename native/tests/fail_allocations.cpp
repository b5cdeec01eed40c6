// A library for LD_PRELOAD: the allocations that libgearcpp makes inside of a whole process, with llama.cpp and Python around it, are counted and failed
// where a test asks for it (tests/test_out_of_memory.py). An allocation is libgearcpp's when the first function on the stack that is not of the C++
// library is; it is *below* libgearcpp when ggml made it for a call of libgearcpp's.
#define ALLOCATIONS_ONLY_COUNTED
#include "allocations.h"

#include <cstring>
#include <link.h>
#include <mutex>
#include <unwind.h>

namespace {

struct range {
    uintptr_t begin = 0, end = 0;
    bool      has(uintptr_t address) const { return begin <= address && address < end; }
};

range             gearcpp, standard, here; // code of libgearcpp, of libstdc++, of this library
bool              with_below = false;
thread_local bool is_walking = false; // what the unwinder allocates is nobody's

int find_library(dl_phdr_info * info, size_t, void *) {
    range code;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto & part = info->dlpi_phdr[i];
        if (part.p_type == PT_LOAD && (part.p_flags & PF_X)) {
            code = { info->dlpi_addr + part.p_vaddr, info->dlpi_addr + part.p_vaddr + part.p_memsz };
        }
    }
    if (strstr(info->dlpi_name, "libgearcpp.")) {
        gearcpp = code;
    } else if (strstr(info->dlpi_name, "libstdc++")) {
        standard = code;
    } else if (code.has((uintptr_t) &find_library)) {
        here = code;
    }
    return 0;
}

struct walk {
    bool is_first = true, is_ours = false, is_below = false;
};

_Unwind_Reason_Code step(_Unwind_Context * context, void * data) {
    walk &          w  = *static_cast<walk *>(data);
    const uintptr_t ip = _Unwind_GetIP(context);
    if (here.has(ip) || standard.has(ip)) {
        return _URC_NO_REASON;
    }
    w.is_ours |= w.is_first && gearcpp.has(ip);
    w.is_below |= gearcpp.has(ip);
    w.is_first = false;
    return w.is_below || !with_below ? _URC_END_OF_STACK : _URC_NO_REASON;
}

// Whose the allocation is that is made for `caller`.
walk owner(void * caller) {
    walk            w;
    const uintptr_t address = (uintptr_t) caller;
    if (gearcpp.begin == 0 || is_walking) {
        return w;
    }
    if (gearcpp.has(address)) {
        w.is_ours = true;
    } else if (standard.has(address) || (with_below && allocations::armed)) {
        is_walking = true;
        _Unwind_Backtrace(step, &w);
        is_walking = false;
    }
    return w;
}

bool fails(const walk & w) {
    return (w.is_ours || (with_below && w.is_below)) && allocations::fails();
}

// In front of every block.
struct head {
    uint64_t is_ours;
    uint64_t offset; // of the block from the memory that it is in
};
static_assert(sizeof(head) == 16, "the least alignment of a block");

void * allocate(size_t bytes, size_t alignment, void * caller) {
    const walk   w      = owner(caller);
    const size_t offset = alignment > sizeof(head) ? alignment : sizeof(head);
    char *       memory = fails(w) ? nullptr : static_cast<char *>(aligned_alloc(offset, (bytes + 2 * offset - 1) / offset * offset));
    if (!memory) {
        throw std::bad_alloc();
    }
    allocations::n_alive += w.is_ours;
    reinterpret_cast<head *>(memory + offset)[-1] = { w.is_ours, offset };
    return memory + offset;
}

void release(void * block) {
    if (block) {
        const head & of = static_cast<head *>(block)[-1];
        allocations::n_alive -= (int64_t) of.is_ours;
        free(static_cast<char *>(block) - of.offset);
    }
}

template <class F> F real(const char * name) {
    return (F) dlsym(RTLD_NEXT, name);
}

// Mappings of libgearcpp's that are there now.
std::mutex mappings_lock;
void *     mappings[4096];

void replace_mapping(void * from, void * to) {
    std::lock_guard<std::mutex> guard(mappings_lock);
    for (void *& mapping : mappings) {
        if (mapping == from) {
            mapping = to;
            allocations::n_alive += to ? 1 : -1;
            return;
        }
    }
}

} // namespace

void * operator new(size_t bytes) {
    return allocate(bytes, 1, __builtin_return_address(0));
}
void * operator new[](size_t bytes) {
    return allocate(bytes, 1, __builtin_return_address(0));
}
void * operator new(size_t bytes, std::align_val_t alignment) {
    return allocate(bytes, (size_t) alignment, __builtin_return_address(0));
}
void * operator new[](size_t bytes, std::align_val_t alignment) {
    return allocate(bytes, (size_t) alignment, __builtin_return_address(0));
}
void operator delete(void * block) noexcept {
    release(block);
}
void operator delete[](void * block) noexcept {
    release(block);
}
void operator delete(void * block, size_t) noexcept {
    release(block);
}
void operator delete[](void * block, size_t) noexcept {
    release(block);
}
void operator delete(void * block, std::align_val_t) noexcept {
    release(block);
}
void operator delete[](void * block, std::align_val_t) noexcept {
    release(block);
}
void operator delete(void * block, size_t, std::align_val_t) noexcept {
    release(block);
}
void operator delete[](void * block, size_t, std::align_val_t) noexcept {
    release(block);
}

extern "C" {

void * mmap(void * address, size_t bytes, int protection, int flags, int file, off_t offset) noexcept {
    const walk w = owner(__builtin_return_address(0));
    if (fails(w)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void * pages = (void *) syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
    if (w.is_ours && pages != MAP_FAILED) {
        replace_mapping(nullptr, pages);
    }
    return pages;
}

int munmap(void * address, size_t bytes) noexcept {
    replace_mapping(address, nullptr);
    return (int) syscall(SYS_munmap, address, bytes);
}

int mprotect(void * address, size_t bytes, int protection) noexcept {
    if (fails(owner(__builtin_return_address(0)))) {
        errno = ENOMEM;
        return -1;
    }
    return (int) syscall(SYS_mprotect, address, bytes, protection);
}

int pthread_create(pthread_t * thread, const pthread_attr_t * attributes, void * (*f)(void *), void * argument) noexcept {
    static const auto create = real<int (*)(pthread_t *, const pthread_attr_t *, void * (*)(void *), void *)>("pthread_create");
    return fails(owner(__builtin_return_address(0))) ? EAGAIN : create(thread, attributes, f, argument);
}

// What a test calls. below: those below libgearcpp, too.
__attribute__((visibility("default"))) int fail_watch(int below) {
    with_below = below != 0;
    dl_iterate_phdr(find_library, nullptr);
    return gearcpp.begin != 0 && standard.begin != 0;
}

__attribute__((visibility("default"))) void fail_arm(int64_t n, int follow) {
    allocations::arm(n, follow != 0);
}

// Allocations that failed since then.
__attribute__((visibility("default"))) int64_t fail_disarm(void) {
    allocations::disarm();
    return allocations::n_failed;
}

__attribute__((visibility("default"))) int64_t fail_alive(void) {
    return allocations::n_alive;
}

} // extern "C"
