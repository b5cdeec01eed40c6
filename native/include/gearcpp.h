// gearcpp.h - the public C interface of the gearcpp native library.
//
// This is the contract between the native library and everything that uses it: the Python package (through cffi), the tests and the benchmarks.
// Everything between the two "cdef" marks is plain C declarations without preprocessor lines, because cffi reads it as it stands.
//
// Names follow the paper (GEAR, arXiv 2403.05527): X ~ D + L + S, where D is quantized, L = A B^T is a low-rank model of its error per head and S
// are a few outliers kept exactly. A *tile* is T consecutive cells of one KV head of one layer: T x d_head numbers, for K and for V apart.
// A *cell* is llama.cpp's word for one place in its KV cache; cells are not positions.
//
// Calls that can fail return a gear_status; gear_last_error() then says what was wrong and what to do, for the calling thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define GEAR_API __declspec(dllexport)
#else
#    define GEAR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// cdef begin

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Errors
// ---------------------------------------------------------------------------------------------------------------------------------------------

typedef enum gear_status {
    GEAR_OK                = 0,
    GEAR_ERROR_INVALID     = 1, // an argument or a configuration out of range
    GEAR_ERROR_UNSUPPORTED = 2, // a shape, model or operation that GEAR does not cover
    GEAR_ERROR_MEMORY      = 3, // not enough memory
    GEAR_ERROR_ABI         = 4, // the ggml at hand does not look as this library expects
    GEAR_ERROR_DATA        = 5, // stored data are damaged, foreign or of another configuration
    GEAR_ERROR_CALLBACK    = 6, // a codec callback failed
    GEAR_ERROR_INTERNAL    = 7, // a defect of this library
} gear_status;

// The message of the last failed call on this thread, or "" when there was none. Never NULL; valid until the thread's next failing call.
GEAR_API const char * gear_last_error(void);
// What kind of failure that was, for the calls that return NULL; GEAR_OK when there was none.
GEAR_API gear_status  gear_last_status(void);

// Memory that new allocations can have without swapping, in bytes, or INT64_MAX where the system does not say. Limits of Linux's control groups (a
// container's) are looked at, too.
GEAR_API int64_t gear_available_memory(void);

// Version of this library, such as "0.1.0".
GEAR_API const char * gear_version(void);

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Configuration
// ---------------------------------------------------------------------------------------------------------------------------------------------

typedef enum gear_side {
    GEAR_SIDE_K = 0,
    GEAR_SIDE_V = 1,
} gear_side;

// How one side (K or V) of a tile is coded.
typedef struct gear_side_config {
    int32_t bits;        // bits of a code of D: 2 to 7; 16 keeps this side as f16
    int32_t group;       // K: tokens that share a scale and zero in a channel; V: channels that share them in a token; 0: the tile / the head
    int32_t scale_bits;  // 8: scale and zero in 8 bits each against the extremes of their channels in the tile; 16: both f16
    int32_t rank;        // r of L, 0 to 16; 0: no L
    int32_t factor_bits; // bits of an entry of A and B: 8 or 4
    int32_t rounds;      // alternating rounds D = Q(X - L), L = lowrank(X - D); 1 is the paper's GEAR
    int32_t rotate;      // over the head's channels before coding, undone on the query side. 0: none; 1: Hadamard; 2: weights chosen for each head, then
                         // Hadamard (native/codec/basis.h)
    int32_t center;      // 1: each channel's mean over the tile is taken out before coding and kept as f16; not together with S
    float   sparsity;    // s of S: share of each vector kept exactly, half at the top, half at the bottom; 0: no S
    float   clip;        // shrink each group's range about its middle to this share before coding, (0, 1]; 1: no clipping
    int32_t feedback;    // K: 1: round for the error of scores, as the queries met say (native/codec/feedback.h); not together with L, S or M, nor on
                         // a GPU. 2: where it can be. 0: never
} gear_side_config;

