// loader.h - finding libgearcpp-cuda at run time.
#pragma once

#include "cuda/api.h"

#include <string>

namespace gear::cuda {

// The table of libgearcpp-cuda, which lies beside libgearcpp (GEARCPP_CUDA_LIBRARY names another file); loaded once. nullptr, with what is missing and
// what to do about it in `problem`, when it is not there, does not load, is of another version, or sees no GPU.
const api * load(std::string & problem);

} // namespace gear::cuda
