// slot_planner.h - decides on the host, for one side of a cache in device memory, which slot of the pool each cell's exact row gets and which tiles are
// packed. The decisions are the store's own: the planner has a store of one head of one channel, whose codec records what it is asked to pack. So a cache
// on a GPU and one on the CPU hold the same rows in the same slots, and all layers of one shape share one planner.
//
// It knows no device: cuda_cache.h takes its plans there.
#pragma once

#include "cuda/arguments.h"
#include "store/store.h"

#include <memory>
#include <vector>

namespace gear::cuda {

// What one write asks of the device, in this order.
struct slot_plan {
    std::vector<pack_job> jobs;         // tiles to pack first, for all heads
    std::vector<int32_t>  source;       // [jobs, tile] as pack_arguments has it
    std::vector<int32_t>  slot;         // [rows] as write_arguments has it
    std::vector<int32_t>  index, value; // slots of cells that change
    int64_t               n_row = 0;    // rows of a stream's pool; it may have grown
};

class slot_planner {
  public:
    // heads and channels of `like` do not matter. has_tiles false: every row is exact.
    slot_planner(const store_shape & like, bool has_tiles);
    slot_planner(const slot_planner & other);
    slot_planner & operator=(const slot_planner &) = delete;
    ~slot_planner();

    // Rows go to these cells. Throws gear::error; then nothing has changed.
    void write(int64_t n, const cell_source & cells, slot_plan & plan);
    void flush(slot_plan & plan, bool full_only = false);
    void erase(int64_t cell, int64_t n, slot_plan & plan);
    void copy_stream(int from, int to, slot_plan & plan);
    void clear();

    // Rows are to be changed in place (store::update): the tiles to pack again. In `source` a row that is coded anew is given by its index in its tile.
    //   marked u8 [n_stream * n_cell]
    void          update(const uint8_t * marked, slot_plan & plan);
    // Hold what this store holds; `plan` says which slot each of its exact rows has from now on.
    void          adopt(const store & from, slot_plan & plan);
    bool          is_empty() const;
    // Whether both give every cell the same slot and will go on to do so: a side that goes by one of them can go by the other.
    bool          agrees(const slot_planner & other) const;
    // The planner's store, of one head of one channel.
    const store & cells() const { return *cells_; }

    const store_shape &          shape() const;
    int                          n_tile() const;
    int64_t                      n_row() const { return n_row_; } // of a stream's pool
    const std::vector<int32_t> & slots() const { return slots_; } // [n_stream * n_cell]
    gear_store_stats             stats() const;

  private:
    class recording_codec;
    void make_store(const store_shape & shape);
    void note_changes_of_tile(int stream, int tile, slot_plan & plan);
    void note_changes(int stream, bool all, slot_plan & plan);
    void count_rows();

    std::shared_ptr<recording_codec> codec_;
    std::unique_ptr<store>           cells_;
    std::vector<int32_t>             slots_;
    int64_t                          n_row_ = 0;
    std::vector<int64_t>             n_exact_;                  // of each stream
    std::vector<int32_t>             n_exact_of_, n_packed_of_; // [n_stream * n_tile] when last planned
    std::vector<int32_t>             owner_;                    // [n_stream * n_row] row of the write in progress
    std::vector<uint8_t>             is_touched_;               // [n_stream * n_tile] scratch
};

} // namespace gear::cuda
