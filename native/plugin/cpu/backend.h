// backend.h - the backend of a device over the CPU.
#pragma once

#include "plugin/abi.h"

namespace gear {

class cpu_device;

// Throws gear::error when the wrapped device can make none.
abi::backend * make_backend(cpu_device & device);
void           set_backend_threads(abi::backend * backend, int n_threads);
void           set_backend_abort(abi::backend * backend, abi::abort_callback callback, void * data);

} // namespace gear
