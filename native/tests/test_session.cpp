// Stores on their way to a file and back: the same cells bit for bit, other cells as rows, and nothing from a file that is not whole. A little over 500
// lines: its two halves share the helpers that make and read a session.
#include "cache/gear_codec.h"
#include "common/checksum.h"
#include "common/error.h"
#include "session/store_image.h"
#include "store_model.h"

#include <string>

using namespace store_test;

namespace {

constexpr int n_head = 2, d_head = 16, n_embd = n_head * d_head, tile = 16;

struct bytes_output final : output {
    void                 write(const void * data, size_t n) override { bytes.insert(bytes.end(), (const uint8_t *) data, (const uint8_t *) data + n); }
    std::vector<uint8_t> bytes;
};

struct bytes_input final : input {
    explicit bytes_input(std::vector<uint8_t> bytes) : bytes(std::move(bytes)) {}
    uint64_t size() const override { return bytes.size(); }
    void     read(uint64_t offset, void * data, size_t n) const override {
        CHECK(offset <= bytes.size() && n <= bytes.size() - offset);
        std::copy_n(bytes.begin() + offset, n, (uint8_t *) data);
    }
    std::vector<uint8_t> bytes;
};

std::shared_ptr<byte_codec> codec() {
    return std::make_shared<byte_codec>(tile, d_head);
}

store_shape shape_of(int64_t n_cell, int n_stream, int n_tail, int n_sink, int n_ubatch) {
    return { 3, GEAR_SIDE_V, n_head, d_head, n_cell, n_stream, tile, n_tail, n_sink, n_ubatch };
}

int below(std::mt19937 & random, int64_t n) {
    return (int) std::uniform_int_distribution<int64_t>(0, n - 1)(random);
}

void write(store & cache, const std::vector<int64_t> & cells, const std::vector<float> & rows) {
    bool ok = true;
    run_team(1, [&](const team & t) {
        ok = cache.write(t, cells.size(), { cells.data(), sizeof(int64_t), true }, { rows.data(), n_embd * sizeof(float), false });
    });
    CHECK(ok);
}

// Some rows anywhere, or in sequence, or none.
void random_step(std::mt19937 & random, const std::vector<store *> & caches) {
    const store_shape &  shape = caches[0]->shape();
    const int64_t        n_all = shape.n_cell * shape.n_stream;
    std::vector<int64_t> cells(1 + below(random, shape.n_ubatch));
    const int64_t        first = below(random, n_all);
    const bool           runs  = below(random, 3) > 0;
    for (size_t i = 0; i < cells.size(); ++i) {
        cells[i] = runs ? (first + i) % n_all : below(random, n_all);
    }
    const auto    rows     = random_rows(random, cells.size(), n_embd);
    const int     kind     = below(random, 10);
    const int64_t n_erased = 1 + below(random, shape.tile);
    for (store * cache : caches) {
        if (kind == 0) {
            cache->erase(std::min(first, n_all - n_erased), n_erased);
        } else {
            write(*cache, cells, rows);
        }
    }
}

std::vector<uint8_t> written(const store & cache) {
    const store_shape &  shape = cache.shape();
    std::vector<uint8_t> is_written(shape.n_cell * shape.n_stream);
    for (int64_t cell = 0; cell < (int64_t) is_written.size(); ++cell) {
        const tile_view view = cache.view((int) (cell / shape.n_cell), (int) (cell % shape.n_cell / shape.tile));
        const int       i    = (int) (cell % shape.n_cell % shape.tile);
        is_written[cell]     = view.slot[i] >= 0 || view.in_tile[i];
    }
    return is_written;
}

std::vector<cell_range> ranges_of(const std::vector<uint8_t> & live, int64_t n_cell) {
    std::vector<cell_range> ranges;
    uint64_t                offset = 100;
    for (int64_t cell = 0; cell < (int64_t) live.size(); ++cell) {
        if (!live[cell]) {
            continue;
        }
        if (ranges.empty() || ranges.back().cell + ranges.back().n != cell || cell % n_cell == 0) {
            ranges.push_back({ cell, 0, offset });
        }
        ++ranges.back().n;
        offset += n_embd * 2;
    }
    return ranges;
}

bytes_input saved(const store & cache, const tile_codec * codec, const std::vector<uint8_t> & live) {
    bytes_output      out;
    const store_image image = image_of(cache, codec, ranges_of(live, cache.shape().n_cell));
    write_head(out);
    write_section(out, section_kind::note, [](output & to) { to.put('n'); });
    write_section(out, section_kind::tensor, [&](output & to) { write_image(to, image, cache); });
    write_section(out, section_kind::end, [](output &) {});
    return bytes_input(out.bytes);
}

store_image image_in(const input & in) {
    const auto sections = check_sections(in);
    CHECK(sections.size() == 2 && sections[0].kind == section_kind::note && sections[0].size == 1 && sections[1].kind == section_kind::tensor);
    return read_image(in, sections[1]);
}

row_writer writer_to(store & cache) {
    return [&cache](int64_t n, const int64_t * cells, const uint16_t * rows) {
        const int64_t n_most = cache.shape().n_ubatch;
        for (int64_t i = 0; i < n; i += n_most) {
            bool ok = true;
            run_team(1, [&](const team & t) {
                ok = cache.write(t, std::min(n_most, n - i), { cells + i, sizeof(int64_t), true }, { rows + i * n_embd, n_embd * 2, true });
            });
            CHECK(ok);
        }
    };
}

std::vector<cell_move> to_same_cells(const store_image & image) {
    std::vector<cell_move> moves;
    for (const cell_range & range : image.ranges) {
        moves.push_back({ range.cell, range.n, range.cell });
    }
    return moves;
}

std::vector<uint16_t> row_of(const store & cache, int64_t cell) {
    std::vector<uint16_t> row(n_embd);
    cache.read(cell, 1, row.data());
    return row;
}

// Same cells written, same rows exact and in the same order, same bytes in the tiles.
bool same(const store & a, const store & b) {
    const store_shape & shape = a.shape();
    bool                ok    = written(a) == written(b);
    for (int stream = 0; stream < shape.n_stream; ++stream) {
        const auto x = a.exact_cells(stream), y = b.exact_cells(stream);
        ok &= x.size() == y.size() && a.clock(stream) == b.clock(stream);
        for (size_t i = 0; ok && i < x.size(); ++i) {
            ok &= x[i].cell == y[i].cell && x[i].written_at == y[i].written_at;
        }
        for (int i = 0; i < a.n_tile(); ++i) {
            const tile_view p = a.view(stream, i), q = b.view(stream, i);
            ok &= !p.packed == !q.packed && p.n_exact == q.n_exact && p.n_packed == q.n_packed && std::equal(p.in_tile, p.in_tile + p.n_token, q.in_tile);
            ok &= !p.packed || !q.packed || std::equal(p.packed, p.packed + n_head * a.tile_bytes(), q.packed);
        }
    }
    for (int64_t cell = 0; cell < shape.n_cell * shape.n_stream; ++cell) {
        ok &= row_of(a, cell) == row_of(b, cell);
    }
    return ok;
}

int n_tried = 0, n_refused_of_them = 0;

template <class F> std::string refusal(F && f) {
    ++n_tried;
    try {
        f();
    } catch (const error & e) {
        ++n_refused_of_them;
        CHECK(e.status == GEAR_ERROR_DATA);
        return e.what();
    }
    return "";
}

// ---------------------------------------------------------------------------------------------------------------------------------------------

// Restored to the same cells a store is what it was, and goes on as if nothing had happened.
void test_in_place() {
    std::mt19937 random(check::seed());
    for (int round = 0; round < 40; ++round) {
        const store_shape shape = shape_of(5 * tile + below(random, 40), 1 + below(random, 3), below(random, 30), below(random, 6), 1 + below(random, 24));
        const auto        coding = round % 8 == 0 ? nullptr : codec();
        store             cache(shape, coding), twin(shape, coding);
        for (int i = 0; i < 30; ++i) {
            random_step(random, { &cache });
        }
        if (round % 2) {
            run_team(2, [&](const team & t) { CHECK(cache.flush(t, true)); });
        }
        const bytes_input in    = saved(cache, coding.get(), written(cache));
        const store_image image = image_in(in);
        CHECK(restore_image(in, image, to_same_cells(image), &twin, coding.get(), writer_to(twin)) == 0);
        CHECK(same(cache, twin));
        for (int i = 0; i < 20; ++i) {
            random_step(random, { &cache, &twin });
        }
        CHECK(same(cache, twin));
        CHECK(saved(cache, coding.get(), written(cache)).bytes == saved(twin, coding.get(), written(twin)).bytes);
    }
}

// Cells that nobody uses any more are left out, whatever their tile still holds.
void test_freed_cells() {
    std::mt19937      random(check::seed());
    const store_shape shape  = shape_of(8 * tile, 1, 8, 2, 16);
    const auto        coding = codec();
    store             cache(shape, coding), twin(shape, coding);
    for (int64_t cell = 0; cell < 7 * tile; cell += 16) {
        write(cache, consecutive(cell, 16), random_rows(random, 16, n_embd));
    }
    std::vector<uint8_t> live = written(cache);
    std::fill(live.begin() + tile + 3, live.begin() + tile + 9, 0);
    std::fill(live.begin() + 3 * tile, live.begin() + 4 * tile, 0); // a whole tile
    std::fill(live.begin() + 7 * tile - 3, live.end(), 0);          // some of the tail
    const bytes_input in    = saved(cache, coding.get(), live);
    const store_image image = image_in(in);
    CHECK(restore_image(in, image, to_same_cells(image), &twin, coding.get(), writer_to(twin)) == 0);
    CHECK(written(twin) == live);
    for (int64_t cell = 0; cell < shape.n_cell; ++cell) {
        CHECK(row_of(twin, cell) == (live[cell] ? row_of(cache, cell) : std::vector<uint16_t>(n_embd)));
    }
    CHECK(in.bytes.size() < saved(cache, coding.get(), written(cache)).bytes.size() - n_head * coding->tile_bytes());
}

// llama.cpp closes gaps: tiles before the first one come back as they are, rows after it are written anew, and none is lost.
void test_moved_cells() {
    std::mt19937 random(check::seed());
    for (int round = 0; round < 30; ++round) {
        const store_shape shape   = shape_of(12 * tile, 2, below(random, 20), below(random, 5), 8);
        const store_shape smaller = shape_of(12 * tile - below(random, 20), 2, shape.n_tail, shape.n_sink, 1 + below(random, 8));
        const auto        coding = codec(), counting = codec();
        store             cache(shape, coding), target(smaller, counting);
        for (int64_t cell = 0; cell + 8 <= 10 * tile; cell += 8) {
            for (const int stream : { 0, 1 }) {
                write(cache, consecutive(stream * shape.n_cell + cell, 8), random_rows(random, 8, n_embd));
            }
        }
        std::vector<uint8_t> live = written(cache);
        for (int i = 0; i < 20; ++i) {
            live[below(random, live.size())] = 0;
        }
        const bytes_input      in    = saved(cache, coding.get(), live);
        const store_image      image = image_in(in);
        std::vector<cell_move> moves;
        std::vector<int64_t>   from; // of each cell of the target, in order
        int64_t                next[2] = { 0, smaller.n_cell };
        for (const cell_range & range : image.ranges) {
            int64_t & to = next[range.cell / shape.n_cell];
            moves.push_back({ range.cell, range.n, to });
            to += range.n;
        }
        std::vector<cell_move> shuffled = moves;
        std::shuffle(shuffled.begin(), shuffled.end(), random);
        const int64_t n_changed = restore_image(in, image, shuffled, &target, counting.get(), writer_to(target));
        CHECK(n_changed > 0);
        CHECK(counting->n_lost == 0);
        for (const cell_move & move : moves) {
            for (int64_t i = 0; i < move.n; ++i) {
                const std::vector<uint16_t> before = row_of(cache, move.from + i), after = row_of(target, move.to + i);
                for (int c = 0; c < n_embd; ++c) {
                    CHECK(after[c] == before[c] || after[c] == chopped(before[c]));
                }
            }
        }
        for (const int stream : { 0, 1 }) {
            for (int i = 0; i < target.n_tile(); ++i) { // before the first gap
                const tile_view was = cache.view(stream, i), is = target.view(stream, i);
                const auto      first = live.begin() + stream * shape.n_cell;
                if (std::find(first, first + (i + 1) * tile, 0) == first + (i + 1) * tile && was.packed && was.n_exact == 0) {
                    CHECK(is.packed && is.n_exact == 0 && std::equal(was.packed, was.packed + n_head * cache.tile_bytes(), is.packed));
                }
            }
        }
    }
}

// A sequence that comes back to another slot: its stream is what it was, bit for bit, and those beside it are left alone.
void test_other_stream() {
    std::mt19937 random(check::seed());
    for (int round = 0; round < 30; ++round) {
        const store_shape shape  = shape_of(5 * tile + below(random, 40), 3, below(random, 30), below(random, 6), 1 + below(random, 24));
        const auto        coding = codec();
        store             cache(shape, coding), target(shape, coding), beside(shape, coding);
        for (int i = 0; i < 40; ++i) {
            random_step(random, { &cache });
        }
        const int            from = below(random, 3), to = (from + 1 + below(random, 2)) % 3, other = 3 - from - to;
        std::vector<uint8_t> live = written(cache);
        for (int64_t cell = 0; cell < (int64_t) live.size(); ++cell) {
            live[cell] = live[cell] && cell / shape.n_cell == from;
        }
        const bytes_input      in    = saved(cache, coding.get(), live);
        const store_image      image = image_in(in);
        std::vector<cell_move> moves;
        for (const cell_range & range : image.ranges) {
            moves.push_back({ range.cell, range.n, range.cell + (to - from) * shape.n_cell });
        }
        // The other streams are in use, and the one that it goes to was.
        const std::vector<float> rows = random_rows(random, 16, n_embd);
        for (store * used : { &target, &beside }) {
            for (int64_t cell = 0; cell + 16 <= shape.n_cell; cell += 16) {
                for (const int stream : { from, other }) {
                    write(*used, consecutive(stream * shape.n_cell + cell, 16), rows);
                }
            }
        }
        write(target, consecutive(to * shape.n_cell, 16), rows);
        std::vector<uint8_t> others(live.size(), 1);
        std::fill_n(others.begin() + to * shape.n_cell, shape.n_cell, (uint8_t) 0);
        target.keep(others.data());
        CHECK(restore_image(in, image, moves, &target, coding.get(), writer_to(target)) == 0);
        for (int i = 0; i < target.n_tile(); ++i) {
            const tile_view was = cache.view(from, i), is = target.view(to, i);
            CHECK(!was.packed == !is.packed && was.n_exact == is.n_exact && was.n_packed == is.n_packed);
            CHECK(!was.packed || !is.packed || std::equal(was.packed, was.packed + n_head * cache.tile_bytes(), is.packed));
        }
        CHECK(target.clock(to) == cache.clock(from));
        for (int64_t cell = 0; cell < shape.n_cell; ++cell) {
            CHECK(row_of(target, to * shape.n_cell + cell) == row_of(cache, from * shape.n_cell + cell));
            for (const int stream : { from, other }) {
                CHECK(row_of(target, stream * shape.n_cell + cell) == row_of(beside, stream * shape.n_cell + cell));
            }
        }
    }
}

// A pool too small for the exact rows of the one that was saved, a cache that packs nothing, and one that is no store at all.
void test_other_targets() {
    std::mt19937      random(check::seed());
    const store_shape shape  = shape_of(10 * tile, 1, 8, 2, 4 * tile);
    const auto        coding = codec();
    store             cache(shape, coding);
    for (int64_t cell = 0; cell + 40 <= shape.n_cell; cell += 40) {
        write(cache, consecutive(cell, 40), random_rows(random, 40, n_embd));
    }
    const bytes_input in    = saved(cache, coding.get(), written(cache));
    const store_image image = image_in(in);

    store_shape few_rows = shape, tail_only = shape;
    few_rows.n_ubatch = 1;
    tail_only.n_tail  = shape.n_cell;
    std::vector<uint16_t> plain(shape.n_cell * n_embd);
    int64_t               n_plain  = 0;
    const row_writer      to_plain = [&](int64_t n, const int64_t * cells, const uint16_t * rows) {
        CHECK(n <= restore_batch);
        for (int64_t i = 0; i < n; ++i) {
            std::copy_n(rows + i * n_embd, n_embd, plain.begin() + cells[i] * n_embd);
        }
        n_plain += n;
    };
    store packing(few_rows, coding), exact(tail_only, coding);
    restore_image(in, image, to_same_cells(image), &packing, coding.get(), writer_to(packing));
    CHECK(restore_image(in, image, to_same_cells(image), &exact, coding.get(), writer_to(exact)) == cache.stats().n_packed);
    CHECK(restore_image(in, image, to_same_cells(image), nullptr, coding.get(), to_plain) == cache.stats().n_packed);
    CHECK(n_plain == cache.stats().n_written);
    for (int64_t cell = 0; cell < shape.n_cell; ++cell) {
        const std::vector<uint16_t> row = row_of(cache, cell), packed = row_of(packing, cell);
        CHECK(row_of(exact, cell) == row);
        CHECK(std::equal(row.begin(), row.end(), plain.begin() + cell * n_embd));
        for (int c = 0; c < n_embd; ++c) {
            CHECK(packed[c] == row[c] || packed[c] == chopped(row[c]));
        }
    }
}

void test_moves_must_cover() {
    std::mt19937      random(check::seed());
    const store_shape shape  = shape_of(4 * tile, 1, 8, 0, 16);
    const auto        coding = codec();
    store             cache(shape, coding), target(shape, coding);
    write(cache, consecutive(3, 16), random_rows(random, 16, n_embd));
    const bytes_input                         in      = saved(cache, coding.get(), written(cache));
    const store_image                         image   = image_in(in);
    const std::vector<std::vector<cell_move>> wrong[] = { { {} },
                                                          { { { 3, 15, 3 } } },
                                                          { { { 3, 17, 3 } } },
                                                          { { { 4, 15, 4 } } },
                                                          { { { 3, 16, 3 }, { 19, 1, 19 } } },
                                                          { { { 3, 8, 3 }, { 10, 9, 10 } } },
                                                          { { { 3, 16, 3 }, { 3, 16, 3 } } } };
    for (const auto & moves : wrong) {
        CHECK(refusal([&] { restore_image(in, image, moves[0], &target, coding.get(), writer_to(target)); }).find("llama.cpp") == 0);
        CHECK(target.stats().n_written == 0);
    }
}

void test_full_tiles_only() {
    std::mt19937      random(check::seed());
    const store_shape shape  = shape_of(20 * tile, 1, 8, 2, 16 * tile);
    const auto        coding = codec();
    store             cache(shape, coding);
    write(cache, consecutive(0, 4 * tile + 5), random_rows(random, 4 * tile + 5, n_embd));
    run_team(2, [&](const team & t) { CHECK(cache.flush(t, true)); });
    CHECK(coding->n_pack == 4 * n_head);
    CHECK(cache.stats().n_exact == 2 + 8); // sinks, and the tail that reaches into the last full tile
    const auto before = saved(cache, coding.get(), written(cache)).bytes;
    run_team(2, [&](const team & t) { CHECK(cache.flush(t, true)); });
    CHECK(coding->n_pack == 4 * n_head && saved(cache, coding.get(), written(cache)).bytes == before);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------

bytes_input small_session(const std::shared_ptr<byte_codec> & coding) {
    std::mt19937 random(check::seed());
    store        cache(shape_of(3 * tile, 1, 4, 1, 8), coding);
    for (int64_t cell = 0; cell < 2 * tile; cell += 8) {
        write(cache, consecutive(cell, 8), random_rows(random, 8, n_embd));
    }
    return saved(cache, coding.get(), written(cache));
}

void test_damage() {
    std::mt19937      random(check::seed());
    const bytes_input whole = small_session(codec());
    check_sections(whole);
    CHECK(check_first_section(whole).kind == section_kind::note);
    for (size_t n = 0; n < whole.bytes.size(); ++n) {
        CHECK(!refusal([&] { check_sections(bytes_input({ whole.bytes.begin(), whole.bytes.begin() + n })); }).empty());
        bytes_input flipped = whole;
        flipped.bytes[n] ^= 1 << below(random, 8);
        CHECK(!refusal([&] { check_sections(flipped); }).empty());
    }
    bytes_input longer = whole;
    longer.bytes.push_back(0);
    CHECK(refusal([&] { check_sections(longer); }) == "it is damaged: something follows its end");
    CHECK(refusal([&] { check_sections(bytes_input({})); }) == "it is not a gearcpp session");

    bytes_input newer = whole;
    newer.bytes[8]    = 99;
    CHECK(refusal([&] { check_sections(newer); }).find("damaged") != std::string::npos);
    const uint64_t sum = checksum_of(newer.bytes.data(), 16);
    memcpy(newer.bytes.data() + 16, &sum, sizeof sum);
    CHECK(refusal([&] { check_sections(newer); }).find("version 99") != std::string::npos);
    CHECK(refusal([&] { check_first_section(newer); }).find("version 99") != std::string::npos);
}

// Numbers that contradict each other under checksums that are right: refused, or at least harmless (this runs under AddressSanitizer, too).
void test_forged() {
    std::mt19937      random(check::seed());
    const auto        coding    = codec();
    const bytes_input whole     = small_session(coding);
    const section     found     = check_sections(whole)[1];
    const section     all       = { section_kind::tensor, 0, found.size };
    int               n_refused = 0;
    for (int round = 0; round < 5000; ++round) {
        bytes_input  forged({ whole.bytes.begin() + found.offset, whole.bytes.begin() + found.offset + found.size });
        const size_t n_table = 8 * 4 + 3 * 8 + 8 + 24 + 24 + 2 * 10 + 13 * 16;
        for (int i = 0; i <= below(random, 3); ++i) {
            const size_t at  = below(random, std::min(n_table, forged.bytes.size()));
            forged.bytes[at] = below(random, 2) ? (uint8_t) below(random, 256) : (uint8_t) (forged.bytes[at] ^ 1 << below(random, 8));
        }
        const std::string why = refusal([&] {
            const store_image image = read_image(forged, all);
            require_codec(image, coding.get());
            if (image.shape.n_head == n_head && image.shape.d_head == d_head && image.shape.tile == tile && image.shape.n_cell < 1000) {
                store target(shape_of(image.shape.n_cell, 1, 4, 1, 8), coding);
                restore_image(forged, image, to_same_cells(image), &target, coding.get(), [&](int64_t n, const int64_t * cells, const uint16_t * rows) {
                    if (std::all_of(cells, cells + n, [&](int64_t cell) { return cell < image.shape.n_cell; })) {
                        writer_to(target)(n, cells, rows);
                    }
                });
            }
        });
        n_refused += !why.empty();
    }
    CHECK(n_refused > 2500);

    bytes_input twice({ whole.bytes.begin() + found.offset, whole.bytes.begin() + found.offset + found.size });
    uint8_t *   stream = twice.bytes.data() + 8 * 4 + 3 * 8 + 8 + 24; // clock, tiles, exact rows, and their tables
    uint64_t    n_kept;
    memcpy(&n_kept, stream + 8, sizeof n_kept);
    uint8_t * exact = stream + 24 + n_kept * (8 + tile / 8);
    memcpy(exact + 16, exact, 8);
    CHECK(refusal([&] { read_image(twice, all); }).find("a cell has two exact rows") != std::string::npos);

    for (size_t n = 0; n < found.size; ++n) { // a payload that ends early
        CHECK(!refusal([&] { read_image(whole, { section_kind::tensor, found.offset, n }); }).empty());
    }
}

void test_formats() {
    const auto config_of = [](int bits, float sparsity, int rotate) {
        const gear_side_config side = { bits, 32, 8, 0, 8, 1, rotate, 0, sparsity, 1.0f };
        return gear_config{ side, side, 64, 32, 4, 1 };
    };
    const gear_tile_codec a(config_of(4, 0, 0), GEAR_SIDE_K, 64), b(config_of(4, 0, 0), GEAR_SIDE_K, 64), bits(config_of(3, 0, 0), GEAR_SIDE_K, 64),
        rotated(config_of(4, 0, 1), GEAR_SIDE_K, 64), side(config_of(4, 0, 0), GEAR_SIDE_V, 64), sparse(config_of(4, 0.05f, 0), GEAR_SIDE_K, 64);
    CHECK(a.format() == b.format());
    const uint64_t others[] = { bits.format(), rotated.format(), side.format(), sparse.format(), codec()->format(), 0, 1 };
    for (const uint64_t other : others) {
        CHECK(a.format() != other);
    }

    // outliers of K are tokens of a tile of 64
    const gear_tile_layout & part = sparse.layout().part;
    std::vector<uint8_t>     bytes(part.bytes, 63);
    CHECK(part.n_outlier > 0 && sparse.is_sound(bytes.data()));
    bytes[part.outlier_index + (int64_t) part.n_vector * part.n_outlier - 1] = 64;
    CHECK(!sparse.is_sound(bytes.data()));
    bytes.assign(bytes.size(), 255);
    CHECK(a.is_sound(bytes.data()));

    store_image image = {};
    image.tile_bytes  = a.tile_bytes();
    image.format      = a.format();
    require_codec(image, &b);
    CHECK(refusal([&] { require_codec(image, &rotated); }).find("another cache configuration") != std::string::npos);
    CHECK(refusal([&] { require_codec(image, nullptr); }).find("another cache configuration") != std::string::npos);
}

// Published values of XXH64 with seed 0, and others of its reference implementation; the same however the bytes are cut.
void test_checksum() {
    CHECK(checksum_of("", 0) == 0xef46db3751d8e999);
    CHECK(checksum_of("abc", 3) == 0x44bc2cf5ad770999);
    std::vector<uint8_t> bytes(1000);
    for (size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = (uint8_t) (i * 7);
    }
    const std::pair<size_t, uint64_t> known[] = {
        { 31, 0x0f187c62b1e722b7 }, { 32, 0x91b0cb0931a8c629 }, { 33, 0x931b043cf8d65b94 }, { 63, 0x219110bf13e2fa26 }, { 1000, 0x25275608a9cfc168 }
    };
    std::mt19937 random(check::seed());
    for (const auto & [n, value] : known) {
        CHECK(checksum_of(bytes.data(), n) == value);
        checksum sum;
        for (size_t i = 0, n_now = 0; i < n; i += n_now) {
            n_now = std::min<size_t>(n - i, below(random, 50));
            sum.add(bytes.data() + i, n_now);
        }
        CHECK(sum.value() == value);
    }
}

} // namespace

int main() {
    test_checksum();
    test_in_place();
    test_freed_cells();
    test_moved_cells();
    test_other_stream();
    test_other_targets();
    test_moves_must_cover();
    test_full_tiles_only();
    test_damage();
    test_forged();
    test_formats();
    printf("%d things that are wrong with a session, %d refused\n", n_tried, n_refused_of_them);
    return check::finish();
}
