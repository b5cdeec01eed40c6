// Compile-time comparison of native/plugin/abi.h with the real headers of a llama.cpp tree (tests/test_abi.py compiles it when it is given one). At run
// time abi::open proves the same without headers; this says which member is wrong when a new release moves something.

#include "plugin/abi.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <cstddef>

namespace abi = gear::abi;

#define SAME_SIZE(ours, theirs) static_assert(sizeof(abi::ours) == sizeof(theirs), "size of " #theirs)
#define SAME_PLACE(ours, member, theirs, tm) static_assert(offsetof(abi::ours, member) == offsetof(theirs, tm), "place of " #theirs "." #tm)

SAME_SIZE(tensor, ggml_tensor);
SAME_PLACE(tensor, type, ggml_tensor, type);
SAME_PLACE(tensor, buf, ggml_tensor, buffer);
SAME_PLACE(tensor, ne, ggml_tensor, ne);
SAME_PLACE(tensor, nb, ggml_tensor, nb);
SAME_PLACE(tensor, op, ggml_tensor, op);
SAME_PLACE(tensor, op_params, ggml_tensor, op_params);
SAME_PLACE(tensor, flags, ggml_tensor, flags);
SAME_PLACE(tensor, src, ggml_tensor, src);
SAME_PLACE(tensor, view_src, ggml_tensor, view_src);
SAME_PLACE(tensor, view_offs, ggml_tensor, view_offs);
SAME_PLACE(tensor, data, ggml_tensor, data);
SAME_PLACE(tensor, name, ggml_tensor, name);
SAME_PLACE(tensor, extra, ggml_tensor, extra);
static_assert(abi::max_src == GGML_MAX_SRC && abi::max_dims == GGML_MAX_DIMS && abi::max_name == GGML_MAX_NAME, "limits");
static_assert(abi::max_op_params * sizeof(int32_t) == GGML_MAX_OP_PARAMS, "op_params");

SAME_SIZE(cgraph, ggml_cgraph);
SAME_PLACE(cgraph, n_nodes, ggml_cgraph, n_nodes);
SAME_PLACE(cgraph, nodes, ggml_cgraph, nodes);
SAME_PLACE(cgraph, leafs, ggml_cgraph, leafs);
SAME_PLACE(cgraph, use_counts, ggml_cgraph, use_counts);
SAME_PLACE(cgraph, visited, ggml_cgraph, visited_hash_set);
SAME_PLACE(cgraph, uid, ggml_cgraph, uid);

#if GGML_BACKEND_API_VERSION == 2
SAME_SIZE(buffer_type_2, ggml_backend_buffer_type);
SAME_PLACE(buffer_type_2, dev, ggml_backend_buffer_type, device);
SAME_PLACE(buffer_type_2, context, ggml_backend_buffer_type, context);
SAME_SIZE(buffer_type_i, ggml_backend_buffer_type_i);
SAME_PLACE(buffer_type_i, alloc_buffer, ggml_backend_buffer_type_i, alloc_buffer);
SAME_PLACE(buffer_type_i, get_alloc_size, ggml_backend_buffer_type_i, get_alloc_size);
SAME_PLACE(buffer_type_i, is_host, ggml_backend_buffer_type_i, is_host);
#else
SAME_SIZE(buffer_type_3, ggml_backend_buffer_type);
SAME_PLACE(buffer_type_3, dev, ggml_backend_buffer_type, device);
SAME_PLACE(buffer_type_3, context, ggml_backend_buffer_type, context);
SAME_PLACE(buffer_type_3, alloc_buffer, ggml_backend_buffer_type_i, alloc_buffer);
SAME_PLACE(buffer_type_3, alloc_buffer_n, ggml_backend_buffer_type_i, alloc_buffer_n);
SAME_PLACE(buffer_type_3, get_alignment, ggml_backend_buffer_type_i, get_alignment);
SAME_PLACE(buffer_type_3, get_max_size, ggml_backend_buffer_type_i, get_max_size);
SAME_PLACE(buffer_type_3, get_alloc_size, ggml_backend_buffer_type_i, get_alloc_size);
SAME_PLACE(buffer_type_3, get_alloc_size_n, ggml_backend_buffer_type_i, get_alloc_size_n);
SAME_PLACE(buffer_type_3, is_host, ggml_backend_buffer_type_i, is_host);
#endif

