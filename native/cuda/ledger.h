// ledger.h - the host's book of one side of a cache that lies in device memory: which cell has an exact row, which tiles are to be packed. The decisions
// are the store's own: the book is a store of one head of one channel, whose codec, instead of packing, writes down what it was asked to pack. So a cache
// on a GPU and one on the CPU hold the same rows in the same places, and all layers of one shape share one book.
//
// Knows no device: what it says travels there through cuda_cache.h.
#pragma once

#include "cuda/arguments.h"
#include "store/store.h"

#include <memory>
#include <vector>

namespace gear::cuda {

// What one write asks of the device, in this order.
struct ledger_step {
    std::vector<pack_job> jobs;         // tiles to pack first, for all heads
    std::vector<int32_t>  source;       // [jobs, tile] as pack_arguments has it
    std::vector<int32_t>  slot;         // [rows] as write_arguments has it
    std::vector<int32_t>  index, value; // places that change
    int64_t               n_row = 0;    // rows of a stream's pool; it may have grown
};

class ledger {
  public:
    // heads and channels of `like` do not matter. has_tiles false: every row is exact.
    ledger(const store_shape & like, bool has_tiles);
    ledger(const ledger & other);
    ledger & operator=(const ledger &) = delete;
    ~ledger();

    // Rows go to these cells. Throws gear::error; then nothing has changed.
    void write(int64_t n, const cell_source & cells, ledger_step & step);
    void flush(ledger_step & step, bool full_only = false);
    void erase(int64_t cell, int64_t n, ledger_step & step);
    void copy_stream(int from, int to, ledger_step & step);
    void clear();

    // Rows are to be changed in place (store::update): the tiles to pack again. In `source` a row that is coded anew is given by its index in its tile.
    //   marked u8 [n_stream * n_cell]
    void          update(const uint8_t * marked, ledger_step & step);
    // The book of a store of this shape; `step` says where each of its exact rows lies from now on.
    void          adopt(const store & rows, ledger_step & step);
    bool          is_empty() const;
    // Whether both say the same of every cell and will go on to say so: what lies in memory by one of them can go by the other.
    bool          agrees(const ledger & other) const;
    // The store of which this is the book, of one head of one channel.
    const store & book() const { return *book_; }

    const store_shape &          shape() const;
    int                          n_tile() const;
    int64_t                      n_row() const { return n_row_; }   // of a stream's pool
    const std::vector<int32_t> & places() const { return places_; } // [n_stream * n_cell]
    gear_store_stats             stats() const;

  private:
    class scribe;
    void make_book(const store_shape & shape);
    void note_tile(int stream, int tile, ledger_step & step);
    void note_stream(int stream, bool all, ledger_step & step);
    void count_rows();

    std::shared_ptr<scribe> scribe_;
    std::unique_ptr<store>  book_;
    std::vector<int32_t>    places_;
    int64_t                 n_row_ = 0;
    std::vector<int64_t>    n_exact_;                  // of each stream
    std::vector<int32_t>    n_exact_of_, n_packed_of_; // [n_stream * n_tile] as the tables last said
    std::vector<int32_t>    owner_;                    // [n_stream * n_row] row of the write in progress
    std::vector<uint8_t>    is_touched_;               // [n_stream * n_tile] scratch
};

} // namespace gear::cuda
