// arguments.h - what the kernels are given: plain structures, passed by value.
#pragma once

#include "codec/tile.h"

namespace gear::cuda {

// What a table of slots says of a cell: the slot of its exact row, or one of these.
constexpr int32_t slot_absent = -1; // never written: zeros
constexpr int32_t slot_packed = -2; // its tile holds it

// One side (K or V) of one layer in device memory.
struct device_side {
    tile_layout     layout;    // bits 16: every row is exact, and there are no tiles; n_token, d_head and side hold all the same
    uint8_t *       tiles;     // [n_stream, n_tile, n_head, layout.part.bytes]
    uint16_t *      pool;      // f16 [n_stream, n_row, n_head, d_head]
    const int32_t * slot;      // [n_stream, n_cell] slot of the cell's exact row in its stream's pool, or slot_absent or slot_packed
    const uint8_t * basis;     // [n_head, d_head / 2] weights of the channels that tiles are packed with (codec/basis.h), for `rotate` 2 only
    int32_t         n_head;    // KV heads
    int32_t         n_cell;    // of a stream
    int32_t         n_tile;    // of a stream
    int32_t         n_row;     // of a stream
    bool            has_tiles; //
};

// Rows on their way into the pool; K and V of a layer go together.
struct write_side {
    const void * rows;    // row i at rows + i * stride bytes, n_embd elements of f32 or f16
    int64_t      stride;  //
    bool         is_half; //
    uint16_t *   pool;    //
    int32_t      n_embd;  //
};

struct write_arguments {
    write_side      side[2];
    int32_t         n_side;
    int32_t         n;       // rows
    const int32_t * slot[2]; // [n] of all streams (stream * n_row + slot), -1: another row of this write goes to the same cell
};

// Changes of a table of slots: slot[index[i]] = value[i]
struct slot_arguments {
    int32_t *       slot;
    const int32_t * index;
    const int32_t * value;
    int32_t         n;
};

// A tile to be packed, for all heads.
struct pack_job {
    int32_t stream;
    int32_t tile;
};

struct pack_arguments {
    device_side      side;
    uint32_t         seed;
    const pack_job * jobs;    // [n_job]
    const int32_t *  source;  // [n_job, n_token] slot of the exact row; slot_absent: not to be coded; slot_packed: stays as the tile has it
    int32_t          n_job;   //
    uint8_t *        scratch; // [blocks, pack_scratch]
};

struct unpack_arguments {
    device_side side;
    int32_t     stream;
    int32_t     first; // cell
    int32_t     n;     // cells
    uint16_t *  rows;  // f16 [n, n_head, d_head]
};

// The squares of the queries that each KV head meets, added up by channel (codec/basis.h).
struct observe_arguments {
    gear_attention_params params;    // q is the device's
    double *              square;    // [n_head_kv, d_head]
    int32_t               n_head_kv; //
    int32_t               d_head;    //
};

// Sums over the rows of a head that packs coded anew, of what became of them (head_error of store/store.h).
struct error_sums {
    double n_row, squares, of, n_score, scores;
};

// The rows that a pack was given, as they are in the pool, against the tiles that it made of them.
struct measure_arguments {
    device_side      side;   //
    const pack_job * jobs;   // [n_job]
    const int32_t *  source; // [n_job, n_token] as pack_arguments has it
    int32_t          n_job;  //
    const double *   weight; // [n_head, d_head] what a squared error of a channel counts in a score; nullptr: not known, as is a head with one below 0
    error_sums *     fresh;  // [n_job, n_head] scratch
    error_sums *     sums;   // [n_head] are added to
};

struct attend_arguments {
    gear_attention_params params; // pointers are the device's
    device_side           k, v;
    int32_t               n_share;        // query heads of a KV head
    int32_t               n_tile;         // that n_kv reaches into
    int32_t               tiles_of_split; // decode: a block's tiles
    int32_t               n_split;        //
    int32_t               out_stride;     // floats of a row of partials: 2 + d_v, rounded up to 4
    float *               partial;        // [n_stream, n_head, n_query, n_split, out_stride] max, sum, output not yet divided
};

} // namespace gear::cuda
