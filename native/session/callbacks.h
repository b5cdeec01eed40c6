// callbacks.h - a session written and read through functions of the caller's (gear_session_write, gear_session_read).
#pragma once

#include "common/error.h"
#include "session/format.h"

#include <algorithm>
#include <vector>

namespace gear {

// Collects small writes: a call of the caller's function may be slow.
class callback_output final : public output {
  public:
    callback_output(gear_session_write write, void * user) : write_(write), user_(user) { block_.reserve(block_bytes); }

    void write(const void * data, size_t n) override {
        if (block_.size() + n > block_bytes) {
            finish();
        }
        if (n >= block_bytes) {
            pass(data, n);
        } else {
            block_.insert(block_.end(), (const uint8_t *) data, (const uint8_t *) data + n);
        }
    }
    void finish() {
        if (!block_.empty()) {
            pass(block_.data(), block_.size());
            block_.clear();
        }
    }

  private:
    static constexpr size_t block_bytes = (size_t) 1 << 18;

    void pass(const void * data, size_t n) {
        if (write_(user_, data, (int64_t) n) != 0) {
            fail(GEAR_ERROR_CALLBACK, "the session could not be written");
        }
    }

    gear_session_write   write_;
    void *               user_;
    std::vector<uint8_t> block_;
};

class callback_input final : public input {
  public:
    callback_input(int64_t size, gear_session_read read, void * user) : size_(size), read_(read), user_(user) {}

    uint64_t size() const override { return (uint64_t) size_; }
    void     read(uint64_t offset, void * data, size_t n) const override {
        for (size_t done = 0, n_now = 0; done < n; done += n_now) {
            n_now = std::min(n - done, most_bytes);
            if (read_(user_, (int64_t) (offset + done), (uint8_t *) data + done, (int64_t) n_now) != 0) {
                fail(GEAR_ERROR_CALLBACK, "the session could not be read");
            }
        }
    }

  private:
    static constexpr size_t most_bytes = (size_t) 1 << 24; // of one call: systems give no more than 2 GiB at once

    int64_t           size_;
    gear_session_read read_;
    void *            user_;
};

} // namespace gear