typedef struct gear_config {
    gear_side_config k;
    gear_side_config v;
    int32_t          tile;   // T: cells of a tile; 64, 128 or 256
    int32_t          n_tail; // the last rows written that stay exact, at least
    int32_t          n_sink; // the first cells of a stream that stay exact always
    uint32_t         seed;   // of the power iteration's start
} gear_config;

// The default preset, as GearConfig() in Python.
GEAR_API gear_config gear_config_default(void);

// GEAR_OK, or GEAR_ERROR_INVALID with the reason.
GEAR_API gear_status gear_config_check(const gear_config * config);

// GEAR_OK if heads of this size can be packed (d_head a multiple of 16, 32 to 576), else GEAR_ERROR_UNSUPPORTED with the reason.
GEAR_API gear_status gear_head_check(const gear_config * config, int32_t d_head_k, int32_t d_head_v);

// One layer with a KV cache, as the model's metadata tell it.
typedef struct gear_layer {
    int32_t il;        // layer index as in the cache tensor's name (cache_k_l<il>)
    int32_t n_head_kv; // KV heads
    int32_t d_head_k;  // channels of a K head
    int32_t d_head_v;  // channels of a V head; 0 on a device: latent attention (MLA), V is the first channels of K
} gear_layer;

// What one side of a layer takes in host memory when llama.cpp makes it with n_cell cells for each of n_stream streams, and n_ubatch rows are written at
// once at most: a prediction, nothing is made. kind (may be NULL): what it becomes, as in gear_store_stats. -1: see gear_last_error.
GEAR_API int64_t gear_side_bytes(const gear_config * config, const gear_layer * layer, gear_side side, int64_t n_cell, int32_t n_stream, int32_t n_ubatch,
                                 int32_t * kind);

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The codec alone: one tile in memory
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Where the parts of a packed tile lie: byte offsets from its start, -1 for a part that it does not have. See native/codec/tile.h.
typedef struct gear_tile_layout {
    int64_t bytes;         // the whole tile, everything in it, a multiple of 64
    int64_t plane[3];      // bit planes of 4, 2 and 1 bits of the codes
    int64_t lo;            // f16  [n_set]            lowest value of each channel set in the tile (scale_bits 8)
    int64_t hi;            // f16  [n_set]            highest value
    int64_t scale;         // u8 or f16 [n_group]     K: [T/group][d], V: [n_set][T]
    int64_t zero;          // u8 or f16 [n_group]
    int64_t sigma;         // f32  [r]                scale of each column of L
    int64_t a;             // s8 or 4 bits [r][T]
    int64_t b;             // s8 or 4 bits [r][d]
    int64_t mean;          // f16  [d]
    int64_t basis;         // u4   [d]                weights of the channels (rotate 2)
    int64_t outlier_value; // f16  [n_vector][n_outlier]
    int64_t outlier_index; // u8, or u16 where vectors have more than 256 entries   [n_vector][n_outlier]
    int32_t n_lane;        // lanes of the code planes: K: T; V: d rounded up to 32
    int32_t n_depth;       // depth of the code planes: K: d; V: T
    int32_t n_set;         // K: d; V: number of channel groups
    int32_t n_group;       // scales (and zeros) in the tile
    int32_t n_vector;      // vectors that outliers are taken from: K: d channels; V: T tokens
    int32_t n_outlier;     // outliers of each vector, both sides together
} gear_tile_layout;

GEAR_API gear_status gear_tile_describe(const gear_config * config, gear_side side, int32_t d_head, gear_tile_layout * layout);

// Pack T rows of one head at the kernel level in use (gear_simd_select; "scalar" is the reference). With r = 0 all levels give the same bytes; with
// L they agree to the rounding of the power iteration's sums.
//   x       f32 [T, d_head], row-major
//   written u8 [T]: 1 where the cell has a row; cells with 0 do not influence the others. NULL: all written.
//   tile    gear_tile_layout.bytes bytes, 64-byte aligned
GEAR_API gear_status gear_tile_pack(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written, void * tile);

