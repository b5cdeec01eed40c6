// format.h - the container of a session: a head, sections each with a checksum of its own, and an end that says how long the whole is. This room knows
// stores (store_image.h) and no ggml.
//
//     head      "GEARSESS", u32 version, u32 0, u64 checksum of these 16 bytes
//     section   u32 kind, u32 0, u64 size of the payload;  payload;  u64 checksum of all of it, its head included
//     ...
//     end       a section without payload; nothing follows it
//
// Checksums are XXH64, all numbers little-endian. A reader refuses any version but its own: raise it with every change of what is written here, in
// store_image.h or in native/plugin/kv_session.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace gear {

constexpr uint32_t session_version = 1;

// Where a session goes to, and where it comes from. What fails is thrown as gear::error.
class output {
  public:
    virtual ~output()                               = default;
    virtual void write(const void * data, size_t n) = 0;

    template <class T> void put(const T & value) { write(&value, sizeof value); }
};

class input {
  public:
    virtual ~input()                                                    = default;
    virtual uint64_t size() const                                       = 0;
    virtual void     read(uint64_t offset, void * data, size_t n) const = 0; // all n bytes
};

enum class section_kind : uint32_t {
    end     = 0,
    note    = 1, // what the caller wants to find again first
    state   = 2, // llama.cpp's state without the rows that are in stores
    tensor  = 3, // one store
    extra   = 4, // more of the caller's, perhaps large
    learned = 5, // what the codec of the store before it has learned (tile_codec::learned); left out where that is nothing
};

struct section {
    section_kind kind;
    uint64_t     offset; // of the payload
    uint64_t     size;
};

void write_head(output & out);
// body writes the payload; it is called twice, first to learn its size.
void write_section(output & out, section_kind kind, const std::function<void(output &)> & body);

// The sections of a session that is whole: every byte of it has been read and agrees with its checksum. GEAR_ERROR_DATA with the reason otherwise.
std::vector<section> check_sections(const input & in);
// Only the head and the first section.
section              check_first_section(const input & in);

// Reads a payload from front to back, and never past its end.
class cursor {
  public:
    cursor(const input & in, const section & of) : in_(in), at_(of.offset), end_(of.offset + of.size) {}

    uint64_t offset() const { return at_ - n_ahead(); }
    uint64_t left() const { return end_ - offset(); }
    void     bytes(void * data, size_t n);
    void     skip(uint64_t n);
    // Throws unless the payload has room for n items of this size: before memory is made for them.
    void     require(uint64_t n, uint64_t item_size) const;

    template <class T> T value() {
        T value;
        bytes(&value, sizeof value);
        return value;
    }

  private:
    uint64_t n_ahead() const { return block_.size() - taken_; }

    const input &        in_;
    uint64_t             at_, end_; // of what has not been read yet
    std::vector<uint8_t> block_;    // read, and taken_ bytes of it handed out
    size_t               taken_ = 0;
};

} // namespace gear
