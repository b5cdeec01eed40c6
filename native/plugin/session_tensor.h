// session_tensor.h - what a session (kv_session.h) asks of a cache tensor, wherever its rows lie.
#pragma once

#include "session/store_image.h"
#include "store/store.h"

#include <functional>

namespace gear {

struct session_tensor {
    session_tensor(int il, gear_side side, int64_t n_embd) : il(il), side(side), n_embd(n_embd) {}
    virtual ~session_tensor() = default;

    int64_t row_bytes() const { return n_embd * 2; }

    virtual bool is_store() const = 0;

    // Pack the full tiles, then give f the rows and the codec of their tiles (nullptr: f16). Only for a tensor that is in a store.
    using reader                                             = std::function<void(const store & rows, const tile_codec * codec)>;
    virtual void read_store(int n_threads, const reader & f) = 0;
    // Give f what it may fill: the rows (nullptr: plain f16, which takes rows only), the codec of their tiles, and a writer of rows.
    using changer                                            = std::function<void(store * rows, const tile_codec * codec, const row_writer & write)>;
    virtual void change_store(const changer & f)             = 0;

    const int       il;
    const gear_side side;
    const int64_t   n_embd; // elements of a row
};

} // namespace gear
