// store.h - one side (K or V) of one layer's KV cache: packed tiles plus a bounded pool of exact f16 rows. This room knows cells, tiles and rows; it knows
// no bits (a tile_codec packs and unpacks) and no ggml.
//
// Every cell of a stream is in one of these states:
//     unwritten   reads as zeros (llama.cpp clears its cache)
//     exact       an f16 row of the pool holds it; a packed tile may lie under it, whose bytes for this cell are then stale
//     packed      only the packed tile holds it
// Exact are: rows just written, the last n_tail rows written, the first n_sink cells of the stream, and all rows of the write in progress. When a write
// needs room, the coldest tile (the one whose newest exact row is oldest; full tiles first) is packed: its exact rows, together with what its old packed
// form holds of the other cells. Rows in the tail keep their exact row over the packed tile and leave it later at no cost; sinks are not packed at all, so
// that their extreme values do not widen the ranges of their neighbours. A tile is thus encoded again only when rows written over it are evicted.
//
// What packing does to the rows of a head is measured where a tile is packed, while its rows are still there. Where that is beyond a bound
// (most_error), the side packs no more: its pool grows to hold a row of every cell.
//
// Tile i of a stream lies at a fixed offset; everything is allocated by the constructor, except that a write of more rows than the pool was made for
// enlarges the pool once, and that a thread makes its scratch when it first packs or unpacks. Reads and writes never allocate otherwise.
//
// Threads: write() and flush() are called by all threads of a team together. Everything else is called by one thread while nothing writes.
#pragma once

#include "common/error.h"
#include "common/memory.h"
#include "common/team.h"
#include "gearcpp.h"
#include "store/store_parts.h"
#include "store/stream.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace gear {

// All that the store knows about a codec. pack and unpack are called from several threads at once, each with scratch of its own.
class tile_codec {
  public:
    virtual ~tile_codec()                = default;
    virtual size_t tile_bytes() const    = 0; // of one head's tile, a multiple of 64
    virtual size_t scratch_bytes() const = 0; // of one pack or unpack
    // x f32 [T, d_head], written u8 [T], first_cell: global cell of the tile's first row. false: the codec failed (only a callback codec can).
    virtual bool   pack(int head, int64_t first_cell, const float * x, const uint8_t * written, uint8_t * tile, void * scratch) const = 0;
    virtual void   unpack(const uint8_t * tile, float * x, void * scratch) const                                                      = 0;
    // Pack again a tile that holds kept rows (kept u8 [T]) besides new ones; x of a kept row is what unpack gave for it. A codec that can leaves them as
    // they are, so that neighbours that are written again and again do not wear them down; by default they are coded like any other row.
    virtual bool repack(int head, int64_t first_cell, const float * x, const uint8_t * written, const uint8_t * kept, const uint8_t * old, uint8_t * tile,
                        void * scratch) const {
        (void) kept, (void) old;
        return pack(head, first_cell, x, written, tile, scratch);
    }
    // A codec may fit itself to a store: learn() sees a tile before the first one is packed, adopt() a packed one that comes from elsewhere; forget() is
    // an emptied store. One thread calls them while nothing packs.
    virtual bool wants_to_learn(int head) const {
        (void) head;
        return false;
    }
    virtual void                 learn(int head, const float * x, const uint8_t * written) const { (void) head, (void) x, (void) written; }
    virtual void                 adopt(int head, const uint8_t * tile) const { (void) head, (void) tile; }
    // For a session: what else than tiles tell it has learned, and the same back, where nothing is learned yet. false: it is not of this codec.
    virtual std::vector<uint8_t> learned() const { return {}; }
    virtual bool                 learn_again(const std::vector<uint8_t> & bytes) const { return bytes.empty(); }
    virtual void                 forget() const {}
    virtual size_t               learned_bytes() const { return 0; } // that it holds for that
    // Whether rows are worth comparing with what became of them, and what a squared error of a channel then counts: f64 [d_head], so that the sum over a
    // row of K is the mean square of its scores' errors, in nats; nullptr: not known.
    virtual bool                 measures_error() const { return false; }
    virtual const double *       score_weights(int head) const {
        (void) head;
        return nullptr;
    }
    // Where it knows what queries make of two channels' errors together, that is asked instead: the mean square of a score's error, for the error
    // e f32 [d_head] of a row.
    virtual bool knows_pairs(int head) const {
        (void) head;
        return false;
    }
    virtual double score_square(int head, const float * e) const {
        (void) head, (void) e;
        return 0;
    }
    // What tells tiles that this codec can unpack from others: a session is refused unless it agrees.
    virtual uint64_t format() const { return 0; }
    // Whether a tile that comes from outside can be read without reading past it, whatever its numbers are.
    virtual bool     is_sound(const uint8_t * tile) const {
        (void) tile;
        return true;
    }
};

