// cuda_emulated.cpp - libgearcpp-cuda with its kernels on the CPU, for tests of plugin/cuda, and GPUs of ggml's for it to wrap: devices CUDA0, CUDA1, ...
// as ggml-cuda registers them, whose graphs ggml's CPU computes. To be used with
//     GEARCPP_CUDA=1
//     GEARCPP_CUDA_LIBRARY      this library; tests/test_cuda_device.py compiles it
//     GEARCPP_EMULATED_GPUS     MiB of each GPU, which llama.cpp splits layers by, as in 2000,5000 for two of them; one of 4000 where it is not set
//
//     GEARCPP_EMULATED_ORDER    fixed: threads run in one order, so that what is computed does not depend on how many kernels were launched before
//     GEARCPP_EMULATED_MIXUP    1: CUDA's number of every device is said to be 0
//
// Each device has a buffer type of its own that is not the host's, so llama.cpp copies to it and between two of them as it does with ggml-cuda, and asks
// for pipelines (caps.async, caps.events). Nothing is asynchronous.
#include "cuda_emulated.h" // first

#include "plugin/abi.h"

#include <dlfcn.h>
#include <string>

namespace gear::abi {

struct event { // ggml_backend_event
    abi::device * dev;
    void *        context;
};

} // namespace gear::abi

