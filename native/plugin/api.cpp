// api.cpp - the plugin's part of the C interface, and the entry through which unmodified llama.cpp programs load it (GGML_BACKEND_PATH).

#include "codec/config_text.h"
#include "common/checksum.h"
#include "common/error.h"
#include "common/settings.h"
#include "plugin/kv_devices.h"
#include "plugin/kv_session.h"
#include "session/callbacks.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

struct gear_device {
    explicit gear_device(const gear_device_params & params) : devices(params) {}
    gear::kv_devices devices;
};

struct gear_session {
    template <class... Arguments> explicit gear_session(Arguments &&... arguments) : session(std::forward<Arguments>(arguments)...) {}
    gear::kv_session session;
};

namespace {

gear::kv_devices * devices_of(gear_device * device) {
    return device ? &device->devices : nullptr;
}

template <class T> void require(const T & ok, const char * what) {
    if (!ok) {
        gear::fail(GEAR_ERROR_INVALID, "%s", what);
    }
}

// The elements of a row are counted in an int.
void check_layer(const gear_layer & layer) {
    for (const int32_t d_head : { layer.d_head_k, layer.d_head_v }) {
        if (layer.n_head_kv < 0 || d_head < 0 || (d_head > 0 && layer.n_head_kv > INT32_MAX / d_head)) {
            gear::fail(GEAR_ERROR_INVALID, "layer %d: no cache has %d heads of %d channels", layer.il, layer.n_head_kv, d_head);
        }
    }
}

// Where the caller names the layers, settings are for one of them, whose heads can take them.
void check_exception(const gear_layer_config & exception, const gear_device_params & params) {
    const gear_layer * end   = params.layers + params.n_layer;
    const gear_layer * layer = std::find_if(params.layers, end, [&](const gear_layer & candidate) { return candidate.il == exception.il; });
    if (params.n_layer > 0 && layer == end) {
        gear::fail(GEAR_ERROR_INVALID, "layer %d has settings of its own, but no KV cache", exception.il);
    }
    if (params.n_layer > 0 && gear_head_check(&exception.config, layer->d_head_k, layer->d_head_v) == GEAR_ERROR_INVALID) {
        const std::string reason = gear_last_error();
        gear::fail(GEAR_ERROR_INVALID, "layer %d: %s", exception.il, reason.c_str());
    }
}

std::mutex    plugin_lock;
gear_device * plugin_device = nullptr; // lives as long as the process: llama.cpp never gives a registered device back

} // namespace