struct store_shape {
    int       il;
    gear_side side;
    int       n_head; // KV heads
    int       d_head; //
    int64_t   n_cell; // of a stream; need not be a multiple of tile
    int       n_stream;
    int       tile;
    int       n_tail;
    int       n_sink;
    int       n_ubatch; // most rows of one write

    int n_embd() const { return n_head * d_head; } // elements of a row
};

// Rows handed to write(): row i starts at data + i * stride, n_embd elements of f32 or f16.
struct row_source {
    const void * data;
    size_t       stride;
    bool         is_half;
};

// Cells handed to write(): global (stream * n_cell + cell), i32 or i64.
struct cell_source {
    const void * data;
    size_t       stride;
    bool         is_wide;

    int64_t at(int64_t i) const {
        const char * from = (const char *) data + i * stride;
        if (is_wide) {
            int64_t cell;
            memcpy(&cell, from, sizeof cell);
            return cell;
        }
        int32_t cell;
        memcpy(&cell, from, sizeof cell);
        return cell;
    }
};

// One tile as attention reads it.
struct tile_view {
    const uint8_t * packed;   // head h at packed + h * tile_bytes; nullptr: nothing packed
    const int32_t * slot;     // [T] exact row of each cell, -1: none. Stops at n_cell in a stream's last tile.
    const uint8_t * in_tile;  // [T] 1: the packed tile holds this cell's row (an exact row, where there is one, comes first)
    int             n_token;  // cells of this tile, T but for the last tile of a stream
    int             n_exact;  // cells with an exact row
    int             n_packed; // cells read from the packed tile
};

// Sums over the rows of a head that were packed, of what packing did to them.
struct head_error {
    int64_t n_row   = 0; //
    double  squares = 0; // of the error's numbers
    double  of      = 0; // of the numbers themselves
    int64_t n_score = 0; // rows whose scores' errors are known: K's, when queries were met
    double  scores  = 0; // mean squares of their errors, in nats

    void add(const head_error & other) {
        n_row += other.n_row;
        squares += other.squares;
        of += other.of;
        n_score += other.n_score;
        scores += other.scores;
    }

    // Root mean square. The first is a share of the rows' own size. NaN: nothing is known
    double relative() const { return n_row > 0 && of > 0 ? std::sqrt(squares / of) : std::numeric_limits<double>::quiet_NaN(); }
    double score() const { return n_score > 0 ? std::sqrt(scores / (double) n_score) : std::numeric_limits<double>::quiet_NaN(); }
    double root(gear_side side) const { return side == GEAR_SIDE_K ? score() : relative(); }
};

// error, score_error, worst_error and worst_head of what packing did to the heads of stats.side; none measured: as where nothing is known.
void describe_errors(const std::vector<head_error> & heads, gear_store_stats & stats);

// A cell of a stream that has an exact row, and when it was written by the stream's clock, which counts the rows written.
struct exact_cell {
    int64_t cell;
    int64_t written_at; // from 1 on
};

class store {
  public:
    // codec nullptr: every cell has an exact row (a side kept as f16). Throws gear::error when memory is short, before touching it.
    store(const store_shape & shape, std::shared_ptr<const tile_codec> codec);
    store(const store &)             = delete;
    store & operator=(const store &) = delete;

    const store_shape & shape() const { return shape_; }
    size_t              tile_bytes() const { return codec_ ? codec_->tile_bytes() : 0; }
    int                 n_tile() const { return n_tile_; } // of a stream

