// kv_buffer.h - the buffer that llama.cpp's KV cache lives in, in host memory or a GPU's: for each cache tensor either GEAR's cache of that side of the
// layer (cache/side_cache.h) or, where GEAR cannot or need not pack, plain f16.
//
// llama.cpp makes the cache as f16 tensors cache_k_l<il> / cache_v_l<il> of [n_embd, n_cell, n_stream]. Each gets address space of its nominal size, so
// that views and offsets mean what llama.cpp thinks, but no memory behind it. What the tensor becomes is *decided* when its layer is first computed (or
// restored): by then the graph has shown every operation on it. A GEAR tensor's rows are in its cache; a plain one's address space is made memory.
#pragma once

#include "cache/side_cache.h"
#include "plugin/abi.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace gear {

class kv_device;
class kv_buffer;

// Values of gear_store_stats.kind.
enum class cache_kind { undecided = -1, gear = 0, f16_window = 1, f16_other_use = 2, f16_asked = 3 };

// Number and side in the name of a cache tensor, "cache_k_l12". false for any other name.
bool parse_cache_name(const char * name, int & il, gear_side & side);

// What the graph has shown about a cache tensor.
struct observed_use {
    int         d_head    = 0; // from the attention node that reads it
    int         n_head    = 0;
    int         n_rows    = 0;     // most rows of one write
    bool        is_latent = false; // K is V, too
    std::string other;             // an operation that GEAR does not cover, "" when there was none
};

struct cache_tensor {
    cache_tensor(kv_buffer & home, const abi::tensor * tensor, int il, gear_side side);

    int64_t row_bytes() const { return n_embd * 2; }
    int64_t stream_bytes() const { return n_cell * row_bytes(); }
    char *  data() const { return f16 ? f16->data() : space.data(); } // what llama.cpp takes for its address
    bool    is_store() const { return cache != nullptr; }             // also as the f16 partner of a packed side
    // It was plain f16 in the wrapped device's own memory from the first: ggml computes with it as with any other tensor.
    bool    is_ordinary() const { return f16 && f16->data() != space.data(); }

    // For sessions: pack the full tiles and read, or change what is there (side_cache.h). A plain tensor takes rows only.
    void read_store(int n_threads, const side_cache::reader & f);
    void change_store(const side_cache::changer & f);

    kv_buffer &     home;
    const int       il;
    const gear_side side;
    const int64_t   n_embd; // elements of a row
    const int64_t   n_cell; // of a stream
    const int       n_stream;
    address_range   space;
    observed_use    use;
    cache_kind      kind  = cache_kind::undecided;
    side_cache *    cache = nullptr; // of a GEAR tensor, or of its partner kept as f16
    f16_memory *    f16   = nullptr; // of a plain one
};

// The two tensors of a layer.
struct cache_layer {
    std::unique_ptr<cache_tensor> side[2]; // [gear_side]
};

class kv_buffer {
  public:
    kv_buffer(kv_device & device, size_t size);
    ~kv_buffer();

    // The cache tensor that a tensor is, or is a view of; nullptr: none of this library's, or an ordinary one.
    static cache_tensor * find(const abi::tensor * tensor);
    static kv_buffer *    of(const abi::tensor * tensor);

    // Decide what the layer becomes, once. Throws gear::error.
    void decide(int il);

    void stats(std::vector<gear_store_stats> & out);

    // A ggml buffer around a new kv_buffer. Throws gear::error.
    static abi::buffer * make(kv_device & device, size_t size);

    // ggml's buffer interface. The caller holds the memory's lock, inside its use().
    void * base() const { return base_.data(); }
    void   add(abi::tensor * tensor);
    void   set(const abi::tensor * tensor, const void * data, size_t offset, size_t size);
    void   get(const abi::tensor * tensor, void * data, size_t offset, size_t size);
    void   fill(const abi::tensor * tensor, uint8_t value, size_t offset, size_t size);
    bool   copy(const abi::tensor * source, const abi::tensor * target);
    void   clear(uint8_t value);

    kv_device &    device() const { return device_; }
    cache_memory & memory() const { return *memory_; }

  private:
    void decide(cache_layer & layer);
    void make_f16(cache_tensor & tensor, cache_kind kind);
    void write_rows(cache_tensor & tensor, int64_t cell, int64_t n, const uint16_t * rows);

    kv_device &                   device_;
    address_range                 base_; // where ggml's allocator thinks the tensors lie
    std::unique_ptr<cache_memory> memory_;
    std::map<int, cache_layer>    layers_;
};

} // namespace gear
