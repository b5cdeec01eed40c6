// backend.h - the backend of a device over ggml's CUDA.
#pragma once

#include "plugin/abi.h"

namespace gear {

class cuda_device;

// Throws gear::error when the wrapped device can make none, or one without events.
abi::backend * make_backend(cuda_device & device);

} // namespace gear
