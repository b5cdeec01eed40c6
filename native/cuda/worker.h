// worker.h - the device and the stream that a cache's work goes to, and memory there.
#pragma once

#include "codec/tile.h"
#include "cuda/api.h"

#include <memory>

namespace gear::cuda {

// Throws gear::error with CUDA's own words.
void require_ok(const api & with, int error, const char * what);

// A device is selected for the calling thread, and at the end the one that was before: of several GPUs each has a worker, and other libraries in the
// process have a choice of their own.
class selected_device {
  public:
    selected_device(const api & with, int device);
    ~selected_device() { with_.select_device(before_); }
    selected_device(const selected_device &)             = delete;
    selected_device & operator=(const selected_device &) = delete;

  private:
    const api & with_;
    int         before_ = 0;
};

// Device memory, of the device selected.
class device_block {
  public:
    device_block(const api & with, size_t bytes);
    ~device_block();
    device_block(const device_block &)             = delete;
    device_block & operator=(const device_block &) = delete;

    uint8_t * data() const { return data_; }
    size_t    size() const { return size_; }

  private:
    const api & with_;
    uint8_t *   data_ = nullptr;
    size_t      size_;
};

// The device and the stream that contexts work on, and scratch that their layers share. Whoever calls something that takes a worker has its device
// selected.
class cuda_worker {
  public:
    cuda_worker(const api & with, int device);
    ~cuda_worker();
    cuda_worker(const cuda_worker &)             = delete;
    cuda_worker & operator=(const cuda_worker &) = delete;

    // Scratch that grows; growing waits for the stream.
    uint8_t * pack_scratch(const tile_layout & layout);
    uint8_t * partials(size_t bytes);
    size_t    scratch_bytes() const;

    const api &  with;
    const int    device;
    device_facts facts;
    stream       work    = nullptr;
    int          n_block = 0; // of pack

  private:
    uint8_t *                     grown(std::unique_ptr<device_block> & block, size_t bytes);
    std::unique_ptr<device_block> pack_, partial_;
};

} // namespace gear::cuda
