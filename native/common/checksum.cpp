#include "common/checksum.h"

#include <algorithm>
#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sessions are little-endian, and so are all machines that gearcpp has kernels for");

namespace gear {

namespace {

constexpr uint64_t prime1 = 0x9e3779b185ebca87, prime2 = 0xc2b2ae3d27d4eb4f, prime3 = 0x165667b19e3779f9, prime4 = 0x85ebca77c2b2ae63,
                   prime5 = 0x27d4eb2f165667c5;
constexpr size_t   stripe = 32; // bytes: 8 for each lane

uint64_t rotate(uint64_t x, int bits) {
    return x << bits | x >> (64 - bits);
}

uint64_t word64(const uint8_t * p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

uint32_t word32(const uint8_t * p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

uint64_t mix(uint64_t lane, uint64_t word) {
    return rotate(lane + word * prime2, 31) * prime1;
}

void take(uint64_t lane[4], const uint8_t * p) {
    for (int i = 0; i < 4; ++i) {
        lane[i] = mix(lane[i], word64(p + 8 * i));
    }
}

} // namespace

void checksum::add(const void * data, size_t n) {
    const uint8_t * p      = (const uint8_t *) data;
    const size_t    n_rest = n_ % stripe;
    n_ += n;
    if (n_rest > 0) {
        const size_t n_fill = std::min(stripe - n_rest, n);
        std::copy_n(p, n_fill, rest_ + n_rest);
        p += n_fill;
        n -= n_fill;
        if (n_rest + n_fill < stripe) {
            return;
        }
        take(lane_, rest_);
    }
    for (; n >= stripe; p += stripe, n -= stripe) {
        take(lane_, p);
    }
    std::copy_n(p, n, rest_);
}

uint64_t checksum::value() const {
    uint64_t sum = prime5;
    if (n_ >= stripe) {
        sum = rotate(lane_[0], 1) + rotate(lane_[1], 7) + rotate(lane_[2], 12) + rotate(lane_[3], 18);
        for (const uint64_t lane : lane_) {
            sum = (sum ^ mix(0, lane)) * prime1 + prime4;
        }
    }
    sum += n_;
    const uint8_t * p = rest_;
    size_t          n = n_ % stripe;
    for (; n >= 8; p += 8, n -= 8) {
        sum = rotate(sum ^ mix(0, word64(p)), 27) * prime1 + prime4;
    }
    if (n >= 4) {
        sum = rotate(sum ^ word32(p) * prime1, 23) * prime2 + prime3;
        p += 4;
        n -= 4;
    }
    for (; n > 0; ++p, --n) {
        sum = rotate(sum ^ *p * prime5, 11) * prime1;
    }
    sum = (sum ^ sum >> 33) * prime2;
    sum = (sum ^ sum >> 29) * prime3;
    return sum ^ sum >> 32;
}

} // namespace gear