extern "C" {

gear_config gear_config_default(void) {
    const gear_side_config side = { 4, 0, 8, 0, 8, 1, 1, 0, 0.0f, 1.0f, 0 };
    gear_config            c    = { side, side, 256, 128, 4, 1 };
    c.k.group                   = 32;
    c.k.rotate                  = 2;
    c.k.feedback                = 2;
    c.v.center                  = 1;
    return c;
}

gear_status gear_open(void * libllama) {
    return gear::guarded([&] { gear::abi::open(libllama); });
}

const char * gear_ggml_version(void) {
    return gear::abi::is_open() ? gear::abi::ggml().ggml_version() : "";
}

const char * gear_ggml_commit(void) {
    return gear::abi::is_open() ? gear::abi::ggml().ggml_commit() : "";
}

gear_device * gear_device_new(const gear_device_params * params) {
    gear_device * made = nullptr;
    gear::guarded([&] {
        require(params, "params is NULL");
        require(params->n_layer >= 0 && (params->layers || params->n_layer == 0), "n_layer says how many layers there are, and layers is where they are");
        for (int32_t i = 0; i < params->n_layer; ++i) {
            check_layer(params->layers[i]);
        }
        require(params->n_exception >= 0 && (params->exceptions || params->n_exception == 0),
                "n_exception says how many layers are coded otherwise, and exceptions is where they are");
        for (int32_t i = 0; i < params->n_exception; ++i) {
            check_exception(params->exceptions[i], *params);
        }
        if (!gear::abi::is_open()) {
            gear::fail(GEAR_ERROR_ABI, "gear_open must come before gear_device_new");
        }
        made = new gear_device(*params);
    });
    return made;
}

void gear_device_free(gear_device * device) {
    delete device;
}

const char * gear_default_devices(void) {
    static thread_local std::string names;
    names.clear();
    gear::guarded([&] {
        if (!gear::abi::is_open()) {
            gear::fail(GEAR_ERROR_ABI, "gear_open must come before gear_default_devices");
        }
        names = gear::kv_devices::defaults();
    });
    return names.c_str();
}

void * gear_device_ggml(gear_device * device, int32_t i) {
    return device && i >= 0 && (size_t) i < device->devices.size() ? device->devices[(size_t) i].ggml_device() : nullptr;
}

const char * gear_device_error(gear_device * device, gear_status * status) {
    static thread_local gear::kept_error taken;
    taken = device ? device->devices.take_error() : gear::kept_error();
    if (status) {
        *status = taken.status;
    }
    return taken.text;
}

int32_t gear_device_stats(gear_device * device, gear_store_stats * stats, int32_t n) {
    int32_t count = -1;
    gear::guarded([&] {
        require(device, "device is NULL");
        require(stats || n <= 0, "stats is NULL");
        const auto all = device->devices.stats();
        std::copy_n(all.begin(), std::min<size_t>(all.size(), (size_t) std::max(n, 0)), stats);
        count = (int32_t) all.size();
    });
    return count;
}

const char * gear_device_other_use(gear_device * device, int32_t il) {
    static thread_local std::string name;
    name.clear();
    gear::guarded([&] {
        require(device, "device is NULL");
        name = device->devices.other_use(il);
    });
    return name.c_str();
}

int64_t gear_device_scratch_bytes(gear_device * device) {
    return device ? device->devices.scratch_bytes() : 0;
}

gear_session * gear_session_new(gear_device * device, int64_t state_bytes) {
    gear_session * made = nullptr;
    gear::guarded([&] {
        require(state_bytes >= 0, "a state cannot have a negative number of bytes");
        made = new gear_session(devices_of(device), (size_t) state_bytes);
    });
    return made;
}

gear_session * gear_session_open(int64_t n_bytes, gear_session_read read, void * user, int32_t note_only) {
    gear_session * made = nullptr;
    gear::guarded([&] {
        require(n_bytes >= 0 && read, "a session is read through a function, and cannot have a negative number of bytes");
        made = new gear_session(std::make_unique<gear::callback_input>(n_bytes, read, user), note_only != 0);
    });
    return made;
}

void gear_session_free(gear_session * session) {
    delete session;
}

void * gear_session_window(gear_session * session, int64_t * n_bytes) {
    if (n_bytes) {
        *n_bytes = session ? (int64_t) session->session.window_size() : 0;
    }
    return session ? session->session.window() : nullptr;
}

const void * gear_session_note(gear_session * session, int64_t * n_bytes) {
    if (n_bytes) {
        *n_bytes = session ? (int64_t) session->session.note().size() : 0;
    }
    return session ? session->session.note().data() : nullptr;
}

int64_t gear_session_extra_bytes(gear_session * session) {
    return session ? (int64_t) session->session.extra_size() : 0;
}

gear_status gear_session_save(gear_session * session, int64_t state_bytes, const void * note, int64_t n_note, const void * extra, int64_t n_extra,
                              int32_t n_threads, gear_session_write write, void * user) {
    return gear::guarded([&] {
        require(session, "session is NULL");
        require(state_bytes >= 0 && n_note >= 0 && n_extra >= 0 && write, "a session is written through a function, and nothing has negative bytes");
        require((note || n_note == 0) && (extra || n_extra == 0), "note or extra is NULL, but has bytes");
        gear::callback_output out(write, user);
        session->session.save((size_t) state_bytes, note, (size_t) n_note, extra, (size_t) n_extra, n_threads, out);
        out.finish();
    });
}

gear_status gear_session_forget_others(gear_session * session) {
    return gear::guarded([&] {
        require(session, "session is NULL");
        session->session.forget_others();
    });
}

gear_status gear_session_attach(gear_session * session, gear_device * device) {
    return gear::guarded([&] {
        require(session, "session is NULL");
        session->session.attach(devices_of(device));
    });
}

gear_status gear_session_restore(gear_session * session, void * extra, int64_t * n_changed) {
    return gear::guarded([&] {
        require(session, "session is NULL");
        const int64_t n = session->session.restore(extra);
        if (n_changed) {
            *n_changed = n;
        }
    });
}

uint64_t gear_checksum(const void * data, int64_t n) {
    return gear::checksum_of(data, data ? (size_t) std::max<int64_t>(n, 0) : 0);
}

// What ggml's loader calls after dlopen: the highest score wins, 0 refuses.
GEAR_API int ggml_backend_score(void) {
    return 1;
}

GEAR_API gear::abi::reg * ggml_backend_init(void) {
    const void * const caller = __builtin_return_address(0); // in the ggml that loads this library, also where there are two
    const gear_status  status = gear::guarded([caller] {
        const std::lock_guard<std::mutex> guard(plugin_lock);
        gear::abi::open(nullptr, caller);
        if (!plugin_device) {
            // Two of the same name would share out the layers of a model, and then its cache.
            if (gear::abi::ggml().ggml_backend_dev_by_name("GEAR0")) {
                gear::fail(GEAR_ERROR_INVALID, "another gearcpp is loaded in this process already; load one of them");
            }
            const gear::text_config  text   = gear::config_from_text(gear::settings::kv_type());
            const gear_device_params params = {
                text.config, nullptr, 0, 0, nullptr, nullptr, nullptr, text.exceptions.data(), (int32_t) text.exceptions.size()
            };
            plugin_device = new gear_device(params);
        }
    });
    if (status != GEAR_OK) {
        fprintf(stderr, "gearcpp: %s\n", gear_last_error()); // the program has no other way to learn why
        return nullptr;
    }
    return plugin_device->devices.ggml_reg();
}

gear_device * gear_plugin_device(void) {
    const std::lock_guard<std::mutex> guard(plugin_lock);
    return plugin_device;
}

} // extern "C"
