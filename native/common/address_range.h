// address_range.h - addresses without memory behind them: what a cache tensor and a session's window are to llama.cpp.
#pragma once

#include <cstddef>

namespace gear {

// A range of addresses without memory behind it until commit().
class address_range {
  public:
    explicit address_range(size_t bytes);
    ~address_range();
    address_range(const address_range &)             = delete;
    address_range & operator=(const address_range &) = delete;

    char * data() const { return data_; }
    size_t size() const { return size_; }
    void   commit(); // readable and writable, zero. Throws gear::error when memory is short.

  private:
    char * data_;
    size_t size_;
};

} // namespace gear