    // Memory that a store of this shape takes, without making one: what the plugin tells llama.cpp.   tile_bytes: of a head's tile, 0: none are packed
    static size_t bytes(const store_shape & shape, size_t tile_bytes);
    // Scratch of one thread while it packs or unpacks. It belongs to the thread and serves every store, so it counts once for a team, not once a store.
    size_t        scratch_bytes() const;

    // Write n rows. Cells out of range are an error. All threads of the team call it with the same arguments; false on all of them when the write failed
    // (message() says why). No exception leaves.
    bool         write(const team & t, int64_t n, const cell_source & cells, const row_source & rows);
    // Pack every tile that has exact rows outside tail and sinks. full_only: only tiles of which every cell is written, whose rows would be packed
    // together and just so later; the last, partly filled one is left to fill up.
    bool         flush(const team & t, bool full_only = false);
    // Why the last write or flush that failed did.
    gear_status  status() const { return failure_.status; }
    const char * message() const { return failure_.text; }

    // Rows cell .. cell + n - 1 (global) as f16 [n, n_embd]; unwritten cells as zeros.
    void read(int64_t cell, int64_t n, uint16_t * rows) const;
    // The cells become unwritten.
    void erase(int64_t cell, int64_t n);
    // The cells without a mark become unwritten, and the others as if those had never been: a row is as old as the marked rows written after it say. A
    // stream without a marked row is a new one.
    //   marked u8 [n_stream * n_cell]
    void keep(const uint8_t * marked);
    // All cells of stream `from` become those of stream `to`; packed tiles are copied bit for bit. Also between two stores of the same shape and codec.
    void copy_stream(int from, const store & source, int to);
    void clear();

    // Rewrite rows in place (the K-shift): for each tile with a marked cell, f gets its rows as f16 [n_token, n_embd] and the tile's first global cell and
    // changes the marked ones; exact rows stay exact, packed ones are packed again. Tiles without a marked cell are not touched.
    //   marked u8 [n_stream * n_cell]
    using rewrite = std::function<void(int64_t first_cell, int n_token, uint16_t * rows)>;
    void update(const uint8_t * marked, const rewrite & f);

    // Parts of a session: what the cells of a stream are made of, so that they can be made the same again. view() and row() show the rest.
    bool                    has_tiles() const;             // false: every cell has an exact row
    int64_t                 room(int stream) const;        // exact rows to be had without packing
    int64_t                 clock(int stream) const;       // rows written so far
    std::vector<exact_cell> exact_cells(int stream) const; // oldest first
    // A packed tile as it was. Nothing may be in it yet.   in_tile u8 [T]: the cells that it holds; heads [n_head, tile_bytes]
    void                    put_tile(int stream, int tile, const uint8_t * in_tile, const uint8_t * heads);
    // An exact row as it was, in a cell without one; there must be room.   row f16 [n_embd]
    void                    put_row(int stream, const exact_cell & cell, const uint16_t * row);
    void                    put_clock(int stream, int64_t clock);
    // Goes on with what another store measured; [n_head], or nothing. That one decides whether the side stays exact: this store only measures.
    void                    put_errors(const std::vector<head_error> & heads);

    const std::vector<head_error> & errors() const { return errors_; } // [n_head] since the store was empty; nothing if the codec wants none

    // For attention.
    tile_view        view(int stream, int tile) const;
    const uint16_t * row(int stream, int32_t slot) const { return row_data(stream, slot); } // f16 [n_embd]

    gear_store_stats stats() const;
    // True once, after the write in which the side began to stay exact, or could not for lack of memory (stats() says which).
    bool             has_news();

  private:
    uint8_t * tile_data(int stream, int64_t tile, int head) const {
        return tiles_.data() + (((size_t) stream * n_tile_ + tile) * shape_.n_head + head) * tile_bytes();
    }
    uint16_t * row_data(int stream, int64_t slot) const { return (uint16_t *) pool_.data() + ((size_t) stream * n_row_ + slot) * shape_.n_embd(); }
    int64_t    first_cell(int64_t tile) const { return tile * shape_.tile; }
    int        n_token(int64_t tile) const { return (int) std::min<int64_t>(shape_.tile, shape_.n_cell - first_cell(tile)); }
    void       require_range(int64_t cell, int64_t n, const char * what) const;