// The weights that rotate = 2 gives to heads such as x f32 [T, d_head], if query_square f64 [d_head] is the mean square of their queries' channels (NULL:
// not known).   basis u8 [d_head / 2], see native/codec/basis.h
GEAR_API gear_status gear_basis_choose(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written,
                                       const double * query_square, uint8_t * basis);

// As gear_tile_pack, in a basis chosen before (rotate 2). gear_tile_pack chooses by the tile alone.
GEAR_API gear_status gear_tile_pack_in_basis(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written,
                                             const uint8_t * basis, void * tile);

// As gear_tile_pack, for keys whose queries are known: roundings are chosen for the error of scores (native/codec/feedback.h). The tile is read
// like any other. GEAR_ERROR_INVALID for V, and for configurations with L, S or M on this side.
//   basis u8 [d_head / 2]: with rotate = 2, NULL: chosen by the tile alone   query_moment f64 [d_head, d_head]: mean of q q^T
GEAR_API gear_status gear_tile_pack_for_queries(const gear_config * config, gear_side side, int32_t d_head, const float * x, const uint8_t * written,
                                                const uint8_t * basis, const double * query_moment, void * tile);

// X^ = M + D + L with S restored exactly.   x f32 [T, d_head]
GEAR_API gear_status gear_tile_unpack(const gear_config * config, gear_side side, int32_t d_head, const void * tile, float * x);

// The parts of a packed tile as plain numbers, for tests and the torch reference. Any pointer may be NULL.
//   codes u8 [T, d]   scale, zero f32 [n_group] in the tile's order   a f32 [T, r]   b f32 [d, r] (sigma folded into a)
//   mean f32 [d] (zeros without `center`)   outlier_value f32 [n_vector, n_outlier]   outlier_index i32 [n_vector, n_outlier]
GEAR_API gear_status gear_tile_parts(const gear_config * config, gear_side side, int32_t d_head, const void * tile, uint8_t * codes, float * scale,
                                     float * zero, float * a, float * b, float * mean, float * outlier_value, int32_t * outlier_index);

// Kernel levels that this machine can run, best first: "avx512vnni", "avx2", "neon", "scalar". NULL past the end.
GEAR_API const char * gear_simd_name(int32_t i);
// Level in use, and a way to force one by name (NULL or "": best). The environment variable GEARCPP_SIMD does the same at load.
GEAR_API const char * gear_simd_current(void);
GEAR_API gear_status  gear_simd_select(const char * name);

// "" when this build has CUDA kernels and a GPU that they can use, else what is missing and what to do about it. Valid until the thread's next call.
GEAR_API const char * gear_cuda_problem(void);

// ---------------------------------------------------------------------------------------------------------------------------------------------
// One layer's cache without llama.cpp: for tests and micro-benchmarks
// ---------------------------------------------------------------------------------------------------------------------------------------------

typedef struct gear_cache gear_cache; // K and V store of one layer

typedef struct gear_cache_params {
    gear_config config;
    gear_layer  layer;
    int32_t     n_cell;   // cells of a stream
    int32_t     n_stream; //
    int32_t     n_ubatch; // most rows of one write
} gear_cache_params;

// What a store holds. Sums over streams.
typedef struct gear_store_stats {
    int32_t il;               // layer
    int32_t side;             // gear_side
    int32_t kind;             // 0: GEAR; 1: f16, a window too small to gain; 2: f16, used by operations that GEAR does not cover; 3: f16 asked for
    int32_t n_head_kv;        //
    int32_t d_head;           //
    int32_t n_stream;         //
    int64_t n_cell;           // cells of a stream
    int64_t n_written;        // cells that hold a row
    int64_t n_packed;         // of these, read from a packed tile
    int64_t n_exact;          // of these, read from an exact f16 row
    int64_t n_pack;           // tiles encoded since the cache was made
    int64_t bytes_tiles;      // memory of the packed tiles, reserved for the full context
    int64_t bytes_tiles_used; // of these, tiles that hold something
    int64_t bytes_exact;      // pool of exact rows
    int64_t bytes_tables;     // bookkeeping
    int64_t bytes_f16;        // what plain f16 would take
    double  bits_per_element; // of a packed tile, everything in it counted
    // What packing did to the rows packed so far (native/store/store.h); NaN where nothing is known. Not measured on a GPU.
    double  error;       // root mean square of x - x^ over that of x
    double  score_error; // K: root mean square error of a score, in nats, by the queries that were met before the first tile was packed
    double  worst_error; // of the worst head: K's score_error, V's error
    int32_t worst_head;  // -1: nothing is known
    int32_t stays_exact; // 1: a head's error went over the bound, and rows stay exact from then on
} gear_store_stats;

