#include "cache/cuda_side.h"

#include "cache/gear_codec.h"
#include "common/error.h"

#include <algorithm>

namespace gear {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// One side
// ---------------------------------------------------------------------------------------------------------------------------------------------

cuda_side::cuda_side(cuda_memory & home, const store_shape & shape, const side_codec & codec, std::shared_ptr<cuda::cache_table> table)
    : home_(home), codec_(codec.codec),
      on_device_(home.worker_.with, shape, codec.layout, home.method_.config().seed, std::move(table), bases_of(codec.codec.get())) {}

void cuda_side::write(int64_t n, const int64_t * cells, const uint16_t * rows) {
    home_.broken_unless_done([&] {
        home_.give_own_table(*this);
        on_device_.put(home_.worker_, home_.next_step(), n, cells, rows);
    });
}

void cuda_side::read(int64_t cell, int64_t n, uint16_t * rows) {
    on_device_.read(home_.worker_, cell, n, rows);
}

void cuda_side::erase(int64_t cell, int64_t n) {
    home_.broken_unless_done([&] {
        home_.give_own_table(*this);
        on_device().table().plan_erase(home_.worker_, cell, n);
    });
}

bool cuda_side::copy_stream(int from, const side_cache & source, int to) {
    if (&source != this) {
        return false;
    }
    home_.broken_unless_done([&] {
        home_.give_own_table(*this);
        on_device().table().plan_copy(home_.worker_, from, to);
        on_device_.copy_stream(home_.worker_, from, to);
    });
    return true;
}

void cuda_side::update(const uint8_t * marked, const shift_memory & memory, const rewrite & f) {
    home_.give_own_table(*this);
    on_device_.update(home_.worker_, marked, memory.rows, memory.n_tile, f);
}

void cuda_side::pack_full(int) {
    cuda::cache_table & table = on_device().table();
    home_.broken_unless_done([&] {
        table.plan_flush(home_.worker_, true);
        for (const auto & other : home_.sides_) {
            if (&other->on_device().table() == &table) {
                other->on_device_.pack(home_.worker_);
            }
        }
    });
}

gear_store_stats cuda_side::stats() const {
    gear_store_stats stats = on_device_.stats();
    describe_errors(on_device_.errors(home_.worker_), stats);
    if (!home_.is_first_with_table(*this)) {
        stats.bytes_tables = 0;
    }
    return stats;
}

void cuda_side::read_store(const reader & f) {
    f(*on_device_.to_store(home_.worker_, codec_), codec_.get());
}

// A store on the host takes the changes, so that its decisions are the store's own; then the device holds what it holds.
void cuda_side::change_store(const changer & f) {
    on_device_.report_queries(home_.worker_);
    const std::unique_ptr<store> here = on_device_.to_store(home_.worker_, codec_);
    f(here.get(), codec_.get(), [&](int64_t n, const int64_t * cells, const uint16_t * from) {
        barrier sync;
        if (!here->write({ 0, 1, &sync }, n, { cells, sizeof(int64_t), true }, { from, (size_t) shape().n_embd() * sizeof(uint16_t), true })) {
            throw error(here->status(), here->message());
        }
    });
    home_.broken_unless_done([&] {
        home_.give_own_table(*this);
        on_device_.adopt(home_.worker_, *here);
    });
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The memory of a buffer
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

class cuda_f16 final : public f16_memory {
  public:
    cuda_f16(cuda::cuda_worker & worker, size_t size) : worker_(worker), block_(worker.with, size) {}

    char * data() const override { return reinterpret_cast<char *>(block_.data()); }

    void set(size_t at, const void * bytes, size_t size) override {
        require_ok(worker_.with, worker_.with.upload(data() + at, bytes, size, worker_.work), "filling the cache");
        require_ok(worker_.with, worker_.with.wait_stream(worker_.work), "filling the cache");
    }
    void get(size_t at, void * bytes, size_t size) override {
        require_ok(worker_.with, worker_.with.download(bytes, data() + at, size, worker_.work), "reading the cache");
        require_ok(worker_.with, worker_.with.wait_stream(worker_.work), "reading the cache");
    }
    void fill(uint8_t value) override { require_ok(worker_.with, worker_.with.fill(data(), value, block_.size(), worker_.work), "clearing the cache"); }

  private:
    cuda::cuda_worker & worker_;
    cuda::device_block  block_;
};

} // namespace

cuda_memory::cuda_memory(cuda::cuda_worker & worker, std::mutex & lock, const cache_method & method) : worker_(worker), lock_(lock), method_(method) {}

cuda_memory::~cuda_memory() {
    const std::lock_guard<std::mutex> guard(lock_);
    worker_.with.wait_stream(worker_.work);
}

void cuda_memory::use(const std::function<void()> & f) {
    const cuda::selected_device selected(worker_.with, worker_.device); // a thread that was just with another GPU comes here with that one selected
    f();
}

// Sides that are made while nothing is written begin with one table.
side_cache & cuda_memory::make_side(const store_shape & shape) {
    const side_codec codec = method_.codec(shape, true);
    const auto       fits  = [&](const std::shared_ptr<cuda::cache_table> & table) {
        const store_shape & of = table->planner().shape();
        return of.n_cell == shape.n_cell && of.n_stream == shape.n_stream && of.n_ubatch == shape.n_ubatch && table->planner().is_empty();
    };
    auto & tables = tables_[shape.side];
    auto   found  = std::find_if(tables.begin(), tables.end(), fits);
    if (found == tables.end()) {
        tables.push_back(std::make_shared<cuda::cache_table>(worker_.with, shape, codec.codec != nullptr));
        found = tables.end() - 1;
    }
    sides_.push_back(std::make_unique<cuda_side>(*this, shape, codec, *found));
    return *sides_.back();
}

f16_memory & cuda_memory::make_f16(address_range & reserved) {
    f16_.push_back(std::make_unique<cuda_f16>(worker_, reserved.size()));
    return *f16_.back();
}

void cuda_memory::clear(uint8_t value) {
    const cuda::api & with = worker_.with;
    require_ok(with, with.wait_device(), "waiting for earlier steps"); // f16 tensors are read on ggml's stream, which knows nothing of ours
    for (const auto & memory : f16_) {
        memory->fill(value);
    }
    for (auto & tables : tables_) {
        for (const auto & table : tables) {
            table->clear(worker_);
        }
    }
    for (const auto & side : sides_) {
        side->on_device().forget();
    }
    is_broken = false;
    require_ok(with, with.wait_stream(worker_.work), "clearing the cache");
}

void cuda_memory::give_own_table(cuda_side & side) {
    auto & tables = tables_[side.shape().side];
    auto   shared = std::find_if(tables.begin(), tables.end(), [&](const auto & table) { return table.get() == &side.on_device().table(); });
    if (shared->use_count() == 2) { // this list and the side
        return;
    }
    tables.push_back(std::make_shared<cuda::cache_table>(worker_, **shared));
    side.on_device().table_of_its_own(tables.back());
    has_own_tables_ = true;
}

void cuda_memory::share_tables() {
    if (!std::exchange(has_own_tables_, false)) {
        return;
    }
    for (auto & tables : tables_) {
        std::vector<std::shared_ptr<cuda::cache_table>> kept;
        for (const auto & table : tables) {
            const auto like = std::find_if(kept.begin(), kept.end(), [&](const auto & other) { return other->planner().agrees(table->planner()); });
            if (like == kept.end()) {
                kept.push_back(table);
                continue;
            }
            for (const auto & side : sides_) {
                if (&side->on_device().table() == table.get()) {
                    side->on_device().table_of_its_own(*like);
                }
            }
        }
        tables = std::move(kept);
    }
}

bool cuda_memory::is_first_with_table(const cuda_side & side) const {
    const auto first =
        std::find_if(sides_.begin(), sides_.end(), [&](const auto & other) { return &other->on_device().table() == &side.on_device().table(); });
    return first->get() == &side;
}

} // namespace gear
