// cuda_on_cpu.h - what the words of CUDA mean, on a CPU: for tests only. The kernels of native/cuda compile as they stand behind this header, and launch()
// runs them: every thread of a block is a fiber of its own, and fibers switch at barriers and warp collectives only.
//
// Which thread goes on first after a barrier is anybody's guess on a GPU; here it goes by turns from launch to launch (forward, backward, scattered), so
// that a barrier that is missing shows. A barrier that some threads never reach is reported instead of waited for.
//
// ThreadSanitizer is told of the fibers, and that only a launch, a barrier and a warp's exchange order them: so it reports the data races that the threads
// of a block would have on a GPU, although one thread runs at a time here. Blocks follow one another for it, as do launches.
#pragma once

#undef _FORTIFY_SOURCE // it takes a jump from one fiber's stack to another's for a defect

#include "common/half.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#    include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#    include <sanitizer/tsan_interface.h>
#else
#    include <csetjmp> // swapcontext asks the kernel for the signal mask at every switch; _longjmp does not
#endif

#define GEAR_CUDA_ON_CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define GEAR_UNROLL

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

constexpr int    warp_size   = 32;
constexpr int    max_threads = 1024;
constexpr size_t stack_bytes = 64 << 10;
constexpr size_t exchange    = 32; // bytes of the largest value that a warp exchanges

// What ThreadSanitizer is to see: everything before `publish` comes before what follows a later `take` of the same address.
inline void publish([[maybe_unused]] void * address) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(address);
#endif
}
inline void take([[maybe_unused]] void * address) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(address);
#endif
}

// A number of the machine itself, which all fibers use: no race, and no order between them either.
class number {
  public:
    number(int value = 0) : value_(value) {}
    number(const number & other) : value_(other) {}
    number & operator=(const number & other) { return *this = (int) other; }
    number & operator=(int value) {
        value_.store(value, std::memory_order_relaxed);
        return *this;
    }
    operator int() const { return value_.load(std::memory_order_relaxed); }

  private:
    std::atomic<int> value_;
};

// A barrier: it opens, for all, when its generation changes.
struct gate {
    number n_member;
    number n_arrived;
    number generation;
    number vote[2]; // of the generation in progress, and of the one before
};

struct warp_state {
    gate          sync;
    unsigned char slot[2][warp_size][exchange]; // by turns, so that one barrier an exchange is enough
};

struct fiber {
    ucontext_t              context;
    std::unique_ptr<char[]> stack;
    std::atomic<gate *>     waits_for{ nullptr }; // nullptr: it can run
    number                  generation;           // that it waits to be over
    number                  is_done{ 1 };
    dim3                    index;
    int                     turn = 0; // of the warp's slots
#if defined(__SANITIZE_ADDRESS__)
    void * fake_stack = nullptr;
#elif defined(__SANITIZE_THREAD__)
    void * view = nullptr; // ThreadSanitizer's, of this fiber
#else
    jmp_buf saved;
    bool    has_started = false;
#endif
};

// For tests that compare two runs bit for bit, whose launches may be of another number: sums of floats go by the order of threads.
inline bool & order_is_fixed() {
    static bool is_fixed = false;
    return is_fixed;
}

struct machine {
    std::vector<fiber>         fibers{ max_threads };
    std::vector<warp_state>    warps{ max_threads / warp_size };
    gate                       block_sync;
    std::vector<unsigned char> shared;
    dim3                       block_index, block_size, grid_size;
    ucontext_t                 scheduler;
    number                     current;
    int                        n_launch = 0;
    std::function<void()>      kernel;
#if defined(__SANITIZE_ADDRESS__)
    void *       scheduler_fake  = nullptr;
    const void * scheduler_stack = nullptr;
    size_t       scheduler_size  = 0;
#elif defined(__SANITIZE_THREAD__)
    std::atomic<void *> scheduler_view{ nullptr };
#else
    jmp_buf scheduler_saved;
#endif

    fiber &      self() { return fibers[current]; }
    warp_state & warp() { return warps[current / warp_size]; }
};

inline machine & the_machine() {
    static machine m;
    return m;
}

inline void to_scheduler() {
    machine & m = the_machine();
    fiber &   f = m.self();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&f.fake_stack, m.scheduler_stack, m.scheduler_size);
    swapcontext(&f.context, &m.scheduler);
    __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(m.scheduler_view.load(std::memory_order_relaxed), __tsan_switch_to_fiber_no_sync);
    swapcontext(&f.context, &m.scheduler);