// q.K^T, mask, soft-cap, softmax, p.V for one op. Strides are in bytes. All as ggml's FLASH_ATTN_EXT defines them.
typedef struct gear_attention_params {
    int32_t          n_query;        // queries of a stream
    int32_t          n_head;         // query heads, a multiple of n_head_kv
    int32_t          n_kv;           // cells looked at, from 0
    int32_t          stream0;        // first stream
    int32_t          n_stream;       // streams
    const float *    q;              // f32 [n_stream, n_head, n_query, d_head_k] with the strides below
    int64_t          q_stride[3];    // of a query, a head, a stream
    const uint16_t * mask;           // f16 [m_stream, m_head, n_query, n_kv], or NULL: everything is visible
    int64_t          mask_stride[3]; // of a query, a head, a stream
    int32_t          mask_n_head;    // heads of the mask (broadcast: head % mask_n_head)
    int32_t          mask_n_stream;  // streams of the mask (broadcast)
    const float *    sinks;          // f32 [n_head], or NULL
    float            scale;          // of q.k
    float            max_bias;       // ALiBi, 0: none
    float            softcap;        // 0: none
    float *          out;            // f32 [n_stream, n_query, n_head, d_head_v] with the strides below
    int64_t          out_stride[3];  // of a head, a query, a stream
} gear_attention_params;

// The threads of an operation stay with the cache for the next one with as many; one operation of a cache runs at a time.
GEAR_API gear_cache * gear_cache_new(const gear_cache_params * params); // NULL: see gear_last_error
GEAR_API void         gear_cache_free(gear_cache * cache);

// Write n rows: rows f32 [n, n_head_kv * d_head], cells i64 [n], global (stream * n_cell + cell). The tiles that have to make room are packed first.
GEAR_API gear_status gear_cache_write(gear_cache * cache, gear_side side, int64_t n, const int64_t * cells, const float * rows, int32_t n_threads);
// Read n consecutive rows as f16: rows u16 [n, n_head_kv * d_head]. Cells never written read as zero.
GEAR_API gear_status gear_cache_read(gear_cache * cache, gear_side side, int64_t cell, int64_t n, uint16_t * rows);
// Copy all cells of a stream to another one, tiles bit for bit.
GEAR_API gear_status gear_cache_copy_stream(gear_cache * cache, gear_side side, int32_t from, int32_t to);
// The cells cell .. cell + n - 1 become unwritten.
GEAR_API gear_status gear_cache_erase(gear_cache * cache, gear_side side, int64_t cell, int64_t n);
// Change rows in place, as a K-shift does: for each tile with a marked cell, f is given its rows, f16 [n_token, n_head_kv * d_head], and the global cell
// of the first one, and changes the marked ones. Packed rows are packed again.   marked u8 [n_stream * n_cell]
typedef void (*gear_rows_callback)(void * user, int64_t cell, int32_t n_token, uint16_t * rows);
GEAR_API gear_status gear_cache_update(gear_cache * cache, gear_side side, const uint8_t * marked, gear_rows_callback f, void * user);
// Encode everything that may be packed (all but tail and sinks): what a benchmark calls to time packing, and a session before it is saved.
GEAR_API gear_status gear_cache_flush(gear_cache * cache, gear_side side, int32_t n_threads);
GEAR_API gear_status gear_cache_clear(gear_cache * cache);
GEAR_API gear_status gear_cache_attend(gear_cache * cache, const gear_attention_params * params, int32_t n_threads);
GEAR_API gear_status gear_cache_stats(gear_cache * cache, gear_side side, gear_store_stats * stats);

