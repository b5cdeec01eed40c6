// abi.h - the part of ggml's binary interface that the plugin uses, declared here so that no source of llama.cpp is needed to build it.
//
// The structures follow the facts of ggml's ggml.h, ggml-impl.h and ggml-backend-impl.h (GGML_BACKEND_API_VERSION 2 and 3: ggml 0.15.1 to 0.26.0). What
// differs between those: op numbers, the last member of backend_i, and from 0.26 on two more members of the buffer type's table, which is written in the
// layout of the ggml in the process. Nothing of it is trusted: open() looks the functions up by name in the libraries that the process has loaded, takes
// op and type numbers from tensors that ggml itself makes, and compares every member that the plugin reads or writes with what ggml's public functions
// say, before anything runs. So a later version is taken when it passes, and our registries say the version that ggml's own say.
// native/plugin/abi.cpp has the proof.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gear::abi {

constexpr int max_dims      = 4;
constexpr int max_src       = 10;
constexpr int max_op_params = 16; // int32
constexpr int max_name      = 64;

struct buffer;
struct buffer_type;
struct backend;
struct device;
struct reg;
struct context;
struct event;

struct tensor {
    int32_t  type;
    buffer * buf;
    int64_t  ne[max_dims];
    size_t   nb[max_dims];
    int32_t  op;
    int32_t  op_params[max_op_params];
    int32_t  flags;
    tensor * src[max_src];
    tensor * view_src;
    size_t   view_offs;
    void *   data;
    char     name[max_name];
    void *   extra;
    char     padding[8];
};

struct hash_set {
    size_t     size;
    uint32_t * used;
    tensor **  keys;
};

struct cgraph {
    int       size;
    int       n_nodes;
    int       n_leafs;
    tensor ** nodes;
    tensor ** grads;
    tensor ** grad_accs;
    tensor ** leafs;
    int32_t * use_counts;
    hash_set  visited;
    int       order;
    uint64_t  uid;
};

// What a buffer type does. All but get_max_size, get_alloc_size and is_host have to be there.
struct buffer_type_i {
    const char * (*get_name)(buffer_type *);
    buffer * (*alloc_buffer)(buffer_type *, size_t size);
    size_t (*get_alignment)(buffer_type *);
    size_t (*get_max_size)(buffer_type *);
    size_t (*get_alloc_size)(buffer_type *, const tensor *);
    bool (*is_host)(buffer_type *);
};

// A buffer type in interface 2.
struct buffer_type_2 {
    buffer_type_i iface;
    abi::device * dev;
    void *        context;
};

// In interface 3 it may take lists of tensors besides. Where it does not, ggml asks for one tensor after the other: all that we need.
struct buffer_type_3 {
    const char * (*get_name)(buffer_type *);
    buffer * (*alloc_buffer)(buffer_type *, size_t size);
    buffer * (*alloc_buffer_n)(buffer_type *, tensor **, int n);
    size_t (*get_alignment)(buffer_type *);
    size_t (*get_max_size)(buffer_type *);
    size_t (*get_alloc_size)(buffer_type *, const tensor *);
    size_t (*get_alloc_size_n)(buffer_type *, tensor **, int n);
    bool (*is_host)(buffer_type *);
    abi::device * dev;
    void *        context;
};

enum class buffer_type_layout { two, three };

// Either: which one, abi::layout() says. One of ggml's may be no longer than its layout is.
struct buffer_type {
    union {
        buffer_type_2 two;
        buffer_type_3 three;
    };
};

// The layout that ggml reads: where it finds the device, which is behind the table, says how long that is. false: neither.
inline bool find_layout(device * (*get_device)(buffer_type *), buffer_type_layout & layout) {
    void * places[16];
    for (void *& place : places) {
        place = &place; // a value of its own, which nothing but this looks at
    }
    const void * const found = get_device(reinterpret_cast<buffer_type *>(places));
    layout                   = found == places + offsetof(buffer_type_2, dev) / sizeof(void *) ? buffer_type_layout::two : buffer_type_layout::three;
    return layout == buffer_type_layout::two || found == places + offsetof(buffer_type_3, dev) / sizeof(void *);
}

inline buffer_type_i functions_of(buffer_type_layout layout, const buffer_type * type) {
    const buffer_type_3 & t = type->three;
    return layout == buffer_type_layout::two ? type->two.iface
                                             : buffer_type_i{ t.get_name, t.alloc_buffer, t.get_alignment, t.get_max_size, t.get_alloc_size, t.is_host };
}

inline buffer_type make_buffer_type(buffer_type_layout layout, const buffer_type_i & f, device * dev, void * context) {
    buffer_type type = {};
    if (layout == buffer_type_layout::two) {
        type.two = { f, dev, context };
    } else {
        type.three = { f.get_name, f.alloc_buffer, nullptr, f.get_alignment, f.get_max_size, f.get_alloc_size, nullptr, f.is_host, dev, context };
    }
    return type;
}

