#include "cache/host_side.h"

#include "cache/gear_codec.h"
#include "common/error.h"

#include <algorithm>
#include <cstring>

namespace gear {

namespace {

// Run an operation of the store on all threads of a pool; all of them get the same answer from it.
template <class F> void run_on(store & cells, threadpool & threads, F && operation) {
    bool ok = true;
    threads.run([&](const team & t) {
        const bool done = operation(t);
        if (t.ith == 0) {
            ok = done;
        }
    });
    if (!ok) {
        throw error(cells.status(), cells.message());
    }
}

} // namespace

host_side::host_side(const store_shape & shape, const cache_method & method) : codec_(method.codec(shape)), cells_(shape, codec_.codec) {
    if (head_bases * const bases = bases_of(codec())) {
        bases->reserve(shape.n_head); // here, where memory may be short: attention runs in ggml's threads, which nothing may throw through
    }
}

void host_side::write(int64_t n, const cell_source & cells, const row_source & rows, threadpool & threads) {
    run_on(cells_, threads, [&](const team & t) { return cells_.write(t, n, cells, rows); });
}

void host_side::flush(threadpool & threads, bool full_only) {
    run_on(cells_, threads, [&](const team & t) { return cells_.flush(t, full_only); });
}

void host_side::pack_full(int n_threads) {
    threadpool threads(n_threads);
    flush(threads, true);
}

void host_side::write(int64_t n, const int64_t * cells, const uint16_t * rows) {
    const int64_t n_embd = shape().n_embd();
    threadpool    caller_alone(1);
    for (int64_t begin = 0, n_now = 0; begin < n; begin += n_now) {
        n_now = std::min<int64_t>(n - begin, shape().n_ubatch);
        write(n_now, { cells + begin, sizeof(int64_t), true }, { rows + begin * n_embd, (size_t) n_embd * sizeof(uint16_t), true }, caller_alone);
    }
}

bool host_side::copy_stream(int from, const side_cache & source, int to) {
    const auto * origin = dynamic_cast<const host_side *>(&source);
    if (!origin) {
        return false;
    }
    const store_shape &a = origin->shape(), &b = shape();
    if (a.side != b.side || a.n_head != b.n_head || a.d_head != b.d_head || a.n_cell != b.n_cell || a.tile != b.tile ||
        origin->cells_.tile_bytes() != cells_.tile_bytes()) {
        return false;
    }
    cells_.copy_stream(from, origin->cells_, to);
    return true;
}

void host_side::change_store(const changer & f) {
    f(&cells_, codec(), [&](int64_t n, const int64_t * cells, const uint16_t * rows) { write(n, cells, rows); });
}

attention_op attention_of(const gear_attention_params & params, const host_side & k, const host_side & v, int d_latent) {
    return { params, &k.cells(), &v.cells(), k.layout(), v.layout(), default_rounding, &k == &v ? d_latent : 0, bases_of(k.codec()) };
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The memory of a buffer
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

class host_f16 final : public f16_memory {
  public:
    explicit host_f16(address_range & space) : space_(space) { space_.commit(); }

    char * data() const override { return space_.data(); }
    void   set(size_t at, const void * bytes, size_t size) override { memcpy(data() + at, bytes, size); }
    void   get(size_t at, void * bytes, size_t size) override { memcpy(bytes, data() + at, size); }
    void   fill(uint8_t value) override { memset(data(), value, space_.size()); }

  private:
    address_range & space_;
};

} // namespace

side_cache & host_memory::make_side(const store_shape & shape) {
    sides_.push_back(std::make_unique<host_side>(shape, method_));
    return *sides_.back();
}

f16_memory & host_memory::make_f16(address_range & reserved) {
    f16_.push_back(std::make_unique<host_f16>(reserved));
    return *f16_.back();
}

void host_memory::clear(uint8_t value) {
    for (const auto & side : sides_) {
        if (value == 0) {
            side->cells().clear();
        }
    }
    for (const auto & memory : f16_) {
        memory->fill(value);
    }
}

} // namespace gear