// Take n bytes; 0, or another number when they could not be written.
typedef int32_t (*gear_session_write)(void * user, const void * data, int64_t n);
// Give n bytes from offset on, all of them; 0, or another number when they could not be read.
typedef int32_t (*gear_session_read)(void * user, int64_t offset, void * data, int64_t n);

// One side as sessions hold it: its tiles as they are.
GEAR_API gear_status gear_cache_save(gear_cache * cache, gear_side side, gear_session_write write, void * user);
// What was saved of a cache of this configuration, into one of the same cells that holds nothing. Cells that come back where they were are bit for bit
// what they were; others are coded again. Where it fails on the way the cache has to be cleared.
//   to i64 [n_stream * n_cell]: where each saved cell goes, or NULL: where it was      n_changed (may be NULL): rows out of tiles that were coded again
GEAR_API gear_status gear_cache_load(gear_cache * cache, gear_side side, int64_t n_bytes, gear_session_read read, void * user, const int64_t * to,
                                     int64_t * n_changed);

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The llama.cpp plugin
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Find ggml in the process and prove that its structures are laid out as this library expects.
//   libllama: a dlopen handle whose dependencies include ggml (llama_cpp.llama_cpp._lib._handle), or NULL to search the process.
// Idempotent; a second call with another ggml is GEAR_ERROR_ABI.
GEAR_API gear_status gear_open(void * libllama);

// ggml's own version and commit, "" before gear_open.
GEAR_API const char * gear_ggml_version(void);
GEAR_API const char * gear_ggml_commit(void);

// A codec given by the caller (the reference methods in Python). Called from one thread at a time.
//   x f32 [n_token, d_head] rows as written; cells i64 [n_token]; xhat f32 [n_token, d_head] the reconstruction to be kept (as f16)
//   returns the exact bytes that the method would store for this tile, or a negative number: the decode stops with GEAR_ERROR_CALLBACK
typedef double (*gear_codec_callback)(void * user, int32_t il, int32_t side, int32_t head, int32_t n_token, int32_t d_head, const float * x,
                                      const uint8_t * written, const int64_t * cells, float * xhat);

typedef struct gear_device gear_device; // what one model's layers are put on: one ggml device, or several

// What another configuration codes the cache of one layer with. Tile, tail, sinks and seed are those of all layers.
typedef struct gear_layer_config {
    int32_t     il;
    gear_config config;
} gear_layer_config;

typedef struct gear_device_params {
    gear_config               config;
    const gear_layer *        layers;   // per-layer head table; NULL: taken from the graph when llama.cpp reserves it
    int32_t                   n_layer;  // entries of layers
    int32_t                   n_ubatch; // most rows of one write, 0: 512 until the graph says otherwise
    const char *              device;   // ggml devices to wrap, as in "CUDA0,CUDA1", NULL: gear_default_devices()
    gear_codec_callback       codec;    // NULL: the codec of config
    void *                    codec_user;
    const gear_layer_config * exceptions; // layers that are coded otherwise, each once, in any order
    int32_t                   n_exception;
} gear_device_params;

