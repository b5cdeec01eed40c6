// cuda_cache.h - a cache in device memory, driven from the host: the table of slots that layers of one shape share (cache_table), and the tiles and rows
// of one side of one layer (cache_side). Everything is put onto a stream and returns at once; the host waits only where it says so.
//
// What a write decides is known on the host alone (slot_planner.h): it needs the cells of the rows, which llama.cpp has on the host, and nothing that the
// device has computed. It travels in one upload a step, from pinned memory, for all layers.
#pragma once

#include "codec/basis.h"
#include "codec/codec.h"
#include "cuda/api.h"
#include "cuda/slot_planner.h"
#include "cuda/worker.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace gear::cuda {

// The plans of one side of all layers of one shape, and their table of slots in device memory.
class cache_table {
  public:
    cache_table(const api & with, const store_shape & like, bool has_tiles);
    // One that says the same, for a layer that goes its own way.
    cache_table(cuda_worker & worker, const cache_table & other);
    ~cache_table();
    cache_table(const cache_table &)             = delete;
    cache_table & operator=(const cache_table &) = delete;

    // Plan a write and send the plan on its way. Layers that write the same cells in the same step plan once: `step` is the step's number, from 1 on.
    void plan(cuda_worker & worker, int64_t step, int64_t n, const cell_source & cells);
    void plan_flush(cuda_worker & worker, bool full_only = false);
    void plan_erase(cuda_worker & worker, int64_t cell, int64_t n);
    void plan_copy(cuda_worker & worker, int from, int to);
    void clear(cuda_worker & worker);
    void adopt(cuda_worker & worker, const store & from); // the slots of this store's rows
    // The tiles to be packed again when the marked rows change in place (slot_planner::update); nothing is sent.
    void plan_update(const uint8_t * marked, slot_plan & plan) { planner_.update(marked, plan); }

    // Of the last plan, in device memory; until the next one.
    const pack_job * jobs() const { return jobs_; }
    int              n_job() const { return (int) plan_.jobs.size(); }
    const int32_t *  source() const { return source_; }
    const int32_t *  slot() const { return slot_; }
    const int32_t *  slot_table() const { return reinterpret_cast<const int32_t *>(slot_table_.data()); }

    const slot_plan &    last_plan() const { return plan_; } // on the host
    const slot_planner & planner() const { return planner_; }
    size_t               bytes() const;

  private:
    struct slice { // what one plan takes with it; used by turns
        ~slice();
        const api *                   with  = nullptr;
        void *                        host  = nullptr;
        size_t                        bytes = 0;
        std::unique_ptr<device_block> device;
        event                         sent     = nullptr;
        bool                          is_under = false; // `sent` was recorded
    };
    void make_slices();
    void send(cuda_worker & worker);

    static constexpr int n_slice = 8;
    const api &          with_;
    slot_planner         planner_;
    slot_plan            plan_;
    device_block         slot_table_;
    slice                slices_[n_slice];
    int                  turn_      = 0;
    int64_t              last_step_ = 0;
    const pack_job *     jobs_      = nullptr;
    const int32_t *      source_    = nullptr;
    const int32_t *      slot_      = nullptr;
};

// One side of one layer.
class cache_side {
  public:
    // layout: of the tiles; nullptr: the side is kept as f16. bases: what its heads are coded in, learned here; nullptr where the layout wants none.
    cache_side(const api & with, const store_shape & shape, const tile_layout * layout, uint32_t seed, std::shared_ptr<cache_table> table,
               head_bases * bases = nullptr);

    // Pack what the table's last plan says, then take the rows (in device memory).
    void                    write(cuda_worker & worker, int64_t n, const void * rows, int64_t stride, bool is_half);
    void                    pack(cuda_worker & worker);
    void                    copy_stream(cuda_worker & worker, int from, int to); // tiles and rows; the table has planned it
    // Note the queries of an attention, until the first tile is packed; K's side only.
    void                    observe(cuda_worker & worker, const gear_attention_params & params);
    // What was noted goes to the host, which waits.
    void                    report_queries(cuda_worker & worker);
    // What packing did to each head since the cache was empty, [n_head]; nothing before the first tile. Waits.
    std::vector<head_error> errors(cuda_worker & worker) const;
    // The cache is empty: what was learned of its rows is forgotten.
    void                    forget();
    // Rows as f16 to the host, which waits.
    void                    read(cuda_worker & worker, int64_t cell, int64_t n, uint16_t * rows);

