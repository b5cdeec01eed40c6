// memory.h - aligned scratch, and big blocks of memory: reserved in one piece, paid for page by page as they are touched, refused early when the machine
// does not have them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gear {

constexpr size_t cache_line = 64;

// Rounded up to whole cache lines.
inline size_t padded(size_t bytes) {
    return (bytes + cache_line - 1) / cache_line * cache_line;
}

// Scratch that begins on a cache line and only grows; growing loses what it held.
class aligned_buffer {
  public:
    aligned_buffer() = default;
    ~aligned_buffer();
    aligned_buffer(const aligned_buffer &)             = delete;
    aligned_buffer & operator=(const aligned_buffer &) = delete;
    uint8_t *        reserve(size_t bytes); // throws std::bad_alloc

  private:
    uint8_t * data_ = nullptr;
    size_t    size_ = 0;
};

// An anonymous mapping, page-aligned; reads as zeros until written.
class mapping {
  public:
    mapping() = default;
    explicit mapping(size_t bytes); // throws gear::error (GEAR_ERROR_MEMORY)
    ~mapping();
    mapping(mapping && other) noexcept;
    mapping & operator=(mapping && other) noexcept;

    uint8_t * data() const { return data_; }
    size_t    size() const { return size_; }
    // The contents are of no more use: give the pages back, keep the addresses.
    void      discard();

  private:
    uint8_t * data_ = nullptr;
    size_t    size_ = 0;
};

// Memory that new allocations can have without swapping: of the machine, or less where a control group limits the process (a container, a systemd unit,
// a batch system). SIZE_MAX where the system does not say.   root: stands before every path that is read, for tests
size_t available_memory(const char * root = "");

// Throws gear::error (GEAR_ERROR_MEMORY) with the sizes and what to do when `bytes` are not available. what: who needs them.
void require_memory(size_t bytes, const char * what);

} // namespace gear