GEAR_API gear_device * gear_device_new(const gear_device_params * params); // NULL: see gear_last_error
// Frees the device. Every model and context that used it must be gone.
GEAR_API void          gear_device_free(gear_device * device);
// The names of ggml's devices that are wrapped where the caller names none: "CPU", or all CUDA devices when GEARCPP_CUDA=1 is set and there are some.
// Valid until the thread's next call; "" with gear_last_error() set when they cannot be had.
GEAR_API const char *  gear_default_devices(void);
// The i-th ggml_backend_dev_t to put into llama_model_params.devices, in the order of gear_device_params.device. NULL past the end.
GEAR_API void *        gear_device_ggml(gear_device * device, int32_t i);
// The last failure inside this device (it also failed the llama.cpp call), "" when there was none; cleared by the call. status may be NULL.
// Valid until the thread's next call of this function.
GEAR_API const char *  gear_device_error(gear_device * device, gear_status * status);
// Statistics of every store of every live context on this device: writes up to n entries, returns how many there are.
GEAR_API int32_t       gear_device_stats(gear_device * device, gear_store_stats * stats, int32_t n);
// The name of the operation that GEAR does not cover and llama.cpp uses on the cache of layer il, "" for none. Valid until the thread's next call.
GEAR_API const char *  gear_device_other_use(gear_device * device, int32_t il);
// The device of a process whose llama.cpp loaded this library as a backend (GGML_BACKEND_PATH, ggml_backend_load); NULL: none did. Not to be freed.
GEAR_API gear_device * gear_plugin_device(void);
// Scratch of attention and packing, in bytes, over all contexts of the device.
GEAR_API int64_t       gear_device_scratch_bytes(gear_device * device);

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Sessions: a whole context in a file, its tiles as they are
// ---------------------------------------------------------------------------------------------------------------------------------------------
//
// To save:     gear_session_new (llama_state_get_size), llama_state_get_data into gear_session_window, gear_session_save.
// To restore:  gear_session_open, gear_session_attach, llama_state_set_data from gear_session_window, gear_session_restore. Until llama_state_set_data the
//              context is unchanged; what fails from then on leaves it in need of llama_memory_clear.
//
// The window is address space: of a GEAR cache llama.cpp's f16 rows are neither made nor kept in it. One session at a time for a context.

typedef struct gear_session gear_session;

// device NULL: a context whose cache is llama.cpp's own; its state is kept as it is. NULL: see gear_last_error.
GEAR_API gear_session * gear_session_new(gear_device * device, int64_t state_bytes);
// A saved session of n_bytes, read through `read` now and until gear_session_restore. All of it is checked against its checksums, and its numbers against
// each other: GEAR_ERROR_DATA with the reason for anything damaged, cut off, foreign or of another version. note_only: only the note is read and checked.
GEAR_API gear_session * gear_session_open(int64_t n_bytes, gear_session_read read, void * user, int32_t note_only);
GEAR_API void           gear_session_free(gear_session * session);

// Where llama.cpp's state goes to or comes from, and its bytes.
GEAR_API void *       gear_session_window(gear_session * session, int64_t * n_bytes);
// What was saved as note, and its bytes.
GEAR_API const void * gear_session_note(gear_session * session, int64_t * n_bytes);
// Bytes of what was saved as extra.
GEAR_API int64_t      gear_session_extra_bytes(gear_session * session);

// Write the session through `write`. Tiles that are full are packed first, rows outside of tail and sinks, on n_threads threads.
//   state_bytes  what llama_state_get_data returned
//   note         the caller's, found first by gear_session_open; extra: the caller's, perhaps large; may be NULL with 0 bytes
GEAR_API gear_status gear_session_save(gear_session * session, int64_t state_bytes, const void * note, int64_t n_note, const void * extra, int64_t n_extra,
                                       int32_t n_threads, gear_session_write write, void * user);
// Tell the cache which cells are free, which llama.cpp does not: after llama_state_seq_get_data of all sequences (-1) into the window, every cell that
// it did not name becomes unwritten, and what stays is packed from now on as if the others had never been.
GEAR_API gear_status gear_session_forget_others(gear_session * session);
// Make ready for a context on this device (NULL: a cache of llama.cpp's own). GEAR_ERROR_DATA when its tiles are of another configuration.
GEAR_API gear_status gear_session_attach(gear_session * session, gear_device * device);
// Fill the cache, after llama_state_set_data. extra: room for gear_session_extra_bytes, or NULL. n_changed (may be NULL): rows that came back in other
// cells and were coded again.
GEAR_API gear_status gear_session_restore(gear_session * session, void * extra, int64_t * n_changed);

// XXH64 of n bytes: the checksum of sessions.
GEAR_API uint64_t gear_checksum(const void * data, int64_t n);

// cdef end

#ifdef __cplusplus
}
#endif