    // What happens to one layer alone. Its table must be its own: no other side's (table_of_its_own).
    void table_of_its_own(std::shared_ptr<cache_table> table) { table_ = std::move(table); } // one that agrees with the present one

    // Rows f16 from the host go to cells; those of zeros are written like any other.
    void put(cuda_worker & worker, int64_t step, int64_t n, const int64_t * cells, const uint16_t * rows);
    // Change rows in place (the K-shift): for each run of tiles with a marked cell, at most most_tiles, f gets their rows, f16 [n, n_embd] in `staging` in
    // device memory, and the run's first global cell, and has what it does done before the worker's stream goes on. As store::update otherwise.
    //   marked u8 [n_stream * n_cell], staging [most_tiles * tile, n_embd]
    using rewrite = std::function<void(int64_t first_cell, int64_t n, uint16_t * rows)>;
    void                   update(cuda_worker & worker, const uint8_t * marked, uint16_t * staging, int64_t most_tiles, const rewrite & f);
    // All of it as a store on the host, bit for bit; and the other way round. The host waits. codec: of its tiles, nullptr when it has none.
    std::unique_ptr<store> to_store(cuda_worker & worker, std::shared_ptr<const tile_codec> codec) const;
    void                   adopt(cuda_worker & worker, const store & from);

    device_side         on_device() const;
    const store_shape & shape() const { return shape_; }
    cache_table &       table() const { return *table_; }
    gear_store_stats    stats() const;
    static size_t       bytes(const store_shape & shape, const tile_layout * layout, int64_t n_row);

  private:
    void      grow(cuda_worker & worker);
    void      teach(cuda_worker & worker, const int32_t * source, const uint16_t * rows, int64_t n_row);
    void      send_bases(cuda_worker & worker);
    void      measure(cuda_worker & worker);
    void      send_errors(cuda_worker & worker, const std::vector<head_error> & heads);
    bool      learns() const { return bases_ && has_tiles_; }
    bool      is_weighted() const { return bases_ && has_tiles_ && layout_.config.rotate == rotate_weighted; }
    void      update_run(cuda_worker & worker, const uint8_t * marked, int64_t first, int64_t n, const pack_job * jobs, const int32_t * source, int n_job,
                         const uint16_t * staging);
    int64_t   first_cell(const pack_job & job) const { return job.stream * shape_.n_cell + (int64_t) job.tile * shape_.tile; }
    uint8_t * tile_data(int stream, int64_t tile) const;

    const api &                   with_;
    store_shape                   shape_;
    tile_layout                   layout_;
    bool                          has_tiles_;
    uint32_t                      seed_;
    std::shared_ptr<cache_table>  table_;
    head_bases *                  bases_;
    std::unique_ptr<device_block> tiles_, pool_;
    std::unique_ptr<device_block> squares_, basis_;      // f64 [n_head, d_head] of the queries, until the first tile is packed; u8 [n_head, d_head / 2]
    std::unique_ptr<device_block> weights_;              // f64 [n_head, d_head] of errors in scores, where queries were met
    std::unique_ptr<device_block> errors_;               // error_sums [n_head], then scratch [n_measured, n_head]
    bool                          is_measuring_ = false; // errors_ holds sums
    int64_t                       n_row_;
    int64_t                       n_pack_      = 0;
    int64_t                       n_query_     = 0; // of each head that squares_ is the sum of
    float                         query_scale_ = 1;
};

// Attention of K and V of one layer; all pointers of params are the device's. K notes the queries.
void attend(cuda_worker & worker, const gear_attention_params & params, cache_side & k, const cache_side & v);

} // namespace gear::cuda
