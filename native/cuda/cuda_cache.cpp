#include "cuda/cuda_cache.h"

#include "common/error.h"
#include "common/memory.h"

#include <algorithm>
#include <cstring>

namespace gear::cuda {

void require_ok(const api & with, int error, const char * what) {
    if (error != 0) {
        fail(GEAR_ERROR_INTERNAL, "CUDA: %s: %s", what, with.error_text(error));
    }
}

device_block::device_block(const api & with, size_t bytes) : with_(with), size_(bytes) {
    void * memory = nullptr;
    if (with.allocate(&memory, std::max<size_t>(bytes, 1)) != 0) {
        fail(GEAR_ERROR_MEMORY, "the GPU has not the %.1f MiB that the KV cache needs; use a smaller n_ctx or fewer bits", (double) bytes / 1048576.0);
    }
    data_ = static_cast<uint8_t *>(memory);
}

device_block::~device_block() {
    with_.release(data_);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The worker
// ---------------------------------------------------------------------------------------------------------------------------------------------

cuda_worker::cuda_worker(const api & with, int device) : with(with), device(device) {
    select();
    require_ok(with, with.describe(device, &facts), "asking about the device");
    require_ok(with, with.make_stream(&work), "making a stream");
    n_block = 2 * facts.n_processor;
}

cuda_worker::~cuda_worker() {
    with.select_device(device);
    with.wait_stream(work);
    with.free_stream(work);
}

uint8_t * cuda_worker::grown(std::unique_ptr<device_block> & block, size_t bytes) {
    if (!block || block->size() < bytes) {
        require_ok(with, with.wait_stream(work), "waiting for the stream");
        block.reset();
        block = std::make_unique<device_block>(with, bytes);
    }
    return block->data();
}

uint8_t * cuda_worker::pack_scratch(const tile_layout & layout) {
    return grown(pack_, (size_t) with.pack_scratch_bytes(&layout, n_block));
}

uint8_t * cuda_worker::partials(size_t bytes) {
    return grown(partial_, bytes);
}

size_t cuda_worker::scratch_bytes() const {
    return (pack_ ? pack_->size() : 0) + (partial_ ? partial_->size() : 0);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The table
// ---------------------------------------------------------------------------------------------------------------------------------------------

cache_table::cache_table(const api & with, const store_shape & like, bool has_tiles)
    : with_(with), book_(like, has_tiles), place_(with, book_.places().size() * sizeof(int32_t)) {
    require_ok(with, with.fill(place_.data(), 0xff, place_.size(), nullptr), "clearing the table of cells"); // place_absent
    require_ok(with, with.wait_stream(nullptr), "clearing the table of cells");
    for (slice & s : slices_) {
        require_ok(with, with.make_event(&s.sent), "making an event");
    }
}

cache_table::~cache_table() {
    for (slice & s : slices_) {
        if (s.is_under) {
            with_.wait_event_host(s.sent);
        }
        with_.free_event(s.sent);
        with_.release_host(s.host);
    }
}

size_t cache_table::bytes() const {
    size_t sum = place_.size();
    for (const slice & s : slices_) {
        sum += s.device ? s.device->size() : 0;
    }
    return sum;
}

// The plan goes to the device in one piece, and changes the table there. A slice is used again only when the device is done with what it took along; by
// then, as a rule, it long is.
void cache_table::send(cuda_worker & worker) {
    slice & s        = slices_[turn_];
    turn_            = (turn_ + 1) % n_slice;
    size_t     used  = 0;
    const auto place = [&](size_t bytes) {
        const size_t at = used;
        used += padded(bytes);
        return at;
    };
    const size_t jobs = place(step_.jobs.size() * sizeof(pack_job)), source = place(step_.source.size() * 4), slot = place(step_.slot.size() * 4);
    const size_t index = place(step_.index.size() * 4), value = place(step_.value.size() * 4);
    if (s.is_under) {
        require_ok(with_, with_.wait_event_host(s.sent), "waiting for an earlier step");
    }
    if (s.bytes < used) {
        require_ok(with_, with_.wait_stream(worker.work), "waiting for the stream");
        with_.release_host(s.host);
        s.host   = nullptr;
        s.bytes  = 2 * used;
        s.device = std::make_unique<device_block>(with_, s.bytes);
        require_ok(with_, with_.allocate_host(&s.host, s.bytes), "allocating pinned memory");
    }
    const auto put = [&](size_t at, const void * from, size_t bytes) {
        if (bytes > 0) {
            memcpy(static_cast<uint8_t *>(s.host) + at, from, bytes);
        }
    };
    put(jobs, step_.jobs.data(), step_.jobs.size() * sizeof(pack_job));
    put(source, step_.source.data(), step_.source.size() * 4);
    put(slot, step_.slot.data(), step_.slot.size() * 4);
    put(index, step_.index.data(), step_.index.size() * 4);
    put(value, step_.value.data(), step_.value.size() * 4);
    if (used > 0) {
        require_ok(with_, with_.upload(s.device->data(), s.host, used, worker.work), "sending a step's plan");
        jobs_                      = reinterpret_cast<const pack_job *>(s.device->data() + jobs);
        source_                    = reinterpret_cast<const int32_t *>(s.device->data() + source);
        slot_                      = reinterpret_cast<const int32_t *>(s.device->data() + slot);
        const place_arguments args = { reinterpret_cast<int32_t *>(place_.data()), reinterpret_cast<const int32_t *>(s.device->data() + index),
                                       reinterpret_cast<const int32_t *>(s.device->data() + value), (int32_t) step_.index.size() };
        require_ok(with_, with_.set_places(&args, worker.work), "changing the table of cells");
    }
    require_ok(with_, with_.record(s.sent, worker.work), "recording an event");
    s.is_under = true;
}

void cache_table::plan(cuda_worker & worker, int64_t step, int64_t n, const cell_source & cells) {
    if (step == last_step_) {
        return;
    }
    book_.write(n, cells, step_);
    last_step_ = step;
    send(worker);
}

void cache_table::plan_flush(cuda_worker & worker) {
    book_.flush(step_);
    send(worker);
}

void cache_table::plan_erase(cuda_worker & worker, int64_t cell, int64_t n) {
    book_.erase(cell, n, step_);
    send(worker);
}

void cache_table::plan_copy(cuda_worker & worker, int from, int to) {
    book_.copy_stream(from, to, step_);
    send(worker);
}

void cache_table::clear(cuda_worker & worker) {
    book_.clear();
    step_ = {};
    require_ok(with_, with_.fill(place_.data(), 0xff, place_.size(), worker.work), "clearing the table of cells");
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// One side of one layer
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

tile_layout layout_of(const store_shape & shape, const tile_layout * layout) {
    if (layout) {
        return *layout;
    }
    tile_layout plain = {};
    plain.config.bits = 16;
    plain.side        = shape.side;
    plain.n_token     = shape.tile;
    plain.d_head      = shape.d_head;
    return plain;
}

size_t tiles_bytes(const store_shape & shape, const tile_layout * layout) {
    const int64_t n_tile = (shape.n_cell + shape.tile - 1) / shape.tile;
    return layout ? (size_t) (shape.n_stream * n_tile * shape.n_head * layout->part.bytes) : 0;
}

size_t pool_bytes(const store_shape & shape, int64_t n_row) {
    return (size_t) (shape.n_stream * n_row * shape.n_embd()) * sizeof(uint16_t);
}

} // namespace

size_t cache_side::bytes(const store_shape & shape, const tile_layout * layout, int64_t n_row) {
    return tiles_bytes(shape, layout) + pool_bytes(shape, n_row);
}

cache_side::cache_side(const api & with, const store_shape & shape, const tile_layout * layout, uint32_t seed, std::shared_ptr<cache_table> table)
    : with_(with), shape_(shape), layout_(layout_of(shape, layout)), has_tiles_(layout != nullptr), seed_(seed), table_(std::move(table)) {
    const store_shape & book = table_->book().shape();
    if (book.n_cell != shape.n_cell || book.n_stream != shape.n_stream || book.tile != shape.tile) {
        fail(GEAR_ERROR_INTERNAL, "layer %d: the table is of %lld cells in %d streams", shape.il, (long long) book.n_cell, book.n_stream);
    }
    if (shape.d_head % 16 != 0 || shape.d_head < 32 || shape.d_head > max_d_head) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: heads of %d channels: on a GPU they must be a multiple of 16 from 32 to %d", shape.il, shape.d_head,
             max_d_head);
    }
    n_row_ = table_->book().n_row();
    tiles_ = std::make_unique<device_block>(with, tiles_bytes(shape_, layout));
    pool_  = std::make_unique<device_block>(with, pool_bytes(shape_, n_row_));
}

device_side cache_side::on_device() const {
    return { layout_,
             tiles_->data(),
             reinterpret_cast<uint16_t *>(pool_->data()),
             table_->place(),
             nullptr,
             shape_.n_head,
             (int32_t) shape_.n_cell,
             table_->book().n_tile(),
             (int32_t) n_row_,
             has_tiles_ };
}

// The book's pool has grown: so does this one, stream by stream.
void cache_side::grow(cuda_worker & worker) {
    const int64_t n_row = table_->book().n_row();
    if (n_row == n_row_) {
        return;
    }
    auto         larger = std::make_unique<device_block>(with_, pool_bytes(shape_, n_row));
    const size_t row    = (size_t) shape_.n_embd() * sizeof(uint16_t);
    for (int stream = 0; stream < shape_.n_stream; ++stream) {
        require_ok(with_, with_.copy(larger->data() + stream * n_row * row, pool_->data() + stream * n_row_ * row, n_row_ * row, worker.work),
                   "enlarging the pool of rows");
    }
    require_ok(with_, with_.wait_stream(worker.work), "enlarging the pool of rows");
    pool_  = std::move(larger);
    n_row_ = n_row;
}

void cache_side::pack(cuda_worker & worker) {
    grow(worker);
    if (table_->n_job() == 0) {
        return;
    }
    const pack_arguments args = { on_device(), seed_, table_->jobs(), table_->source(), table_->n_job(), worker.pack_scratch(layout_) };
    require_ok(with_, with_.pack(&args, worker.n_block, worker.work), "packing tiles");
    n_pack_ += table_->n_job();
}

void cache_side::write(cuda_worker & worker, int64_t n, const void * rows, int64_t stride, bool is_half) {
    pack(worker);
    write_arguments args = {};
    args.side[0]         = { rows, stride, is_half, reinterpret_cast<uint16_t *>(pool_->data()), shape_.n_embd() };
    args.slot[0]         = table_->slot();
    args.n_side          = 1;
    args.n               = (int32_t) n;
    require_ok(with_, with_.write_rows(&args, worker.work), "writing rows");
}

void cache_side::copy_stream(cuda_worker & worker, int from, int to) {
    grow(worker);
    const size_t tiles = tiles_->size() / shape_.n_stream, rows = pool_->size() / shape_.n_stream;
    require_ok(with_, with_.copy(tiles_->data() + to * tiles, tiles_->data() + from * tiles, tiles, worker.work), "copying a sequence");
    require_ok(with_, with_.copy(pool_->data() + to * rows, pool_->data() + from * rows, rows, worker.work), "copying a sequence");
}

void cache_side::read(cuda_worker & worker, int64_t cell, int64_t n, uint16_t * rows) {
    const int64_t      n_embd = shape_.n_embd(), most = 1024; // rows at once
    const device_block there(with_, (size_t) (std::min(n, most) * n_embd) * sizeof(uint16_t));
    while (n > 0) {
        const int64_t    stream = cell / shape_.n_cell, local = cell % shape_.n_cell, part = std::min({ n, most, shape_.n_cell - local });
        const size_t     bytes = (size_t) (part * n_embd) * sizeof(uint16_t);
        unpack_arguments args  = { on_device(), (int32_t) stream, (int32_t) local, (int32_t) part, reinterpret_cast<uint16_t *>(there.data()) };
        require_ok(with_, with_.unpack(&args, worker.work), "unpacking rows");
        require_ok(with_, with_.download(rows, there.data(), bytes, worker.work), "reading rows");
        require_ok(with_, with_.wait_stream(worker.work), "reading rows");
        cell += part;
        n -= part;
        rows += part * n_embd;
    }
}

gear_store_stats cache_side::stats() const {
    gear_store_stats stats  = table_->book().stats();
    const int64_t    n_tile = (int64_t) shape_.n_stream * table_->book().n_tile();
    stats.il                = shape_.il;
    stats.side              = shape_.side;
    stats.kind              = has_tiles_ ? 0 : 3;
    stats.n_head_kv         = shape_.n_head;
    stats.d_head            = shape_.d_head;
    stats.n_pack            = n_pack_;
    stats.bytes_tiles_used  = has_tiles_ ? stats.bytes_tiles_used / (int64_t) tile_align * shape_.n_head * layout_.part.bytes : 0;
    stats.bytes_tiles       = has_tiles_ ? n_tile * shape_.n_head * layout_.part.bytes : 0;
    stats.bytes_exact       = (int64_t) pool_->size();
    stats.bytes_tables      = (int64_t) table_->bytes();
    stats.bytes_f16         = shape_.n_stream * shape_.n_cell * shape_.n_embd() * 2;
    stats.bits_per_element  = has_tiles_ ? 8.0 * (double) layout_.part.bytes / ((double) shape_.tile * shape_.d_head) : 16.0;
    return stats;
}

void attend(cuda_worker & worker, const gear_attention_params & params, const cache_side & k, const cache_side & v) {
    attend_arguments args  = { params, k.on_device(), v.on_device(), 0, 0, 0, 0, 0, nullptr };
    const int64_t    bytes = worker.with.plan_attend(&args, worker.facts.n_processor);
    if (bytes > 0) {
        args.partial = reinterpret_cast<float *>(worker.partials((size_t) bytes));
    }
    require_ok(worker.with, worker.with.attend(&args, worker.work), "attention");
}

} // namespace gear::cuda
