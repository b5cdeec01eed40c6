#include "plugin/abi.h"

#include "common/error.h"
#include "plugin/loaded.h"
#include "plugin/report.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <mutex>
#include <string>
#include <vector>

namespace gear::abi {

namespace {

const char * const tested_releases = "ggml 0.15.3 to 0.26.0 (llama-cpp-python 0.3.32 to 0.3.36 and other builds of that time)";
const char * const what_to_do      = "Install a tested llama.cpp, or a gearcpp that knows this one";

functions          api;
numbers            num;
int                api_version    = 0;
buffer_type_layout buft_layout    = buffer_type_layout::two;
void *             opened_api     = nullptr; // address of ggml_init in the ggml that was proved: another address is another ggml
bool               has_gnu_openmp = false;

[[noreturn]] void mismatch(const char * what) {
    fail(GEAR_ERROR_ABI, "this ggml (version %s, commit %s) is not laid out as gearcpp %s expects: %s. Tested with %s. %s",
         api.ggml_version ? api.ggml_version() : "unknown", api.ggml_commit ? api.ggml_commit() : "unknown", gear_version(), what, tested_releases,
         what_to_do);
}

void expect(bool ok, const char * what) {
    if (!ok) {
        mismatch(what);
    }
}

// A pointer that lies in a loaded library: what a function pointer must be before it may be called.
bool in_library(const void * pointer) {
    Dl_info info;
    return pointer && dladdr(pointer, &info) != 0;
}

template <class F> bool is_function(F * function) {
    return in_library(reinterpret_cast<const void *>(function));
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Finding ggml
// ---------------------------------------------------------------------------------------------------------------------------------------------

// Where the functions of one ggml are found. That may be one library or several (ggml-base, ggml and, loaded one by one, its backends): all that are
// loaded and lead to the same ggml_init, for a call through any of them ends in the same ggml.
std::vector<void *> all_of_one_ggml(void * first, const std::vector<loaded_library> & loaded) {
    std::vector<void *> handles = { first };
    void * const        init    = dlsym(first, "ggml_init");
    for (const loaded_library & library : loaded) {
        if (init && library.symbol("ggml_init") == init) {
            handles.push_back(library.handle());
        }
    }
    return handles;
}

// With nothing that leads to one, the only ggml that is there.
void * only_ggml(const std::vector<loaded_library> & loaded) {
    std::vector<void *> inits;
    std::string         files;
    void *              found = nullptr;
    for (const loaded_library & library : loaded) {
        void * const init = library.symbol("ggml_init");
        if (init && std::find(inits.begin(), inits.end(), init) == inits.end()) {
            inits.push_back(init);
            files += (files.empty() ? "" : " and ") + file_at(init);
            found = library.handle();
        }
    }
    if (inits.size() > 1) {
        fail(GEAR_ERROR_ABI, "this process has %d copies of ggml (%s), and nothing says which is meant; load only one llama.cpp", (int) inits.size(),
             files.c_str());
    }
    return found;
}

template <class F> void find(const std::vector<void *> & handles, const char * name, F & function, std::string & missing) {
    for (void * handle : handles) {
        if (void * symbol = dlsym(handle, name)) {
            memcpy(&function, &symbol, sizeof symbol);
            return;
        }
    }
    missing += missing.empty() ? name : std::string(", ") + name;
}

void find_functions(const std::vector<void *> & handles) {
    std::string missing, optional;
    api = {};
#define FIND(name) find(handles, #name, api.name, missing)
    FIND(ggml_version), FIND(ggml_commit), FIND(ggml_op_name), FIND(ggml_type_name), FIND(ggml_tensor_overhead), FIND(ggml_nbytes);
    FIND(ggml_init), FIND(ggml_free), FIND(ggml_new_tensor_3d), FIND(ggml_view_2d), FIND(ggml_set_name), FIND(ggml_get_name);
    FIND(ggml_set_rows), FIND(ggml_flash_attn_ext), FIND(ggml_flash_attn_ext_add_sinks), FIND(ggml_rope_ext_inplace), FIND(ggml_permute);
    FIND(ggml_reshape_2d), FIND(ggml_transpose), FIND(ggml_custom_4d), FIND(ggml_new_graph), FIND(ggml_build_forward_expand);
    FIND(ggml_graph_n_nodes), FIND(ggml_graph_node), FIND(ggml_graph_size), FIND(ggml_graph_nodes);
    FIND(ggml_backend_buft_name), FIND(ggml_backend_buft_alloc_buffer), FIND(ggml_backend_buft_get_alignment), FIND(ggml_backend_buft_get_max_size);
    FIND(ggml_backend_buft_get_alloc_size), FIND(ggml_backend_buft_is_host), FIND(ggml_backend_buft_get_device), FIND(ggml_backend_buffer_init);
    FIND(ggml_backend_buffer_free), FIND(ggml_backend_buffer_get_base), FIND(ggml_backend_buffer_get_size), FIND(ggml_backend_buffer_get_type);
    FIND(ggml_backend_buffer_get_usage), FIND(ggml_backend_buffer_set_usage), FIND(ggml_backend_tensor_alloc), FIND(ggml_backend_tensor_set);
    FIND(ggml_backend_tensor_get), FIND(ggml_backend_graph_compute), FIND(ggml_backend_get_device), FIND(ggml_backend_name), FIND(ggml_backend_free);
    FIND(ggml_backend_dev_name), FIND(ggml_backend_dev_description), FIND(ggml_backend_dev_memory), FIND(ggml_backend_dev_type);
    FIND(ggml_backend_dev_init), FIND(ggml_backend_dev_buffer_type), FIND(ggml_backend_dev_host_buffer_type), FIND(ggml_backend_dev_supports_op);
    FIND(ggml_backend_dev_supports_buft), FIND(ggml_backend_dev_backend_reg), FIND(ggml_backend_reg_get_proc_address);
    FIND(ggml_backend_dev_by_name), FIND(ggml_backend_dev_by_type);
    FIND(ggml_backend_reg_name), FIND(ggml_backend_reg_dev_count), FIND(ggml_backend_reg_dev_get);
#undef FIND
    find(handles, "ggml_backend_buft_get_alloc_size_n", api.ggml_backend_buft_get_alloc_size_n, optional);
    for (void * handle : handles) {
        const void * symbol = dlsym(handle, "GOMP_parallel"); // LLVM's OpenMP has one, too
        Dl_info      info;
        has_gnu_openmp |= symbol && dladdr(symbol, &info) != 0 && info.dli_fname && strstr(info.dli_fname, "libgomp");
    }
    if (!api.ggml_init) {
        fail(GEAR_ERROR_ABI,
             "no usable ggml in this process: no library that is loaded exports ggml_init. Import llama_cpp first (llama-cpp-python), or load the plugin "
             "from a llama.cpp that is a library or exports its functions. Tested with %s",
             tested_releases);
    }
    if (!missing.empty()) {
        fail(GEAR_ERROR_ABI, "this ggml (version %s) is not one that gearcpp %s knows. Tested with %s. %s. It lacks %s",
             api.ggml_version ? api.ggml_version() : "unknown", gear_version(), tested_releases, what_to_do, missing.c_str());
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The proof
// ---------------------------------------------------------------------------------------------------------------------------------------------

int type_number(const char * name) {
    for (int type = 0; type < 28; ++type) {
        const char * found = api.ggml_type_name(type);
        if (found && strcmp(found, name) == 0) {
            return type;
        }
    }
    mismatch((std::string("there is no tensor type ") + name).c_str());
}

int op_number(const tensor * node, const char * name) {
    expect(strcmp(api.ggml_op_name(node->op), name) == 0, (std::string("the op of a ") + name + " node").c_str());
    return node->op;
}

void nothing(tensor *, int, int, void *) {}

// ggml_tensor and the nodes that the plugin looks at.
void prove_tensors(context * ctx) {
    constexpr size_t object_size = 32; // of ggml_object, which ggml_tensor_overhead includes
    expect(api.ggml_tensor_overhead() == object_size + sizeof(tensor), "the size of ggml_tensor");

    num.type_f32 = type_number("f32"), num.type_f16 = type_number("f16"), num.type_i32 = type_number("i32"), num.type_i64 = type_number("i64");

    // A cache of 8 cells in 2 streams, 2 heads of 32, as llama.cpp makes it.
    tensor * cache = api.ggml_new_tensor_3d(ctx, num.type_f16, 64, 8, 2);
    api.ggml_set_name(cache, "cache_k_l0");
    expect(cache->type == num.type_f16 && cache->ne[0] == 64 && cache->ne[1] == 8 && cache->ne[2] == 2 && cache->ne[3] == 1, "ggml_tensor.ne");
    expect(cache->nb[0] == 2 && cache->nb[1] == 128 && cache->nb[2] == 1024 && cache->nb[3] == 2048 && api.ggml_nbytes(cache) == 2048, "ggml_tensor.nb");
    expect(cache->name == api.ggml_get_name(cache) && strcmp(cache->name, "cache_k_l0") == 0, "ggml_tensor.name");
    expect(!cache->view_src && !cache->data && !cache->buf && !cache->extra, "ggml_tensor.data");
    num.op_none = op_number(cache, "NONE");

    tensor * view = api.ggml_view_2d(ctx, cache, 64, 8, 128, 1024);
    num.op_view   = op_number(view, "VIEW");
    expect(view->view_src == cache && view->view_offs == 1024 && view->src[0] == cache, "ggml_tensor.view_src");
    tensor * view_of_view = api.ggml_view_2d(ctx, view, 32, 8, 128, 64);
    expect(view_of_view->view_src == cache && view_of_view->view_offs == 1088, "a view of a view names the root");

    tensor * rows   = api.ggml_new_tensor_3d(ctx, num.type_f32, 64, 3, 1);
    tensor * cells  = api.ggml_new_tensor_3d(ctx, num.type_i64, 3, 1, 1);
    tensor * flat   = api.ggml_reshape_2d(ctx, cache, 64, 16);
    num.op_reshape  = op_number(flat, "RESHAPE");
    tensor * set    = api.ggml_set_rows(ctx, flat, rows, cells);
    num.op_set_rows = op_number(set, "SET_ROWS");
    expect(set->src[0] == rows && set->src[1] == cells && set->view_src == cache, "the sources of SET_ROWS");

    tensor * q     = api.ggml_new_tensor_3d(ctx, num.type_f32, 64, 3, 1);
    tensor * kv    = api.ggml_permute(ctx, cache, 0, 1, 3, 2); // [64, 8, 1, 2]: any shape that attention takes
    num.op_permute = op_number(kv, "PERMUTE");
    expect(kv->view_src == cache && kv->nb[3] == 1024, "ggml_tensor.nb of a permuted view");
    q              = api.ggml_permute(ctx, api.ggml_new_tensor_3d(ctx, num.type_f32, 64, 3, 2), 0, 1, 3, 2); // [64, 3, 1, 2]
    tensor * mask  = api.ggml_new_tensor_3d(ctx, num.type_f16, 8, 3, 1);
    tensor * sinks = api.ggml_new_tensor_3d(ctx, num.type_f32, 1, 1, 1);
    tensor * fa    = api.ggml_flash_attn_ext(ctx, q, kv, kv, mask, 0.25f, 8.0f, 30.0f);
    api.ggml_flash_attn_ext_add_sinks(fa, sinks);
    num.op_flash_attn = op_number(fa, "FLASH_ATTN_EXT");
    expect(fa->src[0] == q && fa->src[1] == kv && fa->src[2] == kv && fa->src[3] == mask && fa->src[4] == sinks, "the sources of FLASH_ATTN_EXT");
    float params[3];
    memcpy(params, fa->op_params, sizeof params);
    expect(params[0] == 0.25f && params[1] == 8.0f && params[2] == 30.0f, "the parameters of FLASH_ATTN_EXT");
    expect(fa->ne[0] == 64 && fa->ne[1] == 1 && fa->ne[2] == 3 && fa->ne[3] == 2, "the shape of FLASH_ATTN_EXT");

    tensor * heads = api.ggml_new_tensor_3d(ctx, num.type_f16, 32, 2, 16);
    tensor * shift = api.ggml_new_tensor_3d(ctx, num.type_i32, 16, 1, 1);
    tensor * rope  = api.ggml_rope_ext_inplace(ctx, heads, shift, nullptr, 32, 0, 0, 1e4f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    num.op_rope    = op_number(rope, "ROPE");
    expect(rope->src[0] == heads && rope->src[1] == shift && rope->src[2] == nullptr && rope->view_src == heads, "the sources of ROPE");

    num.op_transpose = op_number(api.ggml_transpose(ctx, rows), "TRANSPOSE");

    int           here   = 0;
    tensor *      custom = api.ggml_custom_4d(ctx, num.type_f32, 1, 1, 1, 1, &rows, 1, nothing, -1, &here);
    custom_params call;
    memcpy(&call, custom->op_params, sizeof call);
    num.op_custom = op_number(custom, "CUSTOM");
    expect(call.fun == nothing && call.n_tasks == -1 && call.userdata == &here && custom->src[0] == rows, "the parameters of CUSTOM");
}

void prove_device(device * dev) {
    const device_i & iface = dev->iface;
    expect(is_function(iface.get_name) && is_function(iface.get_type) && is_function(iface.get_props) && is_function(iface.init_backend) &&
               is_function(iface.get_buffer_type) && is_function(iface.supports_op) && is_function(iface.supports_buft),
           "ggml_backend_device_i");
    expect(dev->owner == api.ggml_backend_dev_backend_reg(dev), "ggml_backend_device.reg");
    expect(iface.get_name(dev) == api.ggml_backend_dev_name(dev), "ggml_backend_device_i.get_name");
    expect(iface.get_type(dev) == api.ggml_backend_dev_type(dev), "ggml_backend_device_i.get_type");
    buffer_type * buft = api.ggml_backend_dev_buffer_type(dev);
    expect(iface.get_buffer_type(dev) == buft, "ggml_backend_device_i.get_buffer_type");
    expect(iface.supports_buft(dev, buft) && api.ggml_backend_dev_supports_buft(dev, buft), "ggml_backend_device_i.supports_buft");

    unsigned char space[sizeof(device_props) + 64] = {};
    auto *        props                            = reinterpret_cast<device_props *>(space);
    iface.get_props(dev, props);
    size_t free_bytes = 0, total_bytes = 0;
    api.ggml_backend_dev_memory(dev, &free_bytes, &total_bytes);
    expect(strcmp(props->name, api.ggml_backend_dev_name(dev)) == 0 && props->type == api.ggml_backend_dev_type(dev) && props->memory_total == total_bytes,
           "ggml_backend_dev_props");

    reg * owner = dev->owner;
    api_version = owner->version;
    expect(api_version > 0 && api_version < 100, "ggml_backend_reg.api_version");
    expect(is_function(owner->iface.get_name) && is_function(owner->iface.get_device_count) && is_function(owner->iface.get_device) &&
               is_function(owner->iface.get_proc_address),
           "ggml_backend_reg_i");
    expect(owner->iface.get_proc_address(owner, "ggml_backend_set_n_threads") ==
               api.ggml_backend_reg_get_proc_address(owner, "ggml_backend_set_n_threads"),
           "ggml_backend_reg_i.get_proc_address");
    expect(owner->iface.get_name(owner) == api.ggml_backend_reg_name(owner), "ggml_backend_reg_i.get_name");

    // ggml reads ours.
    static device * const ours  = dev;
    reg                   mine  = { api_version, {}, nullptr };
    mine.iface.get_name         = [](reg *) { return "a registry of ours"; };
    mine.iface.get_device_count = [](reg * r) { return *static_cast<size_t *>(r->context); };
    mine.iface.get_device       = [](reg *, size_t i) { return i == 1 ? ours : nullptr; };
    size_t count                = 2;
    mine.context                = &count;
    expect(strcmp(api.ggml_backend_reg_name(&mine), "a registry of ours") == 0 && api.ggml_backend_reg_dev_count(&mine) == 2 &&
               api.ggml_backend_reg_dev_get(&mine, 1) == dev,
           "ggml_backend_reg");
}

// What ggml calls in a buffer type of ours.
namespace called {

constexpr size_t alignment = 64, max_size = 12345, more = 77;
size_t           allocated = 0;

const char * get_name(buffer_type *) {
    return "a buffer type of ours";
}
buffer * alloc_buffer(buffer_type * type, size_t size) {
    allocated = context_of(type) == &allocated ? size : 0;
    return nullptr;
}
size_t get_alignment(buffer_type *) {
    return alignment;
}
size_t get_max_size(buffer_type *) {
    return max_size;
}
size_t get_alloc_size(buffer_type *, const tensor * t) {
    return api.ggml_nbytes(t) + more;
}
bool is_host(buffer_type *) {
    return true;
}

} // namespace called

void prove_own_buffer_type(context * ctx, device * dev) {
    const buffer_type_i calls = { called::get_name,     called::alloc_buffer,   called::get_alignment,
                                  called::get_max_size, called::get_alloc_size, called::is_host };
    buffer_type         mine  = make_buffer_type(buft_layout, calls, dev, &called::allocated);
    tensor *            t     = api.ggml_new_tensor_3d(ctx, num.type_f32, 8, 1, 1);
    expect(strcmp(api.ggml_backend_buft_name(&mine), called::get_name(&mine)) == 0, "ggml_backend_buffer_type_i.get_name");
    expect(api.ggml_backend_buft_get_alignment(&mine) == called::alignment, "ggml_backend_buffer_type_i.get_alignment");
    expect(api.ggml_backend_buft_get_max_size(&mine) == called::max_size, "ggml_backend_buffer_type_i.get_max_size");
    expect(api.ggml_backend_buft_get_alloc_size(&mine, t) == 32 + called::more, "ggml_backend_buffer_type_i.get_alloc_size");
    expect(api.ggml_backend_buft_is_host(&mine), "ggml_backend_buffer_type_i.is_host");
    expect(api.ggml_backend_buft_get_device(&mine) == dev, "ggml_backend_buffer_type.device");
    expect(!api.ggml_backend_buft_alloc_buffer(&mine, 4096) && called::allocated == 4096, "ggml_backend_buffer_type_i.alloc_buffer");
    if (api.ggml_backend_buft_get_alloc_size_n) { // what memory fitting asks from interface 3 on: the sum of what each tensor takes
        tensor *     two[] = { t, api.ggml_new_tensor_3d(ctx, num.type_f32, 8, 1, 1) };
        const size_t each  = (32 + called::more + called::alignment - 1) / called::alignment * called::alignment;
        expect(api.ggml_backend_buft_get_alloc_size_n(&mine, two, 2) == 2 * each, "ggml_backend_buffer_type_i.get_alloc_size_n");
    }
}

void prove_buffer(context * ctx, device * dev) {
    buffer_type * buft = api.ggml_backend_dev_buffer_type(dev);
    expect(find_layout(api.ggml_backend_buft_get_device, buft_layout), "ggml_backend_buffer_type.device");
    const buffer_type_i iface = functions_of(buft_layout, buft);
    expect(is_function(iface.get_name) && is_function(iface.alloc_buffer) && is_function(iface.get_alignment) &&
               (!iface.is_host || is_function(iface.is_host)),
           "ggml_backend_buffer_type_i");
    expect((buft_layout == buffer_type_layout::three) == (api.ggml_backend_buft_get_alloc_size_n != nullptr),
           "ggml_backend_buffer_type_i.get_alloc_size_n");
    expect(iface.get_name(buft) == api.ggml_backend_buft_name(buft), "ggml_backend_buffer_type_i.get_name");
    expect(iface.get_alignment(buft) == api.ggml_backend_buft_get_alignment(buft), "ggml_backend_buffer_type_i.get_alignment");
    expect((iface.is_host && iface.is_host(buft)) == api.ggml_backend_buft_is_host(buft), "ggml_backend_buffer_type_i.is_host");
    prove_own_buffer_type(ctx, dev);

    buffer * buf = api.ggml_backend_buft_alloc_buffer(buft, 4096);
    if (!buf) {
        fail(GEAR_ERROR_MEMORY, "ggml could not allocate 4096 bytes");
    }
    struct release {
        buffer * buf;
        ~release() { api.ggml_backend_buffer_free(buf); }
    } guard{ buf };

    const buffer_i & buf_iface = buf->iface;
    expect(buf->buft == buft && api.ggml_backend_buffer_get_type(buf) == buft, "ggml_backend_buffer.buft");
    expect(buf->size == api.ggml_backend_buffer_get_size(buf) && buf->size >= 4096, "ggml_backend_buffer.size");
    expect(buf->usage == usage_any && api.ggml_backend_buffer_get_usage(buf) == usage_any, "ggml_backend_buffer.usage");
    api.ggml_backend_buffer_set_usage(buf, usage_compute);
    expect(buf->usage == usage_compute, "ggml_backend_buffer.usage");
    expect(is_function(buf_iface.get_base) && is_function(buf_iface.set_tensor) && is_function(buf_iface.get_tensor) && is_function(buf_iface.clear) &&
               is_function(buf_iface.memset_tensor) && is_function(buf_iface.free_buffer),
           "ggml_backend_buffer_i");
    void * base = api.ggml_backend_buffer_get_base(buf);
    expect(buf_iface.get_base(buf) == base, "ggml_backend_buffer_i.get_base");

    tensor * t = api.ggml_new_tensor_3d(ctx, num.type_i32, 4, 1, 1);
    api.ggml_backend_tensor_alloc(buf, t, base);
    expect(t->buf == buf && t->data == base, "ggml_tensor.buffer");
    const int32_t written[4] = { 1, -2, 3, -4 };
    int32_t       read[4]    = {};
    api.ggml_backend_tensor_set(t, written, 0, sizeof written);
    buf_iface.get_tensor(buf, t, read, 0, sizeof read);
    expect(memcmp(read, written, sizeof read) == 0, "ggml_backend_buffer_i.get_tensor");
    buf_iface.memset_tensor(buf, t, 0, 4, 4);
    buf_iface.set_tensor(buf, t, written, 8, 4);
    api.ggml_backend_tensor_get(t, read, 0, sizeof read);
    expect(read[0] == 1 && read[1] == 0 && read[2] == 1 && read[3] == -4, "ggml_backend_buffer_i.set_tensor");
    buf_iface.clear(buf, 0);
    api.ggml_backend_tensor_get(t, read, 0, sizeof read);
    expect(read[0] == 0 && read[3] == 0, "ggml_backend_buffer_i.clear");
}

// Run a CUSTOM node through a shadow graph, the way the plugin does.
struct witness {
    tensor * dst = nullptr;
    int      nth = 0;
};

void witness_op(tensor * dst, int ith, int nth, void * userdata) {
    if (ith == 0) {
        *static_cast<witness *>(userdata) = { dst, nth };
    }
}

void prove_backend(context * ctx, device * dev) {
    backend * cpu = api.ggml_backend_dev_init(dev, nullptr);
    expect(cpu != nullptr, "the CPU backend");
    struct release {
        backend * b;
        ~release() { api.ggml_backend_free(b); }
    } guard{ cpu };
    expect(cpu->dev == api.ggml_backend_get_device(cpu) && cpu->dev == dev, "ggml_backend.device");
    expect(is_function(cpu->iface.get_name) && is_function(cpu->iface.graph_compute) && is_function(cpu->iface.free), "ggml_backend_i");
    expect(cpu->iface.get_name(cpu) == api.ggml_backend_name(cpu), "ggml_backend_i.get_name");
    // One thread: a process that has had several inside OpenMP cannot be forked, and this one may only be about to be.
    using setter = void (*)(backend *, int);
    void * found = api.ggml_backend_reg_get_proc_address(api.ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
    setter set_n_threads;
    memcpy(&set_n_threads, &found, sizeof found);
    expect(set_n_threads != nullptr, "ggml_backend_set_n_threads");
    set_n_threads(cpu, 1);

    float    one = 1.0f;
    witness  seen;
    tensor * nodes[1] = { api.ggml_new_tensor_3d(ctx, num.type_f32, 1, 1, 1) };
    nodes[0]->data    = &one;
    tensor * custom   = api.ggml_custom_4d(ctx, num.type_f32, 1, 1, 1, 1, nodes, 1, nothing, -1, nullptr);
    custom->data      = &one;
    cgraph * graph    = api.ggml_new_graph(ctx);
    api.ggml_build_forward_expand(graph, custom);
    expect(graph->n_nodes == 1 && api.ggml_graph_n_nodes(graph) == 1 && graph->size == api.ggml_graph_size(graph) &&
               graph->nodes == api.ggml_graph_nodes(graph) && graph->nodes[0] == custom && api.ggml_graph_node(graph, 0) == custom,
           "ggml_cgraph");
    expect(graph->n_leafs == 1 && graph->leafs && graph->leafs[0] == nodes[0] && graph->visited.size > 0 && graph->visited.keys && graph->visited.used &&
               graph->use_counts && graph->uid == 0,
           "ggml_cgraph.leafs");

    tensor              replaced = *custom;
    const custom_params call     = { witness_op, -1, &seen };
    memcpy(replaced.op_params, &call, sizeof call);
    tensor * shadow_nodes[1] = { &replaced };
    cgraph   shadow          = *graph;
    shadow.nodes             = shadow_nodes;
    expect(cpu->iface.graph_compute(cpu, &shadow) == graph_success && seen.dst == &replaced && seen.nth >= 1, "running a shadow graph");
}

void prove() {
    context * ctx = api.ggml_init({ (size_t) 1 << 20, nullptr, true });
    expect(ctx != nullptr, "ggml_init");
    struct release {
        context * ctx;
        ~release() { api.ggml_free(ctx); }
    } guard{ ctx };
    prove_tensors(ctx);
    device * dev = api.ggml_backend_dev_by_type(device_cpu);
    expect(dev != nullptr, "there is no CPU device");
    prove_device(dev);
    prove_buffer(ctx, dev);
    prove_backend(ctx, dev);
}

std::mutex & lock() {
    static std::mutex mutex;
    return mutex;
}

} // namespace

void open(void * libllama, const void * caller) {
    std::lock_guard<std::mutex> guard(lock());
    const loaded_library        from  = libllama ? loaded_library() : library_at(caller);
    void *                      first = libllama ? libllama : from.symbol("ggml_init") ? from.handle() : nullptr;
    if (opened_api) {
        void * const asks = first ? dlsym(first, "ggml_init") : opened_api;
        if (asks != opened_api) {
            fail(GEAR_ERROR_ABI,
                 "this process has two copies of ggml: gearcpp is bound to that of %s, and %s asks with another; load only one llama.cpp in a process",
                 file_at(opened_api).c_str(), asks ? file_at(asks).c_str() : "a library without ggml");
        }
        return;
    }
    const std::vector<loaded_library> loaded = loaded_libraries();
    first                                    = first ? first : only_ggml(loaded);
    find_functions(first ? all_of_one_ggml(first, loaded) : std::vector<void *>());
    prove();
    void * proved;
    memcpy(&proved, &api.ggml_init, sizeof proved);
    // As long as the process lives, there are pointers into ggml here: it must not be unloaded, not at the end either, when others still use it.
    for (const loaded_library & library : loaded) {
        if (library.symbol("ggml_init") == proved) {
            library.pin();
        }
    }
    if (is_report_wanted()) {
        fprintf(stderr, "gearcpp: version %s in ggml %s (commit %s), backend interface %d, %s\n", gear_version(), api.ggml_version(), api.ggml_commit(),
                api_version, file_at(proved).c_str());
    }
    opened_api = proved; // nothing fails from here on
}

bool uses_gnu_openmp() {
    return has_gnu_openmp;
}

bool is_open() {
    return opened_api != nullptr;
}

const functions & ggml() {
    return api;
}

const numbers & number() {
    return num;
}

int version() {
    return api_version;
}

buffer_type_layout layout() {
    return buft_layout;
}

void * context_of(const buffer_type * type) {
    return buft_layout == buffer_type_layout::two ? type->two.context : type->three.context;
}

} // namespace gear::abi
