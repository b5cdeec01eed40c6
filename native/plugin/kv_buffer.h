// kv_buffer.h - the buffer that llama.cpp's KV cache lives in: for each cache tensor either a GEAR store or, where GEAR cannot or need not pack, plain
// f16.
//
// llama.cpp makes the cache as f16 tensors cache_k_l<il> / cache_v_l<il> of [n_embd, n_cell, n_stream]. Each gets address space of its nominal size, so
// that views and offsets mean what llama.cpp thinks, but no memory behind it. What the tensor becomes is *settled* when its layer is first computed (or
// restored): by then the graph has shown every operation on it. A GEAR tensor's bytes are in its store; a plain one's address space is made memory.
#pragma once

#include "cache/cache_method.h"
#include "common/address_range.h"
#include "plugin/abi.h"
#include "plugin/session_tensor.h"
#include "store/store.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace gear {

class kv_device;

// Values of gear_store_stats.kind.
enum class cache_kind { undecided = -1, gear = 0, f16_window = 1, f16_other_use = 2, f16_asked = 3 };

// Number and side in the name of a cache tensor, "cache_k_l12". false for any other name.
bool parse_cache_name(const char * name, int & il, gear_side & side);

// What the graph has shown about a cache tensor.
struct observed_use {
    int         d_head = 0; // from the attention node that reads it
    int         n_head = 0;
    int         n_rows = 0; // most rows of one write
    std::string other;      // an operation that GEAR does not cover, "" when there was none
};

class kv_buffer;

struct cache_tensor final : session_tensor {
    cache_tensor(kv_buffer & home, abi::tensor * tensor, int il, gear_side side);

    bool is_store() const override { return rows != nullptr; }
    void read_store(int n_threads, const reader & f) override;
    void change_store(const changer & f) override;

    kv_buffer &   home;
    int64_t       n_cell;
    int           n_stream;
    address_range space;
    observed_use  use;
    cache_kind    kind = cache_kind::undecided;

    side_codec             codec; // of a GEAR tensor
    std::unique_ptr<store> rows;  // of a GEAR tensor, or of its partner kept as f16
};

class kv_buffer {
  public:
    kv_buffer(kv_device & device, size_t size);
    ~kv_buffer();

    // The cache tensor that a tensor is, or is a view of; nullptr: not one of this library's.
    static cache_tensor * find(const abi::tensor * tensor);
    static kv_buffer *    of(const abi::tensor * tensor);

    // Decide what the layer becomes, once. Throws gear::error.
    void settle(int il);
    void settle_all();

    void stats(std::vector<gear_store_stats> & out);

    std::mutex lock; // held while a graph that touches this buffer is computed, and while ggml reads or changes it

    // A ggml buffer around a new kv_buffer. Throws gear::error.
    static abi::buffer * make(kv_device & device, size_t size);

    // ggml's buffer interface
    void * base() const { return base_.data(); }
    void   add(abi::tensor * tensor);
    void   set(const abi::tensor * tensor, const void * data, size_t offset, size_t size);
    void   get(const abi::tensor * tensor, void * data, size_t offset, size_t size);
    void   fill(const abi::tensor * tensor, uint8_t value, size_t offset, size_t size);
    bool   copy(const abi::tensor * source, const abi::tensor * target);
    void   clear(uint8_t value);

    kv_device & device() const { return device_; }

    // Write rows f16 [n, n_embd] into cells of a settled tensor.
    void write_cells(cache_tensor & tensor, int64_t n, const int64_t * cells, const uint16_t * rows);

  private:
    struct cache_layer {
        std::unique_ptr<cache_tensor> side[2]; // [gear_side]
    };
    cache_kind decide(const cache_layer & layer) const;
    void       write_rows(cache_tensor & tensor, int64_t cell, int64_t n, const uint16_t * rows);

    kv_device &                device_;
    address_range              base_; // where ggml's allocator thinks the tensors lie
    std::map<int, cache_layer> layers_;
};

} // namespace gear
