// The threadpool: every job runs once on every thread, whether the threads are on the lookout or asleep, and a forked process is not left without them.
#include "check.h"
#include "common/team.h"
#include "gearcpp.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

using namespace gear;

namespace {

void test_every_thread_runs_every_job() {
    for (const int nth : { 1, 2, 5 }) {
        threadpool       pool(nth);
        std::vector<int> n_run((size_t) nth); // by thread: what a job's end does not order is a race
        for (int job = 1; job <= 200; ++job) {
            pool.run([&](const team & t) {
                CHECK(t.nth == nth);
                n_run[(size_t) t.ith] += 1;
                t.wait();
                for (const int n : n_run) {
                    CHECK(n == job);
                }
                t.wait();
            });
        }
    }
}

void test_threads_stay() {
    threadpool      pool(3);
    std::thread::id first[3], later[3];
    pool.run([&](const team & t) { first[t.ith] = std::this_thread::get_id(); });
    std::this_thread::sleep_for(std::chrono::milliseconds(30)); // they sleep by now
    pool.run([&](const team & t) { later[t.ith] = std::this_thread::get_id(); });
    CHECK(std::equal(first, first + 3, later));
    CHECK((std::set<std::thread::id>(first, first + 3).size() == 3));
    CHECK(first[0] == std::this_thread::get_id());
}

// A cache that had threads before the process was forked: the child has none of them, and must not wait for them.
void test_fork() {
    constexpr int           d_head = 64, n_cell = 512, n_threads = 3;
    const gear_cache_params params = { gear_config_default(), { 0, 1, d_head, d_head }, n_cell, 1, n_cell };
    gear_cache *            cache  = gear_cache_new(&params);
    std::vector<int64_t>    cells(n_cell);
    std::vector<float>      rows((size_t) n_cell * d_head, 0.5f), q(d_head, 0.1f), out(d_head);
    std::iota(cells.begin(), cells.end(), 0);
    CHECK(gear_cache_write(cache, GEAR_SIDE_K, n_cell, cells.data(), rows.data(), n_threads) == GEAR_OK);
    CHECK(gear_cache_write(cache, GEAR_SIDE_V, n_cell, cells.data(), rows.data(), n_threads) == GEAR_OK);
    gear_attention_params attend = {};
    attend.n_query = attend.n_head = attend.n_stream = 1;
    attend.n_kv                                      = n_cell;
    attend.q                                         = q.data();
    attend.out                                       = out.data();
    attend.scale                                     = 1;
    const auto gives_the_mean = [&] { return gear_cache_attend(cache, &attend, n_threads) == GEAR_OK && std::fabs(out[0] - 0.5f) < 1e-3f; };
    CHECK(gives_the_mean());
    const pid_t child = fork();
    if (child == 0) {
        alarm(60); // a child that waits for threads that are not there ends by this signal
        const bool ok = gives_the_mean();
        gear_cache_free(cache);
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(gives_the_mean());
    gear_cache_free(cache);
}

} // namespace

int main() {
    test_every_thread_runs_every_job();
    test_threads_stay();
#if !defined(__SANITIZE_THREAD__) // a process with threads that is forked under ThreadSanitizer may not start others
    test_fork();
#endif
    return check::finish();
}