SAME_SIZE(buffer_i, ggml_backend_buffer_i);
SAME_PLACE(buffer_i, init_tensor, ggml_backend_buffer_i, init_tensor);
SAME_PLACE(buffer_i, memset_tensor, ggml_backend_buffer_i, memset_tensor);
SAME_PLACE(buffer_i, set_tensor, ggml_backend_buffer_i, set_tensor);
SAME_PLACE(buffer_i, get_tensor, ggml_backend_buffer_i, get_tensor);
SAME_PLACE(buffer_i, set_tensor_2d, ggml_backend_buffer_i, set_tensor_2d);
SAME_PLACE(buffer_i, cpy_tensor, ggml_backend_buffer_i, cpy_tensor);
SAME_PLACE(buffer_i, clear, ggml_backend_buffer_i, clear);
SAME_PLACE(buffer_i, reset, ggml_backend_buffer_i, reset);
SAME_SIZE(buffer, ggml_backend_buffer);
SAME_PLACE(buffer, size, ggml_backend_buffer, size);
SAME_PLACE(buffer, usage, ggml_backend_buffer, usage);

SAME_SIZE(backend_i, ggml_backend_i);
SAME_PLACE(backend_i, synchronize, ggml_backend_i, synchronize);
SAME_PLACE(backend_i, graph_compute, ggml_backend_i, graph_compute);
SAME_PLACE(backend_i, event_wait, ggml_backend_i, event_wait);
SAME_PLACE(backend_i, graph_optimize, ggml_backend_i, graph_optimize);
SAME_SIZE(backend, ggml_backend);
SAME_PLACE(backend, dev, ggml_backend, device);

SAME_SIZE(device_i, ggml_backend_device_i);
SAME_PLACE(device_i, get_type, ggml_backend_device_i, get_type);
SAME_PLACE(device_i, init_backend, ggml_backend_device_i, init_backend);
SAME_PLACE(device_i, buffer_from_host_ptr, ggml_backend_device_i, buffer_from_host_ptr);
SAME_PLACE(device_i, supports_op, ggml_backend_device_i, supports_op);
SAME_PLACE(device_i, supports_buft, ggml_backend_device_i, supports_buft);
SAME_PLACE(device_i, event_synchronize, ggml_backend_device_i, event_synchronize);
SAME_SIZE(device, ggml_backend_device);
SAME_PLACE(device_props, caps, ggml_backend_dev_props, caps);
static_assert(sizeof(abi::device_props) >= sizeof(ggml_backend_dev_props), "ggml_backend_dev_props grew");

SAME_SIZE(reg_i, ggml_backend_reg_i);
SAME_SIZE(reg, ggml_backend_reg);
SAME_SIZE(init_params, ggml_init_params);

static_assert(GGML_BACKEND_API_VERSION == 2 || GGML_BACKEND_API_VERSION == 3, "GGML_BACKEND_API_VERSION");
static_assert((int) abi::device_cpu == GGML_BACKEND_DEVICE_TYPE_CPU && (int) abi::device_igpu == GGML_BACKEND_DEVICE_TYPE_IGPU, "device types");
static_assert((int) abi::graph_failed == GGML_STATUS_FAILED && (int) abi::graph_success == GGML_STATUS_SUCCESS, "ggml_status");
static_assert((int) abi::usage_compute == GGML_BACKEND_BUFFER_USAGE_COMPUTE, "buffer usage");

SAME_SIZE(custom_params, ggml_custom_op_params);
SAME_PLACE(custom_params, n_tasks, ggml_custom_op_params, n_tasks);
SAME_PLACE(custom_params, userdata, ggml_custom_op_params, userdata);