#else
    if (_setjmp(f.saved) == 0) {
        _longjmp(m.scheduler_saved, 1);
    }
#endif
}

inline void fiber_main() {
    machine & m = the_machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_size);
#endif
    for (;;) { // a fiber serves block after block: making one costs more than most kernels
        take(&m.kernel);
        m.kernel();
        m.self().is_done = 1;
        publish(&m.block_sync);
        to_scheduler();
    }
}

inline void resume(int thread) {
    machine & m = the_machine();
    fiber &   f = m.fibers[thread];
    m.current   = thread;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&m.scheduler_fake, f.stack.get(), stack_bytes);
    swapcontext(&m.scheduler, &f.context);
    __sanitizer_finish_switch_fiber(m.scheduler_fake, nullptr, nullptr);
#elif defined(__SANITIZE_THREAD__)
    m.scheduler_view.store(__tsan_get_current_fiber(), std::memory_order_relaxed);
    f.view = f.view ? f.view : __tsan_create_fiber(0);
    __tsan_switch_to_fiber(f.view, __tsan_switch_to_fiber_no_sync);
    swapcontext(&m.scheduler, &f.context);
#else
    if (_setjmp(m.scheduler_saved) != 0) {
        return;
    }
    if (f.has_started) {
        _longjmp(f.saved, 1);
    }
    f.has_started = true;
    setcontext(&f.context);
#endif
}

// Returns the bitwise or of all votes.
inline int arrive(gate & g, int vote = 0) {
    const int generation   = g.generation;
    g.vote[generation & 1] = g.vote[generation & 1] | vote;
    g.n_arrived            = g.n_arrived + 1;
    publish(&g);
    if (g.n_arrived == g.n_member) {
        g.n_arrived             = 0;
        g.vote[~generation & 1] = 0;
        g.generation            = generation + 1;
    } else {
        fiber & f = the_machine().self();
        f.waits_for.store(&g, std::memory_order_relaxed);
        f.generation = generation;
        to_scheduler();
    }
    take(&g);
    return g.vote[generation & 1];
}

inline int index_in_order(int i, int n, int order) {
    return order == 0 ? i : order == 1 ? n - 1 - i : (int) ((i * 37ll + 11) % n); // block sizes are powers of two, so that 37 reaches all
}

inline void run_block(int n_thread) {
    machine & m  = the_machine();
    m.block_sync = {};
    for (int i = 0; i < n_thread; ++i) {
        fiber & f = m.fibers[i];
        f.waits_for.store(nullptr, std::memory_order_relaxed);
        f.is_done = 0;
        f.turn    = 0;
        f.index   = dim3((unsigned) i, 0, 0);
        if (!f.stack) {
            f.stack.reset(new char[stack_bytes]);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp   = f.stack.get();
            f.context.uc_stack.ss_size = stack_bytes;
            f.context.uc_link          = nullptr;
            makecontext(&f.context, fiber_main, 0);
        }
    }
    m.block_sync.n_member = n_thread;
    for (int i = 0; i < n_thread / warp_size; ++i) {
        m.warps[i].sync          = {};
        m.warps[i].sync.n_member = warp_size;
    }
    publish(&m.kernel);
    for (int n_done = 0; n_done < n_thread;) {
        bool moved = false;
        for (int i = 0; i < n_thread; ++i) {
            const int    thread  = index_in_order(i, n_thread, order_is_fixed() ? 0 : m.n_launch % 3);
            fiber &      f       = m.fibers[thread];
            const gate * barrier = f.waits_for.load(std::memory_order_relaxed);
            if (f.is_done || (barrier && barrier->generation == f.generation)) {
                continue;
            }
            f.waits_for.store(nullptr, std::memory_order_relaxed);
            moved = true;
            resume(thread);
            n_done += f.is_done;
        }
        if (!moved) {
            fprintf(stderr, "cuda_on_cpu: a barrier that some threads of the block never reach\n");
            abort();
        }
    }
    take(&m.block_sync);
}

// A warp's threads see each other's values.
template <class T, class F> auto collective(const T & value, F && f) {
    static_assert(sizeof(T) <= exchange, "a value of a warp exchange");
    machine &    m    = the_machine();
    warp_state & w    = m.warp();
    const int    turn = m.self().turn ^= 1;
    memcpy(w.slot[turn][m.current % warp_size], &value, sizeof value);
    arrive(w.sync);
    return f([&w, turn](int lane) {
        T other;
        memcpy(&other, w.slot[turn][lane], sizeof other);
        return other;
    });
}

