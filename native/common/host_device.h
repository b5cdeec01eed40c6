// host_device.h - GEAR_HD marks a function that CUDA kernels call, too: nvcc compiles it for both sides, other compilers see an ordinary function.
#pragma once

#if defined(__CUDACC__)
#    define GEAR_HD __host__ __device__
#else
#    define GEAR_HD
#endif
