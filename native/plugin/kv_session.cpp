#include "plugin/kv_session.h"

#include "common/error.h"
#include "common/memory.h"
#include "plugin/kv_devices.h"

#include <algorithm>

namespace gear {

namespace {

constexpr size_t most_note    = (size_t) 1 << 30;
constexpr int    most_threads = 1024;

char letter(gear_side side) {
    return side == GEAR_SIDE_K ? 'K' : 'V';
}

} // namespace

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Saving
// ---------------------------------------------------------------------------------------------------------------------------------------------

// written: bytes that will be
void kv_session::make_window(size_t bytes, size_t written) {
    require_memory(written, "a session");
    window_ = std::make_unique<address_range>(bytes);
    window_->commit();
    n_window_ = bytes;
}

kv_session::kv_session(kv_devices * devices, size_t state_bytes) {
    make_window(state_bytes, devices ? 0 : state_bytes);
    listen(devices);
}

kv_session::~kv_session() {
    if (devices_) {
        for (const auto & device : *devices_) {
            device->remove(this);
        }
    }
}

// From now on whatever one of the devices moves to or from the window is noted.
void kv_session::listen(kv_devices * devices) {
    if (!devices) {
        return;
    }
    try {
        for (const auto & device : *devices) {
            device->add(this);
        }
    } catch (...) { // memory was short: none of them may know this session any more
        for (const auto & device : *devices) {
            device->remove(this);
        }
        throw;
    }
    devices_ = devices;
}

uint8_t * kv_session::window() const {
    return (uint8_t *) window_->data();
}

bool kv_session::note_saved(cache_tensor & tensor, const row_range & rows, size_t size, const void * data) {
    if (size == 0 || !tensor.is_store() || !is_whole(rows, size, (size_t) tensor.row_bytes())) {
        return false;
    }
    const uint64_t offset = (uint64_t) ((const uint8_t *) data - window());
    auto           found  = std::find_if(saved_.begin(), saved_.end(), [&](const saved_tensor & s) { return s.tensor == &tensor; });
    if (found == saved_.end()) {
        saved_.push_back({ &tensor, {} });
        found = std::prev(saved_.end());
    }
    found->ranges.push_back({ rows.first, rows.n, offset });
    return true;
}

void kv_session::save(size_t n_state, const void * note, size_t n_note, const void * extra, size_t n_extra, int n_threads, output & out) {
    if (in_) {
        fail(GEAR_ERROR_INVALID, "this session was opened to be restored: make one with gear_session_new to save");
    }
    if (n_state > n_window_ || n_threads < 1 || n_threads > most_threads || n_note > most_note) {
        fail(GEAR_ERROR_INVALID, "cannot save a state of %zu bytes in a window of %zu with %d threads and a note of %zu bytes", n_state, n_window_,
             n_threads, n_note);
    }
    std::vector<part> rows; // in stores
    for (saved_tensor & saved : saved_) {
        for (const cell_range & range : saved.ranges) {
            rows.push_back({ range.offset, (uint64_t) (range.n * saved.tensor->row_bytes()) });
        }
        std::sort(saved.ranges.begin(), saved.ranges.end(), [](const cell_range & a, const cell_range & b) { return a.cell < b.cell; });
    }
    std::sort(rows.begin(), rows.end(), [](const part & a, const part & b) { return a.offset < b.offset; });
    rows.push_back({ n_state, 0 });
    std::vector<part> parts;
    uint64_t          end = 0;
    for (const part & row : rows) {
        if (row.offset < end || row.offset + row.size > n_state) {
            fail(GEAR_ERROR_INTERNAL, "llama.cpp saved its state in an order that gearcpp does not understand: please report this as a defect of gearcpp");
        }
        if (row.offset > end) {
            parts.push_back({ end, row.offset - end });
        }
        end = row.offset + row.size;
    }

    write_head(out);
    write_section(out, section_kind::note, [&](output & to) { to.write(note, n_note); });
    write_section(out, section_kind::state, [&](output & to) {
        to.put((uint64_t) n_state);
        to.put((uint64_t) parts.size());
        for (const part & p : parts) {
            to.put(p);
        }
        for (const part & p : parts) {
            to.write(window() + p.offset, p.size);
        }
    });
    for (saved_tensor & saved : saved_) {
        saved.tensor->read_store(n_threads, [&](const store & cache, const tile_codec * codec) {
            const store_image image = image_of(cache, codec, saved.ranges);
            write_section(out, section_kind::tensor, [&](output & to) { write_image(to, image, cache); });
            const std::vector<uint8_t> learned = codec ? codec->learned() : std::vector<uint8_t>();
            if (!learned.empty()) {
                write_section(out, section_kind::learned, [&](output & to) { to.write(learned.data(), learned.size()); });
            }
        });
    }
    if (n_extra > 0) {
        write_section(out, section_kind::extra, [&](output & to) { to.write(extra, n_extra); });
    }
    write_section(out, section_kind::end, [](output &) {});
}

void kv_session::forget_others() {
    for (const saved_tensor & saved : saved_) {
        saved.tensor->change_store([&](store * rows, const tile_codec *, const row_writer &) {
            if (!rows) {
                return;
            }
            std::vector<uint8_t> marked((size_t) (rows->shape().n_cell * rows->shape().n_stream));
            for (const cell_range & range : saved.ranges) {
                std::fill_n(marked.begin() + range.cell, range.n, (uint8_t) 1);
            }
            rows->keep(marked.data());
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Reading
// ---------------------------------------------------------------------------------------------------------------------------------------------

kv_session::kv_session(std::unique_ptr<input> in, bool note_only) : in_(std::move(in)) {
    const std::vector<section> sections = note_only ? std::vector<section>{ check_first_section(*in_) } : check_sections(*in_);
    if (sections.empty() || sections[0].kind != section_kind::note || sections[0].size > most_note) {
        fail(GEAR_ERROR_DATA, "it is inconsistent: it does not begin with a note");
    }
    note_.resize(sections[0].size);
    in_->read(sections[0].offset, note_.data(), note_.size());
    if (note_only) {
        make_window(0, 0);
        return;
    }
    bool has_state = false;
    for (size_t i = 1; i < sections.size(); ++i) {
        if (sections[i].kind == section_kind::state && !has_state) {
            read_state(sections[i]);
            has_state = true;
        } else if (sections[i].kind == section_kind::tensor && has_state) {
            kept_.push_back({ read_image(*in_, sections[i]), nullptr, {}, {} });
        } else if (sections[i].kind == section_kind::learned && sections[i - 1].kind == section_kind::tensor) {
            kept_.back().learned.resize(sections[i].size);
            in_->read(sections[i].offset, kept_.back().learned.data(), sections[i].size);
        } else if (sections[i].kind == section_kind::extra && extra_.size == 0) {
            extra_ = sections[i];
        } else {
            fail(GEAR_ERROR_DATA, "it is inconsistent: a section is in the wrong place");
        }
    }
    if (!has_state) {
        fail(GEAR_ERROR_DATA, "it is inconsistent: it has no state");
    }
    index_ranges();
}

void kv_session::read_state(const section & from) {
    cursor         at(*in_, from);
    const uint64_t n_state = at.value<uint64_t>(), n_part = at.value<uint64_t>();
    at.require(n_part, sizeof(part));
    uint64_t end = 0, n_bytes = 0;
    for (uint64_t i = 0; i < n_part; ++i) {
        const part p = at.value<part>();
        if (p.offset < end || p.offset > n_state || p.size > n_state - p.offset) {
            fail(GEAR_ERROR_DATA, "it is inconsistent: the parts of its state overlap");
        }
        end = p.offset + p.size;
        n_bytes += p.size;
        parts_.push_back(p);
    }
    if (at.left() != n_bytes || n_state > SIZE_MAX / 2) {
        fail(GEAR_ERROR_DATA, "it is inconsistent: its state is not as long as its parts");
    }
    make_window(n_state, n_bytes);
    for (const part & p : parts_) {
        at.bytes(window() + p.offset, p.size);
    }
}

// Parts and rows together are the whole state, each byte once.
void kv_session::index_ranges() {
    for (size_t i = 0; i < kept_.size(); ++i) {
        const store_image & image = kept_[i].image;
        for (const cell_range & range : image.ranges) {
            if (range.offset > n_window_ || (uint64_t) range.n > (n_window_ - range.offset) / image.row_bytes()) {
                fail(GEAR_ERROR_DATA, "it is inconsistent: rows lie outside of its state");
            }
            ranges_.push_back({ range.offset, range.n * image.row_bytes(), i, range.cell });
        }
    }
    const auto by_offset = [](const auto & a, const auto & b) { return a.offset < b.offset; };
    std::sort(ranges_.begin(), ranges_.end(), by_offset);
    std::vector<part> all = parts_;
    for (const kept_range & range : ranges_) {
        all.push_back({ range.offset, range.size });
    }
    std::sort(all.begin(), all.end(), by_offset);
    uint64_t end = 0;
    for (const part & p : all) {
        if (p.offset != end) {
            fail(GEAR_ERROR_DATA, "it is inconsistent: its state has gaps");
        }
        end += p.size;
    }
    if (end != n_window_) {
        fail(GEAR_ERROR_DATA, "it is inconsistent: its state has gaps");
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Restoring
// ---------------------------------------------------------------------------------------------------------------------------------------------

void kv_session::attach(kv_devices * devices) {
    if (devices_) {
        fail(GEAR_ERROR_INVALID, "this session is attached to a device");
    }
    if (!devices && !kept_.empty()) {
        fail(GEAR_ERROR_DATA, "it is of a GEAR cache, and this context has none");
    }
    for (const kept_tensor & kept : kept_) {
        const cache_method & method = (*devices)[0].method();
        require_codec(kept.image, method.codec(kept.image.shape).codec.get());
        const gear_config & config = method.config();
        const store_shape & shape  = kept.image.shape;
        if (shape.tile != config.tile || shape.n_tail != config.n_tail || shape.n_sink != config.n_sink) {
            fail(GEAR_ERROR_DATA, "its cache has tiles of %d cells, a tail of %d and %d sinks; this one %d, %d and %d", shape.tile, shape.n_tail,
                 shape.n_sink, config.tile, config.n_tail, config.n_sink);
        }
    }
    listen(devices);
}

bool kv_session::note_restored(cache_tensor & tensor, const row_range & rows, size_t size, const void * data) {
    if (size == 0 || !is_whole(rows, size, (size_t) tensor.row_bytes())) {
        return false;
    }
    int64_t  cell = rows.first, n = rows.n;
    uint64_t offset = (uint64_t) ((const uint8_t *) data - window());
    for (bool is_first = true; n > 0; is_first = false) {
        const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), offset, [](uint64_t o, const kept_range & r) { return o < r.offset; });
        const bool found = after != ranges_.begin() && offset < std::prev(after)->offset + std::prev(after)->size;
        if (!found && is_first) {
            return false;
        }
        const size_t  row  = (size_t) tensor.row_bytes();
        kept_tensor * kept = found ? &kept_[std::prev(after)->tensor] : nullptr;
        if (!kept || kept->image.shape.il != tensor.il || kept->image.shape.side != tensor.side || kept->image.row_bytes() != row ||
            (offset - std::prev(after)->offset) % row != 0 || (kept->tensor && kept->tensor != &tensor)) {
            fail(GEAR_ERROR_DATA, "layer %d %c: llama.cpp takes the rows of this state for others: is this another release of it?", tensor.il,
                 letter(tensor.side));
        }
        const kept_range & range = *std::prev(after);
        const int64_t      skip  = (int64_t) ((offset - range.offset) / row);
        const int64_t      n_now = std::min<int64_t>(n, (int64_t) (range.size / row) - skip);
        kept->tensor             = &tensor;
        kept->moves.push_back({ range.cell + skip, n_now, cell });
        offset += n_now * row;
        cell += n_now;
        n -= n_now;
    }
    return true;
}

int64_t kv_session::restore_tensor(kept_tensor & kept) {
    const store_image & image = kept.image;
    if (!kept.tensor) {
        fail(GEAR_ERROR_DATA, "llama.cpp did not take back what it saved of layer %d: is this another release of it?", image.shape.il);
    }
    int64_t n_changed = 0;
    kept.tensor->change_store([&](store * cells, const tile_codec * codec, const row_writer & write) {
        std::shared_ptr<const tile_codec> own;
        if (!codec && image.tile_bytes > 0) { // a cache too small to gain from packing takes the rows
            own   = (*devices_)[0].method().codec(image.shape).codec;
            codec = own.get();
        }
        n_changed = restore_image(*in_, image, kept.moves, cells, codec, write);
        if (cells && !kept.learned.empty() && !codec->learn_again(kept.learned)) {
            fail(GEAR_ERROR_DATA, "it is inconsistent: what it learned of layer %d's queries is not of this cache", image.shape.il);
        }
    });
    return n_changed;
}

int64_t kv_session::restore(void * extra) {
    if (!in_) {
        fail(GEAR_ERROR_INVALID, "there is nothing to restore: this session was made to be saved");
    }
    int64_t n_changed = 0;
    for (kept_tensor & kept : kept_) {
        if (!kept.image.ranges.empty()) {
            n_changed += restore_tensor(kept);
        }
    }
    if (extra && extra_.size > 0) {
        in_->read(extra_.offset, extra, extra_.size);
    }
    return n_changed;
}

} // namespace gear