struct buffer_i {
    void (*free_buffer)(buffer *);
    void * (*get_base)(buffer *);
    int (*init_tensor)(buffer *, tensor *);
    void (*memset_tensor)(buffer *, tensor *, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(buffer *, tensor *, const void * data, size_t offset, size_t size);
    void (*get_tensor)(buffer *, const tensor *, void * data, size_t offset, size_t size);
    void (*set_tensor_2d)(buffer *, tensor *, const void * data, size_t offset, size_t size, size_t n, size_t stride_tensor, size_t stride_data);
    void (*get_tensor_2d)(buffer *, const tensor *, void * data, size_t offset, size_t size, size_t n, size_t stride_tensor, size_t stride_data);
    bool (*cpy_tensor)(buffer *, const tensor * src, tensor * dst);
    void (*clear)(buffer *, uint8_t value);
    void (*reset)(buffer *);
};

struct buffer {
    buffer_i      iface;
    buffer_type * buft;
    void *        context;
    size_t        size;
    int           usage;
};

struct backend_i {
    const char * (*get_name)(backend *);
    void (*free)(backend *);
    void (*set_tensor_async)(backend *, tensor *, const void *, size_t, size_t);
    void (*get_tensor_async)(backend *, const tensor *, void *, size_t, size_t);
    void (*set_tensor_2d_async)(backend *, tensor *, const void *, size_t, size_t, size_t, size_t, size_t);
    void (*get_tensor_2d_async)(backend *, const tensor *, void *, size_t, size_t, size_t, size_t, size_t);
    bool (*cpy_tensor_async)(backend *, backend *, const tensor *, tensor *);
    void (*synchronize)(backend *);
    void * (*graph_plan_create)(backend *, const cgraph *);
    void (*graph_plan_free)(backend *, void *);
    void (*graph_plan_update)(backend *, void *, const cgraph *);
    int (*graph_plan_compute)(backend *, void *);
    int (*graph_compute)(backend *, cgraph *);
    void (*event_record)(backend *, event *);
    void (*event_wait)(backend *, event *);
    void * graph_optimize; // its arguments differ between releases: never called here, NULL on the CPU
};

struct backend {
    const uint8_t * guid; // 16 bytes
    backend_i       iface;
    abi::device *   dev;
    void *          context;
};

enum device_type { device_cpu, device_gpu, device_igpu, device_accel, device_meta };

struct device_caps {
    bool async;
    bool host_buffer;
    bool buffer_from_host_ptr;
    bool events;
    bool mmap_support; // absent in older releases, where nothing reads it
};

struct device_props {
    const char * name;
    const char * description;
    size_t       memory_free;
    size_t       memory_total;
    int          type;
    const char * device_id;
    device_caps  caps;
};

struct device_i {
    const char * (*get_name)(device *);
    const char * (*get_description)(device *);
    void (*get_memory)(device *, size_t * free, size_t * total);
    int (*get_type)(device *);
    void (*get_props)(device *, device_props *);
    backend * (*init_backend)(device *, const char * params);
    buffer_type * (*get_buffer_type)(device *);
    buffer_type * (*get_host_buffer_type)(device *);
    buffer * (*buffer_from_host_ptr)(device *, void *, size_t, size_t);
    bool (*supports_op)(device *, const tensor *);
    bool (*supports_buft)(device *, buffer_type *);
    bool (*offload_op)(device *, const tensor *);
    event * (*event_new)(device *);
    void (*event_free)(device *, event *);
    void (*event_synchronize)(device *, event *);
};

struct device {
    device_i   iface;
    abi::reg * owner;
    void *     context;
};

struct reg_i {
    const char * (*get_name)(reg *);
    size_t (*get_device_count)(reg *);
    device * (*get_device)(reg *, size_t);
    void * (*get_proc_address)(reg *, const char * name);
};

struct reg {
    int    version;
    reg_i  iface;
    void * context;
};

struct init_params {
    size_t mem_size;
    void * mem_buffer;
    bool   no_alloc;
};

using custom_op      = void (*)(tensor * dst, int ith, int nth, void * userdata);
using abort_callback = bool (*)(void *);

// What a CUSTOM node carries in op_params.
struct custom_params {
    custom_op fun;
    int       n_tasks; // -1: all threads
    void *    userdata;
};

enum graph_status { graph_failed = -1, graph_success = 0 };
enum buffer_usage { usage_any = 0, usage_weights = 1, usage_compute = 2 };

// ggml's public functions that the plugin calls, by their names there.
struct functions {
    const char * (*ggml_version)();
    const char * (*ggml_commit)();
    const char * (*ggml_op_name)(int);
    const char * (*ggml_type_name)(int);
    size_t (*ggml_tensor_overhead)();
    size_t (*ggml_nbytes)(const tensor *);
    context * (*ggml_init)(init_params);
    void (*ggml_free)(context *);
    tensor * (*ggml_new_tensor_3d)(context *, int type, int64_t, int64_t, int64_t);
    tensor * (*ggml_view_2d)(context *, tensor *, int64_t, int64_t, size_t, size_t);
    tensor * (*ggml_set_name)(tensor *, const char *);
    const char * (*ggml_get_name)(const tensor *);
    tensor * (*ggml_set_rows)(context *, tensor *, tensor *, tensor *);
    tensor * (*ggml_flash_attn_ext)(context *, tensor *, tensor *, tensor *, tensor *, float, float, float);
    void (*ggml_flash_attn_ext_add_sinks)(tensor *, tensor *);
    tensor * (*ggml_rope_ext_inplace)(context *, tensor *, tensor *, tensor *, int, int, int, float, float, float, float, float, float);
    tensor * (*ggml_permute)(context *, tensor *, int, int, int, int);
    tensor * (*ggml_reshape_2d)(context *, tensor *, int64_t, int64_t);
    tensor * (*ggml_transpose)(context *, tensor *);
    tensor * (*ggml_custom_4d)(context *, int type, int64_t, int64_t, int64_t, int64_t, tensor **, int, custom_op, int, void *);
    cgraph * (*ggml_new_graph)(context *);
    void (*ggml_build_forward_expand)(cgraph *, tensor *);
    int (*ggml_graph_n_nodes)(cgraph *);
    tensor * (*ggml_graph_node)(cgraph *, int);
    int (*ggml_graph_size)(cgraph *);
    tensor ** (*ggml_graph_nodes)(cgraph *);