namespace gear::cuda::emulated {

namespace {

template <class F> F ggml(const char * name) {
    F function = nullptr;
    for (const char * library : { "libllama.so", "libllama.so.0", "libggml.so", "libggml.so.0", "libllama.dylib", "libggml.dylib" }) {
        void * handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
        void * symbol = handle ? dlsym(handle, name) : nullptr;
        if (symbol) {
            memcpy(&function, &symbol, sizeof symbol);
            return function;
        }
    }
    fprintf(stderr, "cuda_emulated: no %s in this process\n", name);
    abort();
}

struct gpu {
    int              number;
    size_t           bytes;
    std::string      name, id;
    abi::device      device;
    abi::buffer_type type;
};

std::vector<std::unique_ptr<gpu>> gpus;
abi::reg                          registry;
abi::device *                     cpu;

gpu & of(abi::device * device) {
    return *static_cast<gpu *>(device->context);
}

// The layout of buffer types in this ggml.
abi::buffer_type_layout layout() {
    static const abi::buffer_type_layout found = [] {
        abi::buffer_type_layout layout;
        if (!abi::find_layout(ggml<abi::device * (*)(abi::buffer_type *)>("ggml_backend_buft_get_device"), layout)) {
            fprintf(stderr, "cuda_emulated: buffer types are laid out in another way\n");
            abort();
        }
        return layout;
    }();
    return found;
}

gpu & of(abi::buffer_type * type) {
    return *static_cast<gpu *>(layout() == abi::buffer_type_layout::two ? type->two.context : type->three.context);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Buffers
// ---------------------------------------------------------------------------------------------------------------------------------------------

void free_buffer(abi::buffer * buffer) {
    release(buffer->context);
}

void move(void * to, const void * from, size_t bytes) {
    const within_reach there(to), here(from);
    memmove(to, from, bytes);
}

bool copy_tensor(abi::buffer *, const abi::tensor * from, abi::tensor * to) {
    const abi::buffer * origin = from->view_src ? from->view_src->buf : from->buf;
    if (origin->iface.free_buffer != free_buffer) {
        return false;
    }
    move(to->data, from->data, ggml<size_t (*)(const abi::tensor *)>("ggml_nbytes")(from));
    return true;
}

abi::buffer * alloc_buffer(abi::buffer_type * type, size_t size) {
    void * at = nullptr;
    if (allocate_on(of(type).number, &at, size) != ok) {
        return nullptr;
    }
    abi::buffer_i iface = {};
    iface.free_buffer   = free_buffer;
    iface.get_base      = [](abi::buffer * b) { return b->context; };
    iface.memset_tensor = [](abi::buffer *, abi::tensor * tensor, uint8_t value, size_t offset, size_t n) {
        const within_reach there(tensor->data);
        memset(static_cast<char *>(tensor->data) + offset, value, n);
    };
    iface.set_tensor = [](abi::buffer *, abi::tensor * tensor, const void * data, size_t offset, size_t n) {
        move(static_cast<char *>(tensor->data) + offset, data, n);
    };
    iface.get_tensor = [](abi::buffer *, const abi::tensor * tensor, void * data, size_t offset, size_t n) {
        move(data, static_cast<const char *>(tensor->data) + offset, n);
    };
    iface.cpy_tensor = copy_tensor;
    iface.clear      = [](abi::buffer * b, uint8_t value) {
        const within_reach there(b->context);
        memset(b->context, value, b->size);
    };
    return ggml<abi::buffer * (*)(abi::buffer_type *, abi::buffer_i, void *, size_t)>("ggml_backend_buffer_init")(type, iface, at, size);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// The backend: ggml's CPU, within this device's memory
// ---------------------------------------------------------------------------------------------------------------------------------------------

const uint8_t guid[16] = { 'e', 'm', 'u', 'l', 'a', 't', 'e', 'd' };

// The backend that we are given may be a copy of ours with another device (plugin/cuda/backend.cpp), so the device is found by its context.
struct context_of {
    abi::backend * cpu;
    gpu *          on;
};

context_of & context(abi::backend * backend) {
    return *static_cast<context_of *>(backend->context);
}

abi::backend * init_backend(abi::device * device, const char *) {
    abi::backend * computing = ggml<abi::backend * (*)(abi::device *, const char *)>("ggml_backend_dev_init")(cpu, nullptr);
    if (void * set = cpu->owner->iface.get_proc_address(cpu->owner, "ggml_backend_set_n_threads")) {
        reinterpret_cast<void (*)(abi::backend *, int)>(set)(computing, 1);
    }
    auto * made               = new abi::backend{};
    made->guid                = guid;
    made->dev                 = device;
    made->context             = new context_of{ computing, &of(device) };
    made->iface.get_name      = [](abi::backend * b) { return context(b).on->name.c_str(); };
    made->iface.synchronize   = [](abi::backend *) {};
    made->iface.graph_compute = [](abi::backend * b, abi::cgraph * graph) {
        const within_reach memory(context(b).on->number);
        return context(b).cpu->iface.graph_compute(context(b).cpu, graph);
    };
    made->iface.event_record = [](abi::backend * b, abi::event * e) {
        if (e->dev != &context(b).on->device) {
            fprintf(stderr, "cuda_emulated: an event of another device is recorded\n");
            abort();
        }
    };
    made->iface.event_wait = [](abi::backend *, abi::event *) {};
    made->iface.free       = [](abi::backend * b) {
        context(b).cpu->iface.free(context(b).cpu);
        delete &context(b);
        delete b;
    };
    return made;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// Devices
// ---------------------------------------------------------------------------------------------------------------------------------------------

void get_memory(abi::device * device, size_t * free, size_t * total) {
    *free = *total = of(device).bytes;
}

void make_gpu(size_t bytes) {
    gpus.push_back(std::make_unique<gpu>());
    gpu & g  = *gpus.back();
    g.number = (int) gpus.size() - 1;
    g.bytes  = bytes;
    g.name   = "CUDA" + std::to_string(g.number);
    g.id     = "0000:0" + std::to_string(g.number) + ":00.0";

    abi::device_i & iface = g.device.iface;
    iface.get_name        = [](abi::device * d) { return of(d).name.c_str(); };
    iface.get_description = [](abi::device *) { return "a CPU that plays a GPU"; };
    iface.get_memory      = get_memory;
    iface.get_type        = [](abi::device *) { return (int) abi::device_gpu; };
    iface.get_props       = [](abi::device * d, abi::device_props * props) {
        props->name        = of(d).name.c_str();
        props->description = "a CPU that plays a GPU";
        props->type        = abi::device_gpu;
        props->device_id   = of(d).id.c_str();
        props->caps.async = props->caps.events = true;
        props->caps.host_buffer = props->caps.buffer_from_host_ptr = false;
        get_memory(d, &props->memory_free, &props->memory_total);
    };
    iface.init_backend    = init_backend;
    iface.get_buffer_type = [](abi::device * d) { return &of(d).type; };
    iface.supports_op     = [](abi::device *, const abi::tensor * op) { return cpu->iface.supports_op(cpu, op); };
    iface.supports_buft   = [](abi::device * d, abi::buffer_type * type) { return type == &of(d).type; };
    iface.event_new       = [](abi::device * d) { return new abi::event{ d, new event_handle{ of(d).number } }; };
    iface.event_free      = [](abi::device *, abi::event * e) {
        delete static_cast<event_handle *>(e->context);
        delete e;
    };
    iface.event_synchronize = [](abi::device *, abi::event *) {};

    g.device.owner   = &registry;
    g.device.context = &g;

    abi::buffer_type_i calls = {};
    calls.get_name           = [](abi::buffer_type * type) { return of(type).name.c_str(); };
    calls.alloc_buffer       = alloc_buffer;
    calls.get_alignment      = [](abi::buffer_type *) { return (size_t) 128; };
    g.type                   = abi::make_buffer_type(layout(), calls, &g.device, &g);
}

void register_gpus() {
    cpu                = ggml<abi::device * (*)(int)>("ggml_backend_dev_by_type")(abi::device_cpu);
    const char * sizes = getenv("GEARCPP_EMULATED_GPUS");
    for (const char * at = sizes && *sizes ? sizes : "4000"; *at; at += *at == ',') {
        char * end = nullptr;
        make_gpu((size_t) strtoull(at, &end, 10) << 20);
        at = end;
    }
    const char * order              = getenv("GEARCPP_EMULATED_ORDER");
    cuda_on_cpu::order_is_fixed()   = order && strcmp(order, "fixed") == 0;
    guards()                        = true;
    n_device()                      = (int) gpus.size();
    registry.version                = cpu->owner->version;
    registry.iface.get_name         = [](abi::reg *) { return "CUDA"; };
    registry.iface.get_device_count = [](abi::reg *) { return gpus.size(); };
    registry.iface.get_device       = [](abi::reg *, size_t i) { return &gpus[i]->device; };
    registry.iface.get_proc_address = [](abi::reg *, const char *) -> void * { return nullptr; };
    ggml<void (*)(abi::reg *)>("ggml_backend_register")(&registry);
}

} // namespace

} // namespace gear::cuda::emulated

extern "C" __attribute__((visibility("default"))) const gear::cuda::api * gearcpp_cuda_api(int version) {
    static std::once_flag once;
    std::call_once(once, gear::cuda::emulated::register_gpus);
    return version == gear::cuda::api_version ? &gear::cuda::emulated::table : nullptr;
}
