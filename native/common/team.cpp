#include "common/team.h"

#include "common/error.h"

#include <system_error>
#include <vector>

namespace gear {

namespace {

enum class start : int { pending, go, cancelled };

// Threads that wait for each other to be there: f may only begin when all of them can.
class crew {
  public:
    crew(int nth, const std::function<void(const team &)> & f) {
        try {
            threads_.reserve(nth - 1);
            for (int ith = 1; ith < nth; ++ith) {
                threads_.emplace_back([this, ith, nth, &f] {
                    while (start_ == start::pending) {
                        std::this_thread::yield();
                    }
                    if (start_ == start::go) {
                        f({ ith, nth, &sync });
                    }
                });
            }
        } catch (...) {
            finish(start::cancelled);
            throw;
        }
    }

    void finish(start how) {
        start_ = how;
        for (std::thread & thread : threads_) {
            thread.join();
        }
    }

    void begin() { start_ = start::go; }

    barrier sync;

  private:
    std::atomic<start>       start_{ start::pending };
    std::vector<std::thread> threads_;
};

} // namespace

void run_team(int nth, const std::function<void(const team &)> & f) {
    try {
        crew others(nth, f);
        others.begin();
        f({ 0, nth, &others.sync });
        others.finish(start::go);
    } catch (const std::system_error & e) {
        fail(GEAR_ERROR_MEMORY, "the system does not give %d threads: %s", nth, e.what());
    }
}

} // namespace gear
