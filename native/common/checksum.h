// checksum.h - XXH64 (the xxHash algorithm, seed 0), 64 bits over any number of bytes given piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gear {

class checksum {
  public:
    void     add(const void * data, size_t n);
    uint64_t value() const; // of all bytes added so far

  private:
    // What the lanes start with follows from the algorithm's primes.
    uint64_t lane_[4] = { 0x60ea27eeadc0b5d6, 0xc2b2ae3d27d4eb4f, 0, 0x61c8864e7a143579 };
    uint8_t  rest_[32]; // bytes that do not fill a stripe yet
    uint64_t n_ = 0;    // bytes added
};

inline uint64_t checksum_of(const void * data, size_t n) {
    checksum sum;
    sum.add(data, n);
    return sum.value();
}

} // namespace gear
