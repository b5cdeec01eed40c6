#include "common/team.h"

#include "common/error.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <unistd.h>
#include <vector>

namespace gear {

namespace {

using job   = std::function<void(const team &)>;
using clock = std::chrono::steady_clock;

constexpr auto polling_time   = std::chrono::milliseconds(5);
constexpr int  n_before_yield = 1000;

} // namespace

struct threadpool::workers {
    barrier sync;
    alignas(64) std::atomic<int> n_job{ 0 };  // that the pool was given
    alignas(64) std::atomic<int> n_busy{ 0 }; // threads that have not finished the last one
    const job *              f = nullptr;     // the last one; nullptr: the threads end
    std::mutex               lock;            // of n_job, for those who sleep
    std::condition_variable  changed;
    std::vector<std::thread> threads;

    void give(const job * next) {
        f = next;
        n_busy.store((int) threads.size(), std::memory_order_relaxed);
        {
            const std::lock_guard<std::mutex> guard(lock);
            n_job.fetch_add(1, std::memory_order_release);
        }
        changed.notify_all();
    }

    void end() {
        give(nullptr);
        for (std::thread & thread : threads) {
            thread.join();
        }
    }

    bool has_job(int n_seen) const { return n_job.load(std::memory_order_acquire) != n_seen; }

    void wait_for_job(int n_seen) {
        const auto end = clock::now() + polling_time;
        for (int spin = 0; !has_job(n_seen); ++spin) {
            if (spin % 1024 == 1023 && clock::now() > end) {
                std::unique_lock<std::mutex> guard(lock);
                changed.wait(guard, [&] { return has_job(n_seen); });
            } else {
                pause(spin, n_before_yield);
            }
        }
    }

    void serve(int ith, int nth) {
        for (int n_seen = 0;; ++n_seen) {
            wait_for_job(n_seen);
            if (!f) {
                return;
            }
            (*f)({ ith, nth, &sync });
            n_busy.fetch_sub(1, std::memory_order_release);
        }
    }
};

threadpool::threadpool(int nth) : nth_(nth), process_((int) getpid()), workers_(std::make_unique<workers>()) {
    workers & all = *workers_;
    try {
        all.threads.reserve((size_t) nth - 1);
        for (int ith = 1; ith < nth; ++ith) {
            all.threads.emplace_back([&all, ith, nth] { all.serve(ith, nth); });
        }
    } catch (const std::system_error & e) {
        all.end();
        fail(GEAR_ERROR_MEMORY, "the system does not give %d threads: %s", nth, e.what());
    } catch (...) {
        all.end();
        throw;
    }
}

threadpool::~threadpool() {
    if (is_alive()) {
        workers_->end();
    } else {
        (void) workers_.release(); // there is nobody to join, and who held the lock when the process forked cannot be known
    }
}

bool threadpool::is_alive() const {
    return process_ == (int) getpid();
}

void threadpool::run(const job & f) {
    workers & all = *workers_;
    all.give(&f);
    f({ 0, nth_, &all.sync });
    for (int spin = 0; all.n_busy.load(std::memory_order_acquire) != 0; ++spin) {
        pause(spin, n_before_yield);
    }
}

void run_team(int nth, const job & f) {
    threadpool(nth).run(f);
}

} // namespace gear
