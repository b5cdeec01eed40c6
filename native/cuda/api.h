// api.h - what libgearcpp-cuda offers: one table of functions, found by name after dlopen. libgearcpp itself has no CUDA in it; it loads that library only
// when llama.cpp has a CUDA device. In tests the same table runs the same kernels on the CPU (native/tests/cuda_on_cpu.h).
//
// Functions return 0, or a number that error_text() knows. Streams and events are CUDA's own, as ggml's are: one process has one context a device. What is
// made, and which device kernels run on, goes by the device that the calling thread has selected, as everywhere in CUDA; its number is CUDA's too, so that
// it is found from an address of ggml's (device_of_address) and not from the name that ggml gives the device.
#pragma once

#include "cuda/arguments.h"

#include <cstddef>
#include <cstdint>

namespace gear::cuda {

constexpr int api_version = 5; // of this table and of the structures in arguments.h

using stream = struct stream_handle *; // cudaStream_t
using event  = struct event_handle *;  // cudaEvent_t

struct device_facts {
    char    name[128];
    int32_t major, minor; // compute capability
    int32_t n_processor;  // multiprocessors
    int64_t shared_bytes; // that one block can have
    int64_t l2_bytes;     //
    int64_t bytes_free;   //
    int64_t bytes_total;  //
};

struct api {
    int32_t version; // api_version of the library

    const char * (*error_text)(int error);
    int (*device_count)(int * n);
    int (*device_of_address)(const void * address, int * device);
    int (*select_device)(int device); // for the calling thread
    int (*current_device)(int * device);
    int (*describe)(int device, device_facts * facts);

    int (*wait_device)(); // the host waits for every stream of the selected device, ggml's too

    int (*allocate)(void ** memory, size_t bytes);
    int (*release)(void * memory);
    int (*allocate_host)(void ** memory, size_t bytes); // pinned
    int (*release_host)(void * memory);

    int (*make_stream)(stream * made);
    int (*free_stream)(stream s);
    int (*wait_stream)(stream s); // the host waits
    int (*make_event)(event * made);
    int (*free_event)(event e);
    int (*record)(event e, stream s);
    int (*wait_event)(stream s, event e); // the stream waits
    int (*wait_event_host)(event e);

    int (*upload)(void * device, const void * host, size_t bytes, stream s);
    int (*download)(void * host, const void * device, size_t bytes, stream s);
    int (*copy)(void * to, const void * from, size_t bytes, stream s); // device to device
    int (*fill)(void * device, int value, size_t bytes, stream s);

    int (*write_rows)(const write_arguments * args, stream s);
    int (*set_slots)(const slot_arguments * args, stream s);
    int64_t (*pack_scratch_bytes)(const tile_layout * layout, int n_block);
    int (*pack)(const pack_arguments * args, int n_block, stream s); // n_block: blocks that the scratch is for
    int (*unpack)(const unpack_arguments * args, stream s);
    // How decode's ranges of tiles are cut, into args; then the bytes of partials that it needs (0: prefill).
    int64_t (*plan_attend)(attend_arguments * args, int n_processor);
    int (*attend)(const attend_arguments * args, stream s);
    int (*observe)(const observe_arguments * args, stream s);
    int (*measure)(const measure_arguments * args, stream s);
};

using get_api = const api * (*)(int version); // "gearcpp_cuda_api": nullptr for another version

} // namespace gear::cuda