    const char * (*ggml_backend_buft_name)(buffer_type *);
    buffer * (*ggml_backend_buft_alloc_buffer)(buffer_type *, size_t);
    size_t (*ggml_backend_buft_get_alignment)(buffer_type *);
    size_t (*ggml_backend_buft_get_max_size)(buffer_type *);
    size_t (*ggml_backend_buft_get_alloc_size)(buffer_type *, const tensor *);
    bool (*ggml_backend_buft_is_host)(buffer_type *);
    device * (*ggml_backend_buft_get_device)(buffer_type *);
    buffer * (*ggml_backend_buffer_init)(buffer_type *, buffer_i, void *, size_t);
    void (*ggml_backend_buffer_free)(buffer *);
    void * (*ggml_backend_buffer_get_base)(buffer *);
    size_t (*ggml_backend_buffer_get_size)(buffer *);
    buffer_type * (*ggml_backend_buffer_get_type)(buffer *);
    int (*ggml_backend_buffer_get_usage)(buffer *);
    void (*ggml_backend_buffer_set_usage)(buffer *, int);
    int (*ggml_backend_tensor_alloc)(buffer *, tensor *, void *);
    void (*ggml_backend_tensor_set)(tensor *, const void *, size_t, size_t);
    void (*ggml_backend_tensor_get)(const tensor *, void *, size_t, size_t);
    int (*ggml_backend_graph_compute)(backend *, cgraph *);
    device * (*ggml_backend_get_device)(backend *);
    const char * (*ggml_backend_name)(backend *);
    void (*ggml_backend_free)(backend *);
    const char * (*ggml_backend_dev_name)(device *);
    const char * (*ggml_backend_dev_description)(device *);
    void (*ggml_backend_dev_memory)(device *, size_t *, size_t *);
    int (*ggml_backend_dev_type)(device *);
    backend * (*ggml_backend_dev_init)(device *, const char *);
    buffer_type * (*ggml_backend_dev_buffer_type)(device *);
    buffer_type * (*ggml_backend_dev_host_buffer_type)(device *);
    bool (*ggml_backend_dev_supports_op)(device *, const tensor *);
    bool (*ggml_backend_dev_supports_buft)(device *, buffer_type *);
    reg * (*ggml_backend_dev_backend_reg)(device *);
    void * (*ggml_backend_reg_get_proc_address)(reg *, const char *);
    device * (*ggml_backend_dev_by_name)(const char *);
    device * (*ggml_backend_dev_by_type)(int);
    const char * (*ggml_backend_reg_name)(reg *);
    size_t (*ggml_backend_reg_dev_count)(reg *);
    device * (*ggml_backend_reg_dev_get)(reg *, size_t);

    // Not in every release: nullptr.
    size_t (*ggml_backend_buft_get_alloc_size_n)(buffer_type *, tensor **, int n);
};

// Numbers of ops and types, which move between releases.
struct numbers {
    int op_none, op_view, op_reshape, op_permute, op_transpose, op_set_rows, op_flash_attn, op_rope, op_custom;
    int type_f32, type_f16, type_i32, type_i64;
};

// Find ggml and prove the layout, once per process. Throws gear::error (GEAR_ERROR_ABI) naming the ggml version found and those tested.
//   libllama  a handle of dlopen that leads to the ggml that is meant, or nullptr
//   caller    an address in the ggml that is meant, as of who called, or nullptr. With neither there has to be one ggml in the process.
void open(void * libllama, const void * caller = nullptr);
// ggml's threads are those of GNU OpenMP, which hang in a child that is forked after several of them have run.
bool uses_gnu_openmp();
bool is_open();

const functions & ggml();
const numbers &   number();

// Of the ggml that was proved: its GGML_BACKEND_API_VERSION, which our registries have to say, and how its buffer types are laid out.
int                version();
buffer_type_layout layout();

// The context of a buffer type in that layout.
void * context_of(const buffer_type * type);

} // namespace gear::abi
