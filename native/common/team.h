// team.h - the threads that run one op together: (ith, nth) and a barrier. Inside llama.cpp the threads are ggml's own; in tests and micro-benchmarks
// run_team starts them.
#pragma once

#include <atomic>
#include <functional>
#include <thread>

namespace gear {

// Reusable: every thread of the team calls wait() the same number of times.
class barrier {
  public:
    void wait(int nth) {
        if (nth == 1) {
            return;
        }
        const int phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == nth - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
            if (spin > 10000) { // more threads than cores: let the others run
                std::this_thread::yield();
            } else {
                relax();
            }
        }
    }

  private:
    static void relax() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    alignas(64) std::atomic<int> arrived_{ 0 };
    alignas(64) std::atomic<int> phase_{ 0 };
};

struct team {
    int       ith; // this thread
    int       nth; // threads of the team
    barrier * sync;
    void      wait() const { sync->wait(nth); }
};

// Run f, which must not throw, on nth threads of its own (tests, micro-benchmarks); the caller is thread 0. Throws gear::error or std::bad_alloc, and
// runs f on none of them, when the system does not give that many threads.
void run_team(int nth, const std::function<void(const team &)> & f);

} // namespace gear
