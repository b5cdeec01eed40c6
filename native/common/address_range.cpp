#include "common/address_range.h"

#include "common/error.h"

#include <algorithm>
#include <sys/mman.h>

namespace gear {

address_range::address_range(size_t bytes) : size_(std::max<size_t>(bytes, 1)) {
    void * range = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {
        fail(GEAR_ERROR_MEMORY, "could not reserve %.1f MiB of address space for the KV cache; is the address space limited (ulimit -v)?",
             size_ / 1048576.0);
    }
    data_ = static_cast<char *>(range);
}

address_range::~address_range() {
    munmap(data_, size_);
}

void address_range::commit() {
    if (mprotect(data_, size_, PROT_READ | PROT_WRITE) != 0) {
        fail(GEAR_ERROR_MEMORY, "not enough memory for %.1f MiB of f16 KV cache; use a smaller n_ctx", size_ / 1048576.0);
    }
}

} // namespace gear
