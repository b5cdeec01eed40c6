// index_uploads.h - cell indices on their way to a GPU. Which cells a step writes, the host learns when llama.cpp uploads the indices: set_tensor of
// ggml-cuda's compute buffers is ours, and keeps a copy of them.
#pragma once

#include "plugin/abi.h"

#include <vector>

namespace gear {

// Keep from now on what the host uploads to tensors of indices in this buffer, which ggml-cuda has just made. Its free_buffer stays ggml-cuda's, by which
// that knows its own buffers. Throws gear::error when ggml-cuda's buffers are not all of one kind.
void keep_index_uploads(abi::buffer * buffer);

// What the host last put into a tensor of indices: true, and its bytes in `out`.
bool find_index_upload(const abi::tensor * indices, std::vector<char> & out);

} // namespace gear
