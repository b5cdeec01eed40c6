// team.h - the threads that run one op together: (ith, nth) and a barrier. Inside llama.cpp the threads are ggml's own; elsewhere a threadpool has them.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

namespace gear {

// Between two looks at what another thread is to do. `spin` counts the looks; after so many it is likely that there are more threads than cores.
inline void pause(int spin, int n_before_yield) {
    if (spin > n_before_yield) { // let the others run
        std::this_thread::yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

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
            pause(spin, 2000); // 50 us on a Zen 4: tasks are of one size, so who waits longer waits for a thread that has no core
        }
    }

  private:
    alignas(64) std::atomic<int> arrived_{ 0 };
    alignas(64) std::atomic<int> phase_{ 0 };
};

struct team {
    int       ith; // this thread
    int       nth; // threads of the team
    barrier * sync;
    void      wait() const { sync->wait(nth); }
};

// Threads that stay from op to op. One that has nothing to do looks out for work for a few milliseconds before it sleeps, as ggml's threads do: an op that
// follows the last one closely waits for no thread to wake up, which takes up to a millisecond.
class threadpool {
  public:
    // The caller of run() is thread 0, the pool starts nth - 1 more. Throws gear::error or std::bad_alloc when the system does not give them.
    explicit threadpool(int nth);
    ~threadpool();
    threadpool(const threadpool &)             = delete;
    threadpool & operator=(const threadpool &) = delete;

    int  nth() const { return nth_; }
    // The threads are there. Not in a process that was forked off since.
    bool is_alive() const;
    // f, which must not throw, on all threads. One caller at a time.
    void run(const std::function<void(const team &)> & f);

  private:
    struct workers;
    int                      nth_;
    int                      process_;
    std::unique_ptr<workers> workers_;
};

// Run f on a threadpool of its own. Throws as the threadpool does, and runs f on no thread then.
void run_team(int nth, const std::function<void(const team &)> & f);

} // namespace gear
