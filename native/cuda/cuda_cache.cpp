#include "cuda/cuda_cache.h"

#include "common/error.h"
#include "common/half.h"
#include "common/memory.h"
#include "store/store_parts.h"

#include <algorithm>
#include <cstring>

namespace gear::cuda {

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The table
// ---------------------------------------------------------------------------------------------------------------------------------------------

cache_table::slice::~slice() {
    if (is_under) {
        with->wait_event_host(sent);
    }
    if (sent) {
        with->free_event(sent);
    }
    if (host) {
        with->release_host(host);
    }
}

cache_table::cache_table(const api & with, const store_shape & like, bool has_tiles)
    : with_(with), planner_(like, has_tiles), slot_table_(with, planner_.slots().size() * sizeof(int32_t)) {
    make_slices();
    require_ok(with, with.fill(slot_table_.data(), 0xff, slot_table_.size(), nullptr), "clearing the table of cells"); // slot_absent
    require_ok(with, with.wait_stream(nullptr), "clearing the table of cells");
}

cache_table::cache_table(cuda_worker & worker, const cache_table & other)
    : with_(worker.with), planner_(other.planner_), slot_table_(worker.with, other.slot_table_.size()) {
    make_slices();
    require_ok(with_, with_.copy(slot_table_.data(), other.slot_table_.data(), slot_table_.size(), worker.work), "copying the table of cells");
}

cache_table::~cache_table() = default;

void cache_table::make_slices() {
    for (slice & s : slices_) {
        s.with = &with_;
        require_ok(with_, with_.make_event(&s.sent), "making an event");
    }
}

size_t cache_table::bytes() const {
    size_t sum = slot_table_.size();
    for (const slice & s : slices_) {
        sum += s.device ? s.device->size() : 0;
    }
    return sum;
}

// The plan goes to the device in one piece, and changes the table there. A slice is used again only when the device is done with what it took along; by
// then, as a rule, it long is.
void cache_table::send(cuda_worker & worker) {
    slice & s          = slices_[turn_];
    turn_              = (turn_ + 1) % n_slice;
    size_t     used    = 0;
    const auto reserve = [&](size_t bytes) {
        const size_t at = used;
        used += padded(bytes);
        return at;
    };
    const size_t jobs = reserve(plan_.jobs.size() * sizeof(pack_job)), source = reserve(plan_.source.size() * 4), slot = reserve(plan_.slot.size() * 4);
    const size_t index = reserve(plan_.index.size() * 4), value = reserve(plan_.value.size() * 4);
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
    put(jobs, plan_.jobs.data(), plan_.jobs.size() * sizeof(pack_job));
    put(source, plan_.source.data(), plan_.source.size() * 4);
    put(slot, plan_.slot.data(), plan_.slot.size() * 4);
    put(index, plan_.index.data(), plan_.index.size() * 4);
    put(value, plan_.value.data(), plan_.value.size() * 4);
    if (used > 0) {
        require_ok(with_, with_.upload(s.device->data(), s.host, used, worker.work), "sending a step's plan");
        jobs_                     = reinterpret_cast<const pack_job *>(s.device->data() + jobs);
        source_                   = reinterpret_cast<const int32_t *>(s.device->data() + source);
        slot_                     = reinterpret_cast<const int32_t *>(s.device->data() + slot);
        const slot_arguments args = { reinterpret_cast<int32_t *>(slot_table_.data()), reinterpret_cast<const int32_t *>(s.device->data() + index),
                                      reinterpret_cast<const int32_t *>(s.device->data() + value), (int32_t) plan_.index.size() };
        require_ok(with_, with_.set_slots(&args, worker.work), "changing the table of cells");
    }
    require_ok(with_, with_.record(s.sent, worker.work), "recording an event");
    s.is_under = true;
}

void cache_table::plan(cuda_worker & worker, int64_t step, int64_t n, const cell_source & cells) {
    if (step == last_step_) {
        return;
    }
    planner_.write(n, cells, plan_);
    last_step_ = step;
    send(worker);
}

void cache_table::plan_flush(cuda_worker & worker, bool full_only) {
    planner_.flush(plan_, full_only);
    send(worker);
}

void cache_table::plan_erase(cuda_worker & worker, int64_t cell, int64_t n) {
    planner_.erase(cell, n, plan_);
    send(worker);
}

void cache_table::plan_copy(cuda_worker & worker, int from, int to) {
    planner_.copy_stream(from, to, plan_);
    send(worker);
}

void cache_table::clear(cuda_worker & worker) {
    planner_.clear();
    plan_ = {};
    require_ok(with_, with_.fill(slot_table_.data(), 0xff, slot_table_.size(), worker.work), "clearing the table of cells");
}

void cache_table::adopt(cuda_worker & worker, const store & from) {
    planner_.adopt(from, plan_);
    require_ok(with_, with_.fill(slot_table_.data(), 0xff, slot_table_.size(), worker.work), "clearing the table of cells");
    send(worker);
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

cache_side::cache_side(const api & with, const store_shape & shape, const tile_layout * layout, uint32_t seed, std::shared_ptr<cache_table> table,
                       head_bases * bases)
    : with_(with), shape_(shape), layout_(layout_of(shape, layout)), has_tiles_(layout != nullptr), seed_(seed), table_(std::move(table)), bases_(bases) {
    const store_shape & of = table_->planner().shape();
    if (of.n_cell != shape.n_cell || of.n_stream != shape.n_stream || of.tile != shape.tile) {
        fail(GEAR_ERROR_INTERNAL, "layer %d: the table is of %lld cells in %d streams", shape.il, (long long) of.n_cell, of.n_stream);
    }
    if (shape.d_head % 16 != 0 || shape.d_head < 32 || shape.d_head > max_d_head) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: heads of %d channels: on a GPU they must be a multiple of 16 from 32 to %d", shape.il, shape.d_head,
             max_d_head);
    }
    n_row_ = table_->planner().n_row();
    tiles_ = std::make_unique<device_block>(with, tiles_bytes(shape_, layout));
    pool_  = std::make_unique<device_block>(with, pool_bytes(shape_, n_row_));
    if (has_tiles_ && layout_.config.feedback) {
        fail(GEAR_ERROR_UNSUPPORTED, "layer %d: feedback_k is for a cache on the CPU so far", shape.il);
    }
    if (has_tiles_ && layout_.config.rotate == rotate_weighted) {
        if (!bases_) {
            fail(GEAR_ERROR_INTERNAL, "layer %d: no one chooses the weights of its channels", shape.il);
        }
        basis_ = std::make_unique<device_block>(with, (size_t) (shape.n_head * basis_bytes(shape.d_head)));
    }
    if (has_tiles_) {
        errors_ = std::make_unique<device_block>(with, (size_t) (shape.n_head * (1 + n_measured)) * sizeof(error_sums));
    }
}

