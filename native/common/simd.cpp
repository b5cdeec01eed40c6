#include "common/simd.h"

#include "common/error.h"
#include "common/settings.h"
#include "gearcpp.h"

#include <atomic>
#include <cstring>
#include <string>
#if defined(__x86_64__)
#    include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#    include <asm/hwcap.h>
#    include <sys/auxv.h>
#endif

namespace gear {

namespace {

struct level_name {
    simd_level   level;
    const char * name;
};

// Best first. Found out at first use, which may be in a thread that must not throw: without an allocation.
class level_list {
  public:
    void               push_back(const level_name & level) { levels_[n_++] = level; }
    int                size() const { return n_; }
    const level_name & front() const { return levels_[0]; }
    const level_name * begin() const { return levels_; }
    const level_name * end() const { return levels_ + n_; }

  private:
    level_name levels_[4];
    int        n_ = 0;
};

#if defined(__x86_64__)

// What the processor has and the system saves for each thread. Asked of the processor itself: not every compiler's run-time library answers
// __builtin_cpu_supports (that of zig says no to everything).
struct x86_features {
    bool avx2 = false, avx512vnni = false; // with all that the kernels of these levels use besides

    x86_features() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) {
            return;
        }
        constexpr unsigned fma = 1u << 12, osxsave = 1u << 27, f16c = 1u << 29;
        const bool         has_saves = (c & osxsave) != 0, has_f16 = (c & fma) && (c & f16c);
        if (!has_saves || !has_f16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
            return;
        }
        constexpr unsigned avx2_bit = 1u << 5, avx512f = 1u << 16, avx512dq = 1u << 17, avx512bw = 1u << 30, avx512vl = 1u << 31, vnni = 1u << 11;
        constexpr unsigned avx512 = avx512f | avx512dq | avx512bw | avx512vl;
        constexpr unsigned ymm = 0x06, zmm = 0xe6; // registers, in what xgetbv says is saved
        unsigned           saved, high;
        __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        avx2       = (saved & ymm) == ymm && (b & avx2_bit);
        avx512vnni = avx2 && (saved & zmm) == zmm && (b & avx512) == avx512 && (c & vnni);
    }
};

#endif

const level_list & available() {
    static const level_list levels = [] {
        level_list found;
#if defined(__x86_64__)
        const x86_features has;
        if (has.avx512vnni) {
            found.push_back({ simd_level::avx512vnni, "avx512vnni" });
        }
        if (has.avx2) {
            found.push_back({ simd_level::avx2, "avx2" });
        }
#elif defined(__aarch64__) && defined(__linux__)
        if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
            found.push_back({ simd_level::neon, "neon" });
        }
#elif defined(__aarch64__) && defined(__APPLE__)
        found.push_back({ simd_level::neon, "neon" });
#endif
        found.push_back({ simd_level::scalar, "scalar" });
        return found;
    }();
    return levels;
}

const level_name * find(const char * name) {
    for (const auto & level : available()) {
        if (strcmp(level.name, name) == 0) {
            return &level;
        }
    }
    return nullptr;
}

std::atomic<const level_name *> & selected() {
    static std::atomic<const level_name *> level = [] {
        const char *       wanted = settings::simd_level();
        const level_name * found  = wanted ? find(wanted) : nullptr;
        return found ? found : &available().front();
    }();
    return level;
}

} // namespace

simd_level simd_current() {
    return selected().load(std::memory_order_relaxed)->level;
}

} // namespace gear

extern "C" const char * gear_simd_name(int32_t i) {
    const auto & levels = gear::available();
    return i >= 0 && i < levels.size() ? levels.begin()[i].name : nullptr;
}

extern "C" const char * gear_simd_current(void) {
    return gear::selected().load()->name;
}

extern "C" gear_status gear_simd_select(const char * name) {
    return gear::guarded([&] {
        const gear::level_name * level = name && *name ? gear::find(name) : &gear::available().front();
        if (!level) {
            std::string names;
            for (const auto & known : gear::available()) {
                names += names.empty() ? known.name : std::string(", ") + known.name;
            }
            gear::fail(GEAR_ERROR_INVALID, "kernel level '%s' is not available on this machine; available: %s", name, names.c_str());
        }
        gear::selected().store(level);
    });
}
