#include "cuda/worker.h"

#include "common/error.h"

#include <algorithm>

namespace gear::cuda {

void require_ok(const api & with, int error, const char * what) {
    if (error != 0) {
        fail(GEAR_ERROR_INTERNAL, "CUDA: %s: %s", what, with.error_text(error));
    }
}

selected_device::selected_device(const api & with, int device) : with_(with) {
    require_ok(with, with.current_device(&before_), "asking for the device");
    require_ok(with, with.select_device(device), "choosing the device");
}

device_block::device_block(const api & with, size_t bytes) : with_(with), size_(bytes) {
    void * memory = nullptr;
    if (with.allocate(&memory, std::max<size_t>(bytes, 1)) != 0) {
        fail(GEAR_ERROR_MEMORY, "the GPU has not the %.1f MiB that the KV cache needs; use a smaller n_ctx or fewer bits", (double) bytes / 1048576.0);
    }
    data_ = static_cast<uint8_t *>(memory);
}

device_block::~device_block() {
    with_.release(data_);
}

cuda_worker::cuda_worker(const api & with, int device) : with(with), device(device) {
    const selected_device selected(with, device);
    require_ok(with, with.describe(device, &facts), "asking about the device");
    require_ok(with, with.make_stream(&work), "making a stream");
    n_block = 2 * facts.n_processor;
}

cuda_worker::~cuda_worker() {
    int before = 0;
    with.current_device(&before); // nothing is thrown here
    with.select_device(device);
    with.wait_stream(work);
    with.free_stream(work);
    pack_.reset();
    partial_.reset();
    with.select_device(before);
}

uint8_t * cuda_worker::grown(std::unique_ptr<device_block> & block, size_t bytes) {
    if (!block || block->size() < bytes) {
        require_ok(with, with.wait_stream(work), "waiting for the stream");
        block.reset();
        block = std::make_unique<device_block>(with, bytes);
    }
    return block->data();
}

uint8_t * cuda_worker::pack_scratch(const tile_layout & layout) {
    return grown(pack_, (size_t) with.pack_scratch_bytes(&layout, n_block));
}

uint8_t * cuda_worker::partials(size_t bytes) {
    return grown(partial_, bytes);
}

size_t cuda_worker::scratch_bytes() const {
    return (pack_ ? pack_->size() : 0) + (partial_ ? partial_->size() : 0);
}

} // namespace gear::cuda
