// device.h - the ggml device that wraps another one: owns the KV cache, hands everything else to the device it wraps. What depends on the wrapped device
// is in its two forms, plugin/cpu/device.h and plugin/cuda/device.h.
#pragma once

#include "cache/cache_method.h"
#include "common/error.h"
#include "plugin/abi.h"
#include "plugin/kv_buffer.h"

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace gear {

class kv_session;

class kv_device {
  public:
    // A device over one of ggml's. Throws gear::error: bad configuration, unknown device. ggml must be open.
    static std::unique_ptr<kv_device> make(const gear_device_params & params, const char * wanted, int index);
    virtual ~kv_device();
    kv_device(const kv_device &)             = delete;
    kv_device & operator=(const kv_device &) = delete;

    abi::device *        ggml_device() { return &device_; }
    abi::device *        inner() const { return inner_; }
    abi::buffer_type *   kv_type() { return &kv_type_; }
    const cache_method & method() const { return method_; }
    int                  n_ubatch() const { return n_ubatch_; }

    // What depends on the wrapped device.
    virtual int                           type() const                              = 0; // as llama.cpp sees it
    virtual void                          describe(abi::device_props & props) const = 0; // its id and what it can do
    virtual abi::backend *                make_backend()                            = 0; // throws gear::error
    virtual std::unique_ptr<cache_memory> make_memory(size_t nominal) const         = 0; // of a KV buffer; throws gear::error
    virtual bool                          takes_weights() const                     = 0; // as its own buffers have them
    virtual void                          made_buffer(abi::buffer * buffer)         = 0; // of the wrapped device's: no KV buffer
    virtual void *                        proc_address(const char * name)           = 0; // a function of its registry; nullptr: none
    virtual int64_t                       scratch_bytes() const                     = 0;
    // A new tensor of so many cells stays an ordinary f16 tensor of the wrapped device's.
    virtual bool                          is_ordinary(int64_t n_cell) const         = 0;
    // What a layer is to become, when it is first used.   decides_together: all that are known by then become it
    virtual cache_kind                    kind_of(const cache_layer & layer) const  = 0;
    virtual bool                          decides_together() const                  = 0;
    // K of a layer that has no V: as the graph uses it, or as the head table says before there is one.
    bool                                  is_latent(const cache_tensor & k) const;

    // Shape of one side of a layer: from what the graph showed, else from the head table; n_head 0: not known.
    store_shape shape(const cache_tensor & tensor) const;
    // A cache so small that the pool of exact rows would hold all of it.
    bool        is_window(int64_t n_cell) const { return method_.is_window(n_cell, n_ubatch_); }

    // Bytes to tell llama.cpp for a cache tensor. The same at every call, because llama.cpp aborts when they grow between two of them: so nothing is
    // allocated here, which could fail.
    size_t estimate(const abi::tensor * tensor, int il, gear_side side) const;

    void       set_error(gear_status status, const char * message) noexcept;
    kept_error take_error(); // status GEAR_OK when there was none

    void                          add(kv_buffer * buffer);
    void                          remove(kv_buffer * buffer);
    std::vector<gear_store_stats> stats();
    std::string                   other_use(int il); // on a layer's cache, in any context: an operation that GEAR does not cover, "" for none
    void                          add(kv_session * session);
    void                          remove(kv_session * session);
    kv_session *                  session_at(const void * data); // the one whose window the address is in, nullptr: none

    // Sizes that llama.cpp has asked for on this thread: the KV buffer is recognised by their sum.
    void note_cache_size(int il, gear_side side, size_t bytes);
    void note_other_size(size_t bytes);
    // Throws gear::error when settings are for a layer beyond all that llama.cpp has asked for; where the caller named the layers, it was seen to before.
    void check_exceptions() const;
    // true: an allocation of this size is the KV buffer. Throws gear::error when the cache would share a buffer with other tensors.
    bool take_sizes(size_t size);

    static kv_device & of(abi::device * device) { return *static_cast<kv_device *>(device->context); }

  protected:
    // alignment: that the wrapped device wants
    kv_device(const gear_device_params & params, abi::device * inner, int index, size_t alignment);

    abi::device device_;

  private:
    // Keep a size asked for. Where memory is short for that, the allocation that follows fails: it could not be told apart from others. Nothing is thrown,
    // for there is C code between here and whoever could catch it.
    template <class F> void note(const abi::buffer_type * type, F && f) {
        const gear_status status = type == &type_ ? guarded(f) : GEAR_OK;
        if (status != GEAR_OK) {
            lost_sizes_ = this;
            set_error(status, gear_last_error());
        }
    }
    static thread_local const kv_device * lost_sizes_; // the device for which a size that this thread asked for was not kept, nullptr: none

    struct asked { // one cache tensor, or all other tensors asked for between two of them
        bool      is_cache;
        int       il;
        gear_side side;
        size_t    bytes; // padded as ggml's allocator pads
    };

    std::string                                  name_, description_, type_name_, kv_type_name_;
    cache_method                                 method_;
    std::map<int, gear_layer>                    layers_;
    int                                          n_ubatch_;
    abi::device *                                inner_;
    size_t                                       alignment_; // of buffers: a cache line, or what the wrapped device wants
    abi::reg                                     reg_;
    abi::buffer_type                             type_, kv_type_;
    mutable std::mutex                           mutex_;
    std::map<std::thread::id, std::deque<asked>> asked_;
    std::mutex                                   buffers_mutex_; // taken before a buffer is locked; mutex_ after that
    std::set<kv_buffer *>                        buffers_;
    std::set<kv_session *>                       sessions_;
    int                                          last_layer_ = -1; // that a size was asked for
    kept_error                                   error_;
    friend struct device_tables;
};

} // namespace gear