template <class K, class... Args> void launch(K kernel, dim3 grid, int n_thread, size_t shared_bytes, Args... args) {
    machine & m = the_machine();
    if (n_thread % warp_size != 0 || n_thread > max_threads) {
        fprintf(stderr, "cuda_on_cpu: a block of %d threads\n", n_thread);
        abort();
    }
    m.kernel     = [=] { kernel(args...); };
    m.grid_size  = grid;
    m.block_size = dim3((unsigned) n_thread);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                m.block_index = dim3(x, y, z);
                m.shared.assign(shared_bytes + 16, 0xff); // shared memory holds anything at first: NaN, here
                run_block(n_thread);
            }
        }
    }
    ++m.n_launch;
}

} // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::the_machine().self().index)
#define blockIdx (cuda_on_cpu::the_machine().block_index)
#define blockDim (cuda_on_cpu::the_machine().block_size)
#define gridDim (cuda_on_cpu::the_machine().grid_size)

inline void __syncthreads() {
    cuda_on_cpu::arrive(cuda_on_cpu::the_machine().block_sync);
}

inline int __syncthreads_or(int vote) {
    return cuda_on_cpu::arrive(cuda_on_cpu::the_machine().block_sync, vote != 0);
}

inline void __syncwarp() {
    cuda_on_cpu::arrive(cuda_on_cpu::the_machine().warp().sync);
}

template <class T> T __shfl_xor_sync(unsigned, T value, int lane_mask) {
    const int lane = cuda_on_cpu::the_machine().current % cuda_on_cpu::warp_size;
    return cuda_on_cpu::collective(value, [=](auto of) { return of(lane ^ lane_mask); });
}

template <class T> T __shfl_sync(unsigned, T value, int source) {
    return cuda_on_cpu::collective(value, [=](auto of) { return of(source % cuda_on_cpu::warp_size); });
}

// One thread runs at a time, so that every addition is atomic: but ThreadSanitizer has to be told.
template <class T> T atomicAdd(T * to, T value) {
    T before, after;
    __atomic_load(to, &before, __ATOMIC_RELAXED);
    after = before + value;
    __atomic_store(to, &after, __ATOMIC_RELAXED);
    return before;
}

namespace gear::cuda {

inline unsigned char * shared_memory() {
    auto & shared = cuda_on_cpu::the_machine().shared;
    return (unsigned char *) (((uintptr_t) shared.data() + 15) / 16 * 16);
}

inline float from_half(uint16_t half) {
    return half_to_float(half);
}

inline uint16_t to_half(float value) {
    return float_to_half(value);
}

// To nearest, ties to even; numbers only.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t) ((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t value) {
    const uint32_t bits = (uint32_t) value << 16;
    float          f;
    memcpy(&f, &bits, 4);
    return f;
}

inline uint32_t half_pair(float low, float high) {
    return to_half(low) | (uint32_t) to_half(high) << 16;
}

inline uint32_t bf16_pair(float low, float high) {
    return to_bf16(low) | (uint32_t) to_bf16(high) << 16;
}

inline uint32_t codes_to_bf16(uint32_t codes) {
    return bf16_pair((float) (codes & 0x7f), (float) (codes >> 16 & 0x7f));
}

inline float exp2_fast(float x) {
    return std::exp2(x);
}

// mma.sync.m16n8k16: who holds which entry is told in tile_device.cuh.
template <class Value> void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
    struct fragments {
        uint32_t a[4], b[2];
    };
    const int lane = cuda_on_cpu::the_machine().current % cuda_on_cpu::warp_size;
    cuda_on_cpu::collective(fragments{ { a[0], a[1], a[2], a[3] }, { b[0], b[1] } }, [&](auto of) {
        const auto entry = [&](uint32_t pair, int high) { return value((uint16_t) (pair >> 16 * high)); };
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
                const fragments of_a = of(row % 8 * 4 + k % 8 / 2), of_b = of(column * 4 + k % 8 / 2);
                c[i] += entry(of_a.a[row / 8 + k / 8 * 2], k % 2) * entry(of_b.b[k / 8], k % 2);
            }
        }
        return 0;
    });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x16(c, a, b, from_bf16);
}

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x16(c, a, b, from_half);
}

} // namespace gear::cuda
