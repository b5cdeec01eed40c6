// check.h - what the native tests are written with: check() says file, line and expression, counts, and main() returns the count of failures.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace check {

inline std::atomic<int> passed{ 0 }, failed{ 0 }; // threads of a team check, too

inline void report(bool ok, const char * file, int line, const char * expression) {
    ok ? ++passed : ++failed;
    if (!ok) {
        printf("%s:%d: failed: %s\n", file, line, expression);
    }
}

inline void report_near(double a, double b, double tolerance, const char * file, int line, const char * expression) {
    const bool ok = std::fabs(a - b) <= tolerance; // false for NaN
    ok ? ++passed : ++failed;
    if (!ok) {
        printf("%s:%d: failed: %s: %.9g against %.9g, tolerance %.3g\n", file, line, expression, a, b, tolerance);
    }
}

// Seed of the random tests: GEARCPP_TEST_SEED or 1; printed, so that a failure can be had again.
inline uint32_t seed() {
    static const uint32_t value = [] {
        const char *   text = getenv("GEARCPP_TEST_SEED");
        const uint32_t s    = text ? (uint32_t) strtoul(text, nullptr, 10) : 1;
        printf("seed %u\n", s);
        return s;
    }();
    return value;
}

inline int finish() {
    printf("%d passed, %d failed\n", (int) passed, (int) failed);
    return failed != 0;
}

} // namespace check

#define CHECK(expression) check::report((expression), __FILE__, __LINE__, #expression)
#define CHECK_NEAR(a, b, tolerance) check::report_near((a), (b), (tolerance), __FILE__, __LINE__, #a " ~ " #b)
