// cuda_side.h - the cache of one side of a layer in a GPU's memory, and what the layers of a buffer share there.
//
// Layers that write the same cells share one table of slots (cuda/cuda_cache.h). What llama.cpp does to one layer at a time (the K-shift,
// restoring a state, copying a stream) gives that layer a table of its own; the next step lets tables that agree be one again. There the host may wait.
#pragma once

#include "cache/cache_method.h"
#include "cache/side_cache.h"
#include "cuda/cuda_cache.h"

#include <memory>
#include <utility>
#include <vector>

namespace gear {

class cuda_memory;

class cuda_side final : public side_cache {
  public:
    cuda_side(cuda_memory & home, const store_shape & shape, const side_codec & codec, std::shared_ptr<cuda::cache_table> table);

    cuda::cache_side &       on_device() { return on_device_; }
    const cuda::cache_side & on_device() const { return on_device_; }
    cuda_memory &            home() { return home_; }

    const store_shape & shape() const override { return on_device_.shape(); }
    bool                has_codec() const override { return codec_ != nullptr; }
    void                write(int64_t n, const int64_t * cells, const uint16_t * rows) override;
    void                read(int64_t cell, int64_t n, uint16_t * rows) override;
    void                erase(int64_t cell, int64_t n) override;
    bool                copy_stream(int from, const side_cache & source, int to) override; // within one side only
    void                update(const uint8_t * marked, const shift_memory & memory, const rewrite & f) override;
    void                pack_full(int n_threads) override; // of all sides that share its table
    gear_store_stats    stats() const override;            // a table is counted with the first side that goes by it
    void                read_store(const reader & f) override;
    void                change_store(const changer & f) override;

  private:
    cuda_memory &                     home_;
    std::shared_ptr<const tile_codec> codec_;
    cuda::cache_side                  on_device_;
};

class cuda_memory final : public cache_memory {
  public:
    // The worker and its lock are the device's: all of its buffers share them.
    cuda_memory(cuda::cuda_worker & worker, std::mutex & lock, const cache_method & method);
    ~cuda_memory() override; // waits for the worker's stream

    std::mutex & lock() override { return lock_; }
    void         use(const std::function<void()> & f) override;
    side_cache & make_side(const store_shape & shape) override;
    f16_memory & make_f16(address_range & reserved) override;
    void         clear(uint8_t value) override;

    // Tables that agree become one.
    void share_tables();

    // What fails half-way leaves layers that do not hold what their tables say: then the memory is broken until it is cleared.
    template <class F> void broken_unless_done(F && f) {
        const bool before = std::exchange(is_broken, true);
        f();
        is_broken = before;
    }

    cuda::cuda_worker & worker() const { return worker_; }
    int64_t             next_step() { return ++n_step_; }

    bool is_broken = false;

  private:
    friend class cuda_side;
    void give_own_table(cuda_side & side);
    bool is_first_with_table(const cuda_side & side) const;

    cuda::cuda_worker &                             worker_;
    std::mutex &                                    lock_;
    const cache_method &                            method_;
    std::vector<std::unique_ptr<cuda_side>>         sides_;
    std::vector<std::unique_ptr<f16_memory>>        f16_;
    std::vector<std::shared_ptr<cuda::cache_table>> tables_[2]; // [gear_side]
    bool                                            has_own_tables_ = false;
    int64_t                                         n_step_         = 0;
};

} // namespace gear
