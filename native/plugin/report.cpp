#include "plugin/report.h"

#include "common/settings.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

namespace gear {

bool is_report_wanted() {
    return settings::reports_caches();
}

void report(const std::vector<gear_store_stats> & cache) {
    int     n_gear = 0;
    int64_t tiles = 0, bytes = 0, f16 = 0, most_packed = 0, most_written = 0, most_cells = 0;
    for (const gear_store_stats & side : cache) {
        n_gear += side.kind == 0;
        tiles += side.n_pack;
        bytes += side.bytes_tiles + side.bytes_exact + side.bytes_tables;
        f16 += side.bytes_f16;
        most_packed  = std::max(most_packed, side.n_packed);
        most_written = std::max(most_written, side.n_written);
        most_cells   = std::max(most_cells, side.n_cell * side.n_stream);
    }
    fprintf(stderr,
            "gearcpp: KV cache freed: %d of %zu tensors GEAR, %" PRId64 " cells, %" PRId64 " rows of them written and %" PRId64 " packed, %" PRId64
            " tiles encoded, %" PRId64 " bytes where f16 takes %" PRId64 "\n",
            n_gear, cache.size(), most_cells, most_written, most_packed, tiles, bytes, f16);
}

void report_error(const gear_store_stats & side) {
    const bool is_k = side.side == GEAR_SIDE_K;
    fprintf(stderr, "gearcpp: layer %d %s: packing changes %s of head %d by %.2g%s; %s\n", side.il, is_k ? "K" : "V", is_k ? "scores" : "values",
            side.worst_head, side.worst_error, is_k ? " nats" : " of their size",
            side.stays_exact
                ? "its new rows stay f16 from here on. Take more bits for this model (gearcpp check)"
                : "there is no memory to keep its rows as f16, so they are packed all the same. Take more bits for this model (gearcpp check)");
}

} // namespace gear
