#include "plugin/cuda/index_uploads.h"

#include "common/error.h"

#include <mutex>
#include <unordered_map>

namespace gear {

namespace {

// What llama.cpp last uploaded to a tensor of indices, by tensor. Tensors of graphs that are gone stay until their address is used again.
struct index_uploads {
    static constexpr size_t most_bytes   = (size_t) 1 << 24; // indices are of one step, those of a K-shift of all cells
    static constexpr size_t most_tensors = (size_t) 1 << 14;

    std::mutex                                                 lock;
    std::unordered_map<const abi::tensor *, std::vector<char>> data;

    void keep(const abi::tensor * tensor, const void * bytes, size_t size) {
        std::lock_guard<std::mutex> guard(lock);
        if (data.size() >= most_tensors && data.find(tensor) == data.end()) {
            data.clear();
        }
        const char * from = static_cast<const char *>(bytes);
        data[tensor].assign(from, from + size);
    }

    bool find(const abi::tensor * tensor, std::vector<char> & out) {
        std::lock_guard<std::mutex> guard(lock);
        const auto                  found = data.find(tensor);
        if (found == data.end()) {
            return false;
        }
        out = found->second;
        return true;
    }
};

index_uploads & all_uploads() {
    static index_uploads uploads;
    return uploads;
}

using set_function = decltype(abi::buffer_i::set_tensor);
std::mutex   set_lock;
set_function inner_set_tensor = nullptr; // the same for all buffers of ggml-cuda

bool is_index(const abi::tensor * tensor) {
    return (tensor->type == abi::number().type_i64 || tensor->type == abi::number().type_i32) && !tensor->view_src;
}

void set_tensor(abi::buffer * buffer, abi::tensor * tensor, const void * data, size_t offset, size_t size) {
    if (is_index(tensor) && offset == 0 && size <= index_uploads::most_bytes && size == abi::ggml().ggml_nbytes(tensor)) {
        all_uploads().keep(tensor, data, size);
    }
    inner_set_tensor(buffer, tensor, data, offset, size);
}

} // namespace

void keep_index_uploads(abi::buffer * buffer) {
    if (!buffer || buffer->iface.set_tensor == set_tensor) {
        return;
    }
    std::lock_guard<std::mutex> guard(set_lock);
    if (inner_set_tensor && inner_set_tensor != buffer->iface.set_tensor) {
        fail(GEAR_ERROR_UNSUPPORTED, "ggml-cuda has buffers of several kinds; a GEAR cache does not know which one this is");
    }
    inner_set_tensor         = buffer->iface.set_tensor;
    buffer->iface.set_tensor = set_tensor;
}

bool find_index_upload(const abi::tensor * indices, std::vector<char> & out) {
    return all_uploads().find(indices, out);
}

} // namespace gear
