// kv_session.h - a whole context on its way to a file and back: what llama.cpp says of its cells, and the stores as they are.
//
// llama.cpp saves its state into memory that this library gives it (the window), and restores it from there. Of a row that is in a store only the offset
// is noted: get_tensor and set_tensor are called with addresses in the window, which say where the row lies in llama.cpp's state and in which cell.
// Nothing is written there, and pages that nobody writes cost no memory. So no f16 copy of the cache exists, and nothing here depends on how llama.cpp
// arranges its state. Rows that are in no store (plain f16 tensors, recurrent states) travel in the state as bytes.
//
//     section note     the caller's
//     section state    u64 size of the state;  u64 n_part;  n_part x { u64 offset, u64 size };  the bytes of the parts. What no part covers is in stores.
//     section tensor   one for each store (session/store_image.h)
//     section learned  behind a store's, if its codec has learned something: bytes of the codec's
//     section extra    the caller's
#pragma once

#include "plugin/cache_bytes.h"
#include "session/store_image.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace gear {

class address_range;
class kv_devices;
struct cache_tensor;

class kv_session {
  public:
    // To be saved: a state of this many bytes. devices nullptr: a context without stores.
    kv_session(kv_devices * devices, size_t state_bytes);
    // To be restored: all of it is read and checked, but for what only the context can say. note_only: no more than the note.
    kv_session(std::unique_ptr<input> in, bool note_only);
    ~kv_session();
    kv_session(const kv_session &)             = delete;
    kv_session & operator=(const kv_session &) = delete;

    // Before llama.cpp restores from the window. Throws when the devices would not understand the tiles.
    void attach(kv_devices * devices);

    uint8_t *                    window() const;
    size_t                       window_size() const { return n_window_; }
    const std::vector<uint8_t> & note() const { return note_; }
    uint64_t                     extra_size() const { return extra_.size; }

    // The first n_state bytes of the window are llama.cpp's state now. Full tiles are packed before they are saved.
    void    save(size_t n_state, const void * note, size_t n_note, const void * extra, size_t n_extra, int n_threads, output & out);
    // llama.cpp has written the window: cells of the stores that it did not name are free, and become as if they had never been written.
    void    forget_others();
    // llama.cpp has read the window: fill the stores. extra [extra_size()], or nullptr. Returns the rows that were packed anew.
    int64_t restore(void * extra);

    // From the buffer, while llama.cpp saves or restores.
    bool has(const void * data) const { return window() <= data && data < window() + n_window_; }
    // `size` bytes at data, which is in the window, are these rows of the tensor. false: they are (or have to go) in the window itself.
    bool note_saved(cache_tensor & tensor, const row_range & range, size_t size, const void * data);
    bool note_restored(cache_tensor & tensor, const row_range & range, size_t size, const void * data);

  private:
    struct saved_tensor {
        cache_tensor *          tensor;
        std::vector<cell_range> ranges;
    };
    struct kept_tensor {
        store_image            image;
        cache_tensor *         tensor = nullptr;
        std::vector<cell_move> moves;
        std::vector<uint8_t>   learned;
    };
    struct part { // of llama.cpp's state
        uint64_t offset, size;
    };
    struct kept_range {
        uint64_t offset, size; // of its rows in llama.cpp's state
        size_t   tensor;       // index in kept_
        int64_t  cell;         // the first one
    };

    void    listen(kv_devices * devices);
    void    make_window(size_t bytes, size_t written);
    void    read_state(const section & from);
    void    index_ranges();
    int64_t restore_tensor(kept_tensor & kept);

    kv_devices *                   devices_ = nullptr;
    std::unique_ptr<address_range> window_; // address space; most of it is never written
    size_t                         n_window_ = 0;
    std::vector<saved_tensor>      saved_;
    std::unique_ptr<input>         in_;
    std::vector<uint8_t>           note_;
    section                        extra_ = { section_kind::extra, 0, 0 };
    std::vector<part>              parts_; // ascending
    std::vector<kept_tensor>       kept_;
    std::vector<kept_range>        ranges_; // of all kept tensors, by offset
};

} // namespace gear
