// allocations.h - every allocation of a program counted, and failed where a test asks for it: operator new, mappings and threads. It takes the place of
// the standard library's functions, so one file of a program includes it.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <new>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace allocations {

inline std::atomic<int64_t> n_made{ 0 };  // so far
inline std::atomic<int64_t> n_alive{ 0 }; // blocks and mappings
inline std::atomic<int64_t> n_failed{ 0 };
inline std::atomic<int64_t> countdown{ 0 }; // to the allocation that fails
inline std::atomic<bool>    all_that_follow{ false };
inline std::atomic<bool>    armed{ false };

// From now on the n-th allocation fails, alone or with all that follow.
inline void arm(int64_t n, bool follow) {
    n_failed = 0, countdown = n, all_that_follow = follow;
    armed = true;
}

inline void disarm() {
    armed = false;
}

inline bool fails() {
    if (!armed) {
        return false;
    }
    const int64_t left = --countdown;
    if (left == 0 || (left < 0 && all_that_follow)) {
        ++n_failed;
        return true;
    }
    return false;
}

inline void * counted(void * memory) {
    if (!memory) {
        throw std::bad_alloc();
    }
    ++n_made;
    ++n_alive;
    return memory;
}

inline void release(void * memory) {
    n_alive -= memory != nullptr;
    free(memory);
}

} // namespace allocations

#if !defined(ALLOCATIONS_ONLY_COUNTED)

void * operator new(size_t bytes) {
    return allocations::counted(allocations::fails() ? nullptr : malloc(bytes ? bytes : 1));
}
void * operator new(size_t bytes, std::align_val_t alignment) {
    const size_t a = (size_t) alignment;
    return allocations::counted(allocations::fails() ? nullptr : aligned_alloc(a, (bytes + a - 1) / a * a));
}
void operator delete(void * memory) noexcept {
    allocations::release(memory);
}
void operator delete(void * memory, size_t) noexcept {
    allocations::release(memory);
}
void operator delete(void * memory, std::align_val_t) noexcept {
    allocations::release(memory);
}
void operator delete(void * memory, size_t, std::align_val_t) noexcept {
    allocations::release(memory);
}

#    if !defined(__SANITIZE_THREAD__) // which has to see mappings and threads itself

// In the place of libc's, for this program's own calls.
extern "C" __attribute__((visibility("default"))) void * mmap(void * address, size_t bytes, int protection, int flags, int file, off_t offset) noexcept {
    if (allocations::fails()) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void * pages = (void *) syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
    allocations::n_alive += pages != MAP_FAILED;
    return pages;
}

extern "C" __attribute__((visibility("default"))) int munmap(void * address, size_t bytes) noexcept {
    --allocations::n_alive;
    return (int) syscall(SYS_munmap, address, bytes);
}

extern "C" __attribute__((visibility("default"))) int pthread_create(pthread_t * thread, const pthread_attr_t * attributes, void * (*f)(void *),
                                                                     void * argument) noexcept {
    using function         = int (*)(pthread_t *, const pthread_attr_t *, void * (*)(void *), void *);
    static const auto real = (function) dlsym(RTLD_NEXT, "pthread_create");
    return allocations::fails() ? EAGAIN : real(thread, attributes, f, argument);
}

#    endif
#endif