    // Eviction (eviction.cpp).
    pack_scratch scratch() const;
    bool         may_leave(const stream_state & stream, const exact_row & row) const;
    void         find_candidates(stream_state & stream);
    void         choose_victims(int stream);
    void         pack_victims(const team & t);
    void         release_victims();
    bool         encode(int stream, int64_t tile, int head, const uint8_t * marked, const uint16_t * changed, uint8_t * target) const;
    head_error   measure(int stream, int64_t tile, int head, const uint8_t * packed) const;
    void         note_errors();
    void         load_head(int stream, int64_t tile, int head, const uint8_t * marked, const uint16_t * changed, const pack_scratch & parts) const;
    void         teach(int stream, int64_t tile, const uint8_t * marked, const uint16_t * changed) const;
    void         adopt(int stream, int64_t tile) const;
    void         mark_packed(int stream, int64_t tile);

    // Writing (write.cpp).
    bool              is_covered(const team & t, int64_t n) const;
    int64_t           first_invalid(int64_t n, const cell_source & cells) const;
    [[noreturn]] void refuse(int64_t n, const cell_source & cells, int64_t invalid) const;
    void              plan(int nth, int64_t n, const cell_source & cells);
    void              plan_flush(bool full_only);
    void              assign_rows(int64_t n, const cell_source & cells);
    void              grant_allowance();
    void              copy_rows(int64_t first, int64_t last, const cell_source & cells, const row_source & rows);
    void              enlarge_pool(int64_t n_ubatch);
    void              resize_pool(int64_t n_row);
    void              try_to_stay_exact();
    void              forget();

    void                                     report(gear_status kind, const char * text);
    template <class F> void                  attempt(F && f);
    template <class Plan, class Commit> bool together(const team & t, Plan && plan, Commit && commit);

    // Reading and rewriting.
    void read_tile(int stream, int64_t tile, int first, int last, uint16_t * rows) const;
    void rewrite_tile(int stream, int64_t tile, const uint8_t * marked, const rewrite & f);

    store_shape                       shape_;
    std::shared_ptr<const tile_codec> codec_;
    int                               n_tile_;     // of a stream
    int64_t                           n_row_;      // exact rows of a stream
    int64_t                           n_row_most_; // rows of one write that are sure to find room
    mapping                           tiles_;      // [n_stream, n_tile, n_head, tile_bytes]
    mapping                           pool_;       // f16 [n_stream, n_row, n_embd]
    std::vector<stream_state>         streams_;
    bool                              is_empty_ = true; // as clear() leaves it
    int64_t                           n_pack_   = 0;
    int64_t                           n_write_  = 0; // number of the write in progress

    // What packing did to the rows.
    enum class outlook { packs, should_stay_exact, stays_exact, cannot_stay_exact };
    std::vector<head_error> errors_;       // [n_head] since the store was empty
    std::vector<head_error> fresh_errors_; // [n_measured, n_head] of the write in progress
    outlook                 outlook_  = outlook::packs;
    bool                    has_news_ = false;

    // Eviction.
    std::vector<int32_t>   candidate_of_; // [n_tile] index in candidates, -1: none
    std::vector<candidate> candidates_;
    std::vector<victim>    victims_;

    // The team. A thread whose allowance covers a write knows, without asking the others, that it will need no room; all threads count alike.
    std::vector<allowance> allowances_;        // [nth]
    int                    allowance_nth_ = 0; // team for which they hold, 0: none
    int64_t                granted_       = 0; // allowance that the write in progress ends with

    std::atomic<bool> failed_{ false };
    std::mutex        message_lock_;
    kept_error        failure_;
};

// What a thread of the team does must not throw past the others.
template <class F> void store::attempt(F && f) {
    try {
        f();
    } catch (const std::bad_alloc &) {
        report(GEAR_ERROR_MEMORY, "not enough memory for a write");
    } catch (const error & e) {
        report(e.status, e.what());
    } catch (const std::exception & e) {
        report(GEAR_ERROR_INTERNAL, e.what());
    }
}

} // namespace gear
