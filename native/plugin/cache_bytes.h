// cache_bytes.h - ggml's byte ranges of a cache tensor as rows of cells.
#pragma once

#include "common/error.h"

#include <algorithm>
#include <cstdint>

namespace gear {

// The rows that a byte range covers: row `first` from byte `skip` on.
struct row_range {
    int64_t first, n;
    size_t  skip;
};

// `size` bytes from `begin` on, of a tensor of `all` bytes in rows of `row`.
inline row_range rows_of(size_t begin, size_t size, size_t all, size_t row) {
    if (begin + size > all) {
        fail(GEAR_ERROR_INVALID, "bytes %zu to %zu are outside of the cache tensor (%zu bytes)", begin, begin + size, all);
    }
    const int64_t first = (int64_t) (begin / row);
    return { first, (int64_t) ((begin + size + row - 1) / row) - first, begin % row };
}

// Whether `size` bytes that cover this range are whole rows of `row` bytes.
inline bool is_whole(const row_range & range, size_t size, size_t row) {
    return range.skip == 0 && size % row == 0;
}

// The same of bytes that can be read as f16 where they are.
inline bool is_whole(const row_range & range, size_t size, size_t row, const void * data) {
    return is_whole(range, size, row) && (uintptr_t) data % alignof(uint16_t) == 0;
}

template <class T> bool all_zero(const T * values, int64_t n) {
    return std::all_of(values, values + n, [](T value) { return value == 0; });
}

// Rows f16 [n, n_embd] in runs of at most `most`: f(first row, rows, is_zero). Rows of zeros are cells that llama.cpp clears, not data.
template <class F> void for_each_run(const uint16_t * rows, int64_t n, int64_t n_embd, int64_t most, F f) {
    for (int64_t i = 0; i < n;) {
        const bool    zero  = all_zero(rows + i * n_embd, n_embd);
        const int64_t begin = i;
        while (i < n && i - begin < most && all_zero(rows + i * n_embd, n_embd) == zero) {
            ++i;
        }
        f(begin, i - begin, zero);
    }
}

} // namespace gear
