// side_cache.h - the cache of one side (K or V) of one layer, wherever its memory is: what the plugin sees. host_side.h has the form in host memory,
// cuda_side.h the one in a GPU's.
#pragma once

#include "common/address_range.h"
#include "session/store_image.h"
#include "store/store.h"

#include <functional>
#include <mutex>

namespace gear {

// Memory that the wrapped device can compute in, for the rows of a K-shift: [n_tile * tile, n_embd]. A side in host memory brings its own.
struct shift_memory {
    uint16_t * rows   = nullptr;
    int64_t    n_tile = 0;
};

class side_cache {
  public:
    virtual ~side_cache() = default;

    virtual const store_shape & shape() const     = 0;
    virtual bool                has_codec() const = 0; // false: the side is kept as f16

    // Rows f16 [n, n_embd] in host memory. As in store: cells are global, those never written read as zeros.
    virtual void write(int64_t n, const int64_t * cells, const uint16_t * rows) = 0;
    virtual void read(int64_t cell, int64_t n, uint16_t * rows)                 = 0;
    virtual void erase(int64_t cell, int64_t n)                                 = 0;
    // All cells of stream `from` of `source` become those of stream `to`; packed tiles are copied bit for bit. false: this cache cannot copy from that
    // one, and nothing has changed.
    virtual bool copy_stream(int from, const side_cache & source, int to)       = 0;

    // Rewrite rows in place (the K-shift): f gets the rows of tiles with a marked cell, f16 [n, n_embd] where the wrapped device can compute, and their
    // first cell, and changes the marked ones. Other tiles are not touched.
    //   marked u8 [n_stream * n_cell]
    using rewrite = std::function<void(int64_t first_cell, int64_t n, uint16_t * rows)>;
    virtual void update(const uint8_t * marked, const shift_memory & memory, const rewrite & f) = 0;

    // Pack the tiles of which every cell is written.
    virtual void             pack_full(int n_threads) = 0;
    virtual gear_store_stats stats() const            = 0;

    // Parts of a session. reader gets all of the side as a store; changer gets one whose changes the side then takes, and a writer of rows into it.
    using reader                                 = std::function<void(const store & cells, const tile_codec * codec)>;
    using changer                                = std::function<void(store * cells, const tile_codec * codec, const row_writer & write)>;
    virtual void read_store(const reader & f)    = 0;
    virtual void change_store(const changer & f) = 0;
};

// A cache tensor that stays plain f16, as llama.cpp made it.
class f16_memory {
  public:
    virtual ~f16_memory()                                          = default;
    virtual char * data() const                                    = 0; // host or device address
    virtual void   set(size_t at, const void * bytes, size_t size) = 0;
    virtual void   get(size_t at, void * bytes, size_t size)       = 0;
    virtual void   fill(uint8_t value)                             = 0;
};

// The memory of one KV buffer. It owns what it makes.
class cache_memory {
  public:
    virtual ~cache_memory() = default;

    // Held while a graph that touches the memory is computed, and while ggml reads or changes it.
    virtual std::mutex & lock() = 0;
    // Call f where it may use what this memory has made: with the device selected. The caller holds the lock.
    virtual void         use(const std::function<void()> & f) { f(); }

    virtual side_cache & make_side(const store_shape & shape) = 0; // throws gear::error when memory is short
    // `reserved`: the addresses that the tensor has so far.
    virtual f16_memory & make_f16(address_range & reserved)   = 0;
    virtual void         clear(uint8_t value)                 = 0; // all f16 memory; when value is 0, all sides
};

// Locked, and as use() calls it.
template <class F> void locked_use(cache_memory & memory, F && f) {
    const std::lock_guard<std::mutex> guard(memory.lock());
    memory.use(f);
}

} // namespace gear
