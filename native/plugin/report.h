// report.h - lines on stderr about ggml and the KV cache, for who cannot ask: programs that load the plugin by GGML_BACKEND_PATH.
#pragma once

#include "cache/side_cache.h"
#include "common/error.h"

#include <vector>

namespace gear {

// GEARCPP_REPORT=1: which ggml was found is told when it is, and what each cache held when it is freed.
bool is_report_wanted();
void report(const std::vector<gear_store_stats> & cache);

// A side that codes a head too badly: what was done about it.
void report_error(const gear_store_stats & side);

// A buffer that is being freed, while it can still say what it holds.
template <class Buffer> void report_freed(Buffer & buffer) noexcept {
    if (is_report_wanted()) {
        guarded([&] {
            std::vector<gear_store_stats> all;
            locked_use(buffer.memory(), [&] { buffer.stats(all); });
            report(all);
        });
    }
}

} // namespace gear