device_side cache_side::on_device() const {
    return { layout_,
             tiles_->data(),
             reinterpret_cast<uint16_t *>(pool_->data()),
             table_->slot_table(),
             basis_ ? basis_->data() : nullptr,
             shape_.n_head,
             (int32_t) shape_.n_cell,
             table_->planner().n_tile(),
             (int32_t) n_row_,
             has_tiles_ };
}

// The planner's pool has grown: so does this one, stream by stream.
void cache_side::grow(cuda_worker & worker) {
    const int64_t n_row = table_->planner().n_row();
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

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The basis of each head: the device adds up the queries, the host decides (codec/basis.h) when the first tile is packed, once in a cache's life
// ---------------------------------------------------------------------------------------------------------------------------------------------

void cache_side::observe(cuda_worker & worker, const gear_attention_params & params) {
    if (!learns() || shape_.side != GEAR_SIDE_K || !bases_->is_open(0)) {
        return;
    }
    if (!squares_) {
        squares_ = std::make_unique<device_block>(with_, (size_t) (shape_.n_head * shape_.d_head) * sizeof(double));
    }
    if (n_query_ == 0) {
        require_ok(with_, with_.fill(squares_->data(), 0, squares_->size(), worker.work), "noting queries");
    }
    const observe_arguments args = { params, reinterpret_cast<double *>(squares_->data()), shape_.n_head, shape_.d_head };
    require_ok(with_, with_.observe(&args, worker.work), "noting queries");
    n_query_ += (int64_t) params.n_query * params.n_stream * (params.n_head / shape_.n_head);
    query_scale_ = params.scale;
}

void cache_side::report_queries(cuda_worker & worker) {
    if (n_query_ == 0 || !bases_->is_open(0)) {
        return;
    }
    std::vector<double> square((size_t) (shape_.n_head * shape_.d_head));
    require_ok(with_, with_.download(square.data(), squares_->data(), square.size() * sizeof(double), worker.work), "reading the queries' sums");
    require_ok(with_, with_.wait_stream(worker.work), "reading the queries' sums");
    for (int head = 0; head < shape_.n_head; ++head) {
        bases_->add_observed(head, square.data() + (size_t) (head * shape_.d_head), n_query_, query_scale_);
    }
    n_query_ = 0;
}

// source [T]: of the first tile to be packed, as pack_arguments has it; rows f16 [n_row, n_embd] in device memory
void cache_side::teach(cuda_worker & worker, const int32_t * source, const uint16_t * rows, int64_t n_row) {
    if (!learns() || !bases_->is_open(0)) {
        return;
    }
    report_queries(worker);
    const int             d = shape_.d_head;
    std::vector<uint16_t> there((size_t) (n_row * shape_.n_embd()));
    if (is_weighted()) { // else the queries are all that there is to learn from
        require_ok(with_, with_.download(there.data(), rows, there.size() * sizeof(uint16_t), worker.work), "reading the first tile");
        require_ok(with_, with_.wait_stream(worker.work), "reading the first tile");
    }
    std::vector<float>   x((size_t) (shape_.tile * d));
    std::vector<uint8_t> written((size_t) shape_.tile);
    for (int head = 0; head < shape_.n_head; ++head) {
        for (int t = 0; t < shape_.tile; ++t) {
            written[(size_t) t] = source[t] >= 0;
            for (int c = 0; c < d; ++c) {
                x[(size_t) (t * d + c)] =
                    source[t] >= 0 ? half_to_float(there[(size_t) source[t] * (size_t) shape_.n_embd() + (size_t) (head * d + c)]) : 0;
            }
        }
        bases_->decide(head, x.data(), written.data());
    }
    send_bases(worker);
    squares_.reset();
}

void cache_side::send_bases(cuda_worker & worker) {
    const size_t         d = (size_t) shape_.d_head, n = (size_t) basis_bytes(shape_.d_head);
    std::vector<uint8_t> all((size_t) shape_.n_head * n);
    std::vector<double>  weights((size_t) shape_.n_head * d, -1.0);
    bool                 is_known = false;
    for (int head = 0; head < shape_.n_head; ++head) {
        if (const uint8_t * basis = bases_->basis(head)) {
            std::copy_n(basis, n, all.data() + (size_t) head * n);
        }
        if (const double * weight = bases_->score_weights(head)) {
            std::copy_n(weight, d, weights.data() + (size_t) head * d);
            is_known = true;
        }
    }
    if (is_weighted()) {
        require_ok(with_, with_.upload(basis_->data(), all.data(), all.size(), worker.work), "sending the weights of channels");
    }
    weights_ = is_known ? std::make_unique<device_block>(with_, weights.size() * sizeof(double)) : nullptr;
    if (is_known) {
        require_ok(with_, with_.upload(weights_->data(), weights.data(), weights_->size(), worker.work), "sending the weights of errors");
    }
    require_ok(with_, with_.wait_stream(worker.work), "sending the weights of channels"); // what was sent goes
}

void cache_side::forget() {
    if (bases_) {
        bases_->forget();
    }
    n_query_      = 0;
    is_measuring_ = false;
    weights_.reset();
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The error of what is packed, as the store measures it: of the rows that a pack coded anew, while they still are in the pool
// ---------------------------------------------------------------------------------------------------------------------------------------------

void cache_side::measure(cuda_worker & worker) {
    auto * const sums = reinterpret_cast<error_sums *>(errors_->data());
    if (!is_measuring_) {
        require_ok(with_, with_.fill(errors_->data(), 0, (size_t) shape_.n_head * sizeof(error_sums), worker.work), "measuring errors");
        is_measuring_ = true;
    }
    const measure_arguments args = { on_device(),
                                     table_->jobs(),
                                     table_->source(),
                                     std::min(table_->n_job(), n_measured),
                                     weights_ ? reinterpret_cast<const double *>(weights_->data()) : nullptr,
                                     sums + shape_.n_head,
                                     sums };
    require_ok(with_, with_.measure(&args, worker.work), "measuring errors");
}

std::vector<head_error> cache_side::errors(cuda_worker & worker) const {
    std::vector<head_error> heads;
    if (!is_measuring_) {
        return heads;
    }
    std::vector<error_sums> sums((size_t) shape_.n_head);
    require_ok(with_, with_.download(sums.data(), errors_->data(), sums.size() * sizeof(error_sums), worker.work), "reading errors");
    require_ok(with_, with_.wait_stream(worker.work), "reading errors");
    for (const error_sums & of : sums) {
        heads.push_back({ (int64_t) of.n_row, of.squares, of.of, (int64_t) of.n_score, of.scores });
    }
    return heads;
}

void cache_side::send_errors(cuda_worker & worker, const std::vector<head_error> & heads) {
    std::vector<error_sums> sums;
    for (const head_error & of : heads) {
        sums.push_back({ (double) of.n_row, of.squares, of.of, (double) of.n_score, of.scores });
    }
    is_measuring_ = !sums.empty();
    if (is_measuring_) {
        require_ok(with_, with_.upload(errors_->data(), sums.data(), sums.size() * sizeof(error_sums), worker.work), "sending errors");
        require_ok(with_, with_.wait_stream(worker.work), "sending errors");
    }
}

void cache_side::pack(cuda_worker & worker) {
    grow(worker);
    if (table_->n_job() == 0) {
        return;
    }
    const slot_plan & plan = table_->last_plan();
    teach(worker, plan.source.data(), reinterpret_cast<const uint16_t *>(pool_->data()) + plan.jobs[0].stream * n_row_ * shape_.n_embd(), n_row_);
    const pack_arguments args = { on_device(), seed_, table_->jobs(), table_->source(), table_->n_job(), worker.pack_scratch(layout_) };
    require_ok(with_, with_.pack(&args, worker.n_block, worker.work), "packing tiles");
    measure(worker);
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

// ---------------------------------------------------------------------------------------------------------------------------------------------
// One layer alone
// ---------------------------------------------------------------------------------------------------------------------------------------------

void cache_side::put(cuda_worker & worker, int64_t step, int64_t n, const int64_t * cells, const uint16_t * rows) {
    const size_t row   = (size_t) shape_.n_embd() * sizeof(uint16_t);
    uint8_t *    there = worker.partials((size_t) n * row);
    require_ok(with_, with_.upload(there, rows, (size_t) n * row, worker.work), "filling the cache");
    table_->plan(worker, step, n, { cells, sizeof(int64_t), true });
    write(worker, n, there, (int64_t) row, true);
    require_ok(with_, with_.wait_stream(worker.work), "filling the cache"); // the caller's rows may go
}

uint8_t * cache_side::tile_data(int stream, int64_t tile) const {
    return tiles_->data() + ((size_t) stream * (size_t) table_->planner().n_tile() + (size_t) tile) * (size_t) shape_.n_head * (size_t) layout_.part.bytes;
}

// The run's rows in `staging` have changed: exact ones go back to the pool, and tiles that held one of them are packed out of `staging`.
void cache_side::update_run(cuda_worker & worker, const uint8_t * marked, int64_t first, int64_t n, const pack_job * jobs, const int32_t * source,
                            int n_job, const uint16_t * staging) {
    std::vector<int32_t> numbers((size_t) n, -1); // slots of the rows, then what `source` says of each tile
    for (int64_t i = 0; i < n; ++i) {
        const int32_t slot = table_->planner().slots()[(size_t) (first + i)];
        if (marked[first + i] && slot >= 0) {
            numbers[(size_t) i] = (int32_t) (first / shape_.n_cell * n_row_ + slot);
        }
    }
    for (int job = 0; job < n_job; ++job) {
        for (int t = 0; t < shape_.tile; ++t) {
            const int32_t from = source[(size_t) job * shape_.tile + t];
            numbers.push_back(from < 0 ? from : (int32_t) (first_cell(jobs[job]) - first) + from);
        }
    }
    const size_t       n_bytes = numbers.size() * sizeof(int32_t);
    const device_block plan(with_, padded(n_bytes) + (size_t) n_job * sizeof(pack_job));
    require_ok(with_, with_.upload(plan.data(), numbers.data(), n_bytes, worker.work), "sending a change of rows");
    require_ok(with_, with_.upload(plan.data() + padded(n_bytes), jobs, (size_t) n_job * sizeof(pack_job), worker.work), "sending a change of rows");

    write_arguments back = {};
    back.side[0]         = { staging, shape_.n_embd() * (int64_t) sizeof(uint16_t), true, reinterpret_cast<uint16_t *>(pool_->data()), shape_.n_embd() };
    back.slot[0]         = reinterpret_cast<const int32_t *>(plan.data());
    back.n_side          = 1;
    back.n               = (int32_t) n;
    require_ok(with_, with_.write_rows(&back, worker.work), "changing rows");
    if (n_job > 0) {
        teach(worker, numbers.data() + n, staging, n);
        device_side side          = on_device();
        side.pool                 = const_cast<uint16_t *>(staging);
        side.n_row                = 0; // rows of any stream begin where `staging` does
        const pack_arguments args = {
            side, seed_, reinterpret_cast<const pack_job *>(plan.data() + padded(n_bytes)), back.slot[0] + n, n_job, worker.pack_scratch(layout_)
        };
        require_ok(with_, with_.pack(&args, worker.n_block, worker.work), "packing changed tiles");
        n_pack_ += n_job;
    }
    require_ok(with_, with_.wait_stream(worker.work), "changing rows"); // what was sent goes
}

void cache_side::update(cuda_worker & worker, const uint8_t * marked, uint16_t * staging, int64_t most_tiles, const rewrite & f) {
    slot_plan plan;
    table_->plan_update(marked, plan);
    const int  n_tile    = table_->planner().n_tile();
    const auto n_token   = [&](int tile) { return std::min<int64_t>(shape_.tile, shape_.n_cell - (int64_t) tile * shape_.tile); };
    const auto is_marked = [&](int stream, int tile) {
        const uint8_t * first = marked + stream * shape_.n_cell + (int64_t) tile * shape_.tile;
        return std::any_of(first, first + n_token(tile), [](uint8_t mark) { return mark != 0; });
    };
    size_t job = 0; // jobs are in the order of tiles
    for (int stream = 0; stream < shape_.n_stream; ++stream) {
        for (int tile = 0; tile < n_tile;) {
            const int begin = tile;
            int64_t   n     = 0;
            for (; tile < n_tile && tile - begin < most_tiles && is_marked(stream, tile); ++tile) {
                n += n_token(tile);
            }
            if (n == 0) {
                ++tile;
                continue;
            }
            const int64_t          local = (int64_t) begin * shape_.tile, first = stream * shape_.n_cell + local;
            const unpack_arguments args = { on_device(), stream, (int32_t) local, (int32_t) n, staging };
            require_ok(with_, with_.unpack(&args, worker.work), "unpacking rows");
            f(first, n, staging);
            size_t last = job;
            while (last < plan.jobs.size() && plan.jobs[last].stream == stream && plan.jobs[last].tile < tile) {
                ++last;
            }
            update_run(worker, marked, first, n, plan.jobs.data() + job, plan.source.data() + job * (size_t) shape_.tile, (int) (last - job), staging);
            job = last;
        }
    }
}

std::unique_ptr<store> cache_side::to_store(cuda_worker & worker, std::shared_ptr<const tile_codec> codec) const {
    const store & planned = table_->planner().cells();
    store_shape   like    = shape_;
    like.n_ubatch         = (int) std::max<int64_t>(like.n_ubatch, table_->planner().n_row() - like.n_sink - like.n_tail - like.tile);
    auto         made     = std::make_unique<store>(like, std::move(codec));
    const size_t n_embd = (size_t) shape_.n_embd(), of_tile = (size_t) shape_.n_head * (size_t) layout_.part.bytes;
    const auto   get = [&](void * to, const uint8_t * from, size_t bytes) {
        require_ok(with_, with_.download(to, from, bytes, worker.work), "reading the cache");
        require_ok(with_, with_.wait_stream(worker.work), "reading the cache");
    };
    std::vector<uint8_t>  heads;
    std::vector<uint16_t> pool((size_t) n_row_ * n_embd);
    for (int stream = 0; stream < shape_.n_stream; ++stream) {
        for (int tile = 0; tile < planned.n_tile(); ++tile) {
            const tile_view view = planned.view(stream, tile);
            if (view.packed) {
                heads.resize(of_tile);
                get(heads.data(), tile_data(stream, tile), of_tile);
                made->put_tile(stream, tile, view.in_tile, heads.data());
            }
        }
        get(pool.data(), pool_->data() + (size_t) stream * pool.size() * sizeof(uint16_t), pool.size() * sizeof(uint16_t));
        for (const exact_cell & e : planned.exact_cells(stream)) {
            made->put_row(stream, e, pool.data() + (size_t) table_->planner().slots()[(size_t) (stream * shape_.n_cell + e.cell)] * n_embd);
        }
        made->put_clock(stream, planned.clock(stream));
    }
    made->put_errors(errors(worker));
    return made;
}

void cache_side::adopt(cuda_worker & worker, const store & from) {
    if (from.shape().n_embd() != shape_.n_embd() || from.tile_bytes() != (has_tiles_ ? (size_t) layout_.part.bytes : 0)) {
        fail(GEAR_ERROR_INTERNAL, "layer %d: a store of another shape cannot take the place of a cache", shape_.il);
    }
    table_->adopt(worker, from);
    grow(worker);
    if (has_tiles_) {
        send_errors(worker, from.errors());
    }
    if (learns()) {
        send_bases(worker); // those of its tiles, which it has told the codec
    }
    const size_t          n_embd = (size_t) shape_.n_embd(), of_tile = (size_t) shape_.n_head * (size_t) layout_.part.bytes;
    std::vector<uint16_t> pool((size_t) n_row_ * n_embd);
    for (int stream = 0; stream < shape_.n_stream; ++stream) {
        for (int tile = 0; tile < from.n_tile(); ++tile) {
            const tile_view view = from.view(stream, tile);
            if (view.packed) {
                require_ok(with_, with_.upload(tile_data(stream, tile), view.packed, of_tile, worker.work), "filling the cache");
            }
            for (int t = 0; t < view.n_token; ++t) {
                const int32_t slot = table_->planner().slots()[(size_t) (stream * shape_.n_cell + (int64_t) tile * shape_.tile + t)];
                if (view.slot[t] >= 0) {
                    memcpy(pool.data() + (size_t) slot * n_embd, from.row(stream, view.slot[t]), n_embd * sizeof(uint16_t));
                }
            }
        }
        const size_t bytes = pool.size() * sizeof(uint16_t);
        require_ok(with_, with_.upload(pool_->data() + (size_t) stream * bytes, pool.data(), bytes, worker.work), "filling the cache");
        require_ok(with_, with_.wait_stream(worker.work), "filling the cache"); // `pool` is used again
    }
}

gear_store_stats cache_side::stats() const {
    gear_store_stats stats  = table_->planner().stats();
    const int64_t    n_tile = (int64_t) shape_.n_stream * table_->planner().n_tile();
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

void attend(cuda_worker & worker, const gear_attention_params & params, cache_side & k, const cache_side & v) {
    k.observe(worker, params);
    attend_arguments args  = { params, k.on_device(), v.on_device(), 0, 0, 0, 0, 0, nullptr };
    const int64_t    bytes = worker.with.plan_attend(&args, worker.facts.n_processor);
    if (bytes > 0) {
        args.partial = reinterpret_cast<float *>(worker.partials((size_t) bytes));
    }
    require_ok(worker.with, worker.with.attend(&args, worker.work), "attention");
}

} // namespace gear::cuda
