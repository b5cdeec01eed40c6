// host_side.h - the cache of one side of a layer in host memory: a store and its codec.
#pragma once

#include "attention/attention.h"
#include "cache/cache_method.h"
#include "cache/side_cache.h"

#include <memory>
#include <vector>

namespace gear {

class host_side final : public side_cache {
  public:
    // Throws gear::error when memory is short.
    host_side(const store_shape & shape, const cache_method & method);

    store &             cells() { return cells_; }
    const store &       cells() const { return cells_; }
    const tile_codec *  codec() const { return codec_.codec.get(); }
    const tile_layout * layout() const { return codec_.layout; }

    // Rows of any type, and any number of them, by all threads of a pool at once.
    void write(int64_t n, const cell_source & cells, const row_source & rows, threadpool & threads);
    void flush(threadpool & threads, bool full_only);

    const store_shape & shape() const override { return cells_.shape(); }
    bool                has_codec() const override { return codec_.codec != nullptr; }
    void                write(int64_t n, const int64_t * cells, const uint16_t * rows) override;
    void                read(int64_t cell, int64_t n, uint16_t * rows) override { cells_.read(cell, n, rows); }
    void                erase(int64_t cell, int64_t n) override { cells_.erase(cell, n); }
    bool                copy_stream(int from, const side_cache & source, int to) override;
    void                update(const uint8_t * marked, const shift_memory &, const rewrite & f) override { cells_.update(marked, f); }
    void                pack_full(int n_threads) override;
    gear_store_stats    stats() const override { return cells_.stats(); }
    void                read_store(const reader & f) override { f(cells_, codec()); }
    void                change_store(const changer & f) override;

  private:
    side_codec codec_;
    store      cells_;
};

// Attention over the two sides of a layer, or over one that is both (d_latent: attention_op).
attention_op attention_of(const gear_attention_params & params, const host_side & k, const host_side & v, int d_latent = 0);

class host_memory final : public cache_memory {
  public:
    explicit host_memory(const cache_method & method) : method_(method) {}

    std::mutex & lock() override { return lock_; }
    side_cache & make_side(const store_shape & shape) override;
    f16_memory & make_f16(address_range & reserved) override;
    void         clear(uint8_t value) override;

  private:
    const cache_method &                     method_;
    std::mutex                               lock_;
    std::vector<std::unique_ptr<host_side>>  sides_;
    std::vector<std::unique_ptr<f16_memory>> f16_;
};

} // namespace gear
